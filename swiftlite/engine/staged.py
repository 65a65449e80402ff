"""A pre-norm decoder layer as one call: its steps are stages (kernels/stages.py) of one team of threads, with no Python between them.

Calling the steps one by one takes some 50 microseconds each before any work is done, in 28 layers a tenth to a quarter of a decode step.
What can be a stage: linears in the kernels' own layouts, attention over pages, and adapters that only add products. Layers of other
linears, and batches whose adapters do more (DoRA, biases), go step by step (layers.py); the results are equal to the bit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swiftlite.engine.attention_native import HeadNorms, NativeBatch
from swiftlite.engine.int8 import PanelInt8
from swiftlite.engine.kv import AttentionLayer
from swiftlite.engine.lora_native import NativeJob
from swiftlite.engine.lora_taps import Tap
from swiftlite.engine.panels import PanelWeight
from swiftlite.kernels.stages import Gating, Norming, Run, Stage
from swiftlite.kernels.steps import Norm
from swiftlite.models.packed import FusedPart, PackedLinear

PAD = 32  # elements between rows of inputs: rows a power of two apart would share few lines of the first-level cache


class Room:
    """Rows of results between stages, by name; one for all layers of a model, as they run one after the other."""

    def __init__(self) -> None:
        self.rows = 0
        self.widths: dict[str, int] = {}
        self.memory: dict[str, Tensor] = {}

    def want(self, **widths: int) -> None:
        """Elements of a row that a layer needs."""
        self.widths |= {name: max(width, self.widths.get(name, 0)) for name, width in widths.items()}

    def grow(self, rows: int) -> None:
        if rows > self.rows:
            self.rows = -(-rows // 64) * 64
            self.memory = {name: torch.empty(self.rows * width, dtype=torch.bfloat16) for name, width in self.widths.items()}


@dataclass(frozen=True)
class Linears:
    """The four products of a layer: q, k and v in one, gate and up in one."""

    qkv: PackedLinear
    o: PackedLinear
    gate_up: PackedLinear
    down: PackedLinear

    def __iter__(self):
        return iter((self.qkv, self.o, self.gate_up, self.down))

    @classmethod
    def of(cls, attention: Sequence[Any], mlp: Sequence[Any]) -> Linears | None:
        """Of the modules (q, k, v, o) and (gate, up, down); None where they are not such products."""
        qkv, gate_up, singles = _joined(attention[:3]), _joined(mlp[:2]), (attention[3], mlp[2])
        if qkv is None or gate_up is None or not all(isinstance(one, PackedLinear) for one in singles):
            return None
        found = cls(qkv, singles[0], gate_up, singles[1])
        if not all(isinstance(one.packed, PanelWeight) or (isinstance(one.packed, PanelInt8) and one.packed.many) for one in found):
            return None
        return found


def _joined(parts: Sequence[Any]) -> PackedLinear | None:
    """The product that has just these parts, in order."""
    if not all(isinstance(part, FusedPart) for part in parts):
        return None
    fused = parts[0].fused
    own = len(fused.widths) == len(parts) and all(part.fused is fused and part.index == index for index, part in enumerate(parts))
    return fused.product if own else None


class StagedLayer:
    """One layer. Tensors are bfloat16; letters as in bridge.py."""

    def __init__(
        self, library: ctypes.CDLL, layer: AttentionLayer, norms: tuple[Norm, Norm], heads: HeadNorms | None, linears: Linears, room: Room
    ) -> None:  # fmt: skip
        self.library, self.layer, self.heads, self.linears, self.room = library, layer, heads, linears, room
        self.width = linears.down.out_features
        self.act = linears.down.in_features
        queries = layer.heads * layer.head_dim
        room.want(
            x=self.width + PAD, qkv=linears.qkv.out_features, rotated=queries, mixed=layer.heads * layer.value_dim, y=self.width,
            both=2 * self.act, act=self.act, sum=self.width,
        )  # fmt: skip
        first, second = norms
        self.before = Norming(w=first.weight.data_ptr(), eps=first.eps, kind=first.kind, dim=self.width, is_bf16=True)
        self.between = Norming(w=second.weight.data_ptr(), eps=second.eps, kind=second.kind, dim=self.width, is_bf16=True)
        self.after = Norming(dim=self.width, is_bf16=True)
        self.gating = Gating(dim=self.act, is_bf16=True)
        self.products: list[Stage] = [linear.packed.stage(linear.bias) for linear in linears]
        packed = linears.gate_up.packed
        self.gated: Stage | None = packed.gated(linears.gate_up.bias) if isinstance(packed, PanelWeight) else None
        self._rows: tuple[int, int] = -1, -1  # what the structures are filled in for, and the room's then
        self._job: NativeJob | None = None
        self._added: list[Stage | None] = []
        self._run: Run | None = None
        self._attention = 0  # its place in the run

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, native: NativeBatch) -> Tensor | None:
        """hidden [1, T, D] through the layer, or None where a batch's adapters are not for stages."""
        tap = vars(self.linears.qkv).get("forward")
        job = None
        if tap is not None:
            if type(tap) is not Tap or tap.linear is None or tap.linear.layers.joined is None:
                return None
            job = tap.linear.layers.joined
            tap.linear.layers.check_rows(hidden.shape[1], tap.linear.group)
        hidden = hidden.contiguous()
        out = torch.empty_like(hidden)
        rows = hidden.shape[1]
        self.room.grow(rows)
        if self._run is None or job is not self._job:
            self._run, self._job, self._rows = self._arrange(job, native), job, (-1, -1)
        if self._rows != (rows, self.room.rows):
            self._fill(rows)
        at = self.room.memory
        self.before.a = self.between.a = hidden.data_ptr()
        self.after.total = out.data_ptr()
        native.prepare_raw(self.layer, cos, sin, self.heads)
        args, stride, qkv = native.args, self.linears.qkv.out_features, at["qkv"].data_ptr()
        args.q, args.k = qkv, qkv + 2 * self.layer.heads * self.layer.head_dim
        args.v = args.k + 2 * self.layer.kv_heads * self.layer.head_dim
        args.q_token = args.k_token = args.v_token = stride
        args.rotated, args.out = at["rotated"].data_ptr(), at["mixed"].data_ptr()
        if not native.covered:
            at["mixed"].zero_()
        self._run.place(self._attention, native.args)
        self._run()
        return out

    def _arrange(self, job: NativeJob | None, native: NativeBatch) -> Run:
        """The stages, with what `job` adds to each product."""
        self._added = [self._adding(job, linear) for linear in self.linears]
        qkv, o, gate_up, down = [
            [product] if added is None else [product, added] for product, added in zip(self.products, self._added, strict=True)
        ]
        if self._added[2] is None and self.gated is not None:
            gate = [self.gated]
        else:
            gate = [*gate_up, (self.library.swift_gating, self.gating)]
        norming = self.library.swift_norming
        self._attention = 1 + len(qkv)
        return Run(
            self.library, [(norming, self.before), *qkv, native.stage, *o, (norming, self.between), *gate, *down, (norming, self.after)]
        )

    @staticmethod
    def _adding(job: NativeJob | None, linear: PackedLinear) -> Stage | None:
        if job is None:
            return None
        group = vars(linear)["forward"].linear.group
        return job.stage(group.index, 0, len(group.parts)) if job.adapts(group.index) else None

    def _fill(self, rows: int) -> None:
        """Where each stage reads and writes."""
        at, stride = {name: memory.data_ptr() for name, memory in self.room.memory.items()}, self.width + PAD
        for (_, product), added, x, out, x_stride in zip(
            self.products, self._added, ("x", "mixed", "x", "act"), ("qkv", "y", "both", "y"),
            (stride, self.layer.heads * self.layer.value_dim, stride, self.act), strict=True,
        ):  # fmt: skip
            product.x, product.out, product.rows, product.stride = at[x], at[out], rows, x_stride
            if added is not None:
                args = added[1]
                args.x, args.y, args.x_stride, args.y_stride = at[x], at[out], x_stride, product.n
        if self.gated is not None:
            product = self.gated[1]
            product.x, product.out, product.rows, product.stride = at["x"], at["act"], rows, stride
        self.gating.both, self.gating.out, self.gating.rows, self.gating.out_stride = at["both"], at["act"], rows, self.act
        for norming in (self.before, self.between, self.after):
            norming.rows, norming.out, norming.out_stride, norming.a_stride, norming.b = rows, at["x"], stride, self.width, at["y"]
        self.before.b = None
        self.between.total = self.after.a = at["sum"]
        self._rows = rows, self.room.rows
