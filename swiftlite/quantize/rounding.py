"""Round to nearest, symmetric: how a weight becomes integers and scales, for checkpoints and for the engine alike.

It does not know how either is stored.
"""

from __future__ import annotations

import torch
from torch import Tensor


def round_to_nearest(weight: Tensor, bits: int, group_size: int | None) -> tuple[Tensor, Tensor]:
    """weight [out, in] -> (int8 [out, in], scale [out, groups] in the weight's dtype); group_size None: one group."""
    half = 1 << (bits - 1)
    grouped = weight.float().unflatten(1, (-1, group_size or weight.shape[1]))  # [out, groups, group_size]
    # The integers reach from -half to half - 1, so half - 0.5 steps carry the largest value; a scale must not round to zero.
    scale = (grouped.abs().amax(-1) / (half - 0.5)).clamp(min=torch.finfo(weight.dtype).tiny).to(weight.dtype)
    q = (grouped / scale.float()[:, :, None]).round().clamp(-half, half - 1)
    return q.flatten(1).to(torch.int8), scale
