"""A whole pre-norm decoder layer in few calls, or in one: norm, projections, head norms + rotation + attention, add + norm, gate, add.

At small batches a step is the reading of the weights plus the overhead of hundreds of small calls. A layer qualifies by its parts (all of
them already replaced by checked kernels), and all layers together are then held against the stock forward on a few tokens spread over
the whole context, with a cache of their own; one difference and every layer gets its own forward back. Where its linears can be stages,
a layer is one call (staged.py); else they stay modules that are called one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from swiftlite.engine.attention_cpu import SequenceSlice
from swiftlite.engine.attention_native import HeadNorms
from swiftlite.engine.bridge import Bridge, ForwardBatch, Pages
from swiftlite.engine.kv import AttentionLayer, KVCache
from swiftlite.engine.staged import Linears, Room, StagedLayer
from swiftlite.models.fused import Fused

PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}


def fuse_layers(bridge: Bridge, fused: Fused) -> int:
    """Give every layer that qualifies the fused forward; returns how many have it (0 when the check fails)."""
    if not fused.ropes:
        return 0
    before, room = _trial(bridge), Room()
    replaced: list[tuple[nn.Module, Any]] = []
    for module in list(bridge.model.modules()):
        if {name for name, _ in module.named_children()} == PARTS:
            forward = _layer_forward(module, bridge, fused, room)
            if forward is not None:
                replaced.append((module, vars(module).get("forward")))
                module.forward = forward  # type: ignore[method-assign]
    if not replaced:
        return 0
    try:
        after = _trial(bridge)
    except (RuntimeError, TypeError, ValueError, AttributeError, AssertionError):
        after = None
    tolerance = (1e-4 if before.dtype == torch.float32 else 0.02) * before.abs().max().item()
    if after is not None and after.shape == before.shape and (after - before).abs().max().item() <= tolerance:
        return len(replaced)
    for module, own in replaced:
        if own is None:
            del module.forward
        else:
            module.forward = own  # type: ignore[method-assign]
    return 0


def _trial(bridge: Bridge) -> Tensor:
    """Logits of 7 tokens, the last at the context's last position (some models scale queries by position), in their own small cache."""
    cache = KVCache(bridge.layers, 1, 8, bridge.model.dtype, bridge.device)
    ids = torch.tensor([3, 7, 5, 6, 3, 4, 5])
    slots = torch.arange(7)
    positions = slots * (bridge.max_model_len - 1) // 6
    return bridge.forward(ForwardBatch(ids, positions, slots, [SequenceSlice(0, 7, 0, [0])], slots), cache).float()


def _layer_forward(module: nn.Module, bridge: Bridge, fused: Fused, room: Room) -> Callable[..., Any] | None:
    """The fused forward of a decoder layer, or None when its parts are not what it needs."""
    attention, mlp = module.get_submodule("self_attn"), module.get_submodule("mlp")
    first, second = (
        fused.norms.get(module.get_submodule("input_layernorm")),
        fused.norms.get(module.get_submodule("post_attention_layernorm")),
    )
    layer, extra = bridge.layer_of.get(attention), {name for name, _ in attention.named_children()} - PROJECTIONS
    if first is None or second is None or layer is None or mlp not in fused.gates or extra not in (set(), {"q_norm", "k_norm"}):
        return None
    if not all(isinstance(attention.get_submodule(name), nn.Linear) for name in PROJECTIONS):
        return None
    heads: HeadNorms | None = None
    if extra:
        q, k = fused.norms.get(attention.get_submodule("q_norm")), fused.norms.get(attention.get_submodule("k_norm"))
        if q is None or k is None or (q.eps, q.kind) != (k.eps, k.kind) or not len(q.weight) == len(k.weight) == layer.head_dim:
            return None
        heads = HeadNorms(q.weight, k.weight, q.eps, q.kind)
    stock = module.forward
    q_proj, k_proj, v_proj, o_proj = (attention.get_submodule(name) for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
    gate_proj, up_proj, down_proj = (mlp.get_submodule(name) for name in ("gate_proj", "up_proj", "down_proj"))
    kernels, staged = fused.kernels, None
    linears = Linears.of((q_proj, k_proj, v_proj, o_proj), (gate_proj, up_proj, down_proj))
    if linears is not None and bridge.library is not None:
        staged = StagedLayer(bridge.library, layer, (first, second), heads, linears, room)

    def forward(hidden_states: Tensor, *args: Any, position_embeddings: Any = None, swift_pages: Any = None, **kwargs: Any) -> Any:
        native = swift_pages.native if type(swift_pages) is Pages else None
        if native is None or args or hidden_states.shape[0] != 1 or not _whole(position_embeddings, layer):
            return stock(hidden_states, *args, position_embeddings=position_embeddings, swift_pages=swift_pages, **kwargs)
        cos, sin = position_embeddings
        if staged is not None and (out := staged.forward(hidden_states, cos, sin, native)) is not None:
            return out
        x = kernels.rms_norm(hidden_states, first.weight, first.eps, first.kind)
        # `forward`, not the module's call: there are no hooks on these, and an adapter's tap sits on `forward`
        q, k, v = q_proj.forward(x), k_proj.forward(x), v_proj.forward(x)
        mixed = native.attend_raw(layer, q, k, v, cos, sin, heads)
        hidden_states, x = kernels.add_norm(hidden_states, o_proj.forward(mixed), second)
        return hidden_states + down_proj.forward(kernels.silu_mul(gate_proj.forward(x), up_proj.forward(x)))

    return forward


def _whole(tables: Any, layer: AttentionLayer) -> bool:
    """Whether cos and sin rotate whole heads."""
    return tables is not None and tables[0].shape[0] == 1 and tables[0].shape[-1] == layer.head_dim and tables[0].is_contiguous()
