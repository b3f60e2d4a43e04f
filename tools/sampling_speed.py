"""How fast a decoder samples here, beside Hugging Face's generate with the same weights.

    python -m tools.sampling_speed                                toy, one CPU thread
    python -m tools.sampling_speed --size 8b --batch 1 32 64      on a GPU, in bf16

A line for each number of rows and each way to choose: tokens/s of decoding, taken from the second
half of the answers, so without reading the prompts and capturing graphs; in brackets those of the
whole call; the ratios; the share of ids that are the same; on a GPU the share of the bandwidth
roofline. Rounds of both alternate, and medians count: compare figures of one run only. Weights are
random and never meet a file. Needs transformers.
"""

import argparse
import time
from types import SimpleNamespace

import torch

from common.tokenizer import ADDED
from generate import Generator
from model import PRESETS, Config, KeyeVL

# How ours and Hugging Face's sampling are told the same; "rollout" is how GRPO samples.
WAYS = {
    "greedy": (dict(temperature=0), dict(do_sample=False)),
    "rollout": (dict(temperature=1.0, top_k=0, top_p=1.0), dict(do_sample=True, top_k=0)),
    "keye": (
        dict(temperature=0.6, top_k=20, top_p=0.95),
        dict(do_sample=True, temperature=0.6, top_k=20, top_p=0.95),
    ),
}
# Bytes a second that a card reads from its memory, by its data sheet.
BANDWIDTH = {"H100 PCIe": 2.0e12, "H100": 3.35e12, "H200": 4.8e12, "A100": 2.04e12}


def ours(model: KeyeVL, prompts: torch.Tensor, way: dict):
    """sample(n) -> n ids for each of prompts (B, P)."""
    # A vocabulary of the model's size without its texts, and no token that would end an answer.
    first = model.config.image_token_id - ADDED.index("<|image_pad|>")
    special = {name: first + i for i, name in enumerate(ADDED)}
    tokenizer = SimpleNamespace(special=special, n_base=first, path="none")
    generator = Generator(model, SimpleNamespace(tokenizer=tokenizer), rows=len(prompts))
    generator.stop = set()
    generator.banned = generator.banned[:0]  # Hugging Face's chooses among all ids too
    places = torch.arange(prompts.shape[1])
    sample = {
        "labels": torch.full_like(places, -100),
        "positions": places.expand(3, -1),
        "next_position": len(places),
        "patches": torch.zeros(0, 588, dtype=torch.uint8),
        "grids": torch.zeros(0, 3, dtype=torch.long),
    }
    samples = [sample | {"tokens": row} for row in prompts]

    def sample(n):
        return [response.ids for response in generator.sample(samples, n, seed=0, **way)]

    return sample


def peer_of(model: KeyeVL):
    """Hugging Face's Qwen3ForCausalLM on the same weights, not on copies of them."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    cfg = model.config
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps",
        "num_attention_heads", "num_key_value_heads", "head_dim", "tie_word_embeddings",
    )
    config = Qwen3Config(**{name: getattr(cfg, name) for name in names})
    config.rope_parameters = {"rope_type": "default", "rope_theta": cfg.rope_theta}
    config.eos_token_id = config.bos_token_id = None
    weight = model.head_weight
    with weight.device:
        peer = Qwen3ForCausalLM._from_config(config, dtype=weight.dtype).eval()
    weights = {f"model.{k}": v for k, v in model.decoder.state_dict().items()}
    peer.load_state_dict(weights | {"lm_head.weight": weight}, assign=True)
    return peer


def theirs(peer, prompts: torch.Tensor, way: dict):
    """The same by its generate, with PyTorch's attention and its default cache."""
    prompts = prompts.to(peer.device)
    how = dict(attention_mask=torch.ones_like(prompts), pad_token_id=0, **way)

    def sample(n):
        out = peer.generate(prompts, max_new_tokens=n, **how)
        return out[:, prompts.shape[1] :].tolist()

    return sample


