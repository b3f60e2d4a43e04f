"""Alignment: preferences by MPO, and rounds of it on the model's own answers (arXiv 2507.01949).

    python align.py --phase mpo                             toy, from runs/toy/sft/model (4.1.2)
    python align.py --phase mpo --pairs mine.jsonl          any preferences
    python align.py --phase iterate                         toy, from runs/toy/grpo/model (4.2.3)
    torchrun --nproc_per_node=8 align.py --phase mpo --size 8b --data mydata --pairs mine.jsonl

In: preferences, {"messages": [..], "chosen": .., "rejected": ..} a line. Without --pairs those of
train/preferences.jsonl, and the model answers train/questions.jsonl and instruct.jsonl several
times: where it is right now and then, the true answer is chosen, the worst of its own wrong ones
rejected (Keye's self-improvement pairs). The pairs of heldout/preferences.jsonl, if there are some,
are compared before and after.
Out: runs/SIZE/mpo/model or runs/SIZE/align/model; the pairs, beside it in data/.

MPO (arXiv 2411.10442) is 0.8 DPO + 0.2 BCO + 1.0 SFT. With r = beta (log p(answer) -
log p_reference(answer)) over an answer's tokens, c the chosen and r the rejected one, and delta the
mean reward of all answers seen so far:

    DPO  -log sigmoid(r_c - r_r)
    BCO  -log sigmoid(r_c - delta) - log sigmoid(-(r_r - delta))
    SFT  -log p(chosen) / its tokens

The reference is the model at the start; its log-probabilities are computed once and stand in the
pairs' lines. Lines of SFT are learnt on beside the pairs (ours): at a rate that teaches what pairs
are about, a small model forgets the rest.

iterate: in each round the model answers prompts in all modes; rules (or a judge) score repetition,
form, logic and result; of each prompt the best and the worst answer become a pair if their scores
differ by a margin; then MPO, with the round's start as the reference, and beside the pairs lines of
the cold start, where it has left some.
"""

import os
import random
import shutil
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from common.checkpoint import clear_folder, export, on_main, put_in_place, save_if_due
from common.conversation import (
    MODES,
    check_training,
    conversations_of,
    link_media,
    prompt_of,
)
from common.failures import leave_out, lines_or_exit, say_failures
from common.jsonl import write_lines
from common.judge import Judge
from common.loader import Loader
from common.media import MediaError
from common.optim import clip_gradients, schedule, set_lr
from common.packing import even_packs, packing, sum_per_sample
from common.questions import (
    PAIRS,
    Question,
    check_heldout,
    draw_prompts,
    files_or_exit,
    pool_files,
    question_pool,
    read_or_exit,
)
from common.replay import Replay
from common.rewards import REPEATED
from common.rollout import Prompt, Rollout, failures_of, reward_groups, sample_groups
from common.run import (
    Run,
    add_judge_arguments,
    arguments,
    at_least,
    data_folder,
    plan_of,
    previous_model,
)
from data import Processor, pack
from evaluate import score_phase
from generate import Generator
from grpo import kept_lines
from model import SCALE, sample_flops, step_work
from sft import (
    MIX,
    attempts,
    evenly,
    frozen,
    linked,
    mean,
    sources_of,
    start_from,
    trainable,
)

BETA = 0.1  # MPO's own, as are the weights; Keye states neither
WEIGHTS = {"dpo": 0.8, "bco": 0.2, "sft": 1.0}
# ours, every number. asked: the lines of each file that are answered; samples: answers to each;
# replay: weight of the loss of SFT's lines, in rounds of the cold start's, one step's of them
# beside each step; prompts, group, round_*: of each round of iterate
PLAN = {
    "toy": {
        "steps": 150, "lr": 5e-4, "asked": 300, "samples": 3, "replay": 1.0,
        "rounds": 2, "prompts": 320, "group": 4, "round_steps": 25, "round_lr": 1e-4,
    },
    "tiny": {
        "steps": 100, "lr": 2e-4, "asked": 6000, "samples": 4, "replay": 1.0,
        "rounds": 2, "prompts": 500, "group": 4, "round_steps": 30, "round_lr": 3e-5,
    },
    "small": {
        "steps": 200, "lr": 5e-5, "asked": 6000, "samples": 4, "replay": 0.5,
        "rounds": 2, "prompts": 2000, "group": 4, "round_steps": 60, "round_lr": 3e-5,
    },
    # batch 256 and a rate of 2e-7 are those of InternVL3's MPO scripts
    "released": {
        "steps": 2000, "lr": 2e-7, "asked": 50_000, "samples": 8, "replay": 0.0,
        "rounds": 3, "prompts": 10_000, "group": 8, "round_steps": 300, "round_lr": 2e-7,
    },
}
WARMUP = 0.05
HELD_EVERY = 10  # of the pairs one in so many is kept from training, to measure preferences
HELD_MOST = 1000
KEPT = "the pairs that were kept from training"
MARGIN = 0.25  # least difference of the scores of a round's pair; they reach from -1 to 1.5
ASKED = {"think": 2, "no_think": 1, "auto_think": 3, "agentic_think": 2}  # modes, by weight

