"""Keye-VL's native-resolution vision transformer (arXiv 2507.01949, section 2.1), and SigLIP's
text tower for stage 0.

Pictures and clips of any size enter as one packed row of 14-pixel patches, no padding, no resizing
to a square:

    patches (N, 588)  ->  linear
                      ->  + learned 27x27 position table, interpolated to each grid
                      ->  27 pre-norm blocks, 2D RoPE on queries and keys,
                          attention within each picture or clip
                      ->  layer norm  ->  features (N, 1152)

`grids` (M, 3) says how many frames, rows and columns of patches each picture or clip has.
Everything follows the released weights of SigLIP-so400m-patch14-384 and Keye-VL-8B-Preview; sizes
are only numbers in `ViTConfig`.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels import Segments, attention, to_device


@dataclass
class ViTConfig:
    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    image_size: int = 384  # side the position table was learned at: 384 // 14 = 27 patches
    patch_size: int = 14
    spatial_merge_size: int = 2
    layer_norm_eps: float = 1e-6
    rope: bool = True  # False is the "interpolation only" row of the report's ablation (table 2)
    attend_across_frames: bool = True  # v1's released code; Keye-VL 1.5 keeps frames apart


class SelfAttention(nn.Module):
    """x (N, C) -> (N, C), within each segment."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x, segments, rope):
        q = self.q_proj(x).unflatten(1, (self.heads, -1))  # (N, H, D)
        k = self.k_proj(x).unflatten(1, (self.heads, -1))
        v = self.v_proj(x).unflatten(1, (self.heads, -1))
        if rope is not None:
            q = rotate(q, *rope)
            k = rotate(k, *rope)
        return self.out_proj(attention(q, k, v, segments).flatten(1))  # (N, C)


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)
        self.self_attn = SelfAttention(cfg.hidden_size, cfg.num_attention_heads)
        self.layer_norm2 = nn.LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)
        self.mlp = MLP(cfg.hidden_size, cfg.intermediate_size)

    def forward(self, x, segments, rope):
        x = x + self.self_attn(self.layer_norm1(x), segments, rope)
        return x + self.mlp(self.layer_norm2(x))


class PoolingHead(nn.Module):
    """SigLIP's attention pooling: one learned query looks at all patches of a picture.

    Used in stage 0 only.
    """

    def __init__(self, cfg: ViTConfig):
        super().__init__()
        width = cfg.hidden_size
        self.probe = nn.Parameter(torch.zeros(1, 1, width))
        self.attention = nn.MultiheadAttention(width, cfg.num_attention_heads, batch_first=True)
        self.layernorm = nn.LayerNorm(width, cfg.layer_norm_eps)
        self.mlp = MLP(width, cfg.intermediate_size)

    def forward(self, features: Tensor, lengths: list[int]) -> Tensor:
        """features (N, C), lengths of M pictures -> (M, C)."""
        # A pack without pictures: one blank picture goes through and is dropped again, so that
        # every weight stays in the graph.
        if not lengths:
            blank = features.new_zeros(1, features.shape[1])
            return self.forward(torch.cat([features, blank]), [1])[:0]
        padded = nn.utils.rnn.pad_sequence(features.split(lengths), batch_first=True)  # (M, L, C)
        ends = torch.tensor(lengths)[:, None]  # (M, 1)
        padding = torch.arange(padded.shape[1]) >= ends  # (M, L)
        padding = padding.to(padded.device)
        probe = self.probe.expand(len(lengths), -1, -1)  # (M, 1, C)
        x, _ = self.attention(probe, padded, padded, padding, need_weights=False)
        x = x[:, 0]  # (M, C)
        return x + self.mlp(self.layernorm(x))


