"""Weights packed into panels straight from the files, on a thread that needs nothing of Python, while the rest of a start goes on.

Importing transformers and making its model take one core for more than a second; reading and packing the weights takes another core
less than that. The thread begins before anyone knows what the model is, so it goes by the names of linears; whoever packs a weight
later asks by where in its file it lies, and packs it as ever if it is not here. What nobody asked for is given back.

Does not know the model, its adapters or what becomes of the weights.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import mmap
import os
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from swiftlite.engine.panels import PANEL, Panels
from swiftlite.kernels.build import load_library
from swiftlite.models.packed import Mapping, give_back, mapped_files
from swiftlite.pages import zeros

LINEAR = re.compile(r"(.*\.(?:self_attn|attn|mlp)\.)(q|k|v|o|qkv|gate|up|gate_up|down)_proj\.weight")
ORDER = ("q", "k", "v", "o", "qkv", "gate", "up", "gate_up", "down")  # those of one input lie below each other, as one product has them


class _Packing(ctypes.Structure):
    """struct Packing of linear.cpp."""

    _fields_ = (("out", ctypes.c_void_p), ("w", ctypes.c_void_p), ("n", ctypes.c_int64), ("k", ctypes.c_int64))


@dataclass(frozen=True)
class _Weight:
    """A weight [n, k] of a file, and where its panels begin."""

    file: str
    offset: int  # bytes
    n: int
    k: int
    place: int  # elements

    @property
    def end(self) -> int:
        return self.place + self.n * self.k


class Ahead:
    """The weights of one directory, on their way into panels."""

    def __init__(self, panels: Panels, directory: Path) -> None:
        """OSError or ValueError when the files are not what they should be."""
        self._function, size = panels.library.swift_pack_all, 0
        self._weights: dict[tuple[str, int], _Weight] = {}
        self._mapped: dict[str, mmap.mmap] = {}
        self._states: dict[str, tuple[int, ...]] = {}
        for file, offset, n, k in _linears(directory):
            weight = _Weight(file, offset, n, k, size)
            self._weights[file, offset] = weight
            size = weight.end
        self._all = list(self._weights.values())
        self._data = zeros(size, dtype=torch.bfloat16)
        largest_first = sorted(self._weights.values(), key=lambda weight: weight.place - weight.end)
        self._jobs = (_Packing * len(largest_first))(*(self._job(weight) for weight in largest_first))
        self._next = ctypes.c_int64(0)  # the first that nobody has begun
        self._claimed: set[_Weight] = set()
        self._files: list[Mapping] = []
        self._thread: threading.Thread | None = threading.Thread(target=self._pack, name="swiftlite-pack-ahead", daemon=True)
        self._thread.start()

    def _job(self, weight: _Weight) -> _Packing:
        if weight.file not in self._mapped:
            with open(weight.file, "rb") as file:
                self._states[weight.file] = _state(os.fstat(file.fileno()))
                self._mapped[weight.file] = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE)  # ctypes takes no read-only memory
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._mapped[weight.file]))
        return _Packing(self._data.data_ptr() + 2 * weight.place, start + weight.offset, weight.n, weight.k)

    def _pack(self) -> None:
        self._function(self._jobs, len(self._jobs), ctypes.byref(self._next))

    def _finish(self) -> None:
        if self._thread is None:
            return
        helpers = [threading.Thread(target=self._pack, daemon=True) for _ in range(torch.get_num_threads() - 2)]
        for helper in helpers:
            helper.start()
        self._pack()  # with the others, what is left
        for thread in (*helpers, self._thread):
            thread.join()
        self._thread, self._files = None, mapped_files()
        changed = {file for file, state in self._states.items() if not os.path.exists(file) or _state(os.stat(file)) != state}
        self._weights = {place: weight for place, weight in self._weights.items() if weight.file not in changed}

    def take(self, weights: Sequence[Tensor]) -> Tensor | None:
        """The panels of weights [out, in] below each other, where all are unchanged parts of the files and lie so here."""
        self._finish()
        found = [one for one in map(self._find, weights) if one is not None]
        if len(found) < len(weights) or any(above.end != below.place for above, below in itertools.pairwise(found)):
            return None
        self._claimed.update(found)
        return self._data[found[0].place : found[-1].end]

    def _find(self, weight: Tensor) -> _Weight | None:
        first = weight.data_ptr()
        for mapping in self._files:
            if mapping.first <= first < mapping.end:
                found = self._weights.get((mapping.file, mapping.offset + first - mapping.first))
                if found is not None and weight.dtype == torch.bfloat16 and weight.shape == (found.n, found.k) and weight.is_contiguous():
                    return found
        return None

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Pack no more, and give back the memory of what was not taken. It may be called again."""
        self._next.value = len(self._jobs)
        self._finish()
        for weight in self._all:
            if weight not in self._claimed:
                give_back(self._data[weight.place : weight.end])


def _state(found: os.stat_result) -> tuple[int, ...]:
    """What changes when a file does."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def pack_ahead(directory: Path, dtype: str, device: str, quantization: str | None) -> Ahead | None:
    """Begin, if the model in `directory` will presumably run in panels here; None where it will not."""
    if (
        quantization
        or dtype not in ("auto", "bfloat16")
        or device not in ("auto", "cpu")
        or (device == "auto" and torch.cuda.is_available())
    ):
        return None
    library = load_library()
    if library is None or not (panels := Panels(library)).size(PANEL, PANEL):
        return None
    try:
        return Ahead(panels, directory)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # whoever loads the model says what is wrong with it
        return None


def _linears(directory: Path) -> list[tuple[str, int, int, int]]:
    """File, offset, n and k of the bfloat16 weights that fill whole panels, in the order in which they are to lie."""
    index = directory / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    found: dict[tuple[str, int], tuple[str, int, int, int]] = {}
    ends: dict[str, tuple[str, int, int, int]] = {}  # the embedding and the head
    for name in sorted(names):
        file = os.path.realpath(directory / name)
        for key, place in _matrices(file):
            match, kind = LINEAR.fullmatch(key), key.removesuffix(".weight").rpartition(".")[2]
            if match is not None:
                found[match[1], ORDER.index(match[2])] = place
            elif kind in ("lm_head", "embed_tokens"):
                ends[kind] = place
    head = ends.get("lm_head", ends.get("embed_tokens"))  # tied to it, where there is none
    return [found[key] for key in sorted(found)] + ([] if head is None else [head])


def _matrices(file: str) -> Iterator[tuple[str, tuple[str, int, int, int]]]:
    """Name and place of a safetensors file's weights that fill whole panels."""
    size = os.path.getsize(file)
    with open(file, "rb") as opened:
        start = 8 + int.from_bytes(opened.read(8), "little")
        if start > size:
            raise ValueError(f"{file} is no safetensors file")
        header = json.loads(opened.read(start - 8))
    for key, entry in header.items():
        if key == "__metadata__" or entry["dtype"] != "BF16" or len(entry["shape"]) != 2:
            continue
        (n, k), (first, end) = entry["shape"], entry["data_offsets"]
        if min(n, k, first) < 0 or end - first != 2 * n * k or start + end > size:
            raise ValueError(f"{file}: {key} is not where it should be")
        if n and k and n % PANEL == 0 and k % 2 == 0:
            yield key, (file, start + first, n, k)
