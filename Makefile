# Each target does all the set-up it needs: a virtual environment in .venv, pinned by constraints.txt.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TWO := -n 2 --dist loadscope
RUN := PATH="$(CURDIR)/$(BIN):$$PATH"

.PHONY: install demo test test-all test-gpu check bench clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[examples,dev]'
	touch $@

demo: install
	@$(RUN) heliostat run pipelines/mnist.yaml

test: check
	$(BIN)/python -m pytest $(TWO)

test-all: check
	$(BIN)/python -m pytest $(TWO) -m "not gpu"

test-gpu: install
	$(BIN)/python -m pytest tests/gpu -m gpu

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py tests/test_docs.py tests/test_shipped_files.py

bench: install
	@for script in tests/benchmarks/bench_*.py; do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) .heliostat pipelines/.heliostat build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
