# make serve ARGS="--port 30001"     a server for the demo model, installing what is missing first
# make test TESTS=tests/unit         make lint         make test-gpu         make docs         make clean

VENV ?= .venv
PYTHON_IN_VENV := $(VENV)/bin/python
SERVE_STAMP := $(VENV)/installed
DEV_STAMP := $(VENV)/installed-dev
ARGS ?=
TESTS ?=
JOBS ?= 2
PYTEST := $(PYTHON_IN_VENV) -m pytest
SOME_MAY_BE_NONE := || [ $$? -eq 5 ]

.PHONY: serve install test test-gpu lint format docs clean

serve: $(SERVE_STAMP)
	exec $(PYTHON_IN_VENV) -m sgl.launch_server $(ARGS)

install: $(SERVE_STAMP)

test: $(DEV_STAMP)
	$(PYTEST) -m "not gpu and not alone" --numprocesses $(JOBS) --dist loadscope $(TESTS) $(SOME_MAY_BE_NONE)
	$(PYTEST) -m "not gpu and alone" $(TESTS) $(SOME_MAY_BE_NONE)

test-gpu: $(DEV_STAMP)
	$(PYTEST) -m gpu $(TESTS)

lint: $(DEV_STAMP)
	$(PYTHON_IN_VENV) -m ruff check .
	$(PYTHON_IN_VENV) -m ruff format --check .
	$(PYTHON_IN_VENV) -m mypy

format: $(DEV_STAMP)
	$(PYTHON_IN_VENV) -m ruff check --fix .
	$(PYTHON_IN_VENV) -m ruff format .

docs: $(SERVE_STAMP)
	$(PYTHON_IN_VENV) scripts/flags_doc.py
	$(PYTHON_IN_VENV) scripts/parameters_doc.py

$(SERVE_STAMP): setup.cfg pyproject.toml constraints.txt scripts/install
	scripts/install $(VENV)
	touch $@

$(DEV_STAMP): $(SERVE_STAMP) $(wildcard tests/clients/pins/*.txt)
	scripts/install $(VENV) dev
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
