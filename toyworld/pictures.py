"""Questions about pictures: captions, single facts, places, drawn texts, details, several pictures.

Each *_unit function turns a Unit into files and lines. In training lines a picture has several
questions; in exams one question stands alone, and its answers take turns.
"""

import json
from dataclasses import replace

from toyworld.drawing import COLOUR_NAMES, PLACES, SHAPES, Paper, Text, fill_of, font
from toyworld.unit import (
    Unit,
    article,
    ask,
    in_turn,
    numbered,
    sentence,
    task_in_turn,
    text_item,
    thousandths,
)

VQA = "colour shape count count_of position exist".split()
GROUNDING = "box point count_point".split()
DETAIL = "detail detail_rotated detail_low_contrast".split()
CHARACTERS = "0123456789ABCEFHKLMPRTXY"  # no pair of look-alikes such as O and 0


# ------------------------------------------------------------------- questions on a scene


def caption_question(scene, task="caption", text="Describe the picture."):
    things = scene.things
    return ask(task, text, sentence(things), steps=[f"objects: {len(things)}"])


def look_at_all(scene, found):
    """Steps: what is there, then what was found, unless that is all there is."""
    seen = [t.seen for t in scene.things]
    return seen if seen == [found] else [*seen, found]


def attribute_question(rng, scene, task):
    """The colour or shape of the thing at a place, or of the only one with the other attribute."""
    t = rng.choice(scene.things)
    other, what = ("shape", t.shape) if task == "colour" else ("colour", f"{t.colour} object")
    if not (scene.unique(other, t) and rng.random() < 0.5):
        what = f"object at the {t.where}"
    steps = look_at_all(scene, t.seen)
    return ask(task, f"What {task} is the {what}?", getattr(t, task), steps=steps)


def exist_question(rng, scene):
    names = [t.name for t in scene.things]
    t = rng.choice(scene.things)
    reply = rng.choice(["yes", "no"])
    name = t.name
    while reply == "no" and name in names:
        # Half of the absent things share colour or shape with one that is there.
        colour = t.colour if rng.random() < 0.3 else rng.choice(COLOUR_NAMES)
        shape = t.shape if rng.random() < 0.3 else rng.choice(SHAPES)
        name = f"{colour} {shape}"
    found = t.seen if reply == "yes" else f"no {name}"
    return ask("exist", f"Is there {article(name)}?", reply, steps=look_at_all(scene, found))


def scene_questions(rng, scene):
    """One question of every task that the scene can answer."""
    yield attribute_question(rng, scene, "colour")
    yield attribute_question(rng, scene, "shape")
    steps = [f"{t.where}: {k}" for k, t in enumerate(scene.things, 1)]
    yield ask("count", "How many objects are there?", str(len(steps)), steps=steps)
    theme = scene.theme
    if theme:
        number = str(len(theme.things))
        yield ask("count_of", f"How many {theme.name} are there?", number, steps=theme.steps)
    single = scene.single()
    if single:
        t = rng.choice(single)
        text = f"Where is the {t.name}?"
        yield ask("position", text, t.where, steps=look_at_all(scene, t.seen))
    yield exist_question(rng, scene)


def grounded(name, kind, places):
    """Keye's form of boxes and points (report, table 1), and these alone as JSON."""
    found = json.dumps(places)
    name = f"<|object_ref_start|>{name}<|object_ref_end|>"
    return f"{name}<|{kind}_start|>{found}<|{kind}_end|>", found


def grounding_questions(rng, scene):
    """One question of every task that the scene can answer."""
    single = scene.single()
    if single:
        t = rng.choice(single)
        reply, box = grounded(t.name, "box", [scene.box(t)])
        yield ask("box", f"Give the box of the {t.name}.", reply, box, steps=[t.seen])
        t = rng.choice(single)
        reply, point = grounded(t.name, "point", [scene.point(t)])
        yield ask(
            "point",
            f"Point to the {t.name}.",
            reply,
            point,
            box=scene.box(t),
            steps=[t.seen],
        )
    theme = scene.theme
    if theme:
        number = str(len(theme.things))
        reply, points = grounded(theme.name, "point", [scene.point(t) for t in theme.things])
        yield ask(
            "count_point",
            f"Point to all {theme.name} and count them.",
            f"{reply} {number}",
            number,
            points=points,
            boxes=[scene.box(t) for t in theme.things],
            steps=theme.steps,
        )


