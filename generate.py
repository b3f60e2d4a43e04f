"""Decoding: how Keye-VL answers, one token at a time. A question, a chat on a terminal, a server.

    python generate.py --init runs/toy/pretrain/model --image x.jpg "How many circles?"
    python generate.py --init runs/toy/pretrain/model --video x.mp4      (no question: a chat)
    python generate.py --init runs/toy/pretrain/model < questions.txt    (a chat, a question a line)
    python generate.py --init runs/toy/align/model --image x.jpg "What shape is it?/agentic_think"
    python generate.py --init runs/toy/align/model --serve               (http://127.0.0.1:8000)

After the cold start a question may end with /think, /no_think or /agentic_think; without one the
model chooses. In code, texts come from conversations, or ids from samples:

    generator = Generator(model, processor)
    texts = generator.generate([{"messages": [{"role": "user", "content": "Hi"}]}], temperature=0)
    responses = generator.sample([processor(conversation, root, generate=True)])

Prefill: all tokens of a prompt go through the model at once, as in training, and leave their keys
and values in a cache. Copy: rows that were asked the same, as a group's are, get theirs from the
one that has read it. Decode: from then on one token at a time goes through the model, reads the
cache, adds its own keys and values, and the logits at its place give the next token. On a GPU
such a step is a CUDA graph, and several follow one another before the host looks at what was
written.

Conversations of any lengths are decoded together. Prompts enter packed, without padding. The rows
that are decoded are always the first ones of the cache: when one ends, the last one takes its
place, and a new one enters behind it. Each row draws from its own random numbers, so its text does
not depend on its neighbours. A row that has ended may go on with tokens that it did not write: a
tool's reply, or the user's next turn (common/rollout.py).
"""

import argparse
import io
import math
import os
import random
import re
import sys
import tempfile
import time
import unicodedata
from collections import Counter, deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from common.conversation import MODES, pictures_of
from common.media import MediaError, shortened
from common.rollout import CLOSE_CALL, Response, code_ends, tool_turns, use_sandbox
from common.run import add_sandbox_argument
from common.server import PENALTIES, serve
from data import Processor, pack
from kernels import to_device
from model import Config, KeyeVL, KVCache, scale_like

