"""Beam search inside the engine: the beams of one request, forked where they branch, with transformers' rules.

Every beam is a Sequence of its own for the scheduler. A beam whose row is computed hands over its best continuations and pauses;
when the last one has, `advance` picks the next beams. So beams stay equally long even when the scheduler runs them in different
steps (a preempted beam is recomputed while its siblings wait), and a pool that holds one sequence is enough to end any search.

The rules are those of transformers' `generate(num_beams=...)` (GenerationMixin._beam_search, release 5.x): of all continuations,
best first, an ended one among the first `width` becomes an answer with the score cumulative_logprob / tokens ** length_penalty;
the best `width` that did not end go on; the search is over by `early_stopping`, or when no beam can go on.

It does not know tensors, streams or when a row is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from swiftlite.engine.request import TokenLogprob
from swiftlite.engine.sequence import Request, Sequence

if TYPE_CHECKING:
    from swiftlite.engine.detok import Detokenizer
    from swiftlite.engine.scheduler import Scheduler


@dataclass(slots=True, eq=False)
class _Next:
    """A beam with one more token."""

    total: float  # cumulative log-probability, with this token's
    parent: Sequence
    token: int
    entry: TokenLogprob
    detok: Detokenizer | None = None  # its text with the token, where stop strings are looked for


@dataclass(slots=True, eq=False)
class _Answer:
    """A beam that ended."""

    score: float
    token_ids: list[int]
    text_end: int
    cumulative_logprob: float
    logprobs: list[TokenLogprob] | None
    detok: Detokenizer | None
    finish_reason: str
    stop_reason: int | str | None = None


class BeamSearch:
    """The search of one request; `root` is its first beam, the prompt."""

    def __init__(self, request: Request, root: Sequence) -> None:
        self.request, self.params, self.width = request, request.params, request.params.beam_width
        self.beams = [root]
        self._taken: dict[Sequence, tuple[list[int], list[float]]] = {}
        self._answers: list[_Answer] = []  # best first, at most `width`
        # of each row: enough that `width` continuations are left when all that end are taken out
        self.candidates = max(self.width + max(self.width, len(request.stop_ids)), self.params.logprobs or 0)

    def take(self, beam: Sequence, tokens: list[int], values: list[float]) -> bool:
        """Note the best continuations of a beam; True when all beams' are there and `advance` may be called."""
        beam.paused = True
        self._taken[beam] = (tokens, values)
        return len(self._taken) == len(self.beams)

    def advance(self, scheduler: Scheduler) -> bool:
        """Go one token further; False when the search is over (and nothing runs for it any more)."""
        going, ended = self._choose()
        self._taken.clear()
        self._answers = sorted([*self._answers, *ended], key=lambda answer: -answer.score)[: self.width]
        if self._over(going):
            scheduler.remove(self.beams)
            return False
        children: dict[Sequence, list[_Next]] = {}
        for one in going:
            children.setdefault(one.parent, []).append(one)
        scheduler.remove([beam for beam in self.beams if beam not in children])  # first, so that others get their seats
        self.beams = list(children)
        for parent, branches in children.items():
            for branch in branches[1:]:
                child = self._child(parent)
                scheduler.fork(parent, child)
                self._extend(child, branch)
                self.beams.append(child)
        for parent, branches in children.items():
            self._extend(parent, branches[0])
            scheduler.resume(parent)
        return True

    def settle(self, reason: str = "length") -> None:
        """Write the best answers into the request's sequences; where there are too few, beams that did not end follow with `reason`."""
        unfinished = sorted((self._answer(beam, reason) for beam in self.beams), key=lambda answer: -answer.score)
        for seq, answer in zip(self.request.sequences, [*self._answers, *unfinished], strict=False):
            seq.token_ids, seq.logprobs = answer.token_ids, answer.logprobs
            seq.cumulative_logprob, seq.stop_reason = answer.cumulative_logprob, answer.stop_reason
            if answer.detok is not None:
                answer.detok.finish()
                seq.detok = answer.detok
            seq.text_end = answer.text_end
            seq.finish_reason = answer.finish_reason  # last: a reader that sees it sees the rest
        for seq in self.request.sequences:
            seq.finish_reason = seq.finish_reason or reason

    # -- one step

    def _choose(self) -> tuple[list[_Next], list[_Answer]]:
        """The continuations that go on and those that end, both best first."""
        shown = self.params.logprobs or 0
        order = sorted(
            (
                (beam.cumulative_logprob + value, beam, rank)
                for beam, (_, values) in self._taken.items()
                for rank, value in enumerate(values)
                if value > float("-inf")
            ),
            key=lambda entry: -entry[0],
        )
        going: list[_Next] = []
        ended: list[_Answer] = []
        for place, (total, beam, rank) in enumerate(order):
            tokens, values = self._taken[beam]
            top = dict(zip(tokens[:shown], values[:shown], strict=True))
            branch = _Next(total, beam, tokens[rank], TokenLogprob(tokens[rank], values[rank], top))
            answer = self._end(branch)
            if answer is None:
                going.append(branch)
            elif place < self.width:
                ended.append(answer)
            if len(going) == self.width:  # then all of the first `width` were looked at
                break
        return going, ended

    def _end(self, branch: _Next) -> _Answer | None:
        """The answer that a continuation is, if it ends now."""
        beam, params, token = branch.parent, self.params, branch.token
        reason: str | None = "stop" if token in self.request.stop_ids else None
        stop_reason: int | str | None = token if reason and token in params.stop_token_ids else None
        text = 1 if reason is None or params.include_stop_str_in_output else 0
        if params.stop:
            branch.detok = beam.detok.fork()
            if text and branch.detok.feed([token], params.min_tokens) and reason is None:
                reason, stop_reason = "stop", branch.detok.matched
        if reason is None and len(beam.token_ids) + 1 >= beam.max_len:
            reason = "length"
        if reason is None:
            return None
        logprobs = None if beam.logprobs is None else [*beam.logprobs, branch.entry]
        token_ids = [*beam.token_ids, token]
        score = self._score(branch.total, len(token_ids) - beam.prompt_len)
        return _Answer(score, token_ids, beam.text_end + text, branch.total, logprobs, branch.detok, reason, stop_reason)

    def _score(self, total: float, length: int) -> float:
        return total / length**self.params.length_penalty

    def _over(self, going: list[_Next]) -> bool:
        if not going:
            return True
        if len(self._answers) < self.width:
            return False
        if self.params.early_stopping is True:
            return True
        beam = going[0].parent
        length = len(beam.token_ids) + 1 - beam.prompt_len
        if self.params.early_stopping == "never" and self.params.length_penalty > 0:
            length = beam.max_len - beam.prompt_len
        return self._score(going[0].total, length) <= self._answers[-1].score

    # -- sequences

    def _child(self, parent: Sequence) -> Sequence:
        child = Sequence(
            self.request, 1, list(parent.token_ids), parent.prompt_len, parent.max_len, parent.adapter, parent.sampling.fork(),
            parent.detok, parent.order,
        )  # fmt: skip
        child.text_end = parent.text_end
        child.logprobs = None if parent.logprobs is None else list(parent.logprobs)
        return child

    @staticmethod
    def _extend(beam: Sequence, branch: _Next) -> None:
        beam.token_ids.append(branch.token)
        beam.sampling.advance(branch.token)
        beam.cumulative_logprob = branch.total
        beam.text_end += 1
        if beam.logprobs is not None:
            beam.logprobs.append(branch.entry)
        if branch.detok is not None:
            beam.detok = branch.detok

    def _answer(self, beam: Sequence, reason: str) -> _Answer:
        length = len(beam.token_ids) - beam.prompt_len
        score = self._score(beam.cumulative_logprob, max(length, 1))
        detok = beam.detok if self.params.stop else None
        return _Answer(score, beam.token_ids, beam.text_end, beam.cumulative_logprob, beam.logprobs, detok, reason)
