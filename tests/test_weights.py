"""Files in the official layout: names, shapes, round trips, and the ways in which they go wrong."""

import errno
import json
import os
import shutil
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common import checkpoint, weights
from common.parallel import own_part, shard, whole
from common.run import arguments, start
from common.weights import (
    KEYE_NAMES,
    add_weights,
    plan_files,
    read_config,
    renamed,
    save_weights,
)
from conftest import toy_processor
from model import PRESETS, KeyeVL
from stage import in_processes

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


# -- what lay in the folder before -----------------------------------------------------------------

MANY, FEW, ONE = 300_000, 600_000, 5 * 10**9  # bytes of a shard


def save_plus(keye, by, folder, shard_bytes):
    """The model with `by` added to all of it."""
    state = {name: tensor + by for name, tensor in keye.state_dict().items()}
    save_weights(state, keye.config.to_json() | {"rms_norm_eps": 0.1 + by}, folder, shard_bytes)
    return state


def read_as_transformers(folder):
    """It prefers one file to an index, and that to pickled weights."""
    if (folder / SINGLE).exists():
        return load_file(folder / SINGLE)
    files = json.loads((folder / INDEX).read_text())["weight_map"].values()
    tensors = {}
    for file in set(files):
        tensors |= load_file(folder / file)
    return tensors


def which_model(folder):
    """What was added to the model in a folder, if that is one number for all its parts."""
    keye = KeyeVL.from_pretrained(folder)
    assert keye.decoder.norm.weight[0] - 1 == keye.config.rms_norm_eps - 0.1
    for layer in keye.decoder.layers:
        assert torch.equal(layer.input_layernorm.weight, keye.decoder.norm.weight)
    return keye.decoder.norm.weight[0].item() - 1


@pytest.mark.parametrize("new", [MANY, FEW, ONE])
@pytest.mark.parametrize("old", [MANY, FEW, ONE])
def test_the_model_that_is_read_is_the_one_saved_last(keye, tmp_path, old, new):
    save_plus(keye, 1, tmp_path, old)
    for name in ("pytorch_model.bin", "pytorch_model-00001-of-00002.bin"):
        (tmp_path / name).write_text("an older model, pickled")
    (tmp_path / "vocab.json").write_text("{}")
    newer = save_plus(keye, 2, tmp_path, new)
    assert same(newer, KeyeVL.from_pretrained(tmp_path).state_dict())
    theirs = read_as_transformers(tmp_path)
    for name, tensor in newer.items():
        assert torch.equal(theirs[renamed(name, KEYE_NAMES)].flatten(), tensor.flatten())
    alone = tmp_path / "alone"
    save_plus(keye, 2, alone, new)
    assert {p.name for p in tmp_path.iterdir()} == {
        "alone", "vocab.json", *(path.name for path in alone.iterdir())
    }


class Killed(BaseException):
    pass


@pytest.mark.parametrize("old, new", [(ONE, FEW), (FEW, ONE), (FEW, MANY), (ONE, ONE)])
def test_a_kill_while_saving_leaves_no_mixture(keye, tmp_path, monkeypatch, old, new):
    """Wherever it comes, the folder holds the old model, the new one, or none that is read."""
    left = 0  # steps until it comes

    def dying(work):
        def step(*args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return work(*args, **kwargs)

        return step

    found = []
    while "new" not in found:
        save_plus(keye, 1, tmp_path, old)
        left = len(found)
        with monkeypatch.context() as patch:
            patch.setattr(weights, "save_file", dying(save_file))
            patch.setattr(weights.os, "replace", dying(os.replace))
            patch.setattr(Path, "unlink", dying(Path.unlink))
            try:
                save_plus(keye, 2, tmp_path, new)
                found.append("new")
            except Killed:
                found.append("old" if (tmp_path / "config.json").exists() else "none")
        if found[-1] == "none":
            with pytest.raises(FileNotFoundError, match="no config.json"):
                KeyeVL.from_pretrained(tmp_path)
        else:
            assert which_model(tmp_path) == {"old": 1, "new": 2}[found[-1]]
    assert set(found) == {"old", "none", "new"}
    assert found == sorted(found, key=["old", "none", "new"].index)


def test_a_full_disk_keeps_the_model_before(keye, tmp_path, monkeypatch):
    save_plus(keye, 1, tmp_path, FEW)
    before = sorted(tmp_path.iterdir())

    def half(tensors, path, metadata):
        if "00003" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path, metadata)

    monkeypatch.setattr(weights, "save_file", half)
    with pytest.raises(OSError, match="No space left"):
        save_plus(keye, 2, tmp_path, MANY)
    assert sorted(tmp_path.iterdir()) == before
    assert which_model(tmp_path) == 1


