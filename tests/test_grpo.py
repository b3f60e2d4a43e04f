"""grpo.py: its loss by golden values, a step against its formulas, the loop, the command."""

import copy
import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

import coldstart
import generate
import grpo
import sft
from common import rollout
from common.checkpoint import Progress
from common.optim import make_optimizer
from common.parallel import shard, whole
from common.rewards import Reward, parse, turn_of
from common.rollout import Prompt, Response, Rollout, converse, trajectory
from common.run import add_judge_arguments, arguments, start
from data import Processor, pack
from generate import Generator
from grpo import (
    advantages,
    analysis_tokens,
    grpo_step,
    k3,
    policy_loss,
    teaches,
    token_weight,
    training_sample,
)
from miniature import curve, run_small, weights, write_questions
from model import PRESETS, KeyeVL
from phases import first_model, kept_process
from stage import DEVICES, in_processes
from test_rollout import confined


def close(values, expected, tol=1e-5):
    values = torch.as_tensor(values, dtype=torch.float64)
    expected = torch.as_tensor(expected, dtype=torch.float64)
    return torch.allclose(values, expected, atol=tol, rtol=0)


# --------------------------------------------------------------------------------------------------
# advantages


def test_advantages_golden():
    assert close(advantages([1, 0, 0, 0]), [1.49970, -0.49990, -0.49990, -0.49990])
    eight = advantages([1] + [0] * 7, eps=0)
    assert close(eight[:2], [2.4749, -0.3536], 1e-4)
    assert close(advantages([1] * 4 + [0] * 4, eps=0)[::7], [0.9354, -0.9354], 1e-4)
    assert close(advantages([1] + [0] * 15, eps=0)[:2], [3.75, -0.25])
    assert close(advantages([3.0, 1.0], eps=0), [0.7071, -0.7071], 1e-4)


def test_advantages_limits():
    assert advantages([1, 1, 1]) == [0, 0, 0]
    assert close(advantages([2, 5, 3]), advantages([102, 105, 103])), "a shift changes nothing"
    scaled = advantages([20, 50, 30], eps=0)
    assert close(advantages([2, 5, 3], eps=0), scaled), "nor does a scale"
    assert close(advantages([0, 1, 0]), [advantages([1, 0, 0])[i] for i in (1, 0, 2)])
    with pytest.raises(ValueError, match="group of one"):
        advantages([1.0])


def test_advantages_of_dr_grpo_keep_the_scale():
    assert advantages([1, 0, 0, 0], "dr_grpo") == [0.75, -0.25, -0.25, -0.25]
    tenth = advantages([2, 5, 3], "dr_grpo")
    assert close(advantages([20, 50, 30], "dr_grpo"), [10 * a for a in tenth])


def test_an_unscored_response_is_in_neither_mean_nor_std():
    first, unscored, last = advantages([1, None, 0])
    assert unscored == 0
    assert close([first, last], advantages([1, 0]))
    assert advantages([None, 1]) == [0, 0]


# --------------------------------------------------------------------------------------------------
# the loss


@pytest.mark.parametrize("algo, expected", [("grpo", 0.0), ("dapo", 0.3), ("dr_grpo", 0.15)])
def test_aggregation_golden(algo, expected):
    lengths = [2, 4, 6, 8]
    each = []
    weight = []
    for length, a in zip(lengths, [1.5, -0.5, -0.5, -0.5]):
        each += [a] * length
        weight += [token_weight(length, algo, max_tokens=10, responses=4, tokens=20)] * length
    zero = torch.zeros(20)
    given = torch.tensor(each), torch.tensor(weight)
    loss, clipped = policy_loss(zero, zero, zero, *given, algo=algo, beta=0.0)
    assert close(loss, expected)
    assert not clipped.any()


def test_without_a_token_weights_are_finite():
    assert token_weight(0, "grpo", 10, 4, 0) == 0.25
    assert token_weight(0, "dapo", 10, 4, 0) == 1


def test_the_first_step_is_reinforce():
    old, advantage, weight = torch.randn(12), torch.randn(12), torch.rand(12)
    logp = old.clone().requires_grad_()
    policy_loss(logp, old, old, advantage, weight, beta=0.0)[0].backward()
    assert torch.equal(logp.grad, -weight * advantage)


@pytest.mark.parametrize("rho, advantage, moves, loss", [
    (0.7, 1, True, -0.7),
    (1.0, 1, True, -1),
    (1.27, 1, True, -1.27),
    (1.29, 1, False, -1.28),
    (4, 1, False, -1.28),
    (0.79, -1, False, 0.8),
    (0.81, -1, True, 0.81),
    (1.5, -1, True, 1.5),
    (2.9, -1, True, 2.9),
    (4, -1, False, 3.0),
])
def test_clip_truth_table(rho, advantage, moves, loss):
    logp = torch.tensor([math.log(rho)], requires_grad=True)
    zero, one = torch.zeros(1), torch.ones(1)
    value, clipped = policy_loss(logp, zero, zero, advantage * one, one, beta=0.0)
    value.backward()
    assert close(value.detach(), loss)
    assert (logp.grad.abs() > 0).item() == moves
    assert clipped.tolist() == [float(not moves)]


def test_k3_golden_and_unbiased():
    d = torch.tensor([-2.0, -1, 0, 1, 2])
    assert close(k3(torch.zeros(5), d), [1.135335, 0.367879, 0, 0.718282, 4.389056])
    p, q = torch.randn(2, 50, dtype=torch.float64).log_softmax(-1)
    assert close((p.exp() * k3(p, q)).sum(), (p.exp() * (p - q)).sum(), 1e-12)
    assert k3(torch.tensor(0.0), torch.tensor(1e4)).isfinite()


def test_kl_trains_where_rewards_do_not():
    logp = torch.zeros(3, requires_grad=True)
    reference = torch.tensor([0.5, -0.5, 0.0])
    zero, one = torch.zeros(3), torch.ones(3)
    policy_loss(logp, zero, reference, zero, one, beta=0.1)[0].backward()
    assert close(logp.grad, 0.1 * (1 - reference.exp()))


def test_gspo_golden():
    zero, third, two = torch.zeros(3), torch.full((3,), 1 / 3), torch.full((3,), 2.0)
    owner = torch.zeros(3, dtype=torch.long)
    how = dict(beta=0.0, clip=(0.5, 0.5))
    logp = torch.tensor([0.1, -0.1, 0.3], requires_grad=True)
    loss, _ = policy_loss(logp, zero, zero, two, third, owner, "gspo", **how)
    loss.backward()
    assert close(loss.detach(), -2 * math.exp(0.1))
    assert close(logp.grad, [-0.736781] * 3)

    # at the policy that sampled, both are REINFORCE
    gradients = []
    for algo in ("grpo", "gspo"):
        logp = torch.zeros(3, requires_grad=True)
        policy_loss(logp, zero, zero, two, third, owner, algo, **how)[0].backward()
        gradients.append(logp.grad)
    assert torch.equal(*gradients)


def test_gspo_clips_whole_responses():
    logp = torch.tensor([0.1, 0.1, 0.0, 0.0])
    owner = torch.tensor([0, 0, 1, 1])
    zero, one = torch.zeros(4), torch.ones(4)
    _, clipped = policy_loss(logp, zero, zero, one, one, owner, "gspo", 0.0, (3e-4, 4e-4))
    assert clipped.tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("algo", grpo.ALGORITHMS)
def test_an_empty_batch_has_a_gradient_of_zero(algo):
    logp = torch.zeros(0, requires_grad=True)
    nothing = [torch.zeros(0)] * 4
    loss, _ = policy_loss(logp, *nothing, torch.zeros(0, dtype=torch.long), algo)
    loss.backward()
    assert loss.item() == 0


def test_a_bandit_is_solved():
    """One state, four responses of one token, one of them right."""
    torch.manual_seed(0)
    logits = torch.zeros(4, requires_grad=True)
    opt = torch.optim.Adam([logits], lr=0.1)
    weight = torch.full((8,), token_weight(1, "grpo", 1, 8, 8))
    for _ in range(100):
        tokens = torch.multinomial(logits.detach().softmax(-1), 8, replacement=True)
        right = (tokens == 2).float().tolist()
        old = logits.detach().log_softmax(-1)[tokens]
        logp = logits.log_softmax(-1)[tokens]
        advantage = torch.tensor(advantages(right))
        policy_loss(logp, old, old, advantage, weight, beta=0.0)[0].backward()
        opt.step()
        opt.zero_grad()
    assert logits.softmax(-1)[2] > 0.95


