"""MSMT17 (V1): 126,441 images of 4,101 people, 15 indoor and outdoor cameras.

    MSMT17_V1/{train,test}/0000/0000_000_01_0303morning_0015_0.jpg
    MSMT17_V1/list_{train,val,query,gallery}.txt        0000/0000_000_01_0303morning_0015_0.jpg 0

List paths are relative to `train` (train, val) or `test` (query, gallery); the third field of a name is the camera.
Test identities are numbered from 0 again. The paper trains on list_train alone. V2 (faces blurred) scores lower, so its
folders are refused rather than reported under this name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from engine.data.datasets._base import DataSet, Files, once, path_and_number
from engine.data.record import Record
from engine.errors import InputError

NAME = re.compile(r"[0-9]+_[0-9]+_([0-9]{2})_.*(?i:\.jpg)")
FOLDERS = {"train": "train", "val": "train", "query": "test", "gallery": "test"}


def parse(root: Path) -> Iterator[Record]:
    files = Files(root)
    if files.holds("mask_train_v2") and not files.holds("train"):
        raise InputError(f"{root}: this is MSMT17_V2 (blurred faces), whose results do not compare; expected MSMT17_V1")
    for split, folder in FOLDERS.items():
        records = []
        for where, listed, pid in path_and_number(files.path(f"list_{split}.txt")):
            path = files.listed(where, f"{folder}/{listed}")
            name = NAME.fullmatch(Path(path).name)
            if name is None:
                raise InputError(f"{where}: expected a name like 0000_000_01_0303morning_0015_0.jpg, got {listed!r}")
            records.append((where, Record(path, pid, int(name[1]), split)))
        yield from once(records)


DATASET = DataSet(
    name="msmt17",
    title="MSMT17",
    folders=("MSMT17_V1", "MSMT17", "msmt17", "msmt"),
    holds=("list_train.txt", "list_query.txt", "mask_train_v2"),
    parse=parse,
    trains=("trad",),
    protocols={"trad": ("msmt17",)},
    images={"train": 30_248, "val": 2_373, "query": 11_659, "gallery": 82_161},
    told=re.compile(r"[0-9]+_[0-9]+_(?P<camera>[0-9]{2})_[^/]*$"),
)
