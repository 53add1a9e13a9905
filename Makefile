# make demo | make test | make test-slow | make check: each works from a fresh clone (Python >= 3.10, a C++ compiler,
# the package index).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV = $(shell command -v uv || echo $(BIN)/uv)
PORT ?= 29517
# Two processes of one thread are half as fast again as one of two threads; with GPUs: one rank each, all of them.
RANKS = $(shell nvidia-smi -L > /dev/null 2>&1 || test "$$(nproc)" -lt 2 || echo --num_gpus 2)
PYTEST = $(BIN)/python -m pytest -q -n 2 --dist loadgroup

.PHONY: demo test test-slow check format lock install clean gpu-check

demo: install
	$(BIN)/deepspeed $(RANKS) --master_port $(PORT) recipes/mtl.py --check

test: install
	$(PYTEST) -m "not gpu and not slow" tests

# What takes minutes: among it the GPU's kernels in Triton's interpreter, and tests/mutate.py, which plants defects that
# the tests have to notice.
test-slow: install
	$(PYTEST) -m "slow and not gpu" tests
	TRITON_INTERPRET=1 $(PYTEST) -m "not gpu" tests/test_attention.py tests/test_triplet.py

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(VENV)/.built

# The locked set; untouched while the lock is unchanged.
$(VENV)/.locked: requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	command -v uv > /dev/null || test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv
	$(UV) pip sync --quiet --python $(BIN)/python requirements.lock
	touch $@

# The checkout itself, in place, with kernels._C.
$(VENV)/.built: $(VENV)/.locked setup.py pyproject.toml $(wildcard csrc/*)
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	touch $@

# On a machine with a GPU, with that machine's own python: no environment, no network.
gpu-check:
	PYTHON=$(PYTHON) bench/gpu_check.sh

lock:
	$(UV) pip compile --quiet --universal --python-version 3.10 --generate-hashes --extra dev --allow-unsafe \
	  --no-emit-index-url --custom-compile-command "make lock" --output-file requirements.lock pyproject.toml

clean:
	rm -rf $(VENV) build *.egg-info kernels/_C*.so
