"""What the training scripts share: processes, FSDP2, AdamW, schedule, checkpoint and resume, metrics and progress.

Every script keeps its own visible loop:

    run = trainer.start(args, stage="2")
    model = trainer.shard(model, run)
    opt = trainer.adamw(model, {"vit": 1e-5, "projector": 1e-4, "decoder": 1e-5})
    begin = trainer.resume(run, model, opt)
    for step, (batches, info) in zip(range(begin["step"], steps), Loader(..., state=begin["loader"])):
        trainer.set_lr(opt, trainer.schedule(step, steps, warmup=50))
        loss, n = trainer.accumulate(run, model, batches)
        norm = trainer.clip(model, 1.0)
        opt.step(); opt.zero_grad(set_to_none=True)
        run.log(step, steps, loss=loss, norm=norm, lr=trainer.lr(opt), tokens=..., visual_tokens=..., flops=...)
        trainer.save_if_due(run, step + 1, steps, model, opt, info["state"])
    trainer.export(run, trainer.full_state(run, model), model.config, processor, run.folder / "model")
    run.close()

One process needs nothing; `torchrun --nproc_per_node=N` shards parameters, gradients and AdamW state over N (FSDP2).
On CPU the Makefile sets GOMP_SPINCOUNT=100000 before python starts (libgomp reads it once, when torch is imported): waiting
threads that spin on starve a shared machine, and OMP_WAIT_POLICY=passive, which never spins, halves the speed of an idle one.
"""
import argparse, atexit, datetime, hashlib, json, math, os, random, resource, shutil, signal, sys, time, warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException: `except Exception` misses it
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from tqdm import tqdm

from kernels import attention_path

SIZES = ["toy", "tiny", "small", "0.6b", "1.7b", "4b", "8b"]
MOMENTUM = 0.9  # of Muon; ours: the usual 0.95 learns a little later in runs this short
KEEP = 2  # checkpoints kept: the newest, and one to fall back on
# Dense bf16 peaks of the data sheets, FLOP/s; the first name contained in the device's name counts.
PEAKS = {"B200": 2250e12, "H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12,
         "L40S": 362e12, "RTX 4090": 165e12, "RTX 3090": 71e12}


def arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds the flags every training script has; --init*, --steps and --workers are for the script to act on."""
    def at_least(low):
        def number(text):
            if int(text) < low:
                raise argparse.ArgumentTypeError(f"must be at least {low}, got {text}")
            return int(text)
        return number
    add = parser.add_argument
    add("--size", default="toy", choices=SIZES, help="the one dial: every default follows from it")
    add("--out", default="runs", help="run folders go to OUT/SIZE/STAGE")
    add("--init", help="folder in the official layout to start from (default: what the stage before left)")
    add("--init-llm", help="Qwen3 folder for the decoder")
    add("--init-vit", help="SigLIP folder for the ViT")
    add("--seed", type=at_least(0), default=0)
    add("--steps", type=at_least(1), help="optimizer steps (default: by size)")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="insist on a checkpoint (default: resume if there is one)")
    again.add_argument("--fresh", action="store_true", help="remove this stage's checkpoints and metrics, start over")
    add("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    add("--dtype", default="auto", choices=["auto", "fp32", "bf16"], help="of the computation; weights stay fp32")
    add("--save-every", type=at_least(1), default=100, help="steps between checkpoints")
    add("--workers", type=at_least(0), help="decoding processes per rank (default: 1, with a GPU up to 8)")
    add("--threads", type=at_least(1), help="CPU threads per rank (default: OMP_NUM_THREADS, else all cores, with a GPU up to 4)")
    return parser


def phase_arguments(doc: str) -> argparse.ArgumentParser:
    """The parser of a script after pre-training."""
    parser = arguments(argparse.ArgumentParser(description=doc.split("\n")[0]))
    parser.add_argument("--data", help="folder with train/*.jsonl and heldout/*.jsonl (default: data/SIZE)")
    parser.add_argument("--eval-limit", type=int, default=40, help="held-out questions per task after the phase")
    return parser


def judge_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    add = parser.add_argument
    add("--judge", action="append", metavar="URL", help="OpenAI-compatible address, .../v1, that scores what rules cannot; "
        "may be repeated (default: rules alone). A key is read from JUDGE_KEY")
    add("--judge-model", default="", help="the judge's model")
    return parser


def before(args, stage: str) -> Path:
    """Folder of the model to start from: --init, or what `stage` left. SystemExit where it is missing."""
    folder = Path(args.init or Path(args.out) / args.size / stage / "model")
    if not (folder / "config.json").exists():
        raise SystemExit(f"{folder} holds no model; run {stage} first, or name one with --init")
    return folder


def finished(run: "Run") -> bool:
    """Whether this phase has ended before (and says so). --fresh removes all that an earlier run of it left, data too, so
    that a run killed before its first checkpoint goes on with nothing old."""
    done = run.folder / "score.json"

    def clean():
        if run.args.fresh and run.main:
            for name in ("score.json", "metrics.jsonl", "data.done"):
                (run.folder / name).unlink(missing_ok=True)
            for name in ("checkpoint", "data"):
                shutil.rmtree(run.folder / name, ignore_errors=True)
    run.attempt(f"cannot clean {run.folder}", clean)
    if done.exists():
        run.say(f"{run.stage} is done: {run.folder} (--fresh trains it again)")
        run.close()
    return done.exists()


def finish(run: "Run", score):
    """score.json marks a phase as done; it is written last."""
    if run.main:
        (run.folder / "score.json.tmp").write_text(json.dumps(score, indent=1) + "\n")
        (run.folder / "score.json.tmp").rename(run.folder / "score.json")
    run.close()
    run.barrier()


def share(plan: dict, world: int) -> tuple[int, int]:
    """(tokens of a pack, packs of a step) on `world` ranks: as planned where the packs can be dealt out evenly, else more
    and smaller ones, so that a step has the same tokens. Such a run goes on with other ranks only where both deal alike."""
    packs = -(-plan["packs"] // world) * world
    return plan["pack"] * plan["packs"] // packs, packs


def start(args, stage: str) -> "Run":
    """Joins the processes, picks the device, seeds every generator alike on all ranks (so that fresh weights agree),
    and says all that in the first line."""
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind = best if args.device == "auto" else args.device
    if kind == "cuda" and local >= torch.cuda.device_count():
        raise SystemExit(f"--device cuda: rank {rank} needs GPU {local}, this machine has {torch.cuda.device_count()}")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise SystemExit("--device mps: this machine or this build of torch has no MPS")
    if kind == "mps" and (args.dtype == "bf16" or "RANK" in os.environ):
        raise SystemExit("MPS runs in fp32 in one process; drop --dtype bf16 or torchrun, or take --device cpu")
    device = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    bf16 = args.dtype == "bf16" or args.dtype == "auto" and kind == "cuda" and torch.cuda.is_bf16_supported()
    if kind == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.reset_peak_memory_stats()
    if kind == "cpu":  # CPU index_put adds with atomics unless asked not to; then two equal runs differ in the last bit
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    share = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    # beside a GPU the CPU has small work only, which many threads make slower
    torch.set_num_threads(args.threads or int(os.environ.get("OMP_NUM_THREADS", min(share, 4) if kind == "cuda" else share)))
    if args.workers is None:  # a GPU outruns one process that decodes
        args.workers = min(8, max(1, share - 1)) if kind == "cuda" else 1
    if "RANK" in os.environ and not dist.is_initialized():  # torchrun, also with one process
        # gloo next to NCCL: counts and objects travel between CPUs without a stop of the GPU
        # timeout: the others wait while rank 0 scores a model or writes a phase's data
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
                                timeout=datetime.timedelta(hours=12), device_id=device if kind == "cuda" else None)
        atexit.register(end_processes)
    seed_everything(args.seed)
    run = Run(args, stage, device, torch.bfloat16 if bf16 else torch.float32, rank, world)
    name = torch.cuda.get_device_name(device) if kind == "cuda" else kind
    datasheet = next((v for k, v in PEAKS.items() if k in name), None) if bf16 else None
    peak = datasheet or measured_peak(run)
    run.peak = sum(row[0] for row in run.gather([peak]))
    run.say(f"{stage}: {device} ({name}), {'bf16' if bf16 else 'fp32'}, world {world}, "
            f"{torch.get_num_threads()} threads, attention: {attention_path(device, run.dtype)}, "
            f"torch {torch.__version__}, peak {run.peak / 1e12:.3g} TFLOP/s "
            f"({'datasheet' if datasheet else 'measured'}), folder {run.folder}")
    return run


def end_processes():
    """At exit. gloo's threads need the interpreter once more to drop the tensors of the last collective; when it is
    gone before, they abort the process after all work is done."""
    dist.destroy_process_group()
    time.sleep(0.3)


def measured_peak(run) -> float:
    """FLOP/s of the best of three matmuls on this rank's device: what MFU is measured against without a data sheet."""
    n, best = (8192 if run.device.type == "cuda" else 1024), math.inf
    a = torch.ones(n, n, device=run.device, dtype=run.dtype)
    for _ in range(3):
        begin = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - begin)
    return 2 * n ** 3 / best


