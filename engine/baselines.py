"""What needs no learning: colours and pixels compared, and queries whose picture or instruction is another query's.

A trained model must beat the first two and suffer from the last two. The choices here (soft bins, stripes, weights
towards the middle, lighting taken out) are those that served best on the drawn data: hard bins and no weights give half
the mAP, and a baseline is worth what it costs to beat.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.data.files import Damaged, Item, picture
from engine.data.index import WHOLE, Box, Index
from engine.errors import InputError


def histogram(item: Item, box: Box = WHOLE, *, clothes: bool = False) -> NDArray[np.float32]:
    """[D] unit vector whose dot product with another is the mean Bhattacharyya coefficient of their stripes.

    A person's picture: 12 stripes of 4 x 4 x 4 RGB bins after scaling each channel to one mean, which takes out the
    lighting; a picture of clothes: 6 stripes of 8 x 8 x 8, as they are. A pixel is shared by the eight nearest bins.
    InputError names a file that cannot be decoded.
    """
    bins, stripes = (8, 6) if clothes else (4, 12)
    image = _read(item, box, (64, 32))
    if not clothes:
        image = np.clip(image * (100 / (image.mean((0, 1)) + 1)), 0, 255)
    high, wide, _ = image.shape
    place = image / 255 * (bins - 1)
    low = np.minimum(place.astype(np.int64), bins - 2)
    part = place - low
    stripe = (np.arange(high) * stripes // high)[:, None]
    counts = np.zeros(stripes * bins**3)
    for corner in np.ndindex(2, 2, 2):
        share = np.where(corner, part, 1 - part).prod(-1) * _middle(wide, 0.12)
        code = np.ravel_multi_index((stripe, *np.moveaxis(low + corner, -1, 0)), (stripes, bins, bins, bins))
        counts += np.bincount(code.ravel(), share.ravel(), len(counts))
    return np.sqrt(counts / counts.sum()).astype(np.float32)


def pixels(item: Item) -> NDArray[np.float32]:
    """[1536] unit vector: the picture at 32 x 16, each channel of mean 0 and deviation 1, weighted towards the middle.
    InputError names a file that cannot be decoded."""
    image = _read(item, WHOLE, (32, 16))
    image = (image - image.mean((0, 1))) / (image.std((0, 1)) + 1) * np.sqrt(_middle(16, 0.2))[:, None]
    return (image / max(np.linalg.norm(image), 1e-6)).ravel().astype(np.float32)


def exchange(index: Index, queries: NDArray[np.int64], seed: int) -> NDArray[np.int64] | None:
    """Whose picture or instruction each query gets: a permutation of `queries` [Q] in which every query meets another
    identity, asked for by another clothes picture and in other words. None where there is none."""
    facts = [(index.pid[row], index.clothes_picture(row), (index.captions(row) or [row])[0]) for row in queries]

    def alike(i: int, j: int) -> bool:
        return any(a == b for a, b in zip(facts[i], facts[j], strict=True))

    order = np.random.Generator(np.random.Philox(seed)).permutation(len(queries)).tolist()
    for i in range(len(order)):
        if alike(i, order[i]):
            for j in range(len(order)):
                if not alike(i, order[j]) and not alike(j, order[i]):
                    order[i], order[j] = order[j], order[i]
                    break
            else:
                return None
    return queries[order]


def _read(item: Item, box: Box, size: tuple[int, int]) -> NDArray[np.float64]:
    """[H, W, 3] RGB 0..255 of the box (fractions of the picture), resized to (height, width)."""
    try:
        image = picture(item)
    except Damaged as reason:
        raise InputError(f"{item.path}: test image {reason}; replace the file") from None
    wide, high = image.size
    corners = (box[0] * wide, box[1] * high, box[2] * wide, box[3] * high)
    return np.asarray(image.resize(size[::-1], Image.Resampling.BOX, box=corners)).astype(np.float64)


def _middle(wide: int, deviation: float) -> NDArray[np.float64]:
    """[W] weights of the columns, normal around the middle, where a person crop shows the person; deviation: in widths
    of the picture."""
    return np.exp(-0.5 * (((np.arange(wide) + 0.5) / wide - 0.5) / deviation) ** 2)
