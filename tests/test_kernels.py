"""The attention operator against float64, and against its own limiting cases; how it is built."""

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from kernels import Segments, attention, attention_reference, build, cached_attention, decode, ours

NO_TILES = torch.empty(0, 3, dtype=torch.int32)  # a CPU's kernel reads none
BACKENDS = ["torch", "reference"] + ["ours"] * ours.available()


@pytest.fixture
def backend(request, monkeypatch):
    monkeypatch.setenv("NANOKEYE_ATTENTION", request.param)


def each_backend(test):
    test = pytest.mark.parametrize("backend", BACKENDS, indirect=True)(test)
    return pytest.mark.usefixtures("backend")(test)


@pytest.fixture
def our_kernel(monkeypatch):
    monkeypatch.setenv("NANOKEYE_ATTENTION", "ours")
    if not ours.available():
        pytest.skip("no compiler")


def draw(lengths, heads, kv, d, dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(len(lengths))
    q, k, v = (
        torch.randn(sum(lengths), h, d, generator=g).to(device, dtype).requires_grad_()
        for h in (heads, kv, kv)
    )
    return q, k, v, Segments.of(lengths, device)


def in_float64(q, k, v, segments, causal):
    """The reference's output and the inputs that it came from."""
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    return attention_reference(*exact, segments, causal), exact


@each_backend
@pytest.mark.parametrize(
    "lengths, heads, kv",
    [([5], 4, 4), ([5, 5, 5], 4, 2), ([1, 7, 3, 7, 64], 6, 2), ([33, 1, 1], 8, 1)],
)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d", [24, 72, 128])
def test_matches_float64_with_gradients(lengths, heads, kv, causal, d):
    q, k, v, segments = draw(lengths, heads, kv, d)
    out = attention(q, k, v, segments, causal)
    want, exact = in_float64(q, k, v, segments, causal)
    torch.testing.assert_close(out.double(), want, atol=2e-6, rtol=1e-5)
    weight = torch.randn_like(out)
    grads = torch.autograd.grad((out * weight).sum(), (q, k, v))
    want_grads = torch.autograd.grad((want * weight).sum(), exact)
    for grad, want_grad in zip(grads, want_grads):
        torch.testing.assert_close(grad.double(), want_grad, atol=1e-5, rtol=1e-4)


@each_backend
@pytest.mark.parametrize("causal", [False, True])
def test_segments_never_see_each_other(causal):
    q, k, v, segments = draw([4, 9, 4], 4, 2, 16)
    before = attention(q, k, v, segments, causal)
    with torch.no_grad():
        k[4:13] += 5  # only the middle segment may change
    after = attention(q, k, v, segments, causal)
    assert torch.equal(before[:4], after[:4])
    assert torch.equal(before[13:], after[13:])
    assert not torch.allclose(before[4:13], after[4:13])


@each_backend
def test_alone_a_token_returns_its_own_value():
    q, k, v, segments = draw([1, 1, 1], 2, 2, 8)
    torch.testing.assert_close(attention(q, k, v, segments), v)


@each_backend
def test_without_a_preference_the_values_are_averaged():
    q, k, v, segments = draw([6], 2, 2, 8)
    out = attention(q * 0, k, v, segments)
    torch.testing.assert_close(out, v.mean(0).expand_as(v))


@each_backend
def test_the_first_token_of_a_causal_segment_sees_itself_only():
    q, k, v, segments = draw([6], 2, 2, 8)
    torch.testing.assert_close(attention(q, k, v, segments, causal=True)[0], v[0])


@each_backend
def test_no_tokens_give_no_output():
    q, k, v, _ = draw([6], 2, 2, 8)
    empty = Segments.of([0, 0], "cpu")
    assert attention(q[:0], k[:0], v[:0], empty).shape == (0, 2, 8)


@each_backend
def test_shapes_that_do_not_fit_are_named():
    q, k, v, segments = draw([6], 4, 2, 8)
    with pytest.raises(ValueError, match="segments of 6 tokens"):
        attention(q[:5], k[:5], v[:5], segments)
    with pytest.raises(ValueError, match="do not fit"):
        attention(q[:, :3], k, v, segments)


@each_backend
def test_cached_rows_of_different_lengths():
    before = [3, 0, 7]
    new = 2
    g = torch.Generator().manual_seed(0)
    q = torch.randn(3, new, 4, 16, generator=g)
    k = torch.randn(3, 12, 2, 16, generator=g)
    v = torch.randn(3, 12, 2, 16, generator=g)
    out = cached_attention(q, k, v, torch.tensor(before))
    for row, held in enumerate(before):
        for i in range(new):
            seen = held + i + 1
            keys = k[row, :seen].repeat_interleave(2, 1)  # (seen, H, D)
            values = v[row, :seen].repeat_interleave(2, 1)
            weights = (torch.einsum("hd,lhd->hl", q[row, i], keys) / 4).softmax(-1)
            want = torch.einsum("hl,lhd->hd", weights, values)
            torch.testing.assert_close(out[row, i], want, atol=1e-6, rtol=1e-5)


@each_backend
def test_cached_rows_in_any_order():
    q = torch.randn(2, 3, 4, 16)
    k, v = torch.randn(2, 5, 12, 2, 16).unbind()
    lengths, rows = torch.tensor([2, 9]), torch.tensor([4, 1])
    out = cached_attention(q, k, v, lengths, rows)
    assert torch.equal(out, cached_attention(q, k[rows], v[rows], lengths))
    # without rows, the first ones of the cache
    first = cached_attention(q, k, v, lengths)
    assert torch.equal(first, cached_attention(q, k[:2], v[:2], lengths))


# -- our kernel on the CPU -------------------------------------------------------------------------

# around the edges of its tiles: 96 keys, 64 queries, chunks of 192
SHAPES = [
    ([64, 96, 192], 2, 2, 16),
    ([63, 65, 95, 97], 4, 2, 64),
    ([191, 193, 300], 3, 1, 64),
    ([1] * 70 + [2, 3, 5], 8, 1, 72),
    ([500], 8, 2, 80),
    ([260, 0, 7], 4, 4, 128),
    ([33], 2, 2, 1),
    ([40, 2], 2, 1, 100),
]


def relative(found, wanted) -> float:
    return ((found.double() - wanted).norm() / wanted.norm()).item()


def errors(monkeypatch, backend, drawn, causal):
    """Of the output and the gradients of q, k and v."""
    q, k, v, segments = drawn
    monkeypatch.setenv("NANOKEYE_ATTENTION", backend)
    out = attention(q, k, v, segments, causal)
    want, exact = in_float64(q, k, v, segments, causal)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    grads = torch.autograd.grad(out, (q, k, v), weight)
    want_grads = torch.autograd.grad(want, exact, weight.double())
    return [relative(a, b) for a, b in zip((out, *grads), (want, *want_grads))]


@pytest.mark.parametrize("lengths, heads, kv, d", SHAPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_are_no_larger_than_pytorchs(
    our_kernel, monkeypatch, lengths, heads, kv, d, causal, dtype
):
    drawn = draw(lengths, heads, kv, d, dtype)
    theirs = errors(monkeypatch, "torch", drawn, causal)
    for mine, other in zip(errors(monkeypatch, "ours", drawn, causal), theirs):
        assert mine <= 1.5 * other + (1e-7 if dtype == torch.float32 else 1e-3)


def test_large_scores_neither_overflow_nor_vanish(our_kernel, monkeypatch):
    q, k, v, segments = draw([150], 2, 1, 32)
    with torch.no_grad():
        q *= 60  # scores of some hundreds
        k[:96] -= 40  # a later tile brings the largest ones
    assert max(errors(monkeypatch, "ours", (q, k, v, segments), True)) < 1e-3
    assert max(errors(monkeypatch, "ours", (q, k, v, segments), False)) < 1e-3


def test_every_number_of_the_results_is_written(our_kernel):
    """Memory that was not filled would hold NaN here."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        q, k, v, segments = draw([5, 100, 0, 1], 4, 2, 24)
        out, lse = ours.attention(q, k, v, segments.cu_seqlens, NO_TILES, True)
        grads = torch.autograd.grad(out.sum(), (q, k, v))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.isfinite(x).all() for x in (out, lse, *grads))


def test_lse_is_the_log_of_the_sum_of_exponentials(our_kernel):
    q, k, v, segments = draw([6, 130], 2, 1, 16)
    _, lse = ours.attention(q, k, v, segments.cu_seqlens, NO_TILES, False)
    scores = torch.einsum("qhd,kd->hqk", q[6:].double(), k[6:, 0].double()) / 4
    torch.testing.assert_close(lse[:, 6:].double(), scores.logsumexp(-1), atol=1e-5, rtol=1e-6)
    assert not lse.requires_grad


def test_steps_between_tokens_and_heads_may_be_any(our_kernel):
    """One product gives q, k and v; a gradient may come transposed, or as one number everywhere."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(50, 6, 3, 16, generator=generator, requires_grad=True)
    segments = Segments.of([20, 30], "cpu")
    for weight in (torch.ones(()).expand(50, 6, 16), torch.randn(6, 16, 50).permute(2, 0, 1)):
        q, k, v = mixed.unbind(2)
        (found,) = torch.autograd.grad(attention(q, k, v, segments, True), mixed, weight)
        q, k, v = (x.contiguous() for x in mixed.unbind(2))
        want = attention(q, k, v, segments, True)
        (wanted,) = torch.autograd.grad(want, mixed, weight.contiguous())
        assert torch.equal(found, wanted)
    across = torch.randn(16, 50, 6).permute(1, 2, 0)  # channels far from each other
    assert torch.equal(
        attention(across, across, across, segments), attention(*[across.contiguous()] * 3, segments)
    )


def test_any_number_of_threads_gives_the_same_bits(our_kernel):
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            q, k, v, segments = draw([400, 3, 90, 1] * 3, 4, 2, 32)
            out = attention(q, k, v, segments, True)
            results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_wrong_arguments_are_named(our_kernel):
    q, k, v, segments = draw([6], 4, 2, 8)
    starts = segments.cu_seqlens
    for wrong, said in (
        ((q.double(), k, v, starts), "q is torch.float64"),
        ((q, k.bfloat16(), v, starts), "k is torch.bfloat16"),
        ((q, k, v[:, :1], starts), "do not fit"),
        ((q[:, :3], k, v, starts), "do not fit"),
        ((q, k, v, starts.long()), "starts must be int32"),
        ((q, k, v, torch.tensor([0, 4, 3, 6], dtype=torch.int32)), "rise from 0 to 6"),
        ((q, k, v, torch.tensor([0, 7], dtype=torch.int32)), "rise from 0 to 6"),
        ((q, k, v, torch.tensor([1, 6], dtype=torch.int32)), "rise from 0 to 6"),
    ):
        with pytest.raises(ValueError, match=said):
            ours.attention(*wrong, NO_TILES, False)


def test_torch_knows_the_operator(our_kernel):
    q, k, v, segments = draw([5, 7], 4, 2, 8)
    torch.library.opcheck(ours.attention, (q, k, v, segments.cu_seqlens, NO_TILES, True))

    def loss(q, k, v):
        return ours.attention(q, k, v, segments.cu_seqlens, NO_TILES, True)[0].square().sum()

    wanted = torch.autograd.grad(loss(q, k, v), (q, k, v))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    again = checkpoint(loss, q, k, v, use_reentrant=False)
    for value in (compiled(q, k, v), again):
        found = torch.autograd.grad(value, (q, k, v))
        assert all(torch.equal(a, b) for a, b in zip(found, wanted))
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(q, k, v, segments).dtype == torch.bfloat16


@pytest.mark.parametrize("saves, calls", [(True, 1), (False, 2)])
def test_selective_checkpointing_may_keep_what_attention_gave(
    our_kernel, monkeypatch, saves, calls
):
    """A policy names the operator; the products around it are computed again, it is not."""
    q, k, v, segments = draw([5, 70], 4, 2, 8)
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    called = []
    real = ours.call

    def counted(name, *arguments):
        called.append(name)
        real(name, *arguments)

    monkeypatch.setattr(ours, "call", counted)

    def policy(_, operator, *args, **kwargs):
        if saves and operator == torch.ops.nanokeye.attention.default:
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    def block(q, k, v):
        return (attention(q @ weight, k, v, segments, True) @ weight).square().sum()

    wanted = torch.autograd.grad(block(q, k, v), (q, k, v, weight))
    called.clear()
    loss = checkpoint(
        block, q, k, v, use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(policy),
    )
    found = torch.autograd.grad(loss, (q, k, v, weight))
    assert called.count("attention_forward") == calls and called.count("attention_backward") == 1
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))