# ----------------------------------------------------------------------------------------------
# the loss


def mpo_loss(policy, reference, nll, shift: float, beta=BETA, weights=WEIGHTS) -> dict:
    """dpo, bco, sft, total and margin of each pair, (P,) each, and the rewards (P, 2).

    policy, reference (P, 2): log-probabilities of whole answers, chosen and rejected;
    nll (P,): a token's mean of the chosen answer; shift: BCO's delta.
    """
    rewards = beta * (policy - reference)
    chosen, rejected = rewards.unbind(1)
    margin = chosen - rejected
    dpo = -F.logsigmoid(margin)
    bco = -F.logsigmoid(chosen - shift) - F.logsigmoid(shift - rejected)
    total = weights["dpo"] * dpo + weights["bco"] * bco + weights["sft"] * nll
    return {
        "dpo": dpo,
        "bco": bco,
        "sft": nll,
        "total": total,
        "margin": margin,
        "rewards": rewards,
    }


@dataclass
class Shift:
    """BCO's delta (arXiv 2404.04656): the mean of all rewards so far, chosen and rejected.

    # ours: over all ranks, moved once a step after its use, so that it depends on neither
    micro-batches nor ranks; training alone moves it, and checkpoints keep it.
    """

    total: float = 0.0
    count: float = 0.0

    def value(self) -> float:
        return self.total / self.count if self.count else 0.0

    def add(self, total: float, count: float):
        self.total += total
        self.count += count


def answer_logprobs(model, batch: dict):
    """log p of each answer of a pack, and its tokens: (S,) each."""
    return sum_per_sample(model.logprobs(batch)[0], batch)


# ----------------------------------------------------------------------------------------------
# pairs


@dataclass
class Pair:
    record: dict  # "messages", "chosen", "rejected"
    root: Path  # its media are relative to this folder
    where: str  # for messages


def check_pair(record: dict):
    check_training(record)
    if "chosen" not in record:
        raise ValueError('a preference has "messages", "chosen" and "rejected"')


def given_pairs(path: Path) -> list[Pair]:
    """The pairs of a file, as --pairs is one. SystemExit where many of its lines are none."""
    lines = lines_or_exit(path, check_pair, held=True)
    return [Pair(lines[i], lines.root, lines.where(i)) for i in range(len(lines))]


def own_sources(folder: Path) -> list[Path]:
    """The files whose questions the model answers, as far as they are there."""
    files = files_or_exit(folder / "train")
    return [files[name] for name in ("questions", "instruct") if name in files]


def own_pairs(run: Run, init: Path, folder: Path, plan: dict) -> list[Pair]:
    """The true answer and the worst wrong one, of each question that is answered now so, now so.

    What a model never gets right it cannot see, or read: a pair about that teaches noise (ours).
    Among them stand the pairs of preferences.jsonl.
    """
    written = [pair for path in pool_files(folder, (PAIRS,)) for pair in given_pairs(path)]
    pairs = []
    rights = []
    for path in own_sources(folder):
        questions = evenly(read_or_exit(path), plan["asked"])
        results = attempts(run, init, questions, plan["samples"], run.args.seed)
        for question, tries in zip(questions, results):
            rights += [attempt.right for attempt in tries]
            wrong = [attempt for attempt in tries if not attempt.right]
            if 0 < len(wrong) < len(tries):
                worst = min(wrong, key=lambda attempt: attempt.outcome)
                *asked, truth = question.record["messages"]
                record = {
                    "messages": asked,
                    "chosen": truth["content"],
                    "rejected": worst.text,
                    "rejected_ended": worst.finished,
                    "task": question.task,
                }
                pairs.append(Pair(record, question.root, question.where))
    if not rights and not written:
        raise SystemExit(f"MPO needs --pairs, or questions or instruct.jsonl in {folder / 'train'}")
    if rights:
        run.say(f"{mean(rights):.0%} of the answers are right; {len(pairs)} pairs")
    if written:
        run.say(f"{len(written)} pairs of {PAIRS}.jsonl")
    pairs += written
    random.Random(run.args.seed).shuffle(pairs)
    return pairs


