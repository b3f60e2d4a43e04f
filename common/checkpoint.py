"""Checkpoints between steps, and model folders between stages.

A checkpoint (checkpoint/step-N) holds model, optimizer, random states, the loader's place and what
else a script names. It is written aside, hashed, flushed and renamed, so a kill at any moment
leaves a valid one; torch.distributed.checkpoint lets another number of ranks read it.

Of weights that do not learn it holds hashes alone. Whoever resumes has filled the model as at the
stage's start, and the hashes say whether that is what was there. At 8B in stage 1, where the
projector alone learns, this saves 17 GB a checkpoint, and costs once, by arithmetic on one card,
some 20 s (3 GB/s to the host, 1.5 GB/s to hash), on any number of cards. Stage 0's model is a part
of the whole: of decoder and projector, which it leaves alone, there is no hash.

Training waits only while the tensors are copied to the host; a thread writes them. At 8B they are
104 GB (fp32 weights, two moments), 13 on each of eight cards: by arithmetic 4 s to copy (3 GB/s a
rank) and 30 s to write and hash (4 GB/s a node), at least every 15 minutes (# ours: all of it is
less than 1 % of the time). After SIGTERM torchrun leaves 30 s, which a step of 12 s and its save do
not fit into. Then the last checkpoint counts, and at most 15 minutes are lost; more time comes with
`torchrun --shutdown-timeout 180` (torch 2.12), which also suffices where a save was under way.

    progress = resume(run, model, opt)
    for step in range(progress.step, steps):
        ...
        save_if_due(run, step + 1, steps, model, opt, loader_state)
    export(run, model, processor)
"""

import hashlib
import json
import os
import random
import shutil
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException

from common.index import naming
from common.jsonl import replacing
from common.parallel import own_part, whole
from common.processes import Peers, groups, trim_heap
from common.run import Run, released, seed_everything
from common.weights import plan_files, write_file, write_index

KEEP = 2  # checkpoints kept: the newest, and one to fall back on
# files of every checkpoint, by any number of ranks: rank 0 always writes its share
ALWAYS = {".metadata", "__0_0.distcp", "rng-0.pt", "state.json"}

WRITER = ThreadPoolExecutor(1)  # at the end python waits for what it still has to write

# one process without a process group is intended
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or unin")


@dataclass
class Progress:
    """Where training goes on: steps done, the loader's state, what the script saved besides."""

    step: int = 0
    loader: dict | None = None
    extra: dict = field(default_factory=dict)


# ----------------------------------------------------------------------------------------------
# files


def sha256(path: Path) -> str:
    with open(path, "rb") as f, naming(path):
        return hashlib.file_digest(f, "sha256").hexdigest()


def fsync(path: Path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def on_main(peers: Peers, doing: str, work, *args):
    """work(*args) on rank 0; where it fails, all ranks raise the same RuntimeError."""
    peers.attempt(doing, lambda: peers.main and work(*args))


def clear_folder(folder: Path):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def put_in_place(tmp: Path, folder: Path):
    """Flushes tmp and renames it to `folder`. What stood there stays until then."""
    for path in [*tmp.iterdir(), tmp]:
        fsync(path)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(tmp, folder)
    fsync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def checkpoints(run: Run) -> list[Path]:
    """Complete checkpoints, oldest first. All ranks see the same folder."""
    found = (run.folder / "checkpoint").glob("step-*")
    complete = [p for p in found if p.name.removeprefix("step-").isdecimal()]
    return sorted(complete, key=lambda p: int(p.name.removeprefix("step-")))


# ----------------------------------------------------------------------------------------------
# what a checkpoint holds


def tensors_of(model: nn.Module, opt) -> dict:
    """By parameter name; sharded tensors stay sharded, so any number of ranks can read them.

    Without the weights that do not learn, see frozen_weights.
    """
    left_out = frozen_weights(model)
    tensors = {f"model.{name}": t for name, t in model.state_dict().items() if name not in left_out}
    for name, p in model.named_parameters():
        for key, t in opt.state.get(p, {}).items():
            tensors[f"optim.{name}.{key}"] = t
    return tensors


def frozen_weights(model: nn.Module) -> dict:
    return {name: p for name, p in model.named_parameters() if not p.requires_grad}


@torch.no_grad()
def hashes_of(run: Run, tensors: dict) -> dict[str, str]:
    """All ranks: a hash of each whole tensor, on any number of ranks the same.

    Of its numbers in bf16: cards with less memory may hold it so (see common/fit.py).
    """
    hashes = {}
    for i, (name, tensor) in enumerate(tensors.items()):
        tensor = whole(tensor)  # every rank must ask; one hashes it
        if i % run.world == run.rank:
            content = tensor.bfloat16().cpu().flatten().view(torch.uint8).numpy()
            hashes[name] = hashlib.sha256(content).hexdigest()
    return run.merge(hashes)


@torch.no_grad()
def refuse_diverged(run: Run, step: int, tensors: dict, dtype: torch.dtype | None = None):
    """All ranks: the run ends where a number of these tensors is not finite. dtype: once in it.

    Each rank reads what it holds, without a copy of it. At 8B that is 13 GB on each of eight cards,
    by arithmetic 10 ms.
    """
    names = []
    finite = []
    for name, tensor in tensors.items():
        part, _ = own_part(tensor)
        if part.numel():  # not on a rank beyond the last row
            ends = torch.stack(part.aminmax())  # both are NaN where one number is
            ends = ends.to(dtype or ends.dtype)
            names.append(name)
            finite.append(ends.isfinite().all().to(run.device))
    answers = torch.stack(finite).tolist() if finite else []  # the device is waited for once
    wrong = [name for name, answer in zip(names, answers) if not answer]
    found = sum(run.gather_objects(wrong), [])
    if found:
        run.give_up(f"after {step} steps {found[0]} is not finite: the model has diverged")


def rng_states(device: torch.device) -> dict:
    name, keys, *rest = np.random.get_state()
    states = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),  # torch.load would not trust an array
    }
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state()
    return states


