"""common/run.py: flags, devices, the run's folder, what counts as done, the log, signals."""

import errno
import json
import os
import random
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common import checkpoint, processes
from common import run as run_module
from common.run import (
    SIZES,
    add_judge_arguments,
    arguments,
    at_least,
    data_folder,
    datasheet_peak,
    plan_of,
    previous_model,
    released,
    seed_everything,
    share_cores,
    start,
)
from stage import (
    DEVICES,
    begin,
    curve,
    draw_pack,
    finished,
    folder_of,
    in_processes,
    metrics,
    run_stage,
    skip_without_gpus,
)


def parse(*flags: str):
    return arguments("A script.\nMore of it.").parse_args(list(flags))


def opened(out, *flags: str):
    """A run in this process, its signals caught."""
    run = start(parse("--out", str(out), "--device", "cpu", "--threads", "1", *flags), "small")
    torch.use_deterministic_algorithms(False)
    return run


# ----------------------------------------------------------------------------------------------
# flags


@pytest.mark.parametrize("wrong", [
    ["--steps", "0"],
    ["--eval-limit", "-1"],
    ["--save-every", "0"],
    ["--save-minutes", "0"],
    ["--threads", "0"],
    ["--workers", "-1"],
    ["--seed", "-1"],
    ["--seed", "1.5"],
    ["--size", "9b"],
    ["--dtype", "fp16"],
    ["--resume", "--fresh"],
], ids=" ".join)
def test_wrong_flags_are_refused(wrong):
    with pytest.raises(SystemExit):
        parse(*wrong)


PLANS = {"toy": {"steps": (3, 4), "lr": 1e-3, "prompts": 32}, "released": {"lr": 1e-5}}


def test_a_plan_follows_the_size_and_what_is_changed_by_name():
    assert plan_of(parse(), PLANS) == PLANS["toy"]
    assert plan_of(parse("--size", "8b"), PLANS) == {"lr": 1e-5}
    changed = plan_of(parse("--plan", "prompts=8", "--plan", "lr=0.5"), PLANS)
    assert changed == {"steps": (3, 4), "lr": 0.5, "prompts": 8}
    assert PLANS["toy"]["prompts"] == 32  # the table itself stays


@pytest.mark.parametrize("change, said", [
    ("promts=8", "the names are lr, prompts"),
    ("steps=8", "the names are lr, prompts"),
    ("prompts=few", "'few' is no number for prompts"),
    ("prompts", "'' is no number for prompts"),
])
def test_a_wrong_change_of_the_plan_is_refused(change, said):
    with pytest.raises(SystemExit, match=said):
        plan_of(parse("--plan", change), PLANS)


@pytest.mark.parametrize("flags", [("--steps", "0"), ("--seed", "-1"), ("--rate", "nan"),
                                   ("--rate", "inf"), ("--rate", "-0.1")])
def test_a_flags_number_is_finite_and_large_enough(flags, capsys):
    parser = arguments("A script.")
    parser.add_argument("--rate", type=at_least(0.0))
    with pytest.raises(SystemExit):
        parser.parse_args(flags)
    flag, number = flags
    said = capsys.readouterr().err
    assert f"argument {flag}: must be at least " in said and said.endswith(f", got {number}\n")
    assert parser.parse_args(["--rate", "0.1"]).rate == 0.1


NUMBERS = {
    "toy": {
        "lr": 1e-3, "round_lr": 1e-3, "steps": 9, "group": 4, "discover": 0.5, "least": 1.0,
        "replay": 1.0, "beta": 0.0, "hints": 3, "words": 0.5,
    },
    "released": {},
}


