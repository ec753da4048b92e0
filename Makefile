# Two commands that need nothing but Python 3.11 or newer: `make demo` and `make test`. Both can be repeated; the second time is fast.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint types pytest bench clean

demo: $(VENV)/.demo
	$(BIN)/python -m experiments.digits train

test: lint types pytest

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/basedpyright --level error

# What documents promise is printed alike whatever the CPU's kernels are: once more with the plainest ones.
PROMISED := fnrun tests/docs

pytest: $(VENV)/.test
	OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=default $(BIN)/python -m pytest -q -n 2 --dist worksteal $(PROMISED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal  # one thread each: small tensors wait for threads longer than they compute

# Every comparison, side by side on this machine; writes benchmarks/results.md. About 20 minutes in which nothing else should run.
bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "fnrun needs Python 3.11 or newer, this is %s: make PYTHON=python3.11 ..." % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)

# The stamps: an environment is made anew only when what it is made from has changed.
$(VENV)/.demo $(VENV)/.test $(VENV)/.bench: $(VENV)/.%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	@touch $@
