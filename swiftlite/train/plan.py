"""Which rows go into which forward pass of which step, and the learning rate there: pure functions of the step number.

Nothing here holds state, so "where a run stands" is one integer and resuming needs no cursor. Knows lengths only.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from swiftlite.data.packing import pack, pack_in_order
from swiftlite.errors import UsageError

ROWS_A_STEP = 16  # where the batch size is left to us
PASS_TOKENS = 2048  # beyond this a forward pass gains no speed and only takes memory


def rows_a_pass(mean_length: float, ranks: int = 1) -> int:
    """The largest power of two up to a process's share of ROWS_A_STEP whose rows of `mean_length` tokens stay within
    PASS_TOKENS."""
    rows = 1 << (max(1, ROWS_A_STEP // ranks).bit_length() - 1)
    while rows > 1 and rows * mean_length > PASS_TOKENS:
        rows //= 2
    return rows


def spread(lengths: Sequence[int], count: int, seed: int) -> list[list[int]]:
    """Rows over `count` passes of about equal tokens: the next longest to the emptiest.

    Best fit fills passes one after the other and leaves a small rest, which would weigh as much as a full step. Lengths are
    taken up to 20 % off, so that epochs combine rows differently.
    """
    random = np.random.default_rng(seed)
    order = np.argsort(-np.asarray(lengths) * random.uniform(0.8, 1.0, len(lengths)))
    passes: list[list[int]] = [[] for _ in range(count)]
    fill = [(0, i) for i in range(count)]
    for row in order.tolist():
        tokens, i = heapq.heappop(fill)
        passes[i].append(row)
        heapq.heappush(fill, (tokens + lengths[row], i))
    return [passes[i] for i in random.permutation(count).tolist()]


@dataclass(frozen=True)
class Schedule:
    """Learning rate by step: linear warm-up, then `cosine` or `linear` to zero, `cosine_with_min_lr` to `floor`, `constant`, or
    `wsd` (warm-up, stable, and a cosine to `floor` over the last `decay` of all steps)."""

    peak: float
    kind: str
    warmup: int
    total: int
    floor: float = 0.0  # share of the peak
    decay: float = 0.1  # share of the steps

    def __call__(self, step: int) -> float:
        """The rate of 0-based `step`. The first step already learns."""
        if step < self.warmup:
            return self.peak * (step + 1) / (self.warmup + 1)
        done = (step - self.warmup) / max(1, self.total - self.warmup)
        if self.kind == "wsd":
            falling = max(1, round(self.decay * self.total))
            done = max(0.0, (step - (self.total - falling)) / falling)
        if self.kind in ("cosine", "cosine_with_min_lr", "wsd"):
            floor = 0.0 if self.kind == "cosine" else self.floor
            return self.peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))
        return self.peak * max(0.0, 1 - done) if self.kind == "linear" else self.peak


@dataclass(frozen=True)
class Plan:
    """The order of training: `epoch(e)` is a list of steps, a step a list of forward passes, a pass a list of row numbers."""

    lengths: tuple[int, ...]
    rows: int  # rows a forward pass
    accumulation: int  # forward passes a step, all processes together
    packing: bool
    shuffle: bool
    seed: int

    @staticmethod
    def make(lengths: Sequence[int], rows: int, accumulation: int | None, packing: bool, shuffle: bool, seed: int, ranks: int = 1) -> Plan:
        """`accumulation`: passes of each of the `ranks` processes; None: about 16 rows a step. UsageError for sizes below 1."""
        for name, value in (("per_device_train_batch_size", rows), ("gradient_accumulation_steps", accumulation)):
            if value is not None and value < 1:
                raise UsageError(f"--{name} must be at least 1, got {value}")
        passes = accumulation or max(1, round(ROWS_A_STEP / rows / ranks))
        return Plan(tuple(lengths), rows, passes * ranks, packing, shuffle, seed)

    def alone(self) -> Plan:
        """As many rows a step, one a forward pass."""
        return replace(self, rows=1, accumulation=self.accumulation * self.rows, packing=False)

    @cached_property
    def budget(self) -> int:
        """Tokens a packed forward pass may hold; a longer row goes alone."""
        return math.ceil(self.rows * sum(self.lengths) / len(self.lengths))

    def passes(self, epoch: int) -> list[list[int]]:
        """Forward passes of one epoch."""
        seed = self.seed + epoch
        if self.packing:
            capped = [min(length, self.budget) for length in self.lengths]
            if not self.shuffle:
                return pack_in_order(capped, self.budget)
            full = pack(capped, self.budget, seed)
            even = spread(capped, len(full), seed)
            return even if max(sum(capped[i] for i in rows) for rows in even) <= self.budget else full
        order = np.random.default_rng(seed).permutation(len(self.lengths)) if self.shuffle else np.arange(len(self.lengths))
        return [order[i : i + self.rows].tolist() for i in range(0, len(order), self.rows)]

    @lru_cache(maxsize=2)  # noqa: B019 (a plan lives as long as its run)
    def epoch(self, number: int) -> list[list[list[int]]]:
        passes = self.passes(number)
        return [passes[i : i + self.accumulation] for i in range(0, len(passes), self.accumulation)]

    @cached_property
    def steps_per_epoch(self) -> int:
        return len(self.epoch(0))

    def step(self, number: int) -> list[list[int]]:
        """Forward passes of the 0-based optimizer step."""
        epoch, within = divmod(number, self.steps_per_epoch)
        steps = self.epoch(epoch)
        # A packer may need one pass more or less from one epoch to the next; steps per epoch are fixed by the first.
        return steps[within] if within < len(steps) else steps[within % len(steps)]

    def state(self) -> dict[str, Any]:
        """Nothing: the step's number says it all."""
        return {}

    def resume(self, state: dict[str, Any]) -> None:
        """See `state`."""

    def total_steps(self, epochs: float, max_steps: int) -> int:
        return max_steps if max_steps > 0 else max(1, math.ceil(epochs * self.steps_per_epoch))

    def largest_pass(self) -> list[int]:
        """The first epoch's pass with the most tokens."""
        return max((p for step in self.epoch(0) for p in step), key=lambda p: sum(self.lengths[i] for i in p))

    def describe(self) -> str:
        tokens, passes = sum(self.lengths), sum(len(step) for step in self.epoch(0))
        if self.packing:
            head = (
                f"packing: up to {self.budget} tokens a forward pass ({self.rows} rows of mean length {tokens / len(self.lengths):.0f}), "
                f"{len(self.lengths)} rows in {passes} passes, {tokens / passes / self.budget:.0%} full"
            )
        else:
            head = f"no packing: {self.rows} rows a forward pass, {len(self.lengths)} rows in {passes} passes"
        return f"{head}; {self.accumulation} passes a step, {self.steps_per_epoch} steps an epoch"