@pytest.mark.parametrize("change, allowed", [
    ("lr=0", "above 0"),
    ("round_lr=-1e-4", "above 0"),
    ("lr=nan", "above 0"),
    ("lr=inf", "above 0"),
    ("lr=1e400", "above 0"),
    ("steps=0", "at least 1"),
    ("steps=-3", "at least 1"),
    ("group=1", "at least 2"),
    ("discover=1.5", "from 0 to 1"),
    ("least=nan", "from 0 to 1"),
    ("words=2", "from 0 to 1"),
    ("replay=-1", "at least 0"),
    ("replay=inf", "at least 0"),
    ("beta=nan", "at least 0"),
    ("hints=-1", "at least 0"),
])
def test_a_plan_that_trains_nothing_or_backwards_is_refused(change, allowed):
    with pytest.raises(SystemExit) as refusal:
        plan_of(parse("--plan", change), NUMBERS)
    name = change.partition("=")[0]
    assert str(refusal.value) == f"--plan {change}: {name} must be finite and {allowed}"


def test_the_edges_of_what_a_plan_may_have_are_taken():
    edges = {
        "lr": 1e-9, "round_lr": 3.0, "steps": 1, "group": 2, "discover": 0.0, "least": 1.0,
        "replay": 0.0, "beta": 0.0, "hints": 0, "words": 1.0,
    }
    changes = [flag for name, n in edges.items() for flag in ("--plan", f"{name}={n}")]
    assert plan_of(parse(*changes), NUMBERS) == edges


def test_every_name_of_a_plan_has_its_limits():
    """Those that may be 0 are few: a new name must say which it is."""
    import align
    import coldstart
    import grpo
    import sft

    may_be_0 = set()
    for script in (sft, align, coldstart, grpo):
        for plan in script.PLAN.values():
            numbers = {k: v for k, v in plan.items() if isinstance(v, (int, float))}
            may_be_0 |= {name for name in numbers if run_module.is_allowed(name, 0)[0]}
            for name, number in numbers.items():
                assert run_module.is_allowed(name, number)[0], name
    assert may_be_0 == {"replay", "beta", "hints", "discover", "least", "words"}


def test_gpu_memory_without_a_gpu_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="^--gpu-memory 8: this run is on cpu, not on a GPU$"):
        opened(tmp_path, "--gpu-memory", "8")
    assert not list(tmp_path.iterdir())


def test_the_least_values_are_taken():
    args = parse("--steps", "1", "--workers", "0", "--seed", "0", "--save-every", "1")
    assert (args.steps, args.workers, args.seed, args.save_every) == (1, 0, 0, 1)


def test_every_size_has_a_scale():
    from model import SCALE

    assert set(run_module.SIZES) == set(SCALE)


def test_a_script_that_asks_no_model_with_tools_has_no_sandbox(capsys):
    assert parse("--sandbox", "python").sandbox == "python"
    with pytest.raises(SystemExit):
        arguments("A script.", asks=False).parse_args(["--sandbox", "python"])
    assert "unrecognized arguments: --sandbox python" in capsys.readouterr().err


@pytest.mark.parametrize("size", SIZES)
def test_weights_are_released_of_the_sizes_of_qwen(size):
    assert released(size) == (size not in ("toy", "tiny", "small"))


def test_judges_may_be_several():
    parser = add_judge_arguments(arguments("A script."))
    args = parser.parse_args(["--judge", "http://a", "--judge", "http://b", "--judge-model", "m"])
    assert args.judge == ["http://a", "http://b"]
    assert args.judge_model == "m"
    assert parser.parse_args([]).judge is None


def test_data_are_those_of_the_size_or_those_named():
    assert str(data_folder(parse("--size", "tiny"))) == "data/tiny"
    assert str(data_folder(parse("--size", "tiny", "--data", "mine"))) == "mine"


def test_the_model_to_start_from_is_the_stage_befores_or_init(tmp_path):
    args = parse("--out", str(tmp_path), "--size", "tiny")
    with pytest.raises(SystemExit, match="tiny/sft/model holds no model; run sft first"):
        previous_model(args, "sft")
    left = tmp_path / "tiny" / "sft" / "model"
    left.mkdir(parents=True)
    (left / "config.json").touch()
    assert previous_model(args, "sft") == left
    args.init = str(tmp_path / "other")
    with pytest.raises(SystemExit, match="other holds no model"):
        previous_model(args, "sft")


# ----------------------------------------------------------------------------------------------
# devices, threads, seeds


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_missing_gpu_is_said(tmp_path):
    with pytest.raises(SystemExit, match="needs GPU 0 of the 0"):
        start(parse("--device", "cuda", "--out", str(tmp_path)), "small")


