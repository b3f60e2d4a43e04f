"""Held-out score: greedy answers to questions with known truth, next to a blind score and chance.

    python evaluate.py --init runs/toy/pretrain/model --data data/toy/heldout
    python evaluate.py --init runs/toy/grpo/model --mode think auto_think    in the modes that the cold start taught
    python evaluate.py --board runs/toy                                     the scoreboard of all phases that are done

A question is a JSONL line with one answer and "meta": {"task", "category", "answer", "verifier", "chance"}, and "box"
or "boxes" where points are asked for. Blind: every picture and frame is mid-grey and of the same size, so the prompt
and its length stay; what is answered then comes from the words alone.
"""
import argparse
import json
import math
import time
from collections import defaultdict
from pathlib import Path

import torch

from data import MediaError, Processor, asked, check_conversation, pictures_of, text_lines, text_of
from generate import Generator, converse, load, longest_answer
from model import KeyeVL
from rewards import MODES, REPEATED, TOOLS, grade, parse, repetition, score, turn_of

HEADLINE = ["colour", "shape", "count", "position", "motion"]
ROUGH = {"box": "iou", "interval": "iou", "text": "cer"}  # verifier -> name of its graded measure
PHASES = ["pretrain", "sft", "mpo", "coldstart", "grpo", "align"]  # folders of a run, in order

# ---------------------------------------------------------------------------------------------------------------------
# the benchmark


