r"""What an answer is worth, by rule: the true answer is known, and no model judges.

    verify("The answer is B.", meta)    (outcome 0..1, right 0 or 1), for rewards: wherever the
                                        answer names its value, also in words: "three circles", "三"
    score("B", meta)                    1 or 0, for benchmarks: the bare value in the asked form
    grade(text, meta)                   the benchmark's graded measure of boxes, times and texts

meta says what is true and how it is compared, as in {"verifier": "number", "answer": "5"}:

| verifier | answer, a string         | right where                                                |
|----------|--------------------------|------------------------------------------------------------|
| exact    | "Ab"                     | equal                                                      |
| text     | "NO EXIT"                | equal; the outcome falls with the edit distance            |
| choice   | "B" or an option's text  | equal, of the options in meta["choices"] where known       |
| yesno    | "yes"                    | equal                                                      |
| number   | "1234.5", "1/3"          | equal, or within meta["tolerance"] (0.05: 5 %)             |
| order    | "2 1 3"                  | the same sequence; the outcome: the share at its place     |
| box      | "[[x1, y1, x2, y2], .."  | as many boxes, and a mean IoU of 0.5 or more               |
| point    | "[[x, y], .."            | one point in each of meta["boxes"], or near each true one  |
| interval | "[start, end]", seconds  | IoU of 0.5 or more                                         |

Boxes and points are in 1/1000 of the picture; boxes in pixels where meta["size"] = [width, height].
meta["duration"] is the length of a clip in seconds. Where meta["near"] = 0.5, the outcome of a
wrong number is 0.5 / (1 + its distance). An answer that cannot be read is wrong, and raises no
error; a truth that cannot be read is a ValueError. Nothing in an answer is evaluated.
"""

import json
import math
import operator
import re
import unicodedata
from collections import defaultdict
from fractions import Fraction
from functools import lru_cache

import numpy as np

from common.numerals import in_digits

# The tag of coordinates, as in <|box_start|>[[1, 2, 3, 4]]<|box_end|>, and how many make a row.
COORDINATES = {"box": ("box", 4), "point": ("point", 2), "interval": ("clip_time", 2)}

MAX_TEXT = 20_000  # ours, characters: no longer answer is read, which bounds the time
MAX_ROWS = 100  # ours: boxes, points or intervals of an answer
NEAR = 60  # ours, 1/1000 of the picture: how far from the true one a point may be


def verify(text: str | None, meta: dict, strict: bool = False) -> tuple[float, float]:
    """(outcome 0..1, right 0 or 1) of an answer. strict: as in read."""
    kind = meta["verifier"]
    # Words are compared as they are read; a number and coordinates mean the same in any form.
    truth = read(meta["answer"], meta, strict and kind in ("choice", "yesno", "order"))
    if truth is None:
        raise ValueError(f"the answer {meta['answer']!r} cannot be read as {kind}")
    got = read(text, meta, strict) if text else None
    if got is None:
        return 0.0, 0.0
    outcome = right = got == truth
    if kind == "text" and len(got) <= 4 * len(truth) + 100:  # ours: a longer one earns nothing
        outcome = 1 - edit_distance(got, truth) / max(1, len(got), len(truth))
    elif kind == "order" and sorted(got) == sorted(truth):
        # ours: of a few things in a new order none may ever be sampled whole, and nothing be learnt
        outcome = sum(map(operator.eq, got, truth)) / len(truth)
    elif kind == "number":
        tolerance = Fraction(str(meta.get("tolerance", 0)))
        near = Fraction(str(meta.get("near", 0)))
        distance = abs(got - truth)
        right = distance <= tolerance * abs(truth)
        # ours, as above: what is farther off than another answer of its group is pushed away from
        outcome = right or near / (1 + distance)
    elif kind == "point":
        outcome = right = all_hit(got, truth, meta)
    elif kind in COORDINATES and got and truth:
        outcome = iou(got, truth, meta)
        right = outcome >= 0.5
        if kind == "box":
            right = right and len(got) == len(truth)
        else:
            outcome *= nearness(got, truth, meta.get("duration"))
    return float(outcome), float(right)


