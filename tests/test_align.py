"""align.py: MPO's golden values and limits, BCO's shift, pairs of packs, the command for preferences and for rounds."""
import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import align
from align import Shift, mpo_loss
from conftest import ROOT
from data import Loader, adopt, pack, versions
from toyworld import make_world
from trainer import per_sample

LN2 = math.log(2)


def loss(chosen, rejected, shift=0.0, nll=0.0, **more):
    """Of one pair whose rewards are given (beta 1, reference 0)."""
    return mpo_loss(torch.tensor([[chosen, rejected]]), torch.zeros(1, 2), torch.tensor([nll]), shift, beta=1.0, **more)


def test_mpo_at_the_start():
    policy = torch.tensor([[-5.0, -7.0]], requires_grad=True)
    parts = mpo_loss(policy, policy.detach(), -policy[:, 0] / 4, 0.0)
    assert parts["dpo"].item() == pytest.approx(LN2) and parts["bco"].item() == pytest.approx(2 * LN2)
    assert parts["total"].item() == pytest.approx(1.2 * LN2 + 1.25) and 1.2 * LN2 == pytest.approx(0.831777, abs=1e-6)
    (0.8 * parts["dpo"] + 0.2 * parts["bco"]).sum().backward()
    assert policy.grad[0].tolist() == pytest.approx([-0.1 / 2, 0.1 / 2])


def test_bco_bounds_dpo_and_shifts():
    torch.manual_seed(0)
    for r_c, r_r, d in torch.randn(200, 3).mul(3).tolist():
        a = loss(r_c, r_r, d)
        assert a["bco"] >= a["dpo"] - 1e-6
        b = loss(r_c + 2, r_r + 2, d + 2)
        assert b["bco"].item() == pytest.approx(a["bco"].item(), abs=1e-5) and b["dpo"].item() == pytest.approx(a["dpo"].item(), abs=1e-5)
    best = min((loss(1.3, -0.4, d / 100)["bco"].item(), d / 100) for d in range(-200, 300))
    assert best[1] == pytest.approx(0.45)


def test_mpo_limits():
    same = loss(0.3, 0.3)
    assert same["dpo"].item() == pytest.approx(LN2)
    assert loss(1.0, -1.0, weights=(1, 0, 0))["total"].item() == pytest.approx(-F.logsigmoid(torch.tensor(2.0)).item())
    assert loss(1.0, -1.0, nll=1.7, weights=(0, 0, 1))["total"].item() == pytest.approx(1.7)


def test_a_group_ends_with_a_greedy_answer(model, processor, tmp_path):
    """Other seeds, other answers, but for the last of each group; the ranks' shares make up the whole."""
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)

    def answers(seed, rank=0, world=1):
        run = SimpleNamespace(device="cpu", rank=rank, world=world)
        return {i: [content for content, _ in got] for i, got in align.respond(run, tmp_path, jobs, 3, seed).items()}

    question = lambda text: {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "2"}],
                             "meta": {"task": "t", "answer": "2", "verifier": "number"}}
    jobs = [(question(f"How many? {i}"), tmp_path, mode) for i, mode in enumerate(("think", "auto_think", "no_think"))]
    one, other = answers("0/1"), answers("0/2")
    for i in range(3):
        assert len(one[i]) == 3 and one[i][-1] == other[i][-1] not in one[i][:-1]
        assert one[i][:-1] != other[i][:-1] and one[i][0] != one[i][1]
    assert answers("0/1", 0, 2) | answers("0/1", 1, 2) == one


def test_shift_is_the_mean_of_all_rewards():
    shift, seen = Shift(), []
    assert float(shift) == 0
    for total, n in ((0.2, 2), (0.9, 3), (0.3, 1)):  # sums of rewards and their numbers
        shift.add(total, n)
        seen.append(float(shift))
    assert seen == pytest.approx([0.1, 0.22, 1.4 / 6]) and float(Shift(shift.total, shift.n)) == float(shift)


