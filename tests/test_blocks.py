"""BlockPool: prefixes are found again, never by the wrong owner; references add up; sharing copies before it writes."""

from __future__ import annotations

import random

import pytest

from swiftlite.engine.blocks import BlockPool


def fill(pool: BlockPool, root: bytes, tokens: list[int]) -> tuple[list[int], list[bytes]]:
    """Take blocks for `tokens` as if they were computed; returns table and digests."""
    table, digests = pool.match(root, tokens)
    pool.share(table)
    table += pool.allocate(-(-len(tokens) // pool.block_size) - len(table))
    pool.register(root, tokens, table, digests, len(tokens))
    return table, digests


def test_prefix_is_found_up_to_the_last_token():
    pool = BlockPool(16, 4)
    root = pool.root(None)
    table, _ = fill(pool, root, list(range(10)))
    assert pool.match(root, list(range(10)))[0] == table[:2]
    assert pool.match(root, [*range(8), 99])[0] == table[:2]
    assert pool.match(root, list(range(8)))[0] == table[:1], "the last token must be left to compute"
    assert pool.match(root, [0, 1, 2, 3, 4, 5, 6, 99, 8])[0] == table[:1]
    assert pool.match(root, [9, *range(1, 10)])[0] == []


def test_prefixes_of_adapters_and_salts_never_meet():
    pool = BlockPool(16, 4)
    fill(pool, pool.root("digest-a"), list(range(9)))
    for other in (pool.root(None), pool.root("digest-b"), pool.root("digest-a", salt="tenant"), BlockPool(4, 4).root("digest-a")):
        assert pool.match(other, list(range(9)))[0] == []
    assert len(pool.match(pool.root("digest-a"), list(range(9)))[0]) == 2


def test_equal_digests_do_not_serve_other_tokens():
    """A hash collision, forced: the stored tokens are compared too."""
    pool = BlockPool(8, 4)
    root = pool.root(None)
    table, _ = fill(pool, root, list(range(8)))
    pool._by_digest[pool._chain(root, [7, 7, 7, 7], 0)[0]] = table[0]
    assert pool.match(root, [7, 7, 7, 7, 7])[0] == []


def test_freed_blocks_stay_findable_until_they_are_needed_oldest_first():
    pool = BlockPool(6, 4)
    root = pool.root(None)
    first, second = fill(pool, root, [1] * 8)[0], fill(pool, root, [2] * 8)[0]
    pool.release(first)
    pool.release(second)
    assert pool.num_free == 6 and pool.num_cached == 4
    blocks = pool.allocate(3)  # two never used blocks, then the end of the oldest prefix
    assert blocks[2] == first[1]
    assert pool.match(root, [1] * 9)[0] == first[:1]
    assert pool.match(root, [2] * 9)[0] == second
    pool.check([(blocks, 0)])


def test_sharing_takes_a_cached_block_out_of_the_free_ones():
    pool = BlockPool(4, 4)
    root = pool.root(None)
    table, _ = fill(pool, root, [5] * 8)
    pool.release(table)
    found, _ = pool.match(root, [5] * 9)
    assert pool.num_unused(found) == 2
    pool.share(found)
    assert pool.num_free == 2 and pool.num_unused(found) == 0
    with pytest.raises(AssertionError):
        pool.allocate(3)


def test_a_shared_block_is_copied_before_it_is_written():
    pool = BlockPool(8, 4)
    table = pool.allocate(2)
    fork = list(table)
    pool.share(fork)
    source, copy = pool.make_writable(fork, 1)
    assert (source, fork) == (table[1], [table[0], copy]) and copy not in table
    assert pool.make_writable(table, 1) is None, "the last holder writes in place"
    pool.check([(table, 6), (fork, 6)])
    pool.release(table)
    pool.release(fork)
    assert pool.num_free == 8


def test_check_finds_leaks_and_shared_writable_blocks():
    pool = BlockPool(8, 4)
    table = pool.allocate(2)
    with pytest.raises(AssertionError, match="references"):
        pool.check([])
    pool.share(table)
    with pytest.raises(AssertionError, match="shared and writable"):
        pool.check([(table, 0), (list(table), 0)])


def test_caching_off_finds_nothing():
    pool = BlockPool(8, 4, enable_prefix_caching=False)
    root = pool.root(None)
    fill(pool, root, list(range(9)))
    assert pool.match(root, list(range(9))) == ([], []) and pool.num_cached == 0


@pytest.mark.parametrize("seed", range(3))
def test_random_use_keeps_the_books(seed: int):
    rng = random.Random(seed)
    pool = BlockPool(24, 4)
    live: list[list[int]] = []
    contents: dict[int, tuple] = {}  # block -> what was computed into it, by prefix
    for _ in range(3000):
        if live and rng.random() < 0.5:
            pool.release(live.pop(rng.randrange(len(live))))
            continue
        root, name = (pool.root(None), "base") if rng.random() < 0.5 else (pool.root("a"), "a")
        tokens = [rng.randrange(2) for _ in range(rng.randint(1, 20))]
        found, digests = pool.match(root, tokens)
        for index, block in enumerate(found):
            assert contents[block] == (name, tuple(tokens[: 4 * index + 4])), "a hit must hold exactly this prefix"
        need = -(-len(tokens) // 4) - len(found)
        if need + pool.num_unused(found) > pool.num_free:
            continue
        pool.share(found)
        table = found + pool.allocate(need)
        for index in range(len(tokens) // 4):
            contents[table[index]] = (name, tuple(tokens[: 4 * index + 4]))
        pool.register(root, tokens, table, digests, len(tokens))
        live.append(table)
        pool.check((t, 10**6) for t in live)
    for table in live:
        pool.release(table)
    pool.check([])
    assert pool.num_free == 24
