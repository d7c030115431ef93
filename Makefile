# `make demo` and `make test` are all a new user needs; both set the environment up first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup demo test test-slow lint format types docs bench clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv and install the pinned packages (a second call does nothing)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; call make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (about two minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

demo: $(STAMP) ## the main job: prepare the embedded corpus, train a small bilingual GLM, write runs/demo/report.html
	$(BIN)/python -m data_prep data=sample
	$(BIN)/python -m train experiment=demo

test: $(STAMP) ## all tests but the slow ones and those that need a GPU
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(STAMP) ## the slow tests
	$(BIN)/python -m pytest -m slow

lint: $(STAMP) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP) ## mypy, strict
	$(BIN)/mypy

docs: $(STAMP) ## write docs/config.md anew from the schema
	$(BIN)/python docs/make_config_reference.py

bench: $(STAMP) ## the benchmarks this machine can run: kernels (GPU), sampler (CPU)
	$(BIN)/python -m benchmarks.sampler
	$(BIN)/python -m kernels.bench

clean: ## remove runs, datasets and caches; .venv stays
	rm -rf runs data/sample .pytest_cache .mypy_cache .ruff_cache .hypothesis