# --------------------------------------------------------------------------------------------------
# the sampler's log-probabilities are the trainer's


def write(monkeypatch, tokenizer, text: str):
    """What is sampled next is this text, with the log-probabilities that the model gives it."""
    choose = generate.choose
    ids = iter(tokenizer.encode(text, added=True))

    def forced(logits, *how):
        tokens, _ = choose(logits, *how)
        tokens[0] = next(ids, tokens[0])
        logp = logits.log_softmax(-1)
        return tokens, logp.gather(1, tokens[:, None])[:, 0]

    monkeypatch.setattr(generate, "choose", forced)


@pytest.mark.parametrize("device", DEVICES)
def test_logprobs_of_sampler_and_trainer_agree_after_a_tool_turn(
    model, processor, monkeypatch, device
):
    model = copy.deepcopy(model).to(device)
    tokenizer = processor.tokenizer

    @torch.no_grad()
    def logprobs(sample):
        batch = pack([sample])
        for key in ("tokens", "labels", "positions", "patches"):
            batch[key] = batch[key].to(device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            return model.logprobs(batch)[0].cpu()

    picture = Image.effect_noise((300, 280), 80).convert("RGB")
    image = {"type": "image", "image": picture}
    asked = [{"role": "user", "content": [image, {"type": "text", "text": "Look./agentic_think"}]}]
    prompt = processor({"messages": asked}, generate=True)
    write(monkeypatch, tokenizer, "<think>a\n<tool_call>crop(0, 0, 500, 500)\nzoom(2)</tool_call>")
    how = dict(temperature=1.0, top_k=0, top_p=1.0, seed=1)
    generator = Generator(model, processor, graphs=False)  # the host says what is drawn
    [response] = converse(generator, [prompt], [lambda: [picture]], 60, **how)
    [seen] = response.observations
    assert seen.ok

    sample = trajectory(Rollout(None, prompt, response))
    logp = logprobs(sample)
    own = [p for p, mine in zip(response.logprobs, response.sampled) if mine]
    assert len(logp) == len(own) < len(response.ids)
    difference = (logp - torch.tensor(own)).abs()
    if device == "cpu":
        assert difference.max() < 1e-4
    else:  # bf16, in a pack and with a cache
        assert difference.mean() < 0.02
        assert difference.max() < 0.2

    # What the tool gave has no label, but it changes what comes after it, and that alone.
    given = [i for i, mine in enumerate(response.sampled) if not mine]
    first = len(prompt["tokens"]) + given[0]
    assert (sample["labels"][first - 1 : first - 1 + len(given)] == -100).all()
    text = first
    while sample["tokens"][text].item() in tokenizer.special.values():
        text += 1
    other = sample | {"tokens": sample["tokens"].clone()}
    other["tokens"][text] = (other["tokens"][text] + 1) % 900
    moved = (logprobs(other) - logp).abs()
    before = sum(response.sampled[: given[0]])
    assert moved[:before].max() < 1e-5
    assert moved[before:].max() > 1e-6

    # The turn that alignment stores holds the picture, and is encoded to the same tokens.
    content = turn_of(response, tokenizer)
    pictures = [item for item in content if item["type"] == "image"]
    assert len(pictures) == 1
    again = processor({"messages": [*asked, {"role": "assistant", "content": content}]})
    n = len(prompt["tokens"]) + given[-1] + 1
    assert again["tokens"][:n].tolist() == sample["tokens"][:n].tolist()
    assert torch.equal(again["positions"][:, :n], sample["positions"][:, :n])


# --------------------------------------------------------------------------------------------------
# rollouts


def rollout_of(processor, text: str, total=0.0, right=0.0, form=1.0, mode="think", given=0):
    """A rollout that was sampled with log-probability -1 a token; its last `given` by a tool."""
    question = {"role": "user", "content": "How many?"}
    meta = {"task": "count", "verifier": "number", "answer": "3"}
    prompt = Prompt({"messages": [question], "meta": meta}, None, mode, "0/0/0")
    sample = processor({"messages": [question]}, generate=True)
    ids = processor.tokenizer.encode(text, added=True)
    first = sample["next_position"]
    response = Response(
        ids=ids,
        logprobs=[-1.0] * len(ids),
        sampled=[i < len(ids) - given for i in range(len(ids))],
        positions=[[first + i] * 3 for i in range(len(ids))],
        finished=True,
    )
    parsed = parse(text, mode)
    outcome = None if right is None else 0.1 + 0.8 * right
    reward = Reward(outcome, right, form, 0.5, 0.25, -0.125, parsed, total)
    return Rollout(prompt, sample, response, [{"type": "text", "text": text}], reward)


ANALYSIS = "<analysis>Easy, so /no_think.</analysis>"


def test_groups_whose_rewards_are_equal_are_dropped(processor):
    def group(*scores):
        return [rollout_of(processor, "3", *score) for score in scores]

    assert teaches(group((0.9, 1), (0.1, 0)))
    assert teaches(group((0.9, 1), (0.1, 1))), "both right, one of them better"
    assert teaches(group((0.4, 0), (0.1, 0))), "both wrong, one of them nearer"
    assert not teaches(group((0.1, 1), (0.1, 0))), "the reward decides, not what counts as right"
    assert not teaches(group((0.1 + 0.2, 0), (0.3, 0))), "of rounding"
    assert not teaches([])


def test_length_alone_teaches_nothing(processor):
    """Not what is overlong, and not what auto mode pays for its tokens."""
    texts = ["12", "1 2 3 4 5 6 7 8 9"]
    group = [rollout_of(processor, text, 0.875, 1.0, mode="auto_think") for text in texts]
    group[0].reward.length, group[0].reward.total = 0.0, 1.0  # earned 1, as the other
    assert not teaches(group)
    grpo.charge_length([group], max_tokens=40)
    assert group[0].reward.total != group[1].reward.total and not teaches(group)
    group[1].reward.total -= 0.5
    assert teaches(group)


@pytest.mark.parametrize(
    "mode, form",
    [
        ("no_think", "{}"),
        ("auto_think", "<analysis>Easy /no_think.</analysis>{}"),
        ("think", r"<think>one, two, three</think><answer>\boxed{{{}}}</answer>"),
    ],
)
def test_a_right_answer_among_other_words_earns_half(processor, mode, form):
    """As benchmarks read the bare value: "orange square" does not answer what colour it is."""

    def rollout(text, *scores):
        return rollout_of(processor, form.format(text), *scores, mode=mode)

    bare, wordy = rollout("3", 1.35, 1.0), rollout("three circles", 1.35, 1.0)
    assert not teaches([bare, wordy])
    others = [rollout("4 circles", 0.2), rollout("3 circles", 0.0, 1.0, 0.0)]
    unscored = rollout("3 circles", None, 1.0)
    grpo.charge_words([[bare, wordy], [], [*others, unscored]], share=0.5)
    assert bare.reward.total == 1.35
    assert wordy.reward.total == pytest.approx(1.35 - 0.9 / 2), "half of its outcome"
    assert teaches([bare, wordy])
    assert [r.reward.total for r in others] == [0.2, 0.0], "wrong, or out of form"
    assert unscored.reward.total is None


def test_what_only_a_judge_found_right_has_no_bare_value(processor):
    judged = rollout_of(processor, "a hound", 1.0, 1.0, mode="no_think")
    judged.prompt.record["meta"] = {"verifier": "text", "answer": "a dog"}
    grpo.charge_words([[judged]], share=0.5)
    assert judged.reward.total == 1.0


def test_an_answer_out_of_form_is_as_bad_as_a_wrong_one(processor):
    in_form, out_of_form = ((total, 1, form) for total, form in ((1.0, 1.0), (0.0, 0.0)))
    wrong = (0.0, 0, 1.0)
    for scores, expected in (((in_form, out_of_form), True), ((out_of_form, wrong), False)):
        assert teaches([rollout_of(processor, "3", *score) for score in scores]) == expected


def test_a_question_that_always_fails_is_asked_with_as_few_hints_as_help(processor):
    """Of four questions one is right alone, one with the first hint, one with the third; one has
    two hints, and none helps."""
    hints = [["a"], ["a", "b", "c"], ["a", "b", "c"], ["a", "b"]]
    helps = ["", "a", "c", "c"]
    groups = []
    for own in hints:
        group = [rollout_of(processor, f"wrong {i}") for i in range(4)]
        group[0].prompt.record["meta"]["hints"] = own
        for rollout in group:
            rollout.prompt = group[0].prompt
        groups.append(group)
    groups[0][2].reward.right = 1.0
    asked = []

    def ask(prompts):
        asked.append([(numbers[id(p.record)], p.hint, p.seed) for p in prompts])
        again = []
        for prompt in prompts:
            rights = [prompt.hint == helps[numbers[id(prompt.record)]]] * 3 + [False]
            again.append([hinted_rollout(processor, prompt, right) for right in rights])
        return again

    numbers = {id(group[0].prompt.record): i for i, group in enumerate(groups)}
    before = [list(group) for group in groups]
    after = grpo.helped(ask, groups, 3)

    [asked] = asked
    of_question = [[hint for j, hint, _ in asked if j == i] for i in range(4)]
    assert of_question == [[], *hints[1:]]
    assert len({seed for _, _, seed in asked}) == 3, "other draws for each level"
    assert after[0] is groups[0] and after[3] is groups[3]
    for i in (1, 2):
        rights = [rollout.reward.right for rollout in after[i]]
        assert rights == [1, 1, 0, 0], "half of the wrong ones stay"
        assert after[i][2:] == before[i][2:]
        assert all(rollout.prompt is before[i][0].prompt for rollout in after[i])
        assert teaches(after[i])


def hinted_rollout(processor, prompt, right) -> Rollout:
    """As rollout_of, but of the question with its hint."""
    made = rollout_of(processor, "3", float(right), float(right))
    question = {"role": "user", "content": f"How many? {prompt.hint}"}
    made.sample = processor({"messages": [question]}, generate=True)
    first = made.sample["next_position"]
    made.response.positions = [[first + i] * 3 for i in range(len(made.response.ids))]
    return replace(made, prompt=prompt)


def test_hints_help_to_what_earns_something(processor):
    """A right answer out of its form earns nothing: it neither ends the hints nor is learnt."""
    group = [rollout_of(processor, "wrong") for _ in range(4)]
    group[0].prompt.record["meta"]["hints"] = ["a", "b"]
    group[1].reward.right, group[1].reward.format = 1.0, 0.0

    def answers(prompt):
        again = [hinted_rollout(processor, prompt, True) for _ in range(4)]
        out_of_form = again if prompt.hint == "a" else again[:2]
        for rollout in out_of_form:
            rollout.reward.format = 0.0
        again[3].reward.total = None if prompt.hint == "b" else 0.0  # a judge has failed
        return again

    def ask(prompts):
        return [answers(prompt) for prompt in prompts]

    [after] = grpo.helped(ask, [group], 2)
    assert [grpo.earns(rollout) for rollout in after] == [True, False, False, False]
    assert after[1:] == group[1:]


def test_hints_go_no_further_than_asked_and_not_where_a_judge_failed(processor):
    group = [rollout_of(processor, "wrong") for _ in range(2)]
    group[0].prompt.record["meta"]["hints"] = ["a", "b", "c"]
    levels = []

    def ask(prompts):
        levels.extend(prompt.hint for prompt in prompts)
        return [[hinted_rollout(processor, prompt, False) for _ in range(2)] for prompt in prompts]

    assert grpo.helped(ask, [group, []], 2) == [group, []]
    assert levels == ["a", "b"]
    group[1].reward.right = None
    assert grpo.helped(ask, [group], 2) == [group]
    assert levels == ["a", "b"], "it may have been right"


def test_what_a_hint_helped_to_is_learnt_as_the_answer_to_the_question_alone(processor):
    """Token by token what the same answer without the hint would be."""
    plain = rollout_of(processor, "3 4")
    prompt = replace(plain.prompt, hint="a b c")
    hinted = hinted_rollout(processor, prompt, True)
    hinted.response.ids = plain.response.ids
    hinted.response.sampled = plain.response.sampled
    first = hinted.sample["next_position"]
    hinted.response.positions = [[first + i] * 3 for i in range(len(plain.response.ids))]
    assert first > plain.sample["next_position"]

    learnt = training_sample(grpo.without_hint(hinted, plain), processor.tokenizer)
    want = training_sample(plain, processor.tokenizer)
    for key in ("tokens", "labels", "positions", "patches", "grids"):
        assert torch.equal(learnt[key], want[key]), key
    assert learnt["sampler"].isnan().all(), "it was sampled from another distribution"


def test_a_step_learns_what_hints_helped_to(monkeypatch, run, processor):
    """The numbers of the step are those of the questions as they stand."""
    group = [rollout_of(processor, text) for text in ("1", "2", "3")]
    group[0].prompt.record["meta"]["hints"] = ["a"]
    step = Step(monkeypatch, run, processor, [group])
    alone = grpo.sample_groups

    def sample_groups(generator, prompts, *more):
        if prompts == "prompts":
            return alone(generator, prompts, *more)
        return [[hinted_rollout(processor, prompts[0], True)]]

    monkeypatch.setattr(grpo, "sample_groups", sample_groups)
    policy = Table(1)
    start = policy.scores.detach().clone()
    values = step(policy, None, updates=1, beta=0.0, hints=2)
    assert values["helped"] == 1 and values["right"] == 0 and values["dropped_groups"] == 1
    assert math.isfinite(values["mismatch"])
    [three] = processor.tokenizer.encode("3")
    moved = policy.scores.detach() - start
    assert moved[three] > 0 and moved.argmax() == three


def test_a_step_prefers_the_bare_value_of_two_right_answers(monkeypatch, run, processor):
    texts = ("3", "3 circles")
    group = [rollout_of(processor, text, 0.9, 1.0, mode="no_think") for text in texts]
    policy = Table(1)
    start = policy.scores.detach().clone()
    values = Step(monkeypatch, run, processor, [group])(policy, None, updates=1, beta=0.0)
    assert values["right"] == 1 and values["dropped_groups"] == 0
    [three] = processor.tokenizer.encode("3")
    word = processor.tokenizer.encode(" circles")[-1]
    moved = policy.scores.detach() - start
    assert moved[three] > 0 > moved[word]


def test_what_the_judge_did_not_score_does_not_decide(processor):
    wrong = rollout_of(processor, "3")
    right = rollout_of(processor, "3", 1.0, 1.0)
    unscored = rollout_of(processor, "3", None, 1.0)
    assert not teaches([wrong, unscored])
    assert teaches([wrong, unscored, right])
    # out of form it earns nothing, whatever the judge would have said
    unread = rollout_of(processor, "3", 0.0, None, form=0.0)
    assert not teaches([wrong, unread])


def test_in_auto_mode_a_response_pays_for_what_it_writes(processor):
    texts = ["12", "1 2 3 4 5 6 7 8 9"]
    auto = [rollout_of(processor, text, 1.0, mode="auto_think") for text in texts]
    auto.append(rollout_of(processor, "1 2 3 4 5", 1.0, mode="auto_think", given=3))
    auto.append(rollout_of(processor, "12", None, mode="auto_think"))
    think = [rollout_of(processor, text, 1.0) for text in texts]
    grpo.charge_length([auto, think], max_tokens=40)
    assert [rollout.reward.total for rollout in think] == [1.0, 1.0]
    assert auto[3].reward.total is None
    for rollout in auto[:3]:
        written = sum(rollout.response.sampled)
        assert rollout.reward.total == pytest.approx(1 - 0.1 * written / 40)
    assert auto[1].reward.total < auto[0].reward.total < 1


def test_the_choice_of_a_mode_ends_with_its_analysis(processor):
    tokenizer = processor.tokenizer

    def chooses(text):
        ids = tokenizer.encode(text, added=True)
        return tokenizer.decode(ids[: analysis_tokens(ids, tokenizer)])

    assert chooses(f"{ANALYSIS}3") == ANALYSIS
    assert chooses("<think>a b c</think><answer>\\boxed{3}</answer>") == ""
    assert chooses(f"3{ANALYSIS}") == "", "only at the beginning"
    assert chooses("<analysis>Easy") == "", "it never chose"
    assert chooses(ANALYSIS) == ANALYSIS


def test_a_training_sample_has_a_value_for_each_own_token(processor):
    rollout = rollout_of(processor, f"{ANALYSIS}1 2 3", given=2)
    rollout.advantage = -0.5
    n = sum(rollout.response.sampled)
    rollout.response.logprobs = [-float(i) for i in range(n)] + [0.0, 0.0]
    sample = training_sample(rollout, processor.tokenizer)
    assert int((sample["labels"] != -100).sum()) == n
    assert sample["sampler"].tolist() == [-i for i in range(n)]
    assert sample["advantage"].tolist() == [-0.5] * n
    chooses = len(processor.tokenizer.encode(ANALYSIS, added=True))
    assert sample["chooses_mode"].tolist() == [i < chooses for i in range(n)]


def test_a_samples_values_skip_what_a_tool_gave(processor):
    rollout = rollout_of(processor, "1 2 3 4 5")
    n = len(rollout.response.ids)
    rollout.response.sampled = [i % 2 == 0 for i in range(n)]
    rollout.response.logprobs = [-float(i) for i in range(n)]
    sample = training_sample(rollout, processor.tokenizer)
    assert sample["sampler"].tolist() == [-i for i in range(0, n, 2)]


def test_the_choice_of_the_mode_weighs_apart(processor):
    """All of it half of what the rest of the response weighs, however long both are."""
    samples = []
    for text in (f"{ANALYSIS}3", "<think>a b c</think>", ANALYSIS):
        samples.append(training_sample(rollout_of(processor, text), processor.tokenizer))
    grpo.set_weights(samples, "grpo", max_tokens=100, responses=3, tokens=99)
    sums = []
    for sample in samples:
        chooses = sample["chooses_mode"]
        weight = sample["weight"]
        sums += [weight[chooses].sum(), weight[~chooses].sum()]
    half, whole_ = 0.5 / 3, 1 / 3
    assert close(sums, [half, whole_, 0, whole_, half, 0])


def test_a_blank_sample_trains_nothing(model, processor):
    blank = grpo.blank_sample(processor)
    blank |= {key: torch.zeros(0) for key in ("old", "reference")}
    batch = grpo.batch_of([blank])
    assert (batch["labels"] == -100).all()
    assert {len(batch[key]) for key in grpo.PER_TOKEN} == {0}
    logp, _ = model.logprobs(batch)
    assert logp.requires_grad and len(logp) == 0


# --------------------------------------------------------------------------------------------------
# a step, by its formulas written out


class Table(nn.Module):
    """A policy that knows no context: one logit for each token."""

    def __init__(self, seed: int):
        super().__init__()
        self.config = PRESETS["toy"]
        generator = torch.Generator().manual_seed(seed)
        self.scores = nn.Parameter(torch.randn(self.config.vocab_size, generator=generator))

    def logprobs(self, batch):
        labels = batch["labels"][batch["labels"] != -100]
        logp = self.scores.log_softmax(-1)
        entropy = -(logp.exp() * logp).sum().detach()
        return logp[labels], entropy.expand(len(labels))

    forward = logprobs


PLAN = {"group": 3, "updates": 2, "max_tokens": 12, "pack": 60, "hints": 0, "words": 0.5}
RATE = 8.0
BETA = 0.05


def rollouts(processor) -> list[list[Rollout]]:
    """Five groups: the second earns the same throughout, the fourth could not be sampled."""
    texts = [
        ("1 2", "3 4 5", "6"),
        ("7", "8 9", "0"),
        ("6 5", "1 9 2", "3 4"),
        (),
        ("12 34", "56", "7 8 9 0 1 2"),
    ]
    scores = [
        ((1.2, 1), (0.0, 0), (-0.4, 0)),
        ((1.4, 1), (1.4, 1), (1.4, 1)),
        ((0.2, 0), (1.0, 1), (None, 1)),
        (),
        ((1.5, 1), (0.0, 0), (1.5, 1)),
    ]
    modes = ["think", "no_think", "agentic_think", "think", "auto_think"]
    groups = []
    for mode, group_texts, group_scores in zip(modes, texts, scores):
        group = []
        for text, score in zip(group_texts, group_scores):
            group.append(rollout_of(processor, text, *score, mode=mode))
        groups.append(group)
    return groups


def written_out(policy, reference, groups, algo, beta, updates=2) -> SimpleNamespace:
    """The step of grpo.py's docstring, response by response: weights, loss, norm, ratios."""
    max_tokens = PLAN["max_tokens"]
    low, high = (3e-4, 4e-4) if algo == "gspo" else (0.2, 0.28)
    logits = policy.scores.detach().double()
    p_old = logits.log_softmax(-1)
    p_reference = reference.scores.detach().double().log_softmax(-1)

    # (ids, advantage) of each response, group by group
    kept = []
    for group in groups:
        if len({rollout.reward.total for rollout in group} - {None}) < 2:
            continue
        rewards = {}
        for i, rollout in enumerate(group):
            total = rollout.reward.total
            if total is not None and rollout.prompt.mode == "auto_think":
                total -= 0.1 * len(rollout.response.ids) / max_tokens
            if total is not None:
                rewards[i] = total
        known = torch.tensor(list(rewards.values()), dtype=torch.float64)
        scale = 1 if algo == "dr_grpo" else known.std() + 1e-4
        responses = []
        for i, rollout in enumerate(group):
            a = (rewards[i] - known.mean()) / scale if i in rewards else torch.tensor(0.0)
            responses.append((rollout.response.ids, a))
        kept.append(responses)

    found = SimpleNamespace(loss=0.0, ratios=[], clipped=[], kl=[])
    for u in range(updates):
        responses = sum(kept[u::updates], [])
        n = len(responses)
        all_tokens = sum(len(ids) for ids, _ in responses)
        logits = logits.detach().requires_grad_()
        logp = logits.log_softmax(-1)
        loss = 0.0
        for ids, a in responses:
            per_token = {
                "grpo": 1 / (n * len(ids)),
                "gspo": 1 / (n * len(ids)),
                "dapo": 1 / all_tokens,
                "dr_grpo": 1 / (n * max_tokens),
            }[algo]
            log_ratio = logp[ids] - p_old[ids]
            if algo == "gspo":
                log_ratio = log_ratio.mean().expand(len(ids))
            for t, rho in enumerate(log_ratio.exp()):
                gain = torch.min(rho * a, rho.clamp(1 - low, 1 + high) * a)
                if a < 0:
                    gain = torch.max(gain, 3 * a)
                d = p_reference[ids[t]] - logp[ids[t]]
                kl = d.exp() - d - 1
                loss += per_token * (beta * kl - gain)
                found.kl.append(kl.item())
                found.ratios.append(rho.item())
                found.clipped.append(float(gain != rho * a))
        [gradient] = torch.autograd.grad(loss, logits)
        found.loss += loss.item()
        found.norm = gradient.norm().item()
        logits = logits - RATE * gradient / max(1.0, found.norm)
    found.logits = logits.detach().float()
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    flags = ["--out", str(tmp_path_factory.mktemp("run")), "--device", "cpu", "--threads", "1"]
    with kept_process():
        return start(arguments(grpo.__doc__).parse_args(flags), "grpo")


class Step:
    """grpo_step on rollouts that are there already; `events` says in which order what happened.

    They have their rewards only once reward_groups is called.
    """

    def __init__(self, monkeypatch, run, processor, groups):
        self.events = []
        self.run = run
        self.replay = None
        self.sampler = SimpleNamespace(
            refresh=lambda: self.events.append("refresh"),
            generator=SimpleNamespace(processor=processor),
            blank=grpo.blank_sample(processor),
        )

        rewards = [(rollout, rollout.reward) for group in groups for rollout in group]
        for rollout, _ in rewards:
            rollout.reward = None

        def sample_groups(*asked):
            self.events.append(("sample", *asked))
            return groups

        def reward_groups(*asked):
            self.events.append(("reward", *asked))
            for rollout, reward in rewards:
                rollout.reward = reward

        monkeypatch.setattr(grpo, "sample_groups", sample_groups)
        monkeypatch.setattr(grpo, "reward_groups", reward_groups)

    def __call__(self, policy, reference, algo="grpo", beta=BETA, **plan):
        opt = torch.optim.SGD(policy.parameters(), RATE)
        values = grpo_step(
            self.run, policy, reference, self.sampler, opt, "prompts",
            PLAN | plan, algo, beta, "judge", self.replay,
        )
        assert all(p.grad is None for p in policy.parameters())
        return values


@pytest.mark.parametrize("beta", [0.0, BETA])
@pytest.mark.parametrize("algo", grpo.ALGORITHMS)
def test_a_step_is_its_formulas_written_out(monkeypatch, run, processor, algo, beta):
    groups = rollouts(processor)
    policy, reference = Table(1), Table(2)
    expected = written_out(policy, reference, copy.deepcopy(groups), algo, beta)
    step = Step(monkeypatch, run, processor, groups)
    values = step(policy, reference if beta else None, algo, beta)
    assert close(policy.scores.detach(), expected.logits, 1e-5)
    assert values["loss"] == pytest.approx(expected.loss, abs=1e-5)
    assert float(values["norm"]) == pytest.approx(expected.norm, rel=1e-4)
    assert values["clipped"] == pytest.approx(sum(expected.clipped) / len(expected.clipped))
    read = [trajectory(rollout) for i in (0, 2, 4) for rollout in groups[i]]
    assert values["tokens"] == sum(len(sample["tokens"]) for sample in read)
    if beta:
        assert values["kl"] == pytest.approx(sum(expected.kl) / len(expected.kl), rel=1e-4)


def test_the_updates_of_a_rollout_are_real(monkeypatch, run, processor):
    """From the second on ratios leave 1: clipping acts, and every algorithm goes its own way."""
    found = {}
    for algo in grpo.ALGORITHMS:
        policy = Table(1)
        groups = rollouts(processor)
        ratios = written_out(policy, Table(2), groups, algo, BETA).ratios
        assert max(abs(rho - 1) for rho in ratios) > 0.25
        values = Step(monkeypatch, run, processor, groups)(policy, Table(2), algo)
        assert values["clipped"] > 0.02
        found[algo] = policy.scores.detach()
    for i, algo in enumerate(grpo.ALGORITHMS):
        for other in grpo.ALGORITHMS[:i]:
            assert not close(found[algo], found[other], 1e-3), (algo, other)


def test_with_one_update_every_ratio_is_one(monkeypatch, run, processor):
    for algo in grpo.ALGORITHMS:
        step = Step(monkeypatch, run, processor, rollouts(processor))
        assert step(Table(1), Table(2), algo, updates=1)["clipped"] == 0


def test_old_and_reference_are_asked_before_the_policy_moves(monkeypatch, run, processor):
    """Of all updates, from the policy that sampled; gradients are taken only after that."""
    order = []

    class Recorded(Table):
        def logprobs(self, batch):
            order.append((self.name, torch.is_grad_enabled(), self.scores.detach().clone()))
            return super().logprobs(batch)

    policy, reference = Recorded(1), Recorded(2)
    policy.name, reference.name = "policy", "reference"
    start_ = policy.scores.detach().clone()
    Step(monkeypatch, run, processor, rollouts(processor))(policy, reference, pack=10_000)
    steps = [(name, grad) for name, grad, _ in order]
    # the first update's policy is itself the one that sampled
    asked = [("reference", False), ("policy", False), ("reference", False)]
    assert steps == [*asked, ("policy", True), ("policy", True)]
    assert all(torch.equal(logits, start_) for name, _, logits in order[:4] if name == "policy")
    assert not torch.equal(order[-1][2], start_)


def test_a_step_begins_with_fresh_weights_then_samples_then_rewards(monkeypatch, run, processor):
    groups = rollouts(processor)
    step = Step(monkeypatch, run, processor, groups)
    step(Table(1), Table(2))
    sampled = ("sample", step.sampler.generator, "prompts", 3, 12)
    assert step.events == ["refresh", sampled, ("reward", groups, 12, "judge")]


def test_where_no_group_teaches_nothing_moves(monkeypatch, run, processor):
    groups = rollouts(processor)[1:2]
    policy = Table(1)
    before = policy.scores.detach().clone()
    values = Step(monkeypatch, run, processor, groups)(policy, Table(2))
    assert torch.equal(policy.scores.detach(), before)
    assert (values["loss"], values["norm"], values["dropped_groups"]) == (0, 0, 1)
    assert values["tokens"] == 0


class Placed(Table):
    """A Table that notes of each batch whether it is on the device and computed in bf16."""

    def logprobs(self, batch):
        self.seen.append(("moved" in batch, torch.is_autocast_enabled("cpu")))
        return super().logprobs(batch)

    @staticmethod
    def run(run):
        run = copy.copy(run)
        run.dtype = torch.bfloat16
        run.needs_autocast = True  # as shard says of weights in fp32
        run.to = lambda batch: batch | {"moved": True}
        return run


def test_every_forward_is_on_the_device_and_in_the_dtype_of_the_run(monkeypatch, run, processor):
    policy, reference = Placed(1), Placed(2)
    policy.seen = reference.seen = []
    Step(monkeypatch, Placed.run(run), processor, rollouts(processor))(policy, reference)
    assert len(policy.seen) >= 6 and set(policy.seen) == {(True, True)}


def test_other_lines_are_learnt_on_beside_each_update(monkeypatch, run, processor):
    step = Step(monkeypatch, run, processor, rollouts(processor))
    seen = []

    def backward(model, weight):
        seen.append((model.scores.detach().clone(), model.scores.grad.abs().sum() > 0, weight))
        return 2.0 + len(seen)

    step.replay = SimpleNamespace(backward=backward, batches=[])
    policy = Table(1)
    start = policy.scores.detach().clone()
    values = step(policy, Table(2), replay=0.25)
    (first, reward, weight), (second, _, _) = seen
    assert reward and weight == 0.25 and values["replay_loss"] == 3.5
    assert torch.equal(first, start) and not torch.equal(second, start)


def test_fewer_groups_than_updates_are_fewer_updates(monkeypatch, run, processor):
    groups = rollouts(processor)[:1]
    policies = [Table(1), Table(1)]
    for policy, updates in zip(policies, (1, 4)):
        step = Step(monkeypatch, run, processor, copy.deepcopy(groups))
        step(policy, Table(2), updates=updates)
    assert torch.equal(policies[0].scores, policies[1].scores)


@pytest.mark.parametrize("algo", grpo.ALGORITHMS)
def test_micro_batches_change_nothing(monkeypatch, run, model, processor, algo):
    """A real model takes the same step, however its samples are packed."""
    found = []
    for tokens in (10_000, 80, 1):
        policy = copy.deepcopy(model)
        texts = ["1 2 3", f"{ANALYSIS}2", "a red circle at the top", "4"]
        scores = [(1.0, 1), (0.0, 0), (0.5, 0), (0.2, 0)]
        group = [rollout_of(processor, text, *score) for text, score in zip(texts, scores)]
        step = Step(monkeypatch, run, processor, [group])
        values = step(policy, model, algo, pack=tokens, updates=1)
        moved = [p.detach() - q for p, q in zip(policy.parameters(), model.parameters())]
        found.append(torch.cat([m.flatten() for m in moved]))
    largest = found[0].abs().max()
    assert largest > 1e-3
    for other in found[1:]:
        assert (other - found[0]).abs().max() < 1e-4 * largest
    assert values["tokens"] == sum(len(trajectory(rollout)["tokens"]) for rollout in group)


def test_the_numbers_of_a_step(monkeypatch, run, processor):
    groups = rollouts(processor)
    policy, reference = Table(1), Table(2)
    flat = [rollout for group in groups for rollout in group]
    flat[0].response.finished = False
    seen = [SimpleNamespace(ok=True), SimpleNamespace(ok=True), SimpleNamespace(ok=False)]
    flat[1].response.observations = seen
    flat[-1].reward.parsed.chose = "think"
    flat[-2].reward.parsed.chose = "no_think"
    flat[-3].reward.consistency = None
    old = policy.scores.detach().log_softmax(-1)
    d = reference.scores.detach().log_softmax(-1) - old
    trained = torch.tensor(sum((r.response.ids for g in (0, 2, 4) for r in groups[g]), []))
    lengths = [len(rollout.response.ids) for rollout in flat]

    values = Step(monkeypatch, run, processor, groups)(policy, reference, updates=1)
    auto = [1.5 - 0.1 * n / 12 for n in lengths[-3::2]] + [-0.1 * lengths[-2] / 12]
    totals = [1.2, 0.0, -0.4, 1.4, 1.4, 1.4, 0.2, 1.0, *auto]
    stds = [torch.tensor(x).std() for x in (totals[:3], totals[3:6], totals[6:8], auto)]
    expected = {
        "reward": sum(totals) / 11,
        "group_std": sum(stds) / 4,
        "outcome": 0.1 + 0.8 * 8 / 12,
        "right": 8 / 12,
        "format": 1,
        "consistency": 0.5,
        "repetition": 0.25,
        "overlong": -0.125 - 0.1 * sum(lengths[-3:]) / 12 / 12,  # with what auto mode pays
        "unscored": 1 / 12,
        "right_think": 1 / 3,
        "right_no_think": 1,
        "right_agentic_think": 2 / 3,
        "right_auto_think": 2 / 3,
        "asked_think": 3 / 12,
        "asked_no_think": 3 / 12,
        "asked_agentic_think": 3 / 12,
        "asked_auto_think": 3 / 12,
        "auto_chose_think": 1 / 3,
        "auto_chose_no_think": 1 / 3,
        "auto_chose_agentic_think": 0,
        "answer_tokens": sum(lengths) / 12,
        "unfinished": 1 / 12,
        "calls": 3 / 12,
        "failed_calls": 1 / 3,
        "dropped_groups": 2 / 5,
        "taught_count": 3 / 4,  # one group is empty
        "clipped": 0,
        "kl": (d.exp() - d - 1)[trained].mean(),
        "mismatch": (old[trained] + 1).abs().mean(),
        "entropy": -(old.exp() * old).sum(),
    }
    work = ("loss", "norm", "tokens", "visual_tokens", "flops")
    assert set(values) == {*expected, *work}
    for name, value in expected.items():
        assert values[name] == pytest.approx(float(value), abs=1e-5), name
    read = [trajectory(rollout) for i in (0, 2, 4) for rollout in groups[i]]
    assert values["tokens"] == sum(len(sample["tokens"]) for sample in read)
    assert values["flops"] > 0 and values["visual_tokens"] == 0


# --------------------------------------------------------------------------------------------------
# two ranks


def two_ranks(argv):
    """The step is that of one process, though one rank has nothing to train on."""
    out, folder = argv
    run = start(arguments("").parse_args(["--out", out, "--device", "cpu"]), "grpo")
    processor = Processor.from_pretrained(folder)
    check_step(run, processor, "grpo", [slice(0, 5), slice(3, 4)], updates=2)
    for algo in grpo.ALGORITHMS:
        check_step(run, processor, algo, [slice(0, 2), slice(2, 5)], updates=1)
    check_sampler(run, processor, folder)


def check_step(run, processor, algo, shares, updates):
    with pytest.MonkeyPatch.context() as monkeypatch:
        groups = rollouts(processor)
        policy, reference = Table(1), Table(2)
        expected = written_out(policy, reference, copy.deepcopy(groups), algo, BETA, updates)
        step = Step(monkeypatch, run, processor, groups[shares[run.rank]])
        values = step(shard(policy, run), shard(reference, run), algo, updates=updates)
    assert close(whole(policy.scores).detach(), expected.logits, 1e-5)
    assert values["loss"] == pytest.approx(expected.loss, abs=1e-5)
    assert values["right"] == pytest.approx(8 / 12), "means are over all ranks"


def check_sampler(run, processor, folder):
    """A whole copy of the weights in training, as they are at the last refresh."""
    model = shard(KeyeVL.from_pretrained(folder), run)
    sampler = grpo.Sampler(run, model, processor)
    copied = sampler.generator.model
    assert copied is not model
    assert not any(p.requires_grad for p in copied.parameters())
    for factor in (1, 3):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(factor)
        sampler.refresh()
        trained = model.state_dict()
        for name, tensor in copied.state_dict().items():
            assert torch.equal(tensor, whole(trained[name])), name


def test_two_ranks_take_the_step_of_one(tmp_path, start_model):
    in_processes(two_ranks, [tmp_path, start_model], ranks=2)


def with_and_without_picture(argv):
    """Rank 0 has only text, rank 1 a picture: both run the sharded model without gradients."""
    out, folder = argv
    run = start(arguments("").parse_args(["--out", out, "--device", "cpu"]), "grpo")
    processor = Processor.from_pretrained(folder)
    text = {"type": "text", "text": "a"}
    image = {"type": "image", "image": Image.new("RGB", (60, 60))}
    content = [text] if run.main else [image, text]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]
    sample = processor({"messages": messages})
    n = int((sample["labels"] != -100).sum())
    sample["advantage"] = torch.zeros(n)
    grpo.add_logprobs(run, shard(KeyeVL.from_pretrained(folder), run), [[sample]], "old")
    alone, _ = KeyeVL.from_pretrained(folder).logprobs(pack([sample]))
    assert close(sample["old"], alone.detach())


