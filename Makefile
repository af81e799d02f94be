PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
RUNTIME := $(VENV)/.patterndsl-runtime
DEV := $(VENV)/.patterndsl-dev

MAKEFLAGS += --no-builtin-rules
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test gpu-test lint format bench wheel-test clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(RUNTIME) ## install, then check, draw and run one pattern
	$(BIN)/patterndsl check examples/longformer.yaml
	$(BIN)/patterndsl show examples/longformer.yaml -n 256
	@mkdir -p build
	$(BIN)/patterndsl show examples/longformer.yaml -n 256 -o build/longformer.png --force
	$(BIN)/patterndsl run examples/longformer.yaml -n 4096

# One thread per worker: the workers already fill the cores.
test: lint ## install, then linters, types, import rules and all tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 16 --dist worksteal

gpu-test: $(DEV) ## the tests that need a GPU, where there is one
	$(BIN)/pytest -m cuda -n 8

lint: $(DEV) ## ruff, mypy and the import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(DEV) ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(RUNTIME) ## run every script in benchmarks/
	@for script in benchmarks/*.py; do \
	  [ -e "$$script" ] || continue; \
	  echo "$(BIN)/python $$script"; \
	  $(BIN)/python "$$script" || exit 1; \
	done

wheel-test: $(DEV) ## build the wheel and try it in an empty environment
	$(BIN)/pytest tests/packaging

clean: ## remove what was built, keep the virtual environment
	rm -rf build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## remove the virtual environment too
	rm -rf $(VENV)

$(RUNTIME): pyproject.toml constraints.txt
	$(call install,.)
	@touch $(RUNTIME)

$(DEV): pyproject.toml constraints.txt
	$(call install,.[dev])
	@touch $(RUNTIME) $(DEV)

# torch is the long download, so it alone shows pip's progress. The build backend comes from the constraints as well:
# pip does not apply them to a build environment of its own.
define install
	@if ! $(PIP) --version >/dev/null 2>&1; then \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "patterndsl needs Python 3.11 or newer; '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)" >&2; \
	    echo "Name another one, for example: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; \
	    exit 1; }; \
	  echo "Creating $(VENV)"; \
	  $(PYTHON) -m venv --clear $(VENV); \
	fi
	@$(PIP) show -q torch >/dev/null 2>&1 || { \
	  echo "Installing torch, the large one"; \
	  $(PIP) install -c constraints.txt torch; }
	@echo "Installing the pinned packages (constraints.txt)"
	@$(PIP) install -qq -c constraints.txt hatchling editables
	@$(PIP) install -qq -c constraints.txt --no-build-isolation -e '$(1)'
endef
