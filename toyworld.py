"""The embedded data set: pictures, clips and texts with known truth, drawn from a seed.

    python toyworld.py --out data/toy --size toy          # draw (or reuse) a world
    python toyworld.py --train-vocab vocab-toy.json       # train the 992-entry vocabulary of the toy sizes

A world is a folder: train/<name>.jsonl and heldout/<name>.jsonl with their pictures/ and clips/, and world.json. The
names cover the report's six categories (section 3.1) plus reasoning (several steps) and detail (unreadable until one
zooms in); train/pairs.jsonl holds picture-caption pairs for the contrastive stage. For post-training, questions.jsonl
(train) asks as the held-out files do, about train contents, and instruct.jsonl asks for a form of answer. A single
question's "meta" holds its answer, the verifier that judges it, and true "steps" towards it. Every number here is ours;
the formats of boxes, points, texts and times are Keye's (Table 1).
"""
import argparse, hashlib, itertools, json, math, multiprocessing, os, random, re, shutil, time
from collections import Counter
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

COLOURS = {"red": (215, 25, 30), "orange": (250, 135, 0), "yellow": (240, 220, 10), "green": (25, 150, 45),
           "cyan": (0, 200, 220), "blue": (30, 55, 220), "purple": (130, 30, 175), "pink": (255, 125, 190)}
SHAPES = ["circle", "square", "triangle", "star", "cross", "ring"]
PLURAL = {s: s + "s" for s in SHAPES} | {"cross": "crosses"}
PLACES = ["top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right"]
MOVES = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
ENDS = {"left": ("right", "left"), "right": ("left", "right"), "up": ("bottom", "top"), "down": ("top", "bottom")}
STEPS = {"right of": (1, 0), "left of": (-1, 0), "below": (0, 1), "above": (0, -1)}
CHARS = "0123456789ABCEFHKLMPRTXY"  # no pair of look-alikes such as O and 0
CATEGORY = {name: name for name in ("caption", "grounding", "interleaved", "video", "text", "reasoning", "detail")} | {
    "vqa": "ocr_vqa", "ocr": "ocr_vqa", "instruct": "instruction"}  # file name -> category of its questions
# train pictures, train clips, least and largest side of a picture in pixels
SIZES = {"toy": (16_000, 2_300, 84, 126), "tiny": (40_000, 5_000, 84, 168)} | {
    size: (40_000, 5_000, 84, 252) for size in ("small", "0.6b", "1.7b", "4b", "8b")}
# post-training: units of each kind (instruct: of each task) for the toy, the other sizes have 4 times as many
ASKED = {"caption": 60, "vqa": 250, "grounding": 80, "ocr": 100, "interleaved": 100, "motion": 200, "order": 120,
         "event": 120, "match": 60, "reorder": 80, "reasoning": 1500, "detail": 1800, "text": 300, "instruct": 258}


def is_heldout(key):
    """The split: a tenth of all contents, by hash of the canonical truth, never occurs in train."""
    return hashlib.blake2b(key.encode(), digest_size=4).digest()[0] % 10 == 0


# ---------------------------------------------------------------------------------------------------------- drawing

@dataclass
class Thing:
    colour: str
    shape: str
    place: int = 4  # index into PLACES
    cx: float = 0.0  # centre and radius in pixels
    cy: float = 0.0
    r: float = 0.0
    rgb: tuple = ()
    turn: float = 0.0  # radians

    @property
    def name(self):
        return f"{self.colour} {self.shape}"

    @property
    def where(self):
        return PLACES[self.place]

    @property
    def seen(self):
        return f"{self.name} at the {self.where}"

    def outline(self):
        """Vertices (x, y) in pixels; None for the round shapes."""
        if self.shape == "square":
            points = [(-.82, -.82), (.82, -.82), (.82, .82), (-.82, .82)]
        elif self.shape == "triangle":
            points = [(0, -.9), (.98, .8), (-.98, .8)]
        elif self.shape == "star":
            points = [(q * math.sin(math.pi * k / 5), -q * math.cos(math.pi * k / 5))
                      for k in range(10) for q in [.42 if k % 2 else 1.0]]
        elif self.shape == "cross":
            a, b = .95, .3
            points = [(-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b),
                      (b, a), (-b, a), (-b, b), (-a, b), (-a, -b), (-b, -b)]
        else:
            return None
        s, c = math.sin(self.turn), math.cos(self.turn)
        return [(self.cx + self.r * (x * c - y * s), self.cy + self.r * (x * s + y * c)) for x, y in points]

    def box(self):
        """(x1, y1, x2, y2) in pixels around what is drawn."""
        q = .95 * self.r
        xs, ys = zip(*(self.outline() or [(self.cx - q, self.cy - q), (self.cx + q, self.cy + q)]))
        return min(xs), min(ys), max(xs), max(ys)


@lru_cache(64)
def font(size):
    return ImageFont.load_default(size)


def fill_of(rng, colour):
    return tuple(min(255, max(0, c + rng.randint(-10, 10))) for c in COLOURS[colour])


