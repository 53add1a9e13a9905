"""Checkpoints: written aside, read back, renamed when whole, `latest` moved last. A kill at any moment leaves a
loadable one.

    checkpoints/step-00000040/  model.safetensors  config.json  state.json  tokenizer.json
                                optimizer.safetensors (by parameter name: any ZeRO stage, any number of ranks)
                                average.safetensors (with --ema: the averaged weights, which evaluation takes)
                                SHA256SUMS (sha256sum -c SHA256SUMS)
    checkpoints/latest          name of the newest whole checkpoint
    checkpoints/best.json       with --eval-every: the checkpoint of the highest mean mAP so far, which is kept
    checkpoints/.part-*         being written, or left by a kill: the next checkpoint removes it

`model.safetensors` (or `average.safetensors`), `config.json`, `state.json` and `tokenizer.json` are all that evaluation
needs.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from engine import zero
from engine.config import TrainConfig
from engine.errors import InputError, writing
from engine.model.irm import IRM
from engine.runtime import Runtime

FORMAT = 3  # of state.json; raise when an older engine could not read what save() writes
SUMS = "SHA256SUMS"
AVERAGE = "average.safetensors"


@dataclass(frozen=True)
class State:
    """What a resumed run must know. step: optimiser steps done; heads: stream -> identities, in stream order;
    streams: names of all streams, in order; skipped: steps that were not finite, in_a_row: up to this one; batches:
    identities and images of each of a stream's batches, all ranks."""

    step: int
    world: int
    heads: dict[str, int]
    streams: list[str]
    vocabulary: int
    skipped: int = 0
    in_a_row: int = 0
    batches: list[list[int]] | None = None

    @property
    def matching(self) -> list[str]:
        """The streams without an identity loss."""
        return [name for name in self.streams if name not in self.heads]


def save(
    folder: Path,
    ds_engine: Any,
    model: IRM,
    config: TrainConfig,
    state: State,
    tokenizer: Tokenizer,
    runtime: Runtime,
    average: dict[str, Tensor] | None = None,
) -> Path:
    """Write `folder`/step-N on all ranks together, make it the latest and return it; keep the newest `config.keep` and
    the best. InputError on every rank where it cannot be written, or the disk gives back something else; the
    checkpoints that were there stay."""
    name = f"step-{state.step:08d}"
    part = folder / f".part-{name}"
    tensors = {
        "model.safetensors": zero.weights(ds_engine, model, keep=runtime.main),
        "optimizer.safetensors": zero.optimizer_state(ds_engine, keep=runtime.main),
        **({AVERAGE: average} if average is not None else {}),
    }
    texts = {
        "config.json": config.to_json(),
        "state.json": json.dumps({"format": FORMAT, **asdict(state)}, indent=1),
        "tokenizer.json": tokenizer.to_str(pretty=True),
    }
    try:
        with runtime.together(), writing(folder, SafetensorError, RuntimeError):
            if runtime.main:
                _remove_parts(folder)
                part.mkdir(parents=True)
                write_files(part, tensors, texts)
                _publish(folder, part, name, config.keep)
    except InputError:
        if runtime.main:
            _remove_parts(folder)
        raise
    return folder / name