def seed_everything(seed: int, *more: int):
    """Seeds torch (all devices), numpy and python from a tuple of numbers."""
    mixed = int(np.random.SeedSequence([seed, *more]).generate_state(1)[0])
    torch.manual_seed(mixed)
    np.random.seed(mixed)
    random.seed(mixed)


class Run:
    """This process among its peers, the run's folder, its metrics, and the wish to stop. Fields: device, dtype, rank,
    world, main (rank 0), folder, peak (FLOP/s of all ranks), meters (totals), stop (0, or the signal's number)."""

    def __init__(self, args, stage, device, dtype, rank, world):
        self.args, self.stage, self.device, self.dtype, self.rank, self.world = args, stage, device, dtype, rank, world
        self.main, self.stop, self.signal, self.peak = rank == 0, 0, 0, 1.0
        self.folder = Path(args.out) / args.size / stage
        self.folder.mkdir(parents=True, exist_ok=True)
        self.meters = {"tokens": 0, "visual_tokens": 0, "seconds": 0.0}
        self.bar, self.clock, owner = None, time.perf_counter(), os.getpid()

        def wish(number, frame):
            if os.getpid() != owner:  # a forked loader worker: it ends with its parent, or when told to
                if number == signal.SIGTERM:
                    os._exit(128 + number)
            elif self.signal and number == signal.SIGINT and world == 1:
                raise KeyboardInterrupt  # the second Ctrl-C does not wait (torchrun itself sends each signal twice)
            else:
                self.signal = number
        self.handlers = {s: signal.signal(s, wish) for s in (signal.SIGINT, signal.SIGTERM)}

    def say(self, text: str):
        if self.main:
            tqdm.write(text, file=sys.stderr)

    def gather(self, values) -> list[list[float]]:
        """One list of floats per rank, in rank order; also a barrier."""
        if not dist.is_initialized():
            return [[float(v) for v in values]]
        mine = torch.tensor([float(v) for v in values], dtype=torch.float64)
        rows = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(rows, mine)  # CPU tensors: gloo
        return [row.tolist() for row in rows]

    def gather_objects(self, thing) -> list:
        things = [thing] * self.world
        if dist.is_initialized():
            dist.all_gather_object(things, thing)
        return things

    def barrier(self):
        self.gather([0])  # of something: gloo does not wait for empty tensors

    def sum(self, x):
        """Sum over ranks of a number or a tensor (a new one)."""
        if not isinstance(x, torch.Tensor):
            return sum(row[0] for row in self.gather([x]))
        x = x.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(x)
        return x

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def to(self, batch: dict) -> dict:
        """The batch on the device; segments and grids stay on the host, where the model reads them."""
        stay, pin = ("segments", "grids"), self.device.type == "cuda"
        return {k: v if k in stay or not isinstance(v, torch.Tensor) else
                (v.pin_memory() if pin and v.device.type == "cpu" else v).to(self.device, non_blocking=pin)
                for k, v in batch.items()}

    def attempt(self, doing: str, work):
        """Runs work() on every rank; when it fails on any, all ranks raise the same RuntimeError instead of hanging."""
        result = error = None
        try:
            result = work()
        except (Exception, CheckpointException) as e:
            causes = [pair[0] for pair in e.failures.values()] if isinstance(e, CheckpointException) else [e]
            error = "; ".join(f"{type(c).__name__}: {c}" for c in causes[:1])
        errors = [f"rank {i}: {e}" for i, e in enumerate(self.gather_objects(error)) if e]
        if errors:
            raise RuntimeError(f"{doing}: {' | '.join(errors)}")
        return result

    def write(self, record: dict):
        """One line in metrics.jsonl (rank 0). A record without "step" stays when a resume drops repeated steps."""
        if self.main:
            with open(self.folder / "metrics.jsonl", "a") as f:  # opened per line: closed means flushed
                f.write(json.dumps(record) + "\n")

    def log(self, step: int, steps: int, tokens=0, visual_tokens=0, flops=0.0, **values):
        """All ranks, once a step (0-based). tokens, visual_tokens, flops: of this rank in this step, FLOPs without
        recomputation; values: global numbers (loss, norm, lr ...). Shows the bar, appends the line, agrees on `stop`.
        Raises FloatingPointError on all ranks when loss or norm is not finite, so that no such step is saved."""
        values = {k: float(v) for k, v in values.items()}  # waits for the device, so the clock is honest
        bad = [k for k in ("loss", "norm") if not math.isfinite(values.get(k, 0.0))]
        if bad:
            raise FloatingPointError(f"step {step}: {bad[0]} is {values[bad[0]]}; the last checkpoint is good, "
                                     f"look at the data or lower the learning rate")
        rows = self.gather([tokens, visual_tokens, flops, peak_memory(self.device), self.signal])
        seconds, self.clock = time.perf_counter() - self.clock, time.perf_counter()
        tokens, visual_tokens, flops = (sum(column) for column in list(zip(*rows))[:3])
        memory, self.stop = max(row[3] for row in rows), int(max(row[4] for row in rows))
        for k, v in (("tokens", int(tokens)), ("visual_tokens", int(visual_tokens)), ("seconds", seconds)):
            self.meters[k] += v
        if self.bar is None:
            self.bar = tqdm(total=steps, initial=step, desc=self.stage, unit="step", disable=not self.main,
                            dynamic_ncols=True, mininterval=0.2 if sys.stderr.isatty() else 10)
            self.pace = [0, 0.0]  # steps and seconds of this process, for the time left
        self.pace = [self.pace[0] + 1, self.pace[1] + seconds]
        rate = {"tokens_per_s": tokens / seconds, "visual_tokens_per_s": visual_tokens / seconds,
                "mfu": flops / seconds / self.peak, "peak_gb": memory / 1e9,
                "left_s": self.pace[1] / self.pace[0] * (steps - step - 1)}
        self.bar.set_postfix_str(
            f"loss {values.get('loss', math.nan):.4f}, {rate['tokens_per_s']:,.0f} tok/s, "
            f"{rate['visual_tokens_per_s']:,.0f} visual/s, mfu {rate['mfu']:.1%}, {rate['peak_gb']:.2f} GB",
            refresh=False)
        self.bar.update()
        self.write({"step": step, **values, "tokens": int(tokens), "visual_tokens": int(visual_tokens),
                    "seconds": seconds, **rate})

    def leave(self, step: int):
        """After a signal and the save it caused: closes, says how to go on, exits with the shell's code for it."""
        self.close()
        self.say(f"{signal.Signals(self.stop).name}: stopped after {step} steps, saved in "
                 f"{self.folder / 'checkpoint'}; the same command goes on from there")
        raise SystemExit(128 + self.stop)

    def close(self):
        """Ends the bar and gives the signals back."""
        if self.bar is not None:
            self.bar.close()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


