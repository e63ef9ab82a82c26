# ctrkit: `make` sets up .venv and runs the demo from raw logs to report; `make help` lists the rest.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-builtin-rules --no-print-directory
.SUFFIXES:
.DELETE_ON_ERROR:

PYTHON ?= python3
DATA ?= demo
OUT ?= runs
JOBS ?= 2

# Hundreds of processes import the package: it is compiled once, whatever this is outside.
export PYTHONDONTWRITEBYTECODE :=

READY := .venv/.ready
STAGES := simulate convert select-clicks tune-backbone extract-images import-features group train predict export eval report tables daily replay
# DATA, RAW, WEIGHTS, SET, TODAY, FROM, TO, MLFLOW and OUT reach the pipeline by themselves. Without a -j of the user's, JOBS steps run at once.
PIPELINE = $(MAKE) $(if $(filter -j%,$(MAKEFLAGS)),,-j$(JOBS)) -f ctrkit/pipeline.mk CTRKIT=.venv/bin/ctrkit

.PHONY: all
all: $(READY) ## run the recipe DATA (demo) from raw data to report
	+@$(PIPELINE) all

.PHONY: $(STAGES)
$(STAGES): $(READY)
	+@$(PIPELINE) $@

.PHONY: setup
setup: $(READY) ## make .venv and install everything into it

.PHONY: test
test: $(READY) ## run the tests, with LONG=1 also the long ones; PYTEST='-k name' gives pytest options
	.venv/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(if $(LONG),-m '') $(PYTEST)

.PHONY: check
check: $(READY) ## ruff and strict types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

.PHONY: format
format: $(READY) ## write the code in its usual form
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

WORKERS ?= 1
.PHONY: tune
tune: $(READY) ## search the ranges in [tune] of DATA, by WORKERS processes; VARIANT=… searches around that one
	.venv/bin/ctrkit tune '$(DATA)' --out '$(OUT)' --workers $(WORKERS) $(if $(RAW),--raw '$(RAW)') \
		$(if $(WEIGHTS),--weights '$(WEIGHTS)') $(if $(VARIANT),--variant '$(VARIANT)') $(if $(MLFLOW),--mlflow '$(MLFLOW)') \
		$(foreach set,$(SET),--set '$(set)')

include benchmarks/bench.mk

# The folder of a recipe's outputs has the recipe's name, or its file's.
NAME = $(patsubst %.toml,%,$(notdir $(patsubst %/recipe.toml,%,$(DATA))))
.PHONY: screenshots
screenshots: all ## draw docs/images from the report of DATA, with Chromium
	.venv/bin/python -m tests.screenshots '$(OUT)/$(NAME)' docs/images

.PHONY: clean
clean: ## remove the outputs of DATA
	$(if $(NAME),,$(error DATA is empty: say whose outputs to remove))
	rm -rf '$(OUT)/$(NAME)' '$(OUT)/.$(NAME).mk'

.PHONY: help
help: ## show this list
	@echo "make [TARGET] [DATA=recipe] [RAW=folder] [WEIGHTS=file] [SET='table.key=value …'] [TODAY=YYYY-MM-DD | FROM=… TO=…] [MLFLOW=uri] [OUT=runs] [JOBS=2]"
	@echo
	@sed -nE 's/^([a-z-]+):.*## (.*)$$/\1\t\2/p' Makefile benchmarks/bench.mk | while IFS=$$'\t' read -r name text; do \
		printf '  %-15s %s\n' "$$name" "$$text"; done
	@echo
	@echo "One stage, after those before it:"
	@for stage in $(STAGES); do printf '  %-15s %s\n' "$$stage" \
		"$$(sed -nE "s/^    \"$$stage\": \(\"[a-z_.]+\", \"(.*)\"\),/\1/p" ctrkit/cli.py)"; done

$(READY): pyproject.toml constraints.txt
	@echo "setup: .venv, from constraints.txt (several GB of packages, some minutes the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"ctrkit needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + "; make PYTHON=…")'
	.venv/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	.venv/bin/python -m pip install --disable-pip-version-check --progress-bar off --no-compile -c constraints.txt -e '.[dev]'
	@.venv/bin/python -m compileall -qq -j 0 .venv/lib || true # as pip would, by all cores; packages hold files that are no Python
	@touch $@
