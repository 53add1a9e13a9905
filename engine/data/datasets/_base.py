"""What a data-set file provides (`DataSet`) and what several parsers share: listing files, reading lists, errors."""

from __future__ import annotations

import json
import os
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from engine.data.record import Record
from engine.errors import InputError

RESEARCH = "research use; see the authors' page"


class DataSet(NamedTuple):
    """One row of the table in `engine/data/datasets/__init__.py`.

    name       key in `--dataset`, stream names and metrics
    title      the authors' name
    folders    folder names looked for below `--data` (any case), first hit wins
    holds      what the folder holds: where none of these is in it, the first folder below it that holds one is meant
    parse      folder -> records, in a fixed (sorted) order; InputError with file:line where the tree is malformed
    trains     tasks (keys of engine.tasks.TASKS) that its train split trains
    protocols  task -> names of its protocols (keys of engine.protocols.PROTOCOLS)
    images     split -> published number of images, for `recipes/data.py describe` to hold a copy against; "test" is
               query and gallery together where the data set has those
    terms      how the data set may be used, one line for the README and `describe`
    """

    name: str
    title: str
    folders: tuple[str, ...]
    holds: tuple[str, ...]
    parse: Callable[[Path], Iterator[Record]]
    trains: tuple[str, ...]
    protocols: Mapping[str, tuple[str, ...]]
    images: Mapping[str, int]
    terms: str = RESEARCH


def locate(folder: Path, holds: tuple[str, ...]) -> Path:
    """`folder`, or the first folder directly below it that holds one of `holds` where itself holds none (any case)."""
    below = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    wanted = {name.lower() for name in holds}
    return next((at for at in (folder, *below) if wanted & {name.lower() for name in os.listdir(at)}), folder)


class Files:
    """The files below `root`; paths are relative to it with "/". Each folder is read once, when first asked for."""

    def __init__(self, root: Path):
        self.root = root
        self._seen: dict[str, tuple[set[str], set[str]]] = {}

    def _scan(self, folder: str) -> tuple[set[str], set[str]]:
        if folder not in self._seen:
            if len(self._seen) >= 4096:  # SYNTH-PEDES has 312,321 folders and lists them one after the other
                self._seen.clear()
            try:
                with os.scandir(self.root / folder) as entries:
                    rows = [(entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith(".")]
            except (FileNotFoundError, NotADirectoryError):
                rows = []
            self._seen[folder] = {name for name, down in rows if not down}, {name for name, down in rows if down}
        return self._seen[folder]

    def __contains__(self, path: str) -> bool:
        folder, name = posixpath.split(path)
        return name in self._scan(folder)[0]

    def names(self, folder: str) -> list[str]:
        """Sorted names of the files in `folder`, hidden ones left out."""
        return sorted(self._scan(folder)[0])

    def folders(self, folder: str) -> list[str]:
        """Sorted names of the folders in `folder`; InputError where there is none."""
        names = sorted(self._scan(folder)[1])
        if not names:
            raise InputError(f"{self.root / folder}: no such folder, or no folder in it; {UNPACK}")
        return names

    def match(self, folder: str, pattern: re.Pattern[str], example: str) -> list[tuple[str, re.Match[str]]]:
        """(path, match) of the files in `folder` whose whole name matches, sorted; InputError where there is none."""
        found = [(f"{folder}/{name}", hit) for name in self.names(folder) if (hit := pattern.fullmatch(name))]
        if not found:
            state = "no image named like" if (self.root / folder).is_dir() else "no such folder; expected images like"
            raise InputError(f"{self.root / folder}: {state} {example}; {UNPACK}")
        return found

    def listed(self, where: str, *candidates: str) -> str:
        """The first candidate that exists; InputError naming the line that lists it otherwise."""
        paths = [posixpath.normpath(path) for path in candidates]
        for path in paths:
            if path in self:
                return path
        raise InputError(
            f"{where}: lists {paths[0]}, which is not in {self.root}; unpack the images again, or mend the list"
        )


UNPACK = "unpack the data set as its authors distribute it"


def lines(file: Path) -> Iterator[tuple[str, str]]:
    """("file:line", text) of each line that is not blank. InputError where the list is missing or not UTF-8."""
    for number, line in enumerate(_read(file).split("\n"), 1):
        if line.strip():
            yield f"{file}:{number}", line.strip()


def path_and_number(file: Path) -> Iterator[tuple[str, str, int]]:
    """("file:line", path, number) of a list of `path number` lines; the path may hold spaces."""
    for where, line in lines(file):
        path, _, number = line.replace("\t", " ").rpartition(" ")
        if not path.strip():
            raise InputError(f"{where}: expected 'path number', got {line!r}")
        yield where, path.strip(), whole(where, number)


def whole(where: str, value: object) -> int:
    """`value` as a whole number >= 0; InputError at `where` otherwise."""
    text = str(value).strip()
    if not (text.isascii() and text.isdigit()):
        raise InputError(f"{where}: expected a whole number, got {text!r}")
    return int(text)


def read_json(file: Path) -> Any:
    """A JSON file's value; InputError with file:line where it is missing or malformed."""
    try:
        return json.loads(_read(file))
    except json.JSONDecodeError as error:
        raise InputError(f"{file}:{error.lineno}: not JSON ({error.msg}); copy the file again") from None


def sentences(where: str, value: object) -> tuple[str, ...]:
    """Captions of an annotation: a sentence or a list of them, blank ones left out."""
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or not all(isinstance(text, str) for text in listed):
        raise InputError(f"{where}: expected a sentence or a list of sentences, got {value!r:.80}")
    return tuple(text.strip() for text in listed if text.strip())


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; {UNPACK}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
