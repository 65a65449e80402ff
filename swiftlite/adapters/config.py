"""adapter_config.json: what of it decides the arithmetic, and what of PEFT is not built here.

What is not understood is refused by name with the way out. It reads no weights.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swiftlite.adapters.files import CONFIG, MAX_CONFIG_BYTES, read_bytes
from swiftlite.errors import AdapterError

MERGE = "merge it into its base with PEFT (merge_and_unload) and use the merged model"
# Initialisations that leave the base weights alone; the others (pissa, olora, loftq, corda, ...) train against a changed base.
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
# Settings that change the arithmetic in ways that are not built.
UNSUPPORTED = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "megatron_config", "monteclora_config",
    "target_parameters", "use_bdlora", "use_qalora", "use_qa_lora", "use_merged_linear", "velora_config",
)  # fmt: skip


@dataclass(frozen=True)
class AdapterConfig:
    """What of adapter_config.json decides the arithmetic, and which base it was made for."""

    rank: int
    alpha: float
    targets: tuple[str, ...] | str | None = None
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    fan_in_fan_out: bool = False
    ensure_weight_tying: bool = False
    bias: str = "none"
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    token_indices: dict[str, tuple[int, ...]] = field(default_factory=dict)  # end of a module's name -> its trained tokens
    base_model: str | None = None

    def rank_of(self, module: str) -> int:
        return _by_pattern(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """alpha / R, or alpha / sqrt(R) for rsLoRA (arXiv 2312.03732)."""
        rank = self.rank_of(module)
        return _by_pattern(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.use_rslora else rank)


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    # PEFT's rule: the first pattern that matches the end of the name, as a regular expression.
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def read_config(path: Path) -> tuple[AdapterConfig, dict[str, Any]]:
    """adapter_config.json, checked: (what we use, the raw object). AdapterError names what is not supported."""
    file = path / CONFIG
    try:
        raw = json.loads(read_bytes(file, MAX_CONFIG_BYTES))
    except ValueError as error:
        raise AdapterError(f"{file} is not valid JSON", str(error), "copy the adapter again") from None
    if not isinstance(raw, dict):
        raise AdapterError(f"{file} must hold one JSON object")
    kind = raw.get("peft_type") or raw.get("swift_type")
    if kind != "LORA":
        raise AdapterError(f"{path} is not a LoRA adapter", f"its type is {kind!r}", MERGE)
    for name in UNSUPPORTED:
        if raw.get(name):
            raise AdapterError(f"{path} uses {name}, which is not supported", f"{CONFIG} sets it to {raw[name]!r}", MERGE)
    if raw.get("init_lora_weights", True) not in PLAIN_INITS:
        raise AdapterError(
            f"{path} was initialised with {raw['init_lora_weights']}",
            "that changes the base weights too, so the adapter does not fit the stock base",
            "save it with PEFT's path_initial_model_for_weight_conversion, which makes a plain LoRA of it",
        )
    try:
        targets = raw.get("target_modules")
        config = AdapterConfig(
            rank=int(raw["r"]),
            alpha=float(raw["lora_alpha"]),
            targets=targets if isinstance(targets, str) or targets is None else tuple(sorted(targets)),
            use_rslora=bool(raw.get("use_rslora")),
            use_dora=bool(raw.get("use_dora")),
            lora_bias=bool(raw.get("lora_bias")),
            fan_in_fan_out=bool(raw.get("fan_in_fan_out")),
            ensure_weight_tying=bool(raw.get("ensure_weight_tying")),
            bias=str(raw.get("bias") or "none"),
            rank_pattern={str(k): int(v) for k, v in (raw.get("rank_pattern") or {}).items()},
            alpha_pattern={str(k): float(v) for k, v in (raw.get("alpha_pattern") or {}).items()},
            modules_to_save=tuple(raw.get("modules_to_save") or ()),
            token_indices=_token_indices(raw.get("trainable_token_indices")),
            base_model=raw.get("base_model_name_or_path") or None,
        )
        for pattern in (*config.rank_pattern, *config.alpha_pattern):
            re.compile(pattern)
    except (KeyError, TypeError, ValueError, re.error) as error:
        raise AdapterError(
            f"{file} is not a usable LoRA configuration", f"{type(error).__name__}: {error}", "copy the adapter again"
        ) from None
    if config.rank < 1 or any(rank < 1 for rank in config.rank_pattern.values()):
        raise AdapterError(f"{file}: the rank must be at least 1", f"r is {config.rank}", "train the adapter again with --lora_rank 8")
    if not all(map(math.isfinite, (config.alpha, *config.alpha_pattern.values()))):
        raise AdapterError(f"{file}: lora_alpha must be a finite number")
    return config, raw


def _token_indices(raw: Any) -> dict[str, tuple[int, ...]]:
    """PEFT's rule: a plain list is about the input embedding."""
    if not raw:
        return {}
    found = raw if isinstance(raw, dict) else {"": raw}
    return {str(name): tuple(int(token) for token in tokens) for name, tokens in found.items()}
