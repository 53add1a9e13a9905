"""Adaptive triplet loss against explicit loops in float64 and the recorded values of the released code, on the CPU, on
a GPU, and, with TRITON_INTERPRET=1 in the environment, with the GPU's kernel in Triton's interpreter."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels import triplet
from kernels._library import INTERPRETED

DATA = Path(__file__).parent / "data"


READINGS = list(itertools.product(["squared", "euclidean"], ["clamp", "raw"], ["mean", "active"]))
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


not_interpreted = pytest.mark.skipif(INTERPRETED, reason="the interpreter runs the kernel, which has no part in this")


@pytest.fixture(params=[pytest.param("whole", marks=not_interpreted), "in blocks"])
def _blocks(request, monkeypatch):
    """Everything at once, or a few samples, pairs and columns at a time."""
    if request.param == "in blocks":
        for name, size in (("BLOCK", {"cpu": 45, "cuda": 45}), ("GATHERED", 50), ("TILES", {8: (2, 8)})):
            monkeypatch.setattr(triplet, name, size)


def batch(identities=(4, 4, 3, 1, 2), D=12, E=6, seed=0, spread=0.4):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(identities)), torch.tensor(identities, dtype=torch.int64))
    features = torch.randn(len(labels), D, generator=generator, dtype=torch.float64) * spread
    instructions = torch.randn(len(labels), E, generator=generator, dtype=torch.float64)
    order = torch.randperm(len(labels), generator=generator)
    return features, labels[order], instructions


def brute_force(x, labels, t, margin=0.3, distance="squared", negative="clamp", reduction="mean", tie=1e-3):
    """Eq. 5 and 6, one triplet after another."""
    N = len(labels)
    beta = torch.zeros(N, N, dtype=x.dtype)
    for a, r in itertools.product(range(N), repeat=2):
        if labels[a] == labels[r]:
            beta[a, r] = F.cosine_similarity(t[a], t[r], dim=0)
    beta = beta.clamp(min=0) if negative == "clamp" else beta
    total, counted, active = 0.0, 0, 0
    for a in range(N):
        for i, j in itertools.combinations([r for r in range(N) if r != a], 2):
            if abs(beta[a, i] - beta[a, j]) <= tie:
                continue
            d = [(x[a] - x[r]).pow(2).sum() for r in (i, j)]
            if distance == "euclidean":
                d = [value.sqrt() for value in d]
            gap = beta[a, i] - beta[a, j]
            term = torch.relu(torch.sign(gap) * (d[0] + gap * margin - d[1]))
            total, counted, active = total + term, counted + 1, active + int(term > 0)
    return total / max(counted if reduction == "mean" else active, 1), counted, active


def clustered():
    x, labels, t = batch((5, 4, 3))
    centres = torch.randn(3, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return centres[labels] + 0.05 * x, labels, t


def tied():
    """Whole numbers: many distances and similarities are equal."""
    x, labels, t = batch((4, 4, 4), D=3)
    return (2 * x).round(), labels, t.sign() + 2


def opposed():
    """Similarities within an identity on both sides of 0."""
    x, labels, t = batch((4, 3, 3), E=2)
    return x, labels, t * torch.tensor([1.0, 0.1])


def faint():
    """Instructions at right angles, or so nearly that they tie with those of other identities."""
    x, labels, _ = batch((4, 3, 3))
    return x, labels, torch.eye(10, dtype=torch.float64) + 0.00025


CASES = {
    "faint": faint,
    "random": batch,
    "one identity": lambda: batch((7,)),
    "pairs and singles": lambda: batch((2, 1, 2, 1, 1)),
    "all alone": lambda: batch((1, 1, 1, 1)),
    "clustered": clustered,
    "tied": tied,
    "opposed": opposed,
    "no instructions": lambda: (*batch((3, 3, 2))[:2], torch.zeros(8, 4, dtype=torch.float64)),
}


@pytest.mark.usefixtures("_blocks")
@devices
@pytest.mark.parametrize(("distance", "negative", "reduction"), READINGS)
@pytest.mark.parametrize("case", CASES)
def test_all_triplets_equal_the_loop(case, distance, negative, reduction, device):
    x, labels, t = CASES[case]()
    sets = torch.stack([x, 0.5 * x.flip(0)]).requires_grad_()
    want = [brute_force(one, labels, t, 0.3, distance, negative, reduction) for one in sets]
    weights = torch.tensor([1.0, 3.0], dtype=torch.float64)
    want_grad = torch.zeros_like(sets)
    for weight, (loss, _, active) in zip(weights, want, strict=True):
        if active:
            want_grad += torch.autograd.grad(weight * loss, sets)[0]
    options = {"distance": distance, "negative_similarity": negative, "reduction": reduction}
    on = [tensor.to(device) for tensor in (labels, t)]
    inside = sets.detach().to(device).requires_grad_()
    got, stats = kernels.adaptive_triplet(inside, *on, **options, return_stats=True)
    for number, (loss, counted, active) in enumerate(want):
        assert abs(got[number].item() - float(torch.as_tensor(loss).detach())) < 1e-10
        assert (int(stats["counted"][number]), int(stats["active"][number])) == (counted, active)
    grad = torch.autograd.grad((got * weights.to(device)).sum(), inside)[0]
    torch.testing.assert_close(grad.cpu(), want_grad, rtol=1e-8, atol=1e-10)


@not_interpreted
@pytest.mark.parametrize(("distance", "negative", "reduction"), READINGS)
@pytest.mark.parametrize("case", ["random", "opposed", "clustered"])
def test_reference_equals_the_loop(case, distance, negative, reduction):
    x, labels, t = CASES[case]()
    x.requires_grad_()
    want = brute_force(x, labels, t, 0.3, distance, negative, reduction)[0]
    options = {"distance": distance, "negative_similarity": negative, "reduction": reduction}
    got = kernels.adaptive_triplet_reference(x, labels, t, **options)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(loss, x) for loss in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@not_interpreted
@pytest.mark.parametrize("mining", ["all", "hard"])
def test_reference_by_finite_differences(mining):
    x, labels, t = batch((3, 2, 2))
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: kernels.adaptive_triplet_reference(x, labels, t, mining=mining), x)


@devices
@pytest.mark.parametrize("mining", ["all", "hard"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_few_bits_cost_only_rounding(mining, dtype, device):
    """Against float64 on the same rounded features: what is computed in float32 is, but for its result, exact."""
    x, labels, t = batch((4,) * 12, D=64)
    x = F.normalize(x, dim=-1).to(dtype)
    runs = []
    for kind in (torch.float64, dtype):
        inside = x.to(device, kind).requires_grad_()
        loss = kernels.adaptive_triplet(inside, labels.to(device), t.float().to(device), mining=mining)
        runs.append((loss, torch.autograd.grad(loss, inside)[0]))
    for got, want in zip(runs[1], runs[0], strict=True):
        assert got.dtype == dtype
        error = (got.double() - want).norm() / want.norm()
        assert error < 20 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps


def test_fixed_sentences_tie_so_only_identity_counts():
    x, labels, _ = batch()
    t = torch.ones(len(labels), 3, dtype=torch.float64)
    _, stats = kernels.adaptive_triplet(x, labels, t, return_stats=True)
    same = (labels[:, None] == labels).sum(1) - 1
    assert int(stats["counted"]) == int((same * (len(labels) - 1 - same)).sum())


@pytest.mark.parametrize("function", [kernels.adaptive_triplet, kernels.adaptive_triplet_reference])
def test_relatedness_within_the_dead_band_does_not_count(function):
    """One identity; its instructions differ by less than `tie` in cosine, or by more."""
    x, labels = batch((4,))[0], torch.zeros(4, dtype=torch.int64)
    angles = torch.tensor([0.0, 0.01, 0.02, 0.03], dtype=torch.float64)  # cosines differ by 1e-4 .. 4e-4
    t = torch.stack([angles.cos(), angles.sin()], 1)
    assert function(x, labels, t) == 0
    torch.testing.assert_close(function(x, labels, t, tie=1e-9), brute_force(x, labels, t, tie=1e-9)[0])
    assert function(x, labels, t, tie=1e-9) > 0


def hard_loop(x, labels, t, margin=0.3):
    """The released code's loss anchor by anchor: plain distances, mean over all anchors."""
    total = x.new_zeros(())
    for a in range(len(labels)):
        d = [(x[a] - x[r]).norm() for r in range(len(labels))]
        near = sorted((r for r in range(len(labels)) if labels[r] == labels[a] and r != a), key=lambda r: -d[r])
        far = sorted((r for r in range(len(labels)) if labels[r] != labels[a]), key=lambda r: d[r])
        b = [F.cosine_similarity(t[a], t[r], dim=0).clamp(min=0) for r in near[:2]]
        if len(near) > 1:
            gap = b[0] - b[1]
            total = total + 0.1 * torch.relu(torch.sign(gap) * (d[near[0]] - d[near[1]] + margin * gap))
        if near and far:
            total = total + torch.relu(d[near[0]] + margin * b[0] - d[far[0]])
    return total / len(labels)


