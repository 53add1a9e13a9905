"""The k best gallery rows of every query, exact, with rows left out by keys.

Shapes: Q queries, G gallery rows, D features, J columns of keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import _check
from kernels.candidates import plan, planned
from kernels.gallery import (
    METRICS,
    Gallery,
    backend,
    bounds_of,
    call,
    check_searched,
    exclusion_of,
    in_parts,
    keys_beside,
    multiplying,
    operands,
    pairs_of,
    parts_of,
    ready,
    row_norms,
    running_sum,
    strip_rows,
    sweep,
    together,
)
from kernels.streaming import best, parts

ROOM, DEVICE_ROOM = 256, 4096  # candidates beyond k that a list holds; csrc/topk_block.h asks for 2048 on a GPU
DEVICE_BLOCKS = 256  # two for each multiprocessor of the largest GPUs
QUERIES = 4096  # whose lists are held at a time


def topk_reference(
    queries: Tensor,
    gallery: Tensor | Gallery,
    k: int,
    *,
    metric: str = "cosine",
    query_keys: Tensor | None = None,
    gallery_keys: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `topk`, in plain torch: every canonical score, then a stable sort."""
    keys = _checked(queries, gallery, k, metric, query_keys, gallery_keys)
    values, indices = _sorted(*together(queries, gallery), k, metric, keys)
    return 0 - values if metric == "l2" else values, indices


