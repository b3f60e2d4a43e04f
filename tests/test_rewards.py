"""common/rewards.py: every form, every part of a reward, and mistakes of others not to be made."""

import itertools
import json
import random
import re
import threading
import zlib

import pytest

import toyworld
from common.conversation import MODES
from common.rewards import REPEATED, Reward, boxed, consistent, overlong, parse, repetition
from common.rewards import reward, rewards, total, turn_of
from common.rollout import Response
from common.sandbox import observe
from common.verifiers import score, verify
from conftest import ROOT

CHINESE = "图片中显示了一个红色的圆形和一个蓝色的三角形，它们位于左上角。"


def meta(verifier, answer, **more):
    return {"verifier": verifier, "answer": answer, **more}


LETTER = meta("choice", "B", choices=["cat", "dog", "bird", "fish"])
NUMBER = meta("number", "5")


def think(answer, thinking="2 + 3 = 5"):
    return f"<think>{thinking}</think><answer>So: \\boxed{{{answer}}}</answer>"


def auto(rest, say="Easy. Therefore, /no_think mode is more appropriate."):
    return f"<analysis>{say}</analysis>{rest}"


def toy_questions():
    """(meta, true reply) of the first units of each kind in the toy world."""
    sides = toyworld.SIZES["toy"].sides
    for split, kind, n in toyworld.plan(60, 40, 10):
        for i in range(min(n, 10)):
            unit = toyworld.draw_unit("", split, kind, i, 0, sides, dry=True)
            for _, line in unit.lines:
                record = json.loads(line)
                if "meta" in record:
                    yield record["meta"], record["messages"][-1]["content"]


def test_all_toy_truths_are_right_and_other_options_wrong():
    """What the benchmark accepts of the toy world's own answers, the reward does in each form."""
    seen = set()
    for m, reply in toy_questions():
        seen.add(m["verifier"])
        assert score(reply, m) == 1 and verify(reply, m) == (1, 1), (reply, m)
        said = reply if isinstance(reply, str) else reply[0]["text"]
        thinking = f"{' '.join(m.get('steps', []))}\nSo the answer is: {said}"
        for mode, text in (
            ("think", think(said, thinking)),
            ("no_think", said),
            ("auto_think", auto(said)),
        ):
            r = reward(text, m, mode)
            assert r.total == 1.5 and not r.parsed.errors, (mode, r)
        for other in m.get("choices", []):
            assert verify(other, m)[1] == (other == m["answer"])
    assert seen >= {"text", "number", "choice", "yesno", "order", "box", "interval", "point"}


# -- what other reward functions get wrong


def test_reference_first_answer_block():
    """Choices read from the first <answer>, all else from the last: two blocks show two answers."""
    text = "<think>x</think><answer>\\boxed{A}</answer><answer>\\boxed{B}</answer>"
    assert re.search("<answer>(.*?)</answer>", text)[1] == "\\boxed{A}"
    r = reward(text, LETTER, "think")
    assert r.parsed.final == "B" and r.total == 0
    assert r.parsed.errors == ["2 times <answer>", "2 times </answer>"]


def test_reference_format_by_search():
    """VLM-R1 searches for the form, so any garbage around it passes; Thyme wants exactly one white
    space between."""
    form = r"<think>.*?</think>\s*<answer>.*?\{.*\}.*?</answer>"
    for text in (
        "garbage " + think(5),
        think(5) + " garbage",
        think(5) * 2,
        "<think></think>" + think(5),
    ):
        assert re.search(form, text, re.S) and parse(text, "think").errors
    for gap in ("", " ", "\n", "\n\n", "\r\n\t"):
        assert parse(think(5).replace("><", f">{gap}<"), "think").errors == []


