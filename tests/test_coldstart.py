"""coldstart.py: the five kinds in their forms, what is measured, both passes, and the command."""

import json
import random
import shutil
from collections import Counter

import pytest

import coldstart
from coldstart import Example
from common.conversation import MODES
from common.conversation import media_items
from common.conversation import text_of
from common.rewards import consistent
from common.rewards import parse
from common.rollout import Response
from common.rollout import Rollout
from common.verifiers import verify
from phases import FakeRun
from phases import Loaded
from phases import Phase
from phases import change
from phases import first_model
from phases import flags
from phases import read
from phases import run_script
from phases import talk
from phases import world
from phases import write

THOUGHT = "<think>two and two</think><answer>\\boxed{4}</answer>"
SEEN = [
    {"type": "text", "text": "<think>look <tool_call>print(4)</tool_call>"},
    {"type": "text", "text": "<sandbox_output>4</sandbox_output>", "loss": False},
    {"type": "text", "text": "so it is</think><answer>\\boxed{4}</answer>"},
]
META = {"answer": "4", "verifier": "number", "task": "sum"}


def clip(name="a.mp4", text="What moves?"):
    return [{"type": "video", "video": name}, {"type": "text", "text": text}]


def media(train):
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        train.mkdir(parents=True, exist_ok=True)
        (train / name).write_bytes(b"a clip")


def question_of(record):
    return text_of(record["messages"][0])


def answers_in(path):
    """[(the question with its switches, the answer)] of a file of single questions."""
    return [(question_of(r), text_of(r["messages"][-1])) for r in read(path)]


# ----------------------------------------------------------------------------------------------
# anybody's own reasoning


@pytest.fixture
def own(tmp_path):
    """A data folder with one line of each kind and no "meta" anywhere."""
    train = tmp_path / "data" / "train"
    media(train)
    write(train / "think.jsonl", [talk("2 + 2?", THOUGHT)])
    write(train / "no_think.jsonl", [talk("2 + 2?", "4")])
    write(train / "agentic.jsonl", [talk("2 + 2?", SEEN)])
    write(train / "clips.jsonl", [talk(clip("a.mp4"), THOUGHT), talk(clip("b.mp4"), "a cat")])
    write(train / "video.jsonl", [talk(clip("c.mp4"), THOUGHT), talk(clip("c.mp4"), "a dog")])
    write(train / "text.jsonl", [talk("Say 4.", "4"), talk("Say 5.", "5")])
    return tmp_path / "data"


def build(own, tmp_path, plan={"kept": 100}):
    run = FakeRun(tmp_path)
    out = tmp_path / "modes" / "data"
    coldstart.build(run, coldstart.read_kinds(own), own, out, plan)
    return out, run.said


def test_each_kind_stands_behind_its_switch(own, tmp_path):
    out, said = build(own, tmp_path)
    assert answers_in(out / "think.jsonl") == [("2 + 2?/think", THOUGHT)]
    assert answers_in(out / "no_think.jsonl") == [("2 + 2?/no_think", "4")]
    (agentic,) = read(out / "agentic.jsonl")
    assert question_of(agentic) == "2 + 2?/agentic_think"
    assert agentic["messages"][-1]["content"] == SEEN, "what a tool returned has no loss"
    assert said[0] == "think: 1 conversations"


def test_clips_come_at_two_frame_rates_behind_the_switch_of_their_answer(own, tmp_path):
    """Those of clips.jsonl, and those of video.jsonl that think."""
    out, _ = build(own, tmp_path)
    got = []
    for record in read(out / "video.jsonl"):
        ((item, _),) = media_items(record)
        assert (out / item["video"]).read_bytes() == b"a clip"
        got.append((item["video"][-5:], item["fps"], question_of(record), *answer_of(record)))
    assert got == [
        ("a.mp4", 2.0, "[video]What moves?/think", THOUGHT),
        ("a.mp4", 1.0, "[video]What moves?/think", THOUGHT),
        ("b.mp4", 2.0, "[video]What moves?/no_think", "a cat"),
        ("b.mp4", 1.0, "[video]What moves?/no_think", "a cat"),
        ("c.mp4", 2.0, "[video]What moves?/think", THOUGHT),
        ("c.mp4", 1.0, "[video]What moves?/think", THOUGHT),
    ]


def answer_of(record):
    return [text_of(record["messages"][-1])]


