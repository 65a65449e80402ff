"""Decoder layers as one call: their steps are stages (kernels/stages.py) of one team of threads, with no Python between them.

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

from swiftlite.engine.attention_native import Args as AttentionArgs
from swiftlite.engine.attention_native import HeadSteps, NativeBatch, describe
from swiftlite.engine.int8 import PanelInt8
from swiftlite.engine.kv import AttentionLayer
from swiftlite.engine.lora_native import Args, NativeJob
from swiftlite.engine.lora_taps import Group, Tap
from swiftlite.engine.panels import PanelWeight
from swiftlite.kernels.stages import Gating, Norming, Run, Stage
from swiftlite.kernels.steps import Activation, Norm, RowNorm
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
    def of(cls, qkv: Sequence[Any], o: Any, gate_up: Sequence[Any], down: Any) -> Linears | None:
        """Of these modules, the sequences of one or more; None where they are not such products."""
        products = [_joined(modules) for modules in (qkv, [o], gate_up, [down])]
        if any(one is None for one in products):
            return None
        found = cls(*(one for one in products if one is not None))
        if not all(isinstance(one.packed, PanelWeight) or (isinstance(one.packed, PanelInt8) and one.packed.many) for one in found):
            return None
        return found


def _joined(parts: Sequence[Any]) -> PackedLinear | None:
    """The product that has just these parts, in order, or that is the only one."""
    if len(parts) == 1:
        return parts[0] if isinstance(parts[0], PackedLinear) else None
    if not all(isinstance(part, FusedPart) for part in parts):
        return None
    fused = parts[0].fused
    own = len(fused.widths) == len(parts) and all(part.fused is fused and part.index == index for index, part in enumerate(parts))
    return fused.product if own else None


@dataclass(frozen=True)
class Steps:
    """What a layer does beside its products; a norm that is None is not there."""

    attention: AttentionLayer
    heads: HeadSteps
    whole: tuple[Norm, Norm] | None  # of all of q's heads together and of all of k's
    before: Norm | None
    of_attention: Norm | None  # of its result, before that is added
    between: Norm | None  # attention and MLP
    of_mlp: Norm | None
    factor: float  # of what is added
    activation: Activation


@dataclass(frozen=True)
class Parts:
    """What a layer is made of."""

    steps: Steps
    linears: Linears


class _Layer:
    """A layer's structures."""

    def __init__(self, library: ctypes.CDLL, parts: Parts, following: Steps | None, room: Room) -> None:
        """`following`: of the next layer, if there is one."""
        self.library, self.parts, self.last = library, parts, following is None
        steps, linears = parts.steps, parts.linears
        layer = steps.attention
        self.width, self.act = linears.down.out_features, linears.down.in_features
        self.mixed = layer.heads * layer.value_dim
        room.want(
            x=self.width + PAD, qkv=linears.qkv.out_features, rotated=layer.heads * layer.head_dim, mixed=self.mixed, y=self.width,
            both=2 * self.act, act=self.act, sum=self.width, hidden=self.width,
        )  # fmt: skip
        self.between = _norming(self.width, steps.of_attention, steps.between, steps.factor)
        self.after = _norming(self.width, steps.of_mlp, None if following is None else following.before, steps.factor)
        self.attention = AttentionArgs()
        describe(self.attention, layer, steps.heads)
        self.whole = [] if steps.whole is None else [_norming(len(norm.weight), None, norm, 1.0) for norm in steps.whole]
        self.gating = Gating(dim=self.act, activation=steps.activation)
        self.bases: list[Stage] = [linear.packed.stage(linear.bias) for linear in linears]
        packed = linears.gate_up.packed
        self.gated: Stage | None = packed.gated(linears.gate_up.bias, steps.activation) if isinstance(packed, PanelWeight) else None
        self.products: list[_Product] = []
        self.gate_out = "both"

    def stages(self, job: NativeJob | None) -> list[Stage]:
        """From the norm that is in `x` already to the next one, with what `job` adds to each product."""
        attention, norm = (self.library.swift_paged_attention, self.attention), self.library.swift_norming
        qkv, o, gate_up, down = [_Product.of(base, linear, job) for base, linear in zip(self.bases, self.parts.linears, strict=True)]
        gating: list[Stage] = [(self.library.swift_gating, self.gating)]
        if self.gated is not None and (gate_up.adding is None or gate_up.joined):
            gate_up, gating = _Product.of(self.gated, self.parts.linears.gate_up, job, gate=True), []
        self.products, self.gate_out = [qkv, o, gate_up, down], "both" if gating else "act"
        return [
            *qkv.stages, *((norm, one) for one in self.whole), attention, *o.stages, (norm, self.between),
            *gate_up.stages, *gating, *down.stages, (norm, self.after),
        ]  # fmt: skip

    def give(self, job: NativeJob) -> None:
        """Another job that adapts the same linears."""
        for one, linear in zip(self.products, self.parts.linears, strict=True):
            if one.adding is not None:
                job.give(one.adding, _group(linear).index)

    def fill(self, rows: int, at: dict[str, int]) -> None:
        """Where each stage reads and writes `rows` rows."""
        stride, layer, args = self.width + PAD, self.parts.steps.attention, self.attention
        for one, x, out, x_stride in zip(
            self.products, ("x", "mixed", "x", "act"), ("qkv", "y", self.gate_out, "y"), (stride, self.mixed, stride, self.act), strict=True
        ):
            product, adding = one.product, one.adding
            product.x, product.out, product.rows, product.stride = at[x], at[out], rows, x_stride
            if adding is not None:
                adding.x, adding.y, adding.x_stride, adding.y_stride = at[x], at[out], x_stride, product.n
        args.q = at["qkv"]
        args.k = args.q + 2 * layer.heads * layer.head_dim
        args.v = args.k + 2 * layer.kv_heads * layer.head_dim
        args.q_token = args.k_token = args.v_token = self.parts.linears.qkv.out_features
        for whole, start in zip(self.whole, (args.q, args.k), strict=False):
            whole.a = whole.out = start
            whole.rows, whole.stride, whole.out_stride = rows, args.q_token, args.q_token
        args.rotated, args.out = at["rotated"], at["mixed"]
        self.gating.both, self.gating.out, self.gating.rows = at["both"], at["act"], rows
        for norm in (self.between, self.after):
            norm.rows, norm.out, norm.out_stride, norm.b = rows, at["x"], stride, at["y"]
        if self.last:
            self.after.out = None
        self.between.a, self.between.total = at["hidden"], at["sum"]
        self.after.a, self.after.total = at["sum"], at["hidden"]