@not_interpreted
@pytest.mark.parametrize("identities", [(4, 4, 3, 1, 2), (2, 2, 1), (5,), (2,)])
@pytest.mark.parametrize("function", [kernels.adaptive_triplet, kernels.adaptive_triplet_reference])
def test_hard_mining_equals_the_loop(identities, function):
    for seed in range(5):
        x, labels, t = batch(identities, seed=seed)
        torch.testing.assert_close(function(x, labels, t, mining="hard"), hard_loop(x, labels, t))


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("mining", ["all", "hard"])
def test_equal_samples_have_distance_zero_in_float32(mining, shift):
    """|x|^2 + |x|^2 - 2 x.x rounds to either side of 0; below it, the root is not a number. shift: the equal ones
    are of two identities."""
    x = torch.randn(50, 96, generator=torch.Generator().manual_seed(0)).repeat_interleave(2, 0).requires_grad_()
    labels = torch.arange(50).repeat_interleave(2).roll(shift)
    loss = kernels.adaptive_triplet(x, labels, torch.ones(100, 2), mining=mining, distance="euclidean", margin=20.0)
    assert loss > 0
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, x)[0]).all()


@pytest.mark.parametrize("function", [kernels.adaptive_triplet, kernels.adaptive_triplet_reference])
def test_one_sentence_for_all_leaves_hard_mining_its_push_alone(function):
    """Products of equal vectors differ by their rounding, and the sign of such a difference means nothing."""
    generator = torch.Generator().manual_seed(0)
    for E in (3, 33, 128, 768):
        for K in (3, 4, 5, 8):
            x, labels = torch.randn(2 * K, 16, generator=generator), torch.arange(2).repeat_interleave(K)
            t = torch.randn(1, E, generator=generator).expand(2 * K, -1)
            d = torch.cdist(x.double(), x.double())
            same = labels[:, None] == labels
            push = d.masked_fill(~same, -1).max(1).values + 0.3 - d.masked_fill(same, torch.inf).min(1).values
            want = push.clamp(min=0).mean().float()
            torch.testing.assert_close(function(x, labels, t, mining="hard"), want, rtol=1e-5, atol=1e-5)
    x, labels, t = batch((4, 4), seed=1)
    assert function(x, labels, t, mining="hard", tie=2.0) < function(x, labels, t, mining="hard")  # no pair counts


