"""evaluate.py: known answers, known tables, and that blind means blind."""
import json
import math
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate as E
import toyworld
from conftest import ROOT
from data import BUDGETS, Processor, pack
from evaluate import evaluate, grade, score, scoreboard, wilson
from rewards import edit_distance, normal
from generate import Generator
from model import PRESETS, KeyeVL

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
BOX = "<|object_ref_start|>red cross<|object_ref_end|><|box_start|>{}<|box_end|>"
POINT = "<|point_start|>{}<|point_end|>"
TIME = "<|clip_time_start|>{}<|clip_time_end|> a star is visible"
TWO = [[0, 0, 100, 100], [500, 500, 600, 600]]


@pytest.mark.parametrize("verifier, answer, right, wrong", [
    ("choice", "top left", ["top left", " Top  Left. ", "TOP LEFT\n"],
     ["top", "left top", "the top left", "", "top left right"]),
    ("yesno", "yes", ["yes", "Yes.", "YES"], ["no", "yes no", "yesterday", ""]),
    ("exact", "Ab", ["Ab", " Ab "], ["ab", "A b"]),
    ("text", "Y9C3", ["<|ocr_text_start|>Y9C3<|ocr_text_end|>", "Y9C3", "Ｙ9C3"], ["y9c3", "Y9C", "Y9C33", ""]),
    ("number", "3", ["3", "3.0", " 3.", "+3", f"<|object_ref_start|>a<|object_ref_end|>{POINT.format('[[1, 2]]')} 3"],
     ["three", "3 4", "33", "", "-3", "3 objects", POINT.format("[[3, 3]]"), "nan", "inf", "1e1", "9" * 400]),
    ("number", "-2.5", ["-2.5", "-2.50"], ["2.5", "-2,5"]),
    ("order", "2 1 3", ["2 1 3", "2, 1, 3", "2 1 3."], ["1 2 3", "213", "2 1", "2 1 3 3", ""]),
    ("box", "[[100, 100, 300, 300]]", [BOX.format("[[100, 100, 300, 300]]"), BOX.format("[[110, 90, 300, 320]]"),
                                       BOX.format("[[100.0, 100, 300, 300]]")],
     ["", "[[100, 100, 300, 300]]", BOX.format("[[100, 100, 300, 300]]") * 2, *map(BOX.format, (
         "[[600, 600, 700, 700]]", "[[300, 300, 100, 100]]", "[]", "{}", "[[100, 100, 300]]", "[[100, 100, 300, NaN]]",
         '[["a", 1, 2, 3]]', "[[[", "[" * 5000, "[[100, 100, 300, 300], [100, 100, 300, 300]]", "[[1e999, 0, 1, 1]]",
         "[[true, 0, 1, 1]]"))]),
    ("box", json.dumps(TWO), [BOX.format(json.dumps(TWO)), BOX.format(json.dumps(TWO[::-1]))],
     [BOX.format(json.dumps(TWO[:1]))]),
    ("interval", "[0.5, 2.0]", [TIME.format("[0.5, 2.0]"), TIME.format("[0.5, 2.5]")],
     ["", "[0.5, 2.0]", *map(TIME.format, ("[2.0, 0.5]", "[0.5, 5.0]", "0.5 to 2", "[[0.5, 2.0]]"))]),
    ("point", "[[500, 500]]", [POINT.format("[[540, 540]]")],
     [POINT.format("[[561, 500]]"), POINT.format("[500, 500]"), ""]),
])
def test_scores(verifier, answer, right, wrong):
    meta = {"verifier": verifier, "answer": answer}
    assert [t for t in right if score(t, meta) != 1.0] == []
    assert [t for t in wrong if score(t, meta) != 0.0] == []


def test_points_need_a_box_each():
    meta = {"verifier": "point", "answer": "[[50, 50], [550, 550]]", "boxes": TWO}
    assert score(POINT.format("[[590, 510], [1, 99]]"), meta) == 1  # far from the centre, but inside; any order
    for wrong in ("[[50, 50]]", "[[50, 50], [60, 60]]", "[[50, 50], [550, 550], [551, 551]]", "[[50, 50], [700, 550]]"):
        assert score(POINT.format(wrong), meta) == 0
    one = {"verifier": "point", "answer": "[[50, 50]]", "box": TWO[0]}
    assert score(POINT.format("[[99, 1]]"), one) == 1 and score(POINT.format("[[101, 1]]"), one) == 0


