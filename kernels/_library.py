"""Which backend: the optional extension `_C` and its CUDA part, in one place."""

from __future__ import annotations

import functools
import warnings
from types import ModuleType


@functools.cache
def extension() -> ModuleType | None:
    """`kernels._C`, or None (said once) where it was not built: the Python forms then serve."""
    try:
        from kernels import _C
    except ImportError as error:
        warnings.warn(f"kernels._C is not built ({error}); slower Python forms serve", stacklevel=2)
        return None
    return _C
