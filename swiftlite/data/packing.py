"""Whole rows into bins of a token budget: best-fit decreasing over the whole dataset (Johnson 1974), or in the rows' order. It
knows lengths only."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np


def pack(lengths: Sequence[int], budget: int, seed: int) -> list[list[int]]:
    """Row indices by bin; every row is in exactly one bin, and a bin holds at most `budget` tokens unless it is one longer row.

    O(n log n). `seed` orders the bins and decides between rows of equal length, so that epochs mix rows differently.
    """
    if budget < 1:
        raise ValueError(f"budget must be positive, got {budget}")
    rng = np.random.default_rng(seed)
    sizes = np.asarray(lengths, dtype=np.int64)
    order = rng.permutation(len(sizes))
    order = order[np.argsort(-sizes[order], kind="stable")]
    bins: list[list[int]] = []
    spaces: list[int] = []  # distinct free spaces of open bins, ascending
    by_space: dict[int, list[int]] = {}  # free space -> bins
    for row in order.tolist():
        size = int(sizes[row])
        at = bisect_left(spaces, size)
        if at < len(spaces):
            space = spaces[at]
            number = by_space[space].pop()
            if not by_space[space]:
                del by_space[space], spaces[at]
            bins[number].append(row)
        else:
            space, number = budget, len(bins)
            bins.append([row])
        left = space - size
        if left > 0:
            if left not in by_space:
                insort(spaces, left)
                by_space[left] = []
            by_space[left].append(number)
    return [bins[i] for i in rng.permutation(len(bins)).tolist()]


def pack_in_order(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """As `pack`, with every row in its place: a bin ends where the next row does not fit, so bins are less full."""
    if budget < 1:
        raise ValueError(f"budget must be positive, got {budget}")
    bins: list[list[int]] = []
    space = 0
    for row, length in enumerate(lengths):
        if not bins or length > space:
            bins.append([])
            space = budget
        bins[-1].append(row)
        space -= length
    return bins
