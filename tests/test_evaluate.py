"""evaluate.py: known answers, known tables, and that blind means blind."""
import json
import math
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate as E
import toyworld
from conftest import ROOT
from data import pack
from evaluate import evaluate, grade, score, scoreboard, wilson
from rewards import edit_distance, normal
from generate import Generator
from rewards import MODES
from sandbox import observe
from test_generate import call, scripted

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


# -- modes


def boxed(answer, thinking="a b"):
    return f"<think>{thinking}</think><answer>It is \\boxed{{{answer}}}</answer>"


def chosen(mode, rest):
    return f"<analysis>Easy, so /{mode}.</analysis>{rest}"


@pytest.fixture
def ask(model, processor, world, monkeypatch):
    """evaluate, with a model that writes what `say` makes of the prompt -> result, prompts."""
    def use(say, mode, **how):
        prompts = scripted(monkeypatch, say if callable(say) else lambda prompt: say)
        return evaluate(model, processor, world, mode=mode, **{"blind": False} | how), prompts
    return use


@pytest.mark.parametrize("mode, switch", [("think", "/think"), ("no_think", "/no_think"), ("agentic_think", "/agentic_think"),
                                          ("auto_think", ""), (None, "")])
def test_the_switch_stands_behind_the_question(ask, mode, switch):
    result, prompts = ask("red", mode, limit=2)
    assert len(prompts) == result["questions"] == 4 and result["mode"] == mode
    assert sum(p.endswith(f"What colour?{switch}<|im_end|>\n<|im_start|>assistant\n") for p in prompts) == 2
    assert sorted(re.findall(r"\d \+ 1\?(.*?)<", "".join(prompts))) == [switch] * 2
    assert {e["question"] for e in result["examples"]} == {"[image]What colour?", "What is 0 + 1?", "What is 1 + 1?"}  # as asked


def test_the_graded_answer_is_the_boxed_one(ask):
    true = lambda prompt: int(re.search(r"(\d) \+ 1", prompt)[1]) + 1
    right = {"think": lambda p: boxed(true(p), "7"), "no_think": lambda p: f"{true(p)}", "agentic_think": lambda p: boxed(true(p), "7"),
             "auto_think": lambda p: chosen("think", boxed(true(p), "7")) if true(p) % 2 else chosen("no_think", true(p))}
    for mode, say in right.items():
        result, _ = ask(say, mode, tasks=["sum"])
        assert result["tasks"]["sum"]["accuracy"] == result["mixed"] == 1 and result["all"]["obeyed"] == 1, mode
        assert result["all"]["format"] == 0 and all(e["right"] for e in result["examples"])
    for mode in ("think", "agentic_think"):
        result, _ = ask(lambda p: boxed(7, f"So \\boxed{{{true(p)}}}."), mode, tasks=["sum"])  # right, but in its thinking
        assert result["all"]["obeyed"] == 1 and result["tasks"]["sum"]["accuracy"] == 0
        assert ask(lambda p: f"<think>So {true(p)}", mode, tasks=["sum"])[0]["tasks"]["sum"]["accuracy"] == 0  # no answer at all
    assert ask(lambda p: boxed(true(p)), None, tasks=["sum"])[0]["tasks"]["sum"]["accuracy"] == 0  # the bare answer was asked for
    assert ask(lambda p: f"{true(p)}", None, tasks=["sum"])[0]["tasks"]["sum"]["accuracy"] == 1
    example = ask("<think>2</think><answer>\\boxed{1}</answer>", "think", tasks=["sum"])[0]["examples"][0]
    assert example["output"] == "<think>2</think><answer>\\boxed{1}</answer>" and example["right"] and example["answer"] == "1"


OBEYED = {"think": [boxed(1)], "no_think": ["1", "\\boxed{1}"], "agentic_think": [boxed(1), boxed(1, call("1 + 1"))],
          "auto_think": [chosen("no_think", "1"), chosen("think", boxed(1)), chosen("agentic_think", boxed(1))]}
VIOLATED = {"think": ["1", "", chosen("think", boxed(1))], "no_think": [boxed(1), chosen("no_think", "1")],
            "agentic_think": ["1", call("1 + 1"), chosen("agentic_think", boxed(1))],
            "auto_think": ["1", "", boxed(1), chosen("no_think", boxed(1)), chosen("think", "1"), chosen("agentic_think", "1"),
                           "<analysis>Easy.</analysis>1", "<analysis>So /think or /no_think.</analysis>1"]}


