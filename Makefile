# The two commands of the README: `make demo` and `make test`. Both need Python 3.11+ and nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check
PYTEST ?= -n 2

.PHONY: demo test lint docs soak clean

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: $(BIN)/python pyproject.toml
	$(PIP) --editable .
	@touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(VENV)/.core  ## rank real prompts' candidates with the embedded starter
	@$(BIN)/python examples/demo.py

test: $(VENV)/.dev  ## install what the tests need and run them
	$(BIN)/python -m pytest $(PYTEST)

lint: $(VENV)/.dev
	$(BIN)/ruff check dpo_rank tests examples benchmarks docs
	$(BIN)/ruff format --check dpo_rank tests examples benchmarks docs
	$(BIN)/mypy

soak: $(VENV)/.dev  ## kill a training run 50 times, at every write point, and compare it with an undisturbed one
	DPO_RANK_SOAK=50 $(BIN)/python -m pytest -s tests/training/test_checkpoint.py

docs: $(VENV)/.dev  ## the table of chat templates
	$(BIN)/python docs/make_templates.py

clean:
	rm -rf $(VENV) .venv-* build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
