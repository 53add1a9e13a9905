"""Galleries made ready to be searched, and the sweep over them that `topk`, `count_ahead` and `best_per_group` share.

The sweep multiplies blocks of queries with blocks of the gallery (float32 by torch's BLAS, or fewer bits) and hands
each tile of products to a filter. How far a product can be from the canonical score of its pair: kernels/bounds.py.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import _check
from kernels._library import extension
from kernels.bounds import CODES, MOST_FEATURES, Codes, encode, gallery_bounds, query_bounds
from kernels.leading import Leading

METRICS = ("cosine", "ip", "l2")
KINDS = (torch.float32, torch.float16, torch.bfloat16)
ROWS, COLUMNS = 1024, 1024  # of a tile on a CPU: its products stay in the cache
PANEL = 32  # MOST_COLUMNS of csrc/product.h
DEVICE_ROWS, DEVICE_COLUMNS = 2048, 2048  # of a tile on a GPU: its products stay in the L2 cache


class Gallery:
    """A gallery made ready once, for any number of searches: `prepare_gallery`.

    features  [G, D] float32, float16 or bfloat16, contiguous
    norms     [G] float64, canonical
    keys      [G, J] int64, or None
    codes     [G, D] int8 with scales [G] float32 and residual norms [G] float64, or None
    leading   the rows along few directions, once searches have paid for them (kernels/candidates.py), or None

    kept: for more than one search; searched: by so many queries so far; due: queries after which to look for
    directions.
    """

    def __init__(self, features: Tensor, norms: Tensor, keys: Tensor | None, codes: Codes | None, kept: bool = False):
        self.features, self.norms, self.keys, self.codes, self.kept = features, norms, keys, codes, kept
        self.leading: Leading | None = None
        self.searched, self.due = 0, 0.0
        self.made: dict[Any, Any] = {}  # bounds, by metric and what is multiplied

    def __len__(self) -> int:
        return len(self.features)

    @property
    def shape(self) -> torch.Size:
        return self.features.shape

    def bounds(self, metric: str, coded: bool) -> tuple[Tensor, ...]:
        """a, b, e, f of kernels/bounds.py, [G] float32 each."""
        if (metric, coded) not in self.made:
            self.made[metric, coded] = gallery_bounds(self.norms, self.shape[1], metric, self.codes if coded else None)
        return self.made[metric, coded]


def prepare_gallery(gallery: Tensor, *, keys: Tensor | None = None, low_precision: str | None = None) -> Gallery:
    """Compute once what every search of this gallery needs: norms, keys, codes of low precision.

    gallery        [G, D] float32, float16 or bfloat16
    keys           [G] or [G, J] int64: `topk(..., query_keys=)` leaves rows out by them
    low_precision  "int8" or "bfloat16": keep codes as well and find candidates by products of these (inner product and
                   cosine), with the same results. Measured faster on no processor yet, so never chosen unasked

    Without such codes searches choose by themselves how they multiply: kernels/candidates.py. Where features lie mostly
    in few directions, the rows along these are kept once enough queries have come: a quarter of the features' memory,
    at most.

    A gallery in host memory is prepared there and serves queries on a GPU as well: kernels/streaming.py.
    ValueError for other shapes or dtypes, or rows that are not finite (with their numbers).
    """
    check_gallery(gallery)
    _check.one_of("low_precision", low_precision, (None, *CODES))
    return _prepared(gallery, keys_of("keys", keys, "gallery", gallery), low_precision, kept=True)


def check_gallery(gallery: Tensor) -> None:
    _check.shape("gallery", gallery, (None, None), "[G, D]")
    _check.dtype("gallery", gallery, KINDS)
    if not len(gallery) < 2**31:
        raise ValueError(f"gallery: expected fewer than 2^31 rows, got {len(gallery)}; divide it into shards")


def _prepared(
    gallery: Tensor, keys: Tensor | None = None, low_precision: str | None = None, *, kept: bool = False
) -> Gallery:
    features = gallery.detach().contiguous()
    norms = row_norms("gallery", features)
    codes = None
    if low_precision is not None and 0 < features.shape[1] < MOST_FEATURES:
        codes = encode(features, CODES[low_precision])
    return Gallery(features, norms, keys, codes, kept)


def check_searched(queries: Tensor, gallery: Tensor | Gallery) -> None:
    """Shapes, types and places. Whether the numbers are finite, only an operator can say: `ready`, `row_norms`."""
    if isinstance(gallery, Tensor):
        check_gallery(gallery)
    rows = features_of(gallery)
    _check.shape("queries", queries, (None, rows.shape[1]), "[Q, D]")
    _check.dtype("queries", queries, KINDS)
    if not (queries.is_cuda and rows.device.type == "cpu"):
        _check.same_device("queries", queries, "gallery", rows)


def ready(queries: Tensor, gallery: Tensor | Gallery) -> tuple[Tensor, Gallery]:
    """(queries as contiguous float32, gallery prepared). ValueError for rows of the gallery that are not finite."""
    return queries.detach().float().contiguous(), gallery if isinstance(gallery, Gallery) else _prepared(gallery)


def together(queries: Tensor, gallery: Tensor | Gallery) -> tuple[Tensor, Gallery]:
    """As `ready`, for references, to which nothing is sent over."""
    _check.same_device("queries", queries, "gallery", features_of(gallery))
    return ready(queries, gallery)


def features_of(gallery: Tensor | Gallery) -> Tensor:
    return gallery.features if isinstance(gallery, Gallery) else gallery


def keys_of(name: str, keys: Tensor | None, of: str, rows: Tensor) -> Tensor | None:
    """[n, J] int64 contiguous, from [n] or [n, J]."""
    if keys is None:
        return None
    keys = keys[:, None] if keys.dim() == 1 else keys
    _check.shape(name, keys, (len(rows), None), f"[{of} rows] or [{of} rows, J]")
    _check.dtype(name, keys, (torch.int64,))
    _check.same_device(name, keys, of, rows)
    return keys.contiguous()


def keys_beside(
    queries: Tensor, query_keys: Tensor | None, gallery: Tensor | Gallery, gallery_keys: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """([Q, J], [G, J]) int64, the gallery's given or prepared with it; None where nothing is left out."""
    theirs = gallery.keys if isinstance(gallery, Gallery) else None
    if gallery_keys is not None and theirs is not None:
        raise ValueError("gallery_keys: expected None, for the prepared gallery has keys")
    ours = keys_of("query_keys", query_keys, "queries", queries)
    if theirs is None:
        theirs = keys_of("gallery_keys", gallery_keys, "gallery", features_of(gallery))
    if ours is None and theirs is None:
        return None
    if ours is None or theirs is None:
        have, lack = ("query_keys", "gallery_keys") if theirs is None else ("gallery_keys", "query_keys")
        raise ValueError(f"{lack}: expected [rows] or [rows, J] int64 beside {have}, got None")
    if ours.shape[1] != theirs.shape[1]:
        raise ValueError(f"query_keys: expected {theirs.shape[1]} columns, got {ours.shape[1]}")
    return ours, theirs


