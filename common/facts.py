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
    numbers = known.keys() | {f.name for f in fields(kind)}
    facts = _side_by_side(facts, numbers, where)
    if facts.get("use_sliding_window") is False:
        facts.pop("sliding_window", None)  # the size of what is not used
    for key, values in known.items():
        if key in facts and facts[key] not in values:
            built = " or ".join(map(repr, values))
            raise ValueError(f"{where}: {key} is {facts[key]!r}; only {built} is built here")
    for key in needed:
        if key not in facts:
            raise ValueError(f"{where}: no {key}; Keye's or Qwen3's file was expected")
    for f in fields(kind):
        if f.name in facts and f.type in (int, float, bool):
            _check_type(f.name, facts[f.name], f.type, where)
    for key, value in facts.items():
        if value and key not in numbers and is_telling(key):
            raise ValueError(f"{where}: {key} is {value!r}; nothing here honours that")
    return facts


def is_telling(key: str) -> bool:
    """Whether a key that is not known looks as if it changed numbers."""
    note = key in HARMLESS or key.startswith("_") or key.endswith("_id")
    return bool(TELLING.search(key)) and not note


def _check_type(key, value, kind, where):
    right = type(value) is kind or (kind is float and type(value) is int)
    if right and kind is not bool:
        right = 0 < value < inf or (value == 0 and key.endswith("_id"))
    if not right:
        want = "true or false" if kind is bool else f"a positive {kind.__name__}"
        raise ValueError(f"{where}: {key} is {value!r}; want {want}")


def _side_by_side(facts, numbers, where):
    if not isinstance(facts, dict):
        raise ValueError(f"{where}: {facts!r}, where an object was expected")
    entries = {}
    for name in ("text_config", *ROPE_ENTRIES):
        if facts.get(name) is not None:
            entry = _side_by_side(facts[name], numbers, f"{where}, {name}")
            if name in ROPE_ENTRIES:  # what else stands there keeps its place's name
                entry = {k if k in ROPE_KEYS else f"{name}.{k}": v for k, v in entry.items()}
            entries[name] = entry
    flat = {k: v for k, v in facts.items() if v is not None and k not in entries}
    for name, entry in entries.items():
        for key, value in entry.items():
            if flat.get(key, value) != value and key in numbers:
                raise ValueError(
                    f"{where}: {key} is {value!r} in {name}, but {flat[key]!r} elsewhere"
                )
        flat |= entry
    return flat
