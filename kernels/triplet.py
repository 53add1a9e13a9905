"""Adaptive triplet loss: a triplet's margin follows the similarity of the instructions.

    L = 1/N_tri * sum { sgn(b1 - b2) [d(a, r1) + (b1 - b2) m - d(a, r2)] }_+        (Instruct-ReID, Eq. 5)
    b_j = [y_a = y_rj] cos<T_a, T_rj>                                                (Eq. 6)

over anchors a and unordered pairs r1, r2 of two other samples. Written with u_r = d(a, r) + m b_r, a triplet with
b_i > b_j costs {u_i - u_j}_+. Shapes: N samples, D features, E instruction features, S feature sets, K the most samples
that share one's identity, R anchors of a block.

Readings that Eq. 5 leaves open, each an option of `adaptive_triplet`, and what follows from it:
mining               "all": every triplet teaches. "hard": per anchor the two farthest same-identity samples and the
                     nearest other one, as the authors' released code trains (its tie is 0); outliers and wrong labels
                     weigh most
distance             "squared": the pull grows with the distance. "euclidean": it does not, but has a kink at 0
tie                  pairs with |b1 - b2| <= tie do not count: fixed sentences sit on such ties, but for the rounding of
                     products, whose sign means nothing
negative_similarity  "clamp": b >= 0, so a same-identity reference never ranks behind another identity; "raw": it may
reduction            "mean" divides by the counted triplets, so the loss fades as they are satisfied; "active" by those
                     with a positive term, so it does not

b differs from 0 within an identity only, so two samples of other identities never make a triplet with each other: an
anchor's references are its K same-identity samples against each other and against the rest. Distances come in blocks of
anchors, one matrix product each; a block is compared with the anchors' K values u while it is in the cache, and turned
into its share of the gradient by a second product. The full matrix never exists: extra memory is O(N K) and a block.
The loss is a sum, so the gradient is made with it and the backward only scales it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels import _check
from kernels._library import INTERPRETED, device_of

BLOCK = {"cpu": 1 << 19, "cuda": 1 << 22}  # distances of a block, which should stay in a cache
GATHERED = 1 << 18  # features of a block of pairs
TILES = {4: (2, 256), 8: (4, 128)}  # anchors of a program of the GPU's kernel, distances at a time; by itemsize
WARPS = 4


def adaptive_triplet_reference(
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
) -> Tensor:
    """Eq. 5 with every triplet in memory, N x N x N ("hard": every distance): features [N, D] -> scalar."""
    t = F.normalize(instructions.detach(), dim=-1)
    same = labels[:, None] == labels
    beta = (t @ t.mT).masked_fill(~same, 0)
    if negative_similarity == "clamp":
        beta = beta.clamp(min=0)
    squares = (features * features).sum(-1)
    d = (squares[:, None] + squares - 2 * features @ features.mT).clamp(min=0)
    if (distance or ("squared" if mining == "all" else "euclidean")) == "euclidean":
        zero = d == 0
        d = d.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)  # gradient 0, not inf, at distance 0
    other = ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    if mining == "hard":
        return _hard_reference(d, beta, same, other, margin, reduction, tie)
    u = d + margin * beta
    counted_aij = (beta[:, :, None] - beta[:, None, :] > tie) & other[:, :, None] & other[:, None, :]
    terms_aij = F.relu(u[:, :, None] - u[:, None, :]).masked_fill(~counted_aij, 0)
    count = counted_aij.sum() if reduction == "mean" else (terms_aij > 0).sum()
    return terms_aij.sum() / count.clamp(min=1)


def _hard_reference(
    d: Tensor, beta: Tensor, same: Tensor, other: Tensor, margin: float, reduction: str, tie: float
) -> Tensor:
    """0.1 {sgn(b1-b2) [d1 - d2 + m (b1-b2)]}_+ + [d1 + m b1 - dn]_+ with 1, 2 the two farthest same-identity samples
    and n the nearest other one."""
    if len(d) < 2:
        return d.sum() * 0
    positive = same & other
    farthest = d.detach().masked_fill(~positive, -torch.inf).topk(2, dim=1).indices
    nearest = d.detach().masked_fill(same, torch.inf).argmin(1, keepdim=True)
    some, second, negative = positive.sum(1) > 0, positive.sum(1) > 1, (~same).any(1)
    d1, d2 = d.gather(1, farthest).unbind(1)
    b1, b2 = beta.gather(1, farthest).unbind(1)
    counted = second & ((b1 - b2).abs() > tie)
    pair = F.relu(torch.sign(b1 - b2) * (d1 - d2 + margin * (b1 - b2))).masked_fill(~counted, 0)
    push = F.relu(d1 + margin * b1 - d.gather(1, nearest)[:, 0]).masked_fill(~(some & negative), 0)
    terms = 0.1 * pair + push
    count = len(d) if reduction == "mean" else (terms > 0).sum().clamp(min=1)
    return terms.sum() / count


class _Groups(NamedTuple):
    """others [N, K]: each sample's others of its identity in order of their numbers, itself where it has fewer; present
    [N, K]; back [N, K]: where the sample stands among the others of such another one; size [N] of its identity."""

    others: Tensor
    present: Tensor
    back: Tensor
    size: Tensor


def _groups(labels: Tensor) -> _Groups:
    N, device = len(labels), labels.device
    order = labels.argsort(stable=True)
    _, group, sizes = torch.unique_consecutive(labels[order], return_inverse=True, return_counts=True)
    starts = sizes.cumsum(0) - sizes
    places = torch.arange(N, device=device)
    place, start, size = torch.empty(3, N, dtype=torch.int64, device=device)
    place[order], start[order], size[order] = places - starts[group], starts[group], sizes[group]
    K = int(sizes.max()) - 1 if N else 0
    slots = torch.arange(K, device=device)
    present = slots < size[:, None] - 1
    member = slots + (slots >= place[:, None])  # its own place is skipped
    index = order[(start[:, None] + member).clamp(max=max(N - 1, 0))] if N else order.view(0, 0)
    back = place[:, None] - (place[:, None] > member).long()
    return _Groups(torch.where(present, index, places[:, None]), present, torch.where(present, back, 0), size)


def _blocks(rows: slice, weight: int, budget: int) -> Iterator[slice]:
    """rows in slices of which each, at `weight` numbers a row, holds at most `budget` (or is one row)."""
    step = max(1, budget // max(weight, 1))
    return (slice(i, min(i + step, rows.stop)) for i in range(rows.start, rows.stop, step))


def _relatedness(instructions: Tensor, groups: _Groups, dtype: torch.dtype, raw: bool) -> Tensor:
    """Eq. 6 of each sample and those of its identity: [N, K]; 0 for absent ones."""
    (N, K), E = groups.others.shape, instructions.shape[1]
    lengths, beta = _squares(instructions[None])[0].to(dtype).sqrt(), instructions.new_empty(N, K, dtype=dtype)
    for rows in _blocks(slice(0, N), K * E, GATHERED):
        others = _gathered(instructions[None], groups.others[None, rows])[0].to(dtype)
        beta[rows] = (instructions[rows, None].to(dtype) @ others.mT)[:, 0]
    beta /= (lengths[:, None] * lengths[groups.others]).clamp_(min=torch.finfo(dtype).tiny)
    beta.masked_fill_(~groups.present, 0)
    return beta if raw else beta.clamp_(min=0)


def _gathered(x: Tensor, index: Tensor) -> Tensor:
    """x [S, N, D] at index [S, R, k]: [S, R, k, D]."""
    S, N, D = x.shape
    flat = (index + N * torch.arange(S, device=x.device)[:, None, None]).flatten()
    return x.view(S * N, D).index_select(0, flat).view(*index.shape, D)


def _squares(x: Tensor) -> Tensor:
    """Squared lengths of x [S, N, D]: [S, N], at least of 32 bits."""
    S, N, D = x.shape
    out = x.new_empty(S, N, dtype=torch.promote_types(x.dtype, torch.float32))
    for rows in _blocks(slice(0, N), S * D, GATHERED):
        torch.sum(x[:, rows].to(out.dtype).square(), 2, out=out[:, rows])
    return out


def _to_others(x: Tensor, index: Tensor, squared: bool) -> Tensor:
    """Distances from each sample to those of index [S, N, k]: [S, N, k], from differences."""
    S, N, D = x.shape
    d = x.new_empty(index.shape)
    for rows in _blocks(slice(0, N), S * index.shape[2] * D, GATHERED):
        difference = _gathered(x, index[:, rows]).sub_(x[:, rows, None])
        d[:, rows] = difference.square_().sum(3)
    return d if squared else d.sqrt_()


def _add_pull(out: Tensor, x: Tensor, rows: slice, index: Tensor, weight: Tensor) -> None:
    """out [S, N, D] += sum_k weight_k (x_k - x_a) for the anchors in rows, R of them; index, weight [S, R, k]."""
    for block in _blocks(rows, len(x) * index.shape[2] * x.shape[2], GATHERED):
        at = slice(block.start - rows.start, block.stop - rows.start)
        difference = _gathered(x, index[:, at]).sub_(x[:, block, None])
        out[:, block] += (weight[:, at, None] @ difference)[:, :, 0]


class _Sweep(NamedTuple):
    """What a block of anchors finds among the samples of other identities.

    loss [S, R]; active [S, R] int64: how many triplets cost something; weight [S, R, K]: derivative of the loss by the
    distance to each same-identity sample; pull [S, R]: the sum of the derivatives by the distances to the others
    """

    loss: Tensor
    active: Tensor
    weight: Tensor
    pull: Tensor


def _distances(dots: Tensor, squares: Tensor, anchors: Tensor, squared: bool) -> Tensor:
    """From products [S, R, N] of anchors with all samples, in place."""
    d = dots.mul_(-2).add_(squares[:, None]).add_(squares[:, anchors, None]).clamp_(min=0)
    return d if squared else d.sqrt_()


def _sweep_on_cpu(
    dots: Tensor, squares: Tensor, anchors: Tensor, groups: _Groups, labels: Tensor, up: Tensor, squared: bool
) -> _Sweep:
    """dots [S, R, N], products of the anchors with all samples, become W + W^T: W_ab is the derivative of the loss by
    the distance from a to b of another identity (over 2 d where the distance is the root). up [1 or 2, S, K, N]: u of
    the same-identity samples that rank before other identities and of those that rank behind, else -inf, inf."""
    d, (S, R, _) = _distances(dots, squares, anchors, squared), dots.shape
    same = torch.cat([groups.others[anchors], anchors[:, None]], 1).expand(S, -1, -1)
    sums = torch.zeros_like(d)
    loss, active = d.new_zeros(S, R), torch.zeros(S, R, dtype=torch.int64)
    weight = d.new_zeros(S, R, up.shape[2])
    for sign, u in zip((1, -1), up, strict=False):
        d.scatter_(2, same, sign * torch.inf)
        if not u.numel() or bool((sign * u).max() <= (sign * d).min()):
            continue  # no triplet costs anything, neither of these anchors nor with them
        for ks in _blocks(slice(0, u.shape[1]), d.numel(), BLOCK[d.device.type]):
            own, theirs = u[:, ks, anchors, None], u[:, ks, None]
            term = (own - d[:, None] if sign > 0 else d[:, None] - own).clamp_(min=0)
            loss += term.sum((1, 3))
            number = term.gt_(0).sum(3)
            weight[:, :, ks] += sign * number.mT
            active += number.long().sum(1)
            sums.sub_(term.sum(1), alpha=sign)
            (torch.gt if sign > 0 else torch.lt)(theirs, d[:, None], out=term)
            sums.sub_(term.sum(1), alpha=sign)
    if not squared:
        sums.mul_(torch.where(d.isfinite() & (d > 0), 0.5 / d, 0))
    dots.copy_(sums)
    return _Sweep(loss, active, weight, sums.sum(2))


@triton.jit
def _tile(dots_at, squares_at, LABELS, own, label, cols, N, ok, SQUARED: tl.constexpr):
    """Distances of some anchors to some samples, and which of these are of another identity."""
    within = cols < N
    dots = tl.load(dots_at[:, None] + cols[None, :], mask=ok[:, None] & within[None, :], other=0.0)
    squares = tl.load(squares_at + cols, mask=within, other=0.0)
    d = own[:, None] + squares[None, :] - 2 * dots
    d = tl.where(d < 0, 0.0, d)  # and so NaN stays
    if not SQUARED:
        d = tl.sqrt(d)
    others = tl.load(LABELS + cols, mask=within, other=0)
    return d, within[None, :] & ok[:, None] & (others[None, :] != label[:, None])


@triton.jit(do_not_specialize=["S", "R", "N", "K"])
def _sweep(
    DOTS, SQUARES, ANCHORS, LABELS, UP, LOSS, ACTIVE, WEIGHT, PULL, S, R, N, K,
    SIGNS: tl.constexpr, SQUARED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS anchors of one feature set against all samples, first for the loss and then, in place of the
    products, for the derivatives."""
    dtype = DOTS.dtype.element_ty
    s = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ok = rows < R
    anchors = tl.load(ANCHORS + rows, mask=ok, other=0)
    label = tl.load(LABELS + anchors)
    squares_at, at = SQUARES + s * N, s * R + rows
    own = tl.load(squares_at + anchors)
    dots_at = DOTS + at * N
    least = tl.full([ROWS, COLUMNS], float("inf"), dtype)
    most = tl.full([ROWS, COLUMNS], float("-inf"), dtype)
    for start in tl.range(0, N, COLUMNS):
        d, other = _tile(dots_at, squares_at, LABELS, own, label, start + tl.arange(0, COLUMNS), N, ok, SQUARED)
        least = tl.where(other & ~(d >= least), d, least)
        most = tl.where(other & ~(d <= most), d, most)
    loss = tl.zeros([ROWS], dtype)
    active = tl.zeros([ROWS], tl.int64)
    for k in tl.range(0, K):
        weight = tl.zeros([ROWS], dtype)
        for side in tl.static_range(SIGNS):
            sign = 1 - 2 * side
            u = tl.load(UP + ((side * S + s) * K + k) * N + anchors)
            dead = u[:, None] <= least if side == 0 else u[:, None] >= most
            if tl.min(dead.to(tl.int32)) == 0:
                for start in tl.range(0, N, COLUMNS):
                    cols = start + tl.arange(0, COLUMNS)
                    d, other = _tile(dots_at, squares_at, LABELS, own, label, cols, N, ok, SQUARED)
                    term = (u[:, None] - d) * sign
                    term = tl.where(other & ~(term <= 0), term, 0.0)
                    loss += tl.sum(term, 1)
                    number = tl.sum((term > 0).to(tl.int32), 1)
                    active += number
                    weight += sign * number
        tl.store(WEIGHT + at * K + k, weight, mask=ok)
    tl.store(LOSS + at, loss, mask=ok)
    tl.store(ACTIVE + at, active, mask=ok)
    tl.debug_barrier()  # the products are overwritten now: every thread has read them
    pull = tl.zeros([ROWS], dtype)
    for start in tl.range(0, N, COLUMNS):
        cols = start + tl.arange(0, COLUMNS)
        d, other = _tile(dots_at, squares_at, LABELS, own, label, cols, N, ok, SQUARED)
        sums = tl.zeros([ROWS, COLUMNS], dtype)
        for k in tl.range(0, K):
            for side in tl.static_range(SIGNS):
                sign = 1 - 2 * side
                u_at = UP + ((side * S + s) * K + k) * N
                u, theirs = tl.load(u_at + anchors), tl.load(u_at + cols, mask=cols < N, other=0.0)
                sums -= sign * ((u[:, None] - d) * sign > 0).to(dtype)
                sums -= sign * ((theirs[None, :] - d) * sign > 0).to(dtype)
        if not SQUARED:
            sums = tl.where(d > 0, sums * 0.5 / d, 0.0)
        sums = tl.where(other, sums, 0.0)
        pull += tl.sum(sums, 1)
        tl.store(dots_at[:, None] + cols[None, :], sums, mask=ok[:, None] & (cols < N)[None, :])
    tl.store(PULL + at, pull, mask=ok)


