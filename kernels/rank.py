"""Exact ranks without sorting: how many gallery rows come before listed ones, and the best row of every group.

Shapes: Q queries, G gallery rows, D features, P listed rows (of query q: offsets[q] .. offsets[q + 1] - 1). Average
precision, CMC and mINP need only the rank of each positive: the negatives before it (`negatives_ahead`) and the
positives before it. No Q×G matrix is kept. Scores are canonical (csrc/score.h), so a result depends on nothing but the
inputs, and counts of the parts of a gallery add up to the counts of the whole.

Each function is an operator of torch where the gallery is a plain tensor: torch.compile keeps it in its graph, and only
the operator looks at numbers (rows that are finite, offsets that ascend). A prepared gallery breaks the graph: use it
outside of what is compiled. None is differentiable. A gallery in host memory, its groups and keys beside it, serves
queries on a GPU: kernels/streaming.py.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import _check
from kernels.gallery import (
    METRICS,
    Gallery,
    backend,
    bounds_of,
    call,
    check_searched,
    exclusion_of,
    features_of,
    in_parts,
    keys_beside,
    multiplying,
    operands,
    pairs_of,
    parts_of,
    ready,
    row_norms,
    running_sum,
    sweep,
    together,
)
from kernels.streaming import parts, whole
from kernels.topk import canonical_scores, empty_result


def pair_scores_reference(
    queries: Tensor, gallery: Tensor | Gallery, offsets: Tensor, positives: Tensor, *, metric: str = "cosine"
) -> Tensor:
    """As `pair_scores`, in plain torch, with the terms of all pairs in memory."""
    check_searched(queries, gallery)
    queries, gallery = together(queries, gallery)
    owner = torch.repeat_interleave(torch.arange(len(queries), device=queries.device), offsets.diff())
    q, r = queries[owner].double(), gallery.features[positives].double()
    if metric == "l2":
        return running_sum((q - r) * (q - r)).float()
    dot = running_sum(q * r)
    if metric == "ip":
        return dot.float()
    norm = running_sum(q * q).sqrt() * gallery.norms[positives]
    return torch.where(norm > 0, dot / norm, 0).float()


def _pair_scores(queries: Tensor, gallery: Tensor | Gallery, offsets: Tensor, positives: Tensor, metric: str) -> Tensor:
    """`pair_scores` of what is checked, but for numbers."""
    queries, gallery = ready(queries, gallery)
    _ascending(offsets, len(positives))
    if len(positives) and not (int(positives.min()) >= 0 and int(positives.max()) < len(gallery)):
        raise ValueError(f"positives: expected gallery rows in 0..{len(gallery) - 1}")
    norms = row_norms("queries", queries)
    if whole(gallery, queries.device):
        return _scores(queries, norms, gallery, offsets, positives, metric)
    gallery = Gallery(gallery.features, gallery.norms, None, None)
    out = torch.empty(len(positives), device=queries.device)
    wanted, place = positives.unique(return_inverse=True)  # no other row is sent
    for base, part, _ in parts(gallery, queries.device, rows=wanted):
        own = (place >= base) & (place < base + len(part))
        before = F.pad(own.cumsum(0), (1, 0))
        out[own] = _scores(queries, norms, part, before[offsets], place[own] - base, metric)
    return out


def _scores(
    queries: Tensor, norms: Tensor, gallery: Gallery, offsets: Tensor, positives: Tensor, metric: str
) -> Tensor:
    if backend(queries) is None:
        return pair_scores_reference(queries, gallery, offsets, positives, metric=metric)
    device, out = queries.device, torch.empty(len(positives), device=queries.device)
    offsets, positives = offsets.contiguous(), positives.contiguous()
    given = pairs_of(queries, norms, gallery, metric), offsets.data_ptr(), positives.data_ptr(), len(queries)
    if queries.is_cuda:
        call("pair_scores", device, *given, len(out), out.data_ptr())
    else:
        in_parts(
            lambda start, stop: call("pair_scores", device, *given, start, stop, out.data_ptr()),
            len(out),
            device,
            least=256,
        )
    return 0 - out if metric == "l2" else out


def pair_scores(
    queries: Tensor, gallery: Tensor | Gallery, offsets: Tensor, positives: Tensor, *, metric: str = "cosine"
) -> Tensor:
    """Canonical scores of listed (query, gallery row) pairs.

    queries    [Q, D] float32, float16 or bfloat16
    gallery    [G, D] of these types, or what `prepare_gallery` made of it
    offsets    [Q + 1] int64, ascending from 0 to P: pairs offsets[q] .. offsets[q + 1] - 1 belong to query q
    positives  [P] int64, the pairs' gallery rows
    metric     "cosine" (0 with a zero vector), "ip" (inner product) or "l2" (squared Euclidean distance)

    Returns float32 [P]. ValueError for other shapes, dtypes or devices, numbers out of range, rows that are not finite.
    """
    _check.one_of("metric", metric, METRICS)
    check_searched(queries, gallery)
    _listed(queries, offsets, {"positives": positives})
    score = _pair_scores if isinstance(gallery, Gallery) else torch.ops.kernels.pair_scores.default
    return score(queries, gallery, offsets, positives, metric)


def count_ahead_reference(
    queries: Tensor,
    gallery: Tensor | Gallery,
    query_group: Tensor,
    gallery_group: Tensor,
    offsets: Tensor,
    thresholds: Tensor,
    positive_index: Tensor,
    *,
    metric: str = "cosine",
    index_base: int = 0,
) -> Tensor:
    """As `count_ahead`, in plain torch: every canonical score, one query after another."""
    check_searched(queries, gallery)
    queries, gallery = together(queries, gallery)
    row = torch.arange(len(gallery), device=queries.device) + index_base
    counts = torch.zeros_like(positive_index)
    for q in range(len(queries)):
        part = slice(int(offsets[q]), int(offsets[q + 1]))
        if part.start == part.stop:
            continue
        others = gallery_group != query_group[q]
        score = canonical_scores(queries[q : q + 1], gallery, metric)[0]
        limit = (-thresholds if metric == "l2" else thresholds)[part, None]
        before = (score > limit) | ((score == limit) & (row < positive_index[part, None]))
        counts[part] = (before & others).sum(1)
    return counts


def _count_ahead(
    queries: Tensor,
    gallery: Tensor | Gallery,
    query_group: Tensor,
    gallery_group: Tensor,
    offsets: Tensor,
    thresholds: Tensor,
    positive_index: Tensor,
    metric: str,
    index_base: int,
) -> Tensor:
    """`count_ahead` of what is checked, but for numbers."""
    queries, gallery = ready(queries, gallery)
    _ascending(offsets, len(positive_index))
    if bool(thresholds.isnan().any()):
        raise ValueError("thresholds: expected scores, got NaN")
    norms = row_norms("queries", queries)
    total = torch.zeros_like(positive_index, memory_format=torch.contiguous_format)
    if backend(queries) is None:
        for base, part, (group,) in parts(gallery, queries.device, gallery_group):
            total += count_ahead_reference(
                queries, part, query_group, group, offsets, thresholds, positive_index,
                metric=metric, index_base=index_base + base,
            )  # fmt: skip
        return total
    thresholds = 0 - thresholds if metric == "l2" else thresholds
    order = _as_listed(offsets, thresholds, positive_index)
    listed = offsets.contiguous(), thresholds[order], positive_index[order]
    for base, part, (group,) in parts(gallery, queries.device, gallery_group):
        total += _counts(queries, norms, part, query_group, group, listed, metric, index_base + base)
    return torch.empty_like(total).scatter_(0, order, total)


def _counts(
    queries: Tensor,
    norms: Tensor,
    gallery: Gallery,
    query_group: Tensor,
    gallery_group: Tensor,
    listed: tuple[Tensor, Tensor, Tensor],
    metric: str,
    index_base: int,
) -> Tensor:
    """[P] for a part of the gallery; listed: offsets, thresholds and numbers in `_as_listed`'s order."""
    module = backend(queries)
    assert module is not None
    device = queries.device
    kept = [query_group.contiguous(), gallery_group.contiguous(), *listed]
    given = operands(queries, norms, gallery, metric)
    addresses = [part.data_ptr() for part in kept]
    counting = module.Counting(pairs_of(queries, norms, gallery, metric), bounds_of(given), *addresses, index_base)
    with multiplying(device) as threads:
        shares = parts_of(len(queries), len(gallery), threads)
        counts = torch.zeros(shares, len(listed[1]), dtype=torch.int64, device=device)
        sweep(
            given,
            lambda part, tile: call("count_tile", device, counting, tile, counts[part].data_ptr()),
            threads=threads,
            parts=shares,
        )
    return counts.sum(0)


def _as_listed(offsets: Tensor, thresholds: Tensor, numbers: Tensor) -> Tensor:
    """[P] the order in which csrc/rank.h wants a query's listed rows: last of the ranking first."""
    owner = torch.repeat_interleave(torch.arange(len(offsets) - 1, device=offsets.device), offsets.diff())
    order = numbers.argsort(descending=True, stable=True)
    for column in (thresholds, owner):
        order = order[column[order].argsort(stable=True)]
    return order


def count_ahead(
    queries: Tensor,
    gallery: Tensor | Gallery,
    query_group: Tensor,
    gallery_group: Tensor,
    offsets: Tensor,
    thresholds: Tensor,
    positive_index: Tensor,
    *,
    metric: str = "cosine",
    index_base: int = 0,
) -> Tensor:
    """For each listed row: how many rows of this gallery that belong to another group than the query come before it.

    queries, gallery           as in `pair_scores`
    query_group, gallery_group [Q], [G] int64; rows of the query's own group are not counted. gallery_group lies
                               where the gallery does
    offsets                    [Q + 1] int64 as in `pair_scores`
    thresholds                 [P] float32, the listed rows' own scores, from `pair_scores`
    positive_index             [P] int64, their numbers in the whole gallery
    index_base                 number in the whole gallery of row 0 of this one: where this is one part of several, the
                               counts of the parts add up

    A row comes before another when its score is greater (l2: less), or equal and its number lower.
    Returns int64 [P]. ValueError as in `pair_scores`, and where thresholds are NaN.
    """
    _check.one_of("metric", metric, METRICS)
    check_searched(queries, gallery)
    _groups(queries, gallery, query_group, gallery_group)
    _listed(queries, offsets, {"positive_index": positive_index})
    _check.shape("thresholds", thresholds, (len(positive_index),), "[P]")
    _check.dtype("thresholds", thresholds, (torch.float32,))
    _check.same_device("thresholds", thresholds, "queries", queries)
    count = _count_ahead if isinstance(gallery, Gallery) else torch.ops.kernels.count_ahead.default
    return count(queries, gallery, query_group, gallery_group, offsets, thresholds, positive_index, metric, index_base)


