"""Training: streams in, DeepSpeed around one forward that returns the loss, checkpoints and metrics out.

One optimiser step accumulates over a window of micro-steps; each micro-step is one stream, the same on every rank.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch.utils.tensorboard import SummaryWriter

from engine import checkpoint
from engine.config import TrainConfig
from engine.data.index import Index, find_indexes
from engine.data.loader import TrainLoader
from engine.data.sampler import Sampler, Stream, make_streams
from engine.errors import InputError
from engine.evaluation import evaluate_model
from engine.instructions import SENTENCES
from engine.losses import TrainingModel
from engine.model.instruction import build_tokenizer
from engine.model.irm import IRM
from engine.progress import Progress
from engine.runtime import Runtime, seed_everything, start
from engine.schedule import learning_rate, parameter_groups

TERMINATED = 143  # exit code after SIGTERM: saved, can be resumed
MOST_SKIPPED = 20  # non-finite steps in a row that end a run


def train(config: TrainConfig) -> dict[str, Any] | None:
    """Run one training to its end. Returns the content of metrics.json (None with evaluate=False, or on ranks > 0)."""
    runtime = start(config.device)
    output = Path(config.output)
    _claim(output, config, runtime)
    say = print if runtime.main else _silent
    indexes = find_indexes(Path(config.data), config.datasets)
    streams = make_streams(indexes, config.tasks)
    sampler = Sampler(
        streams,
        seed=config.seed,
        ids=config.ids,
        images_per_id=config.images_per_id,
        world=runtime.world,
        shares=config.shares,
        leaders=config.leaders,
        ahead=config.ahead,
    )
    for note in sampler.notes:
        say(note)
    window = config.window or len(sampler.cycle)
    tokenizer = build_tokenizer(_corpus(indexes))
    model = build_model(config, streams, tokenizer)
    say(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {len(streams)} streams "
        f"({', '.join(stream.name for stream in streams)}), {window} per step, {runtime.world} rank(s) on "
        f"{runtime.device.type}"
    )
    ds_engine = _deepspeed(model, config, streams, sampler, window, runtime)
    state = checkpoint.State(0, runtime.world, _heads(streams), [s.name for s in streams], tokenizer.get_vocab_size())
    folder = output / "checkpoints"
    if config.resume:
        state = checkpoint.resume(folder, ds_engine, state, config, tokenizer)
        say(f"resumed after step {state.step}")
    if runtime.main:
        (output / "config.json").write_text(config.to_json())
    _steps(config, runtime, ds_engine, model, sampler, tokenizer, window, state, output)
    if not config.evaluate or not runtime.main:
        return None  # rank 0 evaluates what it saved; nobody need wait
    model = checkpoint.load_model(folder)[0].to(runtime.device)
    untrained = build_model(config, streams, tokenizer).to(runtime.device)
    features_file = output / "features.npz" if config.save_features else None
    metrics = evaluate_model(
        model, indexes, tokenizer, config, untrained=untrained, device=runtime.device, features_file=features_file
    )
    metrics["checkpoint"] = str(checkpoint.latest(folder))
    (output / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    return metrics


def build_model(config: TrainConfig, streams: tuple[Stream, ...], tokenizer: Tokenizer) -> IRM:
    """The model with initial weights that follow from the seed alone."""
    seed_everything(config.seed)
    return IRM(config.model, tokenizer.get_vocab_size(), _heads(streams))


def _steps(
    config: TrainConfig,
    runtime: Runtime,
    ds_engine: Any,
    model: IRM,
    sampler: Sampler,
    tokenizer: Tokenizer,
    window: int,
    state: checkpoint.State,
    output: Path,
) -> None:
    """The loop: `config.steps` optimiser steps, logged, saved, stoppable."""

    def quarantine(path: Path, reason: str, micro_step: int) -> None:
        row = {"path": str(path), "reason": reason, "step": micro_step // window + 1}
        with (output / "quarantine.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    loader = TrainLoader(
        sampler,
        config,
        tokenizer,
        runtime.device,
        rank=runtime.rank,
        start=state.step * window,
        quarantine=quarantine,
    )
    log = _Log(output, config, runtime, state.step)
    stop = _on_sigterm()
    step, skipped, in_a_row = state.step, state.skipped, 0
    ds_engine.train()
    while step < config.steps:
        began, waited, images = time.monotonic(), 0.0, 0
        rate = learning_rate(step, config)
        sums: dict[str, list[float]] = {}
        finite, names, norm = True, [], 0.0
        for _ in range(window):
            asked = time.monotonic()
            batch, sample = loader.next()
            waited += time.monotonic() - asked
            images += len(batch.images) * runtime.world
            torch.manual_seed(hash((config.seed, loader.micro_step, runtime.rank)))  # drop path: a function of the step
            loss, terms = ds_engine(batch)
            values = runtime.mean(torch.stack([loss.detach(), *terms.values()]).float()).tolist()
            if not math.isfinite(values[0]):  # on some rank: this micro-step gives no gradient, the step is skipped
                finite, loss = False, sum(p.sum() for p in ds_engine.module.parameters()) * 0.0
            for name, value in zip(("loss", *terms), values, strict=True):
                sums.setdefault(name, []).append(value)
            names.append(sample.stream.name)
            log.sample(step, sample)
            ds_engine.backward(loss)
            if ds_engine.is_gradient_accumulation_boundary():
                norm = _gradient_norm(ds_engine)
                if not finite or not math.isfinite(norm):
                    finite = False
                    _zero_gradients(ds_engine)
                for group in ds_engine.optimizer.param_groups:
                    group["lr"] = rate * group["multiplier"] if finite else 0.0
            ds_engine.step()
        step += 1
        skipped, in_a_row = (skipped, 0) if finite else (skipped + 1, in_a_row + 1)
        seconds = time.monotonic() - began
        log.step(
            {
                "step": step,
                "streams": names,
                "loss": sum(sums["loss"]) / window,
                "stream_loss": sums["loss"],
                "terms": {name: sum(v) / len(v) for name, v in sums.items() if name != "loss"},
                "lr": rate,
                "grad_norm": norm or float(ds_engine.get_global_grad_norm() or 0.0),
                "images_per_s": images / seconds,
                "data_wait_s": waited,
                "skipped": skipped,
            }
        )
        if in_a_row >= MOST_SKIPPED:
            raise InputError(
                f"loss not finite for {MOST_SKIPPED} steps in a row, at step {step}; lower --lr and --resume"
            )
        ending = runtime.any(stop.is_set)
        if ending or step % config.checkpoint_every == 0 or step == config.steps:
            state = checkpoint.State(step, runtime.world, state.heads, state.streams, state.vocabulary, skipped)
            checkpoint.save(output / "checkpoints", ds_engine, model, config, state, tokenizer, runtime)
        if ending:
            log.close()
            if runtime.main:
                print(f"stopped by SIGTERM after step {step}; --resume goes on from there", flush=True)
            sys.exit(TERMINATED)
    log.close()
    stop.restore()


class _Log:
    """log.jsonl, TensorBoard and the progress bar of rank 0; with log_samples also samples.rankN.jsonl of every
    rank."""

    def __init__(self, output: Path, config: TrainConfig, runtime: Runtime, first: int):
        self.runtime, self.samples = runtime, None
        if config.log_samples:
            _forget_after(output / f"samples.rank{runtime.rank}.jsonl", first)
            self.samples = (output / f"samples.rank{runtime.rank}.jsonl").open("a")
        if runtime.main:
            _forget_after(output / "log.jsonl", first)
            self.file = (output / "log.jsonl").open("a")
            self.board = SummaryWriter(str(output / "tensorboard"), purge_step=first + 1)
            self.progress = Progress("training", config.steps, first, "step")

    def sample(self, step: int, sample: Any) -> None:
        if self.samples:
            row = {"step": step + 1, "stream": sample.stream.name, "labels": sample.labels.tolist()}
            print(json.dumps(row | {"rows": sample.rows.tolist()}), file=self.samples, flush=True)

    def step(self, row: dict[str, Any]) -> None:
        if not self.runtime.main:
            return
        print(json.dumps(row), file=self.file, flush=True)
        for name in ("loss", "lr", "grad_norm", "images_per_s", "data_wait_s"):
            self.board.add_scalar(f"train/{name}", row[name], row["step"])
        for name, value in row["terms"].items():
            self.board.add_scalar(f"terms/{name}", value, row["step"])
        for name, value in zip(row["streams"], row["stream_loss"], strict=True):
            self.board.add_scalar(f"streams/{name}", value, row["step"])
        self.progress.update(row["step"], f"loss {row['loss']:.3f}, {row['images_per_s']:.0f} images/s")

    def close(self) -> None:
        if self.samples:
            self.samples.close()
        if self.runtime.main:
            self.file.close()
            self.board.close()
            self.progress.close()


def _forget_after(file: Path, step: int) -> None:
    """Drop log lines of steps that a resumed run will do again (and a line cut by a kill)."""
    if not file.is_file():
        return
    kept = [line for line in file.read_text().splitlines() if _step_of(line) <= step]
    part = file.with_suffix(".part")
    part.write_text("".join(line + "\n" for line in kept))
    os.replace(part, file)


def _step_of(line: str) -> float:
    """The step of a log line; infinite for a line cut by a kill."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return math.inf