def test_each_rank_takes_the_gpu_of_its_local_rank(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert run_module.pick_device(parse()) == torch.device("cuda", 1)
    assert chosen == [torch.device("cuda", 1)]
    assert run_module.pick_device(parse("--device", "cpu")) == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(SystemExit, match="needs GPU 2 of the 2"):
        run_module.pick_device(parse())


def test_mps_is_one_process_in_fp32(monkeypatch):
    with pytest.raises(SystemExit, match="no MPS"):
        run_module.pick_device(parse("--device", "mps"))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert run_module.pick_device(parse("--device", "mps")).type == "mps"
    with pytest.raises(SystemExit, match="fp32 in one process"):
        run_module.pick_device(parse("--device", "mps", "--dtype", "bf16"))
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit, match="fp32 in one process"):
        run_module.pick_device(parse("--device", "mps"))


@pytest.mark.parametrize("kind, flags, environment, threads, workers", [
    ("cpu", [], {}, 24, 1),
    ("cpu", [], {"LOCAL_WORLD_SIZE": "4"}, 6, 1),
    ("cpu", [], {"LOCAL_WORLD_SIZE": "100"}, 1, 1),
    ("cpu", [], {"OMP_NUM_THREADS": "3"}, 3, 1),
    ("cpu", ["--threads", "2", "--workers", "0"], {"OMP_NUM_THREADS": "3"}, 2, 0),
    ("cuda", [], {}, 4, 8),
    ("cuda", [], {"LOCAL_WORLD_SIZE": "8"}, 3, 2),
    ("cuda", [], {"LOCAL_WORLD_SIZE": "24"}, 1, 1),
    ("cuda", ["--workers", "3"], {}, 4, 3),
])
def test_ranks_share_the_cores(monkeypatch, kind, flags, environment, threads, workers):
    counts = []
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(24)), raising=False)
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    args = parse(*flags)
    share_cores(args, torch.device(kind))
    assert counts == [threads]
    assert args.workers == workers


def test_the_peak_of_a_gpu_is_the_data_sheets():
    assert datasheet_peak("NVIDIA H100 80GB HBM3") == 989e12
    assert datasheet_peak("NVIDIA H100 PCIe") == 756e12
    assert datasheet_peak("NVIDIA A100-SXM4-80GB") == 312e12
    assert datasheet_peak("NVIDIA GeForce RTX 3090 Ti") == 71e12
    assert datasheet_peak("cpu") is None


def numbers() -> tuple:
    return torch.rand(()).item(), np.random.rand(), random.random()


def test_runs_of_one_seed_draw_alike_and_of_two_do_not(tmp_path):
    drawn = []
    for seed in (0, 0, 1):
        begin(tmp_path, "--seed", str(seed))
        seed_everything(seed)
        drawn.append(numbers())
        opened(tmp_path, "--seed", str(seed)).close()
        assert numbers() == drawn[-1]
    assert drawn[0] == drawn[1]
    assert all(a != b for a, b in zip(drawn[0], drawn[2]))


def test_each_number_of_a_seed_counts():
    drawn = []
    for seeds in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)):  # seed, step, rank
        seed_everything(*seeds)
        drawn.append(numbers())
    assert len(set(drawn)) == 4


def test_the_first_line_says_what_runs_where(tmp_path, capfd):
    opened(tmp_path).close()
    said = capfd.readouterr().err
    assert said.startswith("small: cpu (cpu), fp32, world 1, 1 threads, attention: ")
    assert "(measured), folder " + str(folder_of(tmp_path)) in said


# ----------------------------------------------------------------------------------------------
# computing


def test_autocast_follows_the_dtype(tmp_path):
    run, _, _ = begin(tmp_path)
    x = torch.ones(2, 2)
    with run.autocast():
        assert (x @ x).dtype == torch.float32
    run.dtype = torch.bfloat16
    run.needs_autocast = True
    with run.autocast():
        assert (x @ x).dtype == torch.bfloat16


