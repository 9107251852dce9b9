# `make help` lists the targets. Everything runs inside .venv, which `make setup` fills once.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# The first that really runs and is new enough (a version manager's shim may be on the PATH and not run).
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.slipstream-setup
# The range that the worker extra allows. Installed first: an open range takes other builds of several GB.
TORCH ?= torch>=2.11,<2.14
EXTRAS ?= server,worker,media,train,k8s,postgres,s3,otel,dev
PYTEST_WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$(( n > 4 ? 4 : n )))
# pip does not byte-compile: Python does it for the modules that are used, which saves a minute of setup.
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help setup test lint format types imports unit slow faults soak test-parity test-kernels test-clients test-deploy demo bench-serving bench-loading bench-adapters bench-peers bench-engine bench-gpu bench-tasks bench-kv profile-engine proto clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-14s %s\n", $$1, $$2}'

setup: $(STAMP) ## make .venv and install everything into it (again only when pyproject.toml changed)

$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed (PYTHON=/path/to/it make setup)" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "[1/3] virtual environment ($(PYTHON))"; "$(PYTHON)" -m venv $(VENV); }
	@echo "[2/3] torch"
	@$(PIP) install --progress-bar on --no-compile '$(TORCH)'
	@echo "[3/3] slipstream[$(EXTRAS)]"
	@$(PIP) install --progress-bar on --no-compile --prefer-binary -e '.[$(EXTRAS)]'
	@touch $@

test: lint types imports unit ## lint, types, import rules and every test that is neither slow nor for a GPU

lint: $(STAMP) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## rewrite with ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP) ## mypy, strict
	$(BIN)/mypy

imports: $(STAMP) ## the import rules between the rooms
	$(BIN)/lint-imports

# One thread per process: two test processes with two OpenMP threads each on two cores are slower than one.
unit: $(STAMP) ## pytest
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist loadfile $(PYTEST_ARGS)

slow: $(STAMP) ## the tests that take minutes
	$(BIN)/python -m pytest -m 'slow and not gpu' $(PYTEST_ARGS)

faults: $(STAMP) ## killed processes, full disks, crowds, slow readers: what must survive
	$(BIN)/python -m pytest -m 'slow and not gpu' tests/faults $(PYTEST_ARGS)

SOAK_MINUTES ?= 20
soak: $(STAMP) ## mixed traffic for SOAK_MINUTES: memory flat, nothing stuck, everything ended once, as a JSON line
	OMP_NUM_THREADS=1 PYTHONPATH=tests:. $(BIN)/python -m tests.faults.soak --minutes $(SOAK_MINUTES) --json $(SOAK_ARGS)

test-parity: $(STAMP) ## tasks against the pipelines of Transformers 4.57 (golden files) and of the installed release (live)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not gpu' tests/parity $(PYTEST_ARGS)

test-kernels: $(STAMP) ## the GPU's attention kernels on a CPU, under Triton's interpreter (needs triton)
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit/engine/test_gpu_memory.py $(PYTEST_ARGS)

test-clients: $(STAMP) ## the clients in other languages, against live services (needs Node)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m clients tests/clients $(PYTEST_ARGS)

test-deploy: $(STAMP) ## images, Helm chart and compose files: rendered, validated, tried (fetches tools into .env-deploy)
	$(BIN)/python -m tests.deploy.toolchain
	$(BIN)/python -m pytest -m deploy tests/deploy $(PYTEST_ARGS)

demo: $(STAMP) ## start everything on this machine with a small real model, and use it
	$(BIN)/python clients/python/demo.py

bench-serving: $(STAMP) ## batching against one at a time, and the hop, as JSON lines
	$(BIN)/python -m tests.bench.serving

bench-loading: $(STAMP) ## what loading a second model costs those who stream from the first, as a JSON line
	$(BIN)/python -m tests.bench.loading

bench-adapters: $(STAMP) ## what adapters in the batch cost, as JSON lines
	$(BIN)/python -m tests.bench.adapters

bench-peers: $(STAMP) ## set up what bench-engine and bench-tasks measure against, in .peers (5 GB)
	$(BIN)/python -m tests.bench.peers.setup

bench-engine: $(STAMP) ## the engine against vLLM, generate and Transformers' continuous batching (BENCH_ARGS=--help)
	$(BIN)/python -m tests.bench.engine $(BENCH_ARGS)

bench-tasks: $(STAMP) ## embeddings and classification for 64 callers against pipelines and mosec, as JSON lines (BENCH_ARGS=--help)
	$(BIN)/python -m tests.bench.tasks $(BENCH_ARGS)

bench-gpu: $(STAMP) ## the continuous engine on a GPU: against the bandwidth floor, generate and Transformers (BENCH_ARGS=--help)
	$(BIN)/python -m tests.bench.gpu_engine $(BENCH_ARGS)

bench-kv: $(STAMP) ## keys and values in blocks against dense slots, concatenation and gathered copies (BENCH_ARGS=--help)
	$(BIN)/python -m tests.bench.kv_layout $(BENCH_ARGS)

profile-engine: $(STAMP) ## where a decoding step on a CPU spends its time, against what the cores can do (BENCH_ARGS=--help)
	$(BIN)/python -m tests.bench.engine_profile $(BENCH_ARGS)

proto: $(STAMP) ## write the stubs anew from the .proto files
	$(BIN)/python protos/generate.py

clean: ## remove what the tools left behind, but not .venv
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
