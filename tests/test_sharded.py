"""kernels.sharded on 1, 2, 3, 4 gloo ranks: the bits of one process that holds the whole gallery."""

import torch
import torch.distributed as dist
from conftest import recipe
from test_rank import case

import kernels
from kernels import sharded

METRICS = ["cosine", "ip", "l2"]
Q, G, D, K = 11, 700, 24, 60


def inputs(kind):
    given = case(Q, G, D, kind=kind)
    generator = torch.Generator().manual_seed(1)
    keys = [torch.randint(0, 4, (n, 2), generator=generator) for n in (Q, G)]
    return (*given, *keys)


def found(given, metric, rank, world, group=None):
    """All results of the rows of this rank; the gallery is cut unevenly, the last of four ranks holds nothing."""
    queries, gallery, query_group, gallery_group, offsets, listed, query_keys, gallery_keys = given
    bounds = {1: [0, G], 2: [0, 100, G], 3: [0, 3, 400, G], 4: [0, 3, 400, G, G]}[world]
    part = slice(bounds[rank], bounds[rank + 1]) if group else slice(0, G)
    ops = sharded if group else kernels
    options = {"metric": metric, "group": group} if group else {"metric": metric}
    owned = slice(Q * rank // world, Q * (rank + 1) // world)
    own_listed = listed[offsets[owned.start] : offsets[owned.stop]]
    own_offsets = offsets[owned.start : owned.stop + 1] - offsets[owned.start]
    keys = {"query_keys": query_keys[owned], "gallery_keys": gallery_keys[part]}
    rows = queries[owned], gallery[part]
    return [
        *ops.topk(*rows, K, **options),
        *ops.topk(*rows, G + 9, **options, **keys),
        *ops.negatives_ahead(*rows, query_group[owned], gallery_group[part], own_offsets, own_listed, **options),
        *ops.best_per_group(*rows, gallery_group[part], 7, **options, **keys),
    ]


def work():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for world in (1, 2, 3, 4):
        group = dist.new_group(list(range(world)))
        for kind in ("normal", "equal", "whole", "wild") if rank < world else ():
            given = inputs(kind)
            for metric in METRICS:
                expected = found(given, metric, rank, world)
                for one, other in zip(found(given, metric, rank, world, group), expected, strict=True):
                    assert torch.equal(one, other), (kind, metric, rank, world)
    dist.barrier()
    dist.destroy_process_group()


def test_the_number_of_ranks_does_not_matter():
    done = recipe(__file__, ranks=4)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":  # one rank
    work()
