"""Our attention against PyTorch's ways of computing it, on the same inputs in one run.

    python -m kernels.benchmark                 a table of times, rates and ratios
    python -m kernels.benchmark --check         errors against float64 first
    python -m kernels.benchmark --threads 2 --dtype bf16 --only toy

By: "torch" is what attention.py takes without our kernel; on a GPU segments of one length are also
a dense batch for "flash" and "cudnn", and "sm_80" is ours without what only Hopper GPUs can do.
Times are the best of some runs. On a GPU they are the GPU's own, the median: it sleeps until the
host has asked for everything, which takes up to 0.3 ms a pass and in a model goes on beside it.

FLOPs are those of the products: 4 D for each query, key and head that it sees, 2.5 times as many
in the backward pass, which computes the scores again. "of mm" is the share of the rate that one
large matrix product reaches on this machine.

On a GPU a second table has decoding: GB/s of the keys and values that rows hold, and their share of
what a copy reaches here. PyTorch's ways read rows padded to the longest, "flash" without a mask.
"""

import argparse
import contextlib
import os
import random
import statistics
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import Segments, attention, attention_reference, cached_attention, decode, ours

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DENSE = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
SLEEP = 2_000_000  # ours, cycles, about a millisecond: longer than the host needs for a pass
LONGEST_CHECKED = 2048  # the float64 reference holds all scores of a segment


@dataclass
class Case:
    name: str
    lengths: list[int]
    heads: int
    kv_heads: int
    width: int
    causal: bool

    @property
    def flops(self) -> float:
        pairs = sum(n * n for n in self.lengths) * (0.5 if self.causal else 1)
        return 4 * pairs * self.heads * self.width

    def draw(self, dtype, device):
        """q, k, v that want gradients, a gradient of the output, segments."""
        generator = torch.Generator().manual_seed(0)
        shape = (sum(self.lengths), self.width)
        drawn = []
        for heads in (self.heads, self.kv_heads, self.kv_heads, self.heads):
            x = torch.randn(shape[0], heads, shape[1], generator=generator)
            drawn.append(x.to(device, dtype))
        *inputs, d_out = drawn
        return [x.requires_grad_() for x in inputs], d_out, Segments.of(self.lengths, device)


def cases(scale: int) -> list[Case]:
    """scale: how many times longer than for two CPU cores the packs are."""
    rng = random.Random(0)
    samples = [rng.randint(33, 158) for _ in range(43)]
    grids = [rng.choice([4, 16, 24, 36, 64, 96]) for _ in range(46)]
    mixed = [rng.randint(100, 500) for _ in range(8 * scale)]
    return [
        Case("toy decoder", samples * scale, 3, 1, 64, True),
        Case("toy ViT", grids * scale, 4, 4, 16, False),
        Case("D64 full, 256 each", [256] * 8 * scale, 8, 8, 64, False),
        Case("D72 full, 576 each", [576] * 4 * scale, 8, 8, 72, False),
        Case("D72 full, 100 to 500", mixed, 8, 8, 72, False),
        Case("D128 causal GQA, 300 to 1,200", [700, 333, 1200] * scale, 8, 2, 128, True),
        Case("D128 causal GQA, 2,048", [2048] * scale, 8, 2, 128, True),
    ]


def gpu_cases(scale: int) -> list[Case]:
    """A ViT's frames, and a decoder's documents."""
    rng = random.Random(0)
    frames = [rng.randint(100, 500) for _ in range(60 * scale)]
    documents = [rng.randint(300, 1500) for _ in range(12 * scale)]
    return [
        Case("D72 full, 256 each", [256] * 64 * scale, 16, 16, 72, False),
        Case("D72 full, 100 to 500", frames, 16, 16, 72, False),
        Case("D72 full, 4,096 each", [4096] * 4 * scale, 16, 16, 72, False),
        Case("D128 causal GQA, 300 to 1,500", documents, 32, 8, 128, True),
        Case("D128 causal GQA, 2,048 each", [2048] * 8 * scale, 32, 8, 128, True),
        Case("D128 causal GQA, 8,192 each", [8192] * 2 * scale, 32, 8, 128, True),
    ]


