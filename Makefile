# Works from anywhere: make -C path/to/the/clone report
ROOT := $(patsubst %/,%,$(dir $(abspath $(lastword $(MAKEFILE_LIST)))))
ifneq ($(words $(MAKEFILE_LIST)) $(words $(ROOT)),1 1)
$(error make takes a space in a path for its end, and would work on other folders; move the clone to a path without one)
endif
VENV := $(ROOT)/.venv
BIN := $(VENV)/bin
PYTHON ?= python3
PROFILE ?= quick

.DEFAULT_GOAL := help
.PHONY: help install report lint test test-all lab docs bench clean

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(lastword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/'

install: $(VENV)/installed-lab  ## create .venv and install the workbench with pinned versions

report: $(VENV)/installed  ## run the notebooks, write reports/index.html (PROFILE=standard, full: more, for printing)
	@$(BIN)/workbench report --profile $(PROFILE)

# Each test process computes with one thread, and has whole files: some make reports that all of their tests look at.
PYTEST = cd $(ROOT) && OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

lint: $(VENV)/installed-test  ## check the style of the code
	cd $(ROOT) && $(BIN)/ruff check . && $(BIN)/ruff format --check .

test: $(VENV)/installed-test  ## run the tests: unit, every notebook, report, browser
	$(PYTEST) -m "not slow" tests notebooks/00_quickstart.ipynb \
		--ignore tests/benchmarks --nbval-lax --nbval-current-env --nbval-cell-timeout=300

test-all: $(VENV)/installed-test  ## the slow ones too: trainings, sweeps, kills, every notebook as it stands
	$(PYTEST) tests notebooks --ignore tests/benchmarks --ignore notebooks/exercises --ignore notebooks/templates --nbval-lax --nbval-current-env --nbval-cell-timeout=1800

lab: $(VENV)/installed-lab  ## open JupyterLab on the notebooks
	cd $(ROOT) && $(BIN)/jupyter lab notebooks

docs: $(VENV)/installed-docs  ## build the documentation as a site in build/docs, and check its links
	cd $(ROOT) && $(BIN)/python docs/build.py

bench: $(VENV)/installed-test  ## run the benchmarks, write reports/benchmarks.html (10 minutes on a quiet machine)
	cd $(ROOT) && $(BIN)/python -m pytest tests/benchmarks --benchmark-json reports/benchmarks.json
	cd $(ROOT) && $(BIN)/python tests/benchmarks/page.py reports/benchmarks.json

clean:  ## remove .venv, reports and data/cache (extractions, cells of the benchmark)
	rm -rf "$(VENV)" "$(ROOT)/data/cache" "$(ROOT)"/*.egg-info
	find "$(ROOT)/reports" -mindepth 1 -not -name README.md -delete

INSTALL = @$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	|| { echo "The workbench needs Python 3.11 or newer; this is $$($(PYTHON) --version). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }; \
	$(PYTHON) $(ROOT)/.ci/install.py "$(VENV)"

$(VENV)/installed: $(ROOT)/pyproject.toml $(ROOT)/constraints.txt
	$(INSTALL)
	@touch $@

$(VENV)/installed-lab: $(ROOT)/pyproject.toml $(ROOT)/constraints.txt
	$(INSTALL) lab
	@touch $@ $(VENV)/installed

$(VENV)/installed-docs: $(ROOT)/pyproject.toml $(ROOT)/constraints.txt
	$(INSTALL) docs
	@touch $@ $(VENV)/installed

$(VENV)/installed-test: $(ROOT)/pyproject.toml $(ROOT)/constraints.txt
	$(INSTALL) lab test data
	@touch $@ $(VENV)/installed $(VENV)/installed-lab
