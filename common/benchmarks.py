"""The field's benchmarks: their files, prompts, measures and tables, as their own code has them.

    benchmark = BENCHMARKS[official_name("mmstar")]
    rows, dropped = read_rows(Path("MMStar.tsv"), benchmark)
    answers = read_predictions(Path("P.jsonl"), rows, dropped)     {index: what was said}
    scored = score_rows(benchmark, rows, answers)
    benchmark.table(scored)                                 names and units of the official table

A file is VLMEvalKit's TSV, a line a question, with pictures in base64. It is read as pandas reads
it, by which a missing option, a truth that is a number, or an empty answer become what official
scores are computed from. A benchmark is a line of BENCHMARKS: the columns it needs, how it asks,
what measures an answer (common/measures.py), and what table is made of the hits.
"""

import errno
import base64
import csv
import fcntl
import glob
import json
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from string import ascii_uppercase

import numpy as np
from PIL import Image

from common import measures
from common.clips import Clip
from common.conversation import media_items, text_of, with_switch
from common.jsonl import replacing
from common.measures import Scored, chinese_yes_no, parsed_list, without_thinking, yes_no
from common.media import MediaError, open_media, reading
from common.pictures import load_picture

# --------------------------------------------------------------------------------------------------
# files

# What pandas takes for a missing value, also between quotes.
MISSING = {
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN",
    "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null",
}
WHOLE = re.compile(r"\s*[+-]?[0-9]+\s*")
NUMBER = re.compile(
    r"\s*[+-]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?|inf(?:inity)?)\s*", re.IGNORECASE
)
MOST_CHARACTERS = 32767  # of a cell in the .xlsx that official code keeps predictions in
FOLDER_FPS = 3  # frames a second of a clip that is a folder of pictures
REFERENCE = 64  # an image of at most so many characters is the index of another row


@dataclass
class Row:
    """A question of a benchmark. Missing cells are not in it."""

    index: str
    where: str  # "path:12", for messages
    cells: dict  # column -> text, int, float or bool

    def text(self, column: str) -> str:
        """As official code sees it: "nan" where the cell is missing."""
        return str(self.cells.get(column, "nan"))

    def texts(self, column: str) -> list[str]:
        """A list written as Python text. ValueError where it is none."""
        values = parsed_list(self.text(column))
        if values is None:
            raise ValueError(f"{column}: {self.text(column)[:40]!r} is no list")
        return [str(value) for value in values]

    def options(self) -> dict[str, str]:
        """{"A": its text, ...} of the option columns that the row fills."""
        return {key: str(self.cells[key]) for key in ascii_uppercase if key in self.cells}


def raw_rows(path):
    """(line, cells) of all rows of a TSV. ValueError where quotes or the encoding are broken."""
    csv.field_size_limit(2**31 - 1)
    with open(path, encoding="utf-8-sig", newline="") as file:
        # Read as a row of its own, the mark shows that no quote is open at the end.
        reader = csv.reader(chain(file, ["\0"]), "excel-tab")
        start = 1
        try:
            for cells in reader:
                if cells == ["\0"] and reader.line_num == start:
                    return
                if "".join(cells).strip(" ") or len(cells) > 1:
                    yield start, cells
                last, start = start, reader.line_num + 1
        except UnicodeDecodeError:
            raise ValueError(f"{path}:{start}: no utf-8 text: save it as UTF-8") from None
        except csv.Error as e:
            raise ValueError(f"{path}:{start}: {e}") from None
    raise ValueError(f"{path}:{last}: a quote that opens in this row is never closed")


def typed(cells: list[str]) -> list:
    """The cells of a column as pandas types them; None for missing ones.

    All whole: ints, with a gap floats. All numbers: floats. Else texts, and "TRUE" is "True" where
    all are true or false.
    """
    known = [cell for cell in cells if cell not in MISSING]
    kind = str
    if known and all(map(WHOLE.fullmatch, known)):
        if max(map(len, known)) < 19:  # longer ones stay texts: they may be no int64
            kind = int if len(known) == len(cells) else lambda cell: float(int(cell))
    elif known and all(map(NUMBER.fullmatch, known)):
        kind = float
    elif {cell.lower() for cell in known} <= {"true", "false"}:
        kind = str.capitalize
    return [None if cell in MISSING else kind(cell) for cell in cells]


