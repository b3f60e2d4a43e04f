"""common/rollout.py: tool calls between tokens, groups of responses, rewards and trajectories."""

import re
from dataclasses import replace

import pytest
import torch

from common import rollout
from common.confined import refusal
from common.conversation import pictures_of
from common.media import MediaError
from common.rollout import (
    Prompt,
    converse,
    failures_of,
    load_pictures,
    reward_groups,
    sample_groups,
    trajectory,
)
from generate import Generator
from test_generate import ask, call, picture, scripted, whole

CLOSE = "</tool_call>"
confined = pytest.mark.skipif(refusal() is not None, reason=f"no Python: {refusal()}")


@pytest.fixture
def talk(model, processor, monkeypatch):
    """converse on a question for each of the texts, which its row writes.

    pictures: of each question a list. say(i) is called when row i begins.
    """

    def use(texts, pictures, say=lambda i: None):
        def written(prompt):
            i = int(re.search(r"Question (\d+)\?", prompt)[1])
            say(i)
            return texts[i]

        scripted(monkeypatch, written)
        samples = [processor(ask(f"Question {i}?"), generate=True) for i in range(len(texts))]
        load = [own if callable(own) else lambda own=own: list(own) for own in pictures]
        return converse(Generator(model, processor), samples, load, 400, temperature=0)

    return use


def texts_of(response):
    return [seen.text for seen in response.observations]


# --------------------------------------------------------------------------------------------------
# tool calls

FAILS = {
    "crop(1)": "use crop(x1, y1, x2, y2)",
    "image(2)": "image(2): there are 1",
    "1 / 0": "zero",
    "": "nothing was shown",
    "fly(3)": "is not known",
    "zoom(16)\n" * 8: "too much work",
    "rotate(45)\nzoom(16)\nzoom(16)": "too much work",
    "10**10**7": "line 1",
    "x = 9**9\nx = x**x": "line 2",
    "while 1:\n zoom(2)": "cannot read",
    "f = f\nf": "line 1",
    "(" * 30 + "1" + ")" * 30: "parentheses",
    "import os": "error",
    "open('/etc/passwd')": "cannot read",
}


def test_a_failing_call_gets_a_short_error_and_the_row_goes_on(talk, processor):
    texts = [f"Look. {call(code)}so red" for code in FAILS]
    responses = talk(texts, [[picture(100, 100)] for _ in FAILS])
    for (code, message), response in zip(FAILS.items(), responses):
        [seen] = response.observations
        assert not seen.ok and seen.text.startswith("error: ") and message in seen.text, code
        assert seen.images == [] and len(seen.text) < 200 and response.finished
        shown = f"<sandbox_output>{seen.text}</sandbox_output>"
        said = processor.tokenizer.decode(response.ids)
        assert said == f"Look. {call(code)}{shown}so red<|im_end|>"
        given = [token for token, own in zip(response.ids, response.sampled) if not own]
        assert processor.tokenizer.decode(given) == shown


def test_a_call_without_a_picture(talk):
    [response] = talk([call("zoom(2)") + call("2 + 3") + "so 5"], [[]])
    assert texts_of(response) == ["error: line 1: image(1): there are 0", "5"]
    assert [seen.ok for seen in response.observations] == [False, True]


@confined
@pytest.mark.parametrize(
    "text, seen",
    [
        (call("print(type(image).__name__, len(images))") + "so red", ["Image 1"]),
        ("<think><code>\n```python\nprint(2**70)\n```\n</code>\nso big", [str(2**70)]),
        ("<code>print(1)</code> and <code>print(2)</code> so", ["1", "2"]),
        # in a call its own mark ends it
        (call("<code>\nprint(3)\n</code>\n") + "so", ["3"]),
        ("no</code> so", ["error: ‹/code> without ‹code>"]),
        ("<code>1 / 0</code> so", ["error: line 1: ZeroDivisionError: division by zero"]),
    ],
)
def test_python_where_it_was_chosen(talk, processor, monkeypatch, text, seen):
    monkeypatch.setattr(rollout, "_level", "operations")  # back to it afterwards
    rollout.use_sandbox("python")
    [response] = talk([text], [[picture(60, 50)]])
    assert texts_of(response) == seen and response.finished
    said = [token for token, own in zip(response.ids, response.sampled) if own]
    assert processor.tokenizer.decode(said) == f"{text}<|im_end|>"


