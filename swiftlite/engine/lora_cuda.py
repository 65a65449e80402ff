"""Adapters on a GPU: the tables that the Triton kernels read, and a batch's rows as tasks.

A stack (lora_ops.py) gets a row in the tables when a batch first uses it, and loses it when it is freed; a row says for each group
of linears where the weights lie and how large the ranks are. `epoch` changes when a captured step must be captured again: the
tables moved, a wider rank came, or linears are adapted that no adapter adapted before.
It does not know versions, names or modules. Imported only where the kernels run: it needs Triton.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from swiftlite.engine import triton_lora as kernels
from swiftlite.engine.attention_cuda import processors_of
from swiftlite.engine.lora_ops import Segment, Stack
from swiftlite.engine.transfer import to_device

ROWS_FEW, ROWS_MANY = 16, 64  # rows of a task: decode, prefill
FIRST_CAPACITY = 64  # stacks; doubled when full
FIRST_COLUMNS = 128  # rank 32 in q, k and v together; doubled for wider adapters, as each change has all captured steps captured again


class AdapterTables:
    """The tables of one model whose groups of linears have these (input width, output widths)."""

    def __init__(self, groups: list[tuple[int, tuple[int, ...]]], device: torch.device) -> None:
        self.groups, self.device = groups, device
        self.parts = max(len(outs) for _, outs in groups)
        self.epoch = 0
        self.columns = FIRST_COLUMNS  # of h: at least the largest rank of any group
        self.adapted = [[False] * len(outs) for _, outs in groups]  # by any adapter so far
        self.aligned = [width % 16 == 0 and all(out % 16 == 0 for out in outs) for width, outs in groups]
        self._rows: weakref.WeakKeyDictionary[Stack, int] = weakref.WeakKeyDictionary()
        self._free = list(range(FIRST_CAPACITY))
        out = torch.zeros(len(groups), self.parts, 2, dtype=torch.int32)
        for index, (_, outs) in enumerate(groups):
            out[index, : len(outs), 1] = torch.tensor(outs)
            out[index, : len(outs), 0] = torch.tensor(outs).cumsum(0) - torch.tensor(outs)
        self._out = out.to(device)
        self.tables = self._allocate(FIRST_CAPACITY)

    def _allocate(self, capacity: int) -> kernels.Tables:
        count, parts = len(self.groups), self.parts

        def zeros(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(capacity, *shape, dtype=dtype, device=self.device)

        long, short = torch.int64, torch.int32
        return kernels.Tables(
            a=zeros(long, count), b=zeros(long, count, parts), stride=zeros(long), total=zeros(short, count),
            rank=zeros(short, count, parts), start=zeros(short, count, parts), out=self._out,
        )  # fmt: skip

    def row_of(self, stack: Stack) -> int:
        """The stack's row, entered when it is new."""
        row = self._rows.get(stack)
        if row is None:
            if not self._free:
                self._grow()
            row = self._rows[stack] = self._free.pop(0)
            weakref.finalize(stack, self._free.append, row)
            self._enter(stack, row)
        return row

    def _grow(self) -> None:
        old, size = self.tables, len(self.tables.stride)
        self.tables = self._allocate(2 * size)
        for name in ("a", "b", "stride", "total", "rank", "start"):
            vars(self.tables)[name][:size] = vars(old)[name]
        self._free += range(size, 2 * size)
        self.epoch += 1

    def _enter(self, stack: Stack, row: int) -> None:
        count, itemsize = len(self.groups), stack.rows.element_size()
        a, total = torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.int32)
        b = torch.zeros(count, self.parts, dtype=torch.int64)
        rank, start = torch.zeros(count, self.parts, dtype=torch.int32), torch.zeros(count, self.parts, dtype=torch.int32)
        stride = stack.rows.stride(0)
        changed = False
        for index, shape in enumerate(stack.groups):
            matrix = stack.a[index]
            if matrix is None:
                continue
            a[index], total[index] = matrix.data_ptr(), sum(shape.ranks)
            for part, part_rank in enumerate(shape.ranks):
                weights = stack.b[index][part]
                if weights is None:
                    continue
                b[index, part], rank[index, part], start[index, part] = weights.data_ptr(), part_rank, stack.columns(index, part).start
                changed |= not self.adapted[index][part]
                self.adapted[index][part] = True
            if self.aligned[index] and (stride * itemsize % 16 or any(int(at) % 16 for at in (a[index], *b[index]))):
                self.aligned[index], changed = False, True
        widest = int(total.max())
        if changed or widest > self.columns:
            while widest > self.columns:
                self.columns *= 2
            self.epoch += 1
        tables = self.tables
        pairs = ((tables.a, a), (tables.b, b), (tables.total, total), (tables.rank, rank), (tables.start, start))
        for table, new in pairs:
            table[row].copy_(new)
        tables.stride[row] = stride

    def plan(self, segments: list[Segment], kept: DeviceJob | None = None) -> list[DeviceJob]:
        """The job of consecutive runs of rows. `kept`, a job made by `static_job`, is refilled and returned."""
        tasks: list[tuple[int, int, int, int]] = []
        longest = max((count for stack, _, count in segments if stack is not None), default=0)
        if not longest and kept is None:
            return []
        rows = ROWS_FEW if kept is not None or longest <= ROWS_FEW else ROWS_MANY
        first = 0
        for stack, slot, count in segments:
            if stack is not None:
                index = self.row_of(stack)
                tasks += [(first + at, min(rows, count - at), index, slot) for at in range(0, count, rows)]
            first += count
        if kept is None:
            return [DeviceJob(self, to_device(tasks, torch.int32, self.device), rows)]
        tasks += [(0, 0, -1, 0)] * (len(kept.tasks) - len(tasks))
        kept.tasks.copy_(to_device(tasks, torch.int32, self.device), non_blocking=True)
        return [kept]

    def static_job(self, rows: int) -> DeviceJob:
        """A job for any batch of up to `rows` rows, whose tensors stay in place."""
        tasks = torch.zeros(rows, 4, dtype=torch.int32, device=self.device)
        tasks[:, 2] = -1
        return DeviceJob(self, tasks, ROWS_FEW)