def score(text: str | None, meta: dict) -> float:
    """1 for the right value alone in the form that was asked for, else 0."""
    return verify(text, meta, strict=True)[1]


def grade(text: str, meta: dict) -> float:
    """IoU of boxes or intervals (0 where their number is wrong); character error rate of a text."""
    if meta["verifier"] == "text":
        truth = normal(meta["answer"])
        return edit_distance(normal(text), truth) / max(1, len(truth))
    got, truth = read(text, meta, strict=True), read(meta["answer"], meta)
    return iou(got, truth, meta) if got and len(got) == len(truth) else 0.0


def read(text: str, meta: dict, strict: bool = False):
    """The one value of an answer, in its verifier's terms; None where it names none or several.

    strict: the bare value in the asked form; otherwise wherever the text names it.
    ValueError: unknown verifier.
    """
    kind = meta["verifier"]
    if len(text) > MAX_TEXT:
        return None
    if kind in ("exact", "text"):
        return normal(text)
    if kind in COORDINATES:
        return coordinates(text, kind, strict)
    if kind == "order" and strict:
        return re.split(r"[\s,]+", normal(text))
    if kind == "order":
        text = plain(text)
        return sequence(stated(text) or text, meta) or None
    if strict:
        return bare_number(text) if kind == "number" else normal(text).casefold()
    values = named(text, meta)
    if kind == "number" and not values and text != meta["answer"]:  # a truth "None" is a mistake
        return Fraction(0) if re.search(NOTHING, plain(text)) else None  # "There are no circles."
    return values[0] if len(set(values)) == 1 else None


def named(text: str, meta: dict) -> list:
    """The numbers, options or "yes" and "no" that a text names, in its order."""
    kind = meta["verifier"]
    if kind == "number":
        return numbers(text)
    if kind == "yesno":
        return yes_no(text)
    if kind == "choice":
        return choices(text, meta)
    kinds = "exact, text, choice, yesno, number, order, box, point, interval"
    raise ValueError(f"verifier {kind!r} is none of {kinds}")


# --------------------------------------------------------------------------------------------------
# what all readers share

TAG = r"<\|\w+\|>"  # <|box_start|>

# Pattern: what takes its place, one after the other.
REPLACED = {
    "⁄": "/",  # the slash inside ½
    "[−–]": "-",  # minus and dash
    r"\{,\}": ",",  # 1{,}234
    r"(\d)\s*(?=\\[dt]?frac\b)": r"\1 ",  # 3\frac{1}{2} -> 3 \frac{1}{2}
    r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}": r"\1/\2",  # \frac{1}{2} -> 1/2
    r"\\[dt]?frac\s*(\d)\s*(\d)": r"\1/\2",  # \frac12 -> 1/2
    r"\\(?:text|mathrm|mathbf|textbf|mathit)\s*\{([^{}]*)\}": r" \1 ",  # \text{cm} -> cm
    r"\\(?:times|cdot)\b|[×·]": "*",  # 1.5 \times 10 -> 1.5 * 10
    # Degrees, LaTeX's spaces and brackets, currency: 5^\circ, 1\,234, \left(B\right), \$5, €5
    r"\^\{?\s*\\circ\s*\}?|\\[,!;: ]|\\left\b|\\right\b|\\(?=[%$])|[$€£¥°]": "",
    r"[ \t]+": " ",
}

# What announces an answer: "the answer is", "option: ", "the answer to 2 + 3 is", "答案是", "应选"
STATED = (
    r"(?i)(?:\b(?:answer|option|choice)\b(?: (?:to|of|for)\b[^.;:\n]{0,80}?(?= is\b))?"
    r"|答案|选项|应?选)(?:\s+is\b|是|为)?\s*[:=]?\s*"
)
# What ends it: "B because ..", "B; ..", "B. As .." (but not the point in 2.5)
STATED_END = r"\b(?:because|since)\b|因为|[;\n。；]|[.!?](?=\s|$)"
# What denies the value behind it, with at most a word between: "not ", "isn't the ", "不是"
DENIAL = r"\b(?:not|never|neither|nor|except|rather than|instead of)|n't|不是|不选"
BEFORE = rf"(?i)(?:{DENIAL})[^\w.,:;!?]*(?:\w+[^\w.,:;!?]+)?$"
# .. and the one before it: "A is wrong", "B isn't right"
WRONG = r"wrong|incorrect|false"
AFTER = rf"(?i)\W*(?:is|are|was|seems)(?: (?:{WRONG})|(?: not|n't) (?:right|correct|true|it))\b"


