"""Supervised fine-tuning: the model learns to answer as it is asked to (arXiv 2507.01949, 4.1.1).

    python sft.py                                           toy, from runs/toy/pretrain/model
    python sft.py --size tiny --data data/tiny
    torchrun --nproc_per_node=8 sft.py --size 8b --data mydata --init Keye-VL-8B-Preview

In: --data's train/instruct.jsonl and questions.jsonl, single questions whose meta holds the answer
and its verifier, and some of pre-training's files.
Out: runs/SIZE/sft/model; the lines that were kept, beside it in data/.
A run that was stopped goes on, or starts over where its data have changed since.

1. Difficulty filter: the start answers questions several times. What is right every time, and in
   no more tokens than the reference, is easy and dropped (Keye: correctness and length).
2. Training on what is left and on lines of pre-training; only the assistant's words count.
3. The learning rate stays at its peak, and the last part of the steps anneals it (Keye: +1 %).
"""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from common.checkpoint import export, fingerprint, on_main, resume, save_if_due
from common.conversation import link_media, text_of
from common.failures import leave_out, say_failures
from common.fit import EVERYTHING, fit, packs_at_once, refuse_beyond_memory
from common.jsonl import write_lines
from common.loader import Loader
from common.media import MediaError
from common.optim import clip_gradients, make_optimizer, schedule, set_lr
from common.packing import join, packing
from common.parallel import shard
from common.questions import (
    Question,
    check_heldout,
    files_or_exit,
    needs_one,
    read_or_exit,
    say_files,
)
from common.rollout import Prompt, Rollout, sample_groups, use_sandbox
from common.run import Run, arguments, data_folder, plan_of, previous_model, released, start
from common.sources import note_media, renewed
from common.verifiers import verify
from data import Processor
from evaluate import score_phase
from generate import Generator
from model import SCALE, KeyeVL, config_of, sample_flops, step_work

# ours, every number: Keye states none. filtered: the lines of each file that the filter asks (the
# others are trained on unasked); samples: answers to each
PLAN = {
    "toy": {"steps": 200, "lr": 6e-4, "filtered": 1200, "samples": 3},
    "tiny": {"steps": 200, "lr": 3e-4, "filtered": 6000, "samples": 2},
    "small": {"steps": 800, "lr": 2e-4, "filtered": 6000, "samples": 4},
    "released": {"steps": 2000, "lr": 1e-5, "filtered": 100_000, "samples": 4},
}
WARMUP = 0.05  # shares of the steps
ANNEALED = 0.3
# Weights by samples drawn. Pre-training's lines keep what instructions do not ask for.
MIX = {
    "instruct": 4,
    "questions": 2,
    "vqa": 2,
    "caption": 0.5,
    "video": 0.5,
    "grounding": 0.1,
    "text": 0.1,
}
FILTERED = ("instruct", "questions")

# ----------------------------------------------------------------------------------------------
# the difficulty filter


@dataclass
class Attempt:
    """One answer to a question: graded and strict score, its length, whether it came to its end."""

    text: str
    outcome: float
    right: float
    tokens: int
    finished: bool


def attempt_of(rollout: Rollout) -> Attempt:
    text = text_of({"content": rollout.content})
    outcome, right = verify(text, rollout.prompt.record["meta"])
    response = rollout.response
    return Attempt(text, outcome, right, len(response.ids), response.finished)


def reference_tokens(tokenizer, question: Question) -> int:
    """Tokens of the true answer, its end of turn not counted."""
    return len(tokenizer.encode(text_of(question.record["messages"][-1]), added=True))


