"""The small steps with their gradients (gradients.cpp), for training on a CPU: a module's step in one pass each way, and softmax.

torch's own way through an RMSNorm in bfloat16 is seven passes forward and twelve back, with float32 copies that live until the
backward; here x alone is kept. Weights of norms are frozen. Sums are float32; the reference of each is the stock module
(models/fused.py) or the torch code at its caller's (models/attention_blocks.py, train/loss.py).
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swiftlite.kernels.build import load_library
from swiftlite.kernels.steps import DTYPES, Activation, Kernels, Rotation, strides


@functools.cache
def gradients() -> Gradients | None:
    """The functions, or None where they cannot be built (the reason is printed once)."""
    library = load_library("steps")
    return None if library is None else Gradients(library)


def takes(x: Tensor) -> bool:
    """Whether the functions are for such a tensor. Not while torch compiles: it writes kernels of its own."""
    return x.device.type == "cpu" and x.dtype in DTYPES and not torch.compiler.is_compiling()


@dataclass(frozen=True)
class Gradients(Kernels):
    """The library's functions; those of `Kernels` can be differentiated."""

    differentiable = True

    def __post_init__(self) -> None:
        super().__post_init__()
        pointer, long, integer, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
        lib = self.library
        lib.swift_norm_back.argtypes = [integer, *[pointer] * 4, *[long] * 4, integer, real, integer, integer]
        lib.swift_rope_back.argtypes = [integer, *[pointer] * 4, long, integer, integer, long, long, integer]
        lib.swift_silu_mul_back.argtypes = [integer, *[pointer] * 5, long, integer]
        lib.swift_softmax.argtypes = [integer, pointer, *[long] * 5, real, integer]
        lib.swift_softmax_back.argtypes = [integer, *[pointer] * 2, *[long] * 5, real, integer]
        lib.swift_cross_entropy.argtypes = [integer, *[pointer] * 5, *[long] * 2, integer, integer]

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, kind: int) -> Tensor:
        return _Norm.apply(self, x, weight, eps, kind)

    def gate(self, gate: Tensor, up: Tensor, activation: int = Activation.SILU) -> Tensor:
        assert activation == Activation.SILU
        return _SiluMul.apply(self, gate, up)

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor, rotation: Rotation) -> Tensor:
        assert rotation == Rotation(x.shape[-1])
        return _Rope.apply(self, x, cos, sin)

    def softmax_(self, scores: Tensor, queries: int, offset: int, window: int | None, scale: float) -> Tensor:
        """Causal softmax(scale * scores) in place; scale > 0. scores [.., queries, keys] contiguous, key 0 is `offset` tokens
        before query 0; a query sees itself and the `window` - 1 tokens before it (None: all), and has weight 0 for the rest."""
        self.library.swift_softmax(
            scores.dtype == torch.bfloat16, scores.data_ptr(), *_rows(scores, queries), offset, window or 0, scale, torch.get_num_threads()
        )
        return scores

    def softmax_back_(self, grad: Tensor, weights: Tensor, queries: int, offset: int, window: int | None, scale: float) -> Tensor:
        """The gradient of `softmax_`'s result in place to that of its scores; `weights` is that result."""
        self.library.swift_softmax_back(
            grad.dtype == torch.bfloat16, grad.data_ptr(), weights.data_ptr(), *_rows(grad, queries), offset, window or 0, scale,
            torch.get_num_threads(),
        )  # fmt: skip
        return grad

    def cross_entropy_(self, logits: Tensor, labels: Tensor, factors: Tensor | None, *, back: bool) -> tuple[Tensor, Tensor]:
        """logits [N, V] contiguous, labels [N] int64 -> -log p(label) [N] float32, whether the label is the argmax [N] int64.

        With `back`, logits become the gradient of sum(factors * nll), factors [N] float32 (None: ones).
        """
        nll, hits = torch.empty(len(labels)), torch.empty(len(labels), dtype=torch.int64)
        self.library.swift_cross_entropy(
            logits.dtype == torch.bfloat16, logits.data_ptr(), labels.data_ptr(), None if factors is None else factors.data_ptr(),
            nll.data_ptr(), hits.data_ptr(), *logits.shape, back, torch.get_num_threads(),
        )  # fmt: skip
        return nll, hits


def _rows(scores: Tensor, queries: int) -> tuple[int, int, int]:
    keys = scores.shape[-1]
    return scores.numel() // max(1, keys), queries, keys


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Gradients, x: Tensor, weight: Tensor, eps: float, kind: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.kernels, ctx.eps, ctx.kind = kernels, eps, kind
        return Kernels.rms_norm(kernels, x, weight, eps, kind)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None, None]:
        x, weight = ctx.saved_tensors
        grad, out = grad.contiguous(), torch.empty(x.shape, dtype=x.dtype)
        ctx.kernels.library.swift_norm_back(
            x.dtype == torch.bfloat16, out.data_ptr(), grad.data_ptr(), x.data_ptr(), weight.data_ptr(), *strides(x), x.shape[-1],
            ctx.eps, ctx.kind, torch.get_num_threads(),
        )  # fmt: skip
        return None, out, None, None, None


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Gradients, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kernels = kernels
        return Kernels.gate(kernels, gate, up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor]:
        gate, up, grad = *(x.contiguous() for x in ctx.saved_tensors), grad.contiguous()
        for_gate, for_up = torch.empty_like(gate), torch.empty_like(up)
        ctx.kernels.library.swift_silu_mul_back(
            grad.dtype == torch.bfloat16, *(x.data_ptr() for x in (for_gate, for_up, grad, gate, up)), grad.numel(), torch.get_num_threads()
        )
        return None, for_gate, for_up


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Gradients, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.kernels = kernels
        return Kernels.rope(kernels, x, cos, sin, Rotation(x.shape[-1]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        if grad.stride(-1) != 1:
            grad = grad.contiguous()
        _, heads, tokens, dim = grad.shape
        out = torch.empty(1, tokens, heads, dim, dtype=grad.dtype)
        ctx.kernels.library.swift_rope_back(
            grad.dtype == torch.bfloat16, out.data_ptr(), grad.data_ptr(), cos.data_ptr(), sin.data_ptr(), tokens, heads, dim,
            grad.stride(2), grad.stride(1), torch.get_num_threads(),
        )  # fmt: skip
        return None, out.transpose(1, 2), None, None
