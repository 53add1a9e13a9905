"""Every shipped kernel configuration, compiled for every architecture, without a GPU.

    python bench/compile_report.py                    table
    python bench/compile_report.py --json FILE        rows with the keys of COLUMNS

registers, spills (bytes), shared (bytes), ctas_per_sm, tensor_core: from the compiled code. padding: products computed
for products needed, at the row's shape. bytes, flops, floor_us: what the definition needs and the least time a card of
that architecture needs for it (bench/compiled.py: ARCHS); nothing here was measured on a GPU. For csrc: ptxas figures.
Exit code 1 when a Triton configuration does not compile, spills, or takes more shared memory than there is.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: the checkout's root is where imports start
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import triton

from bench import measure
from bench.attention import Shape, cost, floor_us
from bench.compiled import ARCHS, Job, compile_all
from kernels.attention import config_of

COLUMNS = [
    "kernel", "arch", "dtype", "shape", "registers", "spills", "shared", "ctas_per_sm", "tensor_core", "padding",
    "bytes", "flops", "floor_us",
]  # fmt: skip
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
HEADS = [
    ("bf16", 32),
    ("bf16", 64),
    ("bf16", 96),
    ("bf16", 128),
    ("fp16", 64),
    ("fp32", 32),
    ("fp32", 64),
    ("fp32", 128),
]
ATTENTION = Shape(129, 70, True)
BATCH = 256


def attention_job(which: str, arch: int, dtype: str, D: int, config: Any = None) -> Job:
    """The specialisation that the model launches: packed, 12 heads, lengths given, all strides divisible by 16."""
    from kernels import attention

    rows, keys, keys_ins, warps, stages = config or config_of(arch, which, DTYPES[dtype], D)
    kernel = {"forward": attention._forward, "backward": attention._backward}[which]
    width = 12 * D
    constants = {
        "D": D, "BLOCK_D": max(16, triton.next_power_of_2(D)), "INS": True, "VARLEN": True, "PRECISION": "ieee",
        "ROWS": rows, "KEYS": keys, "KEYS_INS": keys_ins, "gate_h": 1, "lengths_b": 1,
        "q_n": 3 * width, "kv_n": 3 * width, "ins_m": 2 * 12 * width, "out_n": width,
    }  # fmt: skip
    if which == "backward":
        constants |= {"do_n": width, "dq_n": 3 * width, "dkv_n": 3 * width, "dins_m": 2 * width}
    float32 = ("GATE", "LSE", "LSE_INS", "DGATE", "DELTA", "DELTA_INS")
    types = dict.fromkeys(kernel.arg_names, "i32")
    types |= dict.fromkeys(("scale", "scale2"), "fp32")
    pointers = [name for name in kernel.arg_names if (name.isupper() and len(name) > 1) or name in "QKV"]
    types |= {name: "*fp32" if name in float32 else f"*{dtype}" for name in pointers} | {"LENGTHS": "*i64"}
    aligned = [name for name in kernel.arg_names if name not in ("H", "N", "M", "scale", "scale2")]
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    return Job(f"kernels.attention:_{which}", arch, types, constants, frozenset(aligned), warps, stages)


def attention_rows() -> list[tuple[dict[str, Any], Job]]:
    rows = []
    for arch in ARCHS:
        for which in ("backward", "forward"):  # what takes long first
            for dtype, D in HEADS:
                shape, itemsize = ATTENTION._replace(D=D), DTYPES[dtype]
                moved, flops = cost(which, BATCH, shape, itemsize)
                facts = {
                    "kernel": f"attention {which}",
                    "arch": f"sm_{arch}",
                    "dtype": dtype,
                    "shape": f"B {BATCH} H {shape.H} N {shape.N} M {shape.M} D {D}",
                    "padding": round(attention_padding(shape), 3),
                    "bytes": moved,
                    "flops": flops,
                    "floor_us": round(floor_us(which, BATCH, shape, itemsize, arch), 1),
                }
                rows.append((facts, attention_job(which, arch, dtype, D)))
    return rows


def attention_padding(shape: Shape) -> float:
    """Rows and keys are cut into full tiles and then into tiles of 16; D is padded to a power of 2."""
    N, M, D = (-(-n // 16) * 16 for n in (shape.N, shape.M, triton.next_power_of_2(shape.D)))
    return N * (N + M) * D / (shape.N * (shape.N + shape.M) * shape.D)


def triplet_rows() -> list[tuple[dict[str, Any], Job]]:
    """The sweep over a block of one matrix product. bytes: the block read once for each same-identity sample and twice
    besides, and written once, as far as it is not in a cache; flops: those of the two products around it."""
    from kernels import triplet

    names = triplet._sweep.arg_names
    N, K, D = 8192, 3, 768
    R = triplet.BLOCK["cuda"] // N
    rows = []
    for arch, chip in ARCHS.items():
        for dtype, itemsize in (("fp32", 4), ("fp64", 8)):
            tile = triplet.TILES[itemsize]
            for signs, squared in ((1, True), (2, False)):
                constants = {
                    "SIGNS": signs,
                    "SQUARED": squared,
                    "ROWS": tile[0],
                    "COLUMNS": tile[1],
                }
                types = dict.fromkeys(names, f"*{dtype}") | dict.fromkeys(("ANCHORS", "LABELS", "ACTIVE"), "*i64")
                types |= dict.fromkeys(("S", "R", "N", "K"), "i32")
                aligned = frozenset(name for name in names if types[name].startswith("*"))
                job = Job("kernels.triplet:_sweep", arch, types, constants, aligned, triplet.WARPS, 3)
                moved, flops = (signs * K + 3) * R * N * itemsize, 4 * R * N * D
                rate = chip.teraflops / 16 / (itemsize // 4)
                facts = {
                    "kernel": f"triplet sweep {'clamp' if signs == 1 else 'raw'} {'squared' if squared else 'root'}",
                    "arch": f"sm_{arch}",
                    "dtype": dtype,
                    "shape": f"R {R} N {N} K {K} D {D}",
                    "padding": 1.0,
                    "bytes": moved,
                    "flops": flops,
                    "floor_us": round(flops / rate / 1e6, 1),
                }
                rows.append((facts, job))
    return rows


def csrc_rows() -> list[dict[str, Any]]:
    """ptxas figures of csrc/*.cu; none where there is no CUDA toolkit."""
    home = _cuda_home()
    if home is None:
        print("csrc: left out, no CUDA toolkit found", file=sys.stderr)
        return []
    rows = []
    for source in sorted((measure.ROOT / "csrc").glob("*.cu")):
        for arch in ARCHS:
            rows += _ptxas(home, source, arch)
    return rows


def _cuda_home() -> Path | None:
    """As setup.py finds it."""
    import runpy

    return runpy.run_path(str(measure.ROOT / "setup.py"), run_name="found")["cuda_home"]()


def _ptxas(home: Path, source: Path, arch: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        flags = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Xptxas", "-v", f"-arch=sm_{arch}", "-cubin"]
        command = [str(home / "bin" / "nvcc"), *flags, str(source), "-o", f"{folder}/out.cubin"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return [{"kernel": source.name, "arch": f"sm_{arch}", "error": done.stderr.strip().splitlines()[0][:200]}]
    rows = []
    found = re.findall(r"Compiling entry function '(\w+)'(.*?)Used (\d+) registers(.*?)$", done.stderr, re.S | re.M)
    for mangled, between, registers, rest in found:
        name = subprocess.run(["c++filt", "-p", mangled], capture_output=True, text=True).stdout.strip() or mangled
        stack = re.search(r"(\d+) bytes stack frame", between)
        shared = re.search(r"(\d+) bytes smem", rest)
        rows.append(
            {
                "kernel": f"{source.name} {name.replace('(anonymous namespace)::', '')}",
                "arch": f"sm_{arch}",
                "registers": int(registers),
                "spills": int(stack[1]) if stack else 0,
                "shared": int(shared[1]) if shared else 0,
            }
        )
    return rows


def report() -> list[dict[str, Any]]:
    planned = attention_rows() + triplet_rows()
    results = compile_all([job for _, job in planned])
    return [facts | result for (facts, _), result in zip(planned, results, strict=True)]


def faults(rows: list[dict[str, Any]]) -> list[str]:
    """What a configuration must not do."""
    found = []
    for row in rows:
        what = f"{row['kernel']} {row['arch']} {row.get('dtype', '')} {row.get('shape', '')}"
        if "error" in row:
            found.append(f"{what}: {row['error']}")
        elif row["spills"]:
            found.append(f"{what}: {row['spills']} bytes spilled")
        elif row["shared"] > ARCHS[int(row["arch"][3:])].shared_most:
            found.append(f"{what}: {row['shared']} bytes of shared memory")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows there")
    args = parser.parse_args()
    rows = report() + csrc_rows()
    print(measure.table(rows, COLUMNS))
    measure.write(args.json, {"bench": "compile_report", "triton": triton.__version__, "rows": rows})
    if args.json:
        print(f"written to {args.json}")
    broken = faults(rows)
    for line in broken:
        print(f"fault: {line}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
