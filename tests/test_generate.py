"""generate.py: what is sampled, with which probability, from which position; the command line."""

import io
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from safetensors.torch import load_file, save_file
from transformers import RepetitionPenaltyLogitsProcessor

import generate
from conftest import ROOT
from data import pack
from generate import Generator, Row, Schedule, choose, first_beyond, max_answer
from model import PRESETS, KeyeVL


@pytest.fixture(scope="module")
def folder(model, processor, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def picture(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def ask(*parts):
    """A question: strings are texts, pictures are pictures, lists of pictures are clips."""
    content = []
    for part in parts:
        kind = {str: "text", list: "video"}.get(type(part), "image")
        content.append({"type": kind, kind: part})
    return {"messages": [{"role": "user", "content": content}]}


@pytest.fixture(scope="module")
def prompts(processor):
    two = "Picture 1: ", picture(60, 90, 1), "Picture 2: ", picture(100, 70, 2), "Which is larger?"
    clip = [picture(56, 56, seed) for seed in (3, 4, 5, 6)]
    questions = [
        ask("How many circles?"),
        ask(picture(80, 60), "What colour?"),
        ask(*two),
        ask("x"),
        ask(clip, "Which way does it move?"),
        ask(picture(30, 30, 7), "?"),
    ]
    return [processor(question, generate=True) for question in questions]


def whole(prompt, response):
    """The conversation after decoding as one sample, built anew from the prompt on."""
    runs = [prompt]
    position = int(prompt["positions"].max()) + 1
    extensions = list(response.extensions)
    i = 0
    while i < len(response.ids):
        if response.sampled[i]:
            token = torch.tensor([response.ids[i]])
            place = torch.full((3, 1), position)
            empty = {"patches": prompt["patches"][:0], "grids": prompt["grids"][:0]}
            runs.append({"tokens": token, "positions": place, **empty})
        else:
            runs.append(extensions.pop(0))
            # it begins with text, right behind what was there
            assert runs[-1]["positions"][:, :2].tolist() == [[position, position + 1]] * 3
            given = runs[-1]["tokens"].tolist()
            assert response.ids[i : i + len(given)] == given
        i += len(runs[-1]["tokens"])
        position = int(runs[-1]["positions"].max()) + 1
    assert not extensions
    sample = {k: torch.cat([run[k] for run in runs]) for k in ("tokens", "patches", "grids")}
    sample["positions"] = torch.cat([run["positions"] for run in runs], 1)
    sample["labels"] = torch.full_like(sample["tokens"], -100)
    return sample


@torch.no_grad()
def full_logits(model, prompt, response):
    """Logits of a forward pass without a cache, at the tokens that predict the response's ids."""
    logits = model.logits(pack([whole(prompt, response)])).float()
    return logits[len(prompt["tokens"]) - 1 : -1]


def forbidden(processor):
    tokenizer = processor.tokenizer
    names = "im_start vision_start vision_end vision_pad image_pad video_pad".split()
    marks = [tokenizer.special[f"<|{name}|>"] for name in names]
    return marks + list(range(tokenizer.n_base + 32, 1024))


def best_ids(logits, processor):
    logits[:, forbidden(processor)] = -torch.inf
    return logits.argmax(-1).tolist()


# --------------------------------------------------------------------------------------------------
# decoding with a cache equals full forward passes


def test_greedy_with_cache_equals_full_forwards(model, processor, prompts):
    # 3 places for 6 rows, packs of 100 tokens: rows wait, enter later, share the cache with others
    limits = [12, 3, 9, 6, 12, 1]
    generator = Generator(model, processor, rows=3, pack_tokens=100)
    responses = generator.sample(prompts, limits, temperature=0)
    for prompt, response, limit in zip(prompts, responses, limits):
        assert len(response.ids) == limit or response.finished
        assert response.ids == best_ids(full_logits(model, prompt, response), processor)


@pytest.mark.parametrize("temperature", [0, 0.7, 1.5])
def test_logprobs_are_those_of_a_full_forward(model, processor, prompts, temperature):
    how = dict(top_k=20, top_p=0.9, seed=3)
    responses = Generator(model, processor).sample(prompts, 10, temperature, **how)
    for prompt, response in zip(prompts, responses):
        logp = (full_logits(model, prompt, response) / (temperature or 1)).log_softmax(-1)
        want = logp[torch.arange(len(response.ids)), response.ids]
        torch.testing.assert_close(torch.tensor(response.logprobs), want, atol=1e-4, rtol=0)


def test_a_row_does_not_depend_on_its_neighbours(model, processor, prompts):
    how = dict(max_new_tokens=15, temperature=1.0, top_k=0, top_p=1.0)
    together = Generator(model, processor).sample(prompts, seed=list(range(6)), **how)
    crowded = Generator(model, processor, rows=2, pack_tokens=60)
    reverse = crowded.sample(prompts[::-1], seed=[5, 4, 3, 2, 1, 0], **how)
    for i, prompt in enumerate(prompts):
        [alone] = Generator(model, processor).sample([prompt], seed=[i], **how)
        assert alone.ids == together[i].ids == reverse[5 - i].ids


def test_seed(model, processor):
    # hot: at temperature 1 fresh weights often repeat the word before
    how = dict(max_new_tokens=12, temperature=8.0, top_k=0, top_p=1.0)
    generator = Generator(model, processor)
    same = [ask("Tell me")] * 3
    texts = generator.generate(same, seed=5, **how)
    assert texts == generator.generate(same, seed=5, **how)
    assert len(set(texts)) == 3  # each row has its own numbers
    fresh = [*generator.generate(same, **how), *generator.generate(same, **how)]
    assert len({*texts, *fresh}) == 9


@pytest.mark.parametrize("stride", [2, 5])
def test_several_tokens_between_two_looks_change_nothing(model, processor, prompts, stride):
    """Rows end within a walk, wait beside others, enter later and go on."""
    end = processor.tokenizer.encode("circle square")
    how = dict(temperature=1.5, top_k=0, top_p=1.0, seed=4, stop=end)
    found = []
    for steps in (1, stride):
        generator = Generator(model, processor, rows=7)
        generator.stride = steps

        def extend(row):
            if row.response.extensions or row.index % 2:
                return None
            row.left = 12
            return generator.next_turn(row, "And now?")

        limits = [9 + 4 * (i % 5) for i in range(12)]
        found.append(generator.sample(prompts * 2, limits, extend=extend, **how))
    for one, other in zip(*found):
        assert one.ids == other.ids and one.positions == other.positions
        assert one.sampled == other.sampled and one.finished == other.finished
        want = torch.tensor(one.logprobs)
        torch.testing.assert_close(torch.tensor(other.logprobs), want, atol=1e-5, rtol=0)
    assert len({len(response.ids) for response in found[0]}) > 3
    # a penalty and a reader need each token before the next
    pieces = []
    how = dict(max_new_tokens=12, temperature=1.5, top_k=0, seed=1)
    [said] = generator.generate([ask("Hi")], **how)
    generator.generate([ask("Hi")], **how, stream=lambda i, piece: pieces.append(piece))
    assert "".join(pieces) == said and len(pieces) > 1
    penalised = generator.generate([ask("Hi")], **how, repetition_penalty=1.8)
    plain = Generator(model, processor)
    assert penalised == plain.generate([ask("Hi")], **how, repetition_penalty=1.8) != [said]


def watched_steps(model, monkeypatch):
    """A list that fills with (rows, tokens) of each step of the model."""
    steps = []
    plain, plain_one = model.step, model.step_one

    def step(batch, cache, rows):
        steps.append((len(rows), len(batch["tokens"])))
        return plain(batch, cache, rows)

    def step_one(tokens, *how):
        steps.append((len(tokens), len(tokens)))
        return plain_one(tokens, *how)

    monkeypatch.setattr(model, "step", step)
    monkeypatch.setattr(model, "step_one", step_one)
    return steps


def test_what_several_rows_are_asked_is_read_once(model, processor, prompts, monkeypatch):
    """And they say what they would say alone, with the same probabilities."""
    how = dict(max_new_tokens=8, temperature=1.0, top_k=0, top_p=1.0, seed=list(range(8)))
    shared = [prompts[i] for i in (2, 2, 2, 4, 2, 4, 0, 4)]
    apart = Generator(model, processor).sample([dict(sample) for sample in shared], **how)
    steps = watched_steps(model, monkeypatch)
    seen = []
    vit = model.vit.forward
    monkeypatch.setattr(model.vit, "forward", lambda p, *a: seen.append(len(p)) or vit(p, *a))
    together = Generator(model, processor).sample(shared, **how)
    assert steps[0] == (3, sum(len(prompts[i]["tokens"]) for i in (2, 4, 0)))
    assert seen == [sum(len(prompts[i]["patches"]) for i in (2, 4, 0))]
    for one, other in zip(together, apart):
        assert one.ids == other.ids and one.positions == other.positions
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs))
    # the budget of a pack counts it once too, and few places are no fault
    steps.clear()
    crowded = Generator(model, processor, rows=3, pack_tokens=len(prompts[2]["tokens"]))
    again = crowded.sample(shared, **how)
    assert [one.ids for one in again] == [one.ids for one in together]
    assert steps[0] == (1, len(prompts[2]["tokens"]))


