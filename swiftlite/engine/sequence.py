"""A request inside the engine: its sequences with their tokens, blocks and sampling state, and who waits for it.

A sequence has three lengths: cached (found in the prefix cache), computed (K and V are in its blocks) and total (its tokens).
Prefill, chunk, decode and cache hit are the same thing with other numbers, so there are no modes.

Where steps overlap (step.py), the newest token may still be on the device only: it counts in `total`, but is not in `token_ids`, so
whoever looks at tokens (streams, the prefix cache, stop rules) never meets one that is not known.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from swiftlite.engine.request import SamplingParams, TokenLogprob

if TYPE_CHECKING:
    from swiftlite.engine.detok import Detokenizer
    from swiftlite.engine.lora import AdapterVersion
    from swiftlite.engine.lora_store import Weights
    from swiftlite.engine.sampler import SamplingState
    from swiftlite.engine.signal import Signal
    from swiftlite.engine.spec import NgramIndex


class Search(Protocol):
    """What a step needs of a request's beam search (beam.py)."""

    beams: list[Sequence]  # that run
    candidates: int  # continuations of each that it wants to see

    def take(self, beam: Sequence, tokens: list[int], values: list[float]) -> bool: ...

    def advance(self, scheduler: Any) -> bool: ...

    def settle(self, reason: str = "length") -> None: ...


@dataclass(slots=True, eq=False)
class Request:
    """One submitted prompt while the loop works on it. Only the loop's thread writes; streams read."""

    id: str
    prompt: str | None
    prompt_ids: list[int]
    params: SamplingParams
    adapter: AdapterVersion | None
    stop_ids: frozenset[int]  # ids that end an answer: end-of-turn ids (unless ignore_eos) and params.stop_token_ids
    arrival: float  # seconds, monotonic
    signal: Signal  # wakes the readers
    sequences: list[Sequence] = field(default_factory=list)
    beam: Search | None = None  # it owns the sequences that run; `sequences` are its answers, empty until its end
    siblings_pending: bool = False  # n > 1 and the first sequence's prompt is not computed yet
    num_cached: int = 0  # prompt tokens found in the prefix cache
    prompt_logprobs: list[TokenLogprob | None] | None = None
    first_token: float = 0.0
    finished_at: float = 0.0
    error: str | None = None
    version: int = 0  # counts changes that a stream may want to show
    seat: Weights | None = None  # of its adapter, while the loop works on it
    finished: bool = False  # set last, after everything it owned is released


@dataclass(slots=True, eq=False)
class Sequence:
    """One answer in the making: `token_ids` holds prompt and answer, `num_computed` of them have their K/V in `block_table`."""

    request: Request
    index: int
    token_ids: list[int]
    prompt_len: int
    max_len: int  # it ends by length when this many tokens are there
    adapter: AdapterVersion | None
    sampling: SamplingState
    detok: Detokenizer
    order: int  # arrival; the youngest (largest) is preempted first
    root: bytes = b""  # seed of the prefix hash: adapter and salt
    block_table: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)  # chained hash of every full computed block
    num_cached: int = 0
    num_computed: int = 0
    running: bool = False
    late: int = -1  # place of its newest token among those that the last step left on the device; -1: all are in token_ids
    paused: bool = False  # a beam whose logits are taken: it goes on once all beams' are
    forked: bool = False  # its partial block may be shared: look before writing
    text_end: int = 0  # answer tokens that are text (the stop token is not)
    logprobs: list[TokenLogprob] | None = None
    cumulative_logprob: float = 0.0
    stop_reason: int | str | None = None
    finish_reason: str | None = None
    ngrams: NgramIndex | None = None  # where drafts come from; None: not speculated

    @property
    def total(self) -> int:
        """How many tokens it has, the one on the device included."""
        return len(self.token_ids) + (self.late >= 0)
