"""Sample -> Batch: what the sampler chose, decoded, tokenised and handed to the model, one micro-step after another."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
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

MOST_DAMAGED = 0.05  # share of the images drawn above which a run stops


class TrainLoader:
    """`next()` gives the batches of micro-steps start, start+1, ... of one rank.

    damaged: files known to be so, such as what the indexes name. quarantine(path, reason, micro_step) is called once
    for every other damaged file that this rank meets.
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
        damaged: Iterable[Path] = (),
        quarantine: Callable[[Path, str, int], None],
    ):
        self.sampler, self.config, self.tokenizer, self.device, self.rank = sampler, config, tokenizer, device, rank
        self.micro_step, self.quarantine = start, quarantine
        self.damaged = set(damaged)
        self.met = self.drawn = 0  # damaged files met, images drawn
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
        """A damaged file costs its record only: another of the same identity (of another one, where it has none left)
        takes its place with its own image and instruction, chosen by a pure function, whether the damage was known
        before or is found now."""
        micro_step, self.micro_step = self.micro_step, self.micro_step + 1
        self.drawn += len(self.sampler.sample(micro_step, self.rank).rows)
        stream = self.sampler.locate(micro_step)[0]
        parts = [(self.images, self._images)]
        if stream.task.instruction == "clothes":
            assert self.clothes is not None
            parts.append((self.clothes, self._clothes))
        decoded = [self._decoded(pipeline.next, micro_step) for pipeline, _ in parts]
        sample, whole = self._sample(micro_step)
        while not whole:  # what was read ahead may be older than what is known of damage: decode all of it once more
            decoded = [
                self._decoded(partial(pipeline.again, pictures(micro_step)), micro_step) for pipeline, pictures in parts
            ]
            whole = all(part is not None for part in decoded)
            sample, _ = self._sample(micro_step)
        images, clothes = decoded if len(decoded) == 2 else (decoded[0], None)
        assert images is not None
        text = lengths = None
        if clothes is None:
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
        sample, _ = self._sample(micro_step)
        return plain([sample.stream.index.item(row) for row in sample.rows])._replace(augmentation=sample.augmentation)

    def _clothes(self, micro_step: int) -> Pictures:
        sample, _ = self._sample(micro_step)
        index = sample.stream.index
        pictures = [  # a query names the clothes it wants, a gallery image shows its own: so in training
            index.clothes_picture(asked) if asked != own else index.worn(own)
            for own, asked in zip(sample.rows.tolist(), sample.instruction_rows.tolist(), strict=True)
        ]
        return plain([item for item, _ in pictures], [box for _, box in pictures])

    def _sample(self, micro_step: int) -> tuple[Sample, bool]:
        """This rank's share with the records replaced of which a file is known to be damaged, and whether none was."""
        sample = self.sampler.sample(micro_step, self.rank)
        substitutes: dict[int, int] = {}
        if self.damaged:
            pictured = sample.stream.task.instruction == "clothes"
            instructing = set(sample.instruction_rows.tolist()) if pictured else set()
            for slot, row in enumerate(sample.rows.tolist(), self.rank * len(sample.rows)):
                if row not in substitutes and self._is_damaged(sample, row, row in instructing):
                    substitutes[row] = self._substitute(sample, micro_step, slot, row, row in instructing)
        if not substitutes:
            return sample, True
        rows, instruction_rows = (
            np.array([substitutes.get(row, row) for row in part.tolist()], dtype=np.int64)
            for part in (sample.rows, sample.instruction_rows)
        )
        labels = [
            self.sampler.label(sample.stream, row) if row != own else label
            for row, own, label in zip(rows.tolist(), sample.rows.tolist(), sample.labels.tolist(), strict=True)
        ]
        named = np.array(labels, dtype=np.int64)
        return sample._replace(rows=rows, labels=named, instruction_rows=instruction_rows), False

    def _substitute(self, sample: Sample, micro_step: int, slot: int, row: int, instructs: bool) -> int:
        """Of the same identity as long as it has an image that is not damaged, else of one that is not in the batch."""
        for others in (self.sampler.replacements, self.sampler.strangers):
            for other in others(micro_step, slot, row):
                if not self._is_damaged(sample, other, instructs):
                    return other
        raise InputError(
            f"{sample.stream.index.path(row)}: damaged, and so are all that could take its place; repair the data set"
        )

    def _is_damaged(self, sample: Sample, row: int, instructs: bool) -> bool:
        """Whether a file is that this batch needs of the record: its image, and its clothes where they instruct."""
        index = sample.stream.index
        return index.path(row) in self.damaged or (instructs and index.clothes_picture(row)[0].path in self.damaged)

    def _clothes_step(self, start: int, number: int) -> int:
        """The `number`-th micro-step from `start` on whose stream is instructed by clothes."""
        step = self.clothes_steps[-1] + 1 if self.clothes_steps else start
        while len(self.clothes_steps) <= number:
            if self.sampler.locate(step)[0].task.instruction == "clothes":
                self.clothes_steps.append(step)
            step += 1
        return self.clothes_steps[number]

    def _decoded(self, decode: Callable[[], torch.Tensor], micro_step: int) -> torch.Tensor | None:
        """The batch, or None where a file of it is damaged, which is noted. InputError when there are too many."""
        try:
            return decode()
        except DecodeError as error:
            for path, reason in error.reasons.items():
                if path not in self.damaged:
                    self.met += 1
                    self.quarantine(path, reason, micro_step)
            self.damaged = self.damaged | set(error.reasons)  # a new set: threads that read ahead look at the old one
        if self.met > max(20, MOST_DAMAGED * self.drawn):
            raise InputError(
                f"{self.met} damaged files among {self.drawn} images drawn (quarantine.jsonl names them); "
                "repair the data set"
            )
        return None
