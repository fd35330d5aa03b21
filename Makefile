# Everything works from a fresh clone with python3 and pip; `make help` lists the targets.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help dev demo test lint bench wheels clean

help: ## what there is to make
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## */  make \1\t/'

dev: .venv/installed ## everything editable in .venv, in one resolve

# pip runs again only when what it would install has changed.
.venv/installed: requirements-dev.txt pyproject.toml $(wildcard plugins/*/pyproject.toml)
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (about a minute)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

demo: dev ## compose a hybrid, prove it, train it on English prose, stream from it
	@rm -rf demo && mkdir demo
	cd demo && ../$(BIN)/altx compose --mixer mamba --memory ntm
	cd demo && ../$(BIN)/altx train model.yaml --out run
	cd demo && ../$(BIN)/altx generate run --prompt "The following " --max-new-tokens 300

test: dev ## the whole test suite
	@$(BIN)/python -m pytest --numprocesses 2 --quiet

lint: dev ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: dev ## speed of the layers, side by side
	$(BIN)/python benchmarks/layers.py

wheels: dev ## wheels of altx and the plugins for this platform, with compiled kernels, in dist
	@rm -rf dist
	@for package in . $(dir $(wildcard plugins/*/pyproject.toml)); do \
		$(BIN)/python -m build --quiet --wheel --no-isolation --outdir dist/pure $$package || exit 1; done
	$(BIN)/python -m altx_kernels.native.prebuild dist/pure/*.whl --out dist
	@rm -r dist/pure

clean: ## remove what was installed and made
	rm -rf .venv demo dist
