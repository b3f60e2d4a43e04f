"""Packed batches for every optimizer step, drawn without end from a mixture of JSONL files.

    loader = Loader([("train/vqa.jsonl", 2.0), ("train/text.jsonl", 1.0)], processor,
                    pack_tokens=8192, packs_per_step=64, rank=rank, world=world, workers=4)
    for batches, info in loader:  # one item a step
        ...
    loader = Loader(..., state=info["state"])  # goes on with exactly the next sample

First a step is planned: which lines each of its packs takes. Pack s of every step is slot s: it is
filled with the draws s, s + packs_per_step, s + 2 packs_per_step, .. of the run, at its own pace.
So a rank lays out the lines of its own slots alone, and what a slot holds depends on the seed,
never on the number of ranks. That packs cost alike, each slot sees to by choosing among its next
lines. Then the packs are decoded one by one, in worker processes if there are any.

A line of a small set is checked once, when its file is read, one of a large set when it is drawn.
The plan needs its size: so it is laid out then, and the layout goes to the worker.
"""

import atexit
import ctypes
import logging
import math
import multiprocessing
import pickle
import signal
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from common.conversation import check_training, conversations_of
from common.draws import Draws
from common.failures import MAX_BAD_SHARE, refusal, refuse_many
from common.jsonl import Lines, data_name, index_some
from common.media import MediaError
from common.processes import Peers, trim_heap

log = logging.getLogger("loader")

# ours: a slot chooses a pack from at least so many lines. With lines of 1,500 tokens on average and
# 64 packs of 8,192, the packs are 99.6 % full, and the rank with most work in a step has 2.1 % more
# than the mean over 8 ranks, 10.8 % over 64; of 16 lines 2.5 % and 11.2 %, of 64 1.9 % and 10.4 %.
# One plan of all 64 packs, which every rank would have to make, leaves 1.1 % and 10.9 %.
CHOICE = 32


def split_packs(pack_tokens: int, packs: int, world: int, whole: bool) -> tuple[int, int]:
    """(tokens of a pack, packs of a step) on `world` ranks.

    They stay as they are where the packs can be dealt out evenly, else there are more. whole: these
    are as long, so that no sample is too long on many cards, and a step has more tokens; otherwise
    a step keeps its tokens, and packs are shorter. A run that goes on keeps those that it began
    with.
    """
    dealt = math.ceil(packs / world) * world
    if whole:
        return pack_tokens, dealt
    return pack_tokens * packs // dealt, dealt


def linear_cost(text_tokens: int, grids: list[tuple]) -> float:
    """ours, where no other cost is given: a visual token is as much work as six of text."""
    return text_tokens + 1.25 * sum(map(math.prod, grids))


@dataclass
class Example:
    """A line, laid out, and what the plan needs of it."""

    place: list[int]  # data set, line
    where: str  # its file and line, for messages
    layouts: list  # one; of a preference two, chosen and rejected, which share a pack
    reference: list[float] | None  # log-probabilities of both by the reference model
    tokens: int
    visual_tokens: int
    cost: float


def failure(where: str, error: Exception) -> tuple[str, str]:
    """(what failed and why, the reason to count it by)."""
    return f"{where}: {error}", getattr(error, "reason", "bad_line")


@dataclass
class Decoder(torch.utils.data.Dataset):
    """What worker processes do: the examples of a pack become a batch."""

    processor: object
    pack_tokens: int

    def __getitem__(self, plan: bytes) -> tuple[dict, list]:
        """plan: a pickled list of Examples -> (batch, [(what failed and why, reason), ...])."""
        samples, references, bad = [], [], []
        room = self.pack_tokens
        for example in pickle.loads(plan):
            try:
                loaded, left = [], room
                for layout in example.layouts:
                    loaded.append(self.processor.load(layout, left))
                    left -= len(loaded[-1]["tokens"])
            except (MediaError, ValueError) as error:
                bad.append(failure(example.where, error))
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
        return batch, bad