def set_rng_states(states: dict, device: torch.device):
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    if device.type in states:
        torch.get_device_module(device).set_rng_state(states[device.type])


# ----------------------------------------------------------------------------------------------
# saving


def save_if_due(run: Run, step: int, steps: int, model, opt, loader_state=None, **extra):
    """After `step` steps: saves if it is time, and leaves after a signal.

    It is time every --save-every steps, after --save-minutes, at the end and at a signal; only the
    last two are waited for. At released sizes not at the end: the model that is exported next is a
    sixth of a checkpoint, and with it nobody needs one.
    """
    end = step >= steps
    due = run.late or step % run.args.save_every == 0
    if end and released(run.args.size):
        due = run.args.keep_checkpoint
    elif end:
        due = True
    if due or run.stop:
        save(run, step, model, opt, loader_state, **extra)
    if end or run.stop:
        run.finish_save()
    if run.stop:
        run.leave(step)


def save(run: Run, step: int, model, opt, loader_state=None, **extra):
    """All ranks: copies what checkpoint/step-N shall hold; a thread writes it. extra must be JSON.

    One is written at a time. RuntimeError on all ranks, here, in run.log or run.finish_save, when
    any of them cannot write; the checkpoint before stays valid. FloatingPointError where the model
    has diverged: such a checkpoint would push out a good one.
    """
    begin = time.perf_counter()
    run.finish_save()
    trim_heap()
    tensors = tensors_of(model, opt)
    refuse_diverged(run, step, tensors)
    if run.frozen is None:
        run.frozen = hashes_of(run, frozen_weights(model))  # once: they stay what they are
    final = run.folder / "checkpoint" / f"step-{step}"
    doing = f"cannot save {final} (the checkpoint before it stays valid)"
    state = {
        "step": step,
        "loader": loader_state,
        "totals": run.totals,
        "guard": run.guard,
        "frozen": run.frozen,
        "extra": extra,
        "world": run.world,
        "args": vars(run.args),
    }
    text = json.dumps(state, default=str)  # as it is now, like the copies
    copies = run.attempt(doing, lambda: on_host(tensors))
    rng = rng_states(run.device)
    run.saving = WRITER.submit(write_checkpoint, run, doing, final, copies, rng, text)
    run.saved_at = time.perf_counter()
    run.clock += run.saved_at - begin  # saving is not counted as training time


def on_host(tensors: dict) -> dict:
    """Copies, which training does not change; sharded tensors stay sharded."""
    return {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}


def write_checkpoint(run: Run, doing: str, final: Path, tensors: dict, rng: dict, text: str):
    """In its thread on every rank: a checkpoint's files, which rank 0 then puts in their place."""
    peers = run.background
    tmp = final.with_name(final.name + ".tmp")
    try:
        on_main(peers, doing, clear_folder, tmp)
        work = partial(write_or_say_why, peers, tmp, tensors, rng, text)
        hashes = peers.attempt(doing, work)
        on_main(peers, doing, publish, run, tmp, final, peers.merge(hashes))
        run.saved = final
    except RuntimeError:
        if run.main:
            shutil.rmtree(tmp, ignore_errors=True)
        raise


