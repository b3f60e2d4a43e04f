"""Keye-VL: a native-resolution ViT, a 2x2-merge projector and a Qwen3 decoder with 3D RoPE (arXiv 2507.01949, section 2).

    model = KeyeVL.from_pretrained(folder)        our checkpoints and the official Keye-VL-8B-Preview alike
    logits = model.logits(batch)                  (T, vocab) for a packed batch
    loss, n = model.loss(batch)                   cross entropy summed over n supervised tokens
    hidden = model.step(batch, cache, rows)       prefill, later turns and one-token decoding with a KV cache

A packed batch is a dict: tokens (T,), labels (T,) already shifted with -100 where there is no loss, positions (3, T),
segments (S + 1,) int32 and grids (M, 3) on the host, patches (N, 588). Samples lie end to end and never see each other.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels import Segments, attention, cached_attention
from vit import ViT, ViTConfig, rotate

# ---------------------------------------------------------------------------------------------------------------------
# sizes


@dataclass
class Config:
    """Decoder and token facts; field names are those of the official config.json."""

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 12288
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    mrope_section: tuple[int, int, int] = (16, 24, 24)  # frequencies given to time, row, column; sum = head_dim / 2
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 40960
    bos_token_id: int = 151643
    eos_token_id: int = 151645
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision: ViTConfig = field(default_factory=ViTConfig)

    def to_json(self) -> dict:
        d = asdict(self)
        d["vision_config"] = d.pop("vision") | {"model_type": "siglip_vision_model", "tokens_per_second": 2}
        d["rope_scaling"] = {"type": "mrope", "mrope_section": list(d.pop("mrope_section"))}
        return {"architectures": ["KeyeForConditionalGeneration"], "model_type": "Keye", "hidden_act": "silu"} | d

    @classmethod
    def from_json(cls, d: dict) -> "Config":
        """Reads Keye's config.json, and Qwen3's for its decoder. Keys that change nothing here are passed over."""
        if d.get("attention_bias") or d.get("sliding_window") or d.get("hidden_act", "silu") != "silu":
            raise ValueError("config.json asks for attention_bias, sliding_window or an activation other than silu, "
                             "which this decoder does not have")
        vision = {k: v for k, v in d.get("vision_config", {}).items() if k in ViTConfig.__dataclass_fields__}
        kept = {k: v for k, v in d.items() if k in cls.__dataclass_fields__ and k != "vision"}
        head_dim = kept.setdefault("head_dim", d["hidden_size"] // d["num_attention_heads"])
        section = (d.get("rope_scaling") or {}).get("mrope_section") or mrope_section(head_dim)
        return cls(**kept | {"mrope_section": tuple(section), "vision": ViTConfig(**vision)})


def mrope_section(head_dim: int) -> tuple[int, int, int]:
    """Keye's 16:24:24 split of head_dim / 2 frequencies, for other head widths."""
    side = 3 * head_dim // 16
    return head_dim // 2 - 2 * side, side, side


def _toy(hidden, layers, heads, kv, head_dim, mlp, vit) -> Config:
    n = 992  # entries of vocab-toy.json; the 32 added tokens follow
    return Config(1024, hidden, mlp, layers, heads, kv, head_dim, mrope_section=mrope_section(head_dim),
                  tie_word_embeddings=True, max_position_embeddings=8192, bos_token_id=n, eos_token_id=n + 2,
                  vision_start_token_id=n + 9, vision_end_token_id=n + 10, image_token_id=n + 12,
                  video_token_id=n + 13, vision=ViTConfig(*vit))


# toy to small: ours, sized for two CPU cores and for one laptop GPU. 0.6b to 8b: Qwen3's decoders with SigLIP-400M.
PRESETS = {
    "toy": _toy(96, 3, 3, 1, 64, 288, (64, 192, 2, 4)),
    "tiny": _toy(384, 8, 6, 2, 64, 1024, (256, 768, 6, 8)),
    "small": _toy(768, 12, 12, 4, 64, 2048, (384, 1536, 12, 6)),
    "0.6b": Config(151936, 1024, 3072, 28, 16, 8, tie_word_embeddings=True),
    "1.7b": Config(151936, 2048, 6144, 28, 16, 8, tie_word_embeddings=True),
    "4b": Config(151936, 2560, 9728, 36, 32, 8, tie_word_embeddings=True),
    "8b": Config(),
}