@dataclass
class Slot:
    """One pack of every step: where it stands in its draws, and what it did in the last step."""

    drawn: int  # of its own draws
    waiting: list  # lines that are in no pack yet, oldest first: Examples, after a resume places
    taken: list[int] = field(default_factory=list)  # lines drawn of each data set, in that step
    work: tuple = (0, 0, 0.0)  # tokens, visual tokens and cost of its pack
    held: list = field(default_factory=list)  # [samples, tokens] of each data set in its pack

    def written(self) -> "Slot":
        """A copy to keep and to send: of what waits the places alone."""
        places = [getattr(line, "place", line) for line in self.waiting]
        return replace(self, waiting=places)


def finished(item):
    """For a worker: what it has made, as it is; memory that this took goes back to the system."""
    trim_heap()  # 0.5 ms
    return item


def end_with_the_trainer(worker: int):
    """For a worker: it hears no signal, and ends when the process that began it does.

    Who stops a run often tells its whole process group (Ctrl-C, timeout, Slurm), and the run still
    has a step to finish and to save. Where the run is killed, a worker with a full queue would wait
    for ever for somebody who reads it, and with what it has from the fork keep the GPU's memory.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@atexit.register
def end_workers():
    """When this process ends, workers that are still there end too.

    multiprocessing would send them SIGTERM, which they do not hear, and wait for them for ever.
    """
    left = [child for child in multiprocessing.active_children() if child.daemon]
    if left and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would call it a failure
    for child in left:
        child.kill()


def private(item: tuple[dict, list]) -> tuple[dict, list]:
    """A pack outside the memory that it came through.

    Each tensor that a worker sends is a file in /dev/shm while it lives. A step may have a gigabyte
    in hundreds of them; a container often has 64 MB, and a process may open 1,024 files.
    """
    batch, failures = item
    return {name: tensor.clone() for name, tensor in batch.items()}, failures


def in_workers(dataset, workers: int, **options):
    """Iterates over the dataset's items as processes of their own make them."""
    return iter(
        torch.utils.data.DataLoader(
            dataset,
            batch_size=None,
            num_workers=workers,
            # fork: they start at once. The thread that forks is the only one that opens or decodes
            # media in this process, so that no decoder's lock is held meanwhile.
            multiprocessing_context="fork" if sys.platform == "linux" else None,
            collate_fn=finished,
            worker_init_fn=end_with_the_trainer,
            **options,
        )
    )


@dataclass
class Planner(torch.utils.data.IterableDataset):
    """loader.plan(), and an error as its last item: (pack, note, None), .. (None, None, error).

    As an item an error comes out of a process as it is. A pack is pickled here and unpickled by
    the worker that decodes it: on the way it is a string of bytes to the trainer's process, which
    has a GPU's kernels to launch.
    """

    loader: "Loader"

    def __iter__(self):
        try:
            for pack, note in self.loader.plan():
                yield pickle.dumps(pack, pickle.HIGHEST_PROTOCOL), note, None
        except (Exception, SystemExit) as error:
            yield None, None, error


