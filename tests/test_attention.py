"""Gated dual-softmax attention against torch's own softmax attention in float64, on the CPU, on a GPU, and, with
TRITON_INTERPRET=1 in the environment, the GPU's kernels in Triton's interpreter."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import kernels
from kernels import attention
from kernels._library import INTERPRETED

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
NUMBERS = [torch.float32] if INTERPRETED else [torch.float64, *FLOATS]
PLACES = [pytest.param("cpu", dtype, id=f"cpu-{dtype}") for dtype in NUMBERS]
PLACES += [pytest.param("cuda", dtype, marks=pytest.mark.gpu, id=f"cuda-{dtype}") for dtype in FLOATS]
everywhere = pytest.mark.parametrize(("device", "dtype"), PLACES)
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="the interpreter runs the kernels, not this form")
NAMES = ("q", "k", "v", "k_ins", "v_ins", "gate")


@pytest.fixture(autouse=True)
def _same_numbers():
    torch.manual_seed(0)


@pytest.fixture(params=["one masked call", pytest.param("a call for each length", marks=not_interpreted)])
def _calls(request, monkeypatch):
    """Both ways in which the CPU treats lengths; the kernels have one."""
    monkeypatch.setattr(attention, "OWN_CALL", 1 << 60 if request.param == "one masked call" else 0)


def inputs(B=2, H=3, N=17, M=9, D=32, dtype=torch.float32, seed=0, device="cpu"):
    """The six tensors; the gate in float32."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, H, N, D)] * 3 + [(B, H, M, D)] * 2 + [(H,)]
    tensors = [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]
    tensors[5] = tensors[5].float()
    return [t.to(device).requires_grad_() for t in tensors]


def expected(q, k, v, k_ins=None, v_ins=None, gate=None, lengths=None, scale=None):
    """Sample by sample with torch's attention, padding cut off instead of masked."""
    rows = []
    for b in range(len(q)):
        row = F.scaled_dot_product_attention(q[b], k[b], v[b], scale=scale)
        M = 0 if k_ins is None else k_ins.shape[2] if lengths is None else int(lengths[b])
        if M:
            second = F.scaled_dot_product_attention(q[b], k_ins[b, :, :M], v_ins[b, :, :M], scale=scale)
            row = row + gate.view(-1, 1, 1) * second
        rows.append(row)
    return torch.stack(rows)


def differentiate(function, tensors, weight, **options):
    """Result and gradients; those of tensors that do not matter are 0."""
    out = function(*tensors, **options)
    grads = torch.autograd.grad(out, tensors, weight.to(out.dtype), allow_unused=True)
    return [out.detach(), *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, tensors, strict=True))]


def same(got, want, device, dtype):
    """The same bits from the kernels; torch's products on a CPU round as strides and shapes lead them."""
    tolerance = 0.0 if device == "cuda" or INTERPRETED else 20 * torch.finfo(dtype).eps
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def max_of(tensors) -> float:
    return max(tensor.abs().max().item() for tensor in tensors)