def test_rows_that_wait_for_a_later_turn_stand_among_those_that_are_decoded(
    model, processor, prompts
):
    """A fifth of the rows must wait before they read on: the others go past them, and they end."""
    generator = Generator(model, processor, rows=11)
    asked = [prompts[i % 6] for i in range(14)]
    limits = [2, 9, 4, 3, 9, 9, 5, 9, 2, 9, 7, 3, 4, 5]

    def extend(row):
        if row.response.extensions or row.index % 3:
            return None
        row.left = 6
        [message] = ask(picture(40, 50, row.index), "So?")["messages"]
        return generator.next_turn(row, message["content"])

    responses = generator.sample(asked, limits, temperature=0, extend=extend)
    assert [len(response.extensions) for response in responses] == [1, 0, 0] * 4 + [1, 0]
    for prompt, response in zip(asked, responses):
        own = torch.tensor(response.sampled)
        logits = full_logits(model, prompt, response)
        logp = logits.log_softmax(-1)[torch.arange(len(own)), response.ids]
        want = torch.where(own, logp, 0)
        torch.testing.assert_close(torch.tensor(response.logprobs), want, atol=1e-4, rtol=0)
        best = torch.tensor(best_ids(logits, processor))
        assert torch.tensor(response.ids)[own].tolist() == best[own].tolist()


def test_finished_rows_leave_and_prefill_is_bounded(model, processor, prompts, monkeypatch):
    steps = watched_steps(model, monkeypatch)
    same = [dict(prompts[0]) for _ in range(4)]
    Generator(model, processor, pack_tokens=50).sample(same, [2, 3, 3, 5], temperature=0)
    length = len(prompts[0]["tokens"])
    prefills = [step for step in steps if step[1] >= length]
    assert len(prefills) > 1 and sum(rows for rows, _ in prefills) == 4
    assert all(tokens <= 50 for _, tokens in prefills)
    assert [rows for rows, tokens in steps if tokens < length] == [4, 3, 1, 1]
    steps.clear()
    same = [dict(prompts[0]) for _ in range(5)]
    Generator(model, processor, rows=2).sample(same, [1, 6, 2, 2, 2], temperature=0)
    assert max(rows for rows, _ in steps) == 2  # never more than the cache has places


def moved(schedule):
    """Lets the next group move, and returns its indices."""
    group = schedule.next_group()
    for row in group:
        row.unread = None
        row.response.ids.append(0)
    return [row.index for row in group]


def test_rows_enter_a_quarter_of_the_cache_at_a_time():
    rows = [Row(i, {"tokens": range(5)}, 9, random.Random(i)) for i in range(12)]
    schedule = Schedule(rows, places=8, pack_tokens=100)
    assert moved(schedule) == moved(schedule) == [0, 1, 2, 3, 4, 5, 6, 7]
    schedule.leave(rows[3])
    assert moved(schedule) == [0, 1, 2, 7, 4, 5, 6]  # the last takes the place of one that leaves
    assert schedule.leave(rows[6]) == 6 and rows[7].slot == 3
    assert moved(schedule) == [8, 9]
    assert moved(schedule) == [0, 1, 2, 7, 4, 5, 8, 9]
    assert [row.slot for row in schedule.active] == list(range(8))
    for row in (rows[0], rows[1]):
        schedule.leave(row)
    assert moved(schedule) == [10, 11] and not schedule.waiting
    for row in list(schedule.active):
        schedule.leave(row)
    assert moved(schedule) == []


def test_later_turns_wait_for_a_fifth_of_the_rows():
    rows = [Row(i, {"tokens": range(5)}, 9, random.Random(i)) for i in range(10)]
    schedule = Schedule(rows, places=10, pack_tokens=100)
    assert moved(schedule) == list(range(10))
    rows[4].unread = {"tokens": range(60)}
    assert moved(schedule) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    rows[7].unread = {"tokens": range(60)}
    assert moved(schedule) == [4]  # both at once would not fit into a pack


def test_more_turns_with_pictures_equal_full_forwards(model, processor, prompts):
    """A tool's picture in the turn, then a user's turn after a cut-off answer; the cache grows."""
    generator = Generator(model, processor, rows=2)

    def extend(row):
        row.left = 5
        if not row.response.extensions:
            shown = ask("<tool>", picture(70, 90, 8))["messages"][0]["content"]
            return processor.extension(shown, row.next_position)
        if len(row.response.extensions) == 1 and row.index != 1:
            content = ask(picture(50, 40, 9), "And now?")["messages"][0]["content"]
            return generator.next_turn(row, content)
        return None

    responses = generator.sample(prompts[:4], 5, temperature=0, extend=extend)
    assert [len(response.extensions) for response in responses] == [2, 1, 2, 2]
    for prompt, response in zip(prompts, responses):
        logits = full_logits(model, prompt, response)
        own = torch.tensor(response.sampled)
        ids = torch.tensor(response.ids)
        logp = logits.log_softmax(-1)[torch.arange(len(ids)), ids]
        want = torch.where(own, logp, 0)
        torch.testing.assert_close(torch.tensor(response.logprobs), want, atol=1e-4, rtol=0)
        best = torch.tensor(best_ids(logits, processor))
        assert ids[own].tolist() == best[own].tolist()
    text = processor.tokenizer.decode(responses[0].extensions[1]["tokens"])
    assert text.startswith("<|im_end|>\n<|im_start|>user\n<|vision_start|>")
    assert text.endswith("And now?<|im_end|>\n<|im_start|>assistant\n")


def test_next_turn_after_a_finished_answer_is_the_template(model, processor, rigged):
    end = processor.tokenizer.special["<|im_end|>"]
    rigged(lambda n: peak([end]))
    generator = Generator(model, processor)

    def extend(row):
        return None if row.response.extensions else generator.next_turn(row, "Second?")

    first = processor(ask("First?"), generate=True)
    [response] = generator.sample([first], 5, extend=extend)
    talk = [("user", "First?"), ("assistant", ""), ("user", "Second?")]
    messages = [{"role": role, "content": content} for role, content in talk]
    template = processor({"messages": messages}, generate=True)["tokens"].tolist()
    assert first["tokens"].tolist() + response.ids == template + [end]


@torch.no_grad()
def test_a_step_of_one_token_each_is_a_step(model):
    """Rows of different lengths; the cache's later rows and places hold poison."""
    cache = model.new_cache(4, 30)
    cache.k[:] = cache.v[:] = torch.nan
    lengths = [7, 20, 3]
    empty = {"patches": torch.zeros(0, 588), "grids": torch.zeros(0, 3, dtype=torch.long)}

    def text(n):
        places = torch.arange(n)
        return empty | {"tokens": places + 40, "labels": places, "positions": places.expand(3, -1)}

    model.step(pack([text(n - 1) for n in lengths]), cache, [0, 1, 2])
    before = torch.tensor(cache.lengths[:3])
    hidden = model.step_one(before + 40, before, before, cache, 20)
    want = torch.stack([model.hidden(pack([text(n)]))[-1] for n in lengths])
    torch.testing.assert_close(hidden, want, atol=2e-5, rtol=1e-5)
    assert cache.lengths == [6, 19, 2, 0] and cache.k[:, 3].isnan().all()
    cache.copy(1, 3)
    assert cache.lengths == [6, 19, 2, 19]
    assert torch.equal(cache.v[:, 3, :19], cache.v[:, 1, :19]) and cache.v[:, 3, 19:].isnan().all()


# --------------------------------------------------------------------------------------------------
# the choice of a token


def reference(logits, temperature, top_k, top_p, banned):
    """Shares after temperature, then top-k, then top-p, by sorting in numpy."""
    x = logits.double().numpy() / temperature
    x[banned] = -np.inf
    p = np.exp(x - x.max())
    order = np.argsort(-p)[: top_k or None]
    p /= p[order].sum()
    keep = []
    total = 0.0
    for i in order:
        keep.append(i)
        total += p[i]
        if total >= top_p:
            break
    out = np.zeros_like(p)
    out[keep] = p[keep] / p[keep].sum()
    return out


@pytest.mark.parametrize(
    "temperature, top_k, top_p",
    [(1, 0, 1.0), (0.6, 20, 0.95), (1.3, 5, 1.0), (1, 0, 0.7), (0.5, 3, 0.5)],
)
def test_frequencies_against_numpy(temperature, top_k, top_p):
    n = 40_000
    rng = random.Random(7)
    draws = [rng.random() for _ in range(n)]
    logits = torch.randn(40, generator=torch.Generator().manual_seed(1)) * 1.5
    banned = [int(logits.argmax()), 11]
    want = reference(logits, temperature, top_k, top_p, banned)
    how = (temperature, top_k, top_p, torch.tensor(banned))
    ids, logprobs = choose(logits.expand(n, -1), draws, *how)
    seen = np.bincount(ids, minlength=40)
    assert seen[want == 0].sum() == 0
    support = want > 0
    chi2 = ((seen - n * want)[support] ** 2 / (n * want[support])).sum()
    df = support.sum() - 1
    assert chi2 < df + 4 * np.sqrt(2 * df) + 4
    # untruncated
    torch.testing.assert_close(logprobs, (logits / temperature).log_softmax(-1)[ids])


