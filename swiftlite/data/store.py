"""Encoded rows in flat arrays, in memory or in files: ids int32 [N] and mask bool [N], with where each sample begins; where a
sample has them, weights float32 [N] too.

A file is mapped, not read: what stays in memory is the offsets and what the system finds useful to keep. It does not know
rows, templates or why a sample is where it is.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Sample:
    """One training sequence: `ids` int32 [T], `mask` bool [T] (token is a target), `weights` float32 [T] (None: 1 for all)."""

    ids: NDArray[np.int32]
    mask: NDArray[np.bool_]
    weights: NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class Arrays:
    """What a store holds."""

    ids: NDArray[np.int32]
    mask: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    weights: NDArray[np.float32] | None = None


class Samples(Sequence[Sample]):
    """Samples of a store in an order of their own: number k is the store's sample `order[k]`; some may come twice."""

    def __init__(self, arrays: Arrays, order: NDArray[np.int64]) -> None:
        self.ids, self.mask, self.offsets, self.weights = arrays.ids, arrays.mask, arrays.offsets, arrays.weights
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        which = self.order[index]
        part = slice(self.offsets[which], self.offsets[which + 1])
        return Sample(self.ids[part], self.mask[part], None if self.weights is None else self.weights[part])

    def __iter__(self) -> Iterator[Sample]:
        return (self[k] for k in range(len(self)))


class Writer:
    """Takes samples one by one; `folder` None keeps them in memory."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._ids: Any = open(folder / "ids.bin", "wb") if folder else io.BytesIO()  # noqa: SIM115 (closed by arrays)
        self._mask: Any = open(folder / "mask.bin", "wb") if folder else io.BytesIO()  # noqa: SIM115
        self._weights: Any = None  # made with the first weighted sample
        self._offsets = [0]

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def add(self, sample: Sample) -> None:
        self._ids.write(sample.ids.tobytes())
        self._mask.write(sample.mask.tobytes())
        if sample.weights is not None and self._weights is None:
            self._weights = open(self.folder / "weights.bin", "wb") if self.folder else io.BytesIO()  # noqa: SIM115
            for begin, end in pairwise(self._offsets):
                self._weights.write(np.ones(end - begin, np.float32).tobytes())
        if self._weights is not None:
            self._weights.write((np.ones(len(sample.ids), np.float32) if sample.weights is None else sample.weights).tobytes())
        self._offsets.append(self._offsets[-1] + len(sample.ids))

    def arrays(self) -> Arrays:
        """What was added; nothing can be added after."""
        offsets = np.array(self._offsets, dtype=np.int64)
        if self.folder is None:
            weights = None if self._weights is None else np.frombuffer(self._weights.getbuffer(), np.float32)
            return Arrays(np.frombuffer(self._ids.getbuffer(), np.int32), np.frombuffer(self._mask.getbuffer(), np.bool_), offsets, weights)
        for file in (self._ids, self._mask, self._weights):
            if file is not None:
                file.close()
        np.save(self.folder / "offsets.npy", offsets)
        return mapped(self.folder)


def mapped(folder: Path) -> Arrays:
    """The arrays of a folder that a Writer filled. OSError or ValueError when it is not whole."""
    offsets: NDArray[np.int64] = np.load(folder / "offsets.npy")
    arrays: list[Any] = []
    for name, kind in (("ids.bin", np.int32), ("mask.bin", np.bool_), ("weights.bin", np.float32)):
        if kind is np.float32 and not (folder / name).exists():
            arrays.append(None)
            continue
        count = (folder / name).stat().st_size // np.dtype(kind).itemsize
        if count != offsets[-1]:
            raise ValueError(f"{folder / name} holds {count} of {offsets[-1]} tokens")
        arrays.append(np.asarray(np.memmap(folder / name, dtype=kind, mode="r")) if count else np.empty(0, kind))
    return Arrays(arrays[0], arrays[1], offsets, arrays[2])
