# Two commands matter on a fresh machine: `make demo` and `make test`. Both set themselves up first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Quiet, local and the same everywhere: no usage reports, no model hub, tokenizers without threads of their own.
export RAY_USAGE_STATS_ENABLED := 0
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: install demo check test slow bench clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; run: make PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(INSTALLED)

demo: install
	$(BIN)/ragtune models
	$(BIN)/ragtune index configs/space.yaml
	$(BIN)/ragtune ask configs/space.yaml "What is the Hubble Space Telescope?"
	$(BIN)/ragtune compare configs/space.yaml

# Style, types, then the fast tests: no Ray, no browser, nothing killed.
check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses 2 --dist loadfile -m "not cluster and not slow" --ignore tests/faults --ignore tests/browser

# What a change must pass.
test: check
	$(BIN)/pytest --numprocesses 2 --dist loadfile -m "not cluster and not slow" tests/faults tests/browser
	$(BIN)/ragtune models
	$(BIN)/pytest --numprocesses 2 --dist loadfile -m "cluster and not slow and not serve"
	$(BIN)/pytest -m "serve and not slow"

# The rest of what CI runs: jobs killed at every point, and whole runs of the modes of tuning.
slow: install
	$(BIN)/ragtune models
	$(BIN)/pytest --numprocesses 2 --dist loadfile -m "slow and not serve"
	$(BIN)/pytest -m "serve and slow"

bench: install
	$(BIN)/python -m bench.encoding
	$(BIN)/python -m bench.retrieval
	$(BIN)/python -m bench.answering
	$(BIN)/python -m bench.generation
	$(BIN)/python -m bench.memory
	$(BIN)/python -m bench.ann
	$(BIN)/python -m bench.living
	$(BIN)/python -m bench.training

clean:
	rm -rf $(VENV) workspace .mypy_cache .ruff_cache .pytest_cache
