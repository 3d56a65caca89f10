# Everything here works on a machine that has python3 (3.11 to 3.13) with venv, and nothing else.

PYTHON ?= python3
ifeq ($(PYTHON),python3)
VENV := .venv
else
# Each interpreter has its own, so that make test PYTHON=python3.12 leaves .venv alone; PYTHON may be a path.
VENV := .venv-$(subst /,-,$(patsubst /%,%,$(PYTHON)))
endif
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
PYTHONS := 3.11 3.12 3.13

.PHONY: help pretrain test interop slurm browser plan-test soak format check constraints clean

help:
	@echo "make pretrain     pretrain on the digits that ship with scikit-learn, about 3 minutes"
	@echo "make test         format, lint and type checks, and the fast tests"
	@echo "make interop      compare conversions with torch, transformers and timm, about 5 minutes"
	@echo "make slurm        start Slurm here and run maejax launch with it, about 3 minutes; installs it as root on Debian"
	@echo "make browser      open reports in a headless Chromium, Debian's, which it installs where there is none"
	@echo "make plan-test    compile a small step for TPUs, with libtpu (a download of 140 MB)"
	@echo "make soak         the slow tests, and faults by the hundred (SOAK=\"--rows=16 --seconds=600 --seed=7\")"
	@echo "make format       format the code"
	@echo "make constraints  pin the newest versions of all dependencies (needs python$(PYTHONS))"
	@echo "PYTHON=python3.12 chooses the interpreter; each has a virtual environment of its own"

pretrain: $(VENV)/installed
	$(BIN)/maejax pretrain --config=configs/pretrain_digits.py --workdir=runs/digits

test: check
	$(BIN)/python -m pytest -q -n 2 -m "not slow"

interop: $(VENV)-interop/installed
	$(VENV)-interop/bin/python -m pytest -q -m "not slow" tests/interop tests/test_convert.py -k "interop or onnx"

slurm: $(VENV)/installed-test
	tests/slurm/cluster.sh install
	$(BIN)/python -m pytest -q -m slow tests/test_launch_slurm.py

browser: $(VENV)/installed-test
	@for name in chromium chromium-browser google-chrome chrome; do command -v $$name >/dev/null && exit 0; done; \
	  echo "installing chromium from the system's packages"; \
	  { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } >/dev/null
	MAEJAX_BROWSER=1 $(BIN)/python -m pytest -q -n 0 tests/test_browser.py

plan-test: $(VENV)-interop/installed-tpu
	$(VENV)-interop/bin/python -m pytest -q tests/test_plan.py -k "pod or torus"

soak: $(VENV)/installed-test
	XLA_FLAGS= $(BIN)/python -m pytest -q -m slow
	PYTHONPATH=tests $(BIN)/python -m soak $(SOAK)

check: $(VENV)/installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/installed-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || \
	  { echo "maejax needs Python 3.11, 3.12 or 3.13, and $(PYTHON) is none; name one, as in make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) >/dev/null || { rm -rf $(VENV); \
	  echo "$(PYTHON) cannot make a virtual environment; install its venv module (on Debian: python3-venv)"; exit 1; }

$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing maejax into $(VENV), a few minutes the first time"
	@$(INSTALL) -e .
	@touch $@

$(VENV)/installed-test: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing maejax[test] into $(VENV), a few minutes the first time"
	@$(INSTALL) -e '.[test]'
	@touch $@ $(VENV)/installed

# timm asks for torchvision, which has no build for CPUs everywhere and which its ViTs do not use: hence --no-deps.
INTEROP := $(VENV)-interop/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt -c constraints-interop.txt

$(VENV)-interop/installed: pyproject.toml constraints.txt constraints-interop.txt | $(VENV)/bin/python
	@echo "installing maejax[test], torch, transformers and timm into $(VENV)-interop, a few minutes the first time"
	@$(PYTHON) -m venv $(VENV)-interop
	@$(INTEROP) -e '.[test]' torch onnx onnxruntime huggingface-hub tokenizers regex pyyaml tqdm typer
	@$(INTEROP) --no-deps timm transformers
	@touch $@

$(VENV)-interop/installed-tpu: $(VENV)-interop/installed
	@$(INTEROP) -e '.[tpu]'
	@touch $@

constraints:
	@for v in $(PYTHONS); do \
	  rm -rf build/pin-$$v && python$$v -m venv build/pin-$$v && \
	  build/pin-$$v/bin/python -m pip install -qq --disable-pip-version-check -e '.[test]' && \
	  build/pin-$$v/bin/python -m pip freeze --disable-pip-version-check --exclude-editable > build/freeze-$$v.txt || exit 1; done
	@python3 .ci/freeze.py $(foreach v,$(PYTHONS),$(v)=build/freeze-$(v).txt) > build/constraints.txt
	@mv build/constraints.txt constraints.txt
	@echo "wrote constraints.txt; run make test for each Python"

clean:
	rm -rf .venv .venv-* build dist .mypy_cache .ruff_cache .pytest_cache