def wilson(hits: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share: Wilson's, which holds at 0 and 1 too."""
    if n == 0:
        return 0.0, 1.0
    p, q = hits / n, z * z / n
    middle, half = (p + q / 2) / (1 + q), z * math.sqrt(p * (1 - p) / n + q / n / 4) / (1 + q)
    return max(0.0, middle - half), min(1.0, middle + half)


def read_questions(folder: str | Path, limit: int | None = None, tasks: list[str] | None = None) -> list[dict]:
    """The folder's questions: the first `limit` of each task; tasks: names of tasks or categories. Each has "where"."""
    folder, kept, names, seen = Path(folder), [], set(), defaultdict(int)
    if not (files := sorted(folder.glob("*.jsonl"))):
        raise ValueError(f"{folder}: no *.jsonl files with questions here")
    for path in files:
        for number, text in text_lines(path):
            try:
                line = json.loads(text)
                check_conversation(line)
                meta = line["meta"]
                task, category = meta["task"], meta["category"]
                if line["messages"][-1]["role"] != "assistant" or len(line["messages"]) < 2:
                    raise ValueError("the last of at least two messages must be the assistant's")
                score("0", meta)  # a truth that cannot be read is an error now
            except (KeyError, TypeError, ValueError) as e:
                raise ValueError(f"{path}:{number}: not a question with a known answer: {type(e).__name__}: {e}") from e
            names |= {task, category}
            if tasks is None or task in tasks or category in tasks:
                seen[task] += 1
                if limit is None or seen[task] <= limit:
                    kept.append(line | {"where": f"{path}:{number}"})
    if odd := set(tasks or []) - names:
        raise ValueError(f"{folder} has no task or category {sorted(odd)[0]!r}; there are {', '.join(sorted(names))}")
    return kept


def evaluate(model, processor, folder, limit=None, blind=True, batch=64, tasks=None, max_new_tokens=None,
             mode=None) -> dict:
    """Answers the folder's questions greedily, `batch` at a time -> a dict that json can write:

    tasks, categories: {name: {n, accuracy, low, high (95 %), blind, chance, failed, mean_iou or mean_cer, and what `facts`
    counts}}; blind is None where nothing is to be seen. headline: the mean over colour, shape, count, position and
    motion, as far as present. mixed: the mean over categories. all: facts over all questions. thinking: the share of
    questions of each difficulty that were thought about. failed: questions whose media could not be read, with the
    reason; they count as wrong. examples: three per task.

    mode: think, no_think, auto_think or agentic_think: the switch is put behind the question (auto_think needs none),
    tools run, and the answer is what `parse` finds. None: the bare question, all that is said is the answer.
    max_new_tokens: of every answer; by default twice the longest true answer of the task, in a mode 192 for small models
    and else 2,048 (Keye's own).
    """
    begin, generator = time.time(), Generator(model, processor, rows=batch)
    questions, room = read_questions(folder, limit, tasks), defaultdict(int)
    for q in questions:
        task, truth = q["meta"]["task"], processor.tokenizer.encode(text_of(q["messages"][-1]), added=True)
        room[task] = max(room[task], 2 * len(truth) + 4)
    if mode:
        max_new_tokens = max_new_tokens or longest_answer(model.config)
    questions.sort(key=lambda q: room[q["meta"]["task"]])
    done, failed, unseen = defaultdict(list), [], {}
    for start in range(0, len(questions), 8 * batch):  # 8: enough to sort, few enough to hold their pixels
        ready = []
        for q in questions[start : start + 8 * batch]:
            prompt = {"messages": asked(q, mode) if mode else q["messages"][:-1]}
            try:
                ready.append((q, processor(prompt, folder, generate=True)))
            except (MediaError, ValueError) as e:
                failed.append({"where": q["where"], "reason": str(e)})
                blank = 0.0 if blind and has_media(q) else None
                done[q["meta"]["task"]].append((q, "", 0.0, blank, None, facts([], mode or "no_think", False, 0) | {"obeyed": 0.0}))
        ready.sort(key=lambda x: (room[x[0]["meta"]["task"]], len(x[1]["tokens"])))
        limits = [max_new_tokens or room[q["meta"]["task"]] for q, _ in ready]
        told = respond(generator, ready, limits, folder, mode)
        guesses = blind_answers(generator, [s for _, s in ready], limits, unseen) if blind else [None] * len(ready)
        for (q, _), (text, fact), guess in zip(ready, told, guesses):
            meta = q["meta"]
            rough = grade(text, meta) if meta["verifier"] in ROUGH else None
            blank = None if guess is None else score((parse(guess, mode).final or "") if mode else guess, meta)
            done[meta["task"]].append((q, text, score(text, meta), blank, rough, fact))

    by_category = defaultdict(list)
    for rows in done.values():
        by_category[rows[0][0]["meta"]["category"]] += rows
    bad = {f["where"] for f in failed}
    order = sorted(done, key=lambda t: (done[t][0][0]["meta"]["category"], t))
    result = {"tasks": {t: summary(done[t], bad) for t in order},
              "categories": {c: summary(rows, bad) for c, rows in sorted(by_category.items())},
              "headline": {}, "questions": len(questions), "seconds": round(time.time() - begin, 2), "failed": failed}
    for key in ("accuracy", "blind", "chance"):
        known = [result["tasks"][t][key] for t in HEADLINE if t in result["tasks"]]
        known = [v for v in known if v is not None]
        result["headline"][key] = mean(known)
    everything = [row for rows in done.values() for row in rows]
    result |= {"mode": mode, "mixed": mean([c["accuracy"] for c in result["categories"].values()]),
               "all": means([row[5] for row in everything])}
    by_difficulty = defaultdict(list)
    for q, *_, fact in everything:
        by_difficulty[str(q["meta"].get("difficulty", 1))].append(fact["thought"])
    result["thinking"] = {k: mean(v) for k, v in sorted(by_difficulty.items())}
    result["examples"] = [{"task": t, "question": text_of(q["messages"][-2]), "output": fact["said"],
                           "answer": q["meta"]["answer"], "right": bool(right), "where": q["where"]}
                          for t in result["tasks"] for q, text, right, _, _, fact in done[t][:3]]
    return result


def mean(values):
    return sum(values) / len(values) if values else None


def means(rows: list[dict]) -> dict:
    """Of the numbers in each of the dicts."""
    return {k: mean([r[k] for r in rows]) for k in (rows[0] if rows else {}) if k != "said"}


def respond(generator, ready, limits, folder, mode) -> list[tuple[str, dict]]:
    """Greedy answers to (question, sample)s: the final answer and its facts."""
    samples, tokenizer = [s for _, s in ready], generator.processor.tokenizer
    if mode in TOOLS:
        pictures = [lambda q=q: pictures_of({"messages": q["messages"][:-1]}, folder) for q, _ in ready]
        rows = converse(generator, samples, pictures, limits, temperature=0)
    else:
        rows = generator.sample(samples, limits, temperature=0)
    out = []
    for row in rows:
        said = turn_of(row, tokenizer)
        fact = facts(said, mode or "no_think", row["finished"], sum(row["sampled"]), row.get("observations", ()))
        final = parse(said, mode).final if mode else text_of({"content": said})
        out.append((final or "", fact))
    return out


def facts(said: list[dict], mode: str, finished: bool, tokens: int, observations=()) -> dict:
    """What is counted of a turn beside its answer: tokens written, whether it thought, obeyed (did what the switch asks
    for: an analysis in auto_think alone, and thinking where the mode or the analysis says so), broke the form (format),
    repeated itself (repetitive: a share of more than REPEATED), called tools, and failing calls; said: the text."""
    p = parse(said, mode, finished)
    thought, analysed = "<think>" in p.own, "<analysis>" in p.own
    obeyed = p.chose is not None and analysed == (mode == "auto_think") and thought == (p.chose != "no_think")
    return {"tokens": tokens, "thought": float(thought), "obeyed": float(obeyed), "format": float(bool(p.errors)),
            "repetitive": float(repetition(p.own) > REPEATED), "calls": float(len(observations)),
            "failed_calls": float(sum(not o.ok for o in observations)), "said": text_of({"content": said})}


def has_media(question: dict) -> bool:
    contents = [m["content"] for m in question["messages"]]
    return any(part["type"] != "text" for c in contents if isinstance(c, list) for part in c)


def blind_answers(generator, samples, limits, known: dict) -> list[str | None]:
    """Answers with all pixels mid-grey, None for a sample without pictures. Equal words and sizes are answered once:
    known keeps them."""
    key = lambda s, limit: (tuple(s["tokens"].tolist()), tuple(s["grids"].flatten().tolist()), limit)
    keys = [key(s, m) if len(s["grids"]) else None for s, m in zip(samples, limits)]
    new = {k: s | {"patches": torch.full_like(s["patches"], 128)}
           for k, s in zip(keys, samples) if k is not None and k not in known}
    rows = generator.sample(list(new.values()), [k[-1] for k in new], temperature=0)
    known.update(zip(new, (generator.processor.tokenizer.decode(row["ids"], skip_special=True) for row in rows)))
    return [known.get(k) for k in keys]


def summary(rows: list, bad: set) -> dict:
    """Of (question, text, right, blind right or None, graded measure or None, facts)."""
    n, metas = len(rows), [q["meta"] for q, *_ in rows]
    hits, blind = sum(r[2] for r in rows), [r[3] for r in rows if r[3] is not None]
    low, high = wilson(hits, n)
    out = {"category": metas[0]["category"], "n": n, "accuracy": hits / n, "low": low, "high": high,
           "blind": sum(blind) / len(blind) if blind else None, "chance": sum(m.get("chance", 0) for m in metas) / n,
           "failed": sum(q["where"] in bad for q, *_ in rows)} | means([r[5] for r in rows])
    kinds = {ROUGH.get(m["verifier"]) for m in metas}
    measured = [r[4] for r in rows if r[4] is not None]
    if len(kinds) == 1 and kinds != {None} and measured:  # one measure for all of them
        out["mean_" + kinds.pop()] = sum(measured) / len(measured)
    return out


def scoreboard(rows: list[tuple[str, dict]], short=False) -> str:
    """Markdown: a line per task under its category, accuracy in % with half its 95 % interval for each named result,
    blind and chance (of the last result that has the task), and the headline. short: only what the headline is made of
    and the categories."""
    percent = lambda v: "" if v is None else f"{100 * v:.1f}"
    spread = lambda s: "" if s is None else f"{percent(s['accuracy'])} ± {50 * (s['high'] - s['low']):.1f}"
    table = [["task", "n", *(f"{name} %" for name, _ in rows), "blind %", "chance %"]]

    def line(label, part, name):
        found = [result[part].get(name) for _, result in rows]
        last = [s for s in found if s][-1]
        table.append([label, str(last["n"]), *map(spread, found), percent(last["blind"]), percent(last["chance"])])

    tasks = {t: s["category"] for _, result in rows for t, s in result["tasks"].items()}
    for category in sorted({c for _, result in rows for c in result["categories"]}):
        line(f"**{category}**", "categories", category)
        for task in sorted(t for t in tasks if tasks[t] == category and (t in HEADLINE or not short)):
            line(task, "tasks", task)
    heads = [result["headline"] for _, result in rows]
    if heads and any(h["accuracy"] is not None for h in heads):
        table.append(["**headline**", "", *(percent(h["accuracy"]) for h in heads), percent(heads[-1]["blind"]),
                      percent(heads[-1]["chance"])])
    return markdown(table)


def at_once(run) -> int:
    """Questions at a time: a GPU waits for the host as long for few rows as for many; a large model's cache must fit."""
    return 512 if run.device.type == "cuda" and run.args.size in ("toy", "tiny", "small") else 64


def phase_score(run, folder: Path, args, modes) -> dict:
    """The held-out score of run.folder/model in each mode (None: the bare question) -> {mode: result}; said, and a page
    of answers written beside it. Rank 0 asks; the others get {}."""
    if not run.main or not (folder / "heldout").is_dir():
        run.say(f"{folder}/heldout: no held-out score") if run.main else None
        return {}
    model = KeyeVL.from_pretrained(run.folder / "model", run.dtype if run.device.type == "cuda" else torch.float32, run.device)
    processor, scores, page = Processor.from_pretrained(run.folder / "model"), {}, f"# {run.stage}: answers to held-out questions\n"
    for mode in modes:
        with run.autocast():
            scores[mode or "plain"] = score = evaluate(model, processor, folder / "heldout", args.eval_limit, False, at_once(run), mode=mode)
        page += f"\n## {mode or 'plain'}\n\n" + "".join(
            f"- [{e['task']}] {e['question']} **{e['output']}** (truth: {e['answer']})\n" for e in score.pop("examples"))
    (run.folder / "samples.md").write_text(page, encoding="utf-8")
    run.say(board([(f"{run.stage} {mode}", score) for mode, score in scores.items()]))
    return scores


def board(rows: list[tuple[str, dict]]) -> str:
    """Markdown: a line for each named result: accuracy per category in % and their mean (mixed), then what `facts` counts:
    tokens of an answer, obeyed, form broken, repetitive (%), calls and failed calls of a question, and the share of
    questions of each difficulty that were thought about."""
    names = sorted({c for _, r in rows for c in r["categories"]})
    levels = sorted({k for _, r in rows for k in r.get("thinking", ())})
    percent = lambda v: "" if v is None else f"{100 * v:.1f}"
    table = [["phase and mode", *names, "mixed", "tokens", "obeyed", "format errors", "repetitive", "calls", "failed calls",
              *(f"thinks at {k}" for k in levels)]]
    for name, r in rows:
        facts, found = r.get("all") or {}, [r["categories"].get(c) for c in names]
        table.append([name, *(percent(c and c["accuracy"]) for c in found), percent(r.get("mixed")),
                      f"{facts['tokens']:.1f}" if facts else "",
                      *(percent(facts.get(k)) for k in ("obeyed", "format", "repetitive")),
                      *(f"{facts[k]:.2f}" if facts else "" for k in ("calls", "failed_calls")),
                      *(percent(r.get("thinking", {}).get(k)) for k in levels)])
    return markdown(table)


def markdown(table: list[list[str]]) -> str:
    widths = [max(2, *map(len, column)) for column in zip(*table)]
    table.insert(1, ["-" * widths[0]] + ["-" * (w - 1) + ":" for w in widths[1:]])
    pad = lambda row: [row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:])]
    return "\n".join("| " + " | ".join(pad(row)) + " |" for row in table)


