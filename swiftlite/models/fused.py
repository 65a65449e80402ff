"""Small steps of the stock modules as one C++ pass each: RMSNorm, rotary embedding, gate.

Nothing is replaced by name alone. A candidate is found by its class, and one of each kind is held against itself on random input, at
several magnitudes; only what gives the same numbers (to one rounding of the dtype) is taken. Modules stay where they are with
their parameters; only `forward` changes, so adapters and checkpoints see the stock model.
On a CPU, float32 and bfloat16; for training too with kernels that have gradients. It does not know about pages or batches.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from swiftlite.kernels.steps import NO_ROTATION, Activation, Kernels, Norm, Rotation

NORM_KINDS = 3  # NormKind in steps.h
MODULE_FIELDS = frozenset(vars(nn.Module()))  # what each module has
GATES = (("gate_proj", "up_proj"), ("gate_up_proj",))  # an MLP's first linears; the second is the gate's and, behind it, up's


@dataclass(frozen=True)
class Gate:
    """An MLP that is down(act(gate(x)) * up(x)): the names of its linears, `first` as in GATES."""

    first: tuple[str, ...]
    activation: Activation

    def halves(self, module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """gate(x) and up(x)"""
        found = [module.get_submodule(name)(x) for name in self.first]
        gate, up = found if len(found) == 2 else found[0].chunk(2, dim=-1)
        return gate, up


@dataclass
class Fused:
    """What was replaced in a model."""

    kernels: Kernels
    norms: dict[nn.Module, Norm] = field(default_factory=dict)
    gates: dict[nn.Module, Gate] = field(default_factory=dict)
    rope: Rope | None = None
    rotation: Rotation = NO_ROTATION  # of the rope


@torch.inference_mode()
def fuse(model: PreTrainedModel, kernels: Kernels, dtype: torch.dtype | None = None) -> Fused:
    """Replace what the kernels do equally, in `dtype` (None: the model's). Steps whose own weights are trained stay as they are."""
    done, dtype = Fused(kernels), dtype or model.dtype
    kinds: dict[Any, Any] = {}  # what was found out about a kind of module: a model has many of each
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            norm = _fuse_norm(module, kernels, kinds)
            if norm is not None:
                done.norms[module] = norm
        elif "down_proj" in dict(module.named_children()):
            gate = _fuse_gate(module, kernels, dtype, kinds)
            if gate is not None:
                done.gates[module] = gate
    done.rope, done.rotation = _fuse_rope(model, kernels, dtype)
    return done


def unfuse(model: nn.Module) -> None:
    """Give the modules of a model, or of its copy, their own forwards back."""
    for module in model.modules():
        if getattr(vars(module).get("forward"), "fused", False):
            del module.forward


def _set_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    forward.fused = True  # type: ignore[attr-defined]
    module.forward = forward  # type: ignore[method-assign]


def _same(ours: Tensor, theirs: Tensor) -> bool:
    """Equal up to one rounding of the dtype, and in bfloat16 almost everywhere exactly."""
    if ours.dtype == torch.float32:
        return torch.allclose(ours, theirs, rtol=2e-6, atol=1e-6 * theirs.abs().max().item())
    close = torch.allclose(ours.float(), theirs.float(), rtol=2**-7, atol=2**-9 * theirs.abs().max().item())
    return close and (ours != theirs).float().mean().item() < 0.02


def _probes(*shape: int, dtype: torch.dtype) -> list[Tensor]:
    """Random inputs from large to so small that an epsilon decides."""
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(*shape, generator=generator) * scale).to(dtype) for scale in (1.0, 30.0, 1e-3)]


def _kind(module: nn.Module) -> tuple[Any, ...]:
    """Modules of one kind do the same with their weights: one class, with equal settings and no buffers of their own."""
    own = [(name, value) for name, value in vars(module).items() if name not in MODULE_FIELDS]
    settings = [(name, value if isinstance(value, (int, float, str)) else id(value)) for name, value in own]
    return type(module), tuple(settings), tuple(id(buffer) for buffer in module.buffers(recurse=False))


def _takes(x: Tensor, dtype: torch.dtype) -> bool:
    return x.dtype == dtype and x.ndim in (3, 4) and x.shape[0] == 1 and x.stride(-1) == 1


