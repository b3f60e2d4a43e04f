"""Coloured shapes and short texts, drawn on paper: arrays and clips.

    paper = Paper(random.Random(0), 112, 84)
    thing = Thing("red", "circle", cx=30, cy=40, r=12, rgb=COLOURS["red"])
    array = paper.draw([thing])                                             # (84, 112, 3) uint8
    write_clip("a.mp4", paper, Fraction(12), [[thing.at(x, 40)] for x in range(30, 60)])
"""

import math
import random
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from itertools import groupby

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLOURS = {
    "red": (215, 25, 30),
    "orange": (250, 135, 0),
    "yellow": (240, 220, 10),
    "green": (25, 150, 45),
    "cyan": (0, 200, 220),
    "blue": (30, 55, 220),
    "purple": (130, 30, 175),
    "pink": (255, 125, 190),
}
COLOUR_NAMES = list(COLOURS)
SHAPES = "circle square triangle star cross ring".split()
PLACES = [
    "top left", "top", "top right",
    "left", "center", "right",
    "bottom left", "bottom", "bottom right",
]


def star():
    points = []
    for k in range(10):
        q = 0.42 if k % 2 else 1.0
        angle = math.pi * k / 5
        points.append((q * math.sin(angle), -q * math.cos(angle)))
    return points


def four_times(points):
    """The points, and the same after one, two and three quarter turns."""
    corners = []
    for _ in range(4):
        corners += points
        points = [(-y, x) for x, y in points]
    return corners


# Corners (x, y) of the shapes that have some, around (0, 0) and in units of the radius.
OUTLINES = {
    "square": four_times([(-0.82, -0.82)]),
    "triangle": [(0, -0.9), (0.98, 0.8), (-0.98, 0.8)],
    "star": star(),
    "cross": four_times([(-0.3, -0.95), (0.3, -0.95), (0.3, -0.3)]),
}


@dataclass
class Thing:
    """A coloured shape. Lengths are in pixels; y grows downwards."""

    colour: str
    shape: str
    place: int = 4  # index into PLACES
    cx: float = 0.0
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

    def at(self, cx, cy):
        return replace(self, cx=cx, cy=cy)

    def around(self, q):
        """The square (x1, y1, x2, y2) that reaches q pixels from the centre."""
        return self.cx - q, self.cy - q, self.cx + q, self.cy + q

    def outline(self):
        """Corners (x, y), none for the round shapes."""
        s = math.sin(self.turn)
        c = math.cos(self.turn)
        points = []
        for x, y in OUTLINES.get(self.shape, []):
            points.append((self.cx + self.r * (x * c - y * s), self.cy + self.r * (x * s + y * c)))
        return points

    def box(self):
        """(x1, y1, x2, y2) around what is drawn."""
        points = self.outline()
        if not points:
            return self.around(0.95 * self.r)
        xs, ys = zip(*points)
        return min(xs), min(ys), max(xs), max(ys)

    def draw(self, pen, tint):
        """With an ImageDraw, on a background of this tint."""
        points = self.outline()
        if points:
            pen.polygon(points, fill=self.rgb)
        else:
            pen.ellipse(self.box(), fill=self.rgb)
        if self.shape == "ring":
            pen.ellipse(self.around(0.5 * self.r), fill=tint)


font = lru_cache(64)(ImageFont.load_default)  # font(size), made once


@dataclass
class Text:
    """A line of bold text around (cx, cy), r pixels high."""

    string: str
    cx: float
    cy: float
    r: float
    rgb: tuple

    def draw(self, pen, tint):
        """With an ImageDraw; the background's tint plays no part."""
        size = int(self.r)
        bold = max(1, size // 28)
        pen.text((self.cx, self.cy), self.string, self.rgb, font(size), "mm", stroke_width=bold)


def fill_of(rng, colour):
    """The colour's rgb, a little off."""
    return tuple(min(255, max(0, c + rng.randint(-10, 10))) for c in COLOURS[colour])


class Paper:
    """A background of one tint, dark or light, with a slight gradient and mild noise."""

    def __init__(self, rng: random.Random, width: int, height: int):
        base = rng.randint(15, 45) if rng.random() < 0.4 else rng.randint(222, 248)
        self.tint = tuple(base + rng.randint(-8, 7) for _ in range(3))
        self.width = width
        self.height = height
        noise = np.random.default_rng(rng.getrandbits(32)).integers(-3, 4, (height, width, 1))
        across = rng.uniform(-10, 10) * np.linspace(-1, 1, width)[:, None]
        down = rng.uniform(-10, 10) * np.linspace(-1, 1, height)[:, None, None]
        self.veil = (noise + (across + down)).astype(np.int16)  # (H, W, 1)

    def draw(self, things: list) -> np.ndarray:
        """Things and texts on the paper, an array (H, W, 3) uint8."""
        # At twice the size, then shrunk, so that edges are smooth.
        image = Image.new("RGB", (2 * self.width, 2 * self.height), self.tint)
        pen = ImageDraw.Draw(image)
        for t in things:
            replace(t, cx=2 * t.cx, cy=2 * t.cy, r=2 * t.r).draw(pen, self.tint)
        array = np.asarray(image.reduce(2), np.int16) + self.veil
        return np.clip(array, 0, 255).astype(np.uint8)


def write_clip(path, paper: Paper, rate: Fraction, shots):
    """An MP4 of `rate` frames a second: what lies on the paper, its sides even, in each of them."""
    # One thread: the bytes would depend on their number.
    options = {"preset": "ultrafast", "crf": "18", "threads": "1", "g": "12"}
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate, pix_fmt="yuv420p", options=options)
        stream.width = paper.width
        stream.height = paper.height
        for things, same in groupby(shots):
            array = paper.draw(things)  # once for all frames that are the same
            for _ in same:
                frame = av.VideoFrame.from_ndarray(array, format="rgb24")
                container.mux(stream.encode(frame))
        container.mux(stream.encode())
