"""Gated dual-softmax attention against torch's own softmax attention in float64."""

import pytest
import torch
import torch.nn.functional as F

import kernels


def inputs(B=2, H=3, N=17, M=9, D=32, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, H, N, D)] * 3 + [(B, H, M, D)] * 2 + [(H,)]
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def expected(q, k, v, k_ins, v_ins, gate, lengths=None):
    """Sample by sample with torch's attention, padding cut off instead of masked."""
    rows = []
    for b in range(len(q)):
        row = F.scaled_dot_product_attention(q[b], k[b], v[b])
        M = k_ins.shape[2] if lengths is None else int(lengths[b])
        if M:
            second = F.scaled_dot_product_attention(q[b], k_ins[b, :, :M], v_ins[b, :, :M])
            row = row + gate.float().double().view(-1, 1, 1) * second
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("function", [kernels.gated_attention, kernels.gated_attention_reference])
@pytest.mark.parametrize(("N", "M", "gates"), [(17, 9, 3), (1, 1, 3), (129, 70, 1), (16, 65, 3)])
def test_equals_two_attentions(function, N, M, gates):
    q, k, v, k_ins, v_ins, gate = inputs(N=N, M=M)
    gate = gate[:gates]
    torch.testing.assert_close(
        function(q, k, v, k_ins, v_ins, gate), expected(q, k, v, k_ins, v_ins, gate), rtol=1e-9, atol=1e-11
    )


@pytest.mark.parametrize("function", [kernels.gated_attention, kernels.gated_attention_reference])
def test_lengths_mask_padding_even_when_it_holds_nan(function):
    tensors = [t.requires_grad_() for t in inputs(B=4)]
    lengths = torch.tensor([9, 0, 1, 5])
    want = expected(*tensors, lengths)
    want_grads = torch.autograd.grad(want.sin().sum(), tensors)
    poisoned = [t.detach().clone() for t in tensors]
    for b, length in enumerate(lengths):
        poisoned[3][b, :, length:] = poisoned[4][b, :, length:] = torch.nan
    poisoned = [t.requires_grad_() for t in poisoned]
    got = function(*poisoned, ins_lengths=lengths)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    grads = torch.autograd.grad(got.sin().sum(), poisoned)
    for grad, want_grad in zip(grads[:5], want_grads[:5], strict=True):
        torch.testing.assert_close(grad, want_grad, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(grads[5], want_grads[5], rtol=1e-6, atol=1e-6)  # the gate is used in float32
    assert (grads[3][1] == 0).all()
    assert (grads[4][1] == 0).all()


@pytest.mark.parametrize("function", [kernels.gated_attention, kernels.gated_attention_reference])
@pytest.mark.parametrize("lengths", [None, torch.tensor([4, 9])])
def test_scale_replaces_the_default(function, lengths):
    q, *others = inputs()
    got = function(q, *others, ins_lengths=lengths, scale=0.25)
    want = function(q * 0.25 * q.shape[-1] ** 0.5, *others, ins_lengths=lengths)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def test_gate_zero_is_plain_attention_and_can_open():
    tensors = [t.requires_grad_() for t in inputs()]
    tensors[5] = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    out = kernels.gated_attention(*tensors)
    assert torch.equal(out, F.scaled_dot_product_attention(*tensors[:3]))
    grads = torch.autograd.grad(out.sin().sum(), tensors)
    assert (grads[5] != 0).all()
    assert (grads[3] == 0).all()
    assert (grads[4] == 0).all()


def test_packed_is_the_same_and_takes_one_instruction_for_the_batch():
    q, k, v, k_ins, v_ins, gate = inputs()
    qkv = torch.stack([q, k, v]).permute(1, 3, 0, 2, 4).contiguous()
    kv = torch.stack([k_ins, v_ins]).permute(1, 3, 0, 2, 4)[:1].contiguous().expand(2, -1, -1, -1, -1)
    got = kernels.gated_attention_packed(qkv, kv, gate)
    one = [t[:1].expand(2, -1, -1, -1) for t in (k_ins, v_ins)]
    assert torch.equal(got.transpose(1, 2), kernels.gated_attention(q, k, v, *one, gate))
    options = {"ins_lengths": torch.tensor([3, 0]), "scale": 0.25}
    got = kernels.gated_attention_packed(qkv, kv, gate, **options)
    assert torch.equal(got.transpose(1, 2), kernels.gated_attention(q, k, v, *one, gate, **options))


def test_empty_instruction_is_plain_attention():
    q, k, v, k_ins, v_ins, gate = inputs(M=0)
    assert torch.equal(kernels.gated_attention(q, k, v, k_ins, v_ins, gate), F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 3, 5, 8)}, "k: expected"),
        ({"v_ins": None}, "both or neither"),
        ({"gate": None}, "gate: expected"),
        ({"gate": torch.zeros(2)}, "gate: expected"),
        ({"q": torch.zeros(2, 3, 4, 32, dtype=torch.int64)}, "q: expected"),
        ({"ins_lengths": torch.zeros(3, dtype=torch.int64)}, "ins_lengths: expected"),
        ({"ins_lengths": torch.zeros(2)}, "ins_lengths: expected"),
        ({"ins_lengths": torch.tensor([0, 10])}, "ins_lengths: expected"),
        ({"ins_lengths": torch.tensor([-1, 0])}, "ins_lengths: expected"),
    ],
)
def test_errors_name_the_argument(change, message):
    names = ["q", "k", "v", "k_ins", "v_ins", "gate"]
    arguments = dict(zip(names, inputs(dtype=torch.float32), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        kernels.gated_attention(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_the_gpu(dtype):
    tensors = inputs(B=4, N=129, M=70, dtype=dtype)
    lengths = torch.tensor([70, 0, 1, 33])
    want = expected(*[t.double() for t in tensors], lengths)
    got = kernels.gated_attention(*[t.cuda() for t in tensors], ins_lengths=lengths.cuda())
    eager = kernels.gated_attention_reference(*[t.cuda() for t in tensors], ins_lengths=lengths.cuda())
    budget = 2 * (eager.double().cpu() - want).abs().max() + torch.finfo(dtype).eps
    assert (got.double().cpu() - want).abs().max() <= budget
