# The doors of the project. Each sets up what it needs; PYTHON and TORCH may be overridden.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
READY := .venv/.ready
# libdeflate's C sources, for systems without it: they come inside the sdist of its Python binding.
DEFLATE := deflate==0.9.0 --hash=sha256:962e0a6f1ea3a94b900a8ea0ce138fa92bfcbafda5b86367104a259ffcd3462b
LIBDEFLATE := $(CURDIR)/build/libdeflate
PYTEST := $(BIN)/python -m pytest

.PHONY: help setup train test test-all sanitize fuzz bench docs lint format clean

help:
	@echo "make setup     create .venv and build the package in it"
	@echo "make train     train the quickstart tokenizer"
	@echo "make test      fast tests"
	@echo "make test-all  all tests that need no GPU"
	@echo "make sanitize  C++ tests under the address, undefined and thread sanitizers"
	@echo "make fuzz      libFuzzer on the chunk decoders (clang; FUZZ_SECONDS=600)"
	@echo "make bench     benchmarks"
	@echo "make docs      build the pages of docs/ into site/"
	@echo "make lint      ruff and mypy --strict"

setup: $(READY)

$(READY): pyproject.toml CMakeLists.txt $(wildcard csrc/* csrc/*/* cmake/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@command -v c++ >/dev/null || { echo "a C++ compiler is needed: apt-get install g++"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv || { echo "apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet "scikit-build-core>=0.10" "pybind11>=2.13" "cmake>=3.24" ninja
	@$(MAKE) --no-print-directory $(LIBDEFLATE) || echo "no sources of libdeflate: the system's, or zlib, will serve"
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[test,lint,tensorboard]" \
		-Ccmake.define.LIBDEFLATE_SOURCE_DIR=$(LIBDEFLATE)
	@touch $@

$(LIBDEFLATE):
	@mkdir -p build/sdist
	@echo "$(DEFLATE)" > build/sdist/requirements.txt
	$(BIN)/python -m pip download --quiet --no-deps --no-build-isolation --no-binary deflate \
		--requirement build/sdist/requirements.txt --dest build/sdist
	tar xzf build/sdist/deflate-*.tar.gz -C build/sdist
	mv build/sdist/deflate-*/libdeflate $@

train: $(READY) data/quickstart.h5
	$(BIN)/python -m spinlock_fast.train configs/quickstart.yaml

# Simulated once; an interrupted simulation goes on where it stopped.
data/quickstart.h5: | $(READY)
	$(BIN)/python -m spinlock_fast.generate --config configs/data/quickstart.yaml --output $@ --resume

# A process for each core, with one thread each: tests that need more threads set their number themselves.
PARALLEL := -n auto --dist worksteal
test test-all: export OMP_NUM_THREADS ?= 1

test: $(READY)
	$(PYTEST) -m "not slow and not gpu" $(PARALLEL)

test-all: $(READY)
	$(PYTEST) -m "not gpu" $(PARALLEL)

bench: $(READY)
	$(PYTEST) benchmarks --benchmark-only

# One build per sanitizer; the C++ parts need no Python.
sanitize: $(READY)
	for kind in address,undefined thread; do \
		$(BIN)/cmake -S tests/native -B build/sanitize-$$kind -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
			-DSANITIZE=$$kind -DLIBDEFLATE_SOURCE_DIR=$(LIBDEFLATE) >/dev/null && \
		$(BIN)/cmake --build build/sanitize-$$kind && \
		$(BIN)/ctest --test-dir build/sanitize-$$kind --output-on-failure || exit 1; \
	done

# What it finds stays in build/fuzz/corpus; an input that fails is written to build/fuzz.
CLANG ?= clang
CLANGXX ?= clang++
FUZZ_SECONDS ?= 600
fuzz: $(READY)
	@command -v $(CLANGXX) >/dev/null || \
		{ echo "clang is needed: apt-get install clang; or make CLANG=clang-14 CLANGXX=clang++-14 fuzz"; exit 1; }
	$(BIN)/cmake -S tests/native -B build/fuzz -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DFUZZ=ON \
		-DCMAKE_C_COMPILER=$(CLANG) -DCMAKE_CXX_COMPILER=$(CLANGXX) -DSANITIZE=address,undefined -DLIBDEFLATE_SOURCE_DIR=$(LIBDEFLATE) >/dev/null
	$(BIN)/cmake --build build/fuzz --target fuzz_decoder
	mkdir -p build/fuzz/corpus
	build/fuzz/fuzz_decoder -max_total_time=$(FUZZ_SECONDS) -max_len=20000 -artifact_prefix=build/fuzz/ \
		-print_final_stats=1 build/fuzz/corpus

docs: $(READY)
	$(BIN)/python -c 'import material, mkdocstrings' 2>/dev/null || \
		$(BIN)/python -m pip install --quiet "mkdocs-material>=9.5" "mkdocstrings[python]>=0.29"
	$(BIN)/python docs/make_settings.py
	$(BIN)/python -m mkdocs build --strict

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks
