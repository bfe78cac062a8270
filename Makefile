# Each target makes what it needs: a virtual environment in .venv, with this package in
# editable mode and the extras that the target names. Needs Python >= 3.11 with pip.
#   make test PYTHON=python3.12             another interpreter (remove .venv first)
#   make test PYTEST_ARGS="-n 2 -k dense"   options for pytest
#   make bench BENCH_ARGS=--quick           options for benchmarks/bench.py
#   make gpu GPU_ARGS=--table              options for benchmarks/gpu.py
#   make fuzz FUZZ_COUNT=100 FUZZ_SEED=7    how many random programs, and which
PYTHON ?= python3
# Each process gets half of the tests as they stand, so that those of one module share
# what it caches.
PYTEST_ARGS ?= -n 2 --dist worksteal
BENCH_ARGS ?=
GPU_ARGS ?=
FUZZ_COUNT ?= 5000
FUZZ_SEED ?= 1

VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest

# JAX's own threads and OpenBLAS's would fight over the cores.
export OPENBLAS_NUM_THREADS := 1

.NOTPARALLEL:
.PHONY: test test-slow fuzz faults kills compiled-check doctest lint format types
.PHONY: docs site-check dist clean bench gpu opponents
.PHONY: examples demo classifier language-model wavefunction pde uncertainty influence
.PHONY: paper data-parallel multi-process

test: $(VENV)/test.stamp
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

# Some of these train the examples and the experiments.
test-slow: $(VENV)/test.stamp $(VENV)/experiments.stamp
	$(PYTEST) -m "slow and not full" --ignore=tests/fuzz $(PYTEST_ARGS)

# Random programs. CI runs 200, of seed 0.
fuzz: $(VENV)/test.stamp
	FUZZ_COUNT=$(FUZZ_COUNT) FUZZ_SEED=$(FUZZ_SEED) \
	  $(PYTEST) tests/fuzz $(PYTEST_ARGS)

# Every fault in every configuration, and the long runs: docs/reliability.md.
faults: $(VENV)/test.stamp
	$(PYTEST) tests/reliability/test_faults.py tests/reliability/test_long_runs.py \
	  $(PYTEST_ARGS)

# After a change that is meant to cost more: benchmarks/compiled.py --record.
compiled-check: $(VENV)/experiments.stamp
	$(BIN)/python benchmarks/compiled.py --check

# Training processes that are killed a hundred times; the slow tests kill a few.
kills: $(VENV)/test.stamp
	KFAC_KILLS=100 $(PYTEST) -rP tests/reliability/test_kills.py

doctest: $(VENV)/test.stamp $(VENV)/docs.stamp
	$(PYTEST) --doctest-modules --doctest-glob="*.md" kfac_jax docs README.md

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/dev.stamp
	$(BIN)/pyright

docs: $(VENV)/docs.stamp
	$(BIN)/sphinx-build --fail-on-warning --keep-going docs site

# Every page in a browser, 1280 and 390 pixels wide. Needs Chromium.
site-check: $(VENV)/docs.stamp docs
	$(BIN)/python docs/check_site.py

# sdist and wheel, as they are published.
dist: $(VENV)/dev.stamp
	rm -rf build dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

# Two programs to copy, each of one file: a minute or so together.
examples: $(VENV)/examples.stamp
	$(BIN)/python examples/plain_jax.py
	$(BIN)/python examples/flax_nnx.py

demo: $(VENV)/experiments.stamp
	$(BIN)/python experiments/autoencoder.py

classifier: $(VENV)/experiments.stamp
	$(BIN)/python experiments/classifier.py

language-model: $(VENV)/experiments.stamp
	$(BIN)/python experiments/language_model.py

wavefunction: $(VENV)/experiments.stamp
	$(BIN)/python experiments/wavefunction.py

pde: $(VENV)/experiments.stamp
	$(BIN)/python experiments/pde.py

influence: $(VENV)/experiments.stamp
	$(BIN)/python experiments/influence.py

uncertainty: $(VENV)/experiments.stamp
	$(BIN)/python experiments/uncertainty.py
	$(BIN)/python experiments/regression.py

paper: $(VENV)/experiments.stamp
	$(BIN)/python experiments/paper.py

data-parallel: $(VENV)/experiments.stamp
	$(BIN)/python experiments/data_parallel.py

multi-process: $(VENV)/experiments.stamp
	$(BIN)/python experiments/multi_process.py --processes 2

# This library beside others, see docs/performance.md.
bench: $(VENV)/bench.stamp opponents
	$(BIN)/python benchmarks/bench.py $(BENCH_ARGS)

# What steps cost on a GPU, in about seven minutes. Needs JAX for it in .venv, as by
# .venv/bin/pip install "jax[cuda13]".
gpu: $(VENV)/test.stamp
	$(BIN)/python benchmarks/gpu.py $(GPU_ARGS)

# .venv-published and others, if they are missing. That one cannot be made is no failure,
# as `bench` shows why.
opponents: $(VENV)/bench.stamp
	$(BIN)/python benchmarks/environments.py

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest build dist site jupyter_execute
	rm -rf $(VENV)-published $(VENV)-published-jax $(VENV)-shampoo $(VENV)-psgd
	rm -rf benchmarks/results

# .venv/EXTRA.stamp: the package is installed with that extra of setup.cfg.
$(VENV)/%.stamp: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --editable ".[$*]"
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
