# All targets except help and clean set up the environment first, if needed. PYTHON selects the interpreter, VENV the folder.
PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
RUN := PATH="$(BIN):$$PATH"

.PHONY: help install demo dashboard lint test test-all soak clean
KILLS ?= 200

help:
	@echo "make demo       train on 2 processes with generated images (a minute after the set-up, on two fast cores)"
	@echo "make dashboard  start TensorBoard for runs/"
	@echo "make test       run the linters and the fast tests (about 10 minutes on two fast cores)"
	@echo "make test-all   run the linters and all tests"
	@echo "make soak       kill real runs KILLS=200 times and compare them with uninterrupted runs (half an hour)"
	@echo "make lint       run ruff, mypy --strict and shellcheck"
	@echo "make install    set up $(VENV) with all dependencies"
	@echo "make clean      remove $(VENV) and caches, but not runs/ and data/"

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "== Setting up $(VENV) with torch, torchvision and the other dependencies (once, a few minutes)"
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "error: $(PYTHON) cannot create a virtual environment; on Debian or Ubuntu: apt-get install python3-venv"; exit 1; }
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch torchvision
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: install
	@echo "== Training the CNN on 2 processes with generated images (removes an earlier runs/demo)"
	@rm -rf runs/demo
	@$(RUN) NPROC_PER_NODE=2 launch/local.sh configs/demo.yaml
	@echo
	@echo "== Training is done. To see the curves: make dashboard, then open http://localhost:6006"
	@echo "== Last checkpoint: runs/demo/checkpoints/latest.pt; metrics: runs/demo/metrics.jsonl"

dashboard: install
	$(BIN)/tensorboard --logdir runs

lint: install
	@echo "== Lint: ruff, mypy --strict, shellcheck"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/shellcheck -x launch/*.sh launch/kubernetes/*.sh slurm/*.sh tests/*.sh tests/slurm/*.sh .ci/run

test: lint
	@echo "== Tests: the fast ones (make test-all runs all)"
	@$(RUN) pytest -m "not slow"

test-all: lint
	@echo "== Tests: all"
	@$(RUN) $(BIN)/python tests/run_all.py

soak: install
	@echo "== Killing runs at random moments, $(KILLS) times"
	@$(RUN) $(BIN)/python tests/soak.py --kills $(KILLS)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache *.egg-info build dist
