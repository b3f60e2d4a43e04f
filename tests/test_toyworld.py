"""The toy world tells the truth: every answer is derived again from the pixels, the decoded clips or the question."""
import json, re
from collections import Counter, defaultdict
from pathlib import Path

import av
import numpy as np
import pytest
import tiktoken
from PIL import Image

import toyworld
from rewards import score, verify
from toyworld import COLOURS, PLACES, PLURAL, SHAPES, make_world

SINGULAR = {v: k for k, v in PLURAL.items()}
NAME = rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
THING = rf"an? {NAME}"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy") / "world"
    make_world(out, pictures=400, clips=60, heldout=20, workers=1, progress=False)
    return out


def lines(world, split, name):
    """A file's lines; of train also the single questions of that kind, which must be as true."""
    found = [json.loads(line) for line in (world / split / f"{name}.jsonl").read_text().splitlines()]
    if split == "train" and name not in ("pairs", "questions", "instruct"):
        read = lambda meta: "ocr" if meta["task"] in ("read", "text_colour", "text_length") else "vqa"
        kind = lambda meta: read(meta) if meta["category"] == "ocr_vqa" else meta["category"]
        found += [r for r in lines(world, split, "questions") if kind(r["meta"]) == name]
    return found


def turns(record):
    """[(question text, reply)] of a conversation."""
    text = lambda c: c if isinstance(c, str) else "".join(p.get("text", "") for p in c)
    m = [text(x["content"]) for x in record["messages"]]
    return list(zip(m[0::2], m[1::2]))


def media(record, kind):
    return [p for m in record["messages"] if isinstance(m["content"], list) for p in m["content"] if p["type"] == kind]


def pixels(world, split, item):
    return np.asarray(Image.open(world / split / item["image"]).convert("RGB"))


def frames(world, split, item):
    """[(seconds, (H, W) colour map)] of a clip."""
    with av.open(str(world / split / item["video"])) as container:
        return [(f.time, colour_map(f.to_ndarray(format="rgb24"), near=85)) for f in container.decode(video=0)]


def colour_map(array, near=75):
    """(H, W): index of the nearest colour, -1 where none is near."""
    a, c = array.astype(np.float32), np.array(list(COLOURS.values()), np.float32)
    distance = (a * a).sum(-1, keepdims=True) - 2 * a @ c.T + (c * c).sum(-1)  # (H, W, 8), squared
    return np.where(distance.min(-1) < near ** 2, distance.argmin(-1), -1)


STENCILS = {  # what the shapes look like in their bounding box, told without the drawing code
    "circle": "..####.. .######. ######## ######## ######## ######## .######. ..####..",
    "square": "######## ######## ######## ######## ######## ######## ######## ########",
    "triangle": "...##... ...##... ..####.. ..####.. .######. .######. ######## ########",
    "star": "...##... ...##... ..####.. ######## .######. ..####.. ..####.. .##..##.",
    "cross": "...##... ...##... ...##... ######## ######## ...##... ...##... ...##...",
    "ring": "..####.. .######. ###..### ##....## ##....## ###..### .######. ..####.."}


def boxed(image):
    """(8, 8) in 0..1: the picture's set pixels, their bounding box shrunk."""
    return np.asarray(image.crop(image.getbbox()).resize((8, 8), Image.Resampling.BOX), float) / 255


def stencils():
    for shape, rows in STENCILS.items():
        image = Image.fromarray(np.array([[255 * (c == "#") for c in row] for row in rows.split()], np.uint8))
        image = image.resize((64, 64), Image.Resampling.BILINEAR).point(lambda v: 255 * (v > 127))
        for degrees in (-6, -3, 0, 3, 6):  # the drawn ones are turned a little
            yield shape, boxed(image.rotate(degrees, expand=True))


TURNED = list(stencils())


def shape_of(mask):
    seen = boxed(Image.fromarray(mask.astype(np.uint8) * 255))
    return min(TURNED, key=lambda t: np.abs(seen - t[1]).sum())[0]


def look(array, grid=3):
    """{place: (colour, shape, mask of the whole picture)} seen in the pixels."""
    found, (h, w) = {}, array.shape[:2]
    seen = colour_map(array)
    for row in range(grid):
        for col in range(grid):
            y0, y1, x0, x1 = row * h // grid, (row + 1) * h // grid, col * w // grid, (col + 1) * w // grid
            cell = seen[y0:y1, x0:x1]
            count = np.bincount(cell[cell >= 0], minlength=len(COLOURS))
            if count.max() > 25:
                mask = np.zeros((h, w), bool)
                mask[y0:y1, x0:x1] = cell == count.argmax()
                k = 3 * row + col if grid == 3 else 6 * row + 2 * col
                found[PLACES[k]] = (list(COLOURS)[count.argmax()], shape_of(mask), mask)
    return found


