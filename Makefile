# Two commands do all the set-up on a machine with only python, pip and make: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

SOURCES := $(VENV)/sources

.PHONY: quickstart test test-cov test-slow soak proofs test-clients test-common lint stubs bench docs docs-serve clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

quickstart: $(VENV)/.installed  ## train, evaluate, save, reload, compare and look at small models
	$(BIN)/hf-tfm quickstart

test: $(VENV)/.installed  ## the test suite
	$(BIN)/python -m pytest

test-cov: $(VENV)/.installed  ## lines of hf_tfm that the test suite runs, in htmlcov/; TESTS=tests/metrics for a part of it
	$(BIN)/python -m pytest --cov --cov-report=term --cov-report=html $(TESTS)

test-slow: $(VENV)/.installed  ## the longer proofs alone
	$(BIN)/python -m pytest -m slow

KILLS ?= 50
soak: $(VENV)/.installed  ## translation, MAE and detection, each interrupted at random KILLS times, equal the undisturbed runs
	HF_TFM_SOAK_KILLS=$(KILLS) $(BIN)/python -m pytest -n 0 -m slow tests/recipes/test_soak.py

PROOFS := tests/recipes/test_divided_recipes.py tests/models/test_parallel_plans.py
proofs: $(VENV)/.installed  ## every recipe, divided in several ways, equals one process; writes the differences to tests/equality.json
	$(BIN)/python -m pytest -n 0 -m slow --equality-table tests/equality.json $(PROOFS)
	$(BIN)/python docs/generate.py

test-clients: $(VENV)/.installed  ## other libraries on models of every family; writes docs/clients.md
	$(BIN)/python -m pip install --quiet --editable ".[test,clients]"
	$(BIN)/python -m pytest -n 0 -m "clients or slow or not slow" --clients-table docs/clients.md tests/clients

test-common: $(VENV)/.installed  ## transformers' own common model tests, on our models and on its own beside them
	rm -rf $(SOURCES)
	version=$$($(BIN)/python -c "from importlib.metadata import version; print(version('transformers'))") && \
	$(BIN)/python -m pip download --quiet --no-deps --no-binary :all: --dest $(SOURCES) transformers==$$version && \
	tar xzf $(SOURCES)/transformers-$$version.tar.gz -C $(SOURCES) && \
	TRANSFORMERS_SOURCE=$(SOURCES)/transformers-$$version $(BIN)/python -m pytest -n 0 -W ignore -m "slow or not slow" tests/common

lint: $(VENV)/.installed  ## ruff: rules and format; mypy: types of the public API
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

stubs: $(VENV)/.installed  ## hf_tfm/__init__.pyi from the table of model families
	$(BIN)/python -c "from hf_tfm.families import stub; print(stub(), end='')" > hf_tfm/__init__.pyi

bench: $(VENV)/.installed  ## speed against the peers; results go to benchmarks/results/
	$(BIN)/python -m benchmarks

docs: $(VENV)/.installed  ## the documentation site in site/; a warning is an error
	$(BIN)/python -m pip install --quiet --editable ".[test,docs]"
	$(BIN)/python docs/generate.py
	$(BIN)/python -m mkdocs build --strict

docs-serve: docs  ## the site on this machine, rebuilt when a file changes
	$(BIN)/python -m mkdocs serve

clean:
	rm -rf $(VENV) .ci-venv site build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache htmlcov .coverage .coverage.*
