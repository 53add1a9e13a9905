"""Products in int16 instead of float32, for a processor that makes two of them in the time of one.

The gallery stays as it is stored: csrc/product.h encodes it block by block on the way. kernels/bounds.py bounds what
rounding changes, and whatever may be among the best is scored canonically, so results are the same.
"""

from __future__ import annotations

import functools
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from kernels.bounds import CODED_WIDE, MOST_FEATURES, gallery_bounds, query_bounds, wide_codes, wide_residual
from kernels.gallery import (
    Gallery,
    Operands,
    backend,
    call,
    multiply,
    multiply_encoded,
    multiplying,
    panels,
    row_norms,
)

LEAST = 128  # queries at a time: with fewer, encoding the gallery takes what the products save
SAMPLE = 32, 1024  # queries and rows
CROWDED = 0.005  # of the rows; measured: at 0.01 scoring them takes what the products save
ROUNDS = 7


def integers_pay(queries: Tensor, norms: Tensor, gallery: Gallery, k: int, metric: str, rows: int) -> bool:
    """Whether to multiply `rows` queries at a time in int16 in order to find the k best: many, on a CPU that does it
    faster, for inner product or cosine, where the gallery has no codes of its own and its scores lie apart."""
    return (
        rows >= LEAST
        and len(gallery) >= 8 * SAMPLE[1]
        and not queries.is_cuda
        and backend(queries) is not None
        and metric != "l2"
        and gallery.codes is None
        and 0 < queries.shape[1] < MOST_FEATURES
        and integers_are_faster()
        and crowd(queries, norms, gallery, k, metric) <= CROWDED
    )


def crowd(queries: Tensor, norms: Tensor, gallery: Gallery, k: int, metric: str) -> float:
    """The part of a gallery's rows, 0 to 1, that rounding lets pass beside the k best of a query, in a sample of both.
    queries [Q, D] float32, norms [Q] float64; metric "cosine" or "ip"."""
    asked, rows = (
        torch.arange(min(most, count), device=queries.device) * count // min(most, count)
        for most, count in zip(SAMPLE, (len(queries), len(gallery)), strict=True)
    )
    n, m = norms[asked, None], gallery.norms[rows]
    error = n * m * (2.02 * wide_residual(queries.shape[1]))
    scores = (queries[asked] @ gallery.features[rows].float().T).double()
    if metric == "cosine":
        error, scores = (torch.where(n * m > 0, part / (n * m), 0) for part in (error, scores))
    best = min(len(rows), -(-k * len(rows) // len(gallery)))
    floors = (scores - error).topk(best, dim=1).values[:, -1:]
    return float((~(scores + error < floors)).double().mean()) - best / len(rows)


def encoded_operands(queries: Tensor, norms: Tensor, gallery: Gallery, metric: str) -> Operands:
    """As `operands`, in int16: queries [Q, D] float32 with norms [Q] float64; metric "cosine" or "ip"."""
    D = queries.shape[1]
    ours, theirs = wide_codes(queries, norms), wide_codes(gallery.features, gallery.norms)
    return Operands(
        encode_queries(queries, inverse(ours.scale)),
        theirs.values,
        query_bounds(norms, D, metric, ours),
        gallery_bounds(gallery.norms, D, metric, theirs),
        inverse(theirs.scale),
    )


def inverse(scale: Tensor) -> Tensor:
    """1 / scale [n] float32, and 0 for 0."""
    return torch.where(scale > 0, 1 / scale, 0)


def encode_queries(queries: Tensor, inverse: Tensor) -> Tensor:
    """[Q, D or D + 1, even] int16 of queries [Q, D] float32 times `inverse` [Q] float32."""
    Q, D = queries.shape
    values = torch.empty(Q, D + D % 2, dtype=torch.int16, device=queries.device)
    call("encode", queries.device, queries.data_ptr(), 0, inverse.data_ptr(), Q, D, values.data_ptr())
    return values


@functools.cache
def integers_are_faster() -> bool:
    """Whether this processor multiplies in int16 faster than in float32: measured at the first one, by one thread."""
    one = functools.partial(torch.set_num_threads, 1)
    with multiplying(torch.device("cpu")), ThreadPoolExecutor(1, initializer=one) as pool:
        return pool.submit(_measured).result()


def _measured() -> bool:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1024, 512, generator=generator, dtype=torch.float32)
    queries, scales = rows[:LEAST], inverse((row_norms("rows", rows) / CODED_WIDE).float())
    codes, scratch = encode_queries(rows, scales), panels(len(rows), rows)
    integers, floats = (torch.zeros(LEAST, len(rows), dtype=dtype) for dtype in (torch.int32, torch.float32))
    took = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        multiply_encoded(codes[:LEAST], rows, scales, integers, scratch)
        middle = time.perf_counter()
        multiply(queries, rows, floats)
        took.append((middle - began, time.perf_counter() - middle))
    if not torch.equal(integers.double(), codes[:LEAST].double() @ codes.double().T):
        return False  # a processor on which this was never tried
    return min(own for own, _ in took) < min(other for _, other in took)
