"""Which line is drawn when: a mixture of data sets by weight, each in a new order every epoch.

    draws = Draws(seed=0, weights=[3.0, 1.0], lengths=[40, 25])
    d, i = draws[1000]        # the 1001st draw of the run: line i of data set d

Any draw is there without those before it: it depends on the seed, the weights and the lengths
alone. So whoever goes on, in whatever way the draws are shared out, needs no more than a number.
"""

from functools import lru_cache

import numpy as np

BLOCK = 4096  # random numbers drawn at once
WHOLE = 2**18  # ours: the order of so many lines is in memory, of more each is computed by itself


class Draws:
    """A sequence without end of (data set, line)."""

    def __init__(self, seed: int, weights: list[float], lengths: list[int]):
        self.seed = seed
        self.lengths = lengths
        edges = np.cumsum(weights)
        self.edges = tuple((edges / edges[-1]).tolist())
        self.before = [np.zeros(len(lengths), int)]  # draws of each data set before each block

    def __getitem__(self, k: int) -> tuple[int, int]:
        """A data set by weight, and the next line in the order of its epoch."""
        block, k = divmod(k, BLOCK)
        while len(self.before) <= block:
            sets = sets_block(self.seed, self.edges, len(self.before) - 1)
            counts = np.bincount(sets, minlength=len(self.lengths))
            self.before.append(self.before[-1] + counts)
        sets = sets_block(self.seed, self.edges, block)
        d = int(sets[k])
        taken = int(self.before[block][d] + np.count_nonzero(sets[:k] == d))
        n = self.lengths[d]
        epoch, k = divmod(taken, n)
        return d, line_in_order(self.seed, d, epoch, n, k)


def generator(*key: int) -> np.random.Generator:
    """Random numbers that depend on the key alone: any epoch is there without those before it."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


@lru_cache
def sets_block(seed: int, edges: tuple[float, ...], block: int) -> np.ndarray:
    """The data sets of a block of draws, (BLOCK,). edges: the shares of the sets, summed up."""
    return np.searchsorted(edges, generator(seed, 0, block).random(BLOCK), side="right")


def line_in_order(seed: int, d: int, epoch: int, n: int, k: int) -> int:
    """The k-th of n lines in the order of an epoch of data set d."""
    if n <= WHOLE:
        return int(epoch_order(seed, d, epoch, n)[k])
    # A Feistel network permutes all numbers of 2 * half bits, whatever its rounds compute. Those
    # that are no line are passed on until they are one: so lines are permuted among themselves.
    half = ((n - 1).bit_length() + 1) // 2
    while True:
        left, right = k >> half, k % 2**half
        for key in order_keys(seed, d, epoch):
            mixed = (right ^ key) * 0x9E3779B97F4A7C15 % 2**64  # 2^64 over the golden ratio
            left, right = right, left ^ (mixed >> (64 - half))
        k = left << half | right
        if k < n:
            return k


@lru_cache
def epoch_order(seed: int, d: int, epoch: int, n: int) -> np.ndarray:
    return generator(seed, 1, d, epoch).permutation(n).astype(np.int32)


@lru_cache
def order_keys(seed: int, d: int, epoch: int) -> list[int]:
    return generator(seed, 1, d, epoch).integers(2**64, size=6, dtype=np.uint64).tolist()
