# Needs Python 3.11 or later with venv, and make. Everything else comes from the pinned lock files.

# Hundreds of short processes run here: each would compile all it imports again. Those that begin together would too,
# and find what is Unicode, so that is done once where the tools are installed.
unexport PYTHONDONTWRITEBYTECODE

VENV ?= .venv
OUT ?= out
BIN := $(VENV)/bin
# The first interpreter that is new enough and can make virtual environments.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
# Quiet: what fails is still shown.
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --no-input -qq
# Large downloads: their progress is shown.
INSTALL_SHOWN = $(BIN)/python -m pip install --disable-pip-version-check --no-input

# Built for CPUs, which comes without gigabytes of CUDA: from what pip is configured to find, else from PyTorch's index.
TORCH ?= 2.13.0

PUBLISHED ?= azure mooncake servegen-m-small servegen-m-mid two-models
SEEDS ?= 1 2
# Policies on whole traces: ours, the paper's, and the best of each kind of rival; all of them run at three loads. And
# those in the figures: more than seven cannot be told apart.
POLICIES ?= chiron chiron-paper chiron-paper-tuned llumnix-tuned ray-serve-tuned keda-hpa hpa-kv-tuned niyama niyama-tuned accelgen static
SHOWN ?= chiron chiron-paper-tuned llumnix-tuned hpa-queue-tuned hpa-kv-tuned static
# What each part of chiron buys: the same policy with one part off.
ABLATED ?= azure mooncake servegen-m-small
ABLATIONS ?= no-batch-size-tuning:tune_batch_size=false no-prefill-limit:limit_prefill=false no-eviction:evict=false \
	no-relegation:overload.relegate=false no-look-ahead:look_ahead=false no-backtest:adapt_headroom=false \
	no-batch-plan:plan_batch=false
DYNAMO_PYTHON ?=

# The optional compiled build (setup.py), from a copy of the source; and the tests that run through what it compiles.
COMPILED := $(OUT)/compiled
SIMULATING := tests/laws tests/sim tests/control tests/policies tests/fleet tests/engines tests/gateway tests/net tests/bench

SOURCES := $(shell find src/chiron -type f ! -path "*/__pycache__/*" 2>/dev/null)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo demo-staged compare test test-slow test-kubernetes kubernetes-programs test-compiled test-all lint format bench bench-live bench-http tune figures figures-page loads loads-page sensitivity co-serving evaluation docs-staged paper lock clean

help: ## This list
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1|/p' Makefile | awk -F'|' '{ printf "make %-12s %s\n", $$1, $$2 }'

# As in `make demo DEMO='--duration 60s --engine emulated'`; `chiron demo --help` lists them.
DEMO ?=

demo: $(VENV)/.demo ## Live: real requests, real engines, one endpoint; a screen, a verdict, a report (three minutes)
	@mkdir -p $(OUT)
	@$(BIN)/chiron demo --out $(OUT)/demo $(DEMO)

demo-staged: $(VENV)/.dev ## Live: a model in four stages, a surge, the slow stage scaled by each stage policy (four minutes)
	@mkdir -p $(OUT)
	@$(BIN)/chiron demo --staged --out $(OUT)/demo-staged

compare: $(VENV)/.demo ## Compare policies on real traffic, simulated: table, verdict, report (a minute)
	@mkdir -p $(OUT)
	@$(BIN)/chiron compare demo --report $(OUT)/report.html --json $(OUT)/results.json --figures $(OUT)/figures
	@echo
	@echo "Report: $(OUT)/report.html    Figures: $(OUT)/figures    Numbers: $(OUT)/results.json"

test: $(VENV)/.dev ## The tests, without the slow ones (three minutes)
	@$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not slow"

test-slow: $(VENV)/.dev ## The slow tests, and the laws with all their examples; what measures the whole machine one at a time (25 minutes)
	@CHIRON_TEST_EXAMPLES=all $(BIN)/python -m pytest -n 3 -m "(slow or examples) and not alone"
	@$(BIN)/python -m pytest -m "slow and alone"

# A real kube-apiserver and its controllers, built from Debian's source once and kept.
KUBERNETES ?= $(if $(XDG_CACHE_HOME),$(XDG_CACHE_HOME),$(HOME)/.cache)/chiron/kubernetes-1.20

test-kubernetes: $(VENV)/.dev $(KUBERNETES)/etcd ## The tests against a real Kubernetes control plane (minutes to build it once, then ten)
	@CHIRON_TEST_KUBERNETES=$(KUBERNETES) $(BIN)/python -m pytest -m kubernetes $(KUBERNETES_TESTS)

