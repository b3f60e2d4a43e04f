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
import json
import random
from dataclasses import dataclass
from fractions import Fraction
from itertools import count
from pathlib import Path

import numpy as np
from PIL import Image

from toyworld.drawing import COLOUR_NAMES, PLACES, SHAPES, Paper, Thing, fill_of, write_clip

# Name of a file -> category of its questions; of the others the two are the same.
CATEGORY = {"vqa": "ocr_vqa", "ocr": "ocr_vqa", "instruct": "instruction"}


def by_task(table):
    """{"a b": value} -> {"a": value, "b": value}."""
    return {task: value for tasks, value in table.items() for task in tasks.split()}


# Tasks -> the verifier that judges their responses. All others are judged by "choice".
VERIFIERS = by_task({
    "caption read story describe_number video_caption moving_object copy": "text",
    "count count_of count_point text_length event_start arithmetic count_words "
    "sum_count drawn_arithmetic difference others colours corners plus sum_three": "number",
    "exist compare_count": "yesno",
    "box": "box",
    "point": "point",
    "event_time": "interval",
    "reorder sort ranking": "order",
    "in_sentence in_capitals as_json colour_and_shape twice_asked say_motion": "exact",
    "absent_shape absent_colour absent_name absent_place": "exact",
})

# Tasks -> their answers, where they are few. They take turns, so that blind guessing is chance.
CHOICES = by_task({
    "colour text_colour text_colour_of main_colour lowest opposite": COLOUR_NAMES,
    "shape relation detail detail_rotated detail_low_contrast main_shape": SHAPES,
    "position text_position": PLACES,
    "exist compare_count": ["yes", "no"],
    "motion backwards": ["left", "right", "up", "down"],
    "option": ["A", "B", "C"],
    "match": ["1", "2"],
    "count_of count_point": ["1", "2", "3"],
    "text_length count_words difference": list("1234"),
    "colours": list("2345"),
    "count others": list("12345"),
    "sum_count": list("23456"),
    "sum_three": list("34567"),
    "corners": ["0", "3", "4", "10", "12"],
})


def in_turn(task, turn):
    """The answer whose turn it is; None for a task whose answers are many."""
    choices = CHOICES.get(task)
    return choices[turn % len(choices)] if choices else None


def task_in_turn(tasks, index):
    """The task whose turn it is, and its answer whose turn it is."""
    turn, k = divmod(index, len(tasks))
    return tasks[k], in_turn(tasks[k], turn)


# ------------------------------------------------------------------------------- words

PLURAL = dict(zip(SHAPES, "circles squares triangles stars crosses rings".split()))


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
    verifier = VERIFIERS.get(task, "choice")
    meta = {"answer": answer or reply, "verifier": verifier, "chance": chance}
    choices = choices or CHOICES.get(task)
    if choices:
        meta |= {"chance": round(1 / len(choices), 4), "choices": choices}
    return Question(task, text, reply, meta | more)


def count_off(values, counted):
    """The values, those that are counted with a running number: star, ring 1, star, ring 2."""
    said = []
    for i, value in enumerate(values, 1):
        said.append(f"{value} {values[:i].count(value)}" if value in counted else value)
    return said


def tally(things, attribute, counted):
    """Steps of counting things by "colour" or "shape"."""
    values = [getattr(t, attribute) for t in things]
    return [f"{t.where}: {said}" for t, said in zip(things, count_off(values, counted))]


# ------------------------------------------------------------------------------ scenes


@dataclass
class Theme:
    """What can be counted in a scene: its things of one colour or shape."""

    name: str  # in the plural
    things: list[Thing]
    steps: list[str]  # of counting them


