"""A frozen linear's product with its low-rank addition, y = x W^T + scale * x A^T B^T, as one node with its gradient.

Products run in x's dtype and no float32 copy of an activation is made; x is kept once. The sizes: x [T, in], W [out, in], bias [out],
A [rank, in] and B [out, rank] float32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from swiftlite.kernels import lowrank


def adapted(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """[T, out] of x [T, in]. The gradients are x's, A's and B's; W and the bias get none."""
    node = LowRankByKernel if lowrank.takes(x, weight, bias) else LowRank
    return node.apply(x, weight, bias, a, b, scale)


class LowRank(torch.autograd.Function):
    """The reference. Rows only: a view as the result could not be changed in place, which some models do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        low = F.linear(x, a.to(x.dtype))  # [T, in] -> [T, R]
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scale = scale
        return F.linear(x, weight, bias).addmm_(low, b.to(x.dtype).T, alpha=scale)  # [T, out]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        x, weight, a, b, low = ctx.saved_tensors
        g_low = (g @ b.to(g.dtype)).mul_(ctx.scale)  # [T, R]
        g_b = (low.T @ g).T.to(b.dtype).mul_(ctx.scale)  # this way round oneDNN is twice as fast
        g_a = (g_low.T @ x).to(a.dtype)
        g_x = (g @ weight).addmm_(g_low, a.to(g.dtype)) if ctx.needs_input_grad[0] else None
        return g_x, None, None, g_a, g_b, None


class LowRankByKernel(torch.autograd.Function):
    """The same with the adapter inside of the base's product (kernels/lowrank.py), whose rank is a multiple of its step: zeros fill it
    up. The scale is B's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        wide_a, wide_b = lowrank.widened(a), lowrank.widened(b.T * scale)  # [R, in], [R, out]
        low = lowrank.multiply(x, wide_a)  # [T, R]
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scale = scale
        return lowrank.multiply(x, weight, low, wide_b, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        x, weight, a, b, low = ctx.saved_tensors
        g = g.contiguous()  # once for all four
        rank, wide_a, wide_b = len(a), lowrank.widened(a), lowrank.widened(b.T * ctx.scale)
        g_low = lowrank.multiply(g, wide_b)  # [T, R]
        g_b = lowrank.multiply(lowrank.turned(low), g, across=True)[:rank].T.float().mul_(ctx.scale)
        g_a = lowrank.multiply(lowrank.turned(g_low), x, across=True)[:rank].float()
        g_x = lowrank.multiply(g, weight, g_low, wide_a, across=True) if ctx.needs_input_grad[0] else None
        return g_x, None, None, g_a, g_b, None
