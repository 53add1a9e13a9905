"""Gated dual-softmax attention: kernels.gated_attention beside what a user could write instead.

    python bench/attention.py                         the paper's shapes, as large as the device takes
    python bench/attention.py --shapes text-256x128 --batch 256 --json bench/results/attention-h100.json

Rivals: eager (both maps, one product over concatenated values), two calls of torch's scaled_dot_product_attention and
an addition with each backend, FlexAttention compiled, one varlen call over stacked sequences. Each must first return
the same result and gradients; ours not doing so ends the run with exit code 1 and no figures.
Times are for one layer. "floor" is the larger of bytes over bandwidth and FLOPs over rate of the card.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # run as a script: the checkout's root is where imports start
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels
from bench import measure
from bench.compiled import ARCHS


class Shape(NamedTuple):
    """N image tokens, M instruction tokens; ragged: lengths of 10..M."""

    N: int
    M: int
    ragged: bool
    H: int = 12
    D: int = 64


SHAPES = {
    "text-256x128": Shape(129, 70, True),
    "clothes-256x128": Shape(129, 65, False),
    "clothes257-256x128": Shape(129, 257, False),
    "text-384x192": Shape(289, 70, True),
    "clothes-384x192": Shape(289, 65, False),
    "demo": Shape(33, 24, True, 4, 32),
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
OURS = "gated_attention_packed"


class Case(NamedTuple):
    """Tensors of one shape, as a linear layer leaves them. lengths: valid instruction tokens, or None. What a model
    makes once for all its layers is made before anything is timed: valid [B, 1, 1, M], the mask of lengths; stacked:
    for a varlen call the instruction rows to keep and both prefix sums."""

    qkv: Tensor
    kv_ins: Tensor
    gate: Tensor
    lengths: Tensor | None
    weight: Tensor
    valid: Tensor | None
    stacked: tuple[Tensor, Tensor, Tensor]

    @property
    def views(self) -> list[Tensor]:
        return [t for packed in (self.qkv, self.kv_ins) for t in packed.permute(2, 0, 3, 1, 4).unbind(0)]


def case_of(shape: Shape, batch: int, dtype: torch.dtype, device: torch.device) -> Case:
    torch.manual_seed(0)
    qkv = torch.randn(batch, shape.N, 3, shape.H, shape.D, device=device, dtype=dtype, requires_grad=True)
    kv_ins = torch.randn(batch, shape.M, 2, shape.H, shape.D, device=device, dtype=dtype, requires_grad=True)
    gate = torch.full((shape.H,), 0.3, device=device, requires_grad=True)
    lengths = torch.randint(10, shape.M + 1, (batch,), device=device) if shape.ragged else None
    weight = torch.randn(batch, shape.N, shape.H, shape.D, device=device, dtype=dtype)
    counts = torch.full((batch,), shape.M, device=device) if lengths is None else lengths
    kept = torch.arange(shape.M, device=device) < counts[:, None]
    starts_q = torch.arange(2 * batch + 1, device=device, dtype=torch.int32) * shape.N
    both = torch.cat([torch.full((batch,), shape.N, device=device), counts])
    stacked = kept.flatten().nonzero()[:, 0], starts_q, F.pad(both.cumsum(0), (1, 0)).int()
    valid = None if lengths is None else kept[:, None, None]
    return Case(qkv, kv_ins, gate, lengths, weight, valid, stacked)


def packed(case: Case) -> Tensor:
    return kernels.gated_attention_packed(case.qkv, case.kv_ins, case.gate, ins_lengths=case.lengths)


def separate(case: Case) -> Tensor:
    return kernels.gated_attention(*case.views, case.gate, ins_lengths=case.lengths).transpose(1, 2)


def eager(case: Case) -> Tensor:
    """Two softmaxes side by side, one product with the values."""
    q, k, v, k_ins, v_ins = case.views
    scale = q.shape[-1] ** -0.5
    second = q @ k_ins.mT * scale
    if case.valid is not None:
        second = second.masked_fill(~case.valid, float("-inf"))
    gate = case.gate.to(q.dtype).view(-1, 1, 1)
    maps = torch.cat([torch.softmax(q @ k.mT * scale, -1), gate * torch.softmax(second, -1)], -1)
    return (maps @ torch.cat([v, v_ins], 2)).transpose(1, 2)


def two_calls(case: Case) -> Tensor:
    q, k, v, k_ins, v_ins = case.views
    first = F.scaled_dot_product_attention(q, k, v)
    second = F.scaled_dot_product_attention(q, k_ins, v_ins, attn_mask=case.valid)
    return (first + case.gate.to(q.dtype).view(-1, 1, 1) * second).transpose(1, 2)


def with_backend(backend: SDPBackend) -> Callable[[Case], Tensor]:
    def run(case: Case) -> Tensor:
        with sdpa_kernel(backend):
            return two_calls(case)

    return run


def flex(case: Case) -> Tensor:
    """Compiled whole: both calls, gate and addition."""
    if not case.qkv.is_cuda:
        raise NotImplementedError("FlexAttention has no backward on a CPU")
    return _compiled_flex()(*case.views, case.gate, case.lengths).transpose(1, 2)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    import torch._functorch.config
    from torch.nn.attention.flex_attention import flex_attention

    def both(q, k, v, k_ins, v_ins, gate, lengths):
        def masked(score, b, h, i, j):
            return torch.where(j < lengths[b], score, -math.inf)

        second = flex_attention(q, k_ins, v_ins, score_mod=None if lengths is None else masked)
        return flex_attention(q, k, v) + gate.to(q.dtype).view(-1, 1, 1) * second

    torch._functorch.config.donated_buffer = False  # a graph is differentiated more than once here
    return torch.compile(both, dynamic=False, fullgraph=True)


def varlen(case: Case) -> Tensor:
    """2B sequences stacked: every sample's queries twice, against its image and against its instruction."""
    from torch.nn.attention.varlen import varlen_attn

    (B, N, _, H, D), M = case.qkv.shape, case.kv_ins.shape[1]
    q, k, v = case.qkv.unbind(2)
    rows, starts_q, starts_k = case.stacked
    k_ins, v_ins = (t.reshape(-1, H, D).index_select(0, rows) for t in case.kv_ins.unbind(2))
    keys = torch.cat([k.reshape(-1, H, D), k_ins])
    values = torch.cat([v.reshape(-1, H, D), v_ins])
    queries = q.reshape(-1, H, D).repeat(2, 1, 1)
    out = varlen_attn(queries, keys, values, starts_q, starts_k, N, max(N, M)).view(2, B, N, H, D)
    return out[0] + case.gate.to(out.dtype).view(-1, 1) * out[1]


