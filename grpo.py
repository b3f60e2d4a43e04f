r"""Mix-mode reinforcement learning: GRPO on answers in all of Keye's modes (arXiv 2507.01949, 4.2.2).

    python grpo.py                                          toy, from runs/toy/coldstart/model
    python grpo.py --algo gspo                              sequence ratios, as Keye-VL 1.5 (or dr_grpo, dapo)
    python grpo.py --judge http://localhost:8000/v1 --judge-model name
    torchrun --nproc_per_node=8 grpo.py --size 8b --data mydata

Each step draws questions, gives each a mode, and samples a group of G answers y_i; tools run in the sandbox, and what they
return stands in the context but is never trained. An answer earns r_i (rewards.py); what is learned is

    A_i   = (r_i - mean r) / (std r + 1e-4)                 over its group; std unbiased
    rho_t = exp(log p(y_t) - log p_sampled(y_t))
    L_t   = -min(rho_t A_i, clip(rho_t, 1 - low, 1 + high) A_i) + beta k3_t,   at most -3 A_i where A_i < 0
    k3_t  = exp(d) - d - 1,  d = log p_ref(y_t) - log p(y_t)

    --algo     a token's weight (N answers, T_i tokens)     differences
    grpo       1 / (N T_i)                                  DeepSeekMath, arXiv 2402.03300
    dapo       1 / (all tokens)                             arXiv 2503.14476
    dr_grpo    1 / (N longest)                              A_i without std, arXiv 2503.20783
    gspo       1 / (N T_i)                                  rho of the whole answer, its mean per token, arXiv 2507.18071

Groups that are all right or all wrong teach nothing and are dropped: by accuracy, as shaped rewards always differ a
little. An answer without a score (its judge failed) leaves its group. In auto mode the tokens of <analysis>, which choose
the mode, weigh apart from the rest: else a short answer would move them many times more than a long one.

Log: reward and its parts, spread of groups, dropped groups, clipped share, KL, entropy, length, share of thinking, calls.
The model is left in runs/<size>/grpo/model.
"""
import os
import time
from pathlib import Path

import torch
from torch.distributed.fsdp import FSDPModule

import rewards
import trainer
from data import Processor, pack
from evaluate import phase_score
from generate import Generator, by_task, draw, earned, rollout, trajectory
from model import KeyeVL, training_flops
from sft import question_pool

# ours, every number: Keye states no group size, beta, clip, rate, batch or length
PLAN = {
    "toy": dict(pack=4096, steps=40, lr=1.5e-4, muon=2, prompts=32, group=8, updates=1, longest=144),
    "tiny": dict(pack=16384, steps=40, lr=5e-5, muon=2, prompts=64, group=8, updates=1, longest=144),
    "small": dict(pack=16384, steps=200, lr=3e-5, muon=2, prompts=64, group=8, updates=1, longest=192),
    # group, rate and updates are those of the same team's Thyme (2508.11630), which says nothing about lengths
    **{size: dict(pack=16384, steps=500, lr=5e-7, muon=0, prompts=256, group=8, updates=1, longest=4096)
       for size in ("0.6b", "1.7b", "4b", "8b")},
}
ADAM = dict(weight_decay=0.0, betas=(0.9, 0.95))
WARMUP, BETA, DUAL = 0.1, 1e-3, 3.0
CLIP = {"gspo": (3e-4, 4e-4)}  # GSPO's own; else
LOW, HIGH = 0.2, 0.28  # DAPO's
ALGORITHMS = ("grpo", "dapo", "dr_grpo", "gspo")
MODE_WEIGHT = 0.5  # of all mode-choosing tokens of an answer, beside 1 for the rest of it
COST = 0.1  # of an auto answer as long as the longest: of two right answers the short one is better
MODES = {"think": 3, "no_think": 2, "auto_think": 4, "agentic_think": 3}  # of the questions, by weight

# ---------------------------------------------------------------------------------------------------------------------
# the loss


def advantages(totals: list, algo: str = "grpo", eps: float = 1e-4) -> list[float]:
    """A_i of one group's rewards; None (unscored) gets 0 and is in neither mean nor std. ValueError: a group of one."""
    if len(totals) < 2:
        raise ValueError("a group of one answer has no advantage")
    known = [r for r in totals if r is not None]
    if len(known) < 2:
        return [0.0] * len(totals)
    mean = sum(known) / len(known)
    std = (sum((r - mean) ** 2 for r in known) / (len(known) - 1)) ** 0.5
    scale = 1.0 if algo == "dr_grpo" else std + eps
    return [0.0 if r is None else (r - mean) / scale for r in totals]


