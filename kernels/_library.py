"""Which backend: the optional extension `_C` and its CUDA part, and Triton's interpreter, in one place."""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from types import ModuleType

import torch

# TRITON_INTERPRET=1 in the environment before `kernels` is imported: Triton kernels run on CPU tensors.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """The tensor's GPU as the current one: Triton launches there."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@functools.cache
def extension() -> ModuleType | None:
    """`kernels._C`, or None (said once) where it was not built: the Python forms then serve."""
    try:
        from kernels import _C
    except ImportError as error:
        warnings.warn(f"kernels._C is not built ({error}); slower Python forms serve", stacklevel=2)
        return None
    return _C