def test_operations_know_no_python(talk):
    text = "<code>print(1)</code>" + call("print(type(1))") + "so"
    [response] = talk([text], [[picture(60, 50)]])
    [error] = texts_of(response)
    assert error.startswith("error: line 1: type is not known")


def test_python_that_cannot_be_confined_is_refused(monkeypatch):
    monkeypatch.setattr(rollout.sandbox, "refusal", lambda: "no seccomp here")
    with pytest.raises(SystemExit, match="--sandbox python: no seccomp here"):
        rollout.use_sandbox("python")
    rollout.use_sandbox("operations")


def test_at_most_so_many_calls(talk, processor, monkeypatch):
    """One call more is told that; after that a call ends the row, which is not finished."""
    [default] = talk([call("1 + 1") * 9], [[]])
    assert texts_of(default) == ["2"] * 4 + ["error: at most 4 calls"] and not default.finished

    monkeypatch.setattr(rollout, "MAX_CALLS", 2)
    responses = talk([call("1 + 1") * n + "so 2" for n in (2, 3, 4, 5)], [[]] * 4)
    enough = ["2", "2", "error: at most 2 calls"]
    assert [texts_of(response) for response in responses] == [enough[:2], enough, enough, enough]
    assert [response.finished for response in responses] == [True, True, False, False]
    close = processor.tokenizer.special[CLOSE]
    assert [response.ids.count(close) for response in responses] == [2, 3, 4, 4]
    assert responses[2].ids[-1] == responses[3].ids[-1] == close


def test_a_call_is_not_run_where_no_token_is_left(model, processor, monkeypatch):
    """Nobody could read what it shows: the response ends there, unfinished."""
    scripted(monkeypatch, lambda prompt: call("1 + 1"))
    n = len(processor.tokenizer.encode(call("1 + 1"), added=True))
    sample = processor(ask("Question?"), generate=True)
    generator = Generator(model, processor)
    for limit, observations in ((n, []), (n + 1, ["2"])):
        [response] = converse(generator, [sample], [list], limit, temperature=0)
        assert texts_of(response) == observations
        assert response.finished == bool(observations)


def test_a_call_that_was_not_opened(talk):
    texts = [
        f"so {CLOSE}red",
        f"{call('1 + 1')}2{CLOSE}red",
        f"<tool_call>1<tool_call>2 + 2{CLOSE}",  # the last opening counts
    ]
    responses = talk(texts, [[]] * 3)
    stray = "error: ‹/tool_call> without ‹tool_call>"  # no tag can be spelled in what a tool says
    assert [texts_of(response) for response in responses] == [[stray], ["2", stray], ["4"]]
    assert all(response.finished for response in responses)


def test_a_picture_that_is_gone_when_a_tool_wants_it(talk):
    """The call gets an error, and the row goes on; other rows see theirs."""

    def gone():
        raise MediaError("a.png", "missing")

    texts = [f"{call('image(1)')}{call('1 + 1')}so red", f"{call('image(1)')}so red"]
    lost, other = talk(texts, [gone, [picture(60, 60)]])
    assert texts_of(lost) == ["error: a.png: missing"] * 2
    assert lost.finished and not any(seen.ok for seen in lost.observations)
    assert other.observations[0].ok and other.finished


def test_too_much_to_look_at(talk, monkeypatch):
    text = call("crop(0, 0, 1000, 1000)") * 3 + "so red"
    pictures = [[picture(100, 100)]]
    [free] = talk([text], pictures)
    one = len(free.extensions[0]["tokens"])
    assert [len(sample["tokens"]) for sample in free.extensions] == [one] * 3
    assert all(seen.ok for seen in free.observations)
    for most, fit in ((3 * one, 3), (3 * one - 1, 2), (2 * one, 2), (one, 1), (one - 1, 0)):
        monkeypatch.setattr(rollout, "MAX_SHOWN", most)
        [response] = talk([text], pictures)
        shown = [len(seen.images) for seen in response.observations]
        assert shown == [1] * fit + [0] * (3 - fit) and response.finished
        assert set(texts_of(response)[fit:]) <= {"error: too much to look at"}
        # nor was the model shown more
        assert sum(len(sample["grids"]) for sample in response.extensions) == fit


