"""A gallery along its leading directions: a trained model's features lie mostly in few of their dimensions.

The product of what two rows have along L orthonormal directions differs from the product of the rows by no more than
what both leave out of them (Cauchy-Schwarz; kernels/bounds.py). So candidates are found by products of L features
instead of D, and results are the same. The directions are those of a sample's second moment, greatest first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.bounds import left_out

SAMPLE = 2048  # rows, or twice as many as features
SHARE = 4  # of the features: so many directions at most
PASSES = 3
SHRUNK = 1 - 1e-9  # keeps the greatest singular value of what is orthonormal up to 1e-10 below 1
ROWS = 1024  # projected at a time, in float64


class Leading:
    """directions [L, D] float64; rows [G, L] float32, the gallery along them; left [G] float64, the norm of what these
    leave out (or a little more). bounds: of searches along them, by metric and type (kernels/candidates.py)."""

    def __init__(self, directions: Tensor, rows: Tensor, left: Tensor):
        self.directions, self.rows, self.left = directions, rows, left
        self.bounds: dict[Any, Any] = {}


def sample_of(count: int, most: int, device: torch.device) -> Tensor:
    """[count or most] int64: all of 0 .. count - 1, or some of them at random, the same each time."""
    if count <= most:
        return torch.arange(count, device=device)
    return torch.randint(count, (most,), generator=torch.Generator(device).manual_seed(0), device=device)


def directions_of(rows: Tensor) -> Tensor | None:
    """A quarter as many as features, [L, D] float64, leading first, of rows [G, D]; None where they are not orthonormal
    as they should be. By subspace iteration: how well they lead changes what a search takes, nothing else."""
    (G, D), device = rows.shape, rows.device
    some = rows[sample_of(G, max(SAMPLE, 2 * D), device)].float()
    norms = some.norm(dim=1, keepdim=True)
    some = torch.where(norms > 0, some / norms, 0)
    moment = some.T @ some
    generator = torch.Generator(device).manual_seed(0)
    basis = torch.randn(D, -(-D // SHARE), generator=generator, dtype=torch.float32, device=device)
    for _ in range(PASSES):
        basis = torch.linalg.qr(moment @ basis).Q
    turned = basis @ torch.linalg.eigh(basis.T @ moment @ basis).eigenvectors.flip(1)
    directions = torch.linalg.qr(turned.double()).Q.T.contiguous()
    beside = directions @ directions.T - torch.eye(len(directions), dtype=torch.float64, device=device)
    return directions * SHRUNK if float(beside.norm()) <= 1e-10 else None


def leading_of(rows: Tensor, norms: Tensor, directions: Tensor) -> Leading:
    """Rows [n, D] float32, float16 or bfloat16, with norms [n] float64, along directions [L, D] float64."""
    short = torch.empty(len(rows), len(directions), dtype=torch.float32, device=rows.device)
    left = torch.empty_like(norms)
    for start in range(0, len(rows), ROWS):
        part = slice(start, start + ROWS)
        exact = rows[part].double() @ directions.T
        short[part], left[part] = exact, left_out(norms[part], exact)
    return Leading(directions, short, left)