def read_columns(path: Path) -> tuple[list[int], dict[str, list[str]]]:
    """-> the lines at which rows begin, {column: cells}. ValueError naming file and line.

    Names in small letters, but for those of options: A, B, ..
    """
    rows = raw_rows(path)
    _, head = next(rows, (0, None))
    if head is None:
        raise ValueError(f"{path}:1: an empty file")
    names = [name if re.fullmatch("[A-Z]", name) else name.lower() for name in head]
    twice = [name for name, count in Counter(names).items() if count > 1 and name]
    if twice:
        raise ValueError(f"{path}:1: column {twice[0]!r} comes twice")
    lines, table = [], []
    for line, cells in rows:
        if len(cells) > len(names):
            raise ValueError(f"{path}:{line}: {len(cells)} cells, but {len(names)} columns")
        lines.append(line)
        table.append(cells + [""] * (len(names) - len(cells)))
    if not table:
        raise ValueError(f"{path}:1: no row below the names of the columns")
    return lines, dict(zip(names, map(list, zip(*table))))


def read_rows(path: Path, benchmark: "Benchmark") -> tuple[list[Row], set[str]]:
    """The questions of a TSV; and the indices of rows without a picture, which official code drops.

    ValueError naming file and line for a missing column, a missing or second index, a missing
    truth, a picture that is no base64.
    """
    lines, table = read_columns(path)
    for name in f"index {benchmark.truth} {benchmark.columns}".split():
        if name not in table:
            raise ValueError(f"{path}:1: no column {name!r}; there are {', '.join(table)}")
    values = {name: cells if name == "image" else typed(cells) for name, cells in table.items()}
    rows, dropped, seen = [], set(), {}
    for i, line in enumerate(lines):
        where = f"{path}:{line}"
        cells = {name: column[i] for name, column in values.items() if column[i] is not None}
        if "index" not in cells:
            raise ValueError(f"{where}: no index")
        index = str(cells["index"])
        if index in seen:
            raise ValueError(f"{where}: index {index} is also that of line {seen[index]}")
        seen[index] = line
        if cells.get("image", "x") in MISSING:
            dropped.add(index)
            continue
        if not table[benchmark.truth][i].strip():
            raise ValueError(f"{where}: index {index} has no {benchmark.truth}")
        rows.append(Row(index, where, cells))
    if not rows:
        raise ValueError(f"{path}: no row has an image")
    for row in rows:
        if "image" in row.cells and row.text("image") not in seen:
            check_base64(row)
    return rows, dropped


def check_base64(row: Row):
    """ValueError where a picture is none in base64."""
    for picture in pictures_in(row.text("image")):
        try:
            base64.b64decode("".join(picture.split()), validate=True)
        except ValueError as e:
            raise ValueError(f"{row.where}: image: no base64: {e}") from None


def pictures_in(text: str) -> list[str]:
    """One picture or name, or those of a list that is written as Python text."""
    is_list = text.startswith("[") and text.endswith("]")
    values = parsed_list(text) if is_list else None
    return [text] if values is None else [str(value) for value in values]


def picture_sources(row: Row, rows: dict[str, Row]) -> list[str]:
    """What shows the row's pictures, in order: data URLs, or paths.

    rows: by index, for a picture that stands in another row. ValueError where that has none.
    """
    image = row.text("image")
    if "image" not in row.cells:
        if "image_path" not in row.cells:
            raise ValueError("neither image nor image_path")
        return pictures_in(row.text("image_path"))
    if len(image) <= REFERENCE:
        image = rows[image].text("image") if image in rows else ""
        if len(image) <= REFERENCE:
            raise ValueError(f"image: {row.text('image')!r} is no row with a picture")
    return [f"data:image/png;base64,{picture}" for picture in pictures_in(image)]


def clip_path(row: Row) -> str:
    """Of a row's clip, below the folder of clips."""
    if "video_path" in row.cells:
        return row.text("video_path")
    if "video" not in row.cells:
        raise ValueError("neither video nor video_path")
    name = row.text("video") + str(row.cells.get("suffix", ""))
    return str(Path(str(row.cells.get("prefix", "")), name))


def frame_numbers(frames: int, n: int) -> list[int]:
    """n of a clip's frames, evenly spread and none at its ends: Video-MME and others."""
    step = frames / (n + 1)  # rounded first, as official code has it: int may differ by one
    return [int(i * step) for i in range(1, n + 1)]


def mvbench_frame_numbers(
    frames: int, n: int, fps: float = 0, start: float = 0, end: float = 0, first: int = 0
) -> list[int]:
    """MVBench: the middle of each of n equal parts; where there is an end, of that cut in seconds.

    first: the number of the first frame. Rounding is to even numbers.
    """
    last = first + frames - 1
    if end:
        first, last = max(first, round(start * fps)), min(round(end * fps), last)
    part = (last - first) / n
    return [int(first + part / 2 + round(part * i)) for i in range(n)]