def write_files(folder: Path, tensors: dict[str, dict[str, Tensor]], texts: dict[str, str]) -> None:
    """Files of tensors (safetensors) and of text, and their sums. InputError where the disk gives back something else;
    OSError or SafetensorError where it takes nothing."""
    sums = []
    for name in (*tensors, *texts):
        if name in tensors:
            save_file(tensors[name], folder / name)
        else:
            (folder / name).write_text(texts[name])
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # what is compared comes from the disk
        if name in tensors:
            same = _same(load_file(folder / name), tensors[name])
        else:
            same = (folder / name).read_text() == texts[name]
        if not same:
            raise InputError(f"{folder / name}: does not hold what was written; check the disk")
        sums.append(f"{_digest(folder / name)}  {name}\n")
    (folder / SUMS).write_text("".join(sums))
    _sync(folder / SUMS)
    _sync(folder)


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bit for bit, NaN included."""

    def bits(value: Tensor) -> Tensor:
        return value.contiguous().flatten().view(torch.uint8)

    return one.keys() == other.keys() and all(torch.equal(bits(one[key]), bits(other[key])) for key in one)


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def verify(folder: Path, *names: str) -> None:
    """InputError for a file of a checkpoint that is not what was written; all files, or these. A folder without sums
    (of an older engine) passes."""
    try:
        lines = (folder / SUMS).read_text().splitlines()
    except FileNotFoundError:
        return
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{folder / SUMS}: cannot be read ({error}); use another checkpoint") from error
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    for name in names or sums.keys() | {file.name for file in folder.iterdir() if file.is_file()} - {SUMS}:
        try:
            right = sums.get(name) == _digest(folder / name)
        except OSError as error:
            raise InputError(f"{folder / name}: {error.strerror}; use another checkpoint") from error
        if not right:
            raise InputError(f"{folder / name}: damaged or cut short (its sum is not that of {SUMS}); use another one")


def _publish(folder: Path, part: Path, name: str, keep: int) -> None:
    """Rename a whole checkpoint to `name`, point `latest` at it, then drop the oldest, and those of later steps, which
    are of a run that went on from another checkpoint."""
    shutil.rmtree(folder / name, ignore_errors=True)
    os.rename(part, folder / name)
    _replace(folder / "latest", name + "\n")
    for later in folder.glob("step-*"):
        if later.name > name:
            shutil.rmtree(later)
    _drop(folder, keep)


def _drop(folder: Path, keep: int) -> None:
    """All but the newest `keep` checkpoints and the best."""
    kept = best(folder)
    for old in sorted(folder.glob("step-*"))[:-keep]:
        if kept is None or old.name != kept[0]:
            shutil.rmtree(old)


def _replace(file: Path, text: str) -> None:
    """A small file, whole or as it was, on the disk."""
    part = file.with_name(f".part-{file.name}")
    part.write_text(text)
    _sync(part)
    os.replace(part, file)
    _sync(file.parent)


def best(folder: Path) -> tuple[str, float] | None:
    """Name and mean mAP of the best checkpoint that was evaluated, or None."""
    try:
        values = json.loads((folder / "best.json").read_text())
        found = str(values["checkpoint"]), float(values["mean_mAP"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if (folder / found[0] / "state.json").is_file() else None


def mark_best(folder: Path, name: str, mean_map: float, keep: int) -> tuple[str, float]:
    """Make this checkpoint the best, which is not dropped, unless another has a higher mAP; the best and its mAP. The
    former best goes, unless it is one of the newest `keep`."""
    known = best(folder)
    if known is not None and known[0] != name and known[1] >= mean_map:
        return known
    with writing(folder):
        _replace(folder / "best.json", json.dumps({"checkpoint": name, "mean_mAP": mean_map}) + "\n")
        _drop(folder, keep)
    return name, mean_map


def _remove_parts(folder: Path) -> None:
    for part in folder.glob(".part-*"):
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


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
    file = folder / (AVERAGE if (folder / AVERAGE).is_file() else "model.safetensors")
    verify(folder, file.name)
    _load_weights(file, model)
    return model.eval(), config, state, tokenizer


def _load_weights(file: Path, model: IRM) -> None:
    """InputError where the file is damaged or of another model."""
    weights = _tensors(file)
    wanted = {name: value.shape for name, value in model.state_dict().items()}
    found = {name: value.shape for name, value in weights.items()}
    if found != wanted:
        name = min(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        has = f"shape {tuple(found[name])}" if name in found else "none"
        expected = f"shape {tuple(wanted[name])}" if name in wanted else "none"
        raise InputError(f"{file}: not the model of its config.json: {name}: expected {expected}, found {has}")
    model.load_state_dict(weights)


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: damaged or cut short ({error}); use another checkpoint") from error


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
    numbers = [state.step, state.world, state.vocabulary, state.skipped, state.in_a_row, *state.heads.values()]
    numbers += [number for batch in state.batches or [] for number in batch]
    named = isinstance(state.streams, list) and all(isinstance(name, str) for name in state.streams)
    if not named or not all(isinstance(number, int) for number in numbers):
        raise InputError("a field has the wrong type")
    return state


def _tokenizer(text: str) -> Tokenizer:
    return Tokenizer.from_str(text)


def resume(
    folder: Path, model: IRM, state: State, config: TrainConfig, tokenizer: Tokenizer, runtime: Runtime
) -> tuple[State, dict[str, Tensor], dict[str, Tensor] | None]:
    """Load the latest checkpoint's weights into the model; its state, that of the optimiser and the averaged weights
    (None: without --ema, now or then; an average begins anew).
    InputError when there is none or when it is of another run: what decides model and samples must be the same. The
    number of ranks may be another, as long as the batches of all ranks together are the same."""
    with runtime.together():
        checkpoint = latest(folder)
        if checkpoint is None:
            raise InputError(f"--resume: no checkpoint in {folder}; start anew in another --output")
        old_config, stored, old_tokenizer = read_facts(checkpoint)
        options = ["model", "seed", "ids", "images_per_id", "window", "shares", "temperature", "leaders", "ahead"]
        options += ["train_instruction"]
        differ = [
            (what, getattr(old, what), getattr(new, what))
            for old, new, names in (
                (stored, state, ["streams", "heads", "batches"]),
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
            if what == "batches" and before is None:
                raise InputError(f"--resume: {checkpoint} was made by an older engine; start anew in another --output")
            raise InputError(
                f"--resume: {checkpoint} has {what} {before}, this run has {now}; give the same options, ranks that "
                "divide the batches alike, or another --output"
            )
        if old_tokenizer.to_str() != tokenizer.to_str():
            raise InputError(f"--resume: {checkpoint} was trained with another vocabulary; is --data the same?")
        try:
            if runtime.main:
                verify(checkpoint)
            _load_weights(checkpoint / "model.safetensors", model)
            optimizer = _tensors(checkpoint / "optimizer.safetensors")
            averaged = _tensors(checkpoint / AVERAGE) if config.ema and (checkpoint / AVERAGE).exists() else None
        except InputError as error:
            raise InputError(f"--resume: {error}; remove {checkpoint} to resume from the one before") from error
    return stored, optimizer, averaged


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
