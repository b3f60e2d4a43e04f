"""evaluate.py: known answers, known tables, and that blind means blind."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from PIL import Image

import evaluate as E
import toyworld
from common.conversation import MODES, text_of
from common.questions import read_questions
from common.rewards import parse
from common.rollout import Response
from common.run import arguments, start
from common.sandbox import observe
from common.verifiers import grade, score
from conftest import ROOT
from data import pack
from evaluate import board, evaluate, facts_of, task_table, wilson
from generate import Generator
from stage import in_processes

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def question(content, answer, task, category, verifier="choice", chance=0.0, **more):
    return {
        "messages": [
            {"role": "user", "content": content},
            {"role": "assistant", "content": answer},
        ],
        "meta": {
            "task": task,
            "category": category,
            "answer": answer,
            "verifier": verifier,
            "chance": chance,
            **more,
        },
    }


def picture_question(name, answer):
    content = [{"type": "image", "image": name}, {"type": "text", "text": "What colour?"}]
    return question(content, answer, "colour", "look", chance=1 / 3)


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def world(tmp_path):
    """12 pictures of one colour with the question for it, 4 sums without a picture."""
    lines = []
    for i in range(12):
        colour = list(COLOURS)[i % 3]
        size = (60 + 20 * (i % 2), 60)
        Image.new("RGB", size, COLOURS[colour]).save(tmp_path / f"{i}.png")
        lines.append(picture_question(f"{i}.png", colour))
    write(tmp_path / "look.jsonl", lines)
    sums = [question(f"What is {i} + 1?", f"{i + 1}", "sum", "text", "number") for i in range(4)]
    write(tmp_path / "text.jsonl", sums)
    return tmp_path


def break_two_pictures(world):
    (world / "1.png").unlink()
    (world / "4.png").write_bytes(b"not a picture")


def lines_of(failures):
    return [failure["where"].split("/")[-1] for failure in failures]


def test_wilson():
    golden = [(0, 10, 0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1)]
    for hits, n, *interval in [*golden, (81, 263, 0.2553, 0.3662)]:
        assert wilson(hits, n) == pytest.approx(interval, abs=1e-4)


# -- the strict score


BOX = "<|object_ref_start|>red cross<|object_ref_end|><|box_start|>{}<|box_end|>"
POINT = "<|point_start|>{}<|point_end|>"
TIME = "<|clip_time_start|>{}<|clip_time_end|> a star is visible"
ONE = "[[100, 100, 300, 300]]"
TWO = [[0, 0, 100, 100], [500, 500, 600, 600]]
COUNTED = "<|object_ref_start|>a<|object_ref_end|>" + POINT.format("[[1, 2]]") + " 3"
NO_BOXES = [
    "[[600, 600, 700, 700]]",
    "[[300, 300, 100, 100]]",
    "[]",
    "{}",
    "[[100, 100, 300]]",
    "[[100, 100, 300, NaN]]",
    '[["a", 1, 2, 3]]',
    "[[[",
    "[" * 5000,
    "[[100, 100, 300, 300], [100, 100, 300, 300]]",
    "[[1e999, 0, 1, 1]]",
    "[[true, 0, 1, 1]]",
]
NO_TIMES = ["[2.0, 0.5]", "[0.5, 5.0]", "0.5 to 2", "[[0.5, 2.0]]"]
NO_NUMBERS = ["three", "3 4", "33", "", "-3", "3 objects", POINT.format("[[3, 3]]"), "nan", "inf"]
SCORES = [  # verifier, true answer, right ones, wrong ones
    ("choice", "top left",
     ["top left", " Top  Left. ", "TOP LEFT\n"],
     ["top", "left top", "the top left", "", "top left right"]),
    ("yesno", "yes", ["yes", "Yes.", "YES"], ["no", "yes no", "yesterday", ""]),
    ("exact", "Ab", ["Ab", " Ab "], ["ab", "A b"]),
    ("text", "Y9C3",
     ["<|ocr_text_start|>Y9C3<|ocr_text_end|>", "Y9C3", "Ｙ9C3"],
     ["y9c3", "Y9C", "Y9C33", ""]),
    ("number", "3", ["3", "3.0", " 3.", "+3", COUNTED], [*NO_NUMBERS, "1e1", "9" * 400]),
    ("number", "-2.5", ["-2.5", "-2.50"], ["2.5", "-2,5"]),
    ("order", "2 1 3",
     ["2 1 3", "2, 1, 3", "2 1 3."],
     ["1 2 3", "213", "2 1", "2 1 3 3", ""]),
    ("box", ONE,
     [BOX.format(ONE), BOX.format("[[110, 90, 300, 320]]"), BOX.format("[[100.0, 100, 300, 300]]")],
     ["", ONE, BOX.format(ONE) * 2, *map(BOX.format, NO_BOXES)]),
    ("box", json.dumps(TWO),
     [BOX.format(json.dumps(TWO)), BOX.format(json.dumps(TWO[::-1]))],
     [BOX.format(json.dumps(TWO[:1]))]),
    ("interval", "[0.5, 2.0]",
     [TIME.format("[0.5, 2.0]"), TIME.format("[0.5, 2.5]")],
     ["", "[0.5, 2.0]", *map(TIME.format, NO_TIMES)]),
    ("point", "[[500, 500]]",
     [POINT.format("[[540, 540]]")],
     [POINT.format("[[561, 500]]"), POINT.format("[500, 500]"), ""]),
]


@pytest.mark.parametrize("verifier, answer, right, wrong", SCORES)
def test_scores(verifier, answer, right, wrong):
    meta = {"verifier": verifier, "answer": answer}
    assert [text for text in right if score(text, meta) != 1] == []
    assert [text for text in wrong if score(text, meta) != 0] == []


def test_points_need_a_box_each():
    meta = {"verifier": "point", "answer": "[[50, 50], [550, 550]]", "boxes": TWO}
    # far from the centres, but inside; in any order
    assert score(POINT.format("[[590, 510], [1, 99]]"), meta) == 1
    for wrong in (
        "[[50, 50]]",
        "[[50, 50], [60, 60]]",
        "[[50, 50], [550, 550], [551, 551]]",
        "[[50, 50], [700, 550]]",
    ):
        assert score(POINT.format(wrong), meta) == 0
    one = {"verifier": "point", "answer": "[[50, 50]]", "box": TWO[0]}
    assert score(POINT.format("[[99, 1]]"), one) == 1
    assert score(POINT.format("[[101, 1]]"), one) == 0


def test_graded_measures():
    box = {"verifier": "box", "answer": "[[0, 0, 100, 100]]"}
    third = BOX.format("[[50, 0, 150, 100]]")
    assert grade(third, box) == pytest.approx(1 / 3) and score(third, box) == 0
    interval = {"verifier": "interval", "answer": "[2, 4]"}
    assert grade(TIME.format("[1, 3]"), interval) == pytest.approx(1 / 3)
    assert grade("ABXD", {"verifier": "text", "answer": "ABCD"}) == 0.25
    with pytest.raises(ValueError, match="mood"):
        score("x", {"verifier": "mood", "answer": "good"})


def test_toy_worlds_own_answers_are_right(tmp_path):
    """Every held-out reply is right for its own question, and for another one mostly wrong."""
    lines = []
    sides = toyworld.SIZES["toy"].sides
    for split, kind, n in toyworld.plan(0, 0, heldout=6):
        if split == "train":
            continue
        for i in range(n):
            unit = toyworld.draw_unit("", split, kind, i, 0, sides, dry=True)
            lines += [line for name, line in unit.lines if name != "preferences"]
    (tmp_path / "all.jsonl").write_text("\n".join(lines))
    by_task = {}
    for question in read_questions(tmp_path):
        reply = text_of(question.record["messages"][-1])
        assert score(reply, question.meta) == 1, question.record
        by_task.setdefault(question.task, []).append((reply, question.meta))
    assert len(by_task) > 30
    for task in ("box", "point", "position", "caption", "sort"):
        replies = by_task[task]
        others = [score(a[0], b[1]) for a, b in zip(replies, replies[1:])]
        assert sum(others) / len(others) < 0.5


# -- the bare question


@pytest.fixture
def answer_with(monkeypatch):
    """Replaces the model: evaluate gets the text that a function of the sample's mean pixel gives.

    The pixel is [red, green, blue], or None without a picture. Returns the list of all pixels met.
    """
    pixels = []

    def use(answer):
        class Fixed:
            def __init__(self, model, processor, rows):
                self.processor = processor

            def sample(self, samples, max_tokens, temperature, **how):
                assert temperature == 0 and len(max_tokens) == len(samples)
                return [self.respond(sample) for sample in samples]

            def respond(self, sample):
                pixel = None
                if len(sample["patches"]):
                    channels = sample["patches"].float().unflatten(1, (3, -1))
                    pixel = channels.mean((0, 2)).tolist()
                pixels.append(pixel)
                ids = self.processor.tokenizer.encode(answer(pixel), added=True)
                return Response(ids=ids, sampled=[True] * len(ids), finished=True)

        monkeypatch.setattr(E, "Generator", Fixed)
        return pixels

    return use


def see(pixel):
    if pixel is None:
        return "2"
    for colour, rgb in COLOURS.items():
        if math.dist(rgb, pixel) < 60:
            return colour
    return "grey"


def test_one_who_sees(processor, world, answer_with):
    pixels = answer_with(see)
    result = json.loads(json.dumps(evaluate(None, processor, world, blind=True)))
    colour, total = result["tasks"]["colour"], result["tasks"]["sum"]
    assert (colour["n"], colour["accuracy"], colour["blind"]) == (12, 1.0, 0.0)
    assert colour["chance"] == pytest.approx(1 / 3)
    assert (colour["low"], colour["high"]) == pytest.approx(wilson(12, 12))
    assert (total["n"], total["accuracy"], total["blind"], total["chance"]) == (4, 0.25, None, 0)
    assert result["categories"].keys() == {"look", "text"}
    assert result["categories"]["look"]["accuracy"] == 1
    # of colour alone, the one task of the headline that is there
    assert result["headline"] == {"accuracy": 1, "blind": 0, "chance": pytest.approx(1 / 3)}
    assert result["questions"] == 16 and result["failed"] == [] and result["mode"] == "plain"
    example = result["examples"][0]
    assert example["task"] == "colour" and example["question"] == "[image]What colour?"
    assert example["output"] == example["answer"] and example["right"]
    assert pixels.count([128.0] * 3) == 12  # the sums are not asked again

    pixels.clear()
    assert evaluate(None, processor, world)["tasks"]["colour"]["blind"] is None
    assert len(pixels) == 16 and [128.0] * 3 not in pixels


def test_one_who_always_says_red(processor, world, answer_with):
    answer_with(lambda pixel: "red")
    colour = evaluate(None, processor, world, blind=True, rows=2)["tasks"]["colour"]
    assert colour["accuracy"] == colour["blind"] == colour["chance"] == pytest.approx(1 / 3)


def test_mixed_is_the_mean_of_categories_not_of_tasks(processor, world, answer_with):
    more = [question(f"What is {i} + 1?", "77", f"sum{i}", "text", "number") for i in range(3)]
    write(world / "more.jsonl", more)
    answer_with(see)
    result = evaluate(None, processor, world)
    assert result["categories"]["text"]["accuracy"] == pytest.approx(1 / 7)  # 2 is 1 + 1
    assert result["mixed"] == pytest.approx((1 + 1 / 7) / 2)


def test_a_blind_score_is_that_of_the_same_question(processor, tmp_path, answer_with):
    """A question without a picture, between two that have one, is not asked again."""
    for name in ("red", "blue"):
        Image.new("RGB", (60, 60), COLOURS[name]).save(tmp_path / f"{name}.png")
    first, last = picture_question("red.png", "red"), picture_question("blue.png", "2")
    last["meta"]["task"] = "sum"
    write(tmp_path / "all.jsonl", [first, question("1 + 1?", "2", "sum", "text"), last])
    answer_with(lambda pixel: "red" if pixel == [128.0] * 3 else "2")
    tasks = evaluate(None, processor, tmp_path, blind=True)["tasks"]
    assert (tasks["colour"]["accuracy"], tasks["colour"]["blind"]) == (0, 1)
    assert (tasks["sum"]["accuracy"], tasks["sum"]["blind"]) == (1, 0)


def test_what_is_taught_later_stands_apart(processor, world, answer_with):
    """A column beside blind and chance, and in no mean."""
    answer_with(see)
    before = evaluate(None, processor, world)
    assert before["categories"].keys() == {"look", "text"}
    lines = [json.loads(line) for line in (world / "look.jsonl").read_text().splitlines()]
    for line in lines:
        line["meta"] |= {"task": "lowest", "category": "discover", "difficulty": 3}
    write(world / "discover.jsonl", lines)
    result = evaluate(None, processor, world)
    assert result["categories"]["discover"]["accuracy"] == 1
    assert result["categories"]["discover"]["blind"] == 0
    assert result["categories"]["look"]["blind"] is None, "the others only where it is asked for"
    for same in ("mixed", "all", "thinking", "headline"):
        assert result[same] == before[same], same
    alone = evaluate(None, processor, world, tasks=["lowest"])
    assert alone["mixed"] is None and alone["all"]["accuracy"] == 1

    head, _, old, new, more = E.board([("a", before), ("b", result), ("c", alone)]).splitlines()
    column = [cell.strip() for cell in head.split("|")].index("discover (blind, chance)")
    cells = [[cell.strip() for cell in line.split("|")][column] for line in (old, new, more)]
    assert cells == ["", "100.0 (0.0, 33.3)", "100.0 (0.0, 33.3)"]


def test_a_control_that_was_not_asked_for_is_a_dash():
    """In modes with tools, which show the pictures, nothing is blind."""
    assert E.beside_chance({"accuracy": 0.5, "blind": None, "chance": 0.25}) == "50.0 (-, 25.0)"
    assert E.beside_chance(None) == ""


def test_limit_and_choice_of_tasks(processor, world, answer_with):
    answer_with(see)
    three = evaluate(None, processor, world, limit=3)["tasks"]
    assert {task: numbers["n"] for task, numbers in three.items()} == {"colour": 3, "sum": 3}
    assert evaluate(None, processor, world, tasks=["text"])["tasks"].keys() == {"sum"}
    assert evaluate(None, processor, world, tasks=["colour"])["headline"]["accuracy"] == 1
    assert evaluate(None, processor, world, tasks=["sum"])["headline"]["accuracy"] is None
    with pytest.raises(ValueError, match="'smell'.*colour, look, sum, text"):
        evaluate(None, processor, world, tasks=["smell"])


def test_broken_media_count_as_wrong_and_are_named(processor, world, answer_with):
    answer_with(see)
    break_two_pictures(world)
    result = evaluate(None, processor, world, blind=True)
    colour = result["tasks"]["colour"]
    assert (colour["n"], colour["failed"]) == (12, 2)
    assert colour["accuracy"] == pytest.approx(10 / 12) and colour["blind"] == 0
    assert lines_of(result["failed"]) == ["look.jsonl:2", "look.jsonl:5"]
    missing, unsupported = result["failed"]
    assert "missing" in missing["reason"] and "unsupported" in unsupported["reason"]


def test_graded_measures_stand_beside_the_score(processor, world, answer_with):
    """Of the tasks that have one; other tasks of the category do not count."""
    box = "<|object_ref_start|>a<|object_ref_end|><|box_start|>[[0, 0, 50, 100]]<|box_end|>"
    write(world / "look.jsonl", [
        question("Where?", "[[0, 0, 100, 100]]", "box", "look", "box"),
        question("Read.", "ABCD", "read", "look", "text"),
        question("Which?", "red", "colour", "look"),
    ])
    answer_with(lambda pixel: box)
    result = evaluate(None, processor, world, tasks=["look"])
    assert result["tasks"]["box"]["iou"] == pytest.approx(1 / 2)
    assert result["tasks"]["box"]["cer"] is None and result["tasks"]["colour"]["iou"] is None
    assert result["categories"]["look"]["iou"] == pytest.approx(1 / 2)
    assert result["categories"]["look"]["cer"] == result["tasks"]["read"]["cer"] > 1


def test_no_questions(model, processor, tmp_path):
    with pytest.raises(ValueError, match="no .*jsonl"):
        evaluate(model, processor, tmp_path)


def test_blind_removes_the_picture(model, processor, world):
    """Two pictures of one size: the model tells them apart, blind it does not."""

    def encode(processor, i):
        content = picture_question(f"{i}.png", "red")["messages"][0]
        return processor({"messages": [content]}, world, generate=True)

    red, blue = encode(processor, 0), encode(processor, 2)
    with torch.no_grad():
        difference = model.logits(pack([red])) - model.logits(pack([blue]))
    assert difference.abs().max() > 1e-3

    blindfold = E.Blindfold(processor)
    red_blind, blue_blind = encode(blindfold, 0), encode(blindfold, 2)
    assert red_blind.keys() == red.keys()
    for key, value in red_blind.items():
        if key == "patches":
            assert value.shape == red[key].shape and value.dtype == red[key].dtype
            assert (value == 128).all() and (red[key] != 128).all()
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, red[key])
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(blue_blind[key]))


def test_tools_are_never_asked_blind(model, processor, world):
    with pytest.raises(ValueError, match="agentic_think"):
        evaluate(model, processor, world, mode="agentic_think", blind=True)


def test_answers_do_not_depend_on_the_batch(model, processor, world):
    outputs = []
    for rows in (1, 5, 64):
        examples = evaluate(model, processor, world, rows=rows, limit=3)["examples"]
        outputs.append({example["where"]: example["output"] for example in examples})
    assert outputs[0] == outputs[1] == outputs[2] and len(outputs[0]) == 6


# -- modes


CLOSE = "</tool_call>"


def call(code):
    return f"<tool_call>{code}{CLOSE}"


def boxed(answer, thinking="a b"):
    return f"<think>{thinking}</think><answer>It is \\boxed{{{answer}}}</answer>"


def chosen(mode, rest):
    return f"<analysis>Easy, so /{mode}.</analysis>{rest}"


def scripted(monkeypatch, say):
    """Every row writes what `say` makes of its prompt's text, and ends. Returns the prompts."""
    prompts = []
    step = Generator.step

    def forced(self, rows, cache):
        tokenizer = self.processor.tokenizer
        for row in rows:
            if row.unread and not row.response.ids:
                prompts.append(tokenizer.decode(row.unread["tokens"]))
                row.script = iter(tokenizer.encode(say(prompts[-1]), added=True))
        logits = step(self, rows, cache)
        for i, row in enumerate(rows):
            logits[i, next(row.script, tokenizer.special["<|im_end|>"])] = 1000
        return logits

    monkeypatch.setattr(Generator, "step", forced)
    return prompts


