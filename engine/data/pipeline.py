"""Encoded files -> normalised float images: one DALI graph for CPU and GPU, for training, clothes pictures and tests.

Whoever needs pictures writes a `source(batch number) -> Pictures`: stateless, so any batch can be made again. DALI
reads ahead through it, decodes (`mixed` on a GPU, `cpu` without), crops, resizes, augments and normalises; torch
receives the result by DLPack. No DALIGenericIterator: it ends an epoch silently after a damaged file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn
from nvidia.dali import types as dali_types
from nvidia.dali.pipeline import Pipeline
from torch import Tensor

from engine.data.index import WHOLE, Box
from engine.data.sampler import Augmentation

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, RGB in 0..1
PADDING = 10  # pixels of the resized image on each side before the random crop


class Pictures(NamedTuple):
    """One batch of files. paths: B files; boxes: [B, 4] float32 left, top, right, bottom as fractions; how to
    augment."""

    paths: Sequence[Path]
    boxes: NDArray[np.float32]
    augmentation: Augmentation


def plain(paths: Sequence[Path], boxes: Sequence[Box] | None = None) -> Pictures:
    """Pictures without augmentation (tests, clothes)."""
    count = len(paths)
    rectangles = np.asarray(boxes or [WHOLE] * count, dtype=np.float32)
    nothing = (np.zeros((count, *shape), dtype=np.float32) for shape in ((), (2,), (4,), (4,)))
    return Pictures(paths, rectangles, Augmentation(*nothing))


class DecodeError(RuntimeError):
    """A file of the batch cannot be decoded. `paths` names those that fail alone."""

    def __init__(self, paths: Sequence[Path]):
        super().__init__("cannot decode " + ", ".join(map(str, paths)))
        self.paths = list(paths)


class PicturePipeline:
    """Batches of `source`, in order, starting at batch number `start`; `next()` never skips one.

    size            (height, width) of the result
    batch           most pictures in a batch
    augment         whether the graph holds the augmenting steps; colour_jitter: strength 0..1
    device          torch device; a CUDA device decodes there
    """

    def __init__(
        self,
        source: Callable[[int], Pictures],
        *,
        size: tuple[int, int],
        batch: int,
        augment: bool,
        device: torch.device,
        threads: int = 2,
        start: int = 0,
        colour_jitter: float = 0.0,
    ):
        self.source, self.number = source, start
        self.settings: dict[str, Any] = {
            "size": size,
            "batch": batch,
            "augment": augment,
            "device": device,
            "threads": threads,
            "colour_jitter": colour_jitter,
        }
        self.pipe = _graph(lambda number: source(start + number), **self.settings)
        self.pipe.build()

    def next(self) -> Tensor:
        """[B, 3, H, W] float32 on the device. DecodeError names damaged files; the following call goes on after
        them."""
        number, self.number = self.number, self.number + 1
        try:
            return _to_torch(self.pipe.run())
        except RuntimeError as error:
            pictures = self.source(number)
            damaged = [path for path in dict.fromkeys(pictures.paths) if not self.decodes(path)]
            if not damaged:
                raise
            raise DecodeError(damaged) from error

    def again(self, pictures: Pictures) -> Tensor:
        """One batch outside the sequence, with the same graph: how a batch is made once more without a damaged file."""
        pipe = _graph(lambda _: pictures, **self.settings)
        pipe.build()
        return _to_torch(pipe.run())

    def decodes(self, path: Path) -> bool:
        try:
            self.again(plain([path]))
        except (RuntimeError, OSError):
            return False
        return True


def _read(path: Path) -> NDArray[np.uint8]:
    """The file's bytes; one zero byte, which no decoder accepts, for a file that is empty or cannot be read."""
    try:
        content = np.fromfile(path, dtype=np.uint8)
    except OSError:
        content = np.zeros(0, dtype=np.uint8)
    return content if len(content) else np.zeros(1, dtype=np.uint8)


def _graph(
    source: Callable[[int], Pictures],
    *,
    size: tuple[int, int],
    batch: int,
    augment: bool,
    device: torch.device,
    threads: int,
    colour_jitter: float,
) -> Pipeline:
    """The steps an image goes through, top to bottom."""
    types: Any = dali_types  # its names are made when it is imported
    gpu = device.type == "cuda"
    used = 0 if not augment else 4 if colour_jitter else 3  # parts of Augmentation that the graph reads

    def inputs(number: int) -> list[list[NDArray]]:
        pictures = source(number)
        numbers = (pictures.boxes, *pictures.augmentation[:used])
        return [[_read(path) for path in pictures.paths], *([np.asarray(row) for row in part] for part in numbers)]

    pipe = Pipeline(
        batch_size=batch,
        num_threads=threads,
        device_id=(device.index or 0) if gpu else None,
        prefetch_queue_depth=2,
    )
    with pipe:
        encoded, box, *random = fn.external_source(
            source=inputs,
            num_outputs=2 + used,
            batch=True,
            dtype=[types.UINT8, *[types.FLOAT] * (1 + used)],
            ndim=[1, 1, 0, 1, 1, 1][: 2 + used],
        )
        images: Any = fn.decoders.image(
            encoded, device="mixed" if gpu else "cpu", output_type=types.RGB, jpeg_fancy_upsampling=True
        )
        images = fn.slice(
            images,
            rel_start=fn.stack(box[1], box[0]),
            rel_end=fn.stack(box[3], box[2]),
            axis_names="HW",
            out_of_bounds_policy="trim_to_shape",
        )
        images = fn.resize(images, size=list(size), interp_type=types.INTERP_LINEAR, antialias=True)
        mirror: Any = 0
        if augment:
            flip, shift, erase = random[:3]
            mirror = fn.cast(flip, dtype=types.INT32)
            images = fn.slice(
                images,
                start=fn.cast(fn.stack(shift[0], shift[1]) * (PADDING + 0.499), dtype=types.INT32),
                shape=list(size),
                axis_names="HW",
                out_of_bounds_policy="pad",
                fill_values=0,
            )
        if used == 4:
            jitter = random[3]
            images = fn.color_twist(
                images,
                brightness=1 + colour_jitter * jitter[0],
                contrast=1 + colour_jitter * jitter[1],
                saturation=1 + colour_jitter * jitter[2],
                hue=30 * colour_jitter * jitter[3],
            )
        images = fn.crop_mirror_normalize(
            images,
            mirror=mirror,
            mean=[255 * value for value in MEAN],
            std=[255 * value for value in STD],
            dtype=types.FLOAT,
            output_layout="CHW",
        )
        if augment:  # after normalisation 0 is the mean colour
            images = fn.erase(
                images,
                anchor=fn.stack(erase[0], erase[1]),
                shape=fn.stack(erase[2], erase[3]),
                axis_names="HW",
                normalized=True,
                fill_value=0,
            )
        pipe.set_outputs(images)
    return pipe


def _to_torch(outputs: tuple) -> Tensor:
    """Own memory: DALI reuses its buffers after the next run."""
    return torch.from_dlpack(outputs[0].as_tensor()).clone()
