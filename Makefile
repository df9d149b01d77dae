# make demo: set up, then tune, export and predict on the embedded pictograms, offline
# make test: set up, then run every check and every test
# make wheel: build dist/capt-VERSION-py3-none-any.whl

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
DEPLOY_VENV ?= .venv-deploy
BIN = $(VENV)/bin

.PHONY: demo test check wheel install clean

demo: $(VENV)/.installed
	$(BIN)/python -m examples.demo.run

test: check $(DEPLOY_VENV)/.installed
	$(DEPLOY_VENV)/bin/python -m pytest tests/capt_deploy
	$(BIN)/python -m pytest

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

wheel: $(VENV)/.installed
	$(BIN)/python -m build --wheel

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

# The runtime alone, as an edge machine has it: no torch.
$(DEPLOY_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(DEPLOY_VENV)
	$(DEPLOY_VENV)/bin/pip install --quiet --editable '.[open-vocab]' pytest hypothesis
	touch $@

clean:
	rm -rf $(VENV) $(DEPLOY_VENV) demo build dist *.egg-info
