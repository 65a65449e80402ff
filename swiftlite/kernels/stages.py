"""Stages of the C++ kernels (stage.h): several in one call, by one team of threads that starts once.

A stage is a kernel's function and a structure with its arguments. Structures stay their owners' and may change between calls; the kernels
check nothing, so what they point at must be as large as they say, and alive.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from swiftlite.kernels.steps import RowNorm


class _Stage(ctypes.Structure):
    """struct Stage of stage.h."""

    _fields_ = (("prepare", ctypes.c_void_p), ("args", ctypes.c_void_p))


Stage = tuple[Any, Any]  # a function of the library, the structure with its arguments


class Run:
    """Stages in order."""

    def __init__(self, library: ctypes.CDLL, stages: Sequence[Stage]) -> None:
        self._function = library.swift_run
        self._function.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
        entries = [_Stage(ctypes.cast(function, ctypes.c_void_p).value, ctypes.addressof(args)) for function, args in stages]
        self._stages = (_Stage * len(entries))(*entries)
        self._kept = [args for _, args in stages]
        self._place, self._count = ctypes.addressof(self._stages), len(entries)

    def __call__(self) -> None:
        self._function(self._place, self._count, torch.get_num_threads())


class Norming(ctypes.Structure):
    """struct Norming of stages.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("out", "total", "a", "b")),
        *((name, RowNorm) for name in ("of", "then")),
        *((name, ctypes.c_int64) for name in ("rows", "stride", "out_stride")),
        ("dim", ctypes.c_int32),
        ("factor", ctypes.c_float),
    )


class Gating(ctypes.Structure):
    """struct Gating of stages.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("out", "both")),
        ("rows", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("dim", "activation")),
    )
