"""common/optim.py: which parameters learn how fast, AdamW, Muon, the schedule, clipping."""

import pytest
import torch
from torch import nn

from common.optim import (
    MOMENTUM,
    clip_gradients,
    make_optimizer,
    orthogonal,
    schedule,
    set_lr,
)
from stage import RATES, SmallModel


def settings(model: nn.Module, opt, *keys) -> dict:
    """{name of a parameter: what its group says under `keys`}"""
    names = {p: name for name, p in model.named_parameters()}
    found = {}
    for group in opt.param_groups:
        for p in group["params"]:
            found[names[p]] = tuple(group[key] for key in keys)
    return found


def set_gradients(*models: nn.Module, seed: int):
    """The same random gradient for all of them."""
    generator = torch.Generator().manual_seed(seed)
    for parameters in zip(*(model.parameters() for model in models)):
        grad = torch.randn(parameters[0].shape, generator=generator)
        for p in parameters:
            p.grad = grad.to(p.device, copy=True)


def decays(name: str) -> bool:
    return name.endswith("weight") and "norm" not in name and "embed" not in name


# ----------------------------------------------------------------------------------------------
# groups


def test_the_longest_prefix_gives_the_rate_and_only_matrices_decay():
    model = SmallModel()
    rates = {"projector": 1e-3, "decoder": 1e-4, "decoder.norm": 5e-4}
    opt = make_optimizer(model, rates, weight_decay=0.1)
    found = settings(model, opt, "lr", "weight_decay")
    assert found["projector.weight"] == (1e-3, 0.1)
    assert found["projector.bias"] == (1e-3, 0.0)
    assert found["decoder.layers.0.mlp.weight"] == (1e-4, 0.1)
    assert found["decoder.layers.0.norm.weight"] == (1e-4, 0.0)
    assert found["decoder.norm.weight"] == (5e-4, 0.0)
    assert found["decoder.embed_tokens.weight"] == (1e-4, 0.0)
    assert found["lm_head.weight"] == (1e-4, 0.1), "the head goes with the decoder"


def test_a_part_without_a_rate_is_frozen_and_thaws_again():
    model = SmallModel()
    opt = make_optimizer(model, {"projector": 1e-3})
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {"projector.weight", "projector.bias"} == set(settings(model, opt))
    make_optimizer(model, RATES)
    assert all(p.requires_grad for p in model.parameters())


def test_a_prefix_that_fits_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"\['projektor'\].*\['decoder', 'lm_head', 'projector'"):
        make_optimizer(SmallModel(), {"projektor": 1e-3, "decoder": 1e-3})
    with pytest.raises(ValueError, match="proj"):  # a prefix ends where a name does
        make_optimizer(SmallModel(), {"proj": 1e-3})


def test_set_lr_scales_each_peak_and_returns_the_highest():
    model = SmallModel()
    opt = make_optimizer(model, {"projector": 1e-3, "decoder": 2e-3}, muon=4)
    assert set_lr(opt, 0.5) == 4e-3
    assert set_lr(opt, 0.25) == 2e-3, "of the peak, not of what it was"
    found = settings(model, opt, "lr")
    assert found["projector.weight"] == (1e-3,)
    assert found["projector.bias"] == (2.5e-4,)
    assert found["decoder.norm.weight"] == (5e-4,)


# ----------------------------------------------------------------------------------------------
# steps


def test_without_muon_a_step_is_torchs_adamw():
    ours, theirs = SmallModel(), SmallModel()
    theirs.load_state_dict(ours.state_dict())
    opt = make_optimizer(ours, dict.fromkeys(RATES, 1e-2))
    decayed = [p for name, p in theirs.named_parameters() if decays(name)]
    others = [p for name, p in theirs.named_parameters() if not decays(name)]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    for seed in range(3):
        set_gradients(ours, theirs, seed=seed)
        opt.step()
        adamw.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6, msg=name)


def test_muon_equals_torchs():
    """Matrices but the head as torch.optim.Muon, which iterates in bf16: hence 2 %."""
    ours, theirs = SmallModel(), SmallModel()
    theirs.load_state_dict(ours.state_dict())
    opt = make_optimizer(ours, dict.fromkeys(RATES, 1e-2), weight_decay=0.1, muon=3)
    by_muon = {name for name, p in ours.named_parameters() if "momentum" in opt.state[p]}
    decayed = {name for name, _ in ours.named_parameters() if decays(name)}
    assert by_muon == decayed - {"lm_head.weight"}
    matrices = [p for name, p in theirs.named_parameters() if name in by_muon]
    muon = torch.optim.Muon(
        matrices, lr=3e-2, weight_decay=0.1, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw"
    )
    others = [p for name, p in theirs.named_parameters() if name not in by_muon]
    groups = [{"params": [p], "weight_decay": 0.0} for p in others]
    groups[-1]["weight_decay"] = 0.1  # the head
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    start = {name: p.detach().clone() for name, p in ours.named_parameters()}
    for seed in range(4):
        set_gradients(ours, theirs, seed=seed)
        for optimizer in (opt, muon, adamw):
            optimizer.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
        gap = (a - b).norm() / (a - start[name]).norm()
        assert gap < (2e-2 if name in by_muon else 1e-5), (name, float(gap))


