"""The answers of a run's phases beside one another, with what was asked: cards for its page.

    count, html = gallery_of({"grpo": {"think": {"heldout/vqa.jsonl:12": row, ..}}})

A row is a line of predictions.jsonl, see evaluate.py. Pictures and clips are read again from the
data file that it names. All words go through html.escape.
"""

import base64
import io
import re
from collections import defaultdict
from html import escape
from itertools import zip_longest
from pathlib import Path

from PIL import Image

from common.clips import Clip
from common.conversation import media_items, text_of
from common.forms import to_ours
from common.jsonl import File
from common.media import MediaError
from common.pictures import load_picture

SIDE = 160  # pixels of a picture in the gallery, at most
FRAMES = 8  # of a clip
PER_TASK = 3  # questions of a task in the gallery
GALLERY = 2_300_000  # characters, so that the page stays below 3 MB
LONGEST = 1600  # characters of an answer
TAGS = {
    "analysis": "analysis", "think": "thinking", "tool_call": "call", "code": "call",
    "sandbox_output": "shows", "answer": "answer",
}
TAG = re.compile(rf"(</?(?:{'|'.join(TAGS)})>)")


def missing(words):
    return f'<p class="note missing">{escape(words)}</p>'


def gallery_of(answers: dict) -> tuple[int, str]:
    """{phase: {mode: {where: row}}} -> (number of questions, their cards below the filters)."""
    chosen = chosen_questions(answers)
    if not chosen:
        return 0, missing("no phase has kept answers yet: predictions.jsonl comes with its score")
    records = records_at([where for where, _ in chosen])
    cards, size = [], 0
    for where, rows in chosen:
        card = card_of(where, rows, *records.get(where, (None, None)))
        size += len(card)
        if size > GALLERY and cards:
            break
        cards.append(card)
    shown = [row for _, rows in chosen[: len(cards)] for row in rows]
    phases = [phase for phase in answers if answers[phase]]  # in their order
    modes = list(dict.fromkeys(row["mode"] for _, row in shown))
    tasks = sorted({row["task"] for _, row in shown})
    filters = "".join([
        choice("task", tasks), choice("phase", phases, phases[-1]), choice("mode", modes),
        choice("verdict", ["right", "wrong"]),
    ])
    told = (f"<p>{len(cards)} questions: of each task those that phases and modes answer most "
            "differently, so the share of right ones here is no measure.</p>")
    counted = '<p class=note id=count aria-live="polite"></p>'
    return len(cards), (
        f"{told}<div class=filters>{filters}</div>{counted}<div class=cards>{''.join(cards)}</div>"
    )


def chosen_questions(answers) -> list[tuple[str, list]]:
    """[(where, [(phase, row), ..]), ..]: PER_TASK of each task, one of each in turn.

    First those with as many right as wrong answers, which show what made the difference.
    """
    by_task = defaultdict(lambda: defaultdict(list))
    for phase, modes in answers.items():
        for rows in modes.values():
            for where, row in rows.items():
                by_task[row["task"]][where].append((phase, row))

    def likeness(item):
        rights = [bool(row["right"]) for _, row in item[1]]
        return -min(sum(rights), len(rights) - sum(rights))

    best = [sorted(by_task[task].items(), key=likeness)[:PER_TASK] for task in sorted(by_task)]
    turns = [sorted(filter(None, turn), key=likeness) for turn in zip_longest(*best)]
    return [item for turn in turns for item in turn]


def choice(name, values, chosen=""):
    options = "".join(
        f'<option value="{escape(v)}"{" selected" * (v == chosen)}>{escape(v)}</option>'
        for v in values
    )
    options = f'<option value="">all</option>{options}'
    return f'<label>{name} <select name="{name}">{options}</select></label>'


def card_of(where, rows, record, root) -> str:
    """A question with what it shows, its truth, and the answers to it."""
    row = rows[0][1]
    question = re.sub(r"\[(image|video)\]", "", row["question"]).strip()
    answers = "".join(answer_of(phase, row) for phase, row in rows)
    task, category = escape(row["task"]), escape(row["category"])
    return (
        f'<article class=card data-task="{task}"><h4><b>{task}</b> · {category} · '
        f'difficulty {escape(str(row.get("difficulty", 1)))} · {escape(Path(where).name)}</h4>'
        f"{media_of(row, record, root)}<div>{escape(question)}</div>"
        f"<div class=truth>Truth: <b>{escape(row['answer'])}</b></div>{answers}</article>"
    )


