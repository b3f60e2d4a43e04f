r"""The cold start: five kinds of answer, and the switches between them (arXiv 2507.01949, 4.2.1).

    python coldstart.py                                     toy, from runs/toy/mpo/model
    python coldstart.py --size tiny --data data/tiny
    torchrun --nproc_per_node=8 coldstart.py --size 8b --data mydata

    kind          after the question   the answer
    think         /think               <think>steps</think><answer>\boxed{X}</answer>
    no_think      /no_think            X
    agentic       /agentic_think       <think>step <tool_call>crop(..)</tool_call> <sandbox_output>
                                       picture</sandbox_output> step</think><answer>..</answer>
    video         /think, /no_think    each clip with all of its frames, and with half of them
    auto_think    nothing, /auto_think <analysis>.. so /think.</analysis>, then that mode's answer

In: conversations of each kind, bare questions and whole answers, in --data's train/think.jsonl,
no_think.jsonl, agentic.jsonl and, with clips, clips.jsonl or video.jsonl, as far as they are there
(a line with "meta" can be verified); some lines of pre-training, so that nothing is forgotten.
Out: runs/SIZE/coldstart/model; what it was trained on in runs/SIZE/coldstart-modes/data.

Two passes. The first teaches all but auto-think. Then its model answers questions in each mode, and
where thinking is right more often than a plain answer, auto-think is taught to think: measured, not
told by the name of the task. The second pass goes on with all five kinds.
"""

import json
import random
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from common.conversation import (
    MODES,
    check_training,
    conversations_of,
    copied,
    media_items,
    text_of,
    with_switch,
)
from common.failures import leave_out, lines_or_exit
from common.jsonl import data_name
from common.questions import check_heldout, check_question, files_or_exit
from common.rewards import parse
from common.rollout import Prompt, failures_of, sample_groups
from common.run import Run, arguments, data_folder, plan_of, previous_model
from common.verifiers import verify
from evaluate import score_phase
from generate import Generator
from model import SCALE
from sft import finetune, mean, start_from, write_linked

# ours, every number. steps: of both passes; measured: the questions that are asked in each mode;
# kept: lines of each file of KEEP, times its share
PLAN = {
    "toy": {"steps": (600, 400), "lr": 1e-3, "measured": 3000, "kept": 3000},
    "tiny": {"steps": (400, 300), "lr": 5e-4, "measured": 2000, "kept": 6000},
    "small": {"steps": (1000, 500), "lr": 3e-4, "measured": 6000, "kept": 10_000},
    "released": {"steps": (1500, 500), "lr": 1e-5, "measured": 20_000, "kept": 100_000},
}
# Keye mixes 230k, 330k, 20k, 100k and 104k; ours: more auto-think, as a toy sees few samples, and
# think's lines about reasoning once more: there steps decide, and a sixth of the lines is too few
MIX = {
    "think": 3,
    "reasoning": 1,
    "no_think": 2,
    "agentic": 2.5,
    "video": 1,
    "turns": 0.5,
    "keep": 4,
}
AUTO = 5  # auto-think's weight in the second pass
# Shares of earlier phases' lines, asked with /no_think: without them a small model forgets to see,
# to copy and to sort, and to say what is not there.
KEEP = {
    "vqa": 1,
    "caption": 1,
    "video": 1,
    "grounding": 0.3,
    "text": 0.3,
    "preferences": 0.3,  # the chosen answers
}
# the mode of the answers in a kind's file
SWITCH = {
    "think": "think",
    "no_think": "no_think",
    "agentic": "agentic_think",
}
GAIN = 0.08  # what thinking must add to the share of right answers to be worth its tokens
OWN = 0.25  # weight of a question's own one answer in that share, beside all of its kind's
# Keye's analysis ends "Therefore, /no_think mode is more appropriate."; ours is a telegram, as the
# toy's thinking is short too
ANALYSIS = {
    "no_think": "Easy /no_think.",
    "think": "Several steps /think.",
    "agentic_think": "Too small /agentic_think.",
}

# ----------------------------------------------------------------------------------------------
# examples


