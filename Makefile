# Two commands for a newcomer: make demo, make test. Each sets up all it needs.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PROMPT ?= A red kite turning slowly over a windy beach at dusk, filmed from below.
OUT    ?= demo

.PHONY: help setup demo test check format bench clean

help:            ## list the commands
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.installed ## make .venv with everything that demo and test need

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[rtx,dev]'
	@touch $@

demo: setup      ## checkpoint files -> bundle -> ONNX -> mp4 on this machine's CPU, checked against the reference
	@$(BIN)/wanforge demo --out $(OUT) --prompt "$(PROMPT)"

test: setup      ## run every test
	$(BIN)/python -m pytest -q

check: setup     ## formatting, lint, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q

format: setup    ## rewrite the files the way check wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:           ## remove what demo made
	rm -rf $(OUT)
