"""Packed batches for every optimizer step, drawn without end from a mixture of JSONL files.

    loader = Loader([("train/vqa.jsonl", 2.0), ("train/text.jsonl", 1.0)], processor,
                    pack_tokens=8192, packs_per_step=64, rank=rank, world=world, workers=4)
    for batches, info in loader:  # one item a step
        ...
    loader = Loader(..., state=info["state"])  # goes on with exactly the next sample

First a step is planned: which lines it takes, and in which packs they go. Every rank makes the same
plan for all ranks, so they exchange nothing. Then each rank decodes its own packs, in worker
processes if it has any.

A line is checked once, when its file is indexed. The plan needs its size: so it is laid out when it
is first drawn, and the layout goes to the worker with its place in the pack. In later epochs the
size is known, and the worker lays the line out.
"""

import copy
import logging
import math
import signal
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from common.conversation import check_training, conversations_of
from common.failures import MAX_BAD_SHARE, refuse_many
from common.jsonl import Lines
from common.media import MediaError

log = logging.getLogger("loader")

BLOCK = 4096  # random numbers drawn at once

# What the plan needs of a line. Zero tokens: it was not drawn yet.
SIZE = np.dtype([("tokens", np.int32), ("visual_tokens", np.int32), ("cost", np.float64)])


def split_packs(pack_tokens: int, packs: int, world: int) -> tuple[int, int]:
    """(tokens of a pack, packs of a step) on `world` ranks, of as many tokens in all.

    They stay as they are where the packs can be dealt out evenly, else there are more and smaller
    ones. A run goes on with another number of ranks only where both deal alike.
    """
    dealt = math.ceil(packs / world) * world
    return pack_tokens * packs // dealt, dealt


def generator(*key: int) -> np.random.Generator:
    """Random numbers that depend on the key alone: any epoch is there without those before it."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


@lru_cache
def uniform_block(seed: int, block: int) -> np.ndarray:
    return generator(seed, 0, block).random(BLOCK)


@lru_cache
def epoch_order(seed: int, d: int, epoch: int, n: int) -> np.ndarray:
    return generator(seed, 1, d, epoch).permutation(n)


def linear_cost(text_tokens: int, grids: list[tuple]) -> float:
    """ours, where no other cost is given: a visual token is as much work as six of text."""
    return text_tokens + 1.25 * sum(map(math.prod, grids))


@dataclass
class Example:
    """A line, laid out."""

    layouts: list  # one; of a preference two, chosen and rejected, which share a pack
    reference: list[float] | None  # log-probabilities of both by the reference model


@dataclass
class Decoder(torch.utils.data.Dataset):
    """What worker processes do: plans become batches."""

    processor: object
    files: list[Lines]
    pack_tokens: int

    def lay_out(self, d: int, i: int) -> Example:
        """Line i of data set d, its media no larger than a pack can hold."""
        lines = self.files[d]
        record = lines[i]
        layouts = [self.processor.layout(c, lines.root) for c in conversations_of(record)]
        self.processor.fit(layouts, self.pack_tokens)
        return Example(layouts, record.get("reference"))

    def failure(self, d: int, i: int, error: Exception) -> tuple[str, str]:
        """(what failed and why, the reason to count it by)."""
        return f"{self.files[d].where(i)}: {error}", getattr(error, "reason", "bad_line")

    def __getitem__(self, plan):
        """The plan of a step -> (batches, info, number of samples that were tried)."""
        packs, info = plan
        bad = list(info["bad"])
        tried = len(bad) + sum(map(len, packs))
        batches = [self._load_pack(members, bad) for members in packs]
        skipped = dict(Counter(reason for _, reason in bad))
        return batches, info | {"bad": bad, "skipped": skipped}, tried

    def _load_pack(self, members, bad):
        """[(data set, line, its Example or None), ...] -> batch; failures are added to `bad`."""
        samples, references = [], []
        room = self.pack_tokens
        for d, i, example in members:
            try:
                example = example or self.lay_out(d, i)
                loaded, left = [], room
                for layout in example.layouts:
                    loaded.append(self.processor.load(layout, left))
                    left -= len(loaded[-1]["tokens"])
            except (MediaError, ValueError) as error:
                bad.append(self.failure(d, i, error))
                continue
            room = left
            samples += loaded
            references.append(example.reference)
        if not samples:
            # Ranks must run equally many batches: a short one without labels takes the place.
            samples = [self.processor({"messages": [{"role": "system", "content": ""}]})]
        batch = self.processor.pack(samples)
        if references and None not in references:
            batch["reference"] = torch.tensor(references, dtype=torch.float32)  # (pairs, 2)
        return batch


def unchanged(step):
    return step


def hear_no_signal(worker: int):
    """For a worker: who stops a run often tells its whole process group (Ctrl-C, timeout, Slurm).

    The run still has a step to finish and to save; its workers end with it.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@dataclass
