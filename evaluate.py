"""Held-out score: greedy answers to questions with known truth, next to a blind score and chance.

    python evaluate.py --init runs/toy/pretrain/model --data data/toy/heldout
    python evaluate.py --init runs/toy/grpo/model --mode think auto_think
    python evaluate.py --board runs/toy
    python evaluate.py --report runs/toy
    python evaluate.py --benchmark MMStar --file MMStar.tsv --init MODEL --out R.json
    python evaluate.py --benchmark MMStar --file MMStar.tsv --predictions P.jsonl --out R.json
    python evaluate.py --decontaminate data/toy/train --file MMStar.tsv

The second asks in modes that the cold start taught; the third prints the board of all phases that
are done; the fourth writes their page again, see common/report.py. The next two give the official
table of a published benchmark (common/benchmarks.py): for a model, whose answers are kept one by
one, so that after a kill the same command goes on; and for answers that were made elsewhere,
{"index": .., "prediction": ".."} a line. Keye's published numbers are those of --mode think. The
last one lists lines of training data that share pictures or words with a benchmark's questions.
Questions of fewer than eight words and flat pictures, which others share by chance, are not
compared: it ends with how many these are.

Under `torchrun --nproc_per_node=N` each rank asks a share of the questions; the first one scores.

common/questions.py says what a question looks like; its meta may also hold "chance", the
share that guessing gets right, and "difficulty".

Blind: every picture and frame is mid-grey and of the same size, so the prompt and its length stay;
what is answered then comes from the words alone.

Questions of the categories of APART are in none of the means: each category has a column of its
own, with what is answered blind and what chance gets right beside it.

    result = evaluate(model, processor, "data/toy/heldout", limit=40, mode="auto_think")
    print(board([("auto_think", result)]))
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from common.benchmarks import (
    ANY, BENCHMARKS, NO_SCORE, RUN, AnswerFile, Exam, Overlap, first_groups, of_rank,
    official_name, read_predictions, read_rows, score_rows,
)
from common.checkpoint import fingerprint, sha256
from common.conversation import (
    MODES, TOOL_MODES, check_conversation, media_items, pictures_of, text_of,
)
from common.failures import counted, or_exit, refuse_many
from common.gallery import thumbnail
from common.judge import Judge
from common.jsonl import Lines, data_files, data_name, replacing, write_lines
from common.measures import final_answer
from common.media import MediaError
from common.processes import Peers, join_processes
from common.questions import Question, read_questions
from common.report import APART, PHASES, write_report
from common.rewards import REPEATED, Parsed, parse, repetition
from common.rollout import (
    CHUNK_PATCHES, CHUNK_ROLLOUTS, CLOSE_CALL, Prompt, Response, Rollout, code_ends, sample_groups,
    tool_turns, use_sandbox,
)
from common.run import add_judge_arguments, add_sandbox_argument, at_least, pick_device
from common.verifiers import grade, score
from data import Processor
from generate import Generator, load, max_answer
from model import KeyeVL

HEADLINE = ["colour", "shape", "count", "position", "motion"]  # tasks of the headline
# Columns of the board: a number of a whole result, as it is shown.
FACTS = {
    "tokens": "{tokens:.1f}",
    "obeyed": "{obeyed:.1%}",
    "format errors": "{format:.1%}",
    "repetitive": "{repetitive:.1%}",
    "calls": "{calls:.2f}",
    "failed calls": "{failed_calls:.2f}",
}
SAMPLE = "- [{task}] {question} **{output}** (truth: {answer})\n"  # a line of samples.md

# --------------------------------------------------------------------------------------------------
# asking


@dataclass
class Answer:
    """What the model answered to a question, and what is counted of it."""

    question: Question
    numbers: dict  # see judged; None: does not apply
    example: dict  # for the reader, all of the response with what tools showed
    failure: str = ""  # why its media could not be read


def evaluate(
    model: KeyeVL, processor: Processor, folder: str | Path, limit: int | None = None,
    mode: str = "plain", blind: bool = False, tasks: list[str] | None = None,
    max_tokens: int | None = None, rows: int | None = None, run=None,
) -> dict:
    """Answers the folder's questions greedily -> a dict that JSON can hold.

    limit: the first so many questions of each task. tasks: names of tasks or categories to ask.
    mode: "plain", the bare question, to which all that is said is the answer; or one of MODES,
    where tools run and the answer is what `parse` finds. max_tokens: of every answer. By default
    twice the longest true answer of its task in plain mode, in the others as `max_answer` says.
    rows: questions decoded at once (default: as Generator). run: all its ranks ask, each its share,
    and all get the result; RuntimeError on all where one of them cannot.

    predictions: a flat dict of each answer, its numbers and the reason of a failure, as pandas
    reads it; "shown" has for each call of tools the pictures that it showed, small, as data URLs.

    tasks, categories: {name: see summary}. headline: accuracy, blind and chance, each the mean over
    the tasks of HEADLINE that are there. mixed: the mean accuracy of the categories, all: the mean
    numbers (see judged) of the questions, thinking: the share of questions of each difficulty that
    were thought about, each without those of APART. failed: questions whose media could not be
    read, and why; they count as wrong. examples: three answers of each task. And questions (their
    number), seconds, mode.

    Questions of APART are always asked blind too, but in modes with tools, which show the pictures.
    """
    begin = time.time()
    if blind and mode in TOOL_MODES:
        raise ValueError(f"nothing is blind in {mode}: its tools show the pictures")
    max_tokens = max_tokens or (None if mode == "plain" else max_answer(model.config))

    def ask_share(rank=0, world=1):
        questions = read_questions(folder, limit, tasks)
        limits = token_limits(questions, processor.tokenizer, max_tokens)
        # Short answers are decoded beside short ones: a row of the cache is as long as the longest.
        questions.sort(key=lambda question: limits[question.task])
        # In turn: every rank gets as many short and long ones.
        answers = ask(Generator(model, processor, rows), questions[rank::world], limits, mode)
        if mode not in TOOL_MODES:
            unseen = [a for a in answers if blind or a.question.category in APART]
            ask_blind(Generator(model, Blindfold(processor), rows), unseen, limits, mode)
        return questions, answers

    answers = answers_of_all(run, ask_share) if run else ask_share()[1]
    return result_of(answers, mode) | {"seconds": round(time.time() - begin, 2)}


def ask_blind(blindfolded, answers, limits, mode):
    """Sets the number "blind" of those answers whose question shows something."""
    seeing = [answer for answer in answers if media_items(answer.question.record)]
    guesses = ask(blindfolded, [answer.question for answer in seeing], limits, mode)
    for answer, guess in zip(seeing, guesses):
        answer.numbers["blind"] = guess.numbers["accuracy"]


def answers_of_all(run, ask_share):
    """The answers of all ranks, in the order of the questions, on all ranks.

    ask_share(rank, world) -> all questions, answers to a share. RuntimeError on all where it fails.
    """
    questions, share = run.attempt("scoring", lambda: ask_share(run.rank, run.world))
    found = run.merge({a.question.where: (a.numbers, a.example, a.failure) for a in share})
    # Only where ranks read other files is one of them not found: all hear of it.
    return run.attempt("scoring", lambda: [Answer(q, *found[q.where]) for q in questions])


def token_limits(questions, tokenizer, max_tokens):
    """Tokens of an answer, by task: max_tokens, or twice those of its longest true answer and 4."""
    limits = defaultdict(int)
    for question in questions:
        truth = tokenizer.encode(text_of(question.record["messages"][-1]), added=True)
        limits[question.task] = max_tokens or max(limits[question.task], 2 * len(truth) + 4)
    return limits


def ask(generator, questions, limits, mode) -> list[Answer]:
    """One greedy answer to each question, in order. limits: see token_limits."""
    prompts = [Prompt(q.record, q.root, mode, seed=q.where) for q in questions]
    max_tokens = [limits[q.task] for q in questions]
    groups = sample_groups(generator, prompts, 1, max_tokens, temperature=0, keep_pixels=False)
    answers = []
    for question, prompt, group in zip(questions, prompts, groups):
        # Where media could not be read nothing is said, which is wrong.
        answer = judged(question, group[0] if group else Rollout(prompt, {}))
        answer.failure = prompt.failure
        answers.append(answer)
    return answers


def judged(question: Question, rollout: Rollout) -> Answer:
    """An answer and its numbers, to which facts_of adds.

    accuracy: 1 or 0, by the strict score. blind: the same without the pictures, for `evaluate` to
    set. chance: of being right by guessing. iou: of boxes and intervals. cer: the character error
    rate of texts.
    """
    meta = question.meta
    mode = rollout.prompt.mode
    parsed = parse(rollout.content, mode, rollout.response.finished)
    text = parsed.final or ""
    numbers = {
        "accuracy": score(text, meta),
        "blind": None,
        "chance": meta.get("chance", 0),
        "iou": grade(text, meta) if meta["verifier"] in ("box", "interval") else None,
        "cer": grade(text, meta) if meta["verifier"] == "text" else None,
        **facts_of(parsed, mode, rollout.response),
    }
    example = {
        "task": question.task,
        "question": text_of(question.record["messages"][-2]),
        "output": text_of({"content": rollout.content}),
        "answer": meta["answer"],
        "right": bool(numbers["accuracy"]),
        "where": question.where,
        "category": question.category,
        "difficulty": meta.get("difficulty", 1),
        "mode": mode,
        "shown": [[thumbnail(i) for i in o.images] for o in rollout.response.observations],
    }
    return Answer(question, numbers, example)


def facts_of(parsed: Parsed, mode: str, response: Response) -> dict:
    """What is counted of a response whatever its question; True is 1.

    tokens: written by the model. thought: it wrote <think>. obeyed: it did what was asked for, an
    analysis in auto_think alone, and thinking where the mode or the analysis says so. format: its
    form is broken. repetitive: a share of more than REPEATED is repetition. calls and failed_calls:
    of tools.
    """
    thought = "<think>" in parsed.own
    analysed = "<analysis>" in parsed.own
    obeyed = bool(parsed.chose and parsed.own)
    obeyed &= thought == (parsed.chose != "no_think")
    obeyed &= analysed == (mode == "auto_think")
    return {
        "tokens": sum(response.sampled),
        "thought": thought,
        "obeyed": obeyed,
        "format": bool(parsed.errors),
        "repetitive": repetition(parsed.own) > REPEATED,
        "calls": len(response.observations),
        "failed_calls": sum(not seen.ok for seen in response.observations),
    }


class Blindfold:
    """A processor to whom every pixel is mid-grey. The words and all sizes stay."""

    def __init__(self, processor):
        self.processor = processor
        self.tokenizer = processor.tokenizer

    def __call__(self, conversation, root, generate):
        sample = self.processor(conversation, root, generate=generate)
        return sample | {"patches": torch.full_like(sample["patches"], 128)}


# --------------------------------------------------------------------------------------------------
# counting


def wilson(hits: float, n: int) -> tuple[float, float]:
    """95 % interval of a share: Wilson's, which holds at 0 and 1 too."""
    z = 1.96
    middle = hits + z**2 / 2
    half = z * math.sqrt(hits * (n - hits) / n + z**2 / 4)
    return max(0.0, (middle - half) / (n + z**2)), min(1.0, (middle + half) / (n + z**2))


def mean(values):
    """Of those values that are not None; None where none is left."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def means(answers):
    """The mean of each of the answers' numbers."""
    names = answers[0].numbers
    return {name: mean(answer.numbers[name] for answer in answers) for name in names}


def summary(answers):
    """Of a task or a category: n, failed, mean numbers, and the accuracy's 95 % interval low..high.

    blind is None where nothing was to be seen. failed: questions whose media could not be read.
    """
    n = len(answers)
    numbers = means(answers)
    low, high = wilson(numbers["accuracy"] * n, n)
    return {
        "category": answers[0].question.category,
        "n": n,
        "low": low,
        "high": high,
        "failed": sum(bool(answer.failure) for answer in answers),
        **numbers,
    }


def summaries(answers, key):
    """{value: summary} of the answers whose question's meta has this value; values in order."""
    groups = defaultdict(list)
    for answer in answers:
        value = answer.question.meta.get(key, 1)  # 1: a difficulty that is not given
        groups[str(value)].append(answer)
    return {value: summary(groups[value]) for value in sorted(groups)}


def result_of(answers, mode):
    """What `evaluate` returns."""
    tasks = summaries(answers, "task")
    categories = summaries(answers, "category")
    common = [answer for answer in answers if answer.question.category not in APART]
    levels = summaries(common, "difficulty")
    headline = [tasks[task] for task in HEADLINE if task in tasks]
    return {
        "mode": mode,
        "questions": len(answers),
        "tasks": tasks,
        "categories": categories,
        "headline": {
            name: mean(numbers[name] for numbers in headline)
            for name in ("accuracy", "blind", "chance")
        },
        "mixed": mean(
            numbers["accuracy"] for name, numbers in categories.items() if name not in APART
        ),
        "all": means(common or answers),
        "thinking": {level: numbers["thought"] for level, numbers in levels.items()},
        "failed": [
            {"where": a.question.where, "reason": a.failure} for a in answers if a.failure
        ],
        "examples": [answer.example for answer in first_of_tasks(answers)],
        "predictions": [a.example | a.numbers | {"failure": a.failure} for a in answers],
    }


