# Each target makes the environment itself: .venv, from the exact versions of requirements.lock.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.ONESHELL:
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
PACKAGES := fastq pipelines serving feature_repo
ARGS ?=

# The same switches as fastq/environment.py, for tools that are run without the front door. "true" is the one word that all take.
export DO_NOT_TRACK := true
export FEAST_USAGE := False
export GX_ANALYTICS_ENABLED := false
export MLFLOW_DISABLE_TELEMETRY := true
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export RAY_USAGE_STATS_ENABLED := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export OMP_WAIT_POLICY := PASSIVE
export TZ := UTC

.PHONY: help demo test check bench bench-serve bench-operations bench-faults bench-data bench-online bench-ope bench-obp bench-analyst bench-train bench-learning docs mutants

help:  ## what can be made (this list)
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	echo '  ARGS="…" is handed on: make demo ARGS="--logs open-bandit", make test ARGS="-k equations"'

demo: $(VENV)/.installed  ## the whole loop on a simulated platform: logs, training, evaluation, serving, an explanation
	@$(VENV)/bin/fastq demo $(ARGS)

test: $(VENV)/.installed  ## all tests, with coverage
	@$(VENV)/bin/python -m pytest -n 2 --dist loadfile --cov --cov-report=term $(ARGS)

check: $(VENV)/.installed  ## style, format, types, and which module may import which
	@$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check --quiet . || { echo 'Not formatted as above: run .venv/bin/ruff format .'; exit 1; }
	$(VENV)/bin/mypy --strict $(PACKAGES)
	$(VENV)/bin/lint-imports

bench: $(VENV)/.installed  ## measurements: tests/benchmarks
	@if compgen -G 'tests/benchmarks/bench_*.py' > /dev/null; then
	  $(VENV)/bin/python -m pytest -s -o python_files='bench_*.py' tests/benchmarks $(ARGS)
	else
	  echo 'There are no benchmarks yet (tests/benchmarks/bench_*.py); nothing was measured.'
	fi

bench-serve: $(VENV)/.installed  ## the endpoint against a bare one behind the same Ray Serve: requests, latency, processor time
	@$(VENV)/bin/python -m pytest -s -o python_files='bench_*.py' tests/benchmarks/bench_serve.py $(ARGS)

bench-operations: $(VENV)/.installed  ## false alarms, power, coverage and rollback of what runs by itself
	@$(VENV)/bin/python -m pytest -s -o python_files=bench_operations.py tests/benchmarks/bench_operations.py $(ARGS)

bench-faults: $(VENV)/.installed  ## kill -9 and SIGTERM at every step of a retraining, then resumed; an hour; FAULTS=folder to go on in; ARGS=servers: of its servers
	@$(VENV)/bin/python tests/benchmarks/bench_faults.py $(ARGS)

bench-data: $(VENV)/.installed  ## logs to windows at size: 10 million events and decisions, and the slope from 100 thousand to 30 million
	@$(VENV)/bin/python -m pytest -s -o python_files='bench_data.py' tests/benchmarks/bench_data.py $(ARGS)

bench-online: $(VENV)/.installed  ## one player's state out of SQLite, Redis and PostgreSQL; features point in time against Feast's default store
	@$(VENV)/bin/python -m pytest -s -o python_files='bench_*.py' tests/benchmarks/bench_online.py $(ARGS)

bench-ope: $(VENV)/.installed  ## coverage of the intervals and error rates of the gate, in simulated truth; LOGS=2000, CELLS=folder to go on in
	@$(VENV)/bin/python -m pytest -s -o python_files='bench_ope*.py' tests/benchmarks $(ARGS)

bench-obp: $(VENV)/.installed  ## errors of the off-policy estimators beside the Open Bandit Pipeline's and SCOPE-RL's, on the same arrays; installs them in folders of their own
	@$(VENV)/bin/python -m pytest -s -o python_files='bench_*.py' tests/benchmarks/bench_obp.py $(ARGS)

bench-analyst: $(VENV)/.installed  ## what an analyst waits for: pages, sliders, SQL, explanations of everybody
	@$(VENV)/bin/python -m pytest -s -o python_files='bench_*.py' tests/benchmarks/bench_analyst.py $(ARGS)

bench-train: $(VENV)/.installed  ## both stages of training against a bare PyTorch loop, and the slope over rows; DECISIONS=3000000 for the largest log
	@$(VENV)/bin/python -m pytest -s -o python_files='bench_*.py' tests/benchmarks/bench_train.py $(ARGS)

bench-learning: $(VENV)/.installed  ## each part of the learner switched off in turn, against the truth; CELLS=folder to go on in
	@$(VENV)/bin/python -m pytest -s -o python_files='bench_learning.py' tests/benchmarks/bench_learning.py $(ARGS)

docs: $(VENV)/.installed  ## the documentation, in build/docs/site: quickstarts, guide, and the reference from docstrings, --help and OpenAPI
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet --strict --config-file docs/mkdocs.yml
	echo "Open $(CURDIR)/build/docs/site/index.html"

mutants: $(VENV)/.installed  ## what the tests of fastq/equations.py would not notice, line by line; mutmut lies in build/, outside the environment
	@test -d build/mutmut || $(VENV)/bin/python -m pip install --quiet -c requirements.lock --target build/mutmut mutmut==3.8.1
	export PYTHONPATH=build/mutmut OMP_NUM_THREADS=1
	$(VENV)/bin/python -m mutmut run --max-children 2 $(ARGS)
	$(VENV)/bin/python -m mutmut results

# The stamp is written last, so an installation that was cut off is taken up again.
$(VENV)/.installed: requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo 'Python 3.11 or newer is needed; there is no python3 on the path.'; exit 1; }
	"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; $(PYTHON) is older. Name one: make PYTHON=…"; exit 1; }
	test -x $(VENV)/bin/python || "$(PYTHON)" -m venv $(VENV)
	echo 'Installing what requirements.lock names into $(VENV); the first time takes some minutes.'
	$(VENV)/bin/python -m pip install --quiet --progress-bar on -r requirements.lock
	$(VENV)/bin/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@