def write_or_say_why(peers: Peers, folder: Path, *what) -> dict[str, str]:
    """write_files; where the disk is full, or refuses to be written, the error says so.

    torch reports the place in its archive where that broke off, and what one rank tells the others
    has lost the OSError behind it.
    """
    try:
        return write_files(peers, folder, *what)
    except (Exception, CheckpointException) as e:
        cause = e
        if isinstance(e, CheckpointException):
            cause, _ = next(iter(e.failures.values()))
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            probe = folder / f"probe-{peers.rank}"
            probe.write_bytes(bytes(2**20))  # as large as what a full disk has no room for
            probe.unlink()
        raise cause or e


def write_files(peers: Peers, folder: Path, tensors: dict, rng: dict, text: str) -> dict[str, str]:
    """This rank's files, flushed to disk, and their hashes by name."""
    # The tensors lie on the host. Without copying ahead this thread never calls CUDA, which would
    # open the first GPU in every rank, and wait there for the training's work.
    writer = dcp.FileSystemWriter(folder, per_thread_copy_ahead=0)
    dcp.save(tensors, checkpoint_id=folder, storage_writer=writer, process_group=peers.group)
    path = folder / f"rng-{peers.rank}.pt"
    torch.save(rng, path)
    written = [path, *folder.glob(f"__{peers.rank}_*")]
    if peers.main:
        (folder / "state.json").write_text(text)
        written += [folder / "state.json", folder / ".metadata"]
    for path in written:
        fsync(path)
    return {path.name: sha256(path) for path in written}


def publish(run: Run, tmp: Path, final: Path, manifest: dict[str, str]):
    """The hashes last, then the rename that makes the checkpoint count; old ones go."""
    (tmp / "manifest.json").write_text(json.dumps(manifest, indent=0))
    if (run.folder / "metrics.jsonl").exists():
        fsync(run.folder / "metrics.jsonl")  # the curve must not be younger than the weights
    put_in_place(tmp, final)
    for old in checkpoints(run)[:-KEEP]:
        shutil.rmtree(old)


# ----------------------------------------------------------------------------------------------
# resuming


def resume(run: Run, model, opt) -> Progress:
    """All ranks: restores the newest intact checkpoint in place, on any number of ranks.

    model: filled as at the stage's start; what does not learn stays so, and must be what it was.
    Lines of metrics.jsonl that will be written again are dropped. Without a checkpoint: step 0.
    Damaged ones are set aside with a warning; RuntimeError if all are, or one is of another model.
    """
    folder = run.folder / "checkpoint"
    on_main(run, f"cannot clean {folder}", remove_unfinished, folder)
    found = run.gather_objects(checkpoints(run))[0]
    if run.args.resume and not found:
        raise SystemExit(f"--resume: no checkpoint in {folder}")
    path = newest_intact(run, found)
    progress = Progress()
    state = {}
    if path:
        state = run.attempt(f"cannot resume from {path}", lambda: load(path, model, opt))
        run.frozen = hashes_of(run, frozen_weights(model))
        refuse_another_start(path, state.get("frozen", {}), run.frozen)
        progress = Progress(state["step"], state["loader"], state["extra"])
        run.totals |= state["totals"]
        run.guard |= state.get("guard", {})
        run.saved = path
        run.step = progress.step
        run.say(f"resumed from {path}{changed_flags(run, state['args'])}; --fresh starts over")
    asked = run.args.steps  # None: by size
    if asked and progress.step > asked:
        run.say(
            f"already at step {progress.step} of the {asked} that --steps asks for: "
            "nothing is trained on"
        )
    seed_everything(run.args.seed, progress.step, run.rank)
    if state.get("world") == run.world:  # the ranks that saved draw on from where they were
        rng = torch.load(path / f"rng-{run.rank}.pt", weights_only=True)
        set_rng_states(rng, run.device)
    on_main(run, "cannot shorten metrics.jsonl", shorten_metrics, run, progress.step)
    run.clock = run.saved_at = time.perf_counter()
    return progress


def remove_unfinished(folder: Path):
    for tmp in folder.glob("*.tmp"):  # a save that never ended
        shutil.rmtree(tmp)


def newest_intact(run: Run, found: list[Path]) -> Path | None:
    """The newest checkpoint that is what was written; damaged newer ones are set aside."""
    damaged = []
    for path in reversed(found):
        wrong = damage(run, path)
        if wrong is None:
            on_main(run, f"cannot set {damaged} aside", set_aside, damaged)
            return path
        run.say(f"WARNING: {path} is damaged: {wrong}; trying the one before it")
        damaged.append(path)
    folder = run.folder / "checkpoint"
    # set aside earlier, and nothing left since: that is no fresh start either
    if damaged or run.gather_objects(any(folder.glob("damaged-*")))[0]:
        raise RuntimeError(f"every checkpoint in {folder} is damaged; --fresh starts over")
    return None


def set_aside(damaged: list[Path]):
    for path in damaged:
        aside = path.with_name("damaged-" + path.name)
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)


