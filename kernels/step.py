"""A whole step of decoding as one call, on a CPU, for a small decoder in fp32.

    step = decoder_step(layers, norm, frequencies, heads, eps)      None: not here
    step(x, positions, lengths, k, v)           x (B, C): embeddings become hidden states

The work is done in step.cpp. Nothing learns through it: weights are read where they lie, so they
may change between steps, but not move.
"""

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from kernels.build import load

# ours: PyTorch reads the weights of a wider decoder with all threads, for as long as its calls take
MAX_CHANNELS = 768
CHANNELS = 64  # heads must be whole multiples of step.cpp's constant of this name
NAMES = "norm q k v o q_norm k_norm mlp_norm gate up down".split()


class Layer(ctypes.Structure):
    """step.cpp's struct of this name."""

    _fields_ = [(name, ctypes.c_void_p) for name in NAMES]


class Step(ctypes.Structure):
    """step.cpp's struct of this name."""

    _fields_ = [
        ("layers", ctypes.POINTER(Layer)),
        *((name, ctypes.c_void_p) for name in ("norm", "frequencies", "keys", "values", "x")),
        *((name, ctypes.c_void_p) for name in ("positions", "lengths")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("tokens", "layer_count", "channels", "inner")),
        *((name, ctypes.c_int32) for name in ("heads", "kv_heads", "width", "rows", "capacity")),
    ]


def decoder_step(
    layers: list[list[Tensor]], norm: Tensor, frequencies: Tensor, heads: int, eps: float
) -> Callable | None:
    """The step of a decoder, or None where step.cpp cannot do it.

    layers: for each its weights in the order of NAMES, matrices (out, in). norm (C,): the last one.
    frequencies (D / 2,): of RoPE. All fp32.
    """
    small = len(norm) <= MAX_CHANNELS and not 2 * len(frequencies) % CHANNELS
    weights = [norm, frequencies, *(weight for layer in layers for weight in layer)]
    if not small or not all(map(plain, weights)) or load("step.cpp") is None:
        return None
    for layer in layers:
        check_layer(dict(zip(NAMES, layer, strict=True)), len(norm), heads, 2 * len(frequencies))
    addresses = [Layer(*(weight.data_ptr() for weight in layer)) for layer in layers]
    addresses = (Layer * len(layers))(*addresses)
    inner = len(layers[0][NAMES.index("gate")])

    def step(x: Tensor, positions: Tensor, lengths: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """x (B, C) becomes the hidden states of B tokens, each behind lengths (B,) others in its
        row of the caches k and v (layers, R, L, KV, D); their own keys and values enter these.
        positions (B,) of the tokens. ValueError where a row is full."""
        x = x.contiguous()
        lengths, positions = lengths.int().contiguous(), positions.long().contiguous()
        if not all(map(plain, (x, k, v))) or k.shape != v.shape:
            raise ValueError("decoder step: x, k and v must be fp32 on a CPU, k and v contiguous")
        _, rows, capacity, kv_heads, width = k.shape
        work = Step(
            addresses, *(t.data_ptr() for t in (norm, frequencies, k, v, x, positions, lengths)),
            eps, len(x), len(layers), len(norm), inner, heads, kv_heads, width, rows, capacity,
        )
        full = load("step.cpp").decoder_step(ctypes.byref(work), torch.get_num_threads())
        if full >= 0:
            raise ValueError(
                f"decoder step: row {full} holds {int(lengths[full])} tokens; the cache has {rows} "
                f"rows of {capacity}"
            )
        return x

    return step


def plain(x: Tensor) -> bool:
    whole = type(x) in (Tensor, torch.nn.Parameter)  # no shard of FSDP's
    return whole and x.device.type == "cpu" and x.dtype == torch.float32 and x.is_contiguous()


def check_layer(layer: dict, channels: int, heads: int, width: int):
    """ValueError naming the weight that step.cpp would read wrongly."""
    q, kv, inner = heads * width, len(layer["k"]), len(layer["gate"])
    want = dict(
        norm=(channels,), q=(q, channels), k=(kv, channels), v=(kv, channels), o=(channels, q),
        q_norm=(width,), k_norm=(width,), mlp_norm=(channels,),
        gate=(inner, channels), up=(inner, channels), down=(channels, inner),
    )
    for name, shape in want.items():
        if layer[name].shape != shape or kv % width or q % kv:
            found = tuple(layer[name].shape)
            raise ValueError(f"decoder step: {name} is {found}; {shape} was expected")
