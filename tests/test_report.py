"""The page of a run: what it says of answers, intervals and curves, and what it never lets in."""

import base64
import io
import json
import math
import re
import xml.etree.ElementTree as ET
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

import evaluate as E
from common import gallery, plots, report
from common.jsonl import write_lines
from common.questions import Question
from common.report import PHASES, write_report
from common.run import arguments, start

EVIL = '</article><script>alert(1)</script>"><img src=x onerror=alert(2)> {scores} &amp;'


def record(root, number, answer="red", task="colour", category="look"):
    picture = {"type": "image", "image": f"{number}.png"}
    content = [picture, {"type": "text", "text": "What colour?"}]
    return {
        "messages": [
            {"role": "user", "content": content}, {"role": "assistant", "content": answer},
        ],
        "meta": {"task": task, "category": category, "answer": answer, "verifier": "text"},
    }


@pytest.fixture
def world(tmp_path):
    """Eight questions about red pictures, the last four of another category."""
    root = tmp_path / "heldout"
    root.mkdir()
    records = []
    for i in range(8):
        Image.new("RGB", (40, 30), "red").save(root / f"{i}.png")
        records.append(record(root, i, category="look" if i < 4 else "stare"))
    write_lines(root / "vqa.jsonl", records)
    return root


def answers_of(world, rights, mode="plain", output="red", thought=False, **more):
    """E.Answer of each question of the world, right where rights says so."""
    lines = (world / "vqa.jsonl").read_text().splitlines()
    answers = []
    for i, (line, right) in enumerate(zip(lines, rights, strict=True)):
        question = Question(json.loads(line), world, f"{world / 'vqa.jsonl'}:{i + 1}")
        numbers = {
            "accuracy": float(right), "blind": None, "chance": 0.25, "iou": None, "cer": None,
            "tokens": 3, "thought": thought, "obeyed": True, "format": False, "repetitive": False,
            "calls": 0, "failed_calls": 0,
        }
        example = {
            "task": question.task, "question": "[image]What colour?", "output": output,
            "answer": question.meta["answer"], "right": bool(right), "where": question.where,
            "category": question.category, "difficulty": 1, "mode": mode, "shown": [], **more,
        }
        answers.append(E.Answer(question, numbers, example))
    return answers


def lay(folder, phase, **answers):
    """Writes a phase's score and predictions, as score_phase and Run.score do."""
    (folder / phase).mkdir(parents=True, exist_ok=True)
    results = {mode: E.result_of(found, mode) for mode, found in answers.items()}
    rows = [row for result in results.values() for row in result.pop("predictions")]
    write_lines(folder / phase / "predictions.jsonl", rows)
    (folder / phase / "score.json").write_text(json.dumps(results))
    return results


