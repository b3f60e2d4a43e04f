"""common/threads.py: when waiting threads spin and when they sleep; nothing else changes."""

import os
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from common import threads
from common.threads import ALONE, SHARED, Watch, be_counted, seconds_in_line, watch_cores
from stage import in_processes

HAS_SCHEDSTAT = os.path.exists("/proc/self/schedstat")
needs_linux = pytest.mark.skipif(not HAS_SCHEDSTAT, reason="needs Linux's schedstat")


@pytest.fixture
def events(monkeypatch):
    """The events of the extra threads, in the order in which they started; none really starts."""
    started = []

    class Recorder:
        def __init__(self, target, args, daemon):
            assert target is be_counted
            assert daemon, "it must not keep the process alive"
            self.event = args[0]

        def start(self):
            started.append(self.event)

    fake = SimpleNamespace(Thread=Recorder, Event=threading.Event)
    monkeypatch.setattr(threads, "threading", fake)
    return started


def test_extra_threads_come_above_one_threshold_and_go_below_the_other(events):
    watch = Watch()
    watch.decide(SHARED)
    assert not events, "not above it yet"
    watch.decide(SHARED + 0.01)
    assert len(events) == 1
    watch.decide(5.0)
    assert len(events) == 1, "one pair is enough"
    watch.decide((SHARED + ALONE) / 2)
    watch.decide(ALONE)
    assert not events[0].is_set(), "between the two all stays as it is"
    watch.decide(ALONE - 0.01)
    assert events[0].is_set()
    watch.decide(0.0)
    assert len(events) == 1

    watch.decide(1.0)
    assert len(events) == 2
    assert not events[1].is_set(), "shared once more: new ones, that stay"


def test_the_extra_threads_stay_until_the_machine_is_our_own_again():
    watch = Watch()
    before = set(threading.enumerate())
    watch.decide(1.0)
    (extra,) = set(threading.enumerate()) - before
    extra.join(0.2)
    assert extra.is_alive()
    watch.decide(0.0)
    extra.join(30)
    assert not extra.is_alive()


def test_the_watch_measures_shares_of_the_time(monkeypatch):
    """Two looks, 2 s apart by the clock: 1 s in line is a half, then nothing."""
    seen = []
    clock = iter([10.0, 12.0, 14.0])
    line = iter([3.0, 4.0, 4.0])

    def sleep(seconds):
        if len(seen) == 2:
            raise StopIteration

    fake = SimpleNamespace(monotonic=lambda: next(clock), sleep=sleep)
    monkeypatch.setattr(threads, "time", fake)
    monkeypatch.setattr(threads, "seconds_in_line", lambda: next(line))
    monkeypatch.setattr(Watch, "decide", lambda self, share: seen.append(share))
    with pytest.raises(StopIteration):
        Watch().run()
    assert seen == [0.5, 0.0]


def test_time_in_line_is_the_second_number_of_each_threads_schedstat(tmp_path, monkeypatch):
    """/proc/PID/task/TID/schedstat: nanoseconds on a core, nanoseconds in line, turns."""
    for name, text in (("1", "9000000000 1500000000 7\n"), ("2", "0 500000000 1\n"), ("3", "")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "schedstat").write_text(text)  # an empty one: a thread that has ended
    monkeypatch.setattr(threads, "Path", {"/proc/self/task": tmp_path}.get)
    assert seconds_in_line() == 2.0


def wait_in_line(argv):
    """Two processes that never rest, on one core: each waits while the other runs."""
    core = min(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    before = seconds_in_line()
    parent = os.getpid()
    other = os.fork()
    deadline = time.monotonic() + 30
    if other == 0:
        while time.monotonic() < deadline and os.getppid() == parent:
            pass
        os._exit(0)
    while seconds_in_line() < before + 0.05:
        assert time.monotonic() < deadline, "a process that waited has not been in line"
    os.kill(other, 9)


@needs_linux
def test_waiting_for_a_core_is_time_in_line():
    in_processes(wait_in_line)


def watches() -> int:
    return sum(isinstance(thread, Watch) for thread in threading.enumerate())


def start_watches(argv):
    torch.set_num_threads(1)
    watch_cores()
    assert watches() == 0, "one thread waits for nobody"
    torch.set_num_threads(2)
    watch_cores()
    watch_cores()
    assert watches() == 1
    assert all(thread.daemon for thread in threading.enumerate() if isinstance(thread, Watch))


@needs_linux
def test_one_watch_for_several_threads_and_none_for_one():
    in_processes(start_watches)


def compute() -> list[torch.Tensor]:
    """Sums over many elements, whose last bits depend on the order in which they are added."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 400, generator=generator, requires_grad=True)
    w = torch.randn(400, 500, generator=generator)
    loss = ((x @ w).softmax(-1) * w.sum(0)).sum() + (x * 0.1).exp().sum()
    loss.backward()
    return [loss.detach(), x.grad]


def compute_beside_extra_threads(argv):
    torch.set_num_threads(2)
    plain = compute()
    until = threading.Event()
    extra = threading.Thread(target=be_counted, args=(until,))
    tasks = len(os.listdir("/proc/self/task"))
    extra.start()
    deadline = time.monotonic() + 30
    while len(os.listdir("/proc/self/task")) < tasks + 2:
        assert time.monotonic() < deadline, "OpenMP made no thread to be counted"
    counted = compute()
    until.set()
    extra.join()
    for a, b in zip(plain, counted):
        assert torch.equal(a, b)


@needs_linux
def test_results_are_the_same_to_the_last_bit_beside_extra_threads():
    in_processes(compute_beside_extra_threads)
