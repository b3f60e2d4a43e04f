r"""What a model may run while it thinks with images.

    seen = run("crop(120, 300, 200, 380)\nrotate(90)\ncontrast(4)", [picture])
    seen.text, seen.images, seen.ok
    seen = run("show(image.crop((0, 0, 64, 64)))", [picture], level="python")
    sample = processor.extension(seen.content(), start)  # back into the open assistant turn

Code that a model wrote goes in, with the conversation's pictures. An Observation comes out: text
and pictures, safe to be put into the transcript. There are two levels:

operations, the default: a language of numbers and six operations on pictures, interpreted here. It
    has no strings, attributes, loops or functions to define, and every number in it is bounded.
python: real Python in a confined child process (common/confined.py). Linux only; refusal() says
    why it cannot be had.

What a model wrote raises no error and takes bounded time and memory: it gets a short "error: ..."
and may try again. What the caller does with text and pictures is not covered.
"""

import ast
import math
import operator
import re
from dataclasses import dataclass

from PIL import Image, ImageStat

from common.confined import IMAGES, LARGEST, TEXT, area, refusal, run_child, too_narrow

# Limits beside those of common/confined.py; ours too.
LONGEST = {"operations": 1_000, "python": 20_000}  # characters of code
WORK = 64_000_000  # pixels that one call works on
BOUND = 10**15  # size of a number: all integers below are exact in floats
DEPTH = 20  # parentheses within parentheses


@dataclass
class Observation:
    """What the model sees of its call. ok: False when text ends in an error."""

    text: str
    images: list[Image.Image]  # RGB
    ok: bool

    def content(self) -> list[dict]:
        """For processor.extension or an assistant's content; none of it has a loss.

        The tags are Keye's (report, figure 11).
        """
        return [
            {"type": "text", "text": "<sandbox_output>" + self.text, "loss": False},
            *[{"type": "image", "image": picture} for picture in self.images],
            {"type": "text", "text": "</sandbox_output>", "loss": False},
        ]


def run(code: str, images: list[Image.Image], level: str = "operations") -> Observation:
    """Runs the model's code on the conversation's pictures, which stay as they are.

    code: bare, or in <code> and ```python, as Thyme's model writes it.
    images: of any mode, as stored, not as shrunk for the ViT.
    Raises nothing, whatever the code, but ValueError for an unknown level.
    """
    if level not in LONGEST:
        raise ValueError(f"level {level!r} is none of {', '.join(LONGEST)}")
    most = LONGEST[level]
    if len(code) > most:
        return observe(error=f"{len(code)} characters of code, at most {most} are read")
    code = re.sub(r"</?code>", "", code)
    fence = re.search(r"```[a-z]*\s*\n(.*?)(?:```|\Z)", code, re.S)
    if fence:
        code = fence[1]
    if level == "operations":
        return run_operations(code, images)
    return run_python(code, images)


def run_python(code, images):
    reason = refusal()
    if reason:
        return observe(error=f"Python is not available: {reason}")
    pixels = area(images)
    if pixels > WORK:
        return observe(
            error=f"the pictures have {pixels} pixels, at most {WORK} are given to Python"
        )
    outcome = run_child(code, images)
    if outcome.ok:
        return observe(outcome.text, outcome.images)
    return observe(error=outcome.text)


def observe(text: str = "", images=(), error: str = "") -> Observation:
    """The only way back into the transcript: no tag or special token can be spelled in it.

    All of them need "<", which becomes "‹"; so do its wide forms, as normalising makes it of them.
    """
    if not (text or images or error):
        error = "nothing was shown or printed"
    text = text.rstrip("\n")
    if error:
        text = f"{text}\nerror: {error}".lstrip("\n")
    if len(text) > TEXT:
        text = text[: TEXT - 220] + "\n... (cut)\n" + text[-200:]
    text = "".join(c if harmless(c) else " " for c in text)
    text = re.sub("[<＜﹤]", "‹", text)
    return Observation(text, [] if error else list(images), not error)


