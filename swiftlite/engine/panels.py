"""Weights in the layout of the C++ product (linear.cpp): bfloat16 on CPUs with AVX512-BF16, at memory speed for few rows and at the
units' speed for many, where oneDNN is slower at both (measured: 1.0 to 1.6 times, by shape).

The kernel checks nothing: addresses and sizes must describe the tensors.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from swiftlite.models.packed import OneDnnWeight, Pack, PackedWeight


class Panels:
    """The kernel's functions with their signatures."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, long, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        self.size, self.pack, self.linear, self.unpack = (
            library.swift_packed_size, library.swift_pack, library.swift_linear, library.swift_unpack
        )  # fmt: skip
        self.size.argtypes, self.size.restype = [long, long], long
        self.pack.argtypes = self.unpack.argtypes = [pointer, pointer, long, long, integer]
        self.linear.argtypes = [pointer, pointer, pointer, pointer, long, long, long, long, integer]


class PanelWeight:
    """A bfloat16 weight [out, in] in panels of 32 outputs; `in` is even."""

    def __init__(self, panels: Panels, weight: Tensor) -> None:
        self.panels, (self.n, self.k) = panels, weight.shape
        self.data = torch.empty(panels.size(self.n, self.k), dtype=torch.bfloat16)
        weight = weight.detach().contiguous()
        panels.pack(self.data.data_ptr(), weight.data_ptr(), self.n, self.k, torch.get_num_threads())
        self.address = self.data.data_ptr()

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        assert x.dtype == torch.bfloat16 and x.shape[-1] == self.k
        if x.stride(-1) != 1 or (x.ndim > 2 and x.shape[:-2].numel() != 1):  # rows must be evenly spaced
            x = x.contiguous()
        out = torch.empty(*x.shape[:-1], self.n, dtype=torch.bfloat16)
        rows, stride = (x.shape[-2], x.stride(-2)) if x.shape[:-2].numel() == 1 else (x.numel() // self.k, self.k)
        self.panels.linear(
            out.data_ptr(), x.data_ptr(), self.address, None if bias is None else bias.data_ptr(), rows, stride, self.n, self.k,
            torch.get_num_threads(),
        )  # fmt: skip
        return out

    def to_dense(self) -> Tensor:
        out = torch.empty(self.n, self.k, dtype=torch.bfloat16)
        self.panels.unpack(out.data_ptr(), self.address, self.n, self.k, torch.get_num_threads())
        return out


def choose_pack(library: ctypes.CDLL | None, dtype: torch.dtype) -> Pack:
    """The layout to pack weights of `dtype` into: panels where the kernel can, else oneDNN's."""
    if library is None or dtype != torch.bfloat16:
        return OneDnnWeight
    panels = Panels(library)

    def pack(weight: Tensor) -> PackedWeight:
        return PanelWeight(panels, weight) if panels.size(*weight.shape) else OneDnnWeight(weight)

    return pack
