"""Galleries that lie in host memory, searched on a GPU part by part, with the bits of a search of the whole.

A part is copied to pinned memory by a thread of its own and from there to the GPU on a stream of its own, while the
part before it is searched. There are two buffers; a part goes to that of the last but one:

    thread       waits until the last but one has left the pinned buffer, fills it with rows
    side stream  waits until the last but one has been searched, copies the rows over
    our stream   waits until they have arrived, searches

Scores are canonical (csrc/score.h) and ties go by number, so what parts yield merges to what the whole yields. On one
device the whole is a single part: itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, cuda

from kernels.gallery import Codes, Gallery

ROWS: int | None = None  # of a part at most, on any device; None: as many as fit
BYTES = 1 << 28  # of a buffer at most: copied in 5 to 20 ms, which is what the first part keeps the GPU waiting
BESIDE = 128  # bytes a row that a search needs as well: bounds, and groups in order


def whole(gallery: Gallery, device: torch.device) -> bool:
    """Is there nothing to divide?"""
    return gallery.features.device == device and (ROWS is None or len(gallery) <= ROWS)


def parts(
    gallery: Gallery, device: torch.device, *beside: Tensor, rows: Tensor | None = None
) -> Iterator[tuple[int, Gallery, Sequence[Tensor]]]:
    """(number of the first row, part of the gallery, its rows of `beside`) on the device, in ascending order; at least
    one. A part is gone when the next one is asked for.

    beside  [G, ...] each, where the gallery lies; the gallery's own keys do not come along
    rows    [n] int64: these rows are the gallery, numbered 0 .. n - 1
    """
    if rows is None and whole(gallery, device):
        yield 0, gallery, beside
        return
    codes = gallery.codes
    columns = [gallery.features, gallery.norms, *(() if codes is None else codes[:4]), *beside]
    rows = None if rows is None else rows.to(gallery.features.device)
    count = len(gallery) if rows is None else len(rows)
    if gallery.features.device == device:
        taken = _views(columns, rows, count, ROWS or max(1, count))
    else:
        taken = _sent(columns, rows, count, min(ROWS or count, _rows_that_fit(columns, count, device)), device)
    for start, (features, norms, *rest) in taken:
        own = None
        if codes is not None:
            values, scale, norm, residual, *rest = rest
            own = Codes(values, scale, norm, residual, codes.slack)
        yield start, Gallery(features, norms, None, own), rest


def _rows_that_fit(columns: Sequence[Tensor], count: int, device: torch.device) -> int:
    """Rows of a part: two buffers take half of the memory that is free or that torch holds unused."""
    row = BESIDE + sum(column.element_size() * math.prod(column.shape[1:]) for column in columns)
    free = cuda.mem_get_info(device)[0] + cuda.memory_reserved(device) - cuda.memory_allocated(device)
    return max(1, min(count, BYTES // row, free // (4 * row)))


def _views(
    columns: Sequence[Tensor], rows: Tensor | None, count: int, step: int
) -> Iterator[tuple[int, Sequence[Tensor]]]:
    for start in range(0, max(1, count), step):
        part = slice(start, start + step)
        yield start, [column[part] if rows is None else column[rows[part]] for column in columns]


def _sent(
    columns: Sequence[Tensor], rows: Tensor | None, count: int, step: int, device: torch.device
) -> Iterator[tuple[int, Sequence[Tensor]]]:
    """As `_views`, on a GPU: head of this module."""
    step = max(1, step)
    direct = [rows is None and column.is_pinned() for column in columns]
    sizes = [(2, step, *column.shape[1:]) for column in columns]
    there = [torch.empty(size, dtype=c.dtype, device=device) for size, c in zip(sizes, columns, strict=True)]
    pinned = [
        None if skip else torch.empty(size, dtype=c.dtype, pin_memory=device.type == "cuda")
        for size, c, skip in zip(sizes, columns, direct, strict=True)
    ]
    ours, side = cuda.current_stream(device), cuda.Stream(device)
    copied, searched = ([cuda.Event(), cuda.Event()] for _ in range(2))
    for event in searched:
        event.record(ours)  # what the buffers' memory was used for before

    def send(start: int, slot: int) -> list[Tensor]:
        stop = min(start + step, count)
        copied[slot].synchronize()
        sent = []
        with torch.inference_mode(), cuda.stream(side):  # whichever mode the buffers were made in
            side.wait_event(searched[slot])
            for column, buffer, target in zip(columns, pinned, there, strict=True):
                source = column[start:stop]
                if buffer is not None:
                    source = buffer[slot, : stop - start]
                    if rows is None:
                        source.copy_(column[start:stop])
                    else:
                        torch.index_select(column, 0, rows[start:stop], out=source)
                sent.append(target[slot, : stop - start])
                copy_over(sent[-1], source)
            copied[slot].record(side)
        return sent

    starts = range(0, max(1, count), step)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(send, 0, 0)
        try:
            for i, start in enumerate(starts):
                sent = coming.result()
                if i + 1 < len(starts):
                    coming = pool.submit(send, starts[i + 1], (i + 1) % 2)
                ours.wait_event(copied[i % 2])
                yield start, sent
                searched[i % 2].record(ours)
        finally:  # given up half-way: nothing may arrive in memory that is used for something else
            coming.exception()
            ours.wait_stream(side)


def copy_over(target: Tensor, source: Tensor) -> None:
    target.copy_(source, non_blocking=True)


def best(values: Tensor, rows: Tensor, k: int, *, descending: bool = True) -> tuple[Tensor, Tensor]:
    """The k best of each line [..., n]; rows of equal values ascend in it already. Missing ones (-1) come last."""
    order = (rows < 0).to(torch.int8).argsort(dim=-1, stable=True)
    order = order.gather(-1, values.gather(-1, order).argsort(dim=-1, descending=descending, stable=True))
    order = order[..., :k]
    return values.gather(-1, order), rows.gather(-1, order)
