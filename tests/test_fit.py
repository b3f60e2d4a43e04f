"""common/fit.py: which dtypes and how much recomputation a card's memory leaves to a model."""

from types import SimpleNamespace

import pytest
import torch

from common import fit as fit_module
from common.fit import fit, free_memory, packs_at_once, refuse_beyond_memory
from common.memory import (
    BEST,
    FRAGMENTS,
    GIB,
    RECIPES,
    Job,
    again_by_patches,
    choose,
    counted,
    job_of,
    plan_of,
)
from model import PRESETS, SCALE, KeyeVL
from phases import FakeRun

EVERYTHING = ("vit", "projector", "decoder")
FP32, BF16 = torch.float32, torch.bfloat16


class Cards:
    """Cards of so many GiB without CUDA: notes what part of one this process may use."""

    def __init__(self, monkeypatch, total: float, held: float = 0):
        self.fraction = None
        self.properties = SimpleNamespace(total_memory=total * GIB)
        self.held = held * GIB
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: self.properties)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: self.held)
        monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", self.limit)
        monkeypatch.setattr(fit_module, "has_triton", lambda: True)

    def limit(self, fraction):
        assert 0 < fraction <= 1
        self.fraction = fraction


def run_on(folder, size: str, world=1, device="cuda", dtype=BF16, **flags) -> FakeRun:
    args = {"size": size, "compile": "off", "gpu_memory": None}
    run = FakeRun(folder, world=world, args=SimpleNamespace(**args | flags))
    run.device = torch.device(device)
    run.dtype = dtype
    run.stage = "a stage"
    return run


def shapes(size: str) -> KeyeVL:
    return KeyeVL.shapes(PRESETS[size])


def dtypes(model) -> dict:
    """{part: the dtypes of its parameters}"""
    parts = model.named_children()
    return {name: {p.dtype for p in part.parameters()} for name, part in parts}


def again(model) -> tuple[int, int]:
    return model.decoder.recompute, model.vit.recompute


def least(recipe: str, size: str, world=8, learns=EVERYTHING) -> float:
    """GiB of the smallest card that this recipe fits on: the ones before it need more."""
    stage_0 = ("text",) * (learns == ("vit",))
    job = Job(PRESETS[size], learns + stage_0, 8192, world, compiled=False)
    plan = plan_of(job, recipe, job.layers, capacity=0)
    return 1.0001 * (plan.total + plan.allowance) / (1 - FRAGMENTS) / GIB


# ----------------------------------------------------------------------------------------------
# without CUDA


@pytest.mark.parametrize("size, blocks", [("toy", (0, 0)), ("small", (0, 0)), ("8b", (36, 27))])
def test_without_a_card_all_is_fp32_and_released_sizes_recompute(
    tmp_path, monkeypatch, size, blocks
):
    monkeypatch.setattr(fit_module, "free_memory", lambda: 1e12)
    model = shapes(size)
    run = run_on(tmp_path, size, device="cpu", dtype=FP32)
    assert fit(run, model, EVERYTHING, 8192) == {}
    assert {p.dtype for p in model.parameters()} == {FP32}
    assert again(model) == blocks
    assert run.said == []


def needs(monkeypatch, run, cfg, learns=EVERYTHING, copies=0.0) -> float:
    """GB that a machine must have for it, as the refusal of one with nothing says."""
    monkeypatch.setattr(fit_module, "free_memory", lambda: 0.0)
    with pytest.raises(SystemExit, match="^a stage does not fit on cpu: .* 0.0 GB are") as refusal:
        refuse_beyond_memory(run, cfg, learns, copies)
    assert "\n" not in str(refusal.value)
    said = str(refusal.value).partition("at least ")[2]
    return float(said.split()[0].replace(",", ""))


@pytest.mark.parametrize("learns", [EVERYTHING, ("decoder",), ("projector",)])
def test_without_a_card_weights_gradients_and_moments_must_fit(tmp_path, monkeypatch, learns):
    model = shapes("1.7b")
    total = sum(p.numel() for p in model.parameters())
    parts = dict(model.named_children())
    trained = sum(p.numel() for name in learns for p in parts[name].parameters())
    run = run_on(tmp_path, "1.7b", device="cpu", dtype=FP32)
    found = needs(monkeypatch, run, model.config, learns)
    needed = 4 * total + 12 * trained
    assert found == pytest.approx(needed / 1e9, abs=0.06)
    assert model.config.tie_word_embeddings, "else a head learns too"

    monkeypatch.setattr(fit_module, "free_memory", lambda: 0.99 * needed)
    with pytest.raises(SystemExit):
        fit(run, model, learns, 8192)
    assert all(p.is_meta for p in model.parameters()), "no memory was used"
    monkeypatch.setattr(fit_module, "free_memory", lambda: 1.01 * needed)
    assert fit(run, model, learns, 8192) == {}


