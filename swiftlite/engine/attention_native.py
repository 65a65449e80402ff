"""Paged attention by the C++ kernel (paged_attention.cpp): the same contract as attention_cpu.py, store included.

A `NativeBatch` holds what all layers of a step share; `attend` is one library call; for one of several, `describe` and `give` fill in
`Args`. Tensors and they must describe the same memory: the kernel checks nothing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor

from swiftlite.engine.attention_cpu import SequenceSlice
from swiftlite.engine.kv import AttentionLayer, KVCache
from swiftlite.kernels.stages import Run
from swiftlite.kernels.steps import Norm, Rotation, RotationArgs


class Args(ctypes.Structure):
    """struct Args of attention.h."""

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
        ("rotation", RotationArgs),
        *((name, ctypes.c_float) for name in ("scale", "softcap", "eps")),
    )


@dataclass(frozen=True)
class HeadSteps:
    """What the kernel does with q and k heads on the way: two norms of one kind and epsilon, or none, and the rotation."""

    norms: tuple[Norm, Norm] | None  # of q and k, weights [Dk]
    rotation: Rotation  # 0 dimensions: none


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
        self.args = Args(
            slots=slots.data_ptr(),
            tables=self.tables.data_ptr(),
            sequences=self.meta.data_ptr(),
            tokens=slots.shape[0],
            num_sequences=len(sequences),
            block_size=size,
            is_bf16=cache.dtype == torch.bfloat16,
        )
        self.library = library
        self.done: object = None  # the layers that this batch has passed as one call

    @cached_property
    def run(self) -> Run:
        """Attention alone, for layers that are not stages of one call."""
        return Run(self.library, [(self.library.swift_paged_attention, self.args)])

    def attend(self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [H, T, Dk], k [G, T, Dk], v [G, T, Dv], new tokens -> [T, H, Dv]; K and V are stored first."""
        if q.stride(2) != 1 or k.stride(2) != 1 or v.stride(2) != 1:
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        assert q.dtype == k.dtype == v.dtype == self.cache.dtype
        shape = (q.shape[1], layer.heads, layer.value_dim)
        out = q.new_empty(shape) if self.covered else q.new_zeros(shape)
        describe(self.args, layer, None)
        self.give(self.args, layer, None)
        args = self.args
        args.out, args.q, args.k, args.v = out.data_ptr(), q.data_ptr(), k.data_ptr(), v.data_ptr()
        args.q_head, args.q_token = q.stride(0), q.stride(1)
        args.k_head, args.k_token = k.stride(0), k.stride(1)
        args.v_head, args.v_token = v.stride(0), v.stride(1)
        self.run()
        return out

    def attend_raw(self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, heads: HeadSteps) -> Tensor:
        """The same from the projections as they are: q [1, T, H*Dk], k [1, T, G*Dk], v [1, T, G*Dv], rows may be strided.

        Norms of the heads and the rotation by cos and sin [1, T, its dimensions] are done by the kernel. Returns [1, T, H*Dv].
        """
        assert q.dtype == k.dtype == v.dtype == self.cache.dtype
        shape = (1, q.shape[1], layer.heads * layer.value_dim)
        out = q.new_empty(shape) if self.covered else q.new_zeros(shape)
        rotated = torch.empty(q.shape, dtype=q.dtype)
        describe(self.args, layer, heads)
        self.give(self.args, layer, (cos, sin))
        args = self.args
        args.out, args.q, args.k, args.v, args.rotated = (x.data_ptr() for x in (out, q, k, v, rotated))
        args.q_token, args.k_token, args.v_token = q.stride(1), k.stride(1), v.stride(1)
        self.run()
        return out

    def give(self, args: Args, layer: AttentionLayer, rotation: tuple[Tensor, Tensor] | None) -> None:
        """What of `args` is the batch's: where its rows are stored, what they see, and cosines and sines (contiguous) of `rotation`."""
        own, index = self.args, layer.index
        if args is not own:
            args.slots, args.tables, args.sequences = own.slots, own.tables, own.sequences
            args.tokens, args.num_sequences, args.block_size, args.is_bf16 = own.tokens, own.num_sequences, own.block_size, own.is_bf16
        args.keys, args.values = self.cache.keys[index].data_ptr(), self.cache.values[index].data_ptr()
        args.cos, args.sin = (None, None) if rotation is None else (rotation[0].data_ptr(), rotation[1].data_ptr())


def describe(args: Args, layer: AttentionLayer, heads: HeadSteps | None) -> None:
    """What of `args` is the layer's, for q, k and v whose heads lie behind each other."""
    args.heads, args.kv_heads, args.key_dim, args.value_dim = layer.heads, layer.kv_heads, layer.head_dim, layer.value_dim
    args.window, args.scale, args.softcap = layer.window or 0, layer.scale, layer.softcap or 0.0
    args.q_head = args.k_head = layer.head_dim
    args.v_head = layer.value_dim
    args.q_norm = args.k_norm = None
    if heads is not None:
        args.rotation = RotationArgs(*heads.rotation)
        if heads.norms is not None:
            q, k = heads.norms
            args.q_norm, args.k_norm, args.eps, args.norm_kind = q.weight.data_ptr(), k.weight.data_ptr(), q.eps, q.kind
