"""A PEFT adapter directory: read once, checked whole, digested.

Two files count: adapter_config.json and adapter_model.safetensors. Both are read into memory in one go, so what was
checked is what is used, whatever happens to the directory afterwards. Every key of the file is consumed exactly once; what
is not understood is refused by name. Pickled weights are never opened here. `read_header` makes the same checks from the file's
header alone, values aside. It knows nothing of models beyond the shapes that it is given.

Letters: R rank. A is [R, in], B is [out, R]; the adapter adds scale * B @ A to a weight [out, in].
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from swiftlite.adapters.config import MERGE, AdapterConfig, read_config
from swiftlite.adapters.digest import Hashing, Lanes, lanes
from swiftlite.adapters.files import CONFIG, PICKLE, WEIGHTS, Buffer, read_layout, read_tensors
from swiftlite.errors import AdapterError

AGAIN = "use the adapter with the files it was saved with"
EARLIER = "take an earlier checkpoint"
LORA_KEY = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B|lora_magnitude_vector(?:\.weight)?)"
)
TOKENS_KEY = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta")
SWIFT_KEY = re.compile(r"\.lora_(A|B|embedding_A|embedding_B)\.[^.]+(\.weight)?$")


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
    modules: dict[str, LoraWeights]
    saved: dict[str, Tensor]  # full tensors (modules_to_save, trained biases) by parameter name
    bases: dict[str, Tensor]  # the base's own weights of adapted embeddings and heads, which PEFT saves along; by parameter name
    tokens: dict[str, tuple[tuple[int, ...], Tensor]]  # trainable_token_indices: module -> (tokens, their new rows [n, D])
    hashing: Hashing | None  # None: only the header was read

    @property
    def digest(self) -> str:
        """Of weights and arithmetic: equal content, equal digest."""
        assert self.hashing is not None, "only the header was read"
        return self.hashing.result()

    @property
    def nbytes(self) -> int:
        """Of its tensors, as saved."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def tensors(self) -> Iterable[Tensor]:
        for weights in self.modules.values():
            yield from (t for t in (weights.a, weights.b, weights.magnitude, weights.bias) if t is not None)
        yield from self.saved.values()
        yield from (rows for _, rows in self.tokens.values())

    @property
    def max_rank(self) -> int:
        return max((w.rank for w in self.modules.values()), default=0)


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


def read(
    path: str | Path,
    expected_shapes: Mapping[str, tuple[int, int]] | None = None,
    *,
    max_rank: int | None = None,
    finite: bool = True,
    hashed: Lanes = lanes,
    buffer: Buffer | None = None,
) -> Adapter:
    """Read and check the adapter in `path`.

    `expected_shapes` maps the base's module names to their weight's shape (out, in); with it, an adapter of another base is
    refused: the message names the module, the adapter's shape and the base's, or the nearest module name. `finite` False leaves
    the look at every value to the caller (`check_finite`); `hashed` is a faster way to hash. With `buffer` the tensors are good until
    it is used again. Raises AdapterError for everything that cannot be served or merged exactly.
    """
    path = Path(path)
    _locate(path)
    config, _ = read_config(path)
    tensors, header, data = read_tensors(path / WEIGHTS, buffer)
    arithmetic = {key: value for key, value in asdict(config).items() if key not in ("base_model", "targets")}
    hashing = Hashing(json.dumps(arithmetic, sort_keys=True).encode() + b"\0" + header, data, hashed)
    adapter = _adapter(path, config, tensors, hashing)
    _check(adapter, expected_shapes, max_rank)
    if finite:
        check_finite(adapter)
    return adapter


def read_header(path: str | Path, expected_shapes: Mapping[str, tuple[int, int]] | None = None, *, max_rank: int | None = None) -> Adapter:
    """What `read` returns, checked the same way, but with tensors on the meta device: no weight is read, there is no digest."""
    path = Path(path)
    _locate(path)
    config, _ = read_config(path)
    adapter = _adapter(path, config, read_layout(path / WEIGHTS), None)
    _check(adapter, expected_shapes, max_rank)
    return adapter