def first_of_tasks(answers):
    """Three answers of each task, the tasks in order of their names."""
    by_task = defaultdict(list)
    for answer in answers:
        by_task[answer.question.task].append(answer)
    return [answer for task in sorted(by_task) for answer in by_task[task][:3]]


# --------------------------------------------------------------------------------------------------
# tables


def failures_of(result: dict) -> list[str]:
    """Where and why, of the questions that could not be asked."""
    return ["{where}: {reason}".format_map(failure) for failure in result["failed"]]


def percent(value):
    return "" if value is None else f"{100 * value:.1f}"


def board(rows: list[tuple[str, dict]]) -> str:
    """Markdown, a line for each named result, as of a phase in a mode.

    Accuracy by category in % and their mean (mixed); then that of the categories of APART, blind
    and by chance behind it; the mean facts: tokens and calls of a question, the rest in %; the
    share of questions of each difficulty that were thought about; and how many questions failed, as
    their media could not be read.
    """
    found = set().union(*(result["categories"] for _, result in rows))
    categories = sorted(found.difference(APART))
    apart = [name for name in APART if name in found]
    levels = sorted(set().union(*(result["thinking"] for _, result in rows)))
    thinks = [f"thinks at {level}" for level in levels]
    titles = [f"{name} (blind, chance)" for name in apart]
    table = [["phase and mode", *categories, "mixed", *titles, *FACTS, *thinks, "failed"]]
    for name, result in rows:
        by_category = [result["categories"].get(category, {}) for category in categories]
        table.append([
            name,
            *(percent(found.get("accuracy")) for found in by_category),
            percent(result["mixed"]),
            *(beside_chance(result["categories"].get(name)) for name in apart),
            *(form.format_map(result["all"]).rstrip("%") for form in FACTS.values()),
            *(percent(result["thinking"].get(level)) for level in levels),
            str(len(result["failed"])),
        ])
    return markdown(table)


