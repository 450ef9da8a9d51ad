# Four targets; each sets up what it needs in .venv. Variables: SLOW=1 (test, as CI: the slow ones
# too, and those with quantised bases and DeepSpeed, which it installs), SLOW=all (also those for
# which CI has no time), PYTHON.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test lint bench
.DEFAULT_GOAL := test

# A torch that PYTHON can import is used, through a .pth file, be it a virtual environment's or the
# system's. Else, without an NVIDIA GPU the one pinned in requirements/cpu.txt; with one, the newest.
$(VENV)/.ready: pyproject.toml setup.py requirements/cpu.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "needs Python 3.11 or newer"'
	$(PYTHON) -m venv $(VENV)
	$(PYTHON) -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])' \
	  2>/dev/null > $(VENV)/torch.pth && cp $(VENV)/torch.pth $(VENV)/lib/python3*/site-packages/ || true
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'setuptools>=77' wheel
	if ! $(BIN)/python -c 'import torch' 2>/dev/null && ! command -v nvidia-smi >/dev/null; then \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/cpu.txt; fi
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation \
	  -e '.[train,label,serve,report,dev,data]'
	touch $@

demo: $(VENV)/.ready
	$(BIN)/lorapar run examples/arithmetic/config.yaml

$(VENV)/.interop: $(VENV)/.ready
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --no-build-isolation -e '.[interop]'
	touch $@

test: $(VENV)/.ready $(if $(SLOW),$(VENV)/.interop)
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal \
	  -m 'not gpu$(if $(SLOW),$(if $(filter all,$(SLOW)),, and not more), and not slow)'

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/.ready
	$(BIN)/python -m pytest benchmarks --benchmark-only -o addopts=
