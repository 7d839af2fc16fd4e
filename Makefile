# From a fresh machine: `make quickstart` and `make test` do all set-up. PYTHON chooses the interpreter (3.10 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml constraints.txt $(wildcard xmoe/kernels/cpu/*.c xmoe/kernels/cpu/*.h) xmoe/kernels/cpu/build.py
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: quickstart test hunt lint format gpu clean
ROUNDS ?= 5

quickstart: $(VENV)/.installed  ## train, record, prune, compare and talk, on the CPU, in a few minutes
	$(BIN)/python scripts/quickstart.py

test: $(VENV)/.installed-dev lint  ## the linter and all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 tests

hunt: $(VENV)/.installed-dev  ## the property tests on new random examples, ROUNDS times
	for round in $$(seq $(ROUNDS)); do \
	  HYPOTHESIS_PROFILE=random OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 -m hypothesis tests || exit 1; \
	done

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

gpu:  ## on a CUDA machine: check and measure every kernel; uses the packages that are there and installs nothing
	$(PYTHON) benchmarks/gpu.py

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: $(PYTHON) is older than 3.10; say make PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python $(SOURCES)
	@echo "installing into $(VENV) (a few minutes the first time)"
	$(PIP) -e .
	@$(BIN)/python -m xmoe.kernels.cpu.build || echo "continuing without them: PyTorch serves in their place"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info xmoe/kernels/cpu/*.so xmoe/kernels/cpu/*.dylib
