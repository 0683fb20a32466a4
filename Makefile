# Every target makes an environment of its own, .venv-dev, when it is missing: from nothing but python3 and pip.
# An environment of yours, such as a .venv with `pip install .` in it, is left alone.
PYTHON ?= python3
PYTHON_NEWEST ?= python3.13
VENV ?= .venv-dev
BIN := $(VENV)/bin

.PHONY: setup hooks reproduce test test-all test-long test-newest test-torch check lint types docs bench bench-basics

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

# ruff before every commit
hooks: setup
	$(BIN)/prek install

reproduce: setup
	$(BIN)/prograde reproduce all

test: setup
	$(BIN)/python -m pytest -m 'not long'

test-all: setup
	$(BIN)/python -m pytest

# the long tests alone; LONG="..." takes some of them
LONG ?= tests
test-long: setup
	$(BIN)/python -m pytest -m long $(LONG)

# the core's part of make test, on the newest versions of everything; NEWEST="..." takes less of it
NEWEST ?= tests --ignore tests/lab --ignore tests/docs
test-newest:
	$(PYTHON_NEWEST) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --editable '.[test]'
	.venv-newest/bin/python -m pytest -m 'not long' $(NEWEST)

# the tests of prograde.torch, which make test skips: in an environment of its own, .venv-torch
test-torch: .venv-torch/.installed
	.venv-torch/bin/python -m pytest $(TORCH)
TORCH ?= tests/pytorch

.venv-torch/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-torch
	.venv-torch/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable '.[test-torch]'
	touch $@

check: lint types docs

lint: setup
	$(BIN)/ruff format --check
	$(BIN)/ruff check

types: setup
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: setup
	$(BIN)/zensical build --strict --clean

bench: setup
	$(BIN)/prograde bench

bench-basics: setup
	$(BIN)/prograde basics
	$(BIN)/prograde bounds
