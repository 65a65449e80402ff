"""Causal attention of documents of one length with its gradient, in blocks of queries: training's way on a CPU, torch's products.

A block of queries meets only the keys it may see (causal, and within the window), as batched matrix products per key/value
head with the heads that share it stacked; softmax in float32. torch's own CPU kernel multiplies in tiny tiles: measured
here, forward and backward take 0.25 to 0.5 of its time in bfloat16 (30 to 1024 tokens, 16 heads of 128), 0.6 to 0.8 in
float32. Short documents keep their weights for the backward, long ones compute them again, so memory stays linear.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from swiftlite.kernels.gradients import Gradients, gradients, takes

BLOCK = 128  # queries; of 64 a block costs more in calls than it saves in hidden keys
KEEP = 512  # tokens up to which weights are kept, H * T^2 elements up to a block of tokens and about 0.6 of that at most beyond


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None) -> Tensor:
    """q [B, H, T, D], k [B, G, T, D], v [B, G, T, Dv] -> [B, H, T, Dv]; a query sees itself and the `window` - 1 before it."""
    kind = q.device.type
    if torch.is_autocast_enabled(kind):  # as torch's own kernel: norms and rotations leave q and k in float32, v comes in bfloat16
        q, k, v = (x.to(torch.get_autocast_dtype(kind)) for x in (q, k, v))
    return _Attention.apply(q, k, v, scale, window, softcap)


@lru_cache(maxsize=256)
def _hidden(first: int, start: int, stop: int, window: int | None, device: torch.device) -> Tensor:
    """[stop - start, stop - first] bool: keys first..stop that queries start..stop must not see."""
    distance = torch.arange(start, stop, device=device)[:, None] - torch.arange(first, stop, device=device)[None, :]
    return (distance < 0) | (distance >= window) if window is not None else distance < 0


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None) -> Tensor:
        tokens, groups = q.shape[2], k.shape[0] * k.shape[1]  # G below: key/value heads of all documents
        q4 = q.reshape(groups, -1, tokens, q.shape[3])  # [G, H/G, T, D]
        k3, v3 = k.reshape(groups, tokens, -1).contiguous(), v.reshape(groups, tokens, -1).contiguous()  # [G, T, D], [G, T, Dv]
        ctx.settings = scale, window, softcap
        out = q.new_empty(groups, q4.shape[1], tokens, v.shape[3])
        kept = []
        for start, stop, first in _blocks(tokens, window):
            weights, _ = _weights(q4, k3, start, stop, first, *ctx.settings)
            out[:, :, start:stop] = torch.bmm(weights, v3[:, first:stop]).view(groups, -1, stop - start, v.shape[3])
            if tokens <= KEEP and softcap is None:  # the soft cap's slope needs the scores anyway
                kept.append(weights)
        ctx.save_for_backward(q4, k3, v3, *kept)
        return out.view(*q.shape[:3], v.shape[3])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        q4, k3, v3, *kept = ctx.saved_tensors
        scale, window, _ = ctx.settings
        groups, shared, tokens, dim = q4.shape
        documents = len(grad)
        g4 = grad.reshape(groups, shared, tokens, -1)
        grad_q, grad_k, grad_v = torch.empty_like(q4), torch.zeros_like(k3), torch.zeros_like(v3)
        for number, (start, stop, first) in enumerate(_blocks(tokens, window)):
            count = stop - start
            weights, slope = (kept[number], None) if kept else _weights(q4, k3, start, stop, first, *ctx.settings)
            g = g4[:, :, start:stop].reshape(groups, shared * count, -1)
            grad_v[:, first:stop] += torch.bmm(weights.transpose(1, 2), g)
            scores = torch.bmm(g, v3[:, first:stop].transpose(1, 2))
            if slope is None and (kernels := _kernels(scores, scale)) is not None:
                kernels.softmax_back_(scores, weights, count, start - first, window, scale)
            else:
                scores = _softmax_back(scores, weights, slope, scale)
            grad_q[:, :, start:stop] = torch.bmm(scores, k3[:, first:stop]).view(groups, shared, count, dim)
            grad_k[:, first:stop] += torch.bmm(scores.transpose(1, 2), q4[:, :, start:stop].reshape(groups, shared * count, dim))
        rows = (documents, -1, tokens)
        return grad_q.view(*rows, dim), grad_k.view(*rows, dim), grad_v.view(*rows, v3.shape[2]), None, None, None


def _blocks(tokens: int, window: int | None) -> list[tuple[int, int, int]]:
    """(first query, one past the last, first key that any of them sees)."""
    return [(start, min(tokens, start + BLOCK), 0 if window is None else max(0, start - window + 1)) for start in range(0, tokens, BLOCK)]


def _accurate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _kernels(scores: Tensor, scale: float) -> Gradients | None:
    return gradients() if takes(scores) and scale > 0 else None


def _softmax_back(grad: Tensor, weights: Tensor, slope: Tensor | None, scale: float) -> Tensor:
    """Gradient of the softmax `weights` -> that of the scores, in their dtype."""
    exact = weights.to(_accurate(weights.dtype))
    grad = grad.to(exact.dtype)
    scores = grad.sub_((grad * exact).sum(-1, keepdim=True)).mul_(exact)
    if slope is not None:
        scores.mul_(slope)
    return scores.mul_(scale).to(weights.dtype)


def _weights(
    q4: Tensor, k3: Tensor, start: int, stop: int, first: int, scale: float, window: int | None, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Softmax weights [G, H/G * n, keys] of a block of n queries, and the soft cap's slope there."""
    groups, shared, _, dim = q4.shape
    count = stop - start
    block = q4[:, :, start:stop].reshape(groups, shared * count, dim)
    scores = torch.bmm(block, k3[:, first:stop].transpose(1, 2))
    if softcap is None and (kernels := _kernels(scores, scale)) is not None:
        return kernels.softmax_(scores, count, start - first, window, scale), None
    scores = scores.to(_accurate(q4.dtype)).mul_(scale)
    slope = None
    if softcap is not None:
        scores = scores.div_(softcap).tanh_()
        slope = 1 - scores * scores
        scores.mul_(softcap)
    if window is None:  # only the block's own square holds hidden keys
        scores.view(groups, shared, count, -1)[..., start:].masked_fill_(_hidden(0, 0, count, None, q4.device), float("-inf"))
    else:
        hidden = _hidden(0, start - first, stop - first, window, q4.device)
        scores.view(groups, shared, count, -1).masked_fill_(hidden, float("-inf"))
    return torch.softmax(scores, -1).to(q4.dtype), slope
