"""COCAS+: Real1 trains, Real2 tests clothes-template and language-instructed retrieval. Paths are relative to the root.

    COCAS+/real1/train.txt (or other *.txt)     image template pid clothes [camera]
    COCAS+/real2/query.txt                      image template pid clothes camera   (clothes: the outfit wanted)
    COCAS+/real2/gallery.txt                    image pid clothes camera

and beside them OmniReID's annotations, `image instruction pid clothes [camera]`:

    real1/datalist/{train_ctcc,train_attr}.txt + *.json, real2/datalist/{query,gallery}{,_attr}.txt + *.json

where the instruction is a clothes picture or (`_attr`) a key of a JSON {key: sentence}. They add clothes crops and
captions to the authors' lists, joined by image, pid and clothes, and stand in for them where those are missing. Fields
are separated by tabs, commas or spaces. A path is looked for in the list's part (real1, real2), in the root, and in the
part's `images` or `templates`. `real1` and `real2` may lie in `--data` itself. The outfit key is "<pid>-<clothes>";
Real1 and Real2 number identities independently. A missing camera is 0 in train, -1 in query and -2 in gallery (as in
the released code: no pair shares a camera).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from engine.data.datasets._base import UNPACK, DataSet, Files
from engine.data.datasets.datalist import UNKNOWN_CAMERA, Row, caption, captions, rows
from engine.data.record import Record
from engine.errors import InputError

DATALISTS = {  # split -> clothes pictures, caption keys
    "train": ("train_ctcc.txt", "train_attr.txt"),
    "query": ("query.txt", "query_attr.txt"),
    "gallery": ("gallery.txt", "gallery_attr.txt"),
}
TEMPLATE, NO_TEMPLATE = "image template pid clothes camera", "image pid clothes camera"


def parse(root: Path) -> Iterator[Record]:
    files = Files(root)
    if not (files.holds("real1") or files.holds("real2")):
        raise InputError(f"{root}: neither real1 nor real2 in it; {UNPACK}")
    if files.holds("real1"):
        part = files.folder("real1")
        texts = [name for name in files.names(part) if (low := name.lower()).endswith(".txt") and "readme" not in low]
        train = [name for name in texts if name.lower() == "train.txt"]
        if not train and not any(files.find(f"{part}/datalist/{name}") for name in DATALISTS["train"]):
            train = texts
        yield from _split(files, part, "train", train, TEMPLATE)
    if files.holds("real2"):
        part = files.folder("real2")
        for split, columns in ("query", TEMPLATE), ("gallery", NO_TEMPLATE):
            native = [f"{split}.txt"] if files.find(f"{part}/{split}.txt") else []
            yield from _split(files, part, split, native, columns)


def _split(files: Files, part: str, split: str, native: list[str], columns: str) -> list[Record]:
    """Join the authors' list of a split with OmniReID's two."""
    pictures, attributes = (
        rows(files, f"{part}/datalist/{name}", part) if files.find(f"{part}/datalist/{name}") else []
        for name in DATALISTS[split]
    )
    own = [row for name in native for row in rows(files, f"{part}/{name}", part, columns)]
    base = own or pictures or list({row.key: row for row in attributes}.values())
    if not base:
        looked = f"{split}.txt or datalist/{' or datalist/'.join(DATALISTS[split])}"
        raise InputError(f"{files.root / part}: no list of {split} images (looked for {looked}); {UNPACK}")
    picture = {row.key: _picture(files, part, row) for row in pictures}
    texts: dict[tuple[str, int, int], tuple[str, ...]] = {}
    known = captions(files, f"{part}/datalist") if attributes else {}
    for row in attributes:
        own_texts = caption(files, f"{part}/datalist", known, row)
        texts[row.key] = tuple(dict.fromkeys(texts.get(row.key, ()) + own_texts))
    if attributes and not any(row.key in texts for row in base):
        raise InputError(f"{attributes[0].where}: no line agrees with {base[0].where} in image, pid and clothes")
    records, people = [], dict[str, tuple[int, int]]()
    for row in base:
        path, pid, clothes = row.key
        shown = _picture(files, part, row) if row.instruction and (own or pictures) else picture.get(row.key, "")
        camera = UNKNOWN_CAMERA[split] if row.camera is None else row.camera
        outfit = f"{pid}-{clothes}" if clothes >= 0 else ""
        if people.setdefault(path, (pid, camera)) != (pid, camera):  # other clothes may be asked for with one image
            raise InputError(f"{row.where}: lists {path} again, as another identity or camera; mend the list")
        records.append(Record(path, pid, camera, split, outfit, "vis", texts.get(row.key, ()), shown))
    return sorted(set(records))


def _picture(files: Files, part: str, row: Row) -> str:
    name = row.instruction
    return files.listed(row.where, f"{part}/{name}", name, f"{part}/templates/{name}")


DATASET = DataSet(
    name="cocas",
    title="COCAS+",
    folders=("COCAS+", "COCAS", "COCAS-plus", "cocas_plus", "."),
    holds=("real1", "real2"),
    parse=parse,
    trains=("ctcc", "li"),
    protocols={"ctcc": ("real2", "real2:pid_clothes"), "li": ("real2", "real2:pid_clothes")},
    images={"train": 34_469, "test": 14_449},
)
