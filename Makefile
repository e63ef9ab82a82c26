# ctrkit: `make` sets up .venv and runs the demo from raw logs to report; `make help` lists the rest.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-builtin-rules --no-print-directory
.SUFFIXES:
.DELETE_ON_ERROR:

PYTHON ?= python3
DATA ?= demo
OUT ?= runs
RAW ?=
WEIGHTS ?=
SET ?=
JOBS ?= 2

READY := .venv/.ready
CTRKIT := .venv/bin/ctrkit
STAGES := simulate convert select-clicks extract-images group train predict eval report
# A -j given by the user is shared through the job server; else JOBS steps run side by side.
PIPELINE = $(MAKE) $(if $(findstring jobserver,$(MAKEFLAGS)),,-j$(JOBS)) -f ctrkit/pipeline.mk \
	CTRKIT='$(CTRKIT)' DATA='$(DATA)' OUT='$(OUT)' RAW='$(RAW)' WEIGHTS='$(WEIGHTS)' SET='$(SET)'

.PHONY: all
all: $(READY) ## run the recipe DATA (default: demo) from raw data to report
	@$(PIPELINE) all

.PHONY: $(STAGES)
$(STAGES): $(READY) ## run up to this stage
	@$(PIPELINE) $@

.PHONY: test
test: $(READY) ## run the tests
	.venv/bin/python -m pytest $(PYTEST)

.PHONY: check
check: $(READY) ## ruff and strict types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

.PHONY: format
format: $(READY) ## rewrite the code in its usual form
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

.PHONY: setup
setup: $(READY) ## make .venv and install everything into it
$(READY): pyproject.toml constraints.txt
	@echo "setup: .venv from constraints.txt (about 6 GB of packages, a few minutes the first time)"
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --disable-pip-version-check --progress-bar off -q -c constraints.txt -e '.[dev]'
	@touch $@

.PHONY: clean
clean: ## remove the outputs of DATA
	rm -rf '$(OUT)/$(DATA)' '$(OUT)/.$(DATA).mk'

.PHONY: help
help: ## show this list
	@echo "make [TARGET] [DATA=demo] [RAW=folder] [WEIGHTS=file] [SET='table.key=value …'] [OUT=runs] [JOBS=2]"
	@sed -nE 's/^([a-z$$(][A-Za-z$$()_-]*):.*## (.*)$$/\1\t\2/p' Makefile \
		| sed 's/^$$(STAGES)/$(STAGES)/' | while IFS=$$'\t' read -r name text; do printf '  %-16s %s\n' "$$name" "$$text"; done