def test_the_penalty_is_hugging_faces():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 50, generator=g) * 3
    read = [[4, 4, 9, 30], list(range(50)), [7]]
    none = torch.tensor([], dtype=torch.long)
    for penalty in (0.7, 1.8):
        theirs = RepetitionPenaltyLogitsProcessor(penalty)
        want = torch.stack([theirs(torch.tensor([r]), x[None])[0] for r, x in zip(read, logits)])
        how = (none, penalty, [set(ids) for ids in read])
        ids, logprobs = choose(logits, [], 0, 0, 1.0, *how)
        assert ids.tolist() == want.argmax(-1).tolist()
        # what a trainer computes again
        assert torch.equal(logprobs, logits.log_softmax(-1)[torch.arange(3), ids])
        n = 20_000
        draws = [(i + 0.5) / n for i in range(n)]
        how = (none, penalty, [set(read[0])] * n)
        ids, _ = choose(logits[:1].expand(n, -1), draws, 0.8, 0, 1.0, *how)
        shares = torch.bincount(ids, minlength=50) / n
        torch.testing.assert_close(shares, (want[0] / 0.8).softmax(-1), atol=1e-4, rtol=0)


def test_a_penalty_counts_what_was_read_and_written(model, processor, prompts):
    """The prompt, its own words, and a second turn."""
    generator = Generator(model, processor)

    def extend(row):
        row.left = 8
        return None if row.response.extensions else generator.next_turn(row, "circle square")

    how = dict(max_new_tokens=20, temperature=0, repetition_penalty=1.5, extend=extend)
    penalise = RepetitionPenaltyLogitsProcessor(1.5)
    for prompt, response in zip(prompts, generator.sample(prompts, **how)):
        logits = full_logits(model, prompt, response)
        read = prompt["tokens"].tolist() + response.ids
        for i in range(len(response.ids)):
            if response.sampled[i]:
                before = torch.tensor([read[: len(prompt["tokens"]) + i]])
                assert best_ids(penalise(before, logits[i][None]), processor) == [response.ids[i]]


def test_the_ends_of_the_distribution():
    logits = torch.tensor([[-torch.inf, 5.0, -torch.inf, 4.0, -torch.inf]]).expand(2, -1)
    nothing = torch.tensor([], dtype=torch.long)
    for top_k, top_p in ((0, 1.0), (3, 1.0), (0, 0.99)):
        ids, _ = choose(logits, [0.0, 1 - 2**-53], 1.0, top_k, top_p, nothing)
        assert ids.tolist() == [1, 3]


@pytest.mark.parametrize("temperature", [1e-20, 1e-40, 1e-310])
def test_next_to_no_temperature_is_none(temperature):
    """In fp32 logits over it would overflow, or it be 0."""
    logits = 30 * torch.randn(8, 5000, generator=torch.Generator().manual_seed(0))
    logits[:, 7] = 50 + logits.amax(-1)  # negative ones, and a large one, banned
    how = ([0.999] * 8, 0, 1.0, torch.tensor([7]))
    want = logits.index_fill(1, how[-1], -math.inf).argmax(-1)
    ids, logprobs = choose(logits, how[0], temperature, *how[1:])
    assert torch.equal(ids, want) and not logprobs.isnan().any()


@pytest.fixture
def rigged(model, monkeypatch):
    """Adds to the logits what the test says."""
    plain = model.head

    def rig(add):
        monkeypatch.setattr(model, "head", lambda hidden: plain(hidden) + add(len(hidden)))

    return rig


def peak(ids, height=1e4):
    logits = torch.zeros(1024)
    logits[ids] = height
    return logits