def read_predictions(
    path: Path, rows: list[Row], dropped: Collection[str] = (), split: bool = False
) -> dict[str, str | None]:
    """{index: what was said}, None for a question that could not be asked; of a JSONL file.

    dropped: indices whose answers are passed over. split: what follows the last </think>, as
    VLMEvalKit takes it with SPLIT_THINK. ValueError naming the line that is no JSON object, or has
    no known index, or no text.
    """
    known = {row.index for row in rows}
    answers, seen = {}, {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        record = parsed_line(line, where)
        index = record.get("index")
        if isinstance(index, bool) or not isinstance(index, (int, float, str)):
            raise ValueError(f'{where}: no "index"')
        index = str(index)
        if index in dropped:
            continue
        if index not in known:
            raise ValueError(f"{where}: index {index[:80]} is not in the benchmark's file")
        if index in seen:
            raise ValueError(f"{where}: index {index} is also that of line {seen[index]}")
        failed = bool(record.get("failure"))
        if not failed and not isinstance(record.get("prediction"), str):
            raise ValueError(f'{where}: index {index} has no "prediction", a text')
        seen[index] = number
        answers[index] = None if failed else record["prediction"]
        if split and "</think>" in (answers[index] or ""):
            answers[index] = answers[index].rpartition("</think>")[2].strip()
    if not answers:
        raise ValueError(f"{path}: no prediction in it")
    return answers


def parsed_line(line: bytes, where: str) -> dict:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{where}: no JSON: {str(e)[:80]}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object, not {type(record).__name__}")
    return record


def as_read_back(replies: list[str]) -> list[str]:
    """Replies once official code has kept them in a table of .xlsx and read that again: numbers,
    where all of them are."""
    cells = typed([reply[:MOST_CHARACTERS] for reply in replies])
    return ["nan" if cell is None else str(cell) for cell in cells]


class AnswerFile:
    """Predictions in a JSONL file, a line an answer; how they were asked for stands beside it.

    done: {index: what was said}. A kill can leave half a line at the end, which is cut off: its
    question is asked again. What other ranks have written (see of_rank) is taken in, now and by
    take_in. ValueError where a file holds other answers, or another process writes to it.
    """

    def __init__(self, path: Path, settings: dict, rows: list[Row]):
        self.path, self.settings, self.rows = path, settings, rows
        self.file = open(path, "a+b", buffering=0)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path}: another process writes to it") from None
        self.file.seek(0)
        said = self.file.read()
        if said:
            refuse_other(path, settings_of(path), settings)
        else:
            with replacing(settings_of(path)) as part:
                part.write_text(json.dumps(settings) + "\n")
        whole = said.rfind(b"\n") + 1
        self.file.truncate(whole)
        self.done = read_predictions(path, rows) if whole else {}
        self.take_in()

    def take_in(self):
        """The answers of other ranks, of this run or of one that was killed."""
        pattern = of_rank(glob.escape(self.path.name), "*[0-9]")
        for path in sorted(self.path.parent.glob(pattern)):
            other = AnswerFile(path, self.settings, self.rows)
            for line in path.read_bytes().splitlines():
                record = json.loads(line)
                if str(record["index"]) not in self.done:  # else a kill came before the unlink
                    self.write(record)
            self.done = other.done | self.done
            other.file.close()
            path.unlink()
            settings_of(path).unlink()

    def write(self, record: dict):
        # One call: it is in the file, whole, even if this process is killed right behind it.
        line = json.dumps(record).encode() + b"\n"
        if self.file.write(line) < len(line):
            raise OSError(errno.ENOSPC, "no room for an answer", str(self.file.name))


def of_rank(path: Path | str, rank: int | str) -> str:
    """The file beside `path` that holds what another rank was told, until the first takes it in."""
    return f"{path}.rank{rank}"


def settings_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.settings")


def refuse_other(path, beside, settings):
    """ValueError that says how answers were asked for in another way, or that nothing says how."""
    try:
        before = json.loads(beside.read_text())
    except (OSError, ValueError):
        raise ValueError(f"{path}: these answers were made elsewhere; name another file") from None
    for key in before | settings:
        if before.get(key) != settings.get(key):
            raise ValueError(
                f"{path}: these answers were made with {key} {before.get(key)}, not "
                f"{settings.get(key)}; name another file with --predictions"
            )


# --------------------------------------------------------------------------------------------------
# prompts: (the text before the pictures or frames, the text behind them)

