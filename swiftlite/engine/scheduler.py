"""Who runs in the next step, with how many tokens.

One token budget a step, and a larger one while no answer runs: then nobody waits for the step's end, and a longer one reads the
weights less often. Running answers get their token first, so a long prompt never stalls them; then started prompts go on;
then waiting requests are admitted, a prompt longer than what is left of the budget in chunks. When blocks run out the youngest
running sequence is preempted: its blocks go back and it starts again later from its tokens (what is still cached is found again).

Invariants: at most one admitted prompt is unfinished unless blocks ran short; never more running sequences than budget, so every
answer moves every step; nothing that is already part of the step is preempted; a sequence that is alone always fits (the engine
refuses what never can), so there is no deadlock. A paused sequence (a beam that waits for its siblings) is never part of a step;
it keeps its blocks unless they, or its seat, are the only way for others to move.

Drafts (speculation) ride along with running answers out of what budget and free blocks are left over; they never preempt. What is
computed counts only once it is accepted: until then `num_computed` stays before the drafts, and no prefix is registered.

Fairness: waiting requests queue by adapter (the base is one of them) and the queues take turns, so a request waits for at most
(its place in its own queue) x (number of queues) admissions. The one whose turn it is is never overtaken by a smaller one.
Preempted sequences come before all of them, oldest first.

Where steps overlap, a sequence's newest token may be known to the device only (`Sequence.total`): `schedule` counts it and needs
not know it. When `done` is told of a step, all tokens that the step computed are known.

It does not know tensors, sampling or streams.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from swiftlite.engine.blocks import BlockPool
from swiftlite.engine.sequence import Sequence

PROMPT_LOGPROBS_CHUNK = 256  # prompt tokens whose whole logits rows are held at once


@dataclass(slots=True, eq=False)
class Scheduled:
    """Compute tokens [start, start + count) of `seq`, the last len(draft) of which are guesses; logits of the last `rows` are wanted."""

    seq: Sequence
    start: int
    count: int
    rows: int  # 0: the prompt goes on in the next step; 1: to sample; more: prompt log-probabilities, or drafts to verify
    draft: SequenceOf[int] = ()  # not part of seq.token_ids


class Scheduler:
    """Holds every live sequence, waiting or running, and the blocks they have."""

    def __init__(self, pool: BlockPool, max_num_seqs: int, max_num_batched_tokens: int, speculate: int = 0, alone: int = 0) -> None:
        """`max_num_batched_tokens`: of a step; `alone`: of one without a running answer (at least as many); `speculate`: of a draft."""
        self.pool = pool
        self.budget = max(1, max_num_batched_tokens)
        self._alone = max(self.budget, alone)
        self.max_running = max(1, min(max_num_seqs, self.budget))
        self.running: list[Sequence] = []  # in order of arrival
        self._waiting: OrderedDict[str, deque[Sequence]] = OrderedDict()  # by adapter digest, next turn first
        self._preempted: list[Sequence] = []  # in order of arrival
        self.num_waiting = 0
        self.num_preemptions = 0
        self._speculate_most = speculate  # tokens of a draft
        self._blocked: tuple[Sequence, int] | None = None  # who could not be admitted, with how many free blocks
        self.copies: list[tuple[int, int]] = []  # block copies to make before the step's forward

    @property
    def idle(self) -> bool:
        return not self.running and not self.num_waiting

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence."""
        seq.root = self.pool.root(seq.adapter.digest if seq.adapter else None)
        self._waiting.setdefault(seq.adapter.digest if seq.adapter else "", deque()).append(seq)
        self.num_waiting += 1

    def fork(self, parent: Sequence, child: Sequence) -> bool:
        """Start `child` from everything computed for `parent`, sharing its blocks.

        False when there is no seat, or the parent lost its blocks: the child then waits, and finds the prompt in the prefix cache.
        """
        child.root = parent.root
        if len(self.running) >= self.max_running or not parent.running:
            self._requeue(child)
            return False
        self.pool.share(parent.block_table)
        child.block_table, child.digests = list(parent.block_table), list(parent.digests)
        child.num_computed = parent.num_computed
        child.forked = parent.forked = child.running = True
        self._insert(self.running, child)
        return True

    def resume(self, seq: Sequence) -> None:
        """A paused sequence has its next token."""
        seq.paused = False
        if not seq.running:
            self._requeue(seq)

    def remove(self, sequences: list[Sequence]) -> None:
        """Forget ended sequences, wherever they are, and give their blocks back."""
        for seq in sequences:
            if seq.running:
                seq.running = False
                self.running.remove(seq)
            elif seq in self._preempted:
                self._preempted.remove(seq)
                self.num_waiting -= 1
            else:
                key = seq.adapter.digest if seq.adapter else ""
                queue = self._waiting.get(key)
                if queue is not None and seq in queue:  # a sibling that was never forked is in no queue
                    queue.remove(seq)
                    self.num_waiting -= 1
                    if not queue:
                        del self._waiting[key]
            self._drop_blocks(seq)

    def done(self, item: Scheduled) -> None:
        """The item's tokens are computed: K/V is in its blocks, and newly full blocks can be found. Drafts are left to `keep`."""
        seq = item.seq
        seq.num_computed = item.start + item.count - len(item.draft)
        self._register(seq)

    def keep(self, seq: Sequence) -> None:
        """A draft was verified: the accepted tokens are in seq.token_ids, which the model has seen up to the last but one."""
        seq.num_computed = len(seq.token_ids) - 1
        needed = seq.num_computed // self.pool.block_size + 1  # blocks up to the next token's
        self.pool.release(seq.block_table[needed:])
        del seq.block_table[needed:]
        self._register(seq)

    def _register(self, seq: Sequence) -> None:
        if seq.num_computed // self.pool.block_size > len(seq.digests):
            self.pool.register(seq.root, seq.token_ids, seq.block_table, seq.digests, seq.num_computed)

    def schedule(self) -> list[Scheduled]:
        """The next step; empty only when nothing is left to do. Block tables already cover the scheduled tokens."""
        self.copies = []
        batch: list[Scheduled] = []
        started: list[Sequence] = []  # prompts, or preempted answers, that are not computed up to their last token
        for seq in list(self.running):
            if not seq.running or seq.paused:  # preempted for an older one a moment ago; or a beam that waits for its siblings
                continue
            if seq.total - seq.num_computed > 1:
                started.append(seq)
            elif self._cover(seq, 1):
                batch.append(Scheduled(seq, seq.num_computed, 1, 1))
        left = self.budget - len(batch) if batch else self._alone
        if self._speculate_most:
            left -= self._speculate(batch, left)
        for seq in started:
            if left and seq.running:
                left -= self._chunk(seq, left, batch)
        while left and self.num_waiting:
            seq = self._next_waiting()
            if len(self.running) < self.max_running and self._admit(seq):
                left -= self._chunk(seq, left, batch)
            elif batch or not self._unseat_paused():
                break
        return batch

    def _unseat_paused(self) -> bool:
        """Nothing can run unless a paused sequence gives way: the youngest does."""
        for seq in reversed(self.running):
            if seq.paused:
                self._preempt(seq)
                return True
        return False

    def _speculate(self, batch: list[Scheduled], left: int) -> int:
        """Add drafts to the answers in `batch`; returns the number of tokens."""
        pool, used = self.pool, 0
        for item in batch:
            seq = item.seq
            if seq.ngrams is None or len(seq.token_ids) == seq.prompt_len:
                continue
            spare = max(0, pool.num_free - len(self.running))  # a draft must not cost anyone the next token
            room = (len(seq.block_table) + spare) * pool.block_size - len(seq.token_ids)
            most = min(self._speculate_most, left - used, room, seq.max_len - len(seq.token_ids) - 1)
            draft = seq.ngrams.propose(seq.token_ids, most) if most > 0 else []
            if draft:
                item.draft, item.count, item.rows = draft, 1 + len(draft), 1 + len(draft)
                need = -(-(item.start + item.count) // pool.block_size) - len(seq.block_table)
                if need > 0:
                    seq.block_table.extend(pool.allocate(need))
                used += len(draft)
        return used

    def _chunk(self, seq: Sequence, left: int, batch: list[Scheduled]) -> int:
        """Schedule as much of `seq` as budget and blocks allow; returns the number of tokens."""
        total, start = seq.total, seq.num_computed
        known = seq.request.prompt_logprobs if seq.index == 0 else None
        count = min(total - start, left if known is None else min(left, PROMPT_LOGPROBS_CHUNK))
        room = (len(seq.block_table) + self.pool.num_free) * self.pool.block_size - start
        if room < count and batch:
            count = room  # older ones have their tokens; take what there is and wait
        if count <= 0 or not self._cover(seq, count):
            return 0
        rows = 1 if start + count == total else 0
        if known is not None and len(known) < seq.prompt_len:  # logits at position p say how likely token p + 1 was
            rows = max(rows, min(count, start + count - (len(known) - 1)))
        batch.append(Scheduled(seq, start, count, rows))
        return count

    def _cover(self, seq: Sequence, count: int) -> bool:
        """Give `seq` blocks for `count` more tokens, preempting younger sequences; False when `seq` itself is the youngest."""
        pool, table = self.pool, seq.block_table
        copy = seq.forked and seq.num_computed % pool.block_size != 0 and pool.refs[table[seq.num_computed // pool.block_size]] > 1
        need = -(-(seq.num_computed + count) // pool.block_size) - len(table)
        if need > 0 or copy:
            while pool.num_free < max(need, 0) + copy:
                victim = self.running[-1]  # never part of this step: those that are, are older than `seq`
                assert victim is not seq or len(self.running) > 1, "a sequence that is alone must fit"
                self._preempt(victim)
                if victim is seq:
                    return False
                # the victim may have been the other holder of the shared block
                copy = copy and pool.refs[table[seq.num_computed // pool.block_size]] > 1
            if copy:
                pair = pool.make_writable(table, seq.num_computed // pool.block_size)
                assert pair is not None
                self.copies.append(pair)
            if need > 0:
                table.extend(pool.allocate(need))
        seq.forked = False
        return True

    def _preempt(self, seq: Sequence) -> None:
        seq.running = False
        self.running.remove(seq)
        self._drop_blocks(seq)
        if not seq.paused:  # else it is queued when it goes on
            self._requeue(seq)
        self.num_preemptions += 1

    def _requeue(self, seq: Sequence) -> None:
        self._insert(self._preempted, seq)
        self.num_waiting += 1

    def _drop_blocks(self, seq: Sequence) -> None:
        self.pool.release(seq.block_table)
        seq.block_table, seq.digests = [], []
        seq.num_computed, seq.forked = 0, False

    @staticmethod
    def _insert(sequences: list[Sequence], seq: Sequence) -> None:
        index = len(sequences)
        while index and sequences[index - 1].order > seq.order:
            index -= 1
        sequences.insert(index, seq)

    def _next_waiting(self) -> Sequence:
        if self._preempted:
            return self._preempted[0]
        return next(iter(self._waiting.values()))[0]

    def _admit(self, seq: Sequence) -> bool:
        """Move the next waiting sequence to the running ones if its tokens fit beside what runs."""
        pool = self.pool
        if self.running and self._blocked is not None and self._blocked[0] is seq and pool.num_free <= self._blocked[1]:
            return False  # nothing was freed since: spare the hashing
        blocks: list[int] = []
        digests: list[bytes] = []
        if seq.index or seq.request.prompt_logprobs is None:  # prompt log-probabilities need every prompt token computed
            blocks, digests = pool.match(seq.root, seq.token_ids)
        need = -(-seq.total // pool.block_size) - len(blocks)
        # one spare block for each running sequence, so that the newcomer is not preempted right away
        if need + pool.num_unused(blocks) + len(self.running) > pool.num_free and self.running:
            self._blocked = (seq, pool.num_free)
            return False
        self._blocked = None
        pool.share(blocks)
        seq.block_table, seq.digests = blocks, digests
        seq.num_computed = len(blocks) * pool.block_size
        if not seq.num_cached and seq.total == seq.prompt_len:
            seq.num_cached = seq.num_computed
        if self._preempted and self._preempted[0] is seq:
            del self._preempted[0]
        else:
            key, queue = next(iter(self._waiting.items()))
            queue.popleft()
            if queue:
                self._waiting.move_to_end(key)
            else:
                del self._waiting[key]
        self.num_waiting -= 1
        seq.running = True
        self._insert(self.running, seq)
        return True

    def count_slots(self) -> tuple[int, float]:
        """Slots of all blocks in use, and how many of them hold no token (a shared block's count once)."""
        pool = self.pool
        size, refs = pool.block_size, pool.refs
        empty = 0.0
        for seq in self.running:
            table = seq.block_table
            if table:
                empty += (len(table) * size - seq.num_computed) / refs[table[-1]]
        return (pool.num_blocks - pool.num_free) * size, empty

    def check(self) -> None:
        """AssertionError unless blocks and sequences agree (`BlockPool.check`)."""
        self.pool.check((seq.block_table, seq.num_computed) for seq in self.running)
        waiting = [*self._preempted, *(seq for queue in self._waiting.values() for seq in queue)]
        assert len(waiting) == self.num_waiting, f"{len(waiting)} waiting sequences, {self.num_waiting} counted"
        assert not any(seq.block_table for seq in waiting), "a waiting sequence holds blocks"
