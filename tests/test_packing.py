"""Best-fit decreasing: a partition, within budget, near the lower bound, seeded."""

from __future__ import annotations

import math

import numpy as np
import pytest

from swiftlite.data.packing import pack


def reference(lengths: list[int], budget: int) -> int:
    """Number of bins by the textbook O(n^2) rule."""
    free: list[int] = []
    for size in sorted(lengths, reverse=True):
        fits = [i for i, space in enumerate(free) if space >= size]
        if fits:
            free[min(fits, key=lambda i: free[i])] -= size
        else:
            free.append(budget - size)
    return len(free)


@pytest.mark.parametrize("seed", range(8))
def test_partition_within_budget(seed: int) -> None:
    rng = np.random.default_rng(seed)
    budget = int(rng.integers(50, 3000))
    lengths = rng.integers(1, budget + 1, size=int(rng.integers(1, 400))).tolist()
    bins = pack(lengths, budget, seed)
    assert sorted(i for rows in bins for i in rows) == list(range(len(lengths)))
    assert max(sum(lengths[i] for i in rows) for rows in bins) <= budget
    assert len(bins) == reference(lengths, budget)
    assert len(bins) <= 11 / 9 * math.ceil(sum(lengths) / budget) + 6 or max(lengths) > budget / 2


def test_waste_on_mixed_lengths() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(4.7, 0.8, 5000).astype(int), 1, 2048).tolist()
    assert sum(lengths) / (2048 * len(pack(lengths, 2048, 0))) > 0.995


def test_longer_than_budget_stands_alone() -> None:
    assert sorted(map(sorted, pack([5, 100, 5], 10, 0))) == [[0, 2], [1]]
    assert pack([], 10, 0) == []
    with pytest.raises(ValueError, match="positive"):
        pack([1], 0, 0)


def test_seed() -> None:
    lengths = [3, 4, 5] * 50
    assert pack(lengths, 20, 1) == pack(lengths, 20, 1) != pack(lengths, 20, 2)