def test_ranks_with_and_without_pictures_stay_together(tmp_path, start_model):
    in_processes(with_and_without_picture, [tmp_path, start_model], ranks=2)


def test_one_process_samples_from_the_model_in_training(run, model, processor):
    sampler = grpo.Sampler(run, model, processor)
    assert sampler.generator.model is model
    sampler.refresh()


# --------------------------------------------------------------------------------------------------
# the loop


@pytest.fixture(scope="module")
def start_model():
    return first_model()


class Loop:
    """train with every step recorded. `after`: what stands in for a checkpoint that is there."""

    def __init__(self, monkeypatch, run, after=None):
        self.run = copy.copy(run)
        self.loaded = []
        self.steps = []
        self.logged = []
        self.saved = []
        self.values = {}  # of every step, besides
        self.lost = {}  # (seed of a step, number of a prompt): why it cannot be asked
        load = KeyeVL.load

        def noted(model, folder):
            self.loaded.append(load(model, folder))
            return model

        def optimizer(*args, **how):
            self.made = how
            self.opt = make_optimizer(*args, **how)
            return self.opt

        def resume(run, model, opt):
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(after or 0)
            return Progress(step=after or 0)

        def step(run, policy, reference, sampler, opt, prompts, plan, *rest):
            lr = {group["lr"] / group["peak_lr"] for group in opt.param_groups}
            self.steps.append(SimpleNamespace(
                policy=policy, reference=reference, sampler=sampler, prompts=prompts, plan=plan,
                rest=rest, lr=lr,
            ))
            return {"loss": 0.5, "norm": 1.0, "tokens": 7, **self.values}

        def fit(run, model, learns, pack, copies):
            self.fitted = (run.world, model, learns, pack, copies)
            return {"compiled": True}

        monkeypatch.setattr(KeyeVL, "load", noted)
        monkeypatch.setattr(sft, "fit", fit)
        monkeypatch.setattr(sft, "make_optimizer", optimizer)
        monkeypatch.setattr(sft, "resume", resume)
        monkeypatch.setattr(grpo, "grpo_step", step)
        monkeypatch.setattr(grpo, "draw_prompts", self.draw_prompts)
        monkeypatch.setattr(
            grpo, "save_if_due", lambda run, *rest, **extra: self.saved.append((*rest, extra))
        )
        monkeypatch.setattr(grpo, "export", lambda run, *what: self.saved.append(what))
        self.run.log = lambda step, steps, **values: self.logged.append((step, steps, values))

    def draw_prompts(self, *asked):
        drawn = []
        for i in range(5):
            lost = self.lost.get((asked[3], i), "")
            drawn.append(SimpleNamespace(asked=asked, number=i, root="train", failure=lost))
        return drawn

    def train(self, folder, *flags, judge=None, size="toy"):
        argv = ["--size", size, "--seed", "4", *map(str, flags)]
        self.run.args = parser().parse_args(argv)
        grpo.train(self.run, folder, ["questions"], grpo.PLAN["toy"], judge)