# ---------------------------------------------------------------------------------------------------------------------
# decoder


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.type_as(x), self.eps)  # one dtype: the fused kernel


class Attention(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        d, self.head_dim = cfg.head_dim, cfg.head_dim
        self.q_proj = nn.Linear(cfg.hidden_size, cfg.num_attention_heads * d, bias=False)
        self.k_proj = nn.Linear(cfg.hidden_size, cfg.num_key_value_heads * d, bias=False)
        self.v_proj = nn.Linear(cfg.hidden_size, cfg.num_key_value_heads * d, bias=False)
        self.o_proj = nn.Linear(cfg.num_attention_heads * d, cfg.hidden_size, bias=False)
        self.q_norm, self.k_norm = RMSNorm(d, cfg.rms_norm_eps), RMSNorm(d, cfg.rms_norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], segments: Segments, attend=attention) -> Tensor:
        q, k, v = (rearrange(p(x), "t (h d) -> t h d", d=self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(self.q_norm(q), *rope), rotate(self.k_norm(k), *rope)  # norm per head, before RoPE, as Qwen3
        return self.o_proj(attend(q, k, v, segments, causal=True).flatten(1))


class SwiGLU(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.up_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.down_proj = nn.Linear(cfg.intermediate_size, cfg.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = SwiGLU(cfg)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], segments: Segments, attend=attention) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, segments, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(cfg) for _ in range(cfg.num_hidden_layers))
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.activation_checkpointing = False  # recompute each layer in the backward pass: less memory, 1/3 more work

    def forward(self, x: Tensor, positions: Tensor, segments: Segments, cache: "KVCache | None" = None) -> Tensor:
        """x (T, C) embeddings, positions (3, T) -> hidden states (T, C) before the head."""
        rope = rope_3d(positions, self.cfg)
        for i, layer in enumerate(self.layers):
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, rope, segments, use_reentrant=False)
            else:
                x = layer(x, rope, segments, attention if cache is None else cache.attend(i))
        return self.norm(x)


def rope_3d(positions: Tensor, cfg: Config) -> tuple[Tensor, Tensor]:
    """positions (3, T): time, row, column -> cos and sin (T, 1, head_dim / 2), fp32.

    Each frequency turns with one axis: the 16 fastest with time, then 24 with the row, 24 with the column. Text has the
    same position on all three axes, where this is plain RoPE.
    """
    device = positions.device
    freqs = cfg.rope_theta ** -(torch.arange(0, cfg.head_dim, 2, device=device).float() / cfg.head_dim)  # (D / 2,)
    axis = torch.arange(3, device=device).repeat_interleave(torch.tensor(cfg.mrope_section, device=device))
    angles = (positions[axis].float() * freqs[:, None]).T[:, None]  # (T, 1, D / 2)
    return angles.cos(), angles.sin()


