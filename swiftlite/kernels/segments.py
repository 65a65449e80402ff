"""Causal attention within documents that lie end to end (segments.cpp) on tensors, with its gradient: bfloat16 on CPUs with a matrix
unit (Intel's AMX).

The documents are read where they lie, whatever their lengths, and one number a query is kept for the backward. Its references are
torch's own attention, document by document, and `models/attention_blocks.py`. The kernel checks nothing: addresses and sizes must
describe the tensors.
"""

from __future__ import annotations

import ctypes
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from swiftlite.kernels import unit


class _Args(ctypes.Structure):
    """struct SegmentAttention of segments.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("out", "levels", "q", "k", "v", "grad", "grad_q", "grad_k", "grad_v", "starts")),
        *((f"{name}_{part}", ctypes.c_int64) for name in ("q", "k", "v", "grad") for part in ("token", "head")),
        *((name, ctypes.c_int64) for name in ("tokens", "documents", "heads", "kv_heads", "key_dim", "value_dim", "window")),
        ("scale", ctypes.c_float),
    )


def takes(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scale: float) -> bool:
    """Whether `attend` is for q [1, H, T, D], k [1, G, T, D] and v [1, G, T, Dv]. A document's KV head is one thread's work, so the
    longest must be no more than a thread's share of all (a document's work grows with its length squared)."""
    fits = len(q) == 1 and q.shape[3] % unit.STEP == 0 and v.shape[3] % unit.STEP == 0 and q.shape[1] % k.shape[1] == 0 and scale > 0
    work = [length * length for length in lengths]
    shared = 0 < torch.get_num_threads() * max(work, default=0) <= k.shape[1] * sum(work)
    return unit.takes(q, k, v) and fits and shared and unit.library() is not None


def attend(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scale: float, window: int | None) -> Tensor:
    """q [1, H, T, D], k [1, G, T, D], v [1, G, T, Dv] -> [1, T, H, Dv]; a query sees itself and the tokens of its document before it,
    `window` of them in all (None: all). `lengths` of the documents sum to T."""
    return _Attention.apply(q, k, v, lengths, scale, window)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _args(q: Tensor, k: Tensor, v: Tensor, levels: Tensor, starts: Tensor, scale: float, window: int | None) -> _Args:
    _, heads, tokens, dim = q.shape
    args = _Args(
        levels=levels.data_ptr(), q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(), starts=starts.data_ptr(),
        tokens=tokens, documents=len(starts) - 1, heads=heads, kv_heads=k.shape[1], key_dim=dim, value_dim=v.shape[3],
        window=window or 0, scale=scale,
    )  # fmt: skip
    args.q_token, args.q_head, args.k_token, args.k_head = q.stride(2), q.stride(1), k.stride(2), k.stride(1)
    args.v_token, args.v_head = v.stride(2), v.stride(1)
    return args


def _run(args: _Args, *, back: bool) -> None:
    library = unit.library()
    assert library is not None
    library.swift_segment_attention(ctypes.byref(args), ctypes.c_int(back), ctypes.c_int(torch.get_num_threads()))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scale: float, window: int | None) -> Tensor:
        q, k, v = _rows(q), _rows(k), _rows(v)
        heads, tokens = q.shape[1:3]
        starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int64, device="cpu")
        assert starts[-1] == tokens == k.shape[2] == v.shape[2]
        out, levels = q.new_empty(1, tokens, heads, v.shape[3]), q.new_empty(heads, tokens, dtype=torch.float32)
        args = _args(q, k, v, levels, starts, scale, window)
        args.out = out.data_ptr()
        _run(args, back=False)
        ctx.save_for_backward(q, k, v, levels, starts)
        ctx.settings = scale, window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        q, k, v, *rest = ctx.saved_tensors
        grad = _rows(grad)
        # [1, T, heads, dim], as the projections' outputs lie
        grads = [torch.empty(1, x.shape[2], x.shape[1], x.shape[3], dtype=x.dtype) for x in (q, k, v)]
        args = _args(q, k, v, *rest, *ctx.settings)
        args.grad, args.grad_token, args.grad_head = grad.data_ptr(), grad.stride(1), grad.stride(2)
        args.grad_q, args.grad_k, args.grad_v = (x.data_ptr() for x in grads)
        _run(args, back=True)
        grad_q, grad_k, grad_v = (x.transpose(1, 2) for x in grads)
        return grad_q, grad_k, grad_v, None, None, None
