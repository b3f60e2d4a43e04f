"""Our attention kernel as an operator of PyTorch: gradients, torch.compile, autocast, FSDP.

The work is done in attention.cpp, on GPUs in attention.cu, on Hopper GPUs in hopper.cu and
hopper_backward.cu (decode.py has decoding); here they get addresses and steps, and torch learns
what it needs to know of an operator that it cannot look into.
Deterministic: tasks write to places of their own.
"""

import ctypes
from functools import cache

import torch
from torch import Tensor

from kernels.build import load

SOURCES = {"cpu": "attention.cpp", "cuda": "attention.cu"}
DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float16, torch.bfloat16),
}
CUDA_WIDTHS = (64, 72, 80, 128)  # the head widths that attention.cu is compiled for
TILE = 128  # rows of a tile in attention.cu
CUDA_STEP = 2**24  # elements: attention.cu counts within a tile in 32 bits
HOPPER = True  # whether Hopper's kernels are used where they can be; the benchmark measures both
NOT_TAKEN = -1  # what they return for steps between rows that they cannot go in


def available(device: str = "cpu") -> bool:
    """Whether the device's kernel is there; it is compiled at the first question."""
    return device in SOURCES and load(SOURCES[device]) is not None


def takes(device: str, dtype: torch.dtype, width: int | None) -> bool:
    """Whether the device's kernel, where it is there, can compute this; width None: any."""
    if dtype not in DTYPES.get(device, ()):
        return False
    return device == "cpu" or width is None or width in CUDA_WIDTHS