def _negatives_ahead(
    queries: Tensor,
    gallery: Tensor | Gallery,
    query_group: Tensor,
    gallery_group: Tensor,
    offsets: Tensor,
    positives: Tensor,
    metric: str,
) -> tuple[Tensor, Tensor]:
    """`negatives_ahead` of what is checked, but for numbers."""
    queries, gallery = ready(queries, gallery)
    scores = _pair_scores(queries, gallery, offsets, positives, metric)
    return scores, _count_ahead(queries, gallery, query_group, gallery_group, offsets, scores, positives, metric, 0)


def negatives_ahead(
    queries: Tensor,
    gallery: Tensor | Gallery,
    query_group: Tensor,
    gallery_group: Tensor,
    offsets: Tensor,
    positives: Tensor,
    *,
    metric: str = "cosine",
) -> tuple[Tensor, Tensor]:
    """`pair_scores` of the positives and `count_ahead` of them: float32 [P] and int64 [P]; arguments as there."""
    _check.one_of("metric", metric, METRICS)
    check_searched(queries, gallery)
    _groups(queries, gallery, query_group, gallery_group)
    _listed(queries, offsets, {"positives": positives})
    count = _negatives_ahead if isinstance(gallery, Gallery) else torch.ops.kernels.negatives_ahead.default
    return count(queries, gallery, query_group, gallery_group, offsets, positives, metric)