@pytest.mark.parametrize("mode", MODES)
def test_obeyed(mode):
    said = lambda text: E.facts([{"type": "text", "text": text}], mode, True, 9)
    assert [t for t in OBEYED[mode] if said(t)["obeyed"] != 1 or said(t)["format"] != 0] == []
    assert [t for t in VIOLATED[mode] if said(t)["obeyed"] != 0 or said(t)["format"] != 1] == []
    for text in OBEYED[mode] + VIOLATED[mode]:
        assert said(text)["thought"] == ("<think>" in text) and said(text)["said"] == text and said(text)["tokens"] == 9


def test_facts_tell_the_form_from_what_was_asked():
    """A broken form may still obey, and only the model's own words count."""
    said = lambda text, finished=True, mode="think", seen=(): E.facts([{"type": "text", "text": text}], mode, finished, 5, seen)
    cut = said("<think>a b", finished=False)
    assert (cut["obeyed"], cut["thought"], cut["format"], cut["repetitive"]) == (1, 1, 1, 0)
    assert said(boxed(1), finished=False)["format"] == 1 and said("<think>a</think>1")["format"] == 1
    assert said(boxed(1, "red and blue " * 30))["repetitive"] == 1 and said(boxed(1, "red and blue"))["repetitive"] == 0
    told = said("1", mode="no_think", seen=[observe("2"), observe(error="no"), observe("3")])
    assert (told["calls"], told["failed_calls"]) == (3, 1) and (cut["calls"], cut["failed_calls"]) == (0, 0)
    tool = {"type": "text", "text": "<sandbox_output><think>" + "red and blue " * 30 + "</sandbox_output>", "loss": False}
    fact = E.facts([{"type": "text", "text": call("1")}, tool, {"type": "text", "text": "1"}], "agentic_think", True, 5)
    assert (fact["thought"], fact["obeyed"], fact["repetitive"]) == (0, 0, 0) and "<sandbox_output>" in fact["said"]


def test_facts_of_a_score(ask, processor, world):
    """Means over a task's questions, over all, and thinking by difficulty."""
    easy, hard, loop = chosen("no_think", "1"), chosen("think", boxed(2)), "no " * 40
    write(world / "text.jsonl", [question(f"{said}?", answer, "sum", "text", "number", **more) for said, answer, more in (
        ("easy", "1", {}), ("hard", "2", {"difficulty": 3}), ("hard", "3", {"difficulty": 3}), ("loop", "1", {"difficulty": 3}))])
    say = lambda prompt: easy if "easy" in prompt else hard if "hard" in prompt else loop
    result, _ = ask(say, "auto_think", tasks=["sum"])
    tokens = [len(processor.tokenizer.encode(t, added=True)) + 1 for t in (easy, hard, hard, loop)]  # and the end of the turn
    want = {"accuracy": 0.5, "tokens": sum(tokens) / 4, "thought": 0.5, "obeyed": 0.75, "format": 0.25, "repetitive": 0.25,
            "calls": 0, "failed_calls": 0, "failed": 0, "n": 4}
    assert {k: result["tasks"]["sum"][k] for k in want} == want
    assert result["all"] == {k: result["categories"]["text"][k] for k in result["all"]} and "said" not in result["all"]
    assert result["thinking"] == {"1": 0, "3": pytest.approx(2 / 3)}
    assert json.loads(json.dumps(result)) == result


def test_tools_run_where_the_mode_has_them(ask, processor):
    """Each question's own picture is looked at; what the tool says is no token of the model's."""
    said = ["<think>" + call("crop(0, 0, 500, 1000)"), call("crop(1)"), call("4 * 4"), "so</think><answer>\\boxed{red}</answer>"]
    tokens = len(processor.tokenizer.encode("".join(said), added=True)) + 1
    for mode in MODES:
        result, _ = ask("".join(said), mode, tasks=["colour"], limit=3)
        colour, run = result["tasks"]["colour"], mode in ("auto_think", "agentic_think")
        assert (colour["calls"], colour["failed_calls"], colour["tokens"]) == (3 * run, 1 * run, tokens)
        assert colour["accuracy"] == pytest.approx(1 / 3) and colour["obeyed"] == (mode in ("think", "agentic_think"))
        assert colour["format"] == (mode != "agentic_think")
        output = result["examples"][0]["output"]
        shown = ("<sandbox_output>[image]</sandbox_output>", "<sandbox_output>error: line 1: use crop(x1, y1, x2, y2)</sandbox_output>",
                 "<sandbox_output>16</sandbox_output>")
        assert output == "".join(a + b for a, b in zip(said, (*shown, ""))) if run else output == "".join(said)


