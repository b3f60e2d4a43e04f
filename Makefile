# make toy    sets up, draws the toy world and trains a small Keye-VL on it through all stages and phases
# make test   sets up and runs the tests
#
# TORCH names the build to install; any version from 2.11 on works. SIZE=tiny suits one GPU.

PYTHON ?= python3
TORCH ?= torch==2.13.0
SIZE ?= toy
BIN := .venv/bin/

# waiting threads spin for a moment, then sleep: spinning on starves a shared machine, sleeping at once halves the speed
export GOMP_SPINCOUNT := 100000

.PHONY: toy test setup clean

toy: .venv/run
	$(BIN)python toyworld.py --out data/$(SIZE) --size $(SIZE)
	$(BIN)python pretrain.py --size $(SIZE)
	$(BIN)python sft.py --size $(SIZE)
	$(BIN)python align.py --phase mpo --size $(SIZE)
	$(BIN)python coldstart.py --size $(SIZE)
	$(BIN)python grpo.py --size $(SIZE)
	$(BIN)python align.py --phase iterate --size $(SIZE)
	$(BIN)python evaluate.py --board runs/$(SIZE)

test: .venv/test
	OMP_NUM_THREADS=1 $(BIN)python -m pytest

setup: .venv/test

.venv/run: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)pip install --quiet --disable-pip-version-check .
	touch $@

.venv/test: .venv/run
	$(BIN)pip install --quiet --disable-pip-version-check ".[test]"
	touch $@

clean:
	rm -rf .venv build *.egg-info
