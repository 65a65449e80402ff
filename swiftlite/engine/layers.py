"""Whole decoder layers in few calls, or in one: norm, projections, head norms + rotation + attention, add + norm, gate, add + norm.

At small batches a step is the reading of the weights plus the overhead of hundreds of small calls. A layer qualifies by its parts (all of
them already replaced by checked kernels), and all layers together are then held against the stock forward on a few tokens spread over
the whole context, with a cache of their own; one difference and every layer gets its own forward back. Layers that can be stages run
together with their neighbours as one call (staged.py); else their linears stay modules that are called one by one. What stands in an
MLP's place and is another kind, as experts are, is called as it is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from swiftlite.engine.attention_cpu import SequenceSlice
from swiftlite.engine.attention_native import HeadSteps, NativeBatch
from swiftlite.engine.bridge import Bridge, ForwardBatch, Pages
from swiftlite.engine.kv import KVCache
from swiftlite.engine.staged import Linears, Parts, Room, Stack, Steps
from swiftlite.kernels.steps import NO_ROTATION, Activation, Norm, Rotation
from swiftlite.models.fused import Fused, Gate, Rope

# The norms that a layer has -> which of them come before attention, after it, before the MLP and after it
NORMS: dict[frozenset[str], tuple[str | None, str | None, str | None, str | None]] = {
    frozenset(name for name in roles if name is not None): roles
    for roles in (
        ("input_layernorm", None, "post_attention_layernorm", None),  # most families
        ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),  # Gemma 2, 3
        ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),  # GLM-4
        (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),  # OLMo 2, EXAONE 4
    )
}
QKV = (("q_proj", "k_proj", "v_proj"), ("qkv_proj",))  # attention's first linears
HEAD_NORMS = {"q_norm", "k_norm"}
_WATCHING = threading.Lock()  # a modeling file has one rotary function for all of its models


@dataclass(frozen=True)
class _Layer:
    """A decoder layer that qualifies, with what its steps need."""

    module: nn.Module
    steps: Steps
    qkv: list[nn.Module]  # q, k, v, or one for all
    o: nn.Module
    mlp: nn.Module
    gate: Gate | None  # what the MLP is; None: another kind
    tables: int  # which layers get the same cosines and sines

    @property
    def parts(self) -> Parts | None:
        """What its stages need, where it can be stages."""
        if self.gate is None:
            return None
        gate_up = [self.mlp.get_submodule(name) for name in self.gate.first]
        linears = Linears.of(self.qkv, self.o, gate_up, self.mlp.get_submodule("down_proj"))
        return None if linears is None else Parts(self.steps, linears)


@dataclass
class _Rotations:
    """What a forward did with its rotary embeddings."""

    tables: dict[nn.Module, Tensor] = field(default_factory=dict)  # cosines that a decoder layer got
    rotated: set[nn.Module] = field(default_factory=set)  # decoder layers that rotated


def fuse_layers(bridge: Bridge, fused: Fused) -> int:
    """Give every layer that qualifies the fused forward; returns how many have it (0 when the check fails)."""
    # OLMoE's limit of q, k and v: a few tokens may all be within it
    if fused.rope is None or bridge.model.config.get_text_config().to_dict().get("clip_qkv") is not None:
        return 0
    with _WATCHING, _watched(bridge, fused.rope) as seen:
        before = _trial(bridge)
    layers = [layer for layer in (_qualify(module, bridge, fused, seen) for module in seen.tables) if layer is not None]
    if not layers:
        return 0
    owned = [vars(layer.module).get("forward") for layer in layers]
    for layer, stack in zip(layers, _stacks(layers, bridge), strict=True):
        layer.module.forward = _forward(layer, stack, fused)  # type: ignore[method-assign]
    try:
        after = _trial(bridge)
    except (RuntimeError, TypeError, ValueError, AttributeError, AssertionError, IndexError, KeyError):
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


@contextmanager
def _watched(bridge: Bridge, rope: Rope) -> Iterator[_Rotations]:
    """What forwards within do with their rotary embeddings: some models have tables for each kind of layer, or layers without."""
    seen = _Rotations()
    current: list[nn.Module] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tables = kwargs.get("position_embeddings")
        if isinstance(tables, tuple) and len(tables) == 2:
            seen.tables[module] = tables[0]
        current[:] = [module]

    layers = [module for module in bridge.model.modules() if any(child in bridge.layer_of for child in module.children())]
    hooks = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in layers]
    rope.watch = lambda: seen.rotated.update(current)
    try:
        yield seen
    finally:
        rope.watch = None
        for hook in hooks:
            hook.remove()


def _trial(bridge: Bridge) -> Tensor:
    """Logits of 7 tokens, the last at the context's last position (some models scale queries by position), in their own small cache."""
    cache = KVCache(bridge.layers, 1, 8, bridge.model.dtype, bridge.device)
    ids = torch.tensor([3, 7, 5, 6, 3, 4, 5])
    slots = torch.arange(7)
    positions = slots * (bridge.max_model_len - 1) // 6
    return bridge.forward(ForwardBatch(ids, positions, slots, [SequenceSlice(0, 7, 0, [0])], slots), cache).float()


