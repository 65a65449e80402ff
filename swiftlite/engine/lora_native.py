"""Adapters by the C++ kernels: all segments of a batch in one call per linear or fused linear, behind the base's product (lora.cpp) or, for
many rows where there is a matrix unit, as a part of it (adapted.cpp); and quick packing of files.

Tables of pointers and `Args` must describe the same memory as the tensors: the kernel checks nothing. It knows stacks and rows, not
names, versions or modules. Letters: T rows, R rank, S slots.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swiftlite.adapters.digest import LANES
from swiftlite.engine.lora_ops import Segment, Stack
from swiftlite.engine.panels import PANEL, PanelWeight, Product
from swiftlite.kernels.stages import Run, Stage

MANY_ROWS = 16  # a segment of more rows is cut into larger pieces of work
JOINED_ROWS, SEGMENT_ROWS = 64, 8  # rows of a batch, and of a segment in the mean, from which adapters are part of the base's product


class Args(ctypes.Structure):
    """struct Args of adapters.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("segments", "outs", "x", "y", "h")),
        *((name, ctypes.c_int64) for name in ("x_stride", "y_stride", "h_stride", "entry")),
        *((name, ctypes.c_int32) for name in ("num_segments", "width", "first_part", "end_part", "shrink", "is_bf16", "wide")),
    )


class Adapted(ctypes.Structure):
    """struct Adapted of adapted.cpp."""

    _fields_ = (("product", Product), ("adding", Args), ("gate", ctypes.c_int32))


