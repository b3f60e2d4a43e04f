"""The toy world tells the truth: all answers are derived again, from pixels, frames or questions.

Nothing of the drawing code is used for that but the names and values of colours and shapes.
"""

import json
import random
import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import av
import numpy as np
import pytest
import tiktoken
from PIL import Image

import toyworld.__main__
import toyworld.world
from common import sandbox
from common.rewards import parse
from common.tokenizer import PATTERN
from common.verifiers import score, verify
from conftest import ROOT
from tools.train_vocab import train_vocab
from toyworld import SIZES, draw_unit, make_world
from toyworld.discover import DISCOVER
from toyworld.drawing import COLOUR_NAMES, COLOURS, PLACES, SHAPES, Paper, Thing
from toyworld.instructions import INSTRUCT
from toyworld.pictures import look_box
from toyworld.unit import PLURAL, is_heldout

SINGULAR = {plural: shape for shape, plural in PLURAL.items()}
NAME = rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
THING = rf"an? {NAME}"
COLD_START = ("think", "no_think", "agentic", "clips")
UNTAUGHT = ("discover", "premise", "preferences")  # files that show nobody how to answer
TINY = {"pictures": 10, "clips": 2, "heldout": 0, "progress": False}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy") / "world"
    make_world(out, pictures=400, clips=60, heldout=20, workers=1, progress=False)
    return out


# ------------------------------------------------------------------------------------ reading


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def kind_of(meta):
    """The file of pre-training that asks such questions."""
    if meta["category"] != "ocr_vqa":
        return meta["category"]
    return "ocr" if meta["task"] in ("read", "text_colour", "text_length") else "vqa"


def lines(world, split, name):
    """A file's lines; of train also the single questions of that kind, which must be as true."""
    found = read(world / split / f"{name}.jsonl")
    if split == "train":
        questions = read(world / split / "questions.jsonl")
        found += [record for record in questions if kind_of(record["meta"]) == name]
    return found


def both(world, name):
    """(split, line) of a kind, of both splits."""
    return [(split, line) for split in ("train", "heldout") for line in lines(world, split, name)]


def text_of(content):
    if isinstance(content, str):
        return content
    return "".join(item.get("text", "") for item in content)


def turns(record):
    """[(question's text, reply)] of a conversation."""
    texts = [text_of(message["content"]) for message in record["messages"]]
    return list(zip(texts[0::2], texts[1::2]))


def media(record, kind):
    found = []
    for message in record["messages"]:
        if isinstance(message["content"], list):
            found += [item for item in message["content"] if item["type"] == kind]
    return found


def words_of(text):
    return re.findall(r"\w+", text)


def counted_shapes(question):
    """The shapes that a question names in the plural."""
    return [SINGULAR[word] for word in words_of(question) if word in SINGULAR]


# ------------------------------------------------------------------------------------- seeing


def pixels(world, split, item):
    return np.asarray(Image.open(world / split / item["image"]).convert("RGB"))


def colour_map(array, near=75):
    """(H, W): index of the nearest colour, -1 where none is near."""
    array = array.astype(np.float32)
    colours = np.array(list(COLOURS.values()), np.float32)
    squares = (array * array).sum(-1, keepdims=True) + (colours * colours).sum(-1)
    distance = squares - 2 * array @ colours.T  # (H, W, 8), squared
    return np.where(distance.min(-1) < near**2, distance.argmin(-1), -1)


