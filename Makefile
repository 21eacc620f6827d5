# Every target works by itself on a machine that has make and Python >= 3.11 and nothing else:
# the first one that runs creates .venv and installs into it, the others find it there.
#
#   make demo     train, kill, resume, evaluate; compare with an uninterrupted run and with Orbax
#   make test     all tests
#   make lint     formatting, lint rules, types
#   make coverage which branches of the format, the storage and the commit the tests take
#   make bench    save and load times
#   make torture  damage, crashes, faults: all campaigns, for hours
#   make clean    remove what the targets created, .venv included
#
# Another interpreter: make test PYTHON=python3.13

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP_FLAGS := --disable-pip-version-check --no-input --quiet

# The tests that are about what is on disk, and about processes that share it.
COVERING := $(addprefix tests/, format storage handlers leaves reliability compat/test_surface.py \
  compat/test_layouts.py compat/test_array_layouts.py test_async.py test_context.py test_delete.py \
  test_errors.py test_found_by_use.py test_partial.py test_refusals.py test_snapshot.py \
  test_tree.py $(addprefix training/test_, checkpointer.py fallback.py lock.py long_runs.py \
  processes.py steps.py superseded.py))
# Python 3.11 may fail to trace a thread while it begins to trace another.
UNTRACED := -W "ignore:Exception ignored in thread started by"

export PYTHONUNBUFFERED := 1

.DEFAULT_GOAL := help
.PHONY: help demo test lint coverage bench torture clean

help:
	@sed -n 's/^#   //p' Makefile

demo: $(INSTALLED)
	@$(BIN)/python examples/demo_digits.py

test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=8 --dist=loadfile

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

coverage: $(INSTALLED)
	@$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m pytest --quiet --numprocesses=auto --maxprocesses=8 \
	  --dist=loadfile $(UNTRACED) $(COVERING)
	@$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.run
	$(BIN)/python -m benchmarks.scale

torture: $(INSTALLED)
	$(BIN)/python -m torture

clean:
	rm -rf $(VENV) build dist .coverage* .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so an install that was cut off is repeated, and a changed
# pyproject.toml installs again.
$(INSTALLED): pyproject.toml | $(BIN)/pip
	@echo "Installing flax_ckpt and its development requirements into $(VENV) ..."
	@$(BIN)/python -m pip install $(PIP_FLAGS) --editable '.[dev]'
	@touch $@

$(BIN)/pip:
	@command -v $(PYTHON) >/dev/null || \
	  { echo "error: '$(PYTHON)' not found; install Python >= 3.11 or pass PYTHON=<path>" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python >= 3.11 is needed, '$(PYTHON)' is $$($(PYTHON) -V 2>&1);" \
	         "pass another one, e.g. PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "error: '$(PYTHON)' cannot create virtual environments;" \
	         "on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV)