@pytest.fixture
def ask(model, processor, world, monkeypatch):
    """evaluate, with a model that writes what `say` makes of the prompt -> result, prompts."""

    def use(say, mode, **how):
        prompts = scripted(monkeypatch, say if callable(say) else lambda prompt: say)
        result = evaluate(model, processor, world, mode=mode, **how)
        monkeypatch.undo()
        return result, prompts

    return use


SWITCHES = {
    "think": "/think",
    "no_think": "/no_think",
    "agentic_think": "/agentic_think",
    "auto_think": "",
    "plain": "",
}


@pytest.mark.parametrize("mode", SWITCHES)
def test_the_switch_stands_behind_the_question(ask, mode):
    switch = SWITCHES[mode]
    result, prompts = ask("red", mode, limit=2)
    assert len(prompts) == result["questions"] == 4 and result["mode"] == mode
    end = f"What colour?{switch}<|im_end|>\n<|im_start|>assistant\n"
    assert sum(prompt.endswith(end) for prompt in prompts) == 2
    assert re.findall(r"\d \+ 1\?(.*?)<", "".join(prompts)) == [switch] * 2
    asked = {example["question"] for example in result["examples"]}
    assert asked == {"[image]What colour?", "What is 0 + 1?", "What is 1 + 1?"}  # without it