def _qualify(module: nn.Module, bridge: Bridge, fused: Fused, seen: _Rotations) -> _Layer | None:
    """A decoder layer whose parts are what the fused steps need."""
    children = {name: child for name, child in module.named_children() if not isinstance(child, nn.Dropout)}
    attention, mlp = children.pop("self_attn", None), children.pop("mlp", None)
    roles = NORMS.get(frozenset(children))
    if attention is None or mlp is None or roles is None or attention not in bridge.layer_of:
        return None
    norms = [None if name is None else fused.norms.get(children[name]) for name in roles]
    if any(name is not None and norm is None for name, norm in zip(roles, norms, strict=True)):
        return None
    layer, gate, inner = bridge.layer_of[attention], fused.gates.get(mlp), dict(attention.named_children())
    names = next((names for names in QKV if all(name in inner for name in names)), None)
    if names is None or set(inner) - {*names, "o_proj"} not in (set(), HEAD_NORMS):
        return None
    linears = [one for one in (inner[name] for name in (*names, "o_proj")) if isinstance(one, nn.Linear)]
    width = layer.heads * layer.head_dim + layer.kv_heads * (layer.head_dim + layer.value_dim)
    if len(linears) <= len(names) or sum(linear.out_features for linear in linears[:-1]) != width:
        return None
    heads: tuple[Norm, Norm] | None = None
    whole: tuple[Norm, Norm] | None = None
    if inner.keys() >= HEAD_NORMS:
        q, k = fused.norms.get(inner["q_norm"]), fused.norms.get(inner["k_norm"])
        if q is None or k is None or (q.eps, q.kind) != (k.eps, k.kind):
            return None
        if len(q.weight) == len(k.weight) == layer.head_dim:
            heads = q, k
        elif (len(q.weight), len(k.weight)) == (layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim):
            whole = q, k
        else:
            return None
    rotation = fused.rotation if module in seen.rotated else NO_ROTATION
    factor = vars(module).get("residual_multiplier", 1.0)  # of granite, granitemoe and their like; no other family has one
    before, of_attention, between, of_mlp = norms
    activation = Activation.SILU if gate is None else gate.activation
    steps = Steps(layer, HeadSteps(heads, rotation), whole, before, of_attention, between, of_mlp, factor, activation)
    return _Layer(module, steps, list(linears[:-1]), linears[-1], mlp, gate, id(seen.tables[module]))


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
        last = runs[-1][-1][0] if runs else None
        if last is not None and last == place - 1 and _follows(layers[last], layer):
            runs[-1].append((place, parts))
        else:
            runs.append([(place, parts)])
    room = Room()
    for run in runs:
        stack = Stack(bridge.library, [parts for _, parts in run], room)
        for place, _ in run:
            found[place] = stack
    return found


def _follows(first: _Layer, second: _Layer) -> bool:
    """Whether one is called right after the other, with the same tables."""
    return first.steps.attention.index == second.steps.attention.index - 1 and first.tables == second.tables


def _forward(layer: _Layer, stack: Stack | None, fused: Fused) -> Callable[..., Any]:
    """In place of a layer's own: the first of a stack does all of them, and the others hand on what they get."""
    stock, steps, kernels, rotation = layer.module.forward, layer.steps, fused.kernels, fused.rotation
    attention, before = steps.attention, steps.before
    key, value = attention.kv_heads * attention.head_dim, attention.kv_heads * attention.value_dim
    first = stack is not None and stack.layers[0].parts.steps.attention is attention

    def forward(hidden_states: Tensor, *args: Any, position_embeddings: Any = None, swift_pages: Any = None, **kwargs: Any) -> Any:
        native = swift_pages.native if type(swift_pages) is Pages else None
        if native is None or args or hidden_states.shape[0] != 1 or not _fit(position_embeddings, rotation, hidden_states.dtype, native):
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
        x = hidden_states if before is None else kernels.rms_norm(hidden_states, before.weight, before.eps, before.kind)
        # `forward`, not the module's call: there are no hooks on these, and an adapter's tap sits on `forward`
        parts = [linear.forward(x) for linear in layer.qkv]
        q, k, v = parts if len(parts) > 1 else parts[0].split((attention.heads * attention.head_dim, key, value), dim=-1)
        if steps.whole is not None:
            q, k = (kernels.rms_norm(y, norm.weight, norm.eps, norm.kind) for y, norm in zip((q, k), steps.whole, strict=True))
        mixed = native.attend_raw(attention, q, k, v, cos, sin, steps.heads)
        hidden_states, x = kernels.add_norm(hidden_states, layer.o.forward(mixed), steps.of_attention, steps.between, steps.factor)
        return kernels.add_norm(hidden_states, layer.mlp(x), steps.of_mlp, None, steps.factor)[0]

    return forward


def _fit(tables: Any, rotation: Rotation, dtype: torch.dtype, native: NativeBatch) -> bool:
    """Whether cos and sin are those of the rotation, and rows of the dtype that everything here is in."""
    return (
        dtype == native.cache.dtype
        and tables is not None
        and tables[0].shape[0] == 1
        and rotation.has(tables[0], dtype)
        and tables[0].is_contiguous()
    )
