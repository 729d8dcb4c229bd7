# `make` says what there is. Everything runs from .venv, which is made when it is missing or out of date.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# More for pytest, a benchmark or the demo: make test ARGS="-k gang -x"
ARGS ?=
# Tests run side by side, a file at a time: most of the suite waits, for processes to start or leases to run out.
# WORKERS=0 runs them one after another in one process (for a debugger).
WORKERS ?= $(shell expr $$(nproc 2>/dev/null || echo 2) + 1)
SUITE = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

PACKAGES := protocol/gpuyard_protocol client/gpuyard daemon/gpuyard_daemon agents/gpuyard_agent
SOURCES := $(PACKAGES) tests bench
BENCHES := latency drain submit scale

.DEFAULT_GOAL := help
.PHONY: help venv demo test machine check format docs bench soak clean

help:
	@echo "make demo    a whole yard with simulated GPUs and a mixed workload, live, about a minute"
	@echo "make test    every test that needs neither a GPU nor root"
	@echo "make machine the tests on a machine with a real systemd and on a network with faults; needs root, systemd-container, podman, busybox, iproute2"
	@echo "make check   format, lint, types, import contracts, freshness of docs/, all tests: what CI runs"
	@echo "make bench   the figures of README.md"
	@echo "make soak    what tries to break it, for hours: SOAK_SEEDS=1000 SOAK_KILLS=1000 SOAK_HOURS=24 SOAK_SEED=date"
	@echo "make docs    write docs/asyncapi.yaml from the message types"
	@echo "make format  let ruff write the code its way"
	@echo "make clean   remove .venv, caches and build output"

venv: $(READY)

$(READY): pyproject.toml requirements-dev.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "gpuyard needs Python 3.11 or newer; choose one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "this Python cannot make virtual environments; on Debian: apt-get install python3-venv" >&2; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version) (about half a minute) ..."
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check -c requirements-dev.lock -e '.[dev]'
	@touch $@

demo: $(READY)
	@$(BIN)/gpuyard demo $(ARGS)

test: $(READY)
	@$(SUITE) $(ARGS)

check: $(READY)
	@echo "== format"
	@$(BIN)/ruff format --check --quiet $(SOURCES) || { echo "run: make format" >&2; exit 1; }
	@echo "== lint"
	@$(BIN)/ruff check --quiet $(SOURCES)
	@echo "== types"
	@$(BIN)/mypy --no-error-summary
	@echo "== import contracts"
	@report=$$($(BIN)/lint-imports --no-logo) || { echo "$$report" >&2; exit 1; }
	@echo "== docs"
	@$(BIN)/python -m gpuyard_protocol.asyncapi --check docs/asyncapi.yaml
	@echo "== tests on a machine with systemd"
	@if [ "$$(id -u)" = 0 ]; then $(BIN)/python -m pytest -q -m machine tests/systemd tests/faults; \
	  else echo "NOT RUN: booting a machine needs root (make machine)"; fi
	@echo "== tests"
	@$(SUITE) -q $(ARGS)

machine: $(READY)
	@$(BIN)/python -m pytest -q -m machine tests/systemd tests/faults $(ARGS)

format: $(READY)
	@$(BIN)/ruff check --quiet --fix-only $(SOURCES)
	@$(BIN)/ruff format $(SOURCES)

docs: $(READY)
	@$(BIN)/python -m gpuyard_protocol.asyncapi --write docs/asyncapi.yaml

bench: $(READY)
	@for name in $(BENCHES); do echo "== bench.$$name"; $(BIN)/python -m bench.$$name $(ARGS) || exit 1; done

SOAK_SEED ?= $(shell date +%Y%m%d)
SOAK_SEEDS ?= 1000
SOAK_KILLS ?= 1000
SOAK_HOURS ?= 24
SOAK_NODES ?= 200
SOAK_CUTS ?= 10
SOAK_EXAMPLES ?= 2000
SOAK_FUZZ_S ?= 300
SOAK_PACKETS_S ?= 600
SOAK_RUNS ?= 1
soak: export PYTHONPATH := tests
soak: $(READY)
	@echo "== $(SOAK_SEEDS) simulated yards, from seed $(SOAK_SEED) on"
	@$(BIN)/python -m faults.simulate --seed $(SOAK_SEED) --count $(SOAK_SEEDS) --steps 120
	@$(BIN)/python -m faults.simulate --seed $(SOAK_SEED) --count $(SOAK_SEEDS) --steps 120 --kind partitions
	@echo "== $(SOAK_HOURS) hours of $(SOAK_NODES) nodes with faults, seed $(SOAK_SEED), and what they keep"
	@$(BIN)/python -m faults.simulate --seed $(SOAK_SEED) --nodes $(SOAK_NODES) --hours $(SOAK_HOURS)
	@echo "== $(SOAK_KILLS) kills of a real yard, seed $(SOAK_SEED)"
	@$(BIN)/python -m bench.kills --kills $(SOAK_KILLS) --seed $(SOAK_SEED)
	@echo "== a quarter as many with two daemons, seed $(SOAK_SEED)"
	@$(BIN)/python -m bench.kills --kills $$(($(SOAK_KILLS) / 4)) --seed $(SOAK_SEED) --standby
	@echo "== a network that loses, repeats, delays and withholds packets, $(SOAK_PACKETS_S) s, seed $(SOAK_SEED) (as root)"
	@$(BIN)/python -m faults.packets --seconds $(SOAK_PACKETS_S) --seed $(SOAK_SEED)
	@echo "== every decoder, $(SOAK_EXAMPLES) examples each"
	@FUZZ_EXAMPLES=$(SOAK_EXAMPLES) $(BIN)/python -m pytest -q tests/faults/test_fuzz.py
	@echo "== every decoder, led by coverage, $(SOAK_FUZZ_S) s"
	@if $(BIN)/pip install --quiet --disable-pip-version-check -c requirements-dev.lock --only-binary :all: atheris; \
	  then $(BIN)/python -m soak.coverage_fuzz --seconds $(SOAK_FUZZ_S) --seed $(SOAK_SEED); \
	  else echo "NOT RUN: no wheel of atheris for this Python"; fi
	@echo "== $(SOAK_CUTS) power cuts, seed $(SOAK_SEED); a full disk (both as root)"
	@$(BIN)/python -m soak.power_loss --rounds $(SOAK_CUTS) --seed $(SOAK_SEED)
	@$(BIN)/python -m soak.full_disk
	@for run in $$(seq $(SOAK_RUNS)); do echo "== suite $$run of $(SOAK_RUNS)"; $(SUITE) -q $(ARGS) || exit 1; done

clean:
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist build
	@find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
