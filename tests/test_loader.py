"""common/loader.py: which samples a step holds, in which packs, and what happens to bad ones."""

import json
import logging
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, toy_processor
from stage import in_processes
from test_data import assistant, image, talk, user
from test_media import noise

from common import index
from common.loader import Loader, split_packs
from common.packing import first_packing
from data import Processor
from model import SCALE


@pytest.fixture
def world(tmp_path):
    """Two data sets, pictures of many sizes and texts; the question says which line it is."""
    rng = random.Random(0)
    pictures = []
    for k in range(40):
        width, height = rng.randint(40, 130), rng.randint(40, 130)
        noise(width, height, k).save(tmp_path / f"{k}.png")
        keys = {"width": width, "height": height} if k % 2 else {}
        question = user(image(f"{k}.png", **keys), f"P{k:03d}")
        pictures.append(talk(question, assistant("x" * rng.randint(1, 60))))
    texts = [talk(user(f"T{k:03d}"), assistant("y" * rng.randint(1, 90))) for k in range(25)]
    write(tmp_path / "pictures.jsonl", pictures)
    write(tmp_path / "texts.jsonl", texts)
    return [(tmp_path / "pictures.jsonl", 3.0), (tmp_path / "texts.jsonl", 1.0)]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n\n" for record in records))


def steps(loader, n):
    return list(islice(loader, n))


def names(processor, batches):
    """Which lines the batches hold, in order."""
    found = []
    for batch in batches:
        for tokens in torch.tensor_split(batch["tokens"], batch["segments"][1:-1].long()):
            text = processor.tokenizer.decode(tokens)
            question = text.split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
            found.append(question[-4:])
    return found


# The plan


def cost(text, grids):
    return text**2 + 9.0 * sum(map(math.prod, grids))


def load_of(processor, batch):
    """The cost of a batch, from its tokens."""
    pads = torch.isin(batch["tokens"], torch.tensor(list(processor.pads.values())))
    total = 0
    for part in torch.tensor_split(pads, batch["segments"][1:-1].long()):
        visual = int(part.sum())
        total += (len(part) - visual) ** 2 + 36.0 * visual
    return total


def test_packs_are_full_and_of_even_cost(world, processor):
    for path, _ in world:  # many lines to choose from
        path.write_text(8 * path.read_text())
    loader = Loader(world, processor, pack_tokens=600, packs_per_step=4, flops=cost)
    for batches, info in steps(loader, 12):
        used = [len(batch["tokens"]) for batch in batches]
        loads = [load_of(processor, batch) for batch in batches]
        assert len(batches) == 4 and max(used) <= 600
        assert sum(used) == info["step_tokens"] >= 0.8 * 4 * 600
        assert info["visual_tokens"] == sum(len(batch["patches"]) for batch in batches) // 4
        assert info["flops"] == pytest.approx(sum(loads))
        assert info["skipped"] == {} and info["bad"] == []
        assert max(loads) <= 1.25 * min(loads)


def test_samples_are_drawn_by_weight_and_every_epoch_is_whole(world, processor):
    order = []
    for batches, info in Loader(world, processor, 600, 2, seed=3):
        order += names(processor, batches)
        if info["epoch"][0] > 4:
            break
    seen = Counter(order)
    pictures = sum(n for name, n in seen.items() if name[0] == "P")
    assert abs(pictures / len(order) - 0.75) < 0.08
    counts = [seen[f"P{k:03d}"] for k in range(40)]
    assert max(counts) - min(counts) <= 2 and min(counts) >= 3  # up to what the last step defers
    assert order[:20] != sorted(order[:20])
    other = names(processor, steps(Loader(world, processor, 600, 2, seed=4), 1)[0][0])
    assert other != order[: len(other)]


def test_the_draws_of_a_seed_stay_what_they_are(world, processor):
    # Golden values: a run goes on from an old state only if its draws never change.
    ((batches, info),) = steps(Loader(world, processor, 300, 1, seed=5), 1)
    assert names(processor, batches) == ["P038", "T004", "P035", "P031"]
    assert info["state"]["taken"] == [3, 2] and info["state"]["deferred"] == [[1, 13]]