def _claim(output: Path, config: TrainConfig, runtime: Runtime) -> None:
    """Make the output folder; a folder that already holds a run is refused unless --resume."""
    used = (output / "log.jsonl").exists() or (output / "checkpoints").exists()
    runtime.barrier()  # every rank has looked before rank 0 writes
    if used and not config.resume:
        raise InputError(f"--output {output}: holds a run already; choose another folder or add --resume")
    if config.resume and checkpoint.latest(output / "checkpoints") is None:
        raise InputError(f"--resume: no checkpoint in {output}/checkpoints; leave --resume out to start a run")
    if runtime.main:
        try:
            output.mkdir(parents=True, exist_ok=True)
            (output / "quarantine.jsonl").touch()
        except OSError as error:
            raise InputError(f"--output {output}: cannot write there ({error.strerror})") from error
    runtime.barrier()


def _deepspeed(
    model: IRM,
    config: TrainConfig,
    streams: tuple[Stream, ...],
    sampler: Sampler,
    window: int,
    runtime: Runtime,
) -> Any:
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    module = TrainingModel(model, config, [s.name for s in streams], [s.task.loss == "matching" for s in streams])
    module.to(runtime.device)
    optimizer = torch.optim.AdamW(parameter_groups(module, config))
    settings = {
        "zero_optimization": {"stage": 0},
        "torch_autocast": {"enabled": runtime.device.type == "cuda", "dtype": "bfloat16"},
        **(config.deepspeed or {}),
        "train_micro_batch_size_per_gpu": max(P * K for P, K in sampler.batches) // runtime.world,
        "gradient_accumulation_steps": window,
        "gradient_clipping": config.clip,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 60,
    }
    return deepspeed.initialize(model=module, optimizer=optimizer, config=settings)[0]


