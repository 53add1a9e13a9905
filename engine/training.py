"""Training: streams in, DeepSpeed around one forward that returns the loss, checkpoints and metrics out.

One optimiser step accumulates over a window of micro-steps; each micro-step is one stream, the same on every rank.
"""

from __future__ import annotations

import math
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from engine import checkpoint, zero
from engine.average import Average
from engine.config import TrainConfig
from engine.data.index import Index, find_indexes
from engine.data.loader import TrainLoader
from engine.data.sampler import Sampler, Stream, make_streams
from engine.errors import InputError, writing
from engine.evaluation import evaluate_model, measurable, write_features
from engine.instructions import SENTENCES
from engine.log import Log, evaluated, is_evaluated, quarantine
from engine.losses import TrainingModel
from engine.model import pretrained
from engine.model.instruction import build_tokenizer
from engine.model.irm import IRM
from engine.report import Report
from engine.results import format_table, is_real, write_metrics
from engine.runtime import Runtime, Termination, company, seed_everything, start
from engine.schedule import learning_rate

TERMINATED = 143  # exit code after SIGTERM: saved, can be resumed
MOST_SKIPPED = 20  # non-finite steps in a row that end a run


@dataclass(frozen=True)
class Run:
    """What one training works with. window: micro-steps of a step; average: with --ema; tested: whether there is a test
    part."""

    config: TrainConfig
    runtime: Runtime
    output: Path
    indexes: list[Index]
    sampler: Sampler
    tokenizer: Tokenizer
    model: IRM
    average: Average | None
    ds_engine: Any
    window: int
    tested: bool

    @property
    def checkpoints(self) -> Path:
        return self.output / "checkpoints"

    def measures(self, step: int) -> bool:
        """Whether --eval-every has the model measured after this step, on the way."""
        every = self.config.eval_every
        return self.tested and every > 0 and 0 < step < self.config.steps and step % every == 0


def train(config: TrainConfig) -> dict[str, Any] | None:
    """Run one training to its end. Returns the content of metrics.json (None with evaluate=False, or on ranks > 0)."""
    runtime = start(config.device)
    output = Path(config.output)
    _claim(output, config, runtime)
    arrays: dict[str, np.ndarray] = {}
    report = Report()
    with company(lambda: _left(output / "checkpoints")):
        run, state = _prepare(config, runtime, output)
        _steps(run, state)
        if not run.tested:
            return None
        untrained = build_model(run.config, run.sampler.streams, run.tokenizer).to(runtime.device)
        kept = arrays if config.save_features else None
        metrics = _measure(run, config.steps, untrained=untrained, arrays=kept, report=report)
    if metrics is not None:
        print(format_table(metrics, paper=is_real(config.data)))
        with writing(output):  # what matters most first: a disk may be full
            write_metrics(metrics, output / "metrics.json")
            report.write(output / "retrieval.html", metrics, output / "log.jsonl")
            if config.save_features:
                write_features(arrays, output / "features.npz")
    return metrics


def _prepare(config: TrainConfig, runtime: Runtime, output: Path) -> tuple[Run, checkpoint.State]:
    """Data, model and optimiser, new or as the latest checkpoint has them."""
    say = print if runtime.main else _silent
    with runtime.together():
        begin = _start(config)
    config = begin.config
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
        tokenizer = begin.tokenizer or build_tokenizer(_corpus(indexes))
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
    begin.apply(model)
    model.freeze_unused([stream.task for stream in streams])
    for read in begin.reports:
        say(f"{read}; it stays as it is" if read.part in config.frozen else read)
    if not begin.reports and not config.resume and is_real(config.data):
        say("all weights begin at random; --backbone and --instruction-pretrained begin with given ones")
    del begin  # its weights
    trained, still = (sum(p.numel() for p in model.parameters() if p.requires_grad is does) for does in (True, False))
    say(
        f"{trained / 1e6:.1f} M parameters{f' and {still / 1e6:.1f} M that stay as they are' * (still > 0)}, "
        f"{len(streams)} streams ({', '.join(stream.name for stream in streams)}), {window} per step, "
        f"{runtime.world} rank(s) on {runtime.device.type}"
    )
    names, batches = [stream.name for stream in streams], [list(batch) for batch in sampler.batches]
    state = checkpoint.State(0, runtime.world, _heads(streams), names, tokenizer.get_vocab_size(), batches=batches)
    optimizer: dict[str, torch.Tensor] = {}
    averaged = None
    if config.resume:
        folder = output / "checkpoints"
        state, optimizer, averaged = checkpoint.resume(folder, model, state, config, tokenizer, runtime)
        say(f"resumed after step {state.step}" + f", then of {state.world} rank(s)" * (state.world != runtime.world))
    module = TrainingModel(model, config, names, [s.task.loss == "matching" for s in streams]).to(runtime.device)
    model.edit.checkpointing = config.checkpointing
    for block in model.edit.blocks if config.compile else ():
        block.compile()
    average = Average(model, config.ema) if config.ema else None
    if average and averaged:
        average.load(averaged)
    largest = max(P * K for P, K in sampler.batches) // runtime.world
    ds_engine = zero.initialize(module, config, largest, window, runtime)
    zero.load_optimizer_state(ds_engine, optimizer)
    with runtime.together(), writing(output):
        if runtime.main:
            (output / "config.json").write_text(config.to_json())
    run = Run(config, runtime, output, indexes, sampler, tokenizer, model, average, ds_engine, window, tested)
    return run, state


