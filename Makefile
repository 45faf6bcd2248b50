# Everything runs in .venv, which the first target makes. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install quickstart test lint bench bench-step bench-scale aot gpu

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rsa_lightning needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[lora,report,test]'
	touch $@

# One thread, here and below: models this small gain little from two, and where another process keeps a core busy two
# OpenMP threads are ten times slower than one.
quickstart: install
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/rsa align -c configs/quickstart.yaml

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

RESULTS := benchmarks/results

# Peers are timed where they are installed: .venv/bin/pip install -c constraints.txt liger-kernel. It takes an hour or two.
bench: install
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks kernels --threads 1 --output $(RESULTS)
	OMP_NUM_THREADS=2 $(BIN)/python -m benchmarks kernels --threads 2 --suite linear --shapes 1024x512x32000 --output $(RESULTS)
	$(BIN)/python -m benchmarks figures $(RESULTS)

# every kernel compiled for GPUs that are not here: registers, spills, bytes
aot: install
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks aot

# needs a CUDA device and a torch that sees it; pieces of at most 9 minutes, and what is done is not done again
gpu: install
	$(BIN)/python -m benchmarks gpu --output $(RESULTS); code=$$?; \
	test $$code = 2 || $(BIN)/python -m benchmarks figures $(RESULTS); exit $$code

# needs TRL: .venv/bin/pip install -c constraints.txt trl
bench-step: install
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks step --output $(RESULTS)/step_cpu.json

# wants two cores that nobody else uses, and ten minutes; HH=FILE: layouts on the lengths of HH transcripts, too
bench-scale: install
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks scale $(if $(HH),--hh $(HH)) --output $(RESULTS)
	$(BIN)/python -m benchmarks figures $(RESULTS)
