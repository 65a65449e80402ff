"""The experts of a mixture-of-experts block in panels, as one call of the C++ kernels (experts.cpp) for all that a step's tokens chose.

Modules are found by what they hold and take: all experts' gate and up [E, 2 I, D] and down [E, D, I], tokens, the experts chosen for
each and their weights. Each is held against itself on random input before it is packed, with activations around one, where one activation
differs from another, and so large that a clamp would show; what gives other numbers keeps its own forward. Packing gives each expert's
plain weight back before the next is packed, so that memory does not grow.
Only for inference on a CPU, in bfloat16. It does not know how experts are chosen, and no layout but this one (interleaved, transposed or
with biases: those stay as they are).
"""

from __future__ import annotations

import ctypes
import inspect
from collections import Counter

import torch
from torch import Tensor, nn

from swiftlite.engine.panels import PANEL, Panels
from swiftlite.engine.staged import PAD, Room
from swiftlite.kernels.stages import Run
from swiftlite.models.packed import give_back, give_back_files
from swiftlite.pages import zeros

WEIGHTS = ("gate_up_proj", "down_proj")
ARGUMENTS = ["hidden_states", "top_k_index", "top_k_weights"]
TRIED = 3  # experts that are held against themselves


class Experts(ctypes.Structure):
    """struct Experts of experts.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("out", "x", "chosen", "weights", "gate_up", "down", "rows", "act")),
        *((name, ctypes.c_int64) for name in ("tokens", "top", "experts", "width", "inner", "pad")),
        ("weights_are_bf16", ctypes.c_int32),
    )


class PackedExperts:
    """Experts down(silu(gate) * up) in panels. Letters: T tokens, K experts of each, E experts, D width, I inner width."""

    def __init__(self, panels: Panels, gate_up: Tensor, down: Tensor, room: Room, *, keep: bool = False) -> None:
        """gate_up [E, 2 I, D] and down [E, D, I]; their memory is given back unless `keep`."""
        self.room, (experts, width, inner) = room, down.shape
        room.want(rows=width + PAD, act=inner)
        self.gate_up, self.down = _pack(panels, gate_up, keep), _pack(panels, down, keep)
        self.args = Experts(
            gate_up=self.gate_up.data_ptr(), down=self.down.data_ptr(), experts=experts, width=width, inner=inner, pad=PAD
        )  # fmt: skip
        self.run = Run(panels.library, [(panels.library.swift_experts, self.args)])

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, D], the experts [T, K] int64 and their weights [T, K] -> [T, D]. An index that is no expert's adds nothing."""
        x, chosen, weights = hidden_states.to(torch.bfloat16).contiguous(), top_k_index.to(torch.int64).contiguous(), top_k_weights
        if weights.dtype not in (torch.bfloat16, torch.float32):
            weights = weights.float()
        weights, out, args = weights.contiguous(), torch.empty_like(x), self.args
        args.tokens, args.top = chosen.shape
        assert x.shape == (args.tokens, args.width) and weights.shape == chosen.shape
        if not args.tokens:
            return torch.empty_like(hidden_states)
        self.room.grow(args.tokens * args.top)
        args.rows, args.act = self.room.memory["rows"].data_ptr(), self.room.memory["act"].data_ptr()
        args.out, args.x, args.chosen, args.weights = out.data_ptr(), x.data_ptr(), chosen.data_ptr(), weights.data_ptr()
        args.weights_are_bf16 = weights.dtype == torch.bfloat16
        self.run()
        return out.to(hidden_states.dtype)


def _pack(panels: Panels, weights: Tensor, keep: bool) -> Tensor:
    """Each expert's panels [E, elements]."""
    n, k = weights.shape[1:]
    data = zeros(len(weights), panels.size(n, k), dtype=torch.bfloat16)
    for to, weight in zip(data, weights.detach(), strict=True):
        panels.pack(to.data_ptr(), weight.data_ptr(), n, k, torch.get_num_threads())
        if not keep:
            give_back(weight)
    return data


@torch.inference_mode()
def pack_experts(model: nn.Module, library: ctypes.CDLL | None) -> int:
    """Pack the experts of each block that gives the same numbers so; returns how many blocks do."""
    if library is None or not (panels := Panels(library)).size(PANEL, PANEL):
        return 0
    uses = Counter(parameter.data_ptr() for _, parameter in model.named_parameters(remove_duplicate=False))
    room, count = Room(), 0
    for module in model.modules():
        if not _is_candidate(module, uses) or not _is_same(module, panels):
            continue
        if not count:
            give_back_files()  # the checkpoint's, from which transformers has joined the experts
        gate_up, down = (module.get_parameter(name) for name in WEIGHTS)
        packed = PackedExperts(panels, gate_up, down, room)
        del gate_up, down
        for name in WEIGHTS:
            module.register_parameter(name, None)
        module.forward = packed.forward  # type: ignore[method-assign]
        count += 1
    return count


def _is_candidate(module: nn.Module, uses: Counter[int]) -> bool:
    """Whether a module holds and takes what these do, and nobody else holds it."""
    found = dict(module.named_parameters())
    if set(found) != set(WEIGHTS) or list(module.buffers()) or module.training or "forward" in vars(module):
        return False
    gate_up, down = (found[name] for name in WEIGHTS)
    if module._forward_hooks or module._forward_pre_hooks or list(inspect.signature(module.forward).parameters) != ARGUMENTS:
        return False
    if not all(
        one.ndim == 3 and one.dtype == torch.bfloat16 and one.device.type == "cpu" and one.is_contiguous() for one in (gate_up, down)
    ):
        return False
    experts, width, inner = down.shape
    alone = uses[gate_up.data_ptr()] == uses[down.data_ptr()] == 1
    return alone and gate_up.shape == (experts, 2 * inner, width) and experts > 0 and inner % PANEL == width % 2 == 0


def _is_same(module: nn.Module, panels: Panels) -> bool:
    """Whether some of its experts give what they give from panels, but for roundings: here and there of what lies between, too."""
    gate_up, down = (module.get_parameter(name)[:TRIED] for name in WEIGHTS)
    packed = PackedExperts(panels, gate_up, down, Room(), keep=True)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, down.shape[1], generator=generator)
    chosen = torch.tensor([[0, 1], [2, 0], [1, 2], [0, 2], [2, 1], [1, 0]]) % len(down)
    weights = torch.rand(6, 2, generator=generator)
    spread = (x @ gate_up[0, : down.shape[2]].float().T).std()  # of what goes into the activation
    for scale, dtype in ((1.0, torch.bfloat16), (8.0, torch.float32), (100.0, torch.bfloat16)):
        given = (x * scale / spread).bfloat16(), chosen, weights.to(dtype)
        try:
            wanted = module.forward(*given).float()
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError):
            return False
        off = packed.forward(*given).float() - wanted if wanted.shape == x.shape else wanted.new_full((1,), torch.nan)
        if not (off.norm() <= 2**-7 * wanted.norm() and off.abs().max() <= 2**-6 * wanted.abs().max()):
            return False
    return True