@dataclass
class Example:
    """A bare question, its whole answer, and the mode that the answer is in."""

    question: list[dict]  # messages up to and with the user's last one
    answer: dict  # the assistant's message
    mode: str
    root: Path  # its media are relative to this folder
    meta: dict | None = None

    def conversation(self, *switches: str) -> dict:
        """With the switches behind its first question: they hold for all of its turns."""
        first = [message["role"] for message in self.question].index("user") + 1
        asked = self.question[:first]
        for mode in switches:
            asked = with_switch(asked, mode)
        return {"messages": [*asked, *self.question[first:], self.answer]}


def asks(messages: list[dict]) -> bool:
    return any(message["role"] == "user" for message in messages)


def example_of(record: dict, root: Path, kind: str = "") -> Example:
    """The mode of the answer is that of its kind; with clips it shows in the answer itself."""
    *question, answer = record["messages"]
    thinking = "think" if "<think>" in text_of(answer) else "no_think"
    return Example(question, answer, SWITCH.get(kind, thinking), root, record.get("meta"))


def read_kind(path: Path) -> list[Example]:
    """The examples of one kind's file. Lines that break its form are skipped by name, few of them.

    SystemExit where many do.
    """
    kind = data_name(path)

    def check(record):
        check_training(record)
        example = example_of(record, path.parent, kind)
        if example.answer["role"] != "assistant" or not asks(example.question):
            raise ValueError("a user's question and, last, the assistant's answer are expected")
        if kind in SWITCH and example.meta:
            check_question(record)
        errors = parse(example.answer["content"], example.mode).errors
        if errors:
            raise ValueError(f"not an answer in {example.mode} mode: {'; '.join(errors)}")

    lines = lines_or_exit(path, check, held=True)
    return [example_of(record, lines.root, kind) for record in lines]


def read_kinds(folder: Path) -> dict[str, list[Example]]:
    """{think, no_think, agentic, video: examples}. Of video.jsonl, a file of pre-training as well,
    the lines that think; its others are among those that are kept.
    """
    files = files_or_exit(folder / "train")
    kinds = {}
    for kind in (*SWITCH, "clips", "video"):
        kinds[kind] = read_kind(files[kind]) if kind in files else []
    if not kinds["think"] and not kinds["no_think"]:
        where = folder / "train"
        raise SystemExit(f"the cold start needs think.jsonl or no_think.jsonl in {where}")
    thinking = [example for example in kinds["video"] if example.mode == "think"]
    kinds["video"] = kinds.pop("clips") + thinking
    return kinds


# ----------------------------------------------------------------------------------------------
# conversations of the first pass


def at_frame_rate(example: Example, fps: float) -> Example:
    """The example with `fps` frames a second of its clips: Keye shows 32 frames and 16."""
    question = copied(example.question)
    for item, kind in media_items({"messages": question}):
        if kind == "image":
            continue
        if isinstance(item["video"], list):
            step = round(2 / fps)  # frames have a rate of their own: every other one
            item["video"] = item["video"][::step]
            item["fps"] = item.get("fps", 2.0) / step
        else:
            item["fps"] = fps
    return replace(example, question=question)


