# `make bench` and `make test` are the two commands; each sets up what it needs.
PYTHON ?= python3
PY := .venv/bin/python
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: bench bench-all test test-all lint build clean

# The main job, a few minutes; bench-all runs every suite.
bench: build
	$(PY) -m benchmarks haar network sdo

bench-all: build
	$(PY) -m benchmarks

test: lint
	$(PY) -m pytest -m "not slow"

test-all: lint
	$(PY) -m pytest

lint: build
	ruff check .
	ruff format --check .
	mypy

# ninja compiles only what changed.
build: .venv/installed
	$(PY) setup.py -q build_ext --inplace

.venv/installed: requirements-dev.txt pyproject.toml setup.py
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install -q -r requirements-dev.txt
	SDO_SWFORMER_SKIP_EXT=1 $(PY) -m pip install -q --no-build-isolation -e ".[diffusers,bench,examples,dev]"
	touch $@

clean:
	rm -rf build dist *.egg-info */_C_*.so