def test_reference_no_consistency():
    """VLM-R1 has none; Thyme's only counts where the result is right, which its released sum
    forgets."""
    both = reward(think(5), NUMBER, "think")
    contradicts = reward(think(5, "So the answer is 6."), NUMBER, "think")
    wrong = reward(think(6, "So the answer is 6."), NUMBER, "think")
    assert [r.consistency for r in (both, contradicts, wrong)] == [1, 0, 1]
    assert [r.total for r in (both, contradicts, wrong)] == [1.5, 1.0, 0.0]
    naive_sum = wrong.outcome + 0.5 * wrong.consistency + 0.5 * wrong.format
    assert naive_sum == 1.0  # as much as a right answer would earn without the others


def test_reference_format_added_on_unsolved_prompts():
    """Added, the form alone separates wrong answers, and lengths drift; and it pays a right answer
    without the form."""
    texts = (think(6, "So 6."), "6", "<think>6</think>6")
    wrong = [reward(text, NUMBER, "think") for text in texts]
    assert len({r.total for r in wrong}) == 1
    assert len({r.total + 0.5 * r.format for r in wrong}) == 2
    formless = reward("5", NUMBER, "think")
    assert formless.outcome == 1 and formless.total == 0


def test_reference_repetition_by_words():
    """n-grams of words between white space score a Chinese loop 0; and the golden values of
    character 20-grams."""

    def naive(text, n=6):
        words = text.split()
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        return 1 - len(set(grams)) / len(grams) if grams else 0.0

    for times, want in ((20, 0.95), (100, 0.99)):
        assert naive(CHINESE * times) == 0.0
        assert repetition(CHINESE * times) == pytest.approx(want, abs=0.005)


def noise(rng, n):
    return "".join(chr(rng.randint(33, 126)) for _ in range(n))


def compression(text):
    return len(text.encode()) / len(zlib.compress(text.encode()))


def test_reference_repetition_by_compression_misses_hidden_loops():
    """zlib over the whole text: a loop hides behind 4,000 random characters."""
    rng = random.Random(0)
    hidden = noise(rng, 4000) + CHINESE * 30
    assert compression(hidden) < 2.4 and repetition(hidden) > 0.85
    assert repetition(hidden + noise(rng, 4000)) > 0.85  # nor in the middle
    assert repetition(hidden[:750] + CHINESE * 24) > REPEATED
    assert repetition(hidden[:1000] + CHINESE * 8) < REPEATED


def test_reference_repetition_by_compression_condemns_honest_rows():
    rng = random.Random(0)
    rows = []
    for _ in range(40):
        box = [rng.randint(0, 999) for _ in range(4)]
        rows.append({"box": box, "label": "a red circle at the top"})
    boxes = json.dumps(rows)
    steps = ""
    sums = itertools.accumulate(rng.randint(1, 99) for _ in range(41))
    for i, (a, b) in enumerate(itertools.pairwise(sums), 1):
        steps += f"Step {i}: add {b - a} to the running total of {a}, which gives {b}.\n"
    code, page = (ROOT / "evaluate.py").read_text(), (ROOT / "README.md").read_text()
    for honest in (boxes, steps, code, page):
        assert repetition(honest) < REPEATED
    assert compression(boxes) > 2.4 and compression(steps) > 2.4
    # the same row again and again is no honest JSON
    row = '{"box": [1, 2, 3, 4], "label": "a red circle"}, '
    assert repetition(row * 40) > 0.9


def test_reference_repetition_off_after_a_word():
    """Thyme's check returns at once where "answer", "<code>" or "sandbox_output" occurs."""
    for word in ("answer", "<code>", "sandbox_output", "```python", "{"):
        assert repetition(word + CHINESE * 20) > 0.9
    loop = "Let me look at the answer again. " * 40
    r = reward(think(5, loop + "2 + 3 = 5"), NUMBER, "think")
    assert r.outcome == 1 and 0.5 < r.total == 1.5 - r.repetition < 0.6


def test_repetition_of_short_and_counting_texts():
    assert repetition("") == repetition("5") == repetition("red, red, red") == 0
    assert repetition("the " * 400) > 0.99
    checks = [f"Wait, let me check again. Step {i}: look once more. " for i in range(40)]
    assert repetition("".join(checks)) > REPEATED


