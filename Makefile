# `make demo` and `make test` each work alone from a clean clone: they make a virtual environment first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint types setup clean

demo: setup
	$(BIN)/python -m benchmarks demo

test: setup
	$(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist loadscope --durations=10

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

setup: $(INSTALLED)

# torch first, at the pinned version: a bare `torch` may resolve to another build than the one tested.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) build dist *.egg-info
