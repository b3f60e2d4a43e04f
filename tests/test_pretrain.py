"""pretrain.py: all stages, kills, ranks; its two loops; its loss, first weights and mixtures."""

import json
import os
import re
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import pretrain
from common import processes
from common.loader import Loader
from common.run import Run
from common.run import start as start_run
from conftest import ROOT
from conftest import toy_processor
from data import Processor
from model import PRESETS
from model import SCALE
from model import KeyeVL
from vit import PoolingHead, ViT
from phases import FakeRun
from phases import Loop
from phases import Weights
from phases import arguments_of
from phases import as_main
from phases import call
from phases import change
from phases import first_model
from phases import flags
from phases import read
from phases import resize
from phases import run_script
from phases import sums
from phases import talk
from phases import world
from phases import write
from stage import in_processes

STAGES = ["text", "0", "1", "2", "3-even", "3-picture", "3-video"]
PICTURE = {"type": "image", "image": "x.png", "width": 56, "height": 56}


def curve(out, stage, *keys):
    records = read(out / "toy" / f"pretrain-{stage}" / "metrics.jsonl")
    return [tuple(record[key] for key in ("step", *keys)) for record in records]


def weights(out, name):
    return load_file(out / "toy" / name / "model" / "model.safetensors")


def start(*argv, stage=None, init_llm=None, init_vit=None, vocab=None):
    """main of pretrain.py in this process."""
    call(pretrain, *argv, stage=stage, init_llm=init_llm, init_vit=init_vit, vocab=vocab)


# ----------------------------------------------------------------------------------------------
# all stages, as a user starts them


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    run_script("pretrain.py", *flags(out, "--data", world(), "--steps", 2))
    return out


def test_every_stage_leaves_model_metrics_and_score(whole):
    folders = {"pretrain", *(f"pretrain-{stage}" for stage in STAGES)}
    pages = {"report.html", "phases.svg"}
    assert {path.name for path in (whole / "toy").iterdir()} == folders | pages
    for stage in STAGES:
        assert [step for step, tokens in curve(whole, stage, "tokens") if tokens > 0] == [0, 1]
    for name in folders:
        folder = whole / "toy" / name
        KeyeVL.from_pretrained(folder / "model")
        Processor.from_pretrained(folder / "model")
        score = folder / "score.json"
        if name == "pretrain-text":
            assert not score.exists()
        elif name == "pretrain-0":
            assert set(json.loads(score.read_text())) == {"accuracy", "n", "among"}
        else:
            headline = json.loads(score.read_text())["plain"]["headline"]
            assert (headline["blind"] is not None) == (name == "pretrain")


@pytest.mark.parametrize("before, after, parts", [
    ("text", "0", {"visual"}),
    ("0", "1", {"mlp_AR"}),
    ("1", "2", {"visual", "mlp_AR", "model"}),
    *(("2", stage, {"visual", "mlp_AR", "model"}) for stage in STAGES[4:]),
])
def test_a_stage_changes_its_parts_only(before, after, parts, whole):
    old = weights(whole, f"pretrain-{before}")
    new = weights(whole, f"pretrain-{after}")
    changed = [name for name in old if not torch.equal(old[name], new[name])]
    assert {name.split(".")[0] for name in changed} == parts


def test_the_first_stage_changes_the_decoder_only(whole):
    torch.manual_seed(0)
    fresh = KeyeVL.empty(PRESETS["toy"]).init_weights().state_dict()
    text = KeyeVL.from_pretrained(whole / "toy" / "pretrain-text" / "model").state_dict()
    changed = [name for name in fresh if not torch.equal(fresh[name], text[name])]
    assert {name.split(".")[0] for name in changed} == {"decoder"}


def test_the_merged_model_is_the_mean_of_its_parents(whole):
    parents = [weights(whole, f"pretrain-{stage}") for stage in STAGES[4:]]
    merged = weights(whole, "pretrain")
    for name, tensor in merged.items():
        mean = (sum(parent.pop(name).double() for parent in parents) / 3).float()
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, mean, atol=1e-8, rtol=1e-6, msg=name)
    assert parents == [{}] * 3


def test_finished_stages_are_passed_over(whole):
    def times():
        files = [path for path in whole.rglob("*") if path.is_file()]
        return {path: path.stat().st_mtime_ns for path in files if path.name != "made.json"}

    before = times()
    said = run_script("pretrain.py", *flags(whole, "--data", world(), "--steps", 2))
    assert said.count("is trained") == len(STAGES) + 1
    assert f"the model is in {whole / 'toy/pretrain/model'}" in said
    assert times() == before


# ----------------------------------------------------------------------------------------------
# kills and ranks


def as_killed(argv):
    """Dies by kill -9 after its fourth step, which no checkpoint holds."""
    log = Run.log

    def die(run, step, *args, **values):
        log(run, step, *args, **values)
        if step == 3:
            run.finish_save()  # of the second step, in the background
            os.kill(os.getpid(), signal.SIGKILL)

    Run.log = die
    as_two_packs(argv)


def as_two_packs(argv):
    """A step has two packs, as two ranks need.

    In stage 0 two ranks show more other captions than one process with two micro-batches does; to
    compare, one process gets both packs as one.
    """
    resize(packs=2)
    if "RANK" not in os.environ and argv[argv.index("--stage") + 1] == "0":
        packs_of = Loader.__iter__
        Loader.__iter__ = lambda loader: map(joined, packs_of(loader))
    as_main(argv)


def joined(step):
    packs, info = step
    lengths = torch.cat([pack["segments"].diff() for pack in packs])
    one = {"segments": F.pad(lengths.cumsum(0), (1, 0))}
    for key in ("tokens", "labels", "patches", "grids"):
        one[key] = torch.cat([pack[key] for pack in packs])
    return [one], info


def four_steps(out, stage):
    few = ("--stage", stage, "--steps", 4, "--save-every", 2)
    return ["pretrain.py", *flags(out, "--data", world(), *few)]


@pytest.fixture(scope="module", params=["0", "2"])
def one_process(request, tmp_path_factory):
    """(stage, the folder of its run of four steps)."""
    out = tmp_path_factory.mktemp("one")
    in_processes(as_two_packs, four_steps(out, request.param))
    return request.param, out


def test_a_killed_stage_learns_what_was_corrected(tmp_path):
    """As many lines as before, so the loader's place would still fit."""
    data = tmp_path / "data"
    shutil.copytree(world(), data)
    few = ("--stage", "text", "--steps", 4, "--save-every", 2)
    argv = ["pretrain.py", *flags(tmp_path, "--data", data, *few)]
    in_processes(as_killed, argv, code=-signal.SIGKILL)
    path = data / "train" / "text.jsonl"
    before = path.read_text()
    path.write_text("".join(reversed(before.splitlines(keepends=True))))
    said = in_processes(as_two_packs, argv)
    folder = tmp_path / "toy" / "pretrain-text"
    assert f"text.jsonl changed since {folder} was made: it starts over" in said
    assert "resumed" not in said
    assert [step for step, _ in curve(tmp_path, "text", "loss")] == [0, 1, 2, 3]

    path.write_text(before)
    made = (folder / "model" / "model.safetensors").read_bytes()
    said = in_processes(as_two_packs, argv)
    assert "text.jsonl changed" in said and "it stays as it is (--fresh trains it again)" in said
    assert (folder / "model" / "model.safetensors").read_bytes() == made


def test_kill_9_gives_the_same_curve(one_process, tmp_path):
    stage, out = one_process
    in_processes(as_killed, four_steps(tmp_path, stage), code=-signal.SIGKILL)
    assert "resumed from" in in_processes(as_two_packs, four_steps(tmp_path, stage))
    keys = ("loss", "norm", "lr", "tokens", "visual_tokens")
    assert curve(tmp_path, stage, *keys) == curve(out, stage, *keys)
    assert [step for step, *_ in curve(out, stage, *keys)] == [0, 1, 2, 3]
    model = Path("toy") / f"pretrain-{stage}" / "model" / "model.safetensors"
    assert (tmp_path / model).read_bytes() == (out / model).read_bytes()


