"""Kernels for instructed person re-identification. Names load on first use; importing the package loads nothing."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kernels.attention import (
        gated_attention,
        gated_attention_packed,
        gated_attention_packed_reference,
        gated_attention_reference,
    )
    from kernels.rank import pair_scores, pair_scores_reference
    from kernels.triplet import adaptive_triplet, adaptive_triplet_reference

# transformers looks for a package of this name and reads its version: it must exist and stay below theirs.
__version__ = "0.0.1"

__all__ = [
    "adaptive_triplet",
    "adaptive_triplet_reference",
    "gated_attention",
    "gated_attention_packed",
    "gated_attention_packed_reference",
    "gated_attention_reference",
    "pair_scores",
    "pair_scores_reference",
]

_MODULE = {
    "adaptive_triplet": "triplet",
    "adaptive_triplet_reference": "triplet",
    "gated_attention": "attention",
    "gated_attention_packed": "attention",
    "gated_attention_packed_reference": "attention",
    "gated_attention_reference": "attention",
    "pair_scores": "rank",
    "pair_scores_reference": "rank",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'kernels' has no attribute {name!r}")
    return getattr(importlib.import_module(f"kernels.{_MODULE[name]}"), name)
