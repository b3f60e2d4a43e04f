"""pretrain.py as users start it: all stages, errors, kill -9, two ranks; its loss, tokenizer, first weights and mixtures."""
import json, multiprocessing, os, re, runpy, shutil, string, subprocess, sys, time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

import pretrain
import trainer
from data import BUDGETS, Loader, Processor, pack
from model import PRESETS, KeyeVL
from toyworld import make_world

ROOT = Path(__file__).resolve().parent.parent
PLAN = pretrain.PLAN["toy"]
STAGES = ["text", "0", "1", "2", "3-even", "3-picture", "3-video"]

# pretrain.py with two packs a step, as two ranks need. Two ranks give stage 0 more negatives than one process with two
# micro-batches has; to compare, one process gets both packs as one.
TWO_PACKS = '''
import os, runpy, sys, torch
import data, trainer
add, each = trainer.arguments, data.Loader.__iter__
def arguments(parser):  # when the script asks for it, its PLAN is there
    sys.modules["__main__"].PLAN["toy"].update(pack=2048, packs=2)
    return add(parser)
def joined(loader):
    for packs, info in each(loader):
        lengths = torch.cat([p["segments"].diff() for p in packs])
        whole = {k: torch.cat([p[k] for p in packs]) for k in ("tokens", "labels", "patches", "grids")}
        yield [whole | {"segments": torch.nn.functional.pad(lengths.cumsum(0), (1, 0))}], info
trainer.arguments = arguments
if "RANK" not in os.environ and sys.argv[sys.argv.index("--stage") + 1] == "0":
    data.Loader.__iter__ = joined
runpy.run_path("pretrain.py", run_name="__main__")
'''


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("pretrain") / "world"
    make_world(out, pictures=60, clips=12, heldout=5, workers=1, progress=False)
    return out


def flags(out, world, *more):
    few = ("--eval-limit", 1, "--device", "cpu", "--threads", 1)
    return [str(x) for x in ("--size", "toy", "--data", world, "--out", out, *few, *more)]


