# Everything runs from .venv, which is made here from constraints.txt. On a machine with only Python 3.11+ and make:
#   make demo     the system on this machine, about a minute
#   make test     linters, types, floors, tests

PYTHON ?= python3
ARGS ?=
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip --disable-pip-version-check --quiet install --constraint constraints.txt

# One stamp per set of extras: nothing is installed again until the pins or the project file change.
READY := $(VENV)/.ready
DEMO := $(VENV)/.demo
TEST := $(VENV)/.test
MODELS := $(VENV)/.models

.PHONY: help demo test lint format models clean
.DELETE_ON_ERROR:

help:
	@echo 'make demo [ARGS="--preset hlm"]    run agents, edges and a cloud on this machine'
	@echo 'make test [PYTEST_ARGS="-k ..."]   ruff, mypy, import-linter, pytest'
	@echo 'make lint                          the same without pytest'
	@echo 'make format                        let ruff rewrite'
	@echo 'make models                        add torch, to train, export and test everything'
	@echo 'make clean                         remove what make made'

demo: $(DEMO)
	@$(BIN)/fedhlm demo $(ARGS)

test: lint
	$(BIN)/pytest $(PYTEST_ARGS)

lint: $(TEST)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(TEST)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

models: $(MODELS)

$(READY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(DEMO): pyproject.toml constraints.txt $(READY)
	$(INSTALL) --editable '.[agent,edge,cloud]'
	@touch $@

$(TEST): pyproject.toml constraints.txt $(READY)
	$(INSTALL) --editable '.[agent,edge,cloud,lab,dev]'
	@touch $@

$(MODELS): $(TEST)
	$(INSTALL) --editable '.[models]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
