# Everything from one command: `make demo`, `make test`. Needs Python >= 3.11, git and make; the rest goes into ./.venv.
# To choose the Python: make demo PYTHON=/path/to/python3.12; some clients: make compat CLIENTS="openai llm"

SHELL := /bin/sh
BIN := .venv/bin
HF := .venv-hf/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test test-hf compat lint wheel wheel-check clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 22

demo: .venv/.core ## Ask a real model a question, then show its plan
	@$(BIN)/labinfer run "What is the capital of France?"
	@$(BIN)/labinfer explain --summary

test: .venv/.test lint ## Lint, types, import rules and all tests that need no torch
	$(BIN)/pytest -n 2 --dist worksteal -m 'not alone'
	$(BIN)/pytest -m alone

test-hf: .venv-hf/.test ## Compare live with transformers and CPU torch
	$(HF)/pytest tests/hf
	$(HF)/pytest tests/test_docs.py -k transformers

compat: .venv/.test ## Try other people's clients, each in an environment of its own, against a service
	$(BIN)/python tests/compat/run.py $(CLIENTS)

lint: .venv/.test ## Lint, formatting, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@$(BIN)/lint-imports > .venv/lint-imports.log 2>&1 || { cat .venv/lint-imports.log; exit 1; }
	@tail -n 2 .venv/lint-imports.log

wheel: .venv/.core ## Build dist/labinfer-*.whl
	@rm -rf dist
	@$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .
	@ls dist/*.whl

# What a user gets from the wheel alone: the maps, the command, and neither torch nor a GPU package.
wheel-check: wheel ## Install the wheel in an empty environment and try it
	@rm -rf .venv-wheel && $(BIN)/python -m venv .venv-wheel
	@.venv-wheel/bin/pip install --quiet dist/*.whl
	@cd .venv-wheel && bin/labinfer --help > /dev/null && bin/labinfer ls > /dev/null && bin/python -c "\
	from importlib.util import find_spec; from labinfer.home import graphs_dir; \
	maps = sorted(graphs_dir().glob('*.yaml')); assert maps and 'site-packages' in str(maps[0]), maps; \
	heavy = [n for n in ('torch', 'cupy', 'numba', 'ray') if find_spec(n)]; assert not heavy, heavy; \
	print(f'wheel: {len(maps)} maps, command runs, no torch or GPU package')"
	@rm -rf .venv-wheel

clean: ## Remove environments, caches and build results (not the pulled models)
	rm -rf .venv .venv-hf .venv-compat .venv-wheel dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Environments. A stamp file is newer than pyproject.toml when the environment is up to date.
define find_python
candidates="$(PYTHON)"; [ -n "$$candidates" ] || candidates="python3 python3.13 python3.12 python3.11 python3.14 python"; \
for python in $$candidates; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; python=; \
done; \
[ -n "$$python" ] || { echo "labinfer needs Python 3.11 or newer; tried: $$candidates. Set PYTHON=/path/to/python3" >&2; exit 1; }
endef

define venv
$(find_python); [ -x $(1)/bin/pip ] || { echo "setting up $(1) with $$($$python --version)" >&2; $$python -m venv $(1); }
endef

.venv/.core: pyproject.toml
	@$(call venv,.venv)
	@$(BIN)/pip install --quiet --editable .
	@touch $@

.venv/.test: pyproject.toml
	@$(call venv,.venv)
	@$(BIN)/pip install --quiet --editable '.[cpu,serve,test]'
	@touch .venv/.core $@

.venv-hf/.test: pyproject.toml
	@$(call venv,.venv-hf)
	@$(HF)/pip install --quiet --editable '.[test-hf]'
	@touch $@
