# One command for every check: `make check`. VENV is the virtual environment to use.
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: check format lint types test test-all

check: lint types test

format:
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint:
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types:
	$(BIN)/mypy

test:
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

test-all:
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2
