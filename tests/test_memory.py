"""common/memory.py: where a training run's memory goes, and which recipe fits."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from common import memory
from common.memory import (
    CARDS,
    FRAGMENTS,
    GIB,
    RECIPES,
    Job,
    again_by_patches,
    choose,
    counted,
    decoder_saves,
    dry_run,
    estimate,
    flops_per_token,
    moments,
    plan_of,
    size,
    state,
    table,
    vit_saves,
)
from common.run import PEAKS
from kernels import Segments, attention, ours
from model import PRESETS, DecoderLayer, KeyeVL, rope_3d, training_flops
from vit import Block, ViTConfig, rope_2d

EVERYTHING = ("vit", "projector", "decoder")
STAGES = {
    "text": ("decoder",),
    "0": ("vit",),
    "1": ("projector",),
    "2": EVERYTHING,
    "3": EVERYTHING,
}
FP32, LEAN, BF16 = "fp32", "fp32, bf16 moments", "bf16"


# --------------------------------------------------------------------------------------------------
# what autograd keeps


def saved_bytes(forward, module: torch.nn.Module, *known: torch.Tensor) -> int:
    """Bytes of all storages that autograd saves, without the module's and the known ones."""
    seen = {}

    def look(tensor):
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = (storage.nbytes(), tensor)  # alive: no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor):
        result = forward()
    assert result.dtype == torch.bfloat16
    for tensor in (*module.parameters(), *known):
        seen.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(nbytes for nbytes, _ in seen.values())


