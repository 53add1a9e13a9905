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

TRAIN = re.compile(r"([ABC])_.*(?i:\.jpg)")
TEST = re.compile(r".*(?i:\.jpg)")
PERSON = re.compile(r"[0-9]{1,9}")


def parse(root: Path) -> Iterator[Record]:
    files = Files(root)
    rgb = "rgb/" if files.holds("rgb") else ""
    for split in ("train", "val"):
        for folder, person in files.folders(f"{rgb}{split}", PERSON, "001"):
            for path, name in files.match(folder, TRAIN, "A_cropped_rgb001.jpg"):
                yield _record(path, int(person[0]), name[1], split)
    for camera in "ABC":
        for folder, person in files.folders(f"{rgb}test/{camera}", PERSON, "001"):
            for path, _ in files.match(folder, TEST, "cropped_rgb001.jpg"):
                yield _record(path, int(person[0]), camera, "test")


def _record(path: str, pid: int, camera: str, split: str) -> Record:
    return Record(path, pid, "ABC".index(camera), split, clothes=f"{pid}{'C' if camera == 'C' else ''}")


DATASET = DataSet(
    name="prcc",
    title="PRCC",
    folders=("prcc", "PRCC"),
    holds=("rgb", "test"),
    parse=parse,
    trains=("cc",),
    protocols={"cc": ("prcc:single", "prcc:single:sc", "prcc:single_ac", "prcc:multi")},
    images={"train": 17_896, "val": 5_002, "test": 10_800},
    told=re.compile(r"(?:^|/)(?P<camera>[ABC])[_/][^/]*(?:/[^/]*)?$"),
)
