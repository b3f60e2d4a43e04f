"""The processes of a run: how they join, talk, notice that one of them has died, and leave.

One process needs nothing of this. Under torchrun there are two networks: NCCL between GPUs for
tensors, and gloo between CPUs for counts, objects and files, which never stops a GPU.
"""

import atexit
import ctypes
import datetime
import os
import sys
import threading
import time
from contextlib import suppress

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException

# A collective on the GPU takes milliseconds: torch's own default finds a rank that is stuck.
NCCL_TIMEOUT = datetime.timedelta(minutes=10)
# Words may have to wait: while rank 0 writes a phase's data, or a slow disk takes a checkpoint.
WORDS_TIMEOUT = datetime.timedelta(hours=12)
# ours: longer than any call that keeps python's threads from running; a lost machine is found then
HEART_TIMEOUT = datetime.timedelta(minutes=5)

# gloo groups of all ranks by use. In each the order of calls must be the same on all ranks, so
# what runs in a thread of its own needs a group of its own.
groups = {}
heart = None


def join_processes(device: torch.device):
    if "RANK" not in os.environ or dist.is_initialized():
        return
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        timeout=NCCL_TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )
    for use in ("words", "saving"):
        groups[use] = dist.new_group(backend="gloo", timeout=WORDS_TIMEOUT)
    global heart
    heart = Heart(dist.new_group(backend="gloo", timeout=HEART_TIMEOUT))
    atexit.register(leave_processes)


def leave_processes():
    """At exit: tells the others, and drops the groups.

    After an exception those of NCCL cannot be dropped: that may wait for ranks that never come.
    """
    failed = hasattr(sys, "last_value")  # of the traceback that python has printed
    heart.stop(FAILED if failed else LEFT)
    if failed:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    dist.destroy_process_group()
    # gloo's threads need the interpreter once more to drop their last tensors; when it is gone
    # before them, they abort the process after all work is done
    time.sleep(0.3)


def trim_heap():
    """Gives free memory in malloc's heap back to the system, where that is glibc's.

    Packs of ever new shapes leave gaps in it, between them copies for checkpoints: a long run would
    grow for hours.
    """
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


# ----------------------------------------------------------------------------------------------
# talking


class Peers:
    """This process among all ranks, in one of `groups`: rank, world, main (rank 0).

    All ranks call every method, in the same order.
    """

    def __init__(self, use: str):
        joined = dist.is_initialized()
        self.group = groups.get(use)
        self.rank = dist.get_rank() if joined else 0
        self.world = dist.get_world_size() if joined else 1
        self.main = self.rank == 0

    def gather_objects(self, thing) -> list:
        """One object per rank, in rank order; also a barrier."""
        things = [thing] * self.world
        if dist.is_initialized():
            dist.all_gather_object(things, thing, group=self.group)
        return things

    def gather(self, values) -> list[list[float]]:
        """One list of floats per rank, in rank order; also a barrier."""
        return self.gather_objects([float(v) for v in values])

    def merge(self, local: dict) -> dict:
        """The union of all ranks' dicts."""
        union = {}
        for part in self.gather_objects(local):
            union |= part
        return union

    def barrier(self):
        self.gather_objects(None)

    def meet_or_end(self, why: str):
        """A barrier for a rank that has failed where others may not have: those may wait for it in
        a collective that it has left, minutes under NCCL.

        Where they do not come, this process ends and says why; then the others do, see Heart.
        """

        def end():
            print(f"rank {self.rank} ends: {why}", file=sys.stderr, flush=True)
            os._exit(1)

        ending = threading.Timer(GRACE, end)
        ending.start()
        try:
            self.barrier()
        finally:
            ending.cancel()

    def sum(self, x):
        """Sum over ranks of a number, or of a tensor (a new one), which stays on its device."""
        if not isinstance(x, torch.Tensor):
            return sum(self.gather_objects(x))
        x = x.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(x)
        return x

    def attempt(self, doing: str, work):
        """work() on every rank; where it fails on any, all raise the same RuntimeError."""
        result = error = None
        try:
            result = work()
        except CheckpointException as e:
            cause = next(iter(e.failures.values()))[0]
            error = f"{type(cause).__name__}: {cause}"
        except (Exception, SystemExit) as e:
            error = f"{type(e).__name__}: {e}"
        errors = [f"rank {i}: {e}" for i, e in enumerate(self.gather_objects(error)) if e]
        if errors:
            raise RuntimeError(f"{doing}: {' | '.join(errors)}")
        return result


# ----------------------------------------------------------------------------------------------
# the death of one


ALIVE, LEFT, FAILED = range(3)
BEAT = 0.5  # seconds between two beats
GRACE = 10.0  # ours: seconds in which an error that all ranks raise has reached the terminal


class Heart:
    """A thread on every rank, which ends this process soon after another one has died.

    The training could not: a rank that waits in a collective for a dead one hears neither errors,
    under NCCL, nor torchrun's SIGTERM, which python takes up only between two calls. Twice a
    second the threads of all ranks meet; where one is gone, its closed connection is an error.

    They meet all with all. In a ring, as gloo sums, only the dead one's neighbours would hear of
    it, and their own only when these have ended: the loader's forked workers hold a process's
    connections open beyond its own closing of them.

    group: of gloo, which nobody else uses.
    """

    def __init__(self, group):
        self.group = group
        self.state = ALIVE
        self.ending = threading.Event()
        self.thread = threading.Thread(target=self.beat, daemon=True)
        self.thread.start()

    def beat(self):
        why = ""
        worst = ALIVE
        while worst == ALIVE:
            self.ending.wait(BEAT)
            own = torch.full((dist.get_world_size(self.group),), self.state)  # a copy for each
            states = torch.empty_like(own)  # of all ranks
            try:
                dist.all_to_all_single(states, own, group=self.group)
                worst = states.max().item()
            except RuntimeError as e:
                worst, why = FAILED, f" ({e})"
        if worst == FAILED and not self.ending.wait(GRACE):
            print(
                f"rank {dist.get_rank()} ends: another rank has failed or was killed, "
                f"its own lines say why{why}",
                file=sys.stderr, flush=True,
            )
            os._exit(1)

    def stop(self, state: int):
        """This process ends by itself: LEFT or FAILED."""
        self.state = state
        self.ending.set()
        self.thread.join(GRACE)
