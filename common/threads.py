"""A machine that is also used for other things: how waiting threads behave beside other programs.

OpenMP's threads wait for each other at the end of every operation, thousands of times a step. One
that spins is back at once, but beside another program it spins on the core that the thread it
waits for needs: training falls to a tenth of its speed. One that sleeps gives the core away, and
comes back a little later. So they should spin on a machine of their own, and sleep on a shared one.

libgomp decides that by counting: with more OpenMP threads in a process than there are cores,
waiting threads hardly spin. Linux tells how long our threads stood in line for a core. When that is
much, one more pair of OpenMP threads is made, which does nothing but be counted. No sum is added up
in another order, so results stay the same to the last bit.
"""

import threading
import time
from pathlib import Path

import torch

SHARED = 0.3  # ours: in line for this share of the time. A loader of our own makes it 0.1, another
ALONE = 0.2  # program on two cores 0.6. Below the second the machine is our own again.


def seconds_in_line() -> float:
    """How long this process's threads have been ready to run and had no core."""
    nanoseconds = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        try:
            nanoseconds += int(path.read_text().split()[1])
        except (OSError, IndexError):
            continue  # a thread that has just ended
    return nanoseconds / 1e9


class Watch(threading.Thread):
    """Looks once a second whether the machine is shared, and lets waiting threads sleep if so."""

    def __init__(self):
        super().__init__(daemon=True)
        self.alone_again = None  # an event while the extra threads are there

    def run(self):
        line = seconds_in_line()
        clock = time.monotonic()
        while True:
            time.sleep(1)
            line_now = seconds_in_line()
            now = time.monotonic()
            self.decide((line_now - line) / (now - clock))
            line = line_now
            clock = now

    def decide(self, share: float):
        if share > SHARED and self.alone_again is None:
            self.alone_again = threading.Event()
            threading.Thread(target=be_counted, args=(self.alone_again,), daemon=True).start()
        elif share < ALONE and self.alone_again is not None:
            self.alone_again.set()
            self.alone_again = None


def be_counted(until: threading.Event):
    torch.ones(1 << 20).sum()  # large enough for several threads: OpenMP makes this thread's own
    until.wait()  # they go when this thread ends


def watch_cores():
    """Starts the watch, once, where threads wait for each other and Linux tells how long."""
    watched = any(isinstance(thread, Watch) for thread in threading.enumerate())
    if torch.get_num_threads() > 1 and Path("/proc/self/schedstat").exists() and not watched:
        Watch().start()