def true_sum(prompt):
    return int(re.search(r"(\d) \+ 1", prompt)[1]) + 1


def say_in_auto_think(prompt):
    if true_sum(prompt) % 2:
        return chosen("think", boxed(true_sum(prompt), "7"))
    return chosen("no_think", true_sum(prompt))


@pytest.mark.parametrize("mode, say", [
    ("think", lambda p: boxed(true_sum(p), "7")),
    ("no_think", lambda p: f"{true_sum(p)}"),
    ("agentic_think", lambda p: boxed(true_sum(p), "7")),
    ("auto_think", say_in_auto_think),
    ("plain", lambda p: f"{true_sum(p)}"),
])
def test_the_right_answer_in_the_form_of_the_mode_counts(ask, mode, say):
    result, _ = ask(say, mode, tasks=["sum"])
    assert result["tasks"]["sum"]["accuracy"] == result["mixed"] == 1
    assert result["all"]["obeyed"] == 1 and result["all"]["format"] == 0
    assert all(example["right"] for example in result["examples"])


@pytest.mark.parametrize("mode", ["think", "agentic_think"])
def test_a_right_answer_inside_the_thinking_does_not_count(ask, mode):
    result, _ = ask(lambda p: boxed(7, f"So \\boxed{{{true_sum(p)}}}."), mode, tasks=["sum"])
    assert result["all"]["obeyed"] == 1 and result["tasks"]["sum"]["accuracy"] == 0
    result, _ = ask(lambda p: f"<think>So {true_sum(p)}", mode, tasks=["sum"])
    assert result["tasks"]["sum"]["accuracy"] == 0