class Page(HTMLParser):
    """Every element with its attributes, and the text of the page outside of style and script."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.text, self.skip = [], "", False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.skip = tag in ("style", "script")

    def handle_endtag(self, tag):
        self.skip = False

    def handle_data(self, data):
        self.text += "" if self.skip else data

    def all(self, tag, kind=""):
        return [
            attrs for name, attrs in self.elements
            if name == tag and (not kind or kind in attrs.get("class", "").split())
        ]


def page_of(folder):
    write_report(folder)
    return Page((folder / "report.html").read_text(encoding="utf-8"))


# -- answers


def test_right_is_right_and_wrong_is_wrong(world, tmp_path):
    rights = [True, False, True, True, False, False, False, True]
    lay(tmp_path / "run", "sft", plain=answers_of(world, rights))
    page = page_of(tmp_path / "run")
    replies = page.all("div", "reply")
    assert len(replies) == gallery.PER_TASK == 3
    html = (tmp_path / "run" / "report.html").read_text()
    for card in html.split("<article")[1:]:
        number = int(re.search(r"vqa\.jsonl:(\d+)", card)[1])
        verdict = "right" if rights[number - 1] else "wrong"
        assert f'data-verdict="{verdict}"' in card and f"<span class=verdict>{verdict}<" in card
        assert ('class="reply ok"' in card) == rights[number - 1]
        assert "Truth: <b>red</b>" in card


def test_questions_that_are_answered_differently_come_first(world, tmp_path):
    first = [True, True, True, True, True, False, True, True]
    second = [True, True, False, True, True, False, True, False]
    lay(tmp_path, "sft", plain=answers_of(world, first))
    lay(tmp_path, "mpo", plain=answers_of(world, second))
    page_of(tmp_path)
    html = (tmp_path / "report.html").read_text()
    numbers = [int(n) for n in re.findall(r"<h4>.*?vqa\.jsonl:(\d+)</h4>", html)]
    assert numbers == [3, 8, 1]
    options = re.findall(r'<option value="(\w+)"( selected)?>', html)
    assert ("mpo", " selected") in options and ("sft", "") in options
    assert {name for name, _ in options} == {"colour", "sft", "mpo", "plain", "right", "wrong"}


def test_what_a_model_says_is_text(world, tmp_path):
    """In every place that a model, a data file or a name can reach."""
    evil = answers_of(world, [False] * 8, "auto_think", EVIL, shown=[["javascript:alert(3)", EVIL]])
    for answer in evil:
        answer.example |= {"question": EVIL, "answer": EVIL, "task": EVIL, "where": f"x{EVIL}:1"}
        answer.question.meta |= {"task": EVIL, "category": EVIL, "difficulty": EVIL}
    folder = tmp_path / EVIL.replace("/", "_")
    lay(folder, "grpo", auto_think=evil)
    log(folder, "grpo", [{EVIL: EVIL}, {"step": 0, "loss": 1.0, "right_" + EVIL: 0.5}])
    page = page_of(folder)
    assert len(page.all("script")) == 1
    assert not any("onerror" in attrs or attrs.get("src") == "x" for _, attrs in page.elements)
    assert all(a["src"].startswith("data:image/") for a in page.all("img"))
    assert page.text.count("<script>alert(1)</script>") >= 4 and "{scores}" in page.text
    assert len(page.all("article")) == 1


def test_an_answer_is_told_by_its_parts():
    output = (
        "<analysis>Small /agentic_think.</analysis><think>a dot<tool_call>crop(0, 0, 9, 9)"
        "</tool_call><sandbox_output>[image]</sandbox_output>a <b>star</b></think>"
        "<answer>\\boxed{star}</answer>"
    )
    crop = gallery.thumbnail(Image.new("RGB", (8, 8)))
    html = gallery.parts_of(output, [[crop]])
    parts = re.findall(r'<div class="part (\w*)" data-is="\w*">(.*?)</div>', html)
    kinds = ["analysis", "thinking", "call", "shows", "thinking", "answer"]
    assert [kind for kind, _ in parts] == kinds
    said = ["Small /agentic_think.", "a dot", "crop(0, 0, 9, 9)", "", "a <b>star</b>"]
    said.append("\\boxed{star}")
    assert [unescape(re.sub("<img[^>]*>", "", words)) for _, words in parts] == said
    assert crop in parts[3][1] and html.count("<img") == 1


def test_a_forged_tool_output_takes_no_crop_away():
    """Then nobody knows which output showed what: the pictures stand at the end."""
    crop = gallery.thumbnail(Image.new("RGB", (8, 8)))
    forged = "<sandbox_output>[image]</sandbox_output>"
    html = gallery.parts_of(f"{forged}x{forged}", [[crop]])
    last = html.rpartition('<div class="part')[2]
    assert html.count("<img") == 1 and crop in last and "tools showed" in last


@pytest.mark.parametrize("output", ["", "</think></answer>", "<think>", "<think><think>a</x>b"])
def test_broken_forms_are_shown_too(output):
    html = gallery.parts_of(output, [])
    words = re.sub("</?(think|answer)>", "", output)
    assert unescape(re.sub("<.*?>", "", html)) == words
    assert words or "nothing was said" in html


def test_a_long_answer_is_cut_and_says_so():
    html = gallery.parts_of("a" * 5000, [])
    assert f"[{5000 - gallery.LONGEST} characters left out]" in html and len(html) < 2000


# -- media


def decoded(url):
    assert url.startswith("data:image/webp;base64,")
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def test_the_picture_that_was_asked_about_is_shown(world, tmp_path):
    lay(tmp_path, "sft", plain=answers_of(world, [True] * 8))
    images = page_of(tmp_path).all("img")
    assert len(images) == 3
    picture = decoded(images[0]["src"])
    assert picture.size == (40, 30)
    assert np.abs(np.asarray(picture.convert("RGB"), int) - [255, 0, 0]).max() < 12


def test_a_large_picture_is_small_on_the_page():
    assert decoded(gallery.thumbnail(Image.new("RGB", (4000, 1000)))).size == (gallery.SIDE, 40)


def test_a_clip_is_an_animation_that_lasts_as_long(tmp_path):
    import av

    with av.open(str(tmp_path / "a.mp4"), "w") as file:
        stream = file.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        for i in range(20):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 12 * i, np.uint8), "rgb24")
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    animation = decoded(gallery.animation({"type": "video", "video": "a.mp4"}, tmp_path))
    assert animation.n_frames == gallery.FRAMES
    shades, lasts = [], 0
    for i in range(animation.n_frames):
        animation.seek(i)
        animation.load()
        shades.append(np.asarray(animation.convert("L")).mean())
        lasts += animation.info["duration"]
    assert shades == sorted(shades) and shades[0] < 40 < 190 < shades[-1]
    assert lasts == pytest.approx(2000, abs=gallery.FRAMES)


def test_frames_that_are_files_become_an_animation_too(world):
    item = {"type": "video", "video": ["0.png", "1.png"]}
    Image.new("RGB", (40, 30), "blue").save(world / "1.png")
    assert decoded(gallery.animation(item, world)).n_frames == 2


@pytest.mark.parametrize("harm", ["gone", "edited", "no picture"])
def test_media_that_are_no_more_are_missed_aloud(world, tmp_path, harm):
    lay(tmp_path / "run", "sft", plain=answers_of(world, [True] * 8))
    if harm == "gone":
        (world / "vqa.jsonl").unlink()
    elif harm == "edited":
        other = record(world, 0)
        other["messages"][0]["content"][1]["text"] = "Another question?"
        write_lines(world / "vqa.jsonl", [other] * 8)
    else:
        for path in world.glob("*.png"):
            path.write_text("none")
    page = page_of(tmp_path / "run")
    assert not page.all("img") and page.text.count("not shown: ") == 3


def test_the_page_stays_small(world, tmp_path, monkeypatch):
    """However many and large the answers are."""
    monkeypatch.setattr(gallery, "PER_TASK", 8)
    noise = np.random.default_rng(0).integers(0, 255, (400, 400, 3), np.uint8)
    for i in range(8):
        Image.fromarray(noise).save(world / f"{i}.png")
    for phase in ("sft", "mpo"):
        lay(tmp_path / "run", phase, plain=answers_of(world, [True] * 8, output="<" * 9000))
    monkeypatch.setattr(gallery, "GALLERY", 60_000)
    page = page_of(tmp_path / "run")
    cards = len(page.all("article"))
    assert 1 <= cards < 8 and f"{cards} questions: of each task" in page.text
    assert (tmp_path / "run" / "report.html").stat().st_size < 60_000 + 60_000


# -- numbers


def test_intervals_are_those_of_the_board(world, tmp_path):
    rights = [True, False, True, True, False, False, False, True]
    results = lay(tmp_path, "sft", plain=answers_of(world, rights))
    text = re.sub(r"\s+", " ", page_of(tmp_path).text)
    for name, result in results["plain"]["categories"].items():
        board = E.task_line(name, result)[3]
        assert re.fullmatch(r"\d+\.\d ± \d+\.\d", board) and board in text
    assert f"{100 * results['plain']['mixed']:.1f} ±" in text
    low, high = E.wilson(3, 4)
    low2, high2 = E.wilson(1, 4)
    mean, half = report.mixed(results["plain"])
    assert mean == pytest.approx(50)
    assert half == pytest.approx(50 * math.hypot(high - low, high2 - low2) / 2)


def test_categories_apart_are_in_no_mean(world, tmp_path):
    found = answers_of(world, [True] * 4 + [False] * 4)
    for answer in found[4:]:
        answer.question.meta["category"] = "discover"
    results = lay(tmp_path, "grpo", think=found)
    assert report.mixed(results["think"])[0] == 100
    assert "chance 25.0" in page_of(tmp_path).text


@pytest.mark.parametrize("before", [True, False])
def test_where_all_categories_are_apart_there_is_no_mean(world, tmp_path, before):
    """None, as in score.json; and a page all the same, with no 0.0 that nobody scored."""
    if before:
        lay(tmp_path, "sft", plain=answers_of(world, [True] * 6 + [False] * 2))
    found = answers_of(world, [True] * 4 + [False] * 4)
    for answer in found:
        answer.question.meta["category"] = "discover"
    results = lay(tmp_path, "grpo", think=found)
    assert results["think"]["mixed"] is None and report.mixed(results["think"]) is None
    text = page_of(tmp_path).text
    assert "0.0 ± 0.0" not in text and "chance 25.0" in text
    assert ("mean of categories: 75.0 % (sft, plain) to 75.0 % (sft, plain)" in text) == before
    assert ("mean of categories" in text) == before


def test_a_change_counts_the_answers_that_differ(world, tmp_path):
    first = [True, False, False, False, True, True, False, False]
    second = [True, True, True, False, True, True, False, False]
    lay(tmp_path, "sft", plain=answers_of(world, first))
    lay(tmp_path, "mpo", plain=answers_of(world, second))
    found = report.read_run(tmp_path)
    old, mean, by_category = report.changes(found, "mpo", "plain")
    assert old == "sft plain" and by_category.keys() == {"look", "stare"}
    # Agresti and Min: half an answer is added to each cell of right and wrong, before and after
    n, better, worse = 6, 2.5, 0.5
    half = 196 * math.sqrt(better + worse - (better - worse) ** 2 / n) / n
    assert by_category["look"] == pytest.approx((50, half))
    assert by_category["stare"] == pytest.approx((0, 196 * math.sqrt(1) / n))
    whole = math.hypot(half, by_category["stare"][1]) / 2
    assert mean == pytest.approx((25, whole))

    (tmp_path / "mpo" / "predictions.jsonl").unlink()  # of what is not kept the shares must do
    found = report.read_run(tmp_path)
    low, high = E.wilson(1, 4)
    low2, high2 = E.wilson(3, 4)
    half = 50 * math.hypot(high - low, high2 - low2)
    assert report.changes(found, "mpo", "plain")[2]["look"] == pytest.approx((50, half))
    assert "mpo has kept no answers" in page_of(tmp_path).text


def test_a_mode_is_compared_with_itself_else_with_the_plain_answer(world, tmp_path):
    plain = answers_of(world, [True] * 8)
    lay(tmp_path, "sft", plain=plain)
    lay(tmp_path, "coldstart", think=answers_of(world, [True] * 8, "think"))
    lay(tmp_path, "grpo", think=answers_of(world, [True] * 8, "think"),
        no_think=answers_of(world, [True] * 8, "no_think"))
    found = report.read_run(tmp_path)
    assert report.before(found, "sft", "plain") is None
    assert report.before(found, "coldstart", "think") == ("sft", "plain")
    assert report.before(found, "grpo", "think") == ("coldstart", "think")
    assert report.before(found, "grpo", "no_think") == ("sft", "plain")
    lines = report.by_phase(found, lambda result: (1,))
    assert lines == {"plain": [(0, 1)], "think": [(0, 1), (1, 1), (2, 1)],
                     "no_think": [(0, 1), (2, 1)]}


def test_when_auto_think_thinks(world, tmp_path):
    found = answers_of(world, [True] * 8, "auto_think")
    for i, answer in enumerate(found):
        answer.question.meta["difficulty"] = 1 + i // 4
        answer.numbers["thought"] = i in (1, 4, 5, 6)
    lay(tmp_path, "coldstart", auto_think=found, think=answers_of(world, [False] * 8, "think"))
    page_of(tmp_path)
    html = (tmp_path / "report.html").read_text()
    rows = dict(re.findall(r"<tr><td>(difficulty \d|look|stare)</td><td[^>]*>(\d+)</td>", html))
    assert rows == {"difficulty 1": "25", "difficulty 2": "75", "look": "25", "stare": "75"}


# -- curves


def log(folder, stage, records, cut=""):
    (folder / stage).mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records) + cut
    (folder / stage / "metrics.jsonl").write_text(text)


def drawings(html):
    """The inline SVGs, parsed strictly."""
    return [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, re.S)]


def test_nothing_that_is_no_number_is_drawn(tmp_path):
    steps = [{"step": i, "loss": loss, "reward": float("nan")} for i, loss in enumerate(
        [3.0, None, float("inf"), 1.0, float("nan"), 0.0, -1.0, "x", 2.0])]
    log(tmp_path, "grpo", [{"preference_accuracy_before": 0.61803}, *steps], '{"step": 9, "lo')
    page = page_of(tmp_path)
    html = (tmp_path / "report.html").read_text()
    paths = [path.get("d") for svg in drawings(html) for path in svg.iter("path")]
    assert paths and all(re.fullmatch(r"[MLHV\d. -]+", path) for path in paths)
    assert "preference accuracy before 0.618" in page.text and "reward" not in page.text.split(
        "Curves")[2].split("Gallery")[0].replace("the reward", "")


def test_a_curve_runs_from_its_first_to_its_last_value():
    svg = ET.fromstring(plots.chart("loss", {"loss": [(0, 4.0), (10, 2.0), (20, 3.0)]}))
    [curve] = [path for path in svg.iter("path") if path.get("class") == "curve"]
    points = [tuple(map(float, p.split())) for p in curve.get("d")[1:].split("L")]
    left, right = plots.LEFT, plots.WIDTH - plots.RIGHT
    top, bottom = plots.TOP, plots.HEIGHT - plots.BOTTOM
    assert points == [(left, top), ((left + right) / 2, bottom), (right, (top + bottom) / 2)]
    words = [text.text for text in svg.iter("text")]
    assert words == ["loss", "2", "4", "0", "step 20"]


def test_a_logarithmic_axis_has_equal_steps_for_equal_factors():
    svg = ET.fromstring(plots.chart("loss", {"loss": [(0, 100.0), (1, 10.0), (2, 1.0)]}, log=True))
    [curve] = [path for path in svg.iter("path") if path.get("class") == "curve"]
    ys = [float(p.split()[1]) for p in curve.get("d")[1:].split("L")]
    assert ys[1] - ys[0] == pytest.approx(ys[2] - ys[1])
    assert "loss (log)" in [text.text for text in svg.iter("text")]


def test_bars_reach_from_low_to_high():
    svg = ET.fromstring(plots.chart("c", {"think": [(0, 50, 25, 100)]}, ["SFT"], (0, 100)))
    [bar] = [p.get("d") for p in svg.iter("path") if "V" in p.get("d")]
    low, high = map(float, re.fullmatch(r"M[\d.]+ ([\d.]+)V([\d.]+)", bar).groups())
    height = plots.HEIGHT - plots.BOTTOM - plots.TOP
    assert high == plots.TOP and low == pytest.approx(plots.TOP + 0.75 * height)
    [dot] = svg.iter("circle")
    assert float(dot.get("cy")) == pytest.approx(plots.TOP + 0.5 * height)


def test_lines_of_a_chart_differ_in_colour():
    lines = {name: [(0, 1), (1, 2)] for name in ("right", "think", "no_think", "discover")}
    colours = [plots.colour_of(line, lines) for line in lines]
    assert len(set(colours)) == 4 and colours[1:3] == ["var(--think)", "var(--no_think)"]


def test_smoothing_keeps_means():
    assert report.smooth([(i, 5.0) for i in range(1000)]) == [(i, 5.0) for i in range(0, 1000, 10)]
    assert report.smooth([(0, 1.0), (1, 3.0)]) == [(0, 1.0), (1, 3.0)] and report.smooth([]) == []
    line = report.smooth([(i, float(i)) for i in range(80)])
    assert line[40] == (40, 40.0) and len(line) == 80  # of a straight line the means lie on it


def test_a_log_is_shown_by_what_it_holds(tmp_path):
    """Modes in one chart; of more kinds than a chart can hold each has its own; nothing twice."""
    kinds = {f"right_kind{i}": 0.1 for i in range(8)}
    modes = {"right_think": 0.4, "right_no_think": 0.3, "auto_chose_think": 0.2}
    numbers = {"loss": 0.0, "right": 0.5, **modes, **kinds}
    log(tmp_path, "grpo", [{"step": i, **numbers} for i in (0, 1)])
    page_of(tmp_path)
    html = (tmp_path / "report.html").read_text()
    titles = [svg.find("title").text for svg in drawings(html)]
    own = [f"right, kind: kind{i}" for i in range(8)]
    assert titles == ["grpo", "right", *own, "auto-think chooses"]
    right = drawings(html)[1]
    assert [text.text for text in right.iter("text")][-3:] == ["right", "no_think", "think"]


def test_stages_stand_in_the_order_of_training(tmp_path):
    stages = ["pretrain-text", "pretrain-0", "pretrain-2", "sft", "mpo", "coldstart-modes",
              "coldstart", "grpo", "align-1", "align-2", "own"]
    for stage in sorted(stages):
        log(tmp_path, stage, [{"step": 0, "loss": 1.0}])
    assert list(report.read_run(tmp_path).metrics) == stages


def test_rounds_of_alignment_have_curves(tmp_path):
    for i, share in enumerate([0.5, 0.1, 0.01]):
        (tmp_path / f"align-{i + 1}").mkdir()
        shares = {"repetition": share, "right": 0.4, "format": 0.9, "pairs": 3}
        (tmp_path / f"align-{i + 1}" / "round.json").write_text(json.dumps(shares, indent=1))
    assert [r["repetition"] for r in report.read_run(tmp_path).rounds] == [0.5, 0.1, 0.01]
    assert "round: repetition, %" in page_of(tmp_path).text


# -- runs that are not finished


def test_an_empty_run_says_what_is_missing(tmp_path):
    said = write_report(tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    assert said.startswith(f"{tmp_path / 'report.html'}: 0 phases, 0 questions")
    for phase in PHASES:
        assert f"{phase} has no held-out score yet" in page.text
    for words in ("no phase has a held-out score", "no phase has kept answers", "nothing to draw"):
        assert words in page.text
    assert not (tmp_path / "phases.svg").exists() and not page.all("article")


def test_a_half_finished_run(world, tmp_path):
    lay(tmp_path, "pretrain", plain=answers_of(world, [True] * 8))
    log(tmp_path, "sft", [{"step": 0, "loss": 2.0}], '{"step": 1, "l')
    (tmp_path / "sft" / "predictions.jsonl").write_text('{"mode": "plain"}\n{"mo')  # no score yet
    (tmp_path / "mpo").mkdir()
    (tmp_path / "mpo" / "score.json").write_text('{"plain": 1}')
    page = page_of(tmp_path)
    for note in ("sft has no held-out score yet", "mpo/score.json holds no score by category"):
        assert note in page.text
    assert "pretrain has no" not in page.text and len(page.all("article")) == 3


def test_the_page_needs_no_network_and_the_figure_is_a_picture(world, tmp_path):
    for phase in ("sft", "mpo"):
        lay(tmp_path, phase, plain=answers_of(world, [True] * 8))
    page = page_of(tmp_path)
    for _, attrs in page.elements:
        for name in ("src", "href"):
            assert attrs.get(name, "#").startswith(("#", "data:image/webp;base64,"))
    html = (tmp_path / "report.html").read_text()
    assert "url(" not in html and "@import" not in html and "default-src 'none'" in html
    assert "prefers-color-scheme: dark" in html and 'name="viewport"' in html
    figure = ET.parse(tmp_path / "phases.svg").getroot()
    names = [text.text for text in figure.iter("{http://www.w3.org/2000/svg}text")]
    assert {"mixed: mean of all", "look", "stare", "SFT", "MPO", "plain"} <= set(names)
    assert "prefers-color-scheme: dark" in ET.tostring(figure, "unicode")


def test_text_that_no_file_can_hold_is_escaped(world, tmp_path):
    lay(tmp_path, "sft", plain=answers_of(world, [True] * 8, output="a\ud800b"))
    page_of(tmp_path)
    assert "a\\ud800b" in (tmp_path / "report.html").read_text(encoding="utf-8")


# -- when it is written


def run_of(tmp_path, *flags):
    flags = ["--out", str(tmp_path), "--device", "cpu", *flags]
    return start(arguments("").parse_args(flags), "sft")


def test_every_phase_writes_the_page(world, tmp_path, capsys):
    run = run_of(tmp_path)
    results = {"plain": E.result_of(answers_of(world, [True] * 8), "plain")}
    results["plain"].pop("predictions")
    run.score(lambda: results)
    run.close()
    assert "100.0" in Page((tmp_path / "toy" / "report.html").read_text()).text
    assert "report.html: 1 phases" in capsys.readouterr().err


def test_a_phase_that_is_scored_already_writes_nothing(world, tmp_path):
    run = run_of(tmp_path)
    for _ in range(2):
        run.score(lambda: {"plain": 1})
        (tmp_path / "toy" / "report.html").replace(tmp_path / "page.html")
        run.score(lambda: 1 / 0)
        assert not (tmp_path / "toy" / "report.html").exists()
        (run.folder / "score.json").unlink()
    run.close()


def test_a_page_that_cannot_be_written_costs_nothing_else(tmp_path, capsys):
    (tmp_path / "toy" / "report.html").mkdir(parents=True)
    run = run_of(tmp_path)
    run.score(lambda: {"plain": 1})
    run.close()
    assert json.loads((run.folder / "score.json").read_text()) == {"plain": 1}
    assert "WARNING: no report.html" in capsys.readouterr().err


def test_the_command_writes_it_again(world, tmp_path, capsys):
    lay(tmp_path / "run", "sft", plain=answers_of(world, [True] * 8))
    E.main(["--report", str(tmp_path / "run")])
    assert "report.html: 1 phases, 3 questions" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="nowhere: no such folder"):
        E.main(["--report", str(tmp_path / "nowhere")])
