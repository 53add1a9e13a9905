"""What a data-set file provides (`DataSet`) and what several parsers share: listing files, reading lists, errors."""

from __future__ import annotations

import errno
import json
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from engine.data.record import Record
from engine.errors import InputError

RESEARCH = "research use; see the authors' page"
UNPACK = "unpack the data set as its authors distribute it"
LARGEST = 2**31 - 1  # of the numbers of identities, cameras and outfits
NO_FOLDER = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}


class DataSet(NamedTuple):
    """One row of the table in `engine/data/datasets/__init__.py`.

    name       key in `--dataset`, stream names and metrics
    title      the authors' name
    folders    folder names looked for below `--data` (any case), the first that can be read wins; "." = `--data`
               itself, where it holds one of `holds`
    holds      what the authors' layout holds at least one of (any case); looked for one folder deeper as well. Where
               none is, but a datalist of the released Instruct-ReID code, that is read (`datalist.py`)
    parse      folder -> records, in a fixed (sorted) order; InputError with file:line where the tree is malformed
    trains     tasks (keys of engine.tasks.TASKS) that its train split trains
    protocols  task -> names of its protocols (keys of engine.protocols.PROTOCOLS)
    images     split -> published number of images, for `recipes/data.py describe` to hold a copy against; "test" is
               query and gallery together where the data set has those
    terms      how the data set may be used, one line for the README and `describe`
    overlaps   data sets whose test images may be among its training images; an index leaves those out
    told       what an image's own path tells, where datalists are read: groups `camera` (number, or letter A, B, C) and
               `modality`, or none of these; None where they are not, or by `parse`
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
    overlaps: tuple[str, ...] = ()
    told: re.Pattern[str] | None = None


def entries(folder: Path) -> list[str]:
    """Sorted names in a folder; none where it is missing or cannot be read."""
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def locate(folder: Path, test: Callable[[Path], bool]) -> Path | None:
    """`folder`, or the first folder directly below it, hidden ones left out, that passes the test."""
    below = (folder / name for name in entries(folder) if not name.startswith("."))
    return next((at for at in (folder, *filter(os.path.isdir, below)) if test(at)), None)


FILE, FOLDER, BROKEN = range(3)  # positions in a Listing


class Listing(NamedTuple):
    """Names in a folder, hidden ones left out. broken: neither file nor folder, such as a link to nothing."""

    files: set[str]
    folders: set[str]
    broken: set[str]


class Files:
    """The files below `root`; paths are relative to it with "/". Each folder is read once, when first asked for.

    Names are matched as they are spelt, else without regard to case.
    """

    def __init__(self, root: Path):
        self.root = root
        self._seen: dict[str, Listing] = {}
        self._lower: dict[tuple[str, int], dict[str, str]] = {}

    def _scan(self, folder: str) -> Listing:
        if folder not in self._seen:
            if len(self._seen) >= 4096:  # SYNTH-PEDES has 312,321 folders and lists them one after the other
                self._seen.clear()
                self._lower.clear()
            self._seen[folder] = listing = Listing(set(), set(), set())
            try:
                with os.scandir(self.root / folder) as found:
                    for entry in found:
                        if not entry.name.startswith("."):
                            listing[kind_of(entry)].add(entry.name)
            except ValueError:  # a name that no file can have, with a zero character or half a surrogate pair
                pass
            except OSError as error:
                if error.errno not in NO_FOLDER:
                    raise unreadable(self.root / folder, error) from None
        return self._seen[folder]

    def _spelt(self, folder: str, name: str, kind: int) -> str | None:
        """How a file or folder (kind) of this name is spelt."""
        names = self._scan(folder)[kind]
        if name in names:
            return name
        if (folder, kind) not in self._lower:
            self._lower[folder, kind] = {name.lower(): name for name in sorted(names, reverse=True)}
        return self._lower[folder, kind].get(name.lower())

    def holds(self, folder: str) -> bool:
        """Whether there is such a folder."""
        above, name = posixpath.split(folder)
        return self._spelt(self.folder(above), name, FOLDER) is not None

    def folder(self, path: str) -> str:
        """A folder as it is spelt; `path` where there is none."""
        at = ""
        for part in path.split("/") if path else ():
            name = self._spelt(at, part, FOLDER)
            if name is None:
                return path
            at = posixpath.join(at, name)
        return at

    def find(self, path: str) -> str | None:
        """A file as it is spelt; None where there is none."""
        folder, name = posixpath.split(path)
        if name in self._scan(folder).files:
            return path
        folder = self.folder(folder)
        found = self._spelt(folder, name, FILE)
        return posixpath.join(folder, found) if found else None

    def path(self, name: str) -> Path:
        """Where a file is, as it is spelt, or should be."""
        return self.root / (self.find(name) or name)

    def names(self, folder: str) -> list[str]:
        """Sorted names of the files in `folder`, hidden ones left out."""
        return sorted(self._scan(self.folder(folder)).files)

    def folders(self, folder: str, pattern: re.Pattern[str], example: str) -> list[tuple[str, re.Match[str]]]:
        """(path, match) of the folders in `folder` whose whole name matches, sorted; InputError where there is none."""
        folder = self.folder(folder)
        return self._match(folder, self._scan(folder).folders, pattern, f"folders named like {example}")

    def match(self, folder: str, pattern: re.Pattern[str], example: str = "") -> list[tuple[str, re.Match[str]]]:
        """(path, match) of the files in `folder` whose whole name matches, sorted; InputError where one of them is a
        link to nothing, and with an example where there is none."""
        folder = self.folder(folder)
        listing = self._scan(folder)
        for name in sorted(listing.broken):
            if pattern.fullmatch(name):
                raise InputError(f"{self.root / folder / name}: a link to nothing; mend or remove it")
        return self._match(folder, listing.files, pattern, example and f"images named like {example}")

    def _match(
        self, folder: str, names: set[str], pattern: re.Pattern[str], what: str
    ) -> list[tuple[str, re.Match[str]]]:
        found = [(posixpath.join(folder, name), hit) for name in sorted(names) if (hit := pattern.fullmatch(name))]
        if not found and what:
            state = f"no {what}" if self.holds(folder) else f"no such folder; expected one with {what}"
            raise InputError(f"{self.root / folder}: {state}; {UNPACK}")
        return found

    def listed(self, where: str, *candidates: str) -> str:
        """The first candidate that exists; InputError naming the line that lists it otherwise, or lists what is not
        below the root."""
        paths = [posixpath.normpath(path) for path in candidates]
        paths += [posixpath.normpath(path.replace("\\", "/")) for path in candidates if "\\" in path]
        for path in paths:
            if path.startswith(("/", "../")):
                raise InputError(f"{where}: lists {path!r:.200}, which is not below {self.root}; mend the list")
            if found := self.find(path):
                return found
        raise InputError(
            f"{where}: lists {paths[0]:.200}, which is not in {self.root}; unpack the images again, or mend the list"
        )


def kind_of(entry: os.DirEntry[str]) -> int:
    """FILE, FOLDER or BROKEN, links followed."""
    try:
        return FOLDER if entry.is_dir() else FILE if entry.is_file() else BROKEN
    except OSError:  # a link that leads to itself
        return BROKEN


def unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: cannot be read ({error.strerror}); mend its permissions, or copy it again")


def once(rows: Iterable[tuple[str, Record]]) -> list[Record]:
    """Sorted records of ("file:line", record). An image that a list repeats counts once, with the captions of all its
    lines and the first clothes picture; InputError where the lines differ in anything else."""
    seen: dict[str, Record] = {}
    for where, record in rows:
        first = seen.setdefault(record.path, record)
        if record[:6] != first[:6]:
            raise InputError(
                f"{where}: lists {record.path} again, as another identity, camera or outfit; mend the list"
            )
        seen[record.path] = first._replace(captions=tuple(dict.fromkeys(first.captions + record.captions)))
    return sorted(seen.values())


def lines(file: Path) -> Iterator[tuple[str, str]]:
    """("file:line", text) of each line that is not blank. InputError where the list is missing or not UTF-8."""
    for number, line in enumerate(_read(file).split("\n"), 1):
        if line.strip():
            yield f"{file}:{number}", line.strip()


def path_and_number(file: Path) -> Iterator[tuple[str, str, int]]:
    """("file:line", path, number) of a list of `path number` lines; the path may hold spaces."""
    for where, line in lines(file):
        row = re.fullmatch(r"(.*[^\s,])[\s,]+(\S+)", line)
        if row is None:
            raise InputError(f"{where}: expected 'path number', got {line!r:.200}")
        yield where, row[1], whole(where, row[2])


def fields(line: str) -> list[str]:
    """The columns of a line, separated by tabs, else commas, else spaces."""
    separator = next((mark for mark in "\t," if mark in line), None)
    return [field.strip() for field in line.split(separator)]


def whole(where: str, value: object) -> int:
    """`value` as a whole number from 0 to LARGEST; InputError at `where` otherwise."""
    if isinstance(value, str):
        value = value.strip()
        if 0 < len(value) < 20 and value.isascii() and value.isdigit():
            value = int(value)
    if not (isinstance(value, int) and 0 <= value <= LARGEST) or isinstance(value, bool):
        raise InputError(f"{where}: expected a whole number, got {short(value)}")
    return value


def read_json(file: Path) -> Any:
    """A JSON file's value; InputError with file:line where it is missing or malformed."""
    text = _read(file)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{file}:{error.lineno}: not JSON ({error.msg}); copy the file again") from None
    except (ValueError, RecursionError):  # a number of thousands of digits; brackets in brackets in brackets
        raise InputError(f"{file}: not JSON (a number too long, or brackets too deep); copy the file again") from None