def test_a_run_goes_on_with_exactly_the_next_sample(world, processor):
    full = steps(Loader(world, processor, 400, 2), 9)
    state = json.loads(json.dumps(full[3][1]["state"]))
    for workers in (0, 2):
        rest = steps(Loader(world, processor, 400, 2, state=state, workers=workers), 5)
        for (batches, info), (again, info_again) in zip(full[4:], rest, strict=True):
            assert info == info_again
            for batch, same in zip(batches, again, strict=True):
                assert len(batch) == len(same) == 6
                assert all(torch.equal(batch[key], same[key]) for key in batch)
    with pytest.raises(ValueError, match="state belongs to"):
        Loader(world, processor, 401, 2, state=state)


def test_an_iteration_that_was_left_goes_on(world, processor):
    full = steps(Loader(world, processor, 400, 2), 5)
    loader = Loader(world, processor, 400, 2, workers=1)
    steps(loader, 4)  # the worker ran ahead of the last step that was handed out
    batches, _ = next(iter(loader))
    assert names(processor, batches) == names(processor, full[4][0])


def test_a_step_takes_no_room_in_shared_memory(world, processor):
    iterator = iter(Loader(world, processor, 400, 8, workers=2))
    batches, _ = next(iterator)
    assert len(batches) == 8
    assert not any(tensor.is_shared() for batch in batches for tensor in batch.values())
    iterator.close()


def test_workers_load_on_when_the_whole_process_group_is_told_to_stop(world, processor):
    """As by Ctrl-C, timeout or Slurm: the run still has its step to finish and to save."""
    full = steps(Loader(world, processor, 400, 2), 9)
    iterator = iter(Loader(world, processor, 400, 2, workers=1))
    next(iterator)
    (worker,) = multiprocessing.active_children()
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker.pid, number)
    for batches, _ in full[1:]:
        again, _ = next(iterator)
        assert names(processor, again) == names(processor, batches)
    iterator.close()
    worker.join(20)
    assert worker.exitcode == 0


def packs_of_steps(world, processor, ranks, n, state=None):
    """n steps on so many ranks -> ([the packs of a step, sorted], the state after them).

    Where four packs do not come out even, blank ones make the ranks' shares equal.
    """
    runs = []
    for rank in range(ranks):
        loader = Loader(world, processor, 400, 4, rank=rank, world=ranks, state=state)
        runs.append(steps(loader, n))
    packs, states = [], []
    for parts in zip(*runs, strict=True):
        assert all(len(batches) == math.ceil(4 / ranks) for batches, _ in parts)
        in_step = [batch for batches, _ in parts for batch in batches]
        real = [batch for batch in in_step if (batch["labels"] != -100).any()]
        blank = [batch for batch in in_step if (batch["labels"] == -100).all()]
        assert len(real) == 4
        assert all(len(batch["tokens"]) < 10 and not len(batch["grids"]) for batch in blank)
        packs.append(sorted(names(processor, [batch]) for batch in real))
        states.append([info["state"] for _, info in parts])
    assert all(state == states[-1][0] for state in states[-1])
    return packs, json.loads(json.dumps(states[-1][0]))


def test_any_number_of_ranks_sees_the_same_steps(world, processor):
    whole, last = packs_of_steps(world, processor, 1, 10)
    packs, state = [], None
    for ranks in (2, 1, 4, 3, 6):
        more, state = packs_of_steps(world, processor, ranks, 2, state)
        packs += more
    assert packs == whole and state == last


def test_no_draw_is_lost_or_made_twice(world, processor):
    """What was in packs and what waits are, together, the first draws of each slot."""
    packs, state = packs_of_steps(world, processor, 4, 9)
    seen = Counter(name for step in packs for pack in step for name in pack)
    for d, i in state["deferred"]:
        seen[f"{'PT'[d]}{i:03d}"] += 1
    expected = Counter()
    draws = Loader(world, processor, 400, 4).draws
    for s, drawn in enumerate(state["drawn"]):
        for n in range(drawn):
            d, i = draws[4 * n + s]
            expected[f"{'PT'[d]}{i:03d}"] += 1
    assert seen == expected and sum(seen.values()) == sum(state["taken"])


