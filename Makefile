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

.PHONY: bench bench-all test test-all lint build docs fuzz sanitize compdb wheel clean

# The main job, a few minutes; bench-all runs every suite.
bench: build
	$(PY) -m benchmarks haar network sdo

bench-all: build
	$(PY) -m benchmarks

# One process a core and one thread a process. Lint is of the default versions.
# `make test T=tests/test_haar.py`, or T="tests -k haar", runs those alone, in one process, without lint.
ifdef T
test: build $(VENV)/installed
	$(VENV)/bin/python -m pytest $(T)
else
test: $(if $(filter .venv,$(VENV)),lint,build) $(VENV)/installed
	$(VENV)/bin/python -m pytest -n auto --dist loadfile -m "not slow"
endif

test-all: $(if $(filter .venv,$(VENV)),lint,build) $(VENV)/installed
	$(VENV)/bin/python -m pytest -n auto --dist loadfile

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

# Random calls against the definitions, for so long; a log in .cache/ keeps what was done.
SECONDS ?= 60
fuzz: build
	PYTHONPATH=tests $(PY) -W ignore -m fuzz --seconds $(SECONDS)

# The C++ kernels for this machine's instruction set (or that of ATEN_CPU_CAPABILITY=avx2) under GCC's sanitizers, in a
# build of their own. Fresh memory holds NaN.
SANITIZED := $(CURDIR)/build/sanitized
SANITIZED_TESTS := $(wildcard $(patsubst swformer_fast/ops/%,tests/test_%,$(wildcard swformer_fast/ops/[a-z]*.py)))
SANITIZED_TESTS += $(foreach t,contract haar sums kernel_sizes step shortcut pool fuzz sanitizers arguments,tests/test_$(t).py)
sanitize: .venv/installed
	SANITIZE=address,undefined DEBUG=1 SDO_SWFORMER_SKIP_CUDA=1 \
		$(PY) setup.py -q build --build-base $(SANITIZED) --build-lib $(SANITIZED)
	LD_PRELOAD="$(foreach l,libasan.so libubsan.so libstdc++.so.6,$(shell $(CXX) -print-file-name=$(l)))" \
	ASAN_OPTIONS=detect_leaks=0:max_malloc_fill_size=1073741824:malloc_fill_byte=255 \
	UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 PYTHONPATH=$(SANITIZED) \
		.venv/bin/pytest -n auto --dist loadfile -m "not slow" \
		-k "not (triton or reference or compile or opcheck or memory_is_bounded or does_not_grow or failed_allocation or layout_is_named)" \
		$(SANITIZED_TESTS)

# HTML in build/docs; a warning is an error.
docs: build
	$(PY) -W error -m pdoc --docformat google -o build/docs docs/guide.py swformer_fast sdo_fast sdo_fast.training sdo_fast.train swformer_kernels

# What clangd and clang-tidy read.
compdb: build
	ninja -C build/temp.* -t compdb compile compile_cuda > build/compile_commands.json
	ln -sf build/compile_commands.json compile_commands.json

# The wheel for this machine, as `.github/workflows/wheels.yml` builds it, and the oldest system that it can run on.
wheel: build
	$(PY) -m build --no-isolation --wheel
	auditwheel show dist/*.whl

clean:
	rm -rf build dist *.egg-info */_C_*.so