def spread(rights: list) -> bool:
    """Whether some of a group's scored answers are right (and in form: else they earn nothing) and some not."""
    return len(set(rights)) > 1


def token_weights(lengths: list[int], algo: str, longest: int, n: float, tokens: float) -> list[float]:
    """Weight of each token of answers of these lengths. n, tokens: answers and trained tokens of the whole update."""
    return [{"grpo": 1 / (n * max(1, t)), "gspo": 1 / (n * max(1, t)), "dapo": 1 / max(1, tokens), "dr_grpo": 1 / (n * longest)}[algo]
            for t in lengths]


def k3(logp, reference):
    """Schulman's estimator of KL(p || reference) at sampled tokens, never negative; the difference is kept within +-20."""
    d = (reference - logp).clamp(-20, 20)
    return d.exp() - d - 1


def policy_loss(logp, old, reference, advantage, weight, owner=None, algo="grpo", beta=BETA, clip=(LOW, HIGH)):
    """(loss, clipped): sum of weight * L_t, and (N,) 1 where clipping stops a token's gradient. All (N,) at trained tokens:
    log-probabilities now, of the sampler and of the reference, the answer's advantage, weight (token_weights). owner (N,):
    index of a token's answer, for gspo."""
    ratio = logp - old
    if algo == "gspo":  # exp of the answer's mean, with the gradient of each token's own log-probability
        size = int(owner.max()) + 1 if len(owner) else 0
        zeros = logp.new_zeros(size)
        mean = zeros.index_add(0, owner, ratio.detach()) / zeros.index_add(0, owner, torch.ones_like(ratio)).clamp(min=1)
        ratio = mean[owner] + logp - logp.detach()
    rho = ratio.clamp(-10, 10).exp()
    plain, bounded = rho * advantage, rho.clamp(1 - clip[0], 1 + clip[1]) * advantage
    gain = torch.minimum(plain, bounded)
    gain = torch.where(advantage < 0, torch.maximum(gain, DUAL * advantage), gain)  # a ratio far above 1 is no reason to leap
    clipped = (gain.detach() != plain.detach()).float()
    return (weight * (beta * k3(logp, reference) - gain)).sum(), clipped


# ---------------------------------------------------------------------------------------------------------------------
# questions, answers, samples to train on


def choosing(row: dict, tokenizer) -> int:
    """How many of the row's first ids choose the mode: all up to </analysis>, where it begins with one."""
    if not tokenizer.decode(row["ids"][:16]).startswith("<analysis>"):
        return 0
    return next((i + 1 for i in range(min(len(row["ids"]), 100)) if "</analysis>" in tokenizer.decode(row["ids"][: i + 1])), 0)


def score(jobs, rows, longest: int, judge) -> list[list[dict]]:
    """The parts of every answer's reward; in auto mode its length costs a little (ours)."""
    out = earned(jobs, rows, longest, judge)
    for (_, _, mode), group, told in zip(jobs, rows, out):
        for row, p in zip(group, told):
            if mode == "auto_think" and p["total"] is not None:
                p["total"] -= COST * sum(row["sampled"]) / longest
    return out


def samples_of(group, told, algo: str, tokenizer) -> list[dict]:
    """The group's trajectories with what the loss needs at each trained token: old (sampler), advantage, mode (whether it
    chooses the mode)."""
    out = []
    for row, p, a in zip(group, told, advantages([p["total"] for p in told], algo)):
        sample, first = trajectory(row["sample"], row), choosing(row, tokenizer)
        own = [i for i, s in enumerate(row["sampled"]) if s]
        out.append(sample | {"old": torch.tensor([row["logprobs"][i] for i in own]), "advantage": torch.full((len(own),), a),
                             "mode": torch.tensor([i < first for i in own])})
    return out


def weigh(samples: list[dict], algo: str, longest: int, n: float, tokens: float):
    """Adds "weight" to each sample; the tokens that choose a mode share MODE_WEIGHT / N among them."""
    rest = [int((~s["mode"]).sum()) for s in samples]
    for s, w in zip(samples, token_weights(rest, algo, longest, n, tokens)):
        s["weight"] = torch.where(s["mode"], MODE_WEIGHT / (n * max(1, int(s["mode"].sum()))), w)


def gather_batch(samples: list[dict]) -> dict:
    """Samples -> one packed batch, with their per-token values end to end."""
    batch = pack(samples)
    for key in ("old", "advantage", "weight", "reference"):
        if key in samples[0]:
            batch[key] = torch.cat([s[key] for s in samples]).float()
    batch["owner"] = torch.repeat_interleave(torch.arange(len(samples)), torch.tensor([len(s["old"]) for s in samples]))
    return batch


class Sampler:
    """A generator over the weights in training: the model itself in one process, under FSDP a whole copy on every rank,
    since ranks sample for different times and could not gather each layer together."""

    def __init__(self, model, processor, run):
        self.model, self.copy = model, None
        if isinstance(model, FSDPModule):
            self.copy = KeyeVL.empty(model.config, run.dtype, run.device).requires_grad_(False)
        self.generator = Generator(self.copy or model, processor)

    @torch.no_grad()
    def refresh(self):
        if self.copy is not None:
            for mine, theirs in zip(self.copy.state_dict().values(), self.model.state_dict().values()):
                mine.copy_(trainer.whole(theirs))


# ---------------------------------------------------------------------------------------------------------------------


def train(run, init: Path, pool, plan: dict, steps: int, algo: str, beta: float, seed: int, judge=None):
    processor, model = Processor.from_pretrained(init), KeyeVL.from_pretrained(init)
    cfg, tokenizer, longest = model.config, processor.tokenizer, plan["longest"]
    model.decoder.activation_checkpointing = cfg.hidden_size >= 2048
    model = trainer.shard(model, run)
    opt = trainer.adamw(model, dict.fromkeys(("vit", "projector", "decoder"), plan["lr"]), muon=plan["muon"], **ADAM)
    begin = trainer.resume(run, model, opt)
    reference = None
    if beta:
        reference = trainer.shard(KeyeVL.from_pretrained(init).requires_grad_(False), run)
    sampler, clip, tasks = Sampler(model, processor, run), CLIP.get(algo, (LOW, HIGH)), by_task(pool)
    blank = [{**processor({"messages": [{"role": "system", "content": ""}]}), **{k: torch.zeros(0) for k in ("old", "advantage", "weight", "reference")}}]

    for step in range(begin["step"], steps):
        trainer.set_lr(opt, trainer.schedule(step, steps, int(WARMUP * steps), "constant"))
        sampler.refresh()
        jobs = draw(tasks, plan["prompts"], MODES, f"{seed}/{step}")[run.rank :: run.world]
        seeds = [f"{seed}/{step}/{run.rank + i * run.world}" for i in range(len(jobs))]  # the same on any number of ranks
        rows = rollout(sampler.generator, jobs, plan["group"], longest, seeds)
        told = score(jobs, rows, longest, judge)
        keep = [i for i, t in enumerate(told) if spread([p["right"] and p["format"] for p in t if p["total"] is not None])]
        log, tokens, flops = Log(jobs, rows, told, keep), 0, 0.0

        for update in range(plan["updates"]):
            samples = [s for i in keep[update :: plan["updates"]] for s in samples_of(rows[i], told[i], algo, tokenizer)]
            n, trained = run.sum(len(samples)), run.sum(sum(len(s["old"]) for s in samples))
            if not n:
                continue  # every group was all right or all wrong
            weigh(samples, algo, longest, n, trained)
            groups = trainer.even_packs(run, samples, plan["pack"], blank)
            if reference is not None:
                with torch.no_grad(), run.autocast():
                    for group in groups:
                        parts = reference.logprobs(run.to(pack(group)))[0].cpu().split([len(s["old"]) for s in group])
                        for s, part in zip(group, parts):
                            s["reference"] = part
            else:
                for s in samples:
                    s["reference"] = s["old"]
            for i, group in enumerate(groups):
                batch = run.to(gather_batch(group))
                with run.autocast():
                    logp, entropy = model.logprobs(batch)
                # one update: the sampler's weights are these; its rounding, in bf16, would only trip the clip
                old = batch["old"] if plan["updates"] > 1 else logp.detach()
                loss, clipped = policy_loss(logp, old, batch["reference"], batch["advantage"], batch["weight"],
                                            batch["owner"], algo, beta, clip)
                trainer.backward(model, loss, last=i == len(groups) - 1)
                log.add(loss, clipped, logp, entropy, batch)
                tokens += len(batch["tokens"])
                flops += training_flops(cfg, batch["segments"].diff().tolist(), batch["grids"].tolist())
            norm = trainer.clip(model, 1.0)
            opt.step()
            opt.zero_grad(set_to_none=True)
            log.norm = float(norm)
        values = log.values(run)
        if judge:
            values["judge_failed"] = run.sum(sum(judge.failed.values())) / max(1, run.sum(judge.asked))
        run.log(step, steps, tokens=tokens, flops=flops, lr=trainer.lr(opt), **values)
        if run.bar is not None and run.main:
            run.bar.set_description(f"{run.stage} reward {values['reward']:.2f}")
        trainer.save_if_due(run, step + 1, steps, model, opt)
    trainer.export(run, trainer.full_state(run, model), cfg, processor, run.folder / "model")


