"""Products in 16 bits instead of float32: int16 on a CPU that makes two of them in the time of one, float16 on a GPU.

The gallery stays as it is stored: a block of it is encoded on the way (csrc/product.h, `multiply_encoded`).
kernels/bounds.py bounds what rounding changes, and whatever may be among the best is scored canonically, so results are
the same.
"""

from __future__ import annotations

import functools
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from kernels.bounds import scales
from kernels.gallery import call, multiply, multiply_encoded, multiplying, row_norms, scratch_for

LEAST, DEVICE_LEAST = 128, 512  # queries at a time: with fewer, encoding the gallery takes what the products save
ROUNDS = 7
ERROR = {torch.int16: 0.0, torch.float16: 2e-4}  # of a product, in parts of the greatest


def narrow_type(device: torch.device) -> torch.dtype:
    """The 16 bits that a device multiplies."""
    return torch.float16 if device.type == "cuda" else torch.int16


def narrow_pays(device: torch.device, rows: int) -> bool:
    """Whether to multiply `rows` queries at a time in 16 bits: many, on a processor that does it faster."""
    return rows >= (DEVICE_LEAST if device.type == "cuda" else LEAST) and narrow_is_faster(device)


def inverse(scale: Tensor) -> Tensor:
    """1 / scale [n] float32, of scale [n] as float32 holds it; 0 for 0."""
    scale = scale.float()
    return torch.where(scale > 0, 1 / scale, 0)


def encode_queries(queries: Tensor, inverse: Tensor, kind: torch.dtype) -> Tensor:
    """Queries [Q, D] float32 times `inverse` [Q] float32, as float16 [Q, D] or int16 [Q, D or D + 1, even]."""
    if kind == torch.float16:
        return (queries * inverse[:, None]).half()
    Q, D = queries.shape
    values = torch.empty(Q, D + D % 2, dtype=torch.int16, device=queries.device)
    call("encode", queries.device, queries.data_ptr(), 0, inverse.data_ptr(), Q, D, values.data_ptr())
    return values


@functools.cache
def narrow_is_faster(device: torch.device) -> bool:
    """Whether this processor multiplies in 16 bits faster than in float32: measured once; a CPU's by one thread."""
    if device.type == "cuda":
        with multiplying(device):
            return _measured(device, DEVICE_LEAST, 8192)
    one = functools.partial(torch.set_num_threads, 1)
    with multiplying(device), ThreadPoolExecutor(1, initializer=one) as pool:
        return pool.submit(_measured, device, LEAST, 1024).result()


def _measured(device: torch.device, Q: int, G: int) -> bool:
    generator, kind = torch.Generator().manual_seed(0), narrow_type(device)
    rows = torch.randn(G, 512, generator=generator, dtype=torch.float32, device="cpu").to(device)
    inverses = inverse(scales(row_norms("rows", rows), kind))
    codes = encode_queries(rows, inverses, kind)
    queries, scratch = codes[:Q], scratch_for(codes, G, rows.shape[1])
    floats = torch.zeros(Q, G, dtype=torch.float32, device=device)
    narrow = torch.zeros_like(floats, dtype=torch.int32 if kind == torch.int16 else torch.float32)
    took = []
    for _ in range(ROUNDS):
        began = _now(device)
        multiply_encoded(queries, rows, inverses, narrow, scratch)
        middle = _now(device)
        multiply(rows[:Q], rows, floats)
        took.append((middle - began, _now(device) - middle))
    exact = codes[:Q].double() @ codes.double().T
    if not torch.allclose(narrow.double(), exact, rtol=0, atol=ERROR[kind] * float(exact.max())):
        return False  # a processor on which this was never tried
    return min(own for own, _ in took) < min(other for _, other in took)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
