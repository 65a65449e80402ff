"""Whether training's kernels have a matrix unit (Intel's AMX) here, and for which tensors they use it."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from swiftlite.kernels.build import load_library

STEP = 32  # inputs that the unit takes at once, and outputs of a panel (DEPTH in unit.h, WIDTH in panels.h)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels, or None where they were not built for a unit or the system does not let this process use it."""
    found = load_library("steps")
    return found if found is not None and found.swift_unit_ready() else None


def takes(*tensors: Tensor) -> bool:
    """Whether all are bfloat16 on the CPU, and not while torch compiles: it writes kernels of its own."""
    return all(x.dtype == torch.bfloat16 and x.device.type == "cpu" for x in tensors) and not torch.compiler.is_compiling()
