# Everything runs in .venv, which `make setup` makes once, and again when pyproject.toml or constraints.txt change.
PYTHON ?= python3
# Where torch comes from, if not from the package registry, e.g. TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

PY := .venv/bin/python
PYTEST := $(PY) -m pytest
BENCHMARKS = $(filter-out _% gpu,$(basename $(notdir $(wildcard tests/benchmarks/*.py))))

.PHONY: help setup quickstart test test-slow test-gpu gpu lint audit schema bench clean

help:  ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

setup: .venv/installed  ## .venv with pinned versions and everything for the checks

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info < (3, 14) or sys.exit("needs Python 3.11 to 3.13: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch torchvision
	$(PY) -m pip install -c constraints.txt -e '.[dev]'
	touch $@

quickstart: setup  ## the main job on this machine: S3, Ray, training, scores, champion; about five minutes
	$(PY) -m infra.local.quickstart

# The tests with Ray take longest and come first (tests/conftest.py). pytest-xdist must keep this order.
test: setup  ## unit, property and short system tests; SAGAN_TEST_DATA names the folder of real images
	$(PYTEST) -m "not slow" --ignore=tests/gpu -n 3 --dist loadgroup --no-loadscope-reorder

# Tests of two files run at the same time, each with servers and a Ray cluster of its own.
test-slow: setup  ## rehearsals of the jobs, the sweep, the README, kills and signals
	$(PYTEST) -m slow --ignore=tests/gpu -n 2 --dist loadfile --durations=25

test-gpu: setup  ## on a CUDA device
	$(PYTEST) tests/gpu

# It needs no set-up: on a machine with torch, Triton, safetensors and pytest alone, `make gpu PY=python3` does.
# tests/conftest.py is left out: its servers need what `make setup` installs.
gpu:  ## on a CUDA device: the tests, then speed and memory of a step, into gpu.json and gpu.md; under ten minutes
	$(PY) -m pytest --confcutdir=tests/gpu tests/gpu
	$(PY) -m tests.benchmarks.gpu --json gpu.json --table gpu.md

lint: setup  ## style, security (bandit's rules), types and the direction of imports
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/lint-imports

# It asks pypi.org for every version, so it is no part of lint: a mirror of packages does not answer. --strict makes a
# package without an answer a failure. An exception is `--ignore-vuln ID` here, with its reason in a comment.
audit: setup  ## known vulnerabilities of the versions in constraints.txt; needs pypi.org
	.venv/bin/pip-audit --strict --no-deps --disable-pip -r constraints.txt

schema: setup  ## rewrite jobs/schema.json, by which editors check job files
	$(PY) -m pipeline config --schema > .venv/schema.json
	mv .venv/schema.json jobs/schema.json

bench: setup  ## every benchmark; one alone: .venv/bin/python -m tests.benchmarks.NAME
	@set -e; for name in $(BENCHMARKS); do echo "== $$name"; $(PY) -m tests.benchmarks.$$name; done

clean:  ## start over: forget all runs of this checkout and the local bucket
	rm -rf runs .local
