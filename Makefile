# Every target sets up what it needs; `make install` is a no-op when nothing changed.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
DOCS   := $(VENV)/.docs-installed

.PHONY: install test test-slow test-gpu lint typecheck docs bench demo clean

install: $(STAMP)

# torch first and pinned, so that nothing later pulls another build of it.
$(STAMP): setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist worksteal

test-slow: $(DOCS)
	$(BIN)/python -m pytest -m slow

# One process, as the GPU is one: parity, norms, xformers, no waiting. Skipped, with the reason, where there is none.
test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(STAMP)
	$(BIN)/mypy -p latentdiff -p unet -p vae -p text_encoder

# What the site needs is installed only here: no test waits for it.
$(DOCS): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(STAMP)
	$(BIN)/python benchmarks/unet_forward.py
	$(BIN)/python benchmarks/vae_passes.py
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/data_scale.py

# The shipped model draws sixteen prompts, then one is trained from random weights on the shipped pictures.
demo: $(STAMP)
	$(BIN)/python examples/demo.py --output outputs/demo

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis outputs site
