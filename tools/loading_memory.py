"""How much memory it takes two ranks to load a model folder of 8B's width, against its files.

    python -m tools.loading_memory --layers 8 --vocab 32768 --folder /tmp/eight

The folder is written first if it is not there: random bf16 weights in the official layout, in
shards. Then two gloo ranks load it, each its own rows. Counted is what only one process has
(private pages, from /proc, so on Linux), of both together, while it grows; the pages of the mapped
files are the page cache's, and belong to nobody. What Python and PyTorch take is counted too.
"""

import argparse
import os
import socket
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from common.parallel import shard
from common.weights import plan_files, write_file, write_index
from model import PRESETS, KeyeVL

MOST = 1.2  # times the files
SHARD = 10**9  # bytes of a file


def write_folder(folder: Path, layers: int, vocab: int):
    cfg = replace(PRESETS["8b"], num_hidden_layers=layers)
    if vocab < cfg.vocab_size:  # its last tokens are in use: they become the first
        names = [field.name for field in fields(cfg) if field.name.endswith("token_id")]
        ids = {name: getattr(cfg, name) - cfg.bos_token_id for name in names}
        cfg = replace(cfg, vocab_size=vocab, **ids)
    state = KeyeVL.shapes(cfg).state_dict()
    files = plan_files(state, torch.bfloat16, SHARD)
    some = (0.02 * torch.randn(2**20)).bfloat16()
    folder.mkdir(parents=True)
    for file, names in files.items():
        tensors = {}
        for name in names:
            n = state[name].numel()
            tensors[name] = some.repeat(-(-n // len(some)))[:n].view(state[name].shape)
        write_file(folder / file, tensors)
    write_index(folder, state, files, cfg.to_json(), torch.bfloat16)


def load(folder: Path):
    """What each rank does."""
    dist.init_process_group("gloo")
    run = SimpleNamespace(
        device=torch.device("cpu"), world=dist.get_world_size(), dtype=torch.bfloat16,
        needs_autocast=False,
    )
    model = shard(KeyeVL.shapes(folder).to(torch.bfloat16), run).load(folder)
    parts = sum(p.to_local().nbytes for p in model.parameters())
    print(f"rank {dist.get_rank()}: {parts / 1e9:.2f} GB of weights", flush=True)
    dist.barrier()
    dist.destroy_process_group()


def private(pid: int) -> int:
    """Bytes that this process alone has; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    # clean private pages are the mapped file's, where one rank alone reads them
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Private_Dirty"))


def main(args):
    if args.rank_of:
        return load(args.rank_of)
    if not args.folder.exists():
        write_folder(args.folder, args.layers, args.vocab)
    files = sum(path.stat().st_size for path in args.folder.glob("*.safetensors"))
    with socket.socket() as s:
        s.bind(("", 0))
        port = s.getsockname()[1]
    ranks = []
    command = [sys.executable, "-m", "tools.loading_memory", "--rank-of", str(args.folder)]
    for rank in range(2):
        words = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        env = os.environ | {key: str(value) for key, value in words.items()}
        ranks.append(subprocess.Popen(command, env=env))
    begin, most = time.time(), 0
    while any(rank.poll() is None for rank in ranks):
        most = max(most, sum(private(rank.pid) for rank in ranks))
        time.sleep(0.05)
    if any(rank.returncode for rank in ranks):
        raise SystemExit("a rank failed: see above")
    print(
        f"{files / 1e9:.2f} GB of files; two ranks took {time.time() - begin:.0f} s, "
        f"and at most {most / 1e9:.2f} GB: {most / files:.2f} times the files"
    )
    if most > MOST * files:
        raise SystemExit(f"more than {MOST} times the files")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=8, help="of the decoder")
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--folder", type=Path, default=Path("runs-loading"))
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    main(parser.parse_args())
