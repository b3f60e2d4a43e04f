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

# ------------------------------------------------------------- a scene -> (question, answer)
# None where the scene cannot be asked.


def numbers(scene, attribute):
    """How many things there are of each colour or shape, in order of appearance."""
    return Counter(getattr(t, attribute) for t in scene.things)


def difference(rng, scene):
    counts = numbers(scene, "shape")
    if len(counts) < 2:
        return None
    a, b = rng.sample(list(counts), 2)
    return f"How many more {PLURAL[a]} than {PLURAL[b]} are there?", counts[a] - counts[b]


def others(rng, scene):
    shape = rng.choice(scene.things).shape
    number = len(scene.things) - numbers(scene, "shape")[shape]
    return f"How many objects are not {PLURAL[shape]}?", number


def most_often(scene, attribute):
    counts = numbers(scene, attribute).most_common(2)
    if len(counts) < 2 or counts[0][1] == counts[1][1]:
        return None
    return f"Which {attribute} is there most often?", counts[0][0]


def main_shape(rng, scene):
    return most_often(scene, "shape")


def main_colour(rng, scene):
    return most_often(scene, "colour")


def colours(rng, scene):
    return "How many colours are there?", len(numbers(scene, "colour"))


def lowest(rng, scene):
    *_, above, last = scene.things  # row by row
    if above.place // 3 == last.place // 3:
        return None
    return "What colour is the lowest object?", last.colour


def opposite(rng, scene):
    """Across the center: opposite the top left is the bottom right."""
    there = {t.place: t for t in scene.things if t.where != "center"}
    pairs = [(t, there[8 - t.place]) for t in scene.single() if 8 - t.place in there]
    if not pairs:
        return None
    t, other = rng.choice(pairs)
    return f"What colour is the object opposite the {t.name}?", other.colour


def corners(rng, scene):
    t = rng.choice(scene.things)
    return f"How many corners has the object at the {t.where}?", CORNERS[t.shape]


def plus(rng, scene):
    more = rng.randint(1, 4)
    return f"How many objects are there with {more} more?", len(scene.things) + more


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
    return f"How many {names} are there together?", sum(counts.values())


def ranking(rng, scene):
    """Longer than the comparisons of the cold start."""
    names, counts = three_shapes(rng, scene)
    if not names or len(set(counts.values())) < 3:
        return None
    order = sorted(counts, key=counts.get)
    return f"Sort {names} by number, fewest first.", " ".join(order)


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


def discover_unit(u: Unit):
    want = in_turn(u.task, u.index)
    if u.task == "backwards":
        name, item = motion_clip(u, BACKWARDS[want], cheap=True)
        text = f"Which way does the {name} move when the clip is played backwards?"
        u.line("discover", [item], [ask(u.task, text, want, difficulty=2)])
        return
    make, things, shapes, difficulty = SCENES[u.task]
    while True:
        chosen = u.rng.sample(SHAPES, u.rng.choice(shapes))
        n = u.rng.choice(things) if want else things[u.index % len(things)]
        scene = u.scene(n, chosen)
        found = make(u.rng, scene)
        if found and want in (None, str(found[1])):
            break
    text, answer = found
    chance = CHANCE.get(u.task, 0)
    near = {"near": NEAR} if VERIFIERS.get(u.task) == "number" else {}
    question = ask(u.task, text, str(answer), chance=chance, difficulty=difficulty, **near)
    u.line("discover", [u.scene_picture(scene)], [question])
