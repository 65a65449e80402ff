"""Linears with int8 weights and one scale per output, activations as they are: half the memory, and twice the speed for few rows.

The integers are those that `swift export --quant_bits 8 --quant_method rtn` writes. They are exact in the product (`int8.cpp`): results
equal those of the dequantized weight up to the rounding of sums. Without the kernels torch multiplies by pieces of the dequantized
weight: the same memory, slower. The kernels check nothing: addresses and sizes must describe the tensors.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from swiftlite.engine.panels import PANEL, from_panels
from swiftlite.kernels.stages import Run
from swiftlite.models.packed import Pack, PackedWeight, join_rows
from swiftlite.pages import zeros
from swiftlite.quantize.rounding import round_to_nearest

PIECE = 1024  # outputs that are quantized, or dequantized, at a time
FEW_ROWS = 32  # up to here the kernel is faster than GEMM on dequantized pieces, where it cannot be at the units' speed


class Product(ctypes.Structure):
    """struct Int8Product of int8.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("out", "x", "w", "scale", "bias")),
        *((name, ctypes.c_int64) for name in ("rows", "stride", "n", "k")),
        ("is_bf16", ctypes.c_int32),
    )


class Kernels:
    """The functions of int8.cpp with their signatures."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, long, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        self.library, self.pack, self.unpack = library, library.swift_int8_pack, library.swift_int8_unpack
        self.pack.argtypes = [pointer, pointer, long, long, integer]
        self.unpack.argtypes = [pointer, pointer, long, long, long, integer]
        self.quantize = library.swift_int8_quantize
        self.quantize.argtypes = [integer, pointer, pointer, pointer, long, long, integer]
        self.many = library.swift_int8_many
        self.many.argtypes, self.many.restype = [integer], integer


class Rows(Protocol):
    """Integers [out, in] that are given piece by piece."""

    def rows(self, first: int, end: int) -> Tensor:
        """int8 [end - first, in]."""
        ...


def multiply_pieces(x: Tensor, weight: Rows, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in] times the integers of `weight`, piece by piece, by `scale` [out], plus `bias`: [..., out]."""
    out = torch.empty(*x.shape[:-1], len(scale), dtype=x.dtype)
    x = x.float() if x.dtype == torch.float16 else x  # sums of integers leave float16's range
    for first in range(0, len(scale), PIECE):
        end = min(first + PIECE, len(scale))
        product = linear(x, weight.rows(first, end).to(x.dtype)).float() * scale[first:end]
        out[..., first:end] = product if bias is None else product + bias[first:end]
    return out


class PlainInt8:
    """As torch has it, for machines without the kernels and for weights with an odd number of inputs."""

    def __init__(self, n: int, k: int) -> None:
        self.q = torch.empty(n, k, dtype=torch.int8)
        self.scale = torch.empty(n)

    def put(self, first: int, q: Tensor, scale: Tensor) -> None:
        """Rows from `first` on: q [rows, in], scale [rows]. `first` is a multiple of PIECE."""
        self.q[first : first + len(q)], self.scale[first : first + len(q)] = q, scale

    def rows(self, first: int, end: int) -> Tensor:
        return self.q[first:end]

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return multiply_pieces(x, self, self.scale, bias)

    def to_dense(self) -> Tensor:
        return self.q * self.scale[:, None]


