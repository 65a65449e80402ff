"""Paged attention and KV store as Triton kernels: one kernel for prefill chunks and decode.

A program takes one *task*: some consecutive queries of one sequence, and all query heads of one KV head, so that the heads of a
group share every load of K and V. Its rows are (query, head of the group) pairs. Keys are read through the block table in tiles,
only those that some query of the task sees; few tasks over long contexts split their tiles among several programs, whose results
a second kernel reduces. Softmax is online, in fp32 and base 2; products of float32 stay float32.

Triton compiles a kernel anew for each kind of arguments: whether a pointer or a number is a multiple of 16, and each constant. What
changes from batch to batch (widths of tables, addresses of their columns, the number of splits) is left out of that, so that all
variants of a layer (few or many rows, split or not) are compiled before the first request.

Invariants: what the batch holds (lengths, tables, slots) is read from tensors inside the kernels, never from arguments, so a
launch may be captured in a CUDA graph and replayed; a key outside a sequence's own tokens, or beyond every window of the task, is
not loaded at all; a sequence of length 0 (context -1, one query) writes zeros, which is what padding wants.
The same source runs in Triton's interpreter (TRITON_INTERPRET=1) on a CPU; the reference is attention_cpu.py.
This module does not know where its metadata comes from (attention_cuda.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from swiftlite.engine.kv import AttentionLayer

LOG2E = tl.constexpr(1.4426950408889634)
TILE_BYTES = 32 * 1024  # K and V of one tile: three of them in flight fit the shared memory of every GPU since 2020
MAX_SPLITS = 32
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, total):
    """total + a @ b in float32. The interpreter keeps bfloat16 as bits and would multiply those: there, floats are widened first."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit(
    do_not_specialize=["table_width"],
    do_not_specialize_on_alignment=["query_start_ptr", "query_len_ptr", "context_len_ptr", "tables_ptr", "tasks_ptr"],
)
def _attend(
    q_ptr, out_ptr, keys_ptr, values_ptr,  # [T, H, DK], [T, H, DV], [N, G, S, DK], [N, G, S, DV]
    part_ptr, weight_ptr,  # [P * QUERIES, H, splits, DV] and [P * QUERIES, H, splits] float32, only when SPLIT
    query_start_ptr, query_len_ptr, context_len_ptr, tables_ptr, tasks_ptr,  # [B], [B], [B], [B, W], [P, 2] int32
    scale, softcap,
    q_token, q_head, out_token, out_head, k_block, k_group, k_slot, v_block, v_group, v_slot, table_width,  # strides
    GROUP: tl.constexpr, SIZE: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
    SPLIT: tl.constexpr, ROWS: tl.constexpr, QUERIES: tl.constexpr, TILE: tl.constexpr, PAD_K: tl.constexpr, PAD_V: tl.constexpr,
):  # fmt: skip
    task, group, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence = tl.load(tasks_ptr + 2 * task)
    first = tl.load(tasks_ptr + 2 * task + 1)
    start = tl.load(query_start_ptr + sequence)
    count = tl.load(query_len_ptr + sequence)
    context = tl.load(context_len_ptr + sequence)

    row = tl.arange(0, ROWS)
    query = first + row // GROUP
    head = group * GROUP + row % GROUP
    valid = (row < QUERIES * GROUP) & (query < count)
    token = (start + query).to(tl.int64)
    position = context + query
    dk, dv = tl.arange(0, PAD_K), tl.arange(0, PAD_V)
    q = tl.load(q_ptr + token[:, None] * q_token + head[:, None] * q_head + dk[None, :], valid[:, None] & (dk < DK)[None, :], other=0.0)

    end = context + tl.minimum(first + QUERIES, count)  # keys low .. end - 1 are seen by some query of this task
    low = tl.maximum(context + first - WINDOW + 1, 0) if WINDOW > 0 else 0
    tile_low, tile_end = low // TILE, tl.cdiv(end, TILE)
    share = tl.cdiv(tile_end - tile_low, tl.num_programs(2))
    tile_low += split * share
    tile_end = tl.minimum(tile_low + share, tile_end)

    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, PAD_V], tl.float32)
    table = tables_ptr + sequence.to(tl.int64) * table_width
    for tile in range(tile_low, tile_end):
        at = tile * TILE + tl.arange(0, TILE)
        inside = (at >= low) & (at < end)
        block = tl.load(table + at // SIZE, inside, other=0).to(tl.int64)
        slot = at % SIZE
        k_at = keys_ptr + block * k_block + group * k_group + slot * k_slot
        k = tl.load(k_at[None, :] + dk[:, None], inside[None, :] & (dk < DK)[:, None], other=0.0)  # [PAD_K, TILE]
        score = dot(q, k, tl.zeros([ROWS, TILE], tl.float32)) * scale
        if CAPPED:
            decay = tl.exp2(tl.abs(score) * (-2 * LOG2E / softcap))
            score = tl.where(score < 0, -softcap, softcap) * (1 - decay) / (1 + decay)  # softcap * tanh(score / softcap)
        visible = at[None, :] <= position[:, None]
        if WINDOW > 0:
            visible = visible & (at[None, :] > position[:, None] - WINDOW)
        score = tl.where(visible, score * LOG2E, float("-inf"))
        new_best = tl.maximum(best, tl.max(score, 1))
        safe = tl.where(new_best == float("-inf"), 0.0, new_best)  # a row that has seen no key yet
        weight = tl.exp2(score - safe[:, None])
        fade = tl.exp2(best - safe)
        v_at = values_ptr + block * v_block + group * v_group + slot * v_slot
        v = tl.load(v_at[:, None] + dv[None, :], inside[:, None] & (dv < DV)[None, :], other=0.0)  # [TILE, PAD_V]
        mixed = dot(weight.to(v.dtype), v, mixed * fade[:, None])
        total = total * fade + tl.sum(weight, 1)
        best = new_best

    mixed = mixed / tl.where(total == 0, 1.0, total)[:, None]
    stored = valid[:, None] & (dv < DV)[None, :]
    if not SPLIT:
        tl.store(out_ptr + token[:, None] * out_token + head[:, None] * out_head + dv[None, :], mixed.to(out_ptr.dtype.element_ty), stored)
    else:
        heads = tl.num_programs(1) * GROUP
        cell = ((task * QUERIES + row // GROUP).to(tl.int64) * heads + head) * tl.num_programs(2) + split
        tl.store(part_ptr + cell[:, None] * DV + dv[None, :], mixed, stored)
        tl.store(weight_ptr + cell, best + tl.log2(total), valid)  # -inf where this split saw no key


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=["query_start_ptr", "query_len_ptr", "tasks_ptr"])
def _reduce(
    part_ptr, weight_ptr, out_ptr, query_start_ptr, query_len_ptr, tasks_ptr, splits, out_token, out_head,
    DV: tl.constexpr, MOST: tl.constexpr, QUERIES: tl.constexpr, PAD_V: tl.constexpr,
):  # fmt: skip
    cell_row, head = tl.program_id(0), tl.program_id(1)
    task = cell_row // QUERIES
    sequence = tl.load(tasks_ptr + 2 * task)
    query = tl.load(tasks_ptr + 2 * task + 1) + cell_row % QUERIES
    if query < tl.load(query_len_ptr + sequence):
        split, dv = tl.arange(0, MOST), tl.arange(0, PAD_V)
        cell = (cell_row.to(tl.int64) * tl.num_programs(1) + head) * splits + split
        weight = tl.load(weight_ptr + cell, split < splits, other=float("-inf"))
        best = tl.max(weight, 0)
        weight = tl.exp2(weight - tl.where(best == float("-inf"), 0.0, best))
        part = tl.load(part_ptr + cell[:, None] * DV + dv[None, :], (weight > 0)[:, None] & (dv < DV)[None, :], other=0.0)
        total = tl.sum(weight, 0)
        mixed = tl.sum(part * weight[:, None], 0) / tl.where(total == 0, 1.0, total)
        token = (tl.load(query_start_ptr + sequence) + query).to(tl.int64)
        tl.store(out_ptr + token * out_token + head * out_head + dv, mixed.to(out_ptr.dtype.element_ty), dv < DV)


@triton.jit
def _store(
    k_ptr, v_ptr, slots_ptr, keys_ptr, values_ptr,
    k_token, k_head, v_token, v_head, k_block, k_group, k_slot, v_block, v_group, v_slot,
    SIZE: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, PAD_K: tl.constexpr, PAD_V: tl.constexpr,
):  # fmt: skip
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots_ptr + token)
    if slot >= 0:
        block, offset = slot // SIZE, slot % SIZE
        dk, dv = tl.arange(0, PAD_K), tl.arange(0, PAD_V)
        k = tl.load(k_ptr + token * k_token + group * k_head + dk, dk < DK)
        tl.store(keys_ptr + block * k_block + group * k_group + offset * k_slot + dk, k.to(keys_ptr.dtype.element_ty), dk < DK)
        v = tl.load(v_ptr + token * v_token + group * v_head + dv, dv < DV)
        tl.store(values_ptr + block * v_block + group * v_group + offset * v_slot + dv, v.to(values_ptr.dtype.element_ty), dv < DV)


@dataclass(frozen=True)
class Sequences:
    """A batch's sequences as tensors, all int32. Sequence i: rows query_start[i] .. + query_len[i], after context_len[i] tokens.

    A padded entry has one query and context -1: its row comes back as zeros. Entries of `tables` beyond a sequence's length are
    never read.
    """

    query_start: Tensor  # [B]
    query_len: Tensor  # [B]
    context_len: Tensor  # [B]
    tables: Tensor  # [B, W]


@dataclass(frozen=True)
class Shape:
    """How one launch cuts its work; `rows` are rows of a program, (query, head) pairs."""

    rows: int
    queries: int
    tile: int
    warps: int
    stages: int


def pad(dim: int) -> int:
    """A head dim as the kernels see it: a power of two that the tensor cores take."""
    return max(16, triton.next_power_of_2(dim))


def shape_for(layer: AttentionLayer, itemsize: int, longest: int) -> Shape:
    """The cut for sequences of at most `longest` queries: 16 rows where those are enough (decode), else what registers allow."""
    group = layer.heads // layer.kv_heads
    dims = pad(layer.head_dim) + pad(layer.value_dim)
    rows = 16 if longest * group <= 16 else 64 if itemsize < 4 else 32  # float32 runs without tensor cores and takes more registers
    rows = max(rows, triton.next_power_of_2(group))
    warps = 4 if itemsize < 4 and (rows == 16 or dims <= 512) else 8  # wider rows of results do not fit the registers of four
    tile = max(16, min(128 if rows == 16 else 64, TILE_BYTES // (dims * itemsize)))
    return Shape(rows, rows // group, 1 << (tile.bit_length() - 1), warps, 3 if rows == 16 else 2)


def choose_splits(programs: int, context: int, tile: int, processors: int) -> int:
    """Over how many programs each task's keys are spread (a power of two): enough to fill the GPU twice, none for short contexts."""
    if programs >= processors:
        return 1
    splits = min(-(-2 * processors // programs), context // tile, MAX_SPLITS)
    return 1 << (splits.bit_length() - 1) if splits > 1 else 1


def attend(
    q: Tensor, out: Tensor, keys: Tensor, values: Tensor, batch: Sequences, tasks: Tensor, layer: AttentionLayer, shape: Shape, splits: int
) -> None:
    """Attend q [T, H, Dk] to keys [N, G, S, Dk] and values [N, G, S, Dv]; fills the rows of `tasks` in out [T, H, Dv].

    `tasks` [P, 2] int32 names (sequence, first query) of every `shape.queries` queries. The last dim of all tensors is dense.
    The new tokens' K and V are already stored.
    """
    count, group = tasks.shape[0], layer.heads // layer.kv_heads
    part = weight = out  # not touched without splits
    if splits > 1:
        part = torch.empty(count * shape.queries, layer.heads, splits, layer.value_dim, dtype=torch.float32, device=q.device)
        weight = torch.empty(count * shape.queries, layer.heads, splits, dtype=torch.float32, device=q.device)
    _attend[(count, layer.kv_heads, splits)](
        q, out, keys, values, part, weight,
        batch.query_start, batch.query_len, batch.context_len, batch.tables, tasks,
        layer.scale, layer.softcap or 1.0,
        *q.stride()[:2], *out.stride()[:2], *keys.stride()[:3], *values.stride()[:3], batch.tables.stride(0),
        group, keys.shape[2], layer.head_dim, layer.value_dim, layer.window or 0, layer.softcap is not None,
        splits > 1, shape.rows, shape.queries, shape.tile, pad(layer.head_dim), pad(layer.value_dim),
        num_warps=shape.warps, num_stages=shape.stages, enable_fp_fusion=True,
    )  # fmt: skip
    if splits > 1:
        _reduce[(count * shape.queries, layer.heads)](
            part, weight, out, batch.query_start, batch.query_len, tasks, splits, *out.stride()[:2],
            layer.value_dim, MAX_SPLITS, shape.queries, pad(layer.value_dim), num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip


def store(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Write k [T, G, Dk] and v [T, G, Dv] at slots [T] int64 of the pools keys [N, G, S, Dk], values [N, G, S, Dv]; -1: skipped."""
    _store[(k.shape[0], k.shape[1])](
        k, v, slots, keys, values, *k.stride()[:2], *v.stride()[:2], *keys.stride()[:3], *values.stride()[:3],
        keys.shape[2], k.shape[2], v.shape[2], pad(k.shape[2]), pad(v.shape[2]), num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip
