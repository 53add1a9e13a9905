"""The column store of records: data sets found below a folder, parsed once, kept as memory-mapped Arrow columns.

`find_indexes(data)` gives one `Index` per data set. A stored index (`DATA/.index/NAME.arrow`, written by
`recipes/data.py index`) is memory-mapped, so opening costs no parsing, and the processes of a machine share its memory;
it also says which files are damaged and what the others hold (size, checksum). A packed data set
(`DATA/NAME.packed`, written by `recipes/data.py pack`) has its index beside its shards. Without either the folder is
parsed, and no image is looked into.

Every picture is a row: the records first, in their parser's order, then pictures of clothes that are no record's image.
Texts and pictures that rows share are stored once.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.data.datasets import DATASETS
from engine.data.datasets._base import FILE, FOLDER, DataSet, entries, kind_of, locate, unreadable
from engine.data.datasets.datalist import has_lists, holds, records
from engine.data.files import Item
from engine.data.record import MODALITIES, SPLITS, Record
from engine.errors import InputError

PARSED = {  # what a parser says
    "path": pa.large_string(),
    "pid": pa.int64(),
    "camera": pa.int32(),
    "split": pa.int8(),
    "clothes": pa.int32(),
    "modality": pa.int8(),
    "captions": pa.large_list(pa.dictionary(pa.int32(), pa.large_string())),
    "picture": pa.int64(),  # row of the picture of the clothes; -1: the image's own upper-body box
}
CHECKED = {  # what reading and decoding the file says; -1: not looked into
    "bytes": pa.int64(),
    "modified": pa.int64(),  # nanoseconds since 1970
    "crc": pa.int64(),  # CRC-32 of the bytes
    "height": pa.int32(),
    "width": pa.int32(),
    "pixels": pa.int64(),  # hash of the decoded picture: files that differ may show the same
    "damaged": pa.int8(),  # 1: not to be used
    "reason": pa.large_string(),
}
PLACED = {"shard": pa.int32(), "offset": pa.int64()}  # in a packed data set; -1: a file of its own
SCHEMA = pa.schema(list({**PARSED, **CHECKED, **PLACED}.items()))
UNKNOWN = {**dict.fromkeys(SCHEMA.names, -1), "modality": 0, "damaged": 0, "reason": ""}
FORMAT = 3  # raise when SCHEMA or a parser changes what it yields: older stored indexes are then rebuilt
BATCH = 1 << 16  # records turned into columns at a time
WIDEST = 10_000  # folders of one level that `fingerprint` reads
TESTED = ("query", "gallery", "test")
PACKED = ".packed"  # how a packed data set's folder ends
INDEX = "index.arrow"  # of a packed data set

Box = tuple[float, float, float, float]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
UPPER_BODY: Box = (0.1, 0.16, 0.9, 0.52)  # left, top, right, bottom as fractions: where a person crop shows the coat


class Index:
    """One data set's records as columns; record numbers are rows.

    pid [R] int64, camera [R] int32, clothes [R] int32 (codes of the outfit keys in sorted order; -1 = not annotated),
    modality [R] int8 (index into MODALITIES), split [R] int8 (index into SPLITS), damaged [R] int8 (1 = not to be
    used): numpy views of the Arrow buffers. checked: whether the images were looked into; shards: files of a packed
    data set; known_overlaps: names of data sets whose test images were looked for among the training images.
    """

    def __init__(self, dataset: DataSet, root: Path, table: pa.Table, fingerprint: str = ""):
        self.fingerprint = fingerprint  # of the folder before it was parsed
        self.dataset, self.name, self.root, self.table = dataset, dataset.name, root, table
        self.pid = self._column("pid")
        self.camera = self._column("camera")
        self.split = self._column("split")
        self.clothes = self._column("clothes")
        self.modality = self._column("modality")
        self.damaged = self._column("damaged")
        self._crc, self._bytes = self._column("crc"), self._column("bytes")
        self._shard, self._offset = self._column("shard"), self._column("offset")
        stored = _metadata(table)
        self.checked = stored.get("checked") == "1"
        self.known_overlaps: list[str] = json.loads(stored.get("overlaps", "[]"))
        self.shards = [root / name for name in json.loads(stored.get("shards", "[]"))]

    def _column(self, name: str) -> np.ndarray:
        return whole(self.table[name]).to_numpy(zero_copy_only=len(self.table) > 0)

    def __len__(self) -> int:
        return len(self.table)

    def path(self, row: int) -> Path:
        """The image's own path: where it is, or was before it was packed."""
        return self.root / self.table["path"][int(row)].as_py()

    def item(self, row: int) -> Item:
        """Where the image's bytes are, for engine.data.files."""
        path, crc, shard = self.path(row), int(self._crc[row]), int(self._shard[row])
        if shard < 0:
            return Item(path, crc)
        return Item(path, crc, self.shards[shard], int(self._offset[row]), int(self._bytes[row]))

    def captions(self, row: int) -> list[str]:
        """Sentences that describe the image (or, for a COCAS+ Real2 query, what is wanted); may be empty."""
        return self.table["captions"][int(row)].as_py()

    def sentences(self, rows: np.ndarray) -> np.ndarray:
        """How many captions each of these rows has, int64."""
        offsets = np.asarray(whole(self.table["captions"]).offsets)
        return offsets[rows + 1] - offsets[rows]

    def clothes_picture(self, row: int) -> tuple[Item, Box]:
        """Picture of the clothes and the box of it to use: the whole template or crop, else the image's upper body."""
        picture = self.table["picture"][int(row)].as_py()
        return (self.item(picture), WHOLE) if picture >= 0 else self.worn(row)

    def worn(self, row: int) -> tuple[Item, Box]:
        """The image itself and the box of its upper body."""
        return self.item(row), UPPER_BODY

    def select(self, *splits: str, modality: str | None = None) -> np.ndarray:
        """Row numbers (int64, ascending) of these splits, optionally of one modality, that are not damaged."""
        keep = np.isin(self.split, [SPLITS.index(split) for split in splits])
        keep &= self.damaged == 0
        if modality is not None:
            keep &= self.modality == MODALITIES.index(modality)
        return np.flatnonzero(keep)

    def reasons(self, *splits: str) -> dict[Path, str]:
        """Path -> why, in words, of the damaged images of these splits (none: of all)."""
        rows = np.flatnonzero(self.damaged)
        if splits:
            rows = rows[np.isin(self.split[rows], [SPLITS.index(split) for split in splits])]
        return {self.path(row): self.table["reason"][row].as_py() for row in rows.tolist()}

    def tested(self, pictures: bool) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the test images, damaged or not, and those of the pictures that instruct them (-1: none, or not
        asked for)."""
        rows = np.flatnonzero(np.isin(self.split, [SPLITS.index(split) for split in TESTED]))
        return rows, self.table["picture"].to_numpy()[rows] if pictures else np.full(len(rows), -1)

    def test_damage(self, pictures: bool) -> dict[Path, str]:
        """Path -> why, in words, of the damaged test images and, where asked for, pictures that instruct them."""
        rows, instructing = self.tested(pictures)
        rows = np.union1d(rows, instructing[instructing >= 0])
        return {self.path(row): self.table["reason"][row].as_py() for row in rows[self.damaged[rows] != 0].tolist()}

    def with_checks(self, columns: pa.Table) -> Index:
        """The same records with these CHECKED columns."""
        table = self.table
        for name in CHECKED:
            table = table.set_column(table.schema.get_field_index(name), SCHEMA.field(name), columns[name])
        metadata = {**_metadata(table), "checked": "1"}
        return Index(self.dataset, self.root, table.replace_schema_metadata(metadata), self.fingerprint)

    def with_column(self, name: str, values: np.ndarray) -> Index:
        """The same records with other values [R] in one column."""
        at = SCHEMA.get_field_index(name)
        table = self.table.set_column(at, SCHEMA.field(at), pa.array(values))
        return Index(self.dataset, self.root, table, self.fingerprint)

    def with_facts(self, **facts: str) -> Index:
        """The same records, about which this is stored as well."""
        table = self.table.replace_schema_metadata(
            {**_metadata(self.table), "checked": str(int(self.checked)), **facts}
        )
        return Index(self.dataset, self.root, table, self.fingerprint)

    def save(self, file: Path) -> None:
        """Write the columns as an uncompressed Arrow file (memory-mappable), atomically."""
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(file.name + f".part{os.getpid()}")
        stored = {**_metadata(self.table), "format": str(FORMAT), "checked": str(int(self.checked))}
        stored.pop("fingerprint", None)
        if "shards" not in stored:  # a packed data set has no folder that may change
            stored["fingerprint"] = self.fingerprint or _fingerprint(self.dataset, self.root)
        table = self.table.replace_schema_metadata(stored)
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
        index = cls.mapped(dataset, root, file)
        if index is None or _metadata(index.table).get("fingerprint") != _fingerprint(dataset, root):
            return None
        return index

    @classmethod
    def open_packed(cls, dataset: DataSet, root: Path) -> Index:
        """Memory-map a packed data set's index. InputError where it, or one of its shards, is not what was packed."""
        again = "pack the data set again"
        index = cls.mapped(dataset, root, root / INDEX)
        if index is None:
            raise InputError(f"{root / INDEX}: damaged, or of another version; {again}")
        sizes = json.loads(_metadata(index.table)["sizes"])
        for shard, size in zip(index.shards, sizes, strict=True):
            try:
                found = shard.stat().st_size
            except OSError as error:
                raise InputError(f"{shard}: {error.strerror}; {again}") from None
            if found != size:
                raise InputError(f"{shard}: {found:,} bytes instead of {size:,}; {again}")
        return index

    @classmethod
    def mapped(cls, dataset: DataSet, root: Path, file: Path) -> Index | None:
        """A stored index, whatever has changed since; None where there is none that can be read."""
        if not file.is_file():
            return None
        try:
            table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
        except (pa.ArrowInvalid, OSError, UnicodeError):  # damaged; or a path that Arrow cannot open
            return None
        return cls(dataset, root, table) if _metadata(table).get("format") == str(FORMAT) else None


