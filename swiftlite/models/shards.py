"""A model directory's safetensors weights as one table of tensors, and rewriting them shard by shard.

Invariants: nothing but headers is read until a tensor is asked for; a rewrite holds one shard in memory, keeps the shards'
names, and ends with an index that names exactly what was written. It does not know what the tensors mean.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swiftlite.errors import ModelError, SwiftError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPE_BYTES = {
    "F64": 8,
    "I64": 8,
    "F32": 4,
    "I32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}

# What a model or checkpoint carries beside its weights and configuration, and what a result made from it carries on.
TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.tiktoken", "sentencepiece*",
    "spiece.model", "chat_template*", "additional_chat_templates",
)  # fmt: skip
CARRIED_FILES = (*TOKENIZER_FILES, "swift_template.json", "generation_config.json", "LICENSE*", "NOTICE*", "configuration.json")


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: its shard, shape and safetensors dtype name."""

    shard: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES.get(self.dtype, 4)


@dataclass(frozen=True)
class Shards:
    """The weights of one model directory."""

    directory: Path
    tensors: dict[str, TensorInfo]

    @property
    def names(self) -> list[str]:
        """Shard files in the order they are written."""
        return sorted({info.shard for info in self.tensors.values()})

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    def read(self, shard: str) -> Iterator[tuple[str, Any]]:
        """(key, tensor) of one shard, one tensor at a time."""
        from safetensors import safe_open

        with safe_open(self.directory / shard, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a mapping
                yield key, file.get_tensor(key)

    def get(self, key: str) -> Any:
        from safetensors import safe_open

        with safe_open(self.directory / self.tensors[key].shard, framework="pt") as file:
            return file.get_tensor(key)

    def module_shapes(self) -> dict[str, tuple[int, int]]:
        """Module name -> (rows, columns) of every two-dimensional `.weight`: what an adapter must fit."""
        found = {}
        for key, info in self.tensors.items():
            if key.endswith(".weight") and len(info.shape) == 2:
                found[key.removesuffix(".weight")] = (info.shape[0], info.shape[1])
        return found


def read_config(directory: str | Path) -> dict[str, Any]:
    """config.json of a model directory. ModelError when it is missing or broken."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ModelError(
            f"{directory} is not a model directory", "it has no config.json", "pass the directory that from_pretrained would take"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(f"{path} cannot be read", str(error), "copy the model again") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} must hold one JSON object")
    return config


def open_shards(directory: str | Path) -> Shards:
    """Headers of all shards. ModelError when there are none, one is missing, or one is not whole."""
    from safetensors import SafetensorError, safe_open

    directory = Path(directory)
    if (directory / INDEX).is_file():
        try:
            names = sorted(set(json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{directory / INDEX} is not a valid weight index", str(error), "copy the model again") from None
    elif (directory / SINGLE).is_file():
        names = [SINGLE]
    else:
        raise ModelError(
            f"{directory} has no safetensors weights",
            "only the safetensors format is rewritten (pickled weights can run code)",
            "load it once with transformers and save_pretrained() it, then use that directory",
        )
    tensors: dict[str, TensorInfo] = {}
    for name in names:
        if Path(name).name != name or not (directory / name).is_file():
            raise ModelError(f"{directory} is incomplete", f"its index names {name}, which is not there", "copy the model again")
        try:
            with safe_open(directory / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    part = file.get_slice(key)
                    tensors[key] = TensorInfo(name, tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{directory / name} cannot be read", str(error), "copy the model again") from None
    return Shards(directory, tensors)


def rewrite(shards: Shards, out: Path, transform: Callable[[str, Any], Iterable[tuple[str, Any]]], log: Callable[[str], None]) -> None:
    """Write `shards` into `out`, every (key, tensor) replaced by what `transform` gives for it."""
    from safetensors.torch import save_file

    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards.names, 1):
        written: dict[str, Any] = {}
        for key, tensor in shards.read(shard):
            for new_key, new in transform(key, tensor):
                written[new_key] = new.contiguous()
                weight_map[new_key] = shard
                total += new.numel() * new.element_size()
        save_file(written, out / shard, metadata={"format": "pt"})
        log(f"  {shard} ({number}/{len(shards.names)}): {len(written)} tensors")
    if shards.names != [SINGLE]:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def copy_files(source: str | Path, out: Path, patterns: Iterable[str]) -> list[str]:
    """Copy what matches `patterns` from the top of `source`, unless `out` already has it; returns the names."""
    copied = []
    for pattern in patterns:
        for path in sorted(Path(source).glob(pattern)):
            if (out / path.name).exists():
                continue
            if path.is_dir():
                shutil.copytree(path, out / path.name)
            else:
                shutil.copyfile(path, out / path.name)
            copied.append(path.name)
    return copied


def _is_result(out: Path) -> bool:
    """Whether a directory is one of ours to replace, and not somebody's with other things in it."""
    return not any(out.iterdir()) or any((out / name).is_file() for name in ("config.json", "adapter_config.json"))


@contextmanager
def new_directory(out: str | Path, *, exist_ok: bool, needs: int = 0, sources: Iterable[str | Path] = ()) -> Iterator[Path]:
    """A directory that appears as `out` only when the block ends well; `needs` bytes must be free on its disk.

    Yields a hidden directory beside `out`. SwiftError when `out` exists (unless `exist_ok`, which replaces a model or an adapter, and
    in any other directory leaves what is there), is or holds one of `sources`, cannot be made, or the disk is too full.
    """
    from safetensors import SafetensorError

    out = Path(os.path.abspath(out))
    if out.exists() and not exist_ok:
        raise SwiftError(
            f"{out} exists already", "a finished result is never overwritten by accident", "delete it, or pass --exist_ok true"
        )
    for source in sources:
        if Path(source).resolve().is_relative_to(out.resolve()):
            raise SwiftError(f"{out} cannot be the result", f"{source} is read to make it", "pass another --export_dir")
    work = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    try:
        if out.exists() and not out.is_dir():
            raise SwiftError(f"{out} is a file", "the result is a folder", "pass another --export_dir")
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
        if needs > free:
            raise SwiftError(
                f"not enough space for {out}",
                f"it needs {needs / 2**30:.2f} GiB and {out.parent} has {free / 2**30:.2f} GiB free",
                "free some space, or pass --export_dir on another disk",
            )
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        yield work
        if not out.exists():
            os.replace(work, out)
        elif _is_result(out):
            old = out.with_name(f".{out.name}.old-{os.getpid()}")
            os.replace(out, old)
            os.replace(work, out)
            old.unlink() if old.is_symlink() else shutil.rmtree(old)
        else:
            shutil.copytree(work, out, copy_function=os.replace, dirs_exist_ok=True)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk in its own class
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise SwiftError(f"cannot write {out}", reason, "check its permissions and the space left") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
