"""Alignment: preferences by MPO, and rounds of it on what the model itself says (arXiv 2507.01949, 4.1.2 and 4.2.3).

    python align.py --phase mpo                             toy, from runs/toy/sft/model
    python align.py --phase mpo --pairs mine.jsonl          any preferences: {"messages": [..], "chosen": .., "rejected": ..}
    python align.py --phase iterate                         toy, from runs/toy/grpo/model
    torchrun --nproc_per_node=8 align.py --phase mpo --size 8b --data mydata --pairs mydata/train/preferences.jsonl

MPO (arXiv 2411.10442) is 0.8 DPO + 0.2 BCO + 1.0 SFT. With r = beta (log p(answer) - log p_reference(answer)), summed
over an answer's tokens, c for chosen and r for rejected, and delta the mean reward of all answers seen so far:

    DPO  -log sigmoid(r_c - r_r)
    BCO  -log sigmoid(r_c - delta) - log sigmoid(-(r_r - delta))
    SFT  -log p(chosen) / its tokens

The reference is the model at the start; its log-probabilities are computed once and kept beside the pairs. Without
--pairs the model answers --data's train/questions.jsonl and instruct.jsonl several times: the true answer is chosen, the
worst of the wrong ones rejected (Keye's self-improvement pairs).

iterate: in each round the model answers prompts in all modes; rules score repetition, instruction following (the form of
the mode asked for), logic (thinking and answer agree) and the result; of each prompt the best and the worst answer become
a pair if their scores differ by a margin; MPO against the round's start. A judge may score what rules cannot.

The model is left in runs/<size>/mpo/model or runs/<size>/align/model, the pairs in data/ beside it.
"""
import json
import os
import random
import shutil
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import rewards
import trainer
from data import Lines, Loader, MediaError, Processor, adopt, asked, pack, text_lines, versions, write_lines
from evaluate import phase_score
from generate import Generator, by_task, draw, earned, longest_answer, rollout
from model import KeyeVL, training_flops
from sft import attempts, question_pool, read_pool

BETA, WEIGHTS = 0.1, (0.8, 0.2, 1.0)  # MPO's own (and DPO, BCO, SFT); Keye states neither
# ours, every number. asked: lines to which answers are sampled; samples: answers to each; iterate's by round
PLAN = {
    "toy": dict(pack=4096, packs=1, steps=40, lr=1e-4, muon=2, asked=700, samples=3, rounds=2, prompts=320, group=4,
                round_steps=25, round_lr=1e-4),
    "tiny": dict(pack=16384, packs=1, steps=40, lr=5e-5, muon=2, asked=6000, samples=4, rounds=2, prompts=500, group=4,
                 round_steps=30, round_lr=3e-5),
    "small": dict(pack=16384, packs=4, steps=200, lr=5e-5, muon=2, asked=6000, samples=4, rounds=2, prompts=2000, group=4,
                  round_steps=60, round_lr=3e-5),
    # batch 256 and a rate of 2e-7 are those of InternVL3's MPO scripts
    **{size: dict(pack=8192, packs=64, steps=2000, lr=2e-7, muon=0, asked=50_000, samples=8, rounds=3, prompts=10_000,
                  group=8, round_steps=300, round_lr=2e-7) for size in ("0.6b", "1.7b", "4b", "8b")},
}
ADAM = dict(weight_decay=0.05, betas=(0.9, 0.95))
WARMUP = 0.05
HELD, HELD_MOST = 10, 1000  # every tenth pair is kept from training, for the accuracy of the preferences
MARGIN = 0.25  # least difference of the scores of a round's pair; they reach from -1 to 1.5
MODES = {"think": 2, "no_think": 1, "auto_think": 3, "agentic_think": 2}  # of a round's prompts, by weight

# ---------------------------------------------------------------------------------------------------------------------
# the loss


def mpo_loss(policy, reference, nll, shift: float, beta: float = BETA, weights=WEIGHTS) -> dict[str, torch.Tensor]:
    """dpo, bco, sft, total (P,) of each pair, and its rewards (P, 2). policy, reference: log-probabilities of whole answers,
    (P, 2) chosen and rejected; nll (P,): of the chosen one, a token's mean. shift: BCO's delta."""
    reward = beta * (policy - reference)
    chosen, rejected = reward.unbind(1)
    dpo = -F.logsigmoid(chosen - rejected)
    bco = -F.logsigmoid(chosen - shift) - F.logsigmoid(shift - rejected)
    total = weights[0] * dpo + weights[1] * bco + weights[2] * nll
    return {"dpo": dpo, "bco": bco, "sft": nll, "total": total, "rewards": reward}


