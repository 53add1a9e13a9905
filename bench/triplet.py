"""Adaptive triplet loss: kernels.adaptive_triplet beside what a user could write or import instead.

    python bench/triplet.py                               samples as many as the device takes in reasonable time
    python bench/triplet.py --samples 128 1024 --json bench/results/triplet-h100.json --plot triplet.png

Rivals, each with its gradient:
loop         hard mining with a Python loop over every anchor's three distances, as the authors' released code does it
eager hard   hard mining with one matrix product, masked maxima and minima
N x N x N    every triplet in memory
pytorch-metric-learning   every triplet as a list of indices; one margin for all, so it gets instructions that are alike
They must first return what ours returns (the loop also what the released code returned); otherwise exit code 1 and no
figures. Four samples an identity, 768 features. Memory is what a run takes beyond its inputs at its peak.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # run as a script: the checkout's root is where imports start
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from bench import measure

PER_IDENTITY, FEATURES, MARGIN = 4, 768, 0.3
TIE = 1e-3  # the released code has none, and takes the sign of a rounding where two sentences are equal
OURS, OURS_HARD = "all", "hard"


class Case(NamedTuple):
    features: Tensor
    labels: Tensor
    instructions: Tensor


def case_of(samples: int, device: torch.device, *, alike: bool = False) -> Case:
    """Unit features that gather about their identities, as halfway through a training; alike: one instruction."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(samples // PER_IDENTITY).repeat_interleave(PER_IDENTITY)
    centres = torch.randn(samples // PER_IDENTITY, FEATURES, generator=generator)
    features = F.normalize(centres[labels] + 2 * torch.randn(samples, FEATURES, generator=generator), dim=-1)
    own, shared = (torch.randn(n, FEATURES, generator=generator) for n in (samples, samples // PER_IDENTITY))
    instructions = torch.ones(samples, 1) if alike else own + shared[labels]
    return Case(features.to(device).requires_grad_(), labels.to(device), instructions.to(device))


def ours(case: Case) -> Tensor:
    return kernels.adaptive_triplet(*case, margin=MARGIN)  # type: ignore[return-value]


def ours_hard(case: Case) -> Tensor:
    return kernels.adaptive_triplet(*case, margin=MARGIN, mining="hard")  # type: ignore[return-value]


def _matrices(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """[N, N]: distances; these with -inf for all but others of the anchor's identity; and with inf for its identity."""
    x, labels, _ = case
    squares = x.pow(2).sum(1)
    d = (squares[:, None] + squares - 2 * x @ x.T).clamp(min=1e-12).sqrt()
    same, own = labels[:, None] == labels, torch.eye(len(x), dtype=torch.bool, device=x.device)
    return d, d.masked_fill(~same | own, -torch.inf), d.masked_fill(same, torch.inf)


def loop(case: Case) -> Tensor:
    (x, _, t), (d, to_same, to_others) = case, _matrices(case)
    farthest, nearest = to_same.topk(2, 1).indices, to_others.argmin(1)
    pairs, pushes = [], []
    for a in range(len(x)):
        i, j, n = int(farthest[a, 0]), int(farthest[a, 1]), int(nearest[a])
        b1, b2 = (float(F.cosine_similarity(t[a], t[r], 0).clamp(min=0)) for r in (i, j))
        sign = float(b1 - b2 > TIE) - float(b2 - b1 > TIE)
        pairs.append((sign * (d[a, i] - d[a, j] + MARGIN * (b1 - b2))).clamp(min=0))
        pushes.append((d[a, i] + MARGIN * b1 - d[a, n]).clamp(min=0))
    return 0.1 * torch.stack(pairs).mean() + torch.stack(pushes).mean()


def eager_hard(case: Case) -> Tensor:
    _, to_same, to_others = _matrices(case)
    (d1, d2), farthest = (part.unbind(1) for part in to_same.topk(2, 1))
    dn = to_others.min(1).values
    unit = F.normalize(case.instructions, dim=-1)
    b1, b2 = ((unit * unit[r]).sum(1).clamp(min=0) for r in farthest)
    sign = torch.sign(b1 - b2) * ((b1 - b2).abs() > TIE)
    pair = F.relu(sign * (d1 - d2 + MARGIN * (b1 - b2)))
    return (0.1 * pair + F.relu(d1 + MARGIN * b1 - dn)).mean()


def cube(case: Case) -> Tensor:
    return kernels.adaptive_triplet_reference(*case, margin=MARGIN)


def metric_learning(case: Case) -> Tensor:
    from pytorch_metric_learning.distances import LpDistance
    from pytorch_metric_learning.losses import TripletMarginLoss
    from pytorch_metric_learning.reducers import MeanReducer

    squared = LpDistance(normalize_embeddings=False, p=2, power=2)
    return TripletMarginLoss(MARGIN, distance=squared, reducer=MeanReducer())(case.features, case.labels)


class Rival(NamedTuple):
    """like: what it is compared with; most: samples beyond which it takes too long, or too much memory."""

    run: Callable[[Case], Tensor]
    like: str
    most: int
    alike: bool = False


RIVALS = {
    OURS: Rival(ours, OURS, 1 << 20),
    OURS_HARD: Rival(ours_hard, OURS_HARD, 1 << 20),
    "loop": Rival(loop, OURS_HARD, 1024),
    "eager hard": Rival(eager_hard, OURS_HARD, 8192),
    "N x N x N": Rival(cube, OURS, 512),
    "pytorch-metric-learning": Rival(metric_learning, OURS, 1024, alike=True),
}


def with_gradient(run: Callable[[Case], Tensor], case: Case) -> tuple[Tensor, Tensor]:
    loss = run(case)
    return loss.detach(), torch.autograd.grad(loss, case.features)[0]


def check_loop() -> None:
    """The loop returns what the released code returned. SystemExit where not."""
    stored = np.load(measure.ROOT / "tests" / "data" / "released_triplet.npz")
    for name in ("pk", "big", "sentences"):
        x, t = (torch.from_numpy(stored[f"{name}_{part}"]).double() for part in ("features", "instructions"))
        case = Case(x.requires_grad_(), torch.from_numpy(stored[f"{name}_labels"]).long(), t)
        gradient, want = with_gradient(loop, case)[1], torch.from_numpy(stored[f"{name}_gradient"])
        if not torch.allclose(gradient, want, rtol=1e-9, atol=1e-11):
            raise SystemExit(f"error: the loop differs from the released code on {name}; no figures are reported")


def in_blocks(case: Case, count: int = 32) -> Tensor:
    """Sum over the first anchors of every triplet's term, in float64, a matrix of all pairs for each."""
    x, labels, t = case.features.detach().double(), case.labels, F.normalize(case.instructions.double(), dim=-1)
    total = x.new_zeros(())
    for a in range(count):
        beta = ((t @ t[a]).clamp(min=0) * (labels == labels[a])).index_fill(0, torch.tensor([a], device=x.device), 0)
        u = (x - x[a]).square().sum(1) + MARGIN * beta
        for i in (labels == labels[a]).nonzero()[:, 0].tolist():
            if i != a:
                counts = beta[i] - beta > TIE
                counts[a] = False
                total += (F.relu(u[i] - u) * counts).sum()
    return total


def refusals(case: Case, plain: Case, rivals: dict[str, Rival]) -> dict[str, str]:
    """Rival -> why it has no figures here."""
    found = {}
    loss = kernels.adaptive_triplet(*case, margin=MARGIN, rows=(0, 32))
    assert isinstance(loss, Tensor)
    total = kernels.adaptive_triplet(*case, margin=MARGIN, return_stats=True)[1]["counted"]
    if not torch.isclose(loss.double() * total, in_blocks(case), rtol=1e-4):
        found[OURS] = f"{loss.item() * int(total):.6g} over 32 anchors, not {in_blocks(case).item():.6g}"
    for name, rival in rivals.items():
        if name in (OURS, OURS_HARD):
            continue
        on = plain if rival.alike else case
        try:
            got, want = (with_gradient(run, on) for run in (rival.run, RIVALS[rival.like].run))
        except Exception as error:  # rivals may refuse a size or a device in any way, or not be installed
            found[name] = " ".join(str(error).split())[:110] or type(error).__name__
            continue
        errors = [((a - b).norm() / b.norm().clamp(min=1e-12)).item() for a, b in zip(got, want, strict=True)]
        if not max(errors) < 1e-3:
            found[name] = f"differs from ours by {errors[0]:.1e} (loss), {errors[1]:.1e} (gradient)"
    return found


def compare(samples: int, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """The rows of one batch size. A rival that cannot run is left out; SystemExit where results differ."""
    case, plain = case_of(samples, device), case_of(samples, device, alike=True)
    rivals = {name: rival for name, rival in RIVALS.items() if samples <= rival.most}
    refused = refusals(case, plain, rivals)
    wrong = [f"{name}: {why}" for name, why in refused.items() if name == OURS or "differs from ours" in why]
    if wrong:
        raise SystemExit(f"error: {samples} samples: {'; '.join(wrong)}; no figures are reported")
    counted = {c is plain: int(kernels.adaptive_triplet(*c, return_stats=True)[1]["counted"]) for c in (case, plain)}
    runs = {name: rival for name, rival in rivals.items() if name not in refused}
    detached = {
        True: plain._replace(features=plain.features.detach()),
        False: case._replace(features=case.features.detach()),
    }
    rows: list[dict[str, Any]] = []
    passes: dict[str, dict[str, Callable[[], Any]]] = {
        "forward": {name: lambda r=r: r.run(detached[r.alike]) for name, r in runs.items()},
        "both": {name: lambda r=r: with_gradient(r.run, plain if r.alike else case) for name, r in runs.items()},
    }
    for which, timed in passes.items():
        seconds = measure.rounds(timed, device, rounds)
        ratio = measure.ratios(seconds, OURS)
        for name, run in timed.items():
            median = statistics.median(seconds[name])
            row = {"samples": samples, "rival": name, "pass": which, "times_ours": ratio[name]}
            row["us" if device.type == "cuda" else "cpu_ms"] = median * (1e6 if device.type == "cuda" else 1e3)
            row["peak_mb"] = measure.peak_bytes(run, device) / 2**20
            if runs[name].like == OURS:
                row["triplets_per_s"] = counted[runs[name].alike] / median
            rows.append(row)
    return rows + [{"samples": samples, "rival": name, "left_out": why} for name, why in refused.items()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", nargs="+", type=int, help="default: 128 512 1024 4096 8192")
    parser.add_argument("--quick", action="store_true", help="128 and 512 samples, three rounds")
    args, device = measure.arguments(parser, "7, from 4096 samples 3")
    sizes = args.samples or ([128, 512] if args.quick else [128, 512, 1024, 4096, 8192])
    if any(size < 32 or size % PER_IDENTITY for size in sizes):
        parser.error(f"--samples: expected multiples of {PER_IDENTITY} from 32 on")
    check_loop()
    result: dict[str, Any] = {"bench": "triplet", **measure.facts(device), "rows": []}
    rows = result["rows"]
    for size in sizes:
        rounds = args.rounds or (30 if device.type == "cuda" else 3 if args.quick or size >= 4096 else 7)
        rows += compare(size, device, rounds)
        measure.write(args.json, result)  # what is there so far, should a larger one fail
    columns = ["samples", "rival", "pass", "us", "cpu_ms", "times_ours", "peak_mb", "triplets_per_s"]
    measure.show(result, columns, ("samples",), args.json)
    groups: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.get("pass") == "both":
            groups.setdefault(f"{row['samples']}", {})[row["rival"]] = row["times_ours"]
    title = f"forward and backward, time relative to ours over all triplets ({result['device']})"
    measure.bars(args.plot, groups, title, "times ours")
    return 0


if __name__ == "__main__":
    sys.exit(main())
