"""Keye-VL: a native-resolution ViT, a projector that merges 2x2 patches, and a Qwen3 decoder with
3D RoPE (arXiv 2507.01949, section 2).

    model = KeyeVL.from_pretrained(folder)       our checkpoints and Keye-VL-8B-Preview alike
    logits = model.logits(batch)                 (T, vocab) for a packed batch
    loss, n = model.loss(batch)                  cross entropy summed over n supervised tokens
    hidden = model.step(batch, cache, rows)      prefill, later turns and decoding, with a KV cache

A packed batch is a dict: tokens (T,), labels (T,) already shifted with -100 where there is no
loss, positions (3, T), segments (S + 1,) int32 and grids (M, 3) on the host, patches (N, 588).
Samples lie end to end and never see each other.
"""

from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from common.facts import DECODER, TOWER, read_facts
from common.parallel import assign
from common.weights import KEYE_NAMES, UNUSED, load_weights, read_config, save_weights
from kernels import (
    Segments,
    attention,
    cached_attention,
    decoder_step,
    enter_heads,
    few_kernels,
    project,
    project_swiglu,
    to_device,
)
from vit import ViT, ViTConfig, recomputed, rotate

# --------------------------------------------------------------------------------------------------
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
    mrope_section: tuple[int, int, int] = (16, 24, 24)  # frequencies of time, row, column
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
        facts = asdict(self)
        vision = facts.pop("vision") | {"model_type": "siglip_vision_model", "tokens_per_second": 2}
        section = list(facts.pop("mrope_section"))
        return {
            "architectures": ["KeyeForConditionalGeneration"],
            "model_type": "Keye",
            "hidden_act": "silu",
            **facts,
            "vision_config": vision,
            "rope_scaling": {"type": "mrope", "mrope_section": section},
        }

    @classmethod
    def from_json(cls, facts: dict, where: str | Path = "config.json") -> "Config":
        """Read Keye's config.json, or Qwen3's for its decoder.

        Keys that change nothing here are passed over. ValueError names `where`, the key and its
        value when the file describes another kind of model.
        """
        facts = read_facts(facts, cls, DECODER, NEEDED, where)
        full = ["full_attention"] * facts["num_hidden_layers"]
        if facts.get("layer_types", full) != full:
            raise ValueError(f"{where}: layer_types is {facts['layer_types']}; want {full}")
        head_dim = facts["hidden_size"] // facts["num_attention_heads"]
        head_dim = facts.setdefault("head_dim", head_dim)
        facts["vision"] = ViTConfig()
        if "vision_config" in facts:
            facts["vision"] = tower_config(facts["vision_config"], f"{where}, vision_config")
        else:  # Qwen3 has no sections: Keye's 16:24:24 split of the head_dim / 2 frequencies
            side = 3 * head_dim // 16
            facts.setdefault("mrope_section", [head_dim // 2 - 2 * side, side, side])
        section = facts.get("mrope_section")
        three = isinstance(section, list) and [type(n) for n in section] == [int] * 3
        if not three or min(section) < 0 or 2 * sum(section) != head_dim:
            raise ValueError(
                f"{where}: mrope_section is {section}; want three numbers with the sum "
                f"head_dim / 2, here {head_dim} / 2"
            )
        facts["mrope_section"] = tuple(section)
        return cls(**_fields(cls, facts))


# Their defaults differ between Keye's code, Qwen3's and ours.
NEEDED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "rope_theta",
)
NEEDED_TOWER = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def tower_config(facts: dict, where: str | Path) -> ViTConfig:
    """Keye's or SigLIP's vision_config, or SigLIP's text_config: its tower has the same layers.

    ValueError as Config.from_json.
    """
    facts = read_facts(facts, ViTConfig, TOWER, NEEDED_TOWER, where)
    return ViTConfig(**_fields(ViTConfig, facts))


def _fields(kind: type, facts: dict) -> dict:
    return {key: value for key, value in facts.items() if key in kind.__dataclass_fields__}


# ours: toy is sized for two CPU cores, tiny and small for a laptop's GPU. Their vocabulary has 992
# entries, and the 32 added tokens follow.
SMALL = dict(
    vocab_size=1024,
    head_dim=64,
    mrope_section=(8, 12, 12),
    tie_word_embeddings=True,
    max_position_embeddings=8192,
    bos_token_id=992,
    eos_token_id=994,
    vision_start_token_id=1001,
    vision_end_token_id=1002,
    image_token_id=1004,
    video_token_id=1005,
)
PRESETS = {
    "toy": Config(
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=1,
        vision=ViTConfig(64, 192, 2, 4),  # width, MLP, layers, heads
        **SMALL,
    ),
    "tiny": Config(
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        vision=ViTConfig(256, 768, 6, 8),
        **SMALL,
    ),
    "small": Config(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        vision=ViTConfig(384, 1536, 12, 6),
        **SMALL,
    ),
    # Qwen3's decoders with SigLIP-400M (vocabulary, width, MLP, layers, heads); 8b is Keye-VL-8B.
    "0.6b": Config(151936, 1024, 3072, 28, 16, tie_word_embeddings=True),
    "1.7b": Config(151936, 2048, 6144, 28, 16, tie_word_embeddings=True),
    "4b": Config(151936, 2560, 9728, 36, 32, tie_word_embeddings=True),
    "8b": Config(),
}


@dataclass
class Scale:
    """What all scripts do alike at one size."""

    pack: int  # tokens of a micro-batch
    packs: int  # micro-batches of a step, on all ranks together
    muon: float  # learning rate of matrices under Muon, as a multiple of AdamW's; 0: AdamW only
    budget: dict  # tokens of a picture, a frame and a clip, as Processor takes them
    max_answer: int  # tokens of an answer in one of the modes


# Keye-VL states the budget (section 2.2), packs of 8,192 tokens (1.5, stages 1 and 2) and answers
# of 2,048 (in evaluation).
# ours: the rest. AdamW alone moves released weights gently, and beside a large model its KV cache
# has memory for 64 questions.
RELEASED = Scale(
    pack=8192,
    packs=64,
    muon=0,
    budget=dict(image_min=4, image_max=16384, frame_min=128, frame_max=768, video_max=24576),
    max_answer=2048,
)
# ours, all of it: a picture of the toy world must cost a few tokens, and its models think in few
# words. Their memory is no limit, and a GPU waits for the host as long for few rows as for many.
TOY = Scale(
    pack=4096,
    packs=1,
    muon=2,
    budget=dict(image_min=4, image_max=16, frame_min=4, frame_max=9, video_max=96),
    max_answer=192,
)
TINY_BUDGET = dict(image_min=4, image_max=36, frame_min=4, frame_max=16, video_max=192)
SMALL_BUDGET = dict(image_min=4, image_max=256, frame_min=4, frame_max=64, video_max=1024)
SCALE = {
    "toy": TOY,
    "tiny": replace(TOY, pack=16384, budget=TINY_BUDGET),
    "small": replace(TOY, pack=16384, packs=4, budget=SMALL_BUDGET),
    "0.6b": RELEASED,
    "1.7b": RELEASED,
    "4b": RELEASED,
    "8b": RELEASED,
}


def scale_like(cfg: Config) -> Scale:
    """The toy's scale or the released models', for a model whose size has no name."""
    return SCALE["toy" if cfg.hidden_size < 1024 else "8b"]


# --------------------------------------------------------------------------------------------------
# decoder


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        # PyTorch's fused kernel wants one dtype for both.
        return F.rms_norm(x, self.weight.shape, self.weight.type_as(x), self.eps)


class Attention(nn.Module):
    """x (T, C) -> (T, C). attend: `attention`, or the KV cache's form of it."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.head_dim = cfg.head_dim
        width = cfg.num_attention_heads * cfg.head_dim
        kv_width = cfg.num_key_value_heads * cfg.head_dim
        self.q_proj = nn.Linear(cfg.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(cfg.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(cfg.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, cfg.hidden_size, bias=False)
        self.q_norm = RMSNorm(cfg.head_dim, cfg.rms_norm_eps)
        self.k_norm = RMSNorm(cfg.head_dim, cfg.rms_norm_eps)

    def forward(self, x, rope, segments, attend):
        q = self.q_proj(x).unflatten(1, (-1, self.head_dim))  # (T, H, D)
        k = self.k_proj(x).unflatten(1, (-1, self.head_dim))  # (T, KV, D)
        v = self.v_proj(x).unflatten(1, (-1, self.head_dim))  # (T, KV, D)
        # Norm per head, then RoPE, as Qwen3.
        q = rotate(self.q_norm(q), *rope)
        k = rotate(self.k_norm(k), *rope)
        out = attend(q, k, v, segments, causal=True)  # (T, H, D)
        return self.o_proj(out.flatten(1))  # (T, C)


class SwiGLU(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.up_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.down_proj = nn.Linear(cfg.intermediate_size, cfg.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = SwiGLU(cfg)

    def forward(self, x, rope, segments, attend):
        x = x + self.self_attn(self.input_layernorm(x), rope, segments, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(cfg) for _ in range(cfg.num_hidden_layers))
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        # Of so many layers, only what enters them is kept, and the backward pass runs them again:
        # less memory, and a third more work.
        self.recompute = 0

    def forward(
        self, x: Tensor, positions: Tensor, segments: Segments, cache: "KVCache | None" = None
    ) -> Tensor:
        """x (T, C) embeddings, positions (3, T) -> hidden states (T, C) before the head."""
        rope = rope_3d(positions, self.cfg)
        for i, layer in enumerate(self.layers):
            attend = attention if cache is None else partial(cache.attend, i)
            if i < self.recompute and torch.is_grad_enabled():
                x = recomputed(layer, x, rope, segments, attend)
            else:
                x = layer(x, rope, segments, attend)
        return self.norm(x)

    def whole_step(self):
        """A faster `forward` for one text token of each row of a cache, or None: a function of
        x (B, C), positions (B,), tokens before (B,), and the cache's keys and values.

        A small decoder's layers are one call on a CPU (kernels/step.py); on a GPU a layer's small
        operations are two (kernels/layer.py), and few tokens' products have kernels of their own
        (kernels/products.py).
        """
        cfg = self.cfg
        weight = self.norm.weight
        if few_kernels(weight, cfg.head_dim):
            return self.step_of_few_kernels
        layers = [list(layer.parameters()) for layer in self.layers]
        heads, eps = cfg.num_attention_heads, cfg.rms_norm_eps
        return decoder_step(layers, weight, frequencies(cfg, weight.device), heads, eps)

    def step_of_few_kernels(self, x, positions, before, keys, values):
        rope = [x.contiguous() for x in rope_3d(positions.expand(3, -1), self.cfg)]
        places = torch.arange(len(x), device=x.device) * keys.shape[2] + before
        lengths = before.int()
        for layer, k_cache, v_cache in zip(self.layers, keys, values):
            attn, mlp = layer.self_attn, layer.mlp
            weights = [attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight]
            q, k, v = (
                heads.unflatten(1, (-1, attn.head_dim))
                for heads in project(x, weights, norm=layer.input_layernorm)
            )
            norms = attn.q_norm.weight, attn.k_norm.weight
            cache = k_cache, v_cache
            q = enter_heads(q, k, v, norms, rope, places, cache, attn.q_norm.eps)
            out = cached_attention(q[:, None], k_cache, v_cache, lengths)  # (B, 1, H, D)
            (x,) = project(out.flatten(1), [attn.o_proj.weight], plus=x)
            h = project_swiglu(
                x, mlp.gate_proj.weight, mlp.up_proj.weight, norm=layer.post_attention_layernorm
            )
            (x,) = project(h, [mlp.down_proj.weight], plus=x)
        return self.norm(x)


def rope_3d(positions: Tensor, cfg: Config) -> tuple[Tensor, Tensor]:
    """positions (3, T): time, row, column -> cos and sin (T, 1, head_dim / 2), fp32.

    Each frequency turns with one axis: the 16 fastest with time, then 24 with the row, 24 with the
    column. Text has the same position on all three axes, where this is plain RoPE.
    """
    device = positions.device
    freqs = frequencies(cfg, device)  # (D / 2,)
    # On the device: a CUDA graph of decoding can hold this, but no copy from the host.
    time, row, _ = cfg.mrope_section
    place = torch.arange(len(freqs), device=device)
    axis = (place >= time).long() + (place >= time + row)  # (D / 2,)
    angles = positions[axis] * freqs[:, None]  # (D / 2, T)
    angles = angles.T[:, None]  # (T, 1, D / 2)
    return angles.cos(), angles.sin()


def frequencies(cfg: Config, device=None) -> Tensor:
    """By how much each pair of channels turns from one position to the next: (head_dim / 2,)."""
    exponents = torch.arange(0, cfg.head_dim, 2, device=device) / cfg.head_dim
    return cfg.rope_theta**-exponents


class Projector(nn.Module):
    """Four neighbouring patches become one token: norm each patch, put 2x2 side by side, two
    linear layers."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.merge = cfg.vision.spatial_merge_size
        width = cfg.vision.hidden_size * self.merge**2
        self.pre_norm = nn.LayerNorm(cfg.vision.hidden_size, 1e-5)
        self.linear_1 = nn.Linear(width, width)
        self.linear_2 = nn.Linear(width, cfg.hidden_size)

    def forward(self, features: Tensor, grids: Tensor) -> Tensor:
        """features (N, C_vit) in raster order, grids (M, 3) -> (N / 4, C), row by row."""
        x = self.pre_norm(features)
        # One gather for all pictures: pictures one by one are hundreds of small kernels.
        order = merged_order(grids.tolist(), self.merge)
        x = x.index_select(0, to_device(order, x.device))
        x = x.view(-1, self.linear_1.in_features)  # (N / 4, 4 C_vit)
        return self.linear_2(F.gelu(self.linear_1(x)))


def merged_order(grids: list[list[int]], merge: int) -> Tensor:
    """merge_order of all pictures and clips end to end: (N,) int64 on the host."""
    parts = [np.zeros(0, np.int64)]  # no picture at all: zero rows
    begin = 0
    for grid in grids:
        parts.append(merge_order(tuple(grid), merge) + begin)
        begin += len(parts[-1])
    return torch.from_numpy(np.concatenate(parts))


@lru_cache(256)
def merge_order(grid: tuple[int, int, int], merge: int) -> np.ndarray:
    """The patches of a picture or clip (t, h, w) in raster order, 2x2 neighbours together."""
    t, h, w = grid
    raster = np.arange(t * h * w)
    side_by_side = "(t h p w q) -> (t h w p q)"
    return rearrange(raster, side_by_side, t=t, h=h // merge, p=merge, q=merge)


class Head(nn.Linear):
    """The vocabulary's weights. FSDP gathers them for forward alone, so all that needs them comes
    to them: forward(hidden, work, ...) is work(hidden, weight, ...), by default logits (T, vocab).
    """

    def forward(self, hidden: Tensor, work=F.linear, *more):
        return work(hidden, self.weight, *more)


# --------------------------------------------------------------------------------------------------
# the whole model


class KeyeVL(nn.Module):
    def __init__(self, cfg: Config, pooling_head: bool = False):
        super().__init__()
        self.config = cfg
        self.vit = ViT(cfg.vision, pooling_head)
        self.projector = Projector(cfg)
        self.decoder = Decoder(cfg)
        # (most patches, blocks of the decoder, of the ViT), ascending: the first row with room for
        # a pack's patches says how many blocks run again. Without rows `recompute` stays as it is.
        self.recompute: list[tuple[int, int, int]] = []
        self.planned_tokens = 0  # of the packs that the rows are for
        self.stays_gathered = False  # under FSDP: its weights, over the packs of a step
        self.lm_head = None
        if not cfg.tie_word_embeddings:
            self.lm_head = Head(cfg.hidden_size, cfg.vocab_size, bias=False)

    def units(self) -> list[nn.Module]:
        """Parts whose weights are large, and used in one place: FSDP gathers each by itself.

        A tied embedding is used at both ends, and stays gathered between them.
        """
        if self.lm_head is None:
            return [self.projector]
        return [self.projector, self.decoder.embed_tokens, self.lm_head]

    def init_weights(self) -> "KeyeVL":
        """Fresh weights, from torch's generator.

        # ours: Keye starts every part but the projector from released weights.
        """
        init_weights(self.vit, self.config.vision.num_hidden_layers)
        table = self.vit.position_embedding.weight
        assign(table, sincos_2d(self.vit.side, table.shape[1]))
        init_weights(self.projector, 1)
        init_weights(self.decoder, self.config.num_hidden_layers)
        if self.lm_head is not None:
            init_weights(self.lm_head, 1)
        return self

    def embed(self, batch: dict, decoding: bool = False) -> Tensor:
        """Token embeddings (T, C) with the placeholders of pictures and clips replaced by their
        features."""
        tokens = batch["tokens"]
        grids = batch["grids"]
        x = self.decoder.embed_tokens(tokens)  # (T, C)
        # A training pack without pictures still runs the ViT, on zero rows: every rank must join
        # FSDP's gathers.
        if decoding and not len(grids):
            return x
        visual = self.projector(self.vit(batch["patches"], grids), grids)  # (N / 4, C)
        cfg = self.config
        holes = (tokens == cfg.image_token_id) | (tokens == cfg.video_token_id)  # (T,)
        # On CUDA this would wait for the device; there pack() has checked it.
        if not tokens.is_cuda and holes.sum() != len(visual):
            raise ValueError(
                f"{int(holes.sum())} picture and video placeholders, "
                f"but {len(visual)} visual tokens"
            )
        return x.masked_scatter(holes[:, None], visual.type_as(x))

    def choose_recompute(self, tokens: int, patches: int):
        """The last row, the most careful one, is for packs that are longer than planned too."""
        fitting = [row for row in self.recompute if patches <= row[0]]
        row = self.recompute[-1]
        if fitting and tokens <= self.planned_tokens:
            row = fitting[0]
        _, self.decoder.recompute, self.vit.recompute = row

    def hidden(self, batch: dict) -> Tensor:
        """Last hidden states (T, C) of a packed batch."""
        if self.recompute:
            self.choose_recompute(len(batch["tokens"]), len(batch["patches"]))
        x = self.embed(batch)
        segments = Segments.of(batch["segments"].diff().tolist(), x.device)
        return self.decoder(x, batch["positions"], segments)

    @property
    def head_weight(self) -> Tensor:
        """(vocab, C); under FSDP in shards, but within `head`."""
        tied = self.lm_head is None
        return self.decoder.embed_tokens.weight if tied else self.lm_head.weight

    def head(self, hidden: Tensor, work=F.linear, *more):
        """work(hidden, weight (vocab, C) of the head, ...): by default the logits (T, vocab)."""
        if self.lm_head is None:
            return work(hidden, self.head_weight, *more)
        return self.lm_head(hidden, work, *more)

    def logits(self, batch: dict) -> Tensor:
        return self.head(self.hidden(batch))

    def loss(self, batch: dict) -> tuple[Tensor, int]:
        """Cross entropy summed over the labels that are not -100, fp32, and how many there are."""
        hidden, labels = self.supervised(batch)
        return self.head(hidden, cross_entropy_sum, labels), len(labels)

    def logprobs(self, batch: dict, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """log p(label) of every label that is not -100, with its gradient, and the entropy of that
        distribution, without: both (n,) fp32, in the pack's order.

        temperature: the one that sampled the labels.
        """
        hidden, labels = self.supervised(batch)
        return self.head(hidden, token_logprobs, labels, temperature)

    def supervised(self, batch: dict) -> tuple[Tensor, Tensor]:
        """Hidden states (n, C) and labels (n,) where there is a label: others never meet the
        vocabulary."""
        hidden = self.hidden(batch)
        labelled = batch.get("labelled")  # (n,) places of labels, where the host has looked
        if labelled is None:
            labelled = (batch["labels"] != -100).nonzero()[:, 0]  # on CUDA this waits
        return hidden[labelled], batch["labels"][labelled]

    forward = loss  # FSDP's hooks sit on forward

    # -- generation --------------------------------------------------------------------------------

    def new_cache(self, rows: int, max_len: int) -> "KVCache":
        """An empty cache of `rows` conversations of up to max_len tokens, in the dtype of keys."""
        weight = self.decoder.norm.weight
        dtype = weight.dtype
        if torch.is_autocast_enabled(weight.device.type):
            dtype = torch.get_autocast_dtype(weight.device.type)
        cache = KVCache(self.config, rows, max_len, weight.device, dtype)
        if dtype == weight.dtype:
            cache.whole_step = self.decoder.whole_step()
        return cache

    def step(self, batch: dict, cache: "KVCache", rows: list[int]) -> Tensor:
        """Hidden states (T, C) of new tokens, with all that the cache holds before them.

        The batch's segments are new tokens of conversations `rows` of the cache: a whole prompt, a
        later turn or picture, or one token each. ValueError when a row would outgrow the cache.
        """
        lengths = batch["segments"].diff().tolist()
        cache.begin(rows, lengths)
        x = self.embed(batch, decoding=True)
        hidden = self.decoder(x, batch["positions"], Segments.of(lengths, x.device), cache)
        cache.end()
        return hidden

    def step_one(self, tokens: Tensor, positions: Tensor, before: Tensor, cache, reach: int):
        """Hidden states (B, C) of one text token (B,) for each of the cache's first B rows.

        positions (B,); before (B,): tokens that these rows hold, fewer than `reach`. All stay on
        the device, so that a CUDA graph can hold this; the cache's `lengths` are the caller's care.
        """
        x = self.decoder.embed_tokens(tokens)
        if cache.whole_step:
            return cache.whole_step(x, positions, before, cache.k, cache.v)
        cache.begin_one(before, reach)
        return self.decoder(x, positions.expand(3, -1), None, cache)

    # -- files -------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        dtype: torch.dtype = torch.float32,
        device="cpu",
    ) -> "KeyeVL":
        """A model from a folder in the official layout.

        KeyError or ValueError name the tensor that is missing, extra or misshapen, or the file and
        the key that describe another model.
        """
        model = cls.shapes(folder).to(dtype).to_empty(device=device)
        return model.load(folder)

    @classmethod
    def shapes(cls, source: Config | str | Path, pooling_head: bool = False) -> "KeyeVL":
        """A model of a Config, or as a folder describes it, without memory (on "meta").

        `to_empty` or common.parallel.shard gives it some, `load` or `init_weights` fills it.
        """
        cfg = source if isinstance(source, Config) else config_of(source)
        with torch.device("meta"):
            return cls(cfg, pooling_head)

    def load(self, folder: str | Path) -> "KeyeVL":
        """Fills all of the model; where it is sharded, each rank reads its own rows."""
        filled = load_weights(self, folder, KEYE_NAMES, UNUSED)
        # What `to_empty` gave holds what was in the memory: nothing of that may stay.
        held = dict([*self.named_parameters(), *self.named_buffers()])
        empty = sorted(held.keys() - filled)
        if empty:
            raise KeyError(f"{folder}: nothing for {len(empty)} parts of the model: {empty[0]}")
        return self

    @classmethod
    def empty(cls, cfg: Config, dtype=torch.float32, device="cpu") -> "KeyeVL":
        """Allocated, not initialised."""
        return cls.shapes(cfg).to(dtype).to_empty(device=device)

    def save_pretrained(self, folder: str | Path) -> None:
        save_weights(self.state_dict(), self.config.to_json(), folder)


def compile_blocks(*stacks: nn.Module):
    """torch.compile for each block by itself: all blocks of a kind share one compilation."""
    for stack in stacks:
        for block in stack.layers:
            block.compile(dynamic=True)


def rest_of(model: KeyeVL) -> list[nn.Module]:
    """The parts of a model beside its ViT."""
    return [part for name, part in model.named_children() if name != "vit"]


def config_of(folder: str | Path) -> Config:
    """Of a model folder. ValueError where it describes another model than this one."""
    where = Path(folder) / "config.json"
    facts = read_config(folder)
    if facts.get("vision_config") is None:
        raise ValueError(f"{where}: no vision_config; --init-llm takes a decoder alone")
    cfg = Config.from_json(facts, where)
    if cfg.num_attention_heads % cfg.num_key_value_heads:
        raise ValueError(f"{where}: num_key_value_heads must divide num_attention_heads")
    if cfg.vision.hidden_size % (4 * cfg.vision.num_attention_heads):
        raise ValueError(f"{where}: vision_config: heads must be of 4, 8, 12, ... channels")
    if max(cfg.image_token_id, cfg.video_token_id) >= cfg.vocab_size:
        raise ValueError(f"{where}: image_token_id or video_token_id is beyond vocab_size")
    return cfg


def init_weights(part: nn.Module, depth: int) -> None:
    """Normal with standard deviation fan_in^-0.5; biases 0, norms 1.

    # ours: activations keep their size at any width. Layers that add to a residual stream of
    `depth` blocks get less. Embeddings get 2 width^-0.5: with Qwen3's 0.02 a small decoder's first
    block drowns out the tokens it read, and learning starts several times later.
    """
    for name, module in part.named_modules():
        adds = name.endswith(("o_proj", "down_proj", "out_proj", "fc2"))
        for key, p in module.named_parameters(recurse=False):
            # Every rank draws all of a tensor, and keeps its rows: equal for any number of ranks.
            drawn = torch.empty(p.shape, device=p.device)
            if p.dim() == 1:
                nn.init.constant_(drawn, key == "weight")  # of one dimension are norms and biases
            elif isinstance(module, nn.Embedding) or key == "probe":
                nn.init.normal_(drawn, std=2 * p.shape[-1] ** -0.5)
            else:
                less = (2 * depth) ** 0.5 if adds else 1
                nn.init.normal_(drawn, std=p.shape[1] ** -0.5 / less)
            assign(p, drawn)


def sincos_2d(side: int, width: int) -> Tensor:
    """Start of the position table, (side^2, width).

    # ours: smooth in row and column, so that grids of different sizes, which all interpolate this
    one table, begin with similar codes. SigLIP's own table is loaded where it exists.
    """
    place = torch.arange(side) / side  # (side,)
    waves = 2.0 ** torch.linspace(0, 2.5, -(-width // 4))  # (width / 4,) from half a wave to 3
    angles = place[:, None] * (torch.pi * waves)  # (side, width / 4)
    codes = torch.cat([angles.sin(), angles.cos()], 1)  # (side, width / 2)
    rows = codes[:, None].expand(-1, side, -1)  # (side, side, width / 2)
    columns = codes[None].expand(side, -1, -1)
    return torch.cat([rows, columns], -1).flatten(0, 1)[:, :width]


MAX_LOGITS = 80_000_000  # fp32 numbers: 320 MB, of 151,936 words 512 rows


def cross_entropy_sum(
    hidden: Tensor, weight: Tensor, labels: Tensor, max_logits: int = MAX_LOGITS
) -> Tensor:
    """Sum of -log p(label), fp32. hidden (T, C), weight (vocab, C), labels (T,)."""
    if len(labels) * len(weight) <= max_logits:
        return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")
    logprobs, _ = chunked_logprobs(hidden, weight, labels, 1.0, max_logits, with_entropy=False)
    return -logprobs.sum()


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    max_logits: int = MAX_LOGITS,
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden weight' / temperature) at the labels, and the entropy of that
    distribution (detached): (T,) fp32 each. Shapes as cross_entropy_sum."""
    if len(labels) * len(weight) > max_logits:
        return chunked_logprobs(hidden, weight, labels, temperature, max_logits, with_entropy=True)
    logp = (F.linear(hidden, weight).float() / temperature).log_softmax(-1)  # (T, vocab)
    detached = logp.detach()
    entropy = -(detached.exp() * detached).sum(-1)  # (T,)
    return logp.gather(1, labels[:, None])[:, 0], entropy


def chunked_logprobs(hidden, weight, labels, temperature, max_logits, with_entropy):
    """As token_logprobs, a chunk of rows at a time; without entropies, these are zeros."""
    rows = max(1, max_logits // len(weight))
    if rows >= 128:
        rows = rows // 128 * 128  # whole tiles of a matrix product
    learns = torch.is_grad_enabled()  # in a Function's forward it never is
    return ChunkedLogprobs.apply(hidden, weight, labels, temperature, rows, with_entropy, learns)


class ChunkedLogprobs(torch.autograd.Function):
    """token_logprobs over a large vocabulary, a chunk of rows in fp32 at a time.

    What the backward pass needs of a row, softmax - one-hot, is written down in the computation's
    dtype as soon as the row's logits are there. So no logits are computed twice, and (T, vocab) in
    bf16 is all that is kept: as much as the gradient of the weights in fp32. Where the weights are
    frozen, it goes through them at once, and (T, C) is all.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, temperature, rows, with_entropy, learns):
        ctx.temperature = temperature
        ctx.dtypes = hidden.dtype, weight.dtype
        dtype = hidden.dtype
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        logprobs = hidden.new_empty(len(labels), dtype=torch.float32)
        entropy = torch.zeros_like(logprobs)
        needed = learns and any(ctx.needs_input_grad[:2])  # which says nothing of no_grad
        ctx.frozen = not ctx.needs_input_grad[1]
        width = weight.shape[1] if ctx.frozen else len(weight)
        push = hidden.new_empty(len(labels) if needed else 0, width)  # (T, C) or (T, vocab)

        for begin in range(0, len(labels), rows):
            part = slice(begin, begin + rows)
            y = labels[part, None]  # (t, 1)
            logits = F.linear(hidden[part], weight)  # (t, vocab)
            if temperature != 1:
                logits = logits.float() / temperature
            logp = logits.log_softmax(-1, dtype=torch.float32)
            logprobs[part] = logp.gather(1, y)[:, 0]
            if with_entropy:
                entropy[part] = -(logp.exp() * logp).sum(-1)
            if needed:
                softmax = logp.exp_()
                softmax.scatter_add_(1, y, softmax.new_full(y.shape, -1))
                push[part] = softmax.to(dtype) @ weight if ctx.frozen else softmax
                del softmax
            del logits, logp  # or they would be there beside the next chunk's

        ctx.save_for_backward(*[push] if ctx.frozen else [push, hidden, weight])
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad, _):
        push, *others = ctx.saved_tensors
        scale = (-grad / ctx.temperature)[:, None]  # (T, 1): d logp / d logits is -push
        if ctx.frozen:
            return (push * scale).to(ctx.dtypes[0]), *[None] * 6
        hidden, weight = others
        grad_hidden = None
        if ctx.needs_input_grad[0]:
            grad_hidden = (push @ weight * scale).to(ctx.dtypes[0])  # (T, C)
        grad_weight = (push.T @ (hidden * scale).to(push.dtype)).to(ctx.dtypes[1])
        return grad_hidden, grad_weight, None, None, None, None, None


# --------------------------------------------------------------------------------------------------
# the KV cache


@dataclass
class Placement:
    """Where T new tokens of B rows go and what they see. Those of one row lie together."""

    places: Tensor  # (T,) of the tokens among all rows' places end to end
    before: Tensor  # (B,) int32: position of each row's first query
    reach: int  # places of a row that any query sees lie before this one
    rows: Tensor | None = None  # (B,) int32: the rows; None: the first B
    queries: Tensor | None = None  # (T,) of the tokens among B lines of equal length; None: B = T
    fresh: bool = False  # nothing was there before: the new tokens see each other alone


class KVCache:
    """Keys and values of several conversations, one row each: per layer (rows, max_len, KV, D)."""

    def __init__(self, cfg: Config, rows: int, max_len: int, device, dtype: torch.dtype):
        shape = (rows, max_len, cfg.num_key_value_heads, cfg.head_dim)
        self.k = torch.zeros(cfg.num_hidden_layers, *shape, device=device, dtype=dtype)
        self.v = torch.zeros_like(self.k)
        self.lengths = [0] * rows  # tokens that each row holds
        self.whole_step = None  # see Decoder.whole_step
        self.max_len = max_len

    def begin(self, rows: list[int], new: list[int]) -> None:
        """`new` tokens are about to be added to each of `rows`: work out where they go."""
        before = [self.lengths[row] for row in rows]
        reach = max(held + n for held, n in zip(before, new))
        if reach > self.max_len:
            raise ValueError(
                f"KV cache of {self.max_len} tokens a row is full: rows {rows} hold {before} "
                f"and {new} more were to be added"
            )
        self.adding = list(zip(rows, new))
        row, held, n = torch.tensor([rows, before, new])
        segment = torch.arange(len(rows)).repeat_interleave(n)  # (T,)
        offset = torch.arange(len(segment)) - (n.cumsum(0) - n)[segment]  # within the segment
        places = (row * self.max_len + held)[segment] + offset
        # A shorter segment stands at its line's end. What fills the line up before it then sees
        # fewer keys than it, and never any that were not written.
        line = max(new)
        queries = (torch.arange(len(rows)) * line + line - n)[segment] + offset
        sizes = [len(places), len(rows), len(rows), len(queries)]
        numbers = torch.cat([places, held + n - line, row, queries])  # one copy for all
        places, before, row, queries = to_device(numbers, self.k.device).split(sizes)
        self.at = Placement(places, before.int(), reach, row.int(), queries, fresh=not any(held))

    def begin_one(self, before: Tensor, reach: int) -> None:
        """One token is about to be added to each of the first B rows, which hold `before` (B,)."""
        first = torch.arange(len(before), device=before.device) * self.max_len
        self.at = Placement(first + before, before.int(), reach)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, segments, causal: bool) -> Tensor:
        """As `attention`, over the new tokens' rows: q (T, H, D), k and v (T, KV, D) of new tokens
        -> (T, H, D)."""
        at = self.at
        for held, new in ((self.k[layer], k), (self.v[layer], v)):
            held.flatten(0, 1)[at.places] = new.to(held.dtype)
        # Prompts from the start have all their keys in the pack itself.
        if at.fresh:
            return attention(q, k, v, segments, causal)
        keys = self.k[layer, :, : at.reach]  # (rows, L, KV, D)
        values = self.v[layer, :, : at.reach]
        q = q.to(keys.dtype)
        if at.queries is None:
            return cached_attention(q[:, None], keys, values, at.before)[:, 0]
        lines = q.new_zeros(len(at.before), max(n for _, n in self.adding), *q.shape[1:])
        lines.flatten(0, 1)[at.queries] = q  # lines (B, Q, H, D)
        out = cached_attention(lines, keys, values, at.before, at.rows)
        return out.flatten(0, 1)[at.queries]

    def end(self) -> None:
        """The tokens of `begin` are in, in every layer."""
        for row, n in self.adding:
            self.lengths[row] += n

    def copy(self, source: int, target: int) -> None:
        """Row `target` becomes what row `source` holds."""
        n = self.lengths[source]
        for held in (self.k, self.v):
            held[:, target, :n] = held[:, source, :n]
        self.lengths[target] = n

    def grow(self, more: int) -> None:
        """Every row gets `more` places."""
        # one after the other: the old keys go before the new values come
        self.k = F.pad(self.k, (0, 0, 0, 0, 0, more))
        self.v = F.pad(self.v, (0, 0, 0, 0, 0, more))
        self.max_len += more


# --------------------------------------------------------------------------------------------------
# work


def training_flops(
    cfg: Config, lengths: list[int], grids: list[list[int]], vit: bool = True, decoder: bool = True
) -> float:
    """Floating-point operations of one forward and backward pass, attention included.

    lengths: tokens of each sample; grids: (t, h, w) of each picture and clip; vit, decoder: whether
    they are trained. A forward pass takes 2 operations per weight and token, and 4 per query, key
    and channel. The backward pass takes as many to the weights and as many to the input: a frozen
    decoder under a trained projector only needs the latter, a frozen ViT neither.
    """
    width = cfg.num_attention_heads * cfg.head_dim
    kv_width = cfg.num_key_value_heads * cfg.head_dim
    layer = cfg.hidden_size * (2 * width + 2 * kv_width + 3 * cfg.intermediate_size)
    weights = cfg.num_hidden_layers * layer + cfg.vocab_size * cfg.hidden_size
    pairs = sum(n * n for n in lengths) / 2  # a causal query sees half of its sample, on average
    text = 2 * weights * sum(lengths) + 4 * pairs * width * cfg.num_hidden_layers

    v = cfg.vision
    layer = 4 * v.hidden_size**2 + 2 * v.hidden_size * v.intermediate_size
    image = 0
    for t, h, w in grids:
        patches = t * h * w
        seen = patches if v.attend_across_frames else h * w
        per_patch = 2 * layer + 4 * seen * v.hidden_size
        image += patches * per_patch * v.num_hidden_layers

    merged = 4 * v.hidden_size
    weights = merged * merged + merged * cfg.hidden_size
    projector = 2 * weights * visual_tokens(grids)
    return text * (3 if decoder else 2) + image * (3 if vit else 1) + projector * 3


def visual_tokens(grids: list[list[int]]) -> int:
    """Tokens that pictures and clips become: one for 2x2 patches."""
    return sum(t * h * w for t, h, w in grids) // 4


def sample_flops(
    cfg: Config, text_tokens: int, grids: list[list[int]], vit: bool = True, decoder: bool = True
) -> float:
    """training_flops of one sample."""
    return training_flops(cfg, [text_tokens + visual_tokens(grids)], grids, vit, decoder)


def step_work(cfg: Config, batches: list[dict], vit: bool = True, decoder: bool = True) -> dict:
    """Tokens, visual tokens and training_flops of one step's packed batches, as a run logs them."""
    work = dict(tokens=0, visual_tokens=0, flops=0.0)
    for batch in batches:
        lengths = batch["segments"].diff().tolist()
        grids = batch["grids"].tolist()
        work["tokens"] += sum(lengths)
        work["visual_tokens"] += visual_tokens(grids)
        work["flops"] += training_flops(cfg, lengths, grids, vit, decoder)
    return work