def parser():
    """grpo.py's flags."""
    made = add_judge_arguments(arguments(grpo.__doc__))
    made.add_argument("--algo", default="grpo")
    made.add_argument("--beta", type=float, default=1e-3)
    return made


def test_every_step_draws_other_prompts_by_its_number(monkeypatch, run, start_model):
    loop = Loop(monkeypatch, run)
    loop.train(start_model, "--steps", "3")
    asked = [[prompt.asked for prompt in step.prompts] for step in loop.steps]
    modes = {"think": 3, "no_think": 4, "auto_think": 3, "agentic_think": 2}
    for step, same in enumerate(asked):
        assert same == [("questions", 48, modes, f"4/{step}", {})] * 5


def test_a_share_of_the_prompts_is_of_what_nobody_has_shown(monkeypatch):
    asked = []
    monkeypatch.setattr(grpo, "draw_prompts", lambda *how: asked.append(how) or [])
    toy, tiny = (grpo.PLAN[size] | {"prompts": 33, "discover": 0.6} for size in ("toy", "tiny"))
    grpo.step_prompts(["old", "new"], toy, "4/7", {"count": 0.3})
    assert [how[:2] for how in asked] == [("old", 13), ("new", 20)]
    assert [how[4:] for how in asked] == [({"count": 0.3},), ()]
    assert [how[3] for how in asked] == ["4/7", "4/7/1"], "not the same draw twice"
    assert [how[2] for how in asked] == [grpo.TOY_ASKED, grpo.TOY_ASKED_NEW]
    asked.clear()
    grpo.step_prompts(["old", "new"], tiny, "4/7", {})
    assert [how[2] for how in asked] == [grpo.ASKED, grpo.ASKED_NEW], "the toy's are its own"
    asked.clear()
    grpo.step_prompts(["old", "new"], toy | {"discover": 0.0}, "4/7", {})
    grpo.step_prompts(["only"], toy, "4/7", {})
    assert [how[:2] for how in asked] == [("old", 33), ("only", 33)]


