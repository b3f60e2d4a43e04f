"""The phases after pre-training in miniature: the real scripts, with small plans and short answers.

    said = run_small("grpo.py", "--data", data, "--out", out, "--plan", "updates=1", ranks=2)

A model with fresh weights is never right, so here the length of a response says what it is worth.
"""

import json
import os
import signal
import sys
from pathlib import Path

from PIL import Image

from common import checkpoint, rollout
from phases import as_main, read, write
from stage import in_processes

SMALL = {
    "sft.py": ["filtered=12"],
    "coldstart.py": ["measured=8", "kept=20"],
    "grpo.py": ["prompts=6", "group=3", "max_tokens=12", "pack=600"],
    "align.py": ["asked=12", "prompts=6", "group=3", "rounds=2", "round_steps=2"],
}


def run_small(name: str, *flags, ranks=1, code=0, kill=0) -> str:
    """Runs a script to its end in fresh processes; returns what they said on stderr.

    kill: kill -9 after this step, before it is saved.
    """
    return in_processes(small, [kill, name, *flags], ranks, code)


def small(argv: list[str]):
    kill, name, *flags = argv
    rollout.rewards = by_length(rollout.rewards)
    checkpoint.save_if_due = killing(checkpoint.save_if_due, int(kill))
    plan = []
    for change in SMALL[name]:
        plan += ["--plan", change]
    as_main([name, *plan, *flags, "--threads", "1"])


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


def killing(save_if_due, step: int):
    def save(run, done, *rest, **extra):
        if done == step:
            run.finish_save()
            os.kill(os.getpid(), signal.SIGKILL)
        save_if_due(run, done, *rest, **extra)

    return save


# --------------------------------------------------------------------------------------------------
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


def write_questions(folder: Path):
    """Six questions to train on, two of them with a picture, and a held-out one."""
    train = folder / "train"
    train.mkdir(parents=True)
    questions = [question(f"What is {i} + 2?", str(i + 2)) for i in range(4)]
    for i in range(2):
        Image.effect_noise((60 + 20 * i, 70), 60).convert("RGB").save(train / f"{i}.png")
        questions.append(question("How many dots?", str(i), f"{i}.png", task="dots"))
    write(train / "questions.jsonl", questions)
    write(folder / "heldout" / "sum.jsonl", [question("What is 9 + 2?", "11")])


def made_json(folder: Path) -> dict:
    return json.loads((folder / "made.json").read_text())


TIMES = ("seconds", "tokens_per_s", "visual_tokens_per_s", "mfu", "peak_gb")


def curve(folder: Path) -> list[dict]:
    """The steps of a run, without what no two runs have alike."""
    records = [record for record in read(folder / "metrics.jsonl") if "step" in record]
    return [{k: v for k, v in record.items() if k not in TIMES} for record in records]


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


if __name__ == "__main__":
    small(sys.argv[1:])