def test_reference_length():
    """DAPO's golden values; and wrong answers feel it too (VLM-R1's cosine overwrites what tells
    them apart)."""
    for tokens, want in (
        (0, 0),
        (16384, 0),
        (16385, -1 / 4096),
        (18432, -0.5),
        (20480, -1),
        (20481, -1),
    ):
        assert overlong(tokens, 20480, 4096) == want
    wrong = [
        reward("6", NUMBER, "no_think", length=n, max_tokens=100, buffer=40).total
        for n in (10, 80, 100)
    ]
    assert wrong == [0, -0.5, -1]


HARD = [
    "9" * 10**5,
    "10^" * 9999,
    "1/" * 9999,
    "1," * 9999,
    "\\frac{" * 3000,
    "(" * 20000,
    "1" + " " * 19000 + "1/",
    "A " * 9999,
    "9**9**9**9**9",
    "yes " * 4999 + "no",
    "[" * 19999,
    "not " * 4999 + "B",
    "-" * 19999,
    "1 " * 9999,
    "<|box_start|>" * 1500,
    "answer " * 2800,
    "is " * 6000,
    "\\boxed{" * 20000,
    "<|clip_time_start|>" * 1000 + "<|clip_time_end|>",
    "{" * 20000,
    "<|box_start|>" * 1500 + "<|box_end|>",
    "<|object_ref_start|>" * 900,
    '{"bbox_2d": [1, 1, 2, 2]}, ' * 700,
    "(1,1),(2,2)," * 1600,
    "one " * 4999 + "or",
    "twenty-" * 2800,
    "two hundred and " * 1200,
    "三个" * 9999,
    "1 234 " * 3300,
    "b, or " * 3300,
    "so 5 (3 red, " * 1500,
]
METAS = [
    LETTER,
    NUMBER,
    meta("yesno", "no"),
    meta("order", "2 1"),
    meta("box", "[[1, 1, 2, 2]]"),
    meta("interval", "[1, 2]"),
    meta("text", "abc"),
    meta("point", "[[1, 1]]"),
]


def test_reference_thread():
    """signal.alarm guards only the main thread, and an expression can hang; here nothing is
    evaluated at all."""
    done = []
    metas = [*METAS, meta("choice", "top", choices=toyworld.PLACES)]

    def work():
        for text in HARD:
            for m in metas:
                done.append(verify(text, m)[1])
                done.append(reward(think(5, text), m, "think").right)

    # Seconds; what backtracks without end is not done in any time.
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(100)
    assert len(done) == 2 * len(HARD) * len(metas)


def test_reference_tool_use_by_picture_tokens():
    """DeepEyes counts picture tokens in decoded text: a model that writes them is paid. Here no
    tool use is paid."""
    thinking = "<|vision_start|><|image_pad|><|vision_end|> 2 + 3 = 5"
    text = f"<think>{thinking}</think><answer>\\boxed{{5}}</answer>"
    p = parse(text, "agentic_think")
    assert p.outputs == p.calls == 0
    plain = reward(think(5), NUMBER, "agentic_think").total
    call = "<code>crop(1, 2, 3, 4)</code> 2 + 3 = 5"
    used = reward(think(5, call), NUMBER, "agentic_think").total
    assert plain == used == reward(text, NUMBER, "agentic_think").total == 1.5


# -- the forms