class Loader:
    """Iterator without end over (batches, info), one item for each optimizer step.

    batches: this rank's. Where all lines of one are preferences with a "reference", it has
    reference (pairs, 2) besides.
    info: "state"; "step_tokens", "visual_tokens", "flops", planned, over all ranks; "skipped"
    {reason: count} and "bad" [(what, reason)], of this rank, so that they add up over ranks;
    "epoch", passes over each data set.

    A sample that fails is warned about and left out. SystemExit when too many do, see failures.py;
    ValueError, naming file and line, when more than max_bad_share of a file's lines do.
    """

    mixture: list[tuple[str | Path, float]]  # JSONL files, and weights by samples drawn
    processor: object
    pack_tokens: int  # most tokens of a batch
    packs_per_step: int  # on all ranks together
    rank: int = 0
    world: int = 1
    seed: int = 0
    flops: Callable = linear_cost  # (text tokens, grids) -> cost of a sample, to balance packs
    workers: int = 0
    max_bad_share: float = MAX_BAD_SHARE
    state: dict | None = None  # an info["state"], also of another rank or number of ranks
    check: Callable = check_training  # ValueError for a record that cannot be used

    def __post_init__(self):
        if self.packs_per_step % self.world:
            raise ValueError(f"{self.packs_per_step} packs is no multiple of {self.world} ranks")
        self.files = [Lines(path, self.check, self.max_bad_share) for path, _ in self.mixture]
        self.sizes = [np.zeros(len(lines), SIZE) for lines in self.files]
        self.decoder = Decoder(self.processor, self.files, self.pack_tokens)
        self.examples = {}  # of lines that are in no pack yet
        edges = np.cumsum([weight for _, weight in self.mixture])
        self.edges = edges / edges[-1]
        self.tried = 0  # samples of this rank, in this process
        self.failures = []  # where and why, of those that were left out

        identity = [self.seed, self.pack_tokens, self.packs_per_step]
        for lines, (_, weight) in zip(self.files, self.mixture):
            identity.append([lines.path.name, len(lines), weight])
        if self.state is None:
            # taken: lines drawn of each data set; deferred: places of lines that found no room yet
            taken = [0] * len(self.files)
            self.state = dict(step=0, drawn=0, taken=taken, deferred=[], identity=identity)
        if self.state["identity"] != identity:
            raise ValueError(
                "the loader state belongs to seed, pack_tokens, packs_per_step, data sets "
                f"{self.state['identity']}, not to {identity}"
            )

    def __iter__(self) -> Iterator[tuple[list[dict], dict]]:
        """Goes on after the last step that was yielded, also when an earlier iteration was left."""
        if self.workers:
            steps = torch.utils.data.DataLoader(
                self.decoder,
                batch_size=None,
                sampler=self._plans(),
                num_workers=self.workers,
                # fork: workers start at once. This process decodes nothing that could hold locks.
                multiprocessing_context="fork" if sys.platform == "linux" else None,
                collate_fn=unchanged,
                worker_init_fn=hear_no_signal,
            )
        else:
            steps = map(self.decoder.__getitem__, self._plans())
        for batches, info, tried in steps:
            self.tried += tried
            self.failures += [what for what, _ in info["bad"]]
            for what, reason in info["bad"][:3]:
                log.warning("skipped (%s) %s", reason, what)
            # A rank may load one sample a step: of the first few, only the loss of all says much.
            if self.tried >= 20 or len(self.failures) == self.tried >= 4:
                refuse_many(self.failures, self.tried, "samples", self.max_bad_share)
            self.state = info["state"]
            yield batches, info

    # The plan of a step: a function of the seed and the state alone, never of rank, world, workers
    # or timing. So ranks agree on it, and any number of them can go on from a state.

    def _plans(self):
        """Yields (this rank's packs, info) of one step after the other."""
        state = copy.deepcopy(self.state)
        while True:
            places, bad = self._draw_step(state)
            packs, state["deferred"] = self._deal(places)
            state["step"] += 1
            sizes = self._sizes_of(sum(packs, []))
            info = {
                "state": copy.deepcopy(state),
                "step_tokens": int(sizes["tokens"].sum()),
                "visual_tokens": int(sizes["visual_tokens"].sum()),
                "flops": float(sizes["cost"].sum()),
                # All ranks have met these failures; one of them counts them.
                "bad": bad if self.rank == 0 else [],
                "epoch": [n / len(lines) for n, lines in zip(state["taken"], self.files)],
            }
            members = []
            for pack in packs:
                members.append([(d, i, self.examples.pop((d, i), None)) for d, i in pack])
            yield members[self.rank :: self.world], info

    def _draw_step(self, state):
        """Places [data set, line] until the step is full, with those first that had to wait."""
        places, bad = [], []
        room = self.packs_per_step * self.pack_tokens
        waiting = deque(state["deferred"])
        while waiting or room > 0:
            d, i = waiting.popleft() if waiting else self._draw(state)
            try:
                room -= self._tokens(d, i)
                places.append([d, i])
            except (MediaError, ValueError) as error:
                bad.append(self.decoder.failure(d, i, error))
                tried = len(places) + len(bad)
                if tried >= 100:  # at most 99 %: where all fail, the step would never be full
                    failures = [what for what, _ in bad]
                    refuse_many(failures, tried, "samples", min(self.max_bad_share, 0.99))
        return places, bad

    def _draw(self, state):
        """The next data set, by weight, and its next line in the order of this epoch."""
        block, k = divmod(state["drawn"], BLOCK)
        d = int(np.searchsorted(self.edges, uniform_block(self.seed, block)[k], side="right"))
        n = len(self.files[d])
        epoch, k = divmod(state["taken"][d], n)
        state["drawn"] += 1
        state["taken"][d] += 1
        return d, int(epoch_order(self.seed, d, epoch, n)[k])

    def _tokens(self, d, i):
        """The tokens of a line, which is laid out when it is first drawn."""
        if not self.sizes[d][i]["tokens"]:
            example = self.decoder.lay_out(d, i)
            tokens, grids = 0, []
            for layout in example.layouts:
                tokens += layout.tokens
                grids += [medium.plan()[0] for medium in layout.media]
            visual = sum(map(math.prod, grids)) // 4
            self.sizes[d][i] = (tokens, visual, self.flops(tokens - visual, grids))
            self.examples[d, i] = example
        return int(self.sizes[d][i]["tokens"])

    def _sizes_of(self, places):
        return np.array([self.sizes[d][i] for d, i in places], SIZE)

    def _deal(self, places):
        """Places -> (packs of places, those that fit none, in their order).

        The costly ones come first, and each goes to the pack with the least cost that has room:
        ranks then work equally long (Keye-VL report, section 5).
        """
        sizes = self._sizes_of(places)
        packs = [[] for _ in range(self.packs_per_step)]
        tokens = np.zeros(len(packs), int)
        cost = np.zeros(len(packs))
        left = []
        for k in np.argsort(-sizes["cost"], kind="stable"):
            fits = tokens + sizes[k]["tokens"] <= self.pack_tokens
            if not fits.any():
                left.append(k)
                continue
            p = np.where(fits, cost, np.inf).argmin()
            packs[p].append(places[k])
            tokens[p] += sizes[k]["tokens"]
            cost[p] += sizes[k]["cost"]
        return packs, [places[k] for k in sorted(left)]