def alone_and_together(argv):
    """In one of two processes: the steps are those that one rank sees, and states are whole."""
    (out,) = argv
    paths = [(Path(out) / "pictures.jsonl", 3.0), (Path(out) / "texts.jsonl", 1.0)]
    dist.init_process_group("gloo")
    rank, processor = dist.get_rank(), toy_processor()
    index.LARGE, index.CACHE = 0, Path(out) / "cache"
    laid_out = Counter()
    layout = type(processor).layout

    def count(self, *args, **keys):
        laid_out["lines"] += 1
        return layout(self, *args, **keys)

    type(processor).layout = count
    loader = Loader(paths, processor, 400, 4, rank=rank, world=2, workers=rank)
    mine = steps(loader, 3)
    by_two = laid_out.pop("lines")
    one = steps(Loader(paths, processor, 400, 4), 3)
    for (batches, info), (whole, of_one) in zip(mine, one, strict=True):
        packs = [names(processor, [batch]) for batch in whole]
        assert all(names(processor, [batch]) in packs for batch in batches)
        for key in ("state", "step_tokens", "flops", "sets", "shares", "epoch"):
            assert info[key] == of_one[key], key
    assert by_two < 0.7 * laid_out["lines"]  # each rank lays out its own packs' lines alone
    dist.destroy_process_group()


def test_ranks_plan_their_own_packs_and_tell_each_other_where_they_are(world, tmp_path):
    in_processes(alone_and_together, [tmp_path], ranks=2)
    assert len(list((tmp_path / "cache").iterdir())) == 2  # each file was indexed once


def test_packs_are_split_for_the_ranks():
    for whole in (False, True):
        assert split_packs(8192, 64, 8, whole) == (8192, 64)
    assert split_packs(4096, 1, 3, whole=False) == (1365, 3)
    assert split_packs(8192, 64, 128, whole=False) == (4096, 128)


def test_packs_of_released_sizes_are_as_long_on_any_number_of_ranks():
    assert split_packs(8192, 64, 12, whole=True) == (8192, 72)
    assert split_packs(8192, 64, 128, whole=True) == (8192, 128)
    assert first_packing("8b", 64, 12) == (8192, 72)
    assert first_packing("tiny", None, 8) == (2048, 8)


def test_a_state_of_another_version_is_refused(world, processor):
    state = Loader(world, processor, 400, 2).state
    del state["waiting"]
    with pytest.raises(ValueError, match="another version"):
        Loader(world, processor, 400, 2, state=state)


def test_what_was_drawn_of_each_set_is_said(world, processor):
    for _, info in steps(Loader(world, processor, 400, 2), 6):
        pictures, texts = info["state"]["taken"]
        assert info["sets"] == {"pictures": pictures, "texts": texts}
        assert info["epoch"] == [pictures / 40, texts / 25]
    assert abs(pictures / (pictures + texts) - 0.75) < 0.1


def test_the_share_of_each_set_in_a_step_is_said(world, processor):
    for batches, info in steps(Loader(world, processor, 400, 2), 6):
        samples, tokens = Counter(), Counter()
        for batch in batches:
            lengths = batch["segments"].diff().tolist()
            for name, length in zip(names(processor, [batch]), lengths, strict=True):
                samples[name[0]] += 1
                tokens[name[0]] += length
        shares = {}
        for letter, name in (("P", "pictures"), ("T", "texts")):
            shares[f"share_of_samples/{name}"] = samples[letter] / samples.total()
            shares[f"share_of_tokens/{name}"] = tokens[letter] / tokens.total()
        assert info["shares"] == pytest.approx(shares)


def test_a_pack_is_planned_when_it_is_asked_for(world, processor):
    """Not with all of the next step: with 64 packs of short lines that takes seconds."""
    loader = Loader(world, processor, 400, 8, workers=1)
    filled = []
    fill = loader._fill
    loader._fill = lambda s, slot: filled.append(s) or fill(s, slot)
    iterator = iter(loader)
    next(iterator)
    assert 8 <= len(filled) <= 8 + 3  # a worker is two packs ahead, and a note waits for one more
    iterator.close()


# Large sets


@pytest.fixture
def everything_is_large(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "LARGE", 0)
    monkeypatch.setattr(index, "CACHE", tmp_path / "cache")