def test_good_forms():
    p = parse(think(5), "think")
    assert (p.chose, p.thinking, p.answer) == ("think", "2 + 3 = 5", "So: \\boxed{5}")
    assert (p.final, p.errors) == ("5", [])
    p = parse("There are 5.", "no_think")
    assert (p.chose, p.thinking, p.final, p.errors) == ("no_think", "", "There are 5.", [])
    p = parse(auto("There are 5."))
    assert (p.chose, p.final, p.errors) == ("no_think", "There are 5.", [])
    assert p.analysis.startswith("Easy.")
    say = "Is /no_think enough? It has steps. Therefore, /think mode is more appropriate."
    p = parse(auto(think(5), say))
    assert (p.chose, p.thinking, p.final, p.errors) == ("think", "2 + 3 = 5", "5", [])
    # agentic is a thinking form
    assert parse("Use <b>bold</b> and `<code>x</code>`? 1 < 2", "agentic_think").errors
    # a coding answer may hold a tag
    assert parse("```python\nprint('<think>')\n```", "no_think").errors == []


def test_a_bare_question_asks_for_no_form():
    for text in ("5", think(5), auto("5"), ""):
        p = parse(f" {text}\n", "plain", finished=False)
        assert p.final == p.answer == p.own == text
        assert (p.chose, p.errors, p.thinking) == ("no_think", [], "")
    assert reward(" 5\n", NUMBER, "plain").total == 1.5


@pytest.mark.parametrize(
    "text, error, final",
    [
        ("5", "no <think>", "5"),
        ("", "no <think>", ""),
        ("<think>a</think>\\boxed{5}", "no <answer>", "5"),
        ("<think>a\\boxed{5}", "no </think>", None),
        ("<think>a<answer>\\boxed{5}</answer>", "no </think>", None),
        ("<answer>\\boxed{5}</answer><think>a</think>", "tags out of order", ""),
        ("<think>a<think>b</think></think><answer>\\boxed{5}</answer>", "2 times <think>", "5"),
        ("<think>a</think><answer><answer>\\boxed{5}</answer></answer>", "2 times <answer>", "5"),
        (
            "<think>a <answer>\\boxed{4}</answer> b</think><answer>\\boxed{5}</answer>",
            "2 times <answer>",
            "5",
        ),
        ("<think>\\boxed{5}</think><answer></answer>", "empty <answer>", ""),
        ("<think> \n</think><answer>\\boxed{5}</answer>", "empty <think>", "5"),
        ("<think>a</think><answer>5</answer>", "0 times \\boxed{}", "5"),
        ("<think>a</think><answer>\\boxed{4} \\boxed{5}</answer>", "2 times \\boxed{}", "5"),
        ("<think>a</think><answer>\\boxed{\\boxed{5}}</answer>", "2 times \\boxed{}", "5"),
        ("<think>a</think><answer>\\boxed{}</answer>", "no answer", ""),
        ("<think>a</think><answer>\\boxed{5</answer>", "0 times \\boxed{}", "\\boxed{5"),
        ("<think>a</think><answer>\\boxed{5}", "no </answer>", None),
        ("<think>a</think>so<answer>\\boxed{5}</answer>", "text outside the tags", "5"),
        ("<think>a</think><answer>\\boxed{5}</answer>!", "text outside the tags", "5"),
        ("<think>a</think><answer>\\boxed{5}</answer><think>b</think>", "2 times <think>", ""),
        (auto(think(5)), "<analysis> in think", "5"),
        (think(5, "<code>x</code>"), "tool use in think", "5"),
    ],
)
def test_broken_thinking_names_its_error(text, error, final):
    broken("think", text, error, final)


