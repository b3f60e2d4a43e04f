"""Samples of any lengths as packs of few tokens, for the losses that look at whole responses."""

import torch


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
