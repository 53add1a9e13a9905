"""Search and ranking of a gallery that ranks of torch.distributed hold in parts, with the bits of the whole gallery.

Rank r holds the rows after those of ranks 0 .. r - 1, and queries of its own; numbers of rows are those of the whole.
Queries are small and go to all ranks; every rank searches its part for all of them; results go to the query's owner,
who merges: by (score, row), counts by adding. Scores are canonical, so the number of parts cannot be told from them.
All ranks call together, with any process group that has all_gather, all_reduce and all_to_all (gloo, NCCL).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

import kernels
from kernels.gallery import Gallery
from kernels.streaming import best

Group = dist.ProcessGroup | None


def topk(
    queries: Tensor,
    gallery: Tensor | Gallery,
    k: int,
    *,
    metric: str = "cosine",
    query_keys: Tensor | None = None,
    gallery_keys: Tensor | None = None,
    group: Group = None,
) -> tuple[Tensor, Tensor]:
    """As `kernels.topk` of the whole gallery, for this rank's queries. gallery and gallery_keys: this rank's part."""
    all_queries, sizes = _gathered(queries, group)
    keys = None if query_keys is None else _gathered(query_keys, group)[0]
    values, rows = kernels.topk(all_queries, gallery, k, metric=metric, query_keys=keys, gallery_keys=gallery_keys)
    rows = torch.where(rows < 0, rows, rows + _base(gallery, queries.device, group))
    return best(_to_owners(values, sizes, group), _to_owners(rows, sizes, group), k, descending=metric != "l2")


def negatives_ahead(
    queries: Tensor,
    gallery: Tensor | Gallery,
    query_group: Tensor,
    gallery_group: Tensor,
    offsets: Tensor,
    positives: Tensor,
    *,
    metric: str = "cosine",
    group: Group = None,
) -> tuple[Tensor, Tensor]:
    """As `kernels.negatives_ahead` of the whole gallery, for this rank's queries and their positives (rows of the
    whole). gallery and gallery_group: this rank's part."""
    all_queries, _ = _gathered(queries, group)
    listed, sizes = _gathered(positives, group)
    counts, _ = _gathered(offsets.diff(), group)
    all_offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    base = _base(gallery, queries.device, group)
    own = (listed >= base) & (listed < base + len(gallery))
    owner = torch.repeat_interleave(torch.arange(len(counts), device=queries.device), counts)
    here = torch.bincount(owner[own], minlength=len(counts))
    here = torch.cat([here.new_zeros(1), here.cumsum(0)])
    scores = torch.zeros(len(listed), device=queries.device)
    scores[own] = kernels.pair_scores(all_queries, gallery, here, listed[own] - base, metric=metric)
    dist.all_reduce(scores, group=group)  # one rank's score and zeros
    ahead = kernels.count_ahead(
        all_queries,
        gallery,
        _gathered(query_group, group)[0],
        gallery_group,
        all_offsets,
        scores,
        listed,
        metric=metric,
        index_base=base,
    )
    dist.all_reduce(ahead, group=group)
    start = sum(sizes[: dist.get_rank(group)])
    part = slice(start, start + len(positives))
    return scores[part], ahead[part]


def best_per_group(
    queries: Tensor,
    gallery: Tensor | Gallery,
    gallery_group: Tensor,
    groups: int,
    *,
    metric: str = "cosine",
    query_keys: Tensor | None = None,
    gallery_keys: Tensor | None = None,
    group: Group = None,
) -> tuple[Tensor, Tensor]:
    """As `kernels.best_per_group` of the whole gallery, for this rank's queries. gallery, gallery_group and
    gallery_keys: this rank's part."""
    all_queries, sizes = _gathered(queries, group)
    keys = None if query_keys is None else _gathered(query_keys, group)[0]
    values, rows = kernels.best_per_group(
        all_queries, gallery, gallery_group, groups, metric=metric, query_keys=keys, gallery_keys=gallery_keys
    )
    rows = torch.where(rows < 0, rows, rows + _base(gallery, queries.device, group))
    columns = [
        _to_owners(part, sizes, group).unflatten(1, (-1, groups)).transpose(1, 2).flatten(0, 1)
        for part in (values, rows)
    ]  # [queries x groups, ranks]
    values, rows = best(columns[0], columns[1], 1, descending=metric != "l2")
    return values.view(len(queries), groups), rows.view(len(queries), groups)


def _base(gallery: Tensor | Gallery, device: torch.device, group: Group) -> int:
    """Rows of the ranks before this one."""
    return sum(_sizes(len(gallery), device, group)[: dist.get_rank(group)])


def _sizes(own: int, device: torch.device, group: Group) -> list[int]:
    """Every rank's number."""
    sizes = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=device)
    sizes[dist.get_rank(group)] = own
    dist.all_reduce(sizes, group=group)
    return sizes.tolist()


def _gathered(rows: Tensor, group: Group) -> tuple[Tensor, list[int]]:
    """All ranks' rows one after another, and how many are whose. Types and further sizes are alike on all ranks."""
    sizes = _sizes(len(rows), rows.device, group)
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]), sizes


def _to_owners(results: Tensor, sizes: list[int], group: Group) -> Tensor:
    """[all queries, n], what this rank found for everyone -> [own queries, ranks x n], what all ranks found for it."""
    world, own = len(sizes), sizes[dist.get_rank(group)]
    received = results.new_empty(world * own, results.shape[1])
    dist.all_to_all_single(received, results.contiguous(), [own] * world, sizes, group=group)
    return received.view(world, own, -1).transpose(0, 1).flatten(1)
