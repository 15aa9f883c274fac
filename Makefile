# quickstart: install and run a small search · test: everything CI runs · pytest, lint, types: its parts
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
# on all cores, where pip has one; a few files of packages are templates and no Python
COMPILE := $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
export OMP_NUM_THREADS ?= 1

.PHONY: quickstart test pytest lint types format clean

quickstart: $(VENV)/.core
	env -u OMP_NUM_THREADS $(BIN)/archsearch launch search_spaces/quickstart.yaml

test: lint types pytest

pytest: $(VENV)/.dev
	$(BIN)/pytest -n 2 -q

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy -n 2

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.core: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv --upgrade-deps $(VENV)  # pip 23 takes twice as long over the same
	$(PIP) torch
	$(PIP) --editable .
	$(COMPILE)
	touch $@

$(VENV)/.dev: $(VENV)/.core
	$(PIP) --editable '.[dev]'
	$(COMPILE)
	touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