def attempts(run: Run, model_folder: Path, questions: list[Question], samples: int, seed: int):
    """The model answers each question `samples` times at temperature 1; the ranks share the work.

    -> a list of Attempts for each question, in order, on all ranks; empty where media fail, which
    few may. SystemExit where many do.
    """
    generator = Generator.from_pretrained(model_folder, run.device)
    tokenizer = generator.processor.tokenizer
    mine = range(run.rank, len(questions), run.world)
    prompts = [
        Prompt(questions[i].record, questions[i].root, "plain", f"{seed}/{i}") for i in mine
    ]
    # room for twice the true answer: enough to see that an answer is longer
    limits = [2 * reference_tokens(tokenizer, questions[i]) + 4 for i in mine]
    groups = sample_groups(generator, prompts, samples, limits, keep_pixels=False)

    failures = [f"{questions[i].where}: {p.failure}" for i, p in zip(mine, prompts) if p.failure]
    leave_out(run, failures, len(questions), "questions")
    by_index = run.merge({i: [attempt_of(r) for r in group] for i, group in zip(mine, groups)})
    return [by_index[i] for i in range(len(questions))]


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def evenly(items, count: int) -> list:
    """At most `count` of the items, evenly spread."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def drop_easy(run: Run, init: Path, source: Path, target: Path, plan: dict, seed: int):
    """Writes source's lines to target, but those that are easy for the model in `init`.

    An even choice of plan["filtered"] lines is asked; a line that is not asked stays.
    """
    questions = read_or_exit(source)
    asked = evenly(range(len(questions)), plan["filtered"])  # indices
    answers = attempts(run, init, [questions[i] for i in asked], plan["samples"], seed)

    tokenizer = Processor.from_pretrained(init).tokenizer
    easy = set()
    unreadable = set()
    for i, tries in zip(asked, answers):
        if not tries:
            unreadable.add(i)
        elif all(attempt.right for attempt in tries):
            length = mean(attempt.tokens for attempt in tries)  # with the end of turn
            if length <= reference_tokens(tokenizer, questions[i]) + 1:
                easy.add(i)
    right = mean(attempt.right for tries in answers for attempt in tries)
    run.say(
        f"{source.name}: {len(asked)} of {len(questions)} lines were asked, {right:.0%} of the "
        f"answers are right; {len(easy)} lines are easy and dropped, "
        f"{len(unreadable)} cannot be read"
    )
    dropped = easy | unreadable
    kept = [question.record for i, question in enumerate(questions) if i not in dropped]
    write_linked(run, target, kept, questions[0].root)


def linked(
    run: Run, records: list[tuple[dict, Path]], folder: Path, places: dict | None = None
) -> list[dict]:
    """Rank 0: (record, root of its media) -> records whose media are below folder.

    A few whose media cannot be found are left out; SystemExit on all ranks where many are.
    places: of media that were linked just now, see link_media; new ones are added.
    """
    done = []
    failures = []
    places = {} if places is None else places

    def link():
        for record, root in records if run.main else ():
            try:
                done.append(link_media(record, root, folder, places))
            except MediaError as e:
                failures.append(f"{root}: {e}")
        if run.main:
            note_media(folder)

    run.attempt(f"cannot link media below {folder}", link)
    leave_out(run, failures, len(records), "lines")
    return done


def write_linked(
    run: Run, target: Path, records: list[dict], root: Path, places: dict | None = None
):
    """Rank 0: records whose media are below root become lines of target, their media beside it.

    places: see linked.
    """
    lines = linked(run, [(record, root) for record in records], target.parent, places)
    on_main(run, f"cannot write {target}", write_lines, target, lines)


def sources_of(folder: Path) -> dict[str, Path]:
    """{name: file} of the mixture's files that are in folder/train."""
    files = files_or_exit(folder / "train")
    return {name: path for name, path in files.items() if name in MIX}


def build_mixture(run: Run, init: Path, folder: Path, plan: dict) -> list[tuple[Path, float]]:
    """The files to train on and their weights; what the filter kept stands in run.folder/data."""
    mix = []
    for name, path in sources_of(folder).items():
        if name in FILTERED:
            kept = run.folder / "data" / f"{name}.jsonl"
            if not kept.exists():
                drop_easy(run, init, path, kept, plan, run.args.seed)
            path = kept
        if path.stat().st_size:  # not all of a file may be easy
            mix.append((path, MIX[name]))
    if not mix:
        raise SystemExit(f"sft {needs_one(MIX, folder, files_or_exit(folder / 'train'))}")
    return mix


# ----------------------------------------------------------------------------------------------
# training


def start_from(
    args, stage: str, init: Path, files=(), numbers=None, last="", trains=True, **facts
) -> Run:
    """A run that trains the model in `init`. SystemExit where an earlier one trained another, or
    where this machine could not hold what it `trains`: before the model is loaded to be asked.

    files, numbers, last: see renewed; where they have changed, it starts over. facts: what else
    must be the same.
    """
    use_sandbox(args.sandbox)
    run = start(args, stage)
    facts |= {"init": init, "weights": fingerprint(init), "sandbox": args.sandbox}
    run.made_from(**facts)
    if files:
        say_files(run, data_folder(args), files)
        if renewed(run, files, numbers or {}, last):
            run.made_from(**facts)
    if trains and not run.trained():
        refuse_beyond_memory(run, config_of(init))
    return run


