"""`--loss_scale`: which turns are learnt, and how much each part of an answer weighs.

`default`, `last_round` or `all` says which turns; after a `+` follow names of SWIFT's weightings, or JSON files in their form:
{"keyword": [weight of the keyword, weight of the text up to the next one]} or {"regular expression": [weight of what it
matches]}; the rest weighs 1. Several multiply. The names' figures are SWIFT's (for ReAct answers: arXiv 2309.00986).

It knows texts and numbers, not tokens.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from swiftlite.errors import UsageError

BASES = ("default", "last_round", "all")
THOUGHTLESS = "ignore_empty_think"
_STRONG, _PLAIN, _RESULT = (2.0, 2.0), (1.0, 1.0), (2.0, 0.0)
_REACT: dict[str, tuple[float, ...]] = {
    "Action:": _STRONG,
    "Action Input:": _STRONG,
    "Thought:": _PLAIN,
    "Final Answer:": _PLAIN,
    "Observation:": _RESULT,
}
NAMED: dict[str, dict[str, tuple[float, ...]]] = {
    "react": _REACT,
    "alpha_umi": {**_REACT, "Next:": _STRONG},
    "qwen": {"✿FUNCTION✿:": _STRONG, "✿ARGS✿:": _STRONG, "✿RETURN✿:": _PLAIN, "✿RESULT✿:": _RESULT},
    "hermes": {"<tool_call>(.+?)</tool_call>": (2.0,)},
}


@dataclass(frozen=True)
class Weighting:
    """One weighting: a pattern, and for each keyword its two weights, or by group number of the pattern one weight."""

    pattern: re.Pattern[str]
    keywords: tuple[tuple[str, float, float], ...]
    matches: tuple[float, ...]

    @staticmethod
    def of(table: dict[str, tuple[float, ...]], name: str) -> Weighting:
        pairs = {key: value for key, value in table.items() if len(value) == 2}
        if pairs and len(pairs) < len(table):
            raise UsageError(
                f"--loss_scale {name}: keywords (two weights) and expressions (one) do not mix", fix="use two files, joined by +"
            )
        if pairs:
            longest_first = sorted(pairs, key=len, reverse=True)
            pattern = re.compile("|".join(map(re.escape, longest_first)))
            return Weighting(pattern, tuple((key, *pairs[key]) for key in longest_first), ())  # type: ignore[arg-type]
        try:
            pattern = re.compile("|".join(f"(?P<part{i}>{key})" for i, key in enumerate(table)), re.DOTALL)
        except re.error as error:
            raise UsageError(f"--loss_scale {name}: no valid regular expression", str(error)) from None
        return Weighting(pattern, (), tuple(value[0] for value in table.values()))

    def apply(self, text: str, weights: list[float]) -> None:
        """Multiply the weights of the characters of `text`."""
        found = list(self.pattern.finditer(text))
        ends = [match.start() for match in found[1:]] + [len(text)]
        table = {key: (own, after) for key, own, after in self.keywords}
        for match, end in zip(found, ends, strict=True) if found else ():
            if self.keywords:
                own, after = table[match[0]]
            else:  # what a match does not cover stays as it is
                own, after = next(weight for i, weight in enumerate(self.matches) if match[f"part{i}"] is not None), 1.0
            for first, last, factor in ((match.start(), match.end(), own), (match.end(), end, after)):
                for index in range(first, last):
                    weights[index] *= factor


@dataclass(frozen=True)
class LossScale:
    """A parsed --loss_scale."""

    base: str
    thoughtless: bool  # an empty <think> block is not learnt
    weightings: tuple[Weighting, ...]

    def weights(self, text: str) -> list[float]:
        """One weight for each character of an answer."""
        weights = [1.0] * len(text)
        for weighting in self.weightings:
            weighting.apply(text, weights)
        return weights


@lru_cache(maxsize=8)
def parse(text: str) -> LossScale:
    """UsageError for an unknown name or a file that is no weighting."""
    parts = text.split("+")
    base = parts.pop(0) if parts[0] in BASES else "default"
    weightings = []
    for part in parts:
        if part == THOUGHTLESS:
            continue
        table = NAMED[part] if part in NAMED else _read(part, text)
        weightings.append(Weighting.of(table, part))
    if base == "all" and parts:
        raise UsageError(f"--loss_scale {text}: weights are for answers, and all learns every text", fix="leave out `all+`")
    return LossScale(base, THOUGHTLESS in parts, tuple(weightings))


def _read(part: str, text: str) -> dict[str, tuple[float, ...]]:
    path = Path(part).expanduser()
    if not part.endswith(".json") or not path.is_file():
        why = "agentflan weighs answers by their questions, which is not built" if part == "agentflan" else ""
        known = ", ".join((*BASES, THOUGHTLESS, *NAMED))
        raise UsageError(f"--loss_scale {text}: unknown {part!r}", why, f"use {known}, a .json file of weights, or several joined by +")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        table = {str(key): tuple(float(one) for one in value) for key, value in content.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"--loss_scale {part} is no table of weights", str(error), 'e.g. {"Action:": [2, 2]}') from None
    if not table or not all(len(value) in (1, 2) and all(math.isfinite(one) and one >= 0 for one in value) for value in table.values()):
        raise UsageError(f"--loss_scale {part}: every entry needs one or two weights from 0 up", fix='e.g. {"Action:": [2, 2]}')
    return table