def within_budget(tensors, lengths=None, scale=None, factor=2):
    """Result and gradients err at most `factor` times as much as those of the eager form in the same precision, plus
    the rounding of a few numbers of the size at hand (of the gate's: of a sum of many). lengths: a list."""
    exact = [t.detach().cpu().double().requires_grad_() for t in tensors]
    weight = torch.randn(exact[0].shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    want = differentiate(expected, exact, weight, lengths=lengths, scale=scale)
    options = {"scale": scale}
    if lengths is not None:
        options["ins_lengths"] = torch.tensor(lengths, device=tensors[0].device)
    weight = weight.to(tensors[0].device)
    eager = differentiate(kernels.gated_attention_reference, tensors, weight, **options)
    ours = differentiate(kernels.gated_attention, tensors, weight, **options)
    for name, w, e, o, like in zip(("out", *NAMES), want, eager, ours, (tensors[0], *tensors), strict=True):
        assert o.dtype == like.dtype
        assert o.shape == w.shape
        if not w.numel():
            continue
        error, allowed = (o.cpu().double() - w).abs().max(), factor * (e.cpu().double() - w).abs().max()
        eps = torch.finfo(tensors[0].dtype).eps  # maps are computed again from logarithms in float32
        band = 4 * eps * w.abs().max().item() + (2**-22 if eps < 1e-9 else 2**-17)
        if name == "gate":  # a sum over rows and features of parts that may cancel
            logs = 2**-21 if factor == 2 else 2**-19  # beyond 100 they have fewer bits after the point
            band = tensors[0][:, 0].numel() ** 0.5 * (eps / 4 + logs)
        if name in "qk" and tensors[0].shape[2] == 1:  # of one key: 0, but for out . dout, of out as it is stored
            step = tensors[0].shape[-1] ** -0.5 if scale is None else scale
            band += eps * step * (want[0] * weight.cpu()).abs().sum(-1).max().item() * max_of(tensors[:2])
        assert error <= allowed + band, (name, error.item(), allowed.item(), band)
    return ours


LARGE = [(127, 1), (128, 77), (129, 70), (130, 0), (131, 16), (132, 65), (143, 64), (144, 17), (145, 70)]
SMALL = [(1, 1), (1, 70), (15, 77), (16, 16), (17, 0), (63, 33), (64, 128), (65, 129)]


@everywhere
@pytest.mark.parametrize(("N", "M"), SMALL + LARGE + [(289, 257), (292, 70)])
def test_error_budget_at_odd_sizes(N, M, device, dtype):
    heads = 2 if N < 100 else 1
    within_budget(inputs(B=heads, H=heads, N=N, M=M, D=64, dtype=dtype, device=device))


@everywhere
@pytest.mark.parametrize("D", [8, 32, 48, 96, 128])
def test_error_budget_of_head_dimensions(D, device, dtype):
    within_budget(inputs(N=35, M=18, D=D, dtype=dtype, device=device), [18, 5])


@everywhere
@pytest.mark.parametrize("gate", [0.0, 1e-8, 1.0, -1.0])
@pytest.mark.parametrize("heads", [1, 3])
def test_error_budget_of_gates(gate, heads, device, dtype):
    tensors = inputs(N=19, M=7, dtype=dtype, device=device)
    tensors[5] = torch.full((heads,), gate, device=device, requires_grad=True)
    within_budget(tensors, [7, 3])


@pytest.mark.usefixtures("_calls")
@everywhere
@pytest.mark.parametrize("lengths", [[70, 0, 1, 33], [16, 17, 64, 65], [0, 0, 0, 0]])
def test_error_budget_of_lengths(lengths, device, dtype):
    ours = within_budget(inputs(B=4, H=2, N=33, M=70, D=64, dtype=dtype, device=device), lengths)
    for b, length in enumerate(lengths):  # padding has no part in anything
        assert (ours[4][b, :, length:] == 0).all()
        assert (ours[5][b, :, length:] == 0).all()


@not_interpreted
@devices
def test_gate_gradient_of_many_rows(device):
    """A sum of half a million parts that cancel, heads inside as a linear layer leaves them."""
    torch.manual_seed(1)
    qkv, kv_ins = torch.randn(24, 289, 3, 4, 64, device=device), torch.randn(24, 9, 2, 4, 64, device=device)
    gate, weight = torch.ones(4, device=device, requires_grad=True), torch.randn(24, 289, 4, 64, device=device)
    (got,) = torch.autograd.grad(kernels.gated_attention_packed(qkv, kv_ins, gate), gate, weight)
    q, k_ins, v_ins = (t.cpu().double().transpose(1, 2) for t in (qkv[:, :, 0], kv_ins[:, :, 0], kv_ins[:, :, 1]))
    second = F.scaled_dot_product_attention(q, k_ins, v_ins).transpose(1, 2)
    want = (second * weight.cpu()).sum((0, 1, 3))
    assert (got.cpu() - want).norm() < 6e-7 * want.norm()


@pytest.mark.usefixtures("_calls")
@everywhere
@pytest.mark.parametrize("scale", [0.3, -0.2])
def test_error_budget_of_another_scale(scale, device, dtype):
    within_budget(inputs(N=21, M=70, dtype=dtype, device=device), [70, 9], scale=scale)


@everywhere
@pytest.mark.parametrize(("where", "sign"), [(slice(-1, None), 1), (slice(None), -1), (slice(1, None), -1)])
def test_scores_far_from_zero(where, sign, device, dtype):
    """Softmax without overflow: a row's last score beyond 100; all its scores below -100; all but the first."""
    tensors = inputs(B=1, H=1, N=150, M=70, dtype=dtype, device=device)
    with torch.no_grad():
        tensors[0] *= 5
        for keys, row in ((tensors[1], tensors[0][:, :, :1]), (tensors[3], tensors[0][:, :, 1:2])):
            keys[:, :, where] = 6 * sign * row.sign()
            if where.start == 1:
                keys[:, :, 0] = 6 * row[:, :, 0].sign()
    assert all(torch.isfinite(t).all() for t in within_budget(tensors, factor=100))


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu), *(["cpu"] if INTERPRETED else [])])
@pytest.mark.parametrize("tiles", [(64, 64, 32), (32, 64, 32), (16, 64, 16), (32, 16, 64), (64, 128, 128)])
def test_tiles_do_not_matter(tiles, device, monkeypatch):
    """Those of other types and architectures, also where they are larger than what they cut."""
    monkeypatch.setattr(attention, "config_of", lambda *_: attention.Config(*tiles, 4, 1))
    for N, M, lengths in ((145, 70, [70, 65]), (40, 20, [20, 0])):
        within_budget(inputs(H=1, N=N, M=M, D=32, device=device), lengths)