def _sweep_on_gpu(
    dots: Tensor, squares: Tensor, anchors: Tensor, groups: _Groups, labels: Tensor, up: Tensor, squared: bool
) -> _Sweep:
    """As `_sweep_on_cpu`, in one kernel."""
    (S, R, N), K = dots.shape, up.shape[2]
    loss, pull = dots.new_empty(2, S, R)
    found = _Sweep(loss, torch.empty_like(loss, dtype=torch.int64), dots.new_empty(S, R, K), pull)
    with device_of(dots):
        rows, columns = TILES[dots.itemsize]
        _sweep[(triton.cdiv(R, rows), S)](
            dots, squares, anchors, labels, up, *found, S, R, N, K,
            SIGNS=len(up), SQUARED=squared, ROWS=rows, COLUMNS=columns, num_warps=WARPS,
        )  # fmt: skip
    return found


class _Result(NamedTuple):
    """loss, counted and active of each anchor [S, N] (0 for those not looked at), and the gradient of their sum
    [S, N, D], which is whole in the rows asked for and 0 elsewhere."""

    loss: Tensor
    counted: Tensor
    active: Tensor
    gradient: Tensor | None


def _all_triplets(
    x: Tensor, labels: Tensor, beta: Tensor, groups: _Groups, margin: float, squared: bool, raw: bool, tie: float,
    rows: slice, whole: bool, gradient: bool,
) -> _Result:  # fmt: skip
    """Every triplet of the anchors in rows; whole: of all anchors."""
    S, N, K = len(x), *beta.shape
    d = _to_others(x, groups.others.expand(S, -1, -1), squared)
    u = d + margin * beta
    loss, active, weight = d.new_zeros(S, N), torch.zeros(S, N, dtype=torch.int64, device=x.device), torch.zeros_like(d)
    counted = (beta.abs() > tie).sum(1) * (N - groups.size)
    for js in _blocks(slice(0, K), S * N * K, BLOCK[x.device.type]):  # two references of the anchor's identity
        ahead = (beta[:, :, None] - beta[:, None, js] > tie) & groups.present[:, :, None] & groups.present[:, None, js]
        term = (u[:, :, :, None] - u[:, :, None, js]).clamp_(min=0).masked_fill_(~ahead, 0)
        positive = term > 0
        counted += ahead.sum((1, 2))
        loss += term.sum((2, 3))
        active += positive.sum((2, 3))
        weight += positive.sum(3)
        weight[:, :, js] -= positive.sum(2)
    up = torch.stack([u.masked_fill(~(s * beta > tie), -s * torch.inf).mT for s in (1, -1)[: 1 + raw]])
    everyone = torch.arange(N, device=x.device)
    blocks: list[slice | Tensor] = list(_blocks(rows, S * N, BLOCK[x.device.type]))
    asked, further = len(blocks), everyone[:0]
    if rows != slice(0, N) and (whole or gradient):
        wanted = torch.full((N,), whole, dtype=torch.bool, device=x.device)
        wanted[groups.others[rows].flatten()] = True  # who shares an identity with rows pulls at them as well
        wanted[rows] = False
        further = everyone[wanted]
    blocks += [further[block] for block in _blocks(slice(0, len(further)), S * N, BLOCK[x.device.type])]
    squares, result = _squares(x), torch.zeros_like(x) if gradient else None
    sweep = _sweep_on_gpu if x.is_cuda or INTERPRETED else _sweep_on_cpu
    for turn, block in enumerate(blocks):
        products = x[:, block] @ x.mT
        found = sweep(products, squares, everyone[block], groups, labels, up, squared)
        loss[:, block] += found.loss
        active[:, block] += found.active
        weight[:, block] += found.weight
        if result is not None and turn < asked:  # sum_b W_ab (x_a - x_b)
            products.scatter_(2, everyone[block, None].expand(S, -1, 1), -found.pull[:, :, None])
            result[:, block] = products @ x
    if result is not None:
        index, sets = groups.others[rows].expand(S, -1, -1), torch.arange(S, device=x.device)[:, None, None]
        both = weight[:, rows] + weight[sets, index, groups.back[rows]]  # of itself, for absent ones
        _add_pull(result, x, rows, index, both if squared else both * _halves(d[:, rows]))
        result *= -2
    return _Result(loss, counted.expand(S, N), active, result)