def harmless(character):
    """No control or format character, nor U+0338, which joins the ">" of a tag before it."""
    return character in "\n\t" or (character.isprintable() and character != "\u0338")


# --------------------------------------------------------------------------------------------------
# operations

# The numbers of each with their least and most. An operation works on the last one's result, at
# first on image(1).
OPERATIONS = {
    # Begins anew with this picture of the conversation; what was made so far is kept.
    "image": {"number": (1, 1000)},
    # In thousandths of the sides, as Keye's boxes.
    "crop": {"x1": (0, 1000), "y1": (0, 1000), "x2": (0, 1000), "y2": (0, 1000)},
    "zoom": {"factor": (0.05, 16)},
    # Clockwise.
    "rotate": {"degrees": (-360, 360)},
    # 1 leaves it as it is.
    "contrast": {"factor": (0, 16)},
    # 0 is black.
    "brightness": {"factor": (0, 16)},
}

# All that reaches Python's parser: names, numbers, and these signs.
TOKEN = re.compile(
    r"(?<![\w.])(?:[A-Za-z_]\w*|(?:\d+\.?\d*|\.\d+)(?:[eE]\d*)?)(?![\w.])|[-+*/%(),=;\s]", re.A
)


def bounded(value):
    # Not the other way round: a comparison with nan is False.
    if type(value) not in (int, float) or not abs(value) <= BOUND:
        raise ValueError(f"numbers are real and at most {BOUND:.0e}")
    return value


def power(a, b):
    # In floats first: an exact integer may be of any length.
    bounded(math.pow(a, b))
    return a**b


def rounded(x, *digits):
    # In floats: of an integer, Python would calculate 10**digits.
    return round(float(x), *map(int, digits))


ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: power,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
FUNCTIONS = {
    "abs": abs,
    "min": min,
    "max": max,
    "sqrt": math.sqrt,
    "floor": math.floor,
    "ceil": math.ceil,
    "round": rounded,
}


def run_operations(code, images):
    program = Program(images)
    error = ""
    try:
        program.run(code)
    except SyntaxError as e:
        program.line = e.lineno or 1
        error = e.msg
    except (RecursionError, MemoryError):
        error = "too complicated"
    except (ValueError, TypeError, ArithmeticError) as e:  # ours, and 1 / 0, sqrt(-1), min(1)
        error = str(e)
    if error:
        error = f"line {program.line}: {error}"
    return observe("\n".join(program.printed), program.done, error)


