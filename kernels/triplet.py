"""Adaptive triplet loss: a triplet's margin follows the similarity of the instructions.

    L = 1/N_tri * sum { sgn(b1 - b2) [d(a, r1) + (b1 - b2) m - d(a, r2)] }_+        (Instruct-ReID, Eq. 5)
    b_j = [y_a = y_rj] cos<T_a, T_rj>                                                (Eq. 6)

over anchors a and unordered pairs r1, r2 of two other samples. Written with u_r = d(a, r) + m b_r, a triplet with
b_i > b_j costs {u_i - u_j}_+. Shapes: N samples, D features, E instruction features, S feature sets.

Readings that Eq. 5 leaves open, each an option of `adaptive_triplet`:
mining               "all": every triplet, squared distance. "hard": per anchor the two farthest same-identity
                     samples and the nearest other one, plain distance, as the authors' released code trains
tie                  pairs with |b1 - b2| <= tie do not count: fixed sentences sit exactly on such ties
negative_similarity  "clamp": b >= 0, so a same-identity reference never ranks behind another identity; "raw": it may
reduction            "mean" divides by the counted triplets, "active" by those with a positive term
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import _check


def adaptive_triplet_reference(
    features: Tensor,
    labels: Tensor,
    instructions: Tensor,
    *,
    margin: float = 0.3,
    distance: str = "squared",
    negative_similarity: str = "clamp",
    reduction: str = "mean",
    tie: float = 1e-3,
) -> Tensor:
    """Eq. 5 with every triplet in memory, N x N x N: features [N, D] -> scalar."""
    d, beta = _distances(features, distance), _relatedness(labels, instructions, negative_similarity)
    u = d + margin * beta
    other = ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    counted_aij = (beta[:, :, None] - beta[:, None, :] > tie) & other[:, :, None] & other[:, None, :]
    terms_aij = F.relu(u[:, :, None] - u[:, None, :]).masked_fill(~counted_aij, 0)
    count = counted_aij.sum() if reduction == "mean" else (terms_aij > 0).sum()
    return terms_aij.sum() / count.clamp(min=1)


def adaptive_triplet(
    features: Tensor,
    labels: Tensor,
    instructions: Tensor,
    *,
    margin: float = 0.3,
    mining: str = "all",
    distance: str | None = None,
    negative_similarity: str = "clamp",
    reduction: str = "mean",
    tie: float = 1e-3,
    rows: tuple[int, int] | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Adaptive triplet loss of one batch.

    features             [N, D] -> scalar, or [S, N, D] -> [S]; floating
    labels               [N] int64, identities
    instructions         [N, E], one vector per sample; no gradient flows to it
    margin               m of Eq. 5, in units of the distance
    mining               "all" or "hard"
    distance             "squared" or "euclidean"; None: "squared" for "all", "euclidean" for "hard"
    negative_similarity  "clamp" or "raw"
    reduction            "mean" or "active"
    tie                  dead band of |b1 - b2|
    rows                 (start, stop): only these anchors' terms, normalised as the whole batch
    return_stats         also {"counted", "active"}: numbers of triplets, int64 (per feature set)

    A lone anchor contributes 0; equal features have distance 0 and gradient 0; cos with a zero vector is 0; an empty
    batch gives 0. ValueError for shapes, dtypes, devices or options that do not fit.
    """
    _check.one_of("mining", mining, ("all", "hard"))
    _check.one_of("distance", distance, (None, "squared", "euclidean"))
    _check.one_of("negative_similarity", negative_similarity, ("clamp", "raw"))
    _check.one_of("reduction", reduction, ("mean", "active"))
    if features.dim() not in (2, 3) or not features.is_floating_point():
        raise ValueError(
            f"features: expected floating [N, D] or [S, N, D], got {features.dtype} {tuple(features.shape)}"
        )
    N = features.shape[-2]
    _check.shape("labels", labels, (N,), "[N]")
    _check.dtype("labels", labels, (torch.int64,))
    _check.shape("instructions", instructions, (N, None), "[N, E]")
    for name, tensor in (("labels", labels), ("instructions", instructions)):
        _check.same_device(name, tensor, "features", features)
    start, stop = rows or (0, N)
    if not 0 <= start <= stop <= N:
        raise ValueError(f"rows: expected 0 <= start <= stop <= {N}, got {rows}")
    beta = _relatedness(labels, instructions.to(features.dtype), negative_similarity)
    distance = distance or ("squared" if mining == "all" else "euclidean")
    losses, stats = [], []
    for set_ND in features.unbind(0) if features.dim() == 3 else (features,):
        d = _distances(set_ND, distance)
        form = _all_triplets if mining == "all" else _hard_triplets
        loss, counted, active = form(d, beta, labels, margin, tie, reduction, start, stop)
        losses.append(loss)
        stats.append((counted, active))
    loss = torch.stack(losses) if features.dim() == 3 else losses[0]
    if not return_stats:
        return loss
    counted, active = (torch.stack(column) if features.dim() == 3 else column[0] for column in zip(*stats, strict=True))
    return loss, {"counted": counted, "active": active}


