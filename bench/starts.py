"""How long a sampler takes to start: one start in a process of its own, for `bench/loader.py --startup`.

    python bench/starts.py ours 100000                  a line when all is prepared, then {"seconds", "MiB"}

Without torch until the memory was measured, so that the process is small and starts at once.
"""

from __future__ import annotations

import atexit
import copy
import io
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
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
from engine.data.index import INDEX, Index, make_table
from engine.data.record import SPLITS
from engine.data.sampler import Sampler, make_streams

LARGEST = (328_604, 5_000_000)  # identities, images of the largest data set
P, K, ITERATIONS, SAMPLES = 32, 4, 24_000, 10
DRAWN = 2000  # samples of which the rate is taken
PICTURES, SENTENCES = 256, 100_000  # different ones of a stored index
STORED = "ours, stored index"


def dataset() -> DataSet:
    trains = ("trad", "t2i")
    return DataSet("drawn", "drawn", (), (), lambda root: iter(()), trains=trains, protocols={}, images={})


def index_of(pid: NDArray[np.int64], root: Path, **columns: Any) -> Index:
    """An index of training images with these identities."""
    path = columns.pop("path", None)
    if path is None:
        path = pa.repeat(pa.scalar("", pa.large_string()), len(pid))
    split = np.full(len(pid), SPLITS.index("train"))
    return Index(dataset(), root, make_table({"path": path, "pid": pid, "split": split, **columns}))


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


def write_index(rows: int, folder: Path) -> None:
    """A packed data set of so many images and two sentences each, all columns filled; its shard holds PICTURES images,
    which all rows lie upon in turn."""
    from PIL import Image

    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    encoded = []
    for _ in range(PICTURES):
        stream = io.BytesIO()
        coarse = Image.fromarray(generator.integers(0, 255, (16, 8, 3), dtype=np.uint8))
        coarse.resize((64, 128), Image.Resampling.BICUBIC).save(stream, "jpeg", quality=90)
        encoded.append(stream.getvalue())
    (folder / "0.tar").write_bytes(b"".join(encoded))
    sizes = np.array([len(content) for content in encoded])
    which = np.arange(rows) % PICTURES
    pid = identities_of(rows)
    sentences = pa.DictionaryArray.from_arrays(
        pa.array(generator.integers(0, SENTENCES, 2 * rows), pa.int32()),
        pa.array([f"A person in outfit {i}, seen from the side." for i in range(SENTENCES)], pa.large_string()),
    )
    columns = {
        "path": pa.array([f"Part{p % 11 + 1}/{p}/{row}.jpg" for row, p in enumerate(pid.tolist())], pa.large_string()),
        "captions": pa.LargeListArray.from_arrays(np.arange(0, 2 * rows + 1, 2), sentences),
        "bytes": sizes[which],
        "crc": np.array([zlib.crc32(content) for content in encoded])[which],
        "shard": np.zeros(rows, np.int32),
        "offset": np.concatenate([[0], np.cumsum(sizes)[:-1]])[which],
    }
    facts = {"shards": json.dumps(["0.tar"]), "sizes": json.dumps([int(sizes.sum())])}
    index_of(pid, folder, **columns).with_facts(**facts).save(folder / INDEX)


def start_mapped(rows: int) -> Callable[[], Any]:
    """An index that another process has written: opened by mapping; the stream is text-to-image's, which needs most."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    subprocess.run([sys.executable, __file__, "write", str(rows), str(folder / "drawn.packed")], check=True)

    def begin() -> Any:
        index = Index.open_packed(dataset(), folder / "drawn.packed")
        sampler = Sampler(make_streams([index], ("t2i",)), seed=0, ids=P, images_per_id=K)
        return sampler, [sampler.sample(step) for step in range(SAMPLES)]

    return begin


def further(sampler: Sampler, rows: int) -> dict[str, float]:
    """What a started sampler over a packed data set does further: seconds to open the index once more, records drawn a
    second by one core, and seconds to the first batch of pictures, the index opened anew."""
    index = sampler.streams[0].index

    def opened() -> Index:
        return Index.open_packed(index.dataset, index.root)

    began = time.perf_counter()
    opened()
    result = {"open s": time.perf_counter() - began}
    traditional = Sampler(make_streams([index], ("trad",)), seed=0, ids=P, images_per_id=K)
    began = time.process_time()
    for step in range(SAMPLES, SAMPLES + DRAWN):
        traditional.sample(step)
    result["records/s"] = DRAWN * P * K / (time.process_time() - began)

    import torch

    from engine.data.pipeline import PicturePipeline, plain

    began = time.perf_counter()
    index = opened()
    again = Sampler(make_streams([index], ("trad",)), seed=0, ids=P, images_per_id=K)

    def source(number: int) -> Any:
        drawn = again.sample(number)
        return plain([index.item(row) for row in drawn.rows])._replace(augmentation=drawn.augmentation)

    device = torch.device("cpu")
    images = PicturePipeline(source, size=(256, 128), batch=P * K, augment=True, device=device).next()
    result["batch s"] = time.perf_counter() - began
    assert images.shape == (P * K, 3, 256, 128)
    return result


# rows -> (not timed) what begins: its result is what has to be in memory to go on
STARTS: dict[str, Callable[[int], Callable[[], Any]]] = {
    "plain": start_plain,
    "ours": start_ours,
    STORED: start_mapped,
}


def _pss() -> int:
    """Bytes of this process, of shared pages its share."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


def main() -> int:
    name, rows = sys.argv[1], int(sys.argv[2])
    if name == "write":
        write_index(rows, Path(sys.argv[3]))
        return 0
    begin = STARTS[name](rows)
    print("prepared", flush=True)
    before, began = _pss(), time.perf_counter()
    kept = begin()
    seconds = time.perf_counter() - began
    grown = (_pss() - before) / 2**20
    more = further(kept[0], rows) if name == STORED else {}
    print(json.dumps({"seconds": seconds, "MiB": grown, **more}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
