"""Small steps of the stock modules as one C++ pass each: RMSNorm, rotary embedding, SiLU gate.

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

from swiftlite.kernels.steps import Kernels, Norm

NORM_KINDS = 3  # NormKind in steps.h
MODULE_FIELDS = frozenset(vars(nn.Module()))  # what each module has
GATE_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}


@dataclass
class Fused:
    """What was replaced in a model."""

    kernels: Kernels
    norms: dict[nn.Module, Norm] = field(default_factory=dict)
    gates: set[nn.Module] = field(default_factory=set)
    ropes: int = 0


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
        elif {name for name, _ in module.named_children()} == GATE_PARTS and _fuse_gate(module, kernels, dtype, kinds):
            done.gates.add(module)
    done.ropes = _fuse_rope(model, kernels, dtype)
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


def _fuse_gate(module: Any, kernels: Kernels, dtype: torch.dtype, kinds: dict[Any, Any]) -> bool:
    activation = module.get_submodule("act_fn")
    linears = tuple(type(module.get_submodule(name)) for name in ("gate_proj", "up_proj", "down_proj"))
    own = tuple(id(one) for one in (*module.parameters(recurse=False), *activation.parameters()))
    key = _kind(module), _kind(activation), linears, own, tuple(one.dtype for one in module.parameters())
    if key not in kinds:
        kinds[key] = _is_gate(module, kernels, dtype)
    if not kinds[key]:
        return False
    stock: Callable[[Tensor], Tensor] = module.forward

    def forward(x: Tensor) -> Tensor:
        if x.dtype != dtype or x.ndim != 3 or x.shape[0] != 1:
            return stock(x)
        return module.down_proj(kernels.silu_mul(module.gate_proj(x), module.up_proj(x)))

    _set_forward(module, forward)
    return True


def _is_gate(module: Any, kernels: Kernels, dtype: torch.dtype) -> bool:
    """Whether a module is down(silu(gate(x)) * up(x)) and nothing else."""
    gate, up, down = (module.get_submodule(name) for name in ("gate_proj", "up_proj", "down_proj"))
    if not (hasattr(gate, "out_features") and hasattr(up, "out_features")):  # linears, or what an adapter made of them
        return False
    activation = module.get_submodule("act_fn")
    first, second = _probes(1, 4, gate.out_features, dtype=dtype)[:2]
    if not _same(kernels.silu_mul(first, second), activation(first) * second):
        return False
    x = torch.cat(_probes(1, 3, gate.in_features, dtype=dtype), dim=1)  # in one product: each reads all of the weights
    try:
        return torch.equal(module.forward(x), down(activation(gate(x)) * up(x)))
    except RuntimeError:  # a float32 copy that is trained, beside a bfloat16 model
        return False


class _Rope:
    """Stands in for a modeling file's `apply_rotary_pos_emb`; acts only on the tables of the model that it was made for."""

    def __init__(self, stock: Callable[..., tuple[Tensor, Tensor]]) -> None:
        self.stock = stock
        self.running: tuple[Tensor, Kernels] | None = None  # a forward's cosines, recognised by identity, and its model's kernels

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        whole = q.shape[-1] == k.shape[-1] == cos.shape[-1] and q.stride(-1) == k.stride(-1) == 1 and q.dtype == k.dtype == cos.dtype
        running = self.running
        if running is None or cos is not running[0] or not whole or args or kwargs:
            return self.stock(q, k, cos, sin, *args, **kwargs)
        return running[1].rope(q, cos, sin), running[1].rope(k, cos, sin)


def _fuse_rope(model: PreTrainedModel, kernels: Kernels, dtype: torch.dtype) -> int:
    file = sys.modules[type(model).__module__]
    stock = vars(file).get("apply_rotary_pos_emb")
    tables = [module for module in model.modules() if type(module).__name__.endswith("RotaryEmbedding")]
    if stock is None or len(tables) != 1:
        return 0
    wrapper = stock if isinstance(stock, _Rope) else _Rope(stock)
    positions = torch.tensor([[0, 1, 77, 3, 500]])
    rotary, produce = tables[0], tables[0].forward
    try:
        cos, sin = produce(torch.zeros(1, 5, 1, dtype=dtype), positions)
        dim = cos.shape[-1]
        q, k = (_probes(1, 5, heads, dim, dtype=dtype)[0].transpose(1, 2) for heads in (4, 2))
        wanted = wrapper.stock(q, k, cos, sin)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return 0
    if cos.shape != (1, 5, dim) or cos.dtype != dtype or dim % 2:
        return 0
    if not all(_same(kernels.rope(x, cos, sin), y) for x, y in zip((q, k), wanted, strict=True)):
        return 0

    def forward(x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = produce(x, position_ids)
        known = kernels.differentiable or torch.is_inference_mode_enabled()
        usable = known and x.shape[0] == 1 and cos.is_contiguous() and sin.is_contiguous()
        wrapper.running = (cos, kernels) if usable else None
        return cos, sin

    _set_forward(rotary, forward)
    file.apply_rotary_pos_emb = wrapper  # type: ignore[attr-defined]
    return 1