class ViT(nn.Module):
    def __init__(self, cfg: ViTConfig, pooling_head: bool = False):
        super().__init__()
        self.cfg = cfg
        self.side = cfg.image_size // cfg.patch_size
        # The official convolution of stride 14 over 14-pixel patches, as the linear that it is.
        self.patch_embedding = nn.Linear(3 * cfg.patch_size**2, cfg.hidden_size)
        self.position_embedding = nn.Embedding(self.side**2, cfg.hidden_size)
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)
        self.head = PoolingHead(cfg) if pooling_head else None
        self.recompute = 0  # blocks that the backward pass runs again, see model.Decoder

    def forward(self, patches: Tensor, grids: Tensor) -> Tensor:
        """Patches of all pictures and clips to features.

        patches (N, 588): uint8 pixels, or floats already in [-1, 1]; channel, row, column
        flattened; raster order. grids (M, 3) int64 on the host: frames, rows, columns of patches.
        Returns (N, C) in raster order. Raises ValueError when the grids do not add up to N or a
        side is not a multiple of the 2x2 merge.
        """
        cfg = self.cfg
        grids = grids.tolist()
        lengths = self.lengths(grids)
        total = sum(lengths)
        if total != len(patches):
            raise ValueError(f"ViT: {len(patches)} patches, but grids {grids} ask for {total}")
        pixels = patches
        if patches.dtype == torch.uint8:
            pixels = patches.float() / 127.5 - 1  # rescale 1/255, mean 0.5, std 0.5
        x = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype))  # (N, C)
        x = x + self.positions(grids).to(x.dtype)
        rope = None
        if cfg.rope:
            rope = rope_2d(grids, cfg.hidden_size // cfg.num_attention_heads, x.device)
        segments = Segments.of(lengths, x.device)
        for i, layer in enumerate(self.layers):
            if i < self.recompute and torch.is_grad_enabled():
                x = recomputed(layer, x, segments, rope)
            else:
                x = layer(x, segments, rope)
        return self.post_layernorm(x)

    def lengths(self, grids: list[list[int]]) -> list[int]:
        """Patches that attend to each other: of a picture, a whole clip, or each of its frames."""
        merge = self.cfg.spatial_merge_size
        lengths = []
        for t, h, w in grids:
            if h % merge or w % merge:
                raise ValueError(f"ViT: rows and columns must be multiples of {merge}, got {grids}")
            parts = 1 if self.cfg.attend_across_frames else t
            lengths += [t * h * w // parts] * parts
        return lengths

    def positions(self, grids: list[list[int]]) -> Tensor:
        """The learned table, interpolated to each grid and repeated for every frame: (N, C)."""
        weight = self.position_embedding.weight
        cells, shares = neighbours(grids, self.side)  # (N, 4) each
        # One patch more, of no share in anything: without pictures the table stays in the graph.
        cells, shares = (
            to_device(F.pad(torch.from_numpy(x), (0, 0, 0, 1)), weight.device)
            for x in (cells, shares)
        )
        # One kernel, where F.interpolate takes some for every shape of a picture, and adds the
        # gradients up in random order on a GPU.
        with torch.autocast(weight.device.type, enabled=False):
            summed = F.embedding_bag(cells, weight.float(), mode="sum", per_sample_weights=shares)
        return summed[:-1]

    def pool(self, features: Tensor, grids: Tensor) -> Tensor:
        """features (N, C) -> one vector per picture or clip (M, C), by SigLIP's pooling head."""
        return self.head(features, grids.prod(1).tolist())


def places(grids: list[list[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """For every patch of the pictures and clips end to end: its row and column within its frame,
    and how many of both the frame has. (N,) int64 each, on the host."""
    t, h, w = np.array(grids, np.int64).reshape(-1, 3).T  # (M,) each
    patches = t * h * w
    first = np.cumsum(patches) - patches  # (M,) each grid's first patch
    first, h, w = (np.repeat(x, patches) for x in (first, h, w))  # (N,) each
    place = (np.arange(len(first)) - first) % (h * w)
    return place // w, place % w, h, w


def neighbours(grids: list[list[int]], side: int) -> tuple[np.ndarray, np.ndarray]:
    """The four cells of a table, side x side, that lie around each patch when the table is
    stretched over the patch's grid, and their shares: (N, 4) int64 and fp32, on the host.

    Bilinear, between the centres of cells; patches beyond the outermost centres take the nearest.
    """
    row, column, h, w = places(grids)  # (N,) each
    top, bottom, down = between(row, h, side)
    left, right, across = between(column, w, side)
    corners = top * side + left, top * side + right, bottom * side + left, bottom * side + right
    shares = (1 - down) * (1 - across), (1 - down) * across, down * (1 - across), down * across
    return np.stack(corners, 1), np.stack(shares, 1).astype(np.float32)


def between(i: np.ndarray, n: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The cells before and after the centre of patch i of n, along a line of `side` cells that is
    as long, and how far from the one to the other it is: (N,) each."""
    i, n = i.astype(np.float32), n.astype(np.float32)  # rounded as F.interpolate rounds
    at = np.maximum((i + np.float32(0.5)) * (side / n) - np.float32(0.5), 0)
    before = at.astype(np.int64)
    return before, np.minimum(before + 1, side - 1), at - before


def recomputed(block: nn.Module, *inputs):
    """block(*inputs), of which only the inputs are kept until the backward pass.

    Nothing in it is random.
    """
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)


def rope_2d(
    grids: list[list[int]], head_dim: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin (N, 1, head_dim / 2), fp32, of every patch's row and column.

    The first half of the pairs turns with the row, the second with the column. Rows and columns
    start again in every frame; the frame's number has no angle (Keye-VL v1's released code).
    """
    row, column, _, _ = places(grids)  # (N,) each
    cells = torch.from_numpy(np.stack([row, column], axis=1))  # (N, 2)
    cells = to_device(cells, device).float()
    half = head_dim // 2
    freqs = 10000.0 ** -(torch.arange(0, half, 2, device=device) / half)  # (head_dim / 4,)
    angles = (cells[:, :, None] * freqs).flatten(1)[:, None]  # (N, 1, head_dim / 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (j, j + D/2) of x (N, H, D) by their angles, in fp32."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


class TextTower(nn.Module):
    """SigLIP's text encoder: learned positions, full attention over a fixed context, the last
    position pooled.

    Captions are padded to the context's length, and the padding is attended to, as SigLIP was
    trained.
    """

    def __init__(self, cfg: ViTConfig, vocab_size: int, context: int = 64):
        super().__init__()
        self.context = context
        self.token_embedding = nn.Embedding(vocab_size, cfg.hidden_size)
        self.position_embedding = nn.Embedding(context, cfg.hidden_size)
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.num_hidden_layers))
        self.final_layer_norm = nn.LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)
        self.head = nn.Linear(cfg.hidden_size, cfg.hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, context) int64 -> (B, C)."""
        rows, context = tokens.shape
        x = self.token_embedding(tokens) + self.position_embedding.weight  # (B, L, C)
        segments = Segments.of([context] * rows, tokens.device)
        x = x.flatten(0, 1)  # (B * L, C)
        for layer in self.layers:
            x = layer(x, segments, None)
        last = x.unflatten(0, (rows, context))[:, -1]  # (B, C)
        return self.head(self.final_layer_norm(last))