SHORT = "\nAnswer the question using a single word or phrase."
SELECT = "Please select the correct answer from the options above. \n"
CHINESE = "\n请直接给出结论，回答是或者否，不需要做额外分析，并且不许回答不确定"
VIDEO_MME = (
    "\nThese are the frames of a video. Select the best answer to the following multiple-choice "
    "question based on the video. Respond with only the letter (A, B, C, or D) of the correct "
    "option.\n"
)
MVBENCH = (
    "Carefully watch the video and pay attention to the cause and sequence of events, the detail "
    "and movement of objects, and the action and pose of persons. Based on your observations, "
    "select the best option that accurately addresses the question.\n"
)


def choice_prompt(row):
    text = f"Hint: {row.text('hint')}\n" if "hint" in row.cells else ""
    text += f"Question: {row.text('question')}\n"
    lines = [f"{key}. {option}\n" for key, option in row.options().items()]
    return "", text + ("Options:\n" + "".join(lines) + SELECT if lines else "")


def bare_prompt(row):
    return "", row.text("question")


def short_prompt(row):
    return "", row.text("question") + SHORT


def chinese_prompt(row):
    return "", row.text("question") + CHINESE


def video_mme_prompt(row):
    lines = "\n".join(row.texts("candidates"))
    return "", f"{VIDEO_MME}Question: {row.text('question')}\n{lines}\nAnswer: "


def long_video_prompt(row):
    lines = [f"{key}. {text}" for key, text in zip(ascii_uppercase, row.texts("candidates"))]
    last = "Answer with the option's letter from the given choices directly."
    return "", "\n".join([row.text("question"), *lines, last])


def mvbench_prompt(row):
    lines = [f"({key}) {text}" for key, text in zip(ascii_uppercase, row.texts("candidates"))]
    text = "\n".join([f"Question: {row.text('question')}", "Options:", *lines]).rstrip()
    # The reply is begun for the model.
    return MVBENCH, f"{text}\nOnly give the best option.Best option:("


def tempcompass_prompt(row):
    if tempcompass_task(row) == "yes no":
        return row.text("question"), "\nPlease answer yes or no:"
    lines = "\n".join(row.texts("candidates"))
    return f"{row.text('question')}\n{lines}", "\nPlease directly give the best option:"


@dataclass
class Exam:
    """How a model is asked the rows of a benchmark."""

    name: str
    rows: list[Row]
    root: Path  # the folder of pictures and clips
    mode: str  # "plain", or one of conversation.MODES
    frames: int  # of each clip
    shuffled: bool  # its frames in any order

    def __post_init__(self):
        self.by_index = {row.index: row for row in self.rows}

    def pictures(self, row: Row) -> list[str]:
        return picture_sources(row, self.by_index)

    def check(self, row: Row):
        """ValueError naming the row where it cannot be asked, as far as headers say."""
        try:
            BENCHMARKS[self.name].prompt(row)
            if self.in_folder(row):
                for path in self.frame_paths(row)[0]:
                    load_picture(path, self.root, header_only=True)
                return
            if BENCHMARKS[self.name].video:
                open_media(clip_path(row), self.root).close()
                return
            for source in self.pictures(row):
                load_picture(source, self.root, header_only=True)
        except (MediaError, ValueError) as e:
            raise ValueError(f"{row.where}: {e}") from None

    def conversation(self, row: Row) -> dict:
        """What is asked: the pictures or frames inside the benchmark's prompt. MediaError."""
        before, behind = BENCHMARKS[self.name].prompt(row)
        content = [{"type": "text", "text": text} for text in (before, behind) if text]
        # auto_think needs no switch: it is what the model does when none is given.
        mode = "plain" if self.mode == "auto_think" else self.mode
        messages = with_switch([{"role": "user", "content": content}], mode)
        messages[0]["content"][-1:-1] = self.media(row)
        return {"messages": messages}

    def media(self, row: Row) -> list[dict]:
        if BENCHMARKS[self.name].video:
            return [self.clip(row)]
        items = [{"type": "image", "image": source} for source in self.pictures(row)]
        if self.name == "OCRBench":  # Keye's wrapper enlarges its small pictures
            items = [item | {"min_pixels": 100 * 28 * 28} for item in items]
        return items

    def clip(self, row: Row) -> dict:
        """A clip as the list of those of its frames that official code takes."""
        frames, seconds = (self.from_folder if self.in_folder(row) else self.from_file)(row)
        if self.shuffled:
            random.Random(row.index).shuffle(frames)
        return {"type": "video", "video": frames, "fps": self.frames / seconds}

    def from_file(self, row: Row) -> tuple[list, float]:
        """Frames, and the seconds over which they are spread."""
        with Clip(clip_path(row), self.root) as clip:
            count, seconds = len(clip.times), clip.duration
            numbers = frame_numbers(count, self.frames)
            if self.name == "MVBench":
                start, end = cut_of(row)
                cut = count / seconds, start, end
                numbers = mvbench_frame_numbers(count, self.frames, *cut)
                seconds = end - start if end else seconds
            return list(map(Image.fromarray, clip.frames(clip.times[numbers]))), seconds

    def in_folder(self, row: Row) -> bool:
        """MVBench has clips of TVQA, which are folders of pictures, 00001.jpg the first."""
        return self.name == "MVBench" and row.text("data_type") == "frame"

    def from_folder(self, row: Row) -> tuple[list, float]:
        paths, seconds = self.frame_paths(row)
        return [load_picture(path, self.root) for path in paths], seconds

    def frame_paths(self, row: Row) -> tuple[list[str], float]:
        folder = clip_path(row)
        with reading(folder, "missing"):
            count = len(os.listdir(Path(self.root, folder)))
        start, end = cut_of(row)
        numbers = mvbench_frame_numbers(count, self.frames, FOLDER_FPS, start, end, first=1)
        seconds = end - start if end else count / FOLDER_FPS
        return [f"{folder}/{number:05d}.jpg" for number in numbers], seconds


