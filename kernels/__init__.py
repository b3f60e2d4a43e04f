"""The one attention that every model here calls, and the choice among its implementations."""

from kernels.attention import (
    Segments,
    attention,
    attention_path,
    attention_reference,
    cached_attention,
    decoder_step,
    few_kernels,
    forced,
    to_device,
)
from kernels.layer import enter_heads, swiglu

__all__ = [
    "Segments", "attention", "attention_path", "attention_reference", "cached_attention",
    "decoder_step", "enter_heads", "few_kernels", "forced", "swiglu", "to_device",
]
