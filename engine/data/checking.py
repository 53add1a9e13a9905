"""Looks into every image of a data set: size, checksum, whether it can be decoded whole. Kill it at any moment: what
was looked into is kept beside the index in a journal and is not looked into again; nor is a file whose size and time of
change are those of the stored index.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.data.datasets._base import DataSet
from engine.data.files import Damaged, Item, decode, read
from engine.data.index import CHECKED, INDEX, PACKED, SCHEMA, Index, build_index, find_roots, stored_index
from engine.data.record import SPLITS
from engine.errors import InputError, writing
from engine.progress import Progress
from engine.results import whole_file

BLOCK = 4096  # images between two files of the journal
SHOWN = 10  # damaged images that are named on the screen
SHARE = 64  # images a thread takes at a time
JOURNAL = pa.schema([SCHEMA.field("path"), *(SCHEMA.field(name) for name in CHECKED)])


class Checks(NamedTuple):
    """One image's CHECKED columns."""

    bytes: int
    modified: int
    crc: int = -1
    height: int = -1
    width: int = -1
    pixels: int = -1
    damaged: int = 0
    reason: str = ""


def index_folder(data: Path, *, threads: int, say: Callable[[str], None], anew: bool = False) -> None:
    """Write the index of every data set below `data`, and DATA/.index/quarantine.jsonl, which names what is damaged.
    anew: look into every image again. InputError where a folder is malformed, the index cannot be written, or another
    process writes it."""
    if threads < 1:
        raise InputError(f"--workers {threads}: expected at least 1")
    roots, folder = find_roots(data), data / ".index"
    with writing(folder, mend="free space, or get the right to write there"):
        folder.mkdir(exist_ok=True)
        with alone(folder):
            _index_folder(data, roots, threads, say, anew)


def _index_folder(
    data: Path, roots: Sequence[tuple[DataSet, Path]], threads: int, say: Callable[[str], None], anew: bool
) -> None:
    damaged: dict[Path, str] = {}
    checked: dict[str, Index] = {}
    for dataset, root in roots:
        if root.name.endswith(PACKED):
            opened = Index.open_packed(dataset, root)
            index, aside = _put_aside(opened, checked)
            if index is not opened:
                index.save(root / INDEX)
            checked[dataset.name] = index
            damaged |= index.reasons()
            say(f"{dataset.name}: packed, and so indexed{aside}, in {root}")
            continue
        began, file = time.monotonic(), stored_index(data, dataset)
        built = build_index(dataset, root)
        progress = Progress(dataset.name, len(built), unit="image")
        if anew:
            forget(file)
        known = None if anew else Index.mapped(dataset, root, file)
        index = check(built, file, known, threads=threads, progress=progress.update)
        progress.close()
        index, aside = _put_aside(index, checked)
        index.save(file)
        forget(file)
        checked[dataset.name] = index
        reasons = index.reasons()
        damaged |= reasons
        say(
            f"{dataset.name}: {len(index):,} images, {len(reasons):,} damaged{aside}, "
            f"{time.monotonic() - began:.1f} s -> {file}"
        )
    list_file = data / ".index" / "quarantine.jsonl"
    with whole_file(list_file) as lines:
        for path, reason in damaged.items():
            lines.write(json.dumps({"path": str(path), "reason": reason}) + "\n")
    for path, reason in list(damaged.items())[:SHOWN]:
        say(f"{path}: {reason}")
    if damaged:
        say(f"{len(damaged):,} damaged: {list_file} names them; no training uses them, and a test does not begin")


def _put_aside(index: Index, checked: Mapping[str, Index]) -> tuple[Index, str]:
    """The index with training images in split "overlap" that are test images of data sets that were looked into before
    it, and what there is to say about it."""
    wanted = index.dataset.overlaps
    others = [checked[name] for name in wanted if name in checked]
    missing = [name for name in wanted if name not in checked]
    unknown = f" (which are test images of {', '.join(missing)} is not known)" if missing else ""
    if not others:
        return index, unknown
    twice = overlap(index, others)
    codes = index.split.copy()
    codes[twice] = SPLITS.index("overlap")
    titles = ", ".join(other.dataset.title for other in others)
    known = sorted({*index.known_overlaps, *(other.name for other in others)})
    if len(twice) or known != index.known_overlaps:
        index = index.with_column("split", codes).with_facts(overlaps=json.dumps(known))
    return index, f", {len(twice):,} put aside as test images of {titles}{unknown}"


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One process at a time; InputError where another one is at it."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: another process writes there; wait for it") from None
        yield


