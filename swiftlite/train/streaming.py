"""The plan of a run over a stream: every block of rows is planned like an epoch of its own.

So rows are shuffled and packed within a block, and no step spans two; where a run stands is the block's place and the step that
it began with. Memory holds the samples of one block. Its counterpart for rows that are all at hand is `Plan`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from swiftlite.data.encoding import Report
from swiftlite.data.store import Sample
from swiftlite.data.stream import Place, Stream
from swiftlite.train.plan import Plan


class StreamPlan:
    """`step(n)` gives the passes of a step as numbers into `samples`, which then holds that step's block. Steps only go forward."""

    def __init__(
        self, stream: Stream, blocks: Iterator[tuple[Place, list[Sample]]], rows: int, accumulation: int | None, packing: bool,
        shuffle: bool, seed: int, ranks: int, total: int,
    ) -> None:  # fmt: skip
        """`blocks`: the stream's, from its beginning; `rows`, `accumulation`, `ranks` as for Plan.make; `total`: steps of the run."""
        self.stream, self.blocks, self.packing, self.steps_per_epoch = stream, blocks, packing, total
        self.settings = (rows, accumulation, packing, shuffle)
        self.seed, self.ranks = seed, ranks
        self.samples: list[Sample] = []  # one object for good: the loop holds it
        self.first_step = 0
        self._next()

    def _next(self) -> None:
        self.place, samples = next(self.blocks)
        self.samples[:] = samples
        self.plan = Plan.make([len(s.ids) for s in samples], *self.settings, self.seed + self.place.block, self.ranks)
        self.steps = self.plan.epoch(0)

    def alone(self) -> StreamPlan:
        """From here on as many rows a step, one a forward pass."""
        self.plan = self.plan.alone()
        self.packing, self.steps = False, self.plan.epoch(0)
        self.settings = (1, self.plan.accumulation // self.ranks, False, self.plan.shuffle)
        return self

    def step(self, number: int) -> list[list[int]]:
        """Forward passes of the 0-based optimizer step."""
        assert number >= self.first_step, "a stream does not go back"
        while number >= self.first_step + len(self.steps):
            self.first_step += len(self.steps)
            self._next()
        return self.steps[number - self.first_step]

    def state(self) -> dict[str, Any]:
        """Where the run stands, for a checkpoint."""
        return {"stream": {**vars(self.place), "first_step": self.first_step}}

    def resume(self, state: dict[str, Any]) -> None:
        """Stand where `state` was asked for."""
        saved = dict(state["stream"])
        self.first_step = saved.pop("first_step")
        self.stream.report = Report()
        self.blocks = self.stream.blocks(Place(**saved))
        self._next()

    def total_steps(self, epochs: float, max_steps: int) -> int:
        return max_steps

    def largest_pass(self) -> list[int]:
        """The first block's pass with the most tokens."""
        return self.plan.largest_pass()

    def describe(self) -> str:
        return f"streaming in blocks of {self.stream.options.shuffle_buffer_size} rows; the first: {self.plan.describe()}"