def _sorted(
    queries: Tensor, gallery: Gallery, k: int, metric: str, keys: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    values, indices = empty_result(len(queries), k, queries.device)
    for q in range(len(queries)):
        scores = canonical_scores(queries[q : q + 1], gallery, metric)[0]
        admissible = torch.ones(len(gallery), dtype=torch.bool, device=queries.device)
        if keys is not None:
            admissible = (keys[0][q] != keys[1]).all(1)
        rows = admissible.nonzero()[:, 0]
        first = scores[rows].argsort(descending=True, stable=True)[:k]
        values[q, : len(first)], indices[q, : len(first)] = scores[rows][first], rows[first]
    return values, indices


def canonical_scores(queries: Tensor, gallery: Gallery, metric: str) -> Tensor:
    """[Q, G] float32 canonical scores, greater = nearer (the squared distance comes negative); in plain torch."""
    parts = []
    for rows, norms in zip(gallery.features.split(4096), gallery.norms.split(4096), strict=True):
        q, r = queries.double()[:, None], rows.double()[None]
        if metric == "l2":
            parts.append(-running_sum((q - r) * (q - r)))
            continue
        dot = running_sum(q * r)
        if metric == "cosine":
            norm = running_sum(q * q).sqrt() * norms
            dot = torch.where(norm > 0, dot / norm, 0)
        parts.append(dot)
    return torch.cat(parts, 1).float() if parts else queries.new_zeros(len(queries), 0)


def _topk(
    queries: Tensor,
    gallery: Tensor | Gallery,
    k: int,
    metric: str,
    query_keys: Tensor | None,
    gallery_keys: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`topk` of what is checked; keys [Q, J] and [G, J]."""
    queries, gallery = ready(queries, gallery)
    Q, norms = len(queries), row_norms("queries", queries)
    values, indices = empty_result(Q, k, queries.device)
    for base, part, beside in parts(gallery, queries.device, *(() if gallery_keys is None else (gallery_keys,))):
        kept = min(k, len(part))
        for start in range(0, Q if kept else 0, QUERIES):
            block = slice(start, start + QUERIES)
            keys = None if query_keys is None else (query_keys[block], beside[0])
            found, rows = _search(queries[block], norms[block], part, kept, metric, keys)
            if base:
                rows = torch.where(rows < 0, rows, rows + base)
                found, rows = best(torch.cat([values[block], found], 1), torch.cat([indices[block], rows], 1), k)
            values[block, : found.shape[1]], indices[block, : rows.shape[1]] = found, rows
    return 0 - values if metric == "l2" else values, indices


def _search(
    queries: Tensor, norms: Tensor, gallery: Gallery, k: int, metric: str, keys: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """The k best, greater = nearer."""
    module = backend(queries)
    if module is None:
        return _sorted(queries, gallery, k, metric, keys)
    device, Q = queries.device, len(queries)
    pairs, excluded = pairs_of(queries, norms, gallery, metric), exclusion_of(queries, keys)
    capacity = k + max(k, DEVICE_ROOM if queries.is_cuda else ROOM)
    with multiplying(device) as threads, torch.autocast(device.type, enabled=False):
        parts, split = parts_of(Q, len(gallery), threads), split_of(Q, device)
        chosen = plan(queries, norms, gallery, k, metric, strip_rows(Q, threads, parts, device))
        if chosen is None:
            given = operands(queries, norms, gallery, metric)
        else:
            given = planned(chosen, queries, norms, gallery, metric)
        search = module.TopK(pairs, bounds_of(given), excluded, k)
        entries = torch.empty(parts * split, Q, capacity, 3, dtype=torch.int32, device=device)
        counts = torch.zeros(parts * split, Q, dtype=torch.int32, device=device)
        floors = torch.full((parts * split, Q), -torch.inf, dtype=torch.float32, device=device)
        lists = [
            module.Candidates(entries[p].data_ptr(), counts[p].data_ptr(), floors[p].data_ptr(), capacity)
            for p in range(0, parts * split, split)
        ]
        sweep(
            given,
            lambda part, tile: call("topk_tile", device, search, tile, lists[part], Q, split),
            threads=threads,
            parts=parts,
        )
    if queries.is_cuda:
        call("topk_finish", device, search, lists[0], Q, split)
        width = max(k, int(counts.max()))
        values, rows = empty_result(Q, split * width, device)
        call("topk_score", device, search, lists[0], Q, split, width, values.data_ptr(), rows.data_ptr())
        if split > 1:  # rows ascend in a list, not from one to the next
            order = rows.masked_fill(rows < 0, len(gallery)).argsort(dim=1)
            values, rows = values.gather(1, order), rows.gather(1, order)
        return best(values, rows, k)
    values, rows = empty_result(Q, k, device)

    def finish(start: int, stop: int) -> None:
        count = parts * split
        call("topk_finish", device, search, lists[0], count, Q, start, stop, values.data_ptr(), rows.data_ptr())

    in_parts(finish, Q, device, least=8)
    return values, rows


def split_of(queries: int, device: torch.device) -> int:
    """Into how many shares a tile's columns are divided, each with lists of its own: enough blocks for a GPU."""
    return max(1, DEVICE_BLOCKS // queries) if device.type == "cuda" else 1


def empty_result(Q: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """[Q, k] of -inf and of -1."""
    values = torch.full((Q, k), -torch.inf, dtype=torch.float32, device=device)
    return values, torch.full((Q, k), -1, dtype=torch.int64, device=device)


def _checked(
    queries: Tensor,
    gallery: Tensor | Gallery,
    k: int,
    metric: str,
    query_keys: Tensor | None,
    gallery_keys: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """Keys of both, or None."""
    _check.one_of("metric", metric, METRICS)
    if isinstance(k, bool) or not isinstance(k, int) or k < 0:
        raise ValueError(f"k: expected a whole number of at least 0, got {k!r}")
    check_searched(queries, gallery)
    return keys_beside(queries, query_keys, gallery, gallery_keys)


_LIBRARY = torch.library.Library("kernels", "FRAGMENT")
_LIBRARY.define(
    "topk(Tensor queries, Tensor gallery, SymInt k, str metric, Tensor? query_keys, Tensor? gallery_keys) "
    "-> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_LIBRARY.impl("topk", _topk, "CUDA")
_LIBRARY.impl("topk", _topk, "CPU")
_LIBRARY.impl("topk", torch.library.fallthrough_kernel, "Autograd")  # not differentiable
_op = torch.ops.kernels.topk.default


@torch.library.register_fake("kernels::topk", lib=_LIBRARY)
def _(queries, gallery, k, metric, query_keys, gallery_keys):
    shape = len(queries), k
    return queries.new_empty(shape, dtype=torch.float32), queries.new_empty(shape, dtype=torch.int64)


def topk(
    queries: Tensor,
    gallery: Tensor | Gallery,
    k: int,
    *,
    metric: str = "cosine",
    query_keys: Tensor | None = None,
    gallery_keys: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k best admissible gallery rows of every query, by canonical scores (csrc/score.h), equal ones by lower row.

    queries       [Q, D] float32, float16 or bfloat16
    gallery       [G, D] of these types, or what `prepare_gallery` made of it (and its keys)
    k             any number >= 0, also beyond G
    metric        "cosine" (0 with a zero vector), "ip" (inner product) or "l2" (squared Euclidean distance)
    query_keys, gallery_keys  [Q] and [G], or [Q, J] and [G, J] int64: a row is left out when any of its keys equals the
                  query's in the same column

    Returns values float32 [Q, k] and rows int64 [Q, k], best first; missing ones are -inf (l2: +inf) and -1. The result
    depends on nothing but the inputs: not on threads, blocks, shards or processor. Not differentiable.

    All lie on one device, but for a gallery (with its keys) in host memory that queries on a GPU search: its rows are
    sent over part by part while earlier ones are searched (kernels/streaming.py). A plain tensor's norms are computed
    in every call, where it lies: prepare it for more than one. torch.compile keeps the search of a plain tensor in its
    graph as one operator; a prepared gallery breaks the graph: search it outside of what is compiled.
    ValueError for other shapes, dtypes or devices, and for rows that are not finite.
    """
    keys = _checked(queries, gallery, k, metric, query_keys, gallery_keys) or (None, None)
    if isinstance(gallery, Gallery):
        return _topk(queries, gallery, k, metric, *keys)
    return _op(queries, gallery, k, metric, *keys)
