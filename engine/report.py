"""What retrieval.html shows: a few queries of every protocol, each with the head of its ranking.

`Report.collect` chooses and ranks them while an evaluation holds its features; `Report.write` makes the page of them,
of the metrics and of the run's log (engine/page.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine import page
from engine.data.files import Item
from engine.data.index import Box
from engine.data.pipeline import PicturePipeline, plain
from engine.instructions import SENTENCES
from engine.model.instruction import Instruction, tokenize
from engine.protocols import Protocol, Trial, group_members
from engine.results import whole_file

if TYPE_CHECKING:
    from engine.evaluation import Evaluation

POOL = 128  # queries drawn, of which found and missed ones are shown
RESCORED = 128  # as the evaluation does: the best by cosine, ordered anew by the matching head


class Result(NamedTuple):
    """One gallery image of a ranking. facts: its file, identity, camera; relevant: a match, as the protocol defines it;
    score: cosine, or probability of the matching head."""

    picture: Item
    facts: str
    relevant: bool
    score: float


class Example(NamedTuple):
    """One query and the head of its ranking, junk left out.

    picture    the query picture; None where the sentence is the query
    sentence   its instruction; "" where clothes instruct
    clothes    picture of the wanted clothes and the box of it to show, or None
    ranks      ranks (from 1) of all its matches in the whole gallery, ascending
    attention  [h, w] float32 of sum 1, where E_e's CLS looks; or None
    """

    picture: Item | None
    facts: str
    sentence: str
    clothes: tuple[Item, Box] | None
    results: list[Result]
    ranks: list[int]
    attention: np.ndarray | None = None


class Report:
    """The examples of an evaluation, (task, protocol) -> queries.

    queries    how many of each protocol, half of them missed at rank 1 where there are as many
    top        how much of each ranking
    attention  with the attention map of each query picture
    """

    def __init__(self, *, queries: int = 6, top: int = 10, attention: bool = False):
        self.queries, self.top, self.attention = queries, top, attention
        self.examples: dict[tuple[str, str], list[Example]] = {}

    @torch.inference_mode()
    def collect(self, run: Evaluation) -> None:
        """Add one task on one data set: the first drawn gallery, the first sentence. For the rank that holds the
        features; it asks nothing of others."""
        for protocol, trials in run.trials.items():
            self.examples[run.task.name, run.title(protocol)] = self._examples(run, protocol, trials[0])

    def write(self, file: Path, metrics: dict[str, Any], log: Path | None = None) -> None:
        """Write the page, whole or not at all. metrics: content of metrics.json; log: the run's log.jsonl, if any."""
        with whole_file(file, "wb") as stream:
            stream.write(page.render(metrics, self.examples, log).encode("utf-8", "backslashreplace"))

    def _examples(self, run: Evaluation, protocol: Protocol, trial: Trial) -> list[Example]:
        members = group_members(trial, run.index, protocol)
        offsets, positives = members.positives()
        asked = np.random.default_rng(run.config.seed).permutation(np.flatnonzero(np.diff(offsets)))[:POOL]
        rows, sentences = trial.query[asked], _sentences(run, trial, asked)
        words = _instruction(run, sentences) if run.task.instruction == "query" else None
        features = (
            run.features.of(rows, 0)
            if words is None
            else run.model.text_embedding(words, run.stream).float().cpu().numpy()
        )
        scores = features @ run.features.of(trial.gallery, 0).T
        for row, query in zip(scores, asked, strict=True):
            part = slice(*members.offsets[query : query + 2])
            row[members.positions[part][members.junk[part]]] = -np.inf
        matches = [positives[slice(*offsets[query : query + 2])] for query in asked]
        # by cosine, so that a re-scored protocol shows the same queries as its cosine form
        chosen = mixed([row.argmax() in own for row, own in zip(scores, matches, strict=True)], self.queries)
        maps = self._attention_maps(run, rows[chosen], [sentences[i] for i in chosen])
        examples = []
        for i, attention in zip(chosen, maps, strict=True):
            order = np.argsort(-scores[i], kind="stable")[: np.isfinite(scores[i]).sum()]
            if words is not None and not protocol.name.endswith(":cosine"):
                head = order[:RESCORED]
                scores[i, head] = _match_scores(run, trial.gallery[head], words, i)
                order[:RESCORED] = head[np.argsort(-scores[i, head], kind="stable")]
            relevant = np.isin(order, matches[i])
            results = [
                Result(run.index.item(row), _facts(run, row), bool(hit), float(scores[i, position]))
                for position, hit in zip(order[: self.top], relevant, strict=False)
                for row in [trial.gallery[position]]
            ]
            examples.append(
                Example(
                    None if words else run.index.item(rows[i]),
                    _facts(run, rows[i]),
                    sentences[i],
                    run.index.clothes_picture(rows[i]) if run.task.instruction == "clothes" else None,
                    results,
                    (np.flatnonzero(relevant) + 1).tolist(),
                    attention,
                )
            )
        return examples

    def _attention_maps(self, run: Evaluation, rows: np.ndarray, sentences: list[str]) -> Iterable[np.ndarray | None]:
        if not self.attention or run.task.instruction == "query":
            return [None] * len(rows)
        images = _pictures(run, [run.index.item(row) for row in rows], run.config.model.image_size)
        if run.task.instruction == "clothes":
            items, boxes = zip(*map(run.index.clothes_picture, rows), strict=True)
            clothes = _pictures(run, items, run.config.model.clothes_size, boxes)
            instruction = run.model.instruction_of_clothes(clothes)
        else:
            instruction = _instruction(run, sentences)
        return run.model.edit.attention_map(images, instruction.tokens, instruction.lengths).cpu().numpy()


