"""The phases after pre-training in miniature: the real scripts, their plans and answers made small.

    said = run_script("grpo.py", "--data", data, "--out", out, ranks=2, updates=1)

A start with fresh weights is never right, so that rewards here are what the length of a text says.
"""

import json
import os
import runpy
import signal
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

import model
from common import checkpoint, rollout
from common import run as run_module
from stage import ROOT, in_processes

SMALL = {
    "asked": 12,
    "filtered": 12,
    "measured": 8,
    "kept": 20,
    "prompts": 6,
    "group": 3,
    "max_tokens": 12,
    "pack": 600,
    "rounds": 2,
    "round_steps": 2,
}


def run_script(name: str, *flags, ranks=1, code=0, kill=0, **plan) -> str:
    """Runs a script as its command line does, to its end; returns what it said on stderr.

    plan: what its PLAN has otherwise than SMALL. kill: kill -9 after this step, before it is saved.
    """
    return in_processes(script, [name, json.dumps(plan), kill, *flags], ranks, code)


def script(argv: list[str]):
    name, plan, kill, *flags = argv
    torch.set_num_threads(1)
    make_small(json.loads(plan))
    be_killed(int(kill))
    sys.argv = [name, *flags, "--threads", "1"]
    runpy.run_path(str(ROOT / name), run_name="__main__")


def make_small(plan: dict):
    """Small plans and answers of whatever script is read next."""
    model.SCALE["toy"] = replace(model.SCALE["toy"], pack=1200, max_answer=12)
    rollout.rewards = by_length(rollout.rewards)
    parser_of = run_module.arguments

    def arguments(*args):
        defaults = vars(sys.modules["__main__"])["PLAN"]["toy"]
        for key, value in (SMALL | plan).items():
            if key in defaults:
                defaults[key] = value
        return parser_of(*args)

    run_module.arguments = arguments


def by_length(rewards):
    """rewards, but a response earns what the length of its text says."""

    def changed(asked: list[dict]):
        scored = rewards(asked)
        for facts, reward in zip(asked, scored):
            letters = sum(len(item.get("text", "")) for item in facts["completion"]) % 11
            reward.total = letters / 5
            reward.right = float(letters > 5)
            reward.format = 1.0
        return scored

    return changed


@contextmanager
def as_before():
    """What a script's start changes in its process is as it was: pytest keeps its signals."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        torch.use_deterministic_algorithms(False)


def be_killed(step: int):
    save_if_due = checkpoint.save_if_due

    def save(run, done, *rest, **extra):
        if done == step:
            os.kill(os.getpid(), signal.SIGKILL)
        save_if_due(run, done, *rest, **extra)

    checkpoint.save_if_due = save


# ----------------------------------------------------------------------------------------------
# data, and what a run leaves


def question(text: str, answer: str, image: str | None = None, task="sum") -> dict:
    content = [{"type": "text", "text": text}]
    if image:
        content.insert(0, {"type": "image", "image": image})
    return {
        "messages": [
            {"role": "user", "content": content},
            {"role": "assistant", "content": answer},
        ],
        "meta": {"task": task, "answer": answer, "verifier": "number"},
    }


def write_jsonl(path: Path, records: list[dict]):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_questions(folder: Path):
    """Six questions to train on, two of them with a picture, and a held-out one."""
    train = folder / "train"
    train.mkdir(parents=True)
    questions = [question(f"What is {i} + 2?", str(i + 2)) for i in range(4)]
    for i in range(2):
        Image.effect_noise((60 + 20 * i, 70), 60).convert("RGB").save(train / f"{i}.png")
        questions.append(question("How many dots?", str(i), f"{i}.png", task="dots"))
    write_jsonl(train / "questions.jsonl", questions)
    write_jsonl(folder / "heldout" / "sum.jsonl", [question("What is 9 + 2?", "11")])


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


TIMES = ("seconds", "tokens_per_s", "visual_tokens_per_s", "mfu", "peak_gb")


def curve(folder: Path) -> list[dict]:
    """The steps of a run, without what no two runs have alike."""
    records = [record for record in read_jsonl(folder / "metrics.jsonl") if "step" in record]
    return [{k: v for k, v in record.items() if k not in TIMES} for record in records]


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


if __name__ == "__main__":
    script(sys.argv[1:])
