# Everything runs from .venv, which is made here from constraints.txt. On a machine with only Python 3.11+ and make:
#   make demo     the system on this machine, about a minute
#   make test     linters, types, floors, tests

PYTHON ?= python3
ARGS ?=
PYTEST_ARGS ?=
# Test processes: more of them start more brokers and fleets at once than two cores can keep up with.
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip --disable-pip-version-check --quiet install --constraint constraints.txt

# One stamp per set of extras: nothing is installed again until the pins or the project file change.
READY := $(VENV)/.ready
DEMO := $(VENV)/.demo
TEST := $(VENV)/.test
MODELS := $(VENV)/.models
LLAMA := $(VENV)/.llama
FUZZ := $(VENV)/.fuzz

# The recordings that tests/fedhlm_traces/test_golden.py decides again: every preset, a few seconds of the demo each.
GOLDEN := tests/golden

.PHONY: arm64-test golden help demo docs picture test lint format models chaos fuzz clean
.DELETE_ON_ERROR:

help:
	@echo 'make demo [ARGS="--preset hlm"]    run agents, edges and a cloud on this machine'
	@echo 'make demo ARGS="--pair smollm2"    the same with a chat model and its draft model, on llama.cpp'
	@echo 'make test [PYTEST_ARGS="-k ..."]   ruff, mypy, import-linter, pytest'
	@echo 'make chaos [ARGS="--minutes 2"]    kill and cut off the parts of a running fleet, ten minutes; needs mosquitto'
	@echo 'make fuzz [ARGS="message services"]  feed hostile input to decoders and services, a minute each'
	@echo 'make arm64-test                    flash a card image, install it in an arm64 Debian under qemu, compare texts; root'
	@echo 'make compose-test [ARGS=compose.plain.yml]  docker-compose.yml on this machine'\''s Docker engine, then nothing left'
	@echo 'make lint                          the same without pytest'
	@echo 'make format                        let ruff rewrite'
	@echo 'make docs                          build the documentation site into build/site'
	@echo 'make picture                       run the demo and draw docs/assets/demo.svg anew'
	@echo 'make models                        add torch, to train, export and test everything'
	@echo 'make clean                         remove what make made'

# A pair of GGUF files runs on llama.cpp.
demo: $(DEMO) $(if $(findstring --pair,$(ARGS)),$(LLAMA))
	@$(BIN)/fedhlm demo $(ARGS)

test: lint
	$(BIN)/pytest --numprocesses=$(WORKERS) --dist=loadfile $(PYTEST_ARGS)

lint: $(TEST)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

chaos: $(DEMO)
	@$(BIN)/python -m fedhlm_fleet.chaos $(ARGS)

fuzz: $(FUZZ)
	@$(BIN)/python -m tests.fuzz.guided $(ARGS)

arm64-test: $(TEST)
	@deploy/arm64-test $(ARGS)

compose-test: $(DEMO)
	@$(BIN)/python -m tests.deploy.engine $(ARGS)

format: $(TEST)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Not --quiet: it hides warnings from --strict as well.
docs: $(TEST)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	@echo 'open build/site/index.html'

picture: $(DEMO)
	$(BIN)/python -m fedhlm_fleet.demo.picture docs/assets/demo.svg

golden: $(DEMO)
	@mkdir -p $(GOLDEN) && rm -f $(GOLDEN)/*.trace
	@for preset in $$($(BIN)/fedhlm presets | cut -d ' ' -f 1); do \
		case $$preset in budget) seconds=60;; fedhlm) seconds=6;; *) seconds=2;; esac; \
		$(BIN)/fedhlm demo --preset $$preset --tokens 16 --duration $$seconds --record $(GOLDEN)/$$preset.trace || exit 1; \
	done

models: $(MODELS)

$(READY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(DEMO): pyproject.toml constraints.txt $(READY)
	$(INSTALL) --editable '.[agent,edge,cloud,serve]'
	@touch $@

$(TEST): pyproject.toml constraints.txt $(READY)
	$(INSTALL) --editable '.[agent,edge,cloud,serve,otel,docs,dev]'
	@touch $@

$(FUZZ): $(TEST)
	$(INSTALL) --editable '.[fuzz]'
	@touch $@

$(MODELS): $(TEST)
	$(INSTALL) --editable '.[models]'
	@touch $@

$(LLAMA): $(DEMO)
	@$(BIN)/python -c 'import llama_cpp' 2>/dev/null || echo 'building llama.cpp: about nine minutes of one core'
	$(INSTALL) --editable '.[llama]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
