# One way in. `make report` and `make test` build the environment themselves; the rest is for people who stay.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

export TOKENIZERS_PARALLELISM := false

.PHONY: help env report test test-real test-browser coverage bench lab lint format clean

help:
	@echo "make report     environment + the quick profile on SmolLM2-135M -> reports/quick/index.html"
	@echo "make test       environment + the tests (minutes, two cores)"
	@echo "make test-real  the tests that need the real model, and long ones: killed processes, reference scores"
	@echo "make test-browser  JupyterLab and the report page in your Chromium or Chrome (minutes); make test leaves these out"
	@echo "make coverage   make test with the lines that it runs, which takes half as long again"
	@echo "make bench      speed as ratios measured side by side -> benchmarks/results.json (12 minutes, and some for ToMoE; nothing else running)"
	@echo "make lab        JupyterLab on notebooks/"
	@echo "make lint       ruff: format and rules"
	@echo "make env        the environment alone (.venv)"

env: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python >= 3.11 is needed: make env PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $(STAMP)

report: env
	$(BIN)/dynamoe-lab run --profile quick

test: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-real: env
	$(BIN)/python -m pytest -m "real or slow"

test-browser: env
	$(BIN)/python -m pytest -m browser -rs

coverage: export COVERAGE_FILE := $(CURDIR)/.coverage
coverage: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --cov --cov-config=pyproject.toml --cov-report=term-missing:skip-covered

bench: env
	$(BIN)/python benchmarks/bench.py

lab: env
	$(BIN)/jupyter lab --notebook-dir=. notebooks/00_explore.ipynb

lint: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: env
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .coverage*
