"""A PEFT adapter directory: read once, checked whole, digested.

Two files count: adapter_config.json and adapter_model.safetensors. Both are read into memory in one go, so what was
checked is what is used, whatever happens to the directory afterwards. Every key of the file is consumed exactly once; what
is not understood is refused by name. Pickled weights are never opened here. It knows nothing of models beyond the shapes
that it is given.

Letters: R rank. A is [R, in], B is [out, R]; the adapter adds scale * B @ A to a weight [out, in].
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swiftlite.errors import AdapterError

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
MAX_CONFIG_BYTES = 1 << 20
MAX_HEADER_BYTES = 16 << 20
MERGE = "merge it into its base with PEFT (merge_and_unload) and use the merged model"
# Initialisations that leave the base weights alone; the others (pissa, olora, loftq, corda, ...) train against a changed base.
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
# Settings that change the arithmetic in ways that are not built.
UNSUPPORTED = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "megatron_config", "monteclora_config",
    "target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora", "use_qa_lora", "use_merged_linear", "velora_config",
)  # fmt: skip
LORA_KEY = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B|lora_magnitude_vector(?:\.weight)?)"
)
SWIFT_KEY = re.compile(r"\.lora_(A|B|embedding_A|embedding_B)\.[^.]+(\.weight)?$")


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
    base_model: str | None = None

    def rank_of(self, module: str) -> int:
        return _by_pattern(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """alpha / R, or alpha / sqrt(R) for rsLoRA (arXiv 2312.03732)."""
        rank = self.rank_of(module)
        return _by_pattern(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.use_rslora else rank)


@dataclass(frozen=True)
class LoraWeights:
    """One module's update. For an embedding [V, D], A is [R, V], B is [D, R] and the update is scale * (B @ A).T."""

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None  # DoRA (arXiv 2402.09353): [out]
    bias: Tensor | None = None  # LoRA bias: [out], scaled like B
    embedding: bool = False

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class Adapter:
    """A whole adapter in memory, in the dtype it was saved in. It has no name: names belong to who serves it."""

    path: Path
    config: AdapterConfig
    digest: str  # sha256 over weights and arithmetic: equal content, equal digest
    modules: dict[str, LoraWeights]
    saved: dict[str, Tensor]  # full tensors (modules_to_save, trained biases) by parameter name

    @property
    def max_rank(self) -> int:
        return max((w.rank for w in self.modules.values()), default=0)


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    # PEFT's rule: the first pattern that matches the end of the name, as a regular expression.
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _read_bytes(path: Path, limit: int = -1) -> bytes:
    """The first `limit` bytes, or all."""
    try:
        with open(path, "rb") as file:
            return file.read(limit)
    except OSError as error:
        raise AdapterError(f"cannot read {path}", error.strerror or str(error), "check the adapter's path") from None


def _locate(path: Path) -> None:
    """AdapterError unless `path` holds the two files."""
    if not path.is_dir():
        raise AdapterError(f"no adapter at {path}", "there is no such directory", "check the path")
    export = f"swift export --ckpt_dir {path} --to_peft_format true"
    if not (path / CONFIG).is_file():
        if any(path.glob(f"*/{CONFIG}")):
            raise AdapterError(f"{path} is in SWIFT's own layout", "its adapter lies in a sub-folder", f"convert it: {export}")
        hint = (
            "this looks like a full model: pass it as --model"
            if (path / "config.json").is_file()
            else "pass the folder that holds it, e.g. checkpoint-100"
        )
        raise AdapterError(f"no adapter in {path}", f"{CONFIG} is missing", hint)
    if not (path / WEIGHTS).is_file():
        if (path / PICKLE).is_file():
            raise AdapterError(f"{path} has pickled weights", f"{PICKLE} can run code when it is opened", f"convert it: {export}")
        raise AdapterError(f"the adapter in {path} is incomplete", f"{WEIGHTS} is missing", "copy it again, or take another checkpoint")


