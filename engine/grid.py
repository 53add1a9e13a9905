"""Trainings one after another, each a subprocess with a folder of its own, in as many sittings as it takes.

A run is finished when its metrics.json is there (it is written whole). Called again, finished runs are passed over, one
that was stopped goes on from its checkpoint, and one that never came to a checkpoint begins anew. `run.json` in the
folder tells what the run was started with: a folder of other options is refused.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

from engine.errors import InputError, writing
from engine.progress import Progress
from engine.results import whole_file

TERMINATED = 143
TAIL = 15  # lines shown of a run that failed
LATER = ("resume", "output", "workers")  # fields of a configuration that may change between sittings


class Run(NamedTuple):
    """command: `deepspeed ... --output FOLDER`; facts: JSON values of everything that decides the result."""

    folder: Path
    command: tuple[str, ...]
    facts: Mapping[str, Any]
    steps: int

    @property
    def name(self) -> str:
        return self.folder.name


def metrics(run: Run) -> dict[str, Any] | None:
    """What a finished run measured."""
    try:
        return json.loads((run.folder / "metrics.json").read_text())
    except (OSError, ValueError):
        return None


def begun(run: Run) -> bool:
    """Whether it left a checkpoint to go on from."""
    return any((run.folder / "checkpoints").glob("step-*/state.json"))


def check(run: Run) -> None:
    """InputError where the folder holds something else than this run."""
    if not os.path.isdir(run.folder) or not any(run.folder.iterdir()):
        return
    known = _record(run)
    if known is None:
        raise InputError(f"{run.folder}: holds something that this recipe did not begin; choose another --output")
    before, now = dict(_flat(known["facts"])), dict(_flat(run.facts))
    for name in before.keys() & now.keys():
        if before[name] != now[name]:
            raise InputError(
                f"{run.folder}: was begun with {name} {before[name]}, now it is {now[name]}; give the same options or "
                "choose another --output"
            )


def run_all(runs: Sequence[Run], output: Path, most: int | None, after: Callable[[], None]) -> int:
    """Run what is not finished, at most `most` of them; `after` each that finishes. Exit code: 0, 1 where one failed,
    143 when asked to end by SIGTERM or SIGINT: the run at work has then saved."""
    for run in runs:
        check(run)
    with writing(f"--output {output}"):
        output.mkdir(parents=True, exist_ok=True)
    with _alone(output) as lock, _Ending() as ending:
        waiting = [run for run in runs if metrics(run) is None]
        failed = []
        for place, run in enumerate(waiting[:most]):
            print(f"[{len(runs) - len(waiting) + place + 1}/{len(runs)}] {run.name}{_left(runs)}", flush=True)
            code = _train(run, ending, lock)
            if metrics(run) is not None:
                after()
            elif not ending.asked:
                failed.append(run.name)
                why = f"exit code {code}" if code else "it tested nothing"
                print(f"{run.name} failed ({why}); {run.folder}/output.txt ends with\n{_tail(run)}", flush=True)
            if ending.asked:
                print("stopped; the same command goes on from here", flush=True)
                return TERMINATED
    unfinished = sum(metrics(run) is None for run in runs)
    if failed:
        print(f"failed: {', '.join(failed)}; the same command tries again")
    elif unfinished:
        print(f"{unfinished} of {len(runs)} trainings are left; the same command goes on")
    return 1 if failed else 0


def _train(run: Run, ending: _Ending, lock: IO) -> int:
    """Begin a run or go on with it; its exit code."""
    resume = ["--resume"] if begun(run) else []
    if not resume:
        shutil.rmtree(run.folder, ignore_errors=True)  # `check` knows it for ours; nothing in it can be used
    earlier = (_record(run) or {}).get("seconds", 0.0)
    began = time.monotonic()
    with writing(run.folder):
        run.folder.mkdir(parents=True, exist_ok=True)
        _write_record(run, earlier)
    # a session of its own: Ctrl-C on the terminal must not reach the ranks, and they end by SIGTERM, saving
    with writing(run.folder), (run.folder / "output.txt").open("ab") as said:
        command = [*launcher(), *run.command[1:], *resume]
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True, pass_fds=(lock.fileno(),),
        )  # fmt: skip
    first, progress = _step(run), None
    with ending.of(process):
        while process.poll() is None:
            time.sleep(0.5)
            if progress is None and _step(run) != first:  # now it trains: starting up is no part of the rate
                progress = Progress(run.name, run.steps, _step(run), unit="step", every=60)
            if progress is not None:
                progress.update(min(_step(run), run.steps - 1))
    if progress is not None:
        progress.close()
    with writing(run.folder):
        _write_record(run, earlier + time.monotonic() - began)
    return process.returncode


def launcher() -> list[str]:
    """The `deepspeed` command of this Python, with a port that is free."""
    from engine.runtime import free_port

    return [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", str(free_port())]


class _Ending:
    """SIGTERM and SIGINT while runs are at work: the first has the ranks save and end, the second kills them."""

    def __init__(self) -> None:
        self.asked = 0
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> _Ending:
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    @contextmanager
    def of(self, process: subprocess.Popen) -> Iterator[None]:
        """What a signal ends meanwhile. Leaves nothing of it behind: ranks whose command was killed save and end."""
        self.process = process
        if self.asked:
            self._end()
        yield
        self.process = None
        with suppress(ProcessLookupError):
            for _ in range(150):
                os.killpg(process.pid, 0)
                time.sleep(0.2)
            os.killpg(process.pid, signal.SIGKILL)

    def _note(self, *_: Any) -> None:
        self.asked += 1
        if self.process is not None:
            self._end()

    def _end(self) -> None:
        """The `deepspeed` command passes no signal on, and its launcher gives ranks 30 seconds only: so the ranks."""
        assert self.process is not None
        ranks = [rank for launcher in _children(self.process.pid) for rank in _children(launcher)]
        if self.asked > 1 or not ranks:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.kill(rank, signal.SIGTERM)


def _children(process: int) -> list[int]:
    try:
        return [int(number) for number in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


@contextmanager
def _alone(output: Path) -> Iterator[IO]:
    """One process at a time. Runs inherit the lock, so that one whose recipe was killed keeps it while it lives."""
    with writing(f"--output {output}"):
        lock = (output / ".lock").open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"--output {output}: another process, or a run that it left, is at work there") from None
        yield lock


def _record(run: Run) -> dict[str, Any] | None:
    try:
        known = json.loads((run.folder / "run.json").read_text())
        return known if isinstance(known.get("facts"), dict) else None
    except (OSError, ValueError, AttributeError):
        return None


def _write_record(run: Run, seconds: float) -> None:
    values = {"command": list(run.command), "facts": run.facts, "seconds": round(seconds, 1)}
    with whole_file(run.folder / "run.json") as stream:
        stream.write(json.dumps(values, indent=1) + "\n")


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and name == "model":
            yield from _flat(value, f"{name}.")
        elif name not in LATER:
            yield prefix + name, value


def _left(runs: Sequence[Run]) -> str:
    """Time left, from the runs that are finished."""
    seconds = [record["seconds"] for run in runs if metrics(run) is not None and (record := _record(run))]
    if not seconds:
        return ""
    left = sum(seconds) / len(seconds) * (len(runs) - len(seconds))
    return f", about {left / 60:.0f} min left for all" if left < 7200 else f", about {left / 3600:.1f} h left for all"


def _step(run: Run) -> int:
    """Steps done, from the end of its log."""
    try:
        with (run.folder / "log.jsonl").open("rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - 20_000))
            return json.loads(log.read().splitlines()[-1])["step"]
    except (OSError, ValueError, IndexError, KeyError):
        return 0


def _tail(run: Run) -> str:
    lines = (run.folder / "output.txt").read_text(errors="replace").splitlines()
    return "\n".join(f"  {line}" for line in lines[-TAIL:])
