"""A tour of a trained run in the terminal: what a model sees, says and thinks, phase by phase.

    python -m tools.tour                            runs/toy on questions of data/toy
    python -m tools.tour --question 7               other questions
    python -m tools.tour --run runs/tiny --data data/tiny
    python -m tools.tour | less                     plain, without colours and pauses

Needs only a terminal, so it works over ssh: pictures are drawn in half blocks where it has colours
(NO_COLOR switches them off), else in shades of letters. Enter goes on, ctrl-D ends.
"""

import argparse
import os
import shutil
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image

from common.conversation import MODES, TOOL_MODES, pictures_of, text_of
from common.media import MediaError
from common.questions import Question, files_or_exit, read_or_exit
from common.report import PHASES
from common.rollout import Prompt, Rollout, reward_groups, sample_groups
from data import PATCH, Processor
from generate import Generator, load, max_answer, visible
from model import KeyeVL

SHADES = " .:-=+*#%@"
LEVELS = np.array([0, 95, 135, 175, 215, 255])  # of red, green and blue, of 256 colours
RESET = "\x1b[0m"
WIDEST = 48  # columns of a picture: with its words it fits on a screen
EARLY = ("untrained", "pretrain", "sft", "mpo")  # before the modes are learnt


class Screen:
    """What the terminal can show."""

    def __init__(self):
        out = sys.stdout
        blocks = (out.encoding or "").lower().replace("-", "") == "utf8"
        dumb = os.environ.get("TERM", "dumb") == "dumb"
        self.typed = out.isatty() and sys.stdin is not None and sys.stdin.isatty()
        self.colours = out.isatty() and blocks and not dumb and "NO_COLOR" not in os.environ
        self.all_colours = os.environ.get("COLORTERM") in ("truecolor", "24bit")
        self.width = min(shutil.get_terminal_size().columns, 100)

    def say(self, words: str, style: str = ""):
        """Words filled to the width, paragraph by paragraph. style: of ANSI, as "1" for bold."""
        lines = [textwrap.fill(line, self.width) for line in visible(words).split("\n")]
        text = "\n".join(lines)
        print(f"\x1b[{style}m{text}{RESET}" if style and self.colours else text, flush=True)

    def step(self, title: str):
        """A new step of the tour, once the last one is read. SystemExit where it is to end."""
        if self.typed:
            try:
                input("\nEnter goes on ")
            except (EOFError, KeyboardInterrupt):
                raise SystemExit("") from None
        print()
        self.say(title, "1")
        print()

    def draw(self, picture: Image.Image):
        """Two pixels to a character, one above the other; without colours, letters that are the
        denser the less a place is like most of the picture."""
        width = min(picture.width, self.width, WIDEST)
        height = 2 * max(1, round(picture.height * width / picture.width / 2))
        pixels = np.asarray(picture.convert("RGB").resize((width, height)))
        if not self.colours:
            unlike = np.abs(pixels - np.median(pixels, (0, 1))).sum(2)  # (height, width)
            unlike = unlike.reshape(-1, 2, width).mean(1)
            shades = (unlike / max(1, unlike.max()) * (len(SHADES) - 1)).round().astype(int)
            print("\n".join("".join(SHADES[i] for i in row).rstrip() for row in shades), flush=True)
            return
        for upper, lower in zip(pixels[::2].tolist(), pixels[1::2].tolist()):
            row = [f"\x1b[3{self.code(a)};4{self.code(b)}m▀" for a, b in zip(upper, lower)]
            print("".join(row) + RESET, flush=True)

    def code(self, rgb: list[int]) -> str:
        """A colour for a terminal: any, or the nearest of the 6 x 6 x 6 that most have."""
        if self.all_colours:
            return "8;2;" + ";".join(map(str, rgb))
        red, green, blue = (int(np.abs(LEVELS - value).argmin()) for value in rgb)
        return f"8;5;{16 + 36 * red + 6 * green + blue}"


def seen(processor: Processor, question: Question) -> tuple[list[Image.Image], int]:
    """The first picture or clip of a question as the model sees it, frame by frame; its tokens."""
    conversation = {"messages": question.record["messages"][:-1]}
    sample = processor(conversation, question.root, generate=True)
    t, h, w = sample["grids"][0].tolist()
    form = "(t row column) (channel y x) -> t (row y) (column x) channel"
    patches = sample["patches"][: t * h * w].numpy()
    frames = rearrange(patches, form, t=t, row=h, y=PATCH, x=PATCH)
    return [Image.fromarray(frame) for frame in frames], t * h * w // 4


def ask(model: KeyeVL, processor: Processor, question: Question, mode: str) -> Rollout:
    """The likeliest answer, with its reward; tools run where the mode has them."""
    prompt = Prompt(question.record, question.root, mode, "0")
    most = max_answer(model.config)
    groups = sample_groups(Generator(model, processor), [prompt], 1, most, temperature=0)
    if prompt.failure:
        raise SystemExit(f"{question.where}: {prompt.failure}")
    reward_groups(groups, most)
    return groups[0][0]


def verdict(rollout: Rollout) -> str:
    return "right" if rollout.reward.right else "wrong"


def fresh(model: KeyeVL) -> KeyeVL:
    """A model of the same size before any training."""
    torch.manual_seed(0)
    return KeyeVL.empty(model.config).init_weights()