def test_two_ranks_equal_one(one_process, tmp_path):
    stage, out = one_process
    in_processes(as_two_packs, four_steps(tmp_path, stage), ranks=2)
    keys = ("loss", "norm", "lr", "tokens", "visual_tokens")
    for row, other in zip(curve(out, stage, *keys), curve(tmp_path, stage, *keys), strict=True):
        assert row == pytest.approx(other, rel=1e-5)


def test_three_ranks_go_on_with_two_packs(one_process, tmp_path):
    """They keep the packs of the checkpoint: in each step one of them has an empty one."""
    stage, out = one_process
    in_processes(as_killed, four_steps(tmp_path, stage), code=-signal.SIGKILL)
    assert "resumed from" in in_processes(as_main, four_steps(tmp_path, stage), ranks=3)
    keys = ("loss", "norm", "lr", "tokens", "visual_tokens")
    for row, other in zip(curve(out, stage, *keys), curve(tmp_path, stage, *keys), strict=True):
        assert row[:3] == pytest.approx(other[:3], rel=1e-5)
        assert row[3:] == pytest.approx(other[3:], abs=10), "but for the empty pack's few tokens"


def test_stage_1_draws_again_what_no_checkpoint_holds(tmp_path):
    """One process for two ranks. The projector alone learns: the rest is as it was drawn."""
    argv = four_steps(tmp_path, "1")
    in_processes(as_two_packs, [*argv, "--keep-checkpoint"], ranks=2)
    stage = tmp_path / "toy" / "pretrain-1"
    (stage / "done.json").unlink()
    shutil.rmtree(stage / "checkpoint" / "step-4")
    whole = 4 * sum(p.numel() for p in KeyeVL.shapes(PRESETS["toy"]).parameters())
    assert sum(path.stat().st_size for path in stage.rglob("*.distcp")) < whole / 2
    said = in_processes(as_two_packs, [*argv, "--seed", 1], code=1)
    assert "what this stage started from, e.g. decoder.embed_tokens.weight (" in said

    assert "resumed from" in in_processes(as_two_packs, argv)
    torch.manual_seed(0)
    fresh = KeyeVL.empty(PRESETS["toy"]).init_weights().state_dict()
    left = KeyeVL.from_pretrained(stage / "model").state_dict()
    changed = [name for name in fresh if not torch.equal(fresh[name], left[name])]
    assert {name.split(".")[0] for name in changed} == {"projector"}


def test_the_toys_one_pack_becomes_two_smaller_ones_on_two_ranks(tmp_path):
    few = ("--data", world(), "--stage", "1", "--steps", 1)
    run_script("pretrain.py", *flags(tmp_path, *few), ranks=2)
    ((_, tokens),) = curve(tmp_path, "1", "tokens")
    assert 300 < tokens <= 600


# ----------------------------------------------------------------------------------------------
# what it says before it trains


def test_a_dry_run_plans_as_the_run_would(capsys):
    """Stage 1 of 8b takes two packs as one on two H100s (68.4 GiB), and on 24 GB one by one."""
    how = {"stage": "1", "init_llm": None, "gpus": 2, "gpu": "H100"}
    pretrain.say_needs(arguments_of(pretrain, "--size", "8b", "--packs", "4", **how))
    said = capsys.readouterr().out
    assert "2 x H100, 2 packs of 8,192 tokens a card and step" in said
    assert re.search(r"all tensors +68\.4", said) and re.search(r"packs as one +2 ", said)
    less = ("--size", "8b", "--packs", "4", "--gpu-memory", "24")
    pretrain.say_needs(arguments_of(pretrain, *less, **how))
    said = capsys.readouterr().out
    assert re.search(r" card +22\.35", said) and re.search(r"packs as one +1 ", said)


def test_a_dry_run_of_a_million_cards_is_refused():
    how = {"stage": "2", "init_llm": None, "gpus": 1_000_000, "gpu": "H100"}
    with pytest.raises(SystemExit, match="^--gpus 1000000: a dry run plans for at most 65,536 "):
        pretrain.say_needs(arguments_of(pretrain, "--size", "8b", **how))


def test_what_an_earlier_run_has_left_is_not_passed_by_in_silence(tmp_path, capsys):
    left = tmp_path / "8b" / "pretrain-1" / "model"
    left.mkdir(parents=True)
    flags = ("--size", "8b", "--out", tmp_path)
    run = SimpleNamespace(say=print)
    for init_llm, init, found in (("qwen", None, False), (None, None, True), (None, "m", True)):
        how = {"stage": "2", "init_llm": init_llm, "init_vit": None, "init": init, "vocab": None}
        args = arguments_of(pretrain, *flags, **how)
        before = pretrain.model_before(args, "2")
        assert bool(before) == found and before in (None, left, Path("m"))
        pretrain.say_what_is_missing(run, args, before)
        said = capsys.readouterr().out
        assert (f"{left} is not gone on from" in said) == (not found)


# ----------------------------------------------------------------------------------------------
# what it refuses


def test_an_unknown_stage_is_named(tmp_path):
    with pytest.raises(SystemExit, match="'4' is none of text, 0, 1, 2, 3"):
        start(*flags(tmp_path, "--data", world()), stage="0,4")


@pytest.mark.parametrize("stage, unread", [
    ("2", {"init_llm": "no/llm"}),
    ("0", {"vocab": "no/vocab.json"}),
    ("1,2", {"init_vit": "no/vit"}),
    (None, {"init_llm": "no/llm", "vocab": "no/vocab.json"}),
])
def test_what_no_stage_reads_beside_init_is_refused(stage, unread, tmp_path):
    with pytest.raises(SystemExit, match="^--init no/model brings its own ") as refusal:
        start("--init", "no/model", "--data", tmp_path, stage=stage, **unread)
    said = [f"--{name.replace('_', '-')} {value}" for name, value in unread.items()]
    assert str(refusal.value).endswith(f"no stage reads {', '.join(said)}")


def test_stage_0_reads_siglip_beside_init_too(stages):
    stages("--init", first_model(), stage="0", init_vit="siglip")
    assert stages.done == [("0", first_model())]


def test_missing_data_say_which_file_and_how_to_get_one(tmp_path):
    with pytest.raises(SystemExit) as caught:
        start(*flags(tmp_path, "--data", tmp_path / "none"))
    said = str(caught.value)
    assert f"text.jsonl in {tmp_path / 'none/train'}, which has no .jsonl file" in said
    assert f"python -m toyworld --out {tmp_path / 'none'}" in said


def test_data_for_all_stages_are_looked_for_before_the_first(tmp_path):
    write(tmp_path / "data" / "train" / "text.jsonl", [talk("Q", "A")])
    with pytest.raises(SystemExit, match="stage 0 needs one of pairs.jsonl"):
        start(*flags(tmp_path, "--data", tmp_path / "data"))
    assert not (tmp_path / "toy").exists()


def test_a_malformed_line_is_named(tmp_path):
    path = write(tmp_path / "data" / "train" / "text.jsonl", [talk("Q", "A")] * 6)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:4], '{"messages": [', *lines[4:]]))
    with pytest.raises(ValueError, match="train/text.jsonl:5: "):
        start(*flags(tmp_path, "--data", tmp_path / "data"), stage="text")


