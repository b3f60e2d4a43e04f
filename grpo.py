r"""Mix-mode reinforcement learning: GRPO on responses in all modes (arXiv 2507.01949, 4.2.2).

    python grpo.py                                          toy, from runs/toy/coldstart/model
    python grpo.py --algo gspo                              sequence ratios, as Keye-VL 1.5
    python grpo.py --judge http://localhost:8000/v1 --judge-model name
    torchrun --nproc_per_node=8 grpo.py --size 8b --data mydata

In: questions with known answers: --data's train/questions.jsonl, detail.jsonl, instruct.jsonl,
premise.jsonl, and discover.jsonl, what no phase before has shown an answer to: half of the prompts
or more. Lines of the cold start, where it has left some, are learnt on beside the rewards, so that
nothing is forgotten.
Out: runs/SIZE/grpo/model; reward and its parts in metrics.jsonl.

Each step draws prompts, gives each a mode, and samples a group of G responses y_i to it; tools run
in the sandbox, and what they return is context, never trained on. A response earns r_i
(common/rewards.py), less what its length and its words cost (charge_length, charge_words). With
p_old the policy that sampled and p_ref the model at the start:

    A_i   = (r_i - mean r) / (std r + 1e-4)              over its group; std unbiased
    rho_t = p(y_t) / p_old(y_t)
    L_t   = -min(rho_t A_i, clip(rho_t, 1 - low, 1 + high) A_i) + beta k3_t
            (where A_i < 0 the first term is at most -3 A_i)
    k3_t  = exp(d) - d - 1,  d = log p_ref(y_t) - log p(y_t)

    --algo    weight of a token (N responses of T_i tokens)   what differs
    grpo      1 / (N T_i)                                      DeepSeekMath, arXiv 2402.03300
    dapo      1 / (all tokens)                                 arXiv 2503.14476
    dr_grpo   1 / (N max_tokens)                               A_i without std, arXiv 2503.20783
    gspo      1 / (N T_i)                                      rho: the response's mean over its
                                                               tokens, arXiv 2507.18071

The groups of a step are dealt over several optimizer steps ("updates"): from the second on the
policy is no longer p_old, so ratios leave 1, and clipping acts. Groups whose responses all earn the
same teach nothing and are dropped: their length apart, which always differs a little. A response
without a score (its judge failed) leaves its group. A question whose responses are all wrong may be
asked again with the hints that its line has, the plan's "hints" of them at most (see helped).
"""

import math
import os
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.fsdp import FSDPModule

from common.checkpoint import export, save_if_due
from common.conversation import MODES
from common.failures import refuse_many, say_failures
from common.judge import Judge
from common.optim import clip_gradients, schedule, set_lr
from common.packing import even_packs, sample_of_label
from common.parallel import whole
from common.questions import (
    DISCOVER,
    POOL,
    Question,
    check_heldout,
    draw_prompts,
    pool_files,
    question_pool,
)
from common.replay import Replay
from common.rollout import Prompt, Rollout, failures_of, reward_groups, sample_groups, trajectory
from common.run import (
    Run,
    add_judge_arguments,
    arguments,
    at_least,
    data_folder,
    plan_of,
    previous_model,
)
from common.verifiers import score, verify
from coldstart import AUTO, MIX, mixture
from data import Processor, pack
from evaluate import score_phase
from generate import Generator
from model import KeyeVL, step_work
from sft import frozen, start_from, trainable

# The mode of a prompt, by weight: of what the model knows, and of what nobody has shown, which is
# found in the modes that stand alone; the others choose among their ways.
ASKED = {"think": 3, "no_think": 4, "auto_think": 4, "agentic_think": 3}
ASKED_NEW = {"think": 4, "no_think": 4, "auto_think": 2, "agentic_think": 1}
# The toy forgets first what it answers without thinking, and finds least while it thinks.
TOY_ASKED = {"think": 3, "no_think": 4, "auto_think": 3, "agentic_think": 2}
TOY_ASKED_NEW = {"think": 6, "no_think": 4, "auto_think": 2, "agentic_think": 1}

