"""Paged attention against the textbook formula, over scattered blocks, for every geometry and option."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from swiftlite.engine.attention_cpu import SequenceSlice, paged_attention
from swiftlite.engine.kv import AttentionLayer, KVCache

CPU = torch.device("cpu")


def textbook(q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer, context: int) -> Tensor:
    """q [T, H, Dk] of the last T of K tokens, k [K, G, Dk], v [K, G, Dv] -> [T, H, Dv], in fp64."""
    group = layer.heads // layer.kv_heads
    k, v = k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    scores = torch.einsum("thd,khd->htk", q.double(), k) * layer.scale
    if layer.softcap is not None:
        scores = layer.softcap * torch.tanh(scores / layer.softcap)
    at, key = torch.arange(context, context + q.shape[0])[:, None], torch.arange(k.shape[0])[None]
    seen = key <= at
    if layer.window is not None:
        seen &= key > at - layer.window
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("htk,khd->thd", weights, v)


def make_case(layer: AttentionLayer, shapes: list[tuple[int, int]], block_size: int, dtype: torch.dtype):
    """Scattered cache for sequences of (context_len, query_len); returns q, cache, slices and the expected rows."""
    generator = torch.Generator().manual_seed(0)
    needed = [-(-(context + count) // block_size) for context, count in shapes]
    cache = KVCache([layer], sum(needed) + 2, block_size, dtype, CPU)
    cache.keys[0].fill_(float("nan"))  # whatever is read without having been written shows
    cache.values[0].fill_(float("nan"))
    free = torch.randperm(cache.num_blocks, generator=generator).tolist()
    queries, slices, expected, row = [], [], [], 0
    for (context, count), blocks in zip(shapes, needed, strict=True):
        table = [free.pop() for _ in range(blocks)]
        total = context + count
        k = torch.randn(total, layer.kv_heads, layer.head_dim, generator=generator).to(dtype)
        v = torch.randn(total, layer.kv_heads, layer.value_dim, generator=generator).to(dtype)
        q = torch.randn(count, layer.heads, layer.head_dim, generator=generator).to(dtype)
        slots = torch.tensor([table[at // block_size] * block_size + at % block_size for at in range(total)])
        cache.store(0, k, v, slots)
        queries.append(q)
        slices.append(SequenceSlice(row, count, context, table))
        expected.append(textbook(q, k, v, layer, context))
        row += count
    return torch.cat(queries), cache, slices, torch.cat(expected)


SHAPES = [(0, 1), (0, 7), (30, 1), (13, 20), (0, 150), (100, 1), (5, 1), (64, 65)]
GEOMETRIES = {"mha": (4, 4, 16, 16), "gqa": (6, 2, 16, 16), "mqa": (4, 1, 8, 8), "mla": (4, 4, 24, 16), "odd": (3, 1, 5, 7)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (9, None), (None, 2.0), (40, 5.0)])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_equals_the_textbook(geometry: str, window: int | None, softcap: float | None, dtype: torch.dtype) -> None:
    heads, kv_heads, head_dim, value_dim = GEOMETRIES[geometry]
    layer = AttentionLayer(0, "test", heads, kv_heads, head_dim, value_dim, 0.3, window, softcap)
    q, cache, slices, expected = make_case(layer, SHAPES, 8, dtype)
    out = paged_attention(q, cache.keys[0], cache.values[0], slices, layer)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, **tolerance)


def test_padded_rows_are_harmless() -> None:
    """Rows with slot -1 store nothing, and rows that belong to no sequence come back as zeros."""
    layer = AttentionLayer(0, "test", 2, 1, 4, 4, 0.5)
    cache = KVCache([layer], 2, 4, torch.float32, CPU)
    before = cache.keys[0].clone()
    k = torch.randn(3, 1, 4)
    cache.store(0, k, k, torch.tensor([-1, 6, -1]))
    assert torch.equal(cache.keys[0][1, 0, 2], k[1, 0])
    cache.keys[0][1, 0, 2] = 0
    assert torch.equal(cache.keys[0], before)
    out = paged_attention(torch.randn(3, 2, 4), cache.keys[0], cache.values[0], [SequenceSlice(1, 1, 2, [1])], layer)
    assert not out[0].any() and not out[2].any() and torch.isfinite(out).all()
