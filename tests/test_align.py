"""align.py: MPO's golden values, pairs and their references, the loop, the rounds, the command."""

import copy
import json
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import align
import sft
from align import Pair, Shift, answer_logprobs, best_and_worst, mpo_loss, packing
from common.checkpoint import Progress
from common.conversation import conversations_of
from common.loader import Loader
from common.parallel import whole
from common.rewards import Reward, parse
from common.rollout import Prompt, Response, Rollout
from common.run import add_judge_arguments, arguments, start
from data import Processor, pack
from miniature import curve, question, run_small, weights, write_questions
from model import PRESETS, SCALE, KeyeVL
from phases import first_model, kept_process, read, write
from sft import Attempt
from stage import in_processes
from test_grpo import Placed, Table

LN2 = math.log(2)

# --------------------------------------------------------------------------------------------------
# the loss


def loss(chosen, rejected, shift=0.0, nll=0.0, **more):
    """Of one pair whose rewards are given (beta 1, reference 0)."""
    policy = torch.tensor([[chosen, rejected]])
    parts = mpo_loss(policy, torch.zeros(1, 2), torch.tensor([nll]), shift, beta=1.0, **more)
    return {name: value[0] for name, value in parts.items()}


def test_mpo_at_the_start():
    policy = torch.tensor([[-5.0, -7.0]], requires_grad=True)
    parts = mpo_loss(policy, policy.detach(), -policy[:, 0] / 4, 0.0)
    assert parts["dpo"].item() == pytest.approx(LN2)
    assert parts["bco"].item() == pytest.approx(2 * LN2)
    assert parts["total"].item() == pytest.approx(0.831777 + 1.25, abs=1e-6)  # 1.2 ln 2 + nll
    (0.8 * parts["dpo"] + 0.2 * parts["bco"]).sum().backward()
    assert policy.grad[0].tolist() == pytest.approx([-0.1 / 2, 0.1 / 2])


def test_bco_bounds_dpo_and_moves_with_its_shift():
    torch.manual_seed(0)
    for chosen, rejected, shift in torch.randn(200, 3).mul(3).tolist():
        a = loss(chosen, rejected, shift)
        assert a["bco"] >= a["dpo"] - 1e-6
        b = loss(chosen + 2, rejected + 2, shift + 2)
        assert b["bco"].item() == pytest.approx(a["bco"].item(), abs=1e-5)
        assert b["dpo"].item() == pytest.approx(a["dpo"].item(), abs=1e-5)
    tried = {shift / 100: loss(1.3, -0.4, shift / 100)["bco"].item() for shift in range(-200, 300)}
    assert min(tried, key=tried.get) == pytest.approx(0.45), "best is the mean of the rewards"


def test_mpo_limits():
    assert loss(0.3, 0.3)["dpo"].item() == pytest.approx(LN2)
    only_dpo = loss(1.0, -1.0, weights={"dpo": 1, "bco": 0, "sft": 0})
    assert only_dpo["total"].item() == pytest.approx(-F.logsigmoid(torch.tensor(2.0)).item())
    only_sft = loss(1.0, -1.0, nll=1.7, weights={"dpo": 0, "bco": 0, "sft": 1})
    assert only_sft["total"].item() == pytest.approx(1.7)


def test_margin_and_rewards_are_those_of_the_pair():
    policy, reference = torch.tensor([[-4.0, -6.0]]), torch.tensor([[-5.0, -3.0]])
    parts = mpo_loss(policy, reference, torch.zeros(1), 0.0)
    assert parts["rewards"][0].tolist() == pytest.approx([0.1, -0.3])
    assert parts["margin"].item() == pytest.approx(0.4)


def test_shift_is_the_mean_of_all_rewards():
    shift = Shift()
    assert shift.value() == 0
    seen = []
    for total, count in ((0.2, 2), (0.9, 3), (0.3, 1)):  # sums of rewards and their numbers
        shift.add(total, count)
        seen.append(shift.value())
    assert seen == pytest.approx([0.1, 0.22, 1.4 / 6])
    assert Shift(shift.total, shift.count).value() == shift.value()


def test_only_the_answer_counts_and_a_cut_one_has_no_end(processor):
    pair = {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "an earlier answer"},
            {"role": "user", "content": "b"},
        ],
        "chosen": "red",
        "rejected": "blue blue",
        "rejected_ended": False,
    }
    samples = align.pair_samples(processor, Pair(pair, None, ""), 1000)
    for sample, text in zip(samples, ("red<|im_end|>", "blue blue"), strict=True):
        labels = sample["labels"][sample["labels"] != -100]
        assert processor.tokenizer.decode(labels) == text


# --------------------------------------------------------------------------------------------------
# fixtures


@pytest.fixture(scope="module")
def start_model():
    return first_model()


def open_run(out, *flags):
    argv = ["--out", str(out), "--device", "cpu", "--threads", "1", "--seed", "4", *flags]
    with kept_process():
        return start(arguments(align.__doc__).parse_args(argv), "mpo")


@pytest.fixture
def run(tmp_path):
    """A run whose words are kept in `said`."""
    run = open_run(tmp_path)
    run.said = []
    run.say = run.said.append
    return run