def read_config(path: Path) -> tuple[AdapterConfig, dict[str, Any]]:
    """adapter_config.json, checked: (what we use, the raw object). AdapterError names what is not supported."""
    file = path / CONFIG
    try:
        raw = json.loads(_read_bytes(file, MAX_CONFIG_BYTES))
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


def _tensors(path: Path) -> tuple[dict[str, Tensor], bytes]:
    import safetensors.torch
    from safetensors import SafetensorError

    file = path / WEIGHTS
    header, size = int.from_bytes(_read_bytes(file, 8), "little"), file.stat().st_size
    if size < 8 or header > min(MAX_HEADER_BYTES, size - 8):
        why = f"its header claims {header} bytes; the file has {size} and {MAX_HEADER_BYTES} are allowed"
        raise AdapterError(f"{file} is not a whole safetensors file", why, "copy the adapter again")
    data = _read_bytes(file)
    try:
        return safetensors.torch.load(data), data
    except (SafetensorError, ValueError, KeyError) as error:
        raise AdapterError(f"{file} is not a whole safetensors file", str(error), "copy the adapter again") from None


def digest_of(config: AdapterConfig, weights: bytes) -> str:
    arithmetic = {k: v for k, v in asdict(config).items() if k not in ("base_model", "targets")}
    return hashlib.sha256(json.dumps(arithmetic, sort_keys=True).encode() + b"\0" + hashlib.sha256(weights).digest()).hexdigest()


def read(path: str | Path, expected_shapes: Mapping[str, tuple[int, int]] | None = None, *, max_rank: int | None = None) -> Adapter:
    """Read and check the adapter in `path`.

    `expected_shapes` maps the base's module names to their weight's shape (out, in); with it, an adapter of another base is
    refused: the message names the module, the adapter's shape and the base's, or the nearest module name. Raises
    AdapterError for everything that cannot be served or merged exactly.
    """
    path = Path(path)
    _locate(path)
    config, _ = read_config(path)
    tensors, data = _tensors(path)
    parts: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix("base_model.model.")
        if not tensor.is_floating_point():
            raise AdapterError(f"{path}: {key} has dtype {tensor.dtype}", "adapters hold floating-point numbers", "copy the adapter again")
        match = LORA_KEY.fullmatch(name)
        if match:
            parts.setdefault(match["module"], {})[match["part"].removesuffix(".weight")] = tensor
        elif SWIFT_KEY.search(name):
            fix = f"convert it: swift export --ckpt_dir {path} --to_peft_format true"
            raise AdapterError(f"{path} has SWIFT's own key names", f"{key} carries the adapter's name", fix)
        else:
            plain = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
            if plain in saved:
                raise AdapterError(f"{path}: {key} is there twice", "two keys name one parameter", "save the adapter again with PEFT")
            saved[plain] = tensor
    adapter = Adapter(
        path, config, digest_of(config, data), {name: _module(path, config, name, found) for name, found in parts.items()}, saved
    )
    _check_saved(adapter)
    if not adapter.modules and not adapter.saved:
        raise AdapterError(f"the adapter in {path} is empty", f"{WEIGHTS} holds no tensors", "take another checkpoint")
    if max_rank is not None and adapter.max_rank > max_rank:
        raise AdapterError(f"{path} has rank {adapter.max_rank}", f"at most {max_rank} is served", "start with a larger --max_lora_rank")
    if expected_shapes is not None:
        check_shapes(adapter, expected_shapes)
    _check_finite(path, tensors)
    return adapter


