"""What all ranks hold together, for the model and its losses: sums and batches over ranks that autograd knows.

Every rank has to pass here in the same order, forward and backward. Without a process group there is one rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def place() -> tuple[int, int]:
    """(rank, world size)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class _SumOverRanks(torch.autograd.Function):
    """All-reduced sum whose gradient is the all-reduced sum of gradients."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        out = x.clone()
        dist.all_reduce(out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        out = grad.clone()
        dist.all_reduce(out)
        return out


class _Gathered(torch.autograd.Function):
    """The batches of all ranks one after another; an entry's gradient is the sum of all ranks' gradients of it."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return gathered_values(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        out = grad.contiguous().clone()
        dist.all_reduce(out)
        rank, world = place()
        return out.chunk(world)[rank]


def summed(x: Tensor) -> Tensor:
    """Sum over ranks."""
    return _SumOverRanks.apply(x) if place()[1] > 1 else x


def gathered(x: Tensor) -> Tensor:
    """[B, ...] of every rank, all of one shape -> [world * B, ...]."""
    return _Gathered.apply(x) if place()[1] > 1 else x


def gathered_values(x: Tensor) -> Tensor:
    """`gathered` without gradient."""
    _, world = place()
    if world == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world)]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


def padded(x: Tensor) -> Tensor:
    """[B, M, ...] with zeros behind, up to the largest M of all ranks."""
    if place()[1] == 1:
        return x
    most = torch.tensor([x.shape[1]], device=x.device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    more = x.new_zeros(len(x), int(most) - x.shape[1], *x.shape[2:])
    return torch.cat([x, more], 1)
