# Two commands are enough: `make quickstart` and `make test`. Both make .venv with what they need.
PYTHON ?= python3
BIN := .venv/bin
# the one place where torch's version stands is constraints.txt
TORCH := $(shell sed -n 's/^\(torch==[^; ]*\).*/\1/p' constraints.txt)

# OpenMP threads that spin while they wait cost a factor of ten on a machine that is also doing something else
export OMP_WAIT_POLICY ?= PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help quickstart test test-all check clean

help:
	@echo "make quickstart  train a small LLM, follow an SAE through its training, analyse (minutes, 2 CPU cores)"
	@echo "make test        run the tests, without the slow ones and those that need a GPU or the Hub"
	@echo "make test-all    the slow ones too"
	@echo "make check       ruff, format and mypy"

# torch comes first and alone: asked for by another package, pip would take the newest, a CUDA build of gigabytes
.venv/.torch: constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q $(TORCH)
	@touch $@

.venv/.package: .venv/.torch pyproject.toml
	$(BIN)/pip install -q -c constraints.txt -e .
	@touch $@

.venv/.dev: .venv/.package
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

quickstart: .venv/.package
	$(BIN)/saetrack fit --config configs/quickstart.yaml

test: .venv/.dev
	$(BIN)/pytest -q -m "not slow and not gpu and not network"

test-all: .venv/.dev
	$(BIN)/pytest -q -m "not gpu and not network"

check: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache
