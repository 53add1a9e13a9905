"""Fixtures: one small drawn data set for the whole test run, and a way to run a recipe as users do."""

import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.config import ModelConfig
from engine.protocols import Metrics, score_trial

ROOT = Path(__file__).resolve().parent.parent

# The whole model, as small as it goes: for tests of everything around it.
SMALL = ModelConfig(
    name="small", image_size=(32, 16), patch=16, stem="conv", width=16, depth=1, heads=2, drop_path=0.0,
    clothes_size=(16, 16), picture_depth=1, text_depth=1, text_heads=2, text_tokens=16, instruction_width=16,
    fusion_depth=1, embed=8,
)  # fmt: skip


def pytest_configure() -> None:
    """Parallel test processes take a core each: threads that wait for each other on shared cores crawl."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    cores = sorted(os.sched_getaffinity(0))
    if worker and len(cores) > 1:
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


def one_hot(scores) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of queries and gallery whose inner products are these scores [Q, G]."""
    scores = torch.from_numpy(np.asarray(scores)).float()
    return torch.eye(len(scores)), scores.T.contiguous()


def score_similarities(trial, index, protocol, scores, **options) -> Metrics:
    """score_trial of given scores [Q, G], greater = more alike."""
    return score_trial(trial, index, protocol, *one_hot(scores), metric="ip", **options)


@pytest.fixture(scope="session")
def mini(tmp_path_factory) -> Path:
    """All ten data sets, small: 12 training and 6 test identities each. Shared by parallel test processes."""
    from engine.data.mini import write_mini

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    output = folder / "mini"
    write_mini(output, train_ids=12, test_ids=6, images_per_id=8)
    return output


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu are skipped where there is none. The longest come first: then parallel processes end alike."""
    import torch

    items.sort(key=lambda item: "test_resume" not in item.nodeid)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# Before a command: root, too, must not read what nobody may.
AS_USER = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []


@functools.cache
def server() -> subprocess.Popen:
    """tests/server.py, one for each test process, on that one's core."""
    command = [sys.executable, str(ROOT / "tests" / "server.py")]
    return subprocess.Popen(command, cwd=ROOT, env=clean(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def clean() -> dict[str, str]:
    """The environment of a recipe: no GPU, no rank, no path."""
    without = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return without | {"PYTHONPATH": "", "CUDA_VISIBLE_DEVICES": ""}


def recipe(*arguments: str | Path, ranks: int = 0, timeout: int = 300) -> subprocess.CompletedProcess:
    """`python ARGUMENTS...` from the checkout, without the launcher and with the libraries loaded (tests/server.py): as
    one rank that is told nothing, or as so many."""
    given = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [f"{folder}/out", f"{folder}/err"]
        request = {"arguments": given, "cwd": str(ROOT), "environment": clean(), "outputs": outputs}
        process = server()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(request | {"ranks": ranks, "timeout": timeout}) + "\n")
        process.stdin.flush()
        codes = json.loads(process.stdout.readline())
        said = [Path(file).read_text() for file in outputs]
    if codes is None:
        raise subprocess.TimeoutExpired(given, timeout, *said)
    return subprocess.CompletedProcess(given, next(filter(None, codes), 0), *said)


def start(*arguments: str | Path, timeout: int = 300, prefix: Sequence[str] = ()) -> subprocess.CompletedProcess:
    """`python ARGUMENTS...` from the checkout, from the start."""
    return _run([*prefix, sys.executable, *map(str, arguments)], ROOT, timeout)


def launch(
    *arguments: str | Path, ranks: int = 1, cwd: Path = ROOT, timeout: int = 300, prefix: Sequence[str] = ()
) -> subprocess.CompletedProcess:
    """`deepspeed [--num_gpus N] ARGUMENTS...` from the checkout, output captured as text."""
    deepspeed = Path(sys.executable).parent / "deepspeed"
    command = [
        *prefix,
        str(deepspeed),
        "--num_gpus",
        str(ranks),
        "--master_port",
        str(free_port()),
        *map(str, arguments),
    ]
    return _run(command, cwd, timeout)


def forked(folder: Path, runs: list[dict]) -> str:
    """What these trainings said (tests/forked.py); their ranks must end with `codes`, by default 0."""
    file = folder / "runs.json"
    file.write_text(json.dumps(runs))
    done = recipe("tests/forked.py", file, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    for run, codes in zip(runs, json.loads(done.stdout), strict=True):
        assert codes == run.get("codes", [run.get("code", 0)] * run.get("ranks", 1)), done.stderr[-3000:]
    return done.stderr


def options(mini: Path, output: Path, stage: int = 0, **change) -> dict:
    return {"data": str(mini), "output": str(output), "deepspeed": {"zero_optimization": {"stage": stage}}, **change}


def _run(command: list[str], cwd: Path, timeout: int) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=cwd, env=clean(), capture_output=True, text=True, timeout=timeout)