@pytest.mark.skipif(not ours.available("cpu"), reason="PyTorch's attention copies shared heads")
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(
    "shape", [(256, 768, 4, 2, 64), (512, 1536, 4, 1, 128), (320, 1216, 8, 2, 64)]
)
def test_a_decoder_block_saves_what_the_formula_says(shape, trained):
    C, F, heads, kv_heads, head_dim = shape
    cfg = replace(
        PRESETS["8b"], hidden_size=C, intermediate_size=F, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=head_dim,
        mrope_section=(head_dim // 2, 0, 0),
    )
    block = DecoderLayer(cfg).bfloat16().requires_grad_(trained)
    T = 96
    x = torch.randn(T, C, dtype=torch.bfloat16, requires_grad=True)
    rope = rope_3d(torch.arange(T).repeat(3, 1), cfg)
    segments = Segments.of([T], "cpu")
    found = saved_bytes(lambda: block(x, rope, segments, attention), block, *rope)
    # On a CPU, PyTorch's RMS norm saves its input in fp32, and for the weight's gradient the
    # normalised rows too; on CUDA the bf16 input alone.
    normed = 2 * C + (heads + kv_heads) * head_dim
    on_cpu = (6 if trained else 2) * normed
    assert found / T == pytest.approx(decoder_saves(cfg, trained) + on_cpu, rel=0.01)


@pytest.mark.parametrize("shape", [(128, 512, 4), (288, 1072, 4), (192, 640, 2)])
def test_a_vit_block_saves_what_the_formula_says(shape):
    C, F, heads = shape
    cfg = ViTConfig(C, F, 1, heads)
    block = Block(cfg).bfloat16()
    N = 100
    x = torch.randn(N, C, dtype=torch.bfloat16, requires_grad=True)
    rope = rope_2d([[1, 10, 10]], C // heads, torch.device("cpu"))
    found = saved_bytes(lambda: block(x, Segments.of([N], "cpu"), rope), block, *rope)
    assert found / N == pytest.approx(vit_saves(cfg), rel=0.01)


def test_blocks_at_8b_as_an_h100_measured_them():
    """memory_allocated over four blocks, torch 2.11, 8,192 tokens and 32,768 patches."""
    cfg = PRESETS["8b"]
    assert decoder_saves(cfg) == 162_088
    assert vit_saves(cfg.vision) == pytest.approx(35_800, rel=0.005)
    job = Job(cfg, EVERYTHING, 8192, 1)
    # compiled: in bf16, and with autocast's fp32 residual stream
    assert job.saves(2) == pytest.approx((137_512, 35_920), rel=0.01)
    assert job.saves(4)[0] == pytest.approx(145_704, rel=0.01)


@pytest.mark.parametrize(
    "layers, learns, recipe, again, world, measured",
    [
        (6, EVERYTHING, FP32, (6, 27), 1, 50.72),
        (6, EVERYTHING, FP32, (0, 20), 1, 64.34),
        (6, EVERYTHING, FP32, (6, 27), 2, 29.55),
        (8, EVERYTHING, FP32, (0, 14), 2, 52.35),
    ],
)
def test_steps_as_two_h200_measured_them(
    layers, learns, recipe, again, world, measured, monkeypatch
):
    """max_memory_allocated in GiB over a pack of text and one with 30 pictures, torch 2.11.

    The loss was then computed in larger chunks, and kept one more copy of each.
    """
    monkeypatch.setattr(memory, "MAX_LOGITS", 2**28)
    monkeypatch.setattr(memory, "CHUNK_COPIES", 3)
    job = Job(replace(PRESETS["8b"], num_hidden_layers=layers), learns, 8192, world)
    found = [*moments(job, recipe, again, 0).values()]
    found += moments(job, recipe, again, 30 * 1024).values()
    fullest = max(sum(more.values()) for more in found)
    total = sum(state(job, recipe).values()) + fullest
    assert total / GIB == pytest.approx(measured, rel=0.03)


# --------------------------------------------------------------------------------------------------
# parameters


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_add_up_to_the_model(name):
    model = KeyeVL.shapes(PRESETS[name])
    parts = Job(PRESETS[name], EVERYTHING, 4096, 1).parameters
    assert sum(parts["vit"].values()) == size(model.vit)
    assert sum(parts["projector"].values()) == size(model.projector)
    assert sum(sum(sizes.values()) for sizes in parts.values()) == size(model)
    assert (parts["decoder"]["head"] == 0) == PRESETS[name].tie_word_embeddings


def test_parameters_are_those_of_the_released_models():
    transformers = pytest.importorskip("transformers")
    cfg = PRESETS["8b"]
    facts = {k: v for k, v in cfg.to_json().items() if k in transformers.Qwen3Config().to_dict()}
    facts |= {"rope_scaling": None, "model_type": "qwen3", "architectures": None}
    v = cfg.vision
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    tower = {name: getattr(v, name) for name in names}
    with torch.device("meta"):
        decoder = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**facts))
        vision = transformers.SiglipVisionConfig(**tower, image_size=384, patch_size=14)
        vit = transformers.SiglipVisionModel(vision)
        text = transformers.SiglipTextModel(transformers.SiglipTextConfig(**tower))
    parts = Job(cfg, ("vit", "text"), 8192, 1).parameters
    assert sum(parts["decoder"].values()) == size(decoder) == 8_190_735_360
    assert sum(parts["vit"].values()) + parts["text"]["pooling head"] == size(vit)
    assert parts["text"]["text tower"] == size(text)


def test_state_is_recipe_times_trained_and_weights_of_the_rest():
    job = Job(PRESETS["8b"], ("projector",), 8192, 1)
    projector = sum(job.parameters["projector"].values())
    others = sum(sum(sizes.values()) for sizes in job.parameters.values()) - projector
    for recipe, trained in {FP32: 16, LEAN: 12, BF16: 8}.items():
        assert sum(state(job, recipe).values()) == trained * projector + 2 * others


# --------------------------------------------------------------------------------------------------
# plans


@pytest.mark.parametrize("learns", dict.fromkeys(STAGES.values()))
@pytest.mark.parametrize("recipe", RECIPES)
def test_more_cards_need_less_of_each_and_longer_packs_more(learns, recipe):
    cfg = replace(PRESETS["1.7b"], num_hidden_layers=4)

    def total(pack, world):
        job = Job(cfg, learns + ("text",) * (learns == ("vit",)), pack, world)
        return plan_of(job, recipe, job.layers, 0).total

    by_world = [total(8192, world) for world in (2, 4, 8, 64)]
    assert by_world == sorted(by_world, reverse=True) and by_world[0] > by_world[-1]
    by_pack = [total(pack, 2) for pack in (1024, 4096, 8192, 32768)]
    assert by_pack == sorted(by_pack) and by_pack[0] < by_pack[-1]


