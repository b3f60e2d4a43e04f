"""Questions that take steps: in words alone, over one scene, and over a drawn sum."""

import itertools
import re

from toyworld.drawing import COLOUR_NAMES, PLACES, SHAPES, Thing
from toyworld.pictures import text_picture
from toyworld.unit import PLURAL, Scene, Unit, ask, count_off, sentence, tally, task_in_turn

# ------------------------------------------------------------------------------- texts


def add_up(parts):
    """The sums, and the steps towards them: ["3", "+4", "-2"] -> "3 + 4 = 7", "7 - 2 = 5"."""
    sums = list(itertools.accumulate(map(int, parts)))
    steps = []
    for before, part, after in zip(sums, parts[1:], sums[1:]):
        steps.append(f"{before} {part[0]} {part[1:]} = {after}")
    return sums, steps


def arithmetic_question(rng, task, want):
    """Plus or minus, in steps: tens, then ones."""
    a = rng.randint(0, 30)
    b = rng.randint(0, 30)
    sign = "+" if rng.random() < 0.5 else "-"
    if sign == "-":
        b, a = sorted([a, b])
    parts = [part for part in (b - b % 10, b % 10) if part] or [0]
    sums, steps = add_up([str(a), *[f"{sign}{part}" for part in parts]])
    text = f"What is {a} {sign} {b}?"
    return ask(task, text, str(sums[-1]), steps=steps, sign=sign, second=b)


def sort_question(rng, task, want):
    values = rng.sample("0123456789", rng.randint(3, 4))
    first, *others = sorted(values)
    steps = [f"smallest: {first}", *[f"then: {value}" for value in others]]
    return ask(task, f"Sort {' '.join(values)}.", " ".join(sorted(values)), steps=steps)


def copy_question(rng, task, want):
    n = rng.randint(3, 5)
    words = [rng.choice([*COLOUR_NAMES, *SHAPES, *"0123456789"]) for _ in range(n)]
    first, *others = words
    steps = [f"first: {first}", *[f"then: {word}" for word in others]]
    return ask(task, f"Copy: {' '.join(words)}", " ".join(words), steps=steps)


def count_words_question(rng, task, want):
    n = int(want or rng.randint(1, 4))
    word, *others = rng.sample(SHAPES, 3)
    words = [word] * n + [rng.choice(others) for _ in range(rng.randint(0, 3))]
    rng.shuffle(words)
    steps = count_off(words, [word])
    return ask(task, f"{' '.join(words)}. How often is {word}?", str(n), steps=steps)


def described_question(rng, task, want):
    """Place or colour of a thing in a scene that is put in words, with no place or colour twice."""
    clear = False
    while not clear:
        places = sorted(rng.sample(range(9), rng.randint(2, 3)))
        truths = zip(rng.sample(COLOUR_NAMES, 3), rng.sample(SHAPES, 3), places)
        things = [Thing(*truth) for truth in truths]
        t = rng.choice(things)
        if want and task == "text_position":
            t.place = PLACES.index(want)
        elif want:
            t.colour = want
        scene = Scene(things)
        clear = scene.unique("place", t) and scene.unique("colour", t)
    if task == "text_position":
        text, reply = f"Where is the {t.name}?", t.where
    else:
        text, reply = f"What colour is the {t.shape}?", t.colour
    steps = [thing.seen for thing in [*things, t]]
    return ask(task, f"{sentence(things)} {text}", reply, steps=steps)


# Task -> what makes a question of it, with the answer that is wanted (None: any) if its answers
# take turns.
TEXT_QUESTIONS = {
    "arithmetic": arithmetic_question,
    "sort": sort_question,
    "copy": copy_question,
    "count_words": count_words_question,
    "text_position": described_question,
    "text_colour_of": described_question,
}
TEXT_TASKS = list(TEXT_QUESTIONS)