def cut_of(row: Row) -> tuple[float, float]:
    """MVBench: from when to when a clip is shown, in seconds; an end of 0: to its own."""
    if row.text("bound") == "False":
        return 0.0, 0.0  # the numbers that stand there do not count
    return float(row.cells.get("start", 0)), float(row.cells.get("end", 0))


# --------------------------------------------------------------------------------------------------
# measures: (row, reply, rules, ask) -> (what was read, its hit, more that the table needs)


def choice_measure(row, reply, rules, ask):
    options = row.options()
    question = row.text("question")
    read = measures.choice_with_judge(reply, question, options, rules, ask, row.index)
    return read, int(read == row.text("answer")), {}


def yes_no_measure(row, reply, rules, ask):
    prompt = (
        "Does this answer to the question mean yes or no? Reply with Yes, No or Unknown.\n"
        f"Question: {row.text('question')}\nAnswer: {reply}"
    )
    return read_or_asked(yes_no, row, reply, prompt, ask)


def read_or_asked(read_of, row, reply, prompt, ask):
    """A measure's result: what read_of finds in the reply, else in what a judge says of it."""

    def sure(said):
        """None, which asks the judge again, where it is not."""
        read = read_of(said)
        return None if read == "Unknown" else read

    read = read_of(reply)
    if read == "Unknown" and ask:
        read = ask(prompt, 5, sure) or read
    return read, int(read == row.text("answer")), {}


def chinese_measure(row, reply, rules, ask):
    prompt = (
        "下面的回答对问题的结论是肯定还是否定？只回复“是”或“否”，无法判断则回复 Unknown。\n"
        f"问题：{row.text('question')}\n回答：{without_thinking(reply).strip()}"
    )
    return read_or_asked(chinese_yes_no, row, reply, prompt, ask)


def truths_of(row):
    """A list of truths, or one of one."""
    text = row.text("answer")
    values = parsed_list(text)
    if values == []:
        raise ValueError("answer: an empty list")
    return [text] if values is None else [str(value) for value in values]


def vqa_measure(row, reply, rules, ask):
    return measures.vqa_words(reply), measures.vqa_accuracy(reply, truths_of(row)), {}


def anls_measure(row, reply, rules, ask):
    return reply, measures.anls(reply, truths_of(row)), {}


def relaxed_measure(row, reply, rules, ask):
    return reply.strip(), measures.relaxed(reply, truths_of(row), rules), {}


def ocr_measure(row, reply, rules, ask):
    truths = measures.literal(row.text("answer"))
    if not isinstance(truths, (list, tuple, str)):  # of a text, each single character is a truth
        raise ValueError(f"answer: {row.text('answer')[:40]!r} is no list of texts")
    category = row.text("category")
    if category not in chain(*measures.OCR_KINDS.values()):
        raise ValueError(f"category {category!r} is none of OCRBench's")
    return reply, measures.ocr_hit(reply, [str(truth) for truth in truths], category), {}


def mathvista_measure(row, reply, rules, ask):
    cells = {name: row.cells.get(name, "nan") for name in MATHVISTA.split()}
    if cells["question_type"] == "multi_choice":
        row.texts("choices")  # says what is wrong with them
    read = measures.mathvista_value(reply, cells, rules)
    # Numbers are taken from the reply itself only where they are right, and not 0.
    right = measures.mathvista_hit(read, cells)
    fetched = bool(read) and (right or cells["question_type"] == "multi_choice")
    if not fetched:
        read, right = None, False
        if ask:
            found = ask(mathvista_prompt(row, reply), 5, lambda said: [said])
            read = measures.mathvista_value(found[0], cells, rules) if found else None
            right = measures.mathvista_hit(read, cells)
    return None if read is None else str(read), int(right), {"prefetch": int(fetched)}


