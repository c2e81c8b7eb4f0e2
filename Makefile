# make serve ARGS="--port 30001"     a server for the demo model, installing what is missing first
# make test TESTS=tests/unit         make lint         make test-gpu         make docs         make clean

VENV ?= .venv
PYTHON_IN_VENV := $(VENV)/bin/python
SERVE_STAMP := $(VENV)/installed
DEV_STAMP := $(VENV)/installed-dev
ARGS ?=
TESTS ?=

.PHONY: serve install test test-gpu lint format docs clean

serve: $(SERVE_STAMP)
	exec $(PYTHON_IN_VENV) -m sgl.launch_server $(ARGS)

install: $(SERVE_STAMP)

test: $(DEV_STAMP)
	$(PYTHON_IN_VENV) -m pytest -m "not gpu" $(TESTS)

test-gpu: $(DEV_STAMP)
	$(PYTHON_IN_VENV) -m pytest -m gpu $(TESTS)

lint: $(DEV_STAMP)
	$(PYTHON_IN_VENV) -m ruff check .
	$(PYTHON_IN_VENV) -m ruff format --check .
	$(PYTHON_IN_VENV) -m mypy

format: $(DEV_STAMP)
	$(PYTHON_IN_VENV) -m ruff check --fix .
	$(PYTHON_IN_VENV) -m ruff format .

docs: $(SERVE_STAMP)
	$(PYTHON_IN_VENV) scripts/flags_doc.py

$(SERVE_STAMP): setup.cfg pyproject.toml constraints.txt scripts/install
	scripts/install $(VENV)
	touch $@

$(DEV_STAMP): $(SERVE_STAMP) $(wildcard tests/clients/pins/*.txt)
	scripts/install $(VENV) dev
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
