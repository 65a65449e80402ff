"""--torch_compile: a model's decoder layers through torch's compiler, one compilation for all layers and all lengths.

Attention stays outside (its segments are Python, and other numbers in every pass), so a layer is compiled in two parts. The
segments' lengths travel in an object that the compiler does not look into: it would compile anew for every number of
documents. Under gradient checkpointing the layers' children are compiled instead: a layer that is recomputed is not.

Does not know: the loss, the loop. The compiled functions hold no parameters; what is trained and saved is the model's own.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from swiftlite.models import segments


class Unseen:
    """The lengths of a pass's documents, opaque to the compiler."""

    def __init__(self, lengths: tuple[int, ...]) -> None:
        self.lengths = lengths

    def __iter__(self) -> Iterator[int]:
        return iter(self.lengths)


def unavailable(device: torch.device) -> str | None:
    """Why nothing can be compiled here (no C++ compiler, no Triton, ...), found by compiling something small; None: it can."""
    import torch._inductor.config as inductor

    try:
        with warnings.catch_warnings(), inductor.patch(force_disable_caches=True):  # a cached result says nothing about now
            warnings.simplefilter("ignore")
            torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
    except Exception as error:  # each backend has exceptions of its own, and the reason is all that is wanted
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
    return None


def compile_layers(model: PreTrainedModel, checkpointing: bool) -> int:
    """From here on the layers run compiled; the first passes compile. Returns how many modules that are.

    After everything that wraps modules or hooks the model.
    """
    AttentionInterface.register(segments.NAME, torch.compiler.disable(segments.attend))  # type: ignore[no-untyped-call]
    body: nn.Module = model.base_model

    def hide(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, "swift_segments": Unseen(kwargs["swift_segments"])}

    body.register_forward_pre_hook(hide, with_kwargs=True)
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    chosen: list[nn.Module] = [child for layer in layers for child in layer.children()] if checkpointing else [*layers]
    for module in chosen:
        module.compile(dynamic=True)
    return len(chosen)
