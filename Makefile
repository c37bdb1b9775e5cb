# Two commands do everything on a bare machine with Python 3.10 or newer: `make demo` and `make test`.
# `make help` lists the others. PYTHON=python3.12 chooses the interpreter, VENV=.venv-3.12 the environment.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
# Tests run in so many processes; 0 is for one that can be stopped with --pdb.
JOBS ?= 2
# More for pytest: make test PYTEST_ARGS="-k awq -x"
PYTEST_ARGS ?=
# Of each checkpoint that `make fuzz` changes, how many changed ones it tries; `make test` tries 25.
FUZZ_EXAMPLES ?= 500
# What meets Transformers, and so is tested with the older one too.
TRANSFORMERS_TESTS ?= tests/nn tests/e2e/test_seeds.py tests/docs/test_twelfth_method.py \
	$(addprefix tests/integrations/test_,transformers.py every_format.py experts.py gguf_auto.py gptq_awq.py)

# Threads that wait by spinning starve each other where there are fewer cores than threads.
export OMP_WAIT_POLICY = PASSIVE
# Many tests start processes; without bytecode on the disk each would compile torch and Transformers again.
unexport PYTHONDONTWRITEBYTECODE

PY := $(VENV)/bin/python
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)
INSTALL := PYTHON="$(PYTHON)" VENV="$(VENV)" CONSTRAINTS="$(CONSTRAINTS)" bash scripts/install
OLDER := PYTHONPATH="$(abspath $(VENV))/transformers-5.17"
DECLARED := pyproject.toml $(CONSTRAINTS) scripts/install

.DELETE_ON_ERROR:
.PHONY: help demo test test-transformers-5.17 fuzz lint types imports format setup bench clean

help:
	@echo "make demo     quantize the embedded model in every way, and show what each costs"
	@echo "make test     all tests, then those that meet Transformers with the older Transformers"
	@echo "make fuzz     the property tests on new random examples"
	@echo "make lint     ruff: rules and format      make format   mend what ruff can mend"
	@echo "make types    mypy                        make imports  which way imports point"
	@echo "make setup    only the environment        make clean    remove it and all that was made"
	@echo "make bench    how to measure the kernels on a GPU"

demo: $(VENV)/.installed
	$(VENV)/bin/lowbit demo

test: $(VENV)/.installed-dev
	$(PYTEST)
	@$(MAKE) --no-print-directory test-transformers-5.17

test-transformers-5.17: $(VENV)/.installed-transformers
	@$(OLDER) $(PY) -c "from transformers import __version__ as v; assert v == '5.17.0', v; print('With Transformers', v)"
	$(OLDER) $(PYTEST) $(TRANSFORMERS_TESTS)

fuzz: $(VENV)/.installed-dev
	LOWBIT_FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(PYTEST) --hypothesis-profile=default

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

types: $(VENV)/.installed-dev
	$(VENV)/bin/mypy

imports: $(VENV)/.installed-dev
	$(VENV)/bin/lint-imports

setup: $(VENV)/.installed-dev $(VENV)/.installed-transformers

bench:
	@echo "On a machine with a GPU, in an environment with lowbit: see benchmarks/ for the scripts and benchmarks/results/"
	@echo "for what they gave. Results are committed together with the code that they measured."

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: $(DECLARED)
	@$(INSTALL) run
	@touch $@

$(VENV)/.installed-dev: $(DECLARED)
	@$(INSTALL) dev
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-transformers: $(VENV)/.installed-dev
	@$(INSTALL) transformers
	@touch $@