def pair_samples(processor: Processor, pair: Pair, max_tokens: int) -> list[dict]:
    """Chosen and rejected, their media as large as in training, where both share a pack."""
    layouts = [processor.layout(c, pair.root) for c in conversations_of(pair.record)]
    processor.fit(layouts, max_tokens)
    return [processor.load(layout) for layout in layouts]


@torch.no_grad()
def pair_logprobs(run: Run, model, processor: Processor, pairs: list[Pair]) -> dict:
    """(log p of chosen, of rejected) for each pair by its index, on all ranks.

    Few pairs that cannot be read are left out; many end the run.
    """
    max_tokens, _ = packing(run)
    blank = processor({"messages": [{"role": "system", "content": ""}]})
    found = {}
    failures = []
    for first in range(0, len(pairs), 16 * run.world):  # few at a time: their pixels
        ready = []
        samples = []
        for i in range(first + run.rank, len(pairs), run.world)[:16]:
            try:
                samples += pair_samples(processor, pairs[i], max_tokens)
                ready.append(i)
            except (MediaError, ValueError) as e:
                failures.append(f"{pairs[i].where}: {e}")
        sums = []
        for members in even_packs(run, samples, max_tokens, blank):
            with run.autocast():
                sums += answer_logprobs(model, run.to(pack(members)))[0].tolist()
        # Chosen and rejected take turns; what is left at the end are blanks.
        found |= zip(ready, zip(sums[::2], sums[1::2]))

    leave_out(run, failures, len(pairs), "pairs")
    return run.merge(found)


def prepare(run: Run, model_folder: Path, pairs: list[Pair], out: Path):
    """Writes out/train.jsonl and out/held.jsonl: see referenced."""
    if not pairs:
        raise SystemExit("no pair: every answer scores the same")
    records = referenced(run, model_folder, pairs, out)
    on_main(run, f"cannot write {out}", write_pairs, records, out)


def prepare_heldout(run: Run, model_folder: Path, path: Path, out: Path):
    """Writes out/pairs.jsonl, the pairs of a file to measure alone: see referenced."""
    records = referenced(run, model_folder, given_pairs(path), out)
    on_main(run, f"cannot write {out}", write_lines, out / "pairs.jsonl", records)


def referenced(run: Run, model_folder: Path, pairs: list[Pair], out: Path) -> list[dict]:
    """The pairs' records with "reference"; their media are linked below out.

    reference: log-probabilities of chosen and rejected under the model in model_folder.
    """
    model = frozen(run, model_folder)
    processor = Processor.from_pretrained(model_folder)
    records = []
    for i, logprobs in sorted(pair_logprobs(run, model, processor, pairs).items()):
        records.append((pairs[i].record | {"reference": logprobs}, pairs[i].root))
    return linked(run, records, out)


def write_pairs(records: list[dict], out: Path):
    """Every HELD_EVERY-th is kept from training."""
    held = records[::HELD_EVERY]
    del records[::HELD_EVERY]
    write_lines(out / "held.jsonl", held[:HELD_MOST])
    write_lines(out / "train.jsonl", (records + held[HELD_MOST:]) or held)


def preference_accuracy(run: Run, model, processor: Processor, path: Path) -> tuple[float, float]:
    """The share of pairs whose chosen answer is the likelier one, and of those that moved so."""
    _, right, moved = zip(*compared(run, model, processor, path))
    return mean(right), mean(moved)


def compared(run: Run, model, processor: Processor, path: Path) -> list[tuple]:
    """(task, whether the chosen answer is the likelier one, whether it moved so) of each pair.

    The last: by how much it is likelier grew beyond what the reference said.
    """
    pairs = given_pairs(path)
    found = []
    for i, (chosen, rejected) in pair_logprobs(run, model, processor, pairs).items():
        record = pairs[i].record
        before = record["reference"][0] - record["reference"][1]
        found.append((record.get("task", ""), chosen > rejected, chosen - rejected > before))
    return found


