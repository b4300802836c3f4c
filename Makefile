# `make help` lists the targets. Each one first sets up what it needs, in $(VENV).
#
#   make test VENV=/path/to/venv       use another virtual environment (made if it is not there)
#   make test TORCH="torch==2.9.1"     another torch; TORCH= keeps the one already installed
#   make test ARGS="-k kernel -x"      extra pytest arguments
#   make gpu STAGES="loss step"        some stages of benchmarks/gpu/run.py
#   make test WORKERS=8                on 8 cores; a file's tests stay together, a worker uses one thread

VENV ?= .venv
TORCH ?= torch==2.13.0
PYTHON ?= $(shell command -v python3.11 || command -v python3)
ARGS ?=
WORKERS ?= 2
STAGES ?=
GPU_OUT ?= outputs/gpu

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
INSTALLED := $(VENV)/.installed

# Nothing here needs a model or data hub; a test marked `hub` wants HF_HUB_OFFLINE=0.
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help
.PHONY: help install demo demo-images test slow style docs format bench gpu clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## virtual environment with the package and its extras, editable

demo: $(INSTALLED)  ## train five small models and show what refinement does (6 minutes on 2 cores)
	@$(BIN)/python recipes/demo.py $(ARGS)

demo-images: $(INSTALLED)  ## train three small models of digits, draw with them and score them (about 5 minutes on 2 cores)
	@$(BIN)/python recipes/images_demo.py $(ARGS)

test: $(INSTALLED)  ## the tests that run on a CPU within minutes
	@echo "[test] pytest, without the tests marked slow, gpu or hub"
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

slow: $(INSTALLED)  ## the tests marked slow (pytest's status 5, nothing collected, is no failure)
	@echo "[slow] pytest, the tests marked slow"
	@$(BIN)/python -m pytest -m "slow and not gpu and not hub" $(ARGS) || [ $$? -eq 5 ]

style: $(INSTALLED)  ## linter and formatter, check only
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

docs: $(INSTALLED)  ## build the documentation site into outputs/site; broken links are errors
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(INSTALLED)  ## apply the linter's fixes and the formatter
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(INSTALLED)  ## every benchmark, one after the other
	@for script in $(filter-out benchmarks/measure.py,$(wildcard benchmarks/*.py)); do \
		echo "[bench] $$script"; $(BIN)/python $$script $(ARGS) || exit 1; done

gpu: $(INSTALLED)  ## tests and figures that need a GPU, at most 9 minutes on an H200 (STAGES, GPU_OUT)
	@$(BIN)/python benchmarks/gpu/run.py --output $(GPU_OUT) $(if $(STAGES),--stages $(STAGES)) $(ARGS)

clean:  ## remove caches and builds; outputs and the virtual environment stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

# torch goes first and by exact version: an open range, which is all that the package can ask for, may
# resolve to a CUDA build of several GB. The stamp makes a second run start at once, and a changed
# setup.cfg installs again.
$(INSTALLED): setup.cfg pyproject.toml | $(BIN)/python
ifneq ($(strip $(TORCH)),)
	@echo "[install] 1/2 $(TORCH) (about half a minute)"
	@$(PIP) install "$(TORCH)"
endif
	@echo "[install] 2/2 xdlm_hf with every extra (a minute or two; DeepSpeed builds from source)"
	@$(PIP) install -e ".[dev]"
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "[install] Python 3.11 or newer is needed, found $(PYTHON): set PYTHON=/path/to/python3.11"; exit 1; }
	@echo "[install] virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)
