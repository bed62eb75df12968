# Works from anywhere: make -C path/to/the/clone report
ROOT := $(patsubst %/,%,$(dir $(abspath $(lastword $(MAKEFILE_LIST)))))
ifneq ($(words $(MAKEFILE_LIST)) $(words $(ROOT)),1 1)
$(error make takes a space in a path for its end, and would work on other folders; move the clone to a path without one)
endif
VENV := $(ROOT)/.venv
BIN := $(VENV)/bin
PYTHON ?= python3
PROFILE ?= standard

.DEFAULT_GOAL := help
.PHONY: help install report test lab bench clean

help:  ## list the commands
	@grep -hE '^[a-z]+:.*## ' $(lastword $(MAKEFILE_LIST)) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/'

install: $(VENV)/installed  ## create .venv and install the workbench with pinned versions

report: $(VENV)/installed  ## run the notebooks on the bundled model, write reports/index.html (PROFILE=quick, full: shorter, longer)
	@$(BIN)/workbench report --profile $(PROFILE)

test: $(VENV)/installed-test  ## run the whole suite: unit, notebooks, report, browser
	cd $(ROOT) && OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests notebooks --ignore tests/benchmarks \
		--nbval-lax --nbval-current-env --nbval-cell-timeout=300 --numprocesses auto --dist loadfile

lab: $(VENV)/installed  ## open JupyterLab on the notebooks
	cd $(ROOT) && $(BIN)/jupyter lab notebooks

bench: $(VENV)/installed-test  ## run the benchmarks, write reports/benchmarks.html (10 minutes on a quiet machine)
	cd $(ROOT) && $(BIN)/python -m pytest tests/benchmarks --benchmark-json reports/benchmarks.json
	cd $(ROOT) && $(BIN)/python tests/benchmarks/page.py reports/benchmarks.json

clean:  ## remove .venv, reports and data/cache (extractions, cells of the benchmark)
	rm -rf "$(VENV)" "$(ROOT)/data/cache" "$(ROOT)"/*.egg-info
	find "$(ROOT)/reports" -mindepth 1 -not -name README.md -delete

$(VENV)/installed: $(ROOT)/pyproject.toml $(ROOT)/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "The workbench needs Python 3.11 or newer; this is $$($(PYTHON) --version). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@echo "Installing the workbench into $(VENV) (a few minutes, once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(ROOT)/constraints.txt -e $(ROOT)
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(ROOT)/constraints.txt -e "$(ROOT)[test,data,hf]"
	@touch $@
