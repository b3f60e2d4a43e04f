"""common/parallel.py: one model on several ranks; and what ranks say to each other (Run)."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from common import run as run_module
from common.optim import clip_gradients
from common.packing import even_packs
from common.parallel import assign, pass_around, ring_pass, shard, whole
from common.run import arguments, start
from conftest import make_batch
from model import PRESETS, KeyeVL
from stage import assert_same_curve, curve, exported, finished, in_processes, run_stage


def join(argv):
    return start(arguments("").parse_args(["--out", *argv, "--device", "cpu"]), "small")


# ----------------------------------------------------------------------------------------------
# training


def test_two_ranks_equal_one():
    one, two = finished(ranks=1), finished(ranks=2)
    assert_same_curve(one, two, "loss", "norm", "lr", "tokens")
    losses = [loss for _, loss in curve(one, "loss")]
    assert losses[-1] < losses[0]
    weights = exported(two)
    for name, tensor in exported(one).items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-4, rtol=1e-4, msg=name)


def test_bf16_on_two_ranks_follows_one_process(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    run_stage(one, "--steps", 2, "--dtype", "bf16")
    run_stage(two, "--steps", 2, "--dtype", "bf16", ranks=2)
    assert_same_curve(one, two, "loss", tol=1e-3)
    assert curve(one, "loss") != curve(finished(ranks=1), "loss")[:2]
    assert {tensor.dtype for tensor in exported(two).values()} == {torch.float32}


# ----------------------------------------------------------------------------------------------
# what ranks say to each other


def talk(argv):
    run = join(argv)
    r = run.rank
    assert run.world == 3
    assert run.main == (r == 0)
    assert run.gather([r, 0.5]) == [[0.0, 0.5], [1.0, 0.5], [2.0, 0.5]]
    assert run.gather_objects({"name": r}) == [{"name": 0}, {"name": 1}, {"name": 2}]
    assert run.merge({r: 10 * r}) == {0: 0, 1: 10, 2: 20}
    assert run.sum(r + 1) == 6
    x = torch.tensor([1.0, r])
    assert run.sum(x).tolist() == [3.0, 3.0]
    assert x.tolist() == [1.0, r], "sum must not write into its argument"
    run.say(f"rank {r} speaks")


def test_ranks_gather_sum_and_merge(tmp_path):
    said = in_processes(talk, [tmp_path], ranks=3)
    assert "rank 0 speaks" in said
    assert "rank 1 speaks" not in said


def measure_peak(argv):
    run_module.measured_peak = lambda device, dtype: 2e12
    assert join(argv).peak == 6e12


def test_the_peak_is_that_of_all_ranks_together(tmp_path):
    in_processes(measure_peak, [tmp_path], ranks=3)


def average(argv):
    run = join(argv)
    local = {"all": [run.rank] * (run.rank + 1), "nothing": []}  # 0; 1, 1; 2, 2, 2
    if run.rank == 1:
        local["some"] = [4, 6]
    assert run.means(local) == {"all": 8 / 6, "some": 5.0}


def test_means_are_over_all_values_of_all_ranks(tmp_path):
    in_processes(average, [tmp_path], ranks=3)


def fail_on_one(argv):
    run = join(argv)

    def work():
        if run.rank == 1:
            raise ValueError("no room")
        return run.rank

    with pytest.raises(RuntimeError, match="^cannot write: rank 1: ValueError: no room$"):
        run.attempt("cannot write", work)
    assert run.attempt("cannot write", lambda: 10 + run.rank) == 10 + run.rank


def test_what_fails_on_one_rank_is_an_error_on_all(tmp_path):
    in_processes(fail_on_one, [tmp_path], ranks=2)


def draw(argv):
    run = join(argv)
    drawn = [torch.rand(()), np.random.rand(), random.random()]
    rows = run.gather(drawn)
    assert rows[0] == rows[1] == rows[2], "fresh weights must agree"


def test_ranks_start_from_one_seed(tmp_path):
    in_processes(draw, [tmp_path], ranks=3)


def share_packs(argv):
    run = join(argv)
    sample = {"tokens": range(5)}
    blank = {"tokens": range(1)}
    packs = even_packs(run, [sample] * 2 * run.rank, 10, blank)
    assert packs == [[sample, sample]] * run.rank + [[blank]] * (2 - run.rank)


def test_even_packs_gives_all_ranks_as_many_as_the_rank_with_most(tmp_path):
    in_processes(share_packs, [tmp_path], ranks=3)


def walk_the_ring(argv):
    run = join(argv)
    x = torch.tensor([float(run.rank)], requires_grad=True)
    before = (run.rank - 1) % 3
    after = (run.rank + 1) % 3
    assert pass_around(x.detach()).item() == before
    assert pass_around(x.detach(), -1).item() == after

    # the rank that received x multiplies it by 10^(its rank); that comes back as x's gradient
    (ring_pass(x) * 10**run.rank).sum().backward()
    assert x.grad.item() == 10**after


def test_a_tensor_goes_around_the_ring_and_its_gradient_comes_back(tmp_path):
    in_processes(walk_the_ring, [tmp_path], ranks=3)


class Outside(nn.Module):
    """A block, a unit, and a parameter and a buffer outside of both."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4)])
        self.head = nn.Linear(4, 5, bias=False)
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("table", torch.ones(2))

    def units(self):
        return [self.head]

    def loss(self, x):
        return self.head(self.layers[0](x)).sum() + self.scale.sum()


