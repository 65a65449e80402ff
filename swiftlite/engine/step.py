"""One step of the engine: schedule, run the model, sample, append, see who is done, wake the readers.

A step's rows of logits belong to answers that get one token, to drafts that are verified (spec.py), to beams (beam.py) and to
prompts. A failing step ends its batch with an error; a row that is not finite ends its request alone.

Steps overlap where a GPU runs them (EngineConfig.overlap). The tokens that a step samples stay on the device; the next step is
scheduled and its forward launched with them from there; only then are they read, appended and shown, while the device works. The
launched step is sampled after that, so penalties, log-probabilities, stop rules, forks and the prefix cache meet known tokens, as
without overlap; only `schedule` and the forward do not. An answer's last token by length is foreseen: nothing more is computed for
it. One that stops for another reason (a stop id or string, an abort, logits that are not finite) may have one more row on its way,
which is dropped. Its blocks are given back at once all the same: whoever gets them writes them in a later step, and the device
keeps the order. Left out: an engine that speculates does not overlap, as drafts are made from known tokens; and beams, prompt
log-probabilities and adapters with an output head of their own have the host wait for their step's forward.

It does not know text (but for stop strings, through the request's detokenizer), threads, or what else a request holds: it is told
how to end and finish one.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from swiftlite.engine.blocks import BlockPool
from swiftlite.engine.config import EngineConfig
from swiftlite.engine.request import TokenLogprob
from swiftlite.engine.sampler import Drawn, Sampler, token_logprobs
from swiftlite.engine.scheduler import Scheduled, Scheduler
from swiftlite.engine.sequence import Request, Sequence
from swiftlite.engine.signal import Signal, wake
from swiftlite.engine.spec import count_accepted
from swiftlite.engine.transfer import to_device
from swiftlite.kernels.steps import Kernels

logger = logging.getLogger("swiftlite.engine")
NOT_FINITE = "the model's logits are not finite (NaN or infinite)"


class Model(Protocol):
    """What the loop needs of `runner.Runner`."""

    num_blocks: int
    kernels: Kernels | None

    def execute(self, scheduled: list[Scheduled], drawn: Tensor | None = None) -> Tensor: ...

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None: ...


@dataclass(slots=True)
class _Rows:
    """Which rows of a step's logits are whose."""

    sequences: list[Sequence] = field(default_factory=list)  # one for each token that is sampled; a draft's sequence several times
    where: list[int] = field(default_factory=list)  # their rows
    drafts: list[tuple[int, Scheduled]] = field(default_factory=list)  # place of a draft's first row in `sequences`
    beams: list[Sequence] = field(default_factory=list)
    beam_where: list[int] = field(default_factory=list)
    best: int = 0  # continuations that the beams want


