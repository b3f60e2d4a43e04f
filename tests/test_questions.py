"""common/questions.py: what counts as a question, which are read, and how prompts are drawn."""

import gzip
import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from common import jsonl
from common.questions import Question
from common.questions import check_heldout
from common.questions import draw_prompts
from common.questions import question_pool
from common.questions import read_questions
from common.questions import say_files


def record(text="What is 1 + 1?", answer="2", verifier="number", **meta):
    return {
        "messages": [
            {"role": "user", "content": text},
            {"role": "assistant", "content": answer},
        ],
        "meta": {"answer": answer, "verifier": verifier, **meta},
    }


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


# -- reading


def test_a_phase_says_which_files_it_reads_and_which_it_leaves(tmp_path):
    for name in ("instruct", "vqa", "mine"):
        write(tmp_path / "train" / f"{name}.jsonl", [record()])
    said = []
    run = SimpleNamespace(stage="sft", say=said.append)
    files = [tmp_path / "train" / f"{name}.jsonl" for name in ("vqa", "instruct", "mine")]
    for read in (files[:2], files, []):
        say_files(run, tmp_path, read)
    where = tmp_path / "train"
    assert said == [
        f"sft reads instruct, vqa of {where}; it leaves mine",
        f"sft reads instruct, mine, vqa of {where}",
        f"sft reads nothing of {where}; it leaves instruct, mine, vqa",
    ]


def test_a_file_of_questions_is_parsed_once(tmp_path, monkeypatch):
    """Scripts wait for it when they start: 50,000 lines take seconds."""
    write(tmp_path / "sums.jsonl", [record("1 + 1?"), record("1 + 2?", "3"), record("1 + 3?", "4")])
    parsed = []
    parse = jsonl._parse
    monkeypatch.setattr(jsonl, "_parse", lambda data: parsed.append(data) or parse(data))
    assert [q.meta["answer"] for q in read_questions(tmp_path / "sums.jsonl")] == ["2", "3", "4"]
    assert len(parsed) == 3


def test_a_question_knows_its_place_and_its_task(tmp_path):
    write(tmp_path / "sums.jsonl", [
        record(),
        record(task="hard_sum"),
        record(task="easy_sum", category="text"),
    ])
    questions = read_questions(tmp_path)
    assert [q.task for q in questions] == ["sums", "hard_sum", "easy_sum"]
    assert [q.category for q in questions] == ["sums", "hard_sum", "text"]
    assert questions[2].where == f"{tmp_path}/sums.jsonl:3"
    assert questions[0].root == tmp_path.resolve()
    assert questions[0].meta["answer"] == "2"
    assert questions[0].record["messages"] == record()["messages"]


def test_a_folder_or_one_file_is_read_in_order(tmp_path):
    for name in "ba":
        write(tmp_path / f"{name}.jsonl", [record(f"{name}{i}") for i in range(2)])
    (tmp_path / "notes.txt").write_text("no questions\n")

    def texts(path):
        return [q.record["messages"][0]["content"] for q in read_questions(path)]

    assert texts(tmp_path) == texts(str(tmp_path)) == ["a0", "a1", "b0", "b1"]
    assert texts(tmp_path / "b.jsonl") == ["b0", "b1"]


def test_the_limit_is_per_task(tmp_path):
    tasks = ["often", "often", "rare", "often"]
    write(tmp_path / "q.jsonl", [record(task=task) for task in tasks])
    write(tmp_path / "r.jsonl", [record(task="often")])
    wheres = [q.where.split("/")[-1] for q in read_questions(tmp_path, limit_per_task=2)]
    assert wheres == ["q.jsonl:1", "q.jsonl:2", "q.jsonl:3"]


def test_tasks_and_categories_can_be_chosen(tmp_path):
    write(tmp_path / "q.jsonl", [
        record(task="colour", category="look"),
        record(task="shape", category="look"),
        record(task="sum", category="text"),
    ])

    def tasks(*names):
        return [q.task for q in read_questions(tmp_path, tasks=list(names))]

    assert tasks("look") == ["colour", "shape"]
    assert tasks("shape", "text") == ["shape", "sum"]
    with pytest.raises(ValueError, match="'smell'.*colour, look, shape, sum, text"):
        tasks("sum", "smell")


@pytest.mark.parametrize("spoil", [
    lambda r: r.pop("meta"),
    lambda r: r.update(meta="2"),
    lambda r: r["meta"].pop("answer"),
    lambda r: r["meta"].pop("verifier"),
    lambda r: r["meta"].update(verifier="mood"),
    lambda r: r["meta"].update(verifier="box", answer="nowhere"),
    lambda r: r["meta"].update(answer="many"),
    lambda r: r["meta"].update(answer=2),
    lambda r: r["messages"].pop(),
    lambda r: r["messages"].pop(0),
    lambda r: r["messages"].reverse(),
    lambda r: r["messages"][0].update(role="system"),
    lambda r: r["messages"][0].update(content=3),
])
def test_a_line_that_is_no_question_is_named(tmp_path, spoil):
    records = [record(), record()]
    spoil(records[1])
    write(tmp_path / "q.jsonl", records)
    with pytest.raises(ValueError, match=r"q\.jsonl:2: "):
        read_questions(tmp_path)


@pytest.mark.parametrize("meta, why", [
    (None, 'meta with "answer" and "verifier", .* is missing'),
    ("2", 'meta with "answer" and "verifier", .* is missing'),
    ({"answer": "2"}, 'meta with "answer" and "verifier", .* is missing'),
    ({"answer": 2, "verifier": "number"}, 'meta: "answer" must be a text, not int'),
    ({"answer": ["2"], "verifier": "exact"}, 'meta: "answer" must be a text, not list'),
    ({"answer": "2", "verifier": "number", "hints": "1 + 1"}, 'meta: "hints" must be a list of'),
    ({"answer": "2", "verifier": "number", "hints": ["1 + 1", 2]}, 'meta: "hints" must be a list'),
])
def test_a_set_without_truths_is_refused_in_one_line(tmp_path, meta, why):
    write(tmp_path / "q.jsonl", [record() | {"meta": meta}])
    with pytest.raises(ValueError, match=rf"q\.jsonl:1: {why}") as error:
        read_questions(tmp_path)
    assert "\n" not in str(error.value)


def test_questions_of_any_form_and_file_are_read(tmp_path):
    meta = record(task="look")["meta"]
    llava = {
        "image": "a.jpg", "meta": meta,
        "conversations": [
            {"from": "human", "value": "<image>\nHow many?"}, {"from": "gpt", "value": "2"},
        ],
    }
    swift = {"query": "<image>How many?", "response": "2", "images": ["a.jpg"], "meta": meta}
    (tmp_path / "llava.json").write_text(json.dumps([llava], indent=1))
    (tmp_path / "swift.jsonl.gz").write_bytes(gzip.compress(json.dumps(swift).encode()))
    first, second = read_questions(tmp_path)
    assert first.record == second.record and first.task == "look"
    assert first.where == f"{tmp_path / 'llava.json'}: record 1"
    picture, text = first.record["messages"][0]["content"]
    assert picture == {"type": "image", "image": "a.jpg"} and text["text"] == "How many?"
    del meta["task"]
    (tmp_path / "swift.jsonl.gz").write_bytes(gzip.compress(json.dumps(swift).encode()))
    assert [q.task for q in read_questions(tmp_path / "swift.jsonl.gz")] == ["swift"]


def test_no_questions_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="no .*jsonl"):
        read_questions(tmp_path)
    with pytest.raises(ValueError, match="no .*jsonl"):
        read_questions(tmp_path / "nowhere")
    (tmp_path / "q.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="q.jsonl"):
        read_questions(tmp_path)


def test_pairs_are_no_questions(tmp_path):
    """heldout/preferences.jsonl is what alignment compares; a file that is named is read."""
    write(tmp_path / "q.jsonl", [record()])
    write(tmp_path / "preferences.jsonl", [{"messages": [], "chosen": "a", "rejected": "b"}])
    assert len(read_questions(tmp_path)) == 1
    with pytest.raises(ValueError, match="preferences.jsonl:1"):
        read_questions(tmp_path / "preferences.jsonl")


# -- at the start of the scripts


def test_the_pool_holds_the_files_that_exist(tmp_path):
    for name in ("instruct", "questions", "other"):
        write(tmp_path / "train" / f"{name}.jsonl", [record()])
    assert [q.task for q in question_pool(tmp_path)] == ["questions", "instruct"]
    write(tmp_path / "train" / "discover.jsonl", [record()])
    assert [q.task for q in question_pool(tmp_path)] == ["questions", "instruct"]
    assert [q.task for q in question_pool(tmp_path, ("discover",))] == ["discover"]
    with pytest.raises(SystemExit, match="questions.jsonl, detail.jsonl, instruct.jsonl"):
        question_pool(tmp_path / "nowhere")


def test_a_pool_line_without_a_truth_ends_the_script(tmp_path):
    (tmp_path / "train").mkdir()
    bad = {"messages": record()["messages"][:1]}
    write(tmp_path / "train" / "questions.jsonl", [bad])
    with pytest.raises(SystemExit, match="questions.jsonl:1"):
        question_pool(tmp_path)


def test_held_out_questions_are_checked_where_there_are_any(tmp_path):
    check_heldout(tmp_path)
    write(tmp_path / "heldout" / "q.jsonl", [record()])
    check_heldout(tmp_path)
    write(tmp_path / "heldout" / "q.jsonl", [record(), record(verifier="mood")])
    with pytest.raises(SystemExit, match="q.jsonl:2"):
        check_heldout(tmp_path)


def seen(item, task="look"):
    text = {"type": "text", "text": "How many?"}
    return record([item, text], task=task)


def test_held_out_media_are_there_or_it_is_said_before_training(tmp_path, caplog):
    """Few may be missing. All forms of media are looked at, whatever size the line says."""
    folder = tmp_path / "heldout"
    folder.mkdir()
    Image.new("RGB", (30, 30)).save(folder / "a.png")
    (folder / "b.png").write_text("no picture")
    shutil.copy(folder / "b.png", folder / "b.mp4")
    good = seen({"type": "image", "image": "a.png"})
    bad = [
        seen({"type": "image", "image": "gone.png", "width": 30, "height": 30}),
        seen({"type": "image", "image": "b.png"}),
        seen({"type": "video", "video": "b.mp4"}),
        seen({"type": "video", "video": ["a.png", "gone.png"]}),
    ]
    for line in bad:
        caplog.clear()
        write(folder / "q.jsonl", [good] * 59 + [line])
        check_heldout(tmp_path)
        assert "1 of 60 held-out questions cannot be used, the first: " in caplog.text
        assert f"{folder / 'q.jsonl'}:60: " in caplog.text
        write(folder / "q.jsonl", [good] * 53 + [line] * 7)
        with pytest.raises(SystemExit, match=r"7 of 60 held-out questions .*q.jsonl:54: .*5%"):
            check_heldout(tmp_path)


def test_only_held_out_questions_that_will_be_asked_need_their_media(tmp_path, caplog):
    folder = tmp_path / "heldout"
    lost = {"type": "image", "image": "gone.png"}
    write(folder / "q.jsonl", [record(task="look")] * 4 + [seen(lost)] * 60)
    check_heldout(tmp_path, 4)
    check_heldout(tmp_path, 0)
    assert caplog.text == ""
    with pytest.raises(SystemExit, match="60 of 64"):
        check_heldout(tmp_path)
    write(folder / "q.jsonl", [record()] * 4 + [record(verifier="mood")])
    with pytest.raises(SystemExit, match="q.jsonl:5"):  # scoring reads all lines
        check_heldout(tmp_path, 4)


# -- drawing


def questions_of(task, n, video=False):
    content = "?"
    if video:
        content = [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "?"}]
    return [
        Question(record(content, task=task, category=task, number=i), Path("/data"), f"{task}:{i}")
        for i in range(n)
    ]


@pytest.fixture
def pool():
    """300 questions of one task, 60 of another with clips, and 6 of a rare one."""
    return questions_of("often", 300) + questions_of("clip", 60, True) + questions_of("rare", 6)


MODES = {"think": 1, "agentic_think": 9}
GOLDEN = [
    ("rare", 2, "agentic_think"),
    ("often", 226, "agentic_think"),
    ("clip", 22, "think"),
    ("rare", 4, "agentic_think"),
]


def keys(prompts):
    return [(p.record["meta"]["task"], p.record["meta"]["number"], p.mode) for p in prompts]


@pytest.mark.parametrize("n, counts", [(9, [3, 3, 3]), (18, [6, 6, 6]), (30, [12, 12, 6])])
def test_a_rare_task_is_asked_as_often_as_any(pool, n, counts):
    drawn = keys(draw_prompts(pool, n, MODES, "0/1"))
    tasks = [task for task, _, _ in drawn]
    assert [tasks.count(task) for task in ("often", "clip", "rare")] == counts
    assert len({key[:2] for key in drawn}) == len(drawn)  # none twice


def test_a_task_is_asked_by_its_weight(pool):
    """And no task is silent for long: what stands first in a line changes with the seed."""
    counts = Counter()
    for seed in range(60):
        drawn = keys(draw_prompts(pool, 12, MODES, str(seed), {"often": 0.1, "rare": 0.5}))
        assert len({key[:2] for key in drawn}) == 12
        counts.update(task for task, _, _ in drawn)
    for task, share in (("clip", 1.0), ("rare", 0.5), ("often", 0.1)):
        assert counts[task] == pytest.approx(60 * 12 * share / 1.6, rel=0.1)


def test_a_seed_decides_the_draw(pool):
    prompts = draw_prompts(pool, 18, MODES, "0/1")
    assert keys(prompts) == keys(draw_prompts(pool, 18, MODES, "0/1"))
    assert keys(prompts) != keys(draw_prompts(pool, 18, MODES, "0/2"))
    assert [p.seed for p in prompts] == [f"0/1/{i}" for i in range(18)]
    assert {p.root for p in prompts} == {Path("/data")}


def test_draws_are_those_of_earlier_runs(pool):
    """So that a run's numbers can be had again."""
    assert keys(draw_prompts(pool, 4, MODES, "0/1")) == GOLDEN


def test_a_clip_is_never_asked_with_tools(pool):
    drawn = keys(draw_prompts(pool, 100, MODES, "0/1"))
    assert {mode for task, _, mode in drawn if task == "clip"} == {"think"}
    assert {mode for task, _, mode in drawn if task == "often"} == {"think", "agentic_think"}


def test_modes_are_drawn_by_weight(pool):
    modes = [p.mode for p in draw_prompts(pool[:300], 300, MODES, "x")]
    assert modes.count("agentic_think") == pytest.approx(270, abs=20)


def test_fewer_prompts_than_tasks_may_be_of_any_task(pool):
    tasks = [keys(draw_prompts(pool, 1, MODES, str(i)))[0][0] for i in range(60)]
    assert min(tasks.count(task) for task in ("often", "clip", "rare")) > 8


def test_more_prompts_than_questions_are_all_of_them(pool):
    assert len(draw_prompts(pool, 1000, MODES, "0")) == len(pool)
