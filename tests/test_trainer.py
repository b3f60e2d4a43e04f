"""trainer.py: ranks, accumulation, checkpoints, resume and metrics, on a small model with the surface of KeyeVL."""
import argparse, errno, json, multiprocessing, os, shutil, signal, socket, subprocess, sys, types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import trainer

ROOT = Path(__file__).resolve().parent.parent

# The child that most tests start: a small model and a visible loop, like a stage script's.
SCRIPT = '''
import argparse, os, signal, sys, types
import torch, torch.nn.functional as F
from torch import nn
from safetensors.torch import save_file
import trainer

class Block(nn.Module):
    def __init__(self, c, drop):
        super().__init__()
        self.norm, self.mlp, self.drop = nn.LayerNorm(c), nn.Linear(c, c), drop
    def forward(self, x):
        return x + F.dropout(F.gelu(self.mlp(self.norm(x))), self.drop)

class Part(nn.Module):
    def __init__(self, c, drop):
        super().__init__()
        self.layers = nn.ModuleList(Block(c, drop) for _ in range(2))
    def forward(self, x):
        for block in self.layers:
            x = block(x)
        return x

class Tiny(nn.Module):
    def __init__(self, drop=0.0, c=16, vocab=32):
        super().__init__()
        self.config = {"c": c}
        self.vit, self.decoder = Part(c, drop), Part(c, drop)
        self.projector, self.lm_head = nn.Linear(c, c), nn.Linear(c, vocab, bias=False)
        self.decoder.embed_tokens, self.decoder.norm = nn.Embedding(vocab, c), nn.LayerNorm(c)
    def logits(self, batch):
        seen = self.projector(self.vit(batch["patches"].float() / 127.5 - 1))  # (N, C)
        x = self.decoder.embed_tokens(batch["tokens"])
        x = torch.cat([x[:len(seen)] + seen, x[len(seen):]])  # no pictures: zero rows
        return self.lm_head(self.decoder.norm(self.decoder(x)))
    def loss(self, batch):
        labels = batch["labels"]
        logits = Tiny.logits(self, batch).float()
        return F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"), int((labels != -100).sum())

def pack(step, i):  # pack i of a step, the same for any number of ranks; 2 has no label, 3 no picture; lengths differ
    g = torch.Generator().manual_seed(100 * step + i)
    t = 8 + 5 * i
    labels = torch.randint(32, (t,), generator=g)
    labels[:3 * i] = -100
    if i == 2:
        labels[:] = -100
    n = 0 if i == 3 else 4
    return {"tokens": torch.randint(32, (t,), generator=g), "labels": labels,
            "segments": torch.tensor([0, t], dtype=torch.int32), "grids": torch.tensor([[1, 2, 2]]),
            "patches": torch.randint(256, (n, 16), generator=g, dtype=torch.uint8)}

def main():
    p = trainer.arguments(argparse.ArgumentParser())
    p.add_argument("--packs", type=int, default=5)  # odd: two ranks get three and two micro-batches
    p.add_argument("--drop", type=float, default=0.0)
    p.add_argument("--kill", type=int, default=-1)
    p.add_argument("--kill-in-save", type=int, default=-1)
    p.add_argument("--signal", type=int, default=-1)
    args = p.parse_args()
    run = trainer.start(args, stage="2")
    model = trainer.shard(Tiny(args.drop), run)
    opt = trainer.adamw(model, {"vit": 1e-2, "projector": 1e-2, "decoder": 1e-2})
    begin = trainer.resume(run, model, opt)
    write = trainer.dcp.save
    def killed(*a, **k):
        write(*a, **k)
        if steps_done == args.kill_in_save:
            os.kill(os.getpid(), signal.SIGKILL)
    trainer.dcp.save = killed
    for step in range(begin["step"], args.steps):
        assert begin["loader"] is None or step > begin["step"] or begin["loader"] == {"next": step}
        trainer.set_lr(opt, trainer.schedule(step, args.steps, 2))
        batches = [pack(step, i) for i in range(args.packs)][run.rank::run.world]
        loss, n = trainer.accumulate(run, model, batches)
        norm = trainer.clip(model, 1.0)
        opt.step(); opt.zero_grad(set_to_none=True)
        if step == args.signal and run.main:
            os.kill(os.getpid(), signal.SIGTERM)
        run.log(step, args.steps, loss=loss, norm=norm, n=n, lr=trainer.lr(opt),
                tokens=sum(len(b["tokens"]) for b in batches))
        if step == args.kill:
            with open(run.folder / "metrics.jsonl", "a") as f:
                f.write('{"step": ')
            os.kill(os.getpid(), signal.SIGKILL)
        steps_done = step + 1
        trainer.save_if_due(run, step + 1, args.steps, model, opt, {"next": step + 1})
    sys.modules["model"] = types.SimpleNamespace(save_weights=lambda sd, config, f: save_file(sd, f / "w.safetensors"))
    processor = types.SimpleNamespace(save_pretrained=lambda f: (f / "vocab.json").write_text("{}"))
    trainer.export(run, trainer.full_state(run, model), None, processor, run.folder / "model")
    run.close()

if __name__ == "__main__":
    main()
'''


