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


def test_without_shuffling_bins_come_in_the_order_of_the_rows():
    sizes = lengths(300)
    plan = Plan.make(sizes, 4, 3, True, False, 0)
    for epoch in (0, 1):
        assert [row for rows in plan.passes(epoch) for row in rows] == list(range(300))
    for rows, following in zip(plan.passes(0), [*plan.passes(0)[1:], None], strict=True):
        tokens = sum(sizes[i] for i in rows)
        assert len(rows) == 1 or tokens <= plan.budget
        assert following is None or tokens + sizes[following[0]] > plan.budget  # none is closed early


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


def test_later_schedules():
    wsd = Schedule(1.0, "wsd", 2, 20, floor=0.25, decay=0.5)
    assert [wsd(i) for i in (2, 9, 10)] == [1.0, 1.0, 1.0]
    assert wsd(15) == pytest.approx(0.625)
    assert 0.25 < wsd(19) < 0.3
    lowest = Schedule(2.0, "cosine_with_min_lr", 0, 100, floor=0.1)
    assert lowest(0) == 2.0
    assert lowest(50) == pytest.approx(2 * 0.55)
    assert 0.2 < lowest(99) < 0.202


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("cosine", {}),
        ("linear", {}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.2}),
        ("warmup_stable_decay", {"num_decay_steps": 4, "min_lr_ratio": 0.2}),
    ],
)
def test_schedules_equal_transformers_after_warm_up(kind, settings):
    """Warm-up differs on purpose: theirs wastes the first step on a rate of zero."""
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(kind, optimizer, 3, 20, scheduler_specific_kwargs=settings)
    ours = Schedule(1.0, "wsd" if kind.startswith("warmup") else kind, 3, 20, floor=0.2, decay=0.2)
    for step in range(20):
        if step >= 3:
            assert ours(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-9), step
        optimizer.step()
        theirs.step()


def test_processes_share_a_step():
    assert Plan.make([5] * 64, 2, None, False, False, 0, ranks=4).accumulation == 8  # 16 rows, two passes each
    assert Plan.make([5] * 64, 2, 3, False, False, 0, ranks=2).accumulation == 6
    assert [rows_a_pass(10, ranks) for ranks in (1, 2, 3, 16, 64)] == [16, 8, 4, 1, 1]
