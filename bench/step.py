"""One training step as a user pays for it: the engine beside plain PyTorch and beside the released code's way.

    python bench/step.py                                  irm_base at 256x128, 8 images a rank, 1 and 2 ranks
    python bench/step.py --quick                          irm_tiny and few rounds
    python bench/step.py --batch 32 128 256 512 --json bench/results/step-h100.json --plot step.png

`ours` is what the recipes run: fused kernels, DeepSpeed's ZeRO 0. `no fused`: the same with attention by its eager
reference (--no-fused). `ZeRO 1`, `2`, `3`: other stages. `DDP`: torch's DistributedDataParallel in place of DeepSpeed,
which reduces in every micro-step. `released`: the same model in plain form, as the authors' code computes it: both
attention maps side by side in one product with [V, V'], triplets mined and summed by a Python loop over the anchors,
one blocking all-reduce for each gradient, and a second one for what streams share. All begin with the same weights,
read the same pictures with as many threads and step the same AdamW with the same clipping, at rate 0, so the weights
stay. Before anything is timed, loss and gradient norm of the first batch must agree with ours (for `released`: with
ours that mines as it does), and the loop with kernels.adaptive_triplet_reference; otherwise exit code 2 and no figures.
With one rank ZeRO and DDP have nothing to share: by default they run with more.

data            waiting for the next batch of drawn pictures (128x64 or so) from the engine's loader, which reads ahead
forward         the batch to the loss
backward        the loss to gradients; with DeepSpeed and DDP also what they do to reduce them, beside the collectives
optimiser       norm, clipping, AdamW; ZeRO 1 to 3: also putting weights together, beside the collectives
communication   what collectives take of the other parts, in which it is not counted: how long the call, or waiting for
                its end, blocks the process (on a GPU: its stream), and so also how long the other ranks are waited for.
                DDP's overlaps with the backward: what is left of it after the last bucket was handed over
Logging, averages of the loss over ranks and checkpoints are no part of it. On a GPU parts are taken by events on the
stream, so nothing waits between them, and a step ends when the GPU is done. Variants that differ in code only take
turns step by step in one process, on one model; the others, too large to stand beside each other, build their own
engine in a process of their own, each in turn, `--visits` times.

images/s     of all ranks
peak MiB     the most one rank holds during a step; on a CPU beyond what the process held before model and data came
of matmul    FLOP/s relative to a bare matrix product (1024 rows and columns, on a GPU 8192 in bfloat16) in the same
             process; FLOPs: products and convolutions of forward and backward with eager attention, counted from
             their shapes by torch.utils.flop_counter. mfu, on a GPU: relative to the card's published rate
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # run as a script: the checkout's root is where imports start
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import kernels
from bench import measure, triplet
from bench.compiled import ARCHS
from engine.config import MODELS, TrainConfig
from engine.data.mini import write_mini
from engine.data.record import Batch
from engine.errors import InputError
from engine.instructions import SENTENCES
from engine.losses import TrainingModel
from engine.model.editing import Attention
from engine.model.instruction import build_tokenizer, tokenize
from engine.model.irm import IRM
from engine.runtime import Runtime, pick_device, seed_everything, start
from engine.schedule import parameter_groups
from engine.tasks import TASKS

OURS, NO_FUSED, RELEASED, DDP = "ours", "no fused", "released", "DDP"
# Variants of one visit share a process, a model and an optimiser.
VISITS = ((OURS, NO_FUSED, RELEASED), ("ZeRO 1",), ("ZeRO 2",), ("ZeRO 3",), (DDP,))
VARIANTS = [name for visit in VISITS for name in visit]
PARTS = ("data", "forward", "backward", "optimiser", "communication")
COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter", "reduce_scatter_tensor")
COLLECTIVES += ("reduce", "broadcast", "barrier", "all_reduce_coalesced")
PER_IDENTITY = triplet.PER_IDENTITY
RATE = 0.0  # AdamW works as much as with any, and all batch sizes and variants meet the same weights
# Relative differences of loss and gradient norm: float32 sums in another order; bfloat16 maps kept or not.
NEAR = {"cpu": (1e-4, 1e-3), "cuda": (2e-2, 1e-1)}


class Job(NamedTuple):
    """What the ranks of one visit are told. data: folder of the drawn pictures; out: where rank 0 leaves its result."""

    names: list[str]
    ranks: int
    port: int
    config: TrainConfig
    batches: list[int]
    steps: int
    data: Path
    out: Path


def concatenated(
    qkv: Tensor, kv_ins: Tensor | None = None, gate: Tensor | None = None, *, ins_lengths: Tensor | None = None
) -> Tensor:
    """[S, g S'] [V, V'] with both softmaxes in memory; arguments of `kernels.gated_attention_packed`."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    scale = q.shape[-1] ** -0.5
    maps = torch.softmax(q @ k.mT * scale, -1)
    if kv_ins is not None and gate is not None:
        k_ins, v_ins = kv_ins.permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k_ins.mT * scale
        if ins_lengths is not None:
            valid = torch.arange(k_ins.shape[2], device=q.device) < ins_lengths[:, None]
            scores = scores.masked_fill(~valid[:, None, None], -torch.inf)
        second = gate.to(q.dtype).view(-1, 1, 1) * torch.softmax(scores, -1)
        maps, v = torch.cat([maps, second.to(maps.dtype)], -1), torch.cat([v, v_ins], 2)
    return (maps.to(v.dtype) @ v).transpose(1, 2)


