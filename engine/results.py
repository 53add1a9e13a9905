"""The results table, the paper's figures beside those protocols for which it tells which one it used; and the criteria
by which a run has learned something.
"""

from __future__ import annotations

import json
import math
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

LOSS = 0.25  # --check: the least share of mAP that exchanged queries cost


def is_real(data: str | Path) -> bool:
    """Whether the folder is not the drawn data: only then do the paper's figures stand beside ours."""
    return not os.path.exists(Path(data) / "mini.json")


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
    for name, count in metrics.get("missing", {}).items():
        lines.append(f"{name}: measured without {count:,} damaged test images")
    lines.append(f"mean mAP over tasks {100 * metrics['mean_mAP']:.2f} %")
    return "\n".join(lines)


@contextmanager
def whole_file(file: Path, mode: str = "w") -> Iterator[IO]:
    """Open `file` aside and give it its name when written: nobody ever reads half of it."""
    part = file.with_name(file.name + ".part")
    try:
        with part.open(mode) as stream:
            yield stream
        os.replace(part, file)
    except BaseException:
        part.unlink(missing_ok=True)  # on a full disk it is in the way of what comes after
        raise


def write_metrics(metrics: dict[str, Any], file: Path) -> None:
    with whole_file(file) as stream:
        stream.write(json.dumps(metrics, indent=1) + "\n")


def print_check(metrics: dict[str, Any], log: Path) -> int:
    """Exit code of --check: 0 when every criterion of `learned` holds, else 1. Prints each with its bar and value."""
    ok = True
    for passed, line in learned(metrics, log):
        ok &= passed
        print(f"check: {'pass' if passed else 'FAIL'}  {line}")
    return 0 if ok else 1


def learned(metrics: dict[str, Any], log: Path) -> Iterator[tuple[bool, str]]:
    """Whether a run learned something: (holds, sentence) per criterion. Figures are means over a task's protocols.

    - the training loss of every stream fell (mean of its first fifth against its last);
    - the gain (mAP - b) / (1 - b), b = the better of a random ranking and the untrained network, reaches the task's;
    - mAP is above that of colour histograms and of pixels, wherever the query is a picture;
    - with another query's instruction, or picture, ctcc and li lose at least LOSS of their mAP.

    What should have been measured and was not (no --check or --baselines), or is NaN, fails.
    """
    losses: dict[str, list[float]] = {}
    for row in map(json.loads, log.read_text().splitlines()):
        for name, loss in zip(row["streams"], row["stream_loss"], strict=True):
            if loss is not None:  # a skipped step's
                losses.setdefault(name, []).append(loss)
    for name, values in sorted(losses.items()):
        part = max(1, len(values) // 5)
        first, last = sum(values[:part]) / part, sum(values[-part:]) / part
        yield last < first, f"loss of {name:16} {first:6.2f} -> {last:6.2f}, must fall"
    for task, rows in metrics["tasks"].items():
        gains = [_gain(row) for row in rows.values()]
        gain, bar = sum(gains) / len(gains), TASKS[task].gain
        yield gain >= bar, f"{task:4} gain over random and untrained {100 * gain:6.2f} %, at least {100 * bar:.0f} %"
    for task, rows in metrics["tasks"].items():
        if TASKS[task].instruction == "query":
            continue  # text has neither colours nor pixels
        value = _mean(rows, "mAP")
        for what in ("histogram", "pixel"):
            other = _mean(rows, f"{what}_mAP")
            yield value > other, f"{task:4} mAP {100 * value:6.2f} %, above {what}s' {100 * other:.2f} %"
    for task, rows in metrics["tasks"].items():
        if TASKS[task].instruction not in ("clothes", "description"):
            continue
        value = _mean(rows, "mAP")
        for what in ("instruction", "picture"):
            loss = 1 - _mean(rows, f"shuffled_{what}_mAP") / value if value else math.nan
            bar = 100 * LOSS
            yield loss >= LOSS, f"{task:4} loses {100 * loss:6.2f} % with another query's {what}, at least {bar:.0f} %"


def _gain(row: dict[str, Any]) -> float:
    if row["untrained_mAP"] is None:
        return math.nan
    base = max(row["random_mAP"], row["untrained_mAP"])
    return (row["mAP"] - base) / (1 - base) if base < 1 else math.nan


def _mean(rows: dict[str, Any], name: str) -> float:
    """Mean over protocols; NaN where one lacks the figure."""
    values = [row.get(name) for row in rows.values()]
    return math.nan if None in values else sum(values) / len(values)


def _percent(value: float, width: int = 6) -> str:
    return f"{100 * value:{width}.2f}"
