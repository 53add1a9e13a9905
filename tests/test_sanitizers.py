"""The C++ of csrc/ under the address and undefined-behaviour sanitizers, by the tests of search, ranking and
augmentation."""

import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
import pytest
from conftest import ROOT

CHECKS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g1"]
BEYOND = """
import torch, kernels._C as c
rows, norms = torch.zeros(4, 8), torch.zeros(3, dtype=torch.float64)
c.norms_cpu(rows.data_ptr(), 0, 4, 8, norms.data_ptr())
"""


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory) -> Path:
    """A copy of the tree whose kernels._C checks itself."""
    folder = tmp_path_factory.mktemp("sanitized")
    for name in ("kernels", "engine", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "_C*.so"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    includes = [f"-I{sysconfig.get_paths()['include']}", f"-I{pybind11.get_include()}"]
    common = ["g++", "-std=c++17", "-O0", "-fPIC", "-ffp-contract=off", "-Wno-psabi", *includes]

    def build(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        checks = CHECKS if source.stem != "bindings" else []  # pybind11's templates take minutes
        subprocess.run([*common, *checks, "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(build, sorted((ROOT / "csrc").glob("*.cpp"))))
    library = folder / "kernels" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run(["g++", "-shared", *CHECKS, *objects, "-o", str(library)], check=True)
    return folder


def run(folder: Path, *command: str) -> subprocess.CompletedProcess:
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    env |= {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": str(folder)}
    return subprocess.run([sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_nothing_is_read_or_written_beyond_its_end(sanitized):
    beyond = run(sanitized, "-c", BEYOND)
    assert "heap-buffer-overflow" in beyond.stderr, beyond.stderr[-2000:]
    tests = [f"tests/test_{name}.py" for name in ("topk", "narrow", "rank", "augment")]
    others = "not dali and not without_the_extension"  # which has threads and memory of its own
    others += " and not leading and not float16"  # which are float32's and int16's C++ again
    done = run(sanitized, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, "-k", others)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "passed" in done.stdout