def mixed(found: list[bool], count: int) -> list[int]:
    """At most `count` positions, found ones first: half found and half missed, or more of one where the other lacks."""
    hits, misses = ([i for i, hit in enumerate(found) if hit == kind] for kind in (True, False))
    hits = hits[: max(count // 2, count - len(misses))]
    return hits + misses[: count - len(hits)]


def _sentences(run: Evaluation, trial: Trial, asked: np.ndarray) -> list[str]:
    """What each asked query is told; "" where clothes instruct."""
    kind = run.task.instruction
    if kind in ("sentence", "clothes"):
        return [SENTENCES[run.task.name][0] if kind == "sentence" else ""] * len(asked)
    numbers = np.zeros(len(asked), int) if trial.query_caption is None else trial.query_caption[asked]
    return [run.index.captions(row)[number] for row, number in zip(trial.query[asked], numbers, strict=True)]


def _match_scores(run: Evaluation, rows: np.ndarray, words: Instruction, i: int) -> np.ndarray:
    """[len(rows)] probabilities that an image matches sentence i."""
    assert words.lengths is not None
    images = _pictures(run, [run.index.item(row) for row in rows], run.config.model.image_size)
    one = Instruction(words.tokens[i : i + 1, : words.lengths[i]], words.lengths[i : i + 1], words.cls[i : i + 1])
    scores = run.model.match_scores(run.model.features(images, None).tokens, one, run.stream)
    return scores.float().softmax(-1)[:, 1].cpu().numpy()


def _instruction(run: Evaluation, sentences: list[str]) -> Instruction:
    text, lengths = tokenize(run.tokenizer, sentences, run.config.model.text_tokens)
    return run.model.instruct.of_text(text.to(_device(run)), lengths.to(_device(run)))


def _pictures(
    run: Evaluation, items: Sequence[Item], size: tuple[int, int], boxes: Sequence[Box] | None = None
) -> Tensor:
    pictures, count = plain(items, boxes), len(items)
    device = _device(run)
    return PicturePipeline(lambda _: pictures, size=size, batch=count, augment=False, device=device, batches=1).next()


def _device(run: Evaluation) -> torch.device:
    return run.runtime.device


def _facts(run: Evaluation, row: int) -> str:
    index = run.index
    outfit = f", outfit {index.clothes[row]}" if index.clothes[row] >= 0 else ""
    return f"{index.table['path'][int(row)].as_py()}: identity {index.pid[row]}, camera {index.camera[row]}{outfit}"
