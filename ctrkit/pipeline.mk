# From raw data to report, file to file. The rules of a recipe come from `ctrkit rules`, which decides by content,
# never by time, what is stale. Variables: DATA, RAW, WEIGHTS, SET, TODAY, FROM, TO, MLFLOW, OUT, CTRKIT; or CTRKIT_RULES, where they are written already.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-builtin-rules --no-print-directory
.SUFFIXES:
.DELETE_ON_ERROR:
.SECONDARY:

ifeq ($(filter-out 3.% 4.0% 4.1%,$(MAKE_VERSION)),)
$(error ctrkit needs GNU Make 4.2 or newer; this is $(MAKE_VERSION))
endif

CTRKIT ?= ctrkit
DATA ?= demo
OUT ?= runs
RAW ?=
WEIGHTS ?=
SET ?=
TODAY ?=
FROM ?=
TO ?=
MLFLOW ?=

.PHONY: all
all:

export CTRKIT_DIGESTS := $(OUT)/.digests.json
ifndef CTRKIT_RULES
ifneq ($(filter daily,$(MAKECMDGOALS)),)
ifeq ($(FROM),)
$(error which days? make daily FROM=2024-03-06 TO=2024-03-08)
endif
endif
CTRKIT_ARGUMENTS := --recipe '$(DATA)' --out '$(OUT)' $(if $(RAW),--raw '$(RAW)') \
	$(if $(WEIGHTS),--weights '$(WEIGHTS)') $(if $(TODAY),--today '$(TODAY)') $(foreach set,$(SET),--set '$(set)') \
	$(if $(FROM),--from '$(FROM)') $(if $(TO),--to '$(TO)') $(if $(MLFLOW),--mlflow '$(MLFLOW)') $(if $(filter tables,$(MAKECMDGOALS)),--tables) \
	$(if $(filter export,$(MAKECMDGOALS)),--export)
ifneq ($(findstring ',$(DATA)$(OUT)$(RAW)$(WEIGHTS)$(TODAY)$(FROM)$(TO)$(MLFLOW)$(SET)),)
$(error DATA, OUT, RAW, WEIGHTS and SET cannot hold an apostrophe; `ctrkit run` takes any path and value)
endif
CTRKIT_RULES := $(shell CTRKIT_DIGESTS='$(CTRKIT_DIGESTS)' $(CTRKIT) rules $(CTRKIT_ARGUMENTS))
ifneq ($(.SHELLSTATUS),0)
$(error ctrkit cannot plan this run; the reason stands above)
endif
endif
export CTRKIT_UNLESS_FRESH := 1
include $(CTRKIT_RULES)