RIVALS: dict[str, Callable[[Case], Tensor]] = {
    OURS: packed,
    "gated_attention": separate,
    "eager concat": eager,
    "2x sdpa flash": with_backend(SDPBackend.FLASH_ATTENTION),
    "2x sdpa efficient": with_backend(SDPBackend.EFFICIENT_ATTENTION),
    "2x sdpa cudnn": with_backend(SDPBackend.CUDNN_ATTENTION),
    "2x sdpa math": with_backend(SDPBackend.MATH),
    "2x sdpa default": two_calls,
    "2x flex compiled": flex,
    "varlen stacked": varlen,
}


def cost(which: str, batch: int, shape: Shape, itemsize: int, valid: float | None = None) -> tuple[int, int]:
    """(bytes, FLOPs) of one pass ("forward", "backward"); valid: mean of the lengths (None: all M).

    Every input read once, every result written once, two float32 logarithms for each row; multiplications and additions
    of the products that the definition needs (backward: both products of scores again), softmax left out.
    """
    N, M, H, D = shape.N, shape.M if valid is None else valid, shape.H, shape.D
    image, read, written, rows = batch * H * N * D, batch * H * M * D, batch * H * shape.M * D, batch * H * N
    product = 2 * batch * H * N * (N + M) * D
    if which == "forward":
        return round((4 * image + 2 * read) * itemsize + 2 * rows * 4), round(2 * product)
    return round((7 * image + 2 * read + 2 * written) * itemsize + 2 * rows * 4), round(5 * product)


def floor_us(which: str, batch: int, shape: Shape, itemsize: int, arch: int, valid: float | None = None) -> float:
    """Least time on the card that stands for this architecture, in microseconds."""
    chip, (moved, flops) = ARCHS[arch], cost(which, batch, shape, itemsize, valid)
    rate = chip.teraflops if itemsize == 2 else chip.teraflops / 16  # float32 is multiplied without tensor cores
    return max(moved / chip.terabytes_per_s, flops / rate) / 1e6


def results_of(run: Callable[[Case], Tensor], case: Case) -> list[Tensor]:
    out = run(case)
    return [out.detach(), *torch.autograd.grad(out, [case.qkv, case.kv_ins, case.gate], case.weight)]


def refusals(case: Case, rivals: dict[str, Callable[[Case], Tensor]]) -> dict[str, str]:
    """Rival -> why it has no figures here: it cannot run, or errs by more than twice the eager form against float64
    (the rounding of a result on top)."""
    tensors = [t.detach().double().requires_grad_() for t in case[:3]]
    exact = results_of(
        eager, case._replace(qkv=tensors[0], kv_ins=tensors[1], gate=tensors[2], weight=case.weight.double())
    )
    plain = results_of(eager, case)
    found = {}
    for name, run in rivals.items():
        try:
            got = results_of(run, case)
        except Exception as error:  # rivals may refuse a shape, a type or a device in any way
            found[name] = " ".join(str(error).split())[:110] or type(error).__name__
            continue
        for part, a, b, e in zip(("out", "dqkv", "dkv_ins", "dgate"), got, exact, plain, strict=True):
            error, eps = (a.double() - b).norm() / b.norm(), torch.finfo(case.qkv.dtype).eps
            band = max(16 * eps, 2**-17) if part == "dgate" else 2 * eps  # a float32 sum of many parts that cancel
            if not error <= 2 * ((e.double() - b).norm() / b.norm()) + band:
                found[name] = f"wrong: {part} errs by {error:.2e}"
                break
    return found