def question_of(files: dict[str, Path], name: str, number: int, where: Path) -> Question:
    """One question of a held-out file. SystemExit where there is none."""
    if name not in files:
        raise SystemExit(f"{where}: no {name}.jsonl; the tour asks questions of a toy world")
    questions = read_or_exit(files[name])
    return questions[number % len(questions)]


# --------------------------------------------------------------------------------------------------
# the steps


def show_question(screen: Screen, processor: Processor, question: Question):
    frames, tokens = seen(processor, question)
    width, height = frames[0].size
    for picture in pictures_of(question.record, question.root)[:1]:
        if picture.width * picture.height > 2 * width * height:
            screen.say(f"The picture, {picture.width} x {picture.height} pixels:")
            screen.draw(picture)
    count = f"{len(frames)} frames of " if len(frames) > 1 else ""
    screen.say(f"As the model sees it, {count}{width} x {height} pixels, {tokens} visual tokens:")
    for frame in (frames[0], frames[-1])[: len(frames)]:
        screen.draw(frame)
        print()
    asked = text_of(question.record["messages"][-2])
    screen.say(f"Question: {asked.replace('[image]', '').replace('[video]', '').strip()}", "1")
    screen.say(f"Truth:    {question.meta['answer']}")


def answers_by_phase(screen: Screen, models: dict[str, tuple], question: Question):
    """What each phase's model says to one bare question; after the cold start it may think."""
    first, processor = next(iter(models.values()))
    rows = {"untrained": (fresh(first), processor), **models}
    for phase, (model, processor) in rows.items():
        rollout = ask(model, processor, question, "plain" if phase in EARLY else "auto_think")
        said = text_of({"content": rollout.content}).strip() or "(nothing)"
        screen.say(f"{phase}: {PHASES[phase][1] if phase in PHASES else 'fresh weights'}", "1")
        screen.say(textwrap.shorten(said, 300, placeholder=" .."), "2")
        screen.say(f"{verdict(rollout)}\n")


def answer_in_mode(screen: Screen, model: KeyeVL, processor: Processor, question: Question, mode):
    """One answer whole, with what tools showed."""
    rollout = ask(model, processor, question, mode)
    screen.say(f"/{mode}", "1")
    for item in rollout.content:
        if item["type"] == "text":
            screen.say(item["text"], "" if item.get("loss", True) else "2")
        else:
            crop = item["image"]
            screen.say(f"[the tool shows {crop.width} x {crop.height} pixels]", "2")
            screen.draw(crop)
    calls = f", {len(rollout.response.observations)} calls" if mode in TOOL_MODES else ""
    screen.say(f"{verdict(rollout)}; {sum(rollout.response.sampled)} tokens written{calls}\n")


def tour(screen: Screen, models: dict[str, tuple], heldout: Path, number: int):
    files = files_or_exit(heldout)
    model, processor = list(models.values())[-1]
    late = list(models)[-1] not in EARLY
    vqa, clip, hard, detail = (
        question_of(files, name, number, heldout)
        for name in ("vqa", "video", "reasoning", "detail")
    )
    screen.step("1. A picture that no phase was trained on")
    show_question(screen, processor, vqa)
    screen.step("2. Its answers, before training and after each phase")
    answers_by_phase(screen, models, vqa)
    screen.step("3. A clip")
    show_question(screen, processor, clip)
    answer_in_mode(screen, model, processor, clip, "think" if late else "plain")
    screen.step("4. A question of several steps: thinking, not thinking, and choosing")
    show_question(screen, processor, hard)
    for mode in MODES[:3] if late else ("plain",):
        answer_in_mode(screen, model, processor, hard, mode)
    screen.step("5. Dots too small to read: with a tool the model looks closer")
    show_question(screen, processor, detail)
    answer_in_mode(screen, model, processor, detail, "agentic_think" if late else "plain")
    if not late:
        screen.say("Thinking and tools come with the cold start, whose model is not there yet.")
    screen.say("One question proves nothing: evaluate.py --board asks them all.")


def trained(run: Path) -> dict[str, tuple]:
    """{phase: (model, processor)} of a run's phases that are there. SystemExit where none is."""
    folders = {phase: run / phase / "model" for phase in PHASES}
    there = {phase: folder for phase, folder in folders.items() if folder.is_dir()}
    if not there:
        raise SystemExit(
            f"{run}: no model of {', '.join(PHASES)}; "
            "`make toy` trains them, in half an hour or more"
        )
    return {phase: load(folder, "cpu") for phase, folder in there.items()}


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--run", type=Path, default=Path("runs/toy"), help="folder of a run (default: %(default)s)")
    add("--data", type=Path, default=Path("data/toy"), help="its data (default: %(default)s)")
    add("--question", type=int, default=0, help="which question of each kind, from 0")
    args = parser.parse_args(argv)
    if args.question < 0:
        parser.error("--question counts from 0")
    models = trained(args.run)
    heldout = args.data / "heldout"
    if not heldout.is_dir():
        raise SystemExit(f"{heldout}: no such folder; `make toy` draws a toy world there")
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        tour(Screen(), models, heldout, args.question)
    except MediaError as e:
        raise SystemExit(f"{heldout}: {e}; `python -m toyworld` draws a toy world anew") from None
    except BrokenPipeError:  # whoever read it has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
