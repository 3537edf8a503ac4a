# make run    the pocket recipe from raw text to a chat, in a virtual environment that it makes
# make test   the tests
# make chat   talk to the model that `make run` trained;  make space  the same in the browser

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
RUN ?= runs/pocket

.PHONY: run test lint chat space clean

run: $(VENV)/.installed
	$(BIN)/python recipes/run.py pocket --run_dir $(RUN)
	@echo "or in short:  make chat   (terminal),  make space   (browser)"

test: $(VENV)/.installed
	$(BIN)/ruff check .
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

chat: $(VENV)/.installed
	$(BIN)/nanochat-chat $(RUN)/rl

space: $(VENV)/.installed
	$(BIN)/python space/app.py $(RUN)/rl

clean:
	rm -rf $(VENV) runs

# Written last, so that an interrupted installation is taken up again.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is %s; try make PYTHON=python3.12" % sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[all]'
	touch $@