def normal(text: str) -> str:
    """Without what never matters: Unicode forms, white space, a final full stop, tags."""
    text = unicodedata.normalize("NFKC", re.sub(TAG, " ", text))
    return " ".join(text.split()).removesuffix(".").strip()


@lru_cache(1024)  # the options of a question are read again with each response to it
def plain(text: str) -> str:
    """One Unicode form, and no LaTeX around words and numbers. Lines stay."""
    text = re.sub(TAG, " ", text)
    # NFKC would make 32 of 3², and 31/2 of 3½: 3^, 3 ½
    text = re.sub("[⁰¹²³⁴-⁹]", "^", text)
    text = re.sub(r"(?<=\d)([¼-¾⅐-⅞])", r" \1", text)
    text = unicodedata.normalize("NFKC", text)
    for pattern, new in REPLACED.items():
        text = re.sub(pattern, new, text)
    return text.strip()


def stated(text: str) -> str:
    """What the last "the answer is" says, up to its reason or the end of its sentence, or ""."""
    _, *said = re.split(STATED, text)
    return re.split(STATED_END, said[-1])[0].strip() if said else ""


def undenied(matches, text):
    """Those of the places in a text that it does not deny."""
    if not re.search(f"(?i){DENIAL}|{WRONG}", text):
        return matches
    return [
        m
        for m in matches
        if not re.search(BEFORE, text[max(0, m.start() - 30) : m.start()])
        and not re.match(AFTER, text[m.end() : m.end() + 30])
    ]


# --------------------------------------------------------------------------------------------------
# texts


def edit_distance(a: str, b: str) -> int:
    """Characters to insert, delete or replace: Levenshtein's table, a column for each one of b.

    Bit i of an integer is row i (Myers 1999), so 20,000 characters by 20,000 take 0.2 seconds.
    """
    a, b = sorted([a, b], key=len)
    if not a:
        return len(b)
    whole = (1 << len(a)) - 1
    places = defaultdict(int)  # of each character in a
    for row, character in enumerate(a):
        places[character] |= 1 << row
    # Where a cell is 1 more, or 1 less, than the one above it; at first row i costs i.
    more, less = whole, 0
    distance = len(a)  # the last cell of the column
    for character in b:
        equal = places[character]
        kept = (((equal & more) + more) ^ more) | equal  # as good as the left upper neighbour
        # .. than its left neighbour
        right_more = less | (whole & ~(kept | more))
        right_less = more & kept
        distance += (right_more >> len(a) - 1) - (right_less >> len(a) - 1)
        right_more = right_more << 1 | 1  # the row above the first one grows by 1
        right_less = right_less << 1
        kept = equal | less
        more = (right_less | ~(kept | right_more)) & whole
        less = right_more & kept & whole
    return distance


# --------------------------------------------------------------------------------------------------
# choices

