"""What all benchmarks share: side-by-side timing, facts of the machine, tables, JSON rows, plots.

Rivals are run in turn, round after round, and compared within a round; medians over rounds are reported. So whatever
else the machine does hits all of them.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton

ROOT = Path(__file__).resolve().parent.parent
FLUSH_BYTES = 256 << 20  # more than any L2 cache holds


def arguments(parser: argparse.ArgumentParser, cpu_rounds: str) -> tuple[argparse.Namespace, torch.device]:
    """The command line with the options that all benchmarks of operators share, and the device asked for. cpu_rounds:
    how many there are on a CPU, in words."""
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU where there is one")
    parser.add_argument("--rounds", type=int, help=f"default: 30 on a GPU; on a CPU {cpu_rounds}")
    parser.add_argument("--json", type=Path, help="write everything there")
    parser.add_argument("--plot", type=Path, help="write a picture there")
    args = parser.parse_args()
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU; leave --device out")
    return args, device


def show(result: dict[str, Any], columns: Sequence[str], where: Sequence[str], file: Path | None) -> None:
    """Print the facts, the rows with the columns that they have, and what was left out where (columns)."""
    rows = result["rows"]
    print({key: value for key, value in result.items() if key != "rows"})
    if result["device"].startswith("CPU"):
        print("Times on a CPU: they tell which form is faster there, nothing about a GPU.")
    used = [column for column in columns if any(column in row for row in rows)]
    print(table([row for row in rows if "left_out" not in row], used))
    for row in rows:
        if "left_out" in row:
            place = ", ".join(f"{name} {row[name]}" for name in where)
            print(f"left out at {place}: {row['rival']}: {row['left_out']}")
    if file:
        print(f"written to {file}")


def facts(device: torch.device) -> dict[str, Any]:
    """Device, versions and commit, to go with every row."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
        name = f"CPU: {model}, {torch.get_num_threads()} threads"
    commit, changed = _git("rev-parse", "--short", "HEAD"), _git("status", "--porcelain", "-uno")
    return {
        "device": name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": (commit or os.environ.get("COMMIT", "unknown")) + ("+changes" if changed else ""),
    }


def _git(*arguments: str) -> str:
    """What git says; nothing where there is none, or no repository."""
    try:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def rounds(
    rivals: dict[str, Callable[[], Any]], device: torch.device, count: int, *, flush: bool = False
) -> dict[str, list[float]]:
    """Seconds of each rival in each of `count` rounds, after one round that does not count. On a GPU by events, with
    work queued before, so that the launches themselves are not what is timed; flush: empties the L2 cache first."""
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    buffer = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None
    for turn in range(count + 1):
        for name, run in rivals.items():
            took = _on_cpu(run) if buffer is None else _on_gpu(run, buffer, flush)
            if turn:
                seconds[name].append(took)
    return seconds


def _on_cpu(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _on_gpu(run: Callable[[], Any], buffer: torch.Tensor, flush: bool) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if not flush:
        run()  # its data is in the cache then, as far as it fits
    torch.cuda._sleep(3_000_000)
    if flush:
        buffer.zero_()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def ratios(seconds: dict[str, list[float]], ours: str) -> dict[str, float]:
    """Median over rounds of each rival's time to ours: 2.0 = it takes twice as long."""
    return {
        name: statistics.median(a / b for a, b in zip(times, seconds[ours], strict=True))
        for name, times in seconds.items()
    }


def beside(
    runs: dict[str, Callable[[], Any]], device: torch.device, count: int, *, ours: str, floor: str, **common: Any
) -> list[dict[str, Any]]:
    """A row for each rival, with `common` in it: median seconds, times relative to `floor` and to `ours`, and MiB at
    the peak beyond what is there before."""
    seconds = rounds(runs, device, count)
    to_ours, to_floor = ratios(seconds, ours), ratios(seconds, floor)
    return [
        {
            **common,
            "rival": name,
            "seconds": statistics.median(seconds[name]),
            f"to {floor}": to_floor[name],
            "to ours": to_ours[name],
            "MiB": peak_bytes(run, device) / 2**20,
        }
        for name, run in runs.items()
    ]


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Memory that a run needs at its peak beyond what is there before it: of the device, or on a CPU of the process."""
    run()
    if device.type != "cuda":
        ctypes.CDLL(None).malloc_trim(0)  # what is free already would hide what is taken
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        run()
        return resident("VmHWM") - before
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def resident(what: str) -> int:
    """Bytes of the process's memory: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(what))


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """Rows as aligned text; what a row lacks is "-"."""

    def text(value: Any) -> str:
        return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    cells = [list(columns), *([text(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


def write(file: Path | None, result: dict[str, Any]) -> None:
    """One JSON object; rows one to a line, so that versions can be compared."""
    if file is None:
        return
    head = {key: value for key, value in result.items() if key != "rows"}
    lines = ",\n".join(json.dumps(row) for row in result["rows"])
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'{json.dumps(head)[:-1]}, "rows": [\n{lines}\n]}}\n')


def bars(file: Path | None, groups: dict[str, dict[str, float]], title: str, axis: str) -> None:
    """Grouped bars of ratios: group -> name -> value. Says so and goes on where matplotlib is not installed."""
    if file is None:
        return
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("plot left out: matplotlib is not installed", file=sys.stderr)
        return
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    figure, axes = pyplot.subplots(figsize=(1.5 + 0.28 * len(groups) * (len(names) + 1), 4))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        places = [g + (i - (len(names) - 1) / 2) * width for g in range(len(groups))]
        axes.bar(places, [group.get(name, 0.0) for group in groups.values()], width, label=name)
    axes.set_xticks(range(len(groups)), list(groups), fontsize=8)
    values = [value for group in groups.values() for value in group.values()]
    if max(values, default=1) > 4 * min(values, default=1):  # ratios; near ones as lengths from 0
        axes.set_yscale("log")
    axes.axhline(1, color="black", linewidth=0.6)
    axes.set_ylabel(axis)
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    print(f"written to {file}")
