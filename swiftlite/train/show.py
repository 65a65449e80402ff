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
    parts = []
    for target, run in groupby(zip(sample.ids[:LIMIT].tolist(), sample.mask[:LIMIT].tolist(), strict=True), key=lambda pair: pair[1]):
        text = tokenizer.decode([token for token, _ in run], skip_special_tokens=False)
        parts.append(f"{opening}{text}{closing}" if target else text)
    more = len(sample.ids) - LIMIT
    return "".join(parts) + (f" ... {more} tokens more" if more > 0 else "")