def test_graded_measures():
    box = {"verifier": "box", "answer": "[[0, 0, 100, 100]]"}
    assert grade(BOX.format("[[50, 0, 150, 100]]"), box) == pytest.approx(1 / 3)
    assert score(BOX.format("[[50, 0, 150, 100]]"), box) == 0
    assert grade(TIME.format("[1, 3]"), {"verifier": "interval", "answer": "[2, 4]"}) == pytest.approx(1 / 3)
    assert grade("ABXD", {"verifier": "text", "answer": "ABCD"}) == 0.25
    for a, b, distance in (("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("ab", "ab", 0)):
        assert edit_distance(a, b) == distance
    assert normal("<|ocr_text_start|> a  b.<|ocr_text_end|>") == "a b"
    with pytest.raises(ValueError, match="mood"):
        score("x", {"verifier": "mood", "answer": "good"})


def test_wilson():
    for k, n, *want in ((0, 10, 0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1), (81, 263, 0.2553, 0.3662)):
        assert wilson(k, n) == pytest.approx(want, abs=1e-4)
    assert wilson(0, 0) == (0, 1)


# -- the benchmark


@pytest.fixture(scope="module")
def processor():
    return Processor(ROOT / "vocab-toy.json", **BUDGETS["toy"])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return KeyeVL.empty(PRESETS["toy"]).init_weights()


def question(content, answer, task, category, verifier="choice", chance=0.0, **more):
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}],
            "meta": dict(task=task, category=category, answer=answer, verifier=verifier, chance=chance, **more)}


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def world(tmp_path):
    """12 pictures of one colour with the question for it, 4 sums without a picture."""
    colours = [list(COLOURS)[i % 3] for i in range(12)]
    lines = []
    for i, colour in enumerate(colours):
        Image.new("RGB", (60 + 20 * (i % 2), 60), COLOURS[colour]).save(tmp_path / f"{i}.png")
        content = [{"type": "image", "image": f"{i}.png"}, {"type": "text", "text": "What colour?"}]
        lines.append(question(content, colour, "colour", "look", chance=1 / 3))
    write(tmp_path / "look.jsonl", lines)
    sums = [question(f"What is {i} + 1?", str(i + 1), "sum", "text", "number") for i in range(4)]
    write(tmp_path / "text.jsonl", sums)
    return tmp_path


@pytest.fixture
def answer_with(monkeypatch):
    """Replaces the model: evaluate gets the text that a function of the sample's mean pixel (3,) or None returns."""
    calls = []

    def use(answer):
        class Fixed:
            def __init__(self, model, processor, rows):
                self.processor = processor

            def sample(self, samples, limits, temperature):
                assert temperature == 0 and len(limits) == len(samples)
                out = []
                for s in samples:
                    pixel = s["patches"].float().unflatten(1, (3, -1)).mean((0, 2)).tolist()
                    pixel = pixel if len(s["patches"]) else None
                    calls.append(pixel)
                    ids = self.processor.tokenizer.encode(answer(pixel), added=True)
                    out.append({"ids": ids, "sampled": [True] * len(ids), "finished": True})
                return out
        monkeypatch.setattr(E, "Generator", Fixed)
        return calls
    return use


def see(pixel):
    return "2" if pixel is None else next((c for c, rgb in COLOURS.items() if math.dist(rgb, pixel) < 60), "grey")