# ------------------------------------------------------------------------ single scenes


def picked(rng, questions, n, caption, share):
    """n of the questions, and in a share of cases the caption at any place among them."""
    chosen = rng.sample(questions, n)
    if rng.random() < share:
        chosen.insert(rng.randint(0, n), caption)
    return chosen


def scene_unit(u: Unit):
    """A train picture: two lines of questions, and parts of caption, pair and grounding."""
    rng = u.rng
    scene = u.scene(u.index % 5 + 1)
    item = u.scene_picture(scene)
    caption = caption_question(scene)
    for _ in range(2):
        questions = [*scene_questions(rng, scene), *scene_questions(rng, scene)]
        different = list({q.text: q for q in questions}.values())
        # Not always with a caption: every question is also asked without one before it.
        u.line("vqa", [item], picked(rng, different, 4, caption, 0.8))
    u.line("pairs", [item], [replace(caption, text="")])
    if rng.random() < 0.5:
        u.line("caption", [item], [caption])
    questions = list(grounding_questions(rng, scene))
    if questions and rng.random() < 0.55:
        u.line("grounding", [item], picked(rng, questions, len(questions), caption, 0.3))


def answered_scene(u, task, turn):
    """A scene, and its question of that task with the answer whose turn it is."""
    want = in_turn(task, turn)
    make = grounding_questions if task in GROUNDING else scene_questions
    counts = range(3, 6) if task in ("count_of", *GROUNDING) else range(1, 6)
    while True:
        scene = u.scene(int(want) if task == "count" else u.rng.choice(counts))
        q = {q.task: q for q in make(u.rng, scene)}.get(task)
        if q and want in (None, q.meta["answer"]):
            return scene, q


def one_question_unit(u: Unit):
    """A picture with one question: a single fact, a box or points."""
    scene, question = answered_scene(u, u.task, u.index)
    u.line(u.name, [u.scene_picture(scene)], [question])


def caption_unit(u: Unit):
    """A picture of u.task things, to be described."""
    scene = u.scene(u.rng.choice([int(u.task)]))
    u.line("caption", [u.scene_picture(scene)], [caption_question(scene)])


# ------------------------------------------------------------------------- drawn texts


def text_picture(u, string, colour):
    """A picture that the string fills. -> its item"""
    rng = u.rng
    width = rng.randint(*u.sides)
    height = rng.randint(*u.sides)
    paper = Paper(rng, width, height)
    rgb = fill_of(rng, colour)
    x1, y1, x2, y2 = font(64).getbbox(string, anchor="mm", stroke_width=3)
    fits = min(width / (x2 - x1), height / (y2 - y1), 1.2 * min(width, height) / 64)
    size = rng.uniform(0.75, 0.9) * 64 * fits
    cx = width / 2 + rng.uniform(-0.04, 0.04) * width
    # The anchor "mm" centres ascender and descender, and capitals sit higher: shift by what
    # the bounding box shows.
    cy = height / 2 - (y1 + y2) / 2 * size / 64
    return u.picture(paper, [Text(string, cx, cy, size, rgb)])


def ocr_unit(u: Unit):
    rng = u.rng
    n = u.index % 4 + 1

    def draw():
        return "".join(rng.choice(CHARACTERS) for _ in range(n))

    string = u.until_split(draw, "text:{}")
    colour = in_turn("text_colour", u.index) if u.exam else rng.choice(COLOUR_NAMES)
    reply = f"<|ocr_text_start|>{string}<|ocr_text_end|>"
    questions = [
        ask("read", "Read the text.", reply, string, steps=[f"characters: {n}"]),
        ask("text_colour", "What colour is the text?", colour, steps=[f"text: {colour}"]),
        ask("text_length", "How many characters are there?", str(n), steps=[f"text: {string}"]),
    ]
    u.lines_of("ocr", text_picture(u, string, colour), questions, lines=1)


# --------------------------------------------------------------------- several pictures


