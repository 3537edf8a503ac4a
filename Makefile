# `make help` lists the targets with the text after their ##.
#
# LIBRARIES=  tested (constraints.txt, the default), ranges, oldest or newest: see .ci/libraries.py

PYTHON ?= python3
LIBRARIES ?= tested
VENV ?= .venv$(if $(filter-out tested,$(LIBRARIES)),-$(LIBRARIES))
BIN = $(VENV)/bin
RUN ?= runs/pocket
MAKE_AGAIN = make$(if $(MAKEOVERRIDES), $(MAKEOVERRIDES))
INSTALLED = $(VENV)/.installed-$(LIBRARIES)
JAVASCRIPT = @huggingface/jinja@0.5.11 @huggingface/tokenizers@0.2.0

.PHONY: help run install test lint javascript pytest slow all-tests gpu-check chat space constraints clean

help:  ## list these targets (what `make` alone does)
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "settings: RUN=$(RUN)  VENV=$(VENV)  PYTHON=$(PYTHON)  LIBRARIES=$(LIBRARIES) (or ranges, oldest, newest)"

run: $(INSTALLED)  ## train the pocket model from scratch to a chat; run again to resume; skips what is finished
	@$(BIN)/python recipes/run.py pocket --run_dir $(RUN) --next "$(MAKE_AGAIN) chat   (terminal),   $(MAKE_AGAIN) space   (browser)"

chat: $(INSTALLED)  ## chat with the trained model in the terminal
	@$(BIN)/nanochat-chat $(RUN)/rl

space: $(INSTALLED)  ## chat with it in the browser
	@$(BIN)/python space/app.py $(RUN)/rl

install: $(INSTALLED)  ## create the virtual environment with the libraries

test: lint pytest  ## lint and the quick tests; CI also runs the slow ones

# Types are checked against the tested libraries only: other versions have other annotations.
lint: $(INSTALLED)  ## ruff: rules and format; mypy: types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(if $(filter tested,$(LIBRARIES)),$(BIN)/mypy)

# The chat template is also rendered in JavaScript if npm is installed; otherwise that test is skipped. One thread per
# process: on two cores, two threads next to a busy process are many times slower.
PYTEST = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 NODE_PATH=$(abspath $(VENV)/js/node_modules) $(BIN)/python -m pytest -n 2 --dist loadfile

javascript: $(INSTALLED)  ## install what the tests of the chat template in JavaScript need, if npm is there
	@npm install --prefix $(VENV)/js --no-audit --no-fund --loglevel error $(JAVASCRIPT) >/dev/null 2>&1 || echo "no npm, or no network: the chat template is not tested in JavaScript"

pytest: javascript  ## the quick tests that need no GPU, two files at a time
	$(PYTEST)

slow: javascript  ## the tests of more than seven seconds each
	$(PYTEST) -m slow

all-tests: javascript  ## the quick and the slow tests in one go, as in CI: what a file's tests share is made once
	$(PYTEST) -m 'not long and not gpu'

gpu-check: $(INSTALLED)  ## check kernels, gradients, speed and stages on this machine's GPU, in eight minutes
	$(BIN)/python recipes/benchmarks/gpu_check.py

constraints:  ## pin the newest versions that pyproject.toml allows; commit them when the tests pass
	rm -rf .venv-ranges
	@$(MAKE) --no-print-directory install LIBRARIES=ranges VENV=.venv-ranges
	.venv-ranges/bin/pip install -q -e '.[harness]'
	.venv-ranges/bin/python .ci/constraints.py

clean:  ## remove the virtual environments and everything in runs/
	rm -rf .venv .venv-ranges .venv-oldest .venv-newest runs

$(INSTALLED): pyproject.toml constraints.txt .ci/install.py .ci/libraries.py
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON): no such program; name a Python of 3.11 or newer: make PYTHON=…"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is %s; try make PYTHON=python3.12" % sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	@$(PYTHON) .ci/install.py $(VENV) $(LIBRARIES)