def test_one_who_sees(processor, world, answer_with):
    calls = answer_with(see)
    result = json.loads(json.dumps(evaluate(None, processor, world)))
    colour, total = result["tasks"]["colour"], result["tasks"]["sum"]
    assert (colour["n"], colour["accuracy"], colour["blind"]) == (12, 1.0, 0.0)
    assert colour["chance"] == pytest.approx(1 / 3)
    assert (colour["low"], colour["high"]) == pytest.approx(wilson(12, 12))
    assert (total["n"], total["accuracy"], total["blind"], total["chance"]) == (4, 0.25, None, 0)  # 1 + 1
    assert result["categories"].keys() == {"look", "text"} and result["categories"]["look"]["accuracy"] == 1
    assert result["headline"] == {"accuracy": 1.0, "blind": 0.0, "chance": pytest.approx(1 / 3)}  # of colour alone
    assert result["questions"] == 16 and result["failed"] == []
    example = result["examples"][0]
    assert example["task"] == "colour" and example["question"] == "[image]What colour?"
    assert example["output"] == example["answer"] and example["right"]
    assert sum(p == [128.0] * 3 for p in calls) == 2  # blind: one question for each of the two sizes
    calls.clear()
    assert evaluate(None, processor, world, blind=False)["tasks"]["colour"]["blind"] is None
    assert calls and [128.0] * 3 not in calls


def test_one_who_always_says_red(processor, world, answer_with):
    answer_with(lambda pixel: "red")
    colour = evaluate(None, processor, world, batch=2)["tasks"]["colour"]
    assert colour["accuracy"] == colour["blind"] == colour["chance"] == pytest.approx(1 / 3)


def test_limit_and_choice_of_tasks(processor, world, answer_with):
    answer_with(see)
    assert {t: s["n"] for t, s in evaluate(None, processor, world, limit=3)["tasks"].items()} == {"colour": 3, "sum": 3}
    assert evaluate(None, processor, world, tasks=["text"])["tasks"].keys() == {"sum"}
    assert evaluate(None, processor, world, tasks=["colour"])["headline"]["accuracy"] == 1
    assert evaluate(None, processor, world, tasks=["sum"])["headline"]["accuracy"] is None
    with pytest.raises(ValueError, match="'smell'.*colour, look, sum, text"):
        evaluate(None, processor, world, tasks=["smell"])


def test_broken_media_count_as_wrong_and_are_named(processor, world, answer_with):
    answer_with(see)
    (world / "1.png").unlink()
    (world / "4.png").write_bytes(b"not a picture")
    result = evaluate(None, processor, world)
    colour = result["tasks"]["colour"]
    assert (colour["n"], colour["failed"], colour["accuracy"]) == (12, 2, pytest.approx(10 / 12))
    assert [f["where"].split("/")[-1] for f in result["failed"]] == ["look.jsonl:2", "look.jsonl:5"]
    assert "missing" in result["failed"][0]["reason"] and "unsupported" in result["failed"][1]["reason"]


@pytest.mark.parametrize("spoil", [
    lambda q: q.pop("meta"), lambda q: q["meta"].pop("answer"), lambda q: q["meta"].update(verifier="mood"),
    lambda q: q["messages"].pop(), lambda q: q["meta"].update(verifier="box", answer="nowhere"),
    lambda q: q["meta"].update(verifier="number", answer="many")])
def test_bad_lines_are_named(world, spoil):
    lines = [question("a", "1", "t", "c", "number"), question("b", "2", "t", "c", "number")]
    spoil(lines[1])
    write(world / "more.jsonl", lines)
    with pytest.raises(ValueError, match=r"more\.jsonl:2: "):
        E.read_questions(world)


def test_no_questions(model, processor, tmp_path):
    with pytest.raises(ValueError, match="no .*jsonl"):
        evaluate(model, processor, tmp_path)


def test_blind_removes_the_picture(model, processor, world):
    """Two pictures of one size: the model tells them apart, blind it does not."""
    generator = Generator(model, processor)
    ask = lambda i: processor({"messages": [{"role": "user", "content": [
        {"type": "image", "image": f"{i}.png"}, {"type": "text", "text": "What colour?"}]}]}, world, generate=True)
    red, blue = ask(0), ask(2)
    before = red["patches"].clone()
    with torch.no_grad():
        assert (model.logits(pack([red])) - model.logits(pack([blue]))).abs().max() > 1e-3
    text = [E.blind_answers(generator, [s], [12], {})[0] for s in (red, blue)]  # nothing remembered between them
    assert text[0] == text[1] and len(text[0]) > 0
    assert torch.equal(red["patches"], before)
    grey = ask(0) | {"patches": torch.full_like(before, 128)}
    row, = generator.sample([grey], 12, temperature=0)
    assert text[0] == processor.tokenizer.decode(row["ids"], skip_special=True)
    words = processor({"messages": [{"role": "user", "content": "Hi"}]}, generate=True)
    assert E.blind_answers(generator, [words], [12], {}) == [None]


