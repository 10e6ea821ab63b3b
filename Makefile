# `make demo` and `make test` need Python 3.11 or newer and make, nothing else.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Two OpenMP threads that share two cores with anything else are several times slower than one.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test fast lint bench install clean

demo: install
	$(BIN)/ramdefense demo --out runs/demo

test: install lint
	$(BIN)/pytest

fast: install
	$(BIN)/pytest -m "not slow"

lint: install
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Ratios, side by side: the tables of docs/performance.md, in under ten minutes on two cores that do nothing else.
bench: install
	$(BIN)/python benchmarks/attention_cost.py
	$(BIN)/python benchmarks/cuda_attention.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/pgd.py --models zoo:camvid-vit --rounds 2
	$(BIN)/python benchmarks/pgd.py --models zoo:camvid-cnn --size 256x512 --images 1 --rounds 2
	$(BIN)/python benchmarks/partial.py --networks cnn,nonlocal --images 1
	$(BIN)/python benchmarks/growth.py --processes 1,2
	$(BIN)/python benchmarks/imports.py
	$(BIN)/python benchmarks/threads.py

install: $(VENV)/.installed

# uv installs in a minute what takes pip five, and lifts torchattacks' pin of an old `requests`.
$(VENV)/.installed: pyproject.toml ramdefense/_rows.c
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name one with PYTHON=python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --python $(BIN)/python --quiet --editable '.[test,peers]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