# ours, every number but those with a source: Keye states no group size, beta, clip, rate or length.
# prompts, group: of a step; discover: the share of prompts that nobody has shown an answer to;
# updates: optimizer steps on them; pack: tokens of a micro-batch; replay: weight of the loss of the
# cold start's lines, one step's of them beside each update; beta: of the KL term; least: how often
# a known kind is asked whose groups never teach, beside one whose groups always do; asked,
# asked_new: the modes of prompts; hints: the most that a question that always fails is asked with;
# words: what a right answer loses of its outcome that is not the bare value. Our scoreboard reads
# that alone ("orange square" is not the colour that was asked for): without it up to half of what
# was found was lost there. A large model may answer in sentences, which benchmarks' rules read.
PLAN = {
    # "How many objects are there?" is forgotten over new questions that begin alike: without
    # thinking it fell from 98 to 60 % with replay 1.0, to 78 with 3.0 (docs/results.md).
    "toy": {
        "steps": 100, "lr": 3e-4, "prompts": 48, "group": 8, "updates": 1, "discover": 0.6,
        "max_tokens": 144, "pack": 4096, "replay": 3.0, "beta": 0.0, "least": 0.3,
        "hints": 0, "words": 0.5, "asked": TOY_ASKED, "asked_new": TOY_ASKED_NEW,
    },
    # Nearly all that it knows is always right; asked less, it was forgotten. Of the old mean it
    # lost 3 to 4 points without replay, about 2 with 0.3; with 1.0 it gains 0.8 thinking and loses
    # 1.1 without, with 3.0 +1.8 and -0.6, for a point or two less of what is new.
    # Hints teach in 150 steps what took 250; twice as many gain 10 points more (docs/results.md).
    "tiny": {
        "steps": 300, "lr": 1.5e-4, "prompts": 64, "group": 8, "updates": 1, "discover": 0.5,
        "max_tokens": 144, "pack": 16384, "replay": 3.0, "beta": 1e-3, "least": 1.0,
        "hints": 3, "words": 0.5, "asked": ASKED, "asked_new": ASKED_NEW,
    },
    # as tiny's, for want of a trial
    "small": {
        "steps": 300, "lr": 5e-5, "prompts": 64, "group": 8, "updates": 2, "discover": 0.5,
        "max_tokens": 192, "pack": 16384, "replay": 3.0, "beta": 1e-3, "least": 1.0,
        "hints": 3, "words": 0.5, "asked": ASKED, "asked_new": ASKED_NEW,
    },
    # group and rate are those of the same team's Thyme (2508.11630), updates those of GSPO
    "released": {
        "steps": 500, "lr": 5e-7, "prompts": 256, "group": 8, "updates": 4, "discover": 0.5,
        "max_tokens": 4096, "pack": 16384, "replay": 0.0, "beta": 1e-3, "least": 1.0,
        "hints": 3, "words": 0.0, "asked": ASKED, "asked_new": ASKED_NEW,
    },
}
ALGORITHMS = ("grpo", "dapo", "dr_grpo", "gspo")
TAUGHT = "taught_"  # + kind: a metric, the share of its groups whose rewards differ
MOST_CHANCE = 0.3  # what a guess may get right of a question that nobody has answered before
CLIP = (0.2, 0.28)  # low, high: DAPO's
CLIP_SEQUENCE = (3e-4, 4e-4)  # GSPO's own: a mean over many tokens moves little
DUAL_CLIP = 3.0  # a bad response is pushed away no harder, however likely it has become
WARMUP = 0.1  # shares of the steps
ANNEALED = 0.3  # at a constant rate rewards still rise, and greedy answers no longer do
# In auto mode the tokens of <analysis>, which choose the mode, weigh apart: all of them together
# half of what the rest of the response weighs, or a short one's would count many times more.
MODE_WEIGHT = 0.5
# Of two right auto responses the short one is better: this much at max_tokens.
LENGTH_COST = 0.1

# ----------------------------------------------------------------------------------------------
# the loss


def advantages(rewards: list[float | None], algo: str = "grpo", eps: float = 1e-4) -> list[float]:
    """A_i of one group. None (unscored) gets 0, and is in neither mean nor std.

    ValueError for a group of one.
    """
    if len(rewards) < 2:
        raise ValueError("a group of one response has no advantage")
    known = [r for r in rewards if r is not None]
    if len(known) < 2:
        return [0.0] * len(rewards)
    mean = sum(known) / len(known)
    std = (sum((r - mean) ** 2 for r in known) / (len(known) - 1)) ** 0.5
    scale = 1.0 if algo == "dr_grpo" else std + eps
    return [0.0 if r is None else (r - mean) / scale for r in rewards]


def token_weight(length: int, algo: str, max_tokens: int, responses: float, tokens: float) -> float:
    """The weight of each token of a response; responses, tokens: of the whole update."""
    if algo == "dapo":
        return 1 / max(1, tokens)
    if algo == "dr_grpo":
        return 1 / (responses * max_tokens)
    return 1 / (responses * max(1, length))


def k3(logp, reference):
    """Schulman's estimator of KL(p || reference) at sampled tokens, never negative."""
    d = (reference - logp).clamp(-20, 20)
    return d.exp() - d - 1


def policy_loss(
    logp, old, reference, advantage, weight, owner=None, algo="grpo", beta=1e-3, clip=CLIP
):
    """The sum of weight * L_t, and (N,) 1 where clipping stops a token's gradient.

    All (N,), at trained tokens: log-probabilities now, of the policy that sampled and of the
    reference; the response's advantage; token_weight; owner: index of the response, for gspo.
    """
    log_ratio = logp - old
    if algo == "gspo":
        # exp of the response's mean, with the gradient of each token's own log-probability
        lengths = owner.bincount()  # (R,) trained tokens of each response
        sums = logp.new_zeros(len(lengths)).index_add(0, owner, log_ratio.detach())
        log_ratio = (sums / lengths)[owner] + logp - logp.detach()
    ratio = log_ratio.clamp(-10, 10).exp()
    plain = ratio * advantage
    bounded = ratio.clamp(1 - clip[0], 1 + clip[1]) * advantage
    gain = torch.minimum(plain, bounded)
    gain = torch.where(advantage < 0, torch.maximum(gain, DUAL_CLIP * advantage), gain)
    clipped = (gain != plain).float()
    loss = (weight * (beta * k3(logp, reference) - gain)).sum()
    return loss, clipped


# ----------------------------------------------------------------------------------------------
# rollouts: which teach, and what the loss needs of them


def charge_length(groups: list[list[Rollout]], max_tokens: int):
    """In auto mode a response pays for its tokens, so that thinking has to be worth them (ours)."""
    for group in groups:
        for rollout in group:
            reward = rollout.reward
            if rollout.prompt.mode == "auto_think" and reward.total is not None:
                cost = LENGTH_COST * sum(rollout.response.sampled) / max_tokens
                reward.length -= cost
                reward.total -= cost


def charge_words(groups: list[list[Rollout]], share: float):
    """What is right, but not the bare value, loses this share of its outcome (ours)."""
    for group in groups:
        for rollout in filter(earns, group):
            reward = rollout.reward
            meta = rollout.prompt.record["meta"]
            final = reward.parsed.final
            if score(final, meta):
                continue
            _, right_by_rule = verify(final, meta)
            if right_by_rule:  # else a judge found it right, and no rule reads it
                reward.total -= share * reward.outcome


def teaches(group: list[Rollout]) -> bool:
    """Whether the scored responses earn different rewards, their length apart.

    A near box is better than a far one, though both are wrong; but of equal answers the shorter one
    alone would decide, by a token or two that the division by std makes as large as any difference.
    """
    scored = [rollout.reward for rollout in group if rollout.reward.total is not None]
    earned = [reward.total - reward.length for reward in scored]
    return bool(earned) and max(earned) - min(earned) > 1e-6  # of rounding


def helped(ask, groups: list[list[Rollout]], levels: int) -> list[list[Rollout]]:
    """The groups; where all responses were wrong, right ones that a hint has helped to among them.

    Progressive hints (Keye-VL 1.5, arXiv 2509.01563, 4.4.2): a question that always fails is asked
    again with the first of its meta["hints"] behind it, then with the next, until a response is
    right. ours: with all of them at once, as sampling takes as long for few prompts as for more,
    and the first that helps counts. Right ones then take the place of up to half of the wrong
    ones, as responses to the question alone, since that is what will be asked. ask: prompts ->
    their groups, with rewards.
    """
    hints = [
        (i, level) for i, group in enumerate(groups) for level in range(levels)
        if has_hint(group, level)
    ]
    after = list(groups)
    if not hints:
        return after
    hinted = ask([with_hint(groups[i][0].prompt, level) for i, level in hints])
    for (i, _), again in zip(hints, hinted):
        plain = groups[i]
        if after[i] is not plain:
            continue  # fewer hints have helped already
        right = [rollout for rollout in again if earns(rollout)]
        right = [without_hint(rollout, plain[0]) for rollout in right[: len(plain) // 2]]
        if right:
            after[i] = right + plain[len(right) :]
    return after


def has_hint(group: list[Rollout], level: int) -> bool:
    """Whether no response of the group earns what a right one does, and there is such a hint."""
    if not group or any(map(earns, group)):
        return False
    if any(rollout.reward.right is None for rollout in group):
        return False  # a judge has failed: it may have been right
    return level < len(group[0].prompt.record["meta"].get("hints", []))


def earns(rollout: Rollout) -> bool:
    """Whether the response is right, in its mode's form, and was scored."""
    reward = rollout.reward
    return bool(reward.right and reward.format and reward.total is not None)


def with_hint(prompt: Prompt, level: int) -> Prompt:
    hint = prompt.record["meta"]["hints"][level]
    return replace(prompt, hint=hint, seed=f"{prompt.seed}/hint {level}")


def without_hint(rollout: Rollout, plain: Rollout) -> Rollout:
    """The response as one to the question alone: its tokens stand earlier, by the hint's length.

    How likely the sampler found them there, nobody knows.
    """
    hint = rollout.sample["next_position"] - plain.sample["next_position"]
    response = rollout.response
    response.positions = [[at - hint for at in position] for position in response.positions]
    response.logprobs = [math.nan] * len(response.ids)
    return replace(rollout, prompt=plain.prompt, sample=plain.sample)


def analysis_tokens(ids: list[int], tokenizer) -> int:
    """How many of a response's first ids choose the mode: all up to </analysis>."""
    if not tokenizer.decode(ids[:16]).startswith("<analysis>"):
        return 0
    for end in range(1, min(len(ids), 100) + 1):
        if "</analysis>" in tokenizer.decode(ids[:end]):
            return end
    return 0


def training_sample(rollout: Rollout, tokenizer) -> dict:
    """The rollout's trajectory, with what the loss needs at each of its n trained tokens."""
    response = rollout.response
    own = torch.tensor(response.sampled)  # (all tokens,), n of them true
    sampler = torch.tensor(response.logprobs)[own]  # (n,)
    chooses_mode = torch.arange(len(own)) < analysis_tokens(response.ids, tokenizer)
    return trajectory(rollout) | {
        "sampler": sampler,
        "advantage": torch.full_like(sampler, rollout.advantage),
        "chooses_mode": chooses_mode[own],
    }


def set_weights(samples: list[dict], algo: str, max_tokens: int, responses: float, tokens: float):
    """Adds "weight" (n,) to each sample; responses, tokens: of the update, on all ranks."""
    for sample in samples:
        chooses = sample["chooses_mode"]  # (n,)
        length = int(chooses.sum())
        mode_weight = MODE_WEIGHT / (responses * max(1, length))
        rest = len(chooses) - length
        weight = token_weight(rest, algo, max_tokens, responses, tokens)
        sample["weight"] = torch.where(chooses, mode_weight, weight)


PER_TOKEN = ("sampler", "advantage", "weight", "old", "reference")


def batch_of(samples: list[dict]) -> dict:
    """Samples -> one packed batch, with their per-token values end to end, those that they have."""
    batch = pack(samples)
    for key in PER_TOKEN:
        if key in samples[0]:
            batch[key] = torch.cat([sample[key] for sample in samples])
    return batch


def blank_sample(processor: Processor) -> dict:
    """No label, no value: for a rank that has fewer packs than others."""
    sample = processor({"messages": [{"role": "system", "content": ""}]})
    return sample | {key: torch.zeros(0) for key in PER_TOKEN}


@torch.no_grad()
def add_logprobs(run: Run, model: KeyeVL, packs: list[list[dict]], key: str):
    """Adds the model's log-probabilities of the trained tokens to each sample, under `key`."""
    for samples in packs:
        with run.autocast():
            logp, _ = model.logprobs(run.to(pack(samples)))
        lengths = [len(sample["advantage"]) for sample in samples]
        for sample, values in zip(samples, logp.cpu().split(lengths)):
            sample[key] = values


class Sampler:
    """A generator over the weights in training.

    In one process that is the model itself. Under FSDP ranks sample for different times and could
    not gather each layer together: each has a whole copy, refreshed at every step.
    """

    def __init__(self, run: Run, model: KeyeVL, processor: Processor):
        self.trained = model
        if isinstance(model, FSDPModule):
            model = KeyeVL.empty(model.config, run.dtype, run.device).requires_grad_(False)
        self.generator = Generator(model, processor)
        self.blank = blank_sample(processor)

    @torch.no_grad()
    def refresh(self):
        model = self.generator.model
        if model is not self.trained:
            trained = self.trained.state_dict().values()
            for target, source in zip(model.state_dict().values(), trained):
                target.copy_(whole(source))


# ----------------------------------------------------------------------------------------------
# one step of GRPO, and the loop around it


def dealt(run: Run, policy, reference, sampler, kept, plan, algo) -> list[list]:
    """Groups dealt over the updates: of each update its packs, with all that its loss needs.

    The first update's policy is the one that sampled; for those after it, what it says of their
    responses is kept before it moves.
    """
    tokenizer = sampler.generator.processor.tokenizer
    updates = []
    for first in range(plan["updates"]):
        groups = kept[first :: plan["updates"]]
        samples = [training_sample(rollout, tokenizer) for group in groups for rollout in group]
        responses = run.sum(len(samples))
        if responses:
            tokens = run.sum(sum(len(sample["advantage"]) for sample in samples))
            set_weights(samples, algo, plan["max_tokens"], responses, tokens)
            packs = even_packs(run, samples, plan["pack"], sampler.blank)
            if updates:
                add_logprobs(run, policy, packs, "old")
            if reference:
                add_logprobs(run, reference, packs, "reference")
            updates.append(packs)
    return updates


def grpo_step(
    run: Run, policy, reference, sampler, opt, prompts, plan, algo, beta, judge, replay=None
) -> dict:
    """prompts: this rank's share of the step's. Returns what run.log takes."""
    max_tokens = plan["max_tokens"]
    clip = CLIP_SEQUENCE if algo == "gspo" else CLIP
    log = defaultdict(list)

    def ask(prompts: list[Prompt]) -> list[list[Rollout]]:
        # 1. Sample: a group of responses to each prompt, from the policy as it is now; tools run.
        groups = sample_groups(sampler.generator, prompts, plan["group"], max_tokens)
        # 2. Reward: what each response is worth.
        reward_groups(groups, max_tokens, judge)
        charge_length(groups, max_tokens)
        charge_words(groups, plan["words"])
        return groups

    sampler.refresh()
    groups = ask(prompts)
    describe(log, groups)  # as they are asked: what hints help to does not count
    if plan["hints"]:
        alone, groups = groups, helped(ask, groups, plan["hints"])
        log["helped"] += [now is not before for now, before in zip(groups, alone)]

    # 3. Advantage: what it is worth beside the others of its group.
    kept = [group for group in groups if teaches(group)]
    for group in kept:
        totals = [rollout.reward.total for rollout in group]
        for rollout, advantage in zip(group, advantages(totals, algo)):
            rollout.advantage = advantage

    # 4. Batches: the groups are dealt over the updates.
    updates = dealt(run, policy, reference, sampler, kept, plan, algo)

    # 5. Loss and step, for each update; and what the model knew before is learnt on.
    loss_sum = norm = 0.0
    batches = []
    for packs in updates:
        for samples in packs:
            batch = run.to(batch_of(samples))
            with run.autocast():
                logp, entropy = policy.logprobs(batch)  # (N,) each
            now = logp.detach()
            old = batch.get("old", now)
            start = batch.get("reference", now)  # without a reference beta is 0
            loss, clipped = policy_loss(
                logp, old, start, batch["advantage"], batch["weight"],
                sample_of_label(batch), algo, beta, clip,
            )
            loss.backward()
            loss_sum += loss.item()
            log["clipped"] += clipped.tolist()
            log["entropy"] += entropy.tolist()
            log["kl"] += k3(now, start).tolist()
            mismatch = (old - batch["sampler"]).abs()
            log["mismatch"] += mismatch[~batch["sampler"].isnan()].tolist()  # not of hinted ones
            batches.append(batch)
        if replay:
            log["replay_loss"].append(replay.backward(policy, plan["replay"]))
            batches += replay.batches
        norm = clip_gradients(policy)
        if not run.should_skip(0.0, norm):  # a loss that is not finite has no finite gradient
            opt.step()
        opt.zero_grad(set_to_none=True)
    work = step_work(policy.config, batches)
    return {"loss": run.sum(loss_sum), "norm": norm, **run.means(log), **work}


def question_pools(folder: Path) -> list[list[Question]]:
    """The pool of all post-training, and discover.jsonl, as far as they are there.

    Of the last one those that are hard to guess: lucky guesses would be rewarded like what was
    found. Where all are easy to guess, they stay. What is known is asked whole, as the kinds that
    are left out are forgotten first.
    """
    there = [names for names in (POOL, (DISCOVER,)) if pool_files(folder, names)]
    if not there:
        there = [(*POOL, DISCOVER)]  # none: the error names them all
    pools = [question_pool(folder, names) for names in there]

    hard = [q for q in pools[-1] if chance_of(q.meta) <= MOST_CHANCE]
    if hard:
        pools[-1] = hard
    return pools


def chance_of(meta: dict) -> float:
    """The share of guesses that are right, as far as the meta tells."""
    few = {"yesno": 1 / 2}.get(meta["verifier"], 0)
    if meta.get("choices"):
        few = 1 / len(meta["choices"])
    return meta.get("chance") or few


def step_prompts(
    pools: list[list[Question]], plan: dict, seed: str, weights: dict[str, float]
) -> list[Prompt]:
    """A step's prompts, plan["discover"] of them of the second pool, if there are two.

    Of that all kinds are asked alike: whoever is rarely right now has the most to find. Of the
    first pool they are asked by their weights.
    """
    *_, last = pools
    count = plan["prompts"]
    few = round(plan["discover"] * count) if len(pools) > 1 else 0
    prompts = draw_prompts(pools[0], count - few, plan["asked"], seed, weights)
    return prompts + (draw_prompts(last, few, plan["asked_new"], f"{seed}/1") if few else [])


def renewed(weights: dict[str, float], values: dict[str, float], least: float) -> dict[str, float]:
    """How often kinds that the model knows are asked, by the shares of their groups that taught.

    values: a step's metrics; least: for a kind whose groups never teach. What is always right
    teaches nothing now, and may be asked less. Once something that sounds alike draws it away (how
    many there are, to how many with two more) its groups differ, and it is asked until it stands
    again.
    """
    new = dict(weights)
    for name, share in values.items():
        if name.startswith(TAUGHT):
            kind = name.removeprefix(TAUGHT)
            new[kind] = 0.8 * weights.get(kind, 1.0) + 0.2 * max(share, least)
    return new


def kept_lines(init: Path) -> list[tuple[Path, float]]:
    """The files that the cold start before init has learnt from, and their weights; or none."""
    out = init.parent.parent / "coldstart-modes" / "data"
    return mixture(out, MIX | {"auto_think": AUTO}) if (out / "auto_think.jsonl").exists() else []


def train(run: Run, init: Path, pools: list, plan: dict, judge: Judge | None, mix=()):
    """pools: see question_pools; mix: files of lines to learn on, and their weights."""
    args = run.args
    steps = args.steps or plan["steps"]
    # beside the policy: its reference in shards, and where it is sharded itself, the sampler's copy
    copies = bool(args.beta) / run.world + (run.world > 1)
    policy, processor, opt, progress = trainable(
        run, init, plan["lr"], plan["pack"], copies, weight_decay=0.0
    )
    reference = None  # with beta 0 there is no KL term, and no second model
    if args.beta:
        reference = frozen(run, init)
    replay = None
    if mix and plan["replay"]:
        replay = Replay(run, policy.config, processor, mix, progress.extra.get("replay"))
    elif plan["replay"]:
        run.say("no lines of the cold start are here: nothing is learnt on beside the rewards")
    sampler = Sampler(run, policy, processor)
    weights = progress.extra.get("weights", {})
    failures = []  # of this rank
    tried = 0

    for step in range(progress.step, steps):
        lr = set_lr(opt, schedule(step, steps, WARMUP, ANNEALED))
        seed = f"{args.seed}/{step}"
        prompts = step_prompts(pools, plan, seed, weights)
        mine = prompts[run.rank :: run.world]
        values = grpo_step(
            run, policy, reference, sampler, opt, mine, plan, args.algo, args.beta, judge, replay
        )
        failures += failures_of(mine)
        tried += len(prompts)
        refuse_many(sum(run.gather_objects(failures), []), tried, "prompts")
        run.log(step, steps, lr=lr, **judge_failures(run, judge), **values)
        weights = renewed(weights, values, plan["least"])
        kept = {"replay": replay.state} if replay else {}
        save_if_due(run, step + 1, steps, policy, opt, weights=weights, **kept)
    say_failures(run, failures, tried, "prompts")
    if replay:
        replay.say_failures()
    export(run, policy, processor)


def describe(log: dict[str, list], groups: list[list[Rollout]]):
    """Appends the step's numbers to the log: lists, whose means over all ranks are written."""
    for group in groups:
        log["dropped_groups"].append(not teaches(group))
        if not group:
            continue  # its picture or clip could not be read
        meta = group[0].prompt.record["meta"]
        if meta.get("category") != DISCOVER:
            log[TAUGHT + meta["task"]].append(teaches(group))
        totals = [r.reward.total for r in group if r.reward.total is not None]
        if len(totals) > 1:
            log["group_std"].append(float(torch.tensor(totals).std()))
        for rollout in group:
            mode = rollout.prompt.mode
            reward = rollout.reward
            response = rollout.response
            numbers = {
                "outcome": reward.outcome,
                "right": reward.right,
                "format": reward.format,
                "consistency": reward.consistency,
                "repetition": reward.repetition,
                "reward": reward.total,
                f"right_{mode}": reward.right,
                "unscored": reward.total is None,
                "overlong": reward.length,
                "answer_tokens": sum(response.sampled),
                "unfinished": not response.finished,
                "calls": len(response.observations),
            }
            if meta.get("category") == DISCOVER:
                numbers["right_discover"] = reward.right
                numbers[f"right_{meta['task']}"] = reward.right
            for name, value in numbers.items():
                if value is not None:  # a judge was needed, and failed
                    log[name].append(value)
            log["failed_calls"] += [not seen.ok for seen in response.observations]
            for other in MODES:
                log[f"asked_{other}"].append(other == mode)
                if mode == "auto_think" and other != "auto_think":
                    log[f"auto_chose_{other}"].append(reward.parsed.chose == other)


def judge_failures(run: Run, judge: Judge | None) -> dict:
    if judge is None:
        return {}
    failed = run.sum(sum(judge.failed.values()))
    return {"judge_failed": failed / max(1, run.sum(judge.asked))}


def main(args):
    begin = time.time()
    folder = data_folder(args)
    plan = plan_of(args, PLAN)
    args.beta = plan["beta"] if args.beta is None else args.beta
    init = previous_model(args, "coldstart")
    check_heldout(folder, args.eval_limit)
    pools = question_pools(folder)
    files = pool_files(folder, (*POOL, DISCOVER))
    judge = None
    if args.judge:
        judge = Judge(args.judge, args.judge_model, os.environ.get("JUDGE_KEY", ""))

    run = start_from(args, "grpo", init, files, algo=args.algo, beta=args.beta)
    if not run.trained():
        train(run, init, pools, plan, judge, kept_lines(init))
        run.mark_trained()
    run.score(lambda: score_phase(run, folder / "heldout", MODES, args.eval_limit))
    run.close()
    run.say(f"GRPO took {time.time() - begin:.0f} s; the model is in {run.folder / 'model'}")


if __name__ == "__main__":
    parser = add_judge_arguments(arguments(__doc__))
    parser.add_argument("--algo", default="grpo", choices=ALGORITHMS)
    beta = "weight of the KL term (default: by size)"
    parser.add_argument("--beta", type=at_least(0.0), help=beta)
    main(parser.parse_args())