@pytest.mark.parametrize("workers", [0, 2])
def test_large_sets_are_drawn_as_small_ones(world, processor, monkeypatch, tmp_path, workers):
    small = steps(Loader(world, processor, 400, 2), 8)
    monkeypatch.setattr(index, "LARGE", 0)
    monkeypatch.setattr(index, "CACHE", tmp_path / "cache")
    large = steps(Loader(world, processor, 400, 2, workers=workers), 3)
    state = json.loads(json.dumps(large[-1][1]["state"]))
    large += steps(Loader(world, processor, 400, 2, workers=workers, state=state), 5)
    for (batches, info), (same, info_of_large) in zip(small, large, strict=True):
        assert info == info_of_large
        for batch, other in zip(batches, same, strict=True):
            assert all(torch.equal(batch[key], other[key]) for key in batch)


def test_loading_processes_end_with_a_trainer_that_is_killed(tmp_path):
    """They were forked from it, and hold a GPU's memory as long as they live."""
    long = talk(user("x" * 300), assistant("y" * 300))
    write(tmp_path / "long.jsonl", [long] * 400)
    killed = f"""
import os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from conftest import toy_processor
from common.loader import Loader
steps = iter(Loader([({str(tmp_path / "long.jsonl")!r}, 1)], toy_processor(), 8000, 4, workers=2))
next(steps)
os.kill(os.getpid(), 9)
"""
    # The output ends when all have closed it: a process that stays is a timeout.
    done = subprocess.run(
        [sys.executable, "-c", killed], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60
    )
    assert done.returncode == -signal.SIGKILL, done.stdout.decode()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_program_that_a_plan_refuses_to_go_on_with_ends(tmp_path, workers):
    """So do its workers, which hear none of the signals that would end other processes."""
    missing = talk(user(image("none.png"), "x"), assistant("y"))
    write(tmp_path / "bad.jsonl", [missing] * 200)
    refused = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from conftest import toy_processor