def told(caption):
    """{place: (colour, shape)} said by a caption."""
    assert caption[0] in "A" and caption.endswith(".")
    parts = caption[0].lower() + caption[1:-1]
    found = [re.fullmatch(rf"{THING} at the ([a-z ]+)", part).groups() for part in parts.split(", ")]
    return {place: (colour, shape) for colour, shape, place in found}


def answer(question, scene):
    """The answer to a question about {place: (colour, shape)}, by rules of its own; None: not of these kinds."""
    things = list(scene.values())
    if q := re.fullmatch(r"What (colour|shape) is the object at the ([a-z ]+)\?", question):
        return scene[q[2]][q[1] == "shape"]
    if q := re.fullmatch(r"What colour is the (\w+)\?", question):
        [colour] = [c for c, s in things if s == q[1]]
        return colour
    if q := re.fullmatch(r"What shape is the (\w+) object\?", question):
        [shape] = [s for c, s in things if c == q[1]]
        return shape
    if question == "How many objects are there?":
        return str(len(things))
    if q := re.fullmatch(r"How many (\w+)( objects)? are there\?", question):
        return str(sum((c == q[1]) if q[2] else (s == SINGULAR[q[1]]) for c, s in things))
    if q := re.fullmatch(rf"Where is the {NAME}\?", question):
        [place] = [p for p, t in scene.items() if t == q.groups()]
        return place
    if q := re.fullmatch(rf"Is there {THING}\?", question):
        return "yes" if q.groups() in things else "no"
    if q := re.fullmatch(r"How many (\w+) and (\w+) are there together\?", question):
        return str(sum(s in (SINGULAR[q[1]], SINGULAR[q[2]]) for c, s in things))
    if q := re.fullmatch(r"Are there more (\w+) than (\w+)\?", question):
        n = Counter(s for c, s in things)
        return "yes" if n[SINGULAR[q[1]]] > n[SINGULAR[q[2]]] else "no"
    if q := re.fullmatch(rf"What shape is (.*)the {NAME}\?", question):
        [place] = [p for p, t in scene.items() if t == (q[2], q[3])]
        row, col = divmod(PLACES.index(place), 3)
        for step in reversed(re.findall("right of|left of|below|above", q[1])):
            row += (step == "below") - (step == "above")
            col += (step == "right of") - (step == "left of")
            assert 0 <= row < 3 and 0 <= col < 3
        return scene[PLACES[3 * row + col]][1]
    return None


def plain(scene):
    return {p: t[:2] for p, t in scene.items()}


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_questions_and_captions_agree_with_the_pixels(world, split):
    asked = 0
    for name in ("caption", "vqa", "reasoning") + (("pairs",) if split == "train" else ()):
        for record in lines(world, split, name):
            if record.get("meta", {}).get("task") == "drawn_arithmetic":
                continue
            scene = plain(look(pixels(world, split, media(record, "image")[0])))
            for question, reply in turns(record):
                if question in ("", "Describe the picture."):
                    assert told(reply) == scene
                    assert list(told(reply)) == sorted(scene, key=PLACES.index)
                else:
                    assert answer(question, scene) == reply, question
                asked += 1
    assert asked >= 200


def test_grounding_agrees_with_the_pixels(world):
    kinds = Counter()
    for split in ("train", "heldout"):
        for record in lines(world, split, "grounding"):
            array = pixels(world, split, media(record, "image")[0])
            h, w = array.shape[:2]
            scene = look(array)
            for question, reply in turns(record):
                if "the picture" in question:
                    continue
                ref = re.match(r"<\|object_ref_start\|>(.*?)<\|object_ref_end\|>", reply)[1]
                hits = [m for c, s, m in scene.values() if ref in (f"{c} {s}", f"{c} objects", PLURAL[s])]
                if q := re.search(r"<\|box_start\|>(.*)<\|box_end\|>$", reply):
                    [box], [mask] = json.loads(q[1]), hits
                    ys, xs = np.nonzero(mask)
                    assert all(0 <= v < 1000 for v in box)
                    seen = [xs.min() / w, ys.min() / h, (xs.max() + 1) / w, (ys.max() + 1) / h]
                    assert np.abs((np.array(box) / 1000 - seen) * [w, h, w, h]).max() < 3, (box, seen)
                    kinds["box"] += 1
                else:
                    points, count = re.search(r"<\|point_start\|>(.*)<\|point_end\|>(?: (\d))?$", reply).groups()
                    points = json.loads(points)
                    assert len(points) == len(hits) == int(count or 1)
                    for (x, y), mask in zip(points, hits):
                        ys, xs = np.nonzero(mask)
                        assert xs.min() <= x / 1000 * w <= xs.max() and ys.min() <= y / 1000 * h <= ys.max()
                    kinds["count" if count else "point"] += 1
    assert min(kinds.values()) > 20 and len(kinds) == 3