class Shift:
    """BCO's delta (arXiv 2404.04656): the mean of all rewards so far, chosen and rejected. # ours: counted by pairs, over
    all ranks, once a step after its use, so that it depends on neither micro-batches nor ranks; kept in checkpoints, and
    training alone moves it."""

    def __init__(self, total: float = 0.0, n: float = 0.0):
        self.total, self.n = total, n

    def __float__(self):
        return self.total / self.n if self.n else 0.0

    def add(self, total: float, n: float):
        self.total, self.n = self.total + total, self.n + n


# ---------------------------------------------------------------------------------------------------------------------
# pairs


def answer_logprobs(model, batch):
    """log p of each answer of a pack, summed, and its tokens: (S,) each."""
    return trainer.per_sample(model.logprobs(batch)[0], batch)


@torch.no_grad()
def refer(run, folder: Path, source: Path, target: Path, room: int):
    """Writes source's pairs to target with "reference", the log-probabilities of both answers under the model in `folder`,
    and their media. Pairs that cannot be read are left out, with the reason said."""
    model = KeyeVL.from_pretrained(folder, device=run.device)
    processor, lines, mine, ready = Processor.from_pretrained(folder), text_lines(source), {}, []

    def flush():
        for group in trainer.packs([s for _, samples in ready for s in samples], room):
            with run.autocast():
                told.extend(answer_logprobs(model, run.to(pack(group)))[0].tolist())
        for k, (i, _) in enumerate(ready):
            mine[i] = told[2 * k : 2 * k + 2]
        ready.clear(), told.clear()

    told, tokens = [], 0
    for i in range(run.rank, len(lines), run.world):
        try:
            line = json.loads(lines[i][1])
            if not {"messages", "chosen", "rejected"} <= set(line):
                raise ValueError('a preference has "messages", "chosen" and "rejected"')
            Lines.parse(lines[i][1])
            ready.append((i, [processor(c, source.parent) for c in versions(line)]))
            tokens += sum(len(s["tokens"]) for s in ready[-1][1])
        except (MediaError, ValueError, KeyError, TypeError) as e:
            print(f"skipped {source}:{lines[i][0]}: {e}", flush=True)
        if tokens > room:
            flush()
            tokens = 0
    flush()
    known = {}
    for part in run.gather_objects(mine):
        known |= part
    if not known:
        raise SystemExit(f"{source}: no pair of answers could be read")

    referred = (json.loads(lines[i][1]) | {"reference": known[i]} for i in sorted(known))
    run.attempt(f"cannot write {target}", lambda: run.main and write_lines(
        target, (adopt(line, source.parent, target.parent) for line in referred)))


def own_pairs(run, init: Path, sources: list[Path], target: Path, plan: dict, seed: int):
    """Pairs of the true answer and the worst of the model's wrong ones, for each question it gets wrong."""
    out, all_right = [], []
    for source in sources:
        lines = read_pool(source, plan["asked"])
        for line, got in zip(lines, attempts(run, init, lines, source.parent, plan["samples"], seed)):
            wrong = [a for a in got or () if not a[2]]
            all_right += [a[2] for a in got or ()]
            if wrong:
                worst = min(wrong, key=lambda a: a[1])
                line = {"messages": line["messages"][:-1], "chosen": line["messages"][-1]["content"], "rejected": worst[0],
                        "rejected_ended": worst[4], "task": line["meta"]["task"]}
                out.append((line, source.parent))
    run.say(f"{sum(all_right) / max(1, len(all_right)):.0%} of the answers are right; {len(out)} pairs")
    write_pairs(run, out, target, seed)


def write_pairs(run, pairs: list[tuple[dict, Path]], target: Path, seed: int):
    """Pairs, with the folder that each one's media are relative to, in a fixed random order."""
    if not pairs:
        raise SystemExit("no pair: every answer scores the same")
    order = random.Random(seed).sample(pairs, len(pairs))
    run.attempt(f"cannot write {target}", lambda: run.main and write_lines(
        target, (adopt(pair, root, target.parent) for pair, root in order)))


