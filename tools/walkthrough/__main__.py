"""One picture and one clip of the toy world, from their lines to a loss, a reward and an answer.

    python -m tools.walkthrough             prints the page
    python -m tools.walkthrough --write     writes docs/walkthrough.md, and its drawings beside it

World and weights come from a seed, and no training run is needed: what a fresh model says means
nothing, but every shape, index and formula is that of a trained one. Quoted lines are read from
their functions; where one is gone, the program ends. Nothing is computed here that the project has
a function for. tests/test_walkthrough.py compares the page in docs/ with what this prints.
"""

import argparse
import tempfile
from pathlib import Path

from tools.walkthrough import learning, reading, writing
from tools.walkthrough.page import ROOT, Walk

SECTIONS = [
    reading.lines_of_data,
    reading.resize,
    reading.patches,
    reading.tokens,
    reading.positions,
    reading.rotations,
    reading.packed,
    learning.vit,
    learning.merge,
    learning.loss,
    learning.contrastive,
    learning.preference,
    writing.decoding,
    writing.tool_turn,
    writing.group,
    writing.policy_step,
]
PAGE = ROOT / "docs" / "walkthrough.md"


def walk() -> tuple[str, dict[str, str]]:
    """The page, and its drawings by their names."""
    with tempfile.TemporaryDirectory() as folder:
        w = Walk(Path(folder))
        for section in SECTIONS:
            section(w)
    return "\n\n".join(w.parts) + "\n", w.drawings


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name} and its drawings")
    args = parser.parse_args(argv)
    page, drawings = walk()
    if not args.write:
        print(page, end="")
        return
    folder = PAGE.with_suffix("")
    folder.mkdir(exist_ok=True)
    PAGE.write_text(page, "utf-8")
    for name, drawing in drawings.items():
        (folder / name).write_text(drawing, "utf-8")


if __name__ == "__main__":
    main()
