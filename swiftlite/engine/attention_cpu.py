"""Paged attention in plain torch: the reference for every kernel and the path for machines without one.

Each sequence's new queries attend to the keys that its block table names, causally, within the layer's window. Scores are
soft-capped where the layer says so and the softmax runs in fp32. Decode rows (one query a sequence) are gathered into one padded
batch; longer chunks run one sequence at a time, in blocks of queries so that scores stay small.
Invariant: nothing outside a sequence's own tokens is read into a result, not even as 0 * NaN from a stale slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swiftlite.engine.kv import AttentionLayer

QUERY_BLOCK = 64  # queries of one softmax: their scores [H, 64, K] stay in the cache


@dataclass(frozen=True)
class SequenceSlice:
    """One sequence's share of a batch: rows query_start .. query_start + query_len, after context_len cached tokens."""

    query_start: int
    query_len: int
    context_len: int
    block_table: Sequence[int]


def paged_attention(q: Tensor, keys: Tensor, values: Tensor, sequences: Sequence[SequenceSlice], layer: AttentionLayer) -> Tensor:
    """Attend q [T, H, Dk] to the pools keys [N, G, S, Dk] and values [N, G, S, Dv]; returns [T, H, Dv] in q's dtype.

    The new tokens' K and V are already stored. Rows of no sequence (padding) come back as zeros.
    """
    out = q.new_zeros(q.shape[0], layer.heads, layer.value_dim)
    decode = [sequence for sequence in sequences if sequence.query_len == 1]
    if decode:
        rows = torch.tensor([sequence.query_start for sequence in decode], device=q.device)
        out[rows] = _decode(q[rows], keys, values, decode, layer)
    for sequence in sequences:
        if sequence.query_len > 1:
            rows_of = slice(sequence.query_start, sequence.query_start + sequence.query_len)
            out[rows_of] = _prefill(q[rows_of], keys, values, sequence, layer)
    return out


def _softmax(scores: Tensor, hidden: Tensor, layer: AttentionLayer) -> Tensor:
    """fp32 probabilities of scores [..., K] where `hidden` (broadcast) is False."""
    scores = scores.float() * layer.scale
    if layer.softcap is not None:
        scores = torch.tanh(scores / layer.softcap) * layer.softcap
    return torch.softmax(scores.masked_fill_(hidden, float("-inf")), dim=-1)


def _decode(q: Tensor, keys: Tensor, values: Tensor, sequences: Sequence[SequenceSlice], layer: AttentionLayer) -> Tensor:
    """q [B, H, Dk], one query for each of B sequences -> [B, H, Dv]."""
    size, kv_heads = keys.shape[2], layer.kv_heads
    lengths = [sequence.context_len + 1 for sequence in sequences]
    # first block that any window still sees, so that long contexts of window layers cost only their window
    firsts = [0 if layer.window is None else max(0, length - layer.window) // size for length in lengths]
    tables = [
        list(sequence.block_table[first : (length + size - 1) // size])
        for sequence, first, length in zip(sequences, firsts, lengths, strict=True)
    ]
    width = max(len(table) for table in tables)
    blocks = torch.tensor([table + [table[0]] * (width - len(table)) for table in tables], device=q.device)  # [B, W]
    position = torch.arange(width * size, device=q.device) + torch.tensor(firsts, device=q.device)[:, None] * size  # [B, K]
    length = torch.tensor(lengths, device=q.device)[:, None]
    hidden = position >= length
    if layer.window is not None:
        hidden = hidden | (position < length - layer.window)
    k = keys[blocks].transpose(1, 2).reshape(len(sequences), kv_heads, width * size, -1)  # [B, G, K, Dk]
    v = values[blocks].transpose(1, 2).reshape(len(sequences), kv_heads, width * size, -1)  # [B, G, K, Dv]
    v = v.masked_fill(hidden[:, None, :, None], 0)
    grouped = q.view(len(sequences), kv_heads, layer.heads // kv_heads, -1)  # [B, G, H/G, Dk]
    weights = _softmax(grouped @ k.transpose(2, 3), hidden[:, None, None, :], layer)
    return (weights.to(v.dtype) @ v).view(len(sequences), layer.heads, layer.value_dim)


def _prefill(q: Tensor, keys: Tensor, values: Tensor, sequence: SequenceSlice, layer: AttentionLayer) -> Tensor:
    """q [T, H, Dk] of one sequence after its cached context -> [T, H, Dv]."""
    size, kv_heads, total = keys.shape[2], layer.kv_heads, sequence.context_len + sequence.query_len
    first = 0 if layer.window is None else max(0, sequence.context_len + 1 - layer.window) // size
    blocks = torch.tensor(list(sequence.block_table[first : (total + size - 1) // size]), device=q.device)
    start, end = first * size, total  # positions of the keys gathered
    k = keys[blocks].transpose(0, 1).reshape(kv_heads, -1, layer.head_dim)[:, : end - start]  # [G, K, Dk]
    v = values[blocks].transpose(0, 1).reshape(kv_heads, -1, layer.value_dim)[:, : end - start]  # [G, K, Dv]
    group, pieces = layer.heads // kv_heads, []
    for begin in range(0, sequence.query_len, QUERY_BLOCK):
        part = q[begin : begin + QUERY_BLOCK]
        count, at = part.shape[0], sequence.context_len + begin  # at: position of the first query
        low = start if layer.window is None else max(start, at + 1 - layer.window)
        high = at + count  # keys low .. high - 1 can be seen by some query of this part
        kept = slice(low - start, high - start)
        query_at = torch.arange(at, high, device=q.device)[:, None]
        key_at = torch.arange(low, high, device=q.device)[None, :]
        hidden = key_at > query_at
        if layer.window is not None:
            hidden = hidden | (key_at <= query_at - layer.window)
        grouped = part.view(count, kv_heads, group, -1).permute(1, 2, 0, 3).reshape(kv_heads, group * count, -1)  # rows: head, then query
        scores = (grouped @ k[:, kept].transpose(1, 2)).view(kv_heads, group, count, high - low)
        weights = _softmax(scores, hidden, layer).to(v.dtype).view(kv_heads, group * count, high - low)
        mixed = (weights @ v[:, kept]).view(kv_heads, group, count, layer.value_dim)
        pieces.append(mixed.permute(2, 0, 1, 3).reshape(count, layer.heads, layer.value_dim))
    return torch.cat(pieces)