def check(
    index: Index,
    file: Path,
    known: Index | None = None,
    *,
    threads: int = 2,
    progress: Callable[[int], None] = lambda done: None,
) -> Index:
    """The index with CHECKED columns for all rows. file: where the index will be stored; its journal lies beside it
    until `forget(file)`. known: an older index of the same folder. progress(done): images, in steps of BLOCK."""
    journal = _journal(file)
    journal.mkdir(parents=True, exist_ok=True)
    earlier = _earlier(journal, known)
    paths = index.table["path"].combine_chunks()
    place = pc.index_in(paths, value_set=earlier["path"].combine_chunks()).fill_null(-1).to_numpy(zero_copy_only=False)
    sizes, times, damaged = (earlier[name].to_numpy() for name in ("bytes", "modified", "damaged"))
    blocks = []
    with ThreadPoolExecutor(threads) as pool:
        for begin in range(0, len(paths), BLOCK):
            names = paths.slice(begin, BLOCK).to_pylist()
            at = place[begin : begin + BLOCK]

            def state(i: int, names: list[str] = names) -> Checks:
                return _state(index.root / names[i])

            states = _parallel(pool, state, len(names))
            now = np.array([seen[:2] for seen in states]).reshape(-1, 2)
            same = (at >= 0) & (now[:, 0] >= 0)  # but never what was damaged: it may have been only its permissions
            was = at[same]
            same[same] = (damaged[was] == 0) & (sizes[was] == now[same, 0]) & (times[was] == now[same, 1])
            fresh = np.flatnonzero(~same)

            work = [(index.root / names[i], states[i]) for i in fresh]

            def look(i: int, work: list[tuple[Path, Checks]] = work) -> Checks:
                return look_into(Item(work[i][0]), work[i][1])

            table = _table([names[i] for i in fresh], _parallel(pool, look, len(fresh)))
            if len(fresh):
                _write(table, journal / f"{begin:09d}-{os.getpid()}.arrow")
            # the block's rows in order: from what was known, and from what was looked into now
            order = np.empty(len(names), dtype=np.int64)
            order[same], order[fresh] = np.arange(same.sum()), same.sum() + np.arange(len(fresh))
            blocks.append(pa.concat_tables([earlier.take(at[same]), table]).take(order))
            progress(begin + len(names))
    return index.with_checks(pa.concat_tables([JOURNAL.empty_table(), *blocks]).combine_chunks())


def forget(file: Path) -> None:
    """Remove the journal of an index that is stored now, and what a killed process wrote of it."""
    shutil.rmtree(_journal(file), ignore_errors=True)
    for part in file.parent.glob(f"{file.name}.part*"):
        part.unlink(missing_ok=True)


def without_damaged_tests(index: Index, *, threads: int) -> Index:
    """The index with the test images, and the pictures of clothes that instruct them, marked that are damaged now."""
    rows, pictures = index.tested(pictures=True)
    looked = np.union1d(rows, pictures[pictures >= 0]).tolist()
    with ThreadPoolExecutor(threads) as pool:
        found = _parallel(pool, lambda i: look_into(index.item(looked[i]), Checks(0, -1)), len(looked))
    damaged = index.damaged.copy()
    damaged[looked] = [checks.damaged for checks in found]
    return index.with_column("damaged", damaged)


def overlap(index: Index, others: Sequence[Index]) -> np.ndarray:
    """Rows of training images that show, pixel for pixel, a test image of another data set, or that come from its
    folder (as `imgs/Market/`) and have a test image's name."""
    rows = index.select("train")
    found = np.zeros(len(rows), dtype=bool)
    pixels = index.table["pixels"].to_numpy()[rows]
    paths = [Path(path.lower()) for path in index.table["path"].take(rows).to_pylist()]
    for other in others:
        test = other.tested(pictures=False)[0]  # a damaged one is a test image, too: its name tells
        found |= (pixels >= 0) & np.isin(pixels, other.table["pixels"].to_numpy()[test])
        known = {Path(path).name.lower() for path in other.table["path"].take(test).to_pylist()}
        alike = [  # the folder's name says where the image was taken from
            path.name in known and len(path.parent.name) > 3 and other.name.startswith(path.parent.name)
            for path in paths
        ]
        found |= np.array(alike, dtype=bool)
    return rows[found]


def look_into(item: Item, state: Checks) -> Checks:
    """Read and decode one image whole."""
    if state.bytes < 0:
        return state
    try:
        content = read(item)
        image = decode(content)
    except Damaged as reason:
        return state._replace(damaged=1, reason=str(reason))
    shown = hashlib.blake2b(image[..., :3].tobytes(), digest_size=8, key=repr(image.shape).encode())
    pixels = int.from_bytes(shown.digest(), "little") >> 1
    height, width = image.shape[:2]
    return Checks(len(content), state.modified, zlib.crc32(content), height, width, pixels)


def _state(path: Path) -> Checks:
    """Size and time of change of a file."""
    try:
        found = os.stat(path)
    except OSError as error:
        return Checks(-1, -1, damaged=1, reason=f"cannot be read ({error.strerror})")
    return Checks(found.st_size, found.st_mtime_ns)


def _parallel(pool: ThreadPoolExecutor, work: Callable[[int], Checks], count: int) -> list[Checks]:
    """[work(0), work(1), ...], some at a time in each thread."""

    def some(begin: int) -> list[Checks]:
        return [work(i) for i in range(begin, min(begin + SHARE, count))]

    return [result for part in pool.map(some, range(0, count, SHARE)) for result in part]


def _earlier(journal: Path, known: Index | None) -> pa.Table:
    """What is known of files already, by path: the journal's before the older index's."""
    parts = []
    for file in sorted(journal.glob("*.arrow"), reverse=True):
        try:
            parts.append(pa.ipc.open_file(pa.memory_map(str(file))).read_all().cast(JOURNAL))
        except (pa.ArrowInvalid, OSError, ValueError):
            continue
    if known is not None and known.checked:
        parts.append(known.table.select(JOURNAL.names).replace_schema_metadata())
    return pa.concat_tables([JOURNAL.empty_table(), *parts]).combine_chunks()


def _table(paths: list[str], checks: list[Checks]) -> pa.Table:
    columns = [paths, *(list(column) for column in zip(*checks, strict=True))] if checks else [[] for _ in JOURNAL]
    arrays = [pa.array(column, type=field.type) for column, field in zip(columns, JOURNAL, strict=True)]
    return pa.table(arrays, schema=JOURNAL)


def _write(table: pa.Table, file: Path) -> None:
    with whole_file(file, "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def _journal(file: Path) -> Path:
    return file.with_suffix(".journal")
