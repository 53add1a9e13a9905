"""Gated dual-softmax attention: attention over the image plus a gated second softmax over the instruction.

    out = softmax(Q K^T * scale) V + g * softmax(Q K'^T * scale) V'            (Instruct-ReID, Eq. 2-4, before Linear_o)

Shapes: B batch, H heads, N image tokens, M instruction tokens, D head dimension; g is one number per head or per layer.
At g = 0 this is plain attention, and dg != 0, so the gate can open. A sample without instruction tokens (length 0)
has a second term of exactly 0.

Backward, with P, P' the two softmaxes: d1 = rowsum(P o dO V^T), d2 = rowsum(P' o dO V'^T),
    dS = P o (dO V^T - d1),  dS' = g P' o (dO V'^T - d2),  dg = sum d2,
    dQ = scale (dS K + dS' K'),  dK = scale dS^T Q,  dK' = scale dS'^T Q,  dV = P^T dO,  dV' = g P'^T dO.

On a GPU one program owns a (batch, head): its keys stay in the cache, nothing is added atomically, and the same input
gives the same bits. Lengths are cut into full tiles and then into tiles of 16, so that 129 tokens cost 144, not 256;
padded instruction tokens cost nothing. Bytes: forward reads q, k, v, k', v' and writes out and two logarithms per row;
backward reads these and dO and writes the gradients.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import _check
from kernels._library import INTERPRETED, device_of

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LOG2_E = math.log2(math.e)


def gated_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_ins: Tensor | None = None,
    v_ins: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    ins_lengths: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Eq. 2-4 as written, every attention map in memory. Arguments as `gated_attention`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = torch.softmax(q @ k.mT * scale, -1) @ v
    if k_ins is None or v_ins is None or gate is None or k_ins.shape[2] == 0:
        return out
    if ins_lengths is not None:
        valid_BM = torch.arange(k_ins.shape[2], device=q.device) < ins_lengths[:, None]
        # 0 * NaN of the padding would be NaN, forward and backward
        k_ins, v_ins = (t.masked_fill(~valid_BM[:, None, :, None], 0.0) for t in (k_ins, v_ins))
    scores_BHNM = q @ k_ins.mT * scale
    if ins_lengths is not None:
        # finfo.min, not -inf: a row without any valid token must stay finite before its maps are zeroed
        scores_BHNM = scores_BHNM.masked_fill(~valid_BM[:, None, None], torch.finfo(q.dtype).min)
        maps = torch.softmax(scores_BHNM, -1).masked_fill(~valid_BM[:, None, None], 0.0)
    else:
        maps = torch.softmax(scores_BHNM, -1)
    return out + (gate.float().view(1, -1, 1, 1) * (maps @ v_ins)).to(out.dtype)


def gated_attention_packed_reference(
    qkv: Tensor,
    kv_ins: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    ins_lengths: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`gated_attention_reference` with the arguments of `gated_attention_packed`."""
    q, k, v, k_ins, v_ins = _unpacked(qkv, None, None, kv_ins, None)
    out = gated_attention_reference(q, k, v, k_ins, v_ins, gate, ins_lengths=ins_lengths, scale=scale)
    return out.transpose(1, 2)