def peak_memory(device) -> int:
    """Peak bytes: of tensors on CUDA, else resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---------------------------------------------------------------- model and optimizer

def shard(model: nn.Module, run: Run) -> nn.Module:
    """The model on its device(s). Under torchrun: FSDP2, every block of a ModuleList named `layers` by itself, then the
    rest; rank 0's weights count. Parameters and gradients stay fp32, computation is in run.dtype. Call it before adamw;
    afterwards only forward, loss, logits and logprobs may be called from outside (each gathers the parameters it needs)."""
    if not dist.is_initialized():
        return model.to(run.device)
    if not any(t.is_meta for t in model.parameters()):
        for t in [*model.parameters(), *model.buffers()]:
            dist.broadcast(t.data, 0)
    # CUDA gathers weights in bf16. Inputs are not cast: rotary tables in fp32 must stay fp32; autocast does the rest.
    # On CPU autocast does it all, as in one process: its norms refuse bf16 weights on fp32 inputs.
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False) \
        if run.dtype == torch.bfloat16 and run.device.type == "cuda" else MixedPrecisionPolicy()
    mesh = init_device_mesh(run.device.type, (run.world,))
    for name, blocks in list(model.named_modules()):
        if isinstance(blocks, nn.ModuleList) and name.split(".")[-1] == "layers":
            for block in blocks:
                fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # sums, no means: the loss is divided by the global token count already
            module.set_force_sum_reduction_for_comms(True)  # gloo cannot pre-multiply
            module.set_gradient_divide_factor(1.0)
            if hasattr(module, "set_reduce_scatter_unused_params"):  # torch 2.13: a part unused on one rank only
                module.set_reduce_scatter_unused_params(True)
    for method in ("loss", "logits", "logprobs"):
        if hasattr(model, method):
            register_fsdp_forward_method(model, method)
    return model


def adamw(model: nn.Module, groups: dict[str, float], weight_decay=0.01, betas=(0.9, 0.95), eps=1e-8, muon=0.0):
    """AdamW, and with muon > 0 Muon for matrices. groups: name prefix -> peak learning rate; the longest prefix that fits
    a parameter counts, lm_head goes with decoder. A parameter without a group or with rate 0 is frozen. Call after shard,
    before the first forward. Weight decay on matrices only; not on norms, biases, embeddings (ours: the row of a rare
    word would only shrink). muon: learning rate of the matrices, but lm_head, as a multiple of their group's."""
    groups = {**({"lm_head": groups["decoder"]} if "decoder" in groups else {}), **groups}
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    chosen = {}  # (prefix, is a matrix) -> parameters
    for name, p in model.named_parameters():
        fits = [prefix for prefix in groups if name == prefix or name.startswith(prefix + ".")]
        prefix = max(fits, key=len, default=None)
        p.requires_grad_(prefix is not None and groups[prefix] > 0)
        if p.requires_grad:
            matrix = p.ndim == 2 and id(p) not in tables and "position_embedding" not in name
            chosen.setdefault((prefix, matrix), []).append(p)
    unused = [k for k, rate in groups.items() if rate > 0 and k != "lm_head" and not any(k == c for c, _ in chosen)]
    if unused or not chosen:
        raise ValueError(f"adamw: no parameter named {unused or list(groups)}; the model has "
                         f"{sorted({n.split('.')[0] for n, _ in model.named_parameters()})}")
    opt = Muon([{"params": ps, "name": prefix, "weight_decay": weight_decay if matrix else 0.0,
                 "muon": (by_muon := bool(muon) and matrix and prefix != "lm_head"),
                 "lr": (rate := groups[prefix] * (muon if by_muon else 1)), "base_lr": rate}
                for (prefix, matrix), ps in chosen.items()], betas=betas, eps=eps, fused=True)
    for group in opt.param_groups:  # state from the start: a checkpoint always holds the same keys
        for p in group["params"]:
            opt.state[p] = {"momentum": torch.zeros_like(p)} if group["muon"] else {
                "step": torch.zeros((), dtype=torch.float32, device=p.device),
                "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return opt


class Muon(torch.optim.AdamW):
    """AdamW, but groups with muon=True (matrices) step by Muon (K. Jordan, kellerjordan.github.io/posts/muon): Nesterov
    momentum, then all singular values of the step are set to about one, so that directions with small gradients learn as
    fast as the strong ones. Scaled by 0.2 sqrt(longer side), it is as large as AdamW's step (arXiv 2502.16982, 2.2)."""

    @torch.no_grad()
    def step(self):
        groups = self.param_groups
        self.param_groups = [g for g in groups if not g["muon"]]
        try:
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            shapes = {}  # equal shapes in one batched product: a small model's step is many small matrices
            for p in group["params"] if group["muon"] else ():
                if p.grad is not None:
                    momentum = self.state[p]["momentum"].lerp_(p.grad, 1 - MOMENTUM)
                    shapes.setdefault(p.shape, []).append((p, whole(p.grad.lerp(momentum, MOMENTUM))))
            for shape, pairs in shapes.items():
                updates = orthogonal(torch.stack([g for _, g in pairs])) * (0.2 * max(shape) ** 0.5)
                for (p, _), update in zip(pairs, updates):
                    if isinstance(p, DTensor):  # every rank has computed the same update and keeps its own rows
                        update = distribute_tensor(update, p.device_mesh, p.placements, src_data_rank=None)
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])