def row_norms(name: str, rows: Tensor) -> Tensor:
    """[n] float64 canonical norms of contiguous rows [n, D]. ValueError names rows that are not finite."""
    norms = _norms(rows)
    broken = (~norms.isfinite()).nonzero()[:, 0]
    if len(broken):
        some = ", ".join(map(str, broken[:8].tolist())) + (", ..." if len(broken) > 8 else "")
        raise ValueError(f"{name}: expected finite numbers, got NaN or inf in {len(broken)} rows: {some}")
    return norms


def _norms(rows: Tensor) -> Tensor:
    module = backend(rows)
    if module is None:
        return torch.cat([running_sum(part.double().square()).sqrt() for part in rows.split(4096)])
    norms = torch.empty(len(rows), dtype=torch.float64, device=rows.device)
    kind, (count, D) = KINDS.index(rows.dtype), rows.shape

    def work(start: int, stop: int) -> None:
        addresses = rows[start:].data_ptr(), kind, stop - start, D, norms[start:].data_ptr()
        call("norms", rows.device, *addresses)

    in_parts(work, count, rows.device, least=4096)
    return norms


def running_sum(terms: Tensor) -> Tensor:
    """[..., D] float64 -> [...]: csrc/score.h's order of adding."""
    D = terms.shape[-1]
    padded = torch.nn.functional.pad(terms, (0, -D % 32)).unflatten(-1, (-1, 32))
    lanes = torch.zeros_like(padded[..., 0, :]) if D else terms.new_zeros(*terms.shape[:-1], 32)
    for step in padded.unbind(-2):
        lanes = lanes + step
    while lanes.shape[-1] > 1:
        one, other = lanes.chunk(2, -1)
        lanes = one + other
    return lanes[..., 0]


# The sweep.


def backend(tensor: Tensor) -> ModuleType | None:
    """The extension, where it serves this tensor's device; None: the Python forms."""
    module = extension()
    return module if module is not None and (not tensor.is_cuda or module.with_cuda) else None


def call(name: str, device: torch.device, *given: Any) -> None:
    """The extension's function for this device; on a GPU it is launched on torch's current stream."""
    module = extension()
    assert module is not None
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device)
        getattr(module, f"{name}_cuda")(*given, module.Launch(stream.device_index, stream.cuda_stream))
    else:
        getattr(module, f"{name}_cpu")(*given)