# -- the choice, and the build ---------------------------------------------------------------------


def test_a_wrong_choice_is_named(monkeypatch):
    q, k, v, segments = draw([6], 2, 2, 8)
    monkeypatch.setenv("NANOKEYE_ATTENTION", "triton")
    with pytest.raises(ValueError, match="triton: known are ours, torch and reference"):
        attention(q, k, v, segments)
    monkeypatch.setenv("NANOKEYE_ATTENTION", "ours")
    with pytest.raises(ValueError, match="takes fp32 and bf16 on a CPU.*float64"):
        attention(q.double(), k.double(), v.double(), segments)


def fresh_python(code, **env):
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


RUN = """
import os, torch
os.environ.pop("NANOKEYE_ATTENTION", None)
from kernels import Segments, attention, attention_path
q, k, v = torch.randn(3, 9, 2, 8).unbind()
attention(q, k, v, Segments.of([4, 5], "cpu"))
print(attention_path(torch.device("cpu"), torch.float32))
"""


@pytest.mark.parametrize("cxx, why", [
    ("no-such-compiler", "no C++ compiler (no-such-compiler)"),
    ("false", "false:"),
])
def test_without_a_compiler_pytorchs_operators_are_used(tmp_path, cxx, why):
    said, warned = fresh_python(RUN, CXX=cxx, XDG_CACHE_HOME=str(tmp_path))
    assert said == "SDPA per distinct length\n"
    assert warned.count("attention.cpp is not used") == 1 and why in warned