def preferences(folder, n) -> list[dict]:
    """n pairs about pictures of their own; folder/pairs.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = []
    for i in range(n):
        Image.effect_noise((60 + i, 70), 60).convert("RGB").save(folder / f"{i}.png")
        image = {"type": "image", "image": f"{i}.png"}
        messages = [{"role": "user", "content": [image, {"type": "text", "text": f"What is {i}?"}]}]
        chosen = "red" if i % 2 else "a red circle"
        pairs.append({"messages": messages, "chosen": chosen, "rejected": "blue " * (i % 5 + 1)})
    write(folder / "pairs.jsonl", pairs)
    return pairs


def unreadable(pair: dict) -> dict:
    """Its rejected answer shows a picture that is not there; its chosen one can be read."""
    image = {"type": "image", "image": "none.png"}
    return pair | {"rejected": [image, {"type": "text", "text": "blue"}]}


@torch.no_grad()
def alone(model, processor, record, root) -> list[float]:
    """log p of [chosen, rejected], each in a pack of its own."""
    sums = []
    for conversation in conversations_of(record):
        logp, _ = model.logprobs(pack([processor(conversation, root)]))
        sums.append(logp.sum().item())
    return sums


# --------------------------------------------------------------------------------------------------
# pairs that are given


def test_given_pairs_know_their_place(tmp_path):
    records = preferences(tmp_path, 3)
    pairs = align.given_pairs(tmp_path / "pairs.jsonl")
    assert [pair.record for pair in pairs] == records
    assert {pair.root for pair in pairs} == {tmp_path.resolve()}
    assert [pair.where for pair in pairs] == [f"{tmp_path}/pairs.jsonl:{i}" for i in (1, 2, 3)]


@pytest.mark.parametrize("bad", [
    {"chosen": "a"},
    {"chosen": "a", "rejected": 3},
    {"rejected": "b"},
    {"messages": []},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
])
def test_half_a_preference_is_no_pair(tmp_path, bad):
    write(tmp_path / "x.jsonl", [{"messages": [{"role": "user", "content": "q"}]} | bad])
    with pytest.raises(SystemExit, match="x.jsonl:1"):
        align.given_pairs(tmp_path / "x.jsonl")


def test_few_bad_lines_are_passed_over(tmp_path):
    records = preferences(tmp_path, 20)
    write(tmp_path / "pairs.jsonl", [{}, *records])
    pairs = align.given_pairs(tmp_path / "pairs.jsonl")
    assert len(pairs) == 20
    assert pairs[0].where.endswith("pairs.jsonl:2")
    write(tmp_path / "pairs.jsonl", [{}, {}, *records])
    with pytest.raises(SystemExit, match="pairs.jsonl:1"):
        align.given_pairs(tmp_path / "pairs.jsonl")


def test_a_missing_file_of_pairs_is_named(tmp_path):
    with pytest.raises(SystemExit, match="none.jsonl"):
        align.given_pairs(tmp_path / "none.jsonl")


# --------------------------------------------------------------------------------------------------
# pairs of the model's own answers


def attempt(text, outcome, finished=True):
    return Attempt(text, outcome, float(outcome == 1), 3, finished)


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """own_pairs of questions.jsonl and instruct.jsonl; `answers` holds what each is answered."""
    write_questions(tmp_path)
    instruct = [question(f"Say {i}.", str(i), task="say") for i in range(10, 14)]
    write(tmp_path / "train" / "instruct.jsonl", instruct)
    asked = SimpleNamespace(folder=tmp_path, calls=[], answers={})

    def attempts(run, init, questions, samples, seed):
        asked.calls.append((init, [q.where.split("/")[-1] for q in questions], samples, seed))
        right = [attempt("right", 1)]
        return [asked.answers.get(q.record["messages"][-1]["content"], right) for q in questions]

    monkeypatch.setattr(align, "attempts", attempts)
    return asked


def test_the_worst_wrong_answer_is_rejected(asked, run):
    asked.answers["3"] = [
        attempt("right", 1),
        attempt("mild", 0.5),
        attempt("worst", 0.1, finished=False),
        attempt("bad", 0.2),
    ]
    [pair] = align.own_pairs(run, "init", asked.folder, {"asked": 10, "samples": 2})[:1]
    assert pair.record == {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "What is 1 + 2?"}]}],
        "chosen": "3",
        "rejected": "worst",
        "rejected_ended": False,
        "task": "sum",
    }
    assert pair.root == (asked.folder / "train").resolve()
    assert pair.where.endswith("questions.jsonl:2")


def test_what_is_never_right_makes_no_pair(asked, run):
    asked.answers["3"] = [attempt("wrong", 0), attempt("bad", 0.1)]
    assert align.own_pairs(run, "init", asked.folder, {"asked": 10, "samples": 2}) == []


def test_all_right_answers_make_no_pair(asked, run):
    asked.answers["3"] = [attempt("right", 1), attempt("right", 1)]
    asked.answers["1"] = []  # it could not be read
    pairs = align.own_pairs(run, "init", asked.folder, {"asked": 10, "samples": 2})
    assert [pair.record for pair in pairs if pair.record["chosen"] == "3"] == []
    assert run.said[-1].startswith("100% of the answers are right; 0 pairs")


def test_both_files_are_asked_alike(asked, run):
    align.own_pairs(run, "init", asked.folder, {"asked": 3, "samples": 2})
    evenly = [f"questions.jsonl:{i}" for i in (1, 3, 5)]
    also = [f"instruct.jsonl:{i}" for i in (1, 2, 3)]
    assert asked.calls == [("init", evenly, 2, 4), ("init", also, 2, 4)]


def test_own_pairs_come_in_a_random_order_of_the_seed(asked, run):
    both = [attempt("wrong", 0), attempt("right", 1)]
    asked.answers = {str(i): both for i in range(14)}
    orders = []
    for seed in (4, 4, 5):
        run.args.seed = seed
        pairs = align.own_pairs(run, "init", asked.folder, {"asked": 10, "samples": 2})
        orders.append([pair.where for pair in pairs])
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])
    assert len(orders[0]) == 10
    assert run.said[-1].startswith("50% of the answers are right; 10 pairs")


def test_written_pairs_stand_among_the_models_own(asked, run):
    answers = {"chosen": "There is none.", "rejected": "red", "task": "absent"}
    written = []
    for i in range(3):
        written.append({"messages": [{"role": "user", "content": f"What is {i}?"}]} | answers)
    write(asked.folder / "train" / "preferences.jsonl", written)
    asked.answers["3"] = [attempt("wrong", 0), attempt("right", 1)]
    pairs = align.own_pairs(run, "init", asked.folder, {"asked": 10, "samples": 2})
    assert sorted(pair.record["task"] for pair in pairs) == ["absent"] * 3 + ["sum"]
    assert run.said[-1] == "3 pairs of preferences.jsonl"
    for name in ("questions", "instruct"):
        (asked.folder / "train" / f"{name}.jsonl").unlink()
    pairs = align.own_pairs(run, "init", asked.folder, {"asked": 10, "samples": 2})
    assert [pair.record["task"] for pair in pairs] == ["absent"] * 3


def test_held_out_pairs_are_compared_by_task(tmp_path, run, model, processor, start_model):
    """Their media lie apart: train and heldout may give two pictures one name."""
    records = preferences(tmp_path / "mine", 12)
    for i, record in enumerate(records):
        record["task"] = ("absent", "present")[i % 2]
    write(tmp_path / "mine" / "pairs.jsonl", records)
    out = tmp_path / "data" / "heldout"
    align.prepare_heldout(run, start_model, tmp_path / "mine" / "pairs.jsonl", out)
    assert len(read(out / "pairs.jsonl")) == 12 and (out / "media" / "3.png").is_file()
    expected = {"absent": [], "present": []}
    for record in records:
        chosen, rejected = alone(model, processor, record, tmp_path / "mine")
        expected[record["task"]].append(chosen > rejected)
    written = []
    run.write = written.append
    align.compare_heldout(run, model, processor, out / "pairs.jsonl", "before")
    shares = {f"preferred_{task}_before": sum(r) / 6 for task, r in expected.items()}
    assert written == [pytest.approx(shares)]
    assert run.said[-1].startswith("before, held-out preferences: ") and " of 6, " in run.said[-1]
    align.compare_heldout(run, model, processor, out / "nothing.jsonl", "after")
    assert len(written) == 1


def test_without_any_question_there_are_no_own_pairs(tmp_path, run):
    with pytest.raises(SystemExit, match="--pairs, or questions or instruct.jsonl"):
        align.own_pairs(run, "init", tmp_path, {"asked": 3, "samples": 2})


def test_a_line_that_is_no_question_is_named(asked, run):
    write(asked.folder / "train" / "instruct.jsonl", [{"messages": []}])
    with pytest.raises(SystemExit, match="instruct.jsonl:1"):
        align.own_pairs(run, "init", asked.folder, {"asked": 3, "samples": 2})


# --------------------------------------------------------------------------------------------------
# references


def given(folder) -> list[Pair]:
    return align.given_pairs(folder / "pairs.jsonl")


def prompt_text(record) -> str:
    return record["messages"][0]["content"][-1]["text"]


def test_references_are_those_of_the_start(tmp_path, run, model, processor, start_model):
    records = preferences(tmp_path / "mine", 21)
    data = tmp_path / "data"
    align.prepare(run, start_model, given(tmp_path / "mine"), data)
    train, held = read(data / "train.jsonl"), read(data / "held.jsonl")
    assert [prompt_text(record) for record in held] == [f"What is {i}?" for i in (0, 10, 20)]
    rest = [f"What is {i}?" for i in range(21) if i % 10]
    assert [prompt_text(record) for record in train] == rest, "no held-out pair is trained on"

    # the model fixture has the same weights as start_model
    for record in train + held:
        i = int(prompt_text(record).split()[-1][:-1])
        expected = alone(model, processor, records[i], tmp_path / "mine")
        assert record["reference"] == pytest.approx(expected, abs=1e-3)
        assert (record["chosen"], record["rejected"]) == (
            records[i]["chosen"], records[i]["rejected"]
        )
        image = record["messages"][0]["content"][0]["image"]
        assert (data / image).read_bytes() == (tmp_path / "mine" / f"{i}.png").read_bytes()
    assert run.said == []


def test_a_pair_that_cannot_be_read_is_named_and_left_out(
    tmp_path, run, model, processor, start_model
):
    """Its neighbours keep their own references, though its chosen answer can be read."""
    records = preferences(tmp_path / "mine", 20)
    records[3] = unreadable(records[3])
    write(tmp_path / "mine" / "pairs.jsonl", records)
    align.prepare(run, start_model, given(tmp_path / "mine"), tmp_path / "data")
    (said,) = run.said
    assert said.startswith("skipped: 1 of 20 pairs cannot be used, the first: ")
    assert f"{tmp_path}/mine/pairs.jsonl:4: none.png: missing" in said
    train = read(tmp_path / "data" / "train.jsonl")
    held = read(tmp_path / "data" / "held.jsonl")
    left = [int(prompt_text(record).split()[-1][:-1]) for record in train + held]
    assert sorted(left) == [i for i in range(20) if i != 3]
    for i, record in zip(left, train + held):
        expected = alone(model, processor, records[i], tmp_path / "mine")
        assert record["reference"] == pytest.approx(expected, abs=1e-3)


def test_too_many_unreadable_pairs_end_the_run(tmp_path, run, start_model):
    records = preferences(tmp_path / "mine", 20)
    for i in (3, 7, 9, 11, 13, 15):
        records[i] = unreadable(records[i])
    write(tmp_path / "mine" / "pairs.jsonl", records)
    with pytest.raises(SystemExit, match="6 of 20 pairs .*pairs.jsonl:4: none.png: missing"):
        align.prepare(run, start_model, given(tmp_path / "mine"), tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_without_pairs_there_is_nothing_to_train(tmp_path, run, start_model):
    with pytest.raises(SystemExit, match="no pair"):
        align.prepare(run, start_model, [], tmp_path / "data")


def test_references_are_of_what_training_sees(
    tmp_path, monkeypatch, run, model, processor, start_model
):
    """Where two answers share a pack that is small, pictures shrink: before training as in it."""
    small = replace(SCALE["toy"], pack=80)
    monkeypatch.setitem(SCALE, "toy", small)
    pairs = preferences(tmp_path / "mine", 3)
    for i in range(3):
        Image.effect_noise((112, 112), 60).convert("RGB").save(tmp_path / "mine" / f"{i}.png")
    align.prepare(run, start_model, given(tmp_path / "mine"), tmp_path / "data")
    path = tmp_path / "data" / "train.jsonl"
    [batch], _ = next(iter(Loader([(path, 1)], processor, *packing(run))))
    with torch.no_grad():
        sums, _ = answer_logprobs(model, batch)
    assert sums.tolist() == pytest.approx(batch["reference"].flatten().tolist(), abs=1e-3)
    free = alone(model, processor, pairs[1], tmp_path / "mine")
    assert read(path)[0]["reference"] != pytest.approx(free, abs=1e-3), "none shrank"


def test_pairs_beyond_those_held_are_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr(align, "HELD_MOST", 2)
    preferences(tmp_path / "mine", 31)
    records = [pair.record for pair in given(tmp_path / "mine")]
    align.write_pairs(records, tmp_path / "data")
    held = read(tmp_path / "data" / "held.jsonl")
    train = read(tmp_path / "data" / "train.jsonl")
    assert [prompt_text(record) for record in held] == ["What is 0?", "What is 10?"]
    assert [prompt_text(record) for record in train[-2:]] == ["What is 20?", "What is 30?"]
    assert len(train) == 29


def test_a_single_pair_is_trained_on_and_held(tmp_path):
    preferences(tmp_path / "mine", 1)
    align.write_pairs([pair.record for pair in given(tmp_path / "mine")], tmp_path / "data")
    for name in ("train", "held"):
        assert len(read(tmp_path / "data" / f"{name}.jsonl")) == 1


# --------------------------------------------------------------------------------------------------
# the accuracy of preferences


def held_pairs(folder, policy, processor):
    """35 held-out pairs whose references lie around the policy's own; the expected shares."""
    records = preferences(folder, 35)
    right = moved = 0
    for i, record in enumerate(records):
        chosen, rejected = alone(policy, processor, record, folder)
        by = (-2.0, -0.5, 0.5, 2.0)[i % 4]
        record["reference"] = [chosen - 7 + by, rejected - 7]
        right += chosen > rejected
        moved += by < 0
    write(folder / "held.jsonl", records)
    return right / 35, moved / 35