from common.loader import Loader
loader = Loader([({str(tmp_path / "bad.jsonl")!r}, 1)], toy_processor(), 600, 2, workers={workers})
next(iter(loader))
"""
    done = subprocess.run(
        [sys.executable, "-c", refused], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60
    )
    said = done.stdout.decode()
    assert done.returncode == 1 and "100 of 100 samples cannot be used" in said
    assert "Traceback" not in said


def test_bad_lines_of_large_sets_are_failures(world, processor, everything_is_large):
    path = world[1][0]
    texts = path.read_text().splitlines()
    path.write_text("\n".join([*texts, "{", '{"messages": []}']) + "\n")
    loader = Loader(world[1:], processor, 300, 1, max_bad_share=0.5)
    bad = sum((info["bad"] for _, info in steps(loader, 20)), [])
    lines = {what.split(": ")[0] for what, _ in bad}
    assert lines == {f"{path}:{len(texts) + 1}", f"{path}:{len(texts) + 2}"}
    assert {reason for _, reason in bad} == {"bad_line"}
    with pytest.raises(SystemExit, match="samples cannot be used, the first: .*texts.jsonl:5"):
        steps(Loader(world[1:], processor, 300, 1), 90)


def test_a_folder_of_shards_is_trained_on(world, processor, tmp_path, everything_is_large):
    shards = tmp_path / "web"
    shards.mkdir()
    texts = world[1][0].read_text().split("\n\n")
    for k in range(5):
        (shards / f"{k}.jsonl").write_text("\n".join(texts[5 * k : 5 * k + 5]))
    loader = Loader([(shards, 1.0)], processor, 300, 1)
    seen = set()
    for batches, info in steps(loader, 20):
        seen |= set(names(processor, batches))
    assert seen == {f"T{k:03d}" for k in range(25)} and list(info["sets"]) == ["web"]


# Work that is done once


def test_a_line_is_checked_once_and_laid_out_once_for_each_draw(world, processor, monkeypatch):
    checked, laid_out = Counter(), Counter()
    layout = type(processor).layout

    def count_check(record):
        checked[json.dumps(record)] += 1

    def count_layout(self, conversation, *args, **keys):
        laid_out[json.dumps(conversation)] += 1
        return layout(self, conversation, *args, **keys)

    monkeypatch.setattr(type(processor), "layout", count_layout)
    monkeypatch.setattr("data.check_conversation", count_check)
    loader = Loader(world, processor, 600, 2, check=count_check)
    drawn = []
    for batches, _ in steps(loader, 20):  # several epochs
        drawn += names(processor, batches)
    assert len(checked) == 65 and set(checked.values()) == {1}
    # Only what waits for the next step was laid out and is in no pack yet.
    waiting = len(loader.state["deferred"])
    assert len(drawn) <= sum(laid_out.values()) <= len(drawn) + waiting
    assert len(drawn) > 130


def test_lines_are_refused_by_the_callers_check(world, processor):
    def check_pair(record):
        if isinstance(record["messages"][0]["content"], str):
            raise ValueError("one picture is expected")

    write(world[1][0], [{"messages": [{"role": "user", "content": "x"}]}])
    with pytest.raises(ValueError, match="texts.jsonl:1: one picture is expected"):
        Loader(world, processor, 600, 2, check=check_pair)
    assert len(Loader(world[:1], processor, 600, 2, check=check_pair).files[0]) == 40


# What fails


def test_bad_files_are_skipped_counted_and_named(world, processor, tmp_path, caplog):
    (tmp_path / "1.png").write_bytes(b"broken")
    (tmp_path / "3.png").unlink()
    (tmp_path / "2.png").unlink()  # without width in its line: found when it is planned
    reasons, bad = Counter(), []
    with caplog.at_level(logging.WARNING):
        for batches, info in steps(Loader(world, processor, 600, 2, max_bad_share=0.5), 12):
            reasons.update(info["skipped"])
            bad += info["bad"]
            assert not {"P001", "P002", "P003"} & set(names(processor, batches))
    assert reasons.keys() == {"unsupported", "missing"} and sum(reasons.values()) == len(bad)
    assert any("pictures.jsonl:3: 1.png" in what for what, _ in bad)
    assert "pictures.jsonl:3: 1.png" in caplog.text


def test_failures_add_up_over_ranks(world, processor, tmp_path):
    for k in range(8):  # half of them are found by the plan
        (tmp_path / f"{k}.png").unlink()
    settings = dict(pack_tokens=400, packs_per_step=2, max_bad_share=0.5)
    one = steps(Loader(world[:1], processor, **settings), 4)
    two = [steps(Loader(world[:1], processor, **settings, rank=r, world=2), 4) for r in range(2)]
    for k, (_, info) in enumerate(one):
        parts = two[0][k][1]["bad"] + two[1][k][1]["bad"]
        assert sorted(parts) == sorted(info["bad"])
    assert sum(len(info["bad"]) for _, info in one) > 4


def test_too_many_bad_files_stop_the_run(world, processor, tmp_path):
    for k in range(0, 20):
        (tmp_path / f"{k}.png").unlink()
    with pytest.raises(SystemExit, match=r"samples cannot be used, the first: .*missing.*; more"):
        steps(Loader(world, processor, 600, 2), 60)


def test_a_run_of_few_samples_needs_most_of_them(world, processor, tmp_path):
    """Sizes that lines give are believed by the plan: what is missing is found when it decodes."""
    records = []
    for k in range(20):
        item = image(f"{k}.png", width=60, height=60)
        records.append(talk(user(item, f"P{k:03d}"), assistant("x")))
    write(world[0][0], records)
    tokens = processor.layout(records[0], tmp_path).tokens
    for k in range(20):
        (tmp_path / f"{k}.png").unlink()
    for packs in (4, 12, 60):  # so many samples are tried
        pictures = Loader(world[:1], processor, tokens, packs)
        said = f"{packs} of {packs} samples cannot be used, the first: .*pictures.jsonl"
        with pytest.raises(SystemExit, match=said):
            steps(pictures, 1)


def test_a_few_failures_among_few_samples_end_nothing(world, processor, tmp_path):
    (tmp_path / "1.png").unlink()
    (tmp_path / "3.png").write_text("none")
    loader = Loader(world[:1], processor, 600, 2)
    while loader.tried < 40:  # each line once
        steps(loader, 1)
    assert 1 <= len(loader.failures) <= 4
    assert all("1.png: missing" in why or "3.png: unsupp" in why for why in loader.failures)


@pytest.mark.parametrize("workers", [0, 2])  # with 2, planned in a process of its own
@pytest.mark.parametrize("max_bad_share", [0.05, 1])
def test_a_step_that_never_fills_is_an_error(world, processor, tmp_path, max_bad_share, workers):
    for k in range(0, 40):
        (tmp_path / f"{k}.png").unlink()
    records = [talk(user(image(f"{k}.png"), "x"), assistant("y")) for k in range(40)]
    write(world[0][0], records)
    with pytest.raises(SystemExit, match="100 of 100 samples cannot be used"):
        loader = Loader(
            world[:1], processor, 600, 2, workers=workers, max_bad_share=max_bad_share
        )
        steps(loader, 1)


def test_a_pack_that_lost_every_sample_still_runs(world, processor, tmp_path):
    records = []
    for k in range(1, 40, 2):
        (tmp_path / f"{k}.png").unlink()
        item = image(f"{k}.png", width=60, height=60)
        records.append(talk(user(item, f"P{k:03d}"), assistant("x")))
    write(world[0][0], records)
    ((batches, info),) = steps(Loader(world[:1], processor, 300, 2, max_bad_share=1), 1)
    assert len(batches) == 2 and info["skipped"]["missing"] > 0
    for batch in batches:
        assert (batch["labels"] == -100).all() and 0 < len(batch["tokens"]) < 20


def test_wrong_sizes_in_a_line_cannot_break_the_pack(world, processor, tmp_path):
    line = talk(user(image("1.png", width=28, height=28), "P001"), assistant("x"))
    write(world[0][0], [line])
    noise(500, 500).save(tmp_path / "1.png")
    planned = processor.layout(line, tmp_path).tokens
    ((batches, info),) = steps(Loader(world[:1], processor, planned, 2, max_bad_share=0.5), 1)
    assert info["skipped"] == {"too_long": 2}
    assert max(len(batch["tokens"]) for batch in batches) <= planned
    what, _ = info["bad"][0]
    assert "pictures.jsonl:1" in what and "width, height or duration" in what
    # Where the pack has room, it is taken.
    ((batches, info),) = steps(Loader(world[:1], processor, planned + 12, 1), 1)
    assert info["skipped"] == {} and batches[0]["grids"].tolist() == [[1, 8, 8]]


def test_pictures_too_large_for_a_pack_are_made_smaller(world, processor, tmp_path):
    """A picture's budget may be more than a pack: such lines must not vanish from training."""
    noise(500, 500).save(tmp_path / "0.png")
    line = talk(user(image("0.png"), "P000"), assistant("x"))
    write(world[0][0], [line])
    size = processor.layout(line, tmp_path).tokens - 1
    for batches, info in steps(Loader(world[:1], processor, size, 2), 3):
        assert info["skipped"] == {}
        for batch in batches:
            assert names(processor, [batch]) == ["P000"]
            assert batch["grids"].tolist() == [[1, 6, 6]] and len(batch["tokens"]) <= size


