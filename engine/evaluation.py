"""Test images -> features -> every protocol's metrics, beside a random ranking and the same network untrained.

Ranks share the work by blocks of BATCH images: block b is computed by rank b mod world, whole, by one thread. So every
product has the same shape, and its sums the same order, whatever the number of ranks and threads, and so has every
metric (BLAS gives other bits with other numbers of threads). Rank 0 receives the features and measures.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

import kernels
from engine import baselines, checkpoint
from engine.config import TrainConfig
from engine.data.checking import without_damaged_tests
from engine.data.files import Item
from engine.data.index import Box, Index, find_indexes
from engine.data.pipeline import DecodeError, PicturePipeline, Pictures, plain
from engine.errors import InputError
from engine.graphs import Graphs
from engine.instructions import SENTENCES
from engine.model.instruction import Instruction, tokenize
from engine.model.irm import IRM
from engine.progress import Progress
from engine.protocols import (
    INSTRUCT,
    PROTOCOLS,
    Metrics,
    Protocol,
    Trial,
    expected_random,
    mean_metrics,
    score_rescored,
    score_trial,
)
from engine.results import whole_file
from engine.runtime import Runtime
from engine.tasks import TASKS, Task

if TYPE_CHECKING:
    from engine.report import Report

MEND = "replace the file, or measure without it: --allow-missing"
BATCH = 32  # images, or sentences, of a block
PAIRS = 256  # (picture, sentence) pairs per forward of the matching head
RESCORED = 128  # text-to-image: how many of the best by cosine the matching head orders anew (the paper's App. D.2)
BASELINES = ("histogram_mAP", "pixel_mAP", "shuffled_instruction_mAP", "shuffled_picture_mAP")

R = TypeVar("R")
Tested = tuple[Task, Index, list[Protocol]]


class TestFeatures:
    """One (task, data set)'s test features. rows [n] record numbers ascending; features [S, n, D] float32 of unit
    length, S = sentences used (1 where instructions belong to the images)."""

    def __init__(self, rows: NDArray[np.int64], features: NDArray[np.float32]):
        self.rows, self.features = rows, features

    def of(self, rows: NDArray[np.int64], sentence: int = 0) -> NDArray[np.float32]:
        return self.features[sentence, np.searchsorted(self.rows, rows)]


class Baselines(NamedTuple):
    """What --check compares a model with. colours, pixels: of the pictures, the colours beside those of the
    clothes picture where that instructs; exchanged: the queries' features with another query's ("instruction" or
    "picture"), None where no permutation keeps identities and instructions apart."""

    colours: TestFeatures
    pixels: TestFeatures
    exchanged: dict[str, TestFeatures | None]


def evaluate(
    checkpoint_path: str | Path,
    data: str | Path,
    *,
    datasets: tuple[str, ...] | None = None,
    tasks: tuple[str, ...] = tuple(TASKS),
    quick: bool = False,
    with_baselines: bool = False,
    feature: str | None = None,
    released: bool = False,
    allow_missing: bool = False,
    backend: str = "torch",
    device: torch.device | str = "cpu",
    runtime: Runtime | None = None,
    arrays: dict[str, np.ndarray] | None = None,
    report: Report | None = None,
) -> dict[str, Any] | None:
    """Evaluate a stored model on every protocol of every data set found below `data`; content of metrics.json.

    with_baselines  measure what `evaluate_model` calls baselines as well
    released        cut rankings as the released Instruct-ReID evaluator does; protocols are called NAME:instruct
    allow_missing   leave damaged test images out; `missing` of the result says how many, per data set
    backend         "torch", or with an exported folder "onnx" or "torch-export": features by its graphs
    runtime         ranks that share the work (None on all but rank 0 comes back); None: this process alone, on `device`
    """
    runtime = runtime or Runtime(torch.device(device))
    folder = checkpoint.find(Path(checkpoint_path))
    model, config, state, tokenizer = checkpoint.load_model(folder)
    config = config.but(
        quick=quick,
        baselines=with_baselines,
        feature=feature or config.feature,
        tasks=tasks,
        data=str(data),
        released=released,
        allow_missing=allow_missing,
    )
    indexes = find_indexes(Path(data), datasets)
    torch.manual_seed(config.seed)
    untrained = IRM(config.model, state.vocabulary, state.heads, state.matching)
    metrics = evaluate_model(
        model.to(runtime.device) if backend == "torch" else Graphs(folder, backend, runtime.device),
        indexes,
        tokenizer,
        config,
        untrained=untrained.to(runtime.device),
        runtime=runtime,
        arrays=arrays,
        report=report,
    )
    return metrics and metrics | {"checkpoint": str(folder)}


def evaluate_model(
    model: IRM | Graphs,
    indexes: list[Index],
    tokenizer: Tokenizer,
    config: TrainConfig,
    *,
    untrained: IRM | None,
    runtime: Runtime,
    arrays: dict[str, np.ndarray] | None = None,
    report: Report | None = None,
) -> dict[str, Any] | None:
    """Every protocol of these data sets for config.tasks. All ranks call it; rank 0 gets the metrics, the others None.

    untrained: the same network before training, for `untrained_mAP`: by one sentence and one drawn gallery (as with
    config.quick), text-to-image by cosine alone. With config.baselines every protocol has `histogram_mAP` and
    `pixel_mAP` as well, and where the instruction is the query's own `shuffled_instruction_mAP` and
    `shuffled_picture_mAP`; null where a protocol has no such thing (text has no colours to compare).
    arrays: gets what features.npz holds. InputError, on all ranks alike, names a damaged test image.
    """
    indexes, missing = usable(indexes, config) if config.allow_missing else (indexes, {})
    tested, left_out = measurable(indexes, config)
    if not tested:
        raise InputError(f"--data {config.data}: nothing to evaluate for tasks {', '.join(config.tasks)}")
    result: dict[str, dict[str, Any]] = {}
    progress = Progress("evaluation", len(tested), unit="data set") if runtime.main else None
    with _one_thread_each(runtime.device) as threads:
        for number, (task, index, protocols) in enumerate(tested):
            rows = result.setdefault(task.name, {})
            given = (task, index, protocols, tokenizer)
            run = Evaluation(model.eval(), *given, config, runtime, threads)
            rows.update(run.metrics())
            if report is not None and runtime.main:
                report.collect(run)
            if untrained is not None:
                quick = config.but(quick=True, baselines=False)
                before = Evaluation(untrained.eval(), *given, quick, runtime, threads, rescore=False)
                for name, row in before.metrics().items():
                    rows[name]["untrained_mAP"] = row["mAP"]
            if arrays is not None and runtime.main:
                arrays |= run.arrays()
            if progress:
                progress.update(number + 1, f"{task.name}/{index.name}")
    if not progress:
        return None
    progress.close()
    means = [float(np.mean([row["mAP"] for row in rows.values()])) for rows in result.values()]
    metrics = {"tasks": result, "mean_mAP": float(np.mean(means)), "config": json.loads(json.dumps(asdict(config)))}
    return metrics | ({"left_out": left_out} if left_out else {}) | ({"missing": missing} if missing else {})


def write_features(arrays: dict[str, np.ndarray], file: Path) -> None:
    """features.npz, whole or not at all."""
    with whole_file(file, "wb") as stream:
        np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]


def usable(indexes: list[Index], config: TrainConfig) -> tuple[list[Index], dict[str, int]]:
    """The data sets without their damaged test images, and how many images each lacks for that."""
    result: list[Index] = []
    missing: dict[str, int] = {}
    for index in indexes:
        if any(index.dataset.protocols.get(task) for task in config.tasks):
            index = without_damaged_tests(index, threads=config.workers)
            clothes = any(
                TASKS[task].instruction == "clothes" and index.dataset.protocols.get(task) for task in config.tasks
            )
            rows, pictures = index.tested(clothes)
            count = np.count_nonzero(index.damaged[rows] | (index.damaged[pictures] & (pictures >= 0)))
            missing |= {index.name: int(count)} if count else {}
        result.append(index)
    return result, missing


def measurable(indexes: list[Index], config: TrainConfig) -> tuple[list[Tested], dict[str, str]]:
    """What these data sets can test of config.tasks, and protocol -> why this copy cannot serve it: no query or gallery
    image or no positive. InputError where that leaves no protocol at all, and for a test image that its index calls
    damaged; no test part: ([], {})."""
    tested, left_out = [], {}
    for task in (TASKS[name] for name in TASKS if name in config.tasks):
        for index in indexes:
            pictures = task.instruction == "clothes"
            damage = {} if config.allow_missing else index.test_damage(pictures)
            if damage and index.dataset.protocols.get(task.name):
                path, why = next(iter(damage.items()))
                more = f" (one of {len(damage):,})" if len(damage) > 1 else ""
                raise InputError(f"{path}: test image {why}{more}; {MEND}")
            protocols = [PROTOCOLS[name] for name in index.dataset.protocols.get(task.name, ())]
            if not _has_test(task, index, protocols):
                continue
            if pictures and config.allow_missing:
                index = _with_pictures(index)
            fit = []
            for protocol in protocols:
                try:
                    for trial in protocol.trials(index, config.quick):
                        expected_random(trial, index, protocol)
                    fit.append(protocol)
                except InputError as error:
                    left_out[protocol.name] = str(error)
            if fit:
                tested.append((task, index, fit))
    if left_out and not tested:
        raise InputError(next(iter(left_out.values())))
    return tested, left_out


def _with_pictures(index: Index) -> Index:
    """The index with the test images marked as damaged whose pictures of clothes are."""
    rows, pictures = index.tested(pictures=True)
    damaged = index.damaged.copy()
    damaged[rows] |= index.damaged[pictures] & (pictures >= 0)
    return index.with_column("damaged", damaged)


class Evaluation:
    """One task on one data set: features once, then every protocol. All ranks make it together.

    trials      protocol -> its divisions into queries and gallery
    rows        [n] int64, the test images of all trials
    features    of these rows, on rank 0 (empty elsewhere)
    texts       text-to-image: embeddings of all their captions, on rank 0
    baselines   with config.baselines, where the query is a picture
    """

    def __init__(
        self,
        model: IRM | Graphs,
        task: Task,
        index: Index,
        protocols: list[Protocol],
        tokenizer: Tokenizer,
        config: TrainConfig,
        runtime: Runtime,
        threads: _Threads,
        *,
        rescore: bool = True,
    ):
        self.task, self.index, self.tokenizer = task, index, tokenizer
        self.stream = f"{task.name}/{index.name}"
        # of the graphs what has the methods that are used here
        self.model = model if isinstance(model, IRM) else cast(IRM, model.at(self.stream))
        self.config, self.runtime, self.threads, self.rescore = config, runtime, threads, rescore
        self.truncate = INSTRUCT if config.released else None
        self.trials = {protocol: protocol.trials(index, config.quick) for protocol in protocols}
        every = [part for trials in self.trials.values() for trial in trials for part in (trial.query, trial.gallery)]
        self.rows = np.unique(np.concatenate(every))
        self.tokens: dict[int, Tensor] = {}  # text-to-image: first row of an own block -> E_e's tokens, for re-scoring
        self.features = TestFeatures(self.rows, self._image_features(self.rows, self.rows))
        self._refuse_broken(self.features.features)
        self.captions: list[str] = []
        if task.instruction == "query":
            own = [index.captions(row) for row in self.rows]
            self.captions = [caption for captions in own for caption in captions]
            self.first_caption = np.cumsum([0, *map(len, own)])
            self.texts = self._sharded(len(self.captions), self._text_block)[0]
            self._refuse_broken(self.texts)
        self.baselines = self._baselines() if config.baselines and task.instruction != "query" else None

    def _refuse_broken(self, features: NDArray[np.float32]) -> None:
        if not np.isfinite(features).all():
            raise InputError(
                f"the model's features of {self.stream} are not finite; take an older checkpoint, a lower --lr"
            )

    def title(self, protocol: Protocol) -> str:
        """Its name in metrics.json."""
        return protocol.name + ":instruct" * self.config.released

    def metrics(self) -> dict[str, dict[str, Any]]:
        """Protocol name -> its row of metrics.json, on rank 0; all ranks call it."""
        result = {}
        for protocol, trials in self.trials.items():
            by_text = self.task.instruction == "query"
            rescored = by_text and self.rescore and not protocol.name.endswith(":cosine")
            heads = [self._rescored(trial, protocol) for trial in trials] if rescored else []
            if not self.runtime.main:
                continue
            if rescored:
                measured = [self._score_rescored(t, protocol, *head) for t, head in zip(trials, heads, strict=True)]
            elif by_text:
                measured = [self._score(t, protocol, self._texts(t), self.features.of(t.gallery)) for t in trials]
            else:
                measured = self._by_image(protocol, self.features, self.features)
            result[self.title(protocol)] = {
                **mean_metrics(measured),
                "random_mAP": expected_random(trials[0], self.index, protocol)["mAP"],
                "untrained_mAP": None,
                **(self._against(protocol) if self.config.baselines else {}),
                "feature": "projection" if by_text else self.config.feature,
                "relevance": protocol.relevance,
            }
        return result

    def arrays(self) -> dict[str, np.ndarray]:
        """What --save-features stores: TASK/DATASET/{features,pid,camera,clothes,modality,split,path} of the test
        images, and for each protocol and draw the positions of query and gallery among them."""
        index, rows = self.index, self.rows
        prefix = self.stream
        result: dict[str, np.ndarray] = {f"{prefix}/features": self.features.features}
        for name in ("pid", "camera", "clothes", "modality", "split"):
            result[f"{prefix}/{name}"] = getattr(index, name)[rows]
        result[f"{prefix}/path"] = np.array(index.table["path"].take(rows).to_pylist())
        for protocol, trials in self.trials.items():
            for number, trial in enumerate(trials):
                key = f"{self.task.name}/{protocol.name}/{number}"
                result[f"{key}/query"] = np.searchsorted(rows, trial.query)
                result[f"{key}/gallery"] = np.searchsorted(rows, trial.gallery)
        if self.task.instruction == "query":
            result[f"{prefix}/text_features"] = self._texts(next(iter(self.trials.values()))[0])
        return result

    def _by_image(self, protocol: Protocol, queries: TestFeatures, gallery: TestFeatures) -> list[Metrics]:
        """Every sentence and drawn gallery."""

        def measure(sentence: int, trial: Trial) -> Metrics:
            parts = queries.of(trial.query, sentence), gallery.of(trial.gallery, sentence)
            return self._score(trial, protocol, *parts)

        pairs = [(s, trial) for s in range(len(gallery.features)) for trial in self.trials[protocol]]
        return list(self.threads.map(measure, pairs))

    def _score(self, trial: Trial, protocol: Protocol, query: NDArray, gallery: NDArray) -> Metrics:
        features = self._ranked(query), self._ranked(gallery)
        return score_trial(trial, self.index, protocol, *features, truncate=self.truncate)

    def _ranked(self, features: NDArray[np.float32]) -> Tensor:
        """Where they are ranked: on a GPU where there is one."""
        return torch.from_numpy(features).to(self.runtime.device)

    def _texts(self, trial: Trial) -> NDArray[np.float32]:
        """[Q, embed] embeddings of the query captions."""
        return self.texts[self._asked(trial)]

    def _asked(self, trial: Trial) -> NDArray[np.int64]:
        """[Q] positions of the query captions in self.captions."""
        assert trial.query_caption is not None
        return self.first_caption[np.searchsorted(self.rows, trial.query)] + trial.query_caption

    def _rescored(self, trial: Trial, protocol: Protocol) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """[Q, k] gallery positions, the best RESCORED of each query by cosine, and their matching scores; on rank 0.

        A rank scores the images whose tokens it holds: tokens stay where they were made, scores travel.
        """
        best = None
        if self.runtime.main:
            texts, images = self._ranked(self._texts(trial)), self._ranked(self.features.of(trial.gallery))
            best = kernels.topk(texts, images, min(RESCORED, len(images)))[1].cpu()
        place = np.searchsorted(self.rows, trial.gallery)[self.runtime.from_main(best).numpy()]  # [Q, k]
        asked = self._asked(trial)
        queries = _blocks(len(asked))

        def match(block: slice) -> Tensor:
            tokens, lengths, cls = self._instruction([self.captions[number] for number in asked[block]])
            assert lengths is not None
            scores = torch.zeros(place[block].shape)
            for first, images in self.tokens.items():
                query, slot = np.nonzero((place[block] >= first) & (place[block] < first + len(images)))
                for start in range(0, len(query), PAIRS):
                    q, k = query[start : start + PAIRS], slot[start : start + PAIRS]
                    seen = images[place[block][q, k] - first].to(self.runtime.device)
                    logits = self.model.match_scores(seen, Instruction(tokens[q], lengths[q], cls[q]), self.stream)
                    scores[q, k] = logits.float().softmax(-1)[:, 1].cpu()
            return scores

        parts = []
        progress = Progress(f"{protocol.name}: re-scoring", len(asked), unit="query") if self.runtime.main else None
        for part in self.threads.map(match, ((block,) for block in queries)):
            parts.append(part)
            if progress:
                progress.update(sum(map(len, parts)))
        scores = torch.cat(parts)
        if not progress:
            self.runtime.send(scores)
            return np.empty((0, 0), np.int64), np.empty((0, 0), np.float32)
        progress.close()
        assert best is not None
        owner = torch.from_numpy(place // BATCH % self.runtime.world)
        for rank in range(1, self.runtime.world):
            scores = torch.where(owner == rank, self.runtime.receive(tuple(scores.shape), rank), scores)
        return best.numpy(), scores.numpy()

    def _score_rescored(
        self, trial: Trial, protocol: Protocol, best: NDArray[np.int64], matching: NDArray[np.float32]
    ) -> Metrics:
        features = self._ranked(self._texts(trial)), self._ranked(self.features.of(trial.gallery))
        return score_rescored(trial, self.index, protocol, *features, best, matching, truncate=self.truncate)

    def _baselines(self) -> Baselines:
        index, rows = self.index, self.rows

        def colours(row: int) -> NDArray[np.float32]:
            person = baselines.histogram(index.item(row))
            if self.task.instruction != "clothes":
                return person
            clothes = baselines.histogram(*index.clothes_picture(row), clothes=True)
            return (np.concatenate([person, clothes]) / 2**0.5).astype(np.float32)

        def of_rows(describe: Callable[[int], NDArray[np.float32]]) -> TestFeatures:
            def work(block: slice, _: slice) -> Tensor:
                return torch.from_numpy(np.stack([describe(row) for row in rows[block]]))[None]

            return TestFeatures(rows, self._sharded(len(rows), work))

        exchanged: dict[str, TestFeatures | None] = {"instruction": None, "picture": None}
        queries = np.unique(np.concatenate([trial.query for trials in self.trials.values() for trial in trials]))
        if self.task.instruction in ("clothes", "description"):
            others = baselines.exchange(index, queries, self.config.seed)
            if others is not None:
                exchanged["instruction"] = TestFeatures(queries, self._image_features(queries, others))
                exchanged["picture"] = TestFeatures(queries, self._image_features(others, queries))
        return Baselines(
            of_rows(colours),
            of_rows(lambda row: baselines.pixels(index.item(row))),
            exchanged,
        )

    def _against(self, protocol: Protocol) -> dict[str, float | None]:
        """The baselines' figures of metrics.json."""
        base = self.baselines
        result: dict[str, float | None] = dict.fromkeys(BASELINES)
        if base is None:
            return result

        def mean(queries: TestFeatures, gallery: TestFeatures) -> float:
            return float(np.mean([part.mAP for part in self._by_image(protocol, queries, gallery)]))

        result["histogram_mAP"] = mean(base.colours, base.colours)
        result["pixel_mAP"] = mean(base.pixels, base.pixels)
        for what, queries in base.exchanged.items():
            if queries is not None:
                result[f"shuffled_{what}_mAP"] = mean(queries, self.features)
        return result

    def _image_features(self, pictures: NDArray[np.int64], instructions: NDArray[np.int64]) -> NDArray[np.float32]:
        """[S, n, D]: row pictures[i]'s image, decoded once, then edited by every sentence, by the own instruction of
        row instructions[i], or by none."""
        kind, index, config = self.task.instruction, self.index, self.config
        sentences: list[Instruction] = []
        if kind == "sentence":
            count = 1 if config.quick else len(SENTENCES[self.task.name])
            with torch.inference_mode():
                sentences = [self._instruction([sentence]) for sentence in SENTENCES[self.task.name][:count]]

        def decode(blocks: list[slice]) -> Iterator[tuple[Tensor, Tensor | None]]:
            images = self._pictures([[index.item(row) for row in pictures[block]] for block in blocks])
            if kind != "clothes":
                return ((image, None) for image in images)
            parts = [[index.clothes_picture(row) for row in instructions[block]] for block in blocks]
            boxes = [[box for _, box in part] for part in parts]
            return zip(images, self._pictures([[item for item, _ in part] for part in parts], boxes), strict=True)

        def extract(block: slice, decoded: tuple[Tensor, Tensor | None]) -> Tensor:
            images, clothes = decoded
            if kind == "query":
                seen = self.model.features(images, None)
                if self.rescore:
                    self.tokens[block.start] = seen.tokens.cpu()
                return self.model.image_embedding(seen, self.stream).float().cpu()[None]
            asked = sentences
            if clothes is not None:
                asked = [self.model.instruction_of_clothes(clothes)]
            elif kind == "description":
                own = [(row, index.captions(row)) for row in instructions[block]]
                for row, captions in own:
                    if not captions:
                        raise InputError(f"{index.path(row)}: no description, but task li needs one")
                asked = [self._instruction([captions[0] for _, captions in own])]
            found = [self.model.features(images, instruction) for instruction in asked]
            return torch.stack(
                [self.model.test_feature(seen, self.stream, config.feature).float().cpu() for seen in found]
            )

        return self._sharded(len(pictures), extract, decode)

    def _text_block(self, block: slice, _: slice) -> Tensor:
        return self.model.text_embedding(self._instruction(self.captions[block]), self.stream).float().cpu()[None]

    def _instruction(self, sentences: list[str]) -> Instruction:
        text, lengths = tokenize(self.tokenizer, sentences, self.config.model.text_tokens)
        return self.model.instruct.of_text(text.to(self.runtime.device), lengths.to(self.runtime.device))

    def _sharded(
        self,
        count: int,
        work: Callable[[slice, Any], Tensor],
        inputs: Callable[[list[slice]], Iterable[Any]] = iter,
    ) -> NDArray[np.float32]:
        """work(block, its input) -> [S, b, D] for all blocks of `count` things, shared by the ranks; [S, count, D]
        on rank 0, [1, 0, 0] elsewhere. inputs: blocks -> each one's input, made by this thread ahead of the work (the
        block itself by default). An InputError on one rank is raised on all."""
        blocks, world = _blocks(count), self.runtime.world
        own = blocks[self.runtime.rank :: world]
        parts: list[Tensor] = []
        with self.runtime.together():
            parts.extend(self.threads.map(work, zip(own, inputs(own), strict=True)))
        if not self.runtime.main:
            for part in parts:
                self.runtime.send(part)
            return np.empty((1, 0, 0), np.float32)
        S, _, D = parts[0].shape
        result = np.empty((S, count, D), np.float32)
        for number, block in enumerate(blocks):
            rank = number % world
            shape = (S, block.stop - block.start, D)
            result[:, block] = parts[number // world] if rank == 0 else self.runtime.receive(shape, rank)
        return result

    def _pictures(self, items: list[list[Item]], boxes: list[list[Box]] | None = None) -> Iterator[Tensor]:
        """Batches of decoded pictures, in order: whole images, or with boxes pictures of clothes."""
        if not items:
            return

        def source(number: int) -> Pictures:
            return plain(items[number], None if boxes is None else boxes[number])

        pipeline = PicturePipeline(
            source,
            size=self.config.model.image_size if boxes is None else self.config.model.clothes_size,
            batch=BATCH,
            augment=False,
            device=self.runtime.device,
            threads=self.config.workers,
            batches=len(items),
        )
        for _ in items:
            try:
                yield pipeline.next()
            except DecodeError as error:
                path, why = next(iter(error.reasons.items()))
                raise InputError(f"{path}: test image {why}; {MEND}") from error


class _Threads:
    """This rank's cores: as many threads, each of which computes alone (see `_one_thread_each`)."""

    def __init__(self, count: int, pool: ThreadPoolExecutor):
        self.count, self.pool = count, pool

    def map(self, work: Callable[..., R], inputs: Iterable[tuple]) -> Iterator[R]:
        """work(*input) of each input, in order. An input is taken when a thread will soon be free for it."""

        def run(given: tuple) -> R:
            with torch.inference_mode():
                return work(*given)

        waiting: collections.deque[Future[R]] = collections.deque()
        for given in inputs:
            waiting.append(self.pool.submit(run, given))
            if len(waiting) > self.count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextmanager
def _one_thread_each(device: torch.device) -> Iterator[_Threads]:
    """Threads that share this rank's cores between blocks instead of sharing each product."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        workers = 1 if device.type == "cuda" else count
        with ThreadPoolExecutor(workers) as pool:
            yield _Threads(workers, pool)
    finally:
        torch.set_num_threads(count)


def _blocks(count: int) -> list[slice]:
    return [slice(start, min(start + BATCH, count)) for start in range(0, count, BATCH)]


def _has_test(task: Task, index: Index, protocols: list[Protocol]) -> bool:
    """Whether this copy of the data set holds a test part with what the task needs (training-only copies do not)."""
    rows = index.select("query", "gallery", "test")
    if not len(rows) or not protocols:
        return False
    if task.instruction not in ("description", "query"):
        return True
    return bool(index.sentences(rows).any())
