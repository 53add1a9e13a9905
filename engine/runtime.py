"""Sole owner of device, rank, world and process group. Everyone else receives a `Runtime`."""

from __future__ import annotations

import os
import random
import socket
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from engine.errors import InputError


@dataclass(frozen=True)
class Runtime:
    """Where this process runs. rank in 0..world-1; rank 0 writes the files."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank (every rank must ask)."""
        if self.world == 1:
            return flag
        value = torch.tensor([int(flag)], device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def agree(self, error: InputError | None) -> None:
        """Raise the first rank's error on every rank, so that none is left waiting (every rank must ask)."""
        if self.world == 1:
            if error is not None:
                raise error
            return
        lines: list[str | None] = [None] * self.world
        dist.all_gather_object(lines, None if error is None else str(error))
        for line in filter(None, lines):
            raise InputError(line) from error

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
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port())
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
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled now; gloo serves as well
        deepspeed.init_distributed(
            dist_backend="nccl" if device.type == "cuda" else "gloo",
            auto_mpi_discovery=False,
            verbose=False,
            timeout=timedelta(minutes=60),
        )
    return Runtime(device, dist.get_rank(), dist.get_world_size())


def seed_everything(seed: int) -> None:
    """Initial weights depend on this; sampling and augmentation do not (they are functions of seed and step)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
