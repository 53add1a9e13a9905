"""Files to batches: engine.data.pipeline beside what a user would otherwise run; and how long samplers take to start.

    python bench/loader.py                                three sizes of crops, bare and augmented
    python bench/loader.py --sizes 256x128 --rounds 9 --json bench/results/loader-cpu.json --plot loader.png
    python bench/loader.py --device cuda                  ours decodes there; the others' batches are copied there
    python bench/loader.py --startup                      until the first 10 samples, 10^4 to 5*10^6 images

Images a second, JPEG files (of the file system's cache) to float32 ImageNet-normalised batches of 128 at 256x128, each
reader with 2 workers or threads; reading ahead and what starts the workers lie outside what is timed. `bare` decodes,
resizes and normalises; `augmented` also flips (p 0.5), pads by 10 and crops, and erases (p 0.5, 2-40 %); `jittered`
varies the colours besides. Rivals: `Pillow`, torch's DataLoader with Pillow and torchvision's transforms of pictures;
`torchvision` and `simplejpeg`, the same with those decoders and the transforms on uint8 tensors, normalised batch by
batch, which is faster; `webdataset`, from tar shards, with its own decoding by Pillow or with simplejpeg. Each bare
batch must first be ours within 3 grey levels on average; otherwise exit code 1 and no figures. The people are drawn, at
128 rows, enlarged and made noisy: `bytes` is the mean size of a file.

--startup: seconds, and MiB of memory that is not shared with other processes (PSS), from the columns of identities,
which both are given, to the first 10 samples, each in a process of its own. `plain` is how samplers of P x K are mostly
written: it copies every identity's list of images, draws with replacement where there are too few, and lists the
images of the whole training (24,000 iterations of 32 x 4) before the first one.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count, cycle
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # run as a script: the checkout's root is where imports start
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import v2

from bench import measure, starts
from engine.data import drawing
from engine.data.index import Index
from engine.data.sampler import Sampler, make_streams

SIZES = {"128x64": (128, 64), "256x128": (256, 128), "384x160": (384, 160)}  # height, width of the files
OUT, BATCH, PADDING = (256, 128), 128, 10
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGES = 4  # of an identity
JITTER = 0.2  # strength
WORKERS = 2
AHEAD = 3 * WORKERS  # batches that any reader has ready at most, and some
FILES, BATCHES, ROUNDS = 1536, 12, 5  # files of a size; batches of a turn
QUICK_FILES, QUICK_BATCHES, QUICK_ROUNDS = 512, 4, 1
NEAR = 3.0  # grey levels
MODES = ("bare", "augmented", "jittered")
OURS, BASE = "ours", "Pillow"

INDEX_ROWS = (10_000, 100_000, 1_000_000, 5_000_000)
LIMIT = 60  # seconds of one start
STARTED = ("seconds", "MiB", "open s", "batch s", "records/s")


class Case(NamedTuple):
    """files: all pictures, in order, IMAGES of each person; shards: the same in tar files, one of each worker."""

    folder: Path
    files: list[Path]
    shards: list[Path]
    mode: str
    batch: int
    device: torch.device


Reader = Callable[[Case], Iterator[Tensor]]  # endless batches [B, 3, 256, 128]; bare ones in the order of the files


def write_files(folder: Path, size: tuple[int, int], number: int) -> list[Path]:
    """`number` JPEG files of drawn people, who are enlarged from 128 rows: drawing more takes longer than all else."""
    height, width = size
    generator = np.random.default_rng(0)
    style = drawing.Style(size=(width * 128 // height, 128))
    cameras = [drawing.make_camera(generator, style, (0, camera)) for camera in range(6)]
    files = []
    for person in range(-(-number // IMAGES)):
        gender = ("female", "male")[person % 2]
        who, outfit = drawing.make_person(generator, gender), drawing.make_outfit(generator, gender)
        for image in range(min(IMAGES, number - person * IMAGES)):
            camera = cameras[(person + image) % len(cameras)]
            shot = drawing.make_shot(generator, who, camera)
            drawn, _ = drawing.draw(who, outfit, camera, shot, generator)
            noise = 4 * generator.standard_normal((height, width, 1), np.float32)
            pixels = np.asarray(drawn.resize((width, height), Image.Resampling.BICUBIC)) + noise
            file = folder / f"{person:05d}_{image}.jpg"
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, quality=90)
            files.append(file)
    return files


def write_shards(folder: Path, files: Sequence[Path]) -> list[Path]:
    """The files in as many tar files as there are workers, each of which reads its own."""
    shards = []
    for worker in range(WORKERS):
        shards.append(folder / f"{worker:05d}.tar")
        with tarfile.open(shards[-1], "w") as shard:
            for file in files[worker * len(files) // WORKERS : (worker + 1) * len(files) // WORKERS]:
                shard.add(file, file.name)
    return shards


def augmenting(mode: str) -> list[v2.Transform]:
    """What users do between resizing and normalising, of pictures or uint8 tensors alike."""
    if mode == "bare":
        return []
    steps = [v2.RandomHorizontalFlip(0.5), v2.RandomCrop(OUT, padding=PADDING)]
    # hue in turns: ours is 30 degrees at strength 1
    return steps + [v2.ColorJitter(JITTER, JITTER, JITTER, JITTER / 12)] * (mode == "jittered")


def normalising() -> list[v2.Transform]:
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]


def erasing(inplace: bool = False) -> v2.Transform:
    return v2.RandomErasing(p=0.5, scale=(0.02, 0.4), inplace=inplace)


class OfPictures:
    """A Pillow image -> one normalised image."""

    def __init__(self, mode: str):
        last = [erasing()] * (mode != "bare")
        steps = [v2.Resize(OUT), *augmenting(mode), v2.PILToTensor(), *normalising(), *last]
        self.steps = v2.Compose(steps)

    def __call__(self, image: Image.Image) -> Tensor:
        return self.steps(image)


class OfTensors:
    """An uint8 image [3, h, w] -> [3, 256, 128] uint8; `collate` makes the batch and normalises it at once."""

    def __init__(self, mode: str):
        self.steps = v2.Compose([v2.Resize(OUT, antialias=True), *augmenting(mode)])
        self.normalise = v2.Compose(normalising())
        self.erase = erasing(inplace=True) if mode != "bare" else None

    def __call__(self, image: Tensor) -> Tensor:
        return self.steps(image)

    def collate(self, images: list[Tensor]) -> Tensor:
        batch = self.normalise(torch.stack(images))
        if self.erase:
            for image in batch:  # each its own rectangle
                self.erase(image)
        return batch


def by_pillow(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def by_torchvision(path: Path) -> Tensor:
    return decode_jpeg(read_file(str(path)), mode=ImageReadMode.RGB)


def by_simplejpeg(content: bytes) -> Tensor:
    return torch.from_numpy(simplejpeg.decode_jpeg(content)).permute(2, 0, 1)


def read_by_simplejpeg(path: Path) -> Tensor:
    return by_simplejpeg(path.read_bytes())


class Files(Dataset):
    def __init__(self, files: list[Path], decode: Callable[[Path], Any], transform: Callable[[Any], Tensor]):
        self.files, self.decode, self.transform = files, decode, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> Tensor:
        return self.transform(self.decode(self.files[number]))


def _loaded(loader: Any, device: torch.device) -> Iterator[Tensor]:
    for batch in loader:
        yield batch.to(device, non_blocking=True)


def _options(case: Case, transform: Any) -> dict[str, Any]:
    """Of a DataLoader; its workers run torch with one thread."""
    return {
        "batch_size": case.batch,
        "num_workers": WORKERS,
        "persistent_workers": True,
        "prefetch_factor": 2,
        "pin_memory": case.device.type == "cuda",
        "collate_fn": getattr(transform, "collate", default_collate),
    }


def _data_loader(case: Case, decode: Callable[[Path], Any], transform: Any) -> Iterator[Tensor]:
    # without an end: workers would stand still between epochs, which are short here
    endless = cycle(range(len(case.files)))
    loader = DataLoader(Files(case.files, decode, transform), sampler=endless, **_options(case, transform))
    return _loaded(loader, case.device)


def pillow(case: Case) -> Iterator[Tensor]:
    return _data_loader(case, by_pillow, OfPictures(case.mode))


def torchvision(case: Case) -> Iterator[Tensor]:
    return _data_loader(case, by_torchvision, OfTensors(case.mode))


def with_simplejpeg(case: Case) -> Iterator[Tensor]:
    return _data_loader(case, read_by_simplejpeg, OfTensors(case.mode))


def _web_loader(case: Case, decoded: Callable[[Any], Any], transform: Any) -> Iterator[Tensor]:
    import webdataset

    shards = webdataset.WebDataset([str(shard) for shard in case.shards], shardshuffle=False).repeat()
    samples = decoded(shards).to_tuple("jpg").map(partial(_first, transform))
    return _loaded(webdataset.WebLoader(samples, **_options(case, transform)), case.device)


def _first(transform: Callable[[Any], Tensor], sample: tuple[Any]) -> Tensor:
    return transform(sample[0])


def web_pillow(case: Case) -> Iterator[Tensor]:
    return _web_loader(case, lambda shards: shards.decode("pil"), OfPictures(case.mode))


def web_simplejpeg(case: Case) -> Iterator[Tensor]:
    return _web_loader(case, lambda shards: shards.map_dict(jpg=by_simplejpeg), OfTensors(case.mode))


def ours(case: Case) -> Iterator[Tensor]:
    return _ours(case, _indexed(case))


def ours_dali(case: Case) -> Iterator[Tensor]:
    return _ours(case, _indexed(case), decoder="dali")


def ours_packed(case: Case) -> Iterator[Tensor]:
    from engine.data.packing import pack

    index = _indexed(case)
    return _ours(case, Index.open_packed(index.dataset, pack(index, case.folder)))


def _indexed(case: Case) -> Index:
    """As `recipes/data.py index` leaves it: every file is held against its checksum."""
    from engine.data.checking import check

    names = [str(file.relative_to(case.folder)) for file in case.files]
    index = starts.index_of(np.arange(len(names)) // IMAGES, case.folder, path=names)
    return check(index, case.folder / "index.arrow")


def _ours(case: Case, index: Index, **options: Any) -> Iterator[Tensor]:
    """As training reads them: augmented, the engine's sampler chooses files and random numbers."""
    from engine.data.pipeline import PicturePipeline, Pictures, plain

    sampler = Sampler(make_streams([index], ("trad",)), seed=0, ids=case.batch // IMAGES, images_per_id=IMAGES)

    def source(number: int) -> Pictures:
        if case.mode == "bare":
            rows = np.arange(number * case.batch, (number + 1) * case.batch) % len(index)
            return plain([index.item(row) for row in rows.tolist()])
        sample = sampler.sample(number)
        pictures = plain([index.item(row) for row in sample.rows.tolist()])
        return pictures._replace(augmentation=sample.augmentation)

    pipeline = PicturePipeline(
        source,
        size=OUT,
        batch=case.batch,
        augment=case.mode != "bare",
        colour_jitter=JITTER if case.mode == "jittered" else 0.0,
        device=case.device,
        threads=WORKERS,
        **options,
    )
    return (pipeline.next() for _ in count())


# Ours comes last: it starts threads, and the others' workers are forked.
READERS: dict[str, Reader] = {
    BASE: pillow,
    "torchvision": torchvision,
    "simplejpeg": with_simplejpeg,
    "webdataset, Pillow": web_pillow,
    "webdataset, simplejpeg": web_simplejpeg,
    OURS: ours,
    "ours, packed": ours_packed,
    "ours, DALI": ours_dali,
}


def difference(found: Tensor, expected: Tensor) -> float:
    """Mean absolute difference of two normalised batches, in grey levels."""
    return float(((found - expected).abs().mean((0, 2, 3)).cpu() * torch.tensor(STD) * 255).mean())


def turn(reader: Iterator[Tensor], batches: int, device: torch.device) -> float:
    """Seconds of `batches` batches in the midst of many."""
    for _ in range(AHEAD):  # what was read ahead in the last turn
        next(reader)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(batches):
        next(reader)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - began
    time.sleep(AHEAD * seconds / batches)  # until it has read ahead all it may: the next one's turn is its own
    return seconds


def run(case: Case, rounds: int, batches: int, **common: Any) -> list[dict[str, Any]]:
    """A row for each reader."""
    readers: dict[str, Iterator[Tensor]] = {}
    firsts: dict[str, Tensor] = {}
    left_out: dict[str, str] = {}
    for name, make in READERS.items():
        try:
            readers[name] = make(case)
            firsts[name] = next(readers[name]).clone()
        except ImportError as error:
            readers.pop(name, None)
            left_out[name] = str(error).splitlines()[0]
    expected = firsts.get(OURS, firsts[BASE])
    for name, first in firsts.items():
        if first.shape != expected.shape or first.dtype != torch.float32:
            sys.exit(f"{name} yields {tuple(first.shape)} {first.dtype}; no figures")
        if case.mode == "bare" and not (levels := difference(first, expected)) < NEAR:
            sys.exit(f"{name} differs from ours by {levels:.1f} grey levels; no figures")
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(rounds):
        for name, reader in readers.items():
            seconds[name].append(turn(reader, batches, case.device))
    to_base = measure.ratios(seconds, BASE)
    to_ours = measure.ratios(seconds, OURS) if OURS in seconds else {}
    rows = []
    for name in READERS:
        row = {**common, "case": case.mode, "rival": name}
        if name in left_out:
            rows.append(row | {"left_out": left_out[name]})
            continue
        row["images/s"] = case.batch * batches / statistics.median(seconds[name])
        row[f"to {BASE}"] = to_base[name]
        rows.append(row | ({"to ours": to_ours[name]} if to_ours else {}))
    return rows


def read(sizes: Sequence[str], device: torch.device, rounds: int, files: int, batches: int) -> list[dict[str, Any]]:
    """All rows; colours are varied at one size only."""
    rows = []
    for name in sizes:
        with tempfile.TemporaryDirectory() as folder:
            paths = write_files(Path(folder), SIZES[name], files)
            shards = write_shards(Path(folder), paths)
            common = {"size": name, "files": files, "bytes": round(np.mean([path.stat().st_size for path in paths]))}
            for mode in MODES if SIZES[name] == OUT else MODES[:2]:
                gc.collect()  # the last pipeline holds itself; its threads must have ended where workers are forked
                rows += run(Case(Path(folder), paths, shards, mode, BATCH, device), rounds, batches, **common)
    return rows


def start(name: str, rows: int, limit: float = LIMIT) -> dict[str, Any]:
    """Seconds and MiB of one start in a fresh process, or why they are left out."""
    command = [sys.executable, str(Path(starts.__file__)), name, str(rows)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        line = process.stdout.readline()  # preparing is not limited
        if line == "prepared\n":
            try:
                line = process.communicate(timeout=limit)[0]
            except subprocess.TimeoutExpired:
                process.kill()
                return {"left_out": f"stopped after {limit:g} s"}
    return json.loads(line) if line else {"left_out": f"ended with exit code {process.returncode}"}


def startup(sizes: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """A row for each sampler and size, of medians; one that is stopped is not tried again."""
    rows = []
    for images in sizes:
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in starts.STARTS}
        for _ in range(rounds):
            for name, done in found.items():
                if not done or "left_out" not in done[-1]:
                    done.append(start(name, images))
        for name, done in found.items():
            row = {"rows": images, "identities": int(starts.identities_of(images)[-1]) + 1, "rival": name}
            if "left_out" in done[-1]:
                rows.append(row | {"left_out": done[-1]["left_out"]})
            else:
                rows.append(row | {key: statistics.median(item[key] for item in done) for key in done[0]})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="height x width of the files")
    parser.add_argument("--quick", action="store_true", help="few files, one round")
    parser.add_argument("--startup", action="store_true", help="samplers' start instead")
    args, device = measure.arguments(parser, f"{ROUNDS}, {QUICK_ROUNDS} with --quick; --startup: 3")
    torch.set_num_threads(min(WORKERS, torch.get_num_threads()))
    groups: dict[str, dict[str, float]] = {}
    if args.startup:
        rows = startup(INDEX_ROWS[:2] if args.quick else INDEX_ROWS, args.rounds or (QUICK_ROUNDS if args.quick else 3))
        result = {"benchmark": "loader, startup", **measure.facts(torch.device("cpu")), "rows": rows}
        columns, where, group, value = ["rows", "identities", "rival", *STARTED], ["rows"], ["rows"], "seconds"
        title, axis = "until the first 10 samples", "seconds"
    else:
        files, batches, rounds = (QUICK_FILES, QUICK_BATCHES, QUICK_ROUNDS) if args.quick else (FILES, BATCHES, ROUNDS)
        rows = read(args.sizes, device, args.rounds or rounds, files, batches)
        result = {"benchmark": "loader", **measure.facts(device), "workers": WORKERS, "rows": rows}
        columns = ["size", "bytes", "case", "rival", "images/s", f"to {BASE}", "to ours"]
        where, group, value = ["size", "case"], ["size", "case"], f"to {BASE}"
        title, axis = "files to batches of 256x128", f"time / time of the DataLoader with {BASE}"
    measure.write(args.json, result)
    measure.show(result, columns, where, args.json)
    for row in rows:
        if value in row:
            groups.setdefault("\n".join(str(row[key]) for key in group), {})[row["rival"]] = row[value]
    measure.bars(args.plot, groups, f"{title}, {result['device']}", axis)
    return 0


if __name__ == "__main__":
    sys.exit(main())