def answer_of(phase, row) -> str:
    verdict = "right" if row["right"] else "wrong"
    said = parts_of(row["output"], row.get("shown") or [])
    if row.get("failure"):
        said = missing(row["failure"])
    return (
        f'<div class="reply{" ok" * bool(row["right"])}" data-phase="{escape(phase)}" '
        f'data-mode="{escape(row["mode"])}" data-verdict="{verdict}"><header>{escape(phase)} · '
        f'{escape(row["mode"])} · <span class=verdict>{verdict}</span></header>{said}</div>'
    )


def parts_of(output: str, shown: list[list[str]]) -> str:
    """A response as its parts, each named; shown: the pictures of each tool output."""
    if len(output) > LONGEST:
        cut = len(output) - LONGEST
        output = f"{output[:LONGEST // 2]}\n[{cut} characters left out]\n{output[-LONGEST // 2:]}"
    waiting = list(shown) if output.count("<sandbox_output>") == len(shown) else []
    html, stack = "", []
    for piece in TAG.split(output):
        name = piece.strip("</>")
        if not TAG.fullmatch(piece):
            kind = TAGS[stack[-1]] if stack else ""
            images = waiting.pop(0) if kind == "shows" and waiting else []
            words = piece.replace("[image]", "", len(images)).strip()
            if words or images:
                pictures = "".join(map(image, images))
                html += f'<div class="part {kind}" data-is="{kind}">{escape(words)}{pictures}</div>'
        elif piece.startswith("</"):
            while name in stack and stack.pop() != name:
                pass
        else:
            stack.append(name)
    if shown and output.count("<sandbox_output>") != len(shown):
        rest = "".join(image(url) for images in shown for url in images)
        html += f'<div class="part shows" data-is="tools showed">{rest}</div>'
    return html or '<div class=part data-is="nothing was said"></div>'


def image(url: str) -> str:
    return f'<img src="{escape(url)}" alt="" loading=lazy>' if url.startswith("data:image/") else ""


def media_of(row: dict, record: dict | None, root: Path | None) -> str:
    """What the question shows, as its data file has it now; a line where that is no more."""
    if "[image]" not in row["question"] and "[video]" not in row["question"]:
        return ""
    if record is None or text_of(record["messages"][-2]) != row["question"]:
        return missing("not shown: the data file is gone, or another one by now")
    figures = []
    try:
        for number, (item, kind) in enumerate(media_items(record), 1):
            picture = animation(item, root) if kind == "video" else thumbnail(
                load_picture(item["image"], root)
            )
            caption = f"<figcaption>{kind} {number}</figcaption>"
            figures.append(f"<figure>{image(picture)}{caption}</figure>")
    except (MediaError, OSError, ValueError) as e:
        return missing(f"not shown: {e}")
    return f"<div class=media>{''.join(figures)}</div>"


def records_at(places: list[str]) -> dict:
    """{where: (record, root of its media)} of those places whose files can be read."""
    by_file = defaultdict(set)
    for where in places:
        by_file[Path(re.sub(r":( (record|sample) )?\d+$", "", where))].add(where)
    found = {}
    for path, wanted in by_file.items():
        try:
            file = File(path)
            for (_, _, number), read in file.records():
                where = file.place(number)
                if where in wanted:
                    found[where] = to_ours(read()), path.resolve().parent
        except (OSError, ValueError):
            continue
    return found


def thumbnail(picture: Image.Image) -> str:
    """A picture, at most SIDE wide and high, as a data URL."""
    return data_url([picture])


def animation(item: dict, root: Path) -> str:
    """A clip, or a list of frames, as a small animation that lasts as long."""
    if isinstance(item["video"], list):
        return data_url([load_picture(frame, root) for frame in item["video"][:FRAMES]], 500)
    with Clip(item["video"], root) as clip:
        times = [clip.duration * (i + 0.5) / FRAMES for i in range(FRAMES)]
        frames = [Image.fromarray(frame) for frame in clip.frames(times)]
        return data_url(frames, max(40, int(1000 * clip.duration / FRAMES)))


def data_url(frames, milliseconds=0):
    small = []
    for frame in frames:
        frame = frame.convert("RGB")
        frame.thumbnail((SIDE, SIDE))
        small.append(frame)
    file = io.BytesIO()
    how = {"save_all": True, "append_images": small[1:], "duration": milliseconds, "loop": 0}
    small[0].save(file, "WEBP", quality=80, **(how if len(small) > 1 else {}))
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