def damage(run: Run, folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, None if nothing; each rank hashes its share."""

    def check():
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
            missing = ALWAYS.difference(manifest)
            if missing:
                return f"manifest.json does not name {min(missing)}"
            for name in sorted(manifest)[run.rank :: run.world]:
                if sha256(folder / name) != manifest[name]:
                    return f"{name} is not what was written (sha256 differs)"
        except (OSError, ValueError, TypeError) as e:  # a manifest may be any JSON
            return f"{type(e).__name__}: {e}"

    return next(filter(None, run.gather_objects(check())), None)


def load(path: Path, model, opt) -> dict:
    """Reads a checkpoint in place, after its names and shapes were compared.

    DCP itself would skip what it is not asked for. It casts: on other cards weights and moments may
    be held in other dtypes (see common/fit.py).
    """
    wanted = tensors_of(model, opt)
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    ours = {name: t.shape for name, t in wanted.items()}
    theirs = {name: t.size for name, t in stored.items()}
    odd = sorted(dict(ours.items() ^ theirs.items()))
    if odd:
        raise ValueError(
            f"it was made with another model or other trained parts, e.g. {odd[0]} "
            f"({len(odd)} of {len(ours)} differ); --fresh starts over"
        )
    dcp.load(wanted, checkpoint_id=path, process_group=groups.get("words"))
    return json.loads((path / "state.json").read_text())


def refuse_another_start(path: Path, before: dict[str, str], now: dict[str, str]):
    """RuntimeError where weights that the checkpoint leaves out are not what they were."""
    odd = sorted(name for name in now if now[name] != before.get(name))
    if odd:
        raise RuntimeError(
            f"cannot resume from {path}: weights that do not learn are not in it, and they are not "
            f"what this stage started from, e.g. {odd[0]} ({len(odd)} of {len(now)} differ): go on "
            "from the same model, or where it was drawn, with the same --seed on the same kind of "
            "device; --fresh starts over"
        )


def changed_flags(run: Run, before: dict) -> str:
    """What was typed otherwise when the checkpoint was written, for the line that says so."""
    now = vars(run.args)
    changed = ""
    for key, value in before.items():
        if key not in ("resume", "fresh") and value != now.get(key, value):
            changed += f"; --{key.replace('_', '-')} was {value}"
    return changed


def shorten_metrics(run: Run, step: int):
    """Drops from metrics.jsonl what will be written again, and a line cut off by a kill."""
    path = run.folder / "metrics.jsonl"
    if not path.exists():
        return
    keep = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if line.endswith(b"\n") and json.loads(line).get("step", -1) < step:
                keep.append(line)
        except ValueError:
            continue
    with replacing(path) as part:
        part.write_bytes(b"".join(keep))
        fsync(part)


# ----------------------------------------------------------------------------------------------
# model folders


def export(run: Run, model, processor):
    """All ranks: leaves run.folder/model in the official layout, for the next stage and others.

    At released sizes in bf16, as Keye's own are. Files of weights are shared out over the ranks.
    FloatingPointError where the model has diverged; what an earlier export left then stays.
    """
    dtype = torch.bfloat16 if released(run.args.size) else None
    folder = run.folder / "model"
    tmp = folder.with_name("model.tmp")
    doing = f"cannot export to {folder}"
    state = model.state_dict()
    files = plan_files(state, dtype)
    refuse_diverged(run, run.step, state, dtype)

    def finish():
        write_index(tmp, state, files, model.config.to_json(), dtype)
        processor.save_pretrained(tmp)
        put_in_place(tmp, folder)

    on_main(run, doing, clear_folder, tmp)
    names = list(files)
    for first in range(0, len(names), run.world):  # each rank writes one file at a time
        path, mine = None, {}
        for rank, file in enumerate(names[first : first + run.world]):
            if rank == run.rank:
                path = tmp / file
            for name in files[file]:
                tensor = whole(state[name])  # every rank must ask; one keeps it
                if rank == run.rank:
                    mine[name] = tensor.to(dtype or tensor.dtype).cpu()
        run.attempt(doing, lambda: path and write_file(path, mine))
    on_main(run, doing, finish)


def fingerprint(folder: Path) -> str:
    """Tells a model folder's weights from others of the same name: a hash of names, sizes, samples.

    Of each file a thousand pieces of 4 kB, evenly spread, so that every large tensor is in it; all
    of a small file.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size} ".encode())
        for piece in pieces(path):
            digest.update(piece)
    return digest.hexdigest()[:16]


def pieces(path: Path, most: int = 1000) -> Iterator[bytes]:
    """At most so many pieces of a file, 4 kB each, evenly spread."""
    size = path.stat().st_size
    with open(path, "rb") as f, naming(path):
        for start in range(0, size, max(4096, size // most)):
            f.seek(start)
            yield f.read(4096)
