"""Gated dual-softmax attention: attention over the image plus a gated second softmax over the instruction.

    out = softmax(Q K^T * scale) V + g * softmax(Q K'^T * scale) V'            (Instruct-ReID, Eq. 2-4, before Linear_o)

Shapes: B batch, H heads, N image tokens, M instruction tokens, D head dimension; g is one number per head or per layer.
At g = 0 this is plain attention, and dg != 0, so the gate can open. A sample without instruction tokens (length 0)
has a second term of exactly 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import _check

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


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
    """Gated dual-softmax attention, differentiable in its six tensors.

    q, k, v       [B, H, N, D], one floating dtype
    k_ins, v_ins  [B, H, M, D] or None (plain attention); stride 0 over B is fine: one instruction for the whole batch
    gate          [H] or [1], any floating dtype, used in float32; required with k_ins
    ins_lengths   [B] integer, valid instruction tokens of each sample, 0..M; None = all M
    scale         default D ** -0.5

    Returns [B, H, N, D] in q's dtype. ValueError for shapes, dtypes or devices that do not fit.
    """
    _check_arguments(q, k, v, k_ins, v_ins, gate, ins_lengths)
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    if k_ins is None or v_ins is None or gate is None or k_ins.shape[2] == 0:
        return out
    if ins_lengths is None:
        second = F.scaled_dot_product_attention(q, k_ins, v_ins, scale=scale)
    else:
        valid_BM = torch.arange(k_ins.shape[2], device=q.device) < ins_lengths[:, None]
        padding_BHMD = ~valid_BM[:, None, :, None]
        some_B = (ins_lengths > 0)[:, None, None, None]
        # A row whose keys are all masked is NaN in some backends; let it see its (zeroed) keys and drop its result.
        mask_BHNM = (valid_BM | ~some_B[:, 0, 0]).view(len(q), 1, 1, -1)
        second = F.scaled_dot_product_attention(
            q, k_ins.masked_fill(padding_BHMD, 0), v_ins.masked_fill(padding_BHMD, 0), attn_mask=mask_BHNM, scale=scale
        ).masked_fill(~some_B, 0)
    return out + (gate.float().view(1, -1, 1, 1) * second).to(out.dtype)


def gated_attention_packed(
    qkv: Tensor,
    kv_ins: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    ins_lengths: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`gated_attention` on the layout that linear layers produce: no transposes in memory.

    qkv     [B, N, 3, H, D]
    kv_ins  [B, M, 2, H, D] or None; stride 0 over B is fine

    Returns [B, N, H, D]. Other arguments and errors as `gated_attention`.
    """
    _check.shape("qkv", qkv, (None, None, 3, None, None), "[B, N, 3, H, D]")
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    k_ins = v_ins = None
    if kv_ins is not None:
        _check.shape("kv_ins", kv_ins, (len(qkv), None, 2, *qkv.shape[3:]), "[B, M, 2, H, D]")
        k_ins, v_ins = kv_ins.permute(2, 0, 3, 1, 4).unbind(0)
    return gated_attention(q, k, v, k_ins, v_ins, gate, ins_lengths=ins_lengths, scale=scale).transpose(1, 2)


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
    B, H, _, D = q.shape
    pairs: list[tuple[str, Tensor | None]] = [("k", k), ("v", v), ("k_ins", k_ins), ("v_ins", v_ins)]
    for name, tensor in pairs:
        if tensor is None:
            continue
        _check.shape(name, tensor, (B, H, None, D), "[B, H, tokens, D]")
        _check.dtype(name, tensor, (q.dtype,))
        _check.same_device(name, tensor, "q", q)
    if k.shape != v.shape:
        raise ValueError(f"v: expected the shape of k {tuple(k.shape)}, got {tuple(v.shape)}")
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
    if ins_lengths is not None:
        _check.lengths("ins_lengths", ins_lengths, B, k_ins.shape[2])
