"""Reading MATLAB 5 files: numeric arrays, strings and cell arrays of strings, which lists of images are made of.

Ours because a damaged file, one byte changed, makes `scipy.io.loadmat` end the process with a segmentation fault.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

MATRIX, COMPRESSED = 14, 15  # types of an element
CELL, CHAR, NUMBERS = 1, 4, range(6, 16)  # classes of a matrix
NUMERIC = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
TEXT = {1: "latin-1", 2: "latin-1", 4: "utf-16", 16: "utf-8", 17: "utf-16"}
LARGEST = 1 << 26  # bytes that one element may unfold to


def read_matlab(data: bytes) -> dict[str, list[Any]]:
    """Variable -> its numbers or strings, in MATLAB's order; other kinds are empty. ValueError where it is damaged."""
    order = {b"IM": "<", b"MI": ">"}.get(data[126:128])
    if order is None or data[125 if order == "<" else 124] != 1:
        raise ValueError("not a MATLAB 5 file")
    variables = {}
    for kind, content in _elements(data[128:], order):
        if kind == COMPRESSED:
            try:
                content = zlib.decompressobj().decompress(content, LARGEST)
            except zlib.error as error:
                raise ValueError(f"damaged: {error}") from None
            kind, content = next(_elements(content, order), (0, b""))
        if kind == MATRIX:
            name, values = _matrix(content, order)
            variables[name] = values
    return variables


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """(type, content) of each element: eight bytes of tag and what they announce, or four and up to four."""
    at = 0
    while at < len(data):
        if at + 8 > len(data):
            raise ValueError("cut off")
        kind, size = struct.unpack_from(f"{order}II", data, at)
        start = at + 8
        if kind >> 16:
            kind, size, start = kind & 0xFFFF, kind >> 16, at + 4
        end = start + size
        if end > len(data) or (start == at + 4 and size > 4):
            raise ValueError("cut off")
        yield kind, data[start:end]
        at = end if kind == COMPRESSED else end + -end % 8


def _matrix(data: bytes, order: str, inner: bool = False) -> tuple[str, list[Any]]:
    """Name and values. An element of a cell array (inner) may be no cell array itself."""
    elements = list(_elements(data, order))
    if len(elements) < 4 or len(elements[0][1]) != 8:
        return "", []
    flags, _, (_, name), (kind, content) = elements[:4]
    values: list[Any] = []
    category = struct.unpack(f"{order}II", flags[1])[0] & 0xFF
    if category == CELL and not inner:
        for _, element in elements[3:]:
            values += _matrix(element, order, inner=True)[1][:1] or [""]
    elif category == CHAR and kind in TEXT:
        encoding = TEXT[kind] + {"<": "-le", ">": "-be"}[order] * (TEXT[kind] == "utf-16")
        values = [content.decode(encoding)]
    elif category in NUMBERS and kind in NUMERIC:
        values = np.frombuffer(content, order + NUMERIC[kind]).tolist()
    return name.decode("latin-1"), values
