"""Token ids to text while they arrive, and stop strings.

Text is the difference of two decodings over a short window (the two-offset method known from Hugging Face's text-generation
server): tokens that end in an unfinished multi-byte character are held back until the character is complete, and a few prompt
tokens in front keep the first word's space. Stop strings: what could still become one is held back, so no reader ever sees a
part of a stop string that the final text does not have; the earliest stop string ends the text.

`text` only ever grows, until `finish`. Decoding goes through the tokenizer's own decoder; ids unknown to it are silent. It does
not know requests or threads: one thread feeds one Detokenizer at a time.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CONTEXT = 5  # prompt tokens decoded in front of the answer
UNFINISHED = "\ufffd"
LONGEST_CHARACTER = 4  # bytes, so tokens


class Decoder:
    """A tokenizer's decoder with its special ids, shared by all requests."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._decode = tokenizer.backend_tokenizer.decode
        self.special = frozenset(token for token, added in tokenizer.added_tokens_decoder.items() if added.special)

    def __call__(self, ids: list[int]) -> str:
        return self._decode(ids, skip_special_tokens=False)


class Detokenizer:
    """The text of one answer. `stop` strings end it; `matched` is the one that did."""

    __slots__ = ("_decode", "_ids", "_prefix", "_read", "_special", "_stops", "fed", "include_stop", "matched", "pending", "text")

    def __init__(
        self, decode: Decoder, prompt: list[int], stops: list[str] | None = None, include_stop: bool = False, skip_special: bool = True
    ) -> None:
        self._decode, self._stops, self.include_stop = decode, stops or [], include_stop
        self._special = decode.special if skip_special else frozenset()
        self._ids = [token for token in prompt[-CONTEXT:] if token not in self._special]  # the window and what follows it
        self._prefix, self._read = 0, len(self._ids)  # ids before _read are text already; decoding starts at _prefix
        self.fed = 0  # tokens taken
        self.text = ""  # safe to show
        self.pending = ""  # decoded, but perhaps the beginning of a stop string
        self.matched: str | None = None

    def fork(self) -> Detokenizer:
        """A copy that goes its own way."""
        other = copy.copy(self)
        other._ids = list(self._ids)
        return other

    def feed(self, tokens: list[int], check_from: int = 0) -> bool:
        """Take more tokens; True when a stop string is complete (everything after it is dropped).

        Stop strings are looked for only once `check_from` tokens were fed (min_tokens).
        """
        self.fed += len(tokens)
        special = self._special
        ids = self._ids
        ids += [token for token in tokens if token not in special] if special else tokens
        for cut in range(len(ids), max(self._read, len(ids) - LONGEST_CHARACTER), -1):
            if self._advance(cut):
                break
        else:
            if len(ids) - self._read > 2 * LONGEST_CHARACTER:  # no character is that long: bytes that are none
                self._advance(len(ids) - LONGEST_CHARACTER + 1, force=True)
        return self._look_for_stop(check_from)

    def finish(self) -> None:
        """No more tokens: show what was held back, if no stop string ended the text."""
        if self.matched is None:
            if self._read < len(self._ids):
                self._advance(len(self._ids), force=True)
            self.text += self.pending
            self.pending = ""

    def _advance(self, cut: int, force: bool = False) -> bool:
        """Turn the ids up to `cut` into pending text; False while they end inside a character."""
        window = self._decode(self._ids[self._prefix : cut])
        known = self._decode(self._ids[self._prefix : self._read])
        if not force and (len(window) <= len(known) or window.endswith(UNFINISHED)):
            return False
        self.pending += window[len(known) :]
        del self._ids[: self._prefix]
        self._read -= self._prefix
        self._prefix, self._read = self._read, cut - self._prefix
        return True

    def _look_for_stop(self, check_from: int) -> bool:
        if not self._stops or not self.pending:
            self.text += self.pending
            self.pending = ""
            return False
        pending = self.pending
        if self.fed <= check_from:
            held = ""
        else:
            found = [(index, stop) for stop in self._stops if (index := pending.find(stop)) >= 0]
            if found:
                index, stop = min(found)
                self.text += pending[: index + len(stop) if self.include_stop else index]
                self.pending, self.matched = "", stop
                return True
            held = self._held(pending)
        self.text += pending[: len(pending) - len(held)]
        self.pending = held
        return False

    def _held(self, pending: str) -> str:
        """The longest end of `pending` that some stop string begins with."""
        longest = ""
        for stop in self._stops:
            start = max(0, len(pending) - len(stop) + 1)
            while (start := pending.find(stop[0], start)) >= 0:
                if stop.startswith(pending[start:]):
                    longest = max(longest, pending[start:], key=len)
                    break
                start += 1
        return longest