def test_stage_0_needs_its_text_tower_too(tmp_path, monkeypatch):
    run = run_on(tmp_path, "8b", device="cpu", dtype=FP32)
    trained, frozen = counted(job_of(PRESETS["8b"], ("vit",), 0, 1, compiled=False))
    found = needs(monkeypatch, run, PRESETS["8b"], ("vit",))
    assert found == pytest.approx((16 * trained + 4 * frozen) / 1e9, abs=0.06)
    assert trained > 1.9 * sum(p.numel() for p in shapes("8b").vit.parameters())


def test_ranks_of_a_machine_share_its_memory_and_machines_share_the_model(tmp_path, monkeypatch):
    """8 ranks: on one machine they hold all of it, on two half of it each."""
    def on(world, local, **more):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
        run = run_on(tmp_path, "8b", world=world, device="cpu", dtype=FP32)
        return needs(monkeypatch, run, PRESETS["8b"], **more)

    alone = on(1, 1)
    assert on(8, 8) == alone
    assert on(8, 4) == pytest.approx(alone / 2, abs=0.06)
    # a whole copy of the weights beside each rank's part, as GRPO's sampler is
    assert on(8, 8, copies=1.0) == pytest.approx(alone + 8 * alone / 4, abs=0.3)


def test_the_machine_with_least_room_decides_for_all_ranks(tmp_path, monkeypatch):
    monkeypatch.setattr(fit_module, "free_memory", lambda: 1e12)
    run = run_on(tmp_path, "8b", world=2, device="cpu", dtype=FP32)
    refuse_beyond_memory(run, PRESETS["8b"])
    run.gather = lambda values: [values, [64e9]]
    with pytest.raises(SystemExit, match=" 64.0 GB are left"):
        refuse_beyond_memory(run, PRESETS["8b"])


@pytest.mark.parametrize("size, gigabytes", [("toy", 0.1), ("tiny", 0.5), ("small", 2)])
def test_small_sizes_fit_everywhere(tmp_path, monkeypatch, size, gigabytes):
    run = run_on(tmp_path, size, device="cpu", dtype=FP32)
    for learns in (EVERYTHING, ("vit",)):
        assert needs(monkeypatch, run, PRESETS[size], learns) < gigabytes


def test_with_a_card_the_machines_memory_is_not_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(fit_module, "free_memory", lambda: 0.0)
    refuse_beyond_memory(run_on(tmp_path, "8b"), PRESETS["8b"])


@pytest.mark.parametrize("groups, limits, room", [
    (None, {}, 20_480_000),  # no control groups
    ("0::/", {}, 20_480_000),
    ("0::/", {"memory.max": "max"}, 20_480_000),
    ("0::/", {"memory.max": "9000000"}, 9_000_000),
    # of a job, around the group of this process
    ("0::/job/step", {"job/memory.max": "8000000", "job/step/memory.max": "max"}, 8_000_000),
    # a container's own limit, where the path is the host's
    ("0::/docker/7", {"memory.max": "7000000"}, 7_000_000),
    ("3:cpu:/a\n4:memory:/b", {"memory/b/memory.limit_in_bytes": "6000000"}, 6_000_000),
    ("4:memory:/", {"memory/memory.limit_in_bytes": str(2**63 - 4096)}, 20_480_000),
])
def test_the_memory_of_a_machine_and_of_its_control_groups(
    tmp_path, monkeypatch, groups, limits, room
):
    proc, root = tmp_path / "proc", tmp_path / "groups"
    monkeypatch.setattr(fit_module, "PROC", proc)
    monkeypatch.setattr(fit_module, "CGROUPS", root)
    assert free_memory() == float("inf"), "nothing is known"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 90000 kB\nMemFree: 5 kB\nMemAvailable:  20000 kB\n")
    if groups is not None:
        (proc / "self" / "cgroup").write_text(groups + "\n")
    for name, limit in limits.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(limit + "\n")
    assert free_memory() == room


