#!/usr/bin/env bash
# Everything that a GPU can show, in one go: build for its architecture, tests, sanitizer, benchmarks, what its compiler
# makes of the kernels; rows and logs as one tar. Uses the machine's own python ($PYTHON, default python3) with torch,
# triton, pybind11 and pytest; no network. It ends within 8 minutes, whatever hangs, and what found no time is named:
# STEPS="step sanitizer" runs only these, after the build. COMMIT=... names the commit in the rows where there is no git.
# Writes gpu-check.tar to $OUT, or to bench/results/ when OUT is not set.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-bench/results}
logs=$(mktemp -d)
failed=0

step() {  # step NAME SECONDS COMMAND...: run, log, remember a failure; stopped after SECONDS, or when time is up
  local name=$1 cap=$2 left=$((470 - SECONDS))
  shift 2
  if [[ -n ${STEPS:-} && " device build $STEPS " != *" $name "* ]]; then return; fi
  echo "== $name"
  if ((left < 5)); then echo "left out: time is up" | tee "$logs/$name.log"; failed=1; return; fi
  if timeout -k 5 $((cap < left ? cap : left)) "$@" > "$logs/$name.log" 2>&1; then
    tail -n 2 "$logs/$name.log"
  else
    failed=1
    tail -n 30 "$logs/$name.log"
  fi
}

# Tests compile many specialisations of the kernels: one process for each type.
shards() {
  local pids=() status=0 words
  for words in "cuda-torch.float32" "cuda-torch.float16" "cuda-torch.bfloat16" "not cuda-torch"; do
    "$python" -m pytest -q -m gpu -k "$words" tests/test_attention.py &
    pids+=($!)
  done
  "$python" -m pytest -q -m gpu tests/test_triplet.py tests/test_topk.py tests/test_rank.py \
    tests/test_streaming.py || status=1
  for pid in "${pids[@]}"; do wait "$pid" || status=1; done
  return $status
}
export -f shards
export python PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH}

step device 60 "$python" -c "import torch, triton, sys; print(torch.cuda.get_device_name(), torch.__version__, \
triton.__version__, sys.version.split()[0])"
step build 120 env CUDA_ARCHS="${CUDA_ARCHS:-90a}" "$python" setup.py build_ext --inplace
step tests 220 bash -c shards
if "$python" -c "import timm, transformers" 2> /dev/null; then
  step step 150 "$python" bench/step.py --batch 32 128 512 --rounds 6 \
    --variants ours "no fused" released DDP "ZeRO 1" "ZeRO 2" "ZeRO 3" --json "$logs/step.json" --plot "$logs/step.png"
else
  echo "== step: skipped, timm or transformers is not installed"
fi
step topk 60 "$python" bench/topk.py --cases market1501 few --rounds 10 --json "$logs/topk.json" --plot "$logs/topk.png"
step large 120 "$python" bench/topk.py --cases large --rounds 3 --json "$logs/topk_large.json"
if "$python" -c "import pyarrow" 2> /dev/null; then
  step rank 60 "$python" bench/rank.py --rounds 10 --json "$logs/rank.json" --plot "$logs/rank.png"
else
  echo "== rank: skipped, pyarrow is not installed"
fi
if command -v compute-sanitizer > /dev/null; then
  step sanitizer 90 compute-sanitizer --error-exitcode 9 "$python" -m pytest -q -m gpu -k "normal or equal" \
    tests/test_topk.py tests/test_rank.py
  step sanitizer_attention 90 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9 \
    "$python" -m pytest -q -m gpu -k "lengths and bfloat16" tests/test_attention.py
  step sanitizer_triplet 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9 \
    "$python" -m pytest -q -m gpu -k "rows or few_bits" tests/test_triplet.py
else
  echo "== sanitizer: skipped, compute-sanitizer is not installed"
fi
step compile_report 120 "$python" bench/compile_report.py --json "$logs/compile_report.json"
step triplet 90 "$python" bench/triplet.py --samples 128 1024 8192 --rounds 15 --json "$logs/triplet.json" \
  --plot "$logs/triplet.png"
step attention 160 "$python" bench/attention.py --batch 32 256 --rounds 15 --json "$logs/attention.json" \
  --plot "$logs/attention.png"
git rev-parse HEAD > "$logs/commit" 2> /dev/null || true
tar -cf "$out/gpu-check.tar" -C "$logs" .
echo "written to $out/gpu-check.tar"
exit $failed