def frames(world, split, item):
    """[(seconds, (H, W) colour map)] of a clip."""
    with av.open(str(world / split / item["video"])) as container:
        decoded = [(f.time, f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
    return [(time, colour_map(array, near=85)) for time, array in decoded]


STENCILS = {  # what the shapes look like in their bounding box
    "circle": "..####.. .######. ######## ######## ######## ######## .######. ..####..",
    "square": "######## ######## ######## ######## ######## ######## ######## ########",
    "triangle": "...##... ...##... ..####.. ..####.. .######. .######. ######## ########",
    "star": "...##... ...##... ..####.. ######## .######. ..####.. ..####.. .##..##.",
    "cross": "...##... ...##... ...##... ######## ######## ...##... ...##... ...##...",
    "ring": "..####.. .######. ###..### ##....## ##....## ###..### .######. ..####..",
}


def boxed(image):
    """(8, 8) in 0..1: the picture's set pixels, their bounding box shrunk."""
    small = image.crop(image.getbbox()).resize((8, 8), Image.Resampling.BOX)
    return np.asarray(small, float) / 255


def turned_stencils():
    """(shape, stencil): the drawn ones are turned a little."""
    for shape, rows in STENCILS.items():
        stencil = np.array([[255 * (c == "#") for c in row] for row in rows.split()], np.uint8)
        image = Image.fromarray(stencil).resize((64, 64), Image.Resampling.BILINEAR)
        image = image.point(lambda v: 255 * (v > 127))
        for degrees in (-6, -3, 0, 3, 6):
            yield shape, boxed(image.rotate(degrees, expand=True))


TURNED = list(turned_stencils())


def shape_of(mask):
    seen = boxed(Image.fromarray(mask.astype(np.uint8) * 255))
    differences = [(np.abs(seen - stencil).sum(), shape) for shape, stencil in TURNED]
    return min(differences)[1]


def masks(array, grid=3):
    """{place: (colour, shape, mask of the whole picture)} seen in the pixels."""
    found = {}
    h, w = array.shape[:2]
    seen = colour_map(array)
    places = PLACES if grid == 3 else PLACES[::2][:2] + PLACES[6::2]
    for k, place in enumerate(places):
        row, column = divmod(k, grid)
        rows = slice(row * h // grid, (row + 1) * h // grid)
        columns = slice(column * w // grid, (column + 1) * w // grid)
        cell = seen[rows, columns]
        count = np.bincount(cell[cell >= 0], minlength=len(COLOURS))
        if count.max() > 25:
            mask = np.zeros((h, w), bool)
            mask[rows, columns] = cell == count.argmax()
            found[place] = (COLOUR_NAMES[count.argmax()], shape_of(mask), mask)
    return found


def look(array, grid=3):
    """{place: (colour, shape)} seen in the pixels."""
    return {place: (c, s) for place, (c, s, _) in masks(array, grid).items()}


def scene_of(world, split, record):
    return look(pixels(world, split, media(record, "image")[0]))


def extent(mask):
    """x1, y1, x2, y2 of the set pixels, the last ones included."""
    ys, xs = np.nonzero(mask)
    return xs.min(), ys.min(), xs.max() + 1, ys.max() + 1


# ------------------------------------------------------------------------------ understanding


def described(caption):
    """{place: (colour, shape)} that a caption tells."""
    assert caption[0] == "A" and caption.endswith(".")
    scene = {}
    for part in f"a{caption[1:-1]}".split(", "):
        colour, shape, place = re.fullmatch(rf"{THING} at the ([a-z ]+)", part).groups()
        scene[place] = (colour, shape)
    return scene


def only(found):
    [value] = found
    return value


def walked(scene, start, path):
    """The shape that one reaches from a place, by the last word of the path first."""
    row, column = divmod(PLACES.index(start), 3)
    for step in reversed(re.findall("right of|left of|below|above", path)):
        row += (step == "below") - (step == "above")
        column += (step == "right of") - (step == "left of")
        assert 0 <= row < 3 and 0 <= column < 3
    return scene[PLACES[3 * row + column]][1]


def answer(question, scene):
    """The answer to a question about {place: (colour, shape)}, by rules of its own."""
    things = list(scene.values())
    shapes = [shape for _, shape in things]
    if q := re.fullmatch(r"What (colour|shape) is the object at the ([a-z ]+)\?", question):
        return scene[q[2]][q[1] == "shape"]
    if q := re.fullmatch(r"What colour is the (\w+)\?", question):
        return only(c for c, s in things if s == q[1])
    if q := re.fullmatch(r"What shape is the (\w+) object\?", question):
        return only(s for c, s in things if c == q[1])
    if question == "How many objects are there?":
        return str(len(things))
    if q := re.fullmatch(r"How many (\w+) objects are there\?", question):
        return str(sum(c == q[1] for c, _ in things))
    if q := re.fullmatch(r"How many (\w+) are there\?", question):
        return str(shapes.count(SINGULAR[q[1]]))
    if q := re.fullmatch(rf"Where is the {NAME}\?", question):
        return only(place for place, thing in scene.items() if thing == q.groups())
    if q := re.fullmatch(rf"Is there {THING}\?", question):
        return "yes" if q.groups() in things else "no"
    if re.fullmatch(r"How many (\w+) and (\w+) are there together\?", question):
        return str(sum(shapes.count(shape) for shape in counted_shapes(question)))
    if re.fullmatch(r"Are there more (\w+) than (\w+)\?", question):
        a, b = [shapes.count(shape) for shape in counted_shapes(question)]
        return "yes" if a > b else "no"
    q = re.fullmatch(rf"What shape is (.*)the {NAME}\?", question)
    start = only(place for place, thing in scene.items() if thing == (q[2], q[3]))
    return walked(scene, start, q[1])


# ----------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_questions_and_captions_agree_with_the_pixels(world, split):
    records = lines(world, split, "caption") + lines(world, split, "vqa")
    records += lines(world, split, "reasoning")
    if split == "train":
        records += lines(world, split, "pairs")
    checked = 0
    for record in records:
        if record.get("meta", {}).get("task") == "drawn_arithmetic":
            continue
        scene = scene_of(world, split, record)
        for question, reply in turns(record):
            if question in ("", "Describe the picture."):
                assert described(reply) == scene
                assert list(described(reply)) == sorted(scene, key=PLACES.index)
            else:
                assert answer(question, scene) == reply, question
            checked += 1
    assert checked >= 200


def check_box(reply, hits, size):
    [box] = json.loads(re.search(r"<\|box_start\|>(.*)<\|box_end\|>$", reply)[1])
    [mask] = hits
    assert all(0 <= v < 1000 for v in box)
    differences = np.array(box) * size / 1000 - extent(mask)
    assert np.abs(differences).max() < 3, box


def check_points(reply, hits, size):
    """-> "point", or "count" where the number is said too."""
    form = r"<\|point_start\|>(.*)<\|point_end\|>(?: (\d))?$"
    points, count = re.search(form, reply).groups()
    points = json.loads(points)
    assert len(points) == len(hits) == int(count or 1)
    for (x, y), mask in zip(points, hits):
        x1, y1, x2, y2 = extent(mask)
        assert x1 <= x * size[0] / 1000 < x2 and y1 <= y * size[1] / 1000 < y2
    return "count" if count else "point"


def test_grounding_agrees_with_the_pixels(world):
    kinds = Counter()
    for split, record in both(world, "grounding"):
        array = pixels(world, split, media(record, "image")[0])
        h, w = array.shape[:2]
        scene = masks(array)
        for question, reply in turns(record):
            if "the picture" in question:
                continue
            name = re.match(r"<\|object_ref_start\|>(.*?)<\|object_ref_end\|>", reply)[1]
            hits = []
            for colour, shape, mask in scene.values():
                if name in (f"{colour} {shape}", f"{colour} objects", PLURAL[shape]):
                    hits.append(mask)
            if "<|box_start|>" in reply:
                check_box(reply, hits, [w, h, w, h])
                kinds["box"] += 1
            else:
                kinds[check_points(reply, hits, [w, h])] += 1
    assert min(kinds.values()) > 20 and len(kinds) == 3


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_interleaved_agrees_with_the_pixels(world, split):
    tasks = Counter()
    for record in lines(world, split, "interleaved"):
        items = media(record, "image")
        scenes = [look(pixels(world, split, item), grid=2) for item in items]
        for question, reply in turns(record):
            if q := re.search(rf"Which picture shows {THING}\?", question):
                showing = [k for k, scene in enumerate(scenes, 1) if q.groups() in scene.values()]
                assert showing == [int(reply)]
                tasks["which"] += 1
            elif q := re.search(r"Describe picture (\d)\.", question):
                assert described(reply) == scenes[int(q[1]) - 1]
            else:
                captions = re.findall(r"Picture \d:  ?(An? [^.]*\.)", question)
                assert [described(caption) for caption in [*captions, reply]] == scenes
                tasks["story"] += 1
    assert min(tasks["which"], tasks["story"]) >= 20


def test_drawn_texts_are_large_and_of_the_named_colour(world):
    for record in lines(world, "heldout", "ocr"):
        meta = record["meta"]
        if meta["task"] == "read":
            assert turns(record)[0][1] == f"<|ocr_text_start|>{meta['answer']}<|ocr_text_end|>"
        if meta["task"] != "text_colour":
            continue
        seen = colour_map(pixels(world, "heldout", media(record, "image")[0]))
        assert COLOUR_NAMES[np.bincount(seen[seen >= 0]).argmax()] == meta["answer"]
        h, w = seen.shape
        x1, y1, x2, y2 = extent(seen >= 0)
        assert max((x2 - x1 - 1) / w, (y2 - y1 - 1) / h) > 0.5
        assert x1 > 0 and y1 > 0 and x2 < w and y2 < h


# -------------------------------------------------------------------------------------- clips


def centre(seen, colour):
    """(x, y) of a colour's pixels; None where there are few."""
    ys, xs = np.nonzero(seen == COLOUR_NAMES.index(colour))
    return (xs.mean(), ys.mean()) if len(xs) > 25 else None


def direction(first, last):
    dx = last[0] - first[0]
    dy = last[1] - first[1]
    if abs(dx) > abs(dy):
        return "right" if dx > 0 else "left"
    return "down" if dy > 0 else "up"


def main_colour(seen):
    return COLOUR_NAMES[np.bincount(seen[seen >= 0]).argmax()]


def movement(clip):
    """The way of the only thing in a clip [(seconds, colour map)], from first to last frame."""
    colour = main_colour(clip[0][1])
    return direction(centre(clip[0][1], colour), centre(clip[-1][1], colour))


def check_motion(q, reply, clips, record):
    path = [centre(seen, q[1]) for _, seen in clips[0]]
    assert direction(path[0], path[-1]) == reply
    assert direction(path[0], path[len(path) // 2]) == reply


def check_order(q, reply, clips, record):
    names = {f"{q[2]} {q[3]}": q[2], f"{q[4]} {q[5]}": q[4]}
    if q[2] == q[4]:
        return  # two things of one colour: not told apart here
    starts = {}
    for name, colour in names.items():
        starts[name] = next(time for time, seen in clips[0] if centre(seen, colour))
    first_or_last = min if q[1] == "first" else max
    assert first_or_last(starts, key=starts.get) == reply


def times_visible(clip):
    return [time for time, seen in clip if (seen >= 0).sum() > 60]


def check_start(q, reply, clips, record):
    assert abs(min(times_visible(clips[0])) - float(reply)) < 0.06


def check_event(q, reply, clips, record):
    form = (
        r"<\|clip_time_start\|>\[([\d.]+), ([\d.]+)\]<\|clip_time_end\|> "
        rf"an? {q[1]} is visible"
    )
    start, end = map(float, re.fullmatch(form, reply).groups())
    visible = times_visible(clips[0])
    step = 1 / media(record, "video")[0]["fps_source"]
    assert abs(min(visible) - start) < 0.06
    assert abs(max(visible) + step - end) < 0.06

    # A reader that takes the last or the nearest frame at 0, 0.5, 1.0 ... sees just the interval.
    times = [time for time, _ in clips[0]]
    for moment in np.arange(0, times[-1], 0.5):
        last = max(time for time in times if time <= moment + 1e-6)
        nearest = min(times, key=lambda time: abs(time - moment))
        expected = start <= moment < end
        assert (last in visible) == (nearest in visible) == expected


def check_match(q, reply, clips, record):
    reference, *ways = [movement(clip) for clip in clips]
    assert ways[int(reply) - 1] == reference != ways[2 - int(reply)]


CLIP_CHECKS = {
    rf"Which way does the {NAME} move\?": check_motion,
    rf"Which appears (first|last), the {NAME} or the {NAME}\?": check_order,
    r"When does the (\w+) appear\?": check_start,
    r"When is the (\w+) visible\?": check_event,
    r"Which clip moves like the reference\?": check_match,
}


def check_clip_caption(question, reply, clips, record):
    if q := re.fullmatch(rf"An? {NAME} moves (\w+)\.", reply):
        assert movement(clips[int("clip 1" in question)]) == q[3]
    elif q := re.fullmatch(rf"An? {NAME} appears, then {THING}\.", reply):
        text = str(record["messages"])
        assert f"{q[1]} {q[2]}" in text and f"{q[3]} {q[4]}" in text
    elif q := re.fullmatch(rf"An? {NAME} is visible from ([\d.]+) to [\d.]+ seconds\.", reply):
        assert abs(min(times_visible(clips[0])) - float(q[3])) < 0.06
    else:
        assert question.endswith("What moves?") and reply.split()[0] == main_colour(clips[0][0][1])


def check_reorder(world, split, record):
    question, reply = turns(record)[0]
    colour, _, move = re.search(rf"An? {NAME} moves (\w+)\.", question).groups()
    places = []
    for item in media(record, "image"):
        places.append(centre(colour_map(pixels(world, split, item), near=85), colour))
    order = [int(k) - 1 for k in reply.split()]
    assert sorted(order) == list(range(len(places)))
    for i, k in zip(order, order[1:]):
        assert direction(places[i], places[k]) == move


def decoded(world, split, item, cache={}):
    """The item's frames, whose times and sizes are as the item says."""
    key = (split, item["video"])
    if key not in cache:
        cache[key] = frames(world, split, item)
        times = [time for time, _ in cache[key]]
        assert cache[key][0][1].shape == (item["height"], item["width"])
        assert times[0] == 0 and len(times) == round(item["duration"] * item["fps_source"])
        assert np.allclose(np.diff(times), 1 / item["fps_source"], atol=2e-3)
    return cache[key]


def test_clips_agree_with_their_decoded_frames(world):
    kinds = Counter()
    for split, record in both(world, "video"):
        if media(record, "image"):
            check_reorder(world, split, record)
            kinds["reorder"] += 1
            continue
        clips = [decoded(world, split, item) for item in media(record, "video")]
        for question, reply in turns(record):
            for form, check in CLIP_CHECKS.items():
                if q := re.search(form, question):
                    check(q, reply, clips, record)
                    kinds[check.__name__] += 1
                    break
            else:
                check_clip_caption(question, reply, clips, record)
                kinds["caption"] += 1
    assert len(kinds) == 7 and min(kinds.values()) >= 10, kinds


# -------------------------------------------------------------------------- texts, reasoning


def text_answer(question):
    if q := re.fullmatch(r"What is (\d+) ([+-]) (\d+)\?", question):
        return str(int(q[1]) + int(q[2] + q[3]))
    if q := re.fullmatch(r"Sort ([\d ]+)\.", question):
        return " ".join(sorted(q[1].split()))
    if q := re.fullmatch(r"Copy: (.*)", question):
        return q[1]
    if q := re.fullmatch(r"(.*)\. How often is (\w+)\?", question):
        return str(q[1].split().count(q[2]))
    caption, question = re.fullmatch(r"(.*?\.) (.*\?)", question).groups()
    return answer(question, described(caption))


def test_text_answers(world):
    kinds = Counter()
    for _, record in both(world, "text"):
        for question, reply in turns(record):
            assert reply == text_answer(question), question
            kinds[question.split()[0]] += 1
    assert min(kinds["What"], kinds["Sort"], kinds["Copy:"]) > 20


def check_reasoning_step(step, record, scene):
    true = record["meta"]["answer"]
    if q := re.fullmatch(r"(\d+) ([+-]) (\d+) = (\d+)", step):
        assert int(q[1]) + int(q[2] + q[3]) == int(q[4])
    elif q := re.fullmatch(r"(\w+) (\d) ([<=>]) (\w+) (\d)", step):
        a, b = int(q[2]), int(q[5])
        assert {"<": a < b, "=": a == b, ">": a > b}[q[3]]
        assert (true == "yes") == (a > b)
    elif q := re.fullmatch(r"(\w+) (\d) \+ (\w+) (\d) = (\d)", step):
        assert int(q[2]) + int(q[4]) == int(q[5]) == int(true)
    elif q := re.fullmatch(rf".*?{NAME}(?::| at the) ([a-z ]+)", step):
        assert scene[q[3].strip()] == (q[1], q[2])
    elif q := re.fullmatch(r"text: ([\d+-]+)", step):
        assert sum(int(v) for v in re.findall(r"[+-]?\d", q[1])) == int(true)
    else:  # "top: circle 2", the number where the shape is asked for
        place, shape, number = re.fullmatch(r"([a-z ]+): (\w+)(?: (\d))?", step).groups()
        assert scene[place][1] == shape
        assert (shape in counted_shapes(turns(record)[0][0])) == bool(number)


def test_reasoning_steps_lead_to_the_answer(world):
    for split, record in both(world, "reasoning"):
        meta = record["meta"]
        scene = scene_of(world, split, record)
        assert 1 <= meta["difficulty"] <= 4 and meta["answer"] == turns(record)[0][1]
        for step in meta["steps"]:
            check_reasoning_step(step, record, scene)
        assert meta["answer"] in meta["steps"][-1] or meta["task"] == "compare_count"


# ----------------------------------------------------------------- steps of single questions


@dataclass
class Case:
    """A single question: its text, reply and meta, its steps and its picture, if it has one."""

    question: str
    reply: str
    meta: dict
    picture: np.ndarray | None

    @property
    def steps(self):
        return self.meta["steps"]

    @property
    def name(self):
        """The thing that the question names."""
        return re.search(NAME, self.question)[0]

    def behind_colon(self):
        return [step.split(": ")[1] for step in self.steps]


def up_to(n):
    return list(range(1, int(n) + 1))


def running_numbers(steps, what):
    """The numbers behind a counted value, e.g. of "circle": 1, 2; every other step has none."""
    numbers = []
    for step in steps:
        value, number = re.fullmatch(r"(?:.*: )?(\w+)(?: (\d))?", step).groups()
        assert (value == what) == bool(number)
        if number:
            numbers.append(int(number))
    return numbers


def two_counts(case):
    *steps, last = case.steps
    form = r"(\w+) (\d) ([+<=>]) (\w+) (\d)(?: = (\d))?"
    first, a, sign, second, b, total = re.fullmatch(form, last).groups()
    assert counted_shapes(case.question) == [SINGULAR[first], SINGULAR[second]]
    found = [re.fullmatch(r".*: (\w+)(?: (\d))?", step).groups() for step in steps]
    for name, n in ((first, a), (second, b)):  # the last line says what the list ends with
        assert [int(k) for shape, k in found if shape == SINGULAR[name]] == up_to(n)
    if sign == "+":
        assert total == case.reply
    else:
        assert (sign == ">") == (case.reply == "yes")


def one_count(case):
    what = re.search(r"(?:often is|many|all) (\w+)", case.question)[1]
    assert running_numbers(case.steps, SINGULAR.get(what, what)) == up_to(case.meta["answer"])


def count(case):
    assert [int(number) for number in case.behind_colon()] == up_to(case.reply)


def exist(case):
    there = case.reply == "yes"
    assert any(step.startswith(case.name) for step in case.steps) == there
    assert case.steps[-1].startswith(case.name if there else f"no {case.name}")


def looked_up(case):
    """All that is there, once and in order, then the one that is asked for."""
    *others, last = case.steps
    assert re.search(rf"\b{case.reply}\b", last) and (last in others or not others)
    if case.picture is not None:
        scene = look(case.picture)
        seen = [f"{colour} {shape} at the {place}" for place, (colour, shape) in scene.items()]
        assert (others or [last]) == seen
    if named := re.search(r"(?:at|is) the ([a-z ]+)\?", case.question):
        assert named[1].replace("object ", "").removesuffix(" object") in last


def sums(case):
    steps = [step for step in case.steps if "=" in step]
    now = None
    for step in steps:
        before, sign, part, after = re.fullmatch(r"(\d+) ([+-]) (\d+) = (\d+)", step).groups()
        assert now in (None, before) and int(after) == int(before) + int(sign + part)
        now = after
    assert now == case.reply
    if case.meta["task"] == "arithmetic":
        first = steps[0].split()[0]
        assert case.question == f"What is {first} {case.meta['sign']} {case.meta['second']}?"


def sort(case):
    assert case.steps[0].startswith("smallest: ")
    assert " ".join(case.behind_colon()) == case.reply


def copy(case):
    assert case.steps[0].startswith("first: ")
    assert " ".join(case.behind_colon()) == case.reply


def read_text(case):
    assert case.steps == [f"characters: {len(case.meta['answer'])}"]


def text_length(case):
    assert len(case.steps[0].removeprefix("text: ")) == int(case.reply)


def text_colour(case):
    assert case.steps == [f"text: {case.reply}"]


def caption(case):
    assert case.steps == [f"objects: {len(described(case.reply))}"]


def which_picture(case):
    showing = []
    for number, names in enumerate(case.behind_colon(), 1):
        if case.name in names.split(", "):
            showing.append(str(number))
    assert showing == [case.reply]


def motion(case):
    move = re.search(r"(left|right|up|down)\.?$", case.reply)[1]
    ends = {"left": "right left", "right": "left right", "up": "bottom top", "down": "top bottom"}
    first, last = ends[move].split()
    assert case.steps == [f"first at the {first}", f"last at the {last}"]


def order(case):
    [other] = [name for name in case.meta["choices"] if name != case.reply]
    assert case.steps == [f"first: {case.reply}", f"last: {other}"]


def event_time(case):
    assert [float(step.split()[1]) for step in case.steps] == json.loads(case.meta["answer"])


def match(case):
    reference, *ways = case.behind_colon()
    assert [str(k) for k, way in enumerate(ways, 1) if way == reference] == [case.reply]


def reorder(case):
    ranks = case.behind_colon()
    assert " ".join(str(ranks.index(rank) + 1) for rank in sorted(ranks)) == case.reply


def starts_at_the_named(case):
    assert case.steps[0].startswith(case.name)


def detail(case):
    meta = case.meta
    colour, place = re.fullmatch(r"(\w+) dot at the ([a-z ]+)", only(case.steps)).groups()
    assert place == meta["place"]
    assert re.search(f"{colour} dot|dot at the {place}", case.question)
    h, w = case.picture.shape[:2]
    x1, y1, x2, y2 = meta["crop"]
    pixel = case.picture[(y1 + y2) * h // 2000, (x1 + x2) * w // 2000].astype(float)
    # A ring's middle is paper.
    if meta["task"] != "detail_low_contrast" and case.reply != "ring":
        assert min(COLOURS, key=lambda name: np.linalg.norm(pixel - COLOURS[name])) == colour


def both_attributes(case):
    scene = look(case.picture)
    place = re.search(r"at the ([a-z ]+?)(?: as JSON|\?|$)", case.question)[1]
    colour, shape = scene[place]
    forms = {
        "as_json": json.dumps({"colour": colour, "shape": shape}),
        "colour_and_shape": f"{colour} {shape}",
        "twice_asked": f"{shape}, {colour}",
    }
    assert case.reply == forms[case.meta["task"]]


def in_other_words(case):
    question, _, form = case.question.partition("? ")
    base = answer(question + "?", look(case.picture))
    if case.meta["task"] == "in_capitals":
        assert case.reply == base.upper()
    elif case.meta["task"] == "option":
        options = dict(re.findall(r"([ABC])\. (\w+)", form))
        assert options[case.reply] == base and list(options.values()).count(base) == 1
    else:
        assert re.search(rf"\b{base}\b", case.reply) and case.reply.endswith(".")
        if not base.isdigit():
            subject = case.reply.split(" is ")[0]
            assert question.split(" is ")[1] == subject[0].lower() + subject[1:]


STEP_CHECKS = {
    two_counts: "sum_count compare_count",
    one_count: "count_of count_point count_words",
    count: "count",
    exist: "exist",
    looked_up: "colour shape position text_position text_colour_of",
    sums: "arithmetic drawn_arithmetic",
    sort: "sort",
    copy: "copy",
    read_text: "read",
    text_length: "text_length",
    text_colour: "text_colour",
    caption: "caption story",
    which_picture: "which_picture",
    motion: "motion say_motion video_caption",
    order: "order",
    event_time: "event_time",
    match: "match",
    reorder: "reorder",
    starts_at_the_named: "box point relation",
    detail: "detail detail_rotated detail_low_contrast",
    both_attributes: "as_json colour_and_shape twice_asked",
    in_other_words: "in_sentence in_capitals option",
}


def check_steps(world, split, record):
    [(question, reply)] = turns(record)
    meta = record["meta"]
    assert meta["steps"] and all(type(step) is str and step for step in meta["steps"])
    items = media(record, "image")
    picture = pixels(world, split, items[0]) if items else None
    [check] = [check for check, tasks in STEP_CHECKS.items() if meta["task"] in tasks.split()]
    check(Case(question, reply, meta, picture))
    assert verify(reply, meta)[1] == 1 == score(reply, meta), record


def test_single_questions_have_true_steps(world):
    tasks = defaultdict(Counter)
    for split in ("train", "heldout"):
        for path in sorted((world / split).glob("*.jsonl")):
            if path.stem in (*COLD_START, *UNTAUGHT):
                continue
            for record in read(path):
                if len(turns(record)) > 1 or not turns(record)[0][0]:
                    assert "meta" not in record
                    continue
                check_steps(world, split, record)
                tasks[path.stem][record["meta"]["task"]] += 1
    assert all(tasks["instruct"][task] >= 20 for task in INSTRUCT)

    # Each held-out task can be asked of train contents.
    held = set()
    for path in (world / "heldout").glob("*.jsonl"):
        if path.stem not in ("instruct", *UNTAUGHT):
            held |= {record["meta"]["task"] for record in read(path)}
    assert held == tasks["questions"].keys()


# ------------------------------------------------------------------------------------ details


def test_the_look_box_holds_the_dot():
    for i in range(600):
        unit = draw_unit("", "train", "ask.detail", i, 1, (84, 126), dry=True)
        record = json.loads(unit.lines[0][1])
        meta = record["meta"]
        item = media(record, "image")[0]
        x1, y1, x2, y2 = meta["crop"]  # 44 px around its middle
        x = (x1 + x2) / 2
        y = (y1 + y2) / 2
        w = 8.5 * 1000 / item["width"]
        h = 8.5 * 1000 / item["height"]
        a1, b1, a2, b2 = look_box(meta["place"])
        assert a1 <= x - w and x + w <= a2 and b1 <= y - h and y + h <= b2, record
        assert 0 <= min(a1, b1) and max(a2, b2) <= 1000 and max(a2 - a1, b2 - b1) < 200


def shape_masks():
    """{shape: (44, 44) mask} of the shapes drawn alone."""
    masks = {}
    for shape in SHAPES:
        paper = Paper(random.Random(0), 44, 44)
        paper.tint = (255, 255, 255)
        thing = Thing("", shape, cx=22, cy=22, r=7.5, rgb=(0, 0, 0))
        masks[shape] = paper.draw([thing]).mean(-1) < 128
    return masks


def overlap(seen, mask):
    """The largest share of common pixels, of the mask moved by up to a pixel."""
    shares = []
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            moved = np.roll(mask, (dy, dx), (0, 1))
            shares.append((seen & moved).sum() / (seen | moved).sum())
    return max(shares)


def test_detail_is_readable_in_the_crop_alone(world):
    """As the toy sees a picture, 16 tokens of 28 px, a dot fills under half a patch."""
    masks = shape_masks()
    right = []
    for split, record in both(world, "detail"):
        meta = record["meta"]
        image = Image.open(world / split / media(record, "image")[0]["image"])
        w, h = image.size
        assert min(w, h) >= 280 and meta["answer"] in meta["choices"]
        assert 15 * 15 * 16 * 28 * 28 / (w * h) < 14 * 14 / 2 * 1.1
        x1, y1, x2, y2 = meta["crop"]
        assert 0 <= x1 < x2 < 1000 and 0 <= y1 < y2 < 1000
        assert (x2 - x1) * (y2 - y1) < 30_000  # under 3 % of the picture
        crop = image.crop((x1 * w // 1000, y1 * h // 1000, x2 * w // 1000, y2 * h // 1000))
        crop = crop.rotate(-meta["rotate"]).resize((44, 44))  # Pillow turns counter-clockwise
        array = np.asarray(crop.convert("RGB"), float)
        far = np.linalg.norm(array - np.median(array.reshape(-1, 3), 0), axis=-1)
        seen = far > far.max() / 2
        best = max(meta["choices"], key=lambda shape: overlap(seen, masks[shape]))
        right.append(best == meta["answer"])
    assert len(right) >= 60 and np.mean(right) > 0.8


# -------------------------------------------------------------------------- split and balance


def scenes_in(world, split, name, record):
    grid = 2 if name == "interleaved" else 3
    for item in media(record, "image"):
        scene = look(pixels(world, split, item), grid)
        yield frozenset((place, *thing) for place, thing in scene.items())


def contents(world, split):
    """{kind: every canonical content of a split}, read from its lines and pictures."""
    found = defaultdict(set)
    names = "caption vqa grounding reasoning ocr interleaved text video instruct discover".split()
    names += ["preferences", "premise", *["pairs"] * (split == "train")]
    for name in names:
        for record in lines(world, split, name):
            task = record.get("meta", {}).get("task")
            said = " ".join(f"{question} {reply}" for question, reply in turns(record))
            if task == "backwards":
                clip = decoded(world, split, media(record, "video")[0])
                colour, shape = re.search(NAME, said).groups()
                found["motion"].add((colour, shape, movement(clip)))
                continue
            if name == "text":
                found["text"] |= {question for question, _ in turns(record)}
            elif name == "ocr":
                found["ocr"] |= set(re.findall(r"ocr_text_start\|>(\w+)<", said))
            elif task == "drawn_arithmetic":
                found["ocr"].add(record["meta"]["steps"][0])
            elif name == "video" or task == "say_motion":
                way = rf"^Which way does the {NAME} move\?.* (\w+?)\.?$"
                found["motion"] |= set(re.findall(way, said))
                found["motion"] |= set(re.findall(rf"n? {NAME} moves (\w+)\.", said))
                pair = rf"n? {NAME} appears, then {THING}\."
                found["order"] |= set(re.findall(pair, said))
                span = rf"n? {NAME} is visible from (\S+) to (\S+) seconds"
                found["event"] |= set(re.findall(span, said))
            else:
                found["scene"] |= set(scenes_in(world, split, name, record))
    return found


def test_heldout_content_never_occurs_in_train(world):
    train = contents(world, "train")
    held = contents(world, "heldout")
    for kind in ("scene", "text", "ocr", "motion"):
        assert len(held[kind]) >= 8, kind
        assert not held[kind] & train[kind], kind
    assert 1 in map(len, train["scene"]) and 1 in map(len, held["scene"])

    # Orders and events are too many to meet again by chance: each lies on its side of the rule.
    events = [f"event:{' '.join(truth)}" for truth in train["event"]]
    orders = [f"order:{' '.join(truth)}" for truth in train["order"]]
    assert events and orders and not any(map(is_heldout, events + orders))
    for record in lines(world, "heldout", "video"):
        if record["meta"]["task"] == "order":
            first, last = [step.split(": ")[1] for step in record["meta"]["steps"]]
            assert is_heldout(f"order:{first} {last}")


def test_heldout_answers_are_balanced_and_lines_complete(world):
    answers = defaultdict(Counter)
    categories = set()
    for path in (world / "heldout").glob("*.jsonl"):
        for record in read(path):
            if path.stem == "preferences":
                continue
            meta = record["meta"]
            task = meta["task"]
            assert {"task", "category", "answer", "verifier", "chance"} <= meta.keys()
            assert len(record["messages"]) == 2
            categories.add(meta["category"])
            if "choices" in meta:
                choices = meta["choices"]
                assert meta["answer"] in choices
                assert abs(meta["chance"] - 1 / len(choices)) < 1e-3
                # The two names of an order are new each time: which one it is counts.
                what = choices.index(meta["answer"]) if task == "order" else meta["answer"]
                answers[task, len(choices)][what] += 1
    expected = "caption ocr_vqa grounding interleaved video text reasoning detail instruction"
    expected += " discover absent present"
    assert categories == set(expected.split())
    for (task, n), counts in answers.items():
        if task not in ("text_length", "match") and not task.startswith("present"):
            mean = counts.total() / n
            assert max(counts.values()) <= max(1.5 * mean, mean + 1), (task, n, counts)
    tasks = {task for task, _ in answers}
    assert {"colour", "shape", "count", "position", "motion", "exist"} <= tasks


def without_names(question):
    names = "|".join([*COLOURS, *SHAPES, *SINGULAR])
    return re.sub(rf"\b({names})\b", "X", re.sub("at the .*", "at P", question))


def test_train_answers_are_balanced():
    answers = defaultdict(Counter)
    first = Counter()
    for i in range(1500):
        unit = draw_unit("", "train", "scene", i, 0, (70, 126), dry=True)
        for name, line in unit.lines:
            if name == "vqa":
                questions = turns(json.loads(line))
                first[without_names(questions[0][0])] += 1
                for question, reply in questions:
                    answers[without_names(question)][reply] += 1
    expected = {
        "What colour is the object at P": 8,
        "What colour is the X?": 8,
        "What shape is the object at P": 6,
        "How many objects are there?": 5,
        "How many X are there?": 3,
        "How many X objects are there?": 3,
        "Where is the X X?": 9,
        "Is there a X X?": 2,
    }
    for question, n in expected.items():
        counts = answers[question]
        assert len(counts) == n, counts
        assert max(counts.values()) < 1.5 * counts.total() / n, (question, counts)
        assert first[question] > 50, question  # every kind also opens a conversation
    assert first["Describe the picture."] > 50


# ------------------------------------------------------- what reinforcement and preferences teach


def discovered(question, scene):
    """The answer to a question of discover.jsonl about {place: (colour, shape)}."""
    things = list(scene.values())
    shapes = [shape for _, shape in things]
    counts = [shapes.count(shape) for shape in counted_shapes(question)]
    if question.startswith("How many more"):
        return counts[0] - counts[1]
    if "are not" in question:
        return len(things) - counts[0]
    if "together" in question:
        assert len(counts) == 3 and 0 not in counts
        return sum(counts)
    if question.startswith("Sort"):
        assert len(set(counts)) == 3 and 0 not in counts
        names = [word for word in words_of(question) if word in SINGULAR]
        return " ".join(sorted(names, key=lambda name: shapes.count(SINGULAR[name])))
    if q := re.fullmatch(r"Which (shape|colour) is there most often\?", question):
        values = [thing[q[1] == "shape"] for thing in things]
        most = max(map(values.count, values))
        return only(value for value in set(values) if values.count(value) == most)
    if question == "How many colours are there?":
        return len({colour for colour, _ in things})
    if q := re.search(r"with (\d) more", question):
        return len(things) + int(q[1])
    if q := re.fullmatch(r"How many corners has the object at the ([a-z ]+)\?", question):
        pointed = {"triangle": 3, "square": 4, "star": 2 * 5, "cross": 4 * 3}
        return pointed.get(scene[q[1]][1], 0)
    rows = {place: PLACES.index(place) // 3 for place in scene}
    if question == "What colour is the lowest object?":
        return scene[only(place for place in scene if rows[place] == max(rows.values()))][0]
    q = re.fullmatch(rf"What colour is the object opposite the {NAME}\?", question)
    place = only(place for place, thing in scene.items() if thing == q.groups())
    turned = {"top": "bottom", "bottom": "top", "left": "right", "right": "left"}
    return scene[" ".join(turned[word] for word in place.split())][0]


def test_what_reinforcement_asks_agrees_with_pixels_and_frames(world):
    seen = Counter()
    for split, record in both(world, "discover"):
        [(question, reply)] = turns(record)
        meta = record["meta"]
        assert meta["answer"] == reply and meta["difficulty"] in (1, 2, 3)
        assert "steps" not in meta and score(reply, meta) == 1
        if meta["task"] == "backwards":
            assert question.endswith("move when the clip is played backwards?")
            way = movement(decoded(world, split, media(record, "video")[0])[::-1])
        else:
            way = discovered(question, scene_of(world, split, record))
        assert str(way) == reply, (question, record)
        seen[split, meta["task"]] += 1
    assert seen.keys() == {(split, task) for split in ("train", "heldout") for task in DISCOVER}
    assert len(DISCOVER) >= 10


COUNTED = "difference others main_shape main_colour plus sum_three ranking".split()


def test_hints_are_true_and_the_last_one_is_the_answer(world):
    for split, record in both(world, "discover"):
        meta = record["meta"]
        seen, way, answer = meta["hints"]
        assert answer == f"the answer is {meta['answer']}"
        assert meta["answer"].split()[-1] in re.findall(r"\w+", way)
        if meta["task"] in COUNTED:
            things = scene_of(world, split, record).values()
            counts = Counter(word for thing in things for word in thing)
            counts["objects"] = len(things)
            told = re.findall(r"(\w+) (\d+)", seen)
            assert told
            for name, number in told:
                assert counts[SINGULAR.get(name, name)] == int(number), record


def test_nothing_shows_how_what_reinforcement_asks_is_answered(world):
    asked = {turns(record)[0][0] for _, record in both(world, "discover")}
    for path in (world / "train").glob("*.jsonl"):
        if path.stem not in UNTAUGHT:
            for record in read(path):
                assert not asked & {question for question, _ in turns(record)}, path


def guesses(task, question, reply):
    """What a blind guesser chooses among: of what words give away, the rest."""
    if task == "plus":
        return int(reply) - int(re.search(r"\d", question)[0])
    if task == "ranking":
        names = [word for word in words_of(question) if word in SINGULAR]
        return tuple(names.index(name) for name in reply.split())
    return reply


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_chance_of_what_reinforcement_asks_is_as_counted(split):
    for task in DISCOVER:
        replies = Counter()
        free = Counter()
        for i in range(240):
            unit = draw_unit("", split, f"discover.{task}", i, 3, (84, 126), dry=True)
            record = json.loads(only(line for _, line in unit.lines))
            [(question, reply)] = turns(record)
            replies[reply] += 1
            free[guesses(task, question, reply)] += 1
        n = len(free)
        assert n >= 4 and record["meta"]["chance"] == pytest.approx(1 / n, abs=1e-4), task
        assert max(replies.values()) <= 0.4 * 240, (task, replies)
        # equally likely, those of ranking as they fall
        assert max(free.values()) < (1.5 if task == "ranking" else 1.1) * 240 / n, (task, free)


def pairs_of(world, split):
    """(question, chosen, rejected, record, what the pixels show) of each pair."""
    for record in read(world / split / "preferences.jsonl"):
        [message] = record["messages"]
        yield (
            text_of(message["content"]), record["chosen"], record["rejected"], record,
            scene_of(world, split, record),
        )


def named_things(question, scene):
    """The things that a question about one of them may mean: [(place, colour, shape), ..]"""
    colour = re.search("|".join(COLOURS), question)
    shape = re.search(rf"\b({'|'.join(SHAPES)})\b", question)
    place = re.search(r"at the ([a-z ]+)\?", question)
    meant = []
    for where, (c, s) in scene.items():
        if (not colour or colour[0] == c) and (not shape or shape[0] == s):
            if not place or place[1] == where:
                meant.append((where, c, s))
    return meant


def denied(question):
    """What a question is about, and the sentence that denies it."""
    what = re.fullmatch(r"(?:What colour|What shape|Where) is the (.*)\?", question)[1]
    return f"There is no {what}."


def is_possible(reply, question):
    """Whether an answer is of the kind that is asked for."""
    kinds = {"What colour": COLOUR_NAMES, "What shape": SHAPES, "Where is": PLACES}
    return reply in only(kinds[start] for start in kinds if question.startswith(start))


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_pairs_about_premises_agree_with_the_pixels(world, split):
    kinds = Counter()
    for question, chosen, rejected, record, scene in pairs_of(world, split):
        if record["task"] == "absent":
            assert named_things(question, scene) == []
            assert chosen == denied(question) and is_possible(rejected, question)
        elif record["task"] == "present":
            assert len(named_things(question, scene)) == 1
            assert chosen == answer(question, scene) and rejected == denied(question)
        else:
            continue
        kinds[record["task"], without_names(question)] += 1
    assert len(kinds) == 8


def test_pairs_about_captions_forms_and_ends_agree_with_the_pixels(world):
    """Neither the longer nor the shorter answer is always the better one."""
    longer = defaultdict(Counter)
    for split in ("train", "heldout"):
        for question, chosen, rejected, record, scene in pairs_of(world, split):
            task = record["task"]
            longer[task][len(chosen) > len(rejected)] += 1
            assert record.get("rejected_ended", True) == (task != "stops")
            if task == "invented":
                assert described(chosen) == scene != described(rejected)
                assert len(set(scene.items()) ^ set(described(rejected).items())) <= 2
            elif task == "form":
                bare, _, form = question.partition("? ")
                true = answer(f"{bare.removesuffix('?')}?", scene)
                if form == "Answer in capitals.":
                    assert chosen == true.upper()
                elif form == "Answer in a sentence.":
                    assert re.fullmatch(rf"The .* is (an? )?{true}\.", chosen)
                else:
                    assert form == "" and chosen == true
                assert true in rejected.lower() and chosen != rejected
            elif task == "stops":
                assert rejected in [" ".join([chosen] * k) for k in (2, 3, 4)]
                if question == "Describe the picture.":
                    assert described(chosen) == scene
                else:
                    assert chosen == answer(question, scene)
    assert longer["stops"][True] == 0  # a loop is longer
    for task in ("invented", "form"):
        assert min(longer[task].values()) > 0.2 * longer[task].total()


def test_premises_are_asked_alone_where_both_answers_can_be_seen(world):
    seen = Counter()
    for record in read(world / "heldout" / "premise.jsonl"):
        [(question, reply)] = turns(record)
        meta = record["meta"]
        scene = scene_of(world, "heldout", record)
        kind, _, _ = meta["task"].partition("_")
        assert meta["category"] == kind
        meant = named_things(question, scene)
        assert reply == (answer(question, scene) if meant else denied(question))
        assert len(meant) == (kind == "present") and score(reply, meta) == 1
        assert not score(denied(question) if meant else "red", meta)
        seen[kind] += 1
    assert seen["absent"] == seen["present"] == 20
    # they are the questions of the pairs that are measured
    asked = [pair[0] for pair in pairs_of(world, "heldout") if pair[3]["task"] in seen]
    assert asked == [turns(r)[0][0] for r in read(world / "heldout" / "premise.jsonl")]


def test_a_world_holds_out_four_hundred_pairs_and_no_answer_fills_a_task():
    replies = defaultdict(Counter)
    pairs = Counter()
    units = {kind: n for split, kind, n in toyworld.world.plan(0, 0, 120) if split == "heldout"}
    for i in range(units["behaviour"]):
        unit = draw_unit("", "heldout", "behaviour", i, 0, (84, 126), dry=True)
        for name, line in unit.lines:
            record = json.loads(line)
            if name == "preferences":
                pairs[record["task"]] += 1
            else:
                replies[record["meta"]["task"]][record["meta"]["answer"]] += 1
    assert pairs == dict.fromkeys(["absent", "present", "invented", "form", "stops"], 120)
    assert len(replies) == 8
    for task, counts in replies.items():
        assert max(counts.values()) <= 0.4 * counts.total(), (task, counts)


# --------------------------------------------------------------------------------- cold start


def cold_start(world, name):
    return read(world / "train" / f"{name}.jsonl")


def key(record):
    """A question and how it is judged, without its answer."""
    return json.dumps([record["messages"][0], record["meta"]])


def pool(world):
    """{key: the true reply} of the questions that the cold start answers."""
    replies = {}
    for name in ("questions", "detail", "instruct", "premise"):
        for record in cold_start(world, name):
            replies[key(record)] = record["messages"][1]["content"]
    return replies


def is_premise(record):
    return record["meta"]["category"] in ("absent", "present")


def test_the_cold_start_thinks_about_false_and_true_premises(world):
    """And says so before it answers. As many are true as false."""
    asked = list(filter(is_premise, cold_start(world, "think")))
    false = [r["meta"] for r in asked if r["meta"]["category"] == "absent"]
    assert len(false) == len(asked) / 2
    assert len({meta["task"] for meta in false}) > 1, "one premise after the other"
    for meta in false:
        assert meta["steps"][-1] == meta["answer"].replace("There is ", "").rstrip(".")
    # they are those that reinforcement asks, and the pairs tell the same
    told = {json.dumps(r["messages"][0]): r["chosen"] for r in cold_start(world, "preferences")}
    practised = cold_start(world, "premise")
    assert len(practised) == len(asked)
    for record in practised:
        question, reply = record["messages"]
        assert told[json.dumps(question)] == reply["content"]


def test_cold_start_answers_the_train_questions_in_each_form(world):
    replies = pool(world)
    for name in COLD_START:
        for record in cold_start(world, name):
            question, answer = record["messages"]
            reply = replies[key(record)]  # so nothing that is held out is asked
            thought = "\n".join([*record["meta"]["steps"], f"the answer is {reply}"])
            thinking = f"<think>{thought}</think><answer>\\boxed{{{reply}}}</answer>"
            mode = name
            if name == "agentic":
                mode = "agentic_think"
            elif name == "clips":
                mode = "think" if answer["content"] == thinking else "no_think"
            if mode == "no_think":
                assert answer["content"] == reply
            elif type(answer["content"]) is str:
                assert answer["content"] == thinking
            parsed = parse(answer["content"], mode)
            assert not parsed.errors and verify(parsed.final, record["meta"])[1] == 1


def test_cold_start_has_every_question_once_and_clips_apart(world):
    keys = {name: [key(record) for record in cold_start(world, name)] for name in COLD_START}
    assert keys["think"] == keys["no_think"]
    assert keys["clips"][0::2] == keys["clips"][1::2]  # with thinking, then without
    assert sorted(keys["think"] + keys["clips"][0::2]) == sorted(pool(world))
    assert set(keys["agentic"]) < set(keys["think"])
    for name in COLD_START:
        for record in cold_start(world, name):
            assert bool(media(record, "video")) == (name == "clips")
            assert "fps" not in str(media(record, "video")).replace("fps_source", "")
    for i, record in enumerate(cold_start(world, "clips")):
        assert ("<think>" in str(record)) == (i % 2 == 0)


def check_tool_turn(world, record):
    """Runs the code of an agentic answer again, on the picture as it is stored."""
    question, answer = record["messages"]
    meta = record["meta"]
    reply = meta["answer"]
    call, *observed, last = answer["content"]
    form = r"<think>(.*)<tool_call>(.*)</tool_call>"
    thought, code = re.fullmatch(form, call["text"], re.S).groups()
    assert last["text"] == f"{reply}</think><answer>\\boxed{{{reply}}}</answer>"
    assert "loss" not in call and "loss" not in last

    if meta["task"] == "arithmetic":
        assert thought == "" and observed[0]["text"] == f"<sandbox_output>{reply}"
        pictures = []
    else:
        assert thought == f"{only(meta['steps'])}\n"
        item = only(media({"messages": [question]}, "image"))
        pictures = [Image.open(world / "train" / item["image"]).convert("RGB")]
    expected = sandbox.run(code, pictures)
    assert expected.ok and len(expected.images) == len(pictures)
    for item, seen in zip(observed, expected.content(), strict=True):
        if item["type"] == "text":
            assert item == seen and item["loss"] is False
        else:
            assert item["image"].startswith("pictures/tool-")
            stored = Image.open(world / "train" / item["image"])
            assert stored.format == "PNG" and stored.mode == "RGB"
            assert np.array_equal(np.asarray(stored), np.asarray(seen["image"]))


def test_what_a_tool_showed_is_what_the_sandbox_returns(world):
    tasks = Counter()
    for record in cold_start(world, "agentic"):
        if "<tool_call>" in str(record["messages"]):
            check_tool_turn(world, record)
            tasks[record["meta"]["task"]] += 1
    assert tasks.keys() == {"arithmetic", "detail", "detail_rotated", "detail_low_contrast"}


def test_tools_are_used_where_they_help_and_allowed_elsewhere(world):
    agentic = {key(record): record for record in cold_start(world, "agentic")}
    without = []
    for record in cold_start(world, "think"):
        meta = record["meta"]
        if meta["category"] == "detail" or meta["task"] == "arithmetic":
            assert "<tool_call>" in str(agentic[key(record)])
        else:
            without.append(key(record) in agentic)
    assert 0.08 < np.mean(without) < 0.22


def test_cold_start_takes_a_fixed_choice_of_at_most_so_many_questions(tmp_path, monkeypatch):
    few = replace(SIZES["toy"], questions=20)
    monkeypatch.setitem(SIZES, "toy", few)
    chosen = []
    for name in ("a", "b"):
        make_world(tmp_path / name, workers=1, **TINY)
        records = cold_start(tmp_path / name, "think") + cold_start(tmp_path / name, "clips")
        chosen.append([key(record) for record in records if not is_premise(record)])
    assert len(set(chosen[0])) == 20 < len(pool(tmp_path / "a"))
    assert chosen[0] == chosen[1]


# ------------------------------------------------------------------------------- whole worlds


def tree(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_same_seed_same_bytes_for_any_number_of_processes(tmp_path):
    small = {"pictures": 60, "clips": 6, "heldout": 5, "progress": False}
    make_world(tmp_path / "a", workers=1, **small)
    make_world(tmp_path / "b", workers=2, **small)
    a = tree(tmp_path / "a")
    assert a == tree(tmp_path / "b") and len(a) > 150
    assert any(name.startswith("train/pictures/tool-") for name in a)
    make_world(tmp_path / "c", workers=1, **TINY)
    make_world(tmp_path / "d", workers=1, seed=1, **TINY)
    assert tree(tmp_path / "c")["train/vqa.jsonl"] != tree(tmp_path / "d")["train/vqa.jsonl"]


def test_finished_world_is_kept_and_another_is_never_half_written(tmp_path, monkeypatch):
    out = tmp_path / "w"
    first = make_world(out, workers=1, **TINY)
    (out / "mark").write_text("kept")
    assert make_world(out, workers=1, **TINY)["reused"] and (out / "mark").exists()

    # What cleans a disk takes some pictures: they come back, and what is somebody's own stays.
    pictures = out / "train" / "pictures"
    whole = tree(out)
    (pictures / "mine.png").write_bytes(b"mine")
    assert make_world(out, workers=1, **TINY)["reused"]
    for path in sorted(pictures.glob("*-0*"))[:3]:
        path.unlink()
    assert "reused" not in make_world(out, workers=1, **TINY)
    assert (pictures / "mine.png").read_bytes() == b"mine" and (out / "mark").exists()
    (pictures / "mine.png").unlink()
    assert tree(out) == whole

    (tmp_path / ".w.part" / "train").mkdir(parents=True)  # left behind by a killed run
    again = make_world(out, workers=1, **TINY | {"pictures": 12})
    assert not (out / "mark").exists() and "reused" not in again
    assert again["settings"] != first["settings"]
    assert [path.name for path in tmp_path.iterdir()] == ["w"]

    # The old world stands until the new one is complete.
    before = tree(out)
    monkeypatch.setattr(toyworld.world, "draw_unit", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_world(out, workers=1, **TINY)
    assert tree(out) == before


def test_what_is_no_world_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(FileExistsError, match="mine"):
        make_world(tmp_path / "mine", workers=1, **TINY)
    with pytest.raises(ValueError, match="huge"):
        make_world(tmp_path / "x", size="huge")


def test_media_paths_stay_inside_and_sizes_are_told(world):
    sizes = set()
    for split in ("train", "heldout"):
        for path in (world / split).glob("*.jsonl"):
            for record in read(path):
                for item in media(record, "image"):
                    size = Image.open(world / split / item["image"]).size
                    assert size == (item["width"], item["height"])
                    sizes.add(size)
                for item in media(record, "image") + media(record, "video"):
                    name = item.get("image") or item["video"]
                    assert not Path(name).is_absolute() and ".." not in name
                    assert (world / split / name).stat().st_size > 100
    assert len(sizes) > 200  # many sizes and aspect ratios


def test_the_command_draws_a_world(tmp_path, monkeypatch, capsys):
    out = str(tmp_path / "w")
    command = f"toyworld --out {out} --pictures 10 --clips 2 --heldout 0 --workers 1"
    monkeypatch.setattr(sys, "argv", command.split())
    for done in ("drawn in", "reused"):
        toyworld.__main__.main()
        said = capsys.readouterr().out
        first, train, heldout = said.splitlines()
        assert first.startswith(f"{out}: {done}")
        assert re.match(r"train: \d+ clips, \d+ pictures; lines of agentic \d+, .*, vqa \d+", train)
        assert heldout.startswith("heldout: ")
    settings = json.loads((tmp_path / "w" / "world.json").read_text())["settings"]
    assert settings.items() >= {"size": "toy", "pictures": 10, "clips": 2, "heldout": 0}.items()


# --------------------------------------------------------------------------------- vocabulary


def gpt2_bytes():
    """{character of the GPT-2 byte alphabet: byte}, as published."""
    codes = []
    for first, last in ("!~", "¡¬", "®ÿ"):
        codes += range(ord(first), ord(last) + 1)
    characters = {chr(code): code for code in codes}
    for byte in range(256):
        if byte not in codes:
            characters[chr(256 + len(characters) - len(codes))] = byte
    return characters


def test_committed_vocabulary(world):
    path = ROOT / "toyworld" / "vocab.json"
    vocab = json.loads(path.read_text(encoding="utf-8"))
    assert sorted(vocab.values()) == list(range(992))
    table = gpt2_bytes()
    ranks = {bytes(table[c] for c in token): rank for token, rank in vocab.items()}
    assert sorted(ranks[bytes([b])] for b in range(256)) == list(range(256))
    assert len(ranks) == 992
    bpe = tiktoken.Encoding("toy", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    for text in ("A red circle at the top left.", "Ünïcode 漢字 🙂\n\n  x", "[[12, 345, 6, 789]]"):
        assert bpe.decode(bpe.encode(text)) == text
    for token, rank in ranks.items():  # every entry is reachable by merges, none is dead
        assert bpe._core_bpe.encode_single_token(token) == rank
    words = "top left center right bottom at the picture moves".split()
    for word in [*COLOURS, *SHAPES, *PLURAL.values(), *words]:
        assert len(bpe.encode(" " + word)) == 1, word
    assert bpe.encode("42") == [ranks[b"4"], ranks[b"2"]]
    for record in lines(world, "train", "caption"):
        caption = turns(record)[0][1]
        assert len(bpe.encode(caption)) <= 8 * len(described(caption))


def test_train_vocab_merges_the_most_frequent_pair_first():
    vocab = train_vocab(Counter({"low low lower<|box_start|>lo": 3, "x": 1}), 259)
    assert list(vocab)[256:] == ["lo", "low", "Ġlow"]
    assert list(vocab.values()) == list(range(259))
    with pytest.raises(ValueError, match="EXTRA"):
        train_vocab(Counter({"ab": 1}), 300)


def test_the_command_says_in_a_line_that_a_folder_is_no_world(tmp_path, monkeypatch):
    (tmp_path / "thesis.txt").write_text("x")
    monkeypatch.setattr(sys, "argv", ["toyworld", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="exists and is no toy world"):
        toyworld.__main__.main()