@pytest.mark.parametrize(
    "mode, text, error, final",
    [
        ("no_think", think(5), "<think> in no_think", "5"),
        ("no_think", "<answer>5</answer>", "<answer> in no_think", "5"),
        ("no_think", "5</think>", "</think> in no_think", ""),
        ("no_think", " \n", "no answer", ""),
        (
            "no_think",
            "<tool_call>{}</tool_call> 5",
            "tool use in no_think",
            "<tool_call>{}</tool_call> 5",
        ),
        ("auto_think", "5", "no <analysis>", "5"),
        ("auto_think", auto("5", "It is easy."), "the analysis names no single mode", "5"),
        (
            "auto_think",
            auto("5", "Maybe /think or /no_think."),
            "the analysis names no single mode",
            "5",
        ),
        (
            "auto_think",
            auto("5", "/no_think is best. So I go."),
            "the analysis names no single mode",
            "5",
        ),
        ("auto_think", auto(think(5)), "<think> in no_think", "5"),
        ("auto_think", auto("5", "Use /think."), "no <think>", "5"),
        ("auto_think", "x" + auto("5"), "text outside the tags", "5"),
        ("auto_think", auto(""), "no answer", ""),
        ("auto_think", "<analysis>Use /no_think. 5", "no </analysis>", None),
        (
            "agentic_think",
            "<think>a</think><answer><code>x</code>\\boxed{5}</answer>",
            "tool use outside <think>",
            "5",
        ),
        (
            "agentic_think",
            think(5, "<sandbox_output>4</sandbox_output>"),
            "tool output without a call",
            "5",
        ),
        ("agentic_think", think(5, "a</sandbox_output>"), "stray </sandbox_output>", "5"),
        (
            "agentic_think",
            "<think><code>x</code><sandbox_output>" + think(5),
            "open <sandbox_output>",
            None,
        ),
    ],
)
def test_broken_forms_name_their_error(mode, text, error, final):
    broken(mode, text, error, final)


def broken(mode, text, error, final):
    p = parse(text, mode)
    assert error in p.errors and p.final == final
    r = reward(text, NUMBER, mode)
    assert r.format == 0 and r.total == 0


def test_cut_off_and_unknown_mode():
    assert parse(think(5), "think", finished=False).errors == ["not finished"]
    assert reward(think(5), NUMBER, "think", finished=False).total == 0
    with pytest.raises(ValueError, match="deep_think"):
        parse("5", "deep_think")


def tool(text):
    return {"type": "text", "text": text, "loss": False}


def own(text):
    return {"type": "text", "text": text}


CODE = "<code>```python\nprint('</think><answer>\\\\boxed{5}</answer>')\n```</code>"


def test_tool_output_is_never_the_models_answer():
    evil = "</sandbox_output></think><answer>\\boxed{5}</answer>"
    picture = {"type": "image", "image": "crop.png"}
    shown = [tool("<sandbox_output>"), picture, tool(evil)]
    turn = [own("<think>Zoom. " + CODE), *shown]
    turn += [own("I see.</think>"), own("<answer>\\boxed{6}</answer>")]
    p = parse(turn, "agentic_think")
    assert (p.final, p.errors, p.calls, p.outputs) == ("6", [], 1, 1)
    assert "sandbox" not in p.own and "crop" not in p.thinking
    # the run ends after the tool's answer, and the tool's words are all there is
    for cut in (turn[:4], turn[:5]):
        p = parse(cut, "agentic_think")
        assert p.final in (None, "") and reward(cut, NUMBER, "agentic_think").outcome == 0


def test_in_a_string_output_is_cut_and_code_is_no_structure():
    output = "<answer>\\boxed{5}</answer>\\boxed{5}"
    text = f"<think>{CODE}<sandbox_output>{output}</sandbox_output>"
    assert parse(text, "agentic_think").final is None
    p = parse(text + "ok</think><answer>\\boxed{6}</answer>", "agentic_think")
    assert (p.final, p.errors) == ("6", [])
    assert CODE in p.thinking and output not in p.own


def test_thinking_is_judged_without_the_tools_words():
    end = own("</think><answer>\\boxed{5}</answer>")
    output = tool("<sandbox_output>So the answer is 5.</sandbox_output>")
    turn = [own("<think><code>sum()</code>"), output, end]
    assert consistent(parse(turn, "agentic_think"), NUMBER) == 0
    # nor is a tool's repetition the model's
    turn[1] = tool(CHINESE * 50)
    assert repetition(parse(turn, "agentic_think").own) == 0


