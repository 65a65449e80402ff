"""The held-out rows: loss and token accuracy without ever holding logits, and what answers to them add.

Does not know when it is time, nor what becomes of the values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from swiftlite.train.batches import Sample, collate
from swiftlite.train.loss import TargetLoss
from swiftlite.train.plan import Plan
from swiftlite.train.ranks import Ranks

Stopped = Callable[[], bool]
Generate = Callable[[Stopped], dict[str, float] | None]


class Evaluation:
    """`generate`: more values, from answers; it asks its argument whether to stop, and is None then."""

    def __init__(
        self, samples: Sequence[Sample], rows: int, packing: bool, loss: TargetLoss, ranks: Ranks, sharded: bool, generate: Generate | None
    ) -> None:
        """`rows` a forward pass."""
        self.samples, self.loss, self.ranks, self.sharded, self.generate = samples, loss, ranks, sharded, generate
        # sums know no order, so packing may choose one
        self.passes = Plan.make([len(sample.ids) for sample in samples], rows, 1, packing, packing, 0).passes(0) if samples else []

    def __bool__(self) -> bool:
        return bool(self.passes)

    @torch.no_grad()
    def values(self, stopped: Stopped) -> dict[str, float] | None:
        """{eval_loss, eval_token_acc, ...}; None when `stopped` said so on the way."""
        device, model = self.loss.device, self.loss.model
        nll = torch.zeros((), dtype=torch.float64, device=device)
        hits = torch.zeros((), dtype=torch.int64, device=device)
        model.eval()
        try:
            for rows, counts in self.ranks.share(self.passes, even=self.sharded):
                if stopped() and self.ranks.world == 1:  # of several processes none may leave by itself
                    return None
                batch_nll, batch_hits = self.loss(collate([self.samples[i] for i in rows], device))
                if counts:
                    nll += batch_nll
                    hits += batch_hits
        finally:
            model.train()
        self.ranks.sum([nll, hits])
        targets = sum(int(sample.mask[1:].sum()) for sample in self.samples)
        values = {"eval_loss": nll.item() / targets, "eval_token_acc": hits.item() / targets}
        if self.generate is None:
            return values
        more = self.generate(stopped)
        return None if more is None else values | more
