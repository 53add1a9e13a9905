"""Canonical pair scores: the extension, the Python form and an independent float64 computation."""

import numpy as np
import pytest
import torch

import kernels
from kernels._library import extension


def case(Q=7, G=23, D=33, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    queries, gallery = torch.randn(Q, D, generator=generator), torch.randn(G, D, generator=generator)
    counts = torch.randint(0, 5, (Q,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    positives = torch.randint(0, G, (int(offsets[-1]),), generator=generator)
    return [tensor.to(device) for tensor in (queries, gallery, offsets, positives)]


def expected(queries, gallery, offsets, positives, metric):
    """One feature after another in Python floats, which are float64; rounded once."""
    rows = []
    for q in range(len(queries)):
        for p in positives[offsets[q] : offsets[q + 1]].tolist():
            a, b = queries[q].tolist(), gallery[p].tolist()
            dot = qq = rr = 0.0
            for x, y in zip(a, b, strict=True):
                dot += (x - y) * (x - y) if metric == "l2" else x * y
                qq, rr = qq + x * x, rr + y * y
            norm = np.sqrt(qq) * np.sqrt(rr)
            rows.append(dot if metric != "cosine" else dot / norm if norm > 0 else 0.0)
    return torch.from_numpy(np.array(rows, dtype=np.float64).astype(np.float32))


def test_the_extension_is_built():
    assert extension() is not None


@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
@pytest.mark.parametrize("function", [kernels.pair_scores, kernels.pair_scores_reference])
def test_every_bit(function, metric):
    arguments = case()
    arguments[1][3] = 0  # a zero vector
    assert torch.equal(function(*arguments, metric=metric), expected(*arguments, metric))


def test_threads_do_not_matter():
    arguments = case(Q=64, G=500, D=768)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(kernels.pair_scores(*arguments))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_strided_and_empty():
    queries, gallery, offsets, positives = case()
    want = kernels.pair_scores(queries, gallery, offsets, positives)
    strided = gallery.repeat_interleave(2, 0)[::2]
    assert torch.equal(kernels.pair_scores(queries.T.contiguous().T, strided, offsets, positives), want)
    nothing = kernels.pair_scores(queries, gallery, torch.zeros_like(offsets), positives[:0])
    assert nothing.shape == (0,)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.zeros(7, 4), "gallery: expected"),
        (1, torch.zeros(23, 33, dtype=torch.float64), "gallery: expected"),
        (2, torch.zeros(3, dtype=torch.int64), "offsets: expected"),
        (2, torch.arange(8), "offsets: expected"),
        (3, torch.full((99,), 23), "offsets: expected"),
    ],
)
def test_errors_name_the_argument(place, value, message):
    arguments = case()
    arguments[place] = value
    with pytest.raises(ValueError, match=message):
        kernels.pair_scores(*arguments)


def test_gallery_rows_out_of_range():
    queries, gallery, offsets, positives = case()
    positives[0] = 23
    with pytest.raises(ValueError, match="positives: expected"):
        kernels.pair_scores(queries, gallery, offsets, positives)


@pytest.mark.gpu
@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
def test_the_gpu_returns_the_same_bits(metric):
    arguments = case(Q=64, G=500, D=768)
    on_gpu = kernels.pair_scores(*[tensor.cuda() for tensor in arguments], metric=metric)
    assert torch.equal(on_gpu.cpu(), kernels.pair_scores(*arguments, metric=metric))