def strided(t, how):
    """The same values in other strides, 1 over D but for "transposed"."""
    if how == "transposed":
        return t.detach().mT.contiguous().mT.requires_grad_()
    if how == "interleaved":  # as in a packed layout
        return torch.stack([t.detach(), torch.full_like(t, torch.nan)], 3)[:, :, :, 0].requires_grad_()
    if how == "heads inside":
        return t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    return t.detach()[:1].requires_grad_()  # "shared": one for the whole batch


@everywhere
@pytest.mark.parametrize("how", ["transposed", "interleaved", "heads inside", "mixed"])
def test_strides_do_not_matter(how, device, dtype):
    tensors = inputs(N=18, M=20, dtype=dtype, device=device)
    hows = itertools.cycle(["transposed", "interleaved", "heads inside"] if how == "mixed" else [how])
    other = [strided(t, next(hows)) for t in tensors[:5]] + tensors[5:]
    weight = torch.randn(tensors[0].shape, device=device).to(dtype)
    lengths = torch.tensor([20, 3], device=device)
    want = differentiate(kernels.gated_attention, tensors, weight, ins_lengths=lengths)
    got = differentiate(kernels.gated_attention, other, strided(weight, next(hows)).detach(), ins_lengths=lengths)
    same(got, want, device, dtype)


@everywhere
def test_one_instruction_for_the_whole_batch(device, dtype):
    """Stride 0 over the batch, of k_ins and v_ins, of lengths, and of the gradient that comes in."""
    tensors = inputs(B=3, N=18, M=20, dtype=dtype, device=device)
    for i in (3, 4):
        tensors[i] = tensors[i].detach()[:1].requires_grad_()

    def shared(q, k, v, k_ins, v_ins, gate):
        lengths = torch.tensor([11], device=device).expand(3)
        k_ins, v_ins = (t.expand(3, -1, -1, -1) for t in (k_ins, v_ins))
        return kernels.gated_attention(q, k, v, k_ins, v_ins, gate, ins_lengths=lengths)

    def apart(q, k, v, k_ins, v_ins, gate):
        return expected(q, k, v, k_ins.expand(3, -1, -1, -1), v_ins.expand(3, -1, -1, -1), gate, [11] * 3)

    one = torch.ones((), device=device).expand(tensors[0].shape)
    got = differentiate(shared, tensors, one)
    exact = [t.detach().cpu().double().requires_grad_() for t in tensors]
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.15}[dtype]
    for a, b in zip(got, differentiate(apart, exact, one.cpu()), strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=tolerance, atol=tolerance)


