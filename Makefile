# `make demo` and `make test` do their own set-up. PYTHON names another interpreter, VENV another environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
RUN := PATH="$(BIN):$$PATH"

.PHONY: help install demo dashboard lint test test-all soak clean
KILLS ?= 200

help:
	@echo "make demo       set up, then train on 2 processes with the embedded images (under two minutes after set-up)"
	@echo "make dashboard  TensorBoard over runs/"
	@echo "make test       set up, then lint and the fast tests (under 10 minutes)"
	@echo "make test-all   the same with the slow tests"
	@echo "make soak       set up, then kill real runs KILLS=200 times and compare them with unbroken ones (half an hour)"
	@echo "make lint       ruff, mypy --strict, shellcheck"
	@echo "make install    only set up $(VENV)"
	@echo "make clean      remove $(VENV) and caches; runs/ and data/ stay"

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "== Setting up $(VENV): torch, torchvision and the rest (a few minutes, once)"
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "error: $(PYTHON) cannot make an environment; on Debian: apt-get install python3-venv"; exit 1; }
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch torchvision
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: install
	@echo "== Training the CNN on 2 processes with the embedded images; an earlier demo in runs/demo is removed"
	@rm -rf runs/demo
	@$(RUN) NPROC_PER_NODE=2 launch/local.sh configs/demo.yaml
	@echo
	@echo "== The model is trained. Its curves: make dashboard (or: $(BIN)/tensorboard --logdir runs), then http://localhost:6006"
	@echo "== The last checkpoint is runs/demo/checkpoints/latest.pt; every scalar is in runs/demo/metrics.jsonl"

dashboard: install
	$(BIN)/tensorboard --logdir runs

lint: install
	@echo "== Lint: ruff, mypy --strict, shellcheck"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/shellcheck -x launch/*.sh slurm/*.sh tests/slurm/*.sh .ci/run

test: lint
	@echo "== Tests: the fast part (make test-all runs all of them)"
	@$(RUN) pytest -m "not slow"

test-all: lint
	@echo "== Tests: all of them"
	@$(RUN) pytest

soak: install
	@echo "== Killing runs at random moments, $(KILLS) times"
	@$(RUN) $(BIN)/python tests/soak.py --kills $(KILLS)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache *.egg-info