def test_thinking_about_reasoning_is_learnt_once_more(own, tmp_path):
    """By the category in their meta; the lines stand among all others of think as well."""
    def asked(category, number):
        meta = {"task": "sum", "category": category, "answer": "4", "verifier": "number"}
        return talk(f"{number} + 2?", THOUGHT, meta=meta)

    lines = [asked("reasoning", 2), talk("2 + 2?", THOUGHT), asked("vqa", 3), asked("reasoning", 4)]
    write(own / "train" / "think.jsonl", lines)
    out, _ = build(own, tmp_path)
    several = [("2 + 2?/think", THOUGHT), ("4 + 2?/think", THOUGHT)]
    assert answers_in(out / "reasoning.jsonl") == several
    assert len(answers_in(out / "think.jsonl")) == 4
    mix = {path.stem: weight for path, weight in coldstart.mixture(out, coldstart.MIX)}
    assert mix["reasoning"] == coldstart.MIX["reasoning"] < mix["think"]


def test_lines_of_pretraining_are_kept_without_thinking(own, tmp_path):
    """A line of video.jsonl that thinks is none of them."""
    out, _ = build(own, tmp_path)
    assert sorted(answers_in(out / "keep.jsonl")) == [
        ("Say 4./no_think", "4"),
        ("Say 5./no_think", "5"),
        ("[video]What moves?/no_think", "a dog"),
    ]


def test_some_kinds_may_be_missing_but_not_all(own, tmp_path):
    for name in ("agentic", "clips", "video", "no_think", "text"):
        (own / "train" / f"{name}.jsonl").unlink()
    out, _ = build(own, tmp_path)
    assert [path.name for path, _ in coldstart.mixture(out, coldstart.MIX)] == ["think.jsonl"]
    (own / "train" / "think.jsonl").unlink()
    with pytest.raises(SystemExit, match="needs think.jsonl or no_think.jsonl in .*train"):
        coldstart.read_kinds(own)


@pytest.mark.parametrize("kind, line, why", [
    ("think", talk("Q", "<think>and so on"), "not an answer in think mode: no </think>"),
    ("think", talk("Q", "4"), "not an answer in think mode"),
    ("think", talk("Q", "<think>x</think>"), "no answer"),
    ("no_think", talk("Q", THOUGHT), "not an answer in no_think mode"),
    ("no_think", talk("Q", ""), "no answer"),
    ("agentic", talk("Q", "4"), "not an answer in agentic_think mode"),
    ("clips", talk(clip(), "<think>and so on"), "not an answer in think mode"),
    ("think", {"messages": talk("Q", THOUGHT)["messages"][1:]}, "a user's question"),
    ("no_think", {"messages": talk("Q", "A")["messages"] * 2 + [
        {"role": "user", "content": "Q"}]}, "last, the assistant's answer"),
    ("think", talk("Q", THOUGHT, meta={"answer": "x", "verifier": "number"}), "cannot be read as"),
    ("no_think", {"messages": "none"}, "messages"),
])
def test_malformed_answers_are_named_and_skipped_where_they_are_few(
    kind, line, why, own, tmp_path, caplog
):
    good = read(own / "train" / f"{kind}.jsonl")[0]
    path = own / "train" / f"{kind}.jsonl"
    write(path, [good] * 2 + [line] + [good] * 17)
    assert len(coldstart.read_kind(path)) == 19
    assert f"{path}:3: " in caplog.text and why in caplog.text
    write(path, [good] * 2 + [line] + [good] * 16)
    with pytest.raises(SystemExit, match=f"{kind}.jsonl:3: .*1 bad and 18 good lines"):
        coldstart.read_kind(path)


def test_what_others_write_into_meta_of_clips_does_not_matter(own):
    write(own / "train" / "clips.jsonl", [talk(clip(), THOUGHT, meta={"source": "a film"})])
    assert [example.mode for example in coldstart.read_kinds(own)["video"]] == ["think"] * 2


def test_few_lines_may_have_lost_their_clip(own, tmp_path):
    lines = [talk(clip("gone.mp4"), "a cat"), *[talk(clip("a.mp4"), "a dog")] * 39]
    write(own / "train" / "clips.jsonl", lines)
    out, said = build(own, tmp_path)
    assert len(read(out / "video.jsonl")) == 2 * 40  # 39 of these, one of video.jsonl
    assert any("gone.mp4: missing" in text for text in said)
    write(own / "train" / "clips.jsonl", lines[:1] * 3 + lines[3:9])
    with pytest.raises(SystemExit, match="6 of 20 lines cannot be used, .*gone.mp4: missing"):
        build(own, tmp_path)


