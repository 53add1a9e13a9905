"""Adaptive triplet loss against explicit loops in float64 and the recorded values of the released code."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import kernels

DATA = Path(__file__).parent / "data"


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


@pytest.mark.parametrize("distance", ["squared", "euclidean"])
@pytest.mark.parametrize("negative", ["clamp", "raw"])
@pytest.mark.parametrize("reduction", ["mean", "active"])
@pytest.mark.parametrize("function", [kernels.adaptive_triplet, kernels.adaptive_triplet_reference])
def test_all_triplets_equal_the_loop(function, distance, negative, reduction):
    x, labels, t = batch()
    options = {"distance": distance, "negative_similarity": negative, "reduction": reduction}
    x.requires_grad_()
    want, counted, active = brute_force(x, labels, t, 0.3, distance, negative, reduction)
    want_grad = torch.autograd.grad(want, x)[0]
    got = function(x, labels, t, **options)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(got, x)[0], want_grad, rtol=1e-8, atol=1e-10)
    if function is kernels.adaptive_triplet:
        stats = function(x, labels, t, **options, return_stats=True)[1]
        assert (int(stats["counted"]), int(stats["active"])) == (counted, active)


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


@pytest.mark.parametrize("identities", [(4, 4, 3, 1, 2), (2, 2, 1), (5,), (2,)])
def test_hard_mining_equals_the_loop(identities):
    for seed in range(5):
        x, labels, t = batch(identities, seed=seed)
        torch.testing.assert_close(kernels.adaptive_triplet(x, labels, t, mining="hard"), hard_loop(x, labels, t))


@pytest.mark.parametrize("mining", ["all", "hard"])
def test_equal_samples_have_distance_zero_in_float32(mining):
    """|x|^2 + |x|^2 - 2 x.x rounds to either side of 0; below it, the root is not a number."""
    x = torch.randn(50, 96, generator=torch.Generator().manual_seed(0)).repeat_interleave(2, 0).requires_grad_()
    labels = torch.arange(50).repeat_interleave(2)
    loss = kernels.adaptive_triplet(x, labels, torch.ones(100, 2), mining=mining, distance="euclidean", margin=20.0)
    assert loss > 0
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, x)[0]).all()


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


@pytest.mark.parametrize("mining", ["all", "hard"])
def test_feature_sets_and_rows_add_up(mining):
    x, labels, t = batch()
    sets = torch.stack([x, 2 * x, x.flip(0)])
    losses = kernels.adaptive_triplet(sets, labels, t, mining=mining)
    for loss, one in zip(losses, sets, strict=True):
        assert torch.equal(loss, kernels.adaptive_triplet(one, labels, t, mining=mining))
    parts = [kernels.adaptive_triplet(x, labels, t, mining=mining, rows=rows) for rows in ((0, 5), (5, 14))]
    torch.testing.assert_close(sum(parts), losses[0], rtol=1e-12, atol=1e-12)


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
