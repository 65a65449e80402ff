"""The product of a frozen weight and its low-rank adapter (lowrank.cpp) on tensors: bfloat16 on CPUs with a matrix unit (Intel's AMX).

One rounding where torch's way, a product and an addition of another, has two. Against oneDNN's product alone, in turn: 1.1 to 1.4
times as fast at 1024 rows. The kernel checks nothing: addresses and sizes must describe the tensors.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from swiftlite.kernels.build import load_library

STEP = 32  # inputs that the unit takes at once, and outputs of a panel (DEPTH in unit.h, WIDTH in panels.h)


class _Product(ctypes.Structure):
    """struct LowRankProduct of lowrank.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("out", "x", "w", "bias", "low", "up")),
        *((name, ctypes.c_int64) for name in ("rows", "stride", "n", "k", "rank", "across")),
    )


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = load_library("steps")
    if library is None or not library.swift_low_rank_ready():
        return None
    library.swift_low_rank.argtypes = [ctypes.c_void_p, ctypes.c_int]
    return library


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether `multiply` is for x [T, in] and a weight [out, in]. Not while torch compiles: it writes kernels of its own."""
    fits = x.dtype == weight.dtype == torch.bfloat16 and x.device.type == "cpu" and weight.shape[0] % STEP == weight.shape[1] % STEP == 0
    return fits and x.shape[0] > 0 and weight.is_contiguous() and not torch.compiler.is_compiling() and _library() is not None


def widened(a: Tensor) -> Tensor:
    """a [R, n] float32 in bfloat16 with zero rows up to a multiple of STEP, as `multiply` takes a rank."""
    out = torch.zeros((len(a) + STEP - 1) // STEP * STEP, a.shape[1], dtype=torch.bfloat16)
    out[: len(a)] = a
    return out


def multiply(x: Tensor, weight: Tensor, low: Tensor, up: Tensor, bias: Tensor | None = None, *, across: bool = False) -> Tensor:
    """x [T, in] W^T + low [T, R] up [R, out] + bias -> [T, out], for W [out, in]; R is a multiple of STEP.

    `across`: x [T, out] W + low up [R, in] -> [T, in].
    """
    n, k = weight.shape[::-1] if across else weight.shape
    x, low, up = x if x.stride(1) == 1 else x.contiguous(), low.contiguous(), up.contiguous()
    out = torch.empty(len(x), n, dtype=torch.bfloat16)
    product = _Product(
        out.data_ptr(), x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), low.data_ptr(), up.data_ptr(),
        len(x), x.stride(0), n, k, low.shape[1], across,
    )  # fmt: skip
    library = _library()
    assert library is not None
    library.swift_low_rank(ctypes.byref(product), torch.get_num_threads())
    return out
