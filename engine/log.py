"""What a run writes while it trains: log.jsonl, TensorBoard curves, the progress bar, samples, damaged files."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from engine.config import TrainConfig
from engine.data.sampler import Sample
from engine.errors import writing
from engine.progress import Progress
from engine.runtime import Runtime


class Log:
    """log.jsonl, TensorBoard and the progress bar of rank 0; with log_samples also samples.rankN.jsonl of every rank.

    first: steps done before this process; lines of later ones are dropped. InputError where a file cannot be written.
    """

    def __init__(self, output: Path, config: TrainConfig, runtime: Runtime, first: int):
        self.output, self.runtime, self.samples = output, runtime, None
        with writing(output):
            if config.log_samples:
                _forget_after(output / f"samples.rank{runtime.rank}.jsonl", first)
                self.samples = (output / f"samples.rank{runtime.rank}.jsonl").open("a")
            if runtime.main:
                _forget_after(output / "log.jsonl", first)
                self.file = (output / "log.jsonl").open("a")
                _forget_after(output / "evaluations.jsonl", first)
                self.board = SummaryWriter(str(output / "tensorboard"), purge_step=first + 1)
                self.progress = Progress("training", config.steps, first, "step")

    def sample(self, step: int, sample: Sample) -> None:
        if self.samples:
            row = {"step": step + 1, "stream": sample.stream.name, "labels": sample.labels.tolist()}
            with writing(self.samples.name):
                print(json.dumps(row | {"rows": sample.rows.tolist()}), file=self.samples, flush=True)

    def step(self, row: dict[str, Any]) -> None:
        """One optimiser step. A number that is not finite is null in log.jsonl: JSON has none."""
        if not self.runtime.main:
            return
        with writing(self.file.name):
            print(json.dumps(_json(row)), file=self.file, flush=True)
        with writing(self.output / "tensorboard"):
            for name in ("loss", "lr", "grad_norm", "images_per_s", "data_wait_s"):
                self.board.add_scalar(f"train/{name}", row[name], row["step"])
            for name, value in row["terms"].items():
                self.board.add_scalar(f"terms/{name}", value, row["step"])
            for name, value in zip(row["streams"], row["stream_loss"], strict=True):
                self.board.add_scalar(f"streams/{name}", value, row["step"])
        self.progress.update(row["step"], f"loss {row['loss']:.3f}, {row['images_per_s']:.0f} images/s")

    def close(self) -> None:
        with writing(self.output):
            if self.samples:
                self.samples.close()
            if self.runtime.main:
                self.file.close()
                self.board.close()
                self.progress.close()


def evaluated(output: Path, step: int, metrics: dict[str, Any]) -> None:
    """Note one evaluation in evaluations.jsonl and TensorBoard, in place of what was noted of this step."""
    row = {"step": step, "mean_mAP": metrics["mean_mAP"], "tasks": metrics["tasks"]}
    with writing(output):
        _forget_after(output / "evaluations.jsonl", step - 1)
        with (output / "evaluations.jsonl").open("a") as file:
            print(json.dumps(_json(row)), file=file)
        with SummaryWriter(str(output / "tensorboard")) as board:
            board.add_scalar("test/mean_mAP", metrics["mean_mAP"], step)
    print(f"step {step}: mean mAP over tasks {100 * metrics['mean_mAP']:.2f} %", flush=True)


def is_evaluated(output: Path, step: int) -> bool:
    """Whether evaluations.jsonl has this step."""
    file = output / "evaluations.jsonl"
    return file.is_file() and any(_parsed(line).get("step") == step for line in file.read_text().splitlines())


def quarantine(file: Path, reasons: Mapping[Path, str], step: int) -> None:
    """Note damaged files (path -> why) in quarantine.jsonl, once each: any rank, now or before --resume, may have met
    them already. step: when they were met, from 1; 0: known from the index."""
    with writing(file), file.open("a+") as rows:
        fcntl.flock(rows, fcntl.LOCK_EX)
        rows.seek(0)
        noted = rows.read()
        known = {_parsed(line).get("path") for line in noted.splitlines()}
        if noted and not noted.endswith("\n"):  # cut by a kill
            rows.write("\n")
        for path, reason in reasons.items():
            if str(path) not in known:
                rows.write(json.dumps({"path": str(path), "reason": reason, "step": step}) + "\n")


def _forget_after(file: Path, step: int) -> None:
    """Drop log lines of steps that a resumed run will do again (and a line cut by a kill)."""
    if not file.is_file():
        return
    kept = [line for line in file.read_text().splitlines() if _parsed(line).get("step", math.inf) <= step]
    part = file.with_suffix(".part")
    part.write_text("".join(line + "\n" for line in kept))
    os.replace(part, file)


def _parsed(line: str) -> dict[str, Any]:
    """The row of a line; {} for a line that is none, or cut by a kill."""
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}


def _json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _json(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_json(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
