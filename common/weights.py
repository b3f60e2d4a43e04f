"""Model folders in the official layout: config.json, and the weights as safetensors, in one file
or in shards with an index.

    load_weights(model, folder, KEYE_NAMES, UNUSED)          every tensor checked, then copied
    save_weights(model.state_dict(), config, folder)         as Keye-VL-8B-Preview has it
    average = average_weights(folders, KEYE_NAMES)           the mean of several models

Our parameters have shorter names than those in the files; the tables below translate.
"""

import json
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from common.jsonl import replacing

# (prefix here, prefix in the file); the first that fits counts
VIT_NAMES = [
    ("vit.patch_embedding.", "vision_model.embeddings.patch_embedding."),
    ("vit.position_embedding.", "vision_model.embeddings.position_embedding."),
    ("vit.layers.", "vision_model.encoder.layers."),
    ("vit.", "vision_model."),
]
QWEN3_NAMES = [("decoder.", "model."), ("lm_head.", "lm_head.")]
KEYE_NAMES = [
    *[(ours, f"visual.{theirs}") for ours, theirs in VIT_NAMES],
    ("projector.", "mlp_AR."),
    *QWEN3_NAMES,
]
SIGLIP_NAMES = [
    *VIT_NAMES,
    ("text.token_embedding.", "text_model.embeddings.token_embedding."),
    ("text.position_embedding.", "text_model.embeddings.position_embedding."),
    ("text.layers.", "text_model.encoder.layers."),
    ("text.", "text_model."),
    ("logit_", "logit_"),
]
# prefixes in the files that a model may have no place for
UNUSED = (
    # positions by flat patch index: in the released file, never read by the released model
    "visual.vision_model.embeddings.packing_position_embedding.",
    "visual.vision_model.head.",  # SigLIP's pooling, for stage 0 only
    "lm_head.",  # of a model whose head is its embedding
)

# In the files a convolution of stride 14 over 14-pixel patches, (C, 3, 14, 14); here the linear
# layer that this amounts to, (C, 588).
PATCH_EMBEDDING = "patch_embedding.weight"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def renamed(name: str, names: list[tuple[str, str]]) -> str | None:
    """A parameter's name in the file; None where the table has none."""
    for ours, theirs in names:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return None


def read_config(folder: str | Path) -> dict:
    """config.json of a folder. FileNotFoundError or ValueError name the file."""
    path = Path(folder) / "config.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{folder}: no config.json here; a model folder in the official layout was expected"
        )
    try:
        return json.loads(path.read_text("utf-8-sig"))
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}: not JSON: {e}") from None


@contextmanager
def _opened(path: Path):
    """The file for reading; ValueError names it when it is not, or not wholly, safetensors."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as e:
        raise ValueError(
            f"{path}: cannot be read as safetensors ({e}); a download cut short, or a Git LFS "
            "pointer in place of the file?"
        ) from None


def weight_files(folder: str | Path) -> dict[str, Path]:
    """Which file of the folder holds each tensor, by the names in the files."""
    folder = Path(folder)
    index = folder / INDEX
    if index.exists():
        weight_map = json.loads(index.read_text())["weight_map"]
        return {name: folder / file for name, file in weight_map.items()}
    path = folder / SINGLE
    if not path.exists():
        raise FileNotFoundError(f"{folder}: neither {SINGLE} nor {INDEX}")
    with _opened(path) as file:
        return dict.fromkeys(file.keys(), path)


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor of a file, by its name there. To open a file maps it, and reads its header."""
    with _opened(path) as file:
        tensor = file.get_tensor(name)
    return tensor.flatten(1) if name.endswith(PATCH_EMBEDDING) else tensor


@torch.no_grad()
def load_weights(
    module: nn.Module,
    folder: str | Path,
    names: list[tuple[str, str]],
    unused: tuple[str, ...] = (),
) -> None:
    """Copy a folder's tensors into those parameters that `names` covers; all must be there and fit.

    names: (prefix here, prefix in the file); unused: prefixes in the file that are known and not
    needed. KeyError for a missing or an extra tensor, ValueError for a wrong shape or a broken
    file, each with its name.
    """
    where = weight_files(folder)
    targets = {renamed(name, names): tensor for name, tensor in module.state_dict().items()}
    targets.pop(None, None)  # parameters that the table does not cover
    missing = sorted(targets.keys() - where.keys())
    if missing:
        raise KeyError(f"{folder}: {len(missing)} tensors missing, first {missing[0]}")
    extra = sorted(n for n in where.keys() - targets.keys() if not n.startswith(unused))
    if extra:
        raise KeyError(
            f"{folder}: {len(extra)} tensors that this model has no place for, first {extra[0]}"
        )
    for name, target in targets.items():
        source = read_tensor(where[name], name)
        if source.shape != target.shape:
            raise ValueError(
                f"{where[name]}: {name} has shape {tuple(source.shape)}, "
                f"but the model needs {tuple(target.shape)}"
            )
        target.copy_(source)


def average_weights(folders: list[Path], names: list[tuple[str, str]]) -> dict[str, Tensor]:
    """Plain mean of several folders' tensors in fp32, by our names, for save_weights.

    ValueError when not all folders have the same tensors.
    """
    to_ours = [(theirs, ours) for ours, theirs in names]
    first = weight_files(folders[0])
    total = {}
    for folder in folders:
        where = weight_files(folder)
        odd = where.keys() ^ first.keys()
        if odd:
            raise ValueError(f"{folders[0]} or {folder} has no {min(odd)}: no average of both")
        for name, path in where.items():
            ours = renamed(name, to_ours)
            total[ours] = total.get(ours, 0) + read_tensor(path, name).float()
    return {name: tensor / len(folders) for name, tensor in total.items()}


def save_weights(
    state: dict[str, Tensor], config: dict, folder: str | Path, shard_bytes: int = 5 * 10**9
) -> None:
    """Write config.json and the weights by their official names; above 5 GB in shards.

    state: our names, any device. Each file of weights is there whole or not at all.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shards = [{}]
    size = 0  # bytes of the last one
    for name, tensor in state.items():
        tensor = tensor.cpu().contiguous()
        if name.endswith(PATCH_EMBEDDING):
            tensor = tensor.unflatten(1, (3, 14, 14))
        if size and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][renamed(name, KEYE_NAMES)] = tensor
        size += tensor.nbytes

    weight_map = {}
    single = len(shards) == 1
    for number, shard in enumerate(shards, 1):
        file = SINGLE if single else f"model-{number:05}-of-{len(shards):05}.safetensors"
        with replacing(folder / file) as part:
            save_file(shard, part, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    if single:
        (folder / INDEX).unlink(missing_ok=True)  # an older model's; readers would follow it
        return
    total = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
