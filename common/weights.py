"""Model folders in the official layout: config.json, and the weights as safetensors, in one file
or in shards with an index.

    filled = load_weights(model, folder, KEYE_NAMES, UNUSED)   every tensor checked, then copied
    save_weights(model.state_dict(), config, folder)           as Keye-VL-8B-Preview has it
    add_weights(model, folder, KEYE_NAMES)                     another model's, for their mean

Our parameters have shorter names than those in the files; the tables below translate.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from common.parallel import own_part

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
# (prefix that transformers has in its own classes, official prefix)
TRANSFORMERS_NAMES = [
    ("model.language_model.", "model."),
    ("model.visual.", "visual."),
    ("model.mlp_AR.", "mlp_AR."),
    ("model.lm_head.", "lm_head."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("language_model.", "model."),
]
# prefixes in the files that a model may have no place for
UNUSED = (
    # positions by flat patch index: in the released file, never read by the released model
    "visual.vision_model.embeddings.packing_position_embedding.",
    "visual.vision_model.head.",  # SigLIP's pooling, for stage 0 only
    "lm_head.",  # of a model whose head is its embedding
)
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"

# In the files a convolution of stride 14 over 14-pixel patches, (C, 3, 14, 14); here the linear
# layer that this amounts to, (C, 588).
PATCH_EMBEDDING = "patch_embedding.weight"
PATCH = (3, 14, 14)

SHARD_BYTES = 5 * 10**9
READABLE = ("F64", "F32", "F16", "BF16")  # dtypes, by safetensors' names
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Weights that readers of this layout may look for. Those of an older model would be taken for the
# new one's: transformers, for one, prefers the single file to the index.
WEIGHTS = (
    INDEX, SINGLE, "model-*-of-*.safetensors",
    "pytorch_model.bin.index.json", "pytorch_model.bin", "pytorch_model-*-of-*.bin",
)
BROKEN = "a download cut short, or a Git LFS pointer in place of the file?"


def renamed(name: str, names: list[tuple[str, str]]) -> str | None:
    """A parameter's name in the file; None where the table has none."""
    for ours, theirs in names:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return None


def official(name: str) -> str:
    """The official name of a tensor that is perhaps stored by transformers' name."""
    return renamed(name, TRANSFORMERS_NAMES) or name


# --------------------------------------------------------------------------------------------------
# reading


def why_no_model(path: Path) -> str:
    """Why a model folder lacks this file, as far as the disk tells."""
    folder = path.parent
    if not folder.exists():
        return "no such folder on this disk, and nothing is downloaded; `make toy` trains a model"
    why = f"no {path.name} here; a model folder in the official layout was expected"
    for below in ("*", "*/*"):  # of a phase's folder, or of a run's
        found = sorted(folder.glob(f"{below}/{path.name}"))
        if found:
            return f"{why}; did you mean {found[0].parent}?"
    return why