def _halves(d: Tensor) -> Tensor:
    """1 / (2 d), and 0 at 0: the derivative of the root."""
    return torch.where(d > 0, 0.5 / d, 0)


def _hard_triplets(
    x: Tensor, beta: Tensor, groups: _Groups, margin: float, squared: bool, tie: float, gradient: bool
) -> _Result:
    """`_hard_reference` for every anchor; at equal distances the sample with the lower number is taken."""
    (S, N, D), K = x.shape, beta.shape[1]
    to_same = _to_others(x, groups.others.expand(S, -1, -1), squared)
    squares, nearest = _squares(x), torch.zeros(S, N, dtype=torch.int64, device=x.device)
    for rows in _blocks(slice(0, N), S * N, BLOCK[x.device.type]):
        anchors = torch.arange(rows.start, rows.stop, device=x.device)
        d = _distances(x[:, rows] @ x.mT, squares, anchors, squared)
        d.scatter_(2, torch.cat([groups.others[rows], anchors[:, None]], 1).expand(S, -1, -1), torch.inf)
        nearest[:, rows] = d.argmin(2)
    far = to_same.masked_fill(~groups.present, -torch.inf)
    places = torch.zeros(S, N, 2, dtype=torch.int64, device=x.device)
    for number in range(min(2, K)):
        places[:, :, number] = far.argmax(2)
        far.scatter_(2, places[:, :, number, None], -torch.inf)
    if K == 0:
        farthest, d1, d2, b1, b2 = places * 0, *x.new_zeros(4, S, N)
    else:
        farthest = groups.others.expand(S, -1, -1).gather(2, places)
        d1, d2 = to_same.gather(2, places).unbind(2)
        b1, b2 = beta.expand(S, -1, -1).gather(2, places).unbind(2)
    edges = torch.cat([farthest, nearest[:, :, None]], 2)
    d = torch.stack([d1, d2, _to_others(x, nearest[:, :, None], squared)[:, :, 0]], 2)
    second, some = groups.size > 2, (groups.size > 1) & (groups.size < N)
    sign = torch.sign(b1 - b2).masked_fill_((b1 - b2).abs() <= tie, 0)
    pair = (sign * (d1 - d2 + margin * (b1 - b2))).clamp(min=0)  # of one alone with itself: sign is 0
    push = (d1 + margin * b1 - d[:, :, 2]).clamp(min=0).masked_fill(~some, 0)
    counted, active = second.long() + some, (pair > 0).long() + (push > 0)
    result = None
    if gradient:
        moved, pushed = 0.1 * sign * (pair > 0), (push > 0).to(d.dtype)
        weight = torch.stack([moved + pushed, -moved, -pushed], 2)
        weight = 2 * (weight if squared else weight * _halves(d))
        result = torch.zeros_like(x)
        _add_pull(result, x, slice(0, N), edges, -weight)
        for rows in _blocks(slice(0, N), 3 * S * D, GATHERED):
            back = weight[:, rows, :, None] * (_gathered(x, edges[:, rows]) - x[:, rows, None])
            _add_rows(result, edges[:, rows], back)
    return _Result(0.1 * pair + push, counted.expand(S, N), active, result)


