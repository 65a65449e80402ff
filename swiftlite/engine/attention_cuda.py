"""Paged attention on a GPU: a batch's sequences as tensors of fixed shape, and the launches of the Triton kernels.

Made once a step and used by every layer: which sequences, which tasks for each way to cut them. Sequences with few queries
(decode) and longer chunks are launched apart, because they want other tiles. Nothing is read back from the device.
It does not know the model or the scheduler. Imported only where the kernels run: it needs Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from swiftlite.engine import triton_attention as kernels
from swiftlite.engine.attention_cpu import SequenceSlice
from swiftlite.engine.kv import AttentionLayer, KVCache
from swiftlite.engine.transfer import to_device

SHORT = 4  # queries: up to so many, a sequence is launched with the decoding ones


@dataclass(frozen=True)
class Part:
    """Sequences that are launched together: (index in the batch, queries) each, and bounds of their lengths."""

    members: list[tuple[int, int]]
    longest: int  # queries
    context: int  # most keys that one may see


@dataclass
class DevicePages:
    """A batch's sequences on the device. `covered`: every row belongs to one of them, so no row is left to fill with zeros."""

    sequences: kernels.Sequences
    parts: list[Part]
    covered: bool
    processors: int  # of the device; how finely long contexts are split
    _tasks: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # by (part, queries of a task): [P, 2] int32

    def attend(self, q: Tensor, k: Tensor, v: Tensor, slots: Tensor, cache: KVCache, layer: AttentionLayer) -> Tensor:
        """Store k [T, G, Dk] and v [T, G, Dv] at `slots`, then attend q [T, H, Dk]; returns [T, H, Dv], zeros for rows of no sequence."""
        q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
        keys, values = cache.keys[layer.index], cache.values[layer.index]
        kernels.store(keys, values, k, v, slots)
        fresh = q.new_empty if self.covered else q.new_zeros
        out = fresh(q.shape[0], layer.heads, layer.value_dim)
        for number, part in enumerate(self.parts):
            shape = kernels.shape_for(layer, q.element_size(), part.longest)
            tasks = self.tasks(number, shape.queries)
            context = part.context if layer.window is None else min(part.context, layer.window + shape.queries)
            splits = kernels.choose_splits(len(tasks) * layer.kv_heads, context, shape.tile, self.processors)
            kernels.attend(q, out, keys, values, self.sequences, tasks, layer, shape, splits)
        return out

    def tasks(self, number: int, queries: int) -> Tensor:
        """[P, 2] int32 on the device: sequence and first query of each task of part `number`."""
        if (number, queries) not in self._tasks:
            found = [(index, first) for index, count in self.parts[number].members for first in range(0, count, queries)]
            self._tasks[number, queries] = to_device(found, torch.int32, self.sequences.tables.device)
        return self._tasks[number, queries]


def pages(slices: Sequence[SequenceSlice], rows: int, device: torch.device) -> DevicePages:
    """The sequences of one step of `rows` rows."""
    width = max(len(piece.block_table) for piece in slices)
    host = torch.zeros(len(slices), 3 + width, dtype=torch.int32, pin_memory=device.type == "cuda")
    for row, piece in zip(host.numpy(), slices, strict=True):
        row[:3] = piece.query_start, piece.query_len, piece.context_len
        row[3 : 3 + len(piece.block_table)] = piece.block_table
    table = host.to(device, non_blocking=True)  # one copy
    starts, counts, contexts = (column.contiguous() for column in table[:, :3].unbind(1))
    sequences = kernels.Sequences(starts, counts, contexts, table[:, 3:])
    parts = []
    for short in (True, False):
        members = [(index, piece.query_len) for index, piece in enumerate(slices) if (piece.query_len <= SHORT) == short]
        if members:
            ends = [slices[index].context_len + count for index, count in members]
            parts.append(Part(members, max(count for _, count in members), max(ends)))
    return DevicePages(sequences, parts, sum(piece.query_len for piece in slices) == rows, processors_of(device))


def decode_pages(query_start: Tensor, context_len: Tensor, tables: Tensor, context: int) -> DevicePages:
    """One query for each of B sequences, in tensors [B], [B], [B, W] int32 that the caller refills: for captured steps.

    `context` bounds the length of any sequence. A row with context -1 is padding.
    """
    members = [(index, 1) for index in range(len(query_start))]
    sequences = kernels.Sequences(query_start, torch.ones_like(query_start), context_len, tables)
    return DevicePages(sequences, [Part(members, 1, context)], True, processors_of(query_start.device))


def processors_of(device: torch.device) -> int:
    """Programs that run at the same time, about; a small number in the interpreter, so that it splits too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