class _Move(ctypes.Structure):
    """struct Move of lora_files.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("to", "source", "gains")),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("from_bf16", "to_bf16", "transpose")),
    )


class NativeLora:
    """The kernel for one model, whose groups of linears have these (input width, output widths)."""

    def __init__(self, library: ctypes.CDLL, groups: Sequence[tuple[int, tuple[int, ...]]]) -> None:
        self.library, self.pack_function = library, library.swift_lora_pack
        self.pack_function.restype = ctypes.c_int32
        self.digest_function = library.swift_digest
        self.digest_function.argtypes, self.digest_function.restype = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p), None
        self.widths = [width for width, _ in groups]
        self.parts = max(len(outs) for _, outs in groups)
        self.starts = [[sum(outs[:part]) for part in range(len(outs))] for _, outs in groups]
        self.outs = [torch.tensor([pair for start, out in zip(starts, outs, strict=True) for pair in (start, out)])
                     for starts, (_, outs) in zip(self.starts, groups, strict=True)]  # fmt: skip
        unit = bool(library.swift_adapted_ready())
        self.joins = [unit and width % PANEL == 0 and all(out % PANEL == 0 for out in outs) for width, outs in groups]
        self._segments: list[Segment] = []
        self._jobs: list[NativeJob] = []
        self.outs_at = [outs.data_ptr() for outs in self.outs]

    def plan(self, segments: list[Segment]) -> list[NativeJob]:
        """The job of consecutive runs of rows; none where no row has an adapter. The last plan's own list when nothing changed, as in
        most steps of decoding."""
        if segments != self._segments:
            adapted = any(stack is not None and count for stack, _, count in segments)
            self._segments, self._jobs = segments, [NativeJob(self, segments)] if adapted else []
        return self._jobs

    def pack(self, moves: Sequence[tuple[Tensor, Tensor, float, Tensor | None]], transpose: Sequence[bool]) -> int | None:
        """Copy (to, from [rows, columns], scale, gains [rows] or None) each; returns the first that is not finite.

        All are float32 or bfloat16 with contiguous rows; those in `transpose` are written as their transpose. Other threads run on.
        """
        table = (_Move * len(moves))()
        for entry, (to, source, scale, gains), turned in zip(table, moves, transpose, strict=True):
            entry.to, entry.source, entry.gains = to.data_ptr(), source.data_ptr(), None if gains is None else gains.data_ptr()
            entry.rows, entry.columns, entry.scale = source.shape[0], source.shape[1], scale
            entry.from_bf16, entry.to_bf16, entry.transpose = source.dtype == torch.bfloat16, to.dtype == torch.bfloat16, turned
        bad = self.pack_function(table, len(moves))
        return None if bad < 0 else bad

    def lanes(self, data: memoryview) -> bytes:
        """`adapters.digest.lanes`. Other threads run on."""
        words = np.zeros((8, LANES), np.uint32)  # [word of a digest, lane]
        source = np.frombuffer(data, np.uint8)
        self.digest_function(source.ctypes.data, len(source), words.ctypes.data)
        return words.T.astype("<u4").tobytes()


class NativeJob:
    """All rows of a batch that have an adapter (`lora_ops.Job`)."""

    def __init__(self, owner: NativeLora, segments: list[Segment]) -> None:
        self.owner = owner
        rows: list[int] = []
        self.stacks: dict[int, Stack] = {}
        first, longest = 0, 0
        for stack, slot, count in segments:
            if stack is not None and count:
                rows += (stack.table(slot, owner.parts), first, count)
                longest = max(longest, count)
                self.stacks[id(stack)] = stack
            first += count
        groups = range(len(owner.widths))
        self.columns = [max(sum(stack.groups[group].ranks) for stack in self.stacks.values()) for group in groups]
        self.adapted = [[any(s.groups[group].ranks[part] for s in self.stacks.values()) for part in range(len(owner.starts[group]))]
                        for group in groups]  # fmt: skip
        self.segments = torch.tensor(rows)
        stack = next(iter(self.stacks.values()))
        self.dtype, self.itemsize = stack.rows.dtype, stack.rows.element_size()
        self.count, self.wide = len(rows) // 3, longest > MANY_ROWS
        join = self.dtype == torch.bfloat16 and first >= JOINED_ROWS and first >= SEGMENT_ROWS * self.count
        self.joined = [join and able and columns > 0 for able, columns in zip(owner.joins, self.columns, strict=True)]
        # of adapted.cpp: blocks of 32 rows with all ranks of a part filled up; a segment has as many as its rows fill, and some at its ends
        padded = max(sum(-(-rank // PANEL) * PANEL for rank in s.groups[group].ranks) for s in self.stacks.values() for group in groups)
        joined = (first // 16 + 3 * self.count) * 32 * padded if any(self.joined) else 0
        # one element more: lora.cpp reads ranks in pairs
        self.scratch = torch.empty(max(first * max(self.columns) + 1, joined), dtype=self.dtype)
        self.pattern = list(zip((columns > 0 for columns in self.columns), self.joined, strict=True))  # which groups are adapted, and how

    def adapts(self, group: int, part: int | None = None) -> bool:
        return self.columns[group] > 0 if part is None else self.adapted[group][part]

    def stage(self, group: int, first: int, end: int) -> tuple[Any, Args]:
        """Adding to parts `first` to `end` of a group as a stage: x, y (of the group's first part) and their strides are for the caller
        to fill in."""
        owner = self.owner
        args = Args(
            outs=owner.outs_at[group], entry=group * (2 + 3 * owner.parts), width=owner.widths[group], first_part=first, end_part=end,
            shrink=True, is_bf16=self.dtype == torch.bfloat16,
        )  # fmt: skip
        self.give(args, group)
        return owner.library.swift_lora, args

    def give(self, args: Args, group: int) -> None:
        """What of a stage's arguments is this batch's."""
        args.segments, args.num_segments, args.wide = self.segments.data_ptr(), self.count, self.wide
        args.h, args.h_stride = self.scratch.data_ptr(), self.columns[group]

    def join(self, product: Product, group: int, gate: bool = False) -> tuple[Any, Adapted]:
        """The base's product of a whole group with the adapters' in it as one stage; silu(gate) * up of it when `gate`."""
        both = Adapted(product=product, adding=self.stage(group, 0, len(self.owner.starts[group]))[1], gate=gate)
        return self.owner.library.swift_adapted, both

    def multiply(self, weight: PanelWeight, bias: Tensor | None, group: int, x: Tensor) -> Tensor:
        """The base's product [1, T, out] of x [1, T, in] with the adapters' added, in one call. No segment's rows go beyond T."""
        x, y = weight.prepare(x, bias)
        if self.joined[group]:
            stages: list[Stage] = [self.join(weight.product, group)]
        else:
            adding = self._adding(group, 0, len(self.owner.starts[group]), x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1]))
            stages = [(self.owner.library.swift_linear, weight.product), adding]
        Run(self.owner.library, stages)()
        return y

    def add(self, group: int, first: int, end: int, x: Tensor, y: Tensor, h: Tensor | None) -> Tensor:
        if x.stride(1) != 1:
            x = x.contiguous()
        function, args = self._adding(group, first, end, x, y)
        args.shrink = h is None
        if h is None:  # nobody asks for the A product of all parts again
            whole = end - first == len(self.owner.starts[group])
            h = self.scratch if whole else torch.empty(x.shape[0] * self.columns[group] + 1, dtype=self.dtype)
        args.h = h.data_ptr()
        Run(self.owner.library, [(function, args)])()
        return h

    def _adding(self, group: int, first: int, end: int, x: Tensor, y: Tensor) -> tuple[Any, Args]:
        """`stage` for rows x [T, in], with unit stride in a row, and results y [T, outs of the parts]."""
        function, args = self.stage(group, first, end)
        args.x, args.y = x.data_ptr(), y.data_ptr() - self.owner.starts[group][first] * self.itemsize
        args.x_stride, args.y_stride = x.stride(0), y.stride(0)
        return function, args