def mathvista_prompt(row, reply):
    kind = "letter of the option" if row.text("question_type") == "multi_choice" else "answer alone"
    return (
        f"Extract the final answer from this response. Reply with the {kind} "
        f"({row.text('answer_type')}), nothing else.\n"
        f"Question: {row.text('question')}\nResponse: {reply}"
    )


def judged_measure(row, reply, rules, ask):
    """keye, of CPV and Video_Order: a judge compares conclusions."""
    prompt = (
        "比较下面的参考答案和模型回答，忽略分析过程，只看结论是否一致。只回复“回答正确”或“回答错误”。\n"
        f"参考答案：{row.text('answer')}\n模型回答：{without_thinking(reply).strip()}"
    )
    found = ask(prompt, 5, lambda said: [said])
    read = found[0] if found else ""
    return read, int("回答正确" in read), {}


def topic_measure(row, reply, rules, ask):
    """keye, of Video_Topic: a judge writes the reply as a list, whose 是 and 否 are compared."""
    prompt = (
        "把下面的回答改写成一个列表，每个视频一项，只用“是”或“否”，"
        "例如 [是, 否, 是]。只回复列表。\n"
        f"回答：{without_thinking(reply).strip()}"
    )
    found = ask(prompt, 5, lambda said: [said])
    lists = re.findall(r"\[(.*?)\]", found[0]) if found else []
    read = re.findall("[是否]", lists[-1]) if lists else None
    truth = [item for item in row.text("answer").split("_") if item in ("是", "否")]
    return read, int(read == truth), {}


def video_mme_measure(row, reply, rules, ask):
    read = measures.first_capital(reply) or None
    return read, int(read == row.text("answer")), {}


def long_video_measure(row, reply, rules, ask):
    read = measures.first_capital(reply, "ABCDE") or None
    try:
        truth = ascii_uppercase[int(row.text("correct_choice"))]
    except (ValueError, IndexError):
        where = row.text("correct_choice")
        raise ValueError(f"correct_choice {where!r} is no number of an option") from None
    return read, int(read == truth), {}


def mvbench_measure(row, reply, rules, ask):
    candidates = row.texts("candidates")
    if row.text("answer") not in candidates:
        raise ValueError(f"answer {row.text('answer')!r} is none of the candidates")
    options = dict(zip(ascii_uppercase, candidates))
    truth = [key for key, text in options.items() if text == row.text("answer")][-1]
    # Official code gives neither an empty reply nor a failed call a score, and counts both as hits.
    if reply == "nan" or f"{measures.FAILED_CALL}." in reply:
        return None, 1, {}
    if measures.mvbench_first_word(reply, truth):
        return truth, 1, {}
    question = row.text("question")
    read = measures.choice_with_judge(reply, question, options, rules, ask, row.index)
    # Of equal options the rules above take the last, and official code here the first; and where
    # another option's text is a letter, it goes on from there.
    wanted = row.text("answer")
    for key, text in options.items():
        wanted = key if text == wanted else wanted
    return read, int(read == wanted), {}


def tempcompass_task(row):
    return re.sub("[_-]", " ", row.text("task_type").lower())


def tempcompass_measure(row, reply, rules, ask):
    answer = row.text("answer")
    task = tempcompass_task(row)
    if task == "multi choice":
        right = measures.tempcompass_choice(reply, answer)
    elif task == "caption matching":
        right = measures.tempcompass_caption(reply, answer, row.texts("candidates"))
    elif task == "yes no":
        right = measures.tempcompass_yes_no(reply, answer)
    else:
        raise ValueError(
            f"task_type {row.text('task_type')!r} has no rule; multi-choice, caption_matching and "
            "yes_no have"
        )
    return None if right is None else reply, int(bool(right)), {}


# --------------------------------------------------------------------------------------------------
# the benchmarks


@dataclass(frozen=True)
class Benchmark:
    columns: str  # that it cannot be scored without, besides index and truth
    prompt: Callable
    measure: Callable
    table: Callable
    truth: str = "answer"  # the column of it
    video: bool = False  # the frames of a clip are shown
    judge: str = ""  # what the official score is without a judge, where it needs one
    group: Callable = lambda row: row.index  # the same of rows that its table takes together