def shell(*command):
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=120,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def server():
    """Forks children that have torch imported, which saves seconds each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(["pretrain"])
        yield server


def end(*processes):
    for p in processes:
        p.join(100)
        p.kill()  # only matters when it hangs
        p.join()
    return [p.exitcode for p in processes]


def in_child(script, argv, log):
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.chdir(ROOT)
    sys.argv = [str(script), *argv]
    runpy.run_path(str(script), run_name="__main__")


@pytest.fixture
def child(server, tmp_path):
    """child(flags, code=0) runs pretrain.py to its end and returns what it said; with code None, returns while it runs."""
    def go(argv, code=0, script=ROOT / "pretrain.py"):
        (log := tmp_path / "log").write_text("")
        process = server.Process(target=in_child, args=(script, argv, log))
        process.start()
        if code is None:
            return process
        assert end(process) == [code], log.read_text()[-4000:]
        return log.read_text()
    return go


def curve(out, stage, *keys):
    lines = [json.loads(line) for line in (out / f"toy/pretrain-{stage}/metrics.jsonl").read_text().splitlines()]
    return [tuple(line[k] for k in ("step", *keys)) for line in lines]


def weights(out, name):
    return load_file(out / "toy" / name / "model/model.safetensors")


@pytest.fixture(scope="session")
def whole(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    shell("pretrain.py", *flags(out, world, "--steps", 2, "--workers", 0))
    return out


def test_every_stage_leaves_model_metrics_and_score(whole):
    assert {p.name for p in (whole / "toy").iterdir()} == {"pretrain", *(f"pretrain-{s}" for s in STAGES)}
    for stage in STAGES:
        assert [step for step, tokens in curve(whole, stage, "tokens") if tokens > 0] == [0, 1], stage
    for folder in (whole / "toy").iterdir():
        KeyeVL.from_pretrained(folder / "model")
        Processor.from_pretrained(folder / "model")
        score = json.loads((folder / "score.json").read_text())
        keys = {"pretrain-text": set(), "pretrain-0": {"accuracy", "n", "among"}}.get(folder.name, {"headline", "tasks"})
        assert keys <= set(score or ()), folder


@pytest.mark.parametrize("before, after, parts", [
    ("text", "0", {"visual"}), ("0", "1", {"mlp_AR"}), ("1", "2", {"visual", "mlp_AR", "model"}),
    *(("2", stage, {"visual", "mlp_AR", "model"}) for stage in STAGES[4:])])
def test_stage_changes_its_parts_only(before, after, parts, whole):
    a, b = weights(whole, f"pretrain-{before}"), weights(whole, f"pretrain-{after}")
    assert {k.split(".")[0] for k in a if not torch.equal(a[k], b[k])} == parts


def test_merged_model_is_the_mean_of_its_parents(whole):
    merged, parents = weights(whole, "pretrain"), [weights(whole, f"pretrain-{s}") for s in STAGES[4:]]
    for k, t in merged.items():
        mean = (sum(p.pop(k).double() for p in parents) / 3).float()
        assert t.dtype == torch.float32
        torch.testing.assert_close(t, mean, atol=1e-8, rtol=1e-6, msg=k)
    assert parents == [{}] * 3


def test_finished_stages_are_passed_over(whole, world):
    files = lambda: {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in whole.rglob("*") if p.is_file()}
    before = files()
    said = shell("pretrain.py", *flags(whole, world, "--steps", 2, "--workers", 0))
    assert said.count("is done") == len(STAGES) and str(whole / "toy/pretrain/model") in said
    assert files() == before


def test_unknown_stage_is_named(child, world, tmp_path):
    assert "'4' is none of text, 0, 1, 2, 3" in child(flags(tmp_path / "out", world, "--stage", "0,4"), code=1)


def test_missing_data_says_which_file_and_how_to_get_one(child, tmp_path):
    said = child(flags(tmp_path / "out", tmp_path / "none"), code=1)
    assert f"text.jsonl in {tmp_path / 'none/train'}" in said and f"python toyworld.py --out {tmp_path / 'none'}" in said
    assert "Traceback" not in said


def test_malformed_line_is_named(child, world, tmp_path):
    (tmp_path / "data/train").mkdir(parents=True)
    lines = (world / "train/text.jsonl").read_text().splitlines()
    (tmp_path / "data/train/text.jsonl").write_text("\n".join([*lines[:4], '{"messages": [', *lines[4:6]]))
    assert "train/text.jsonl:5: " in child(flags(tmp_path / "out", tmp_path / "data", "--stage", "text"), code=1)


@pytest.mark.parametrize("stage", ["0", "2"])
def test_kill_9_gives_the_same_curve(stage, child, world, tmp_path):
    one, cut = ((tmp_path / x, flags(tmp_path / x, world, "--stage", stage, "--steps", 6, "--save-every", 2)) for x in "ab")
    child(one[1])
    killed, metrics = child(cut[1], code=None), cut[0] / f"toy/pretrain-{stage}/metrics.jsonl"
    while killed.is_alive() and not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        time.sleep(0.003)
    killed.kill()
    assert end(killed) == [-9]
    assert "resumed from" in child(cut[1])
    a, b = (curve(x, stage, "loss", "norm", "lr", "tokens", "visual_tokens") for x, _ in (one, cut))
    assert a == b and [row[0] for row in a] == list(range(6))
    a, b = (x / f"toy/pretrain-{stage}/model/model.safetensors" for x, _ in (one, cut))
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize("stage", ["0", "2"])
def test_two_ranks_equal_one(stage, child, world, tmp_path):
    (script := tmp_path / "two_packs.py").write_text(TWO_PACKS)
    one, two = (flags(tmp_path / x, world, "--stage", stage, "--steps", 3, "--workers", 0) for x in ("one", "two"))
    child(one, script=script)
    shell("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script), *two)
    one, two = (curve(tmp_path / x, stage, "loss", "norm", "tokens", "visual_tokens") for x in ("one", "two"))
    assert len(one) == 3
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_torchrun_as_in_the_readme(world, tmp_path):
    """The toy's one pack a step becomes two smaller ones."""
    ranks = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "pretrain.py")
    shell(*ranks, *flags(tmp_path, world, "--stage", "1", "--steps", 1, "--workers", 0))
    ((_, tokens),) = curve(tmp_path, "1", "tokens")
    assert PLAN["pack"] // 2 < tokens <= PLAN["pack"]
    assert trainer.share({"pack": 4096, "packs": 1}, 3) == (1365, 3) and trainer.share({"pack": 8192, "packs": 64}, 8) == (8192, 64)


def vectors(n):
    """Images and captions (n, 8) of length 1, scale and bias: float64 leaves."""
    g = torch.Generator().manual_seed(0)
    images, texts = F.normalize(torch.randn(2, n, 8, generator=g, dtype=torch.float64), dim=-1).unbind()
    return [t.clone().requires_grad_() for t in (images, texts, torch.tensor([3.0]).double(), torch.tensor([-2.0]).double())]


def equation_1(n):
    """arXiv 2303.15343, eq. 1, times |B|: the loss and its four gradients."""
    images, texts, t, b = leaves = vectors(n)
    loss = 0
    for i in range(n):
        for j in range(n):
            z = 1 if i == j else -1
            loss = loss - torch.log(1 / (1 + torch.exp(z * (-t * images[i] @ texts[j] - b))))
    loss.sum().backward()
    return [loss.detach().sum(), *(x.grad for x in leaves)]


def in_ring(rank, sizes, folder):
    world, own = len(sizes), slice(sum(sizes[:rank]), sum(sizes[:rank + 1]))
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    images, texts, scale, bias = leaves = vectors(sum(sizes))
    loss = pretrain.sigmoid_loss(images[own], texts[own], scale, bias, max(sizes) + (world == 1), world)
    loss.backward()
    torch.save([loss.detach(), *(x.grad for x in leaves)], folder / f"{rank}.pt")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


@pytest.mark.parametrize("sizes", [[5], [1, 4], [3, 1, 2], [2, 0, 3]], ids=str)
def test_sigmoid_loss_on_a_ring_is_equation_1(sizes, server, tmp_path):
    """Summed over ranks with unequally many pairs, loss and gradients are those of all pairs in one place."""
    ranks = [server.Process(target=in_ring, args=(r, sizes, tmp_path)) for r in range(len(sizes))]
    for process in ranks:
        process.start()
    assert end(*ranks) == [0] * len(sizes)
    got = [sum(parts) for parts in zip(*(torch.load(tmp_path / f"{r}.pt") for r in range(len(sizes))))]
    for a, b in zip(got, equation_1(sum(sizes)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)


def test_captions_are_the_answers_of_the_pack(world):
    path, processor, texts = world / "train/pairs.jsonl", Processor(ROOT / "vocab-toy.json", **BUDGETS["toy"]), []
    (batch,), _ = next(iter(Loader([(path, 1)], processor, 1024, 1)))
    pretrain.captions(batch, 64, 7, lambda text: texts.append(text) or [0], processor.tokenizer.decode)
    answers = {json.loads(line)["messages"][1]["content"] for line in path.read_text().splitlines()}
    assert len(texts) == len(batch["grids"]) > 3 and set(texts) <= answers
    for row, text in zip(pretrain.captions(batch, 20, 7).tolist(), texts, strict=True):
        ids = processor.tokenizer.encode(text) + [processor.tokenizer.special["<|im_end|>"]]
        assert row == (ids + [7] * 20)[:20]


def test_perfect_vectors_find_every_caption(world):
    path, processor = world / "heldout/caption.jsonl", Processor(ROOT / "vocab-toy.json", **BUDGETS["toy"])

    def encode(batch):
        rows = F.one_hot(pretrain.captions(batch, 64, 7), 1024).sum(1).float()  # equal captions, equal vectors
        return F.normalize(rows, dim=-1), F.normalize(rows, dim=-1), None, None
    run = trainer.Run.__new__(trainer.Run)
    assert pretrain.retrieval(encode, Loader([(path, 1)], processor, 1024, 1), run)["accuracy"] == 1


@pytest.fixture(scope="session")
def unigram(tmp_path_factory):
    """A Unigram tokenizer as SigLIP's: its special ids, lower case, ASCII punctuation dropped."""
    from tokenizers import Regex, Tokenizer, models, normalizers as n, pre_tokenizers, trainers
    theirs, path = Tokenizer(models.Unigram()), tmp_path_factory.mktemp("unigram") / "tokenizer.json"
    punctuation = Regex("[" + "".join("\\" + c for c in string.punctuation) + "]")
    theirs.normalizer = n.Sequence([n.Lowercase(), n.Replace(punctuation, ""), n.Replace(Regex(r"\s+"), " "), n.Strip()])
    theirs.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    theirs.train_from_iterator((ROOT / "toyworld.py").read_text().splitlines(), trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False))
    theirs.save(str(path))
    return theirs, path


