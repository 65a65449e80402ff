"""From scores to tokens: the inverse distribution function in vocabulary order, over what top-k, top-p and min-p keep.

Scores are logits over temperature, shifted so that a row's best is 0. Tokens with equal scores at a cut are all kept, so the kept
set does not depend on sorting. A row of NaN gives any number: the sampler knows such rows. It does not know requests.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

CANDIDATES = 64  # best tokens that top-k and top-p look at first; a row whose kept set is larger is sorted whole


def inverse(scores: Tensor, floor: Tensor | None, uniform: Tensor) -> Tensor:
    """Tokens [R] from scores [R, V], those below `floor` [R, 1] left out, for uniform numbers [R, 1]. Overwrites scores."""
    if floor is not None:
        scores.masked_fill_(scores < floor, -torch.inf)
    reached = scores.exp_().cumsum(dim=-1)
    total = reached[:, -1:]
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(reached, target, right=True).squeeze(1)


def draw_cut(scores: Tensor, limits: Tensor, uniform: Tensor) -> Tensor:
    """Tokens [R] from scores [R, V] under limits [R, 3]: top-k (0: off), top-p (2: off), log of min-p. Overwrites scores.

    Most kept sets lie within a few candidates, which are cheap to find; which way a row takes depends on the row alone.
    """
    if scores.shape[1] <= CANDIDATES:
        return inverse(scores, _lowest_kept(_descending(scores), limits, None), uniform)
    top_k, top_p, floor = limits.split(1, dim=1)
    mass: Tensor | None = None  # where top-k does not bound what top-p is a share of, that is the whole row
    if bool(((top_k == 0) & (top_p < 1)).any()):
        mass = torch.where(scores < floor, 0.0, scores.exp()).sum(-1, keepdim=True).masked_fill_(top_k > 0, 0.0)
    best, tokens = scores.topk(CANDIDATES, dim=-1)  # [R, CANDIDATES]
    lowest = _lowest_kept(best, limits, mass)
    # sure: the kept set ends before the candidates do, so equal scores at its end are all in sight
    sure = (best[:, -1:] < lowest) & (top_k < CANDIDATES)
    result = torch.empty(len(scores), dtype=torch.long, device=scores.device)
    inside, outside = sure.squeeze(1).nonzero().squeeze(1), (~sure).squeeze(1).nonzero().squeeze(1)
    if len(inside):
        order = tokens[inside].argsort(-1)  # vocabulary order: candidates with equal scores come in any order
        options = tokens[inside].gather(1, order)
        pick = inverse(best[inside].gather(1, order), lowest[inside], uniform[inside])
        result[inside] = options.gather(1, pick.clamp_(max=CANDIDATES - 1).unsqueeze(1)).squeeze(1)
    if len(outside):
        rest = scores[outside]
        result[outside] = inverse(rest, _lowest_kept(_descending(rest), limits[outside], None), uniform[outside])
    return result


def draw_cut_at_once(scores: Tensor, limits: Tensor, uniform: Tensor, most: int) -> Tensor:
    """`draw_cut` without a look at the numbers on the way, which a device would have to be waited for.

    `most` is the largest top-k, where all rows have one; 0: some row may keep any number of tokens, and all are sorted.
    """
    if not most:
        return inverse(scores, _lowest_kept(_descending(scores), limits, None), uniform)
    top_k, _, floor = limits.split(1, dim=1)
    best = scores.topk(most, dim=-1).values  # [R, most]
    kth = best.gather(1, top_k.long() - 1)
    mass = torch.where(scores >= torch.maximum(kth, floor), scores.exp(), 0.0).sum(-1, keepdim=True)  # equals of the k-th may be many
    return inverse(scores, _lowest_kept(best, limits, mass), uniform)


def _descending(scores: Tensor) -> Tensor:
    if scores.device.type == "cpu":  # NumPy's vectorised sort takes a thirtieth of torch's time
        return torch.from_numpy(np.sort(scores.numpy(), axis=-1)).flip(-1)
    return scores.sort(dim=-1, descending=True).values


def _lowest_kept(best: Tensor, limits: Tensor, mass: Tensor | None) -> Tensor:
    """The lowest score [R, 1] that min-p, top-k and top-p keep, of the best scores [R, K] in descending order.

    Top-p is a share of `mass` [R, 1], the sum of weights; None, or 0 in a row: of the weights in `best` that the others keep.
    """
    top_k, top_p, floor = limits.split(1, dim=1)
    kth = best.gather(1, (top_k.long() - 1).clamp(0, best.shape[1] - 1))
    inside = (best >= floor) & ((best >= kth) | (top_k == 0))
    weight = best.exp() * inside
    reached = weight.cumsum(-1)
    total = reached[:, -1:] if mass is None else torch.where(mass > 0, mass, reached[:, -1:])
    kept = inside & (reached - weight < top_p * total)
    return torch.where(kept, best, torch.inf).amin(-1, keepdim=True)
