"""What compiling tells without a GPU: registers, spills, shared memory, resident programs, tensor-core instructions.

Results are kept in `build/compiled/` by the content of the kernels, the compiler's version and the configuration, so a
second run compiles only what has changed.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "compiled"


class Arch(NamedTuple):
    """What one multiprocessor has: registers, bytes of shared memory (all, and of one program at most), warps. Of the
    card: memory bandwidth in TB/s and bf16 tensor-core rate in TFLOP/s, as published, for the floors."""

    registers: int
    shared: int
    shared_most: int
    warps: int
    terabytes_per_s: float
    teraflops: float


# A100 80 GB, H100 SXM, B200
ARCHS = {
    80: Arch(65536, 167936, 166912, 64, 2.0, 312),
    90: Arch(65536, 233472, 232448, 64, 3.35, 989),
    100: Arch(65536, 233472, 232448, 64, 8.0, 2250),
}
TENSOR_CORES = {"wgmma.mma_async": "wgmma", "tcgen05.mma": "tcgen05", "mma.sync": "mma.sync"}


class Job(NamedTuple):
    """One specialisation of a Triton kernel. kernel: "module:name"; types: argument -> Triton type, "*" marks pointers;
    constants: constexpr arguments, and plain ones that the launcher would fix; aligned: those divisible by 16."""

    kernel: str
    arch: int
    types: dict[str, str]
    constants: dict[str, Any]
    aligned: frozenset[str]
    warps: int
    stages: int


def ctas_per_sm(arch: int, registers: int, shared: int, warps: int) -> int:
    """Programs that fit on one multiprocessor: registers are given to a warp in units of 256, shared memory with 1 KB
    on top for each program."""
    chip = ARCHS[arch]
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = chip.registers // per_warp // warps if registers else chip.warps // warps
    return max(0, min(by_registers, chip.warps // warps, chip.shared // (shared + 1024)))


def compile_all(jobs: list[Job], workers: int | None = None) -> list[dict[str, Any]]:
    """For each job {"registers", "spills" (bytes of stack), "shared" (bytes), "tensor_core", "ctas_per_sm"}, or
    {"error": first line}."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(workers or os.cpu_count()) as pool:
        return list(pool.map(compile_one, jobs))


def compile_one(job: Job) -> dict[str, Any]:
    facts = [
        _kernel(job.kernel).cache_key,
        triton.__version__,
        job.arch,
        sorted(job.types.items()),
        job.warps,
        job.stages,
    ]
    facts += [sorted((k, str(v)) for k, v in job.constants.items()), sorted(job.aligned)]
    kept = CACHE / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    try:
        result = _compile(job)
    except Exception as error:  # whatever the compiler raises is a row of the report
        lines = [line for line in str(error).splitlines() if line.strip()]
        return {"error": f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]}
    part = kept.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(result))
    part.replace(kept)
    return result


def _kernel(name: str) -> Any:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def _compile(job: Job) -> dict[str, Any]:
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    kernel = _kernel(job.kernel)
    names = kernel.arg_names
    signature = {name: "constexpr" if name in job.constants else job.types[name] for name in names}
    constants = {(names.index(name),): value for name, value in job.constants.items()}
    aligned = [name for name in names if name in job.aligned and name not in job.constants]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    built = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", job.arch, 32),
        options={"num_warps": job.warps, "num_stages": job.stages},
    )
    registers, spills = _resources(built.asm["cubin"])
    ptx = built.asm["ptx"]
    used = [name for instruction, name in TENSOR_CORES.items() if instruction in ptx]
    shared = built.metadata.shared
    return {
        "registers": registers,
        "spills": spills,
        "shared": shared,
        "tensor_core": "+".join(used) or "none",
        "ctas_per_sm": ctas_per_sm(job.arch, registers, shared, job.warps),
    }


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) by the cuobjdump that Triton ships."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK):(\d+)", report)}
    return found["REG"], found["STACK"]
