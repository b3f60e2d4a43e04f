"""The ViT against transformers' SigLIP and PaddleOCR-VL towers, and packed against one at a time."""

import inspect

import pytest
import torch
from transformers import SiglipTextConfig, SiglipTextModel, SiglipVisionConfig, SiglipVisionModel
from transformers.models.paddleocr_vl.configuration_paddleocr_vl import PaddleOCRVisionConfig
from transformers.models.paddleocr_vl.modeling_paddleocr_vl import PaddleOCRVisionModel

from model import KEYE_NAMES, SIGLIP_NAMES, renamed
from vit import TextTower, ViT, ViTConfig

SMALL = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, image_size=84, patch_size=14)


def randomise(module, seed=0):
    g = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=g) * (0.3 if p.dim() > 1 else 0.1) + (p.dim() == 1) * 0.5
    return module.eval()


def copy_named(ours, theirs, names):
    """Fill ours from their state dict by the names a checkpoint would have; nothing of ours may be left out."""
    state = theirs.state_dict()
    ours.load_state_dict({n: state.pop(renamed(n, names)).reshape(p.shape) for n, p in ours.state_dict().items()})
    return ours.eval()


def hf_names(prefix):
    return [(a.removeprefix("vit."), prefix + b.removeprefix("visual.vision_model.")) for a, b in KEYE_NAMES if a.startswith("vit.")]


@pytest.mark.parametrize("pool", [False, True])
def test_without_rope_equals_siglip_at_its_native_grid(pool):
    theirs = randomise(SiglipVisionModel(SiglipVisionConfig(**SMALL, vision_use_head=True)))
    prefix = "vision_model." if any(k.startswith("vision_model.") for k in theirs.state_dict()) else ""
    ours = copy_named(ViT(ViTConfig(**SMALL, rope=False), pooling_head=True), theirs, hf_names(prefix))
    pixels = torch.rand(3, 3, 84, 84) * 2 - 1
    out = theirs(pixel_values=pixels)
    patches = pixels.unfold(2, 14, 14).unfold(3, 14, 14).permute(0, 2, 3, 1, 4, 5).reshape(-1, 588)  # raster order
    grids = torch.tensor([[1, 6, 6]] * 3)
    features = ours(patches, grids)
    if pool:
        torch.testing.assert_close(ours.pool(features, grids), out.pooler_output, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(features.view(3, 36, -1), out.last_hidden_state, atol=1e-4, rtol=1e-4)


def test_with_rope_equals_paddleocr_vl():
    """The same tower as Keye's, ported by other hands: learned table interpolated per grid, 2D RoPE, packed."""
    cfg = PaddleOCRVisionConfig(**SMALL, spatial_merge_size=2, layer_norm_eps=1e-6)
    cfg._attn_implementation = "eager"
    theirs = randomise(PaddleOCRVisionModel(cfg))
    prefix = "vision_model." if any(k.startswith("vision_model.") for k in theirs.state_dict()) else ""
    ours = copy_named(ViT(ViTConfig(**SMALL)), theirs, hf_names(prefix))
    for grid in ([1, 4, 6], [1, 10, 2]):
        grids = torch.tensor([grid])
        patches = torch.rand(int(grids.prod()), 588) * 2 - 1
        grid_name = "grid_thw" if "grid_thw" in inspect.signature(theirs.forward).parameters else "image_grid_thw"
        cu = torch.tensor([0, len(patches)], dtype=torch.int32)
        out = theirs(pixel_values=patches.view(1, -1, 3, 14, 14), cu_seqlens=cu, **{grid_name: grids})
        torch.testing.assert_close(ours(patches, grids), out.last_hidden_state.view(len(patches), -1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("across", [True, False])
def test_packed_equals_one_at_a_time(across):
    vit = randomise(ViT(ViTConfig(**SMALL, attend_across_frames=across), pooling_head=True))
    grids = torch.tensor([[1, 2, 4], [3, 4, 2], [1, 6, 6], [1, 2, 4]])
    patches = torch.randint(0, 256, (int(grids.prod(1).sum()), 588), dtype=torch.uint8)
    rows = grids.prod(1).tolist()

    def run(parts):
        vit.zero_grad()
        features = torch.cat([vit(p, g) for p, g in parts])
        pooled = torch.cat([vit.pool(f, g[None]) for f, g in zip(features.split(rows), grids)])
        (features.square().sum() + pooled.sum()).backward()
        return features, pooled, [p.grad.clone() for p in vit.parameters()]

    whole = run([(patches, grids)])
    single = run([(p, g[None]) for p, g in zip(patches.split(rows), grids)])
    torch.testing.assert_close(whole[0], single[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whole[1], vit.pool(whole[0], grids), atol=1e-5, rtol=1e-5)
    for a, b in zip(whole[2], single[2]):
        assert (a - b).norm() <= 1e-5 * (1 + b.norm())


def test_frames_attend_to_each_other_only_when_asked():
    patches = torch.randint(0, 256, (2 * 8, 588), dtype=torch.uint8)
    changed = patches.clone()
    changed[8:] = 255 - changed[8:]  # the second frame
    grids = torch.tensor([[2, 2, 4]])
    for across in (True, False):
        vit = randomise(ViT(ViTConfig(**SMALL, attend_across_frames=across)))
        first = torch.allclose(vit(patches, grids)[:8], vit(changed, grids)[:8], atol=1e-5)
        assert first != across


def test_bytes_are_normalised_as_the_processor_does():
    vit = randomise(ViT(ViTConfig(**SMALL)))
    patches, grids = torch.randint(0, 256, (8, 588), dtype=torch.uint8), torch.tensor([[1, 2, 4]])
    torch.testing.assert_close(vit(patches, grids), vit((patches.float() / 255 - 0.5) / 0.5, grids), atol=1e-5, rtol=1e-5)


def test_misfitting_grids_are_named():
    vit = ViT(ViTConfig(**SMALL))
    with pytest.raises(ValueError, match="8 patches"):
        vit(torch.zeros(8, 588), torch.tensor([[1, 2, 6]]))
    with pytest.raises(ValueError, match="multiples of 2"):
        vit(torch.zeros(6, 588), torch.tensor([[1, 2, 3]]))
    assert vit(torch.zeros(0, 588), torch.zeros(0, 3, dtype=torch.long)).shape == (0, 48)


def test_text_tower_equals_siglip():
    cfg = SiglipTextConfig(vocab_size=99, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
                           max_position_embeddings=16, projection_size=48, pad_token_id=1, bos_token_id=2, eos_token_id=3)
    theirs = randomise(SiglipTextModel(cfg))
    prefix = "text_model." if any(k.startswith("text_model.") for k in theirs.state_dict()) else ""
    names = [(a.removeprefix("text."), prefix + b.removeprefix("text_model.")) for a, b in SIGLIP_NAMES if a.startswith("text.")]
    ours = copy_named(TextTower(ViTConfig(**SMALL), 99, 16), theirs, names)
    tokens = torch.randint(0, 99, (5, 16))
    torch.testing.assert_close(ours(tokens), theirs(input_ids=tokens).pooler_output, atol=1e-4, rtol=1e-4)