def test_known_kinds_whose_groups_differ_are_asked_more_often():
    weights = {}
    for _ in range(30):
        values = {"taught_count": 0.0, "taught_shape": 0.5, "right_shape": 1.0, "loss": 2.0}
        weights = grpo.renewed(weights, values, 0.3)
    assert weights == pytest.approx({"count": 0.3, "shape": 0.5}, abs=0.01)
    again = grpo.renewed(weights, {"taught_count": 1.0}, 0.3)
    assert again["count"] == pytest.approx(0.44, abs=0.01), "heard at once when it teaches"
    assert again["shape"] == weights["shape"], "what was not asked stays"


def test_weights_of_kinds_are_kept_in_the_checkpoint(monkeypatch, run, start_model):
    loop = Loop(monkeypatch, run)
    loop.values = {"taught_count": 0.0}
    loop.train(start_model, "--steps", "2")
    kept = [saved[-1]["weights"]["count"] for saved in loop.saved[:2]]
    assert kept == pytest.approx([0.86, 0.748])


def test_what_is_easily_guessed_is_not_rewarded(tmp_path):
    """A question of a few answers, however it says so; unless there are no others, or it is known.

    What is known stands in the pool of all post-training, where there is a second one to learn.
    """
    easy = [{"chance": 0.5}, {"choices": ["a", "b", "c"]}, {"verifier": "yesno", "answer": "yes"}]
    hard = [{}, {"choices": list("abcd")}, {"chance": 0.2, "choices": ["a", "b"]}]
    lines = []
    talk = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "a"}]
    for i, more in enumerate(easy + hard):
        meta = {"task": str(i), "answer": "a", "verifier": "choice", "choices": []} | more
        lines.append({"messages": talk, "meta": meta})
    path = tmp_path / "train" / "questions.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    [pool] = grpo.question_pools(tmp_path)
    assert [question.task for question in pool] == ["3", "4", "5"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[:3]))
    assert len(grpo.question_pools(tmp_path)[0]) == 3

    everything = "".join(json.dumps(line) + "\n" for line in lines)
    path.write_text(everything)
    path.with_name("discover.jsonl").write_text(everything)
    known, new = grpo.question_pools(tmp_path)
    assert [question.task for question in known] == list("012345")
    assert [question.task for question in new] == list("345")