@pytest.mark.parametrize("vocab", [3, 512, 513, 20_000])
def test_a_token_is_drawn_where_the_distribution_function_passes_the_draw(vocab):
    """numpy's sums in float64; ids at both ends have no share, and whole parts have none."""
    p = torch.randn(40, vocab, generator=torch.Generator().manual_seed(vocab)).mul(3).exp()
    p[:, -1] = 0
    p[1::2, 0] = 0
    p[::5, vocab // 3 + 1 :] = 0
    share = torch.rand(40, 1, dtype=torch.float64)
    share[:6, 0] = torch.tensor([0.0, 0.0, 1 - 2**-53, 1 - 2**-53, 1.0, 1.0])
    ids = first_beyond(p, share)[:, 0]
    cdf = p.numpy().astype("float64").cumsum(1)
    for row, i, below in zip(cdf, ids.tolist(), share[:, 0].tolist()):
        assert row[i] - (row[i - 1] if i else 0) > 0, "never a token without a share"
        assert row[i] >= below * row[-1] * (1 - 1e-12)
        assert i == 0 or row[i - 1] <= below * row[-1] * (1 + 1e-12)


def test_banned_tokens_are_never_sampled(model, processor, prompts, rigged):
    rigged(lambda n: peak(forbidden(processor), 60.0))
    generator = Generator(model, processor)
    for temperature in (0, 1.0):
        drawn = set()
        for response in generator.sample(prompts, 20, temperature, top_k=0, top_p=1.0, seed=1):
            drawn |= set(response.ids)
        assert not drawn & set(forbidden(processor)) and len(drawn) > 1
        processor.tokenizer.decode(sorted(drawn))  # every one has a text


@pytest.mark.parametrize("name", ["<|im_end|>", "<|endoftext|>"])
def test_stop_tokens(model, processor, prompts, rigged, name):
    stop = processor.tokenizer.special[name]
    rigged(lambda n: peak([stop]))
    generator = Generator(model, processor)
    for response in generator.sample(prompts, 20, seed=0):
        assert response.ids == [stop] and response.sampled == [True] and response.finished
        assert len(response.logprobs) == 1
    assert generator.generate([ask("Hello")], max_new_tokens=20) == [""]


def test_limits_and_further_stops(model, processor, prompts, rigged):
    word = processor.tokenizer.encode(" circle")[0]
    rigged(lambda n: peak([word]))
    generator = Generator(model, processor)
    responses = generator.sample(prompts[:3], [4, 1, 2], temperature=0)
    assert [response.ids for response in responses] == [[word] * 4, [word], [word] * 2]
    assert not any(response.finished for response in responses)
    [response] = generator.sample(prompts[:1], 9, stop=[word])
    assert response.ids == [word] and response.sampled == [True] and response.finished
    assert response.logprobs == [pytest.approx(0, abs=1e-3)]
    assert response.positions == [[prompts[0]["next_position"]] * 3]
    assert response.extensions == response.observations == []


@pytest.mark.parametrize(
    "text, cut", [("a🎉b 你好，circle 👩‍👩‍👧", 0), ("naïve 🎉", 1), ("plain text", 0)]
)
def test_streamed_pieces(model, processor, rigged, text, cut):
    tokenizer = processor.tokenizer
    ids = tokenizer.encode(text)
    ids = ids[:-1] if cut else ids + [tokenizer.special["<|im_end|>"]]
    script = iter(ids)
    rigged(lambda n: peak([next(script)]))
    pieces = []

    def stream(i, piece):
        assert i == 0
        pieces.append(piece)

    how = dict(max_new_tokens=len(ids), stream=stream)
    [said] = Generator(model, processor).generate([ask("Hello")], **how)
    assert "".join(pieces) == said == tokenizer.decode(ids, skip_special=True)
    assert len(pieces) > 1
    if not cut:
        assert said == text and not any("\ufffd" in piece for piece in pieces)


def test_clear_errors(model, processor, prompts):
    generator = Generator(model, processor)
    cases = [
        dict(temperature=-1),
        dict(temperature=math.nan),
        dict(temperature=math.inf),
        dict(top_p=0),
        dict(top_p=1.1),
        dict(top_k=-1),
        dict(max_new_tokens=0),
        dict(max_new_tokens=[1]),
        dict(seed=[1]),
        dict(repetition_penalty=0),
        dict(repetition_penalty=1e-40),
        dict(repetition_penalty=math.nan),
    ]
    for wrong in cases:
        with pytest.raises(ValueError, match="needs|max_new_tokens"):
            generator.sample(prompts[:2], **wrong)
    with pytest.raises(ValueError, match="last, assistant's message"):
        generator.generate([{"messages": [{"role": "assistant", "content": "x"}]}])
    other = KeyeVL.empty(PRESETS["toy"])
    other.config = type(other.config)(**other.config.__dict__ | {"image_token_id": 5})
    with pytest.raises(ValueError, match="image_pad"):
        Generator(other, processor)
    assert generator.sample([]) == []


def test_small_models_answer_in_fewer_tokens():
    assert [max_answer(PRESETS[size]) for size in ("toy", "small")] == [192, 192]
    assert [max_answer(PRESETS[size]) for size in ("0.6b", "8b")] == [2048, 2048]


@pytest.mark.cuda
def test_fp32_weights_on_cuda(processor, prompts):
    torch.manual_seed(0)
    model = KeyeVL.empty(PRESETS["toy"]).init_weights().cuda()
    generator = Generator(model, processor, rows=4)
    responses = generator.sample(prompts, 20, 1.0, 0, 1.0, seed=2)
    again = generator.sample(prompts, 20, 1.0, 0, 1.0, seed=2)
    assert [response.ids for response in responses] == [response.ids for response in again]
    for prompt, response in zip(prompts, responses):
        batch = pack([whole(prompt, response)])
        for key in ("tokens", "labels", "positions", "patches"):
            batch[key] = batch[key].cuda()
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            logits = model.logits(batch).float()[len(prompt["tokens"]) - 1 : -1]
        logp = logits.log_softmax(-1).cpu()
        want = logp[torch.arange(len(response.ids)), response.ids]
        torch.testing.assert_close(torch.tensor(response.logprobs), want, atol=0.1, rtol=0)


@pytest.mark.cuda
def test_graphs_change_nothing(processor, prompts, monkeypatch):
    """Rows end one after the other, some go on, the cache grows: fp32, the same tokens."""
    torch.manual_seed(0)
    model = KeyeVL.empty(PRESETS["toy"]).init_weights().cuda()
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda g: replays.append(g) or replay(g))
    found = []
    for graphs in (False, True):
        generator = Generator(model, processor, rows=7, graphs=graphs)
        generator.bf16 = False
        generator.stride = 8 if graphs else 1

        def extend(row):
            if row.response.extensions or row.index % 4:
                return None
            row.left = 30
            return generator.next_turn(row, "And now? " * 40)

        limits = [20 + 7 * (i % 5) for i in range(12)]
        how = dict(temperature=1.0, top_k=0, top_p=1.0, seed=2, extend=extend)
        found.append(generator.sample(prompts * 2, limits, **how))
        assert bool(replays) == graphs
    for plain, one in zip(*found):
        assert plain.ids == one.ids and plain.positions == one.positions
        want = torch.tensor(plain.logprobs)
        torch.testing.assert_close(torch.tensor(one.logprobs), want, atol=1e-4, rtol=0)
    assert len(set(map(id, replays))) >= 2  # graphs for different numbers of rows


def test_a_larger_graph_serves_until_a_smaller_one_pays(monkeypatch):
    monkeypatch.setattr(generate, "STEPS_BEFORE_GRAPH", 16)
    graphs = generate.Graphs("cpu")
    assert graphs.size(300, most=400, steps=8) == 400  # none is there yet
    graphs.graphs[400] = ...
    assert [graphs.size(n, 400, 8) for n in (257, 65, 64, 120, 3)] == [400] * 5
    assert graphs.size(100, 400, 8) == 128  # 65 to 128 rows have taken 24 steps
    graphs.graphs[128] = ...
    assert [graphs.size(n, 400, 8) for n in (129, 128, 20, 3)] == [400, 128, 128, 128]
    assert graphs.size(4, 400, 1) == 4
    assert generate.Graphs("cpu", used=False).size(100, 400, 8) == 100


@pytest.mark.cuda
def test_graphs_in_bf16(processor, prompts, monkeypatch):
    """By the decoding kernel: log-probabilities are those of a full forward."""
    torch.manual_seed(0)
    model = KeyeVL.empty(PRESETS["toy"]).init_weights().cuda().bfloat16()
    monkeypatch.setattr(generate, "STEPS_BEFORE_GRAPH", 1)
    responses = Generator(model, processor).sample(prompts, 60, 1.0, 0, 1.0, seed=2)
    for prompt, response in zip(prompts, responses):
        batch = pack([whole(prompt, response)])
        for key in ("tokens", "labels", "positions", "patches"):
            batch[key] = batch[key].cuda()
        with torch.no_grad():
            logits = model.logits(batch).float()[len(prompt["tokens"]) - 1 : -1]
        logp = logits.log_softmax(-1).cpu()
        want = logp[torch.arange(len(response.ids)), response.ids]
        torch.testing.assert_close(torch.tensor(response.logprobs), want, atol=0.15, rtol=0)


# --------------------------------------------------------------------------------------------------
# the command line


