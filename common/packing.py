"""Packs: how many a step has, several as one, and samples of any lengths as packs of few tokens,
for the losses that look at whole responses."""

import json
from contextlib import suppress

import torch
import torch.nn.functional as F

from common.checkpoint import checkpoints
from common.loader import split_packs
from common.run import released
from model import SCALE


def packing(run) -> tuple[int, int]:
    """(tokens of a pack, packs of a step on all ranks) that the run's size trains with.

    A run that goes on keeps those of its checkpoint, on whatever number of ranks.
    """
    return kept_packing(run) or first_packing(run.args.size, run.args.packs, run.world)


def first_packing(size: str, packs: int | None, world: int) -> tuple[int, int]:
    """That of a run that begins. packs: of --packs, if given.

    ours: small models keep the tokens of a step on any number of ranks, and learn the same; at
    released sizes long samples count for more.
    """
    scale = SCALE[size]
    return split_packs(scale.pack, packs or scale.packs, world, whole=released(size))


def kept_packing(run) -> tuple[int, int] | None:
    """That of the newest checkpoint, if there is one and --packs is as it was."""
    for path in reversed(checkpoints(run)):
        with suppress(OSError, ValueError, KeyError, TypeError):  # damaged: resume() says so
            state = json.loads((path / "state.json").read_text())
            loader = state["loader"] or state["extra"]["replay"]
            _, tokens, packs, *_ = loader["identity"]
            return (tokens, packs) if state["args"]["packs"] == run.args.packs else None
    return None


def group_into_packs(samples: list[dict], max_tokens: int) -> list[list[dict]]:
    """Samples in their order, as many together as max_tokens hold; a longer one alone."""
    groups = []
    used = 0
    for sample in samples:
        length = len(sample["tokens"])
        if not groups or used + length > max_tokens:
            groups.append([])
            used = 0
        groups[-1].append(sample)
        used += length
    return groups


def even_packs(run, samples: list[dict], max_tokens: int, blank: dict) -> list[list[dict]]:
    """group_into_packs, with packs of `blank` until all ranks have equally many.

    FSDP gathers weights together: every rank must run as many forwards as the others.
    """
    groups = group_into_packs(samples, max_tokens)
    most = max(run.gather_objects(len(groups)))
    return groups + [[blank]] * (most - len(groups))


def join(packs: list[dict], at_once: int) -> list[dict]:
    """Packed batches, `at_once` neighbours as one: the same samples in fewer, larger steps.

    A GPU waits for the host as long for a small batch as for a large one.
    """
    if at_once == 1:
        return packs
    joined = []
    for first in range(0, len(packs), at_once):
        group = packs[first : first + at_once]
        batch = {}
        for key in ("tokens", "labels", "patches", "grids"):
            batch[key] = torch.cat([pack[key] for pack in group])
        batch["positions"] = torch.cat([pack["positions"] for pack in group], 1)  # (3, T)
        lengths = torch.cat([pack["segments"].diff() for pack in group])  # (S,)
        batch["segments"] = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))  # (S + 1,)
        joined.append(batch)
    return joined


def sample_of_label(batch: dict) -> torch.Tensor:
    """For each label of a pack that is not -100, the index of its sample: (N,) on the device."""
    lengths = batch["segments"].long().diff()
    owner = torch.arange(len(lengths)).repeat_interleave(lengths)  # (T,)
    labels = batch["labels"]
    return owner.to(labels.device)[labels != -100]


def sum_per_sample(values: torch.Tensor, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """values (N,), one for each label that is not -100 -> their sums and counts by sample: (S,)."""
    owner = sample_of_label(batch)
    zeros = values.new_zeros(len(batch["segments"]) - 1)
    sums = zeros.index_add(0, owner, values)
    counts = zeros.index_add(0, owner, torch.ones_like(values))
    return sums, counts
