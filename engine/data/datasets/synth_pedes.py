"""SYNTH-PEDES: 4,791,771 images of 312,321 people with generated sentences; training only.

    SYNTH-PEDES/Part1..Part11/<id>/<n>.jpg
    SYNTH-PEDES/synthpedes_dataset.json     [{"id", "file_path", "captions": [2-3], ...}]

The JSON has gigabytes: it is read entry by entry and records keep its order. There are no camera numbers: all are 0.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.data.datasets._base import DataSet, Files, opened, sentences, whole
from engine.data.record import Record
from engine.errors import InputError

LIST = "synthpedes_dataset.json"
CHUNK = 1 << 20  # characters read at a time
ENTRY = 1 << 16  # the most one entry may have (they have about 1,000)
SPACE = re.compile(r"\s*")


def parse(root: Path) -> Iterator[Record]:
    files = Files(root)
    file = files.path(LIST)
    for number, entry in enumerate(stream(file)):
        where = f"{file}: entry {number}"
        try:
            listed, captions, pid = entry["file_path"], entry["captions"], entry["id"]
        except (KeyError, TypeError):
            raise InputError(f"{where}: expected {{id, file_path, captions}}; copy the file again") from None
        path = files.listed(where, str(listed))
        yield Record(path, whole(where, pid), 0, "train", captions=sentences(where, captions))


def stream(file: Path) -> Iterator[Any]:
    """The elements of a JSON array, with little more than one chunk of the file in memory."""
    decode, text, at, number = json.JSONDecoder().raw_decode, "", 0, 0
    try:
        with opened(file) as source:
            while True:
                if len(text) - at < ENTRY:
                    text, at = text[at:] + source.read(CHUNK), 0
                at = _skip(text, at)
                if number and text[at : at + 1] == "]":
                    return
                if text[at : at + 1] != ("," if number else "["):
                    raise json.JSONDecodeError("not a JSON array", text, at)
                value, at = decode(text, _skip(text, at + 1))
                yield value
                number += 1
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "a number too long, or brackets too deep")
        raise InputError(f"{file}: damaged after entry {number} ({reason}); copy the file again") from None


def _skip(text: str, at: int) -> int:
    return SPACE.match(text, at).end()  # type: ignore[union-attr]


DATASET = DataSet(
    name="synth_pedes",
    title="SYNTH-PEDES",
    folders=("SYNTH-PEDES", "SYNTH_PEDES", "synth_pedes", "synthpedes", "PLIP"),
    holds=(LIST,),
    parse=parse,
    trains=("t2i",),
    protocols={},
    images={"train": 4_791_771},
    told=re.compile(""),
)