def test_what_a_terminal_would_obey_is_spelled_out():
    text = "a\tb\nc\x1b[2J\r\x07\x9b\x00\x7f é 👩‍👩‍👧 \\"
    assert generate.visible(text) == "a\tb\nc\\x1b[2J\\r\\x07\\x9b\\x00\\x7f é 👩‍👩‍👧 \\"


@pytest.mark.parametrize("prompt", [["What?"], []])
def test_no_answer_commands_the_terminal(folder, capsys, monkeypatch, typed, prompt):
    typed(["What?"])
    shown = call("print('ab' + chr(27) + '[31m' + chr(155))")
    said = f"red\x1b]0;title\x07\x1b[2J\r{shown}blue\x08"
    scripted(monkeypatch, lambda prompt: said)
    generate.main(["--init", str(folder), "--device", "cpu", *prompt])
    out = capsys.readouterr().out
    assert "\\x1b]0;title\\x07\\x1b[2J\\r" in out and out.rstrip().endswith("blue\\x08")
    assert not set(map(chr, [*range(9), *range(11, 32), *range(127, 160)])) & set(out)



def test_command_line(folder, tmp_path):
    picture(90, 70).save(tmp_path / "x.png")
    command = [sys.executable, "generate.py", "--init", str(folder), "--device", "cpu"]
    command += ["--image", str(tmp_path / "x.png"), "--seed", "1", "--max-new-tokens", "8"]
    command += ["How many circles?"]
    how = dict(cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    one = subprocess.run(command, **how)
    two = subprocess.run(command, **how)
    assert one.returncode == 0, one.stderr
    assert one.stdout.strip() and one.stdout == two.stdout
    assert "8 written" in one.stderr and "tok/s" in one.stderr


def test_any_question_and_any_terminal(folder):
    """A lone surrogate as bytes on the command line become, and a terminal of ASCII."""
    command = [sys.executable, "generate.py", "--init", str(folder), "--device", "cpu"]
    command += ["--max-new-tokens", "8", b"What \xff\xed\xa0\x80 \x1b \xe6\x95\xb0?"]
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, stdin=subprocess.DEVNULL, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii() and b"8 written" in done.stderr


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--init", "nowhere", "Hi"], "nowhere"),
        (["--init", "{folder}", "--image", "{tmp}/none.png", "Hi"], "none.png: missing"),
        (["--init", "{folder}", "--image", "{tmp}/bad.png", "Hi"], "bad.png: unsupported"),
        (["--init", "{folder}", "--video", "{tmp}/bad.png", "Hi"], "bad.png"),
        (["--init", "{folder}", "--temperature", "-1", "Hi"], "temperature"),
        (["--init", "{folder}", "--max-new-tokens", "0", "Hi"], "needs max_new_tokens >= 1, got 0"),
        (["--init", "{folder}", "--serve", "--max-new-tokens", "0"], "--max-new-tokens must be"),
        (["--init", "{folder}", "--video", "{tmp}/x.webp", "--fps", "0", "Hi"], "fps"),
        (["--init", "{folder}"], "no question"),
        (["--init", "{folder}", "--device", "abacus", "Hi"], "abacus"),
        (["--init", "{folder}", "--device", "cuda:99", "Hi"], "CUDA"),
        (["--init", "{folder}", "--image", "", "Hi"], "'': missing (an empty path)"),
        (["--init", "{folder}", "--image", "{tmp}", "Hi"], "unsupported (not a regular file)"),
    ],
)
def test_command_line_errors(folder, tmp_path, argv, message, capsys, monkeypatch):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    clip = [picture(60, 50, seed) for seed in range(3)]
    clip[0].save(tmp_path / "x.webp", save_all=True, append_images=clip[1:], duration=500)
    monkeypatch.setattr(sys, "stdin", open("/dev/null"))
    with pytest.raises(SystemExit) as error:
        generate.main([word.format(folder=folder, tmp=tmp_path) for word in argv])
    assert message in f"{error.value}{capsys.readouterr().err}" and error.value.code != 0


@pytest.fixture
def typed(monkeypatch):
    """typed(lines): a terminal on which these are typed, and then its end. Returns those read."""

    def use(lines):
        left = iter(lines)
        read = []

        def read_line(prompt):
            line = next(left, None)
            if line is None:
                raise EOFError
            read.append(line)
            return line

        terminal = type("Terminal", (), {"isatty": lambda self: True})
        monkeypatch.setattr(sys, "stdin", terminal())
        monkeypatch.setattr("builtins.input", read_line)
        return read

    return use


def test_chat(folder, tmp_path, capsys, monkeypatch, typed):
    picture(90, 70).save(tmp_path / "x.png")
    attached = [f"/image {tmp_path}/none.png", "here?", f"/image {tmp_path}/x.png", "and there?"]
    typed(["How many?", "", *attached])
    turns = []
    plain = Generator.next_turn

    def watched(self, row, content, root):
        turns.append([item["type"] for item in content])
        return plain(self, row, content, root)

    monkeypatch.setattr(Generator, "next_turn", watched)
    command = ["--init", str(folder), "--image", str(tmp_path / "x.png"), "--max-new-tokens", "4"]
    generate.main([*command, "--seed", "3", "--device", "cpu"])
    out = capsys.readouterr()
    # the first failed with a message, and the chat went on
    assert turns == [["image", "text"], ["image", "text"]]
    assert "none.png: missing" in out.err and out.out.strip()