LETTERS = "ABCDEFGHIJKLMNOPQRST"
ALONE = r"\W*[A-Za-z]\W*"  # "b", "(B)", "**B**."
# What stands before an option: "It is B", "I think B", "go with B"
LEAD = (
    r"(?i:\b(?:is|be|think|believe|choose|chose|pick|select|say|guess|go(?:ing)? with|so|thus|hence"
    r"|therefore|definitely|probably|likely|maybe|clearly|letter|option|choice|answer)|'s) "
)
# .. and behind it: a sign, the end, "because", but not "B-rated"
BEHIND = r"(?=\s*(?:$|[^\w\s'-]|- )| (?i:because|since|as|is|isn't|not|rather|seems)\b)"
# Signs that capitals are options here: "(A)", "[B]", "*C*", "A. a cat", "A is right", "I take: A"
LETTERED = (
    rf"(?m)[(\[*][A-Z][)\]*]|^[A-Z](?:{BEHIND}|选?项|是)|[,:]\s*[A-Z]\W*$|{LEAD}[A-Z]{BEHIND}"
)
# Signs that small letters are: "(b)", "b) a dog", "b, because it barks", "I choose b"
SMALL = rf"(?m)(?<!\w)[(\[][a-z][)\]]|^[a-z][.):]\s|(?:^|{LEAD})[b-hj-z]{BEHIND}"
SMALL_LETTER = r"(?<![\w'])(?:[b-hj-z]|[ai](?! [a-z]))(?![\w'])"
# A capital that is no part of a word. A and I may be words: "A cat" names no option, "A is" does.
LETTER = (
    r"(?<![A-Za-z0-9'])(?:[B-HJ-Z]|[AI](?! [a-z])|[AI](?= (?:or|and|is|because|since)\b))"
    r"(?![A-Za-z0-9'])"
)
LABEL = r"\(?([a-z])[.):]\s+"  # of an option that says its own letter: "b. dog", "(b) dog"


def folded(text):
    return normal(plain(str(text))).casefold()


def options_of(meta):
    """The letters that name an option, and {text of an option: its value}.

    The letters are "" where the truth is no letter: then the options' texts are the values.
    """
    options = [folded(option) for option in meta.get("choices", [])]
    truth = folded(meta["answer"])
    single = all(len(option) == 1 for option in options)  # A, B, C themselves, or not known
    if not re.fullmatch("[a-z]", truth) or (truth in options and not single):
        return "", dict(zip(options, options))
    if single:
        return "".join(options).upper() or LETTERS[:8], {}
    labels = [re.match(LABEL, option) for option in options]
    if "".join(label[1] for label in labels if label).upper() == LETTERS[: len(options)]:
        options = [option[label.end() :] for option, label in zip(options, labels)]
    return LETTERS[: len(options)], dict(zip(options, LETTERS))


def choices(text, meta):
    """Options that are named and not denied: letters where the truth is one, else folded texts."""
    letters, texts = options_of(meta)
    text = plain(text)
    whole = folded(text)
    if whole in texts:
        return [texts[whole]]
    if not letters and not texts:
        return [whole]  # without known options only equality: else "red or blue" would be red
    said = stated(text)
    region = said or text
    if letters and re.fullmatch(ALONE, region):
        return [letter for letter in region.upper() if letter in letters]
    if letters and re.search(SMALL, region):
        region = re.sub(SMALL_LETTER, lambda letter: letter[0].upper(), region)
    found = []
    if said or re.search(LETTERED, region):
        found += [m for m in re.finditer(LETTER, region) if m[0] in letters]
    by_length = sorted(texts, key=len, reverse=True)  # "top left" before "top"
    pattern = "|".join(map(re.escape, by_length))
    words = re.finditer(rf"(?<![a-z0-9])(?:{pattern})(?![a-z0-9])", region.casefold())
    found = sorted([*found, *filter(re.Match.group, words)], key=re.Match.start)
    return [texts.get(m[0], m[0]) for m in undenied(found, region)]


# --------------------------------------------------------------------------------------------------
# yes and no

YES_NO = {
    "yes": "yes",
    "true": "yes",
    "是": "yes",
    "是的": "yes",
    "no": "no",
    "false": "no",
    "否": "no",
    "不": "no",
    "不是": "no",
}
# Between the clauses of a sentence: any sign but - and ', a new line, "or", "but", ..
CLAUSES = r"[^\w\s'-]+|\n|\b(?:or|and|but|so|is)\b"
THERE_IS_NO = r"\bthere (?:is|are|was|were) no (?!doubt|question|way|denying)"


def yes_no(text):
    """The clauses that are yes or no ("Nothing wrong, yes"), else the first and the last word.

    Those words count where the opposite is not said: "No dog is there" is a no.
    """
    text = plain(text).casefold()
    region = stated(text) or text
    said = known(clause.strip() for clause in re.split(CLAUSES, region))
    words = re.findall(r"[\w']+", region)
    if "no" in said and "yes" in words:  # "No, but yes in a sense"
        return ["no", "yes"]
    if said:
        return said
    if len(set(known(words))) != 1 or "not" in words:
        return []
    if re.search(THERE_IS_NO, region):
        return ["no"]
    return known([words[0], words[-1]])