def text_unit(u: Unit):
    """An exam asks its tasks in turn; a train line has two to four questions."""

    def draw(task, want):
        make = TEXT_QUESTIONS[task]
        return u.until_split(lambda: make(u.rng, task, want), "text:{0.text}")

    if u.exam:
        questions = [draw(*task_in_turn(TEXT_TASKS, u.index))]
    else:
        n = u.rng.randint(2, 4)
        questions = [draw(u.rng.choice(TEXT_TASKS), None) for _ in range(n)]
    u.line("text", [], questions)


# ------------------------------------------------------------------------------ scenes

REASONING = "sum_count compare_count relation drawn_arithmetic".split()
# Words of a step to a neighbouring place: rows and columns.
STEPS = {"right of": (0, 1), "left of": (0, -1), "below": (1, 0), "above": (-1, 0)}


def relation_question(rng, scene):
    """One to three steps from thing to thing; None where a way ends early."""
    t = rng.choice(scene.things)
    if not scene.unique("name", t):
        return None
    phrase = f"the {t.name}"
    steps = [f"{t.name}: {t.where}"]
    left = {divmod(thing.place, 3): thing for thing in scene.things}  # not yet visited
    hops = rng.randint(1, 3)
    for _ in range(hops):
        row, column = divmod(t.place, 3)
        del left[row, column]
        near = []
        for word, (down, right) in STEPS.items():
            place = (row + down, column + right)
            if place in left:
                near.append((word, left[place]))
        if not near:
            return None
        word, t = rng.choice(near)
        steps.append(f"{word} it: {t.name} at the {t.where}")
        phrase = f"the object {word} {phrase}"
    return ask(
        "relation",
        f"What shape is {phrase}?",
        t.shape,
        steps=steps,
        difficulty=hops if hops == 1 else hops + 1,
    )


def two_counts_question(rng, scene, task):
    """The sum of two shapes' counts, or which is larger; None where one is not there."""
    shapes = rng.sample(SHAPES, 2)
    found = [t.shape for t in scene.things]
    a, b = [found.count(shape) for shape in shapes]
    if not (a and b):
        return None
    first, second = [PLURAL[shape] for shape in shapes]
    if task == "sum_count":
        text = f"How many {first} and {second} are there together?"
        reply = str(a + b)
        result = f"{first} {a} + {second} {b} = {reply}"
    else:
        text = f"Are there more {first} than {second}?"
        reply = "yes" if a > b else "no"
        sign = "<" if a < b else ">" if a > b else "="
        result = f"{first} {a} {sign} {second} {b}"
    return ask(
        task,
        text,
        reply,
        steps=[*tally(scene.things, "shape", shapes), result],
        counts={first: a, second: b},
        difficulty=2,
    )


def reasoning_unit(u: Unit):
    """The tasks in turn. Answers take turns in train too: most sums would be 2 otherwise."""
    rng = u.rng
    task, want = task_in_turn(REASONING, u.index)
    if task == "drawn_arithmetic":
        drawn_sum_unit(u)
        return
    question = None
    while not question or question.reply != want:
        shapes = None if task == "relation" else rng.sample(SHAPES, 3)
        scene = u.scene(rng.randint(4, 7), shapes)
        if task == "relation":
            question = relation_question(rng, scene)
        else:
            question = two_counts_question(rng, scene, task)
    u.line("reasoning", [u.scene_picture(scene)], [question])


# -------------------------------------------------------------------------- drawn sums


def drawn_sum_unit(u: Unit):
    """A drawn sum of two or three digits, e.g. "3+4-2", that never falls below zero."""
    rng = u.rng

    def draw():
        string = str(rng.randint(0, 9))
        for _ in range(rng.randint(1, 2)):
            string += rng.choice("+-") + str(rng.randint(0, 9))
        return string

    sums = [-1]
    while min(sums) < 0:
        string = u.until_split(draw, "text:{}")
        sums, steps = add_up(re.findall(r"[+-]?\d", string))
    question = ask(
        "drawn_arithmetic",
        "What is the result?",
        str(sums[-1]),
        chance=0.1,
        steps=[f"text: {string}", *steps],
        difficulty=len(sums),
    )
    item = text_picture(u, string, rng.choice(COLOUR_NAMES))
    u.line("reasoning", [item], [question])
