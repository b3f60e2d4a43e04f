r"""What an answer is worth, by rule: the true answer is known, and no model judges.

    verify("The answer is B.", meta)    (outcome 0..1, right 0 or 1), for rewards: wherever the
                                        answer names its value
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
| order    | "2 1 3"                  | the same sequence                                          |
| box      | "[[x1, y1, x2, y2], .."  | as many boxes, and a mean IoU of 0.5 or more               |
| point    | "[[x, y], .."            | one point in each of meta["boxes"], or near each true one  |
| interval | "[start, end]", seconds  | IoU of 0.5 or more                                         |

Boxes and points are in 1/1000 of the picture; boxes in pixels where meta["size"] = [width, height].
meta["duration"] is the length of a clip in seconds. An answer that cannot be read is wrong, and
raises no error; a truth that cannot be read is a ValueError. Nothing in an answer is evaluated.
"""

import json
import re
import unicodedata
from fractions import Fraction

import numpy as np

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
    if kind == "text":
        outcome = likeness(got, truth)
    elif kind == "number":
        tolerance = Fraction(str(meta.get("tolerance", 0)))
        outcome = right = abs(got - truth) <= tolerance * abs(truth)
    elif kind == "point":
        outcome = right = all_hit(got, truth, meta)
    elif kind in COORDINATES and got and truth:
        outcome = iou(got, truth, meta)
        right = outcome >= 0.5
        if kind == "box":
            right = right and len(got) == len(truth)
        else:
            outcome *= nearness(got, truth, meta)
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
    if kind == "order":
        return order(text, meta, strict)
    if strict:
        return bare_number(text) if kind == "number" else normal(text).casefold()
    values = named(text, meta)
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