ATTENTION = {NO_FUSED: kernels.gated_attention_packed_reference, RELEASED: concatenated}


def attend_by(model: nn.Module, name: str) -> None:
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = ATTENTION.get(name, kernels.gated_attention_packed)


class Released(nn.Module):
    """Eq. 7 on a model with the triplets of `triplet.loop`: batch -> (loss, nothing), in place of TrainingModel."""

    def __init__(self, model: IRM, stream: str):
        super().__init__()
        self.model, self.stream = model, stream

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        features, head = self.model(batch), self.model.head(self.stream)
        assert head is not None
        told = features.instruction.cls.detach().expand(len(batch.images), -1)
        least = torch.promote_types(features.cls.dtype, torch.float32)
        terms = []
        with torch.autocast(batch.images.device.type, enabled=False):
            for name, value in (("cls", features.cls.to(least)), ("fout", features.fout.to(least))):
                terms.append(triplet.loop(triplet.Case(F.normalize(value, dim=-1), batch.labels, told.to(least))))
                terms.append(F.cross_entropy(head.classify[name](head.neck[name](value)), batch.labels))
        return torch.stack(terms).sum(), {}


def reduce_one_by_one(module: nn.Module) -> None:
    """Gradients averaged over ranks, tensor by tensor: over the ranks of the stream's task, and what streams share once
    more over all, which are the same ranks here."""
    world = dist.get_world_size()
    named = [(name, p.grad) for name, p in module.named_parameters() if p.grad is not None]
    for part in (named, [(name, grad) for name, grad in named if ".heads." not in name]):
        for _, grad in part:
            dist.all_reduce(grad)
            grad /= world


class Watch:
    """Seconds of the parts of a step: `with watch("forward")`. What collectives inside take is taken out of it."""

    def __init__(self, device: torch.device):
        self.device, self.part = device, ""
        self.spans: list[tuple[str, Any, Any]] = []
        self.inside: list[tuple[str, Any, Any]] = []  # collectives, by the part that they interrupt
        self.busy = False

    def now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        self.part, began = part, self.now()
        yield
        self.spans.append((part, began, self.now()))
        self.part = ""

    @contextmanager
    def collective(self) -> Iterator[None]:
        if self.busy or not self.part:  # inside of another one, or of no step
            yield
            return
        self.busy, began = True, self.now()
        try:
            yield
        finally:
            self.inside.append((self.part, began, self.now()))
            self.busy = False

    def read(self) -> dict[str, float]:
        """Seconds of each part since the last call."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = dict.fromkeys(PARTS, 0.0)
        for part, began, ended in self.spans:
            seconds[part] += _between(began, ended)
        for part, began, ended in self.inside:
            took = _between(began, ended)
            seconds[part] -= took
            seconds["communication"] += took
        self.spans, self.inside = [], []
        return seconds


def _between(began: Any, ended: Any) -> float:
    return ended - began if isinstance(began, float) else began.elapsed_time(ended) / 1e3


class _Handle:
    """A collective under way, whose `wait` is watched."""

    def __init__(self, work: Any, watch: Watch):
        self._work, self._watch = work, watch

    def wait(self, *arguments: Any) -> Any:
        with self._watch.collective():
            return self._work.wait(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def watch_collectives(watch: Watch) -> None:
    """torch.distributed's functions, before DeepSpeed takes hold of them; for the rest of the process."""

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            with watch.collective():
                work = function(*arguments, **options)
            return work if work is None else _Handle(work, watch)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, watched(getattr(dist, name)))


