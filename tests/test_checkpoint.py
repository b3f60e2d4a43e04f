"""common/checkpoint.py: kill, resume, damage, full disks; model folders whole or not at all."""

import errno
import json
import random
import re
import shutil
import signal
import subprocess
import threading
from concurrent.futures import wait
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from common import checkpoint
from common.checkpoint import (
    Progress,
    export,
    fingerprint,
    resume,
    save_if_due,
    shorten_metrics,
)
from common.parallel import own_part
from common.run import seed_everything
from common.weights import KEYE_NAMES, renamed
from stage import (
    DEVICES,
    Processor,
    assert_same_curve,
    begin,
    checkpoint_names,
    curve,
    exported,
    finished,
    folder_of,
    in_processes,
    metrics,
    run_stage,
    skip_without_gpus,
)


@pytest.fixture
def copy_of(tmp_path):
    """copy_of(ranks): the finished run by so many ranks, to be spoilt."""

    def copy(ranks: int) -> Path:
        out = tmp_path / "copy"
        shutil.copytree(finished(ranks), out)
        return out

    return copy


def flip_a_bit(path: Path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


def save(run, *what, **extra):
    """A checkpoint, once it is written."""
    checkpoint.save(run, *what, **extra)
    run.finish_save()


def no_room(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


# ----------------------------------------------------------------------------------------------
# resuming


@pytest.mark.parametrize("saved, ranks", [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(saved, ranks, copy_of):
    out = copy_of(saved)
    shutil.rmtree(folder_of(out) / "checkpoint" / "step-6")
    assert "resumed" in run_stage(out, "--steps", 6, "--save-every", 3, ranks=ranks)
    before = finished(saved)
    assert_same_curve(before, out, "loss", "norm")
    assert curve(before, "loss", "seconds")[:3] == curve(out, "loss", "seconds")[:3], "kept"
    assert curve(before, "seconds")[3:] != curve(out, "seconds")[3:], "run again"


def test_a_run_goes_on_from_two_ranks_to_one_to_four(copy_of):
    out = copy_of(2)
    shutil.rmtree(folder_of(out) / "checkpoint" / "step-6")
    run_stage(out, "--steps", 6, "--save-every", 1, "--kill", 4, code=-signal.SIGKILL)
    assert "step-4; " in run_stage(out, "--steps", 6, "--save-every", 3, ranks=4)
    assert_same_curve(finished(2), out, "loss", "norm")


@pytest.mark.cuda
@pytest.mark.parametrize("saved, ranks", [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_gpus(saved, ranks, tmp_path):
    skip_without_gpus("cuda", 2)
    whole = tmp_path / "whole"
    cut = tmp_path / "cut"
    flags = ["--device", "cuda", "--steps", 6, "--save-every", 3]
    run_stage(whole, *flags, ranks=saved)
    shutil.copytree(whole, cut)
    shutil.rmtree(folder_of(cut) / "checkpoint" / "step-6")
    assert "step-3; " in run_stage(cut, *flags, ranks=ranks)
    assert_same_curve(whole, cut, "loss", "norm", tol=1e-2)  # products in bf16


def test_two_ranks_checkpoint_is_bit_equal_in_one_process(copy_of):
    run, model, opt = begin(copy_of(2))
    progress = resume(run, model, opt)
    assert progress.step == 6
    assert progress.loader == 6
    state = model.state_dict()
    for name, tensor in exported(finished(2)).items():
        assert any(torch.equal(tensor, ours) for ours in state.values()), name
    for name, p in model.named_parameters():
        moments = opt.state[p]
        if "momentum" in moments:
            assert moments["momentum"].any(), name
        else:
            assert moments["step"] == 6
            assert moments["exp_avg_sq"].any(), name


def test_all_that_was_saved_comes_back(tmp_path):
    run, model, opt = begin(tmp_path)
    totals = {"tokens": 70, "visual_tokens": 9, "seconds": 1.5, "skipped_steps": 2}
    guard = {"steps": 4, "norms": [0.1, 1 / 3], "skipped": [1, 3]}
    run.totals, run.guard = dict(totals), dict(guard)
    save(run, 4, model, opt, {"next": [4, 2]}, shift=[0.5, 3.0])
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    run, model, opt = begin(tmp_path, "--seed", "1")
    progress = resume(run, model, opt)
    assert progress == Progress(4, {"next": [4, 2]}, {"shift": [0.5, 3.0]})
    assert (run.totals, run.guard) == (totals, guard)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_without_a_checkpoint_a_run_starts_at_step_zero(tmp_path):
    run, model, opt = begin(tmp_path)
    assert resume(run, model, opt) == Progress(0, None, {})


def numbers() -> tuple:
    return torch.rand(()).item(), np.random.rand(), random.random()


def test_every_random_state_comes_back(tmp_path):
    run, model, opt = begin(tmp_path)
    for _ in range(5):
        numbers()
    save(run, 1, model, opt)
    drawn = numbers()
    run, model, opt = begin(tmp_path)
    resume(run, model, opt)
    assert numbers() == drawn


@pytest.mark.parametrize("ranks, step", [(None, 0), (2, 6)])
def test_a_new_run_or_other_ranks_draw_by_seed_step_and_rank(ranks, step, tmp_path, copy_of):
    run, model, opt = begin(copy_of(ranks) if ranks else tmp_path, "--seed", "3")
    run.rank = 1
    resume(run, model, opt)
    drawn = numbers()
    seed_everything(3, step, 1)
    assert numbers() == drawn


def test_kill_9_gives_the_same_curve_to_the_last_bit(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = ["--steps", 7, "--save-every", 2, "--drop", 0.2]
    run_stage(whole, *flags)
    run_stage(cut, *flags, "--kill", 4, code=-signal.SIGKILL)  # one step after a checkpoint
    run_stage(cut, *flags, "--kill-in-save", 6, code=-signal.SIGKILL)
    assert "step-6.tmp" in checkpoint_names(cut)
    run_stage(cut, *flags)
    keys = ("loss", "norm", "lr", "tokens")
    assert curve(whole, *keys) == curve(cut, *keys)
    weights = exported(cut)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in exported(whole).items())
    assert checkpoint_names(cut) == ["step-6", "step-7"]


def test_one_rank_killed_ends_all_and_the_same_command_goes_on(tmp_path):
    flags = ["--steps", 6, "--save-every", 2]
    codes = [1, -signal.SIGKILL]
    said = run_stage(tmp_path, *flags, "--kill", 4, "--kill-rank", 1, ranks=2, code=codes)
    assert "Connection" in said
    assert checkpoint_names(tmp_path) == ["step-2", "step-4"]
    said = run_stage(tmp_path, *flags, "--kill-in-save", 6, ranks=2, code=-signal.SIGKILL)
    assert "step-4; " in said and "step-6.tmp" in checkpoint_names(tmp_path)
    assert "step-4; " in run_stage(tmp_path, *flags, ranks=2)
    assert_same_curve(finished(2), tmp_path, "loss", "norm", tol=0)


def test_flags_that_differ_are_named(copy_of, capfd):
    out = copy_of(1)
    run, model, opt = begin(out, "--save-every", "7", "--resume")
    resume(run, model, opt)
    said = capfd.readouterr().err
    assert "; --save-every was 3" in said
    assert "--resume was" not in said
    assert "--size was" not in said


def test_fewer_steps_than_were_done_are_said_to_train_nothing(copy_of):
    out = copy_of(1)
    line = "already at step 6 of the {} that --steps asks for: nothing is trained on"
    assert line.format(6) not in run_stage(out, "--steps", 6), "it only has to be exported"
    assert line.format(2) in run_stage(out, "--steps", 2)
    assert len(curve(out)) == 6


def test_resume_insists_on_a_checkpoint_and_fresh_forgets_them(copy_of):
    out = copy_of(1)
    run, model, opt = begin(out, "--fresh")
    assert resume(run, model, opt).step == 0
    assert not (run.folder / "metrics.jsonl").exists()
    with pytest.raises(SystemExit, match="--resume: no checkpoint in"):
        resume(*begin(out, "--resume"))


def test_metrics_are_cut_at_the_resumed_step(tmp_path):
    run, _, _ = begin(tmp_path)
    run.write({"score": 0.5})
    for step in range(4):
        run.write({"step": step, "loss": step / 3})
    with open(run.folder / "metrics.jsonl", "a") as f:
        f.write('{"step": 1, "lo')
    shorten_metrics(run, 2)
    assert metrics(tmp_path) == [
        {"score": 0.5}, {"step": 0, "loss": 0.0}, {"step": 1, "loss": 1 / 3},
    ]
    with open(run.folder / "metrics.jsonl", "a") as f:
        f.write('{"step": 0}')  # a whole record, but a line that could be appended to
    shorten_metrics(run, 9)
    assert len(metrics(tmp_path)) == 3


# ----------------------------------------------------------------------------------------------
# weights that do not learn

PROJECTOR = {"projector": 1e-2}


def names_in(path: Path) -> set[str]:
    """Of the tensors of a checkpoint."""
    return set(checkpoint.dcp.FileSystemReader(path).read_metadata().state_dict_metadata)


def projector_saved(argv):
    """A checkpoint of a run whose projector alone learns, and has learnt."""
    run, model, opt = begin(Path(argv[0]), rates=PROJECTOR)
    learn(model)
    save(run, 1, model, opt)
    run.barrier()


def learn(model):
    with torch.no_grad():
        for p in model.projector.parameters():
            p.add_(1)


def test_weights_that_do_not_learn_are_left_out_and_hashed_once(tmp_path, monkeypatch):
    run, model, opt = begin(tmp_path, rates=PROJECTOR)
    save(run, 1, model, opt)
    monkeypatch.setattr(checkpoint, "hashes_of", None)
    save(run, 2, model, opt)
    kept = {f"projector.{key}" for key in ("weight", "bias")}
    for step in (1, 2):
        names = names_in(run.folder / "checkpoint" / f"step-{step}")
        assert {name for name in names if name.startswith("model.")} == {
            f"model.{name}" for name in kept
        }
        assert all(name.startswith("optim.projector.") for name in names if "model." not in name)
    state = json.loads((run.folder / "checkpoint" / "step-2" / "state.json").read_text())
    assert state["frozen"].keys() == model.state_dict().keys() - kept


def test_where_all_learns_nothing_is_left_out():
    path = folder_of(finished(1)) / "checkpoint" / "step-6"
    _, model, _ = begin(finished(1))
    assert names_in(path) >= {f"model.{name}" for name in model.state_dict()}
    assert json.loads((path / "state.json").read_text())["frozen"] == {}


@pytest.mark.parametrize("ranks", [1, 2])
def test_one_process_goes_on_with_what_was_left_out(ranks, tmp_path):
    in_processes(projector_saved, [tmp_path], ranks)
    _, expected, _ = begin(tmp_path / "other")
    learn(expected)
    run, model, opt = begin(tmp_path, rates=PROJECTOR)
    assert resume(run, model, opt).step == 1
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_two_ranks_go_on_with_what_was_left_out(tmp_path):
    projector_saved([tmp_path])
    in_processes(projector_resumed, [tmp_path], ranks=2)


def projector_resumed(argv):
    run, model, opt = begin(Path(argv[0]), rates=PROJECTOR)
    assert resume(run, model, opt).step == 1
    run.barrier()


def test_other_cards_may_hold_what_was_left_out_in_another_dtype(tmp_path):
    projector_saved([tmp_path])
    run, model, opt = begin(tmp_path, rates=PROJECTOR)
    assert resume(run, model.to(torch.bfloat16), opt).step == 1


def test_another_start_than_what_was_left_out_is_refused(tmp_path):
    projector_saved([tmp_path])
    begun = begin(tmp_path, rates=PROJECTOR)
    weight = begun[1].vit.layers[1].mlp.weight
    with torch.no_grad():
        weight[3, 5] += 0.01  # of one number
    with pytest.raises(RuntimeError, match=r"e.g. vit.layers.1.mlp.weight \(1 of \d+ differ"):
        resume(*begun)
    with pytest.raises(RuntimeError, match="the same --seed on the same kind of device; --fresh"):
        resume(*begin(tmp_path, "--seed", "1", rates=PROJECTOR))
    assert checkpoint_names(tmp_path) == ["step-1"]


# ----------------------------------------------------------------------------------------------
# damage


def cut_in_half(path: Path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("spoil", [flip_a_bit, cut_in_half, Path.unlink])
@pytest.mark.parametrize("name", [
    "__0_0.distcp", ".metadata", "rng-0.pt", "state.json", "manifest.json",
])
def test_a_damaged_checkpoint_is_found_and_the_one_before_taken(name, spoil, copy_of, capfd):
    out = copy_of(1)
    spoil(folder_of(out) / "checkpoint" / "step-6" / name)
    run, model, opt = begin(out)
    assert resume(run, model, opt).step == 3
    said = capfd.readouterr().err
    assert "WARNING" in said
    assert "step-6 is damaged: " in said
    assert checkpoint_names(out) == ["damaged-step-6", "step-3"]
    assert [step for (step,) in curve(out)] == [0, 1, 2]


@pytest.mark.parametrize("manifest, why", [
    ("{}", "manifest.json does not name .metadata"),
    ('{".metadata": "", "rng-0.pt": "", "state.json": ""}', "does not name __0_0.distcp"),
    ('[".metadata", "__0_0.distcp", "rng-0.pt", "state.json"]', "TypeError"),
    ("null", "TypeError"),
])
def test_a_manifest_that_does_not_name_all_is_damage(manifest, why, copy_of, capfd):
    out = copy_of(1)
    newest = folder_of(out) / "checkpoint" / "step-6"
    (newest / "manifest.json").write_text(manifest)
    cut_in_half(newest / "__0_0.distcp")
    run, model, opt = begin(out)
    assert resume(run, model, opt).step == 3
    assert re.search(f"step-6 is damaged: .*{why}", capfd.readouterr().err)
    assert checkpoint_names(out) == ["damaged-step-6", "step-3"]


def test_damage_in_any_ranks_files_is_found_by_all(copy_of):
    out = copy_of(2)
    flip_a_bit(folder_of(out) / "checkpoint" / "step-6" / "__1_0.distcp")
    said = run_stage(out, "--steps", 6, "--save-every", 3, ranks=2)
    assert "__1_0.distcp is not what was written" in said
    assert curve(out, "loss") == curve(finished(2), "loss")


def test_when_every_checkpoint_is_damaged_the_run_ends_and_keeps_them(copy_of):
    out = copy_of(1)
    for step in (3, 6):
        flip_a_bit(folder_of(out) / "checkpoint" / f"step-{step}" / "state.json")
    run, model, opt = begin(out)
    for _ in range(2):  # the same command does not start over either
        with pytest.raises(RuntimeError, match="every checkpoint .* is damaged; --fresh"):
            resume(run, model, opt)
    assert checkpoint_names(out) == ["step-3", "step-6"]


def test_damaged_checkpoints_that_were_set_aside_are_no_fresh_start(copy_of):
    out = copy_of(1)
    flip_a_bit(folder_of(out) / "checkpoint" / "step-6" / "state.json")
    run, model, opt = begin(out)
    assert resume(run, model, opt).step == 3
    shutil.rmtree(folder_of(out) / "checkpoint" / "step-3")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="every checkpoint .* is damaged; --fresh"):
            resume(run, model, opt)
    assert resume(*begin(out, "--fresh")).step == 0


def test_a_checkpoint_of_another_model_is_refused_not_skipped(copy_of):
    out = copy_of(1)
    with pytest.raises(RuntimeError, match="other trained parts, e.g. model.decoder"):
        resume(*begin(out, rates={"projector": 1e-2}))
    with pytest.raises(RuntimeError, match="embed_tokens"):
        resume(*begin(out, vocab=40))


def test_other_cards_may_hold_weights_in_another_dtype(copy_of):
    """How they are held depends on the memory there is; a run must go on all the same."""
    out = copy_of(1)
    _, exact, opt = begin(out)
    step = resume(_, exact, opt).step
    run, model, opt = begin(out)
    assert resume(run, model.to(torch.bfloat16), opt).step == step > 0
    for p, q in zip(model.parameters(), exact.parameters(), strict=True):
        assert torch.equal(p, q.to(torch.bfloat16))


# ----------------------------------------------------------------------------------------------
# saving


def test_a_run_saves_every_so_often_at_the_end_and_at_a_signal(tmp_path, monkeypatch):
    run, _, _ = begin(tmp_path, "--save-every", "3")
    saved = []
    monkeypatch.setattr(checkpoint, "save", lambda run, step, *rest, **extra: saved.append(step))
    monkeypatch.setattr(run, "finish_save", lambda: saved.append("waited"))
    for step in range(1, 8):
        save_if_due(run, step, 7, None, None)
    assert saved == [3, 6, 7, "waited"]
    run.late = True
    save_if_due(run, 2, 7, None, None)
    assert saved[4:] == [2]
    run.late = False
    run.stop = signal.SIGTERM
    with pytest.raises(SystemExit) as stopped:
        save_if_due(run, 2, 7, None, None)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert saved[5:] == [2, "waited"]


def test_the_two_newest_checkpoints_are_kept(tmp_path):
    run, model, opt = begin(tmp_path)
    for step in (9, 10, 11):
        save(run, step, model, opt)
    assert checkpoint_names(tmp_path) == ["step-10", "step-11"]
    save(run, 10, model, opt, "again")
    assert checkpoint_names(tmp_path) == ["step-10", "step-11"]
    state = json.loads((run.folder / "checkpoint" / "step-10" / "state.json").read_text())
    assert state["loader"] == "again"


def test_saving_is_not_counted_as_training(tmp_path, monkeypatch):
    run, model, opt = begin(tmp_path)
    times = iter([50.0, 57.0])
    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    run.clock = 40.0
    save(run, 1, model, opt)
    assert run.clock == 47.0
    assert run.saved_at == 57.0


def test_a_thread_writes_what_was_there_when_the_save_began(tmp_path, monkeypatch):
    run, model, opt = begin(tmp_path)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    place = {"next": [1]}
    write = checkpoint.dcp.save
    go_on = threading.Event()

    def held(*args, **named):
        assert go_on.wait(60)  # training goes on meanwhile
        write(*args, **named)

    monkeypatch.setattr(checkpoint.dcp, "save", held)
    checkpoint.save(run, 1, model, opt, place)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
            opt.state[p].clear()
    place["next"].append(2)
    run.totals["tokens"] = 7
    go_on.set()
    run.finish_save()
    assert run.saved == run.folder / "checkpoint" / "step-1"

    run, model, opt = begin(tmp_path, "--seed", "1")
    assert resume(run, model, opt).loader == {"next": [1]}
    assert run.totals["tokens"] == 0
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_one_checkpoint_is_written_at_a_time(tmp_path, monkeypatch):
    run, model, opt = begin(tmp_path)
    write = checkpoint.dcp.save
    events = []

    def note(state, checkpoint_id, **how):
        events.append(f"begin {checkpoint_id.name}")
        write(state, checkpoint_id=checkpoint_id, **how)
        events.append(f"end {checkpoint_id.name}")

    monkeypatch.setattr(checkpoint.dcp, "save", note)
    for step in (1, 2):
        checkpoint.save(run, step, model, opt)
    run.finish_save()
    names = ["step-1.tmp", "step-2.tmp"]
    assert events == [f"{what} {name}" for name in names for what in ("begin", "end")]
    assert checkpoint_names(tmp_path) == ["step-1", "step-2"]


def test_a_writers_error_ends_the_next_step(tmp_path, monkeypatch):
    run, model, opt = begin(tmp_path)
    save(run, 1, model, opt)
    monkeypatch.setattr(checkpoint.dcp, "save", no_room)
    checkpoint.save(run, 2, model, opt)
    wait([run.saving])
    with pytest.raises(RuntimeError, match="cannot save .*step-2 .*stays valid.*No space left"):
        run.log(2, 4, loss=1.0)
    assert checkpoint_names(tmp_path) == ["step-1"]
    run.log(2, 4, loss=1.0)  # said once


def test_a_writers_error_on_one_rank_ends_all_in_the_same_step(tmp_path):
    in_processes(one_cannot_write, [tmp_path], ranks=2)
    steps = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    assert steps[0] == steps[1]


def one_cannot_write(argv):
    out = Path(argv[0])
    run, model, opt = begin(out)
    if run.rank == 1:
        torch.save = no_room
    checkpoint.save(run, 1, model, opt)
    with pytest.raises(RuntimeError, match="step-1 .*stays valid.* rank 1: OSError: .*No space"):
        for step in range(10**6):
            run.log(step, 10**6, loss=1.0)
    (out / f"{run.rank}.txt").write_text(f"{step}")
    run.barrier()


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    run, model, opt = begin(tmp_path)
    save(run, 1, model, opt, "one")

    def half(state, checkpoint_id, **how):
        (checkpoint_id / "__0_0.distcp").write_bytes(b"half")
        no_room()

    monkeypatch.setattr(checkpoint.dcp, "save", half)
    with pytest.raises(RuntimeError, match="step-2 .*stays valid.*No space left"):
        save(run, 2, model, opt, "two")
    assert checkpoint_names(tmp_path) == ["step-1"]
    assert resume(run, model, opt).loader == "one"


@contextmanager
def small_disk(folder: Path, size: str):
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_really_is_full(tmp_path):
    # a checkpoint is of about 170 kB: the first two fit, the third does not
    with small_disk(tmp_path / "disk", "480k") as disk:
        said = run_stage(disk, "--steps", 3, "--save-every", 1, code=1)
        assert "step-3 (the checkpoint before it stays valid)" in said
        assert "No space left on device" in said
        assert checkpoint_names(disk) == ["step-1", "step-2"]
        shutil.rmtree(folder_of(disk) / "checkpoint" / "step-1")
        run_stage(disk, "--steps", 3)  # there is space again: the same command goes on
        assert [step for (step,) in curve(disk)] == [0, 1, 2]


def test_every_rank_says_that_the_disk_is_full(tmp_path):
    with small_disk(tmp_path / "disk", "250k") as disk:
        said = run_stage(disk, "--steps", 2, "--save-every", 1, ranks=2, code=1)
        full = "OSError: .*No space left on device"
        assert len(re.findall(f"RuntimeError: .*rank 0: {full}.* rank 1: {full}", said)) == 2
        assert checkpoint_names(disk) == []


def test_a_full_disk_is_named_when_a_model_is_exported(tmp_path):
    with small_disk(tmp_path / "disk", "40k") as disk:
        run, model, _ = begin(disk, vocab=2000)
        with pytest.raises(RuntimeError, match="cannot export to .*model: .*No space left"):
            export(run, model, Processor())


@pytest.mark.parametrize("written", ["dcp", "torch"])
def test_the_cause_behind_torchs_error_is_named(tmp_path, monkeypatch, written):
    """Its archives end with "unexpected pos" where the file below them could not be written."""
    run, model, opt = begin(tmp_path)

    def broken(*args, **kwargs):
        try:
            no_room()
        except OSError:
            raise RuntimeError("unexpected pos 704 vs 598")  # noqa: B904

    monkeypatch.setattr(getattr(checkpoint, written), "save", broken)
    with pytest.raises(RuntimeError, match="step-2 .*stays valid.*No space left"):
        save(run, 2, model, opt)
    monkeypatch.setattr(getattr(checkpoint, written), "save", lambda *_, **__: 1 / 0)
    with pytest.raises(RuntimeError, match="ZeroDivisionError: division by zero"):
        save(run, 2, model, opt)


# ----------------------------------------------------------------------------------------------
# a model that has diverged


def spoil_one(tensor: torch.Tensor, value: float):
    """The last number of what this rank holds of a tensor."""
    part, _ = own_part(tensor.detach())
    part.view(-1)[-1] = value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_diverged_model_is_neither_saved_nor_exported(tmp_path, value):
    run, model, opt = begin(tmp_path)
    save(run, 1, model, opt)
    export(run, model, Processor())
    before = exported(tmp_path)
    spoil_one(model.decoder.layers[1].mlp.weight, value)
    for step in (2, 3, 4):
        with pytest.raises(FloatingPointError) as ended:
            save(run, step, model, opt)
    assert str(ended.value) == (
        "after 4 steps model.decoder.layers.1.mlp.weight is not finite: the model has diverged; "
        f"the last checkpoint, {run.folder / 'checkpoint' / 'step-1'}, is good; "
        "look at the data or lower the learning rate"
    )
    assert checkpoint_names(tmp_path) == ["step-1"]
    with pytest.raises(FloatingPointError, match="decoder.layers.1.mlp.weight is not finite"):
        export(run, model, Processor())
    assert not (run.folder / "model.tmp").exists()
    after = exported(tmp_path)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_moments_that_are_not_finite_are_no_checkpoint(tmp_path):
    run, model, opt = begin(tmp_path)
    spoil_one(opt.state[model.vit.layers[0].norm.bias]["exp_avg_sq"], float("inf"))
    with pytest.raises(FloatingPointError, match="optim.vit.layers.0.norm.bias.exp_avg_sq is not"):
        save(run, 1, model, opt)
    export(run, model, Processor())  # they are no part of the model


def test_large_numbers_are_finite_in_the_dtype_that_holds_them(tmp_path):
    run, model, opt = begin(tmp_path)
    largest = torch.finfo(torch.float32).max
    with torch.no_grad():
        model.projector.weight.fill_(largest)  # their sum is not finite
    save(run, 1, model, opt)
    export(run, model, Processor())
    run.args.size = "8b"  # written in bf16, which would round them up to infinity
    with pytest.raises(FloatingPointError, match="projector.weight is not finite"):
        export(run, model, Processor())


@pytest.mark.parametrize("device", DEVICES)
def test_one_ranks_part_that_is_not_finite_ends_all(tmp_path, device):
    skip_without_gpus(device, 2)
    in_processes(one_has_diverged, [tmp_path, device], ranks=2)
    assert checkpoint_names(tmp_path) == ["step-1"]
    assert not (folder_of(tmp_path) / "model").exists()


def one_has_diverged(argv):
    out, device = argv
    # the second rank's part of most is empty
    run, model, opt = begin(Path(out), "--device", device, width=1)
    save(run, 1, model, opt)
    part, _ = own_part(model.projector.bias)
    assert part.numel() == (run.rank == 0)
    if run.rank == 1:
        spoil_one(model.lm_head.weight, float("nan"))
    good = "lm_head.weight is not finite: the model has diverged; the last checkpoint, .*step-1,"
    with pytest.raises(FloatingPointError, match=good):
        save(run, 2, model, opt)
    with pytest.raises(FloatingPointError, match=good):
        export(run, model, Processor())
    run.barrier()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_diverges_in_its_last_steps_fails(tmp_path, ranks, device):
    skip_without_gpus(device, ranks)
    flags = ["--device", device, "--steps", 3, "--diverge", 1]
    said = run_stage(tmp_path, *flags, ranks=ranks, code=1)
    assert said.count("step 2 is skipped: loss nan") == 1, "too few to end the run"
    assert "FloatingPointError: after 3 steps model." in said
    assert "nothing is saved; look at the data" in said
    left = [path.name for path in folder_of(tmp_path).iterdir()]
    assert left == ["metrics.jsonl"], "neither a checkpoint nor a model"


def test_a_run_whose_last_steps_are_skipped_leaves_its_model(tmp_path):
    run_stage(tmp_path, "--steps", 3, "--spoil", 1, 2)
    assert all(tensor.isfinite().all() for tensor in exported(tmp_path).values())


# ----------------------------------------------------------------------------------------------
# model folders


def test_an_export_has_the_whole_model_by_its_official_names(tmp_path):
    run, model, _ = begin(tmp_path)
    export(run, model, Processor())
    folder = run.folder / "model"
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["config.json", "model.safetensors", "vocab.json"]
    assert json.loads((folder / "config.json").read_text()) == {"small": True}
    saved = load_file(folder / "model.safetensors")
    state = model.state_dict()
    assert len(saved) == len(state)
    for name, tensor in state.items():
        assert torch.equal(saved[renamed(name, KEYE_NAMES)], tensor), name


def test_a_model_folder_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    run, model, _ = begin(tmp_path)
    folder = run.folder / "model"
    folder.mkdir()
    (folder / "old.txt").write_text("from before")
    (run.folder / "model.tmp").mkdir()
    (run.folder / "model.tmp" / "stale.txt").touch()
    with monkeypatch.context() as patch:
        patch.setattr(Processor, "save_pretrained", no_room)
        with pytest.raises(RuntimeError, match="cannot export to .*model: .*No space left"):
            export(run, model, Processor())
    assert [path.name for path in folder.iterdir()] == ["old.txt"]
    export(run, model, Processor())
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["config.json", "model.safetensors", "vocab.json"]
    assert [path.name for path in run.folder.iterdir()] == ["model"], "nothing is left beside it"


def test_a_fingerprint_tells_weights_of_one_size_apart(tmp_path):
    weights = {f"part{i}": torch.rand(40, 100) for i in range(200)}  # 3.2 MB
    for name in ("a", "same", "moved", "renamed"):
        (tmp_path / name).mkdir()
    save_file(weights, tmp_path / "a" / "model.safetensors")
    save_file(weights, tmp_path / "same" / "model.safetensors")
    save_file(weights, tmp_path / "renamed" / "model-1.safetensors")
    a = fingerprint(tmp_path / "a")
    assert fingerprint(tmp_path / "same") == a
    assert fingerprint(tmp_path / "renamed") != a
    for name in ("part0", "part100", "part99"):  # the first, one within, the last of the file
        other = {**weights, name: weights[name] + 0.01}
        save_file(other, tmp_path / "moved" / "model.safetensors")
        assert fingerprint(tmp_path / "moved") != a, name


@pytest.mark.parametrize("place", [0, 5_000_000, 11_900_000])
def test_a_fingerprint_of_large_files_looks_everywhere(tmp_path, place):
    path = tmp_path / "model.safetensors"
    content = bytearray(12_000_000)
    path.write_bytes(content)
    before = fingerprint(tmp_path)
    content[place : place + 20_000] = b"x" * 20_000  # the projector of a large model, say
    path.write_bytes(content)
    assert fingerprint(tmp_path) != before
