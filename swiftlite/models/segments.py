"""Training's way into a stock model: attention over packed documents ("segments").

Several documents lie end to end in one row of T tokens; `lengths` says where each ends. Attention is causal inside a
document and never crosses its borders, so packing changes no result and nothing is padded. The lengths travel as an extra
keyword of `model(...)`, which transformers hands down to every attention layer (no global state), and no mask is built
because none is registered for our name.

On a CPU with a matrix unit bfloat16 documents take the kernel of `kernels/segments.py` (no soft cap), else most take
`attention_blocks`, on a GPU all of them `attention_varlen`; the reference of the three is the path that dropout takes, one document
after the other.

Does not know: losses, adapters, caches. Raises on any keyword it does not understand (attention sinks, sparse indices, ...),
because ignoring one means silently wrong gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swiftlite.errors import ModelError
from swiftlite.kernels import segments as by_kernel
from swiftlite.models import attention_blocks

NAME = "swift_segments"
SIDE_BY_SIDE = 64  # documents up to here are computed several at once
STEP = 16  # with others of about their length
SHORT = 128  # float32 documents up to here cost torch's own kernel fewer calls than ours
# Keywords that carry nothing attention needs: positions are already in the rotated q and k, and there is no cache.
# Router logits are something to collect: whether they join the loss is the loss's matter.
HARMLESS = (
    "position_ids", "use_cache", "cache_position", "output_attentions", "output_hidden_states", "output_router_logits", "return_dict",
    "logits_to_keep",
)  # fmt: skip


class Unheard(ModelError):
    """The model's layers do not hand down to attention what it needs; stock attention is told by a mask."""


def register() -> str:
    """Make the attention known to transformers (idempotent); returns its name."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
    return NAME


def attend(
    module: torch.nn.Module,
    query: Tensor,  # [1, H, T, D], rotated
    key: Tensor,  # [1, G, T, D]
    value: Tensor,  # [1, G, T, Dv]
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    swift_segments: tuple[int, ...] | None = None,
    is_causal: bool | None = None,
    **unknown: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each of the `swift_segments` documents (their lengths, which sum to T). -> [1, T, H, Dv]"""
    # None and False mean "off": many families hand all of their forward's switches down
    rest = [name for name, value_ in unknown.items() if value_ is not None and value_ is not False and name not in HARMLESS]
    if rest or attention_mask is not None or is_causal is False:
        raise ModelError(
            f"cannot train {type(module).__name__}: its attention uses {', '.join(rest) or 'a mask of its own'}",
            "swiftlite's packed attention does not know how to apply it, and leaving it out would train another model",
        )
    if swift_segments is None:  # all tokens would pass for one document
        raise Unheard(f"{type(module).__name__} cannot be packed", "its layers do not tell attention where a row ends")
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # rotation leaves q and k in float32 there, and v is not
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
    lengths = tuple(swift_segments)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    settings = scale, dropout, sliding_window, softcap
    if kind == "cuda":
        from swiftlite.models import attention_varlen  # torch's module takes a while to import, and a CPU has no use for it

        if attention_varlen.takes(query, value, dropout, softcap):
            return attention_varlen.attend(query, key, value, lengths, scaling, sliding_window), None
    if dropout == 0 and softcap is None and by_kernel.takes(query, key, value, lengths, scale):
        return by_kernel.attend(query, key, value, lengths, scale, sliding_window), None
    layout = _layout(lengths, query.device, onednn=kind == "cpu" and query.dtype == torch.bfloat16)
    if layout is None:
        outputs = [
            _segment(q, k, v, *settings)
            # split, not slices: its backward is one concatenation, where each slice's is a full-size zero tensor
            for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
        ]
        # contiguous, as stock attention's: some models look at it through another shape
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)).transpose(1, 2).contiguous(), None
    places = [documents * length for documents, length in layout.shapes]
    parts = [_Place.apply(x[0].transpose(0, 1), layout.token, layout.place).split(places) for x in (query, key, value)]
    grouped = []
    for shape, *qkv in zip(layout.shapes, *parts, strict=True):
        q, k, v = (x.view(*shape, *x.shape[1:]).transpose(1, 2) for x in qkv)  # [B, heads, L, D]
        grouped.append(_segment(q, k, v, *settings).transpose(1, 2).flatten(0, 1))  # [B * L, H, Dv]
    return _Collect.apply(torch.cat(grouped), layout.place)[None], None


