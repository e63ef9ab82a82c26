# From raw data to report, file to file. The rules of a recipe come from `ctrkit rules`, which also decides by
# content (never by time) what is stale. Variables: DATA, RAW, WEIGHTS, SET, OUT, CTRKIT.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-builtin-rules --no-print-directory
.SUFFIXES:
.DELETE_ON_ERROR:
.SECONDARY:

CTRKIT ?= ctrkit
DATA ?= demo
OUT ?= runs
RAW ?=
WEIGHTS ?=
SET ?=

.PHONY: all
all:

export CTRKIT_DIGESTS := $(OUT)/.digests.json
CTRKIT_ARGUMENTS := --recipe '$(DATA)' --out '$(OUT)' $(if $(RAW),--raw '$(RAW)') \
	$(if $(WEIGHTS),--weights '$(WEIGHTS)') $(foreach set,$(SET),--set '$(set)')
CTRKIT_RULES := $(shell CTRKIT_DIGESTS='$(CTRKIT_DIGESTS)' $(CTRKIT) rules $(CTRKIT_ARGUMENTS))
ifneq ($(.SHELLSTATUS),0)
$(error ctrkit cannot plan this run; the reason stands above)
endif
include $(CTRKIT_RULES)
