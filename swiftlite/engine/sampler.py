"""From logits to tokens, for all rows of a step at once.

Order of operations, as in vLLM's V1 sampler (`v1/sample/sampler.py`): log-probabilities are of the model's raw distribution;
then logit_bias and min_tokens; then the repetition penalty over prompt and answer, with the semantics of transformers'
`RepetitionPenaltyLogitsProcessor` (positive scores divided, negative multiplied), and the frequency and presence penalties over
the answer (vLLM, after OpenAI's formula: logit - count * frequency - (count > 0) * presence); temperature; min-p; top-k;
top-p of what is left. Tokens with equal logits at a cut are all kept, so the kept set does not depend on sorting.

Randomness is counter-based: the n-th token of a request uses one uniform number made from (seed, n) and the inverse distribution
function in vocabulary order. A seeded request draws the same tokens in any batch row, beside any other request, and after a
preemption. What does not need a [B, V] copy makes none; rows without special wishes cost one max over the row.

A row whose best logit is not finite (NaN wins every max) yields token -1. Sampling has two halves: `draw` tells the device what to
do, `Drawn.read` waits for the outcome, so that a step's tokens can be read while the next one runs.
It does not know sequences, stop rules or text.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from swiftlite.engine.draw import CANDIDATES, draw_cut, draw_cut_at_once, inverse
from swiftlite.engine.request import SamplingParams, TokenLogprob
from swiftlite.engine.transfer import Readback, to_device
from swiftlite.kernels.steps import DTYPES, Kernels

_MASK = 2**64 - 1
BEST_ROWS = 32  # rows that are in fp32 at once
TINY = 1e-30  # smaller wishes become 0 in float32: a top-p that keeps nothing, scores of -inf * 0
CHUNK, CHUNK_CUDA = 2**19, 2**24  # logits that are worked on at once: they stay in the processor's cache, fill a GPU but not its memory


def _mix(value: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


class TokenTable:
    """The distinct tokens of a sequence and how often each is in the answer; grown in place, read as two arrays."""

    def __init__(self, prompt: list[int]) -> None:
        distinct = list(dict.fromkeys(prompt))
        self._slots = {token: slot for slot, token in enumerate(distinct)}
        self._ids = np.array(distinct + [0] * (len(distinct) + 64), dtype=np.int64)
        self._counts = np.zeros(len(self._ids), dtype=np.float32)

    def add(self, token: int) -> None:
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[slot] = token
        self._counts[slot] += 1

    def copy(self) -> TokenTable:
        other = TokenTable([])
        other._slots, other._ids, other._counts = dict(self._slots), self._ids.copy(), self._counts.copy()
        return other

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Token ids [N] and their counts in the answer [N] (0: only in the prompt)."""
        size = len(self._slots)
        return self._ids[:size], self._counts[:size]


class SamplingState:
    """What the sampler remembers of one sequence. `stop_ids` are masked until min_tokens are there."""

    __slots__ = ("_seed", "biased", "count", "greedy", "logprobs", "params", "penalised", "stop_ids", "table")

    def __init__(self, params: SamplingParams, prompt: list[int], seed: int, stop_ids: frozenset[int] = frozenset()) -> None:
        self.params, self.stop_ids = params, stop_ids
        self.count = 0  # tokens drawn
        self._seed = _mix(seed & _MASK)
        self.greedy = params.greedy
        self.logprobs = params.logprobs
        self.biased = bool(params.logit_bias) or (params.min_tokens > 0 and bool(stop_ids))
        self.penalised = params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
        self.table = TokenTable(prompt) if self.penalised else None

    @property
    def plain(self) -> bool:
        """The token with the best logit is taken, whatever came before."""
        return self.greedy and not self.biased and not self.penalised

    def fork(self) -> SamplingState:
        """A copy that goes its own way."""
        other = copy.copy(self)
        if self.table is not None:
            other.table = self.table.copy()
        return other

    def uniform(self) -> float:
        """The number in [0, 1) for the next token."""
        return (_mix((self._seed + (self.count + 1) * 0x9E3779B97F4A7C15) & _MASK) >> 11) * 2.0**-53

    def advance(self, token: int) -> None:
        self.count += 1
        if self.table is not None:
            self.table.add(token)