def test_all_that_is_said_answers_a_bare_question(ask):
    result, _ = ask(lambda p: boxed(true_sum(p)), "plain", tasks=["sum"], max_tokens=100)
    assert result["tasks"]["sum"]["accuracy"] == 0


def test_an_example_shows_all_that_was_said(ask):
    said = "<think>2</think><answer>\\boxed{1}</answer>"
    example = ask(said, "think", tasks=["sum"])[0]["examples"][0]
    assert (example["output"], example["right"], example["answer"]) == (said, True, "1")


def facts(content, mode="think", finished=True, tokens=9, seen=()):
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    response = Response(sampled=[True] * tokens, finished=finished, observations=list(seen))
    return facts_of(parse(content, mode, finished), mode, response)


OBEYED = {
    "think": [boxed(1)],
    "no_think": ["1", "\\boxed{1}"],
    "agentic_think": [boxed(1), boxed(1, call("1 + 1"))],
    "auto_think": [
        chosen("no_think", "1"),
        chosen("think", boxed(1)),
        chosen("agentic_think", boxed(1)),
    ],
}
VIOLATED = {
    "think": ["1", "", chosen("think", boxed(1))],
    "no_think": ["", boxed(1), chosen("no_think", "1")],
    "agentic_think": ["1", call("1 + 1"), chosen("agentic_think", boxed(1))],
    "auto_think": [
        "1",
        "",
        boxed(1),
        chosen("no_think", boxed(1)),
        chosen("think", "1"),
        chosen("agentic_think", "1"),
        "<analysis>Easy.</analysis>1",
        "<analysis>So /think or /no_think.</analysis>1",
    ],
}


@pytest.mark.parametrize("mode", MODES)
def test_obeyed(mode):
    for text in OBEYED[mode]:
        assert (facts(text, mode)["obeyed"], facts(text, mode)["format"]) == (1, 0), text
    for text in VIOLATED[mode]:
        assert (facts(text, mode)["obeyed"], facts(text, mode)["format"]) == (0, 1), text
    for text in OBEYED[mode] + VIOLATED[mode]:
        assert facts(text, mode)["thought"] == ("<think>" in text)
        assert facts(text, mode)["tokens"] == 9


def test_a_broken_form_may_still_obey():
    cut = facts("<think>a b", finished=False)
    assert (cut["obeyed"], cut["thought"], cut["format"], cut["repetitive"]) == (1, 1, 1, 0)
    assert facts(boxed(1), finished=False)["format"] == 1
    assert facts("<think>a</think>1")["format"] == 1


def test_facts_count_repetition_and_calls():
    assert facts(boxed(1, "red and blue " * 30))["repetitive"] == 1
    assert facts(boxed(1, "red and blue"))["repetitive"] == 0
    seen = [observe("2"), observe(error="no"), observe("3")]
    called = facts("1", "no_think", seen=seen)
    assert (called["calls"], called["failed_calls"]) == (3, 1)
    assert (facts("1")["calls"], facts("1")["failed_calls"]) == (0, 0)


def test_facts_count_only_the_models_own_words():
    output = "<sandbox_output><think>" + "red and blue " * 30 + "</sandbox_output>"
    content = [
        {"type": "text", "text": call("1")},
        {"type": "text", "text": output, "loss": False},
        {"type": "text", "text": "1"},
    ]
    fact = facts(content, "agentic_think")
    assert (fact["thought"], fact["obeyed"], fact["repetitive"]) == (0, 0, 0)


def test_facts_of_a_score(ask, processor, world):
    """Means over a task's questions, over all, and thinking by difficulty."""
    easy, hard, loop = chosen("no_think", "1"), chosen("think", boxed(2)), "no " * 40
    write(world / "text.jsonl", [
        question("easy?", "1", "sum", "text", "number"),
        question("hard?", "2", "sum", "text", "number", difficulty=3),
        question("hard?", "3", "sum", "text", "number", difficulty=3),
        question("loop?", "1", "sum", "text", "number", difficulty=3),
    ])

    def say(prompt):
        if "easy" in prompt:
            return easy
        return hard if "hard" in prompt else loop

    result, _ = ask(say, "auto_think", tasks=["sum"])
    tokens = 0
    for text in (easy, hard, hard, loop):
        tokens += len(processor.tokenizer.encode(text, added=True)) + 1  # and the end of the turn
    want = {
        "accuracy": 0.5,
        "tokens": tokens / 4,
        "thought": 0.5,
        "obeyed": 0.75,
        "format": 0.25,
        "repetitive": 0.25,
        "calls": 0,
        "failed_calls": 0,
        "failed": 0,
        "n": 4,
    }
    assert {key: result["tasks"]["sum"][key] for key in want} == want
    assert result["all"] == {key: result["categories"]["text"][key] for key in result["all"]}
    assert result["thinking"] == {"1": 0, "3": pytest.approx(2 / 3)}
    assert json.loads(json.dumps(result)) == result


