"""Whole pre-norm decoder layers in few calls, or in one: norm, projections, head norms + rotation + attention, add + norm, gate, add.

At small batches a step is the reading of the weights plus the overhead of hundreds of small calls. A layer qualifies by its parts (all of
them already replaced by checked kernels), and all layers together are then held against the stock forward on a few tokens spread over
the whole context, with a cache of their own; one difference and every layer gets its own forward back. Layers that can be stages run
together with their neighbours as one call (staged.py); else their linears stay modules that are called one by one. What stands in an
MLP's place and is another kind, as experts are, is called as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from swiftlite.engine.attention_cpu import SequenceSlice
from swiftlite.engine.attention_native import HeadNorms
from swiftlite.engine.bridge import Bridge, ForwardBatch, Pages
from swiftlite.engine.kv import AttentionLayer, KVCache
from swiftlite.engine.staged import Linears, Parts, Room, Stack
from swiftlite.kernels.steps import Kernels, Norm
from swiftlite.models.fused import Fused

CHILDREN = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}


@dataclass
class _Layer:
    """A decoder layer that qualifies, with what its steps need."""

    module: nn.Module
    attention: AttentionLayer
    before: Norm
    between: Norm  # attention and MLP
    heads: HeadNorms | None
    projections: list[nn.Module]  # q, k, v, o
    mlp: list[nn.Module]  # gate, up, down, or none: another kind, such as experts, that is called as it is

    @property
    def parts(self) -> Parts | None:
        """What its stages need, where it can be stages."""
        linears = Linears.of(self.projections, self.mlp) if self.mlp else None
        return None if linears is None else Parts(self.attention, self.before, self.between, self.heads, linears)


def fuse_layers(bridge: Bridge, fused: Fused) -> int:
    """Give every layer that qualifies the fused forward; returns how many have it (0 when the check fails)."""
    if not fused.ropes:
        return 0
    named = [module for module in bridge.model.modules() if {name for name, _ in module.named_children()} == CHILDREN]
    layers = [layer for layer in (_qualify(module, bridge, fused) for module in named) if layer is not None]
    if not layers:
        return 0
    before = _trial(bridge)
    owned = [vars(layer.module).get("forward") for layer in layers]
    for layer, stack in zip(layers, _stacks(layers, bridge), strict=True):
        layer.module.forward = _forward(layer, stack, fused.kernels)  # type: ignore[method-assign]
    try:
        after = _trial(bridge)
    except (RuntimeError, TypeError, ValueError, AttributeError, AssertionError):
        after = None
    tolerance = (1e-4 if before.dtype == torch.float32 else 0.02) * before.abs().max().item()
    if after is not None and after.shape == before.shape and (after - before).abs().max().item() <= tolerance:
        return len(layers)
    for layer, own in zip(layers, owned, strict=True):
        if own is None:
            del layer.module.forward
        else:
            layer.module.forward = own  # type: ignore[method-assign]
    return 0


def _trial(bridge: Bridge) -> Tensor:
    """Logits of 7 tokens, the last at the context's last position (some models scale queries by position), in their own small cache."""
    cache = KVCache(bridge.layers, 1, 8, bridge.model.dtype, bridge.device)
    ids = torch.tensor([3, 7, 5, 6, 3, 4, 5])
    slots = torch.arange(7)
    positions = slots * (bridge.max_model_len - 1) // 6
    return bridge.forward(ForwardBatch(ids, positions, slots, [SequenceSlice(0, 7, 0, [0])], slots), cache).float()


