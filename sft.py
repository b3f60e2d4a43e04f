"""Supervised fine-tuning: the model learns to answer as it is asked to (arXiv 2507.01949, 4.1.1).

    python sft.py                                           toy, from runs/toy/pretrain/model
    python sft.py --size tiny --data data/tiny
    torchrun --nproc_per_node=8 sft.py --size 8b --data mydata --init Keye-VL-8B-Preview

In: --data's train/instruct.jsonl and questions.jsonl, single questions whose meta holds the answer
and its verifier, and some of pre-training's files.
Out: runs/SIZE/sft/model; the lines that were kept, beside it in data/.

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

from common.checkpoint import export, fingerprint, resume, save_if_due
from common.conversation import link_media, text_of
from common.jsonl import write_lines
from common.loader import Loader, split_packs
from common.media import MediaError
from common.optim import clip_gradients, make_optimizer, schedule, set_lr
from common.parallel import shard
from common.questions import Question, check_heldout, read_or_exit
from common.rollout import Prompt, sample_groups
from common.run import Run, arguments, data_folder, plan_of, previous_model, start
from common.verifiers import verify
from data import Processor
from evaluate import score_phase
from generate import Generator
from model import SCALE, KeyeVL, sample_flops, step_work

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
MAX_UNREADABLE = 0.05  # ours: a larger share of lines whose media fail ends the run

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


def reference_tokens(tokenizer, question: Question) -> int:
    """Tokens of the true answer, its end of turn not counted."""
    return len(tokenizer.encode(text_of(question.record["messages"][-1]), added=True))


def attempts(run: Run, model_folder: Path, questions: list[Question], samples: int, seed: int):
    """The model answers each question `samples` times at temperature 1; the ranks share the work.

    -> a list of Attempts for each question, in order, on all ranks; empty where media fail.
    """
    generator = Generator.from_pretrained(model_folder, run.device)
    tokenizer = generator.processor.tokenizer
    indices = range(run.rank, len(questions), run.world)
    prompts = []
    limits = []
    for i in indices:
        question = questions[i]
        prompts.append(Prompt(question.record, question.root, "plain", f"{seed}/{i}"))
        limits.append(2 * reference_tokens(tokenizer, question) + 4)
    groups = sample_groups(generator, prompts, samples, limits, keep_pixels=False)

    local = {i: [] for i in indices}
    for i, group in zip(indices, groups):
        for rollout in group:
            text = text_of({"content": rollout.content})
            outcome, right = verify(text, questions[i].meta)
            response = rollout.response
            local[i].append(Attempt(text, outcome, right, len(response.ids), response.finished))
    results = run.merge(local)
    unreadable = [i for i in range(len(questions)) if not results[i]]
    if len(unreadable) > MAX_UNREADABLE * len(questions):
        raise SystemExit(
            f"{len(unreadable)} of {len(questions)} questions cannot be asked, the first is "
            f"{questions[unreadable[0]].where}"
        )
    return [results[i] for i in range(len(questions))]


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def drop_easy(run: Run, init: Path, source: Path, target: Path, plan: dict, seed: int):
    """Writes source's lines to target, but those that are easy for the model in `init`.

    An even choice of plan["filtered"] lines is asked; a line that is not asked stays.
    """
    questions = read_or_exit(source)
    count = min(plan["filtered"], len(questions))
    asked = [i * len(questions) // count for i in range(count)]
    answers = attempts(run, init, [questions[i] for i in asked], plan["samples"], seed)

    tokenizer = Processor.from_pretrained(init).tokenizer
    easy = set()
    unreadable = set()
    for i, tries in zip(asked, answers):
        if not tries:
            unreadable.add(i)
            continue
        always_right = all(attempt.right for attempt in tries)
        length = mean(attempt.tokens for attempt in tries)  # with the end of turn
        if always_right and length <= reference_tokens(tokenizer, questions[i]) + 1:
            easy.add(i)
    right = mean(attempt.right for tries in answers for attempt in tries)
    run.say(
        f"{source.name}: {count} of {len(questions)} lines were asked, {right:.0%} of the answers "
        f"are right; {len(easy)} lines are easy and dropped, {len(unreadable)} cannot be read"
    )
    kept = [q for i, q in enumerate(questions) if i not in easy and i not in unreadable]

    write_linked(run, target, [q.record for q in kept], questions[0].root)


def write_linked(run: Run, target: Path, records: list[dict], root: Path):
    """Rank 0: records whose media are below root become lines of target, their media beside it.

    A record whose media cannot be found is named and left out; RuntimeError on all ranks where
    there are more than MAX_UNREADABLE.
    """

    def write():
        if not run.main:
            return
        linked = []
        for record in records:
            try:
                linked.append(link_media(record, root, target.parent))
            except MediaError as e:
                run.say(f"skipped: {e}")
        missing = len(records) - len(linked)
        if missing > MAX_UNREADABLE * len(records):
            raise ValueError(f"{missing} of {len(records)} lines have media that cannot be read")
        write_lines(target, linked)

    run.attempt(f"cannot write {target}", write)


def build_mixture(run: Run, init: Path, folder: Path, plan: dict) -> list[tuple[Path, float]]:
    """The files to train on and their weights; what the filter kept stands in run.folder/data."""
    mix = []
    for path in sorted((folder / "train").glob("*.jsonl")):
        if path.stem not in MIX:
            continue
        source = path
        if path.stem in FILTERED:
            source = run.folder / "data" / path.name
            if not source.exists():
                drop_easy(run, init, path, source, plan, run.args.seed)
        if source.stat().st_size:  # not all of a file may be easy
            mix.append((source, MIX[path.stem]))
    if not mix:
        raise SystemExit(f"sft needs one of {', '.join(MIX)}.jsonl in {folder / 'train'}")
    return mix


# ----------------------------------------------------------------------------------------------
# training


def finetune(run: Run, init: Path, mix: list[tuple[Path, float]], lr: float, steps: int):
    """Next-token training on the assistant's turns; leaves run.folder/model."""
    args = run.args
    scale = SCALE[args.size]
    model = KeyeVL.from_pretrained(init)
    processor = Processor.from_pretrained(init)
    cfg = model.config
    model.decoder.activation_checkpointing = scale.recompute
    model = shard(model, run)
    rates = {"vit": lr, "projector": lr, "decoder": lr}
    opt = make_optimizer(model, rates, muon=scale.muon)
    progress = resume(run, model, opt)
    loader = Loader(
        mix, processor, *split_packs(scale.pack, scale.packs, run.world), run.rank, run.world,
        args.seed, flops=partial(sample_flops, cfg), workers=args.workers, state=progress.loader,
    )

    for step, (batches, info) in zip(range(progress.step, steps), loader):
        now = set_lr(opt, schedule(step, steps, WARMUP, decay=ANNEALED))

        # the mean over all target tokens of the step, whichever rank and micro-batch they are in
        targets = run.sum(sum(int((batch["labels"] != -100).sum()) for batch in batches))
        loss = torch.zeros((), device=run.device)
        for batch in batches:
            with run.autocast():
                loss_sum, _ = model.loss(run.to(batch))
            micro_loss = loss_sum / max(1, targets)
            micro_loss.backward()
            loss += micro_loss.detach()

        norm = clip_gradients(model)
        opt.step()
        opt.zero_grad(set_to_none=True)
        run.log(
            step, steps, loss=run.sum(loss), norm=norm, lr=now, targets=targets,
            skipped=run.sum(sum(info["skipped"].values())), **step_work(cfg, batches),
        )
        save_if_due(run, step + 1, steps, model, opt, info["state"])
    export(run, model, processor)


def main(args):
    begin = time.time()
    folder = data_folder(args)
    plan = plan_of(args, PLAN)
    init = previous_model(args, "pretrain")
    check_heldout(folder)

    run = start(args, "sft")
    run.made_from(init=init, weights=fingerprint(init))
    if not run.trained():
        mix = build_mixture(run, init, folder, plan)
        finetune(run, init, mix, plan["lr"], args.steps or plan["steps"])
        run.mark_trained()
    run.score(lambda: score_phase(run, folder / "heldout", ["plain"], args.eval_limit))
    run.close()
    run.say(f"SFT took {time.time() - begin:.0f} s; the model is in {run.folder / 'model'}")


if __name__ == "__main__":
    main(arguments(__doc__).parse_args())