class Program:
    """One call. Statements run once, in order: the work cannot outgrow the length of the code."""

    def __init__(self, images):
        self.images = images  # of the conversation
        self.picture = None  # what the next operation works on
        self.done = []  # pictures that come back
        self.printed = []  # lines
        self.names = {"pi": math.pi}
        self.line = 1  # for an error
        self.worked = 0  # pixels

    def run(self, code):
        # Comments and indents.
        code = re.sub(r"#[^\n]*|(?m:^[ \t]+)", "", code)
        # Quotes, brackets, dots and all beyond ASCII never reach Python's parser.
        rest = TOKEN.sub("", code)
        if rest:
            raise ValueError(f"cannot read {rest[:20]!r}")
        depth = 0
        for character in code:
            depth += (character == "(") - (character == ")")
            if depth > DEPTH:
                raise ValueError(f"more than {DEPTH} parentheses within each other")
        for statement in ast.parse(code).body:
            self.line = statement.lineno
            self.statement(statement)
        self.keep()

    def statement(self, statement):
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                self.names[name] = self.value(value)
            case ast.Expr(ast.Call(ast.Name(id=name), args, keywords=[])) if name in OPERATIONS:
                self.operate(name, [self.value(arg) for arg in args])
            case ast.Expr(ast.Call(ast.Name(id="print"), args, keywords=[])):
                self.print([self.value(arg) for arg in args])
            case ast.Expr(value):
                self.print([self.value(value)])
            case _:
                raise ValueError(
                    "a line is an operation, print(...), name = number, or a calculation"
                )

    def value(self, node):
        match node:
            case ast.Constant(value):
                return bounded(value)
            case ast.Name(id=name) if name in self.names:
                return self.names[name]
            case ast.UnaryOp(op, operand) if type(op) in ARITHMETIC:
                return ARITHMETIC[type(op)](self.value(operand))
            case ast.BinOp(left, op, right) if type(op) in ARITHMETIC:
                return bounded(ARITHMETIC[type(op)](self.value(left), self.value(right)))
            case ast.Call(ast.Name(id=name), args, keywords=[]) if name in FUNCTIONS:
                return bounded(FUNCTIONS[name](*[self.value(arg) for arg in args]))
        called = getattr(node, "func", node)
        what = getattr(called, "id", "this")
        known = ", ".join([*OPERATIONS, "print", *FUNCTIONS])
        raise ValueError(f"{what} is not known; known are {known}, + - * / // % **")

    def print(self, numbers):
        words = [str(x) if type(x) is int else f"{x:.10g}" for x in numbers]
        self.printed.append(" ".join(words))

    def keep(self):
        """The picture is one of those that come back."""
        if self.picture is None:
            return
        self.spend(*self.picture.size)
        if len(self.done) == IMAGES:
            raise ValueError(f"more than {IMAGES} pictures")
        self.done.append(self.picture)

    def spend(self, width, height, work=0):
        """ValueError unless a result of this size may be made, by looking at so many pixels."""
        pixels = width * height
        self.worked += max(work, pixels)
        if pixels > LARGEST or self.worked > WORK:
            raise ValueError(
                f"{width}x{height} pixels are too much work: crop a smaller part first"
            )
        if too_narrow(width, height):
            raise ValueError(f"{width}x{height} pixels are too narrow")

    def operate(self, name, numbers):
        limits = OPERATIONS[name]
        if len(numbers) != len(limits):
            raise ValueError(f"use {name}({', '.join(limits)})")
        for number, (what, (least, most)) in zip(numbers, limits.items()):
            if not least <= number <= most:
                raise ValueError(f"{name}: {what} must be from {least} to {most}, not {number:.6g}")
        if self.picture is None and name != "image":
            self.picture = self.image(1)
        # One of the methods below.
        self.picture = getattr(self, name)(*numbers)

    def image(self, number):
        self.keep()
        number = int(number)
        if number > len(self.images):
            raise ValueError(f"image({number}): there are {len(self.images)}")
        # A copy: what comes back is not the stored one.
        return self.images[number - 1].convert("RGB")

    def crop(self, x1, y1, x2, y2):
        width, height = self.picture.size
        if x1 >= x2 or y1 >= y2:
            raise ValueError("crop: x1 must be smaller than x2, and y1 than y2")
        # Outwards to whole pixels.
        left = int(x1 * width / 1000)
        top = int(y1 * height / 1000)
        right = math.ceil(x2 * width / 1000)
        bottom = math.ceil(y2 * height / 1000)
        self.spend(right - left, bottom - top)
        return self.picture.crop((left, top, right, bottom))

    def zoom(self, factor):
        width, height = self.picture.size
        size = (max(1, round(width * factor)), max(1, round(height * factor)))
        self.spend(*size, work=width * height)
        return self.picture.resize(size, Image.BICUBIC)

    def rotate(self, degrees):
        width, height = self.picture.size
        angle = math.radians(degrees)
        cos = abs(math.cos(angle))
        sin = abs(math.sin(angle))
        result = (round(width * cos + height * sin), round(width * sin + height * cos))
        self.spend(*result, work=width * height)
        grey = (128, 128, 128)
        return self.picture.rotate(-degrees, Image.BICUBIC, expand=True, fillcolor=grey)

    def contrast(self, factor):
        # About the mean colour. Pillow's own works about grey and clips strong factors.
        mean = ImageStat.Stat(self.picture).mean
        return self.blend(tuple(map(round, mean)), factor)

    def brightness(self, factor):
        return self.blend((0, 0, 0), factor)

    def blend(self, colour, factor):
        """colour + factor * (picture - colour)"""
        self.spend(*self.picture.size)
        plain = Image.new("RGB", self.picture.size, colour)
        return Image.blend(plain, self.picture, factor)