# NFKC would make 32 of 3², and 31/2 of 3½.
BEFORE_NFKC = (
    (r"[⁰¹²³⁴-⁹]", "^"),  # 3² -> 3^
    (r"(?<=\d)([¼-¾⅐-⅞])", r" \1"),  # 3½ -> 3 ½
    (TAG, " "),
)
AFTER_NFKC = (
    ("⁄", "/"),  # the slash inside ½
    ("[−–]", "-"),  # minus and dash
    (r"\{,\}", ","),  # 1{,}234
    (r"(\d)\s*(?=\\[dt]?frac\b)", r"\1 "),  # 3\frac{1}{2} -> 3 \frac{1}{2}
    (r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2"),  # \frac{1}{2} -> 1/2
    (r"\\(?:text|mathrm|mathbf|textbf|mathit)\s*\{([^{}]*)\}", r" \1 "),  # \text{cm} -> cm
    (r"\\(?:times|cdot)\b|[×·]", "*"),  # 1.5 \times 10 -> 1.5 * 10
    # Degrees, LaTeX's spaces and brackets, and currency: 5^\circ, 1\,234, \left(B\right), \$5, €5
    (r"\^\{?\s*\\circ\s*\}?|\\[,!;: ]|\\left\b|\\right\b|\\(?=[%$])|[$€£¥°]", ""),
    (r"[ \t]+", " "),
)

# What announces an answer: "the answer is", "option: ", "the answer to 2 + 3 is", "答案是", "应选"
STATED = re.compile(
    r"(?:\b(?:answer|option|choice)\b(?: (?:to|of|for)\b[^.;:\n]{0,80}?(?= is\b))?|答案|选项|应?选)"
    r"(?:\s+is\b|是|为)?\s*[:=]?\s*",
    re.I,
)
# What ends it: "B because ..", "B; ..", "B. As .." (but not the point in 2.5)
STATED_END = re.compile(r"\b(?:because|since)\b|因为|[;\n。；]|[.!?](?=\s|$)")
# What denies the value behind it, with at most a word between: "not ", "isn't the ", "不是"
NOT = re.compile(
    r"(?:\b(?:not|never|neither|nor|except)|n't|不是|不选)[^\w.,:;!?]*(?:\w+[^\w.,:;!?]+)?$", re.I
)


def normal(text: str) -> str:
    """Without what never matters: Unicode forms, white space, a final full stop, tags."""
    text = unicodedata.normalize("NFKC", re.sub(TAG, " ", text))
    return " ".join(text.split()).removesuffix(".").strip()


def plain(text: str) -> str:
    """One Unicode form, and no LaTeX around words and numbers. Lines stay."""
    for pattern, new in BEFORE_NFKC:
        text = re.sub(pattern, new, text)
    text = unicodedata.normalize("NFKC", text)
    for pattern, new in AFTER_NFKC:
        text = re.sub(pattern, new, text)
    return text.strip()


def stated(text: str) -> str:
    """What the last "the answer is" says, up to its reason or the end of its sentence, or ""."""
    parts = STATED.split(text)
    return STATED_END.split(parts[-1])[0].strip() if len(parts) > 1 else ""


def denied(text, at):
    """Whether a "not" stands before the value at this place."""
    return NOT.search(text[max(0, at - 30) : at])


# --------------------------------------------------------------------------------------------------
# texts


def likeness(got, truth):
    """1 - edit distance / the longer length."""
    if len(got) > 4 * len(truth) + 100:  # ours: far too long
        return 0.0
    return 1 - edit_distance(got, truth) / max(1, len(got), len(truth))


def edit_distance(a: str, b: str) -> int:
    """Characters to insert, delete or replace: Levenshtein's table, a row for each one of a."""
    codes = np.array([ord(c) for c in b])
    columns = np.arange(len(b) + 1)
    row = columns
    for character in a:
        replaced = row[:-1] + (codes != ord(character))
        row = row + 1  # deleted
        row[1:] = np.minimum(row[1:], replaced)
        # Inserted: a cell costs 1 more than its left neighbour, k more than the one k to the left.
        row = np.minimum.accumulate(row - columns) + columns
    return int(row[-1])


# --------------------------------------------------------------------------------------------------
# choices

LETTERS = "ABCDEFGHIJKLMNOPQRST"
ALONE = re.compile(r"\W*([A-Za-z])\W*")  # "b", "(B)", "**B**."
# Signs that capitals are options here: "(A)", "[B]", "*C*", "A. a cat", "A is right", "I take: A"
LETTERED = re.compile(r"[(\[*][A-Z][)\]*]|^[A-Z](?:[.):,]| is\b)|[,:]\s*[A-Z]\W*$")
# A capital that is no part of a word. A and I may be words: "A cat" names no option, "A is" does.
LETTER = re.compile(
    r"(?<![A-Za-z0-9'])(?:[B-HJ-Z]|[AI](?! [a-z])|[AI](?= (?:or|and|is)\b))(?![A-Za-z0-9'])"
)


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
    if options and single:
        return "".join(options).upper(), {}
    letters = LETTERS[: len(options) or 8]
    return letters, dict(zip(options, letters))


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
    alone = ALONE.fullmatch(region)
    if letters and alone:  # a small letter counts only here
        return [letter for letter in alone[1].upper() if letter in letters]
    found = []  # (place, value)
    if letters and (said or LETTERED.search(region)):
        found += [(m.start(), m[0]) for m in LETTER.finditer(region) if m[0] in letters]
    if texts:
        by_length = sorted(texts, key=len, reverse=True)  # "top left" before "top"
        pattern = "|".join(map(re.escape, by_length))
        words = re.finditer(rf"(?<![a-z0-9])(?:{pattern})(?![a-z0-9])", region.casefold())
        found += [(m.start(), texts[m[0]]) for m in words if m[0]]
    return [value for at, value in sorted(found) if not denied(region, at)]


# --------------------------------------------------------------------------------------------------
# yes and no

YES_NO = {
    **dict.fromkeys(("yes", "true", "是", "是的"), "yes"),
    **dict.fromkeys(("no", "false", "否", "不是"), "no"),
}
# Between the clauses of a sentence: any sign but - and ', a new line, "or", "but", ..
CLAUSES = re.compile(r"[^\w\s'-]+|\n|\b(?:or|and|but|so|is)\b")


def yes_no(text):
    """The clauses that are yes or no ("Nothing wrong, yes"), else the first and the last word.

    Those words count where the opposite is not said: "No dog is there" is a no.
    """
    text = plain(text).casefold()
    region = stated(text) or text
    clauses = [clause.strip() for clause in CLAUSES.split(region)]
    said = [YES_NO[clause] for clause in clauses if clause in YES_NO]
    if said:
        return said
    words = re.findall(r"[\w']+", region)
    meant = {YES_NO[word] for word in words if word in YES_NO}
    if len(meant) != 1 or "not" in words:
        return []
    return [YES_NO[word] for word in (words[0], words[-1]) if word in YES_NO]


# --------------------------------------------------------------------------------------------------
# numbers

# Coordinates and names are no part of a number: <|point_start|>[[1, 2]]<|point_end|> 3
TAGGED = re.compile(r"<\|(object_ref|box|point)_start\|>.*?<\|\1_end\|>", re.S)
BARE = re.compile(r"[+-]?[0-9]{1,15}(\.[0-9]{1,15})?")  # 5, +5.00, -2.5
EQUALS = re.compile(r"=|≈|\\approx\b")  # of "2 + 3 = 5" only the last side counts
OR = re.compile(r"\bor\b|或")  # except in "x = 4 or x = 5"
IRRATIONAL = re.compile(r"\\[A-Za-z]|[√π]")  # \sqrt{2}, 5\pi
DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)"  # 1,234.5, 12, .5
NUMBER = re.compile(
    r"(?<![A-Za-z0-9_.^,/])(?<!\^\{)"  # not in A5, 5.5.5, 10^5, 10^{5}, 1/5
    r"(?P<sign>[+-]?)"
    r"(?:(?P<whole>\d+) (?=\d+ ?/))?"  # the 3 of 3 1/2
    rf"(?P<top>{DIGITS})(?: ?/ ?(?P<bottom>{DIGITS}))?"
    r"(?:(?:[eE]| ?\* ?10\^\{?)(?P<power>[+-]?\d{1,3})\}?)?"  # 1e3, 2 * 10^{4}
    r"(?!\d|\.\d|,\d| ?/ ?\d|\^|[A-Za-z]+\d)"  # nor in 5,5, 5.5.5, 5/2/1, 5^2, 0x5
)


