"""CUHK03, detected boxes, new protocol (767 / 700 identities): 14,097 images, two cameras per identity.

    cuhk03/images_detected/1_003_2_08.png               camera pair, identity in it, view, image
    cuhk03/splits_new_detected.json                     [{"train" | "query" | "gallery": [[path, pid, camera from 0]]}]
    cuhk03/cuhk03_new_protocol_config_detected.mat      filelist, labels, camId {1,2}, {train,query,gallery}_idx from 1

Either list will do; the JSON is preferred. Of its paths only the name counts (they are those of the machine that wrote
it). Cameras are 1 and 2 from either. The authors' raw `cuhk-03.mat` has to be extracted to `images_detected` first.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from engine.data.datasets._base import UNPACK, DataSet, Files, once, read_json, unreadable, whole
from engine.data.datasets._matlab import read_matlab
from engine.data.record import Record
from engine.errors import InputError

IMAGES, JSON, MAT = "images_detected", "splits_new_detected.json", "cuhk03_new_protocol_config_detected.mat"
RAW = ("cuhk-03.mat", "cuhk03_release/cuhk-03.mat")
SPLITS = ("train", "query", "gallery")
Row = tuple[str, str, str, object, object]  # split, where it is listed, image name, identity, camera


def parse(root: Path) -> Iterator[Record]:
    files = Files(root)
    if not files.holds(IMAGES):
        raw = [name for name in RAW if files.find(name)]
        mend = f"extract the images and lists of {files.path(raw[0])} first" if raw else UNPACK
        raise InputError(f"{root}: no folder {IMAGES}; {mend} (expected {IMAGES}/*.png with {JSON} or {MAT})")
    if files.find(JSON):
        rows = list(_from_json(files.path(JSON)))
    elif files.find(MAT):
        rows = list(_from_mat(files.path(MAT)))
    else:
        raise InputError(f"{root}: neither {JSON} nor {MAT}; put one of them beside {IMAGES}")
    for split in SPLITS:
        yield from once(
            (where, Record(files.listed(where, f"{IMAGES}/{name}"), whole(where, pid), whole(where, camera), split))
            for of, where, name, pid, camera in rows
            if of == split
        )


def _from_json(file: Path) -> Iterator[Row]:
    table = read_json(file)
    for split in SPLITS:
        try:
            rows = [(str(path), pid, camera) for path, pid, camera in table[0][split]]
        except (KeyError, IndexError, TypeError, ValueError):
            raise InputError(f"{file}: expected [{{'{split}': [[path, pid, camera], ...]}}]; {UNPACK}") from None
        for number, (path, pid, camera) in enumerate(rows):
            where = f"{file}: {split}[{number}]"
            yield split, where, posixpath.basename(path.replace("\\", "/")), pid, whole(where, camera) + 1


def _from_mat(file: Path) -> Iterator[Row]:
    try:
        table = read_matlab(file.read_bytes())
        names, pids, cameras = (table[key] for key in ("filelist", "labels", "camId"))
        for split in SPLITS:
            for i in map(int, table[f"{split}_idx"]):
                if i < 1:
                    raise IndexError("an index below 1")
                yield split, f"{file}: filelist({i})", str(names[i - 1]), int(pids[i - 1]), int(cameras[i - 1])
    except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
        mend = "copy it again, or save it as version 5"
        raise InputError(
            f"{file}: cannot read filelist, labels, camId and {{train,query,gallery}}_idx ({error}); {mend}"
        ) from None
    except OSError as error:
        raise unreadable(file, error) from None


DATASET = DataSet(
    name="cuhk03",
    title="CUHK03",
    folders=("cuhk03", "CUHK03", "cuhk03_release", "cuhk03-np", "cuhk"),
    holds=(JSON, MAT),
    parse=parse,
    trains=("trad",),
    protocols={"trad": ("cuhk03",)},
    images={"train": 7_365, "query": 1_400, "gallery": 5_332},
    told=re.compile(r"[0-9]+_[0-9]+_(?P<camera>[12])_[0-9]+\.[^/]*$"),
)