@dataclass
class Scene:
    """Things on a picture of size (width, height) in pixels."""

    things: list[Thing]
    theme: Theme | None = None
    size: tuple = ()

    @property
    def key(self):
        return "|".join(sorted(f"{t.name} {t.where}" for t in self.things))

    def unique(self, attribute, t):
        """Whether no other thing has the same colour, shape or name as t."""
        values = [getattr(thing, attribute) for thing in self.things]
        return values.count(getattr(t, attribute)) == 1

    def single(self):
        """The things that their name tells from all others."""
        return [t for t in self.things if self.unique("name", t)]

    def box(self, t):
        return thousandths(t.box(), self.size)

    def point(self, t):
        x1, y1, x2, y2 = self.box(t)
        return [(x1 + x2) // 2, (y1 + y2) // 2]


def thousandths(box, size):
    """(x1, y1, x2, y2) in pixels -> integers in [0, 1000), Keye's boxes (report, table 1)."""
    return [min(999, max(0, int(1000 * v / side))) for v, side in zip(box, size + size)]


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
    theme = rng.choice(values)
    chosen = rng.sample(range(n), rng.randint(1, 3))
    others = [value for value in values if value != theme]
    for i, t in enumerate(things):
        setattr(t, attribute, theme if i in chosen else rng.choice(others))
    name = PLURAL.get(theme, f"{theme} objects")
    counted = [things[i] for i in sorted(chosen)]
    return Scene(things, Theme(name, counted, tally(things, attribute, [theme])))


# ------------------------------------------------------------------------------- units


def is_heldout(key):
    """The split: a tenth of all contents, by hash of the canonical truth, never occurs in train."""
    return hashlib.blake2b(key.encode(), digest_size=4).digest()[0] % 10 == 0


@dataclass
class Film:
    """The form of a clip: width and height, both even, frames per second of the file, seconds."""

    size: tuple
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

    def __post_init__(self):
        self.lines = []
        self.numbers = count()  # of its files
        self.rng = random.Random(f"{self.seed}/{self.split}/{self.kind}/{self.index}")
        self.practice = self.kind.startswith("ask.")
        self.name, _, self.task = self.kind.removeprefix("ask.").partition(".")
        self.heldout = self.split == "heldout"
        self.exam = self.heldout or self.practice  # one question a line

    def until_split(self, draw, form):
        """The first value of draw() that, put into the form, is a key of the unit's split."""
        while True:
            value = draw()
            if is_heldout(form.format(value)) == self.heldout:
                return value

    def scene(self, n: int, shapes=None, sides=None, grid=3) -> Scene:
        """n things at different places of a raster of grid x grid cells (grid 2: the corners)."""
        rng = self.rng
        places = range(9) if grid == 3 else (0, 2, 6, 8)
        scene = self.until_split(lambda: draw_scene(rng, n, shapes, places), "scene:{0.key}")
        sides = sides or self.sides
        scene.size = (rng.randint(*sides), rng.randint(*sides))
        width, height = [side / grid for side in scene.size]  # of a cell
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

    def picture(self, paper: Paper, things: list, turns=0, quality=None) -> dict:
        """Writes things on paper, turned right by quarters. -> its item

        A quarter of the files are PNG, unless a quality is given.
        """
        png = quality is None and self.rng.random() < 0.25
        name = self.new_file("pictures", "png" if png else "jpg")
        if not self.dry:
            if not png:
                quality = quality or self.rng.randint(85, 95)
            image = Image.fromarray(np.rot90(paper.draw(things), -turns))
            # Each format takes the options that it knows.
            path = Path(self.folder, self.split, name)
            image.save(path, quality=quality, subsampling=0, compress_level=1)
        height, width, _ = np.rot90(paper.veil, -turns).shape
        return {"type": "image", "image": name, "width": width, "height": height}

    def scene_picture(self, scene: Scene) -> dict:
        paper = Paper(self.rng, *scene.size)
        return self.picture(paper, scene.things)

    def clip(self, film: Film, shown) -> dict:
        """Writes a clip of what shown(t in seconds) lists: things at their places. -> its item"""
        rate = Fraction(30000, 1001) if film.fps == 29.97 else Fraction(film.fps)
        n = round(film.duration * rate)
        name = self.new_file("clips", "mp4")
        paper = Paper(self.rng, *film.size)
        if not self.dry:
            path = Path(self.folder, self.split, name)
            write_clip(path, paper, rate, (shown(k / float(rate)) for k in range(n)))
        return {
            "type": "video",
            "video": name,
            "width": paper.width,
            "height": paper.height,
            "duration": round(float(n / rate), 4),
            "fps_source": film.fps,
        }

    def line(self, name: str, media: list, questions: list):
        """A conversation for name.jsonl. media: what stands before the first question."""
        messages = []
        for q in questions:
            messages += [
                {"role": "user", "content": q.text},
                {"role": "assistant", "content": q.reply},
            ]
        first = questions[0]
        if media:
            space = " " if media[0]["type"] == "text" else ""  # behind pictures with labels
            text = [text_item(space + first.text)] if first.text else []
            messages[0]["content"] = media + text
        record = {"messages": messages}
        if len(questions) == 1 and first.text:
            category = CATEGORY.get(name, name)
            record["meta"] = {"task": first.task, "category": category} | first.meta
        self.lines.append(("questions" if self.practice else name, json.dumps(record)))

    def pair(self, item: dict, task: str, text: str, chosen: str, rejected: str, **more):
        """A preference for preferences.jsonl. more: for its line."""
        messages = [{"role": "user", "content": [item, text_item(text)]}]
        record = {"messages": messages, "chosen": chosen, "rejected": rejected, "task": task}
        self.lines.append(("preferences", json.dumps(record | more)))

    def lines_of(self, name: str, item: dict, questions: list, more=(), lines=2):
        """An exam asks each question in a line of its own, train some of these and of more."""
        if self.exam:
            for question in questions:
                self.line(name, [item], [question])
            return
        for _ in range(lines):
            some = self.rng.sample([*questions, *more], self.rng.randint(2, 3))
            self.line(name, [item], some)
