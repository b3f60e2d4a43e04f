# make smoke  sets up, and runs every script for a few steps: a minute or two after installation
# make toy    sets up, draws the toy world and trains a small Keye-VL on it through all phases
# make tour   shows in the terminal what that model sees, says and thinks, phase by phase
# make test   sets up and runs the tests
#
# TORCH names the build to install; any version from 2.11 on works. SIZE=tiny suits one GPU.

PYTHON ?= python3
TORCH ?= torch==2.13.0
SIZE ?= toy
BIN := .venv/bin/

.PHONY: smoke toy tour test setup clean

toy: .venv/run
	$(BIN)python -m toyworld --out data/$(SIZE) --size $(SIZE)
	$(BIN)python pretrain.py --size $(SIZE)
	$(BIN)python sft.py --size $(SIZE)
	$(BIN)python align.py --phase mpo --size $(SIZE)
	$(BIN)python coldstart.py --size $(SIZE)
	$(BIN)python grpo.py --size $(SIZE)
	$(BIN)python align.py --phase iterate --size $(SIZE)
	$(BIN)python evaluate.py --board runs/$(SIZE)

tour: .venv/run
	$(BIN)python -m tools.tour --run runs/$(SIZE) --data data/$(SIZE)

# the same road in miniature; its models have learned nothing
FEW := --data data/smoke --out runs-smoke --steps 2 --eval-limit 0 --fresh

smoke: .venv/run
	$(BIN)python -m toyworld --out data/smoke --pictures 120 --clips 24 --heldout 1
	$(BIN)python pretrain.py $(FEW)
	$(BIN)python sft.py $(FEW) --plan filtered=8
	$(BIN)python align.py --phase mpo $(FEW) --plan asked=16
	$(BIN)python coldstart.py $(FEW) --plan measured=8 --plan kept=20
	$(BIN)python grpo.py $(FEW) --plan prompts=8 --plan group=2 --plan max_tokens=24
	$(BIN)python align.py --phase iterate $(FEW) --plan prompts=64 --plan group=3 --plan rounds=1
	$(BIN)python evaluate.py --init runs-smoke/toy/align/model --data data/smoke/heldout --categories ocr_vqa
	$(BIN)python generate.py --init runs-smoke/toy/align/model --max-new-tokens 8 "What is this?"
	@echo "Every script ran; these models have learned nothing. make toy trains one that has."

test: .venv/test
	OMP_NUM_THREADS=1 $(BIN)python -m pytest -n 2 --dist loadfile

setup: .venv/test

.venv/run: pyproject.toml
	$(PYTHON) -m venv .venv
	@echo "installing PyTorch and the rest into .venv: some minutes"
	$(BIN)pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)pip install --quiet --disable-pip-version-check .
	touch $@

.venv/test: .venv/run
	$(BIN)pip install --quiet --disable-pip-version-check ".[test]"
	touch $@

clean:
	rm -rf .venv build *.egg-info
