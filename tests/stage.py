"""A stage script in miniature, for tests of what real ones share: a small model, a visible loop.

    out = tmp_path / "a"
    stderr = run_stage(out, "--steps", 6, ranks=2)      whole processes, as a user's
    run, model, opt = begin(out)                        its start, in this process

run_stage forks from a server that has torch imported already, which saves seconds a process.
"""

import json
import multiprocessing
import os
import signal
import socket
import tempfile
import time
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from common import checkpoint
from common.optim import clip_gradients, make_optimizer, schedule, set_lr
from common.parallel import shard
from common.run import arguments, start

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
RATES = {"vit": 1e-2, "projector": 1e-2, "decoder": 1e-2}
PACKS = 4  # of a step
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]

# ----------------------------------------------------------------------------------------------
# the model: names and surface of KeyeVL


class Block(nn.Module):
    def __init__(self, width: int, drop: float):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Linear(width, width)
        self.drop = drop

    def forward(self, x):
        x = x.to(self.norm.weight.dtype)  # bf16 between GPUs
        return x + F.dropout(F.gelu(self.mlp(self.norm(x))), self.drop)


class Part(nn.Module):
    def __init__(self, width: int, drop: float):
        super().__init__()
        self.layers = nn.ModuleList(Block(width, drop) for _ in range(2))

    def forward(self, x):
        for block in self.layers:
            x = block(x)
        return x


class Config:
    def to_json(self) -> dict:
        return {"small": True}


class SmallModel(nn.Module):
    def __init__(self, drop=0.0, width=16, vocab=32):
        super().__init__()
        self.config = Config()
        self.vit = Part(width, drop)
        self.projector = nn.Linear(width, width)
        self.decoder = Part(width, drop)
        self.decoder.embed_tokens = nn.Embedding(vocab, width)
        self.decoder.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocab, bias=False)

    def loss(self, batch):
        features = self.vit(batch["patches"].float() / 127.5 - 1)  # (N, C)
        x = self.decoder.embed_tokens(batch["tokens"])  # (T, C)
        seen = x[: len(features)] + self.projector(features)  # a pack without pictures: no row
        x = self.decoder(torch.cat([seen, x[len(features) :]]))
        logits = self.lm_head(self.decoder.norm(x)).float()
        labels = batch["labels"]
        loss = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        return loss, int((labels != -100).sum())


class Processor:
    def save_pretrained(self, folder: Path):
        (folder / "vocab.json").write_text("{}")


def draw_pack(step: int, i: int) -> dict:
    """Pack i of a step, the same for any number of ranks: 2 has no label, 3 has no picture."""
    generator = torch.Generator().manual_seed(100 * step + i)
    length = 8 + 5 * i
    patches = 0 if i == 3 else 4
    tokens = torch.randint(32, (length,), generator=generator)
    labels = 31 - tokens  # which can be learned
    labels[: 3 * i] = -100
    if i == 2:
        labels[:] = -100
    return {
        "tokens": tokens,
        "labels": labels,
        "segments": torch.tensor([0, length], dtype=torch.int32),
        "grids": torch.tensor([[1, 2, 2]]),
        "patches": torch.randint(256, (patches, 16), generator=generator, dtype=torch.uint8),
    }


# ----------------------------------------------------------------------------------------------
# the script


def main(argv: list[str]):
    parser = arguments(__doc__)
    parser.add_argument("--drop", type=float, default=0.0, help="dropout: random states matter")
    parser.add_argument("--kill", type=int, help="kill -9 after this step")
    parser.add_argument("--kill-rank", type=int, help="of this rank alone (default: all)")
    parser.add_argument("--kill-in-save", type=int, help="kill -9 while this step is being saved")
    parser.add_argument("--signal", type=int, help="send SIGTERM in this step")
    parser.add_argument("--spoil", type=int, nargs="*", default=[], help="steps with a NaN")
    parser.add_argument("--diverge", type=int, help="a step of infinite length")
    args = parser.parse_args(argv)
    run = start(args, "small")
    model = shard(SmallModel(args.drop), run)
    opt = make_optimizer(model, RATES, muon=0.5)
    progress = checkpoint.resume(run, model, opt)
    assert progress.loader == (progress.step or None)
    die_while_saving(args.kill_in_save)

    for step in range(progress.step, args.steps):
        lr = set_lr(opt, schedule(step, args.steps, warmup=0.3))
        if step == args.diverge:
            lr = set_lr(opt, float("inf"))
        batches = [draw_pack(step, i) for i in range(PACKS)][run.rank :: run.world]
        targets = run.sum(sum(int((batch["labels"] != -100).sum()) for batch in batches))
        loss = torch.zeros((), device=run.device)
        for batch in batches:
            with run.autocast():
                loss_sum, _ = model.loss(run.to(batch))
            micro_loss = loss_sum / targets
            if step in args.spoil and run.main:
                micro_loss = micro_loss * float("nan")
            micro_loss.backward()
            loss += micro_loss.detach()
            check_gradients_are_reduced(run, model)
        norm = clip_gradients(model)
        loss = run.sum(loss)
        if not run.should_skip(loss, norm):
            opt.step()
        opt.zero_grad(set_to_none=True)
        if step == args.signal and run.main:
            os.kill(os.getpid(), signal.SIGTERM)
        tokens = sum(len(batch["tokens"]) for batch in batches)
        run.log(step, args.steps, loss=loss, norm=norm, lr=lr, tokens=tokens)
        if step == args.kill and args.kill_rank in (None, run.rank):
            run.finish_save()
            with open(run.folder / "metrics.jsonl", "a") as f:
                f.write('{"step": ')
            os.kill(os.getpid(), signal.SIGKILL)
        checkpoint.save_if_due(run, step + 1, args.steps, model, opt, step + 1)
    checkpoint.export(run, model, Processor())
    run.close()