def test_more_memory_means_a_better_recipe_and_less_run_again():
    plans = [choose(PRESETS["1.7b"], EVERYTHING, 8192, 1, n * GIB) for n in range(20, 140, 8)]
    assert [plan.fits for plan in plans] == sorted(plan.fits for plan in plans)
    fitting = [plan for plan in plans if plan.fits]
    recipes = [list(RECIPES).index(plan.recipe) for plan in fitting]
    assert recipes == sorted(recipes, reverse=True) and set(recipes) == {0, 1, 2}
    for before, after in pairwise(fitting):
        if before.recipe == after.recipe:
            assert after.recompute_decoder <= before.recompute_decoder
            assert after.recompute_vit <= before.recompute_vit
    assert (fitting[-1].recompute_decoder, fitting[-1].recompute_vit) == (0, 0)
    # the ViT's activations are kept only where the decoder's are
    assert all(p.recompute_vit == 27 or not p.recompute_decoder for p in fitting)


def plan_on(gpu: str, size: str, learns, world: int = 1):
    return choose(PRESETS[size], learns, 8192, world, CARDS[gpu] * GIB)


@pytest.mark.parametrize(
    "gpu, size, world", [("H200", "8b", 1), ("H100", "8b", 2), ("H100", "8b", 8), ("H100", "4b", 1)]
)
def test_every_stage_fits(gpu, size, world):
    for learns in STAGES.values():
        assert plan_on(gpu, size, learns, world).fits


def test_what_fits_into_24_gb():
    for learns in STAGES.values():
        assert plan_on("RTX 4090", "1.7b", learns).fits
    projector = plan_on("RTX 4090", "8b", ("projector",))
    assert projector.fits and projector.recompute_decoder > 0
    assert projector.bytes["weights, frozen"] == pytest.approx(17.2e9, rel=0.01)  # in bf16
    assert not plan_on("RTX 4090", "8b", EVERYTHING).fits


def test_what_does_not_fit():
    plan = plan_on("H100", "8b", EVERYTHING)  # 8.6 billion x 8 bytes leave it 14 GiB
    assert plan.recipe == BF16 and plan.recompute_decoder > 0
    assert not plan_on("A100 40GB", "8b", EVERYTHING).fits
    # 16 bytes a parameter are 129 GiB
    assert plan_on("H200", "8b", EVERYTHING).recipe == LEAN


