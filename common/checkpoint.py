"""Checkpoints between steps, and model folders between stages.

A checkpoint (checkpoint/step-N) holds model, optimizer, random states, the loader's place and what
else a script names. It is written aside, hashed, flushed and renamed, so a kill at any moment
leaves a valid one; torch.distributed.checkpoint lets another number of ranks read it.

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
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from common.parallel import full_state
from common.run import Run, seed_everything
from common.weights import save_weights

KEEP = 2  # checkpoints kept: the newest, and one to fall back on


@dataclass
class Progress:
    """Where training goes on: steps done, the loader's state, what the script saved besides."""

    step: int = 0
    loader: dict | None = None
    extra: dict = field(default_factory=dict)


# ----------------------------------------------------------------------------------------------
# files


def sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def fsync(path: Path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checkpoints(run: Run) -> list[Path]:
    """Complete checkpoints, oldest first. All ranks see the same folder."""
    found = (run.folder / "checkpoint").glob("step-*")
    complete = [p for p in found if p.name.removeprefix("step-").isdecimal()]
    return sorted(complete, key=lambda p: int(p.name.removeprefix("step-")))


# ----------------------------------------------------------------------------------------------
# what a checkpoint holds


def tensors_of(model: nn.Module, opt) -> dict:
    """By parameter name; sharded tensors stay sharded, so any number of ranks can read them."""
    optim = {name: opt.state[p] for name, p in model.named_parameters() if p in opt.state}
    return {"model": dict(model.state_dict()), "optim": optim}


def rng_states(device: torch.device) -> dict:
    name, keys, *rest = np.random.get_state()
    states = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
    }
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state()
    return states


def set_rng_states(states: dict, device: torch.device):
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"])
    if device.type in states:
        torch.get_device_module(device).set_rng_state(states[device.type])


# ----------------------------------------------------------------------------------------------
# saving


def save_if_due(run: Run, step: int, steps: int, model, opt, loader_state=None, **extra):
    """After `step` steps: saves every --save-every, at the end, and at a signal; then leaves."""
    if step % run.args.save_every == 0 or step >= steps or run.stop:
        save(run, step, model, opt, loader_state, **extra)
    if run.stop:
        run.leave(step)


def save(run: Run, step: int, model, opt, loader_state=None, **extra):
    """All ranks: writes checkpoint/step-N. extra must be JSON.

    RuntimeError on all ranks when any of them cannot write; the checkpoint before stays valid.
    """
    begin = time.perf_counter()
    final = run.folder / "checkpoint" / f"step-{step}"
    tmp = final.with_name(final.name + ".tmp")
    doing = f"cannot save {final} (the checkpoint before it stays valid)"
    state = {
        "step": step,
        "loader": loader_state,
        "totals": run.totals,
        "extra": extra,
        "world": run.world,
        "args": vars(run.args),
    }
    try:
        run.attempt(doing, lambda: clear_folder(run, tmp))
        hashes = run.attempt(doing, lambda: write_files(run, tmp, model, opt, state))
        manifest = run.merge(hashes)
        run.attempt(doing, lambda: publish(run, tmp, final, manifest))
    except RuntimeError:
        if run.main:
            shutil.rmtree(tmp, ignore_errors=True)
        raise
    run.clock += time.perf_counter() - begin  # saving is not counted as training time


def clear_folder(run: Run, folder: Path):
    if run.main:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)


def write_files(run: Run, folder: Path, model, opt, state: dict) -> dict[str, str]:
    """This rank's files, flushed to disk, and their hashes by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one process without a process group is intended
        dcp.save(tensors_of(model, opt), checkpoint_id=folder)
    torch.save(rng_states(run.device), folder / f"rng-{run.rank}.pt")
    written = [*folder.glob(f"__{run.rank}_*"), folder / f"rng-{run.rank}.pt"]
    if run.main:
        (folder / "state.json").write_text(json.dumps(state, default=str))
        written += [folder / "state.json", folder / ".metadata"]
    for path in written:
        fsync(path)
    return {path.name: sha256(path) for path in written}


def publish(run: Run, tmp: Path, final: Path, manifest: dict[str, str]):
    """The hashes last, then the rename that makes the checkpoint count; old ones go."""
    if not run.main:
        return
    (tmp / "manifest.json").write_text(json.dumps(manifest, indent=0))
    fsync(tmp / "manifest.json")
    fsync(tmp)
    if (run.folder / "metrics.jsonl").exists():
        fsync(run.folder / "metrics.jsonl")  # the curve must not be younger than the weights
    if final.exists():  # of a longer run, resumed from an older step
        shutil.rmtree(final)
    os.rename(tmp, final)
    fsync(final.parent)
    for old in checkpoints(run)[:-KEEP]:
        shutil.rmtree(old)


# ----------------------------------------------------------------------------------------------
# resuming


def resume(run: Run, model, opt) -> Progress:
    """All ranks: restores the newest intact checkpoint in place, on any number of ranks.

    Lines of metrics.jsonl that will be written again are dropped. Without a checkpoint: step 0.
    Damaged ones are set aside with a warning; RuntimeError if all are, or one is of another model.
    """
    folder = run.folder / "checkpoint"
    run.attempt(f"cannot clean {folder}", lambda: remove_unfinished(run, folder))
    found = run.gather_objects(checkpoints(run))[0]
    if run.args.resume and not found:
        raise SystemExit(f"--resume: no checkpoint in {folder}")
    path = newest_intact(run, found)
    progress = Progress()
    if path is None:
        seed_everything(run.args.seed, 0, run.rank)
    else:
        state = run.attempt(f"cannot resume from {path}", lambda: load(path, model, opt))
        progress = Progress(state["step"], state["loader"], state["extra"])
        run.totals = state["totals"]
        if state["world"] == run.world:
            rng = torch.load(path / f"rng-{run.rank}.pt", weights_only=True)
            set_rng_states(rng, run.device)
        else:  # other ranks than those that saved
            seed_everything(run.args.seed, progress.step, run.rank)
        run.say(f"resumed from {path}{changed_flags(run, state['args'])}; --fresh starts over")
    run.attempt("cannot shorten metrics.jsonl", lambda: shorten_metrics(run, progress.step))
    run.clock = time.perf_counter()
    return progress


def remove_unfinished(run: Run, folder: Path):
    if run.main:
        for tmp in folder.glob("*.tmp"):  # a save that never ended
            shutil.rmtree(tmp)


def newest_intact(run: Run, found: list[Path]) -> Path | None:
    """The newest checkpoint that is what was written; damaged newer ones are set aside."""
    damaged = []
    for path in reversed(found):
        wrong = damage(run, path)
        if wrong is None:
            run.attempt(f"cannot set {damaged} aside", lambda: set_aside(run, damaged))
            return path
        run.say(f"WARNING: {path} is damaged: {wrong}; trying the one before it")
        damaged.append(path)
    if damaged:
        folder = run.folder / "checkpoint"
        raise RuntimeError(f"every checkpoint in {folder} is damaged; --fresh starts over")
    return None


def set_aside(run: Run, damaged: list[Path]):
    if run.main:
        for path in damaged:
            aside = path.with_name("damaged-" + path.name)
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def damage(run: Run, folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, None if nothing; each rank hashes its share."""

    def check():
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
            for name in sorted(manifest)[run.rank :: run.world]:
                if sha256(folder / name) != manifest[name]:
                    return f"{name} is not what was written (sha256 differs)"
        except (OSError, ValueError, AttributeError) as e:
            return f"{type(e).__name__}: {e}"

    return next((wrong for wrong in run.gather_objects(check()) if wrong), None)


