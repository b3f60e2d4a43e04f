"""Questions with a known answer: what held-out folders and the training pools hold.

A line is a conversation that ends with the true answer, and its "meta" says how answers are judged:

    {"messages": [{"role": "user", "content": "What is 1 + 1?"},
                  {"role": "assistant", "content": "2"}],
     "meta": {"task": "sum", "category": "text", "answer": "2", "verifier": "number"}}

The task defaults to the file's name, the category to the task.

    questions = read_questions("data/toy/heldout", limit_per_task=40)
    prompts = draw_prompts(question_pool(folder), 64, {"think": 1, "auto_think": 2}, "0/7")
"""

import logging
import random
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from common.conversation import check_conversation, media_items, read_header
from common.failures import counted, or_exit, refuse_many
from common.jsonl import Lines, data_files, data_name, shards_of
from common.media import MediaError
from common.rollout import Prompt
from common.verifiers import verify

log = logging.getLogger("questions")

POOL = ("questions", "detail", "instruct", "premise")  # files that post-training asks from
DISCOVER = "discover"  # the file, and category, that reinforcement alone asks from
PAIRS = "preferences"  # the file that holds no questions, but pairs of answers


@dataclass
class Question:
    """A record of a JSONL file. root: the folder of its media. where: "path:12", for messages.

    meta, task and category are the record's.
    """

    record: dict
    root: Path
    where: str

    def __post_init__(self):
        self.meta = self.record["meta"]
        self.task = self.meta["task"]
        self.category = self.meta["category"]


def check_question(record: dict):
    """ValueError where the record is no question with a true answer that can be read."""
    check_conversation(record)
    roles = [message["role"] for message in record["messages"]]
    if roles[-1] != "assistant" or "user" not in roles:
        raise ValueError("a user's question and, last, the assistant's true answer are expected")
    meta = record.get("meta")
    if not isinstance(meta, dict) or not {"answer", "verifier"} <= meta.keys():
        raise ValueError('meta with "answer" and "verifier", to judge answers by, is missing')
    if not isinstance(meta["answer"], str):
        raise ValueError(f'meta: "answer" must be a text, not {type(meta["answer"]).__name__}')
    hints = meta.get("hints", [])
    if not isinstance(hints, list) or not all(isinstance(hint, str) for hint in hints):
        raise ValueError('meta: "hints" must be a list of texts, the least helpful first')
    try:
        verify("", meta)
    except (KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"meta: {type(e).__name__}: {e}") from e


def read_questions(
    path: str | Path, limit_per_task: int | None = None, tasks: list[str] | None = None
) -> list[Question]:
    """The questions of a file, or of a folder's data files (see data_files) but PAIRS, in order.

    limit_per_task: the first so many of each task. tasks: names of tasks or categories to keep.
    ValueError, with file:line, for a line that is no question; also for an unknown name in tasks.
    """
    path = Path(path)
    files = {data_name(path): path}
    if not path.is_file():
        files = {name: file for name, file in data_files(path).items() if name != PAIRS}
    if not files:
        raise ValueError(f"{path}: no .jsonl or .json files with questions here")
    questions = []
    for name, file in files.items():
        lines = Lines(file, check_question, held=True)
        for i, record in enumerate(lines):
            meta = record["meta"]
            meta.setdefault("task", name)
            meta.setdefault("category", meta["task"])
            questions.append(Question(record, lines.root, lines.where(i)))

    if tasks:
        names = {name for q in questions for name in (q.task, q.category)}
        unknown = set(tasks) - names
        if unknown:
            there = ", ".join(sorted(names))
            raise ValueError(f"no task or category {min(unknown)!r} here; there are {there}")
        questions = [q for q in questions if q.task in tasks or q.category in tasks]

    seen = Counter()
    kept = []
    for question in questions:
        seen[question.task] += 1
        if limit_per_task is None or seen[question.task] <= limit_per_task:
            kept.append(question)
    return kept


def pool_files(folder: Path, names: tuple = POOL) -> list[Path]:
    """Those files of the names that are in folder/train."""
    files = files_or_exit(folder / "train")
    return [files[name] for name in names if name in files]


