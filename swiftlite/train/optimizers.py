"""--optim: parameters in groups, and the optimizer over them.

Matrices decay, vectors do not; LoRA+ (arXiv 2402.12354) gives B a higher rate. A group's `ratio` is what the loop multiplies
the schedule's rate by. Does not know schedules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from swiftlite.errors import UsageError

NAMES = ("adamw", "adafactor", "sgd", "muon", "adamw_8bit")


@dataclass(frozen=True)
class OptimizerSettings:
    """Which optimizer, and its numbers."""

    name: str = "adamw"
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    lora_plus: float = 1.0  # rate of B over that of A


def build(named: Sequence[tuple[str, nn.Parameter]], rate: float, settings: OptimizerSettings, model: nn.Module) -> torch.optim.Optimizer:
    """`named`: the trained parameters of `model`. UsageError when its package is missing."""
    if settings.name == "muon":
        tables = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
        inner = [(name, p) for name, p in named if _in_muon(name, p) and id(p) not in tables]
        outer = [(name, p) for name, p in named if not _in_muon(name, p) or id(p) in tables]
        return Muon(_groups(inner, settings), _groups(outer, settings), rate, settings)
    groups = _groups(named, settings)
    if settings.name == "sgd":
        return torch.optim.SGD(groups, lr=rate)
    if settings.name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(groups, lr=rate, scale_parameter=False, relative_step=False)  # the rate is the schedule's
    if settings.name == "adamw_8bit":
        check_8bit()
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, lr=rate, betas=settings.betas, eps=settings.epsilon)
    return torch.optim.AdamW(groups, lr=rate, betas=settings.betas, eps=settings.epsilon, fused=True)


def check_8bit() -> None:
    """UsageError unless bitsandbytes is there."""
    from importlib.util import find_spec

    if find_spec("bitsandbytes") is None:
        raise UsageError("8-bit optimizers and 4-bit models need bitsandbytes", "it is not installed", "pip install bitsandbytes")


def _groups(named: Sequence[tuple[str, nn.Parameter]], settings: OptimizerSettings) -> list[dict[str, Any]]:
    found: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        found.setdefault((parameter.ndim >= 2, settings.lora_plus if "lora_B" in name or "embedding_B" in name else 1.0), []).append(
            parameter
        )
    return [
        {"params": parameters, "weight_decay": settings.weight_decay if matrix else 0.0, "ratio": ratio}
        for (matrix, ratio), parameters in sorted(found.items(), key=lambda item: (not item[0][0], item[0][1]))
    ]


def _in_muon(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim == 2 and "embed" not in name and "lm_head" not in name


class Muon(torch.optim.Optimizer):
    """torch's Muon for the matrices inside, AdamW for embeddings, heads and vectors. Updates have AdamW's size."""

    def __init__(self, inner: list[dict[str, Any]], outer: list[dict[str, Any]], rate: float, settings: OptimizerSettings) -> None:
        self.parts: list[torch.optim.Optimizer] = []
        if inner:
            self.parts.append(torch.optim.Muon(inner, lr=rate, adjust_lr_fn="match_rms_adamw"))
        if outer:
            self.parts.append(torch.optim.AdamW(outer, lr=rate, betas=settings.betas, eps=settings.epsilon, fused=True))
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # closures are of no use here
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)
        self.param_groups = [group for part in self.parts for group in part.param_groups]
