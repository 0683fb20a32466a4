# Every target makes .venv itself when it is missing, from nothing but python3 and pip.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup reproduce test lint docs bench

setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,docs]'
	touch $@

reproduce: setup
	$(BIN)/prograde reproduce all

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

bench: setup
	$(BIN)/python benchmarks/basics.py
