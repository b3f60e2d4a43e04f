"""What a decoder layer does to a new token beside products and attention, in two kernels on a GPU.

Nothing learns through them, and nothing here waits for the GPU: a CUDA graph can hold them. The
work is done in layer.cu.
"""

import ctypes

import torch
from torch import Tensor

from kernels.build import load

DTYPES = (torch.float16, torch.bfloat16)
WIDTHS = (64, 128)  # of heads, that layer.cu is compiled for


class Heads(ctypes.Structure):
    """layer.cu's struct of this name."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "q_norm", "k_norm", "cos", "sin")),
        *((name, ctypes.c_void_p) for name in ("places", "out", "keys", "values")),
        *((name, ctypes.c_int) for name in ("tokens", "heads", "kv_heads")),
        ("eps", ctypes.c_float),
    ]


def available(weight: Tensor, width: int) -> bool:
    """Whether weights of this kind, with heads of this width, find their kernels here."""
    whole = type(weight) in (Tensor, torch.nn.Parameter)  # no shard of FSDP's
    known = whole and weight.is_cuda and weight.dtype in DTYPES and width in WIDTHS
    return known and load("layer.cu") is not None


def enter_heads(
    q: Tensor, k: Tensor, v: Tensor, norms: tuple[Tensor, Tensor], rope: list[Tensor],
    places: Tensor, cache: tuple[Tensor, Tensor], eps: float,
) -> Tensor:
    """q (B, H, D) and k (B, KV, D) of B new tokens are normed and turned, k and v enter the cache.

    norms: weights (D,) for q and for k; rope: cos and sin (B, 1, D / 2) fp32; places (B,) of the
    tokens in the cache's keys and values (R, L, KV, D), all rows end to end. -> q, new (B, H, D)
    """
    tensors = dict(
        q=q, k=k, v=v, q_norm=norms[0], k_norm=norms[1], keys=cache[0], values=cache[1]
    )
    for name, x in tensors.items():
        check(name, x, q.dtype, q.device)
    check("cos", rope[0], torch.float32, q.device)
    check("sin", rope[1], torch.float32, q.device)
    check("places", places, torch.int64, q.device)
    if q.dtype not in DTYPES or q.dim() != 3 or q.shape[2] not in WIDTHS:
        raise ValueError(f"layer: q is {q.dtype} {tuple(q.shape)}; {DTYPES} of {WIDTHS} can be")
    tokens, heads, width = q.shape
    kv_heads = k.shape[1]
    caches = (*cache[0].shape[:2], kv_heads, width)
    fit = k.shape == v.shape == (tokens, kv_heads, width) and places.shape == (tokens,)
    fit &= all(x.shape == (width,) for x in norms) and all(x.shape == caches for x in cache)
    if not fit or any(x.numel() != tokens * width // 2 for x in rope):
        shapes = {name: tuple(x.shape) for name, x in tensors.items()}
        raise ValueError(f"enter_heads: {shapes} and {len(places)} places do not fit")
    out = torch.empty_like(q)
    given = (q, k, v, *norms, *rope, places, out, *cache)
    work = Heads(*(x.data_ptr() for x in given), tokens, heads, kv_heads, eps)
    call("layer_heads", q, ctypes.byref(work), width)
    return out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate becomes silu(gate) * up; of one shape."""
    for name, x in (("gate", gate), ("up", up)):
        check(name, x, gate.dtype, gate.device)
    if gate.shape != up.shape:
        raise ValueError(f"swiglu: gate {tuple(gate.shape)} and up {tuple(up.shape)} do not fit")
    places = (ctypes.c_void_p(x.data_ptr()) for x in (gate, up))
    call("layer_swiglu", gate, *places, ctypes.c_int64(gate.numel()))
    return gate


def check(name: str, x: Tensor, dtype: torch.dtype, device: torch.device):
    """ValueError naming the argument that layer.cu would read wrongly."""
    good = x.is_cuda and x.device == device and x.dtype == dtype and x.is_contiguous()
    if not good:
        raise ValueError(
            f"layer: {name} is {x.dtype} {tuple(x.shape)} on {x.device}; contiguous {dtype} on "
            f"{device}, a GPU, was expected"
        )


def call(name: str, like: Tensor, *arguments):
    library = load("layer.cu")
    is_bf16 = int(like.dtype == torch.bfloat16)
    with torch.cuda.device(like.device):
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        error = getattr(library, name)(*arguments, is_bf16, like.device.index, stream)
    if error:
        library.layer_error.restype = ctypes.c_char_p
        raise RuntimeError(f"layer.cu: {library.layer_error(error).decode()}")