def phases(folder: Path) -> list[tuple[str, dict]]:
    """Results of a run's finished phases, by phase and mode."""
    rows = []
    for phase in PHASES:
        path = folder / phase / "score.json"
        scores = json.loads(path.read_text()) if path.exists() else None
        for mode, result in ({"plain": scores} if phase == "pretrain" and scores else scores or {}).items():
            if isinstance(result, dict) and "categories" in result:
                rows.append((f"{phase} {mode}", result))
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--init", help="folder of a model, ours or official")
    what.add_argument("--board", metavar="RUN", help="print the scoreboard of a run's phases, and write RUN/scoreboard.md")
    add("--data", default="data/toy/heldout", help="folder of *.jsonl questions")
    add("--limit", type=int, help="questions per task (default: all)")
    add("--categories", nargs="+", metavar="NAME", help="categories or tasks to ask (default: all)")
    add("--mode", nargs="+", choices=MODES, metavar="MODE", help=f"ask in these modes: {', '.join(MODES)}")
    add("--blind", action=argparse.BooleanOptionalAction, default=True, help="also answer without the pictures")
    add("--batch", type=int, default=64, help="questions at a time (a GPU takes as long for 64 as for 512 of a small model)")
    add("--max-new-tokens", type=int, help="of every answer (default: twice the longest true answer of its task; in a mode "
        "192 for small models, else 2048)")
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    add("--out", help="write the result to this JSON file")
    args = parser.parse_args(argv)
    if min(v for v in (args.limit, args.max_new_tokens, args.batch) if v is not None) < 1:
        parser.error("--limit, --batch and --max-new-tokens must be at least 1")
    if args.board:
        if not (rows := phases(Path(args.board))):
            raise SystemExit(f"{args.board}: no finished phase ({', '.join(PHASES)}) here")
        (Path(args.board) / "scoreboard.md").write_text(board(rows) + "\n")
        return print(board(rows))
    model, processor = load(args.init, args.device)
    try:
        if args.mode:
            results = {mode: evaluate(model, processor, args.data, args.limit, False, args.batch, args.categories,
                                      args.max_new_tokens, mode) for mode in args.mode}
            print(scoreboard(list(results.items())), board(list(results.items())), sep="\n\n")
            for f in next(iter(results.values()))["failed"]:
                print(f"failed, counted as wrong: {f['where']}: {f['reason']}")
            if args.out:
                Path(args.out).write_text(json.dumps(results, indent=1) + "\n")
            return
        result = evaluate(model, processor, args.data, args.limit, args.blind, args.batch, args.categories,
                          args.max_new_tokens)
    except ValueError as e:
        raise SystemExit(str(e)) from None
    print(scoreboard([("accuracy", result)]))
    for f in result["failed"]:
        print(f"failed, counted as wrong: {f['where']}: {f['reason']}")
    head, percent = result["headline"], lambda v: "none" if v is None else f"{v:.1%}"
    print(f"mean of {', '.join(HEADLINE)}: {percent(head['accuracy'])}, blind {percent(head['blind'])}, chance "
          f"{percent(head['chance'])}; {result['questions']} questions in {result['seconds']} s")
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
