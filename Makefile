# Each target builds .venv if it is missing or out of date.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo report bench docs docs-check gpu-check tiny-models test test-thorough campaign test-all check clean

PYTHON ?= python3
STAMP := .venv/.stamp
STAMP_ALL := .venv/.stamp-all
RUN := .venv/bin/

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than 3.11; name another with make PYTHON=python3.12"; exit 1; }
	@echo "building .venv (once; a few minutes, most of it torch)"
	@rm -rf .venv && $(PYTHON) -m venv .venv
	@$(RUN)python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP)  ## prune SmolLM2-135M 2:4 with every method and print the comparison (offline models and data are fetched once)
	@$(RUN)dass-exp sweeps=demo

report: $(STAMP)  ## write the tables, figures and page of every sweep that was run
	@$(RUN)dass-report

bench: $(STAMP)  ## time every method against the forward passes that none can avoid (15 minutes on an idle machine)
	@$(RUN)python -m dass_exp.benchmark

DOCS := .venv/.stamp-docs
$(DOCS): $(STAMP)
	@$(RUN)python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	@touch $@

docs: $(DOCS)  ## build the documentation as a site and serve it at http://127.0.0.1:8000
	@NO_MKDOCS_2_WARNING=1 $(RUN)mkdocs serve

docs-check: $(DOCS)  ## build the site, and fail on a dead link
	@NO_MKDOCS_2_WARNING=1 $(RUN)mkdocs build --strict --quiet

gpu-check: $(STAMP)  ## try on this machine's GPU what was built without one, and write what differs (5 minutes; without a GPU it says so)
	@$(RUN)python -m dass_exp.benchmark.gpu_check

tiny-models: $(STAMP)  ## train the twelve tiny models of sweeps/glu_variants.yaml (once; took 96 minutes on 2 busy cores; resumes after an interruption)
	@$(RUN)python -m dass_exp.train

TEST := HF_HUB_OFFLINE=1 WANDB_MODE=offline TOKENIZERS_PARALLELISM=false $(RUN)python -m pytest -n 2
test: $(STAMP)  ## run the tests of some seconds at most (CPU, offline once the assets are cached, some minutes)
	@$(TEST) -m 'not slow and not thorough'

test-thorough: $(STAMP)  ## also run longer ones: launchers, kills, notebooks, whole sweeps (half an hour; CI runs these)
	@$(TEST) -m 'not slow'

CASES ?= 3
campaign: $(STAMP)  ## try every third of the hostile cases of tests/campaign (some 1,900; CASES=all for all); print their counts
	@DASS_EXP_CAMPAIGN=$(CASES) HF_HUB_OFFLINE=1 WANDB_MODE=offline $(RUN)python -m pytest tests/campaign -n 2 --dist worksteal

$(STAMP_ALL): $(STAMP)
	@$(RUN)python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,ray]'
	@touch $@

test-all: $(STAMP_ALL)  ## run all tests, including slow ones, the whole campaign and a sweep through a local Ray
	@DASS_EXP_CAMPAIGN=all $(TEST)

check: $(STAMP)  ## check lint, formatting and types
	@$(RUN)ruff check .
	@$(RUN)ruff format --check .
	@$(RUN)mypy

clean:  ## remove .venv and the caches of tools; results stay
	@rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