@pytest.mark.parametrize("text", [
    "a red circle", "Two RED Circles, one (blue) square!", "it's snake_case & 50% of #7", "  tabs\tand\n\nlines ",
    "naïve café", "½ of µ", "日 本", "a long caption of the red circle " * 9,
    "word 日本語 word", "a “quoted” word", "5€ or 5°", "?!"], ids=ascii)
def test_unigram_equals_the_tokenizers_library(text, unigram):
    theirs, path = unigram
    assert pretrain.Unigram(path, 64)(text) == (theirs.encode(text).ids[:63] + [1] * 64)[:64]


def saved(theirs, folder):
    torch.manual_seed(5)
    for p in theirs.parameters():
        torch.nn.init.normal_(p.data, std=0.1)
    theirs.save_pretrained(folder)
    return theirs.state_dict()


def qwen3(folder, **other):
    from transformers import Qwen3Config, Qwen3ForCausalLM
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "tie_word_embeddings")
    return saved(Qwen3ForCausalLM(Qwen3Config(**{k: getattr(PRESETS["toy"], k) for k in same} | other)), folder)


def siglip(folder, tokenizer):
    from transformers import SiglipConfig, SiglipModel
    v = PRESETS["toy"].vision
    sizes = {k: getattr(v, k) for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    state = saved(SiglipModel(SiglipConfig(text_config=sizes | {"vocab_size": 400, "max_position_embeddings": 24},
                                           vision_config=sizes | {"image_size": v.image_size, "patch_size": 14})), folder)
    shutil.copy(tokenizer, folder)
    return state


class Begun(Exception):
    pass


@pytest.fixture
def begun(world, tmp_path, monkeypatch):
    """begun(*flags): the weights that pretrain.py is about to train."""
    def shard(model, run):
        run.close()  # pytest keeps its signals
        raise Begun(dict(model.state_dict()))

    def go(*more):
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *flags(tmp_path / "out", world, *more)])
        with pytest.raises(Begun) as caught:
            runpy.run_path("pretrain.py", run_name="__main__")
        return caught.value.args[0]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(trainer, "shard", shard)
    yield go
    torch.use_deterministic_algorithms(False)


def official(name):
    name = re.sub(r"^decoder", "model", re.sub(r"^(vit|text)\b", r"\1_model", name).replace("vit_", "vision_"))
    name = re.sub(r"^(vision|text)_model\.layers", r"\1_model.encoder.layers", name)
    return re.sub(r"^(vision|text)_model\.(\w+_embedding)\b", r"\1_model.embeddings.\2", name)