def question_pool(folder: Path, names: tuple = POOL) -> list[Question]:
    """The questions that post-training asks, of the files of these names in folder/train.

    SystemExit where there is none, or a line is no question.
    """
    questions = []
    for path in pool_files(folder, names):
        questions += read_or_exit(path)
    if not questions:
        names = ", ".join(f"{name}.jsonl" for name in names)
        raise SystemExit(f"{folder / 'train'} has none of {names}: no question to ask")
    return questions


def check_heldout(folder: Path, limit: int | None = None):
    """SystemExit where folder/heldout, if there is such a folder, cannot be scored.

    Scripts look when they start, as scoring comes after hours of training: at the form of every
    line, and at the headers of the media of those that will be asked, the first `limit` of a task.
    Few may have lost them: they will count as wrong.
    """
    if limit == 0 or not (folder / "heldout").is_dir():
        return
    questions = read_or_exit(folder / "heldout", limit)
    failures = []
    for question in questions:
        try:
            read_headers(question)
        except MediaError as e:
            failures.append(f"{question.where}: {e}")
    refuse_many(failures, len(questions), "held-out questions")
    if failures:
        log.warning(counted(failures, len(questions), "held-out questions"))


def read_headers(question: Question):
    """MediaError where a picture or clip of the question is missing or none; nothing is decoded."""
    for item, kind in media_items(question.record):
        read_header(item[kind], kind, question.root)


def files_or_exit(folder: Path) -> dict[str, Path]:
    with or_exit():
        return data_files(folder)


def refuse_empty(path: Path):
    """SystemExit where no file of a set has a byte: its stage may be the last of many."""
    with or_exit():
        sizes = [shard.stat().st_size for shard in shards_of(path)]
    if not any(sizes):
        raise SystemExit(f"{path}: no lines")


def needs_one(names, folder: Path, files: dict) -> str:
    """What a script says that finds none of these names among the files of folder/train."""
    there = ", ".join(files) or "no .jsonl file"
    return f"needs one of {', '.join(names)}.jsonl in {folder / 'train'}, which has {there}"


def say_files(run, folder: Path, read: list[Path]):
    """A line: which files of folder/train a phase reads, by their names, and which it leaves."""
    files = files_or_exit(folder / "train")
    names = [name for name, path in files.items() if path in read]
    rest = ", ".join(name for name in files if name not in names)
    run.say(f"{run.stage} reads {', '.join(names) or 'nothing'} of {folder / 'train'}"
            + f"; it leaves {rest}" * bool(rest))


def read_or_exit(path: Path, limit_per_task: int | None = None) -> list[Question]:
    with or_exit():
        return read_questions(path, limit_per_task)


def draw_prompts(
    questions: list[Question],
    n: int,
    modes: dict[str, float],
    seed: str,
    weights: dict[str, float] | None = None,
) -> list[Prompt]:
    """At most n different questions, each in a mode by its weight.

    Tasks count alike whatever their size, as a rare task's faults are else never met (ours); or by
    weights, where those not named count 1. A task gives no more questions than it has.
    A question with a clip is not asked in agentic_think: the tools look at pictures.
    Prompt i has the seed "seed/i".
    """
    rng = random.Random(seed)
    by_task = defaultdict(list)
    for question in questions:
        by_task[question.task].append(question)

    # Of a task with weight w one question stands in each 1 / w of a line, so that wherever the line
    # is cut all tasks have given their shares.
    places = []
    for task, of_task in by_task.items():
        first, weight = rng.random(), (weights or {}).get(task, 1.0)
        for k, question in enumerate(rng.sample(of_task, min(n, len(of_task)))):
            places.append(((first + k) / weight, question))
    places.sort(key=lambda place: place[0])

    prompts = []
    for i, (_, question) in enumerate(places[:n]):
        possible = dict(modes)
        if any(kind == "video" for _, kind in media_items(question.record)):
            possible.pop("agentic_think", None)
        mode = rng.choices(list(possible), possible.values())[0]
        prompts.append(Prompt(question.record, question.root, mode, f"{seed}/{i}"))
    return prompts
