"""PRCC: 33,698 images of 221 people, three cameras; a person wears the same outfit before A and B, another before C.

    prcc/rgb/{train,val}/001/A_cropped_rgb001.jpg
    prcc/rgb/test/{A,B,C}/001/cropped_rgb001.jpg

Cameras A, B, C are 0, 1, 2; outfits are "<pid>" (A, B) and "<pid>C". The protocols divide the test split themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from engine.data.datasets._base import DataSet, Files
from engine.data.record import Record

TRAIN = re.compile(r"([ABC])_.*\.jpg")
TEST = re.compile(r".*\.jpg")


def parse(root: Path) -> Iterator[Record]:
    files = Files(root)
    rgb = "rgb/" if (root / "rgb").is_dir() else ""
    for split in ("train", "val"):
        for pid in _people(files, f"{rgb}{split}"):
            for path, name in files.match(f"{rgb}{split}/{pid}", TRAIN, "A_cropped_rgb001.jpg"):
                yield _record(path, pid, name[1], split)
    for camera in "ABC":
        for pid in _people(files, f"{rgb}test/{camera}"):
            for path, _ in files.match(f"{rgb}test/{camera}/{pid}", TEST, "cropped_rgb001.jpg"):
                yield _record(path, pid, camera, "test")


def _people(files: Files, folder: str) -> list[str]:
    return [name for name in files.folders(folder) if name.isascii() and name.isdigit()]


def _record(path: str, pid: str, camera: str, split: str) -> Record:
    return Record(path, int(pid), "ABC".index(camera), split, clothes=f"{int(pid)}{'C' if camera == 'C' else ''}")


DATASET = DataSet(
    name="prcc",
    title="PRCC",
    folders=("prcc", "PRCC"),
    holds=("rgb", "test"),
    parse=parse,
    trains=("cc",),
    protocols={"cc": ("prcc:single", "prcc:single:sc", "prcc:single_ac", "prcc:multi")},
    images={"train": 17_896, "val": 5_002, "test": 10_800},
)