class Paper:
    """A background of one tint, a slight gradient and mild noise; things and texts are drawn on it, 2x oversampled."""
    def __init__(self, rng, width, height):
        base = rng.randint(15, 45) if rng.random() < .4 else rng.randint(222, 248)
        self.tint = tuple(base + rng.randint(-8, 7) for _ in range(3))
        self.width, self.height = width, height
        noise = np.random.default_rng(rng.getrandbits(32)).integers(-3, 4, (height, width, 1))
        gx, gy = rng.uniform(-10, 10), rng.uniform(-10, 10)
        ramp = gx * np.linspace(-1, 1, width)[None, :, None] + gy * np.linspace(-1, 1, height)[:, None, None]
        self.veil = (noise + ramp).astype(np.int16)  # (H, W, 1)

    def draw(self, things, texts=()):
        """things: list of Thing; texts: (string, cx, cy, height in px, rgb). Returns (H, W, 3) uint8."""
        image = Image.new("RGB", (2 * self.width, 2 * self.height), self.tint)
        pen = ImageDraw.Draw(image)
        for t in things:
            points = t.outline()
            if points:
                pen.polygon([(2 * x, 2 * y) for x, y in points], fill=t.rgb)
            else:
                pen.ellipse([2 * v for v in t.box()], fill=t.rgb)
            if t.shape == "ring":
                q = t.r * .5
                pen.ellipse([2 * (t.cx - q), 2 * (t.cy - q), 2 * (t.cx + q), 2 * (t.cy + q)], fill=self.tint)
        for string, cx, cy, size, rgb in texts:
            size = int(2 * size)
            pen.text((2 * cx, 2 * cy), string, rgb, font(size), "mm", stroke_width=max(1, size // 28), stroke_fill=rgb)
        array = np.asarray(image.reduce(2), np.int16) + self.veil
        return np.clip(array, 0, 255).astype(np.uint8)


def write_clip(path, frames, rate):
    """frames: iterable of (H, W, 3) uint8 arrays, H and W even; rate: frames per second as a Fraction."""
    options = {"preset": "ultrafast", "crf": "18", "threads": "1", "g": "12"}
    with av.open(str(path), "w") as container:
        stream = None
        for frame in frames:
            if stream is None:
                height, width = frame.shape[:2]
                stream = container.add_stream("libx264", rate, width=width, height=height, pix_fmt="yuv420p",
                                              options=options)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


# ------------------------------------------------------------------------------------------------------------- scenes

@dataclass
class Scene:
    width: int
    height: int
    things: list
    theme: tuple = None  # (attribute, value, count): one counted attribute, its count uniform

    def caption(self):
        return sentence(self.things)

    def unique(self, **want):
        return sum(all(getattr(t, k) == v for k, v in want.items()) for t in self.things) == 1

    def box(self, t, around=0.0):
        """Box of a thing, or of a square of half side `around` px at its centre, as integers in [0, 1000)."""
        x1, y1, x2, y2 = (t.cx - around, t.cy - around, t.cx + around, t.cy + around) if around else t.box()
        scale = lambda v, side: min(999, max(0, int(1000 * v / side)))
        return [scale(x1, self.width), scale(y1, self.height), scale(x2, self.width), scale(y2, self.height)]

    def point(self, t):
        x1, y1, x2, y2 = self.box(t)
        return [(x1 + x2) // 2, (y1 + y2) // 2]


def article(name):
    return ("an " if name[0] in "aeiou" else "a ") + name


def sentence(things):
    return says(", ".join(article(t.seen) for t in things))


def scene_key(things):
    return "scene:" + "|".join(sorted(f"{t.name} {t.where}" for t in things))


def text_key(string):
    return "text:" + string


def motion_key(thing, move):
    return f"motion:{thing.name} {move}"


class Unit:
    """One drawing job: the files it writes and the lines (file name, JSON text) it yields. Its randomness depends on
    nothing but (seed, split, kind, index), so any number of workers writes the same bytes."""
    def __init__(self, folder, split, kind, index, seed, sides, dry=False):
        self.folder, self.split, self.kind, self.index = Path(folder) / split, split, kind, index
        self.sides, self.dry = sides, dry  # dry: nothing is drawn or written, for the texts alone
        self.rng = random.Random(f"{seed}/{split}/{kind}/{index}")
        self.heldout, self.ask = split == "heldout", kind.startswith("ask.")  # ask: train contents, for questions.jsonl
        self.exam = self.heldout or self.ask  # one question a line
        self.lines, self.pictures, self.clips = [], 0, 0

    def until_split(self, draw, key):
        """Draws until the canonical content belongs to this unit's split."""
        for _ in range(100_000):
            value = draw()
            if is_heldout(key(value)) == self.heldout:
                return value
        raise RuntimeError(f"{self.split}/{self.kind} {self.index}: no content of this split in 100000 draws")

    def want(self, classes):
        """Single questions' answers walk through their classes in turn: the blind prior is chance."""
        return classes[self.index % len(classes)] if self.exam else None

    def scene(self, n, shapes=None, sides=None, grid=3):
        """n things at distinct places of a grid x grid raster (grid 2: the corners), content of this unit's split."""
        rng = self.rng
        places = range(9) if grid == 3 else (0, 2, 6, 8)
        def draw():
            chosen = sorted(rng.sample(places, n))
            things = [Thing(rng.choice(list(COLOURS)), rng.choice(shapes or SHAPES), p) for p in chosen]
            theme = None
            if n >= 3 and not shapes:
                attribute = rng.choice(["colour", "shape"])
                values = list(COLOURS) if attribute == "colour" else SHAPES
                value, k = rng.choice(values), rng.randint(1, 3)
                chosen = set(rng.sample(range(n), k))
                for i, t in enumerate(things):
                    setattr(t, attribute, value if i in chosen else rng.choice([v for v in values if v != value]))
                theme = (attribute, value, k)
            return things, theme
        things, theme = self.until_split(draw, lambda value: scene_key(value[0]))
        lo, hi = sides or self.sides
        scene = Scene(rng.randint(lo, hi), rng.randint(lo, hi), things, theme)
        cw, ch = scene.width / grid, scene.height / grid
        for t in things:
            row, col = (t.place // 3, t.place % 3) if grid == 3 else (t.place // 6, t.place % 3 // 2)
            t.r = rng.uniform(.42, .48) * min(cw, ch)
            t.cx = (col + .5) * cw + rng.uniform(-.8, .8) * (cw / 2 - t.r)
            t.cy = (row + .5) * ch + rng.uniform(-.8, .8) * (ch / 2 - t.r)
            t.rgb, t.turn = fill_of(rng, t.colour), rng.uniform(-.12, .12)
        return scene

    def picture(self, width, height, draw, quality=None):
        """Writes draw() (H, W, 3) as JPEG or PNG; returns its content item."""
        png = quality is None and self.rng.random() < .25
        name = f"pictures/{self.kind}-{self.index:06d}-{self.pictures}.{'png' if png else 'jpg'}"
        self.pictures += 1
        if not self.dry:
            image = Image.fromarray(draw())
            width, height = image.size
            if png:
                image.save(self.folder / name, compress_level=1)
            else:
                image.save(self.folder / name, quality=quality or self.rng.randint(85, 95), subsampling=0)
        return {"type": "image", "image": name, "width": width, "height": height}

    def scene_picture(self, scene):
        paper = Paper(self.rng, scene.width, scene.height)
        return self.picture(scene.width, scene.height, lambda: paper.draw(scene.things))

    def clip(self, width, height, fps, duration, cast, visible):
        """Writes a clip of the things of `cast`; visible(t in seconds) -> tuple of (index into cast, cx, cy)."""
        rate = Fraction(30000, 1001) if fps == 29.97 else Fraction(fps)
        n = round(duration * rate)
        name = f"clips/{self.kind}-{self.index:06d}-{self.clips}.mp4"
        self.clips += 1
        paper = Paper(self.rng, width, height)
        if not self.dry:
            @lru_cache(4)
            def frame(shown):
                return paper.draw([replace(cast[i], cx=x, cy=y) for i, x, y in shown])
            write_clip(self.folder / name, (frame(visible(k / float(rate))) for k in range(n)), rate)
        return {"type": "video", "video": name, "width": width, "height": height,
                "duration": round(float(n / rate), 4), "fps_source": fps}

    def line(self, name, media, turns, meta=None):
        """media: content items (and texts) before the first question; turns: questions of qa()."""
        first = media + ([{"type": "text", "text": turns[0]["q"]}] if turns[0]["q"] else [])
        messages = []
        for turn in turns:
            messages += [{"role": "user", "content": turn["q"]}, {"role": "assistant", "content": turn["a"]}]
        if media:
            messages[0]["content"] = first
        record = {"messages": messages}
        if len(turns) == 1 and turns[0]["q"]:
            record["meta"] = {"task": turns[0]["task"], "category": CATEGORY[name]} | turns[0]["meta"]
        self.lines.append(("questions" if self.ask else name, json.dumps(record)))


def qa(task, question, reply, answer=None, verifier="choice", choices=None, chance=0.0, **more):
    """One question with its reply and how the reply is judged. steps (in more): a chain of thought that leads there."""
    meta = {"answer": reply if answer is None else answer, "verifier": verifier, "chance": chance}
    if choices:
        meta |= {"chance": round(1 / len(choices), 4), "choices": list(choices)}
    return {"task": task, "q": question, "a": reply, "meta": meta | more}


def digits(lo, hi):
    return [str(v) for v in range(lo, hi + 1)]


# --------------------------------------------------------------------------------------------- pictures of things

def tally(things, attribute, values):
    """Steps of counting: what each thing is, with a running number behind the values that are counted."""
    found, steps = Counter(), []
    for t in things:
        value = getattr(t, attribute)
        found[value] += 1
        steps.append(f"{t.where}: {value}" + (f" {found[value]}" if value in values else ""))
    return steps


def caption_question(scene):
    return qa("caption", "Describe the picture.", scene.caption(), verifier="text",
              steps=[f"objects: {len(scene.things)}"])


def scene_questions(rng, scene):
    """One question of every task the scene can answer, as {task: question}."""
    out, things = {}, scene.things
    seen = [t.seen for t in things]
    look = lambda found: seen + [found] * (seen != [found])  # look at all, then say what was found
    t = rng.choice(things)
    what = t.shape if scene.unique(shape=t.shape) and rng.random() < .5 else f"object at the {t.where}"
    out["colour"] = qa("colour", f"What colour is the {what}?", t.colour, choices=COLOURS, steps=look(t.seen))
    t = rng.choice(things)
    what = f"{t.colour} object" if scene.unique(colour=t.colour) and rng.random() < .5 else f"object at the {t.where}"
    out["shape"] = qa("shape", f"What shape is the {what}?", t.shape, choices=SHAPES, steps=look(t.seen))
    out["count"] = qa("count", "How many objects are there?", str(len(things)), verifier="number", choices=digits(1, 5),
                      steps=[f"{t.where}: {k}" for k, t in enumerate(things, 1)])
    if scene.theme:  # only scenes of three or more have one, so that 1, 2 and 3 are equally likely
        attribute, value, k = scene.theme
        what = f"{value} objects" if attribute == "colour" else PLURAL[value]
        out["count_of"] = qa("count_of", f"How many {what} are there?", str(k), verifier="number", choices=digits(1, 3),
                             steps=tally(things, attribute, [value]))
    single = [t for t in things if scene.unique(colour=t.colour, shape=t.shape)]
    if single:
        t = rng.choice(single)
        out["position"] = qa("position", f"Where is the {t.name}?", t.where, choices=PLACES, steps=look(t.seen))
    names, t = {t.name for t in things}, rng.choice(things)
    reply, name = rng.choice(["yes", "no"]), t.name
    while reply == "no" and name in names:  # half of the absent things share colour or shape with a present one
        colour = t.colour if rng.random() < .3 else rng.choice(list(COLOURS))
        name = f"{colour} {t.shape if rng.random() < .3 else rng.choice(SHAPES)}"
    out["exist"] = qa("exist", f"Is there {article(name)}?", reply, verifier="yesno", choices=["yes", "no"],
                      steps=look(t.seen if reply == "yes" else f"no {name}"))
    return out


VQA_CLASSES = {"colour": list(COLOURS), "shape": SHAPES, "count": digits(1, 5), "count_of": digits(1, 3),
               "position": PLACES, "exist": ["yes", "no"]}


def grounding_questions(rng, scene):
    out, single = {}, [t for t in scene.things if scene.unique(colour=t.colour, shape=t.shape)]
    if single:
        t = rng.choice(single)
        ref, box = f"<|object_ref_start|>{t.name}<|object_ref_end|>", json.dumps([scene.box(t)])
        out["box"] = qa("box", f"Give the box of the {t.name}.", f"{ref}<|box_start|>{box}<|box_end|>", box, "box",
                        steps=[t.seen])
        t = rng.choice(single)
        ref, point = f"<|object_ref_start|>{t.name}<|object_ref_end|>", json.dumps([scene.point(t)])
        reply = f"{ref}<|point_start|>{point}<|point_end|>"
        out["point"] = qa("point", f"Point to the {t.name}.", reply, point, "point", box=scene.box(t), steps=[t.seen])
    if scene.theme:
        attribute, value, k = scene.theme
        what = f"{value} objects" if attribute == "colour" else PLURAL[value]
        hits = [t for t in scene.things if getattr(t, attribute) == value]
        points = json.dumps([scene.point(t) for t in hits])
        reply = f"<|object_ref_start|>{what}<|object_ref_end|><|point_start|>{points}<|point_end|> {k}"
        out["count_point"] = qa("count_point", f"Point to all {what} and count them.", reply, str(k), "number",
                                digits(1, 3), points=points, boxes=[scene.box(t) for t in hits],
                                steps=tally(scene.things, attribute, [value]))
    return out


def scene_unit(u):
    """One train picture: two question lines in different order, and parts of caption, pair and grounding."""
    rng, scene = u.rng, u.scene(u.index % 5 + 1)
    item, caption = u.scene_picture(scene), caption_question(scene)
    for _ in range(2):
        pool = list({q["q"]: q for _ in range(2) for q in scene_questions(rng, scene).values()}.values())
        turns = rng.sample(pool, min(len(pool), 4))
        if rng.random() < .8:  # at any place: every question also stands without a caption before it
            turns.insert(rng.randint(0, len(turns)), caption)
        u.line("vqa", [item], turns)
    u.line("pairs", [item], [caption | {"q": ""}])
    if rng.random() < .5:
        u.line("caption", [item], [caption])
    ground = list(grounding_questions(rng, scene).values())
    if ground and rng.random() < .55:
        turns = rng.sample(ground, len(ground))
        if rng.random() < .3:
            turns.insert(rng.randint(0, len(turns)), caption)
        u.line("grounding", [item], turns)


def scene_asked(u, task, make, want, counts):
    """A scene and its question of the task with the answer `want` (None: any)."""
    for _ in range(10_000):
        scene = u.scene(int(want) if task == "count" else u.rng.choice(counts))
        q = make(u.rng, scene).get(task)
        if q and want in (None, q["meta"]["answer"]):
            return scene, q
    raise RuntimeError(f"{task} {u.index}: no scene answers {want!r} in 10000 draws")


def one_question_unit(u, task, name, make, classes, counts):
    """A picture with one question of the task, whose answer is the class whose turn it is."""
    scene, q = scene_asked(u, task, make, u.want(classes) if classes else None, counts)
    u.line(name, [u.scene_picture(scene)], [q])


# ------------------------------------------------------------------------------------------------------- drawn texts

def text_picture(u, string, colour):
    rng = u.rng
    width, height = rng.randint(*u.sides), rng.randint(*u.sides)
    paper, rgb = Paper(rng, width, height), fill_of(rng, colour)
    x1, y1, x2, y2 = font(64).getbbox(string, anchor="mm", stroke_width=3)
    size = rng.uniform(.75, .9) * 64 * min(width / (x2 - x1), height / (y2 - y1), 1.2 * min(width, height) / 64)
    cx = width / 2 + rng.uniform(-.04, .04) * width
    # the anchor "mm" centres ascender and descender, capitals sit higher: shift by what the bounding box shows
    texts = [(string, cx, height / 2 - (y1 + y2) / 2 * size / 64, size, rgb)]
    return u.picture(width, height, lambda: paper.draw([], texts))


def ocr_unit(u):
    rng = u.rng
    draw = lambda: "".join(rng.choice(CHARS) for _ in range(u.index % 4 + 1))
    string = u.until_split(draw, text_key)
    colour = u.want(list(COLOURS)) or rng.choice(list(COLOURS))
    read = qa("read", "Read the text.", f"<|ocr_text_start|>{string}<|ocr_text_end|>", string, "text",
              steps=[f"characters: {len(string)}"])
    tint = qa("text_colour", "What colour is the text?", colour, choices=COLOURS, steps=[f"text: {colour}"])
    n = str(len(string))
    length = qa("text_length", "How many characters are there?", n, verifier="number", choices=digits(1, 4),
                steps=[f"text: {string}"])
    item = text_picture(u, string, colour)
    if u.exam:
        for q in (read, tint, length):
            u.line("ocr", [item], [q])
    else:
        u.line("ocr", [item], rng.sample([read, tint, length], rng.randint(2, 3)))


# ------------------------------------------------------------------------------------------------------- interleaved

def numbered(items, word="Picture"):
    """Items with "Picture 1: " and so on in front."""
    return [part for k, item in enumerate(items, 1) for part in ({"type": "text", "text": f"{word} {k}: "}, item)]


def interleaved_unit(u):
    rng = u.rng
    n = u.index // 6 % 2 + 2
    k = u.index % n  # the picture asked for: each number equally often
    while True:
        scenes = [u.scene(rng.randint(1, 2), sides=(56, 56), grid=2) for _ in range(n)]
        others = {t.name for s in scenes[:k] + scenes[k + 1:] for t in s.things}
        names = [t.name for t in scenes[k].things if t.name not in others]
        if names:
            break
    items = [u.scene_picture(s) for s in scenes]
    which = qa("which_picture", f" Which picture shows {article(rng.choice(names))}?", str(k + 1), choices=digits(1, n),
               steps=[f"picture {i}: {', '.join(t.name for t in s.things)}" for i, s in enumerate(scenes, 1)])
    story = qa("story", " Describe it like the others.", scenes[-1].caption(), verifier="text",
               steps=[f"objects: {len(scenes[-1].things)}"])
    told = []
    for k, (item, s) in enumerate(zip(items, scenes), 1):
        told += [{"type": "text", "text": f"Picture {k}: "}, item, {"type": "text", "text": f" {s.caption()}\n"}]
    told.pop()
    if u.exam:
        u.line("interleaved", numbered(items), [which])
        u.line("interleaved", told, [story])
        return
    tell = [qa("describe_number", f"Describe picture {i + 1}.", scenes[i].caption(), verifier="text") for i in range(n)]
    turns = [which] + rng.sample(tell, rng.randint(1, n))
    rng.shuffle(turns)
    turns = [t | {"q": (" " if i == 0 else "") + t["q"].strip()} for i, t in enumerate(turns)]
    u.line("interleaved", numbered(items), turns)
    u.line("interleaved", told, [story])
    u.line("interleaved", numbered(items), [which])


# ------------------------------------------------------------------------------------------------------------- clips

def new_thing(rng, side, lo=.2, hi=.25):
    colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
    return Thing(colour, shape, r=rng.uniform(lo, hi) * side, rgb=fill_of(rng, colour), turn=rng.uniform(-.12, .12))


def says(text):
    return text[0].upper() + text[1:] + "."


def clip_shape(u, cheap=False):
    """width, height (even, 56..84), frames per second of the file, duration in seconds"""
    rng = u.rng
    fps = rng.choice([8, 12] if cheap else [8, 8, 8, 12, 12, 12, 24, 29.97])
    duration = rng.choice([2.0, 2.5] if cheap else [2.0, 2.5, 3.0, 3.5, 4.0])
    return 2 * rng.randint(28, 42), 2 * rng.randint(28, 42), fps, duration


def moving(u, move, width, height):
    """A thing of this split for that motion, and its path: fraction of the way (0..1) -> (cx, cy)."""
    rng = u.rng
    thing = u.until_split(lambda: new_thing(rng, min(width, height)), lambda t: motion_key(t, move))
    dx, dy = MOVES[move]
    lane, edge = rng.uniform(.38, .62), thing.r + 1
    def at(f):
        if dx:
            return (edge + (f if dx > 0 else 1 - f) * (width - 2 * edge), lane * height)
        return (lane * width, edge + (f if dy > 0 else 1 - f) * (height - 2 * edge))
    return thing, at


def motion_clip(u, move, cheap=False):
    width, height, fps, duration = clip_shape(u, cheap)
    thing, at = moving(u, move, width, height)
    return thing, u.clip(width, height, fps, duration, [thing], lambda t: ((0, *at(min(1, t / (duration - 1 / fps)))),))


def motion_unit(u):
    move = list(MOVES)[u.index % 4]
    thing, item = motion_clip(u, move)
    steps = [f"first at the {ENDS[move][0]}", f"last at the {ENDS[move][1]}"]
    way = qa("motion", f"Which way does the {thing.name} move?", move, choices=MOVES, steps=steps)
    told = qa("video_caption", "Describe the clip.", says(f"{article(thing.name)} moves {move}"), verifier="text",
              steps=steps)
    if u.exam:
        u.line("video", [item], [way])
        u.line("video", [item], [told])
        return
    for _ in range(2):
        what = qa("moving_object", "What moves?", thing.name, verifier="text")
        u.line("video", [item], u.rng.sample([way, told, what], u.rng.randint(2, 3)))


def order_unit(u):
    rng = u.rng
    width, height, fps, duration = clip_shape(u)
    def draw():
        pair = [new_thing(rng, min(width, height)) for _ in range(2)]
        return pair if pair[0].name != pair[1].name else draw()
    first, second = u.until_split(draw, lambda p: f"order:{p[0].name} {p[1].name}")
    sides = [.27, .73]
    rng.shuffle(sides)
    across = rng.random() < .5  # side by side or one above the other
    middle = rng.uniform(.4, .6)
    spots = [(s * width, middle * height) if across else (middle * width, s * height) for s in sides]
    steps = int(2 * duration)
    start, after = sorted(rng.sample(range(0, steps), 2))
    shown = lambda t: tuple((i, *spots[i]) for i, half in enumerate((start, after)) if t >= half / 2 - .05)
    item = u.clip(width, height, fps, duration, [first, second], shown)
    names = [first.name, second.name]
    if u.index % 2:
        names.reverse()
    asks = [qa("order", f"Which appears first, the {names[0]} or the {names[1]}?", first.name, choices=names,
               steps=[f"first: {first.name}", f"last: {second.name}"])]
    if u.exam:
        return u.line("video", [item], asks)
    asks.append(qa("order_last", f"Which appears last, the {names[1]} or the {names[0]}?", second.name, choices=names))
    told = says(f"{article(first.name)} appears, then {article(second.name)}")
    asks.append(qa("video_caption", "Describe the clip.", told, verifier="text"))
    for _ in range(2):
        u.line("video", [item], rng.sample(asks, rng.randint(2, 3)))


def event_unit(u):
    rng = u.rng
    width, height, fps, duration = clip_shape(u)
    steps = int(2 * duration)
    def draw():
        a, b = sorted(rng.sample(range(steps + 1), 2))
        return new_thing(rng, min(width, height), .24, .32), a, b
    while True:
        thing, a, b = u.until_split(draw, lambda v: f"event:{v[0].name} {v[1] / 2} {v[2] / 2}")
        if b - a < steps:  # visible all the time is no event
            break
    spot = rng.uniform(.4, .6) * width, rng.uniform(.4, .6) * height
    # 0.05 s early: a frame taken at a multiple of 0.5 s shows the truth in 29.97 fps files too (frame 14: 0.467 s)
    shown = lambda t: ((0, *spot),) if a / 2 - .05 <= t < b / 2 - .05 else ()
    item = u.clip(width, height, fps, duration, [thing], shown)
    span = f"[{a / 2}, {b / 2}]"
    when = qa("event_time", f"When is the {thing.shape} visible?",
              f"<|clip_time_start|>{span}<|clip_time_end|> {article(thing.shape)} is visible", span, "interval",
              steps=[f"from {a / 2}", f"to {b / 2}"])
    if u.exam:
        return u.line("video", [item], [when])
    told = says(f"{article(thing.name)} is visible from {a / 2} to {b / 2} seconds")
    told = qa("video_caption", "Describe the clip.", told, verifier="text")
    start = qa("event_start", f"When does the {thing.shape} appear?", f"{a / 2}", verifier="number")
    for _ in range(2):
        u.line("video", [item], rng.sample([when, told, start], rng.randint(2, 3)))


def reorder_unit(u):
    """Three or four shuffled frames of one motion; the direction is told, else the reverse would be right too."""
    rng = u.rng
    width, height = 2 * rng.randint(28, 42), 2 * rng.randint(28, 42)
    move, n = list(MOVES)[u.index % 4], u.index // 4 % 2 + 3
    thing, at = moving(u, move, width, height)
    paper, perms = Paper(rng, width, height), list(itertools.permutations(range(n)))
    order = perms[u.index // 8 % len(perms)]  # order[k]: time rank of picture k
    frames = [replace(thing, cx=x, cy=y) for x, y in (at(rank / (n - 1)) for rank in order)]
    items = [u.picture(width, height, lambda f=f: paper.draw([f])) for f in frames]
    answer = " ".join(str(order.index(rank) + 1) for rank in range(n))
    ask = qa("reorder", f" {says(f'{article(thing.name)} moves {move}')} Give the time order of the pictures.",
             answer, verifier="order", chance=round(1 / math.factorial(n), 4),
             steps=[f"picture {i}: {rank + 1}" for i, rank in enumerate(order, 1)])
    u.line("video", numbered(items), [ask])


def match_unit(u):
    rng = u.rng
    move = list(MOVES)[u.index // 2 % 4]
    ways = [move, rng.choice([m for m in MOVES if m != move])]
    if u.index % 2:
        ways.reverse()
    things, items = zip(*(motion_clip(u, m, cheap=True) for m in [move] + ways))
    media = [{"type": "text", "text": "Reference: "}, items[0]]
    media += [dict(p, text=" " + p["text"]) if p["type"] == "text" else p for p in numbered(items[1:], "Clip")]
    ask = qa("match", " Which clip moves like the reference?", str(ways.index(move) + 1), choices=["1", "2"],
             steps=[f"reference: {move}", f"clip 1: {ways[0]}", f"clip 2: {ways[1]}"])
    told = says(f"{article(things[1].name)} moves {ways[0]}")
    told = qa("video_caption", "Describe clip 1.", told, verifier="text")
    u.line("video", media, [ask] if u.exam else rng.choice([[ask], [ask, told]]))


# ------------------------------------------------------------------------------------------------------------- texts

def text_question(rng, task, want):
    """One text-only question; the canonical content is the whole question."""
    if task == "arithmetic":
        a, b = rng.randint(0, 30), rng.randint(0, 30)
        sign = "+" if rng.random() < .5 else "-"
        a, b = (a, b) if sign == "+" else (max(a, b), min(a, b))
        now, steps = a, []
        for part in [v for v in (b // 10 * 10, b % 10) if v] or [0]:  # tens, then ones
            then = now + part if sign == "+" else now - part
            steps.append(f"{now} {sign} {part} = {then}")
            now = then
        return qa(task, f"What is {a} {sign} {b}?", str(now), verifier="number", steps=steps, sign=sign, second=b)
    if task == "sort":
        values = rng.sample(range(10), rng.randint(3, 4))
        return qa(task, f"Sort {' '.join(map(str, values))}.", " ".join(map(str, sorted(values))), verifier="order",
                  steps=[f"{'then' if i else 'smallest'}: {v}" for i, v in enumerate(sorted(values))])
    if task == "copy":
        words = " ".join(rng.choice(list(COLOURS) + SHAPES + digits(0, 9)) for _ in range(rng.randint(3, 5)))
        return qa(task, f"Copy: {words}", words, verifier="text", steps=[f"words: {len(words.split())}"])
    if task == "count_words":
        k, (word, *others) = int(want or rng.randint(1, 4)), rng.sample(SHAPES, 3)
        words = [word] * k + [rng.choice(others) for _ in range(rng.randint(0, 3))]
        rng.shuffle(words)
        steps = [w + (f" {words[:i].count(word)}" if w == word else "") for i, w in enumerate(words, 1)]
        return qa(task, f"{' '.join(words)}. How often is {word}?", str(k), verifier="number", choices=digits(1, 4),
                  steps=steps)
    places = sorted(rng.sample(range(9), rng.randint(2, 3)))
    things = [Thing(c, s, p) for c, s, p in zip(rng.sample(list(COLOURS), 3), rng.sample(SHAPES, 3), places)]
    t = rng.choice(things)
    if task == "text_position":
        t.place = PLACES.index(want) if want else t.place
    else:
        t.colour = want or t.colour
    if len({x.place for x in things}) < len(things) or len({x.colour for x in things}) < len(things):
        return text_question(rng, task, want)
    look = [x.seen for x in things] + [t.seen]
    if task == "text_position":
        return qa(task, f"{sentence(things)} Where is the {t.name}?", t.where, choices=PLACES, steps=look)
    return qa("text_colour_of", f"{sentence(things)} What colour is the {t.shape}?", t.colour, choices=COLOURS,
              steps=look)


TEXT_TASKS = {"arithmetic": None, "sort": None, "copy": None, "count_words": digits(1, 4), "text_position": PLACES,
              "text_colour_of": list(COLOURS)}


def text_unit(u):
    """Single questions: index i asks question i // tasks of task i % tasks. Train: two to four questions in a line."""
    rng, tasks = u.rng, list(TEXT_TASKS)
    draw = lambda task, want: u.until_split(lambda: text_question(rng, task, want), lambda q: text_key(q["q"]))
    if u.exam:
        task, k = tasks[u.index % len(tasks)], u.index // len(tasks)
        classes = TEXT_TASKS[task]
        return u.line("text", [], [draw(task, classes and classes[k % len(classes)])])
    u.line("text", [], [draw(rng.choice(tasks), None) for _ in range(rng.randint(2, 4))])


# --------------------------------------------------------------------------------------------- several steps, details

def reasoning_question(rng, scene, task):
    """A question that needs several steps over one scene, with the steps; None where the scene has none."""
    count = Counter(t.shape for t in scene.things)
    if task == "relation":
        by_place = {t.place: t for t in scene.things}
        start = rng.choice(scene.things)
        if not scene.unique(colour=start.colour, shape=start.shape):
            return None
        phrase, at, seen = f"the {start.name}", start, {start.place}
        steps, hops = [f"{start.name}: {start.where}"], rng.randint(1, 3)
        for _ in range(hops):
            row, col = divmod(at.place, 3)
            near = {word: by_place.get(3 * (row + dy) + col + dx) for word, (dx, dy) in STEPS.items()
                    if 0 <= row + dy < 3 and 0 <= col + dx < 3}
            near = [(word, t) for word, t in near.items() if t and t.place not in seen]
            if not near:
                return None
            word, at = rng.choice(near)
            seen.add(at.place)
            steps.append(f"{word} it: {at.name} at the {at.where}")
            phrase = f"the object {word} {phrase}"
        return qa(task, f"What shape is {phrase}?", at.shape, choices=SHAPES, steps=steps, difficulty=hops + (hops > 1))
    a, b = rng.sample(SHAPES, 2)
    if not (count[a] and count[b]):
        return None
    steps, counts = tally(scene.things, "shape", [a, b]), {PLURAL[a]: count[a], PLURAL[b]: count[b]}
    if task == "sum_count":
        total = count[a] + count[b]
        steps.append(f"{count[a]} + {count[b]} = {total}")
        return qa(task, f"How many {PLURAL[a]} and {PLURAL[b]} are there together?", str(total), verifier="number",
                  choices=digits(2, 6), steps=steps, counts=counts, difficulty=2) if total <= 6 else None
    sign = "<=>"[(count[a] > count[b]) - (count[a] < count[b]) + 1]
    reply = "yes" if sign == ">" else "no"
    return qa(task, f"Are there more {PLURAL[a]} than {PLURAL[b]}?", reply, verifier="yesno", choices=["yes", "no"],
              steps=steps + [f"{count[a]} {sign} {count[b]}"], counts=counts, difficulty=2)


REASONING = {"sum_count": digits(2, 6), "compare_count": ["yes", "no"], "relation": SHAPES, "drawn_arithmetic": None}


def reasoning_unit(u):
    rng, tasks = u.rng, list(REASONING)
    task, k = tasks[u.index % len(tasks)], u.index // len(tasks)
    if task == "drawn_arithmetic":
        def draw():
            string = str(rng.randint(0, 9))
            for _ in range(1 + rng.randint(0, 1)):
                sign = rng.choice("+-")
                string += sign + str(rng.randint(0, 9))
            values = [int(v) for v in re.findall(r"[+-]?\d", string)]
            sums = list(itertools.accumulate(values))
            return (string, values, sums) if min(sums) >= 0 else draw()
        string, values, sums = u.until_split(draw, lambda v: text_key(v[0]))
        steps = [f"text: {string}"] + [f"{s} {'-' if '-' in string[i * 2 + 1] else '+'} {abs(v)} = {t}"
                                       for i, (s, v, t) in enumerate(zip(sums, values[1:], sums[1:]))]
        q = qa(task, "What is the result?", str(sums[-1]), verifier="number", chance=.1, steps=steps,
               difficulty=len(values))
        return u.line("reasoning", [text_picture(u, string, rng.choice(list(COLOURS)))], [q])
    classes = REASONING[task]
    want = classes[k % len(classes)]  # train walks through the answers too: sums of 2 would be most of it otherwise
    for _ in range(20_000):
        shapes = None if task == "relation" else rng.sample(SHAPES, 3)
        scene = u.scene(rng.randint(4, 7), shapes=shapes)
        q = reasoning_question(rng, scene, task)
        if q and q["meta"]["answer"] == want:
            return u.line("reasoning", [u.scene_picture(scene)], [q])
    raise RuntimeError(f"{task} {u.index}: no scene answers {want!r} in 20000 draws")


DETAIL = ["detail", "detail_rotated", "detail_low_contrast"]


def look_box(place):
    """[x1, y1, x2, y2] in thousandths: the middle of a place's cell. A detail picture's dots always lie inside one."""
    half = 88  # of the cell's 333
    y, x = divmod(PLACES.index(place), 3)
    x, y = 1000 * (2 * x + 1) // 6, 1000 * (2 * y + 1) // 6
    return [x - half, y - half, x + half, y + half]


def detail_unit(u):
    """A large picture of things so small that, as the toy sees it, they fill less than half a patch: their shape is asked.
    meta: crop in [0, 1000) and place in the stored picture, and the turn (degrees clockwise) and contrast that make the
    shape readable."""
    rng = u.rng
    task, k = DETAIL[u.index % 3], u.index // 3
    answer, single = SHAPES[k % len(SHAPES)], []
    while not single:
        scene = u.scene(rng.randint(2, 4), sides=(280, 336))
        single = [t for t in scene.things if scene.unique(colour=t.colour) and t.shape == answer]
    target, width, height = rng.choice(single), scene.width, scene.height
    paper = Paper(rng, width, height)
    for t in scene.things:
        row, col = divmod(t.place, 3)
        t.r, t.turn = 7.5, rng.uniform(-.12, .12)
        t.cx, t.cy = (col + .5 + rng.uniform(-.1, .1)) * width / 3, (row + .5 + rng.uniform(-.1, .1)) * height / 3
        if task == "detail_low_contrast":
            t.rgb = tuple(round(p + .2 * (c - p)) for c, p in zip(t.rgb, paper.tint))
    turn = rng.choice([90, 180, 270]) if task == "detail_rotated" else 0
    x, y = {0: (target.cx, target.cy), 90: (height - target.cy, target.cx), 180: (width - target.cx, height - target.cy),
            270: (target.cy, width - target.cx)}[turn]
    if turn % 180:
        width, height = height, width
    array = lambda: np.ascontiguousarray(np.rot90(paper.draw(scene.things), -turn // 90))  # clockwise
    item = u.picture(width, height, array, quality=95)
    crop = Scene(width, height, []).box(replace(target, cx=x, cy=y), around=22)
    place = PLACES[3 * int(3 * y / height) + int(3 * x / width)]  # as seen, in the turned picture
    hint = f"The picture is turned right by {turn} degrees. " if turn else ""
    what = f"{target.colour} dot" if rng.random() < .5 else f"dot at the {place}"
    q = qa(task, f"{hint}What shape is the {what}?", answer, choices=SHAPES, crop=crop,
           rotate=(360 - turn) % 360, contrast=4.0 if task == "detail_low_contrast" else 1.0,
           difficulty=2 + (task != "detail"), place=place, steps=[f"{target.colour} dot at the {place}"])
    u.line("detail", [item], [q])


# -------------------------------------------------------------------------------------------------------- instructions

INSTRUCT = ["in_sentence", "in_capitals", "as_json", "colour_and_shape", "option", "twice_asked", "say_motion"]


def in_sentence(task, q):
    """The reply to a scene question as a whole sentence."""
    if task == "count":
        return "There is 1 object." if q["a"] == "1" else f"There are {q['a']} objects."
    what = q["q"].split(" is ", 1)[1][:-1]  # "the circle" of "What colour is the circle?"
    return says(f"{what} is " + {"colour": q["a"], "shape": article(q["a"]), "position": f"at the {q['a']}"}[task])


def instruct_unit(u, task):
    """One question in a form that pre-training never used: what is known is to be said as it is asked for."""
    rng, k, any_count = u.rng, u.index, (1, 2, 3, 4, 5)
    form = {"verifier": "exact"}
    if task == "say_motion":
        move = list(MOVES)[k % 4]
        thing, item = motion_clip(u, move)
        steps = [f"first at the {ENDS[move][0]}", f"last at the {ENDS[move][1]}"]
        ask, reply = f"Which way does the {thing.name} move? Answer in a sentence.", f"The {thing.name} moves {move}."
        return u.line("instruct", [item], [qa(task, ask, reply, chance=.25, steps=steps, **form)])
    if task in ("as_json", "colour_and_shape", "twice_asked"):
        scene = u.scene(rng.choice(any_count))
        t = rng.choice(scene.things)
        ask, reply = {
            "as_json": (f"Give colour and shape of the object at the {t.where} as JSON.",
                        json.dumps({"colour": t.colour, "shape": t.shape})),
            "colour_and_shape": (f"Which colour and which shape has the object at the {t.where}?", t.name),
            "twice_asked": (f"What colour and what shape is the object at the {t.where}? Name the shape first.",
                            f"{t.shape}, {t.colour}")}[task]
        form |= {"steps": [t.seen], "chance": round(1 / len(COLOURS) / len(SHAPES), 4)}
    else:  # questions, then their answers, in turn
        bases = ["colour", "shape", "position", "count"][:{"in_sentence": 4, "in_capitals": 3, "option": 2}[task]]
        base, turn = bases[k % len(bases)], k // len(bases)
        classes = list(VQA_CLASSES[base])
        scene, q = scene_asked(u, base, scene_questions, classes[turn % len(classes)], any_count)
        ask, reply, form = q["q"], q["a"], form | {key: q["meta"][key] for key in ("chance", "steps")}
        if task == "in_sentence":
            ask, reply = f"{ask} Answer in a sentence.", in_sentence(base, q)
        elif task == "in_capitals":
            ask, reply = f"{ask} Answer in capitals.", reply.upper()
        else:
            options = rng.sample([c for c in classes if c != reply], 2)
            options.insert(turn % 3, reply)
            offer = " ".join(f"{letter}. {option}" for letter, option in zip("ABC", options))
            ask, reply = f"{ask} {offer} Answer with the letter.", "ABC"[turn % 3]
            form |= {"verifier": "choice", "choices": list("ABC")}
    u.line("instruct", [u.scene_picture(scene)], [qa(task, ask, reply, **form)])


# ------------------------------------------------------------------------------------------------------ the whole world

def plan(pictures, clips, heldout, size=None):
    """[(split, kind, units)]: shares of the train pictures and clips; `heldout` questions per held-out task. size: adds
    what post-training needs, in proportion to that size's pictures and clips; None: pre-training's kinds alone."""
    train = {"scene": .6 * pictures, "ocr": .12 * pictures, "interleaved": .06 * pictures, "reasoning": .08 * pictures, 
             "detail": .05 * pictures, "text": .2 * pictures, "motion": .4 * clips, "order": .22 * clips,
             "event": .23 * clips, "match": .05 * clips, "reorder": .25 * clips}
    held = {f"caption.{n}": heldout // 5 for n in range(1, 6)} | {f"vqa.{task}": heldout for task in VQA_CLASSES}
    held |= {f"grounding.{task}": heldout for task in ("box", "point", "count_point")}
    held |= {kind: heldout for kind in ("ocr", "interleaved", "motion", "order", "event", "match", "reorder")}
    held |= {"reasoning": len(REASONING) * heldout, "detail": len(DETAIL) * heldout, "text": len(TEXT_TASKS) * heldout}
    if size:
        tell = [f"instruct.{task}" for task in INSTRUCT]
        for kind in [f"ask.{kind}" for kind in held] + tell:
            moves = bool({"motion", "order", "event", "match", "reorder", "say_motion"} & set(kind.split(".")))
            units = (1 if size == "toy" else 4) * ASKED[kind.removeprefix("ask.").split(".")[0]]
            train[kind] = Fraction(units * (clips if moves else pictures), SIZES[size][moves])
        held |= {kind: heldout for kind in tell}
    return [("train", k, math.ceil(n)) for k, n in train.items()] + [("heldout", k, n) for k, n in held.items()]


def draw_unit(folder, split, kind, index, seed, sides, dry=False):
    u = Unit(folder, split, kind, index, seed, sides, dry)
    name, _, task = kind.removeprefix("ask.").partition(".")
    many = (3, 4, 5)  # scenes with a counted attribute
    if name == "caption":
        one_question_unit(u, name, name, lambda _, scene: {"caption": caption_question(scene)}, None, [int(task)])
    elif name == "vqa":
        counts = many if task == "count_of" else (1, 2, 3, 4, 5)
        one_question_unit(u, task, name, scene_questions, VQA_CLASSES[task], counts)
    elif name == "grounding":
        one_question_unit(u, task, name, grounding_questions, digits(1, 3) if task == "count_point" else None, many)
    elif name == "instruct":
        instruct_unit(u, task)
    else:
        globals()[f"{name}_unit"](u)
    return u


def draw_job(job):
    """(folder, split, kind, first, last, seed, sides) -> split, lines in order, pictures, clips. Runs in a worker."""
    folder, split, kind, first, last, seed, sides = job
    units = [draw_unit(folder, split, kind, i, seed, sides) for i in range(first, last)]
    lines = [line for u in units for line in u.lines]
    return split, lines, sum(u.pictures for u in units), sum(u.clips for u in units), len(units)


def make_world(out, size="toy", pictures=None, clips=None, seed=0, workers=2, heldout=120, progress=True):
    """Draws the world into folder `out` and returns world.json's content; a finished world of the same settings and
    code is kept. pictures, clips: how many of train (None: SIZES); heldout: questions per held-out task; workers:
    processes (1: none besides this one). Written beside `out` and renamed when complete. Raises FileExistsError where
    `out` holds something that is no world, ValueError for an unknown size or a negative number."""
    if size not in SIZES:
        raise ValueError(f"size {size!r}: one of {', '.join(SIZES)}")
    default_pictures, default_clips, *sides = SIZES[size]
    pictures, clips = default_pictures if pictures is None else pictures, default_clips if clips is None else clips
    if min(pictures, clips, heldout) < 0:
        raise ValueError(f"pictures {pictures}, clips {clips}, heldout {heldout}: none may be negative")
    out, record = Path(out), None
    code = hashlib.sha256(Path(__file__).read_bytes().replace(b"\r\n", b"\n")).hexdigest()[:16]
    settings = {"size": size, "pictures": pictures, "clips": clips, "seed": seed, "heldout": heldout, "code": code}
    if (out / "world.json").is_file():
        record = json.loads((out / "world.json").read_text())
        if record.get("settings") == settings:
            return record | {"reused": True}
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out}: exists and is no toy world (no world.json); remove it or choose another --out")
    begin, part = time.time(), out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    for split in ("train", "heldout"):
        for kind in ("pictures", "clips"):
            (part / split / kind).mkdir(parents=True)
    units = plan(pictures, clips, heldout, size)
    jobs = [(str(part), split, kind, i, min(i + 25, n), seed, sides)
            for split, kind, n in units for i in range(0, n, 25)]
    # long jobs alternate with short ones by a fixed shuffle, so that the bar's estimate of the time left is true
    order = random.Random(0).sample(range(len(jobs)), len(jobs))
    results, lines, files = [None] * len(jobs), Counter(), Counter()
    pool = multiprocessing.get_context("spawn").Pool(workers) if workers > 1 else None
    try:
        todo = [jobs[i] for i in order]
        with tqdm(total=sum(n for *_, n in units), desc=f"drawing {out}", unit="unit", disable=not progress) as bar:
            for i, result in zip(order, pool.imap(draw_job, todo) if pool else map(draw_job, todo)):
                results[i] = result
                bar.update(result[-1])
    finally:
        if pool:
            pool.terminate()
            pool.join()
    texts = {}
    for split, pairs, n_pictures, n_clips, _ in results:
        files[f"{split} pictures"] += n_pictures
        files[f"{split} clips"] += n_clips
        for name, line in pairs:
            texts.setdefault(f"{split}/{name}.jsonl", []).append(line)
    for name, content in sorted(texts.items()):
        lines[name] = len(content)
        (part / name).write_text("\n".join(content) + "\n", encoding="utf-8")
    record = {"settings": settings, "files": dict(files), "lines": dict(lines)}
    (part / "world.json").write_text(json.dumps(record, indent=1) + "\n")
    if out.exists():  # an empty folder, or a world of other settings
        shutil.rmtree(out)
    os.replace(part, out)
    return record | {"seconds": round(time.time() - begin, 1)}


# --------------------------------------------------------------------------------------------------------- vocabulary

# What the toy texts lack but later prompts and chains of thought need, and the chat template's own words.
CHAT = ["system\nYou are a helpful assistant.", "user\n", "assistant\n", "\n", "<analysis>Easy, so /no_think.</analysis>",
        "<analysis>Several steps, so /think.</analysis>", "<analysis>Too small, so /agentic_think.</analysis>",
        "/auto_think", "<answer>\\boxed{red}</answer>", "</answer>", "so red", "crop(78, 78)\nzoom(2)\nrotate(90)\ncontrast(4)",
        "print(1 + 2)", "<sandbox_output>1\n</sandbox_output>", "<sandbox_output>error: </sandbox_output>"]
EXTRA = """/think /no_think /auto_think /agentic_think \\boxed{5} \\boxed{ } So the answer is: The answer is yes.
Therefore, step
1: first count, then add.
Let me look. Let me think. Let me zoom in. I need to see it larger. I can see the digit now. zoom crop rotate contrast
brightness image code result output error
crop(100, 200, 300, 400) zoom(2) rotate(90) contrast(4.0) brightness(1.5) print() {"name": "crop", "arguments":
{"box": [1, 2, 3, 4]}} ```python ```
This question is easy, so no thinking is needed. This question needs several steps, so thinking is needed. easy hard
simple analysis mode direct
left of it above it below it right of it is a there are objects in all total together more than less than equal larger
smaller before after next last same different
What is this? How many are there? Which one? Where is it? When does it happen? Who? Why? Can you tell me? Please
answer with one word. Answer in a sentence. Answer shortly.
clip frame frames video picture pictures text words letters number numbers colour color shape position object objects
place size box point order time second seconds
yes no none not and or but if then because with without from to by for of on at in out up down over under near between
only also again
I you he she we they it my your our their his her me him us them was were be been has have had do does did will would
can could should may must
one two three four five six seven eight nine ten zero black white grey brown small large big little long short high
low good new old
look find show give make take put name read write count sort copy compare check move moves moving appear appears
describe explain turn turned"""


def corpus(seed=0):
    """The texts of some train units of every kind of pre-training (nothing is drawn), as a Counter."""
    found = Counter()
    for split, kind, n in plan(4000, 1500, 0):
        for i in range(n):
            for _, line in draw_unit("", split, kind, i, seed, SIZES["toy"][2:], dry=True).lines:
                record = json.loads(line)
                found.update(record.get("meta", {}).get("steps", ()))
                for m in record["messages"]:
                    parts = [{"text": m["content"]}] if isinstance(m["content"], str) else m["content"]
                    found.update(part["text"] for part in parts if "text" in part)
    return found + Counter(dict.fromkeys(CHAT, 1000)) + Counter(EXTRA.split("\n"))


def train_vocab(texts, n):
    """Byte-level BPE: Counter of texts -> {token in the GPT-2 byte alphabet: rank}, n entries, the 256 bytes first."""
    import regex  # comes with tiktoken
    pattern = regex.compile(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                            r"|\s*[\r\n]+|\s+(?!\S)|\s+")  # Qwen's
    words = Counter()
    for text, k in texts.items():
        for part in re.split(r"<\|\w+\|>", text):  # special tokens are no text
            for piece in pattern.findall(part):
                words[tuple(bytes([b]) for b in piece.encode())] += k
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = sorted(set(range(256)) - set(visible))
    alphabet = {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}
    tokens = [bytes([b]) for b in visible + hidden]
    while len(tokens) < n:
        pairs = Counter()
        for word, k in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += k
        if not pairs:
            raise ValueError(f"the texts give only {len(tokens)} of {n} tokens: add words to EXTRA")
        best = max(pairs, key=lambda p: (pairs[p], p))
        tokens.append(best[0] + best[1])
        merged = Counter()
        for word, k in words.items():
            new, i = [], 0
            while i < len(word):
                step = 2 if word[i:i + 2] == best else 1
                new.append(b"".join(word[i:i + step]))
                i += step
            merged[tuple(new)] += k
        words = merged
    return {"".join(alphabet[b] for b in token): rank for rank, token in enumerate(tokens)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="data/toy", help="folder of the world (default %(default)s)")
    parser.add_argument("--size", default="toy", choices=SIZES, help="how many and how large (default %(default)s)")
    parser.add_argument("--pictures", type=int, help="pictures of train, instead of the size's")
    parser.add_argument("--clips", type=int, help="clips of train, instead of the size's")
    parser.add_argument("--heldout", type=int, default=120, help="questions per held-out task (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser.add_argument("--workers", type=int, default=min(16, cores), help="processes (default %(default)s)")
    parser.add_argument("--train-vocab", metavar="FILE", help="train the toy vocabulary into FILE and stop")
    args = parser.parse_args(argv)
    if args.train_vocab:
        vocab = train_vocab(corpus(args.seed), 992)
        Path(args.train_vocab).write_text(json.dumps(vocab, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
        return print(f"{args.train_vocab}: {len(vocab)} entries, longest {max(vocab, key=len)!r}")
    world = make_world(args.out, args.size, args.pictures, args.clips, args.seed, args.workers, args.heldout)
    done = "reused" if world.get("reused") else f"drawn in {world['seconds']} s"
    print(f"{args.out}: {done}; " + ", ".join(f"{n} {k}" for k, n in world["files"].items()))
    print("; ".join(f"{name} {n}" for name, n in world["lines"].items()))


if __name__ == "__main__":
    main()