def test_an_unreadable_heldout_line_ends_the_run_before_it_begins(tmp_path):
    write(tmp_path / "data" / "train" / "text.jsonl", [talk("Q", "A")])
    sums(tmp_path / "data" / "heldout" / "q.jsonl", 3)
    with open(tmp_path / "data" / "heldout" / "q.jsonl", "a") as file:
        file.write(json.dumps(talk("Q", "A")) + "\n")
    with pytest.raises(SystemExit, match="heldout/q.jsonl:4: meta"):
        start(*flags(tmp_path, "--data", tmp_path / "data"), stage="text")
    assert not (tmp_path / "toy").exists()


def pairs(folder, *contents):
    """A data folder of pairs with these questions, and captions."""
    write(folder / "train" / "pairs.jsonl", [talk(content, "It.") for content in contents])
    return folder


@pytest.mark.parametrize("content, kinds", [
    ([PICTURE, PICTURE], r"\['image', 'image'\]"),
    ([{"type": "text", "text": "What?"}], r"\[\]"),
    ([{"type": "video", "video": "x.mp4"}], r"\['video'\]"),
])
def test_a_pair_without_its_one_picture_is_named(content, kinds, tmp_path):
    """Or every later caption of the pack would belong to another picture."""
    data = pairs(tmp_path / "data", [PICTURE], content)
    with pytest.raises(ValueError, match=f"pairs.jsonl:2: stage 0 needs .*, not {kinds}"):
        start(*flags(tmp_path, "--data", data, "--steps", 1), stage="0")


def test_a_pair_has_one_caption():
    good = talk([PICTURE], "It.")
    pretrain.check_pair(good)
    with pytest.raises(ValueError, match="one picture and one caption, not .* and 2 answers"):
        pretrain.check_pair({"messages": good["messages"] + talk("Q", "A")["messages"]})
    with pytest.raises(ValueError, match="nothing to learn"):
        pretrain.check_pair({"messages": good["messages"][:1]})


@pytest.fixture
def short_packs(monkeypatch):
    """Of three samples."""
    monkeypatch.setitem(SCALE, "toy", replace(SCALE["toy"], pack=90))


def test_stage_0_survives_a_pack_all_of_whose_pictures_are_missing(tmp_path, short_packs):
    data = pairs(tmp_path / "data", *[[PICTURE]] * 9)
    start(*flags(tmp_path, "--data", data, "--steps", 1), stage="0")
    assert curve(tmp_path, "0", "loss", "pairs", "norm") == [(0, 0, 0, 0)]
    assert all(skipped > 0 for _, skipped in curve(tmp_path, "0", "skipped"))


def test_stage_0_ends_where_all_pictures_are_missing(tmp_path, short_packs):
    data = pairs(tmp_path / "data", *[[PICTURE]] * 9)
    with pytest.raises(SystemExit, match=r"samples cannot be used, the first: .*: x.png: missing"):
        start(*flags(tmp_path, "--data", data, "--steps", 9), stage="0")
    assert not (tmp_path / "toy/pretrain-0/model").exists()


# ----------------------------------------------------------------------------------------------
# the loop of text and stages 1, 2 and 3

TOY_PLAN = {"lr": {"text": 2.0, "1": 3.0, "2": 5.0}}


def next_token(
    monkeypatch, tmp_path, stage, steps, begin=0, rank=0, world=1, size="toy", plan=TOY_PLAN
):
    loop = Loop(monkeypatch, pretrain, FakeRun(tmp_path, rank, world), begin)
    loop.run.args.size = size
    monkeypatch.setattr(pretrain, "fill", lambda model, args, before: model.load(before))
    pretrain.next_token(loop.run, stage, "before", "processor", "the mixture", steps, plan)
    assert loop.made["shapes"][0] == loop.model.loaded == "before"
    return loop


def rates(loop):
    assert [record["lr"] for record in loop.run.logged] == [step.lr for step in loop.steps]
    return [step.lr for step in loop.steps]


@pytest.mark.parametrize("stage", ["text", "1", "2", "3-even"])
def test_a_step_adds_up_its_micro_batches_before_the_weights_move(stage, tmp_path, monkeypatch):
    loop = next_token(monkeypatch, tmp_path, stage, steps=2, world=2)
    loop.check_order(steps=2)
    loop.check_numbers()


@pytest.mark.parametrize("stage, peak", [("text", 2.0), ("1", 3.0), ("2", 5.0)])
def test_the_rate_rises_and_falls_to_a_fifth(stage, peak, tmp_path, monkeypatch):
    got = rates(next_token(monkeypatch, tmp_path, stage, steps=40))
    falling = [0.2 + 0.8 * (38 - i) / 38 for i in range(38)]
    assert got == pytest.approx([peak * share for share in [0.5, 1.0, *falling]])


@pytest.mark.parametrize("size", ["toy", "tiny", "small", "0.6b", "8b"])
@pytest.mark.parametrize("stage", STAGES[4:])
def test_stage_3_goes_on_from_the_rate_of_stage_2_towards_zero(stage, size, tmp_path, monkeypatch):
    plan = pretrain.PLAN.get(size, pretrain.PLAN["released"])
    stage_2 = rates(next_token(monkeypatch, tmp_path, "2", steps=200, size=size, plan=plan))
    stage_3 = rates(next_token(monkeypatch, tmp_path, stage, steps=200, size=size, plan=plan))
    assert stage_3[0] == pytest.approx(stage_2[-1], rel=0.03) and stage_3[0] < stage_2[-1]
    peak = plan["lr"]["2"] * 0.2
    assert stage_3 == pytest.approx([peak * (200 - i) / 200 for i in range(200)])
    assert min(stage_2 + stage_3) > 0


@pytest.mark.parametrize("stage, peaks, work", [
    ("text", {"decoder": 2.0}, {"vit": False, "decoder": True}),
    ("1", {"projector": 3.0}, {"vit": False, "decoder": False}),
    ("2", {"vit": 5.0, "projector": 5.0, "decoder": 5.0}, {"vit": True, "decoder": True}),
    ("3-video", {"vit": 1.0, "projector": 1.0, "decoder": 1.0}, {"vit": True, "decoder": True}),
])
def test_each_stage_trains_its_parts(stage, peaks, work, tmp_path, monkeypatch):
    loop = next_token(monkeypatch, tmp_path, stage, steps=1)
    (model, got), named = loop.made["make_optimizer"]
    assert model is loop.model and got == pytest.approx(peaks)
    assert named == {"muon": 2, "moments": "as fits"}
    assert loop.made["fit"] == ((loop.run, loop.model, tuple(peaks), 4096), {})
    assert loop.made["step_work"] == ((loop.model.config, loop.BATCHES), work)
    assert loop.made["export"] == ((loop.run, loop.model, "processor"), {})


def test_the_loader_gives_each_rank_its_packs(tmp_path, monkeypatch):
    loop = next_token(monkeypatch, tmp_path, "2", steps=1, rank=2, world=3, size="8b")
    args, named = loop.made["Loader"]
    flops = named.pop("flops")
    assert args == ("the mixture", "processor", 8192, 66, 2, 3, 0)
    assert named == {"workers": 3, "state": {"place": 0}}
    assert flops.func is pretrain.sample_flops and flops.args == (loop.model.config,)
    assert loop.made["make_optimizer"][1] == {"muon": 0, "moments": "as fits"}


def test_a_resumed_loop_goes_on_with_the_next_step_and_the_next_sample(tmp_path, monkeypatch):
    loop = next_token(monkeypatch, tmp_path, "3-even", steps=20, begin=17)
    assert [record["step"] for record in loop.run.logged] == [17, 18, 19]
    assert rates(loop) == pytest.approx([3 / 20, 2 / 20, 1 / 20])
    assert loop.made["Loader"][1]["state"] == {"place": 17}
    assert loop.made["save"][0] == (loop.run, 20, 20, loop.model, loop, {"place": 20})
    assert loop.events.count("draw") == 3, "a sample that no step took would be lost"


# ----------------------------------------------------------------------------------------------
# the loop of stage 0


class Pairs(nn.Module):
    """Stands for SigLIP: all of its vectors are one weight times one, so that gradients count."""

    def __init__(self, run, vit, tower):
        super().__init__()
        self.run = run
        self.vit = vit
        self.text = tower
        self.logit_scale = nn.Parameter(torch.ones(1))
        self.logit_bias = nn.Parameter(torch.ones(1))

    def init_weights(self, pooling_head):
        self.fresh_head = pooling_head

    def forward(self, patches, grids, tokens):
        assert self.run.computing and len(patches) == len(grids) == len(tokens)
        images = self.vit.weight.expand(len(grids), 1)
        texts = self.text.weight.expand(len(grids), 1)
        return images, texts, self.logit_scale, self.logit_bias


class Tower(nn.Linear):
    context = 64


class Ranks(FakeRun):
    """Two ranks; the other one has 6 pictures in a step."""

    def gather(self, values):
        return [list(values), [6]]

    def score(self, scorer, later):
        self.events.append("retrieval")
        self.scored = scorer()


def contrastive(monkeypatch, tmp_path, steps, begin=0, rank=0, official=()):
    """official: names of the tensors that it starts from."""
    run = Ranks(tmp_path, rank, world=2)
    loop = Loop(monkeypatch, pretrain, run, begin)
    loop.BATCHES = [
        {"grids": torch.ones(n, 3), "patches": torch.zeros(n, 588)} for n in (3, 2)
    ]
    vit = nn.Linear(1, 1, bias=False)
    vit.head = nn.Linear(1, 1)  # what stage 0 learns on top of the ViT
    tower = Tower(1, 1, bias=False)
    for part in (vit, tower, vit.head):
        nn.init.ones_(part.weight)
    loop.losses = []

    def sigmoid_loss(images, texts, scale, bias, largest, world):
        loop.losses.append((len(images), len(texts), largest, world))
        return (images * texts).sum() + 0 * (scale + bias).sum()

    def captions_of(batch, context, encode):
        assert (context, encode) == (64, "encode")
        return torch.zeros(len(batch["grids"]), context)

    def export(run, model, processor):
        loop.note("export", set(model.state_dict()), processor)

    patches = {
        "text_tower": lambda args, cfg, processor: (tower, "encode"),
        "SigLIP": partial(Pairs, run),
        "sigmoid_loss": sigmoid_loss,
        "captions_of": captions_of,
        "export": export,
        "fill": lambda model, args, before, pooling_head: model.load(before),
        "weight_files": lambda folder: official,
        "mixture": lambda folder, stage, size: (folder, stage, size),
        "retrieval": lambda run, embed, processor, path: (processor, path),
        "training_flops": lambda cfg, lengths, grids: 100 * len(grids),
    }
    for name, double in patches.items():
        monkeypatch.setattr(pretrain, name, double)
    loop.model = Weights(run)
    loop.model.config = PRESETS["toy"]
    loop.model.vit = vit
    del loop.model.decoder
    run.args.init_vit = None
    plan = {"lr": {"0": 2.0}}
    pretrain.contrastive(run, "before", "processor", Path("data"), steps, plan)
    return loop


def test_stage_0_divides_by_the_pairs_of_the_step(tmp_path, monkeypatch):
    """On all ranks and in all micro-batches: 3 + 2 here, 6 there."""
    loop = contrastive(monkeypatch, tmp_path, steps=2)
    one = ["draw", "clip", "step", "zero", "log", "save"]
    # ViT and text tower, and by itself the projector, which is kept as it was
    begin = ["shard", "shard", "make_optimizer", "resume", "Loader"]
    assert loop.run.moved == 2 * 4  # each micro-batch twice
    assert loop.events == [*begin, *one * 2, "export", "trained", "retrieval"]
    # pictures, captions, the most that any rank has, ranks
    assert loop.losses == [(5, 5, 6, 2)] * 2
    for step, record in zip(loop.steps, loop.run.logged, strict=True):
        assert step.grads["vit.weight"] == pytest.approx(5 / 11)
        assert record["loss"] == pytest.approx(2 * 5 / 11)
        assert record["pairs"] == 11
        assert record["norm"] == 0.25
        assert record["skipped"] == 6
        assert record["tokens"] == 5 * 64
        assert record["flops"] == 2 * 500


def test_stage_0_trains_the_vit_and_the_text_tower_with_one_rate(tmp_path, monkeypatch):
    loop = contrastive(monkeypatch, tmp_path, steps=40, rank=1)
    (siglip, peaks), named = loop.made["make_optimizer"]
    assert peaks == {"vit": 2.0, "text": 2.0, "logit_scale": 2.0, "logit_bias": 2.0}
    assert named == {"muon": 2, "moments": "as fits"}
    assert siglip.stays_gathered == "as fits"
    falling = [0.2 + 0.8 * (38 - i) / 38 for i in range(38)]
    assert rates(loop) == pytest.approx([2 * share for share in [0.5, 1.0, *falling]])
    args, named = loop.made["Loader"]
    assert args == ((Path("data"), "0", "toy"), "processor", 2048, 2, 1, 2, 0)
    assert named == {"workers": 3, "state": {"place": 0}, "check": pretrain.check_pair}


def test_stage_0_keeps_the_vit_without_its_pooling_head(tmp_path, monkeypatch):
    loop = contrastive(monkeypatch, tmp_path, steps=1)
    names, processor = loop.made["export"][0]
    assert names == {"vit.weight", "projector.weight"} and processor == "processor"
    assert loop.model.loaded == "before" and loop.model.vit.head is not None
    heldout = Path("data") / "heldout" / "caption.jsonl"
    assert loop.run.scored == ("processor", heldout)


def test_a_resumed_stage_0_goes_on_with_the_next_step_and_the_next_sample(tmp_path, monkeypatch):
    loop = contrastive(monkeypatch, tmp_path, steps=20, begin=17)
    assert [record["step"] for record in loop.run.logged] == [17, 18, 19]
    assert loop.made["Loader"][1]["state"] == {"place": 17}
    run, step, steps, siglip, opt, state = loop.made["save"][0]
    assert (step, steps, opt, state) == (20, 20, loop, {"place": 20})
    assert siglip is loop.made["make_optimizer"][0][0]


# ----------------------------------------------------------------------------------------------
# SigLIP's loss


def vectors(n):
    """Images and captions (n, 8) of length 1, scale and bias: float64 leaves."""
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(2, n, 8, generator=generator, dtype=torch.float64)
    images, texts = F.normalize(both, dim=-1).unbind()
    scale, bias = torch.tensor([[3.0], [-2.0]], dtype=torch.float64).unbind()
    return [t.clone().requires_grad_() for t in (images, texts, scale, bias)]


def equation_1(n):
    """arXiv 2303.15343, eq. 1, times |B|: the loss and its four gradients."""
    images, texts, t, b = leaves = vectors(n)
    loss = 0
    for i in range(n):
        for j in range(n):
            z = 1 if i == j else -1
            loss = loss - torch.log(1 / (1 + torch.exp(z * (-t * images[i] @ texts[j] - b))))
    loss.sum().backward()
    return [loss.detach().sum(), *(leaf.grad for leaf in leaves)]


def in_ring(argv):
    """This rank's part of the loss and its gradients. argv: a folder, pictures of each rank."""
    folder, *sizes = argv
    sizes = list(map(int, sizes))
    rank = int(os.environ.get("RANK", 0))
    if len(sizes) > 1:
        dist.init_process_group("gloo")
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    images, texts, scale, bias = leaves = vectors(sum(sizes))
    largest = max(sizes) + (len(sizes) == 1)  # more than there are, as ranks have different numbers
    loss = pretrain.sigmoid_loss(images[own], texts[own], scale, bias, largest, len(sizes))
    loss.backward()
    torch.save([loss.detach(), *(leaf.grad for leaf in leaves)], f"{folder}/{rank}.pt")
    if len(sizes) > 1:
        dist.barrier()
        dist.destroy_process_group()


@pytest.mark.parametrize("sizes", [[5], [1, 4], [3, 1, 2], [2, 0, 3]], ids=str)
def test_sigmoid_loss_on_a_ring_is_equation_1(sizes, tmp_path):
    """Summed over ranks with unequally many pairs, loss and gradients are those of all pairs."""
    in_processes(in_ring, [tmp_path, *sizes], ranks=len(sizes))
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(sizes))]
    got = [sum(of_ranks) for of_ranks in zip(*parts)]
    for a, b in zip(got, equation_1(sum(sizes)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("sizes", [[7], [3, 4], [1, 0, 4, 2]], ids=str)
def test_a_picture_meets_the_captions_of_all_micro_batches(sizes):
    """In as many micro-batches as there are, loss and gradients are those of one with all."""
    pictures, captions = torch.randn(2, 7, 6, dtype=torch.double).split(1)
    torch.manual_seed(0)
    towers = torch.nn.ModuleList(torch.nn.Linear(6, 5).double() for _ in range(2))
    ends = torch.nn.ParameterList(torch.tensor([x], dtype=torch.double) for x in (0.3, -1.0))

    def embed(batch):
        images, texts = (F.normalize(t(x), dim=-1) for t, x in zip(towers, batch))
        return images, texts, ends[0].exp(), ends[1] + 0

    def loss_of(*vectors):
        return pretrain.sigmoid_loss(*vectors, 7) / 7

    want = loss_of(*embed((pictures[0], captions[0])))
    want.backward()
    leaves = [*towers.parameters(), *ends]
    gradients = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None

    batches = list(zip(pictures[0].split(sizes), captions[0].split(sizes)))
    torch.testing.assert_close(pretrain.contrast(batches, embed, loss_of), want.detach())
    for leaf, gradient in zip(leaves, gradients):
        torch.testing.assert_close(leaf.grad, gradient, atol=1e-12, rtol=1e-10)


def test_one_rank_without_pictures_has_no_loss():
    images, texts, scale, bias = vectors(2)
    loss = pretrain.sigmoid_loss(images[:0], texts[:0], scale, bias, 0)
    loss.backward()
    assert loss.item() == 0


def test_the_vectors_have_length_one_and_the_scale_starts_at_ten(processor, model):
    tower, encode = pretrain.text_tower(SimpleNamespace(init_vit=None), PRESETS["toy"], processor)
    siglip = pretrain.SigLIP(model.vit, tower.to_empty(device="cpu"))
    siglip.vit.head = PoolingHead(PRESETS["toy"].vision)
    siglip.init_weights(pooling_head=True)
    (batch,), _ = next(iter(Loader([(world() / "train/pairs.jsonl", 1)], processor, 100, 1)))
    tokens = pretrain.captions_of(batch, tower.context, encode)
    images, texts, scale, bias = siglip(batch["patches"], batch["grids"], tokens)
    count = len(batch["grids"])
    for vector in (images, texts):
        torch.testing.assert_close(vector.norm(dim=-1), torch.ones(count))
    assert scale.item() == pytest.approx(10) and bias.item() == -10
    siglip.vit.head = None


def test_captions_are_the_answers_of_the_pack(processor):
    path = world() / "train" / "pairs.jsonl"
    (batch,), _ = next(iter(Loader([(path, 1)], processor, 1024, 1)))
    _, encode = pretrain.text_tower(SimpleNamespace(init_vit=None), PRESETS["toy"], processor)
    rows = pretrain.captions_of(batch, 64, encode)
    assert rows.shape == (len(batch["grids"]), 64) and len(rows) > 3
    end = processor.tokenizer.special["<|im_end|>"]
    answers = {record["messages"][1]["content"] for record in read(path)}
    for row in rows.tolist():
        ids = row[: row.index(end)]
        assert processor.tokenizer.decode(ids) in answers
        assert set(row[len(ids) + 1 :]) <= {PRESETS["toy"].bos_token_id}, "the padding"
    assert encode(list(range(99))) == list(range(64))


# ----------------------------------------------------------------------------------------------
# retrieval


def one_hot(batch):
    """Equal captions have equal vectors, others different ones."""

    def encode(ids):
        return (ids + [7] * 64)[:64]

    rows = F.one_hot(pretrain.captions_of(batch, 64, encode), 1024).sum(1).float()
    vectors = F.normalize(rows, dim=-1)
    return vectors, vectors, None, None


def test_perfect_vectors_find_every_caption(processor, tmp_path):
    path = world() / "heldout" / "caption.jsonl"
    run = FakeRun(tmp_path)
    score = pretrain.retrieval(run, one_hot, processor, path)
    assert score["accuracy"] == 1 and score["n"] >= 4 * 5
    assert score["among"] == score["n"] / 4, "pictures of a pack, of which there are four"
    assert f"the right caption among {score['among']:.0f} for 100.0%" in run.said[0]


def test_retrieval_counts_the_pictures_of_all_ranks(processor, tmp_path):
    seen = []

    def embed(batch):
        seen.append(len(batch["grids"]))
        return one_hot(batch)

    path = world() / "heldout" / "caption.jsonl"
    score = pretrain.retrieval(FakeRun(tmp_path, world=2), embed, processor, path)
    assert len(seen) == 4 and score["n"] == 2 * sum(seen)
    assert score["accuracy"] == 1 and score["among"] == sum(seen) / 4


def test_one_vector_for_all_finds_captions_by_chance_alone(processor, tmp_path):
    def reversed_captions(batch):
        images, texts, *rest = one_hot(batch)
        return images, texts.flip(0), *rest

    path = world() / "heldout" / "caption.jsonl"
    score = pretrain.retrieval(FakeRun(tmp_path), reversed_captions, processor, path)
    assert score["accuracy"] < 0.5


def test_retrieval_is_from_the_picture_to_its_caption(processor, tmp_path):
    def one_picture(batch):
        """All pictures look like the first caption, and each caption is as near to them all."""
        images, texts, *rest = one_hot(batch)
        return texts[:1].expand_as(images), texts, *rest

    path = world() / "heldout" / "caption.jsonl"
    score = pretrain.retrieval(FakeRun(tmp_path), one_picture, processor, path)
    assert 0 < score["accuracy"] < 0.5


def test_a_heldout_caption_without_its_picture_is_named(processor, tmp_path):
    path = write(tmp_path / "caption.jsonl", [talk("What?", "It.")])
    with pytest.raises(ValueError, match="caption.jsonl:1: stage 0 needs one picture"):
        pretrain.retrieval(FakeRun(tmp_path), one_hot, processor, path)


def test_without_heldout_captions_nothing_is_scored(processor, tmp_path):
    run = FakeRun(tmp_path)
    assert pretrain.retrieval(run, None, processor, tmp_path / "caption.jsonl") is None


def test_a_pack_that_lost_all_its_pictures_is_right_about_none(processor, tmp_path, short_packs):
    """On one of several ranks: the others have seen four pictures."""
    path = write(tmp_path / "caption.jsonl", [talk([PICTURE], "It.")])
    run = FakeRun(tmp_path)
    run.sum = lambda x: x + 4
    score = pretrain.retrieval(run, one_hot, processor, path, packs=1)
    assert score["accuracy"] == 1 and score["n"] == 4


def scores_of_stage_0(argv):
    """As stage 0 has them made, of each rank's own disk. argv: out, a folder, names of files."""
    out, folder, *names = argv
    args = arguments_of(pretrain, "--out", out, "--device", "cpu", "--threads", 1)
    run = start_run(args, "pretrain-0")
    for name in names:
        path = Path(folder) / str(run.rank) / name
        run.score(lambda: pretrain.retrieval(run, one_hot, toy_processor(), path))
    run.close()


def test_a_rank_that_cannot_read_ends_the_score_of_stage_0_and_not_the_run(tmp_path):
    for rank in ("0", "1"):
        shutil.copytree(world() / "heldout", tmp_path / rank)
    write(tmp_path / "1" / "lost.jsonl", [talk([PICTURE], "It.")])
    (tmp_path / "0" / "lost.jsonl").symlink_to("caption.jsonl")
    (tmp_path / "0" / "gone.jsonl").symlink_to("caption.jsonl")
    names = ["lost.jsonl", "gone.jsonl", "caption.jsonl"]
    said = in_processes(scores_of_stage_0, [tmp_path, tmp_path, *names], ranks=2)
    assert "rank 1: SystemExit: " in said and "x.png: missing" in said
    assert said.count("pretrain-0 is trained and saved, but scoring it failed") == 1
    # the ranks still keep step: what both can read has a score
    score = json.loads((tmp_path / "toy/pretrain-0/score.json").read_text())
    assert score["accuracy"] == 1 and score["n"] > 4 * 5


def stage_0_without_room(argv):
    """One rank's memory ends in the middle of the sharded towers."""
    score = Run.score

    def no_room(*what):
        raise torch.OutOfMemoryError("no memory left")

    def of_ranks(run, scorer, **how):
        if run.rank == 1:
            ViT.forward = no_room
        score(run, scorer, **how)

    Run.score = of_ranks
    processes.GRACE = 0.2  # a test need not wait for errors that reach the terminal
    as_two_packs(argv)


def test_a_rank_without_room_for_the_score_of_stage_0_ends_all_and_the_stage_is_done(tmp_path):
    argv = four_steps(tmp_path, "0")
    said = in_processes(stage_0_without_room, argv, ranks=2, code=1)
    folder = tmp_path / "toy" / "pretrain-0"
    assert (
        "rank 1 ends: it alone could not score pretrain-0 (OutOfMemoryError: no memory left), and "
        f"the others wait for it; the model is saved, {folder / 'model'}; it stays without a score"
    ) in said
    KeyeVL.from_pretrained(folder / "model")
    assert "pretrain-0 is trained" in in_processes(as_two_packs, argv)


# ----------------------------------------------------------------------------------------------
# first weights


class Begun(Exception):
    pass


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """begun(**flags): the weights that pretrain.py is about to train."""

    def make_optimizer(model, rates, **named):
        raise Begun(dict(model.state_dict()))

    def go(**more):
        with pytest.raises(Begun) as caught:
            start(*flags(tmp_path / "out", "--data", world(), "--fresh"), **more)
        return caught.value.args[0]

    monkeypatch.setattr(pretrain, "make_optimizer", make_optimizer)
    return go


def save(theirs, folder):
    torch.manual_seed(5)
    for p in theirs.parameters():
        torch.nn.init.normal_(p.data, std=0.1)
    theirs.save_pretrained(folder)
    return theirs.state_dict()


def qwen3(folder, **other):
    from transformers import Qwen3Config
    from transformers import Qwen3ForCausalLM

    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "head_dim", "tie_word_embeddings",
    )
    sizes = {name: getattr(PRESETS["toy"], name) for name in names}
    sizes["rope_parameters"] = {"rope_type": "default", "rope_theta": PRESETS["toy"].rope_theta}
    return save(Qwen3ForCausalLM(Qwen3Config(**sizes | other)), folder)


def siglip(folder, **other):
    """With a tokenizer of five pieces."""
    from transformers import SiglipConfig
    from transformers import SiglipModel

    vision = PRESETS["toy"].vision
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = {name: getattr(vision, name) for name in names} | other
    config = SiglipConfig(
        text_config=sizes | {"vocab_size": 40, "max_position_embeddings": 24},
        vision_config=sizes | {"image_size": vision.image_size, "patch_size": 14},
    )
    state = save(SiglipModel(config), folder)
    pieces = [["<pad>", 0], ["</s>", 0], ["<unk>", 0], ["▁it", -1], ["▁is", -2]]
    model = {"type": "Unigram", "unk_id": 2, "vocab": pieces}
    (folder / "tokenizer.json").write_text(json.dumps({"model": model}))
    return state


def official(name):
    name = re.sub(r"^decoder", "model", re.sub(r"^(vit|text)\b", r"\1_model", name))
    name = name.replace("vit_", "vision_")
    name = re.sub(r"^(vision|text)_model\.layers", r"\1_model.encoder.layers", name)
    return re.sub(r"^(vision|text)_model\.(\w+_embedding)\b", r"\1_model.embeddings.\2", name)


def test_released_weights_get_to_their_places(begun, tmp_path):
    """All of Qwen3's and SigLIP's; in stage 0 with the pooling head, text tower, scale and bias."""
    theirs = qwen3(tmp_path / "qwen3") | siglip(tmp_path / "siglip")
    given = {"init_llm": str(tmp_path / "qwen3"), "init_vit": str(tmp_path / "siglip")}
    stage_1 = begun(stage="1", **given)
    stage_0 = begun(stage="0", **given)
    fresh = begun(stage="1")
    assert {"vit.head.probe", "text.head.bias", "logit_scale", "logit_bias"} <= set(stage_0)
    assert not any(name.startswith("vit.head") for name in stage_1)
    for name, tensor in (stage_1 | stage_0).items():
        of_ours = name.startswith("projector")
        want = fresh[name] if of_ours else theirs[official(name)]
        # SigLIP's patch embedding is a convolution
        assert torch.equal(tensor.flatten(), want.flatten()), name
        assert name not in stage_1 or torch.equal(tensor, stage_1[name]), name


def test_captions_for_siglips_tower_are_in_its_own_pieces(processor, tmp_path):
    siglip(tmp_path / "siglip")
    args = SimpleNamespace(init_vit=tmp_path / "siglip")
    tower, encode = pretrain.text_tower(args, PRESETS["toy"], processor)
    assert (tower.context, tower.token_embedding.num_embeddings) == (24, 40)
    end = processor.tokenizer.special["<|im_end|>"]
    ids = processor.tokenizer.encode("It is.") + [end]
    assert encode(ids) == [3, 4] + [1] * 22, "without the end of the turn"


def first_weights(**given):
    none = {"size": "toy", "seed": 0, "init_llm": None, "init_vit": None}
    model = KeyeVL.empty(PRESETS["toy"])
    pretrain.fill_fresh(model, SimpleNamespace(**none | given))
    return model


@pytest.mark.parametrize("name, number", [
    ("hidden_size", 128), ("num_key_value_heads", 4), ("rms_norm_eps", 1e-5),
])
def test_qwen3_of_another_kind_is_refused(name, number, tmp_path):
    qwen3(tmp_path / "qwen3", **{name: number})
    ours = getattr(PRESETS["toy"], name)
    with pytest.raises(SystemExit, match=f"{name} is {number}, but --size toy has {ours}"):
        first_weights(init_llm=tmp_path / "qwen3")


def test_siglip_with_other_heads_is_refused(tmp_path):
    siglip(tmp_path / "siglip", num_attention_heads=1)
    with pytest.raises(SystemExit, match="num_attention_heads is 1, but --size toy has"):
        first_weights(init_vit=tmp_path / "siglip")
    path = tmp_path / "siglip" / "config.json"
    config = json.loads(path.read_text())
    del config["vision_config"]["num_attention_heads"]  # as released files leave out defaults
    path.write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="num_attention_heads is 12, but --size toy has"):
        first_weights(init_vit=tmp_path / "siglip")


@pytest.mark.parametrize("entry", ["vision_config", "text_config"])
@pytest.mark.parametrize("change, said", [
    ({"num_attention_heads": 2}, "num_attention_heads is 2, but --size toy has 4"),
    ({"layer_norm_eps": 1e-5}, "layer_norm_eps is 1e-05, but --size toy has 1e-06"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'gelu_pytorch_tanh'"),
])
def test_siglip_of_another_kind_is_refused(tmp_path, processor, entry, change, said):
    """Its shapes would fit: only config.json tells, of either tower."""
    siglip(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config[entry] |= change
    path.write_text(json.dumps(config))
    args = SimpleNamespace(size="toy", seed=0, init_llm=None, init_vit=tmp_path)
    with pytest.raises((SystemExit, ValueError), match=f"{tmp_path}.*{entry}: {said}"):
        first_weights(init_vit=tmp_path)
        pretrain.text_tower(args, PRESETS["toy"], processor)


def test_qwen3_with_longer_rope_is_refused(tmp_path):
    rope = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}
    qwen3(tmp_path / "qwen3", rope_parameters=rope)
    where = tmp_path / "qwen3" / "config.json"
    with pytest.raises(ValueError, match=f"{where}: rope_type is 'yarn'"):
        first_weights(init_llm=tmp_path / "qwen3")


def test_fresh_weights_depend_on_the_seed_alone():
    def fresh(seed):
        torch.randn(3)
        return first_weights(seed=seed).state_dict()["decoder.embed_tokens.weight"]

    assert torch.equal(fresh(1), fresh(1)) and not torch.equal(fresh(1), fresh(2))


@pytest.mark.parametrize("official", [(), (pretrain.POOLING_PROBE,)])
def test_the_pooling_head_of_official_weights_is_kept_in_stage_0(official, tmp_path, monkeypatch):
    loop = contrastive(monkeypatch, tmp_path, steps=1, official=official)
    siglip = loop.made["make_optimizer"][0][0]
    assert siglip.fresh_head == (not official)
    assert loop.made["shapes"] == ("before", {"pooling_head": True})


def test_the_vocabulary_comes_with_the_model_the_decoder_or_the_toy(tmp_path):
    def first(**given):
        none = {"init": None, "vocab": None, "init_llm": None, "size": "toy"}
        return pretrain.first_processor(SimpleNamespace(**none | given))

    toy = first()
    assert len(toy.tokenizer.encode("circle")) == 1
    assert toy.image_max == SCALE["toy"].budget["image_max"]
    assert first(size="8b").tokenizer.n_base == 151_643, "Qwen's"
    vocab = ROOT / "toyworld" / "vocab.json"
    shutil.copy(vocab, tmp_path / "vocab.json")
    for given in ({"vocab": vocab}, {"init_llm": tmp_path}):
        processor = first(size="8b", **given)
        assert processor.image_max == 16384
    assert first(size="8b", init=first_model()).image_max == SCALE["toy"].budget["image_max"]


# ----------------------------------------------------------------------------------------------
# which stages, from where, on what


def test_all_stages_run_but_text_where_a_decoder_is_given():
    def chosen(stage=None, init_llm=None):
        return pretrain.chosen_stages(SimpleNamespace(stage=stage, init_llm=init_llm))

    assert chosen() == STAGES
    assert chosen(init_llm="Qwen3-8B") == STAGES[1:]
    assert chosen("2,3") == STAGES[3:]
    assert chosen("0") == ["0"]


def test_a_stage_starts_from_what_the_last_stage_before_it_left(tmp_path):
    def before(stage, **given):
        none = {"init": None, "init_llm": None, "init_vit": None, "out": tmp_path, "size": "toy"}
        return pretrain.model_before(SimpleNamespace(**none | given), stage)

    assert before("2") is None
    for stage in ("text", "0", "2"):
        (tmp_path / "toy" / f"pretrain-{stage}" / "model").mkdir(parents=True)
    assert before("text") is None
    assert before("0") == tmp_path / "toy/pretrain-text/model"
    assert before("2") == tmp_path / "toy/pretrain-0/model", "stage 1 has left none"
    assert before("3-even") == tmp_path / "toy/pretrain-2/model"
    assert before("2", init="some/model", init_llm="Qwen3") == Path("some/model")
    assert before("2", init_llm="Qwen3") is None
    assert before("2", init_vit="siglip") is None


def test_known_names_have_the_weight_of_their_stage_and_others_count_from_stage_2_on(tmp_path):
    for name in ("text", "pairs", "caption", "vqa", "think", "questions", "mine"):
        write(tmp_path / "train" / f"{name}.jsonl", [])

    def names(stage, size="8b"):
        return {path.stem: weight for path, weight in pretrain.mixture(tmp_path, stage, size)}

    assert [set(names(stage)) for stage in ("text", "0", "1")] == [{"text"}, {"pairs"}, {"caption"}]
    for stage in ("2", *STAGES[4:]):
        known = {name: pretrain.MIX[stage][name] for name in ("text", "caption", "vqa")}
        assert names(stage) == known | {"mine": 1}, stage
    toy = {name: pretrain.MIX["2-toy"][name] for name in ("text", "caption", "vqa")}
    assert names("2", "toy") == toy | {"mine": 1} != names("2", "tiny")
    assert names("1", "toy") == names("1")
    (tmp_path / "train" / "caption.jsonl").unlink()
    with pytest.raises(SystemExit, match="stage 1 needs one of caption.jsonl in .*train, which has "
                       "mine, pairs, questions, text, think, vqa"):
        names("1")


def test_files_of_all_kinds_are_known_by_their_names(tmp_path):
    train = tmp_path / "train"
    for name in ("caption.json", "vqa.jsonl.gz", "my.own.json.gz", "notes.txt"):
        write(train / name, [])
    chosen = dict(pretrain.mixture(tmp_path, "2", "8b"))
    weights = pretrain.MIX["2"]
    assert chosen == {
        train / "caption.json": weights["caption"],
        train / "vqa.jsonl.gz": weights["vqa"],
        train / "my.own.json.gz": 1,
    }
    write(train / "caption.jsonl", [])
    with pytest.raises(SystemExit, match="caption.jsonl and caption.json have one name"):
        pretrain.mixture(tmp_path, "2", "8b")
    (train / "caption.jsonl").rename(train / "caption.parquet")
    with pytest.raises(SystemExit, match="caption.parquet and caption.json have one name"):
        pretrain.mixture(tmp_path, "2", "8b")
    (train / "caption.parquet").rename(train / "caption.arrow")
    with pytest.raises(SystemExit, match="caption.arrow: not read"):
        pretrain.mixture(tmp_path, "2", "8b")


# ----------------------------------------------------------------------------------------------
# the stages one after the other


class Stages:
    """main with doubles for training and scoring; `done` is what they were given."""

    def __init__(self, monkeypatch, tmp_path):
        self.out = tmp_path / "runs"
        self.data = tmp_path / "data"
        for name in ("text", "pairs", "caption", "vqa"):
            write(self.data / "train" / f"{name}.jsonl", [talk("Q", "A")])
        self.done = []
        self.failing = None
        self.resumed = []
        monkeypatch.setattr(pretrain, "train_stage", self.train_stage)
        monkeypatch.setattr(pretrain, "score_phase", self.score_phase)
        self.merge = pretrain.merge
        monkeypatch.setattr(pretrain, "merge", self.note_merge)

    def __call__(self, *more, **flags_of_its_own):
        self.done.clear()
        start(*flags(self.out, "--data", self.data, *more), **flags_of_its_own)

    def model(self, stage):
        name = f"pretrain-{stage}" if stage else "pretrain"
        return self.out / "toy" / name / "model"

    def train_stage(self, run, name, before, processor, plan):
        self.done.append((name, before))
        self.resumed.append(run.args.resume)
        if self.failing == name:
            raise RuntimeError("killed")
        shutil.rmtree(run.folder / "model", ignore_errors=True)
        shutil.copytree(before or first_model(), run.folder / "model")
        change(run.folder / "model")

    def score_phase(self, run, heldout, modes, limit, blind=False):
        self.done.append(("score", run.folder.name, heldout, modes, limit, blind))
        if self.failing == "score":
            raise torch.OutOfMemoryError("no memory left")
        return {"plain": {}}

    def note_merge(self, run, parents):
        self.done.append(("merge", parents))
        self.merge(run, parents)

    def names(self):
        return [name for name, *_ in self.done]


@pytest.fixture
def stages(monkeypatch, tmp_path):
    return Stages(monkeypatch, tmp_path)


SCORED = ["1", "score", "2", "score", "3-even", "score", "3-picture", "score", "3-video", "score"]
WHOLE = ["text", "0", *SCORED, "merge", "score"]


def test_each_stage_starts_from_the_one_before_and_the_annealed_ones_from_stage_2(stages):
    stages("--eval-limit", 3)
    assert stages.names() == WHOLE
    before = [call[1] for call in stages.done if call[0] in STAGES]
    of_2 = stages.model("2")
    assert before == [None, *map(stages.model, ["text", "0", "1"]), of_2, of_2, of_2]
    assert ("merge", [stages.model(stage) for stage in STAGES[4:]]) in stages.done
    heldout = stages.data / "heldout"
    assert stages.done[3] == ("score", "pretrain-1", heldout, ["plain"], 3, False)
    assert stages.done[-1] == ("score", "pretrain", heldout, ["plain"], 3, True)
    stages()
    assert stages.done == [], "what is trained and scored is passed over"


def test_a_killed_run_goes_on_with_its_stage(stages):
    stages.failing = "2"
    with pytest.raises(RuntimeError):
        stages()
    stages.failing = None
    stages("--resume")
    assert stages.names() == WHOLE[4:]
    resumed = stages.resumed[-4:]
    assert resumed == [True, False, False, False], "later stages have no checkpoint yet"


def test_some_stages_from_a_given_model(stages):
    stages("--init", first_model(), stage="2,3")
    assert stages.names() == WHOLE[4:]
    assert stages.done[0] == ("2", first_model())
    stages("--init", first_model(), "--fresh", stage="1")
    assert stages.done[0] == ("1", first_model()) and stages.names() == ["1", "score"]


def test_another_init_is_refused_where_a_stage_has_begun(stages, tmp_path):
    init = tmp_path / "init"
    shutil.copytree(first_model(), init)
    stages("--init", init, stage="1")
    with pytest.raises(SystemExit, match="pretrain-1 was made with init .*, not with "):
        stages("--init", first_model(), stage="1")
    change(init)
    with pytest.raises(SystemExit, match="pretrain-1 was made with weights "):
        stages("--init", init, stage="1")
    stages("--init", first_model(), "--fresh", stage="1")
    assert stages.names() == ["1", "score"]


@pytest.mark.parametrize("kind, name", [("init_llm", "llm"), ("init_vit", "vit")])
def test_other_released_weights_are_refused_where_a_stage_has_begun(kind, name, stages, tmp_path):
    shutil.copytree(first_model(), tmp_path / "qwen3")
    stages(stage="0", **{kind: tmp_path / "qwen3"})
    with pytest.raises(SystemExit, match=f"was made with {name} .*qwen3, not with other"):
        stages(stage="0", vocab=tmp_path / "qwen3/vocab.json", **{kind: "other"})


def test_stages_and_merges_of_an_older_model_do_not_count(stages):
    """--fresh, killed in stage 1: what was made of the old one must not be taken for new."""
    stages()
    stages.failing = "1"
    with pytest.raises(RuntimeError):
        stages("--fresh")
    stages.failing = None
    stages()
    assert stages.names() == WHOLE[2:]

    # one of the annealed models alone: the others stay, and there is a new merge
    stages("--fresh", stage="2")
    with pytest.raises(SystemExit, match="pretrain-3-even was made with weights "):
        stages()


def test_a_new_parent_makes_a_new_merge(stages):
    stages()
    shutil.rmtree(stages.model("3-video").parent)
    stages()
    assert stages.names() == ["3-video", "score", "merge", "score"]


def test_a_failing_scorer_undoes_neither_a_stage_nor_the_merge(stages, capsys):
    stages.failing = "score"
    stages(stage="3")
    said = capsys.readouterr().err
    for name in ("3-even", "3-picture", "3-video"):
        assert f"WARNING: pretrain-{name} is trained and saved, but scoring it failed" in said
    assert "WARNING: pretrain is trained and saved" in said and "no memory left" in said
    assert (stages.model(None) / "model.safetensors").exists()
    stages.failing = None
    stages(stage="3")
    assert stages.names() == ["score"] * 4


def test_a_stage_gets_its_mixture_and_the_steps_of_the_plan_or_the_flag(monkeypatch, tmp_path):
    given = []
    for name in ("contrastive", "next_token"):
        monkeypatch.setattr(pretrain, name, lambda run, *args: given.append(args))
    monkeypatch.setattr(pretrain, "mixture", lambda *args: args)
    run = FakeRun(tmp_path)
    run.args = SimpleNamespace(data="d", size="toy", steps=None, init_llm=None, init_vit=None)
    plan = {"steps": {"0": 10, "2": 20, "3": 30}}
    for stage in ("0", "2", "3-video"):
        pretrain.train_stage(run, stage, "before", "processor", plan)
    run.args.steps = 7
    pretrain.train_stage(run, "2", "before", "processor", plan)
    folder = Path("d")
    assert given == [
        ("before", "processor", folder, 10, plan),
        ("2", "before", "processor", (folder, "2", "toy"), 20, plan),
        ("3-video", "before", "processor", (folder, "3-video", "toy"), 30, plan),
        ("2", "before", "processor", (folder, "2", "toy"), 7, plan),
    ]
    assert run.said[0] == "starting from before"


def test_a_failing_scorer_does_not_undo_stage_0(tmp_path, monkeypatch, capsys, short_packs):
    data = pairs(tmp_path / "data", [PICTURE])
    write(data / "heldout" / "caption.jsonl", [])
    sums(data / "heldout" / "q.jsonl", 1)
    monkeypatch.setattr(pretrain, "check_heldout", lambda folder, limit: None)
    start(*flags(tmp_path, "--data", data, "--steps", 1), stage="0")
    assert "WARNING: pretrain-0 is trained and saved" in capsys.readouterr().err
    assert (tmp_path / "toy/pretrain-0/done.json").exists()
    assert (tmp_path / "toy/pretrain-0/model/model.safetensors").exists()


# ----------------------------------------------------------------------------------------------
# bad input is one line, and said before anything is trained


def said_by(tmp_path, *words) -> str:
    """What pretrain.py says of this input in one line, which ends it before any step."""
    said = run_script("pretrain.py", *flags(tmp_path / "out", *words), code=1)
    assert "Traceback" not in said and "step/s" not in said
    return said


def test_an_empty_file_of_a_later_stage_is_said_at_once(tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(world(), folder)
    (folder / "train" / "pairs.jsonl").write_text("")
    said = said_by(tmp_path, "--data", folder, "--stage", "text,0", "--steps", 1)
    assert said.strip().endswith(f"{folder / 'train' / 'pairs.jsonl'}: no lines")


def test_a_folder_that_holds_no_model_is_one_line(tmp_path):
    said = said_by(tmp_path, "--data", world(), "--init", ROOT / "README.md", "--stage", 1)
    assert "README.md holds no model" in said.strip().splitlines()[-1]