def build_index(dataset: DataSet, root: Path) -> Index:
    """Parse one data set's folder (no image is decoded). InputError where the tree is malformed or holds no image."""
    fingerprint = _fingerprint(dataset, root)  # before: what changes while it is parsed has changed since
    try:
        table = _to_table(records(dataset, root))
    except UnicodeEncodeError as error:
        raise InputError(f"{root}: the name {error.object!r:.200} is not UTF-8; rename it") from None
    if not len(table):
        raise InputError(f"{dataset.title}: no image found in {root}; expected the layout its authors distribute")
    return Index(dataset, root, table, fingerprint)


def find_indexes(
    data: Path,
    names: Sequence[str] | None = None,
    *,
    keep: Path | None = None,
    say: Callable[[str], None] | None = None,
) -> list[Index]:
    """Open (or parse) every data set found below `data`, in the order of the table DATASETS.

    names  only these data sets; one that is missing is an InputError that says which folders were looked for
    keep   folder where what had to be parsed is kept, for the other processes of a run to map
    say    is told what had to be parsed
    """
    indexes, parsed, began = [], [], time.monotonic()
    for dataset, root in find_roots(data, names):
        index = find_index(data, dataset, root)
        if index is None and keep is not None:
            index = Index.open(dataset, root, keep / f"{dataset.name}.arrow")
        if index is None:
            index = build_index(dataset, root)
            parsed.append(dataset.name)
            if keep is not None:
                index = _kept(index, keep / f"{dataset.name}.arrow")
        indexes.append(index)
    names_found = {index.name for index in indexes}
    for index in indexes:
        late = [name for name in index.dataset.overlaps if name in names_found and name not in index.known_overlaps]
        if late and index.checked and say:
            say(
                f"{index.name}: indexed without {', '.join(late)}, whose test images it may train on; "
                f"python recipes/data.py index --data {data} puts them aside"
            )
    if parsed and say:
        say(
            f"parsed {', '.join(parsed)} in {time.monotonic() - began:.1f} s, without looking into the images; "
            f"python recipes/data.py index --data {data} does that once for all"
        )
    return indexes


