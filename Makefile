# Everything runs in .venv, which these targets make; only python3, git and make need to be there.
#
#   make demo            train and report on photographs, about four minutes on two cores
#   make test            the tests, a quarter of an hour on two cores; ARGS="-m 'not slow and not interpreter'" is quicker
#   make test-slow       the tests that `make test` leaves out
#   make test-all        both
#   make test-lowest     some of them with the oldest versions that pyproject.toml allows; five minutes on two cores
#   make test-newest     the same with the newest release of everything
#   make check           ruff and mypy
#   make bench           the benchmarks, side by side with FrEIA, anomalib and scikit-learn; a quarter of an hour
#   make bench-check     compare speed with what was measured before; a minute or two
#   make bench-update    measure again what bench-check compares with
#   make bench-page      write benchmarks/README.md from the figures that were kept
#   make gpu             on a CUDA GPU: every kernel checked, timed and tuned; eight minutes
#   make gpu-carry       what `make gpu` carries to a machine without a network: compiled kernels; needs no GPU
#   make gpu-rehearsal   the Python side of `make gpu` on such a machine's versions; needs no GPU
#   make resources       check what every kernel needs of the chip against its budget; needs no GPU
#
# Without a GPU, PyTorch's CPU wheels save several GB:
#   make test TORCH_INDEX=<the CPU index URL shown by the "Get Started" page of pytorch.org>

PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
# Of their own, because their versions are not those of constraints.txt. The lowest bounds are for the lowest Python.
LOWEST := .venv-lowest
NEWEST := .venv-newest
LOWEST_PYTHON ?= python3.11
PIP_QUIET := --quiet --disable-pip-version-check
FROM_INDEX = $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
PIP_INSTALL := $(BIN)/python -m pip install $(PIP_QUIET) --constraint constraints.txt

.PHONY: demo test test-slow test-all test-lowest test-newest check bench bench-check bench-update bench-ratios \
	bench-page gpu gpu-carry gpu-rehearsal resources clean

demo: $(VENV)/installed
	$(BIN)/fastbgad demo --out runs/demo

# Tests use one thread each, so every core runs some of them: a file at a time, since its tests share what is expensive.
# tests/conftest.py says which files come first.
PYTEST := -m pytest -n auto --dist loadfile --no-loadscope-reorder
test: $(VENV)/installed
	$(BIN)/python $(PYTEST) -m "not slow" $(ARGS)

test-slow: $(VENV)/installed
	$(BIN)/python $(PYTEST) -m slow $(ARGS)

test-all: $(VENV)/installed
	$(BIN)/python $(PYTEST) $(ARGS)

# Every operation, its kernels in Triton's interpreter, training, files, export and the command line, once each.
QUICK := test_installation.py test_lower_bounds.py kernels/test_triton_version.py ops/flow/test_dispatcher.py \
	ops/flow/test_compiled.py ops/flow/test_onednn.py ops/flow/test_portable.py \
	ops/flow/test_registered_operator.py kernels/coupling/test_coupling.py ops/log_likelihood/test_dispatcher.py \
	ops/boundary/test_dispatcher.py ops/boundary/test_registered.py ops/spp_loss/test_dispatcher.py \
	ops/spp_loss/test_registered.py ops/score_map/test_dispatcher.py ops/score_map/test_registered.py \
	ops/test_positional.py train/test_losses.py evaluate/test_metrics.py features/test_store.py \
	backbones/test_timm_features.py backbones/test_packaged.py backbones/test_standardization.py \
	data/test_images.py data/test_demo.py system/test_files.py model/test_detector.py train/test_fit.py \
	predict/test_local.py predict/test_ray.py export/test_detector.py evaluate/test_report.py render/test_plots.py \
	cli/test_parser.py compat/freia/test_anomalib_cflow.py
PYTEST_QUICK := $(PYTEST) -rs -m "not slow" $(QUICK:%=tests/%)

test-lowest: $(LOWEST)/installed
	$(LOWEST)/bin/python $(PYTEST_QUICK) $(ARGS)

