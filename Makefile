# make demo    a small synthetic dataset, segmented, with reports
# make test    all tests (make test PYTEST="-m 'not slow'" leaves out the slow ones)
# make lint    style, types and the direction of imports
# make docs    the pages of docs/ as a site, into site/
# make lock    the container's pins; needs uv, and TORCH_INDEX, PyTorch's index of CPU builds
# make audit   known weaknesses of what is pinned; needs uv and a network
# All but the last two install into their own virtual environment first.

PYTHON ?= python3
VENV ?= .venv
DEMO ?= demo
PYTEST ?=

SHELL := /bin/bash
unexport PYTHONPATH PYTHONHOME

.PHONY: demo test lint docs lock audit clean

demo: $(VENV)/.installed
	$(VENV)/bin/jointseg-demo $(DEMO)

test: $(VENV)/.installed
	PATH="$(abspath $(VENV))/bin:$$PATH" $(VENV)/bin/python -m pytest $(PYTEST)

lint: $(VENV)/.installed
	PATH="$(abspath $(VENV))/bin:$$PATH" $(VENV)/bin/python -m pytest -q tests/test_architecture.py

docs: $(VENV)/.installed
	$(VENV)/bin/python -m sphinx -W --keep-going -q -b html docs site

# One lock for what all images have, one for torch and what each of its builds brings.
LOCK = uv pip compile -q --generate-hashes --no-header --no-annotate --no-emit-find-links \
    --python-version 3.11 --python-platform x86_64-manylinux_2_28
CPU = -c <(sed 's/^torch==[^+]*$$/&+cpu/' constraints.txt) --find-links $(TORCH_INDEX)/torch
lock:
	$(LOCK) -c constraints.txt <(echo torch) -o container/torch-cuda.lock
	$(LOCK) $(CPU) <(echo torch) -o container/torch-cpu.lock
	$(LOCK) $(CPU) pyproject.toml <(echo bids-validator-deno) --no-emit-package torch \
	    -o container/requirements.lock

# What cannot be looked up would be passed over, so --strict makes that an error; builds +cpu are
# in no index of weaknesses, and bring nothing that the lock for CUDA does not have.
audit:
	uvx pip-audit --strict --progress-spinner off --disable-pip --require-hashes \
	    -r container/requirements.lock -r container/torch-cuda.lock

# The constraints pin torch and everything below it to the versions that were tested.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo 'Python 3.11 or later is needed: make PYTHON=/path/to/python3.11'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -c constraints.txt -e '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) $(DEMO) site build dist *.egg-info .*_cache
