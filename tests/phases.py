"""What tests of the stage scripts share: a small world, a first model, doubles for a loop's edges.

    said = run_script("sft.py", *flags(out), ranks=2)       whole processes, as a user's
    sft.main(arguments_of(sft, *flags(out)))                 in this process, for doubles
    loop = Loop(monkeypatch, sft, FakeRun(tmp_path))         a loop among recorders
"""

import itertools
import json
import runpy
import shutil
import signal
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import nn

from common.checkpoint import Progress
from common.run import arguments
from conftest import ROOT
from conftest import write_toy_model
from model import SCALE
from stage import in_processes
from toyworld import make_world


@cache
def world() -> Path:
    """A few pictures and clips with all files of a world. Tests change copies alone."""
    out = Path(tempfile.mkdtemp()) / "world"
    make_world(out, pictures=60, clips=12, heldout=5, workers=1, progress=False)
    return out


@cache
def first_model() -> Path:
    folder = Path(tempfile.mkdtemp()) / "model"
    write_toy_model(folder)
    return folder


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, records: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def talk(question, answer, **more) -> dict:
    """A conversation of one question and its answer."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **more}


def sums(path: Path, count: int) -> Path:
    """A file of so many questions; the answer to question i is i."""
    lines = []
    for i in range(count):
        meta = {"answer": str(i), "verifier": "number"}
        lines.append(talk(f"What is {i} + 0?", str(i), meta=meta))
    return write(path, lines)


# ----------------------------------------------------------------------------------------------
# scripts


def flags(out: Path, *more) -> list[str]:
    few = ("--eval-limit", 1, "--device", "cpu", "--threads", 1, "--workers", 0)
    return [str(flag) for flag in ("--out", out, *few, *more)]


def resize(**numbers):
    """Changes the toy's numbers in this process; scripts have no flag for them."""
    SCALE["toy"] = replace(SCALE["toy"], **numbers)


def as_main(argv: list[str]):
    """A script as `python SCRIPT FLAGS` runs it, but with short packs and answers."""
    resize(pack=600, max_answer=24)
    sys.argv = argv
    runpy.run_path(str(ROOT / argv[0]), run_name="__main__")


def run_script(script: str, *argv, ranks=1, code=0) -> str:
    """Runs a script to its end in fresh processes; returns what they said on stderr."""
    return in_processes(as_main, [script, *argv], ranks, code)


def arguments_of(script, *argv, **more):
    """What main of a script takes. more: flags of its own."""
    args = arguments(script.__doc__).parse_args(list(map(str, argv)))
    vars(args).update(more)
    return args


@contextmanager
def kept_process():
    """A script's start in this process must not outlive it: signals and torch's settings."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with mock.patch("gc.collect"):  # among pytest's own objects it takes half a second
            yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        torch.use_deterministic_algorithms(False)


def call(script, *argv, **more):
    """main of a script in this process."""
    with kept_process():
        script.main(arguments_of(script, *argv, **more))


# ----------------------------------------------------------------------------------------------
# a run, and what stands around a loop


class FakeRun:
    """One rank of `world`, all of which say the same, so that a sum is a multiple."""

    device = torch.device("cpu")
    dtype = torch.float32
    stop = 0

    def __init__(self, folder: Path, rank=0, world=1, args=None, local=None):
        self.args = args or SimpleNamespace(size="toy", seed=0, workers=3, packs=None)
        self.folder = folder
        self.rank = rank
        self.world = world
        self.main = rank == 0
        self.said = []
        self.logged = []
        self.events = []
        self.computing = False  # within autocast
        self.moved = 0  # batches on the device
        self.local = {} if local is None else local  # what the other ranks merge

    def say(self, text):
        self.said.append(text)

    def gather_objects(self, thing):
        return [thing] * self.world

    def sum(self, x):
        return x * self.world

    def gather(self, values):
        return [list(values)] * self.world

    def merge(self, local):
        self.local |= local
        return dict(self.local)

    def attempt(self, doing, work):
        return work()

    @contextmanager
    def autocast(self):
        self.computing = True
        yield
        self.computing = False

    def mark_trained(self):
        self.events.append("trained")

    def should_skip(self, loss, norm):
        return False

    def to(self, batch):
        self.moved += 1
        return batch

    def log(self, step, steps, **values):
        self.events.append("log")
        self.logged.append({"step": step, "steps": steps, **values})


class Weights(nn.Module):
    """A model of one weight a part; its loss is their sum times the batch's "x"."""

    config = "the config"
    stays_gathered = False

    def __init__(self, run):
        super().__init__()
        self.run = run
        for part in ("vit", "projector", "decoder"):
            setattr(self, part, nn.Linear(1, 1, bias=False))
            nn.init.ones_(getattr(self, part).weight)

    def load(self, folder):
        self.loaded = folder
        return self

    def loss(self, batch):
        assert self.run.computing and torch.is_grad_enabled()
        weight = self.vit.weight + self.projector.weight + self.decoder.weight
        return (weight * batch["x"]).sum(), int((batch["labels"] != -100).sum())