def test_pools_are_those_that_are_there(tmp_path):
    """Questions of users, whose meta has an answer and its verifier alone, are asked like ours."""
    with pytest.raises(SystemExit, match="questions.jsonl, .*discover.jsonl: no question"):
        grpo.question_pools(tmp_path)
    write_questions(tmp_path)
    [old] = grpo.question_pools(tmp_path)
    assert {"steps", "chance"}.isdisjoint(old[0].meta)
    (tmp_path / "train" / "discover.jsonl").write_text(json.dumps(old[0].record) + "\n")
    both = grpo.question_pools(tmp_path)
    assert list(map(len, both)) == [len(old), 1]
    (tmp_path / "train" / "questions.jsonl").unlink()
    for name in ("detail", "instruct"):
        (tmp_path / "train" / f"{name}.jsonl").unlink(missing_ok=True)
    assert list(map(len, grpo.question_pools(tmp_path))) == [1]


def test_ranks_share_the_prompts_of_a_step(monkeypatch, run, start_model):
    loop = Loop(monkeypatch, run)
    loop.run.rank, loop.run.world = 1, 2
    loop.train(start_model, "--steps", "1")
    assert [prompt.number for prompt in loop.steps[0].prompts] == [1, 3]


def test_prompts_that_cannot_be_asked_are_few_or_the_run_ends(
    monkeypatch, run, start_model, capsys
):
    """Of all steps together; the step that is one too many is not saved."""
    loop = Loop(monkeypatch, run)
    for step in range(5):
        loop.lost[f"4/{step}", step] = f"{step}.png: missing"
    loop.train(start_model, "--steps", "6")
    line = "skipped: 5 of 30 prompts cannot be used, the first: train: 0.png: missing"
    assert line in capsys.readouterr().err

    loop.lost["4/5", 0] = "5.png: missing"
    loop.saved.clear()
    with pytest.raises(SystemExit, match="6 of 30 prompts .*first: train: 0.png: missing; more"):
        loop.train(start_model, "--steps", "6")
    assert [saved[0] for saved in loop.saved] == [1, 2, 3, 4, 5]