def test_accuracy_counts_pairs_that_are_right_and_that_moved(tmp_path, run, processor):
    policy = Table(1)
    expected = held_pairs(tmp_path, policy, processor)
    path = tmp_path / "held.jsonl"
    assert 0 < expected[0] < 1 and expected[0] != expected[1]
    assert align.preference_accuracy(run, policy, processor, path) == pytest.approx(expected)


# --------------------------------------------------------------------------------------------------
# training, by its formulas written out

RATE = 0.4
STEPS = 4


def batches_of_steps(processor, policy) -> list[list[dict]]:
    """Of each step four packs: of two pairs, of none (all failed), of one, of one."""
    texts = ["red", "blue", "a red circle", "1 2", "green", "3 4 5", "one", "two", "6", "7 8"]
    texts *= 4
    generator = torch.Generator().manual_seed(3)
    steps = []
    for _ in range(STEPS):
        batches = []
        for pairs in (2, 0, 1, 1):
            samples = []
            for _ in range(2 * pairs):
                answer = {"role": "assistant", "content": texts.pop(0)}
                samples.append(processor({"messages": [{"role": "user", "content": "a"}, answer]}))
            if not pairs:
                blank = processor({"messages": [{"role": "system", "content": ""}]})
                batches.append(pack([blank]))
                continue
            batch = pack(samples)
            with torch.no_grad():
                sums, _ = answer_logprobs(policy, batch)
            noise = torch.randn(pairs, 2, generator=generator)
            batch["reference"] = sums.view(-1, 2) + 3 * noise
            batches.append(batch)
        steps.append(batches)
    return steps


def pairs_in(batch):
    """[(ids of chosen, ids of rejected, their references)] of a pack, by its segments."""
    segments = batch["segments"].tolist()
    answers = []
    for first, end in zip(segments, segments[1:]):
        labels = batch["labels"][first:end]
        answers.append(labels[labels != -100])
    return list(zip(answers[::2], answers[1::2], batch.get("reference", [])))


def written_out(policy, steps, seen=()) -> tuple[torch.Tensor, list[dict]]:
    """MPO as align.py's docstring says, pair by pair: the weights, and each step's numbers.

    seen: rewards of earlier steps.
    """
    scores = policy.scores.detach().double()
    seen = list(seen)
    log = []
    for step, batches in enumerate(steps):
        scores = scores.detach().requires_grad_()
        logp = scores.log_softmax(-1)
        delta = sum(seen) / len(seen) if seen else 0.0
        rows = []
        for chosen, rejected, reference in sum(map(pairs_in, batches), []):
            r_c = 0.1 * (logp[chosen].sum() - reference[0])
            r_r = 0.1 * (logp[rejected].sum() - reference[1])
            row = {
                "dpo": -F.logsigmoid(r_c - r_r),
                "bco": -F.logsigmoid(r_c - delta) - F.logsigmoid(-(r_r - delta)),
                "sft": -logp[chosen].sum() / len(chosen),
                "margin": r_c - r_r,
                "right": (r_c > r_r).double(),
            }
            row["loss"] = 0.8 * row["dpo"] + 0.2 * row["bco"] + 1.0 * row["sft"]
            rows.append(row)
            seen += [r_c.item(), r_r.item()]
        means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
        [gradient] = torch.autograd.grad(means["loss"], scores)
        norm = gradient.norm().item()
        lr = RATE * (1 - step / STEPS)  # the last step moves something, too
        scores = scores - lr * gradient / max(1.0, norm)
        numbers = {name: value.item() for name, value in means.items()}
        log.append(numbers | {"shift": delta, "norm": norm, "lr": lr, "pairs": len(rows)})
    return scores.detach().float(), log


