"""Rollouts: questions go to a model, and its responses come back, with the tools it called.

GRPO, alignment, the filter of SFT, the measuring of the cold start and evaluation all ask this way:

    prompts = [Prompt(record, root, mode="agentic_think", seed="0/7")]
    groups = sample_groups(generator, prompts, group=8, max_tokens=512)
    reward_groups(groups, max_tokens=512)           each rollout gets its reward
    sample = trajectory(groups[0][0])               what was read and written, to train on

The generator is a generate.Generator, and everything goes in and out of it as ids: nothing that a
model wrote is ever encoded again, so the trainer sees the very tokens that were sampled.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import torch
from PIL import Image

from common import sandbox
from common.conversation import TOOL_MODES, pictures_of, prompt_of, text_of
from common.media import MediaError
from common.rewards import Reward, rewards, turn_of

# ours: Keye leaves the marks of code open, and each of these two is one token
OPEN_CALL = "<tool_call>"
CLOSE_CALL = "</tool_call>"
# where Python is run, also the marks that the same team's Thyme writes (arXiv 2508.11630)
OPEN_CODE = "<code>"
CLOSE_CODE = "</code>"
MAX_CALLS = 4  # ours, tool calls of one response
MAX_SHOWN = 8192  # ours, tokens that a response is shown in all; after them come errors
# ours: so many rollouts are decoded together. Many, as the last ones of each chunk are written
# alone; not all, as the pixels of their prompts wait in memory: 2^20 patches are 616 MB.
CHUNK_ROLLOUTS = 2048
CHUNK_PATCHES = 1 << 20


@dataclass
class Response:
    """What followed a prompt, token by token. The first four lists are equally long."""

    ids: list[int] = field(default_factory=list)  # of all tokens, the stop token included
    logprobs: list[float] = field(default_factory=list)  # 0 for tokens that were given
    sampled: list[bool] = field(default_factory=list)  # False for tokens that were given
    positions: list[list[int]] = field(default_factory=list)  # time, row and column of each
    extensions: list[dict] = field(default_factory=list)  # the samples that were given, in order
    finished: bool = False  # the model ended it; False: a limit did
    observations: list[sandbox.Observation] = field(default_factory=list)  # of its tool calls


@dataclass
class Prompt:
    """A question to ask: a record with its true answer, and how it is asked."""

    record: dict
    root: Path | None  # the folder of its media
    mode: str  # "plain", or one of conversation.MODES
    seed: str
    hint: str = ""  # what stands behind the question
    failure: str = ""  # why it could not be asked; set by sample_groups


@dataclass
class Rollout:
    """One response to a prompt. The reward is None until reward_groups sets it."""

    prompt: Prompt
    sample: dict  # the encoded prompt
    response: Response = field(default_factory=Response)
    content: list[dict] = field(default_factory=list)  # the response as an assistant's turn
    reward: Reward | None = None
    advantage: float = 0.0


# --------------------------------------------------------------------------------------------------
# tool calls

_level = "operations"  # of common/sandbox.py: what tool calls may hold in this process


def use_sandbox(level: str):
    """What tool calls may hold from now on. SystemExit where Python cannot be confined here."""
    global _level
    reason = sandbox.refusal() if level == "python" else None
    if reason:
        raise SystemExit(f"--sandbox python: {reason}")
    _level = level


def tool_turns(generator, pictures: list[Callable[[], list[Image.Image]] | None]) -> Callable:
    """An `extend` callback for Generator.sample that answers tool calls.

    Code between <tool_call> and </tool_call> runs in the sandbox, and what it shows stands behind
    it before the model goes on; so does Python between <code> and </code>. The sampler must stop
    behind both: by its stop=[id of </tool_call>] and ends=code_ends(tokenizer).

    pictures: for each sample a function that gives its pictures at full size, called when the first
    tool call needs them; what tools show is appended to its list. None: a call ends the response.
    """
    tokenizer = generator.processor.tokenizer
    # A sample's pictures, always the same list: calls name them by their number in it.
    known = cache(lambda index: pictures[index]())

    def extend(row) -> dict | None:
        response = row.response
        marks = marks_of_call(tokenizer, response.ids)
        if marks is None:
            return None
        calls = len(response.observations)
        if pictures[row.index] is None or calls > MAX_CALLS or row.left <= 0:
            response.finished = False  # a call without a reply is no end of an answer
            return None

        try:
            own = known(row.index)
            seen = run_call(tokenizer.decode(response.ids), marks, calls, own)
        except MediaError as e:  # the file has changed since the prompt was read
            own = []
            seen = sandbox.observe(error=str(e)[:100])
        seen, sample = shown(generator.processor, seen, row.next_position, response.extensions)
        row.left = min(row.left, generator.context - row.tokens - len(sample["tokens"]))
        if row.left < 1:  # the context has no room for it
            response.finished = False
            return None
        own += seen.images
        response.observations.append(seen)
        return sample

    return extend


def marks_of_call(tokenizer, ids) -> tuple[str, str] | None:
    """The marks around the call that the last id has closed; None: it closes none."""
    if ids[-1] == tokenizer.special[CLOSE_CALL]:
        return OPEN_CALL, CLOSE_CALL
    if _level != "python":
        return None
    # "</code>" is several tokens, and the last of them may hold more, as a line feed.
    tail = ids[-len(CLOSE_CODE) :]
    if CLOSE_CODE not in tokenizer.decode(tail) or CLOSE_CODE in tokenizer.decode(tail[:-1]):
        return None
    text = tokenizer.decode(ids)
    in_call = text.rfind(OPEN_CALL) > text.rfind(CLOSE_CALL)
    return None if in_call else (OPEN_CODE, CLOSE_CODE)


def code_ends(tokenizer) -> Callable | None:
    """An `ends` callback for Generator.sample: a row stops behind </code>. None: no Python is run,
    and nobody looks for it."""
    if _level != "python":
        return None
    return lambda row: marks_of_call(tokenizer, row.response.ids) is not None


def run_call(text, marks, calls, pictures):
    """Runs the call that ends `text`, between these marks, after so many earlier calls."""
    opens, closes = marks
    _, mark, code = text.rpartition(closes)[0].rpartition(opens)
    if not mark or closes in code:
        return sandbox.observe(error=f"{closes} without {opens}")
    if calls == MAX_CALLS:
        return sandbox.observe(error=f"at most {MAX_CALLS} calls")
    return sandbox.run(code, pictures, _level)


def shown(processor, seen, start, before):
    """An observation as tokens from position `start` on: (observation, sample).

    Where it cannot be shown, as a strip too narrow for the processor, or after too much in the
    samples `before`, the observation becomes an error that says so.
    """
    try:
        sample = processor.extension(seen.content(), start)
        if sum(len(s["tokens"]) for s in [*before, sample]) > MAX_SHOWN:
            raise ValueError("too much to look at")
    except (MediaError, ValueError) as e:
        seen = sandbox.observe(error=str(e)[:100])
        sample = processor.extension(seen.content(), start)
    return seen, sample


def converse(generator, samples: list[dict], pictures: list, max_tokens, **how) -> list[Response]:
    """generator.sample with tools: pictures as in tool_turns, `how` as in Generator.sample.

    A response is unfinished where a call ends it.
    """
    tokenizer = generator.processor.tokenizer
    stops = dict(stop=[tokenizer.special[CLOSE_CALL]], ends=code_ends(tokenizer))
    tools = tool_turns(generator, pictures)
    return generator.sample(samples, max_tokens, extend=tools, **stops, **how)


# --------------------------------------------------------------------------------------------------
# groups of responses


def sample_groups(
    generator,
    prompts: list[Prompt],
    group: int,
    max_tokens: int | list[int],
    temperature: float = 1.0,
    keep_pixels: bool = True,
) -> list[list[Rollout]]:
    """For each prompt `group` rollouts, sampled from all of the model's distribution.

    Nothing is truncated, so a trainer finds the same probabilities. The k-th response to a prompt
    draws from "{prompt.seed}/{k}", whatever else is asked. max_tokens: an int or one per prompt.
    A prompt whose media cannot be read gets an empty group, and its failure says why.
    keep_pixels=False drops the patches once a chunk is decoded: for callers that ask more than
    memory could hold, and train on none of it.
    """
    if isinstance(max_tokens, int):
        max_tokens = [max_tokens] * len(prompts)
    groups = []
    waiting = []  # (rollout, its max_tokens, its seed)
    patches = 0
    for prompt, limit in zip(prompts, max_tokens, strict=True):
        rollouts = []
        try:
            conversation = {"messages": prompt_of(prompt.record, prompt.mode, prompt.hint)}
            sample = generator.processor(conversation, prompt.root, generate=True)
            rollouts = [Rollout(prompt, sample) for _ in range(group)]
            patches += len(sample["patches"])
        except (MediaError, ValueError) as e:
            prompt.failure = str(e)
        groups.append(rollouts)
        waiting += [(rollout, limit, f"{prompt.seed}/{k}") for k, rollout in enumerate(rollouts)]
        if len(waiting) >= CHUNK_ROLLOUTS or patches > CHUNK_PATCHES:
            respond(generator, waiting, temperature, keep_pixels)
            waiting = []
            patches = 0
    respond(generator, waiting, temperature, keep_pixels)
    return groups


def failures_of(prompts: list[Prompt]) -> list[str]:
    """Where and why, of those that sample_groups could not ask."""
    return [f"{prompt.root}: {prompt.failure}" for prompt in prompts if prompt.failure]


def respond(generator, waiting, temperature, keep_pixels):
    """Sets the response and the content of every (rollout, max_tokens, seed)."""
    if not waiting:
        return
    rollouts, limits, seeds = zip(*waiting)
    samples = [rollout.sample for rollout in rollouts]
    pictures = [load_pictures(rollout.prompt, generator.processor) for rollout in rollouts]
    responses = converse(
        generator, samples, pictures, limits,
        temperature=temperature, top_k=0, top_p=1.0, seed=seeds,
    )
    for rollout, response in zip(rollouts, responses):
        rollout.response = response
        rollout.content = turn_of(response, generator.processor.tokenizer)
        if not keep_pixels:
            for sample in [rollout.sample, *response.extensions]:
                sample.pop("patches", None)


def load_pictures(prompt, processor):
    """What tool_turns takes: pictures of the question alone, or None in a mode without tools."""
    if prompt.mode not in TOOL_MODES:
        return None
    question = {"messages": prompt.record["messages"][:-1]}
    # as the processor has read them
    limits = dict(allow_outside=processor.allow_outside, pixel_limit=processor.pixel_limit)
    return partial(pictures_of, question, prompt.root, **limits)


def reward_groups(groups: list[list[Rollout]], max_tokens: int, judge=None):
    """Sets the reward of every rollout; the last quarter of max_tokens costs more and more."""
    rollouts = [rollout for group in groups for rollout in group]
    asked = []
    for rollout in rollouts:
        prompt = rollout.prompt
        asked.append(
            dict(
                completion=rollout.content,
                meta=prompt.record["meta"],
                mode=prompt.mode,
                question=text_of(prompt.record["messages"][-2]),
                judge=judge,
                finished=rollout.response.finished,
                length=sum(rollout.response.sampled),
                max_tokens=max_tokens,
                buffer=max_tokens // 4,
            )
        )
    for rollout, reward in zip(rollouts, rewards(asked)):
        rollout.reward = reward


def trajectory(rollout: Rollout) -> dict:
    """The prompt and its response as one sample; labels are the ids that the model sampled."""
    prompt = rollout.sample
    response = rollout.response
    ids = torch.tensor(response.ids)  # (n,)
    sampled = torch.tensor(response.sampled)
    tokens = torch.cat([prompt["tokens"], ids])  # (T,)

    # A label is the token that follows: the prompt's last token predicts the first id.
    labels = torch.full_like(tokens, -100)
    labels[len(prompt["tokens"]) - 1 : -1] = torch.where(sampled, ids, -100)

    positions = torch.tensor(response.positions).T  # (3, n)
    read = [prompt, *response.extensions]
    return {
        "tokens": tokens,
        "labels": labels,
        "positions": torch.cat([prompt["positions"], positions], 1),
        "patches": torch.cat([sample["patches"] for sample in read]),
        "grids": torch.cat([sample["grids"] for sample in read]),
    }