# ----------------------------------------------------------------------------------------------
# conversations of the first pass


def test_frames_of_a_rate_of_their_own_are_halved_with_it():
    frames = [f"{i}.png" for i in range(5)]
    item = {"type": "video", "video": frames, "fps": 4.0}
    example = Example(talk([item], "x")["messages"][:1], {"role": "assistant", "content": "x"},
                      "no_think", None)
    for fps, shown, rate in ((2.0, frames, 4.0), (1.0, frames[::2], 2.0)):
        ((got, _),) = media_items(coldstart.at_frame_rate(example, fps).conversation())
        assert (got["video"], got["fps"]) == (shown, rate)
    del item["fps"]  # frames without one have 2 a second
    ((got, _),) = media_items(coldstart.at_frame_rate(example, 1.0).conversation())
    assert got["fps"] == 1.0
    assert item["video"] == frames and "fps" not in item, "the example itself must not change"


def example_of(question, answer, mode, meta=None):
    *asked, last = talk(question, answer)["messages"]
    return Example(asked, last, mode, None, meta)


def test_several_turns_teach_that_the_last_switch_wins():
    modes = {"A": "think", "B": "no_think", "C": "auto_think", "D": "think"}
    examples = [example_of(name, f"{name}!", mode) for name, mode in modes.items()] * 100
    made = coldstart.several_turns(examples, random.Random(0))
    assert len(made) == 50
    assert made == coldstart.several_turns(examples, random.Random(0))
    seen = set()
    for conversation in made:
        turns = [text_of(message) for message in conversation["messages"]]
        assert [turn[0] for turn in turns[1::2]] == [turn[0] for turn in turns[::2]]
        names = [answer[0] for answer in turns[1::2]]
        if len(names) == 1:  # the last of its switches is that of its answer
            (name,) = names
            first, *others = turns[0].split("/")[1:]
            assert others in ([], [modes[name]]) and (others or first == modes[name])
            seen.add("two switches" if others else "one switch")
        else:
            assert turns[0] == f"{names[0]}/{modes[names[0]]}"
            same = modes[names[0]] == modes[names[1]]
            assert turns[2] == (names[1] if same else f"{names[1]}/{modes[names[1]]}")
            seen.add("holds on" if same else "switched")
    assert seen == {"one switch", "two switches", "holds on", "switched"}


def test_two_turns_are_two_questions():
    examples = [example_of(str(i), str(i), "think") for i in range(16)]
    for seed in range(50):
        for conversation in coldstart.several_turns(examples, random.Random(seed)):
            answers = [message["content"] for message in conversation["messages"][1::2]]
            assert len(set(answers)) == len(answers)


def test_of_preferences_the_chosen_answer_is_kept(tmp_path):
    asked = talk("Which?", "")["messages"][:1]
    lines = [{"messages": asked, "chosen": "A", "rejected": "B"}]
    [kept] = coldstart.kept_lines(write(tmp_path / "preferences.jsonl", lines), 5)
    assert text_of(kept["messages"][-1]) == "A" and "/no_think" in text_of(kept["messages"][0])


def test_kept_lines_are_an_even_choice(tmp_path):
    lines = [talk(f"Q{i}", str(i)) for i in range(10)]
    path = write(tmp_path / "vqa.jsonl", lines)
    assert [question_of(c) for c in coldstart.kept_lines(path, 100)] == [
        f"Q{i}/no_think" for i in range(10)
    ]
    assert [question_of(c) for c in coldstart.kept_lines(path, 3)] == [
        "Q0/no_think", "Q3/no_think", "Q6/no_think", "Q9/no_think"
    ]


def test_the_switch_of_a_kept_line_stands_in_its_first_turn(tmp_path):
    long = {"messages": talk("Q", "A")["messages"] + talk("R", "B")["messages"]}
    document = {"messages": [{"role": "assistant", "content": "Once upon a time."}]}
    path = write(tmp_path / "text.jsonl", [long, document])
    kept = coldstart.kept_lines(path, 9)
    assert [text_of(message) for message in kept[0]["messages"]] == ["Q/no_think", "A", "R", "B"]
    assert kept[1] == document, "where nobody asks, there is no switch"


