# Two commands do it all: `make up` runs a cluster on this machine, `make test` runs the tests.
# Each installs what it needs, asking for root only where it must.

SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
SEEDS ?= 300
WORKERS ?= 2
SECONDS ?= 60
ROUNDS ?= 5
KILLS ?= 100
SEED ?= 1
RUNTIME ?= bubblewrap
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help up down status test lint format proto sim mutants nemesis kills bench gvisor install install-dev constraints clean

help: ## Show this list.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

up: install ## Start three control nodes and two agents here, run code in a sandbox, leave it running.
	@$(BIN)/python deploy/local_cluster.py up

down: ## Stop what `make up` started, and leave nothing behind.
	@if [ -x $(BIN)/python ]; then $(BIN)/python deploy/local_cluster.py down; else echo "nothing is installed, so nothing runs"; fi

status: install ## Show what of the local cluster runs.
	@$(BIN)/python deploy/local_cluster.py status

install:
	@deploy/install.sh

install-dev:
	@deploy/install.sh dev

test: install-dev ## Run lint and all tests, as CI does.
	@$(MAKE) --no-print-directory lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: install-dev ## Check style, types, layers, protos, and that generated code is current.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	cd proto && buf lint
	$(BIN)/lint-imports --no-cache
	deploy/check_protos.sh

format: install-dev ## Format the code.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

proto: install-dev ## Generate the code of the protos.
	deploy/generate_protos.sh

sim: install-dev ## Run the Raft simulator: make sim SEEDS=1000.
	$(BIN)/python -m tests.sim.run --seeds $(SEEDS)

mutants: install-dev ## Check that the simulator catches every known bug.
	$(BIN)/python -m tests.sim.mutants

nemesis: install-dev ## Hurt real clusters of three and five nodes, as root: make nemesis SECONDS=60.
	$(BIN)/python -m tests.nemesis.run --members 3 --seconds $(SECONDS)
	$(BIN)/python -m tests.nemesis.run --members 5 --seconds $(SECONDS)

kills: install-dev ## Kill an agent and its sandboxes at random: make kills KILLS=1000 RUNTIME=both.
	PYTHONPATH=.:proto $(BIN)/python -m tests.integration.agent.random_kills --kills $(KILLS) --seed $(SEED) --runtime $(RUNTIME)

bench: install-dev ## Measure clusters of its own on this machine: make bench ROUNDS=5, or QUICK=1.
	PYTHONPATH=.:proto $(BIN)/python bench/run.py --rounds $(ROUNDS) --seconds $(SECONDS) $(if $(QUICK),--quick)

gvisor: install ## Fetch gVisor's runsc from Debian 13, and see that sandboxes of it run here.
	@deploy/fetch_gvisor.sh
	@$(BIN)/prism-agent --probe --runtime=gvisor --log-level=error

constraints: install-dev ## Write the exact versions that are installed to constraints.txt.
	deploy/write_constraints.sh

clean: down ## Remove everything that these targets made here.
	rm -rf $(VENV) .run .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
