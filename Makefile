# Every target sets up what it needs from nothing: Python 3.10 or newer with pip, and make.
PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo

.PHONY: setup demo test test-wheel lint clean

setup: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

demo: setup  ## train on generated images, then segment others with the result
	rm -rf $(DEMO)
	$(BIN)/python train.py output_dir=$(DEMO)
	$(BIN)/python -c "from seg_torch.datasets import shapes, write_folder as write; \
	    test = shapes('test', test=12); write(test, test.labels, '$(DEMO)/data')"
	$(BIN)/python predict.py checkpoint=$(DEMO) \
	    input=$(DEMO)/data/images output=$(DEMO)/predictions
	@echo "Samples by epoch:   $(DEMO)/samples/"
	@echo "Learning curves:    $(DEMO)/curves.png"
	@echo "Predicted overlays: $(DEMO)/predictions/overlay/"

test: setup
	$(BIN)/python -m pytest

test-wheel: setup  ## install the wheel into an empty environment and train, evaluate, predict there
	$(BIN)/python -m pytest -m slow tests/test_package.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv *.egg-info .pytest_cache .mypy_cache .ruff_cache
