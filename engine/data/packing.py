"""Packs a checked data set into tar files of about a gigabyte and an index of where each image lies in them.

    OUT/NAME.packed/00000-<digest>.tar ...   members in the index's order, named as the files were
    OUT/NAME.packed/index.arrow              the records, with shard, offset, size and CRC-32 of each image

An image is then one positioned read in a file that is open already; the shards remain ordinary tar files. A shard's
name holds a digest of what belongs into it, and it appears under that name only when every byte of it has been read
back: a rerun after a kill takes over what is there and ends with the same files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from engine.data.checking import alone
from engine.data.files import Damaged, read
from engine.data.index import INDEX, PACKED, PLACED, SCHEMA, Index, find_index, find_roots
from engine.errors import InputError, writing
from engine.progress import Progress

DRAWN = "mini.json"  # of the drawn data
SHARD = 1 << 30  # bytes after which a shard ends
BLOCK = 512  # of the tar format
OURS = re.compile(r"\d{5}-[0-9a-f]{16}\.(tar|part\d+)|index\.arrow\.part\d+")


class Shard(NamedTuple):
    """rows [n] of the index; offsets [n] of their contents in the tar file; size of it in bytes."""

    name: str
    rows: np.ndarray
    offsets: np.ndarray
    size: int


def pack_folder(
    data: Path, output: Path, names: Sequence[str] | None = None, *, shard_bytes: int, say: Callable[[str], None]
) -> None:
    """Pack every indexed data set below `data`, or those named. InputError where one is not indexed."""
    if shard_bytes < 1 << 20:
        raise InputError(f"--shard-mb {shard_bytes >> 20}: expected at least 1")
    if output.resolve() == data.resolve():
        raise InputError(f"--output {output}: is --data itself; choose another folder")
    for dataset, root in find_roots(data, names):
        if root.name.endswith(PACKED):
            say(f"{dataset.name}: packed already, in {root}")
            continue
        began, index = time.monotonic(), find_index(data, dataset, root)
        if index is None:
            raise InputError(
                f"{root}: not indexed since it was changed; run python recipes/data.py index --data {data} first"
            )
        progress = Progress(dataset.name, len(index), unit="image")
        with writing(f"--output {output}"):
            folder = pack(index, output, shard_bytes=shard_bytes, progress=progress.update)
        progress.close()
        if (data / DRAWN).is_file():  # no one shall take drawn people for real ones
            shutil.copy(data / DRAWN, output / DRAWN)
        say(f"{dataset.name}: {len(index):,} images, {time.monotonic() - began:.1f} s -> {folder}")


def pack(
    index: Index, output: Path, *, shard_bytes: int = SHARD, progress: Callable[[int], None] = lambda done: None
) -> Path:
    """Write the packed data set below `output`; its folder. progress(done): images that lie in finished shards.

    InputError where the index was not checked, or a file is not the one that was indexed any more."""
    if not index.checked:
        raise InputError(f"{index.root}: not indexed; run recipes/data.py index first, which looks into every image")
    folder = output / f"{index.name}{PACKED}"
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder):
        return _pack(index, folder, shard_bytes, progress)


def _pack(index: Index, folder: Path, shard_bytes: int, progress: Callable[[int], None]) -> Path:
    shards, done = list(_plan(index, shard_bytes)), 0
    for shard in shards:
        file = folder / shard.name
        if not file.is_file() or file.stat().st_size != shard.size:
            _write(index, shard, file)
        done += len(shard.rows)
        progress(done)
    placed = {name: np.full(len(index), -1, dtype=kind.to_pandas_dtype()) for name, kind in PLACED.items()}
    for number, shard in enumerate(shards):
        placed["shard"][shard.rows], placed["offset"][shard.rows] = number, shard.offsets
    table = index.table
    for name, values in placed.items():
        table = table.set_column(table.schema.get_field_index(name), SCHEMA.field(name), pa.array(values))
    names, sizes = [shard.name for shard in shards], [shard.size for shard in shards]
    packed = Index(index.dataset, folder, table).with_facts(shards=json.dumps(names), sizes=json.dumps(sizes))
    packed.save(folder / INDEX)
    for left in folder.iterdir():  # of an earlier, other content, or of a process that was killed
        if left.name not in names and OURS.fullmatch(left.name):
            left.unlink()
    return folder


def _plan(index: Index, shard_bytes: int) -> Iterator[Shard]:
    """What lies where, from the index alone. Damaged images are left out."""
    sizes, crcs = index.table["bytes"].to_numpy(), index.table["crc"].to_numpy()
    rows: list[int] = []
    offsets: list[int] = []
    position, digest, number = 0, hashlib.blake2b(digest_size=8), 0

    def finished() -> Shard:
        end = position + 2 * BLOCK
        size = -(-end // tarfile.RECORDSIZE) * tarfile.RECORDSIZE
        return Shard(f"{number:05d}-{digest.hexdigest()}.tar", np.array(rows), np.array(offsets), size)

    for row in np.flatnonzero(index.damaged == 0).tolist():
        name = index.table["path"][row].as_py()
        length, size = len(_header(name, int(sizes[row]))), int(sizes[row])
        if rows and position + length + size > shard_bytes:
            yield finished()
            rows, offsets, position, digest, number = [], [], 0, hashlib.blake2b(digest_size=8), number + 1
        rows.append(row)
        offsets.append(position + length)
        position += length + -(-size // BLOCK) * BLOCK
        digest.update(f"{name}\0{size}\0{crcs[row]}\0".encode())
    if rows:
        yield finished()


def _header(name: str, size: int) -> bytes:
    """A member's header: the same bytes whoever writes them, and when."""
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(tarfile.PAX_FORMAT, "utf-8")


def _write(index: Index, shard: Shard, file: Path) -> None:
    """One shard, read back before it gets its name."""
    part = file.with_suffix(f".part{os.getpid()}")
    crcs = index.table["crc"].to_numpy()
    try:
        with part.open("w+b") as tar:
            for row, offset in zip(shard.rows.tolist(), shard.offsets.tolist(), strict=True):
                item = index.item(row)
                try:
                    content = read(item)
                except Damaged as reason:
                    raise InputError(f"{item.path}: {reason}; run recipes/data.py index --anew") from None
                tar.write(_header(index.table["path"][row].as_py(), len(content)))
                assert tar.tell() == offset
                tar.write(content)
                tar.write(bytes(-len(content) % BLOCK))
            tar.write(bytes(shard.size - tar.tell()))
            tar.flush()
            os.fsync(tar.fileno())
            os.posix_fadvise(tar.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # what is compared comes from the disk
            for row, offset in zip(shard.rows.tolist(), shard.offsets.tolist(), strict=True):
                size = int(index.table["bytes"][row].as_py())
                if zlib.crc32(os.pread(tar.fileno(), size, offset)) != crcs[row]:
                    raise InputError(f"{part}: does not hold what was written; check the disk")
        os.replace(part, file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
