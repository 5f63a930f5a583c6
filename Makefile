# Each target makes its own virtual environment when there is none, and installs what it needs.
VENV ?= .venv
PYTHON ?= python3
TEST_PROCESSES ?= 2
BIN := $(VENV)/bin
DATA_BENCHMARKS := decode delivery memory latency

.PHONY: demo test check audit infra chaos services bench bench-data bench-step bench-ingest bench-embed bench-worth bench-probe bench-tracking bench-detection bench-sweep schema ui clean

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/.installed  ## pretrain on the digits and register the encoder
	$(BIN)/maskray ingest digits runs/data/digits --held-out-fraction 0.2
	$(BIN)/maskray pretrain --config configs/pretrain/digits.yaml

test: $(VENV)/.installed  ## everything but the long kills: what bears company in some processes, then the rest in one
	# Both, even where the first fails.
	failed=0; \
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal -m 'not slow and not services and not alone' || failed=$$?; \
	$(BIN)/python -m pytest -m 'not slow and not services and alone' && exit $$failed

check: $(VENV)/.installed  ## format, lint, types, guards
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/guards

audit: $(VENV)/.installed  ## packages with known weaknesses; needs a network: without one it says so, and fails
	$(BIN)/python tests/audit.py

infra: $(VENV)/.installed  ## all files of infra/, after you changed them
	PYTHONPATH=tests $(BIN)/python -m manifests

chaos: $(VENV)/.installed  ## the long form of all faults, an hour and a half; a line of JSON a case in runs/chaos/results.jsonl
	MASKRAY_CHAOS_RESULTS=$(CURDIR)/runs/chaos/results.jsonl $(BIN)/python -m pytest -m 'slow and not services'

services: $(VENV)/.installed  ## the team's MLflow: PostgreSQL, S3, eight writers, outages, and its UI in a browser; 15 minutes
	# apt-get install postgresql chromium
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[services]'
	$(BIN)/python -m pytest -m services

bench: $(VENV)/.installed  ## see tests/benchmarks/RESULTS.md
	$(BIN)/python tests/benchmarks/plan.py
	$(BIN)/python tests/benchmarks/cache.py
	$(BIN)/python tests/benchmarks/footers.py
	$(BIN)/python tests/benchmarks/scale.py

bench-data: $(VENV)/.installed  ## the data path against others: an hour on two quiet cores
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	for name in $(DATA_BENCHMARKS); do $(BIN)/python tests/benchmarks/$$name.py --json runs/bench/results.jsonl || exit 1; done

bench-step: $(VENV)/.installed  ## the training step against others; STEP='--device cuda' on a GPU
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	# Alone: what else it asks for is at odds with moto, and its MAE modules need none of it.
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps lightly
	$(BIN)/python tests/benchmarks/step.py --json runs/bench/results.jsonl $(STEP)

bench-ingest: $(VENV)/.installed  ## IMAGENET: a tar of pictures; CIFAR: a tar.gz of small ones in class folders
	$(BIN)/python tests/benchmarks/ingest.py $(if $(IMAGENET),--imagenet $(IMAGENET)) $(if $(CIFAR),--cifar $(CIFAR))

bench-embed: $(VENV)/.installed  ## CIFAR: a tar.gz of CIFAR-10's training images in class folders
	$(BIN)/python tests/benchmarks/embed.py $(if $(CIFAR),--cifar $(CIFAR))

bench-worth: $(VENV)/.installed  ## three seeds of the digits, from pretraining to fine-tuning: 10 minutes
	$(BIN)/maskray ingest digits runs/data/digits --held-out-fraction 0.2
	$(BIN)/python tests/benchmarks/worth.py --config configs/pretrain/digits.yaml \
	    --evaluate configs/evaluate/digits.yaml --evaluate configs/evaluate/digits_finetune.yaml

bench-tracking: $(VENV)/.installed  ## what telling MLflow and Prometheus costs: 5 minutes on two quiet cores
	$(BIN)/python tests/benchmarks/tracking.py

bench-probe: $(VENV)/.installed  ## a training loop with probes beside it, and without: 10 minutes on two quiet cores
	$(BIN)/python tests/benchmarks/probe.py

bench-detection: $(VENV)/.installed  ## objects found, pretrained and from scratch
	$(BIN)/python tests/benchmarks/detection.py

bench-sweep: $(VENV)/.installed  ## the sweeps of the digits, in full and under ASHA: 15 minutes on two quiet cores
	$(BIN)/maskray ingest digits runs/data/digits --held-out-fraction 0.2
	$(BIN)/python tests/benchmarks/sweep.py

schema: $(VENV)/.installed  ## JSON Schema for editors
	$(BIN)/maskray schema > configs/schema.json
	$(BIN)/maskray schema embed > configs/embed/schema.json
	$(BIN)/maskray schema evaluate > configs/evaluate/schema.json
	$(BIN)/maskray schema promote > configs/promote/schema.json
	$(BIN)/maskray schema sweep > configs/sweep/schema.json

ui: $(VENV)/.installed  ## MLflow's UI on the embedded store
	$(BIN)/maskray ui

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
