"""common/processes.py: ranks that talk, and that end soon after one of them has died."""

import ctypes
import os
import signal
import sys
import threading
import time
from contextlib import suppress

import pytest
import torch
import torch.distributed as dist

from common import processes
from common.loader import end_with_the_trainer
from common.processes import trim_heap
from common.run import arguments, start
from stage import in_processes, skip_without_gpus
from tools.soak import resident


def joined(out: str, device="cpu"):
    processes.GRACE = 0.2  # a test need not wait for errors that reach the terminal
    args = arguments("").parse_args(["--out", out, "--device", device, "--threads", "1"])
    return start(args, "small")


def wait_for_ever(run):
    """As in a collective with a dead rank under NCCL: no error comes, no signal is taken up."""
    if run.main:
        os.kill(os.getpid(), signal.SIGTERM)  # torchrun's, to those that are left
    threading.Event().wait(80)


def test_ranks_end_when_one_is_killed(tmp_path):
    codes = [1, -signal.SIGKILL, 1]
    said = in_processes(one_is_killed, [tmp_path], ranks=3, code=codes)
    for rank in (0, 2):
        assert f"rank {rank} ends: another rank has failed or was killed" in said


def one_is_killed(argv):
    run = joined(*argv)
    if run.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    wait_for_ever(run)


def test_a_death_goes_round_before_the_first_rank_has_ended(tmp_path):
    codes = [1, 1, 1, -signal.SIGKILL, 1]
    said = in_processes(neighbours_outlast_the_others, [tmp_path], ranks=5, code=codes)
    assert said.count("another rank has failed or was killed") == 2


def neighbours_outlast_the_others(argv):
    """Rank 3 is killed; 2 and 4, which a ring would tell first, end only after rank 0."""
    run = joined(*argv)
    fork_a_worker()
    processes.GRACE = 1000 if run.rank in (2, 4) else 0.2
    pids = run.gather_objects(os.getpid())
    if run.rank == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if run.rank in (0, 1):
        wait_for_ever(run)
    with suppress(ProcessLookupError):
        while True:
            os.kill(pids[0], 0)  # asks whether it is there
            time.sleep(0.1)
    os._exit(1)


def fork_a_worker():
    """As the loader does: it holds this process's connections open until it ends."""
    ready, tell = os.pipe()
    if os.fork() == 0:
        end_with_the_trainer(0)
        os.write(tell, b"1")
        time.sleep(1000)
        os._exit(0)
    os.read(ready, 1)


def test_ranks_end_when_one_has_failed_and_its_own_lines_come_first(tmp_path):
    said = in_processes(one_fails, [tmp_path], ranks=2, code=1)
    assert said.index("ZeroDivisionError") < said.index("rank 0 ends: another rank has failed")
    assert "rank 1 ends" not in said


def one_fails(argv):
    run = joined(*argv)
    if run.rank == 1:
        fail()
    wait_for_ever(run)


def fail():
    """What python does with an error that nobody catches; these processes end otherwise."""
    try:
        _ = 1 / 0
    except ZeroDivisionError as e:
        sys.last_value = e
        sys.excepthook(*sys.exc_info())
        processes.leave_processes()


def test_an_error_that_all_ranks_raise_is_all_they_say(tmp_path):
    said = in_processes(all_fail, [tmp_path], ranks=2, code=1)
    assert said.count("RuntimeError: cannot divide: rank 1: ZeroDivisionError") == 2
    assert "ends:" not in said


def all_fail(argv):
    run = joined(*argv)
    run.attempt("cannot divide", lambda: 1 / (1 - run.rank))


def test_ranks_may_leave_one_by_one(tmp_path):
    in_processes(leave_one_by_one, [tmp_path], ranks=3)


def leave_one_by_one(argv):
    run = joined(*argv)
    run.close()
    if run.main:
        assert processes.heart.thread.join(60) is None, "the first to leave tells all"
        assert not processes.heart.thread.is_alive()
    processes.leave_processes()
    assert not dist.is_initialized()


def test_the_groups_do_not_mix_up_words(tmp_path):
    in_processes(talk_at_once, [tmp_path], ranks=2)


def talk_at_once(argv):
    run = joined(*argv)

    def background():
        for i in range(200):
            assert run.background.gather_objects(("saving", i)) == [("saving", i)] * 2

    thread = threading.Thread(target=background)
    thread.start()
    for i in range(200):
        assert run.gather_objects(("words", i)) == [("words", i)] * 2
        assert run.sum(i) == 2 * i
    thread.join()
    run.close()


@pytest.mark.cuda
@pytest.mark.parametrize("death, code", [("kill", -signal.SIGKILL), ("error", 1)])
def test_a_collective_between_gpus_does_not_outlive_a_rank(tmp_path, death, code):
    skip_without_gpus("cuda", 2)
    said = in_processes(dies_before_nccl, [tmp_path, death], ranks=2, code=[1, code])
    assert "rank 0 ends: another rank has failed or was killed" in said


def dies_before_nccl(argv):
    out, death = argv
    run = joined(out, "cuda")
    run.sum(torch.ones(1, device=run.device))
    if run.main:
        run.sum(torch.ones(1, device=run.device)).item()  # waits in CUDA, for minutes
    elif death == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        fail()


# ----------------------------------------------------------------------------------------------
# memory


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the heap is not glibc's"
)
def test_gaps_in_the_heap_go_back_to_the_system():
    """120 MB in blocks that malloc takes from its heap: every fiftieth stays, and holds the rest."""
    blocks = [bytearray(b"x") * 60_000 for _ in range(2000)]
    left = blocks[::50]
    del blocks
    before = resident(os.getpid())
    trim_heap()
    assert before - resident(os.getpid()) > 80e6
    assert all(block == b"x" * 60_000 for block in left)
