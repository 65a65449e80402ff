"""What an adapter changes beside its A and B products: DoRA's gains, biases, its own embeddings and heads, trained tokens.

DoRA (arXiv 2402.09353) scales each output row of W + s B A to a learnt length m: with g = m / |W + s B A| the result is
g * (W x) + g * s B A x + bias. The g of the products is folded into B, so of the stock result y only g * y + (1 - g) * bias is left
to do here. All of it costs only the rows that have it. It knows tensors and module places, not names of adapters or requests.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from swiftlite.adapters.directory import LoraWeights
from swiftlite.errors import AdapterError
from swiftlite.models.packed import FusedPart, PackedLinear, PackedWeight

Place = tuple[int, int]  # group, part
ROWS = 128  # of a weight, held in float32 at once


@dataclass
class TokenTable:
    """An adapter's own input embedding or output head [V, D]: a whole table, rows for some tokens, or a low-rank update."""

    table: Tensor | None = None  # [V, D]
    tokens: Tensor | None = None  # [n] int64, ascending
    rows: Tensor | None = None  # [n, D]
    a: Tensor | None = None  # embedding: [V, R], head: [R, D]
    b: Tensor | None = None  # embedding: [R, D], head: [V, R]; scaled
    scale: float | None = None  # the embedding module multiplies by it
    bias: Tensor | None = None  # the head's, [V]

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.table, self.tokens, self.rows, self.a, self.b) if t is not None]

    def embed(self, ids: Tensor, y: Tensor) -> None:
        """Change y [T, D], the stock embedding of ids [T], in place."""
        if self.table is not None:
            y.copy_(self._scaled(F.embedding(ids, self.table)))
        if self.a is not None and self.b is not None:
            y += self._scaled(F.embedding(ids, self.a) @ self.b)
        if self.tokens is not None and self.rows is not None:
            place = torch.searchsorted(self.tokens, ids).clamp_(max=len(self.tokens) - 1)
            mine = (self.tokens[place] == ids)[:, None]
            torch.where(mine, self._scaled(self.rows[place]), y, out=y)

    def _scaled(self, rows: Tensor) -> Tensor:
        return rows if self.scale is None else rows * torch.tensor(self.scale, dtype=rows.dtype, device=rows.device)

    def project(self, x: Tensor, y: Tensor) -> Tensor:
        """New logits [S, V] for inputs x [S, D] and stock logits y."""
        if self.table is not None:
            y = F.linear(x, self.table, self.bias)
        if self.a is not None and self.b is not None:
            y = y + F.linear(F.linear(x, self.a), self.b)
        if self.tokens is not None and self.rows is not None:
            y[:, self.tokens] = F.linear(x, self.rows, None if self.bias is None else self.bias[self.tokens])
        return y


@dataclass
class Extras:
    """All of one adapter that is not a plain product."""

    gains: dict[Place, Tensor] = field(default_factory=dict)  # g [out] float32
    shifts: dict[Place, Tensor] = field(default_factory=dict)  # added, [out] float32
    embedding: TokenTable | None = None
    head: TokenTable | None = None

    @property
    def changes_linears(self) -> bool:
        return bool(self.gains or self.shifts)

    def __bool__(self) -> bool:
        return self.changes_linears or self.embedding is not None or self.head is not None

    @property
    def nbytes(self) -> int:
        tables = [table for table in (self.embedding, self.head) if table is not None]
        tensors = [*self.gains.values(), *self.shifts.values(), *(t for table in tables for t in table.tensors())]
        return sum(t.numel() * t.element_size() for t in tensors)

    def adjust(self, group: int, part: int, y: Tensor) -> None:
        """y [rows, out] of one linear, before its product is added."""
        gain, shift = self.gains.get((group, part)), self.shifts.get((group, part))
        if gain is not None and shift is not None:
            y.copy_(torch.addcmul(shift, y.float(), gain))
        elif gain is not None:
            y.copy_(y.float() * gain)
        elif shift is not None:
            y.copy_(y.float() + shift)


class Unpacker:
    """Plain weights of packed products; the last one is kept, for the other parts of a fused product."""

    def __init__(self) -> None:
        self._last: tuple[PackedWeight, Tensor] | None = None

    def dense(self, packed: PackedWeight) -> Tensor:
        if self._last is None or self._last[0] is not packed:
            self._last = (packed, packed.to_dense())
        return self._last[1]


def weight_of(name: str, module: nn.Linear, unpacker: Unpacker) -> Tensor:
    """The base weight [out, in] of a linear however it is packed. AdapterError where it is not kept in a readable form."""
    if isinstance(module, FusedPart):
        start = sum(module.fused.widths[: module.index])
        return unpacker.dense(module.fused.product.packed)[start : start + module.out_features]
    if isinstance(module, PackedLinear):
        return unpacker.dense(module.packed)
    if type(module) is nn.Linear:
        return module.weight.detach()
    raise AdapterError(f"DoRA needs the base weight of {name}", f"it is a {type(module).__name__}", "serve it on the 16-bit base")


def bias_of(module: nn.Linear) -> Tensor | None:
    if isinstance(module, FusedPart):
        start = sum(module.fused.widths[: module.index])
        bias = module.fused.product.bias
        return None if bias is None else bias[start : start + module.out_features]
    return None if module.bias is None else module.bias.detach()


def dora_gain(name: str, module: nn.Linear, weights: LoraWeights, unpacker: Unpacker) -> Tensor:
    """g [out] float32 = m / |W + s B A|, row by row of W."""
    assert weights.magnitude is not None
    whole = weight_of(name, module, unpacker)
    a, b = weights.a.to(whole.device).float(), weights.b.to(whole.device).float()
    # Some rows at a time: they stay in the CPU's cache.
    norms = [torch.addmm(rows.float(), b_rows, a, alpha=weights.scale).norm(dim=1)
             for rows, b_rows in zip(whole.split(ROWS), b.split(ROWS), strict=True)]  # fmt: skip
    return weights.magnitude.to(whole.device).float() / torch.cat(norms)


def embedding_scale(name: str, module: nn.Module) -> float | None:
    """What the module multiplies its rows by (Gemma does); AdapterError when it does anything else."""
    assert isinstance(module, nn.Embedding)
    ids = torch.arange(min(4, module.num_embeddings), device=module.weight.device)
    # Its class's forward: on the module itself, a running batch's adapters may stand in its place.
    rows, got = F.embedding(ids, module.weight.detach()), type(module).forward(module, ids)
    scale = dict(module.named_buffers()).get("embed_scale")
    expected = rows if scale is None else rows * scale.to(rows.dtype)
    if not torch.equal(got, expected):
        raise AdapterError(f"{name} is not a plain embedding", f"it is a {type(module).__name__}", "merge the adapter into its base")
    return None if scale is None else float(scale.to(rows.dtype))
