#!/usr/bin/env bash
# Everything that a GPU can show, in one go: build for its architecture, tests, sanitizer, logs as one tar.
# Uses the machine's own python ($PYTHON, default python3) with torch, triton, pybind11 and pytest; no network.
# Writes gpu-check.tar to $OUT, or to bench/results/ when OUT is not set.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-bench/results}
logs=$(mktemp -d)
failed=0

step() {  # step NAME COMMAND...: run, log, remember a failure
  local name=$1
  shift
  echo "== $name"
  if "$@" > "$logs/$name.log" 2>&1; then tail -n 2 "$logs/$name.log"; else failed=1; tail -n 30 "$logs/$name.log"; fi
}

ops="tests/test_attention.py tests/test_triplet.py tests/test_rank.py"
step device "$python" -c "import torch, triton, sys; print(torch.cuda.get_device_name(), torch.__version__, \
triton.__version__, sys.version.split()[0])"
step build env CUDA_ARCHS="${CUDA_ARCHS:-90a}" "$python" setup.py build_ext --inplace
step tests env PYTHONPATH=. "$python" -m pytest -q -m gpu $ops
if command -v compute-sanitizer > /dev/null; then
  step sanitizer env PYTHONPATH=. compute-sanitizer --error-exitcode 9 "$python" -m pytest -q -m gpu tests/test_rank.py
else
  echo "== sanitizer: skipped, compute-sanitizer is not installed"
fi
git rev-parse HEAD > "$logs/commit" 2> /dev/null || true
tar -cf "$out/gpu-check.tar" -C "$logs" .
echo "written to $out/gpu-check.tar"
exit $failed
