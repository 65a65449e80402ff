"""The order of training: every row once an epoch, budgets held, the same again for the same seed."""

from __future__ import annotations

import numpy as np
import pytest

from swiftlite.errors import UsageError
from swiftlite.train.plan import Plan, Schedule, rows_a_pass


def lengths(count: int, seed: int = 0) -> list[int]:
    return [int(n) for n in np.clip(np.random.default_rng(seed).lognormal(4, 0.6, count), 5, 400)]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("count", [1, 7, 130, 2000])
def test_every_row_once_an_epoch(packing, count):
    plan = Plan.make(lengths(count), 4, 3, packing, True, 0)
    for epoch in (0, 1):
        passes = [rows for step in plan.epoch(epoch) for rows in step]
        assert sorted(row for rows in passes for row in rows) == list(range(count))
        for rows in passes:
            if packing:
                assert len(rows) == 1 or sum(plan.lengths[i] for i in rows) <= plan.budget
            else:
                assert len(rows) <= 4
    if count > 7:
        assert plan.epoch(0) != plan.epoch(1)
    assert Plan.make(lengths(count), 4, 3, packing, True, 0).epoch(1) == plan.epoch(1)


def test_packed_passes_of_a_small_dataset_are_even():
    plan = Plan.make(lengths(130), 16, 1, True, True, 0)
    tokens = [sum(plan.lengths[i] for i in step[0]) for step in plan.epoch(0)]
    assert len(tokens) == 9  # ceil(130 / 16)
    assert min(tokens) > 0.95 * max(tokens)


def test_a_row_beyond_the_budget_goes_alone():
    plan = Plan.make([10] * 20 + [300], 2, 1, True, True, 0)
    assert [20] in plan.passes(0)


def test_without_shuffling_rows_keep_their_order():
    plan = Plan.make([5] * 5, 2, 2, False, False, 0)
    assert plan.epoch(0) == plan.epoch(3) == [[[0, 1], [2, 3]], [[4]]]
    assert plan.step(3) == [[4]]
    assert plan.total_steps(1.5, -1) == 3
    assert plan.total_steps(1.5, 100) == 100


def test_sizes_below_one_are_refused():
    with pytest.raises(UsageError, match="gradient_accumulation_steps"):
        Plan.make([5], 1, 0, True, True, 0)


def test_rows_a_pass():
    assert [rows_a_pass(n) for n in (10, 128, 129, 1500, 9000)] == [16, 16, 8, 1, 1]


def test_schedule():
    cosine = Schedule(1.0, "cosine", 3, 13)
    assert [cosine(i) for i in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert cosine(8) == pytest.approx(0.5)
    assert 0 < cosine(12) < 0.05
    assert Schedule(1.0, "linear", 0, 10)(5) == pytest.approx(0.5)
    assert Schedule(2.0, "constant", 0, 10)(9) == 2.0
