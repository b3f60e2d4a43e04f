"""generate.py: what is sampled, with which probability, from which position, and what the command line says."""
import contextlib
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import generate
from conftest import ROOT
from data import pack
from generate import Generator, by_task, choose, converse, draw, rollout
from model import PRESETS, KeyeVL


@pytest.fixture(scope="module")
def folder(model, processor, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def picture(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def ask(*parts):
    """Strings are texts, pictures are pictures, lists of pictures are clips."""
    kind = {str: "text", list: "video"}
    content = [{"type": kind.get(type(p), "image"), kind.get(type(p), "image"): p} for p in parts]
    return {"messages": [{"role": "user", "content": content}]}


@pytest.fixture(scope="module")
def prompts(processor):
    asked = [ask("How many circles?"), ask(picture(80, 60), "What colour?"),
             ask("Picture 1: ", picture(60, 90, 1), "Picture 2: ", picture(100, 70, 2), "Which is larger?"),
             ask("x"), ask([picture(56, 56, s) for s in (3, 4, 5, 6)], "Which way does it move?"),
             ask(picture(30, 30, 7), "?")]
    return [processor(c, generate=True) for c in asked]


def whole(prompt, row, given=()):
    """The conversation after decoding as one sample; given: the samples that extend put in, in order."""
    runs, at, flags, samples, i = [prompt], int(prompt["positions"].max()) + 1, row["sampled"], list(given), 0
    while i < len(flags):
        if flags[i]:
            runs.append({"tokens": torch.tensor([row["ids"][i]]), "labels": torch.tensor([-100]),
                         "positions": torch.full((3, 1), at), "patches": prompt["patches"][:0],
                         "grids": prompt["grids"][:0]})
            i += 1
        else:
            runs.append(samples.pop(0))
            assert runs[-1]["positions"][:, :2].tolist() == [[at, at + 1]] * 3  # both text, right behind what was there
            assert row["ids"][i : i + len(runs[-1]["tokens"])] == runs[-1]["tokens"].tolist()
            i += len(runs[-1]["tokens"])
        at = int(runs[-1]["positions"].max()) + 1
    assert not samples
    joined = {k: torch.cat([r[k] for r in runs]) for k in ("tokens", "labels", "patches", "grids")}
    return joined | {"positions": torch.cat([r["positions"] for r in runs], 1), "pads": prompt["pads"]}


def forbidden(processor):
    special = processor.tokenizer.special
    names = ["im_start", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad"]
    return [special[f"<|{n}|>"] for n in names] + list(range(processor.tokenizer.n_base + 32, 1024))


def allowed_logits(model, processor, sample):
    with torch.no_grad():
        logits = model.logits(pack([sample])).float()
    logits[:, forbidden(processor)] = -torch.inf
    return logits


def test_greedy_with_cache_equals_full_forwards(model, processor, prompts):
    # 3 places for 6 rows and packs of 100 tokens: rows wait, enter later and share the cache with older ones
    limits = [12, 3, 9, 6, 12, 1]
    out = Generator(model, processor, rows=3, pack_tokens=100).sample(prompts, limits, temperature=0)
    for prompt, row, limit in zip(prompts, out, limits):
        assert len(row["ids"]) == limit or row["finished"]
        expected = allowed_logits(model, processor, whole(prompt, row)).argmax(-1)[len(prompt["tokens"]) - 1 : -1]
        assert row["ids"] == expected.tolist()


@pytest.mark.parametrize("temperature", [0, 0.7, 1.5])
def test_logprobs_are_those_of_a_full_forward(model, processor, prompts, temperature):
    out = Generator(model, processor).sample(prompts, 10, temperature, top_k=20, top_p=0.9, seed=3)
    for prompt, row in zip(prompts, out):
        with torch.no_grad():
            logits = model.logits(pack([whole(prompt, row)])).float()[len(prompt["tokens"]) - 1 : -1]
        want = (logits / (temperature or 1)).log_softmax(-1)[torch.arange(len(row["ids"])), row["ids"]]
        torch.testing.assert_close(torch.tensor(row["logprobs"]), want, atol=1e-4, rtol=0)


def test_a_row_does_not_depend_on_its_neighbours(model, processor, prompts):
    kwargs = dict(max_new_tokens=15, temperature=1.0, top_k=0, top_p=1.0)
    together = Generator(model, processor).sample(prompts, seed=list(range(6)), **kwargs)
    crowded = Generator(model, processor, 2, 60).sample(prompts[::-1], seed=[5, 4, 3, 2, 1, 0], **kwargs)
    for i, prompt in enumerate(prompts):
        alone, = Generator(model, processor).sample([prompt], seed=[i], **kwargs)
        assert alone["ids"] == together[i]["ids"] == crowded[5 - i]["ids"]


def test_seed(model, processor):
    # hot: at temperature 1 fresh weights often repeat the word before
    generator, same = Generator(model, processor), [ask("Tell me")] * 3
    texts = generator.generate(same, 12, 8.0, 0, 1.0, seed=5)
    assert texts == generator.generate(same, 12, 8.0, 0, 1.0, seed=5)
    assert len(set(texts)) == 3  # each row has its own numbers
    assert len({*texts, *generator.generate(same, 12, 8.0, 0, 1.0), *generator.generate(same, 12, 8.0, 0, 1.0)}) == 9


def reference(logits, temperature, top_k, top_p, banned):
    """Shares after temperature, then top-k, then top-p, by sorting in numpy."""
    x = logits.double().numpy() / temperature
    x[banned] = -np.inf
    p = np.exp(x - x.max())
    order = np.argsort(-p)[: top_k or None]
    p /= p[order].sum()
    keep, total = [], 0.0
    for i in order:
        keep.append(i)
        total += p[i]
        if total >= top_p:
            break
    out = np.zeros_like(p)
    out[keep] = p[keep] / p[keep].sum()
    return out


@pytest.mark.parametrize("temperature, top_k, top_p", [
    (1, 0, 1.0), (0.6, 20, 0.95), (1.3, 5, 1.0), (1, 0, 0.7), (0.5, 3, 0.5)])
def test_frequencies_against_numpy(temperature, top_k, top_p):
    n, rng = 40_000, random.Random(7)
    logits = torch.randn(40, generator=torch.Generator().manual_seed(1)) * 1.5
    banned = [int(logits.argmax()), 11]
    want = reference(logits, temperature, top_k, top_p, banned)
    ids, logprobs = choose(logits.expand(n, -1), [rng.random() for _ in range(n)], temperature, top_k, top_p,
                           torch.tensor(banned))
    seen = np.bincount(ids, minlength=40)
    assert seen[want == 0].sum() == 0
    support = want > 0
    chi2 = ((seen - n * want)[support] ** 2 / (n * want[support])).sum()
    df = support.sum() - 1
    assert chi2 < df + 4 * np.sqrt(2 * df) + 4
    torch.testing.assert_close(logprobs, (logits / temperature).log_softmax(-1)[ids])  # untruncated


def test_the_ends_of_the_distribution():
    logits = torch.tensor([[-torch.inf, 5.0, -torch.inf, 4.0, -torch.inf]]).expand(2, -1)
    for top_k, top_p in ((0, 1.0), (3, 1.0), (0, 0.99)):
        ids, _ = choose(logits, [0.0, 1 - 2**-53], 1.0, top_k, top_p, torch.tensor([], dtype=torch.long))
        assert ids.tolist() == [1, 3]


@pytest.fixture
def rigged(model, monkeypatch):
    """Adds to the logits what the test says."""
    plain = model.head

    def rig(add):
        monkeypatch.setattr(model, "head", lambda hidden: plain(hidden) + add(len(hidden)))
    return rig


def peak(ids, height=1e4):
    out = torch.zeros(1024)
    out[ids] = height
    return out


def test_banned_tokens_are_never_sampled(model, processor, prompts, rigged):
    rigged(lambda n: peak(forbidden(processor), 60.0))
    for temperature in (0, 1.0):
        out = Generator(model, processor).sample(prompts, 20, temperature, top_k=0, top_p=1.0, seed=1)
        drawn = {i for row in out for i in row["ids"]}
        assert not drawn & set(forbidden(processor)) and len(drawn) > 1
        processor.tokenizer.decode(sorted(drawn))  # every one has a text


@pytest.mark.parametrize("name", ["<|im_end|>", "<|endoftext|>"])
def test_stop_tokens(model, processor, prompts, rigged, name):
    stop = processor.tokenizer.special[name]
    rigged(lambda n: peak([stop]))
    generator = Generator(model, processor)
    for row in generator.sample(prompts, 20, seed=0):
        assert row["ids"] == [stop] and row["finished"] and row["sampled"] == [True] and len(row["logprobs"]) == 1
    assert generator.generate([ask("Hello")], 20) == [""]


def test_limits_and_further_stops(model, processor, prompts, rigged):
    word, = processor.tokenizer.encode(" circle")[:1]
    rigged(lambda n: peak([word]))
    generator = Generator(model, processor)
    rows = generator.sample(prompts[:3], [4, 1, 2], temperature=0)
    assert [row["ids"] for row in rows] == [[word] * 4, [word], [word] * 2]
    assert not any(row["finished"] for row in rows)
    assert generator.sample(prompts[:1], 9, stop=[word])[0] == {
        "ids": [word], "logprobs": [pytest.approx(0, abs=1e-3)], "sampled": [True], "finished": True,
        "positions": [[prompts[0]["next_position"]] * 3], "seen": []}


def test_finished_rows_leave_and_prefill_is_bounded(model, processor, prompts, monkeypatch):
    steps, plain = [], model.step
    monkeypatch.setattr(model, "step", lambda batch, cache, rows: steps.append(
        (len(rows), len(batch["tokens"]))) or plain(batch, cache, rows))
    Generator(model, processor, pack_tokens=50).sample([prompts[0]] * 4, [2, 3, 3, 5], temperature=0, stop=())
    length = len(prompts[0]["tokens"])
    prefills = [s for s in steps if s[1] >= length]
    assert all(tokens <= 50 for _, tokens in prefills) and sum(rows for rows, _ in prefills) == 4 and len(prefills) > 1
    assert [rows for rows, tokens in steps if tokens < length] == [4, 3, 1, 1]
    steps.clear()
    Generator(model, processor, rows=2).sample([prompts[0]] * 5, [1, 6, 2, 2, 2], temperature=0)
    assert max(rows for rows, _ in steps) == 2  # never more than the cache has places


def test_more_turns_with_pictures_equal_full_forwards(model, processor, prompts):
    """A tool's picture inside the turn, then the user's next turn after a cut-off answer; the cache has to grow."""
    generator, given = Generator(model, processor, rows=2), {}

    def extend(row):
        mine = given.setdefault(row.index, [])
        row.left = 5
        if len(mine) == 0:
            seen = [{"type": "text", "text": "<tool>"}, {"type": "image", "image": picture(70, 90, 8)}]
            mine.append(processor.extension(seen, row.next_position))
        elif len(mine) == 1 and row.index != 1:
            asked = [{"type": "image", "image": picture(50, 40, 9)}, {"type": "text", "text": "And now?"}]
            mine.append(generator.next_turn(row, asked))
        else:
            return None
        return mine[-1]

    rows = generator.sample(prompts[:4], 5, temperature=0, extend=extend)
    assert [len(given[i]) for i in range(4)] == [2, 1, 2, 2]
    for i, (prompt, row) in enumerate(zip(prompts, rows)):
        sample = whole(prompt, row, given[i])
        logits = allowed_logits(model, processor, sample)[len(prompt["tokens"]) - 1 : -1]
        own = torch.tensor(row["sampled"])
        assert torch.tensor(row["ids"])[own].tolist() == logits.argmax(-1)[own].tolist()
        with torch.no_grad():
            logp = model.logits(pack([sample])).float().log_softmax(-1)[len(prompt["tokens"]) - 1 : -1]
        logp = logp[torch.arange(len(row["ids"])), row["ids"]]
        torch.testing.assert_close(torch.tensor(row["logprobs"]), torch.where(own, logp, 0), atol=1e-4, rtol=0)
    text = processor.tokenizer.decode(given[0][1]["tokens"])
    assert text.startswith("<|im_end|>\n<|im_start|>user\n<|vision_start|>")
    assert text.endswith("And now?<|im_end|>\n<|im_start|>assistant\n")


def test_next_turn_after_a_finished_answer_is_the_template(model, processor, rigged):
    end = processor.tokenizer.special["<|im_end|>"]
    rigged(lambda n: peak([end]))
    generator, turns = Generator(model, processor), ["Second?", None]
    row, = generator.sample([processor(ask("First?"), generate=True)], 5, extend=lambda row: (
        text := turns.pop(0)) and generator.next_turn(row, text))
    talk = [("user", "First?"), ("assistant", ""), ("user", "Second?")]
    whole_talk = processor({"messages": [{"role": r, "content": c} for r, c in talk]}, generate=True)["tokens"].tolist()
    first = processor(ask("First?"), generate=True)["tokens"].tolist()
    assert first + row["ids"] == whole_talk + [end]


@pytest.mark.parametrize("text, cut", [("a🎉b 你好，circle 👩‍👩‍👧", 0), ("naïve 🎉", 1), ("plain text", 0)])
def test_streamed_pieces(model, processor, rigged, text, cut):
    ids = processor.tokenizer.encode(text)
    ids = ids[: len(ids) - cut] + ([] if cut else [processor.tokenizer.special["<|im_end|>"]])
    script, pieces = iter(ids), []
    rigged(lambda n: peak([next(script)]))
    out, = Generator(model, processor).generate([ask("Hello")], len(ids), stream=lambda *got: pieces.append(got))
    joined = "".join(piece for _, piece in pieces)
    assert joined == out == processor.tokenizer.decode(ids, skip_special=True)
    assert {i for i, _ in pieces} == {0} and len(pieces) > 1
    if not cut:
        assert joined == text and not any("\ufffd" in piece for _, piece in pieces)


def test_clear_errors(model, processor, prompts):
    generator = Generator(model, processor)
    for wrong in (dict(temperature=-1), dict(top_p=0), dict(top_p=1.1), dict(top_k=-1), dict(max_new_tokens=0),
                  dict(max_new_tokens=[1]), dict(seed=[1])):
        with pytest.raises(ValueError, match="needs|max_new_tokens"):
            generator.sample(prompts[:2], **wrong)
    with pytest.raises(ValueError, match="last message"):
        generator.generate([{"messages": [{"role": "assistant", "content": "x"}]}])
    other = KeyeVL.empty(PRESETS["toy"])
    other.config = type(other.config)(**other.config.__dict__ | {"image_token_id": 5})
    with pytest.raises(ValueError, match="image_pad"):
        Generator(other, processor)
    assert generator.sample([]) == []


# -- command line


def test_command_line(folder, tmp_path):
    picture(90, 70).save(tmp_path / "x.png")
    command = [sys.executable, "generate.py", "--init", str(folder), "--image", str(tmp_path / "x.png"), "--seed", "1",
               "--max-new-tokens", "8", "--device", "cpu", "How many circles?"]
    how = dict(cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    done = [subprocess.run(command, **how) for _ in range(2)]
    assert done[0].returncode == 0, done[0].stderr
    assert done[0].stdout.strip() and done[0].stdout == done[1].stdout
    assert "8 written" in done[0].stderr and "tok/s" in done[0].stderr


@pytest.mark.parametrize("argv, message", [
    (["--init", "nowhere", "Hi"], "nowhere"),
    (["--init", "{folder}", "--image", "{tmp}/none.png", "Hi"], "none.png: missing"),
    (["--init", "{folder}", "--image", "{tmp}/bad.png", "Hi"], "bad.png: unsupported"),
    (["--init", "{folder}", "--video", "{tmp}/bad.png", "Hi"], "bad.png"),
    (["--init", "{folder}", "--temperature", "-1", "Hi"], "temperature"),
    (["--init", "{folder}"], "no question"),
    (["--init", "{folder}", "--device", "abacus", "Hi"], "abacus"),
])
def test_command_line_errors(folder, tmp_path, argv, message, capsys, monkeypatch):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    monkeypatch.setattr(sys, "stdin", open("/dev/null"))
    with pytest.raises(SystemExit) as error:
        generate.main([a.format(folder=folder, tmp=tmp_path) for a in argv])
    assert message in f"{error.value}{capsys.readouterr().err}" and error.value.code != 0


def test_chat(folder, tmp_path, capsys, monkeypatch):
    picture(90, 70).save(tmp_path / "x.png")
    lines = iter(["How many?", "", f"/image {tmp_path}/none.png", "here?", f"/image {tmp_path}/x.png", "and there?"])

    def typed(prompt):
        with contextlib.suppress(StopIteration):
            return next(lines)
        raise EOFError
    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    seen, plain = [], Generator.next_turn
    monkeypatch.setattr(Generator, "next_turn", lambda self, row, content, root: seen.append(
        [c["type"] for c in content]) or plain(self, row, content, root))
    generate.main(["--init", str(folder), "--image", str(tmp_path / "x.png"), "--max-new-tokens", "4", "--seed", "3",
                   "--device", "cpu"])
    out = capsys.readouterr()
    assert seen == [["image", "text"], ["image", "text"]]  # the first failed with a message, the chat went on
    assert "none.png: missing" in out.err and out.out.strip()


@pytest.mark.cuda
def test_fp32_weights_on_cuda(processor, prompts):
    torch.manual_seed(0)
    model = KeyeVL.empty(PRESETS["toy"]).init_weights().cuda()
    generator = Generator(model, processor, rows=4)
    one, two = (generator.sample(prompts, 20, 1.0, 0, 1.0, seed=2) for _ in range(2))
    assert [r["ids"] for r in one] == [r["ids"] for r in two] and all(r["ids"] for r in one)
    for prompt, row in zip(prompts, one):
        batch = {k: v if k in ("segments", "grids") else v.cuda() for k, v in pack([whole(prompt, row)]).items()}
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            logp = model.logits(batch).float().log_softmax(-1)[len(prompt["tokens"]) - 1 : -1]
        want = logp[torch.arange(len(row["ids"])), torch.tensor(row["ids"])].cpu()
        torch.testing.assert_close(torch.tensor(row["logprobs"]), want, atol=0.1, rtol=0)


# -- tools

STEP, CLOSE = Generator._step, generate.TOOL


def scripted(monkeypatch, say):
    """Every row writes what `say` makes of its prompt's text, whatever the model says, and ends. Returns the prompts."""
    prompts = []

    def step(self, group, *how):
        tokenizer = self.processor.tokenizer
        for row in group:
            if row.new and not row.ids:
                prompts.append(tokenizer.decode(row.new["tokens"]))
                row.script = iter(tokenizer.encode(say(prompts[-1]), added=True))
        _, logprobs = STEP(self, group, *how)
        return [next(row.script, tokenizer.special["<|im_end|>"]) for row in group], logprobs
    monkeypatch.setattr(Generator, "_step", step)
    return prompts


def call(code):
    return f"<tool_call>{code}{CLOSE}"


@pytest.fixture
def talk(model, processor, monkeypatch):
    """converse on a question for each of the texts, which its row writes; say(i) is called when row i begins."""
    def use(texts, pictures, limit=400, say=lambda i: None, **how):
        def written(prompt):
            i = int(re.search(r"Question (\d+)\?", prompt)[1])
            say(i)
            return texts[i]
        scripted(monkeypatch, written)
        samples = [processor(ask(f"Question {i}?"), generate=True) for i in range(len(texts))]
        return converse(Generator(model, processor), samples, pictures, limit, temperature=0, **how)
    return use


FAILS = {"crop(1)": "use crop(x1, y1, x2, y2)", "image(2)": "image(2): there are 1", "1 / 0": "zero", "": "nothing was shown",
         "fly(3)": "is not known", "zoom(16)\n" * 8: "too much work", "rotate(45)\nzoom(16)\nzoom(16)": "too much work",
         "10**10**7": "line 1", "x = 9**9\nx = x**x": "line 2", "while 1:\n zoom(2)": "cannot read", "f = f\nf": "line 1",
         "(" * 30 + "1" + ")" * 30: "parentheses", "import os": "error", "open('/etc/passwd')": "cannot read"}


def test_a_failing_call_gets_a_short_error_and_the_row_goes_on(talk, processor):
    rows = talk([f"Look. {call(code)}so red" for code in FAILS], [[picture(100, 100)] for _ in FAILS])
    for (code, message), row in zip(FAILS.items(), rows):
        seen, = row["observations"]
        assert not seen.ok and seen.text.startswith("error: ") and message in seen.text, (code, seen.text)
        assert seen.images == [] and len(seen.text) < 200 and row["finished"]
        end = f"<sandbox_output>{seen.text}</sandbox_output>so red<|im_end|>"
        assert processor.tokenizer.decode(row["ids"]) == f"Look. {call(code)}{end}"
        given = [i for i, own in zip(row["ids"], row["sampled"]) if not own]
        assert processor.tokenizer.decode(given) == end.removesuffix("so red<|im_end|>")


def test_a_call_without_a_picture(talk):
    row, = talk([call("zoom(2)") + call("2 + 3") + "so 5"], [[]])
    assert [(o.ok, o.text) for o in row["observations"]] == [(False, "error: line 1: image(1): there are 0"), (True, "5")]


def test_at_most_so_many_calls(talk, processor):
    """One more is told so; after that a call ends the row, which is not finished."""
    rows = talk([call("1 + 1") * n + "so 2" for n in (2, 3, 4, 5)], [[]] * 4, calls=2)
    enough = ["2", "2", "error: at most 2 calls"]
    assert [[o.text for o in row["observations"]] for row in rows] == [enough[:2], enough, enough, enough]
    assert [row["finished"] for row in rows] == [True, True, False, False]
    close = processor.tokenizer.special[CLOSE]
    assert [row["ids"].count(close) for row in rows] == [2, 3, 4, 4] and rows[2]["ids"][-1] == rows[3]["ids"][-1] == close
    default, = talk([call("1 + 1") * 9], [[]])
    assert [o.text for o in default["observations"]] == ["2"] * 4 + ["error: at most 4 calls"] and not default["finished"]


def test_a_call_that_was_not_opened(talk):
    rows = talk([f"so {CLOSE}red", f"{call('1 + 1')}2{CLOSE}red", f"<tool_call>1<tool_call>2 + 2{CLOSE}"], [[]] * 3)
    stray = "error: ‹/tool_call> without ‹tool_call>"  # no tag can be spelled in what a tool says
    assert [[o.text for o in row["observations"]] for row in rows] == [[stray], ["2", stray], ["4"]]  # the last opening counts
    assert all(row["finished"] for row in rows)


def test_too_much_to_look_at(talk):
    text, pictures = call("crop(0, 0, 1000, 1000)") * 3 + "so red", [[picture(100, 100)]]
    free, = talk([text], pictures)
    one = len(free["seen"][0]["tokens"])
    assert [len(s["tokens"]) for s in free["seen"]] == [one] * 3 and all(o.ok for o in free["observations"])
    for room, fit in ((3 * one, 3), (3 * one - 1, 2), (2 * one, 2), (one, 1), (one - 1, 0)):
        row, = talk([text], pictures, room=room)
        assert [len(o.images) for o in row["observations"]] == [1] * fit + [0] * (3 - fit)
        assert {o.text for o in row["observations"][fit:]} <= {"error: too much to look at"} and row["finished"]
        assert sum(len(s["grids"]) for s in row["seen"]) == fit  # nor was the model shown more


def test_pictures_are_loaded_at_the_first_call_and_once(talk):
    events = []
    load = lambda i: lambda: events.append(("loads", i)) or [picture(60, 60, i)]
    rows = talk(["just red", f"first {call('image(1)')}{call('image(2)')}", f"so {CLOSE}"], [load(i) for i in range(3)],
                say=lambda i: events.append(("asks", i)))
    assert events[:3] == [("asks", i) for i in range(3)] and sorted(events[3:]) == [("loads", 1), ("loads", 2)]
    assert rows[0]["observations"] == rows[0]["seen"] == [] and all(rows[0]["sampled"]) and rows[0]["finished"]
    for seen in rows[1]["observations"]:  # the second looks at what the first showed
        assert seen.ok and seen.images[0].tobytes() == picture(60, 60, 1).tobytes()


def test_rows_do_not_see_each_others_pictures(talk):
    own = [[picture(80, 60, 1)], [picture(70, 90, 2), picture(50, 50, 3)], [picture(64, 64, 4)]]
    text = "".join(map(call, ("image(1)", "crop(0, 0, 500, 500)", "image({})", "image(9)")))  # {}: what the crop showed
    rows = talk([text.format(3), text.format(4), "none"], own)
    for mine, row in zip(own, rows[:2]):
        first, crop, again, beyond = row["observations"]
        assert first.images[0].size == mine[0].size and first.images[0].tobytes() == mine[0].tobytes()
        assert crop.images[0].size == tuple(n // 2 for n in mine[0].size)
        assert again.images[0].tobytes() == crop.images[0].tobytes()
        assert beyond.text == f"error: line 1: image(9): there are {len(mine) + 3}"  # and three that it made
    assert rows[2]["observations"] == [] and [len(mine) for mine in own] == [1, 2, 1]  # the caller's lists stay


# -- groups of answers


def job(text, mode, root=None, image=None):
    content = [{"type": "image", "image": image}] * bool(image) + [{"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "known"}]}, root, mode


def test_draw_asks_tasks_alike():
    """A task of 6 questions is asked as often as one of 300, none twice at once, clips never with tools, the same seed the same."""
    pool = [({"messages": ask("?")["messages"], "meta": {"task": "often"}, "i": i}, None) for i in range(300)]
    pool += [({"messages": ask(["a.png", "b.png"])["messages"], "meta": {"task": "clip"}, "i": 300 + i}, None) for i in range(60)]
    pool += [({"messages": ask("?")["messages"], "meta": {"task": "rare"}, "i": 360 + i}, None) for i in range(6)]
    modes = {"think": 1, "agentic_think": 9}
    for n, counts in ((9, [3, 3, 3]), (18, [6, 6, 6]), (30, [10, 10, 6])):
        jobs = draw(by_task(pool), n, modes, "0/1")
        assert [sum(line["meta"]["task"] == task for line, *_ in jobs) for task in ("often", "clip", "rare")] == counts
        assert len({line["i"] for line, *_ in jobs}) == len(jobs) and jobs == draw(by_task(pool), n, modes, "0/1") != draw(by_task(pool), n, modes, "0/2")
        assert {mode for line, _, mode in jobs if line["meta"]["task"] == "clip"} == {"think"}
    assert sum(mode == "agentic_think" for *_, mode in draw(by_task(pool[:300]), 300, modes, "x")) == pytest.approx(270, abs=20)
    tasks = [line["meta"]["task"] for i in range(60) for line, *_ in draw(by_task(pool), 1, modes, str(i))]
    assert min(map(tasks.count, ("often", "clip", "rare"))) > 8  # fewer questions than tasks: any of them


SWITCH = {"think": "/think", "no_think": "/no_think", "agentic_think": "/agentic_think", "auto_think": ""}


def test_rollout(model, processor, tmp_path):
    picture(80, 60).save(tmp_path / "x.png")
    jobs = [job(f"What is {i}?", mode, tmp_path, "x.png" if i % 2 else None)
            for i, mode in enumerate(["agentic_think", "no_think", "auto_think", "think", "agentic_think", "no_think"])]
    generator, seeds = Generator(model, processor, rows=5), list("abcdef")
    ids = lambda out: [[row["ids"] for row in rows] for rows in out]
    out = rollout(generator, jobs, 2, 8, seeds)
    assert [len(rows) for rows in out] == [2] * 6 and len({tuple(i) for rows in ids(out) for i in rows}) == 12
    for i, ((_, _, mode), rows) in enumerate(zip(jobs, out)):
        for row in rows:
            text = processor.tokenizer.decode(row["sample"]["tokens"])
            assert text.endswith(f"What is {i}?{SWITCH[mode]}<|im_end|>\n<|im_start|>assistant\n")
            assert len(row["sample"]["grids"]) == i % 2 and len(row["ids"]) <= 8
            said = processor.tokenizer.decode(row["ids"], skip_special=True)
            assert "".join(c["text"] for c in row["content"] if c["type"] == "text") == said
    assert ids(rollout(generator, jobs, 2, 8, seeds)) == ids(out)
    changed = ids(rollout(generator, jobs, 2, 8, ["a", "b", "c", "other", "e", "f"]))
    assert [a == b for a, b in zip(changed, ids(out))] == [True, True, True, False, True, True]
    for i in (0, 3):  # nor do the other jobs and the size of the group matter
        assert ids(rollout(generator, [jobs[i]], 3, 8, [seeds[i]]))[0][:2] == ids(out)[i]
    row, = generator.sample([out[3][1]["sample"]], 8, 1.0, 0, 1.0, ["d/1"])
    assert row["ids"] == out[3][1]["ids"]
    assert row["logprobs"] == pytest.approx(out[3][1]["logprobs"], abs=1e-4)


def test_rollout_without_a_picture(model, processor, tmp_path, capsys):
    """A job whose picture is missing has no rows; the others have the same as without it."""
    good = [job("One?", "think"), job("Two?", "agentic_think")]
    bad = [job("Red?", mode, tmp_path, "none.png") for mode in ("no_think", "auto_think")]
    generator = Generator(model, processor)
    out = rollout(generator, [good[0], *bad, good[1]], 2, 5, list("abcd"))
    assert [len(rows) for rows in out] == [2, 0, 0, 2] and capsys.readouterr().err.count("skipped: none.png: missing") == 2
    alone = rollout(generator, good, 2, 5, list("ad"))
    assert [[row["ids"] for row in rows] for rows in (out[0], out[3])] == [[row["ids"] for row in rows] for rows in alone]
    assert rollout(generator, bad, 2, 5, list("bc")) == [[], []] and rollout(generator, [], 2, 5, []) == []


def test_tools_run_in_their_modes_alone(model, processor, tmp_path, monkeypatch):
    picture(80, 60).save(tmp_path / "x.png")
    run, load, runs, loads = generate.sandbox.run, generate.pictures_of, [], []
    monkeypatch.setattr(generate.sandbox, "run", lambda *a: runs.append(a) or run(*a))
    monkeypatch.setattr(generate, "pictures_of", lambda *a: loads.append(a) or load(*a))
    scripted(monkeypatch, lambda prompt: call("crop(0, 0, 500, 500)") + "so red")
    jobs = [job("What?", mode, tmp_path, "x.png") for mode in ("think", "auto_think", "no_think", "agentic_think")]
    out = rollout(Generator(model, processor), jobs, 2, 100, list("abcd"))
    assert len(runs) == len(loads) == 4
    for i, rows in enumerate(out):
        for row in rows:
            assert row["finished"] == (i % 2) and len(row["observations"]) == len(row["seen"]) == i % 2
            assert all(row["sampled"]) == (i % 2 == 0)  # without tools a call is its end
            kinds = [c["type"] for c in row["content"]]
            assert kinds == (["text"] if i % 2 == 0 else ["text", "text", "image", "text", "text"])
            assert i % 2 or row["content"][0]["text"] == call("crop(0, 0, 500, 500)")


def test_tools_know_nothing_of_the_known_answer(model, processor, tmp_path, monkeypatch):
    """Where the pool's answer holds pictures, even unreadable ones, they are none of the question's."""
    picture(80, 60).save(tmp_path / "x.png")
    scripted(monkeypatch, lambda prompt: call("image(2)") + "so red")
    jobs = [job("What?", "agentic_think", tmp_path, "x.png") for _ in range(2)]
    for (line, _, _), name in zip(jobs, ("x.png", "none.png")):
        line["messages"][-1]["content"] = [{"type": "image", "image": name}, {"type": "text", "text": "red"}]
    for row, in rollout(Generator(model, processor), jobs, 1, 100, list("ab")):
        assert [o.text for o in row["observations"]] == ["error: line 1: image(2): there are 1"] and row["finished"]


# -- tools on the command line


def test_a_question_with_tool_calls(folder, processor, tmp_path, capsys, monkeypatch):
    picture(90, 70).save(tmp_path / "x.png")
    text = call("crop(0, 0, 500, 500)\nprint(6 * 7)") + call("crop(1)") + call("image(2)") + "it is red"
    prompts = scripted(monkeypatch, lambda prompt: text)
    generate.main(["--init", str(folder), "--image", str(tmp_path / "x.png"), "--device", "cpu", "What?/agentic_think"])
    out = capsys.readouterr()
    told = re.findall(r"\n\[sandbox: (.*), (\d) pictures\]\n", out.out)
    assert told == [("42", "1"), ("error: line 1: use crop(x1, y1, x2, y2)", "0"), ("no text", "1")]  # 2: what it had cropped
    assert out.out.endswith("[sandbox: no text, 1 pictures]\nit is red\n") and len(prompts) == 1
    assert f"{len(processor.tokenizer.encode(text, added=True)) + 1} written" in out.err


@pytest.mark.parametrize("text, limit, sandboxes", [
    (call("1 + 1") * 6, 256, 5),  # one call more than are answered
    (call("1"), 3, None),  # its tokens end with a call
])
def test_a_chat_outlives_its_tool_calls(folder, capsys, monkeypatch, text, limit, sandboxes):
    """It goes on with the next question, and the calls of the last one are forgotten."""
    lines, asked = ["first", "second"], []

    def typed(prompt):
        if len(asked) == len(lines):
            raise EOFError
        asked.append(lines[len(asked)])
        return asked[-1]
    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    scripted(monkeypatch, lambda prompt: text + call("3 + 4") + "so 7")
    generate.main(["--init", str(folder), "--device", "cpu", "--max-new-tokens", str(limit)])
    out = capsys.readouterr().out
    assert asked == lines
    if sandboxes:
        assert out.count("[sandbox: ") == sandboxes + 1 and out.endswith("[sandbox: 7, 0 pictures]\nso 7\n")
