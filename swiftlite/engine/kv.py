"""The paged KV cache: one K pool and one V pool per attention layer, cut into blocks of `block_size` tokens.

Layout [num_blocks, G, block_size, D]: the tokens of one KV head inside a block are contiguous, which is what decode reads.
A slot is `block * block_size + offset`; slot -1 is skipped, so padded rows are harmless. Geometry comes from the probe, layer by
layer (local and global layers may differ, Dk may differ from Dv).
This module does not know which sequence owns a block (blocks.py) and does not attend (attention_cpu.py).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from swiftlite.engine.transfer import to_device
from swiftlite.pages import zeros


@dataclass(frozen=True)
class AttentionLayer:
    """What the probe saw at one attention call: the geometry and the softmax's settings."""

    index: int  # order of the call
    name: str  # module name, for messages
    heads: int  # H
    kv_heads: int  # G
    head_dim: int  # Dk
    value_dim: int  # Dv
    scale: float
    window: int | None = None  # a token sees itself and the window - 1 before it
    softcap: float | None = None  # scores become softcap * tanh(scores / softcap)


class KVCache:
    """Pools for all layers. On a CPU memory only becomes resident where tokens are stored, in pages of up to 2 MiB."""

    def __init__(
        self, layers: Sequence[AttentionLayer], num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_blocks, self.block_size, self.dtype, self.device = num_blocks, block_size, dtype, device
        self.keys: list[Tensor] = []  # per layer [num_blocks, G, block_size, Dk]
        self.values: list[Tensor] = []  # per layer [num_blocks, G, block_size, Dv]
        for layer in layers:
            shape = (num_blocks, layer.kv_heads, block_size)
            self.keys.append(self._pool(*shape, layer.head_dim))
            self.values.append(self._pool(*shape, layer.value_dim))

    def _pool(self, *shape: int) -> Tensor:
        if self.device.type == "cpu":
            return zeros(*shape, dtype=self.dtype)
        return torch.zeros(*shape, dtype=self.dtype, device=self.device)

    @staticmethod
    def bytes_per_block(layers: Sequence[AttentionLayer], block_size: int, dtype: torch.dtype) -> int:
        """Bytes that one block takes over all layers, K and V together."""
        return sum(layer.kv_heads * (layer.head_dim + layer.value_dim) for layer in layers) * block_size * dtype.itemsize

    def store(self, layer: int, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """Write k [T, G, Dk] and v [T, G, Dv] of new tokens at slots [T] (int64); rows whose slot is -1 are skipped."""
        kept = slots >= 0
        if not bool(kept.all()):
            k, v, slots = k[kept], v[kept], slots[kept]
        blocks, offsets = slots // self.block_size, slots % self.block_size
        self.keys[layer][blocks, :, offsets] = k
        self.values[layer][blocks, :, offsets] = v

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks (source, destination) in every layer: the copy of copy-on-write."""
        if not pairs:
            return
        sources, targets = to_device(pairs, torch.int64, self.device).unbind(1)
        for pool in (*self.keys, *self.values):
            pool[targets] = pool[sources]


def available_memory() -> int:
    """Bytes of main memory that this process may still take: the free memory of the machine or of its cgroup, whichever is less."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        free = int(fields["MemAvailable"].split()[0]) * 1024
    limits = (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    )
    for limit, usage in limits:
        try:
            free = min(free, int(Path(limit).read_text()) - int(Path(usage).read_text()))
        except (OSError, ValueError):  # no cgroup, or "max"
            continue
    return max(free, 0)
