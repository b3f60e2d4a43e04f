"""Our decoding kernels as an operator of PyTorch: new queries against the keys in a cache.

The work is done in decode.cu, on CPUs at the end of attention.cpp. On a GPU nothing here waits for
it, and lengths stay on it, so that a CUDA graph can hold the call and be replayed as rows grow.
"""

import ctypes

import torch
from torch import Tensor

from kernels.build import load
from kernels.ours import DTYPES

SOURCES = {"cpu": "attention.cpp", "cuda": "decode.cu"}
CUDA_WIDTHS = (64, 80, 128)  # the head widths that decode.cu is compiled for
# ours, query heads of a key head times new tokens: for each 16 of them a GPU reads the keys again
MAX_PRODUCTS = 64
# ours: enough parts that a few long rows keep all multiprocessors busy; few enough that merging
# them costs little, for which a part has at least some hundred keys
MAX_PARTS = 16
PART_KEYS = 512
PART_STEP = 64  # keys: a tile for each of decode.cu's four warps


class Work(ctypes.Structure):
    """decode.cu's struct of this name, and attention.cpp's Decode."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "lengths", "rows", "out")),
        *((name, ctypes.c_void_p) for name in ("part_out", "part_lse2")),
        *((name, ctypes.c_int64) for name in ("row", "token")),
        *((name, ctypes.c_int) for name in ("batch", "queries", "heads", "kv_heads")),
        *((name, ctypes.c_int) for name in ("cache_rows", "capacity", "parts", "part_keys")),
    ]


def available(device: str = "cuda") -> bool:
    """Whether the device's kernel is there; it is compiled at the first question."""
    return device in SOURCES and load(SOURCES[device]) is not None


def takes(q: Tensor, k: Tensor) -> bool:
    """Whether the device's kernel, where it is there, can compute this, and well."""
    _, new, heads, width = q.shape
    known = q.dtype in DTYPES.get(q.device.type, ()) and (not q.is_cuda or width in CUDA_WIDTHS)
    return known and new * heads // k.shape[2] <= MAX_PRODUCTS


def parts_of(capacity: int) -> tuple[int, int]:
    """Into how many parts the keys of a row of this capacity are cut, and the keys of each."""
    parts = min(MAX_PARTS, -(-capacity // PART_KEYS))
    keys = -(-capacity // parts)
    return parts, -(-keys // PART_STEP) * PART_STEP


def check_inputs(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, rows: Tensor | None):
    """ValueError naming the argument that a kernel would read wrongly."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        alike = x.dtype == q.dtype and x.device == q.device
        if x.dim() != 4 or not alike or x.dtype not in DTYPES.get(x.device.type, ()):
            raise ValueError(
                f"decode: {name} is {x.dtype} {tuple(x.shape)} on {x.device}; four dimensions of "
                "one type and on one device were expected: fp32 or bf16 on a CPU, fp16 or bf16 on "
                "a GPU"
            )
    if q.is_cuda and q.shape[3] not in CUDA_WIDTHS:
        raise ValueError(f"decode: heads are {q.shape[3]} wide; on a GPU {CUDA_WIDTHS} can be")
    if k.shape != v.shape or 0 in k.shape or k.shape[3] != q.shape[3] or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"decode: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit"
        )
    for name, x in (("k", k), ("v", v)):
        check_steps(name, x, k)
    for name, x in (("lengths", lengths), ("rows", lengths if rows is None else rows)):
        good = x.dtype == torch.int32 and x.is_contiguous() and x.device == q.device
        if not good or x.shape != q.shape[:1]:
            raise ValueError(
                f"decode: {name} is {x.dtype} {tuple(x.shape)} on {x.device}; int32 "
                f"({len(q)},) on {q.device} was expected"
            )
    if rows is None and len(q) > len(k):
        raise ValueError(f"decode: q has {len(q)} rows, k {len(k)}")


def check_steps(name: str, x: Tensor, k: Tensor):
    _, _, kv_heads, width = x.shape
    beside = x.stride(3) == 1 and (kv_heads == 1 or x.stride(2) == width)
    # a GPU reads 16 bytes at a time
    aligned = not x.is_cuda or x.data_ptr() % 16 == 0 and not any(n % 8 for n in x.stride()[:2])
    if not beside or not aligned or x.stride() != k.stride():
        raise ValueError(
            f"decode: {name} has steps {x.stride()}; a token's heads must lie beside each other, "
            "on a GPU every token at a whole 16 bytes, and k's and v's steps must be equal"
        )


@torch.library.custom_op("nanokeye::decode", mutates_args=(), device_types="cpu")
def decode(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, rows: Tensor | None = None
) -> Tensor:
    """q (B, Q, H, D), k and v (R, L, KV, D), lengths and rows (B,) int32 on the device.

    Query i of row b sees the first lengths[b] + i + 1 keys of row rows[b] of the cache (None: of
    row b); one that sees none gives something without meaning. What lies behind lengths[b] + Q keys
    is never read, and nothing of a row that the cache does not have. -> (B, Q, H, D)
    """
    check_inputs(q, k, v, lengths, rows)
    q = q.contiguous()
    out = torch.empty_like(q)
    work = work_of(q, k, v, lengths, rows, out, None, None)
    is_bf16 = int(q.dtype == torch.bfloat16)
    library = load("attention.cpp")
    library.attention_decode(ctypes.byref(work), q.shape[3], is_bf16, torch.get_num_threads())
    return out


@decode.register_kernel("cuda")
def _(q, k, v, lengths, rows=None):
    check_inputs(q, k, v, lengths, rows)
    q = q.clone(memory_format=torch.contiguous_format) if q.data_ptr() % 16 else q.contiguous()
    out = torch.empty_like(q)
    if not q.numel():
        return out
    parts, _ = parts_of(k.shape[1])
    shape = (len(q), parts, q.shape[1] * q.shape[2])
    part_out = q.new_empty(*shape, q.shape[3], dtype=torch.float32)
    part_lse2 = q.new_empty(shape, dtype=torch.float32)
    work = work_of(q, k, v, lengths, rows, out, part_out, part_lse2)
    library = load("decode.cu")
    with torch.cuda.device(q.device):
        error = library.decode(
            ctypes.byref(work), q.shape[3], int(q.dtype == torch.bfloat16), q.device.index,
            ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
        )
    if error:
        library.decode_error.restype = ctypes.c_char_p
        raise RuntimeError(f"decode.cu: {library.decode_error(error).decode()}")
    return out


def work_of(q, k, v, *tensors) -> Work:
    places = (None if x is None else x.data_ptr() for x in (q, k, v, *tensors))
    return Work(*places, *k.stride()[:2], *q.shape[:3], k.shape[2], *k.shape[:2],
                *parts_of(k.shape[1]))


@decode.register_fake
def _(q, k, v, lengths, rows=None):
    return q.new_empty(q.shape)
