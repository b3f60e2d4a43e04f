"""All phases after pre-training, each from the one before, on two ranks or on GPUs."""

import json
import os
import subprocess
import sys

import pytest
import torch

from common.conversation import MODES
from conftest import write_toy_model
from miniature import curve, made_json, run_small, weights
from stage import ROOT, TESTS
from toyworld import make_world

# run folder -> the one whose model it starts from
STARTS = {
    "sft": "pretrain",
    "mpo": "sft",
    "coldstart-modes": "mpo",
    "coldstart": "coldstart-modes",
    "grpo": "coldstart",
    "align-1": "grpo",
    "align-2": "align-1",
    "align": "align-2",
}
SCORED = {
    "sft": ["plain"],
    "mpo": ["plain"],
    "coldstart": list(MODES),
    "grpo": list(MODES),
    "align": list(MODES),
}


def torchrun(name: str, *flags, ranks: int) -> str:
    """run_small, but by torchrun itself."""
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    launch += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    words = [TESTS / "miniature.py", 0, name, *flags]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [*launch, *map(str, words)], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


@pytest.mark.parametrize("device, ranks", [
    ("cpu", 2),
    pytest.param("cuda", torch.cuda.device_count(), marks=pytest.mark.cuda),
])
def test_all_phases(tmp_path, device, ranks):
    data = tmp_path / "world"
    make_world(data, pictures=60, clips=12, heldout=1, workers=1, progress=False)
    for path in (data / "heldout").glob("*.jsonl"):
        if path.stem != "video":  # a few questions are enough
            path.unlink()
    folder = tmp_path / "toy"
    write_toy_model(folder / "pretrain" / "model")
    flags = ["--data", data, "--out", tmp_path, "--device", device, "--workers", 0]
    flags += ["--steps", 2, "--eval-limit", 1]

    said = [torchrun("sft.py", *flags, ranks=ranks)]
    for script in (
        ["align.py", "--phase", "mpo"],
        ["coldstart.py"],
        ["grpo.py"],
        ["align.py", "--phase", "iterate"],
    ):
        said.append(run_small(*script, *flags, ranks=ranks))
    for lines in said:
        assert lines.count(" took ") == 1, "rank 0 alone speaks"

    for name, start in STARTS.items():
        assert made_json(folder / name)["init"] == str(folder / start / "model")
        same = weights(folder / name) == weights(folder / start)
        assert same == (name == "align"), "every phase trains, and the last is a copy"
        if name != "align":
            steps = curve(folder / name)
            assert [record["step"] for record in steps] == [0, 1]
            assert steps[1]["lr"] > 0
    for name, modes in SCORED.items():
        score = json.loads((folder / name / "score.json").read_text())
        assert list(score) == modes
