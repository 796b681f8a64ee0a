# Needs python3 and make; everything else goes into .venv.
PYTHON ?= python3
VENV   := .venv
PEERS  := .venv-peers
FUZZ   := .venv-fuzz
# Seconds for each target of `make fuzz`.
FUZZ_S ?= 60
# How many processes share a group of tests; the tests of one file stay together. 0: none but pytest's own.
WORKERS ?= 2
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip -qq --disable-pip-version-check install
PACKAGES := remote_ops ensemble server_ref
# TensorFlow tells of its oneDNN build whatever the log level is, unless that is off.
QUIET  := TF_CPP_MIN_LOG_LEVEL=2 TF_ENABLE_ONEDNN_OPTS=0

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help venv demo test check fast slow peers fuzz format bench clean

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

# Two stamps in one environment: what the examples need, then what the tests add.
$(VENV)/.run: pyproject.toml constraints.txt requirements-models.txt
	@echo "== creating $(VENV) with $(PYTHON): the packages and what the examples need (minutes the first time)"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PIP) -c constraints.txt -e '.[torch,tf-cpu,onnx,ensemble,server]' \
		magika opencv-python-headless pillow pyclipper shapely
	@$(PIP) --no-deps --ignore-requires-python -r requirements-models.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.run requirements-dev.txt requirements-peers.txt
	@echo "== adding to $(VENV) what the tests and checks need"
	@$(PIP) -c constraints.txt -r requirements-dev.txt -e '.[torch,tf-cpu,onnx,ensemble,ready,server,cache]'
	@$(PIP) --no-deps -r requirements-peers.txt
	@touch $@

# Not in $(VENV), and only for the tests of peers: KServe pins much, and brings half a gigabyte.
$(PEERS)/.done: requirements-peers-oip.txt
	@echo "== creating $(PEERS): KServe and tritonclient (a minute the first time)"
	@test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	@$(PEERS)/bin/python -m pip -qq --disable-pip-version-check install -r requirements-peers-oip.txt
	@touch $@

# Not in $(VENV) either: atheris has wheels for a few versions of Python only.
$(FUZZ)/.done: requirements-fuzz.txt pyproject.toml constraints.txt
	@echo "== creating $(FUZZ): atheris, and the packages without their extras (seconds)"
	@test -x $(FUZZ)/bin/python || $(PYTHON) -m venv $(FUZZ)
	@$(FUZZ)/bin/python -m pip -qq --disable-pip-version-check install -c constraints.txt -r requirements-fuzz.txt -e .
	@touch $@

venv: $(VENV)/.dev ## create or refresh .venv

demo: $(VENV)/.run ## call a trained model; train through one, from torch and from TensorFlow; read pictures with three
	@$(PY) examples/01_quickstart.py
	@echo
	@$(PY) examples/02_train_through_remote.py
	@echo
	@$(QUIET) $(PY) examples/04_tf_graph.py
	@echo
	@$(PY) examples/05_ocr

test: check fast slow peers ## everything CI runs: checks, then the three groups of tests

check: $(VENV)/.dev ## format, lint and types, without changing a file
	@echo "== check: ruff format, ruff check, mypy --strict"
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/mypy --strict $(PACKAGES)

# pytest exits with 5 when a group is empty; that must fail, or a lost group would look like a green one.
define group
	@echo "== tests: $(1)"
	@$(PY) -m pytest -q -n $(WORKERS) --dist loadfile -m "$(2)" || { rc=$$?; [ $$rc -ne 5 ] || echo "the group '$(1)' selected no test"; exit $$rc; }
endef

fast: $(VENV)/.dev ## the tests to run while editing
	$(call group,fast,not slow and not peers)

slow: $(VENV)/.dev ## the tests that take long
	$(call group,slow,slow and not peers)

peers: $(VENV)/.dev $(PEERS)/.done ## the tests against software that is not ours
	$(call group,peers,peers)

fuzz: $(FUZZ)/.done ## search for bytes that a decoder mishandles, FUZZ_S=60 seconds a target; not part of test
	@PYTHONPATH=tests $(FUZZ)/bin/python -m fuzz.run --seconds $(FUZZ_S)

format: $(VENV)/.dev ## format, and fix what ruff can fix
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

bench: $(VENV)/.dev ## the benchmarks, each beside its bare twin
	@$(PY) tests/bench/run.py

clean: ## remove the environments, caches and build outputs
	@rm -rf $(VENV) $(PEERS) $(FUZZ) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