@dataclass(frozen=True)
class _Layout:
    """Short documents side by side in groups of like length. The last places of a shorter one repeat its last token: no
    earlier query sees them, and their own outputs are not collected, so they change nothing."""

    shapes: list[tuple[int, int]]  # per group: documents, length
    token: Tensor  # [P] the token that each place of all groups holds
    place: Tensor  # [T] where each token is (its own place, not a repetition)


@lru_cache(maxsize=8)  # the layers of a pass, and its recomputation, ask for the same one
def _layout(lengths: tuple[int, ...], device: torch.device, onednn: bool) -> _Layout | None:
    """None: too few short documents to gain from it. `onednn`: lengths are rounded up, because oneDNN compiles a kernel for
    every new shape of a bfloat16 product and keeps it (a gigabyte within 50 steps of mixed lengths)."""
    if not onednn and sum(length <= SIDE_BY_SIDE for length in lengths) < 4:
        return None
    groups: dict[tuple[int, int], list[int]] = {}
    for number, length in enumerate(lengths):
        rounded = -(-length // STEP) * STEP
        short = length <= SIDE_BY_SIDE  # a long document is a group of its own
        groups.setdefault((rounded, -1) if short else (rounded if onednn else length, number), []).append(number)
    starts = [0, *accumulate(lengths)]
    shapes, token, place, at = [], [], torch.empty(starts[-1], dtype=torch.long), 0
    for (longest, _), documents in groups.items():
        shapes.append((len(documents), longest))
        for number in documents:
            start, length = starts[number], lengths[number]
            token.append(start + torch.arange(longest).clamp(max=length - 1))
            place[start : start + length] = at + torch.arange(length)
            at += longest
    return _Layout(shapes, torch.cat(token).to(device), place.to(device))


class _Place(torch.autograd.Function):
    """Rows of tokens [T, ...] -> rows of places [P, ...]. Repetitions have no gradient, so the backward is a selection too."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, token: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return rows.index_select(0, token)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (place,) = ctx.saved_tensors
        return grad.index_select(0, place), None, None


class _Collect(torch.autograd.Function):
    """Rows of places [P, ...] -> rows of tokens [T, ...]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        ctx.places = len(rows)
        return rows.index_select(0, place)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (place,) = ctx.saved_tensors
        return grad.new_zeros(ctx.places, *grad.shape[1:]).index_copy_(0, place, grad), None


def _segment(
    q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float, window: int | None, softcap: float | None
) -> Tensor:  # [B, H, T, D], [B, G, T, D], [B, G, T, Dv] -> [B, H, T, Dv]
    tokens, grouped = q.shape[2], q.shape[1] != k.shape[1]
    windowed = window is not None and window < tokens
    if q.device.type == "cpu" and dropout == 0 and (windowed or softcap is not None or q.dtype != torch.float32 or tokens > SHORT):
        return attention_blocks.attend(q, k, v, scale, window if windowed else None, softcap)
    if softcap is None and not windowed:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=grouped)
    distance = torch.arange(tokens, device=q.device)[:, None] - torch.arange(tokens, device=q.device)[None, :]
    seen = distance >= 0  # [T, T], query by key
    if window is not None:
        seen &= distance < window
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=dropout, scale=scale, enable_gqa=grouped)
    if grouped:
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = (q @ k.transpose(2, 3)) * scale  # [1, H, T, T]
    scores = (torch.tanh(scores / softcap) * softcap).masked_fill(~seen, float("-inf"))
    weights = F.dropout(torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype), dropout, training=dropout > 0)
    return weights @ v
