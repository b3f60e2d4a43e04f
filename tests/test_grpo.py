"""grpo.py: golden values and limiting cases of its loss, sampler against trainer, a bandit, two ranks, kill and resume."""
import copy
import json
import math
import os
import subprocess
import sys

import pytest
import torch

import grpo
import trainer
from conftest import ROOT
from data import Processor, pack
from generate import Generator, converse, trajectory
from grpo import advantages, k3, policy_loss, spread, token_weights
from model import KeyeVL
from PIL import Image
from rewards import overlong, turn_of
from toyworld import make_world


def close(values, expected, tol=1e-5):
    return torch.allclose(torch.as_tensor(values, dtype=torch.float64), torch.as_tensor(expected, dtype=torch.float64), atol=tol, rtol=0)


# ---------------------------------------------------------------------------------------------------------- advantages

def test_advantages_golden():
    assert close(advantages([1, 0, 0, 0]), [1.49970, -0.49990, -0.49990, -0.49990])
    eight = advantages([1] + [0] * 7, eps=0)
    assert close(eight[:2], [2.4749, -0.3536], 1e-4)
    assert close(advantages([1] * 4 + [0] * 4, eps=0)[::7], [0.9354, -0.9354], 1e-4)
    assert close(advantages([1] + [0] * 15, eps=0)[:2], [3.75, -0.25])
    assert close(advantages([3.0, 1.0], eps=0), [0.7071, -0.7071], 1e-4)


def test_advantages_limits():
    assert advantages([1, 1, 1]) == [0, 0, 0]
    assert close(advantages([2, 5, 3]), advantages([102, 105, 103]))  # shift
    assert close(advantages([2, 5, 3], eps=0), advantages([20, 50, 30], eps=0))  # scale
    assert close(advantages([20, 50, 30], "dr_grpo"), [10 * a for a in advantages([2, 5, 3], "dr_grpo")])
    assert advantages([1, 0, 0, 0], "dr_grpo") == [0.75, -0.25, -0.25, -0.25]
    assert close(advantages([0, 1, 0]), [advantages([1, 0, 0])[i] for i in (1, 0, 2)])
    unscored = advantages([1, None, 0])
    assert unscored[1] == 0 and close([unscored[0], unscored[2]], advantages([1, 0]))
    assert advantages([None, 1]) == [0, 0]
    with pytest.raises(ValueError, match="group of one"):
        advantages([1.0])


def test_groups_are_dropped_by_accuracy():
    assert not spread([1, 1, 1, 1]) and not spread([0, 0, 0, 0]) and spread([1, 0, 0, 0])
    assert not spread([])


# ---------------------------------------------------------------------------------------------------------------- loss

@pytest.mark.parametrize("algo, expected", [("grpo", 0.0), ("dapo", 0.3), ("dr_grpo", 0.15)])
def test_aggregation_golden(algo, expected):
    lengths, a = [2, 4, 6, 8], [1.5, -0.5, -0.5, -0.5]
    weights = token_weights(lengths, algo, longest=10, n=4, tokens=sum(lengths))
    each = lambda values: torch.cat([torch.full((t,), float(v)) for t, v in zip(lengths, values)])
    zero = torch.zeros(20)
    loss, clipped = policy_loss(zero, zero, zero, each(a), each(weights), algo=algo, beta=0.0)
    assert close(loss, expected) and not clipped.any()


def test_first_step_is_reinforce():
    old, adv, w = torch.randn(12), torch.randn(12), torch.rand(12)
    logp = old.clone().requires_grad_()
    policy_loss(logp, old, old, adv, w, beta=0.0)[0].backward()
    assert torch.equal(logp.grad, -w * adv)


@pytest.mark.parametrize("rho, adv, grad, loss", [
    (0.7, 1, True, -0.7), (1.0, 1, True, -1), (1.27, 1, True, -1.27), (1.29, 1, False, -1.28), (4, 1, False, -1.28),
    (0.79, -1, False, 0.8), (0.81, -1, True, 0.81), (1.5, -1, True, 1.5), (2.9, -1, True, 2.9), (4, -1, False, 3.0)])
