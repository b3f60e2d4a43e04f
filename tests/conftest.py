"""Shared by all tests: one thread, the repository's root on the path, and a packed batch drawn from a seed."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: spinning threads of several processes starve each other
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402

from data import BUDGETS, Processor  # noqa: E402
from model import PRESETS, KeyeVL  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def processor():
    return Processor(ROOT / "vocab-toy.json", **BUDGETS["toy"])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return KeyeVL.empty(PRESETS["toy"]).init_weights()


def pytest_collection_modifyitems(items):
    for item in items:
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def make_batch(cfg, samples, seed=0):
    """samples: for each, a list of ints (that many text tokens) and (t, h, w) grids in patches. Returns a packed batch.

    Positions follow the rule of Keye-VL's section 2.2 at 2 frames a second: a frame is one step in time.
    """
    g = torch.Generator().manual_seed(seed)
    tokens, labels, positions, grids, starts = [], [], [], [], [0]
    for sample in samples:
        ids, pos, at = [], [], 0
        for part in sample:
            if isinstance(part, int):
                ids.append(torch.randint(0, cfg.bos_token_id, (part,), generator=g))
                pos.append((at + torch.arange(part)).expand(3, -1))
            else:
                t, h, w = part
                ids.append(torch.full((t * h * w // 4,), cfg.image_token_id if t == 1 else cfg.video_token_id))
                pos.append(at + torch.cartesian_prod(torch.arange(t), torch.arange(h // 2), torch.arange(w // 2)).T)
                grids.append(part)
            at = int(pos[-1].max()) + 1
        ids = torch.cat(ids)
        target = torch.cat([ids[1:], torch.tensor([-100])])
        labels.append(torch.where((target == cfg.image_token_id) | (target == cfg.video_token_id), -100, target))
        tokens.append(ids)
        positions.append(torch.cat(pos, 1))
        starts.append(starts[-1] + len(ids))
    grids = torch.tensor(grids, dtype=torch.long).reshape(-1, 3)
    patches = torch.randint(0, 256, (int(grids.prod(1).sum()), 588), generator=g, dtype=torch.uint8)
    return {"tokens": torch.cat(tokens), "labels": torch.cat(labels), "positions": torch.cat(positions, 1),
            "segments": torch.tensor(starts, dtype=torch.int32), "patches": patches, "grids": grids}


def split_batch(batch, grids_of):
    """The samples of a pack as packs of one. grids_of: how many grids each sample owns."""
    out, n, m = [], 0, 0
    for s, count in enumerate(grids_of):
        a, b = batch["segments"][s : s + 2].tolist()
        grids = batch["grids"][m : m + count]
        rows = int(grids.prod(1).sum())
        out.append({"tokens": batch["tokens"][a:b], "labels": batch["labels"][a:b],
                    "positions": batch["positions"][:, a:b], "segments": torch.tensor([0, b - a], dtype=torch.int32),
                    "patches": batch["patches"][n : n + rows], "grids": grids})
        n, m = n + rows, m + count
    return out
