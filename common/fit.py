"""How a training run holds its model: what fits on the card, and what is fastest of that.

    model = KeyeVL.shapes(folder)                  no memory yet
    keep = fit(run, model, ("vit", "projector", "decoder"), pack=8192)
    model = shard(model, run).load(folder)
    opt = make_optimizer(model, rates, **keep)
"""

import gc
import math
import os
from contextlib import suppress
from pathlib import Path

import torch
from torch.utils._triton import has_triton

from common.memory import again_by_patches, choose, counted, job_of, most_packs, table
from common.packing import packing
from common.run import Run, released
from model import PRESETS, SCALE, Config, compile_blocks

EVERYTHING = ("vit", "projector", "decoder")  # that can learn

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


def fit(run: Run, model, learns: tuple[str, ...], pack: int, copies: float = 0) -> dict:
    """Gives a model on "meta" its dtypes, and its blocks their way through the backward pass.

    learns: the parts of it that are trained; pack: tokens of a micro-batch; copies: of the model in
    bf16, that must fit on the card beside it. On CUDA the device's memory decides (see
    common/memory.py), and the arithmetic is said; elsewhere all is in fp32, and released sizes
    recompute all blocks. Returns what make_optimizer takes of the choice. SystemExit where it does
    not fit.
    """
    say_other_shape(run, model.config)
    compiled = wants_compile(run)
    if compiled:
        compile_blocks(model.vit, model.decoder)
    refuse_beyond_memory(run, model.config, learns, copies)
    if run.device.type != "cuda":
        if released(run.args.size):
            model.decoder.recompute = model.config.num_hidden_layers
            model.vit.recompute = model.config.vision.num_hidden_layers
        model.stays_gathered = not released(run.args.size)
        return {}

    beside = copies * 2 * sum(p.numel() for p in model.parameters())
    capacity = capacity_of(run) - beside
    plan = choose(model.config, learns, pack, run.world, capacity, compiled=compiled)
    run.say(table(plan))
    if not plan.fits:
        raise SystemExit(
            f"{run.stage} does not fit, even with bf16 weights and all blocks recomputed: take "
            "more cards (torchrun), or another --size; pretrain.py --dry-run shows what fits"
        )
    if plan.recipe == "bf16" and run.dtype != torch.bfloat16:
        raise SystemExit(f"{run.stage} fits with weights in bf16 alone, not with --dtype fp32")
    model.decoder.recompute = plan.recompute_decoder
    model.vit.recompute = plan.recompute_vit
    model.planned_tokens = pack
    model.recompute = again_by_patches(plan)
    model.stays_gathered = plan.job.gathered
    if plan.recipe == "bf16":
        model.to(torch.bfloat16)
    elif released(run.args.size) and run.dtype == torch.bfloat16:
        # Frozen parts lose nothing: released weights are in bf16, as they are computed with.
        for name, part in model.named_children():
            if name not in learns and not (name == "lm_head" and "decoder" in learns):
                part.to(torch.bfloat16)
    moments = torch.float32 if plan.recipe == "fp32" else torch.bfloat16
    return {"moments": moments, "compiled": compiled}


def say_other_shape(run: Run, cfg: Config):
    """A line where the model is not of --size's shape: its steps, rates and packs are those."""
    size = run.args.size
    shapes = [(c.num_hidden_layers, c.hidden_size) for c in (cfg, PRESETS[size])]
    if shapes[0] != shapes[1]:
        own, expected = (f"{layers} layers of {width}" for layers, width in shapes)
        run.say(
            f"the model has {own}, --size {size} would have {expected}: its shape stays, and the "
            f"plan is that of {size}"
        )


def refuse_beyond_memory(
    run: Run, cfg: Config, learns: tuple[str, ...] = EVERYTHING, copies: float = 0
):
    """Without CUDA, on all ranks: SystemExit where this machine cannot even hold what is trained.

    The kernel would kill the run without a word. learns, copies: as fit's. Counted is what there
    is at least: weights, gradients and what the optimizer keeps, all in fp32, but no activations.
    """
    if run.device.type == "cuda":
        return  # fit plans for the cards
    trained, frozen = counted(job_of(cfg, learns, 0, run.world, compiled=False))
    # behind a weight its gradient and two moments; Muon, which most matrices have, keeps one
    behind = 8 if SCALE[run.args.size].muon else 12
    mine = (4 * (trained + frozen) + behind * trained) / run.world
    mine += copies * run.dtype.itemsize * (trained + frozen)
    needed = mine * int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # by the ranks of this machine
    room = min(row[0] for row in run.gather([free_memory()]))
    if needed > room:
        raise SystemExit(
            f"{run.stage} does not fit on {run.device}: weights, gradients and optimizer take at "
            f"least {needed / 1e9:,.1f} GB of this machine's memory, and {room / 1e9:,.1f} GB are "
            "left: take a GPU, or a smaller --size"
        )


def free_memory() -> float:
    """Bytes that this machine can give to a process: inf where it does not say how many."""
    rooms = [math.inf]
    with suppress(OSError):
        for line in (PROC / "meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                rooms.append(1024 * int(line.split()[1]))
    with suppress(OSError):
        for line in (PROC / "self" / "cgroup").read_text().splitlines():
            rooms += limits_of_group(line)
    return min(rooms)


def limits_of_group(line: str) -> list[int]:
    """Bytes that a control group and those around it may have; line: of /proc/self/cgroup.

    "0::/job/7" in version 2; in version 1 "4:memory:/job/7", and other lines for what is no memory.
    """
    _, kinds, path = line.split(":", 2)
    root, name = CGROUPS, "memory.max"
    if kinds:
        root, name = CGROUPS / "memory", "memory.limit_in_bytes"
        if "memory" not in kinds.split(","):
            return []
    limits = []
    own = Path(path.lstrip("/"))
    for group in [own, *own.parents]:
        # a container sees its own group as the root, and not those that the path names
        with suppress(OSError, ValueError):  # "max": there is no limit
            limits.append(int((root / group / name).read_text()))
    return limits


def packs_at_once(run: Run, cfg: Config, learns: tuple[str, ...]) -> int:
    """How many of this rank's packs of a step go through the model as one. learns: as fit's."""
    tokens, packs = packing(run)
    packs = -(-packs // run.world)
    if run.device.type != "cuda" or packs == 1:
        return 1
    return most_packs(cfg, learns, tokens, packs, run.world, capacity_of(run), wants_compile(run))


def capacity_of(run: Run) -> float:
    """Bytes of a card that a model can have: on all ranks the same, so that all choose alike."""
    total = torch.cuda.get_device_properties(run.device).total_memory
    if run.args.gpu_memory:
        torch.cuda.set_per_process_memory_fraction(min(1.0, run.args.gpu_memory * 1e9 / total))
        total = min(total, run.args.gpu_memory * 1e9)
    gc.collect()  # a sharded model that nobody needs any more is part of cycles
    held = torch.cuda.memory_allocated(run.device)  # by what this process holds already
    return min(row[0] for row in run.gather([total - held]))


def wants_compile(run: Run) -> bool:
    if run.args.compile == "auto" and not (run.device.type == "cuda" and has_triton()):
        return False
    return compiling_pays(run.args)


def compiling_pays(args) -> bool:
    """ours: at toy and tiny sizes a run would be over before the compilation has paid."""
    return args.compile == "on" or (args.compile == "auto" and args.size not in ("toy", "tiny"))
