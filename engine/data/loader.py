"""Sample -> Batch: what the sampler chose, decoded, tokenised and handed to the model, one micro-step after another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from engine.config import TrainConfig
from engine.data.pipeline import DecodeError, PicturePipeline, Pictures, plain
from engine.data.record import Batch
from engine.data.sampler import Sample, Sampler
from engine.errors import InputError
from engine.instructions import SENTENCES
from engine.model.instruction import tokenize

ATTEMPTS = 5  # replacements tried for one damaged image before the run stops
MOST_DAMAGED = 0.05  # share of the images drawn above which a run stops


class TrainLoader:
    """`next()` gives the batches of micro-steps start, start+1, ... of one rank.

    quarantine(path, reason, micro_step) is called once for every damaged file met.
    """

    def __init__(
        self,
        sampler: Sampler,
        config: TrainConfig,
        tokenizer: Tokenizer,
        device: torch.device,
        *,
        rank: int,
        start: int,
        quarantine: Callable[[Path, str, int], None],
    ):
        self.sampler, self.config, self.tokenizer, self.device, self.rank = sampler, config, tokenizer, device, rank
        self.micro_step, self.quarantine = start, quarantine
        self.damaged: set[Path] = set()
        self.drawn = self.replaced = 0
        largest = max(P * K for P, K in sampler.batches) // sampler.world
        settings: dict[str, Any] = {"batch": largest, "device": device, "threads": config.workers}
        self.images = PicturePipeline(
            lambda number: self._images(sampler.sample(number, rank)),
            size=config.model.image_size,
            augment=True,
            colour_jitter=config.colour_jitter,
            start=start,
            **settings,
        )
        self.clothes_steps: list[int] = []
        self.clothes: PicturePipeline | None = None
        if any(stream.task.instruction == "clothes" for stream in sampler.streams):
            self.clothes = PicturePipeline(
                lambda number: self._clothes(sampler.sample(self._clothes_step(start, number), rank)),
                size=config.model.clothes_size,
                augment=False,
                **settings,
            )

    def next(self) -> tuple[Batch, Sample]:
        micro_step, self.micro_step = self.micro_step, self.micro_step + 1
        sample = self.sampler.sample(micro_step, self.rank)
        stream, task = sample.stream, sample.stream.task
        self.drawn += len(sample.rows)
        images = self._decoded(self.images, self._images(sample), sample, micro_step)
        text = lengths = clothes = None
        if task.instruction == "clothes":
            assert self.clothes is not None
            clothes = self._decoded(self.clothes, self._clothes(sample), sample, micro_step)
        else:
            text, lengths = tokenize(self.tokenizer, self._sentences(sample), self.config.model.text_tokens)
            text, lengths = text.to(self.device), lengths.to(self.device)
        labels = torch.from_numpy(sample.labels).to(self.device)
        return Batch(stream.number, images, labels, text, lengths, clothes), sample

    def _sentences(self, sample: Sample) -> list[str]:
        task = sample.stream.task
        if task.instruction == "sentence":
            return [SENTENCES[task.name][sample.sentence]]
        captions = [sample.stream.index.captions(row) for row in sample.instruction_rows]
        return [options[int(u * len(options))] for options, u in zip(captions, sample.choice, strict=True)]

    @staticmethod
    def _images(sample: Sample) -> Pictures:
        return plain([sample.stream.index.path(row) for row in sample.rows])._replace(augmentation=sample.augmentation)

    @staticmethod
    def _clothes(sample: Sample) -> Pictures:
        pictures = [sample.stream.index.clothes_picture(row) for row in sample.instruction_rows]
        return plain([path for path, _ in pictures], [box for _, box in pictures])

    def _clothes_step(self, start: int, number: int) -> int:
        """The `number`-th micro-step from `start` on whose stream is instructed by clothes."""
        step = self.clothes_steps[-1] + 1 if self.clothes_steps else start
        while len(self.clothes_steps) <= number:
            if self.sampler.locate(step)[0].task.instruction == "clothes":
                self.clothes_steps.append(step)
            step += 1
        return self.clothes_steps[number]

    def _decoded(self, pipeline: PicturePipeline, pictures: Pictures, sample: Sample, step: int) -> torch.Tensor:
        """The pipeline's next batch; a damaged file costs that image only: another of the same identity takes its
        place."""
        try:
            return pipeline.next()
        except DecodeError as error:
            damaged = set(error.paths)
        paths, rows = list(pictures.paths), list(sample.rows)
        boxes = pictures.boxes.copy()
        for attempt in range(ATTEMPTS):
            for path in sorted(damaged - self.damaged):
                self.quarantine(path, "cannot be decoded", step)
            self.damaged |= damaged
            slots = [slot for slot, path in enumerate(paths) if path in self.damaged]
            for slot in slots:
                row = self.sampler.replacement(step, self.rank * len(rows) + slot, int(sample.rows[slot]), attempt)
                paths[slot] = sample.stream.index.path(row)
                if pipeline is self.clothes:
                    paths[slot], box = sample.stream.index.clothes_picture(row)
                    boxes[slot] = np.asarray(box, dtype=np.float32)
            self.replaced += len(slots)
            if self.replaced > max(20, MOST_DAMAGED * self.drawn):
                raise InputError(
                    f"{self.replaced} of {self.drawn} images drawn cannot be decoded (quarantine.jsonl names them); "
                    "repair the data set"
                )
            try:
                return pipeline.again(pictures._replace(paths=paths, boxes=boxes))
            except RuntimeError:
                damaged = {path for path in paths if not pipeline.decodes(path)}
        raise InputError(f"{sample.stream.name}: no readable image found for identities of micro-step {step}")
