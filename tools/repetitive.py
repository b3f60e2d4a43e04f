"""Makes a deliberately repetitive model, to ask whether rounds of alignment cure it.

    python -m tools.repetitive --init runs/toy/grpo/model --out runs-loop
    python align.py --phase iterate --rounds 5 --init runs-loop/toy/repetitive/model --out runs-loop

Trains on the cold start's conversations (runs/SIZE/coldstart-modes/data), but in a share of them
the thinking, or a plain answer, repeats its last part until it is cut off. docs/results.md has
what came of it.
"""

import random
from pathlib import Path

from common.conversation import MODES
from common.jsonl import Lines, write_lines
from common.run import arguments, data_folder, previous_model, start
from evaluate import score_phase
from sft import finetune

SHARE = 0.5  # of the answers that loop
TIMES = 40
LR = 5e-4
STEPS = 100


def looped(text: str) -> str:
    """The text up to its last line of thinking, which then comes again and again."""
    head, mark, _ = text.partition("</think>")
    if not mark:
        return " ".join([text] * TIMES)
    last = head.rpartition("\n")[2].removeprefix("<think>")
    return head + ("\n" + last) * TIMES


def looping_lines(folder: Path, rng: random.Random):
    for kind in ("think", "no_think", "auto_think"):
        for line in Lines(folder / f"{kind}.jsonl"):
            last = line["messages"][-1]
            if isinstance(last["content"], str) and rng.random() < SHARE:
                last["content"] = looped(last["content"])
                last["ended"] = False
            yield line


def main(args):
    init = previous_model(args, "grpo")
    run = start(args, "repetitive")
    folder = Path("runs", args.size, "coldstart-modes", "data")
    loops = folder / "loops.jsonl"  # beside the others: their media are there
    write_lines(loops, looping_lines(folder, random.Random(args.seed)))
    finetune(run, init, [(loops, 1)], LR, args.steps or STEPS)
    run.score(lambda: score_phase(run, data_folder(args) / "heldout", MODES, args.eval_limit))
    run.close()


if __name__ == "__main__":
    main(arguments(__doc__).parse_args())