def sentences(where: str, value: object) -> tuple[str, ...]:
    """Captions of an annotation: a sentence or a list of them, blank ones left out."""
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or not all(isinstance(text, str) and is_text(text) for text in listed):
        raise InputError(f"{where}: expected a sentence or a list of sentences, got {short(value)}")
    return tuple(text.strip() for text in listed if text.strip())


def is_text(value: str) -> bool:
    """Whether it can be written as UTF-8; JSON may hold half a surrogate pair."""
    return value.isascii() or not re.search("[\ud800-\udfff]", value)


def short(value: object) -> str:
    """What came, cut; of a number of thousands of digits, or brackets too deep, even `repr` is an error."""
    try:
        return f"{value!r:.80}"
    except (ValueError, RecursionError):
        return f"a huge {type(value).__name__}"


def _read(file: Path) -> str:
    with opened(file) as source:
        return source.read()


@contextmanager
def opened(file: Path) -> Iterator[TextIO]:
    """A list file as text; InputError where it is missing, no file, unreadable or not UTF-8."""
    try:
        if not file.is_file() and file.exists():
            raise InputError(f"{file}: a file is expected here; {UNPACK}")
        with file.open(encoding="utf-8-sig") as source:
            yield source
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; {UNPACK}") from None
    except OSError as error:
        raise unreadable(file, error) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