def compare_heldout(run: Run, model, processor: Processor, path: Path, when: str):
    """Says how often the chosen answer of pairs that are held out is the likelier one, by task."""
    if not path.exists():
        return
    right = defaultdict(list)
    for task, is_likelier, _ in compared(run, model, processor, path):
        right[task or PAIRS].append(is_likelier)
    shares = {task: mean(right[task]) for task in sorted(right)}
    said = ", ".join(f"{task} {share:.1%} of {len(right[task])}" for task, share in shares.items())
    run.say(f"{when}, held-out preferences: the chosen answer is the likelier one in {said}")
    run.write({f"preferred_{task}_{when}": share for task, share in shares.items()})


# ----------------------------------------------------------------------------------------------
# training


def losses_of_pairs(run: Run, model, batch: dict, shift: float) -> dict:
    """mpo_loss of the pairs in a pack, whose chosen and rejected answers lie side by side.

    A pack whose pairs all failed has none: its gradient is zero, and every rank runs as many
    backwards as the others.
    """
    batch = run.to(batch)
    with run.autocast():
        sums, lengths = answer_logprobs(model, batch)  # (S,) each
    reference = batch.get("reference", sums.new_zeros(0, 2))  # (P, 2)
    policy = sums[: reference.numel()].view_as(reference)
    chosen_length = lengths[: reference.numel() : 2]  # (P,)
    nll = -policy[:, 0] / chosen_length.clamp(min=1)
    return mpo_loss(policy, reference, nll, shift)


def gradients_of_pairs(run, model, batches, pairs: float, shift: float, replay, weight) -> dict:
    """Adds the gradients of a step with `pairs` on all ranks; -> means of its losses."""
    log = defaultdict(list)
    for batch in batches:
        parts = losses_of_pairs(run, model, batch, shift)
        (parts["total"].sum() / pairs).backward()

        parts["right"] = (parts["margin"] > 0).float()
        for name, values in parts.items():
            log[name] += values.flatten().tolist()

    if replay:
        log["replay_loss"].append(replay.backward(model, weight))
    return run.means(log)


def mpo(run: Run, init: Path, data: Path, lr: float, steps: int, mix=(), weight: float = 0.0):
    """MPO on data/train.jsonl, from the model in `init`; leaves run.folder/model.

    mix: files of lines to learn on, and their weights; weight: of their loss.
    """
    args = run.args
    model, processor, opt, progress = trainable(run, init, lr)
    shift = Shift(*progress.extra.get("shift", ()))
    held = data / "held.jsonl"
    heldout = data / "heldout" / "pairs.jsonl"  # what is compared, of the held-out folder
    if progress.step == 0:
        right, _ = preference_accuracy(run, model, processor, held)
        run.say(f"before: the chosen answer is the likelier one in {right:.1%} of {KEPT}")
        run.write({"preference_accuracy_before": right})
        compare_heldout(run, model, processor, heldout, "before")
    loader = Loader(
        [(data / "train.jsonl", 1)], processor, *packing(run), run.rank, run.world, args.seed,
        flops=partial(sample_flops, model.config), workers=args.workers, state=progress.loader,
    )
    replay = None
    if mix and weight:
        replay = Replay(run, model.config, processor, mix, progress.extra.get("replay"))

    for step, (batches, info) in zip(range(progress.step, steps), loader):
        now = set_lr(opt, schedule(step, steps, WARMUP))
        pairs = run.sum(sum(len(batch.get("reference", ())) for batch in batches))
        if not pairs:
            raise ValueError(f"step {step}: no pair in any pack; look at {data} and the log")

        means = gradients_of_pairs(run, model, batches, pairs, shift.value(), replay, weight)
        loss, rewards = means.pop("total"), means.pop("rewards")
        norm = clip_gradients(model)
        skip = run.should_skip(loss, norm)
        if not skip:
            opt.step()
        opt.zero_grad(set_to_none=True)
        run.log(
            step, steps, loss=loss, norm=norm, lr=now, pairs=pairs,
            shift=shift.value(), skipped=run.sum(sum(info["skipped"].values())), **means,
            **step_work(model.config, batches + (replay.batches if replay else [])),
        )
        if not skip:
            shift.add(rewards * 2 * pairs, 2 * pairs)
        kept = {"shift": [shift.total, shift.count]}
        if replay:
            kept["replay"] = replay.state
        save_if_due(run, step + 1, steps, model, opt, info["state"], **kept)

    say_failures(run, loader.failures, run.sum(loader.tried), "samples")
    if replay:
        replay.say_failures()
    right, moved = preference_accuracy(run, model, processor, held)
    run.say(
        f"after: the chosen answer is the likelier one in {right:.1%} of {KEPT}; "
        f"{moved:.1%} moved towards it"
    )
    run.write({"preference_accuracy": right, "preference_moved": moved})
    compare_heldout(run, model, processor, heldout, "after")
    export(run, model, processor)


