"""Batched LoRA products as Triton kernels: h = x A^T per row's adapter (shrink), y += h B (expand).

Rows come in *tasks*: up to ROWS consecutive rows of one adapter, or of none (stack -1: the program ends at once). Where an
adapter's weights lie and how large its rank is, the kernels read from tables indexed by stack (engine/lora_ops.py), so adapters
of different ranks and targets share a launch, and a captured launch serves whatever the tables say at its replay. Linears with one
input (q/k/v, gate/up) share the shrink; expand runs over one part, or over all parts of a fused linear at once.

The depth of the shrink is cut among `splits` programs whose partial sums expand adds in order: no atomics, the same result each time.
Sums are in float32; h is rounded to the weights' dtype before B, as the reference (`lora_ops.reference`) rounds it.
This module does not know names, versions or requests (lora_cuda.py has the tables).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from swiftlite.engine.triton_attention import dot

COLUMNS = 128  # of one program's share of the output
DEPTH = 64  # of one step along the input's width
RANKS = 16  # of one step along the rank
MAX_SPLITS = 8


@triton.jit
def _weights(address_ptr, entry, slot, stride, like_ptr, ALIGNED: tl.constexpr):
    """Pointer to a slot's matrix: the address of slot 0's, plus `slot` strides."""
    pointer = tl.load(address_ptr + entry).to(tl.pointer_type(like_ptr.dtype.element_ty)) + slot * stride
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)  # without it, each element would be a load of its own
    return pointer


@triton.jit(do_not_specialize=["group"])
def _shrink(
    x_ptr, h_ptr, tasks_ptr,  # [T, K], [splits, T, C] float32, [P, 4] int32: first row, rows, stack, slot
    a_ptr, rank_ptr, stride_ptr,  # [stacks, groups] int64 and int32, [stacks] int64
    group, groups, width, x_row, h_split, h_row,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    task, split = tl.program_id(0), tl.program_id(1)
    first, count = tl.load(tasks_ptr + 4 * task), tl.load(tasks_ptr + 4 * task + 1)
    stack, slot = tl.load(tasks_ptr + 4 * task + 2), tl.load(tasks_ptr + 4 * task + 3)
    if stack >= 0:
        entry = stack * groups + group
        rank = tl.load(rank_ptr + entry)
        a = _weights(a_ptr, entry, slot, tl.load(stride_ptr + stack), x_ptr, ALIGNED)  # [rank, width]
        row = tl.arange(0, ROWS)
        token = (first + row).to(tl.int64)
        for start in range(0, rank, RANKS):
            r = start + tl.arange(0, RANKS)
            total = tl.zeros([ROWS, RANKS], tl.float32)
            for depth in range(split * DEPTH, width, tl.num_programs(1) * DEPTH):
                k = depth + tl.arange(0, DEPTH)
                x = tl.load(x_ptr + token[:, None] * x_row + k[None, :], (row < count)[:, None] & (k < width)[None, :], other=0.0)
                weight = tl.load(a + r[None, :] * width + k[:, None], (r < rank)[None, :] & (k < width)[:, None], other=0.0)
                total = dot(x, weight, total)
            h = h_ptr + split * h_split + token[:, None] * h_row + r[None, :]
            tl.store(h, total, (row < count)[:, None] & (r < rank)[None, :])


@triton.jit(do_not_specialize=["group", "part", "splits"])
def _expand(
    h_ptr, y_ptr, tasks_ptr,  # [splits, T, C] float32, [T, columns], [P, 4] int32
    b_ptr, rank_ptr, start_ptr, stride_ptr,  # [stacks, groups, parts] int64, int32, int32 (first column in h), [stacks] int64
    out_ptr,  # [groups, parts, 2] int32: first column of the part in a fused y, its width
    group, groups, part, parts, splits, h_split, h_row, y_row,
    FUSED: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    task = tl.program_id(0)
    part += tl.program_id(2)
    first, count = tl.load(tasks_ptr + 4 * task), tl.load(tasks_ptr + 4 * task + 1)
    stack, slot = tl.load(tasks_ptr + 4 * task + 2), tl.load(tasks_ptr + 4 * task + 3)
    width = tl.load(out_ptr + (group * parts + part) * 2 + 1)
    if ALIGNED:
        width = tl.multiple_of(width, 16)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    if (stack >= 0) & (tl.program_id(1) * COLUMNS < width):
        entry = (stack * groups + group) * parts + part
        rank = tl.load(rank_ptr + entry)
        if rank > 0:
            b = _weights(b_ptr, entry, slot, tl.load(stride_ptr + stack), y_ptr, ALIGNED)  # [rank, width]
            row = tl.arange(0, ROWS)
            token = (first + row).to(tl.int64)
            h_at = h_ptr + token[:, None] * h_row + tl.load(start_ptr + entry)
            total = tl.zeros([ROWS, COLUMNS], tl.float32)
            for start in range(0, rank, RANKS):
                r = start + tl.arange(0, RANKS)
                inside = (row < count)[:, None] & (r < rank)[None, :]
                h = tl.zeros([ROWS, RANKS], tl.float32)
                for split in range(splits):
                    h += tl.load(h_at + split * h_split + r[None, :], inside, other=0.0)
                seen = (r < rank)[:, None] & (column < width)[None, :]
                weight = tl.load(b + r[:, None] * width + column[None, :], seen, other=0.0)
                total = dot(h.to(weight.dtype), weight, total)
            y_at = y_ptr + token[:, None] * y_row + column[None, :]
            if FUSED:
                begin = tl.load(out_ptr + (group * parts + part) * 2)
                if ALIGNED:
                    begin = tl.multiple_of(begin, 16)
                y_at += begin
            stored = (row < count)[:, None] & (column < width)[None, :]
            y = tl.load(y_at, stored, other=0.0).to(tl.float32) + total
            tl.store(y_at, y.to(y_ptr.dtype.element_ty), stored)


@dataclass(frozen=True)
class Tables:
    """Where each stack's weights lie: addresses of slot 0, `stride` elements from slot to slot. A stack's rows are its adapters'."""

    a: Tensor  # [stacks, groups] int64
    b: Tensor  # [stacks, groups, parts] int64
    stride: Tensor  # [stacks] int64
    total: Tensor  # [stacks, groups] int32: rank of all parts together, 0: not adapted
    rank: Tensor  # [stacks, groups, parts] int32
    start: Tensor  # [stacks, groups, parts] int32: first column of a part in h
    out: Tensor  # [groups, parts, 2] int32: first column in a fused result, width