def test_answers_do_not_depend_on_the_batch(model, processor, world):
    results = [evaluate(model, processor, world, batch=b, limit=3) for b in (1, 5, 64)]
    one, two, three = ({e["where"]: e["output"] for e in r["examples"]} for r in results)
    assert one == two == three and len(one) == 6


def test_scoreboard(processor, world, answer_with):
    answer_with(see)
    full = evaluate(None, processor, world)
    answer_with(lambda pixel: "red")
    part = evaluate(None, processor, world, tasks=["colour"])
    table = scoreboard([("one", full), ("two", part)])
    cells = [[c.strip() for c in row.strip("|").split("|")] for row in table.splitlines()]
    assert cells[0] == ["task", "n", "one %", "two %", "blind %", "chance %"] and set("".join(cells[1])) == {"-", ":"}
    half = 50 * (wilson(12, 12)[1] - wilson(12, 12)[0])
    rows = {row[0]: row[1:] for row in cells[2:]}
    assert list(rows) == ["**look**", "colour", "**text**", "sum", "**headline**"]
    assert rows["colour"][:2] == ["12", f"100.0 ± {half:.1f}"] and rows["colour"][2].startswith("33.3 ± ")
    assert rows["colour"][3:] == ["33.3", "33.3"]  # of the last result: blind it says red as well
    assert rows["sum"][2:] == ["", "", "0.0"]
    assert rows["**headline**"] == ["", "100.0", "33.3", "33.3", "33.3"]
    assert len({len(row) for row in scoreboard([("one", full)]).splitlines()}) == 1  # readable without a renderer
    short = [row.strip("|").split("|")[0].strip() for row in scoreboard([("one", full)], short=True).splitlines()[2:]]
    assert short == ["**look**", "colour", "**text**", "**headline**"]


def test_command_line(model, processor, world, tmp_path, capsys):
    model.save_pretrained(tmp_path / "m")
    processor.save_pretrained(tmp_path / "m")
    (world / "3.png").unlink()
    command = [sys.executable, "evaluate.py", "--init", tmp_path / "m", "--data", world, "--limit", "5",
               "--device", "cpu", "--out", tmp_path / "score.json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| colour" in done.stdout and "mean of colour" in done.stdout and "look.jsonl:4" in done.stdout
    result = json.loads((tmp_path / "score.json").read_text())
    assert result["tasks"]["colour"]["n"] == 5 and result["tasks"]["colour"]["failed"] == 1
    folder = str(tmp_path / "m")
    for argv, message in ((["--init", str(tmp_path)], "config.json"), (["--init", folder, "--limit", "0"], "--limit"),
                          (["--init", folder, "--data", folder], "with questions")):
        with pytest.raises(SystemExit) as error:
            E.main([*argv, "--device", "cpu"])
        assert message in f"{error.value} {capsys.readouterr().err}" and error.value.code != 0


def test_toy_worlds_own_answers_are_right(tmp_path):
    """Every reply that the toy world writes is right for its own question, and for another one mostly wrong."""
    replies, rng = {}, random.Random(0)
    for i in range(60):
        unit = toyworld.Unit(tmp_path, "train", "scene", i, 0, (70, 126), dry=True)
        scene = unit.scene(i % 5 + 1)
        for q in [*toyworld.grounding_questions(rng, scene).values(), *toyworld.scene_questions(rng, scene).values(),
                  toyworld.caption_question(scene), toyworld.text_question(rng, "sort", None)]:
            assert score(q["a"], q["meta"]) == 1, q
            replies.setdefault(q["task"], []).append(q)
    assert {"box", "point", "count_point", "colour", "position", "exist", "caption", "sort"} <= replies.keys()
    for task in ("box", "point", "position", "caption", "sort"):
        pairs = list(zip(replies[task], replies[task][1:]))
        assert np.mean([score(a["a"], b["meta"]) for a, b in pairs]) < 0.5
