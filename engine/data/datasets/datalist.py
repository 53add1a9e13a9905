"""The "datalist" layout of the released Instruct-ReID code, for every data set; read where the authors' layout is not.

    market/datalist/{train,query,gallery}.txt       image instruction pid clothes [camera]
    ltcc/datalist/{query,gallery}_{sc,cc,general}.txt
    CUHK-Pedes/{train,query,gallery}_t2i_v2.txt     the instruction is a key of caption_t2i_v2.json, {key: sentence}

Which data set it is follows from the folder's name. The lists lie in its `datalist` or in itself; paths are relative
to it. Of a split's lists, `query.txt` is read, else `query_general.txt`, else every `query_*.txt` (any case) together.
The instruction counts where sentences train (a key) and where clothes pictures do (a file; one and the same for all
training images is a placeholder and left out), the outfit where the data set trains clothes-changing. Identity -1 marks
junk boxes, which are left out.

Cameras: where every image's own name tells its camera, as the authors name them, that is taken, and results compare
with those of the authors' layout. Else the list's fifth column. Without one, a query's camera is -1 and a gallery
image's -2, as in the released code: no pair shares a camera, so that "same identity and camera is junk" makes no
positive junk (nor the easy ones of the query's own camera: such results are higher than the protocol's).
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from engine.data.datasets._base import (
    UNPACK,
    DataSet,
    Files,
    entries,
    fields,
    lines,
    once,
    read_json,
    sentences,
    whole,
)
from engine.data.record import Record
from engine.errors import InputError

COLUMNS = "image instruction pid clothes camera"
UNKNOWN_CAMERA = {"train": 0, "query": -1, "gallery": -2}
LIST = re.compile(r"(train|query|gallery)([_-].*)?\.txt", re.IGNORECASE)


class Row(NamedTuple):
    """One line of a list. The key joins lists: (image path, pid, clothes); clothes -1 = not annotated."""

    where: str
    key: tuple[str, int, int]
    camera: int | None
    instruction: str  # "" where the list has none


def records(dataset: DataSet, root: Path) -> Iterator[Record]:
    """Records of a data set's folder in its authors' layout or, where that is not there, of its datalists."""
    if dataset.told and not holds(root, dataset.holds) and has_lists(root):
        return iter(_parse(dataset, dataset.told, root))
    return dataset.parse(root)


def holds(folder: Path, names: tuple[str, ...]) -> bool:
    """Whether a folder holds one of these names (any case)."""
    return not {name.lower() for name in names}.isdisjoint(name.lower() for name in entries(folder))


def has_lists(folder: Path) -> bool:
    """Whether a folder has datalists."""
    return any(LIST.fullmatch(name) for at in (folder, *_datalists(folder)) for name in entries(at))


def rows(files: Files, path: str, part: str = "", columns: str = COLUMNS, skip_junk: bool = False) -> list[Row]:
    """Lines of a list. Images are looked for in `part`, in the root, and in the part's `images`.

    columns: their names; without "instruction" or "template" a line has four, else the camera may be missing or -1.
    """
    found, instructed = [], len(columns.split()) == 5
    for where, line in lines(files.path(path)):
        values = fields(line)
        if len(values) not in ((4, 5) if instructed else (4,)):
            raise InputError(f"{where}: expected '{columns}', got {len(values)} fields; put tabs between the fields")
        image, instruction = values[0], values.pop(1) if instructed else ""
        if skip_junk and values[1] == "-1":
            continue
        try:
            pid = whole(where, values[1])
            clothes, *camera = (None if value == "-1" else whole(where, value) for value in values[2:])
        except InputError as error:
            raise error if "\t" in line else InputError(f"{error}; put tabs between the fields") from None
        image = files.listed(where, posixpath.join(part, image), image, posixpath.join(part, "images", image))
        key = (image, pid, -1 if clothes is None else clothes)
        found.append(Row(where, key, camera[0] if camera else None, instruction))
    return found


def captions(files: Files, folder: str) -> dict[str, tuple[str, ...]]:
    """Caption key -> sentences, of every JSON in a folder."""
    known: dict[str, tuple[str, ...]] = {}
    for name in (name for name in files.names(folder) if name.lower().endswith(".json")):
        file = files.path(posixpath.join(folder, name))
        table = read_json(file)
        if not isinstance(table, dict):
            raise InputError(f"{file}: expected {{key: sentence}}")
        known.update({key: sentences(f"{file}: {key[:80]!r}", value) for key, value in table.items()})
    return known


def caption(files: Files, folder: str, known: dict[str, tuple[str, ...]], row: Row) -> tuple[str, ...]:
    """The sentences of a row's key; InputError where there are none."""
    if row.instruction not in known:
        at = files.root / folder
        raise InputError(f"{row.where}: no sentence for {row.instruction!r:.80} in {at}/*.json; copy the JSON there")
    return known[row.instruction]