def tiles_of(lengths: list[int], causal: bool) -> list[tuple[int, int, int]]:
    """The tiles of a pack for attention.cu: a segment's start and length, and which tile of it.

    Tiles with the most work come first, so that all multiprocessors end together.
    """
    tiles = []
    start = 0
    for n in lengths:
        tiles += [(start, n, i) for i in range(-(-n // TILE))]
        start += n

    def keys_seen(tile):
        _, length, i = tile
        return min(length, (i + 1) * TILE) if causal else length

    return sorted(tiles, key=keys_seen, reverse=True)


def addresses(tensors: list[Tensor]) -> ctypes.Array:
    """For each tensor its address and its steps from token to token and from head to head."""
    arguments = (ctypes.c_int64 * (3 * len(tensors)))()
    for i, x in enumerate(tensors):
        arguments[3 * i : 3 * i + 3] = [x.data_ptr(), x.stride(0), x.stride(1)]
    return arguments


def call(name: str, tensors: list[Tensor], lse: Tensor, starts: Tensor, causal: bool):
    """attention.cpp's function `name`; tensors: q, k, v and so on, each (T, heads, D)."""
    q, k, *_ = tensors
    _, heads, width = q.shape
    getattr(load("attention.cpp"), name)(
        addresses(tensors), ctypes.c_void_p(lse.data_ptr()), ctypes.c_void_p(starts.data_ptr()),
        len(starts) - 1, heads, k.shape[1], width,
        int(causal), int(q.dtype == torch.bfloat16), torch.get_num_threads(),
    )


def call_cuda(tensors: list[Tensor], lse: Tensor, delta: Tensor, tiles: Tensor, causal: bool):
    """attention.cu; tensors: q, k, v, out, and for the backward pass d_out, dq, dk, dv."""
    q, k, *_ = tensors
    tokens, heads, width = q.shape
    places = addresses(tensors)
    lse, delta, list_of_tiles = (ctypes.c_void_p(x.data_ptr()) for x in (lse, delta, tiles))
    shape = (len(tiles), tokens, heads, k.shape[1], width, int(causal))
    is_bf16, backward = int(q.dtype == torch.bfloat16), int(len(tensors) > 4)
    with torch.cuda.device(q.device):
        place = (q.device.index, ctypes.c_void_p(torch.cuda.current_stream().cuda_stream))
        error = NOT_TAKEN
        library = hopper(q.device.index, bool(backward))
        if library:
            error = library.hopper(places, lse, delta, list_of_tiles, *shape, is_bf16, *place)
        if error == NOT_TAKEN:
            library = load("attention.cu")
            error = library.attention(
                places, lse, delta, list_of_tiles, *shape, is_bf16, backward, *place
            )
    if error:
        library.error_text.restype = ctypes.c_char_p
        raise RuntimeError(f"attention on a GPU: {library.error_text(error).decode()}")


def hopper(device: int, backward: bool) -> ctypes.CDLL | None:
    """The library of Hopper's kernels for this pass, where it is there and this GPU can run it."""
    if not HOPPER or capability(device) != (9, 0):
        return None
    return load("hopper_backward.cu" if backward else "hopper.cu")


@cache
def capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def whole_rows(x: Tensor) -> Tensor:
    """The kernel takes any steps between tokens and heads, but channels beside each other."""
    return x if x.stride(2) == 1 else x.contiguous()


def aligned_rows(x: Tensor) -> Tensor:
    """On the GPU a row is also read 16 bytes, 8 channels, at a time."""
    steps = x.stride()[:2]
    good = x.stride(2) == 1 and x.data_ptr() % 16 == 0 and not any(n % 8 for n in steps)
    return x if good and max(steps) < CUDA_STEP else x.clone(memory_format=torch.contiguous_format)


def check_inputs(q: Tensor, k: Tensor, v: Tensor):
    """ValueError naming the argument that the kernel would read wrongly."""
    device = q.device.type
    for name, x in (("q", q), ("k", k), ("v", v)):
        alike = x.dtype == q.dtype and x.device == q.device
        if x.dim() != 3 or not alike or not takes(device, x.dtype, None):
            raise ValueError(
                f"attention: {name} is {x.dtype} {tuple(x.shape)} on {x.device}; (T, heads, D) of "
                "one type and on one device was expected: fp32 or bf16 on a CPU, fp16 or bf16 on "
                "a GPU"
            )
    if not takes(device, q.dtype, q.shape[2]):
        raise ValueError(f"attention: heads are {q.shape[2]} wide; on a GPU {CUDA_WIDTHS} can be")
    if k.shape != v.shape or k.shape[::2] != q.shape[::2] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit"
        )


def check_starts(starts: Tensor, q: Tensor):
    good = starts.dtype == torch.int32 and starts.dim() == 1 and starts.is_contiguous()
    places = starts.tolist() if good else []
    if not places or places != sorted(places) or (places[0], places[-1]) != (0, len(q)):
        raise ValueError(f"attention: starts must be int32 and rise from 0 to {len(q)} tokens")


def check_tiles(tiles: Tensor, q: Tensor):
    """Only what can be known without waiting for the GPU."""
    good = tiles.dtype == torch.int32 and tiles.is_contiguous() and tiles.device == q.device
    if not good or tiles.dim() != 2 or tiles.shape[1] != 3 or not len(tiles):
        raise ValueError(
            f"attention: tiles is {tiles.dtype} {tuple(tiles.shape)} on {tiles.device}; int32 "
            f"(1 or more, 3) of tiles_of on {q.device} was expected"
        )


@torch.library.custom_op("nanokeye::attention", mutates_args=(), device_types="cpu")
def attention(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, tiles: Tensor, causal: bool
) -> tuple[Tensor, Tensor]:
    """q (T, H, D), k and v (T, KV, D), starts (S + 1,) int32; tiles: tiles_of, read on a GPU only.

    -> out (T, H, D), and lse (H, T) fp32: log of the sum of exp(scores), of which nothing learns.
    """
    check_inputs(q, k, v)
    check_starts(starts, q)
    q, k, v = (whole_rows(x) for x in (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[1], q.shape[0])
    call("attention_forward", [q, k, v, out], lse, starts, causal)
    return out, lse


@attention.register_kernel("cuda")
def _(q, k, v, starts, tiles, causal):
    check_inputs(q, k, v)
    check_tiles(tiles, q)
    q, k, v = (aligned_rows(x) for x in (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[1], q.shape[0], device=q.device)
    call_cuda([q, k, v, out], lse, lse, tiles, causal)
    return out, lse


@torch.library.custom_op("nanokeye::attention_backward", mutates_args=(), device_types="cpu")
def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, d_out: Tensor, lse: Tensor, starts: Tensor,
    tiles: Tensor, causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. Shapes as attention's; d_out as out."""
    q, k, v, out, d_out = (whole_rows(x) for x in (q, k, v, out, d_out))
    gradients = [torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v)]
    call("attention_backward", [q, k, v, out, d_out, *gradients], lse, starts, causal)
    return tuple(gradients)


@attention_backward.register_kernel("cuda")
def _(q, k, v, out, d_out, lse, starts, tiles, causal):
    q, k, v, out, d_out = (aligned_rows(x) for x in (q, k, v, out, d_out))
    gradients = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    tensors = [q, k, v, out, d_out, *gradients]
    call_cuda(tensors, lse.contiguous(), torch.empty_like(lse), tiles, causal)
    return tuple(gradients)


@attention.register_fake
def _(q, k, v, starts, tiles, causal):
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@attention_backward.register_fake
def _(q, k, v, out, d_out, lse, starts, tiles, causal):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def remember(ctx, inputs, output):
    *tensors, ctx.causal = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def differentiate(ctx, d_out, _):
    q, k, v, starts, tiles, out, lse = ctx.saved_tensors
    if d_out is None:
        return None, None, None, None, None, None
    gradients = attention_backward(q, k, v, out, d_out, lse, starts, tiles, ctx.causal)
    return *gradients, None, None, None


attention.register_autograd(differentiate, setup_context=remember)
for device in SOURCES:
    attention.register_autocast(device, torch.bfloat16)
