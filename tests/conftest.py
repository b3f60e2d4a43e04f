"""Shared by all tests: one thread, the project on the path, a toy model and a batch from a seed."""

import os
import sys
from pathlib import Path

# before torch is imported: spinning threads of several processes starve each other
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402

from data import Processor  # noqa: E402
from model import PRESETS, SCALE, KeyeVL  # noqa: E402

torch.set_num_threads(1)


def toy_processor() -> Processor:
    return Processor(ROOT / "toyworld" / "vocab.json", **SCALE["toy"].budget)


def write_toy_model(folder):
    """A toy with fresh weights in the official layout."""
    torch.manual_seed(0)
    KeyeVL.empty(PRESETS["toy"]).init_weights().save_pretrained(folder)
    toy_processor().save_pretrained(folder)


@pytest.fixture(scope="module")
def processor():
    return toy_processor()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return KeyeVL.empty(PRESETS["toy"]).init_weights()


def pytest_collection_modifyitems(items):
    for item in items:
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def make_batch(cfg, samples, seed=0):
    """samples: for each, a list of ints (so many text tokens) and (t, h, w) grids in patches.

    Returns a packed batch. Positions follow Keye-VL's section 2.2 at 2 frames a second: a frame
    is one step in time.
    """
    generator = torch.Generator().manual_seed(seed)
    packed = {"tokens": [], "labels": [], "positions": []}
    grids = []
    starts = [0]
    for sample in samples:
        tokens = []
        positions = []
        start = 0
        for part in sample:
            if isinstance(part, int):
                tokens.append(torch.randint(0, cfg.bos_token_id, (part,), generator=generator))
                positions.append((start + torch.arange(part)).expand(3, -1))
            else:
                t, h, w = part
                pad = cfg.image_token_id if t == 1 else cfg.video_token_id
                box = [torch.arange(n) for n in (t, h // 2, w // 2)]
                tokens.append(torch.full((t * h * w // 4,), pad))
                positions.append(start + torch.cartesian_prod(*box).T)
                grids.append(part)
            start = int(positions[-1].max()) + 1
        tokens = torch.cat(tokens)
        labels = torch.cat([tokens[1:], torch.tensor([-100])])
        is_pad = (labels == cfg.image_token_id) | (labels == cfg.video_token_id)
        packed["tokens"].append(tokens)
        packed["labels"].append(labels.masked_fill(is_pad, -100))
        packed["positions"].append(torch.cat(positions, 1))
        starts.append(starts[-1] + len(tokens))
    grids = torch.tensor(grids, dtype=torch.long).reshape(-1, 3)
    shape = (int(grids.prod(1).sum()), 588)
    return {
        "tokens": torch.cat(packed["tokens"]),
        "labels": torch.cat(packed["labels"]),
        "positions": torch.cat(packed["positions"], 1),
        "segments": torch.tensor(starts, dtype=torch.int32),
        "patches": torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8),
        "grids": grids,
    }


def split_batch(batch, grids_of):
    """The samples of a pack as packs of one. grids_of: how many grids each sample owns."""
    samples = []
    first_patch = first_grid = 0
    for s, count in enumerate(grids_of):
        start, end = batch["segments"][s : s + 2].tolist()
        grids = batch["grids"][first_grid : first_grid + count]
        patches = int(grids.prod(1).sum())
        samples.append({
            "tokens": batch["tokens"][start:end],
            "labels": batch["labels"][start:end],
            "positions": batch["positions"][:, start:end],
            "segments": torch.tensor([0, end - start], dtype=torch.int32),
            "patches": batch["patches"][first_patch : first_patch + patches],
            "grids": grids,
        })
        first_patch += patches
        first_grid += count
    return samples