def _parse(dataset: DataSet, told: re.Pattern[str], root: Path) -> list[Record]:
    files = Files(root)
    folder = next((at.name for at in _datalists(root) if any(map(LIST.fullmatch, entries(at)))), "")
    found = [(split, row) for split in UNKNOWN_CAMERA for row in _split(files, folder, split)]
    missing = [split for split in UNKNOWN_CAMERA if split not in {split for split, _ in found}]
    if len(set(missing) - {"train"}) == 1 or not found:  # a copy that only trains, or only tests, is one
        looked = f"{missing[-1]}.txt, {missing[-1]}_general.txt, {missing[-1]}_*.txt"
        raise InputError(f"{root / folder}: no line in a list of {missing[-1]} images (looked for {looked}); {UNPACK}")
    cameras, modalities = _told(dataset, told, found)
    known = captions(files, folder) if "t2i" in dataset.trains else {}
    shown = {row.instruction for split, row in found if split == "train"}
    pictured = "ctcc" in dataset.trains and len(shown) > 1  # one picture for all is a placeholder
    result: dict[str, list[tuple[str, Record]]] = {}
    for (split, row), camera, modality in zip(found, cameras, modalities, strict=True):
        path, pid, clothes = row.key
        outfit = f"{pid}-{clothes}" if "cc" in dataset.trains and clothes >= 0 else ""
        asks = "t2i" in dataset.trains and split != "gallery"  # there images are searched for by the queries' sentences
        texts = caption(files, folder, known, row) if asks else ()
        picture = files.listed(row.where, row.instruction) if pictured and split == "train" else ""
        # Where the protocols divide the test images themselves, both lists make one split.
        split = "test" if split != "train" and "test" in dataset.images else split
        record = Record(path, pid, camera, split, outfit, modality, texts, picture)
        result.setdefault(split, []).append((row.where, record))
    return [record for listed in result.values() for record in once(listed)]


def _split(files: Files, folder: str, split: str) -> list[Row]:
    """Lines of a split's lists."""
    names = [name for name in files.names(folder) if (hit := LIST.fullmatch(name)) and hit[1].lower() == split]
    for whole_list in (f"{split}.txt", f"{split}_general.txt"):
        names = [name for name in names if name.lower() == whole_list] or names
    return [row for name in names for row in rows(files, posixpath.join(folder, name), skip_junk=True)]


def _told(dataset: DataSet, told: re.Pattern[str], found: list[tuple[str, Row]]) -> tuple[list[int], list[str]]:
    """Camera and modality of each row, from the images' names or else from the lists; 0 where nobody tells cameras."""
    names = [told.search(row.key[0]) for _, row in found]
    if "test" in dataset.images:  # its protocols ask for cameras by number
        for (_, row), name in zip(found, names, strict=True):
            if name is None:
                raise InputError(f"{row.where}: the name does not tell the camera as in {dataset.title}; {UNPACK}")
    facts = [{"camera": "0", "modality": "vis"} | name.groupdict() for name in names if name is not None]
    if len(facts) < len(names):
        columns = [UNKNOWN_CAMERA[split] if row.camera is None else row.camera for split, row in found]
        return columns, ["vis"] * len(found)
    cameras = ["ABC".find(fact["camera"]) if fact["camera"] in "ABC" else int(fact["camera"]) for fact in facts]
    return cameras, [fact["modality"] for fact in facts]


def _datalists(folder: Path) -> list[Path]:
    return [folder / name for name in entries(folder) if name.lower() == "datalist"]
