"""Files in the official layout: names, shapes, round trips, and the ways in which they go wrong."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.weights import KEYE_NAMES, average_weights, read_config, renamed, save_weights
from model import PRESETS, KeyeVL

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def keye():
    """A toy with a head of its own, as the 8B has it."""
    torch.manual_seed(0)
    return KeyeVL(replace(PRESETS["toy"], tie_word_embeddings=False)).init_weights()


@pytest.fixture
def folder(keye, tmp_path):
    keye.save_pretrained(tmp_path)
    return tmp_path


def in_shards(keye, folder):
    save_weights(keye.state_dict(), keye.config.to_json(), folder, shard_bytes=600_000)
    return json.loads((folder / INDEX).read_text())["weight_map"]


def edit(path, change):
    """Rewrite a safetensors file after change(tensors)."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_saved_model_comes_back_bit_for_bit(keye, folder):
    again = KeyeVL.from_pretrained(folder)
    assert again.config == keye.config
    assert same(keye.state_dict(), again.state_dict())


def test_shards_come_back_bit_for_bit(keye, tmp_path):
    files = set(in_shards(keye, tmp_path).values())
    assert len(files) > 2
    assert files == {path.name for path in tmp_path.glob("*.safetensors")}
    assert same(keye.state_dict(), KeyeVL.from_pretrained(tmp_path).state_dict())


def test_a_model_saved_over_shards_is_the_one_that_is_read(keye, tmp_path):
    in_shards(keye, tmp_path)
    newer = {name: tensor + 1 for name, tensor in keye.state_dict().items()}
    save_weights(newer, keye.config.to_json(), tmp_path)
    assert same(newer, KeyeVL.from_pretrained(tmp_path).state_dict())


def test_official_names_and_shapes(folder):
    tensors = load_file(folder / SINGLE)
    patches = tensors["visual.vision_model.embeddings.patch_embedding.weight"]
    assert patches.shape == (64, 3, 14, 14)
    for name in (
        "visual.vision_model.encoder.layers.1.self_attn.out_proj.bias",
        "visual.vision_model.post_layernorm.weight",
        "mlp_AR.pre_norm.weight",
        "mlp_AR.linear_2.weight",
        "model.layers.1.self_attn.q_norm.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    ):
        assert name in tensors
    config = read_config(folder)
    assert config["vision_config"]["hidden_size"] == 64
    assert config["rope_scaling"] == {"type": "mrope", "mrope_section": [8, 12, 12]}


def test_every_official_8b_name_has_a_place():
    with torch.device("meta"):
        keye = KeyeVL(PRESETS["8b"], pooling_head=True)
    shapes = {renamed(name, KEYE_NAMES): p.shape for name, p in keye.state_dict().items()}
    # ViT blocks and the rest of it, pooling head, projector, decoder layers and the rest
    assert len(shapes) == 27 * 16 + 5 + 11 + 6 + 36 * 11 + 3
    assert shapes["visual.vision_model.head.attention.in_proj_weight"] == (3456, 1152)
    assert shapes["model.layers.35.mlp.down_proj.weight"] == (4096, 12288)


def test_known_unused_tensors_are_passed_over(keye, folder):
    def as_released(tensors):
        embeddings = "visual.vision_model.embeddings."
        tensors[embeddings + "packing_position_embedding.weight"] = torch.zeros(8, 64)
        tensors["visual.vision_model.head.probe"] = torch.zeros(1, 1, 64)

    edit(folder / SINGLE, as_released)
    assert same(keye.state_dict(), KeyeVL.from_pretrained(folder).state_dict())


def test_a_missing_tensor_is_named(folder):
    edit(folder / SINGLE, lambda tensors: tensors.pop("mlp_AR.linear_1.bias"))
    with pytest.raises(KeyError, match="1 tensors missing, first mlp_AR.linear_1.bias"):
        KeyeVL.from_pretrained(folder)


def test_an_extra_tensor_is_named(folder):
    edit(folder / SINGLE, lambda tensors: tensors.update({"model.surprise": torch.zeros(1)}))
    with pytest.raises(KeyError, match="no place for, first model.surprise"):
        KeyeVL.from_pretrained(folder)


def test_a_misshapen_tensor_is_named(folder):
    edit(folder / SINGLE, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(7)}))
    with pytest.raises(ValueError, match=f"{SINGLE}: model.norm.weight has shape .7,., .* .96,."):
        KeyeVL.from_pretrained(folder)


def test_no_weights_at_all_are_named(folder):
    (folder / SINGLE).unlink()
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor"):
        KeyeVL.from_pretrained(folder)


def test_a_missing_shard_is_named(keye, tmp_path):
    file = min(in_shards(keye, tmp_path).values())
    (tmp_path / file).unlink()
    with pytest.raises(FileNotFoundError, match=file):
        KeyeVL.from_pretrained(tmp_path)


@pytest.mark.parametrize("shards", [False, True])
def test_a_download_cut_short_is_named(keye, folder, shards):
    path = folder / SINGLE
    if shards:
        path = folder / max(in_shards(keye, folder).values())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{path.name}: cannot be read as safetensors"):
        KeyeVL.from_pretrained(folder)


def test_a_git_lfs_pointer_is_named(folder):
    (folder / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abab\n")
    with pytest.raises(ValueError, match=f"{SINGLE}: cannot be read .* Git LFS pointer"):
        KeyeVL.from_pretrained(folder)


def test_a_shard_without_a_tensor_that_the_index_promises_is_named(keye, tmp_path):
    name, file = next(iter(in_shards(keye, tmp_path).items()))
    edit(tmp_path / file, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=f"{file}: .*{name}"):
        KeyeVL.from_pretrained(tmp_path)


def test_config_with_a_byte_order_mark_is_read(keye, folder):
    path = folder / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_config(folder) == keye.config.to_json()


def test_a_wrong_config_is_named(folder):
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"mrope"', '"yarn"'))
    with pytest.raises(ValueError, match=f"{path}: type is 'yarn'"):
        KeyeVL.from_pretrained(folder)
    path.write_text("{")
    with pytest.raises(ValueError, match=f"{path}: not JSON"):
        KeyeVL.from_pretrained(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no config.json"):
        KeyeVL.from_pretrained(folder)


def test_average_of_models(keye, tmp_path):
    parents = [tmp_path / str(i) for i in range(3)]
    for i, parent in enumerate(parents):
        state = {name: tensor * i for name, tensor in keye.state_dict().items()}
        save_weights(state, keye.config.to_json(), parent)
    average = average_weights(parents, KEYE_NAMES)
    assert average.keys() == keye.state_dict().keys()
    for name, tensor in keye.state_dict().items():
        torch.testing.assert_close(average[name], tensor)
    save_weights(average, read_config(parents[0]), tmp_path / "merged")
    assert same(average, KeyeVL.from_pretrained(tmp_path / "merged").state_dict())


def test_models_with_different_tensors_have_no_average(keye, folder, tmp_path):
    other = tmp_path / "other"
    keye.save_pretrained(other)
    edit(other / SINGLE, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(ValueError, match="has no model.norm.weight"):
        average_weights([folder, other], KEYE_NAMES)