class Loop:
    """A training loop among recorders, from step `begin` on.

    run: a FakeRun. events: what was called, in order. made: what each edge was given. steps: of
    each optimizer step its learning rate and gradients.
    """

    # A step has two micro-batches: 3 targets and 1.
    BATCHES = [
        {"labels": torch.tensor([4, -100, 5, 6]), "x": 2.0},
        {"labels": torch.tensor([-100, 7]), "x": 6.0},
    ]

    def __init__(self, monkeypatch, script, run, begin=0):
        self.run = run
        self.begin = begin
        self.events = run.events
        self.made = {}
        self.steps = []
        self.model = Weights(run)
        for name in (
            "shard", "make_optimizer", "resume", "Loader", "clip_gradients", "step_work",
            "save_if_due", "export", "fit",
        ):
            monkeypatch.setattr(script, name, getattr(self, name))
        monkeypatch.setattr(script, "KeyeVL", self)

    def check_order(self, steps: int):
        """All micro-batches of a step, then its one clipped update, its line, its checkpoint."""
        one = ["draw", "clip", "step", "zero", "log", "save"]
        begin = ["shard", "make_optimizer", "resume", "Loader"]
        assert self.events == [*begin, *one * steps, "export"]

    def check_numbers(self):
        """The mean over the 4 targets of each rank, whichever micro-batch they are in."""
        world = self.run.world
        assert self.run.moved == 2 * len(self.steps)
        targets = 4 * world
        for step, record in zip(self.steps, self.run.logged, strict=True):
            gradient = (2.0 + 6.0) / targets
            assert list(step.grads.values()) == pytest.approx([gradient] * 3)
            assert record["targets"] == targets
            assert record["loss"] == pytest.approx(world * 3 * gradient)
            assert record["norm"] == 0.25
            assert record["skipped"] == 3 * world
            assert record["tokens"] == 6

    def note(self, name, *args, **named):
        self.events.append(name)
        self.made[name] = (args, named)

    # The edges, by the names that scripts import.

    def shapes(self, source, **named):
        self.made["shapes"] = (source, named)
        return self.model

    def fit(self, *args):
        self.made["fit"] = (args, {})
        self.model.stays_gathered = "as fits"
        return {"moments": "as fits"}

    def shard(self, model, run):
        self.note("shard", model, run)
        return model

    def make_optimizer(self, model, rates, **named):
        self.note("make_optimizer", model, rates, **named)
        self.param_groups = [{"peak_lr": max(rates.values()), "lr": None}]
        return self

    def resume(self, run, model, opt):
        self.note("resume", run, model, opt)
        return Progress(self.begin, {"place": self.begin})

    # A loader's own: what failed, and how many samples were tried.
    failures = []
    tried = 0

    def Loader(self, *args, **named):
        self.note("Loader", *args, **named)
        return self

    def __iter__(self):
        place = self.begin
        while True:
            place += 1
            self.events.append("draw")
            skipped = {"missing": 1, "too_long": 2}
            state = {"place": place}
            shares = {"share_of_tokens/vqa": 0.25}
            yield self.BATCHES, {"skipped": skipped, "state": state, "shares": shares}

    def prepare(self):
        """The next step may be loaded early: nothing changes by it."""

    def clip_gradients(self, model):
        self.events.append("clip")
        return torch.tensor(0.25)

    def step_work(self, cfg, batches, **named):
        self.made["step_work"] = ((cfg, batches), named)
        return {"tokens": 6, "visual_tokens": 0, "flops": 1e6}

    def save_if_due(self, *args):
        self.note("save", *args)

    def export(self, *args):
        self.note("export", *args)

    # The optimizer.

    def step(self):
        self.events.append("step")
        grads = {}
        for name, p in self.model.named_parameters():
            if p.grad is not None:
                grads[name] = p.grad.item()
        self.steps.append(SimpleNamespace(lr=self.param_groups[0]["lr"], grads=grads))

    def zero_grad(self, set_to_none):
        self.events.append("zero")
        self.model.zero_grad(set_to_none=set_to_none)


class Loaded:
    """Stands for a class that scripts load from a folder: notes which, and gives `thing`."""

    def __init__(self, thing):
        self.thing = thing
        self.folders = []

    def from_pretrained(self, folder, *more, **named):
        self.folders.append(Path(folder))
        return self.thing


class Phase:
    """main of a phase with doubles for all that takes time; `done` is what they were given.

    failing: the one that raises an error, "finetune" or "score".
    """

    def __init__(self, monkeypatch, tmp_path: Path, script):
        self.script = script
        self.done = []
        self.failing = None
        self.out = tmp_path / "runs"
        self.data = tmp_path / "data"
        self.init = tmp_path / "init"
        sums(self.data / "heldout" / "q.jsonl", 1)
        shutil.copytree(first_model(), self.init)
        monkeypatch.setattr(script, "finetune", self.finetune)
        monkeypatch.setattr(script, "score_phase", self.score_phase)

    def __call__(self, *more):
        self.done.clear()
        call(self.script, *flags(self.out, "--data", self.data, *more))

    def finetune(self, run, init, mix, lr, steps):
        self.done.append(("finetune", run.folder, init, mix, lr, steps))
        if self.failing == "finetune":
            raise RuntimeError("out of disk")
        shutil.copytree(init, run.folder / "model", dirs_exist_ok=True)
        change(run.folder / "model")

    def score_phase(self, run, heldout, modes, limit):
        self.done.append(("score", heldout, modes, limit))
        if self.failing == "score":
            raise torch.OutOfMemoryError("no memory left")
        return {"plain": {}}


def change(model: Path, counter=itertools.count(1)):
    """One byte of its weights, to what it never was before."""
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-4] = next(counter) % 256  # the least of its last number
    weights.write_bytes(content)
