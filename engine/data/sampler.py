"""What every rank trains on at every moment: a pure function of (seed, micro-step, rank, world).

Nothing is stored and nothing grows with the number of steps: identities come from a permutation that is computed
(a Feistel network), images and augmentation from a counter-based generator (Philox). Resuming needs the step alone.
All of a batch is computed at once, whatever the number of identities or images.

A *stream* is one (task, data set) pair; a *micro-step* is one forward and backward of one stream, the same on every
rank. The batch is global: P identities x K images over all ranks; each rank takes its share of the identities. An
epoch of a stream visits every identity once; its last batch is filled from the next epoch's permutation, no identity
twice.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.data.index import Index
from engine.errors import InputError
from engine.tasks import TASKS, Task

ROUNDS = 6
STRANGERS = 64  # identities that may take the place of one without images
LONGEST = 1_000_000  # micro-steps of a cycle
IDENTITIES, IMAGES, ORDER = range(3)  # what a generator is for: keys of independent random sequences


@dataclass(frozen=True, eq=False)
class Stream:
    """One (task, data set) pair.

    rows     [R] int32 (int64 where they do not fit) record numbers, identity after identity by ascending pid; within
             one, visible before near-infrared
    starts   [I+1] int64: rows[starts[i]:starts[i+1]] belong to label i
    middles  [I] int64: its near-infrared images are rows[middles[i]:starts[i+1]]
    """

    number: int
    task: Task
    index: Index
    rows: NDArray[np.int32] | NDArray[np.int64]
    starts: NDArray[np.int64]
    middles: NDArray[np.int64]

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
    """Every (task, data set) pair that these indexes can train, tasks in the order of TASKS; those of one data set that
    train on the same images share their arrays. InputError where there is none."""
    streams: list[Stream] = []
    layouts: dict[tuple[str, bool], _Layout] = {}
    for task in TASKS.values():
        for index in indexes:
            if task.name not in tasks or task.name not in index.dataset.trains:
                continue
            told = task.instruction in ("description", "query")
            if (index.name, told) not in layouts:
                layouts[index.name, told] = _layout(index, told)
            layout = layouts[index.name, told]
            if len(layout.rows):
                streams.append(Stream(len(streams), task, index, *layout))
    if not streams:
        names = ", ".join(index.name for index in indexes)
        raise InputError(f"nothing to train: the data sets found ({names}) hold no train images for {', '.join(tasks)}")
    return tuple(streams)


class _Layout(NamedTuple):
    """What Stream says."""

    rows: NDArray[np.int32] | NDArray[np.int64]
    starts: NDArray[np.int64]
    middles: NDArray[np.int64]


def _layout(index: Index, told: bool) -> _Layout:
    """The train images (told: those with a description) by identity and modality."""
    rows = index.select("train")
    if told:
        rows = rows[index.sentences(rows) > 0]
    key = index.pid[rows] << 1 | index.modality[rows]  # 32 bits: of a pid 31
    if np.any(key[1:] < key[:-1]):  # most data sets list their images in this order: nothing to sort
        packed = key.astype(np.uint64) << np.uint64(32) | np.arange(len(key), dtype=np.uint64)
        packed.sort()  # numbers, all different: many times faster than a stable argsort
        rows = rows[packed & np.uint64(0xFFFFFFFF)]
        key = (packed >> np.uint64(32)).astype(np.int64)
    starts = np.flatnonzero(np.diff(key >> 1, prepend=-1, append=-2))
    middles = np.searchsorted(key, key[starts[:-1]] | 1)
    narrow = rows.max(initial=0) <= np.iinfo(np.int32).max
    return _Layout(rows.astype(np.int32) if narrow else rows, starts, middles)


def shares_by_temperature(images: Collection[int], temperature: float) -> list[int]:
    """How often a cycle uses streams of so many images: n^(1/T) over that of the smallest, rounded. T = 1 is in
    proportion to the images, a large T equal. InputError where the cycle would be longer than LONGEST."""
    with np.errstate(over="ignore"):
        weights = (np.array([*images], dtype=np.float64) / min(images)) ** (1 / temperature)
    if weights.sum() > LONGEST:
        raise InputError(
            f"--temperature {temperature}: the largest stream would come up {weights.max():.3g} times as often as the "
            "smallest; give a larger one"
        )
    return [int(share) for share in np.rint(weights)]


class Sampler:
    """`sample(micro_step, rank)` and the numbers it follows from.

    streams        from make_streams
    ids            wished identities per global batch (P); images_per_id: K
    shares         task -> how often a cycle uses each of its streams (once where it is not named)
    temperature    above 0: `shares_by_temperature` of the streams' images instead; shares must be empty then
    leaders        tasks whose streams train alone at first, for `ahead` micro-steps of each
    world          ranks; P is rounded down to a multiple of it and to what a stream has (see `notes`)

    window is how many micro-steps an optimiser step takes by default: a cycle, or with `temperature`, whose cycles may
    have thousands, one per stream.
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
        temperature: float = 0.0,
        leaders: Collection[str] = (),
        ahead: int = 0,
    ):
        self.streams, self.seed, self.world = streams, seed, world
        self.shares = [(shares or {}).get(stream.task.name, 1) for stream in streams]
        if temperature:
            self.shares = shares_by_temperature([len(stream.rows) for stream in streams], temperature)
        self.cycle = np.repeat(np.arange(len(streams)), self.shares)
        self.window = len(streams) if temperature else len(self.cycle)
        self.leaders = np.array([stream.number for stream in streams if stream.task.name in leaders], dtype=np.int64)
        self.ahead = ahead
        # Many steps in a row ask for the same: a cycle's order (of thousands, may be), an epoch's keys.
        self._order = lru_cache(maxsize=8)(self._ordered)
        self._keys = lru_cache(maxsize=4 * len(streams))(self._permutation)
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
        order = self._order(early, cycle)
        number = int(order[place])
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
        generator = _generator(self.seed, IMAGES, stream.number, occurrence)
        rows = self._images(stream, labels, K, generator)
        instruction_rows = rows
        if stream.task.instruction in ("clothes", "description"):
            instruction_rows = _as_queries(rows.reshape(P, K), generator).ravel()
        choice = generator.random(P * K)
        sentence = int(generator.integers(20))
        augmentation = generator.random((14, P * K), dtype=np.float32)
        mine = slice(P // self.world * rank * K, P // self.world * (rank + 1) * K)
        return Sample(
            stream,
            rows[mine],
            np.repeat(labels, K)[mine],
            instruction_rows[mine],
            choice[mine],
            sentence,
            _augmentation(augmentation[:, mine], colourless=stream.task.cross_modal),
        )

    def label(self, stream: Stream, row: int) -> int:
        """The stream's label of a record that it trains on."""
        pid, rows = stream.index.pid, stream.rows
        return bisect_left(range(stream.identities), pid[row], key=lambda label: pid[rows[stream.starts[label]]])

    def replacements(self, micro_step: int, slot: int, row: int) -> list[int]:
        """The other images of the same identity, for one that cannot be used, in the order in which they are to be
        tried; `slot` counts within the global batch."""
        stream, occurrence = self.locate(micro_step)
        label = self.label(stream, row)
        rows = stream.rows[stream.starts[label] : stream.starts[label + 1]]
        return (
            _generator(self.seed, IMAGES, stream.number, occurrence, slot + 1, 0)
            .permutation(rows[rows != row])
            .tolist()
        )

    def strangers(self, micro_step: int, slot: int, row: int) -> Iterator[int]:
        """Images of identities that the global batch does not hold, one of each, for where an identity has no image
        left: few, and the same identity for all images of one."""
        stream, occurrence = self.locate(micro_step)
        K = self.batches[stream.number][1]
        present = set(self.identities(stream, occurrence).tolist())
        generator = _generator(self.seed, IDENTITIES, stream.number, occurrence, slot // K + 1, 1)
        for label in generator.integers(stream.identities, size=STRANGERS).tolist():
            own = stream.rows[stream.starts[label] : stream.starts[label + 1]]
            if label not in present:
                yield int(own[slot % K % len(own)])

    def _ordered(self, early: bool, cycle: int) -> NDArray[np.int64]:
        members = self.leaders if early else self.cycle
        return members[_generator(self.seed, ORDER, int(early), cycle).permutation(len(members))]

    def _permuted(self, stream: Stream, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        return permute(positions, stream.identities, self._keys(stream.number, epoch))

    def _permutation(self, number: int, epoch: int) -> NDArray[np.uint64]:
        return _generator(self.seed, IDENTITIES, number, epoch).integers(1 << 32, size=ROUNDS, dtype=np.uint64)

    def _images(
        self, stream: Stream, labels: NDArray[np.int64], K: int, generator: np.random.Generator
    ) -> NDArray[np.int64]:
        """[P*K] rows, K of each identity: without repeats where it has K, both modalities in equal parts where it has
        both."""
        starts, stops = stream.starts[labels], stream.starts[labels + 1]
        places = starts + draw(stops - starts, K, generator)
        if stream.task.cross_modal and K > 1:
            middles, visible = stream.middles[labels], K - K // 2
            both = (starts < middles) & (middles < stops)
            split = [
                starts + draw(np.where(both, middles - starts, 1), visible, generator),
                middles + draw(np.where(both, stops - middles, 1), K // 2, generator),
            ]
            places = np.where(both, np.concatenate(split), places)
        return stream.rows[places.T.ravel()].astype(np.int64)


def permute(positions: NDArray[np.int64], n: int, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Images of `positions` (values 0..n-1) under a pseudo-random permutation of 0..n-1 given by ROUNDS keys.

    A Feistel network on pairs below (a, b), where a*b is the least such product of about equal factors that holds n
    (Black & Rogaway 2002): each round adds to one half a function of the other. What falls outside 0..n-1, less than
    a/n of all, walks on until it is inside.
    """
    a = np.uint64(isqrt(max(n - 1, 0)) + 1)
    b = np.uint64(-(-n // int(a)))
    values = positions.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        (left, right), (m, other) = np.divmod(values[outside], b), (a, b)
        for key in keys:  # an even number of them: the halves end where they began
            mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)
            mixed ^= mixed >> np.uint64(29)
            mixed *= np.uint64(0xBF58476D1CE4E5B9)
            mixed >>= np.uint64(32)
            left, right, m, other = right, (left + mixed) % m, other, m
        values[outside] = left * b + right
        outside = values >= np.uint64(n)
    return values.astype(np.int64)


def draw(n: NDArray[np.int64], count: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """[count, P] int64: `count` numbers below n[p] for each p, every one used before one is used again.

    Fisher-Yates shuffles of which only the steps taken are kept. Step t swaps place t of its round with one drawn from
    there on; rounds lie one behind the other, so that places of different rounds never meet. What a place holds follows
    by going back through the swaps: if the last one with place x was step i, x holds what was in place i before it.
    """
    steps = np.arange(count)[:, None]
    swapped = steps + (generator.random((count, len(n))) * (n - steps % n)).astype(np.int64)
    drawn = swapped.copy()
    for t in range(1, count):
        held = drawn[t]
        for i in reversed(range(t)):
            held[held == swapped[i]] = i
    return drawn % n


def _generator(seed: int, purpose: int, stream: int, occurrence: int, *rest: int) -> np.random.Generator:
    """Philox with key (seed, purpose and stream) and a counter of its own for each occurrence."""
    key = np.array([seed, purpose << 32 | stream], dtype=np.uint64)
    counter = np.array([0, occurrence, *(rest or (0, 0))], dtype=np.uint64)  # word 0 counts the numbers drawn
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def _as_queries(rows_PK: NDArray[np.int64], generator: np.random.Generator) -> NDArray[np.int64]:
    """The first half of each identity's images ask (as test queries do) for the clothes of one of its other half."""
    P, K = rows_PK.shape
    asking = K // 2
    instructions = rows_PK.copy()
    if asking:
        wanted = generator.integers(asking, K, size=(P, asking))
        instructions[:, :asking] = np.take_along_axis(rows_PK, wanted, axis=1)
    return instructions


def _augmentation(u: NDArray[np.float32], colourless: bool) -> Augmentation:
    """Of numbers [14, B] in 0..1: flip with probability 1/2; a shift within the padding; erasing with probability 1/2:
    2-40 % of the area at aspect 0.3-3.3 (Zhong et al. 2020). colourless: with probability 0.85 one channel stands for
    all three, so that colour does not tell who is who across modalities (Ye et al. 2021)."""
    area, aspect = 0.02 + 0.38 * u[3], 0.3 * (1 / 0.09) ** u[4]
    # aspect is height/width in pixels of a 2:1 person crop; fractions of its sides are taken
    size = np.minimum(np.sqrt(np.array([area * aspect / 2, area / aspect * 2])), 0.9) * (u[5] < 0.5)
    channels = np.where((u[12] < 0.85) & colourless, np.floor(u[13] * 3), np.arange(3, dtype=np.float32)[:, None])
    erase = np.concatenate([u[6:8] * (1 - size), size])
    parts = (u[0] < 0.5).astype(np.float32), u[1:3] * 2 - 1, erase, u[8:12] * 2 - 1, channels
    return Augmentation(*(np.ascontiguousarray(part.T) for part in parts))  # image by image, as DALI takes them
