"""Builds `kernels._C` from csrc/: C++ always, CUDA where a toolkit is found.

Environment: WITH_CUDA=0 leaves the CUDA sources out; CUDA_HOME names the toolkit; CUDA_ARCHS the architectures
(default "80;90;100"). The extension sees tensors as addresses and strides, so it does not depend on torch's ABI and
builds in seconds. Without a C++ compiler the package still installs and the Python forms serve.
"""

import os
import shutil
import subprocess
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

HERE = Path(__file__).parent


def cuda_home():
    """The toolkit's root: bin/nvcc and lib64 with cudart (`nvcc` on PATH may be a wrapper)."""
    if os.environ.get("WITH_CUDA", "1") == "0":
        return None
    nvcc = shutil.which("nvcc")
    guesses = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", nvcc and Path(nvcc).resolve().parent.parent]
    for root in (Path(guess) for guess in guesses if guess):
        if (root / "bin" / "nvcc").exists() and (root / "lib64" / "libcudart_static.a").exists():
            return root
    return None


class Build(build_ext):
    def build_extension(self, ext):
        home = cuda_home()
        if home:
            objects = [self.nvcc(home, source) for source in sorted((HERE / "csrc").glob("*.cu"))]
            ext.extra_objects += [str(item) for item in objects]
            ext.define_macros.append(("WITH_CUDA", "1"))
            ext.include_dirs.append(str(home / "include"))
            ext.extra_link_args += [f"-L{home / 'lib64'}", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]
        super().build_extension(ext)

    def nvcc(self, home, source):
        target = Path(self.build_temp) / f"{source.stem}.cu.o"
        target.parent.mkdir(parents=True, exist_ok=True)
        nvcc = str(home / "bin" / "nvcc")
        archs = os.environ.get("CUDA_ARCHS", "").split(";")
        if archs == [""]:
            known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
            archs = [arch for arch in ("80", "90", "100") if f"compute_{arch}" in known.split()]
        gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        flags = ["-O3", "-std=c++17", "--threads=2", "-Xcompiler=-fPIC", "--expt-relaxed-constexpr"]
        command = [nvcc, *flags, *gencode, "-c", str(source), "-o", str(target)]
        print(" ".join(command), flush=True)
        try:
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"nvcc failed on {source.name}; WITH_CUDA=0 builds without CUDA") from error
        return target


extension = Pybind11Extension(
    "kernels._C",
    sorted(str(path.relative_to(HERE)) for path in (HERE / "csrc").glob("*.cpp")),
    depends=[str(path.relative_to(HERE)) for path in (HERE / "csrc").iterdir()],
    cxx_std=17,
    extra_compile_args=["-O3", "-ffp-contract=off"],
    optional=True,  # no compiler: a warning, and kernels/ falls back to its Python forms
)

if __name__ == "__main__":
    setup(ext_modules=[extension], cmdclass={"build_ext": Build})