def split(run, path: Path):
    """path's lines -> train.jsonl and held.jsonl beside it: every HELD-th is kept from training."""
    def write():
        if run.main:
            lines = [json.loads(text) for _, text in text_lines(path)]
            write_lines(path.parent / "held.jsonl", lines[::HELD])
            write_lines(path.parent / "train.jsonl", [line for i, line in enumerate(lines) if i % HELD] or lines[:1])
    run.attempt(f"cannot write beside {path}", write)


@torch.no_grad()
def preference_accuracy(run, model, processor, path: Path, room: int) -> tuple[float, float]:
    """Share of held-out pairs whose chosen answer the model finds likelier than the rejected one, and the share for
    which it finds so by more than its reference did (rank by rank, then together)."""
    lines, hits = [json.loads(text) for _, text in text_lines(path)[:HELD_MOST]], [0, 0, 0]
    blank = [processor({"messages": [{"role": "system", "content": ""}]})]
    for at in range(0, len(lines), 16 * run.world):  # few at a time: their pixels
        mine = lines[at + run.rank : at + 16 * run.world : run.world]
        samples, sums = [processor(c, path.parent) for line in mine for c in versions(line)], []
        for group in trainer.even_packs(run, samples, room, blank):
            with run.autocast():
                sums += answer_logprobs(model, run.to(pack(group)))[0].tolist()
        for k, line in enumerate(mine):
            before, (c, r) = line["reference"], sums[2 * k : 2 * k + 2]
            hits = [hits[0] + (c > r), hits[1] + (c - r > before[0] - before[1]), hits[2] + 1]
    right, more, n = (run.sum(h) for h in hits)
    return right / n, more / n


# ---------------------------------------------------------------------------------------------------------------------
# training