SAID = [
    "<think>" + call("crop(0, 0, 500, 1000)"),
    call("crop(1)"),
    call("4 * 4"),
    "so</think><answer>\\boxed{red}</answer>",
]
SHOWN = [
    "<sandbox_output>[image]</sandbox_output>",
    "<sandbox_output>error: line 1: use crop(x1, y1, x2, y2)</sandbox_output>",
    "<sandbox_output>16</sandbox_output>",
    "",
]


@pytest.mark.parametrize("mode", ["auto_think", "agentic_think"])
def test_tools_run_where_the_mode_has_them(ask, processor, mode):
    """Each question's own picture is looked at; what the tool says is no token of the model's."""
    result, _ = ask("".join(SAID), mode, tasks=["colour"], limit=3)
    colour = result["tasks"]["colour"]
    tokens = len(processor.tokenizer.encode("".join(SAID), added=True)) + 1
    assert (colour["calls"], colour["failed_calls"], colour["tokens"]) == (3, 1, tokens)
    assert colour["accuracy"] == pytest.approx(1 / 3)
    assert colour["obeyed"] == (mode == "agentic_think")
    assert colour["format"] == (mode != "agentic_think")
    output = result["examples"][0]["output"]
    assert output == "".join(said + shown for said, shown in zip(SAID, SHOWN))
    [[crop], nothing, number] = result["predictions"][0]["shown"]
    assert crop.startswith("data:image/webp;base64,") and nothing == number == []


@pytest.mark.parametrize("mode", ["think", "no_think"])
def test_a_call_ends_the_answer_where_the_mode_has_no_tools(ask, processor, mode):
    result, _ = ask("".join(SAID), mode, tasks=["colour"], limit=3)
    colour = result["tasks"]["colour"]
    tokens = len(processor.tokenizer.encode(SAID[0], added=True))
    assert (colour["calls"], colour["failed_calls"], colour["tokens"]) == (0, 0, tokens)
    assert (colour["accuracy"], colour["format"]) == (0, 1)
    assert colour["obeyed"] == (mode == "think")
    assert result["examples"][0]["output"] == SAID[0]


def test_tokens_of_an_answer(ask):
    """In a mode 192 for a small model, else as many as are asked for; of the bare question few."""
    for how, tokens in (({}, 192), ({"max_tokens": 7}, 7)):
        result, _ = ask("red " * 400, "no_think", tasks=["sum"], limit=1, **how)
        numbers = result["all"]  # what is cut off has a broken form
        assert (numbers["tokens"], numbers["format"], numbers["obeyed"]) == (tokens, 1, 1)
    result, _ = ask("1 " * 400, "plain", tasks=["sum"], limit=1)
    assert result["all"]["tokens"] == 2 * 1 + 4  # twice the truth's


def test_the_longest_truth_of_a_task_gives_all_its_questions_room(ask, world, processor):
    truths = ("1", "1 1 1 1 1 1", "1 1")
    write(world / "text.jsonl", [question("What?", t, "sum", "text", "exact") for t in truths])
    result, _ = ask("1 " * 400, "plain", tasks=["sum"])
    longest = len(processor.tokenizer.encode(truths[1]))
    assert result["all"]["tokens"] == 2 * longest + 4


@pytest.mark.parametrize("mode", MODES)
def test_broken_media_count_as_wrong_in_a_mode(ask, world, mode):
    break_two_pictures(world)
    text = boxed("red", call("zoom(2)"))
    if mode == "think":
        text = boxed("red")
    elif mode == "no_think":
        text = "red"
    elif mode == "auto_think":
        text = chosen("no_think", "red")
    result, prompts = ask(text, mode, tasks=["colour"], limit=6)
    colour = result["tasks"]["colour"]
    assert len(prompts) == 4
    assert lines_of(result["failed"]) == ["look.jsonl:2", "look.jsonl:5"]
    assert (colour["n"], colour["failed"]) == (6, 2)
    assert colour["accuracy"] == pytest.approx(2 / 6)  # red are the first and the fourth
    assert colour["format"] == pytest.approx(2 / 6)  # no answer has no form
    assert colour["obeyed"] == pytest.approx(4 / 6)
    assert colour["calls"] == pytest.approx(4 / 6 if mode == "agentic_think" else 0)
    assert colour["failed_calls"] == 0
    assert [e["output"] for e in result["examples"] if e["where"].endswith(":2")] == [""]


def test_blind_in_a_mode(ask):
    """What is answered blind is graded as what is answered with the pictures."""
    result, _ = ask(boxed("red"), "think", blind=True, tasks=["colour"])
    colour = result["tasks"]["colour"]
    assert colour["accuracy"] == colour["blind"] == pytest.approx(1 / 3)


def test_tools_know_nothing_of_the_true_answer(ask, world):
    line = picture_question("0.png", "red")
    truth = [{"type": "image", "image": "0.png"}, {"type": "text", "text": "red"}]
    line["messages"][1]["content"] = truth
    write(world / "look.jsonl", [line])
    result, _ = ask(boxed("red", call("image(2)")), "agentic_think", tasks=["colour"])
    assert result["all"]["failed_calls"] == result["all"]["calls"] == 1


# -- tables


def cells_of(table):
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert len({len(row) for row in rows}) == 1 and set("".join(rows[1])) == {"-", ":"}
    assert len({len(line) for line in table.splitlines()}) == 1  # readable without a renderer
    return [rows[0], *rows[2:]]


def table_of(text):
    head, *rows = cells_of(text)
    return [dict(zip(head, row)) for row in rows]