def chat(folder, monkeypatch, lines, *flags):
    """A chat with these lines in a pipe; returns the prompts that the model has read."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    prompts = scripted(monkeypatch, lambda prompt: "so it is")
    generate.main(["--init", str(folder), "--device", "cpu", *flags])
    return prompts


def test_questions_from_a_pipe_are_one_chat(folder, tmp_path, capsys, monkeypatch):
    picture(90, 70).save(tmp_path / "a b.png")
    lines = f"First?\n\n/image '{tmp_path}/a b.png'\nSecond?\n/new\nThird?"
    first, third = chat(folder, monkeypatch, lines)  # the second question went on behind the first
    assert "First?" in first and "Third?" in third and "First?" not in third
    out = capsys.readouterr().out.splitlines()
    assert out[0] == out[-1] == "so it is" and len(out) >= 3 and "> " not in out


def test_a_line_that_cannot_be_asked_is_said_and_counted(folder, capsys, monkeypatch):
    lines = "/image nowhere.png\nHere?\n/imgae x.png\nThere?\n"
    with pytest.raises(SystemExit, match="2 lines could not be asked"):
        chat(folder, monkeypatch, lines)
    out = capsys.readouterr()
    assert out.out == "so it is\n"  # to the second question
    assert "nowhere.png: missing" in out.err and "/imgae is none of these" in out.err


def test_what_the_command_line_shows_waits_for_a_question_that_can_be_asked(
    folder, tmp_path, monkeypatch
):
    picture(90, 70).save(tmp_path / "x.png")
    lines = "/image nowhere.png\nHere?\nThere?\n/new\nAnd now?\n"
    asked = []
    plain = generate.Chat.ask

    def watched(self, content):
        asked.append([item["type"] for item in content])
        return plain(self, content)

    monkeypatch.setattr(generate.Chat, "ask", watched)
    with pytest.raises(SystemExit, match="1 lines could not be asked"):
        chat(folder, monkeypatch, lines, "--image", str(tmp_path / "x.png"))
    assert asked == [["image", "image", "text"], ["image", "text"], ["text"]]


def test_what_is_dropped_with_a_question_is_said(folder, tmp_path, capsys, monkeypatch):
    picture(90, 70).save(tmp_path / "x.png")
    lines = f"First?\n/video\nWhere?\n/image {tmp_path}/x.png\n/video none.mp4\nWhat?\nNow?\n"
    with pytest.raises(SystemExit, match="2 lines could not be asked"):
        chat(folder, monkeypatch, lines)
    out = capsys.readouterr()
    assert "\nline 3: '': missing (an empty path)\nline 6: none.mp4: missing (" in out.err
    assert out.err.endswith(f")\nno longer attached: {tmp_path}/x.png, none.mp4\n")
    assert out.out.startswith("so it is\n") and out.out.count("\n") == 2


@pytest.mark.parametrize("attached", [False, True])
def test_bytes_that_are_no_text_end_their_question_alone(folder, tmp_path, attached):
    """Paths may hold any bytes. What terminals are taken to say, says PYTHONIOENCODING."""
    path = os.fsencode(tmp_path) + b"/\xff.png"
    picture(90, 70).save(path)
    command = [sys.executable, "generate.py", "--init", str(folder), "--device", "cpu"]
    env = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    lines = b"One?\n/image %b\nTwo%b?\nThree?\n" % (path, b"" if attached else b" \xff\xe6")
    done = subprocess.run(
        [*command, "--max-new-tokens", "2"], input=lines, cwd=ROOT, capture_output=True, env=env
    )
    refused = b"line 3: this question is no UTF-8, so it was not asked\nno longer attached: "
    assert (refused in done.stderr) == (not attached) and b"Traceback" not in done.stderr
    assert done.returncode == (not attached) and done.stdout.count(b"\n") >= 2 + attached


def test_the_mark_at_a_files_beginning_is_no_text(folder, monkeypatch):
    [prompt] = chat(folder, monkeypatch, "\ufeff/think\nFirst?\n")
    assert "First?/think<" in prompt and "\ufeff" not in prompt


def test_fps_holds_for_clips_of_a_chat(folder, tmp_path, monkeypatch):
    clip = [picture(60, 50, seed) for seed in range(8)]
    clip[0].save(tmp_path / "x.webp", save_all=True, append_images=clip[1:], duration=500)
    lines = f"/video {tmp_path}/x.webp\nWhat?\n/image {tmp_path}/x.webp\nAnd here?\n"
    pads = [
        chat(folder, monkeypatch, lines, "--fps", fps)[0].count("<|video_pad|>")
        for fps in ("0.5", "1")
    ]
    assert 2 * pads[0] == pads[1] > 0


def short_sighted(folder, tmp_path, context):
    """The model with a context of so many tokens."""
    shutil.copytree(folder, tmp_path / "short")
    config = json.loads((tmp_path / "short" / "config.json").read_text())
    config["max_position_embeddings"] = context
    (tmp_path / "short" / "config.json").write_text(json.dumps(config))
    return tmp_path / "short"


def test_an_answer_ends_where_the_context_does(folder, tmp_path, capsys, monkeypatch):
    command = ["--init", str(short_sighted(folder, tmp_path, 64)), "--device", "cpu"]
    scripted(monkeypatch, lambda prompt: "so it is, " * 50)
    generate.main([*command, "--max-new-tokens", str(10**9), "What?"])
    counts = re.search(r"(\d+) tokens read, (\d+) written", capsys.readouterr().err)
    assert sum(map(int, counts.groups())) == 64
    with pytest.raises(SystemExit, match="question has .* tokens, and the model's context is 64: "):
        generate.main([*command, "What? " * 50])


def test_a_chat_that_fills_the_context_says_so(folder, tmp_path, capsys, monkeypatch):
    lines = "First?\n" + "And then? " * 9 + "\n/new\nThird?\n"
    short = short_sighted(folder, tmp_path, 64)
    with pytest.raises(SystemExit, match="1 lines could not be asked"):
        chat(short, monkeypatch, lines, "--max-new-tokens", str(10**9))
    out = capsys.readouterr()
    assert out.out == "so it is\n" * 2
    [why] = re.findall("line 2: (.*)", out.err)
    assert re.fullmatch(r"the conversation has \d+ tokens, this .* context is 64: /new .*", why)


def test_switches_hold_until_the_next_one(folder, monkeypatch):
    lines = ["/think", "A?", "/new", "B?/no_think", "/new", "C?", "/new", "/auto_think", "D?"]
    prompts = chat(folder, monkeypatch, "\n".join(lines))
    asked = [re.search(r"\b([A-D]\?\S*?)<", prompt)[1] for prompt in prompts]
    assert asked == ["A?/think", "B?/no_think", "C?/think", "D?"]


def test_thinking_is_dim_on_a_terminal_alone(capsys, monkeypatch):
    pieces = ["<ana", "lysis>hm</anal", "ysis>a<b <", "think>", "x", "</think>\x1b[31m", "c<thi"]

    def shown():
        screen = generate.Screen()
        for piece in pieces:
            screen.write(piece)
        screen.end()
        return capsys.readouterr().out

    plain = "<analysis>hm</analysis>a<b <think>x</think>\\x1b[31mc<thi\n"
    assert shown() == plain
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    dim, end = "\x1b[2m", "\x1b[0m"
    assert shown() == (
        f"{dim}<analysis>hm</analysis>{end}a<b {dim}<think>x</think>{end}\\x1b[31mc<thi{end}\n"
    )
    monkeypatch.setenv("NO_COLOR", "1")
    assert shown() == plain


# --------------------------------------------------------------------------------------------------
# tools on the command line; test_rollout.py has the rest of them

STEP = Generator.step


def scripted(monkeypatch, say):
    """Every row writes what `say` makes of its prompt's text, whatever the model says, and ends.

    Returns the list of prompts, which fills as they are read.
    """
    prompts = []

    def step(self, rows, cache):
        tokenizer = self.processor.tokenizer
        for row in rows:
            if row.unread and not row.response.ids:
                prompts.append(tokenizer.decode(row.unread["tokens"]))
                row.script = iter(tokenizer.encode(say(prompts[-1]), added=True))
        logits = STEP(self, rows, cache)
        for i, row in enumerate(rows):
            logits[i] += peak([next(row.script, tokenizer.special["<|im_end|>"])])
        return logits

    monkeypatch.setattr(Generator, "step", step)
    return prompts


def call(code):
    return f"<tool_call>{code}</tool_call>"


def test_a_question_with_tool_calls(folder, processor, tmp_path, capsys, monkeypatch):
    picture(90, 70).save(tmp_path / "x.png")
    calls = call("crop(0, 0, 500, 500)\nprint(6 * 7)") + call("crop(1)") + call("image(2)")
    text = calls + "it is red"
    prompts = scripted(monkeypatch, lambda prompt: text)
    command = ["--init", str(folder), "--image", str(tmp_path / "x.png"), "--device", "cpu"]
    generate.main([*command, "What?/agentic_think"])
    out = capsys.readouterr()
    # image(2) is what the first call had cropped
    shown = re.findall(r"\n\[sandbox: (.*), (\d) pictures\]\n", out.out)
    error = "error: line 1: use crop(x1, y1, x2, y2)"
    assert shown == [("42", "1"), (error, "0"), ("no text", "1")]
    assert out.out.endswith("[sandbox: no text, 1 pictures]\nit is red\n") and len(prompts) == 1
    assert f"{len(processor.tokenizer.encode(text, added=True)) + 1} written" in out.err


def test_a_folder_for_crops_that_is_a_file_is_one_line(folder, tmp_path, monkeypatch):
    picture(90, 70).save(tmp_path / "x.png")
    scripted(monkeypatch, lambda prompt: call("crop(0, 0, 500, 500)") + "red")
    command = ["--init", str(folder), "--image", str(tmp_path / "x.png"), "--device", "cpu"]
    with pytest.raises(SystemExit, match="File exists: .*x.png"):
        generate.main([*command, "--crops", str(tmp_path / "x.png"), "What?"])


def test_a_model_without_one_of_its_tensors_is_one_line(folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    tensors = load_file(broken / "model.safetensors")
    lost = sorted(tensors)[0]
    del tensors[lost]
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(SystemExit, match=f"--init .*1 tensors missing, first {re.escape(lost)}$"):
        generate.load(broken, "cpu")


def test_what_tools_show_is_saved(folder, tmp_path, capsys, monkeypatch):
    picture(90, 70).save(tmp_path / "x.png")
    crops = tmp_path / "new" / "crops"
    scripted(monkeypatch, lambda prompt: call("crop(0, 0, 500, 500)\nimage(1)\nzoom(2)") + "red")
    command = ["--init", str(folder), "--image", str(tmp_path / "x.png"), "--device", "cpu"]
    for _ in range(2):
        generate.main([*command, "--crops", str(crops), "What?"])
    out = capsys.readouterr().out
    named = [(f"image({i})", str(crops / f"{n}.png")) for i, n in ((2, 1), (3, 2), (2, 3), (3, 4))]
    assert re.findall(r"\[(image\(\d\)): (.*)\]", out) == named  # none was written over
    sizes = [Image.open(path).size for _, path in named]
    assert sizes == [(45, 35), (180, 140)] * 2


@pytest.mark.parametrize(
    "wrong", [["Hi"], ["--image", "x.png"], ["--video", "x.mp4"], ["--fps", "0"]]
)
def test_a_server_takes_no_question(folder, wrong, capsys):
    with pytest.raises(SystemExit):
        generate.main(["--init", str(folder), "--serve", *wrong])
    assert "--serve takes questions" in capsys.readouterr().err


@pytest.mark.parametrize("at", ["load", "sample"])
def test_ctrl_c_is_no_traceback_and_leaves_no_terminal_dim(folder, at, capsys, monkeypatch):
    def interrupted(*args, **how):
        raise KeyboardInterrupt

    monkeypatch.setattr(*(generate, "load") if at == "load" else (Generator, "sample"), interrupted)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    with pytest.raises(SystemExit) as error:
        generate.main(["--init", str(folder), "--device", "cpu", "What?"])
    assert error.value.code == 130 and capsys.readouterr().out == "\x1b[0m\n"


def test_what_a_tool_shows_beyond_the_context_ends_the_answer(
    folder, tmp_path, capsys, monkeypatch
):
    short = short_sighted(folder, tmp_path, 128)
    monkeypatch.setattr(sys, "stdin", io.StringIO("First?\n/new\nSecond?\n"))
    scripted(monkeypatch, lambda prompt: call(f"print({'9' * 99})") + "so many")
    generate.main(["--init", str(short), "--device", "cpu", "--max-new-tokens", "400"])
    out = capsys.readouterr().out
    assert out.count("print(999") == 2 and "so many" not in out and "[sandbox" not in out


@pytest.mark.parametrize(
    "text, limit, sandboxes",
    [
        (call("1 + 1") * 6, 256, 5),  # one call more than are answered
        (call("1"), 3, None),  # its tokens end with a call
    ],
)
def test_a_chat_outlives_its_tool_calls(folder, capsys, monkeypatch, typed, text, limit, sandboxes):
    """It goes on with the next question, and the calls of the last one are forgotten."""
    lines = ["first", "second"]
    read = typed(lines)
    scripted(monkeypatch, lambda prompt: text + call("3 + 4") + "so 7")
    generate.main(["--init", str(folder), "--device", "cpu", "--max-new-tokens", str(limit)])
    out = capsys.readouterr().out
    assert read == lines
    if sandboxes:
        assert out.count("[sandbox: ") == sandboxes + 1
        assert out.endswith("[sandbox: 7, 0 pictures]\nso 7\n")
