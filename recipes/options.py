"""Command-line options shared by the training recipes, and how every recipe ends on bad input."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.config import TrainConfig, model_config
from engine.errors import InputError, writing
from engine.tasks import TASKS

MINI = Path("data/mini-omnireid")
ALONE = 30  # seconds

# Training defaults that belong to a model size. irm_base: the paper's Sec. 5.1 and the authors' scripts. irm_tiny: what
# learns the drawn data from nothing in minutes on two CPU cores.
PRESETS: dict[str, dict[str, Any]] = {
    "irm_base": {"steps": 24000, "ids": 32, "lr": 1e-5, "lr_start": 1e-7, "warmup": 1000, "window": 0},
    "irm_tiny": {
        "steps": 1200,
        "ids": 32,
        "lr": 1.2e-3,
        "lr_start": 2e-5,
        "lr_new": 1.0,
        "warmup": 60,
        "window": 1,
        "centre": True,
        "feature": "fout",
        "leaders": ("trad",),  # features that tell people apart must be there before the harder tasks can use them
        "ahead": 25,
        "shares": {"vi": 12, "ctcc": 2, "t2i": 3, "li": 3},
        "checkpoint_every": 250,
    },
}


RawHelp = argparse.RawDescriptionHelpFormatter


class Parser(argparse.ArgumentParser):
    """An unknown or malformed option is bad input as any other: one line, exit code 2 (see `run`)."""

    def error(self, message: str) -> Any:
        raise InputError(f"{message} (--help lists the options)")


def training_parser(description: str) -> Parser:
    parser = Parser(description=description, formatter_class=RawHelp, allow_abbrev=False)
    add = parser.add_argument
    add("--data", metavar="DIR", help=f"folder with the data sets (default: drawn mini data, made once in {MINI})")
    add("--output", metavar="DIR", help="folder for everything the run writes (default: runs/RECIPE-TIME)")
    add(
        "--config",
        metavar="NAME|FILE",
        help="irm_tiny, irm_base or a JSON file (default: irm_tiny on the mini data, else irm_base)",
    )
    add(
        "--backbone",
        metavar="NAME",
        help="pre-trained ViT that the editing transformer begins with: deit, albef, hap, pass, or timm:NAME, a plain "
        "ViT of timm (default: none, from nothing)",
    )
    add(
        "--pretrained",
        metavar="FILE",
        help="weights of --backbone, safetensors or torch (default: for timm:NAME those that timm fetches)",
    )
    add(
        "--instruction-pretrained",
        metavar="FILE|DIR",
        help="what the instruction encoder begins with and stays: ALBEF.pth (both towers) or the folder of a BERT (the "
        "text tower; default: none, it begins from nothing and learns)",
    )
    add(
        "--vocabulary",
        metavar="FILE|DIR",
        help="vocab.txt or tokenizer.json; ALBEF.pth needs that of bert-base-uncased (default: of the BERT folder, "
        "else built from the captions)",
    )
    add("--train-instruction", action="store_true", help="let a pre-trained instruction encoder learn, too")
    add("--steps", type=int, metavar="N", help="optimiser steps (default: 1200 for irm_tiny, else 24000)")
    add("--seed", type=int, default=0, metavar="N", help="seed of weights, sampling and augmentation (default: 0)")
    add("--resume", action="store_true", help="go on from the latest checkpoint in --output")
    add("--ids", type=int, metavar="P", help="identities per batch over all ranks (default: 32)")
    add("--images-per-id", type=int, metavar="K", help="images of each identity (default: 4)")
    add(
        "--window",
        type=int,
        metavar="N",
        help="micro-steps (one stream each) per optimiser step; 0: a whole cycle, one per stream without --shares "
        "(default: 1 for irm_tiny, else 0)",
    )
    add(
        "--shares",
        type=_shares,
        metavar="TASK=N,..",
        help="how often a cycle trains each stream of a task, 1 where not named (default: vi=12,ctcc=2,t2i=3,li=3 for "
        "irm_tiny, else 1)",
    )
    add(
        "--temperature",
        type=float,
        metavar="T",
        help="train streams as often as images^(1/T) says instead of --shares: 1 in proportion to their images, a "
        "large T all alike; --window 0 still is one per stream (default: 0, off)",
    )
    add(
        "--ahead",
        type=int,
        metavar="N",
        help="micro-steps that each trad stream trains before the other tasks begin (default: 25 for irm_tiny, else 0)",
    )
    add(
        "--loss-weights",
        type=_weights,
        metavar="NAME=W,..",
        help="factors of the losses of tasks or of single streams (TASK/DATASET), 1 where not named (default: all 1)",
    )
    add("--no-editing", action="store_true", help="E_e without instruction, a plain ViT: the paper's 'w/o editing'")
    add("--no-fused", action="store_true", help="attention by the eager reference instead of the kernels")
    add("--image-size", type=_size, metavar="HxW", help="pixels (default: 128x64 for irm_tiny, else 256x128)")
    add("--lr", type=float, help="peak learning rate (default: 1.2e-3 for irm_tiny, else 1e-5)")
    add(
        "--lr-new",
        type=float,
        metavar="F",
        help="factor of the rate of layers that are never pre-trained: heads, "
        "gates, instruction projections, E_f (default: 1 for irm_tiny, else 10)",
    )
    add(
        "--layer-decay",
        type=float,
        metavar="F",
        help="factor of the rate for each layer of E_e further from its output (default: 1)",
    )
    add(
        "--warmup",
        type=int,
        metavar="N",
        help="steps of linear warm-up (default: 60 for irm_tiny, else 1000; at most a fifth of --steps)",
    )
    add(
        "--margin",
        type=float,
        help="margin of the adaptive triplet loss, in squared distance of features (default: 0.3)",
    )
    add(
        "--mining",
        choices=("all", "hard"),
        help="triplets: all of Eq. 5, or the hardest as the authors train (default: all)",
    )
    add("--plain-triplet", action="store_true", help="one margin for all triplets, whatever the instructions say")
    add(
        "--global-losses",
        action="store_true",
        help="triplet, contrastive and matching loss over the batches of all ranks together, not of each rank alone",
    )
    add(
        "--label-smoothing",
        type=float,
        metavar="SHARE",
        help="of the identity loss: what part of the target is spread over all identities, 0 to 1 (default: 0)",
    )
    add(
        "--deepspeed_config",
        metavar="FILE",
        help="DeepSpeed settings, JSON (default: ZeRO 0; recipes/deepspeed/ has others)",
    )
    add(
        "--ema",
        type=float,
        metavar="DECAY",
        help="evaluate weights averaged over the steps, such as 0.999 (default: 0, off)",
    )
    add(
        "--checkpointing",
        action="store_true",
        help="compute E_e's blocks again in the backward pass: less memory, one more forward pass of them",
    )
    add("--compile", action="store_true", help="E_e's blocks by torch.compile")
    add("--device", choices=("auto", "cpu", "cuda"), help="default: auto, a GPU where there is one")
    add("--workers", type=int, metavar="N", help="decoding threads per rank (default: 2)")
    add(
        "--checkpoint-every",
        type=int,
        metavar="N",
        help="steps between checkpoints (default: 250 for irm_tiny, else 1000)",
    )
    add("--keep", type=int, metavar="N", help="newest checkpoints kept, beside the best (default: 2)")
    add(
        "--eval-every",
        type=int,
        metavar="N",
        help="steps between evaluations while training, which note the best "
        "checkpoint and keep it (default: 0, only at the end)",
    )
    add(
        "--feature",
        choices=("cls", "fout", "concat"),
        help="what a test compares (default: fout for irm_tiny, else cls)",
    )
    add(
        "--quick",
        action="store_true",
        help="evaluate with one instruction sentence instead of 20 and the first drawn gallery",
    )
    add(
        "--check",
        action="store_true",
        help="exit 1 unless every stream's loss fell, every task beats chance, the untrained network, colours and "
        "pixels by a margin, and exchanged instructions cost what they must (a line for each)",
    )
    add(
        "--allow-missing",
        action="store_true",
        help="evaluate without damaged test images and say how many (default: they are an error that names one)",
    )
    add("--no-eval", action="store_true", help="train only")
    add("--save-features", action="store_true", help="write the test features to features.npz")
    add("--log-samples", action="store_true", help="write every rank's identities and images to samples.rankN.jsonl")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    return parser


def training_config(recipe: str, args: argparse.Namespace) -> TrainConfig:
    """Options over the model's preset over the defaults. InputError for what does not fit."""
    if args.check and args.no_eval:
        raise InputError("--check --no-eval: what is checked has to be evaluated; leave one of them out")
    name = args.config or ("irm_base" if args.data else "irm_tiny")
    changes: dict[str, Any] = {"image_size": args.image_size} if args.image_size else {}
    changes |= {part: False for part in ("fused", "editing") if getattr(args, f"no_{part}")}
    model = model_config(name, **changes)
    values: dict[str, Any] = dict(PRESETS.get(name, PRESETS["irm_base"]))
    given = ["steps", "ids", "images_per_id", "window", "lr", "warmup", "margin", "mining", "device", "workers"]
    given += ["checkpoint_every", "keep", "feature", "shares", "temperature", "ahead", "label_smoothing"]
    given += ["loss_weights", "lr_new", "layer_decay", "ema", "eval_every"]
    given += ["backbone", "pretrained", "instruction_pretrained", "vocabulary"]
    for key in given[-3:]:
        file = getattr(args, key)
        if file and not args.resume and not os.path.exists(file):  # a checkpoint holds what was in them
            raise InputError(f"--{key.replace('_', '-')} {file}: not there; name a file that is")
    values |= {key: getattr(args, key) for key in given if getattr(args, key) is not None}
    if args.temperature and args.shares is None:
        values["shares"] = {}  # not the preset's
    if args.warmup is None:
        values["warmup"] = min(values["warmup"], values["steps"] // 5)
    flags = ["resume", "quick", "save_features", "log_samples", "global_losses", "plain_triplet", "allow_missing"]
    flags += ["checkpointing", "compile"]
    for key in ("seed", "train_instruction", *flags):
        values[key] = getattr(args, key)
    values["baselines"] = args.check
    if args.deepspeed_config:
        values["deepspeed"] = _deepspeed_settings(args.deepspeed_config)
    if getattr(args, "tasks", None) is not None:
        values["tasks"] = tuple(args.tasks.split(","))
    if getattr(args, "dataset", None) is not None:
        values["datasets"] = tuple(args.dataset.split(","))
    return TrainConfig(
        model=model,
        data=str(args.data or MINI),
        output=str(args.output or default_output(recipe)),
        evaluate=not args.no_eval,
        **values,
    )


def train(recipe: str, args: argparse.Namespace) -> int:
    """Train as the options say and print the results table. Exit code: 0, or 1 when --check finds nothing learned."""
    config = training_config(recipe, args)
    mini_data(args.data)

    from engine.data.index import find_roots

    find_roots(Path(config.data), config.datasets)  # a mistake is said before the libraries are loaded, which take long

    from engine.results import print_check
    from engine.training import train as run_training

    metrics = run_training(config)
    if metrics:
        print(f"written to {config.output}")
        if args.check:
            return print_check(metrics, Path(config.output) / "log.jsonl")
    elif args.check and int(os.environ.get("RANK", 0)) == 0:
        print("check: FAIL  nothing was evaluated")
        return 1
    return 0


def add_tasks(parser: Parser) -> None:
    parser.add_argument(
        "--tasks", metavar="A,B", help=f"train and test only these tasks (default: all of {','.join(TASKS)})"
    )


def mini_data(data: str | None) -> None:
    """Draw the mini data set when no folder was given and it is not there yet (under a lock: every rank may ask)."""
    if data is None:
        from engine.data.mini import write_mini
        from engine.progress import Progress

        progress: list[Progress] = []

        def show(done: int, total: int) -> None:
            progress[:] = progress or [Progress("drawing the mini data set", total, unit="picture", every=5.0)]
            progress[0].update(done)

        with writing(MINI):
            write_mini(MINI, progress=show)


def run(main: Callable[[], int]) -> int:
    """Exit code of a recipe: 0, or 2 after one line that says what to mend.

    Rank 0 speaks for all and leaves; the launcher then ends the others, which wait for that. One that is still there
    after ALONE seconds has a trouble of its own.
    """
    try:
        return main()
    except InputError as error:
        if int(os.environ.get("RANK", 0)) > 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(ALONE)
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


# What the engine sets itself, or what would cast the whole model where autocast keeps the losses in float32.
OURS = ["train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"]
OURS += ["optimizer", "scheduler", "fp16", "bf16", "amp", "elasticity", "sparse_gradients"]


def _deepspeed_settings(file: str) -> dict[str, Any]:
    """A DeepSpeed configuration without the keys that the engine owns."""
    try:
        settings = json.loads(Path(file).read_text())
    except OSError as error:
        raise InputError(f"--deepspeed_config {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"--deepspeed_config {file}: not JSON ({error})") from error
    if not isinstance(settings, dict):
        raise InputError(f"--deepspeed_config {file}: expected a JSON object")
    owned = [key for key in OURS if key in settings]
    if owned:
        raise InputError(
            f"--deepspeed_config {file}: remove {', '.join(owned)}; the recipe's options set batch, optimiser and "
            "clipping, half precision by torch_autocast (see recipes/deepspeed/zero1_bf16.json)"
        )
    for key in ("zero_optimization", "torch_autocast"):
        if not isinstance(settings.get(key, {}), dict):
            raise InputError(f"--deepspeed_config {file}: {key}: expected a JSON object")
    if settings.get("torch_autocast", {}).get("dtype", "bfloat16") not in ("bfloat16", "bf16"):
        raise InputError(f"--deepspeed_config {file}: torch_autocast: dtype: expected bfloat16")
    if settings.get("zero_optimization", {}).get("stage", 0) not in range(4):
        raise InputError(f"--deepspeed_config {file}: zero_optimization: stage: expected 0, 1, 2 or 3")
    if not settings.get("zero_optimization", {}).get("compute_grad_norm", True):
        raise InputError(f"--deepspeed_config {file}: remove compute_grad_norm; a step is judged by that norm")
    return settings


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH in pixels, such as 256x128, got {text!r}")
    return int(found[1]), int(found[2])


def _shares(text: str) -> dict[str, int]:
    pairs = [pair.partition("=") for pair in text.split(",")]
    if any(task not in TASKS or not number.isdigit() for task, _, number in pairs):
        raise argparse.ArgumentTypeError(f"expected TASK=N,.. with tasks of {','.join(TASKS)}, got {text!r}")
    return {task: int(number) for task, _, number in pairs}


def _weights(text: str) -> dict[str, float]:
    try:
        return {name: float(number) for name, _, number in (pair.partition("=") for pair in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected NAME=W,.. with tasks or streams, got {text!r}") from None


def default_output(recipe: str) -> str:
    """runs/RECIPE-TIME, with the launcher's start time, so that all ranks of a run name the same folder."""
    started = time.time()
    if "LOCAL_RANK" in os.environ:  # ticks since boot, field 22 of the launcher's stat
        ticks = int(Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19])
        boot = re.search(r"btime (\d+)", Path("/proc/stat").read_text())
        started = int(boot[1] if boot else 0) + ticks / os.sysconf("SC_CLK_TCK")
    return f"runs/{recipe}-{time.strftime('%Y%m%d-%H%M%S', time.localtime(started))}"