def _add_rows(out: Tensor, index: Tensor, values: Tensor) -> None:
    """out [S, N, D] += values [S, R, k, D] at index [S, R, k], in the same order every time."""
    S, N, D = out.shape
    flat = (index + N * torch.arange(S, device=out.device)[:, None, None]).flatten()
    if out.is_cuda:  # sorts
        out.view(S * N, D).index_put_((flat,), values.reshape(-1, D), accumulate=True)
    else:
        out.view(S * N, D).index_add_(0, flat, values.reshape(-1, D))


def _loss_and_gradient(
    features: Tensor, labels: Tensor, instructions: Tensor, margin: float, mining: str, distance: str,
    negative_similarity: str, reduction: str, tie: float, start: int, stop: int, gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """loss [S], counted [S], active [S] of features [S, N, D], and the gradient (empty unless asked for)."""
    with torch.autocast(features.device.type, enabled=False):
        x = features.to(torch.promote_types(features.dtype, torch.float32)).contiguous()
        squared, raw = distance == "squared", negative_similarity == "raw"
        groups = _groups(labels)
        beta = _relatedness(instructions, groups, x.dtype, raw)
        rows = slice(start, stop)
        if mining == "hard":
            found = _hard_triplets(x, beta, groups, margin, squared, tie, gradient)
            terms = (found.loss > 0).sum(1)
            count = torch.full_like(terms, x.shape[1]) if reduction == "mean" else terms
        else:
            whole = reduction == "active"
            found = _all_triplets(x, labels, beta, groups, margin, squared, raw, tie, rows, whole, gradient)
            count = (found.active if whole else found.counted).sum(1)
        count = count.clamp(min=1)
        loss = found.loss[:, rows].double().sum(1) / count
        out = features.new_empty(0)
        if found.gradient is not None:
            found.gradient[:, : rows.start] = found.gradient[:, rows.stop :] = 0
            out = found.gradient.div_(count[:, None, None]).to(features.dtype)
        counted, active = (t[:, rows].sum(1) for t in (found.counted, found.active))
        return loss.to(features.dtype), counted, active, out


_LIBRARY = torch.library.Library("kernels", "FRAGMENT")
_LIBRARY.define(
    "adaptive_triplet(Tensor features, Tensor labels, Tensor instructions, float margin, str mining, str distance, "
    "str negative_similarity, str reduction, float tie, int start, int stop, bool gradient) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_LIBRARY.impl("adaptive_triplet", _loss_and_gradient, "CUDA")
_LIBRARY.impl("adaptive_triplet", _loss_and_gradient, "CPU")
_op = torch.ops.kernels.adaptive_triplet.default


@torch.library.register_fake("kernels::adaptive_triplet", lib=_LIBRARY)
def _(features, labels, instructions, margin, mining, distance, negative, reduction, tie, start, stop, gradient):
    S = features.shape[0]
    counts = [features.new_empty(S, dtype=torch.int64) for _ in range(2)]
    return features.new_empty(S), *counts, features.new_empty(features.shape if gradient else 0)


def _save(ctx, inputs, output) -> None:
    ctx.gradient = inputs[-1]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[3], inputs[0])


def _differentiate(ctx, dloss, *_):
    gradient, features = ctx.saved_tensors
    if dloss is None:
        return (None,) * 12
    if not ctx.gradient:
        raise RuntimeError("adaptive_triplet: the gradient was not asked for when the loss was made")
    return _Scaled.apply(gradient, dloss, features), *(None,) * 11


class _Scaled(torch.autograd.Function):
    """gradient [S, N, D] * dloss [S]; it depends on the features, but how is not known: a clear error, not silence."""

    @staticmethod
    def forward(ctx, gradient, dloss, features):
        return gradient * dloss[:, None, None]

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError("adaptive_triplet has no second derivative; adaptive_triplet_reference has")


torch.library.register_autograd("kernels::adaptive_triplet", _differentiate, setup_context=_save, lib=_LIBRARY)


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
    """Adaptive triplet loss of one batch, differentiable in its features, once.

    features             [N, D] -> scalar, or [S, N, D] -> [S]; floating; 16 bits are computed in float32
    labels               [N] int64, identities
    instructions         [N, E], one vector per sample; no gradient flows to it
    margin               m of Eq. 5, in units of the distance
    mining               "all" or "hard"
    distance             "squared" or "euclidean"; None: "squared" for "all", "euclidean" for "hard"
    negative_similarity  "clamp" or "raw"
    reduction            "mean" or "active" ("hard": over anchors)
    tie                  dead band of |b1 - b2|
    rows                 (start, stop): only these anchors' terms, normalised as the whole batch, and the gradient of
                         the whole batch's loss in these rows, 0 in the others: a rank's share of a gathered batch
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
    distance = distance or ("squared" if mining == "all" else "euclidean")
    sets = features if features.dim() == 3 else features[None]
    wanted = torch.is_grad_enabled() and features.requires_grad
    options = float(margin), mining, distance, negative_similarity, reduction, float(tie), start, stop, wanted
    loss, counted, active, _ = _op(sets, labels, instructions.detach(), *options)
    if features.dim() == 2:
        loss, counted, active = loss[0], counted[0], active[0]
    return (loss, {"counted": counted, "active": active}) if return_stats else loss