def trainable(
    run: Run, init: Path, lr: float, pack: int = 0, copies: float = 0, **options
) -> tuple:
    """-> model, processor, optimizer, Progress. All of the model in `init` learns, at one rate.

    A run that was stopped goes on from its checkpoint. pack: tokens of a micro-batch, where they
    are not the size's; copies: of the model in bf16, that must fit on each card beside it; options:
    of make_optimizer.
    """
    run.say(f"starting from {init}")
    scale = SCALE[run.args.size]
    processor = Processor.from_pretrained(init)
    model = KeyeVL.shapes(init)
    rates = dict.fromkeys(EVERYTHING, lr)
    keep = fit(run, model, EVERYTHING, pack or scale.pack, copies)
    shard(model, run).load(init)
    opt = make_optimizer(model, rates, muon=scale.muon, **keep, **options)
    return model, processor, opt, resume(run, model, opt)


def frozen(run: Run, folder: Path) -> KeyeVL:
    """The model in `folder`, to be asked only; sharded as one that is trained."""
    model = KeyeVL.shapes(folder).requires_grad_(False)
    if released(run.args.size):
        model.to(run.dtype)  # released weights are in bf16, as they are computed with
    return shard(model, run).load(folder)


def finetune(run: Run, init: Path, mix: list[tuple[Path, float]], lr: float, steps: int):
    """Next-token training on the assistant's turns; leaves run.folder/model."""
    args = run.args
    tokens, packs = packing(run)
    at_once = packs_at_once(run, KeyeVL.shapes(init).config, EVERYTHING)
    model, processor, opt, progress = trainable(run, init, lr, tokens * at_once)
    loader = Loader(
        mix, processor, tokens, packs, run.rank, run.world, args.seed,
        flops=partial(sample_flops, model.config), workers=args.workers, state=progress.loader,
    )

    for step, (batches, info) in zip(range(progress.step, steps), loader):
        now = set_lr(opt, schedule(step, steps, WARMUP, decay=ANNEALED))
        batches = join(batches, at_once)

        # the mean over all target tokens of the step, whichever rank and micro-batch they are in
        targets = run.sum(sum(int((batch["labels"] != -100).sum()) for batch in batches))
        loss = torch.zeros((), device=run.device)
        for batch in batches:
            with run.autocast():
                loss_sum, _ = model.loss(run.to(batch))
            micro_loss = loss_sum / max(1, targets)
            micro_loss.backward()
            loss += micro_loss.detach()

        loss = run.sum(loss)
        norm = clip_gradients(model)
        loader.prepare()  # the GPU is still at work
        if not run.should_skip(loss, norm):
            opt.step()
        opt.zero_grad(set_to_none=True)
        run.log(
            step, steps, loss=loss, norm=norm, lr=now, targets=targets,
            skipped=run.sum(sum(info["skipped"].values())), **info["shares"],
            **step_work(model.config, batches),
        )
        save_if_due(run, step + 1, steps, model, opt, info["state"])
    say_failures(run, loader.failures, run.sum(loader.tried), "samples")
    export(run, model, processor)


def main(args):
    begin = time.time()
    folder = data_folder(args)
    plan = plan_of(args, PLAN)
    init = previous_model(args, "pretrain")
    check_heldout(folder, args.eval_limit)
    made_from = {"filtered": plan["filtered"], "samples": plan["samples"], "seed": args.seed}

    run = start_from(args, "sft", init, list(sources_of(folder).values()), made_from)
    if not run.trained():
        mix = build_mixture(run, init, folder, plan)
        finetune(run, init, mix, plan["lr"], args.steps or plan["steps"])
        run.mark_trained()
    run.score(lambda: score_phase(run, folder / "heldout", ["plain"], args.eval_limit))
    run.close()
    run.say(f"SFT took {time.time() - begin:.0f} s; the model is in {run.folder / 'model'}")


if __name__ == "__main__":
    main(arguments(__doc__).parse_args())
