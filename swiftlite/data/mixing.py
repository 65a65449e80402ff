"""Datasets mixed by probabilities (`--interleave_prob`): which row of which comes next. It knows numbers of rows only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from swiftlite.errors import UsageError

FIRST, ALL = "first_exhausted", "all_exhausted"


def check(probabilities: Sequence[float], datasets: int) -> np.ndarray:
    """The probabilities, summing to 1. UsageError where they do not fit the datasets."""
    values = np.asarray(probabilities, dtype=np.float64)
    if len(values) != datasets:
        raise UsageError(f"--interleave_prob gives {len(values)} probabilities for {datasets} datasets", fix="give one for each --dataset")
    if not np.isfinite(values).all() or (values <= 0).any():
        raise UsageError("--interleave_prob must be numbers above 0", fix="leave a dataset out rather than giving it 0")
    return values / values.sum()


def interleave(lengths: Sequence[int], probabilities: Sequence[float], strategy: str, seed: Sequence[int]) -> list[tuple[int, int]]:
    """(dataset, row) pairs. Each draw picks a dataset by its probability, then that dataset's next row.

    `first_exhausted` ends when a dataset has no row left, so no row comes twice; `all_exhausted` goes on until each was used
    up once, starting the shorter ones anew (what Hugging Face's `interleave_datasets` and SWIFT do).
    """
    if not all(lengths):
        return []
    shares = check(probabilities, len(lengths))
    rng = np.random.default_rng(list(seed))
    taken = [0] * len(lengths)
    left = set(range(len(lengths)))
    mixed: list[tuple[int, int]] = []
    while True:
        for which in rng.choice(len(lengths), size=4096, p=shares).tolist():
            if strategy == FIRST and taken[which] == lengths[which]:
                return mixed
            mixed.append((which, taken[which] % lengths[which]))
            taken[which] += 1
            if taken[which] == lengths[which]:
                left.discard(which)
                if strategy == ALL and not left:
                    return mixed