def whole(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


def orthogonal(x):
    """x (B, M, N) -> the nearest matrices whose singular values all lie near 1 (0.7 to 1.2), by five Newton-Schulz steps."""
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x  # coefficients from the post above
    return x.mT if tall else x


def schedule(step: int, steps: int, warmup: int = 0, kind: str = "cosine", floor: float = 0.1, cooldown: float = 0.2):
    """Factor in [0, 1] on the peak learning rate of step (0-based): linear warm-up, then by kind: "cosine" or "linear"
    down to floor at the last step, "wsd" (1 until the last `cooldown` share of the steps, then linear), "constant"."""
    if step < warmup:
        return (step + 1) / warmup
    first = max(warmup, int(steps * (1 - cooldown))) if kind == "wsd" else warmup
    x = min(1.0, max(0, step - first) / max(1, steps - 1 - first))  # 0 where the way down starts, 1 at the last step
    if kind == "cosine":
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * x))
    if kind in ("linear", "wsd"):
        return 1 - (1 - floor) * x
    if kind == "constant":
        return 1.0
    raise ValueError(f"schedule: kind must be cosine, linear, wsd or constant, not {kind!r}")


def set_lr(opt, factor: float):
    for group in opt.param_groups:
        group["lr"] = group["base_lr"] * factor


