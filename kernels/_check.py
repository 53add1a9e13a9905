"""One-line validators: a ValueError names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def shape(name: str, tensor: Tensor, expected: Sequence[int | None], legend: str) -> None:
    """`expected` per dimension, None = any size. legend: the shape in words, such as "[B, H, N, D]"."""
    same = tensor.dim() == len(expected) and all(
        e is None or e == s for e, s in zip(expected, tensor.shape, strict=False)
    )
    if not same:
        sizes = ", ".join("any" if e is None else str(e) for e in expected)
        raise ValueError(f"{name}: expected shape {legend} = ({sizes}), got {tuple(tensor.shape)}")


def dtype(name: str, tensor: Tensor, expected: Sequence[torch.dtype]) -> None:
    if tensor.dtype not in expected:
        raise ValueError(f"{name}: expected {' or '.join(map(str, expected))}, got {tensor.dtype}")


def same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name}: expected the device of {other_name} ({other.device}), got {tensor.device}")


def one_of(name: str, value: Any, choices: Sequence[Any]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def integers(name: str, tensor: Tensor, count: int) -> None:
    shape(name, tensor, (count,), "[B]")
    if tensor.is_floating_point() or tensor.dtype == torch.bool:
        raise ValueError(f"{name}: expected an integer dtype, got {tensor.dtype}")