def test_the_reference_is_the_start_and_never_moves(monkeypatch, run, start_model):
    """Also after a resume, where the policy no longer is the start."""
    loop = Loop(monkeypatch, run, after=1)
    loop.train(start_model, "--steps", "3", "--beta", "0.01", "--algo", "gspo")
    policy, reference = loop.loaded
    start_state = KeyeVL.from_pretrained(start_model).state_dict()
    for step in loop.steps:
        assert step.policy is policy and step.reference is reference
        assert step.sampler.generator.model is policy
        assert step.rest == ("gspo", 0.01, None, None)
        assert step.plan is grpo.PLAN["toy"]
    for name, tensor in reference.state_dict().items():
        assert torch.equal(tensor, start_state[name])
    assert not any(p.requires_grad for p in reference.parameters())
    assert not torch.equal(policy.head_weight, reference.head_weight)
    trained = {p for group in loop.opt.param_groups for p in group["params"]}
    assert trained == set(policy.parameters())


def test_without_kl_no_second_model_is_loaded(monkeypatch, run, start_model):
    loop = Loop(monkeypatch, run)
    loop.train(start_model, "--steps", "1", "--beta", "0")
    assert len(loop.loaded) == 1
    assert loop.steps[0].reference is None


def test_the_rate_rises_stays_and_falls(monkeypatch, run, start_model):
    loop = Loop(monkeypatch, run)
    loop.train(start_model, "--steps", "20")
    factors = [lr for step in loop.steps for lr in step.lr]
    falls = [1 - i / 6 for i in range(6)]
    assert factors == pytest.approx([0.5] + [1.0] * 13 + falls)
    plain = min(group["peak_lr"] for group in loop.opt.param_groups)
    assert plain == pytest.approx(3e-4)
    assert loop.made == {"weight_decay": 0.0, "muon": 2, "compiled": True}
    highest = max(group["peak_lr"] for group in loop.opt.param_groups)
    assert loop.logged[-1][2]["lr"] == pytest.approx(highest * falls[-1])


def test_training_goes_on_where_it_was_and_is_saved(monkeypatch, run, start_model):
    judge = SimpleNamespace(asked=8, failed={"timeout": 1, "form": 1})
    loop = Loop(monkeypatch, run, after=2)
    loop.train(start_model, "--steps", "4", judge=judge)
    assert [(step, steps) for step, steps, _ in loop.logged] == [(2, 4), (3, 4)]
    values = loop.logged[0][2]
    assert values["loss"] == 0.5 and values["tokens"] == 7 and values["judge_failed"] == 2 / 8
    policy = loop.loaded[0]
    *saved, exported = loop.saved
    assert [how[:4] for how in saved] == [(3, 4, policy, loop.opt), (4, 4, policy, loop.opt)]
    assert exported[0] is policy
    assert loop.steps[0].rest[2] is judge


def test_the_plan_of_a_size_is_the_default(monkeypatch, run, start_model):
    loop = Loop(monkeypatch, run)
    loop.train(start_model)
    assert len(loop.steps) == 100
    assert "judge_failed" not in loop.logged[0][2]


@pytest.mark.parametrize("world, beta, copies", [(1, 0, 0), (1, 0.1, 1), (4, 0, 1), (4, 0.1, 1.25)])
def test_memory_is_planned_for_its_packs_and_what_stands_beside(
    monkeypatch, run, start_model, world, beta, copies
):
    """The reference in shards, and for a sharded policy the sampler's whole copy."""
    loop = Loop(monkeypatch, run)
    loop.run.world = world
    loop.run.sum = lambda x: x
    loop.train(start_model, "--steps", "1", "--beta", beta)
    parts = ("vit", "projector", "decoder")
    assert loop.fitted == (world, loop.loaded[0], parts, grpo.PLAN["toy"]["pack"], copies)


def test_the_packs_of_released_sizes_are_longer_than_in_fine_tuning(monkeypatch, run, start_model):
    loop = Loop(monkeypatch, run)
    loop.run.args = parser().parse_args(["--size", "8b", "--steps", "1"])
    grpo.train(loop.run, start_model, "questions", grpo.PLAN["released"], None)
    assert loop.fitted[3] == 16384


def test_a_judge_that_was_not_asked_has_not_failed(run):
    judge = SimpleNamespace(asked=0, failed={})
    assert grpo.judge_failures(run, judge) == {"judge_failed": 0}
    assert grpo.judge_failures(run, None) == {}


