# `make demo` and `make test` need nothing but Python 3.10-3.13 and make: each sets up .venv first.
PYTHON ?= python3
BIN := .venv/bin
STORAGE ?= demo-run
PYTEST_ARGS ?= -n 3 --dist loadgroup

.PHONY: setup demo test check format schema docs clean

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/.dev: .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

setup: .venv/.dev

demo: .venv/.installed
	$(BIN)/rayfuse demo --storage $(STORAGE)

test: .venv/.dev
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/python .ci/check_style.py
	$(BIN)/pyright --pythonpath $(BIN)/python

format: .venv/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

schema: .venv/.installed
	$(BIN)/python -m rayfuse.config.load > recipes/schema.json
	$(BIN)/python -m docs.recipe_table
	$(BIN)/python -m docs.recipe_costs
	$(BIN)/python -m docs.commands_page
	$(BIN)/python -m docs.columns_page
	$(BIN)/python -m docs.metrics_page
	$(BIN)/python -m docs.api_reference

docs: .venv/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/site

clean:
	rm -rf .venv demo-run build *.egg-info
