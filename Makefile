# One environment in .venv, filled by need and refreshed when the requirements change.
PYTHON ?= python3
VENV   := .venv
REQS   := settings.ini setup.py pyproject.toml .ci/constraints.txt
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo check test bench gpu docs clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' $(MAKEFILE_LIST)

demo: $(VENV)/.has-notebooks ## install, then train on scikit-learn's digits and draw the pictures
	papermill nbs/train.ipynb
	@echo "Pictures: samples.png, and all of them in train.ipynb, in the folder named above."

check: $(VENV)/.has-dev ## install, then run the tests that are quick: some minutes
	pytest --quick -n logical --maxprocesses 4 --dist worksteal

test: $(VENV)/.has-dev ## install, then run every notebook and test
	pytest -n logical --maxprocesses 4 --dist worksteal

bench: $(VENV)/.has-bench ## time what is claimed to be fast, against pythae and plain forms
	python -m bench

gpu: ## on a GPU, with the python that is there: does it work, how fast is it, and tables of the paper; MINUTES=9 OUT=_gpu
	$(PYTHON) -m bench.gpu --minutes $(or $(MINUTES),9) --out $(or $(OUT),_gpu) --sweeps sweeps/table1.toml sweeps/table2.toml sweeps/figure3.toml sweeps/figure4.toml

docs: $(VENV)/.has-dev ## build the website into _docs (needs quarto, https://quarto.org)
	@command -v quarto >/dev/null || { echo "quarto is not installed: see https://quarto.org/docs/get-started"; exit 1; }
	nbdev-docs

clean: ## remove what was built; runs, data and the environment stay
	rm -rf _docs _proc build nbdev.yml *.egg-info .pytest_cache .hypothesis .ruff_cache
	find csrae_nb nbs tests -name __pycache__ -prune -exec rm -rf {} +

# without its requirements, which would bring another torch
$(VENV)/.has-bench: $(VENV)/.has-dev
	python -m pip install -q -c .ci/constraints.txt pydantic imageio
	python -m pip install -q --no-deps pythae==0.1.2
	touch $@

$(VENV)/.has-%: $(REQS)
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "csrae_nb needs Python 3.10 or newer: make PYTHON=python3.x ...")'
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	python -m pip install -q -U pip
	python -m pip install -q -c .ci/constraints.txt -e '.[$*]'
	touch $@