kubernetes-programs: $(KUBERNETES)/etcd ## Build that control plane, if it is not there

$(KUBERNETES)/etcd:
	@echo "Building Kubernetes 1.20 from Debian's source package (once; five minutes or more) ..."
	@mkdir -p $(dir $(KUBERNETES))
	@nice -n 19 tools/build_kubernetes.sh $(KUBERNETES) > $(KUBERNETES).log 2>&1 || { tail -20 $(KUBERNETES).log; exit 1; }

test-all: $(VENV)/.dev ## Every test
	@CHIRON_TEST_EXAMPLES=all $(BIN)/python -m pytest -n 3 -m "not alone"
	@$(BIN)/python -m pytest -m alone

test-compiled: $(VENV)/.dev $(COMPILED)/.built ## The tests of the simulator and the gateway, with the compiled build
	@PYTHONPATH=$(abspath $(COMPILED)/src) $(BIN)/python -m pytest -n 3 --dist loadfile -m "not slow" $(SIMULATING)

lint: $(VENV)/.dev ## Style, types, and which package may import which
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(VENV)/.dev ## Lay the code out as `make lint` wants it
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(VENV)/.demo $(COMPILED)/.built ## Speed of the simulator, plain and compiled; beside NVIDIA Dynamo's with DYNAMO_PYTHON=its interpreter
	@mkdir -p $(OUT)
	@$(BIN)/python bench/simulator.py $$(ls $(COMPILED)/src/chiron__mypyc* > /dev/null 2>&1 && echo --compiled $(COMPILED)/src) --json $(OUT)/speed.json $(if $(DYNAMO_PYTHON),--dynamo-python $(DYNAMO_PYTHON))

bench-live: $(VENV)/.demo ## Speed of the gateway and of the batch store; what protects interactive requests (fifteen minutes)
	@mkdir -p $(OUT)
	@$(BIN)/python bench/gateway.py --json $(OUT)/gateway.json
	@$(BIN)/python bench/store.py --json $(OUT)/store.json
	@$(BIN)/python bench/protection.py --json $(OUT)/protection.json

bench-http: $(VENV)/.demo ## The gateway's own HTTP beside uvicorn, granian and aiohttp (three minutes)
	@$(INSTALL) --upgrade --target $(OUT)/http-libraries -r bench/requirements.txt
	@PYTHONPATH=$(OUT)/http-libraries $(BIN)/python bench/http_stack.py --json $(OUT)/http_stack.json

$(COMPILED)/.built: $(SOURCES) setup.py pyproject.toml | $(VENV)/.dev
	@rm -rf $(COMPILED) && mkdir -p $(COMPILED)
	@cp -r src setup.py pyproject.toml README.md LICENSE NOTICE $(COMPILED)
	@cd $(COMPILED) && CHIRON_COMPILE=1 $(abspath $(BIN))/python setup.py -q build_ext --inplace
	@touch $@

# All that is published, run by the compiled build where there is one. What was simulated is kept in $(OUT)/published and
# $(OUT)/loads, by policy, load, seed and the code that they run: a new policy costs its own runs.
COMPILED_PYTHON = PYTHONPATH=$(abspath $(COMPILED)/src) $(BIN)/python
RUN = $(COMPILED_PYTHON) -m chiron
TABLES = $(PUBLISHED:%=$(OUT)/published/%.json) $(ABLATED:%=$(OUT)/published/%.ablation.json)
GRIDS = $(PUBLISHED:%=$(OUT)/loads/%.json)
# Some runs that failed are told, and cost the page their figures only.
TOLD = || [ $$? -eq 1 -a -s $@ ]
LOADS ?= 0.4,1,2
LOAD_SEEDS ?= 1..5
# At three loads and five seeds: all of them (empty). Who is far off in the first two seeds runs no third.
LOAD_POLICIES ?=
REASONS := bench/loads/reasons.toml
COMMA := ,
SEEDS_LISTED = $(subst $() $(),$(COMMA),$(strip $(SEEDS)))
ALL = $$($(BIN)/python -c 'from chiron.policies.registry import POLICIES; print(*(f"-p {name}" for name in POLICIES))')
LOADED = $(if $(LOAD_POLICIES),$(LOAD_POLICIES:%=-p %),-p chiron -p clairvoyant $(ALL))

# Every policy gets as many trials; chiron's own defaults stand, whatever is found.
RIVALS = $(BIN)/python -c 'from chiron.policies.registry import POLICIES as p; \
	print(*(f"-p {name}" for name in p if name != "static" and not name.endswith("-tuned")))'
CALIBRATION ?= api-8b waves-8b api-70b long-70b shared-h100 rush-8b
TRIALS ?= 20

tune: $(VENV)/.demo $(COMPILED)/.built ## Tune every policy fairly, on traffic that is not published (an hour on two idle cores; resumable)
	@mkdir -p $(OUT) && rm -f $(OUT)/tuned.toml
	@$(RUN) tune $(PUBLISHED) $(CALIBRATION:%=--calibrate bench/calibration/%.toml) $$($(RIVALS)) \
		--trials $(TRIALS) --out $(OUT)/tuned.toml || [ $$? -eq 2 ]
	@cp $(OUT)/tuned.toml src/chiron/data/tuned.toml
	@$(BIN)/python tools/write_tuned.py

figures: $(TABLES) ## Whole traces, ours and the best rivals; writes docs/results.md and docs/figures (22 minutes on two idle cores; resumable)
	@$(MAKE) --no-print-directory figures-page

figures-page: $(VENV)/.demo $(COMPILED)/.built $(PUBLISHED:%=$(OUT)/published/%.svg) $(OUT)/published/overload.md ## The same from the tables that are there
	@mkdir -p docs/figures
	@cp $(PUBLISHED:%=$(OUT)/published/%.svg) docs/figures/
	@cp $(OUT)/published/$(firstword $(PUBLISHED)).svg docs/figures/overview.svg
	@$(BIN)/python tools/results_table.py --figures figures $(wildcard $(TABLES)) > $(OUT)/published/results.md
	@cp $(OUT)/published/overload.svg docs/figures/
	@cat $(OUT)/published/overload.md >> $(OUT)/published/results.md
	@cp $(OUT)/published/results.md docs/results.md
	@echo "docs/results.md and docs/figures are up to date"

loads: $(GRIDS) ## Every policy at three loads, five seeds; writes docs/loads.md (45 minutes on two idle cores; resumable)
	@$(MAKE) --no-print-directory loads-page

loads-page: $(VENV)/.demo ## The same from the runs that are there
	@$(BIN)/python tools/loads_page.py --figure docs/figures/loads.svg --reasons $(REASONS) $(wildcard $(GRIDS)) > $(OUT)/loads/loads.md
	@cp $(OUT)/loads/loads.md docs/loads.md
	@echo "docs/loads.md is up to date"

sensitivity: $(VENV)/.demo $(COMPILED)/.built ## Cold starts, bursts, SLOs, step times, failures; writes docs/sensitivity.md (ten minutes; resumable)
	@mkdir -p $(OUT)
	@$(COMPILED_PYTHON) bench/sensitivity.py --journal $(OUT)/sensitivity.trials.jsonl --out docs/sensitivity.md

co-serving: $(VENV)/.dev ## llm-d's public co-serving test in shape, simulated and live (twenty minutes)
	@$(BIN)/python bench/co_serving.py
	@$(BIN)/python bench/co_serving.py --live

# Its parts, each with its estimate, minutes on two idle cores: from what runs cost in the compiled build, for the policies
# there are (36 published, 34 tuned, clairvoyant). Another choice of traces takes its own.
MINUTES = $(OUT)/loads/azure.json=10 $(OUT)/loads/mooncake.json=4 $(OUT)/loads/servegen-m-small.json=13 \
	$(OUT)/loads/servegen-m-mid.json=8 $(OUT)/loads/two-models.json=10 \
	$(OUT)/published/azure.json=3 $(OUT)/published/mooncake.json=1 $(OUT)/published/servegen-m-small.json=4 \
	$(OUT)/published/servegen-m-mid.json=1 $(OUT)/published/two-models.json=3 \
	$(OUT)/published/azure.ablation.json=2 $(OUT)/published/mooncake.ablation.json=1 \
	$(OUT)/published/servegen-m-small.ablation.json=3
EVALUATION ?= $(filter $(GRIDS:%=%=%),$(MINUTES)) loads-page=0 $(filter $(TABLES:%=%=%),$(MINUTES)) figures-page=4 \
	sensitivity=8 paper=13

evaluation: $(VENV)/.demo $(COMPILED)/.built ## Every table and figure of the simulations anew (90 minutes on two idle cores; resumable)
	@$(BIN)/python tools/evaluation.py --make "$(MAKE)" $(EVALUATION)

FORCE:

$(OUT)/loads/%.json: FORCE | $(VENV)/.demo $(COMPILED)/.built
	@mkdir -p $(@D) && rm -f $@
	@$(RUN) compare bench/loads/$*.toml $(LOADED) --loads $(LOADS) --seeds $(LOAD_SEEDS) --baseline chiron \
		--early-stop --out $(@D)/$* --json $@ > $(@D)/$*.txt $(TOLD)

$(OUT)/published/%.ablation.json: FORCE | $(VENV)/.demo $(COMPILED)/.built
	@mkdir -p $(@D) && rm -f $@
	@$(RUN) compare $* -p chiron --seeds $(SEEDS_LISTED) --bound-each --out $(@D)/$*.ablation --json $@ \
		$(foreach a,$(ABLATIONS),-p $(firstword $(subst :, ,$a)) \
		--set policies.$(firstword $(subst :, ,$a)).policy=chiron \
		--set policies.$(firstword $(subst :, ,$a)).$(lastword $(subst :, ,$a))) > $(@D)/$*.ablation.txt $(TOLD)

$(OUT)/published/%.json: FORCE | $(VENV)/.demo $(COMPILED)/.built
	@mkdir -p $(@D) && rm -f $@
	@$(RUN) compare $* $(POLICIES:%=-p %) --seeds $(SEEDS_LISTED) --bound-each --out $(@D)/$* --json $@ > $(@D)/$*.txt $(TOLD)

$(OUT)/published/%.svg: $(SOURCES) | $(VENV)/.demo $(COMPILED)/.built
	@mkdir -p $(@D)
	@$(RUN) compare $* $(SHOWN:%=-p %) -s $(firstword $(SEEDS)) --figures $(OUT)/published/$* > $(OUT)/published/$*.figures.txt
	@cp $(OUT)/published/$*/overview.svg $@

$(OUT)/published/overload.md: bench/overload.py $(SOURCES) | $(VENV)/.demo $(COMPILED)/.built
	@mkdir -p $(@D)
	@$(COMPILED_PYTHON) bench/overload.py --policies $(POLICIES) --figure $(@D)/overload.svg > $@

docs-staged: $(VENV)/.demo ## Staging in simulation: where it saves and costs; writes docs/staged.md (minutes)
	@$(BIN)/python bench/staged.py --out docs/staged.md

paper: $(VENV)/.demo $(COMPILED)/.built ## The paper's claims, run again in simulation; writes docs/paper.md (a quarter of an hour; resumable)
	@mkdir -p $(OUT)
	@$(COMPILED_PYTHON) bench/paper.py --journal $(OUT)/paper.trials.jsonl --out docs/paper.md

lock: ## Pin the newest versions of everything, in both lock files
	@rm -rf $(OUT)/lock && mkdir -p $(OUT) && $(PYTHON) -m venv $(OUT)/lock
	@$(OUT)/lock/bin/python -m pip install --disable-pip-version-check -qq 'setuptools>=77' '.[report,serve,openvino]'
	@$(OUT)/lock/bin/python -m pip freeze --all | grep -v -e '^pip==' -e '^chiron-serving' > requirements.lock
	@$(OUT)/lock/bin/python -m pip install --disable-pip-version-check -qq '.[dev]'
	@$(OUT)/lock/bin/python -m pip freeze --all | grep -v -e '^pip==' -e '^chiron-serving' > requirements-dev.lock
	@rm -rf $(OUT)/lock

clean: ## Remove what was made, but not the virtual environment
	@rm -rf $(OUT) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

# Stamps: installed once, and again when the pins change.
$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.11 with venv found; set PYTHON=" >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: requirements.lock pyproject.toml | $(VENV)/bin/python
	@echo "Installing the pinned packages (once; a minute or so) ..."
	@$(INSTALL_SHOWN) -r requirements.lock
	@$(INSTALL) --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: requirements-dev.lock $(VENV)/.demo
	@echo "Installing the tools for development (once) ..."
	@$(INSTALL) -r requirements-dev.lock
	@$(BIN)/python -m compileall -q src
	@$(BIN)/python -c 'from hypothesis.strategies import text; text().validate()'
	@$(INSTALL) --no-deps torch==$(TORCH)+cpu 2> /dev/null || \
		$(INSTALL) --no-deps --retries 1 --index-url https://download.pytorch.org/whl/cpu torch==$(TORCH) 2> /dev/null || \
		echo "torch $(TORCH) for CPUs could not be installed; the tests of the staged engine are skipped"
	@touch $@
