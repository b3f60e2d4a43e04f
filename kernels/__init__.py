"""The one attention that every model here calls, and the choice among its implementations."""

from kernels.attention import (
    Segments,
    attention,
    attention_path,
    attention_reference,
    cached_attention,
    decoder_step,
    to_device,
)

__all__ = [
    "Segments", "attention", "attention_path", "attention_reference", "cached_attention",
    "decoder_step", "to_device",
]