def _module(path: Path, config: AdapterConfig, name: str, found: dict[str, Tensor]) -> LoraWeights:
    embedding = "lora_embedding_A" in found or "lora_embedding_B" in found
    wanted = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    missing = [part for part in wanted if part not in found]
    if missing:
        raise AdapterError(
            f"the adapter in {path} is incomplete", f"{name} has no {missing[0]}", "copy it again, or take another checkpoint"
        )
    a, b = found.pop(wanted[0]), found.pop(wanted[1])
    rank = config.rank_of(name)
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != rank or b.shape[1] != rank:
        why = f"{name}: A is {list(a.shape)} and B is {list(b.shape)}; rank {rank} needs [{rank}, in] and [out, {rank}]"
        raise AdapterError(
            f"the shapes in {path} do not fit its configuration", why, "use the adapter with the adapter_config.json it was saved with"
        )
    magnitude, bias = found.pop("lora_magnitude_vector", None), found.pop("lora_B.bias", None)
    if (magnitude is not None) != config.use_dora or (bias is not None) != config.lora_bias or found:
        why = f"{name} has {'a' if magnitude is not None else 'no'} DoRA magnitude and {'a' if bias is not None else 'no'} LoRA bias"
        fix = "use the adapter with the adapter_config.json it was saved with"
        raise AdapterError(f"the weights in {path} do not fit its configuration", why, fix)
    for vector in (magnitude, bias):
        if vector is not None and vector.numel() != b.shape[0]:
            raise AdapterError(
                f"{path}: {name} has a vector of {vector.numel()} values", f"{b.shape[0]} are needed", "copy the adapter again"
            )
    magnitude = None if magnitude is None else magnitude.reshape(-1)
    return LoraWeights(a, b, config.scale_of(name), magnitude, bias, embedding)


def _check_saved(adapter: Adapter) -> None:
    """Every full tensor must be announced by the configuration (or be an adapted embedding's own base)."""
    config = adapter.config
    for name in adapter.saved:
        module, _, parameter = name.rpartition(".")
        parents = [module, *(module[:i] for i, c in enumerate(module) if c == ".")]  # PEFT matches the end of a module's name
        announced = any(parent.endswith(kept) for parent in parents for kept in config.modules_to_save)
        own_base = parameter == "weight" and (module in adapter.modules or module.rpartition(".")[2] in ("embed_tokens", "lm_head", "wte"))
        trained_bias = parameter == "bias" and config.bias != "none"
        if not (announced or own_base or trained_bias):
            raise AdapterError(
                f"{adapter.path}: {name} is not part of a LoRA adapter as configured",
                f"modules_to_save is {list(config.modules_to_save)} and bias is {config.bias!r}",
                MERGE,
            )


def _check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if tensor.numel() and not all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor)):  # aminmax passes NaN on
            raise AdapterError(f"{path} holds values that are not finite", f"{key} has NaN or infinity", "take an earlier checkpoint")


def check_shapes(adapter: Adapter, expected: Mapping[str, tuple[int, int]]) -> None:
    """AdapterError unless every module exists in the base with the adapter's shape."""
    made_for = f" (it was made for {adapter.config.base_model})" if adapter.config.base_model else ""
    fix = f"use the base that it was trained on{made_for}"
    for name, weights in sorted(adapter.modules.items()):
        if name not in expected:
            near = difflib.get_close_matches(name, expected, n=1, cutoff=0.0)
            why = f"the base has no module {name}" + (f"; the nearest is {near[0]}" if near else "")
            raise AdapterError(f"the adapter in {adapter.path} belongs to another base model", why, fix)
        shape = (weights.b.shape[0], weights.a.shape[1])
        if weights.embedding or adapter.config.fan_in_fan_out:
            shape = shape[::-1]
        if shape != tuple(expected[name]):
            why = f"{name} is {list(shape)} in the adapter and {list(expected[name])} in the base"
            raise AdapterError(f"the adapter in {adapter.path} belongs to another base model", why, fix)
    for name, tensor in adapter.saved.items():
        module, _, parameter = name.rpartition(".")
        if parameter != "weight" or tensor.dim() != 2 or module not in expected:
            continue
        if tuple(tensor.shape) != tuple(expected[module]):
            why = f"{module} is {list(tensor.shape)} in the adapter and {list(expected[module])} in the base"
            raise AdapterError(f"the adapter in {adapter.path} belongs to another base model", why, fix)
