"""LTCC: 17,119 images of 152 people over two months, 12 cameras, 478 outfits.

    LTCC_ReID/{train,query,test}/000_1_c10_015833.png
    LTCC_ReID/clothes/{train,query,test}/000_1_c10_015833.png       OmniReID's crop or template of the clothes; optional

A name is identity from 0, outfit of that identity, camera 1-12, frame; the outfit key is "<pid>-<outfit>". `info`
(which identities change clothes) is not needed: the outfit keys say it. The paper trains on 9,423 of the 9,576 images;
which ones it leaves out is not stated.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from engine.data.datasets._base import DataSet, Files
from engine.data.record import Record

NAME = re.compile(r"([0-9]{1,9})_([0-9]{1,9})_c([0-9]{1,9})_[0-9]+(?i:\.png)")
FOLDERS = {"train": "train", "query": "query", "gallery": "test"}


def parse(root: Path) -> Iterator[Record]:
    files = Files(root)
    for split, folder in FOLDERS.items():
        for path, name in files.match(folder, NAME, "000_1_c10_015833.png"):
            pid, clothes, camera = map(int, name.groups())
            picture = files.find(f"clothes/{path}") or ""
            yield Record(path, pid, camera, split, clothes=f"{pid}-{clothes}", clothes_picture=picture)


DATASET = DataSet(
    name="ltcc",
    title="LTCC",
    folders=("LTCC_ReID", "LTCC-reID", "LTCC", "ltcc"),
    holds=("query", "test"),
    parse=parse,
    trains=("cc", "ctcc"),
    protocols={"cc": ("ltcc:general", "ltcc:cc", "ltcc:sc")},
    images={"train": 9_576, "query": 493, "gallery": 7_050},
    told=re.compile(r"[0-9]+_[0-9]+_c(?P<camera>[0-9]{1,9})_[^/]*$"),
)