def lr(opt) -> float:
    """The highest learning rate now in use, for the log."""
    return max(group["lr"] for group in opt.param_groups)


def accumulate(run: Run, model: nn.Module, batches: list[dict]):
    """Forward and backward of one step: this rank's packed micro-batches (CPU). Every target token of the step, on any
    rank in any micro-batch, weighs the same. Returns (mean loss over all ranks, 0-d fp32 on device; their number)."""
    counts = run.gather([sum(int((b["labels"] != -100).sum()) for b in batches), len(batches)])
    n = int(sum(row[0] for row in counts))
    if n == 0 or min(row[1] for row in counts) == 0:
        raise ValueError(f"accumulate: (target tokens, micro-batches) per rank are {counts}: nothing to learn from")
    # All ranks run equally many forwards, or FSDP's gathers would wait forever: repeat the last one without labels.
    blank = {**batches[-1], "labels": torch.full_like(batches[-1]["labels"], -100)}
    batches = batches + [blank] * (int(max(row[1] for row in counts)) - len(batches))
    total = torch.zeros((), device=run.device)
    for i, batch in enumerate(batches):
        with run.autocast():
            loss_sum, _ = model.loss(run.to(batch))
        loss = loss_sum.float() / n
        backward(model, loss, last=i == len(batches) - 1)
        total += loss.detach()
    return run.sum(total), n


