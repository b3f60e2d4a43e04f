"""Keye-VL's native-resolution vision transformer (arXiv 2507.01949, section 2.1), and SigLIP's text tower for stage 0.

Pictures and clips of any size enter as one packed row of 14-pixel patches, no padding, no resizing to a square:

    patches (N, 588)  ->  linear  ->  + learned 27x27 position table, interpolated to each grid
                      ->  27 pre-norm blocks, 2D RoPE on queries and keys, attention within each picture or clip
                      ->  layer norm  ->  features (N, 1152)

`grids` (M, 3) says how many frames, rows and columns of patches each picture or clip has. Everything follows the released
weights of SigLIP-so400m-patch14-384 and Keye-VL-8B-Preview; sizes are only numbers in `ViTConfig`.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from kernels import Segments, attention


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
    attend_across_frames: bool = True  # v1's released code; Keye-VL 1.5 keeps each frame to itself


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, segments: Segments, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        q, k, v = (rearrange(p(x), "n (h d) -> n h d", h=self.heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        return self.out_proj(attention(q, k, v, segments).flatten(1))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)
        self.self_attn = SelfAttention(cfg.hidden_size, cfg.num_attention_heads)
        self.layer_norm2 = nn.LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)
        self.mlp = MLP(cfg.hidden_size, cfg.intermediate_size)

    def forward(self, x: Tensor, segments: Segments, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), segments, rope)
        return x + self.mlp(self.layer_norm2(x))


class PoolingHead(nn.Module):
    """SigLIP's attention pooling: one learned query looks at all patches of a picture. Used in stage 0 only."""

    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.probe = nn.Parameter(torch.zeros(1, 1, cfg.hidden_size))
        self.attention = nn.MultiheadAttention(cfg.hidden_size, cfg.num_attention_heads, batch_first=True)
        self.layernorm = nn.LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)
        self.mlp = MLP(cfg.hidden_size, cfg.intermediate_size)

    def forward(self, features: Tensor, lengths: list[int]) -> Tensor:
        """features (N, C), lengths of M pictures -> (M, C)."""
        padded = nn.utils.rnn.pad_sequence(features.split(lengths), batch_first=True)  # (M, L, C)
        empty = torch.arange(padded.shape[1]) >= torch.tensor(lengths)[:, None]  # (M, L): True beyond a picture's end
        probe = self.probe.expand(len(lengths), -1, -1)
        x = self.attention(probe, padded, padded, key_padding_mask=empty.to(padded.device), need_weights=False)[0][:, 0]
        return x + self.mlp(self.layernorm(x))


class ViT(nn.Module):
    def __init__(self, cfg: ViTConfig, pooling_head: bool = False):
        super().__init__()
        self.cfg = cfg
        self.side = cfg.image_size // cfg.patch_size
        self.patch_embedding = nn.Linear(3 * cfg.patch_size**2, cfg.hidden_size)  # the official convolution, flattened
        self.position_embedding = nn.Embedding(self.side**2, cfg.hidden_size)
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)
        self.head = PoolingHead(cfg) if pooling_head else None

    def forward(self, patches: Tensor, grids: Tensor) -> Tensor:
        """Patches of all pictures and clips to features.

        patches (N, 588): uint8 pixels, or floats already in [-1, 1]; channel, row, column flattened; raster order.
        grids (M, 3) int64 on the host: frames, rows, columns of patches. Returns (N, C) in raster order.
        Raises ValueError when the grids do not add up to N or a side is not a multiple of the 2x2 merge.
        """
        grids = grids.tolist()
        if sum(t * h * w for t, h, w in grids) != len(patches):
            raise ValueError(f"ViT: {len(patches)} patches, but grids {grids} ask for {sum(t*h*w for t, h, w in grids)}")
        if any(h % self.cfg.spatial_merge_size or w % self.cfg.spatial_merge_size for _, h, w in grids):
            raise ValueError(f"ViT: rows and columns must be multiples of {self.cfg.spatial_merge_size}, got {grids}")
        if patches.dtype == torch.uint8:
            patches = patches.to(self.patch_embedding.weight.dtype) / 127.5 - 1  # rescale 1/255, mean 0.5, std 0.5
        device = patches.device
        x = self.patch_embedding(patches.to(self.patch_embedding.weight.dtype))  # (N, C)
        x = x + self.positions(grids).to(x.dtype)
        rope = rope_2d(grids, self.cfg.hidden_size // self.cfg.num_attention_heads, device) if self.cfg.rope else None
        across = self.cfg.attend_across_frames
        segments = Segments.of([n for t, h, w in grids for n in ([t * h * w] if across else [h * w] * t)], device)
        for layer in self.layers:
            x = layer(x, segments, rope)
        return self.post_layernorm(x)

    def positions(self, grids: list[list[int]]) -> Tensor:
        """The learned table, bilinearly interpolated to each grid and repeated for every frame: (N, C)."""
        table = rearrange(self.position_embedding.weight, "(h w) c -> 1 c h w", h=self.side)
        fitted = {}  # pictures of one shape share one interpolation
        for _, h, w in grids:
            if (h, w) not in fitted:
                fine = F.interpolate(table.float(), (h, w), mode="bilinear", align_corners=False)
                fitted[h, w] = rearrange(fine, "1 c h w -> (h w) c")
        return torch.cat([self.position_embedding.weight[:0]] + [fitted[h, w].repeat(t, 1) for t, h, w in grids])

    def pool(self, features: Tensor, grids: Tensor) -> Tensor:
        """features (N, C) -> one vector per picture or clip (M, C), by SigLIP's pooling head."""
        return self.head(features, grids.prod(1).tolist())


def rope_2d(grids: list[list[int]], head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin (N, 1, head_dim / 2), fp32: the first half of the pairs turns with the row, the second with the column.

    Rows and columns start again in every frame; the frame's number has no angle (Keye-VL v1's released code).
    """
    freqs = 10000.0 ** -(torch.arange(0, head_dim // 2, 2, device=device).float() / (head_dim // 2))  # (head_dim / 4,)
    cells = [torch.cartesian_prod(torch.arange(h), torch.arange(w)).repeat(t, 1) for t, h, w in grids]
    cells = torch.cat(cells or [torch.zeros(0, 2)]).to(device).float()  # (N, 2): row, column
    angles = (cells[:, :, None] * freqs).flatten(1)[:, None]  # (N, 1, head_dim / 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (j, j + D/2) of x (N, H, D) by their angles, in fp32."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


class TextTower(nn.Module):
    """SigLIP's text encoder: learned positions, full attention over a fixed context, the last position pooled.

    Captions are padded to the context's length and the padding is attended to, as SigLIP was trained.
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
        x = self.token_embedding(tokens) + self.position_embedding.weight  # (B, L, C)
        segments = Segments.of([tokens.shape[1]] * tokens.shape[0], tokens.device)
        x = x.flatten(0, 1)
        for layer in self.layers:
            x = layer(x, segments, None)
        return self.head(self.final_layer_norm(x.unflatten(0, tokens.shape)[:, -1]))
