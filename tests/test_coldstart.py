"""coldstart.py and sft.py: the five kinds in their forms, switches, masks, the difficulty filter, and both commands."""
import json
import os
import random
import subprocess
import sys

import pytest
import torch

import coldstart
import sft
from conftest import ROOT
from data import media_of, switch
from model import PRESETS, KeyeVL
from rewards import MODES, consistent, parse, verify
from toyworld import make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("coldstart") / "world"
    make_world(out, pictures=240, clips=40, heldout=5, workers=1, progress=False)
    return out


@pytest.fixture(scope="module")
def start(tmp_path_factory, processor):
    folder = tmp_path_factory.mktemp("start") / "model"
    torch.manual_seed(0)
    KeyeVL.empty(PRESETS["toy"]).init_weights().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def pool(world):
    return [line for name in ("questions", "detail", "instruct") for line in sft.read_pool(world / "train" / f"{name}.jsonl")]


def test_every_kind_has_its_form_and_the_right_answer(world):
    seen = set()
    for i, line in enumerate(pool(world)):
        made = coldstart.kinds(line, world / "train", random.Random(i))
        clip = any(k == "video" for _, k in media_of(line))
        for mode in coldstart.ANALYSIS if not clip else ("no_think", "think"):
            made[f"auto {mode}"] = [c for c in [coldstart.analysed(line, world / "train", random.Random(i), mode)] if c]
        for kind, conversations in made.items():
            for c in conversations:
                asked, said = c["messages"][-2], c["messages"][-1]["content"]
                text = asked["content"] if isinstance(asked["content"], str) else asked["content"][-1]["text"]
                mode = next((m for m in ("auto_think", "agentic_think", "no_think", "think") if text.endswith("/" + m)), "auto_think")
                p = parse(said, mode)
                assert mode == (c["mode"] or "auto_think") and not p.errors, (p.errors, said)
                assert verify(p.final, line["meta"])[1] == 1 and consistent(p, line["meta"])
                seen.add((kind, mode, p.chose))
        if clip:  # at two frame counts
            assert [media_of(c)[0][0]["fps"] for c in made["video"]] == [2.0, 1.0] and "think" not in made
    want = {("think", "think", "think"), ("no_think", "no_think", "no_think"), ("agentic_think", "agentic_think", "agentic_think")}
    want |= {(f"auto {m}", "auto_think", m) for m in coldstart.ANALYSIS}
    assert want <= seen and {m for k, m, _ in seen if k == "video"} >= {"think", "no_think"}


def test_auto_think_is_taught_what_was_measured(world, start, tmp_path, monkeypatch):
    """Thinking where it is right more often, tools where they are right most often, and of equals the shortest."""
    right = {"no_think": 0, "think": 1, "agentic_think": 1}
    lines = [line for line in pool(world) if line["meta"]["task"] in ("detail", "colour", "count")]

    def rollout(generator, jobs, group, longest, seeds, temperature):
        texts = {"no_think": "{}", "think": "<think>x</think><answer>\\boxed{{{}}}</answer>"}
        texts["agentic_think"] = texts["think"]
        wrong = lambda line, mode: line["meta"]["task"] == "colour" or not right[mode] or (line["meta"]["task"] == "detail" and mode == "think")
        return [[{"content": [{"type": "text", "text": texts[mode].format("?" if wrong(line, mode) else line["messages"][-1]["content"])}],
                  "finished": True}] * group for line, _, mode in jobs]
    monkeypatch.setattr(coldstart, "rollout", rollout)

    class Run:
        rank, world, main, device = 0, 1, True, torch.device("cpu")
        gather_objects = staticmethod(lambda x: [x])
    best = coldstart.measure(Run, start, [(line, world / "train") for line in lines], {"asked": 500, "muon": 2}, 0)
    chosen = {(line["meta"]["task"], mode) for line, mode in zip(lines, best)}
    assert chosen == {("detail", "agentic_think"), ("colour", "no_think"), ("count", "think")}


def test_the_best_mode_is_that_of_the_kind_unless_the_question_says_otherwise():
    right = {(i, "no_think"): [0.0] for i in range(4)} | {(i, "think"): [float(i < 2)] for i in range(4)}  # gains 0.5
    right |= {(4, "no_think"): [1.0], (4, "think"): [0.0]}  # of the same kind, so that it gains 0.2
    right |= {(6, mode): [1.0] for mode in ("no_think", "think", "agentic_think")}
    best = coldstart.best_modes(right, ["a"] * 6 + ["b"] * 2 + ["c"])
    assert best == ["think"] * 4 + ["no_think", "think"] + ["no_think"] * 2 + [None]


def test_a_tools_output_has_no_loss_and_the_picture_is_the_crop(world, processor):
    line = sft.read_pool(world / "train" / "detail.jsonl")[0]
    c, = coldstart.kinds(line, world / "train", random.Random(0))["agentic_think"]
    content = c["messages"][-1]["content"]
    assert [i["type"] for i in content] == ["text", "text", "image", "text", "text"]
    sample = processor(c, world / "train")
    shown = sample["tokens"][torch.where(sample["labels"] != -100)[0] + 1]
    text = processor.tokenizer.decode(shown)
    assert "sandbox_output" not in text and "<tool_call>crop(" in text and text.endswith("}</answer><|im_end|>")
    assert not set(shown.tolist()) & set(processor.pads.values()) and "crop" in processor.tokenizer.decode(sample["tokens"])