def test_clip_truth_table(rho, adv, grad, loss):
    logp, one = torch.tensor([math.log(rho)], requires_grad=True), torch.ones(1)
    value, clipped = policy_loss(logp, 0 * one, 0 * one, adv * one, one, beta=0.0)
    value.backward()
    assert close(value.detach(), loss) and (logp.grad.abs() > 0).item() == grad == (not clipped.bool().item())


def test_k3_golden_and_unbiased():
    assert close(k3(torch.zeros(5), torch.tensor([-2.0, -1, 0, 1, 2])), [1.135335, 0.367879, 0, 0.718282, 4.389056])
    p, f = torch.randn(2, 50, dtype=torch.float64).log_softmax(-1)
    assert close((p.exp() * k3(p, f)).sum(), (p.exp() * (p - f)).sum(), 1e-12)


def test_kl_trains_where_rewards_do_not():
    logp, f = torch.zeros(3, requires_grad=True), torch.tensor([0.5, -0.5, 0.0])
    policy_loss(logp, torch.zeros(3), f, torch.zeros(3), torch.ones(3), beta=0.1)[0].backward()
    assert close(logp.grad, 0.1 * (1 - f.exp()))


def test_gspo_golden():
    logp = torch.tensor([0.1, -0.1, 0.3], requires_grad=True)
    zero, owner, w = torch.zeros(3), torch.zeros(3, dtype=torch.long), torch.full((3,), 1 / 3)
    loss, _ = policy_loss(logp, zero, zero, torch.full((3,), 2.0), w, owner, "gspo", 0.0, (0.5, 0.5))
    loss.backward()
    assert close(loss.detach(), -2 * math.exp(0.1)) and close(logp.grad, [-0.736781] * 3)
    same = [torch.zeros(3, requires_grad=True) for _ in range(2)]
    for x, algo in zip(same, ("grpo", "gspo")):
        policy_loss(x, zero, zero, torch.full((3,), 2.0), w, owner, algo, 0.0, (0.5, 0.5))[0].backward()
    assert torch.equal(same[0].grad, same[1].grad)


def test_gspo_clips_whole_answers():
    logp, owner = torch.tensor([0.1, 0.1, 0.0, 0.0]), torch.tensor([0, 0, 1, 1])
    zero = torch.zeros(4)
    _, clipped = policy_loss(logp, zero, zero, torch.ones(4), torch.ones(4), owner, "gspo", 0.0, (3e-4, 4e-4))
    assert clipped.tolist() == [1, 1, 0, 0]


def test_empty_batch_has_a_gradient_of_zero():
    logp = torch.zeros(0, requires_grad=True)
    for algo in grpo.ALGORITHMS:
        loss, _ = policy_loss(logp, *[torch.zeros(0)] * 4, torch.zeros(0, dtype=torch.long), algo)
        loss.backward()
        assert loss.item() == 0


def test_overlong_golden():
    assert [overlong(n, 20480, 4096) for n in (16384, 16385, 18432, 20480, 20481)] == [0, -1 / 4096, -0.5, -1, -1]


# --------------------------------------------------------------------------------------------------- sampler and trainer