def test_a_model_of_another_shape_than_the_sizes_is_said(tmp_path):
    run = run_on(tmp_path, "tiny", device="cpu", dtype=FP32)
    fit(run, shapes("toy"), EVERYTHING, 4096)
    [said] = run.said
    assert "3 layers of 96, --size tiny would have 8 layers of 384" in said


# ----------------------------------------------------------------------------------------------
# recipes


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_recipe_gives_weights_and_moments_their_dtypes(tmp_path, monkeypatch, recipe):
    Cards(monkeypatch, least(recipe, "1.7b", world=1))
    model = shapes("1.7b")
    keep = fit(run_on(tmp_path, "1.7b"), model, EVERYTHING, 8192)
    weight, moment = RECIPES[recipe]
    assert {p.dtype.itemsize for p in model.parameters()} == {weight}
    assert keep == {"moments": FP32 if moment == 4 else BF16, "compiled": False}
    assert all(p.is_meta for p in model.parameters()), "no memory yet"


@pytest.mark.parametrize("learns, asleep", [
    (("projector",), ["vit", "decoder", "lm_head"]),
    (("decoder",), ["vit", "projector"]),
    (("vit",), ["projector", "decoder", "lm_head"]),
    (EVERYTHING, []),
])
@pytest.mark.parametrize("recipe", ["fp32", "fp32, bf16 moments"])
def test_frozen_parts_of_released_sizes_are_held_in_bf16(
    tmp_path, monkeypatch, learns, asleep, recipe
):
    """A head that is no embedding goes with the decoder."""
    Cards(monkeypatch, least(recipe, "8b", learns=learns))
    model = shapes("8b")
    keep = fit(run_on(tmp_path, "8b", world=8), model, learns, 8192)
    assert keep["moments"] == (FP32 if recipe == "fp32" else BF16)
    held = dtypes(model)
    assert held == {part: {BF16 if part in asleep else FP32} for part in held}
    assert len(held) == 4


def test_in_the_last_recipe_what_learns_is_bf16_too(tmp_path, monkeypatch):
    Cards(monkeypatch, least("bf16", "8b"))
    model = shapes("8b")
    keep = fit(run_on(tmp_path, "8b", world=8), model, EVERYTHING, 8192)
    assert set().union(*dtypes(model).values()) == {BF16}
    assert keep["moments"] == BF16


def test_a_tied_head_learns_with_the_decoder_alone(tmp_path, monkeypatch):
    Cards(monkeypatch, 79)
    for learns, decoder in ((("decoder",), FP32), (("projector",), BF16)):
        model = shapes("0.6b")
        fit(run_on(tmp_path, "0.6b"), model, learns, 8192)
        assert model.lm_head is None and model.head_weight.dtype == decoder


@pytest.mark.parametrize("size, dtype", [("toy", BF16), ("small", BF16), ("0.6b", FP32)])
def test_frozen_parts_stay_in_fp32_where_their_numbers_are(tmp_path, monkeypatch, size, dtype):
    """Of the small sizes, whose weights are our own; and where --dtype asks for it."""
    Cards(monkeypatch, 79)
    model = shapes(size)
    fit(run_on(tmp_path, size, dtype=dtype), model, ("projector",), 8192)
    assert set().union(*dtypes(model).values()) == {FP32}


# ----------------------------------------------------------------------------------------------
# recomputation


def test_a_card_with_room_keeps_all_activations(tmp_path, monkeypatch):
    Cards(monkeypatch, 79)
    model = shapes("small")
    fit(run_on(tmp_path, "small"), model, EVERYTHING, 16384)
    assert again(model) == (0, 0)


def test_the_smaller_the_card_the_more_blocks_run_again(tmp_path, monkeypatch):
    """As many as the plan says, which is printed; the ViT's come first."""
    counts = []
    for total in (140, 120, 100, 79):
        Cards(monkeypatch, total)
        model = shapes("8b")
        run = run_on(tmp_path, "8b", world=8)
        fit(run, model, EVERYTHING, 16384)
        plan = choose(PRESETS["8b"], EVERYTHING, 16384, 8, total * GIB, compiled=False)
        assert again(model) == (plan.recompute_decoder, plan.recompute_vit)
        assert model.recompute == again_by_patches(plan) and model.planned_tokens == 16384
        decoder, vit = again(model)
        assert vit == 27 or not decoder
        [said] = run.said
        assert f"{decoder}/36" in said and f"{vit}/27" in said and f"{total}.00" in said
        if plan.recipe == "fp32":
            counts.append(decoder + vit)
    assert counts == sorted(counts) and counts[0] < counts[-1]