def test_pictures_are_loaded_at_the_first_call_and_once(talk):
    events = []

    def loader(i):
        def load():
            events.append(("loads", i))
            return [picture(60, 60, i)]

        return load

    texts = ["just red", f"first {call('image(1)')}{call('image(2)')}", f"so {CLOSE}"]
    loads = [loader(i) for i in range(3)]
    responses = talk(texts, loads, say=lambda i: events.append(("asks", i)))
    assert events[:3] == [("asks", 0), ("asks", 1), ("asks", 2)]
    assert sorted(events[3:]) == [("loads", 1), ("loads", 2)]
    silent = responses[0]
    assert silent.observations == silent.extensions == []
    assert all(silent.sampled) and silent.finished
    for seen in responses[1].observations:  # the second looks at what the first showed
        assert seen.ok and seen.images[0].tobytes() == picture(60, 60, 1).tobytes()


def test_rows_do_not_see_each_others_pictures(talk):
    own = [[picture(80, 60, 1)], [picture(70, 90, 2), picture(50, 50, 3)], [picture(64, 64, 4)]]
    # image({}): what the crop showed
    text = "".join(map(call, ("image(1)", "crop(0, 0, 500, 500)", "image({})", "image(9)")))
    responses = talk([text.format(3), text.format(4), "none"], own)
    for pictures, response in zip(own, responses[:2]):
        first, crop, again, beyond = response.observations
        assert first.images[0].size == pictures[0].size
        assert first.images[0].tobytes() == pictures[0].tobytes()
        assert crop.images[0].size == tuple(side // 2 for side in pictures[0].size)
        assert again.images[0].tobytes() == crop.images[0].tobytes()
        # and three that it made
        assert beyond.text == f"error: line 1: image(9): there are {len(pictures) + 3}"
    assert responses[2].observations == []


# --------------------------------------------------------------------------------------------------
# groups of responses

SWITCH = {"think": "/think", "no_think": "/no_think", "agentic_think": "/agentic_think"}


def asked(text, mode, seed="a", root=None, image=None):
    content = [{"type": "text", "text": text}]
    if image:
        content.insert(0, {"type": "image", "image": image})
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "known"}]
    record = {"messages": messages, "meta": {"answer": "known", "verifier": "exact"}}
    return Prompt(record, root, mode, seed)


def ids_of(groups):
    return [[one.response.ids for one in group] for group in groups]


@pytest.fixture
def six(tmp_path):
    """Six prompts in all modes, every other one with a picture."""
    picture(80, 60).save(tmp_path / "x.png")
    modes = ["agentic_think", "no_think", "auto_think", "think", "plain", "no_think"]
    prompts = []
    for i, (mode, seed) in enumerate(zip(modes, "abcdef")):
        prompts.append(asked(f"What is {i}?", mode, seed, tmp_path, "x.png" if i % 2 else None))
    return prompts


def test_a_group_is_asked_in_the_mode_of_its_prompt(model, processor, six):
    groups = sample_groups(Generator(model, processor, rows=5), six, 2, 8)
    assert [len(group) for group in groups] == [2] * 6
    assert len({tuple(ids) for group in ids_of(groups) for ids in group}) == 12
    decode = processor.tokenizer.decode
    for i, (prompt, group) in enumerate(zip(six, groups)):
        for one in group:
            assert one.prompt is prompt and one.reward is None and one.advantage == 0
            question = f"What is {i}?{SWITCH.get(prompt.mode, '')}"
            text = decode(one.sample["tokens"])
            assert text.endswith(f"{question}<|im_end|>\n<|im_start|>assistant\n")
            assert len(one.sample["grids"]) == i % 2 and len(one.response.ids) <= 8
            said = "".join(item["text"] for item in one.content if item["type"] == "text")
            assert said == decode(one.response.ids, skip_special=True)


def test_a_response_depends_on_its_own_seed_alone(model, processor, six, monkeypatch):
    generator = Generator(model, processor, rows=5)
    groups = sample_groups(generator, six, 2, 8)
    assert ids_of(sample_groups(generator, six, 2, 8)) == ids_of(groups)
    # neither the other prompts nor the size of the group matter
    for i in (0, 3):
        assert ids_of(sample_groups(generator, [six[i]], 3, 8))[0][:2] == ids_of(groups)[i]
    # nor what is decoded together
    monkeypatch.setattr(rollout, "CHUNK_ROLLOUTS", 3)
    assert ids_of(sample_groups(generator, six, 2, 8)) == ids_of(groups)
    monkeypatch.setattr(rollout, "CHUNK_PATCHES", 0)
    assert ids_of(sample_groups(generator, six, 2, 8)) == ids_of(groups)

    six[3].seed = "other"
    changed = ids_of(sample_groups(generator, six, 2, 8))
    same = [a == b for a, b in zip(changed, ids_of(groups))]
    assert same == [True, True, True, False, True, True]