def test_interleaved_agrees_with_the_pixels(world):
    for split in ("train", "heldout"):
        tasks = Counter()
        for record in lines(world, split, "interleaved"):
            scenes = [plain(look(pixels(world, split, item), grid=2)) for item in media(record, "image")]
            for question, reply in turns(record):
                if q := re.search(rf"Which picture shows {THING}\?", question):
                    assert [str(k) for k, s in enumerate(scenes, 1) if q.groups() in s.values()] == [reply]
                    tasks["which"] += 1
                elif q := re.search(r"Describe picture (\d)\.", question):
                    assert told(reply) == scenes[int(q[1]) - 1]
                else:
                    said = re.findall(r"Picture \d:  ?(An? [^.]*\.)", question)
                    assert [told(c) for c in said + [reply]] == scenes
                    tasks["story"] += 1
        assert min(tasks["which"], tasks["story"]) >= 20


def centre(seen, colour):
    ys, xs = np.nonzero(seen == list(COLOURS).index(colour))
    return (xs.mean(), ys.mean()) if len(xs) > 25 else None


def direction(first, last):
    dx, dy = last[0] - first[0], last[1] - first[1]
    return ("right" if dx > 0 else "left") if abs(dx) > abs(dy) else ("down" if dy > 0 else "up")


def test_clips_agree_with_their_decoded_frames(world):
    kinds, shown = Counter(), {}
    for split in ("train", "heldout"):
        for record in lines(world, split, "video"):
            clips = []
            for item in media(record, "video"):
                key = split, item["video"]
                if key not in shown:
                    shown[key] = frames(world, split, item)
                    times = [t for t, _ in shown[key]]
                    assert shown[key][0][1].shape == (item["height"], item["width"])
                    assert times[0] == 0 and len(times) == round(item["duration"] * item["fps_source"])
                    assert np.allclose(np.diff(times), 1 / item["fps_source"], atol=2e-3)
                clips.append(shown[key])
            text = " ".join(q + " " + a for q, a in turns(record))
            for question, reply in turns(record):
                if q := re.search(rf"Which way does the {NAME} move\?", question):
                    path = [centre(f, q[1]) for _, f in clips[0]]
                    assert direction(path[0], path[-1]) == reply
                    assert direction(path[0], path[len(path) // 2]) == reply
                    kinds["motion"] += 1
                elif q := re.search(rf"Which appears (first|last), the {NAME} or the {NAME}\?", question):
                    names = {f"{q[2]} {q[3]}": q[2], f"{q[4]} {q[5]}": q[4]}
                    if q[2] != q[4]:
                        start = {n: next(t for t, f in clips[0] if centre(f, c)) for n, c in names.items()}
                        assert (min if q[1] == "first" else max)(start, key=start.get) == reply
                        kinds["order"] += 1
                elif "visible?" in question or "When does" in question:
                    visible = [t for t, f in clips[0] if (f >= 0).sum() > 60]
                    if "visible?" in question:
                        shape, a, b, again = re.fullmatch(
                            r"When is the (\w+) visible\? <\|clip_time_start\|>\[([\d.]+), ([\d.]+)\]"
                            r"<\|clip_time_end\|> an? (\w+) is visible", f"{question} {reply}").groups()
                        step = 1 / media(record, "video")[0]["fps_source"]
                        assert shape == again and abs(max(visible) + step - float(b)) < .06
                        # a reader that takes the last or the nearest frame at 0, 0.5, 1.0 ... sees exactly the interval
                        half = np.arange(0, clips[0][-1][0], .5)
                        for pick in (lambda t: max(x for x, _ in clips[0] if x <= t + 1e-6),
                                     lambda t: min((abs(x - t), x) for x, _ in clips[0])[1]):
                            assert [pick(t) in visible for t in half] == [float(a) <= t < float(b) for t in half]
                    else:
                        a = reply
                    assert abs(min(visible) - float(a)) < .06
                    kinds["event"] += 1
                elif "which clip moves like" in question.lower():
                    ways = []
                    for clip in clips:
                        seen = clip[0][1]
                        colour = list(COLOURS)[np.bincount(seen[seen >= 0]).argmax()]
                        ways.append(direction(centre(clip[0][1], colour), centre(clip[-1][1], colour)))
                    assert ways[int(reply)] == ways[0] != ways[3 - int(reply)]
                    kinds["match"] += 1
                elif q := re.search(rf"An? {NAME} moves (\w+)\. Give the time order", question):
                    stills = [colour_map(pixels(world, split, item), near=85) for item in media(record, "image")]
                    stills = [centre(seen, q[1]) for seen in stills]
                    order = [int(k) - 1 for k in reply.split()]
                    assert sorted(order) == list(range(len(stills)))
                    assert all(direction(stills[i], stills[k]) == q[3] for i, k in zip(order, order[1:]))
                    kinds["reorder"] += 1
                else:
                    kinds["caption"] += "escribe" in question
                    if q := re.fullmatch(rf"An? {NAME} moves (\w+)\.", reply):
                        k = int("clip 1" in question)
                        assert direction(centre(clips[k][0][1], q[1]), centre(clips[k][-1][1], q[1])) == q[3]
                    elif q := re.fullmatch(rf"An? {NAME} appears, then {THING}\.", reply):
                        assert f"{q[1]} {q[2]}" in text and f"{q[3]} {q[4]}" in text
    assert len(kinds) == 6 and min(kinds.values()) >= 10, kinds


def test_text_answers(world):
    kinds = Counter()
    for split in ("train", "heldout"):
        for record in lines(world, split, "text"):
            for q, a in turns(record):
                if m := re.fullmatch(r"What is (\d+) ([+-]) (\d+)\?", q):
                    want = str(int(m[1]) + int(m[3]) * (1 if m[2] == "+" else -1))
                elif m := re.fullmatch(r"Sort ([\d ]+)\.", q):
                    want = " ".join(sorted(m[1].split()))
                elif m := re.fullmatch(r"Copy: (.*)", q):
                    want = m[1]
                elif m := re.fullmatch(r"(.*)\. How often is (\w+)\?", q):
                    want = str(m[1].split().count(m[2]))
                else:
                    said, ask = re.fullmatch(r"(.*?\.) (.*\?)", q).groups()
                    want = answer(ask, told(said))
                assert a == want, q
                kinds[q.split()[0]] += 1
    assert min(kinds["What"], kinds["Sort"], kinds["Copy:"]) > 20


def test_reasoning_steps_lead_to_the_answer(world):
    for split in ("train", "heldout"):
        for record in lines(world, split, "reasoning"):
            meta = record["meta"]
            scene = plain(look(pixels(world, split, media(record, "image")[0])))
            assert 1 <= meta["difficulty"] <= 4 and meta["answer"] == turns(record)[0][1]
            for step in meta["steps"]:
                if m := re.fullmatch(r"(\d+) ([+-]) (\d+) = (\d+)", step):
                    assert int(m[1]) + int(m[3]) * (1 if m[2] == "+" else -1) == int(m[4])
                elif m := re.fullmatch(r"(\d) ([<=>]) (\d)", step):
                    assert m[2] == "<=>"[(int(m[1]) > int(m[3])) - (int(m[1]) < int(m[3])) + 1]
                    assert meta["answer"] == ("yes" if m[2] == ">" else "no")
                elif m := re.fullmatch(rf".*?{NAME}(?::| at the) ([a-z ]+)", step):
                    assert scene[m[3].strip()] == (m[1], m[2])
                elif m := re.fullmatch(r"([a-z ]+): (\w+)(?: (\d))?", step):
                    if m[1] != "text":  # "top: circle 2", the number where the shape is asked for
                        asked = [SINGULAR[w] for w in re.findall(r"\w+", turns(record)[0][0]) if w in SINGULAR]
                        assert scene[m[1]][1] == m[2] and (m[2] in asked) == bool(m[3])
                else:
                    string = re.fullmatch(r"text: ([\d+-]+)", step)[1]
                    assert sum(int(v) for v in re.findall(r"[+-]?\d", string)) == int(meta["answer"])
            assert meta["answer"] in meta["steps"][-1] or meta["task"] == "compare_count"


def image_size(world, split, record):
    return Image.open(world / split / media(record, "image")[0]["image"]).size


def running(steps, what):
    """The running numbers behind a counted value, e.g. of "circle": 1, 2; every other step has none."""
    found = [re.fullmatch(r"(?:.*: )?(\w+)(?: (\d))?", step).groups() for step in steps]
    assert all((value == what) == bool(k) for value, k in found)
    return [int(k) for value, k in found if k]


def test_single_questions_have_true_steps(world):
    tasks = Counter()
    for split, path in [(p.parent.name, p) for p in sorted(world.glob("*/*.jsonl"))]:
        for record in map(json.loads, path.read_text().splitlines()):
            (q, reply), *more = turns(record)
            if more or not q:
                assert "meta" not in record
                continue
            meta, task = record["meta"], record["meta"]["task"]
            steps, true = meta["steps"], meta["answer"]
            assert steps and all(isinstance(s, str) and s for s in steps)
            tasks[task, path.stem == "questions"] += 1
            array = pixels(world, split, media(record, "image")[0]) if media(record, "image") else None
            scene = plain(look(array)) if path.stem == "instruct" and array is not None else None
            if task in ("sum_count", "compare_count"):
                a, sign, b, *total = re.fullmatch(r"(\d) ([+<=>]) (\d)(?: = (\d))?", steps[-1]).groups()
                names = [SINGULAR[w] for w in re.findall(r"\w+", q) if w in SINGULAR]
                found = [re.fullmatch(r".*: (\w+)(?: (\d))?", s).groups() for s in steps[:-1]]
                for name, n in zip(names, (a, b)):
                    assert [k for s, k in found if s == name] == [str(k + 1) for k in range(int(n))]
                assert total == [true] if sign == "+" else (sign == ">") == (true == "yes")
            elif task in ("count_of", "count_point", "count_words"):
                what = re.search(r"often is (\w+)|(?:many|all) (\w+)", q)
                what = what[1] or SINGULAR.get(what[2], what[2])
                assert running(steps, what) == list(range(1, int(true) + 1))
            elif task == "count":
                assert [s.split(": ")[1] for s in steps] == [str(k + 1) for k in range(int(true))]
            elif task == "exist":
                name = re.search(NAME, q)[0]
                assert any(s.startswith(name) for s in steps) == (true == "yes") == (steps[-1] != f"no {name}")
                assert true == "no" or steps[-1].startswith(name)
            elif task in ("colour", "shape", "position", "text_position", "text_colour_of"):
                assert re.search(rf"\b{true}\b", steps[-1]) and (len(steps) == 1 or steps[-1] in steps[:-1])
                if array is not None:  # all that is there, once and in order, then the one that is asked for
                    seen = [f"{c} {s} at the {p}" for p, (c, s) in plain(look(array)).items()]
                    assert sorted(steps[:max(1, len(steps) - 1)]) == sorted(seen)
                if said := re.search(r"(?:at|is) the ([a-z ]+)\?", q):
                    assert said[1].replace("object ", "").removesuffix(" object") in steps[-1]
            elif task in ("arithmetic", "drawn_arithmetic"):
                now = None
                for step in steps[task == "drawn_arithmetic":]:
                    x, sign, y, z = re.fullmatch(r"(\d+) ([+-]) (\d+) = (\d+)", step).groups()
                    assert now in (None, x) and int(z) == int(x) + int(sign + y)
                    now = z
                assert now == true
                if task == "arithmetic":
                    assert f"{meta['sign']} {meta['second']}?" in q and steps[0].startswith(q.split()[2] + " ")
            elif task == "sort":
                assert " ".join(s.split(": ")[1] for s in steps) == true and steps[0].startswith("smallest")
            elif task in ("copy", "read"):
                assert steps[0].split(": ")[1] == str(len(true.split() if task == "copy" else true))
            elif task in ("caption", "story"):
                assert steps == [f"objects: {len(told(reply))}"]
            elif task == "text_length":
                assert len(steps[0].removeprefix("text: ")) == int(true)
            elif task == "text_colour":
                assert steps == [f"text: {true}"]
            elif task == "which_picture":
                name = re.search(NAME, q)[0]
                assert [s.split(": ")[0][-1] for s in steps if name in s.split(": ")[1].split(", ")] == [true]
            elif task in ("motion", "say_motion", "video_caption"):
                move = re.search(r"(left|right|up|down)\.?$", reply)[1]
                assert steps[1] == f"last at the { {'up': 'top', 'down': 'bottom'}.get(move, move) }"
                assert steps[0] != steps[1] and steps[0].startswith("first at the ")
            elif task == "order":
                assert steps[0] == f"first: {true}" and steps[1][6:] in meta["choices"] and steps[1][6:] != true
            elif task == "event_time":
                assert [float(s.split()[1]) for s in steps] == json.loads(true)
            elif task == "match":
                assert [s.split(": ")[1] == steps[0].split(": ")[1] for s in steps[1:]] == [true == "1", true == "2"]
            elif task == "reorder":
                ranks = [int(s.split(": ")[1]) for s in steps]
                assert " ".join(str(ranks.index(r) + 1) for r in sorted(ranks)) == true
            elif path.stem == "detail" or meta["category"] == "detail":
                colour, place = re.fullmatch(r"(\w+) dot at the ([a-z ]+)", steps[0]).groups()
                assert place == meta["place"] and re.search(f"{colour} dot|dot at the {place}", q) and len(steps) == 1
                w, h = image_size(world, split, record)
                x1, y1, x2, y2 = meta["crop"]
                pixel = pixels(world, split, media(record, "image")[0])[(y1 + y2) * h // 2000, (x1 + x2) * w // 2000]
                if task != "detail_low_contrast" and true != "ring":  # a ring's middle is paper
                    assert min(COLOURS, key=lambda c: np.linalg.norm(pixel.astype(float) - COLOURS[c])) == colour
            elif path.stem == "instruct" and scene:
                ask, _, form = q.partition("? ")
                base = None if task in ("as_json", "colour_and_shape", "twice_asked") else answer(ask + "?", scene)
                place = (re.search(r"at the ([a-z ]+?)(?: as JSON|\?|$)", ask) or [0, 0])[1]
                if task == "as_json":
                    assert tuple(json.loads(reply).values()) == scene[place] and list(json.loads(reply))[0] == "colour"
                elif task == "colour_and_shape":
                    assert tuple(reply.split()) == scene[place]
                elif task == "twice_asked":
                    assert tuple(reply.split(", ")[::-1]) == scene[place]
                elif task == "in_capitals":
                    assert reply == base.upper()
                elif task == "option":
                    assert dict(re.findall(r"([ABC])\. (\w+)", form))[reply] == base and form.count(base) == 1
                else:
                    assert task == "in_sentence" and re.search(rf"\b{base}\b", reply) and reply.endswith(".")
                    assert base.isdigit() or ask.split(" is ")[1] == reply[0].lower() + reply[1:].split(" is ")[0]
            else:
                assert task in ("box", "point", "relation"), task
            assert verify(reply, meta)[1] == 1 == score(reply, meta), record
    held = {json.loads(line)["meta"]["task"] for p in (world / "heldout").glob("*.jsonl") if p.stem != "instruct"
            for line in p.read_text().splitlines()}
    assert held == {task for task, asked in tasks if asked}  # each held-out task can be asked of train contents
    assert all(tasks[task, False] >= 20 for task in toyworld.INSTRUCT)


def test_the_look_box_holds_the_dot():
    for i in range(600):
        record = json.loads(toyworld.draw_unit("", "train", "ask.detail", i, 1, (84, 126), dry=True).lines[0][1])
        meta, item = record["meta"], media(record, "image")[0]
        x1, y1, x2, y2 = meta["crop"]  # 44 px around its middle
        x, y, w, h = (x1 + x2) / 2, (y1 + y2) / 2, 8.5 * 1000 / item["width"], 8.5 * 1000 / item["height"]
        a1, b1, a2, b2 = toyworld.look_box(meta["place"])
        assert a1 <= x - w and x + w <= a2 and b1 <= y - h and y + h <= b2, record
        assert 0 <= min(a1, b1) and max(a2, b2) <= 1000 and max(a2 - a1, b2 - b1) < 200


def test_detail_is_readable_in_the_crop_alone(world):
    """Against the shapes drawn alone; as the toy sees the picture, 16 tokens of 28 px, a dot fills under half a patch."""
    masks = {}
    for shape in SHAPES:
        thing = toyworld.Thing("", shape, 4, 22, 22, 7.5, (0, 0, 0))
        paper = toyworld.Paper(toyworld.random.Random(0), 44, 44)
        paper.tint = (255, 255, 255)
        masks[shape] = paper.draw([thing]).mean(-1) < 128
    right = total = 0
    for split in ("train", "heldout"):
        for record in lines(world, split, "detail"):
            meta, image = record["meta"], Image.open(world / split / media(record, "image")[0]["image"])
            assert min(image.size) >= 280 and meta["answer"] in meta["choices"]
            assert 15 * 15 * 16 * 28 * 28 / (image.width * image.height) < 14 * 14 / 2 * 1.1
            x1, y1, x2, y2 = meta["crop"]
            assert 0 <= x1 < x2 < 1000 and 0 <= y1 < y2 < 1000 and (x2 - x1) * (y2 - y1) < 30_000  # under 3 % of it
            w, h = image.size
            crop = image.crop((x1 * w // 1000, y1 * h // 1000, x2 * w // 1000, y2 * h // 1000))
            array = np.asarray(crop.rotate(-meta["rotate"]).resize((44, 44)).convert("RGB"), float)  # Pillow: counter-clockwise
            far = np.linalg.norm(array - np.median(array.reshape(-1, 3), 0), axis=-1)
            seen = far > far.max() / 2
            share = lambda m: max((seen & m_).sum() / (seen | m_).sum() for dy in (-1, 0, 1) for dx in (-1, 0, 1)
                                  for m_ in [np.roll(m, (dy, dx), (0, 1))])
            right, total = right + (max(meta["choices"], key=lambda s: share(masks[s])) == meta["answer"]), total + 1
    assert total >= 60 and right / total > .8, (right, total)


def test_drawn_texts_are_large_and_of_the_named_colour(world):
    for record in lines(world, "heldout", "ocr"):
        meta, array = record["meta"], pixels(world, "heldout", media(record, "image")[0])
        if meta["task"] == "text_colour":
            seen = colour_map(array)
            ys, xs = np.nonzero(seen >= 0)
            assert list(COLOURS)[np.bincount(seen[seen >= 0]).argmax()] == meta["answer"]
            assert max(np.ptp(xs) / array.shape[1], np.ptp(ys) / array.shape[0]) > .5
            assert xs.min() > 0 and ys.min() > 0 and xs.max() < array.shape[1] - 1 and ys.max() < array.shape[0] - 1
        if meta["task"] == "read":
            assert turns(record)[0][1] == f"<|ocr_text_start|>{meta['answer']}<|ocr_text_end|>"


def contents(world, split):
    """Every canonical content of a split, read from its lines and pictures."""
    found = defaultdict(set)
    scene = lambda s: frozenset((p, *t) for p, t in s.items())
    for name in ("caption", "vqa", "grounding", "reasoning", "pairs", "ocr", "interleaved", "text", "video", "instruct"):
        if name == "pairs" and split == "heldout":
            continue
        for record in lines(world, split, name):
            task, said = record.get("meta", {}).get("task"), " ".join(sum(turns(record), ()))
            if name == "text":
                found["text"] |= {q for q, _ in turns(record)}
            elif name == "ocr":
                found["ocr"] |= set(re.findall(r"ocr_text_start\|>(\w+)<", said))
            elif task == "drawn_arithmetic":
                found["ocr"].add(record["meta"]["steps"][0])
            elif name == "video" or task == "say_motion":
                found["motion"] |= set(re.findall(rf"^Which way does the {NAME} move\?.* (\w+?)\.?$", said))
                found["motion"] |= set(re.findall(rf"n? {NAME} moves (\w+)\.", said))
                found["order"] |= set(re.findall(rf"n? {NAME} appears, then {THING}\.", said))
                found["event"] |= set(re.findall(rf"n? {NAME} is visible from (\S+) to (\S+) seconds", said))
            else:
                grid = 2 if name == "interleaved" else 3
                found["scene"] |= {scene(plain(look(pixels(world, split, i), grid))) for i in media(record, "image")}
    return found


def test_heldout_content_never_occurs_in_train(world):
    train, held = contents(world, "train"), contents(world, "heldout")
    for kind in ("scene", "text", "ocr", "motion"):
        assert len(held[kind]) >= 8, kind
        assert not held[kind] & train[kind], kind
    assert {s for s in train["scene"] if len(s) == 1} and {s for s in held["scene"] if len(s) == 1}
    for split, found in (("train", train), ("heldout", held)):  # orders and events: by the rule, each split on its side
        keys = [f"{kind}:{' '.join(truth)}" for kind in ("order", "event") for truth in found[kind]]
        assert all(toyworld.is_heldout(k) == (split == "heldout") for k in keys)


def test_heldout_answers_are_balanced_and_lines_complete(world):
    answers, category = defaultdict(Counter), set()
    for path in (world / "heldout").glob("*.jsonl"):
        for record in lines(world, "heldout", path.stem):
            meta = record["meta"]
            assert {"task", "category", "answer", "verifier", "chance"} <= set(meta) and len(record["messages"]) == 2
            assert meta["verifier"] in "exact number yesno box point interval order text choice".split()
            if "choices" in meta:
                assert meta["answer"] in meta["choices"] and abs(meta["chance"] - 1 / len(meta["choices"])) < 1e-3
                if meta["task"] == "order":
                    meta["answer"] = str(meta["choices"].index(meta["answer"]))
                answers[meta["task"], len(meta["choices"])][meta["answer"]] += 1
            category.add(meta["category"])
    assert category == set(toyworld.CATEGORY.values())
    for (task, n), count in answers.items():
        if task not in ("text_length", "match"):
            assert max(count.values()) <= max(1.5 * count.total() / n, count.total() / n + 1), (task, n, count)
    assert {"colour", "shape", "count", "position", "motion", "exist"} <= {task for task, _ in answers}


def test_train_answers_are_balanced():
    answers, first = defaultdict(Counter), Counter()
    kind = lambda q: re.sub(rf"\b({'|'.join([*COLOURS, *SHAPES, *SINGULAR])})\b", "X", re.sub(f"at the .*", "at P", q))
    for i in range(1500):
        u = toyworld.draw_unit("", "train", "scene", i, 0, (70, 126), dry=True)
        for name, line in u.lines:
            if name == "vqa":
                for k, (q, a) in enumerate(turns(json.loads(line))):
                    answers[kind(q)][a] += 1
                    first[kind(q)] += k == 0
    for q, n in {"What colour is the object at P": 8, "What colour is the X?": 8, "What shape is the object at P": 6,
                 "How many objects are there?": 5, "How many X are there?": 3, "How many X objects are there?": 3,
                 "Where is the X X?": 9, "Is there a X X?": 2}.items():
        assert len(answers[q]) == n and max(answers[q].values()) < 1.5 * answers[q].total() / n, (q, answers[q])
        assert first[q] > 50, (q, first)  # every kind also opens a conversation
    assert first["Describe the picture."] > 50


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_same_seed_same_bytes_for_any_number_of_processes(tmp_path):
    small = dict(pictures=60, clips=6, heldout=5, progress=False)
    make_world(tmp_path / "a", workers=1, **small)
    make_world(tmp_path / "b", workers=2, **small)
    a, b = tree(tmp_path / "a"), tree(tmp_path / "b")
    assert a == b and len(a) > 150
    make_world(tmp_path / "c", workers=1, seed=1, **small)
    c = tree(tmp_path / "c")
    assert a["train/vqa.jsonl"] != c["train/vqa.jsonl"]


def test_finished_world_is_kept_and_another_is_never_half_written(tmp_path, monkeypatch):
    small, out = dict(pictures=10, clips=2, heldout=0, workers=1, progress=False), tmp_path / "w"
    first = make_world(out, **small)
    (out / "mark").write_text("kept")
    assert make_world(out, **small)["reused"] and (out / "mark").exists()
    (tmp_path / ".w.part" / "train").mkdir(parents=True)  # left behind by a killed run
    again = make_world(out, **small | {"pictures": 12})
    assert not (out / "mark").exists() and "reused" not in again and again["settings"] != first["settings"]
    assert [p.name for p in tmp_path.iterdir()] == ["w"]
    before = tree(out)
    monkeypatch.setattr(toyworld, "draw_job", lambda job: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_world(out, **small)
    assert tree(out) == before  # the old world stands until the new one is complete
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(FileExistsError, match="mine"):
        make_world(tmp_path / "mine", **small)
    with pytest.raises(ValueError, match="huge"):
        make_world(tmp_path / "x", size="huge")


def test_media_paths_stay_inside_and_sizes_are_told(world):
    seen = set()
    for split in ("train", "heldout"):
        for path in (world / split).glob("*.jsonl"):
            for record in lines(world, split, path.stem):
                for item in media(record, "image"):
                    assert Image.open(world / split / item["image"]).size == (item["width"], item["height"])
                    seen.add((item["width"], item["height"]))
                for item in media(record, "image") + media(record, "video"):
                    name = item.get("image") or item["video"]
                    assert not Path(name).is_absolute() and ".." not in name
                    assert (world / split / name).stat().st_size > 100
    assert len(seen) > 200  # many sizes and aspect ratios


def gpt2_bytes():
    """{character of the GPT-2 byte alphabet: byte}, as published."""
    bs = [ord(c) for a, b in ("!~", "¡¬", "®ÿ") for c in map(chr, range(ord(a), ord(b) + 1))]
    cs = bs[:]
    for b in range(256):
        if b not in bs:
            cs.append(256 + len(bs) - 188)
            bs.append(b)
    return {chr(c): b for b, c in zip(bs, cs)}


def test_committed_vocabulary(world):
    vocab = json.loads((Path(toyworld.__file__).parent / "vocab-toy.json").read_text(encoding="utf-8"))
    assert sorted(vocab.values()) == list(range(992))
    table = gpt2_bytes()
    ranks = {bytes(table[c] for c in token): rank for token, rank in vocab.items()}
    assert sorted(ranks[bytes([b])] for b in range(256)) == list(range(256)) and len(ranks) == 992
    pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
               r"|\s*[\r\n]+|\s+(?!\S)|\s+")
    bpe = tiktoken.Encoding("toy", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    for text in ("A red circle at the top left.", "Ünïcode 漢字 🙂\n\n  x", "[[12, 345, 6, 789]]"):
        assert bpe.decode(bpe.encode(text)) == text
    for token, rank in ranks.items():  # every entry is reachable by merges, none is dead
        assert bpe._core_bpe.encode_single_token(token) == rank
    places = "top left center right bottom at the picture moves".split()
    for word in [*COLOURS, *SHAPES, *PLURAL.values(), *places]:
        assert len(bpe.encode(" " + word)) == 1, word
    assert bpe.encode("42") == [ranks[b"4"], ranks[b"2"]]
    for record in lines(world, "train", "caption"):
        caption = turns(record)[0][1]
        assert len(bpe.encode(caption)) <= 8 * len(told(caption))


def test_train_vocab_merges_the_most_frequent_pair_first():
    vocab = toyworld.train_vocab(Counter({"low low lower<|box_start|>lo": 3, "x": 1}), 259)
    assert list(vocab)[256:] == ["lo", "low", "Ġlow"] and list(vocab.values()) == list(range(259))
    with pytest.raises(ValueError, match="EXTRA"):
        toyworld.train_vocab(Counter({"ab": 1}), 300)