def beside_chance(numbers: dict | None) -> str:
    """The accuracy of a category of APART, and in brackets blind (-: not asked) and by chance."""
    if numbers is None:
        return ""
    blind = percent(numbers["blind"]) or "-"
    return f"{percent(numbers['accuracy'])} ({blind}, {percent(numbers['chance'])})"


def task_table(result: dict) -> str:
    """Markdown, a line for each task below its category: one result in detail.

    How many questions there were, and failed, as their media could not be read: they count as
    wrong. Accuracy in % and half its 95 % interval, accuracy without the pictures, and chance. The
    last line, the headline, is the mean over the tasks of HEADLINE.
    """
    table = [["task", "n", "failed", "accuracy %", "blind %", "chance %"]]
    for category, whole in result["categories"].items():
        table.append(task_line(f"**{category}**", whole))
        for task, numbers in result["tasks"].items():
            if numbers["category"] == category:
                table.append(task_line(task, numbers))
    headline = result["headline"]
    if headline["accuracy"] is not None:
        table.append(["**headline**", "", "", *map(percent, headline.values())])
    return markdown(table)


def task_line(label, numbers):
    half = percent((numbers["high"] - numbers["low"]) / 2)
    return [
        label,
        str(numbers["n"]),
        str(numbers["failed"]),
        f"{percent(numbers['accuracy'])} ± {half}",
        percent(numbers["blind"]),
        percent(numbers["chance"]),
    ]


