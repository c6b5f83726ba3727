# Every target sets up what it needs in .venv first; what is set up already costs nothing.
PYTHON ?= python3
DEVICE ?= cpu
BIN := .venv/bin

.PHONY: help demo test check fix bench clean
help:            ## Show this list
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/ -/'

demo: .venv/base ## Train, evaluate and probe on the planted corpus (runs/demo)
	$(BIN)/probekit demo

test: .venv/dev  ## Run the tests
	$(BIN)/python -m pytest

check: .venv/dev ## Lint, check formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: .venv/dev   ## Format, and mend what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/base ## Measure speed and memory; tables and benchmarks/results/ (make bench DEVICE=cuda)
	$(BIN)/python benchmarks/fit_grid.py --device $(DEVICE)
	$(BIN)/python benchmarks/extraction.py --device $(DEVICE)
	$(BIN)/python benchmarks/memory.py --device $(DEVICE)
	$(BIN)/python benchmarks/generation.py --device $(DEVICE)
	$(BIN)/python benchmarks/training.py --device $(DEVICE)
	$(BIN)/python benchmarks/depth_ensemble.py --device $(DEVICE)

clean:           ## Remove the environment and caches
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "probekit needs Python 3.11 or later; say which: make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv .venv

.venv/base: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

.venv/dev: .venv/base
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,encoders]'
	@touch $@