@pytest.mark.parametrize("name", ["pk", "big", "sentences"])
def test_hard_mining_equals_the_released_code(name):
    stored = np.load(DATA / "released_triplet.npz")
    want = json.loads((DATA / "released_triplet.json").read_text())[name]
    x = torch.from_numpy(stored[f"{name}_features"]).double().requires_grad_()
    labels = torch.from_numpy(stored[f"{name}_labels"]).long()
    t = torch.from_numpy(stored[f"{name}_instructions"]).double()
    loss = kernels.adaptive_triplet(x, labels, t, mining="hard")
    assert abs(loss.item() - want) < 1e-10
    gradient = torch.from_numpy(stored[f"{name}_gradient"])
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], gradient, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("mining", ["all", "hard"])
@pytest.mark.parametrize("identities", [(), (1,), (1, 1), (2,), (1, 2), (3,)])
def test_degenerate_batches_are_finite(mining, identities):
    x, labels, t = batch(identities)
    x = torch.zeros_like(x).requires_grad_()  # all features equal: distance 0, gradient 0
    loss = kernels.adaptive_triplet(x, labels, t, mining=mining)
    assert torch.isfinite(loss)
    if len(labels):
        assert torch.isfinite(torch.autograd.grad(loss, x)[0]).all()


@devices
@pytest.mark.parametrize("mining", ["all", "hard"])
def test_each_feature_set_is_one_of_its_own(mining, device):
    x, labels, t = (tensor.to(device) for tensor in batch())
    sets = torch.stack([x, 2 * x, x.flip(0)])
    losses = kernels.adaptive_triplet(sets, labels, t, mining=mining)
    for loss, one in zip(losses, sets, strict=True):
        torch.testing.assert_close(loss, kernels.adaptive_triplet(one, labels, t, mining=mining), rtol=1e-12, atol=0)


