# `make run` and `make test` do all set-up themselves. Variables: PYTHON, VENV, MODEL, ARGS, CPU_INDEX.
PYTHON ?= python3
VENV ?= .venv
CPU_INDEX ?= https://download.pytorch.org/whl/cpu

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
BASE := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
TORCH = $(shell sed -n 's/^torch==//p' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help run dev test soak lint format types path

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 10

run: $(BASE) ## chat with the built-in model, or with MODEL=...; reads prompts from a pipe, too
	@$(BIN)/lmdeploy chat $(MODEL) $(ARGS)

dev: $(DEV) ## the virtual environment with everything that the checks need

test: $(DEV) ## the tests; one file or more: make test ARGS=tests/test_hub.py
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal $(ARGS)
	@# Whether Triton interprets is settled at its first import, so its kernels' tests run by themselves.
	@$(if $(ARGS),,[ "$$(uname -s)" != Linux ] || TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal tests/kernels/triton)

soak: $(DEV) ## 10 minutes of load and faults on a server of a tiny model; `make test` runs a shorter form
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.serve.soak $(ARGS)

lint: $(DEV) ## style, formatting, import contracts
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports

format: $(DEV) ## mend what ruff can mend
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: $(DEV) ## mypy --strict
	@$(BIN)/mypy

path: $(DEV) ## lines from pipeline() to a token: at most 4,000 of code, without blanks, comments, docstrings
	@$(BIN)/python -m tests.path_lines

# Everything below writes to stderr: stdout is for answers.
$(BASE): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "Python 3.10 or newer is needed, and '$(PYTHON)' is none; name one: make run PYTHON=python3.11" >&2; exit 1; }
	@$(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) >&2 || { \
	  echo "No virtual environment could be made; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@# '===' matches PyPI's CUDA build only, never a '+cpu' build; without a GPU the CPU index saves gigabytes.
	@if nvidia-smi -L >/dev/null 2>&1; then what=' for CUDA'; options="-c constraints.txt torch===$(TORCH)"; \
	elif [ "$$(uname -s)" = Linux ] && $(BIN)/python -c \
	  'import sys, urllib.request as u; u.urlopen(sys.argv[1] + "/torch/", timeout=10)' $(CPU_INDEX) 2>/dev/null; then \
	  what=' for CPUs'; options='--no-deps --index-url $(CPU_INDEX) torch==$(TORCH)'; \
	else what=; options="-c constraints.txt torch==$(TORCH)"; fi; \
	echo "Installing PyTorch $(TORCH)$$what ..." >&2; $(PIP) install $$options >&2
	@echo "Installing lmdeploy and its libraries ..." >&2
	@$(PIP) install -qq -c constraints.txt -e . >&2
	@touch $@

$(DEV): $(BASE)
	@echo "Installing the tools of the checks ..." >&2
	@$(PIP) install -qq -c constraints.txt -e '.[dev]' >&2
	@touch $@
