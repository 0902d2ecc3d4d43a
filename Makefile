PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread a process: ranks share the cores, and results do not depend on how many there are.
export OMP_NUM_THREADS ?= 1
# Tests that run at a time; most use one process, some up to eight.
TEST_WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal

.DEFAULT_GOAL := help

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install -qq --constraint constraints.txt --editable .[dev]
	touch $@

install: $(VENV)/installed ## make .venv with everything

demo: export AUTOPARALLEL_COST_MODELS = runs/tables
demo: install ## measure this machine, fine-tune SmolLM2-135M on four processes, then the same script on two
	$(BIN)/python examples/prepare_smollm2.py
	$(BIN)/autoparallel profile --device cpu --budget 60 --output runs/tables
	AUTOPARALLEL_FLAVOR=cpu:4 $(BIN)/python examples/train_smollm2.py --out runs/smollm2-cpu4
	$(BIN)/python examples/complete.py --model runs/smollm2-cpu4
	AUTOPARALLEL_FLAVOR=cpu:2 $(BIN)/python examples/train_smollm2.py --out runs/smollm2-cpu2

test: install ## the fast tier of tests
	$(PYTEST) -m "not slow and not exhaustive"

test-all: install ## every proof, the slow ones too
	$(PYTEST) -m "not exhaustive"

exhaustive: install ## every plan that the planner may offer, on up to eight ranks: hours
	$(PYTEST) -m exhaustive

bench-speed: install ## the emitted program beside hand-written PyTorch, on this machine
	$(BIN)/python examples/prepare_smollm2.py
	$(BIN)/python -m benchmarks.runtime_speed

bench-self: install ## profile this machine, then predicted beside measured steps of six models
	$(BIN)/python examples/prepare_smollm2.py
	$(BIN)/python -m benchmarks.self_consistency

bench-accuracy: install ## prices beside published training runs: step time, memory, plan choice
	$(BIN)/python benchmarks/accuracy.py

bench-search: install ## how long planning takes, and plans beside those of other planners' spaces
	$(BIN)/python benchmarks/search.py

fit: install ## fit the cost tables to published training runs
	$(BIN)/python benchmarks/fit.py

check: install ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install ## rewrite the code in the one format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

wheel: install ## build the wheel into dist/
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

.PHONY: help install demo test test-all exhaustive bench-speed bench-self bench-accuracy bench-search fit check format wheel
