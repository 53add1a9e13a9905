"""The results table, with the paper's figures beside those protocols for which the paper tells which one it used."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from engine.tasks import TASKS

# Tables 2-4 of the paper, IRM (MTL), 256 x 128: mAP, rank-1. LTCC, PRCC and VC-Clothes: the protocol is not stated.
PAPER: dict[tuple[str, str], tuple[float, float]] = {
    ("trad", "market1501"): (0.935, 0.965),
    ("trad", "msmt17"): (0.724, 0.869),
    ("trad", "cuhk03"): (0.854, 0.865),
    ("t2i", "cuhk_pedes"): (0.665, 0.742),
    ("ctcc", "real2"): (0.417, 0.649),
    ("li", "real2"): (0.398, 0.716),
}


def format_table(metrics: dict[str, Any], *, paper: bool = False) -> str:
    """Plain-text table of metrics.json: percentages; paper: add the paper's mAP (for results on the real data sets)."""
    head = f"{'task':5} {'protocol':22} {'mAP':>6} {'±':>5} {'R1':>6} {'R5':>6} {'mINP':>6} {'random':>7}"
    head += f" {'untrained':>10}" + ("  paper" if paper else "")
    lines = [head, "-" * len(head)]
    for task in TASKS:
        for name, row in metrics["tasks"].get(task, {}).items():
            untrained = row["untrained_mAP"]
            line = f"{task:5} {name:22} {_percent(row['mAP'])} {_percent(row['mAP_std'], 5)} {_percent(row['rank1'])} "
            line += f"{_percent(row['rank5'])} {_percent(row['mINP'])} {_percent(row['random_mAP'], 7)} "
            line += _percent(untrained, 10) if untrained is not None else f"{'-':>10}"
            if paper:
                known = PAPER.get((task, name))
                line += f"  {100 * known[0]:.1f}" if known else "  protocol not stated"
            lines.append(line)
    lines.append(f"mean mAP over tasks {100 * metrics['mean_mAP']:.2f} %")
    return "\n".join(lines)


@contextmanager
def whole_file(file: Path, mode: str = "w") -> Iterator[IO]:
    """Open `file` aside and give it its name when written: nobody ever reads half of it."""
    part = file.with_name(file.name + ".part")
    with part.open(mode) as stream:
        yield stream
    os.replace(part, file)


def write_metrics(metrics: dict[str, Any], file: Path) -> None:
    with whole_file(file) as stream:
        stream.write(json.dumps(metrics, indent=1) + "\n")


def print_check(metrics: dict[str, Any], log: Path) -> int:
    """0 when the training loss of every stream fell (mean of its first fifth against its last) and the mean mAP over
    tasks beats a random ranking's and the untrained network's; else 1. Prints what it compared."""
    losses: dict[str, list[float]] = {}
    for row in map(json.loads, log.read_text().splitlines()):
        for name, loss in zip(row["streams"], row["stream_loss"], strict=True):
            if loss is not None:  # a skipped step's
                losses.setdefault(name, []).append(loss)
    ok = True
    for name, values in sorted(losses.items()):
        part = max(1, len(values) // 5)
        first, last = sum(values[:part]) / part, sum(values[-part:]) / part
        ok &= last < first
        print(f"check: loss of {name:16} {first:6.2f} -> {last:6.2f} {'fell' if last < first else 'DID NOT FALL'}")
    for what in ("random_mAP", "untrained_mAP"):
        means = [[row[what] for row in rows.values()] for rows in metrics["tasks"].values()]
        other = sum(sum(part) / len(part) for part in means) / len(means)
        better = metrics["mean_mAP"] > other
        ok &= better
        print(
            f"check: mean mAP {100 * metrics['mean_mAP']:.2f} % {'beats' if better else 'DOES NOT BEAT'} "
            f"{what.removesuffix('_mAP')} {100 * other:.2f} %"
        )
    return 0 if ok else 1


def _percent(value: float, width: int = 6) -> str:
    return f"{100 * value:{width}.2f}"
