"""`engine.load`: a stored model that turns pictures and sentences of one's own into features to compare.

    extractor = engine.load("runs/mtl-20260101-120000")
    gallery = extractor.images(paths, "trad", text="do not change clothes", dataset="market1501")
    query = extractor.images([path], "trad", text="do not change clothes", dataset="market1501")
    scores = query @ gallery.T

Nothing but the folder is needed. Pixels and features are those of an evaluation: on a GPU bit for bit, on a CPU up to
the order of sums, which changes with the number of threads (torch.set_num_threads(1): the same bits).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import torch
from tokenizers import Tokenizer
from torch import Tensor

from engine import checkpoint
from engine.config import TrainConfig
from engine.data.files import Item
from engine.data.index import Box
from engine.data.pipeline import DecodeError, PicturePipeline, plain
from engine.errors import InputError
from engine.graphs import Graphs
from engine.instructions import SENTENCES
from engine.model.instruction import Instruction, tokenize
from engine.model.irm import IRM
from engine.runtime import pick_device
from engine.tasks import TASKS

BATCH = 32  # as evaluation's blocks

Images = Sequence[str | Path | Item] | Tensor


def load(path: str | Path, device: str | torch.device = "cpu", backend: str = "torch") -> Extractor:
    """The model of a run, a checkpoint or an exported folder, wherever it lies.

    device   "cpu", "cuda" or "auto"
    backend  "torch", or with an exported folder "onnx" or "torch-export": by its graphs
    InputError where there is no model, or a damaged one. Nothing that is stored is executed: no pickle is read."""
    device = pick_device(device) if isinstance(device, str) else device
    folder = checkpoint.find(Path(path))
    model, config, state, tokenizer = checkpoint.load_model(folder)
    computes = model.to(device) if backend == "torch" else Graphs(folder, backend, device)
    return Extractor(computes, config, state, tokenizer, device)


class Extractor:
    """Features of pictures and sentences. streams: the names "task/data set" that it was trained on."""

    def __init__(
        self,
        model: IRM | Graphs,
        config: TrainConfig,
        state: checkpoint.State,
        tokenizer: Tokenizer,
        device: torch.device,
    ):
        self.model, self.config, self.tokenizer, self.device = model, config, tokenizer, device
        self.streams = list(state.streams)

    def images(
        self,
        images: Images,
        task: str,
        *,
        text: str | Sequence[str] | None = None,
        clothes: Images | None = None,
        clothes_boxes: Sequence[Box] | None = None,
        dataset: str | None = None,
        feature: str | None = None,
    ) -> Tensor:
        """[B, D] float32 unit vectors on the CPU, to be compared by inner product; D = width (feature "cls"), twice
        ("fout") or three times that ("concat"), for text-to-image search the size of the projection.

        images         B files, or [B, 3, h, w] float32 of the model's image_size, RGB, ImageNet-normalised
        task           trad, cc, ctcc, vi, t2i or li
        text           the instruction: one sentence for all, or B; None: the first of the task's sentences
        clothes        ctcc: B pictures of clothes as files or [B, 3, h, w] of the model's clothes_size, or one for all
        clothes_boxes  the part of each file to use: left, top, right, bottom in 0..1 (None: all of it)
        dataset        whose BNNeck to use, such as "market1501"; None: none, as for a data set not trained on
        feature        "cls", "fout" or "concat"; None: what the model's run tested
        """
        if task not in TASKS:
            raise InputError(f"task {task!r}: expected one of {', '.join(TASKS)}")
        kind, count = TASKS[task].instruction, len(images)
        if not count:
            raise InputError("images: none given")
        feature = feature or self.config.feature
        if feature not in ("cls", "fout", "concat"):
            raise InputError(f"feature {feature!r}: expected cls, fout or concat")
        if (clothes is None) == (kind == "clothes") or (text is not None and kind in ("clothes", "query")):
            takes = {"clothes": "`clothes` and no `text`", "query": "neither `text` nor `clothes`"}
            raise InputError(f"task {task} takes {takes.get(kind, '`text` and no `clothes`')}")
        if kind == "description" and text is None:
            raise InputError(f"task {task} takes `text`: a description, or one for each image")
        told = SENTENCES[task][:1] if kind == "sentence" and text is None else text
        told = [told] if isinstance(told, str) else told
        name, given = ("clothes", clothes) if told is None else ("text", told)
        if given is not None and len(given) not in (1, count):
            raise InputError(f"{name}: expected 1 or {count}, as many as images, got {len(given)}")
        if clothes is not None and clothes_boxes is not None and len(clothes_boxes) != len(clothes):
            raise InputError(f"clothes_boxes: expected {len(clothes)}, as many as clothes, got {len(clothes_boxes)}")

        model, stream = self._at(task, dataset)
        with torch.inference_mode():
            asked: Iterator[Instruction | None] = itertools.repeat(None)
            if clothes is not None:
                size = self.config.model.clothes_size
                asked = map(model.instruction_of_clothes, self._decoded(clothes, size, clothes_boxes))
            elif told is not None:
                asked = self._encoded(model, told)
            if given is not None and len(given) == 1:
                asked = itertools.repeat(next(asked))
            found = []
            for pictures, instruction in zip(self._decoded(images, self.config.model.image_size), asked, strict=False):
                seen = model.features(pictures, instruction)
                by_text = kind == "query"
                part = model.image_embedding(seen, stream) if by_text else model.test_feature(seen, stream, feature)
                found.append(part.float().cpu())
            return torch.cat(found)

    def texts(self, texts: str | Sequence[str], *, dataset: str | None = None) -> Tensor:
        """[T, embed] float32 unit vectors of sentences, for the inner product with those of `images(..., "t2i")`.

        dataset  whose statistics whiten them, where the model whitens; the same as the images'"""
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            raise InputError("texts: none given")
        model, stream = self._at("t2i", dataset)
        with torch.inference_mode():
            parts = [model.text_embedding(told, stream).float().cpu() for told in self._encoded(model, texts)]
            return torch.cat(parts)

    def _at(self, task: str, dataset: str | None) -> tuple[IRM, str]:
        """What computes the features of this stream, and its name."""
        stream = f"{task}/{dataset or ''}"
        if dataset is not None and stream not in self.streams:
            known = [name.partition("/")[2] for name in self.streams if name.startswith(f"{task}/")]
            raise InputError(f"dataset {dataset!r}: the model was trained on {', '.join(known) or 'none'} for {task}")
        return self.model if isinstance(self.model, IRM) else cast(IRM, self.model.at(stream)), stream

    def _encoded(self, model: IRM, sentences: Sequence[str]) -> Iterator[Instruction]:
        for block in _blocks(len(sentences)):
            ids, lengths = tokenize(self.tokenizer, list(sentences[block]), self.config.model.text_tokens)
            yield model.instruct.of_text(ids.to(self.device), lengths.to(self.device))

    def _decoded(self, images: Images, size: tuple[int, int], boxes: Sequence[Box] | None = None) -> Iterator[Tensor]:
        """Blocks of pictures. InputError names a file that cannot be decoded."""
        blocks = _blocks(len(images))
        if isinstance(images, Tensor):
            if images.shape[1:] != (3, *size) or images.dtype != torch.float32:
                wanted = f"float32 [B, 3, {size[0]}, {size[1]}]"
                raise InputError(f"images: expected {wanted}, got {images.dtype} {list(images.shape)}")
            yield from (images[block].to(self.device) for block in blocks)
            return
        items = [image if isinstance(image, Item) else Path(image) for image in images]
        pipeline = PicturePipeline(
            lambda number: plain(items[blocks[number]], boxes and boxes[blocks[number]]),
            size=size,
            batch=BATCH,
            augment=False,
            device=self.device,
            threads=self.config.workers,
            batches=len(blocks),
        )
        for _ in blocks:
            try:
                yield pipeline.next()
            except DecodeError as error:
                path, why = next(iter(error.reasons.items()))
                raise InputError(f"{path}: {why}; replace the file or leave it out") from error


def _blocks(count: int) -> list[slice]:
    return [slice(start, start + BATCH) for start in range(0, count, BATCH)]