def test_one_file_beside_shards_is_a_question_not_a_guess(keye, tmp_path):
    in_shards(keye, tmp_path)
    save_plus(keye, 1, tmp_path / "other", ONE)
    os.replace(tmp_path / "other" / SINGLE, tmp_path / SINGLE)
    with pytest.raises(ValueError, match=f"{tmp_path}: holds both {SINGLE} and .*{INDEX}"):
        KeyeVL.from_pretrained(tmp_path)


def test_an_index_whose_shards_are_gone_is_passed_over(keye, tmp_path):
    """So transformers leaves it, when it saves one file over shards."""
    for file in set(in_shards(keye, tmp_path).values()):
        (tmp_path / file).unlink()
    other = tmp_path / "other"
    state = save_plus(keye, 1, other, ONE)
    os.replace(other / SINGLE, tmp_path / SINGLE)
    assert same(state, KeyeVL.from_pretrained(tmp_path).state_dict())


# -- names and shapes ------------------------------------------------------------------------------


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


NEWER = [("visual.", "model.visual."), ("mlp_AR.", "model.mlp_AR."),
         ("model.", "model.language_model."), ("lm_head.", "lm_head.")]
OLDER = [("visual.", "visual."), ("mlp_AR.", "mlp_AR."),
         ("model.", "language_model.model."), ("lm_head.", "language_model.lm_head.")]
BARE = [("visual.", "model.visual."), ("mlp_AR.", "mlp_AR."),
        ("model.", "language_model."), ("lm_head.", "lm_head.")]


@pytest.mark.parametrize("names", [NEWER, OLDER, BARE])
@pytest.mark.parametrize("shards", [False, True])
def test_names_of_transformers_are_read(keye, folder, names, shards):
    files = [folder / SINGLE]
    if shards:
        weight_map = in_shards(keye, folder)
        files = [folder / file for file in set(weight_map.values())]
        weight_map = {renamed(name, names): file for name, file in weight_map.items()}
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    for path in files:
        theirs = {renamed(name, names): tensor for name, tensor in load_file(path).items()}
        save_file(theirs, path)
    assert same(keye.state_dict(), KeyeVL.from_pretrained(folder).state_dict())


# -- what goes wrong -------------------------------------------------------------------------------


def test_a_tensor_in_two_files_is_named(keye, tmp_path):
    weight_map = in_shards(keye, tmp_path)
    name, file = next(iter(weight_map.items()))
    other = max(weight_map.values())
    edit(tmp_path / other, lambda tensors: tensors.update({name: torch.zeros(1)}))
    with pytest.raises(ValueError, match=f"{other}: {name} is a second .*{file}"):
        KeyeVL.from_pretrained(tmp_path)


def test_a_tensor_by_two_names_is_named(folder):
    twice = "model.language_model.norm.weight"
    edit(folder / SINGLE, lambda tensors: tensors.update({twice: torch.ones(96)}))
    with pytest.raises(ValueError, match=f"{SINGLE}: .* is a second model.norm.weight"):
        KeyeVL.from_pretrained(folder)


@pytest.mark.parametrize("persistent", [False, True])
def test_a_part_that_no_file_fills_is_named(folder, persistent):
    """`empty` gives memory as it is: neither a parameter nor a buffer may stay so."""

    class WithTable(KeyeVL):
        def __init__(self, *args):
            super().__init__(*args)
            self.decoder.norm.register_buffer("table", torch.zeros(3), persistent)

    with pytest.raises(KeyError, match="decoder.norm.table|model.norm.table"):
        WithTable.from_pretrained(folder)

    class WithGain(KeyeVL):
        def __init__(self, *args):
            super().__init__(*args)
            self.gain = torch.nn.Parameter(torch.ones(1))

    with pytest.raises(KeyError, match="nothing for 1 parts of the model: gain"):
        WithGain.from_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_floats_are_converted(keye, folder, dtype):
    edit(folder / SINGLE, lambda t: t.update({name: x.to(dtype) for name, x in t.items()}))
    want = {name: tensor.to(dtype).float() for name, tensor in keye.state_dict().items()}
    assert same(want, KeyeVL.from_pretrained(folder).state_dict())