def interleaved_unit(u: Unit):
    rng = u.rng
    n = u.index // 6 % 2 + 2
    k = u.index % n  # the picture that is asked for: each number equally often
    only = []  # what it alone shows
    while not only:
        scenes = [u.scene(rng.randint(1, 2), sides=(56, 56), grid=2) for _ in range(n)]
        names = [[t.name for t in scene.things] for scene in scenes]
        others = sum(names[:k] + names[k + 1 :], [])
        only = [name for name in names[k] if name not in others]
    pictures = numbered([u.scene_picture(scene) for scene in scenes])
    which = ask(
        "which_picture",
        f"Which picture shows {article(rng.choice(only))}?",
        str(k + 1),
        choices=list("123"[:n]),
        steps=[f"picture {i}: {', '.join(seen)}" for i, seen in enumerate(names, 1)],
    )

    # Each picture with its caption, but for the last: that is to be written.
    captioned = []
    describe = []
    for i, scene in enumerate(scenes):
        caption = sentence(scene.things)
        captioned += [*pictures[2 * i : 2 * i + 2], text_item(f" {caption}\n")]
        describe.append(ask("describe_number", f"Describe picture {i + 1}.", caption))
    story = caption_question(scene, "story", "Describe it like the others.")

    questions = [which]
    if not u.exam:
        questions += rng.sample(describe, rng.randint(1, n))
        rng.shuffle(questions)
    u.line("interleaved", pictures, questions)
    u.line("interleaved", captioned[:-1], [story])
    if not u.exam:
        u.line("interleaved", pictures, [which])


# ----------------------------------------------------------------------------- details


def look_box(place):
    """(x1, y1, x2, y2) in thousandths: the middle of a place's cell. A dot lies inside it whole."""
    row, column = divmod(PLACES.index(place), 3)
    middles = (166, 500, 833)  # of the cells, each 333 wide
    x = middles[column]
    y = middles[row]
    return x - 88, y - 88, x + 88, y + 88


def draw_dots(u, answer, low_contrast):
    """A scene of small dots, one of that shape with a colour of its own: scene, paper, that dot."""
    rng = u.rng
    targets = []
    while not targets:
        scene = u.scene(rng.randint(2, 4), sides=(280, 336))
        targets = [t for t in scene.things if t.shape == answer and scene.unique("colour", t)]
    target = rng.choice(targets)
    width, height = scene.size
    paper = Paper(rng, width, height)
    for t in scene.things:
        row, column = divmod(t.place, 3)
        t.r = 7.5
        t.turn = rng.uniform(-0.12, 0.12)
        t.cx = (column + 0.5 + rng.uniform(-0.1, 0.1)) * width / 3
        t.cy = (row + 0.5 + rng.uniform(-0.1, 0.1)) * height / 3
        if low_contrast:
            t.rgb = tuple(round(p + 0.2 * (c - p)) for c, p in zip(t.rgb, paper.tint))
    return scene, paper, target


def detail_unit(u: Unit):
    """A large picture of dots that, as the toy sees it, fill less than half a patch each.

    meta's crop (thousandths) and place are those of the stored picture; its rotate (degrees
    clockwise) and contrast make the shape readable.
    """
    task, answer = task_in_turn(DETAIL, u.index)
    low_contrast = task == "detail_low_contrast"
    scene, paper, dot = draw_dots(u, answer, low_contrast)
    turns = u.rng.choice([1, 2, 3]) if task == "detail_rotated" else 0  # clockwise
    item = u.picture(paper, scene.things, turns, quality=95)
    width, height = scene.size
    for _ in range(turns):
        dot = dot.at(height - dot.cy, dot.cx)
        width, height = height, width
    place = PLACES[3 * int(3 * dot.cy / height) + int(3 * dot.cx / width)]
    hint = f"The picture is turned right by {90 * turns} degrees. " if turns else ""
    what = f"{dot.colour} dot" if u.rng.random() < 0.5 else f"dot at the {place}"
    question = ask(
        task,
        f"{hint}What shape is the {what}?",
        answer,
        crop=thousandths(dot.around(22), (width, height)),
        rotate=-90 * turns % 360,
        contrast=4.0 if low_contrast else 1.0,
        difficulty=2 if task == "detail" else 3,
        place=place,
        steps=[f"{dot.colour} dot at the {place}"],
    )
    u.line("detail", [item], [question])