@pytest.mark.parametrize("gpu, size, world, learns", [
    ("H100", "1.7b", 1, EVERYTHING),  # part of the ViT
    ("H100", "8b", 2, EVERYTHING),  # all of it, and part of the decoder
    ("H100", "8b", 8, EVERYTHING),
    ("H200", "8b", 1, ("decoder",)),  # no patches
    ("A100 40GB", "8b", 1, ("vit",)),
    ("H100", "small", 1, EVERYTHING),  # nothing
])
def test_packs_of_fewer_patches_run_less_again(gpu, size, world, learns):
    """As little as still fits, whatever their number."""
    plan = plan_on(gpu, size, learns, world)

    def fits(again, patches):
        return plan_of(plan.job, plan.recipe, again, plan.capacity, patches=(patches,)).fits

    rows = again_by_patches(plan)
    assert rows[-1][0] == plan.job.patches
    assert all(decoder <= plan.recompute_decoder and vit <= plan.recompute_vit
               for _, decoder, vit in rows)
    before = 0
    for most, decoder, vit in rows:
        for patches in range(before, most + 1, max(1, plan.job.patches // 64)):
            assert fits((decoder, vit), patches), (patches, decoder, vit)
        if decoder:
            assert not fits((decoder - 1, vit), most)
        elif vit:
            assert not fits((0, vit - 1), most)
        before = most
    assert [row[1:] for row in rows] == sorted({row[1:] for row in rows})


def test_a_pack_that_is_half_pictures_keeps_what_a_full_one_cannot():
    rows = again_by_patches(plan_on("H100", "1.7b", EVERYTHING))
    assert rows[0] == (20480, 0, 0) and rows[-1] == (32768, 0, 9)


def test_weights_stay_gathered_where_all_else_has_its_room():
    """Two bytes for each weight of the model, over several cards, and no block runs again for it."""
    for size, world, learns in (("1.7b", 2, EVERYTHING), ("4b", 8, ("projector",))):
        plan = plan_on("H100", size, learns, world)
        assert plan.job.gathered and plan.fits and plan.total <= plan.capacity
        assert plan.bytes["weights, gathered"] == 2 * sum(counted(plan.job))
        assert (plan.recompute_decoder, plan.recompute_vit) == (0, 0)
    assert not plan_on("H100", "0.6b", EVERYTHING).job.gathered, "one card holds them anyway"

    tight = plan_on("H100", "8b", EVERYTHING, 2)
    assert not tight.job.gathered and "weights, gathered" not in tight.bytes
    again = tight.recompute_decoder, tight.recompute_vit
    gathered = replace(tight.job, gathered=True)
    more = plan_of(gathered, tight.recipe, again, tight.capacity)
    assert not more.fits


def test_stage_0_gathers_its_towers_alone():
    plan = plan_on("H100", "1.7b", ("vit",), 2)
    trained, frozen = counted(plan.job)
    assert plan.job.gathered and frozen > trained
    assert plan.bytes["weights, gathered"] == 2 * trained


def test_what_is_gathered_is_left_free_in_packs_of_fewer_patches_too():
    """Of the smallest card on which 8b's blocks all run again and its weights stay."""
    job = Job(PRESETS["8b"], EVERYTHING, 8192, 8, gathered=True)
    needed = plan_of(job, FP32, job.layers, 0)
    for more in range(60):
        capacity = (needed.total + needed.allowance + more * GIB) / (1 - FRAGMENTS)
        plan = choose(PRESETS["8b"], EVERYTHING, 8192, 8, capacity)
        before = 0
        for most, *again in again_by_patches(plan):
            for patches in (before, most):
                row = plan_of(plan.job, plan.recipe, tuple(again), capacity, patches=(patches,))
                assert row.fits and ("weights, gathered" in row.bytes) == plan.job.gathered
            before = most


def test_only_what_is_trained_runs_again():
    text = choose(PRESETS["8b"], ("decoder",), 8192, 1, CARDS["H200"] * GIB)
    assert text.recompute_vit == 0 and text.bytes["ViT blocks"] == 0
    first = choose(PRESETS["8b"], ("vit",), 8192, 1, CARDS["A100 40GB"] * GIB)
    assert first.recompute_decoder == 0 and first.recompute_vit > 0
    assert first.bytes["text tower"] > 0 and first.bytes["decoder blocks"] == 0


# --------------------------------------------------------------------------------------------------
# time and print


def test_flops_are_those_of_the_log():
    cfg = PRESETS["8b"]
    # notes of other code bases: 47.2 GFLOP a token in documents of 2,048, causal attention once
    assert flops_per_token(Job(cfg, ("decoder",), 8192, 1)) == pytest.approx(47.2e9, rel=0.001)
    both = training_flops(cfg, [512], [(1, 32, 32)]) / 512
    assert flops_per_token(Job(cfg, EVERYTHING, 8192, 1)) == both
    assert flops_per_token(Job(cfg, ("projector",), 8192, 1)) < both


def test_time_follows_from_peak_and_mfu(monkeypatch):
    monkeypatch.setattr(memory, "MFU", {"text": (0.4, 0.3), "pairs": (0.2, 0.1)})
    cfg = PRESETS["8b"]
    job = Job(cfg, ("decoder",), 8192, 8)
    speed, days = estimate(plan_of(job, FP32, (0, 0), 0), "H100")
    assert speed == pytest.approx(8 * 989e12 * 0.4 / flops_per_token(job))
    assert days == pytest.approx(600e9 / speed / 86400)
    half, _ = estimate(plan_of(job, FP32, (18, 0), 0), "H100", 1.0)
    assert half / speed == pytest.approx(0.35 / 0.4)
    pairs = Job(cfg, ("vit", "text"), 8192, 8)
    speed, _ = estimate(plan_of(pairs, FP32, (0, 0), 0), "H100")
    assert speed == pytest.approx(8 * 989e12 * 0.2 / flops_per_token(pairs))


def test_every_card_has_a_peak():
    assert all(any(card in gpu for card in PEAKS) for gpu in CARDS)


def test_the_table_shows_every_byte():
    plans = [choose(PRESETS["8b"], n, 8192, 2, CARDS["H100"] * GIB, k) for k, n in STAGES.items()]
    rows = {}
    for row in table(*plans).split("\n"):
        rows[row[:19].strip()] = row[19 : 19 + 9 * len(plans)].split()
    assert rows["GiB on each card"] == list(STAGES)
    for i, plan in enumerate(plans):
        shown = [rows[name][i] for name in memory.FORMULAS if name in rows]
        assert sum(float(n) for n in shown if n != "-") == pytest.approx(plan.total / GIB, abs=0.1)
        assert rows["all tensors"][i] == f"{plan.total / GIB:.2f}"
        assert rows["run again: decoder"][i] == f"{plan.recompute_decoder}/{plan.job.layers[0]}"


@pytest.mark.parametrize("name", PRESETS)
def test_a_dry_run_of_every_size(name):
    said = dry_run(PRESETS[name], STAGES, 4096, 3, "A100", 4)
    assert "4 x A100, 3 packs of 4,096 tokens a card and step" in said and "days" in said
    assert all(stage in said for stage in STAGES)


def test_a_dry_run_plans_the_packs_that_go_through_together():
    """As a run does: small trains its packs as one, 8b's projector several, all of 8b one by one."""
    stages = {"1": ("projector",), "2": EVERYTHING}
    small = dry_run(PRESETS["small"], stages, 8192, 4, "H100", 1)
    large = dry_run(PRESETS["8b"], stages, 8192, 4, "H100", 2)
    assert column(small, "packs as one") == ["4", "4"]
    assert column(large, "packs as one") == ["2", "1"]
    planned = choose(PRESETS["8b"], ("projector",), 2 * 8192, 2, memory.CARDS["H100"] * GIB)
    assert column(large, "all tensors")[0] == f"{planned.total / GIB:.2f}"
    assert column(large, "card") == ["79.20", "79.20"]


def test_a_dry_run_of_a_part_of_a_card():
    said = dry_run(PRESETS["8b"], {"2": EVERYTHING}, 8192, 1, "H100", 1, limit=24e9)
    assert column(said, "card") == [f"{24e9 / GIB:.2f}"] and column(said, "fits") == ["NO"]


@pytest.mark.parametrize("name", PRESETS)
def test_a_dry_run_of_as_many_cards_as_there_can_be(name):
    """However few tokens are left to each: nothing divides by zero."""
    for pack in (1, 5, 8192):
        said = dry_run(PRESETS[name], STAGES, pack, 1, "H100", memory.MOST_CARDS)
        assert f"65536 x H100, 1 packs of {pack:,} tokens" in said


@pytest.mark.parametrize("pack, world, said", [
    (8192, 65_537, "--gpus 65537: a dry run plans for at most 65,536 cards"),
    (0, 1_000_000, "--gpus 1000000: a dry run plans for at most 65,536 cards"),
    (0, 60_000, "--gpus 60000: a step has too few tokens for so many cards"),
])
def test_a_dry_run_of_more_cards_is_refused(pack, world, said):
    with pytest.raises(SystemExit) as refusal:
        dry_run(PRESETS["8b"], {"2": EVERYTHING}, pack, 1, "H100", world)
    assert str(refusal.value) == said


def column(said: str, name: str) -> list[str]:
    """The cells of a row: nine characters each behind its name, up to the formula or note."""
    [row] = [row for row in said.split("\n") if row.strip().startswith(name)]
    cells = [row[at : at + 9] for at in range(19, len(row), 9)]
    return [cell.strip() for cell in cells[: len(said_stages(said))]]


def said_stages(said: str) -> list[str]:
    [head] = [row for row in said.split("\n") if row.startswith("GiB on each card")]
    return head[19:].split()[:-1]  # but "bytes"
