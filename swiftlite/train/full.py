"""Training of all weights: float32 masters, saved in the Hugging Face layout in the run's dtype.

Does not know adapters. `Lora` (lora.py) is its counterpart with the same three methods.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from swiftlite.errors import UsageError
from swiftlite.models.loading import quiet


@dataclass(frozen=True)
class Freezing:
    """Which parameters stay as they are: the first `ratio` of all numbers in the model's order, names that `frozen` finds; but
    not names that `trained` finds (regular expressions, searched in the name)."""

    ratio: float = 0.0
    frozen: str | None = None
    trained: str | None = None

    def apply(self, model: nn.Module) -> None:
        """UsageError when an expression finds nothing or nothing is left to train."""
        if not 0 <= self.ratio <= 1:
            raise UsageError(f"--freeze_parameters_ratio must lie between 0 and 1, got {self.ratio}")
        named = dict(model.named_parameters())
        limit, count = self.ratio * sum(p.numel() for p in named.values()), 0
        for parameter in named.values():
            count += parameter.numel()
            parameter.requires_grad_(count > limit)
        for flag, pattern, learns in (("freeze_parameters_regex", self.frozen, False), ("trainable_parameters_regex", self.trained, True)):
            if pattern is None:
                continue
            try:
                found = [parameter for name, parameter in named.items() if re.search(pattern, name)]
            except re.error as error:
                raise UsageError(f"--{flag} {pattern!r} is no valid regular expression", str(error)) from None
            if not found:
                raise UsageError(f"--{flag} {pattern!r} finds no parameter", f"names look like {list(named)[len(named) // 2]}")
            for parameter in found:
                parameter.requires_grad_(learns)
        if not any(parameter.requires_grad for parameter in named.values()):
            raise UsageError("every parameter is frozen", fix="freeze less, or name some in --trainable_parameters_regex")


class Full:
    """All parameters of a float32 model, or those that `freezing` leaves. `dtype`: that of the saved weights."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype, freezing: Freezing | None = None) -> None:
        self.model, self.dtype = model, dtype
        model.requires_grad_(True)
        if freezing is not None:
            freezing.apply(model)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad)

    def tensors(self) -> dict[str, Tensor]:
        """The model's state, tied weights under both names."""
        return dict(self.model.state_dict(keep_vars=True))

    def masters(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """What `save` rounds away of `tensors`; {} when nothing."""
        return {} if self.dtype == torch.float32 else {name: weights[name].detach().cpu() for name, _ in self.named_parameters()}

    @torch.no_grad()
    def load_masters(self, masters: dict[str, Tensor]) -> None:
        for name, parameter in self.model.named_parameters():
            if name in masters:
                parameter.copy_(masters[name])

    @torch.no_grad()
    def save(self, directory: Path, base: str, stop_ids: tuple[int, ...], weights: dict[str, Tensor] | None = None) -> None:
        """config.json, generation_config.json (with the template's stop ids) and safetensors. `base`: the model it began as;
        `weights`: what `tensors` gave."""
        cast: dict[int, Tensor] = {}  # by address, so that tied weights stay tied
        saved = {
            name: cast.setdefault(tensor.data_ptr(), tensor.to(self.dtype)) if tensor.is_floating_point() else tensor
            for name, tensor in (weights or self.tensors()).items()
        }
        generation, self.model.generation_config = self.model.generation_config, GenerationConfig()  # saved by us: see below
        attention, self.model.config._attn_implementation = self.model.config._attn_implementation, "sdpa"
        try:
            with quiet():
                self.model.save_pretrained(directory, state_dict=saved)
        finally:
            self.model.generation_config, self.model.config._attn_implementation = generation, attention
        file = directory / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps({**config, "dtype": str(self.dtype)[6:]}, indent=2), encoding="utf-8")
        # transformers refuses to save generation settings that many published models ship with
        write_generation_config(directory, Path(base), stop_ids)


def write_generation_config(directory: Path, base: Path, stop_ids: tuple[int, ...]) -> None:
    """The base's generation_config.json with the template's stop ids added to its own."""
    source = base / "generation_config.json"
    config = json.loads(source.read_text(encoding="utf-8")) if source.is_file() else {}
    eos = config.get("eos_token_id")
    own = eos if isinstance(eos, list) else [] if eos is None else [eos]
    config["eos_token_id"] = list(dict.fromkeys([*stop_ids, *own]))
    (directory / "generation_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
