"""The C++ functions of a decoder layer's small steps (fused.cpp) on tensors: RMSNorm, rotary embedding, gate, greedy choice.

Float32 and bfloat16 on a CPU. Each takes a shape that it is told to; whether a model's own step is that one is for the caller to know.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)  # of all C++ functions


def strides(x: Tensor) -> tuple[int, int, int, int]:
    """Of x [1, T, D] or [1, T, H, D]: its rows, rows that are `inner stride` apart, outer stride, inner stride (in elements)."""
    if x.ndim == 4:
        return x.shape[1] * x.shape[2], x.shape[2], x.stride(1), x.stride(2)
    return x.shape[1], 1, x.stride(1), 0


@dataclass(frozen=True)
class Norm:
    """An RMSNorm that the kernels do: x / rms(x) * weight, rounded as `kind` says (NormKind in steps.h)."""

    weight: Tensor  # [D]
    eps: float
    kind: int


class RowNorm(ctypes.Structure):
    """struct RowNorm of steps.h."""

    _fields_ = (("w", ctypes.c_void_p), ("eps", ctypes.c_float), ("kind", ctypes.c_int32))

    @classmethod
    def of(cls, norm: Norm | None) -> RowNorm:
        return cls() if norm is None else cls(norm.weight.data_ptr(), norm.eps, norm.kind)


class Activation(IntEnum):
    """Activation in steps.h: of an MLP's gate."""

    SILU = 0
    GELU_TANH = 1


class Rotation(NamedTuple):
    """Which of a head's dimensions are rotated: the first `dims`, in two halves, or, as `pairs`, each with its neighbour.

    Cosines and sines are of the rows' dtype, or `wide`: float32, and what is multiplied by them is rounded once, at the end.
    """

    dims: int
    pairs: bool = False
    wide: bool = False

    def has(self, table: Tensor, dtype: torch.dtype) -> bool:
        """Whether cosines or sines [1, T, dims] are of this rotation, for rows of `dtype`."""
        return table.shape[-1] == self.dims and table.dtype == (torch.float32 if self.wide else dtype)


NO_ROTATION = Rotation(0)


class RotationArgs(ctypes.Structure):
    """struct Rotation of steps.h."""

    _fields_ = tuple((name, ctypes.c_int32) for name in ("dims", "pairs", "wide"))


@dataclass(frozen=True)
class Kernels:
    """The library's functions with their signatures."""

    differentiable: ClassVar[bool] = False
    library: ctypes.CDLL

    def __post_init__(self) -> None:
        flag, pointer, long, integer, real = ctypes.c_int, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
        lib = self.library
        lib.swift_rms_norm.argtypes = [flag, *[pointer] * 3, *[long] * 4, integer, real, integer, integer]
        lib.swift_add_norm.argtypes = [flag, *[pointer] * 4, RowNorm, RowNorm, real, long, integer, integer]
        lib.swift_gate.argtypes = [flag, *[pointer] * 3, *[long] * 3, integer, integer, integer]
        lib.swift_best_of_rows.argtypes = [flag, *[pointer] * 3, *[long] * 3, integer]
        lib.swift_rope.argtypes = [flag, *[pointer] * 4, long, integer, integer, RotationArgs, long, long, integer]

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, kind: int) -> Tensor:
        """x [1, T, D] or [1, T, H, D] with contiguous last dimension -> the same shape, contiguous."""
        out = torch.empty(x.shape, dtype=x.dtype)
        self.library.swift_rms_norm(
            x.dtype == torch.bfloat16, out.data_ptr(), x.data_ptr(), weight.data_ptr(), *strides(x), x.shape[-1], eps, kind,
            torch.get_num_threads(),
        )  # fmt: skip
        return out

    def add_norm(self, a: Tensor, b: Tensor, of: Norm | None, then: Norm | None, factor: float) -> tuple[Tensor, Tensor]:
        """a + factor * (norm `of` b), and norm `then` of that, for [1, T, D]; where a norm is None, there is none."""
        assert a.shape == b.shape and a.dtype == b.dtype
        a, b = a.contiguous(), b.contiguous()
        total = torch.empty_like(a)
        out = total if then is None else torch.empty_like(a)
        self.library.swift_add_norm(
            a.dtype == torch.bfloat16, None if then is None else out.data_ptr(), total.data_ptr(), a.data_ptr(), b.data_ptr(),
            RowNorm.of(of), RowNorm.of(then), factor, a.shape[1], a.shape[2], torch.get_num_threads(),
        )  # fmt: skip
        return total, out

    def gate(self, gate: Tensor, up: Tensor, activation: int = Activation.SILU) -> Tensor:
        """act(gate) * up for [1, T, D]; rows may be strided."""
        out = torch.empty(gate.shape, dtype=gate.dtype)
        self.library.swift_gate(
            gate.dtype == torch.bfloat16, out.data_ptr(), gate.data_ptr(), up.data_ptr(), gate.shape[-2], gate.stride(-2), up.stride(-2),
            gate.shape[-1], activation, torch.get_num_threads(),
        )  # fmt: skip
        return out

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor, rotation: Rotation) -> Tensor:
        """x [1, H, T, D] rotated by cos and sin [1, T, dims of the rotation] -> the same shape, in memory [1, T, H, D]."""
        _, heads, tokens, dim = x.shape
        out = torch.empty(1, tokens, heads, dim, dtype=x.dtype)
        self.library.swift_rope(
            x.dtype == torch.bfloat16, out.data_ptr(), x.data_ptr(), cos.data_ptr(), sin.data_ptr(), tokens, heads, dim,
            RotationArgs(*rotation), x.stride(2), x.stride(1), torch.get_num_threads(),
        )  # fmt: skip
        return out.transpose(1, 2)

    def best_of_rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [S, V], float32 or bfloat16 -> the largest of each row [S] float32 (NaN where a row has one), its first place [S] int64.

        torch's max over bfloat16 takes five times as long.
        """
        if x.stride(1) != 1:
            x = x.contiguous()
        best, place = torch.empty(x.shape[0]), torch.empty(x.shape[0], dtype=torch.int64)
        self.library.swift_best_of_rows(
            x.dtype == torch.bfloat16, best.data_ptr(), place.data_ptr(), x.data_ptr(), x.shape[0], x.stride(0), x.shape[1],
            torch.get_num_threads(),
        )  # fmt: skip
        return best, place
