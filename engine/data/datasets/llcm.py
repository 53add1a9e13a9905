"""LLCM: 46,767 visible and near-infrared images of 1,064 people at night, nine cameras.

    LLCM/{vis,nir}/0001/0001_c01_s001000_f0000_vis.jpg               train
    LLCM/{test_vis,test_nir}/cam1/0002/0002_c01_s001000_f0000_vis.jpg  test
    LLCM/idx/train_{vis,nir}.txt                                     path label
    LLCM/idx/test_id.txt                                             line 1: the test identities, comma-separated

Train images are those of the lists, with the lists' labels; test images are every image of the listed identities below
`cam1`-`cam9` (the folder names the camera; test_nir/cam3 is empty). The protocols divide the test split themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from engine.data.datasets._base import UNPACK, DataSet, Files, lines, once, path_and_number, whole
from engine.data.record import MODALITIES, Record
from engine.errors import InputError

TRAIN = re.compile(r"[0-9]{4}_c([0-9]{2})_.*(?i:\.jpg)")
TEST = re.compile(r".*(?i:\.jpg)")
CAMERA = re.compile(r"(?i:cam)([0-9]{1,9})")


def parse(root: Path) -> Iterator[Record]:
    files = Files(root)
    for modality in MODALITIES:
        records = []
        for where, listed, label in path_and_number(files.path(f"idx/train_{modality}.txt")):
            path = files.listed(where, listed, f"{modality}/{listed}")
            name = TRAIN.fullmatch(Path(path).name)
            if name is None:
                raise InputError(f"{where}: expected a name like 0001_c01_s001000_f0000_{modality}.jpg, got {listed!r}")
            records.append((where, Record(path, label, int(name[1]), "train", modality=modality)))
        yield from once(records)
    listed_people = files.path("idx/test_id.txt")
    people, seen = _test_people(listed_people), set[int]()
    for modality in MODALITIES:
        images = [
            Record(path, pid, int(number[1]), "test", modality=modality)
            for camera, number in files.folders(f"test_{modality}", CAMERA, "cam1")
            for pid in people
            for path, _ in files.match(f"{camera}/{pid:04d}", TEST)
        ]
        if not images:
            raise InputError(f"{root}/test_{modality}: no image of the identities in idx/test_id.txt; {UNPACK}")
        yield from images
        seen |= {image.pid for image in images}
    if missing := sorted(set(people) - seen):
        raise InputError(f"{listed_people}: lists identity {missing[0]}, of whom there is no image; {UNPACK}")


def _test_people(file: Path) -> list[int]:
    """Identities of the first line; of all lines where there is one on each."""
    rows = [(where, line.replace(",", " ").split()) for where, line in lines(file)]
    if not any(people for _, people in rows):
        raise InputError(f"{file}: empty; {UNPACK}")
    rows = rows[: len(rows) if len(rows[0][1]) == 1 else 1]
    return sorted({whole(where, number) for where, people in rows for number in people})


DATASET = DataSet(
    name="llcm",
    title="LLCM",
    folders=("LLCM", "llcm"),
    holds=("idx",),
    parse=parse,
    trains=("vi",),
    protocols={"vi": ("llcm:vis2ir", "llcm:ir2vis", "llcm:vis2ir:2023-06", "llcm:ir2vis:2023-06")},
    images={"train": 30_921, "test": 13_909},
    told=re.compile(r"_c(?P<camera>[0-9]{2})_[^/]*_(?P<modality>vis|nir)\.[^/]*$"),
)
