"""Low-rank adapters (arXiv 2106.09685) on a frozen stock model: which modules, the arithmetic, and PEFT's file format.

y = W x + scale * B A x (adapted.py), scale = alpha / rank (rsLoRA: alpha / sqrt(rank)). A and B are float32 masters whatever the
base's dtype. Names, shapes and initialisation are PEFT's, so `PeftModel.from_pretrained` loads what `save` writes.

Does not know: serving's adapters (adapters/, engine/lora.py), optimizers, checkpoints' other files.
"""

from __future__ import annotations

import copy
import difflib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swiftlite.errors import AdapterError, UsageError
from swiftlite.train.adapted import adapted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFIX = "base_model.model."
# Fields of PEFT's LoraConfig that change the arithmetic in ways we do not train.
NOT_PLAIN = (
    "use_dora", "rank_pattern", "alpha_pattern", "lora_bias", "layers_to_transform", "trainable_token_indices", "target_parameters",
)  # fmt: skip
MAMBA = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")  # as PEFT: their kernels take out_proj's weight as it is
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class LoraLinear(nn.Module):
    """A frozen linear with a trained low-rank addition."""

    def __init__(self, base: nn.Linear, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.base, self.scale, self.dropout = base, scale, dropout
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, dtype=torch.float32, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    @property
    def weight(self) -> Tensor:
        """The base's: some models look at its device or dtype."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.dropout:
            low = F.linear(F.dropout(x, self.dropout), self.lora_A.to(x.dtype))
            return self.base(x) + F.linear(low, self.lora_B.to(x.dtype)) * self.scale
        rows = x.reshape(-1, x.shape[-1])
        out = adapted(rows, self.base.weight, self.base.bias, self.lora_A, self.lora_B, self.scale)
        return out.view(*x.shape[:-1], -1)


class TrainedCopy(nn.Module):
    """A module trained whole beside the adapter (PEFT's modules_to_save): a float32 copy, used in the base's dtype."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.dtype = next(base.parameters()).dtype
        self.whole = copy.deepcopy(base).float()
        self.whole.requires_grad_(True)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        cast = {name: parameter.to(self.dtype) for name, parameter in self.whole.named_parameters()}
        return torch.func.functional_call(self.whole, cast, args, kwargs)


@dataclass(frozen=True)
class LoraSpec:
    """What an adapter is made of; the part of PEFT's LoraConfig that we train."""

    rank: int
    alpha: float
    dropout: float = 0.0
    use_rslora: bool = False
    target_modules: tuple[str, ...] = ("all-linear",)
    modules_to_save: tuple[str, ...] = ()

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    @staticmethod
    def is_plain(directory: Path) -> bool:
        """False for a LoRA adapter that is more than this can express."""
        from safetensors import SafetensorError, safe_open

        try:
            config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
            with safe_open(directory / WEIGHTS, "pt") as file:
                embeddings = any("lora_embedding_" in key for key in file.keys())  # noqa: SIM118 (no mapping)
        except (OSError, ValueError, SafetensorError):
            return True  # broken: `read` or `load` says so
        more = embeddings or config.get("bias", "none") != "none" or any(config.get(name) for name in NOT_PLAIN)
        return config.get("peft_type") != "LORA" or not more

    @staticmethod
    def read(directory: Path) -> LoraSpec:
        """From a PEFT directory. AdapterError for what plain LoRA cannot express."""
        try:
            config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
            rank, alpha = int(config["r"]), float(config["lora_alpha"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise AdapterError(
                f"{directory} is not a LoRA adapter", f"{CONFIG}: {error}", "pass a folder that holds a PEFT adapter"
            ) from None
        unusual = [name for name in NOT_PLAIN if config.get(name)]
        if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or unusual:
            kind = ", ".join(unusual) or f"peft_type {config.get('peft_type')}, bias {config.get('bias')}"
            raise AdapterError(f"cannot go on training {directory}", f"it is not plain LoRA: {kind}", "merge it and train on the result")
        targets = config.get("target_modules") or ()
        return LoraSpec(
            rank, alpha, float(config.get("lora_dropout") or 0), bool(config.get("use_rslora")),
            (targets,) if isinstance(targets, str) else tuple(targets), tuple(config.get("modules_to_save") or ()),
        )  # fmt: skip


class Lora:
    """The adapter on one model: its wrapped modules by the stock model's names."""

    def __init__(self, model: PreTrainedModel, spec: LoraSpec) -> None:
        """Freezes `model` and wraps its modules. UsageError when a target names nothing."""
        if spec.rank < 1:
            raise UsageError(f"--lora_rank must be at least 1, got {spec.rank}")
        self.model, self.spec = model, spec
        model.requires_grad_(False)
        whole = _named(model, spec.modules_to_save, (nn.Module,), "--modules_to_save")
        self.linears: dict[str, LoraLinear] = {}
        self.copies: dict[str, TrainedCopy] = {}
        for name, module in whole.items():
            self.copies[name] = TrainedCopy(module)
            _replace(model, name, self.copies[name])
        for name, module in select(model, spec.target_modules, exclude=tuple(whole)).items():
            assert isinstance(module, nn.Linear)
            self.linears[name] = LoraLinear(module, spec.rank, spec.scale, spec.dropout)
            _replace(model, name, self.linears[name])

    def tensors(self) -> dict[str, Tensor]:
        """Trained tensors under PEFT's key names."""
        found: dict[str, Tensor] = {}
        for name, linear in self.linears.items():
            found[f"{PREFIX}{name}.lora_A.weight"] = linear.lora_A.data
            found[f"{PREFIX}{name}.lora_B.weight"] = linear.lora_B.data
        for name, whole in self.copies.items():
            found |= {f"{PREFIX}{name}.{key}": tensor for key, tensor in whole.whole.state_dict().items()}
        return found

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trained parameters with their stock names, in a fixed order."""
        for name, linear in self.linears.items():
            yield f"{name}.lora_A", linear.lora_A
            yield f"{name}.lora_B", linear.lora_B
        for name, whole in self.copies.items():
            for key, parameter in whole.whole.named_parameters():
                yield f"{name}.{key}", parameter

    def masters(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """{}: `save` rounds nothing away."""
        return {}

    def load_masters(self, masters: dict[str, Tensor]) -> None:
        pass

    def save(self, directory: Path, base: str, weights: dict[str, Tensor] | None = None) -> None:
        """Write PEFT's two files. `base` is the base model's path or id, `weights` what `tensors` gave."""
        from safetensors.torch import save_file

        targets = self.spec.target_modules
        config = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
            "r": self.spec.rank, "lora_alpha": self.spec.alpha, "lora_dropout": self.spec.dropout, "use_rslora": self.spec.use_rslora,
            "use_dora": False, "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True,
            "target_modules": targets[0] if _is_regex(self, targets) else self._suffixes(),
            # full names: PEFT matches the end of a name without a dot before it ("norm" would also be every "q_norm")
            "modules_to_save": list(self.copies) or None, "rank_pattern": {}, "alpha_pattern": {},
        }  # fmt: skip
        (directory / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
        weights = weights or self.tensors()
        save_file({key: tensor.contiguous().cpu() for key, tensor in weights.items()}, directory / WEIGHTS, {"format": "pt"})

    def load(self, directory: Path) -> None:
        """Take over the weights of a PEFT directory. AdapterError when names or shapes differ from this model's."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            saved = load_file(directory / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise AdapterError(
                f"cannot read {directory / WEIGHTS}", str(error), "adapters are safetensors files beside " + CONFIG
            ) from None
        mine = self.tensors()
        for key in [*saved, *mine]:
            if key not in mine or key not in saved:
                close = difflib.get_close_matches(key, mine if key in saved else saved, n=1)
                where = "this model has no place for" if key in saved else "it lacks"
                raise AdapterError(
                    f"{directory} does not belong to this model",
                    f"{where} {key}" + (f" (nearest: {close[0]})" if close else ""),
                    "pass the base model that it was trained on",
                )
            if saved[key].shape != mine[key].shape:
                raise AdapterError(
                    f"{directory} does not belong to this model",
                    f"{key} is {tuple(saved[key].shape)}, this model needs {tuple(mine[key].shape)}",
                    "pass the base model that it was trained on",
                )
        for key, tensor in saved.items():
            mine[key].copy_(tensor)

    def _suffixes(self) -> list[str]:
        """Short names for adapter_config.json where they mean exactly our modules, full names otherwise."""
        short = {name.rsplit(".", 1)[-1] for name in self.linears}
        reached = {name for name, _ in self.model.named_modules() if name.rsplit(".", 1)[-1] in short}
        return sorted(short) if reached == set(self.linears) else sorted(self.linears)


def select(
    model: PreTrainedModel, targets: Sequence[str], exclude: Sequence[str] = (), kinds: tuple[type[nn.Module], ...] = (nn.Linear,)
) -> dict[str, nn.Module]:
    """Linears (modules of one of the `kinds`) that get an adapter: `all-linear` (all but the output head), names or suffixes, or
    one regular expression that must match a module's whole name. UsageError when a name or the expression finds no linear."""
    linears = {
        name: m for name, m in model.named_modules()
        if isinstance(m, kinds) and not any(_within(name, e) for e in exclude) and _multiplies(m)
    }  # fmt: skip
    bypassed = {name for name in linears if model.config.model_type in MAMBA and _matches(name, "out_proj")}
    if tuple(targets) == ("all-linear",):
        head = model.get_output_embeddings()
        chosen = {name: module for name, module in linears.items() if module is not head and name not in bypassed}
        if not chosen:
            raise UsageError("no linear layer to adapt", f"{type(model).__name__} has none", "train with --tuner_type full")
        return chosen
    if len(targets) == 1 and not any(_matches(name, targets[0]) for name in linears) and _looks_regex(targets[0]):
        try:
            chosen = {name: module for name, module in linears.items() if re.fullmatch(targets[0], name)}
        except re.error as error:
            raise UsageError(f"--target_modules {targets[0]!r} is no valid regular expression", str(error)) from None
        if not chosen:
            raise UsageError(f"--target_modules {targets[0]!r} matches no linear layer", f"names look like {next(iter(linears), '-')}")
        return chosen
    named = _named(model, targets, kinds, "--target_modules")
    chosen = {name: linears[name] for name in named if name in linears}
    if bypassed & set(chosen):
        raise UsageError(
            f"--target_modules: {model.config.model_type} cannot have an adapter on out_proj",
            "its kernels take that linear's weight and pass the adapter by, so PEFT refuses it", "leave it out, or use all-linear",
        )  # fmt: skip
    return chosen


def _multiplies(module: nn.Module) -> bool:
    """Whether it is a plain product. Some routers are linears by class, and give back more or something else."""
    kind = type(module)
    if not isinstance(module, nn.Linear) or kind.forward is nn.Linear.forward or kind.__module__.startswith("bitsandbytes"):
        return True
    x = torch.linspace(-1, 1, module.in_features, dtype=module.weight.dtype, device=module.weight.device)[None]
    with torch.no_grad():
        out, want = module(x), F.linear(x, module.weight, module.bias)
    return isinstance(out, Tensor) and out.shape == want.shape and torch.allclose(out.float(), want.float(), rtol=0.02, atol=0.02)


def _named(model: nn.Module, names: Sequence[str], kind: tuple[type[nn.Module], ...], flag: str) -> dict[str, Any]:
    found: dict[str, nn.Module] = {}
    modules = {name: module for name, module in model.named_modules() if name}
    for wanted in names:
        matching = {name: module for name, module in modules.items() if _matches(name, wanted) and isinstance(module, kind)}
        if not matching:
            suffixes = sorted({name.rsplit(".", 1)[-1] for name, module in modules.items() if isinstance(module, kind)})
            known = [s for s in suffixes if not s.isdigit()]
            close = difflib.get_close_matches(wanted, known, n=1)
            kinds = "module" if kind == (nn.Module,) else "linear layer"
            raise UsageError(
                f"{flag}: the model has no {kinds} named {wanted!r}",
                fix=f"did you mean {close[0]!r}?" if close else f"names are: {', '.join(known[:20])}",
            )
        found |= matching
    # in the model's order, whatever the order of `names`: the optimizer's state is kept by position
    inner = {name for name in found if any(_within(name, other) and name != other for other in found)}
    return {name: module for name, module in modules.items() if name in found and name not in inner}


def _matches(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith("." + wanted)


def _within(name: str, outer: str) -> bool:
    return name == outer or name.startswith(outer + ".")


def _looks_regex(text: str) -> bool:
    return any(c in text for c in "*+?[](){}|^$\\") or ".*" in text


def _is_regex(lora: Lora, targets: Sequence[str]) -> bool:
    return len(targets) == 1 and _looks_regex(targets[0]) and not any(_matches(name, targets[0]) for name in lora.linears)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
