"""Decoder, 3D RoPE, projector, cache, loss and files, against transformers and against themselves packed and cached."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5_vl
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig

import model as M
from conftest import make_batch, split_batch
from model import PRESETS, Config, KeyeVL, cross_entropy_sum, rope_3d
from vit import ViTConfig, rotate

TINY = Config(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
              num_key_value_heads=2, head_dim=16, mrope_section=(2, 3, 3), bos_token_id=80, eos_token_id=82,
              vision_start_token_id=89, vision_end_token_id=90, image_token_id=92, video_token_id=93,
              vision=ViTConfig(48, 80, 2, 4, image_size=84))
SAMPLES = [[3, (1, 4, 4), 6], [9], [2, (3, 2, 4), 4, (1, 2, 2), 5]]
GRIDS_OF = [1, 0, 2]


def fresh(cfg=TINY, seed=0):
    torch.manual_seed(seed)
    return KeyeVL(cfg).init_weights()


def qwen3(cfg=TINY):
    torch.manual_seed(1)
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=cfg.vocab_size, hidden_size=cfg.hidden_size, intermediate_size=cfg.intermediate_size,
        num_hidden_layers=cfg.num_hidden_layers, num_attention_heads=cfg.num_attention_heads, head_dim=cfg.head_dim,
        num_key_value_heads=cfg.num_key_value_heads, rms_norm_eps=cfg.rms_norm_eps, tie_word_embeddings=cfg.tie_word_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta}, initializer_range=0.2)).eval()


def test_parameter_counts_of_8b():
    with torch.device("meta"):
        keye = KeyeVL(PRESETS["8b"])
    def count(m): return sum(p.numel() for p in m.parameters())
    assert count(keye.vit) == 412_987_248
    assert count(keye.projector) == 40_119_040
    assert count(keye.decoder) + count(keye.lm_head) == 8_190_735_360


@pytest.mark.parametrize("tied", [False, True])
def test_text_equals_transformers_qwen3(tmp_path, tied):
    cfg = Config(**TINY.__dict__ | {"tie_word_embeddings": tied})
    theirs, ours = qwen3(cfg), fresh(cfg)
    theirs.save_pretrained(tmp_path)
    M.load(ours, tmp_path, M.QWEN3_NAMES, ("lm_head.",) if tied else ())
    batch = make_batch(cfg, [[17], [5]])
    with torch.no_grad():
        logits = ours.logits(batch)
        for a, b in ((0, 17), (17, 22)):
            torch.testing.assert_close(logits[a:b], theirs(input_ids=batch["tokens"][None, a:b]).logits[0], atol=1e-4, rtol=1e-4)


def test_qwen3_checkpoint_reads_as_a_config(tmp_path):
    qwen3().save_pretrained(tmp_path)
    got = Config.from_json(M.read_config(tmp_path))
    assert (got.hidden_size, got.head_dim, got.num_key_value_heads, got.tie_word_embeddings) == (64, 16, 2, False)


def test_rope_3d_equals_qwen2_5_vl():
    """Qwen2.5-VL lays its sections out over the channels in the same way as Keye."""
    positions = torch.randint(0, 50, (3, 11))
    q = torch.randn(11, 4, 16)
    cfg = Qwen2_5_VLTextConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=4, rope_parameters={
        "rope_type": "default", "rope_theta": TINY.rope_theta, "mrope_section": [2, 3, 3]})
    cos, sin = qwen2_5_vl.Qwen2_5_VLRotaryEmbedding(cfg)(q, positions[:, None])
    heads = q.transpose(0, 1)[None]
    if cos.dim() == 4:  # transformers before 5.2x mixes the sections when it applies them
        want, _ = qwen2_5_vl.apply_multimodal_rotary_pos_emb(heads, heads, cos, sin, [2, 3, 3])
    else:
        want, _ = qwen2_5_vl.apply_rotary_pos_emb(heads, heads, cos, sin)
    torch.testing.assert_close(rotate(q, *rope_3d(positions, TINY)), want[0].transpose(0, 1), atol=1e-5, rtol=1e-5)


def test_projector_merges_like_keye():
    """Against loops that follow the released rule: block row by row, inside a block top-left, top-right, bottom-left ..."""
    keye, grid = fresh(), [2, 4, 6]
    features = torch.randn(2 * 4 * 6, 48)
    out = keye.projector(features, torch.tensor([grid]))
    p, rows = keye.projector, []
    for t in range(2):
        for i in range(0, 4, 2):
            for j in range(0, 6, 2):
                cells = [features[t * 24 + (i + a) * 6 + j + b] for a in (0, 1) for b in (0, 1)]
                rows.append(torch.cat([F.layer_norm(c, (48,), p.pre_norm.weight, p.pre_norm.bias, 1e-5) for c in cells]))
    want = p.linear_2(F.gelu(p.linear_1(torch.stack(rows))))
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)


def test_packed_equals_one_at_a_time_in_logits_and_gradients():
    keye, batch = fresh(), make_batch(TINY, SAMPLES)
    singles = split_batch(batch, GRIDS_OF)
    torch.testing.assert_close(keye.logits(batch), torch.cat([keye.logits(s) for s in singles]), atol=1e-5, rtol=1e-5)

    def grads(batches):
        keye.zero_grad()
        total = sum(keye.loss(b)[0] for b in batches)
        total.backward()
        return total, {n: p.grad.clone() for n, p in keye.named_parameters()}

    (a, ga), (b, gb) = grads([batch]), grads(singles)
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-5)
    for name in ga:
        assert (ga[name] - gb[name]).norm() <= 1e-5 * (1 + gb[name].norm()), name


def test_samples_of_a_pack_never_see_each_other():
    keye, batch = fresh(), make_batch(TINY, SAMPLES)
    before = keye.logits(batch)
    other = dict(batch, tokens=batch["tokens"].clone(), patches=batch["patches"].clone())
    other["tokens"][0] = (other["tokens"][0] + 1) % 80
    other["patches"][:16] = 255 - other["patches"][:16]  # the first sample's picture
    after = keye.logits(other)
    end = int(batch["segments"][1])
    assert torch.equal(before[end:], after[end:]) and not torch.allclose(before[:end], after[:end])


def test_batch_without_pictures_trains_every_part():
    keye, batch = fresh(), make_batch(TINY, [[7], [4]])
    loss, n = keye.loss(batch)
    loss.backward()
    assert n == 9
    assert all(p.grad is not None for p in keye.parameters())  # zero-row vision keeps every rank's collectives the same
    assert all(p.grad.abs().sum() == 0 for p in keye.vit.parameters())


@pytest.mark.parametrize("cut", [1, 4, 9])
def test_cached_decoding_equals_the_full_forward(cut):
    keye, batch = fresh().eval(), make_batch(TINY, SAMPLES)
    singles = split_batch(batch, GRIDS_OF)
    want = [keye.logits(s) for s in singles]
    cache = keye.new_cache(3, 64)
    # the prompts of all three rows go in as one pack, then the rest token by token, each row at its own length
    starts = [len(s["tokens"]) - 5 for s in singles]

    def part(s, a, b, vision):
        empty = {"patches": s["patches"][:0], "grids": s["grids"][:0]}
        return {"tokens": s["tokens"][a:b], "positions": s["positions"][:, a:b],
                **({"patches": s["patches"], "grids": s["grids"]} if vision else empty)}

    def pack(parts):
        out = {k: torch.cat([p[k] for p in parts], -1 if k == "positions" else 0) for k in parts[0]}
        sizes = torch.tensor([0] + [len(p["tokens"]) for p in parts])
        return out | {"segments": sizes.cumsum(0).int()}

    with torch.no_grad():
        got = keye.head(keye.step(pack([part(s, 0, n, True) for s, n in zip(singles, starts)]), cache, [0, 1, 2]))
        for logits, w, n in zip(got.split(starts), want, starts):
            torch.testing.assert_close(logits, w[:n], atol=1e-5, rtol=1e-5)
        for step in range(0, 5, cut):
            ends = [min(n + step + cut, len(s["tokens"])) for s, n in zip(singles, starts)]
            chunk = pack([part(s, n + step, e, False) for s, n, e in zip(singles, starts, ends)])
            got = keye.head(keye.step(chunk, cache, [0, 1, 2]))
            for logits, w, n, e in zip(got.split([e - n - step for n, e in zip(starts, ends)]), want, starts, ends):
                torch.testing.assert_close(logits, w[n + step : e], atol=1e-5, rtol=1e-5)
    assert cache.lengths == [len(s["tokens"]) for s in singles]


def test_a_second_picture_may_come_after_decoding():
    keye, batch = fresh().eval(), make_batch(TINY, [[3, (1, 2, 2), 4, (2, 2, 4), 3]])
    cache, want = keye.new_cache(1, 32), keye.logits(batch)
    halves = [dict(tokens=batch["tokens"][a:b], positions=batch["positions"][:, a:b], patches=p, grids=g,
                   segments=torch.tensor([0, b - a], dtype=torch.int32))
              for a, b, p, g in ((0, 8, batch["patches"][:4], batch["grids"][:1]), (8, 15, batch["patches"][4:], batch["grids"][1:]))]
    got = torch.cat([keye.head(keye.step(h, cache, [0])) for h in halves])
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="KV cache of 32 tokens"):
        keye.step(make_batch(TINY, [[18]]), cache, [0])


def test_loss_in_chunks_equals_the_plain_one():
    h, w = torch.randn(37, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    y = torch.randint(0, 50, (37,))
    plain = F.cross_entropy(h @ w.T, y, reduction="sum")
    chunked = cross_entropy_sum(h, w, y, room=50 * 5)
    torch.testing.assert_close(chunked, plain)
    for a, b in zip(torch.autograd.grad(chunked, (h, w)), torch.autograd.grad(plain, (h, w))):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_loss_never_holds_all_logits():
    """151,936 words x 4,096 tokens in fp32 would be 2.5 GB; the largest tensor autograd saves or makes stays far below."""
    h, w = torch.randn(4096, 8, requires_grad=True), torch.randn(151936, 8, requires_grad=True)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                largest = max(largest, x.numel() if isinstance(x, torch.Tensor) else 0)
            return out

    with Watch():
        cross_entropy_sum(h[:900], w, torch.randint(0, 151936, (900,)), room=2**24).backward()
    assert largest <= 2**24


def test_activation_checkpointing_changes_nothing():
    keye, batch = fresh(), make_batch(TINY, SAMPLES)
    keye.loss(batch)[0].backward()
    want = [p.grad.clone() for p in keye.parameters()]
    keye.zero_grad()
    keye.decoder.activation_checkpointing = True
    keye.loss(batch)[0].backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(want, keye.parameters()))


def test_wrong_placeholder_count_is_named():
    batch = make_batch(TINY, [[3, (1, 4, 4), 6]])
    batch["tokens"][3] = 5
    with pytest.raises(ValueError, match="3 picture and video placeholders, but 4 visual tokens"):
        fresh().loss(batch)


# -- files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [10**9, 60_000])
def test_saved_model_comes_back_bit_for_bit(tmp_path, shard_bytes):
    keye = fresh()
    M.save_weights(keye.state_dict(), keye.config, tmp_path, shard_bytes)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_bytes < 10**9)
    again = KeyeVL.from_pretrained(tmp_path)
    assert again.config == keye.config
    assert all(torch.equal(a, b) for a, b in zip(keye.state_dict().values(), again.state_dict().values()))


def test_official_names_and_shapes(tmp_path):
    keye = fresh()
    keye.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["visual.vision_model.embeddings.patch_embedding.weight"].shape == (48, 3, 14, 14)
    for name in ("visual.vision_model.encoder.layers.1.self_attn.out_proj.bias", "visual.vision_model.post_layernorm.weight",
                 "mlp_AR.pre_norm.weight", "mlp_AR.linear_2.weight", "model.layers.1.self_attn.q_norm.weight",
                 "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert name in tensors
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["vision_config"]["hidden_size"] == 48 and config["rope_scaling"]["mrope_section"] == [2, 3, 3]


def test_every_official_8b_name_has_a_place():
    with torch.device("meta"):
        keye = KeyeVL(PRESETS["8b"], pooling_head=True)
    names = {M.renamed(n, M.KEYE_NAMES): tuple(p.shape) for n, p in keye.state_dict().items()}
    assert len(names) == 27 * 16 + 5 + 11 + 6 + 36 * 11 + 3  # ViT, head, projector, decoder (notes on the released tree)
    assert names["visual.vision_model.head.attention.in_proj_weight"] == (3456, 1152)
    assert names["model.layers.35.mlp.down_proj.weight"] == (4096, 12288)


@pytest.mark.parametrize("fault, message", [
    ("missing", "1 tensors missing, first mlp_AR.linear_1.bias"), ("extra", "no place for, first model.surprise"),
    ("shape", "model.norm.weight has shape .7,."), ("truncated", "cannot be read as safetensors"), ("gone", "neither model.safetensors")])
def test_a_wrong_file_is_named(tmp_path, fault, message):
    fresh().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["visual.vision_model.embeddings.packing_position_embedding.weight"] = torch.zeros(8, 48)  # known, not needed
    tensors["visual.vision_model.head.probe"] = torch.zeros(1, 1, 48)
    if fault == "missing":
        del tensors["mlp_AR.linear_1.bias"]
    if fault == "extra":
        tensors["model.surprise"] = torch.zeros(1)
    if fault == "shape":
        tensors["model.norm.weight"] = torch.zeros(7)
    save_file(tensors, path)
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    if fault == "gone":
        path.unlink()
    with pytest.raises((KeyError, ValueError, FileNotFoundError), match=message):
        KeyeVL.from_pretrained(tmp_path)


def test_known_unused_tensors_are_passed_over(tmp_path):
    keye = fresh()
    keye.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["visual.vision_model.embeddings.packing_position_embedding.weight"] = torch.zeros(8, 48)
    tensors["visual.vision_model.head.probe"] = torch.zeros(1, 1, 48)
    save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(KeyeVL.from_pretrained(tmp_path).lm_head.weight, keye.lm_head.weight)
