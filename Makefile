PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test lint format typecheck wheel clean

# A run is never overwritten; the demo's own folder is the exception.
demo: $(STAMP)
	rm -rf runs/demo
	$(BIN)/diffdistill train --method dmd2 --preset digits --out runs/demo
	$(BIN)/diffdistill eval runs/demo

test: lint typecheck
	$(BIN)/python -m pytest --durations=10

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# mypy does not see through the editable finder, so it reads an installed tree, made anew each time.
# build/lib goes too: setuptools would pack modules that are deleted since.
typecheck: $(STAMP)
	rm -rf build/lib build/typecheck
	$(BIN)/python -m pip install --quiet --no-deps --no-index --no-build-isolation --no-compile --target build/typecheck .
	cd build/typecheck && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p diffdistill

wheel: $(STAMP)
	rm -rf build/lib dist
	$(BIN)/python -m build --no-isolation

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# Editable on purpose: after a plain install, Python run from here finds ./diffdistill without the mapped folders.
$(STAMP): setup.cfg setup.py pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev,eval]'
	touch $@