MATHVISTA = "question_type answer_type answer answer_option choices task skills"
VIDEO = "duration domain sub_category task_type"
NO_SCORE = "there is no score"
RULE_PART = "the rule part alone, which is not the official score"

CHOICE = Benchmark("A", choice_prompt, choice_measure, measures.choice_table)
CIRCULAR = Benchmark(
    "A", choice_prompt, choice_measure, measures.circular_table, group=measures.main_index
)
KEYE_YES_NO = Benchmark("", chinese_prompt, chinese_measure, measures.percent_table)
KEYE_JUDGED = Benchmark("", short_prompt, judged_measure, measures.overall_table, judge=NO_SCORE)
BENCHMARKS = {
    "MMBench_DEV_EN": CIRCULAR,
    "MMBench_DEV_CN": CIRCULAR,
    "MMBench_DEV_EN_V11": CIRCULAR,
    "MMBench_DEV_CN_V11": CIRCULAR,
    "CCBench": CIRCULAR,
    "MMStar": CHOICE,
    "AI2D_TEST": CHOICE,
    "BLINK": CHOICE,
    "RealWorldQA": CHOICE,
    "POPE": Benchmark("category", bare_prompt, yes_no_measure, measures.pope_table),
    "MME": Benchmark("category image_path", bare_prompt, yes_no_measure, measures.mme_table),
    "HallusionBench": Benchmark(
        "l2-category", bare_prompt, yes_no_measure, measures.hallusion_table,
        group=measures.hallusion_set,
    ),
    "TextVQA_VAL": Benchmark("", short_prompt, vqa_measure, measures.open_table),
    "ChartQA_TEST": Benchmark("", short_prompt, relaxed_measure, measures.open_table),
    "DocVQA_VAL": Benchmark("", short_prompt, anls_measure, measures.open_table),
    "InfoVQA_VAL": Benchmark("", short_prompt, anls_measure, measures.open_table),
    "OCRBench": Benchmark("category", bare_prompt, ocr_measure, measures.ocr_table),
    "MathVista_MINI": Benchmark(
        MATHVISTA, bare_prompt, mathvista_measure, measures.mathvista_table, judge=RULE_PART
    ),
    "Video-MME": Benchmark(
        VIDEO, video_mme_prompt, video_mme_measure, measures.video_mme_table, video=True
    ),
    "MVBench": Benchmark(
        "task_type candidates", mvbench_prompt, mvbench_measure, measures.mvbench_table, video=True
    ),
    "LongVideoBench": Benchmark(
        "duration_group question_category", long_video_prompt, long_video_measure,
        measures.long_video_table, "correct_choice", video=True,
    ),
    "TempCompass": Benchmark(
        "dim task_type", tempcompass_prompt, tempcompass_measure, measures.tempcompass_table,
        video=True,
    ),
    "CPV": KEYE_JUDGED,
    "Video_Order": KEYE_JUDGED,
    "Video_Topic": replace(KEYE_JUDGED, measure=topic_measure),
    "PornComment": KEYE_YES_NO,
    "High_like": KEYE_YES_NO,
    "SPU": KEYE_YES_NO,
}
# KC-MMBench's files and its code have other names.
ALSO = {
    "Collection_Order": "Video_Order",
    "Hot_Videos_Aggregation": "Video_Topic",
    "Pornographic_Comment": "PornComment",
}