def die_while_saving(step: int | None):
    write = checkpoint.dcp.save

    def save(state, checkpoint_id: Path, **how):
        write(state, checkpoint_id=checkpoint_id, **how)
        if checkpoint_id.name == f"step-{step}.tmp":
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.dcp.save = save


def check_gradients_are_reduced(run, model):
    """After every micro-batch each rank holds its own rows of the gradient, and no more."""
    for name, p in model.named_parameters():
        if run.world > 1:
            assert p.grad is not None, f"{name} waits for its gradient"
            assert p.grad.to_local().shape[0] == p.shape[0] // run.world, name


# ----------------------------------------------------------------------------------------------
# for the tests


def run_stage(out: Path, *flags, ranks=1, code=0) -> str:
    """Runs main to its end in fresh processes; returns what they said on stderr.

    code: their exit code, or a list of one a rank.
    """
    return in_processes(main, ["--out", out, "--device", "cpu", *flags], ranks, code)


def skip_without_gpus(device: str, count: int):
    if device == "cuda" and torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs")


def in_processes(function, argv=(), ranks=1, code=0) -> str:
    """function(argv) in one process, or in several that find each other as torchrun's do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = Path(tempfile.mkdtemp()) / "stderr"
    argv = [str(word) for word in argv]
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["stage"])
    children = []
    for rank in range(ranks):
        env = {}
        if ranks > 1:
            env = {
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            }
        children.append(server.Process(target=in_child, args=(function, argv, env, log)))
    with mock.patch.dict(os.environ, PYTHONPATH=f"{ROOT}:{TESTS}"):  # where the server finds it
        for child in children:
            child.start()
    deadline = time.monotonic() + 100
    for child in children:
        child.join(max(1, deadline - time.monotonic()))
        child.kill()  # only matters where it hangs
        child.join()
    said = log.read_text()
    codes = code if isinstance(code, list) else [code] * ranks
    ended = [child.exitcode for child in children]
    assert ended == codes, f"exit codes {ended}, not {codes}:\n{said[-4000:]}"
    return said


def in_child(function, argv: list[str], env: dict, log: Path):
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.environ.update({key: str(value) for key, value in env.items()})
    function(argv)


@cache
def finished(ranks: int) -> Path:
    """The run that others are compared with: six steps, checkpoints after 3 and 6."""
    out = Path(tempfile.mkdtemp())
    run_stage(out, "--steps", 6, "--save-every", 3, ranks=ranks)
    return out


def begin(out: Path, *flags, rates=RATES, **sizes):
    """The script's start in this process: run, model, optimizer."""
    flags = ["--out", str(out), "--device", "cpu", "--threads", "1", *flags]
    run = start(arguments(__doc__).parse_args(flags), "small")
    run.close()  # pytest keeps its signals
    torch.use_deterministic_algorithms(False)
    model = shard(SmallModel(**sizes), run)
    return run, model, make_optimizer(model, rates, muon=0.5)


def folder_of(out: Path) -> Path:
    return out / "toy" / "small"


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (folder_of(out) / "metrics.jsonl").open()]


def curve(out: Path, *keys) -> list[tuple]:
    return [tuple(record[key] for key in ("step", *keys)) for record in metrics(out)]


def assert_same_curve(a: Path, b: Path, *keys, tol=1e-5):
    for row, other in zip(curve(a, *keys), curve(b, *keys), strict=True):
        assert row == pytest.approx(other, abs=tol, rel=tol)


def exported(out: Path) -> dict:
    return load_file(folder_of(out) / "model" / "model.safetensors")


def checkpoint_names(out: Path) -> list[str]:
    return sorted(path.name for path in (folder_of(out) / "checkpoint").iterdir())