def script(generator, monkeypatch, texts):
    """The generator writes these texts, whatever the model says; log-probabilities stay the model's."""
    import generate
    choose, ids = generate.choose, [generator.processor.tokenizer.encode(t, added=True) for t in texts]
    count = [0]

    def forced(logits, draws, *rest):
        tokens, _ = choose(logits, draws, *rest)
        logp = logits.log_softmax(-1)
        flat = [i for t in ids for i in t]
        if count[0] < len(flat):
            tokens[0] = flat[count[0]]
        count[0] += 1
        return tokens, logp.gather(1, tokens[:, None])[:, 0]
    monkeypatch.setattr(generate, "choose", forced)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_sampler_logprobs_are_the_trainers_with_pictures_and_a_tool_turn(model, processor, monkeypatch, device):
    model = copy.deepcopy(model).to(device)

    def logprobs(batch):
        batch = {k: v if k in ("segments", "grids") else v.to(device) for k, v in batch.items()}
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            return [v.cpu() for v in model.logprobs(batch)]
    picture = Image.effect_noise((300, 280), 80).convert("RGB")
    asked = {"messages": [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "Look./agentic_think"}]}]}
    sample, generator = processor(asked, generate=True), Generator(model, processor)
    script(generator, monkeypatch, ["<think>a\n<tool_call>crop(0, 0, 500, 500)\nzoom(2)</tool_call>"])
    row, = converse(generator, [sample], [[picture]], 60, temperature=1.0, top_k=0, top_p=1.0, seed=1)
    assert len(row["observations"]) == 1 and row["observations"][0].ok and not all(row["sampled"])
    whole = trajectory(sample, row)
    logp, entropy = logprobs(pack([whole]))
    old = torch.tensor([p for p, own in zip(row["logprobs"], row["sampled"]) if own])
    assert len(logp) == len(old) == sum(row["sampled"]) and (entropy > 0).all()
    off = (logp - old).abs()
    assert off.max() < 1e-4 if device == "cpu" else off.mean() < 0.02 and off.max() < 0.2  # bf16 in packs, and with a cache
    # what the tool gave has no label, but changes what comes after it
    given = [i for i, own in enumerate(row["sampled"]) if not own]
    at = len(sample["tokens"]) + given[0]
    assert (whole["labels"][at - 1 : at - 1 + len(given)] == -100).all()
    other = pack([whole | {"tokens": whole["tokens"].clone()}])
    text = next(at + k for k in range(len(given)) if whole["tokens"][at + k] not in whole["pads"])
    other["tokens"][text] = (other["tokens"][text] + 1) % 900
    changed, _ = logprobs(other)
    first = sum(row["sampled"][: given[0]])
    assert torch.equal(changed[:first], logp[:first]) or (changed[:first] - logp[:first]).abs().max() < 1e-5
    assert (changed[first:] - logp[first:]).abs().max() > 1e-6
    # the content that alignment stores holds the picture, and tokenises to the same ids
    content = turn_of(row, processor.tokenizer)
    assert [c["type"] for c in content if c.get("loss", True)].count("image") == 1
    again = processor({"messages": [*asked["messages"], {"role": "assistant", "content": content}]})
    n = len(sample["tokens"]) + given[-1] + 1
    assert again["tokens"][:n].tolist() == whole["tokens"][:n].tolist()
    assert torch.equal(again["positions"][:, :n], whole["positions"][:, :n])


def test_temperature_divides_logits(model, processor):
    sample = processor({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "red circle"}]})
    batch = pack([sample])
    with torch.no_grad():
        logp, entropy = model.logprobs(batch, 0.7)
        keep = batch["labels"] != -100
        every = (model.logits(batch)[keep] / 0.7).log_softmax(-1)
    assert torch.allclose(logp, every.gather(1, batch["labels"][keep][:, None])[:, 0], atol=1e-5)
    assert torch.allclose(entropy, -(every.exp() * every).sum(-1), atol=1e-4)


def fake_rows(processor, texts, finished=True):
    encode = processor.tokenizer.encode
    sample = processor({"messages": [{"role": "user", "content": "How many?"}]}, generate=True)
    start = sample["next_position"]
    rows = []
    for text in texts:
        ids = encode(text, added=True) + [processor.tokenizer.special["<|im_end|>"]]
        rows.append({"ids": ids, "sampled": [True] * len(ids), "logprobs": [-1.0] * len(ids), "seen": [], "finished": True,
                     "positions": [[start + i] * 3 for i in range(len(ids))], "sample": sample})
    return rows