# ----------------------------------------------------------------------------------------------
# rounds: sample, score, pair


def respond(run: Run, model_folder: Path, prompts: list[Prompt], group: int, judge=None):
    """A group of scored responses to each of this rank's share of the prompts.

    The last one is greedy (ours: an endless loop that sampling breaks by chance is only met there).
    """
    generator = Generator.from_pretrained(model_folder, run.device)
    max_answer = SCALE[run.args.size].max_answer
    how = {"max_tokens": max_answer, "keep_pixels": False}
    mine = prompts[run.rank :: run.world]
    sampled = sample_groups(generator, mine, group - 1, **how)
    greedy = sample_groups(generator, mine, 1, temperature=0.0, **how)
    groups = [some + last for some, last in zip(sampled, greedy)]
    leave_out(run, failures_of(mine), len(prompts), "prompts")
    reward_groups(groups, max_answer, judge)
    return groups


def best_and_worst(group: list[Rollout]) -> Pair | None:
    """A prompt's best response, in its mode's form, before its worst, MARGIN apart.

    Where none is right, only what is worse than wrong, a loop or an endless answer, is so far away.
    Where the model chooses, both have chosen the same mode, or the worst none (ours): one answer
    without thinking, lucky and short, is no reason to think less.
    """
    scored = [rollout for rollout in group if rollout.reward.total is not None]
    if not scored:
        return None
    votes = Counter(rollout.reward.parsed.chose for rollout in scored)

    def worth(rollout):
        """Of equals those are better whose mode more of them chose, and then the shorter ones."""
        length = sum(rollout.response.sampled)
        return rollout.reward.total, votes[rollout.reward.parsed.chose], -length

    best = max(scored, key=worth)
    if best.prompt.mode == "auto_think":
        alike = (best.reward.parsed.chose, None)
        scored = [rollout for rollout in scored if rollout.reward.parsed.chose in alike]
    worst = min(scored, key=worth)
    if not best.reward.format or best.reward.total - worst.reward.total < MARGIN:
        return None
    prompt = best.prompt
    record = {
        "messages": prompt_of(prompt.record, prompt.mode),
        "chosen": best.content,
        "rejected": worst.content,
        "rejected_ended": worst.response.finished,
        "mode": prompt.mode,
        "task": prompt.record["meta"]["task"],
        "scores": [best.reward.total, worst.reward.total],
    }
    return Pair(record, prompt.root, f"prompt {prompt.seed}")


def round_pairs(run: Run, start_: Path, questions: list[Question], number: int, plan, judge):
    """One round's pairs, on all ranks, their media already below the round's data folder."""
    data = run.folder / "data"
    prompts = draw_prompts(questions, plan["prompts"], ASKED, f"{run.args.seed}/{number}")
    groups = respond(run, start_, prompts, plan["group"], judge)
    local = []
    failures = []
    for pair in filter(None, map(best_and_worst, groups)):
        try:
            local.append(Pair(link_media(pair.record, pair.root, data), data, pair.where))
        except MediaError as e:
            failures.append(f"{pair.root}: {e}")
    leave_out(run, failures, len(prompts), "pairs")
    pairs = [pair for share in run.gather_objects(local) for pair in share]

    rewards = [rollout.reward for group in groups for rollout in group]
    shares = run.means({
        "right": [reward.right for reward in rewards if reward.right is not None],
        "format": [reward.format for reward in rewards],
        "consistency": [r.consistency for r in rewards if r.consistency is not None],
        "repetition": [reward.repetition > REPEATED for reward in rewards],
    })
    answers = run.sum(len(rewards))
    report = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
    run.say(f"round {number}: {answers} answers, {report}; {len(pairs)} pairs")
    run.write_json("round.json", shares | {"pairs": len(pairs)})
    random.Random(run.args.seed).shuffle(pairs)
    return pairs


