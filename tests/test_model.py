"""Decoder, 3D RoPE, projector, cache and loss, against transformers and against themselves packed
and cached; sizes and the work of a step."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5_vl
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig

from common.weights import QWEN3_NAMES, UNUSED, load_weights, read_config
from conftest import make_batch, split_batch
from model import (
    PRESETS,
    SCALE,
    Config,
    KeyeVL,
    cross_entropy_sum,
    rope_3d,
    sample_flops,
    sincos_2d,
    step_work,
    token_logprobs,
    training_flops,
)
from vit import ViTConfig, rotate

TINY = Config(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    mrope_section=(2, 3, 3),
    bos_token_id=80,
    eos_token_id=82,
    vision_start_token_id=89,
    vision_end_token_id=90,
    image_token_id=92,
    video_token_id=93,
    vision=ViTConfig(48, 80, 2, 4, image_size=84),
)
# text tokens and (frames, rows, columns) of patches
SAMPLES = [[3, (1, 4, 4), 6], [9], [2, (3, 2, 4), 4, (1, 2, 2), 5]]
GRIDS_OF = [1, 0, 2]


def fresh(cfg=TINY, seed=0):
    torch.manual_seed(seed)
    return KeyeVL(cfg).init_weights()


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def gradients(keye, batches):
    keye.zero_grad()
    total = sum(keye.loss(batch)[0] for batch in batches)
    total.backward()
    return total.detach(), {name: p.grad.clone() for name, p in keye.named_parameters()}


def test_the_fresh_position_table_tells_rows_and_columns_apart():
    side, width = 6, 20
    table = sincos_2d(side, width).unflatten(0, (side, side))  # (row, column, width)
    near = (table[0, 0] - table[0, 1]).norm()
    torch.testing.assert_close(near, (table[0, 0] - table[1, 0]).norm())
    assert 0 < near < (table[0, 0] - table[1, 1]).norm() < (table[0, 0] - table[5, 5]).norm()
    codes = table.flatten(0, 1)
    assert torch.cdist(codes, codes).fill_diagonal_(1).min() > 0.05


# -- against transformers --------------------------------------------------------------------------


def qwen3(cfg):
    torch.manual_seed(1)
    facts = Qwen3Config(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.hidden_size,
        intermediate_size=cfg.intermediate_size,
        num_hidden_layers=cfg.num_hidden_layers,
        num_attention_heads=cfg.num_attention_heads,
        num_key_value_heads=cfg.num_key_value_heads,
        head_dim=cfg.head_dim,
        rms_norm_eps=cfg.rms_norm_eps,
        tie_word_embeddings=cfg.tie_word_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta},
        initializer_range=0.2,
    )
    theirs = Qwen3ForCausalLM(facts).eval()
    for name, p in theirs.named_parameters():
        if "norm" in name:  # fresh ones are all 1, and then their place does not matter
            nn.init.uniform_(p, 0.5, 2)
    return theirs


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("theta", [1e6, 5e3])
def test_a_qwen3_folder_gives_the_logits_of_transformers(tmp_path, tied, theta):
    theirs = qwen3(replace(TINY, tie_word_embeddings=tied, rope_theta=theta))
    theirs.save_pretrained(tmp_path)
    cfg = Config.from_json(read_config(tmp_path))
    assert cfg.tie_word_embeddings == tied
    ours = fresh(replace(cfg, vision=TINY.vision))
    load_weights(ours, tmp_path, QWEN3_NAMES, UNUSED)
    batch = make_batch(TINY, [[17], [5]])
    with torch.no_grad():
        logits = ours.logits(batch)
        for a, b in ((0, 17), (17, 22)):
            want = theirs(input_ids=batch["tokens"][None, a:b]).logits[0]
            close(logits[a:b], want, 1e-4)


def test_rope_3d_equals_qwen2_5_vl():
    """Qwen2.5-VL lays its sections out over the channels in the same way as Keye."""
    section = list(TINY.mrope_section)
    rope = {"rope_type": "default", "rope_theta": TINY.rope_theta, "mrope_section": section}
    cfg = Qwen2_5_VLTextConfig(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=4, rope_parameters=rope
    )
    positions = torch.randint(0, 50, (3, 11))
    q = torch.randn(11, 4, 16)
    cos, sin = qwen2_5_vl.Qwen2_5_VLRotaryEmbedding(cfg)(q, positions[:, None])
    heads = q.transpose(0, 1)[None]
    if cos.dim() == 4:  # older versions mix the sections when they apply them
        apply = qwen2_5_vl.apply_multimodal_rotary_pos_emb
        want, _ = apply(heads, heads, cos, sin, section)
    else:
        want, _ = qwen2_5_vl.apply_rotary_pos_emb(heads, heads, cos, sin)
    close(rotate(q, *rope_3d(positions, TINY)), want[0].transpose(0, 1))


def test_projector_merges_like_keye():
    """Against loops that follow the released rule: block row by row, in a block top-left,
    top-right, bottom-left, bottom-right."""
    p = fresh().projector
    features = torch.randn(2 * 4 * 6, 48)
    frames = features.view(2, 4, 6, 48)
    rows = []
    for t in range(2):
        for i in range(0, 4, 2):
            for j in range(0, 6, 2):
                cells = frames[t, i : i + 2, j : j + 2].reshape(4, 48)
                cells = F.layer_norm(cells, (48,), p.pre_norm.weight, p.pre_norm.bias, 1e-5)
                rows.append(cells.flatten())
    want = p.linear_2(F.gelu(p.linear_1(torch.stack(rows))))
    close(p(features, torch.tensor([[2, 4, 6]])), want)


# -- config.json -----------------------------------------------------------------------------------


def test_config_comes_back_from_its_json():
    for cfg in [TINY, *PRESETS.values()]:
        assert Config.from_json(cfg.to_json()) == cfg


def test_rope_of_transformers_5_is_read():
    facts = TINY.to_json()
    del facts["rope_theta"], facts["rope_scaling"]
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2]}
    got = Config.from_json(facts | {"rope_parameters": rope})
    assert got == replace(TINY, rope_theta=5e6, mrope_section=(4, 2, 2))


def test_the_decoder_may_stand_in_text_config():
    facts = TINY.to_json() | {"dtype": "bfloat16"}
    vision = facts.pop("vision_config")
    text = facts | {"model_type": "qwen3", "dtype": "float32"}
    outer = {"model_type": "keye", "dtype": "bfloat16", "text_config": text}
    assert Config.from_json(outer | {"vision_config": vision}) == TINY

    text["rope_parameters"] = text.pop("rope_scaling") | {"rope_theta": text.pop("rope_theta")}
    ids = {name: text.pop(name) for name in ("image_token_id", "tie_word_embeddings")}
    assert Config.from_json(outer | ids | {"vision_config": vision}) == TINY
    with pytest.raises(ValueError, match="its/config.json: tie_word_embeddings is True in text"):
        text["tie_word_embeddings"] = True
        Config.from_json(outer | ids, "its/config.json")


ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
OTHER_DECODERS = [
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "type is 'linear'"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "type is 'dynamic'"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type is 'llama3'"),
    ({"rope_scaling": {"type": "mrope", "rope_type": "longrope"}}, "rope_type is 'longrope'"),
    ({"rope_parameters": ROPE | {"factor": 4.0}}, "rope_parameters.factor is 4.0"),
    ({"rope_parameters": ROPE | {"attention_factor": 0.9}}, "rope_parameters.attention_factor"),
    ({"rope_parameters": ROPE | {"mscale": 0.7}}, "rope_parameters.mscale is 0.7"),
    ({"rope_parameters": ROPE | {"mrope_interleaved": True}}, "mrope_interleaved is True"),
    ({"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    ({"rope_parameters": {"full_attention": ROPE}}, "rope_parameters.full_attention is"),
    ({"rope_parameters": ROPE | {"rope_theta": 1e4}}, "rope_theta is 10000.0 in rope_parameters"),
    ({"rope_parameters": ROPE | {"mrope_section": [3, 3, 2]}}, "mrope_section is .* in rope_scal"),
    ({"rope_parameters": "default"}, "'default', where an object was expected"),
    ({"rope_scaling": {"type": "mrope", "mrope_section": [4, 4, 8]}}, "mrope_section is .4, 4, 8"),
    ({"rope_scaling": {"type": "mrope", "mrope_section": 8}}, "mrope_section is 8; want three"),
    ({"rope_scaling": {"type": "mrope"}}, "mrope_section is None"),
    ({"rope_scaling": None}, "mrope_section is None"),
    ({"partial_rotary_factor": 0.25}, "partial_rotary_factor is 0.25"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
    ({"attention_bias": True}, "attention_bias is True"),
    ({"mlp_bias": True}, "mlp_bias is True"),
    ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
    ({"use_qk_norm": False}, "use_qk_norm is False"),
    ({"use_mrope": False}, "use_mrope is False"),
    ({"mlp_only_layers": [1]}, "mlp_only_layers is"),
    ({"sliding_window": 4096}, "sliding_window is 4096"),
    ({"sliding_window": 4096, "use_sliding_window": True}, "sliding_window is 4096"),
    ({"use_sliding_window": True}, "use_sliding_window is True"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is .*sliding"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
    ({"query_pre_attn_scalar": 224}, "query_pre_attn_scalar is 224"),
    ({"embedding_multiplier": 12}, "embedding_multiplier is 12"),
    ({"logit_scale": 0.5}, "logit_scale is 0.5"),
    ({"num_experts": 64}, "num_experts is 64"),
    ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
    ({"text_config": {"hidden_act": "gelu"}}, "hidden_act is 'gelu' in text_config"),
    ({"text_config": {"residual_multiplier": 0.2}}, "residual_multiplier is 0.2"),
    ({"rope_theta": None}, "no rope_theta"),
    ({"num_key_value_heads": None}, "no num_key_value_heads"),
    ({"hidden_size": "64"}, "hidden_size is '64'; want a positive int"),
    ({"hidden_size": 64.0}, "hidden_size is 64.0; want a positive int"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0; want a positive int"),
    ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; want a positive float"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
    ({"eos_token_id": -1}, "eos_token_id is -1"),
    ({"vision_config": []}, "vision_config: .., where an object was expected"),
    ({"vision_config": "siglip"}, "vision_config: 'siglip', where an object was expected"),
    ({"vision_config": None}, "vision_config: None, where an object was expected"),
    ({"text_config": [1]}, "text_config: .1., where an object was expected"),
    ({"text_config": None}, "text_config: None, where an object was expected"),
]


@pytest.mark.parametrize("change, said", OTHER_DECODERS)
def test_another_kind_of_decoder_is_refused(change, said):
    with pytest.raises(ValueError, match=f"its/config.json[:,] .*{said}"):
        Config.from_json(TINY.to_json() | change, "its/config.json")


@pytest.mark.parametrize(
    "change, said",
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'gelu_pytorch_tanh' is built here"),
        ({"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu'"),
        ({"num_channels": 1}, "num_channels is 1; only 3"),
        ({"patch_size": 16}, "patch_size is 16; only 14"),
        ({"spatial_merge_size": 1}, "spatial_merge_size is 1; only 2"),
        ({"temporal_patch_size": 4}, "temporal_patch_size is 4; only 1 or 2"),
        ({"tokens_per_second": 4}, "tokens_per_second is 4; only 2"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"rope_theta": 1e6}, "rope_theta is 1000000.0; only 10000"),
        ({"rope_parameters": {"rope_theta": 5e3}}, "rope_theta is 5000.0; only 10000"),
        ({"qkv_bias": False}, "qkv_bias is False; only True"),
        ({"window_size": 112}, "window_size is 112; nothing here honours that"),
        ({"fullatt_block_indexes": [1]}, "fullatt_block_indexes is .1."),
        ({"layer_scale_init": 0.1}, "layer_scale_init is 0.1"),
        ({"image_size": "384"}, "image_size is '384'; want a positive int"),
        ({"num_attention_heads": None}, "no num_attention_heads"),
    ],
)
def test_another_kind_of_vit_is_refused(change, said):
    facts = TINY.to_json()
    facts["vision_config"] |= change
    with pytest.raises(ValueError, match=f"its/config.json, vision_config: {said}"):
        Config.from_json(facts, "its/config.json")


def test_what_changes_nothing_is_passed_over():
    notes = {
        "_name_or_path": "a/b", "_attn_implementation_autoset": True, "architectures": ["Keye"],
        "attn_implementation": "sdpa", "auto_map": {"AutoConfig": "x.Y"}, "dtype": "float16",
        "id2label": {"0": "LABEL_0"}, "initializer_factor": 1.0, "initializer_range": 0.1,
        "layer_types": None, "max_window_layers": 1, "pad_token_id": 7, "pruned_heads": {},
        "return_dict": True, "output_attentions": False, "temperature": 0.7, "top_k": 50,
        "torch_dtype": "bfloat16", "transformers_version": "4.41.2", "use_cache": False,
        "unsloth_fixed": True, "vision_token_id": 5, "mlp_bias": False, "author": "me",
    }
    facts = TINY.to_json() | notes
    facts["vision_config"] |= notes | {"vision_use_head": True, "tie_word_embeddings": True}
    assert Config.from_json(facts) == TINY
    text = TINY.to_json() | notes | {"layer_types": ["full_attention"] * 2}
    text |= {"use_sliding_window": False, "sliding_window": 4096}
    assert Config.from_json({"text_config": text, **notes}) == TINY


def test_settings_of_the_vit_are_honoured():
    facts = TINY.to_json()
    facts["vision_config"] |= {"layer_norm_eps": 1e-3, "image_size": 56}
    vision = Config.from_json(facts).vision
    assert vision == replace(TINY.vision, layer_norm_eps=1e-3, image_size=56)


@pytest.mark.parametrize("change, said", [
    ({"num_attention_heads": 3, "num_key_value_heads": 2}, "num_key_value_heads must divide"),
    ({"vision_config": None}, "no vision_config"),
    ({"image_token_id": None}, "image_token_id or video_token_id is beyond vocab_size"),
])
def test_a_model_that_cannot_be_is_refused_before_it_is_built(tmp_path, change, said):
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_json() | change))
    with pytest.raises(ValueError, match=f"{tmp_path / 'config.json'}: {said}"):
        KeyeVL.from_pretrained(tmp_path)


# -- packs -----------------------------------------------------------------------------------------


def test_packed_equals_one_at_a_time_in_logits_and_gradients():
    keye = fresh()
    batch = make_batch(TINY, SAMPLES)
    singles = split_batch(batch, GRIDS_OF)
    close(keye.logits(batch), torch.cat([keye.logits(s) for s in singles]))
    packed, want = gradients(keye, [batch]), gradients(keye, singles)
    torch.testing.assert_close(packed[0], want[0], rtol=1e-6, atol=1e-5)
    for name, grad in packed[1].items():
        other = want[1][name]
        assert (grad - other).norm() <= 1e-5 * (1 + other.norm()), name


def test_samples_of_a_pack_never_see_each_other():
    keye = fresh()
    batch = make_batch(TINY, SAMPLES)
    changed = dict(batch, tokens=batch["tokens"].clone(), patches=batch["patches"].clone())
    changed["tokens"][0] = (changed["tokens"][0] + 1) % 80
    changed["patches"][:16] = 255 - changed["patches"][:16]  # the first sample's picture
    before = keye.logits(batch)
    after = keye.logits(changed)
    end = int(batch["segments"][1])
    assert torch.equal(before[end:], after[end:])
    assert not torch.allclose(before[:end], after[:end])


def test_batch_without_pictures_trains_every_part():
    keye = fresh()
    loss, n = keye.loss(make_batch(TINY, [[7], [4]]))
    loss.backward()
    assert n == 9
    # zero-row vision keeps every rank's collectives the same
    assert all(p.grad is not None for p in keye.parameters())
    assert not any(p.grad.any() for p in keye.vit.parameters())


def test_batch_without_labels_has_a_loss_of_zero():
    batch = make_batch(TINY, SAMPLES)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    keye = fresh()
    loss, n = keye.loss(batch)
    loss.backward()
    assert (loss.item(), n) == (0, 0)
    assert not any(p.grad.any() for p in keye.parameters())


def test_wrong_placeholder_count_is_named():
    batch = make_batch(TINY, [[3, (1, 4, 4), 6]])
    batch["tokens"][3] = 5
    with pytest.raises(ValueError, match="3 picture and video placeholders, but 4 visual tokens"):
        fresh().loss(batch)


def test_activation_checkpointing_changes_nothing():
    keye = fresh()
    batch = make_batch(TINY, SAMPLES)
    _, want = gradients(keye, [batch])
    keye.decoder.recompute = 1
    keye.vit.recompute = 1
    _, got = gradients(keye, [batch])
    assert all(torch.equal(want[name], grad) for name, grad in got.items())


def test_a_packs_patches_decide_how_many_blocks_run_again():
    keye = fresh()
    batch = make_batch(TINY, SAMPLES)
    _, want = gradients(keye, [batch])
    patches = len(batch["patches"])
    for most, blocks in ((patches - 1, (1, 2)), (patches, (0, 1))):
        keye.recompute = [(most, 0, 1), (2 * patches, 1, 2)]
        keye.planned_tokens = len(batch["tokens"])
        _, got = gradients(keye, [batch])
        assert (keye.decoder.recompute, keye.vit.recompute) == blocks
        assert all(torch.equal(want[name], grad) for name, grad in got.items())
    keye.planned_tokens -= 1  # a longer pack than planned: what the fullest one needs
    gradients(keye, [batch])
    assert (keye.decoder.recompute, keye.vit.recompute) == (1, 2)


# -- the KV cache ----------------------------------------------------------------------------------


def part(sample, start, end, grids):
    """Tokens start:end of a pack of one sample, with these of its pictures."""
    patches = slice(*(int(sample["grids"][:g].prod(1).sum()) for g in (grids.start, grids.stop)))
    return {
        "tokens": sample["tokens"][start:end],
        "positions": sample["positions"][:, start:end],
        "patches": sample["patches"][patches],
        "grids": sample["grids"][grids],
    }


def pack(parts):
    sizes = [len(p["tokens"]) for p in parts]
    batch = {"segments": torch.tensor([0] + sizes).cumsum(0).int()}
    for key in parts[0]:
        batch[key] = torch.cat([p[key] for p in parts], 1 if key == "positions" else 0)
    return batch


@pytest.mark.parametrize("cut", [1, 4, 9])
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward(cut):
    keye = fresh()
    singles = split_batch(make_batch(TINY, SAMPLES), GRIDS_OF)
    want = [keye.logits(s) for s in singles]
    cache = keye.new_cache(3, 64)

    def check(parts, starts):
        logits = keye.head(keye.step(pack(parts), cache, [0, 1, 2]))
        lengths = [len(p["tokens"]) for p in parts]
        for got, whole, start, n in zip(logits.split(lengths), want, starts, lengths):
            close(got, whole[start : start + n])

    # All prompts go in as one pack, then the rest `cut` tokens at a time, each row at its length.
    ends = [len(s["tokens"]) - 5 for s in singles]
    prompts = [part(s, 0, end, slice(0, g)) for s, end, g in zip(singles, ends, GRIDS_OF)]
    check(prompts, [0, 0, 0])
    for done in range(0, 5, cut):
        starts = [end + done for end in ends]
        n = min(cut, 5 - done)
        check([part(s, a, a + n, slice(0, 0)) for s, a in zip(singles, starts)], starts)
    assert cache.lengths == [len(s["tokens"]) for s in singles]


@torch.no_grad()
def test_rows_may_move_alone_and_in_any_order():
    keye = fresh()
    singles = split_batch(make_batch(TINY, [[9], [9], [9]]), [0, 0, 0])
    want = [keye.logits(s) for s in singles]
    cache = keye.new_cache(3, 16)
    held = [0, 0, 0]
    for rows in ([2], [1, 0], [2, 0], [0, 1, 2]):
        parts = [part(singles[r], held[r], held[r] + 3, slice(0, 0)) for r in rows]
        logits = keye.head(keye.step(pack(parts), cache, rows)).split(3)
        for r, got in zip(rows, logits):
            close(got, want[r][held[r] : held[r] + 3])
            held[r] += 3
    assert cache.lengths == held == [9, 6, 9]


@torch.no_grad()
def test_a_second_picture_may_come_after_decoding():
    keye = fresh()
    batch = make_batch(TINY, [[3, (1, 2, 2), 4, (2, 2, 4), 3]])
    cache = keye.new_cache(1, 32)
    halves = [part(batch, 0, 8, slice(0, 1)), part(batch, 8, 15, slice(1, 2))]
    got = [keye.head(keye.step(pack([half]), cache, [0])) for half in halves]
    close(torch.cat(got), keye.logits(batch))
    with pytest.raises(ValueError, match="KV cache of 32 tokens"):
        keye.step(make_batch(TINY, [[18]]), cache, [0])


# -- the loss --------------------------------------------------------------------------------------


def test_loss_in_chunks_equals_the_plain_one():
    h = torch.randn(37, 16, requires_grad=True)
    w = torch.randn(50, 16, requires_grad=True)
    y = torch.randint(0, 50, (37,))
    plain = F.cross_entropy(h @ w.T, y, reduction="sum")
    chunked = cross_entropy_sum(h, w, y, max_logits=50 * 5)
    close(chunked, plain)
    want = torch.autograd.grad(plain, (h, w))
    for a, b in zip(torch.autograd.grad(chunked, (h, w)), want):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_logprobs_in_chunks_equal_the_plain_ones():
    h = torch.randn(37, 16, requires_grad=True)
    w = torch.randn(50, 16)
    y = torch.randint(0, 50, (37,))
    every = (h @ w.T / 0.7).log_softmax(-1)
    plain = every[torch.arange(37), y]
    logprobs, entropy = token_logprobs(h, w, y, temperature=0.7, max_logits=50 * 5)
    close(logprobs, plain)
    close(entropy, -(every.exp() * every).sum(-1).detach())
    assert not entropy.requires_grad
    weights = torch.randn(37)
    (got,) = torch.autograd.grad((logprobs * weights).sum(), h)
    (want,) = torch.autograd.grad((plain * weights).sum(), h)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_loss_never_holds_all_logits_in_fp32():
    """256 tokens x 151,936 words are 39 million numbers: in bf16 they are kept, once."""
    h = torch.randn(256, 8, dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(151936, 8, dtype=torch.bfloat16, requires_grad=True)
    largest = 0
    whole = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest, whole
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor) and x.dtype == torch.float32:
                    largest = max(largest, x.numel())
                whole += func is torch.ops.aten.new_empty.default and x.numel() == 256 * 151936
            return out

    with Watch():
        y = torch.randint(0, 151936, (256,))
        cross_entropy_sum(h, w, y, max_logits=2**23).backward()
    assert 2**22 < largest <= 2**23
    assert whole == 1


# -- sizes and work --------------------------------------------------------------------------------


def test_parameter_counts_of_8b():
    with torch.device("meta"):
        keye = KeyeVL(PRESETS["8b"])

    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert count(keye.vit) == 412_987_248
    assert count(keye.projector) == 40_119_040
    assert count(keye.decoder) + count(keye.lm_head) == 8_190_735_360


def test_every_size_has_its_scale():
    assert SCALE.keys() == PRESETS.keys()
    for size in PRESETS:
        assert SCALE[size].budget["image_max"] <= SCALE[size].budget["video_max"]


def test_flops_of_8b():
    """6 x 7.568e9 weights and half of 8,192 keys: 52.7 GFLOP a token."""
    assert training_flops(PRESETS["8b"], [8192], []) / 8192 == pytest.approx(52.66e9, rel=1e-3)
    alone = training_flops(PRESETS["8b"], [4096, 4096], [])
    assert alone / 8192 == pytest.approx(49.03e9, rel=1e-3)


def test_flops_of_a_picture():
    """8B's ViT, 6 x 411e6 weights a patch, 4 patches a token: 9.9 GFLOP, and attention."""
    cfg = PRESETS["8b"]
    grids = [[1, 32, 32]]
    vit = training_flops(cfg, [], grids) - 6 * 256 * (4608 * 4608 + 4608 * 4096)
    assert vit / 256 == pytest.approx(9.86e9 + 1.53e9, rel=1e-2)
    frozen = training_flops(cfg, [], grids, vit=False)
    assert training_flops(cfg, [], grids) - frozen == pytest.approx(vit * 2 / 3)


def test_work_of_a_step_adds_up_its_samples():
    batches = [make_batch(TINY, SAMPLES), make_batch(TINY, [[7]])]
    work = step_work(TINY, batches)
    assert work["tokens"] == 13 + 9 + 18 + 7
    assert work["visual_tokens"] == 4 + 6 + 1
    samples = [(9, [[1, 4, 4]]), (9, []), (11, [[3, 2, 4], [1, 2, 2]]), (7, [])]
    assert work["flops"] == sum(sample_flops(TINY, text, grids) for text, grids in samples)
    frozen = step_work(TINY, batches, vit=False, decoder=False)
    assert frozen["flops"] < step_work(TINY, batches, vit=False)["flops"] < work["flops"]
