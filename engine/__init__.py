"""Trains, evaluates and serves person retrieval with the Instruct-ReID model. Names load on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.config import TrainConfig
    from engine.evaluation import evaluate
    from engine.extractor import load
    from engine.training import train

__all__ = ["TrainConfig", "evaluate", "load", "train"]

_MODULE = {"TrainConfig": "config", "evaluate": "evaluation", "load": "extractor", "train": "training"}


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    return getattr(importlib.import_module(f"engine.{_MODULE[name]}"), name)