def test_room_for_an_answer_in_a_mode(ask):
    """192 tokens for a small model, else as many as are asked for; what is cut off has a broken form."""
    for how, tokens in (({}, 192), ({"max_new_tokens": 7}, 7)):
        result, _ = ask("red " * 400, "no_think", tasks=["sum"], limit=1, **how)
        assert (result["all"]["tokens"], result["all"]["format"], result["all"]["obeyed"]) == (tokens, 1, 1)
    assert ask("1 " * 400, None, tasks=["sum"], limit=1)[0]["all"]["tokens"] < 10  # the bare question: twice the truth


@pytest.mark.parametrize("mode", MODES)
def test_broken_media_count_as_wrong_in_a_mode(ask, world, mode):
    (world / "1.png").unlink()
    (world / "4.png").write_bytes(b"not a picture")
    text = {"no_think": "red", "auto_think": chosen("no_think", "red")}.get(mode, boxed("red", call("zoom(2)")))
    result, prompts = ask(text, mode, tasks=["colour"], limit=6)
    colour = result["tasks"]["colour"]
    assert len(prompts) == 4 and [f["where"].split("/")[-1] for f in result["failed"]] == ["look.jsonl:2", "look.jsonl:5"]
    assert (colour["n"], colour["failed"], colour["accuracy"]) == (6, 2, pytest.approx(2 / 6))  # red are the first and the fourth
    assert colour["format"] == pytest.approx((6 if mode == "think" else 2) / 6)  # no answer has no form; calls are none of think's
    assert colour["calls"] == pytest.approx(4 / 6 if mode == "agentic_think" else 0) and colour["failed_calls"] == 0
    assert colour["obeyed"] == pytest.approx(4 / 6)
    assert [e["output"] for e in result["examples"] if e["where"].endswith(":2")] == [""]


def test_blind_in_a_mode(ask):
    """What is answered blind is graded as what is answered with the pictures."""
    colour = ask(boxed("red"), "think", blind=True, tasks=["colour"])[0]["tasks"]["colour"]
    assert colour["accuracy"] == colour["blind"] == pytest.approx(1 / 3)


def test_tools_know_nothing_of_the_true_answer(ask, world):
    picture = {"type": "image", "image": "0.png"}
    answer = [picture, {"type": "text", "text": "red"}]
    line = question([picture, {"type": "text", "text": "What colour?"}], "red", "colour", "look")
    write(world / "look.jsonl", [line | {"messages": [line["messages"][0], {"role": "assistant", "content": answer}]}])
    result, _ = ask(boxed("red", call("image(2)")), "agentic_think", tasks=["colour"])
    assert result["all"]["failed_calls"] == result["all"]["calls"] == 1


def test_modes_on_the_command_line(model, processor, world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(E, "load", lambda folder, device: (model, processor))
    scripted(monkeypatch, lambda prompt: boxed(1) if "/think" in prompt else "2")
    E.main(["--init", "x", "--data", str(world), "--limit", "2", "--mode", "think", "no_think", "--out", str(tmp_path / "out.json")])
    out, result = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
    assert list(result) == ["think", "no_think"] and [r["mode"] for r in result.values()] == list(result)
    assert [r["tasks"]["sum"]["accuracy"] for r in result.values()] == [0.5, 0.5] and [r["all"]["thought"] for r in result.values()] == [1, 0]
    assert "think %" in out and E.board(list(result.items())) in out and scoreboard(list(result.items())) in out
    (world / "1.png").unlink()
    E.main(["--init", "x", "--data", str(world), "--limit", "2", "--mode", "no_think"])
    assert "look.jsonl:2" in capsys.readouterr().out  # counted as wrong, so named
    with pytest.raises(SystemExit):
        E.main(["--init", "x", "--data", str(world), "--mode", "dream"])
    assert "dream" in capsys.readouterr().err


# -- the board of phases


def phase(mixed=0.5, thinking=None, facts=(2.0, 0.9, 0.1, 0.0, 1.25, 0.5), **categories):
    keys = ("tokens", "obeyed", "format", "repetitive", "calls", "failed_calls")
    return {"categories": {c: {"accuracy": a} for c, a in categories.items()}, "mixed": mixed,
            "all": dict(zip(keys, facts)) | {"thought": 0.3}, "thinking": thinking or {}}


def table_of(text):
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()]
    assert len({len(row) for row in rows}) == 1 and set("".join(rows[1])) == {"-", ":"}
    return [dict(zip(rows[0], row)) for row in rows[2:]]


