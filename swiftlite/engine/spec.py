"""Speculation by n-grams (prompt lookup): guess that a sequence goes on as it did after its last few tokens' earlier occurrence.

A draft costs a few more rows in a step that reads all weights anyway, and its tokens are verified by the model itself: row i of
the sequence's logits is right if all drafts before it were, so the kept tokens are those that plain greedy decoding takes. That is
exact where a row's logits do not depend on the number of rows in the step (fp32 up to its rounding; in bfloat16 a near tie may
fall the other way, as it may beside other requests).

It does not know the scheduler, blocks or tensors.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

SIZES = (3, 2)  # tokens that must match; the longest match wins


class NgramIndex:
    """Where in a sequence each n-gram was last followed by another token. Grows with the sequence."""

    __slots__ = ("_after", "_indexed", "limit")

    def __init__(self, tokens: list[int], limit: int) -> None:
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> index of the token that followed it last
        self._indexed = 0
        self.limit = limit  # tokens that the next draft may have
        self._extend(tokens)

    def _extend(self, tokens: list[int]) -> None:
        after = self._after
        for index in range(self._indexed, len(tokens)):
            for size in SIZES:
                if index >= size:
                    after[tuple(tokens[index - size : index])] = index
        self._indexed = len(tokens)

    def propose(self, tokens: list[int], most: int) -> list[int]:
        """At most `most` (and `limit`) tokens that may follow `tokens`; the repeated stretch is taken to go on repeating."""
        self._extend(tokens)
        for size in SIZES:
            start = self._after.get(tuple(tokens[-size:]))
            if start is not None:
                period = len(tokens) - start
                return [tokens[start + index % period] for index in range(min(most, self.limit))]
        return []

    def learn(self, proposed: int, accepted: int, most: int) -> None:
        """Guess more after a draft that was right to its end, and no more than was right otherwise."""
        self.limit = min(most, 2 * self.limit) if accepted == proposed else accepted + 1


def count_accepted(draft: SequenceOf[int], tokens: SequenceOf[int]) -> int:
    """How many of `draft` the model's own choices (one more than drafted) agree with, from the first on."""
    for index, token in enumerate(draft):
        if tokens[index] != token:
            return index
    return len(draft)
