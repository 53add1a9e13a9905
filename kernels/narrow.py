"""Products in 16 bits instead of float32: int16 on a CPU that makes two of them in the time of one, float16 on a GPU.

The gallery stays as it is stored: a block of it is encoded on the way (csrc/product.h, `multiply_encoded`).
kernels/bounds.py bounds what rounding changes, and whatever may be among the best is scored canonically, so results are
the same.
"""

from __future__ import annotations

import functools
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from kernels.bounds import MOST_FEATURES, gallery_bounds, narrow_codes, narrow_error, query_bounds
from kernels.gallery import (
    Gallery,
    Operands,
    backend,
    call,
    multiply,
    multiply_encoded,
    multiplying,
    row_norms,
    scratch_for,
)

LEAST, DEVICE_LEAST = 128, 512  # queries at a time: with fewer, encoding the gallery takes what the products save
SAMPLE = 32, 1024  # queries and rows
CROWDED = 0.005  # of the rows; measured on a CPU: at 0.01 scoring them takes what the products save
ROUNDS = 7


def narrow_type(device: torch.device) -> torch.dtype:
    return torch.float16 if device.type == "cuda" else torch.int16


def narrow_pays(queries: Tensor, norms: Tensor, gallery: Gallery, k: int, metric: str, rows: int) -> bool:
    """Whether to multiply `rows` queries at a time in 16 bits in order to find the k best: many, on a processor that
    does it faster, for inner product or cosine, where the gallery has no codes of its own and its scores lie apart."""
    return (
        rows >= (DEVICE_LEAST if queries.is_cuda else LEAST)
        and len(gallery) >= 8 * SAMPLE[1]
        and backend(queries) is not None
        and metric != "l2"
        and gallery.codes is None
        and 0 < queries.shape[1] < MOST_FEATURES
        and narrow_is_faster(queries.device)
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
    error = n * m * narrow_error(queries.shape[1], narrow_type(queries.device))
    scores = (queries[asked] @ gallery.features[rows].float().T).double()
    if metric == "cosine":
        error, scores = (torch.where(n * m > 0, part / (n * m), 0) for part in (error, scores))
    best = min(len(rows), -(-k * len(rows) // len(gallery)))
    floors = (scores - error).topk(best, dim=1).values[:, -1:]
    return float((~(scores + error < floors)).double().mean()) - best / len(rows)


def narrow_operands(queries: Tensor, norms: Tensor, gallery: Gallery, metric: str) -> Operands:
    """As `operands`, in 16 bits: queries [Q, D] float32 with norms [Q] float64; metric "cosine" or "ip"."""
    D, kind = queries.shape[1], narrow_type(queries.device)
    ours, theirs = narrow_codes(queries, norms, kind), narrow_codes(gallery.features, gallery.norms, kind)
    return Operands(
        encode_queries(queries, inverse(ours.scale), kind),
        theirs.values,
        query_bounds(norms, D, metric, ours),
        gallery_bounds(gallery.norms, D, metric, theirs),
        inverse(theirs.scale),
    )


def inverse(scale: Tensor) -> Tensor:
    """1 / scale [n] float32, and 0 for 0."""
    return torch.where(scale > 0, 1 / scale, 0)


def encode_queries(queries: Tensor, inverse: Tensor, kind: torch.dtype) -> Tensor:
    """Queries [Q, D] float32 times `inverse` [Q] float32, as float16 [Q, D] or int16 [Q, D or D + 1, even]."""
    if kind == torch.float16:
        return (queries * inverse[:, None]).half()
    Q, D = queries.shape
    values = torch.empty(Q, D + D % 2, dtype=torch.int16, device=queries.device)
    call("encode", queries.device, queries.data_ptr(), 0, inverse.data_ptr(), Q, D, values.data_ptr())
    return values


@functools.cache
def narrow_is_faster(device: torch.device) -> bool:
    """Whether this processor multiplies in 16 bits faster than in float32: measured once; a CPU's by one thread."""
    if device.type == "cuda":
        with multiplying(device):
            return _measured(device, DEVICE_LEAST, 8192)
    one = functools.partial(torch.set_num_threads, 1)
    with multiplying(device), ThreadPoolExecutor(1, initializer=one) as pool:
        return pool.submit(_measured, device, LEAST, 1024).result()


def _measured(device: torch.device, Q: int, G: int) -> bool:
    generator, kind = torch.Generator().manual_seed(0), narrow_type(device)
    rows = torch.randn(G, 512, generator=generator, dtype=torch.float32, device="cpu").to(device)
    codes = narrow_codes(rows, row_norms("rows", rows), kind)
    given = encode_queries(rows, inverse(codes.scale), kind)
    queries, scratch = given[:Q], scratch_for(given, G, rows.shape[1])
    floats = torch.zeros(Q, G, dtype=torch.float32, device=device)
    narrow = torch.zeros_like(floats, dtype=torch.int32 if kind == torch.int16 else torch.float32)
    took = []
    for _ in range(ROUNDS):
        began = _now(device)
        multiply_encoded(queries, rows, inverse(codes.scale), narrow, scratch)
        middle = _now(device)
        multiply(rows[:Q], rows, floats)
        took.append((middle - began, _now(device) - middle))
    values = given.double()
    errors, norms = (narrow.double() - values[:Q] @ values.T).abs(), values.norm(dim=1)
    if not bool((errors <= codes.slack * norms[:Q, None] * norms).all()):
        return False  # a processor on which this was never tried
    return min(own for own, _ in took) < min(other for _, other in took)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