@everywhere
def test_gate_zero_is_plain_attention_and_can_open(device, dtype):
    tensors = inputs(N=33, M=20, dtype=dtype, device=device)
    with torch.no_grad():
        tensors[5].zero_()
    weight = torch.randn(tensors[0].shape, device=device)
    got = differentiate(kernels.gated_attention, tensors, weight)
    plain = differentiate(kernels.gated_attention, tensors[:3], weight)
    assert all(torch.equal(a, b) for a, b in zip(got[:1] + got[2:4], plain[:1] + plain[2:], strict=True))
    torch.testing.assert_close(got[1], plain[1])
    assert (got[6] != 0).all()
    assert (got[4] == 0).all()
    assert (got[5] == 0).all()


@pytest.mark.usefixtures("_calls")
@pytest.mark.parametrize("anything", ["nan", "-inf", "largest"])
@everywhere
def test_padding_may_hold_anything(anything, device, dtype):
    tensors = inputs(B=4, N=20, M=40, dtype=dtype, device=device)
    lengths = torch.tensor([40, 0, 1, 17], device=device)
    weight = torch.randn(tensors[0].shape, device=device)
    want = differentiate(kernels.gated_attention, tensors, weight, ins_lengths=lengths)
    number = torch.finfo(dtype).max if anything == "largest" else float(anything)
    with torch.no_grad():
        for b, length in enumerate(lengths.tolist()):
            tensors[3][b, :, length:] = tensors[4][b, :, length:] = number
    got = differentiate(kernels.gated_attention, tensors, weight, ins_lengths=lengths)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    for grad in got[4:6]:
        assert (grad[1] == 0).all()
    plain = differentiate(kernels.gated_attention, [t[1:2].detach().requires_grad_() for t in tensors[:3]], weight[1:2])
    torch.testing.assert_close(got[0][1:2], plain[0])
    if device == "cuda" or INTERPRETED:  # the CPU adds a second term of 0 in another order
        assert torch.equal(got[0][1:2], plain[0])


@pytest.mark.usefixtures("_calls")
@everywhere
def test_same_bits_again_and_in_any_order_of_samples(device, dtype):
    tensors = inputs(B=5, N=34, M=20, dtype=dtype, device=device)
    lengths, order = torch.tensor([20, 0, 7, 20, 13], device=device), torch.tensor([3, 1, 4, 0, 2], device=device)
    weight = torch.randn(tensors[0].shape, device=device)
    want = differentiate(kernels.gated_attention, tensors, weight, ins_lengths=lengths)
    again = differentiate(kernels.gated_attention, tensors, weight, ins_lengths=lengths)
    assert all(torch.equal(a, b) for a, b in zip(again, want, strict=True))
    moved = [t.detach()[order].requires_grad_() for t in tensors[:5]] + tensors[5:]
    got = differentiate(kernels.gated_attention, moved, weight[order], ins_lengths=lengths[order])
    assert all(torch.equal(a, b[order]) for a, b in zip(got[:6], want[:6], strict=True))


def packed(tensors):
    """(qkv, kv_ins, gate) of the six."""
    q, k, v, k_ins, v_ins, gate = (t.detach() for t in tensors)
    qkv = torch.stack([q, k, v]).permute(1, 3, 0, 2, 4).contiguous()
    kv_ins = torch.stack([k_ins, v_ins]).permute(1, 3, 0, 2, 4).contiguous()
    return [t.requires_grad_() for t in (qkv, kv_ins, gate)]


