"""Questions about clips, and about the frames of one: motion, order, events.

Truth lies on a grid of half seconds, as readers take two frames a second.
"""

import itertools

from toyworld.drawing import COLOUR_NAMES, SHAPES, Paper, Thing, fill_of
from toyworld.unit import CHOICES, Film, Unit, article, ask, in_turn, numbered, says, text_item

MOTION_STEPS = {  # where a motion starts and where it ends
    "left": ["first at the right", "last at the left"],
    "right": ["first at the left", "last at the right"],
    "up": ["first at the bottom", "last at the top"],
    "down": ["first at the top", "last at the bottom"],
}
EARLY = 0.05  # seconds: frame 14 of a file of 29.97 fps, at 0.467 s, is read as the one at 0.5 s


def draw_size(u):
    return 2 * u.rng.randint(28, 42), 2 * u.rng.randint(28, 42)


def draw_film(u, cheap=False) -> Film:
    fps = u.rng.choice([8, 12] if cheap else [8, 8, 8, 12, 12, 12, 24, 29.97])
    duration = u.rng.choice([2.0, 2.5] if cheap else [2.0, 2.5, 3.0, 3.5, 4.0])
    return Film(draw_size(u), fps, duration)


def draw_thing(u, size, least=0.2, most=0.25) -> Thing:
    """Any thing; least and most: its radius as a share of the shorter side."""
    rng = u.rng
    thing = Thing(rng.choice(COLOUR_NAMES), rng.choice(SHAPES))
    thing.r = rng.uniform(least, most) * min(size)
    thing.rgb = fill_of(rng, thing.colour)
    thing.turn = rng.uniform(-0.12, 0.12)
    return thing


# ------------------------------------------------------------------------------ motion


def moving(u, move, size):
    """A thing that moves that way, as a function: share of its path, 0 to 1 -> the thing there."""
    width, height = size
    thing = u.until_split(lambda: draw_thing(u, size), "motion:{0.name} " + move)
    lane = u.rng.uniform(0.38, 0.62)
    edge = thing.r + 1

    def at(f):
        if move in ("left", "up"):
            f = 1 - f
        if move in ("left", "right"):
            return thing.at(edge + f * (width - 2 * edge), lane * height)
        return thing.at(lane * width, edge + f * (height - 2 * edge))

    return at


def motion_clip(u, move, cheap=False):
    """A clip of one thing that moves: the thing's name, and the clip's item."""
    film = draw_film(u, cheap)
    at = moving(u, move, film.size)
    last = film.duration - 1 / film.fps
    return at(0).name, u.clip(film, lambda t: [at(min(1, t / last))])


def moves(name, move):
    return says(f"{article(name)} moves {move}")


def motion_unit(u: Unit):
    move = in_turn("motion", u.index)
    name, item = motion_clip(u, move)
    steps = MOTION_STEPS[move]
    questions = [
        ask("motion", f"Which way does the {name} move?", move, steps=steps),
        ask("video_caption", "Describe the clip.", moves(name, move), steps=steps),
    ]
    more = [ask("moving_object", "What moves?", name)]
    u.lines_of("video", item, questions, more)


def match_unit(u: Unit):
    """A reference and two clips, one of which moves like it."""
    move = in_turn("motion", u.index // 2)
    ways = [move, u.rng.choice([way for way in CHOICES["motion"] if way != move])]
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
        "Which clip moves like the reference?",
        str(ways.index(move) + 1),
        steps=[f"reference: {move}", f"clip 1: {ways[0]}", f"clip 2: {ways[1]}"],
    )
    caption = ask("video_caption", "Describe clip 1.", moves(names[1], ways[0]))
    u.line("video", media, [match] if u.exam else u.rng.choice([[match], [match, caption]]))


def reorder_unit(u: Unit):
    """Three or four shuffled frames of one motion whose way is given: backwards is no answer."""
    size = draw_size(u)
    move = in_turn("motion", u.index)
    n = u.index // 4 % 2 + 3
    at = moving(u, move, size)
    paper = Paper(u.rng, *size)
    orders = list(itertools.permutations(range(n)))
    order = orders[u.index // 8 % len(orders)]  # order[k]: rank in time of picture k
    question = ask(
        "reorder",
        f"{moves(at(0).name, move)} Give the time order of the pictures.",
        " ".join(str(order.index(rank) + 1) for rank in range(n)),
        chance=round(1 / len(orders), 4),
        steps=[f"picture {i}: {rank + 1}" for i, rank in enumerate(order, 1)],
    )
    items = [u.picture(paper, [at(rank / (n - 1))]) for rank in order]
    u.line("video", numbered(items), [question])


# -------------------------------------------------------------------- order and events


def order_clip(u):
    """Two things appear one after the other, side by side or one above the other: names, item."""
    rng = u.rng
    film = draw_film(u)
    width, height = film.size
    names = []
    while len(set(names)) < 2:
        pair = u.until_split(
            lambda: [draw_thing(u, film.size), draw_thing(u, film.size)],
            "order:{0[0].name} {0[1].name}",
        )
        names = [thing.name for thing in pair]
    spots = [0.27, 0.73]
    rng.shuffle(spots)
    across = rng.random() < 0.5
    middle = rng.uniform(0.4, 0.6)
    for thing, spot in zip(pair, spots):
        x, y = (spot, middle) if across else (middle, spot)
        thing.cx = x * width
        thing.cy = y * height
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
    width, height = film.size

    def draw():
        start, end = sorted(rng.sample(range(int(2 * film.duration) + 1), 2))
        return draw_thing(u, film.size, 0.24, 0.32), start / 2, end / 2

    start, end = 0, film.duration
    while end - start == film.duration:  # there all the time: no event
        thing, start, end = u.until_split(draw, "event:{0[0].name} {0[1]} {0[2]}")
    thing.cx = rng.uniform(0.4, 0.6) * width
    thing.cy = rng.uniform(0.4, 0.6) * height
    item = u.clip(film, lambda t: [thing] if start - EARLY <= t < end - EARLY else [])

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
