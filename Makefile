# Each target does all of its own set-up, in .venv.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/* csrc/*/*)

.PHONY: demo test sanitize wheel clean

demo: $(VENV)/.demo  ## train a forecaster on moving handwritten digits and draw what it predicts
	$(BIN)/mkconvlstm forecast --output demo --overwrite

test: $(VENV)/.test  ## lint and all tests that this machine can run
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

sanitize: $(VENV)/.test  ## the compiled code under sanitizers: the host's here, the kernels' where there is a GPU
	$(BIN)/python -m mkconvlstm_cuda.bench.sanitize

wheel: $(VENV)/.build  ## dist/*.tar.gz, and dist/*.whl built from it
	$(BIN)/pip install --quiet --disable-pip-version-check build
	$(BIN)/python -m build --no-isolation --outdir dist

clean:
	rm -rf $(VENV) build dist *.egg-info mkconvlstm_cuda/*.so

# What the build needs comes first, so that it runs without isolation and torch is installed once.
$(VENV)/.build: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check \
		"setuptools>=77" "cmake>=3.24" ninja "pybind11>=2.13" "torch>=2.11,<2.14"
	touch $@

$(VENV)/.demo $(VENV)/.test: $(VENV)/.%: $(VENV)/.build $(SOURCES)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --editable ".[$*]"
	touch $@
