# Everything Twostroke does from a fresh clone, on a machine with CPython 3.11, a C++ compiler and make.
#
# Each target sets up what it needs: the virtual environment (.venv), the pinned dependencies, the
# native kernels and the model. Stamp files under .venv say what is done, so nothing is installed or
# built twice; removing .venv starts afresh. `make help` lists the targets.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
MODEL = smollm2-135m
PROMPT = What is the capital of France, and what is it known for?
export MODEL PROMPT
SEEDS = 10000
FROM = 0

# The exact versions hold for what is installed and for what builds it, isolated builds included.
export PIP_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
NATIVE_SOURCES := CMakeLists.txt $(shell find native -type f 2>/dev/null)

.PHONY: help setup run serve test check lint unit dst docs bench bench-gpu bench-peers clean

help:  ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' Makefile

run: setup  ## Answer one prompt with a real model and show both strokes (MODEL=, PROMPT=).
	@$(BIN)/twostroke pull "$$MODEL"
	@$(BIN)/twostroke generate "$$MODEL" --prompt "$$PROMPT" --max-tokens 128

serve: setup  ## Serve MODEL over the OpenAI-compatible API.
	@$(BIN)/twostroke pull "$$MODEL"
	@$(BIN)/twostroke serve "$$MODEL"

# `make test` is `make check` with the real-model and slow tests added to the same run of pytest, so
# that its closing line counts every test.
test: setup lint $(STAMPS)/torch  ## Pull both models, then run everything `check` runs and the real-model tests.
	@$(BIN)/twostroke pull smollm2-135m
	@$(BIN)/twostroke pull gemma3-270m
	@echo "== tests: unit, slow and real-model"
	@$(BIN)/python -m pytest

check: lint unit  ## Format, lint, types, import rules, size rules and unit tests: no model needed.

lint: setup
	@echo "== format, lint, types, import rules"
	@$(BIN)/ruff format --check --quiet . || { $(BIN)/ruff format --check .; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache > $(STAMPS)/lint-imports.log || { cat $(STAMPS)/lint-imports.log; exit 1; }

unit: setup lint $(STAMPS)/torch
	@echo "== tests: unit"
	@$(BIN)/python -m pytest -m "not real_model and not slow"

# Seeds are independent: SEEDS and FROM choose them, SEED replays one and prints all that happens.
dst: setup  ## Simulate SEEDS (10000) random worlds of arrivals and faults under every law; SEED=n replays one.
	@PYTHONPATH=tests $(BIN)/python -m dst $(if $(SEED),--seed $(SEED),--seeds $(SEEDS) --from $(FROM) --jobs 2)

docs: setup  ## Write anew what is made from the code: the command line, the claims, the notebooks.
	@$(BIN)/python -m twostroke.cli.reference > docs/reference/cli.md
	@$(BIN)/python -m twostroke.lab.claims > docs/claims.md
	@$(BIN)/python -m twostroke.lab.notebooks docs/lab

bench: setup  ## Measure MODEL beside this machine's limits and every installed peer (BENCH=options).
	@case "$$MODEL" in *-synthetic) ;; *) $(BIN)/twostroke pull "$$MODEL";; esac
	@$(BIN)/python -m twostroke.bench --models "$$MODEL" $(BENCH)

bench-gpu: setup $(STAMPS)/torch  ## Measure the engine, its peers and the card on this machine's GPU (BENCH=options).
	@$(BIN)/python -m twostroke.bench.gpu $(BENCH)

bench-peers: setup  ## Install llama.cpp, OpenVINO, Transformers and vLLM for `make bench`.
	@$(BIN)/python -m twostroke.bench.install

clean:  ## Remove builds, caches and virtual environments; pulled models stay.
	rm -rf build dist $(VENV) .venv-peers* .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- set-up -------------------------------------------------------------------------------------

setup: $(STAMPS)/package
	@:

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: Twostroke needs Python 3.11 or newer and '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." \
			"Name another one: make PYTHON=python3.11 ..." >&2; exit 1; }
	@echo "== virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS)
	@touch $@

$(STAMPS)/dependencies: pyproject.toml constraints.txt $(STAMPS)/venv
	@echo "== dependencies at the versions in constraints.txt (about a minute the first time)"
	@$(BIN)/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb")); \
		print(*p["build-system"]["requires"], *p["project"]["dependencies"], \
		*p["project"]["optional-dependencies"]["dev"], sep="\n")' > $(STAMPS)/requirements.txt
	@$(BIN)/python -m pip install --quiet --requirement $(STAMPS)/requirements.txt
	@touch $@

# PyTorch is large, and only the GPU's backend and its tests need it.
$(STAMPS)/torch: pyproject.toml constraints.txt $(STAMPS)/dependencies
	@echo "== PyTorch and Triton, for tests and for GPUs"
	@$(BIN)/python -m pip install --quiet $$($(BIN)/python -c 'import tomllib; \
		p = tomllib.load(open("pyproject.toml", "rb")); \
		print(*p["project"]["optional-dependencies"]["cuda"])')
	@touch $@

# The Python sources are used where they lie (an editable install); only a change to the native code
# or to the package's description builds again, and then only the files that changed. Bytecode is
# written here as an ordinary installation writes it, also where Python is told not to do so itself.
$(STAMPS)/package: $(NATIVE_SOURCES) $(STAMPS)/dependencies
	@echo "== native kernels"
	@$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	@$(BIN)/python -m compileall -q src
	@touch $@