class Drawn:
    """A loader of these items; what it left out, and how many samples it tried."""

    failures = ["a.jsonl:3: x.png: missing"]
    tried = 50

    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


class Loop:
    """mpo with doubles at its edges: the model, the loader, the optimizer, checkpoints."""

    def __init__(self, monkeypatch, run, policy, steps, progress=None):
        self.run = copy.copy(run)
        self.inits = []
        self.logged = []
        self.written = []
        self.said = []
        self.saved = []
        self.measured = []
        self.loaders = []
        self.weights = []

        def make_optimizer(model, rates, **how):
            self.rates = rates, how
            model.requires_grad_()  # prepare has only asked it
            opt = torch.optim.SGD(model.parameters(), rates["decoder"])
            opt.param_groups[0]["peak_lr"] = rates["decoder"]
            return opt

        def loader(*args, **how):
            self.loaders.append((args, how))
            items = []
            for step, batches in enumerate(steps):
                skipped = {"missing": 1, "corrupt": step}
                info = {"state": f"after {step}", "skipped": skipped}
                items.append((batches[run.rank :: run.world], info))
            return Drawn(items)

        def accuracy(run, model, processor, path):
            self.measured.append((whole(model.scores).detach().clone(), path))
            return 0.5, 0.25

        def save(run, step, steps, model, opt, loader_state, **extra):
            self.saved.append((step, steps, loader_state, extra))
            self.weights.append(whole(model.scores).detach().clone())

        def export(run, model, processor):
            self.exported = model

        def load(folder):
            self.inits.append(folder)
            return policy

        def fit(run, model, learns, pack, copies):
            self.fitted = learns, pack, copies
            return {"compiled": True}

        policy.load = load
        monkeypatch.setattr(sft, "KeyeVL", SimpleNamespace(shapes=lambda folder: policy))
        monkeypatch.setattr(sft, "fit", fit)
        monkeypatch.setattr(sft, "make_optimizer", make_optimizer)
        monkeypatch.setattr(align, "Loader", loader)
        monkeypatch.setattr(sft, "resume", lambda *what: progress or Progress())
        monkeypatch.setattr(align, "preference_accuracy", accuracy)
        monkeypatch.setattr(align, "save_if_due", save)
        monkeypatch.setattr(align, "export", export)
        self.run.log = lambda step, steps, **values: self.logged.append((step, steps, values))
        self.run.write = self.written.append
        self.run.say = self.said.append


def check_numbers(logged, expected):
    for (_, _, values), numbers in zip(logged, expected, strict=True):
        for name, value in numbers.items():
            assert float(values[name]) == pytest.approx(value, abs=1e-4, rel=1e-4), name


def test_mpo_is_its_formulas_written_out(tmp_path, monkeypatch, run, processor, start_model):
    policy = Table(1)
    steps = batches_of_steps(processor, policy)
    scores, expected = written_out(policy, steps)
    assert abs(expected[-1]["shift"]) > 0.01
    assert 0 < sum(numbers["right"] for numbers in expected) < STEPS
    loop = Loop(monkeypatch, run, policy, steps)
    before = policy.scores.detach().clone()
    align.mpo(loop.run, start_model, tmp_path, RATE, STEPS)
    check_numbers(loop.logged, expected)
    assert torch.allclose(policy.scores.detach(), scores, atol=1e-4)
    assert (policy.scores.detach() - before).abs().max() > 0.1
    assert not torch.equal(loop.weights[-1], loop.weights[-2]), "the last step moves something"
    assert policy.scores.grad is None

    assert [(step, of) for step, of, _ in loop.logged] == [(i, STEPS) for i in range(STEPS)]
    assert [values["skipped"] for _, _, values in loop.logged] == [1, 2, 3, 4]
    work = loop.logged[0][2]
    assert work["tokens"] == sum(len(batch["tokens"]) for batch in steps[0])
    assert set(work) == {
        *expected[0], "skipped", "tokens", "visual_tokens", "flops",
    }


def test_mpo_saves_what_it_needs_to_go_on(tmp_path, monkeypatch, run, processor, start_model):
    policy = Table(1)
    steps = batches_of_steps(processor, policy)
    scores, expected = written_out(policy, steps)
    loop = Loop(monkeypatch, run, policy, steps)
    align.mpo(loop.run, start_model, tmp_path, RATE, STEPS)
    places = [(step, of, state) for step, of, state, _ in loop.saved]
    assert places == [(i, STEPS, f"after {i - 1}") for i in (1, 2, 3, 4)]

    # as from the checkpoint after two steps
    policy = Table(1)
    with torch.no_grad():
        policy.scores.copy_(loop.weights[1])
    progress = Progress(2, "the loader's state", loop.saved[1][3])
    steps = batches_of_steps(processor, Table(1))
    rest = Loop(monkeypatch, run, policy, steps[2:], progress)
    align.mpo(rest.run, start_model, tmp_path, RATE, STEPS)
    check_numbers(rest.logged, expected[2:])
    assert torch.allclose(policy.scores.detach(), scores, atol=1e-4)
    assert rest.loaders[0][1]["state"] == "the loader's state"


def test_mpo_learns_other_lines_on_beside_the_pairs(
    tmp_path, monkeypatch, run, processor, start_model
):
    """Once a step, before it; a run that goes on knows where it was in them."""
    policy = Table(1)
    seen = []

    class Replay:
        batches = []

        def __init__(self, run, cfg, processor, mix, state):
            self.state = f"{state}+"
            seen.append((mix, state))

        def backward(self, model, weight):
            seen.append((model.scores.detach().clone(), weight))
            model.scores.grad.add_(weight)
            return 2.5

        def say_failures(self):
            seen.append("said")

    monkeypatch.setattr(align, "Replay", Replay)
    steps = batches_of_steps(processor, policy)
    going_on = Progress(0, None, {"replay": "there"})
    loop = Loop(monkeypatch, run, policy, steps, going_on)
    align.mpo(loop.run, start_model, tmp_path, RATE, STEPS, ["mix"], 0.5)
    start, *replayed, last = seen
    assert last == "said"
    assert start == (["mix"], "there")
    assert [weight for _, weight in replayed] == [0.5] * STEPS
    for (before, _), after in zip(replayed[1:], loop.weights):
        assert torch.equal(before, after)
    assert all(values["replay_loss"] == 2.5 for _, _, values in loop.logged)
    assert {kept["replay"] for *_, kept in loop.saved} == {"there+"}


def test_mpo_measures_held_out_pairs_before_and_after(
    tmp_path, monkeypatch, run, processor, start_model
):
    policy = Table(1)
    before = policy.scores.detach().clone()
    loop = Loop(monkeypatch, run, policy, batches_of_steps(processor, policy))
    align.mpo(loop.run, start_model, tmp_path, RATE, STEPS)
    held = tmp_path / "held.jsonl"
    (first, path), (last, same) = loop.measured
    assert path == same == held
    assert torch.equal(first, before)
    assert torch.equal(last, policy.scores)
    after = {"preference_accuracy": 0.5, "preference_moved": 0.25}
    assert loop.written == [{"preference_accuracy_before": 0.5}, after]
    assert loop.exported is policy

    again = Loop(monkeypatch, run, policy, [], Progress(STEPS, None, {}))
    align.mpo(again.run, start_model, tmp_path, RATE, STEPS)
    assert again.written == [after], "what was measured before is not what is resumed"


