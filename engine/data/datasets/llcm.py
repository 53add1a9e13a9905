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

from engine.data.datasets._base import UNPACK, DataSet, Files, lines, path_and_number, whole
from engine.data.record import MODALITIES, Record
from engine.errors import InputError

TRAIN = re.compile(r"[0-9]{4}_c([0-9]{2})_.*\.jpg")
CAMERA = re.compile(r"cam([0-9]+)")


def parse(root: Path) -> Iterator[Record]:
    files = Files(root)
    for modality in MODALITIES:
        records = []
        for where, listed, label in path_and_number(root / "idx" / f"train_{modality}.txt"):
            path = files.listed(where, listed, f"{modality}/{listed}")
            name = TRAIN.fullmatch(Path(path).name)
            if name is None:
                raise InputError(f"{where}: expected a name like 0001_c01_s001000_f0000_{modality}.jpg, got {listed!r}")
            records.append(Record(path, label, int(name[1]), "train", modality=modality))
        yield from sorted(records)
    people = _test_people(root / "idx" / "test_id.txt")
    for modality in MODALITIES:
        records = []
        for camera in files.folders(f"test_{modality}"):
            if number := CAMERA.fullmatch(camera):
                for pid in people:
                    folder = f"test_{modality}/{camera}/{pid:04d}"
                    images = [f"{folder}/{name}" for name in files.names(folder) if name.endswith(".jpg")]
                    records += [Record(image, pid, int(number[1]), "test", modality=modality) for image in images]
        if not records:
            raise InputError(f"{root}/test_{modality}: no image of the identities in idx/test_id.txt; {UNPACK}")
        yield from records


def _test_people(file: Path) -> list[int]:
    for where, line in lines(file):
        return sorted({whole(where, number) for number in line.split(",") if number.strip()})
    raise InputError(f"{file}: empty; {UNPACK}")


DATASET = DataSet(
    name="llcm",
    title="LLCM",
    folders=("LLCM", "llcm"),
    holds=("idx", "test_vis"),
    parse=parse,
    trains=("vi",),
    protocols={"vi": ("llcm:vis2ir", "llcm:ir2vis", "llcm:vis2ir:2023-06", "llcm:ir2vis:2023-06")},
    images={"train": 30_921, "test": 13_909},
)
