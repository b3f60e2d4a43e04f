"""Makes a deliberately repetitive model, for the question whether rounds of alignment cure it (docs/results.md).

    python tests/repetitive.py --init runs/toy/grpo/model --out runs-loop      leaves runs-loop/toy/repetitive/model
    python align.py --phase iterate --rounds 5 --init runs-loop/toy/repetitive/model --out runs-loop

Trains on the cold start's conversations, but in a share of them the thinking, or a plain answer, goes on repeating its last
part until it is cut off.
"""
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import trainer  # noqa: E402
from data import Processor, text_lines  # noqa: E402
from evaluate import phase_score  # noqa: E402
from model import KeyeVL  # noqa: E402
from rewards import MODES  # noqa: E402
from sft import finetune  # noqa: E402

SHARE, TIMES = 0.5, 40
PLAN = dict(pack=4096, packs=1, lr=5e-4, muon=2)


def looped(text: str) -> str:
    """The text up to its last line of thinking, which then comes again and again; plain answers repeat themselves."""
    head, mark, _ = text.partition("</think>")
    if not mark:
        return " ".join([text] * TIMES)
    return head + ("\n" + head.rpartition("\n")[2].removeprefix("<think>")) * TIMES


if __name__ == "__main__":
    args = trainer.phase_arguments(__doc__).parse_args()
    init, source = trainer.before(args, "grpo"), Path("runs") / args.size / "coldstart-modes" / "data"
    run, rng = trainer.start(args, "repetitive"), random.Random(args.seed)
    out = source / "loops.jsonl"
    with open(out, "w") as f:
        for kind in ("think", "no_think", "auto_think"):
            for _, text in text_lines(source / f"{kind}.jsonl"):
                line = json.loads(text)
                last = line["messages"][-1]
                if isinstance(last["content"], str) and rng.random() < SHARE:
                    last |= {"content": looped(last["content"]), "ended": False}
                f.write(json.dumps(line) + "\n")
    finetune(run, KeyeVL.from_pretrained(init), Processor.from_pretrained(init), [(out, 1)], PLAN, args.steps or 100, args.seed)
    trainer.finish(run, phase_score(run, Path(args.data or f"data/{args.size}"), args, MODES))