def test_mpo_trains_every_part_on_the_pairs(tmp_path, monkeypatch, run, processor, start_model):
    policy = Table(1)
    loop = Loop(monkeypatch, run, policy, batches_of_steps(processor, policy))
    loop.run.args.workers = 3
    align.mpo(loop.run, start_model, tmp_path, RATE, STEPS)
    assert loop.inits == [start_model]
    rates = {"vit": RATE, "projector": RATE, "decoder": RATE}
    assert loop.rates == (rates, {"muon": 2, "compiled": True})
    assert loop.fitted == (("vit", "projector", "decoder"), 4096, 0)
    [(args, how)] = loop.loaders
    files, processor, *place = args
    assert files == [(tmp_path / "train.jsonl", 1)]
    assert isinstance(processor, Processor)
    assert place == [4096, 1, 0, 1, 4]  # pack, packs, rank, world, seed
    assert how["flops"](100, []) > 0
    assert (how["workers"], how["state"]) == (3, None)


def test_every_forward_is_on_the_device_and_in_the_dtype_of_the_run(
    tmp_path, monkeypatch, run, processor, start_model
):
    policy = Placed(1)
    policy.seen = []
    steps = batches_of_steps(processor, Table(1))
    run = Placed.run(run)
    held_pairs(tmp_path / "mine", Table(1), processor)
    align.preference_accuracy(run, policy, processor, tmp_path / "mine" / "held.jsonl")
    loop = Loop(monkeypatch, run, policy, steps)
    align.prepare(run, start_model, given(tmp_path / "mine"), tmp_path / "data")
    align.mpo(loop.run, start_model, tmp_path, RATE, STEPS)
    assert len(policy.seen) > 4 * STEPS and set(policy.seen) == {(True, True)}


def test_a_step_without_any_pair_is_an_error(tmp_path, monkeypatch, run, processor, start_model):
    policy = Table(1)
    blank = pack([processor({"messages": [{"role": "system", "content": ""}]})])
    loop = Loop(monkeypatch, run, policy, [[blank]])
    with pytest.raises(ValueError, match="step 0: no pair"):
        align.mpo(loop.run, start_model, tmp_path, RATE, STEPS)


def two_ranks(argv):
    """Training, references, accuracy and a round's pairs: what one process has."""
    out, folder, here = argv
    run = open_run(out)
    processor = Processor.from_pretrained(folder)
    with pytest.MonkeyPatch.context() as monkeypatch:
        policy = Table(1)
        steps = batches_of_steps(processor, policy)
        scores, expected = written_out(policy, steps)
        loop = Loop(monkeypatch, run, policy, steps)
        align.mpo(loop.run, folder, run.folder, RATE, STEPS)
        check_numbers(loop.logged, expected)
        assert torch.allclose(whole(policy.scores).detach(), scores, atol=1e-4)
        assert loop.logged[0][2]["skipped"] == 2, "failures add up over ranks"

    policy = Table(1)
    expected = held_pairs(run.folder / f"held-{run.rank}", policy, processor)
    run.barrier()
    path = run.folder / "held-0" / "held.jsonl"
    assert align.preference_accuracy(run, policy, processor, path) == pytest.approx(expected)

    align.prepare(run, folder, given(Path(here) / "mine"), run.folder / "data")
    check_round(run)


