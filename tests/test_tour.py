"""tools/tour.py: its steps in order, plain when piped, one clear line where nothing is there."""

import re
import shutil

import numpy as np
import pytest
from conftest import write_toy_model
from PIL import Image

from common.questions import read_or_exit
from data import PATCH
from tools import tour
from toyworld.world import draw_unit

KINDS = {"vqa.colour": "vqa", "motion": "video", "reasoning": "reasoning", "detail": "detail"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A few held-out questions, and two phases with fresh weights."""
    folder = tmp_path_factory.mktemp("tour")
    for media in ("pictures", "clips"):
        (folder / "data" / "heldout" / media).mkdir(parents=True)
    for kind, name in KINDS.items():
        unit = draw_unit(folder / "data", "heldout", kind, 0, 0, (84, 126))
        lines = [line for file, line in unit.lines if file == name]
        (folder / "data" / "heldout" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    for phase in ("pretrain", "coldstart"):
        write_toy_model(folder / "run" / phase / "model")
    return folder


def show(world, capsys, *flags) -> str:
    tour.main(["--run", str(world / "run"), "--data", str(world / "data"), *flags])
    return capsys.readouterr().out


def test_steps_phases_and_modes_in_order_and_plain_when_piped(world, capsys, monkeypatch):
    monkeypatch.setattr(tour, "max_answer", lambda cfg: 6)
    said = show(world, capsys)
    assert "\x1b" not in said and "Enter" not in said
    assert re.findall(r"(?m)^\d\.", said) == ["1.", "2.", "3.", "4.", "5."]
    assert re.findall(r"(?m)^(untrained|pretrain|sft|coldstart):", said) == [
        "untrained", "pretrain", "coldstart",
    ]
    modes = re.findall(r"(?m)^/(\w+)", said)
    assert modes == ["think", "think", "no_think", "auto_think", "agentic_think"]
    assert len(re.findall(r"(?m)^(right|wrong)", said)) == 3 + len(modes)
    [question] = read_or_exit(world / "data" / "heldout" / "detail.jsonl")
    assert f"Truth:    {question.meta['answer']}\n" in said


def test_before_the_cold_start_questions_are_bare(world, capsys, monkeypatch):
    monkeypatch.setattr(tour, "max_answer", lambda cfg: 6)
    monkeypatch.setattr(tour, "PHASES", {"pretrain": tour.PHASES["pretrain"]})
    said = show(world, capsys)
    assert set(re.findall(r"(?m)^/(\w+)", said)) == {"plain"}
    assert "the cold start, whose model is not there yet" in " ".join(said.split())


def test_what_is_seen_is_what_enters_the_model(world):
    models = tour.trained(world / "run")
    processor = models["pretrain"][1]
    [question] = read_or_exit(world / "data" / "heldout" / "video.jsonl", 1)[:1]
    frames, tokens = tour.seen(processor, question)
    conversation = {"messages": question.record["messages"][:-1]}
    sample = processor(conversation, question.root, generate=True)
    assert tokens == int((sample["tokens"] == processor.pads["video"]).sum())
    first = np.asarray(frames[0])[:PATCH, :PATCH]  # (y, x, channel)
    patch = sample["patches"][0].numpy().reshape(3, PATCH, PATCH).transpose(1, 2, 0)
    assert (first == patch).all() and len(frames) == int(sample["grids"][0, 0])


def test_colours_are_half_blocks_of_two_pixels(capsys):
    screen = tour.Screen()
    screen.colours, screen.all_colours = True, True
    picture = Image.fromarray(np.array([[[255, 0, 0]], [[0, 0, 255]]], np.uint8))
    screen.draw(picture)
    assert capsys.readouterr().out == "\x1b[38;2;255;0;0;48;2;0;0;255m▀\x1b[0m\n"
    screen.all_colours = False
    screen.draw(picture)
    assert capsys.readouterr().out == "\x1b[38;5;196;48;5;21m▀\x1b[0m\n"


def test_without_colours_what_differs_from_the_ground_is_dense(capsys):
    pixels = np.full((4, 3, 3), 200, np.uint8)
    pixels[:2, 1] = 20
    screen = tour.Screen()
    screen.colours = False
    screen.draw(Image.fromarray(pixels))
    assert capsys.readouterr().out == " @\n\n"


def test_control_characters_of_a_model_do_not_reach_the_terminal(capsys):
    screen = tour.Screen()
    screen.say("a\x1b[2Jb")
    assert capsys.readouterr().out == "a\\x1b[2Jb\n"


def test_enter_goes_on_and_an_end_of_input_ends(monkeypatch, capsys):
    screen = tour.Screen()
    screen.typed = True
    monkeypatch.setattr("builtins.input", lambda prompt: "")
    screen.step("next")
    assert "next" in capsys.readouterr().out

    def ended(prompt):
        raise EOFError

    monkeypatch.setattr("builtins.input", ended)
    with pytest.raises(SystemExit):
        screen.step("never")
    assert "never" not in capsys.readouterr().out


def test_what_is_missing_is_said_in_one_line(world, tmp_path):
    with pytest.raises(SystemExit, match=r"none: no model of pretrain, .*`make toy` trains them"):
        tour.main(["--run", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="nowhere/heldout: no such folder"):
        tour.main(["--run", str(world / "run"), "--data", str(tmp_path / "nowhere")])
    (tmp_path / "heldout").mkdir()
    with pytest.raises(SystemExit, match=r"no vqa\.jsonl|no \.jsonl file|no .*jsonl"):
        tour.main(["--run", str(world / "run"), "--data", str(tmp_path)])


def test_a_picture_that_is_gone_is_said_in_one_line(world, tmp_path):
    shutil.copytree(world / "data", tmp_path / "data")
    for path in (tmp_path / "data" / "heldout" / "pictures").iterdir():
        path.unlink()
    with pytest.raises(SystemExit, match=r"heldout: pictures/.*: missing .*toyworld"):
        tour.main(["--run", str(world / "run"), "--data", str(tmp_path / "data")])
