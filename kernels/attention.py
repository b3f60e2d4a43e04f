"""Attention over packed segments of any lengths, full or causal, with grouped queries.

Samples lie end to end in one row of T tokens, and a token sees its own segment only. There is no
padding and no mask tensor.

    attention(q, k, v, segments, causal)   training and prefill: all keys are in the same pack
    cached_attention(q, k, v, lengths)     decoding: the keys lie in a cache, a row per conversation

`attention_reference` says in a few lines what both compute. The rest of the file picks the fastest
way for the device and the shape at hand: our kernels (attention.cpp on a CPU; on a GPU attention.cu
or hopper.cu for segments of mixed lengths, and decode.cu) where a compiler is there to build them,
else PyTorch's best. That choice is made here and nowhere else; NANOKEYE_ATTENTION=ours, torch or
reference forces one.
"""

import contextlib
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import decode, layer, ours, step

try:  # flash attention over cumulative lengths, CUDA only
    from torch.nn.attention.varlen import varlen_attn

    # newer versions must be told that query heads share key heads; older ones need no word
    GROUPED = {}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        GROUPED = {"enable_gqa": True}
except ImportError:
    varlen_attn = None


@dataclass
class Segments:
    """Where the samples of a pack begin and end.

    The lengths stand on the host too, so that choosing an implementation never waits for the GPU.
    """

    cu_seqlens: Tensor  # (S + 1,) int32 on the device: cumulative starts, as flash attention has it
    lengths: list[int]  # S of them, none 0
    plans: dict = field(default_factory=dict)  # tiles, batches_by_length: once for all layers

    @classmethod
    def of(cls, lengths: list[int], device: torch.device | str) -> "Segments":
        """Segments of these lengths. Empty ones are left out: no token can see them."""
        lengths = [n for n in lengths if n]
        starts = torch.tensor([0] + lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return cls(to_device(starts, device), lengths)


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the host, on the device, without waiting for what runs there.

    From memory that may be swapped out, CUDA copies only when all work before it is done.
    """
    if torch.device(device).type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool = False
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v within each segment. q (T, H, D); k, v (T, KV, D) -> (T, H, D)."""
    group = q.shape[1] // k.shape[1]  # queries that share a key head
    k = k.repeat_interleave(group, dim=1)  # (T, H, D)
    v = v.repeat_interleave(group, dim=1)
    packs = (x.split(segments.lengths) for x in (q, k, v))
    out = []
    for qs, ks, vs in zip(*packs):  # (n, H, D) each
        scores = torch.einsum("qhd,khd->hqk", qs, ks) * q.shape[-1] ** -0.5
        if causal:
            later = torch.ones_like(scores, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, float("-inf"))
        weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
        out.append(torch.einsum("hqk,khd->qhd", weights, vs))
    return torch.cat(out)


@torch.compiler.disable  # a compiled block breaks here: the choice below reads lengths
def attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool = False
) -> Tensor:
    """Attention within each segment of a pack, by the fastest way for this device and lengths.

    q (T, H, D), k and v (T, KV, D) with KV dividing H; one dtype; T = sum of the segments'
    lengths. Returns (T, H, D). Raises ValueError when the shapes and the segments disagree.
    """
    lengths = segments.lengths
    alike = k.shape == v.shape and q.shape[1] % k.shape[1] == 0
    if not alike or not len(q) == len(k) == sum(lengths):
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, "
            f"segments of {sum(lengths)} tokens in all do not fit together"
        )
    # A pack without pictures: nothing to do, but every weight must stay in the graph.
    if not lengths:
        return q + (k.sum() + v.sum())
    even = len(set(lengths)) == 1
    backend = choice(q.device, q.dtype, q.shape[2], even)
    if backend == "reference":
        return attention_reference(q, k, v, segments, causal)
    if backend == "ours":
        tiles = _tiles(segments, q.device, causal)
        out, _ = ours.attention(q, k, v, segments.cu_seqlens, tiles, causal)
        return out
    # Frames of a clip, one long document: a dense batch, which cuDNN runs fastest.
    if even:
        return _dense(q, k, v, len(lengths), causal)
    if q.is_cuda and varlen_attn and q.dtype in (torch.float16, torch.bfloat16):
        return _flash(q, k, v, segments, causal)
    return _by_length(q, k, v, segments, causal)


def choice(
    device: torch.device, dtype: torch.dtype, width: int | None = None, even: bool = False
) -> str:
    """"ours", "torch" or "reference".

    width: of the heads; None: one that ours takes. even: all segments are of one length, which
    cuDNN computes as fast as our GPU kernels or faster. ValueError where what is asked for cannot
    be had.
    """
    asked = forced()
    if asked in ("torch", "reference"):
        return asked
    wanted = asked == "ours" or not (even and device.type == "cuda")
    if wanted and ours.takes(device.type, dtype, width) and ours.available(device.type):
        return "ours"
    if asked == "ours":
        heads = "" if width is None else f", heads {width} wide,"
        raise ValueError(
            "NANOKEYE_ATTENTION=ours: our kernel takes fp32 and bf16 on a CPU, built by a C++ "
            f"compiler, and fp16 and bf16, heads {ours.CUDA_WIDTHS} wide, on a GPU, built by nvcc; "
            f"not {dtype}{heads} on {device.type} here"
        )
    return "torch"


def forced() -> str:
    """What NANOKEYE_ATTENTION says; "": nothing."""
    asked = os.environ.get("NANOKEYE_ATTENTION", "")
    if asked not in ("", "ours", "torch", "reference"):
        raise ValueError(f"NANOKEYE_ATTENTION={asked}: known are ours, torch and reference")
    return asked