def test_task_table(processor, world, answer_with):
    answer_with(see)
    head, *rows = cells_of(task_table(evaluate(None, processor, world, blind=True)))
    assert head == ["task", "n", "failed", "accuracy %", "blind %", "chance %"]
    low, high = wilson(12, 12)
    sure = f"100.0 ± {50 * (high - low):.1f}"
    low, high = wilson(1, 4)
    unsure = f"25.0 ± {50 * (high - low):.1f}"
    assert rows == [
        ["**look**", "12", "0", sure, "0.0", "33.3"],
        ["colour", "12", "0", sure, "0.0", "33.3"],
        ["**text**", "4", "0", unsure, "", "0.0"],
        ["sum", "4", "0", unsure, "", "0.0"],
        ["**headline**", "", "", "100.0", "0.0", "33.3"],
    ]
    break_two_pictures(world)
    broken = table_of(task_table(evaluate(None, processor, world)))
    assert [row["failed"] for row in broken] == ["2", "2", "0", "0", ""]
    part = evaluate(None, processor, world, tasks=["sum"])
    assert [row["task"] for row in table_of(task_table(part))] == ["**text**", "sum"]


def phase(mixed=0.5, thinking=None, facts=(2.0, 0.9, 0.1, 0.0, 1.25, 0.5), failed=0, **accuracies):
    names = ("tokens", "obeyed", "format", "repetitive", "calls", "failed_calls")
    return {
        "categories": {name: {"accuracy": value} for name, value in accuracies.items()},
        "mixed": mixed,
        "all": dict(zip(names, facts)) | {"thought": 0.3},
        "thinking": thinking or {},
        "failed": [{"where": "q.jsonl:1", "reason": "missing"}] * failed,
    }


def test_board():
    numbers = (31.04, 1.0, 0.0, 0.025, 0.0, 0.0)
    head, *rows = cells_of(board([
        ("sft plain", phase(0.25, look=0.25)),
        ("grpo think", phase(look=1.0, text=0.125, thinking={"1": 0.0, "3": 1.0})),
        ("grpo auto_think", phase(0.75, {"2": 0.5}, numbers, failed=12, text=0.75)),
    ]))
    counts = ["tokens", "obeyed", "format errors", "repetitive", "calls", "failed calls"]
    thinks = ["thinks at 1", "thinks at 2", "thinks at 3"]
    assert head == ["phase and mode", "look", "text", "mixed", *counts, *thinks, "failed"]
    shown = ["2.0", "90.0", "10.0", "0.0", "1.25", "0.50"]
    other = ["31.0", "100.0", "0.0", "2.5", "0.00", "0.00"]
    assert rows == [
        ["sft plain", "25.0", "", "25.0", *shown, "", "", "", "0"],
        ["grpo think", "100.0", "12.5", "50.0", *shown, "0.0", "", "100.0", "0"],
        ["grpo auto_think", "", "75.0", "75.0", *other, "", "50.0", "", "12"],
    ]


def test_board_of_real_results(ask):
    """What evaluate returns, and what JSON makes of it, are its rows."""
    results = {mode: ask(boxed("red"), mode, limit=3)[0] for mode in ("think", "no_think")}
    rows = table_of(board(list(results.items())))
    assert rows == table_of(board(list(json.loads(json.dumps(results)).items())))
    for row, (mode, result) in zip(rows, results.items()):
        assert row["phase and mode"] == mode
        assert (row["look"], row["text"], row["mixed"]) == ("33.3", "0.0", "16.7")
        assert row["obeyed"] == ("100.0" if mode == "think" else "0.0")
        assert row["thinks at 1"] == "100.0"
        assert row["tokens"] == f"{result['all']['tokens']:.1f}" and row["calls"] == "0.00"


# -- the phases of a run


class Run:
    """As much of a run as score_phase asks for."""

    stage = "sft"
    dtype = torch.float32
    device = torch.device("cpu")

    rank, world = 0, 1

    def __init__(self, folder, main=True):
        self.folder = folder
        self.main = main
        self.said = []

    def say(self, text):
        self.said.append(text)

    def gather_objects(self, thing):
        return [thing]

    def merge(self, local):
        return local

    def attempt(self, doing, work):
        return work()


@pytest.fixture
def run(model, processor, tmp_path):
    folder = tmp_path / "run"
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return Run(folder)


def test_a_phase_is_scored_in_each_mode(run, world, monkeypatch):
    scripted(monkeypatch, lambda prompt: boxed(1) if "/think" in prompt else "red")
    (world / "1.png").unlink()
    results = E.score_phase(run, world, ["plain", "think"], 2)
    assert list(results) == ["plain", "think"]
    assert results["plain"]["tasks"]["colour"]["n"] == 2
    assert results["plain"]["tasks"]["colour"]["accuracy"] == 0.5
    assert results["think"]["tasks"]["sum"]["accuracy"] == 0.5
    said, first = run.said
    assert first.startswith("1 of 4 held-out questions cannot be used, the first: ")
    assert "look.jsonl:2: 1.png: missing" in first
    rows = table_of(said)
    assert [row["phase and mode"] for row in rows] == ["sft plain", "sft think"]
    assert [row["failed"] for row in rows] == ["1", "1"]
    page = (run.folder / "samples.md").read_text()
    assert page.startswith("# sft: ") and "## plain" in page and "## think" in page
    assert "- [colour] [image]What colour? **red** (truth: red)" in page
    assert "examples" not in results["plain"] and json.dumps(results)
    assert "predictions" not in results["plain"]