def test_most_travelled_chain():
    steps = ["a: 1", "b: 2", "1 + 2 = 3"]
    for seed in range(50):
        path = coldstart.travelled(steps, random.Random(seed))
        assert path is None or set(path) <= set(steps)  # a wrong step is dropped
    paths = [tuple(coldstart.travelled(steps, random.Random(s)) or ()) for s in range(200)]
    assert max(set(paths), key=paths.count) == tuple(steps)
    errors = [coldstart.teacher(steps, random.Random(s)) for s in range(300)]
    assert any(set(p) - set(steps) for p, _ in errors) and any(len(p) < 3 for p, _ in errors)  # the teacher does err


def test_switches():
    q = [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]}]
    once = switch(q, "think")
    assert once[0]["content"][-1]["text"] == "What?/think" and q[0]["content"][-1]["text"] == "What?" and switch(q, None) is q
    line = {"messages": [*once, {"role": "assistant", "content": "x"}], "mode": "think"}
    both = coldstart.retold(line, ["no_think", "think"])
    assert both["messages"][0]["content"][-1]["text"] == "What?/no_think/think"
    assert coldstart.retold(line, [None])["messages"][0]["content"][-1]["text"] == "What?"
    assert switch([{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}, {"role": "user", "content": "R"}], "think")[-1][
        "content"][-1]["text"] == "R/think"


def shell(*cmd, fail=False):
    done = subprocess.run([sys.executable, *map(str, cmd), "--device", "cpu", "--threads", "1"], cwd=ROOT, capture_output=True, text=True,
                          timeout=300, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert (done.returncode != 0) == fail, done.stderr[-3000:]
    return done.stdout + done.stderr


SHORT = '''
import runpy, sys, trainer
add = trainer.phase_arguments
def arguments(doc):
    sys.modules["__main__"].PLAN["toy"].update(pack=1200, asked=12)
    return add(doc)
trainer.phase_arguments = arguments
script = sys.argv.pop(1)
runpy.run_path(script, run_name="__main__")
'''


def test_both_commands(tmp_path, world, start):
    (tmp_path / "short.py").write_text(SHORT)
    args = ["--data", world, "--out", tmp_path, "--init", start, "--steps", 3, "--eval-limit", 1]
    said = shell(tmp_path / "short.py", "sft.py", *args)
    assert "lines are not easy and stay" in said and (tmp_path / "toy/sft/model/model.safetensors").exists()
    kept = [json.loads(line) for line in (tmp_path / "toy/sft/data/instruct.jsonl").read_text().splitlines()]
    assert kept and all((tmp_path / "toy/sft/data" / item["image"]).exists() for line in kept for item, k in media_of(line) if k == "image")
    said = shell(tmp_path / "short.py", "coldstart.py", *args)
    assert "auto-think thinks on" in said
    data = tmp_path / "toy/coldstart-modes/data"
    counts = {p.stem: len(p.read_text().splitlines()) for p in data.glob("*.jsonl")}
    assert set(counts) == set(coldstart.MIX_AUTO) and all(counts.values()) and counts["auto_think"] >= 12  # and others of their kinds
    score = json.loads((tmp_path / "toy/coldstart/score.json").read_text())
    assert set(score) == set(MODES) and {"tokens", "obeyed", "format", "repetitive", "calls"} <= set(score["think"]["all"])
    said = subprocess.run([sys.executable, "evaluate.py", "--board", tmp_path / "toy"], cwd=ROOT, capture_output=True, text=True).stdout
    assert "coldstart auto_think" in said and "sft plain" in said and (tmp_path / "toy/scoreboard.md").read_text() == said


def test_the_filter_drops_what_is_easy(tmp_path, world, start, processor, monkeypatch):
    lines = sft.read_pool(world / "train" / "questions.jsonl")[:6]
    source = world / "train" / "few.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    right = lambda line, n: [("x", 1.0, 1.0, n, True)] * 2
    told = [right(lines[0], 1), right(lines[1], 10_000), [("x", 0, 0.0, 1, True), ("x", 1, 1.0, 1, True)], None, right(lines[4], 1), right(lines[5], 1)]
    monkeypatch.setattr(sft, "attempts", lambda *a: told)

    class Run:
        main = True
        say = staticmethod(print)
        attempt = staticmethod(lambda what, work: work())
    assert sft.keep_hard(Run, start, processor, source, tmp_path / "kept.jsonl", {"asked": 9, "samples": 2}, 0) == 2
    kept = [json.loads(line)["meta"] for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert kept == [lines[1]["meta"], lines[2]["meta"]]  # right but too long, and not always right
    source.unlink()


def test_a_pool_line_without_a_truth_is_named(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"messages": [{"role": "user", "content": "q"}]}\n')
    with pytest.raises(SystemExit, match="q.jsonl:1"):
        sft.read_pool(tmp_path / "q.jsonl")
