"""Questions about clips, and about the frames of one: motion, order, events.

Truth lies on a grid of half seconds, as readers take two frames a second.
"""

import itertools
import math

from toyworld.drawing import COLOUR_NAMES, SHAPES, Paper, Thing, fill_of
from toyworld.unit import CHOICES, Film, Unit, article, ask, numbered, says, text_item

MOVES = CHOICES["motion"]
ENDS = {  # of a motion: where it starts and where it ends
    "left": ["right", "left"],
    "right": ["left", "right"],
    "up": ["bottom", "top"],
    "down": ["top", "bottom"],
}
EARLY = 0.05  # seconds: frame 14 of a file of 29.97 fps, at 0.467 s, is read as the one at 0.5 s


def draw_side(u):
    return 2 * u.rng.randint(28, 42)


def draw_film(u, cheap=False) -> Film:
    fps = u.rng.choice([8, 12] if cheap else [8, 8, 8, 12, 12, 12, 24, 29.97])
    duration = u.rng.choice([2.0, 2.5] if cheap else [2.0, 2.5, 3.0, 3.5, 4.0])
    return Film(draw_side(u), draw_side(u), fps, duration)


def draw_thing(u, side, least=0.2, most=0.25) -> Thing:
    """Any thing; least and most: its radius as a share of the side."""
    rng = u.rng
    thing = Thing(rng.choice(COLOUR_NAMES), rng.choice(SHAPES))
    thing.r = rng.uniform(least, most) * side
    thing.rgb = fill_of(rng, thing.colour)
    thing.turn = rng.uniform(-0.12, 0.12)
    return thing


# ------------------------------------------------------------------------------ motion


def moving(u, move, width, height):
    """A thing that moves that way, as a function: share of its path, 0 to 1 -> the thing there."""
    side = min(width, height)
    thing = u.until_split(
        lambda: draw_thing(u, side),
        lambda thing: f"motion:{thing.name} {move}",
    )
    lane = u.rng.uniform(0.38, 0.62)
    edge = thing.r + 1

    def at(f):
        if move in ("left", "up"):
            f = 1 - f
        if move in ("left", "right"):
            return thing.at(edge + f * (width - 2 * edge), lane * height)
        return thing.at(lane * width, edge + f * (height - 2 * edge))

    return at


def motion_clip(u: Unit, move: str, cheap=False) -> tuple[str, dict]:
    """A clip of one thing that moves: the thing's name, and the clip's item."""
    film = draw_film(u, cheap)
    at = moving(u, move, film.width, film.height)
    last = film.duration - 1 / film.fps

    def shown(t):
        return [at(min(1, t / last))]

    return at(0).name, u.clip(film, shown)


def motion_steps(move: str) -> list[str]:
    first, last = ENDS[move]
    return [f"first at the {first}", f"last at the {last}"]


def moves(name, move):
    return says(f"{article(name)} moves {move}")


def motion_unit(u: Unit):
    move = MOVES[u.index % 4]
    name, item = motion_clip(u, move)
    steps = motion_steps(move)
    questions = [
        ask("motion", f"Which way does the {name} move?", move, steps=steps),
        ask("video_caption", "Describe the clip.", moves(name, move), steps=steps),
    ]
    more = [ask("moving_object", "What moves?", name)]
    u.lines_of("video", item, questions, more)


