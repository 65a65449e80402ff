"""One row as the model sees it, with what it learns marked."""

from __future__ import annotations

import sys
from itertools import groupby
from typing import Any

from swiftlite.train.batches import Sample

GREEN, PLAIN = "\033[32m", "\033[0m"
LIMIT = 600  # tokens shown


def with_mask(sample: Sample, tokenizer: Any, colour: bool | None = None) -> str:
    """The decoded row; targets in green on a terminal, between ⟦ and ⟧ elsewhere."""
    colour = sys.stdout.isatty() if colour is None else colour
    opening, closing = (GREEN, PLAIN) if colour else ("⟦", "⟧")
    pieces, more = runs(sample, tokenizer)
    text = "".join(f"{opening}{piece}{closing}" if target else piece for piece, target in pieces)
    return text + (f" ... {more} tokens more" if more else "")


def runs(sample: Sample, tokenizer: Any) -> tuple[list[tuple[str, bool]], int]:
    """([(text, is target)], tokens left out) of a row's beginning."""
    pairs = zip(sample.ids[:LIMIT].tolist(), sample.mask[:LIMIT].tolist(), strict=True)
    pieces = [
        (tokenizer.decode([token for token, _ in run], skip_special_tokens=False), target)
        for target, run in groupby(pairs, key=lambda pair: pair[1])
    ]
    return pieces, max(0, len(sample.ids) - LIMIT)