def _tiles(segments: Segments, device: torch.device, causal: bool) -> Tensor:
    """The GPU's list of tiles (tiles, 3) int32, sent there once for all layers; else empty."""
    if device.type != "cuda":
        return torch.empty(0, 3, dtype=torch.int32)
    key = ("tiles", causal)
    if key not in segments.plans:
        tiles = torch.tensor(ours.tiles_of(segments.lengths, causal), dtype=torch.int32)
        segments.plans[key] = to_device(tiles, device)
    return segments.plans[key]


def _dense(q, k, v, batch, causal):
    """Attention within `batch` segments of one length."""
    q, k, v = (rearrange(x, "(b l) h d -> b h l d", b=batch) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
    return rearrange(out, "b h l d -> (b l) h d")


def _flash(q, k, v, segments, causal):
    """Segments of mixed lengths in one kernel."""
    cu_seqlens = segments.cu_seqlens
    longest = max(segments.lengths)
    window = (-1, 0) if causal else (-1, -1)  # keys before and after a query: -1 is all of them
    return varlen_attn(
        q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=window, **GROUPED
    )


def _by_length(q, k, v, segments, causal):
    """Segments of mixed lengths in one dense batch per length.

    A causal query never sees what comes after it. There segments of nearly the same length share
    a batch too, padded at their ends: exact, and many times fewer calls.
    """
    step = 32 if causal else 1
    if step not in segments.plans:
        segments.plans[step] = batches_by_length(segments, step)
    batches, back = segments.plans[step]
    out = []
    for size, tokens in batches:
        qs, ks, vs = (x.index_select(0, tokens) for x in (q, k, v))
        out.append(_dense(qs, ks, vs, size, causal))
    return torch.cat(out).index_select(0, back)


def batches_by_length(segments: Segments, step: int) -> tuple[list[tuple[int, Tensor]], Tensor]:
    """Segments of like length, as dense batches, and the way back into the pack.

    Lengths are rounded up to a multiple of `step` by repeating a segment's last token. Returns
    [(number of segments, their tokens' places in the pack)] and, for each token of the pack, its
    place among all batches end to end (T,).
    """
    groups = {}  # rounded length -> [(start, length)]
    start = 0
    for n in segments.lengths:
        rounded = -(-n // step) * step
        groups.setdefault(rounded, []).append((start, n))
        start += n

    device = segments.cu_seqlens.device
    batches = []
    back = [0] * start
    place = 0
    for rounded, members in groups.items():
        tokens = []
        for start, n in members:
            tokens += range(start, start + n)
            tokens += [start + n - 1] * (rounded - n)
            back[start : start + n] = range(place, place + n)
            place += rounded
        batches.append((len(members), torch.tensor(tokens, device=device)))
    return batches, torch.tensor(back, device=device)


def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, rows: Tensor | None = None
) -> Tensor:
    """New queries against a cache that already holds their own keys.

    q (B, Q, H, D): query i of row b sits at position lengths[b] + i. k, v (R, L, KV, D): its row
    rows[b] holds lengths[b] + Q entries, of which lengths (B,) were there before; rows (B,) or
    None: the first B. Both are whole numbers on the device, and it is never waited for. Returns
    (B, Q, H, D). A query that sees no key gives garbage; the caller drops it.
    """
    wanted = forced() in ("", "ours") and decode.takes(q, k)
    if wanted and decode.available(q.device.type):
        lengths, rows = (x if x is None else x.int() for x in (lengths, rows))
        return decode.decode(q, k, v, lengths, rows)
    new = q.shape[1]
    kv = k.shape[2]
    k, v = (x[: len(q)] if rows is None else x[rows] for x in (k, v))
    last = lengths[:, None] + torch.arange(new, device=q.device)  # (B, Q): the last key seen
    mask = torch.arange(k.shape[1], device=q.device) <= last[:, None, :, None]  # (B, 1, Q, L)
    # The G = H / KV queries that share a key head stand beside each other as if they were one
    # head's, so that keys are read once and not copied.
    mask = mask.repeat(1, 1, q.shape[2] // kv, 1)  # (B, 1, G * Q, L)
    q = rearrange(q, "b q (kv g) d -> b kv (g q) d", kv=kv)
    k = k.transpose(1, 2)  # (B, KV, L, D)
    v = v.transpose(1, 2)
    # cuDNN plans anew, for some 50 ms, at every new length, and here each token brings one.
    backends = contextlib.nullcontext()
    if q.is_cuda:
        backends = sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
    with backends:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return rearrange(out, "b kv (g q) d -> b q (kv g) d", q=new)


def decoder_step(layers: list[list[Tensor]], *how) -> Callable | None:
    """A whole step of decoding in one call (kernels/step.py), or None: the layers one by one."""
    return step.decoder_step(layers, *how) if forced() in ("", "ours") else None


def few_kernels(weight: Tensor, width: int) -> bool:
    """Whether kernels/layer.py is used where weights are of this kind, and heads of this width."""
    return forced() in ("", "ours") and layer.available(weight, width)


def attention_path(device: torch.device, dtype: torch.dtype) -> str:
    """What `attention` uses on this device, for the line that a run prints first."""
    backend = choice(device, dtype)
    if backend != "torch":
        kernel = "our C++ kernel"
        if device.type == "cuda":
            kernel = "SDPA on equal lengths, our CUDA kernel on mixed"
        return {"ours": kernel, "reference": "the reference"}[backend]
    if device.type != "cuda" or dtype == torch.float32:
        return "SDPA per distinct length"
    if varlen_attn is None:
        return "SDPA per distinct length (slow)"
    return "SDPA on equal lengths, flash varlen on mixed"
