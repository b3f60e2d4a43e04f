"""The ViT against transformers' SigLIP and PaddleOCR-VL towers, and packed against one by one."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from transformers import SiglipTextConfig, SiglipTextModel, SiglipVisionConfig, SiglipVisionModel
from transformers.models.paddleocr_vl.configuration_paddleocr_vl import PaddleOCRVisionConfig
from transformers.models.paddleocr_vl.modeling_paddleocr_vl import PaddleOCRVisionModel

from common.weights import SIGLIP_NAMES, renamed
from stage import DEVICES
from vit import TextTower, ViT, ViTConfig

SMALL = dict(
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=84,
    patch_size=14,
)


def randomise(module, seed=0):
    g = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        if p.dim() > 1:
            p.data = torch.randn(p.shape, generator=g) * 0.3
        else:
            p.data = torch.randn(p.shape, generator=g) * 0.1 + 0.5
    return module.eval()


def copy_from(ours, theirs, here, there):
    """Fill ours from their state dict by SigLIP's names in a checkpoint.

    here: the prefix of SIGLIP_NAMES that `ours` is; there: the prefix of `theirs`, which some
    versions of transformers leave out.
    """
    source = theirs.state_dict()
    left_out = not any(name.startswith(there) for name in source)
    state = {}
    for name, p in ours.state_dict().items():
        key = renamed(here + name, SIGLIP_NAMES)
        if left_out:
            key = key.removeprefix(there)
        state[name] = source[key].reshape(p.shape)
    ours.load_state_dict(state)
    return ours.eval()


def vit_from(theirs, pooling_head=False, **facts):
    ours = ViT(ViTConfig(**SMALL, **facts), pooling_head)
    return copy_from(ours, theirs, "vit.", "vision_model.")


@pytest.fixture(scope="module")
def siglip():
    """Their tower, three pictures at the grid it was made for, and our tower with its weights."""
    theirs = randomise(SiglipVisionModel(SiglipVisionConfig(**SMALL, vision_use_head=True)))
    pixels = torch.rand(3, 3, 84, 84) * 2 - 1
    out = theirs(pixel_values=pixels)
    patches = pixels.unfold(2, 14, 14).unfold(3, 14, 14)  # (3, channel, row, column, 14, 14)
    patches = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, 588)  # raster order
    ours = vit_from(theirs, pooling_head=True, rope=False)
    return ours, patches, torch.tensor([[1, 6, 6]] * 3), out


def test_without_rope_equals_siglip_at_its_native_grid(siglip):
    ours, patches, grids, out = siglip
    features = ours(patches, grids).view(3, 36, -1)
    torch.testing.assert_close(features, out.last_hidden_state, atol=1e-4, rtol=1e-4)


def test_pooling_equals_siglip(siglip):
    ours, patches, grids, out = siglip
    pooled = ours.pool(ours(patches, grids), grids)
    torch.testing.assert_close(pooled, out.pooler_output, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("grid", [[1, 4, 6], [1, 10, 2]])
def test_with_rope_equals_paddleocr_vl(grid):
    """Keye's tower, ported by other hands: table interpolated per grid, 2D RoPE, packed."""
    cfg = PaddleOCRVisionConfig(**SMALL, spatial_merge_size=2, layer_norm_eps=1e-6)
    cfg._attn_implementation = "eager"
    theirs = randomise(PaddleOCRVisionModel(cfg))
    ours = vit_from(theirs)
    grids = torch.tensor([grid])
    patches = torch.rand(int(grids.prod()), 588) * 2 - 1
    arguments = {
        "pixel_values": patches.view(1, -1, 3, 14, 14),
        "cu_seqlens": torch.tensor([0, len(patches)], dtype=torch.int32),
    }
    newer = "grid_thw" in inspect.signature(theirs.forward).parameters
    arguments["grid_thw" if newer else "image_grid_thw"] = grids
    want = theirs(**arguments).last_hidden_state.view(len(patches), -1)
    torch.testing.assert_close(ours(patches, grids), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("across", [True, False])
def test_packed_equals_one_at_a_time(across):
    vit = randomise(ViT(ViTConfig(**SMALL, attend_across_frames=across), pooling_head=True))
    grids = torch.tensor([[1, 2, 4], [3, 4, 2], [1, 6, 6], [1, 2, 4]])
    rows = grids.prod(1).tolist()
    patches = torch.randint(0, 256, (sum(rows), 588), dtype=torch.uint8)

    def gradients(features, pooled):
        vit.zero_grad()
        (features.square().sum() + pooled.sum()).backward()
        return [p.grad.clone() for p in vit.parameters()]

    features = vit(patches, grids)
    pooled = vit.pool(features, grids)
    one_features = []
    one_pooled = []
    for part, grid in zip(patches.split(rows), grids):
        one_features.append(vit(part, grid[None]))
        one_pooled.append(vit.pool(one_features[-1], grid[None]))
    torch.testing.assert_close(features, torch.cat(one_features), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pooled, torch.cat(one_pooled), atol=1e-5, rtol=1e-5)
    whole = gradients(features, pooled)
    single = gradients(torch.cat(one_features), torch.cat(one_pooled))
    for a, b in zip(whole, single):
        assert (a - b).norm() <= 1e-5 * (1 + b.norm())


@pytest.mark.parametrize("across", [True, False])
def test_frames_attend_to_each_other_only_when_asked(across):
    vit = randomise(ViT(ViTConfig(**SMALL, attend_across_frames=across)))
    patches = torch.randint(0, 256, (2 * 8, 588), dtype=torch.uint8)
    changed = patches.clone()
    changed[8:] = 255 - changed[8:]  # the second frame
    grids = torch.tensor([[2, 2, 4]])
    first_frame_stays = torch.allclose(vit(patches, grids)[:8], vit(changed, grids)[:8], atol=1e-5)
    assert first_frame_stays != across


def test_bytes_are_normalised_as_the_processor_does():
    vit = randomise(ViT(ViTConfig(**SMALL)))
    grids = torch.tensor([[1, 2, 4]])
    patches = torch.randint(0, 256, (8, 588), dtype=torch.uint8)
    floats = (patches.float() / 255 - 0.5) / 0.5
    torch.testing.assert_close(vit(patches, grids), vit(floats, grids), atol=1e-5, rtol=1e-5)


def test_misfitting_grids_are_named():
    vit = ViT(ViTConfig(**SMALL))
    with pytest.raises(ValueError, match="8 patches"):
        vit(torch.zeros(8, 588), torch.tensor([[1, 2, 6]]))
    with pytest.raises(ValueError, match="multiples of 2"):
        vit(torch.zeros(6, 588), torch.tensor([[1, 2, 3]]))


def test_a_pack_without_pictures_reaches_every_weight():
    vit = randomise(ViT(ViTConfig(**SMALL), pooling_head=True))
    text = randomise(TextTower(ViTConfig(**SMALL), 99, 16))
    grids = torch.zeros(0, 3, dtype=torch.long)
    features = vit(torch.zeros(0, 588), grids)
    pooled = vit.pool(features, grids)
    captions = text(torch.zeros(0, 16, dtype=torch.long))
    assert features.shape == pooled.shape == captions.shape == (0, 48)
    (pooled.sum() + captions.sum()).backward()
    for p in [*vit.parameters(), *text.parameters()]:
        assert p.grad is not None and not p.grad.any()


def test_text_tower_equals_siglip():
    cfg = SiglipTextConfig(
        vocab_size=99,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        projection_size=48,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=3,
    )
    theirs = randomise(SiglipTextModel(cfg))
    ours = copy_from(TextTower(ViTConfig(**SMALL), 99, 16), theirs, "text.", "text_model.")
    tokens = torch.randint(0, 99, (5, 16))
    want = theirs(input_ids=tokens).pooler_output
    torch.testing.assert_close(ours(tokens), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("frames", [1, 3])
def test_the_table_of_positions_is_interpolated_as_pytorch_does(frames, device):
    """Values and the table's gradients, for grids smaller and larger than it, odd sides too."""
    torch.manual_seed(0)
    model = ViT(ViTConfig(**SMALL | dict(image_size=27 * 14, num_hidden_layers=1))).to(device)
    weight = model.position_embedding.weight
    grids = [[frames, h, w] for h in (2, 5, 27, 60) for w in (2, 13, 27, 54)]
    table = weight.unflatten(0, (27, 27)).permute(2, 0, 1)[None]  # (1, C, 27, 27)
    want = []
    for t, h, w in grids:
        stretched = F.interpolate(table, (h, w), mode="bilinear", align_corners=False)
        want.append(stretched[0].flatten(1).T.repeat(t, 1))  # (t * h * w, C)
    want = torch.cat(want)
    found = model.positions(grids)
    torch.testing.assert_close(found, want, atol=2e-6, rtol=1e-5)

    push = torch.randn_like(want)
    gradients = (torch.autograd.grad(x, weight, push)[0] for x in (found, want))
    torch.testing.assert_close(*gradients, atol=2e-3, rtol=1e-4)
    (nothing,) = torch.autograd.grad(model.positions([]).sum(), weight)
    assert torch.equal(nothing, torch.zeros_like(weight))