def test_released_weights_get_to_their_places(begun, unigram, tmp_path):
    """All of Qwen3's and SigLIP's; in stage 0 with the pooling head, the text tower, scale and bias."""
    theirs = qwen3(tmp_path / "qwen3") | siglip(tmp_path / "siglip", unigram[1])
    given = ("--init-llm", tmp_path / "qwen3", "--init-vit", tmp_path / "siglip")
    whole, stage_0, fresh = begun("--stage", "1", *given), begun("--stage", "0", *given), begun("--stage", "1")
    assert {"vit.head.probe", "text.head.bias", "logit_scale", "logit_bias"} <= set(stage_0)
    assert not any(k.startswith("vit.head") for k in whole)
    for name, t in (whole | stage_0).items():
        want = fresh[name] if name.startswith("projector") else theirs[official(name)]
        assert torch.equal(t.flatten(), want.flatten()), name  # SigLIP's patch embedding is a convolution
        assert name not in whole or torch.equal(t, whole[name]), name


def test_qwen3_of_another_width_is_refused(child, world, tmp_path):
    qwen3(tmp_path / "qwen3", hidden_size=128)
    said = child(flags(tmp_path / "out", world, "--init-llm", tmp_path / "qwen3"), code=1)
    assert f"hidden_size is 128, but --size toy has {PRESETS['toy'].hidden_size}" in said and "Traceback" not in said


@pytest.mark.parametrize("turns", [1, 3])
def test_a_pair_without_its_one_picture_is_an_error(turns, world):
    """Or every later caption of the pack would belong to another picture."""
    processor, picture = Processor(ROOT / "vocab-toy.json", **BUDGETS["toy"]), {"type": "image", "image": "x.png"}
    (world / "train/x.png").exists() or Image.new("RGB", (56, 56)).save(world / "train/x.png")
    pairs = [{"messages": [{"role": "user", "content": [picture] * n + [{"type": "text", "text": "What?"}]},
                           {"role": "assistant", "content": "It."}]} for n in (turns - 1, 1)]
    batch = pack([processor(c, world / "train") for c in pairs])
    with pytest.raises(ValueError, match=f"one picture in every sample, but a pack of 2 has {turns} "):
        pretrain.captions(batch, 64, 7)


def test_a_stage_starts_from_what_the_one_before_left(whole, world, child, tmp_path):
    shutil.copytree(whole / "toy/pretrain-1/model", tmp_path / "toy/pretrain-1/model")
    said = child(flags(tmp_path, world, "--stage", "2", "--steps", 1, "--workers", 0))
    assert f"starting from {tmp_path / 'toy/pretrain-1/model'}" in said
    again = child(flags(tmp_path, world, "--stage", "2", "--steps", 1, "--workers", 0, "--fresh",
                        "--init", whole / "toy/pretrain-1/model"))
    assert f"starting from {whole / 'toy/pretrain-1/model'}" in again


def test_mixture(tmp_path):
    """Known names have the weight of their stage; others count 1 from stage 2 on and nothing before."""
    (tmp_path / "train").mkdir()
    for name in ("text", "pairs", "caption", "vqa", "mine"):
        (tmp_path / f"train/{name}.jsonl").touch()
    got = {s: {p.stem: w for p, w in pretrain.mixture(tmp_path, s)} for s in pretrain.MIX}
    assert [set(got[s]) for s in ("text", "0", "1")] == [{"text"}, {"pairs"}, {"caption"}]
    for stage in ("2", *STAGES[4:]):
        assert got[stage] == {n: pretrain.MIX[stage][n] for n in ("text", "caption", "vqa")} | {"mine": 1}, stage
    (tmp_path / "train/caption.jsonl").unlink()
    with pytest.raises(SystemExit, match="stage 1 needs one of caption.jsonl in .*train, which has mine, pairs, text, vqa"):
        pretrain.mixture(tmp_path, "1")
