"""Checkpoints: written aside, renamed when whole, `latest` moved last. A kill at any moment leaves a loadable one.

    checkpoints/step-00000040/   model.safetensors  config.json  state.json  tokenizer.json  deepspeed/ (optimiser
    state) checkpoints/latest           name of the newest whole checkpoint

`model.safetensors`, `config.json` and `tokenizer.json` are all that evaluation needs.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from engine.config import TrainConfig
from engine.errors import InputError
from engine.model.irm import IRM
from engine.runtime import Runtime


@dataclass(frozen=True)
class State:
    """What a resumed run must know. step: optimiser steps done; heads: stream -> identities, in stream order;
    streams: names of all streams, in order."""

    step: int
    world: int
    heads: dict[str, int]
    streams: list[str]
    vocabulary: int
    skipped: int = 0


def save(
    folder: Path, ds_engine, model: IRM, config: TrainConfig, state: State, tokenizer: Tokenizer, runtime: Runtime
):
    """Write `folder`/step-N on all ranks together and make it the latest; keep the newest `config.keep`."""
    name = f"step-{state.step:08d}"
    part = folder / f".part-{name}"
    if runtime.main:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    runtime.barrier()
    ds_engine.save_checkpoint(str(part), tag="deepspeed", save_latest=False)
    weights = _whole_weights(ds_engine, model)
    if runtime.main:
        save_file(weights, part / "model.safetensors")
        (part / "config.json").write_text(config.to_json())
        (part / "state.json").write_text(json.dumps(state.__dict__, indent=1))
        tokenizer.save(str(part / "tokenizer.json"))
    runtime.barrier()
    if runtime.main:
        for file in part.rglob("*"):
            _sync(file)
        final = folder / name
        shutil.rmtree(final, ignore_errors=True)
        os.rename(part, final)
        pointer = folder / ".part-latest"
        pointer.write_text(name + "\n")
        _sync(pointer)
        os.replace(pointer, folder / "latest")
        _sync(folder)
        for old in sorted(folder.glob("step-*"))[: -config.keep]:
            shutil.rmtree(old)
    runtime.barrier()


def _whole_weights(ds_engine, model: IRM) -> dict[str, torch.Tensor]:
    """All weights on the CPU. ZeRO 3 keeps them in parts, which all ranks together put together here."""
    if ds_engine.zero_optimization_stage() < 3:
        return {key: value.contiguous().cpu() for key, value in model.state_dict().items()}
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(list(model.parameters())):
        return {key: value.detach().clone().cpu() for key, value in model.state_dict().items()}


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run's `checkpoints` folder, or None."""
    pointer = folder / "latest"
    if pointer.is_file() and (folder / pointer.read_text().strip() / "state.json").is_file():
        return folder / pointer.read_text().strip()
    whole = [path.parent for path in sorted(folder.glob("step-*/state.json"))]
    return whole[-1] if whole else None


def find(path: Path) -> Path:
    """A checkpoint folder given as itself, as a run's output or as its `checkpoints`. InputError when there is none."""
    for folder in (path, path / "checkpoints"):
        if (folder / "model.safetensors").is_file():
            return folder
        newest = latest(folder) if folder.is_dir() else None
        if newest is not None:
            return newest
    raise InputError(f"--checkpoint {path}: no checkpoint there (expected a folder with model.safetensors)")


def load_model(path: Path) -> tuple[IRM, TrainConfig, State, Tokenizer]:
    """Open a checkpoint for evaluation, on the CPU. InputError when files are missing or do not fit together."""
    folder = find(path)
    config, state, tokenizer = read_facts(folder)
    model = IRM(config.model, state.vocabulary, state.heads)
    try:
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except (RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder}/model.safetensors: {str(error).splitlines()[0]}") from error
    return model.eval(), config, state, tokenizer


def read_facts(folder: Path) -> tuple[TrainConfig, State, Tokenizer]:
    """config.json, state.json and tokenizer.json of a checkpoint."""
    try:
        config = TrainConfig.from_json((folder / "config.json").read_text())
        state = State(**json.loads((folder / "state.json").read_text()))
        return config, state, Tokenizer.from_file(str(folder / "tokenizer.json"))
    except InputError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise InputError(f"{folder}: not a checkpoint of this engine ({error})") from error


def resume(folder: Path, ds_engine, state: State, config: TrainConfig, tokenizer: Tokenizer) -> State:
    """Load the latest checkpoint into the engine. InputError when there is none or when it is of another run: what
    decides model and samples must be the same."""
    checkpoint = latest(folder)
    if checkpoint is None:
        raise InputError(f"--resume: no checkpoint in {folder}; leave --resume out to start a run")
    old_config, stored, old_tokenizer = read_facts(checkpoint)
    if old_tokenizer.to_str() != tokenizer.to_str():
        raise InputError(f"--resume: {checkpoint} was trained with another vocabulary; is --data the same?")
    differ = [
        (what, getattr(old, what), getattr(new, what))
        for old, new, names in (
            (stored, state, ("world", "streams", "heads")),
            (old_config, config, ("model", "seed", "ids", "images_per_id", "window")),
        )
        for what in names
        if getattr(old, what) != getattr(new, what)
    ]
    if differ:
        what, before, now = differ[0]
        raise InputError(f"--resume: {checkpoint} has {what} {before}, this run has {now}")
    ds_engine.load_checkpoint(str(checkpoint), tag="deepspeed")
    return stored


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
