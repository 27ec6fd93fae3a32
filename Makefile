# Every target that needs it makes .venv from pyproject.toml first, and again only after that file has changed.
PYTHON ?= python3
BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help demo test check parity gpu-check gpu-check-prepare bench reference golden docs

help: ## these words
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/.runtime ## Fashion-MNIST to an evaluated encoder on two processes, in minutes; FASHION_MNIST=FOLDER for your own copy
	@$(BIN)/python launchers/demo.py $(if $(FASHION_MNIST),"$(FASHION_MNIST)")

test: .venv/.dev ## the test suite, in four processes: those that test SLURM mostly wait
	@$(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder

check: .venv/.dev ## ruff, mypy --strict, import order
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy --strict
	@$(BIN)/python -m pytest tests/test_layers.py

parity: .venv/.dev ## every method under every engine on 2 and 4 processes against one, as the matrix of docs/explain/exactness.md; half an hour
	@PYTHONPATH=.:tests $(BIN)/python tests/parity/matrix.py

# A machine that .gpu/ was brought to has no network, so nothing is installed there.
gpu-check: $(if $(wildcard .gpu/gpu_check.sh),,.venv/.dev) ## on a machine with a GPU: parity with the CPU, speed, training; see benchmarks/gpu
	@PYTHON=$(if $(wildcard .gpu/gpu_check.sh),$(PYTHON),$(BIN)/python) bash benchmarks/gpu/gpu_check.sh

gpu-check-prepare: .venv/.dev ## .gpu/ for a GPU machine without network; DATA=FOLDER of cifar10.tar and imagenet_sample.tar, HAS=FILE of its pip list
	@$(BIN)/python -m benchmarks.gpu.prepare $(if $(DATA),--data "$(DATA)") $(if $(HAS),--has "$(HAS)")

bench: .venv/.dev .venv/.peers ## the data plane beside its peers, some twenty minutes; SHARDS=FOLDER of photographs
	@$(if $(SHARDS),,echo "error: SHARDS=FOLDER is needed: shards of photographs, by shards/folder.py or shards/imagenet.py" >&2; exit 2;) \
	  OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.data "$(SHARDS)" --lightly .venv/peers/lightly --albumentations .venv/peers/albumentations

reference: .venv/.runtime ## the reference run of benchmarks/RESULTS.md; IMAGES=FOLDER with train/CLASS and test/CLASS of CIFAR-10
	@$(if $(IMAGES),,echo "error: IMAGES=FOLDER is needed" >&2; exit 2;) $(BIN)/python benchmarks/cifar10.py "$(IMAGES)" runs/reference

golden: .venv/.dev ## rewrite the golden losses, sample orders and names, after a change that is meant to alter them
	@$(BIN)/python tests/golden/regenerate.py && $(BIN)/python tests/golden/order.py

docs: .venv/.docs ## the pages of docs/ as a web site in docs/_build
	@$(BIN)/python docs/generate.py
	@$(BIN)/python -m sphinx -q -W --keep-going docs docs/_build && echo "docs/_build/index.html"

.venv/.runtime .venv/.dev .venv/.docs: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed and '$(PYTHON)' is not; name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo "error: '$(PYTHON)' cannot make environments; on Debian and Ubuntu: sudo apt-get install python3-venv" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@echo "installing into .venv: PyTorch with CUDA is about 5 GB, the first time takes some minutes"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --editable '.$(if $(filter %.dev,$@),[dev])$(if $(filter %.docs,$@),[docs])'
	@touch .venv/.runtime $@

# Peers of the benchmarks, apart from the environment that everything else uses; what they share with it they take from it.
.venv/.peers: .venv/.runtime
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --upgrade --target .venv/peers/lightly lightly==1.6.0 lightning-utilities
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --upgrade --target .venv/peers/albumentations \
	  albumentations==2.0.8 albucore==0.0.24 stringzilla simsimd
	@touch $@
