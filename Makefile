# make demo | test | test-long | lint | docs: each makes .venv first, where it is missing or pyproject.toml has changed.

PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3.11)
# PyTorch's own wheel index, where PyPI's torch is the CUDA build: make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
VENV := .venv
READY := $(VENV)/ready
RUN := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"

.PHONY: setup demo test test-long lint format docs clean

setup: $(READY)

$(READY): pyproject.toml standin/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "error: friendrec needs Python 3.11, $(PYTHON) is $$($(PYTHON) -V 2>&1): make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV) || { echo "error: $(PYTHON) cannot make a virtual environment: on Debian, apt-get install python3-venv"; exit 1; }
	$(VENV)/bin/python -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) ./standin --editable '.[dev,docs]'
	$(VENV)/bin/python -m pip check
	@touch $@

demo: $(READY)
	rm -rf demo
	$(RUN) friendrec simulate --preset regular --out demo/log
	$(RUN) friendrec pipeline --interactions demo/log/interactions --prepare-args="--users demo/log/users --roles block=exclude" --preset two_tower_mlp --nproc 2 --out demo/pipeline

test: $(READY)
	$(RUN) python -m pytest -m "not long" --durations=10

test-long: $(READY)
	$(RUN) python -m pytest -m long --durations=10

lint: $(READY) docs
	$(RUN) ruff format --check
	$(RUN) ruff check
	$(RUN) codespell
	$(RUN) mypy -p friendrec

format: $(READY)
	$(RUN) ruff format
	$(RUN) ruff check --fix

docs: $(READY) # site/index.html; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(RUN) python -P -m mkdocs build

clean:
	rm -rf $(VENV) demo site build dist *.egg-info standin/build standin/*.egg-info