@pytest.fixture(scope="session")
def child(tmp_path_factory):
    """child(out, *flags, ranks=1) runs SCRIPT to its end in fresh processes and returns what they said. torchrun=True
    starts them as users do; else they are forked from a server that has torch imported, which saves seconds each."""
    script = tmp_path_factory.mktemp("child") / "stage.py"
    script.write_text(SCRIPT)
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(script.parent)
    patch.setenv("PYTHONPATH", f"{ROOT}:{script.parent}")
    patch.setenv("OMP_NUM_THREADS", "1")
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["stage"])

    def go(out, *flags, ranks=1, code=0, torchrun=False):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        argv = ["--out", str(out), "--device", "cpu", *map(str, flags)]
        if torchrun:
            launch = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={port}"]
            done = subprocess.run([sys.executable, *launch, script, *argv], capture_output=True, text=True, timeout=120)
            assert done.returncode == code, done.stderr[-4000:]
            return done.stderr
        log = tmp_path_factory.mktemp("log") / "stderr"
        ranks_env = [{"RANK": i, "LOCAL_RANK": i, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks,
                      "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if ranks > 1 else {} for i in range(ranks)]
        children = [server.Process(target=in_child, args=(argv, env, str(log))) for env in ranks_env]
        for c in children:
            c.start()
        for c in children:
            c.join(100)
            c.kill()  # only matters when it hangs
            c.join()
        assert [c.exitcode for c in children] == [code] * ranks, log.read_text()[-4000:]
        return log.read_text()
    yield go
    patch.undo()


def in_child(argv, env, log):
    import stage
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.environ.update({k: str(v) for k, v in env.items()})
    sys.argv[1:] = argv
    stage.main()


@pytest.fixture(scope="session")
def one(child, tmp_path_factory):
    """The run everything is compared with: one process, six steps, checkpoints after 3 and 6."""
    out = tmp_path_factory.mktemp("one")
    child(out, "--steps", 6, "--save-every", 3)
    return out


@pytest.fixture(scope="session")
def two(child, tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    child(out, "--steps", 6, "--save-every", 3, ranks=2, torchrun=True)
    return out


@pytest.fixture
def stage(child):
    """The child's module, for tests inside this process."""
    import stage
    yield stage
    torch.use_deterministic_algorithms(False)


def begin(stage, out, *flags, groups={"vit": 1e-2, "projector": 1e-2, "decoder": 1e-2}):
    args = trainer.arguments(argparse.ArgumentParser()).parse_args(
        ["--out", str(out), "--device", "cpu", "--threads", "1", *flags])
    run = trainer.start(args, "2")
    run.close()  # pytest keeps its signals
    model = trainer.shard(stage.Tiny(), run)
    return run, model, trainer.adamw(model, groups)


def curve(out, *keys):
    lines = [json.loads(line) for line in (out / "toy/2/metrics.jsonl").read_text().splitlines()]
    return [tuple(line[k] for k in ("step", *keys)) for line in lines]


def close(a, b, *keys, tol=1e-5):
    for x, y in zip(curve(a, *keys), curve(b, *keys), strict=True):
        assert x == pytest.approx(y, abs=tol, rel=tol)


def weights(out):
    return load_file(out / "toy/2/model/w.safetensors")


def names(out):
    return sorted(p.name for p in (out / "toy/2/checkpoint").iterdir())


def test_two_ranks_equal_one(one, two):
    close(one, two, "loss", "norm", "n", "tokens")
    assert curve(one, "loss")[0][1] - curve(one, "loss")[-1][1] > 0  # it does learn
    for (k, a), b in zip(weights(one).items(), weights(two).values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4, msg=k)


def test_bf16_on_two_ranks_follows_one_process(child, tmp_path):
    child(tmp_path / "a", "--steps", 3, "--dtype", "bf16")
    child(tmp_path / "b", "--steps", 3, "--dtype", "bf16", ranks=2)
    close(tmp_path / "a", tmp_path / "b", "loss", tol=1e-3)
    assert all(t.dtype == torch.float32 for t in weights(tmp_path / "b").values())


@pytest.mark.parametrize("ranks", [1, 2])
def test_resume_on_another_number_of_ranks(ranks, child, one, two, tmp_path):
    saved = one if ranks == 2 else two
    shutil.copytree(saved, tmp_path / "r")
    shutil.rmtree(tmp_path / "r/toy/2/checkpoint/step-6")
    assert "resumed" in child(tmp_path / "r", "--steps", 6, "--save-every", 3, ranks=ranks)
    close(saved, tmp_path / "r", "loss", "norm")
    assert curve(saved, "loss")[:3] == curve(tmp_path / "r", "loss")[:3]  # kept, not run again


def test_two_rank_checkpoint_is_bit_equal_in_one_process(two, stage, tmp_path):
    shutil.copytree(two, tmp_path / "r")
    run, model, opt = begin(stage, tmp_path / "r")
    state = trainer.resume(run, model, opt)
    assert state["step"] == 6 and state["loader"] == {"next": 6} and state["meters"]["tokens"] > 0
    for name, t in weights(two).items():
        assert torch.equal(model.state_dict()[name], t), name
    assert all(opt.state[p]["step"] == 6 and opt.state[p]["exp_avg_sq"].any() for p in model.parameters())


def test_accumulation_changes_nothing(stage, tmp_path):
    grads = []
    for split in (False, True):
        torch.manual_seed(0)
        run, model, _ = begin(stage, tmp_path)
        packs = [stage.pack(0, i) for i in (0, 1, 2, 4)]
        for b in packs:
            b["patches"] = b["patches"][:0]  # Tiny adds patch i to token i, which joining would move
        joined = [{k: torch.cat([b[k] for b in packs]) for k in ("tokens", "labels", "patches")}]
        loss, n = trainer.accumulate(run, model, packs if split else joined)
        assert n == sum(int((b["labels"] != -100).sum()) for b in packs)
        grads.append([loss, *[p.grad for p in model.parameters() if p.grad is not None]])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_step_without_any_label_is_an_error(stage, tmp_path):
    run, model, _ = begin(stage, tmp_path)
    with pytest.raises(ValueError, match="nothing to learn"):
        trainer.accumulate(run, model, [stage.pack(0, 2)])


def test_kill_9_gives_the_same_curve(child, tmp_path):
    flags = ["--steps", 7, "--save-every", 2, "--drop", 0.2, "--packs", 3]
    child(tmp_path / "whole", *flags)
    child(tmp_path / "cut", *flags, "--kill", 4, code=-signal.SIGKILL)  # one step after a checkpoint
    child(tmp_path / "cut", *flags, "--kill-in-save", 6, code=-signal.SIGKILL)
    assert "step-6.tmp" in names(tmp_path / "cut")
    child(tmp_path / "cut", *flags)
    whole = curve(tmp_path / "whole", "loss", "norm", "n", "lr", "tokens")
    assert [row[0] for row in whole] == list(range(7))
    assert whole == curve(tmp_path / "cut", "loss", "norm", "n", "lr", "tokens")
    for a, b in zip(weights(tmp_path / "whole").values(), weights(tmp_path / "cut").values(), strict=True):
        assert torch.equal(a, b)
    assert names(tmp_path / "cut") == ["step-6", "step-7"]


def test_sigterm_saves_and_says_how_to_go_on(child, tmp_path):
    said = child(tmp_path, "--steps", 5, "--signal", 2, code=128 + signal.SIGTERM)
    assert names(tmp_path) == ["step-3"] and "same command goes on" in said
    child(tmp_path, "--steps", 5)
    assert [row[0] for row in curve(tmp_path)] == list(range(5))


@pytest.mark.parametrize("how", ["flip", "cut", "gone"])
def test_damage_is_found_and_the_older_checkpoint_taken(how, one, stage, tmp_path, capfd):
    shutil.copytree(one, tmp_path / "r")
    path = next((tmp_path / "r/toy/2/checkpoint/step-6").glob("*.distcp"))
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data if how == "flip" else data[:len(data) // 2])
    if how == "gone":
        path.unlink()
    run, model, opt = begin(stage, tmp_path / "r")
    assert trainer.resume(run, model, opt)["step"] == 3
    assert "WARNING" in (said := capfd.readouterr().err) and path.name in said
    assert names(tmp_path / "r") == ["damaged-step-6", "step-3"]
    (tmp_path / "r/toy/2/checkpoint/step-3/state.json").write_text("{}")
    with pytest.raises(RuntimeError, match="every checkpoint .* is damaged; --fresh"):
        trainer.resume(run, model, opt)


def test_full_disk_keeps_the_checkpoint_before(stage, tmp_path, monkeypatch):
    run, model, opt = begin(stage, tmp_path)
    trainer.save(run, 1, model, opt, {"next": 1})

    def full(state, checkpoint_id):
        (checkpoint_id / "__0_0.distcp").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(trainer.dcp, "save", full)
    with pytest.raises(RuntimeError, match="step-2 .*stays valid.*No space left"):
        trainer.save(run, 2, model, opt, {"next": 2})
    assert names(tmp_path) == ["step-1"]
    assert trainer.resume(run, model, opt)["loader"] == {"next": 1}


def test_full_disk_for_real(child, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "none", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:  # a checkpoint is 220 kB here: the first two fit, the third does not
        said = child(disk, "--steps", 3, "--save-every", 1, code=1)
        assert "step-3 (the checkpoint before it stays valid)" in said
        assert names(disk) == ["step-1", "step-2"]
        shutil.rmtree(disk / "toy/2/checkpoint/step-1")
        child(disk, "--steps", 3)  # room again: the same command goes on
        assert [row[0] for row in curve(disk)] == [0, 1, 2]
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_checkpoint_of_another_model_is_refused_not_skipped(one, stage, tmp_path, monkeypatch):
    shutil.copytree(one, tmp_path / "r")
    run, model, opt = begin(stage, tmp_path / "r", groups={"projector": 1e-2})
    with pytest.raises(RuntimeError, match="other trained parts, e.g. optim.decoder"):
        trainer.resume(run, model, opt)
    monkeypatch.setattr(stage.Tiny.__init__, "__defaults__", (0.0, 16, 40))  # a larger vocabulary
    run, model, opt = begin(stage, tmp_path / "r")
    with pytest.raises(RuntimeError, match="embed_tokens"):
        trainer.resume(run, model, opt)


def test_fresh_and_resume_flags(one, stage, tmp_path):
    shutil.copytree(one, tmp_path / "r")
    run, model, opt = begin(stage, tmp_path / "r", "--fresh")
    assert trainer.resume(run, model, opt)["step"] == 0 and not (run.folder / "metrics.jsonl").exists()
    with pytest.raises(SystemExit, match="no checkpoint"):
        trainer.resume(*begin(stage, tmp_path / "r", "--resume"))


def test_groups_and_weight_decay(stage):
    model = stage.Tiny()
    opt = trainer.adamw(model, {"projector": 1e-3, "decoder": 1e-4, "decoder.norm": 5e-4, "vit": 0}, weight_decay=0.1)
    name = {id(p): n for n, p in model.named_parameters()}
    got = {name[id(p)]: (g["base_lr"], g["weight_decay"]) for g in opt.param_groups for p in g["params"]}
    assert got["projector.weight"] == (1e-3, 0.1) and got["projector.bias"] == (1e-3, 0.0)
    assert got["lm_head.weight"] == (1e-4, 0.1) and got["decoder.embed_tokens.weight"] == (1e-4, 0.0)
    assert got["decoder.layers.0.norm.weight"] == (1e-4, 0.0) and got["decoder.norm.weight"] == (5e-4, 0.0)
    assert not any(k.startswith("vit") for k in got) and not any(p.requires_grad for p in model.vit.parameters())
    trainer.set_lr(opt, 0.5)
    assert trainer.lr(opt) == 5e-4
    with pytest.raises(ValueError, match="projektor"):
        trainer.adamw(model, {"projektor": 1e-3})


@pytest.mark.parametrize("shape", [(48, 96), (96, 48), (33, 33)], ids=str)
def test_orthogonal_has_the_singular_vectors_and_values_near_one(shape):
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    got = trainer.orthogonal(x)
    values = torch.einsum("bmr,bmn,brn->br", u, got, vh)
    torch.testing.assert_close(got, u @ torch.diag_embed(values) @ vh, atol=1e-4, rtol=0)
    kept = s > 0.02 * s[:, :1]  # five steps lift the rest only part of the way
    assert values[kept].min() > 0.6 and values.max() < 1.3


def test_muon_equals_torchs(stage):
    """Matrices but lm_head as torch.optim.Muon (which iterates in bf16: hence 2 %), the rest as AdamW."""
    ours, theirs = stage.Tiny(), stage.Tiny()
    theirs.load_state_dict(ours.state_dict())
    rates = {"projector": 1e-2, "decoder": 1e-2, "vit": 1e-2}
    opt = trainer.adamw(ours, rates, weight_decay=0.1, muon=3)
    by_muon = {n for n, p in ours.named_parameters() if "momentum" in opt.state[p]}
    assert "projector.weight" in by_muon and not by_muon & {"lm_head.weight", "decoder.embed_tokens.weight", "projector.bias"}
    split = [[p for n, p in theirs.named_parameters() if (n in by_muon) == yes] for yes in (True, False)]
    muon = torch.optim.Muon(split[0], lr=3e-2, weight_decay=0.1, momentum=trainer.MOMENTUM, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([{"params": [p], "weight_decay": 0.1 if p is theirs.lm_head.weight else 0.0}
                               for p in split[1]], lr=1e-2, betas=(0.9, 0.95))
    start = {n: p.detach().clone() for n, p in ours.named_parameters()}
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        for a, b in zip(ours.parameters(), theirs.parameters()):
            a.grad = torch.randn(a.shape, generator=g)
            b.grad = a.grad.clone()
        for o in (opt, muon, adamw):
            o.step()
    for (n, a), b in zip(ours.named_parameters(), theirs.parameters()):
        gap = (a - b).norm() / (a - start[n]).norm()
        assert gap < (2e-2 if n in by_muon else 1e-5), (n, float(gap))


@pytest.mark.cuda
def test_muon_on_cuda_equals_cpu(stage):
    models = [stage.Tiny(), stage.Tiny()]
    models[1].load_state_dict(models[0].state_dict())
    opts = [trainer.adamw(m.to(d), {"projector": 1e-2, "decoder": 1e-2, "vit": 1e-2}, muon=3)
            for m, d in zip(models, ("cpu", "cuda"))]
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        for a, b in zip(*(m.parameters() for m in models)):
            a.grad = torch.randn(a.shape, generator=g)
            b.grad = a.grad.cuda()
        for opt in opts:
            opt.step()
    for a, b in zip(*(m.parameters() for m in models)):
        torch.testing.assert_close(b.cpu(), a, atol=1e-4, rtol=1e-4)


def test_schedule():
    f = lambda step, **k: trainer.schedule(step, 100, warmup=10, **k)
    assert [f(0), f(4), f(9), f(10)] == [0.1, 0.5, 1.0, 1.0]
    for kind in ("cosine", "linear", "wsd"):
        way = [f(s, kind=kind, floor=0.1) for s in range(10, 100)]
        assert way == sorted(way, reverse=True) and way[0] == 1 and way[-1] == pytest.approx(0.1)
        assert 0.1 == pytest.approx(f(500, kind=kind))
    assert f(79, kind="wsd", cooldown=0.2) == 1 > f(81, kind="wsd", cooldown=0.2) and f(99, kind="constant") == 1
    assert f(55, kind="linear", floor=0.0) == pytest.approx(44 / 89)
    assert trainer.schedule(0, 1) == 1.0 and trainer.schedule(0, 5, warmup=50) == 1 / 50
    with pytest.raises(ValueError, match="kind"):
        f(50, kind="cosin")


def test_metrics_are_cut_at_the_resumed_step(stage, tmp_path):
    run, _, _ = begin(stage, tmp_path)
    run.write({"score": 0.5})
    for step in range(4):
        run.write({"step": step, "loss": step / 3})
    with open(run.folder / "metrics.jsonl", "a") as f:
        f.write('{"step": 1, "lo')
    trainer.shorten(run, 2)
    assert [json.loads(x) for x in (run.folder / "metrics.jsonl").read_text().splitlines()] == \
        [{"score": 0.5}, {"step": 0, "loss": 0.0}, {"step": 1, "loss": 1 / 3}]


def test_loss_that_is_not_finite_stops_the_run(stage, tmp_path):
    run, _, _ = begin(stage, tmp_path)
    with pytest.raises(FloatingPointError, match="step 3: loss is nan"):
        run.log(3, 5, loss=torch.tensor(float("nan")))
    assert not (run.folder / "metrics.jsonl").exists()


def test_log_writes_what_the_bar_shows(one):
    line = json.loads((one / "toy/2/metrics.jsonl").read_text().splitlines()[-1])
    assert {"loss", "tokens_per_s", "visual_tokens_per_s", "mfu", "peak_gb", "left_s"} <= set(line)
    assert line["peak_gb"] > 0.05 and line["left_s"] == 0


def test_export_replaces_the_folder_whole(one, stage, tmp_path, monkeypatch):
    run, model, _ = begin(stage, tmp_path)
    folder = run.folder / "model"
    folder.mkdir()
    (folder / "stale.txt").write_text("from before")
    processor = types.SimpleNamespace(save_pretrained=lambda f: (f / "vocab.json").write_text("{}"))

    def broken(state, config, folder):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setitem(sys.modules, "model", types.SimpleNamespace(save_weights=broken))
    with pytest.raises(RuntimeError, match="No space left"):
        trainer.export(run, trainer.full_state(run, model), None, processor, folder)
    assert [p.name for p in folder.iterdir()] == ["stale.txt"]
    monkeypatch.setattr(sys.modules["model"], "save_weights", lambda sd, config, f: save_file(sd, f / "w.safetensors"))
    trainer.export(run, trainer.full_state(run, model), None, processor, folder)
    assert sorted(p.name for p in folder.iterdir()) == ["vocab.json", "w.safetensors"]
    saved = load_file(folder / "w.safetensors")
    assert all(torch.equal(saved[k], t) for k, t in model.state_dict().items())


def test_flags_are_refused_when_wrong():
    parser = trainer.arguments(argparse.ArgumentParser())
    for wrong in (["--steps", "0"], ["--threads", "0"], ["--size", "9b"], ["--resume", "--fresh"], ["--workers", "-1"]):
        with pytest.raises(SystemExit):
            parser.parse_args(wrong)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_missing_gpu_is_said(tmp_path):
    args = trainer.arguments(argparse.ArgumentParser()).parse_args(["--device", "cuda", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="needs GPU 0"):
        trainer.start(args, "2")
