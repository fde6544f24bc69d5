# Every target makes its own environment in .venv first; nothing else has to be installed than
# Python 3.11 or newer. Options of a command go into ARGS: make demo ARGS="--seeds 1".

PYTHON ?= python3
ARGS ?=
# Tests run side by side, one process a core; JOBS=0 runs them in one, for pdb.
JOBS ?= auto
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CONSTRAINTS := $(VENV)/constraints.txt
INSTALLED := $(VENV)/.installed
NATIVE_TESTS := tests/torch_engine/native tests/practice/test_native.py \
  tests/properties/test_native_properties.py tests/properties/test_native_fuzz.py \
  tests/properties/test_stochastic_fuzz.py tests/translation/test_again.py
BENCHMARKS_INSTALLED := $(VENV)/.benchmarks-installed
DOCS_INSTALLED := $(VENV)/.docs-installed

.DEFAULT_GOAL := help
.PHONY: help demo test sanitize coverage lint format typecheck bench docs clean

help:
	@echo "make demo       train the digits classifier with and without regularization (runs/demo)"
	@echo "make test       run the tests"
	@echo "make sanitize   run the tests of native code with gcc's checks of memory and arithmetic"
	@echo "make coverage   run the tests and count what they run of the package"
	@echo "make lint       check style; make format applies it"
	@echo "make typecheck  check types"
	@echo "make bench      time solvers against their peers (benchmarks/RESULTS.md)"
	@echo "make docs       build the site, strictly (build/site)"
	@echo "make figures    write the tables of README and docs from the stored runs"
	@echo "make clean      remove .venv and caches"

# The stamp is touched last, so an installation that failed is tried again.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is too old or missing: Python 3.11 or newer is needed." \
	         "Name one with: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@# A Julia project that exists already needs the juliacall of its PythonCall's version.
	@juliacall=$$($(PYTHON) pysciml_node/julia_engine/process/env.py) || juliacall=; \
	  sed "s/^juliacall==.*/$${juliacall:-&}/" constraints.txt > $(CONSTRAINTS)
	$(PIP) install -e '.[dev,examples]' -c $(CONSTRAINTS)
	@touch $@

$(BENCHMARKS_INSTALLED): $(INSTALLED)
	$(PIP) install -e '.[benchmarks]' -c $(CONSTRAINTS)
	@touch $@

$(DOCS_INSTALLED): $(INSTALLED)
	$(PIP) install -e '.[docs]' -c $(CONSTRAINTS)
	@touch $@

demo: $(INSTALLED)
	$(BIN)/python -m pysciml_node demo $(ARGS)

# The tests' tensors are small: threads of torch in every process would wait for one another.
test: $(INSTALLED)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} \
	  $(BIN)/python -m pytest -n $(JOBS) --maxprocesses 8 --dist worksteal $(ARGS)

# The compiler itself runs without the library that its code needs.
sanitize: $(INSTALLED)
	PSN_NATIVE_SANITIZE=address,undefined PSN_NATIVE_CACHE=$(CURDIR)/build/sanitize \
	  PSN_CC="env -u LD_PRELOAD gcc" ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	  $(BIN)/python -m pytest $(or $(ARGS),$(NATIVE_TESTS))

coverage: $(INSTALLED)
	$(PIP) install -q 'pytest-cov>=7'
	$(BIN)/python -m pytest --cov --cov-report=term:skip-covered $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(INSTALLED)
	$(BIN)/mypy

bench: $(BENCHMARKS_INSTALLED)
	$(BIN)/python benchmarks/results.py $(ARGS)

docs: $(DOCS_INSTALLED)
	$(BIN)/mkdocs build --strict

figures: $(INSTALLED)
	$(BIN)/python site/figures.py $(ARGS)

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