def check_round(run):
    """Both ranks have the pairs of both, in one order; the shares are over all answers."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        groups = [[rollout_of("best", 1.5), rollout_of("worst", 0.0, right=0.0)]]
        groups[0][0].prompt.seed = f"rank {run.rank}"
        monkeypatch.setattr(align, "draw_prompts", lambda *asked: [])
        monkeypatch.setattr(align, "respond", lambda *asked: groups)
        pairs = align.round_pairs(run, None, [], 1, {"prompts": 1, "group": 2}, None)
    assert sorted(pair.where for pair in pairs) == ["prompt rank 0", "prompt rank 1"]
    orders = run.gather_objects([pair.where for pair in pairs])
    assert orders[0] == orders[1]
    if run.main:
        report = json.loads((run.folder / "round.json").read_text())
        assert report["right"] == 0.5 and report["pairs"] == 2


def test_two_ranks_equal_one(tmp_path, run, start_model):
    preferences(tmp_path / "mine", 20)
    argv = [tmp_path / "two", start_model, tmp_path]
    said = in_processes(two_ranks, argv, ranks=2)
    assert said.count("round 1: 4 answers") == 1
    align.prepare(run, start_model, given(tmp_path / "mine"), tmp_path / "one")
    for name in ("train.jsonl", "held.jsonl"):
        one = read(tmp_path / "one" / name)
        two = read(tmp_path / "two" / "toy" / "mpo" / "data" / name)
        for record, other in zip(one, two, strict=True):
            assert record.pop("reference") == pytest.approx(other.pop("reference"), abs=1e-3)
            assert record == other


# --------------------------------------------------------------------------------------------------
# rounds: responses


def number_prompts(folder) -> list[Prompt]:
    prompts = []
    for i, mode in enumerate(("think", "auto_think", "no_think")):
        prompts.append(Prompt(question(f"How many? {i}", "2"), folder, mode, f"4/1/{i}"))
    return prompts


@pytest.fixture
def short(monkeypatch):
    """Answers of eight tokens."""
    scale = replace(SCALE["toy"], max_answer=8)
    monkeypatch.setitem(SCALE, "toy", scale)


def test_a_group_ends_with_a_greedy_answer(short, run, start_model):
    """Other seeds, other answers, but for the last of each group."""

    def texts(seed):
        prompts = number_prompts(start_model)
        for prompt in prompts:
            prompt.seed += seed
        groups = align.respond(run, start_model, prompts, 3)
        return [[rollout.response.ids for rollout in group] for group in groups]

    one, other = texts("a"), texts("b")
    assert texts("a") == one
    for group, same in zip(one, other):
        *sampled, greedy = group
        assert len(sampled) == 2 and sampled[0] != sampled[1]
        assert greedy == same[-1] and greedy not in sampled
        assert sampled != same[:-1]
        assert max(map(len, group)) == 8


def test_ranks_share_the_prompts_of_a_round(short, run, start_model):
    groups = {}
    for rank, share in enumerate((2, 1)):
        run.rank, run.world = rank, 2
        local = align.respond(run, start_model, number_prompts(start_model), 2)
        assert len(local) == share
        for group in local:
            groups[group[0].prompt.seed] = group[0].response.ids
    run.rank, run.world = 0, 1
    for group in align.respond(run, start_model, number_prompts(start_model), 2):
        assert groups.pop(group[0].prompt.seed) == group[0].response.ids
    assert groups == {}


def test_responses_are_scored_and_their_pixels_dropped(
    short, monkeypatch, tmp_path, run, start_model
):
    seen = []
    monkeypatch.setattr(align, "reward_groups", lambda *how: seen.append(how))
    write_questions(tmp_path)
    record = read(tmp_path / "train" / "questions.jsonl")[-1]
    prompts = [Prompt(record, tmp_path / "train", "think", "s")]
    groups = align.respond(run, start_model, prompts, 3, "judge")
    assert seen == [(groups, 8, "judge")]
    for rollout in groups[0]:
        assert len(rollout.sample["grids"]) == 1
        assert "patches" not in rollout.sample, "a round holds thousands"


# --------------------------------------------------------------------------------------------------
# rounds: pairs


def rollout_of(text, total, right=1.0, form=1.0, tokens=5, mode="think", finished=True) -> Rollout:
    record = question("q", "3", task="t")
    response = Response(ids=[1] * 9, sampled=[i < tokens for i in range(9)], finished=finished)
    reward = Reward(right, right, form, 1.0, 0.0, 0.0, parse("", mode), total)
    prompt = Prompt(record, "root", mode, "4/1/7")
    return Rollout(prompt, {}, response, text, reward)


def texts_of(pair: Pair) -> tuple:
    return pair.record["chosen"], pair.record["rejected"]


def test_the_best_answer_stands_before_the_worst():
    pair = best_and_worst([
        rollout_of("worst", -0.5, right=0.0, finished=False),
        rollout_of("long", 1.5, tokens=9),
        rollout_of("best", 1.5),
        rollout_of("unscored", None),
    ])
    asked = [{"role": "user", "content": [{"type": "text", "text": "q/think"}]}]
    assert pair.record == {
        "messages": asked,
        "chosen": "best",
        "rejected": "worst",
        "rejected_ended": False,
        "mode": "think",
        "task": "t",
        "scores": [1.5, -0.5],
    }
    assert (pair.root, pair.where) == ("root", "prompt 4/1/7")


def test_of_equally_bad_answers_the_longest_is_rejected():
    group = [rollout_of("short", 0.0), rollout_of("best", 1.5), rollout_of("long", 0.0, tokens=8)]
    assert texts_of(best_and_worst(group)) == ("best", "long")


def test_a_pair_says_nothing_of_the_mode_that_was_chosen():
    """A lucky short answer beside long wrong ones: pairs of both would teach to think less."""

    def chose(mode, *how, **more):
        rollout = rollout_of(*how, mode="auto_think", **more)
        rollout.reward.parsed.chose = mode
        return rollout

    lucky = chose("no_think", "lucky", 1.5, tokens=2)
    wrong, right = chose("think", "wrong", 0.0, tokens=8), chose("think", "right", 1.5, tokens=9)
    assert best_and_worst([lucky, wrong]) is None
    assert texts_of(best_and_worst([lucky, wrong, right])) == ("right", "wrong")
    assert texts_of(best_and_worst([lucky, wrong, chose(None, "broken", -0.5)])) == (
        "lucky", "broken")


def test_answers_must_lie_a_margin_apart():
    assert best_and_worst([rollout_of("a", 1.5), rollout_of("b", 1.3)]) is None
    assert texts_of(best_and_worst([rollout_of("a", 1.5), rollout_of("b", 1.25)])) == ("a", "b")
    # where none is right, only a loop or an endless answer is so much worse
    wrong, loop = rollout_of("a", 0.0, right=0.0), rollout_of("loop", -0.9, right=0.0)
    assert texts_of(best_and_worst([loop, wrong])) == ("a", "loop")


def test_a_best_answer_out_of_form_makes_no_pair():
    group = [rollout_of("a", 0.5, form=0.0), rollout_of("b", -0.9)]
    assert best_and_worst(group) is None
    group = [rollout_of("a", 0.5), rollout_of("b", -0.9, form=0.0)]
    assert texts_of(best_and_worst(group)) == ("a", "b")


def test_one_scored_answer_makes_no_pair():
    assert best_and_worst([rollout_of("a", 1.0), rollout_of("b", None)]) is None
    assert best_and_worst([]) is None


def test_a_round_asks_scores_and_pairs(monkeypatch, tmp_path, run):
    picture = Image.new("RGB", (40, 30), (1, 2, 3))
    shown = [{"type": "text", "text": "look"}, {"type": "image", "image": picture}]
    groups = [
        [rollout_of(shown, 1.5), rollout_of("w", 0.0, 0.0)],
        [rollout_of("same", 1.5), rollout_of("same", 1.5)],
        [],
    ]
    for i in range(6):
        groups.append([rollout_of(f"b{i}", 1.5), rollout_of("w", 0.0, 0.0, form=0.0)])
    for group in groups:
        for rollout in group:
            rollout.prompt.root = tmp_path
    first, second = groups[0]
    first.reward.repetition = 0.61  # just a loop
    second.reward.repetition = 0.59
    second.reward.consistency = None
    calls = []
    monkeypatch.setattr(align, "draw_prompts", lambda *how: calls.append(how) or "prompts")
    monkeypatch.setattr(align, "respond", lambda *how: calls.append(how) or groups)
    plan = {"prompts": 9, "group": 2}
    pairs = align.round_pairs(run, "start", "questions", 3, plan, "judge")
    modes = {"think": 2, "no_think": 1, "auto_think": 3, "agentic_think": 2}
    assert calls == [
        ("questions", 9, modes, "4/3"),
        (run, "start", "prompts", 2, "judge"),
    ]

    data = run.folder / "data"
    expected = ["look", *[f"b{i}" for i in range(6)]]
    random.Random(4).shuffle(expected)
    found = []
    for pair in pairs:
        chosen = pair.record["chosen"]
        found.append(chosen if isinstance(chosen, str) else chosen[0]["text"])
        assert pair.root == data and pair.where == "prompt 4/1/7"
        if not isinstance(chosen, str):
            kept = Image.open(data / chosen[1]["image"])
            assert kept.getpixel((0, 0)) == (1, 2, 3)
    assert found == expected
    report = json.loads((run.folder / "round.json").read_text())
    assert report == pytest.approx({
        "right": 9 / 16, "format": 10 / 16, "consistency": 1.0, "repetition": 1 / 16, "pairs": 7,
    })
    assert run.said == [
        "round 3: 16 answers, right 56.2%, format 62.5%, consistency 100.0%, repetition 6.2%; "
        "7 pairs"
    ]


# --------------------------------------------------------------------------------------------------
# the phases


def parser():
    """align.py's flags."""
    made = add_judge_arguments(arguments(align.__doc__))
    made.add_argument("--phase", required=True)
    made.add_argument("--rounds", type=int)
    made.add_argument("--pairs")
    return made


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_questions(folder)
    return folder


TOY = align.PLAN["toy"] | {"round_lr": 3e-4}  # another one than of the phase mpo


class Phase:
    """main in this process: what makes pairs, trains and scores is recorded."""

    def __init__(self, monkeypatch, questions, start_model, out):
        self.flags = ["--data", questions, "--init", start_model, "--out", out, "--device", "cpu"]
        self.out = out / "toy"
        self.events = []
        self.killed = None

        def prepare(run, init, pairs, data):
            self.events.append(("prepare", init, pairs, data))
            write(data / "train.jsonl", [{"from": str(init)}])

        def mpo(run, init, data, lr, steps, *replay):
            self.replayed = replay
            self.events.append(("mpo", init, data, lr, steps, run.args.resume))
            if run.stage == self.killed:
                raise KeyboardInterrupt
            torch.manual_seed(len(self.events))
            model = KeyeVL.empty(PRESETS["toy"]).init_weights()
            model.save_pretrained(run.folder / "model")

        def record(name, result):
            def recorder(run, *how):
                self.events.append((name, *how))
                return result

            return recorder

        monkeypatch.setitem(align.PLAN, "toy", TOY)
        monkeypatch.setattr(align, "prepare", prepare)
        monkeypatch.setattr(align, "mpo", mpo)
        monkeypatch.setattr(align, "given_pairs", lambda path: ("given", path))
        monkeypatch.setattr(align, "own_pairs", record("own", "own pairs"))
        monkeypatch.setattr(align, "round_pairs", record("round", "round's pairs"))
        monkeypatch.setattr(align, "score_phase", record("score", {"plain": 1}))

    def main(self, *flags):
        self.events.clear()
        argv = [str(flag) for flag in (*self.flags, "--threads", "1", *flags)]
        with kept_process():
            align.main(parser().parse_args(argv))
        return [event for event in self.events if event[0] != "score"]


