# make toy    sets up, draws the toy world and pre-trains a small Keye-VL on it through all stages
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
