"""Sections 12 to 14: the model writes, calls a tool, and is rewarded."""

import re
import textwrap
from itertools import groupby

import torch

import grpo
from common.conversation import pictures_of, prompt_of
from common.packing import sample_of_label, sum_per_sample
from common.rewards import total, turn_of
from common.rollout import CLOSE_CALL, Prompt, Rollout, reward_groups, tool_turns, trajectory
from data import pack
from generate import Generator, Graphs, Row, choose, drawn, first_beyond, new_rows
from model import KVCache
from tools.walkthrough.drawings import bars, crop_drawing
from tools.walkthrough.page import Walk, num
from toyworld.pictures import look_box
from toyworld.thinking import tool_code


@torch.inference_mode()
def decoding(w: Walk):
    w.generator = Generator(w.model, w.processor)
    prompt = {"messages": prompt_of(w.picture, "plain")}
    sample = w.processor(prompt, w.folder, generate=True)
    [row] = new_rows([sample], 8, seed=0)
    row.slot, cache = 0, w.model.new_cache(1, len(sample["tokens"]) + 8)
    w.generator.graphs = Graphs(w.generator.device, w.generator.use_graphs)
    w.say(f"""
        ## 12. A decoding step

        The question, its answer left open, is {len(sample["tokens"])} tokens. *Prefill*: all of
        them go through the model at once and leave their keys and values in a cache,
        {tuple(cache.k.shape)} each: layers, rows, places, key heads, channels. The last one's
        logits say what may follow; the row's next random number chooses among the 20 likeliest, as
        far as these are needed to reach a share of 0.95.
    """)
    w.quote(KVCache.attend, "for held, new", "held.flatten")
    w.quote(Generator.prefill, "hidden =", "logits =")
    w.quote(choose, "logp = logits", "ids = drawn")
    w.quote(drawn, "p = (logits", "ids = first_beyond")
    w.quote(first_beyond, "cdf =", "return first_above")
    how = (1.0, 20, 0.95, w.generator.banned)  # temperature, top_k, top_p, banned
    rows = []
    for name in ("prefill", "decode", "decode"):
        held = cache.lengths[0]
        logits = w.generator.step([row], cache)  # (1, V)
        likeliest = zip(*logits.softmax(-1)[0].topk(3))
        best = ", ".join(f"`{w.text([i])}` {num(p)}" for p, i in likeliest)
        draw = row.draws(1)
        ids, logp = choose(logits, draw, *how)
        row.write(ids.tolist(), logp.tolist(), w.generator.stop)
        cache.lengths[0] += name == "decode"
        rows.append([name, held, best, num(draw[0]), f"`{w.text(ids.tolist())}`", num(logp)])
    w.table(["step", "cache held", "likeliest three: p", "draw", "chosen", "log p"], *rows)
    whole = trajectory(Rollout(None, sample, row.response))
    again = w.model.logits(pack([whole]))[-2]  # behind the last token that was read
    w.say(f"""
        *Decode*: from then on one token a step goes through the model and reads the cache. Nothing
        is lost: all tokens at once, without a cache, give logits that differ by
        {num((again - logits[0]).abs().max())}.
    """)


def by_hand(w: Walk, *texts: str, ended: bool = True) -> Rollout:
    """A response to w.prompt that is written here; behind each text but the last, a tool answers.

    The last text is cut off where `ended` is False.
    """
    prompt = {"messages": prompt_of(w.picture, w.prompt.mode)}
    rollout = Rollout(w.prompt, w.processor(prompt, w.folder, generate=True))
    [row] = new_rows([rollout.sample], 144, seed=0)
    row.next_position = rollout.sample["next_position"]
    extend = tool_turns(w.generator, [lambda: pictures_of(w.picture, w.folder)])
    stops = w.generator.stop | {w.tokenizer.special[CLOSE_CALL]}
    for words in texts:
        ids = w.tokenizer.encode(words, added=True)
        if words is texts[-1] and ended:
            ids.append(w.tokenizer.special["<|im_end|>"])
        row.write(ids, [0.0] * len(ids), stops)
        if words is not texts[-1]:
            row.read(extend(row))
            row.next_position = row.unread["next_position"]
    rollout.response = row.response
    rollout.content = turn_of(row.response, w.tokenizer)
    return rollout


ANSWER = "</think><answer>\\boxed{%s}</answer>"


