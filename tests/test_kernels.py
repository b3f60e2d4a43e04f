"""The attention operator against float64, and against its own limiting cases."""

import pytest
import torch

from kernels import Segments, attention, attention_reference, cached_attention


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


def test_alone_a_token_returns_its_own_value():
    q, k, v, segments = draw([1, 1, 1], 2, 2, 8)
    torch.testing.assert_close(attention(q, k, v, segments), v)


def test_without_a_preference_the_values_are_averaged():
    q, k, v, segments = draw([6], 2, 2, 8)
    out = attention(q * 0, k, v, segments)
    torch.testing.assert_close(out, v.mean(0).expand_as(v))


def test_the_first_token_of_a_causal_segment_sees_itself_only():
    q, k, v, segments = draw([6], 2, 2, 8)
    torch.testing.assert_close(attention(q, k, v, segments, causal=True)[0], v[0])


def test_no_tokens_give_no_output():
    q, k, v, _ = draw([6], 2, 2, 8)
    empty = Segments.of([0, 0], "cpu")
    assert attention(q[:0], k[:0], v[:0], empty).shape == (0, 2, 8)


def test_shapes_that_do_not_fit_are_named():
    q, k, v, segments = draw([6], 4, 2, 8)
    with pytest.raises(ValueError, match="segments of 6 tokens"):
        attention(q[:5], k[:5], v[:5], segments)
    with pytest.raises(ValueError, match="do not fit"):
        attention(q[:, :3], k, v, segments)


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
