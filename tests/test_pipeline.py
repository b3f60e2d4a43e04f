"""All phases after pre-training one after the other, on two ranks or a GPU, each from what the one before left, as a user
starts them."""
import json
import os
import subprocess
import sys

import pytest
import torch

from conftest import ROOT
from data import BUDGETS, Processor
from model import PRESETS, KeyeVL
from toyworld import make_world

# small plans; rewards that differ, as fresh weights are never right
SMALL = '''
import runpy, sys, rewards, trainer
add, add_judge, whole = trainer.phase_arguments, trainer.judge_arguments, rewards.reward
small = lambda: sys.modules["__main__"].PLAN["toy"].update(pack=1200, asked=12, prompts=8, group=3, round_steps=2, rounds=2, longest=12)
trainer.phase_arguments = lambda doc: small() or add(doc)
trainer.judge_arguments = lambda parser: small() or add_judge(parser)
def reward(completion, *a, **k):
    n = sum(len(c.get("text", "")) for c in completion) % 11
    return whole(completion, *a, **k) | {"total": n / 5, "right": float(n > 5), "format": 1.0}
rewards.reward = reward
script = sys.argv.pop(1)
runpy.run_path(script, run_name="__main__")
'''


@pytest.mark.parametrize("device, ranks", [("cpu", 2), pytest.param("cuda", torch.cuda.device_count(), marks=pytest.mark.cuda)])
def test_all_phases(tmp_path, device, ranks):
    make_world(tmp_path / "world", pictures=240, clips=40, heldout=5, workers=1, progress=False)
    torch.manual_seed(0)
    start = tmp_path / "toy" / "pretrain" / "model"
    KeyeVL.empty(PRESETS["toy"]).init_weights().save_pretrained(start)
    Processor(ROOT / "vocab-toy.json", **BUDGETS["toy"]).save_pretrained(start)
    (tmp_path / "small.py").write_text(SMALL)
    for phase in (["sft.py"], ["align.py", "--phase", "mpo"], ["coldstart.py"], ["grpo.py"], ["align.py", "--phase", "iterate"]):
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0",
             str(tmp_path / "small.py"), *phase, "--data", str(tmp_path / "world"), "--out", str(tmp_path), "--steps", "2", "--eval-limit", "1",
             "--device", device, "--threads", "1"], cwd=ROOT, capture_output=True, text=True, timeout=300,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-4000:]
        assert done.stdout.count(" took ") == 1  # rank 0 alone speaks
    for phase in ("sft", "mpo", "coldstart-modes", "coldstart", "grpo", "align-1", "align-2", "align"):
        assert (tmp_path / "toy" / phase / "model" / "model.safetensors").exists() and (tmp_path / "toy" / phase / "score.json").exists()
    assert set(json.loads((tmp_path / "toy/align/score.json").read_text())) == {"think", "no_think", "auto_think", "agentic_think"}
