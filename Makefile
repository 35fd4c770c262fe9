# Python 3.11 to 3.13 and make are enough; everything else goes into .venv.
PYTHON ?= python3
UV ?= uv
VENV := .venv
STAMP := $(VENV)/.stamp

.PHONY: demo up status down test check gpu-check lock clean

demo: $(STAMP)  ## a digits classifier, from training to a judged INT8 engine
	$(VENV)/bin/requant demo

up: $(STAMP)  ## Prefect server, database and workers on this machine; UP="--port 4300" for options
	$(VENV)/bin/requant up $(UP)

status down: $(STAMP)  ## what runs of it; stop it
	$(VENV)/bin/requant $@

test: check  ## what CI runs
	$(VENV)/bin/pytest

check: $(STAMP)  ## lint, format and types
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

gpu-check: $(STAMP)  ## all that only a GPU can prove, into docs/results-gpu.md
	PYTHONPATH=. $(VENV)/bin/python tests/benchmarks/gpu_check.py

lock:  ## pin what pyproject.toml asks for, one version for all Pythons
	$(UV) pip compile --universal --fork-strategy fewest --no-strip-extras --python-version 3.11 \
	  --generate-hashes --no-header --extra dev pyproject.toml -o requirements.lock
	$(UV) pip compile --universal --python-version 3.12 --generate-hashes \
	  --no-header -c requirements.lock infra/images/gpu.in -o infra/images/gpu.lock

clean:  ## the environment and all that tools leave; runs and their store stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find flows tasks tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "requant needs Python 3.11 to 3.13, and $(PYTHON) is $$($(PYTHON) --version 2>&1): make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make virtual environments: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --require-hashes --no-deps -r requirements.lock
	$(VENV)/bin/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@