def seconds(sample, n: int) -> tuple[float, list]:
    """On a CPU its own time, of the one thread: what else runs there does not count."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    begin = clock()
    ids = sample(n)  # lists: all has been waited for
    return clock() - begin, ids


def compare(samplers: list, new: int, rounds: int) -> tuple[list, list, list]:
    """In turns. Median seconds of a token in the second half of `new`, and of one over the whole
    call, for each sampler; and their ids."""
    late, whole = [[] for _ in samplers], [[] for _ in samplers]
    for _ in range(rounds + 1):
        ids = []
        for i, sample in enumerate(samplers):
            half, _ = seconds(sample, new // 2)
            taken, said = seconds(sample, new)
            late[i].append((taken - half) / (new - new // 2))
            whole[i].append(taken / new)
            ids.append(said)
    # the first round warms up
    late, whole = ([sorted(taken[1:])[rounds // 2] for taken in way] for way in (late, whole))
    return late, whole, ids


def bytes_of_step(cfg: Config, model: KeyeVL, rows: int, length: int) -> int:
    """That a step must read: all weights but the table of embeddings, and the keys and values."""
    weight = model.head_weight
    numbers = sum(p.numel() for p in model.decoder.parameters())
    if model.lm_head is not None:
        numbers += weight.numel() - model.decoder.embed_tokens.weight.numel()
    cache = 2 * cfg.num_hidden_layers * cfg.num_key_value_heads * cfg.head_dim * rows * length
    return weight.element_size() * (numbers + cache)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--size", default="toy", choices=PRESETS)
    add("--batch", type=int, nargs="+", default=[1, 8, 64])
    add("--prompt", type=int, default=512)
    add("--new", type=int, default=64, help="tokens that each row gets")
    add("--rounds", type=int, default=3)
    add("--ways", nargs="+", default=["greedy", "rollout"], choices=WAYS)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--alone", action="store_true", help="ours without Hugging Face's")
    args = parser.parse_args()
    if args.new < 2:
        parser.error("--new: at least 2, as the second half is timed")
    return args


def result(way: str, rows: int, late: list, whole: list, ids: list) -> str:
    """A line's beginning: ours, and where it ran too, Hugging Face's."""
    line = f"{way:8} {rows:4} rows: ours {rows / late[0]:8,.0f} ({rows / whole[0]:,.0f}) tok/s"
    if len(late) > 1:
        line += f", Hugging Face {rows / late[1]:8,.0f} ({rows / whole[1]:,.0f})"
        line += f", {late[1] / late[0]:.2f} ({whole[1] / whole[0]:.2f}) times"
    if len(late) > 1 and way == "greedy":
        pairs = [a == b for x, y in zip(*ids) for a, b in zip(x, y)]
        line += f", {sum(pairs) / len(pairs):.1%} of ids the same"
    return line


def main():
    args = arguments()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cuda = args.device == "cuda"
    cfg = PRESETS[args.size]
    dtype = torch.bfloat16 if cuda else torch.float32
    model = KeyeVL.empty(cfg, dtype, args.device).init_weights().eval().requires_grad_(False)
    name = torch.cuda.get_device_name() if cuda else "one CPU thread"
    print(f"{name}, torch {torch.__version__}: {args}")
    peak = next((speed for card, speed in BANDWIDTH.items() if card in name), None)
    peer = None if args.alone else peer_of(model)
    for rows in args.batch:
        prompts = torch.randint(0, 900, (rows, args.prompt))  # of no control tokens
        for way in args.ways:
            how, peers_how = WAYS[way]
            samplers = [ours(model, prompts, how)]
            if peer:
                samplers.append(theirs(peer, prompts, peers_how))
            late, whole, ids = compare(samplers, args.new, args.rounds)
            line = result(way, rows, late, whole, ids)
            if cuda:
                need = bytes_of_step(cfg, model, rows, args.prompt + args.new * 3 // 4)
                line += f", {need / late[0] / 1e12:.2f} TB/s"
                line += f" = {need / late[0] / peak:.0%} of the roofline" if peak else ""
            print(line, flush=True)


if __name__ == "__main__":
    main()
