"""Encoded rows -> the tensors of one forward pass: documents end to end in one row, no padding, targets as an index.

A row's tokens after its last target teach nothing and no earlier token sees them, so they are left out of the forward pass
(exact, and about one token a row). `tokens` still counts whole rows: it is what the data holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class Sample(Protocol):
    """An encoded row: `ids` int32 [T], `mask` bool [T] (True: the model learns to produce this token), `weights` float32 [T] of
    the targets' losses, None where each is 1."""

    @property
    def ids(self) -> np.ndarray: ...
    @property
    def mask(self) -> np.ndarray: ...
    @property
    def weights(self) -> np.ndarray | None: ...


@dataclass(frozen=True)
class Batch:
    """One forward pass over several documents."""

    input_ids: Tensor  # [1, T]
    position_ids: Tensor  # [1, T], restart per document
    lengths: tuple[int, ...]  # of the documents, sum T
    keep: Tensor  # [N] positions whose output is a target's prediction
    labels: Tensor  # [N] the targets
    tokens: int  # of the rows, whole
    weights: Tensor | None = None  # [N] float32, of the targets' losses

    @property
    def targets(self) -> int:
        return len(self.labels)


def collate(samples: Sequence[Sample], device: torch.device) -> Batch:
    """Rows, each with a target after its first token, -> Batch on `device`."""
    ids, positions, keep, labels, lengths, weights, start = [], [], [], [], [], [], 0
    for sample in samples:
        targets = np.flatnonzero(sample.mask[1:]) + 1
        length = int(targets[-1])  # the last target is predicted, never read
        ids.append(sample.ids[:length])
        positions.append(np.arange(length))
        keep.append(targets - 1 + start)
        labels.append(sample.ids[targets])
        lengths.append(length)
        weights.append(None if sample.weights is None else sample.weights[targets])
        start += length

    def tensor(parts: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(device, non_blocking=True)

    weighed = None
    if any(part is not None for part in weights):
        filled = [np.ones(len(own), np.float32) if part is None else part for part, own in zip(weights, labels, strict=True)]
        weighed = torch.from_numpy(np.concatenate(filled)).to(device, non_blocking=True)
    return Batch(
        tensor(ids)[None], tensor(positions)[None], tuple(lengths), tensor(keep), tensor(labels),
        sum(len(sample.ids) for sample in samples), weighed,
    )  # fmt: skip