@pytest.mark.parametrize("size, total, world, stays", [
    ("1.7b", 79, 2, True), ("1.7b", 79, 1, False), ("8b", 79, 2, False), ("8b", 140, 8, True),
])
def test_weights_stay_gathered_where_they_fit(tmp_path, monkeypatch, size, total, world, stays):
    Cards(monkeypatch, total)
    model = shapes(size)
    run = run_on(tmp_path, size, world=world)
    fit(run, model, EVERYTHING, 8192)
    assert model.stays_gathered == stays
    [said] = run.said
    assert ("weights, gathered" in said) == stays


@pytest.mark.parametrize("size, stays", [("toy", True), ("small", True), ("1.7b", False)])
def test_without_a_card_the_weights_of_small_models_stay_gathered(
    tmp_path, monkeypatch, size, stays
):
    monkeypatch.setattr(fit_module, "free_memory", lambda: 1e12)
    model = shapes(size)
    fit(run_on(tmp_path, size, device="cpu", dtype=FP32), model, EVERYTHING, 8192)
    assert model.stays_gathered == stays


def test_longer_packs_leave_less_for_activations(tmp_path, monkeypatch):
    Cards(monkeypatch, 100)
    counts = []
    for pack in (8192, 12288, 16384):
        model = shapes("8b")
        fit(run_on(tmp_path, "8b", world=8), model, EVERYTHING, pack)
        counts.append(sum(again(model)))
    assert counts[0] < counts[1] < counts[2]


# ----------------------------------------------------------------------------------------------
# what a card has


def planned(monkeypatch):
    """capacities that choose is asked for, in bytes"""
    asked = []

    def noting(cfg, learns, pack, world, capacity, compiled):
        asked.append(capacity)
        return choose(cfg, learns, pack, world, capacity, compiled=compiled)

    monkeypatch.setattr(fit_module, "choose", noting)
    return asked


def test_what_an_earlier_stage_holds_is_not_there(tmp_path, monkeypatch):
    asked = planned(monkeypatch)
    Cards(monkeypatch, 79, held=3)
    fit(run_on(tmp_path, "toy"), shapes("toy"), EVERYTHING, 4096)
    assert asked == [76 * GIB]


@pytest.mark.parametrize("copies", [1, 1.25])
def test_what_stands_beside_the_model_is_left_free(tmp_path, monkeypatch, copies):
    asked = planned(monkeypatch)
    Cards(monkeypatch, 79)
    model = shapes("0.6b")
    fit(run_on(tmp_path, "0.6b"), model, EVERYTHING, 8192, copies)
    weights = sum(p.numel() for p in model.parameters())
    assert asked == [79 * GIB - copies * 2 * weights]


def test_the_card_with_least_room_decides_for_all(tmp_path, monkeypatch):
    """Ranks that chose apart would hold one tensor in two dtypes, or wait for each other."""
    asked = planned(monkeypatch)
    Cards(monkeypatch, 79)
    run = run_on(tmp_path, "8b", world=4)
    run.gather = lambda values: [values, [64 * GIB], [70 * GIB], values]
    model = shapes("8b")
    fit(run, model, EVERYTHING, 8192)
    plan = choose(PRESETS["8b"], EVERYTHING, 8192, 4, 64 * GIB, compiled=False)
    assert asked == [64 * GIB]
    assert again(model) == (plan.recompute_decoder, plan.recompute_vit)


@pytest.mark.parametrize("gb, capacity, fraction", [
    (40, 40e9, 40e9 / (79 * GIB)),  # a smaller card than this one
    (200, 79 * GIB, 1.0),  # a larger one cannot be had
])
def test_gpu_memory_makes_a_card_smaller(tmp_path, monkeypatch, gb, capacity, fraction):
    asked = planned(monkeypatch)
    cards = Cards(monkeypatch, 79)
    fit(run_on(tmp_path, "toy", gpu_memory=gb), shapes("toy"), EVERYTHING, 4096)
    assert asked == [capacity]
    assert cards.fraction == fraction


def test_without_the_flag_torch_is_given_no_limit(tmp_path, monkeypatch):
    cards = Cards(monkeypatch, 79)
    fit(run_on(tmp_path, "toy"), shapes("toy"), EVERYTHING, 4096)
    assert cards.fraction is None


