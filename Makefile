# `make demo` and `make test` set everything up on a fresh machine: Python 3.11 or newer, make, and a network to PyPI.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN = .venv/bin
READY = .venv/.ready

.PHONY: demo federation test fast slow lint bench chaos soak outages results clean

demo: $(READY)
	$(BIN)/fedpact demo

# a SuperLink and three sites as processes of their own on this machine, and the demo across them
federation: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.federation

test: lint fast slow

lint: $(READY)
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy

fast: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

slow: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m slow

bench: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks

# the server, members and both killed at every place that writes, and at random times; `make chaos KILLS=300` for more
KILLS ?= 25
chaos: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.chaos --kills $(KILLS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/runtime/test_fault_matrix.py

soak: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.soak

# every process of a federation killed mid-round, and members that come, go and are slow
outages: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.outages

results: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.learning

# torch first and alone: the version is pinned, because an unpinned one may bring gigabytes
$(READY): pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
