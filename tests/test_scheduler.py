"""Scheduler: a fuzz against a model of the KV cache that knows what every slot must hold, and the promises one by one.

The fuzz includes forks, beam searches whose beams branch and die, drafts that are kept in part, stops, aborts and adapters, and
steps that overlap: their tokens are told one step late.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from swiftlite.engine.beam import BeamSearch
from swiftlite.engine.blocks import BlockPool
from swiftlite.engine.request import SamplingParams
from swiftlite.engine.sampler import SamplingState
from swiftlite.engine.scheduler import PROMPT_LOGPROBS_CHUNK, Scheduler
from swiftlite.engine.sequence import Request, Sequence
from swiftlite.engine.spec import NgramIndex, count_accepted

BLOCK = 4
END = 9  # ends a beam


@dataclass
class World:
    """A scheduler, the requests in it, and a KV cache whose slots remember which prefix they were computed for."""

    num_blocks: int = 24
    kernels: None = None
    max_num_seqs: int = 8
    budget: int = 16
    caching: bool = True
    speculate: int = 0
    alone: int = 0
    overlap: bool = False
    stops: float = 0.0  # how often a token ends its answer
    drawn: list[tuple[Sequence, int]] = field(default_factory=list)  # tokens of the last step that are not in token_ids yet
    dropped: int = 0  # rows that were computed for answers which had ended
    slots: dict[int, tuple] = field(default_factory=dict)
    numbers: itertools.count = field(default_factory=itertools.count)
    chance: random.Random = field(default_factory=lambda: random.Random(0))  # of beams and of drafts' verdicts

    def __post_init__(self) -> None:
        self.pool = BlockPool(self.num_blocks, BLOCK, self.caching)
        self.scheduler = Scheduler(self.pool, self.max_num_seqs, self.budget, self.speculate, self.alone)
        self.proposed = self.accepted = self.searches = 0
        self.live: list[Request] = []
        self.admitted: list[Sequence] = []  # in order of their first step

    def add(
        self,
        prompt: list[int],
        answer: int = 4,
        n: int = 1,
        adapter: str | None = None,
        prompt_logprobs: bool = False,
        beams: int = 0,
    ) -> Request:
        version = SimpleNamespace(digest=adapter) if adapter else None
        number = next(self.numbers)
        params = SamplingParams(n=n, use_beam_search=True, best_of=beams) if beams else SamplingParams(n=n)
        request = Request(str(number), None, prompt, params, version, frozenset([END] if beams else []), 0.0, None)
        request.siblings_pending = n > 1 and not beams
        request.prompt_logprobs = [None] if prompt_logprobs else None

        def sequence(index: int) -> Sequence:
            state = SamplingState(params, prompt, index)
            return Sequence(request, index, list(prompt), len(prompt), len(prompt) + answer, version, state, None, number * 1000 + index)

        request.sequences = [sequence(index) for index in range(n)]
        if beams:
            request.beam = BeamSearch(request, sequence(0))
        elif self.speculate:
            for seq in request.sequences:
                seq.ngrams = NgramIndex(prompt, self.speculate)
        self.live.append(request)
        self.scheduler.add(request.beam.beams[0] if beams else request.sequences[0])
        return request

    def abort(self, request: Request) -> None:
        if request.beam is not None:
            self.scheduler.remove(request.beam.beams)
        live = [seq for seq in request.sequences if seq.finish_reason is None]
        self.scheduler.remove(live)
        for seq in live:
            seq.finish_reason = "abort"
        self.live.remove(request)

    def step(self, token=lambda seq: 1) -> list:
        """One step of the loop, with every check that can be made."""
        answers = {id(seq) for seq in self.scheduler.running if not seq.paused and seq.total - seq.num_computed == 1}
        batch = self.scheduler.schedule()
        assert batch or self.scheduler.idle or self.drawn, "work is left, but nothing runs"
        waited_for = any(id(item.seq) in answers for item in batch)
        assert sum(item.count for item in batch) <= (self.budget if waited_for else max(self.budget, self.alone))
        assert len(self.scheduler.running) <= self.max_num_seqs
        self.scheduler.check()
        copied = {}
        for source, copy in self.scheduler.copies:
            assert copy not in copied
            copied[copy] = [self.slots.get(source * BLOCK + i) for i in range(BLOCK)]
        for copy, content in copied.items():
            for i, value in enumerate(content):
                self.slots[copy * BLOCK + i] = value
        written = set()
        for item in batch:  # first every read of old content, then the writes, as in a forward pass
            self.expect(item.seq, 0, item.start)
        for item in batch:
            assert item.count > 0 and item.start == item.seq.num_computed
            assert item.rows >= (item.start + item.count == item.seq.total)
            assert item.seq.finish_reason is None
            assert item.start + item.count < item.seq.max_len, "the last token by length needs no forward"
            for position in range(item.start, item.start + item.count):
                slot = self.slot(item.seq, position)
                assert slot not in written, "two sequences write one slot"
                written.add(slot)
                self.slots[slot] = self.key(item.seq, position, item.draft)
        for item in batch:
            self.expect(item.seq, 0, item.start + item.count, item.draft)
        allocated, empty = self.scheduler.count_slots()
        assert 0 <= empty <= allocated == BLOCK * (self.num_blocks - self.pool.num_free)
        self.read()
        self.scheduler.check()
        self.finish(batch, token)
        self.scheduler.check()
        return batch

    def key(self, seq: Sequence, position: int, draft=()) -> tuple:
        late = [self.drawn[seq.late][1]] if seq.late >= 0 else []
        return (seq.adapter.digest if seq.adapter else None, *[*seq.token_ids, *late, *draft][: position + 1])

    def take(self, tokens: list[tuple[Sequence, int]]) -> None:
        """Give each sequence its token; end those that are done."""
        ended = []
        for seq, token in tokens:
            if seq.finish_reason is not None:  # aborted meanwhile
                continue
            seq.token_ids.append(token)
            if len(seq.token_ids) >= seq.max_len:
                seq.finish_reason = "length"
            elif self.chance.random() < self.stops:
                seq.finish_reason = "stop"
            if seq.finish_reason is not None:
                ended.append(seq)
        self.scheduler.remove(ended)

    def read(self) -> None:
        """The last step's tokens come to be known."""
        tokens, self.drawn = self.drawn, []
        for seq, _ in tokens:
            seq.late = -1
        self.take(tokens)

    def leave(self, tokens: list[tuple[Sequence, int]]) -> None:
        self.drawn = tokens
        for place, (seq, _) in enumerate(tokens):
            seq.late = place
        self.scheduler.remove([seq for seq, _ in tokens if seq.total >= seq.max_len])

    def slot(self, seq: Sequence, position: int) -> int:
        return seq.block_table[position // BLOCK] * BLOCK + position % BLOCK

    def expect(self, seq: Sequence, start: int, end: int, draft=()) -> None:
        for position in range(start, end):
            assert self.slots.get(self.slot(seq, position)) == self.key(seq, position, draft), "a sequence reads K/V that is not its own"

    def finish(self, batch, token) -> None:
        ended, drawn = [], []
        for item in batch:
            seq, request = item.seq, item.seq.request
            if seq not in self.admitted:
                self.admitted.append(seq)
            if seq.finish_reason is not None:
                self.dropped += 1
                continue
            self.scheduler.done(item)
            if request.prompt_logprobs is not None and seq.index == 0:
                first = item.start + item.count - item.rows
                known = len(request.prompt_logprobs)
                assert known == seq.prompt_len or first <= known - 1, "a prompt row was left out"
                request.prompt_logprobs += [0] * (min(item.start + item.count + 1, seq.prompt_len) - known)
            if item.start + item.count < len(seq.token_ids):
                continue
            if request.beam is not None:
                self.search(seq)
                continue
            if item.draft:
                tokens = [token(seq) if self.chance.random() < 0.3 else guess for guess in item.draft] + [token(seq)]
                kept = count_accepted(item.draft, tokens)
                self.proposed, self.accepted = self.proposed + len(item.draft), self.accepted + kept
                seq.token_ids += tokens[: kept + 1]
                if len(seq.token_ids) >= seq.max_len:
                    seq.finish_reason = "length"
                    ended.append(seq)
                else:
                    self.scheduler.keep(seq)
                    seq.ngrams.learn(len(item.draft), kept, self.speculate)
                continue
            group = [seq]
            if request.siblings_pending:
                request.siblings_pending = False
                group += [sibling for sibling in request.sequences[1:] if self.scheduler.fork(seq, sibling)]
            drawn += [(one, token(one)) for one in group]
        self.scheduler.remove(ended)
        (self.leave if self.overlap else self.take)(drawn)
        self.live = [request for request in self.live if not all(seq.finish_reason for seq in request.sequences)]

    def search(self, beam: Sequence) -> None:
        """Continuations with random scores, so that beams branch, die and end at random."""
        request, rng = beam.request, self.chance
        scores = sorted((rng.uniform(-5, 0) for _ in range(request.beam.candidates)), reverse=True)
        tokens = [END if rng.random() < 0.1 else rng.randrange(3) for _ in scores]
        if request.beam.take(beam, tokens, scores):
            lengths = {len(one.token_ids) for one in request.beam.beams}
            assert len(lengths) == 1, "beams are equally long"
            if not request.beam.advance(self.scheduler):
                self.searches += 1
                request.beam.settle()

    def run(self, most: int = 10_000, token=lambda seq: 1) -> int:
        for steps in range(most):
            if self.scheduler.idle and not self.drawn:
                assert not self.live and self.pool.num_free == self.num_blocks
                return steps
            self.step(token)
        raise AssertionError("no end in sight")


@pytest.mark.parametrize("overlap", [False, True], ids=["in turn", "overlap"])
@pytest.mark.parametrize("seed", range(10))
def test_fuzz(seed: int, overlap: bool):
    """Thousands of steps with forks, beams, drafts, aborts at any stage, adapters, shared prefixes and too few blocks."""
    rng = random.Random(seed)
    world = World(
        num_blocks=rng.choice([12, 20, 40]),
        max_num_seqs=rng.choice([3, 8]),
        budget=rng.choice([5, 16, 64]),
        caching=rng.random() < 0.8,
        speculate=0 if overlap else rng.choice([0, 3, 6]),
        overlap=overlap,
        stops=0.05,
        alone=rng.choice([0, 100]),
    )
    room = world.num_blocks * BLOCK
    stems = [[rng.randrange(5) for _ in range(16)] for _ in range(3)]
    forks = 0
    for _ in range(1500):
        if len(world.live) < 12 and rng.random() < 0.3:
            prompt = rng.choice(stems)[: rng.randint(0, 16)] + [rng.randrange(5) for _ in range(rng.randint(1, 12))]
            answer = rng.randint(1, min(20, room - len(prompt)))
            n = rng.choice([1, 1, 1, 2, 4])
            forks += n > 1
            beams = rng.choice([0, 0, 0, n, n + 2])
            world.add(prompt, answer, n, rng.choice([None, None, "a", "b"]), prompt_logprobs=rng.random() < 0.1, beams=beams)
        if world.live and rng.random() < 0.04:
            world.abort(rng.choice(world.live))
        if not world.scheduler.idle or world.drawn:
            world.step(lambda seq: rng.randrange(3))
    world.run(token=lambda seq: rng.randrange(3))
    assert forks > 20 and world.searches > 20 and (world.dropped > 20) == overlap
    assert (0 < world.accepted < world.proposed) == bool(world.speculate)
    if world.num_blocks == 12 and world.max_num_seqs == 8:
        assert world.scheduler.num_preemptions > 0


def test_running_answers_get_a_token_every_step_while_a_long_prompt_arrives():
    world = World(num_blocks=100, budget=8)
    first = world.add([1, 2, 3], answer=40)
    world.step()
    world.add(list(range(80)), answer=2)
    for _ in range(10):
        before = len(first.sequences[0].token_ids)
        batch = world.step()
        assert len(first.sequences[0].token_ids) == before + 1
        assert sum(item.count for item in batch) == 8, "the budget is used up"
    world.run()


def test_a_step_that_nobody_waits_for_may_be_longer():
    world = World(num_blocks=100, budget=8, alone=50)
    world.add(list(range(80)), answer=3)
    assert [sum(item.count for item in world.step()) for _ in range(3)] == [50, 30, 1]
    world.add(list(range(100, 130)), answer=1)
    assert sum(item.count for item in world.step()) == 8
    world.run()


def test_everything_in_one_step_when_the_budget_allows():
    world = World(num_blocks=100, budget=64)
    for length in (5, 9, 20):
        world.add(list(range(length)))
    batch = world.step()
    assert [item.count for item in batch] == [5, 9, 20] and [item.rows for item in batch] == [1, 1, 1]


def test_out_of_blocks_preempts_the_youngest_and_everything_ends():
    world = World(num_blocks=8, max_num_seqs=4, budget=64)
    requests = [world.add([i] * 7, answer=20) for i in range(4)]
    oldest = requests[0].sequences[0]
    while oldest.finish_reason is None:
        assert oldest in [item.seq for item in world.step()], "the oldest is never preempted"
    assert world.scheduler.num_preemptions > 0
    world.run()
    assert all(len(request.sequences[0].token_ids) == 27 for request in requests)


def test_two_half_computed_prompts_that_fill_the_cache_do_not_deadlock():
    world = World(num_blocks=10, budget=8, caching=False)
    world.add([1] * 3, answer=30)
    world.step()
    world.add([2] * 24, answer=10)
    world.add([3] * 24, answer=10)
    assert world.run() < 200


def test_siblings_share_the_prompt():
    world = World(num_blocks=40, max_num_seqs=8, budget=64)
    request = world.add(list(range(18)), answer=6, n=4)
    world.step(lambda seq: seq.index)
    used = world.num_blocks - world.pool.num_free
    assert used == 5, "four answers, one prompt of five blocks"
    world.step(lambda seq: seq.index)
    assert len(world.scheduler.copies) == 3, "the partial block is copied for all but its last holder"
    assert world.num_blocks - world.pool.num_free == 4 + 4
    tables = [seq.block_table for seq in request.sequences]
    assert all(table[:4] == tables[0][:4] for table in tables) and len({table[4] for table in tables}) == 4
    world.run()


@pytest.mark.parametrize("num_blocks", [6, 7, 9])
def test_siblings_that_cannot_all_copy_are_preempted(num_blocks):
    world = World(num_blocks=num_blocks, max_num_seqs=8, budget=64)
    request = world.add(list(range(18)), answer=6, n=4)
    world.run(token=lambda seq: seq.index)
    assert [seq.token_ids[18:] for seq in request.sequences] == [[index] * 6 for index in range(4)]
    assert world.scheduler.num_preemptions > 0


def test_siblings_without_a_seat_wait():
    world = World(max_num_seqs=2, budget=64)
    request = world.add(list(range(10)), answer=3, n=5)
    world.run()
    assert all(len(seq.token_ids) == 13 for seq in request.sequences)


@pytest.mark.parametrize("popular", [None, "a"])
def test_a_rare_adapter_waits_for_its_turn_only(popular):
    world = World(max_num_seqs=2, budget=64)
    for _ in range(100):
        world.add([1, 2, 3], answer=3, adapter=popular)
    world.step()
    rare = [world.add([4, 5], answer=3, adapter="rare") for _ in range(2)]
    world.run()
    order = [seq.request for seq in world.admitted]
    assert order.index(rare[0]) <= 2 + 2 and order.index(rare[1]) <= 2 + 4


def test_a_big_request_is_not_overtaken_for_ever():
    world = World(num_blocks=10, max_num_seqs=4, budget=64)
    for _ in range(3):
        world.add([1] * 4, answer=4)
    world.step()
    big = world.add([2] * 36, answer=2)
    small = [world.add([3] * 4, answer=4) for _ in range(30)]
    world.run()
    order = [seq.request for seq in world.admitted]
    assert order.index(big) < order.index(small[0])


def test_a_second_request_with_the_same_prompt_is_cached():
    world = World(budget=64)
    world.add(list(range(11)))
    world.run()
    again = world.add(list(range(11)))
    batch = world.step()
    assert again.sequences[0].num_cached == 8 and batch[0].count == 3
    other = world.add(list(range(11)), adapter="a")
    world.step()
    assert other.sequences[0].num_cached == 0
    scored = world.add(list(range(11)), prompt_logprobs=True)
    assert world.step()[-1].rows == 11 and scored.sequences[0].num_cached == 0
    world.run()


def test_prompt_logprobs_hold_few_rows_at_once():
    world = World(num_blocks=300, budget=2000)
    world.add([1] * 1000, prompt_logprobs=True)
    assert [item.rows for item in world.step()] == [PROMPT_LOGPROBS_CHUNK]
    assert world.run() < 10


def test_budget_smaller_than_the_seats_still_serves_all():
    world = World(num_blocks=50, max_num_seqs=8, budget=2)
    requests = [world.add([i, i, i], answer=5) for i in range(6)]
    world.run()
    assert all(len(request.sequences[0].token_ids) == 8 for request in requests)


def test_empty_slots_are_counted_once():
    world = World(num_blocks=40, budget=64)
    world.add(list(range(5)), answer=6)
    world.step()
    assert world.scheduler.count_slots() == (8, 3)
    world.add(list(range(10, 16)), answer=6, n=4)
    world.step(lambda seq: seq.index)
    assert world.scheduler.count_slots() == (8 + 8, 2 + 2), "four siblings share one half-filled block"
    world.run(token=lambda seq: seq.index)
    assert world.scheduler.count_slots() == (0, 0)
