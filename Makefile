# Each target sets itself up on a fresh machine: a virtual environment, the packages, the build.
PYTHON ?= python3
VENV ?= .venv
TRITON36 := .venv-triton36
# The GPU that is present, or sm_90 alone where there is nvcc but no GPU.
ARCH := $(or $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | tr -d . | sort -u | paste -sd';'),90)
export R2KERNELS_CUDA_ARCH ?= $(ARCH)
EMULATED := tests/emulate tests/test_losses.py $(addprefix tests/regularizers/test_,terms.py weight_stats.py sampled_std.py) \
	$(wildcard tests/*/test_backends.py)
SOURCES := pyproject.toml setup.py constraints.txt $(shell find csrc -type f)

.PHONY: demo test sanitize emulate bench paper gpu-check lint format clean

demo: $(VENV)/.built
	$(VENV)/bin/r2kernels demo --force

test: $(VENV)/.built $(TRITON36)/.built
	$(VENV)/bin/python -m pytest tests

# AddressSanitizer and UndefinedBehaviorSanitizer over the extension on the CPU: every op, and the tests of files and of
# k-means, on a build of its own in build/sanitize, which takes most of some ten minutes on two cores. Ends at the first
# report. Needs g++.
sanitize: $(VENV)/.built
	$(VENV)/bin/pip install --disable-pip-version-check -q -c constraints.txt setuptools pybind11 ninja
	$(VENV)/bin/python tests/sanitize/run.py

# The CUDA kernels on the host, their threads as fibers, in both orders of blocks and threads: the tests of backends of
# all families. Needs g++.
emulate: $(VENV)/.built
	$(VENV)/bin/python -m pytest --backend emulated $(EMULATED)

bench: $(VENV)/.built
	$(VENV)/bin/python -m pytest benchmarks/bench_range_losses.py -q --benchmark-quiet -rs
	$(VENV)/bin/python -m pytest benchmarks/bench_dkm.py -q --benchmark-quiet -rs
	$(VENV)/bin/python -m pytest benchmarks/bench_quantizers.py -q --benchmark-quiet -rs
	$(VENV)/bin/python -m pytest benchmarks/bench_kmeans.py -q --benchmark-quiet -rs --bench-seconds 240 --bench-case-seconds 0.5

# The paper's tables in shape, on digits: about a quarter of an hour on two cores.
# `make paper PAPER="--full"` takes hours.
paper: $(VENV)/.built
	$(VENV)/bin/python benchmarks/paper $(PAPER)

lint: $(VENV)/.built
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	find csrc tests/emulate -type f ! -name '*.py*' | xargs $(VENV)/bin/clang-format --dry-run -Werror

# Rewrites what the linters would: imports and layout of Python, layout of C++ and CUDA.
format: $(VENV)/.built
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	find csrc tests/emulate -type f ! -name '*.py*' | xargs $(VENV)/bin/clang-format -i

# On a machine with a GPU, with the interpreter it is given (torch, triton, setuptools, pybind11, ninja, pytest);
# fetches nothing. `make gpu-check STAGE=smoke`: one of smoke, tests, graphs, kernels, bench, each within nine minutes.
STAGE ?= all
RESULTS ?= build/gpu-check
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py $(STAGE) --results $(RESULTS)

$(VENV)/.built: $(SOURCES)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --disable-pip-version-check -q -c constraints.txt -e '.[test,bench]'
	touch $@

# Register counts and instruction counts differ between Triton versions; the tests hold the one that GPUs run today.
$(TRITON36)/.built:
	test -x $(TRITON36)/bin/python || $(PYTHON) -m venv $(TRITON36)
	$(TRITON36)/bin/pip install --disable-pip-version-check -q triton==3.6.0 && touch $@ || echo "triton 3.6.0 could not be installed; the tests will use the installed Triton"

clean:
	rm -rf $(VENV) $(TRITON36) build *.egg-info r2kernels/*.so
