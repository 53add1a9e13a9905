"""CUHK-PEDES: 40,206 images of 13,003 people from five data sets, about two sentences each.

    CUHK-PEDES/imgs/{cam_a,cam_b,CUHK01,CUHK03,Market,test_query,train_query}/*.{jpg,png,bmp}
    CUHK-PEDES/reid_raw.json        [{"split", "captions": [...], "file_path", "id", ...}]
    CUHK-PEDES/caption_all.json     the same without "split", in the order 34,054 train, 3,078 val, 3,074 test

`test_query` and `train_query` are sources, not splits. There are no camera numbers: all are 0. The paper trains on
28,566 of the 34,054 images: it leaves out those that are test images of Market-1501 or CUHK03. Which they are takes the
images' contents across data sets, so a parser cannot tell: all 34,054 are yielded, and an index that looked into the
images of all three (engine.data.checking) puts them aside.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from engine.data.datasets._base import DataSet, Files, once, read_json, sentences, short, whole
from engine.data.record import Record
from engine.errors import InputError

LISTS = ("reid_raw.json", "caption_all.json")
IMAGES = {"train": 34_054, "val": 3_078, "test": 3_074}


def parse(root: Path) -> Iterator[Record]:
    files, rows = Files(root), []
    for name in [name for name in LISTS if files.find(name)] or LISTS[:1]:
        file = files.path(name)
        entries = read_json(file)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise InputError(f"{file}: expected a list of {{file_path, captions, id, split}}")
        if divided := all("split" in entry for entry in entries):
            break
    if not divided:
        if len(entries) != sum(IMAGES.values()):
            raise InputError(
                f"{file}: no 'split', and {len(entries):,} entries instead of the {sum(IMAGES.values()):,} whose order "
                f"gives it; put a {LISTS[0]} with 'split' beside it"
            )
        order = [split for split, count in IMAGES.items() for _ in range(count)]
        entries = [{**entry, "split": split} for entry, split in zip(entries, order, strict=True)]
    for number, entry in enumerate(entries):
        where = f"{file}: entry {number}"
        try:
            listed, captions, pid, split = (entry[key] for key in ("file_path", "captions", "id", "split"))
        except KeyError as error:
            raise InputError(f"{where}: no {error}; copy the file again") from None
        if not (isinstance(split, str) and split in IMAGES):
            raise InputError(f"{where}: split is one of {', '.join(IMAGES)}, got {short(split)}")
        path = files.listed(where, f"imgs/{listed}")
        rows.append((where, Record(path, whole(where, pid), 0, split, captions=sentences(where, captions))))
    for split in IMAGES:
        yield from once(row for row in rows if row[1].split == split)


DATASET = DataSet(
    name="cuhk_pedes",
    title="CUHK-PEDES",
    folders=("CUHK-PEDES", "CUHK_PEDES", "cuhk_pedes", "cuhkpedes"),
    holds=LISTS,
    parse=parse,
    trains=("t2i",),
    protocols={"t2i": ("cuhk_pedes", "cuhk_pedes:cosine")},
    images=IMAGES,
    overlaps=("market1501", "cuhk03"),
    told=re.compile(""),
)
