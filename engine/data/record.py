"""One image's facts (`Record`), the columns they are stored in, and the `Batch` the model receives.

A data-set parser yields `Record`s; `engine.data.index` stores them as columns; nothing else crosses that border.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

SPLITS = ("train", "val", "query", "gallery", "test", "picture", "overlap")
MODALITIES = ("vis", "nir")


class Record(NamedTuple):
    """One image as its data set distributes it.

    path             image file relative to the data set's root, "/" as separator
    pid              the data set's own identity number, >= 0 (splits may number independently)
    camera           the data set's own camera number
    split            one of SPLITS; "test" where the protocol itself divides queries from gallery. Parsers do not yield
                     the last two: "picture" (of clothes, no person's image) and "overlap" (a training image that is
                     another data set's test image, too)
    clothes          outfit key, unique in the data set ("" where outfits are not annotated). A COCAS+ Real2 query
                     carries the outfit that is *wanted* (its template's), not the one that is worn
    modality         one of MODALITIES
    captions         sentences that describe the image; for a COCAS+ Real2 query, what is wanted
    clothes_picture  picture of the clothes relative to the root (template or crop); "" = the image's upper-body box
    """

    path: str
    pid: int
    camera: int
    split: str
    clothes: str = ""
    modality: str = "vis"
    captions: tuple[str, ...] = ()
    clothes_picture: str = ""


class Batch(NamedTuple):
    """One micro-step's input on one rank. B = images of this rank; all of one stream.

    stream        index into the run's streams (the same on every rank)
    images        [B, 3, H, W] float32, ImageNet-normalised
    labels        [B] int64, identity within the stream, 0 .. identities-1
    text          [T, L] int64 token ids, T = B or 1 (one sentence for the whole batch); None where pictures instruct
    text_lengths  [T] int64 valid tokens (CLS and SEP included); None with `text`
    clothes       [B, 3, h, w] float32 clothes pictures; None where sentences instruct
    """

    stream: int
    images: Tensor
    labels: Tensor
    text: Tensor | None
    text_lengths: Tensor | None
    clothes: Tensor | None
