"""Attention over packed segments of any lengths, full or causal, with grouped queries.

Samples lie end to end in one row of T tokens; a token sees its own segment only. There is no padding and no mask tensor.

    attention(q, k, v, segments, causal)     training and prefill: every query has its keys in the same pack
    cached_attention(q, k, v, lengths)       decoding: the keys lie in a cache, one row per conversation

`attention_reference` says in six lines what both compute. The rest of the file picks PyTorch's best way for the device
and the shape at hand; that choice is made in these two and nowhere else.
"""

import contextlib
import inspect
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

try:  # flash attention over cumulative lengths, CUDA only
    from torch.nn.attention.varlen import varlen_attn

    _VARLEN_GQA = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
except ImportError:
    varlen_attn = None


@dataclass
class Segments:
    """Where the samples of a pack begin and end: on the device for kernels, on the host for decisions (no sync).

    cu_seqlens: (S + 1,) int32 on the device, cumulative starts; lengths: S ints on the host, none of them 0.
    """

    cu_seqlens: Tensor
    lengths: list[int]

    @classmethod
    def of(cls, lengths: list[int], device: torch.device | str) -> "Segments":
        lengths = [n for n in lengths if n]
        return cls(torch.tensor([0] + lengths).cumsum(0).to(device, torch.int32), lengths)

    @property
    def equal(self) -> bool:
        return len(set(self.lengths)) == 1

    def batches(self, step: int) -> tuple[list[tuple[int, Tensor]], Tensor]:
        """Segments of like length as dense batches: [(how many, their tokens' rows flattened)], and the way back.

        Lengths are rounded up to a multiple of `step` by repeating a segment's last token. Worked out once for all layers.
        """
        if getattr(self, "_step", None) != step:
            device, groups, start = self.cu_seqlens.device, {}, 0
            for n in self.lengths:
                groups.setdefault(-(-n // step) * step, []).append((start, n))
                start += n
            rows, kept, at, back = [], [], 0, torch.empty(start, dtype=torch.long)
            for top, members in groups.items():
                first, length = torch.tensor(members).T[:, :, None]  # (B, 1) each
                where = torch.arange(top)
                token = first + where.clamp(max=length - 1)  # (B, top)
                real = where < length
                back[token[real]] = at + torch.arange(token.numel()).view_as(token)[real]
                at += token.numel()
                rows.append((len(members), token.flatten().to(device)))
            self._step, self._batches = step, (rows, back.to(device))
        return self._batches


def attention_reference(q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(D)) v within each segment. q (T, H, D); k, v (T, KV, D); returns (T, H, D)."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))  # each key head serves H/KV queries
    out, start = torch.zeros_like(q), 0
    for n in segments.lengths:
        s = slice(start, start := start + n)
        scores = torch.einsum("qhd,khd->hqk", q[s], k[s]) * q.shape[-1] ** -0.5
        if causal:
            scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1), float("-inf"))
        out[s] = torch.einsum("hqk,khd->qhd", scores.softmax(-1, dtype=torch.float32).to(v.dtype), v[s])
    return out


def attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool = False) -> Tensor:
    """Attention within each segment of a pack, by the fastest way PyTorch has for this device and these lengths.

    q (T, H, D), k and v (T, KV, D) with KV dividing H; one dtype; T = sum of the segments' lengths. Returns (T, H, D).
    Raises ValueError when the shapes and the segments disagree.
    """
    if sum(segments.lengths) != q.shape[0] or k.shape != v.shape or k.shape[0] != q.shape[0] or q.shape[1] % k.shape[1]:
        raise ValueError(f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, "
                         f"segments of {sum(segments.lengths)} tokens in all do not fit together")
    if not segments.lengths:  # a pack without pictures: nothing to do, but every weight must stay in the graph
        return q + (k.sum() + v.sum())
    if segments.equal:  # frames of a clip, one long document: a dense batch, which cuDNN and the CPU run fastest
        return _dense(q, k, v, len(segments.lengths), causal)
    if q.is_cuda and varlen_attn is not None and q.dtype in (torch.float16, torch.bfloat16):
        n = max(segments.lengths)
        window = (-1, 0) if causal else (-1, -1)
        return varlen_attn(q, k, v, segments.cu_seqlens, segments.cu_seqlens, n, n, window_size=window, **_VARLEN_GQA)
    return _by_length(q, k, v, segments, causal)


def _dense(q: Tensor, k: Tensor, v: Tensor, batch: int, causal: bool) -> Tensor:
    q, k, v = (x.unflatten(0, (batch, -1)).transpose(1, 2) for x in (q, k, v))  # (B, heads, L, D)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).flatten(0, 1)  # (T, H, D)


def _by_length(q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool) -> Tensor:
    """A loop over distinct lengths, not over segments. A causal query never sees what comes after it, so there segments
    of nearly the same length share a batch too, padded at their ends: exact, and many times fewer calls."""
    rows, back = segments.batches(32 if causal else 1)
    return torch.cat([_dense(q.index_select(0, r), k.index_select(0, r), v.index_select(0, r), batch, causal) for batch, r in rows]).index_select(0, back)


def cached_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """New queries against a cache that already holds their own keys.

    q (B, Q, H, D), right-aligned per row is not needed: query i of row b sits at position lengths[b] + i.
    k, v (B, L, KV, D), of which row b holds the first lengths[b] + Q entries; lengths (B,) int64 counts what was there
    before. Returns (B, Q, H, D). Rows with fewer than Q new tokens give garbage beyond them, which the caller drops.
    """
    new, group = q.shape[1], q.shape[2] // k.shape[2]
    seen = lengths[:, None] + torch.arange(new, device=q.device)  # (B, Q): last key that query may see
    mask = torch.arange(k.shape[1], device=q.device) <= seen[:, None, :, None]  # (B, 1, Q, L)
    # queries that share a key head stand beside each other as if they were one head's: keys are read once, not copied
    q = q.unflatten(2, (-1, group)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # (B, KV, H/KV * Q, D)
    # not by cuDNN, which plans anew, for some 50 ms, at every new length: at every token, here
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]) if q.is_cuda else contextlib.nullcontext():
        out = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask.repeat(1, 1, group, 1))
    return out.unflatten(2, (group, new)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def attention_path(device: torch.device, dtype: torch.dtype) -> str:
    """What `attention` uses on this device, for the line that a run prints first."""
    if device.type == "cuda" and dtype != torch.float32:
        return "SDPA on equal lengths, flash varlen on mixed" if varlen_attn else "SDPA per distinct length (slow)"
    return "SDPA per distinct length"
