# The interpreter that a new .venv is made with: make venv PYTHON=python3.12
PYTHON ?= python3
# The build of torch for a new .venv: cpu is the smallest. With CUDA 13.0 it is make distclean venv TORCH=cu130; others
# are the folders of https://download.pytorch.org/whl/. If that cannot be reached, pip's own index gives its build.
TORCH ?= cpu
# Test processes side by side, and how many seconds' worth of slow tests run with the others: other ones each day.
JOBS ?= 2
SLOW_SECONDS ?= 3

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test docs contract lint format wheel clean distclean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

venv: $(STAMP) ## make .venv with everything in it; PYTHON=python3.12 chooses the interpreter of a new one

$(STAMP): requirements.txt pyproject.toml setup.py metateleport/torchvision.py
	@command -v $(PYTHON) >/dev/null || { echo "there is no $(PYTHON): install Python 3.10 or later, or name one with PYTHON=" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "$$($(PYTHON) --version) is too old: metateleport needs Python 3.10 or later; name one with PYTHON=" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing into $(VENV): a few minutes the first time"
	$(PIP) "pip>=23.1"
	$(PIP) --timeout 15 --retries 0 --index-url https://download.pytorch.org/whl/$(TORCH) $$(grep -E '^torch(vision)?==' requirements.txt) \
		|| echo "no torch from download.pytorch.org/whl/$(TORCH): taking the one of pip's index" >&2
	$(PIP) -r requirements.txt --editable .
	$(BIN)/python -m metateleport.torchvision
	@touch $@

demo: venv ## a learned optimizer beside AdamW in a minute, then a meta-training of two minutes and its evaluation
	$(BIN)/metateleport demo

# Bytecode is kept even where the environment says otherwise: processes that tests start would compile everything anew.
test: venv ## lint, type-check, build the site, and run the tests with a bounded part of the slow ones
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=target lint docs
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal --slow-seconds $(SLOW_SECONDS)

docs: venv ## build the site into runs/site: warnings are errors, links are checked, nothing is fetched
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

contract: venv ## the learned optimizers in every idiom of practice, on every kind of model: prints the table
	OMP_NUM_THREADS=1 $(BIN)/python tests/contract

lint: venv ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv ## format the code and mend what can be mended by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: venv ## make dist/metateleport-*.whl, which installs without a compiler
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist .

clean: ## remove caches and build products; runs/ and mlflow.db stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## remove .venv too
	rm -rf $(VENV)