def test_a_source_that_does_not_compile_is_named(our_kernel, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "broken.cpp").write_text("int f() { return nothing; }")
    with pytest.raises(OSError, match="broken.cpp:1:.*nothing"):
        build.build(tmp_path / "broken.cpp")
    assert list(build.cache_folder().iterdir()) == [], "nothing is left to be waited for"


def test_it_is_built_once_and_again_for_another_source(our_kernel, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "two.cpp"
    source.write_text('extern "C" int two() { return 2; }')
    found = []
    threads = [threading.Thread(target=lambda: found.append(build.build(source))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and stat.S_ISREG(found[0].stat().st_mode)
    built = found[0].stat().st_mtime_ns
    assert build.build(source).stat().st_mtime_ns == built
    source.write_text('extern "C" int two() { return 3; }')
    assert build.build(source) != found[0]


# --------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize(
    "lengths, heads, kv",
    [([512] * 4, 16, 16), ([256, 640, 17, 1024], 32, 8), ([1, 300], 8, 8)],
)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d", [72, 128])
def test_cuda_bf16(lengths, heads, kv, causal, d):
    q, k, v, segments = draw(lengths, heads, kv, d, torch.bfloat16, "cuda")
    out = attention(q, k, v, segments, causal)
    want, exact = in_float64(q, k, v, segments, causal)
    assert (out.double() - want).norm() / want.norm() < 8e-3
    weight = torch.randn_like(out)
    grads = torch.autograd.grad((out * weight).sum(), (q, k, v))
    want_grads = torch.autograd.grad((want * weight.double()).sum(), exact)
    for grad, want_grad in zip(grads, want_grads):
        assert (grad.double() - want_grad).norm() / want_grad.norm() < 1.5e-2


# -- our kernel on a GPU ---------------------------------------------------------------------------

# around the edges of its tiles: 128 rows, walked past 64 or 32 at a time
GPU_SHAPES = [
    ([64, 128, 256], 2, 2),
    ([63, 65, 127, 129], 4, 2),
    ([31, 33, 191, 193, 300], 4, 1),
    ([1] * 70 + [2, 3, 5], 8, 1),
    ([700], 8, 8),
    ([1000, 0, 7], 3, 1),
]


@pytest.fixture(params=["sm_80", "hopper"])
def our_gpu_kernel(request, monkeypatch):
    monkeypatch.setenv("NANOKEYE_ATTENTION", "ours")
    if not ours.available("cuda"):
        pytest.skip("no nvcc")
    if request.param == "hopper":
        device = torch.cuda.current_device()
        if not (ours.hopper(device, False) and ours.hopper(device, True)):
            pytest.skip("not a Hopper GPU")
        # What they do not take is an error then: attention.cu would hide that they have not run.
        monkeypatch.setattr(ours, "NOT_TAKEN", -2)
    monkeypatch.setattr(ours, "HOPPER", request.param == "hopper")


def test_tiles_cover_a_pack_and_the_longest_come_first():
    lengths = [5, 300, 128, 129]
    for causal in (False, True):
        tiles = ours.tiles_of(lengths, causal)
        rows = [start + 128 * i + r for start, n, i in tiles for r in range(min(128, n - 128 * i))]
        assert sorted(rows) == list(range(sum(lengths)))
        seen = [min(n, 128 * (i + 1)) if causal else n for _, n, i in tiles]
        assert seen == sorted(seen, reverse=True)


@pytest.mark.cuda
@pytest.mark.parametrize("lengths, heads, kv", GPU_SHAPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d", ours.CUDA_WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gpu_errors_are_no_larger_than_pytorchs(
    our_gpu_kernel, monkeypatch, lengths, heads, kv, d, causal, dtype
):
    drawn = draw(lengths, heads, kv, d, dtype, "cuda")
    theirs = errors_on_gpu(monkeypatch, "torch", drawn, causal)
    for mine, other in zip(errors_on_gpu(monkeypatch, "ours", drawn, causal), theirs):
        assert mine <= 1.5 * other + 1e-3


def errors_on_gpu(monkeypatch, backend, drawn, causal):
    """Of the output and the gradients of q, k and v."""
    q, k, v, segments = drawn
    monkeypatch.setenv("NANOKEYE_ATTENTION", backend)
    out = attention(q, k, v, segments, causal)
    want, exact = in_float64(q, k, v, segments, causal)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(out.shape, generator=generator).to(out)
    grads = torch.autograd.grad(out, (q, k, v), weight)
    want_grads = torch.autograd.grad(want, exact, weight.double())
    return [relative(a, b) for a, b in zip((out, *grads), (want, *want_grads))]


@pytest.mark.cuda
@pytest.mark.parametrize("d", ours.CUDA_WIDTHS)
@pytest.mark.parametrize("causal", [False, True])
def test_every_number_from_the_gpu_is_written_and_every_run_gives_the_same(
    our_gpu_kernel, d, causal
):
    """Memory that was not filled would hold NaN here."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        runs = []
        for _ in range(3):
            q, k, v, segments = draw([5, 200, 1, 129], 8, 2, d, torch.bfloat16, "cuda")
            out = attention(q, k, v, segments, causal)
            runs.append([out, *torch.autograd.grad(out.sum(), (q, k, v))])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.isfinite(x).all() for x in runs[0])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))


@pytest.mark.cuda
@pytest.mark.parametrize("d", ours.CUDA_WIDTHS)
@pytest.mark.parametrize("causal", [False, True])
def test_what_is_no_number_stays_in_its_segment(our_gpu_kernel, d, causal):
    """Tiles reach into the next segment, here after 5, 133 and 261 tokens."""
    lengths = [5, 3, 133, 70, 261, 90]
    q, k, v, segments = draw(lengths, 4, 2, d, torch.bfloat16, "cuda")
    clean = torch.ones(sum(lengths), dtype=torch.bool, device="cuda")
    results = []
    for poison in (0.0, torch.nan):
        start = 0
        with torch.no_grad():
            for i, n in enumerate(lengths):
                if i % 2:
                    clean[start : start + n] = False
                    for x in (q, k, v):
                        x[start : start + n] = poison
                start += n
        out = attention(q, k, v, segments, causal)
        results.append([out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))])
    for zeros, nans in zip(*results):
        assert torch.equal(zeros[clean], nans[clean]) and torch.isnan(nans[~clean]).all()


@pytest.mark.cuda
@pytest.mark.parametrize("causal", [False, True])
def test_thousands_of_short_segments_and_a_long_one_on_the_gpu(our_gpu_kernel, causal):
    lengths = [1 + i % 37 for i in range(2000)] + [3000]
    q, k, v, segments = draw(lengths, 2, 1, 72, torch.bfloat16, "cuda")
    out = attention(q, k, v, segments, causal)
    grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    want, exact = in_float64(q, k, v, segments, causal)
    want_grads = torch.autograd.grad(want, exact, torch.ones_like(want))
    for found, wanted in zip((out, *grads), (want, *want_grads)):
        assert relative(found, wanted) < 1e-2


@pytest.mark.cuda
def test_large_scores_on_the_gpu(our_gpu_kernel, monkeypatch):
    q, k, v, segments = draw([300], 2, 1, 64, torch.bfloat16, "cuda")
    with torch.no_grad():
        q *= 40  # scores of some hundreds
        k[:128] -= 20  # a later tile brings the largest ones
    for causal in (False, True):
        theirs = errors_on_gpu(monkeypatch, "torch", (q, k, v, segments), causal)
        mine = errors_on_gpu(monkeypatch, "ours", (q, k, v, segments), causal)
        assert all(a <= 1.5 * b + 1e-3 for a, b in zip(mine, theirs))


@pytest.mark.cuda
def test_lse_from_the_gpu(our_gpu_kernel):
    q, k, v, segments = draw([6, 130], 2, 1, 72, torch.bfloat16, "cuda")
    tiles = torch.tensor(ours.tiles_of([6, 130], False), dtype=torch.int32, device="cuda")
    _, lse = ours.attention(q, k, v, segments.cu_seqlens, tiles, False)
    scores = torch.einsum("qhd,kd->hqk", q[6:].double(), k[6:, 0].double()) * 72**-0.5
    torch.testing.assert_close(lse[:, 6:].double(), scores.logsumexp(-1), atol=1e-4, rtol=1e-5)
    assert not lse.requires_grad


@pytest.mark.cuda
def test_steps_on_the_gpu_may_be_any(our_gpu_kernel):
    """One product gives q, k and v; a gradient may come transposed, or as one number everywhere."""
    generator = torch.Generator().manual_seed(0)
    segments = Segments.of([20, 130], "cuda")
    for d in (72, 128):
        mixed = torch.randn(150, 3, 6, d + 8, generator=generator).to("cuda", torch.bfloat16)
        transposed = torch.randn(6, d, 150, generator=generator).to("cuda", torch.bfloat16)
        for offset in (8, 3):  # channels that begin at a whole 16 bytes, and that do not
            q, k, v = mixed[..., offset : offset + d].unbind(1)
            for weight in (torch.ones((), device="cuda").bfloat16(), transposed.permute(2, 0, 1)):
                results = []
                for xs in ((q, k, v), [x.contiguous() for x in (q, k, v)]):
                    xs = [x.detach().requires_grad_() for x in xs]
                    out = attention(*xs, segments, True)
                    weights = weight.expand(out.shape)
                    results.append([out, *torch.autograd.grad(out, xs, weights)])
                assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.cuda
def test_what_the_gpus_kernel_cannot_take_is_named(our_gpu_kernel):
    q, k, v, segments = draw([6], 4, 2, 24, torch.bfloat16, "cuda")
    with pytest.raises(ValueError, match="torch.bfloat16, heads 24 wide, on cuda"):
        attention(q, k, v, segments)
    tiles = torch.tensor([(0, 6, 0)], dtype=torch.int32, device="cuda")
    with pytest.raises(ValueError, match="heads are 24 wide"):
        ours.attention(q, k, v, segments.cu_seqlens, tiles, False)
    q, k, v, segments = draw([6], 4, 2, 64, torch.bfloat16, "cuda")
    for wrong in (tiles.long(), tiles.cpu(), tiles[:, :2]):
        with pytest.raises(ValueError, match="tiles is"):
            ours.attention(q, k, v, segments.cu_seqlens, wrong, False)
    with pytest.raises(ValueError, match="k is torch.float16"):
        ours.attention(q, k.half(), v, segments.cu_seqlens, tiles, False)


# -- the decoding kernel ---------------------------------------------------------------------------


def test_parts_cover_a_row_and_are_few():
    for capacity in (1, 64, 511, 513, 8192, 8193, 40_000):
        parts, keys = decode.parts_of(capacity)
        assert 1 <= parts <= 16 and keys % 64 == 0
        assert (parts - 1) * keys < capacity <= parts * keys or keys == 64 * (keys // 64)
        assert parts * keys >= capacity and (parts == 1 or keys >= 256)


def cached(rows, new, heads, kv, d, capacity, dtype=torch.bfloat16, device="cpu"):
    """q, k and v of a cache whose rows are given apart."""
    g = torch.Generator().manual_seed(0)
    shapes = ((new, heads), (capacity, kv), (capacity, kv))
    return [torch.randn(rows, n, h, d, generator=g).to(device, dtype) for n, h in shapes]


def test_arguments_of_the_decoding_kernel_are_named():
    q, k, v = cached(2, 1, 4, 2, 64, 9)
    whole = torch.tensor([3, 4], dtype=torch.int32)
    decode.check_inputs(q, k, v, whole, None)
    decode.check_inputs(q, k[:, :7], v[:, :7], whole, whole)
    for wrong, said in (
        ((q.double(), k, v, whole, None), "q is torch.float64"),
        ((q, k.float(), v, whole, None), "k is torch.float32"),
        ((q[0], k, v, whole, None), "q is .* four dimensions"),
        ((q, k[:, :5], v, whole, None), "q .* do not fit"),
        ((q[:, :, :3], k, v, whole, None), "q .* do not fit"),
        ((q, k.mT.contiguous().mT, v, whole, None), "k has steps"),
        ((q, k, v.repeat(1, 2, 1, 1)[:, ::2], whole, None), "v has steps"),
        ((q, k, v, whole.long(), None), "lengths is torch.int64"),
        ((q, k, v, whole[:1], None), "lengths is"),
        ((q, k, v, whole, whole[:, None]), "rows is"),
        ((q, k[:1], v[:1], whole, None), "q has 2 rows, k 1"),
    ):
        with pytest.raises(ValueError, match=f"decode: {said}"):
            decode.check_inputs(*wrong)


def test_torch_knows_the_shape_that_decoding_gives():
    tensors = [x.to("meta") for x in cached(2, 3, 4, 2, 64, 9)]
    lengths = torch.empty(2, dtype=torch.int32, device="meta")
    assert decode.decode(*tensors, lengths).shape == (2, 3, 4, 64)


def decoded_in_float64(q, k, v, lengths, rows):
    """What decode gives, query by query. NaN where a query sees no key."""
    out = torch.full(q.shape, torch.nan, dtype=torch.float64)
    q, k, v = (x.double().cpu() for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    for b, (held, row) in enumerate(zip(lengths, rows)):
        for i in range(max(0, -held), q.shape[1]):
            keys, values = (x[row, : held + i + 1].repeat_interleave(group, 1) for x in (k, v))
            scores = torch.einsum("hd,lhd->hl", q[b, i], keys) * q.shape[3] ** -0.5
            out[b, i] = torch.einsum("hl,lhd->hd", scores.softmax(-1), values)
    return out


@pytest.fixture
def decoding_kernel(monkeypatch):
    monkeypatch.setenv("NANOKEYE_ATTENTION", "ours")
    if not decode.available():
        pytest.skip("no nvcc")


@pytest.mark.parametrize("heads, kv", [(8, 2), (3, 1), (4, 4), (17, 1)])
@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("d", [8, 24, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_on_the_cpu_against_float64_with_poison(our_kernel, heads, kv, new, d, dtype):
    """Around the edges of its tiles of 96 keys."""
    capacity = 200
    lengths = [0, 95 - new, 96 - new, 97 - new, 95, 96, 200 - new, 1 - new]
    rows = [7, 3, 1, 0, 2, 9, 5, 4]
    q, _, _ = cached(len(rows), new, heads, kv, d, 1, dtype)
    _, k, v = cached(10, 1, heads, kv, d, capacity + 4, dtype)
    k, v = k[:, :capacity], v[:, :capacity]
    for held, row in zip(lengths, rows):
        k[row, held + new :] = torch.nan
        v[row, held + new :] = torch.nan
    want = decoded_in_float64(q, k, v, lengths, rows)
    held, places = (torch.tensor(x, dtype=torch.int32) for x in (lengths, rows))
    found = decode.decode(q, k, v, held, places).double()
    seen = ~want.isnan()
    assert relative(found[seen], want[seen]) < (1e-6 if dtype == torch.float32 else 4e-3)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    again = decode.decode(q, k, v, held, places).double()
    torch.set_num_threads(before)
    assert torch.equal(found[seen], again[seen])
    torch.library.opcheck(decode.decode, (q, k, v, held, places), test_utils=["test_schema"])
    places[1], places[2] = -1, 10  # rows that are not there
    assert not decode.decode(q, k, v, held, places)[1:3].any()


@pytest.mark.cuda
@pytest.mark.parametrize("heads, kv", [(32, 8), (3, 1), (4, 4), (32, 1)])
@pytest.mark.parametrize("new", [1, 5, 16])
@pytest.mark.parametrize("d", decode.CUDA_WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_decoding_against_float64_with_poison_behind_every_row(
    decoding_kernel, heads, kv, new, d, dtype
):
    """Around the edges of tiles (16 keys), of all warps' tiles (64) and of parts."""
    capacity = 1100
    lengths = [0, 14, 15, 16, 63, 64, 383, 384, 385, 1100 - new, -new + 1]
    rows = [7, 3, 1, 0, 2, 10, 11, 5, 4, 8, 6]
    q, _, _ = cached(len(rows), new, heads, kv, d, 1, dtype, "cuda")
    _, k, v = cached(12, 1, heads, kv, d, capacity + 4, dtype, "cuda")
    k, v = k[:, :capacity], v[:, :capacity]
    for held, row in zip(lengths, rows):
        k[row, held + new :] = torch.nan
        v[row, held + new :] = torch.nan
    want = decoded_in_float64(q, k, v, lengths, rows)
    held, places = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in (lengths, rows))
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:  # memory that was not filled would hold NaN here
        runs = [decode.decode(q, k, v, held, places).double().cpu() for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.isfinite(run).all() and torch.equal(run, runs[0]) for run in runs)
    seen = ~want.isnan()
    assert relative(runs[0][seen], want[seen]) < (1e-3 if dtype == torch.float16 else 5e-3)


@pytest.mark.cuda
def test_decoding_of_large_scores_and_of_a_cache_in_order(decoding_kernel):
    q, k, v = cached(3, 2, 8, 2, 64, 700, device="cuda")
    q *= 40
    k[:, :300] -= 20  # a later part brings the largest scores
    lengths = torch.tensor([698, 310, 5], dtype=torch.int32, device="cuda")
    want = decoded_in_float64(q, k, v, lengths.tolist(), range(3))
    assert relative(cached_attention(q, k, v, lengths.long()).double().cpu(), want) < 1e-2


@pytest.mark.cuda
def test_a_graph_of_decoding_follows_the_lengths(decoding_kernel):
    q, k, v = cached(4, 1, 8, 2, 128, 2000, device="cuda")
    lengths = torch.tensor([5, 600, 30, 1200], dtype=torch.int32, device="cuda")
    decode.decode(q, k, v, lengths)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode.decode(q, k, v, lengths)
    for step in (0, 1, 500):
        lengths += step
        graph.replay()
        assert torch.equal(out, decode.decode(q, k, v, lengths))


@pytest.mark.cuda
def test_numbers_that_would_lead_astray_are_not_followed(decoding_kernel):
    q, k, v = cached(3, 1, 8, 2, 64, 100, device="cuda")
    lengths = torch.tensor([500, 3, 3], dtype=torch.int32, device="cuda")
    rows = torch.tensor([0, -1, 7], dtype=torch.int32, device="cuda")
    out = decode.decode(q, k, v, lengths, rows)
    assert torch.equal(out[1:], torch.zeros_like(out[1:]))
    assert torch.equal(out[:1], decode.decode(q[:1], k, v, lengths[:1].clamp(max=99)))