def _gradient_norm(ds_engine: Any) -> float:
    """Norm of the accumulated gradient before clipping. With ZeRO 1-3 the gradients lie in DeepSpeed's partitions,
    which are known only after the step: 0 then."""
    if ds_engine.zero_optimization_stage() > 0:
        return 0.0
    grads = [p.grad for p in ds_engine.module.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(grads))


def _zero_gradients(ds_engine: Any) -> None:
    """So that a step of rate 0 leaves no trace of NaN in the optimiser's moments."""
    for parameter in ds_engine.module.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()


def _heads(streams: tuple[Stream, ...]) -> dict[str, int]:
    return {stream.name: stream.identities for stream in streams if stream.task.loss == "identity"}


def _corpus(indexes: list[Index], most: int = 200_000):
    """Sentences that the vocabulary is built from: the fixed ones and the training captions."""
    for family in SENTENCES.values():
        yield from family
    for index in indexes:
        rows = index.select("train")[:most]
        for captions in index.table["captions"].take(rows).to_pylist():
            yield from captions


class _on_sigterm:
    """SIGTERM sets a flag; the loop looks at it between steps."""

    def __init__(self) -> None:
        self.is_set = False
        self.before = signal.signal(signal.SIGTERM, self._set)

    def restore(self) -> None:
        signal.signal(signal.SIGTERM, self.before)

    def _set(self, *_: Any) -> None:
        self.is_set = True


def _silent(*_: Any) -> None:
    pass
