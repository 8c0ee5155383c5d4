# Every target sets up .venv by itself; `make help` lists them.
#   PYTHON=...    the interpreter that .venv is made with (3.10 or newer)
#   NNSCALER=...  a wheel or a folder of nnScaler, installed into .venv; its tests then must run
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input --quiet
INSTALL := $(PIP) install --progress-bar off -c constraints.txt
PYTEST := $(if $(NNSCALER),NNSCALER_REQUIRED=1) $(BIN)/python -m pytest
TWO_WORKERS := -n 2 --dist loadfile
IS_NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 10))

.PHONY: help
help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | while IFS='|' read -r target text; \
	do printf '  make %-10s %s\n' "$$target" "$$text"; done

$(BIN)/python:
	@for python in "$(PYTHON)" python3 python3.13 python3.12 python3.11 python3.10; do \
	    if "$$python" -c '$(IS_NEW_ENOUGH)' 2>/dev/null; then \
	        echo "making $(VENV) with $$python"; exec "$$python" -m venv $(VENV); \
	    fi; \
	done; \
	echo "No Python 3.10 or newer found: install one, or name it with make PYTHON=/path/to/python" >&2; \
	exit 1

# Without build isolation pip needs no network once the tools are in .venv.
$(STAMP): setup.py pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) 'setuptools>=77'
	$(INSTALL) --no-build-isolation -e '.[dev]'
	@touch $@

# Uninstalled first: pip would keep another build of the same version. nnScaler 0.9 imports regex
# without asking for it.
.PHONY: nnscaler
nnscaler: $(STAMP)
ifneq ($(NNSCALER),)
	$(PIP) --quiet uninstall --yes nnscaler
	$(INSTALL) '$(NNSCALER)' regex
endif

.PHONY: lint
lint: $(STAMP) ## ruff (rules and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The C++ kernel, where there is a compiler: without one everything works, and it says so.
.PHONY: kernel
kernel: $(STAMP) ## compile the CPU kernel cpu_tiles, if there is a C++ compiler
	@$(BIN)/python -m nnscaler_ring build-kernel --optional

.PHONY: test
test: lint nnscaler kernel ## lint, then every test that is not marked full; NNSCALER=<wheel> adds nnScaler
	$(PYTEST) $(TWO_WORKERS) -m 'not full'

.PHONY: test-all
test-all: lint nnscaler kernel ## lint, then every test
	$(PYTEST) $(TWO_WORKERS)

.PHONY: test-cuda
test-cuda: $(STAMP) ## the tests that need a CUDA device; docs/gpu.md
	$(PYTEST) -m cuda

.PHONY: demo
demo: kernel ## write the demonstration's figures and numbers to demo/
	$(BIN)/python -m nnscaler_ring demo --out demo

.PHONY: bench
bench: kernel ## measure context-parallel attention on this machine
	$(BIN)/python benchmarks/bench_context_parallel.py

.PHONY: clean
clean: ## remove build products, caches and demo/; .venv stays
	rm -rf build dist demo *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
