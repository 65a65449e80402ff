"""Paged attention by the C++ kernel (paged_attention.cpp): the same contract as attention_cpu.py, store included.

A `NativeBatch` holds what all layers of a step share; `attend` is one library call, and `stage` one of several in a call. Tensors and
`_Args` must describe the same memory: the kernel checks nothing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from swiftlite.engine.attention_cpu import SequenceSlice
from swiftlite.engine.kv import AttentionLayer, KVCache
from swiftlite.kernels.stages import Run


class _Args(ctypes.Structure):
    """struct Args of paged_attention.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("out", "q", "k", "v", "keys", "values", "slots", "tables", "sequences")),
        *((name, ctypes.c_void_p) for name in ("cos", "sin", "q_norm", "k_norm", "rotated")),
        *((name, ctypes.c_int64) for name in ("q_token", "q_head", "k_token", "k_head", "v_token", "v_head")),
        *(
            (name, ctypes.c_int32)
            for name in (
                *("tokens", "num_sequences", "heads", "kv_heads", "key_dim", "value_dim"),
                *("block_size", "window", "is_bf16", "norm_kind"),
            )
        ),
        *((name, ctypes.c_float) for name in ("scale", "softcap", "eps")),
    )


@dataclass(frozen=True)
class HeadNorms:
    """RMSNorms of q and k heads that the kernel does on the way (see fused.cpp for the kinds)."""

    q: Tensor  # [Dk]
    k: Tensor  # [Dk]
    eps: float
    kind: int


class NativeBatch:
    """One step's pages for the kernel."""

    def __init__(self, library: ctypes.CDLL, cache: KVCache, slots: Tensor, sequences: Sequence[SequenceSlice]) -> None:
        self.cache, self.slots = cache, slots
        meta: list[int] = []
        offset = 0
        size = cache.block_size
        tables: list[Sequence[int]] = []
        for sequence in sequences:
            used = -(-(sequence.context_len + sequence.query_len) // size)
            meta += (sequence.query_start, sequence.query_len, sequence.context_len, offset)
            tables.append(sequence.block_table[:used])
            offset += used
        self.meta = torch.tensor(meta, dtype=torch.int32)
        self.tables = torch.tensor(list(chain.from_iterable(tables)), dtype=torch.int32)
        self.covered = sum(sequence.query_len for sequence in sequences) == slots.shape[0]
        self.args = _Args(
            slots=slots.data_ptr(),
            tables=self.tables.data_ptr(),
            sequences=self.meta.data_ptr(),
            tokens=slots.shape[0],
            num_sequences=len(sequences),
            block_size=size,
            is_bf16=cache.dtype == torch.bfloat16,
        )
        self.stage = library.swift_paged_attention, self.args
        self.run = Run(library, [self.stage])

    def attend(self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [H, T, Dk], k [G, T, Dk], v [G, T, Dv], new tokens -> [T, H, Dv]; K and V are stored first."""
        if q.stride(2) != 1 or k.stride(2) != 1 or v.stride(2) != 1:
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        assert q.dtype == k.dtype == v.dtype == self.cache.dtype
        shape = (q.shape[1], layer.heads, layer.value_dim)
        out = q.new_empty(shape) if self.covered else q.new_zeros(shape)
        args = self.args
        args.cos = None
        args.out, args.q, args.k, args.v = out.data_ptr(), q.data_ptr(), k.data_ptr(), v.data_ptr()
        args.q_head, args.q_token = q.stride(0), q.stride(1)
        args.k_head, args.k_token = k.stride(0), k.stride(1)
        args.v_head, args.v_token = v.stride(0), v.stride(1)
        self._at(layer)
        self.run()
        return out

    def attend_raw(
        self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, norms: HeadNorms | None
    ) -> Tensor:
        """The same from the projections as they are: q [1, T, H*Dk], k [1, T, G*Dk], v [1, T, G*Dv], rows may be strided.

        Norms of the heads and the rotation by cos and sin [1, T, Dk] are done by the kernel. Returns [1, T, H*Dv].
        """
        assert q.dtype == k.dtype == v.dtype == cos.dtype == self.cache.dtype
        shape = (1, q.shape[1], layer.heads * layer.value_dim)
        out = q.new_empty(shape) if self.covered else q.new_zeros(shape)
        rotated = torch.empty(q.shape, dtype=q.dtype)
        self.prepare_raw(layer, cos, sin, norms)
        args = self.args
        args.out, args.q, args.k, args.v, args.rotated = (x.data_ptr() for x in (out, q, k, v, rotated))
        args.q_token, args.k_token, args.v_token = q.stride(1), k.stride(1), v.stride(1)
        self.run()
        return out

    def prepare_raw(self, layer: AttentionLayer, cos: Tensor, sin: Tensor, norms: HeadNorms | None) -> None:
        """All of `args` for `attend_raw`'s work but where q, k, v, out and the rotated q lie, and how far their rows."""
        args = self.args
        args.cos, args.sin = cos.data_ptr(), sin.data_ptr()
        if norms is None:
            args.q_norm = args.k_norm = None
        else:
            args.q_norm, args.k_norm, args.eps, args.norm_kind = norms.q.data_ptr(), norms.k.data_ptr(), norms.eps, norms.kind
        args.q_head = args.k_head = layer.head_dim
        args.v_head = layer.value_dim
        self._at(layer)

    def _at(self, layer: AttentionLayer) -> None:
        args = self.args
        args.keys, args.values = self.cache.keys[layer.index].data_ptr(), self.cache.values[layer.index].data_ptr()
        args.heads, args.kv_heads, args.key_dim, args.value_dim = layer.heads, layer.kv_heads, layer.head_dim, layer.value_dim
        args.window, args.scale, args.softcap = layer.window or 0, layer.scale, layer.softcap or 0.0