@dataclass
class Loader:
    """Iterator without end over (batches, info), one item for each optimizer step.

    batches: this rank's. Where all lines of one are preferences with a "reference", it has
    reference (pairs, 2) besides.
    info: "state"; "step_tokens", "visual_tokens", "flops", as planned; "epoch", passes over each
    data set; "sets" {name: lines drawn so far}; "shares" {"share_of_tokens/NAME": of the step's,
    "share_of_samples/NAME": ..}, as planned: all these over all ranks. "skipped"
    {reason: count} and "bad" [(what, reason)] are this rank's, so that they add up over ranks.

    Under torch.distributed ranks exchange in each step where their slots stand, so that each has
    all of the state. Without it, or `alone`, a rank of several plans the slots of the others as
    well, and what fails on one leaves none waiting.

    A sample that fails is warned about and left out. SystemExit when too many do, see failures.py,
    or when a file of the mixture can no longer be opened; ValueError, naming file and line, when
    more than max_bad_share of a file's lines fail.
    """

    mixture: list[tuple[str | Path, float]]  # JSONL files or folders; weights by samples drawn
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
    alone: bool = False

    def __post_init__(self):
        # Packs of a step on each rank. All run equally many: where they cannot be dealt out evenly,
        # as a run goes on with fewer or more ranks, blank ones fill the last round.
        self.each = math.ceil(self.packs_per_step / self.world)
        self.peers = Peers("words")
        self.exchanges = self.peers.world == self.world > 1 and not self.alone
        self.files = self._open_files()
        self.decoder = Decoder(self.processor, self.pack_tokens)
        weights = [weight for _, weight in self.mixture]
        self.draws = Draws(self.seed, weights, [len(lines) for lines in self.files])
        # One pack alone costs what it costs. Of a small mixture no more than a quarter waits: so
        # its epochs stay whole.
        several = self.packs_per_step > 1
        share = sum(map(len, self.files)) // (4 * self.packs_per_step)
        self.choice = several * min(CHOICE, share)
        # samples of this rank, in this process: laid out, and of them decoded so far
        self.tried = self.decoded = 0
        self.failures = []  # where and why, of those that were left out
        self.undecoded = []  # of these those that failed last

        start = self._first_state()
        self.state = self.state or start
        if self.state["identity"] != start["identity"]:
            raise ValueError(
                "the loader state belongs to seed, pack_tokens, packs_per_step, data sets "
                f"{self.state['identity']}, not to {start['identity']}"
            )
        if self.state.keys() != start.keys():
            raise ValueError("the loader state is of another version: start anew (--fresh)")

    def _first_state(self):
        identity = [self.seed, self.pack_tokens, self.packs_per_step]
        for lines, (_, weight) in zip(self.files, self.mixture):
            identity.append([lines.path.name, len(lines), weight])
        return {
            "step": 0,
            "drawn": [0] * self.packs_per_step,  # by each slot
            "waiting": [0] * self.packs_per_step,  # lines of each slot that are in no pack yet
            "deferred": [],  # their places, slot after slot
            "taken": [0] * len(self.files),  # lines drawn of each data set
            "identity": identity,
        }

    def _open_files(self):
        paths = [Path(path) for path, _ in self.mixture]
        if self.exchanges:
            index_some(paths, self.rank, self.world)
            self._gather(None)  # until all have done their share
        return [Lines(path, self.check, self.max_bad_share, lazy=True) for path in paths]

    def _gather(self, thing) -> list:
        """One object per rank, in rank order, as far as there is anybody to ask."""
        return self.peers.gather_objects(thing) if self.exchanges else [thing]

    def __iter__(self) -> Iterator[tuple[list[dict], dict]]:
        """Goes on after the last step that was yielded, also when an earlier iteration was left."""
        notes = deque()  # of steps that are planned and not yet yielded
        packs = self._decoded(self._plans(notes))
        self.coming = None
        self.load = lambda: [next(packs) for _ in range(self.each)]
        try:
            while True:
                self.prepare()
                loaded, self.coming = self.coming, None
                slots, bad, costs, tried, decoded = notes.popleft()
                # Ranks wait for each other in each pack: so all begin with their most costly one.
                order = sorted(range(len(loaded)), key=lambda k: -costs[k])
                loaded = [loaded[k] for k in order]
                batches = [batch for batch, _ in loaded]
                undecoded = sum([failed for _, failed in loaded], [])
                self.tried += tried
                self.decoded += decoded
                why = self._judge(bad, undecoded)
                info = self._info(slots, bad + undecoded, why)
                self.state = info["state"]
                yield batches, info
        finally:
            self.load = self.coming = None  # the workers end with their iterator

    def prepare(self):
        """Lays out and loads the next step now, not when it is asked for: call it where the GPU
        has work and the host would wait for it."""
        if self.coming is None:
            self.coming = self.load()

    def _decoded(self, plans):
        """Packs of examples -> (batch, failures) of each. Workers hold a few packs, not steps."""
        if not self.workers:
            return map(self.decoder.__getitem__, plans)
        return map(private, in_workers(self.decoder, self.workers, sampler=plans))

    def _judge(self, bad, undecoded) -> str | None:
        """Says what failed, in the plan or when decoded; returns why that is too much, if it is."""
        self.failures += [what for what, _ in bad + undecoded]
        self.undecoded += [what for what, _ in undecoded]
        for what, reason in (bad + undecoded)[:3]:
            log.warning("skipped (%s) %s", reason, what)
        # Many lines may be laid out before the first ones are decoded.
        both = (self.failures, self.tried), (self.undecoded, self.decoded)
        for failures, tried in both:
            # A rank may load one sample a step: of the first few, only the loss of all says much.
            if tried >= 20 or len(failures) == tried >= 4:
                why = refusal(failures, tried, "samples", self.max_bad_share)
                if why:
                    return why
        return None

    def _info(self, slots: dict[int, Slot], bad, why: str | None):
        """What is said of a step. slots: those that this rank has planned, after it.

        SystemExit on all ranks where one refuses to go on: alone it would leave others waiting.
        """
        of_all = {}
        for part, refused in self._gather((slots, why)):
            if refused:
                raise SystemExit(refused)
            of_all |= part
        slots = [of_all[s] for s in range(self.packs_per_step)]
        taken = np.sum([self.state["taken"], *[slot.taken for slot in slots]], 0).tolist()
        sets = Counter()
        for n, lines in zip(taken, self.files):
            sets[data_name(lines.path)] += n
        tokens, visual_tokens, cost = (sum(amounts) for amounts in zip(*[s.work for s in slots]))
        state = {
            "step": self.state["step"] + 1,
            "drawn": [slot.drawn for slot in slots],
            "waiting": [len(slot.waiting) for slot in slots],
            "deferred": sum([slot.waiting for slot in slots], []),
            "taken": taken,
            "identity": self.state["identity"],
        }
        return {
            "state": state,
            "step_tokens": tokens,
            "visual_tokens": visual_tokens,
            "flops": cost,
            "epoch": [n / len(lines) for n, lines in zip(taken, self.files)],
            "sets": dict(sets),
            "shares": self._shares([slot.held for slot in slots]),
            "skipped": dict(Counter(reason for _, reason in bad)),
            "bad": bad,
        }

    def _shares(self, held: list) -> dict[str, float]:
        """The share of each name of data sets in a step. held (packs, sets, 2): see Slot."""
        amounts = np.sum(held, 0)  # (sets, 2)
        parts = amounts / np.maximum(1, amounts.sum(0))
        shares = Counter()
        for (samples, tokens), lines in zip(parts.tolist(), self.files):
            name = data_name(lines.path)
            shares[f"share_of_samples/{name}"] += samples
            shares[f"share_of_tokens/{name}"] += tokens
        return dict(shares)

    # The plan of a slot: a function of the seed and the slot's state alone, never of rank, world,
    # workers or timing. So any number of ranks can go on from a state.

    def _plans(self, notes):
        """Yields each of this rank's packs, pickled, step after step.

        Each pack is planned when it is asked for: who is ahead by a pack need not have planned
        another whole step. Before the last of a step, its note is put to the others.
        """
        planned = Planner(self)
        if self.workers > 1 and sys.platform == "linux":  # a GPU's host has kernels to launch
            ahead = max(2, self.each)
            planned = in_workers(planned, 1, prefetch_factor=ahead)
        for pack, note, error in planned:
            if error:
                raise error
            if note:
                notes.append(note)
            yield pack

    def plan(self):
        """Yields (examples of a pack, None, or with the last of a step its note).

        A note: (slots, failures, costs of its packs, number of samples that were laid out, that
        will be decoded).
        """
        ends = np.cumsum(self.state["waiting"])
        slots = {}
        for s in range(self.packs_per_step):
            if not self.exchanges or s % self.world == self.rank:
                start = ends[s] - self.state["waiting"][s]
                slots[s] = Slot(self.state["drawn"][s], self.state["deferred"][start : ends[s]])
        while True:
            pack, bad, costs, tried, decoded = None, [], [], 0, 0
            for s, slot in slots.items():
                filled, failed = self._fill(s, slot)
                if s % self.world != self.rank:
                    continue
                if pack is not None:
                    yield pack, None
                pack = filled
                bad += failed
                costs.append(slot.work[2])
                tried += sum(slot.taken)
                decoded += len(pack)
            while len(costs) < self.each:
                if pack is not None:
                    yield pack, None
                pack = []
                costs.append(0.0)
            written = {s: slot.written() for s, slot in slots.items()}
            yield pack, (written, bad, costs, tried, decoded)

    def _fill(self, s: int, slot: Slot):
        """The next pack of slot s, which moves on -> (its examples, failures)."""
        lines, bad = [], []
        slot.taken = [0] * len(self.files)
        room = self.pack_tokens
        waiting = deque(slot.waiting)
        while waiting or room > 0 or len(lines) < self.choice:
            if waiting:
                line = waiting.popleft()
            else:
                line = self.draws[slot.drawn * self.packs_per_step + s]
                slot.drawn += 1
                slot.taken[line[0]] += 1
            try:
                example = line if isinstance(line, Example) else self._lay_out(*line)
                room -= example.tokens
                lines.append(example)
            except (MediaError, ValueError) as error:
                bad.append(failure(self.files[line[0]].where(line[1]), error))
                tried = len(lines) + len(bad)
                if tried >= 100:  # at most 99 %: where all fail, the step would never be full
                    failures = [what for what, _ in bad]
                    refuse_many(failures, tried, "samples", min(self.max_bad_share, 0.99))
            except OSError as error:  # of a whole file: that of one line is a ValueError
                raise SystemExit(f"a file of the data cannot be opened any more: {error}") from None
        pack, slot.waiting = self._choose(lines)
        work = [(example.tokens, example.visual_tokens, example.cost) for example in pack]
        slot.work = tuple(map(sum, zip(*work)))
        slot.held = [[0, 0] for _ in self.files]
        for example in pack:
            held = slot.held[example.place[0]]
            held[0] += 1
            held[1] += example.tokens
        return pack, bad

    def _lay_out(self, d: int, i: int) -> Example:
        """Line i of data set d, its media no larger than a pack can hold."""
        lines = self.files[d]
        record = lines[i]
        layouts = [self.processor.layout(c, lines.root) for c in conversations_of(record)]
        self.processor.fit(layouts, self.pack_tokens)
        grids = [medium.plan()[0] for layout in layouts for medium in layout.media]
        tokens = sum(layout.tokens for layout in layouts)
        visual = sum(map(math.prod, grids)) // 4
        cost = self.flops(tokens - visual, grids)
        where, reference = lines.where(i), record.get("reference")
        return Example([d, i], where, layouts, reference, tokens, visual, cost)

    def _choose(self, lines: list[Example]) -> tuple[list[Example], list[Example]]:
        """Lines, oldest first -> (a pack of them, those that wait, in their order).

        Ranks should work equally long (Keye-VL report, section 5). So of several packs that are
        as full as can be, costly or cheap, the one is taken that costs what its tokens do on
        average. Each has the oldest line, so that none waits for ever.
        """
        costly = sorted(range(len(lines)), key=lambda k: -lines[k].cost)
        orders = [costly]
        if self.packs_per_step > 1:
            costly.remove(0)
            skips = range(0, len(lines), -(-len(lines) // CHOICE))  # as many as CHOICE at most
            orders = [[0, *costly[skip:], *costly[:skip]] for skip in skips]
        rate = sum(line.cost for line in lines) / sum(line.tokens for line in lines)
        best = math.inf
        for order in orders:
            pack = []
            room, missing = self.pack_tokens, rate * self.pack_tokens
            for k in order:
                if lines[k].tokens <= room:
                    pack.append(k)
                    room -= lines[k].tokens
                    missing -= lines[k].cost
            if abs(missing) + rate * room < best:
                best = abs(missing) + rate * room
                chosen = pack
        left = sorted(set(range(len(lines))) - set(chosen))
        return [lines[k] for k in chosen], [lines[k] for k in left]
