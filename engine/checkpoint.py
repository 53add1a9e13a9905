"""Checkpoints: written aside, renamed when whole, `latest` moved last. A kill at any moment leaves a loadable one.

    checkpoints/step-00000040/  model.safetensors  config.json  state.json  tokenizer.json  deepspeed/ (optimiser state)
    checkpoints/latest          name of the newest whole checkpoint
    checkpoints/.part-*         being written, or left by a kill: the next checkpoint removes it

`model.safetensors`, `config.json` and `tokenizer.json` are all that evaluation needs.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from engine.config import TrainConfig
from engine.errors import InputError, writing
from engine.model.irm import IRM
from engine.runtime import Runtime

FORMAT = 2  # of state.json; raise when an older engine could not read what save() writes


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

    @property
    def matching(self) -> list[str]:
        """The streams without an identity loss."""
        return [name for name in self.streams if name not in self.heads]


def save(
    folder: Path, ds_engine, model: IRM, config: TrainConfig, state: State, tokenizer: Tokenizer, runtime: Runtime
) -> None:
    """Write `folder`/step-N on all ranks together and make it the latest; keep the newest `config.keep`. InputError on
    every rank where one cannot write; the checkpoints that were there stay."""
    name = f"step-{state.step:08d}"
    part = folder / f".part-{name}"
    try:
        with runtime.together(), writing(folder):
            if runtime.main:
                _remove_parts(folder)
                (part / "deepspeed").mkdir(parents=True)
        with runtime.together():
            _save_optimizer(ds_engine, part, runtime)
        weights = _whole_weights(ds_engine, model)
        with runtime.together(), writing(part, SafetensorError, RuntimeError):
            if runtime.main:
                save_file(weights, part / "model.safetensors")
                (part / "config.json").write_text(config.to_json())
                (part / "state.json").write_text(json.dumps({"format": FORMAT, **state.__dict__}, indent=1))
                tokenizer.save(str(part / "tokenizer.json"))
                for file in part.rglob("*"):
                    _sync(file)
                _publish(folder, part, name, config.keep)
    except InputError:
        if runtime.main:
            _remove_parts(folder)
        raise


def _save_optimizer(ds_engine, part: Path, runtime: Runtime) -> None:
    """DeepSpeed's own files. It has written them all when it comes to its last barrier; a rank that fails before goes
    to that barrier too, because the others wait there."""
    with writing(part, RuntimeError):  # which is what torch.save makes of a full disk
        try:
            ds_engine.save_checkpoint(str(part), tag="deepspeed", save_latest=False)
        except (OSError, RuntimeError):
            if runtime.world > 1:
                dist.barrier()
            raise


def _publish(folder: Path, part: Path, name: str, keep: int) -> None:
    """Rename a whole checkpoint to `name`, point `latest` at it, then drop the oldest."""
    shutil.rmtree(folder / name, ignore_errors=True)
    os.rename(part, folder / name)
    pointer = folder / ".part-latest"
    pointer.write_text(name + "\n")
    _sync(pointer)
    os.replace(pointer, folder / "latest")
    _sync(folder)
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old)


def _remove_parts(folder: Path) -> None:
    for part in folder.glob(".part-*"):
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def _whole_weights(ds_engine, model: IRM) -> dict[str, torch.Tensor]:
    """All weights on the CPU. ZeRO 3 keeps them in parts, which all ranks together put together here."""
    if ds_engine.zero_optimization_stage() < 3:
        return {key: value.contiguous().cpu() for key, value in model.state_dict().items()}
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(list(model.parameters())):
        return {key: value.detach().clone().cpu() for key, value in model.state_dict().items()}


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run's `checkpoints` folder, or None. `latest` may point to one that is gone."""
    pointer = folder / "latest"
    named = folder / pointer.read_text(errors="replace").strip() if os.path.isfile(pointer) else folder
    if os.path.isfile(named / "state.json"):
        return named
    whole = [path.parent for path in sorted(folder.glob("step-*/state.json"))]
    return whole[-1] if whole else None


def find(path: Path) -> Path:
    """A checkpoint folder given as itself, as a run's output or as its `checkpoints`. InputError when there is none."""
    for folder in (path, path / "checkpoints"):
        if os.path.isfile(folder / "model.safetensors"):
            return folder
        newest = latest(folder) if os.path.isdir(folder) else None
        if newest is not None:
            return newest
    why = "no checkpoint there" if os.path.isdir(path) else "no such folder, or no right to look there"
    raise InputError(f"--checkpoint {path}: {why}; name a run's --output, or a folder with model.safetensors")