# --------------------------------------------------------------------------------------------------
# the phase


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_questions(folder)
    return folder


class Phase:
    """main in this process, with training and scoring recorded."""

    def __init__(self, monkeypatch, questions, start_model, out):
        self.flags = ["--data", questions, "--init", start_model, "--out", out, "--device", "cpu"]
        self.folder = out / "toy" / "grpo"
        self.events = []

        def train(run, init, pool, plan, judge, mix):
            self.mix = mix
            self.events.append(("train", init, sum(map(len, pool)), plan, judge))

        def score_phase(run, *how):
            self.events.append(("score", *how))
            return {"think": 1}

        monkeypatch.setattr(grpo, "train", train)
        monkeypatch.setattr(grpo, "score_phase", score_phase)

    def main(self, *flags):
        self.events.clear()
        argv = [str(flag) for flag in (*self.flags, "--threads", "1", *flags)]
        with kept_process():
            grpo.main(parser().parse_args(argv))
        return self.events


@pytest.fixture
def phase(monkeypatch, questions, start_model, tmp_path):
    return Phase(monkeypatch, questions, start_model, tmp_path)


def test_the_phase_trains_once_and_is_scored_in_all_modes(phase, questions, start_model):
    modes = ("think", "no_think", "auto_think", "agentic_think")
    scored = ("score", questions / "heldout", modes, 40)
    assert phase.main() == [("train", start_model, 6, grpo.PLAN["toy"], None), scored]
    assert json.loads((phase.folder / "score.json").read_text()) == {"think": 1}
    assert phase.main() == [], "it is done"
    (phase.folder / "score.json").unlink()
    assert phase.main("--eval-limit", "3") == [("score", questions / "heldout", modes, 3)]


def test_lines_that_the_cold_start_left_are_learnt_on(phase, tmp_path, start_model):
    """They lie beside the model that it left, wherever this run's folder is."""
    data = tmp_path / "theirs" / "coldstart-modes" / "data"
    phase.flags[3] = tmp_path / "theirs" / "coldstart" / "model"
    shutil.copytree(start_model, phase.flags[3])
    phase.main()
    assert phase.mix == [], "there was none"
    data.mkdir(parents=True)
    for kind in (*coldstart.MIX, "auto_think"):
        (data / f"{kind}.jsonl").write_text("" if kind == "video" else "{}\n")
    phase.main("--fresh")
    assert dict(phase.mix) == {
        data / f"{kind}.jsonl": weight
        for kind, weight in [*coldstart.MIX.items(), ("auto_think", coldstart.AUTO)]
        if kind != "video"
    }


@pytest.mark.parametrize("flags", [("--algo", "gspo"), ("--beta", "0.5")])
def test_another_loss_for_the_same_run_is_refused(phase, flags):
    phase.main()
    with pytest.raises(SystemExit, match="--fresh starts over"):
        phase.main(*flags)
    assert phase.events == []
    assert phase.main(*flags, "--fresh")[0][0] == "train"


@confined
def test_tools_run_python_where_that_is_asked_for(phase, monkeypatch):
    monkeypatch.setattr(rollout, "_level", "operations")  # back to it afterwards
    phase.main("--sandbox", "python")
    assert rollout._level == "python"
    with pytest.raises(SystemExit, match="made with sandbox python, not with operations"):
        phase.main()


def test_another_start_for_the_same_run_is_refused(phase, tmp_path, start_model):
    phase.main()
    other = tmp_path / "other"
    torch.manual_seed(1)
    KeyeVL.empty(PRESETS["toy"]).init_weights().save_pretrained(other)
    phase.flags[3] = other
    with pytest.raises(SystemExit, match=f"init {start_model}"):
        phase.main()
    assert phase.main("--fresh")[0][:2] == ("train", other)
    # other weights at the same place, too
    torch.manual_seed(2)
    KeyeVL.empty(PRESETS["toy"]).init_weights().save_pretrained(other)
    with pytest.raises(SystemExit, match="weights"):
        phase.main()


def test_questions_that_changed_are_asked_from_the_first_step_on(phase, questions, tmp_path, capsys):
    data = tmp_path / "world"
    shutil.copytree(questions, data)
    path = data / "train" / "questions.jsonl"
    phase.main("--data", data, "--keep-checkpoint")
    (phase.folder / "done.json").unlink()  # it was killed
    saved = phase.folder / "checkpoint" / "step-1"
    for content, goes_on in ((path.read_text(), True), (path.read_text() + "\n", False)):
        saved.mkdir(parents=True)
        path.write_text(content)
        capsys.readouterr()
        phase.main("--data", data, "--keep-checkpoint")
        assert saved.exists() == goes_on
        assert ("questions.jsonl changed" in capsys.readouterr().err) != goes_on
        (phase.folder / "done.json").unlink()
        shutil.rmtree(phase.folder / "checkpoint", ignore_errors=True)


def test_the_judge_has_its_addresses_its_model_and_its_key(monkeypatch, phase):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    made = []
    monkeypatch.setattr(grpo, "Judge", lambda *how: made.append(how) or "the judge")
    urls = ("http://a/v1", "http://b/v1")
    events = phase.main("--judge", urls[0], "--judge", urls[1], "--judge-model", "name")
    assert made == [(list(urls), "name", "secret")]
    assert events[0][-1] == "the judge"


def test_the_plan_can_be_changed(phase):
    assert phase.main("--plan", "prompts=8")[0][3] == grpo.PLAN["toy"] | {"prompts": 8}


def test_a_size_without_a_plan_of_its_own_has_that_of_released_weights(
    phase, monkeypatch, start_model
):
    assert phase.main("--size", "8b")[0][3] == grpo.PLAN["released"]


def test_what_is_missing_or_wrong_is_named_before_anything_is_done(phase, tmp_path):
    with pytest.raises(SystemExit, match="no question to ask"):
        phase.main("--data", tmp_path / "nothing")
    with pytest.raises(SystemExit, match="holds no model; run coldstart first"):
        phase.main("--init", tmp_path / "nothing")
    data = tmp_path / "data"
    write_questions(data)
    (data / "heldout" / "x.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit, match="x.jsonl:1"):
        phase.main("--data", data)
    assert phase.events == []
    assert not phase.folder.exists()


# --------------------------------------------------------------------------------------------------
# the command


def command(out, questions, start_model, *flags, **how) -> str:
    place = ["--data", questions, "--out", out, "--init", start_model, "--device", "cpu"]
    return run_small("grpo.py", *place, "--eval-limit", 1, "--steps", 3, *flags, **how)


ONE_UPDATE = ["--plan", "updates=1"]  # on two ranks the groups are dealt otherwise


@pytest.fixture(scope="module")
def one_run(tmp_path_factory, questions, start_model):
    """Three steps of one process."""
    out = tmp_path_factory.mktemp("one")
    command(out, questions, start_model, *ONE_UPDATE)
    return out / "toy" / "grpo"


def test_a_killed_run_goes_on_bit_for_bit(tmp_path, questions, start_model, one_run):
    flags = [*ONE_UPDATE, "--save-every", 1]
    command(tmp_path, questions, start_model, *flags, kill=2, code=-9)
    said = command(tmp_path, questions, start_model, *flags)
    assert "resumed from" in said and "step-1" in said
    folder = tmp_path / "toy" / "grpo"
    assert curve(folder) == curve(one_run)
    assert weights(folder) == weights(one_run)


def test_a_run_trains_and_its_sampler_agrees(one_run, start_model):
    steps = curve(one_run)
    assert [record["step"] for record in steps] == [0, 1, 2]
    assert steps[0]["loss"] and steps[0]["dropped_groups"] < 0.7
    assert all(record["mismatch"] < 1e-4 for record in steps)
    assert weights(one_run) != (start_model / "model.safetensors").read_bytes()
    score = json.loads((one_run / "score.json").read_text())
    assert set(score) == {"think", "no_think", "auto_think", "agentic_think"}


def test_two_ranks_agree_with_one(tmp_path, questions, start_model, one_run):
    said = command(tmp_path, questions, start_model, *ONE_UPDATE, "--steps", 1, ranks=2)
    assert said.count("GRPO took") == 1, "rank 0 alone speaks"
    one, two = curve(one_run)[0], curve(tmp_path / "toy" / "grpo")[0]
    for key in ("reward", "right", "loss", "norm", "kl", "entropy", "dropped_groups"):
        assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-6), key


def test_a_missing_start_is_named(tmp_path, questions):
    said = command(tmp_path, questions, tmp_path / "nothing", code=1)
    assert "holds no model" in said
    assert "Traceback" not in said
