"""What a user asks of the engine and what comes back: public, without torch.

Names and meanings follow vLLM's where both have them. What the step loop keeps of a request meanwhile is in `sequence`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from swiftlite.errors import RequestError


def _check(condition: bool, what: str, param: str) -> None:
    if not condition:
        raise RequestError(what, param=param)


@dataclass
class SamplingParams:
    """How to sample one request.

    temperature 0 is greedy; top_k 0 or -1 keeps all tokens; `seed` makes a request reproducible whatever else runs.
    `logprobs` = k returns the chosen token's log-probability and the k best. Raises RequestError on values out of range.

    With `use_beam_search` the n best of `best_of` (default n) beams are returned, in the meaning of transformers' num_beams:
    a finished beam's score is cumulative_logprob / tokens ** length_penalty; nothing is drawn (temperature, top_k, top_p, min_p and
    seed do not apply), and answers are shown when the search is over.
    """

    n: int = 1
    max_tokens: int | None = None  # None: what the context leaves
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    stop: list[str] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    use_beam_search: bool = False
    best_of: int | None = None  # beams
    length_penalty: float = 1.0  # above 0 favours long answers
    early_stopping: bool | str = False  # end at: True the best_of-th answer, False no likely better one, "never" no possible better one

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            self.stop = [self.stop]
        self.stop = list(self.stop or [])
        self.stop_token_ids = list(self.stop_token_ids or [])
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "length_penalty"):
            value = getattr(self, name)
            _check(
                isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value),
                f"{name} must be a finite number, got {value!r}",
                name,
            )
        _check(isinstance(self.n, int) and self.n >= 1, f"n must be at least 1, got {self.n}", "n")
        _check(self.max_tokens is None or self.max_tokens >= 0, f"max_tokens must be at least 0, got {self.max_tokens}", "max_tokens")
        _check(
            self.min_tokens >= 0 and (self.max_tokens is None or self.min_tokens <= self.max_tokens),
            "min_tokens must lie between 0 and max_tokens",
            "min_tokens",
        )
        _check(self.temperature >= 0, f"temperature must be at least 0, got {self.temperature}", "temperature")
        _check(0 < self.top_p <= 1, f"top_p must lie in (0, 1], got {self.top_p}", "top_p")
        _check(self.top_k >= -1, f"top_k must be -1 (all), 0 (all) or positive, got {self.top_k}", "top_k")
        _check(0 <= self.min_p <= 1, f"min_p must lie in [0, 1], got {self.min_p}", "min_p")
        _check(self.repetition_penalty > 0, f"repetition_penalty must be above 0, got {self.repetition_penalty}", "repetition_penalty")
        _check(-2 <= self.presence_penalty <= 2, f"presence_penalty must lie in [-2, 2], got {self.presence_penalty}", "presence_penalty")
        _check(
            -2 <= self.frequency_penalty <= 2, f"frequency_penalty must lie in [-2, 2], got {self.frequency_penalty}", "frequency_penalty"
        )
        _check(self.seed is None or -(2**63) <= self.seed < 2**64, "seed must fit in 64 bits", "seed")
        _check(all(isinstance(s, str) and s for s in self.stop), "stop must hold non-empty strings", "stop")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            _check(count is None or (isinstance(count, int) and count >= 0), f"{name} must be at least 0, got {count!r}", name)
        # longer answers' lengths to a larger power leave the range of numbers
        _check(-20 <= self.length_penalty <= 20, f"length_penalty must lie in [-20, 20], got {self.length_penalty}", "length_penalty")
        width = self.best_of
        if self.use_beam_search:
            _check(width is None or (isinstance(width, int) and width >= self.n), f"best_of must be at least n, got {width}", "best_of")
            _check(self.early_stopping in (True, False, "never"), "early_stopping must be true, false or 'never'", "early_stopping")
        else:
            _check(width in (None, self.n), "best_of other than n is for beam search: add use_beam_search", "best_of")
            _check(self.length_penalty == 1, "length_penalty is for beam search: add use_beam_search", "length_penalty")
            _check(self.early_stopping is False, "early_stopping is for beam search: add use_beam_search", "early_stopping")
        if self.logit_bias is not None:
            try:  # JSON objects have string keys
                self.logit_bias = {int(token): float(bias) for token, bias in self.logit_bias.items()}
            except (AttributeError, TypeError, ValueError):
                raise RequestError("logit_bias must map token ids to numbers", param="logit_bias") from None
            _check(not any(map(math.isnan, self.logit_bias.values())), "logit_bias must hold numbers", "logit_bias")

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5

    @property
    def beam_width(self) -> int:
        return self.best_of or self.n


@dataclass
class TokenLogprob:
    """One token's log-probability under the model (before temperature and penalties), and the best alternatives."""

    token_id: int
    logprob: float
    top: dict[int, float] = field(default_factory=dict)  # token id -> log-probability, best first


@dataclass
class CompletionOutput:
    """One of a request's n answers so far: `text` and `token_ids` are cumulative."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    cumulative_logprob: float = 0.0
    finish_reason: str | None = None  # stop, length, abort or error
    stop_reason: int | str | None = None  # the stop id or string that ended it, when it was not the end-of-turn token


@dataclass
class RequestOutput:
    """A snapshot of one request."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    num_cached_tokens: int = 0  # prompt tokens that came from the prefix cache
    prompt_logprobs: list[TokenLogprob | None] | None = None  # None for the first token
    error: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)  # arrival, first_token, finished: seconds (monotonic)