def test_a_batch_moves_but_what_the_host_reads_stays(tmp_path):
    run, _, _ = begin(tmp_path)
    run.device = torch.device("meta")
    names = ("tokens", "patches", "segments", "grids")
    batch = {name: torch.ones(3) for name in names} | {"note": "not a tensor"}
    moved = run.to(batch)
    devices = {name: moved[name].device.type for name in names}
    assert devices == {"tokens": "meta", "patches": "meta", "segments": "cpu", "grids": "cpu"}
    assert moved["note"] == "not a tensor"
    assert batch["tokens"].device.type == "cpu", "the loader's batch stays as it was"


@pytest.mark.cuda
def test_a_batch_on_the_gpu_may_be_moved_again(tmp_path):
    run, _, _ = begin(tmp_path)
    run.device = torch.device("cuda")
    labels = torch.tensor([-100, 5, 6])
    batch = {"tokens": torch.arange(3), "labels": labels, "grids": torch.ones(1, 3)}
    moved = run.to(run.to(batch))
    assert moved["tokens"].tolist() == [0, 1, 2]
    assert moved["labelled"].tolist() == [1, 2], "found on the host, where nothing waits"
    assert moved["labelled"].is_cuda
    assert moved["grids"].device.type == "cpu"


def test_an_attempt_names_what_was_tried_and_what_went_wrong(tmp_path):
    run, _, _ = begin(tmp_path)
    assert run.attempt("cannot add", lambda: 1 + 1) == 2
    with pytest.raises(RuntimeError, match="^cannot divide: rank 0: ZeroDivisionError: division"):
        run.attempt("cannot divide", lambda: 1 / 0)


# ----------------------------------------------------------------------------------------------
# what the phase has done


def phase(out, scorer, *flags: str) -> bool:
    """A phase without a loop; returns whether it trained."""
    run, _, _ = begin(out, *flags)
    had_to_train = not run.trained()
    if had_to_train:
        run.mark_trained()
    run.score(scorer)
    return had_to_train


def broken_scorer():
    raise ValueError("no such question")


def test_a_scorer_that_fails_costs_no_training(tmp_path, capfd):
    folder = folder_of(tmp_path)
    assert phase(tmp_path, broken_scorer)
    said = capfd.readouterr().err
    assert "WARNING: small is trained and saved, but scoring it failed" in said
    assert "ValueError: no such question" in said
    assert (folder / "done.json").exists()
    assert not (folder / "score.json").exists()

    assert not phase(tmp_path, lambda: {"plain": 0.5})
    assert "small is trained" in capfd.readouterr().err
    assert json.loads((folder / "score.json").read_text()) == {"plain": 0.5}


def one_cannot_score(argv):
    """A phase whose sharded model is asked; memory ends on rank 1 before or after that."""
    out, when, device = argv
    processes.GRACE = 0.2  # a test need not wait for errors that reach the terminal
    run, model, _ = begin(out, "--device", device)

    def scorer():
        if when == "before" and run.rank == 1:
            raise torch.OutOfMemoryError("no memory left")
        with torch.no_grad():
            model.loss(run.to(draw_pack(0, 1)))
        run.barrier()
        if when == "after" and run.rank == 1:
            processes.GRACE = 60
            raise MemoryError("no memory left")
        return {"plain": 0.5}

    trained = run.trained()
    run.barrier()  # both have looked
    if not trained:
        run.mark_trained()
    run.score(scorer)
    run.say("the next phase")
    run.close()


@pytest.mark.parametrize("device", DEVICES)
def test_a_rank_that_cannot_score_alone_ends_all_that_wait_for_it(tmp_path, device):
    skip_without_gpus(device, 2)
    said = in_processes(one_cannot_score, [tmp_path, "before", device], ranks=2, code=1)
    folder = folder_of(tmp_path)
    assert (
        "rank 1 ends: it alone could not score small (OutOfMemoryError: no memory left), and the "
        f"others wait for it; the model is saved, {folder / 'model'}; the same command scores it "
        "again, also without torchrun"
    ) in said
    assert "the next phase" not in said
    said = in_processes(one_cannot_score, [tmp_path, "before", device])
    assert "small is trained" in said and "the next phase" in said
    assert json.loads((folder / "score.json").read_text()) == {"plain": 0.5}