def test_as_many_lines_are_kept_as_the_plan_and_the_shares_say(own, tmp_path):
    train = own / "train"
    for name in ("vqa", "caption", "video", "grounding", "text", "ocr"):
        write(train / f"{name}.jsonl", [talk(name, str(i)) for i in range(40)])
    out, _ = build(own, tmp_path, {"kept": 20})
    kept = Counter(question.removesuffix("/no_think") for question, _ in
                   answers_in(out / "keep.jsonl"))
    # every sixth line of 40 is the closest whole step to 6
    assert kept == {"vqa": 20, "caption": 20, "video": 20, "grounding": 7, "text": 7}


def test_turns_are_made_of_bare_questions_with_and_without_thinking(own, tmp_path):
    write(own / "train" / "think.jsonl", [talk(f"T{i}", THOUGHT) for i in range(30)])
    write(own / "train" / "no_think.jsonl", [talk(f"N{i}", "4") for i in range(18)])
    out, _ = build(own, tmp_path)
    turns = read(out / "turns.jsonl")
    assert len(turns) == 6
    assert {text_of(m)[0] for r in turns for m in r["messages"][::2]} == {"T", "N"}
    other = FakeRun(tmp_path)
    other.args.seed = 1
    coldstart.build(other, coldstart.read_kinds(own), own, tmp_path / "other", {"kept": 9})
    assert read(tmp_path / "other" / "turns.jsonl") != turns


# ----------------------------------------------------------------------------------------------
# auto-think: what is measured


def kinds_of(*questions):
    """{kind: examples} of questions (name, task, meta of the thinking answer, has a tool call)."""
    kinds = {"think": [], "no_think": [], "agentic": []}
    for name, meta, tool in questions:
        kinds["think"].append(example_of(name, THOUGHT, "think", meta))
        kinds["no_think"].append(example_of(name, "4", "no_think"))
        if tool is not None:
            answer = SEEN if tool else THOUGHT
            kinds["agentic"].append(example_of(name, answer, "agentic_think"))
    return kinds


def test_questions_in_both_modes_and_with_a_truth_are_measured():
    kinds = kinds_of(("A", META, True), ("B", META, False), ("C", None, True), ("D", META, None))
    kinds["think"].append(example_of("E", THOUGHT, "think", META))  # no plain answer
    kinds["no_think"].append(example_of("F", "4", "no_think", META))
    found = {}
    for answers in coldstart.answers_by_mode(kinds):
        found[text_of(answers["think"].question[0])] = sorted(answers)
    assert found == {
        "A": ["agentic_think", "no_think", "think"],
        "B": ["no_think", "think"],  # its agentic answer calls no tool
        "D": ["no_think", "think"],
    }


def test_equally_many_of_each_kind_are_asked():
    kinds = [*"aaaaaabb", "c"]
    assert coldstart.evenly_by_kind(kinds, 5) == [0, 6, 8, 1, 7]
    assert sorted(coldstart.evenly_by_kind(kinds, 100)) == list(range(9))


def test_questions_of_one_task_and_difficulty_are_alike():
    kinds = []
    for meta in ({}, {"difficulty": 1}, {"difficulty": 2}, {"task": "product"}):
        (answers,) = coldstart.answers_by_mode(kinds_of(("A", META | meta, None)))
        kinds.append(coldstart.question_kind(answers))
    assert kinds[0] == kinds[1] and len(set(kinds)) == 3


class Sampler:
    """Stands for sample_groups: in each mode the given text, or [] for none."""

    def __init__(self, monkeypatch, texts):
        self.texts = texts
        self.prompts = []
        self.how = []
        self.loaded = Loaded("the generator")
        monkeypatch.setattr(coldstart, "Generator", self.loaded)
        monkeypatch.setattr(coldstart, "sample_groups", self.sample_groups)

    def sample_groups(self, generator, prompts, group, max_tokens, temperature=1.0, **how):
        assert generator == "the generator"
        self.how.append((group, max_tokens, temperature, how))
        self.prompts += prompts
        return [self.group(prompt) for prompt in prompts]

    def group(self, prompt):
        text = self.texts[prompt.mode]
        content = [{"type": "text", "text": text, "loss": True}]
        return [Rollout(prompt, {}, Response(finished=True), content)] if text else []


def questions_of(*names, tool=None, meta=META):
    return coldstart.answers_by_mode(kinds_of(*[(name, meta, tool) for name in names]))


