"""Parsers on damaged copies: whatever is done to a tree, records that hold together come out, or one clear line.

A case takes the small tree of a data set and damages it once to three times: files and folders renamed, moved, deleted,
swapped for each other, linked to nothing or to themselves, strays with odd names, lists whose bytes, lines, fields or
JSON values are changed. The slow test draws 100,000 of them.
"""

import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.io import savemat
from test_datasets import BY_NAME, CUHK03_IMAGES, DATALISTS, TREES

from engine.data.datasets import DataSet
from engine.data.datasets.datalist import records
from engine.data.index import build_index, find_roots
from engine.data.record import MODALITIES, SPLITS
from engine.errors import InputError


def matlab() -> bytes:
    """The lists of CUHK03 as its authors' MATLAB file."""
    names = np.array([["1_001_1_01.png"], ["1_003_2_08.png"], ["1_003_1_02.png"]], dtype=object)
    table = {"filelist": names, "labels": np.array([[0], [5], [5]]), "camId": np.array([[1], [2], [1]])}
    table |= {"train_idx": np.array([[1]]), "query_idx": np.array([[2]]), "gallery_idx": np.array([[3]])}
    stream = io.BytesIO()
    savemat(stream, table)
    return stream.getvalue()


def as_bytes(content: object) -> bytes:
    text = content if isinstance(content, str) else json.dumps(content)
    return text.encode()


COPIES: list[tuple[str, dict[str, bytes]]] = [  # data set, its files
    (name.split("/")[0], {file: as_bytes(content) for file, content in tree.items()})
    for name, (tree, _) in (TREES | DATALISTS).items()
]
COPIES.append(("cuhk03", dict.fromkeys(CUHK03_IMAGES, b"") | {"cuhk03_new_protocol_config_detected.mat": matlab()}))

NUMBERS = ["-1", "0000", "0", "1", "-7", "3.0", "nan", "1e9", "99999999999999999999", "٣"]
PLACES = ["../../etc/passwd", "/etc/passwd", "a/../..", ".", "..", "/", "\\", "C:\\x\\y.jpg", "é", "a\x00b", "a\nb"]
WIDE = ["", " ", "\t", ",", "\r", "\n\n", "\ufeff", "\u2028", "9" * 5000, "n" * 300, "[" * 3000]
TOKENS = NUMBERS + PLACES + WIDE
VALUES: list[Any] = [None, True, False, 0, -1, 3.0, float("nan"), 10**30, "7", [], {}, [[]], [None], {"a": 1}]
VALUES += ["\ud800", ["\udfff"], ["a"] * 3, *PLACES, *WIDE]
STRAYS = ["Thumbs.db", ".DS_Store", "._x.jpg", "a b.txt", "a\nb.jpg", "é\udcff.jpg", "n" * 250 + ".jpg", "\\"]
STRAYS += ["train.txt", "x.json", "query", "datalist", "real1", "-1_c1s1_000401_03.jpg", "0002_c1s1_000451_03.JPG"]
STRAYS += ["9" * 200 + "_1_c1_1.png"]

BESIDE = b"1_2.jpg 3\n4_5.jpg 6\n"

Draw = Callable[[st.SearchStrategy], Any]


def change_line(draw: Draw, data: bytes) -> bytes:
    """One line deleted, repeated or cut, or one of its fields replaced; other separators and line ends."""
    lines = data.decode("utf-8", "replace").split("\n")
    at, kind = draw(st.integers(0, len(lines) - 1)), draw(st.integers(0, 4))
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines.insert(at, lines[at])
    elif kind == 2:
        lines[at] = lines[at][: draw(st.integers(0, len(lines[at])))]
    else:
        fields = lines[at].split(" ")
        fields[draw(st.integers(0, len(fields) - 1))] = draw(st.sampled_from(TOKENS))
        lines[at] = draw(st.sampled_from([" ", "\t", ",", "  ", ", "])).join(fields)
    return draw(st.sampled_from(["\n", "\r\n", "\r"])).join(lines).encode("utf-8", "replace")


def change_value(draw: Draw, data: bytes) -> bytes:
    """One value of a JSON file, at any depth, replaced, removed or repeated."""
    try:
        top = json.loads(data)
    except ValueError:
        return data
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
        for key in keys:
            places.append((value, key))
            walk(value[key])

    walk(top)
    kind = draw(st.integers(0, 4))
    if not places or kind == 0:
        return json.dumps(draw(st.sampled_from(VALUES))).encode()
    holder, key = draw(st.sampled_from(places))
    if kind == 1:
        del holder[key]
    elif kind == 2 and isinstance(holder, list):
        holder.append(holder[key])
    else:
        holder[key] = draw(st.sampled_from(VALUES))
    return json.dumps(top).encode()


def change_bytes(draw: Draw, data: bytes) -> bytes:
    """Cut, a few bytes written over, or a mark put before it."""
    kind, at = draw(st.integers(0, 3)), draw(st.integers(0, len(data)))
    if kind == 0:
        return data[:at]
    if kind == 1:
        return draw(st.sampled_from([b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b"\n\n"])) + data
    return data[:at] + draw(st.binary(min_size=1, max_size=4)) + data[at + draw(st.integers(0, 4)) :]


CHANGES = {".txt": change_line, ".json": change_value, ".mat": change_bytes}