def test_the_choice_of_the_mode_weighs_apart(processor):
    texts = ["<analysis>Easy, so /no_think.</analysis>3", "<think>a b c</think><answer>\\boxed{3}</answer>"]
    rows = fake_rows(processor, texts)
    first = grpo.choosing(rows[0], processor.tokenizer)
    assert processor.tokenizer.decode(rows[0]["ids"][:first]).endswith("</analysis>") and grpo.choosing(rows[1], processor.tokenizer) == 0
    samples = grpo.samples_of(rows, [{"total": 1.0}, {"total": 0.0}], "grpo", processor.tokenizer)
    grpo.weigh(samples, "grpo", 100, 2, sum(len(s["old"]) for s in samples))
    for s, n in zip(samples, (first, 0)):
        assert close(s["weight"][:n].sum(), grpo.MODE_WEIGHT / 2 * (n > 0)) and close(s["weight"][n:].sum(), 0.5)


@pytest.mark.parametrize("algo", grpo.ALGORITHMS)
def test_micro_batches_change_nothing(model, processor, algo):
    rows = fake_rows(processor, ["red", "a red circle at the top", "<analysis>Easy, so /no_think.</analysis>2", "1 2 3 4 5 6"])
    told = [{"total": v} for v in (1.0, 0.0, 0.5, 0.2)]
    grads = []
    for groups in ([4], [2, 2], [1, 1, 1, 1], [3, 1]):
        samples = grpo.samples_of(rows, told, algo, processor.tokenizer)
        grpo.weigh(samples, algo, 50, 4, sum(len(s["old"]) for s in samples))
        model.zero_grad()
        for n in groups:
            part, samples = samples[:n], samples[n:]
            for s in part:
                s["reference"] = s["old"] - 0.1
            batch = grpo.gather_batch(part)
            logp, _ = model.logprobs(batch)
            policy_loss(logp, logp.detach() - 0.05, batch["reference"], batch["advantage"], batch["weight"], batch["owner"], algo)[0].backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    model.zero_grad()
    for g in grads[1:]:
        assert (g - grads[0]).abs().max() < 1e-5 * grads[0].abs().max()


def test_a_bandit_is_solved():
    """One state, four answers of one token, one of them right."""
    torch.manual_seed(0)
    logits = torch.zeros(4, requires_grad=True)
    opt = torch.optim.Adam([logits], lr=0.1)
    for _ in range(100):
        with torch.no_grad():
            y = torch.multinomial(logits.softmax(-1), 8, replacement=True)
        right = [float(v == 2) for v in y]
        if not spread(right):
            continue
        old = logits.detach().log_softmax(-1)[y]
        weight = torch.tensor(token_weights([1] * 8, "grpo", 1, 8, 8))
        policy_loss(logits.log_softmax(-1)[y], old, old, torch.tensor(advantages(right)), weight, beta=0.0)[0].backward()
        opt.step()
        opt.zero_grad()
    assert logits.softmax(-1)[2] > 0.95


# -------------------------------------------------------------------------------------------------------- the command

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("grpo") / "world"
    make_world(out, pictures=60, clips=12, heldout=5, workers=1, progress=False)
    return out


@pytest.fixture(scope="module")
def start(tmp_path_factory, model, processor):
    folder = tmp_path_factory.mktemp("grpo-start") / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


# grpo.py on a small plan, with rewards that differ: fresh weights are never right
SMALL = '''
import runpy, sys, rewards, trainer
add = trainer.judge_arguments
def arguments(parser):
    sys.modules["__main__"].PLAN["toy"].update(prompts=4, group=2, longest=12, pack=600)
    return add(parser)
trainer.judge_arguments = arguments
whole = rewards.reward
def reward(completion, *a, **k):
    parts = whole(completion, *a, **k)
    n = sum(len(c.get("text", "")) for c in completion) % 7
    return parts | {"total": n / 7, "right": float(n > 3), "format": 1.0}
rewards.reward = reward
runpy.run_path("grpo.py", run_name="__main__")
'''


