"""Causal attention of packed documents on a GPU: one kernel for all of them, FlashAttention-2's (arXiv 2307.08691) by way of torch.

The kernel takes 16-bit floats, heads of up to 256 and windows, but neither dropout nor a soft cap. It is tried once for each kind of
input and held against torch's attention, forward and backward; where it does not run or differs, the reason is printed and every
document goes by itself (segments.py), which is right but launches a kernel for each.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

LARGEST_HEAD = 256


def takes(q: Tensor, v: Tensor, dropout: float, softcap: float | None) -> bool:
    """Whether `attend` can do these heads q and v [1, H, T, D]."""
    fits = q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] == v.shape[-1] <= LARGEST_HEAD and q.shape[-1] % 8 == 0
    return q.device.type == "cuda" and fits and dropout == 0 and softcap is None and _works(q.device, q.dtype, q.shape[-1])


def attend(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scale: float | None, window: int | None) -> Tensor:
    """q [1, H, T, D], k and v [1, G, T, D], documents of `lengths` that sum to T -> [1, T, H, D]; a query sees its own document's
    tokens up to itself, and of them the last `window`."""
    ends, longest = _ends(lengths, q.device), max(lengths)
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    seen = (-1 if window is None else window - 1, 0)
    out = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scale, window_size=seen, enable_gqa=q.shape[1] != k.shape[1])
    assert isinstance(out, Tensor)
    return out[None]


@lru_cache(maxsize=8)  # the layers of a pass, and its recomputation, ask for the same one
def _ends(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


@lru_cache
def _works(device: torch.device, dtype: torch.dtype, dim: int) -> bool:
    try:
        with torch.enable_grad():
            q, k, v = (torch.randn(1, heads, 40, dim, device=device, dtype=dtype).requires_grad_() for heads in (4, 2, 2))
            parts = zip(*(x.split((25, 15), 2) for x in (q, k, v)), strict=True)
            want = torch.cat([F.scaled_dot_product_attention(a, b, c, is_causal=True, enable_gqa=True) for a, b, c in parts], 2)
            found = attend(q, k, v, (25, 15), None, None).transpose(1, 2)
            grad = torch.randn_like(want)
            mine, theirs = ((out, *torch.autograd.grad(out, (q, k, v), grad)) for out in (found, want))
            pairs = zip(mine, theirs, strict=True)
            if all(torch.allclose(a.float(), b.float(), rtol=0.05, atol=0.05) for a, b in pairs):
                return True
            reason = "its results differ from torch's attention"
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    print(f"attention: packed rows one by one, torch's kernel for all at once does not do ({reason})")
    return False