def find_index(data: Path, dataset: DataSet, root: Path) -> Index | None:
    """The stored or packed index; None where there is none that holds."""
    if root.name.endswith(PACKED):
        return Index.open_packed(dataset, root)
    return Index.open(dataset, root, stored_index(data, dataset))


def _kept(index: Index, file: Path) -> Index:
    """The index out of a file, where one can be written and mapped."""
    try:
        index.save(file)
    except OSError:
        return index
    return Index.open(index.dataset, index.root, file) or index


def whole(column: pa.ChunkedArray) -> pa.Array:
    """The column in one piece: where it is stored, if it is in one (combine_chunks copies in any case)."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _metadata(table: pa.Table) -> dict[str, str]:
    return {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}


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
        packed = data / f"{dataset.name}{PACKED}"
        root = packed if os.path.isfile(packed / INDEX) else find_root(dataset, data)
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
    kinds = PARSED | {
        "clothes": pa.large_string(),
        "captions": pa.large_list(pa.large_string()),
        "picture": pa.large_string(),
    }
    raw = pa.schema(list(kinds.items()))
    while batch := list(itertools.islice(source, BATCH)):
        columns: list[Sequence[object]] = list(zip(*batch, strict=True))
        columns[raw.get_field_index("split")] = [SPLITS.index(record.split) for record in batch]
        columns[raw.get_field_index("modality")] = [MODALITIES.index(record.modality) for record in batch]
        arrays = [pa.array(column, type=field.type) for column, field in zip(columns, raw, strict=True)]
        batches.append(pa.record_batch(arrays, schema=raw))
    table = pa.Table.from_batches(batches, raw).combine_chunks()
    rows, extra = _pictures(table)
    outfits = pc.unique(table["clothes"].combine_chunks())
    outfits = outfits.filter(pc.not_equal(outfits, "")).sort()
    full: dict[str, pa.Array] = {
        name: table[name].combine_chunks() for name in ("path", "pid", "camera", "split", "modality")
    }
    full["clothes"] = pc.index_in(table["clothes"].combine_chunks(), value_set=outfits).fill_null(-1)
    full["picture"] = rows
    nobody = {"path": extra, "split": SPLITS.index("picture"), "modality": 0}
    for name, values in full.items():
        more = nobody.get(name, -1)
        more = more if isinstance(more, pa.Array) else pa.repeat(pa.scalar(more, PARSED[name]), len(extra))
        full[name] = pa.concat_arrays([values.cast(PARSED[name]), more])
    full["captions"] = _shared(table["captions"].combine_chunks(), len(extra))
    return make_table(full)


def make_table(columns: Mapping[str, Any]) -> pa.Table:
    """A table of SCHEMA from columns by name, Arrow's or sequences; every other column says that nothing is known.
    captions: lists of sentences, or Arrow's lists of numbered ones."""
    count, arrays = len(columns["path"]), []
    for field in SCHEMA:
        values = columns.get(field.name)
        if values is None and field.name == "captions":
            values = [[]] * count
        if values is None:
            values = pa.repeat(pa.scalar(UNKNOWN[field.name], field.type), count)
        elif not isinstance(values, pa.Array) and field.name == "captions":
            values = _shared(pa.array(values, pa.large_list(pa.large_string())), 0)
        arrays.append(values if isinstance(values, pa.Array) else pa.array(values, type=field.type))
    return pa.table(arrays, schema=SCHEMA)


def _pictures(table: pa.Table) -> tuple[pa.Array, pa.Array]:
    """[R] row of each record's picture of clothes (-1: none), and the paths of those that get rows of their own."""
    wanted, paths = table["picture"].combine_chunks(), table["path"].combine_chunks()
    named = pc.unique(wanted)
    named = named.filter(pc.not_equal(named, ""))
    extra = named.filter(pc.invert(pc.is_in(named, value_set=paths))) if len(named) else named
    known = pa.concat_arrays([paths, extra]) if len(named) else named
    return pc.index_in(wanted, value_set=known).fill_null(-1).cast(PARSED["picture"]), extra


def _shared(captions: pa.Array, more: int) -> pa.Array:
    """Lists of sentences as lists of numbers of different sentences, and `more` empty lists behind them."""
    sentences = captions.flatten().dictionary_encode()
    offsets = np.asarray(captions.offsets)
    return pa.LargeListArray.from_arrays(np.append(offsets, np.repeat(offsets[-1], more)), sentences)
