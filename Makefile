# make demo  the main job: a small network on real digits, in torch and in Flax
# make test  a short cut through all tests, in minutes; make test-long runs the rest of them
# make lint  formatting, lint and types
# make docs  the documentation site, in build/site; a warning is an error
# Each makes .venv first, from constraints.txt, where it is not there or is out of date.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-long lint docs format clean

demo: .venv/ready
	$(BIN)/fusedbun train --framework both

test: .venv/ready
	$(BIN)/python -m pytest -n auto --dist worksteal --durations=10 -m 'not long'

test-long: .venv/ready
	$(BIN)/python -m pytest -n auto --dist worksteal --durations=10 -m long

lint: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: .venv/ready
	$(BIN)/sphinx-build --fresh-env --write-all --quiet --nitpicky --fail-on-warning --keep-going docs build/site

format: .venv/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.venv/ready: pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "fusedbun needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) --version); try make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv build dist fusedbun/compiler/cpp/built *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
