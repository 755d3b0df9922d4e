# Needs a python3 (3.10 or newer, with venv), nothing else: the first target to run makes .venv.
PYTHON ?= python3
PYTEST_ARGS ?=
MINUTES ?= 30

# Images of containers set this; imports, compiled anew in each, are most of the processes that tests start.
unexport PYTHONDONTWRITEBYTECODE

BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: help test reliability lint demo bench aot aot-tiles aot-known matrix compat tables docs fuzz

help:
	@echo "make test    all tests            PYTEST_ARGS='tests/ops -k lora' for some of them"
	@echo "make reliability    faults, hostile files, kills, long runs: as many as are promised, counted (an hour)"
	@echo "make lint    ruff check, ruff format --check"
	@echo "make demo    train and compare adapters on a small model"
	@echo "make bench   every op and whole steps on the CPU beside their peers, with a plot"
	@echo "make aot     compile every shipped kernel configuration for every target"
	@echo "make aot-tiles    of these every tile once for each type of elements, as it does most: a quarter of the time"
	@echo "make aot-known    compile some of them and write down what came out; to be run when kernels change"
	@echo "make matrix  every method on every task of every family, beside HF peft; writes docs/support.md"
	@echo "make compat  the core and every contract with the oldest and the newest supported releases of others' libraries"
	@echo "make fuzz MINUTES=30    random examples of every property, until the time is over or one does not hold"
	@echo "make tables  README's performance tables from benchmarks/results"
	@echo "make docs    docs/api.md from the docstrings"
	@echo "PYTHON=python3.12 makes .venv with another interpreter; remove .venv to change it later."

# pip is the last thing that venv installs, so a .venv without it was interrupted and is made again.
# Always with the constraints: an unpinned torch may be a different build, gigabytes larger. Of its 14,000 modules only
# those that are imported are compiled, then: half of the time that this takes.
$(INSTALLED): pyproject.toml setup.py constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --no-compile -c constraints.txt -e ".[demo,test,lint]"
	touch $@

# One thread in each of the two workers: more only compete, the models are tiny. A run without PYTEST_ARGS is a whole one,
# which must have raised every text in tests/error_texts.tsv.
test: $(INSTALLED)
	$(if $(PYTEST_ARGS),,FASTPEFT_WHOLE_RUN=1) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --durations=15 --benchmark-disable $(PYTEST_ARGS)

reliability: $(INSTALLED)
	$(BIN)/python -m tests.reliability $(PARTS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

demo: $(INSTALLED)
	$(BIN)/fastpeft demo

# The torch backend on a CPU: not a kernel benchmark, and the table says so.
bench: $(INSTALLED)
	mkdir -p bench-output
	$(BIN)/fastpeft bench all --device cpu --shape small --seconds 240 \
		--json bench-output/bench.json --plot bench-output/bench.png

aot: $(INSTALLED)
	$(BIN)/python tests/aot.py --all --processes $$(nproc)

aot-tiles: $(INSTALLED)
	$(BIN)/python tests/aot.py --tiles --processes $$(nproc)

# The tests compile what this does not know: with it up to date they take minutes less.
aot-known: $(INSTALLED)
	$(BIN)/python tests/aot.py --quick --update --processes $$(nproc)

matrix: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.matrix_report

# Each set of releases has an environment of its own. tests/test_contracts.py says in one message what has moved.
CORE := tests/test_contracts.py tests/test_compat.py tests/test_patching.py

compat: .compat/oldest/.installed .compat/newest/.installed
	OMP_NUM_THREADS=1 .compat/oldest/bin/python -m pytest -q -n 2 -p no:cacheprovider --benchmark-disable $(CORE)
	OMP_NUM_THREADS=1 .compat/newest/bin/python -m pytest -q -n 2 -p no:cacheprovider --benchmark-disable $(CORE)

.compat/%/.installed: compat/%.txt pyproject.toml setup.py
	test -x .compat/$*/bin/pip || $(PYTHON) -m venv .compat/$*
	.compat/$*/bin/python -m pip install --no-compile -c compat/$*.txt -e ".[test]"
	touch $@

fuzz: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.run --minutes $(MINUTES)

tables: $(INSTALLED)
	$(BIN)/python -m benchmarks.tables

# It reads the sources and imports nothing of them.
docs:
	$(PYTHON) docs/generate.py