@pytest.mark.parametrize("inputs, outputs", [(12, 48), (48, 12)])
def test_muons_step_of_a_long_matrix_is_torchs(inputs, outputs):
    ours, theirs = (nn.ModuleDict({"projector": nn.Linear(inputs, outputs)}) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    opt = make_optimizer(ours, {"projector": 1e-2}, weight_decay=0.0, muon=1)
    weight = theirs["projector"].weight
    muon = torch.optim.Muon(
        [weight], lr=1e-2, weight_decay=0.0, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw"
    )
    start = weight.detach().clone()
    set_gradients(ours, theirs, seed=0)
    opt.step()
    muon.step()
    gap = (ours["projector"].weight - weight).norm() / (weight - start).norm()
    assert gap < 2e-2


@pytest.mark.parametrize("shape", [(48, 96), (96, 48), (33, 33)], ids=str)
def test_orthogonal_keeps_singular_vectors_and_sets_the_values_near_one(shape):
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    result = orthogonal(x)
    values = torch.einsum("bmr,bmn,brn->br", u, result, vh)
    torch.testing.assert_close(result, u @ torch.diag_embed(values) @ vh, atol=1e-4, rtol=0)
    large = s > 0.02 * s[:, :1]  # five steps lift the rest only part of the way
    assert values[large].min() > 0.6
    assert values.max() < 1.3


@pytest.mark.cuda
def test_muon_on_cuda_equals_cpu():
    on_cpu, on_cuda = SmallModel(), SmallModel()
    on_cuda.load_state_dict(on_cpu.state_dict())
    on_cuda.cuda()
    start = [p.detach().clone() for p in on_cpu.parameters()]
    optimizers = [make_optimizer(model, RATES, muon=3) for model in (on_cpu, on_cuda)]
    for seed in range(3):
        set_gradients(on_cpu, on_cuda, seed=seed)
        for optimizer in optimizers:
            optimizer.step()
    by_muon = [p for group in optimizers[0].param_groups if group["muon"] for p in group["params"]]
    for before, a, b in zip(start, on_cpu.parameters(), on_cuda.parameters()):
        bounds = dict(atol=1e-4, rtol=1e-4)
        if any(a is p for p in by_muon):
            # directions are computed in bf16 there: equal within a few hundredths of the way
            bounds = dict(atol=0.05 * (a - before).abs().max().item(), rtol=0)
        torch.testing.assert_close(b.cpu(), a, **bounds)


# ----------------------------------------------------------------------------------------------
# clipping


def test_clipping_scales_all_gradients_to_the_norm_and_returns_the_norm_before():
    model = SmallModel()
    set_gradients(model, seed=0)
    model.projector.bias.grad = None  # a frozen part has none
    before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    norm = torch.cat([grad.flatten() for grad in before.values()]).norm()
    assert norm > 10
    assert clip_gradients(model) == pytest.approx(float(norm), rel=1e-5)
    for name, p in model.named_parameters():
        if name in before:
            torch.testing.assert_close(p.grad, before[name] / norm, atol=1e-6, rtol=1e-4, msg=name)


def test_small_gradients_stay_as_they_are():
    model = SmallModel()
    set_gradients(model, seed=0)
    before = [p.grad.clone() for p in model.parameters()]
    clip_gradients(model, max_norm=1e6)
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), before))


# ----------------------------------------------------------------------------------------------
# schedule


def rates(steps: int, **shape) -> list[float]:
    return [schedule(step, steps, **shape) for step in range(steps)]


def test_the_rate_rises_stays_and_falls_by_shares_of_the_steps():
    way = rates(20, warmup=0.2, decay=0.5, floor=0.1)
    assert way[:4] == [0.25, 0.5, 0.75, 1.0]
    assert way[4:11] == [1.0] * 7
    assert way[11:] == pytest.approx([0.91, 0.82, 0.73, 0.64, 0.55, 0.46, 0.37, 0.28, 0.19])


def test_without_shares_it_falls_from_the_first_step_on():
    assert rates(4) == [1.0, 0.75, 0.5, 0.25]
    assert rates(4, floor=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4])


def test_without_decay_it_stays():
    assert rates(5, warmup=0.4, decay=0.0) == [0.5, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 60, 1000])
@pytest.mark.parametrize("shape", [
    {},
    {"warmup": 0.05, "floor": 0.2},
    {"warmup": 0.05, "decay": 0.3},
    {"warmup": 1.0},
    {"decay": 0.0},
], ids=str)
def test_no_step_has_rate_zero_and_the_fall_ends_at_its_least(steps, shape):
    way = rates(steps, **shape)
    assert 0 < min(way)
    assert max(way) == 1.0
    if shape.get("decay", 1.0) and shape.get("warmup", 0.0) < 1:
        assert way[-1] == min(way[way.index(1.0) :])
        assert schedule(steps, steps, **shape) == shape.get("floor", 0.0)