@everywhere
@pytest.mark.parametrize("options", [{}, {"ins_lengths": [20, 6], "scale": 0.25}])
@pytest.mark.parametrize("shared", [False, True])
def test_packed_is_the_same(options, shared, device, dtype):
    tensors = inputs(N=18, M=20, dtype=dtype, device=device)
    options = {k: torch.tensor(v, device=device) if k == "ins_lengths" else v for k, v in options.items()}
    if shared:
        for i in (3, 4):
            tensors[i] = tensors[i].detach()[:1].expand(2, -1, -1, -1).requires_grad_()
    weight = torch.randn(tensors[0].shape, device=device)
    want = differentiate(kernels.gated_attention, tensors, weight, **options)
    qkv, kv_ins, gate = packed(tensors)
    if shared:
        kv_ins = kv_ins.detach()[:1].expand(2, -1, -1, -1, -1).requires_grad_()
    got = differentiate(kernels.gated_attention_packed, [qkv, kv_ins, gate], weight.transpose(1, 2), **options)
    assert got[1].is_contiguous()
    assert torch.equal(got[0].transpose(1, 2), want[0])
    for a, b in zip([*got[1].unbind(2), *got[2].unbind(2)], want[1:6], strict=True):
        assert torch.equal(a.transpose(1, 2), b)
    assert torch.equal(got[3], want[6])


@everywhere
def test_without_an_instruction(device, dtype):
    tensors = inputs(N=20, M=0, dtype=dtype, device=device)
    weight = torch.randn(tensors[0].shape, device=device)
    plain = differentiate(kernels.gated_attention, tensors[:3], weight)
    for arguments in (tensors, [*tensors[:3], None, None, tensors[5]]):
        out = kernels.gated_attention(*arguments)
        assert torch.equal(out, plain[0])
    qkv, kv_ins, gate = packed(tensors)
    got = differentiate(kernels.gated_attention_packed, [qkv], weight.transpose(1, 2))
    assert torch.equal(got[0].transpose(1, 2), plain[0])
    assert torch.equal(got[1][:, :, 1].transpose(1, 2), plain[2])
    assert torch.equal(kernels.gated_attention_packed(qkv, kv_ins, gate), got[0])
    within_budget(tensors)


@devices
@pytest.mark.parametrize(("B", "N"), [(0, 5), (2, 0)])
def test_empty(B, N, device):
    tensors = inputs(B=B, N=N, M=4, device=device)
    got = differentiate(kernels.gated_attention, tensors, torch.zeros(B, 3, N, 32, device=device))
    assert got[0].shape == (B, 3, N, 32)
    assert all((t == 0).all() for t in got)


@devices
@pytest.mark.parametrize("lengths", [None, [9, 4]])
@pytest.mark.parametrize("form", ["separate", "packed", "plain"])
def test_operator_registration(form, lengths, device):
    """Schema, fake (shapes, strides), autograd, tracing: torch's own checks of a custom operator."""
    tensors = inputs(B=2, H=1, N=18, device=device)
    if form == "packed":
        qkv, kv_ins, gate = packed(tensors)
        tensors = [qkv, None, None, kv_ins, None, gate]
    if form == "plain":
        tensors = [*tensors[:3], None, None, None]
    lengths = torch.tensor(lengths, device=device) if lengths and form != "plain" else None
    torch.library.opcheck(torch.ops.kernels.gated_attention.default, (*tensors, lengths, 0.2))
    tensors = [t if t is None else t.detach() for t in tensors]
    out, *kept = torch.ops.kernels.gated_attention(*tensors, lengths, 0.2)
    arguments = (torch.randn_like(out), out, *kept, *tensors, lengths, 0.2)
    torch.library.opcheck(torch.ops.kernels.gated_attention_backward.default, arguments)