def test_groups_are_sampled_without_truncation(model, processor, six):
    generator = Generator(model, processor)
    second = sample_groups(generator, six, 2, 8)[3][1]
    [response] = generator.sample([second.sample], 8, 1.0, 0, 1.0, ["d/1"])
    assert response.ids == second.response.ids
    assert response.logprobs == pytest.approx(second.response.logprobs, abs=1e-4)


def test_chunks_bound_what_is_decoded_together(model, processor, six, monkeypatch):
    monkeypatch.setattr(rollout, "CHUNK_ROLLOUTS", 4)
    generator = Generator(model, processor)
    sizes = []
    plain = generator.sample

    def watched(samples, *args, **how):
        sizes.append(len(samples))
        return plain(samples, *args, **how)

    generator.sample = watched
    groups = sample_groups(generator, six[:5], 2, [1, 2, 3, 4, 5], keep_pixels=False)
    assert sizes == [4, 4, 2]
    assert [len(group[0].response.ids) for group in groups] == [1, 2, 3, 4, 5]  # its own limit
    assert not any("patches" in one.sample for group in groups for one in group)
    # a prompt with a picture ends the chunk
    sizes.clear()
    monkeypatch.setattr(rollout, "CHUNK_PATCHES", 0)
    groups = sample_groups(generator, six[:5], 1, 1)
    assert sizes == [2, 2, 1] and all("patches" in one.sample for group in groups for one in group)


def test_a_prompt_whose_picture_is_missing_has_no_group(model, processor, tmp_path):
    """It says why. The others have the same responses as without it."""
    good = [asked("One?", "think", "a"), asked("Two?", "agentic_think", "d")]
    bad = []
    for mode, seed in (("no_think", "b"), ("auto_think", "c")):
        bad.append(asked("Red?", mode, seed, tmp_path, "none.png"))
    generator = Generator(model, processor)
    groups = sample_groups(generator, [good[0], *bad, good[1]], 2, 5)
    assert [len(group) for group in groups] == [2, 0, 0, 2]
    assert [prompt.failure[:18] for prompt in [good[0], *bad]] == ["", *["none.png: missing "] * 2]
    why = failures_of([good[0], *bad])
    assert [line.startswith(f"{tmp_path}: none.png: missing") for line in why] == [True] * 2
    assert ids_of([groups[0], groups[3]]) == ids_of(sample_groups(generator, good, 2, 5))
    assert sample_groups(generator, bad, 2, 5) == [[], []]
    assert sample_groups(generator, [], 2, 5) == []


def test_tools_run_in_their_modes_alone(model, processor, tmp_path, monkeypatch):
    picture(80, 60).save(tmp_path / "x.png")
    run = rollout.sandbox.run
    runs = []
    loads = []

    def watched_run(*args):
        runs.append(args)
        return run(*args)

    def watched_load(*args, **limits):
        loads.append(args)
        return pictures_of(*args, **limits)

    monkeypatch.setattr(rollout.sandbox, "run", watched_run)
    monkeypatch.setattr(rollout, "pictures_of", watched_load)
    crop = call("crop(0, 0, 500, 500)")
    scripted(monkeypatch, lambda prompt: crop + "so red")
    modes = ("think", "auto_think", "no_think", "agentic_think", "plain")
    prompts = [asked("What?", mode, mode, tmp_path, "x.png") for mode in modes]
    groups = sample_groups(Generator(model, processor), prompts, 2, 100)
    assert len(runs) == len(loads) == 4
    for prompt, group in zip(prompts, groups):
        for one in group:
            response = one.response
            kinds = [item["type"] for item in one.content]
            assert one.content[0]["text"] == crop
            if prompt.mode in ("auto_think", "agentic_think"):
                assert response.finished and not all(response.sampled)
                assert len(response.observations) == len(response.extensions) == 1
                assert kinds == ["text", "text", "image", "text", "text"]
            else:  # without tools a call is its end
                assert not response.finished and all(response.sampled)
                assert response.observations == response.extensions == []
                assert kinds == ["text"]