@dataclass(slots=True)
class _Plan:
    """What a batch of the same sequences needs, step after step."""

    biased: list[int]
    penalised: list[int]
    logprobs: list[int]
    drawn: list[int]  # rows that are sampled: those without top-k and top-p first, then those with a small top-k
    free: int  # how many of them have neither
    few: int  # where those with a small top-k end
    most: int  # the largest of those
    min_p: bool  # some row has a min-p
    index: Tensor  # [drawn]
    scored: Tensor  # [logprobs]
    inverse_temperature: Tensor  # [drawn, 1]
    log_min_p: Tensor  # [drawn, 1]; -inf: off
    limits: Tensor  # [drawn, 3]: top-k (0: off), top-p (2: off), log of min-p
    penalties: Tensor  # [penalised, 3]: repetition, frequency, presence; on the host


class Drawn:
    """A step's tokens on the device, and on their way to the host with their log-probabilities."""

    def __init__(self, tokens: Tensor, scored: tuple[Tensor, ...], states: list[SamplingState], plan: _Plan) -> None:
        self.tokens = tokens  # [B] int64; -1: the row is not finite
        self._states, self._plan = states, plan
        self._readback = Readback(tokens, *scored)

    def read(self) -> tuple[list[int], list[TokenLogprob | None]]:
        """What `Sampler.sample` returns; waits for it. Every state of a good row advances by its token."""
        tensor, *scored = self._readback.read()
        tokens = tensor.tolist()
        for state, token in zip(self._states, tokens, strict=True):
            if token >= 0:
                state.advance(token)
        if not scored:
            return tokens, []
        logprobs: list[TokenLogprob | None] = [None] * len(tokens)
        where = self._plan.logprobs
        entries = _entries([tokens[row] for row in where], scored, [self._states[row].logprobs or 0 for row in where])
        for row, entry in zip(where, entries, strict=True):
            logprobs[row] = entry
        return tokens, logprobs