def known(words):
    return [YES_NO[word] for word in words if word in YES_NO]


# --------------------------------------------------------------------------------------------------
# numbers

# Coordinates and names are no part of a number: <|point_start|>[[1, 2]]<|point_end|> 3
TAGGED = r"(?s)<\|(object_ref|box|point)_start\|>(?:(?!<\|\1_start).)*?<\|\1_end\|>"
BARE = r"[+-]?[0-9]{1,15}(\.[0-9]{1,15})?"  # 5, +5.00, -2.5
# Of "2 + 3 = 5" and of "3 red and 2 blue ones, so 5" only the last side counts,
LAST = r"(?i)=|≈|\\approx\b|\b(?:so(?! far)|therefore|thus|hence|total of)\b|所以|因此|总共|一共"
OR = r"\bor\b|或"  # except in "x = 4 or x = 5"
ASIDE = r"\((?![^()]*\b(?:or|maybe|possibly)\b)(?=[^()]*[^\W\d_])[^()]*\)"  # "(3 red, 2 blue)"
# How an answer without any number says 0: "no circles", "I don't see any", 没有圆形. But not "no
# idea", "no way to tell".
NOTHING = (
    r"(?i)\b(?:none|nobody|no one)\b|(?:\bno|(?:n't|\bnot)(?: \w+)? any) (?!(?:idea|doubt|way|clue"
    r"|answer|info\w*|data|need|more|less|fewer|longer|such|other|image|picture|photo|problem|sure"
    r"|there|it|they|i|we|you|this|that)\b)[a-z]|\bnot any\W*$|没有(?!答案|办法|信息|图|其他)"
)
IRRATIONAL = r"\\[A-Za-z]|[√π]"  # \sqrt{2}, 5\pi
DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"  # 1,234.5, .5
SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "dozen": 12}
SCALES |= {"k": 10**3, "万": 10**4, "亿": 10**8, "": 1}
NUMBER = (
    r"(?<![A-Za-z0-9_.^,/])(?<!\^\{)"  # not in A5, 5.5.5, 10^5, 10^{5}, 1/5
    r"(?P<sign>[+-]?)"
    r"(?:(?P<whole>\d+) (?=\d+ ?/))?"  # the 3 of 3 1/2
    rf"(?P<top>{DIGITS})(?: ?/ ?(?P<bottom>{DIGITS}))?"
    r"(?:(?:[eE]| ?\* ?10\^\{?)(?P<power>[+-]?\d{1,3})\}?)?"  # 1e3, 2 * 10^{4}
    r"(?P<scale>k\b|[万亿]| ?(?i:hundred|thousand|million|billion|dozen)\b|)"  # 1.5k, 2 million
    r"(?!\d|\.\d|,\d| ?/ ?\d|\^|[A-Za-z]+\d|(?:st|nd|rd|th|[xyz])\b)"  # 5,5, 5/2/1, 0x5, 5th, 2x
)


def bare_number(text):
    text = normal(re.sub(TAGGED, " ", text))
    return Fraction(text) if re.fullmatch(BARE, text) else None


def numbers(text):
    """Exact values: 1,234.5, -1/2, 3 1/2, 1.5e3, 2*10^{4}, twenty-one, 3 million, 三个.

    Of an equation those of its last side. Units, currency and % fall away, and what is denied.
    Empty where the text cannot be read.
    """
    text = plain(re.sub(TAGGED, " ", text))
    text = in_digits(stated(text) or text)
    tail = re.split(LAST, text)[-1]
    if re.search(r"\d", tail) and not re.search(OR, text):
        text = tail
    outside = re.sub(ASIDE, " ", text)
    if re.search(r"\d", outside):
        text = outside
    if re.search(IRRATIONAL, text):  # a root is not the number beside it
        return []
    found = list(re.finditer(NUMBER, text))
    try:
        return [value_of(*match.groups()) for match in undenied(found, text)]
    except (ZeroDivisionError, ValueError):  # 1/0; more than 4300 digits, which Python refuses
        return []


@lru_cache(1000)  # a runaway answer repeats its numbers
def value_of(sign, whole, top, bottom, power, scale):
    value = exact(whole or "0") + exact(top) / exact(bottom or "1")
    value *= Fraction(10) ** int(power or 0) * SCALES[scale.strip().lower()]
    return -value if sign == "-" else value


def exact(digits):
    return Fraction(re.sub("[, ]", "", digits))


# --------------------------------------------------------------------------------------------------
# orders


def sequence(text: str, meta: dict) -> list[str]:
    """Its numbers where the truth is only numbers, else the words between commas and arrows."""
    if re.fullmatch(r"[\d\s,]+", meta["answer"]):
        return re.findall(r"\d+", text)
    text = re.sub(r"(?m)^\s*\d+[.)]\s", " ", text)  # a list: "1. cat" and below it "2. dog"
    words = re.split(r"[\s,;>\[\]→-]+", normal(text).casefold())  # [cat, dog] or cat -> dog
    return [word for word in words if word not in ("", "and", "then")]


# --------------------------------------------------------------------------------------------------
# boxes, points and intervals


def coordinates(text, kind, strict):
    """The rows of one <|box_start|>[[1, 2, 3, 4]]<|box_end|>; None where they cannot be read.

    Not strict: of as many of them as there are, or without tags (ours), see bare_rows.
    """
    if not strict and kind != "point" and normal(text).casefold() in ("none", "[]"):
        return []  # nothing is there
    tag, width = COORDINATES[kind]
    start = f"<|{tag}_start|>"
    *parts, _ = text.split(f"<|{tag}_end|>")
    parts = [part.partition(start)[2] for part in parts if start in part]
    if strict and len(parts) != 1:
        return None
    try:
        if not strict and "<|" not in text:
            rows = bare_rows(plain(text), width)
            if rows == [] and kind != "point":
                return rows
        else:
            rows = [json.loads(part) for part in parts]
            if not all(rows):
                return None
            if kind != "interval":  # of which there is one a tag
                rows = sum(rows, [])
    except (ValueError, RecursionError, TypeError):  # TypeError: no list of rows
        return None
    good = rows and len(rows) <= MAX_ROWS and all(is_row(row, kind) for row in rows)
    return rows if good else None


FENCE = r"(?s)```(?:json)?(.*?)```"
KEYS = ("bbox_2d", "point_2d", "bbox", "box", "point")  # of a row in an object, as Qwen writes it
SIGNED = r"[-+]?[\d.]+"
CORNERS = rf"\(({SIGNED}), ?({SIGNED})\),? ?\(({SIGNED}), ?({SIGNED})\)"  # (1,2),(3,4)
IN_BRACKETS = rf"[\[(]\s*({SIGNED}(?:\s*,\s*{SIGNED})+)\s*[\])]"


def bare_rows(text, width):
    """The rows of JSON, also in ```json: [1, 2, 3, 4], lists of such, {"bbox_2d": [1, 2, 3, 4]}.

    Of text that is no JSON the brackets that hold numbers alone: "The box is [1, 2, 3, 4]."
    """
    fenced = re.findall(FENCE, text)
    try:
        return rows_in(json.loads(fenced[0] if len(fenced) == 1 else text))
    except (ValueError, RecursionError):
        if width == 4:
            text = re.sub(CORNERS, r"[\1, \2, \3, \4]", text)
        return [json.loads(f"[{row}]") for row in re.findall(IN_BRACKETS, text)] or None


def rows_in(value):
    """The rows of a JSON value, at any depth."""
    if isinstance(value, dict):
        value = next((value[key] for key in KEYS if key in value), None)
    if not isinstance(value, list) or not any(isinstance(item, (list, dict)) for item in value):
        return [value] if value != [] else []
    return [row for item in value for row in rows_in(item)]


def is_row(row, kind):
    """Whether it is a list of so many numbers, not true, NaN or infinity; an interval in order."""
    _, width = COORDINATES[kind]
    if not isinstance(row, list) or len(row) != width:
        return False
    if not all(type(number) in (int, float) and abs(number) < 1e6 for number in row):
        return False
    return kind != "interval" or row[0] <= row[1]


def iou(got, truth, meta):
    """Intersection over union: of the times that are covered, or the best matching's mean."""
    if meta["verifier"] == "interval":
        end = meta.get("duration")
        return time_iou(np.clip(got, 0, end), np.clip(truth, 0, end))
    edge = 2 * meta.get("size", (1000, 1000))
    ious = box_ious(np.clip(got, 0, edge), np.clip(truth, 0, edge))
    return matched(ious) / max(ious.shape)


def box_ious(a, b):
    """Of boxes (n, 4) with boxes (m, 4) -> (n, m); 0 where one is empty."""
    a = a[:, None]
    # what both cover: the larger left and top, the smaller right and bottom, (n, m) each
    shared = area(np.maximum(a, b), np.minimum(a, b))
    union = area(a, a) + area(b, b) - shared
    return shared / np.where(union > 0, union, 1)


def area(first, last):
    """Between the left and top of boxes (.., 4) and the right and bottom of others."""
    return (last[..., 2:] - first[..., :2]).clip(0).prod(-1)


def matched(gain):
    """The largest sum of gains (n, m) with no row and no column used twice.

    The rows come one by one. Each takes a column from its owner, who takes another, and so on down
    to one who goes without, in the way that gains most (Bellman-Ford): so the rows that came are
    always matched best.
    """
    gain = np.vstack([gain, 0 * gain[0]])  # the last row, number -1, is nobody's
    whole = np.rint(gain * 2**40).astype(int)  # so that ways of equal worth are exactly equal
    owner = np.full(gain.shape[1], -1)  # the row that has a column
    for row in range(len(gain) - 1):
        owners = whole[owner]  # (m, m) what they would gain elsewhere,
        lost = owners.diagonal()  # (m,) and what they give up
        best = whole[row]  # (m,) of all ways to a column
        before = np.full_like(owner, -1)  # the column whose owner takes this one
        while True:
            ways = owners + (best - lost)[:, None]  # (m, m)
            better = ways.max(0) > best
            if not better.any():
                break
            before[better] = ways.argmax(0)[better]
            best = np.maximum(best, ways.max(0))
        column = (best - lost).argmax()
        if best[column] < lost[column]:
            continue  # the row itself goes without
        while before[column] >= 0:
            owner[column] = owner[before[column]]
            column = before[column]
        owner[column] = row
    return float(gain[owner].trace())


def time_iou(a, b):
    """Of the times that intervals (n, 2) and (m, 2) cover."""
    ends = np.unique(np.concatenate([a, b]))
    in_a, in_b = covered(ends, a), covered(ends, b)
    length = np.diff(ends)
    union = length[in_a | in_b].sum()
    return float(length[in_a & in_b].sum() / union) if union else 0.0


def covered(ends, intervals):
    """Which pieces between neighbouring ends (k,) lie in one of the intervals (n, 2)."""
    start, end = intervals.T[..., None]  # (n, 1) each
    return ((start <= ends[:-1]) & (ends[1:] <= end)).any(0)  # (k - 1,)


def nearness(got, truth, duration):
    """Of one interval's ends, 0..1, in a clip of known length: else the whole always earns some."""
    if not duration or len(got) > 1 or len(truth) > 1:
        return 1.0
    got, truth = np.clip([got, truth], 0, duration)  # (1, 2) each
    return (1 - abs(got - truth) / duration).prod()


def all_hit(points, truth, meta):
    """Whether there is one point for each target, matched as boxes are."""
    targets = meta.get("boxes") or ([meta["box"]] if "box" in meta else truth)
    hits = [[hit(point, target) for target in targets] for point in points]
    return matched(np.array(hits)) == len(points) == len(targets)


def hit(point, target):
    """Whether a point lies in a box, or near a point."""
    if len(target) == 2:
        return math.dist(point, target) <= NEAR
    left, top, right, bottom = target
    return left <= point[0] <= right and top <= point[1] <= bottom
