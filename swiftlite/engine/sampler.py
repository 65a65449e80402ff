"""From logits to tokens, for all rows of a step at once.

Order of operations, as in vLLM's V1 sampler (`v1/sample/sampler.py`): log-probabilities are of the model's raw distribution;
then logit_bias and min_tokens; then the repetition penalty over prompt and answer, with the semantics of transformers'
`RepetitionPenaltyLogitsProcessor` (positive scores divided, negative multiplied), and the frequency and presence penalties over
the answer (vLLM, after OpenAI's formula: logit - count * frequency - (count > 0) * presence); temperature; min-p; top-k;
top-p of what is left. Tokens with equal logits at a cut are all kept, so the kept set does not depend on sorting.

Randomness is counter-based: the n-th token of a request uses one uniform number made from (seed, n) and the inverse distribution
function in vocabulary order. A seeded request draws the same tokens in any batch row, beside any other request, and after a
preemption. What does not need a [B, V] copy makes none; rows without special wishes cost one max over the row.

A row whose best logit is not finite (NaN wins every max) yields token -1. It does not know sequences, stop rules or text.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swiftlite.engine.request import SamplingParams, TokenLogprob
from swiftlite.kernels.steps import DTYPES, Kernels

_MASK = 2**64 - 1
CANDIDATES = 64  # best tokens that top-k and top-p look at first; a row whose kept set is larger is sorted whole
BEST_ROWS = 32  # rows that are in fp32 at once
CHUNK = 2**19  # logits that are worked on at once, so that they stay in the processor's cache


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

    plain: bool  # all greedy, nothing else: one max
    biased: list[int]
    penalised: list[int]
    logprobs: list[int]
    drawn: list[int]  # rows that are sampled: those without top-k and top-p first
    free: int  # how many of them
    index: Tensor  # [drawn]
    inverse_temperature: Tensor  # [drawn, 1]
    log_min_p: Tensor  # [drawn, 1]; -inf: off
    top_k: Tensor  # [drawn, 1]; 0: off
    top_p: Tensor  # [drawn, 1]; 2: off
    penalties: Tensor  # [penalised, 3]: repetition, frequency, presence


class Sampler:
    """Samples the rows of one step; keeps the last batch's plan, which decoding reuses."""

    def __init__(self, kernels: Kernels | None = None) -> None:
        self._kernels = kernels
        self._states: list[SamplingState] = []
        self._plan: _Plan | None = None

    def sample(self, logits: Tensor, states: list[SamplingState]) -> tuple[list[int], list[TokenLogprob | None]]:
        """One token id a row of logits [B, V] (-1: the row is not finite) and its log-probability where asked (else an empty list).

        May overwrite `logits`. Every state of a good row advances by its token.
        """
        plan = self._plan
        if plan is None or states != self._states or plan.penalties.device != logits.device:
            plan = self._plan = self._make_plan(states, logits)
            self._states = list(states)
        best, chosen = self._best(logits)
        if plan.plain:
            found = chosen.tolist()
            if not torch.isfinite(best).all():
                found = [token if ok else -1 for token, ok in zip(found, torch.isfinite(best).tolist(), strict=True)]
            for state in states:
                state.count += 1
            return found, []
        finite = torch.isfinite(best)
        if not finite.all():
            logits[~finite], best = 0.0, torch.where(finite, best, 0.0)  # keep the other rows' arithmetic simple
        changes = bool(plan.biased or plan.penalised)
        raw: Tensor | None = None  # [L, V]: before anything is changed
        if plan.logprobs:
            raw = (logits if len(plan.logprobs) == len(states) and not changes else logits[plan.logprobs]).float()
        if changes:
            logits = logits.float()
            self._apply_bias(logits, states, plan)
            self._apply_penalties(logits, states, plan)
            best, chosen = logits.max(dim=-1)
            finite &= torch.isfinite(best)  # a bias may have left nothing to choose
        found = chosen.tolist()
        if plan.drawn:
            for row, token in zip(plan.drawn, self._draw(logits, best, states, plan), strict=True):
                found[row] = token
        for row, ok in enumerate(finite.tolist()):
            if ok:
                states[row].advance(found[row])
            else:
                found[row] = -1
        if raw is None:
            return found, []
        logprobs: list[TokenLogprob | None] = [None] * len(states)
        tokens = [max(found[row], 0) for row in plan.logprobs]
        for row, entry in zip(plan.logprobs, token_logprobs(raw, tokens, [states[r].logprobs or 0 for r in plan.logprobs]), strict=True):
            logprobs[row] = entry
        return found, logprobs

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
        cut = {row for row, state in enumerate(states) if state.params.top_p < 1 or 0 < state.params.top_k < vocabulary}
        drawn = sorted((row for row, state in enumerate(states) if not state.greedy), key=cut.__contains__)
        params = [states[row].params for row in drawn]

        def column(values: list[Any], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device).unsqueeze(1)

        return _Plan(
            plain=not (biased or penalised or logprobs or drawn),
            biased=biased,
            penalised=penalised,
            logprobs=logprobs,
            drawn=drawn,
            free=sum(row not in cut for row in drawn),
            index=torch.tensor(drawn, dtype=torch.long, device=device),
            inverse_temperature=column([1 / p.temperature for p in params]),
            log_min_p=column([p.min_p for p in params]).log(),
            top_k=column([p.top_k if 0 < p.top_k < vocabulary else 0 for p in params], torch.long),
            top_p=column([p.top_p if p.top_p < 1 else 2.0 for p in params]),
            penalties=torch.tensor(
                [
                    [states[r].params.repetition_penalty, states[r].params.frequency_penalty, states[r].params.presence_penalty]
                    for r in penalised
                ],
                device=device,
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
            index = (torch.tensor(rows, device=logits.device), torch.tensor(tokens, device=logits.device))
            logits[index] += torch.tensor(values, device=logits.device)

    @staticmethod
    def _apply_penalties(logits: Tensor, states: list[SamplingState], plan: _Plan) -> None:
        if not plan.penalised:
            return
        tables = [states[row].table.arrays() for row in plan.penalised]  # type: ignore[union-attr]
        sizes = torch.tensor([len(ids) for ids, _ in tables])
        device = logits.device
        rows = torch.tensor(plan.penalised).repeat_interleave(sizes).to(device)  # [N], N distinct tokens of all rows
        tokens = torch.from_numpy(np.concatenate([ids for ids, _ in tables])).to(device)
        counts = torch.from_numpy(np.concatenate([counts for _, counts in tables])).to(device)
        repetition, frequency, presence = plan.penalties.repeat_interleave(sizes.to(device), dim=0).unbind(1)
        scores = logits[rows, tokens]
        scores = torch.where(scores < 0, scores * repetition, scores / repetition)
        logits[rows, tokens] = scores - counts * frequency - (counts > 0) * presence

    def _draw(self, logits: Tensor, best: Tensor, states: list[SamplingState], plan: _Plan) -> list[int]:
        """A token for each row of plan.drawn."""
        uniform = torch.tensor([[states[row].uniform()] for row in plan.drawn], device=logits.device)
        at_once = max(1, CHUNK // logits.shape[1]) if logits.device.type == "cpu" else len(plan.drawn)
        tokens: list[int] = []
        for first, end in ((0, plan.free), (plan.free, len(plan.drawn))):
            for start in range(first, end, at_once):
                part = slice(start, min(start + at_once, end))
                rows = plan.index[part]
                scores = logits.index_select(0, rows).float()  # [R, V], a copy; then best score 0
                scores.sub_(best.index_select(0, rows).float().unsqueeze(1)).mul_(plan.inverse_temperature[part])
                if start < plan.free:
                    tokens += _inverse(scores, plan.log_min_p[part], uniform[part]).tolist()
                else:
                    limits = torch.cat([plan.top_k[part].float(), plan.top_p[part], plan.log_min_p[part]], dim=1)
                    tokens += _draw_cut(scores, limits, uniform[part]).tolist()
        return tokens


def _inverse(scores: Tensor, floor: Tensor, uniform: Tensor) -> Tensor:
    """Tokens [R] from scores [R, V], those below `floor` left out, by the inverse distribution function. Overwrites scores."""
    if bool((floor > -torch.inf).any()):
        scores.masked_fill_(scores < floor, -torch.inf)
    reached = scores.exp_().cumsum(dim=-1)
    total = reached[:, -1:]
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(reached, target, right=True).squeeze(1)


def _draw_cut(scores: Tensor, limits: Tensor, uniform: Tensor) -> Tensor:
    """Tokens [R] from scores [R, V] under limits [R, 3]: top-k (0: off), top-p (2: off), log of min-p. Overwrites scores.

    Most kept sets lie within a few candidates, which are cheap to find; which way a row takes depends on the row alone.
    """
    if scores.shape[1] <= CANDIDATES:
        return _inverse(scores, _lowest_kept(_descending(scores), limits, None), uniform)
    top_k, top_p, floor = limits.split(1, dim=1)
    # what top-p is a share of: where top-k does not bound it, the whole row's mass
    mass = torch.where(scores < floor, 0.0, scores.exp()).sum(-1, keepdim=True) if bool(((top_k == 0) & (top_p < 1)).any()) else None
    best, tokens = scores.topk(CANDIDATES, dim=-1)  # [R, CANDIDATES]
    lowest = _lowest_kept(best, limits, mass)
    # sure: the kept set ends before the candidates do, so equal scores at its end are all in sight
    sure = (best[:, -1:] < lowest) & (top_k < CANDIDATES)
    result = torch.empty(len(scores), dtype=torch.long, device=scores.device)
    inside, outside = sure.squeeze(1).nonzero().squeeze(1), (~sure).squeeze(1).nonzero().squeeze(1)
    if len(inside):
        order = tokens[inside].argsort(-1)  # vocabulary order: candidates with equal scores come in any order
        options = tokens[inside].gather(1, order)
        pick = _inverse(best[inside].gather(1, order), lowest[inside], uniform[inside])
        result[inside] = options.gather(1, pick.unsqueeze(1)).squeeze(1)
    if len(outside):
        rest = scores[outside]
        result[outside] = _inverse(rest, _lowest_kept(_descending(rest), limits[outside], None), uniform[outside])
    return result


def _descending(scores: Tensor) -> Tensor:
    if scores.device.type == "cpu":  # NumPy's vectorised sort takes a thirtieth of torch's time
        return torch.from_numpy(np.sort(scores.numpy(), axis=-1)).flip(-1)
    return scores.sort(dim=-1, descending=True).values


def _lowest_kept(best: Tensor, limits: Tensor, mass: Tensor | None) -> Tensor:
    """The lowest score [R, 1] that min-p, top-k and top-p keep, of the best scores [R, K] in descending order.

    `mass` [R, 1] is the sum of all weights where K is not the whole vocabulary; it counts where top-k is off.
    """
    top_k, top_p, floor = limits.split(1, dim=1)
    kth = best.gather(1, (top_k.long() - 1).clamp(0, best.shape[1] - 1))
    inside = (best >= floor) & ((best >= kth) | (top_k == 0))
    weight = best.exp() * inside
    reached = weight.cumsum(-1)
    total = reached[:, -1:] if mass is None else torch.where(top_k > 0, reached[:, -1:], mass)
    kept = inside & (reached - weight < top_p * total)
    return torch.where(kept, best, torch.inf).amin(-1, keepdim=True)


def token_logprobs(logits: Tensor, tokens: list[int], counts: list[int]) -> list[TokenLogprob]:
    """Log-probability of tokens[i] under softmax(logits[i]), logits [L, V] fp32, and the counts[i] best alternatives."""
    norm = logits.logsumexp(-1, keepdim=True)
    own = (logits.gather(1, torch.tensor(tokens, device=logits.device).unsqueeze(1)) - norm).squeeze(1).tolist()
    most = min(max(counts), logits.shape[1])
    if not most:
        return [TokenLogprob(token, value) for token, value in zip(tokens, own, strict=True)]
    values, ids = logits.topk(most, dim=-1)
    entries = zip(tokens, own, ids.tolist(), (values - norm).tolist(), counts, strict=True)
    return [TokenLogprob(token, value, dict(zip(ids[:k], top[:k], strict=True))) for token, value, ids, top, k in entries]