def official_name(name: str) -> str:
    """A benchmark's name as it is spelled in BENCHMARKS. ValueError with all names for no such."""
    spelled = {key.lower(): key for key in BENCHMARKS} | {k.lower(): ALSO[k] for k in ALSO}
    if name.lower() not in spelled:
        raise ValueError(f"no benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
    return spelled[name.lower()]


def first_groups(benchmark: Benchmark, rows: list[Row], limit: int | None) -> list[Row]:
    """The rows of the first so many questions (default: of all), with all their rotations."""
    groups = list(map(benchmark.group, rows))
    kept = set(list(dict.fromkeys(groups))[:limit])
    return [row for row, group in zip(rows, groups) if group in kept]


def score_rows(
    benchmark: Benchmark, rows: list[Row], answers: dict[str, str | None],
    rules: str = "upstream", judge=None,
) -> list[Scored]:
    """The answers measured, in the order of the rows. Rows without an answer are left out.

    None as answer: the question could not be asked, which is wrong. judge: a judge.Judge, for what
    rules cannot read. ValueError naming the row whose cells its rule cannot use.
    """
    asked = [row for row in rows if row.index in answers]
    # As official code has it, a question that could not be asked has a text for an answer too.
    said = [answers[row.index] for row in asked]
    replies = as_read_back([measures.FAILED_CALL if reply is None else reply for reply in said])

    def measured(row, reply):
        if answers[row.index] is None:
            return Scored(row, None, 0)
        by = None

        def ask(prompt, tries, read):
            nonlocal by
            found, by = ask_judge(judge, prompt, tries, read)
            return found

        try:
            scored = Scored(row, *benchmark.measure(row, reply, rules, ask if judge else None))
        except ValueError as e:
            raise ValueError(f"{row.where}: {e}") from None
        scored.by = by or ("fallback" if scored.read in NOTHING else "rules")
        return scored

    with ThreadPoolExecutor(8 if judge else 1) as pool:  # ours: so many requests at once
        return list(pool.map(measured, asked, replies))


NOTHING = (None, measures.NO_OPTION, "Unknown")  # that rules have read


def ask_judge(judge, prompt: str, tries: int, read: Callable) -> tuple:
    """What `read` finds in the first of a judge's replies that it finds something in; and "judge",
    or None and "fallback", or where no reply came None and "no reply". A bare prompt is sent, as
    official code does."""
    by = "no reply"
    for attempt in range(tries):
        judge.asked += 1
        messages = [{"role": "user", "content": prompt}]
        said, why = judge.reply(messages, temperature=attempt / 2)
        if said is None:
            judge.failed[why] += 1
            continue
        by = "fallback"
        found = read(said)
        if found:
            return found, "judge"
    return None, by


# --------------------------------------------------------------------------------------------------
# what training data share with a benchmark

ANY = Benchmark("question", bare_prompt, None, None, truth="question")  # any file of questions
RUN = 8  # ours: words in a row that a question shares with none by chance
NEAR = 4  # ours: of 64 bits that pictures may differ in after another size or compression


def picture_hash(picture: Image.Image) -> int:
    """64 bits: whether each of 8 x 8 places is brighter than the one to its right."""
    grey = np.asarray(picture.convert("L").resize((9, 8), Image.Resampling.BOX)).astype(int)
    bits = (grey[:, :-1] > grey[:, 1:]).reshape(-1)  # (64,)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def word_runs(text: str) -> set[tuple]:
    """All RUN words in a row. A Chinese character is a word."""
    words = re.findall(r"[^\W\u3400-\u9fff]+|[\u3400-\u9fff]", text.lower())
    return {tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)}


class Overlap:
    """What a benchmark's questions share with other conversations: pictures, and runs of words.

    Not compared, as others are the same by chance:
    short: how many questions have fewer than RUN words; "Is there a dog?" is asked of any picture.
    flat: how many of the `pictures` are of one colour, or change from left to right in one way.
    """

    def __init__(self, rows: list[Row], root: Path):
        self.rows = rows
        self.asked = defaultdict(set)  # run of words -> places of rows
        self.short = 0
        for k, row in enumerate(rows):
            runs = word_runs(row.text("question"))
            self.short += not runs
            for run in runs:
                self.asked[run].add(k)
        shown, hashes = hashes_of(rows, root)  # (P,) of each picture its row's place; (P,)
        bits = np.bitwise_count(hashes)
        tell = (NEAR < bits) & (bits < 64 - NEAR)
        self.pictures, self.flat = len(tell), int((~tell).sum())
        self.shown, self.hashes = shown[tell], hashes[tell]

    def of(self, conversation: dict, root: Path) -> dict[str, list[Row]]:
        """{"question" or "picture": all rows that have it}. MediaError for a broken picture."""
        found = defaultdict(set)
        for run in word_runs("\n".join(map(text_of, conversation["messages"]))):
            found["question"] |= self.asked.get(run, set())
        for item, kind in media_items(conversation):
            if kind == "image" and len(self.hashes):
                bits = self.hashes ^ np.uint64(picture_hash(load_picture(item["image"], root)))
                found["picture"] |= set(self.shown[np.bitwise_count(bits) <= NEAR])
        return {what: [self.rows[k] for k in sorted(found[what])] for what in found if found[what]}


def hashes_of(rows: list[Row], root: Path) -> tuple[np.ndarray, np.ndarray]:
    """(the place of its row, the hash) of all pictures. ValueError for one that is broken."""
    by_index = {row.index: row for row in rows}
    shown, hashes = [], []
    for k, row in enumerate(rows):
        if not {"image", "image_path"} & row.cells.keys():
            continue
        for source in picture_sources(row, by_index):
            try:
                hashes.append(picture_hash(load_picture(source, root)))
            except MediaError as e:
                raise ValueError(f"row {row.index} of the benchmark: {e}") from None
            shown.append(k)
    return np.array(shown, int), np.array(hashes, np.uint64)