def _fuse_norm(module: nn.Module, kernels: Kernels, kinds: dict[Any, Any]) -> Norm | None:
    weights = dict(module.named_parameters())
    scalars = {value for value in vars(module).values() if isinstance(value, float) and 0 < value < 0.1}
    if set(weights) != {"weight"} or weights["weight"].ndim != 1 or len(scalars) != 1:
        return None
    if kernels.differentiable and weights["weight"].requires_grad:  # its gradient is torch's matter
        return None
    weight, eps = weights["weight"].detach(), scalars.pop()
    key = _kind(module), weight.dtype, weight.shape
    if key not in kinds:
        kinds[key] = _norm_kind(module, kernels, weight, eps)
    kind, stock = kinds[key], module.forward
    if kind is None:
        return None

    def forward(x: Tensor) -> Tensor:
        return kernels.rms_norm(x, weight, eps, kind) if _takes(x, weight.dtype) else stock(x)

    _set_forward(module, forward)
    return Norm(weight, eps, kind)


def _norm_kind(module: nn.Module, kernels: Kernels, weight: Tensor, eps: float) -> int | None:
    """NormKind in steps.h of a module, or None: another."""
    probes = _probes(1, 5, 3, weight.shape[0], dtype=weight.dtype)
    try:
        wanted = [module.forward(x) for x in probes]
    except (RuntimeError, TypeError):  # it wants other arguments
        return None
    if any(y.dtype != weight.dtype for y in wanted):
        return None
    for kind in range(NORM_KINDS):
        if all(_same(kernels.rms_norm(x, weight, eps, kind), y) for x, y in zip(probes, wanted, strict=True)):
            return kind
    return None


def _fuse_gate(module: nn.Module, kernels: Kernels, dtype: torch.dtype, kinds: dict[Any, Any]) -> Gate | None:
    children = dict(module.named_children())
    first = next((names for names in GATES if all(name in children for name in names)), None)
    others = [child for name, child in children.items() if first is not None and name not in (*first, "down_proj")]
    if first is None or len(others) != 1 or (kernels.differentiable and len(first) == 1):
        return None
    activation, linears = others[0], [*(children[name] for name in first), children["down_proj"]]
    own = tuple(id(one) for one in (*module.parameters(recurse=False), *activation.parameters()))
    key = _kind(module), _kind(activation), tuple(map(type, linears)), own, tuple(one.dtype for one in module.parameters())
    if key not in kinds:
        kinds[key] = _gate_kind(module, first, activation, kernels, dtype)
    gate: Gate | None = kinds[key]
    if gate is None:
        return None
    stock: Callable[[Tensor], Tensor] = module.forward

    def forward(x: Tensor) -> Tensor:
        if x.dtype != dtype or x.ndim != 3 or x.shape[0] != 1:
            return stock(x)
        return module.get_submodule("down_proj")(kernels.gate(*gate.halves(module, x), gate.activation))

    _set_forward(module, forward)
    return gate


