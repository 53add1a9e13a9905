"""What every rank trains on at every moment: a pure function of (seed, micro-step, rank, world).

Nothing is stored and nothing grows with the number of steps: identities come from a permutation that is computed
(a Feistel network), images and augmentation from a counter-based generator (Philox). Resuming needs the step alone.

A *stream* is one (task, data set) pair; a *micro-step* is one forward and backward of one stream, the same on every
rank. The batch is global: P identities x K images over all ranks; each rank takes its share of the identities. An
epoch of a stream visits every identity once; its last batch is filled from the next epoch's permutation, no identity
twice.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from engine.data.index import Index
from engine.errors import InputError
from engine.tasks import TASKS, Task

ROUNDS = 6
IDENTITIES, IMAGES, AUGMENT, ORDER = range(4)  # what a generator is for: keys of independent random sequences


@dataclass(frozen=True, eq=False)
class Stream:
    """One (task, data set) pair.

    rows    [R] int64 record numbers, identity after identity; within one, visible before near-infrared
    starts  [I+1] int64: rows[starts[i]:starts[i+1]] belong to label i
    """

    number: int
    task: Task
    index: Index
    rows: NDArray[np.int64]
    starts: NDArray[np.int64]

    @property
    def name(self) -> str:
        return f"{self.task.name}/{self.index.name}"

    @property
    def identities(self) -> int:
        return len(self.starts) - 1


class Augmentation(NamedTuple):
    """Random numbers of B images, float32; engine.data.pipeline turns them into operations.

    flip [B] 0 or 1; shift [B, 2] vertical, horizontal in -1..1 (of the padding); erase [B, 4] top, left, height,
    width as fractions of the image (zero size = none); jitter [B, 4] brightness, contrast, saturation, hue in -1..1;
    channels [B, 3] the channel (0, 1, 2) that red, green and blue are taken from
    """

    flip: NDArray[np.float32]
    shift: NDArray[np.float32]
    erase: NDArray[np.float32]
    jitter: NDArray[np.float32]
    channels: NDArray[np.float32]


class Sample(NamedTuple):
    """One rank's share of one micro-step; B = its images.

    rows              [B] int64 record numbers in the stream's index
    labels            [B] int64 identities within the stream
    instruction_rows  [B] int64: the record whose clothes or description instructs each image
    choice            [B] float64 in [0, 1): which of that record's descriptions
    sentence          number of the fixed sentence of this batch, 0..19
    augmentation      of these images
    """

    stream: Stream
    rows: NDArray[np.int64]
    labels: NDArray[np.int64]
    instruction_rows: NDArray[np.int64]
    choice: NDArray[np.float64]
    sentence: int
    augmentation: Augmentation


def make_streams(indexes: list[Index], tasks: tuple[str, ...]) -> tuple[Stream, ...]:
    """Every (task, data set) pair that these indexes can train, tasks in the order of TASKS."""
    streams: list[Stream] = []
    for task in TASKS.values():
        for index in indexes:
            if task.name not in tasks or task.name not in index.dataset.trains:
                continue
            rows = index.select("train")
            if task.instruction in ("description", "query"):
                rows = rows[np.asarray(pc.list_value_length(index.table["captions"]))[rows] > 0]
            if len(rows):
                order = np.lexsort((rows, index.modality[rows], index.pid[rows]))
                rows = rows[order]
                starts = np.flatnonzero(np.diff(index.pid[rows], prepend=-1, append=-2))
                streams.append(Stream(len(streams), task, index, rows, starts))
    if not streams:
        names = ", ".join(index.name for index in indexes)
        raise InputError(f"nothing to train: the data sets found ({names}) hold no train images for {', '.join(tasks)}")
    return tuple(streams)


class Sampler:
    """`sample(micro_step, rank)` and the numbers it follows from.

    streams        from make_streams
    ids            wished identities per global batch (P); images_per_id: K
    shares         task -> how often a cycle uses each of its streams (once where it is not named)
    leaders        tasks whose streams train alone at first, for `ahead` micro-steps of each
    world          ranks; P is rounded down to a multiple of it and to what a stream has (see `notes`)
    """

    def __init__(
        self,
        streams: tuple[Stream, ...],
        *,
        seed: int,
        ids: int,
        images_per_id: int,
        world: int = 1,
        shares: Mapping[str, int] | None = None,
        leaders: Collection[str] = (),
        ahead: int = 0,
    ):
        self.streams, self.seed, self.world = streams, seed, world
        self.shares = [(shares or {}).get(stream.task.name, 1) for stream in streams]
        self.cycle = np.repeat(np.arange(len(streams)), self.shares)
        self.leaders = np.array([stream.number for stream in streams if stream.task.name in leaders], dtype=np.int64)
        self.ahead = ahead
        self.batches: list[tuple[int, int]] = []  # (P, K) of each stream
        self.notes: list[str] = []  # one line for each stream whose P differs from the wish
        for stream in streams:
            wish, images = (ids * images_per_id, 1) if stream.task.instruction == "query" else (ids, images_per_id)
            ids_here = min(wish, stream.identities) // world * world
            if ids_here < max(2, world):
                raise InputError(
                    f"{stream.name}: {stream.identities} identities cannot be shared by {world} ranks; use fewer ranks"
                )
            if ids_here != wish:
                self.notes.append(
                    f"{stream.name}: {ids_here} identities per batch instead of {wish} "
                    f"({stream.identities} in the data set, {world} rank{'s' if world > 1 else ''})"
                )
            self.batches.append((ids_here, images))

    def locate(self, micro_step: int) -> tuple[Stream, int]:
        """The micro-step's stream and how often that stream was used before. Every cycle uses each stream as often as
        its share says; the head start has cycles of its own, before."""
        early = micro_step < self.ahead * len(self.leaders)
        members = self.leaders if early else self.cycle
        cycle, place = divmod(micro_step if early else micro_step - self.ahead * len(self.leaders), len(members))
        order = members[_generator(self.seed, ORDER, int(early), cycle).permutation(len(members))]
        number = order[place]
        if early:
            return self.streams[number], cycle
        before = cycle * self.shares[number] + int(np.count_nonzero(order[:place] == number))
        return self.streams[number], before + (self.ahead if number in self.leaders else 0)

    def identities(self, stream: Stream, occurrence: int) -> NDArray[np.int64]:
        """[P] labels of the stream's batch number `occurrence`, all different."""
        P, n = self.batches[stream.number][0], stream.identities
        epoch, batch = divmod(occurrence, -(-n // P))
        labels = self._permuted(stream, epoch, np.arange(batch * P, min((batch + 1) * P, n)))
        if len(labels) < P:
            following = self._permuted(stream, epoch + 1, np.arange(P))  # at most P - len of them are already here
            labels = np.concatenate([labels, following[~np.isin(following, labels)][: P - len(labels)]])
        return labels

    def sample(self, micro_step: int, rank: int = 0) -> Sample:
        """The share of `rank`. The whole batch is drawn on every rank, so it does not depend on their number."""
        stream, occurrence = self.locate(micro_step)
        labels = self.identities(stream, occurrence)
        P, K = self.batches[stream.number]
        images = _generator(self.seed, IMAGES, stream.number, occurrence)
        rows = np.concatenate([self._images_of(stream, label, K, images) for label in labels])
        instruction_rows = rows
        if stream.task.instruction in ("clothes", "description"):
            instruction_rows = _as_queries(rows.reshape(P, K), images).ravel()
        choice = images.random(P * K)
        sentence = int(images.integers(20))
        augmentation = _augmentation(
            _generator(self.seed, AUGMENT, stream.number, occurrence), P * K, colourless=stream.task.name == "vi"
        )
        mine = slice(P // self.world * rank * K, P // self.world * (rank + 1) * K)
        return Sample(
            stream,
            rows[mine],
            np.repeat(labels, K)[mine],
            instruction_rows[mine],
            choice[mine],
            sentence,
            Augmentation(*(part[mine] for part in augmentation)),
        )

    def replacement(self, micro_step: int, slot: int, row: int, attempt: int) -> int:
        """Another image of the same identity for one that cannot be read; `slot` counts within the global batch."""
        stream, occurrence = self.locate(micro_step)
        label = int(np.searchsorted(stream.starts, np.flatnonzero(stream.rows == row)[0], side="right")) - 1
        rows = stream.rows[stream.starts[label] : stream.starts[label + 1]]
        others = rows[rows != row]
        if not len(others):
            return row
        return int(_generator(self.seed, IMAGES, stream.number, occurrence, slot + 1, attempt + 1).choice(others))

    def _permuted(self, stream: Stream, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        generator = _generator(self.seed, IDENTITIES, stream.number, epoch)
        return permute(positions, stream.identities, generator.integers(1 << 32, size=ROUNDS, dtype=np.uint64))

    def _images_of(self, stream: Stream, label: int, K: int, generator: np.random.Generator) -> NDArray[np.int64]:
        """K rows of an identity: without repeats where it has K, both modalities in equal parts where it has both."""
        rows = stream.rows[stream.starts[label] : stream.starts[label + 1]]
        infrared = stream.index.modality[rows] == 1
        if stream.task.name == "vi" and infrared.any() and not infrared.all() and K > 1:
            return np.concatenate(
                [_draw(rows[~infrared], K - K // 2, generator), _draw(rows[infrared], K // 2, generator)]
            )
        return _draw(rows, K, generator)


def permute(positions: NDArray[np.int64], n: int, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Images of `positions` (values 0..n-1) under a pseudo-random permutation of 0..n-1 given by ROUNDS keys.

    A balanced Feistel network on the next even number of bits; a value outside 0..n-1 walks on until it is inside
    (at most 4 times as many values as n, so 4 rounds on average at worst).
    """
    half = np.uint64(max(1, (max(n - 1, 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    values = positions.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        left, right = values[outside] >> half, values[outside] & mask
        for key in keys:
            mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)
            mixed ^= mixed >> np.uint64(29)
            mixed *= np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        values[outside] = (left << half) | right
        outside = values >= np.uint64(n)
    return values.astype(np.int64)


def _generator(seed: int, purpose: int, stream: int, occurrence: int, *rest: int) -> np.random.Generator:
    """Philox with key (seed, purpose and stream) and a counter of its own for each occurrence."""
    counter = [0, occurrence, *(rest or (0, 0))]  # word 0 counts the numbers drawn
    return np.random.Generator(np.random.Philox(key=[seed, purpose << 32 | stream], counter=counter))


def _draw(rows: NDArray[np.int64], count: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """`count` of these rows, every row used before one is used again."""
    rounds = [generator.permutation(rows) for _ in range(-(-count // len(rows)))]
    return np.concatenate(rounds)[:count]


def _as_queries(rows_PK: NDArray[np.int64], generator: np.random.Generator) -> NDArray[np.int64]:
    """The first half of each identity's images ask (as test queries do) for the clothes of one of its other half."""
    P, K = rows_PK.shape
    asking = K // 2
    instructions = rows_PK.copy()
    if asking:
        wanted = generator.integers(asking, K, size=(P, asking))
        instructions[:, :asking] = np.take_along_axis(rows_PK, wanted, axis=1)
    return instructions


def _augmentation(generator: np.random.Generator, count: int, colourless: bool = False) -> Augmentation:
    """Flip with probability 1/2; a shift within the padding; erasing with probability 1/2: 2-40 % of the area at aspect
    0.3-3.3 (Zhong et al. 2020). colourless: with probability 0.85 one channel stands for all three, so that colour does
    not tell who is who across modalities (Ye et al. 2021)."""
    u = generator.random((count, 14), dtype=np.float32)
    area, aspect = 0.02 + 0.38 * u[:, 3], 0.3 * (1 / 0.09) ** u[:, 4]
    # aspect is height/width in pixels of a 2:1 person crop; fractions of its sides are taken
    height, width = np.minimum(np.sqrt(area * aspect / 2), 0.9), np.minimum(np.sqrt(area / aspect * 2), 0.9)
    size = np.stack([height, width], 1) * (u[:, 5:6] < 0.5)
    place = u[:, 6:8] * (1 - size)
    return Augmentation(
        (u[:, 0] < 0.5).astype(np.float32),
        u[:, 1:3] * 2 - 1,
        np.concatenate([place, size], 1).astype(np.float32),
        u[:, 8:12] * 2 - 1,
        np.where((u[:, 12:13] < 0.85) & colourless, np.floor(u[:, 13:14] * 3), np.arange(3)).astype(np.float32),
    )
