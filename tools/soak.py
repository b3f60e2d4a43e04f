"""Kills a run of the toy again and again, and asks whether it learns the same as one left alone.

    python -m tools.soak --steps 3000 --kills 100

Stage 2 is trained twice on the same small world, in one process: once whole, and once with kill -9
at random moments, also while a checkpoint is being written; after each the same command goes on.
Both must have the same losses and weights to the last bit, every step once, and loaders that have
drawn the same samples. Nor may the memory of the whole run grow in its second half, if it is long
enough: the first few hundred steps meet packs of ever new shapes, and fill the allocator.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from toyworld import make_world

SAME = ("step", "loss", "norm", "lr", "tokens", "visual_tokens", "skipped", "skipped_steps")
GROWTH = 0.05  # ours: of peak memory in the second half, which rare large packs may take
LONG = 1000  # ours: steps; the toy's memory is 98 % of its last after 400


def command(args, out: Path) -> list[str]:
    words = f"pretrain.py --stage 2 --eval-limit 0 --threads {args.threads} --keep-checkpoint"
    numbers = f"--steps {args.steps} --save-every {args.save_every}"
    folders = ["--data", str(args.out / "data"), "--out", str(out)]
    return [sys.executable, *words.split(), *numbers.split(), *folders]


def begin(args, out: Path) -> subprocess.Popen:
    """A run in a process group of its own, with its loader's workers."""
    with open(out.with_suffix(".log"), "a") as log:
        return subprocess.Popen(command(args, out), stderr=log, start_new_session=True)


def records(out: Path) -> list[dict]:
    """The lines of metrics.jsonl; its last one may be half written."""
    path = out / "toy" / "pretrain-2" / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def finish(args, out: Path):
    if begin(args, out).wait() != 0:
        raise SystemExit(f"a run ended by itself: {out.with_suffix('.log')} says why")


def run_killed(args, out: Path):
    """Lets the run come so many steps further, waits up to a step more, and kills all of it."""
    moments = random.Random(args.seed)
    goals = sorted(moments.randrange(args.steps) for _ in range(args.kills))
    for i, goal in enumerate(goals):
        run = begin(args, out)
        while len(records(out)) <= goal and run.poll() is None:
            time.sleep(0.05)
        time.sleep(moments.random() * records(out)[-1]["seconds"])
        if run.poll() is not None:
            raise SystemExit(f"a run ended by itself: {out.with_suffix('.log')} says why")
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        print(f"kill {i + 1} of {args.kills}, after {len(records(out))} steps", flush=True)
    finish(args, out)


def loader_state(out: Path, steps: int) -> dict:
    """What was drawn from each file, and which lines still wait, after the last step."""
    folder = out / "toy" / "pretrain-2" / "checkpoint" / f"step-{steps}"
    return json.loads((folder / "state.json").read_text())["loader"]


def weights(out: Path) -> bytes:
    return (out / "toy" / "pretrain-2" / "model" / "model.safetensors").read_bytes()


def differences(args, whole: Path, killed: Path) -> list[str]:
    found = []
    ours, theirs = records(whole), records(killed)
    steps = [record["step"] for record in theirs]
    if steps != list(range(args.steps)):
        found.append(f"steps are missing or there twice: {len(steps)} lines")
    for a, b in zip(ours, theirs):
        for key in SAME:
            if a.get(key) != b.get(key):
                found.append(f"step {a['step']}: {key} is {b.get(key)}, not {a.get(key)}")
    if loader_state(whole, args.steps) != loader_state(killed, args.steps):
        found.append("the loaders have not drawn the same samples")
    if weights(whole) != weights(killed):
        found.append("the weights differ")
    half, end = (ours[i]["peak_gb"] for i in (len(ours) // 2, -1))
    print(f"peak memory: {half:.3f} GB after half of the steps, {end:.3f} at the end")
    if args.steps >= LONG and end > half * (1 + GROWTH):
        found.append("memory grows")
    return found


def main(args):
    if args.out.exists():
        raise SystemExit(f"{args.out} is there already; name another folder with --out")
    make_world(args.out / "data", pictures=300, clips=30, heldout=1, workers=1, progress=False)
    whole, killed = args.out / "whole", args.out / "killed"
    finish(args, whole)
    run_killed(args, killed)
    found = differences(args, whole, killed)
    for line in found[:10]:
        print(line)
    if found:
        raise SystemExit(f"{len(found)} differences after {args.kills} kills")
    print(f"{args.steps} steps, {args.kills} kills: equal to the last bit")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--kills", type=int, default=8)
    parser.add_argument("--save-every", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--out", type=Path, default=Path("runs-soak"))
    main(parser.parse_args())