# ----------------------------------------------------------------------------------------------
# the two phases


def phase_mpo(args, folder: Path, plan: dict) -> Run:
    init = previous_model(args, "sft")
    files = own_sources(folder) + pool_files(folder, (PAIRS,))
    if args.pairs:
        files = [Path(args.pairs)]
    others = sources_of(folder) if plan["replay"] else {}  # learnt on beside the pairs
    made_from = {"seed": args.seed}
    if not args.pairs:
        made_from |= {"asked": plan["asked"], "samples": plan["samples"]}
    run = start_from(args, "mpo", init, files + list(others.values()), made_from, pairs=args.pairs)
    data = run.folder / "data"
    if not run.trained():
        if not (data / "train.jsonl").exists():
            held = files_or_exit(folder / "heldout").get(PAIRS)
            if held:  # first: what is wrong there is known before hours of sampling
                prepare_heldout(run, init, held, data / "heldout")
            if args.pairs:
                pairs = given_pairs(Path(args.pairs))
            else:
                pairs = own_pairs(run, init, folder, plan)
            prepare(run, init, pairs, data)  # last: its files say that all of this is done
        mix = [(path, MIX[name]) for name, path in others.items() if path.stat().st_size]
        mpo(run, init, data, plan["lr"], args.steps or plan["steps"], mix, plan["replay"])
        run.mark_trained()
    return run


def phase_iterate(args, folder: Path, plan: dict, judge: Judge | None) -> Run:
    model_folder = previous_model(args, "grpo")
    questions = question_pool(folder)
    made_from = {"prompts": plan["prompts"], "group": plan["group"], "seed": args.seed}
    for number in range(1, (args.rounds or plan["rounds"]) + 1):
        name = f"align-{number}"
        run = start_from(args, name, model_folder, pool_files(folder), made_from, last="align")
        data = run.folder / "data"
        if not run.trained():
            if not (data / "train.jsonl").exists():
                pairs = round_pairs(run, model_folder, questions, number, plan, judge)
                prepare(run, model_folder, pairs, data)
            mix = kept_lines(model_folder)
            steps = args.steps or plan["round_steps"]
            mpo(run, model_folder, data, plan["round_lr"], steps, mix, plan["replay"])
            run.mark_trained()
            args.resume = False  # it was for the round that had been interrupted
            args.fresh = True  # what later rounds left is of a model that is no more
        run.close()
        model_folder = run.folder / "model"

    run = start_from(args, "align", model_folder, trains=False)
    if not run.trained():
        target = run.folder / "model"
        on_main(run, f"cannot export to {target}", copy_model, model_folder, target)
        run.mark_trained()
    return run


def copy_model(source: Path, target: Path):
    """Whole, or what stood there stays."""
    tmp = target.with_name("model.tmp")
    clear_folder(tmp)
    shutil.copytree(source, tmp, dirs_exist_ok=True)
    put_in_place(tmp, target)


def main(args):
    begin = time.time()
    folder = data_folder(args)
    plan = plan_of(args, PLAN)
    check_heldout(folder, args.eval_limit)
    if args.phase == "mpo":
        run = phase_mpo(args, folder, plan)
        modes = ["plain"]
    else:
        judge = None
        if args.judge:
            judge = Judge(args.judge, args.judge_model, os.environ.get("JUDGE_KEY", ""))
        run = phase_iterate(args, folder, plan, judge)
        modes = MODES
    run.score(lambda: score_phase(run, folder / "heldout", modes, args.eval_limit))
    run.close()
    took = f"{time.time() - begin:.0f} s"
    run.say(f"alignment ({args.phase}) took {took}; the model is in {run.folder / 'model'}")


if __name__ == "__main__":
    parser = add_judge_arguments(arguments(__doc__))
    parser.add_argument("--phase", required=True, choices=["mpo", "iterate"])
    parser.add_argument("--rounds", type=at_least(1), help="of --phase iterate (default: by size)")
    parser.add_argument("--pairs", help="JSONL of preferences (default: the model's own answers)")
    main(parser.parse_args())