@devices
@pytest.mark.parametrize("N", [18, pytest.param(200, marks=not_interpreted)])
def test_compiles_whole(N, device):
    tensors = inputs(N=N, device=device)
    lengths = torch.tensor([9, 4], device=device)

    def model(*tensors):
        return kernels.gated_attention(*tensors, ins_lengths=lengths).sin()

    weight = torch.randn(tensors[0].shape, device=device)
    want = differentiate(model, tensors, weight)
    got = differentiate(torch.compile(model, fullgraph=True, backend="aot_eager"), tensors, weight)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@devices
def test_autocast_decides_the_type(device):
    tensors = inputs(N=18, device=device)
    if INTERPRETED:
        pytest.skip("the interpreter has no bfloat16 products")
    with torch.autocast(device, torch.bfloat16):
        got = differentiate(kernels.gated_attention, tensors, torch.ones(tensors[0].shape, device=device))
        mixed = kernels.gated_attention(tensors[0].bfloat16(), *tensors[1:])
    assert torch.equal(mixed, got[0])
    low = [t.detach().bfloat16().requires_grad_() for t in tensors[:5]] + tensors[5:]
    want = differentiate(kernels.gated_attention, low, torch.ones(tensors[0].shape, device=device))
    assert got[0].dtype == torch.bfloat16
    assert torch.equal(got[0], want[0])
    assert all(torch.equal(a, b.float()) for a, b in zip(got[1:], want[1:], strict=True))


@devices
def test_activation_checkpointing(device):
    tensors = inputs(N=18, device=device)
    weight = torch.randn(tensors[0].shape, device=device)
    want = differentiate(kernels.gated_attention, tensors, weight)
    got = differentiate(lambda *t: checkpoint(kernels.gated_attention, *t, use_reentrant=False), tensors, weight)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@devices
def test_a_second_derivative_is_refused(device):
    tensors = inputs(N=6, M=5, device=device)
    out = kernels.gated_attention(*tensors)
    grads = torch.autograd.grad(out.sin().sum(), tensors, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grads[0].sum().backward()


@devices
def test_gates_of_any_type(device):
    tensors = inputs(N=6, M=5, device=device)
    for dtype in (torch.bfloat16, torch.float64):
        gate = tensors[5].detach().to(dtype).requires_grad_()
        out = kernels.gated_attention(*tensors[:5], gate)
        assert torch.equal(out, kernels.gated_attention(*tensors[:5], gate.float()))
        assert torch.autograd.grad(out.sum(), gate)[0].dtype == dtype


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu), *(["cpu"] if INTERPRETED else [])])
def test_samples_far_apart_in_memory(device):
    """The third sample of every input, and of the gradient that comes in, 2**31 elements after the first; the stride
    itself still fits into 32 bits."""
    tensors = inputs(B=3, N=5, M=3, D=16, device=device)
    weight = torch.randn(tensors[0].shape, device=device)
    want = differentiate(kernels.gated_attention, tensors, weight)
    storage, places = torch.empty(2**31 + 8192, device=device), iter(range(0, 8192, 1024))

    def far(t):
        _, _, rows, D = t.shape
        wide = storage.as_strided(t.shape, (2**30, rows * D, D, 1), next(places))
        return wide.copy_(t.detach())

    given = [far(t).requires_grad_() for t in tensors[:5]] + tensors[5:]
    out = kernels.gated_attention(*given)
    assert torch.equal(out, want[0])
    q, k, v, k_ins, v_ins, gate = given
    kept = torch.ops.kernels.gated_attention(q, k, v, k_ins, v_ins, gate, None, 0.25)
    grads = torch.ops.kernels.gated_attention_backward(far(weight).transpose(1, 2), *kept, *given, None, 0.25)
    assert all(torch.equal(a, b) for a, b in zip(grads, want[1:], strict=True))