@dataclass(frozen=True)
class _Product:
    """A linear's stages: its product alone, what adapters add behind it, or both in one."""

    stages: list[Stage]
    product: Any  # Product or Int8Product
    adding: Args | None = None
    joined: bool = False

    @classmethod
    def of(cls, base: Stage, linear: PackedLinear, job: NativeJob | None, gate: bool = False) -> _Product:
        group = None if job is None else _group(linear)
        if job is None or group is None or not job.adapts(group.index):
            return cls([base], base[1])
        if job.joined[group.index] and isinstance(linear.packed, PanelWeight):
            function, both = job.join(base[1], group.index, gate)
            return cls([(function, both)], both.product, both.adding, True)
        function, adding = job.stage(group.index, 0, len(group.parts))
        return cls([base, (function, adding)], base[1], adding)


def _group(linear: PackedLinear) -> Group:
    """Of a linear with a tap."""
    return vars(linear)["forward"].linear.group


def _norming(width: int, of: Norm | None, then: Norm | None, factor: float) -> Norming:
    return Norming(dim=width, stride=width, of=RowNorm.of(of), then=RowNorm.of(then), factor=factor)


class Stack:
    """Layers that follow each other. Tensors are bfloat16; letters as in bridge.py."""

    def __init__(self, library: ctypes.CDLL, layers: Sequence[Parts], room: Room) -> None:
        self.library, self.room = library, room
        following = [*(parts.steps for parts in layers[1:]), None]
        self.layers = [_Layer(library, parts, then, room) for parts, then in zip(layers, following, strict=True)]
        self.before = _norming(self.layers[0].width, None, layers[0].steps.before, 1.0)
        self._qkv = layers[0].linears.qkv  # one of its linears has a tap when all have
        self._rows: tuple[int, int] = -1, -1  # what the structures are filled in for, and the room's then
        self._job: NativeJob | None = None
        self._run: Run | None = None

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, native: NativeBatch) -> Tensor | None:
        """hidden [1, T, D] through the layers, or None where a batch's adapters are not for stages."""
        tap, job, rows = vars(self._qkv).get("forward"), None, hidden.shape[1]
        if tap is not None:
            if type(tap) is not Tap or tap.linear is None or tap.linear.layers.joined is None:
                return None
            job = tap.linear.layers.joined
            tap.linear.layers.check_rows(rows, tap.linear.group)
        assert hidden.dtype == native.cache.dtype == torch.bfloat16
        hidden = hidden.contiguous()
        out = torch.empty_like(hidden)
        self.room.grow(rows)
        if self._run is None or job is not self._job:
            self._arrange(job)
        assert self._run is not None
        if self._rows != (rows, self.room.rows):
            self._fill(rows)
        first, last = self.layers[0], self.layers[-1]
        self.before.a = first.between.a = hidden.data_ptr()
        last.after.total = out.data_ptr()
        for layer in self.layers:
            native.give(layer.attention, layer.parts.steps.attention, (cos, sin))
        if not native.covered:
            self.room.memory["mixed"].zero_()
        self._run()
        return out

    def _arrange(self, job: NativeJob | None) -> None:
        """The stages of a batch with other adapters: the same ones where the same linears are adapted, as in most steps."""
        if self._run is not None and job is not None and self._job is not None and job.pattern == self._job.pattern:
            for layer in self.layers:
                layer.give(job)
        else:
            stages = [stage for layer in self.layers for stage in layer.stages(job)]
            self._run = Run(self.library, [(self.library.swift_norming, self.before), *stages])
            self._rows = -1, -1
        self._job = job

    def _fill(self, rows: int) -> None:
        at = {name: memory.data_ptr() for name, memory in self.room.memory.items()}
        for layer in self.layers:
            layer.fill(rows, at)
        width = self.layers[0].width
        self.before.rows, self.before.out, self.before.out_stride = rows, at["x"], width + PAD
        self._rows = rows, self.room.rows