test-newest: $(NEWEST)/installed
	$(NEWEST)/bin/python $(PYTEST_QUICK) $(ARGS)

# mypy sees the package as it is installed: with the kernels in it, not with the file that leads a checkout to them.
check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/types
	mkdir -p build/types/fastbgad
	ln -s $(CURDIR)/fastbgad/* build/types/fastbgad/
	ln -sfn $(CURDIR)/kernels build/types/fastbgad/kernels
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml

bench: $(VENV)/installed
	$(BIN)/python -m pytest benchmarks --save-results $(ARGS)

# Ratios to contenders timed in the same run, held against benchmarks/baselines/<machine>.json.
bench-check: $(VENV)/installed
	$(BIN)/python benchmarks/check.py check $(ARGS)

bench-update: $(VENV)/installed
	$(BIN)/python benchmarks/check.py update $(ARGS)

# For comparing two checkouts on one machine: make bench-ratios OUT=base.json
OUT ?= ratios.json
bench-ratios: $(VENV)/installed
	$(BIN)/python benchmarks/check.py measure --out $(OUT) $(ARGS)

bench-page: $(VENV)/installed
	$(BIN)/python benchmarks/page.py $(ARGS)

# Takes the python3 that has PyTorch and Triton, where there is one, with nothing installed; else .venv.
gpu:
	@if $(PYTHON) -c "import torch, triton, timm, pytest" 2>/dev/null; then \
		$(PYTHON) -m benchmarks.gpu $(ARGS); \
	else \
		$(MAKE) $(VENV)/installed && $(BIN)/python -m benchmarks.gpu $(ARGS); \
	fi

# The versions of benchmarks/gpu/requirements.txt, which are those of a machine that lends its GPU.
PYTHON312 ?= python3.12
GPU_VENV := .venv-gpu
$(GPU_VENV)/installed: benchmarks/gpu/requirements.txt
	@$(PYTHON312) -c "" || { echo "error: this needs Python 3.12: name it by PYTHON312=PATH" >&2; exit 2; }
	@echo "installing into $(GPU_VENV); the first time this downloads PyTorch and takes some minutes"
	$(PYTHON312) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@

gpu-carry: $(GPU_VENV)/installed
	$(GPU_VENV)/bin/python -m pip wheel --quiet --no-deps --wheel-dir .gpu/wheels FrEIA==0.2
	$(GPU_VENV)/bin/python -m benchmarks.gpu.carried $(ARGS)

gpu-rehearsal: $(GPU_VENV)/installed
	$(GPU_VENV)/bin/python -m benchmarks.gpu --driver stand-in --out runs/gpu-rehearsal --seconds 3600 --stage-seconds 900 $(ARGS)

resources: $(VENV)/installed
	$(BIN)/python -m fastbgad.kernels.resources

# torch first, from the index of choice; everything else then accepts what is there.
$(VENV)/installed: pyproject.toml constraints.txt
	@echo "installing into $(VENV); the first time this downloads PyTorch and takes some minutes"
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) $(FROM_INDEX) torch torchvision
	$(PIP_INSTALL) --editable '.[dev]'
	@touch $@

$(LOWEST)/installed: pyproject.toml tests/lower_bounds.py
	@echo "installing into $(LOWEST); this downloads PyTorch and takes some minutes"
	$(LOWEST_PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python tests/lower_bounds.py > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install $(PIP_QUIET) --constraint $(LOWEST)/constraints.txt $(FROM_INDEX) torch torchvision
	$(LOWEST)/bin/python -m pip install $(PIP_QUIET) --constraint $(LOWEST)/constraints.txt --editable '.[dev]'
	@touch $@

# The newest of today: `make clean` makes it ask again.
$(NEWEST)/installed: pyproject.toml
	@echo "installing into $(NEWEST); this downloads PyTorch and takes some minutes"
	$(PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/python -m pip install $(PIP_QUIET) $(FROM_INDEX) torch torchvision
	$(NEWEST)/bin/python -m pip install $(PIP_QUIET) --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) $(LOWEST) $(NEWEST) $(GPU_VENV) .gpu build *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks
