# `make bench` and `make test` are the two commands; each sets up what it needs.
PYTHON ?= python3
# `make test TORCH=2.11` takes the versions of requirements/torch2.11.txt, in an environment of their own.
DEFAULT_TORCH := 2.13
TORCH ?= $(DEFAULT_TORCH)
VENV := $(if $(filter $(DEFAULT_TORCH),$(TORCH)),.venv,.venvs/torch$(TORCH))
PY := .venv/bin/python
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE
export PATH := $(CURDIR)/$(VENV)/bin:$(CURDIR)/.venv/bin:$(PATH)

.PHONY: bench bench-all test test-all lint build clean

# The main job, a few minutes; bench-all runs every suite.
bench: build
	$(PY) -m benchmarks haar network sdo

bench-all: build
	$(PY) -m benchmarks

# One process a core and one thread a process. T names files or tests. Lint is of the default versions.
test: $(if $(filter .venv,$(VENV)),lint,build) $(VENV)/installed
	$(VENV)/bin/python -m pytest -n auto --dist loadfile -m "not slow" $(T)

test-all: $(if $(filter .venv,$(VENV)),lint,build) $(VENV)/installed
	$(VENV)/bin/python -m pytest -n auto --dist loadfile $(T)

lint: build
	ruff check .
	ruff format --check .
	mypy

# Always with the default torch: one library serves every version. ninja compiles only what changed.
build: .venv/installed
	$(PY) setup.py -q build_ext --inplace

define install
test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
$(@D)/bin/python -m pip install -q -r $< -r requirements/tools.txt
SDO_SWFORMER_SKIP_EXT=1 $(@D)/bin/python -m pip install -q -c $< --no-build-isolation -e ".[diffusers,bench,examples,dev]"
touch $@
endef

.venv/installed: requirements/torch$(DEFAULT_TORCH).txt requirements/tools.txt pyproject.toml setup.py
	$(install)

.venvs/torch%/installed: requirements/torch%.txt requirements/tools.txt pyproject.toml setup.py
	$(install)

clean:
	rm -rf build dist *.egg-info */_C_*.so