CAMERAS = [  # width, height, seconds, frames a second
    (4000, 3000), (6000, 4000), (3024, 4032), (8064, 6048), (16382, 3628), (640, 480), (320, 240),
    (1280, 720, 6, 30), (1920, 1080, 60, 30), (3840, 2160, 600, 60), (640, 360, 7200, 25),
    (1080, 1920, 20, 30), (176, 144, 0.2, 15), (720, 576, 10800, 25),
]


@pytest.mark.parametrize("pack", [8192, 4096, 2048])
def test_what_cameras_take_fits_in_the_packs_of_released_sizes(tmp_path, pack):
    """split_packs halves the packs where there are many ranks."""
    processor = Processor(ROOT / "toyworld" / "vocab.json", **SCALE["8b"].budget)
    records = []
    for k, (width, height, *clip) in enumerate(CAMERAS):
        keys = {"width": width, "height": height}
        item = image("a.jpg", **keys)
        if clip:
            keys |= {"duration": clip[0], "fps_source": clip[1]}
            item = {"type": "video", "video": "a.mp4", **keys}
        records.append(talk(user(item, f"C{k:03d}"), assistant("x")))
    write(tmp_path / "a.jsonl", records)
    loader = Loader([(tmp_path / "a.jsonl", 1)], processor, pack, 64)
    for i, record in enumerate(records):
        example = loader._lay_out(0, i)
        whole = processor.layout(record, tmp_path).tokens
        assert example.tokens <= pack
        # no smaller than need be: a clip's frames are all smaller at once, or one fewer
        assert example.tokens >= min(whole, 0.8 * pack)