def test_a_rank_that_nobody_waits_for_ends_nothing(tmp_path):
    said = in_processes(one_cannot_score, [tmp_path, "after", "cpu"], ranks=2)
    assert "MemoryError: no memory left" in said and "the next phase" in said
    assert "ends" not in said


def test_no_score_is_asked_for_with_no_questions(tmp_path, capfd):
    assert phase(tmp_path, broken_scorer, "--eval-limit", "0")
    assert "WARNING" not in capfd.readouterr().err
    assert not (folder_of(tmp_path) / "score.json").exists()


def test_a_phase_is_scored_once(tmp_path):
    phase(tmp_path, lambda: {"plain": 0.5})
    assert not phase(tmp_path, broken_scorer)
    assert not phase(tmp_path, lambda: {"plain": 0.7})
    assert json.loads((folder_of(tmp_path) / "score.json").read_text()) == {"plain": 0.5}


def test_a_scorer_without_a_score_leaves_none(tmp_path):
    phase(tmp_path, dict)
    assert not (folder_of(tmp_path) / "score.json").exists()


def test_ctrl_c_while_scoring_is_no_failure_of_the_scorer(tmp_path):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        phase(tmp_path, interrupted)


def test_fresh_forgets_all_that_a_phase_left(tmp_path):
    folder = folder_of(tmp_path)
    run, _, _ = begin(tmp_path)
    run.made_from(init="a")
    run.write_json("built.json", {})
    run.write({"step": 0})
    phase(tmp_path, lambda: {"plain": 0.5})
    for name in ("checkpoint/step-3", "data", "model"):
        (folder / name).mkdir(parents=True)
    (folder / "data" / "old.jsonl").touch()
    assert not phase(tmp_path, dict)
    assert phase(tmp_path, dict, "--fresh")
    assert sorted(path.name for path in folder.iterdir()) == ["done.json", "model"]


def test_a_trained_phase_leaves_no_checkpoint(tmp_path):
    for flags, left in (((), []), (("--keep-checkpoint",), ["checkpoint"])):
        run, model, opt = begin(tmp_path, *flags)
        checkpoint.save(run, 1, model, opt)
        run.finish_save()
        run.mark_trained()
        assert sorted(path.name for path in run.folder.iterdir()) == [*left, "done.json"]
        assert run.trained()


def test_another_start_is_refused_by_name_unless_the_run_is_fresh(tmp_path):
    run, _, _ = begin(tmp_path)
    run.made_from(init=tmp_path / "a", weights="123", beta=0.1, llm=None)
    run.made_from(init=tmp_path / "a", weights="123", beta=0.1, llm=None)
    with pytest.raises(SystemExit, match=r"small was made with init .*/a, not with .*/b; --fresh"):
        run.made_from(init=tmp_path / "b", weights="123", beta=0.1, llm=None)
    with pytest.raises(SystemExit, match="weights 123, not with 456"):
        run.made_from(init=tmp_path / "a", weights="456", beta=0.1, llm=None)
    with pytest.raises(SystemExit, match="llm None, not with qwen"):
        run.made_from(init=tmp_path / "a", weights="123", beta=0.1, llm="qwen")
    with pytest.raises(SystemExit, match="algo None, not with gspo"):  # of an older version
        run.made_from(init=tmp_path / "a", algo="gspo")

    run, _, _ = begin(tmp_path, "--fresh")
    run.made_from(init=tmp_path / "b")
    with pytest.raises(SystemExit):
        run.made_from(init=tmp_path / "a")


# ----------------------------------------------------------------------------------------------
# the folder


def in_the_way(out, what: str):
    """out with something where a run wants a folder or a file of its own."""
    folder = out / "toy" / "small"
    if what == "out":
        out.touch()
    elif what == "stage":
        folder.parent.mkdir(parents=True)
        folder.touch()
    elif "." in what:
        (folder / what).mkdir(parents=True)
    else:
        folder.mkdir(parents=True)
        (folder / what).touch()