def test_a_phase_keeps_all_its_answers(run, world, monkeypatch):
    """A flat line each, as pandas reads them: what was said, and what is counted of it."""
    scripted(monkeypatch, lambda prompt: boxed(1) if "/think" in prompt else "red")
    (world / "1.png").unlink()
    results = E.score_phase(run, world, ["plain", "think"], 5)
    lines = (run.folder / "predictions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == sum(result["questions"] for result in results.values()) == 18
    assert len({tuple(row) for row in rows}) == 1  # the same columns in all of them
    for mode, result in results.items():
        for name, numbers in result["tasks"].items():
            own = [row for row in rows if (row["mode"], row["task"]) == (mode, name)]
            assert len(own) == numbers["n"]
            assert sum(row["right"] for row in own) == numbers["accuracy"] * numbers["n"]
            assert sum(row["tokens"] for row in own) == pytest.approx(numbers["tokens"] * len(own))
            assert sum(bool(row["failure"]) for row in own) == numbers["failed"]
    assert len({(row["mode"], row["where"]) for row in rows}) == 18
    red = next(row for row in rows if row["mode"] == "plain" and row["task"] == "colour")
    want = {"output": "red", "answer": "red", "right": True, "accuracy": 1, "shown": []}
    assert {key: red[key] for key in want} == want and red["category"] == "look"


def test_a_page_of_answers_holds_any_text(run, world, monkeypatch):
    scripted(monkeypatch, lambda prompt: "red")
    monkeypatch.setattr(E, "SAMPLE", "\ud800\0 数\n")
    E.score_phase(run, world, ["plain"], 1)
    assert "\\ud800\0 数" in (run.folder / "samples.md").read_text(encoding="utf-8")


def test_a_score_without_its_pictures_is_none(run, world, monkeypatch):
    """It is shown, but there is nothing to keep."""
    scripted(monkeypatch, lambda prompt: "red")
    for path in world.glob("*.png"):
        path.unlink()
    with pytest.raises(SystemExit, match="12 of 16 held-out questions cannot be used"):
        E.score_phase(run, world, ["plain"], None)
    [row] = table_of(run.said[0])
    assert row["failed"] == "12"


def test_a_blind_score_is_shown_by_task(run, world, monkeypatch):
    scripted(monkeypatch, lambda prompt: "red")
    results = E.score_phase(run, world, ["plain"], 3, blind=True)
    assert results["plain"]["tasks"]["colour"]["blind"] == pytest.approx(1 / 3)
    assert task_table(results["plain"]) in run.said


def test_only_rank_0_has_the_score_and_only_where_there_are_questions(run, world, monkeypatch):
    scripted(monkeypatch, lambda prompt: "red")
    assert E.score_phase(Run(run.folder, main=False), world, ["plain"], 2) == {}
    assert not (run.folder / "samples.md").exists()
    assert E.score_phase(run, world / "nowhere", ["plain"], 2) == {}
    assert str(world / "nowhere") in run.said[0]


def score_phase_of(argv):
    """A phase's score, as its script has it made. argv: out, held-out folder, a rank that fails."""
    out, heldout, failing = argv
    run = start(arguments("").parse_args(["--out", out, "--device", "cpu"]), "sft")
    evaluated = []

    def ask(generator, questions, *how):
        evaluated.append(len(questions))
        if run.rank == int(failing):
            raise MemoryError("no room")
        return ask_as_before(generator, questions, *how)

    ask_as_before = E.ask
    with mock.patch.object(E, "ask", ask):
        run.score(lambda: E.score_phase(run, Path(heldout), ["plain"], None, blind=True))
    (run.folder / f"asked-{run.rank}.json").write_text(json.dumps(evaluated))
    run.close()


def score_on(ranks, out, world, model, processor, failing=-1):
    """-> the folder of the run, and what it said."""
    folder = out / "toy" / "sft"
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder, in_processes(score_phase_of, [out, world, failing], ranks)


def test_ranks_share_the_questions_and_find_what_one_process_finds(
    model, processor, world, tmp_path
):
    (world / "4.png").unlink()
    scores, pages = [], []
    for ranks in (1, 3):
        folder, _ = score_on(ranks, tmp_path / f"on-{ranks}", world, model, processor)
        score = json.loads((folder / "score.json").read_text())
        assert score["plain"].pop("seconds") > 0
        scores.append(score)
        pages.append([(folder / n).read_text() for n in ("samples.md", "predictions.jsonl")])
    assert scores[0] == scores[1] and pages[0] == pages[1]
    assert scores[0]["plain"]["questions"] == 16 and lines_of(scores[0]["plain"]["failed"])
    asked = [json.loads((folder / f"asked-{rank}.json").read_text()) for rank in range(3)]
    seeing, blind = zip(*asked)
    assert sorted(seeing) == [5, 5, 6] and sum(blind) == 12  # the sums show nothing


def test_a_rank_that_cannot_ask_ends_the_score_and_not_the_run(model, processor, world, tmp_path):
    folder, said = score_on(2, tmp_path / "out", world, model, processor, failing=1)
    assert "scoring: rank 1: MemoryError: no room" in said
    assert "sft is trained and saved, but scoring it failed" in said
    assert not (folder / "score.json").exists() and not (folder / "samples.md").exists()


def test_the_command_line_on_ranks_is_that_of_one_process(
    model, processor, world, tmp_path_factory
):
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    argv = ["--init", folder, "--data", world, "--device", "cpu"]
    results, answers = [], []
    for ranks in (1, 2):
        out, lines = folder / f"{ranks}.json", folder / f"{ranks}.jsonl"
        in_processes(E.main, [*argv, "--out", out, "--answers", lines], ranks)
        results.append(json.loads(out.read_text()))
        assert results[-1]["plain"].pop("seconds") > 0
        answers.append(lines.read_text())
    assert results[0] == results[1] and answers[0] == answers[1]


def lay(folder, **scores):
    for name, score in scores.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "score.json").write_text(json.dumps(score))


def test_phases_stand_in_their_order(tmp_path):
    """What is not done, has no held-out score or is no phase of the board is left out."""
    lay(
        tmp_path,
        grpo={mode: phase(look=0.5) for mode in MODES},
        sft={"plain": phase(look=0.25)},
        pretrain={"plain": phase(look=0.125)},
        coldstart={},
        other={"plain": phase(look=1.0)},
    )
    (tmp_path / "mpo").mkdir()  # it still runs
    lay(tmp_path, **{"pretrain-0": {"accuracy": 0.2, "n": 258.0, "among": 64.5}})
    rows = E.phases(tmp_path)
    names = [name for name, _ in rows]
    assert names == ["pretrain plain", "sft plain", *(f"grpo {mode}" for mode in MODES)]
    accuracies = [result["categories"]["look"]["accuracy"] for _, result in rows]
    assert accuracies == [0.125, 0.25] + [0.5] * 4
    assert E.phases(tmp_path / "mpo") == E.phases(tmp_path / "nowhere") == []


def test_a_broken_score_is_one_line(tmp_path):
    lay(tmp_path, sft={"plain": phase(look=0.25)})
    (tmp_path / "grpo").mkdir()
    for broken in ('{"plain": {"ta', "[1]"):
        (tmp_path / "grpo" / "score.json").write_text(broken)
        with pytest.raises(SystemExit, match="^[^\n]*grpo/score.json: no scores: [^\n]*$"):
            E.main(["--board", str(tmp_path)])


# -- the command line


def test_command_line(model, processor, world, tmp_path):
    model.save_pretrained(tmp_path / "m")
    processor.save_pretrained(tmp_path / "m")
    (world / "3.png").unlink()
    out = tmp_path / "m" / "score.json"
    command = [sys.executable, "evaluate.py", "--init", tmp_path / "m", "--data", world]
    answers = tmp_path / "m" / "answers.jsonl"
    command += ["--limit", "5", "--device", "cpu", "--out", out, "--answers", answers]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| colour" in done.stdout and "look.jsonl:4: 3.png: missing" in done.stdout
    colour = json.loads(out.read_text())["plain"]["tasks"]["colour"]
    assert (colour["n"], colour["failed"]) == (5, 1) and colour["blind"] is not None
    assert len(answers.read_text().splitlines()) == 9


