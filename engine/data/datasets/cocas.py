"""COCAS+: Real1 trains, Real2 tests clothes-template and language-instructed retrieval. Paths are relative to the root.

    COCAS+/real1/train.txt (or other *.txt)     image template pid clothes [camera]
    COCAS+/real2/query.txt                      image template pid clothes camera   (clothes: the outfit wanted)
    COCAS+/real2/gallery.txt                    image pid clothes camera

and beside them OmniReID's annotations, `image instruction pid clothes [camera]`:

    real1/datalist/{train_ctcc,train_attr}.txt + *.json, real2/datalist/{query,gallery}{,_attr}.txt + *.json

where the instruction is a clothes picture or (`_attr`) a key of a JSON {key: sentence}. They add clothes crops and
captions to the authors' lists, joined by image, pid and clothes, and stand in for them where those are missing. Fields
are separated by tabs, commas or spaces. A path is looked for in the list's part (real1, real2), in the root, and in the
part's `images` or `templates`. The outfit key is "<pid>-<clothes>"; Real1 and Real2 number identities independently. A
missing camera is 0 in train, -1 in query and -2 in gallery (as in the released code: no pair shares a camera).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from engine.data.datasets._base import UNPACK, DataSet, Files, lines, read_json, sentences, whole
from engine.data.record import Record
from engine.errors import InputError

UNKNOWN_CAMERA = {"train": 0, "query": -1, "gallery": -2}
DATALISTS = {  # split -> clothes pictures, caption keys
    "train": ("train_ctcc.txt", "train_attr.txt"),
    "query": ("query.txt", "query_attr.txt"),
    "gallery": ("gallery.txt", "gallery_attr.txt"),
}
TEMPLATE, NO_TEMPLATE = "image template pid clothes camera", "image pid clothes camera"
DATALIST = "image instruction pid clothes camera"


class Row(NamedTuple):
    """One line of a list. The key joins lists: (image path, pid, clothes)."""

    where: str
    key: tuple[str, int, int]
    camera: int | None
    instruction: str  # "" where the list has none


def parse(root: Path) -> Iterator[Record]:
    files = Files(root)
    parts = {name.lower(): name for name in files.folders("")}
    if not parts.keys() & {"real1", "real2"}:
        raise InputError(f"{root}: neither real1 nor real2 in it; {UNPACK}")
    if "real1" in parts:
        part = parts["real1"]
        texts = [name for name in files.names(part) if name.endswith(".txt") and "readme" not in name.lower()]
        yield from _split(files, part, "train", ["train.txt"] if "train.txt" in texts else texts, TEMPLATE)
    if "real2" in parts:
        for split, columns in ("query", TEMPLATE), ("gallery", NO_TEMPLATE):
            native = [f"{split}.txt"] if f"{parts['real2']}/{split}.txt" in files else []
            yield from _split(files, parts["real2"], split, native, columns)


def _split(files: Files, part: str, split: str, native: list[str], columns: str) -> list[Record]:
    """Join the authors' list of a split with OmniReID's two."""
    pictures, attributes = (
        _rows(files, part, f"datalist/{name}", DATALIST) if f"{part}/datalist/{name}" in files else []
        for name in DATALISTS[split]
    )
    own = [row for name in native for row in _rows(files, part, name, columns)]
    base = own or pictures or list({row.key: row for row in attributes}.values())
    if not base:
        looked = f"{split}.txt or datalist/{' or datalist/'.join(DATALISTS[split])}"
        raise InputError(f"{files.root / part}: no list of {split} images (looked for {looked}); {UNPACK}")
    picture = {row.key: _picture(files, part, row) for row in pictures}
    caption: dict[tuple[str, int, int], tuple[str, ...]] = {}
    known = _sentences(files, part) if attributes else {}
    for row in attributes:
        if row.instruction not in known:
            raise InputError(f"{row.where}: no sentence for {row.instruction!r} in {files.root / part}/datalist/*.json")
        caption[row.key] = tuple(dict.fromkeys(caption.get(row.key, ()) + known[row.instruction]))
    if attributes and not any(row.key in caption for row in base):
        raise InputError(f"{attributes[0].where}: no line agrees with {base[0].where} in image, pid and clothes")
    records = []
    for row in base:
        path, pid, clothes = row.key
        shown = _picture(files, part, row) if row.instruction and (own or pictures) else picture.get(row.key, "")
        camera = UNKNOWN_CAMERA[split] if row.camera is None else row.camera
        records.append(Record(path, pid, camera, split, f"{pid}-{clothes}", "vis", caption.get(row.key, ()), shown))
    return sorted(records)


def _rows(files: Files, part: str, name: str, columns: str) -> list[Row]:
    """Lines of a list whose columns are named; the camera may be missing where an instruction stands in the line."""
    rows, instructed = [], columns != NO_TEMPLATE
    for where, line in lines(files.root / part / name):
        separator = next((mark for mark in "\t," if mark in line), None)
        fields = [field.strip() for field in line.split(separator)]
        if len(fields) not in ((4, 5) if instructed else (4,)):
            raise InputError(f"{where}: expected '{columns}', got {len(fields)} fields")
        image, instruction = fields[0], fields.pop(1) if instructed else ""
        pid, clothes, *camera = (whole(where, field) for field in fields[1:])
        path = files.listed(where, f"{part}/{image}", image, f"{part}/images/{image}")
        rows.append(Row(where, (path, pid, clothes), camera[0] if camera else None, instruction))
    return rows


def _picture(files: Files, part: str, row: Row) -> str:
    name = row.instruction
    return files.listed(row.where, f"{part}/{name}", name, f"{part}/templates/{name}")


def _sentences(files: Files, part: str) -> dict[str, tuple[str, ...]]:
    """Caption key -> sentences, of every JSON in the part's datalist."""
    known: dict[str, tuple[str, ...]] = {}
    names = [name for name in files.names(f"{part}/datalist") if name.endswith(".json")]
    for name in names:
        file = files.root / part / "datalist" / name
        table = read_json(file)
        if not isinstance(table, dict):
            raise InputError(f"{file}: expected {{key: sentence}}")
        known.update({key: sentences(f"{file}: {key!r}", value) for key, value in table.items()})
    return known


DATASET = DataSet(
    name="cocas",
    title="COCAS+",
    folders=("COCAS+", "COCAS", "COCAS-plus", "cocas_plus"),
    holds=("real1", "real2"),
    parse=parse,
    trains=("ctcc", "li"),
    protocols={"ctcc": ("real2", "real2:pid_clothes"), "li": ("real2", "real2:pid_clothes")},
    images={"train": 34_469, "test": 14_449},
)
