"""The results table, with the paper's figures beside those protocols for which the paper tells which one it used."""

from __future__ import annotations

from typing import Any

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


def _percent(value: float, width: int = 6) -> str:
    return f"{100 * value:{width}.2f}"
