"""Units, the world's building blocks: a unit draws its pictures or clips and asks its questions.

    unit = Unit(folder, "train", "scene", 17, seed=0, sides=(84, 126))
    scene = unit.scene(3)                       three things at different places
    item = unit.scene_picture(scene)            written to pictures/; an item of a content list
    question = ask("caption", "Describe the picture.", sentence(scene.things))
    unit.line("caption", [item], [question])
    unit.lines                                  [("caption", '{"messages": ...')]

The random numbers of a unit come from (seed, split, kind, index) alone, so that any number of
processes writes the same bytes.
"""

import hashlib
import itertools
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

from PIL import Image

from toyworld.drawing import COLOUR_NAMES, PLACES, SHAPES, Paper, Thing, fill_of, write_clip

# Name of a file -> category of its questions; of the others the two are the same.
CATEGORY = {"vqa": "ocr_vqa", "ocr": "ocr_vqa", "instruct": "instruction"}

# Verifier -> the tasks whose responses it judges. All others are judged by "choice".
VERIFIERS = {
    "text": "caption read story describe_number video_caption moving_object copy".split(),
    "number": "count count_of count_point text_length event_start arithmetic count_words "
    "sum_count drawn_arithmetic".split(),
    "yesno": ["exist", "compare_count"],
    "box": ["box"],
    "point": ["point"],
    "interval": ["event_time"],
    "order": ["reorder", "sort"],
    "exact": "in_sentence in_capitals as_json colour_and_shape twice_asked say_motion".split(),
}

# Task -> its answers, where they are few. They take turns, so that blind guessing is chance.
CHOICES = {
    "colour": COLOUR_NAMES,
    "shape": SHAPES,
    "count": list("12345"),
    "count_of": list("123"),
    "position": PLACES,
    "exist": ["yes", "no"],
    "count_point": list("123"),
    "text_colour": COLOUR_NAMES,
    "text_length": list("1234"),
    "motion": ["left", "right", "up", "down"],
    "match": ["1", "2"],
    "count_words": list("1234"),
    "text_position": PLACES,
    "text_colour_of": COLOUR_NAMES,
    "sum_count": list("23456"),
    "compare_count": ["yes", "no"],
    "relation": SHAPES,
    "detail": SHAPES,
    "detail_rotated": SHAPES,
    "detail_low_contrast": SHAPES,
    "option": ["A", "B", "C"],
}


def in_turn(task: str, turn: int) -> str | None:
    """The answer whose turn it is; None for a task whose answers are many."""
    choices = CHOICES.get(task)
    return choices[turn % len(choices)] if choices else None


# ------------------------------------------------------------------------------- words

PLURAL = {shape: shape + "s" for shape in SHAPES} | {"cross": "crosses"}


def article(name):
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def says(text):
    return text[0].upper() + text[1:] + "."


def sentence(things):
    return says(", ".join(article(t.seen) for t in things))


def text_item(text):
    return {"type": "text", "text": text}


def numbered(items):
    """The items of a content list, with "Picture 1: " and so on before them."""
    content = []
    for k, item in enumerate(items, 1):
        content += [text_item(f"Picture {k}: "), item]
    return content


@dataclass
class Question:
    """meta: how a response is judged (answer, verifier, chance, ...), and true steps towards it."""

    task: str
    text: str
    reply: str
    meta: dict


def ask(task, text, reply, answer=None, choices=None, chance=0.0, **more) -> Question:
    """answer: if it is not the whole reply. choices: if they are not the task's. more: for meta."""
    choices = choices or CHOICES.get(task)
    verifier = "choice"
    for name, tasks in VERIFIERS.items():
        if task in tasks:
            verifier = name
    meta = {"answer": answer or reply, "verifier": verifier, "chance": chance}
    if choices:
        meta |= {"chance": round(1 / len(choices), 4), "choices": choices}
    return Question(task, text, reply, meta | more)