def bare_number(text):
    text = normal(TAGGED.sub(" ", text))
    return Fraction(text) if BARE.fullmatch(text) else None


def numbers(text):
    """Exact values: 1,234.5, -1/2, 3 1/2, 1.5e3, 2*10^{4}; of an equation those of its last side.

    Units, currency and % fall away, and what is denied. Empty where the text cannot be read.
    """
    text = plain(TAGGED.sub(" ", text))
    text = stated(text) or text
    tail = EQUALS.split(text)[-1]
    if re.search(r"\d", tail) and not OR.search(text):
        text = tail
    if IRRATIONAL.search(text):  # a root is not the number beside it
        return []
    found = [match for match in NUMBER.finditer(text) if not denied(text, match.start())]
    try:
        return [value_of(match) for match in found]
    except (ZeroDivisionError, ValueError):  # 1/0; more than 4300 digits, which Python refuses
        return []


def value_of(match):
    value = exact(match["whole"] or "0") + exact(match["top"]) / exact(match["bottom"] or "1")
    value *= Fraction(10) ** int(match["power"] or 0)
    return -value if match["sign"] == "-" else value


def exact(digits):
    return Fraction(digits.replace(",", ""))


# --------------------------------------------------------------------------------------------------
# orders


def order(text, meta, strict):
    if strict:
        return re.split(r"[\s,]+", normal(text))
    text = plain(text)
    return sequence(stated(text) or text, meta) or None


def sequence(text: str, meta: dict) -> list[str]:
    """Its numbers where the truth is only numbers, else the words between commas and arrows."""
    if re.fullmatch(r"[\d\s,]+", meta["answer"]):
        return re.findall(r"\d+", text)
    words = re.split(r"[\s,;>\[\]→-]+", normal(text).casefold())  # [cat, dog] or cat -> dog
    return [word for word in words if word]


# --------------------------------------------------------------------------------------------------
# boxes, points and intervals


def coordinates(text, kind, strict):
    """The rows of one <|box_start|>[[1, 2, 3, 4]]<|box_end|>; None where they cannot be read.

    Not strict: of as many of them as there are, or of JSON without tags (ours).
    """
    if not strict and kind != "point" and normal(text).casefold() in ("none", "[]"):
        return []  # nothing is there
    tag, width = COORDINATES[kind]
    parts = re.findall(rf"<\|{tag}_start\|>(.*?)<\|{tag}_end\|>", text, re.S)
    if strict and len(parts) != 1:
        return None
    untagged = not strict and "<|" not in text
    if untagged:
        text = plain(text)
        parts = [text if text.startswith("[[") else f"[{text}]"]
    rows = []
    for part in parts:
        try:
            found = json.loads(part)
        except (ValueError, RecursionError):
            return None
        if kind == "interval" and not untagged:
            found = [found]  # one a tag
        if not isinstance(found, list) or not found:
            return None
        rows += found
    if not all(is_row(row, width) for row in rows):
        return None
    if kind == "interval" and any(start > end for start, end in rows):
        return None
    return rows if 0 < len(rows) <= MAX_ROWS else None


