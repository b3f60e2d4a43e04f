"""common/packing.py: samples into packs, and sums over the samples of one."""

import pytest
import torch
from conftest import make_batch

from common.packing import (
    even_packs,
    group_into_packs,
    join,
    sample_of_label,
    sum_per_sample,
)
from data import pack
from stage import begin


def samples_of(*lengths: int) -> list[dict]:
    return [{"tokens": torch.zeros(length)} for length in lengths]


def lengths_of(packs: list[list[dict]]) -> list[list[int]]:
    return [[len(sample["tokens"]) for sample in pack] for pack in packs]


def test_packs_hold_as_many_samples_as_fit_in_their_order():
    packs = group_into_packs(samples_of(4, 6, 1, 9, 5, 5, 5), 10)
    assert lengths_of(packs) == [[4, 6], [1, 9], [5, 5], [5]]


def test_a_sample_that_is_too_long_stands_alone():
    assert lengths_of(group_into_packs(samples_of(12, 3, 12, 12), 10)) == [[12], [3], [12], [12]]
    assert group_into_packs([], 10) == []


# 3 samples of 2, 3 and 1 tokens; the last has no label
BATCH = {
    "segments": torch.tensor([0, 2, 5, 6], dtype=torch.int32),
    "labels": torch.tensor([-100, 7, 0, -100, 9, -100]),
}


def test_each_label_knows_its_sample():
    assert sample_of_label(BATCH).tolist() == [0, 1, 1]


def test_values_at_labels_are_summed_and_counted_by_sample():
    values = torch.tensor([0.5, 2.0, 3.0], requires_grad=True)
    sums, counts = sum_per_sample(values, BATCH)
    assert sums.tolist() == [0.5, 5.0, 0.0]
    assert counts.tolist() == [1, 2, 0]
    (sums * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    assert values.grad.tolist() == [1, 10, 10]


def test_on_one_rank_there_is_nothing_to_fill_up(tmp_path):
    run, _, _ = begin(tmp_path)
    samples = samples_of(4, 7)
    assert lengths_of(even_packs(run, samples, 10, blank={"tokens": [0]})) == [[4], [7]]


@pytest.mark.parametrize("at_once", [2, 3, 6])
def test_joined_packs_teach_what_packs_one_by_one_do(model, at_once):
    """In fp32: the loss of the step, and the gradient of every parameter."""
    packs = []
    for k in range(6):
        samples = [[9 + k, (1, 4, 6), 5], [20 - k], [(2, 4, 4), 7 + k]][: 1 + k % 3]
        packs.append(make_batch(model.config, samples, seed=k))
    packs[4]["labels"][:] = -100  # a pack in which nothing is to be learnt
    targets = sum(int((pack["labels"] != -100).sum()) for pack in packs)

    def step(batches):
        model.zero_grad()
        loss = 0
        for batch in batches:
            loss_sum, _ = model.loss(batch)
            (loss_sum / targets).backward()
            loss += loss_sum.item() / targets
        return loss, {name: p.grad.clone() for name, p in model.named_parameters()}

    loss, grads = step(packs)
    joined, theirs = step(join(packs, at_once))
    model.zero_grad(set_to_none=True)
    assert joined == pytest.approx(loss, abs=1e-6)
    assert grads.keys() == theirs.keys() and len(grads) > 50
    for name, grad in grads.items():
        torch.testing.assert_close(theirs[name], grad, atol=1e-6, rtol=1e-6, msg=name)


def test_joined_packs_hold_the_same_samples(processor):
    """As if all of them had been packed together, in the same order."""
    samples = [processor({"messages": [
        {"role": "user", "content": f"question {i} " * (i + 1)},
        {"role": "assistant", "content": f"answer {i}"},
    ]}) for i in range(7)]
    packs = [pack(samples[:2]), pack(samples[2:3]), pack(samples[3:5]), pack(samples[5:])]
    for at_once, groups in ((2, [samples[:3], samples[3:]]), (4, [samples])):
        joined = join(packs, at_once)
        assert len(joined) == len(groups)
        for got, group in zip(joined, groups):
            want = pack(group)
            assert got.keys() == want.keys()
            for key in want:
                assert torch.equal(got[key], want[key]) and got[key].dtype == want[key].dtype, key
    assert join(packs, 1) is packs