@triton.jit
def _load(base, rows, stride, count, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of a [count, D] matrix, 0 outside it."""
    cols = tl.arange(0, BLOCK_D)
    mask = (rows < count)[:, None] & (cols < D)[None, :]
    return tl.load(base + (rows[:, None] * stride + cols[None, :]), mask=mask, other=0.0)


@triton.jit
def _store(base, rows, stride, count, value, D: tl.constexpr, BLOCK_D: tl.constexpr):
    cols = tl.arange(0, BLOCK_D)
    mask = (rows < count)[:, None] & (cols < D)[None, :]
    at = base + (rows[:, None] * stride + cols[None, :])
    tl.store(at, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _attend(
    q, K, V, stride, count, begin, end, top, total, acc, scale2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of rows q to keys begin..end, a tile at a time. Running: top (largest score so far, in powers of 2),
    total (sum of weights), acc (sum of weighted values)."""
    for start in tl.range(begin, end, TILE):
        keys = start + tl.arange(0, TILE)
        k = _load(K, keys, stride, count, D, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2
        s = tl.where((keys < count)[None, :], s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        shrink = tl.exp2(top - higher)
        p = tl.exp2(s - higher[:, None])
        total = total * shrink + tl.sum(p, 1)
        v = _load(V, keys, stride, count, D, BLOCK_D)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = higher
    return top, total, acc


@triton.jit
def _attention_of(
    q, K, V, stride, count, scale2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(attention, log2 of the sum of exponentials) of rows q; both 0 without keys."""
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    full = count // KEYS * KEYS
    top, total, acc = _attend(q, K, V, stride, count, 0, full, top, total, acc, scale2, D, BLOCK_D, KEYS, PRECISION)
    top, total, acc = _attend(q, K, V, stride, count, full, count, top, total, acc, scale2, D, BLOCK_D, 16, PRECISION)
    total = tl.where(count > 0, total, 1.0)
    return acc / total[:, None], tl.where(count > 0, top + tl.log2(total), 0.0)


@triton.jit
def _forward_rows(
    start, q_at, k_at, v_at, ki_at, vi_at, out_at, lse_at, lse_ins_at, q_n, kv_n, ins_m, out_n, N, length, gate, scale2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, INS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, KEYS_INS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = start + tl.arange(0, ROWS)
    q = _load(q_at, rows, q_n, N, D, BLOCK_D)
    out, lse = _attention_of(q, k_at, v_at, kv_n, N, scale2, D, BLOCK_D, ROWS, KEYS, PRECISION)
    tl.store(lse_at + rows, lse, mask=rows < N)
    if INS:
        second, lse = _attention_of(q, ki_at, vi_at, ins_m, length, scale2, D, BLOCK_D, ROWS, KEYS_INS, PRECISION)
        tl.store(lse_ins_at + rows, lse, mask=rows < N)
        out += gate * second
    _store(out_at, rows, out_n, N, out, D, BLOCK_D)


@triton.jit(do_not_specialize=["H", "N", "M"])
def _forward(
    Q, K, V, K_INS, V_INS, GATE, LENGTHS, OUT, LSE, LSE_INS,
    q_b, q_h, kv_b, kv_h, ins_b, ins_h, out_b, out_h, gate_h, lengths_b, H, N, M, scale2,
    q_n: tl.constexpr, kv_n: tl.constexpr, ins_m: tl.constexpr, out_n: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, INS: tl.constexpr, VARLEN: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, KEYS_INS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: all rows of one (batch, head). scale2 = scale * log2(e)."""
    b, h = (tl.program_id(0) // H).to(tl.int64), (tl.program_id(0) % H).to(tl.int64)
    q_at, out_at = Q + b * q_b + h * q_h, OUT + b * out_b + h * out_h
    k_at, v_at = K + b * kv_b + h * kv_h, V + b * kv_b + h * kv_h
    ki_at, vi_at = K_INS + b * ins_b + h * ins_h, V_INS + b * ins_b + h * ins_h
    lse_at, lse_ins_at = LSE + (b * H + h) * N, LSE_INS + (b * H + h) * N
    gate, length = 0.0, M
    if INS:
        gate = tl.load(GATE + h * gate_h)
        if VARLEN:
            length = tl.minimum(tl.maximum(tl.load(LENGTHS + b * lengths_b).to(tl.int64), 0), M).to(tl.int32)
    full = N // ROWS * ROWS
    for start in tl.range(0, full, ROWS, disable_licm=True):
        _forward_rows(
            start, q_at, k_at, v_at, ki_at, vi_at, out_at, lse_at, lse_ins_at, q_n, kv_n, ins_m, out_n, N, length, gate,
            scale2, D, BLOCK_D, INS, ROWS, KEYS, KEYS_INS, PRECISION,
        )  # fmt: skip
    for start in tl.range(full, N, 16, disable_licm=True):
        _forward_rows(
            start, q_at, k_at, v_at, ki_at, vi_at, out_at, lse_at, lse_ins_at, q_n, kv_n, ins_m, out_n, N, length, gate,
            scale2, D, BLOCK_D, INS, 16, KEYS, KEYS_INS, PRECISION,
        )  # fmt: skip


@triton.jit
def _maps(
    q, do, lse, K, V, stride, count, start, scale2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P and dO V^T of rows q for the keys from start, and these keys; P is 0 beyond count, where it could overflow."""
    keys = start + tl.arange(0, TILE)
    k, v = _load(K, keys, stride, count, D, BLOCK_D), _load(V, keys, stride, count, D, BLOCK_D)
    p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2 - lse[:, None])
    return tl.where((keys < count)[None, :], p, 0.0), tl.dot(do, tl.trans(v), input_precision=PRECISION), k


@triton.jit
def _add_delta(
    q, do, lse, K, V, stride, count, begin, end, delta, scale2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for start in tl.range(begin, end, TILE):
        p, dp, _ = _maps(q, do, lse, K, V, stride, count, start, scale2, D, BLOCK_D, TILE, PRECISION)
        delta += tl.sum(p * dp, 1)
    return delta


@triton.jit
def _add_dq(
    q, do, lse, delta, K, V, stride, count, begin, end, dq, scale2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for start in tl.range(begin, end, TILE):
        p, dp, k = _maps(q, do, lse, K, V, stride, count, start, scale2, D, BLOCK_D, TILE, PRECISION)
        dq = tl.dot((p * (dp - delta[:, None])).to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def _backward_rows(
    start, q_at, k_at, v_at, ki_at, vi_at, out_at, do_at, dq_at, lse_at, lse_ins_at, delta_at, delta_ins_at,
    q_n, kv_n, ins_m, out_n, do_n, dq_n, N, length, gate, scale, scale2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, INS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, KEYS_INS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ and the deltas of some rows; returns their share of dg."""
    rows = start + tl.arange(0, ROWS)
    q, do = _load(q_at, rows, q_n, N, D, BLOCK_D), _load(do_at, rows, do_n, N, D, BLOCK_D)
    delta = tl.sum(_load(out_at, rows, out_n, N, D, BLOCK_D).to(tl.float32) * do.to(tl.float32), 1)
    dq = tl.zeros([ROWS, BLOCK_D], tl.float32)
    dgate = 0.0
    if INS:
        lse = tl.load(lse_ins_at + rows, mask=rows < N, other=0.0)
        full = length // KEYS_INS * KEYS_INS
        second = tl.zeros([ROWS], tl.float32)
        second = _add_delta(
            q, do, lse, ki_at, vi_at, ins_m, length, 0, full, second, scale2, D, BLOCK_D, KEYS_INS, PRECISION
        )
        second = _add_delta(
            q, do, lse, ki_at, vi_at, ins_m, length, full, length, second, scale2, D, BLOCK_D, 16, PRECISION
        )
        tl.store(delta_ins_at + rows, second, mask=rows < N)
        dgate = tl.sum(second)
        delta -= gate * second  # out holds both terms
        dq = _add_dq(
            q, do, lse, second, ki_at, vi_at, ins_m, length, 0, full, dq, scale2, D, BLOCK_D, KEYS_INS, PRECISION
        )
        dq = _add_dq(
            q, do, lse, second, ki_at, vi_at, ins_m, length, full, length, dq, scale2, D, BLOCK_D, 16, PRECISION
        )
        dq *= gate  # here and not in dS', which a small gate would push out of float16's range
    tl.store(delta_at + rows, delta, mask=rows < N)
    lse = tl.load(lse_at + rows, mask=rows < N, other=0.0)
    full = N // KEYS * KEYS
    dq = _add_dq(q, do, lse, delta, k_at, v_at, kv_n, N, 0, full, dq, scale2, D, BLOCK_D, KEYS, PRECISION)
    dq = _add_dq(q, do, lse, delta, k_at, v_at, kv_n, N, full, N, dq, scale2, D, BLOCK_D, 16, PRECISION)
    _store(dq_at, rows, dq_n, N, dq * scale, D, BLOCK_D)
    return dgate


@triton.jit
def _add_dkv(
    k, v, q_at, do_at, lse_at, delta_at, q_n, do_n, N, begin, end, dk, dv, scale2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for start in tl.range(begin, end, TILE):
        rows = start + tl.arange(0, TILE)
        q, do = _load(q_at, rows, q_n, N, D, BLOCK_D), _load(do_at, rows, do_n, N, D, BLOCK_D)
        lse = tl.load(lse_at + rows, mask=rows < N, other=0.0)
        delta = tl.load(delta_at + rows, mask=rows < N, other=0.0)
        p = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale2 - lse[None, :])
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        ds = p * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _backward_keys(
    start, k_at, v_at, dk_at, dv_at, kv_n, dkv_n, count, limit, q_at, do_at, lse_at, delta_at, q_n, do_n, N,
    factor, scale, scale2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of some keys, times factor; 0 for keys from count to limit."""
    keys = start + tl.arange(0, KEYS)
    k, v = _load(k_at, keys, kv_n, count, D, BLOCK_D), _load(v_at, keys, kv_n, count, D, BLOCK_D)
    dk, dv = tl.zeros([KEYS, BLOCK_D], tl.float32), tl.zeros([KEYS, BLOCK_D], tl.float32)
    end = tl.where(start < count, N, 0)  # padding alone: nothing to add
    full = end // ROWS * ROWS
    dk, dv = _add_dkv(
        k, v, q_at, do_at, lse_at, delta_at, q_n, do_n, N, 0, full, dk, dv, scale2, D, BLOCK_D, ROWS, PRECISION
    )
    dk, dv = _add_dkv(
        k, v, q_at, do_at, lse_at, delta_at, q_n, do_n, N, full, end, dk, dv, scale2, D, BLOCK_D, 16, PRECISION
    )
    valid = (keys < count)[:, None]
    _store(dk_at, keys, dkv_n, limit, tl.where(valid, dk * (factor * scale), 0.0), D, BLOCK_D)
    _store(dv_at, keys, dkv_n, limit, tl.where(valid, dv * factor, 0.0), D, BLOCK_D)


@triton.jit(do_not_specialize=["H", "N", "M"])
def _backward(
    Q, K, V, K_INS, V_INS, GATE, LENGTHS, OUT, LSE, LSE_INS, DOUT, DQ, DK, DV, DK_INS, DV_INS, DGATE, DELTA, DELTA_INS,
    q_b, q_h, kv_b, kv_h, ins_b, ins_h, out_b, out_h, do_b, do_h, dq_b, dq_h, dkv_b, dkv_h, dins_b, dins_h,
    gate_h, lengths_b, H, N, M, scale, scale2,
    q_n: tl.constexpr, kv_n: tl.constexpr, ins_m: tl.constexpr, out_n: tl.constexpr, do_n: tl.constexpr,
    dq_n: tl.constexpr, dkv_n: tl.constexpr, dins_m: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, INS: tl.constexpr, VARLEN: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, KEYS_INS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: first dQ and the deltas of all rows, then dK and dV of all keys, of one (batch, head)."""
    b, h = (tl.program_id(0) // H).to(tl.int64), (tl.program_id(0) % H).to(tl.int64)
    q_at, out_at, do_at = Q + b * q_b + h * q_h, OUT + b * out_b + h * out_h, DOUT + b * do_b + h * do_h
    k_at, v_at = K + b * kv_b + h * kv_h, V + b * kv_b + h * kv_h
    ki_at, vi_at = K_INS + b * ins_b + h * ins_h, V_INS + b * ins_b + h * ins_h
    dq_at, dk_at, dv_at = DQ + b * dq_b + h * dq_h, DK + b * dkv_b + h * dkv_h, DV + b * dkv_b + h * dkv_h
    dki_at, dvi_at = DK_INS + b * dins_b + h * dins_h, DV_INS + b * dins_b + h * dins_h
    row = (b * H + h) * N
    lse_at, lse_ins_at, delta_at, delta_ins_at = LSE + row, LSE_INS + row, DELTA + row, DELTA_INS + row
    gate, length = 0.0, M
    if INS:
        gate = tl.load(GATE + h * gate_h)
        if VARLEN:
            length = tl.minimum(tl.maximum(tl.load(LENGTHS + b * lengths_b).to(tl.int64), 0), M).to(tl.int32)

    dgate = 0.0
    full = N // ROWS * ROWS
    for start in tl.range(0, full, ROWS, disable_licm=True):
        dgate += _backward_rows(
            start, q_at, k_at, v_at, ki_at, vi_at, out_at, do_at, dq_at, lse_at, lse_ins_at, delta_at, delta_ins_at,
            q_n, kv_n, ins_m, out_n, do_n, dq_n, N, length, gate, scale, scale2,
            D, BLOCK_D, INS, ROWS, KEYS, KEYS_INS, PRECISION,
        )  # fmt: skip
    for start in tl.range(full, N, 16, disable_licm=True):
        dgate += _backward_rows(
            start, q_at, k_at, v_at, ki_at, vi_at, out_at, do_at, dq_at, lse_at, lse_ins_at, delta_at, delta_ins_at,
            q_n, kv_n, ins_m, out_n, do_n, dq_n, N, length, gate, scale, scale2,
            D, BLOCK_D, INS, 16, KEYS, KEYS_INS, PRECISION,
        )  # fmt: skip
    tl.debug_barrier()  # what this program's threads stored in delta is read by others of them

    full = N // KEYS * KEYS
    for start in tl.range(0, full, KEYS, disable_licm=True):
        _backward_keys(
            start, k_at, v_at, dk_at, dv_at, kv_n, dkv_n, N, N, q_at, do_at, lse_at, delta_at, q_n, do_n, N,
            1.0, scale, scale2, D, BLOCK_D, ROWS, KEYS, PRECISION,
        )  # fmt: skip
    for start in tl.range(full, N, 16, disable_licm=True):
        _backward_keys(
            start, k_at, v_at, dk_at, dv_at, kv_n, dkv_n, N, N, q_at, do_at, lse_at, delta_at, q_n, do_n, N,
            1.0, scale, scale2, D, BLOCK_D, ROWS, 16, PRECISION,
        )  # fmt: skip
    if INS:
        tl.store(DGATE + b * H + h, dgate)
        full = length // KEYS_INS * KEYS_INS
        for start in tl.range(0, full, KEYS_INS, disable_licm=True):
            _backward_keys(
                start, ki_at, vi_at, dki_at, dvi_at, ins_m, dins_m, length, M, q_at, do_at, lse_ins_at, delta_ins_at,
                q_n, do_n, N, gate, scale, scale2, D, BLOCK_D, ROWS, KEYS_INS, PRECISION,
            )  # fmt: skip
        for start in tl.range(full, M, 16, disable_licm=True):  # beyond length: zeros
            _backward_keys(
                start, ki_at, vi_at, dki_at, dvi_at, ins_m, dins_m, length, M, q_at, do_at, lse_ins_at, delta_ins_at,
                q_n, do_n, N, gate, scale, scale2, D, BLOCK_D, ROWS, 16, PRECISION,
            )  # fmt: skip


class Config(NamedTuple):
    """Tiles of rows, of keys and of instruction keys; warps of a program; stages of its software pipeline."""

    rows: int
    keys: int
    keys_ins: int
    warps: int
    stages: int


_TABLE = {
    ("forward", 2, 32): Config(64, 64, 32, 4, 1),
    ("forward", 2, 64): Config(64, 64, 32, 4, 1),
    ("forward", 2, 128): Config(32, 32, 32, 4, 1),
    ("forward", 4, 32): Config(32, 32, 16, 4, 1),
    ("forward", 4, 64): Config(32, 32, 16, 4, 1),
    ("forward", 4, 128): Config(16, 32, 16, 8, 1),
    ("backward", 2, 32): Config(16, 64, 32, 4, 1),
    ("backward", 2, 64): Config(32, 64, 32, 4, 1),
    ("backward", 2, 128): Config(32, 32, 32, 4, 1),
    ("backward", 4, 32): Config(16, 16, 16, 4, 1),
    ("backward", 4, 64): Config(16, 16, 16, 4, 1),
    ("backward", 4, 128): Config(16, 16, 16, 8, 1),
}
# architecture -> (pass, bytes of an element, D as a power of 2, at least 32) -> Config. Chosen by compiled code
# (bench/tune_attention.py, bench/compile_report.py): no spills, then 12 warps on a multiprocessor where that can be.
CONFIGS: dict[int, dict[tuple[str, int, int], Config]] = {
    80: dict(_TABLE),
    90: dict(_TABLE),
    100: _TABLE | {("forward", 2, 64): Config(64, 32, 32, 4, 1), ("forward", 2, 128): Config(32, 32, 16, 4, 1)},
}


def config_of(arch: int, which: str, itemsize: int, D: int) -> Config:
    """The row of CONFIGS for a compute capability (90 is 9.0): that of the newest architecture that is not newer."""
    table = CONFIGS[max((known for known in CONFIGS if known <= arch), default=min(CONFIGS))]
    return table[which, itemsize, max(32, triton.next_power_of_2(D))]


class _Inputs(NamedTuple):
    """The operator's arguments as [B, H, N or M, D] views. Without an instruction k_ins, v_ins and gate are None."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_ins: Tensor | None
    v_ins: Tensor | None
    gate: Tensor | None
    lengths: Tensor | None
    scale: float


def _unpacked(
    q: Tensor, k: Tensor | None, v: Tensor | None, k_ins: Tensor | None, v_ins: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Five views [B, H, N or M, D] of either public form: without k, q is [B, N, 3, H, D] and k_ins [B, M, 2, H, D]."""
    if k is None or v is None:
        q, k, v = q.permute(2, 0, 3, 1, 4).unbind(0)
        if k_ins is not None:
            k_ins, v_ins = k_ins.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v, k_ins, v_ins


def _options(which: str, x: _Inputs) -> dict[str, Any]:
    """Constexpr arguments and launch options that both kernels take."""
    D = x.q.shape[-1]
    if D > 128 or x.q.dtype == torch.float64:
        raise ValueError(f"q: expected D up to 128 and at most 32 bits on a GPU, got {D}, {x.q.dtype}")
    if x.q.is_cuda:
        major, minor = torch.cuda.get_device_capability(x.q.device)
        config = config_of(10 * major + minor, which, x.q.dtype.itemsize, D)
    else:  # in the interpreter: the tiles that training uses
        config = config_of(90, which, 2, D)
    return {
        "D": D,
        "BLOCK_D": max(16, triton.next_power_of_2(D)),
        "INS": x.k_ins is not None,
        "VARLEN": x.lengths is not None,
        "ROWS": config.rows,
        "KEYS": config.keys,
        "KEYS_INS": config.keys_ins,
        "PRECISION": "tf32" if x.q.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
        "num_warps": config.warps,
        "num_stages": config.stages,
    }


def _fit(*tensors: Tensor) -> list[Tensor]:
    """Tensors that share their strides, 1 over D, and whose (batch, head) spans less than 2**31 elements: the kernels
    take one set of strides for keys and values, and count in 64 bits up to a (batch, head) but in 32 bits inside."""
    strides = {t.stride() for t in tensors}
    rows, D, (*_, step, unit) = *tensors[0].shape[2:], tensors[0].stride()
    if len(strides) == 1 and unit == 1 and rows * step + D < 2**31:
        return list(tensors)
    return [t.contiguous() for t in tensors]


def _arguments(x: _Inputs) -> tuple[list[Any], list[int], dict[str, int]]:
    """Tensors (unused ones stood in for by q), strides over batch and heads, strides over tokens."""
    (q,), (k, v) = _fit(x.q), _fit(x.k, x.v)
    k_ins, v_ins = (q, q) if x.k_ins is None or x.v_ins is None else _fit(x.k_ins, x.v_ins)
    gate, lengths = q if x.gate is None else x.gate, q if x.lengths is None else x.lengths
    strides = [*q.stride()[:2], *k.stride()[:2], *k_ins.stride()[:2]]
    return [q, k, v, k_ins, v_ins, gate, lengths], strides, _steps(q_n=q, kv_n=k, ins_m=k_ins)


def _steps(**tensors: Tensor) -> dict[str, int]:
    return {name: tensor.stride(2) for name, tensor in tensors.items()}


def _sizes(x: _Inputs) -> list[int]:
    """Steps along gate and lengths; H, N, M."""
    gate_h = 0 if x.gate is None or len(x.gate) == 1 else x.gate.stride(0)
    lengths_b = 0 if x.lengths is None else x.lengths.stride(0)
    return [gate_h, lengths_b, *x.q.shape[1:3], 0 if x.k_ins is None else x.k_ins.shape[2]]


def _sums(x: _Inputs) -> tuple[int, int, int, int]:
    B, H, N, _ = x.q.shape
    return 1 if x.k_ins is None else 2, B, H, N


def _gpu_forward(x: _Inputs, out: Tensor) -> Tensor:
    """Fills out [B, H, N, D]. Returns log2 of each row's sums of exponentials, over the image and, with one, over
    the instruction: [1 or 2, B, H, N]."""
    B, H, _, _ = x.q.shape
    lse = x.q.new_empty(_sums(x), dtype=torch.float32)
    if out.numel():
        tensors, strides, steps = _arguments(x)
        with device_of(x.q):
            _forward[(B * H,)](
                *tensors, out, lse[0], lse[-1], *strides, *out.stride()[:2], *_sizes(x), x.scale * LOG2_E,
                **steps, **_steps(out_n=out), **_options("forward", x),
            )  # fmt: skip
    return lse


def _gpu_backward(x: _Inputs, dout: Tensor, out: Tensor, lse: Tensor, grads: list[Tensor]) -> Tensor:
    """Fills grads, views [B, H, N or M, D] of dq, dk, dv and dk_ins, dv_ins. Returns dgate [B, H]."""
    B, H, _, _ = x.q.shape
    dgate = x.q.new_zeros(B, H, dtype=torch.float32)
    if out.numel():
        tensors, strides, steps = _arguments(x)
        (dout,), delta = _fit(dout), torch.empty_like(lse)
        dq, dk, dv, dk_ins, dv_ins = grads if len(grads) == 5 else [*grads, grads[0], grads[0]]
        strides += [n for t in (out, dout, dq, dk, dk_ins) for n in t.stride()[:2]]
        steps |= _steps(out_n=out, do_n=dout, dq_n=dq, dkv_n=dk, dins_m=dk_ins)
        with device_of(x.q):
            _backward[(B * H,)](
                *tensors, out, lse[0], lse[-1], dout, dq, dk, dv, dk_ins, dv_ins, dgate, delta[0], delta[-1],
                *strides, *_sizes(x), x.scale, x.scale * LOG2_E, **steps, **_options("backward", x),
            )  # fmt: skip
    else:
        for grad in grads:
            grad.zero_()  # B, H or N is 0: nothing asks
    return dgate


# N M H D of one sample above which a call of its own, without its padding, is faster than a share of a masked call
OWN_CALL = 1 << 21


class _Run(NamedTuple):
    """Consecutive samples whose instructions one call of torch's attention takes: the first `tokens` of each; bias:
    what the scores get added, -inf for padding."""

    samples: slice
    tokens: int
    bias: Tensor | None


def _for_cpu(q, k, v, k_ins, v_ins, gate, lengths, scale: float) -> tuple[_Inputs, list[_Run]]:
    """The arguments, and the calls for the second term. Padding may hold anything: a call of its own does not read it,
    in a masked call 0 stands for it unless it is harmless. ValueError for lengths outside 0..M."""
    five = (t if t is None or t.stride(-1) == 1 else t.contiguous() for t in _unpacked(q, k, v, k_ins, v_ins))
    q, k, v, k_ins, v_ins = five
    x = _Inputs(q, k, v, k_ins, v_ins, gate, lengths, scale)
    if x.k_ins is None or x.v_ins is None:
        return x, []
    B, H, N, D = x.q.shape
    M = x.k_ins.shape[2]
    if lengths is None or not B:
        return x, [_Run(slice(0, B), M, None)]
    counts = lengths.tolist()
    if min(counts) < 0 or max(counts) > M:
        raise ValueError(f"ins_lengths: expected values in 0..{M}, got {min(counts)}..{max(counts)}")
    starts = [i for i in range(B) if not i or counts[i] != counts[i - 1]]
    if len(starts) == 1 or N * M * H * D > OWN_CALL:
        ends = [*starts[1:], B]
        return x, [_Run(slice(i, j), counts[i], None) for i, j in zip(starts, ends, strict=True)]
    padding_BM = torch.arange(M) >= lengths[:, None]
    if not (_harmless(x.k_ins) and _harmless(x.v_ins)):
        x = x._replace(**{at: getattr(x, at).masked_fill(padding_BM[:, None, :, None], 0) for at in ("k_ins", "v_ins")})
    bias_BM = x.q.new_zeros(B, M).masked_fill_(padding_BM, float("-inf"))
    return x, [_Run(slice(0, B), M, bias_BM[:, None, None].expand(-1, 1, N, -1))]


def _harmless(tensor: Tensor) -> bool:
    """No NaN, nothing infinite and nothing that a product with a query could make so."""
    low, high = torch.aminmax(tensor)
    return low.item() > -1e18 and high.item() < 1e18


def _kept_on_cpu(x: _Inputs) -> list[Tensor]:
    """Tensors like those that torch's attention returns for each term: its result and the logarithms of its sums."""
    B, H, N, D = x.q.shape
    sums = torch.promote_types(x.q.dtype, torch.float32)
    like = [((B, N, H, D), x.q.dtype), ((B, N, H), sums)] * (1 if x.k_ins is None else 2)
    return [x.q.new_empty(shape, dtype=dtype).transpose(1, 2) for shape, dtype in like]


def _on_cpu(q, k, v, k_ins, v_ins, gate, lengths, scale: float) -> tuple[Tensor, ...]:
    """As `_on_gpu`, by torch's attention for CPUs, for each term apart; kept: see `_kept_on_cpu`."""
    x, runs = _for_cpu(q, k, v, k_ins, v_ins, gate, lengths, scale)
    out = x.q.new_empty(_bnhd(x.q))
    if not out.numel():
        return out, *_four(x, _kept_on_cpu(x))
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    first, lse = attend(x.q, x.k, x.v, scale=scale)
    if x.gate is None:
        out.transpose(1, 2).copy_(first)
        return out, *_four(x, [first, lse])
    if len(runs) == 1 and runs[0].tokens:
        second, lse_ins = attend(x.q, *_instructions(x, runs[0]), attn_mask=runs[0].bias, scale=scale)
    else:
        second, lse_ins = _kept_on_cpu(x)[2:]
        for run in runs:
            if run.tokens:
                found = attend(x.q[run.samples], *_instructions(x, run), scale=scale)
                second[run.samples], lse_ins[run.samples] = found
            else:
                second[run.samples], lse_ins[run.samples] = 0, 0
    torch.addcmul(first, x.gate.view(-1, 1, 1), second, out=out.transpose(1, 2))
    return out, first, lse, second, lse_ins


def _instructions(x: _Inputs, run: _Run) -> tuple[Tensor, Tensor]:
    """K', V' that a call sees."""
    assert x.k_ins is not None
    assert x.v_ins is not None
    return x.k_ins[run.samples, :, : run.tokens], x.v_ins[run.samples, :, : run.tokens]


def _on_cpu_backward(dout, out, a, b, c, d, q, k, v, k_ins, v_ins, gate, lengths, scale: float) -> tuple[Tensor, ...]:
    """As `_on_gpu_backward`; a, b, c, d: what `_on_cpu` kept."""
    x, runs = _for_cpu(q, k, v, k_ins, v_ins, gate, lengths, scale)
    grads, (dq, dk, dv, dk_ins, dv_ins) = _gradients(q, k, v, k_ins, v_ins, gate)
    if not out.numel():
        return tuple(t.zero_() for t in grads)
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    dout = dout.transpose(1, 2)
    dq_first, dk_first, dv_first = attend(dout, x.q, x.k, x.v, a, b, 0.0, False, scale=scale)
    dk.copy_(dk_first)
    dv.copy_(dv_first)
    if x.gate is None:
        dq.copy_(dq_first)
        return tuple(grads)
    gated = (dout * x.gate.view(-1, 1, 1)).to(dout.dtype)
    for run in runs:
        at, n = run.samples, run.tokens
        if n:
            given = gated[at], x.q[at], *_instructions(x, run), c[at], d[at]
            dq_second, dk_ins[at, :, :n], dv_ins[at, :, :n] = attend(
                *given, 0.0, False, attn_mask=run.bias, scale=scale
            )
            torch.add(dq_first[at], dq_second, out=dq[at])
        else:
            dq[at] = dq_first[at]
        for grad in (dk_ins, dv_ins):
            grad[at, :, n:] = 0
    sums = torch.promote_types(dout.dtype, torch.float32)
    dgate_H = (dout.to(sums) * c.to(sums)).sum(3).double().sum((0, 2)).float()  # many parts that cancel
    return *grads[:5], dgate_H if len(x.gate) > 1 else dgate_H.sum().view(1)


def _bnhd(q: Tensor) -> tuple[int, int, int, int]:
    B, H, N, D = q.shape
    return B, N, H, D


def _four(x: _Inputs, kept: list[Tensor]) -> list[Tensor]:
    """An operator returns a fixed number of tensors: empty ones for the rest."""
    return kept + [x.q.new_empty(0) for _ in range(4 - len(kept))]


def _gradients(q, k, v, k_ins, v_ins, gate) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Gradients to be filled of the first six arguments, empty where there is none, and the views of the first five."""
    given = (q, k, v, k_ins, v_ins, gate)
    grads = [q.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in given]
    arguments = (None if t is None else grad for t, grad in zip(given[:5], grads[:5], strict=True))
    return grads, _unpacked(*arguments)  # type: ignore[arg-type, return-value]


def _on_gpu(q, k, v, k_ins, v_ins, gate, lengths, scale: float) -> tuple[Tensor, ...]:
    """out [B, N, H, D] and four tensors that the backward needs beside; here the first alone: lse."""
    x = _Inputs(*_unpacked(q, k, v, k_ins, v_ins), gate, lengths, scale)
    out = x.q.new_empty(_bnhd(x.q))
    return out, *_four(x, [_gpu_forward(x, out.transpose(1, 2))])


def _on_gpu_backward(dout, out, a, b, c, d, q, k, v, k_ins, v_ins, gate, lengths, scale: float) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, k_ins, v_ins and gate in their shapes; empty for what was not given."""
    x = _Inputs(*_unpacked(q, k, v, k_ins, v_ins), gate, lengths, scale)
    grads, views = _gradients(q, k, v, k_ins, v_ins, gate)
    dgate_BH = _gpu_backward(x, dout.transpose(1, 2), out.transpose(1, 2), a, [t for t in views if t is not None])
    if x.gate is None:
        return tuple(grads)
    return *grads[:5], dgate_BH.sum(0) if len(x.gate) > 1 else dgate_BH.sum().view(1)


# Without k and v, q and k_ins are packed. Plain definitions: torch.library.custom_op costs 0.2 ms a call more.
_LIBRARY = torch.library.Library("kernels", "FRAGMENT")
_ARGUMENTS = "Tensor q, Tensor? k, Tensor? v, Tensor? k_ins, Tensor? v_ins, Tensor? gate, Tensor? lengths, float scale"
_LIBRARY.define(
    f"gated_attention({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)", tags=torch.Tag.pt2_compliant_tag
)
_LIBRARY.define(
    f"gated_attention_backward(Tensor dout, Tensor out, Tensor a, Tensor b, Tensor c, Tensor d, {_ARGUMENTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_LIBRARY.impl("gated_attention", _on_gpu, "CUDA")
_LIBRARY.impl("gated_attention_backward", _on_gpu_backward, "CUDA")
_LIBRARY.impl("gated_attention", _on_gpu if INTERPRETED else _on_cpu, "CPU")
_LIBRARY.impl("gated_attention_backward", _on_gpu_backward if INTERPRETED else _on_cpu_backward, "CPU")
_op = torch.ops.kernels.gated_attention.default
_op_backward = torch.ops.kernels.gated_attention_backward.default


@torch.library.register_fake("kernels::gated_attention", lib=_LIBRARY)
def _(q, k, v, k_ins, v_ins, gate, lengths, scale):
    x = _Inputs(*_unpacked(q, k, v, k_ins, v_ins), gate, lengths, scale)
    out = x.q.new_empty(_bnhd(x.q))
    if x.q.device.type == "cpu" and not INTERPRETED:
        return out, *_four(x, _kept_on_cpu(x))
    return out, *_four(x, [x.q.new_empty(_sums(x), dtype=torch.float32)])


@torch.library.register_fake("kernels::gated_attention_backward", lib=_LIBRARY)
def _(dout, out, a, b, c, d, q, k, v, k_ins, v_ins, gate, lengths, scale):
    return tuple(_gradients(q, k, v, k_ins, v_ins, gate)[0])


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.scale = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *tensors)


def _differentiate(ctx, dout, *_):
    saved = ctx.saved_tensors  # once: with activation checkpointing it is computed anew
    grads = _op_backward(dout, *saved, ctx.scale)
    return *(None if t is None else grad for t, grad in zip(saved[5:11], grads, strict=True)), None, None


def _refuse(ctx, *_):
    raise NotImplementedError("gated_attention has no second derivative; gated_attention_reference has")


torch.library.register_autograd("kernels::gated_attention", _differentiate, setup_context=_save, lib=_LIBRARY)
torch.library.register_autograd("kernels::gated_attention_backward", _refuse, lib=_LIBRARY)


def _autocast(q: Tensor, *tensors: Tensor | None) -> tuple[Any, ...]:
    """Under autocast all in its type, but for float64, as torch's own operators."""
    device = q.device.type
    # not torch.amp.is_autocast_available, which torch.compile could not trace until torch 2.12
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return q, *tensors
    dtype = torch.get_autocast_dtype(device)
    low = (torch.float32, torch.float16, torch.bfloat16)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype in low else t for t in (q, *tensors))


def _call(q, k, v, k_ins, v_ins, gate, lengths, scale: float | None, tokens: int) -> Tensor:
    """[B, N, H, D] of arguments that are valid; tokens: how many the instruction has."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not tokens:
        return _op(q, k, v, None, None, None, None, scale)[0]
    return _op(q, k, v, k_ins, v_ins, gate.float(), lengths, scale)[0]


def gated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_ins: Tensor | None = None,
    v_ins: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    ins_lengths: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Gated dual-softmax attention, differentiable in its six tensors, once.

    q, k, v       [B, H, N, D], one floating dtype; on a GPU D up to 128 and at most 32 bits
    k_ins, v_ins  [B, H, M, D] or None (plain attention); stride 0 over B is fine: one instruction for the whole batch
    gate          [H] or [1], any floating dtype, used in float32; required with k_ins
    ins_lengths   [B] integer, valid instruction tokens of each sample, 0..M; None = all M
    scale         default D ** -0.5

    Returns [B, H, N, D] in q's dtype (under autocast: in its). float32 is multiplied as float32 unless
    torch.backends.cuda.matmul.fp32_precision is "tf32". Gradients of q and k carry the rounding of `out`, so a gate far
    above 1 costs them precision. ValueError for shapes, dtypes or devices that do not fit; on a GPU, which would have
    to wait for them, the values of ins_lengths are not looked at but taken as the nearest in 0..M.
    """
    q, k, v, k_ins, v_ins = _autocast(q, k, v, k_ins, v_ins)
    _check_arguments(q, k, v, k_ins, v_ins, gate, ins_lengths)
    tokens = 0 if k_ins is None else k_ins.shape[2]
    return _call(q, k, v, k_ins, v_ins, gate, ins_lengths, scale, tokens).transpose(1, 2)


def gated_attention_packed(
    qkv: Tensor,
    kv_ins: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    ins_lengths: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`gated_attention` on the layout that linear layers produce: no transposes, packed gradients.

    qkv     [B, N, 3, H, D]
    kv_ins  [B, M, 2, H, D] or None; stride 0 over B is fine

    Returns [B, N, H, D]. Other arguments and errors as `gated_attention`.
    """
    qkv, kv_ins = _autocast(qkv, kv_ins)
    _check.shape("qkv", qkv, (None, None, 3, None, None), "[B, N, 3, H, D]")
    if kv_ins is not None:
        _check.shape("kv_ins", kv_ins, (len(qkv), None, 2, *qkv.shape[3:]), "[B, M, 2, H, D]")
    _check_arguments(*_unpacked(qkv, None, None, kv_ins, None), gate, ins_lengths)
    tokens = 0 if kv_ins is None else kv_ins.shape[1]
    return _call(qkv, None, None, kv_ins, None, gate, ins_lengths, scale, tokens)


def _check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_ins: Tensor | None,
    v_ins: Tensor | None,
    gate: Tensor | None,
    ins_lengths: Tensor | None,
) -> None:
    _check.shape("q", q, (None, None, None, None), "[B, H, N, D]")
    _check.dtype("q", q, DTYPES)
    B, H, N, D = q.shape
    pairs: list[tuple[str, Tensor | None]] = [("k", k), ("v", v), ("k_ins", k_ins), ("v_ins", v_ins)]
    for name, tensor in pairs:
        if tensor is None:
            continue
        if name in ("k", "v"):
            _check.shape(name, tensor, (B, H, N, D), "[B, H, N, D]")
        else:
            _check.shape(name, tensor, (B, H, None, D), "[B, H, M, D]")
        _check.dtype(name, tensor, (q.dtype,))
        _check.same_device(name, tensor, "q", q)
    if (k_ins is None) != (v_ins is None):
        raise ValueError("k_ins, v_ins: expected both or neither")
    if k_ins is None or v_ins is None:
        return
    if k_ins.shape != v_ins.shape:
        raise ValueError(f"v_ins: expected the shape of k_ins {tuple(k_ins.shape)}, got {tuple(v_ins.shape)}")
    if gate is None:
        raise ValueError("gate: expected [H] or [1] with k_ins, got None")
    if gate.dim() != 1 or gate.shape[0] not in (1, H) or not gate.is_floating_point():
        raise ValueError(f"gate: expected floating [{H}] or [1], got {gate.dtype} {tuple(gate.shape)}")
    _check.same_device("gate", gate, "q", q)
    if ins_lengths is not None:
        _check.integers("ins_lengths", ins_lengths, B)
        _check.same_device("ins_lengths", ins_lengths, "q", q)
