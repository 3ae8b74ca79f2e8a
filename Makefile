# Every target starts from a bare clone: `setup` makes .venv and returns at once when it is up to date.
SHELL := /bin/sh
VENV := .venv/bin
# One thread a process: the multi-rank tests start several, and more would fight over the cores.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
# Two workers; each takes the next group of tests, the longest first (tests/conftest.py).
PYTEST = $(VENV)/python -m pytest -n 2 --dist loadfile
SLOW_LIMIT ?= 60m
# Extra words for the demo or for pytest: make demo ARGS="--seed 1", make test ARGS="-k loss -x"
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo check test test-fast invariance parity mutants test-slow test-gpu bench-memory clean

##@ Set up and run
help:  ## This list
	@awk -F ':.*## ' '/^##@ /{printf "%s%s\n", (groups++ ? "\n" : ""), substr($$0, 5)} \
		/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:  ## .venv with the package in it (EXTRAS=dev,bench PYTHON=...)
	@tools/setup.sh

demo: setup  ## A small model from data to answers, before and after
	@$(VENV)/python examples/demo/run.py $(ARGS)

##@ Test
check: setup  ## Format, lint and types
	$(VENV)/ruff format --check .
	$(VENV)/ruff check .
	$(VENV)/pyright

test: setup check  ## check, unit tests, multi-rank CPU tests: 12 minutes
	$(TEST_ENV) $(PYTEST) -m "not slow and not gpu" $(ARGS)

test-fast: setup check  ## check, cheap units, a case of each law: 3 minutes
	$(TEST_ENV) $(PYTEST) -m "fast and not slow and not gpu" $(ARGS)

invariance: setup  ## Every layout against one process (ARGS="--only CP2", --full)
	@OMP_NUM_THREADS=1 $(VENV)/python tests/harness/matrix.py $(ARGS)

parity: setup  ## Model families against transformers (ARGS="--only qwen")
	@OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(VENV)/python tests/harness/family_parity.py $(ARGS)

mutants:  ## Break the code: the tests must see it (ARGS="a word": some)
	@EXTRAS=dev,mutants tools/setup.sh
	$(TEST_ENV) $(VENV)/python tests/mutations/patches.py $(ARGS)
	$(if $(ARGS),,$(TEST_ENV) $(VENV)/python tests/mutations/survivors.py)

test-slow: setup  ## The full product of cases; ended after SLOW_LIMIT=60m
	$(TEST_ENV) timeout -s INT $(SLOW_LIMIT) $(PYTEST) -m "slow and not gpu" $(ARGS)

test-gpu: $(if $(NO_VENV),,setup)  ## GPU tests, measurements (NO_VENV=1 PYTHON=...: no .venv)
	@PYTHON=$(if $(NO_VENV),$(or $(PYTHON),python3),$(VENV)/python) benchmarks/gpu_suite.sh $(ARGS)

##@ Measure
bench-memory: setup  ## Memory by group size, of log-probabilities: 10 minutes
	$(TEST_ENV) $(VENV)/python benchmarks/memory_vs_group_size.py $(ARGS)
	$(TEST_ENV) $(VENV)/python benchmarks/logprobs_memory.py

##@ House keeping
clean:  ## Remove .venv, caches and build leftovers (runs/ stays)
	rm -rf .venv build dist mutants *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
