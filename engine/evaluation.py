"""Test images -> features -> every protocol's metrics, beside a random ranking and the same network untrained."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from engine import checkpoint
from engine.config import TrainConfig
from engine.data.index import Index, find_indexes
from engine.data.pipeline import DecodeError, PicturePipeline, plain
from engine.errors import InputError, writing
from engine.instructions import SENTENCES
from engine.model.instruction import Instruction, tokenize
from engine.model.irm import IRM
from engine.progress import Progress
from engine.protocols import (
    PROTOCOLS,
    Metrics,
    Protocol,
    Trial,
    expected_random,
    mean_metrics,
    metrics_from_ranking,
    score_trial,
)
from engine.tasks import TASKS, Task

BATCH = 128  # images per forward
RESCORED = 128  # text-to-image: how many of the best by cosine the matching head orders anew (the paper's App. D.2)


class TestFeatures:
    """One (task, data set)'s test features. rows [n] record numbers ascending; features [S, n, D] float32 of unit
    length, S = sentences used (1 where instructions belong to the images)."""

    def __init__(self, rows: NDArray[np.int64], features: NDArray[np.float32]):
        self.rows, self.features = rows, features

    def of(self, rows: NDArray[np.int64], sentence: int) -> NDArray[np.float32]:
        return self.features[sentence, np.searchsorted(self.rows, rows)]


def evaluate(
    checkpoint_path: str | Path,
    data: str | Path,
    *,
    datasets: tuple[str, ...] | None = None,
    tasks: tuple[str, ...] = tuple(TASKS),
    quick: bool = False,
    feature: str | None = None,
    device: torch.device | str = "cpu",
    features_file: Path | None = None,
) -> dict[str, Any]:
    """Evaluate a stored model on every protocol of every data set found below `data`; content of metrics.json."""
    model, config, state, tokenizer = checkpoint.load_model(Path(checkpoint_path))
    config = config.but(quick=quick, feature=feature or config.feature, tasks=tasks, data=str(data))
    indexes = find_indexes(Path(data), datasets)
    torch.manual_seed(config.seed)
    untrained = IRM(config.model, state.vocabulary, state.heads)
    device = torch.device(device)
    metrics = evaluate_model(
        model.to(device),
        indexes,
        tokenizer,
        config,
        untrained=untrained.to(device),
        device=device,
        features_file=features_file,
    )
    return metrics | {"checkpoint": str(checkpoint.find(Path(checkpoint_path)))}


@torch.inference_mode()
def evaluate_model(
    model: IRM,
    indexes: list[Index],
    tokenizer: Tokenizer,
    config: TrainConfig,
    *,
    untrained: IRM | None,
    device: torch.device,
    features_file: Path | None = None,
) -> dict[str, Any]:
    """Every protocol of these data sets for config.tasks. InputError names a damaged test image."""
    model.eval()
    tested = [
        (TASKS[task], index, [PROTOCOLS[name] for name in index.dataset.protocols[task]])
        for task in TASKS
        for index in indexes
        if task in config.tasks and task in index.dataset.protocols
    ]
    tested = [item for item in tested if _has_test(*item)]
    result: dict[str, dict[str, Any]] = {}
    arrays: dict[str, np.ndarray] = {}
    progress = Progress("evaluation", len(tested), unit="data set")
    for number, (task, index, protocols) in enumerate(tested):
        rows = result.setdefault(task.name, {})
        run = Evaluation(model, task, index, protocols, tokenizer, config, device)
        rows.update(run.metrics())
        if untrained is not None:
            before = Evaluation(untrained.eval(), task, index, protocols, tokenizer, config.but(quick=True), device)
            for name, row in before.metrics(rescore=False).items():
                rows[name]["untrained_mAP"] = row["mAP"]
        if features_file is not None:
            arrays |= run.arrays()
        progress.update(number + 1, f"{task.name}/{index.name}")
    progress.close()
    if features_file is not None:
        with writing(features_file):
            np.savez_compressed(features_file, **arrays)  # type: ignore[arg-type]
    means = [float(np.mean([row["mAP"] for row in rows.values()])) for rows in result.values()]
    if not means:
        raise InputError(f"--data {config.data}: nothing to evaluate for tasks {', '.join(config.tasks)}")
    return {"tasks": result, "mean_mAP": float(np.mean(means)), "config": json.loads(json.dumps(asdict(config)))}


class Evaluation:
    """One task on one data set: features once, then every protocol."""

    def __init__(
        self,
        model: IRM,
        task: Task,
        index: Index,
        protocols: list[Protocol],
        tokenizer: Tokenizer,
        config: TrainConfig,
        device: torch.device,
    ):
        self.model, self.task, self.index, self.tokenizer = model, task, index, tokenizer
        self.config, self.device = config, device
        self.trials = {protocol: protocol.trials(index, config.quick) for protocol in protocols}
        every = [part for trials in self.trials.values() for trial in trials for part in (trial.query, trial.gallery)]
        self.rows = np.unique(np.concatenate(every))
        self.tokens: list[Tensor] = []  # text-to-image: E_e's tokens of the gallery, for re-scoring
        self.features = TestFeatures(self.rows, self._image_features())

    def metrics(self, rescore: bool = True) -> dict[str, dict[str, Any]]:
        """Protocol name -> its row of metrics.json."""
        result = {}
        for protocol, trials in self.trials.items():
            if self.task.instruction == "query":
                cosine = protocol.name.endswith(":cosine") or not rescore
                measured = [self._by_text(trial, protocol, RESCORED if not cosine else 0) for trial in trials]
            else:
                measured = [
                    self._by_image(trial, protocol, s) for s in range(len(self.features.features)) for trial in trials
                ]
            result[protocol.name] = {
                **mean_metrics(measured),
                "random_mAP": expected_random(trials[0], self.index, protocol)["mAP"],
                "untrained_mAP": None,
                "feature": "projection" if self.task.instruction == "query" else self.config.feature,
                "relevance": protocol.relevance,
            }
        return result

    def arrays(self) -> dict[str, np.ndarray]:
        """What --save-features stores: TASK/DATASET/{features,pid,camera,clothes,modality,split,path} of the test
        images, and for each protocol and draw the positions of query and gallery among them."""
        index, rows = self.index, self.rows
        prefix = f"{self.task.name}/{index.name}"
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
            trial = next(iter(self.trials.values()))[0]
            result[f"{prefix}/text_features"] = self._text_features(trial)[0]
        return result

    def _by_image(self, trial: Trial, protocol: Protocol, sentence: int) -> Metrics:
        query, gallery = self.features.of(trial.query, sentence), self.features.of(trial.gallery, sentence)
        return score_trial(trial, self.index, protocol, lambda start, stop: query[start:stop] @ gallery.T)

    def _by_text(self, trial: Trial, protocol: Protocol, rescored: int) -> Metrics:
        """Cosine of the projections; the best `rescored` of each query in the order of their matching scores."""
        texts, instructions = self._text_features(trial)
        gallery = self.features.of(trial.gallery, 0)
        if not rescored:
            return score_trial(trial, self.index, protocol, lambda start, stop: texts[start:stop] @ gallery.T)
        order = np.argsort(-(texts @ gallery.T), axis=1, kind="stable")
        tokens = torch.cat(self.tokens)[torch.from_numpy(np.searchsorted(self.rows, trial.gallery))]
        progress = Progress(f"{protocol.name}: re-scoring", len(order), unit="query")
        for number, (ranking, instruction) in enumerate(zip(order, instructions, strict=True)):
            head = ranking[:rescored]
            scores = self.model.match_scores(tokens[head].to(self.device), instruction).float().softmax(-1)[:, 1]
            order[number, : len(head)] = head[np.argsort(-scores.cpu().numpy(), kind="stable")]
            progress.update(number + 1)
        progress.close()
        matches = trial.group_query[:, None] == trial.group_gallery
        return metrics_from_ranking(order, matches, identities=len(np.unique(trial.group_query)))

    def _text_features(self, trial: Trial) -> tuple[NDArray[np.float32], list[Instruction]]:
        """[Q, embed] embeddings of the query captions and each one's instruction tokens."""
        assert trial.query_caption is not None
        captions = [
            self.index.captions(row)[number] for row, number in zip(trial.query, trial.query_caption, strict=True)
        ]
        embeddings, instructions = [], []
        for start in range(0, len(captions), BATCH):
            batch = self._instruction(captions[start : start + BATCH])
            embeddings.append(self.model.text_embedding(batch).float().cpu())
            assert batch.lengths is not None
            for i, length in enumerate(batch.lengths.tolist()):
                instructions.append(
                    Instruction(batch.tokens[i : i + 1, :length], batch.lengths[i : i + 1], batch.cls[i : i + 1])
                )
        return torch.cat(embeddings).numpy(), instructions

    def _image_features(self) -> NDArray[np.float32]:
        """[S, n, D]: each image decoded once, then edited by every sentence, its own instruction, or none."""
        kind = self.task.instruction
        stream = f"{self.task.name}/{self.index.name}"
        sentences: list[Instruction] = []
        if kind == "sentence":
            count = 1 if self.config.quick else len(SENTENCES[self.task.name])
            sentences = [self._instruction([sentence]) for sentence in SENTENCES[self.task.name][:count]]
        pictures = self._pictures([self.index.path(row) for row in self.rows], None, self.config.model.image_size)
        clothes = iter(())
        if kind == "clothes":
            parts = [self.index.clothes_picture(row) for row in self.rows]
            clothes = self._pictures([p for p, _ in parts], [box for _, box in parts], self.config.model.clothes_size)
        result: list[list[Tensor]] = [[] for _ in range(max(1, len(sentences)))]
        for start, images in zip(range(0, len(self.rows), BATCH), pictures, strict=True):
            if kind == "query":
                seen = self.model.features(images, None)
                self.tokens.append(seen.tokens.cpu())
                result[0].append(self.model.image_embedding(seen).float().cpu())
                continue
            if kind == "clothes":
                instructions = [self.model.instruct.of_clothes(next(clothes))]
            elif kind == "description":
                captions = [self.index.captions(row) for row in self.rows[start : start + BATCH]]
                missing = [row for row, own in zip(self.rows[start : start + BATCH], captions, strict=True) if not own]
                if missing:
                    raise InputError(f"{self.index.path(missing[0])}: no description, but task li needs one")
                instructions = [self._instruction([own[0] for own in captions])]
            else:
                instructions = sentences
            for part, instruction in zip(result, instructions, strict=True):
                seen = self.model.features(images, instruction)
                part.append(self.model.test_feature(seen, stream, self.config.feature).float().cpu())
        return torch.stack([torch.cat(part) for part in result]).numpy()

    def _instruction(self, sentences: list[str]) -> Instruction:
        text, lengths = tokenize(self.tokenizer, sentences, self.config.model.text_tokens)
        return self.model.instruct.of_text(text.to(self.device), lengths.to(self.device))

    def _pictures(self, paths, boxes, size):
        """Batches of decoded pictures, in order."""
        batches = [slice(start, start + BATCH) for start in range(0, len(paths), BATCH)]

        def source(number: int):
            part = batches[min(number, len(batches) - 1)]  # reading ahead past the end repeats the last batch
            return plain(paths[part], None if boxes is None else boxes[part])

        pipeline = PicturePipeline(
            source, size=size, batch=BATCH, augment=False, device=self.device, threads=self.config.workers
        )
        for _ in batches:
            try:
                yield pipeline.next()
            except DecodeError as error:
                raise InputError(f"{error.paths[0]}: test image cannot be decoded; replace the file") from error


def _has_test(task: Task, index: Index, protocols: list[Protocol]) -> bool:
    """Whether this copy of the data set holds a test part with what the task needs (training-only copies do not)."""
    rows = index.select("query", "gallery", "test")
    if not len(rows) or not protocols:
        return False
    return task.instruction not in ("description", "query") or len(index.captions(rows[0])) > 0