def _measure(run: Run, step: int, **options: Any) -> dict[str, Any] | None:
    """metrics.json of the checkpoint of this step, on rank 0. With --eval-every it is noted, and the best one kept."""
    model = checkpoint.load_model(run.checkpoints)[0].to(run.runtime.device)
    options = {"untrained": None, "runtime": run.runtime, **options}
    metrics = evaluate_model(model, run.indexes, run.tokenizer, run.config, **options)
    with run.runtime.together():
        if metrics is None:
            return None
        named = checkpoint.latest(run.checkpoints)
        assert named is not None
        metrics["checkpoint"] = str(named)
        if run.config.eval_every:
            evaluated(run.output, step, metrics)
            name, value = checkpoint.mark_best(run.checkpoints, named.name, metrics["mean_mAP"], run.config.keep)
            metrics["best"] = {"checkpoint": str(run.checkpoints / name), "mean_mAP": value}
    return metrics


def _left(folder: Path) -> str:
    newest = checkpoint.latest(folder)
    return f"--resume goes on from {newest}" if newest else "no checkpoint was made yet"


def _start(config: TrainConfig) -> pretrained.Start:
    if not config.resume:
        return pretrained.prepare(config)
    folder = checkpoint.latest(Path(config.output) / "checkpoints")
    assert folder is not None
    stored, _, tokenizer = checkpoint.read_facts(folder)
    return pretrained.resumed(config, stored, tokenizer)


def build_model(config: TrainConfig, streams: tuple[Stream, ...], tokenizer: Tokenizer) -> IRM:
    """The model with initial weights that follow from the seed alone."""
    seed_everything(config.seed)
    matching = [stream.name for stream in streams if stream.task.loss == "matching"]
    return IRM(config.model, tokenizer.get_vocab_size(), _heads(streams), matching)


def _steps(run: Run, state: checkpoint.State) -> None:
    """The loop: `config.steps` optimiser steps, logged, saved, measured, stoppable."""
    config, runtime, output, window = run.config, run.runtime, run.output, run.window
    ds_engine, model = run.ds_engine, run.model

    def damaged(path: Path, reason: str, micro_step: int) -> None:
        quarantine(output / "quarantine.jsonl", {path: reason}, micro_step // window + 1)

    with runtime.together():
        log = Log(output, config, runtime, state.step)
    known = {path: why for index in run.indexes for path, why in index.reasons("train", "picture").items()}
    with runtime.together(), writing(output):
        if runtime.main:
            quarantine(output / "quarantine.jsonl", known, 0)
    loader = TrainLoader(
        run.sampler,
        config,
        run.tokenizer,
        runtime.device,
        rank=runtime.rank,
        start=state.step * window,
        damaged=known,
        quarantine=damaged,
    )
    termination = Termination()
    step, skipped, in_a_row = state.step, state.skipped, state.in_a_row
    if run.measures(step) and runtime.any(runtime.main and not is_evaluated(output, step)):
        _measure(run, step)  # which a kill prevented
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
            norm = zero.step(ds_engine, rate, config.clip)
        step += 1
        if not math.isfinite(norm):  # the statistics of a skipped step's batches go with it
            for buffer, before in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(before)
        elif run.average:
            run.average.update(model, step)
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
        if ending or run.measures(step) or step % config.checkpoint_every == 0 or step == config.steps:
            state = replace(state, step=step, world=runtime.world, skipped=skipped, in_a_row=in_a_row)
            averaged = run.average.state() if run.average and runtime.main else None
            checkpoint.save(run.checkpoints, ds_engine, model, config, state, run.tokenizer, runtime, averaged)
        if run.measures(step) and not ending:
            _measure(run, step)
        if ending:
            log.close()
            if runtime.main:
                print(f"stopped by SIGTERM after step {step}; --resume goes on from there", flush=True)
            sys.exit(TERMINATED)
    log.close()
    termination.restore()


def _claim(output: Path, config: TrainConfig, runtime: Runtime) -> None:
    """Make the output folder; a folder that already holds a run is refused unless --resume."""
    with runtime.together():  # every rank has looked before rank 0 writes
        used = os.path.exists(output / "log.jsonl") or os.path.exists(output / "checkpoints")
        whole = checkpoint.latest(output / "checkpoints") is not None
        if used and not config.resume:
            more = " or add --resume" if whole else ": it was stopped before its first checkpoint"
            raise InputError(f"--output {output}: holds a run already; choose another folder{more}")
        if config.resume and not whole:
            mend = "choose another folder" if used else "leave --resume out to start a run"
            raise InputError(f"--resume: no checkpoint in {output}/checkpoints; {mend}")
    with runtime.together(), writing(f"--output {output}"):
        if runtime.main:
            output.mkdir(parents=True, exist_ok=True)
            (output / "quarantine.jsonl").touch()


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