STOP = ("<|im_end|>", "<|endoftext|>")
# tokens that only a prompt may hold
BANNED = (
    "<|im_start|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CACHE_BYTES = 16 << 30  # ours, of keys and values: 8B's take 144 KiB a token
# ours: a cache that grew for one turn has room for the next, as a graph is captured anew for each
GROWTH = 256
# ours: a graph takes as long to capture as some 20 steps of a small model to run, and a few rows
# are soon fewer still
STEPS_BEFORE_GRAPH = 16
# ours: so many tokens of each row between two looks of the host at what was written, on a GPU; on
# a CPU 1. A look costs a small model a step; a row that ends before the next one has taken some
# steps for nothing.
STRIDE = 8
PART = 512  # ours: of a vocabulary, in which a drawn token is looked for
COLDEST = 1e-20  # ours: a temperature as good as 0; logits over a smaller one would overflow


def max_answer(cfg: Config) -> int:
    """Tokens of an answer in a mode, for code that has a model but no name of its size."""
    return scale_like(cfg).max_answer


# --------------------------------------------------------------------------------------------------
# 1. From logits to a token


def choose(
    logits: Tensor,
    draws: list | Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    banned: Tensor,
    repetition_penalty: float = 1.0,
    seen: list[set] = (),
) -> tuple[Tensor, Tensor]:
    """One token per row: logits (B, V) fp32 and B draws in [0, 1) -> ids (B,), logprobs (B,) fp32.

    Kept are the top_k most likely tokens (0: all), of these the fewest that reach a share of top_p.
    Temperature 0 takes the most likely one. The logprob is that of softmax(logits / temperature)
    over the whole vocabulary, before bans, penalty and truncation, which is what a trainer computes
    again (at temperature 0: that of 1). banned (n,): ids that are never taken. seen: for each row
    the ids that repetition_penalty makes less likely.
    """
    if temperature not in (0, 1):
        logits = logits / max(temperature, COLDEST)
    logp = logits.log_softmax(-1)  # (B, V)
    allowed = logp
    if repetition_penalty != 1:
        allowed = penalised(logits, seen, repetition_penalty)
    allowed = allowed.index_fill_(1, banned, float("-inf"))  # of which no logprob is ever read
    if temperature == 0:
        ids = allowed.argmax(-1)
    else:
        ids = drawn(allowed, draws, top_k, top_p)
    return ids, logp.gather(1, ids[:, None])[:, 0]


def drawn(logits: Tensor, draws: list | Tensor, top_k: int, top_p: float) -> Tensor:
    """Ids (B,) of softmax(logits (B, V)), truncated as choose says, at B draws in [0, 1)."""
    # Truncation needs the tokens sorted. Without it their order does not matter.
    vocab = logits.shape[1]
    k = min(top_k or vocab, vocab)
    order = None
    if k < vocab or top_p < 1:
        logits, order = logits.topk(k, dim=-1)  # (B, k) each, the most likely token first

    p = (logits - logits.amax(-1, keepdim=True)).exp()  # (B, k), in units of the largest
    if top_p < 1:
        cdf = p.cumsum(-1, dtype=torch.float64)
        before = cdf - p  # of all likelier tokens
        p = p * (before < top_p * cdf[:, -1:])
    if not isinstance(draws, Tensor):
        draws = to_device(torch.tensor(draws, dtype=torch.float64), p.device)
    ids = first_beyond(p, draws[:, None])
    return (ids if order is None else order.gather(1, ids))[:, 0]


def first_beyond(p: Tensor, share: Tensor) -> Tensor:
    """The first place (B, 1) of each row of p (B, K) where the sum so far exceeds share (B, 1) of
    all: the inverse of a distribution function.

    In fp64: a sum of 150,000 fp32 shares is off by more than the rarest tokens have. A GPU adds up
    so long a row slowly: of one with many parts the part is found first, then the place in it.
    """
    if p.shape[1] <= 16 * PART:
        cdf = p.cumsum(-1, dtype=torch.float64)
        return first_above(cdf, share * cdf[:, -1:])
    parts = F.pad(p, (0, -p.shape[1] % PART)).double().unflatten(1, (-1, PART))  # (B, n, PART)
    sums = parts.sum(-1)  # (B, n)
    ends = sums.cumsum(-1)
    wanted = share * ends[:, -1:]
    part = first_above(ends, wanted)  # (B, 1)
    inside = parts.take_along_dim(part[:, :, None], 1)[:, 0].cumsum(-1)  # (B, PART)
    return PART * part + first_above(inside, wanted - (ends - sums).gather(1, part))


def first_above(cdf: Tensor, wanted: Tensor) -> Tensor:
    """The first place (B, 1) where a row of cdf (B, n) is above wanted (B, 1).

    Where rounding makes that none: the last place at which it rises.
    """
    last = (cdf < cdf[:, -1:]).sum(-1, keepdim=True)
    return torch.minimum(torch.searchsorted(cdf, wanted, right=True), last)


def penalised(logits: Tensor, seen: list[set], penalty: float) -> Tensor:
    """Logits (B, V) in which ids of `seen` count less: positive ones are divided by the penalty,
    negative ones multiplied (CTRL, arXiv 1909.05858, as Hugging Face has it)."""
    pairs = [(row, i) for row, ids in enumerate(seen) for i in ids]
    at = tuple(to_device(torch.tensor(pairs), logits.device).T)
    x = logits[at]
    return logits.index_put(at, torch.where(x > 0, x / penalty, x * penalty))


# --------------------------------------------------------------------------------------------------
# 2. Who moves next


@dataclass
class Row:
    """A conversation being decoded. `extend` callbacks read it, and may set `left` anew."""

    index: int  # of its sample
    unread: dict | None  # tokens that the cache does not hold; None: the last id alone
    left: int  # tokens that it may still sample
    rng: random.Random
    asked: int = 0  # tokens of its sample
    response: Response = field(default_factory=Response)
    next_position: int = 0  # of the token after the last one, equal on all three axes
    slot: int = -1  # its row of the cache
    seen: set[int] = field(default_factory=set)  # ids that it has read or written
    drawn: list[float] = field(default_factory=list)  # random numbers for its next tokens
    unsent: list[int] = field(default_factory=list)  # ids whose text is not streamed yet

    @property
    def tokens(self) -> int:
        """Of the conversation so far: what was read and written."""
        return self.asked + len(self.response.ids)

    def draws(self, n):
        """The random numbers of its next n tokens. Which ones does not depend on n."""
        while len(self.drawn) < n:
            self.drawn.append(self.rng.random())
        return self.drawn[:n]

    def write(self, tokens, logprobs, stops) -> int:
        """Tokens that the model has just chosen, up to the row's end. Returns how many these are.
        stops: ids that end a response."""
        response = self.response
        response.finished = not stops.isdisjoint(tokens)
        if response.finished:
            end = next(i for i, token in enumerate(tokens) if token in stops)
            tokens, logprobs = tokens[: end + 1], logprobs[: end + 1]
        n = len(tokens)
        response.ids += tokens
        response.logprobs += logprobs
        response.sampled += [True] * n
        start, self.next_position = self.next_position, self.next_position + n
        response.positions += [[place] * 3 for place in range(start, start + n)]
        self.left -= n
        self.seen.update(tokens)
        self.drawn = self.drawn[n:]
        return n

    def read(self, sample):
        """Tokens to go on with. The last id enters the cache together with them."""
        response = self.response
        self.unread = behind(response.ids[-1], self.next_position - 1, sample)
        n = len(sample["tokens"])
        response.ids += sample["tokens"].tolist()
        response.logprobs += [0.0] * n
        response.sampled += [False] * n
        response.positions += sample["positions"].T.tolist()
        response.extensions.append(sample)
        response.finished = False


def behind(token, position, sample):
    """The sample with one text token before it."""
    return sample | {
        "tokens": F.pad(sample["tokens"], (1, 0), value=token),
        "labels": F.pad(sample["labels"], (1, 0), value=-100),
        "positions": F.pad(sample["positions"], (1, 0), value=position),
    }


class Schedule:
    """Rows wait, enter the cache, and leave it. Each step a group of them moves."""

    def __init__(self, rows, places, pack_tokens):
        self.waiting = deque(rows)
        self.active = []  # active[i] has row i of the cache
        self.places = places
        self.pack_tokens = pack_tokens

    def admit(self):
        """Several rows enter together: a prefill for each that ends would often stop the others."""
        free = self.places - len(self.active)
        if free < min(len(self.waiting), -(-self.places // 4)):
            return
        while self.waiting and len(self.active) < self.places:
            row = self.waiting.popleft()
            row.slot = len(self.active)
            self.active.append(row)

    def next_group(self) -> list[Row]:
        """The rows that move next: all have unread tokens, or none has. []: all are done."""
        self.admit()
        unread = [row for row in self.active if row.unread]
        prompts = [row for row in unread if not row.response.ids]
        if prompts:
            return self.first_pack(prompts)
        # Later turns wait until they are a fifth of all: one by one they would stop the others.
        if unread and 5 * len(unread) >= len(self.active):
            return self.first_pack(unread)
        return [row for row in self.active if not row.unread]

    def first_pack(self, rows):
        """The first rows whose unread tokens fit into a pack; at least one. Rows that have the same
        sample to read, read it once."""
        read = {}
        for i, row in enumerate(rows):
            read[id(row.unread)] = len(row.unread["tokens"])
            if len(read) > 1 and sum(read.values()) > self.pack_tokens:
                return rows[:i]
        return rows

    def leave(self, row) -> int:
        """The last row takes the place of the one that leaves. Returns the last one's old place."""
        last = self.active.pop()
        old = last.slot
        if last is not row:
            self.active[row.slot] = last
            last.slot = row.slot
        return old


# --------------------------------------------------------------------------------------------------
# 3. Decoding


class Generator:
    """Batched decoding with a KV cache.

    rows: conversations in the cache at once, as far as CACHE_BYTES reach (default: 64, on CUDA 512,
    as a GPU waits for the host as long for few rows as for many). pack_tokens: tokens of a prefill;
    a longer prompt goes alone. graphs: decode by CUDA graphs, where there is CUDA. On CUDA fp32
    weights compute in bf16. ValueError when the vocabulary is not the model's.
    """

    def __init__(
        self,
        model: KeyeVL,
        processor: Processor,
        rows: int | None = None,
        pack_tokens: int = 16384,
        graphs: bool = True,
    ):
        cfg = model.config
        tokenizer = processor.tokenizer
        special = tokenizer.special
        n_tokens = tokenizer.n_base + len(special)
        if cfg.image_token_id != special["<|image_pad|>"] or cfg.vocab_size < n_tokens:
            raise ValueError(
                "vocabulary and model do not belong together: <|image_pad|> is "
                f"{special['<|image_pad|>']} in {tokenizer.path} and {cfg.image_token_id} in "
                "the model's config"
            )
        weight = model.head_weight
        self.model = model
        self.processor = processor
        self.context = cfg.max_position_embeddings  # tokens of a conversation, at most
        self.device = weight.device
        self.bf16 = weight.is_cuda and weight.dtype == torch.float32
        self.rows = rows or (512 if weight.is_cuda else 64)
        self.pack_tokens = pack_tokens
        self.use_graphs = graphs and weight.is_cuda
        self.stride = STRIDE if weight.is_cuda else 1  # a CPU has nothing to wait for
        self.stop = {special[name] for name in STOP}

        # Never sampled: marks of prompts, and rows of the table that stand for no token.
        banned = [special[name] for name in BANNED] + list(range(n_tokens, cfg.vocab_size))
        # Tokens are chosen in fp64, which MPS does not have.
        where = "cpu" if self.device.type == "mps" else self.device
        self.banned = torch.tensor(banned, device=where)

    @classmethod
    def from_pretrained(cls, folder: str | Path, device, **changes) -> "Generator":
        """Of a model's folder, on CUDA in bf16. changes: see Processor.from_pretrained."""
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        model = KeyeVL.from_pretrained(folder, dtype, device)
        return cls(model, Processor.from_pretrained(folder, **changes))

    def generate(self, conversations: list[dict], root=None, **sampling) -> list[str]:
        """Conversations that end with a user's turn -> the assistant's texts, no control tokens.

        Media paths are relative to root. sampling: see sample; the defaults are those of Keye's
        generation_config.
        """
        samples = [self.processor(c, root, generate=True) for c in conversations]
        responses = self.sample(samples, **sampling)
        tokenizer = self.processor.tokenizer
        return [tokenizer.decode(response.ids, skip_special=True) for response in responses]

    @torch.inference_mode()
    def sample(
        self,
        samples: list[dict],
        max_new_tokens: int | list[int] = 256,
        temperature: float = 0.6,
        top_k: int = 20,
        top_p: float = 0.95,
        seed: int | list | None = None,
        stop: list[int] = (),
        extend: Callable | None = None,
        stream: Callable | None = None,
        repetition_penalty: float = 1.0,
        ends: Callable | None = None,
    ) -> list[Response]:
        """Samples of processor(..., generate=True) -> their responses, in order.

        A response ends with a stop token, or when its max_new_tokens (an int, or one per sample)
        are spent. logprobs, temperature, top_k, top_p, repetition_penalty: see choose; the latter
        counts what stands in the row's prompt too. Samples that are one object are read once.
        seed: an int (sample i draws from "seed/i"), one per sample, or None for fresh randomness.
        stop: further ids that end a response.
        extend(row): called when a row has ended. It goes on behind the sample that this returns
        (processor.extension, or next_turn) while row.left > 0; None ends it.
        stream(i, piece): called with the text of sample i as it comes.
        ends(row): called behind every token; True ends the row as a stop token does.
        """
        check_sampling(temperature, top_k, top_p, repetition_penalty)
        rows = new_rows(samples, max_new_tokens, seed)
        how = (temperature, top_k, top_p, self.banned, repetition_penalty)
        try:
            self.run(rows, how, self.stop | set(stop), extend, stream, ends)
        finally:
            self.graphs = None  # and with them the memory of the cache
        return [row.response for row in rows]

    def without_compilation(self):
        """A trainer's compiled blocks run plainly here: every step of a cache has its own shape."""
        if self.model.decoder.layers[0]._compiled_call_impl is None:
            return nullcontext()
        return torch.compiler.set_stance("force_eager")

    def run(self, rows, how, stops, extend, stream, ends):
        """The loop of decoding: step by step until every row has ended. how: of choose."""
        # whether nobody needs a token before those that follow it
        blind = self.stride > 1 and not stream and not ends and how[-1] == 1
        longest = max((len(row.unread["tokens"]) + row.left for row in rows), default=0)
        places = self.places(len(rows), longest)
        schedule = Schedule(rows, places, self.pack_tokens)
        # One context for all steps: bf16 copies of fp32 weights are made once.
        autocast = torch.autocast("cuda", torch.bfloat16) if self.bf16 else nullcontext()
        with self.without_compilation(), autocast:
            cache = self.model.new_cache(places, longest)
            self.graphs = Graphs(self.device, self.use_graphs)

            # 1. Who moves next: rows with a prompt to read (prefill), else all by a token (decode).
            while group := schedule.next_group():
                decodes = not group[0].unread
                # 2. and 3. What they have to read goes through the model, and gives new tokens.
                move = self.walk if decodes and blind else self.one_token
                ids, logprobs = move(group, cache, how)  # (steps, B) each

                ended = []
                for row, *new in zip(group, ids.T.tolist(), logprobs.T.tolist()):
                    # 4. They are written, up to the row's end. Its next step reads the last id.
                    n = row.write(*new, stops)
                    if decodes:
                        cache.lengths[row.slot] += n
                    last = row.response.finished or row.left <= 0
                    if stream:
                        self.send(row, stream, last)
                    if ends and ends(row):
                        row.response.finished = last = True
                    # A row that has ended may be given more to read.
                    if last and not self.goes_on(row, extend, cache):
                        ended.append(row)

                # 5. Rows that have ended leave. Behind them first: none is moved only to leave.
                for row in sorted(ended, key=lambda row: -row.slot):
                    place, last = row.slot, schedule.leave(row)
                    if last != place:
                        cache.copy(last, place)
                    cache.lengths[last] = 0

    def one_token(self, rows: list[Row], cache: KVCache, how: tuple) -> tuple[Tensor, Tensor]:
        """A token for each of the rows: ids and logprobs (1, B)."""
        # 2. Their new tokens pass through the model, which says what may follow each row.
        logits = self.step(rows, cache)  # (B, V)

        # 3. One token for each row, from the row's own random numbers.
        draws = [draw for row in rows for draw in row.draws(1)]
        ids, logprobs = choose(logits, draws, *how, [row.seen for row in rows])
        return ids[None], logprobs[None]

    def step(self, rows: list[Row], cache: KVCache) -> Tensor:
        """Runs the rows' new tokens; logits (B, V) fp32 of what follows each row's last one."""
        logits = self.prefill(rows, cache) if rows[0].unread else self.decode(rows, cache)
        return logits.to(self.banned.device)

    def prefill(self, rows: list[Row], cache: KVCache) -> Tensor:
        """All unread tokens of the rows go through the model, with their pictures: a pack as in
        training. What several rows are to read is read once. Logits as step's."""
        readers = {}  # rows by what they read
        for row in rows:
            readers.setdefault(id(row.unread), []).append(row)
        first = [same[0] for same in readers.values()]
        batch = pack([row.unread for row in first])
        last = batch["segments"][1:].long() - 1  # (S,) each sample's last token in the pack
        for key in ("tokens", "positions", "patches"):
            batch[key] = batch[key].to(self.device)
        hidden = self.model.step(batch, cache, [row.slot for row in first])  # (T, C)
        logits = self.model.head(hidden[last.to(self.device)]).float()  # (S, V)

        # The others get its keys and values, and its logits.
        for one, *others in readers.values():
            for other in others:
                cache.copy(one.slot, other.slot)
        sample_of = {key: i for i, key in enumerate(readers)}
        which = [sample_of[id(row.unread)] for row in rows]
        for row in rows:
            row.seen.update(row.unread["tokens"].tolist())
            row.next_position = row.unread["next_position"]
            row.unread = None
        return logits[which]

    def decode(self, rows: list[Row], cache: KVCache) -> Tensor:
        """The last id of each row, which the cache does not hold yet, goes through the model.

        All rows of the cache up to the last of these do. Between them some may wait to read a later
        turn: they pass a token of no meaning, and what they read overwrites it. Logits as step's.
        """
        n = rows[-1].slot + 1
        inputs = self.last_ids(rows, cache)  # (3, B)

        def run(inputs):
            hidden = self.model.step_one(*inputs, cache, self.reach(n, cache))
            return self.model.head(hidden).float()

        logits = self.graphs.run(run, [inputs])
        return logits[:n] if n == len(rows) else logits[[row.slot for row in rows]]

    def walk(self, rows: list[Row], cache: KVCache, how: tuple) -> tuple[Tensor, Tensor]:
        """As decode and choose, several times: each id goes through the model as soon as it is
        chosen. Ids and logprobs (steps, B) of the rows, on the host; a row's end is not looked for.
        """
        n = rows[-1].slot + 1
        steps = min(self.stride, *(row.left for row in rows))
        inputs = self.last_ids(rows, cache, steps)  # (3, B)
        size = inputs.shape[1]
        draws = torch.zeros(self.stride, size, dtype=torch.float64)
        draws[:steps, [row.slot for row in rows]] = torch.tensor(
            [row.draws(steps) for row in rows], dtype=torch.float64
        ).T
        now = torch.zeros(1, dtype=torch.long)  # which of the steps comes next
        ids, logprobs = torch.zeros_like(draws, dtype=torch.long), torch.zeros(draws.shape)

        def run(inputs, draws, now, ids, logprobs):
            hidden = self.model.step_one(*inputs, cache, self.reach(n, cache, steps))
            logits = self.model.head(hidden).float()
            chosen, logp = choose(logits, draws.index_select(0, now)[0], *how)
            ids.index_copy_(0, now, chosen[None])
            logprobs.index_copy_(0, now, logp[None])
            now += 1
            inputs += 1  # positions, and tokens that the cache holds
            inputs[0] = chosen
            inputs[2].clamp_(max=cache.max_len - 1)  # a row that waits must not run into the next
            return ids, logprobs

        found = self.graphs.run(run, [inputs, draws, now, ids, logprobs], steps)
        slots = [row.slot for row in rows]
        return tuple(x.cpu()[:steps, slots] for x in found)

    def last_ids(self, rows, cache, steps=1):
        """What the next `steps` begin with. Of the first rows of the cache, up to the last of these
        or some further ones: the last id, its position, and how many tokens the cache holds:
        (3, B)."""
        size = self.graphs.size(rows[-1].slot + 1, len(cache.lengths), steps)
        tokens = [0] * size
        positions = [0] * size
        for row in rows:
            tokens[row.slot] = row.response.ids[-1]
            positions[row.slot] = row.next_position - 1
        return torch.tensor([tokens, positions, cache.lengths[:size]])

    def reach(self, n, cache, steps=1):
        """Places of the cache's first n rows that so many steps look at. A graph is good for any
        length. Without one, no place is looked at that none holds."""
        longest = max(cache.lengths[:n]) + steps
        return cache.max_len if self.use_graphs else min(longest, cache.max_len)

    def goes_on(self, row, extend, cache):
        """Whether the row that has ended goes on; the cache grows by what it may then lack."""
        sample = extend(row) if extend else None
        if sample is None or row.left <= 0:
            return False
        row.read(sample)
        lacking = cache.lengths[row.slot] + len(row.unread["tokens"]) + row.left - cache.max_len
        if lacking > 0:
            cache.grow(max(lacking, GROWTH, cache.max_len // 4))
            self.graphs = Graphs(self.device, self.use_graphs)  # the old ones know the old cache
        return True

    def next_turn(self, row: Row, content: str | list, root: str | Path | None = None) -> dict:
        """What `extend` returns for the user's next message."""
        end = self.processor.tokenizer.special["<|im_end|>"]
        open_end = row.response.ids[-1] != end  # an answer that was cut off is closed first
        message = {"messages": [{"role": "user", "content": content}]}
        start = row.next_position + int(open_end)
        sample = self.processor(message, root, generate=True, continuing=True, start=start)
        return behind(end, row.next_position, sample) if open_end else sample

    def send(self, row, stream, ended):
        """Streams what is whole: a character of several tokens waits for the last of them."""
        row.unsent.append(row.response.ids[-1])
        piece = self.processor.tokenizer.decode(row.unsent, skip_special=True)
        if ended or not piece.endswith("\ufffd"):
            row.unsent = []
            if piece:
                stream(row.index, piece)

    def places(self, n, longest):
        """How many of n rows, each of at most `longest` tokens, the cache holds at once."""
        cfg = self.model.config
        numbers = 2 * cfg.num_hidden_layers * cfg.num_key_value_heads * cfg.head_dim  # a token
        row_bytes = numbers * (2 if self.device.type == "cuda" else 4) * longest
        return max(1, min(self.rows, n, CACHE_BYTES // max(1, row_bytes)))


def check_sampling(temperature, top_k, top_p, repetition_penalty):
    """ValueError where one of them is out of its range."""
    # Written so that NaN is none of them.
    if not (0 <= temperature < math.inf and top_k >= 0 and 0 < top_p <= 1):
        raise ValueError(
            "sampling needs temperature >= 0, top_k >= 0 and 0 < top_p <= 1, got "
            f"{temperature}, {top_k}, {top_p}"
        )
    low, high = PENALTIES
    if not low <= repetition_penalty <= high:
        raise ValueError(
            f"sampling needs repetition_penalty from {low} to {high}, got {repetition_penalty}"
        )


def new_rows(samples, max_new_tokens, seed):
    """A row for each sample, with its limit and its random numbers. ValueError as sample's."""
    n = len(samples)
    if isinstance(max_new_tokens, int):
        max_new_tokens = [max_new_tokens] * n
    if seed is None or isinstance(seed, int):
        seed = [seed if seed is None else f"{seed}/{i}" for i in range(n)]
    if len(max_new_tokens) != n or len(seed) != n:
        counts = f"{len(max_new_tokens)} max_new_tokens and {len(seed)} seeds"
        raise ValueError(f"{n} samples, but {counts}")
    if min(max_new_tokens, default=1) < 1:
        raise ValueError(f"sampling needs max_new_tokens >= 1, got {min(max_new_tokens)}")
    each = enumerate(zip(samples, max_new_tokens, seed))
    return [
        Row(i, sample, limit, random.Random(s), len(sample["tokens"]))
        for i, (sample, limit, s) in each
    ]


class Graphs:
    """Steps of decoding as CUDA graphs, each for a number of rows. Launched from Python one by
    one, a step's some thousand kernels take longer than they run."""

    def __init__(self, device, used: bool = True):
        self.device = device
        self.used = used
        self.steps = Counter()  # taken, by the rows that were needed
        self.ready = False  # whether one has been taken without a graph
        self.graphs = {}
        self.pool = None  # memory that all graphs share: only one runs at a time

    def size(self, n: int, most: int, steps: int) -> int:
        """How many rows, of at most so many, the next steps are run with where n are needed.

        A larger graph serves at first: rows that end soon leave no time to capture one for each
        number of those that are left.
        """
        if not self.used:
            return n
        fitting = min(1 << (n - 1).bit_length(), most)
        self.steps[fitting] += steps
        larger = [size for size in self.graphs if size >= n]
        if larger and self.steps[fitting] <= STEPS_BEFORE_GRAPH:
            return min(larger)
        return fitting

    def run(self, step: Callable, inputs: list[Tensor], times: int = 1):
        """What step(*inputs) returns at the last of so many times, valid until the next run. The
        inputs (..., B) come from the host; a step may change them for the next."""
        size = inputs[0].shape[-1]
        if size in self.graphs:
            graph, static, found = self.graphs[size]
            for held, new in zip(static, inputs):
                held.copy_(new.pin_memory(), non_blocking=True)
        else:
            static = [to_device(x, self.device) for x in inputs]
            # What is set up at a first step, as bf16 copies of weights, must be before a graph is.
            plain = times if not self.used else int(not self.ready)
            for _ in range(plain):
                found = step(*static)
            self.ready = True
            times -= plain
            if not times:
                return found
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                found = step(*static)
            self.pool = graph.pool()
            self.graphs[size] = graph, static, found
        for _ in range(times):
            graph.replay()
        return found


# --------------------------------------------------------------------------------------------------
# 4. The command line


def load(folder: str | Path, device="auto", **changes) -> tuple[KeyeVL, Processor]:
    """Model and processor of a folder, for a command line: SystemExit with what is wrong."""
    if device == "auto":
        device = "cpu"
        if torch.cuda.is_available():
            device = "cuda"
        elif torch.backends.mps.is_available():
            device = "mps"
    try:
        generator = Generator.from_pretrained(folder, device, **changes)
    except KeyError as e:  # a tensor that is missing, or too many; its str would stand in quotes
        raise SystemExit(f"--init {folder}: {e.args[0]}") from None
    # A device that is not there is a RuntimeError; CUDA, in a PyTorch without it, the last one.
    except (OSError, ValueError, RuntimeError, AssertionError) as e:
        raise SystemExit(f"--init {folder}: {e}") from None
    print(f"{folder} on {device}", file=sys.stderr)
    return generator.model, generator.processor


def visible(text: str) -> str:
    """What a model or a tool wrote, with control characters spelled out but newline and tab: a
    terminal obeys them, and would hide or rewrite what it shows."""
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) == "Cc" and c not in "\n\t"
        else c
        for c in text
    )


# of a terminal: what the model thinks is dim
DIM = {"<think>": "\x1b[2m<think>", "<analysis>": "\x1b[2m<analysis>"}
DIM |= {"</think>": "</think>\x1b[0m", "</analysis>": "</analysis>\x1b[0m"}


class Screen:
    """Prints answers as they come."""

    def __init__(self):
        self.dims = sys.stdout.isatty() and "NO_COLOR" not in os.environ  # see no-color.org
        self.held = ""  # may be the beginning of a tag

    def write(self, piece):
        text = visible(piece)
        if self.dims:
            text = self.held + text
            at = max(text.rfind("<"), 0)
            is_begin = any(tag.startswith(text[at:]) and tag != text[at:] for tag in DIM)
            text, self.held = (text[:at], text[at:]) if is_begin else (text, "")
            text = re.sub("|".join(DIM), lambda tag: DIM[tag[0]], text)
        print(text, end="", flush=True)

    def end(self):
        print(self.held + ("\x1b[0m" if self.dims else ""), flush=True)
        self.held = ""


SWITCHES = tuple(f"/{mode}" for mode in MODES)
HELP = f"""\
one question a line; before it /image PATH and /video PATH, which add to it;
{", ".join(SWITCHES)}, alone or at its end: how to think from then on, or this once;
/new forgets all that was said; ctrl-D ends"""
UNREADABLE = re.compile("[\ud800-\udfff]")  # what bytes become that are no UTF-8


def item_of(kind: str, path: str, fps: float | None) -> dict:
    """A picture or clip as an item of a message."""
    item = {"type": kind, kind: path}
    return item if kind == "image" or fps is None else item | {"fps": fps}


class Chat:
    """A conversation on the terminal, or with lines from a pipe. Tools run as in training."""

    def __init__(self, generator, args):
        self.generator = generator
        self.args = args
        self.limit = 256 if args.max_new_tokens is None else args.max_new_tokens
        self.screen = Screen()
        self.typed = sys.stdin is not None and sys.stdin.isatty()
        self.switch = ""  # behind each question
        self.attached = []  # what the question shows that is being typed or asked
        self.lines = 0  # read so far
        self.over = False  # no more lines
        self.questions = self.failed = 0
        self.crops = None  # the folder of what tools have shown

    def talk(self, content):
        """Conversations until the lines end; the first begins with what `content` shows."""
        if self.typed:
            print(HELP, file=sys.stderr)
            try:
                import readline  # noqa: F401: lines can be edited, and brought back
            except ImportError:  # not on Windows
                pass
        while not self.over:
            question = self.read_question()
            if question is not None and self.ask(content + question):
                content = []
        if not self.questions and not self.failed:
            raise SystemExit("no question was given")
        if self.failed and not self.typed:
            raise SystemExit(f"{self.failed} lines could not be asked")

    def read_question(self) -> list[dict] | None:
        """The user's next message as a content list. None: /new was said, or the lines are over."""
        self.attached = []
        while True:
            try:
                # Some editors begin a file with a mark that no user has written.
                line = input("> " if self.typed else "").removeprefix("\ufeff").strip()
            except (EOFError, KeyboardInterrupt):
                self.over = True
                return None
            self.lines += 1
            word, _, path = line.partition(" ")
            if word in ("/image", "/video"):
                path = os.path.expanduser(path.strip().strip("'\""))
                self.attached.append(item_of(word[1:], path, self.args.fps))
            elif line in SWITCHES:
                self.switch = "" if line == "/auto_think" else line
            elif line == "/new":
                return None
            elif re.fullmatch(r"/\w+", word):
                self.refuse(f"{word} is none of these:\n{HELP}")
            elif UNREADABLE.search(line):
                self.refuse_question("this question is no UTF-8, so it was not asked")
            elif line:
                self.questions += 1
                line += "" if line.endswith(SWITCHES) else self.switch
                return self.attached + [{"type": "text", "text": line}]

    def refuse(self, why):
        self.failed += 1
        where = "" if self.typed else f"line {self.lines}: "
        print(f"{where}{why}", file=sys.stderr)

    def refuse_question(self, why):
        """And with it what was attached to it: the next one of a pipe has its own."""
        self.refuse(why)
        paths = [shortened(item[item["type"]], 100) for item in self.attached]
        if any(paths):
            print(f"no longer attached: {', '.join(paths)}", file=sys.stderr)
        self.attached = []

    def room(self, sample, before=0) -> int:
        """Tokens that an answer to the sample may have, behind so many of the conversation.
        ValueError where the model's context has no room for one."""
        n, context = len(sample["tokens"]), self.generator.context
        if before + n < context:
            return min(self.limit, context - before - n)
        if before:
            full = f"the conversation has {before} tokens, this question adds {n}"
            cure = "/new forgets all that was said"
        else:
            full, cure = f"the question has {n} tokens", "ask with less text, or show less"
        raise ValueError(f"{full}, and the model's context is {context}: {cure}")

    def ask(self, content):
        """Begins a conversation, which goes on as long as there are questions in a chat. Returns
        whether it could be asked."""
        args = self.args
        conversation = {"messages": [{"role": "user", "content": content}]}
        try:
            sample = self.generator.processor(conversation, ".", generate=True)
            limit = self.room(sample)
            self.pictures = self.look_at(content)  # of all turns: calls name them by their number
        except (MediaError, ValueError) as e:
            if args.prompt is not None:
                raise
            self.refuse_question(e)
            return False
        self.tools = tool_turns(self.generator, [lambda: self.pictures])
        tokenizer = self.generator.processor.tokenizer

        begin = time.perf_counter()
        [response] = self.generator.sample(
            [sample], limit, args.temperature, args.top_k, args.top_p,
            args.seed, [tokenizer.special[CLOSE_CALL]], self.extend,
            lambda i, piece: self.screen.write(piece), args.repetition_penalty,
            code_ends(tokenizer),
        )
        if args.prompt is not None:
            seconds = time.perf_counter() - begin
            n = sum(response.sampled)
            counts = f"{len(sample['tokens'])} tokens read, {n} written"
            print(f"{counts}, {seconds:.2f} s, {n / seconds:.1f} tok/s", file=sys.stderr)
        return True

    def look_at(self, content):
        messages = [{"role": "user", "content": content}]
        return pictures_of({"messages": messages}, ".", allow_outside=True)

    def extend(self, row):
        """After a tool call its result, after an answer the user's next question."""
        sample = self.tools(row)
        if sample is None:
            self.screen.end()
            return self.next_turn(row) if self.args.prompt is None else None
        seen = row.response.observations[-1]
        said = visible(seen.text) or "no text"
        first = len(self.pictures) - len(seen.images) + 1
        for number, picture in enumerate(seen.images, first):
            self.screen.write(f"\n[image({number}): {self.save(picture)}]")
        self.screen.write(f"\n[sandbox: {said}, {len(seen.images)} pictures]\n")
        return sample

    def save(self, picture):
        """Writes what a tool has shown to a new file; returns its path."""
        if self.crops is None:
            self.crops = Path(self.args.crops or tempfile.mkdtemp(prefix="nanokeye-"))
            self.crops.mkdir(parents=True, exist_ok=True)
        number = 1
        while (self.crops / f"{number}.png").exists():
            number += 1
        picture.save(self.crops / f"{number}.png")
        return self.crops / f"{number}.png"

    def next_turn(self, row):
        row.response.observations.clear()  # the next answer has calls of its own
        while content := self.read_question():
            try:
                sample = self.generator.next_turn(row, content, ".")
                row.left = self.room(sample, row.tokens)
                self.pictures += self.look_at(content)
                return sample
            except (MediaError, ValueError) as e:
                self.refuse_question(e)


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("prompt", nargs="?", help="the question; without one, a chat on the terminal, or with the "
        "lines of a pipe")
    add("--init", required=True, help="folder of a model, ours or official")
    add("--image", action="append", default=[], help="picture to look at; may be repeated")
    add("--video", action="append", default=[], help="clip to look at; may be repeated")
    add("--fps", type=float, help="of clips (default: 2, 1 or 0.5 by the token budget)")
    add("--crops", metavar="FOLDER", help="what tools show is saved here (default: a new folder "
        "among the system's temporary ones)")
    add("--max-new-tokens", type=int, help="of an answer (default: 256; where a request to a "
        "server says nothing, by the model's size), and at most what the model's context has left")
    add("--temperature", type=float, default=0.6, help="0: always the most likely token")
    add("--top-k", type=int, default=20)
    add("--top-p", type=float, default=0.95)
    add("--repetition-penalty", type=float, default=1.0, help="above 1: fewer repeated words")
    add("--seed", type=int)
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    add_sandbox_argument(parser)
    server = parser.add_argument_group("server")
    add = server.add_argument
    add("--serve", action="store_true", help="speak OpenAI's chat completions over HTTP, and show "
        "a page to chat on; what is set above holds where a request says nothing else")
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, which "
        "this machine alone reaches)")
    add("--port", type=int, default=8000, help="default: %(default)s; 0: any that is free")
    add("--files", metavar="FOLDER", help="requests may name files below it: file:///FOLDER/a.jpg")
    add("--allow-remote", action="store_true", help="fetch pictures and clips from the web: then "
        "whoever can ask can make this machine read any address that it reaches")
    args = parser.parse_args(argv)
    asked = args.prompt is not None or args.image or args.video or args.fps is not None
    if args.serve and asked:
        parser.error("--serve takes questions, pictures and clips from requests alone")
    return args


def main(argv: list[str] | None = None):
    args = arguments(argv)
    use_sandbox(args.sandbox)
    sys.stdout.reconfigure(errors="backslashreplace")  # what a terminal cannot show ends no chat
    if isinstance(sys.stdin, io.TextIOWrapper):  # bytes of one line end no other
        sys.stdin.reconfigure(errors="surrogateescape")
    content = [item_of("image", path, None) for path in args.image]
    content += [item_of("video", path, args.fps) for path in args.video]
    try:
        # allow_outside: the user, not a data set, names the files
        generator = Generator(*load(args.init, args.device, allow_outside=not args.serve))
        if args.serve:
            default = max_answer(generator.model.config)
            limit = default if args.max_new_tokens is None else args.max_new_tokens
            return serve(generator, args, limit)
        if args.prompt is not None:
            question = [{"type": "text", "text": args.prompt}]
            return Chat(generator, args).ask(content + question)
        if content:  # a file that is not there is known before the first question
            messages = [{"role": "user", "content": content}]
            generator.processor({"messages": messages}, ".", generate=True)
        Chat(generator, args).talk(content)
    except (MediaError, OSError, ValueError) as e:  # a picture, options, a folder for --crops
        raise SystemExit(str(e)) from None
    except KeyboardInterrupt:
        Screen().end()  # what was being thought was dim
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