@pytest.mark.parametrize("what", ["out", "stage", "model", "checkpoint", "metrics.jsonl"])
def test_a_folder_that_cannot_be_used_is_refused_at_the_start(tmp_path, what):
    in_the_way(tmp_path / "o", what)
    with pytest.raises(SystemExit) as refusal:
        begin(tmp_path / "o")
    line = str(refusal.value)
    assert line.startswith(f"--out {tmp_path / 'o'}: rank 0: ") and "\n" not in line
    assert str(folder_of(tmp_path / "o")) in line


def test_folders_of_later_stages_are_made_at_the_start(tmp_path):
    args = parse("--out", str(tmp_path), "--device", "cpu", "--threads", "1")
    start(args, "small", later=["next"]).close()
    assert (tmp_path / "toy" / "next").is_dir() and not list(folder_of(tmp_path).iterdir())
    (tmp_path / "toy" / "last").touch()
    with pytest.raises(SystemExit, match="toy/last"):
        start(args, "small", later=["next", "last"])


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSPC])
def test_a_folder_without_right_or_room_is_refused(tmp_path, monkeypatch, number):
    def refuse(path, data):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(run_module.Path, "write_bytes", refuse)
    with pytest.raises(SystemExit, match=os.strerror(number)):
        begin(tmp_path)


def test_all_ranks_refuse_alike(tmp_path):
    in_the_way(tmp_path / "o", "stage")
    said = run_stage(tmp_path / "o", ranks=2, code=1)
    assert said.count(f"--out {tmp_path / 'o'}: rank 0: ") == 2 and "Traceback" not in said


def test_odd_texts_survive_all_that_a_run_writes(tmp_path, capfd):
    odd = "\ud800\0\x1b\u2028 数"
    run, _, _ = begin(tmp_path)
    run.say(odd)
    run.write({"said": odd})
    run.made_from(said=odd)
    run.score(lambda: {"said": odd})
    run.totals["said"] = odd
    run.mark_trained()
    assert metrics(tmp_path) == [{"said": odd}]
    for name in ("made.json", "score.json", "done.json"):
        assert json.loads((run.folder / name).read_text())["said"] == odd
    assert "数" in capfd.readouterr().err


# ----------------------------------------------------------------------------------------------
# the log


def test_a_line_a_step_has_values_sums_and_rates(tmp_path, monkeypatch):
    run, _, _ = begin(tmp_path)
    run.peak = 1000.0
    run.clock = 100.0
    times = iter([102.0, 102.0, 106.0, 106.0])
    fake = SimpleNamespace(perf_counter=lambda: next(times))
    monkeypatch.setattr(run_module, "time", fake)
    monkeypatch.setattr(run_module, "peak_memory", lambda device: 2_500_000_000)
    run.log(0, 4, tokens=10, visual_tokens=4, flops=500.0, loss=torch.tensor(0.5), norm=2, lr=0.1)
    run.log(1, 4, tokens=30, visual_tokens=0, flops=100.0, loss=0.25, norm=1.0, lr=0.2)
    first, second = metrics(tmp_path)
    assert first == {
        "step": 0, "loss": 0.5, "norm": 2.0, "lr": 0.1, "tokens": 10, "visual_tokens": 4,
        "seconds": 2.0, "skipped_steps": 0, "tokens_per_s": 5.0, "visual_tokens_per_s": 2.0,
        "mfu": 0.25,
        "peak_gb": 2.5,
    }
    assert (second["step"], second["seconds"], second["tokens_per_s"]) == (1, 4.0, 7.5)
    totals = {"tokens": 40, "visual_tokens": 4, "seconds": 6.0, "skipped_steps": 0}
    assert run.totals == totals


def test_the_bar_shows_the_step_and_a_reward_where_there_is_one(tmp_path, capfd):
    run, _, _ = begin(tmp_path)
    run.log(2, 4, loss=0.5, reward=0.75)
    run.close()
    said = capfd.readouterr().err
    assert "3/4" in said, "resumed after two steps, one more is done"
    assert "reward 0.75, loss 0.5000, 0 tok/s" in said


