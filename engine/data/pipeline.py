"""Encoded files -> normalised float images: one DALI graph for CPU and GPU, for training, clothes pictures and tests.

Whoever needs pictures writes a `source(batch number) -> Pictures`: stateless, so any batch can be made again. DALI
reads ahead through it, decodes (`mixed` on a GPU, `cpu` without), crops, resizes, augments and normalises; torch
receives the result by DLPack. No DALIGenericIterator: it ends an epoch silently after a damaged file.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn
from nvidia.dali import types as dali_types
from nvidia.dali.pipeline import Pipeline
from PIL import Image
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
    flip, shift, erase, jitter = (np.zeros((count, *shape), dtype=np.float32) for shape in ((), (2,), (4,), (4,)))
    channels = np.tile(np.arange(3, dtype=np.float32), (count, 1))
    return Pictures(paths, rectangles, Augmentation(flip, shift, erase, jitter, channels))


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
        self.unreadable: set[Path] = set()  # met by this pipeline
        self.pipe = _graph(lambda number: self._inputs(source(start + number)), **self.settings)
        self.pipe.build()
        self.spare: Pipeline | None = None

    def next(self) -> Tensor:
        """[B, 3, H, W] float32 on the device. DecodeError names damaged files; the next call goes on behind them."""
        number, self.number = self.number, self.number + 1
        try:
            images = _to_torch(self.pipe.run())
        except RuntimeError as error:
            self._name_damaged(self.source(number), error)
        if self.unreadable:
            self._refuse_unreadable(self.source(number))
        return images

    def again(self, pictures: Pictures) -> Tensor:
        """One batch outside the sequence, with the same graph: how a batch is made once more without a damaged file."""
        try:
            images = self._by_spare(pictures)
        except RuntimeError as error:
            self._name_damaged(pictures, error)
        self._refuse_unreadable(pictures)
        return images

    def _refuse_unreadable(self, pictures: Pictures) -> None:
        damaged = [path for path in dict.fromkeys(pictures.paths) if path in self.unreadable]
        if damaged:
            raise DecodeError(damaged)

    def _inputs(self, pictures: Pictures) -> dict[str, list[NDArray]]:
        """The graph's inputs by name. A file whose header cannot be read is noted, and a black pixel goes in its place:
        at the first such file DALI 2.4's decoder leaves its stack while its threads still work on it."""
        encoded = [_read(path) for path in pictures.paths]
        self.unreadable |= {path for path, content in zip(pictures.paths, encoded, strict=True) if content is None}
        numbers = _numbers(pictures, **self.settings)
        return {"encoded": [BLACK if content is None else content for content in encoded], **numbers}

    def _name_damaged(self, pictures: Pictures, error: RuntimeError) -> NoReturn:
        damaged = []
        for path in dict.fromkeys(pictures.paths):
            try:
                self._by_spare(plain([path]))
                self._refuse_unreadable(plain([path]))
            except RuntimeError:
                damaged.append(path)
        if not damaged:
            raise error
        raise DecodeError(damaged) from error

    def _by_spare(self, pictures: Pictures) -> Tensor:
        """Through a second pipeline of the same graph, fed by hand. It is built once and kept: building one for each
        batch with a damaged file crashes DALI 2.4 while the first is reading ahead."""
        if self.spare is None:
            self.spare = _graph(None, **self.settings)
            self.spare.build()
        return _to_torch(self.spare.run(**self._inputs(pictures)))


def _read(path: Path) -> NDArray[np.uint8] | None:
    """The file's bytes; None where they do not begin as a picture does."""
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as image:  # reads up to the compressed data
            return np.frombuffer(content, np.uint8) if image.tile else None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


def _black() -> NDArray[np.uint8]:
    stream = io.BytesIO()
    Image.new("RGB", (1, 1)).save(stream, "png")
    return np.frombuffer(stream.getvalue(), np.uint8).copy()


BLACK = _black()


def _numbers(pictures: Pictures, *, augment: bool, colour_jitter: float, **_: Any) -> dict[str, list[NDArray]]:
    """What the graph's steps read beside the files."""
    numbers = {"box": pictures.boxes}
    if augment:
        numbers |= pictures.augmentation._asdict()
        if not colour_jitter:
            del numbers["jitter"]
    return {name: [np.asarray(row) for row in rows] for name, rows in numbers.items()}


def _graph(
    source: Callable[[int], dict[str, list[NDArray]]] | None,
    *,
    size: tuple[int, int],
    batch: int,
    augment: bool,
    device: torch.device,
    threads: int,
    colour_jitter: float,
) -> Pipeline:
    """The steps an image goes through, top to bottom. source None: every batch is given to `run`."""
    types: Any = dali_types  # its names are made when it is imported
    gpu = device.type == "cuda"
    names = ["encoded", *_numbers(plain([]), augment=augment, colour_jitter=colour_jitter)]
    kinds = [types.UINT8, *[types.FLOAT] * (len(names) - 1)]
    sizes = [0 if name == "flip" else 1 for name in names]
    pipe = Pipeline(
        batch_size=batch,
        num_threads=threads,
        device_id=(device.index or 0) if gpu else None,
        prefetch_queue_depth=1 if source is None else 2,
    )
    with pipe:
        if source is None:
            parts: Any = [
                fn.external_source(name=name, dtype=kind, ndim=ndim)
                for name, kind, ndim in zip(names, kinds, sizes, strict=True)
            ]
        else:
            read = source
            parts = fn.external_source(
                source=lambda number: list(read(number).values()),
                num_outputs=len(names),
                batch=True,
                dtype=kinds,
                ndim=sizes,
            )
        encoded, box, *random = parts
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
            flip, shift, erase, channels = random[0], random[1], random[2], random[-1]
            mirror = fn.cast(flip, dtype=types.INT32)
            images = fn.slice(
                images,
                start=fn.cast(fn.stack(shift[0], shift[1]) * (PADDING + 0.499), dtype=types.INT32),
                shape=list(size),
                axis_names="HW",
                out_of_bounds_policy="pad",
                fill_values=0,
            )
            taken = [
                fn.slice(images, start=fn.cast(channels[i : i + 1], dtype=types.INT32), shape=[1], axes=[2])
                for i in range(3)
            ]
            images = fn.cat(*taken, axis=2)
        if augment and colour_jitter:
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
    """Own memory: DALI reuses its buffers once the outputs are dropped, so the copy must be done by then."""
    images = torch.from_dlpack(outputs[0].as_tensor()).clone()
    if images.is_cuda:
        torch.cuda.current_stream(images.device).synchronize()
    return images
