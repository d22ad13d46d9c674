# Each target makes what it needs. `make demo` and `make test` are all the set-up a fresh machine needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Any torch from 2.10 on will do; this one is what the figures were measured with.
TORCH ?= torch==2.13.0
# What `make test-matrix` runs beside: torch and the interpreter, one pair after the other.
MATRIX ?= 2.10.0:python3.10 2.11.0:python3.12 2.12.1:python3.12 2.13.0:python3.11 2.14.1:python3.11 2.15.0:python3.13 \
    2.15.0:python3.14
SOURCES := pyproject.toml setup.py $(wildcard csrc/*.h csrc/*/*)

.PHONY: demo test test-torch test-matrix test-wheel test-gpu bench docs gpu wheel lint format clean

demo: $(VENV)/.demo
	$(BIN)/python -m longtail demo

# Two processes share the cores: threads that spin while they wait take them from the other.
test test-torch: export OMP_WAIT_POLICY := passive

test: $(VENV)/.test
	$(BIN)/python -m pytest -n auto --no-loadscope-reorder -m "not gpu"

# What another torch could break, beside that torch in an environment of its own: make test-torch-2.10.0, the oldest.
# (The interpreter of its Triton, 3.6, fails with numpy 2.4. No torch changes what the emulation computes.)
TORCH_TESTS := $(patsubst %,tests/contract/test_%.py,asymmetric_loss class_balanced_loss class_balanced_multi_label \
    class_probabilities compile_func cross_entropy_torch default_device distribution_balanced_loss \
    distribution_balanced_module element_targets element_weights errors export float16 gradients hierarchical \
    hierarchical_arguments hierarchical_shards hierarchy hierarchy_shards images kept_gradient linear_classes \
    linear_cross_entropy linear_cross_entropy_memory linear_cross_entropy_module linear_cross_entropy_torch \
    linear_drift linear_hierarchical linear_hierarchical_operators linear_hierarchical_training linear_leading \
    linear_plan linear_row_statistics long_tail_options means module_options modules no_rows operators \
    probability_functions properties refused_arguments row_losses row_statistics row_statistics_modes rows scale_grad \
    semantics shard_ops sigmoid_bits sigmoid_semantics signatures softmax_definition softmax_operators token_weighting \
    two_way two_way_operators unwanted_entropy) \
    $(patsubst %,tests/parallel/test_%.py,contract dtensor dtensor_linear kept_gradient linear statistics vocab) \
    $(patsubst %,tests/triton/test_%.py,compile compile_dense compile_hierarchical compile_sigmoid compile_two_way \
    contract functions launch wrong_arguments)

test-torch-%:
	LONGTAIL_CUDA=0 $(MAKE) test-torch VENV=build/torch-$* TORCH=torch==$*

test-torch: $(VENV)/.package
	$(BIN)/python -m pip install --quiet hypothesis "numpy<2.4" pytest pytest-benchmark pytest-xdist
	$(BIN)/python -m pytest -n auto --no-loadscope-reorder -m "not gpu" -k "not emulated" $(TORCH_TESTS)

# One wheel beside every torch and Python of MATRIX, each in an environment that is deleted afterwards.
test-matrix: $(VENV)/.base
	rm -rf build/lib.* build/matrix
	LONGTAIL_REQUIRE_CPU=1 $(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/matrix .
	$(MAKE) test-wheel WHEELS=build/matrix

# The same of the wheel in the folder WHEELS.
test-wheel:
	$(PYTHON) tests/matrix.py $(WHEELS) $(MATRIX) -- $(TORCH_TESTS)

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

# What an index takes, in dist/: the sdist, and the wheel with the CPU and the CUDA library (LONGTAIL_CUDA=0: without), whose
# name says which systems it runs on. torch's own libraries stay out; CUDA's runtime is linked into ours.
REPAIR := auditwheel repair --exclude 'libtorch*.so' --exclude 'libc10*.so'
wheel: export LONGTAIL_CUDA ?= 1
wheel: $(VENV)/.publish
	rm -rf build/lib.* build/wheel dist
	$(BIN)/python -m build --no-isolation --sdist
	LONGTAIL_REQUIRE_CPU=1 $(BIN)/python -m pip wheel --no-build-isolation --no-deps --wheel-dir build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m $(REPAIR) --wheel-dir dist build/wheel/longtail-*.whl
	$(BIN)/python -m twine check --strict dist/*

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

$(VENV)/.publish: $(VENV)/.package
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[publish]"
	touch $@