def test_thinking_is_measured_greedily_in_each_mode(tmp_path, monkeypatch):
    texts = {"think": THOUGHT, "no_think": "5", "agentic_think": "<think>4</think>"}
    sampler = Sampler(monkeypatch, texts)
    questions = questions_of("A", "B", tool=True)
    run = FakeRun(tmp_path)
    right = coldstart.measure(run, tmp_path / "model", questions, 1)
    assert right == {(0, "think"): 1.0, (0, "no_think"): 0.0, (0, "agentic_think"): 0.0}
    assert sampler.loaded.folders == [tmp_path / "model"]
    assert sampler.how == [(1, 192, 0.0, {"keep_pixels": False})]
    assert {prompt.mode for prompt in sampler.prompts} == set(texts)
    for prompt in sampler.prompts:
        assert text_of(prompt.record["messages"][0]) == "A", "the mode puts the switch there"
        assert prompt.record["messages"][-1]["role"] == "assistant"
        assert prompt.root is None and prompt.seed == "0"


def test_an_answer_counts_by_what_is_in_its_box(tmp_path, monkeypatch):
    boxed = "<think>5</think><answer>it is \\boxed{4} of 9</answer>"
    Sampler(monkeypatch, {"think": boxed, "no_think": None})
    right = coldstart.measure(FakeRun(tmp_path), tmp_path, questions_of("A"), 9)
    assert right == {(0, "think"): 1.0}, "media that cannot be read are no wrong answer"


def test_half_an_answer_is_none(tmp_path, monkeypatch):
    Sampler(monkeypatch, {"think": None, "no_think": "a red cross"})
    meta = {"answer": "a red ring", "verifier": "text"}
    right = coldstart.measure(FakeRun(tmp_path), tmp_path, questions_of("A", meta=meta), 9)
    assert right == {(0, "no_think"): 0.0}


def test_ranks_measure_their_share(tmp_path, monkeypatch):
    sampler = Sampler(monkeypatch, {"think": THOUGHT, "no_think": "4"})
    questions = questions_of(*"ABCDE")
    local = {}
    for rank in (1, 0):
        run = FakeRun(tmp_path, rank=rank, world=2, local=local)
        right = coldstart.measure(run, tmp_path, questions, 5)
    assert [text_of(p.record["messages"][0]) for p in sampler.prompts] == list("BBDDAACCEE")
    assert len(right) == 10


def test_the_best_mode_is_that_of_the_kind_unless_the_question_says_otherwise():
    right = {(i, "no_think"): 0.0 for i in range(4)}
    right |= {(i, "think"): float(i < 2) for i in range(4)}
    right |= {(4, "no_think"): 1.0, (4, "think"): 0.0}  # of the same kind: thinking gains 0.2
    right |= {(6, mode): 1.0 for mode in coldstart.ANALYSIS}
    kinds = [*"aaaaaa", *"bb", "c"]
    best = coldstart.best_modes(right, kinds)
    assert best == ["think"] * 4 + ["no_think", "think"] + ["no_think"] * 2 + [None]


@pytest.mark.parametrize("gain, best", [(0.05, "no_think"), (0.1, "think")])
def test_thinking_must_gain_enough_to_be_worth_its_tokens(gain, best):
    plain = {(i, "no_think"): float(i < 10) for i in range(20)}
    thinking = {(i, "think"): float(i < 10 + 20 * gain) for i in range(20)}
    assert coldstart.best_modes(plain | thinking, ["a"] * 21)[20] == best


def test_of_equals_the_shortest_is_taught():
    right = {(0, "no_think"): 0.0, (0, "think"): 1.0, (0, "agentic_think"): 1.0}
    assert coldstart.best_modes(right, ["a"]) == ["think"]


@pytest.mark.parametrize("mode", coldstart.ANALYSIS)
def test_an_analysis_names_the_mode_of_the_answer_behind_it(mode):
    (answers,) = questions_of("A", tool=True)
    example = coldstart.analysed(answers, mode)
    parsed = parse(example.answer["content"], "auto_think")
    assert not parsed.errors and parsed.chose == mode and parsed.final == "4"
    assert text_of(example.answer).endswith(text_of(answers[mode].answer))
    assert example.mode == "auto_think" and example.question == answers[mode].question
    assert text_of(answers[mode].answer) in (THOUGHT, "4", text_of({"content": SEEN}))