class PanelInt8:
    """In the kernels' panels of 32 outputs; `in` is even. Products of float32 or bfloat16."""

    def __init__(self, kernels: Kernels, n: int, k: int) -> None:
        self.kernels, self.n, self.k = kernels, n, k
        self.data = zeros(-(-n // PANEL) * PANEL * k, dtype=torch.int8)
        self.scale = torch.empty(n)
        self.addresses = self.data.data_ptr(), self.scale.data_ptr()
        function, self.product = self.stage(None)
        self.run = Run(kernels.library, [(function, self.product)])

    @property
    def many(self) -> bool:
        """Whether products of any number of bfloat16 rows are the kernel's here."""
        return bool(self.kernels.many(True))

    def put(self, first: int, q: Tensor, scale: Tensor) -> None:
        """Rows from `first` on: q [rows, in], scale [rows]. `first` is a multiple of PIECE."""
        q = q.contiguous()
        self.kernels.pack(self.addresses[0] + first * self.k, q.data_ptr(), len(q), self.k, torch.get_num_threads())
        self.scale[first : first + len(q)] = scale

    def quantize(self, weights: Sequence[Tensor]) -> None:
        """Take all of a float32 or bfloat16 weight [n, in], given in parts below each other, rounded as `round_to_nearest` does."""
        weights = from_panels(weights)
        assert sum(len(weight) for weight in weights) == self.n
        first, threads, (to, scale) = 0, torch.get_num_threads(), self.addresses
        for weight in weights:
            assert weight.dtype in (torch.float32, torch.bfloat16) and weight.shape[1] == self.k
            plain, narrow = weight.detach().contiguous(), weight.dtype == torch.bfloat16
            self.kernels.quantize(narrow, to + first * self.k, scale + 4 * first, plain.data_ptr(), len(plain), self.k, threads)
            first += len(plain)

    def rows(self, first: int, end: int) -> Tensor:
        out = torch.empty(end - first, self.k, dtype=torch.int8)
        self.kernels.unpack(out.data_ptr(), self.addresses[0], first, end, self.k, torch.get_num_threads())
        return out

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        assert x.dtype in (torch.float32, torch.bfloat16) and x.shape[-1] == self.k
        if x.stride(-1) != 1 or (x.ndim > 2 and x.shape[:-2].numel() != 1):  # rows must be evenly spaced
            x = x.contiguous()
        narrow = x.dtype == torch.bfloat16
        rows, stride = (x.shape[-2], x.stride(-2)) if x.shape[:-2].numel() == 1 else (x.numel() // self.k, self.k)
        if rows > FEW_ROWS and not self.kernels.many(narrow):
            return multiply_pieces(x, self, self.scale, bias)
        out = torch.empty(*x.shape[:-1], self.n, dtype=x.dtype)
        product = self.product
        product.out, product.x, product.bias = out.data_ptr(), x.data_ptr(), None if bias is None else bias.data_ptr()
        product.rows, product.stride, product.is_bf16 = rows, stride, narrow
        self.run()
        return out

    def stage(self, bias: Tensor | None) -> tuple[Any, Product]:
        """The product of bfloat16 rows as a stage: out, x, rows and stride are for the caller to fill in."""
        weight, scale = self.addresses
        add = None if bias is None else bias.data_ptr()
        return self.kernels.library.swift_int8_linear, Product(w=weight, scale=scale, n=self.n, k=self.k, bias=add, is_bf16=True)

    def to_dense(self) -> Tensor:
        return self.rows(0, self.n) * self.scale[:, None]


def new_int8(kernels: Kernels | None, n: int, k: int) -> PlainInt8 | PanelInt8:
    """An empty weight [n, k] in the best layout that this machine has."""
    return PlainInt8(n, k) if kernels is None or k % 2 else PanelInt8(kernels, n, k)


def choose_int8(library: ctypes.CDLL | None) -> Pack:
    """Quantizes a weight [out, in] as it is packed; no whole copy in float32 is ever made."""
    kernels = None if library is None else Kernels(library)

    def pack(*weights: Tensor) -> PackedWeight:
        packed = new_int8(kernels, sum(len(weight) for weight in weights), weights[0].shape[1])
        if isinstance(packed, PanelInt8):
            packed.quantize(weights)
            return packed
        weight = join_rows(weights)
        for first in range(0, len(weight), PIECE):
            q, scale = round_to_nearest(weight[first : first + PIECE], 8, None)
            packed.put(first, q, scale[:, 0])
        return packed

    return pack
