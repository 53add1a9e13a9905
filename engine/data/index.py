"""The column store of records: data sets found below a folder, parsed once, kept as memory-mapped Arrow columns.

`find_indexes(data)` gives one `Index` per data set. A stored index (`DATA/.index/NAME.arrow`, written by
`recipes/data.py index`) is memory-mapped, so opening costs no parsing; without one the folder is parsed in memory.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from engine.data.datasets import DATASETS
from engine.data.datasets._base import FILE, FOLDER, DataSet, entries, kind_of, locate, unreadable
from engine.data.datasets.datalist import has_lists, holds, records
from engine.data.record import MODALITIES, SPLITS, Record
from engine.errors import InputError

SCHEMA = pa.schema(
    [
        ("path", pa.large_string()),
        ("pid", pa.int64()),
        ("camera", pa.int32()),
        ("split", pa.int8()),
        ("clothes", pa.int32()),
        ("modality", pa.int8()),
        ("captions", pa.large_list(pa.large_string())),
        ("clothes_picture", pa.large_string()),
    ]
)
FORMAT = 2  # raise when SCHEMA or a parser changes what it yields: older stored indexes are then rebuilt
BATCH = 1 << 16  # records turned into columns at a time
WIDEST = 10_000  # folders of one level that `fingerprint` reads

Box = tuple[float, float, float, float]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
UPPER_BODY: Box = (0.1, 0.16, 0.9, 0.52)  # left, top, right, bottom as fractions: where a person crop shows the coat


class Index:
    """One data set's records as columns; record numbers are rows.

    pid [R] int64, camera [R] int32, clothes [R] int32 (codes of the outfit keys in sorted order; -1 = not annotated),
    modality [R] int8 (index into MODALITIES), split [R] int8 (index into SPLITS): numpy views of the Arrow buffers.
    """

    def __init__(self, dataset: DataSet, root: Path, table: pa.Table):
        self.dataset, self.name, self.root, self.table = dataset, dataset.name, root, table
        column = {
            name: table[name].combine_chunks().to_numpy(zero_copy_only=len(table) > 0)
            for name in ("pid", "camera", "split", "clothes", "modality")
        }
        self.pid: np.ndarray = column["pid"]
        self.camera: np.ndarray = column["camera"]
        self.split: np.ndarray = column["split"]
        self.clothes: np.ndarray = column["clothes"]
        self.modality: np.ndarray = column["modality"]

    def __len__(self) -> int:
        return len(self.table)

    def path(self, row: int) -> Path:
        """Absolute path of the image."""
        return self.root / self.table["path"][int(row)].as_py()

    def captions(self, row: int) -> list[str]:
        """Sentences that describe the image (or, for a COCAS+ Real2 query, what is wanted); may be empty."""
        return self.table["captions"][int(row)].as_py()

    def clothes_picture(self, row: int) -> tuple[Path, Box]:
        """Picture of the clothes and the box of it to use: the whole template or crop, else the image's upper body."""
        picture = self.table["clothes_picture"][int(row)].as_py()
        return (self.root / picture, WHOLE) if picture else self.worn(row)

    def worn(self, row: int) -> tuple[Path, Box]:
        """The image itself and the box of its upper body."""
        return self.path(row), UPPER_BODY

    def select(self, *splits: str, modality: str | None = None) -> np.ndarray:
        """Row numbers (int64, ascending) of these splits, optionally of one modality."""
        keep = np.isin(self.split, [SPLITS.index(split) for split in splits])
        if modality is not None:
            keep &= self.modality == MODALITIES.index(modality)
        return np.flatnonzero(keep)

    def save(self, file: Path) -> None:
        """Write the columns as an uncompressed Arrow file (memory-mappable), atomically."""
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(file.name + f".part{os.getpid()}")
        metadata = {"fingerprint": _fingerprint(self.dataset, self.root), "format": str(FORMAT)}
        table = self.table.replace_schema_metadata(metadata)
        try:
            with part.open("wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
            os.replace(part, file)
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    @classmethod
    def open(cls, dataset: DataSet, root: Path, file: Path) -> Index | None:
        """Memory-map a stored index; None when there is none or when the folder has changed since."""
        if not file.is_file():
            return None
        try:
            table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
        except (pa.ArrowInvalid, OSError, UnicodeError):  # damaged; or a path that Arrow cannot open
            return None
        stored = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        if stored != {"fingerprint": _fingerprint(dataset, root), "format": str(FORMAT)}:
            return None
        return cls(dataset, root, table)


def build_index(dataset: DataSet, root: Path) -> Index:
    """Parse one data set's folder (no image is decoded). InputError where the tree is malformed or holds no image."""
    try:
        table = _to_table(records(dataset, root))
    except UnicodeEncodeError as error:
        raise InputError(f"{root}: the name {error.object!r:.200} is not UTF-8; rename it") from None
    if not len(table):
        raise InputError(f"{dataset.title}: no image found in {root}; expected the layout its authors distribute")
    return Index(dataset, root, table)


def find_indexes(data: Path, names: Sequence[str] | None = None) -> list[Index]:
    """Open (or parse) every data set found below `data`, in the order of the table DATASETS.

    names: only these data sets; one that is missing is an InputError that says which folders were looked for.
    """
    return [
        Index.open(dataset, root, stored_index(data, dataset)) or build_index(dataset, root)
        for dataset, root in find_roots(data, names)
    ]


def find_roots(data: Path, names: Sequence[str] | None = None) -> list[tuple[DataSet, Path]]:
    """The data sets of `find_indexes` and their folders, unopened."""
    if not os.path.isdir(data):
        raise InputError(f"--data {data}: {'a folder is expected' if os.path.exists(data) else 'no such folder'}")
    try:
        os.listdir(data)
    except OSError as error:
        raise unreadable(data, error) from None
    for name in names or ():
        if name not in (known := [dataset.name for dataset in DATASETS]):
            raise InputError(f"--dataset {name}: unknown; choose from {', '.join(known)}")
    found = []
    for dataset in DATASETS:
        if names is not None and dataset.name not in names:
            continue
        root = find_root(dataset, data)
        if root is not None:
            found.append((dataset, root))
        elif names is not None:
            looked = ", ".join(dataset.folders)
            raise InputError(f"--dataset {dataset.name}: not found in {data} (looked for the folders {looked})")
    if not found:
        folders = ", ".join(folder for dataset in DATASETS for folder in dataset.folders[:1])
        raise InputError(f"--data {data}: no known data set in it (looked for {folders}, ...){_hint(data)}")
    return found


def find_root(dataset: DataSet, data: Path) -> Path | None:
    """The data set's folder below `data`, or the folder in it that the data set is nested in; None = no such name.

    Of several copies the first in the order of the data set's folder names is taken (of names that differ in case, as
    it is spelt there): one in the authors' layout, else one with datalists, else whichever, whose parser says what is
    missing.
    """
    below = [name for name in entries(data) if os.path.isdir(data / name)]
    named = [
        data / name
        for folder in dataset.folders
        for name in sorted(below, key=lambda name: name != folder)
        if name.lower() == folder.lower()
    ]
    for folder in named:
        if found := locate(folder, lambda at: holds(at, dataset.holds)):
            return found
    if "." in dataset.folders and any(name.lower() in dataset.holds for name in below):
        return data
    for folder in named if dataset.told else ():
        if found := locate(folder, has_lists):
            return found
    return named[0] if named else None


def _hint(data: Path) -> str:
    """Whether `--data` names a data set itself."""
    name = data.resolve().name.lower()
    itself = [dataset.title for dataset in DATASETS if name in (folder.lower() for folder in dataset.folders)]
    return f"; it looks like {itself[0]} itself: give the folder that holds it" if itself else ""


def stored_index(data: Path, dataset: DataSet) -> Path:
    """Where `recipes/data.py index` keeps a data set's index."""
    return data / ".index" / f"{dataset.name}.arrow"


def fingerprint(*roots: Path) -> str:
    """Changes when a file below a root is added or removed, or a list (txt, json, mat) is rewritten.

    Levels with more than WIDEST folders, and what lies below them, are left out (SYNTH-PEDES: a folder per identity).
    A folder that links lead to repeatedly is read once; one that cannot be read counts as empty.
    """
    seen: list[object] = [root.name for root in roots]
    level, known = [str(root) for root in roots], set[tuple[int, int]]()
    while 0 < len(level) <= WIDEST:
        below = []
        for folder in level:
            try:
                stat = os.stat(folder)
                with os.scandir(folder) as found:
                    inside = sorted(found, key=lambda entry: entry.name)
            except OSError:
                continue
            seen.append((os.path.relpath(folder, roots[0]), stat.st_mtime_ns))
            if (stat.st_dev, stat.st_ino) in known:
                continue
            known.add((stat.st_dev, stat.st_ino))
            for entry in inside:
                kind = kind_of(entry)
                if kind == FOLDER:
                    below.append(entry.path)
                elif kind == FILE and entry.name.lower().endswith((".txt", ".json", ".mat")):
                    stat = entry.stat()
                    seen.append((entry.name, stat.st_size, stat.st_mtime_ns))
        level = below
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()


def _fingerprint(dataset: DataSet, root: Path) -> str:
    """Of the folder, or of the data set's parts in it where it may be one that holds other data sets, too."""
    if "." not in dataset.folders:
        return fingerprint(root)
    return fingerprint(*(root / name for name in entries(root) if name.lower() in dataset.holds))


def _to_table(records: Iterable[Record]) -> pa.Table:
    """SCHEMA columns; outfit keys become codes in sorted order. Records are taken in batches: few are in memory."""
    source, batches = iter(records), []
    raw = SCHEMA.set(SCHEMA.get_field_index("clothes"), pa.field("clothes", pa.large_string()))
    while batch := list(itertools.islice(source, BATCH)):
        columns: list[Sequence[object]] = list(zip(*batch, strict=True))
        columns[raw.get_field_index("split")] = [SPLITS.index(record.split) for record in batch]
        columns[raw.get_field_index("modality")] = [MODALITIES.index(record.modality) for record in batch]
        arrays = [pa.array(column, type=field.type) for column, field in zip(columns, raw, strict=True)]
        batches.append(pa.record_batch(arrays, schema=raw))
    table = pa.Table.from_batches(batches, raw).combine_chunks()
    keys, codes = np.unique(table["clothes"].to_numpy().astype(str), return_inverse=True)
    if "" in keys:
        codes = codes - 1  # "" sorts first, so it becomes -1 and the real outfits start at 0
    at = SCHEMA.get_field_index("clothes")
    return table.set_column(at, SCHEMA.field(at), pa.array(codes.astype(np.int32)))