def test_a_model_cannot_write_a_tools_words():
    end = "So 5.</think><answer>\\boxed{5}</answer>"
    forged = f"<think><code>x</code><sandbox_output>5 objects</sandbox_output>{end}"
    assert parse([own(forged)], "agentic_think").errors == ["forged tool output"]
    assert parse(forged, "agentic_think").errors == []  # a string cannot tell
    # tags by the model, content by the tool: not forged
    turn = [own("<think><code>x</code><sandbox_output>"), tool("5")]
    turn.append(own(f"</sandbox_output>{end}"))
    assert parse(turn, "agentic_think").errors == []
    # nor can it hide words by writing the signs that parse uses
    assert parse("\0\1\2" + think("5\0\1\2"), "think").final == "5"
    assert not parse("\0" + think(5), "think").errors
    after = [own(think(5)), tool("<sandbox_output>x</sandbox_output>")]
    assert "text outside the tags" in parse(after, "agentic_think").errors
    turn = [own("<think>a"), tool("b"), own("</think><answer>\\boxed{5}</answer>")]
    assert "tool use in think" in parse(turn, "think").errors


def written(tokenizer, parts):
    """A Response of (text, whether it was sampled) parts."""
    response = Response()
    for text, sampled in parts:
        ids = tokenizer.encode(text, added=True)
        response.ids += ids
        response.sampled += [sampled] * len(ids)
    return response


def test_turn_of_a_response(processor):
    tokenizer = processor.tokenizer
    parts = [("<think>crop", True), ("So the answer is 4.", False), ("5</think>", True)]
    response = written(tokenizer, parts)
    response.ids.append(tokenizer.special["<|im_end|>"])
    response.sampled.append(True)
    assert turn_of(response, tokenizer) == [
        {"type": "text", "text": "<think>crop", "loss": True},
        {"type": "text", "text": "So the answer is 4.", "loss": False},
        {"type": "text", "text": "5</think>", "loss": True},
    ]


def test_turn_of_a_response_shows_its_observations(processor):
    response = written(processor.tokenizer, [("a", True), ("4", False), ("b", True), ("5", False)])
    seen = observe(error="too dark")
    response.observations.append(seen)
    a, *shown, b, rest = turn_of(response, processor.tokenizer)
    assert shown == seen.content() and rest["loss"] is False and rest["text"] == "5"
    assert (a["text"], b["text"]) == ("a", "b")


def test_boxed():
    for text, want in (
        ("\\boxed{5}", ["5"]),
        ("\\boxed {a{b}c} \\boxed{d}", ["a{b}c", "d"]),
        ("\\boxed{\\{x\\}}", ["\\{x\\}"]),
        ("\\boxed{a\\boxed{b}}", ["a\\boxed{b}", "b"]),
        ("\\boxed{", []),
        ("}\\boxed{1}}", ["1"]),
        ("{\\boxed{1}", ["1"]),
        ("\\boxed{\\frac{1}{2}}", ["\\frac{1}{2}"]),
        ("\\boxed{1", []),
    ):
        assert boxed(text) == want


BITS = ["<think>", "</think>", "<answer>", "</answer>", "<analysis>", "</analysis>"]
BITS += ["<sandbox_output>", "</sandbox_output>", "<code>", "</code>", "<tool_call>"]
BITS += ["</tool_call>", "```python", "```", "\\boxed{", "}", "{", "5", " no", "B", "\0", "\n"]
BITS += ["/think", "1/0", "<|box_start|>[[1,2,3,4]]<|box_end|>", "\\frac{1}{0}", "½²", "\ud800"]
BITS += ["9" * 50, "e9", "-", ",", "."]


def test_nothing_raises():
    rng = random.Random(1)
    metas = [*METAS, meta("exact", "a")]
    for i in range(1500):
        text = "".join(rng.choices(BITS, k=rng.randint(0, 25)))
        turn = text
        if i % 2:
            parts = re.split("(?<=5)", text)
            turn = [{"type": "text", "text": t, "loss": rng.random() < 0.7} for t in parts]
        r = reward(turn, rng.choice(metas), rng.choice(MODES), finished=rng.random() < 0.9)
        assert r.total is not None and -2 <= r.total <= 1.5
        assert r.format == (not r.parsed.errors)


