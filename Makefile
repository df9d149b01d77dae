# make demo: set up, then tune, export and predict on the embedded pictograms, offline
# make test: set up, then run every check and every test
# make fuzz: give damaged input to every reader for some minutes; `make test` does so for seconds
# make docs: build the documentation into build/site
# make wheel: build dist/capt-….whl, to be installed anywhere

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PYENV = $(wildcard $(HOME)/.pyenv/versions/3.10.*/bin/python)
DEPLOY_PYTHON ?= $(firstword $(shell python3.10 -c 'print("python3.10")' 2>/dev/null) $(PYENV) $(PYTHON))
VENV ?= .venv
DEPLOY_VENV ?= .venv-deploy
BIN = $(VENV)/bin
# Tests run in two processes with one thread each: threads of torch spend much time waiting.
TWO_PROCESSES = --numprocesses 2 --dist loadfile
# Python 2 had a function `file`; here it is a variable, which vermin would take for that.
PACKAGES = capt_deploy capt_train export examples benchmarks tests

.PHONY: demo test check fuzz docs wheel install clean

demo: $(VENV)/.demo
	$(BIN)/python -m examples.demo.run

test: export OMP_NUM_THREADS = 1
test: check $(DEPLOY_VENV)/.installed
	$(DEPLOY_VENV)/bin/python -m pytest $(TWO_PROCESSES) tests/capt_deploy
	$(BIN)/python -m pytest $(TWO_PROCESSES)

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/vermin --quiet --no-tips --violations -t=3.10- --exclude file $(PACKAGES)

fuzz: $(VENV)/.installed
	$(BIN)/python -m pytest tests/fuzz --hypothesis-profile=fuzz

docs: $(VENV)/.docs
	rm -rf build/docs && mkdir -p build/docs
	cp README.md ARCHITECTURE.md CONTRIBUTING.md CHANGELOG.md build/docs/
	cp -r docs build/docs/docs
	$(BIN)/mkdocs build --strict --quiet
	@echo "open build/site/index.html"

wheel: $(VENV)/.installed
	$(BIN)/python -m build --wheel --outdir dist

install: $(VENV)/.installed

# What tuning and exporting need; `make test` adds the tools of development to the same environment.
$(VENV)/.demo: pyproject.toml
	@echo "installing capt with torch and open_clip into $(VENV): 5 to 7 GB, some minutes"
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[export]'
	touch $@

$(VENV)/.installed: pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.demo

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[docs]'
	touch $@

# The runtime alone, as an edge machine has it: no torch, and JetPack 6's Python where one is found.
$(DEPLOY_VENV)/.installed: pyproject.toml
	$(DEPLOY_PYTHON) -m venv --clear $(DEPLOY_VENV)
	$(DEPLOY_VENV)/bin/pip install --quiet --editable '.[open-vocab]' pytest pytest-xdist hypothesis
	touch $@

clean:
	rm -rf $(VENV) $(DEPLOY_VENV) demo build dist *.egg-info