def per_sample(values: torch.Tensor, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """values (N,) at a pack's labels that are not -100 -> their sums and their number for each sample, (S,) each."""
    segments, labels = batch["segments"].long(), batch["labels"]
    owner = torch.repeat_interleave(torch.arange(len(segments) - 1), segments.diff()).to(values.device)[labels != -100]
    zeros = values.new_zeros(len(segments) - 1)
    return zeros.index_add(0, owner, values), zeros.index_add(0, owner, torch.ones_like(values))


def packs(samples: list[dict], room: int) -> list[list[dict]]:
    """Samples in their order, as many together as `room` tokens hold; a longer one alone."""
    out, used = [], room + 1
    for sample in samples:
        if used + len(sample["tokens"]) > room:
            out.append([])
            used = 0
        out[-1].append(sample)
        used += len(sample["tokens"])
    return out


def even_packs(run: Run, samples: list[dict], room: int, blank: list[dict]) -> list[list[dict]]:
    """packs, with `blank` behind them until all ranks have equally many: FSDP's gathers need every rank each time."""
    groups = packs(samples, room)
    most = int(max(row[0] for row in run.gather([len(groups)])))
    return groups + [blank] * (most - len(groups))


def backward(model: nn.Module, loss: torch.Tensor, last: bool):
    """Adds the loss's gradients; ranks reduce them once a step, after its last micro-batch."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    loss.backward()


def clip(model: nn.Module, max_norm: float) -> torch.Tensor:
    """Scales all gradients so that their global norm is at most max_norm; returns the norm before (0-d)."""
    norm = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], max_norm)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


# ---------------------------------------------------------------- checkpoint and resume

def tensors(model, opt) -> dict:
    """What a checkpoint holds, by parameter name; sharded tensors stay sharded, so any number of ranks can read it."""
    return {"model": dict(model.state_dict()),
            "optim": {n: opt.state[p] for n, p in model.named_parameters() if p in opt.state}}


def rng_states(device) -> dict:
    name, keys, *rest = np.random.get_state()
    state = {"torch": torch.get_rng_state(), "python": random.getstate(),
             "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest)}
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state()
    return state


def set_rng_states(state, device):
    name, keys, *rest = state["numpy"]
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    if device.type in state:
        torch.get_device_module(device).set_rng_state(state[device.type])


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
    """Complete checkpoints, oldest first. All ranks see the same folder (a shared one on several nodes)."""
    found = [p for p in (run.folder / "checkpoint").glob("step-*") if p.name[5:].isdecimal()]
    return sorted(found, key=lambda p: int(p.name[5:]))


def save(run: Run, step: int, model, opt, loader_state=None, **extra):
    """All ranks: writes checkpoint/step-N after N steps: model, AdamW, RNG of each rank, loader_state and extra (JSON).
    Written as step-N.tmp with a sha256 of every file, flushed to disk, then renamed: a crash leaves the old one valid.
    Raises RuntimeError on all ranks when any of them cannot write."""
    begin, final = time.perf_counter(), run.folder / "checkpoint" / f"step-{step}"
    tmp, doing = final.with_name(final.name + ".tmp"), f"cannot save {final} (the checkpoint before it stays valid)"

    def clear():
        if run.main:
            shutil.rmtree(tmp, ignore_errors=True)
            tmp.mkdir(parents=True)

    def write():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one process without a process group is intended
            dcp.save(tensors(model, opt), checkpoint_id=tmp)
        torch.save(rng_states(run.device), tmp / f"rng-{run.rank}.pt")
        if run.main:
            (tmp / "state.json").write_text(json.dumps(
                {"step": step, "loader": loader_state, "meters": run.meters, "extra": extra, "world": run.world,
                 "args": vars(run.args), "torch": torch.__version__}, default=str))
        mine = [*tmp.glob(f"__{run.rank}_*"), tmp / f"rng-{run.rank}.pt"]
        mine += [tmp / "state.json", tmp / ".metadata"] if run.main else []
        for path in mine:
            fsync(path)
        return {path.name: sha256(path) for path in mine}

    def publish():
        if not run.main:
            return
        (tmp / "manifest.json").write_text(json.dumps({k: v for part in parts for k, v in part.items()}, indent=0))
        fsync(tmp / "manifest.json")
        fsync(tmp)
        if (run.folder / "metrics.jsonl").exists():
            fsync(run.folder / "metrics.jsonl")  # the curve up to here must not be younger than the weights
        if final.exists():  # of a longer run resumed from an older step
            shutil.rmtree(final)
        os.rename(tmp, final)
        fsync(final.parent)
        for old in checkpoints(run)[:-KEEP]:
            shutil.rmtree(old)

    try:
        run.attempt(doing, clear)
        parts = run.gather_objects(run.attempt(doing, write))
        run.attempt(doing, publish)
    except RuntimeError:
        if run.main:
            shutil.rmtree(tmp, ignore_errors=True)
        raise
    run.clock += time.perf_counter() - begin  # saving is not counted as training time


def save_if_due(run: Run, step: int, steps: int, model, opt, loader_state=None, **extra):
    """After `step` steps are done: saves every --save-every, at the end, and when asked to stop, and then leaves."""
    if step % run.args.save_every == 0 or step >= steps or run.stop:
        save(run, step, model, opt, loader_state, **extra)
    if run.stop:
        run.leave(step)


def damage(run: Run, folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, None if nothing; each rank hashes its share of them."""
    def check():
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
            for name in sorted(manifest)[run.rank::run.world]:
                if sha256(folder / name) != manifest[name]:
                    return f"{name} is not what was written (sha256 differs)"
        except (OSError, ValueError, AttributeError) as e:
            return f"{type(e).__name__}: {e}"
    return next((found for found in run.gather_objects(check()) if found), None)


def resume(run: Run, model, opt) -> dict:
    """All ranks: restores the newest intact checkpoint into model and opt, on any number of ranks, and drops metrics
    lines of steps that will run again. Returns {"step", "loader", "meters", "extra", ...}; step 0 and None where there
    is none (or --fresh). Damaged checkpoints are set aside with a warning; RuntimeError if only damaged ones are left,
    or if one fits another model."""
    folder = run.folder / "checkpoint"

    def clean():
        if run.main and run.args.fresh:
            shutil.rmtree(folder, ignore_errors=True)
            (run.folder / "metrics.jsonl").unlink(missing_ok=True)
        for tmp in folder.glob("*.tmp") if run.main else ():  # a save that never finished
            shutil.rmtree(tmp)
    run.attempt(f"cannot clean {folder}", clean)
    found = run.gather_objects(checkpoints(run))[0]
    if run.args.resume and not found:
        raise SystemExit(f"--resume: no checkpoint in {folder}")
    state, tried = {"step": 0, "loader": None, "meters": run.meters, "extra": {}, "world": None}, 0
    for path in reversed(found):
        wrong = damage(run, path)
        if wrong is None:
            state = run.attempt(f"cannot resume from {path}", lambda: load(run, path, model, opt))
            break
        run.say(f"WARNING: {path} is damaged: {wrong}; trying the one before it")
        tried += 1
        aside = path.with_name("damaged-" + path.name)
        run.attempt(f"cannot set {path} aside", lambda: run.main and (shutil.rmtree(aside, True), path.rename(aside)))
    if found and tried == len(found):
        raise RuntimeError(f"every checkpoint in {folder} is damaged; --fresh starts over")
    run.meters = state["meters"]
    if state["world"] == run.world:
        set_rng_states(torch.load(path / f"rng-{run.rank}.pt", weights_only=True), run.device)
    else:  # a new run, or other ranks than those that saved
        seed_everything(run.args.seed, state["step"], run.rank)
    if state["world"] is not None:
        was = {k: v for k, v in state["args"].items() if k in vars(run.args) and v != json.loads(json.dumps(
            vars(run.args)[k], default=str)) and k not in ("resume", "fresh")}
        run.say(f"resumed from {path}" + "".join(f"; --{k} was {v}" for k, v in was.items()) + "; --fresh starts over")
    run.attempt(f"cannot shorten {run.folder / 'metrics.jsonl'}", lambda: run.main and shorten(run, state["step"]))
    run.clock = time.perf_counter()
    return state


def load(run: Run, path: Path, model, opt) -> dict:
    """Reads a checkpoint in place, after its names, shapes and dtypes were compared: DCP itself would cast silently and
    skip what it is not asked for."""
    want, flat = tensors(model, opt), {}
    for name, t in want["model"].items():
        flat[f"model.{name}"] = t
    for name, states in want["optim"].items():
        flat.update({f"optim.{name}.{k}": t for k, t in states.items()})
    have = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    odd = sorted(set(flat) ^ set(have)) or [
        k for k, t in flat.items() if (tuple(have[k].size), have[k].properties.dtype) != (tuple(t.shape), t.dtype)]
    if odd:
        raise ValueError(f"it was made with another model or other trained parts, e.g. {odd[0]} "
                         f"({len(odd)} of {len(flat)} differ); --fresh starts over")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(want, checkpoint_id=path)
    return json.loads((path / "state.json").read_text())


def shorten(run: Run, step: int):
    """Drops from metrics.jsonl what will be written again, and a half-written last line, in one atomic replacement."""
    path, keep = run.folder / "metrics.jsonl", []
    if not path.exists():
        return
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if json.loads(line).get("step", -1) < step and line.endswith(b"\n"):
                keep.append(line)
        except ValueError:
            continue  # cut off by a kill
    tmp = path.with_name("metrics.jsonl.tmp")
    tmp.write_bytes(b"".join(keep))
    fsync(tmp)
    os.replace(tmp, path)


def full_state(run: Run, model) -> dict:
    """All ranks: every tensor of the model, whole, on rank 0's CPU; an empty dict elsewhere."""
    full = {}
    for name, t in model.state_dict().items():
        t = t.full_tensor() if hasattr(t, "full_tensor") else t  # one tensor at a time on the device; collective
        if run.main:
            full[name] = t.detach().to("cpu")
    return full


def export(run: Run, state: dict, config, processor, folder):
    """All ranks: a full_state in the official layout plus the processor's files, for the next stage and the world.
    Written aside and renamed; rank 0 writes."""
    folder = Path(folder)
    tmp, old = folder.with_name(folder.name + ".tmp"), folder.with_name(folder.name + ".old")

    def write():
        if not run.main:
            return
        from model import save_weights
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
        save_weights(state, config, tmp)
        processor.save_pretrained(tmp)
        for path in tmp.iterdir():
            fsync(path)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.rename(folder, old)
        os.rename(tmp, folder)
        fsync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    run.attempt(f"cannot export to {folder}", write)