def compare(name: str, shape: Shape, batch: int, args: argparse.Namespace, device: torch.device) -> list[dict]:
    """The rows of one shape and batch."""
    torch._dynamo.reset()  # after few graphs torch gives up compiling and runs eagerly: every case starts anew
    _compiled_flex.cache_clear()
    case = case_of(shape, batch, DTYPES[args.dtype], device)
    refused = refusals(case, RIVALS)
    if OURS in refused:
        raise SystemExit(f"error: {OURS} at {name}, batch {batch}: {refused[OURS]}; no figures are reported")
    rivals = {rival: run for rival, run in RIVALS.items() if rival not in refused}
    rows: list[dict[str, Any]] = []
    inputs, same = [case.qkv, case.kv_ins, case.gate], {"shape": name, "batch": batch, "dtype": args.dtype}
    kept = {rival: run(case) for rival, run in rivals.items()}

    def forward(run):
        with torch.no_grad():
            run(case)

    passes: dict[str, dict[str, Callable[[], Any]]] = {
        "forward": {r: lambda run=run: forward(run) for r, run in rivals.items()},
        "backward": {
            r: lambda r=r: torch.autograd.grad(kept[r], inputs, case.weight, retain_graph=True) for r in rivals
        },
        "both": {r: lambda run=run: results_of(run, case) for r, run in rivals.items()},
    }
    for which, runs in passes.items():
        for flush in (False, True) if device.type == "cuda" else (False,):
            seconds = measure.rounds(runs, device, args.rounds, flush=flush)
            ratio = measure.ratios(seconds, OURS)
            for rival in runs:
                row = {**same, "rival": rival, "pass": which, "flush": flush, "times_ours": ratio[rival]}
                median = statistics.median(seconds[rival])
                if device.type == "cuda":
                    row |= {"us": 1e6 * median, "peak_mb": measure.peak_bytes(runs[rival], device) / 2**20}
                    row |= _against_floor(which, batch, shape, case, row["us"])
                else:
                    row |= {"cpu_ms": 1e3 * median}
                rows.append(row)
    rows += [{**same, "rival": rival, "left_out": why} for rival, why in refused.items()]
    return rows


def _against_floor(which: str, batch: int, shape: Shape, case: Case, us: float) -> dict[str, float]:
    major, minor = torch.cuda.get_device_capability(case.qkv.device)
    arch = max((known for known in ARCHS if known <= 10 * major + minor), default=min(ARCHS))
    valid = None if case.lengths is None else case.lengths.float().mean().item()
    passes = ("forward", "backward") if which == "both" else (which,)
    costs = [cost(part, batch, shape, case.qkv.itemsize, valid) for part in passes]
    floor = sum(floor_us(part, batch, shape, case.qkv.itemsize, arch, valid) for part in passes)
    return {
        "bytes": sum(moved for moved, _ in costs),
        "flops": sum(flops for _, flops in costs),
        "floor_us": floor,
        "of_floor": floor / us,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", nargs="+", choices=list(SHAPES), help="default: all but demo on a GPU; all on a CPU"
    )
    parser.add_argument("--batch", nargs="+", type=int, help="samples (default: 32 128 256 512 on a GPU, 8 on a CPU)")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: bfloat16 on a GPU, float32 on a CPU")
    args, device = measure.arguments(parser, "7")
    on_gpu = device.type == "cuda"
    args.dtype = args.dtype or ("bfloat16" if on_gpu else "float32")
    args.rounds = args.rounds or (30 if on_gpu else 7)
    result: dict[str, Any] = {"bench": "attention", **measure.facts(device), "rows": []}
    rows = result["rows"]
    for name in args.shapes or [name for name in SHAPES if not on_gpu or name != "demo"]:
        for batch in args.batch or ([32, 128, 256, 512] if on_gpu else [8]):
            try:
                rows += compare(name, SHAPES[name], batch, args, device)
            except torch.OutOfMemoryError:
                rows.append({"shape": name, "batch": batch, "rival": "all", "left_out": "out of memory"})
                torch.cuda.empty_cache()
            measure.write(args.json, result)  # what is there so far, should a later shape fail
    columns = ["shape", "batch", "rival", "pass", "flush", "us", "cpu_ms", "times_ours", "peak_mb", "of_floor"]
    measure.show(result, columns, ("shape", "batch"), args.json)
    groups: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.get("pass") in ("forward", "backward") and row["flush"] == on_gpu:
            group = f"{row['shape']}\nbatch {row['batch']}\n{row['pass']}"
            groups.setdefault(group, {})[row["rival"]] = row["times_ours"]
    measure.bars(args.plot, groups, f"time relative to {OURS} ({args.dtype}, {result['device']})", "times ours")
    return 0


if __name__ == "__main__":
    sys.exit(main())
