"""Sampling from Keye-VL with a KV cache, and a command line for one question or a chat.

    python generate.py --init runs/toy/pretrain/model --image x.jpg "How many circles?"
    python generate.py --init runs/toy/pretrain/model --video x.mp4          (no question: a chat)
    python generate.py --init runs/toy/align/model --image x.jpg "What shape is the red dot?/agentic_think"

After the cold start a question may end with /think, /no_think or /agentic_think; without one the model chooses.

    generator = Generator(model, processor)
    texts = generator.generate([{"messages": [{"role": "user", "content": ...}]}], temperature=0)
    rows = generator.sample([processor(conversation, root, generate=True), ...])      ids in, ids out

Conversations of any lengths are decoded together. Prompts enter packed, without padding; a row that ends gives its
place in the cache to the next one waiting; each row draws from its own random numbers, so its text does not depend on
its neighbours. A row that stopped may go on with tokens it did not write: a tool's answer, or the user's next turn.

    rows = converse(generator, samples, pictures)        the model's tool calls are run, and it goes on with what they show
    sample = trajectory(prompt, row)                     what was read and written, as a sample to train on
"""
import argparse
import contextlib
import random
import sys
import time
from collections import defaultdict, deque
from dataclasses import dataclass, field
from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor

import sandbox
from data import MediaError, Processor, asked, media_of, pack, pictures_of, text_of
from model import KeyeVL
from rewards import TOOLS, rewards, turn_of