def _gate_kind(module: nn.Module, first: tuple[str, ...], activation: nn.Module, kernels: Kernels, dtype: torch.dtype) -> Gate | None:
    """What a module is if it is down(act(gate(x)) * up(x)) and nothing else."""
    linears: list[Any] = [module.get_submodule(name) for name in first]
    if not all(hasattr(linear, "out_features") for linear in linears):  # linears, or what an adapter made of them
        return None
    one, other = _probes(1, 4, linears[0].out_features // (3 - len(first)), dtype=dtype)[:2]
    known = (Activation.SILU,) if kernels.differentiable else tuple(Activation)
    try:
        wanted = activation(one) * other
    except (RuntimeError, TypeError):  # not an activation
        return None
    kind = next((kind for kind in known if _same(kernels.gate(one, other, kind), wanted)), None)
    if kind is None:
        return None
    found = Gate(first, kind)
    x = torch.cat(_probes(1, 3, linears[0].in_features, dtype=dtype), dim=1)  # in one product: each reads all of the weights
    try:
        gate, up = found.halves(module, x)
        return found if torch.equal(module.forward(x), module.get_submodule("down_proj")(activation(gate) * up)) else None
    except RuntimeError:  # a float32 copy that is trained, beside a bfloat16 model
        return None


class Rope:
    """Stands in for a modeling file's `apply_rotary_pos_emb`; acts only on the tables of models that it was made for."""

    def __init__(self, stock: Callable[..., tuple[Tensor, Tensor]]) -> None:
        self.stock = stock
        # a forward's cosines, recognised by identity, with its model's kernels; for each kind of layer that has its own
        self.running: dict[tuple[Any, ...], tuple[Tensor, Kernels, Rotation]] = {}
        self.watch: Callable[[], None] | None = None  # told of each call

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if self.watch is not None:
            self.watch()
        running = next((one for one in tuple(self.running.values()) if one[0] is cos), None)
        if running is None or args or kwargs or not q.stride(-1) == k.stride(-1) == 1 or q.dtype != k.dtype:
            return self.stock(q, k, cos, sin, *args, **kwargs)
        _, kernels, rotation = running
        whole = q.shape[-1] == k.shape[-1] == rotation.dims
        if (kernels.differentiable and not whole) or not rotation.has(cos, q.dtype):
            return self.stock(q, k, cos, sin)
        return kernels.rope(q, cos, sin, rotation), kernels.rope(k, cos, sin, rotation)


def _fuse_rope(model: PreTrainedModel, kernels: Kernels, dtype: torch.dtype) -> tuple[Rope | None, Rotation]:
    file = sys.modules[type(model).__module__]
    stock = vars(file).get("apply_rotary_pos_emb")
    tables = [module for module in model.modules() if type(module).__name__.endswith("RotaryEmbedding")]
    if stock is None or len(tables) != 1:
        return None, NO_ROTATION
    wrapper, rotary, produce = stock if isinstance(stock, Rope) else Rope(stock), tables[0], tables[0].forward
    rotation = _rotation(wrapper.stock, produce, kernels, dtype, [()])
    if rotation is None:  # some models have tables for each kind of layer
        kinds = vars(rotary).get("layer_types")
        rotation = _rotation(wrapper.stock, produce, kernels, dtype, [(kind,) for kind in kinds]) if kinds else None
    if rotation is None:
        return None, NO_ROTATION

    def forward(x: Tensor, position_ids: Tensor, *kind: Any) -> tuple[Tensor, Tensor]:
        cos, sin = produce(x, position_ids, *kind)
        known = kernels.differentiable or torch.is_inference_mode_enabled()
        if known and x.shape[0] == 1 and cos.is_contiguous() and sin.is_contiguous():
            wrapper.running[kind] = cos, kernels, rotation
        else:
            wrapper.running.pop(kind, None)
        return cos, sin

    _set_forward(rotary, forward)
    file.apply_rotary_pos_emb = wrapper  # type: ignore[attr-defined]
    return wrapper, rotation


def _rotation(
    stock: Callable[..., tuple[Tensor, Tensor]], produce: Callable[..., Any], kernels: Kernels, dtype: torch.dtype, kinds: list[Any]
) -> Rotation | None:
    """What `stock` does with the tables of all `kinds` of layers, where it is one and the same thing and the kernels can do it."""
    positions = torch.tensor([[0, 1, 77, 3, 500]])
    found: set[Rotation | None] = set()
    for kind in kinds:
        try:
            cos, sin = produce(torch.zeros(1, 5, 1, dtype=dtype), positions, *kind)
        except (RuntimeError, TypeError, ValueError, AttributeError):
            return None
        if cos.ndim != 3 or cos.shape[:2] != (1, 5) or cos.shape[-1] % 2:
            return None
        dims, wide = cos.shape[-1], cos.dtype != dtype
        known = [Rotation(dims)] if kernels.differentiable else [Rotation(dims, False, wide), Rotation(dims, True, wide)]
        possible = [one for one in known if one.has(cos, dtype) and _rotates(stock, cos, sin, kernels, one, dtype)]
        found.add(possible[0] if possible else None)
    return found.pop() if len(found) == 1 else None


def _rotates(
    stock: Callable[..., tuple[Tensor, Tensor]], cos: Tensor, sin: Tensor, kernels: Kernels, rotation: Rotation, dtype: torch.dtype
) -> bool:
    """Whether `stock` does this with heads of just so many dimensions, and with larger ones if it takes them."""
    for dims in (rotation.dims, rotation.dims + 16)[: 1 if kernels.differentiable else 2]:
        q, k = (_probes(1, 5, heads, dims, dtype=dtype)[0].transpose(1, 2) for heads in (4, 2))
        try:
            wanted = stock(q, k, cos, sin)
        except (RuntimeError, TypeError, ValueError, AttributeError):
            return dims > rotation.dims
        if not all(_same(kernels.rope(x, cos, sin, rotation), y) for x, y in zip((q, k), wanted, strict=True)):
            return False
    return True
