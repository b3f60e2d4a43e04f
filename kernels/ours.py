"""Our attention kernel as an operator of PyTorch: gradients, torch.compile, autocast, FSDP.

The work is done in attention.cpp; here it gets addresses and steps, and torch learns what it needs
to know of an operator that it cannot look into. Deterministic: tasks write to places of their own.
"""

import ctypes

import torch
from torch import Tensor

from kernels.build import load

DTYPES = (torch.float32, torch.bfloat16)


def available() -> bool:
    """Whether the CPU's kernel is there; it is compiled at the first question."""
    return load("attention.cpp") is not None


def call(name: str, tensors: list[Tensor], lse: Tensor, starts: Tensor, causal: bool):
    """attention.cpp's function `name`; tensors: q, k, v and so on, each (T, heads, D)."""
    q, k, *_ = tensors
    arguments = (ctypes.c_int64 * (3 * len(tensors)))()
    for i, x in enumerate(tensors):
        arguments[3 * i : 3 * i + 3] = [x.data_ptr(), x.stride(0), x.stride(1)]
    _, heads, width = q.shape
    getattr(load("attention.cpp"), name)(
        arguments, ctypes.c_void_p(lse.data_ptr()), ctypes.c_void_p(starts.data_ptr()),
        len(starts) - 1, heads, k.shape[1], width,
        int(causal), int(q.dtype == torch.bfloat16), torch.get_num_threads(),
    )


def whole_rows(x: Tensor) -> Tensor:
    """The kernel takes any steps between tokens and heads, but channels beside each other."""
    return x if x.stride(2) == 1 else x.contiguous()


def check(q: Tensor, k: Tensor, v: Tensor, starts: Tensor):
    """ValueError naming the argument that the kernel would read wrongly."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3 or x.dtype not in DTYPES or x.dtype != q.dtype or x.device.type != "cpu":
            raise ValueError(
                f"attention: {name} is {x.dtype} {tuple(x.shape)} on {x.device}; (T, heads, D) of "
                "one type, fp32 or bf16, on the CPU was expected"
            )
    if k.shape != v.shape or k.shape[::2] != q.shape[::2] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit"
        )
    good = starts.dtype == torch.int32 and starts.dim() == 1 and starts.is_contiguous()
    places = starts.tolist() if good else []
    if not places or places != sorted(places) or (places[0], places[-1]) != (0, len(q)):
        raise ValueError(f"attention: starts must be int32 and rise from 0 to {len(q)} tokens")


@torch.library.custom_op("nanokeye::attention", mutates_args=(), device_types="cpu")
def attention(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, causal: bool
) -> tuple[Tensor, Tensor]:
    """q (T, H, D), k and v (T, KV, D) fp32 or bf16, starts (S + 1,) int32 on the host.

    -> out (T, H, D), and lse (H, T) fp32: log of the sum of exp(scores), of which nothing learns.
    """
    check(q, k, v, starts)
    q, k, v = (whole_rows(x) for x in (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[1], q.shape[0])
    call("attention_forward", [q, k, v, out], lse, starts, causal)
    return out, lse


@torch.library.custom_op("nanokeye::attention_backward", mutates_args=(), device_types="cpu")
def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, d_out: Tensor, lse: Tensor, starts: Tensor,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. Shapes as attention's; d_out as out."""
    q, k, v, out, d_out = (whole_rows(x) for x in (q, k, v, out, d_out))
    gradients = [torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v)]
    call("attention_backward", [q, k, v, out, d_out, *gradients], lse, starts, causal)
    return tuple(gradients)


@attention.register_fake
def _(q, k, v, starts, causal):
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@attention_backward.register_fake
def _(q, k, v, out, d_out, lse, starts, causal):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def remember(ctx, inputs, output):
    *tensors, ctx.causal = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def differentiate(ctx, d_out, _):
    q, k, v, starts, out, lse = ctx.saved_tensors
    if d_out is None:
        return None, None, None, None, None
    gradients = attention_backward(q, k, v, out, d_out, lse, starts, ctx.causal)
    return *gradients, None, None


attention.register_autograd(differentiate, setup_context=remember)
attention.register_autocast("cpu", torch.bfloat16)
