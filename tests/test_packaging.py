"""The package called `kernels` beside transformers, and the wheel away from the checkout."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, free_port

import kernels

CODE = (
    "from transformers import BertModel; import kernels; "
    "print(BertModel.__name__, kernels.__version__, kernels.__file__)"
)


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


def test_transformers_leaves_our_kernels_alone_in_the_source_layout():
    assert run(sys.executable, "-c", CODE, cwd=ROOT) == f"BertModel 0.0.1 {ROOT / 'kernels' / '__init__.py'}"


def test_importing_has_no_effects():
    code = (
        "import sys, kernels, engine; "
        "print(sorted({'torch', 'triton', 'transformers', 'deepspeed'} & set(sys.modules)), kernels.__all__ != [])"
    )
    assert run(sys.executable, "-c", code, cwd=ROOT) == "[] True"
    assert set(kernels.__all__) == set(kernels._MODULE)
    assert all(callable(getattr(kernels, name)) for name in kernels.__all__)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The wheel, built from a copy of the tracked files and unpacked away from the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in files.stdout.splitlines():
        target = folder / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    options = ("--no-deps", "--no-build-isolation")
    run(*pip, "wheel", *options, "-w", folder, ".", "-v", cwd=folder / "source", WITH_CUDA="0")
    (wheel,) = folder.glob("*.whl")
    run(*pip, "install", "--no-deps", "--target", folder / "site", wheel, "-v", cwd=folder)
    return folder / "site"


@pytest.mark.slow
def test_transformers_leaves_our_kernels_alone_in_the_installed_layout(site, tmp_path):
    said = run(sys.executable, "-c", CODE, cwd=tmp_path, PYTHONPATH=str(site))
    assert said == f"BertModel 0.0.1 {site / 'kernels' / '__init__.py'}"


@pytest.mark.slow
def test_the_wheel_trains_from_any_folder(site, mini, tmp_path):
    deepspeed = Path(sys.executable).parent / "deepspeed"
    options = ["--config", "irm_tiny", "--ids", "4", "--steps", "1", "--window", "2", "--no-eval", "--output", "run"]
    run(
        deepspeed, "--master_port", str(free_port()), "--module", "recipes.mtl", "--data", mini, *options,
        cwd=tmp_path, PYTHONPATH=str(site),
    )  # fmt: skip
    assert (tmp_path / "run" / "checkpoints" / "step-00000001" / "model.safetensors").is_file()
    code = "import engine.training, kernels._C; print(engine.training.__file__, kernels._C.__file__)"
    said = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(site)).split()
    assert all(Path(name).is_relative_to(site) for name in said)
