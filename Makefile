# Needs Python 3.11 or newer and make; everything else goes into .venv, which is built on first use.

PYTHON ?= python3
# Hand on flags: make run ARGS="--port 8080", make test ARGS="-k lease".
ARGS ?=

VENV := .venv
# The generator is pinned, and kept apart: what newer ones make is refused by older grpcio and protobuf, while what
# 1.51.1 makes loads on Debian 12's own packages and on the newest. It runs on Python 3.11.
PROTO_VENV := .venv-proto
PROTO_PYTHON ?= $(shell command -v python3.11 || echo python3)
PROTO_OUT = worker_pb2.py worker_pb2.pyi worker_pb2_grpc.py
PROTOC = $(PROTO_VENV)/bin/python -m grpc_tools.protoc -Iworker_pb2_gen=proto \
	--python_out=$(1) --pyi_out=$(1) --grpc_python_out=$(1) proto/worker.proto

# Prints the requirements of some extras of pyproject.toml, a line each.
EXTRAS = $(VENV)/bin/python -c 'import sys, tomllib; \
	extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; \
	print(*(line for name in sys.argv[1:] for line in extras[name]), sep="\n")'
HAS_VENV = $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null
PYTHON_OK = $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	|| { echo "jobqueue needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
# A .venv that was interrupted, or whose Python is gone, is built anew.
MAKE_VENV = test -x $(VENV)/bin/python && $(VENV)/bin/python -m pip --version >/dev/null 2>&1 \
	|| $(PYTHON) -m venv --clear $(VENV)
INSTALL = -m pip install --quiet --disable-pip-version-check --retries 2

.DEFAULT_GOAL := help
.PHONY: help run test test-long check proto proto-check bench clean

help:  ## this list
	@awk -F ':.*  ## ' '/^[a-z-]+:.*  ## /{printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

run:  ## start the server: HTTP on port 3000, gRPC on port 50051, data in ./data
	@$(PYTHON_OK)
	@if ! $(HAS_VENV); then \
		echo "Starting with $(PYTHON) as it is; for gRPC too: apt install python3-venv, then make run again."; \
		exec $(PYTHON) jobqueue.py $(ARGS); \
	elif ! $(MAKE) -s --no-print-directory $(VENV)/.grpc; then \
		echo "Starting with $(PYTHON) as it is; gRPC could not be installed (no network?): make run tries again."; \
		exec $(PYTHON) jobqueue.py $(ARGS); \
	fi; \
	exec $(VENV)/bin/python jobqueue.py $(ARGS)

test: $(VENV)/.dev  ## the tests, in under three minutes
	@# Three at a time, since each waits for half of its time; in the order of the files, so that they end together.
	@$(VENV)/bin/python -m pytest -m "not long" -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

test-long: $(VENV)/.dev  ## the heavy figures, which take hours
	@JOBQUEUE_LONG=1 $(VENV)/bin/python -m pytest -m long $(ARGS)

check: $(VENV)/.dev proto-check  ## ruff, and whether the generated code is what proto/worker.proto makes
	@$(VENV)/bin/python -m ruff check .

proto: $(PROTO_VENV)/.tools  ## generate worker_pb2_gen from proto/worker.proto
	@$(call PROTOC,.)

proto-check: $(PROTO_VENV)/.tools  ## fail where worker_pb2_gen is not what proto/worker.proto makes
	@out=$$(mktemp -d) && trap 'rm -rf "$$out"' EXIT && $(call PROTOC,"$$out") && for file in $(PROTO_OUT); do \
		cmp -s worker_pb2_gen/$$file "$$out/worker_pb2_gen/$$file" \
		|| { echo "worker_pb2_gen/$$file is out of date: run make proto"; exit 1; }; \
	done

bench: $(VENV)/.dev  ## measure, side by side with the peers that are installed
	@$(VENV)/bin/python bench/run.py $(ARGS)

clean:  ## remove what was built here; ./data stays
	@rm -rf $(VENV) $(PROTO_VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Without a recipe: where it is gone (a new Python on the machine), what stands on it is built anew.
$(VENV)/bin/python:

$(VENV)/.grpc: pyproject.toml $(VENV)/bin/python
	@$(PYTHON_OK)
	@$(HAS_VENV) || { echo "make needs venv to build .venv: apt install python3-venv"; exit 1; }
	@echo "Building .venv ..."
	@$(MAKE_VENV)
	@$(EXTRAS) grpc > $(VENV)/grpc.txt
	@$(VENV)/bin/python $(INSTALL) -r $(VENV)/grpc.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.grpc
	@echo "Installing the test tools into .venv ..."
	@$(EXTRAS) grpc dev > $(VENV)/dev.txt
	@$(VENV)/bin/python $(INSTALL) -r $(VENV)/dev.txt
	@touch $@

$(PROTO_VENV)/.tools: Makefile
	@$(PROTO_PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	|| { echo "make needs venv to build .venv-proto: apt install python3-venv"; exit 1; }
	@echo "Building .venv-proto ..."
	@$(PROTO_PYTHON) -m venv --clear $(PROTO_VENV)
	@$(PROTO_VENV)/bin/python $(INSTALL) --only-binary :all: 'setuptools<81' grpcio-tools==1.51.1 \
	|| { echo "grpcio-tools 1.51.1 wants Python 3.11: make PROTO_PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	@touch $@
