"""Market-1501: 32,668 outdoor images of 1,501 people, six cameras.

    Market-1501-v15.09.15/{bounding_box_train,query,bounding_box_test}/0002_c1s1_000451_03.jpg

A name is identity, camera 1-6, sequence, frame, box. In `bounding_box_test`, identity -1 (3,819 junk boxes) is left out
and 0000 (distractors) stays as identity 0, which no query has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from engine.data.datasets._base import DataSet, Files
from engine.data.record import Record

NAME = re.compile(r"(-1|[0-9]{4})_c([1-6])s[0-9]_[0-9]{6}_[0-9]{2}(?i:\.jpg)")
FOLDERS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}


def parse(root: Path) -> Iterator[Record]:
    files = Files(root)
    for split, folder in FOLDERS.items():
        for path, name in files.match(folder, NAME, "0002_c1s1_000451_03.jpg"):
            if name[1] != "-1":
                yield Record(path, int(name[1]), int(name[2]), split)


DATASET = DataSet(
    name="market1501",
    title="Market-1501",
    folders=("Market-1501-v15.09.15", "Market-1501", "market1501", "market"),
    holds=("bounding_box_train", "bounding_box_test"),
    parse=parse,
    trains=("trad",),
    protocols={"trad": ("market1501",)},
    images={"train": 12_936, "query": 3_368, "gallery": 15_913},
    told=re.compile(r"_c(?P<camera>[1-6])s[0-9]_"),
)
