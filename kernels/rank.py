"""Scores behind exact ranking: float64 sums in a fixed order, rounded once to float32 (the canonical score).

Shapes: Q queries, G gallery rows, D features, P listed pairs. The canonical score of a pair does not depend on threads,
blocks or device, so rankings built on it do not either.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import _check
from kernels._library import extension

METRICS = ("cosine", "ip", "l2")


def pair_scores_reference(
    queries: Tensor, gallery: Tensor, offsets: Tensor, positives: Tensor, *, metric: str = "cosine"
) -> Tensor:
    """As `pair_scores`, in plain torch: a float64 running sum per pair, one feature after another."""
    owner = torch.repeat_interleave(torch.arange(len(queries), device=queries.device), offsets.diff())
    q, r = queries[owner].double(), gallery[positives].double()
    zero = torch.zeros(len(owner), dtype=torch.float64, device=queries.device)
    if metric == "l2":
        return _running_sum((q - r) * (q - r), zero).float()
    dot = _running_sum(q * r, zero)
    if metric == "ip":
        return dot.float()
    norm = _running_sum(q * q, zero).sqrt() * _running_sum(r * r, zero).sqrt()
    return torch.where(norm > 0, dot / norm, zero).float()


def _running_sum(terms_PD: Tensor, total_P: Tensor) -> Tensor:
    for column in terms_PD.unbind(1):
        total_P = total_P + column
    return total_P


def pair_scores(
    queries: Tensor, gallery: Tensor, offsets: Tensor, positives: Tensor, *, metric: str = "cosine"
) -> Tensor:
    """Canonical scores of listed (query, gallery row) pairs.

    queries    [Q, D] float32
    gallery    [G, D] float32
    offsets    [Q+1] int64, ascending from 0 to P: pairs offsets[q] .. offsets[q+1]-1 belong to query q
    positives  [P] int64, the pairs' gallery rows
    metric     "cosine" (0 with a zero vector), "ip" (inner product) or "l2" (squared distance)

    Returns float32 [P]. ValueError for other shapes, dtypes, devices, or indices out of range.
    """
    _check.one_of("metric", metric, METRICS)
    _check.shape("queries", queries, (None, None), "[Q, D]")
    _check.shape("gallery", gallery, (None, queries.shape[1]), "[G, D]")
    _check.shape("offsets", offsets, (len(queries) + 1,), "[Q+1]")
    _check.shape("positives", positives, (None,), "[P]")
    for name, tensor, kind in (
        ("queries", queries, torch.float32),
        ("gallery", gallery, torch.float32),
        ("offsets", offsets, torch.int64),
        ("positives", positives, torch.int64),
    ):
        _check.dtype(name, tensor, (kind,))
        _check.same_device(name, tensor, "queries", queries)
    count = len(positives)
    if int(offsets[0]) != 0 or int(offsets[-1]) != count or bool((offsets.diff() < 0).any()):
        raise ValueError(f"offsets: expected ascending numbers from 0 to {count}, got {offsets[:8].tolist()}...")
    if count and not (int(positives.min()) >= 0 and int(positives.max()) < len(gallery)):
        raise ValueError(f"positives: expected gallery rows in 0..{len(gallery) - 1}")
    module = extension()
    if module is None or (queries.is_cuda and not module.with_cuda):
        return pair_scores_reference(queries, gallery, offsets, positives, metric=metric)
    tensors = [tensor.contiguous() for tensor in (queries, gallery, offsets, positives)]
    out = torch.empty(count, dtype=torch.float32, device=queries.device)
    sizes = (len(queries), queries.shape[1], count, METRICS.index(metric))
    addresses = [tensor.data_ptr() for tensor in tensors]
    if queries.is_cuda:
        stream = torch.cuda.current_stream(queries.device)
        module.pair_scores_cuda(*addresses, *sizes, queries.device.index, stream.cuda_stream, out.data_ptr())
    else:
        module.pair_scores_cpu(*addresses, *sizes, torch.get_num_threads(), out.data_ptr())
    return out
