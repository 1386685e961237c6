# Everything that one does with the project. `make demo` and `make test` need python3 with venv, make and git, no more.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CODE := __init__.py __main__.py _version.py cli.py commands convert formats
TYPED := $(addprefix build/typing/diskmorph/,$(CODE))

.DEFAULT_GOAL := help
.PHONY: help setup packages demo test test-all lint format types unit bench fuzz wheel clean

help:  ## what can be made
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/  make \1#\2/p' $(MAKEFILE_LIST) | column -t -s '#' 2>/dev/null || grep '##' $(MAKEFILE_LIST)

# pip below 25.1 does not know dependency groups; a new environment has the one that came with Python.
$(BIN)/.ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --editable . --group dev
	touch $@

# mypy knows the package by its name only through this link: the repository's root is the package.
build/typing/diskmorph:
	mkdir -p build/typing
	ln -sfn ../.. $@

# Byte code is written here, not at the first use: that may happen as a user who cannot write it, or be forbidden.
setup: $(BIN)/.ready build/typing/diskmorph  ## an environment in .venv with the package and the tools
	$(BIN)/python -m compileall -q $(CODE)

packages: tests/packages.txt  ## install the Debian packages that tests hold the product against
	scripts/packages tests/packages.txt

demo: $(BIN)/.ready  ## make a disk and convert it into every format and back
	$(BIN)/python scripts/demo.py

test: packages setup lint types unit  ## what every change must pass: lint, types, tests

test-all: packages setup lint types  ## the same with the slow tests
	$(BIN)/python -m pytest -q -n auto --dist loadfile

lint: setup  ## ruff: rules and layout
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup  ## mypy --strict
	$(BIN)/mypy $(TYPED)

unit: setup  ## the tests without the slow ones
	$(BIN)/python -m pytest -q -n auto --dist loadfile -m 'not slow'

format: setup  ## mend layout and what ruff can mend
	$(BIN)/ruff check --fix --exit-zero .
	$(BIN)/ruff format .

bench: packages setup  ## beside qemu-img, with its best flags, in alternation
	$(BIN)/python benchmarks/bench.py
	$(BIN)/python benchmarks/reflink.py
	$(BIN)/python benchmarks/remote.py
	$(BIN)/python benchmarks/aws.py
	$(BIN)/python benchmarks/boot.py
	$(BIN)/python benchmarks/trees.py
	$(BIN)/python benchmarks/iso.py
	$(BIN)/python benchmarks/fleet.py

# The time that each format gets: mutants (1000 of each, if they are done in that time), then coverage-guided fuzzing.
FUZZ_MUTANTS ?= 300
FUZZ_HARNESS ?= 20

fuzz: packages setup  ## damaged images of every format, judged here and by qemu-img
	$(BIN)/python -m pip install --quiet --group fuzz
	$(BIN)/python tests/fuzz/run.py --seconds $(FUZZ_MUTANTS)
	$(BIN)/python tests/fuzz/harness.py $(FUZZ_HARNESS)

wheel: setup  ## the wheel in dist/
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:  ## remove what was made; .venv stays
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