class Log:
    """A step's numbers: sums and counts of this rank, means over all of them at the end."""

    def __init__(self, jobs, rows, told, keep):
        self.sums, self.norm = {}, 0.0
        parts = [p for group in told for p in group]
        known = lambda key: [p[key] for p in parts if p[key] is not None]
        for key in ("total", "outcome", "right", "format", "consistency", "repetition", "length"):
            self.put({"total": "reward", "length": "overlong"}.get(key, key), sum(known(key)), len(known(key)))
        self.put("unscored", sum(p["total"] is None for p in parts), len(parts))
        flat = [(row, mode) for (_, _, mode), group in zip(jobs, rows) for row in group]
        self.put("answer_tokens", sum(sum(row["sampled"]) for row, _ in flat), len(flat))
        self.put("unfinished", sum(not row["finished"] for row, _ in flat), len(flat))
        seen = [o for row, _ in flat for o in row["observations"]]
        self.put("calls", len(seen), len(flat))
        self.put("failed_calls", sum(not o.ok for o in seen), len(seen))
        auto = [p for (_, _, mode), group in zip(jobs, told) for p in group if mode == "auto_think"]
        for mode in ("think", "no_think", "agentic_think"):
            self.put(f"auto_chose_{mode}", sum(p["parsed"].chose == mode for p in auto), len(auto))
        for mode in rewards.MODES:
            self.put(f"asked_{mode}", sum(m == mode for _, m in flat), len(flat))
            right = [p["right"] for (_, _, m), group in zip(jobs, told) for p in group if m == mode and p["right"] is not None]
            self.put(f"right_{mode}", sum(right), len(right))
        stds = [torch.tensor(t).std().item() for t in ([p["total"] for p in g if p["total"] is not None] for g in told) if len(t) > 1]
        self.put("group_std", sum(stds), len(stds))
        self.put("dropped_groups", len(told) - len(keep), len(told))
        for key in ("loss", "clipped", "kl", "entropy", "mismatch"):
            self.put(key, 0.0, 0)

    def put(self, key, total, n):
        old = self.sums.get(key, (0.0, 0.0))
        self.sums[key] = (old[0] + float(total), old[1] + float(n))

    def add(self, loss, clipped, logp, entropy, batch):
        n, logp = len(logp), logp.detach()
        self.put("loss", loss.detach(), 0)
        for key, values in (("clipped", clipped), ("kl", k3(logp, batch["reference"])), ("entropy", entropy),
                            ("mismatch", (logp - batch["old"]).abs())):  # the last: sampler against trainer, 0 but for rounding
            self.put(key, values.sum(), n)

    def values(self, run) -> dict:
        keys = list(self.sums)
        rows = run.gather([v for key in keys for v in self.sums[key]])
        totals = [sum(column) for column in zip(*rows)]
        out = {key: total / n if n else 0.0 for key, total, n in zip(keys, totals[::2], totals[1::2])}
        return out | {"loss": totals[2 * keys.index("loss")], "norm": self.norm}


def main(args):
    init, folder, began = trainer.before(args, "coldstart"), Path(args.data or f"data/{args.size}"), time.time()
    run, plan = trainer.start(args, "grpo"), dict(PLAN[args.size])
    if trainer.finished(run):
        return
    pool = question_pool(folder)
    judge = rewards.Judge(args.judge, args.judge_model, os.environ.get("JUDGE_KEY", "")) if args.judge else None
    train(run, init, pool, plan, args.steps or plan["steps"], args.algo, args.beta, args.seed, judge)
    trainer.finish(run, phase_score(run, folder, args, rewards.MODES))
    run.main and print(f"GRPO took {time.time() - began:.0f} s; the model is in {run.folder / 'model'}", flush=True)


if __name__ == "__main__":
    parser = trainer.judge_arguments(trainer.phase_arguments(__doc__))
    parser.add_argument("--algo", default="grpo", choices=ALGORITHMS)
    parser.add_argument("--beta", type=float, default=BETA, help="weight of the KL term; 0 loads no reference (default %(default)s)")
    main(parser.parse_args())
