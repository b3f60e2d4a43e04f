"""Kills a run of the toy again and again, and asks whether it learns the same as one left alone.

    python -m tools.soak --steps 3000 --kills 100

Stage 2 is trained twice on the same small world, in one process: once whole, and once with kill -9
at random moments, also while a checkpoint is being written; after each the same command goes on.
Both must have the same losses and weights to the last bit, every step once, and loaders that have
drawn the same samples. Nor may the memory of the whole run grow, if it is long enough: that of its
main process and of its loader's workers is looked at all the time (/proc, so on Linux), and a line
is fitted through it. The first thousand steps do not count: they meet packs of ever new shapes,
and fill the allocator. Packs are small, or the 3,000 steps would take hours.
"""

import argparse
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from toyworld import make_world

SAME = ("step", "loss", "norm", "lr", "tokens", "visual_tokens", "skipped", "skipped_steps")
WARM = 1000  # ours: steps; until then the toy fills its allocator and its caches of texts
BLOCKS = 20  # ours: means of so many parts of the rest are fitted, as neighbours are alike
LEAK = 2048  # ours: bytes a step that nobody would notice: 2 GB in a million steps

# pretrain.py as it is, with smaller packs
START = """
import runpy, sys
from model import SCALE
SCALE["toy"].pack = int(sys.argv.pop(1))
runpy.run_path("pretrain.py", run_name="__main__")
"""


def command(args, out: Path) -> list[str]:
    words = f"--stage 2 --eval-limit 0 --threads {args.threads} --keep-checkpoint"
    numbers = f"--steps {args.steps} --save-every {args.save_every}"
    folders = ["--data", str(args.out / "data"), "--out", str(out)]
    start = [sys.executable, "-c", START, str(args.pack)]
    return [*start, *words.split(), *numbers.split(), *folders]


def begin(args, out: Path) -> subprocess.Popen:
    """A run in a process group of its own, with its loader's workers."""
    with open(out.with_suffix(".log"), "a") as log:
        return subprocess.Popen(command(args, out), stderr=log, start_new_session=True)


def metrics(out: Path) -> Path:
    return out / "toy" / "pretrain-2" / "metrics.jsonl"


def records(out: Path) -> list[dict]:
    """The lines of metrics.jsonl; its last one may be half written."""
    lines = metrics(out).read_text().split("\n")[:-1] if metrics(out).exists() else []
    return [json.loads(line) for line in lines]


def steps_done(out: Path) -> int:
    return metrics(out).read_bytes().count(b"\n") if metrics(out).exists() else 0


def finish(args, out: Path) -> np.ndarray:
    """Lets a run come to its end -> (n, 3): steps done, bytes of its main process, of workers."""
    run = begin(args, out)
    seen = []
    while run.poll() is None:
        seen.append((steps_done(out), *memory_of(run.pid)))
        time.sleep(0.5)
    if run.returncode != 0:
        raise SystemExit(f"a run ended by itself: {out.with_suffix('.log')} says why")
    return np.array(seen, float)


def memory_of(pid: int) -> tuple[int, int]:
    """Resident bytes of a process, and of its children together."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return resident(pid), sum(map(resident, children))
    except OSError:  # one has just ended
        return 0, 0


def resident(pid) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def growth(steps: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """Least-squares slope of sizes over steps, and half of its 95 % interval."""
    parts = [np.array_split(values, BLOCKS) for values in (steps, sizes)]
    x, y = ([part.mean() for part in half] for half in parts)
    x, y = np.array(x) - np.mean(x), np.array(y) - np.mean(y)
    slope = x @ y / (x @ x)
    noise = np.square(y - slope * x).sum() / (BLOCKS - 2)
    return slope, 2.1 * math.sqrt(noise / (x @ x))  # 2.1: Student's t of 18 degrees of freedom


def run_killed(args, out: Path):
    """Lets the run come so many steps further, waits up to a step more, and kills all of it."""
    moments = random.Random(args.seed)
    goals = sorted(moments.randrange(args.steps) for _ in range(args.kills))
    for i, goal in enumerate(goals):
        run = begin(args, out)
        while steps_done(out) <= goal and run.poll() is None:
            time.sleep(0.05)
        time.sleep(moments.random() * records(out)[-1]["seconds"])
        if run.poll() is not None:
            raise SystemExit(f"a run ended by itself: {out.with_suffix('.log')} says why")
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        print(f"kill {i + 1} of {args.kills}, after {steps_done(out)} steps", flush=True)
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
    return found


def leaks(seen: np.ndarray) -> list[str]:
    """Which processes grow. seen (n, 3): see finish."""
    found = []
    seen = seen[(seen[:, 0] >= WARM) & (seen[:, 1:] > 0).all(1)]
    for name, sizes in (("main process", seen[:, 1]), ("workers", seen[:, 2])):
        if len(seen) < 10 * BLOCKS:
            print(f"{name}: too few steps to say whether memory grows")
            continue
        slope, margin = growth(seen[:, 0], sizes)
        print(
            f"{name}: {sizes.mean() / 1e6:.1f} MB resident, "
            f"{slope:+.0f} +- {margin:.0f} bytes a step (95 %), {len(sizes)} looks"
        )
        if slope - margin > LEAK:
            found.append(f"the memory of the {name} grows")
    return found


def main(args):
    if args.out.exists():
        raise SystemExit(f"{args.out} is there already; name another folder with --out")
    make_world(args.out / "data", pictures=300, clips=30, heldout=1, workers=1, progress=False)
    whole, killed = args.out / "whole", args.out / "killed"
    seen = finish(args, whole)
    np.savetxt(args.out / "memory.txt", seen, "%d", header="steps, main process, workers: bytes")
    found = leaks(seen)
    run_killed(args, killed)
    found += differences(args, whole, killed)
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
    parser.add_argument("--pack", type=int, default=1024, help="tokens of a step")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--out", type=Path, default=Path("runs-soak"))
    main(parser.parse_args())
