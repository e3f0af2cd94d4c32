# Everything here is made by two commands:
#
#   make demo    the landmasses of the earth, computed in arrays larger than memory
#   make test    the whole suite: both builds, linters, types
#
# Also: make deep (sanitizers, mutants, the model and a soak of SOAK_MINUTES), make soak MINUTES=30,
# make mutants, make test-extras (pandas, torch and others on arrays' memory), make bench (pyswap beside the
# kernel's swap and others; as root), make test-pythons (the core tests on every other supported
# Python found), make clean.
# PYTHON=python3.12 chooses the interpreter; TEST_ARGS, DEMO_ARGS and BENCH_ARGS are handed on.

PYTHON ?= python3
MINUTES ?= 30
SOAK_MINUTES ?= 10
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet
BUILD_NEEDS := "setuptools>=77" "Cython>=3.0.11" "numpy>=2.0"

# What, when changed, means that the extension has to be built again.
SOURCES := setup.py pyproject.toml MANIFEST.in \
           $(wildcard pyswap/*.pyx pyswap/*.pxi pyswap/*.pxd pyswap/_shim.c pyswap/core/*.pxd pyswap/core/*.h)

# A test that hangs in a page fault cannot be interrupted: its process ends, with all stacks shown.
PYTEST := -m pytest --timeout=300 --timeout-method=thread
# The demo's and the bench's tests need packages of their own.
CORE_ONLY := --ignore=tests/test_continents.py --ignore=tests/test_what_if.py --ignore=tests/test_bench.py

.PHONY: demo test test-extras bench deep model mutants soak test-pythons clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(PY) examples/continents.py $(DEMO_ARGS)

# Another user's suite takes nearly as long as all the rest, and what needs no other tests to be quiet as
# long as the debug build's: each beside the other.  The other user runs the core tests on the debug
# build too; where there is none, that is left to us.  PYSWAP_TEST_RUN tells the processes of one run
# from those of another.  What fails beside the others must pass alone.  What is long, since it is left
# to chance or done thousands of times, is left to make deep.
DEBUG_TESTS := $(if $(filter 0,$(shell id -u)),failpoint,core or failpoint)
BESIDE := $(patsubst %,tests/test_%.py,bench continents docs doctor hit_rates run scale stateful stress \
          tidy user_types what_if working_set)
SUITE_DEBUG = PYSWAP_ENGINE=debug $(PY) $(PYTEST) -o cache_dir=$(VENV)/debug -m "($(DEBUG_TESTS)) and not long"
SUITE_BESIDE = PYSWAP_TEST_RUN=beside $(PY) $(PYTEST) -o cache_dir=$(VENV)/beside -m "not extras and not long" $(BESIDE)
SUITE_RELEASE = $(PY) $(PYTEST) -o cache_dir=$(VENV)/release -m "not extras and not long" --ignore=tests/test_user.py \
                $(BESIDE:%=--ignore=%)
SUITE_USER = $(PY) $(PYTEST) -o cache_dir=$(VENV)/user tests/test_user.py
AGAIN := --last-failed --last-failed-no-failures=none
# 5: there was no test, since this user is no root.
test: $(VENV)/.test
	$(SUITE_USER) $(TEST_ARGS) >$(VENV)/user.log 2>&1 & user=$$!; \
	$(SUITE_BESIDE) $(TEST_ARGS) >$(VENV)/beside.log 2>&1 & beside=$$!; \
	$(SUITE_DEBUG) $(TEST_ARGS); debug=$$?; \
	wait $$beside; beside=$$?; cat $(VENV)/beside.log; \
	$(SUITE_RELEASE) $(TEST_ARGS); release=$$?; \
	wait $$user; user=$$?; cat $(VENV)/user.log; \
	echo "== debug build: $$debug, release build: $$beside and $$release, another user: $$user"; \
	[ $$debug = 0 ] || $(SUITE_DEBUG) $(AGAIN) || exit 1; \
	[ $$beside = 0 ] || $(SUITE_BESIDE) $(AGAIN) || exit 1; \
	[ $$release = 0 ] || $(SUITE_RELEASE) $(AGAIN) || exit 1; \
	[ $$user = 0 ] || [ $$user = 5 ] || $(SUITE_USER) $(AGAIN)

test-extras: $(VENV)/.extras
	$(PY) $(PYTEST) -m extras tests/test_neighbours.py tests/test_docs.py $(TEST_ARGS)

# What takes long: sanitizers, mutants, tests that do a thing thousands of times, a soak; and beside them
# the search of the protocol's model.
deep: $(VENV)/.test
	( $(MAKE) --no-print-directory model >$(VENV)/model.log 2>&1; model=$$?; cat $(VENV)/model.log; exit $$model ) & model=$$!; \
	{ $(PY) tests/sanitized.py && $(PY) tests/mutants.py && \
	  PYSWAP_ENGINE=debug $(PY) $(PYTEST) -m "long and failpoint" $(TEST_ARGS) && \
	  $(PY) $(PYTEST) -m "long and not failpoint" $(TEST_ARGS) && \
	  $(PY) tests/soak.py --minutes $(SOAK_MINUTES); } >$(VENV)/deep.log 2>&1; tests=$$?; \
	wait $$model; model=$$?; cat $(VENV)/deep.log; \
	echo "== sanitizers, mutants, long tests, soak: $$tests, model: $$model"; [ $$tests = 0 ] && [ $$model = 0 ]

# The protocol in Promela: its states, and each mutant found out (tests/model/).
model:
	@command -v spin >/dev/null || { echo "make model needs spin (on Debian and Ubuntu: apt install spin)"; exit 1; }
	$(PYTHON) tests/model/run.py $(MODEL_ARGS)

# One guard taken out at a time: a test must fail for each.  MUTANTS="one another" names some.
mutants: $(VENV)/.test
	$(PY) tests/mutants.py $(MUTANTS)

# The random tests again and again, with fresh seeds.
soak: $(VENV)/.test
	$(PY) tests/soak.py --minutes $(MINUTES)

bench: $(VENV)/.bench
	$(PY) -m bench $(BENCH_ARGS)

$(VENV)/.bench: $(VENV)/.ready $(SOURCES)
	$(PIP) install --no-build-isolation --editable ".[bench]"
	@touch $@

$(VENV)/.demo: $(VENV)/.ready $(SOURCES)
	$(PIP) install --no-build-isolation --editable ".[demo]"
	@touch $@

$(VENV)/.test: $(VENV)/.ready $(SOURCES)
	PYSWAP_DEBUG=1 PYSWAP_WERROR=1 $(PIP) install --no-build-isolation --editable ".[test]"
	@touch $@

$(VENV)/.extras: $(VENV)/.test
	PYSWAP_DEBUG=1 PYSWAP_WERROR=1 $(PIP) install --no-build-isolation --editable ".[test-extras]"
	@touch $@

# What pip would say a screen later, said first.
$(VENV)/.ready:
	@command -v $(PYTHON) >/dev/null || \
	  { echo "pyswap needs Python: $(PYTHON) is not there; name another by PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "pyswap needs Python 3.10 or newer: name one by PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) lacks its venv module (on Debian and Ubuntu: apt install python3-venv)"; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig as s; \
	  sys.exit(not os.path.exists(s.get_path("include") + "/Python.h"))' || \
	  { echo "$(PYTHON) lacks its C headers (on Debian and Ubuntu: apt install python3-dev)"; exit 1; }
	@command -v $(CC) >/dev/null || \
	  { echo "pyswap needs a C compiler: $(CC) is not there; name another by CC=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(BUILD_NEEDS)
	@touch $@

# Each with an environment of its own, built one after the other, since the C files are the same, and
# tested all at once; what fails beside the others must pass alone.  pyenv's are found where its shims
# would refuse.  The one that make test uses is left to it.
test-pythons:
	@tested=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])'); found=; started=; failed=; \
	for version in 3.10 3.11 3.12 3.13; do \
	  if [ "$$version" = "$$tested" ]; then \
	    echo "== Python $$version: left to make test, which runs these tests and the others on it"; \
	    continue; \
	  fi; \
	  python=$$(for candidate in $$(command -v pyenv >/dev/null && \
	      ls -d $$(pyenv root)/versions/$$version*/bin/python$$version 2>/dev/null; true) \
	      python$$version; do \
	    if $$candidate -c 'import ensurepip, os, sys, sysconfig as s; \
	      sys.exit(not os.path.exists(s.get_path("include") + "/Python.h"))' 2>/dev/null; \
	    then echo $$candidate; break; fi; done); \
	  if [ -z "$$python" ]; then echo "== Python $$version: not found, or without venv or headers"; \
	  else echo "== Python $$version: $$python"; \
	    $(MAKE) --no-print-directory .venv-$$version/.core PYTHON=$$python VENV=.venv-$$version || exit 1; \
	    found="$$found $$version"; fi; \
	done; \
	for version in $$found; do \
	  $(MAKE) --no-print-directory test-python VENV=.venv-$$version >.venv-$$version/log 2>&1 & \
	  started="$$started $$version:$$!"; \
	done; \
	for one in $$started; do \
	  wait $${one#*:} || failed="$$failed $${one%:*}"; cat .venv-$${one%:*}/log; \
	done; \
	for version in $$failed; do \
	  echo "== Python $$version: what failed beside the others, once more and alone"; \
	  $(MAKE) --no-print-directory test-python VENV=.venv-$$version CHANCE="$(AGAIN)" || exit 1; \
	done; \
	echo "== the core tests ran on$$found, beside $$tested"; [ -n "$$found" ]

# One Python is enough for what is left to chance.
CHANCE := --ignore=tests/test_stateful.py --ignore=tests/test_stress.py --ignore=tests/test_working_set.py

.PHONY: test-python
test-python: $(VENV)/.core
	PYSWAP_TEST_RUN=$(VENV) $(PY) $(PYTEST) -o cache_dir=$(VENV)/tested -m "core and not long" $(CORE_ONLY) $(CHANCE) $(TEST_ARGS)

$(VENV)/.core: $(VENV)/.ready $(SOURCES)
	PYSWAP_WERROR=1 $(PIP) install --no-build-isolation --editable ".[test-core]"
	@touch $@

clean:
	rm -rf .venv .venv-3.* build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -f pyswap/_fast.c pyswap/_fast_debug.c pyswap/*.so tests/_probe.c tests/*.so
	find pyswap tests examples bench -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
