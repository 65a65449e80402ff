"""LoRA's variants (DoRA, PiSSA, OLoRA, biases, embeddings, quantized bases, ...) through PEFT's own layers on the stock model.

PEFT builds, computes and saves; we choose the modules and train what it marks as trainable, in float32. Slower than `Lora`
(lora.py), which is its counterpart for plain LoRA with the same methods. An initialisation that takes the adapter's start out of
the base (PiSSA, OLoRA) is saved as the difference from that start, which is an adapter of twice the rank for the unchanged
base.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load, save_file
from torch import Tensor, nn

from swiftlite.errors import AdapterError, UsageError
from swiftlite.train.lora import CONFIG, WEIGHTS, LoraSpec, _named, select

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

EMBEDDINGS = "all-embedding"
STARTS = ("true", "false", "gaussian", "pissa", "olora", "orthogonal")  # those that need no data and no quantized twin


@dataclass(frozen=True)
class Variant:
    """What makes an adapter more than plain LoRA."""

    use_dora: bool = False
    bias: str = "none"
    init_weights: str = "true"
    embeddings: bool = False

    @property
    def plain(self) -> bool:
        return self == Variant()

    @property
    def changes_base(self) -> bool:
        return self.init_weights.startswith(("pissa", "olora"))

    def check(self) -> None:
        """UsageError for an unknown start."""
        if self.init_weights not in STARTS and not re.fullmatch(r"pissa_niter_\d+", self.init_weights):
            raise UsageError(f"--init_weights: unknown {self.init_weights!r}", fix=f"use {', '.join(STARTS)} or pissa_niter_16")


class PeftLora:
    """A PEFT adapter on one model, trained."""

    def __init__(self, model: PreTrainedModel, spec: LoraSpec, variant: Variant) -> None:
        """Freezes `model` and adapts it. UsageError when a target names nothing or PEFT refuses the combination."""
        from peft import LoraConfig, get_peft_model
        from transformers.pytorch_utils import Conv1D

        if spec.rank < 1:
            raise UsageError(f"--lora_rank must be at least 1, got {spec.rank}")
        variant.check()
        names = list(_named(model, spec.modules_to_save, (nn.Module,), "--modules_to_save"))
        targets = tuple(target for target in spec.target_modules if target != EMBEDDINGS)
        chosen = list(select(model, targets, tuple(names), (nn.Linear, Conv1D))) if targets else []
        turned = any(isinstance(model.get_submodule(name), Conv1D) for name in chosen)  # weights [in, out]
        if variant.embeddings:
            chosen += [name for name, module in model.named_modules() if module is model.get_input_embeddings()]
        start: Any = {"true": True, "false": False}.get(variant.init_weights, variant.init_weights)
        try:
            config = LoraConfig(
                r=spec.rank, lora_alpha=spec.alpha, lora_dropout=spec.dropout, use_rslora=spec.use_rslora,  # type: ignore[arg-type]
                target_modules=chosen, modules_to_save=names or None, use_dora=variant.use_dora, bias=variant.bias,  # type: ignore[arg-type]
                init_lora_weights=start, fan_in_fan_out=turned, task_type="CAUSAL_LM",
            )  # fmt: skip
            self._take(get_peft_model(model, config))
        except (ValueError, TypeError, NotImplementedError) as error:
            raise UsageError("PEFT cannot build this adapter", str(error).splitlines()[0], "change the LoRA flags") from None
        self.began: dict[str, Tensor] = {}  # A and B, where `save` takes them off again
        if variant.changes_base:
            self.began = {name: p.detach().cpu().clone() for name, p in self.named_parameters() if "lora_" in name}

    @staticmethod
    def read(model: PreTrainedModel, directory: Path) -> PeftLora:
        """On `model`, the adapter of a PEFT directory, to be trained on. AdapterError when it does not fit."""
        from peft import PeftModel

        tuner = PeftLora.__new__(PeftLora)
        try:
            tuner._take(PeftModel.from_pretrained(model, str(directory), is_trainable=True))  # type: ignore[arg-type]
        except (ValueError, RuntimeError, OSError, KeyError) as error:
            raise AdapterError(
                f"cannot go on training {directory}", str(error).splitlines()[0], "check that it belongs to --model"
            ) from None
        tuner.began = {}
        return tuner

    def _take(self, adapted: PeftModel) -> None:
        self.adapted = adapted
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.adapted.named_parameters():
            if parameter.requires_grad:
                yield name, parameter

    def tensors(self) -> dict[str, Tensor]:
        """All that is trained."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def masters(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """All of `tensors`: what `save` writes may be a difference."""
        return {name: tensor.cpu() for name, tensor in weights.items()}

    @torch.no_grad()
    def load_masters(self, masters: dict[str, Tensor]) -> None:
        for name, parameter in self.named_parameters():
            parameter.copy_(masters[name])

    def save(self, directory: Path, base: str, weights: dict[str, Tensor] | None = None) -> None:
        """PEFT's two files. `base` is the base model's path or id."""
        config: Any = self.adapted.peft_config["default"]
        config.base_model_name_or_path = base
        self.adapted.save_pretrained(str(directory))
        (directory / "README.md").unlink(missing_ok=True)
        if self.began:
            _as_difference(directory, {name.replace(".default", ""): tensor for name, tensor in self.began.items()})


def _as_difference(directory: Path, began: dict[str, Tensor]) -> None:
    """The saved adapter as that of the unchanged base: B A - B0 A0 = [B, -B0] [A; A0], of twice the rank and the same scale. What
    else is trained (biases, magnitudes, whole modules) stays as it is; PEFT's own conversion leaves it out."""
    weights = load((directory / WEIGHTS).read_bytes())  # not mapped: the same file is written below
    for key, tensor in weights.items():
        if ".lora_A." in key or key.endswith(".lora_embedding_A"):
            weights[key] = torch.cat((tensor, began[key]), 0)
        elif ".lora_B." in key or key.endswith(".lora_embedding_B"):
            weights[key] = torch.cat((tensor, -began[key]), 1)
    save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    alpha = config["lora_alpha"] * (math.sqrt(2) if config["use_rslora"] else 2)
    config |= {"r": 2 * config["r"], "lora_alpha": alpha, "init_lora_weights": True}
    (directory / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