@pytest.mark.parametrize("key", ["loss", "norm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_or_norm_that_is_not_finite_stops_the_run(tmp_path, key, value):
    run, _, _ = begin(tmp_path)
    values = {"loss": 1.0, "norm": 1.0, key: torch.tensor(value)}
    with pytest.raises(FloatingPointError, match=f"step 3: {key} is {value}"):
        run.log(3, 5, **values)
    assert not (run.folder / "metrics.jsonl").exists()


# ----------------------------------------------------------------------------------------------
# steps that must not be taken


@pytest.mark.parametrize("loss, norm", [("nan", 1), ("inf", 1), (1, "nan"), (1, "inf")])
def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path, capfd, loss, norm):
    run, _, _ = begin(tmp_path)
    assert not run.should_skip(1.0, 1.0)
    run.log(0, 5, loss=1.0, norm=1.0)
    loss, norm = torch.tensor(float(loss)), torch.tensor(float(norm))
    assert run.should_skip(loss, norm)
    assert f"step 1 is skipped: loss {loss:.4g}, gradient norm {norm:.4g}" in capfd.readouterr().err
    run.log(1, 5, loss=loss, norm=norm)
    assert not run.should_skip(1.0, 1.0)
    run.log(2, 5, loss=1.0, norm=1.0)
    assert curve(tmp_path, "skipped_steps") == [(0, 0), (1, 1), (2, 1)]
    assert run.totals["skipped_steps"] == 1
    expected = {"loss": loss, "norm": norm}
    for key, value in expected.items():
        assert metrics(tmp_path)[1][key] == (value if torch.isfinite(value) else None)
    with pytest.raises(FloatingPointError):
        run.log(3, 5, loss=loss, norm=norm)  # this one was taken


def test_a_gradient_explodes_against_the_median_of_the_last_hundred(tmp_path):
    run, _, _ = begin(tmp_path)
    norms = [0.5 + i % 3 for i in range(100)]  # median 1.5
    for step, norm in enumerate(norms):
        assert not run.should_skip(1.0, 1e6 if step == 3 else norm), "nothing is usual yet"
    assert not run.should_skip(1.0, 30.0)
    assert run.should_skip(1.0, 30.01)
    assert run.guard["norms"] == [*norms[1:3], 1e6, *norms[4:], 30.0], "no skipped one"
    for _ in range(50):
        assert not run.should_skip(1.0, 0.1)
    assert run.should_skip(1.0, 11.0), "the usual follows"


def test_what_a_model_that_knows_nearly_all_still_has_to_learn_is_no_explosion(tmp_path):
    run, _, _ = begin(tmp_path)
    for _ in range(200):
        assert not run.should_skip(1e-4, 0.01)
    for _ in range(30):
        assert not run.should_skip(0.1, 4.9)
        assert not run.should_skip(1e-4, 0.01)
    assert run.should_skip(9.0, 5.1)


def test_steps_without_a_gradient_say_nothing_of_the_usual(tmp_path):
    run, _, _ = begin(tmp_path)
    for step in range(300):  # of a group whose answers are all right there is none
        assert not run.should_skip(0.0, 0.0 if step % 4 else 0.2)
    assert run.guard["norms"] == [0.2] * 75


NAN = float("nan")


def test_five_skipped_steps_in_a_row_end_the_run(tmp_path):
    run, model, opt = begin(tmp_path)
    for _ in range(4):
        assert run.should_skip(NAN, 1.0)
    assert not run.should_skip(1.0, 1.0)
    for _ in range(4):
        assert run.should_skip(NAN, 1.0)
    run.step = 9
    checkpoint.save(run, 9, model, opt)
    with pytest.raises(FloatingPointError) as ended:
        run.should_skip(NAN, 1.0)
    assert str(ended.value) == (
        "step 9 is skipped: loss nan, gradient norm 1 (usually inf), like 9 of the last 1,000 "
        f"steps; the last checkpoint, {folder_of(tmp_path) / 'checkpoint' / 'step-9'}, is good; "
        "look at the data or lower the learning rate"
    )


def test_twenty_skipped_steps_of_a_thousand_end_the_run(tmp_path):
    run, _, _ = begin(tmp_path)

    def skip_one_of(n, steps):
        for step in range(steps):
            assert run.should_skip(NAN if step % n == 0 else 1.0, 1.0) == (step % n == 0)

    skip_one_of(53, 2000)  # 19 of a thousand
    run.guard |= {"skipped": [], "steps": 0}
    with pytest.raises(FloatingPointError, match="20 of the last 1,000 steps; nothing is saved"):
        skip_one_of(10, 1000)
    assert run.guard["steps"] == 191


def test_a_skipped_step_leaves_weights_and_moments_alone_on_all_ranks(tmp_path):
    said = run_stage(tmp_path, "--steps", 1, "--spoil", 0, ranks=2)
    assert said.count("step 0 is skipped: loss nan") == 1
    run, model, opt = begin(tmp_path)
    before = [tensor.clone() for tensor in model.state_dict().values()]
    assert checkpoint.resume(run, model, opt).step == 1
    assert all(map(torch.equal, before, model.state_dict().values()))
    for moments in opt.state.values():
        assert not any(tensor.any() for tensor in moments.values())


# ----------------------------------------------------------------------------------------------
# the log, and the clock of checkpoints


def test_after_minutes_without_a_checkpoint_it_is_time_for_one(tmp_path, monkeypatch):
    run, model, opt = begin(tmp_path, "--save-minutes", "2")
    now = run.saved_at
    clock = SimpleNamespace(perf_counter=lambda: now)
    monkeypatch.setattr(run_module, "time", clock)
    monkeypatch.setattr(checkpoint, "time", clock)
    for passed, late in ((119, False), (2, True)):
        now += passed
        run.log(0, 9, loss=1.0)
        assert run.late == late
    checkpoint.save_if_due(run, 1, 9, model, opt)
    run.finish_save()
    now += 1
    run.log(1, 9, loss=1.0)
    assert not run.late


def test_rank_0_alone_says_when_it_is_time(tmp_path, monkeypatch):
    run, _, _ = begin(tmp_path)
    for clocks, late in (([0, 1], False), ([1, 0], True)):
        rows = [[1, 0, 0, 0, 0, 0, clock] for clock in clocks]
        monkeypatch.setattr(run, "gather", lambda values, rows=rows: rows)
        run.log(0, 9, loss=1.0)
        assert run.late == late


def test_resident_memory_is_in_bytes(tmp_path):
    assert 5e7 < run_module.peak_memory(torch.device("cpu")) < 1e11


def test_a_run_logs_every_step_of_all_ranks():
    for ranks in (1, 2):
        rows = curve(finished(ranks), "tokens")
        assert rows == [(step, 8 + 13 + 18 + 23) for step in range(6)]


# ----------------------------------------------------------------------------------------------
# signals


def test_sigterm_saves_and_says_how_to_go_on(tmp_path):
    said = run_stage(tmp_path, "--steps", 4, "--signal", 1, ranks=2, code=128 + signal.SIGTERM)
    assert "SIGTERM: stopped after 2 steps" in said
    assert "the same command goes on" in said
    assert "resumed" in run_stage(tmp_path, "--steps", 4)
    assert [step for (step,) in curve(tmp_path)] == [0, 1, 2, 3]


def test_the_second_ctrl_c_does_not_wait(tmp_path):
    run = opened(tmp_path)
    try:
        os.kill(os.getpid(), signal.SIGINT)
        assert run.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    finally:
        run.signal = 0
        run.close()


def test_a_run_gives_the_signals_back(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    run = opened(tmp_path)
    assert signal.getsignal(signal.SIGINT) not in before
    run.close()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_signal_after_the_last_step_is_not_lost(tmp_path):
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        run = opened(tmp_path)
        os.kill(os.getpid(), signal.SIGTERM)  # while the phase is scored, say
        assert heard == []
        run.close()
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_forked_process_outlives_ctrl_c_and_ends_at_sigterm(tmp_path):
    run = opened(tmp_path)
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    run.close()
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGTERM
