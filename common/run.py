"""What every training script shares around its loop: flags, processes, the run's folder, its log.

    run = start(args, "sft")                   joins the processes, picks the device, seeds, says so
    if not run.trained():                      False again only after run.mark_trained()
        ...                                    the script's own loop
        if not run.should_skip(loss, norm):
            opt.step()
        run.log(step, steps, loss=loss, norm=norm, tokens=..., visual_tokens=..., flops=...)
        run.mark_trained()
    run.score(lambda: score_phase(...))        a failing scorer never costs the training before it
    run.close()

One process needs nothing; under `torchrun --nproc_per_node=N` the same code runs on N of them.
A run lives in OUT/SIZE/STAGE: metrics.jsonl (a line a step), checkpoint/, data/ (what the phase
made to train on), model/ (the official layout), samples.md, predictions.jsonl (a line a held-out
answer) and score.json. OUT/SIZE/report.html shows all stages, see common/report.py.
"""

import argparse
import gc
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from concurrent.futures import Future
from pathlib import Path
from statistics import median

import numpy as np
import torch
from tqdm import tqdm

from common.jsonl import replacing
from common.processes import Peers, join_processes
from common.report import write_report
from common.threads import watch_cores
from kernels import attention_path

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MADE_HERE = ["toy", "tiny", "small"]  # sizes without released weights
SIZES = [*MADE_HERE, "0.6b", "1.7b", "4b", "8b"]


def released(size: str) -> bool:
    """Whether weights of this size are released: then they are held in bf16, and blocks run again.

    And its runs are dear: what cost weeks is not thrown away, and not saved twice.
    """
    return size not in MADE_HERE


# Dense bf16 peaks of the data sheets, FLOP/s; the first name contained in the device's name counts.
PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}

# A step is skipped that is not finite, or whose gradient is so many times the median of the last
# norms. # ours: the toy's largest is 3.3 times it, a spike that harms is hundreds; and no run gets
# better by itself after so many.
EXPLODES = 20
# ours: no gradient of so small a norm explodes; clipped to 1 it moves little. A model that knows
# its few data by heart has norms near zero, and would skip what it still has to learn.
MILD = 5
WINDOW = 100
MOST_IN_A_ROW = 5
MOST_IN_1000 = 20

# ----------------------------------------------------------------------------------------------
# flags


def at_least(low: int | float):
    """An argparse type: finite numbers from `low` up, whole ones where it is whole."""

    def number(text: str) -> int | float:
        value = type(low)(text)
        if not low <= value < math.inf:  # nor NaN
            raise argparse.ArgumentTypeError(f"must be at least {low}, got {text}")
        return value

    return number


def arguments(doc: str, eval_limit: int = 40, asks: bool = True) -> argparse.ArgumentParser:
    """A parser with the flags that every training script has.

    asks: the script asks a model in modes with tools, so there is --sandbox too.
    """
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    add = parser.add_argument
    add("--size", default="toy", choices=SIZES, help="the one dial: every default follows from it")
    add("--data", help="folder with train/*.jsonl and heldout/*.jsonl (default: data/SIZE)")
    add("--out", default="runs", help="run folders go to OUT/SIZE/STAGE")
    add("--init", help="model folder to start from (default: what the stage before left)")
    add("--seed", type=at_least(0), default=0)
    add("--steps", type=at_least(1), help="optimizer steps (default: by size)")
    add("--packs", type=at_least(1), help="micro-batches of a step, on all ranks together")
    add("--eval-limit", type=at_least(0), default=eval_limit, metavar="N",
        help="held-out questions per task after the phase; 0: none")
    add("--plan", action="append", default=[], metavar="NAME=NUMBER",
        help="another number than the script's PLAN has for the size, e.g. prompts=8")
    add("--save-every", type=at_least(1), default=100, help="steps between checkpoints")
    add("--save-minutes", type=at_least(1), default=15, help="at most so long between checkpoints")
    add("--keep-checkpoint", action="store_true", help="also when the stage is trained")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="insist on a checkpoint to go on from")
    again.add_argument("--fresh", action="store_true", help="forget this stage's results")
    add("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    add("--dtype", default="auto", choices=["auto", *DTYPES], help="of the computation")
    add("--compile", default="auto", choices=["auto", "on", "off"],
        help="torch.compile for each block (default: on CUDA with Triton, but at toy and tiny)")
    add("--gpu-memory", type=at_least(1), metavar="GB", help="as if each card had no more")
    add("--workers", type=at_least(0), help="loading processes (default: 1, on a GPU up to 8)")
    add("--threads", type=at_least(1), help="CPU threads (default: OMP_NUM_THREADS or cores)")
    return add_sandbox_argument(parser) if asks else parser


def add_sandbox_argument(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--sandbox", default="operations", choices=["operations", "python"],
        help="what tool calls of a model that is asked may hold: six operations on pictures, or "
        "Python, as the official model writes it, in a confined process (default: operations)")
    return parser


def add_judge_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    add = parser.add_argument
    add("--judge", action="append", metavar="URL", help="OpenAI-compatible address, .../v1, that "
        "scores what rules cannot; may be repeated (default: rules alone). Key: JUDGE_KEY")
    add("--judge-model", default="", help="the judge's model")
    return parser


# What --plan takes: counts of what there must be, rates above 0, shares up to 1. Other numbers may
# be 0, which leaves a thing out: replay, beta, hints.
COUNTS = (
    "steps", "filtered", "samples", "asked", "rounds", "prompts", "round_steps", "measured", "kept",
    "updates", "max_tokens", "pack",
)
LEAST = dict.fromkeys(COUNTS, 1) | {"group": 2}  # a group's responses are compared with each other
RATES = ("lr", "round_lr")
SHARES = ("discover", "least", "words")


def is_allowed(name: str, number: float) -> tuple[bool, str]:
    """Whether --plan may give a name this number, and in words what it may."""
    if name in RATES:
        return 0 < number < math.inf, "above 0"
    if name in SHARES:
        return 0 <= number <= 1, "from 0 to 1"
    least = LEAST.get(name, 0)
    return least <= number < math.inf, f"at least {least}"


def plan_of(args, plans: dict[str, dict]) -> dict:
    """The size's numbers, changed by --plan. SystemExit where one has no such name, or value."""
    plan = dict(plans.get(args.size, plans["released"]))
    for change in args.plan:
        name, _, number = change.partition("=")
        if not isinstance(plan.get(name), (int, float)):
            names = [key for key, value in plan.items() if isinstance(value, (int, float))]
            raise SystemExit(f"--plan {change}: the names are {', '.join(names) or 'none here'}")
        try:
            plan[name] = type(plan[name])(number)
        except ValueError:
            raise SystemExit(f"--plan {change}: {number!r} is no number for {name}") from None
        allowed, what = is_allowed(name, plan[name])
        if not allowed:
            raise SystemExit(f"--plan {change}: {name} must be finite and {what}")
    return plan


def data_folder(args) -> Path:
    return Path(args.data or f"data/{args.size}")


def previous_model(args, stage: str) -> Path:
    """The model to start from: --init, or what `stage` left. SystemExit where it is missing."""
    folder = Path(args.init or Path(args.out) / args.size / stage / "model")
    if not (folder / "config.json").exists():
        raise SystemExit(f"{folder} holds no model; run {stage} first, or name one with --init")
    return folder


# ----------------------------------------------------------------------------------------------
# the start of a run


def start(args, stage: str, later=()) -> "Run":
    """Joins the processes, picks device, dtype and threads, and says them in one line.

    Every generator is seeded alike on all ranks, so that fresh weights agree. later: stages that
    follow in this process. SystemExit where the folder of one of them cannot be written to.
    """
    device = pick_device(args)
    if args.gpu_memory and device.type != "cuda":
        raise SystemExit(f"--gpu-memory {args.gpu_memory}: this run is on {device}, not on a GPU")
    dtype = args.dtype
    if dtype == "auto":
        dtype = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    if device.type == "cpu":
        # CPU index_put adds with atomics unless asked not to, and equal runs differ in the last bit
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    share_cores(args, device)
    watch_cores()
    join_processes(device)
    seed_everything(args.seed)

    run = Run(args, stage, device, DTYPES[dtype], later)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    peak = datasheet_peak(name) if dtype == "bf16" else None
    source = "datasheet" if peak else "measured"
    run.peak = run.sum(peak or measured_peak(device, run.dtype))
    run.say(
        f"{stage}: {device} ({name}), {dtype}, world {run.world}, "
        f"{torch.get_num_threads()} threads, attention: {attention_path(device, run.dtype)}, "
        f"torch {torch.__version__}, peak {run.peak / 1e12:.3g} TFLOP/s ({source}), "
        f"folder {run.folder}"
    )
    return run


def pick_device(args) -> torch.device:
    kind = args.device
    if kind == "auto":
        kind = "mps" if torch.backends.mps.is_available() else "cpu"
        kind = "cuda" if torch.cuda.is_available() else kind
    if kind == "mps":
        if not torch.backends.mps.is_available():
            raise SystemExit("--device mps: this machine or this build of torch has no MPS")
        if args.dtype == "bf16" or "RANK" in os.environ:
            raise SystemExit("MPS runs in fp32 in one process: no --dtype bf16, no torchrun")
    if kind != "cuda":
        return torch.device(kind)
    # Packs differ in shape: pieces that can grow leave fewer gaps. Read when CUDA starts.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    local = int(os.environ.get("LOCAL_RANK", 0))
    if local >= torch.cuda.device_count():
        raise SystemExit(
            f"--device cuda: this rank needs GPU {local} "
            f"of the {torch.cuda.device_count()} that torch finds here"
        )
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    torch.cuda.reset_peak_memory_stats()
    return device


def share_cores(args, device: torch.device):
    """Sets this rank's CPU threads, and args.workers where none were asked for."""
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    share = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    # beside a GPU the CPU has small work only, which many threads make slower
    threads = min(share, 4) if device.type == "cuda" else share
    torch.set_num_threads(args.threads or int(os.environ.get("OMP_NUM_THREADS", threads)))
    if args.workers is None:
        # one process decodes as fast as a CPU trains; a GPU outruns it
        args.workers = min(8, max(1, share - 1)) if device.type == "cuda" else 1


# What a run leaves in its folder.
FILES = (
    "made.json", "built.json", "metrics.jsonl", "done.json", "score.json", "samples.md",
    "predictions.jsonl",
)
FOLDERS = ("checkpoint", "data", "model")


def make_folder(folder: Path, rank: int):
    """Makes a run's folder and tries all that will be written there. OSError: it cannot be."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in map(folder.joinpath, FOLDERS):
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(f"{path} is a file, and must be a folder")
    for path in map(folder.joinpath, FILES):
        if path.exists():
            open(path, "r+").close()  # its text stays
    trial = folder / f"trial-{rank}"
    try:
        trial.write_bytes(bytes(4096))  # ours: with less room there is not even a log
    finally:
        trial.unlink(missing_ok=True)


def datasheet_peak(name: str) -> float | None:
    """FLOP/s in bf16 of a GPU by its name, None for one that is not listed."""
    return next((flops for card, flops in PEAKS.items() if card in name), None)


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best of ten matrix products: what MFU is measured against on a CPU."""
    n = 8192 if device.type == "cuda" else 512
    a = torch.ones(n, n, device=device, dtype=dtype)
    seconds = []
    for _ in range(10):  # the first ones wake the threads
        begin = time.perf_counter()
        (a @ a)[0, 0].item()
        seconds.append(time.perf_counter() - begin)
    return 2 * n**3 / min(seconds)


def seed_everything(seed: int, *more: int):
    """Seeds torch (all devices), numpy and python from a tuple of numbers."""
    mixed = int(np.random.SeedSequence([seed, *more]).generate_state(1)[0])
    torch.manual_seed(mixed)
    np.random.seed(mixed)
    random.seed(mixed)


def peak_memory(device: torch.device) -> int:
    """Peak bytes: of tensors on CUDA, else resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kilobytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobytes


# ----------------------------------------------------------------------------------------------


class Run(Peers):
    """This process among its peers, the run's folder, its log, and the wish to stop.

    args, stage, device, dtype (of the computation), rank, world, main (rank 0), folder;
    peak: FLOP/s of all ranks; totals: tokens, visual tokens, seconds, skipped steps so far;
    guard: what should_skip remembers; frozen: hashes of the weights that do not learn, once they
    are known; saving: the checkpoint that is being written; saved: the last one that was; late:
    minutes enough have passed for another; stop: 0 or a signal.
    """

    def __init__(self, args, stage: str, device: torch.device, dtype: torch.dtype, later=()):
        super().__init__("words")
        self.background = Peers("saving")  # of the thread that writes checkpoints
        self.args = args
        self.stage = stage
        self.device = device
        self.dtype = dtype
        self.peak = 1.0
        self.totals = {"tokens": 0, "visual_tokens": 0, "seconds": 0.0, "skipped_steps": 0}
        self.guard = {"steps": 0, "norms": [], "skipped": []}
        self.frozen: dict | None = None
        self.step = 0  # the one that is being done
        self.skipped = False  # an update of it
        self.needs_autocast = False  # weights of another dtype than the computation's, see shard
        self.bar = None
        self.clock = self.saved_at = time.perf_counter()
        self.saving: Future | None = None
        self.saved: Path | None = None
        self.late = False
        self.stop = 0
        self.folder = Path(args.out) / args.size / stage
        self.make_folders([self.folder, *[self.folder.with_name(name) for name in later]])
        if args.fresh:
            self.attempt(f"cannot clean {self.folder}", self.forget)
        self.catch_signals()

    # -- among the processes -------------------------------------------------------------------

    def say(self, text: str):
        """A line on the terminal, above the progress bar, from rank 0 alone."""
        if self.main:
            tqdm.write(text, file=sys.stderr)

    def means(self, local: dict[str, list]) -> dict[str, float]:
        """The mean of each list over all ranks' lists of that name."""
        sums = Counter()
        counts = Counter()
        for values in self.gather_objects({k: (sum(v), len(v)) for k, v in local.items()}):
            for key, (total, count) in values.items():
                sums[key] += total
                counts[key] += count
        return {key: sums[key] / count for key, count in counts.items() if count}

    def make_folders(self, folders: list[Path]):
        """make_folder on every rank; SystemExit on all where one cannot: later costs a training."""

        def make():
            for folder in folders:
                make_folder(folder, self.rank)

        try:
            self.attempt(f"--out {self.args.out}", make)
        except RuntimeError as e:
            raise SystemExit(str(e)) from None

    # -- computing -----------------------------------------------------------------------------

    def autocast(self):
        wanted = self.needs_autocast and self.dtype == torch.bfloat16
        return torch.autocast(self.device.type, torch.bfloat16, wanted)

    def to(self, batch: dict) -> dict:
        """The batch on the device; segments and grids stay on the host, where they are read."""
        on_gpu = self.device.type == "cuda"
        if on_gpu and not batch["labels"].is_cuda:
            # which tokens have a label: found here, the GPU need not be waited for
            batch = batch | {"labelled": (batch["labels"] != -100).nonzero()[:, 0]}
        moved = dict(batch)
        for key, value in batch.items():
            if isinstance(value, torch.Tensor) and key not in ("segments", "grids"):
                if on_gpu and not value.is_cuda:
                    value = value.pin_memory()
                moved[key] = value.to(self.device, non_blocking=on_gpu)
        return moved

    # -- what the phase has done ---------------------------------------------------------------

    def forget(self):
        """--fresh: nothing that an earlier run left counts, not even should this one be killed."""
        if self.main:
            for name in ("done.json", "score.json", "made.json", "built.json", "metrics.jsonl"):
                (self.folder / name).unlink(missing_ok=True)
            for name in ("checkpoint", "data"):
                shutil.rmtree(self.folder / name, ignore_errors=True)

    def made_from(self, **facts):
        """Writes down what this phase is made from; SystemExit where an earlier run's was other.

        Without this a changed --init would silently go on with another model's checkpoint or data.
        """
        path = self.folder / "made.json"
        facts = json.loads(json.dumps(facts, default=str))
        before = json.loads(path.read_text()) if path.exists() else facts
        for key, value in facts.items():
            if value != before.get(key):
                raise SystemExit(
                    f"{self.folder} was made with {key} {before.get(key)}, not with {value}; "
                    "--fresh starts over"
                )
        self.barrier()  # every rank has looked before rank 0 writes
        self.write_json("made.json", facts)

    def trained(self) -> bool:
        """Whether this phase has left its model already (then it says so)."""
        done = (self.folder / "done.json").exists()
        if done:
            self.say(
                f"{self.stage} is trained: {self.folder} "
                "(--fresh trains it again, another --out beside it)"
            )
        return done

    def mark_trained(self):
        """The model is there: from now on nobody reads the checkpoint (at 8B 104 GB)."""
        self.write_json("done.json", self.totals)
        if self.main and not self.args.keep_checkpoint:
            shutil.rmtree(self.folder / "checkpoint", ignore_errors=True)
        self.barrier()

    def score(self, scorer, later="the same command scores it again, also without torchrun"):
        """Keeps scorer()'s result in score.json, unless it is there, or --eval-limit is 0.

        The model is saved by now, so a failing scorer is reported and the phase still counts:
        the same command scores again, and trains nothing. Where one rank fails alone, as for lack
        of memory, and the others wait for it in the middle of a sharded model, the job ends within
        seconds. Then the page of the run is written anew.

        later: what can be done about a score that failed.
        """
        gc.collect()  # the training's tensors would stand beside the model to be scored
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        scored = (self.folder / "score.json").exists()
        try:
            if self.args.eval_limit and not scored:
                result = scorer()
                if result:
                    self.write_json("score.json", result)
        except (Exception, SystemExit) as e:
            self.say_unscored(e, later)
        else:
            self.background.barrier()
        if self.main and not scored:
            self.write_page()
        self.barrier()

    def say_unscored(self, error: BaseException, later: str):
        """On a rank whose scorer has failed, while others may be in the middle of it."""
        if isinstance(error, SystemExit):  # one line that says what is wrong with the data
            self.say(str(error))
        else:
            traceback.print_exception(error)
        self.say(
            f"WARNING: {self.stage} is trained and saved, but scoring it failed (above); {later}"
        )
        # not by words, which the others may be exchanging
        self.background.meet_or_end(
            f"it alone could not score {self.stage} ({type(error).__name__}: {error}), and the "
            f"others wait for it; the model is saved, {self.folder / 'model'}; {later}"
        )

    def write_page(self):
        """The page of all phases so far; one that cannot be written costs nothing else."""
        try:
            line = write_report(self.folder.parent)
            if self.args.eval_limit:
                self.say(line)
        except Exception as e:
            traceback.print_exc()
            self.say(f"WARNING: no report.html: {type(e).__name__}: {e}")

    def write_json(self, name: str, content):
        """A small file of the run's folder, whole or not at all (rank 0)."""
        if self.main:
            with replacing(self.folder / name) as part:
                part.write_text(json.dumps(content, indent=1) + "\n")

    # -- steps that must not be taken ----------------------------------------------------------

    def should_skip(self, loss, norm) -> bool:
        """All ranks, before opt.step(): whether loss or gradient are not finite, or it explodes.

        loss, norm: of all ranks together, so that all decide alike; they are waited for here
        instead of in log. FloatingPointError where so many steps are skipped that something is
        wrong with more than single samples.
        """
        loss, norm = float(loss), float(norm)
        guard = self.guard  # checkpoints keep it: a killed run skips what another would
        guard["steps"] += 1
        usual = math.inf
        if len(guard["norms"]) == WINDOW:
            usual = median(guard["norms"])
        skip = not math.isfinite(loss + norm) or norm > max(EXPLODES * usual, MILD)
        if skip:
            self.count_skipped(
                f"step {self.step} is skipped: loss {loss:.4g}, gradient norm {norm:.4g} "
                f"(usually {usual:.4g})"
            )
        elif norm > 0:  # a step in which nothing was to be learnt says nothing of the usual
            guard["norms"] = [*guard["norms"], norm][-WINDOW:]
        return skip

    def count_skipped(self, what: str):
        self.say(what)
        self.skipped = True
        self.totals["skipped_steps"] += 1
        now = self.guard["steps"]
        skipped = [n for n in self.guard["skipped"] if n > now - 1000] + [now]
        self.guard["skipped"] = skipped
        last = range(now - MOST_IN_A_ROW + 1, now + 1)
        if set(last) <= set(skipped) or len(skipped) >= MOST_IN_1000:
            self.give_up(f"{what}, like {len(skipped)} of the last 1,000 steps")

    def give_up(self, why: str):
        self.finish_save()
        good = f"the last checkpoint, {self.saved}, is good" if self.saved else "nothing is saved"
        raise FloatingPointError(f"{why}; {good}; look at the data or lower the learning rate")

    def finish_save(self):
        """All ranks: waits for the checkpoint that is being written; its error is raised here."""
        if self.saving is not None:
            saving, self.saving = self.saving, None
            saving.result()

    # -- the log -------------------------------------------------------------------------------

    def write(self, record: dict):
        """A line in metrics.jsonl (rank 0). One without "step" outlives a resume."""
        if self.main:
            with open(self.folder / "metrics.jsonl", "a") as f:  # closed means flushed
                f.write(json.dumps(record) + "\n")

    def log(self, step: int, steps: int, tokens=0, visual_tokens=0, flops=0.0, **values):
        """All ranks, once a step (0-based): the bar, a line of metrics, and whether to stop.

        tokens, visual_tokens, flops: this rank's in this step, FLOPs without recomputation;
        values: global numbers (loss, norm, lr, ...). On all ranks FloatingPointError when loss or
        norm is not finite, and the step was not skipped: no such step is ever saved; RuntimeError
        when the checkpoint that was being written could not be.
        """
        values = {k: float(v) for k, v in values.items()}  # waits for the device: honest clocks
        for key in ("loss", "norm"):
            if not self.skipped and not math.isfinite(values.get(key, 0.0)):
                self.give_up(f"step {step}: {key} is {values[key]}")
        tokens, visual_tokens, flops, memory = self.exchange(tokens, visual_tokens, flops)
        now = time.perf_counter()
        seconds = now - self.clock
        self.clock = now
        work = {"tokens": int(tokens), "visual_tokens": int(visual_tokens), "seconds": seconds}
        for key, amount in work.items():
            self.totals[key] += amount
        record = {
            "step": step,
            **values,
            **work,
            "skipped_steps": self.totals["skipped_steps"],
            "tokens_per_s": tokens / seconds,
            "visual_tokens_per_s": visual_tokens / seconds,
            "mfu": flops / seconds / self.peak,
            "peak_gb": memory / 1e9,
        }
        self.show(step, steps, record)
        for key, value in record.items():
            if not math.isfinite(value):  # of a skipped step; JSON has no such numbers
                record[key] = None
        self.write(record)
        self.step = step + 1
        self.skipped = False

    def exchange(self, *work) -> list[float]:
        """Sums of a step's work over all ranks, and the most memory of one.

        And what all must know at once: to stop, to save, or that a checkpoint was not written.
        """
        late = time.perf_counter() - self.saved_at > 60 * self.args.save_minutes
        failed = self.saving is not None and self.saving.done() and self.saving.exception()
        mine = [*work, peak_memory(self.device), self.signal, bool(failed), late]
        rows = np.array(self.gather(mine))
        memory, stop, failed = rows[:, -4:-1].max(0).tolist()
        self.stop = int(stop)
        self.late = bool(rows[0, -1])  # by one clock
        if failed:
            self.finish_save()
        return [*rows[:, :-4].sum(0).tolist(), memory]

    def show(self, step: int, steps: int, record: dict):
        if self.bar is None:
            self.bar = tqdm(
                total=steps, initial=step, desc=self.stage, unit="step", disable=not self.main,
                dynamic_ncols=True, mininterval=0.2 if sys.stderr.isatty() else 10,
            )
        reward = "reward {reward:.2f}, " if "reward" in record else ""
        shown = (
            "loss {loss:.4f}, {tokens_per_s:,.0f} tok/s, {visual_tokens_per_s:,.0f} visual/s, "
            "mfu {mfu:.1%}, {peak_gb:.2f} GB"
        )
        self.bar.set_postfix_str((reward + shown).format_map(record), refresh=False)
        self.bar.update()

    # -- stopping ------------------------------------------------------------------------------

    def catch_signals(self):
        """SIGINT and SIGTERM become a wish, heard after the step: it is saved first."""
        self.signal = 0
        owner = os.getpid()

        def hear(number, frame):
            if os.getpid() != owner:  # a forked process ends with its parent, or when told to
                if number == signal.SIGTERM:
                    os._exit(128 + number)
            elif self.signal and number == signal.SIGINT and self.world == 1:
                raise KeyboardInterrupt  # a second Ctrl-C does not wait; torchrun sends each twice
            else:
                self.signal = number

        self.handlers = {s: signal.signal(s, hear) for s in (signal.SIGINT, signal.SIGTERM)}

    def leave(self, step: int):
        """After a signal and the save it caused: says how to go on, exits with the shell's code."""
        self.close()
        self.say(
            f"{signal.Signals(self.stop).name}: stopped after {step} steps, saved in "
            f"{self.folder}; the same command goes on from there"
        )
        raise SystemExit(128 + self.stop)

    def close(self):
        """Ends the bar and gives the signals back; one that no step has heard acts now."""
        if self.bar is not None:
            self.bar.close()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.signal and not self.stop:
            signal.raise_signal(self.signal)
