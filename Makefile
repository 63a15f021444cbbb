# make demo, make test: each first makes .venv if it is missing or out of date, then does its job.
# demo installs what a user has, test what development needs; neither installs what is there already.
# Needs Python 3.11 or newer; another one is chosen with  make PYTHON=/path/to/python3.12 demo

PYTHON ?=
BIN := .venv/bin
READY := .venv/.ready
READY_DEV := .venv/.ready-dev
RUN := HF_HUB_OFFLINE=1 $(BIN)/python
MYPY_LAYERS := errors.py records.py prompts.py images.py manifest.py files.py losses metrics models data index mining evaluation \
    recipe.py plan.py

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test check format install clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(READY)  ## index the example files, search them in four ways, write demo.html
	$(RUN) -m quarterlight.cli.main demo --out demo.html

test: $(READY_DEV)  ## run the test suite, on all cores
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto

check: $(READY_DEV)  ## lint, formatting, types of layers 0-2 and of some above, direction of imports
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy $(wildcard $(addprefix src/quarterlight/,$(MYPY_LAYERS)))
	$(RUN) -m pytest -q tests/test_layers.py

format: $(READY_DEV)  ## format the code and mend what the linter can
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

install: $(READY_DEV)  ## make .venv with everything that development needs

clean:  ## remove what make and the tools made
	rm -rf .venv .quarterlight-demo demo.html build dist .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): WHAT := .
$(READY): SIZE := 1.7 GB
$(READY): MARKS := $(READY)
$(READY_DEV): WHAT := .[dev]
$(READY_DEV): SIZE := 2.8 GB
$(READY_DEV): MARKS := $(READY) $(READY_DEV)

# A name such as python3.12 can be a broken link or lack venv (Debian packs it apart), so each one is tried.
$(READY) $(READY_DEV): pyproject.toml constraints.txt
	@set -e; \
	for candidate in $(if $(PYTHON),"$(PYTHON)",python3.11 python3.12 python3.13 python3.14 python3 python); do \
	    if "$$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	        python=$$candidate; break; \
	    fi; \
	done; \
	if [ -z "$$python" ]; then \
	    echo "Quarterlight needs Python 3.11 or newer with venv; none was found. Install one (Debian: apt install" \
	         "python3.11 python3.11-venv) or name one: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; \
	    exit 1; \
	fi; \
	if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	    echo "Making .venv with $$python ..."; "$$python" -m venv --clear .venv; \
	fi; \
	echo "Installing $(WHAT) with the pinned packages into .venv: about $(SIZE), some GB more where torch comes with CUDA;" \
	     "a few minutes, once ..."; \
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '$(WHAT)'; \
	touch $(MARKS)
