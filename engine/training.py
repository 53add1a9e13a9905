"""Training: streams in, DeepSpeed around one forward that returns the loss, checkpoints and metrics out.

One optimiser step accumulates over a window of micro-steps; each micro-step is one stream, the same on every rank.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from engine import checkpoint
from engine.config import TrainConfig
from engine.data.index import Index, find_indexes
from engine.data.loader import TrainLoader
from engine.data.sampler import Sampler, Stream, make_streams
from engine.errors import InputError, writing
from engine.evaluation import evaluate_model, measurable, write_features
from engine.instructions import SENTENCES
from engine.log import Log, quarantine
from engine.losses import TrainingModel
from engine.model.instruction import build_tokenizer
from engine.model.irm import IRM
from engine.report import Report
from engine.results import format_table, is_real, write_metrics
from engine.runtime import Runtime, Termination, seed_everything, start
from engine.schedule import learning_rate, parameter_groups

TERMINATED = 143  # exit code after SIGTERM: saved, can be resumed
MOST_SKIPPED = 20  # non-finite steps in a row that end a run


def train(config: TrainConfig) -> dict[str, Any] | None:
    """Run one training to its end. Returns the content of metrics.json (None with evaluate=False, or on ranks > 0)."""
    runtime = start(config.device)
    output = Path(config.output)
    _claim(output, config, runtime)
    say = print if runtime.main else _silent
    indexes: list[Index] = []
    for mine in (runtime.main, not runtime.main):  # rank 0 parses what is not indexed, the others map it
        with runtime.together():
            if mine:
                indexes = find_indexes(Path(config.data), config.datasets, keep=output / "index", say=say)
    with runtime.together():
        streams = make_streams(indexes, config.tasks)
        sampler = Sampler(
            streams,
            seed=config.seed,
            ids=config.ids,
            images_per_id=config.images_per_id,
            world=runtime.world,
            shares=config.shares,
            temperature=config.temperature,
            leaders=config.leaders,
            ahead=config.ahead,
        )
        tokenizer = build_tokenizer(_corpus(indexes))
    for note in sampler.notes:
        say(note)
    tested = False
    if config.evaluate:  # what the test part lacks is told before the training, not after it
        with runtime.together():
            tests, left_out = measurable(indexes, config)
        for name, why in left_out.items():
            say(f"{name} is left out of the evaluation: {why}")
        tested = bool(tests)
        if not tested:
            say("no test part: training only")
    window = config.window or sampler.window
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
        state = checkpoint.resume(folder, ds_engine, state, config, tokenizer, runtime)
        say(f"resumed after step {state.step}")
    with runtime.together(), writing(output):
        if runtime.main:
            (output / "config.json").write_text(config.to_json())
    _steps(config, runtime, ds_engine, model, sampler, tokenizer, indexes, window, state, output)
    if not tested:
        return None
    model = checkpoint.load_model(folder)[0].to(runtime.device)
    untrained = build_model(config, streams, tokenizer).to(runtime.device)
    arrays: dict[str, np.ndarray] = {}
    report = Report()
    metrics = evaluate_model(
        model,
        indexes,
        tokenizer,
        config,
        untrained=untrained,
        runtime=runtime,
        arrays=arrays if config.save_features else None,
        report=report,
    )
    if metrics is not None:
        metrics["checkpoint"] = str(checkpoint.latest(folder))
        say(format_table(metrics, paper=is_real(config.data)))
        with writing(output):  # what matters most first: a disk may be full
            write_metrics(metrics, output / "metrics.json")
            report.write(output / "retrieval.html", metrics, output / "log.jsonl")
            if config.save_features:
                write_features(arrays, output / "features.npz")
    return metrics


def build_model(config: TrainConfig, streams: tuple[Stream, ...], tokenizer: Tokenizer) -> IRM:
    """The model with initial weights that follow from the seed alone."""
    seed_everything(config.seed)
    matching = [stream.name for stream in streams if stream.task.loss == "matching"]
    return IRM(config.model, tokenizer.get_vocab_size(), _heads(streams), matching)


def _steps(
    config: TrainConfig,
    runtime: Runtime,
    ds_engine: Any,
    model: IRM,
    sampler: Sampler,
    tokenizer: Tokenizer,
    indexes: list[Index],
    window: int,
    state: checkpoint.State,
    output: Path,
) -> None:
    """The loop: `config.steps` optimiser steps, logged, saved, stoppable."""

    def damaged(path: Path, reason: str, micro_step: int) -> None:
        quarantine(output / "quarantine.jsonl", {path: reason}, micro_step // window + 1)

    with runtime.together():
        log = Log(output, config, runtime, state.step)
    known = {path: why for index in indexes for path, why in index.reasons("train", "picture").items()}
    with runtime.together(), writing(output):
        if runtime.main:
            quarantine(output / "quarantine.jsonl", known, 0)
    loader = TrainLoader(
        sampler,
        config,
        tokenizer,
        runtime.device,
        rank=runtime.rank,
        start=state.step * window,
        damaged=known,
        quarantine=damaged,
    )
    termination = Termination()
    step, skipped, in_a_row = state.step, state.skipped, 0
    ds_engine.train()
    while step < config.steps:
        began, waited, images = time.monotonic(), 0.0, 0
        rate = learning_rate(step, config)
        sums: dict[str, list[float]] = {}
        names, norm = [], 0.0
        buffers = [buffer.clone() for buffer in model.buffers()]
        for _ in range(window):
            asked = time.monotonic()
            with runtime.together():
                batch, sample = loader.next()
                log.sample(step, sample)
            waited += time.monotonic() - asked
            images += len(batch.images) * runtime.world
            model.edit.chance.manual_seed(hash((config.seed, loader.micro_step)))  # drop path
            ds_engine.module.chance.manual_seed(hash((config.seed, loader.micro_step, 1)))  # wrong pairs
            loss, terms = ds_engine(batch)
            values = runtime.mean(torch.stack([loss.detach(), *terms.values()]).float()).tolist()
            for name, value in zip(("loss", *terms), values, strict=True):
                sums.setdefault(name, []).append(value)
            names.append(sample.stream.name)
            # an infinite loss may have finite gradients; NaN on any rank makes every rank skip the step
            ds_engine.backward(loss if math.isfinite(values[0]) else loss * math.nan)
            norm = _step(ds_engine, rate, config.clip)
        step += 1
        if not math.isfinite(norm):  # the statistics of a skipped step's batches go with it
            for buffer, before in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(before)
        skipped, in_a_row = (skipped, 0) if math.isfinite(norm) else (skipped + 1, in_a_row + 1)
        seconds = time.monotonic() - began
        row = {
            "step": step,
            "streams": names,
            "loss": sum(sums["loss"]) / window,
            "stream_loss": sums["loss"],
            "terms": {name: sum(v) / len(v) for name, v in sums.items() if name != "loss"},
            "lr": rate,
            "grad_norm": norm,
            "images_per_s": images / seconds,
            "data_wait_s": waited,
            "skipped": skipped,
        }
        with runtime.together():
            log.step(row)
        if in_a_row >= MOST_SKIPPED:
            raise InputError(
                f"loss or gradient not finite for {MOST_SKIPPED} steps in a row, at step {step}; "
                "lower --lr and --resume"
            )
        ending = runtime.any(termination.asked())
        if ending or step % config.checkpoint_every == 0 or step == config.steps:
            state = checkpoint.State(step, runtime.world, state.heads, state.streams, state.vocabulary, skipped)
            checkpoint.save(output / "checkpoints", ds_engine, model, config, state, tokenizer, runtime)
        if ending:
            log.close()
            if runtime.main:
                print(f"stopped by SIGTERM after step {step}; --resume goes on from there", flush=True)
            sys.exit(TERMINATED)
    log.close()
    termination.restore()


def _step(ds_engine: Any, rate: float, clip: float) -> float:
    """DeepSpeed's step, which changes weights at the end of a window. Returns the gradient's norm before clipping over
    all ranks, infinite or NaN where the gradient was not finite: then the weights and the optimiser are as before."""
    for group in ds_engine.optimizer.param_groups:
        group["lr"] = rate * group["multiplier"]
    ends = ds_engine.is_gradient_accumulation_boundary()
    if ds_engine.zero_optimization_stage() > 0:  # looks at the gradients itself
        ds_engine.step()
        if ends and ds_engine.zero_optimization_stage() == 3:
            # DeepSpeed 0.19 overwrites a gradient in the first micro-step only: what a later stream's head has from the
            # step before would be counted again, and a NaN would never leave
            ds_engine.optimizer.grad_partitions_flat_buffer.zero_()
        return float(ds_engine.get_global_grad_norm() or 0.0)
    norm = 0.0
    if ends:
        gradients = [p.grad for p in ds_engine.module.parameters() if p.grad is not None]
        total = torch.nn.utils.get_total_norm(gradients)
        norm = float(total)
        if not math.isfinite(norm):
            ds_engine.zero_grad()  # to None: the optimiser passes over such parameters
        elif clip:
            torch.nn.utils.clip_grads_with_norm_(ds_engine.module.parameters(), clip, total)
    ds_engine.step()
    return norm


def _claim(output: Path, config: TrainConfig, runtime: Runtime) -> None:
    """Make the output folder; a folder that already holds a run is refused unless --resume."""
    with runtime.together():  # every rank has looked before rank 0 writes
        used = os.path.exists(output / "log.jsonl") or os.path.exists(output / "checkpoints")
        if used and not config.resume:
            raise InputError(f"--output {output}: holds a run already; choose another folder or add --resume")
        if config.resume and checkpoint.latest(output / "checkpoints") is None:
            raise InputError(f"--resume: no checkpoint in {output}/checkpoints; leave --resume out to start a run")
    with runtime.together(), writing(f"--output {output}"):
        if runtime.main:
            output.mkdir(parents=True, exist_ok=True)
            (output / "quarantine.jsonl").touch()


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
    stage = (config.deepspeed or {}).get("zero_optimization", {}).get("stage", 0)
    settings = {
        "zero_optimization": {"stage": 0},
        "torch_autocast": {"enabled": runtime.device.type == "cuda", "dtype": "bfloat16"},
        **(config.deepspeed or {}),
        "train_micro_batch_size_per_gpu": max(P * K for P, K in sampler.batches) // runtime.world,
        "gradient_accumulation_steps": window,
        "gradient_clipping": config.clip if stage else 0.0,  # ZeRO 0: by _step, which needs the norm anyway
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 60,
    }
    try:
        deepspeed.DeepSpeedConfig(settings)
        return deepspeed.initialize(model=module, optimizer=optimizer, config=settings)[0]
    except Exception as error:  # of many kinds, assertions and bare ones among them
        what = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"--deepspeed_config: DeepSpeed refuses the settings ({what[:300]})") from error


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


def _silent(*_: Any) -> None:
    pass