@pytest.mark.parametrize(
    "dtype, said",
    [
        (torch.float8_e4m3fn, "F8_E4M3"), (torch.float8_e5m2, "F8_E5M2"), (torch.int8, "I8"),
        (torch.uint8, "U8"), (torch.int64, "I64"), (torch.bool, "BOOL"), (torch.complex64, "C64"),
    ],
)
def test_other_dtypes_are_refused(folder, dtype, said):
    name = "model.layers.0.mlp.up_proj.weight"
    edit(folder / SINGLE, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(ValueError, match=f"{SINGLE}: {name} is of dtype {said}; only"):
        KeyeVL.from_pretrained(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_refused(folder, value):
    edit(folder / SINGLE, lambda tensors: tensors["mlp_AR.linear_1.weight"][3].fill_(value))
    with pytest.raises(ValueError, match=f"{SINGLE}: mlp_AR.linear_1.weight is not finite"):
        KeyeVL.from_pretrained(folder)


def test_weights_that_leave_the_wanted_dtype_are_refused(folder):
    edit(folder / SINGLE, lambda tensors: tensors["model.norm.weight"].fill_(1e5))
    KeyeVL.from_pretrained(folder)
    with pytest.raises(ValueError, match="model.norm.weight is not finite in torch.float16"):
        KeyeVL.from_pretrained(folder, torch.float16)


def test_a_patch_embedding_of_another_order_is_refused(folder):
    name = "visual.vision_model.embeddings.patch_embedding.weight"

    def channels_last(tensors):
        tensors[name] = tensors[name].permute(0, 2, 3, 1).contiguous()

    edit(folder / SINGLE, channels_last)
    with pytest.raises(ValueError, match=f"{name} has shape .64, 14, 14, 3., not"):
        KeyeVL.from_pretrained(folder)


def test_a_tied_head_must_be_the_embedding(tmp_path):
    """Some files hold it twice."""
    keye = KeyeVL(PRESETS["toy"]).init_weights()
    keye.save_pretrained(tmp_path)

    def twice(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit(tmp_path / SINGLE, twice)
    for dtype in (torch.float32, torch.bfloat16):
        KeyeVL.from_pretrained(tmp_path, dtype)
    edit(tmp_path / SINGLE, lambda tensors: tensors["lm_head.weight"][5].add_(1))
    with pytest.raises(ValueError, match=f"{SINGLE}: lm_head.weight is not .*tie_word_embeddings"):
        KeyeVL.from_pretrained(tmp_path)


@pytest.mark.parametrize("shards", [False, True])
def test_a_file_is_opened_for_its_names_and_for_its_tensors(keye, tmp_path, monkeypatch, shards):
    save_plus(keye, 1, tmp_path, MANY if shards else ONE)
    opened = []

    def counting(path, *more):
        opened.append(path)
        return safe_open(path, *more)

    safe_open = weights.safe_open
    monkeypatch.setattr(weights, "safe_open", counting)
    KeyeVL.from_pretrained(tmp_path)
    assert sorted(opened) == sorted(2 * list(tmp_path.glob("*.safetensors")))


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


@pytest.mark.parametrize("name", ["config.json", INDEX])
@pytest.mark.parametrize(
    "content, said",
    [
        ("version https://git-lfs.github.com/spec/v1", "not JSON .*Git LFS pointer"),
        ('{"weight_map": {', "not JSON .*cut short"),
        (b"\xff\xfe{\x00}\x00", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "one JSON object was expected, not list"),
    ],
)
def test_a_broken_json_file_is_named(keye, tmp_path, name, content, said):
    in_shards(keye, tmp_path)
    content = content.encode() if isinstance(content, str) else content
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{tmp_path / name}: {said}"):
        KeyeVL.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [{}, {"weight_map": []}, {"weight_map": {"a": 1}}])
def test_an_index_of_nothing_is_named(keye, tmp_path, content):
    in_shards(keye, tmp_path)
    (tmp_path / INDEX).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{INDEX}: no weight_map"):
        KeyeVL.from_pretrained(tmp_path)


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


def test_a_folder_without_a_model_says_where_one_may_be(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder on this disk, and nothing is down"):
        KeyeVL.from_pretrained("Kwai-Keye/Keye-VL-8B-Preview")
    run = tmp_path / "runs" / "toy"
    shutil.copytree(folder, run / "align" / "model")
    for above in (run, run / "align"):
        with pytest.raises(FileNotFoundError, match=f"did you mean {run}/align/model"):
            KeyeVL.from_pretrained(above)


def test_a_sum_of_models(keye, folder):
    total = KeyeVL.from_pretrained(folder)
    add_weights(total, folder, KEYE_NAMES)
    for name, tensor in keye.state_dict().items():
        torch.testing.assert_close(total.state_dict()[name], 2 * tensor)


def test_models_with_different_tensors_have_no_sum(keye, folder, tmp_path):
    other = tmp_path / "other"
    keye.save_pretrained(other)
    edit(other / SINGLE, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=f"{other}: model.norm.weight is there or in the model"):
        add_weights(KeyeVL.from_pretrained(folder), other, KEYE_NAMES)


def test_models_of_different_shapes_have_no_sum(folder, keye, tmp_path):
    other = tmp_path / "other"
    keye.save_pretrained(other)
    edit(other / SINGLE, lambda tensors: tensors.update({"model.norm.weight": torch.ones(1)}))
    with pytest.raises(ValueError, match="model.norm.weight has another shape than in"):
        add_weights(KeyeVL.from_pretrained(folder), other, KEYE_NAMES)


# -- each rank its own rows ------------------------------------------------------------------------


class Metered:
    """An opened file that notes the bytes read of each tensor."""

    def __init__(self, file, read):
        self.file = file
        self.read = read
        self.keys = file.keys

    def get_tensor(self, name):
        return self.note(name, self.file.get_tensor(name))

    def get_slice(self, name):
        return MeteredSlice(self, name)

    def note(self, name, tensor):
        self.read[name] += tensor.nbytes
        return tensor


class MeteredSlice:
    def __init__(self, metered, name):
        entry = metered.file.get_slice(name)
        self.get_dtype = entry.get_dtype
        self.get_shape = entry.get_shape
        self.rows = lambda rows: metered.note(name, entry[rows])

    def __getitem__(self, rows):
        return self.rows(rows)


def join(out, *flags):
    return start(arguments("").parse_args(["--out", out, "--device", "cpu", *flags]), "small")


def load_in_shards(argv):
    """Rank 0 writes down how many bytes each rank has read of each tensor."""
    out, folder = argv
    run = join(out)
    entire = KeyeVL.from_pretrained(folder).state_dict()
    read = Counter()
    opened = weights.safe_open

    @contextmanager
    def metered(*how):
        with opened(*how) as file:
            yield Metered(file, read)

    weights.safe_open = metered
    state = shard(KeyeVL.shapes(folder), run).load(folder).state_dict()
    for name, tensor in state.items():
        own, rows = own_part(tensor)
        assert torch.equal(own, entire[name][rows]), name
        assert torch.equal(whole(tensor), entire[name]), name
    everyones = run.gather_objects(read)
    if run.main:
        (Path(out) / "read.json").write_text(json.dumps(everyones))


@pytest.mark.parametrize("ranks", [2, 3])
def test_each_rank_reads_its_own_rows_and_together_they_are_the_model(keye, tmp_path, ranks):
    official = tmp_path / "official"
    in_shards(keye, official)
    in_processes(load_in_shards, [tmp_path, official], ranks)
    everyones = json.loads((tmp_path / "read.json").read_text())
    for here, tensor in keye.state_dict().items():
        row = tensor[0].nbytes
        share = -(-len(tensor) // ranks)  # in rows; the last rank has what is left
        left = [min(share, max(0, len(tensor) - rank * share)) for rank in range(ranks)]
        name = renamed(here, KEYE_NAMES)
        assert [read[name] for read in everyones] == [row * rows for rows in left], name


def refuse_in_shards(argv):
    """Rank 0 writes down what each rank says of each folder."""
    out, *folders = argv
    run = join(out)
    said = {}
    for folder in folders:
        try:
            shard(KeyeVL.shapes(folder), run).load(folder)
            error = None
        except (KeyError, ValueError) as e:
            error = f"{type(e).__name__}: {e}"
        said[Path(folder).name] = run.gather_objects(error)
    if run.main:
        (Path(out) / "said.json").write_text(json.dumps(said))


NORM = "model.norm.weight"
TABLE = "model.embed_tokens.weight"


def test_what_is_wrong_is_named_by_the_ranks_that_meet_it(keye, tmp_path):
    def shorter(tensors):
        tensors[NORM] = tensors[NORM][:40].clone()

    def flat(tensors):
        tensors[TABLE] = tensors[TABLE].flatten()

    def integers(tensors):
        tensors[NORM] = tensors[NORM].long()

    def last_row(tensors):
        tensors[TABLE][-1, 3] = float("nan")

    def first_row(tensors):
        tensors[TABLE][0, 3] = float("-inf")

    spoil = {
        "shorter": (NORM, shorter),
        "flat": (TABLE, flat),
        "integers": (NORM, integers),
        "missing": (NORM, lambda tensors: tensors.pop(NORM)),
        "last_row": (TABLE, last_row),
        "first_row": (TABLE, first_row),
    }
    files = {}
    for case, (name, change) in spoil.items():
        folder = tmp_path / case
        files[case] = folder / in_shards(keye, folder)[name]
        edit(files[case], change)
    index = json.loads((tmp_path / "missing" / INDEX).read_text())
    del index["weight_map"][NORM]
    (tmp_path / "missing" / INDEX).write_text(json.dumps(index))
    in_processes(refuse_in_shards, [tmp_path, *(tmp_path / case for case in spoil)], ranks=2)
    said = json.loads((tmp_path / "said.json").read_text())

    norm, table = f"{files['shorter']}: {NORM}", f"{files['flat']}: {TABLE}"
    assert said["shorter"] == [f"ValueError: {norm} has shape (40,), but the model needs (96,)"] * 2
    wanted = "has shape (98304,), but the model needs (1024, 96)"
    assert said["flat"] == [f"ValueError: {table} {wanted}"] * 2
    for line in said["integers"]:
        assert line.startswith(f"ValueError: {files['integers']}: {NORM} is of dtype I64")
    missing = f"{tmp_path / 'missing'}: 1 tensors missing, first {NORM}"
    assert said["missing"] == [f"KeyError: {missing!r}"] * 2
    for case, rank in (("first_row", 0), ("last_row", 1)):
        line = said[case][rank]
        assert line.startswith(f"ValueError: {files[case]}: {TABLE} is not finite in torch.float32")
        assert said[case][1 - rank] is None, "its own rows are good"
    assert not any("\n" in line for lines in said.values() for line in lines if line)


# -- many ranks write ------------------------------------------------------------------------------


def export_in_shards(argv):
    """Rank 0 writes down which files each rank has written."""
    out, folder, size = argv
    run = join(out, "--size", size)
    wrote = []

    def write_file(path, tensors):
        wrote.append(path.name)
        weights.write_file(path, tensors)

    checkpoint.write_file = write_file
    checkpoint.plan_files = partial(plan_files, shard_bytes=FEW)
    model = shard(KeyeVL.shapes(folder), run).load(folder)
    checkpoint.export(run, model, toy_processor())
    everyones = run.gather_objects(wrote)
    if run.main:
        (Path(out) / "wrote.json").write_text(json.dumps(everyones))


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("size, dtype", [("toy", torch.float32), ("8b", torch.bfloat16)])
def test_ranks_share_out_the_files_of_an_export(keye, tmp_path, size, dtype, ranks):
    """They are those that one process writes, to the last bit; of released sizes in bf16."""
    first, alone = tmp_path / "first", tmp_path / "alone"
    keye.save_pretrained(first)
    state = {name: tensor.to(dtype) for name, tensor in keye.state_dict().items()}
    save_weights(state, keye.config.to_json(), alone, shard_bytes=FEW)
    in_processes(export_in_shards, [tmp_path, first, size], ranks)

    wrote = json.loads((tmp_path / "wrote.json").read_text())
    names = sorted(path.name for path in alone.glob("*.safetensors"))
    assert wrote == [names[rank::ranks] for rank in range(ranks)] and all(wrote)
    made = tmp_path / size / "small" / "model"
    for path in alone.iterdir():
        assert (made / path.name).read_bytes() == path.read_bytes(), path.name
    beside = {path.name for path in made.iterdir()} - {path.name for path in alone.iterdir()}
    toy_processor().save_pretrained(tmp_path / "processor")
    assert beside == {path.name for path in (tmp_path / "processor").iterdir()}
    assert not made.with_name("model.tmp").exists()


def test_transformers_reads_what_ranks_have_written(keye, tmp_path):
    modeling_utils = pytest.importorskip("transformers.modeling_utils")
    hub = pytest.importorskip("transformers.utils.hub")
    keye.save_pretrained(tmp_path / "first")
    in_processes(export_in_shards, [tmp_path, tmp_path / "first", "8b"], ranks=2)
    made = tmp_path / "8b" / "small" / "model"
    files, index = hub.get_checkpoint_shard_files(made, made / INDEX)
    tensors = {}
    for file in files:
        tensors |= modeling_utils.load_state_dict(file)
    assert set(index["all_checkpoint_keys"]) == tensors.keys()
    assert index["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for name, tensor in keye.state_dict().items():
        theirs = tensors.pop(renamed(name, KEYE_NAMES))
        assert theirs.dtype == torch.bfloat16
        assert torch.equal(theirs.flatten(), tensor.bfloat16().flatten()), name
    assert not tensors
    rounded = {name: tensor.bfloat16().float() for name, tensor in keye.state_dict().items()}
    assert same(KeyeVL.from_pretrained(made).state_dict(), rounded)
