"""Trainings of a very small model, one after another, each in processes forked from this one: the libraries are loaded
once for all, and every run still is a process of its own that can be killed.

    forked.py RUNS    a JSON list of {"ranks": 1, "change": {TrainConfig fields}, "kill_at": steps, "after": seconds,
                      "kill": [ranks], "check": whether, "back": checkpoint}

kill_at   SIGKILL to all ranks, or these, so many seconds after this step, from the latest checkpoint on, was logged
check     that the latest checkpoint opens whole then
back      first go back to this checkpoint, and put aside what was evaluated

Prints a JSON list of what each run's ranks ended with: exit codes, or -9.
"""

import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

from conftest import SMALL

from engine import checkpoint, training
from engine.config import TrainConfig
from engine.errors import InputError

FIELDS = {
    "model": SMALL, "datasets": ("market1501", "cuhk_pedes"), "tasks": ("trad", "t2i"), "ids": 4, "images_per_id": 2,
    "lr": 1e-3, "lr_start": 1e-3, "warmup": 0, "evaluate": False, "device": "cpu", "workers": 1, "steps": 40,
    "checkpoint_every": 5, "global_losses": False,
}  # fmt: skip


def config(change: dict) -> TrainConfig:
    return TrainConfig(**{**FIELDS, **change})


def start(change: dict, ranks: int) -> list[int]:
    """Fork the ranks of one training; their process numbers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(ranks):
        child = os.fork()
        if not child:
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
            os._exit(run(change))
        children.append(child)
    return children


def run(change: dict) -> int:
    os.dup2(2, 1)  # what a run prints is not this program's answer
    try:
        training.train(config(change))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except SystemExit as error:
        return int(error.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def opens(output: Path) -> bool:
    """In a process of its own: this one computes nothing, or its children could not."""
    child = os.fork()
    if not child:
        try:
            folder = checkpoint.latest(output / "checkpoints")
            checkpoint.verify(folder)
            checkpoint.load_model(folder)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def logged(file: Path, step: int) -> bool:
    """Whether a run, also one that is resumed and has dropped lines of its log before, has come to this step."""
    return file.exists() and f'{{"step": {step}, ' in file.read_text()


def main() -> None:
    results = []
    for item in json.loads(Path(sys.argv[1]).read_text()):
        ranks, change, kill_at = item.get("ranks", 1), item["change"], item.get("kill_at")
        done = checkpoint.latest(Path(change["output"]) / "checkpoints")
        if "back" in item:
            (Path(change["output"]) / "checkpoints" / "latest").write_text(item["back"])
            (Path(change["output"]) / "evaluations.jsonl").rename(Path(change["output"]) / "before.jsonl")
        children = start(change, ranks)
        if kill_at is not None:
            log = Path(change["output"]) / "log.jsonl"
            while not logged(log, kill_at + (int(done.name.split("-")[1]) if done else 0)):
                time.sleep(0.005)
            time.sleep(item.get("after", 0.0))
            for rank in item.get("kill", range(ranks)):
                os.kill(children[rank], signal.SIGKILL)
            if item.get("check"):
                assert opens(Path(change["output"]))
        results.append([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
    print(json.dumps(results))


if __name__ == "__main__":
    main()