_settings = threading.Lock()
_sweeps, _threads, _before = 0, 1, list[Any]()
_MATMUL: Any = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul  # type: ignore[attr-defined]
STRICT = (
    (_MATMUL[0], "fp32_precision", "ieee"),
    (_MATMUL[1], "fp32_precision", "ieee"),
    (_MATMUL[1], "allow_fp16_accumulation", False),
)


@contextlib.contextmanager
def multiplying(device: torch.device) -> Iterator[int]:
    """torch's settings while products are made, put back by the last of the threads that are in here; yields how many
    threads a sweep may use.

    float32 is multiplied as float32, whatever `torch.set_float32_matmul_precision` allows, and float16 is summed in
    float32: the bounds rest on it."""
    global _sweeps, _threads, _before
    with _settings:
        if not _sweeps:
            _threads = torch.get_num_threads()
            _before = [getattr(owner, name) for owner, name, _ in STRICT]
            for owner, name, value in STRICT:
                setattr(owner, name, value)
        _sweeps += 1
    try:
        yield _threads if device.type == "cpu" else 1
    finally:
        with _settings:
            _sweeps -= 1
            if not _sweeps:
                for (owner, name, _), value in zip(STRICT, _before, strict=True):
                    setattr(owner, name, value)
                torch.set_num_threads(_threads)  # a sweep's threads have set it to 1


