"""Runs programs for the tests as `python PROGRAM ARGUMENTS...` would, each in a process forked from this one, which has
loaded the libraries: loading them takes longer than most of what is tested.

Each line read is a JSON object {"arguments": [PROGRAM, ...], "cwd": FOLDER, "environment": {}, "ranks": N,
"outputs": [FILE, FILE], "timeout": seconds}; ranks 0: one process that is told no rank. Each line answered is the
processes' exit codes (-9: by SIGKILL), or null when time ran out. Tests of the start itself, of signals and of the
launcher start Python anew.
"""

import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import time
from pathlib import Path

LOADED = (
    "deepspeed", "engine.evaluation", "engine.export", "engine.training", "timm", "torch.utils.tensorboard",
    "transformers.models.bert.modeling_bert",
)  # fmt: skip


def begin(request: dict, rank: int, port: int) -> str:
    """In the new process: the program to run."""
    os.setsid()
    for file, descriptor in zip((os.devnull, *request["outputs"]), range(3), strict=True):
        opened = os.open(file, os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ |= request["environment"]
    if world := request["ranks"]:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
        os.environ |= {"MASTER_ADDR": "127.0.0.1"} | {key: str(value) for key, value in place.items()}
    sys.argv = request["arguments"]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    return sys.argv[0]


def ended(children: list[int], timeout: float) -> list[int] | None:
    """Exit codes; None after the time is over and all are killed. When one fails the others are asked to end, as
    launchers do."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + timeout
    while len(codes) < len(children):
        if time.monotonic() > deadline:
            for child in children:
                if child not in codes:
                    os.killpg(child, signal.SIGKILL)
                    os.waitpid(child, 0)
            return None
        for child in children:
            if child not in codes:
                pid, status = os.waitpid(child, os.WNOHANG)
                if pid:
                    codes[child] = os.waitstatus_to_exitcode(status)
                    if codes[child]:
                        for other in set(children) - set(codes):
                            os.kill(other, signal.SIGTERM)
        time.sleep(0.01)
    return [codes[child] for child in children]


def serve(answers: int) -> str | None:
    """None at the end of the requests; in each new process the program to run."""
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        children = []
        for rank in range(max(1, request["ranks"])):
            child = os.fork()
            if not child:
                os.close(answers)
                return begin(request, rank, port)
            children.append(child)
        os.write(answers, json.dumps(ended(children, request["timeout"])).encode() + b"\n")
    return None


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    to = os.dup(1)
    os.dup2(2, 1)  # what libraries print when they are loaded is no answer
    for module in LOADED:
        importlib.import_module(module)
    gc.freeze()  # what is shared stays so
    program = serve(to)
    if program is not None:
        runpy.run_path(program, run_name="__main__")