def test_a_score_of_too_few_questions_is_an_error_once_it_was_shown(
    run, world, tmp_path, capsys, monkeypatch
):
    scripted(monkeypatch, lambda prompt: "red")
    argv = ["--init", str(run.folder / "model"), "--data", str(world), "--device", "cpu"]
    argv += ["--no-blind", "--out", str(run.folder / "out.json")]
    for i in range(4):
        (world / f"{i}.png").unlink()
    E.main(argv)
    assert table_of(capsys.readouterr().out.split("\n\n")[1])[0]["failed"] == "4"
    (world / "5.png").write_bytes(b"")
    with pytest.raises(SystemExit, match="5 of 16 questions .*look.jsonl:1: 0.png: missing.*5%"):
        E.main(argv)
    assert table_of(capsys.readouterr().out.split("\n\n")[1])[0]["failed"] == "5"
    assert len(json.loads((run.folder / "out.json").read_text())["plain"]["failed"]) == 5


def test_a_terminal_without_the_signs_of_the_tables_shows_them_all_the_same(tmp_path):
    (tmp_path / "sft").mkdir()
    result = {"categories": {"café": {"accuracy": 1.0}}, "thinking": {}, "mixed": 1.0, "failed": []}
    result["all"] = dict.fromkeys([re.search(r"\w+", form)[0] for form in E.FACTS.values()], 0)
    (tmp_path / "sft" / "score.json").write_text(json.dumps({"plain": result}))
    command = [sys.executable, "evaluate.py", "--board", tmp_path]
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0 and "caf\\xe9" in done.stdout
    assert "café" in (tmp_path / "scoreboard.md").read_text(encoding="utf-8")


def test_a_file_of_results_that_cannot_be_written_is_refused_before_the_questions(tmp_path):
    argv = ["--init", "nowhere", "--out", str(tmp_path / "none" / "out.json")]
    with pytest.raises(SystemExit, match="--out .*none/out.json: No such file"):
        E.main(argv)


def test_results_never_lie_among_the_questions(world, tmp_path, tmp_path_factory):
    """At the second run they would be read as questions; and a file of questions is never lost."""
    outer = tmp_path_factory.mktemp("data")
    (outer / "heldout").symlink_to(world)
    before = {path: path.read_bytes() for path in world.iterdir()}
    (tmp_path / "link").symlink_to(world)
    for data, out in [
        (world, world / "out.json"),
        (world, world / "OUT.JSONL.gz"),
        (tmp_path / "link", world / "out.jsonl"),
        (outer, outer / "heldout" / "out.json"),
        (world, tmp_path / "link" / "out.json"),
        (world / "look.jsonl", world / "look.jsonl"),
    ]:
        with pytest.raises(SystemExit, match=r"--out .*it would be read; name another place"):
            E.main(["--init", "nowhere", "--data", str(data), "--out", str(out)])
    (tmp_path / "link").unlink()
    assert {path: path.read_bytes() for path in world.iterdir()} == before
    with pytest.raises(SystemExit, match="--init nowhere"):  # the next fault
        E.main(["--init", "nowhere", "--data", str(world), "--out", str(world / "out.txt")])


def test_a_wrong_command_line_says_what_is_wrong(run, tmp_path, capsys):
    folder = str(run.folder / "model")
    for argv, message in [
        (["--init", str(tmp_path)], "config.json"),
        (["--init", folder, "--limit", "0"], "--limit"),
        (["--init", folder, "--data", str(tmp_path)], "with questions"),
        (["--init", folder, "--mode", "dream"], "dream"),
        (["--init", folder, "--board", folder], "not allowed with"),
    ]:
        with pytest.raises(SystemExit) as error:
            E.main([*argv, "--device", "cpu"])
        assert message in f"{error.value} {capsys.readouterr().err}" and error.value.code != 0


@pytest.mark.parametrize("above", [False, True])
def test_modes_on_the_command_line(
    model, processor, world, tmp_path, tmp_path_factory, capsys, monkeypatch, above
):
    monkeypatch.setattr(E, "load", lambda folder, device: (model, processor))
    scripted(monkeypatch, lambda prompt: boxed(1) if "/think" in prompt else "2")
    (world / "1.png").unlink()
    folder = world
    if above:  # as training takes it
        folder = tmp_path_factory.mktemp("data")
        (folder / "heldout").symlink_to(world)
    argv = ["--init", "x", "--data", str(folder), "--limit", "2", "--mode", "think", "no_think"]
    path = tmp_path / "scores" / "out.json"
    path.parent.mkdir()
    E.main([*argv, "--out", str(path)])
    out = capsys.readouterr().out
    results = json.loads(path.read_text())
    assert [(name, result["mode"]) for name, result in results.items()] == [
        ("think", "think"), ("no_think", "no_think")]
    assert [result["tasks"]["sum"]["accuracy"] for result in results.values()] == [0.5, 0.5]
    assert [result["all"]["thought"] for result in results.values()] == [0.75, 0]
    assert results["think"]["tasks"]["colour"]["blind"] is None  # unless it is asked for
    assert board(list(results.items())) in out
    assert all(f"{mode}:\n\n{task_table(result)}" in out for mode, result in results.items())
    assert out.count("look.jsonl:2") == 1  # counted as wrong, so named


def test_board_on_the_command_line(tmp_path, capsys):
    pretrain = {"plain": phase(look=0.25)}
    lay(tmp_path / "run", pretrain=pretrain, sft={"plain": phase(look=0.5)})
    E.main(["--board", str(tmp_path / "run")])
    out = capsys.readouterr().out
    assert [row["look"] for row in table_of(out.strip())] == ["25.0", "50.0"]
    assert (tmp_path / "run" / "scoreboard.md").read_text() == out
    (tmp_path / "empty").mkdir()
    for name in ("empty", "nowhere"):
        with pytest.raises(SystemExit) as error:  # a text as its code: python exits with 1
            E.main(["--board", str(tmp_path / name)])
        assert str(tmp_path / name) in error.value.code
        assert "no phase (pretrain, sft, " in error.value.code
        assert not (tmp_path / name / "scoreboard.md").exists()


def test_a_column_of_one_digit_is_a_table_of_markdown_too():
    assert E.markdown([["task", "n"], ["colour", "1"]]) == (
        "| task   |  n |\n| ------ | -: |\n| colour |  1 |"
    )
