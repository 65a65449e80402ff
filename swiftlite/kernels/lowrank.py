"""The product of a frozen weight and its low-rank adapter (lowrank.cpp) on tensors: bfloat16 on CPUs with a matrix unit (Intel's AMX).

One rounding where torch's way, a product and the addition of another to its bfloat16 result, has two, of which the second swallows
what is less than half a unit of the base's last place: most of a young adapter. Against torch's way in turn: 1.15 to 1.4 times as fast
at 300 to 1024 rows with 1024 to 4096 inputs. The kernel checks nothing: addresses and sizes must describe the tensors.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from swiftlite.kernels import unit
from swiftlite.kernels.unit import STEP

WIDEST = 8192  # inputs or outputs: of more, the second-level cache holds less than two panels, and oneDNN is faster (0.75x at 14336)


class _Product(ctypes.Structure):
    """struct LowRankProduct of lowrank.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("out", "x", "w", "bias", "low", "up")),
        *((name, ctypes.c_int64) for name in ("rows", "stride", "n", "k", "rank", "across")),
    )


def takes(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether `multiply` is for x [T, in] and a weight [out, in], both ways."""
    given = [t for t in (x, weight, bias) if t is not None]
    fits = all(size % STEP == 0 and size <= WIDEST for size in weight.shape) and len(x) > 0
    return unit.takes(*given) and fits and all(t.is_contiguous() for t in given[1:]) and unit.library() is not None


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
    library = unit.library()
    assert library is not None and x.dtype == low.dtype == up.dtype == torch.bfloat16
    library.swift_low_rank(ctypes.byref(product), ctypes.c_int(torch.get_num_threads()))
    return out
