# make help lists the targets.
PYTHON ?= python3
VENV   ?= .venv
# minutes of training in `make omni`; empty: those of the preset
MINUTES ?=
SHELL  := /bin/bash
BIN    := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help try omni test soak docs sidebar lab clean
.DELETE_ON_ERROR:

help:  ## this list
	@grep -hE '^[a-z]+:.*## ' Makefile | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

# Installs with uv where it can be had (minutes faster), else with pip. The stamp files are as new as the last
# install, so that a changed settings.ini installs again and nothing else does.
define install
	@test -x $(BIN)/python || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed: make PYTHON=python3.11 ..."; exit 1; }
	@echo "installing $(1) into $(VENV) (the first time downloads about 2 GB)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check 'uv>=0.5' >/dev/null 2>&1 || true
	@if [ -x $(BIN)/uv ]; then $(BIN)/uv pip install -q --python $(BIN)/python -e '$(1)'; \
	else $(BIN)/python -m pip install -q --disable-pip-version-check -e '$(1)'; fi
	@touch $@
endef

$(VENV)/.muomni: settings.ini setup.py pyproject.toml
	$(call install,.[speech$(comma)pictures])

$(VENV)/.muomni-dev: settings.ini setup.py pyproject.toml
	$(call install,.[dev$(comma)docs])
	@touch $(VENV)/.muomni

comma := ,

try: $(VENV)/.muomni  ## install, then show the model that came with the clone a picture and hear its answer
	$(BIN)/muomni chat --image data/examples/sample_image.png --text "what do you see?" --speak answer.wav
	@echo "listen to answer.wav; ask more with: source $(VENV)/bin/activate, then: muomni chat"

omni: $(VENV)/.muomni  ## install, train every stage of the nano model (about 50 minutes), print its scorecard and a conversation
	$(BIN)/muomni train all --preset nano --out checkpoints/nano $(if $(MINUTES),--minutes $(MINUTES))
	$(BIN)/muomni eval
	$(BIN)/muomni chat --text "hello."
	$(BIN)/muomni chat --text "here is a plain picture with a star, a small red star in the top left and a circle, a big blue circle in the middle right. what colour is the star?"
	$(BIN)/muomni chat --image data/examples/sample_image.png --text "what do you see?" --speak checkpoints/nano/answer.wav

test: $(VENV)/.muomni-dev  ## all checks: structure, notebooks, pytest, site; ends on "N passed, N failed"
	@PATH="$(abspath $(BIN)):$$PATH" python tools/run_tests.py

soak: $(VENV)/.muomni-dev  ## 100 kills, 10 000 damaged files for each reader, full disks (about 20 minutes); writes tests/soak-report.txt
	@MUOMNI_SOAK=1 $(BIN)/python -m pytest tests/test_kill.py tests/test_hostile.py tests/test_hostile_data.py tests/test_stream.py

docs: $(VENV)/.muomni-dev  ## build the site into _docs/ and README.md from nbs/index.ipynb
	@PATH="$(abspath $(BIN)):$$PATH" python tools/build_docs.py --readme

sidebar: $(VENV)/.muomni-dev  ## bring the site's list of notebooks and chapters up to date
	@$(BIN)/python tools/pages.py sidebar

lab: $(VENV)/.muomni-dev  ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab nbs

clean:  ## remove what is built; keeps .venv, data/ and checkpoints/
	rm -rf _proc _docs build dist *.egg-info .pytest_cache .hypothesis nbs/nbdev.yml
	find muomni nbs tests tools -name __pycache__ -o -name .ipynb_checkpoints | xargs -r rm -rf