NEVER = ("<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
STOP = ("<|im_end|>", "<|endoftext|>")
CACHE = 16 << 30  # bytes of keys and values at a time: 8B's take 144 KiB a token


@dataclass
class Row:
    """One conversation being decoded. `extend` callbacks read it, and may give it more tokens by setting `left`."""
    index: int  # of its sample
    new: dict | None  # a sample that is not in the cache yet; None: only the last id is not
    left: int  # tokens it may still write
    rng: random.Random
    next_position: int = 0  # of the token after the last id, equal on all three axes
    finished: bool = False  # the last id is a stop token
    ids: list[int] = field(default_factory=list)  # all after the prompt
    logprobs: list[float] = field(default_factory=list)  # of ids; 0 where extend gave the token
    sampled: list[bool] = field(default_factory=list)  # False where extend gave the token
    positions: list[list[int]] = field(default_factory=list)  # time, row, column of ids
    seen: list[dict] = field(default_factory=list)  # the samples that extend gave
    unsent: list[int] = field(default_factory=list)  # ids whose text is not streamed yet
    slot: int = -1  # row of the cache


def choose(logits: Tensor, draws: list[float], temperature: float, top_k: int, top_p: float, banned: Tensor):
    """One token per row: logits (B, V) fp32, draws B numbers in [0, 1) -> ids (B,), log-probabilities (B,) fp32.

    As usual: the top_k most likely tokens (0: all), of these the fewest that reach a share of top_p, renormalised.
    Temperature 0 takes the most likely one. The log-probability is that of softmax(logits / temperature) over the whole
    vocabulary, before bans and truncation, which is what a trainer computes again (at temperature 0: that of 1).
    """
    logp = (logits / (temperature or 1)).log_softmax(-1)  # (B, V)
    allowed = logp.index_fill(1, banned, float("-inf"))
    if temperature == 0:
        ids = allowed.argmax(-1, keepdim=True)
    else:
        order = None
        if 0 < top_k < logp.shape[1] or top_p < 1:
            allowed, order = allowed.topk(min(top_k or logp.shape[1], logp.shape[1]), dim=-1)  # descending
        p = allowed.double().softmax(-1)  # fp64: the sum of 150,000 fp32 shares is off by more than the rarest tokens
        if top_p < 1:
            p = p * (p.cumsum(-1) - p < top_p)
        cdf = p.cumsum(-1)
        u = torch.tensor(draws, dtype=cdf.dtype, device=cdf.device)[:, None] * cdf[:, -1:]
        ids = (cdf <= u).sum(-1, keepdim=True).clamp(max=cdf.shape[1] - 1)  # inverse of the distribution function
        ids = ids if order is None else order.gather(1, ids)
    return ids[:, 0], logp.gather(1, ids)[:, 0]


class Generator:
    """Batched decoding. rows: conversations in the cache at once, as far as CACHE bytes reach (default: 64, on CUDA 512, as
    a GPU waits for the host as long for few rows as for many); pack_tokens: tokens of one prefill (a longer prompt goes
    alone). On CUDA fp32 weights compute in bf16. ValueError when the vocabulary is not the model's."""

    def __init__(self, model: KeyeVL, processor: Processor, rows: int | None = None, pack_tokens: int = 16384):
        special, cfg = processor.tokenizer.special, model.config
        if cfg.image_token_id != special["<|image_pad|>"] or cfg.vocab_size < len(special) + processor.tokenizer.n_base:
            raise ValueError(f"vocabulary and model do not belong together: <|image_pad|> is "
                             f"{special['<|image_pad|>']} in {processor.tokenizer.path} and {cfg.image_token_id} in "
                             "the model's config")
        weight = model.head_weight
        rows = rows or (512 if weight.is_cuda else 64)
        self.model, self.processor, self.rows, self.pack_tokens = model, processor, rows, pack_tokens
        self.device, self.bf16 = weight.device, weight.is_cuda and weight.dtype == torch.float32
        self.stop = {special[t] for t in STOP}
        beyond = range(processor.tokenizer.n_base + len(special), cfg.vocab_size)  # rows of the table without a token
        self.banned = torch.tensor([special[t] for t in NEVER] + list(beyond))

    @classmethod
    def from_pretrained(cls, folder, device) -> "Generator":
        """Of a model's folder, on CUDA in bf16."""
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        return cls(KeyeVL.from_pretrained(folder, dtype, device), Processor.from_pretrained(folder))

    def generate(self, conversations, max_new_tokens=256, temperature=0.6, top_k=20, top_p=0.95, seed=None, root=None,
                 stream=None) -> list[str]:
        """Conversations that end with a user turn -> the assistant's texts, without control tokens. Defaults: Keye's
        generation_config. Media paths are relative to root. stream(i, piece): text of conversation i as it comes."""
        samples = [self.processor(c, root, generate=True) for c in conversations]
        out = self.sample(samples, max_new_tokens, temperature, top_k, top_p, seed, stream=stream)
        return [self.processor.tokenizer.decode(row["ids"], skip_special=True) for row in out]

    @torch.inference_mode()
    def sample(self, samples, max_new_tokens=256, temperature=0.6, top_k=20, top_p=0.95, seed=None, stop=(),
               extend=None, stream=None) -> list[dict]:
        """Samples of processor(..., generate=True) -> [dict(ids, logprobs, sampled, positions, seen, finished)], in order.

        ids end with the stop token when finished, else max_new_tokens (int, or one per sample) ran out. logprobs: see
        `choose`. seed: an int (sample i draws from "seed/i"), a list with one per sample, or None for fresh randomness.
        stop: further ids that end a row. extend(row) is called when a row has ended: a sample (processor.extension, or
        next_turn) is put behind its ids and the row goes on while row.left > 0; None ends it.
        """
        n = len(samples)
        limits = [max_new_tokens] * n if isinstance(max_new_tokens, int) else list(max_new_tokens)
        seeds = [seed if seed is None else f"{seed}/{i}" for i in range(n)] if seed is None or isinstance(seed, int) \
            else list(seed)
        if len(limits) != n or len(seeds) != n:
            raise ValueError(f"{n} samples, but {len(limits)} max_new_tokens and {len(seeds)} seeds")
        if temperature < 0 or top_k < 0 or not 0 < top_p <= 1 or min(limits, default=1) < 1:
            raise ValueError("sampling needs temperature >= 0, top_k >= 0, 0 < top_p <= 1 and max_new_tokens >= 1, "
                             f"got {temperature}, {top_k}, {top_p}, {min(limits, default=1)}")
        if empty := [i for i, s in enumerate(samples) if not len(s["tokens"])]:
            raise ValueError(f"sample {empty[0]} has no tokens")
        everyone = [Row(i, s, limits[i], random.Random(seeds[i])) for i, s in enumerate(samples)]
        waiting, active, stops = deque(everyone), [], self.stop | set(stop)
        longest, c = max((len(s["tokens"]) + m for s, m in zip(samples, limits)), default=0), self.model.config
        a_row = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * (2 if self.device.type == "cuda" else 4) * longest
        rows = max(1, min(self.rows, n, CACHE // max(1, a_row)))
        # one context for all steps: bf16 copies of fp32 weights are made once
        with torch.autocast("cuda", torch.bfloat16) if self.bf16 else contextlib.nullcontext():
            cache = self.model.new_cache(rows, longest)
            free = list(range(rows))[::-1]
            while waiting or active:
                # prompts enter several at a time: a prefill for every row that ends would stop all others each time
                if len(free) >= min(len(waiting), -(-rows // 4)):
                    while waiting and free:
                        active.append(waiting.popleft())
                        active[-1].slot = free.pop()
                        cache.lengths[active[-1].slot] = 0
                group = self._group(active)
                ids, logprobs = self._step(group, cache, temperature, top_k, top_p)
                for row, token, logprob in zip(group, ids, logprobs):
                    row.ids.append(token)
                    row.logprobs.append(logprob)
                    row.sampled.append(True)
                    row.positions.append([row.next_position] * 3)
                    row.next_position += 1
                    row.left -= 1
                    row.finished = token in stops
                    ended = row.finished or row.left <= 0
                    if stream:
                        self._send(row, stream, ended)
                    if ended and not (extend and self._extended(row, extend(row), cache)):
                        active.remove(row)
                        free.append(row.slot)
        keys = ("ids", "logprobs", "sampled", "positions", "seen", "finished")
        return [{k: getattr(row, k) for k in keys} for row in everyone]

    def next_turn(self, row: Row, content, root=None) -> dict:
        """What `extend` returns for the user's next message; an answer that was cut off is closed first."""
        end = self.processor.tokenizer.special["<|im_end|>"]
        open_end, message = row.ids[-1] != end, {"messages": [{"role": "user", "content": content}]}
        sample = self.processor(message, root, generate=True, continuing=True, start=row.next_position + open_end)
        return behind(end, row.next_position, sample) if open_end else sample

    def _group(self, active: list[Row]) -> list[Row]:
        """Who moves next: rows with unread prompts, up to a pack; else rows with unread later turns, once they are a fifth of
        all (one at a time they would stop the others as often); else all the others, one token."""
        prompts, turns = ([r for r in active if r.new and bool(r.ids) == later] for later in (False, True))
        for unread in (prompts, turns if 5 * len(turns) >= len(active) else ()):
            total, group = 0, []
            for row in unread:
                total += len(row.new["tokens"])
                if group and total > self.pack_tokens:
                    break
                group.append(row)
            if group:
                return group
        return sorted((r for r in active if not r.new), key=lambda row: row.slot)  # in order the cache copies nothing

    def _step(self, group: list[Row], cache, temperature, top_k, top_p):
        """Runs the rows' new tokens and draws one more for each: ids and log-probabilities, B of each."""
        if group[0].new:
            batch = pack([row.new for row in group])
            for row in group:
                row.next_position = int(row.new["positions"].max()) + 1  # also after a picture: its largest, plus one
                row.new = None
        else:
            at = torch.tensor([row.next_position - 1 for row in group])
            batch = dict(tokens=torch.tensor([row.ids[-1] for row in group]), positions=at.expand(3, -1),
                         segments=torch.arange(len(group) + 1, dtype=torch.int32),
                         patches=torch.zeros(0, 588, dtype=torch.uint8), grids=torch.zeros(0, 3, dtype=torch.long))
        last = batch["segments"][1:].long() - 1
        batch = {k: v if k in ("segments", "grids") else v.to(self.device) for k, v in batch.items()}
        hidden = self.model.step(batch, cache, [row.slot for row in group])  # (T, C)
        logits = self.model.head(hidden[last.to(self.device)]).float()  # (B, V)
        if self.device.type == "mps":  # no fp64 there
            logits = logits.cpu()
        draws = [row.rng.random() for row in group]
        self.banned = self.banned.to(logits.device)
        return (x.tolist() for x in choose(logits, draws, temperature, top_k, top_p, self.banned))

    def _extended(self, row: Row, sample: dict | None, cache) -> bool:
        """Puts `sample` behind the row's ids; the last id enters the cache together with it."""
        if sample is None or row.left <= 0:
            return False
        row.new = behind(row.ids[-1], row.next_position - 1, sample)
        given = sample["tokens"].tolist()
        row.ids, row.finished = row.ids + given, False
        row.logprobs, row.sampled = row.logprobs + [0.0] * len(given), row.sampled + [False] * len(given)
        row.positions, row.seen = row.positions + sample["positions"].T.tolist(), row.seen + [sample]
        missing = cache.lengths[row.slot] + len(given) + 1 + row.left - cache.max_len
        if missing > 0:
            cache.k = F.pad(cache.k, (0, 0, 0, 0, 0, missing))  # one after the other: the old ones go as the new ones come
            cache.v = F.pad(cache.v, (0, 0, 0, 0, 0, missing))
            cache.max_len += missing
        return True

    def _send(self, row: Row, stream, ended: bool):
        """Streams what is whole: a character of several tokens waits for the last of them."""
        row.unsent.append(row.ids[-1])
        piece = self.processor.tokenizer.decode(row.unsent, skip_special=True)
        if ended or not piece.endswith("\ufffd"):
            row.unsent = []
            if piece:
                stream(row.index, piece)


def behind(token: int, position: int, sample: dict) -> dict:
    """The sample with one text token before it."""
    return sample | {"tokens": F.pad(sample["tokens"], (1, 0), value=token),
                     "labels": F.pad(sample["labels"], (1, 0), value=-100),
                     "positions": F.pad(sample["positions"], (1, 0), value=position)}


# ---------------------------------------------------------------------------------------------------------------------
# several turns with tools


TOOL = "</tool_call>"


def tools(generator: Generator, known: list, observations: list, calls=4, level="operations", room=8192):
    """An `extend` for Generator.sample(stop=(the id of TOOL,)): code between <tool_call> and </tool_call> runs in the sandbox
    on known[row.index], its conversation's pictures at full size (a list, or a function that gives one; None: it has no tools,
    and a call ends it), and what it shows stands behind it before the model goes on; it is added to known and to
    observations[row.index]. # ours: Keye leaves the marks of code open; these two are one id each. calls: most of one row;
    room: most tokens that a row is shown; then it gets errors."""
    tokenizer = generator.processor.tokenizer

    def extend(row):
        done = observations[row.index]
        if row.ids[-1] != tokenizer.special[TOOL] or known[row.index] is None or len(done) > calls:
            return None
        if callable(known[row.index]):
            known[row.index] = list(known[row.index]())
        before, mark, code = tokenizer.decode(row.ids).removesuffix(TOOL).rpartition("<tool_call>")
        if not mark or TOOL in code:
            seen = sandbox.observe(error=f"{TOOL} without <tool_call>")
        elif len(done) == calls:
            seen = sandbox.observe(error=f"at most {calls} calls")
        else:
            seen = sandbox.run(code, known[row.index], level)
        try:
            sample = generator.processor.extension(seen.content(), row.next_position)
            if len(sample["tokens"]) + sum(len(s["tokens"]) for s in row.seen) > room:
                raise ValueError("too much to look at")
        except (MediaError, ValueError) as e:  # a strip too narrow for the processor, or too many pixels
            seen = sandbox.observe(error=str(e)[:100])
            sample = generator.processor.extension(seen.content(), row.next_position)
        known[row.index] += seen.images
        done.append(seen)
        return sample
    return extend


def converse(generator: Generator, samples, pictures, max_new_tokens=256, calls=4, level="operations", room=8192,
             **sampling) -> list[dict]:
    """generator.sample with tools. Ids in, ids out: nothing that was written is encoded again. pictures: of each sample, as
    `tools` takes them. Rows have "observations" besides, a list of sandbox.Observation, and are unfinished where a call
    ends them."""
    known, observations = [p if p is None or callable(p) else list(p) for p in pictures], [[] for _ in samples]
    close = generator.processor.tokenizer.special[TOOL]
    rows = generator.sample(samples, max_new_tokens, stop=(close,), **sampling,
                            extend=tools(generator, known, observations, calls, level, room))
    return [row | {"observations": seen, "finished": row["finished"] and row["ids"][-1] != close}
            for row, seen in zip(rows, observations)]


def longest_answer(cfg) -> int:
    """Tokens of an answer in a mode: 2,048 is Keye's own in evaluation, 192 ours for models that think in few words."""
    return 192 if cfg.hidden_size < 1024 else 2048


def by_task(pool) -> dict[str, list]:
    """A pool of (question, root of its media) as {task: its share of the pool}."""
    tasks = defaultdict(list)
    for line, root in pool:
        tasks[line["meta"]["task"]].append((line, root))
    return tasks


def draw(tasks: dict[str, list], n: int, modes: dict[str, float], seed: str) -> list[tuple]:
    """n jobs (question, root, mode) of by_task's questions, as many of each task as there are (ours: a rare task's faults are
    else never met), modes by weight. Questions with a clip are not asked with tools."""
    rng, jobs = random.Random(seed), []
    share = -(-n // len(tasks))
    each = [rng.sample(lines, min(share, len(lines))) for lines in rng.sample(list(tasks.values()), len(tasks))]
    for line, root in [question for turn in zip_longest(*each) for question in turn if question][:n]:
        still = not any(kind == "video" for _, kind in media_of(line))
        fit = {m: w for m, w in modes.items() if still or m != "agentic_think"}
        jobs.append((line, root, *rng.choices(list(fit), list(fit.values()))))
    return jobs


def rollout(generator: Generator, jobs, group: int, longest: int, seeds: list[str], temperature=1.0) -> list[list[dict]]:
    """jobs: (question, root of its media, mode) -> for each job `group` rows of converse, by default at temperature 1
    and without truncation, so that a trainer finds the same probabilities. A row has its prompt's "sample" and its "content",
    the assistant's turn, besides; a job whose media cannot be read has none. seeds: one of each job; its row k draws from "seed/k"."""
    out, todo = [[] for _ in jobs], []
    for i, (line, root, mode) in enumerate(jobs):
        messages = asked(line, mode)
        try:
            sample = generator.processor({"messages": messages}, root, generate=True)
        except (MediaError, ValueError) as e:
            print(f"skipped: {e}", file=sys.stderr, flush=True)
            continue
        pictures = (lambda messages=messages, root=root: pictures_of({"messages": messages}, root)) if mode in TOOLS else None
        todo += [(i, sample, pictures, f"{seeds[i]}/{k}") for k in range(group)]
    _, samples, pictures, each = zip(*todo) if todo else [()] * 4
    rows = converse(generator, samples, pictures, longest, temperature=temperature, top_k=0, top_p=1.0, seed=each)
    for (i, sample, *_), row in zip(todo, rows):
        out[i].append(row | {"sample": sample, "content": turn_of(row, generator.processor.tokenizer)})
    return out


def earned(jobs, rows, longest: int, judge=None) -> list[list[dict]]:
    """The parts of the reward of every row of a rollout, with the soft penalty of the last quarter of `longest` tokens."""
    parts = iter(rewards([dict(
        completion=row["content"], meta=line["meta"], mode=mode, finished=row["finished"], judge=judge,
        question=text_of(line["messages"][-2]), length=sum(row["sampled"]), longest=longest, buffer=longest // 4)
        for (line, _, mode), group in zip(jobs, rows) for row in group]))
    return [[next(parts) for _ in group] for group in rows]


def trajectory(sample: dict, row: dict) -> dict:
    """A prompt and the row that followed -> the sample a trainer needs; labels are the ids that the model sampled."""
    ids, prompt, given = torch.tensor(row["ids"]), len(sample["tokens"]), row["seen"]
    labels = torch.full((prompt + len(ids),), -100)
    labels[prompt - 1 : -1] = torch.where(torch.tensor(row["sampled"]), ids, -100)
    positions = torch.tensor(row["positions"]).T  # (3, n)
    return {"tokens": torch.cat([sample["tokens"], ids]), "labels": labels, "pads": sample["pads"],
            "positions": torch.cat([sample["positions"], positions], 1),
            **{k: torch.cat([sample[k], *(s[k] for s in given)]) for k in ("patches", "grids")}}


# ---------------------------------------------------------------------------------------------------------------------
# command line


def load(folder, device="auto", **changes) -> tuple[KeyeVL, Processor]:
    """Model and processor of a folder, on CUDA in bf16. SystemExit with what is wrong; changes: see Processor."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        model, processor = KeyeVL.from_pretrained(folder, dtype, device), Processor.from_pretrained(folder, **changes)
    except (OSError, ValueError, RuntimeError) as e:  # RuntimeError: torch on a device it does not have
        raise SystemExit(f"--init {folder}: {e}") from None
    print(f"{folder} on {device}", file=sys.stderr)
    return model, processor


def chat(generator: Generator, content: list, args):
    """Answers `content`, and without a question in it goes on with lines from the terminal until it ends."""
    def ask():
        attached = []
        while True:
            try:
                line = input("> ").strip()
            except (EOFError, KeyboardInterrupt):
                return None
            kind, _, path = line.partition(" ")
            if kind in ("/image", "/video"):
                attached.append({"type": kind[1:], kind[1:]: path.strip()})
            elif line:
                return attached + [{"type": "text", "text": line}]

    pictures, observations, close = [], [[]], generator.processor.tokenizer.special[TOOL]

    def look_at(content):
        """For the tools: Keye's own names of pictures are their numbers in the conversation."""
        pictures.extend(pictures_of({"messages": [{"content": content}]}, ".", allow_outside=True))

    def turn(row):
        if row.ids[-1] == close and row.left > 0 and (sample := use(row)) is not None:
            seen = observations[0][-1]
            print(f"\n[sandbox: {seen.text or 'no text'}, {len(seen.images)} pictures]", flush=True)
            return sample
        print()
        row.left = args.max_new_tokens
        observations[0].clear()  # the next answer has calls of its own
        while interactive and (content := ask()) is not None:
            try:
                sample = generator.next_turn(row, content, ".")
                look_at(content)
                return sample
            except MediaError as e:
                print(e, file=sys.stderr)

    if interactive := args.prompt is None:
        print("one question a line; /image PATH and /video PATH before it add to it; ctrl-D ends", file=sys.stderr)
        question = ask()
        if question is None:
            return
        content = content + question
    try:
        sample = generator.processor({"messages": [{"role": "user", "content": content}]}, ".", generate=True)
        look_at(content)
    except MediaError as e:
        raise SystemExit(str(e)) from None
    use = tools(generator, [pictures], observations)
    begin = time.perf_counter()
    row, = generator.sample([sample], args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed, (close,), turn,
                            lambda i, piece: print(piece, end="", flush=True))
    took, n = time.perf_counter() - begin, sum(row["sampled"])
    if not interactive:
        print(f"{len(sample['tokens'])} tokens read, {n} written, {took:.2f} s, {n / took:.1f} tok/s", file=sys.stderr)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("prompt", nargs="?", help="the question; without one, a chat on the terminal")
    add("--init", required=True, help="folder of a model, ours or official")
    add("--image", action="append", default=[], help="picture to look at; may be repeated")
    add("--video", action="append", default=[], help="clip to look at; may be repeated")
    add("--fps", type=float, help="frames a second taken from clips (default: 2, 1 or 0.5 by the token budget)")
    add("--max-new-tokens", type=int, default=256)
    add("--temperature", type=float, default=0.6, help="0: always the most likely token")
    add("--top-k", type=int, default=20)
    add("--top-p", type=float, default=0.95)
    add("--seed", type=int)
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    args = parser.parse_args(argv)
    if args.prompt is None and not sys.stdin.isatty():
        parser.error("no question was given, and there is no terminal to chat on")
    content = [{"type": "image", "image": path} for path in args.image]
    content += [{"type": "video", "video": path} | ({"fps": args.fps} if args.fps else {}) for path in args.video]
    content += [{"type": "text", "text": args.prompt}] if args.prompt is not None else []
    model, processor = load(args.init, args.device, allow_outside=True)  # the user, not a data set, names the files
    try:
        chat(Generator(model, processor), content, args)
    except ValueError as e:  # options out of their range, an fps of 0
        raise SystemExit(str(e)) from None


if __name__ == "__main__":
    main()
