# Two commands do everything on a fresh machine: `make search` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/digits
# One thread per process: trials and tests run side by side.
export OMP_NUM_THREADS ?= 1

.PHONY: search test test-slow check bench docs clean

search: $(VENV)/.installed  ## the quickstart: a whole search on embedded data, ending in a Pareto table
	$(BIN)/ucc-search search search_spaces/digits_ucc.yaml --out $(RUN) $(if $(wildcard $(RUN)/config.resolved.yaml),--resume)

test: $(VENV)/.installed  ## the default tests
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

test-slow: $(VENV)/.installed  ## the tests that take minutes
	$(BIN)/python -m pytest -q -m slow

check: $(VENV)/.installed  ## lint, types and the default tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) test

bench: $(VENV)/.installed  ## what a trial costs beyond its own forward passes
	$(BIN)/python benchmarks/trial_overhead.py

docs: $(VENV)/.installed  ## what is written from the code and the results
	$(BIN)/python docs/make_reference.py
	$(BIN)/python docs/make_headline.py

clean:
	rm -rf $(VENV) runs

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@
