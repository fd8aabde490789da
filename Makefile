# `make book` builds the HTML book, `make test` runs every test and every chapter.  Both make the
# environment in .venv on their first run, from wheels of the versions in constraints.txt.
#
#   make chapters [CHAPTER=04] [FORCE=1]   execute the chapters that are stale, store their outputs
#   make setup-cells                       write the set-up cell into every chapter's text
#   make bench                             the benchmark table
#   make lint                              format, lint and type checks
#   make clean                             remove what was built (not .venv)
#
# PYTHON    the interpreter to make .venv with (3.11 or later)
# PIP_ARGS  more arguments for pip, for instance to choose another build of PyTorch (see README.md)

PYTHON ?= python3
PIP_ARGS ?=
VENV ?= .venv

PIP = $(VENV)/bin/pip install --only-binary=:all: -c constraints.txt $(PIP_ARGS)
READY = $(VENV)/.ready

.PHONY: book test chapters setup-cells bench lint clean
.DELETE_ON_ERROR:

# Dropping the cache of a build with warnings makes the next build show them again.
book: $(READY)
	@$(VENV)/bin/jupyter-book build . -W --keep-going -n || { rm -rf _build/.doctrees; exit 1; }
	@echo "The book: file://$(CURDIR)/_build/html/index.html"

test: $(READY)
	$(VENV)/bin/pytest
	$(VENV)/bin/pytest --nbval book/

chapters: $(READY)
	@$(VENV)/bin/python book/tools/chapters.py $(CHAPTER:%=--chapter %) $(FORCE:%=--force)

setup-cells: $(READY)
	@$(VENV)/bin/python book/tools/chapters.py --setup-cells

bench: $(READY)
	@$(VENV)/bin/python -m benchmarks

lint: $(READY)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

clean:
	rm -rf _build build *.egg-info .pytest_cache .ruff_cache .mypy_cache

# The package itself is linked, not copied, and built with the setuptools pinned in
# constraints.txt: nothing is compiled and no isolated build downloads another version.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or later is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools
	$(PIP) --no-build-isolation -e '.[book,test]'
	@touch $@
