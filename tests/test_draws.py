"""common/draws.py: every line once an epoch, sets by weight, and each draw by itself."""

from collections import Counter

import numpy as np
import pytest

from common.draws import BLOCK, WHOLE, Draws, generator, line_in_order


def test_each_draw_is_there_by_itself():
    whole = [Draws(3, [3.0, 1.0], [40, 25])[k] for k in range(3)]
    draws = Draws(3, [3.0, 1.0], [40, 25])
    late = draws[5 * BLOCK + 7]
    assert [draws[k] for k in range(3)] == whole
    in_order = Draws(3, [3.0, 1.0], [40, 25])
    assert [in_order[k] for k in range(5 * BLOCK + 8)][-1] == late


def test_sets_are_drawn_by_weight_and_every_epoch_is_whole():
    draws = Draws(0, [3.0, 1.0], [40, 25])
    seen = [draws[k] for k in range(2 * BLOCK)]
    of_first = [i for d, i in seen if d == 0]
    assert abs(len(of_first) / len(seen) - 0.75) < 0.02
    for epoch in range(20):
        assert sorted(of_first[40 * epoch : 40 * epoch + 40]) == list(range(40))
    assert of_first[:40] != of_first[40:80]
    counts = Counter(i for d, i in seen if d == 1)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_a_small_order_is_numpys():
    order = [line_in_order(5, 1, 2, 40, k) for k in range(40)]
    assert order == generator(5, 1, 1, 2).permutation(40).tolist()


@pytest.mark.parametrize("n", [WHOLE + 1, 300_007, 2**19])
def test_the_order_of_many_lines_is_a_random_permutation(n):
    order = np.array([line_in_order(0, 0, 3, n, k) for k in range(n)])
    assert np.array_equal(np.sort(order), np.arange(n))
    other = np.array([line_in_order(0, 0, 4, n, k) for k in range(1000)])
    assert (order[:1000] == other).sum() < 5
    # Neighbours lie anywhere: two random lines are a third of all lines apart on average.
    apart = np.abs(np.diff(order)) / n
    assert abs(apart.mean() - 1 / 3) < 0.005
    for part in np.array_split(order, 8):
        assert abs(part.mean() / n - 1 / 2) < 0.005