def is_row(row, width):
    """Whether it is a list of so many numbers, neither true, NaN nor infinity."""
    if not isinstance(row, list) or len(row) != width:
        return False
    return all(type(number) in (int, float) and abs(number) < 1e6 for number in row)


def iou(got, truth, meta):
    """Intersection over union: of the times that are covered, or the best matching's mean."""
    a, b = inside(got, meta), inside(truth, meta)
    if meta["verifier"] == "interval":
        return time_iou(a, b)
    return matched(box_ious(a, b)) / max(len(a), len(b))


def inside(rows, meta):
    """The boxes cut to the picture (n, 4), or the intervals to the clip (n, 2)."""
    if meta["verifier"] == "interval":
        return np.clip(rows, 0, meta.get("duration"))
    return np.clip(rows, 0, 2 * meta.get("size", (1000, 1000)))


def box_ious(a, b):
    """Of boxes (n, 4) with boxes (m, 4) -> (n, m); 0 where one is empty."""
    low = np.maximum(a[:, None, :2], b[:, :2])  # (n, m, 2)
    high = np.minimum(a[:, None, 2:], b[:, 2:])
    shared = area(np.concatenate([low, high], -1))
    union = area(a)[:, None] + area(b) - shared
    return shared / np.where(union > 0, union, 1)


def area(boxes):
    return (boxes[..., 2:] - boxes[..., :2]).clip(0).prod(-1)


def matched(gain):
    """The largest sum of gains (n, m) with no row and no column used twice.

    The rows come one by one. Each takes a column from its owner, who takes another, and so on down
    to a free one, in the way that gains most (Bellman-Ford): after k rows the k are matched best.
    """
    if len(gain) > len(gain[0]):
        gain = gain.T
    whole = np.rint(gain * 2**40).astype(int)  # so that ways of equal worth are exactly equal
    owner = np.full(gain.shape[1], -1)  # the row that has a column; -1: free
    for row in range(len(gain)):
        taken = np.flatnonzero(owner >= 0)  # (k,)
        owners = whole[owner[taken]]  # (k, m) what they would gain elsewhere,
        lost = owners[np.arange(len(taken)), taken]  # (k,) and what they give up
        best = whole[row]  # (m,) of all ways to a column
        before = np.full_like(best, -1)  # the column whose owner takes this one
        while len(taken):
            ways = owners + (best[taken] - lost)[:, None]  # (k, m)
            better = ways.max(0) > best
            if not better.any():
                break
            before[better] = taken[ways.argmax(0)][better]
            best = np.maximum(best, ways.max(0))
        column = np.where(owner < 0, best, -1).argmax()
        while before[column] >= 0:
            owner[column] = owner[before[column]]
            column = before[column]
        owner[column] = row
    used = np.flatnonzero(owner >= 0)
    return float(gain[owner[used], used].sum())


def time_iou(a, b):
    """Of the times that intervals (n, 2) and (m, 2) cover."""
    ends = np.unique(np.concatenate([a, b]))
    length = np.diff(ends)  # of the pieces between neighbouring ends
    middle = (ends[1:] + ends[:-1]) / 2
    in_a, in_b = covered(middle, a), covered(middle, b)
    union = length[in_a | in_b].sum()
    return float(length[in_a & in_b].sum() / union) if union else 0.0


def covered(times, intervals):
    """Which of these times (k,) lie in one of the intervals (n, 2) -> (k,)."""
    times = times[:, None]
    return ((intervals[:, 0] < times) & (times < intervals[:, 1])).any(1)


def nearness(got, truth, meta):
    """Of one interval's ends, 0..1, in a clip of known length: else the whole always earns some."""
    duration = meta.get("duration")
    if not duration or len(got) > 1 or len(truth) > 1:
        return 1.0
    distance = abs(inside(got, meta) - inside(truth, meta))  # (1, 2)
    return (1 - distance / duration).prod()


def all_hit(points, truth, meta):
    """Whether there is one point for each target, matched as boxes are."""
    targets = meta.get("boxes") or ([meta["box"]] if "box" in meta else truth)
    points, targets = np.array(points)[:, None], np.array(targets)  # (n, 1, 2), (m, 2 or 4)
    if targets.shape[1] == 4:
        hits = ((targets[:, :2] <= points) & (points <= targets[:, 2:])).all(-1)  # (n, m)
    else:
        hits = np.linalg.norm(points - targets, axis=-1) <= NEAR
    return matched(hits.astype(float)) == len(points) == len(targets)
