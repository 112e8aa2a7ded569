# Two commands for everybody: `make demo` and `make test`. Each sets itself up in .venv, with packages only.
PYTHON ?= python3
VENV ?= .venv
TEST_PROCESSES ?= 5
BIN := $(VENV)/bin

.PHONY: demo test test-slow check lint docs stubs locks sbom clean

demo: $(VENV)/.server
	$(BIN)/python examples/demo.py

# By several processes: many tests wait for programs that they start.
PYTEST = $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile
test: $(VENV)/.dev
	$(PYTEST) -m 'not slow'

# What `make test` leaves out.
test-slow: $(VENV)/.dev
	$(PYTEST) -m slow

# The fast loop: lint, and tests of each package that take seconds.
FAST := tests/test_house.py tests/fuzz tests/transport/test_turns.py tests/transport/test_output.py \
	tests/server/test_generate.py tests/server/test_scheduler.py tests/client/test_images.py \
	tests/client/test_provenance.py tests/trainer/test_losses.py tests/trainer/test_networks.py \
	tests/trainer/test_objectives.py
check: lint
	$(PYTEST) --quiet -m 'not slow' $(FAST)

# What a change must pass besides the tests. The wire is compared with the last release; without one, with an older commit.
BASE ?= $(shell git describe --tags --abbrev=0 2>/dev/null || git rev-parse --quiet --verify HEAD~100 \
	|| git rev-list --max-parents=0 HEAD | tail -1)
lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy tests/client/typing_uses.py
	$(BIN)/buf lint
	$(BIN)/buf breaking --against ".git#ref=$(BASE)"

# The documentation as a site, in dist/site; a broken link or a page that is missing from mkdocs.yml fails it.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "open dist/site/index.html"

# Regenerates what is committed under client/ganserve/v1 and server/ganserve_server/inference.
stubs: $(VENV)/.dev
	$(BIN)/python -m grpc_tools.protoc -Iproto --python_out=client --pyi_out=client --grpc_python_out=client \
		proto/ganserve/v1/generation.proto proto/ganserve/v1/administration.proto
	$(BIN)/python -m grpc_tools.protoc -Iproto --pyi_out=server/ganserve_server \
		--descriptor_set_out=server/ganserve_server/inference/grpc_service.binpb proto/inference/grpc_service.proto

# Pins what the images install, by hash; with UPGRADE=--upgrade to the newest there is.
COMPILE = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header $(UPGRADE)
locks: $(VENV)/.images
	$(COMPILE) requirements/build.in --output-file requirements/build.lock
	$(COMPILE) pyproject.toml requirements/images.in requirements/server.in --extra server --extra tracing \
		--no-emit-package onnxruntime-gpu --output-file requirements/server.lock
	$(COMPILE) pyproject.toml requirements/images.in --extra gpu --extra tracing --output-file requirements/gpu.lock
	$(COMPILE) pyproject.toml requirements/images.in --extra trainer --output-file requirements/trainer.lock

# What is in the images, for who must know it: CycloneDX.
sbom: $(VENV)/.images
	mkdir -p dist
	for image in server gpu trainer; do \
		$(BIN)/cyclonedx-py requirements --pyproject pyproject.toml --mc-type application --output-reproducible \
			--output-file dist/sbom-$$image.json requirements/$$image.lock || exit 1; \
	done

$(VENV)/.images: $(VENV)/.python
	$(BIN)/python -m pip install --quiet uv cyclonedx-bom
	touch $@

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "ganserve needs Python 3.11 or later; say which with: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.server: $(VENV)/.python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[server]'
	touch $@

$(VENV)/.dev: $(VENV)/.python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[server,trainer,dev]'
	touch $@

$(VENV)/.docs: $(VENV)/.python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) demo.png .pytest_cache .mypy_cache .ruff_cache
