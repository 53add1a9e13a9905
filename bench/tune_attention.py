"""Proposes the table of configurations in kernels/attention.py.

    python bench/tune_attention.py --arch 90 --pass backward            from compiled code, without a GPU
    python bench/tune_attention.py --pass backward --measure            on the GPU at hand: the fastest, timed

Without a GPU: what spills comes last, what leaves room for 12 warps on a multiprocessor first (there is no long loop
to pipeline, so other programs have to hide the waiting), then the largest tiles (keys are read again for every tile of
rows, rows for every tile of keys), then the most warps and the fewest registers.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: the checkout's root is where imports start
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from bench import measure
from bench.attention import DTYPES, SHAPES, case_of, packed, results_of
from bench.compile_report import attention_job
from bench.compiled import ARCHS, compile_all
from kernels import attention
from kernels.attention import Config

NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def candidates(dtype: str) -> list[Config]:
    """Tiles worth trying: what is kept of a row grows with D alone, of a product with the tile."""
    tiles = [(16, 64), (32, 32), (32, 64), (32, 128), (64, 32), (64, 64), (128, 64)]
    if dtype == "fp32":
        tiles = [(16, 16), (16, 32), (16, 64), (32, 16), (32, 32), (64, 32)]
    keys_ins = 16 if dtype == "fp32" else 32
    return [Config(*tile, keys_ins, max(4, tile[0] // 16), stages) for tile in tiles for stages in (1, 2)]


def proposed(which: str, arch: int, dtype: str, D: int) -> list[dict[str, Any]]:
    """Candidates as rows, best first."""
    configs = candidates(dtype)
    results = compile_all([attention_job(which, arch, dtype, D, config) for config in configs])
    rows = [{"config": tuple(config), **result} for config, result in zip(configs, results, strict=True)]

    def order(row: dict[str, Any]) -> tuple:
        if "error" in row:
            return (2,)  # after what is merely poor
        rows, keys, _, warps, _ = row["config"]
        poor = row["spills"] > 0 or row["shared"] > ARCHS[arch].shared_most
        resident = row["ctas_per_sm"] * warps
        return (poor, resident < 12, resident < 8, -rows * keys, -resident, row["registers"])

    return sorted(rows, key=order)


def measured(which: str, dtype: str, D: int, shape: str, batch: int, most: int) -> list[dict[str, Any]]:
    """The `most` best proposals for the GPU at hand, timed side by side; fastest first."""
    device = torch.device("cuda")
    major, minor = torch.cuda.get_device_capability(device)
    arch = max((known for known in ARCHS if known <= 10 * major + minor), default=min(ARCHS))
    case = case_of(SHAPES[shape]._replace(D=D), batch, DTYPES[NAMES[dtype]], device)
    key = (which, case.qkv.itemsize, max(32, 1 << (D - 1).bit_length()))
    table, found = attention.CONFIGS[arch], proposed(which, arch, dtype, D)
    fitting = [row for row in found if "error" not in row and row["shared"] <= ARCHS[arch].shared_most]
    shipped, rows = table[key], fitting[:most]

    def run(config: Config) -> None:
        table[key] = config
        packed(case) if which == "forward" else results_of(packed, case)

    try:
        runs = {str(row["config"]): lambda row=row: run(Config(*row["config"])) for row in rows}
        seconds = measure.rounds(runs, device, 20)
    finally:
        table[key] = shipped
    for row in rows:
        row["us"] = 1e6 * statistics.median(seconds[str(row["config"])])
    return sorted(rows, key=lambda row: row["us"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pass", dest="which", choices=["forward", "backward"], required=True)
    parser.add_argument("--arch", type=int, choices=list(ARCHS), default=90)
    parser.add_argument("--dtype", choices=list(NAMES), default="bf16")
    parser.add_argument("--head-dim", type=int, default=64, choices=[32, 64, 96, 128])
    parser.add_argument("--top", type=int, default=12, help="rows to print; with --measure, candidates to time")
    parser.add_argument("--measure", action="store_true", help="time them on this machine's GPU")
    parser.add_argument("--shape", choices=list(SHAPES), default="text-256x128")
    parser.add_argument("--batch", type=int, default=256)
    args = parser.parse_args()
    if args.measure and not torch.cuda.is_available():
        parser.error("--measure: torch sees no GPU; leave it out to go by compiled code")
    if args.measure:
        rows = measured(args.which, args.dtype, args.head_dim, args.shape, args.batch, args.top)
    else:
        rows = proposed(args.which, args.arch, args.dtype, args.head_dim)[: args.top]
    print("config: rows, keys, keys_ins, warps, stages")
    columns = ["config", "us", "registers", "spills", "shared", "ctas_per_sm", "tensor_core", "error"]
    print(measure.table(rows, [column for column in columns if any(column in row for row in rows)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
