"""The walkthrough's page as it grows: words, tables, drawings, and lines quoted from the code."""

import copy
import inspect
import json
import textwrap
from pathlib import Path

import torch

from common.optim import clip_gradients, make_optimizer
from data import Processor
from model import PRESETS, SCALE, KeyeVL
from toyworld.world import MEDIA, SIZES, draw_unit

ROOT = Path(__file__).resolve().parents[2]
CFG = PRESETS["toy"]


class Walk:
    """The page, and what its sections hand on to the next ones as attributes."""

    def __init__(self, folder: Path):
        self.parts = []
        self.drawings = {}  # name of the file -> svg
        self.folder = folder / "train"
        for media in MEDIA:
            (folder / media).mkdir(parents=True)
        self.processor = Processor(ROOT / "toyworld" / "vocab.json", **SCALE["toy"].budget)
        self.tokenizer = self.processor.tokenizer
        torch.manual_seed(0)
        self.model = KeyeVL.empty(CFG).init_weights()

    def record(self, kind: str, index: int, name: str, number: int = 0) -> dict:
        """A line of name.jsonl from the unit that draws it, and its media."""
        unit = draw_unit(self.folder.parent, "train", kind, index, 0, SIZES["toy"].sides)
        return json.loads([line for file, line in unit.lines if file == name][number])

    def text(self, ids: list[int]) -> str:
        """What ids spell, on one line."""
        return self.tokenizer.decode(ids).replace("\n", "\\n")

    def moved(self, rate: float, loss_of) -> KeyeVL:
        """A copy of the model after one step of the toy's optimizer on loss_of(model)."""
        model = copy.deepcopy(self.model)
        parts = dict.fromkeys(("vit", "projector", "decoder"), rate)
        optimizer = make_optimizer(model, parts, muon=SCALE["toy"].muon)
        loss_of(model).backward()
        clip_gradients(model)
        optimizer.step()
        return model

    # -- what the page is made of

    def say(self, words: str):
        """Paragraphs, filled anew: values have any length."""
        for part in inspect.cleandoc(words).split("\n\n"):
            self.parts.append(textwrap.fill(part, 96, break_on_hyphens=False))

    def show(self, *rows: str):
        self.parts.append("\n".join(["```text", *rows, "```"]))

    def table(self, *rows):
        rows = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
        head, *rest = ["| " + " | ".join(row) + " |" for row in rows]
        self.parts.append("\n".join([head, "|" + " --- |" * len(rows[0]), *rest]))

    def draw(self, name: str, title: str, drawing: str):
        self.drawings[name] = drawing
        self.parts.append(f"![{title}](walkthrough/{name})")

    def quote(self, function, *begins: str):
        """The statements of a function that begin so, in its order; "..." for what is left out.

        ValueError where one is not there.
        """
        function = inspect.unwrap(function)
        source = inspect.getsource(function).splitlines()
        where = Path(inspect.getsourcefile(function)).relative_to(ROOT).as_posix()
        found = []
        for begin in begins:
            at = [i for i, line in enumerate(source) if line.strip().startswith(begin)]
            if not at:
                raise ValueError(f"{where}, {function.__qualname__}: no line begins {begin!r}")
            lines = statement(source[at[0] :])
            if found and at[0]:
                found.append(lines[0][: -len(lines[0].lstrip())] + "...")
            found += lines
            source = source[at[0] + len(lines) :]
        code = textwrap.dedent("\n".join(found))
        link = f"[{where}](../{where}), `{function.__qualname__}`:"
        self.parts.append(f"{link}\n\n```python\n{code}\n```")


def statement(lines: list[str]) -> list[str]:
    """The first of the lines, and those that its open brackets take in."""
    for end in range(1, len(lines) + 1):
        text = "".join(lines[:end])
        if sum(map(text.count, "([{")) <= sum(map(text.count, ")]}")):
            return lines[:end]
    raise ValueError(f"brackets stay open behind {lines[0].strip()!r}")


def num(x) -> str:
    """Three digits behind the point; never -0.000."""
    return f"{round(float(x), 3) + 0.0:.3f}"


def nums(values) -> str:
    return ", ".join(map(num, values))
