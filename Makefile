# make serve, make test, make test-full, make lint, make clean. Needs Python 3.11 or later and make, nothing else.

PYTHON ?= $(firstword $(foreach name,python3.11 python3,$(shell $(name) -c "print('$(name)')" 2>/dev/null)))
# PyTorch's index of CPU builds, tried first; empty takes torch from PyPI.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: serve test test-full lint clean

serve: $(VENV)/.serve  ## ARGS="--port 8001" passes flags on
	$(BIN)/python -m server $(ARGS)

test: lint
	$(BIN)/pytest

test-full: test
	$(BIN)/pytest tests/full

lint: $(VENV)/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache

$(VENV)/.test: $(VENV)/.torch pyproject.toml constraints.txt
	$(PIP_INSTALL) -e '.[test,dev]'
	touch $@ $(VENV)/.serve

$(VENV)/.serve: $(VENV)/.torch pyproject.toml constraints.txt
	$(PIP_INSTALL) -e .
	touch $@

$(VENV)/.torch: deploy/install-torch
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Python 3.11 or later is needed, and '$(PYTHON)' is not it: make $(MAKECMDGOALS) PYTHON=/path/to/python" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	@TORCH_INDEX="$(TORCH_INDEX)" deploy/install-torch $(BIN)/python
	touch $@
