"""One picture -> one augmented, normalised image, on a CPU, in one pass over memory.

    crop to a box -> resize -> move the window -> flip -> choose channels -> change colours -> normalise -> erase

A chain of library calls writes and reads an image of 256 x 128 once for each of these; here the resized rows stay in
the cache, flip, window and channels cost nothing (they are folded into where values are taken from), and 393 kB of
result are written once. Resizing is linear with antialias: each result pixel is the mean of the source under a
triangle of radius max(1, source / result) pixels, as in Pillow, torch and DALI, but without rounding to whole grey
levels between the steps. The same bits on every processor; picture by picture, so that a caller's threads share the
work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels._library import extension

FIELDS = {"box": 4, "flip": 1, "shift": 2, "erase": 4, "channels": 3, "colours": 12, "coloured": 1}  # csrc/augment.h
WIDTH = sum(FIELDS.values())
AT = dict(zip(FIELDS, np.cumsum([0, *FIELDS.values()]).tolist(), strict=False))


def augment_parameters(
    count: int,
    *,
    box: NDArray[Any] | None = None,
    flip: NDArray[Any] | None = None,
    shift: NDArray[Any] | None = None,
    erase: NDArray[Any] | None = None,
    channels: NDArray[Any] | None = None,
    colours: NDArray[Any] | None = None,
) -> NDArray[np.float32]:
    """[B, 27] float32: a row for each of `count` pictures, for `augment`. None: that step does nothing.

    box       [B, 4] left, top, right, bottom as fractions of the picture: what of it is resized
    flip      [B] 0 or 1: left becomes right
    shift     [B, 2] whole pixels of the result that the window moves down and to the right; outside it is black
    erase     [B, 4] top, left, height, width as fractions of the result: becomes 0, the mean colour
    channels  [B, 3] the channel (0, 1, 2) that red, green and blue are taken from
    colours   [B, 3, 4] matrix and offset that colours of 0..255 go through, cut to 0..255
    """
    table = np.zeros((count, WIDTH), dtype=np.float32)
    table[:, AT["box"] : AT["box"] + 4] = (0, 0, 1, 1)
    table[:, AT["channels"] : AT["channels"] + 3] = (0, 1, 2)
    given = {"box": box, "flip": flip, "shift": shift, "erase": erase, "channels": channels, "colours": colours}
    for name, values in given.items():
        if values is None:
            continue
        if np.size(values) != count * FIELDS[name]:
            raise ValueError(f"{name}: expected {FIELDS[name]} numbers for each of {count}, got {np.shape(values)}")
        table[:, AT[name] : AT[name] + FIELDS[name]] = np.reshape(values, (count, -1))
    table[:, AT["shift"] : AT["shift"] + 2] = np.rint(table[:, AT["shift"] : AT["shift"] + 2])
    table[:, AT["coloured"]] = colours is not None
    chosen = table[:, AT["channels"] : AT["channels"] + 3]
    if not np.isin(chosen, (0, 1, 2)).all():
        raise ValueError(f"channels: expected 0, 1 or 2, got {chosen[~np.isin(chosen, (0, 1, 2))][0]}")
    return table


def augment_reference(
    picture: NDArray[np.uint8], how: NDArray[np.float32], mean: Sequence[float], std: Sequence[float], size: tuple
) -> Tensor:
    """As `augment`, by torch's operators, step after step: the image [3, h, w] float32 of size (h, w). picture [H, W, 3
    or 4] uint8; how [27] float32; mean, std: of colours in 0..1."""
    (height, width), (h, w) = picture.shape[:2], size
    step = {name: how[AT[name] : AT[name] + count].astype(np.float64) for name, count in FIELDS.items()}
    left, right = _span(step["box"][0], step["box"][2], width)
    top, bottom = _span(step["box"][1], step["box"][3], height)
    part = torch.from_numpy(picture[top:bottom, left:right, :3].copy()).permute(2, 0, 1).double()
    image = (_triangles(bottom - top, h) @ part @ _triangles(right - left, w).T).float()
    down, across = step["shift"].astype(int)
    reach = max(abs(down), abs(across))
    image = torch.nn.functional.pad(image, (reach,) * 4)[:, reach + down :, reach + across :][:, :h, :w]
    image = image[step["channels"].astype(int)]
    if step["coloured"]:
        matrix = torch.from_numpy(step["colours"]).float().view(3, 4)
        image = (torch.einsum("cd,dhw->chw", matrix[:, :3], image) + matrix[:, 3, None, None]).clamp(0, 255)
    image = image.flip(2) if step["flip"] else image
    image = (image / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    y, x, tall, wide = how[AT["erase"] : AT["erase"] + 4]
    image[:, int(y * h) : int((y + tall) * h), int(x * w) : int((x + wide) * w)] = 0
    return image


class Normalization:
    """(colour / 255 - mean) / std as one product and sum; mean, std: of colours in 0..1, three each."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        self.mean, self.std = tuple(mean), tuple(std)
        self.scale = (1 / (255 * np.asarray(std, dtype=np.float64))).astype(np.float32)
        self.bias = (-np.asarray(mean, dtype=np.float64) / np.asarray(std)).astype(np.float32)


def augment(picture: NDArray[np.uint8], how: NDArray[np.float32], normalization: Normalization, out: Tensor) -> None:
    """Write the image into `out`. Without the interpreter's lock: threads may share a batch.

    picture [H, W, 4] uint8, contiguous: red, green, blue and a byte that is not read; H, W >= 1
    how     [27] float32: a row of `augment_parameters`
    out     [3, h, w] float32 on the CPU, contiguous, such as an item of a batch
    """
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 4 or not picture.size:
        raise ValueError(f"picture: expected [H, W, 4] uint8, got {picture.shape} {picture.dtype}")
    if how.shape != (WIDTH,) or how.dtype != np.float32:
        raise ValueError(f"how: expected [{WIDTH}] float32, got {how.shape} {how.dtype}")
    if out.dim() != 3 or out.shape[0] != 3 or out.dtype != torch.float32 or out.is_cuda or not out.is_contiguous():
        raise ValueError(f"out: expected [3, h, w] float32, contiguous, on the CPU, got {tuple(out.shape)} {out.dtype}")
    library = extension()
    if library is None:
        out.copy_(augment_reference(picture, how, normalization.mean, normalization.std, tuple(out.shape[1:])))
        return
    picture, how = np.ascontiguousarray(picture), np.ascontiguousarray(how)
    library.augment_cpu(
        picture.ctypes.data,
        *picture.shape[:2],
        how.ctypes.data,
        out.data_ptr(),
        *out.shape[1:],
        normalization.scale.ctypes.data,
        normalization.bias.ctypes.data,
    )


def _triangles(size: int, wanted: int) -> Tensor:
    """[wanted, size] float64: the weights of each result position. (F.interpolate with antialias does the same, but
    torch 2.15 repeats the first row where the picture is one pixel wide.)"""
    centres, scale = (torch.arange(wanted).double() + 0.5) * size / wanted, max(1.0, size / wanted)
    weights = (1 - (torch.arange(size) + 0.5 - centres[:, None]).abs() / scale).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


def _span(low: float, high: float, size: int) -> tuple[int, int]:
    """Whole pixels from one fraction to another, one at least."""
    begin = min(max(int(np.floor(low * size + 0.5)), 0), size - 1)
    return begin, min(max(int(np.floor(high * size + 0.5)), begin + 1), size)