def read_json(path: Path) -> dict:
    """A file of a model folder. FileNotFoundError or ValueError name it."""
    try:
        facts = json.loads(path.read_text("utf-8-sig"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.parent}: {why_no_model(path)}") from None
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: not JSON ({e}); {BROKEN}") from None
    if not isinstance(facts, dict):
        raise ValueError(f"{path}: one JSON object was expected, not {type(facts).__name__}")
    return facts


def read_config(folder: str | Path) -> dict:
    """config.json of a folder. FileNotFoundError or ValueError name the file."""
    return read_json(Path(folder) / "config.json")


@contextmanager
def _opened(path: Path):
    """The file for reading; an error names it when it is not, or not wholly, safetensors."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as e:
        raise ValueError(f"{path}: cannot be read as safetensors ({e}); {BROKEN}") from None
    except OSError as e:
        raise type(e)(f"{path}: {e}") from None


def _read_index(folder: Path) -> tuple[list[str], dict[str, str]]:
    """The files of weights of a folder, and which tensors the index says are in which."""
    single = folder / SINGLE
    index = folder / INDEX
    if not index.exists():
        if not single.exists():
            raise FileNotFoundError(f"{folder}: neither {SINGLE} nor {INDEX}")
        return [SINGLE], {}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise ValueError(f"{index}: no weight_map of tensors and their files")
    files = sorted(set(weight_map.values()))
    if single.exists() and SINGLE not in files:
        if any((folder / file).exists() for file in files):
            raise ValueError(
                f"{folder}: holds both {SINGLE} and the shards of {INDEX}, perhaps of two models; "
                "remove the older ones"
            )
        return [SINGLE], {}  # transformers' save leaves an older index, but not its shards
    return files, weight_map


def weight_files(folder: str | Path) -> dict[str, Path]:
    """Which file of the folder holds each tensor, by official names.

    ValueError where two files hold the same one, or the index is wrong.
    """
    folder = Path(folder)
    files, weight_map = _read_index(folder)
    where = {}
    for file in files:
        path = folder / file
        with _opened(path) as opened:
            for stored in opened.keys():
                name = official(stored)
                if name in where:
                    raise ValueError(f"{path}: {stored} is a second {name}, beside {where[name]}")
                where[name] = path
    for stored, file in weight_map.items():
        if where.get(official(stored)) != folder / file:
            raise ValueError(f"{folder / file}: no {stored} here, where {INDEX} says it is")
    return where


def read_tensors(where: dict[str, Path], rows: Callable[[str], slice]) -> Iterator[tuple]:
    """(official name, shape, rows(name) of it) of all tensors of weight_files, as needed here.

    Every file is opened once: to open it maps it and reads its header; of a tensor only the rows
    that are asked for are read. ValueError names the file and a tensor that is of integers or
    8-bit floats, or is no patch embedding.
    """
    for path in dict.fromkeys(where.values()):
        with _opened(path) as file:
            for stored in file.keys():
                name = official(stored)
                entry = file.get_slice(stored)
                dtype = entry.get_dtype()
                if dtype not in READABLE:
                    raise ValueError(
                        f"{path}: {stored} is of dtype {dtype}; only {', '.join(READABLE)} are read"
                    )
                shape = tuple(entry.get_shape())
                wanted = rows(name)
                # a slice of all is a copy; the tensor itself lies in the mapped file
                all_of_it = wanted == slice(None) or not shape
                tensor = file.get_tensor(stored) if all_of_it else entry[wanted]
                if stored.endswith(PATCH_EMBEDDING):
                    if shape[1:] != PATCH:
                        raise ValueError(
                            f"{path}: {stored} has shape {shape}, not (C, 3, 14, 14)"
                        )
                    tensor = tensor.flatten(1)  # (C, 588)
                    shape = (shape[0], tensor.shape[1])
                yield name, shape, tensor


@torch.no_grad()
def load_weights(
    module: nn.Module,
    folder: str | Path,
    names: list[tuple[str, str]],
    unused: tuple[str, ...] = (),
) -> set[str]:
    """Copy a folder's tensors into those parameters that `names` covers; all must be there and fit.

    names: (prefix here, prefix in the file); unused: prefixes in the file that are known and not
    needed. Where the module is sharded, each rank reads its own rows. Returns the names here of
    what was filled. KeyError for a missing or an extra tensor, ValueError for one of a wrong shape
    or dtype, one that is not finite, or a broken file, each with its name.
    """
    where = weight_files(folder)
    state = module.state_dict()
    ours = {renamed(name, names): name for name in state}  # {name in the file: name here}
    ours.pop(None, None)  # parameters that the table does not cover
    missing = sorted(ours.keys() - where.keys())
    if missing:
        raise KeyError(f"{folder}: {len(missing)} tensors missing, first {missing[0]}")
    extra = sorted(n for n in where.keys() - ours.keys() if not n.startswith(unused))
    if extra:
        raise KeyError(
            f"{folder}: {len(extra)} tensors that this model has no place for, first {extra[0]}"
        )
    own = {name: own_part(state[here]) for name, here in ours.items()}
    own.setdefault(HEAD, own.get(EMBEDDING))  # some files hold the embedding twice, as the head too
    head = None
    nothing = slice(0, 0)
    for name, shape, source in read_tensors(where, lambda name: own.get(name, (0, nothing))[1]):
        what = f"{where[name]}: {name}"
        if name in ours:
            if shape != state[ours[name]].shape:
                needs = tuple(state[ours[name]].shape)
                raise ValueError(f"{what} has shape {shape}, but the model needs {needs}")
            _fill(own[name][0], source, what)
        elif name == HEAD:
            if shape != state[ours[EMBEDDING]].shape:
                raise ValueError(f"{what} has shape {shape}, another than {EMBEDDING}")
            head = source
    if head is not None:
        embedding, _ = own[EMBEDDING]
        if not torch.equal(head.to(embedding), embedding):
            raise ValueError(
                f"{where[HEAD]}: {HEAD} is not {EMBEDDING}, though config.json says "
                "tie_word_embeddings"
            )
    return set(ours.values())


def _fill(target: Tensor, source: Tensor, what: str):
    target.copy_(source)
    if not target.numel():
        return  # a rank beyond the last row
    lowest, highest = target.aminmax()  # both are NaN where one number is
    if not (lowest.isfinite() and highest.isfinite()):
        raise ValueError(f"{what} is not finite in {target.dtype}: the model has diverged")


@torch.no_grad()
def add_weights(module: nn.Module, folder: str | Path, names: list[tuple[str, str]]):
    """module += the model in `folder`, each rank its own rows.

    ValueError where the folder has not the same tensors.
    """
    where = weight_files(folder)
    state = module.state_dict()
    own = {renamed(name, names): own_part(tensor) for name, tensor in state.items()}
    shapes = {renamed(name, names): tensor.shape for name, tensor in state.items()}
    odd = own.keys() ^ where.keys()
    if odd:
        raise ValueError(f"{folder}: {min(odd)} is there or in the model alone: no average")
    for name, shape, source in read_tensors(where, lambda name: own[name][1]):
        if shape != shapes[name]:
            raise ValueError(f"{where[name]}: {name} has another shape than in the other models")
        target, _ = own[name]
        target.add_(source.to(target))


# --------------------------------------------------------------------------------------------------
# writing


def save_weights(
    state: dict[str, Tensor], config: dict, folder: str | Path, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write config.json and the weights by their official names; above 5 GB in shards.

    state: our names, any device. What was there before stays whole until all of it is written.
    """
    folder = Path(folder)
    aside = folder / "saving.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        files = plan_files(state, None, shard_bytes)
        for file, names in files.items():
            write_file(aside / file, {name: state[name] for name in names})
        write_index(aside, state, files, config)
        _replace_model(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _replace_model(aside: Path, folder: Path):
    """Moves a model's files up into `folder`, in place of an older model's.

    No reader takes a folder without config.json. So that goes first and comes last: a kill in
    between leaves no mixture of two models that could be read.
    """
    (folder / "config.json").unlink(missing_ok=True)
    for pattern in WEIGHTS:
        for older in folder.glob(pattern):
            older.unlink()
    for path in aside.iterdir():
        if path.name != "config.json":
            os.replace(path, folder / path.name)
    os.replace(aside / "config.json", folder / "config.json")


def plan_files(
    state: dict[str, Tensor], dtype: torch.dtype | None = None, shard_bytes: int = SHARD_BYTES
) -> dict[str, list[str]]:
    """Which tensors, by our names, go into which file, when they are written in `dtype`.

    One of a rank's rows counts whole, so all ranks plan alike. KeyError: a name without a place.
    """
    shards = [[]]
    size = 0  # bytes of the last one
    for name, tensor in state.items():
        if renamed(name, KEYE_NAMES) is None:
            raise KeyError(f"{name} has no name in the official layout")
        nbytes = tensor.numel() * (dtype or tensor.dtype).itemsize
        if size and size + nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    files = range(1, len(shards) + 1)
    return dict(zip((f"model-{n:05}-of-{len(shards):05}.safetensors" for n in files), shards))


def write_file(path: Path, tensors: dict[str, Tensor]):
    """One file of a model folder: our names become official ones."""
    stored = {}
    for name, tensor in tensors.items():
        tensor = tensor.cpu().contiguous()
        if name.endswith(PATCH_EMBEDDING):
            tensor = tensor.unflatten(1, PATCH)
        stored[renamed(name, KEYE_NAMES)] = tensor
    save_file(stored, path, metadata={"format": "pt"})


def write_index(
    folder: Path, state: dict[str, Tensor], files: dict[str, list[str]], config: dict, dtype=None
):
    """config.json, and for several files of weights the index."""
    if len(files) > 1:
        weight_map = {renamed(n, KEYE_NAMES): file for file, names in files.items() for n in names}
        total = sum(t.numel() * (dtype or t.dtype).itemsize for t in state.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
