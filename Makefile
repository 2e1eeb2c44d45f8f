# `make help` lists what there is. PYTHON=... picks the interpreter (default: .venv if present).
PYTHON ?= $(shell test -x .venv/bin/python && echo .venv/bin/python || echo python)

.PHONY: help install style check test quick gpu quickstart bench clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install:  ## make .venv and install everything a developer needs
	bash scripts/test.sh --install-only

style:  ## format and fix what ruff can fix
	$(PYTHON) -m ruff format llava tests scripts
	$(PYTHON) -m ruff check --fix llava tests scripts

check:  ## ruff and the type checker
	$(PYTHON) -m ruff check llava tests scripts
	$(PYTHON) -m mypy

test:  ## all tests that need no GPU
	$(PYTHON) -m pytest

quick:  ## the same without the slow ones
	$(PYTHON) -m pytest -m "not gpu and not slow"

gpu:  ## the tests that need a GPU
	$(PYTHON) -m pytest -m gpu

quickstart:  ## accuracy, FLOPs and speed of the shipped models on one page
	bash scripts/quickstart.sh

bench:  ## how near one thread comes to the ideal
	$(PYTHON) -m llava.cli bench --preset cpu-512 --threads 1

clean:  ## caches (not .venv, data, checkpoints or results)
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
