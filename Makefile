# One environment in .venv, made on first use and renewed when pyproject.toml or constraints.txt change.
# Each stamp under .venv says that a set of extras is installed; remove .venv (make clean) to start afresh.

VENV ?= .venv
OUT ?= out
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
PINS := pyproject.toml constraints.txt
CHROMIUM := $(firstword $(wildcard /usr/bin/chromium /usr/bin/chromium-browser /usr/bin/google-chrome))

.DEFAULT_GOAL := help
.PHONY: help demo test lint docs bench wheel browser clean

help:
	@echo "make demo    the main job: watch the shipped decoder on the shipped text, name its heads, write the report"
	@echo "make test    the whole suite, the browser test included"
	@echo "make lint    style, types, import floors"
	@echo "make docs    the documentation site, in site/; a broken link fails"
	@echo "make bench   the tables of docs/performance.md; it takes hours"
	@echo "make wheel   the package, in dist/"
	@echo "make clean   remove .venv and everything built"

demo: $(VENV)/stamp-run
	@mkdir -p $(OUT)
	$(BIN)/regard report --demo -o $(OUT)/demo.html

test: $(VENV)/stamp-test browser
	$(BIN)/python -m pytest

lint: $(VENV)/stamp-test $(VENV)/stamp-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/stamp-docs
	$(BIN)/zensical build --clean --strict

bench: $(VENV)/stamp-run
	@for name in watch report patterns plan routes scan attribution roles; do \
		echo "benchmarks/$$name.py" && $(BIN)/python benchmarks/$$name.py || exit 1; \
	done

wheel: $(VENV)/stamp-run
	@rm -rf dist
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	@ls dist

# The report's test drives a real browser. Debian's package is used as it is; elsewhere say where yours is.
browser:
ifeq ($(REGARD_CHROMIUM)$(CHROMIUM),)
	@if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium; \
	else \
		echo "make test needs Chromium for the report's test, and none was found in /usr/bin." >&2; \
		echo "Install it (Debian: apt-get install chromium) or set REGARD_CHROMIUM=/path/to/chromium." >&2; \
		exit 1; \
	fi
endif

$(VENV)/bin/python:
	@if [ -z "$(PYTHON)" ]; then echo "regard needs Python 3.11 or newer on PATH (or make PYTHON=/path/to/python)." >&2; exit 1; fi
	$(PYTHON) -m venv $(VENV)

$(VENV)/stamp-run: $(PINS) | $(VENV)/bin/python
	@echo "installing regard in $(VENV); the first time takes minutes"
	$(INSTALL) -e .
	@touch $@

# timm brings torchvision, whose compiled ops load only beside the torch build they were made for. Where they do not
# (a CPU build of torch), its Python part is put aside for the tests that use timm: see tests/vision.py.
$(VENV)/stamp-test: $(PINS) | $(VENV)/bin/python
	@echo "installing regard and what its tests need in $(VENV); the first time takes minutes"
	$(INSTALL) -e ".[parquet,test]"
	@$(BIN)/python -c "import torchvision" 2>/dev/null || { $(BIN)/python -m pip uninstall --quiet -y torchvision && \
		$(INSTALL) --upgrade --no-deps --target $(VENV)/share/torchvision-python torchvision; }
	@touch $@

$(VENV)/stamp-lint: $(PINS) | $(VENV)/bin/python
	$(INSTALL) -e ".[lint]"
	@touch $@

$(VENV)/stamp-docs: $(PINS) | $(VENV)/bin/python
	$(INSTALL) -e ".[docs]"
	@touch $@

clean:
	rm -rf $(VENV) build dist site $(OUT) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