def test_long_responses_are_parsed_in_time():
    # Hundreds of milliseconds; what takes the square of the length does not end.
    for bit, mode in zip(BITS, itertools.cycle(MODES)):
        parse(bit * (3 * 10**5 // len(bit)), mode)
    for text in (
        "<think>" * 10**5 + "</think>" * 10**5,
        "<code>" * 10**5 + "</code>",
        "<analysis>" + "a. " * 10**5 + "</analysis>",
    ):
        parse(text)


# -- consistency and the whole


@pytest.mark.parametrize(
    "m, answer, same, other",
    [
        (
            NUMBER,
            "5",
            ["2 + 3 = 5", "So the answer is 5.", "3 red\n2 blue\nall in all 5"]
            + ["First 4? No. It is 5.", "答案是5。"],
            ["2 + 3 = 6", "So the answer is 6. Or 5 if I count again.", "I look."]
            + ["5 objects, but the answer is 4", "It may be 5, more likely 6."],
        ),
        (
            LETTER,
            "B",
            ["So the answer is B.", "A is a cat. It is a dog.", "(A)? No, (B)"],
            ["So the answer is C.", "B? No: A", "Hmm"],
        ),
        (
            meta("yesno", "yes"),
            "yes",
            ["So yes.", "3 > 2. The answer is yes."],
            ["So: no", "3 > 2"],
        ),
        (meta("order", "2 1 3"), "2 1 3", ["The order is 2, 1, 3."], ["1 2 3"]),
        (meta("text", "red cross"), "red cross", ["It is a Red  cross."], ["a red circle"]),
        (
            meta("box", "[[1, 2, 3, 4]]"),
            "[[1, 2, 3, 4]]",
            ["It spans (1, 2) to (3, 4).", "[[1, 2, 3, 4]]"],
            ["[[1, 2, 3, 5]]", "there"],
        ),
        (
            meta("interval", "[0.5, 2.0]"),
            "[0.5, 2.0]",
            ["from 0.5 to 2.0 seconds"],
            ["from 0.5 to 2.5", "for a while"],
        ),
    ],
)
def test_consistency(m, answer, same, other):
    for thoughts, want in ((same, 1), (other, 0)):
        for thought in thoughts:
            assert reward(think(answer, thought), m, "think").consistency == want, thought
    # no mode earns more than another
    assert reward(answer, m, "no_think").total == 1.5


def test_consistency_counts_the_end():
    empty = parse("<think></think><answer>\\boxed{5}</answer>", "think")
    assert consistent(empty, NUMBER) == 0
    thinking = "The answer is 6. " + "Hmm, " * 200 + "2 + 3 = 5"
    assert reward(think(5, thinking), NUMBER, "think").consistency == 1


def test_total():
    def of(**changed):
        parts = dict(outcome=0.5, right=0.0, format=1.0, consistency=1.0)
        parts |= dict(repetition=0.5, length=-0.25, parsed=None)
        return total(Reward(**parts | changed))

    assert of() == 0.5 * 1.5 - 0.25
    assert of(consistency=0.0, length=0.0) == 0.5
    assert of(repetition=0.9) == pytest.approx(0.5 * 1.5 - 0.25 - 0.9)
    assert of(outcome=None) is None and of(consistency=None) is None
    # the consistency of a wrong answer is not needed, nor what a malformed one is worth
    assert of(outcome=0.0, consistency=None) == -0.25
    assert of(format=0.0, outcome=None) == -0.25


def test_rewards_are_in_the_order_of_their_responses():
    answers = [{"completion": str(n), "meta": NUMBER, "mode": "no_think"} for n in range(30)]
    assert [r.outcome for r in rewards(answers)] == [n == 5 for n in range(30)]
