"""docs/walkthrough.md and its drawings are what tools/walkthrough prints today."""

import re

import pytest

from model import PRESETS
from tools.walkthrough.__main__ import PAGE, walk
from tools.walkthrough.page import Walk, statement

NUMBER = re.compile(r"-?\d+\.\d+")
AGAIN = "python -m tools.walkthrough --write makes it anew"


@pytest.fixture(scope="module")
def printed():
    return walk()


def compare(committed: str, new: str):
    """Equal words and whole numbers; others to 3 % or 0.03, as machines round differently."""
    assert NUMBER.sub("#", committed).split() == NUMBER.sub("#", new).split(), AGAIN
    numbers = [[float(x) for x in NUMBER.findall(text)] for text in (committed, new)]
    assert numbers[1] == pytest.approx(numbers[0], rel=0.03, abs=0.03), AGAIN


def test_the_page_is_what_the_program_prints(printed):
    compare(PAGE.read_text("utf-8"), printed[0])


def test_the_drawings_are_what_the_program_draws(printed):
    folder = PAGE.with_suffix("")
    assert {path.name for path in folder.iterdir()} == set(printed[1])
    for name, drawing in printed[1].items():
        # Decoders may differ by a shade: pictures are compared by their places alone.
        both = [re.sub("base64,[^\"]*", "", text) for text in (
            (folder / name).read_text("utf-8"), drawing
        )]
        compare(*both)


def test_what_the_page_points_to_is_there():
    page = PAGE.read_text("utf-8")
    links = re.findall(r"\]\(([^)]*)\)", page)
    assert len(links) > 30
    for link in links:
        assert (PAGE.parent / link).exists(), link


def test_a_line_that_is_gone_ends_the_program(tmp_path):
    walk = Walk(tmp_path)
    walk.quote(statement, "for end in", "return lines")
    assert "`statement`" in walk.parts[-1]
    assert walk.parts[-1].endswith("        return lines[:end]\n```")
    with pytest.raises(ValueError, match=r"page\.py, statement: no line begins 'nothing'"):
        walk.quote(statement, "nothing")


def test_the_page_is_about_the_toy():
    cfg = PRESETS["toy"]
    page = PAGE.read_text("utf-8")
    assert f"{cfg.vocab_size} logits" in page
    assert f"becomes {cfg.vision.hidden_size} numbers" in " ".join(page.split())
