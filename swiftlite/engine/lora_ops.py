"""The arithmetic of many adapters in one batch: which rows go through which GEMMs, and the GEMMs.

Rows arrive with each adapter's rows adjacent. A segment with many rows gets a GEMM pair of its own; the segments with few
rows (decode) whose adapters lie in one stack go together, as one pair of batched GEMMs over a range of slots. Linears that
read the same input (q/k/v, gate/up) share one A product. The scale lies inside B, ranks are true ranks, and rows without an
adapter appear in no job. On a CPU with a compiler lora_native.py does all segments in one call instead. `reference` is the plain
statement of what is computed; tests hold the jobs against it.

Measured for the choice (bf16, r=16, q/k/v of 1024 -> 4096, 8 adapters, 2 cores, microseconds; one pair per segment against
batched): 770/245 at one row each, 780/263 at 8, 850/373 at 32, 990/546 at 64.

It knows stacks and rows, not names, versions or modules. Letters: T rows, R rank (R* summed over a group's parts), S slots.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from swiftlite.pages import pages

ALONE_ROWS = 128  # a segment of so many rows gains nothing from company
STACK_SLOTS = 8


@dataclass(frozen=True)
class GroupShape:
    """Linears that share their input: its width, and each part's output width and rank (0: not adapted)."""

    width: int
    outs: tuple[int, ...]
    ranks: tuple[int, ...]


