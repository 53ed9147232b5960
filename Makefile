# Installs, checks and demonstrates the project. On a fresh machine run `make demo` or `make test`; both install first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CLIENTS := .venv-clients
VLLM := .venv-vllm
# No usage reports, no model hub, and no threads inside tokenizers.
export RAY_USAGE_STATS_ENABLED := 0
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: install clients vllm demo check test slow slow-in-ci machines wheel bench clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; run: make PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(INSTALLED)

# Clients of the endpoint whose dependencies conflict with ours, in an environment of their own; tests/clients runs them.
clients: $(CLIENTS)/.installed

$(CLIENTS)/.installed: tests/clients/requirements.txt
	test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check --requirement tests/clients/requirements.txt
	touch $(CLIENTS)/.installed

# vLLM for CPUs, in an environment of its own: it needs other versions than ours. tests/vllm runs in it.
vllm: $(VLLM)/.installed

$(VLLM)/.installed: tests/vllm/requirements.txt
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement tests/vllm/requirements.txt
	touch $(VLLM)/.installed

# Index, ask and compare the arms on the small corpus of data/space.
demo: install
	$(BIN)/ragtune models
	$(BIN)/ragtune index configs/space.yaml
	$(BIN)/ragtune ask configs/space.yaml "What is the Hubble Space Telescope?"
	$(BIN)/ragtune compare configs/space.yaml

# Style, types, then the fast tests, which start no Ray and no browser and kill no process.
check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses 2 --dist loadfile -m "not cluster and not slow" --ignore tests/faults --ignore tests/browser \
		--ignore tests/clients

# All tests that a change must pass.
test: check clients
	$(BIN)/pytest tests/clients
	$(BIN)/pytest --numprocesses 2 --dist loadfile -m "not cluster and not slow" tests/faults tests/browser
	$(BIN)/ragtune models
	$(BIN)/pytest --numprocesses 2 --dist loadfile -m "cluster and not slow and not serve"
	$(BIN)/pytest -m "serve and not slow"

# The slow tests, of which CI runs those that are not long: jobs killed at every failpoint, and complete runs of the modes of tuning.
slow: install vllm
	$(BIN)/ragtune models
	$(BIN)/pytest --numprocesses 2 --dist loadfile -m "slow and not vllm and not serve and not machines"
	$(BIN)/pytest -m "serve and slow"
	$(VLLM)/bin/python -m pytest tests/vllm

slow-in-ci: install
	$(BIN)/ragtune models
	$(BIN)/pytest --numprocesses 2 --dist loadfile -m "slow and not long and not vllm and not serve and not machines"
	$(BIN)/pytest -m "serve and slow and not long"

# Jobs on several machines in namespaces of Linux: in each a machine is killed and another one joins. Skipped where
# namespaces cannot be made. `pytest -m machines` also kills an index build on them at random moments, for six minutes.
machines: install
	$(BIN)/pytest -m machines tests/cluster

# The wheel, built and tried outside the repository; what it installs besides comes from .venv.
wheel: install
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist .
	$(BIN)/ragtune models
	$(BIN)/python deploy/try_wheel.py dist/*.whl

# Benchmarks against other tools; docs/measurements.md has the results.
bench: install
	$(BIN)/python -m bench.encoding
	$(BIN)/python -m bench.retrieval
	$(BIN)/python -m bench.answering
	$(BIN)/python -m bench.bulk_answering
	$(BIN)/python -m bench.generation
	$(BIN)/python -m bench.memory
	$(BIN)/python -m bench.ann
	$(BIN)/python -m bench.living
	$(BIN)/python -m bench.training

clean:
	rm -rf $(VENV) $(CLIENTS) $(VLLM) dist workspace .mypy_cache .ruff_cache .pytest_cache
