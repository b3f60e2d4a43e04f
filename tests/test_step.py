"""Steps of decoding in few calls, kernels/step.py, layer.py and products.py, against the layers one
by one."""

from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

import model as model_file
from kernels import decode, layer, products, step
from model import PRESETS, KeyeVL, RMSNorm
from vit import rotate

TOY = PRESETS["toy"]
SHAPES = {
    "toy": TOY,
    "two key heads": replace(TOY, num_attention_heads=4, num_key_value_heads=2),
    "heads of 128": replace(
        TOY, head_dim=128, mrope_section=(16, 24, 24), num_attention_heads=2, hidden_size=80
    ),
}
compiled = pytest.mark.skipif(step.load("step.cpp") is None, reason="no compiler")


def drawn(cfg, dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    model = KeyeVL.empty(cfg).init_weights().eval()
    for part in model.decoder.modules():
        if isinstance(part, RMSNorm):
            torch.nn.init.uniform_(part.weight, 0.5, 1.5)
    return model.to(device, dtype)


@torch.no_grad()
def both_ways(model, rows, spare=2, capacity=90):
    """Hidden states, keys and values of one step: by the whole step, and layer by layer."""
    device = model.head_weight.device
    tokens, positions = torch.randint(0, 900, (rows,)), torch.randint(0, 3000, (rows,))
    before = torch.randint(0, capacity, (rows,))
    before[0], before[-1] = 0, capacity - 1
    inputs = [x.to(device) for x in (tokens, positions, before)]
    cache = model.new_cache(rows + spare, capacity)
    cache.k.normal_()
    cache.v.normal_()
    held = cache.k.clone(), cache.v.clone()
    assert cache.whole_step is not None
    found = model.step_one(*inputs, cache, capacity), cache.k, cache.v
    cache.k, cache.v = held
    cache.whole_step = None
    return found, (model.step_one(*inputs, cache, capacity), cache.k, cache.v)


@compiled
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 7, 16, 37])
def test_a_step_on_a_cpu_is_that_of_the_layers(shape, rows, threads):
    """And it writes nothing but the new keys and values."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for found, want in zip(*both_ways(drawn(SHAPES[shape]), rows)):
            torch.testing.assert_close(found, want, atol=3e-5, rtol=1e-5)
    finally:
        torch.set_num_threads(before)


@compiled
@torch.no_grad()
def test_a_row_has_the_same_bits_among_any_others():
    model = drawn(TOY)
    tokens, positions = torch.randint(0, 900, (30,)), torch.randint(0, 3000, (30,))
    lengths = torch.full((30,), 20)
    cache = model.new_cache(30, 30)
    cache.k.normal_()
    cache.v.normal_()
    together = model.step_one(tokens, positions, lengths, cache, 21)
    for n in (1, 3, 17):
        assert torch.equal(
            model.step_one(tokens[:n], positions[:n], lengths[:n], cache, 21), together[:n]
        )


@compiled
@torch.no_grad()
def test_what_it_refuses():
    model = drawn(TOY)
    cache = model.new_cache(2, 10)
    one = torch.ones(3, dtype=torch.long)
    with pytest.raises(ValueError, match="row 1 holds 10 tokens; the cache has 2 rows of 10"):
        model.step_one(one[:2], one[:2], torch.tensor([3, 10]), cache, 10)
    with pytest.raises(ValueError, match="row 2 holds 1 tokens; the cache has 2 rows of 10"):
        model.step_one(one, one, one, cache, 10)
    weights = [list(part.parameters()) for part in model.decoder.layers]
    weights[1][10] = weights[1][10].T.contiguous()
    with pytest.raises(ValueError, match=r"down is \(288, 96\); \(96, 288\) was expected"):
        step.decoder_step(weights, model.decoder.norm.weight, torch.ones(32), 3, 1e-6)


@torch.no_grad()
def test_where_there_is_none(monkeypatch):
    """bf16, wide models, heads of other widths, or PyTorch's operators asked for."""
    wide = replace(TOY, hidden_size=1024, intermediate_size=64, num_hidden_layers=1)
    narrow = replace(TOY, head_dim=48, mrope_section=(6, 9, 9))
    for other in (drawn(TOY).bfloat16(), drawn(wide), drawn(narrow)):
        assert other.new_cache(1, 4).whole_step is None
    monkeypatch.setenv("NANOKEYE_ATTENTION", "torch")
    assert drawn(TOY).new_cache(1, 4).whole_step is None


# --------------------------------------------------------------------------------------------------
# few kernels on a GPU


def enter_heads(q, k, v, norms, rope, places, cache, eps):
    """What kernels/layer.py's is to do, by PyTorch's operators."""
    q, k = (
        rotate(F.rms_norm(x, x.shape[-1:], weight, eps), *rope)
        for x, weight in zip((q, k), norms)
    )
    for held, new in zip(cache, (k, v)):
        held.flatten(0, 1)[places] = new
    return q


def swiglu(gate, up):
    return F.silu(gate) * up


