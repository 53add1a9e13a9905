"""Sole owner of device, rank, world, process group and signals. Everyone else receives a `Runtime`."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from engine.errors import InputError

JOIN = timedelta(minutes=5)  # how long ranks wait for each other at the start
LONGEST = timedelta(minutes=60)  # a collective may take: rank 0 reads a data set while the others wait


@dataclass(frozen=True)
class Runtime:
    """Where this process runs. rank in 0..world-1; rank 0 writes the files. Ranks agree over `group`, which is on the
    CPU everywhere, so that no word between them waits for a GPU."""

    device: torch.device
    rank: int = 0
    world: int = 1
    group: Any = None

    @property
    def main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier(group=self.group)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank (every rank must ask)."""
        if self.world == 1:
            return flag
        value = torch.tensor([int(flag)])
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.group)
        return bool(value.item())

    def from_main(self, values: torch.Tensor | None) -> torch.Tensor:
        """Rank 0's tensor on every rank (the others' argument is ignored)."""
        if self.world == 1:
            assert values is not None
            return values
        shape = [None if values is None else (values.shape, values.dtype)]
        dist.broadcast_object_list(shape, src=0)
        assert shape[0] is not None
        values = torch.empty(shape[0][0], dtype=shape[0][1]) if values is None else values.contiguous()
        values = values.to(self.device)
        dist.broadcast(values, src=0)
        return values.cpu()

    def send(self, values: torch.Tensor) -> None:
        """To rank 0, which must `receive` it; float32."""
        dist.send(values.float().contiguous().to(self.device), dst=0)

    def receive(self, shape: tuple[int, ...], rank: int) -> torch.Tensor:
        """What another rank sends to rank 0: float32 of this shape, on the CPU."""
        values = torch.empty(shape, device=self.device)
        dist.recv(values, src=rank)
        return values.cpu()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around what one rank may fail at alone (a full disk, a damaged file): an InputError of any rank is raised on
        all of them, so that none waits for another for ever. Every rank must pass here; no collectives inside."""
        message = ""
        try:
            yield
        except InputError as error:
            if self.world == 1:
                raise
            message = str(error)
        if self.any(bool(message)):
            messages = [""] * self.world
            dist.all_gather_object(messages, message, group=self.group)
            raise InputError(next(filter(None, messages)))

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean over ranks of a tensor of numbers."""
        if self.world == 1:
            return values
        values = values.to(self.device)
        dist.all_reduce(values)
        return values / self.world


def pick_device(name: str) -> torch.device:
    """auto, cpu or cuda -> device of this process. InputError for cuda without a GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU here; use --device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def start(device_name: str) -> Runtime:
    """Join the process group (a group of one without a launcher) and claim the device. Call once per process."""
    device = pick_device(device_name)
    if "RANK" not in os.environ:  # started with plain python
        os.environ.update(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port())
        )
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:  # gradients of indexing are otherwise summed in the order in which threads come
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if not dist.is_initialized():
        _join("nccl" if device.type == "cuda" else "gloo")
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled now; gloo serves as well
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)  # finds the group
    apart = device.type == "cuda" and dist.get_world_size() > 1
    group = dist.new_group(backend="gloo", timeout=LONGEST) if apart else None
    return Runtime(device, dist.get_rank(), dist.get_world_size(), group)


def _join(backend: str) -> None:
    """The process group of all ranks. InputError where not all of them come, or rank 0 cannot have its port."""
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=JOIN))
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=LONGEST)
    except dist.DistError as error:
        what = " ".join(str(error).split())
        if "EADDRINUSE" in what:
            raise InputError(f"--master_port {port}: in use on {address}; choose another") from error
        came = re.search(r"(\d+)/(\d+) clients joined", what)
        if came:
            what = f"{came[1]} of {came[2]} ranks came within {JOIN.total_seconds():.0f} s"
        raise InputError(
            f"the ranks did not meet at {address}:{port} ({what[:200]}); is every machine of the hostfile up, with the "
            "same address and port?"
        ) from error


@contextmanager
def company(resumable: Callable[[], str]) -> Iterator[None]:
    """Around a run: a rank that was lost on the way ends the others with one line. resumable(): what is left of it."""
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        what = " ".join(str(error).split())
        if not isinstance(error, dist.DistError) and not LOST.search(what):
            raise
        raise InputError(f"another rank is gone ({what[:160]}); {resumable()}") from error


# What gloo and NCCL say when a rank does not answer any more.
LOST = re.compile(r"gloo|connection (closed|reset|refused)|socket (timeout|closed)|nccl", re.IGNORECASE)


class Termination:
    """Whether this process is asked to end: by SIGTERM, or because the `deepspeed` command that started it is gone.
    That command does not pass SIGTERM on, and its ranks would train on unseen."""

    def __init__(self) -> None:
        self.signalled = False
        self.before = signal.signal(signal.SIGTERM, self._note)
        self.command = _deepspeed_command()

    def asked(self) -> bool:
        return self.signalled or (self.command is not None and _parent(os.getppid()) != self.command)

    def restore(self) -> None:
        signal.signal(signal.SIGTERM, self.before)

    def _note(self, *_: Any) -> None:
        self.signalled = True


def _deepspeed_command() -> int | None:
    """Process number of the `deepspeed` command: it starts DeepSpeed's launcher, and that one starts the ranks."""
    launcher = os.getppid()
    if b"deepspeed.launcher.launch" not in _command_line(launcher):
        return None
    command = _parent(launcher)
    return command if b"deepspeed" in _command_line(command) else None


def _command_line(process: int) -> bytes:
    """Nothing where there is no such process: in a container the first one's parent is 0."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


def _parent(process: int) -> int:
    """Field 4 of stat; what comes before it may hold blanks but ends with a bracket. 0: there is no such process."""
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def seed_everything(seed: int) -> None:
    """Initial weights depend on this; sampling and augmentation do not (they are functions of seed and step)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
