"""How far a product can be from the canonical score of its pair:

    |s a P + b + c  -  score| <= x e + y f + h

P is the product; a, b, e, f belong to the gallery row, s, c, x, y, h to the query. Proof, with u = 2^-24, D features,
norms n of the query and m of the row, gamma = D u / (1 - D u):

float32   A sum of D products in float32, in any order, fused or not, errs by gamma Σ|q_i g_i| <= gamma n m (Higham,
          Accuracy and Stability of Numerical Algorithms, 2002, §3.1; Cauchy-Schwarz). Rounding a, s, b, c, what the
          filter adds, and the score itself to float32 errs by at most 5 u each of n m (inner product), 1 (cosine: all
          is divided by n m), (n + m)² (squared distance, whose negative is 2 P - m² - n²; n m twice is (n + m)² / 2 at
          most). C = 1.02 (gamma + 16 u) covers them, and the float32 arithmetic of the error itself; so the error is
          C n m, C or C (n + m)² = C n² + 2 C n m + C m².
codes     q = s_q q' + δ, g = s_g g' + ε, with q', g' in int8 or bfloat16 and the residuals' norms |δ|, |ε| computed.
          q·g - s_q s_g q'·g' = δ·g + s_q q'·ε <= |δ| m + |s_q q'| |ε|. An integer product is exact, so 16 u n m are
          added as above; bfloat16's is summed in float32, for which 4 C n m are added (tensor cores may cut off where
          others round). Inner product and cosine only.
int16     As codes, with s = norm / 32767. A value times the rounded 1 / s errs by 2 u of 32767 at most, so the nearest
          whole number by 0.505: the residuals' norms are at most r = 0.505 √D / 32767 of the norms, without being
          computed. No code is beyond 32767, and no sum of products, nor a part of one, beyond |q'| |g'| <=
          (32767 + 0.505 √D)² < 2^31.
float16   As codes, with s the power of two that brings the norm to 2^14 .. 2^15: no code is beyond what float16 holds,
          no sum of products beyond 2^30, and dividing by s is exact. Rounding errs by 2^-11 of a value, or by 2^-25
          below 2^-14, so the residuals' norms are at most (2^-11 + 2^-39 √D) norm <= r norm, r = 0.501 2^-10. Summed
          in float32, as bfloat16's products.
leading   (R q)·(R g) instead of q·g, R [L, D] with a greatest singular value of at most 1: then I - RᵀR is positive
          semidefinite, so by Cauchy-Schwarz |q·g - (R q)·(R g)| = |qᵀ (I - RᵀR) g| <= ρ_q ρ_g with ρ_q² =
          qᵀ (I - RᵀR) q = n² - |R q|². Computed in float64, ρ² errs by less than 1e-8 n² below 2^16 features. Rounding
          R q and R g to float32 errs by 1.01 u n m each; and they, no longer than q and g, may be multiplied in
          float32, int16 or float16, with the scales of the whole rows. Inner product and cosine only.

Numbers that underflow err by 2^-126 instead of u: harmless where 1e-12 <= n, m <= 1e18, for then D 2^-126 (n + m + 1)
is far below 16 u n m. Outside of that (but for zero rows, whose products are exactly 0) nothing is promised: e or x is
infinite, and such rows are always scored canonically.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

U = 2.0**-24
LOWEST, HIGHEST = 1e-12, 1e18  # norms between which the bounds hold
MOST_FEATURES = 1 << 16  # codes: their products fit int32; float32: gamma stays small
CODED, CODED_INT16 = 127, 32767  # greatest int8 and int16 code
CODES = {"int8": torch.int8, "bfloat16": torch.bfloat16}


class Codes(NamedTuple):
    """Rows in few bits times a scale: values [n, D] int8 or bfloat16, scale [n] float32, norm [n] of scale · values and
    residual [n], the norm of what that leaves, float64. slack: how far a product of values, times the scales, can be
    from the exact one, in parts of n m."""

    values: Tensor
    scale: Tensor
    norm: Tensor
    residual: Tensor
    slack: float


class Short(NamedTuple):
    """Rows of which less is multiplied. scale [n] float64: 1, or that of int16 or float16. left [n] float64: ρ, what
    the leading directions leave out, or 0. error: how far the product of two can be from theirs, beside ρ ρ, in parts
    of n m."""

    scale: Tensor
    left: Tensor
    error: float


def encode(rows: Tensor, dtype: torch.dtype) -> Codes:
    """Rows [n, D] as int8 with a scale each or as bfloat16, and what is lost."""
    parts = []
    for part in rows.split(8192):
        part = part.float()
        scale = torch.ones_like(part[:, 0])
        values = part
        if dtype == torch.int8:
            scale = part.abs().amax(1).clamp(min=1e-30) / CODED
            values = (part / scale[:, None]).round().clamp(-CODED, CODED)
        values = values.to(dtype)
        coded = values.double() * scale.double()[:, None]
        parts.append((values, scale, coded.norm(dim=1), (part.double() - coded).norm(dim=1)))
    codes, scale, norm, residual = (torch.cat(column) for column in zip(*parts, strict=True))
    return Codes(codes, scale, norm, residual, _slack(rows.shape[1], dtype))


def scales(norms: Tensor, dtype: torch.dtype) -> Tensor:
    """[n] float64, as float32 holds it: what a row's codes are multiplied with, norms [n] float64. What is wild has 0,
    as its codes; float32 has 1."""
    kept = torch.where(_unless_wild(norms, norms).isfinite(), norms, 0)
    if dtype == torch.float32:
        return torch.ones_like(norms)
    if dtype == torch.int16:
        return (kept / CODED_INT16).float().double()
    mantissa, _ = torch.frexp(kept)  # 0.5 .. 1
    return _over(kept, mantissa) * 2.0**-15


def product_error(D: int, dtype: torch.dtype) -> float:
    """How far a product of two rows of D features, in this type, can be from the exact one, in parts of n m."""
    if dtype == torch.float32:
        return _constant(D)
    residual = 0.505 * D**0.5 / CODED_INT16 if dtype == torch.int16 else 0.501 * 2.0**-10
    return 2.02 * residual + 1.1 * _slack(D, dtype)


def left_out(norms: Tensor, leading: Tensor) -> Tensor:
    """ρ [n] float64 of rows with these norms [n] float64, by their part R q [n, L] float64."""
    squares = norms * norms
    return ((squares - (leading * leading).sum(1)).clamp(min=0) + 1e-8 * squares).sqrt()


def _slack(D: int, dtype: torch.dtype) -> float:
    return 16 * U if dtype in (torch.int8, torch.int16) else 4 * _constant(D)


def gallery_bounds(norms: Tensor, D: int, metric: str, codes: Codes | Short | None) -> tuple[Tensor, ...]:
    """a, b, e, f [G] float32. norms: [G] float64. Short: metric "cosine" or "ip"."""
    m, zero, C = norms, torch.zeros_like(norms), _constant(D)
    one = torch.ones_like(norms)
    if codes is not None:
        rest = codes.left if isinstance(codes, Short) else codes.residual
        scale, rest = codes.scale.double(), 1.001 * rest
        a, b, e, f = (scale, zero, m, rest) if metric == "ip" else (_over(scale, m), zero, one, _over(rest, m))
    elif metric == "ip":
        a, b, e, f = one, zero, C * m, zero
    elif metric == "cosine":
        a, b, e, f = _over(one, m), zero, zero, zero
    else:
        a, b, e, f = 2 * one, -m * m, 2 * C * m, C * m * m
    return tuple(part.float().contiguous() for part in (a, b, _unless_wild(e, m), f))


def query_bounds(norms: Tensor, D: int, metric: str, codes: Codes | Short | None) -> Tensor:
    """s, c, x, y, h as [Q, 5] float32. norms: [Q] float64. Short: metric "cosine" or "ip"."""
    n, zero, one, C = norms, torch.zeros_like(norms), torch.ones_like(norms), _constant(D)
    if isinstance(codes, Short):
        s, c, x, y, h = codes.scale, zero, codes.error * n, 1.001 * codes.left, zero
        if metric == "cosine":
            s, x, y = _over(s, n), codes.error * one, _over(y, n)
    elif codes is not None:
        scale, residual = codes.scale.double(), 1.001 * codes.residual
        slack = 1.1 * codes.slack * one
        s, c, x, y, h = scale, zero, residual + slack * n, 1.001 * codes.norm, zero
        if metric == "cosine":
            s, x, y, h = _over(s, n), _over(residual, n), _over(y, n), slack
    elif metric == "ip":
        s, c, x, y, h = one, zero, n, zero, zero
    elif metric == "cosine":
        s, c, x, y, h = _over(one, n), zero, one, zero, C * one
    else:
        s, c, x, y, h = one, -n * n, n, one, C * n * n
    return torch.stack([s, c, _unless_wild(x, n), y, h], 1).float().contiguous()


def _constant(D: int) -> float:
    return 1.02 * (D * U / (1 - D * U) + 16 * U) if D < MOST_FEATURES else float("inf")


def _over(value: Tensor, norm: Tensor) -> Tensor:
    return torch.where(norm > 0, value / norm, 0)


def _unless_wild(value: Tensor, norm: Tensor) -> Tensor:
    return torch.where((norm > 0) & ((norm < LOWEST) | (norm > HIGHEST)), torch.inf, value)
