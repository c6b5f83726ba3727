# Every target sets up what it needs in .venv first; what is set up already costs nothing.
PYTHON ?= python3
DEVICE ?= cpu
BIN := .venv/bin

.PHONY: help demo test check fix docs bench figures clean
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

docs: .venv/dev  ## Build the documentation in site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: .venv/base ## Measure speed and memory; tables and benchmarks/results/ (make bench DEVICE=cuda)
	$(BIN)/python benchmarks/fit_grid.py --device $(DEVICE)
	$(BIN)/python benchmarks/arrays.py --device $(DEVICE)
	$(BIN)/python benchmarks/extraction.py --device $(DEVICE)
	$(BIN)/python benchmarks/memory.py --device $(DEVICE)
	$(BIN)/python benchmarks/corpus.py
	$(BIN)/python benchmarks/generation.py --device $(DEVICE)
	$(BIN)/python benchmarks/training.py --device $(DEVICE)
	$(BIN)/python benchmarks/depth_ensemble.py --device $(DEVICE)

# What the figures are drawn from; WIKITEXT is a file of articles in WikiText format, WIKIPEDIA one of articles as JSON
# lines, FICTION one of passages by author.
RUNS ?= runs/figures
WIKITEXT ?=
WIKIPEDIA ?=
FICTION ?=
LMS ?= HuggingFaceTB/SmolLM2-135M-Instruct google/gemma-3-270m
ENCODER ?= sentence-transformers/all-MiniLM-L6-v2
DRAW := $(BIN)/python analyses
TUNED := --set training.base.tuning full --set training.base.learning_rate 1e-3

figures: .venv/base ## Make all of figures/ from nothing (WIKITEXT=, WIKIPEDIA= and FICTION=FILE for real text)
	$(DRAW)/figure2_locations.py
	$(DRAW)/figure2_locations.py --parallel
	$(DRAW)/table1_perplexity.py --preset demo --seeds 5 --runs $(RUNS)/table1
	$(DRAW)/table2_generation.py $(RUNS)/table1/demo
	$(DRAW)/table3_joint.py --preset demo --seeds 5 --runs $(RUNS)/table3
	$(DRAW)/figure4_mixing_fraction.py --preset demo --seeds 3 --generation --runs $(RUNS)/fractions
	$(DRAW)/depth_table1_parameters.py --preset demo --seeds 3 --runs $(RUNS)/depth --set training.base.learning_rate 1e-3
	$(DRAW)/depth_figure1_losses.py $(RUNS)/depth/demo
	$(DRAW)/depth_figure2_solved.py $(RUNS)/depth/demo
	$(DRAW)/depth_figure4_routing.py $(RUNS)/depth/demo
	$(DRAW)/depth_figure5_grid.py --preset demo --seeds 3 --runs $(RUNS)/depth-grid $(TUNED)
	$(BIN)/probekit demo --out $(RUNS)/demo
	$(DRAW)/demo_overview.py $(RUNS)/demo
	$(DRAW)/figure1_method.py $(RUNS)/demo
	$(BIN)/probekit probe $(RUNS)/demo --probe.variants none random fixed oracle predicted soft joint \
		--probe.locations hook_resid_post attn.hook_z:before attn.hook_z
	$(DRAW)/figure3_probing.py $(RUNS)/demo
	$(BIN)/probekit intervene $(RUNS)/demo
	$(DRAW)/figure5_causal.py $(RUNS)/demo
	$(BIN)/probekit train --preset demo --mixing.variants fixed --training.lm.checkpoints 12 --resume --out $(RUNS)/steps
	$(BIN)/probekit probe $(RUNS)/steps --checkpoints
	$(DRAW)/figure6_over_training.py $(RUNS)/steps
	$(DRAW)/in_context.py --seeds 2 --runs $(RUNS)/in_context
ifneq ($(WIKITEXT),)
	$(DRAW)/figure4_mixing_fraction.py --preset text-small --set corpus.path $(WIKITEXT) --seeds 3 \
		--runs $(RUNS)/wikitext-fractions --out figures/figure4_wikitext.png
	$(DRAW)/table1_perplexity.py --preset text-small --set corpus.path $(WIKITEXT) --seeds 3 \
		--runs $(RUNS)/wikitext --out figures/table1_wikitext.png
	$(BIN)/probekit probe $(RUNS)/wikitext/text-small/all/seed0
	$(DRAW)/figure3_probing.py $(RUNS)/wikitext/text-small/all/seed0 --out figures/figure3_wikitext.png
	$(DRAW)/depth_table1_parameters.py --preset text-small --set corpus.path $(WIKITEXT) --seeds 3 --tunings frozen \
		--set depth.members plain ensemble distilled --set training.depth.epochs 1 --runs $(RUNS)/wikitext-depth \
		--out figures/depth_wikitext.png
endif
ifneq ($(WIKIPEDIA),)
	$(DRAW)/figure3_pretrained.py $(WIKIPEDIA) --models $(LMS) --encoder $(ENCODER) --runs $(RUNS)/figure3_pretrained
	$(DRAW)/table1_perplexity.py --preset smollm2-wikipedia --seeds 3 --set corpus.reader auto --set corpus.path $(WIKIPEDIA) \
		--set corpus.subset null --set lm.name $(firstword $(LMS)) --set actions.encoder $(ENCODER) \
		--runs $(RUNS)/smollm2 --out figures/table1_smollm2.png
endif
ifneq ($(FICTION),)
	$(DRAW)/compare_compressed.py $(FICTION) --model $(firstword $(LMS)) --tune 110 --runs $(RUNS)/compressed
	$(DRAW)/labels_fiction.py $(FICTION) --models $(LMS) --passages 50 --sentences 12 --runs $(RUNS)/labels_fiction
	$(DRAW)/causal_fiction.py $(FICTION) --models $(firstword $(LMS)) --layers 8 16 24 --boundaries 60 --runs $(RUNS)/causal_fiction
	$(DRAW)/minimal_pairs.py --models $(LMS) --runs $(RUNS)/minimal_pairs
	$(DRAW)/continuation.py $(FICTION) --models $(LMS) --encoder $(ENCODER) --boundaries 60 --runs $(RUNS)/continuation
endif
	$(DRAW)/claims.py

clean:           ## Remove the environment and caches
	rm -rf .venv site .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "probekit needs Python 3.11 or later; say which: make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv .venv

.venv/base: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[figures]'
	@touch $@

.venv/dev: .venv/base
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,docs,encoders,figures]'
	@touch $@
