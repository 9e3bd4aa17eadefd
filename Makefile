# From an empty machine with Python to a trained model (make run) and to a tested checkout (make test).

PYTHON ?= python3
MPI ?= mpich
# Never two MPIs in one environment: both bring bin/mpirun and lib/libmpi.so.
VENV ?= $(if $(filter mpich,$(MPI)),.venv,.venv-$(MPI))
NP ?= 8
ROUNDS ?= 2
SEED ?= 0
ARGS ?=

BIN = $(VENV)/bin
RESULTS = tests/benchmarks/results
PIP_INSTALL = $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: help run test exam test-gpu test-hosts test-slurm test-browser lint bench bench-gpu clean
.DEFAULT_GOAL := help

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo 'Variables: NP=8 (ranks), ROUNDS=2 SEED=0 (exam), ARGS= (more arguments), MPI=mpich|openmpi, VENV=.venv, PYTHON=python3'

run: $(VENV)/.installed  ## train on NP ranks; ARGS are mpitrain's arguments
	$(BIN)/mpirun -np $(NP) $(BIN)/python -m mpitrain $(ARGS)

test: $(VENV)/.installed-dev  ## all tests that need no GPU, hosts or browser, on 1 to 8 ranks; ARGS are pytest's arguments
	$(BIN)/python -m pytest $(ARGS)

test-gpu: $(VENV)/.installed-dev  ## the tests that need a GPU, on 1, 2 and 4 ranks; fails where there is none
	$(BIN)/python -m pytest -m gpu $(ARGS)

test-hosts: $(VENV)/.installed-dev  ## the tests on emulated hosts with a network between them; skipped without root
	$(BIN)/python -m pytest -m hosts tests/hosts $(ARGS)

test-slurm: $(VENV)/.installed-dev  ## the tests under a Slurm of their own; skipped without root, slurm-wlm and munge
	$(BIN)/python -m pytest -m slurm tests/jobs $(ARGS)

test-browser: $(VENV)/.installed-dev  ## the tests of the report's page in a headless Chromium
	$(BIN)/python -m pytest -m browser tests/browser $(ARGS)

exam: $(VENV)/.installed-dev  ## kill, stop and damage runs; a table of what came of it; ROUNDS=50 SEED=1 for random instants
	ROUNDS=$(ROUNDS) SEED=$(SEED) $(BIN)/python -m pytest tests/exam $(ARGS)

lint: $(VENV)/.installed-dev  ## style, spelling, types, import rules, shell scripts
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/shellcheck -x .ci/run jobs/*.sh

bench: $(VENV)/.installed-dev  ## all-reduce, training, tagging beside others', on up to 8 ranks, into tests/benchmarks/results
	for ranks in 2 4 8; do \
	  $(BIN)/mpirun -np $$ranks $(BIN)/python -m mpitrain bench allreduce --out $(RESULTS) $(ARGS) || exit; done
	for model in minilm-l6 bert-base-uncased; do \
	  $(BIN)/mpirun -np 2 $(BIN)/python -m mpitrain bench train --model $$model --train.micro_batches 2 \
	    --train.precision bf16 --lengths tests/benchmarks/lengths.txt --steps 2 --out $(RESULTS)/$$model || exit; done
	$(BIN)/python tests/benchmarks/compare_step.py --out $(RESULTS)
	$(BIN)/python tests/benchmarks/compare_train.py --out $(RESULTS)
	$(BIN)/python tests/benchmarks/compare_pipeline.py --out $(RESULTS)
	$(BIN)/python tests/benchmarks/compare_predict.py --out $(RESULTS)
	if $(BIN)/python tests/support/hosts.py; then $(BIN)/python tests/benchmarks/network.py --out $(RESULTS); fi

bench-gpu: $(VENV)/.installed-dev  ## training on a GPU by 1, 2, 4 ranks beside a Hugging Face loop, and by the fastest product
	$(BIN)/python tests/benchmarks/compare_gpu.py --out $(RESULTS) $(ARGS)
	for ranks in 1 2 4; do for model in bert-base-uncased bert-large-uncased; do \
	  $(BIN)/mpirun -np $$ranks $(BIN)/python -m mpitrain bench train --model $$model --train.device cuda \
	    --train.micro_batches $$ranks --train.batch_size 256 --train.precision bf16 --mesh.data $$ranks \
	    --lengths tests/benchmarks/lengths.txt --repeats 5 --steps 10 --out $(RESULTS)/gpu-$$model || exit; done; done

clean:  ## remove environments and caches; runs are kept
	rm -rf .venv .venv-* dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Python is an order-only prerequisite: it is a link, and the age of what it points to says nothing.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing mpitrain with $(MPI) into $(VENV) (minutes, the first time)"
	$(PIP_INSTALL) --editable '.[$(MPI)]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing mpitrain with $(MPI) and what tests and checks need into $(VENV) (minutes, the first time)"
	$(PIP_INSTALL) --editable '.[$(MPI),report,tensorboard,test,dev]'
	@touch $(VENV)/.installed $@

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || \
	  { echo "error: found no $(PYTHON); install Python 3.11 or newer, or name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1); 3.11 is needed, or name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "error: $(PYTHON) has no venv module; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