@dataclass
class Cache:
    """Rows of a KV cache, each as long as drawn, which `new` tokens of each now read."""

    name: str
    rows: int
    shortest: int
    longest: int
    heads: int
    kv_heads: int
    width: int
    new: int = 1

    def draw(self, dtype, device):
        """q (B, Q, H, D), k and v (B, L, KV, D), and the rows' lengths before the new tokens."""
        rng = random.Random(0)
        lengths = [rng.randint(self.shortest, self.longest) - self.new for _ in range(self.rows)]
        lengths[-1] = self.longest - self.new
        generator = torch.Generator(device).manual_seed(0)
        shapes = [(self.new, self.heads), *[(self.longest, self.kv_heads)] * 2]
        drawn = []
        for shape in shapes:
            x = torch.randn(self.rows, *shape, self.width, generator=generator, device=device)
            drawn.append(x.to(dtype))
        return drawn, torch.tensor(lengths, dtype=torch.int32, device=device)

    def bytes(self, lengths) -> int:
        """Of the keys and values that the rows hold, two bytes a number."""
        keys = int(lengths.sum()) + self.rows * self.new
        return 2 * 2 * keys * self.kv_heads * self.width


def caches() -> list[Cache]:
    return [
        Cache("64 rows, 512 to 8,192", 64, 512, 8192, 32, 8, 128),
        Cache("64 rows, 8,192 each", 64, 8192, 8192, 32, 8, 128),
        Cache("64 rows, 300 to 1,500", 64, 300, 1500, 32, 8, 128),
        Cache("1 row, 32,768", 1, 32768, 32768, 32, 8, 128),
        Cache("D64, 512 rows, 100 to 600", 512, 100, 600, 12, 4, 64),
        Cache("16 new, 16 rows, 512 to 8,192", 16, 512, 8192, 32, 8, 128, 16),
    ]


def time_of(work, device, seconds: float) -> float:
    """Of at least five runs after one: the best, on a GPU the median."""
    work()
    times = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        if device.type == "cuda":
            times.append(gpu_time(work))
            continue
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) if device.type == "cuda" else min(times)


def gpu_time(work) -> float:
    """Seconds between two events around one run, all of which was asked for before the first."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def backends_of(case: Case, dtype, device) -> list[str]:
    backends = ["torch"]
    if ours.takes(device.type, dtype, case.width) and ours.available(device.type):
        backends.append("ours")
        if device.type == "cuda" and ours.hopper(device.index or 0, False):
            backends.append("sm_80")
    if device.type == "cuda" and len(set(case.lengths)) == 1:
        backends += DENSE
    return backends


@contextlib.contextmanager
def chosen(backend: str):
    """The context in which `attention` uses this backend."""
    names = {"sm_80": "ours", "flash": "torch", "cudnn": "torch"}
    os.environ["NANOKEYE_ATTENTION"] = names.get(backend, backend)
    ours.HOPPER = backend != "sm_80"
    try:
        with sdpa_kernel(DENSE[backend]) if backend in DENSE else contextlib.nullcontext():
            yield
    finally:
        ours.HOPPER = True


def product_rate(dtype, device) -> float:
    """FLOP/s of a large matrix product."""
    n = 2048 if device.type == "cpu" else 8192
    a = torch.randn(n, n).to(device, dtype)
    return 2 * n**3 / time_of(lambda: a @ a, device, 1.0)


def times_of(case: Case, backend: str, dtype, device, seconds: float) -> tuple[float, float]:
    """Seconds of the forward and of the backward pass."""
    inputs, d_out, segments = case.draw(dtype, device)
    with chosen(backend):
        with torch.no_grad():
            forward = time_of(lambda: attention(*inputs, segments, case.causal), device, seconds)
        out = attention(*inputs, segments, case.causal)

        def backward():
            torch.autograd.grad(out, inputs, d_out, retain_graph=True)

        return forward, time_of(backward, device, seconds)


def errors_of(case: Case, backend: str, dtype, device) -> list[float]:
    """Relative errors of the output and of q's, k's and v's gradients against float64."""
    inputs, d_out, segments = case.draw(dtype, device)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    found, wanted = [], []
    for xs, ys, run in ((inputs, found, attention), (exact, wanted, attention_reference)):
        with chosen(backend):
            out = run(*xs, segments, case.causal)
            ys += [out, *torch.autograd.grad(out, xs, d_out.to(out.dtype))]
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, wanted)]


def graphed(work, times: int):
    """`times` runs of it as one CUDA graph: what a launch from Python takes does not count."""
    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            work()
    return graph.replay