def test_tools_look_at_what_the_processor_may_read(processor, tmp_path):
    picture(80, 60).save(tmp_path / "x.png")
    prompt = asked("What?", "agentic_think", "a", tmp_path / "sub", "../x.png")

    def load(**limits):
        return load_pictures(prompt, replace(processor, **limits))()

    [seen] = load(allow_outside=True, pixel_limit=80 * 60)
    assert seen.size == (80, 60)
    with pytest.raises(MediaError, match="too_large"):
        load(allow_outside=True, pixel_limit=80 * 60 - 1)
    with pytest.raises(MediaError, match="outside"):
        load()


def test_tools_know_nothing_of_the_known_answer(model, processor, tmp_path, monkeypatch):
    """Pictures of the known answer, even unreadable ones, are none of the question's."""
    picture(80, 60).save(tmp_path / "x.png")
    scripted(monkeypatch, lambda prompt: call("image(2)") + "so red")
    prompts = [asked("What?", "agentic_think", seed, tmp_path, "x.png") for seed in "ab"]
    for prompt, name in zip(prompts, ("x.png", "none.png")):
        answer = [{"type": "image", "image": name}, {"type": "text", "text": "red"}]
        prompt.record["messages"][-1]["content"] = answer
    for [one] in sample_groups(Generator(model, processor), prompts, 1, 100):
        assert texts_of(one.response) == ["error: line 1: image(2): there are 1"]
        assert one.response.finished


# --------------------------------------------------------------------------------------------------
# rewards and trajectories


def test_rewards_know_the_mode_the_truth_and_the_length(model, processor, monkeypatch):
    right = "<think>so known</think><answer>\\boxed{known}</answer>"
    scripted(monkeypatch, lambda prompt: "known" if "/no_think" in prompt else right)
    prompts = [asked("What?", "think"), asked("What?", "no_think"), asked("Who?", "plain")]
    prompts[2].record["meta"]["answer"] = "other"
    groups = sample_groups(Generator(model, processor), prompts, 1, 100)
    reward_groups(groups, 100)
    thought, short, wrong = (group[0].reward for group in groups)
    assert (thought.outcome, thought.format, thought.length) == (1, 1, 0)
    assert (short.outcome, short.format, short.length) == (1, 1, 0)
    assert wrong.outcome == 0

    # The last quarter of max_tokens costs more and more: here all but 1 of 25 tokens of it.
    n = len(groups[0][0].response.ids)
    reward_groups(groups, n + 1)
    buffer = (n + 1) // 4
    assert groups[0][0].reward.length == pytest.approx((1 - buffer) / buffer)
    assert groups[1][0].reward.length == 0


def test_rewards_ask_the_judge_with_the_question(model, processor, monkeypatch):
    seen = []

    def judge(task, **facts):
        seen.append((task, facts["question"]))
        return 1.0

    scripted(monkeypatch, lambda prompt: "it is well known to all")
    groups = sample_groups(Generator(model, processor), [asked("Who?", "no_think")], 1, 100)
    reward_groups(groups, 100, judge)
    assert seen == [("outcome", "Who?")] and groups[0][0].reward.outcome == 1


def test_a_trajectory_is_what_was_read_and_written(model, processor, tmp_path, monkeypatch):
    """Labels are the sampled ids alone, each at the token that predicts it."""
    picture(80, 60).save(tmp_path / "x.png")
    scripted(monkeypatch, lambda prompt: call("crop(0, 0, 500, 500)") + "so red")
    prompt = asked("What?", "agentic_think", "a", tmp_path, "x.png")
    [[one]] = sample_groups(Generator(model, processor), [prompt], 1, 100)
    sample = trajectory(one)
    response = one.response
    start = len(one.sample["tokens"])
    labels = sample["labels"].tolist()
    assert set(labels[: start - 1]) == {-100} and labels[-1] == -100
    for label, token, own in zip(labels[start - 1 :], response.ids, response.sampled):
        assert label == (token if own else -100)
    assert sum(response.sampled) == sum(label != -100 for label in labels)
    built = whole(one.sample, response)
    for key in ("tokens", "positions", "grids", "patches"):
        assert torch.equal(sample[key], built[key])
    assert len(sample["grids"]) == 2  # the question's and the tool's
