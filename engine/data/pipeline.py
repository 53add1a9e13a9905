"""Encoded images -> normalised float images, for training, clothes pictures and tests.

Whoever needs pictures writes a `source(batch number) -> Pictures`: stateless, so any batch can be made again.
`PicturePipeline` reads ahead through it by one of two forms of the same steps (crop to a box, resize, augment,
normalise):

* DALI, one graph for `cpu` and `mixed` (decoding on a GPU). torch receives the result by DLPack. No
  DALIGenericIterator: it ends an epoch silently after a damaged file.
* threads that decode with libjpeg-turbo and do all the rest in one pass (kernels.augment): on a CPU two to four
  times as fast as DALI's steps (bench/loader.py), so it is what a CPU runs; tests hold it against DALI, pixel by pixel.
"""

from __future__ import annotations

import io
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from engine.data.files import FORMATS, Damaged, Item, decode, read
from engine.data.index import WHOLE, Box
from engine.data.sampler import Augmentation
from kernels.augment import Normalization, augment, augment_parameters

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, RGB in 0..1
PADDING = 10  # pixels of the resized image on each side before the random crop
REACH = PADDING + 0.499  # of a shift; rounded, every whole one up to PADDING is about equally likely
HUE = 30.0  # degrees that colour jitter of strength 1 turns hues by, at most
AHEAD = 2  # batches that are being made while one is used


class Pictures(NamedTuple):
    """One batch of images. items: B; boxes: [B, 4] float32 left, top, right, bottom as fractions; how to augment."""

    items: Sequence[Item]
    boxes: NDArray[np.float32]
    augmentation: Augmentation


def plain(items: Sequence[Item | Path], boxes: Sequence[Box] | None = None) -> Pictures:
    """Pictures without augmentation (tests, clothes)."""
    count = len(items)
    rectangles = np.asarray(boxes or [WHOLE] * count, dtype=np.float32)
    flip, shift, erase, jitter = (np.zeros((count, *shape), dtype=np.float32) for shape in ((), (2,), (4,), (4,)))
    channels = np.tile(np.arange(3, dtype=np.float32), (count, 1))
    known = [item if isinstance(item, Item) else Item(item) for item in items]
    return Pictures(known, rectangles, Augmentation(flip, shift, erase, jitter, channels))


class DecodeError(RuntimeError):
    """Images of the batch cannot be used. reasons: path -> why, in words, for each of them."""

    def __init__(self, reasons: Mapping[Path, str]):
        super().__init__("; ".join(f"{path} {why}" for path, why in reasons.items()))
        self.reasons = dict(reasons)


class PicturePipeline:
    """Batches of `source`, in order, starting at batch number `start`; `next()` never skips one.

    size            (height, width) of the result
    batch           most pictures in a batch
    augment         whether the augmenting steps are done; colour_jitter: strength 0..1
    device          torch device; a CUDA device decodes there
    threads         that decode
    batches         how many there are, counted from 0, beyond which nothing is read ahead; None: without end
    decoder         "auto": DALI for a GPU, threads for a CPU; or "dali", "threads" (CPU only)
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
        batches: int | None = None,
        colour_jitter: float = 0.0,
        decoder: str = "auto",
    ):
        if decoder == "auto":
            decoder = "dali" if device.type == "cuda" else "threads"
        settings: dict[str, Any] = {
            "size": size,
            "augment": augment,
            "threads": threads,
            "colour_jitter": colour_jitter,
        }
        if decoder == "threads":
            self.form: _Threads | _Dali = _Threads(source, start, batches, **settings)
        else:
            self.form = _Dali(source, start, batches, batch=batch, device=device, **settings)

    def next(self) -> Tensor:
        """[B, 3, H, W] float32 on the device. DecodeError names what is damaged; the next call goes on behind it."""
        return self.form.next()

    def again(self, pictures: Pictures) -> Tensor:
        """One batch outside the sequence, made alike: how a batch is made once more without a damaged image."""
        return self.form.again(pictures)


class _Threads:
    """Each batch is made by all threads, a few images at a time, straight into its place."""

    def __init__(
        self,
        source: Callable[[int], Pictures],
        start: int,
        batches: int | None,
        *,
        size: tuple[int, int],
        augment: bool,
        threads: int,
        colour_jitter: float,
    ):
        self.batches = batches
        self.source, self.number, self.size, self.augment = source, start, size, augment
        self.threads, self.colour_jitter = threads, colour_jitter
        self.normalization = Normalization(MEAN, STD)
        self.one_at_a_time = threading.Lock()  # a source need not be thread-safe
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self.ahead: deque[Future[_Making]] = deque()

    def next(self) -> Tensor:
        while len(self.ahead) <= AHEAD:
            number = self.number + len(self.ahead)
            if self.batches is not None and number >= self.batches:
                break
            self.ahead.append(self.pool.submit(self._begin, number))
        self.number += 1
        return self.ahead.popleft().result().result()

    def again(self, pictures: Pictures) -> Tensor:
        return self._make(pictures).result()

    def _begin(self, number: int) -> _Making:
        with self.one_at_a_time:
            pictures = self.source(number)
        return self._make(pictures)

    def _make(self, pictures: Pictures) -> _Making:
        count = len(pictures.items)
        images = torch.empty(count, 3, *self.size)
        drawn = pictures.augmentation
        steps: dict[str, NDArray] = {}
        if self.augment:
            steps = {
                "flip": drawn.flip,
                "shift": drawn.shift * REACH,
                "erase": drawn.erase,
                "channels": drawn.channels,
            }
            if self.colour_jitter:
                steps["colours"] = _colours(drawn.jitter * self.colour_jitter)
        table = augment_parameters(count, box=pictures.boxes, **steps)
        share = max(1, -(-count // (4 * self.threads)))
        parts = [
            self.pool.submit(self._fill, pictures.items, table, images, range(at, min(at + share, count)))
            for at in range(0, count, share)
        ]
        return _Making(images, parts)

    def _fill(self, items: Sequence[Item], table: NDArray[np.float32], images: Tensor, which: range) -> dict[Path, str]:
        damaged = {}
        for i in which:
            try:
                augment(decode(read(items[i])), table[i], self.normalization, images[i])
            except Damaged as reason:
                damaged[items[i].path] = str(reason)
        return damaged


class _Making(NamedTuple):
    """A batch that threads fill; each part returns path -> why for what is damaged."""

    images: Tensor
    parts: list[Future[dict[Path, str]]]

    def result(self) -> Tensor:
        damaged = {path: why for part in self.parts for path, why in part.result().items()}
        if damaged:
            raise DecodeError(damaged)
        return self.images


def _colours(jitter: NDArray[np.float32]) -> NDArray[np.float64]:
    """[B, 3, 4]: matrix and offset of jitter [B, 4], brightness, contrast and saturation as 1 + jitter, hue in HUE
    degrees; saturation and hue in the YIQ space, contrast about grey 128, as DALI's color_twist."""
    to_yiq = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
    from_yiq = np.array([[1, 0.956, 0.621], [1, -0.272, -0.647], [1, -1.107, 1.705]])
    brightness, contrast, saturation = (1 + jitter[:, i].astype(np.float64) for i in range(3))
    angle = np.deg2rad(HUE * jitter[:, 3].astype(np.float64))
    turn = np.zeros((len(jitter), 3, 3))
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = np.cos(angle) * saturation
    turn[:, 1, 2], turn[:, 2, 1] = np.sin(angle) * saturation, -np.sin(angle) * saturation
    matrix = from_yiq @ turn @ to_yiq * (brightness * contrast)[:, None, None]
    offset = brightness * (128 - 128 * contrast)
    return np.concatenate([matrix, np.broadcast_to(offset[:, None, None], (len(jitter), 3, 1))], 2)


