"""How fast a decoder trains here, beside Hugging Face's Qwen3 of the same shape, on one GPU.

    python -m tools.training_speed                     8 of 8b's 36 layers, 1 x 8,192 tokens
    python -m tools.training_speed --size 1.7b --layers 28

A line for each way to hold the weights, plain and compiled: milliseconds of a whole step (forward,
backward, clipping, AdamW), tokens/s, model TFLOP/s (causal attention counted once), peak memory.
Compare lines of one run only. Needs transformers.
"""

import argparse
import gc
from dataclasses import replace

import torch

from common.optim import clip_gradients, make_optimizer
from model import PRESETS, Config, KeyeVL, compile_blocks, training_flops

FP32, BF16 = torch.float32, torch.bfloat16


def median_ms(step, steps: int = 8, warmup: int = 4) -> float:
    for _ in range(warmup):
        step()
    times = []
    for _ in range(steps):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[steps // 2]


def ours(cfg: Config, ids: torch.Tensor, weights, moments, compiled: bool):
    """A step of our decoder. ids (T,): one document."""
    model = KeyeVL.empty(cfg, weights, "cuda").init_weights()
    if compiled:
        compile_blocks(model.vit, model.decoder)
    opt = make_optimizer(model, {"decoder": 1e-5}, moments=moments, compiled=compiled)
    tokens = len(ids)
    batch = {
        "tokens": ids,
        "labels": ids.roll(-1),
        "labelled": torch.arange(tokens, device="cuda"),
        "positions": torch.arange(tokens, device="cuda").expand(3, tokens),
        "segments": torch.tensor([0, tokens], dtype=torch.int32),
        "grids": torch.zeros(0, 3, dtype=torch.long),
        "patches": torch.zeros(0, 588, dtype=torch.uint8, device="cuda"),
    }

    def step():
        with torch.autocast("cuda", BF16, enabled=weights == FP32):
            loss, n = model.loss(batch)
        (loss / n).backward()
        clip_gradients(model)
        opt.step()
        opt.zero_grad(set_to_none=True)

    return step


def theirs(cfg: Config, ids: torch.Tensor, weights, compiled: bool):
    """A step of Qwen3ForCausalLM, with PyTorch's attention and fused AdamW."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "head_dim", "tie_word_embeddings",
    )
    with torch.device("cuda"):
        model = Qwen3ForCausalLM(Qwen3Config(**{name: getattr(cfg, name) for name in names}))
    model.to(weights).train()
    model.config.use_cache = False
    opt = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    forward = torch.compile(model) if compiled else model

    def step():
        with torch.autocast("cuda", BF16, enabled=weights == FP32):
            loss = forward(input_ids=ids[None], labels=ids[None]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)

    return step


WAYS = [
    ("ours, bf16 weights", ours, BF16, BF16),
    ("ours, fp32 weights, bf16 moments", ours, FP32, BF16),
    ("ours, fp32 weights", ours, FP32, FP32),
    ("Hugging Face, bf16 weights", theirs, BF16),
    ("Hugging Face, fp32 weights", theirs, FP32),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="8b", choices=PRESETS)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=8192)
    args = parser.parse_args()
    cfg = replace(PRESETS[args.size], num_hidden_layers=args.layers)
    ids = torch.randint(0, cfg.vocab_size, (args.tokens,), device="cuda")
    flops = training_flops(cfg, [args.tokens], [])
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {args}")
    for name, build, *how in WAYS:
        for compiled in (False, True):
            torch.cuda.reset_peak_memory_stats()
            ms = median_ms(build(cfg, ids, *how, compiled))
            print(
                f"{name + (', compiled' if compiled else ''):44} {ms:7.1f} ms "
                f"{args.tokens / ms * 1e3:8,.0f} tok/s {flops / ms / 1e9:5.0f} TFLOP/s "
                f"{torch.cuda.max_memory_allocated() / 2**30:5.1f} GiB",
                flush=True,
            )
            torch._dynamo.reset()
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
