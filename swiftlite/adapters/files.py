"""The two files of a PEFT directory as bytes and tensors: checked before they are believed, read once, never copied twice.

A safetensors file is parsed here rather than by its library, so that its header alone can be read (thousands of registered
adapters) and its tensors are views of one buffer. Every byte of the data belongs to exactly one tensor, or the file is refused.
Nothing here knows what the tensors mean.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swiftlite.errors import AdapterError
from swiftlite.pages import pages

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
MAX_CONFIG_BYTES = 1 << 20
MAX_HEADER_BYTES = 16 << 20
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}  # fmt: skip
AGAIN = "copy the adapter again"


# What changes when the files of a directory change: for each, inode, size and time of the last write.
Signature = tuple[tuple[int, int, int], tuple[int, int, int]]


def signature_of(path: str) -> Signature | None:
    """None where one of the two files is missing. Called for thousands of directories a few times a second."""
    try:
        one, two = os.stat(f"{path}/{WEIGHTS}"), os.stat(f"{path}/{CONFIG}")
    except OSError:
        return None
    return ((one.st_ino, one.st_size, one.st_mtime_ns), (two.st_ino, two.st_size, two.st_mtime_ns))


def read_bytes(path: Path, limit: int = -1) -> bytes:
    """The first `limit` bytes, or all."""
    try:
        with open(path, "rb") as file:
            return file.read(limit)
    except OSError as error:
        raise AdapterError(f"cannot read {path}", error.strerror or str(error), "check the adapter's path") from None


class Buffer:
    """Memory for one file at a time, kept for the next: fresh memory costs as much as what is read into it, or many times that."""

    def __init__(self, most: int = 64 << 20) -> None:
        """Files of more than `most` bytes get memory of their own."""
        self.most = most
        self._memory: mmap.mmap | None = None

    def take(self, size: int) -> mmap.mmap:
        """At least `size` bytes of anything. What was taken before is overwritten."""
        if size > self.most:
            return pages(size)
        if self._memory is None or len(self._memory) < size:
            self._memory = pages(size)
        return self._memory


def read_tensors(path: Path, buffer: Buffer | None = None) -> tuple[dict[str, Tensor], bytes, memoryview]:
    """(tensors by key, the header, all data) of a safetensors file. AdapterError unless it is whole.

    With `buffer` they are good until it is used again.
    """
    with _open(path) as file:
        header, size = _header(path, file)
        memory = pages(size) if buffer is None else buffer.take(size)
        data, view = torch.frombuffer(memory, dtype=torch.uint8), memoryview(memory)[:size]
        if _fill(file, view) != size:
            raise AdapterError(f"{path} is not a whole safetensors file", "it ended while it was read", AGAIN)
    tensors = {}
    for key, (dtype, shape, start, end) in _entries(path, header, size).items():
        piece = data[start:end]
        if start % dtype.itemsize:
            piece = piece.clone()
        tensors[key] = piece.view(dtype).view(shape)
    return tensors, header, view


def read_layout(path: Path) -> dict[str, Tensor]:
    """The same tensors without their values (on the meta device); only the header is read."""
    with _open(path) as file:
        header, size = _header(path, file)
    return {key: torch.empty(shape, dtype=dtype, device="meta") for key, (dtype, shape, *_) in _entries(path, header, size).items()}


def _fill(file: Any, view: memoryview) -> int:
    """Read as much as there is; one call returns at most 2 GiB."""
    done = 0
    while done < len(view) and (count := file.readinto(view[done:])):
        done += count
    return done


def _open(path: Path) -> Any:
    try:
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise AdapterError(f"cannot read {path}", error.strerror or str(error), "check the adapter's path") from None


def _header(path: Path, file: Any) -> tuple[bytes, int]:
    """(the JSON header, how many bytes of data must follow it)."""
    length, size = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size
    if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
        why = f"its header claims {length} bytes; the file has {size} and {MAX_HEADER_BYTES} are allowed"
        raise AdapterError(f"{path} is not a whole safetensors file", why, AGAIN)
    header = file.read(length)
    if len(header) != length:
        raise AdapterError(f"{path} is not a whole safetensors file", "it ended while it was read", AGAIN)
    return header, size - 8 - length


def _entries(path: Path, header: bytes, size: int) -> dict[str, tuple[torch.dtype, list[int], int, int]]:
    """Key -> (dtype, shape, first byte, end), every offset checked."""

    def refuse(why: str) -> AdapterError:
        return AdapterError(f"{path} is not a whole safetensors file", why, AGAIN)

    try:
        raw = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise refuse(f"its header is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise refuse("its header is not a JSON object")
    raw.pop("__metadata__", None)
    entries = {}
    for key, entry in raw.items():
        try:
            name, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            whole = all(type(n) is int and n >= 0 for n in (*shape, start, end))
        except (KeyError, TypeError, ValueError):
            raise refuse(f"the entry of {key[:100]} is not understood") from None
        dtype = DTYPES.get(name) if isinstance(name, str) else None
        if dtype is None:
            raise AdapterError(f"{path}: {key[:100]} has dtype {name}", "adapters hold floating-point numbers", AGAIN)
        if not whole or end > size or end - start != math.prod(shape) * dtype.itemsize:
            raise refuse(f"{key[:100]} of shape {shape} claims bytes {start} to {end} of {size}")
        entries[key] = (dtype, shape, start, end)
    position = 0
    for start, end in sorted(entry[2:] for entry in entries.values()):
        if start != position:
            raise refuse(f"bytes {min(start, position)} to {max(start, position)} belong to none or to two tensors")
        position = end
    if position != size:
        raise refuse(f"its tensors take {position} bytes and {size} are there")
    return entries