def in_parts(work: Callable[[int, int], Any], count: int, device: torch.device, *, least: int) -> None:
    """work(start, stop) over 0 .. count: on a CPU in a part for each of torch's threads, none much below `least`."""
    parts = max(1, min(torch.get_num_threads(), count // least)) if device.type == "cpu" else 1
    run_all([functools.partial(work, count * i // parts, count * (i + 1) // parts) for i in range(parts)], parts)


def run_all(tasks: Sequence[Callable[[], Any]], threads: int, prepare: Callable[[], Any] | None = None) -> None:
    """Every task once, on so many threads side by side; prepare() in each new one."""
    if threads < 2 or len(tasks) < 2:
        for task in tasks:
            task()
        return
    with ThreadPoolExecutor(threads, initializer=prepare) as pool:
        for done in [pool.submit(task) for task in tasks]:
            done.result()


class Operands(NamedTuple):
    """What is multiplied: queries [Q, D] and gallery [G, D], float32 (the gallery also in its stored type), int8 or
    bfloat16; or queries in int16 or float16 and the gallery as it is stored with `inverse` [G] float32
    (kernels/narrow.py). D: of the features, or of the leading directions. And the bounds of the products."""

    queries: Tensor
    gallery: Tensor
    query_bounds: Tensor
    gallery_bounds: tuple[Tensor, ...]
    inverse: Tensor | None = None


def operands(queries: Tensor, norms: Tensor, gallery: Gallery, metric: str) -> Operands:
    """norms: [Q] float64, of the queries."""
    D, theirs = queries.shape[1], None if metric == "l2" else gallery.codes
    if theirs is None:
        return Operands(queries, gallery.features, query_bounds(norms, D, metric, None), gallery.bounds(metric, False))
    ours = encode(queries, theirs.values.dtype)
    return Operands(ours.values, theirs.values, query_bounds(norms, D, metric, ours), gallery.bounds(metric, True))


Visit = Callable[[int, Any], None]  # (part of the gallery, tile)


def sweep(given: Operands, visit: Visit, *, threads: int, parts: int = 1, order: Tensor | None = None) -> None:
    """visit(part, tile) for tiles that cover all queries and the whole gallery, in ascending order of the gallery for
    each query. Two tiles of the same queries are never visited at the same time, unless their parts differ.

    threads  from `multiplying`
    parts    of the gallery, swept side by side, each by all queries
    order    [G] the gallery's rows as the tiles' columns, instead of 0 .. G - 1
    """
    Q, G = len(given.queries), len(given.gallery)
    rows = strip_rows(Q, threads, parts, given.queries.device)
    tasks = [
        functools.partial(_strip, given, visit, order, part, range(start, min(start + rows, Q)), columns)
        for part, columns in enumerate(itertools.pairwise(G * i // parts for i in range(parts + 1)))
        for start in range(0, Q, rows)
    ]
    # A product takes the thread that asks for it: nobody waits, and what a thread made it reads from its cache. A new
    # thread's BLAS would take all cores, whatever was set before it began.
    run_all(tasks, threads, functools.partial(torch.set_num_threads, 1))


def strip_rows(queries: int, threads: int, parts: int, device: torch.device) -> int:
    """How many queries a strip has: those of a thread, or of all where each sweeps its part, in equal blocks."""
    most = DEVICE_ROWS if device.type == "cuda" else ROWS
    share = -(-queries // (threads if parts == 1 else 1))
    return max(1, -(-share // max(1, -(-share // most))))


def parts_of(queries: int, gallery: int, threads: int) -> int:
    """How many parts of the gallery: as many as threads, where queries are too few to be divided."""
    return threads if queries < 128 * threads and gallery > 8 * COLUMNS else 1


def _strip(
    given: Operands, visit: Visit, order: Tensor | None, part: int, rows: range, columns: tuple[int, int]
) -> None:
    """All tiles of these queries and this part of the gallery."""
    module = backend(given.queries)
    assert module is not None
    queries = given.queries[rows.start : rows.stop]
    height, wide = (DEVICE_ROWS, DEVICE_COLUMNS) if queries.is_cuda else (ROWS, COLUMNS)
    times = height // len(rows)  # on a GPU few queries' tiles are as large as all: launches take time
    width = wide * max(1, times if queries.is_cuda else min(times, 4))
    integers = queries.dtype in (torch.int8, torch.int16)
    dtype = torch.int32 if integers else torch.float32
    buffer = torch.empty(len(rows) * width, dtype=dtype, device=queries.device)
    scratch = scratch_for(queries, min(width, columns[1] - columns[0]), given.gallery.shape[1])
    for start in range(*columns, width):
        stop = min(start + width, columns[1])
        at = slice(start, stop) if order is None else order[start:stop]
        rest = given.gallery[at]
        products = buffer[: len(rows) * (stop - start)].view(len(rows), stop - start)
        if given.inverse is None:
            multiply(queries, rest, products)
        else:
            multiply_encoded(queries, rest, given.inverse[at], products, scratch)
        visit(part, module.Tile(products.data_ptr(), integers, rows.start, rows.stop, start, stop))


def multiply(queries: Tensor, rows: Tensor, products: Tensor) -> None:
    """products = queries rowsᵀ: int8 into int32; float16, bfloat16 and float32 into float32."""
    if queries.dtype == torch.int8:
        torch._int_mm(queries, rows.T, out=products)
    elif queries.is_cuda and queries.dtype == rows.dtype != torch.float32:
        torch.mm(queries, rows.T, out_dtype=torch.float32, out=products)  # type: ignore[call-overload]
    else:
        torch.mm(queries.float(), rows.float().T, out=products)


def multiply_encoded(queries: Tensor, rows: Tensor, inverse: Tensor, products: Tensor, scratch: Tensor) -> None:
    """products [Q, G], int32 or float32, of the queries' codes ([Q, D or D + 1, even] int16 or [Q, D] float16) and
    those of rows [G, D], which are made into scratch: a row times its `inverse` [G] float32, rounded."""
    if queries.dtype == torch.float16:
        codes = scratch[: rows.numel()].view(rows.shape)
        multiply(queries, torch.mul(rows, inverse[:, None], out=codes), products)
        return
    own = queries.data_ptr(), len(queries)
    theirs = rows.data_ptr(), KINDS.index(rows.dtype), inverse.data_ptr(), *rows.shape
    call("product", rows.device, *own, *theirs, scratch.data_ptr(), products.data_ptr())


def scratch_for(queries: Tensor, rows: int, D: int) -> Tensor:
    """Where `multiply_encoded` keeps the codes of so many rows; queries: the codes of these."""
    size = {torch.int16: -(-rows // PANEL) * PANEL * queries.shape[1], torch.float16: rows * D}
    return queries.new_empty(size.get(queries.dtype, 0))


def pairs_of(queries: Tensor, norms: Tensor, gallery: Gallery, metric: str) -> Any:
    """The extension's `Pairs`; the tensors must outlive it."""
    addresses = [part.data_ptr() for part in (queries, gallery.features, norms, gallery.norms)]
    kind = KINDS.index(gallery.features.dtype)
    return _module(queries).Pairs(*addresses, queries.shape[1], kind, METRICS.index(metric))


def bounds_of(given: Operands) -> Any:
    """The extension's `Bounds`; the tensors must outlive it."""
    return _module(given.queries).Bounds(*(part.data_ptr() for part in (*given.gallery_bounds, given.query_bounds)))


def exclusion_of(queries: Tensor, keys: tuple[Tensor, Tensor] | None) -> Any:
    """The extension's `Exclusion`; the tensors must outlive it."""
    if keys is None:
        return _module(queries).Exclusion(0, 0, 0)
    return _module(queries).Exclusion(keys[0].data_ptr(), keys[1].data_ptr(), keys[0].shape[1])


def _module(tensor: Tensor) -> ModuleType:
    module = backend(tensor)
    assert module is not None
    return module