@pytest.mark.parametrize("shape", SHAPES)
def test_the_layers_of_few_kernels_are_those_of_forward(shape, monkeypatch):
    """On a CPU, with operators of PyTorch in the kernels' places."""
    monkeypatch.setattr(model_file, "few_kernels", lambda *of: True)
    monkeypatch.setattr(model_file, "enter_heads", enter_heads)
    monkeypatch.setattr(products, "swiglu", swiglu)
    for found, want in zip(*both_ways(drawn(SHAPES[shape]), 7)):
        torch.testing.assert_close(found, want, atol=3e-5, rtol=1e-5)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", layer.DTYPES)
@pytest.mark.parametrize("heads, kv, width", [(3, 1, 64), (32, 8, 128), (4, 2, 64), (1, 1, 128)])
def test_the_kernels_are_pytorchs_operators(dtype, heads, kv, width):
    if not layer.available(torch.ones(1, device="cuda", dtype=dtype), width):
        pytest.skip("no CUDA compiler")
    torch.manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, device="cuda").to(dtype)

    for rows in (1, 5, 64):
        q, k, v = draw(rows, heads, width), draw(rows, kv, width), draw(rows, kv, width)
        norms = draw(width), draw(width)
        angles = 100 * torch.rand(rows, 1, width // 2, device="cuda")
        rope = [angles.cos(), angles.sin()]
        places = torch.arange(rows, device="cuda") * 9 + torch.randint(9, (rows,), device="cuda")
        cache = draw(rows + 1, 9, kv, width), draw(rows + 1, 9, kv, width)
        other = cache[0].clone(), cache[1].clone()
        want = enter_heads(q, k, v, norms, rope, places, other, 1e-6)
        found = layer.enter_heads(q, k, v, norms, rope, places, cache, 1e-6)
        for one, two in ((found, want), (cache[0], other[0])):
            torch.testing.assert_close(one, two, atol=0.04, rtol=0.02)
        assert torch.equal(cache[1], other[1])
        gate, up = 4 * draw(rows, 1000), draw(rows, 1000)
        want = swiglu(gate, up)
        torch.testing.assert_close(layer.swiglu(gate, up), want, atol=0.02, rtol=0.02)
    with pytest.raises(ValueError, match="do not fit"):
        layer.enter_heads(q, k[1:], v, norms, rope, places, cache, 1e-6)
    with pytest.raises(ValueError, match="layer: sin is torch.float64"):
        layer.enter_heads(q, k, v, norms, [rope[0], rope[1].double()], places, cache, 1e-6)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", layer.DTYPES)
@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("width", [8, 264, 2048, 12288, 24576])
def test_products_are_as_near_to_float64_as_pytorchs(dtype, tokens, width):
    if products.load("products.cu") is None:
        pytest.skip("no CUDA compiler")
    torch.manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, device="cuda").to(dtype)

    x, plus = draw(tokens, width), draw(tokens, 1001)
    weights = [draw(rows, width) / width**0.5 for rows in (1001, 1, 70)]
    norm = RMSNorm(width, 1e-6).to("cuda", dtype)
    norm.weight.data = draw(width)
    cases = {
        "alone": partial(products.project, weights=weights[:1]),
        "three, normed": partial(products.project, weights=weights, norm=norm),
        "added": partial(products.project, weights=weights[:1], plus=plus),
        "swiglu": partial(
            products.project_swiglu, gate=weights[0], up=weights[0].flip(0), norm=norm
        ),
    }
    for name, work in cases.items():
        found = work(x)
        assert products.fits(x, weights, norm, None), name
        with mock.patch.object(products, "fits", lambda *of: False):
            want = work(x)
        for one, two in zip(found, want):
            torch.testing.assert_close(one, two, atol=0.03, rtol=0.02, msg=name)
    one = products.project(x, weights[:1])[0].double()
    exact = x.double() @ weights[0].double().T
    half_a_step = torch.finfo(dtype).eps / 2
    assert ((one - exact).abs() <= 1.1 * half_a_step * exact.abs() + 1e-5).all()


@pytest.mark.cuda
def test_products_that_do_not_fit():
    if products.load("products.cu") is None:
        pytest.skip("no CUDA compiler")
    x, weight = (torch.ones(n, 64, device="cuda", dtype=torch.bfloat16) for n in (2, 10))
    with pytest.raises(ValueError, match=r"x \(2, 64\) and \[\(10, 32\)\] do not fit"):
        products.project(x, [weight[:, :32].contiguous()])
    assert not products.fits(torch.cat([x] * 3), [weight], None, None), "too many tokens"
    assert not products.fits(x[:, :60], [weight[:, :60]], None, None), "no whole 16 bytes"
    assert not products.fits(x.float(), [weight.float()], None, None)
    want = torch.full((6, 10), 64.0, device="cuda", dtype=torch.bfloat16)
    assert torch.equal(products.project(torch.cat([x] * 3), [weight])[0], want)


@pytest.mark.cuda
@pytest.mark.parametrize("shape", ["toy", "heads of 128"])
def test_a_step_of_few_kernels_on_a_gpu(shape):
    model = drawn(SHAPES[shape], torch.bfloat16, "cuda")
    if not layer.available(model.head_weight, model.config.head_dim) or not decode.available():
        pytest.skip("no CUDA compiler")
    for rows in (1, 2, 7):
        for found, want in zip(*both_ways(model, rows)):
            torch.testing.assert_close(found, want, atol=0.1, rtol=0.05)
