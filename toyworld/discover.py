"""Questions that nobody shows an answer to: what reinforcement alone can teach.

What they ask about, pre-training taught to see; how to get from there to the answer, no line of any
file says. So there are no steps, and no answer is likely by chance: each kind has four or more,
which take turns. train/discover.jsonl is read by GRPO alone, heldout/discover.jsonl by the board.
"""

from collections import Counter

from toyworld.clips import motion_clip
from toyworld.drawing import SHAPES
from toyworld.unit import PLURAL, VERIFIERS, Unit, ask, in_turn

CORNERS = {"circle": 0, "square": 4, "triangle": 3, "star": 10, "cross": 12, "ring": 0}
BACKWARDS = {"left": "right", "right": "left", "up": "down", "down": "up"}

# ------------------------------------------------------- a scene -> (question, answer, hints)
# None where the scene cannot be asked. The hints: what is to be seen, and then the way from there.


def listed(counts):
    """{"circle": 3, "star": 1} -> "circle 3, star 1"."""
    return ", ".join(f"{name} {number}" for name, number in counts.items())


def numbers(scene, attribute):
    """How many things there are of each colour or shape, in order of appearance."""
    return Counter(getattr(t, attribute) for t in scene.things)


def difference(rng, scene):
    counts = numbers(scene, "shape")
    if len(counts) < 2:
        return None
    a, b = rng.sample(list(counts), 2)
    difference = counts[a] - counts[b]
    hints = [listed({a: counts[a], b: counts[b]}), f"{counts[a]} - {counts[b]} = {difference}"]
    return f"How many more {PLURAL[a]} than {PLURAL[b]} are there?", difference, hints


def others(rng, scene):
    shape = rng.choice(scene.things).shape
    every, these = len(scene.things), numbers(scene, "shape")[shape]
    hints = [f"objects {every}, {shape} {these}", f"{every} - {these} = {every - these}"]
    return f"How many objects are not {PLURAL[shape]}?", every - these, hints


def most_often(scene, attribute):
    counts = numbers(scene, attribute)
    if len(counts) < 2:
        return None
    (most, number), (_, next_number) = counts.most_common(2)
    if number == next_number:
        return None
    return f"Which {attribute} is there most often?", most, [listed(counts), f"{most} {number}"]


def main_shape(rng, scene):
    return most_often(scene, "shape")


def main_colour(rng, scene):
    return most_often(scene, "colour")


def colours(rng, scene):
    found = list(numbers(scene, "colour"))
    numbered = listed({colour: i for i, colour in enumerate(found, 1)})
    return "How many colours are there?", len(found), [", ".join(found), numbered]


def lowest(rng, scene):
    *_, above, last = scene.things  # row by row
    if above.place // 3 == last.place // 3:
        return None
    return "What colour is the lowest object?", last.colour, [last.where, last.seen]


def opposite(rng, scene):
    """Across the center: opposite the top left is the bottom right."""
    there = {t.place: t for t in scene.things if t.where != "center"}
    pairs = [(t, there[8 - t.place]) for t in scene.single() if 8 - t.place in there]
    if not pairs:
        return None
    t, other = rng.choice(pairs)
    hints = [other.where, other.seen]
    return f"What colour is the object opposite the {t.name}?", other.colour, hints


def corners(rng, scene):
    t = rng.choice(scene.things)
    number = CORNERS[t.shape]
    hints = [t.shape, f"{t.shape} {number}"]
    return f"How many corners has the object at the {t.where}?", number, hints


def plus(rng, scene):
    more = rng.randint(1, 4)
    here = len(scene.things)
    hints = [f"objects {here}", f"{here} + {more} = {here + more}"]
    return f"How many objects are there with {more} more?", here + more, hints


def three_shapes(rng, scene):
    """Names of three of its shapes for a question, and their numbers; None where it has fewer."""
    counts = numbers(scene, "shape")
    if len(counts) < 3:
        return None, None
    shapes = rng.sample(list(counts), 3)
    a, b, c = [PLURAL[shape] for shape in shapes]
    return f"{a}, {b} and {c}", {PLURAL[shape]: counts[shape] for shape in shapes}


def sum_three(rng, scene):
    """Longer than the sums of the cold start."""
    names, counts = three_shapes(rng, scene)
    if not names:
        return None
    total = sum(counts.values())
    hints = [listed(counts), " + ".join(map(str, counts.values())) + f" = {total}"]
    return f"How many {names} are there together?", total, hints


def ranking(rng, scene):
    """Longer than the comparisons of the cold start."""
    names, counts = three_shapes(rng, scene)
    if not names or len(set(counts.values())) < 3:
        return None
    order = sorted(counts, key=counts.get)
    hints = [listed(counts), listed({name: counts[name] for name in order})]
    return f"Sort {names} by number, fewest first.", " ".join(order), hints


# ------------------------------------------------------------------------------ the units

ANY = (len(SHAPES),)
# Task -> its question, how many things and shapes its scenes may have, steps to the answer
SCENES = {
    "difference": (difference, range(3, 8), (2, 3), 3),
    "others": (others, range(3, 8), (2, 3), 2),
    "main_shape": (main_shape, range(3, 8), (2, 3), 2),
    "main_colour": (main_colour, range(3, 6), ANY, 2),
    "colours": (colours, range(3, 7), ANY, 2),
    "lowest": (lowest, range(2, 6), ANY, 1),
    "opposite": (opposite, range(2, 6), ANY, 2),
    "corners": (corners, range(1, 6), ANY, 2),
    "plus": (plus, range(1, 6), ANY, 2),
    "sum_three": (sum_three, range(4, 8), (3, 4), 3),
    "ranking": (ranking, range(6, 8), (3,), 3),
}
DISCOVER = [*SCENES, "backwards"]
# Of the tasks whose answers do not take turns. plus: its objects do, one to five, as its words tell
# the rest. ranking: three shapes have six orders.
CHANCE = {"plus": 0.2, "ranking": round(1 / 6, 4)}
# What a wrong number next to the right one is worth: right ones are rarely sampled at first.
NEAR = 0.5


def levels(*hints, answer) -> list[str]:
    """A question's hints, from the least to the whole answer (the levels of 2509.01563, 4.4.2)."""
    return [*hints, f"the answer is {answer}"]


def discover_unit(u: Unit):
    want = in_turn(u.task, u.index)
    if u.task == "backwards":
        name, item = motion_clip(u, BACKWARDS[want], cheap=True)
        text = f"Which way does the {name} move when the clip is played backwards?"
        hints = levels(BACKWARDS[want], f"{BACKWARDS[want]}, {want}", answer=want)
        u.line("discover", [item], [ask(u.task, text, want, difficulty=2, hints=hints)])
        return
    make, things, shapes, difficulty = SCENES[u.task]
    while True:
        chosen = u.rng.sample(SHAPES, u.rng.choice(shapes))
        n = u.rng.choice(things) if want else things[u.index % len(things)]
        scene = u.scene(n, chosen)
        found = make(u.rng, scene)
        if found and want in (None, str(found[1])):
            break
    text, answer, hints = found
    chance = CHANCE.get(u.task, 0)
    near = {"near": NEAR} if VERIFIERS.get(u.task) == "number" else {}
    more = near | {"hints": levels(*hints, answer=answer)}
    question = ask(u.task, text, str(answer), chance=chance, difficulty=difficulty, **more)
    u.line("discover", [u.scene_picture(scene)], [question])