def mpo(run, start: Path, pairs: Path, plan: dict, steps: int, lr: float, seed: int):
    """MPO on pairs with references, from the model in `start`; leaves run.folder/model."""
    split(run, pairs)
    processor, model = Processor.from_pretrained(start), KeyeVL.from_pretrained(start)
    cfg = model.config
    model.decoder.activation_checkpointing = cfg.hidden_size >= 2048
    model = trainer.shard(model, run)
    opt = trainer.adamw(model, dict.fromkeys(("vit", "projector", "decoder"), lr), muon=plan["muon"], **ADAM)
    begin = trainer.resume(run, model, opt)
    shift, held = Shift(*begin["extra"].get("shift", ())), pairs.parent / "held.jsonl"
    if not begin["step"]:
        right, _ = preference_accuracy(run, model, processor, held, plan["pack"])
        run.say(f"before: the chosen answer is the likelier one in {right:.1%} of the held-out pairs")
        run.write({"preference_accuracy_before": right})

    def flops(text, grids):
        return training_flops(cfg, [text + sum(t * h * w for t, h, w in grids) // 4], grids)

    loader = Loader([(pairs.parent / "train.jsonl", 1)], processor, *trainer.share(plan, run.world), run.rank, run.world,
                    seed, flops=flops, workers=run.args.workers, state=begin["loader"])
    for step, (batches, info) in zip(range(begin["step"], steps), loader):
        trainer.set_lr(opt, trainer.schedule(step, steps, int(WARMUP * steps), "cosine", 0.0))
        no_pairs = torch.zeros(0, 2)
        n = run.sum(sum(len(b.get("reference", no_pairs)) for b in batches))
        if not n:
            raise ValueError(f"step {step}: no pair in any pack; look at {pairs} and the log of skipped lines")
        log = dict.fromkeys(("dpo", "bco", "sft", "total", "margin", "right", "rewards"), 0.0)
        for i, batch in enumerate(batches):
            reference = batch.pop("reference", no_pairs).to(run.device)  # (P, 2)
            with run.autocast():
                sums, lengths = answer_logprobs(model, run.to(batch))
            policy, lengths = sums[: 2 * len(reference)].view(-1, 2), lengths[: 2 * len(reference)].view(-1, 2)
            parts = mpo_loss(policy, reference, -policy[:, 0] / lengths[:, 0].clamp(min=1), float(shift))
            trainer.backward(model, parts["total"].sum() / n + 0 * sums.sum(), last=i == len(batches) - 1)
            margin = parts["rewards"].detach() @ torch.tensor([1.0, -1.0], device=run.device)
            parts |= {"margin": margin, "right": (margin > 0).float()}
            for k in log:
                log[k] += float(parts[k].detach().sum())
        log = {k: run.sum(v) for k, v in log.items()}
        norm = trainer.clip(model, 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
        mean = {k: v / n for k, v in log.items() if k != "rewards"}
        work = [(b["segments"].diff().tolist(), b["grids"].tolist()) for b in batches]
        run.log(step, steps, loss=mean.pop("total"), norm=norm, lr=trainer.lr(opt), pairs=n, shift=float(shift), **mean,
                tokens=sum(sum(lengths) for lengths, _ in work), visual_tokens=sum(len(b["patches"]) for b in batches) // 4,
                flops=sum(training_flops(cfg, *w) for w in work), skipped=run.sum(sum(info["skipped"].values())))
        shift.add(log["rewards"], 2 * n)
        trainer.save_if_due(run, step + 1, steps, model, opt, info["state"], shift=[shift.total, shift.n])
    right, more = preference_accuracy(run, model, processor, held, plan["pack"])
    run.say(f"after: the chosen answer is the likelier one in {right:.1%} of the held-out pairs; {more:.1%} moved towards it")
    run.write({"preference_accuracy": right, "preference_moved": more})
    trainer.export(run, trainer.full_state(run, model), cfg, processor, run.folder / "model")


# ---------------------------------------------------------------------------------------------------------------------
# rounds of sampling, scoring and MPO


def respond(run, folder: Path, jobs, group: int, seed: str, judge=None) -> dict[int, list]:
    """jobs: (line, root, mode) -> {index: `group` answers [(content, parts of rewards.reward)]} of this rank's share. The last
    is greedy (ours: an endless loop that sampling breaks by chance is met there alone)."""
    generator, mine, own = Generator.from_pretrained(folder, run.device), {}, list(range(run.rank, len(jobs), run.world))
    longest = longest_answer(generator.model.config)
    for at in range(0, len(own), 128):
        part = own[at : at + 128]
        some = [jobs[i] for i in part]
        seeds = [f"{seed}/{i}" for i in part]
        rows = [a + b for a, b in zip(rollout(generator, some, group - 1, longest, seeds), rollout(generator, some, 1, longest, seeds, 0.0))]
        for i, answers, scored in zip(part, rows, earned(some, rows, longest, judge)):
            mine[i] = [(row["content"], parts | {"parsed": None, "tokens": sum(row["sampled"]), "finished": row["finished"]})
                       for row, parts in zip(answers, scored)]
    return mine


def rank_pairs(jobs, answers: dict[int, list]) -> list[tuple[dict, Path]]:
    """Best and worst answer of each prompt, MARGIN apart, the best in its mode's form. Where none is right, only what is
    worse than wrong, a loop or an endless answer, is so far away."""
    out = []
    for i, got in answers.items():
        line, root, mode = jobs[i]
        scored = sorted((a for a in got if a[1]["total"] is not None), key=lambda a: (a[1]["total"], -a[1]["tokens"]))
        if len(scored) < 2:
            continue
        (worst, low), (best, high) = scored[0], scored[-1]
        if high["format"] and high["total"] - low["total"] >= MARGIN:
            out.append(({"messages": asked(line, mode), "chosen": best, "rejected": worst, "rejected_ended": low["finished"], "mode": mode,
                         "task": line["meta"]["task"], "scores": [high["total"], low["total"]]}, root))
    return out


def iterate(args, folder: Path, plan: dict, judge):
    start = trainer.before(args, "grpo")
    tasks = by_task(question_pool(folder))
    rounds = args.rounds or plan["rounds"]
    if args.fresh:  # later rounds are nothing without the first
        for name in ("align", *(f"align-{n}" for n in range(1, rounds + 1))):
            (Path(args.out) / args.size / name / "score.json").unlink(missing_ok=True)
    for number in range(1, rounds + 1):
        run = trainer.start(args, f"align-{number}")
        if not trainer.finished(run):
            data = run.folder / "data"
            if args.fresh or not (data / "pairs.jsonl").exists():
                jobs = draw(tasks, plan["prompts"], MODES, f"{args.seed}/{number}")
                answers = respond(run, start, jobs, plan["group"], f"{args.seed}/{number}", judge)
                flat, share = [parts for got in answers.values() for _, parts in got], {}
                for k in ("right", "format", "consistency", "repetition"):
                    values = [float(p[k] > rewards.REPEATED) if k == "repetition" else p[k] for p in flat if p[k] is not None]
                    share[k] = run.sum(sum(values)) / max(1, run.sum(len(values)))  # unscored ones in neither
                mine = [adopt(pair, root, data) for pair, root in rank_pairs(jobs, answers)]
                pairs = [(pair, data) for part in run.gather_objects(mine) for pair in part]
                run.say(f"round {number}: {run.sum(len(flat)):.0f} answers, " + ", ".join(f"{k} {v:.1%}" for k, v in share.items())
                        + f"; {len(pairs)} pairs")
                if run.main:
                    data.mkdir(parents=True, exist_ok=True)
                    (data / "round.json").write_text(json.dumps(share | {"pairs": len(pairs)}) + "\n")
                write_pairs(run, pairs, data / "answers.jsonl", args.seed)
                refer(run, start, data / "answers.jsonl", data / "pairs.jsonl", plan["pack"])
            mpo(run, start, data / "pairs.jsonl", plan, args.steps or plan["round_steps"], plan["round_lr"], args.seed)
            trainer.finish(run, {})
            args.resume = False  # it was for the round that had been interrupted
        start = run.folder / "model"
    run = trainer.start(args, "align")
    if not trainer.finished(run):
        if run.main:
            for old in (run.folder / "model", run.folder / "model.tmp"):
                shutil.rmtree(old, ignore_errors=True)
            shutil.copytree(start, run.folder / "model.tmp")
            (run.folder / "model.tmp").rename(run.folder / "model")
        trainer.finish(run, phase_score(run, folder, args, rewards.MODES))
    return run


def main(args):
    plan, folder, began = PLAN[args.size], Path(args.data or f"data/{args.size}"), time.time()
    judge = rewards.Judge(args.judge, args.judge_model, os.environ.get("JUDGE_KEY", "")) if args.judge else None
    if args.phase == "iterate":
        run = iterate(args, folder, plan, judge)
    else:
        init, run = trainer.before(args, "sft"), trainer.start(args, "mpo")
        if trainer.finished(run):
            return
        data, made = run.folder / "data", {"init": str(init), "pairs": args.pairs}  # the references are of this start
        if (data / "made.json").exists() and (was := json.loads((data / "made.json").read_text())) != made:
            raise SystemExit(f"{data} was made with {was}, not with {made}; --fresh starts over")
        if args.fresh or not (data / "pairs.jsonl").exists():
            source = Path(args.pairs) if args.pairs else data / "answers.jsonl"
            if not args.pairs:
                sources = [p for p in (folder / "train" / f"{name}.jsonl" for name in ("questions", "instruct")) if p.exists()]
                if not sources:
                    raise SystemExit(f"MPO needs --pairs, or questions.jsonl or instruct.jsonl in {folder / 'train'}")
                own_pairs(run, init, sources, source, plan, args.seed)
            refer(run, init, source, data / "pairs.jsonl", plan["pack"])
            (data / "made.json").write_text(json.dumps(made)) if run.main else None
        mpo(run, init, data / "pairs.jsonl", plan, args.steps or plan["steps"], plan["lr"], args.seed)
        trainer.finish(run, phase_score(run, folder, args, [None]))
    run.main and print(f"alignment ({args.phase}) took {time.time() - began:.0f} s", flush=True)


if __name__ == "__main__":
    parser = trainer.judge_arguments(trainer.phase_arguments(__doc__))
    parser.add_argument("--phase", required=True, choices=["mpo", "iterate"])
    parser.add_argument("--rounds", type=int, help="of --phase iterate (default: by size)")
    parser.add_argument("--pairs", help="JSONL of preferences, media relative to it (default: the model's own answers)")
    main(parser.parse_args())