def test_too_much_text_is_counted_and_named(world, processor):
    long = talk(user("T999"), assistant("q" * 3000))
    texts = [talk(user(f"T{k:03d}"), assistant("y")) for k in range(60)]
    write(world[1][0], [long, *texts])
    bad = []
    for batches, info in steps(Loader(world[1:], processor, 400, 2), 15):
        assert "T999" not in names(processor, batches)
        assert info["skipped"] == ({"too_long": len(info["bad"])} if info["bad"] else {})
        bad += info["bad"]
    assert bad and all("texts.jsonl:1: at least" in what for what, _ in bad)
    with pytest.raises(SystemExit, match=r"texts.jsonl:\d+: at least \d+ tokens, where 20 fit"):
        steps(Loader(world[1:], processor, 20, 2), 1)


def test_bad_lines_of_a_file_are_named(tmp_path, processor):
    path = tmp_path / "d.jsonl"
    good = json.dumps(talk(user("x"), assistant("y")))
    no_answer = json.dumps(talk(user("x")))
    for wrong, why in (("{", "Expecting"), ('{"messages": 3}', "messages"), (no_answer, "no assi")):
        path.write_text("\n".join([good, good, wrong, good]))
        with pytest.raises(ValueError, match=f"d.jsonl:3: .*{why}"):
            Loader([(path, 1)], processor, 400, 1)
    path.write_text("\n".join([good] * 30 + ["{"] + [good] * 30))
    loader = Loader([(path, 1)], processor, 400, 1)  # few enough
    assert len(loader.files[0]) == 60
    with pytest.raises(FileNotFoundError):
        Loader([(tmp_path / "none.jsonl", 1)], processor, 400, 1)


# Preferences


def preference(k, **keys):
    question = talk(user(image(f"{k}.png"), f"P{k:03d}"))
    return question | {"chosen": "x" * k, "rejected": "no", "reference": [-1.0 * k, -2.0]} | keys


def test_both_answers_of_a_preference_stand_side_by_side(world, processor):
    write(world[0][0], [preference(k) for k in range(20)])
    for batches, _ in steps(Loader(world[:1], processor, 300, 2), 5):
        for batch in batches:
            assert len(batch["tokens"]) <= 300
            found = names(processor, [batch])
            assert found[::2] == found[1::2]
            assert batch["reference"].shape == (len(found) // 2, 2)
            for name, (chosen, _) in zip(found[::2], batch["reference"].tolist(), strict=True):
                assert chosen == -int(name[1:])
    write(world[0][0], [preference(k, reference=None) for k in range(20)])
    ((batches, _),) = steps(Loader(world[:1], processor, 300, 1), 1)
    assert "reference" not in batches[0]


def test_both_answers_of_a_preference_share_the_pack(world, processor, tmp_path):
    noise(500, 500).save(tmp_path / "1.png")
    write(world[0][0], [preference(1)])
    ((batches, info),) = steps(Loader(world[:1], processor, 1000, 1), 1)
    pair = int(batches[0]["segments"][2])
    ((batches, info),) = steps(Loader(world[:1], processor, pair - 1, 1), 1)
    assert info["skipped"] == {}
    assert batches[0]["grids"].tolist() == [[1, 6, 6]] * 2  # the same picture at the same size


def test_a_preference_of_wrong_sizes_cannot_break_the_pack(world, processor, tmp_path):
    noise(500, 500).save(tmp_path / "1.png")
    question = talk(user(image("1.png", width=56, height=56), "P001"))
    write(world[0][0], [question | {"chosen": "x", "rejected": "no"}])
    answers = [talk(*question["messages"], assistant(text)) for text in ("x", "no")]
    planned = sum(processor.layout(answer, tmp_path).tokens for answer in answers)
    # Each half of the pair has room for 12 tokens more, but not both.
    ((batches, info),) = steps(Loader(world[:1], processor, planned + 12, 1), 1)
    assert info["skipped"] == {"too_long": 1} and len(batches[0]["tokens"]) < 20
    ((batches, info),) = steps(Loader(world[:1], processor, planned + 24, 1), 1)
    assert info["skipped"] == {} and len(batches[0]["tokens"]) == planned + 24


def test_a_preference_fails_as_a_whole(world, processor, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"broken")
    answer = [{"type": "image", "image": "bad.png", "width": 56, "height": 56}]
    write(world[0][0], [preference(1), preference(2, rejected=answer)])
    settings = dict(pack_tokens=300, packs_per_step=1, max_bad_share=0.9)
    for batches, info in steps(Loader(world[:1], processor, **settings), 3):
        assert set(names(processor, batches)) <= {"P001"}
        assert set(info["skipped"]) <= {"unsupported"}
