# Two commands are enough: `make quickstart` and `make test`. Both make .venv with what they need.
PYTHON ?= python3
BIN := .venv/bin
# the one place where torch's version stands is constraints.txt
TORCH := $(shell sed -n 's/^\(torch==[^; ]*\).*/\1/p' constraints.txt)

# a benchmark that fails must not be hidden by the `tee` behind it
SHELL := bash
.SHELLFLAGS := -eo pipefail -c

# OpenMP threads that spin while they wait cost a factor of ten on a machine that is also doing something else
export OMP_WAIT_POLICY ?= PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help quickstart controls test test-all test-gpu test-peers check docs bench bench-step bench-stream bench-gpu bench-warm-starts bench-report
.PHONY: bench-analyses validation clean

help:
	@echo "make quickstart  train a small LLM, follow an SAE through its training, analyse (minutes, 2 CPU cores)"
	@echo "make test        run the tests, without the slow ones and those that need a GPU or the Hub"
	@echo "make test-all    the slow ones too"
	@echo "make test-gpu    those that need a GPU"
	@echo "make test-peers  open what we export in the packages it is for, in an environment of their own"
	@echo "make check       ruff, format and mypy"
	@echo "make docs        the documentation as a site, in build/site"
	@echo "make bench       measure beside SAELens, sparsify and dictionary_learning (an hour, 2 CPU cores)"
	@echo "make bench-gpu   the same on a GPU, and a series of pythia-410m's shape (ten minutes of an H100)"
	@echo "make bench-warm-starts  every way to begin a stage, for docs/warm-starts.md (two hours of one core)"
	@echo "make bench-analyses  time and memory of the analyses, by LLM checkpoints and by features (ten minutes)"
	@echo "make controls    all controls of the quickstart, and its analyses beside them (an hour, 2 CPU cores)"
	@echo "make validation  plant features, and see whether the instruments find them (an hour)"

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

QUICKSTART := runs/quickstart/gpt_neox.layers.2

quickstart: .venv/.package
	$(BIN)/saetrack fit --config configs/quickstart.yaml
	@$(MAKE) --no-print-directory $(QUICKSTART)/report.html

# one null step, so that drift and identity stand beside what training once more does by itself
$(QUICKSTART)/report.html:
	$(BIN)/saetrack control runs/quickstart --kind null --positions '[5]' --replicas 2
	$(BIN)/saetrack analyze runs/quickstart --analyses+=Quality --analyses+=Drift --analyses+=Identity --analyses+=Phases
	$(BIN)/saetrack report runs/quickstart

test: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist worksteal -m "not slow and not gpu and not network"

test-all: .venv/.dev
	$(BIN)/pytest -q -m "not gpu and not network"

test-gpu: .venv/.dev
	$(BIN)/pytest -q -m gpu tests/unit

check: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# the site in build/site, from docs/ and the docstrings; a warning is an error
docs: .venv/.dev
	$(BIN)/pip install -q -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The peers have an environment of their own: they are no dependencies, and their pins are not ours.
.venv-bench/.peers: constraints.txt pyproject.toml benchmarks/requirements.txt benchmarks/requirements-no-deps.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/pip install -q $(TORCH)
	.venv-bench/bin/pip install -q -c constraints.txt -e . -r benchmarks/requirements.txt
	.venv-bench/bin/pip install -q --no-deps -r benchmarks/requirements-no-deps.txt
	@touch $@

runs/bench-llm/step512: | .venv-bench/.peers
	.venv-bench/bin/saetrack pretrain runs/bench-llm --steps 512

BENCH := .venv-bench/bin/python benchmarks
# An allocator that keeps what is freed: without it every large temporary is zeroed anew by the system.
TUNED := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=16000000000 MALLOC_TOP_PAD_=8000000000

# every benchmark prints lines of JSON (benchmarks/measuring.py), and the table is of all that lie in runs/bench
bench: bench-step bench-stream
	@$(BENCH)/table.py runs/bench/*.jsonl | tee runs/bench/table.md

# a training step: speed, memory and accuracy beside the other packages, and on two processes
bench-step: .venv-bench/.peers runs/bench-llm/step512
	@mkdir -p runs/bench
	$(BENCH)/step.py | tee runs/bench/1-step.jsonl
	$(TUNED) $(BENCH)/step.py --only topk | tee runs/bench/2-step-tuned.jsonl
	$(BENCH)/step_memory.py | tee runs/bench/3-memory.jsonl
	$(BENCH)/accuracy.py runs/bench-llm | tee runs/bench/4-accuracy.jsonl
	$(BENCH)/architectures.py runs/bench-llm | tee runs/bench/5-architectures.jsonl
	$(BENCH)/ddp.py | tee runs/bench/6-ddp.jsonl

# tokens a second from rows to trained SAE, beside the other packages' loops; the LLM's dtype; memory of the process
bench-stream: .venv-bench/.peers runs/bench-llm/step512
	@mkdir -p runs/bench
	$(BENCH)/stream.py runs/bench-pythia | tee runs/bench/7-stream.jsonl
	$(BENCH)/llm_dtype.py runs/bench-llm | tee runs/bench/8-llm-dtype.jsonl
	$(BENCH)/memory.py runs/bench-memory | tee runs/bench/9-process-memory.jsonl

# on a machine with a GPU
bench-gpu: .venv-bench/.peers
	@mkdir -p runs/bench
	$(BENCH)/step_gpu.py | tee runs/bench/gpu-1-step.jsonl
	$(BENCH)/stream_gpu.py runs/bench-pythia-gpu | tee runs/bench/gpu-2-stream.jsonl
	$(BENCH)/series_gpu.py runs/bench-pythia-410m | tee runs/bench/gpu-3-series.jsonl

test-peers: .venv-bench/.peers
	.venv-bench/bin/pytest -q -m peers tests/peers

# the quickstart's LLM, one of 6 layers, and the first trained on; about two hours of one core
bench-warm-starts: .venv/.package
	$(BIN)/saetrack pretrain runs/warm-starts/llm4 --steps 320
	$(BIN)/saetrack pretrain runs/warm-starts/llm6 --steps 320 --n_layers 6 --d_model 96 --batch_size 16 --seed 1
	$(BIN)/python benchmarks/warm_starts.py runs/warm-starts/llm4 runs/warm-starts/llm6 runs/warm-starts
	$(BIN)/python benchmarks/warm_start_page.py runs/warm-starts/results.jsonl docs
	$(BIN)/saetrack pretrain runs/warm-starts/llm4-late --steps 1280 --every 16
	$(BIN)/python benchmarks/warm_start_gaps.py runs/warm-starts/llm4-late runs/warm-starts

# how fast a report opens and answers in Chromium: the quickstart's, and one of 30 checkpoints x 4,096 features
runs/report-bench/track: | .venv/.dev
	$(BIN)/python benchmarks/report_track.py runs/report-bench

bench-report: .venv/.dev | runs/report-bench/track
	$(BIN)/saetrack report runs/quickstart
	$(BIN)/saetrack report runs/report-bench/track
	$(BIN)/python benchmarks/report.py runs/quickstart/*/report.html runs/report-bench/track/report.html

# what the analyses of the quickstart cost, and how that grows
bench-analyses: .venv/.package
	$(BIN)/python benchmarks/analysis_cost.py runs/quickstart | tee runs/bench-analyses.jsonl

# all that docs/findings.md compares with; what is there is not trained again
controls: .venv/.package
	$(BIN)/saetrack control runs/quickstart --kind null
	$(BIN)/saetrack control runs/quickstart --kind replica
	$(BIN)/saetrack control runs/quickstart --kind null --chain true --replicas 2
	$(BIN)/saetrack control runs/quickstart --kind scratch --replicas 2
	$(BIN)/saetrack control runs/quickstart --kind scratch --replicas 2 --budget first
	$(BIN)/saetrack control runs/quickstart --kind random --replicas 1
	for thin in 1 2 4; do $(BIN)/saetrack control runs/quickstart --kind thinned --thin $$thin --replicas 1; done
	for thin in 2 4; do $(BIN)/saetrack control runs/quickstart --kind thinned --thin $$thin --replicas 1 --budget total; done
	for start in prior recentred; do $(BIN)/saetrack control runs/quickstart --kind thinned --replicas 1 --warm_start $$start; done
	for chain in $(QUICKSTART)/controls/null-chain-*; do \
	  $(BIN)/saetrack analyze $$chain --analyses+=Drift --analyses+=Semantics; done
	$(BIN)/saetrack analyze $(QUICKSTART)/controls/random-0
	$(BIN)/saetrack analyze runs/quickstart
	$(BIN)/saetrack analyze runs/quickstart --only_kept true

validation: .venv/.package
	$(BIN)/python benchmarks/validation.py runs/validation --controls
	PYTHONPATH=. $(BIN)/python benchmarks/validation_simulated.py

clean:
	rm -rf .venv .venv-bench .mypy_cache .ruff_cache .pytest_cache
