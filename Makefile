# Each target makes what it needs. `make demo` and `make test` are all the set-up a fresh machine needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Any torch from 2.10 on will do; this one is what the figures were measured with.
TORCH ?= torch==2.13.0
SOURCES := pyproject.toml setup.py $(wildcard csrc/*.h csrc/*/*)

.PHONY: demo test test-torch test-gpu bench docs gpu lint format clean

demo: $(VENV)/.demo
	$(BIN)/python -m longtail demo

test: $(VENV)/.test
	$(BIN)/python -m pytest -n auto --no-loadscope-reorder -m "not gpu"

# What another torch could break, beside that torch in an environment of its own: make test-torch-2.10.0, the oldest.
# (The interpreter of its Triton, 3.6, fails with numpy 2.4. No torch changes what the emulation computes.)
TORCH_TESTS := $(patsubst %,tests/contract/test_%.py,compile_func default_device element_targets errors export gradients \
    images kept_gradient linear_cross_entropy module_options no_rows operators refused_arguments scale_grad semantics \
    shard_ops sigmoid_bits sigmoid_semantics softmax_definition softmax_operators) \
    $(patsubst %,tests/parallel/test_%.py,contract dtensor vocab) \
    $(patsubst %,tests/triton/test_%.py,contract functions launch wrong_arguments)

test-torch-%:
	LONGTAIL_CUDA=0 $(MAKE) test-torch VENV=build/torch-$* TORCH=torch==$*

test-torch: $(VENV)/.package
	$(BIN)/python -m pip install --quiet hypothesis "numpy<2.4" pytest pytest-benchmark pytest-xdist
	$(BIN)/python -m pytest -n auto --no-loadscope-reorder -m "not gpu" -k "not emulated" $(TORCH_TESTS)

# On a machine with a GPU, whose torch TORCH names (pip's own choice on Linux is one for CUDA). The largest tests alone:
# each takes most of the memory.
test-gpu: $(VENV)/.test
	$(BIN)/python -m pytest -n 4 -m gpu -k "not 2_31"
	$(BIN)/python -m pytest -m gpu -k 2_31

bench: $(VENV)/.test
	$(BIN)/python -m bench all

docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -q -W --keep-going docs build/docs
	@echo build/docs/index.html

# All that needs a GPU: tests, compute-sanitizer, timings. Without nvcc it fails.
gpu: export LONGTAIL_CUDA := 1
gpu: $(VENV)/.test
	$(BIN)/python -m bench gpu-session

lint: $(VENV)/.lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(shell git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

format: $(VENV)/.lint
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(shell git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

clean:
	rm -rf $(VENV) build dist longtail_demo.png python/*.egg-info python/longtail/_C*.so .mypy_cache .ruff_cache .pytest_cache

$(VENV)/.base:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "setuptools>=77" wheel ninja numpy "$(TORCH)"
	touch $@

# The package itself, editable, with its kernels compiled against the installed torch.
$(VENV)/.package: $(VENV)/.base $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable .
	touch $@

$(VENV)/.demo: $(VENV)/.package
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[demo]"
	touch $@

# The kernels are compiled while pip fetches what the tests need; the last line takes what was compiled.
$(VENV)/.test: $(VENV)/.base $(SOURCES)
	$(BIN)/python setup.py -q build_ext & \
	LONGTAIL_CPU=0 LONGTAIL_CUDA=0 $(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[test,bench]"; \
	fetched=$$?; wait $$! && exit $$fetched
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $(VENV)/.package $@

$(VENV)/.docs: $(VENV)/.package
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[docs]"
	touch $@

$(VENV)/.lint: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[lint]"
	touch $@
