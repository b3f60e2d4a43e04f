"""common/survey.py and python data.py --check: what a folder holds, and what would be dropped."""

import json
import subprocess
import sys

import av
import numpy as np
import pytest
from PIL import Image

from common.conversation import conversations_of
from common.survey import survey
from conftest import ROOT


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def shown(name, kind="image", answer="red", **more):
    content = [{"type": kind, kind: name}, {"type": "text", "text": "What colour?"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **more}


META = {"answer": "red", "verifier": "exact"}


@pytest.fixture
def folder(tmp_path):
    """Thirty good lines of captions; questions, one held out."""
    train = tmp_path / "train"
    write(train / "caption.jsonl", [shown("a.png") for _ in range(30)])
    write(train / "questions.jsonl", [shown("b.png", meta=META)])
    Image.new("RGB", (60, 60)).save(train / "a.png")
    Image.new("RGB", (90, 60)).save(train / "b.png")
    write(tmp_path / "heldout" / "colour.jsonl", [shown("a.png", meta=META)])
    Image.new("RGB", (60, 60)).save(tmp_path / "heldout" / "a.png")
    return tmp_path


def rows(said):
    """The table's numbers by file: {name: [lines, forms, pictures, ..]}."""
    table = said.split("\n\n")[0].splitlines()[1:]
    cells = [[cell.strip() for cell in row.split("  ") if cell.strip()] for row in table]
    return {row[0]: row[1:] for row in cells}


def test_a_good_folder_is_counted(folder, processor, capsys):
    assert survey(folder, processor, 4096)
    said = capsys.readouterr().out
    one = len(processor(shown("a.png"), folder / "train")["tokens"])
    wide = len(processor(shown("b.png"), folder / "train")["tokens"])
    assert wide != one
    assert rows(said) == {
        "train/caption.jsonl": ["30", "30 ours", "1", "0", f"{30 * one:,}", f"{one}", "0"],
        "train/questions.jsonl": ["1", "1 ours", "1", "0", f"{wide}", f"{wide}", "0"],
        "heldout/colour.jsonl": ["1", "1 ours", "1", "0", f"{one}", f"{one}", "0"],
    }
    assert "dropped" not in said.split("\n", 1)[1]


def test_forms_clips_and_pairs_are_counted(folder, processor, capsys):
    flat = folder / "flat"  # files that stand in the folder itself
    flat.mkdir()
    with av.open(str(flat / "c.mp4"), "w") as file:
        stream = file.add_stream("mpeg4", rate=10, width=64, height=48, pix_fmt="yuv420p")
        for k in range(20):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 10 * k, np.uint8), "rgb24")
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    swift = {"query": "<video>?", "response": "red", "videos": ["c.mp4"]}
    pair = {"prompt": "Which?", "chosen": "red", "rejected": "blue or green"}
    write(flat / "mixed.jsonl", [swift, swift, pair])
    assert survey(flat, processor, 4096)
    ((lines, forms, pictures, clips, tokens, longest, dropped),) = rows(
        capsys.readouterr().out
    ).values()
    assert (lines, pictures, clips, dropped) == ("3", "0", "1", "0")
    assert forms == "2 videos + query + response, 1 prompt + chosen + rejected"
    asked = {"messages": [{"role": "user", "content": "Which?"}], **pair}
    both = sum(len(processor(c)["tokens"]) for c in conversations_of(asked))
    clip = len(processor(shown("c.mp4", "video"), flat)["tokens"])
    clip -= len(processor.tokenizer.encode("What colour?")) - len(processor.tokenizer.encode("?"))
    assert int(tokens) == 2 * clip + both and int(longest) == max(clip, both)


def test_what_would_be_dropped_is_listed_by_reason(folder, processor, capsys):
    bad = [
        shown("none1.png"), shown("none2.png"), shown("a.png", tools=["f"]),
        shown("a.png", answer="red " * 2000), shown("none1.png"), shown("none3.png"),
    ]
    bad[2]["messages"][0]["content"] += [{"type": "text", "text": "x"}]
    write(folder / "train" / "caption.jsonl", [shown("a.png")] * 200 + bad)
    assert survey(folder, processor, 1000)
    said = capsys.readouterr().out
    caption = folder / "train" / "caption.jsonl"
    assert rows(said)["train/caption.jsonl"][2] == "1 (3 unreadable)"
    assert rows(said)["train/caption.jsonl"][-1] == "6"
    assert f"{caption}: 6 of 206 lines would be dropped" in said
    problems = said.split("would be dropped")[1].splitlines()
    assert "  4 x missing" in problems and "  1 x too_long" in problems
    assert [f"{n}: none{k}" in said for n, k in ((201, 1), (202, 2), (205, 1), (206, 3))] == [
        True, True, True, False,
    ]
    assert f'    {caption}:203: top level: "tools" would change' in said


@pytest.mark.parametrize("name, records, why", [
    ("train/caption", [shown("a.png")] * 5 + [shown("n.png")] * 6, "6 of 11 lines would be"),
    ("train/caption", [shown("a.png")] * 9 + [{"n": 1}], "1 of 10 lines would be dropped"),
    ("train/questions", [shown("b.png", meta=META)] * 50 + [shown("b.png")], "every line must"),
    ("heldout/colour", [shown("a.png")], "no line of it can be used"),
    ("train/new", [], "no line of it can be used"),
])
def test_a_file_that_cannot_be_used_is_said(folder, processor, capsys, name, records, why):
    write(folder / f"{name}.jsonl", records)
    assert not survey(folder, processor, 4096)
    assert f"{folder / name}.jsonl cannot be used: {why}" in capsys.readouterr().out


def test_a_file_that_cannot_be_read_is_one_row(folder, processor, capsys):
    path = folder / "train" / "caption.jsonl"
    path.write_bytes("[]".encode("utf-16"))
    assert not survey(folder, processor, 4096)
    said = capsys.readouterr().out
    assert rows(said)["train/caption.jsonl"] == ["0", "none", "0", "0", "0", "0", "0"]
    assert f"{path} cannot be used: {path}:1: UTF-16" in said


def run(*flags):
    command = [sys.executable, str(ROOT / "data.py"), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_the_command(folder):
    well = run("--check", folder)
    assert well.returncode == 0 and "train/caption.jsonl" in well.stdout and not well.stderr
    large = run("--check", folder, "--size", "8b")  # Qwen's vocabulary, as pretrain.py takes it
    assert large.returncode == 0 and "train/caption.jsonl" in large.stdout and not large.stderr
    write(folder / "heldout" / "colour.jsonl", [shown("a.png")])
    ill = run("--check", folder, "--size", "tiny")
    assert ill.returncode == 1 and 'meta with "answer"' in ill.stdout and not ill.stderr
    (folder / "train" / "caption.arrow").write_bytes(b"ARROW1")
    for flags, why in (
        (["--check", folder], "caption.arrow: not read"),
        (["--check", folder / "none"], "none: no such folder"),
        (["--check", folder / "train" / "a.png"], "a.png: no such folder"),
        (["--check", folder, "--init", folder], str(folder)),
    ):
        refused = run(*flags)
        assert refused.returncode == 1 and why in refused.stderr and not refused.stdout
        assert refused.stderr.count("\n") == 1