def tool_turn(w: Walk):
    meta = w.picture["meta"]
    w.prompt = Prompt(w.picture, w.folder, "agentic_think", "0")
    w.looked = "<think>" + meta["steps"][0] + "\n"
    call = f"{w.looked}<tool_call>{tool_code(meta)}</tool_call>"
    w.rollout = by_hand(w, call, "triangle" + ANSWER % "triangle")
    response = w.rollout.response
    w.say("""
        ## 13. A tool turn

        The dot is too small to be read. In the mode `/agentic_think` a model may write a call;
        decoding stops behind it, the call runs on the picture as it is in the file, and what it
        shows is read like any picture. A fresh model writes no calls, so this response is written
        by hand, as a trained one writes it; all that follows from it is the project's.
    """)
    w.quote(tool_turns, "try:", "seen = run_call", "seen, sample = shown", "own +=")
    w.quote(Row.read, "response.ids +=", "response.sampled +=", "response.extensions")
    rows = []
    for written, same in groupby(range(len(response.ids)), lambda i: response.sampled[i]):
        a, *_, b = same
        first, last = response.positions[a], response.positions[b]
        who = "written" if written else "given by the tool"
        rows.append(f"tokens {a} to {b}, positions {first} to {last}, {who}:")
        words = w.tokenizer.decode(response.ids[a : b + 1])
        rows.append(textwrap.indent(re.sub(r"(<.image_pad.>)+", r"\1 ..", words), "    "))
    w.show(*rows)
    crop = response.observations[0].images[0]
    title = f"The picture in its file; what crop and zoom show, {crop.width} x {crop.height} pixels"
    [picture] = pictures_of(w.picture, w.folder)
    w.draw("tool.svg", title, crop_drawing(picture, look_box(meta["place"]), crop, title))
    w.say(f"""
        The crop is {response.extensions[0]["grids"].tolist()} patches. Coordinates are thousandths
        of the sides. In training, labels stand at tokens that the model wrote, and the tool's have
        none:
    """)
    w.quote(trajectory, "labels = torch.full_like", "labels[len(prompt")
    sample = trajectory(w.rollout)
    learnt = int((sample["labels"] != -100).sum())
    counts = f"{learnt} of {len(sample['tokens'])} tokens are learnt"
    w.say(f"Here {counts}, all of the {sum(response.sampled)} that were written.")


def group(w: Walk):
    others = {
        "without a look": " triangle" + ANSWER % "triangle",
        "wrong": " circle" + ANSWER % "circle",
        "says otherwise": " circle" + ANSWER % "triangle",
        "no box": " triangle</think><answer>triangle</answer>",
        "cut off": "",
    }
    begin = w.looked + "the answer is"
    rollouts = [by_hand(w, begin + text, ended=bool(text)) for text in others.values()]
    w.rollouts, w.names = [w.rollout, *rollouts], ["looks closer", *others]
    reward_groups([w.rollouts], grpo.PLAN["toy"]["max_tokens"])
    totals = [rollout.reward.total for rollout in w.rollouts]
    for rollout, advantage in zip(w.rollouts, grpo.advantages(totals)):
        rollout.advantage = advantage
    w.say("""
        ## 14. A GRPO group

        Six responses to one question, again by hand: the one above, one that guesses right, a wrong
        one, one whose answer is not what its thinking says, one without the box that the mode asks
        for, and one that a limit cut off. Rules give each a reward; `CONSISTENCY` is a half:
    """)
    w.quote(
        total, "if parts.format and", "earned = parts.outcome", "if parts.repetition", "earned -=",
        "return earned",
    )
    w.say("An advantage is a reward beside the others of its group; no value network is needed:")
    w.quote(grpo.advantages, "mean =", "std =", "return [0.0 if r is None")
    rows = [["response", "outcome", "form", "consistency", "reward", "advantage"]]
    for name, rollout in zip(w.names, w.rollouts):
        r = rollout.reward
        parts = r.outcome, r.format, r.consistency, r.total, rollout.advantage
        rows.append([name, *map(num, parts)])
    w.table(*rows)
    title = "Advantages of the group: their sum is 0"
    w.draw("advantages.svg", title, bars([r.advantage for r in w.rollouts], w.names, title))
    w.say(f"""
        A group in which all earn the same teaches nothing, and is left out: `teaches` says
        {grpo.teaches(w.rollouts)} of this one.
    """)


def policy_step(w: Walk):
    names, rollouts, plan = w.names, w.rollouts, grpo.PLAN["toy"]
    samples = [grpo.training_sample(rollout, w.tokenizer) for rollout in rollouts]
    lengths = [len(sample["advantage"]) for sample in samples]
    grpo.set_weights(samples, "grpo", plan["max_tokens"], len(samples), sum(lengths))
    with torch.no_grad():
        old, _ = w.model.logprobs(pack(samples))
    for sample, values in zip(samples, old.split(lengths)):
        sample["old"] = sample["reference"] = values
    batch = grpo.batch_of(samples)

    def loss_of(model):
        per_token = [batch[key] for key in ("old", "reference", "advantage", "weight")]
        logp, _ = model.logprobs(batch)
        return grpo.policy_loss(logp, *per_token, sample_of_label(batch), beta=0.0)[0]

    w.say("""
        Each token of a response carries the response's advantage. Were the model to change much
        from the one that sampled, the ratio's clip would stop the token's gradient.
    """)
    w.quote(grpo.token_weight, "return 1 / (responses * max(1, length))")
    w.quote(grpo.policy_loss, "log_ratio =", "ratio =", "plain =", "bounded =", "gain = torch.min",
            "loss =")
    later = w.moved(plan["lr"], loss_of)
    with torch.no_grad():
        before, after = loss_of(w.model), loss_of(later)
        change = later.logprobs(batch)[0] - batch["old"]
    sums, counts = sum_per_sample(change, batch)
    w.table(["response", "tokens written", "advantage", "log p changes by"],
            *[[name, int(n), num(rollout.advantage), f"{float(s):+.3f}"]
              for name, rollout, n, s in zip(names, rollouts, counts, sums)])
    w.say(f"""
        At first every ratio is 1 and the loss {num(before)}, as advantages add up to nothing; its
        gradient does not, and after one step the loss is {num(after)}. Responses share most of
        their words, and one step moves them all: what counts is who gains on whom.

        That is all: [grpo.py](../grpo.py), `grpo_step`, does these steps with responses that the
        model samples itself.
    """)