class Stepper:
    """The scheduler with everything that a step does to its sequences."""

    def __init__(
        self,
        model: Model,
        config: EngineConfig,
        counters: dict[str, float],
        end: Callable[[Request, str, str | None], None],
        finish: Callable[[Request], None],
    ) -> None:
        """`end(request, reason, error)` ends what still goes on of a request, `finish(request)` one whose sequences all ended."""
        self.model, self.config, self.counters, self._end, self._finish = model, config, counters, end, finish
        self.overlap = bool(config.overlap) and not config.speculate_ngram
        self.sampler = Sampler(model.kernels, wait=not self.overlap)
        self.failures = 0  # steps in a row
        self._unread: tuple[list[Sequence], Drawn] | None = None  # what the last step left on the device, and whose it is
        self.scheduler = self._new_scheduler()

    def _new_scheduler(self) -> Scheduler:
        config = self.config
        assert config.max_num_batched_tokens is not None, "the engine sets it"
        pool = BlockPool(self.model.num_blocks, config.block_size, config.enable_prefix_caching)
        return Scheduler(
            pool, config.max_num_seqs, config.max_num_batched_tokens, config.speculate_ngram, config.max_num_prompt_tokens or 0
        )

    def start_over(self) -> None:
        """Forget all sequences and blocks."""
        self.counters["preemptions"] += self.scheduler.num_preemptions
        self.scheduler, self._unread = self._new_scheduler(), None

    @property
    def idle(self) -> bool:
        """Nothing is left to run or to read."""
        return self.scheduler.idle and self._unread is None

    def count_failure(self) -> None:
        self.failures += 1
        self.counters["failed_steps"] += 1

    def _fail(self, sequences: list[Sequence], error: Exception) -> None:
        logger.exception("a step failed; its %d requests end with an error", len(sequences))
        self.count_failure()
        for seq in sequences:
            self._end(seq.request, "error", f"the step failed: {type(error).__name__}: {error}")

    def _end_not_finite(self, request: Request) -> None:
        """End a request whose logits are no numbers, and forget what it computed.

        A token that gives NaN spoils the keys and values of those before it too (in attention's products a weight of 0 times NaN is
        NaN), so others would meet it in a prefix that does not hold the token. A request that took that prefix before this was seen ends in
        the same way.
        """
        for seq in (*request.sequences, *(request.beam.beams if request.beam is not None else ())):
            self.scheduler.pool.forget(seq.root, seq.token_ids)
        self._end(request, "error", NOT_FINITE)

    def step(self) -> None:
        """One step, or the reading of the last one's tokens where nothing else is left to do."""
        scheduler = self.scheduler
        batch = scheduler.schedule()
        if not batch:
            assert self._unread is not None, "there is work, but nothing was scheduled"
            self._read()
            return
        self.counters["steps"] += 1
        try:
            if scheduler.copies:
                self.model.copy_blocks(scheduler.copies)
            if self._unread is None:
                logits = self.model.execute(batch)  # [S, V]
            else:
                logits = self.model.execute(batch, self._unread[1].tokens)
        except Exception as error:
            self._read()
            self._fail([item.seq for item in batch], error)
            return
        self._read()  # while the device works
        drawn: Drawn | None = None
        try:
            rows = self._rows(batch, logits)
            allocated, empty = scheduler.count_slots()
            self.counters["allocated_slots"] += allocated
            self.counters["empty_slots"] += empty
            best = self.sampler.best(logits[rows.beam_where], [b.sampling for b in rows.beams], rows.best) if rows.beams else None
            if rows.where:
                if rows.where != list(range(len(logits))):
                    # some rows are of prompts, of beams, of sequences that ended, or of siblings that start together
                    logits = logits.index_select(0, to_device(rows.where, torch.int64, logits.device))
                drawn = self.sampler.draw(logits, [seq.sampling for seq in rows.sequences])
            tokens, logprobs = drawn.read() if drawn is not None and not self.overlap else ([], [])
        except Exception as error:
            self._fail([item.seq for item in batch], error)
            return
        if best is not None:
            self._search(rows.beams, *best)
        if self.overlap:
            if drawn is not None:
                self._leave(rows.sequences, drawn)
            return
        self.failures = 0
        if rows.drafts:
            self._drop_rejected(rows, tokens, logprobs)
        if rows.sequences:
            self._append(rows.sequences, tokens, logprobs)
        for _, item in rows.drafts:
            if item.seq.running:
                scheduler.keep(item.seq)

    def _leave(self, sequences: list[Sequence], drawn: Drawn) -> None:
        """Leave the sequences' next tokens on the device until the next step is launched."""
        self._unread = sequences, drawn
        for place, seq in enumerate(sequences):
            seq.late = place
        # whatever its last token is, such a sequence goes no further: seats and blocks are free for the next step, as without overlap
        self.scheduler.remove([seq for seq in sequences if seq.total >= seq.max_len])

    def _read(self) -> None:
        """Give the sequences the tokens that the last step left on the device, if there are any."""
        if self._unread is None:
            return
        (sequences, drawn), self._unread = self._unread, None
        for seq in sequences:
            seq.late = -1
        try:
            tokens, logprobs = drawn.read()
        except Exception as error:  # how a GPU reports what went wrong in the step
            self._fail(sequences, error)
            return
        self.failures = 0
        self._append(sequences, tokens, logprobs)

    def _rows(self, batch: list[Scheduled], logits: Tensor) -> _Rows:
        """Who gets a token now, from which rows of `logits`; starts the siblings of finished prompts."""
        scheduler = self.scheduler
        rows = _Rows()
        end = 0
        for item in batch:
            end += item.rows
            seq, request = item.seq, item.seq.request
            if seq.finish_reason is not None:  # it had ended before this step
                continue
            scheduler.done(item)
            if request.finished or not item.rows:  # the prompt goes on in the next step
                continue
            if request.prompt_logprobs is not None and seq.index == 0 and len(request.prompt_logprobs) < seq.prompt_len:
                self._note_prompt(item, logits[end - item.rows : end])
            if item.start + item.count < len(seq.token_ids):
                continue
            if len(seq.token_ids) >= seq.max_len:  # max_tokens 0: only the prompt was asked for
                self._end(request, "length", None)
                continue
            if seq.text_end == 0 and request.first_token == 0:
                self.counters["prompt_tokens"] += seq.prompt_len
                self.counters["cached_tokens"] += seq.num_cached
                request.sequences[0].num_cached = seq.num_cached
            if request.beam is not None:
                rows.beams.append(seq)
                rows.beam_where.append(end - 1)
                rows.best = max(rows.best, request.beam.candidates)
                continue
            if item.draft:
                rows.drafts.append((len(rows.where), item))
            count = 1 + len(item.draft)
            rows.sequences += [seq] * count
            rows.where += range(end - count, end)
            if request.siblings_pending:
                request.siblings_pending = False
                started = [sibling for sibling in request.sequences[1:] if scheduler.fork(seq, sibling)]
                rows.sequences += started
                rows.where += [end - 1] * len(started)
        return rows

    def _drop_rejected(self, rows: _Rows, tokens: list[int], logprobs: list[TokenLogprob | None]) -> None:
        """Take the rows after each draft's first wrong token out of all three lists."""
        for start, item in reversed(rows.drafts):
            accepted = count_accepted(item.draft, tokens[start : start + item.rows])
            for values in (rows.sequences, tokens, logprobs):
                del values[start + accepted + 1 : start + item.rows]
            self.counters["draft_tokens"] += len(item.draft)
            self.counters["accepted_tokens"] += accepted
            assert item.seq.ngrams is not None
            item.seq.ngrams.learn(len(item.draft), accepted, self.config.speculate_ngram)

    def _search(self, beams: list[Sequence], tokens: list[list[int]], values: list[list[float]]) -> None:
        """Hand each beam its best continuations; searches that have all of theirs go one token further."""
        now = time.monotonic()
        for beam, best, scores in zip(beams, tokens, values, strict=True):
            request = beam.request
            assert request.beam is not None
            if request.finished:  # a sibling failed a moment ago
                continue
            if math.isnan(scores[0]):
                self._end_not_finite(request)
                continue
            self.counters["generated_tokens"] += 1
            request.first_token = request.first_token or now
            if request.beam.take(beam, best, scores) and not request.beam.advance(self.scheduler):
                request.beam.settle()
                self._finish(request)

    @staticmethod
    def _note_prompt(item: Scheduled, logits: Tensor) -> None:
        """Log-probabilities of the prompt tokens that the item's logits rows [rows, V] predict."""
        seq = item.seq
        known = seq.request.prompt_logprobs
        assert known is not None
        first = item.start + item.count - item.rows  # position of the first row; it predicts the next token
        targets = seq.token_ids[len(known) : min(item.start + item.count + 1, seq.prompt_len)]
        skip = len(known) - 1 - first
        if targets:
            count = seq.request.params.prompt_logprobs or 0
            known += token_logprobs(logits[skip : skip + len(targets)].float(), targets, [count] * len(targets))

    def _append(self, rows: list[Sequence], tokens: list[int], logprobs: list[TokenLogprob | None]) -> None:
        """Give each sequence its token; end those that are done."""
        now = time.monotonic()
        ended: list[Sequence] = []
        signals: list[Signal] = []
        for index, (seq, token) in enumerate(zip(rows, tokens, strict=True)):
            request = seq.request
            if request.finished or seq.finish_reason is not None:  # a sibling failed, or an accepted draft's token was the last
                continue
            if token < 0:
                self._end_not_finite(request)
                continue
            self.counters["generated_tokens"] += 1
            seq.token_ids.append(token)
            if logprobs and (entry := logprobs[index]) is not None and seq.logprobs is not None:
                seq.logprobs.append(entry)
                seq.cumulative_logprob += entry.logprob
            params = request.params
            reason: str | None = None
            if token in request.stop_ids:
                reason = "stop"
                if token in params.stop_token_ids:
                    seq.stop_reason = token
            if reason is None or params.include_stop_str_in_output:
                seq.text_end += 1
                if params.stop and seq.detok.feed([token], params.min_tokens) and reason is None:
                    reason, seq.stop_reason = "stop", seq.detok.matched
            if reason is None and len(seq.token_ids) >= seq.max_len:
                reason = "length"
            if request.first_token == 0:
                request.first_token = now
            if reason is not None:
                if params.stop:
                    seq.detok.finish()
                seq.finish_reason = reason
                ended.append(seq)
            request.version += 1
            if request.signal.every:
                signals.append(request.signal)
        if ended:
            self.scheduler.remove(ended)
            for request in {seq.request for seq in ended}:
                if all(seq.finish_reason for seq in request.sequences):
                    self._finish(request)
        wake(signals)
