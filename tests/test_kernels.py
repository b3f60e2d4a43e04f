"""The attention operator against float64, and against its own limiting cases."""

import pytest
import torch

from kernels import Segments, attention, attention_reference, cached_attention

CASES = [([5], 4, 4), ([5, 5, 5], 4, 2), ([1, 7, 3, 7, 64], 6, 2), ([33, 1, 1], 8, 1)]


def draw(lengths, heads, kv, d, dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(len(lengths))
    q, k, v = (torch.randn(sum(lengths), h, d, generator=g).to(device, dtype) for h in (heads, kv, kv))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), Segments.of(lengths, device)


@pytest.mark.parametrize("lengths, heads, kv", CASES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d", [24, 72, 128])
def test_matches_float64_with_gradients(lengths, heads, kv, causal, d):
    q, k, v, segments = draw(lengths, heads, kv, d)
    out = attention(q, k, v, segments, causal)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    ref = attention_reference(*exact, segments, causal)
    weight = torch.randn_like(out)
    torch.testing.assert_close(out.double(), ref, atol=2e-6, rtol=1e-5)
    for a, b in zip(torch.autograd.grad((out * weight).sum(), (q, k, v)),
                    torch.autograd.grad((ref * weight).sum(), exact)):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
def test_segments_never_see_each_other(causal):
    q, k, v, segments = draw([4, 9, 4], 4, 2, 16)
    before = attention(q, k, v, segments, causal)
    with torch.no_grad():
        k[4:13] += 5  # only the middle segment may change
    after = attention(q, k, v, segments, causal)
    assert torch.equal(before[:4], after[:4]) and torch.equal(before[13:], after[13:])
    assert not torch.allclose(before[4:13], after[4:13])


def test_limiting_cases():
    q, k, v, one = draw([1, 1, 1], 2, 2, 8)
    torch.testing.assert_close(attention(q, k, v, one), v)  # alone, a token returns its own value
    q, k, v, s = draw([6], 2, 2, 8)
    torch.testing.assert_close(attention(q * 0, k, v, s), v.mean(0).expand_as(v))  # no preference: the mean
    torch.testing.assert_close(attention(q, k, v, s, causal=True)[0], v[0])  # the first token sees itself only
    empty = Segments.of([0, 0], "cpu")
    assert attention(q[:0], k[:0], v[:0], empty).shape == (0, 2, 8)


def test_shapes_that_do_not_fit_are_named():
    q, k, v, s = draw([6], 4, 2, 8)
    with pytest.raises(ValueError, match="segments of 6 tokens"):
        attention(q[:5], k[:5], v[:5], s)
    with pytest.raises(ValueError, match="do not fit"):
        attention(q[:, :3], k, v, s)


def test_cached_rows_of_different_lengths():
    lengths, new, top = [3, 0, 7], 2, 12
    g = torch.Generator().manual_seed(0)
    q = torch.randn(3, new, 4, 16, generator=g)
    k, v = torch.randn(3, top, 2, 16, generator=g), torch.randn(3, top, 2, 16, generator=g)
    out = cached_attention(q, k, v, torch.tensor(lengths))
    for b, n in enumerate(lengths):
        for i in range(new):
            keys, values = k[b, : n + i + 1].repeat_interleave(2, 1), v[b, : n + i + 1].repeat_interleave(2, 1)
            w = (torch.einsum("hd,lhd->hl", q[b, i], keys) / 4).softmax(-1)
            torch.testing.assert_close(out[b, i], torch.einsum("hl,lhd->hd", w, values), atol=1e-6, rtol=1e-5)


@pytest.mark.cuda
@pytest.mark.parametrize("lengths, heads, kv", [([512] * 4, 16, 16), ([256, 640, 17, 1024], 32, 8), ([1, 300], 8, 8)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d", [72, 128])
def test_cuda_bf16(lengths, heads, kv, causal, d):
    q, k, v, segments = draw(lengths, heads, kv, d, torch.bfloat16, "cuda")
    out = attention(q, k, v, segments, causal)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    ref = attention_reference(*exact, segments, causal)
    weight = torch.randn_like(out)
    assert (out.double() - ref).norm() / ref.norm() < 8e-3
    for a, b in zip(torch.autograd.grad((out * weight).sum(), (q, k, v)),
                    torch.autograd.grad((ref * weight.double()).sum(), exact)):
        assert (a.double() - b).norm() / b.norm() < 1.5e-2
