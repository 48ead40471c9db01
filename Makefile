# Everything a person types: `make help`. Needs Python 3.11+, git and make; everything else goes into .venv.
SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help env demo test test-fast test-slurm test-ranks test-tools test-rest faults lint lock flash-attn clean

PYTHON ?= python3
TORCH := 2.13.0
# `auto`: the CUDA build that the GPU's driver can run. On a login node without a GPU name it: make env TORCH_BACKEND=cu126
VENV := .venv
# .venv/.ready-BACKEND is made when the environment is complete. Without a choice the installed backend stays.
INSTALLED := $(firstword $(patsubst $(VENV)/.ready-%,%,$(wildcard $(VENV)/.ready-*)))
TORCH_BACKEND ?= $(or $(INSTALLED),$(shell nvidia-smi -L 2>/dev/null | grep -q '^GPU' && echo auto || echo cpu))
READY := $(VENV)/.ready-$(TORCH_BACKEND)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# DeepSpeed's launcher looks for `python` on PATH.
export PATH := $(CURDIR)/$(BIN):$(PATH)

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(READY)  ## create or update .venv from requirements.lock (TORCH_BACKEND=cpu|auto|cu126|..., PYTHON=python3.12)

demo: env  ## fine-tune the embedded model on 2 processes, merge it, prove it equal
	$(BIN)/python -m qvtune.demo

# Side by side on two cores: the tests of Slurm often wait for it to notice what has happened.
ALONE := not distributed and not launch and not slurm
TOOLS := tests/convert tests/doctor tests/embedded tests/submit

test: env  ## all tests
	$(MAKE) --jobs=3 --keep-going --output-sync=target test-slurm test-ranks test-tools test-rest

test-fast: env  ## the tests that start no ranks, no launcher and no Slurm cluster, without slow ones
	$(MAKE) --jobs=2 --keep-going --output-sync=target test-tools test-rest ALONE="$(ALONE) and not slow"

test-slurm: env  ## the tests in a Slurm cluster, which they start (tests/slurm)
	$(BIN)/python -m pytest -m slurm

test-ranks: env  ## the tests that start ranks or a launcher
	$(BIN)/python -m pytest -m "distributed or launch"

test-tools: env  ## of the tests that start nothing those of TOOLS, which take half of the time
	$(BIN)/python -m pytest -m "$(ALONE)" $(TOOLS)

test-rest: env  ## the others that start nothing
	$(BIN)/python -m pytest -m "$(ALONE)" $(TOOLS:%=--ignore=%)

faults: env  ## 200 random faults to a run on two ranks, and the matrix of what they did (tests/faults)
	$(BIN)/python -m tests.faults --cycles 200 --seed 0

lint: env  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(READY): requirements.lock setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "Python 3.11 or newer is needed, found $$($(PYTHON) --version 2>&1); try: make env PYTHON=python3.11"; exit 2; }
	rm -f $(VENV)/.ready*
	$(PYTHON) -m venv $(VENV)
	@# --no-deps: the lock is complete, and leaves out what setup.cfg says is not used
	$(PIP) install --quiet --no-deps -r requirements.lock
	$(INSTALL_TORCH)
	$(PIP) install --quiet --no-deps --no-build-isolation -e .
	$(if $(filter cpu,$(TORCH_BACKEND)),,$(MAKE) flash-attn || echo "$$NO_FLASH_ATTN")
	touch $@

# PyPI holds one build of torch for Linux, with several GB of CUDA libraries. uv knows where the other builds are; but a
# CPU build that pip's own configuration offers (a mirror, a folder of wheels) comes first, as it may be all one can reach.
# To uv one build of a version is as good as another: only a reinstallation replaces it.
UV_TORCH = $(BIN)/uv pip install --python $(BIN)/python -c requirements.lock --torch-backend=$(TORCH_BACKEND) \
	    --reinstall-package torch torch==$(TORCH)
ifeq ($(TORCH_BACKEND),cpu)
INSTALL_TORCH = $(PIP) install --quiet -c requirements.lock torch==$(TORCH)+cpu || \
	    { echo '*** No CPU build of torch where pip looks (above); uv takes it from PyTorch.'; $(UV_TORCH); }
else
INSTALL_TORCH = $(UV_TORCH)
endif

flash-attn:  ## compile flash-attn for the installed torch (needs nvcc; takes long)
	$(PIP) install --no-build-isolation -c requirements.lock -e '.[cuda]'

define NO_FLASH_ATTN
*** flash-attn is not installed: the lines above say why (usually: no CUDA toolkit, or another CUDA version than torch's).
*** Everything works without it: model.attention=auto then takes sdpa, which is slower. To try again: make flash-attn
endef
export NO_FLASH_ATTN

# Keeps the present pins wherever setup.cfg allows them. torch and its CUDA libraries depend on the machine (above).
lock:  ## renew requirements.lock after a change of setup.cfg
	$(BIN)/uv pip compile setup.cfg - --extra demo --extra dev --extra study --universal --python-version 3.11 --no-header \
	    --excludes <(printf '%s\n' torch llm llama-cpp-python) --output-file requirements.lock <<< $$'networkx\nsympy'

clean:  ## remove .venv, caches and build products; leaves runs/ and merged/
	rm -rf $(VENV) .cache build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache
	find src tests launch -name __pycache__ -type d -prune -exec rm -rf {} +