@pytest.mark.usefixtures("_blocks")
@devices
@pytest.mark.parametrize("reduction", ["mean", "active"])
@pytest.mark.parametrize(("mining", "negative"), [("all", "clamp"), ("all", "raw"), ("hard", "clamp")])
def test_rows_add_up_to_the_whole(mining, negative, reduction, device):
    """Cut through identities: losses and counts add up, each share has the whole loss's gradient in its rows."""
    x, labels, t = (tensor.to(device) for tensor in batch())
    x.requires_grad_()
    options = {"mining": mining, "negative_similarity": negative, "reduction": reduction, "return_stats": True}
    want, stats = kernels.adaptive_triplet(x, labels, t, **options)
    whole = torch.autograd.grad(want, x)[0]
    total, counted, active, gradient = 0, 0, 0, torch.zeros_like(x)
    for rows in ((0, 5), (5, 5), (5, 6), (6, 14)):
        loss, found = kernels.adaptive_triplet(x, labels, t, rows=rows, **options)
        grad = torch.autograd.grad(loss, x)[0]
        assert not grad[: rows[0]].any()
        assert not grad[rows[1] :].any()
        total, counted, active = total + loss, counted + found["counted"], active + found["active"]
        gradient += grad
    torch.testing.assert_close(total, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, whole, rtol=1e-12, atol=1e-14)
    assert (counted, active) == (stats["counted"], stats["active"])


@devices
@pytest.mark.parametrize("mining", ["all", "hard"])
def test_same_bits_again(mining, device):
    x, labels, t = (tensor.float().to(device) for tensor in batch((4,) * (12 if INTERPRETED else 40), D=96))
    x.requires_grad_()
    runs = []
    for _ in range(5):
        loss = kernels.adaptive_triplet(x, labels.long(), t, mining=mining)
        runs.append((loss, torch.autograd.grad(loss, x)[0]))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@devices
@pytest.mark.parametrize("mining", ["all", "hard"])
@pytest.mark.parametrize("row", [0, 13])
def test_a_feature_that_is_no_number_shows(mining, row, device):
    """Also of a sample that is nobody's positive."""
    x, labels, t = (tensor.to(device) for tensor in batch((4, 4, 4, 1, 1)))
    x[int((labels == (3 if row else 0)).nonzero()[0])] = torch.nan
    assert torch.isnan(kernels.adaptive_triplet(x, labels, t, mining=mining))


@devices
@pytest.mark.parametrize("mining", ["all", "hard"])
def test_operator_registration(mining, device):
    x, labels, t = (tensor.to(device) for tensor in batch())
    options = (0.3, mining, "squared", "clamp", "mean", 1e-3, 0, 14, True)
    arguments = x[None].requires_grad_(), labels, t, *options
    torch.library.opcheck(torch.ops.kernels.adaptive_triplet.default, arguments)


@devices
def test_compiles_whole(device):
    x, labels, t = (tensor.to(device) for tensor in batch())
    x.requires_grad_()

    def run(x):
        return kernels.adaptive_triplet(F.normalize(x, dim=-1), labels, t).sin()

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, want in zip(*((f(x), torch.autograd.grad(f(x), x)[0]) for f in (compiled, run)), strict=True):
        torch.testing.assert_close(got, want)


@devices
def test_autocast_changes_nothing(device):
    x, labels, t = (tensor.to(device) for tensor in batch((4,) * 5))
    x = x.float().requires_grad_()
    want = kernels.adaptive_triplet(x, labels, t)
    with torch.autocast(device, torch.bfloat16):
        got = kernels.adaptive_triplet(x, labels, t)
    assert torch.equal(got, want)


@devices
def test_a_second_derivative_is_refused(device):
    x, labels, t = (tensor.to(device) for tensor in batch())
    x.requires_grad_()
    (grad,) = torch.autograd.grad(kernels.adaptive_triplet(x, labels, t), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "labels: expected"),
        ({"labels": torch.zeros(14)}, "labels: expected"),
        ({"instructions": torch.zeros(3, 2)}, "instructions: expected"),
        ({"features": torch.zeros(14)}, "features: expected"),
        ({"mining": "some"}, "mining: expected"),
        ({"rows": (3, 99)}, "rows: expected"),
    ],
)
def test_errors_name_the_argument(change, message):
    arguments = dict(zip(("features", "labels", "instructions"), batch(), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        kernels.adaptive_triplet(**arguments)