@not_interpreted
@pytest.mark.parametrize("lengths", [None, [9, 0, 4]])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_reference_is_two_attentions(lengths, scale):
    """Everything else is held against it, so it is held against torch, also where padding holds NaN."""
    tensors = inputs(B=3, dtype=torch.float64)
    weight = torch.randn(tensors[0].shape, dtype=torch.float64)
    want = differentiate(expected, tensors, weight, lengths=lengths, scale=scale)
    for b, length in enumerate(lengths or []):
        with torch.no_grad():
            tensors[3][b, :, length:] = tensors[4][b, :, length:] = torch.nan
    options = {"scale": scale, "ins_lengths": None if lengths is None else torch.tensor(lengths)}
    got = differentiate(kernels.gated_attention_reference, tensors, weight, **options)
    for a, b in zip(got, want, strict=True):
        tolerance = 1e-5 if a.dtype == torch.float32 else 1e-9  # the gate's gradient is summed in float32
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    qkv, kv_ins, gate = packed(tensors)
    out = kernels.gated_attention_packed_reference(qkv, kv_ins, gate, **options)
    torch.testing.assert_close(out.transpose(1, 2), got[0])


@not_interpreted
def test_reference_by_finite_differences():
    tensors = [t.detach().double().requires_grad_() for t in inputs(B=1, H=2, N=3, M=4, D=4)]
    for lengths in (None, torch.tensor([2])):

        def of_five(*five, n=lengths):
            return kernels.gated_attention_reference(*five, tensors[5], ins_lengths=n)

        def of_gate(gate, n=lengths):
            return kernels.gated_attention_reference(*tensors[:5], gate, ins_lengths=n)

        assert torch.autograd.gradcheck(of_five, tensors[:5])
        assert torch.autograd.gradcheck(of_gate, tensors[5], eps=0.25)  # linear, and used in float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 3, 5, 8)}, "k: expected"),
        ({"v": torch.zeros(2, 3, 5, 32)}, "v: expected"),
        ({"k": torch.zeros(2, 3, 19, 32), "v": torch.zeros(2, 3, 19, 32)}, "k: expected"),
        ({"k": torch.zeros(2, 3, 5, 32), "v": torch.zeros(2, 3, 5, 32)}, "k: expected"),
        ({"v_ins": None}, "both or neither"),
        ({"gate": None}, "gate: expected"),
        ({"gate": torch.zeros(2)}, "gate: expected"),
        ({"gate": torch.zeros(3, dtype=torch.int64)}, "gate: expected"),
        ({"q": torch.zeros(2, 3, 4, 32, dtype=torch.int64)}, "q: expected"),
        ({"k_ins": torch.zeros(2, 3, 9, 32, dtype=torch.bfloat16)}, "k_ins: expected"),
        ({"ins_lengths": torch.zeros(3, dtype=torch.int64)}, "ins_lengths: expected"),
        ({"ins_lengths": torch.zeros(2)}, "ins_lengths: expected"),
        pytest.param({"ins_lengths": torch.tensor([0, 10])}, "ins_lengths: expected", marks=not_interpreted),
        pytest.param({"ins_lengths": torch.tensor([-1, 0])}, "ins_lengths: expected", marks=not_interpreted),
    ],
)
def test_errors_name_the_argument(change, message):
    arguments = dict(zip(NAMES, inputs(), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        kernels.gated_attention(**arguments)


@pytest.mark.parametrize(
    ("qkv", "kv_ins", "message"),
    [((2, 5, 2, 3, 8), None, "qkv: expected"), ((2, 5, 3, 3, 8), (2, 4, 2, 3, 9), "kv_ins: expected")],
)
def test_errors_of_the_packed_form(qkv, kv_ins, message):
    with pytest.raises(ValueError, match=message):
        kernels.gated_attention_packed(torch.zeros(qkv), kv_ins and torch.zeros(kv_ins), torch.zeros(3))


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu), *(["cpu"] if INTERPRETED else [])])
@pytest.mark.parametrize("change", [{"D": 160}, {"dtype": torch.float64}])
def test_what_the_kernels_do_not_do(change, device):
    with pytest.raises(ValueError, match="q: expected D up to 128"):
        kernels.gated_attention(*inputs(device=device, **change))
