# Every target makes .venv itself when it is missing, from nothing but python3 and pip.
PYTHON ?= python3
PYTHON_NEWEST ?= python3.12
BIN := .venv/bin

.PHONY: setup reproduce test test-all test-newest lint docs bench bench-basics

setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,docs]'
	touch $@

reproduce: setup
	$(BIN)/prograde reproduce all

test: setup
	$(BIN)/python -m pytest -m 'not long'

test-all: setup
	$(BIN)/python -m pytest

# the rules of the core and what check says, on the newest versions of everything
test-newest:
	$(PYTHON_NEWEST) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --editable '.[test]'
	.venv-newest/bin/python -m pytest tests/structured/test_structured.py tests/test_check.py

lint: setup
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

bench: setup
	$(BIN)/prograde bench

bench-basics: setup
	$(BIN)/python benchmarks/basics.py
	$(BIN)/python benchmarks/bounds.py
