"""A layer's products for one or two new tokens, with what stands around them, on a GPU.

Where products.cu is not there or does not fit, PyTorch's operators do the same. Nothing learns
through them, and nothing here waits for the GPU: a CUDA graph can hold them.
"""

import ctypes
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.build import load
from kernels.layer import DTYPES, swiglu

MOST = 2  # tokens that products.cu is compiled for; PyTorch's products are as fast with four
MEMORY = 96 * 1024  # bytes of them; a block of every GPU from sm_80 on can have 99 KiB


class Matrix(ctypes.Structure):
    """products.cu's struct of this name."""

    _fields_ = [("weight", ctypes.c_void_p), ("out", ctypes.c_void_p), ("rows", ctypes.c_int)]


class Work(ctypes.Structure):
    """products.cu's struct of this name."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "norm", "plus")),
        ("matrices", Matrix * 3),
        *((name, ctypes.c_int) for name in ("count", "tokens", "width", "swiglu")),
        ("eps", ctypes.c_float),
    ]


def project(x: Tensor, weights: list[Tensor], norm=None, plus: Tensor | None = None) -> list:
    """x (B, C) times each of up to three weights (N, C): tensors (B, N), new ones.

    norm: a module RMSNorm, for x before; plus (B, N): added to the only product.
    """
    if not fits(x, weights, norm, plus):
        h = x if norm is None else norm(x)
        results = [F.linear(h, weight) for weight in weights]
        return results if plus is None else [results[0] + plus]
    results = [x.new_empty(len(x), len(weight)) for weight in weights]
    launch(x, weights, results, norm, plus)
    return results


def project_swiglu(x: Tensor, gate: Tensor, up: Tensor, norm) -> Tensor:
    """silu(h gate^T) * (h up^T), (B, N), of the normed h of x (B, C); gate and up (N, C)."""
    if not fits(x, [gate, up], norm, None):
        return swiglu(*project(x, [gate, up], norm))
    out = x.new_empty(len(x), len(gate))
    launch(x, [gate, up], [out, out], norm, None, swiglu=True)
    return out


def fits(x: Tensor, weights: list[Tensor], norm, plus) -> bool:
    """Whether products.cu can compute this. ValueError: nothing can."""
    tokens, width = x.shape
    small = tokens <= MOST and width % 8 == 0 and tokens * width * x.element_size() <= MEMORY
    if not (x.is_cuda and x.dtype in DTYPES and small) or load("products.cu") is None:
        return False
    others = [*weights, *([norm.weight] if norm else []), *([] if plus is None else [plus])]
    for part in (x, *others):
        alike = part.dtype == x.dtype and part.device == x.device and part.is_contiguous()
        if not alike or part.data_ptr() % 16:
            return False
    check_shapes(x, weights, norm, plus)
    return True


def check_shapes(x: Tensor, weights: list[Tensor], norm, plus):
    """ValueError naming the shapes where products.cu would read or write beyond a tensor."""
    tokens, width = x.shape
    others = [*weights]
    want = [(len(weight), width) for weight in weights]
    if norm:
        others.append(norm.weight)
        want.append((width,))
    if plus is not None:
        others.append(plus)
        want.append((tokens, len(weights[0])))
    shapes = [tuple(part.shape) for part in others]
    most = 3 if plus is None else 1
    if shapes != want or len(weights) > most:
        raise ValueError(f"products: x {tuple(x.shape)} and {shapes} do not fit")


def launch(x, weights, results, norm, plus, swiglu: bool = False):
    matrices = [
        Matrix(weight.data_ptr(), out.data_ptr(), len(weight))
        for weight, out in zip(weights, results)
    ]
    work = Work(
        x.data_ptr(), norm.weight.data_ptr() if norm else None,
        None if plus is None else plus.data_ptr(), (Matrix * 3)(*matrices), len(matrices), *x.shape,
        swiglu, norm.eps if norm else 0.0,
    )
    library = load("products.cu")
    device = x.device.index
    is_bf16 = int(x.dtype == torch.bfloat16)
    with torch.cuda.device(x.device):
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        error = library.products(ctypes.byref(work), is_bf16, processors(device), device, stream)
    if error:
        library.products_error.restype = ctypes.c_char_p
        raise RuntimeError(f"products.cu: {library.products_error(error).decode()}")


@cache
def processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
