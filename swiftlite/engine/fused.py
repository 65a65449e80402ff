"""Small steps of the stock modules as one C++ pass each: RMSNorm, rotary embedding, SiLU gate.

Nothing is replaced by name alone. A candidate is found by its class and then held against the module itself on random input, at
several magnitudes; only what gives the same numbers (to one rounding of the dtype) is taken. Modules stay where they are with
their parameters; only `forward` changes, so adapters and checkpoints see the stock model.
Only for inference on a CPU, float32 and bfloat16. It does not know about pages or batches.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

NORM_KINDS = 3  # see fused.cpp
GATE_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}


@dataclass(frozen=True)
class Kernels:
    """The library's functions with their signatures."""

    library: ctypes.CDLL

    def __post_init__(self) -> None:
        flag, pointer, long, integer, real = ctypes.c_int, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
        lib = self.library
        lib.swift_rms_norm.argtypes = [flag, *[pointer] * 3, *[long] * 4, integer, real, integer, integer]
        lib.swift_add_norm.argtypes = [flag, *[pointer] * 5, long, integer, real, integer, integer]
        lib.swift_silu_mul.argtypes = [flag, *[pointer] * 3, *[long] * 3, integer, integer]
        lib.swift_best_of_rows.argtypes = [flag, *[pointer] * 3, *[long] * 3, integer]
        lib.swift_rope.argtypes = [flag, *[pointer] * 4, long, integer, integer, long, long, integer]

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, kind: int) -> Tensor:
        """x [1, T, D] or [1, T, H, D] with contiguous last dimension -> the same shape, contiguous."""
        out = torch.empty(x.shape, dtype=x.dtype)
        dim = x.shape[-1]
        if x.ndim == 4:
            rows, inner, outer_stride, inner_stride = x.shape[0] * x.shape[1] * x.shape[2], x.shape[2], x.stride(1), x.stride(2)
        else:
            rows, inner, outer_stride, inner_stride = x.numel() // dim, 1, x.stride(-2), 0
        self.library.swift_rms_norm(
            x.dtype == torch.bfloat16, out.data_ptr(), x.data_ptr(), weight.data_ptr(), rows, inner, outer_stride, inner_stride,
            dim, eps, kind, torch.get_num_threads(),
        )  # fmt: skip
        return out

    def add_norm(self, a: Tensor, b: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        """(a + b, its norm) for contiguous [1, T, D]."""
        a, b = a.contiguous(), b.contiguous()
        total, out = torch.empty_like(a), torch.empty_like(a)
        self.library.swift_add_norm(
            a.dtype == torch.bfloat16, out.data_ptr(), total.data_ptr(), a.data_ptr(), b.data_ptr(), norm.weight.data_ptr(),
            a.shape[1], a.shape[2], norm.eps, norm.kind, torch.get_num_threads(),
        )  # fmt: skip
        return total, out

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up for [1, T, D]; rows may be strided."""
        out = torch.empty(gate.shape, dtype=gate.dtype)
        self.library.swift_silu_mul(
            gate.dtype == torch.bfloat16, out.data_ptr(), gate.data_ptr(), up.data_ptr(), gate.shape[-2], gate.stride(-2), up.stride(-2),
            gate.shape[-1], torch.get_num_threads(),
        )  # fmt: skip
        return out

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [1, H, T, D] rotated by cos and sin [1, T, D] -> the same shape, in memory [1, T, H, D]."""
        _, heads, tokens, dim = x.shape
        out = torch.empty(1, tokens, heads, dim, dtype=x.dtype)
        self.library.swift_rope(
            x.dtype == torch.bfloat16, out.data_ptr(), x.data_ptr(), cos.data_ptr(), sin.data_ptr(), tokens, heads, dim,
            x.stride(2), x.stride(1), torch.get_num_threads(),
        )  # fmt: skip
        return out.transpose(1, 2)

    def best_of_rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [S, V], float32 or bfloat16 -> the largest of each row [S] float32 (NaN where a row has one), its first place [S] int64.

        torch's max over bfloat16 takes five times as long.
        """
        if x.stride(1) != 1:
            x = x.contiguous()
        best, place = torch.empty(x.shape[0]), torch.empty(x.shape[0], dtype=torch.int64)
        self.library.swift_best_of_rows(
            x.dtype == torch.bfloat16, best.data_ptr(), place.data_ptr(), x.data_ptr(), x.shape[0], x.stride(0), x.shape[1],
            torch.get_num_threads(),
        )  # fmt: skip
        return best, place


@dataclass(frozen=True)
class Norm:
    """An RMSNorm that the kernels do: x / rms(x) * weight, rounded as `kind` says (see steps.h)."""

    weight: Tensor  # [D]
    eps: float
    kind: int


@dataclass
class Fused:
    """What was replaced in a model."""

    kernels: Kernels
    norms: dict[nn.Module, Norm] = field(default_factory=dict)
    gates: set[nn.Module] = field(default_factory=set)
    ropes: int = 0


@torch.inference_mode()
def fuse(model: PreTrainedModel, library: ctypes.CDLL) -> Fused:
    """Replace what the kernels do equally."""
    kernels = Kernels(library)
    done = Fused(kernels)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            norm = _fuse_norm(module, kernels)
            if norm is not None:
                done.norms[module] = norm
        elif {name for name, _ in module.named_children()} == GATE_PARTS and _fuse_gate(module, kernels, model.dtype):
            done.gates.add(module)
    done.ropes = _fuse_rope(model, kernels)
    return done


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


def _takes(x: Tensor, dtype: torch.dtype) -> bool:
    return x.dtype == dtype and x.ndim in (3, 4) and x.shape[0] == 1 and x.stride(-1) == 1


def _fuse_norm(module: nn.Module, kernels: Kernels) -> Norm | None:
    weights = dict(module.named_parameters())
    scalars = {value for value in vars(module).values() if isinstance(value, float) and 0 < value < 0.1}
    if set(weights) != {"weight"} or weights["weight"].ndim != 1 or len(scalars) != 1:
        return None
    weight, eps = weights["weight"].detach(), scalars.pop()
    stock: Callable[[Tensor], Tensor] = module.forward
    probes = _probes(1, 5, 3, weight.shape[0], dtype=weight.dtype)
    try:
        wanted = [stock(x) for x in probes]
    except (RuntimeError, TypeError):  # it wants other arguments
        return None
    for kind in range(NORM_KINDS):
        if all(_same(kernels.rms_norm(x, weight, eps, kind), y) for x, y in zip(probes, wanted, strict=True) if y.dtype == x.dtype):

            def forward(x: Tensor, kind: int = kind) -> Tensor:
                return kernels.rms_norm(x, weight, eps, kind) if _takes(x, weight.dtype) else stock(x)

            module.forward = forward  # type: ignore[method-assign]
            return Norm(weight, eps, kind)
    return None


def _fuse_gate(module: Any, kernels: Kernels, dtype: torch.dtype) -> bool:
    gate, up, down = (module.get_submodule(name) for name in ("gate_proj", "up_proj", "down_proj"))
    if not (isinstance(gate, nn.Linear) and isinstance(up, nn.Linear)):
        return False
    activation = module.get_submodule("act_fn")
    first, second = _probes(1, 4, gate.out_features, dtype=dtype)[:2]
    if not _same(kernels.silu_mul(first, second), activation(first) * second):
        return False
    stock: Callable[[Tensor], Tensor] = module.forward
    x = torch.cat(_probes(1, 3, gate.in_features, dtype=dtype), dim=1)  # in one product: each reads all of the weights
    if not torch.equal(stock(x), down(activation(gate(x)) * up(x))):  # the module does nothing else
        return False

    def forward(x: Tensor) -> Tensor:
        if x.dtype != dtype or x.ndim != 3 or x.shape[0] != 1:
            return stock(x)
        return module.down_proj(kernels.silu_mul(module.gate_proj(x), module.up_proj(x)))

    module.forward = forward  # type: ignore[method-assign]
    return True


class _Rope:
    """Stands in for a modeling file's `apply_rotary_pos_emb`; acts only on the tables of the model that it was made for."""

    def __init__(self, stock: Callable[..., tuple[Tensor, Tensor]]) -> None:
        self.stock = stock
        self.kernels: Kernels | None = None
        self.table: Tensor | None = None  # the cosines of the running forward, recognised by identity

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        whole = q.shape[-1] == k.shape[-1] == cos.shape[-1] and q.stride(-1) == k.stride(-1) == 1 and q.dtype == k.dtype == cos.dtype
        if cos is not self.table or not whole or args or kwargs or self.kernels is None:
            return self.stock(q, k, cos, sin, *args, **kwargs)
        return self.kernels.rope(q, cos, sin), self.kernels.rope(k, cos, sin)


def _fuse_rope(model: PreTrainedModel, kernels: Kernels) -> int:
    file = sys.modules[type(model).__module__]
    stock = vars(file).get("apply_rotary_pos_emb")
    tables = [module for module in model.modules() if type(module).__name__.endswith("RotaryEmbedding")]
    if stock is None or len(tables) != 1:
        return 0
    wrapper = stock if isinstance(stock, _Rope) else _Rope(stock)
    dtype = model.dtype
    positions = torch.tensor([[0, 1, 77, 3, 500]])
    rotary, produce = tables[0], tables[0].forward
    try:
        cos, sin = produce(torch.zeros(1, 5, 1, dtype=dtype), positions)
        dim = cos.shape[-1]
        q, k = (_probes(1, 5, heads, dim, dtype=dtype)[0].transpose(1, 2) for heads in (4, 2))
        wanted = wrapper.stock(q, k, cos, sin)
    except (RuntimeError, TypeError, ValueError):
        return 0
    if cos.shape != (1, 5, dim) or cos.dtype != dtype or dim % 2:
        return 0
    if not all(_same(kernels.rope(x, cos, sin), y) for x, y in zip((q, k), wanted, strict=True)):
        return 0
    wrapper.kernels = kernels

    def forward(x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = produce(x, position_ids)
        usable = x.shape[0] == 1 and torch.is_inference_mode_enabled() and cos.is_contiguous() and sin.is_contiguous()
        wrapper.table = cos if usable else None
        return cos, sin

    rotary.forward = forward  # type: ignore[method-assign]
    file.apply_rotary_pos_emb = wrapper  # type: ignore[attr-defined]
    return 1