def test_a_tool_is_taught_as_thinking_where_the_question_has_no_such_answer():
    (answers,) = questions_of("A")
    example = coldstart.analysed(answers, "agentic_think")
    parsed = parse(example.answer["content"], "auto_think")
    assert not parsed.errors and parsed.chose == "agentic_think"


def build_auto(monkeypatch, tmp_path, kinds, right):
    run = FakeRun(tmp_path)
    asked = []

    def measure(run, model, questions, count):
        asked.append((model, len(questions), count))
        return right

    monkeypatch.setattr(coldstart, "measure", measure)
    out = tmp_path / "data"
    coldstart.build_auto(run, "model", kinds, tmp_path, out, {"measured": 7})
    assert asked == [("model", len(coldstart.answers_by_mode(kinds)), 7)]
    return out, run.said


def test_auto_think_is_taught_what_was_measured(tmp_path, monkeypatch):
    """Half of the questions with a switch; turns of all three modes, the last switch wins."""
    other = META | {"task": "product"}
    questions = [(f"A{i}", META, None) for i in range(40)] + [("B", other, None)]
    right = {(0, "think"): 1.0, (0, "no_think"): 0.0, (40, "think"): 1.0, (40, "no_think"): 1.0}
    out, said = build_auto(monkeypatch, tmp_path, kinds_of(*questions), right)
    made = answers_in(out / "auto_think.jsonl")
    thinks = f"<analysis>Several steps /think.</analysis>{THOUGHT}"
    plain = "<analysis>Easy /no_think.</analysis>4"
    assert [answer for _, answer in made] == [thinks] * 40 + [plain]
    switched = [question.endswith("/auto_think") for question, _ in made]
    assert 10 < sum(switched) < 30
    assert all(question.endswith("/auto_think") or "/" not in question for question, _ in made)
    assert "auto-think thinks on: product 0%, sum 100%" in said
    turns = "".join(text_of(m) for r in read(out / "turns.jsonl") for m in r["messages"])
    assert len(read(out / "turns.jsonl")) == (41 + 41 + 41) // 8
    assert "<analysis>" in turns and "/auto_think" in turns and "/no_think" in turns


def test_without_a_known_truth_auto_think_is_not_taught_and_that_is_said(tmp_path, monkeypatch):
    out, said = build_auto(monkeypatch, tmp_path, kinds_of(("A", None, True)), {})
    assert read(out / "auto_think.jsonl") == []
    assert "auto-think thinks on: nothing; no question has a truth" in said
    assert coldstart.mixture(out, {"auto_think": 5}) == []


# ----------------------------------------------------------------------------------------------
# the toy world's own answers


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("built")
    kinds = coldstart.read_kinds(world())
    coldstart.build(FakeRun(out), kinds, world(), out, {"kept": 30})
    return kinds, out


@pytest.mark.parametrize("kind", ["think", "no_think", "agentic", "video"])
def test_every_kind_has_its_form_and_the_right_answer(kind, built):
    kinds, out = built
    twice = 2 if kind == "video" else 1
    examples = [example for example in kinds[kind] for _ in range(twice)]
    assert {example.mode for example in examples} >= {coldstart.SWITCH.get(kind, "think")}
    for example, record in zip(examples, read(out / f"{kind}.jsonl"), strict=True):
        question = text_of(record["messages"][-2])
        assert question == text_of(example.question[-1]) + f"/{example.mode}"
        parsed = parse(record["messages"][-1]["content"], example.mode)
        assert not parsed.errors
        if kind != "video":
            assert verify(parsed.final, example.meta)[1] == 1
            assert consistent(parsed, example.meta)


def test_a_tools_output_has_no_loss_and_the_picture_is_the_crop(built, processor):
    _, out = built
    record = next(r for r in read(out / "agentic.jsonl") if len(media_items(r)) > 1)
    sample = processor(record, out)
    learnt = [int(label) for label in sample["labels"] if label != -100]
    text = processor.tokenizer.decode(learnt)
    assert "sandbox_output" not in text and "<tool_call>crop(" in text
    assert text.endswith("}</answer><|im_end|>")
    pads = {processor.tokenizer.special[f"<|{kind}_pad|>"] for kind in ("image", "video")}
    assert not pads & set(learnt) and pads & set(sample["tokens"].tolist())
    shown = media_items(record)
    assert all((out / item["image"]).is_file() for item, _ in shown)


# ----------------------------------------------------------------------------------------------
# both passes


class Coldstart(Phase):
    """The command with doubles for the loop, the score and the measuring."""

    def __init__(self, monkeypatch, tmp_path):
        super().__init__(monkeypatch, tmp_path, coldstart)
        self.modes = self.out / "toy" / "coldstart-modes"
        self.last = self.out / "toy" / "coldstart"
        write(self.data / "train" / "think.jsonl", [talk("2 + 2?", THOUGHT, meta=META)])
        write(self.data / "train" / "no_think.jsonl", [talk("2 + 2?", "4")])
        write(self.data / "train" / "text.jsonl", [talk("Say 4.", "4")])
        self.build = coldstart.build
        monkeypatch.setattr(coldstart, "build", self.note_build)
        monkeypatch.setattr(coldstart, "measure", self.measure)

    def note_build(self, run, kinds, folder, out, plan):
        self.done.append(("build", out, plan["kept"]))
        if self.failing == "build":
            raise RuntimeError("killed")
        self.build(run, kinds, folder, out, plan)

    def measure(self, run, model, questions, count):
        self.done.append(("measure", model, count))
        if self.failing == "measure":
            raise RuntimeError("killed")
        return {(0, "think"): 1.0, (0, "no_think"): 0.0}

    def finetune(self, run, init, mix, lr, steps):
        self.resumed = run.args.resume
        mix = {path.stem: weight for path, weight in mix if path.parent == self.modes / "data"}
        super().finetune(run, init, mix, lr, steps)
        if self.failing == "second" and run.folder == self.last:
            raise RuntimeError("killed")

    def calls(self):
        return [what for what, *_ in self.done]


@pytest.fixture
def phase(monkeypatch, tmp_path):
    return Coldstart(monkeypatch, tmp_path)


WHOLE = ["build", "finetune", "measure", "finetune", "score"]


def test_the_second_pass_goes_on_from_the_first_with_auto_think(phase):
    shutil.copytree(phase.init, phase.out / "toy" / "mpo" / "model")
    phase("--eval-limit", 3)
    before = phase.out / "toy" / "mpo" / "model"
    modes = phase.modes / "model"
    mix = {"think": 3, "no_think": 2, "keep": 4}
    assert phase.done == [
        ("build", phase.modes / "data", 3000),
        ("finetune", phase.modes, before, mix, 1e-3, 600),
        ("measure", modes, 3000),
        ("finetune", phase.last, modes, mix | {"auto_think": 5}, 1e-3, 400),
        ("score", phase.data / "heldout", MODES, 3),
    ]
    phase()
    assert phase.done == [], "what is trained and scored is passed over"


def test_steps_and_plan_follow_the_flags(phase):
    phase("--init", phase.init, "--steps", 7)
    assert [call[-1] for call in phase.done if call[0] == "finetune"] == [7, 7]
    phase("--init", phase.init, "--size", "4b")
    build, first, measure, second, _ = phase.done
    assert (build[-1], measure[-1]) == (100_000, 20_000)
    assert (first[-2:], second[-2:]) == ((1e-5, 1500), (1e-5, 500))


@pytest.mark.parametrize("failing, again", [
    ("build", WHOLE),
    ("finetune", WHOLE[1:]),  # the data are there, and the loop resumes
    ("measure", WHOLE[2:]),
    ("second", WHOLE[3:]),
])
def test_after_a_kill_it_goes_on_where_it_was(failing, again, phase):
    phase.failing = failing
    with pytest.raises(RuntimeError):
        phase("--init", phase.init)
    phase.failing = None
    phase("--init", phase.init)
    assert phase.calls() == again


@pytest.mark.parametrize("failing", ["finetune", "second"])
def test_corrected_data_are_learnt_from_the_first_pass_on(failing, phase, capsys):
    phase.failing = failing
    with pytest.raises(RuntimeError):
        phase("--init", phase.init)
    phase.failing = None
    write(phase.data / "train" / "no_think.jsonl", [talk("2 + 2?", "It is 4")])
    phase("--init", phase.init)
    assert phase.calls() == WHOLE
    said = capsys.readouterr().err
    assert f"no_think.jsonl changed since {phase.modes} was made: it starts over" in said
    assert "It is 4" in (phase.modes / "data" / "no_think.jsonl").read_text()

    write(phase.data / "train" / "text.jsonl", [talk("Say 5.", "5")])  # some of it is kept
    phase("--init", phase.init)
    assert phase.calls() == [], "it is finished"
    assert "text.jsonl changed" in capsys.readouterr().err
    phase("--init", phase.init, "--fresh")
    assert phase.calls() == WHOLE


