# Everything runs in .venv, which these targets make; only python3, git and make need to be there.
#
#   make demo            train and report on photographs, about four minutes on two cores
#   make test            all tests
#   make check           ruff and mypy
#   make bench           the benchmarks, side by side with FrEIA and scikit-learn
#
# Without a GPU, PyTorch's CPU wheels save several GB:
#   make test TORCH_INDEX=<the CPU index URL shown by the "Get Started" page of pytorch.org>

PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test check bench clean

demo: $(VENV)/installed
	$(BIN)/fastbgad demo --out runs/demo

test: $(VENV)/installed
	$(BIN)/python -m pytest

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/installed
	$(BIN)/python -m pytest benchmarks

# torch first, from the index of choice; everything else then accepts what is there.
$(VENV)/installed: pyproject.toml constraints.txt
	@echo "installing into $(VENV); the first time this downloads PyTorch and takes some minutes"
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch torchvision
	$(PIP_INSTALL) --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks
