# Two commands for a newcomer: make demo and make test. Each sets up all that it needs.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
OLDEST := .venv-oldest
PROMPT ?= a red circle moving right
IMAGE  ?= docs/tinywan-i2v-start.png
OUT    ?= demo
# The Python of a machine with a GPU that has PyTorch, and options for tools.gpu_day.
GPU_PYTHON ?= $(PYTHON)
GPU_ARGS   ?=
# Without compiled modules every process that a test starts would compile them again.
unexport PYTHONDONTWRITEBYTECODE
# A worker for each processor; the tests of a file share what they have made.
PYTEST := $(BIN)/python -m pytest -q --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.PHONY: help setup demo demo-i2v demo-stream serve test quick check oldest usage ptx gpu gpu-rehearsal gpu-pack format bench clean

help:            ## list the commands
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.installed ## make .venv with everything that demo and test need

# PyPI's PyTorch comes with the Triton of its own time, and the pinned one takes its place (docs/decisions/0019).
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[rtx,dev]' $$(grep ^torch== constraints.txt)
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt triton
	@touch $@

demo: setup      ## TinyWan -> bundle -> ONNX -> mp4 on this machine's CPU, checked against the reference
	@rm -rf $(OUT)
	$(BIN)/wanforge import --recipe w8a8 --out $(OUT)/bundle
	$(BIN)/wanforge export $(OUT)/bundle
	$(BIN)/wanforge generate $(OUT)/bundle --prompt "$(PROMPT)" --preview --out $(OUT)/clip.mp4
	$(BIN)/wanforge parity $(OUT)/bundle --prompt "$(PROMPT)"

demo-i2v: setup  ## the same for image-to-video: a picture, a clip that begins with it, and one that goes on from that
	@rm -rf $(OUT)
	$(BIN)/wanforge import tinywan-i2v --out $(OUT)/bundle
	$(BIN)/wanforge export $(OUT)/bundle
	$(BIN)/wanforge generate $(OUT)/bundle --image $(IMAGE) --prompt "moving right" --out $(OUT)/clip.mp4
	$(BIN)/wanforge continue $(OUT)/bundle $(OUT)/clip.mp4 --prompt "moving down slowly" --out $(OUT)/longer.mp4
	$(BIN)/wanforge parity $(OUT)/bundle --image $(IMAGE) --prompt "moving right"

demo-stream: setup ## a video that is made chunk by chunk and follows prompts on the way, read back and checked
	@rm -rf $(OUT)
	$(BIN)/wanforge import tinywan-causal --recipe w8a8 --out $(OUT)/bundle
	$(BIN)/wanforge export $(OUT)/bundle
	$(BIN)/python -m tools.tinywan.causal.demo $(OUT)/bundle --out $(OUT)/stream.mp4 --picture $(OUT)/stream.png

serve: setup     ## serve TinyWan, with an API and a page, on this machine
	test -d $(OUT)/bundle || $(BIN)/wanforge import --recipe w8a8 --out $(OUT)/bundle
	$(BIN)/wanforge serve $(OUT)/bundle --data $(OUT)/service

test: setup      ## run every test but the exhaustive ones
	$(PYTEST) -m "not exhaustive"

quick: setup     ## run the tests that take less than a minute together
	$(PYTEST) -m "not slow and not exhaustive"

check: setup     ## check formatting, lint and types, and run every test, the exhaustive ones too
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST)

# The packages of .venv, but the oldest Triton and a NumPy that its interpreter knows. Some kernels spill with it.
oldest: setup    ## compile every kernel with the oldest Triton that is supported, and interpret them with it
	test -d $(OLDEST)/triton || $(BIN)/python -m pip install --quiet --no-deps --target $(OLDEST) 'numpy<2.4' triton==3.6.0
	PYTHONPATH=$(CURDIR)/$(OLDEST) $(PYTEST) -o cache_dir=$(OLDEST)/cache -W "ignore:Conversion of an array:DeprecationWarning" \
	  -k "not spills and not profiles and not page" \
	  tests/runtime/measure/kernels/test_resources.py tests/plugins/test_attention_kernels.py \
	  tests/plugins/test_norm_kernels.py tests/plugins/test_w8a8_kernels.py

usage: setup     ## use the tool as people do: kill commands at 220 moments, run every two at once, and their tests
	$(PYTEST) tests/usage
	$(BIN)/python -m tests.usage.pairs
	$(BIN)/python -m tests.usage.chaos --trials 220 --seed 1

ptx: setup       ## run every kernel's PTX on the CPU, write docs/proof.md, and edit single instructions to see them caught
	$(BIN)/python -m tools.ptx --markdown docs/proof.md
	$(BIN)/python -m tools.ptx.mutations --count 40 --seed 1

gpu:             ## on a machine with a GPU: find out whatever only a GPU can show, in parts (tools/gpu_day)
	PYTHONPATH=src:. $(GPU_PYTHON) -m tools.gpu_day $(GPU_ARGS)

gpu-rehearsal: setup ## run every part of gpu at a small size, without a GPU
	$(BIN)/python -m tools.gpu_day --rehearse --minutes 30 --out gpu-rehearsal

gpu-pack: setup  ## make gpu-pack/, which takes everything to a machine with a GPU and without a network
	$(BIN)/python -m tools.gpu_day.pack --out gpu-pack

bench: setup     ## measure what any machine can, compare with earlier runs here, and write docs/benchmarks.md
	@touch benchmarks.jsonl
	$(BIN)/wanforge suite --markdown docs/benchmarks.md --against benchmarks.jsonl --history benchmarks.jsonl; \
	  code=$$?; test $$code -eq 3 || exit $$code  # 3: nothing to compare with yet

format: setup    ## rewrite the files the way check wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:           ## remove what demo made
	rm -rf $(OUT)