def markdown(table):
    """A table that can be read without a renderer: the first column left, the others right."""
    widths = [max(2, *map(len, column)) for column in zip(*table)]  # "-:" at least
    rule = ["-" * widths[0], *(":".rjust(width, "-") for width in widths[1:])]
    lines = []
    for first, *others in [table[0], rule, *table[1:]]:
        cells = [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# phases of a run


def score_phase(run, heldout: Path, modes: list[str], limit: int, blind: bool = False) -> dict:
    """The held-out score of run.folder/"model" in each mode -> {mode: result}, {} on other ranks.

    All ranks ask, each its share. Rank 0 says the board, and leaves a page of answers, samples.md,
    and all of them, predictions.jsonl, beside the model. SystemExit after that where many questions
    could not be asked: this is no score to keep. RuntimeError on all ranks where one of them cannot
    load the model, or ask.
    """
    if not all(run.gather_objects(heldout.is_dir())):
        run.say(f"{heldout}: no held-out score")
        return {}
    folder = run.folder / "model"
    # Weights in the dtype of the computation: 8b's in fp32 would leave no room for its cache.
    doing = f"loading {folder}"
    model = run.attempt(doing, lambda: KeyeVL.from_pretrained(folder, run.dtype, run.device))
    processor = run.attempt(doing, lambda: Processor.from_pretrained(folder))
    results = {
        mode: evaluate(model, processor, heldout, limit, mode, blind, run=run) for mode in modes
    }
    return show_scores(run, results, blind) if run.main else {}


def show_scores(run, results, blind):
    """What rank 0 says and writes of a phase's results -> the same without the answers."""
    page = f"# {run.stage}: answers to held-out questions\n"
    predictions = []
    for mode in results:
        page += f"\n## {mode}\n\n"
        predictions += results[mode].pop("predictions")
        for example in results[mode].pop("examples"):
            page += SAMPLE.format_map(example)
        if blind:
            run.say(task_table(results[mode]))
    # backslashreplace: a lone surrogate, which no file in UTF-8 can hold, is written as \ud800
    (run.folder / "samples.md").write_text(page, encoding="utf-8", errors="backslashreplace")
    write_lines(run.folder / "predictions.jsonl", predictions)
    run.say(board([(f"{run.stage} {mode}", result) for mode, result in results.items()]))
    failures = failures_of(results[mode])  # the same in every mode
    refuse_many(failures, results[mode]["questions"], "held-out questions")
    if failures:
        run.say(counted(failures, results[mode]["questions"], "held-out questions"))
    return results


def phases(folder):
    """The board's rows for a run's finished phases, in each mode."""
    rows = []
    for phase in PHASES:
        path = folder / phase / "score.json"
        if path.exists():
            try:
                results = json.loads(path.read_text()).items()
            except (ValueError, AttributeError) as e:
                raise ValueError(f"{path}: no scores: {e}") from None
            rows += [(f"{phase} {mode}", result) for mode, result in results]
    return rows


# --------------------------------------------------------------------------------------------------
# published benchmarks


def ask_exam(exam: Exam, rows: list, generator, max_tokens: int, answers: AnswerFile, bar: tqdm):
    """Greedy answers to the rows; a failure where media cannot be decoded."""
    samples, asked, patches = [], [], 0
    for row in rows:
        try:
            conversation = exam.conversation(row)
            samples.append(generator.processor(conversation, exam.root, generate=True))
        except (MediaError, ValueError) as e:
            answers.write({"index": row.cells["index"], "failure": str(e)})
            bar.update()
            continue
        look = partial(pictures_of, conversation, exam.root) if exam.mode in TOOL_MODES else None
        asked.append((row, look))
        patches += len(samples[-1]["patches"])
        if len(samples) >= CHUNK_ROLLOUTS or patches > CHUNK_PATCHES:
            answer(generator, samples, asked, max_tokens, answers, bar)
            samples, asked, patches = [], [], 0
    if samples:
        answer(generator, samples, asked, max_tokens, answers, bar)


def answer(generator, samples, asked, max_tokens, answers, bar):
    """Each answer is written as soon as it ends. asked: of each sample its row and pictures."""
    tokenizer = generator.processor.tokenizer
    tools = tool_turns(generator, [look for _, look in asked])

    def extend(state):
        sample = tools(state)
        if sample is None or state.left <= 0:  # the answer has ended
            response = state.response
            own = [token for token, by_model in zip(response.ids, response.sampled) if by_model]
            reply = tokenizer.decode(own, skip_special=True)
            index = asked[state.index][0].cells["index"]
            answers.write({"index": index, "prediction": final_answer(reply), "reply": reply})
            bar.update()
        return sample

    stop = [tokenizer.special[CLOSE_CALL]]
    how = dict(stop=stop, ends=code_ends(tokenizer), extend=extend)
    generator.sample(samples, max_tokens, 0, 0, 1.0, seed=0, **how)


def ask_model(args, peers: Peers, name: str, rows: list, path: Path):
    """Has the model of --init answer those rows that the file at `path` has no answers to: of
    several ranks each has its share, and a file of its own, which the first one takes in."""
    mode = args.mode[0] if args.mode else "plain"
    if args.blind and mode in TOOL_MODES:
        raise ValueError(f"nothing is blind in {mode}: its tools show the pictures")
    root = Path(args.media or Path(args.file).parent)
    exam = Exam(name, rows, root, mode, args.frames, args.shuffle_frames)
    wanted = first_groups(BENCHMARKS[name], rows, args.limit)
    mine = wanted[peers.rank :: peers.world]
    attempt(peers, "not asked", lambda: list(map(exam.check, mine)))
    model, processor = load(args.init, args.device)
    max_tokens = args.max_new_tokens or max_answer(model.config)
    settings = settings_of_answers(args, name, mode, max_tokens)
    if args.blind:
        processor = Blindfold(processor)

    first = attempt(peers, f"{path}", lambda: peers.main and AnswerFile(path, settings, rows))
    [done, *_] = peers.gather_objects(set(first.done) if first else None)
    todo = [row for row in wanted if row.index not in done][peers.rank :: peers.world]

    def ask_share():
        answers = first or AnswerFile(Path(of_rank(path, peers.rank)), settings, rows)
        with tqdm(total=len(todo), desc=name, disable=not peers.main) as bar:
            ask_exam(exam, todo, Generator(model, processor, args.batch), max_tokens, answers, bar)
        if not first:
            answers.file.close()

    attempt(peers, "not all asked", ask_share)
    if first:
        first.take_in()
        first.file.close()


def settings_of_answers(args, name, mode, max_tokens) -> dict:
    """What must be the same where answers are kept in one file."""
    return {
        "benchmark": name,
        "file": sha256(Path(args.file)),
        "model": fingerprint(Path(args.init)),
        "mode": mode,
        "blind": bool(args.blind),
        "frames": args.frames if BENCHMARKS[name].video else None,
        "shuffle_frames": args.shuffle_frames,
        "max_new_tokens": max_tokens,
        "sandbox": args.sandbox if mode in TOOL_MODES else None,
    }


def joined(args) -> Peers:
    """This process among torchrun's, each with its GPU; alone without it. Words are all that
    passes between them."""
    if "RANK" in os.environ:
        args.dtype = "auto"
        args.device = str(pick_device(args))
        join_processes(torch.device("cpu"))
    return Peers("words")


def attempt(peers: Peers, doing: str, work):
    """work() on all ranks. ValueError on all where one of them fails."""
    if peers.world == 1:
        return work()
    try:
        return peers.attempt(doing, work)
    except RuntimeError as e:
        raise ValueError(str(e)) from None


def judge_of(args) -> Judge | None:
    if not args.judge:
        return None
    return Judge(args.judge, args.judge_model, os.environ.get("JUDGE_KEY", ""))


def check_scorable(args, name):
    """ValueError where there could be no score once the model has answered."""
    if args.shuffle_frames and not BENCHMARKS[name].video:
        raise ValueError(f"--shuffle-frames: {name} has pictures, no clips")
    if args.limit and name == "MME":
        raise ValueError("--limit: MME's sums need all of its categories")
    judge = judge_of(args)
    if judge:
        said, why = judge.reply([{"role": "user", "content": "Reply with Yes."}], temperature=0)
        if said is None:
            raise ValueError(f"--judge {' '.join(args.judge)}: no answer: {why}")


def benchmark_result(args, name: str, rows: list, dropped: set, path: Path) -> dict:
    """What --out holds: the official table, and what was read of each answer."""
    benchmark = BENCHMARKS[name]
    judge = judge_of(args)
    if benchmark.judge == NO_SCORE and not judge:
        raise ValueError(f"{name} has no score without a judge: --predictions {path} --judge URL")
    answers = read_predictions(path, rows, dropped, args.split_think)
    scored = score_rows(benchmark, rows, answers, args.rules, judge)
    asked = [s.by for s in scored]
    by = Counter(filter(None, asked))
    failed = [s.row.where for s in scored if answers[s.row.index] is None]
    notes = []
    if dropped:
        notes.append(f"{len(dropped)} rows without a picture are left out, as by official code")
    if len(scored) < len(rows):
        notes.append(f"{len(rows) - len(scored)} of {len(rows)} questions have no answer")
    if failed:
        notes.append(f"{counted(failed, len(rows), 'questions')}; they count as wrong")
    if judge and judge.failed:
        why = f"the judge failed in {dict(judge.failed)} of {judge.asked} requests"
        if by["no reply"] and not by["judge"]:
            if benchmark.judge == NO_SCORE:
                raise ValueError(f"{name} has no score: {why}")
            why += "; it is left out, as official code does with one that does not work"
            judge, scored = None, score_rows(benchmark, rows, answers, args.rules)
            for s, who in zip(scored, asked):
                s.by = who
        notes.append(why)
    if benchmark.judge and not judge:
        notes.append(f"without a judge this is {benchmark.judge}")
    return {
        "benchmark": name,
        "rules": args.rules,
        "judge": args.judge_model or args.judge,
        "notes": notes,
        "read by": by,
        "failed": failed,
        "scores": benchmark.table(scored),
        "rows": [
            {"index": s.row.cells["index"], "read": s.read, "hit": s.hit, "by": s.by} | s.more
            for s in scored
        ],
    }


def flat(scores: dict, above: str = "") -> list[list[str]]:
    """A table of any depth as lines: name and value."""
    lines = []
    for key, value in scores.items():
        name = f"{above}{key}"
        if isinstance(value, dict):
            lines += flat(value, f"{name}, ")
        else:
            lines.append([name, f"{value:.4f}" if isinstance(value, float) else str(value)])
    return lines


def run_benchmark(args):
    """--benchmark: the model's answers, if one is named, and the table of all answers."""
    peers = joined(args)
    name = official_name(args.benchmark)
    beside = Path(args.out).with_suffix("") if args.out else Path(name)
    path = Path(args.predictions or f"{beside}.predictions.jsonl")
    if args.out:
        check_out(Path(args.out), args.file, path)
    rows, dropped = read_rows(Path(args.file), BENCHMARKS[name])
    if args.init:
        attempt(peers, "not asked", lambda: check_scorable(args, name))
        ask_model(args, peers, name, rows, path)
    if not peers.main:
        return
    result = benchmark_result(args, name, rows, dropped, path)
    print(markdown([[name, "score"], *flat(result["scores"])]))
    print("answers read by:", ", ".join(f"{who} {n}" for who, n in result["read by"].items()))
    for note in result["notes"]:
        print(f"note: {note}")
    if args.out:
        with replacing(Path(args.out)) as part:
            part.write_text(json.dumps(result, indent=1) + "\n")
    hits = [row["hit"] for row in result["rows"]]
    print(f"{name}: {len(hits)} of {len(rows)} questions answered, mean hit {mean(hits):.4f}")
    if len(result["failed"]) == len(hits):
        raise ValueError(f"{args.file}: none of the questions could be asked")


def decontaminate(args):
    """Prints which training lines share pictures or words with the questions of --file."""
    root = Path(args.media or Path(args.file).parent)
    sets = data_files(Path(args.decontaminate))
    if not sets:
        raise ValueError(f"--decontaminate {args.decontaminate}: no folder with data to compare")
    overlap = Overlap(read_rows(Path(args.file), ANY)[0], root)
    lines = shared = 0
    for path in sets.values():
        data = Lines(path, check_conversation)
        for i, record in enumerate(data):
            lines += 1
            try:
                found = overlap.of(record, data.root)
            except MediaError as e:
                print(f"{data.where(i)}: not compared: {e}")
                continue
            shared += bool(found)
            for what, rows in found.items():
                more = f", and of {len(rows) - 1} more" if len(rows) > 1 else ""
                print(f"{data.where(i)}: {what} of {rows[0].where}, index {rows[0].index}{more}")
    print(
        f"{shared} of {lines} lines share something; not compared: clips, "
        f"{overlap.short} of {len(overlap.rows)} questions (of fewer than {RUN} words), "
        f"{overlap.flat} of {overlap.pictures} pictures (flat)"
    )


# --------------------------------------------------------------------------------------------------
# command line


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--init", help="folder of a model, ours or official")
    what.add_argument("--board", metavar="RUN", help="print the board of a run's phases, and write "
        "RUN/scoreboard.md")
    what.add_argument("--report", metavar="RUN", help="write RUN/report.html and RUN/phases.svg, "
        "which the stages write when they end")
    what.add_argument("--decontaminate", metavar="FOLDER", help="list which training lines share "
        "pictures or words with the questions of --file")
    add = parser.add_argument
    add("--data", default="data/toy/heldout",
        help="folder of *.jsonl questions, or one that holds it as heldout")
    add("--limit", type=at_least(1), help="questions per task; of a benchmark its first so many, "
        "with all their rotations (default: all)")
    add("--categories", nargs="+", metavar="NAME", help="categories or tasks to ask (default: all)")
    add("--mode", nargs="+", choices=MODES, metavar="MODE", help="ask in these modes: "
        f"{', '.join(MODES)} (default: the bare question)")
    add("--blind", action=argparse.BooleanOptionalAction, help="also answer without the pictures "
        "(default: only where no mode is named)")
    add("--batch", type=at_least(1), help="questions decoded at once (default: 64, on CUDA 512)")
    add("--max-new-tokens", type=at_least(1), help="of every answer (default: twice the longest "
        "true answer of its task; in a mode 192 for small models, else 2048)")
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    add_sandbox_argument(parser)
    add("--out", help="write {mode: result}, or a benchmark's table and rows, to this JSON file")
    add("--answers", metavar="JSONL", help="write all answers to held-out questions, a line each")
    add_benchmark_arguments(parser.add_argument_group("published benchmarks"))
    return parser


def add_benchmark_arguments(group):
    add = group.add_argument
    add("--benchmark", metavar="NAME", help=f"{', '.join(BENCHMARKS)}")
    add("--file", metavar="TSV", help="its questions, in VLMEvalKit's form")
    add("--predictions", metavar="JSONL", help="answers to score; with --init also where they are "
        "kept (default: beside --out, or NAME.predictions.jsonl)")
    add("--media", metavar="FOLDER", help="pictures and clips that are files (default: that of "
        "--file)")
    add("--rules", choices=["upstream", "keye"], default="upstream", help="VLMEvalKit's, or those "
        "of Keye's fork of it, where they differ")
    add("--split-think", action="store_true", help="of answers to score, keep what follows "
        "</think>")
    add("--frames", type=at_least(1), default=8, help="of a clip")
    add("--shuffle-frames", action="store_true", help="show a clip's frames in any order")
    add_judge_arguments(group)


MODEL_FLAGS = "limit mode blind batch max_new_tokens sandbox media frames shuffle_frames"
BENCHMARK_FLAGS = "file predictions rules split_think judge judge_model media frames shuffle_frames"


def check_flags(parser, args):
    """Ends with the parser's message where flags do not go together, or none says what to do."""

    def refuse(names, why):
        for name in names.split():
            if getattr(args, name) != parser.get_default(name):
                parser.error(f"--{name.replace('_', '-')} {why}")

    if args.decontaminate:
        refuse("answers out data categories benchmark", "does not go with --decontaminate")
        if not args.file:
            parser.error("--decontaminate needs --file")
        return
    if not args.benchmark:
        refuse(BENCHMARK_FLAGS, "goes with --benchmark NAME")
        if not args.init and not args.board and not args.report:
            parser.error("one of --init, --board, --report, --benchmark, --decontaminate is needed")
        return
    refuse("answers board report data categories", "does not go with --benchmark")
    if not args.file or not (args.init or args.predictions):
        parser.error("--benchmark needs --file, and --init or --predictions")
    if not args.init:
        refuse(MODEL_FLAGS, "asks a model: name it with --init")
    if args.mode and len(args.mode) > 1:
        parser.error("--benchmark takes one --mode")


def check_out(out: Path, *read, flag: str = "--out"):
    """SystemExit where results cannot be written, or would be read later: said before all answers.

    read: files, and folders of files, that are read.
    """
    place = out.resolve()
    for path in map(Path, read):
        is_data = place.parent == path.resolve() and data_name(place) != place.name
        if is_data or place == path.resolve():
            raise SystemExit(f"{flag} {out}: in or as {path} it would be read; name another place")
    try:
        if out.exists():
            open(out, "a").close()
        else:  # not under its own name, as all ranks try at once
            tempfile.TemporaryFile(dir=out.parent).close()
    except OSError as e:
        raise SystemExit(f"{flag} {out}: {e.strerror}") from None


def show_report(args):
    """Writes the page of a run, and says so."""
    root = Path(args.report)
    if not root.is_dir():
        raise SystemExit(f"{root}: no such folder")
    print(write_report(root))


def show_board(args):
    """Prints the board of a run's phases, and writes scoreboard.md beside them."""
    root = Path(args.board)
    rows = phases(root)
    if not rows:
        raise SystemExit(f"{root}: no phase ({', '.join(PHASES)}) with a score.json here")
    table = board(rows)
    (root / "scoreboard.md").write_text(table + "\n", encoding="utf-8")
    print(table)


def score_questions(args):
    """Held-out questions in each mode: tables, and the files that --out and --answers name."""
    data = Path(args.data)
    if (data / "heldout").is_dir():  # the folder that training takes
        data /= "heldout"
    if args.out:
        check_out(Path(args.out), args.data, data)
    if args.answers:
        check_out(Path(args.answers), args.data, data, flag="--answers")
    blind = not args.mode if args.blind is None else args.blind
    peers = joined(args)
    model, processor = load(args.init, args.device)
    run = peers if peers.world > 1 else None
    results = {}
    for mode in args.mode or ["plain"]:
        try:
            results[mode] = evaluate(
                model, processor, data, args.limit, mode, blind,
                args.categories, args.max_new_tokens, args.batch, run,
            )
        except RuntimeError as e:
            if run:  # it says whose it is
                raise SystemExit(str(e)) from None
            raise
        if peers.main:
            print(f"{mode}:\n\n{task_table(results[mode])}\n")
    if not peers.main:
        return
    print(board(list(results.items())))
    failures = failures_of(results[mode])  # the same in every mode
    for failure in failures:
        print(f"failed, counted as wrong: {failure}")
    predictions = [row for result in results.values() for row in result.pop("predictions")]
    if args.out:
        Path(args.out).write_text(json.dumps(results, indent=1) + "\n")
    if args.answers:
        write_lines(args.answers, predictions)
    refuse_many(failures, results[mode]["questions"], "questions")


def main(argv=None):
    parser = arguments()
    args = parser.parse_args(argv)
    check_flags(parser, args)
    use_sandbox(args.sandbox)
    sys.stdout.reconfigure(errors="backslashreplace")  # what a terminal cannot show ends no run
    if args.board:
        work = show_board
    elif args.report:
        work = show_report
    elif args.benchmark:
        work = run_benchmark
    elif args.decontaminate:
        work = decontaminate
    else:
        work = score_questions
    with or_exit():
        work(args)


if __name__ == "__main__":
    main()
