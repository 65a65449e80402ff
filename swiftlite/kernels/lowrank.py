"""The product of a frozen weight and its low-rank adapter (lowrank.cpp) on tensors: bfloat16 on CPUs with a matrix unit (Intel's AMX).

One rounding where torch's way, a product and the addition of another to its bfloat16 result, has two, of which the second swallows
what is less than half a unit of the base's last place: most of a young adapter. Against torch's way in turn: 1.15 to 1.4 times as fast
at 300 to 1024 rows with 1024 to 4096 inputs, level at 14336; an adapter's own products 1.2 to 1.5 times. The kernel checks nothing:
addresses and sizes must describe the tensors.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from swiftlite.kernels import unit
from swiftlite.kernels.unit import STEP


class _Product(ctypes.Structure):
    """struct LowRankProduct of lowrank.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("out", "x", "w", "bias", "low", "up")),
        *((name, ctypes.c_int64) for name in ("rows", "stride", "n", "k", "rank", "across", "inputs")),
    )


def takes(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether `multiply` is for x [T, in] and a weight [out, in], both ways."""
    given = [t for t in (x, weight, bias) if t is not None]
    fits = all(size % STEP == 0 for size in weight.shape) and len(x) > 0
    return unit.takes(*given) and fits and all(t.is_contiguous() for t in given[1:]) and unit.library() is not None


def widened(a: Tensor) -> Tensor:
    """a [R, n] float32 in bfloat16 with zero rows up to a multiple of STEP, as `multiply` takes a rank."""
    out = torch.zeros((len(a) + STEP - 1) // STEP * STEP, a.shape[1], dtype=torch.bfloat16)
    out[: len(a)] = a
    return out


def turned(x: Tensor) -> Tensor:
    """x [T, R] -> x^T [R, T] with zeros up to a multiple of STEP, as `multiply` takes rows for a weight [T, ..] `across`."""
    out = x.new_zeros(x.shape[1], (len(x) + STEP - 1) // STEP * STEP)
    out[:, : len(x)] = x.T
    return out


def multiply(
    x: Tensor, weight: Tensor, low: Tensor | None = None, up: Tensor | None = None, bias: Tensor | None = None, *, across: bool = False
) -> Tensor:
    """x [T, in] W^T + low [T, R] up [R, out] + bias -> [T, out], for W [out, in]; R is a multiple of STEP.

    `across`: x [T, out] W + low up [R, in] -> [T, in]; W may have fewer rows than x has columns, where x has zeros.
    """
    n, k = weight.shape[1] if across else len(weight), x.shape[1]
    x, weight = x if x.stride(1) == 1 else x.contiguous(), weight.contiguous()
    out = torch.empty(len(x), n, dtype=torch.bfloat16)
    product = _Product(
        out=out.data_ptr(), x=x.data_ptr(), w=weight.data_ptr(), bias=None if bias is None else bias.data_ptr(),
        rows=len(x), stride=x.stride(0), n=n, k=k, across=across, inputs=weight.shape[1 - across],
    )  # fmt: skip
    if low is not None and up is not None:
        low, up = low.contiguous(), up.contiguous()
        assert low.dtype == up.dtype == torch.bfloat16 and low.shape[1] == len(up) and len(up) % STEP == 0
        product.low, product.up, product.rank = low.data_ptr(), up.data_ptr(), low.shape[1]
    library = unit.library()
    assert library is not None and x.dtype == weight.dtype == torch.bfloat16 and n % STEP == k % STEP == 0
    library.swift_low_rank(ctypes.byref(product), ctypes.c_int(torch.get_num_threads()))
    return out
