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
from kernels.layer import enter_heads
from kernels.products import project, project_swiglu

__all__ = [
    "Segments", "attention", "attention_path", "attention_reference", "cached_attention",
    "decoder_step", "enter_heads", "few_kernels", "forced", "project", "project_swiglu",
    "to_device",
]