@pytest.fixture
def phase(monkeypatch, questions, start_model, tmp_path):
    return Phase(monkeypatch, questions, start_model, tmp_path)


MPO = ("--phase", "mpo")
ITERATE = ("--phase", "iterate")


def test_mpo_answers_pairs_refers_trains_and_is_scored(phase, questions, start_model):
    data = phase.out / "mpo" / "data"
    assert phase.main(*MPO) == [
        ("own", start_model, questions, TOY),
        ("prepare", start_model, "own pairs", data),
        ("mpo", start_model, data, TOY["lr"], TOY["steps"], False),
    ]
    assert phase.replayed == ([(questions / "train" / "questions.jsonl", sft.MIX["questions"])], 1.0)
    assert phase.events[-1] == ("score", questions / "heldout", ["plain"], 40)
    assert phase.main(*MPO) == [], "it is done"
    assert phase.events == []


@pytest.mark.parametrize("flags, stage", [(MPO, "mpo"), (ITERATE, "align-1")])
def test_a_model_beyond_the_machines_memory_is_refused_before_it_is_asked(
    phase, monkeypatch, flags, stage
):
    monkeypatch.setattr("common.fit.free_memory", lambda: 1e6)
    with pytest.raises(SystemExit, match=f"^{stage} does not fit on cpu: "):
        phase.main(*flags)
    assert phase.events == []


def test_mpo_prepares_what_is_held_out_before_it_trains(
    monkeypatch, phase, tmp_path, questions, start_model
):
    folder = tmp_path / "with"
    shutil.copytree(questions, folder)
    write(folder / "heldout" / "preferences.jsonl", [{}])
    monkeypatch.setattr(
        align, "prepare_heldout", lambda run, *how: phase.events.append(("heldout", *how))
    )
    found = phase.main(*MPO, "--data", folder)
    assert [event[0] for event in found] == ["heldout", "own", "prepare", "mpo"]
    out = phase.out / "mpo" / "data" / "heldout"
    assert found[0] == ("heldout", start_model, folder / "heldout" / "preferences.jsonl", out)


def test_mpo_takes_pairs_that_are_given(phase, tmp_path, start_model):
    path = tmp_path / "mine.jsonl"
    data = phase.out / "mpo" / "data"
    assert phase.main(*MPO, "--pairs", path, "--steps", 7) == [
        ("prepare", start_model, ("given", path), data),
        ("mpo", start_model, data, TOY["lr"], 7, False),
    ]


def test_an_interrupted_mpo_keeps_its_pairs(phase, start_model):
    phase.killed = "mpo"
    with pytest.raises(KeyboardInterrupt):
        phase.main(*MPO)
    phase.killed = None
    again = phase.main(*MPO)
    assert [event[0] for event in again] == ["mpo"]


def test_another_start_or_other_pairs_are_refused(phase, tmp_path, start_model):
    """The references are of the model at the start: with another one they would be wrong."""
    phase.main(*MPO)
    other = tmp_path / "other"
    torch.manual_seed(1)
    KeyeVL.empty(PRESETS["toy"]).init_weights().save_pretrained(other)
    for flags in (("--init", other), ("--pairs", tmp_path / "mine.jsonl")):
        with pytest.raises(SystemExit, match="--fresh starts over"):
            phase.main(*MPO, *flags)
        assert phase.events == []
    data = phase.out / "mpo" / "data"
    again = phase.main(*MPO, "--init", other, "--fresh")
    assert [event[0] for event in again] == ["own", "prepare", "mpo"]
    assert read(data / "train.jsonl") == [{"from": str(other)}]


def test_corrected_pairs_are_learnt_by_a_run_that_was_killed(phase, tmp_path, capsys):
    path = tmp_path / "mine.jsonl"
    path.write_text("one")
    phase.killed = "mpo"
    whole = ["prepare", "mpo"]
    for content, events in (("one", whole), ("one", ["mpo"]), ("two", whole)):
        path.write_text(content)
        with pytest.raises(KeyboardInterrupt):
            phase.main(*MPO, "--pairs", path)
        assert [event[0] for event in phase.events] == events
    assert capsys.readouterr().err.count("mine.jsonl changed since") == 1


@pytest.mark.parametrize("killed", ["align-1", "align-2"])
def test_corrected_questions_are_asked_from_the_first_round_on(
    phase, questions, tmp_path, killed, capsys
):
    data = tmp_path / "world"
    shutil.copytree(questions, data)
    phase.killed = killed
    with pytest.raises(KeyboardInterrupt):
        phase.main(*ITERATE, "--data", data)
    phase.killed = None
    path = data / "train" / "questions.jsonl"
    path.write_text(path.read_text().replace("What is 1", "How much is 1"))
    again = phase.main(*ITERATE, "--data", data)
    assert [event[0] for event in again] == ["round", "prepare", "mpo"] * 2
    said = capsys.readouterr().err
    assert f"questions.jsonl changed since {phase.out / 'align-1'} was made: it starts over" in said
    path.write_text(path.read_text() + "\n")
    assert phase.main(*ITERATE, "--data", data) == [], "it is finished"


def test_each_round_starts_where_the_one_before_ended(phase, questions, start_model):
    rounds = []
    init = start_model
    for number in (1, 2):
        folder = phase.out / f"align-{number}"
        data = folder / "data"
        rounds += [
            ("round", init, number),
            ("prepare", init, "round's pairs", data),
            ("mpo", init, data, TOY["round_lr"], TOY["round_steps"], False),
        ]
        init = folder / "model"
    found = phase.main(*ITERATE)
    asked = [event for event in found if event[0] == "round"]
    assert all(len(pool) == 6 for _, _, pool, _, _, _ in asked)
    assert all(how == (TOY, None) for *_, plan, judge in asked for how in [(plan, judge)])
    short = [(event[0], event[1], event[3]) if event[0] == "round" else event for event in found]
    assert short == rounds
    modes = ("think", "no_think", "auto_think", "agentic_think")
    assert phase.events[-1] == ("score", questions / "heldout", modes, 40)
    assert weights(phase.out / "align") == weights(phase.out / "align-2")
    assert weights(phase.out / "align-1") != weights(phase.out / "align-2")
    assert phase.main(*ITERATE) == [] and phase.events == []


def test_the_number_of_rounds_and_their_steps_can_be_chosen(phase):
    found = phase.main(*ITERATE, "--rounds", 1, "--steps", 3)
    assert [event[0] for event in found] == ["round", "prepare", "mpo"]
    assert found[-1][4] == 3
    assert (phase.out / "align" / "model").exists()
    assert not (phase.out / "align-2").exists()


def test_a_further_round_goes_on_from_the_last(phase):
    phase.main(*ITERATE, "--rounds", 1)
    again = phase.main(*ITERATE, "--rounds", 2)
    assert [event[0] for event in again] == ["round", "prepare", "mpo"]
    assert phase.events[-1][0] == "score"
    assert weights(phase.out / "align") == weights(phase.out / "align-2")
    # but a round less would be another alignment
    with pytest.raises(SystemExit, match="--fresh starts over"):
        phase.main(*ITERATE, "--rounds", 1)


def test_later_rounds_are_nothing_without_the_first(phase):
    """A fresh start that was interrupted goes on, and past what older rounds have left."""
    phase.main(*ITERATE)
    old = weights(phase.out / "align-2")
    phase.killed = "align-1"
    with pytest.raises(KeyboardInterrupt):
        phase.main(*ITERATE, "--fresh")
    phase.killed = None
    again = phase.main(*ITERATE)
    assert [event[0] for event in again] == ["mpo", "round", "prepare", "mpo"]
    assert weights(phase.out / "align") == weights(phase.out / "align-2") != old


