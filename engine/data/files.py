"""Image files as the engine reads them: found (`Item`), read and checked (`read`), decoded (`decode`).

An item is a file of its own or a part of a packed shard. What cannot be used raises `Damaged` with the reason in words;
who reads decides what that costs.
"""

from __future__ import annotations

import errno
import functools
import io
import os
import resource
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.errors import InputError

MOST_PIXELS = 89_478_485  # Pillow's own limit; a damaged header may ask for 17 GB
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "PPM", "WEBP", "JPEG2000")


class Item(NamedTuple):
    """One encoded image. path: its own name, in messages as well; shard, offset, size: where its bytes lie in a packed
    data set (shard None: the whole file `path`); crc: CRC-32 of the bytes, -1 where the index did not record it."""

    path: Path
    crc: int = -1
    shard: Path | None = None
    offset: int = 0
    size: int = -1


class Damaged(Exception):
    """The reason, in words, why an image cannot be used."""


def read(item: Item) -> bytes:
    """The encoded bytes, one read. Damaged where they cannot be read or are not those that were indexed."""
    try:
        if item.shard is None:
            content = item.path.read_bytes()
        else:
            content = os.pread(_descriptor(item.shard), item.size, item.offset)
    except OSError as error:
        if error.errno in EXHAUSTED:  # the machine's fault, not the file's
            raise InputError(
                f"{item.shard or item.path}: {error.strerror}; raise the limit, or end other work"
            ) from None
        raise Damaged(f"cannot be read ({error.strerror or error})") from None
    if not content:
        raise Damaged("is empty")
    if item.crc >= 0 and zlib.crc32(content) != item.crc:
        raise Damaged("is not the file that was indexed (checksum)")
    return content


def decode(content: bytes) -> NDArray[np.uint8]:
    """[H, W, 4] uint8: red, green, blue and a byte without meaning, whole pixels as Pillow decodes them (chroma
    interpolated). Damaged for what is no picture, or not a whole one."""
    if content[:2] == b"\xff\xd8":
        import simplejpeg

        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
            if height * width <= MOST_PIXELS and colours in ("YCbCr", "Gray", "RGB"):
                return simplejpeg.decode_jpeg(content, "RGBX")
        except ValueError:
            pass  # it may be less than perfect and still be whole: Pillow says
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise Damaged(f"claims to have {image.width} x {image.height} pixels")
            return np.asarray(image.convert("RGB").convert("RGBX"))
    except Image.UnidentifiedImageError:
        raise Damaged("is no picture") from None
    except Damaged:
        raise
    except Exception as error:  # of many kinds: Pillow's readers of rare formats trust what they read
        raise Damaged(f"cannot be decoded ({error or type(error).__name__})") from None


def picture(item: Item) -> Image.Image:
    """The decoded image for Pillow. Damaged where it cannot be used."""
    return Image.fromarray(np.ascontiguousarray(decode(read(item))[..., :3]))


@functools.cache
def _descriptor(shard: Path) -> int:
    """An open shard: opened once, read by all threads at positions of their own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return os.open(shard, os.O_RDONLY | os.O_CLOEXEC)