def test_board():
    bare = {"tasks": {}, "categories": {"look": {"accuracy": 0.25}}, "headline": {}}  # of a pretraining before there were modes
    rows = table_of(E.board([("pretrain plain", bare), ("grpo think", phase(look=1.0, text=0.125, thinking={"1": 0.0, "3": 1.0})),
                             ("grpo auto_think", phase(0.75, {"2": 0.5}, (31.04, 1.0, 0.0, 0.025, 0.0, 0.0), text=0.75)),
                             ("align think", phase(None) | {"all": {}})]))
    name, counts, levels = "phase and mode", ["tokens", "obeyed", "format errors", "repetitive", "calls", "failed calls"], "123"
    assert list(rows[0]) == [name, "look", "text", "mixed", *counts, *(f"thinks at {k}" for k in levels)]
    assert [list(row.values()) for row in rows] == [
        ["pretrain plain", "25.0"] + [""] * 11,
        ["grpo think", "100.0", "12.5", "50.0", "2.0", "90.0", "10.0", "0.0", "1.25", "0.50", "0.0", "", "100.0"],
        ["grpo auto_think", "", "75.0", "75.0", "31.0", "100.0", "0.0", "2.5", "0.00", "0.00", "", "50.0", ""],
        ["align think"] + [""] * 12]
    assert table_of(E.board([("pretrain plain", bare)]))[0]["look"] == "25.0"


def test_board_of_real_results(ask):
    """What evaluate returns, and what json makes of it, are its rows."""
    got = {mode: ask(boxed("red"), mode, limit=3)[0] for mode in ("think", "no_think")}
    rows = table_of(E.board(list(got.items())))
    assert rows == table_of(E.board(list(json.loads(json.dumps(got)).items())))
    for row, mode in zip(rows, got):
        assert row["phase and mode"] == mode and (row["look"], row["text"], row["mixed"]) == ("33.3", "0.0", "16.7")
        assert row["obeyed"] == ("100.0" if mode == "think" else "0.0") and row["thinks at 1"] == "100.0"
        assert row["tokens"] == f"{got[mode]['all']['tokens']:.1f}" and row["calls"] == "0.00"


def lay(folder, **scores):
    for phase, score in scores.items():
        (folder / phase).mkdir(parents=True)
        (folder / phase / "score.json").write_text(json.dumps(score))


def test_phases(tmp_path):
    """In their order, whatever the folder's; what is not done, has no held-out score or is none of them is left out."""
    lay(tmp_path, grpo={m: phase(look=0.5) for m in MODES}, sft={"plain": phase(look=0.25)}, pretrain=phase(look=0.125),
        coldstart={}, align=None, other={"plain": phase(look=1.0)})
    (tmp_path / "mpo").mkdir()  # it still runs
    (tmp_path / "pretrain-0").mkdir()
    (tmp_path / "pretrain-0" / "score.json").write_text('{"accuracy": 0.2, "n": 258.0, "among": 64.5}')
    rows = E.phases(tmp_path)
    assert [name for name, _ in rows] == ["pretrain plain", "sft plain", *(f"grpo {m}" for m in MODES)]
    assert [r["categories"]["look"]["accuracy"] for _, r in rows] == [0.125, 0.25] + [0.5] * 4
    assert E.phases(tmp_path / "mpo") == E.phases(tmp_path / "nowhere") == []


def test_board_on_the_command_line(tmp_path, capsys):
    lay(tmp_path / "run", pretrain={"tasks": {}, "categories": {"look": {"accuracy": 0.25}}}, sft={"plain": phase(look=0.5)})
    E.main(["--board", str(tmp_path / "run")])
    out = capsys.readouterr().out
    assert [row["look"] for row in table_of(out.strip())] == ["25.0", "50.0"]
    assert (tmp_path / "run" / "scoreboard.md").read_text() == out
    (tmp_path / "empty").mkdir()
    lay(tmp_path / "null", pretrain=None)
    for name in ("empty", "nowhere", "null"):
        with pytest.raises(SystemExit) as error:  # a text as its code: python prints it and exits with 1
            E.main(["--board", str(tmp_path / name)])
        assert str(tmp_path / name) in error.value.code and "no finished phase (pretrain, sft, " in error.value.code
        assert not (tmp_path / name / "scoreboard.md").exists()
    with pytest.raises(SystemExit):
        E.main(["--board", str(tmp_path / "run"), "--init", "x"])
    assert "not allowed with" in capsys.readouterr().err
