# make demo    the main job on a phantom archive, on this machine alone
# make test    every test
# make fuzz    20,000 damaged files through fetching and decoding, 4 to 10 minutes
# make faults  kill -9, lost nodes, bad networks, full disks: writes docs/reliability.md, 11 to 21 minutes
# make check   format, lint, types, import direction
# Each command sets itself up: it makes a .venv from requirements.lock.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet
# Keep compiled bytecode even where the machine turns it off: the tests start some hundred
# processes. That is also why the installation need not compile its 7 GB (--no-compile).
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test fuzz faults check format lock clean

demo: $(VENV)/.installed
	PYTHONPATH=. $(BIN)/python cluster/demo.py

test: $(VENV)/.installed
	$(BIN)/python -m pytest $(TESTS)

fuzz: $(VENV)/.installed
	$(BIN)/python -m tests.fuzz --inputs 20000

faults: $(VENV)/.installed
	$(BIN)/python -m tests.faults.run --table docs/reliability.md

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' || \
		{ echo "error: Python 3.11 to 3.14 is needed; run make PYTHON=python3.12"; exit 2; }
	@echo "Setting up $(VENV): about 7 GB, a few minutes"
	$(PYTHON) -m venv $(VENV)
	sed -n '/^pip==/,/# via/p' requirements.lock | $(PIP) --require-hashes -r /dev/stdin
	$(PIP) --no-compile --require-hashes -r requirements.lock
	$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

# Needs uv. Pins every package for all platforms, with hashes and no index address. The lock for
# the cluster's image leaves out what only the tests need.
LOCK := uv pip compile pyproject.toml --universal --python-version 3.11 \
	--generate-hashes --no-emit-index-url --no-header --quiet
lock:
	$(LOCK) --extra dev -o requirements.lock
	$(LOCK) -o cluster/requirements.lock

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
