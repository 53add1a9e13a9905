"""CUHK03, detected boxes, new protocol (767 / 700 identities): 14,097 images, two cameras per identity.

    cuhk03/images_detected/1_003_2_08.png               camera pair, identity in it, view, image
    cuhk03/splits_new_detected.json                     [{"train" | "query" | "gallery": [[path, pid, camera from 0]]}]
    cuhk03/cuhk03_new_protocol_config_detected.mat      filelist, labels, camId {1,2}, {train,query,gallery}_idx from 1

Either list will do; the JSON is preferred. Of its paths only the name counts (they are those of the machine that wrote
it). Cameras are 1 and 2 from either. The authors' raw `cuhk-03.mat` has to be extracted to `images_detected` first.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from engine.data.datasets._base import UNPACK, DataSet, Files, read_json, whole
from engine.data.record import Record
from engine.errors import InputError

IMAGES, JSON, MAT = "images_detected", "splits_new_detected.json", "cuhk03_new_protocol_config_detected.mat"
SPLITS = ("train", "query", "gallery")
Row = tuple[str, str, int, int]  # where it is listed, image name, identity, camera


def parse(root: Path) -> Iterator[Record]:
    if not (root / IMAGES).is_dir():
        raw = [path for path in (root / "cuhk-03.mat", root / "cuhk03_release" / "cuhk-03.mat") if path.is_file()]
        mend = f"extract the images and lists of {raw[0]} first" if raw else UNPACK
        raise InputError(f"{root}: no folder {IMAGES}; {mend} (expected {IMAGES}/*.png with {JSON} or {MAT})")
    if (root / JSON).is_file():
        rows = _from_json
    elif (root / MAT).is_file():
        rows = _from_mat
    else:
        raise InputError(f"{root}: neither {JSON} nor {MAT}; put one of them beside {IMAGES}")
    files = Files(root)
    for split in SPLITS:
        yield from sorted(
            Record(files.listed(where, f"{IMAGES}/{name}"), pid, camera, split)
            for where, name, pid, camera in rows(root, split)
        )


def _from_json(root: Path, split: str) -> Iterator[Row]:
    splits = read_json(root / JSON)
    try:
        rows = [(str(path), pid, camera) for path, pid, camera in splits[0][split]]
    except (KeyError, IndexError, TypeError, ValueError):
        raise InputError(f"{root / JSON}: expected [{{'{split}': [[path, pid, camera], ...]}}]; {UNPACK}") from None
    for number, (path, pid, camera) in enumerate(rows):
        where = f"{root / JSON}: {split}[{number}]"
        yield where, posixpath.basename(path.replace("\\", "/")), whole(where, pid), whole(where, camera) + 1


def _from_mat(root: Path, split: str) -> Iterator[Row]:
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        table = loadmat(root / MAT, squeeze_me=True)
        keys = ("filelist", "labels", "camId", f"{split}_idx")
        names, pids, cameras, listed = (np.atleast_1d(table[key]) for key in keys)
        if min(listed) < 1:
            raise IndexError("an index below 1")
        rows = [(i, str(names[i - 1]), int(pids[i - 1]), int(cameras[i - 1])) for i in map(int, listed)]
    except (KeyError, IndexError, TypeError, ValueError, NotImplementedError, MatReadError) as error:
        raise InputError(
            f"{root / MAT}: cannot read {split}_idx, filelist, labels, camId ({error}); {UNPACK}"
        ) from None
    yield from ((f"{root / MAT}: filelist({i})", name, pid, camera) for i, name, pid, camera in rows)


DATASET = DataSet(
    name="cuhk03",
    title="CUHK03",
    folders=("cuhk03", "CUHK03", "cuhk03_release", "cuhk03-np", "cuhk"),
    holds=(IMAGES, JSON, MAT, "cuhk-03.mat"),
    parse=parse,
    trains=("trad",),
    protocols={"trad": ("cuhk03",)},
    images={"train": 7_365, "query": 1_400, "gallery": 5_332},
)