@dataclass(frozen=True)
class DeviceJob:
    """All rows of a batch that have an adapter (`lora_ops.Job`). `tasks` [P, 4] int32: first row, rows, stack or -1, slot."""

    owner: AdapterTables
    tasks: Tensor
    rows: int

    def adapts(self, group: int, part: int | None = None) -> bool:
        parts = self.owner.adapted[group]
        return any(parts) if part is None else parts[part]

    def shrink(self, group: int, x: Tensor) -> Tensor:
        """h [splits, T, columns] float32."""
        owner, x = self.owner, x if x.stride(1) == 1 else x.contiguous()
        splits = kernels.splits_for(len(self.tasks), x.shape[1], processors_of(x.device))
        return kernels.shrink(x, owner.tables, group, self.tasks, self.rows, owner.columns, splits, owner.aligned[group])

    def expand(self, group: int, part: int, h: Tensor, y: Tensor) -> None:
        """y [T, out] of one part."""
        owner, width = self.owner, self.owner.groups[group][1][part]
        kernels.expand(h, y, owner.tables, group, range(part, part + 1), width, self.tasks, self.rows, owner.aligned[group])

    def expand_all(self, group: int, h: Tensor, y: Tensor) -> None:
        """y [T, sum of outs] of all parts of a fused linear."""
        owner, outs = self.owner, self.owner.groups[group][1]
        kernels.expand(h, y, owner.tables, group, range(len(outs)), max(outs), self.tasks, self.rows, owner.aligned[group])

    def add(self, group: int, first: int, end: int, x: Tensor, y: Tensor, h: Tensor | None) -> Tensor:
        """y [T, outs of parts first..end side by side]; h as `shrink` makes it."""
        h = self.shrink(group, x) if h is None else h
        outs = self.owner.groups[group][1]
        if end - first == len(outs) > 1:
            self.expand_all(group, h, y)
            return h
        column = 0
        for part in range(first, end):
            self.expand(group, part, h, y[:, column : column + outs[part]])
            column += outs[part]
        return h