def match_unit(u: Unit):
    """A reference and two clips, one of which moves like it."""
    move = MOVES[u.index // 2 % 4]
    ways = [move, u.rng.choice([other for other in MOVES if other != move])]
    if u.index % 2:
        ways.reverse()
    names = []
    media = []
    labels = ["Reference: ", " Clip 1: ", " Clip 2: "]
    for label, way in zip(labels, [move, *ways]):
        name, item = motion_clip(u, way, cheap=True)
        names.append(name)
        media += [text_item(label), item]
    match = ask(
        "match",
        " Which clip moves like the reference?",
        str(ways.index(move) + 1),
        steps=[f"reference: {move}", f"clip 1: {ways[0]}", f"clip 2: {ways[1]}"],
    )
    caption = ask("video_caption", "Describe clip 1.", moves(names[1], ways[0]))
    u.line("video", media, [match] if u.exam else u.rng.choice([[match], [match, caption]]))


def reorder_unit(u: Unit):
    """Three or four shuffled frames of one motion whose way is given: backwards is no answer."""
    width = draw_side(u)
    height = draw_side(u)
    move = MOVES[u.index % 4]
    n = u.index // 4 % 2 + 3
    at = moving(u, move, width, height)
    paper = Paper(u.rng, width, height)
    orders = list(itertools.permutations(range(n)))
    order = orders[u.index // 8 % len(orders)]  # order[k]: rank in time of picture k
    items = []
    for rank in order:
        frame = at(rank / (n - 1))
        items.append(u.picture(width, height, lambda: paper.draw([frame])))
    question = ask(
        "reorder",
        f" {moves(frame.name, move)} Give the time order of the pictures.",
        " ".join(str(order.index(rank) + 1) for rank in range(n)),
        chance=round(1 / math.factorial(n), 4),
        steps=[f"picture {i}: {rank + 1}" for i, rank in enumerate(order, 1)],
    )
    u.line("video", numbered(items), [question])


# -------------------------------------------------------------------- order and events


def order_clip(u):
    """Two things appear one after the other, side by side or one above the other: names, item."""
    rng = u.rng
    film = draw_film(u)
    side = min(film.width, film.height)
    names = []
    while len(set(names)) < 2:
        pair = u.until_split(
            lambda: [draw_thing(u, side), draw_thing(u, side)],
            lambda pair: f"order:{pair[0].name} {pair[1].name}",
        )
        names = [thing.name for thing in pair]
    spots = [0.27, 0.73]
    rng.shuffle(spots)
    across = rng.random() < 0.5
    middle = rng.uniform(0.4, 0.6)
    for thing, spot in zip(pair, spots):
        x, y = (spot, middle) if across else (middle, spot)
        thing.cx = x * film.width
        thing.cy = y * film.height
    starts = sorted(rng.sample(range(int(2 * film.duration)), 2))  # in half seconds

    def shown(t):
        return [thing for thing, half in zip(pair, starts) if t >= half / 2 - EARLY]

    return names, u.clip(film, shown)


def order_unit(u: Unit):
    names, item = order_clip(u)
    first, last = names
    a, b = reversed(names) if u.index % 2 else names
    order = ask(
        "order",
        f"Which appears first, the {a} or the {b}?",
        first,
        choices=[a, b],
        steps=[f"first: {first}", f"last: {last}"],
    )
    caption = says(f"{article(first)} appears, then {article(last)}")
    more = [
        ask("order_last", f"Which appears last, the {b} or the {a}?", last, choices=[a, b]),
        ask("video_caption", "Describe the clip.", caption),
    ]
    u.lines_of("video", item, [order], more)


def event_unit(u: Unit):
    """A thing is there from one time to another."""
    rng = u.rng
    film = draw_film(u)
    side = min(film.width, film.height)

    def draw():
        start, end = sorted(rng.sample(range(int(2 * film.duration) + 1), 2))
        return draw_thing(u, side, 0.24, 0.32), start / 2, end / 2

    start, end = 0, film.duration
    while end - start == film.duration:  # there all the time: no event
        thing, start, end = u.until_split(draw, lambda v: f"event:{v[0].name} {v[1]} {v[2]}")
    thing.cx = rng.uniform(0.4, 0.6) * film.width
    thing.cy = rng.uniform(0.4, 0.6) * film.height

    def shown(t):
        return [thing] if start - EARLY <= t < end - EARLY else []

    item = u.clip(film, shown)
    span = f"[{start}, {end}]"
    when = ask(
        "event_time",
        f"When is the {thing.shape} visible?",
        f"<|clip_time_start|>{span}<|clip_time_end|> {article(thing.shape)} is visible",
        span,
        steps=[f"from {start}", f"to {end}"],
    )
    caption = says(f"{article(thing.name)} is visible from {start} to {end} seconds")
    more = [
        ask("video_caption", "Describe the clip.", caption),
        ask("event_start", f"When does the {thing.shape} appear?", str(start)),
    ]
    u.lines_of("video", item, [when], more)
