# Every target sets up what it needs from nothing: Python 3.10 or newer with pip, and make.
# With another Python beside the usual one: make test PYTHON=python3.13 VENV=.venv-3.13
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := runs/demo
ON_ALL_CORES := --numprocesses auto --dist loadfile

.PHONY: setup demo docs test test-lowest test-wheel lint clean

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
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

docs: setup  ## build site/, which opens without a network
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet
	@echo "Open site/index.html; with search: python3 -m http.server --directory site"

test: setup
	$(BIN)/python -m pytest $(ON_ALL_CORES)

test-lowest:  ## with the oldest versions that pyproject.toml allows; they know Python 3.10 to 3.12
	$(PYTHON) -m venv --clear .venv-lowest
	.venv-lowest/bin/pip install --quiet uv
	.venv-lowest/bin/uv pip install --python .venv-lowest --resolution lowest-direct \
	    --editable '.[dev]'
	.venv-lowest/bin/python -m pytest $(ON_ALL_CORES)

test-wheel: setup  ## install the wheel into an empty environment and train, evaluate, predict there
	$(BIN)/python -m pytest -m slow tests/test_package.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-* *.egg-info .pytest_cache .mypy_cache .ruff_cache
