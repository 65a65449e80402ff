"""Whether training teaches anything, seen from the first step's gradients. Does not know steps or optimizers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from swiftlite.errors import TrainError

Named = Sequence[tuple[str, nn.Parameter]]


def frozen(named: Named) -> str:
    """What is known of parameters that do not learn."""
    names = [name for name, parameter in named if parameter.grad is None]
    if not names:
        return f"those of {_first([name for name, _ in named])} ({len(named)} tensors) are there, and 0"
    return f"no gradient reached {_first(names)} ({len(names)} of {len(named)} tensors)"


def check(named: Named, norm: torch.Tensor, sharded: bool, say: Callable[[str], None]) -> None:
    """After the first backward pass. TrainError when nothing learns, or no adapter does; what learns not is said.

    `norm` is that of all gradients: modules trained whole beside an adapter would hide that it is dead.
    """
    if norm == 0:
        raise TrainError("nothing learns: every gradient of the first step is zero", frozen(named), "check --target_modules and the data")
    missing = [name for name, parameter in named if parameter.grad is None]
    if missing:
        say(f"note: {frozen(named)}; they are not used by the model's forward pass and stay as they are")
    alive: dict[str, bool] = {}  # adapted modules: of a fresh one B alone has a gradient; DoRA's magnitude has one whatever A and B do
    for name, parameter in named:
        module, adapter, kind = name.partition(".lora_")
        if adapter and not kind.startswith("magnitude"):
            alive[module] = alive.get(module, False) or _nonzero(parameter, sharded)
    if alive and not any(alive.values()):
        raise TrainError(
            "the adapter does not learn: in the first step every gradient of its A and B is zero",
            f"so in {_first(list(alive))} ({len(alive)} modules)", "check --lora_alpha and --target_modules",
        )  # fmt: skip
    dead = [module for module, learns in alive.items() if not learns and not any(name.startswith(f"{module}.lora_") for name in missing)]
    if dead:
        say(f"note: in the first step the gradient is zero in {_first(dead)} ({len(dead)} of {len(alive)} adapted modules)")


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


def _nonzero(parameter: nn.Parameter, sharded: bool) -> bool:
    if parameter.grad is None:
        return False
    norm = torch.linalg.vector_norm(parameter.grad)
    if sharded:
        from swiftlite.train.shard import whole

        norm = whole(norm)
    return bool(norm != 0)