def _adapter(path: Path, config: AdapterConfig, tensors: Mapping[str, Tensor], hashing: Hashing | None) -> Adapter:
    parts: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    bases: dict[str, Tensor] = {}
    tokens: dict[str, tuple[tuple[int, ...], Tensor]] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix("base_model.model.")
        if not tensor.is_floating_point():
            raise AdapterError(f"{path}: {key} has dtype {tensor.dtype}", "adapters hold floating-point numbers", "copy the adapter again")
        match, of_tokens = LORA_KEY.fullmatch(name), TOKENS_KEY.fullmatch(name)
        if match:
            parts.setdefault(match["module"], {})[match["part"].removesuffix(".weight")] = tensor
        elif of_tokens:
            module = of_tokens["module"]
            tokens[module] = (_tokens_of(path, config, module, tensor), tensor)
        elif SWIFT_KEY.search(name):
            fix = f"convert it: swift export --ckpt_dir {path} --to_peft_format true"
            raise AdapterError(f"{path} has SWIFT's own key names", f"{key} carries the adapter's name", fix)
        else:
            plain = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
            if plain in saved or plain in bases:
                raise AdapterError(f"{path}: {key} is there twice", "two keys name one parameter", "save the adapter again with PEFT")
            (bases if name.endswith(".base_layer.weight") else saved)[plain] = tensor
    modules = {name: _module(path, config, name, found) for name, found in parts.items()}
    for module in config.token_indices:
        if not any(not module or name == module or name.endswith("." + module) for name in tokens):
            raise AdapterError(f"the adapter in {path} is incomplete", f"the rows of its trained tokens ({module}) are missing", AGAIN)
    return Adapter(path, config, modules, saved, bases, tokens, hashing)


def _tokens_of(path: Path, config: AdapterConfig, module: str, rows: Tensor) -> tuple[int, ...]:
    own = [tokens for name, tokens in config.token_indices.items() if not name or module == name or module.endswith("." + name)]
    if len(own) != 1 or rows.dim() != 2 or len(own[0]) != rows.shape[0]:
        why = f"{module} has {list(rows.shape)} rows of trained tokens, trainable_token_indices has {[len(tokens) for tokens in own]}"
        raise AdapterError(f"the weights in {path} do not fit its configuration", why, AGAIN)
    if len(set(own[0])) < len(own[0]):
        raise AdapterError(f"{path}: trainable_token_indices names a token twice", fix=AGAIN)
    return own[0]


def _check(adapter: Adapter, expected_shapes: Mapping[str, tuple[int, int]] | None, max_rank: int | None) -> None:
    path = adapter.path
    _check_saved(adapter)
    if not (adapter.modules or adapter.saved or adapter.tokens):
        raise AdapterError(f"the adapter in {path} is empty", f"{WEIGHTS} holds no tensors", "take another checkpoint")
    if max_rank is not None and adapter.max_rank > max_rank:
        raise AdapterError(f"{path} has rank {adapter.max_rank}", f"at most {max_rank} is served", "start with a larger --max_lora_rank")
    if expected_shapes is not None:
        check_shapes(adapter, expected_shapes)


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


def check_finite(adapter: Adapter) -> None:
    """AdapterError when a value is NaN or infinite."""
    for tensor in adapter.tensors():
        if tensor.numel() and not all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor)):  # aminmax passes NaN on
            raise not_finite(adapter)


def not_finite(adapter: Adapter) -> AdapterError:
    """The error for an adapter that has NaN or infinity somewhere; it finds out where."""
    for name, weights in adapter.modules.items():
        for part, tensor in (
            ("lora_A.weight", weights.a),
            ("lora_B.weight", weights.b),
            ("magnitude", weights.magnitude),
            ("bias", weights.bias),
        ):
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                where = f"{name}.{part}"
                return AdapterError(f"{adapter.path} holds values that are not finite", f"{where} has NaN or infinity", EARLIER)
    where = next((name for name, tensor in adapter.saved.items() if not bool(torch.isfinite(tensor).all())), "a row of a trained token")
    return AdapterError(f"{adapter.path} holds values that are not finite", f"{where} has NaN or infinity", EARLIER)


def check_shapes(adapter: Adapter, expected: Mapping[str, tuple[int, int]]) -> None:
    """AdapterError unless every module exists in the base with the adapter's shape."""
    base = adapter.config.base_model
    # Not the path: this may be told to a client of a server.
    made_for = f" (it was made for {Path(base).name if Path(base).is_absolute() else base})" if base else ""
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
    for name, (tokens, rows) in adapter.tokens.items():
        if name not in expected or rows.shape[1] != expected[name][1] or not 0 <= min(tokens) <= max(tokens) < expected[name][0]:
            there = list(expected[name]) if name in expected else "not there"
            why = f"{name} has trained rows for tokens up to {max(tokens)}, {rows.shape[1]} wide; in the base it is {there}"
            raise AdapterError(f"the adapter in {adapter.path} belongs to another base model", why, fix)
    for name, tensor in (*adapter.saved.items(), *adapter.bases.items()):
        module, _, parameter = name.rpartition(".")
        if parameter != "weight" or tensor.dim() != 2 or module not in expected:
            continue
        if tuple(tensor.shape) != tuple(expected[module]):
            why = f"{module} is {list(tensor.shape)} in the adapter and {list(expected[module])} in the base"
            raise AdapterError(f"the adapter in {adapter.path} belongs to another base model", why, fix)