class Sampler:
    """Samples the rows of one step; keeps the last batch's plan, which decoding reuses."""

    def __init__(self, kernels: Kernels | None = None, *, wait: bool = True) -> None:
        """`wait`: `draw` may look at what the device has found so far; else it does the same work for every row."""
        self._kernels, self._wait = kernels, wait
        self._states: list[SamplingState] = []
        self._plan: _Plan | None = None

    def sample(self, logits: Tensor, states: list[SamplingState]) -> tuple[list[int], list[TokenLogprob | None]]:
        """One token id a row of logits [B, V] (-1: the row is not finite) and its log-probability where asked (else an empty list).

        May overwrite `logits`. Every state of a good row advances by its token.
        """
        return self.draw(logits, states).read()

    def draw(self, logits: Tensor, states: list[SamplingState]) -> Drawn:
        """The first half of `sample`. The states must be up to date: they advance when the tokens are read."""
        plan = self._plan
        if plan is None or states != self._states or plan.index.device != logits.device:
            plan = self._plan = self._make_plan(states, logits)
            self._states = list(states)
        best, tokens = self._best(logits)
        finite = torch.isfinite(best)
        changes = bool(plan.biased or plan.penalised)
        raw: Tensor | None = None  # [L, V]: before anything is changed
        if plan.logprobs:
            raw = (logits if len(plan.logprobs) == len(states) and not changes else logits.index_select(0, plan.scored)).float()
        if changes:
            logits = logits.float()
            self._apply_bias(logits, states, plan)
            self._apply_penalties(logits, states, plan)
            best, tokens = logits.max(dim=-1)
            finite &= torch.isfinite(best)  # a bias may have left nothing to choose
        if plan.drawn:
            self._draw(tokens, logits, best, states, plan)
        tokens = torch.where(finite, tokens, -1)
        scored: tuple[Tensor, ...] = ()
        if raw is not None:
            most = max(states[row].logprobs or 0 for row in plan.logprobs)
            scored = _scores(raw, tokens.index_select(0, plan.scored).clamp_(min=0), most)
        return Drawn(tokens, scored, self._states, plan)

    def _best(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        if self._kernels is not None and logits.device.type == "cpu" and logits.dtype in DTYPES:
            return self._kernels.best_of_rows(logits)
        return logits.max(dim=-1)

    def best(self, logits: Tensor, states: list[SamplingState], count: int) -> tuple[list[list[int]], list[list[float]]]:
        """The `count` best next tokens of each row of logits [B, V] and their log-probabilities, best first.

        Bias and penalties change the log-probabilities, which then no longer sum to one: what transformers' beam search does.
        A row that is not finite begins with NaN.
        """
        tokens: list[list[int]] = []
        values: list[list[float]] = []
        for start in range(0, len(states), BEST_ROWS):
            scores = logits[start : start + BEST_ROWS].float()
            norm = scores.logsumexp(-1, keepdim=True)
            part = states[start : start + BEST_ROWS]
            if any(state.biased or state.penalised for state in part):
                scores, norm = scores - norm, torch.zeros_like(norm)
                plan = self._make_plan(part, scores)
                self._apply_bias(scores, part, plan)
                self._apply_penalties(scores, part, plan)
            top, ids = scores.topk(min(count, scores.shape[1]), dim=-1)
            tokens += ids.tolist()
            values += (top - norm).tolist()
        return tokens, values

    @staticmethod
    def _make_plan(states: list[SamplingState], logits: Tensor) -> _Plan:
        vocabulary, device = logits.shape[1], logits.device
        biased = [row for row, state in enumerate(states) if state.biased]
        penalised = [row for row, state in enumerate(states) if state.penalised]
        logprobs = [row for row, state in enumerate(states) if state.logprobs is not None]

        def kind(row: int) -> int:
            p = states[row].params
            if 0 < p.top_k < vocabulary:
                return 1 if p.top_k <= CANDIDATES else 2
            return 2 if p.top_p < 1 else 0

        drawn = sorted((row for row, state in enumerate(states) if not state.greedy), key=kind)
        kinds = [kind(row) for row in drawn]
        params = [states[row].params for row in drawn]
        limits = [
            [
                p.top_k if 0 < p.top_k < vocabulary else 0,
                max(p.top_p, TINY) if p.top_p < 1 else 2.0,
                math.log(p.min_p) if p.min_p else -math.inf,
            ]
            for p in params
        ]
        on_device = to_device(limits, torch.float32, device).view(-1, 3)
        return _Plan(
            biased=biased,
            penalised=penalised,
            logprobs=logprobs,
            drawn=drawn,
            free=kinds.count(0),
            few=len(kinds) - kinds.count(2),
            most=max((p.top_k for p, kind in zip(params, kinds, strict=True) if kind == 1), default=0),
            min_p=any(p.min_p for p in params),
            index=to_device(drawn, torch.long, device),
            scored=to_device(logprobs, torch.long, device),
            inverse_temperature=to_device([[max(1 / p.temperature, TINY)] for p in params], torch.float32, device),
            log_min_p=on_device[:, 2:],
            limits=on_device,
            penalties=torch.tensor(
                [
                    [states[r].params.repetition_penalty, states[r].params.frequency_penalty, states[r].params.presence_penalty]
                    for r in penalised
                ]
            ),
        )

    @staticmethod
    def _apply_bias(logits: Tensor, states: list[SamplingState], plan: _Plan) -> None:
        rows: list[int] = []
        tokens: list[int] = []
        values: list[float] = []
        for row in plan.biased:
            state = states[row]
            wishes = state.params.logit_bias or {}
            if state.count < state.params.min_tokens:
                wishes = {**wishes, **dict.fromkeys(state.stop_ids, -torch.inf)}
            rows += [row] * len(wishes)
            tokens += wishes.keys()
            values += wishes.values()
        if rows:
            device = logits.device
            index = (to_device(rows, torch.long, device), to_device(tokens, torch.long, device))
            logits[index] += to_device(values, torch.float32, device)

    @staticmethod
    def _apply_penalties(logits: Tensor, states: list[SamplingState], plan: _Plan) -> None:
        if not plan.penalised:
            return
        tables = [states[row].table.arrays() for row in plan.penalised]  # type: ignore[union-attr]
        sizes = torch.tensor([len(ids) for ids, _ in tables])
        device = logits.device
        rows = to_device(torch.tensor(plan.penalised).repeat_interleave(sizes), torch.long, device)  # [N], distinct tokens of all rows
        tokens = to_device(np.concatenate([ids for ids, _ in tables]), torch.long, device)
        counts = to_device(np.concatenate([counts for _, counts in tables]), torch.float32, device)
        penalties = to_device(plan.penalties.repeat_interleave(sizes, dim=0), torch.float32, device)
        repetition, frequency, presence = penalties.unbind(1)
        scores = logits[rows, tokens]
        scores = torch.where(scores < 0, scores * repetition, scores / repetition)
        logits[rows, tokens] = scores - counts * frequency - (counts > 0) * presence

    def _draw(self, tokens: Tensor, logits: Tensor, best: Tensor, states: list[SamplingState], plan: _Plan) -> None:
        """Write a token for each row of plan.drawn into `tokens` [B]."""
        uniform = to_device([[states[row].uniform()] for row in plan.drawn], torch.float32, logits.device)
        at_once = max(1, (CHUNK if logits.device.type == "cpu" else CHUNK_CUDA) // logits.shape[1])
        few = len(plan.drawn) if self._wait else plan.few
        for first, end, most in ((0, plan.free, 0), (plan.free, few, plan.most), (few, len(plan.drawn), 0)):
            for start in range(first, end, at_once):
                part = slice(start, min(start + at_once, end))
                rows = plan.index[part]
                scores = logits.index_select(0, rows).float()  # [R, V], a copy; then best score 0
                scores.sub_(best.index_select(0, rows).float().unsqueeze(1)).mul_(plan.inverse_temperature[part])
                if start < plan.free:
                    found = inverse(scores, plan.log_min_p[part] if plan.min_p else None, uniform[part])
                elif self._wait:
                    found = draw_cut(scores, plan.limits[part], uniform[part])
                else:
                    found = draw_cut_at_once(scores, plan.limits[part], uniform[part], most)
                tokens.index_copy_(0, rows, found)


def _scores(logits: Tensor, tokens: Tensor, most: int) -> tuple[Tensor, ...]:
    """Log-probabilities [L] of tokens [L] under softmax(logits [L, V]), then the `most` best ones' ids and values [L, most]."""
    norm = logits.logsumexp(-1, keepdim=True)
    own = (logits.gather(1, tokens.unsqueeze(1)) - norm).squeeze(1)
    if not most:
        return (own,)
    values, ids = logits.topk(min(most, logits.shape[1]), dim=-1)
    return own, ids, values - norm


def _entries(tokens: list[int], scored: SequenceOf[Tensor], counts: list[int]) -> list[TokenLogprob]:
    """What `_scores` found, read: each token with its counts[i] best alternatives."""
    own, *rest = (tensor.tolist() for tensor in scored)
    if not rest:
        return [TokenLogprob(token, value) for token, value in zip(tokens, own, strict=True)]
    entries = zip(tokens, own, *rest, counts, strict=True)
    return [TokenLogprob(token, value, dict(zip(ids[:k], top[:k], strict=True))) for token, value, ids, top, k in entries]


def token_logprobs(logits: Tensor, tokens: list[int], counts: list[int]) -> list[TokenLogprob]:
    """Log-probability of tokens[i] under softmax(logits[i]), logits [L, V] fp32, and the counts[i] best alternatives."""
    return _entries(tokens, _scores(logits, to_device(tokens, torch.long, logits.device), max(counts)), counts)