def splits_for(tasks: int, width: int, processors: int) -> int:
    """Programs among which the depth of one shrink is cut (a power of two)."""
    splits = min(processors // tasks, width // (4 * DEPTH), MAX_SPLITS)
    return 1 << (splits.bit_length() - 1) if splits > 1 else 1


def shrink(x: Tensor, tables: Tables, group: int, tasks: Tensor, rows: int, columns: int, splits: int, aligned: bool) -> Tensor:
    """x [T, K] -> h [splits, T, columns] float32, only written where a row's adapter has a rank. `rows` of a task, at most."""
    h = torch.empty(splits, x.shape[0], columns, dtype=torch.float32, device=x.device)
    _shrink[(tasks.shape[0], splits)](
        x, h, tasks, tables.a, tables.total, tables.stride, group, tables.a.shape[1], x.shape[1], x.stride(0), *h.stride()[:2],
        aligned, rows, RANKS, DEPTH, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return h


def expand(h: Tensor, y: Tensor, tables: Tables, group: int, parts: range, width: int, tasks: Tensor, rows: int, aligned: bool) -> None:
    """y [T, out] += h B for one part, or for all `parts` of a fused linear, y [T, sum of outs]. `width` is the widest part's."""
    _expand[(tasks.shape[0], triton.cdiv(width, COLUMNS), len(parts))](
        h, y, tasks, tables.b, tables.rank, tables.start, tables.stride, tables.out,
        group, tables.a.shape[1], parts.start, tables.b.shape[2], h.shape[0], *h.stride()[:2], y.stride(0),
        len(parts) > 1, aligned, rows, RANKS, COLUMNS, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