class Stack:
    """Up to `slots` adapters of one layout, each one contiguous row of memory: [S, N].

    On a CPU unused slots are zeros that cost no memory (untouched pages); `clear` gives a slot's pages back. A GPU's memory is taken
    whole, so there a stack is one adapter, whose memory goes when it goes.
    """

    def __init__(self, groups: tuple[GroupShape, ...], dtype: torch.dtype, device: torch.device, slots: int | None = None) -> None:
        self.groups = groups
        self.slots = slots or (STACK_SLOTS if device.type == "cpu" else 1)
        self.size = sum(
            sum(shape.ranks) * shape.width + sum(r * o for r, o in zip(shape.ranks, shape.outs, strict=True)) for shape in groups
        )
        page = mmap.PAGESIZE // dtype.itemsize
        stride = max(-(-self.size // page), 1) * page  # an adapter of the embedding or the head alone has nothing here
        self.memory: mmap.mmap | None = None
        if device.type == "cpu":
            self.memory = pages(self.slots * stride * dtype.itemsize)
            flat = torch.frombuffer(self.memory, dtype=dtype)
        else:
            flat = torch.zeros(self.slots * stride, dtype=dtype, device=device)
        self.rows = flat.view(self.slots, stride)
        self._tables: Tensor | None = None
        self.free = list(range(self.slots))
        self.a: list[Tensor | None] = []  # per group [S, R*, width]
        self.b: list[list[Tensor | None]] = []  # per group and part [S, R, out]
        offset = 0
        for shape in groups:
            total = sum(shape.ranks)
            self.a.append(self.rows[:, offset : offset + total * shape.width].unflatten(1, (total, shape.width)) if total else None)
            offset += total * shape.width
            parts: list[Tensor | None] = []
            for rank, out in zip(shape.ranks, shape.outs, strict=True):
                parts.append(self.rows[:, offset : offset + rank * out].unflatten(1, (rank, out)) if rank else None)
                offset += rank * out
            self.b.append(parts)

    @property
    def slot_bytes(self) -> int:
        return self.size * self.rows.element_size()

    def columns(self, group: int, part: int) -> slice:
        """Where a part's rank lies in the group's A product."""
        start = sum(self.groups[group].ranks[:part])
        return slice(start, start + self.groups[group].ranks[part])

    def table(self, slot: int, parts: int) -> int:
        """Address of what lora.cpp reads of a slot: for each group A, the sum of ranks, then (B, rank, first column) for `parts` parts."""
        if self._tables is None:
            first: list[int] = []  # of slot 0
            moves: list[bool] = []  # whether it is an address, which differs from slot to slot
            for index, shape in enumerate(self.groups):
                a = self.a[index]
                first += (0 if a is None else a.data_ptr(), sum(shape.ranks))
                moves += (a is not None, False)
                start = 0
                for part in range(parts):
                    b, rank = (self.b[index][part], shape.ranks[part]) if part < len(shape.ranks) else (None, 0)
                    first += (0 if b is None else b.data_ptr(), rank, start)
                    moves += (b is not None, False, False)
                    start += rank
            stride = self.rows.stride(0) * self.rows.element_size()
            steps = torch.arange(self.slots)[:, None] * stride
            self._tables = torch.tensor(first) + steps * torch.tensor(moves, dtype=torch.int64)
        return self._tables.data_ptr() + slot * self._tables.stride(0) * 8

    def place(self, slot: int, group: int, part: int) -> tuple[Tensor, Tensor]:
        """Where one part of one slot lies: A [R, width] and B [R, out]."""
        a, b = self.a[group], self.b[group][part]
        assert a is not None and b is not None
        return a[slot, self.columns(group, part)], b[slot]

    def write(self, slot: int, group: int, part: int, lora_a: Tensor, lora_b: Tensor) -> None:
        """Fill one part of one slot: A [R, width] and scale * B [out, R]."""
        a, b = self.place(slot, group, part)
        a.copy_(lora_a)
        b.copy_(lora_b.T)

    def adapts(self, group: int, part: int | None = None) -> bool:
        """Whether the adapters here change a group of linears, or one part of it."""
        ranks = self.groups[group].ranks
        return any(ranks) if part is None else ranks[part] > 0

    @property
    def used(self) -> int:
        return self.slots - len(self.free)

    def clear(self, slot: int) -> None:
        """Free a slot: zeros again, and on CPU its memory goes back."""
        self.free = sorted([*self.free, slot])
        if self.memory is None:
            self.rows[slot].zero_()
        else:
            length = self.rows.shape[1] * self.rows.element_size()
            self.memory.madvise(mmap.MADV_DONTNEED, slot * length, length)


class Job(Protocol):
    """Some rows of the batch and the adapters that they go through."""

    def adapts(self, group: int, part: int | None = None) -> bool:
        """Whether there is anything to do for a group of linears, or one part of it."""
        ...

    def add(self, group: int, first: int, end: int, x: Tensor, y: Tensor, h: Tensor | None) -> Tensor:
        """Add the products of parts first..end for x [T, in] to y [T, their outs side by side].

        `h` is what an earlier call for the same group and input returned, None at the first.
        """
        ...


class _Torch:
    """A job in torch, out of its two halves."""

    stack: Stack

    def adapts(self, group: int, part: int | None = None) -> bool:
        return self.stack.adapts(group, part)

    def shrink(self, group: int, x: Tensor) -> Tensor:
        raise NotImplementedError

    def expand(self, group: int, part: int, h: Tensor, y: Tensor) -> None:
        raise NotImplementedError

    def add(self, group: int, first: int, end: int, x: Tensor, y: Tensor, h: Tensor | None) -> Tensor:
        if h is None:
            h = self.shrink(group, x)
        column = 0
        for part in range(first, end):
            out = self.stack.groups[group].outs[part]
            if self.stack.adapts(group, part):
                self.expand(group, part, h, y[:, column : column + out])
            column += out
        return h


@dataclass(frozen=True)
class Alone(_Torch):
    """Rows start..end through one slot: a GEMM pair."""

    stack: Stack
    slot: int
    start: int
    end: int

    def shrink(self, group: int, x: Tensor) -> Tensor:
        a = self.stack.a[group]
        assert a is not None
        return F.linear(x[self.start : self.end], a[self.slot])  # [n, R*]

    def expand(self, group: int, part: int, h: Tensor, y: Tensor) -> None:
        b = self.stack.b[group][part]
        assert b is not None
        y[self.start : self.end].addmm_(h[:, self.stack.columns(group, part)], b[self.slot])


@dataclass(frozen=True)
class Together(_Torch):
    """Slots low..high, each with up to `height` rows: batched GEMMs.

    `gather` [slots * height] picks the rows (padding repeats row 0), `rows` and `cells` say which results go where; all None
    when the rows lie in slot order without padding, from `start` on.
    """

    stack: Stack
    low: int
    high: int
    height: int
    start: int
    gather: Tensor | None = None
    rows: Tensor | None = None
    cells: Tensor | None = None

    def _block(self, x: Tensor) -> Tensor:
        return x[self.start : self.start + (self.high - self.low) * self.height].unflatten(0, (self.high - self.low, self.height))

    def shrink(self, group: int, x: Tensor) -> Tensor:
        a = self.stack.a[group]
        assert a is not None
        picked = self._block(x) if self.gather is None else x[self.gather].unflatten(0, (-1, self.height))  # [s, height, width]
        return torch.bmm(a[self.low : self.high], picked.transpose(1, 2)).transpose(1, 2)  # [s, height, R*]; this order is the faster

    def expand(self, group: int, part: int, h: Tensor, y: Tensor) -> None:
        b = self.stack.b[group][part]
        assert b is not None
        b, h = b[self.low : self.high], h[:, :, self.stack.columns(group, part)]
        if self.gather is None:
            self._block(y).baddbmm_(h, b)
        else:
            assert self.rows is not None and self.cells is not None
            y.index_add_(0, self.rows, torch.bmm(h, b).flatten(0, 1)[self.cells])


Segment = tuple[Stack | None, int, int]  # (stack or None for the base, slot, rows)


def plan(segments: list[Segment], device: torch.device) -> list[Job]:
    """Jobs for consecutive runs of rows; chosen once a step, used by every layer."""
    jobs: list[Job] = []
    few: dict[int, list[Alone]] = {}
    start = 0
    for stack, slot, count in segments:
        if stack is not None and count:
            segment = Alone(stack, slot, start, start + count)
            if count >= ALONE_ROWS:
                jobs.append(segment)
            else:
                few.setdefault(id(stack), []).append(segment)
        start += count
    for members in few.values():
        members.sort(key=lambda s: s.end - s.start)
        # One long segment would pad all the others to its length.
        while (
            len(members) > 1
            and (longest := members[-1].end - members[-1].start) > 16
            and longest > 3 * (members[-2].end - members[-2].start)
        ):
            jobs.append(members.pop())
        jobs += _together(members, device)
    return jobs


def _together(members: list[Alone], device: torch.device) -> list[Job]:
    if len(members) == 1 or len({m.slot for m in members}) < len(members):
        return list(members)  # a slot may come twice when the caller did not sort its rows
    members = sorted(members, key=lambda s: s.slot)
    stack, low, high = members[0].stack, members[0].slot, members[-1].slot + 1
    if high - low > 2 * len(members):
        return list(members)  # most slots of the range would be read for nothing
    height = max(m.end - m.start for m in members)
    dense = high - low == len(members) and all(m.end - m.start == height for m in members)
    if dense and all(m.start == members[0].start + i * height for i, m in enumerate(members)):
        return [Together(stack, low, high, height, members[0].start)]
    gather, rows, cells = [0] * ((high - low) * height), [], []
    for member in members:
        for i, row in enumerate(range(member.start, member.end)):
            cell = (member.slot - low) * height + i
            gather[cell] = row
            rows.append(row)
            cells.append(cell)
    return [Together(stack, low, high, height, 0, *(torch.tensor(v, device=device) for v in (gather, rows, cells)))]


def reference(segments: list[Segment], group: int, part: int, x: Tensor, y: Tensor) -> None:
    """What the jobs compute, row by row: y [T, out] += (x A^T) B^T with each row's own adapter."""
    row = 0
    for stack, slot, count in segments:
        for _ in range(count):
            if stack is not None and stack.groups[group].ranks[part]:
                a, b = stack.a[group], stack.b[group][part]
                assert a is not None and b is not None
                y[row] += (x[row] @ a[slot, stack.columns(group, part)].T) @ b[slot]
            row += 1