class Projector(nn.Module):
    """Four neighbouring patches become one token: norm each patch, put 2x2 side by side, two linear layers."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.merge = cfg.vision.spatial_merge_size
        width = cfg.vision.hidden_size * self.merge**2
        self.pre_norm = nn.LayerNorm(cfg.vision.hidden_size, 1e-5)
        self.linear_1, self.linear_2 = nn.Linear(width, width), nn.Linear(width, cfg.hidden_size)

    def forward(self, features: Tensor, grids: Tensor) -> Tensor:
        """features (N, C_vit) raster order, grids (M, 3) -> (N / 4, C), frame by frame, row by row."""
        m, x = self.merge, self.pre_norm(features)
        blocks = [rearrange(part, "(t h p w q) c -> (t h w) (p q c)", t=t, h=h // m, w=w // m, p=m, q=m)
                  for part, (t, h, w) in zip(x.split(grids.prod(1).tolist()), grids.tolist())]
        x = torch.cat(blocks) if blocks else x.reshape(0, self.linear_1.in_features)
        return self.linear_2(F.gelu(self.linear_1(x)))


# ---------------------------------------------------------------------------------------------------------------------
# the whole model


class KeyeVL(nn.Module):
    def __init__(self, cfg: Config, pooling_head: bool = False):
        super().__init__()
        self.config = cfg
        self.vit = ViT(cfg.vision, pooling_head)
        self.projector = Projector(cfg)
        self.decoder = Decoder(cfg)
        self.lm_head = None if cfg.tie_word_embeddings else nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)

    def init_weights(self) -> "KeyeVL":
        """Fresh weights, from torch's generator. # ours: Keye starts every part but the projector from released ones."""
        init_weights(self.vit, self.config.vision.num_hidden_layers)
        table = self.vit.position_embedding.weight
        table.data.copy_(sincos_2d(self.vit.side, table.shape[1]))
        init_weights(self.projector, 1)
        init_weights(self.decoder, self.config.num_hidden_layers)
        if self.lm_head is not None:
            init_weights(self.lm_head, 1)
        return self

    def embed(self, batch: dict, decoding: bool = False) -> Tensor:
        """Token embeddings with the placeholders of pictures and clips replaced by their features: (T, C)."""
        tokens, grids = batch["tokens"], batch["grids"]
        if decoding and not len(grids):
            return self.decoder.embed_tokens(tokens)
        # A whole pack without pictures still runs the ViT, on zero rows: every rank must join FSDP's gathers.
        visual = self.projector(self.vit(batch["patches"], grids), grids)  # (N / 4, C)
        holes = (tokens == self.config.image_token_id) | (tokens == self.config.video_token_id)  # (T,)
        if not tokens.is_cuda and holes.sum() != len(visual):  # on CUDA this would wait for the device; pack() checks
            raise ValueError(f"{int(holes.sum())} picture and video placeholders, but {len(visual)} visual tokens")
        x = self.decoder.embed_tokens(tokens)
        return x.masked_scatter(holes[:, None], visual.type_as(x))

    def hidden(self, batch: dict) -> Tensor:
        """Last hidden states (T, C) of a packed batch."""
        lengths = batch["segments"].diff().tolist()
        return self.decoder(self.embed(batch), batch["positions"], Segments.of(lengths, batch["tokens"].device))

    def head(self, hidden: Tensor) -> Tensor:
        """hidden (T, C) -> logits (T, vocab)."""
        return F.linear(hidden, self.head_weight)

    @property
    def head_weight(self) -> Tensor:
        return self.decoder.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def logits(self, batch: dict) -> Tensor:
        return self.head(self.hidden(batch))

    def loss(self, batch: dict) -> tuple[Tensor, int]:
        """Cross entropy summed over the labels that are not -100, fp32, and how many there are."""
        labels = batch["labels"]
        keep = labels != -100  # rows without a label never meet the vocabulary
        return cross_entropy_sum(self.hidden(batch)[keep], self.head_weight, labels[keep]), int(keep.sum())

    def logprobs(self, batch: dict, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """log p(label) of every label that is not -100, with its gradient, and the entropy of that distribution, without:
        both (N,) fp32, in the pack's order. temperature: the one that sampled the labels."""
        keep = batch["labels"] != -100
        return token_logprobs(self.hidden(batch)[keep], self.head_weight, batch["labels"][keep], temperature)

    forward = loss  # FSDP's hooks sit on forward

    # -- generation ---------------------------------------------------------------------------------------------------

    def new_cache(self, rows: int, max_len: int) -> "KVCache":
        weight = self.decoder.norm.weight
        dtype = torch.get_autocast_dtype(weight.device.type) if torch.is_autocast_enabled(weight.device.type) \
            else weight.dtype
        return KVCache(self.config, rows, max_len, weight.device, dtype)

    def step(self, batch: dict, cache: "KVCache", rows: list[int]) -> Tensor:
        """Hidden states (T, C) of new tokens, with all that the cache holds before them.

        The batch's segments are new tokens of conversations `rows` of the cache: a whole prompt, a later turn or picture,
        or one token each. Raises ValueError when a row would outgrow the cache.
        """
        lengths = batch["segments"].diff().tolist()
        cache.begin(rows, lengths)
        hidden = self.decoder(self.embed(batch, decoding=True), batch["positions"], Segments.of(lengths, cache.device), cache)
        cache.end()
        return hidden

    # -- files --------------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype = torch.float32, device="cpu",
                        pooling_head: bool = False) -> "KeyeVL":
        """A model from a folder in the official layout. Names the tensor that is missing, extra or misshapen."""
        model = cls.empty(Config.from_json(read_config(folder)), dtype, device, pooling_head)
        unused = UNUSED + (() if pooling_head else ("visual.vision_model.head.",))
        load(model, folder, KEYE_NAMES, unused + (("lm_head.",) if model.lm_head is None else ()))
        return model

    @classmethod
    def empty(cls, cfg: Config, dtype=torch.float32, device="cpu", pooling_head: bool = False) -> "KeyeVL":
        """Allocated, not initialised."""
        with torch.device("meta"):
            model = cls(cfg, pooling_head)
        return model.to(dtype).to_empty(device=device)

    def save_pretrained(self, folder: str | Path) -> None:
        save_weights(self.state_dict(), self.config, folder)


def init_weights(part: nn.Module, depth: int) -> None:
    """Normal with standard deviation fan_in^-0.5, less where a layer adds to a residual stream of `depth` blocks; biases
    0, norms 1. # ours, since activations keep their size at any width. Embeddings get 2 width^-0.5: with Qwen3's 0.02 a
    small decoder's first block drowns out the tokens it read, and learning starts several times later."""
    for name, module in part.named_modules():
        for key, p in module.named_parameters(recurse=False):
            if p.dim() == 1:
                nn.init.constant_(p, float(key == "weight"))  # norms; every bias is zero
            elif isinstance(module, nn.Embedding) or key == "probe":
                nn.init.normal_(p, std=2 * p.shape[-1] ** -0.5)
            else:
                deep = name.endswith(("o_proj", "down_proj", "out_proj", "fc2"))
                nn.init.normal_(p, std=p.shape[1] ** -0.5 / ((2 * depth) ** 0.5 if deep else 1))


def sincos_2d(side: int, width: int) -> Tensor:
    """Start of the position table, (side^2, width). # ours: smooth in row and column, so that grids of different sizes,
    which all interpolate this one table, begin with similar codes; SigLIP's own table is loaded where it exists."""
    where = torch.arange(side).float() / side
    freqs = torch.pi * 2.0 ** torch.linspace(0, 2.5, -(-width // 4))  # (ceil(width / 4),) half a wave to ~3 waves
    waves = torch.cat([(where[:, None] * freqs).sin(), (where[:, None] * freqs).cos()], 1)  # (side, ~width / 2)
    rows, cols = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    return torch.cat([rows, cols], -1).flatten(0, 1)[:, :width]


def cross_entropy_sum(hidden: Tensor, weight: Tensor, labels: Tensor, room: int = 2**26) -> Tensor:
    """Sum of -log p(label), fp32, without ever holding all logits: at most `room` fp32 numbers (256 MiB) at a time.

    hidden (T, C), weight (vocab, C), labels (T,). A long pack goes through in chunks whose logits are computed again in
    the backward pass: 8k tokens x 151,936 words would be 4.6 GiB.
    """
    def chunk_loss(h, y):
        return F.cross_entropy(F.linear(h, weight).float(), y, reduction="sum")

    size = max(1, room // weight.shape[0])
    if len(labels) <= size:
        return chunk_loss(hidden, labels)
    return sum(checkpoint(chunk_loss, h, y, use_reentrant=False) for h, y in zip(hidden.split(size), labels.split(size)))


def token_logprobs(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float = 1.0, room: int = 2**26):
    """log softmax(hidden weight' / temperature) at the labels and that distribution's entropy (detached), (T,) fp32 each,
    in chunks as cross_entropy_sum."""
    def chunk(h, y):
        logits = F.linear(h, weight).float() / temperature
        every = logits.log_softmax(-1)
        return every.gather(1, y[:, None])[:, 0], -(every.detach().exp() * every.detach()).sum(-1)

    size = max(1, room // weight.shape[0])
    if len(labels) <= size:
        return chunk(hidden, labels)
    parts = [checkpoint(chunk, h, y, use_reentrant=False) for h, y in zip(hidden.split(size), labels.split(size))]
    return tuple(torch.cat(part) for part in zip(*parts))


class KVCache:
    """Keys and values of several conversations, one row each: per layer (rows, max_len, KV, D)."""

    def __init__(self, cfg: Config, rows: int, max_len: int, device, dtype: torch.dtype):
        shape = (cfg.num_hidden_layers, rows, max_len, cfg.num_key_value_heads, cfg.head_dim)
        self.k, self.v = torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype)
        self.lengths, self.max_len, self.device = [0] * rows, max_len, self.k.device

    def begin(self, rows: list[int], new: list[int]) -> None:
        """`new` tokens are about to be added to each of `rows`; works out where they go."""
        if any(self.lengths[r] + n > self.max_len for r, n in zip(rows, new)):
            raise ValueError(f"KV cache of {self.max_len} tokens a row is full: rows {rows} hold "
                             f"{[self.lengths[r] for r in rows]} and {new} more were to be added")
        self.rows, self.new = rows, new
        self.fresh = not any(self.lengths[r] for r in rows)  # a prompt from the start needs no look at the cache
        where = [(i, r, j, self.lengths[r] + j) for i, (r, n) in enumerate(zip(rows, new)) for j in range(n)]
        self.segment, self.row, self.offset, self.slot = torch.tensor(where, device=self.device).T  # each (T,)
        self.before = torch.tensor([self.lengths[r] for r in rows], device=self.device)
        self.reach = max(self.lengths[r] + n for r, n in zip(rows, new))

    def end(self) -> None:
        for r, n in zip(self.rows, self.new):
            self.lengths[r] += n

    def attend(self, layer: int):
        """`attention` for one layer that first puts the new keys and values (T, KV, D) into the cache."""
        def attend(q, k, v, segments, causal):
            self.k[layer, self.row, self.slot], self.v[layer, self.row, self.slot] = k.to(self.k.dtype), v.to(self.v.dtype)
            if self.fresh:
                return attention(q, k, v, segments, causal)
            padded = q.new_zeros(len(self.rows), max(self.new), *q.shape[1:])  # (B, Q, H, D)
            padded[self.segment, self.offset] = q
            rows = slice(None) if self.rows == list(range(len(self.lengths))) else self.rows  # all of them: no copy
            keys, values = (c[layer, rows, : self.reach].type_as(q) for c in (self.k, self.v))  # (B, L, KV, D)
            return cached_attention(padded, keys, values, self.before)[self.segment, self.offset]
        return attend


def training_flops(cfg: Config, lengths: list[int], grids: list[list[int]], vit=True, decoder=True) -> float:
    """Floating-point operations of one forward and backward pass: 6 per weight and token, causal attention halved.

    lengths: tokens of each sample; grids: (t, h, w) of each picture and clip. A frozen part (False) is forward and, for
    the decoder under a trained projector, backward to its input: 4 per weight instead of 6; a frozen ViT only forward.
    """
    v, heads = cfg.vision, cfg.num_attention_heads * cfg.head_dim
    layer = cfg.hidden_size * (2 * heads + 2 * cfg.num_key_value_heads * cfg.head_dim + 3 * cfg.intermediate_size)
    text = sum(2 * n * (cfg.num_hidden_layers * layer + cfg.vocab_size * cfg.hidden_size)
               + 2 * n * n * heads * cfg.num_hidden_layers for n in lengths)
    vit_layer = 4 * v.hidden_size**2 + 2 * v.hidden_size * v.intermediate_size
    seen = [(t * h * w, t * h * w if v.attend_across_frames else h * w) for t, h, w in grids]
    image = sum(2 * n * v.num_hidden_layers * vit_layer + 4 * n * m * v.hidden_size * v.num_hidden_layers for n, m in seen)
    image_proj = sum(n / 4 * 2 * (16 * v.hidden_size**2 + 4 * v.hidden_size * cfg.hidden_size) for n, _ in seen)
    return text * (3 if decoder else 2) + image * (3 if vit else 1) + image_proj * 3


# ---------------------------------------------------------------------------------------------------------------------
# files in the official layout

# (our prefix, official prefix); the first that fits counts
KEYE_NAMES = [
    ("vit.patch_embedding.", "visual.vision_model.embeddings.patch_embedding."),
    ("vit.position_embedding.", "visual.vision_model.embeddings.position_embedding."),
    ("vit.layers.", "visual.vision_model.encoder.layers."),
    ("vit.", "visual.vision_model."),
    ("projector.", "mlp_AR."),
    ("decoder.", "model."),
    ("lm_head.", "lm_head."),
]
QWEN3_NAMES = [("decoder.", "model."), ("lm_head.", "lm_head.")]
SIGLIP_NAMES = [(a, b.removeprefix("visual.")) for a, b in KEYE_NAMES if a.startswith("vit.")] + [
    ("text.token_embedding.", "text_model.embeddings.token_embedding."),
    ("text.position_embedding.", "text_model.embeddings.position_embedding."),
    ("text.layers.", "text_model.encoder.layers."),
    ("text.", "text_model."),
    ("logit_", "logit_"),
]
# in the released file, never read by the released model: positions by flat patch index
UNUSED = ("visual.vision_model.embeddings.packing_position_embedding.",)


def renamed(name: str, names: list[tuple[str, str]]) -> str | None:
    return next((theirs + name[len(ours):] for ours, theirs in names if name.startswith(ours)), None)


def read_config(folder: str | Path) -> dict:
    path = Path(folder) / "config.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder}: no config.json here; a model folder in the official layout was expected") from None
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}: not JSON: {e}") from None


def weight_files(folder: str | Path) -> dict[str, Path]:
    """Which file of the folder holds each tensor: model.safetensors, or the shards that the index names."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        where = {k: folder / f for k, f in json.loads(index.read_text())["weight_map"].items()}
        for path in set(where.values()):
            if not path.exists():
                raise FileNotFoundError(f"{index} names {path.name}, which is not there")
        return where
    path = folder / "model.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"{folder}: neither model.safetensors nor model.safetensors.index.json")
    try:
        with safe_open(path, "pt") as f:
            return dict.fromkeys(f.keys(), path)
    except Exception as e:  # safetensors raises its own error type for a truncated or foreign file
        raise ValueError(f"{path}: cannot be read as safetensors: {e}") from None


@torch.no_grad()
def load(module: nn.Module, folder: str | Path, names: list[tuple[str, str]], unused: tuple[str, ...] = ()) -> None:
    """Copy a folder's tensors into those parameters of the module that `names` covers; every one must be there and fit.

    names: (prefix here, prefix in the file); unused: prefixes in the file that are known and not needed.
    Raises KeyError for a missing or an extra tensor, ValueError for a wrong shape, each with its name.
    """
    where = weight_files(folder)
    ours = {theirs: (name, p) for name, p in module.state_dict().items() if (theirs := renamed(name, names))}
    if missing := sorted(ours.keys() - where.keys()):
        raise KeyError(f"{folder}: {len(missing)} tensors missing, first {missing[0]} (for {ours[missing[0]][0]})")
    extra = sorted(k for k in where.keys() - ours.keys() if not k.startswith(unused))
    if extra:
        raise KeyError(f"{folder}: {len(extra)} tensors that this model has no place for, first {extra[0]}")
    for path in sorted(set(where.values())):
        with safe_open(path, "pt") as f:
            for key in f.keys():
                if key in ours:
                    name, target = ours[key]
                    source = f.get_tensor(key)
                    if key.endswith("patch_embedding.weight"):
                        source = source.flatten(1)  # a convolution of stride 14 over 14-pixel patches is a linear
                    if source.shape != target.shape:
                        raise ValueError(f"{path}: {key} has shape {tuple(source.shape)}, but {name} needs {tuple(target.shape)}")
                    target.copy_(source)


def save_weights(state: dict[str, Tensor], cfg: Config, folder: str | Path, shard_bytes: int = 5 * 10**9) -> None:
    """Write config.json and the weights by their official names; above 5 GB in shards with an index."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards, size = [{}], 0
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        if name == "vit.patch_embedding.weight":
            tensor = tensor.unflatten(1, (3, cfg.vision.patch_size, cfg.vision.patch_size))
        if size and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][renamed(name, KEYE_NAMES)] = tensor
        size += tensor.nbytes
    (folder / "config.json").write_text(json.dumps(cfg.to_json(), indent=2) + "\n")
    if len(shards) == 1:
        return _write(shards[0], folder / "model.safetensors")
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for file, shard in zip(files, shards):
        _write(shard, folder / file)
    index = {"metadata": {"total_size": sum(t.nbytes for s in shards for t in s.values())},
             "weight_map": {name: file for file, shard in zip(files, shards) for name in shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    """The file is there whole or not at all."""
    save_file(tensors, path.with_suffix(".tmp"), metadata={"format": "pt"})
    os.replace(path.with_suffix(".tmp"), path)