class _Dali:
    """DALI's graph, reading ahead by its own threads."""

    def __init__(self, source: Callable[[int], Pictures], start: int, batches: int | None, **settings: Any):
        self.source, self.number, self.settings = source, start, settings
        self.unreadable: dict[Path, str] = {}  # met by this pipeline

        def read_ahead(number: int) -> dict[str, list[NDArray]]:
            number += start  # DALI reads ahead in any case: past the end the last batch again
            return self._inputs(source(number if batches is None else min(number, batches - 1)))

        self.pipe = _graph(read_ahead, **self.settings)
        self.pipe.build()
        self.spare: Any = None

    def next(self) -> Tensor:
        number, self.number = self.number, self.number + 1
        try:
            images = _to_torch(self.pipe.run())
        except RuntimeError as error:
            self._name_damaged(self.source(number), error)
        if self.unreadable:
            self._refuse_unreadable(self.source(number))
        return images

    def again(self, pictures: Pictures) -> Tensor:
        try:
            images = self._by_spare(pictures)
        except RuntimeError as error:
            self._name_damaged(pictures, error)
        self._refuse_unreadable(pictures)
        return images

    def _refuse_unreadable(self, pictures: Pictures) -> None:
        damaged = {item.path: self.unreadable[item.path] for item in pictures.items if item.path in self.unreadable}
        if damaged:
            raise DecodeError(damaged)

    def _inputs(self, pictures: Pictures) -> dict[str, list[NDArray]]:
        """The graph's inputs by name. A file whose header cannot be read is noted, and a black pixel goes in its place:
        at the first such file DALI 2.4's decoder leaves its stack while its threads still work on it."""
        encoded = []
        for item in pictures.items:
            try:
                encoded.append(_with_header(read(item)))
            except Damaged as reason:
                self.unreadable[item.path] = str(reason)
                encoded.append(BLACK)
        numbers = _numbers(pictures, **self.settings)
        return {"encoded": encoded, **numbers}

    def _name_damaged(self, pictures: Pictures, error: RuntimeError) -> NoReturn:
        damaged: dict[Path, str] = {}
        for item in {item.path: item for item in pictures.items}.values():
            try:
                self._by_spare(plain([item]))
                self._refuse_unreadable(plain([item]))
            except DecodeError as alone:
                damaged |= alone.reasons
            except RuntimeError:
                damaged[item.path] = "cannot be decoded"
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


def _with_header(content: bytes) -> NDArray[np.uint8]:
    """The bytes, of which Pillow has read what comes before the compressed data."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.tile:
                return np.frombuffer(content, np.uint8)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        pass
    raise Damaged("is no picture, or its header is damaged")


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
) -> Any:
    """The steps an image goes through, top to bottom. source None: every batch is given to `run`."""
    from nvidia.dali import fn
    from nvidia.dali import types as dali_types
    from nvidia.dali.pipeline import Pipeline

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
            encoded,
            device="mixed" if gpu else "cpu",
            output_type=types.RGB,
            jpeg_fancy_upsampling=True,
            adjust_orientation=False,  # as the field's loaders, which do not look at EXIF data
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
                start=fn.cast(fn.stack(shift[0], shift[1]) * REACH, dtype=types.INT32),
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
                hue=HUE * colour_jitter * jitter[3],
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