def load(path: Path, model, opt) -> dict:
    """Reads a checkpoint in place, after its names, shapes and dtypes were compared.

    DCP itself would cast silently, and skip what it is not asked for.
    """
    wanted = tensors_of(model, opt)
    ours = {f"model.{name}": t for name, t in wanted["model"].items()}
    for name, states in wanted["optim"].items():
        ours |= {f"optim.{name}.{key}": t for key, t in states.items()}
    theirs = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    odd = sorted(set(ours) ^ set(theirs))
    if not odd:
        for name, t in ours.items():
            stored = theirs[name]
            if (tuple(stored.size), stored.properties.dtype) != (tuple(t.shape), t.dtype):
                odd.append(name)
    if odd:
        raise ValueError(
            f"it was made with another model or other trained parts, e.g. {odd[0]} "
            f"({len(odd)} of {len(ours)} differ); --fresh starts over"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(wanted, checkpoint_id=path)
    return json.loads((path / "state.json").read_text())


def changed_flags(run: Run, before: dict) -> str:
    """What was typed otherwise when the checkpoint was written, for the line that says so."""
    now = json.loads(json.dumps(vars(run.args), default=str))
    changed = ""
    for key, value in before.items():
        if key in now and key not in ("resume", "fresh") and value != now[key]:
            changed += f"; --{key.replace('_', '-')} was {value}"
    return changed


def shorten_metrics(run: Run, step: int):
    """Rank 0: drops from metrics.jsonl what will be written again, and a line cut off by a kill."""
    path = run.folder / "metrics.jsonl"
    if not run.main or not path.exists():
        return
    keep = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if line.endswith(b"\n") and json.loads(line).get("step", -1) < step:
                keep.append(line)
        except ValueError:
            continue
    tmp = path.with_name("metrics.jsonl.tmp")
    tmp.write_bytes(b"".join(keep))
    fsync(tmp)
    os.replace(tmp, path)


# ----------------------------------------------------------------------------------------------
# model folders


def export(run: Run, model, processor):
    """All ranks: leaves run.folder/model in the official layout, for the next stage and others."""
    write_model(run, full_state(run, model), model.config, processor)


def write_model(run: Run, state: dict, config, processor):
    """All ranks: leaves run.folder/model of a full_state, its config and processor."""

    def write(folder: Path):
        save_weights(state, config.to_json(), folder)
        processor.save_pretrained(folder)

    replace_folder(run, run.folder / "model", write)


def replace_folder(run: Run, folder: Path, write):
    """All ranks: write(tmp) on rank 0, flushed, then renamed over `folder`."""
    tmp = folder.with_name(folder.name + ".tmp")
    old = folder.with_name(folder.name + ".old")

    def work():
        if not run.main:
            return
        clear_folder(run, tmp)
        write(tmp)
        for path in tmp.iterdir():
            fsync(path)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.rename(folder, old)
        os.rename(tmp, folder)
        fsync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)

    run.attempt(f"cannot export to {folder}", work)


def fingerprint(folder: Path) -> str:
    """Tells a model folder's weights from others of the same name: a hash of names, sizes, samples.

    Of each file a thousand pieces of 4 kB, evenly spread, so that every large tensor is in it; all
    of a small file.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with open(path, "rb") as f:
            for start in range(0, size, max(4096, size // 1000)):
                f.seek(start)
                digest.update(f.read(4096))
    return digest.hexdigest()[:16]