class Variant(NamedTuple):
    """forward: batch -> loss; backward: of the loss; update: gradient norm, after each micro-step."""

    forward: Callable[[Batch], tuple[Tensor, Any]]
    backward: Callable[[Tensor], Any]
    update: Callable[[], float]
    begin: Callable[[], None] = lambda: None  # before each of its steps: the model's attention and losses


def plain(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    device: torch.device,
    *,
    reduce: Callable[[nn.Module], None] | None = None,
    backward: Callable[[Tensor], Any] = Tensor.backward,
) -> Variant:
    """A training loop in plain torch."""
    passed = 0

    def forward(batch: Batch) -> tuple[Tensor, Any]:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return module(batch)

    def update() -> float:
        nonlocal passed
        passed += 1
        if passed % config.window:
            return 0.0
        if reduce:
            reduce(module)
        for group in optimizer.param_groups:
            group["lr"] = RATE * group["multiplier"]
        norm = nn.utils.clip_grad_norm_(module.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad()
        return float(norm)

    return Variant(forward, lambda loss: backward(loss / config.window), update)


def with_ddp(module: TrainingModel, config: TrainConfig, device: torch.device, watch: Watch) -> Variant:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.nn.parallel import DistributedDataParallel

    optimizer = torch.optim.AdamW(parameter_groups(module, config))
    wrapped = DistributedDataParallel(module, find_unused_parameters=True)
    handed: Any = None

    def hook(group, bucket):  # torch compares annotations with classes, and here they are strings
        nonlocal handed
        future = allreduce_hook(group, bucket)
        handed = watch.now()
        return future

    def backward(loss: Tensor) -> None:
        loss.backward()
        if watch.part:
            watch.inside.append((watch.part, handed, watch.now()))

    wrapped.register_comm_hook(None, hook)
    return plain(wrapped, optimizer, config, device, backward=backward)


def with_deepspeed(module: TrainingModel, config: TrainConfig, stage: int, batch: int, runtime: Runtime) -> Any:
    from engine import zero

    settings = {"zero_optimization": {"stage": stage}}
    ds_engine = zero.initialize(module, config.but(deepspeed=settings), batch, config.window, runtime)
    ds_engine.train()
    return Variant(ds_engine, ds_engine.backward, lambda: zero.step(ds_engine, RATE, config.clip)), ds_engine


def variants_of(
    names: list[str], module: TrainingModel, config: TrainConfig, batch: int, runtime: Runtime, watch: Watch
) -> dict[str, Variant]:
    """The variants of one visit, and with `released` "ours, hard" beside it, which is only compared."""
    module.train()
    first, device = names[0], runtime.device
    if first == DDP:
        return {DDP: with_ddp(module, config, device, watch)}
    if first != OURS:
        return {first: with_deepspeed(module, config, int(first[-1]), batch, runtime)[0]}
    if _missing("deepspeed"):
        if runtime.world > 1:
            raise ImportError("without DeepSpeed it runs on one rank")
        optimizer = torch.optim.AdamW(parameter_groups(module, config))
        variant = plain(module, optimizer, config, device)
    else:
        variant, ds_engine = with_deepspeed(module, config, 0, batch, runtime)
        optimizer = ds_engine.optimizer

    def begin(name: str, mining: str = "all") -> Callable[[], None]:
        def prepare() -> None:
            attend_by(module.model, name)
            module.config = replace(config, mining=mining)

        return prepare

    released = Released(module.model, module.streams[0])
    reduce = reduce_one_by_one if runtime.world > 1 else None
    found = {
        OURS: variant._replace(begin=begin(OURS)),
        NO_FUSED: variant._replace(begin=begin(NO_FUSED)),
        "ours, hard": variant._replace(begin=begin(OURS, "hard")),
        RELEASED: plain(released, optimizer, config, device, reduce=reduce)._replace(begin=begin(RELEASED)),
    }
    return {name: v for name, v in found.items() if name in names or (RELEASED in names and name == "ours, hard")}


def _missing(package: str) -> str:
    """Why it cannot be imported, or nothing."""
    try:
        __import__(package)
    except ImportError as error:
        return str(error)
    return ""


class Synthetic:
    """One batch of noise, again and again, where the engine's loader cannot run."""

    def __init__(self, config: TrainConfig, batch: int, tokenizer: Any, device: torch.device):
        sentence = SENTENCES[config.tasks[0]][0]
        text, lengths = tokenize(tokenizer, [sentence], config.model.text_tokens)
        images = torch.randn(batch, 3, *config.model.image_size, generator=torch.Generator().manual_seed(0))
        labels = torch.arange(batch // PER_IDENTITY).repeat_interleave(PER_IDENTITY)
        self.batch = Batch(0, images.to(device), labels.to(device), text.to(device), lengths.to(device), None)

    def next(self) -> tuple[Batch, None]:
        return self.batch, None


class Data(NamedTuple):
    """loader: images of a rank -> its batches; what: in words."""

    loader: Callable[[int], Any]
    stream: str
    identities: int
    tokenizer: Any
    what: str


def data_of(job: Job, runtime: Runtime) -> Data:
    """Drawn pictures, or noise where a package that the engine's loader needs is missing."""
    try:
        return _drawn(job, runtime)
    except ImportError as error:
        if TASKS[job.config.tasks[0]].instruction != "sentence":
            raise
        why = f"noise: {error.name} is not installed"
    tokenizer = build_tokenizer(_fixed())

    def loader(batch: int) -> Any:
        return Synthetic(job.config, batch, tokenizer, runtime.device)

    return Data(loader, f"{job.config.tasks[0]}/noise", max(job.batches) // PER_IDENTITY, tokenizer, why)


def _drawn(job: Job, runtime: Runtime) -> Data:
    from engine.data.index import find_indexes
    from engine.data.loader import TrainLoader
    from engine.data.sampler import Sampler, make_streams

    indexes = find_indexes(job.data, keep=job.data / f"index{runtime.rank}")
    captions = [text for index in indexes for texts in index.table["captions"].to_pylist() for text in texts]
    tokenizer = build_tokenizer([*_fixed(), *captions])
    streams = make_streams(indexes, job.config.tasks)[:1]

    def loader(batch: int) -> Any:
        ids = batch * runtime.world // PER_IDENTITY
        sampler = Sampler(streams, seed=0, ids=ids, images_per_id=PER_IDENTITY, world=runtime.world)
        where = {"rank": runtime.rank, "start": 0, "quarantine": _no_damage}
        return TrainLoader(sampler, job.config, tokenizer, runtime.device, **where)

    loader(job.batches[0]).next()  # may find that a decoder is missing
    return Data(loader, streams[0].name, streams[0].identities, tokenizer, "drawn pictures by the engine's loader")


def _fixed() -> list[str]:
    return [sentence for family in SENTENCES.values() for sentence in family]


def _no_damage(path: Path, reason: str, micro_step: int) -> None:
    raise RuntimeError(f"{path}: {reason}")


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of a bare product, on all ranks at once."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = measure.rounds({"matmul": lambda: a @ b}, device, 5)["matmul"]
    return 2 * size**3 / statistics.median(seconds)


def check_loop() -> None:
    """The released loss anchor by anchor is kernels.adaptive_triplet_reference's. InputError where not."""
    case = triplet.case_of(64, torch.device("cpu"))
    case = triplet.Case(case.features.detach().double().requires_grad_(), case.labels, case.instructions.double())
    want = kernels.adaptive_triplet_reference(*case, margin=triplet.MARGIN, mining="hard")
    pairs = [(loss, torch.autograd.grad(loss, case.features)[0]) for loss in (triplet.loop(case), want)]
    if not all(torch.allclose(*both, rtol=1e-6, atol=1e-9) for both in zip(*pairs, strict=True)):
        raise InputError("the loop over triplets differs from adaptive_triplet_reference; no figures are reported")


def join(ranks: int, device: torch.device) -> Runtime:
    """As the engine does it, or, without DeepSpeed, in the same way without."""
    if not _missing("deepspeed"):
        return start(device.type)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Runtime(device, dist.get_rank(), dist.get_world_size())


def one_step(variant: Variant, loader: Any, watch: Watch, config: TrainConfig, chance: torch.Generator) -> float:
    """Seconds; the parts of it are with the watch."""
    variant.begin()
    began = time.perf_counter()
    for _ in range(config.window):
        with watch("data"):
            batch, _ = loader.next()
        with watch("forward"):
            chance.manual_seed(0)  # drop path
            loss, _ = variant.forward(batch)
        with watch("backward"):
            variant.backward(loss)
        with watch("optimiser"):
            variant.update()
    if watch.device.type == "cuda":
        torch.cuda.synchronize(watch.device)
    return time.perf_counter() - began


def look(
    variant: Variant, batch: Batch, config: TrainConfig, chance: torch.Generator, runtime: Runtime, count: bool
) -> dict[str, float]:
    """A step that warms up: loss over all ranks and gradient norm; count: FLOPs of a micro-step, too."""
    variant.begin()
    norm, counter = 0.0, FlopCounterMode(display=False)
    for micro_step in range(config.window):
        with counter if count and not micro_step else nullcontext():
            chance.manual_seed(0)
            loss, _ = variant.forward(batch)
            variant.backward(loss)
        norm = variant.update()
    found = {"loss": runtime.mean(loss.detach().float().view(1)).item(), "norm": norm}
    return found | ({"flops": float(counter.get_total_flops())} if count else {})


def visit(job: Job, rank: int) -> None:
    """A rank's process: its variants in turn, batch size after batch size. What rank 0 leaves in job.out:
    [{"batch", "first": {variant: loss, norm}, "rows": {variant: {"steps", "peak"}}, ...} or {"batch", "left_out"}]."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job.ranks)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(job.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job.port)}
    try:
        result = {"batches": _visit(job)}
    except InputError as error:
        result = {"error": str(error)}
    except ImportError as error:
        result = {"left_out": str(error)}
    except Exception as error:  # DeepSpeed and torch may refuse a stage or a device in any way
        result = {"left_out": f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"}
    part = job.out.with_suffix(f".{rank}")
    part.write_text(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)  # DeepSpeed and the reading threads have nothing to say any more


def _visit(job: Job) -> list[dict[str, Any]]:
    device, held = pick_device(job.config.device), measure.resident("VmRSS")
    watch = Watch(device)
    watch_collectives(watch)
    runtime = join(job.ranks, device)
    if OURS in job.names:
        check_loop()
    rate = matmul_rate(device)
    data = data_of(job, runtime)
    seed_everything(0)
    model = IRM(job.config.model, data.tokenizer.get_vocab_size(), {data.stream: data.identities})
    model.freeze_unused([TASKS[job.config.tasks[0]]])
    module = TrainingModel(model, job.config, [data.stream], [False]).to(device)
    variants = variants_of(job.names, module, job.config, job.batches[0], runtime, watch)
    found = []
    for size in job.batches:
        try:
            part = _batch(job, data.loader(size), variants, model, watch, runtime, held)
        except torch.OutOfMemoryError:
            found += [{"batch": larger, "left_out": "out of memory"} for larger in job.batches if larger >= size]
            break
        found += [{"batch": size, "data": data.what, "matmul": rate, **part}]
    return found


def _batch(
    job: Job, loader: Any, variants: dict[str, Variant], model: IRM, watch: Watch, runtime: Runtime, held: int
) -> dict[str, Any]:
    """A batch size's figures: first looks, then steps in turn."""
    device, chance = runtime.device, model.edit.chance
    batch, _ = loader.next()
    first = {
        name: look(variant, batch, job.config, chance, runtime, name == NO_FUSED) for name, variant in variants.items()
    }
    rows: dict[str, dict[str, Any]] = {name: {"steps": [], "peak": 0} for name in job.names}
    for _ in range(job.steps):
        for name, row in rows.items():
            runtime.barrier()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            else:
                Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            seconds = one_step(variants[name], loader, watch, job.config, chance)
            row["steps"].append({"step": seconds, **watch.read()})
            on_gpu = device.type == "cuda"
            peak = torch.cuda.max_memory_allocated(device) if on_gpu else measure.resident("VmHWM") - held
            row["peak"] = max(row["peak"], peak)
    return {"images": len(batch.images), "first": first, "rows": rows}


def run_visit(job: Job) -> dict[str, Any]:
    """The visit's ranks in processes of their own: what rank 0 left, or why one of them could not."""
    # forked ones need not import everything anew; what has met a GPU cannot be forked
    context: Any = multiprocessing.get_context("fork" if job.config.device == "cpu" else "spawn")
    processes = [context.Process(target=visit, args=(job, rank), daemon=True) for rank in range(job.ranks)]
    for process in processes:
        process.start()
    connection.wait([process.sentinel for process in processes])
    for process in processes:  # the others follow the first, or wait for it in vain
        process.join(60)
        process.kill()
    results = []
    for rank in range(job.ranks):
        part = job.out.with_suffix(f".{rank}")
        results.append(json.loads(part.read_text()) if part.exists() else {"left_out": f"rank {rank} was lost"})
        part.unlink(missing_ok=True)
    return next((result for result in results if "batches" not in result), results[0])


def disagreement(first: dict[str, dict[str, float]], ours: dict[str, float], near: tuple[float, float]) -> str:
    """Which variant's first loss or gradient norm is another than ours has, or nothing."""
    for name, found in first.items():
        if name == "ours, hard":
            continue
        like = first["ours, hard"] if name == RELEASED else ours
        for what, tolerance in zip(("loss", "norm"), near, strict=True):
            if not abs(found[what] - like[what]) <= tolerance * abs(like[what]):
                return f"{name}: {what} {found[what]:.6g}, ours {like[what]:.6g}; no figures are reported"
    return ""


def results(args: argparse.Namespace, ranks: int, config: TrainConfig, data: Path) -> dict[tuple[int, str], dict]:
    """(batch, variant) -> its steps, peak and what else is known of them, or why it is left out."""
    wanted = args.variants or [name for name in VARIANTS if name in VISITS[0] or ranks > 1]
    visits = [[name for name in names if name in wanted] for names in VISITS]
    found: dict[tuple[int, str], dict[str, Any]] = {}
    ours: dict[int, dict[str, float]] = {}
    for turn in range(args.visits):
        for names in filter(None, visits):
            print(f"{ranks} rank(s), visit {turn + 1} of {args.visits}: {', '.join(names)}", file=sys.stderr)
            steps = args.rounds // args.visits
            result = run_visit(Job(names, ranks, _free_port(), config, args.batch, steps, data, data / "result"))
            if "error" in result:
                raise InputError(result["error"])
            for part in result.get("batches") or [{"batch": size, **result} for size in args.batch]:
                size = part["batch"]
                ours |= {size: part["first"][OURS]} if OURS in part.get("first", {}) else {}
                why = part.get("left_out") or ("nothing to compare it with" if size not in ours else "")
                if not why and (wrong := disagreement(part["first"], ours[size], NEAR[config.device])):
                    raise InputError(wrong)
                for name in names:
                    if why or "left_out" in found.get((size, name), {}):
                        found[size, name] = {"left_out": why or found[size, name]["left_out"]}
                        continue
                    kept = found.setdefault((size, name), {**part, "steps": [], "peak": 0})
                    kept["steps"] += part["rows"][name]["steps"]
                    kept["peak"] = max(kept["peak"], part["rows"][name]["peak"])
    return found


def compare(args: argparse.Namespace, device: torch.device, data: Path) -> list[dict[str, Any]]:
    """All rows. InputError where results differ or ours runs nowhere."""
    tasks, margin = (args.task,), triplet.MARGIN
    config = TrainConfig(model=MODELS[args.shapes], tasks=tasks, window=args.window, device=device.type, margin=margin)
    rows: list[dict[str, Any]] = []
    for ranks in args.ranks:
        found = results(args, ranks, config, data)
        for size in args.batch:
            common = {"shapes": args.shapes, "task": args.task, "ranks": ranks, "batch": size}
            ours, no_fused = found.get((size, OURS), {}), found.get((size, NO_FUSED), {})
            flops = no_fused["first"][NO_FUSED]["flops"] if "first" in no_fused else None
            for name in VARIANTS:
                item = found.get((size, name), {})
                why = item.get("left_out") or ours.get("left_out")
                if item:
                    row = {**common, "rival": name}
                    rows.append(row | {"left_out": why} if why else _row(row, item, ours, flops, args.window, device))
    if not any("step_s" in row for row in rows):
        raise InputError(f"ours cannot run: {rows[0]['left_out']}")
    return rows


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _row(
    common: dict[str, Any],
    item: dict[str, Any],
    ours: dict[str, Any],
    flops: float | None,
    window: int,
    device: torch.device,
) -> dict[str, Any]:
    seconds = {"own": _of(item, "step"), OURS: _of(ours, "step")}
    median = statistics.median(seconds["own"])
    row = {
        **common,
        "images/s": item["images"] * common["ranks"] * window / median,
        "times_ours": measure.ratios(seconds, OURS)["own"],
        "peak MiB": item["peak"] / 2**20,
        "step_s": median,
        "window": window,
        "data": item["data"],
    }
    for name in PARTS:
        row[f"{name}_s"] = statistics.median(_of(item, name))
    for name in PARTS:
        row[f"{name} %"] = 100 * row[f"{name}_s"] / median
    if flops:
        rate = flops * window / median  # of one rank
        row |= {"GFLOP an image": flops / item["images"] / 1e9, "of matmul": rate / item["matmul"]}
        if device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(device)
            arch = max((known for known in ARCHS if known <= 10 * major + minor), default=min(ARCHS))
            row |= {"us": 1e6 * median, "mfu": rate / (1e12 * ARCHS[arch].teraflops)}
    return row


def _of(item: dict[str, Any], what: str) -> list[float]:
    return [step[what] for step in item["steps"]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=list(MODELS), help="default: irm_base, with --quick irm_tiny")
    parser.add_argument("--batch", nargs="+", type=int, help="images of a rank (default: 8, 32 to 512 on a GPU)")
    parser.add_argument("--ranks", nargs="+", type=int, help="default: 1 2, on GPUs as many as there are")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="ours is always among them (default: all)")
    parser.add_argument(
        "--task", default="trad", choices=[task.name for task in TASKS.values() if task.loss == "identity"]
    )
    parser.add_argument("--window", type=int, default=1, help="micro-steps of an optimiser step (default: 1)")
    parser.add_argument(
        "--visits", type=int, default=1, help="how often engines are built, for rounds / visits steps each (default: 1)"
    )
    parser.add_argument("--quick", action="store_true", help="irm_tiny, two rounds for each visit")
    args, device = measure.arguments(parser, "2 for each visit")
    on_gpu = device.type == "cuda"
    args.shapes = args.shapes or ("irm_tiny" if args.quick else "irm_base")
    args.batch = sorted(args.batch or ([32, 64, 128, 256, 512] if on_gpu and not args.quick else [8]))
    args.ranks = args.ranks or sorted({1, torch.cuda.device_count() if on_gpu else 2})
    args.rounds = args.rounds or (30 if on_gpu and not args.quick else 2 * args.visits)
    if args.variants:
        args.variants = [name for name in VARIANTS if name == OURS or name in args.variants]
    if any(size < 2 * PER_IDENTITY or size % PER_IDENTITY for size in args.batch):
        parser.error(f"--batch: expected multiples of {PER_IDENTITY} from {2 * PER_IDENTITY} on")
    if min(*args.ranks, args.window, args.visits) < 1 or args.rounds % args.visits:
        parser.error("--ranks, --window, --visits: expected 1 or more; --rounds a multiple of --visits")
    if on_gpu and max(args.ranks) > torch.cuda.device_count():
        parser.error(f"--ranks: there are {torch.cuda.device_count()} GPUs")
    if not on_gpu:  # what forked processes need
        os.environ["DS_ACCELERATOR"] = "cpu"
        for package in ("deepspeed", "engine.data.loader"):
            _missing(package)
    with tempfile.TemporaryDirectory() as folder:
        people = max(8, 2 * max(args.batch) * max(args.ranks) // PER_IDENTITY)
        write_mini(Path(folder) / "data", train_ids=people, test_ids=4, images_per_id=6, datasets=DATA[args.task])
        try:
            rows = compare(args, device, Path(folder) / "data")
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    result = {"bench": "step", **measure.facts(device), "command": " ".join(["bench/step.py", *sys.argv[1:]])}
    result["rows"] = rows
    measure.write(args.json, result)
    columns = ["ranks", "batch", "rival", "images/s", "times_ours", *(f"{part} %" for part in PARTS)]
    measure.show(result, [*columns, "peak MiB", "of matmul", "mfu", "us"], ("ranks", "batch"), args.json)
    groups: dict[str, dict[str, float]] = {}
    for row in rows:
        if "left_out" not in row:
            groups.setdefault(f"{row['ranks']} rank(s)\nbatch {row['batch']}", {})[row["rival"]] = row["times_ours"]
    title = f"a training step of {args.shapes} ({result['device']})"
    measure.bars(args.plot, groups, title, "times ours")
    return 0


# Which drawn data set has a stream of the task.
DATA = {"trad": ("market1501",), "cc": ("prcc",), "ctcc": ("cocas",), "vi": ("llcm",), "li": ("cocas",)}


if __name__ == "__main__":
    sys.exit(main())
