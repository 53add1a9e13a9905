"""Kernels for instructed person re-identification. Names load on first use; importing the package loads nothing."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kernels.attention import (
        gated_attention,
        gated_attention_packed,
        gated_attention_packed_reference,
        gated_attention_reference,
    )
    from kernels.augment import Normalization, augment, augment_parameters, augment_reference
    from kernels.gallery import Gallery, prepare_gallery
    from kernels.rank import (
        best_per_group,
        best_per_group_reference,
        count_ahead,
        count_ahead_reference,
        negatives_ahead,
        pair_scores,
        pair_scores_reference,
    )
    from kernels.topk import topk, topk_reference
    from kernels.triplet import adaptive_triplet, adaptive_triplet_reference

# transformers looks for a package of this name and reads its version: it must exist and stay below theirs.
__version__ = "0.0.1"

_MODULE = {
    "Gallery": "gallery",
    "Normalization": "augment",
    "adaptive_triplet": "triplet",
    "adaptive_triplet_reference": "triplet",
    "augment": "augment",
    "augment_parameters": "augment",
    "augment_reference": "augment",
    "best_per_group": "rank",
    "best_per_group_reference": "rank",
    "count_ahead": "rank",
    "count_ahead_reference": "rank",
    "gated_attention": "attention",
    "gated_attention_packed": "attention",
    "gated_attention_packed_reference": "attention",
    "gated_attention_reference": "attention",
    "negatives_ahead": "rank",
    "pair_scores": "rank",
    "pair_scores_reference": "rank",
    "prepare_gallery": "gallery",
    "topk": "topk",
    "topk_reference": "topk",
}

__all__ = [
    "Gallery",
    "Normalization",
    "adaptive_triplet",
    "adaptive_triplet_reference",
    "augment",
    "augment_parameters",
    "augment_reference",
    "best_per_group",
    "best_per_group_reference",
    "count_ahead",
    "count_ahead_reference",
    "gated_attention",
    "gated_attention_packed",
    "gated_attention_packed_reference",
    "gated_attention_reference",
    "negatives_ahead",
    "pair_scores",
    "pair_scores_reference",
    "prepare_gallery",
    "topk",
    "topk_reference",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'kernels' has no attribute {name!r}")
    return getattr(importlib.import_module(f"kernels.{_MODULE[name]}"), name)


class _Package(ModuleType):
    """`kernels.topk` is the function, also after an import of the module kernels/topk.py."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and _MODULE.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