def command(out, world, start, *more, ranks=1):
    launch = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--master_port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"] if ranks > 1 else []
    path = out.parent / "small.py"
    path.write_text(SMALL)
    args = ["--data", world, "--out", out, "--init", start, "--device", "cpu", "--threads", 1, "--eval-limit", 1, "--steps", 3, *more]
    return [sys.executable, *launch, str(path), *map(str, args)]


def shell(cmd):
    done = subprocess.run(cmd, cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def curve(out):
    return [json.loads(line) for line in (out / "toy" / "grpo" / "metrics.jsonl").read_text().splitlines() if '"step"' in line]


def test_command_resumes_bit_for_bit_and_two_ranks_agree(tmp_path, world, start):
    shell(command(tmp_path / "a", world, start, "--save-every", 1))
    one = curve(tmp_path / "a")
    assert len(one) == 3 and any(r["loss"] for r in one)
    assert {"reward", "outcome", "format", "consistency", "repetition", "group_std", "dropped_groups", "clipped", "kl", "entropy",
            "answer_tokens", "auto_chose_think", "calls", "failed_calls", "mismatch"} <= set(one[0])
    assert all(r["mismatch"] < 1e-4 for r in one)
    model = tmp_path / "a" / "toy" / "grpo"
    saved = (model / "model" / "model.safetensors").read_bytes()
    for gone in ("score.json", "checkpoint/step-3"):  # as if it had been killed after the second step
        path = model / gone
        subprocess.run(["rm", "-r", path], check=True)
    assert "resumed" in shell(command(tmp_path / "a", world, start, "--save-every", 1))
    again = curve(tmp_path / "a")
    noise = ("seconds", "tokens_per_s", "visual_tokens_per_s", "mfu", "peak_gb", "left_s")
    strip = lambda rows: [{k: v for k, v in r.items() if k not in noise} for r in rows]
    assert strip(one) == strip(again) and (model / "model" / "model.safetensors").read_bytes() == saved
    shell(command(tmp_path / "b", world, start, ranks=2))
    two = curve(tmp_path / "b")
    a, b = one[0], two[0]  # later a rounding error may have become another word
    assert a["reward"] == pytest.approx(b["reward"]) and a["loss"] == pytest.approx(b["loss"], abs=1e-5) and a["loss"]
    assert a["norm"] == pytest.approx(b["norm"], rel=1e-3) and a["kl"] == pytest.approx(b["kl"], abs=1e-6)


def test_a_missing_start_is_named(tmp_path, world):
    done = subprocess.run(command(tmp_path, world, tmp_path / "nothing"), cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode and "holds no model" in done.stderr and "Traceback" not in done.stderr


def two_ranks(rank, port, folder, out):
    """Rank 0 has only text, rank 1 a picture; both run the sharded model without gradients, as the reference does."""
    import torch.distributed as dist
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    processor = Processor.from_pretrained(folder)

    class Run:
        device, dtype, world = torch.device("cpu"), torch.float32, 2
    sharded = trainer.shard(KeyeVL.from_pretrained(folder), Run)
    content = "a" if rank == 0 else [{"type": "image", "image": Image.new("RGB", (60, 60))}, {"type": "text", "text": "a"}]
    batch = pack([processor({"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]})])
    with torch.no_grad():
        logp, _ = sharded.logprobs(batch)
    alone, _ = KeyeVL.from_pretrained(folder).logprobs(batch)
    assert (logp - alone).abs().max() < 1e-5
    (out / f"{rank}").write_text("done")
    dist.destroy_process_group()


def test_ranks_with_and_without_pictures_stay_together_without_gradients(tmp_path, start):
    import socket
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(two_ranks, (port, start, tmp_path), nprocs=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "1"]