def _relatedness(labels: Tensor, instructions: Tensor, negative_similarity: str) -> Tensor:
    """Eq. 6: [N, N], without gradient."""
    t = F.normalize(instructions.detach(), dim=-1)
    beta = (t @ t.mT).masked_fill(labels[:, None] != labels, 0)
    return beta.clamp(min=0) if negative_similarity == "clamp" else beta


def _distances(x_ND: Tensor, distance: str) -> Tensor:
    squares = (x_ND * x_ND).sum(-1)
    d2 = (squares[:, None] + squares - 2 * x_ND @ x_ND.mT).clamp(min=0)
    if distance == "squared":
        return d2
    zero = d2 == 0
    return d2.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)  # gradient 0, not inf, at distance 0


def _all_triplets(
    d: Tensor, beta: Tensor, labels: Tensor, margin: float, tie: float, reduction: str, start: int, stop: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Every triplet in [N, K, N]: with b >= 0 the nearer reference shares the anchor's identity (raw: any sample)."""
    N = len(labels)
    other = ~torch.eye(N, dtype=torch.bool, device=d.device)
    nearer = (labels[:, None] == labels) & other if not bool((beta < 0).any()) else other
    width = int(nearer.sum(1).max()) if N else 0
    if width == 0:
        zero = d.sum() * 0
        return zero, zero.long(), zero.long()
    index_NK = nearer.int().topk(width, dim=1).indices
    present_NK = nearer.gather(1, index_NK)
    u = d + margin * beta
    gap_NKN = beta.gather(1, index_NK)[:, :, None] - beta[:, None, :]
    counted = (gap_NKN > tie) & present_NK[:, :, None] & other[:, None, :]
    terms = F.relu(u.gather(1, index_NK)[:, :, None] - u[:, None, :]).masked_fill(~counted, 0)
    active = (terms > 0).sum()
    count = counted.sum() if reduction == "mean" else active
    return terms[start:stop].sum() / count.clamp(min=1), counted[start:stop].sum(), (terms[start:stop] > 0).sum()


def _hard_triplets(
    d: Tensor, beta: Tensor, labels: Tensor, margin: float, tie: float, reduction: str, start: int, stop: int
) -> tuple[Tensor, Tensor, Tensor]:
    """0.1 {sgn(b1-b2) [d1 - d2 + m (b1-b2)]}_+ + [d1 + m b1 - dn]_+ with p1, p2 the two farthest same-identity
    samples."""
    N = len(labels)
    if N < 2:
        zero = d.sum() * 0
        return zero, zero.long(), zero.long()
    same = labels[:, None] == labels
    positive = same & ~torch.eye(N, dtype=torch.bool, device=d.device)
    farthest = d.detach().masked_fill(~positive, -torch.inf).topk(2, dim=1).indices
    nearest = d.detach().masked_fill(same, torch.inf).argmin(1, keepdim=True)
    some, second, negative = positive.sum(1) > 0, positive.sum(1) > 1, (~same).any(1)
    d1, d2 = d.gather(1, farthest).unbind(1)
    b1, b2 = beta.gather(1, farthest).unbind(1)
    pair = F.relu(torch.sign(b1 - b2) * (d1 - d2 + margin * (b1 - b2))).masked_fill(~second, 0)
    push = F.relu(d1 + margin * b1 - d.gather(1, nearest)[:, 0]).masked_fill(~(some & negative), 0)
    terms = 0.1 * pair + push
    count = N if reduction == "mean" else (terms > 0).sum().clamp(min=1)
    counted = second[start:stop].sum() + (some & negative)[start:stop].sum()
    active = (pair > 0)[start:stop].sum() + (push > 0)[start:stop].sum()
    return terms[start:stop].sum() / count, counted, active