def damage(draw: Draw, root: str) -> None:
    """Change one file, folder or list below root."""
    there = [os.path.join(at, name) for at, folders, files in os.walk(root) for name in sorted(folders) + sorted(files)]
    there.sort()
    lists = [path for path in there if os.path.splitext(path)[1] in CHANGES and os.path.isfile(path)]
    kind = draw(st.integers(0, 13 if lists else 8))
    if kind > 8:
        file = Path(draw(st.sampled_from(lists)))
        change = change_bytes if kind == 13 else CHANGES[file.suffix]
        changed = change(draw, file.read_bytes())
        file.unlink()  # never through a link: what it leads to may be no copy
        file.write_bytes(changed)
        return
    if not there:
        return
    path = draw(st.sampled_from(there))
    above, name = os.path.split(path)
    if kind < 2:
        remove(path)
        if kind:
            os.mkdir(path) if draw(st.booleans()) else Path(path).touch()
    elif kind == 2:
        move(path, os.path.join(above, draw(st.sampled_from([name.upper(), name.lower(), *STRAYS]))))
    elif kind == 3:
        move(path, os.path.join(os.path.dirname(draw(st.sampled_from(there))), name))
    elif kind == 4:
        other, spare = draw(st.sampled_from(there)), os.path.join(root, ".spare")
        if not (f"{path}/".startswith(f"{other}/") or f"{other}/".startswith(f"{path}/")):
            os.rename(path, spare)
            os.rename(other, path)
            os.rename(spare, other)
    elif kind == 5:
        remove(path)
        os.symlink(draw(st.sampled_from(["nothing", name, "..", root, outside(root)])), path)
    else:
        inside = os.path.realpath(path).startswith(os.path.realpath(root) + os.sep)  # not where a link leads out
        stray = os.path.join(path if os.path.isdir(path) and inside else above, draw(st.sampled_from(STRAYS)))
        if not os.path.lexists(stray):
            os.mkdir(stray) if kind == 6 else Path(stray).touch() if kind == 7 else os.symlink("nothing", stray)


def outside(root: str) -> str:
    """A file beside root that links may lead to and nothing may change."""
    return os.path.join(os.path.dirname(root), "outside.txt")


def remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)


def move(path: str, to: str) -> None:
    if not os.path.lexists(to) and not to.startswith(f"{path}/"):
        os.rename(path, to)


def check(dataset: DataSet, root: Path) -> None:
    """Read the tree: its records hold together and become columns; InputError where it cannot be read."""
    found = list(records(dataset, root))
    for record in found:
        for path in filter(None, (record.path, record.clothes_picture)):
            assert (root / path).is_file()
            assert not path.startswith("/")
            assert ".." not in path.split("/")
        assert record.pid >= 0
        assert record.split in SPLITS
        assert record.modality in MODALITIES
        assert all(text.strip() for text in record.captions)
    # a COCAS+ query is listed once for each outfit that it asks for; SYNTH-PEDES is too long to look for repetitions
    keys = found if dataset.name == "cocas" else [(record.path, record.split) for record in found]
    assert dataset.name == "synth_pedes" or len(set(keys)) == len(keys)
    index = build_index(dataset, root)  # reads again
    rows = len(found)  # then come pictures of clothes
    assert index.table["path"].to_pylist()[:rows] == [record.path for record in found]
    assert index.pid[:rows].tolist() == [record.pid for record in found]
    assert index.camera[:rows].tolist() == [record.camera for record in found]
    assert index.table["captions"].to_pylist()[:rows] == [list(record.captions) for record in found]


def try_case(draw: Draw, folder: Path) -> None:
    """Draw a copy and its damage, look for data sets in the folder and check those found."""
    name, tree = draw(st.sampled_from(COPIES))
    data = folder / "data"
    top = data / BY_NAME[name].folders[0]
    beside = Path(outside(str(data)))
    beside.write_bytes(BESIDE)
    try:
        for above in {top / os.path.dirname(file) for file in tree}:
            above.mkdir(parents=True, exist_ok=True)
        for file, content in tree.items():
            (top / file).write_bytes(content)
        for _ in range(draw(st.integers(1, 3))):
            damage(draw, str(data))
        try:
            for dataset, root in find_roots(data):
                check(dataset, root)
        except InputError as error:
            message = str(error)
        else:
            message = str(data)
        assert str(data) in message
        assert len(message.splitlines()) == 1
    finally:
        shutil.rmtree(data)
    assert beside.read_bytes() == BESIDE
    assert os.listdir(folder) == [beside.name]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """In memory where there is such a place: a case writes a dozen files."""
    memory = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as path:
        yield Path(path)


ANY = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))


@settings(ANY, max_examples=2500, derandomize=True)
@given(data=st.data())
def test_damaged_copies(data, folder):
    try_case(data.draw, folder)


@pytest.mark.slow
@settings(ANY, max_examples=20_000)
@given(data=st.data())
def test_damaged_copies_at_length(data, folder):
    try_case(data.draw, folder)


@settings(ANY, max_examples=100, derandomize=True)
@given(data=st.data())
def test_damage_does_not_follow_links_out_of_the_copy(data, folder):
    root, beside = folder / "data", folder / "outside.txt"
    root.mkdir()
    beside.write_bytes(BESIDE)
    (root / "list.txt").symlink_to(beside)
    try:
        damage(data.draw, str(root))
    finally:
        shutil.rmtree(root)
    assert beside.read_bytes() == BESIDE
    assert os.listdir(folder) == [beside.name]