def load_model(path: Path) -> tuple[IRM, TrainConfig, State, Tokenizer]:
    """Open a checkpoint for evaluation, on the CPU. InputError when files are missing or do not fit together."""
    folder = find(path)
    config, state, tokenizer = read_facts(folder)
    if tokenizer.get_vocab_size() != state.vocabulary:
        raise InputError(
            f"{folder}/tokenizer.json: {tokenizer.get_vocab_size()} tokens, but the model has {state.vocabulary}; "
            "put back the file that belongs to this checkpoint"
        )
    try:
        model = IRM(config.model, state.vocabulary, state.heads, state.matching)
    except (RuntimeError, KeyError, ValueError) as error:  # sizes below 0 or beyond memory, names that are none
        what = " ".join(str(error).split())[:200]
        raise InputError(f"{folder}/state.json: no model has these heads ({what}); use another checkpoint") from error
    file = folder / "model.safetensors"
    try:
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: damaged or cut short ({error}); use another checkpoint") from error
    wanted = {name: value.shape for name, value in model.state_dict().items()}
    found = {name: value.shape for name, value in weights.items()}
    if found != wanted:
        name = min(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        has = f"shape {tuple(found[name])}" if name in found else "none"
        expected = f"shape {tuple(wanted[name])}" if name in wanted else "none"
        raise InputError(f"{file}: not the model of its config.json: {name}: expected {expected}, found {has}")
    model.load_state_dict(weights)
    return model.eval(), config, state, tokenizer


def read_facts(folder: Path) -> tuple[TrainConfig, State, Tokenizer]:
    """config.json, state.json and tokenizer.json of a checkpoint. InputError names the one that cannot be read."""

    def read(name: str, parse: Callable[[str], Any]) -> Any:
        try:
            return parse((folder / name).read_text())
        except Exception as error:  # tokenizers raises bare Exception
            what = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"{folder / name}: not of a checkpoint of this engine ({what})") from error

    return read("config.json", TrainConfig.from_json), read("state.json", _state), read("tokenizer.json", _tokenizer)


def _state(text: str) -> State:
    values = json.loads(text)
    written = values.pop("format", 0)
    if written > FORMAT:
        raise InputError(f"format {written}, this engine reads up to {FORMAT}; use a newer engine")
    state = State(**values)
    numbers = [state.step, state.world, state.vocabulary, state.skipped, *state.heads.values()]
    named = isinstance(state.streams, list) and all(isinstance(name, str) for name in state.streams)
    if not named or not all(isinstance(number, int) for number in numbers):
        raise InputError("a field has the wrong type")
    return state


def _tokenizer(text: str) -> Tokenizer:
    return Tokenizer.from_str(text)


def resume(folder: Path, ds_engine, state: State, config: TrainConfig, tokenizer: Tokenizer, runtime: Runtime) -> State:
    """Load the latest checkpoint into the engine. InputError when there is none or when it is of another run: what
    decides model and samples must be the same."""
    with runtime.together():
        checkpoint = latest(folder)
        if checkpoint is None:
            raise InputError(f"--resume: no checkpoint in {folder}; leave --resume out to start a run")
        old_config, stored, old_tokenizer = read_facts(checkpoint)
        options = ("model", "seed", "ids", "images_per_id", "window", "shares", "temperature", "leaders", "ahead")
        differ = [
            (what, getattr(old, what), getattr(new, what))
            for old, new, names in (
                (stored, state, ("world", "streams", "heads")),
                (old_config, config, options),
            )
            for what in names
            if getattr(old, what) != getattr(new, what)
        ]
        if differ:
            what, before, now = differ[0]
            if what == "model":
                what, before, now = next(
                    (field, getattr(before, field), getattr(now, field))
                    for field in before.__dataclass_fields__
                    if getattr(before, field) != getattr(now, field)
                )
            raise InputError(
                f"--resume: {checkpoint} has {what} {before}, this run has {now}; give the same options and ranks, or "
                "another --output"
            )
        if old_tokenizer.to_str() != tokenizer.to_str():
            raise InputError(f"--resume: {checkpoint} was trained with another vocabulary; is --data the same?")
    with runtime.together():
        try:
            loaded, _ = ds_engine.load_checkpoint(str(checkpoint), tag="deepspeed")
            if loaded is None:
                raise InputError("files are missing")
        except Exception as error:  # whatever a cut or foreign pickle makes torch and DeepSpeed raise
            what = " ".join(str(error).split())[:200]
            raise InputError(
                f"--resume: {checkpoint}/deepspeed cannot be loaded ({type(error).__name__}: {what}); "
                f"remove {checkpoint} to resume from the one before"
            ) from error
    return stored


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