def _qualify(module: nn.Module, bridge: Bridge, fused: Fused) -> _Layer | None:
    """A decoder layer whose parts are what the fused steps need."""
    attention, mlp = module.get_submodule("self_attn"), module.get_submodule("mlp")
    first, second = (
        fused.norms.get(module.get_submodule("input_layernorm")),
        fused.norms.get(module.get_submodule("post_attention_layernorm")),
    )
    layer, extra = bridge.layer_of.get(attention), {name for name, _ in attention.named_children()} - PROJECTIONS
    if first is None or second is None or layer is None or extra not in (set(), {"q_norm", "k_norm"}):
        return None
    if not all(isinstance(attention.get_submodule(name), nn.Linear) for name in PROJECTIONS):
        return None
    heads: HeadNorms | None = None
    if extra:
        q, k = fused.norms.get(attention.get_submodule("q_norm")), fused.norms.get(attention.get_submodule("k_norm"))
        if q is None or k is None or (q.eps, q.kind) != (k.eps, k.kind) or not len(q.weight) == len(k.weight) == layer.head_dim:
            return None
        heads = HeadNorms(q.weight, k.weight, q.eps, q.kind)
    projections = [attention.get_submodule(name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    gated = [mlp.get_submodule(f"{name}_proj") for name in ("gate", "up", "down")] if mlp in fused.gates else []
    return _Layer(module, layer, first, second, heads, projections, gated)


def _stacks(layers: list[_Layer], bridge: Bridge) -> list[Stack | None]:
    """The stack of each layer: those that can be stages, with their neighbours."""
    found: list[Stack | None] = [None] * len(layers)
    if bridge.library is None or bridge.model.dtype != torch.bfloat16:  # int8 panels take float32 too, but not as stages
        return found
    runs: list[list[tuple[int, Parts]]] = []
    for place, layer in enumerate(layers):
        parts = layer.parts
        if parts is None:
            continue
        if runs and runs[-1][-1][0] == place - 1 and runs[-1][-1][1].attention.index == parts.attention.index - 1:
            runs[-1].append((place, parts))
        else:
            runs.append([(place, parts)])
    room = Room()
    for run in runs:
        stack = Stack(bridge.library, [parts for _, parts in run], room)
        for place, _ in run:
            found[place] = stack
    return found


def _forward(layer: _Layer, stack: Stack | None, kernels: Kernels) -> Callable[..., Any]:
    """In place of a layer's own: the first of a stack does all of them, and the others hand on what they get."""
    stock, attention, before, between = layer.module.forward, layer.attention, layer.before, layer.between
    mlp = _gated(layer.mlp, kernels) if layer.mlp else layer.module.get_submodule("mlp")
    q_proj, k_proj, v_proj, o_proj = layer.projections
    first = stack is not None and stack.layers[0].parts.attention is attention

    def forward(hidden_states: Tensor, *args: Any, position_embeddings: Any = None, swift_pages: Any = None, **kwargs: Any) -> Any:
        native = swift_pages.native if type(swift_pages) is Pages else None
        if native is None or args or hidden_states.shape[0] != 1 or not _whole(position_embeddings, attention):
            return stock(hidden_states, *args, position_embeddings=position_embeddings, swift_pages=swift_pages, **kwargs)
        cos, sin = position_embeddings
        if first:
            assert stack is not None
            done = stack.forward(hidden_states, cos, sin, native)
            if done is not None:
                native.done = stack
                return done
        elif stack is not None and native.done is stack:
            return hidden_states
        x = kernels.rms_norm(hidden_states, before.weight, before.eps, before.kind)
        # `forward`, not the module's call: there are no hooks on these, and an adapter's tap sits on `forward`
        q, k, v = q_proj.forward(x), k_proj.forward(x), v_proj.forward(x)
        mixed = native.attend_raw(attention, q, k, v, cos, sin, layer.heads)
        hidden_states, x = kernels.add_norm(hidden_states, o_proj.forward(mixed), between)
        return hidden_states + mlp(x)

    return forward


def _gated(linears: list[nn.Module], kernels: Kernels) -> Callable[[Tensor], Tensor]:
    gate_proj, up_proj, down_proj = linears
    return lambda x: down_proj.forward(kernels.silu_mul(gate_proj.forward(x), up_proj.forward(x)))


def _whole(tables: Any, layer: AttentionLayer) -> bool:
    """Whether cos and sin rotate whole heads."""
    return tables is not None and tables[0].shape[0] == 1 and tables[0].shape[-1] == layer.head_dim and tables[0].is_contiguous()