@pytest.mark.parametrize("total, flags", [(40, {}), (140, {"gpu_memory": 43})])
def test_what_does_not_fit_is_refused_with_its_arithmetic(tmp_path, monkeypatch, total, flags):
    Cards(monkeypatch, total)
    model = shapes("8b")
    run = run_on(tmp_path, "8b", **flags)
    with pytest.raises(SystemExit, match="^a stage does not fit, .*torchrun.*--dry-run") as refusal:
        fit(run, model, EVERYTHING, 8192)
    assert "\n" not in str(refusal.value)
    [said] = run.said
    assert " NO" in said and "weights, trained" in said
    assert {p.dtype for p in model.parameters()} == {FP32}, "nothing was changed"


# ----------------------------------------------------------------------------------------------
# packs at once


@pytest.mark.parametrize("size, world, learns", [
    ("small", 1, EVERYTHING), ("small", 2, ("vit",)), ("0.6b", 8, ("decoder",)),
    ("4b", 16, ("projector",)), ("8b", 8, EVERYTHING),
])
def test_joined_packs_never_need_more_than_the_card_has(
    tmp_path, monkeypatch, size, world, learns
):
    """And the next larger number of packs would: with no block run again, in the best recipe."""
    cfg = PRESETS[size]
    mine = SCALE[size].packs // world
    counts = []
    for total in (2, 24, 80, 141, 10_000):
        Cards(monkeypatch, total, held=1)
        run = run_on(tmp_path, size, world=world, packs=None)
        n = packs_at_once(run, cfg, learns)
        assert mine % n == 0

        def fits(packs, total=total):
            job = job_of(cfg, learns, packs * SCALE[size].pack, world, compiled=False)
            return plan_of(job, BEST, (0, 0), (total - 1) * GIB).fits

        larger = [k for k in range(n + 1, mine + 1) if mine % k == 0]
        assert n == 1 or fits(n)
        assert not any(map(fits, larger))
        if n > 1:  # what is then planned for so many tokens runs nothing again, and fits
            tokens, room = n * SCALE[size].pack, (total - 1) * GIB
            plan = choose(cfg, learns, tokens, world, room, compiled=False)
            assert plan.fits and (plan.recompute_decoder, plan.recompute_vit) == (0, 0)
        counts.append(n)
    assert counts == sorted(counts) and counts[0] == 1
    assert counts[-1] == mine, "enough memory takes all of them"


@pytest.mark.parametrize("size, flags", [
    ("small", {"packs": None}), ("8b", {"packs": None}), ("toy", {"packs": 12}),
])
def test_on_a_cpu_packs_go_one_by_one(tmp_path, size, flags):
    run = run_on(tmp_path, size, device="cpu", **flags)
    assert packs_at_once(run, PRESETS[size], EVERYTHING) == 1


def test_the_card_with_least_room_decides_how_many_packs(tmp_path, monkeypatch):
    Cards(monkeypatch, 80)
    run = run_on(tmp_path, "small", packs=None)
    alone = packs_at_once(run, PRESETS["small"], EVERYTHING)
    run.gather = lambda values: [values, [4 * GIB]]
    assert alone == 4 and packs_at_once(run, PRESETS["small"], EVERYTHING) == 1


# ----------------------------------------------------------------------------------------------
# torch.compile


@pytest.mark.parametrize("size, device, asked, triton, compiled", [
    ("small", "cuda", "auto", True, True),
    ("8b", "cuda", "auto", True, True),
    ("8b", "cuda", "auto", False, False),
    ("toy", "cuda", "auto", True, False),
    ("tiny", "cuda", "auto", True, False),
    ("8b", "cpu", "auto", True, False),
    ("8b", "cuda", "off", True, False),
    ("toy", "cuda", "on", True, True),
    ("toy", "cpu", "on", True, True),
])
def test_blocks_are_compiled_where_it_pays_or_is_asked_for(
    tmp_path, monkeypatch, size, device, asked, triton, compiled
):
    Cards(monkeypatch, 140)
    monkeypatch.setattr(fit_module, "has_triton", lambda: triton)
    model = shapes(size)
    run = run_on(tmp_path, size, world=8, device=device, compile=asked)
    keep = fit(run, model, EVERYTHING, 8192)
    for block in [*model.vit.layers, *model.decoder.layers]:
        assert (block._compiled_call_impl is not None) == compiled
    if device == "cuda":
        assert keep["compiled"] == compiled
