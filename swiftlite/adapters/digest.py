"""What an adapter is, in 32 bytes: equal weights and equal arithmetic, equal digest; nobody can make two that meet.

A file's bytes are dealt out to sixteen lanes, word by word, and each lane is hashed by BLAKE2s: a CPU's vectors then hash all lanes at
once (lora_files.cpp: 40 MB in 6 ms on one core, sha256 takes 20). `lanes` says the same with hashlib, for machines without a compiler and
for tests. A thread of its own hashes while the caller goes on. It knows bytes, not what they mean.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable

import numpy as np

LANES, BLOCK = 16, 1024  # bytes that all lanes take in one round: 64 each
PIECE = 1 << 23  # bytes that `lanes` holds a second time
Lanes = Callable[[memoryview], bytes]  # data -> the digests of the lanes, one after the other


def lanes(data: memoryview) -> bytes:
    """512 bytes: word i of the data (little-endian, 4 bytes, zeros up to a whole block) belongs to lane i % 16."""
    hashes = [hashlib.blake2s() for _ in range(LANES)]
    for start in range(0, max(len(data), 1), PIECE):
        piece = np.frombuffer(data[start : start + PIECE], np.uint8)
        whole = np.zeros(max(1, -(-len(piece) // BLOCK)) * BLOCK, np.uint8)
        whole[: len(piece)] = piece
        for lane, words in zip(hashes, np.ascontiguousarray(whole.view("<u4").reshape(-1, LANES).T), strict=True):
            lane.update(words)
    return b"".join(lane.digest() for lane in hashes)


class Hashing:
    """The digest of `first` (small), then `data`. It begins at once, in another thread."""

    def __init__(self, first: bytes, data: memoryview, way: Lanes = lanes) -> None:
        self._first, self._data, self._way = first, data, way
        self._digest: str | Exception = ""
        self._thread = threading.Thread(target=self._run, name="adapter-digest", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        size = len(self._data).to_bytes(8, "little")
        try:
            self._digest = hashlib.sha256(hashlib.sha256(self._first).digest() + size + self._way(self._data)).hexdigest()
        except Exception as error:  # out of memory: nobody may take what is there for a digest
            self._digest = error
        self._data = memoryview(b"")

    def result(self) -> str:
        """64 hexadecimal digits. Raises what went wrong."""
        self._thread.join()
        if isinstance(self._digest, Exception):
            raise self._digest
        return self._digest