def spread_weights(argv):
    run = join(argv)
    with torch.device("meta"):
        model = Outside()
    model = shard(model, run)
    assert isinstance(model.layers[0], FSDPModule), "each block is gathered by itself"
    assert isinstance(model.head, FSDPModule), "and each unit"
    assert model.head.weight.to_local().shape == ((3 if run.main else 2), 4)
    assert model.scale.to_local().shape == ((2 if run.main else 1),)

    drawn = {name: torch.randn(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, tensor in model.state_dict().items():
        assign(tensor, drawn[name])
    for name, tensor in model.state_dict().items():
        assert torch.equal(whole(tensor), drawn[name]), name

    model.loss(torch.ones(4)).backward()
    assert model.scale.grad.full_tensor().tolist() == [2, 2, 2], "sums over ranks"


def test_a_model_without_memory_gets_each_ranks_part_of_it(tmp_path):
    in_processes(spread_weights, [tmp_path], ranks=2)


def keep_weights(argv):
    run = join(argv)
    model = shard(Outside(), run)
    assert whole(model.scale).tolist() == [1, 1, 1]
    assert model.table.tolist() == [1, 1]


def test_a_model_with_weights_keeps_them(tmp_path):
    in_processes(keep_weights, [tmp_path], ranks=2)


def hold_weights(argv):
    run = join(argv)
    batches = [make_batch(PRESETS["toy"], [[3, (1, 4, 4), 6 + i + run.rank]]) for i in range(3)]

    def step(stays: bool):
        """The gradients of a step of three packs, and what is gathered on the way."""
        torch.manual_seed(0)
        model = KeyeVL(PRESETS["toy"]).init_weights()
        model.stays_gathered = stays
        model = shard(model, run)
        block = model.decoder.layers[1]
        gathered = []
        for batch in batches:
            loss, _ = model.loss(batch)
            gathered.append(not isinstance(next(block.parameters()), DTensor))
            loss.backward()
            gathered.append(not isinstance(next(block.parameters()), DTensor))
        norm = clip_gradients(model, max_norm=1e9)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        gradients = {name: p.grad.to_local() for name, p in model.named_parameters()}
        model.loss(batches[0])  # and the next step gathers them anew
        return gathered, norm, gradients

    plain = step(False)
    stayed = step(True)
    assert plain[0] == [False] * 6 and stayed[0] == [True] * 6
    assert plain[1] == stayed[1] > 0
    assert all(torch.equal(stayed[2][name], grad) for name, grad in plain[2].items())


def test_weights_that_stay_gathered_for_a_step_give_the_same_gradients(tmp_path):
    in_processes(hold_weights, [tmp_path], ranks=2)


def run_again_apart(argv):
    run = join(argv)
    cfg = PRESETS["toy"]
    batch = make_batch(cfg, [[3, (1, 4, 4), 6 + run.rank]])

    def gradients(decoder, vit):
        torch.manual_seed(0)
        model = shard(KeyeVL(cfg).init_weights(), run)
        model.recompute, model.planned_tokens = [(100, decoder, vit)], 100
        loss, _ = model.loss(batch)
        loss.backward()
        return {name: p.grad.to_local() for name, p in model.named_parameters()}

    want = gradients(0, 0)
    got = gradients(3, 1) if run.main else gradients(1, 2)
    assert all(torch.equal(got[name], grad) for name, grad in want.items())


def test_ranks_may_run_different_numbers_of_blocks_again(tmp_path):
    """As their packs have different numbers of patches: nobody waits for the other."""
    in_processes(run_again_apart, [tmp_path], ranks=2)