def tally(things, attribute, values):
    """Steps of counting: what each thing is, the counted values with a running number."""
    found = []
    steps = []
    for t in things:
        value = getattr(t, attribute)
        found.append(value)
        number = f" {found.count(value)}" if value in values else ""
        steps.append(f"{t.where}: {value}{number}")
    return steps


# ------------------------------------------------------------------------------ scenes


@dataclass
class Theme:
    """What can be counted in a scene: things with this value of "colour" or "shape"."""

    attribute: str
    value: str
    count: int

    @property
    def name(self):
        return PLURAL.get(self.value, f"{self.value} objects")


@dataclass
class Scene:
    """Things on a picture of width x height pixels."""

    things: list[Thing]
    theme: Theme | None = None
    width: int = 0
    height: int = 0

    def unique(self, attribute, t):
        """Whether no other thing has the same colour, shape or name as t."""
        values = [getattr(thing, attribute) for thing in self.things]
        return values.count(getattr(t, attribute)) == 1

    def single(self):
        """The things that their name tells from all others."""
        return [t for t in self.things if self.unique("name", t)]

    def box(self, t):
        return thousandths(t.box(), self.width, self.height)

    def point(self, t):
        x1, y1, x2, y2 = self.box(t)
        return [(x1 + x2) // 2, (y1 + y2) // 2]


def thousandths(box, width, height):
    """(x1, y1, x2, y2) in pixels -> integers in [0, 1000), Keye's boxes (report, table 1)."""
    sides = (width, height, width, height)
    return [min(999, max(0, int(1000 * v / side))) for v, side in zip(box, sides)]


def draw_scene(rng, n, shapes, places) -> Scene:
    """n things of these shapes (None: of all, with a theme if n >= 3), still without sizes."""
    things = []
    for place in sorted(rng.sample(places, n)):
        things.append(Thing(rng.choice(COLOUR_NAMES), rng.choice(shapes or SHAPES), place))
    if n < 3 or shapes:
        return Scene(things)

    # The count is drawn before the things' values, so that 1, 2 and 3 are equally likely.
    attribute = rng.choice(["colour", "shape"])
    values = CHOICES[attribute]
    theme = Theme(attribute, rng.choice(values), rng.randint(1, 3))
    chosen = rng.sample(range(n), theme.count)
    others = [value for value in values if value != theme.value]
    for i, t in enumerate(things):
        setattr(t, attribute, theme.value if i in chosen else rng.choice(others))
    return Scene(things, theme)


# ------------------------------------------------------------------------------- units


def is_heldout(key: str) -> bool:
    """The split: a tenth of all contents, by hash of the canonical truth, never occurs in train."""
    return hashlib.blake2b(key.encode(), digest_size=4).digest()[0] % 10 == 0


def scene_key(scene):
    return "scene:" + "|".join(sorted(f"{t.name} {t.where}" for t in scene.things))


@dataclass
class Film:
    """The form of a clip: width and height even, frames per second of the file, seconds."""

    width: int
    height: int
    fps: float
    duration: float


@dataclass
class Unit:
    """One unit: the files it writes and, in lines, (name of a JSONL file, a line of it).

    kind: "name" or "name.task". With "ask." before it, its contents are of train and its
    questions those of the held-out files; their lines go to questions.jsonl.
    sides: least and largest side of a picture in pixels. dry: nothing is drawn or written.
    """

    folder: str | Path
    split: str
    kind: str
    index: int
    seed: int
    sides: tuple
    dry: bool = False
    lines: list = field(default_factory=list)

    def __post_init__(self):
        self.numbers = itertools.count()  # of its files
        self.rng = random.Random(f"{self.seed}/{self.split}/{self.kind}/{self.index}")
        self.practice = self.kind.startswith("ask.")
        self.name, _, self.task = self.kind.removeprefix("ask.").partition(".")
        self.heldout = self.split == "heldout"
        self.exam = self.heldout or self.practice  # one question a line

    def until_split(self, draw: Callable, key: Callable):
        """The first value of draw() whose key belongs to the unit's split."""
        while True:
            value = draw()
            if is_heldout(key(value)) == self.heldout:
                return value

    def scene(self, n: int, shapes=None, sides=None, grid=3) -> Scene:
        """n things at different places of a raster of grid x grid cells (grid 2: the corners)."""
        rng = self.rng
        places = range(9) if grid == 3 else (0, 2, 6, 8)
        scene = self.until_split(lambda: draw_scene(rng, n, shapes, places), scene_key)
        sides = sides or self.sides
        scene.width = rng.randint(*sides)
        scene.height = rng.randint(*sides)
        width = scene.width / grid
        height = scene.height / grid
        for t in scene.things:
            row, column = divmod(places.index(t.place), grid)
            t.r = rng.uniform(0.42, 0.48) * min(width, height)
            t.cx = (column + 0.5) * width + rng.uniform(-0.8, 0.8) * (width / 2 - t.r)
            t.cy = (row + 0.5) * height + rng.uniform(-0.8, 0.8) * (height / 2 - t.r)
            t.rgb = fill_of(rng, t.colour)
            t.turn = rng.uniform(-0.12, 0.12)
        return scene

    def new_file(self, folder, ending):
        return f"{folder}/{self.kind}-{self.index:06d}-{next(self.numbers)}.{ending}"

    def picture(self, width: int, height: int, draw: Callable, quality=None) -> dict:
        """Writes draw(), an array (H, W, 3): a quarter as PNG, unless quality is given. -> item"""
        png = quality is None and self.rng.random() < 0.25
        name = self.new_file("pictures", "png" if png else "jpg")
        if not self.dry:
            if not png:
                quality = quality or self.rng.randint(85, 95)
            path = Path(self.folder, self.split, name)
            # Each format takes the options that it knows.
            Image.fromarray(draw()).save(path, quality=quality, subsampling=0, compress_level=1)
        return {"type": "image", "image": name, "width": width, "height": height}

    def scene_picture(self, scene: Scene) -> dict:
        paper = Paper(self.rng, scene.width, scene.height)
        return self.picture(scene.width, scene.height, lambda: paper.draw(scene.things))

    def clip(self, film: Film, shown: Callable) -> dict:
        """Writes a clip of what shown(t in seconds) lists: things at their places. -> its item"""
        rate = Fraction(30000, 1001) if film.fps == 29.97 else Fraction(film.fps)
        n = round(film.duration * rate)
        name = self.new_file("clips", "mp4")
        paper = Paper(self.rng, film.width, film.height)

        def frames():
            last = None
            for k in range(n):
                things = shown(k / float(rate))
                if things != last:  # else the frame before is this one too
                    frame = paper.draw(things)
                    last = things
                yield frame

        if not self.dry:
            path = Path(self.folder, self.split, name)
            write_clip(path, frames(), rate, film.width, film.height)
        return {
            "type": "video",
            "video": name,
            "width": film.width,
            "height": film.height,
            "duration": round(float(n / rate), 4),
            "fps_source": film.fps,
        }

    def line(self, name: str, media: list[dict], questions: list[Question]):
        """A conversation for name.jsonl. media: what stands before the first question."""
        first = questions[0]
        messages = []
        for q in questions:
            messages.append({"role": "user", "content": q.text})
            messages.append({"role": "assistant", "content": q.reply})
        if media:
            messages[0]["content"] = media + ([text_item(first.text)] if first.text else [])
        record = {"messages": messages}
        if len(questions) == 1 and first.text:
            category = CATEGORY.get(name, name)
            record["meta"] = {"task": first.task, "category": category} | first.meta
        self.lines.append(("questions" if self.practice else name, json.dumps(record)))

    def lines_of(self, name: str, item: dict, questions: list[Question], more=(), lines=2):
        """An exam asks each question in a line of its own, train some of these and of more."""
        if self.exam:
            for question in questions:
                self.line(name, [item], [question])
            return
        for _ in range(lines):
            some = self.rng.sample([*questions, *more], self.rng.randint(2, 3))
            self.line(name, [item], some)