def several_turns(examples: list[Example], rng: random.Random) -> list[dict]:
    """Conversations of two questions, and questions with two switches: the last switch wins."""
    conversations = []
    for _ in range(len(examples) // 8):
        first, second = rng.sample(examples, 2)
        if rng.random() < 0.5:
            conversations.append(second.conversation(first.mode, second.mode))
            continue
        # the first question's switch holds for the second, until that has one of its own
        switches = [] if first.mode == second.mode else [second.mode]
        turns = first.conversation(first.mode)["messages"]
        turns += second.conversation(*switches)["messages"]
        conversations.append({"messages": turns})
    return conversations


def kept_lines(path: Path, count: int) -> list[dict]:
    """About `count` lines of an earlier phase's file, evenly, but none that thinks.

    /no_think in the first turn holds for all turns.
    """
    lines = lines_or_exit(path, check_training)
    kept = []
    for i in range(0, len(lines), max(1, len(lines) // count)):
        example = example_of(conversations_of(lines[i])[0], lines.root)
        if not asks(example.question):  # plain text answers nobody
            kept.append({"messages": [*example.question, example.answer]})
        elif example.mode == "no_think":
            kept.append(example.conversation("no_think"))
    return kept


def write_kinds(run: Run, out: Path, root: Path, kinds: dict[str, list[dict]]):
    """Conversations as out/KIND.jsonl, their media linked below out."""
    places = {}  # kinds show the same media, and a link costs more than its line
    for kind, conversations in kinds.items():
        write_linked(run, out / f"{kind}.jsonl", conversations, root, places)
        run.say(f"{kind}: {len(conversations)} conversations")


def build(run: Run, kinds: dict[str, list[Example]], folder: Path, out: Path, plan: dict):
    """Writes the first pass's conversations, a file for each kind."""
    root = folder / "train"
    files = files_or_exit(root)
    made = {}
    for kind in SWITCH:
        made[kind] = [example.conversation(example.mode) for example in kinds[kind]]

    made["reasoning"] = [
        example.conversation("think") for example in kinds["think"]
        if (example.meta or {}).get("category") == "reasoning"
    ]

    made["video"] = []
    for example in kinds["video"]:
        for fps in (2.0, 1.0):
            made["video"].append(at_frame_rate(example, fps).conversation(example.mode))

    made["keep"] = []
    for name, share in KEEP.items():
        if name in files:
            count = max(1, round(share * plan["kept"]))
            made["keep"] += kept_lines(files[name], count)

    rng = random.Random(f"{run.args.seed}/turns")
    made["turns"] = several_turns(kinds["think"] + kinds["no_think"], rng)
    write_kinds(run, out, root, made)


# ----------------------------------------------------------------------------------------------
# auto-think: where thinking helps, measured


def answers_by_mode(kinds: dict[str, list[Example]]) -> list[dict[str, Example]]:
    """Questions with a known truth and an answer in both think and no_think: {mode: Example}.

    agentic_think counts where its answer calls a tool.
    """
    by_question = defaultdict(dict)
    for examples in kinds.values():
        for example in examples:
            if example.mode != "agentic_think" or "<tool_call>" in text_of(example.answer):
                question = json.dumps(example.question, sort_keys=True)
                by_question[question][example.mode] = example
    return [
        answers
        for answers in by_question.values()
        if {"think", "no_think"} <= answers.keys() and answers["think"].meta
    ]


def question_kind(answers: dict[str, Example]) -> tuple[str, str]:
    """Questions of one task and level of difficulty are alike."""
    meta = answers["think"].meta
    return meta.get("task", ""), str(meta.get("difficulty", 1))


def evenly_by_kind(kinds: list, count: int) -> list[int]:
    """Indices of `count` questions, equally many of each kind as far as there are."""
    seen = Counter()
    turns = []
    for i, kind in enumerate(kinds):
        turns.append((seen[kind], i))
        seen[kind] += 1
    return [i for _, i in sorted(turns)[:count]]


def measure(run: Run, model_folder: Path, questions: list, count: int) -> dict:
    """{(question, mode): whether the model's answer is right}, on all ranks, for `count` of them.

    Greedy, as answers are given later: sampling errs once a step, and would count against
    long answers.
    """
    generator = Generator.from_pretrained(model_folder, run.device)
    max_answer = SCALE[run.args.size].max_answer
    chosen = evenly_by_kind([question_kind(q) for q in questions], count)
    prompts = {}
    for i in chosen[run.rank :: run.world]:
        for mode, example in questions[i].items():
            asked = example.conversation()
            prompts[i, mode] = Prompt(asked, example.root, mode, str(run.args.seed))
    groups = sample_groups(
        generator, list(prompts.values()), 1, max_answer, temperature=0.0, keep_pixels=False
    )
    by_question = {i: prompt for (i, _), prompt in prompts.items()}
    leave_out(run, failures_of(by_question.values()), len(chosen), "questions to measure")
    local = {}
    for (i, mode), group in zip(prompts, groups):
        for rollout in group:  # none where the media cannot be read
            final = parse(rollout.content, mode, rollout.response.finished).final
            _, right = verify(final, questions[i]["think"].meta)
            local[i, mode] = right
    return run.merge(local)


def best_modes(right: dict, kinds: list) -> list[str | None]:
    """The mode that is right most often for each question; a plain answer unless one gains GAIN.

    right: {(question, mode): 0 or 1}; kinds: of all questions. One answer says little of a
    question: OWN of its share is its own, the rest (all, where it was not asked) that of its kind.
    None where nothing of its kind was asked.
    """
    pooled = defaultdict(list)
    for (i, mode), value in right.items():
        pooled[kinds[i], mode].append(value)
    best = []
    for i, kind in enumerate(kinds):
        worth = {}
        for mode in ANALYSIS:
            if (kind, mode) in pooled:
                share = mean(pooled[kind, mode])
                if (i, mode) in right:
                    share = OWN * right[i, mode] + (1 - OWN) * share
                worth[mode] = share if mode == "no_think" else share - GAIN
        best.append(max(worth, key=worth.get, default=None))
    return best


def analysed(answers: dict[str, Example], mode: str) -> Example:
    """The question in auto-think: an analysis that names the mode, then that mode's answer."""
    example = answers.get(mode, answers["think"])
    analysis = f"<analysis>{ANALYSIS[mode]}</analysis>"
    content = example.answer["content"]
    if isinstance(content, str):
        content = analysis + content
    else:
        content = [{"type": "text", "text": analysis}, *content]
    answer = {"role": "assistant", "content": content}
    return replace(example, answer=answer, mode="auto_think")


def build_auto(run: Run, model_folder: Path, kinds: dict, folder: Path, out: Path, plan: dict):
    """Writes auto_think.jsonl, and the several turns again, with auto-think among them."""
    questions = answers_by_mode(kinds)
    question_kinds = [question_kind(q) for q in questions]
    right = measure(run, model_folder, questions, plan["measured"])
    best = best_modes(right, question_kinds)

    rng = random.Random(f"{run.args.seed}/auto")
    examples = []
    conversations = []
    thinking = defaultdict(list)  # whether it is taught to think, by task
    for answers, (task, _), mode in zip(questions, question_kinds, best):
        if mode:
            example = analysed(answers, mode)
            examples.append(example)
            switches = ["auto_think"] if rng.random() < 0.5 else []  # no switch means the same
            conversations.append(example.conversation(*switches))
            thinking[task].append(mode != "no_think")

    rng = random.Random(f"{run.args.seed}/turns")
    turns = several_turns(kinds["think"] + kinds["no_think"] + examples, rng)
    made = {"auto_think": conversations, "turns": turns}
    write_kinds(run, out, folder / "train", made)
    shares = [f"{task} {mean(values):.0%}" for task, values in sorted(thinking.items())]
    run.say("auto-think thinks on: " + (", ".join(shares) or "nothing; no question has a truth"))


# ----------------------------------------------------------------------------------------------


def mixture(out: Path, weights: dict[str, float]) -> list[tuple[Path, float]]:
    """The files of out and their weights; a kind that nobody gave has an empty one, or none."""
    mix = []
    for kind, weight in weights.items():
        path = out / f"{kind}.jsonl"
        if path.exists() and path.stat().st_size:
            mix.append((path, weight))
    return mix


def main(args):
    begin = time.time()
    folder = data_folder(args)
    plan = plan_of(args, PLAN)
    init = previous_model(args, "mpo")
    check_heldout(folder, args.eval_limit)
    kinds = read_kinds(folder)
    first_steps, second_steps = plan["steps"]
    names = {*SWITCH, "clips", *KEEP}
    files = [path for name, path in files_or_exit(folder / "train").items() if name in names]
    made_from = {"measured": plan["measured"], "kept": plan["kept"], "seed": args.seed}

    run = start_from(args, "coldstart-modes", init, files, made_from, last="coldstart")
    out = run.folder / "data"
    if not run.trained():
        if not (run.folder / "built.json").exists():
            build(run, kinds, folder, out, plan)
            run.write_json("built.json", {})
        finetune(run, init, mixture(out, MIX), plan["lr"], args.steps or first_steps)
        run.mark_trained()
        args.resume = False  # it was for the pass that had been interrupted
        args.fresh = True  # what the second pass left is of a model that is no more
    run.close()

    first = run.folder / "model"
    run = start_from(args, "coldstart", first)
    if not run.trained():
        if not (run.folder / "built.json").exists():
            build_auto(run, first, kinds, folder, out, plan)
            run.write_json("built.json", {})
        weights = MIX | {"auto_think": AUTO}
        finetune(run, first, mixture(out, weights), plan["lr"], args.steps or second_steps)
        run.mark_trained()
    run.score(lambda: score_phase(run, folder / "heldout", MODES, args.eval_limit))
    run.close()
    took = f"{time.time() - begin:.0f} s"
    run.say(f"the cold start took {took}; the model is in {run.folder / 'model'}")


if __name__ == "__main__":
    main(arguments(__doc__).parse_args())
