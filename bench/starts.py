"""How long a sampler takes to start: one start in a process of its own, for `bench/loader.py --startup`.

    python bench/starts.py ours 100000                  a line when all is prepared, then {"seconds", "MiB"}

Without torch, so that the process is small and starts at once.
"""

from __future__ import annotations

import copy
import json
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: the checkout's root is where imports start
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from engine.data.datasets._base import DataSet
from engine.data.index import SCHEMA, Index
from engine.data.record import SPLITS
from engine.data.sampler import Sampler, make_streams

LARGEST = (328_604, 5_000_000)  # identities, images of the largest data set
P, K, ITERATIONS, SAMPLES = 32, 4, 24_000, 10


def index_of(pid: NDArray[np.int64], root: Path, **columns: Sequence[Any]) -> Index:
    """An index of training images with these identities; columns that nothing here reads are left out."""
    constant = {"camera": 0, "split": SPLITS.index("train"), "clothes": -1, "modality": 0}
    arrays = {name: np.full(len(pid), value) for name, value in constant.items()} | {"pid": pid} | columns
    fields = [field for field in SCHEMA if field.name in arrays]
    table = pa.table([pa.array(arrays[field.name], type=field.type) for field in fields], schema=pa.schema(fields))
    dataset = DataSet("drawn", "drawn", (), (), lambda root: iter(()), trains=("trad",), protocols={}, images={})
    return Index(dataset, root, table)


def identities_of(rows: int) -> NDArray[np.int64]:
    """[rows] identities, each one's images side by side, as many to one as in the largest data set."""
    return np.arange(rows) * (rows * LARGEST[0] // LARGEST[1]) // rows


class PlainSampler:
    """`indices`: image numbers of all batches of a training, ids x images each, epoch after epoch, in one list."""

    def __init__(self, pids: Sequence[int], ids: int, images: int, batches: int):
        self.of_identity: dict[int, list[int]] = defaultdict(list)
        for image, pid in enumerate(pids):
            self.of_identity[pid].append(image)
        if len(self.of_identity) < ids:
            raise ValueError(f"{len(self.of_identity)} identities, {ids} are needed")
        self.indices: list[int] = []
        while len(self.indices) < batches * ids * images:
            self._add_epoch(ids, images, batches * ids * images)

    def _add_epoch(self, ids: int, images: int, most: int) -> None:
        chunks: dict[int, list[list[int]]] = {}
        for pid, own in self.of_identity.items():
            numbers = copy.deepcopy(own)
            if len(numbers) < images:
                numbers = np.random.choice(numbers, size=images, replace=True).tolist()
            random.shuffle(numbers)
            whole = len(numbers) // images * images  # the rest waits for another epoch
            chunks[pid] = [numbers[begin : begin + images] for begin in range(0, whole, images)]
        left = list(chunks)
        while len(left) >= ids and len(self.indices) < most:
            places = random.sample(range(len(left)), ids)
            for place in places:
                self.indices.extend(chunks[left[place]].pop())
            for place in sorted(places, reverse=True):  # list.remove would take time in the number of identities
                if not chunks[left[place]]:
                    left[place] = left[-1]
                    left.pop()


def start_plain(rows: int) -> Callable[[], Any]:
    pids = identities_of(rows).tolist()

    def begin() -> Any:
        sampler = PlainSampler(pids, P, K, ITERATIONS)
        return sampler, [sampler.indices[step * P * K : (step + 1) * P * K] for step in range(SAMPLES)]

    return begin


def start_ours(rows: int) -> Callable[[], Any]:
    index = index_of(identities_of(rows), Path())

    def begin() -> Any:
        sampler = Sampler(make_streams([index], ("trad",)), seed=0, ids=P, images_per_id=K)
        return sampler, [sampler.sample(step) for step in range(SAMPLES)]

    return begin


def start_mapped(rows: int) -> Callable[[], Any]:
    """The place of a stored index: written here, memory-mapped by what is returned."""
    raise NotImplementedError("no index is stored with what a sampler needs yet")


# rows -> (not timed) what begins: its result is what has to be in memory to go on
STARTS: dict[str, Callable[[int], Callable[[], Any]]] = {
    "plain": start_plain,
    "ours": start_ours,
    "ours, stored index": start_mapped,
}


def _pss() -> int:
    """Bytes of this process, of shared pages its share."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


def main() -> int:
    name, rows = sys.argv[1], int(sys.argv[2])
    try:
        begin = STARTS[name](rows)
    except NotImplementedError as error:
        print(json.dumps({"left_out": str(error)}))
        return 0
    print("prepared", flush=True)
    before, began = _pss(), time.perf_counter()
    kept = begin()
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "MiB": (_pss() - before) / 2**20}))
    del kept
    return 0


if __name__ == "__main__":
    sys.exit(main())
