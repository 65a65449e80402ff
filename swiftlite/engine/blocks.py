"""The pool of KV blocks: who holds which block, which blocks hold reusable prefixes, which one goes next.

Invariants (`check`): a block's reference count is the number of block-table entries that name it; a block is either free (no
reference) or used; a free block may still be *cached*, i.e. found by its hash until it is handed out again, least recently used
first; a cached block is full and never written; a block that is written has exactly one reference.

A full block's digest chains over everything before it: sha256(parent digest, its tokens), seeded by the adapter's weights and a
salt of this pool, so other adapters, other weights under the same name and other pools never meet. The tokens are stored and
compared on a hit as well.

It does not know sequences, the scheduler or tensors.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable


class BlockPool:
    """Counts references to `num_blocks` blocks of `block_size` tokens and finds cached prefixes."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.num_blocks, self.block_size, self.caching = num_blocks, block_size, enable_prefix_caching
        self.refs = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # front is handed out next
        self._by_digest: dict[bytes, int] = {}
        self._digest: list[bytes | None] = [None] * num_blocks
        self._tokens: list[bytes] = [b""] * num_blocks
        self._root: list[bytes] = [b""] * num_blocks
        self._by_root: dict[bytes, set[int]] = {}
        self._salt = os.urandom(16)

    @property
    def num_free(self) -> int:
        """Blocks without a reference, cached ones included."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that a prefix can be found in."""
        return len(self._by_digest)

    # -- prefixes

    def root(self, adapter_digest: str | None, salt: str = "") -> bytes:
        """Digest that an empty prefix starts from."""
        return hashlib.sha256(self._salt + repr((adapter_digest, salt)).encode()).digest()

    def _chain(self, parent: bytes, tokens: list[int], start: int) -> tuple[bytes, bytes]:
        content = array("q", tokens[start : start + self.block_size]).tobytes()
        return hashlib.sha256(parent + content).digest(), content

    def match(self, root: bytes, tokens: list[int]) -> tuple[list[int], list[bytes]]:
        """The cached blocks that `tokens` begins with, and their digests. No reference is taken.

        The last token is never matched: at least one token must be computed to get logits.
        """
        blocks: list[int] = []
        digests: list[bytes] = []
        if self.caching:
            for start in range(0, len(tokens) - self.block_size, self.block_size):
                digest, content = self._chain(digests[-1] if digests else root, tokens, start)
                block = self._by_digest.get(digest)
                if block is None or self._tokens[block] != content:
                    break
                blocks.append(block)
                digests.append(digest)
        return blocks, digests

    def register(self, root: bytes, tokens: list[int], table: list[int], digests: list[bytes], num_computed: int) -> None:
        """Make newly filled blocks of `table` findable; appends their digests to `digests` (one for each block known so far)."""
        if not self.caching:
            return
        for index in range(len(digests), num_computed // self.block_size):
            digest, content = self._chain(digests[-1] if digests else root, tokens, index * self.block_size)
            digests.append(digest)
            block = table[index]
            if digest not in self._by_digest:  # else another sequence computed the same prefix at the same time; one copy is enough
                self._by_digest[digest] = block
                self._digest[block], self._tokens[block], self._root[block] = digest, content, root
                self._by_root.setdefault(root, set()).add(block)

    # -- references

    def allocate(self, count: int) -> list[int]:
        """`count` writable blocks (the caller has looked at num_free); cached content is forgotten, oldest first."""
        assert count <= len(self._free), f"{count} blocks asked, {len(self._free)} free"
        blocks = []
        for _ in range(count):
            block, _none = self._free.popitem(last=False)
            self._forget(block)
            self.refs[block] = 1
            blocks.append(block)
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """One more reference to each block: a prefix hit, or a fork."""
        refs, free = self.refs, self._free
        for block in blocks:
            if refs[block] == 0:
                del free[block]
            refs[block] += 1

    def release(self, blocks: list[int]) -> None:
        """One reference less to each block. The end of a prefix is forgotten before its beginning."""
        refs, free = self.refs, self._free
        for block in reversed(blocks):
            refs[block] -= 1
            assert refs[block] >= 0, f"block {block} released too often"
            if refs[block] == 0:
                free[block] = None
                if self._digest[block] is None:
                    free.move_to_end(block, last=False)

    def num_unused(self, blocks: list[int]) -> int:
        """How many of these blocks are free now (sharing them takes them from the free ones)."""
        refs = self.refs
        return sum(refs[block] == 0 for block in blocks)

    def make_writable(self, table: list[int], index: int) -> tuple[int, int] | None:
        """Copy-on-write: if table[index] is shared, swap in a fresh block and return (source, copy); needs one free block then."""
        block = table[index]
        if self.refs[block] == 1:
            return None
        (copy,) = self.allocate(1)
        self.refs[block] -= 1
        table[index] = copy
        return block, copy

    def forget_prefixes(self) -> None:
        """Drop every cached prefix (blocks in use stay in use)."""
        for block in list(self._by_digest.values()):
            self._forget(block)

    def forget(self, root: bytes, tokens: list[int]) -> None:
        """Drop the cached blocks that `tokens` begins with; those are handed out before others."""
        digest = root
        for start in range(0, len(tokens) - self.block_size + 1, self.block_size):
            digest, _ = self._chain(digest, tokens, start)
            if (block := self._by_digest.get(digest)) is not None:
                self._forget_soon_used(block)

    def forget_root(self, root: bytes) -> None:
        """Drop the cached prefixes of one adapter; those blocks are handed out before others."""
        for block in list(self._by_root.get(root, ())):
            self._forget_soon_used(block)

    def _forget_soon_used(self, block: int) -> None:
        self._forget(block)
        if self.refs[block] == 0:
            self._free.move_to_end(block, last=False)

    def _forget(self, block: int) -> None:
        digest = self._digest[block]
        if digest is not None:
            mine = self._by_root[self._root[block]]
            mine.remove(block)
            if not mine:
                del self._by_root[self._root[block]]
            del self._by_digest[digest]
            self._digest[block], self._tokens[block] = None, b""

    def check(self, tables: Iterable[tuple[list[int], int]]) -> None:
        """AssertionError unless all references are those of `tables`: (block table, first token that will still be written)."""
        held: Counter[int] = Counter()
        writable: set[int] = set()
        for table, written_from in tables:
            held.update(table)
            writable.update(table[-(-written_from // self.block_size) :])  # a shared partial block is copied before it is written
        for block, count in enumerate(self.refs):
            assert count == held[block], f"block {block}: {count} references, {held[block]} table entries"
            assert (count == 0) == (block in self._free), f"block {block}: {count} references, free: {block in self._free}"
        assert len(self._free) + len(held) == self.num_blocks, "free and used blocks do not add up"
        for block in writable:
            assert self.refs[block] == 1, f"block {block} is shared and writable"
            assert self._digest[block] is None, f"block {block} is cached and writable"
        for digest, block in self._by_digest.items():
            assert self._digest[block] == digest, f"block {block} is cached under another digest"
            assert block in self._by_root[self._root[block]], f"block {block} is cached, but not with its adapter's"
        assert sum(map(len, self._by_root.values())) == len(self._by_digest), "adapters' cached blocks do not add up"
