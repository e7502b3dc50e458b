# `make demo` and `make test` need nothing but Python 3.10 or later and a package index.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test quick check format bench clean

demo: .venv/.installed
	$(BIN)/python -m jobs.explain --demo --out runs/demo
	$(BIN)/python -m jobs.index --run runs/demo
	$(BIN)/python -m jobs.name --run runs/demo
	$(BIN)/python -m jobs.report --run runs/demo

test: check
	$(BIN)/python -m pytest

# Without Ray, without a browser and without what is slow: the tests to run while one works.
quick: .venv/.test
	$(BIN)/python -m pytest -q -m "not slow and not ray and not browser"

check: .venv/.test
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

format: .venv/.test
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench: .venv/.installed
	$(BIN)/python -m benchmarks maps

# The package is installed in place (-e), so that an edit needs no second installation.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/.test: .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf .venv runs .pytest_cache .mypy_cache .ruff_cache *.egg-info
