"""config.json as others write it: what this model takes from it, or one line that says why not.

    facts = read_facts(facts, Config, DECODER, ("hidden_size", ...), "its/config.json")

A setting that changes numbers is a field of Config, or has a value that is built here, or is
refused. Keys that change nothing are passed over.
"""

import re
from dataclasses import fields
from math import inf
from pathlib import Path

# Values that mean the decoder of model.py; with any other it would be a different one.
DECODER = {
    "attention_bias": (False,),
    "attention_dropout": (0,),
    "hidden_act": ("silu",),
    "is_causal": (True,),
    "mrope_interleaved": (False,),
    "partial_rotary_factor": (1,),
    "rope_type": ("default", "mrope"),
    "type": ("default", "mrope"),  # of rope_scaling, in older files
    "sliding_window": (False,),
    "use_sliding_window": (False,),
    "use_mrope": (True,),
    "use_qk_norm": (True,),
    "use_rope": (True,),
}
# The same for the ViT and SigLIP's text tower.
TOWER = {
    "attention_dropout": (0,),
    "hidden_act": ("gelu_pytorch_tanh",),
    "num_channels": (3,),
    "patch_size": (14,),
    "qkv_bias": (True,),
    "rope_theta": (10000,),
    "rope_type": ("default", "axial"),
    "spatial_merge_size": (2,),
    "temporal_patch_size": (1, 2),  # Keye's file says 2, and its code never reads it
    "tokens_per_second": (2,),
}

# Another key changes numbers, as far as can be told, when its name has one of these in it ...
TELLING = re.compile(
    "_act|act_|activ|alibi|attention|attn|bias|channel|compress|deepstack|drop|eps|expert|factor"
    "|feature|fps|freq|fullatt|interleav|layer|logit|merge|moe|multipl|norm|ntk|patch|pool"
    "|position|projector|quant|qkv|rope|rotary|scal|second|softcap|theta|window"
)
# ... and is none of these: how attention is computed, how weights began, what sets shapes alone.
HARMLESS = {
    "attn_implementation", "initializer_factor", "layer_types", "max_position_embeddings",
    "max_window_layers", "vision_use_head",
}

# Facts about RoPE stand in one entry in transformers 5 and in another before; those of the decoder
# in text_config, in newer files.
ROPE_ENTRIES = ("rope_parameters", "rope_scaling")
ROPE_KEYS = {
    "rope_type", "type", "rope_theta", "mrope_section", "mrope_interleaved",
    "partial_rotary_factor",
}


def read_facts(
    facts: dict, kind: type, known: dict[str, tuple], needed: tuple[str, ...], where: str | Path
) -> dict:
    """What a config.json, or an entry of it, says about a dataclass `kind`; its nested facts stand
    beside the others, and nulls are left out.

    known: values that are built here, of what is no field of kind; needed: keys that must be there.
    ValueError names `where`, the key and its value.
    """
    types = {f.name: f.type for f in fields(kind)}
    facts = _side_by_side(facts, known | types, where)
    if facts.get("use_sliding_window") is False:
        facts.pop("sliding_window", None)  # the size of what is not used
    for key, values in known.items():
        if key in facts and facts[key] not in values:
            built = " or ".join(map(repr, values))
            raise ValueError(f"{where}: {key} is {facts[key]!r}; only {built} is built here")
    for key in needed:
        if key not in facts:
            raise ValueError(f"{where}: no {key}; Keye's or Qwen3's file was expected")
    for key, value in facts.items():
        if key in types:
            _check_type(key, value, types[key], where)
        elif value and key not in known and _is_telling(key):
            raise ValueError(f"{where}: {key} is {value!r}; nothing here honours that")
    return facts


def as_object(value, where: str | Path) -> dict:
    """An entry of a file, such as vision_config. ValueError where it is a list, a text, null, .."""
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {value!r}, where an object was expected")
    return value


def _is_telling(key):
    harmless = key in HARMLESS or key.startswith("_") or key.endswith("_id")
    return TELLING.search(key) and not harmless


def _check_type(key, value, kind, where):
    if kind is bool:
        right, want = isinstance(value, bool), "true or false"
    elif kind in (int, float):
        above = -1 if key.endswith("_id") else 0
        right = type(value) in (int, kind) and above < value < inf
        want = f"a positive {kind.__name__}"
    else:  # of what is no number its reader knows more
        return
    if not right:
        raise ValueError(f"{where}: {key} is {value!r}; want {want}")


def _side_by_side(facts, numbers, where):
    as_object(facts, where)
    for name in ("text_config", "vision_config"):
        as_object(facts.get(name, {}), f"{where}, {name}")
    flat = {key: value for key, value in facts.items() if value is not None}
    found = [name for name in ("text_config", *ROPE_ENTRIES) if name in flat]
    entries = {name: _side_by_side(flat.pop(name), numbers, f"{where}, {name}") for name in found}
    for name, entry in entries.items():
        for key, value in entry.items():
            if name in ROPE_ENTRIES and key not in ROPE_KEYS:
                key = f"{name}.{key}"  # what else stands there keeps its place's name
            if key in numbers and flat.setdefault(key, value) != value:
                other = f"{key} is {value!r} in {name}, but {flat[key]!r} elsewhere"
                raise ValueError(f"{where}: {other}")
            flat[key] = value
    return flat
