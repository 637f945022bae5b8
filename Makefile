# Every target sets up what it needs. Only python3 (3.11 or 3.12) and make must be there before.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Files of tests run side by side, in the order of their names: the longest tests are in launch/, so they come first.
TEST_PROCESSES ?= 2
PYTEST := $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder
export PYTHONUNBUFFERED := 1

.PHONY: help setup demo test test-all gpu check format lock ui clean

help:
	@echo "make setup      a virtual environment in $(VENV) with the exact versions of requirements.lock (about 6 GB)"
	@echo "make demo       shards, two-process training, evaluation and MLflow on handwritten digits, under 10 minutes"
	@echo "make test       the fast tests, about a quarter of an hour on 2 cores"
	@echo "make test-all   the slow ones too"
	@echo "make gpu        on a machine with a GPU: its tests, the benchmark tables, a quarter of an hour of CIFAR-10 (OUT=gpu)"
	@echo "make check      format, lint and types"
	@echo "make ui         the MLflow page of the runs here"
	@echo "make lock       requirements.lock anew from pyproject.toml"

setup: $(VENV)/.ready

$(VENV)/.ready: requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.11 or 3.12, or: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || { echo "error: $$($(PYTHON) --version) found, Python 3.11 or 3.12 needed; choose one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "error: $(PYTHON) has no venv module; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip sync --quiet --compile-bytecode --python $(BIN)/python requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@

demo: setup
	$(BIN)/python launch/demo.py

test: setup
	$(PYTEST) -m "not slow" $(ARGS)

test-all: setup
	$(PYTEST) $(ARGS)

gpu: setup
	PATH=$(abspath $(BIN)):$$PATH tests/gpu/check.sh

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

RUNS ?= runs
PORT ?= 5000
ui: setup
	@test -f $(RUNS)/mlflow.db || { echo "error: no $(RUNS)/mlflow.db here yet; train something (make demo) or name the directory of the runs: make ui RUNS=DIR"; exit 1; }
	@echo "MLflow will be at http://127.0.0.1:$(PORT) in a few seconds; Ctrl-C ends it"
	@MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(BIN)/mlflow server --workers 1 --port $(PORT) \
		--backend-store-uri sqlite:///$(abspath $(RUNS))/mlflow.db --artifacts-destination $(abspath $(RUNS))/mlartifacts

lock:
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --all-extras --no-emit-index-url --no-header \
		pyproject.toml --output-file requirements.lock

clean:
	rm -rf $(VENV) build *.egg-info