def best_per_group_reference(
    queries: Tensor,
    gallery: Tensor | Gallery,
    gallery_group: Tensor,
    groups: int,
    *,
    metric: str = "cosine",
    query_keys: Tensor | None = None,
    gallery_keys: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `best_per_group`, in plain torch: every canonical score, one group after another."""
    check_searched(queries, gallery)
    keys = keys_beside(queries, query_keys, gallery, gallery_keys)
    values, rows = _best_of_groups(*together(queries, gallery), gallery_group, groups, keys, metric)
    return 0 - values if metric == "l2" else values, rows


def _best_of_groups(
    queries: Tensor,
    gallery: Gallery,
    gallery_group: Tensor,
    groups: int,
    keys: tuple[Tensor, Tensor] | None,
    metric: str,
) -> tuple[Tensor, Tensor]:
    values, rows = empty_result(len(queries), groups, queries.device)
    for q in range(len(queries)):
        scores = canonical_scores(queries[q : q + 1], gallery, metric)[0]
        for group in range(groups):
            own = gallery_group == group
            if keys is not None:
                own &= (keys[0][q] != keys[1]).all(1)
            place = own.nonzero()[:, 0]
            if len(place):
                best = int(scores[place].argsort(descending=True, stable=True)[0])
                values[q, group], rows[q, group] = scores[place[best]], place[best]
    return values, rows


def _best_per_group(
    queries: Tensor,
    gallery: Tensor | Gallery,
    gallery_group: Tensor,
    groups: int,
    metric: str,
    query_keys: Tensor | None,
    gallery_keys: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`best_per_group` of what is checked, but for numbers; keys [Q, J] and [G, J]."""
    queries, gallery = ready(queries, gallery)
    if len(gallery) and not (int(gallery_group.min()) >= 0 and int(gallery_group.max()) < groups):
        raise ValueError(f"gallery_group: expected numbers in 0..{groups - 1}")
    norms = row_norms("queries", queries)
    search = _best_of_groups if backend(queries) is None else functools.partial(_sweep_of_groups, norms)
    beside = (gallery_group,) if gallery_keys is None else (gallery_group, gallery_keys)
    best = None
    for base, part, (group, *rest) in parts(gallery, queries.device, *beside):
        keys = None if query_keys is None else (query_keys, rest[0])
        scores, rows = search(queries, part, group, groups, keys, metric)
        if best is not None:  # rows of this part come after equal ones
            better = (rows >= 0) & ((best[1] < 0) | (scores > best[0]))
            scores, rows = torch.where(better, scores, best[0]), torch.where(better, rows + base, best[1])
        best = scores, rows
    return 0 - scores if metric == "l2" else scores, rows


def _sweep_of_groups(
    norms: Tensor,
    queries: Tensor,
    gallery: Gallery,
    gallery_group: Tensor,
    groups: int,
    keys: tuple[Tensor, Tensor] | None,
    metric: str,
) -> tuple[Tensor, Tensor]:
    module = backend(queries)
    assert module is not None
    device = queries.device
    scores, rows = empty_result(len(queries), groups, device)
    order = gallery_group.argsort(stable=True)
    by_group = gallery_group[order]
    given = operands(queries, norms, gallery, metric)
    given = given._replace(gallery_bounds=tuple(part[order] for part in given.gallery_bounds))
    keys = None if keys is None else (keys[0], keys[1][order])
    excluded = exclusion_of(queries, keys)
    addresses = order.data_ptr(), by_group.data_ptr()
    grouped = module.Grouped(pairs_of(queries, norms, gallery, metric), bounds_of(given), excluded, *addresses, groups)
    with multiplying(device) as threads:
        sweep(
            given,
            lambda _, tile: call("group_tile", device, grouped, tile, scores.data_ptr(), rows.data_ptr()),
            threads=threads,
            order=order,
        )
    return scores, rows


def best_per_group(
    queries: Tensor,
    gallery: Tensor | Gallery,
    gallery_group: Tensor,
    groups: int,
    *,
    metric: str = "cosine",
    query_keys: Tensor | None = None,
    gallery_keys: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The best admissible row of every group, for every query.

    queries, gallery          as in `pair_scores`
    gallery_group             [G] int64 in 0 .. groups - 1, where the gallery lies
    query_keys, gallery_keys  as in `topk`

    Returns scores float32 [Q, groups] and rows int64 [Q, groups], the lowest of equal ones; -inf (l2: +inf) and -1
    where no row is admissible. Parts of a gallery are merged by the better score, then the lower row. ValueError as in
    `pair_scores`.
    """
    _check.one_of("metric", metric, METRICS)
    check_searched(queries, gallery)
    _group("gallery_group", gallery_group, len(gallery), "[G]", "gallery", features_of(gallery))
    keys = keys_beside(queries, query_keys, gallery, gallery_keys) or (None, None)
    search = _best_per_group if isinstance(gallery, Gallery) else torch.ops.kernels.best_per_group.default
    return search(queries, gallery, gallery_group, groups, metric, *keys)


_LIBRARY = torch.library.Library("kernels", "FRAGMENT")
_ROWS = "Tensor queries, Tensor gallery"
_GROUPS = "Tensor query_group, Tensor gallery_group"
for _schema, _function in (
    (f"pair_scores({_ROWS}, Tensor offsets, Tensor positives, str metric) -> Tensor", _pair_scores),
    (
        f"count_ahead({_ROWS}, {_GROUPS}, Tensor offsets, Tensor thresholds, Tensor positive_index, str metric, "
        "SymInt index_base) -> Tensor",
        _count_ahead,
    ),
    (
        f"negatives_ahead({_ROWS}, {_GROUPS}, Tensor offsets, Tensor positives, str metric) -> (Tensor, Tensor)",
        _negatives_ahead,
    ),
    (
        f"best_per_group({_ROWS}, Tensor gallery_group, SymInt groups, str metric, Tensor? query_keys, "
        "Tensor? gallery_keys) -> (Tensor, Tensor)",
        _best_per_group,
    ),
):
    _LIBRARY.define(_schema, tags=torch.Tag.pt2_compliant_tag)
    for _key in ("CUDA", "CPU"):
        _LIBRARY.impl(_schema.partition("(")[0], _function, _key)
    _LIBRARY.impl(_schema.partition("(")[0], torch.library.fallthrough_kernel, "Autograd")  # not differentiable


@torch.library.register_fake("kernels::pair_scores", lib=_LIBRARY)
def _(queries, gallery, offsets, positives, metric):
    return queries.new_empty(len(positives), dtype=torch.float32)


@torch.library.register_fake("kernels::count_ahead", lib=_LIBRARY)
def _(queries, gallery, query_group, gallery_group, offsets, thresholds, positive_index, metric, index_base):
    return queries.new_empty(len(positive_index), dtype=torch.int64)


@torch.library.register_fake("kernels::negatives_ahead", lib=_LIBRARY)
def _(queries, gallery, query_group, gallery_group, offsets, positives, metric):
    P = len(positives)
    return queries.new_empty(P, dtype=torch.float32), queries.new_empty(P, dtype=torch.int64)


@torch.library.register_fake("kernels::best_per_group", lib=_LIBRARY)
def _(queries, gallery, gallery_group, groups, metric, query_keys, gallery_keys):
    shape = len(queries), groups
    return queries.new_empty(shape, dtype=torch.float32), queries.new_empty(shape, dtype=torch.int64)


def _listed(queries: Tensor, offsets: Tensor, listed: dict[str, Tensor]) -> None:
    ((name, tensor),) = listed.items()
    _check.shape("offsets", offsets, (len(queries) + 1,), "[Q+1]")
    _check.shape(name, tensor, (None,), "[P]")
    for each, given in (("offsets", offsets), (name, tensor)):
        _check.dtype(each, given, (torch.int64,))
        _check.same_device(each, given, "queries", queries)


def _ascending(offsets: Tensor, count: int) -> None:
    if int(offsets[0]) != 0 or int(offsets[-1]) != count or bool((offsets.diff() < 0).any()):
        raise ValueError(f"offsets: expected ascending numbers from 0 to {count}, got {offsets[:8].tolist()}...")


def _groups(queries: Tensor, gallery: Tensor | Gallery, query_group: Tensor, gallery_group: Tensor) -> None:
    _group("query_group", query_group, len(queries), "[Q]", "queries", queries)
    _group("gallery_group", gallery_group, len(gallery), "[G]", "gallery", features_of(gallery))


def _group(name: str, group: Tensor, count: int, legend: str, of: str, rows: Tensor) -> None:
    _check.shape(name, group, (count,), legend)
    _check.dtype(name, group, (torch.int64,))
    _check.same_device(name, group, of, rows)