def test_the_plan_can_be_changed(phase):
    found = phase.main(*ITERATE, "--plan", "rounds=1", "--plan", "round_steps=9")
    assert [event[4] for event in found if event[0] == "mpo"] == [9]


def test_an_interrupted_round_goes_on(phase):
    phase.killed = "align-2"
    with pytest.raises(KeyboardInterrupt):
        phase.main(*ITERATE)
    phase.killed = None
    again = phase.main(*ITERATE)
    assert [event[0] for event in again] == ["mpo"]
    assert again[0][2] == phase.out / "align-2" / "data"


def test_resume_is_for_the_round_that_was_interrupted(phase):
    phase.killed = "align-1"
    with pytest.raises(KeyboardInterrupt):
        phase.main(*ITERATE)
    phase.killed = None
    again = phase.main(*ITERATE, "--resume")
    assert [event[-1] for event in again if event[0] == "mpo"] == [True, False]


def test_rounds_of_another_start_are_refused(phase, tmp_path):
    phase.main(*ITERATE)
    other = tmp_path / "other"
    torch.manual_seed(1)
    KeyeVL.empty(PRESETS["toy"]).init_weights().save_pretrained(other)
    with pytest.raises(SystemExit, match="--fresh starts over"):
        phase.main(*ITERATE, "--init", other)
    again = phase.main(*ITERATE, "--init", other, "--fresh")
    assert [event[0] for event in again] == ["round", "prepare", "mpo"] * 2
    assert weights(phase.out / "align") == weights(phase.out / "align-2")


def test_the_judge_has_its_addresses_its_model_and_its_key(monkeypatch, phase):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    made = []
    monkeypatch.setattr(align, "Judge", lambda *how: made.append(how) or "the judge")
    found = phase.main(*ITERATE, "--judge", "http://a/v1", "--judge-model", "name")
    assert made == [(["http://a/v1"], "name", "secret")]
    assert found[0][-1] == "the judge"


def test_a_size_without_a_plan_of_its_own_has_that_of_released_weights(phase):
    found = phase.main(*MPO, "--size", "8b")
    assert found[0][3] == align.PLAN["released"]


def test_each_phase_looks_for_the_model_of_the_one_before(phase, tmp_path):
    phase.flags = ["--data", phase.flags[1], "--out", tmp_path, "--device", "cpu"]
    with pytest.raises(SystemExit, match="sft/model holds no model"):
        phase.main(*MPO)
    with pytest.raises(SystemExit, match="grpo/model holds no model"):
        phase.main(*ITERATE)
    assert phase.events == []


def test_held_out_questions_are_checked_before_anything_is_done(phase, tmp_path):
    data = tmp_path / "data"
    write_questions(data)
    (data / "heldout" / "x.jsonl").write_text("{}\n")
    for flags in (MPO, ITERATE):
        with pytest.raises(SystemExit, match="x.jsonl:1"):
            phase.main(*flags, "--data", data)
    assert phase.events == []


def test_the_last_rounds_model_is_copied_whole_or_not_at_all(tmp_path, monkeypatch):
    target = tmp_path / "align" / "model"
    for stale in (target / "old.txt", tmp_path / "align" / "model.tmp" / "half.txt"):
        stale.parent.mkdir(parents=True)
        stale.touch()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            align.copy_model(first_model(), target)
    assert [path.name for path in target.iterdir()] == ["old.txt"]
    align.copy_model(first_model(), target)
    for path in first_model().iterdir():
        assert (target / path.name).read_bytes() == path.read_bytes()
    assert len(list(target.iterdir())) == len(list(first_model().iterdir()))
    assert [path.name for path in target.parent.iterdir()] == ["model"]


# --------------------------------------------------------------------------------------------------
# the command


def command(out, start_model, data, *flags, **how) -> str:
    place = ["--data", data, "--out", out, "--init", start_model, "--device", "cpu"]
    return run_small("align.py", *place, "--eval-limit", 1, *flags, **how)


def test_a_killed_mpo_goes_on_bit_for_bit(tmp_path, start_model):
    preferences(tmp_path / "mine", 24)
    flags = ["--phase", "mpo", "--pairs", tmp_path / "mine" / "pairs.jsonl", "--steps", 4]
    command(tmp_path / "a", start_model, tmp_path, *flags)
    one = tmp_path / "a" / "toy" / "mpo"
    first, *_, last = curve(one)
    assert first["dpo"] == pytest.approx(LN2, abs=1e-4)
    assert first["bco"] == pytest.approx(2 * LN2, abs=1e-4)
    assert first["shift"] == 0
    assert last["dpo"] < first["dpo"]
    assert last["shift"] != 0
    assert last["lr"] > 0

    flags += ["--save-every", 2]
    command(tmp_path / "b", start_model, tmp_path, *flags, kill=3, code=-9)
    said = command(tmp_path / "b", start_model, tmp_path, *flags)
    assert "resumed from" in said and "step-2" in said
    other = tmp_path / "b" / "toy" / "mpo"
    assert curve(other) == curve(one)
    assert weights(other) == weights(one)


def test_two_ranks_run_mpo_and_leave_out_what_they_cannot_read(tmp_path, start_model):
    records = preferences(tmp_path / "mine", 24)
    path = tmp_path / "mine" / "pairs.jsonl"
    write(path, [unreadable(records[0]), *records[1:]])
    flags = ["--phase", "mpo", "--pairs", path, "--steps", 1]
    said = command(tmp_path, start_model, tmp_path, *flags, ranks=2)
    assert said.count("took") == 1, "rank 0 alone speaks"
    assert said.count(f"skipped: 1 of 24 pairs cannot be used, the first: {path}:1: none.png") == 1
    [step] = curve(tmp_path / "toy" / "mpo")
    assert step["dpo"] == pytest.approx(LN2, abs=1e-3)
    assert step["skipped"] == 0


def test_pairs_that_cannot_be_read_end_the_run(tmp_path, start_model):
    records = preferences(tmp_path / "mine", 4)
    path = tmp_path / "mine" / "pairs.jsonl"
    write(path, [*map(unreadable, records[:2]), *records[2:]])
    said = command(tmp_path, start_model, tmp_path, "--phase", "mpo", "--pairs", path, code=1)
    assert f"2 of 4 pairs cannot be used, the first: {path}:1: none.png: missing" in said
    assert "Traceback" not in said
    assert not (tmp_path / "toy" / "mpo" / "model").exists()


def test_preferences_that_are_none_are_an_error(tmp_path, start_model):
    path = tmp_path / "bad.jsonl"
    write(path, [{"messages": [{"role": "user", "content": "q"}], "chosen": "a"}])
    said = command(tmp_path, start_model, tmp_path, "--phase", "mpo", "--pairs", path, code=1)
    assert "bad.jsonl:1" in said and "rejected" in said
    assert "Traceback" not in said


def test_rounds_run_to_their_end(tmp_path, questions, start_model):
    said = command(tmp_path, start_model, questions, "--phase", "iterate")
    assert "round 1: 18 answers" in said and "round 2: 18 answers" in said
    folder = tmp_path / "toy"
    score = json.loads((folder / "align" / "score.json").read_text())
    assert set(score) == {"think", "no_think", "auto_think", "agentic_think"}
    assert weights(folder / "align") == weights(folder / "align-2")
    for number in (1, 2):  # each round's reference is the round's start
        steps = curve(folder / f"align-{number}")
        assert len(steps) == 2
        assert steps[0]["dpo"] == pytest.approx(LN2, abs=1e-3)
        assert steps[1]["dpo"] != pytest.approx(LN2, abs=1e-6)