def test_resume_insists_on_a_checkpoint_of_the_pass_that_was_interrupted(phase):
    phase("--init", phase.init)
    shutil.rmtree(phase.modes)
    phase("--init", phase.init, "--resume")
    assert phase.calls() == WHOLE
    assert phase.resumed is False, "the second pass has no checkpoint yet"
    shutil.rmtree(phase.last)
    phase("--init", phase.init, "--resume")
    assert phase.calls() == WHOLE[2:] and phase.resumed is True


def test_another_init_is_refused_where_a_run_has_begun(phase):
    phase.failing = "finetune"
    with pytest.raises(RuntimeError):
        phase("--init", phase.init)
    phase.failing = None
    other = phase.init.with_name("other")
    shutil.copytree(phase.init, other)
    with pytest.raises(SystemExit, match="coldstart-modes was made with init .*init, not with .*o"):
        phase("--init", other)
    assert phase.done == []
    phase("--init", other, "--fresh")
    assert phase.calls() == WHOLE
    change(other)
    with pytest.raises(SystemExit, match="coldstart-modes was made with weights "):
        phase("--init", other)


def test_a_second_pass_of_another_first_one_does_not_count(phase):
    """--fresh, killed in the first pass: the old second pass must not be taken for the new one."""
    phase("--init", phase.init)
    change(phase.init)
    phase.failing = "finetune"
    with pytest.raises(RuntimeError):
        phase("--init", phase.init, "--fresh")
    phase.failing = None
    phase("--init", phase.init)
    assert phase.calls() == WHOLE[1:]

    change(phase.modes / "model")
    with pytest.raises(SystemExit, match="coldstart was made with weights "):
        phase("--init", phase.init)


def test_a_model_beyond_the_machines_memory_is_refused_before_it_is_asked(phase, monkeypatch):
    monkeypatch.setattr("common.fit.free_memory", lambda: 1e6)
    with pytest.raises(SystemExit, match="^coldstart-modes does not fit on cpu: "):
        phase("--init", phase.init)
    assert phase.done == []


def test_a_failing_scorer_does_not_undo_the_training(phase, capsys):
    phase.failing = "score"
    phase("--init", phase.init)
    said = capsys.readouterr().err
    assert "no memory left" in said and "WARNING: coldstart is trained and saved" in said
    phase.failing = None
    phase("--init", phase.init)
    assert phase.calls() == ["score"]
    assert (phase.last / "score.json").exists()


def test_an_unreadable_line_ends_the_run_before_it_begins(phase):
    write(phase.data / "train" / "think.jsonl", [talk("2 + 2?", "<think>")])
    with pytest.raises(SystemExit, match="think.jsonl:1: not an answer in think mode"):
        phase("--init", phase.init)
    write(phase.data / "heldout" / "q.jsonl", [talk("2 + 2?", "4")])
    with pytest.raises(SystemExit, match="heldout/q.jsonl:1: "):
        phase("--init", phase.init)
    assert phase.done == [] and not phase.modes.exists()


def test_without_a_model_to_start_from_it_says_so(phase):
    with pytest.raises(SystemExit, match="mpo/model holds no model; run mpo first"):
        phase()


def test_the_whole_command(tmp_path):
    args = flags(tmp_path, "--data", world(), "--init", first_model(), "--steps", 2)
    said = run_script("coldstart.py", *args)
    assert "auto-think thinks on: " in said
    data = tmp_path / "toy" / "coldstart-modes" / "data"
    counts = {path.stem: len(read(path)) for path in data.glob("*.jsonl")}
    assert set(counts) == {*coldstart.MIX, "auto_think"} and all(counts.values())
    for record in read(data / "auto_think.jsonl"):
        assert not parse(record["messages"][-1]["content"], "auto_think").errors
    score = json.loads((tmp_path / "toy" / "coldstart" / "score.json").read_text())
    assert set(score) == set(MODES)
    for name in ("coldstart-modes", "coldstart"):
        assert [r["step"] for r in read(tmp_path / "toy" / name / "metrics.jsonl")] == [0, 1]