def decoding_ways(cache: Cache, dtype, device) -> tuple[dict, torch.Tensor]:
    """A function for each way, which gives (B, Q, H, D); and the rows' lengths."""
    (q, k, v), lengths = cache.draw(dtype, device)
    ways = {"torch": lambda: forced("torch", lambda: cached_attention(q, k, v, lengths))}
    if decode.takes(q, k) and decode.available():
        ways["ours"] = lambda: forced("ours", lambda: cached_attention(q, k, v, lengths))
    if cache.new == 1:
        dense = [x.transpose(1, 2) for x in (q, k, v)]  # (B, H, L, D)

        def flash():
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return F.scaled_dot_product_attention(*dense, enable_gqa=True).transpose(1, 2)

        ways["flash"] = flash
    return ways, lengths


def forced(backend: str, work):
    with chosen(backend):
        return work()


@torch.no_grad()
def decoding_table(wanted: list[Cache], dtype, device, seconds: float):
    a, b = torch.empty(2, 2**30, dtype=torch.uint8, device=device)
    copied = 2 * len(a) / time_of(lambda: b.copy_(a), device, seconds)
    del a, b
    print(f"\ndecoding; a copy: {copied / 1e9:,.0f} GB/s read and written")
    print(f"{'':32} {'by':6} {'us':>10} {'GB/s':>7} {'of copy':>7} {'ratio':>5} {'error':>8}")
    for cache in wanted:
        ways, lengths = decoding_ways(cache, dtype, device)
        base = exact = None
        for name, work in ways.items():
            found = work().double()
            exact = found if exact is None else exact
            error = "-" if name != "ours" else f"{(found - exact).norm() / exact.norm():.1e}"
            taken = time_of(graphed(work, 10), device, seconds) / 10
            base = base or taken
            rate = cache.bytes(lengths) / taken
            print(
                f"{cache.name:32} {name:6} {taken * 1e6:10,.1f} {rate / 1e9:7,.0f} "
                f"{rate / copied:7.0%} {base / taken:5.2f} {error:>8}", flush=True,
            )


def main(args):
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    name = args.dtype or ("bf16" if on_gpu else "fp32")
    dtype = DTYPES[name]
    if args.threads:
        torch.set_num_threads(args.threads)
    all_cases = gpu_cases(args.scale) if on_gpu else cases(args.scale)
    wanted = [case for case in all_cases if args.only in case.name]
    if args.check:
        print(f"{'relative error, ' + name:32} {'by':6}      out       dq       dk       dv")
        for case in wanted:
            if max(case.lengths) > LONGEST_CHECKED:
                print(f"{case.name:32} too long to be checked")
                continue
            for backend in backends_of(case, dtype, device):
                errors = "  ".join(f"{e:.1e}" for e in errors_of(case, backend, dtype, device))
                print(f"{case.name:32} {backend:6}  {errors}", flush=True)
    peak = product_rate(dtype, device)
    where = torch.cuda.get_device_name(device) if on_gpu else f"{torch.get_num_threads()} threads"
    print(
        f"{device}, {where}, {name}, torch {torch.__version__}; "
        f"a matrix product: {peak / 1e9:,.0f} GFLOP/s"
    )
    print(f"{'':32} {'by':6} {'forward ms':>10} {'GF/s':>7} {'of mm':>5} {'ratio':>5}"
          f" {'backward ms':>12} {'GF/s':>7} {'of mm':>5} {'ratio':>5}")
    for case in wanted:
        base = None
        for backend in backends_of(case, dtype, device):
            times = times_of(case, backend, dtype, device, args.seconds)
            base = base or times
            row = f"{case.name:32} {backend:6}"
            for seconds, first, flops in zip(times, base, (case.flops, 2.5 * case.flops)):
                rate = flops / seconds
                row += f" {seconds * 1e3:11.2f} {rate / 1e9:7,.0f} {rate / peak:5.0%}"
                row += f" {first / seconds:5.2f}"
            print(row, flush=True)
    if on_gpu and dtype in decode.DTYPES["cuda"]:
        wanted = [cache for cache in caches() if args.only in f"decode {cache.name}"]
        decoding_table(wanted, dtype, device, args.seconds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=DTYPES, help="default: fp32, on a GPU bf16")
    add("--threads", type=int, help="CPU threads")
    add("--scale", type=int, default=1, help="times as many segments")
    add("--only", default="", help="part of a case's name, or decode: that table alone")
    add("--seconds", type=float, default=0.5, help="to measure each pass")
    add("--check", action="store_true", help="errors against float64 first")
    main(parser.parse_args())