def preferences(folder, n=6):
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(n):
        Image.effect_noise((60 + i, 70), 60).convert("RGB").save(folder / f"{i}.png")
        lines.append({"messages": [{"role": "user", "content": [{"type": "image", "image": f"{i}.png"}, {"type": "text", "text": "What?"}]}],
                      "chosen": "red" if i % 2 else "a red circle", "rejected": "blue " * (i + 1)})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def test_pairs_lie_side_by_side_and_per_sample_sums(tmp_path, model, processor):
    lines = preferences(tmp_path)
    for i, line in enumerate(lines):
        line["reference"] = [-float(i), -10.0 - i]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (batch,), _ = next(iter(Loader([(tmp_path / "pairs.jsonl", 1)], processor, 4096, 1, seed=0)))
    n = len(batch["reference"])
    assert len(batch["segments"]) - 1 == 2 * n and n >= 6
    with torch.no_grad():
        sums, lengths = per_sample(model.logprobs(batch)[0], batch)
        for k, (c, r) in enumerate(batch["reference"].tolist()):
            line = lines[int(-c)]
            assert r == -10 + c
            for j, conversation in enumerate(versions(line)):
                alone = pack([processor(conversation, tmp_path)])
                logp, _ = model.logprobs(alone)
                assert sums[2 * k + j].item() == pytest.approx(logp.sum().item(), abs=1e-3) and lengths[2 * k + j] == len(logp)


@pytest.mark.parametrize("bad", [{"chosen": "a"}, {"chosen": "a", "rejected": 3}, {"rejected": "b"}])
def test_half_a_preference_is_no_line(tmp_path, processor, bad):
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "q"}]} | bad) + "\n")
    with pytest.raises(ValueError, match="x.jsonl:1"):
        Loader([(tmp_path / "x.jsonl", 1)], processor, 4096, 1)


def test_adopt_takes_media_and_refuses_what_the_reader_refuses(tmp_path):
    line, = preferences(tmp_path / "from", 1)
    made = Image.new("RGB", (40, 30), (1, 2, 3))
    line["chosen"] = [{"type": "text", "text": "look "}, {"type": "image", "image": made}]
    moved = adopt(line, tmp_path / "from", tmp_path / "to")
    for item in (moved["messages"][0]["content"][0], moved["chosen"][1]):
        assert (tmp_path / "to" / item["image"]).exists()
    assert Image.open(tmp_path / "to" / moved["chosen"][1]["image"]).getpixel((0, 0)) == (1, 2, 3)
    assert line["messages"][0]["content"][0]["image"] == "0.png" and json.dumps(moved)
    from data import MediaError
    line["messages"][0]["content"][0]["image"] = "../secret.png"
    with pytest.raises(MediaError, match="outside"):
        adopt(line, tmp_path / "from", tmp_path / "to")


def test_best_and_worst_of_a_round():
    parts = lambda total, right=1.0, form=1.0, tokens=5: {"total": total, "right": right, "format": form, "tokens": tokens, "finished": right}
    job = ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "3"}], "meta": {"task": "t"}}, "root", "think")
    pair, = align.rank_pairs([job], {0: [("worst", parts(-0.5, 0)), ("long", parts(1.5, tokens=9)), ("best", parts(1.5)), ("none", parts(None))]})
    assert pair[0]["rejected_ended"] == 0
    assert (pair[0]["chosen"], pair[0]["rejected"], pair[1]) == ("best", "worst", "root")
    assert pair[0]["messages"][-1]["content"][-1]["text"] == "q/think"
    assert align.rank_pairs([job], {0: [("a", parts(1.5)), ("b", parts(1.4))]}) == []  # too close
    assert len(align.rank_pairs([job], {0: [("a", parts(0.0, 0)), ("loop", parts(-0.9, 0))]})) == 1  # wrong, but no loop
    assert align.rank_pairs([job], {0: [("a", parts(0.5, 0, 0.0)), ("b", parts(-0.9, 0))]}) == []  # the best one has no form
    assert align.rank_pairs([job], {0: [("a", parts(1.0))]}) == []


def test_only_the_answer_counts_and_a_cut_one_has_no_end(processor):
    line = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "an earlier answer"}, {"role": "user", "content": "b"}],
            "chosen": "red", "rejected": "blue blue", "rejected_ended": False}
    for conversation, text in zip(versions(line), ("red<|im_end|>", "blue blue")):
        sample = processor(conversation)
        shown = sample["tokens"][torch.where(sample["labels"] != -100)[0] + 1]
        assert processor.tokenizer.decode(shown) == text


def test_a_new_file_of_an_old_name_is_taken(tmp_path):
    line, = preferences(tmp_path / "from", 1)
    adopt(line, tmp_path / "from", tmp_path / "to")
    (tmp_path / "from" / "0.png").unlink()
    Image.new("RGB", (50, 50), (9, 9, 9)).save(tmp_path / "from" / "0.png")
    moved = adopt(line, tmp_path / "from", tmp_path / "to")
    assert Image.open(tmp_path / "to" / moved["messages"][0]["content"][0]["image"]).getpixel((0, 0)) == (9, 9, 9)
    assert adopt(moved, tmp_path / "to", tmp_path / "to") == moved and not list((tmp_path / "to").rglob("*.tmp"))


# -------------------------------------------------------------------------------------------------------- the command

@pytest.fixture(scope="module")
def start(tmp_path_factory, model, processor):
    folder = tmp_path_factory.mktemp("align-start") / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def shell(*cmd, ranks=1, fail=False):
    launch = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"] if ranks > 1 else []
    done = subprocess.run([sys.executable, *launch, *map(str, cmd), "--device", "cpu", "--threads", "1"], cwd=ROOT, capture_output=True,
                          text=True, timeout=300, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert (done.returncode != 0) == fail, done.stderr[-3000:]
    return done.stdout + done.stderr


def curve(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if '"step"' in line]


def test_mpo_on_any_preferences_resumes_and_agrees_on_two_ranks(tmp_path, start):
    preferences(tmp_path / "mine", 24)
    args = ["align.py", "--phase", "mpo", "--init", start, "--pairs", tmp_path / "mine" / "pairs.jsonl", "--data", tmp_path, "--steps", 4,
            "--save-every", 2]
    shell(*args, "--out", tmp_path / "a")
    one = curve(tmp_path / "a/toy/mpo")
    assert one[0]["dpo"] == pytest.approx(LN2, abs=1e-3) and one[0]["bco"] == pytest.approx(2 * LN2, abs=1e-3) and one[0]["shift"] == 0
    assert one[-1]["dpo"] < one[0]["dpo"] and one[-1]["shift"] != 0
    model = tmp_path / "a/toy/mpo/model/model.safetensors"
    bytes_ = model.read_bytes()
    subprocess.run(["rm", "-r", tmp_path / "a/toy/mpo/score.json", tmp_path / "a/toy/mpo/checkpoint/step-4"], check=True)
    assert "resumed" in shell(*args, "--out", tmp_path / "a")
    again = curve(tmp_path / "a/toy/mpo")
    for a, b in zip(one, again):
        assert (a["loss"], a["shift"], a["norm"]) == (b["loss"], b["shift"], b["norm"])
    assert model.read_bytes() == bytes_
    shell(*args, "--out", tmp_path / "b", ranks=2)
    # two ranks deal the step's packs into two halves, so only the first step has the same pairs in expectation
    assert curve(tmp_path / "b/toy/mpo")[0]["dpo"] == pytest.approx(LN2, abs=1e-3)


def test_preferences_that_are_none_are_an_error(tmp_path, start):
    (tmp_path / "bad.jsonl").write_text('{"messages": [{"role": "user", "content": "q"}], "chosen": "a"}\n')
    said = shell("align.py", "--phase", "mpo", "--init", start, "--pairs", tmp_path / "bad.jsonl", "--out", tmp_path, "--data", tmp_path, fail=True)
    assert "bad.jsonl:1" in said and "rejected" in said and "Traceback" not in said


ROUNDS = '''
import runpy, sys, rewards, trainer
add = trainer.judge_arguments
def arguments(parser):
    sys.modules["__main__"].PLAN["toy"].update(rounds=2, prompts=6, group=3, round_steps=2, pack=1500)
    return add(parser)
trainer.judge_arguments = arguments
whole = rewards.reward
def reward(completion, *a, **k):  # fresh weights are never right: their length decides
    n = sum(len(c.get("text", "")) for c in completion) % 11
    return whole(completion, *a, **k) | {"total": n / 5, "right": 1.0, "format": 1.0}
rewards.reward = reward
runpy.run_path("align.py", run_name="__main__")
'''


def test_rounds(tmp_path, start):
    make_world(tmp_path / "world", pictures=60, clips=12, heldout=5, workers=1, progress=False)
    (tmp_path / "rounds.py").write_text(ROUNDS)
    said = shell(tmp_path / "rounds.py", "--phase", "iterate", "--init", start, "--data", tmp_path / "world", "--out", tmp_path, "--eval-limit", 1)
    assert "round 1:" in said and "round 2:" in said and (tmp_path / "toy/align/model/model.safetensors").exists()
    assert set(json.loads((tmp_path / "toy/align/score.json").read_text())) == {"think", "no_think", "auto_think", "agentic_think"}
    for i in (1, 2):  # each round's reference is the round's start
        assert curve(tmp_path / f"toy/align-{i}")[0]["dpo"] == pytest.approx(LN2, abs=1e-3)
    assert "is done" in shell(tmp_path / "rounds.py", "--phase", "iterate", "--init", start, "--data", tmp_path / "world", "--out", tmp_path, "--eval-limit", 1)
