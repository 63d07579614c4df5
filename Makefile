# make demo · test · check · bench: each sets up what it needs. Python 3.11+, make and git are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What is installed beside the base: cpu or gpu (docs/gpu.md). Both bring FAISS for CPUs; run deploy/faiss-gpu.sh last.
EXTRA ?= cpu
SERVING := $(VENV)/.serving-$(EXTRA)
TESTING := $(VENV)/.testing-$(EXTRA)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PROTOS := $(wildcard proto/liverank/v1/*.proto) proto/build_hook.py

# Kernels first: what they compile, servers load from the cache. Then long files, so that both workers end together.
# A core each: torch and BLAS would start a thread per core in both.
WORKERS ?= 2
IN_PARALLEL := --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
TESTS := $(addprefix tests/,parity faults e2e contract unit)
# Run twice: in one process, and behind an edge.
BEHIND_AN_EDGE := tests/e2e/test_ranking.py tests/e2e/test_liveness.py tests/e2e/test_columnar_publish.py

.PHONY: demo test check bench serve setup train triton clean

setup: $(SERVING)                  ## the `liverank` command in .venv/bin
demo: setup triton                 ## Triton, server, simulated platform: one minute, then a line of JSON
	$(BIN)/liverank demo
serve: setup                       ## a server with the default settings (model in process)
	$(BIN)/liverank serve
test: $(TESTING) triton            ## all tests, a real Triton included
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(IN_PARALLEL) -m "not alone" $(TESTS)
	TESTS_BEHIND_AN_EDGE=1 $(BIN)/python -m pytest $(IN_PARALLEL) $(BEHIND_AN_EDGE)
	$(BIN)/python -m pytest -m alone $(TESTS)
check: $(TESTING)                  ## style, types, what bandit finds suspicious, dependencies
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/bandit --quiet --recursive --configfile pyproject.toml server kernels loadtest models triton proto
	$(BIN)/python deploy/dependencies.py $(EXTRA) dev train load kafka redis   # says so when vulnerabilities were not checked
bench: setup                       ## first figures; the last line is JSON
	$(BIN)/liverank bench first
train: $(TESTING)                  ## trains all shipped models from the simulator; the last line: hashes of their metrics
	$(BIN)/python -m models.train_all
triton:                            ## status 3: this machine cannot run it, which is said and not hidden
	@triton/setup.sh || [ $$? -eq 3 ]
clean:
	rm -rf $(VENV) .triton build liverank liverank-data

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
$(SERVING): pyproject.toml $(PROTOS) | $(VENV)/bin/python
	$(PIP) --editable '.[$(EXTRA)]'
	@touch $@
$(TESTING): $(SERVING)
	$(PIP) --editable '.[$(EXTRA),dev,train,load,kafka,redis]'
	@touch $@
