"""Weights in the layout of the C++ product (linear.cpp): bfloat16 on CPUs with AVX512-BF16, at memory speed for few rows and at the
units' speed for many, where oneDNN is slower at both (measured: 1.0 to 1.6 times, by shape).

The kernel checks nothing: addresses and sizes must describe the tensors.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from swiftlite.kernels.stages import Run
from swiftlite.models.packed import OneDnnWeight, Pack, PackedWeight, join_rows
from swiftlite.pages import zeros

PANEL = 32  # outputs (WIDTH in panels.h)


class Product(ctypes.Structure):
    """struct Product of linear.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("out", "x", "w", "bias")),
        *((name, ctypes.c_int64) for name in ("rows", "stride", "n", "k")),
        ("activation", ctypes.c_int32),
    )


class Panels:
    """The kernel's functions with their signatures."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, long, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        self.library = library
        self.size, self.pack, self.unpack = library.swift_packed_size, library.swift_pack, library.swift_unpack
        self.size.argtypes, self.size.restype = [long, long], long
        self.pack.argtypes = self.unpack.argtypes = [pointer, pointer, long, long, integer]


class PanelWeight:
    """A bfloat16 weight [out, in] in panels of 32 outputs; `in` is even. It may be given in parts that lie below each other."""

    def __init__(self, panels: Panels, *weights: Tensor, packed: Tensor | None = None) -> None:
        """`packed`: the weights' panels, where they are made already."""
        self.panels, self.n, self.k = panels, sum(len(weight) for weight in weights), weights[0].shape[1]
        self.data = self._pack(weights) if packed is None else packed
        function, self.product = self.stage(None)
        self.run = Run(panels.library, [(function, self.product)])

    def _pack(self, weights: Sequence[Tensor]) -> Tensor:
        weights = from_panels(weights)
        data = zeros(self.panels.size(self.n, self.k), dtype=torch.bfloat16)
        place = data.data_ptr()
        for weight in weights:
            plain = weight.detach().contiguous()
            self.panels.pack(place, plain.data_ptr(), len(plain), self.k, torch.get_num_threads())
            place += plain.nbytes
        return data

    def stage(self, bias: Tensor | None) -> tuple[Any, Product]:
        """The product as a stage: out, x, rows and stride are for the caller to fill in."""
        product = Product(w=self.data.data_ptr(), n=self.n, k=self.k, bias=None if bias is None else bias.data_ptr())
        return self.panels.library.swift_linear, product

    def gated(self, bias: Tensor | None, activation: int) -> tuple[Any, Product] | None:
        """The same for act(gate) * up [T, out / 2] of a weight that is the gate's and, behind it, up's; None: there is none for it."""
        if self.n % (2 * PANEL):
            return None
        product = self.stage(bias)[1]
        product.activation = activation
        return self.panels.library.swift_gated, product

    def prepare(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Fill in `product` for x [..., T, in]. Returns x, with rows evenly spaced, and the result's memory [..., T, out]."""
        assert x.dtype == torch.bfloat16 and x.shape[-1] == self.k
        alone = x.ndim == 2 or x.shape[:-2].numel() == 1
        if x.stride(-1) != 1 or not alone:
            x = x.contiguous()
        out = torch.empty(*x.shape[:-1], self.n, dtype=torch.bfloat16)
        product = self.product
        product.out, product.x, product.bias = out.data_ptr(), x.data_ptr(), None if bias is None else bias.data_ptr()
        product.rows, product.stride = (x.shape[-2], x.stride(-2)) if alone else (x.numel() // self.k, self.k)
        return x, out

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        x, out = self.prepare(x, bias)  # x lives until the kernel is done
        self.run()
        return out

    def to_dense(self) -> Tensor:
        out = torch.empty(self.n, self.k, dtype=torch.bfloat16)
        self.panels.unpack(out.data_ptr(), self.data.data_ptr(), self.n, self.k, torch.get_num_threads())
        return out


def from_panels(weights: Sequence[Tensor]) -> Sequence[Tensor]:
    """Weights that lie below each other: as they are where each begins a panel, else joined, which is a copy."""
    return (join_rows(weights),) if any(len(weight) % PANEL for weight in weights[:-1]) else weights


def choose_pack(library: ctypes.CDLL | None, dtype: torch.dtype, ready: Callable[[Sequence[Tensor]], Tensor | None] | None = None) -> Pack:
    """The layout to pack weights of `dtype` into: panels where the kernel can, else oneDNN's. `ready` gives what is packed already."""
    if library is None or dtype != torch.bfloat16:
        return OneDnnWeight
    panels = Panels(library)

    def pack(*weights: Tensor) -> PackedWeight:
        if not panels.size(*weights[0].shape):
            return OneDnnWeight(*weights)
        return PanelWeight(panels, *weights, packed=None if ready is None else ready(weights))

    return pack
