"""Sample -> Batch: what the sampler chose, decoded, tokenised and handed to the model, one micro-step after another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
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
        self.drawn = 0
        largest = max(P * K for P, K in sampler.batches) // sampler.world
        settings: dict[str, Any] = {"batch": largest, "device": device, "threads": config.workers}
        self.images = PicturePipeline(
            self._images,
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
                lambda number: self._clothes(self._clothes_step(start, number)),
                size=config.model.clothes_size,
                augment=False,
                **settings,
            )

    def next(self) -> tuple[Batch, Sample]:
        micro_step, self.micro_step = self.micro_step, self.micro_step + 1
        sample = self.sampler.sample(micro_step, self.rank)
        stream, task = sample.stream, sample.stream.task
        self.drawn += len(sample.rows)
        images = self._decoded(self.images, self._images, micro_step)
        text = lengths = clothes = None
        if task.instruction == "clothes":
            assert self.clothes is not None
            clothes = self._decoded(self.clothes, self._clothes, micro_step)
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

    def _images(self, micro_step: int) -> Pictures:
        sample = self.sampler.sample(micro_step, self.rank)
        rows = self._readable(micro_step, sample, sample.rows, lambda row: sample.stream.index.path(row))
        return plain([sample.stream.index.path(row) for row in rows])._replace(augmentation=sample.augmentation)

    def _clothes(self, micro_step: int) -> Pictures:
        sample = self.sampler.sample(micro_step, self.rank)
        index = sample.stream.index
        rows = self._readable(micro_step, sample, sample.instruction_rows, lambda row: index.clothes_picture(row)[0])
        pictures = [  # a query names the clothes it wants, a gallery image shows its own: so in training
            index.clothes_picture(asked) if asked != own else index.worn(own)
            for own, asked in zip(sample.rows.tolist(), rows, strict=True)
        ]
        return plain([path for path, _ in pictures], [box for _, box in pictures])

    def _readable(
        self, micro_step: int, sample: Sample, rows: NDArray[np.int64], path_of: Callable[[int], Path]
    ) -> list[int]:
        """The rows, those with a file known to be damaged replaced by another image of the identity."""
        result = []
        for slot, row in enumerate(rows.tolist(), self.rank * len(rows)):
            options = (
                [self.sampler.replacement(micro_step, slot, row, attempt) for attempt in range(ATTEMPTS)]
                if (self.damaged and path_of(row) in self.damaged)
                else []
            )
            found = next((option for option in [row, *options] if path_of(option) not in self.damaged), None)
            if found is None:
                raise InputError(
                    f"{path_of(row)}: cannot be decoded, nor can other images of that identity; repair them"
                )
            result.append(found)
        return result

    def _clothes_step(self, start: int, number: int) -> int:
        """The `number`-th micro-step from `start` on whose stream is instructed by clothes."""
        step = self.clothes_steps[-1] + 1 if self.clothes_steps else start
        while len(self.clothes_steps) <= number:
            if self.sampler.locate(step)[0].task.instruction == "clothes":
                self.clothes_steps.append(step)
            step += 1
        return self.clothes_steps[number]

    def _decoded(self, pipeline: PicturePipeline, pictures: Callable[[int], Pictures], step: int) -> torch.Tensor:
        """The pipeline's next batch. A damaged file costs that image only: another of the same identity takes its
        place, chosen by a pure function, whether the damage was known before or is found now."""
        try:
            return pipeline.next()
        except DecodeError as error:
            damaged = error.paths
        while True:
            for path in damaged:
                if path not in self.damaged:
                    self.quarantine(path, "cannot be decoded", step)
            self.damaged |= set(damaged)
            if len(self.damaged) > max(20, MOST_DAMAGED * self.drawn):
                raise InputError(
                    f"{len(self.damaged)} damaged files among {self.drawn} images drawn (quarantine.jsonl names them); "
                    "repair the data set"
                )
            try:
                return pipeline.again(pictures(step))
            except DecodeError as error:
                damaged = error.paths
