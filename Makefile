# make run    the pocket recipe from raw text to a chat, in a virtual environment that it makes
# make test   ruff and the tests
# make chat   talk to the model that `make run` trained;  make space  the same in the browser
#
# LIBRARIES=  tested (constraints.txt, the default), ranges, oldest or newest: see .ci/libraries.py

PYTHON ?= python3
LIBRARIES ?= tested
VENV ?= .venv$(if $(filter-out tested,$(LIBRARIES)),-$(LIBRARIES))
BIN = $(VENV)/bin
RUN ?= runs/pocket
INSTALLED = $(VENV)/.installed-$(LIBRARIES)
JAVASCRIPT = @huggingface/jinja@0.5.11 @huggingface/tokenizers@0.2.0

.PHONY: run install test lint pytest chat space constraints clean

run: $(INSTALLED)
	$(BIN)/python recipes/run.py pocket --run_dir $(RUN)
	@echo "or in short:  make chat   (terminal),  make space   (browser)"

install: $(INSTALLED)

test: lint pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .

# The chat template is also rendered in JavaScript, where there is npm; else that test is skipped.
pytest: $(INSTALLED)
	@npm install --prefix $(VENV)/js --no-audit --no-fund --loglevel error $(JAVASCRIPT) >/dev/null 2>&1 || echo "no npm, or no network: the chat template is not tested in JavaScript"
	HF_HUB_OFFLINE=1 NODE_PATH=$(abspath $(VENV)/js/node_modules) $(BIN)/python -m pytest

chat: $(INSTALLED)
	$(BIN)/nanochat-chat $(RUN)/rl

space: $(INSTALLED)
	$(BIN)/python space/app.py $(RUN)/rl

# The newest versions that pyproject.toml allows become the tested ones; commit them when `make test` passes.
constraints:
	rm -rf .venv-ranges
	@$(MAKE) --no-print-directory install LIBRARIES=ranges VENV=.venv-ranges
	.venv-ranges/bin/python .ci/constraints.py

clean:
	rm -rf .venv .venv-ranges .venv-oldest .venv-newest runs

$(INSTALLED): pyproject.toml constraints.txt .ci/install.py .ci/libraries.py
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON): no such program; name a Python of 3.11 or newer: make PYTHON=…"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is %s; try make PYTHON=python3.12" % sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	@$(PYTHON) .ci/install.py $(VENV) $(LIBRARIES)
