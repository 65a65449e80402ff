"""Token ids as the strings and bytes that log-probabilities are reported with, and the usage figures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from swiftlite.engine.request import RequestOutput, TokenLogprob

BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """The printable characters that byte-level BPE writes bytes with (GPT-2's table)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(b): b for b in plain}
    rest = (b for b in range(256) if b not in plain)
    return table | {chr(256 + i): b for i, b in enumerate(rest)}


class Tokens:
    """What single tokens look like. A token that is part of a character keeps its true bytes; its text shows U+FFFD."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.alphabet = _byte_alphabet() if "ByteLevel" in repr(tokenizer.backend_tokenizer.decoder) else None
        self.known: dict[int, tuple[str, list[int]]] = {}

    def shown(self, token_id: int) -> tuple[str, list[int]]:
        """(text, bytes) of one token."""
        if token_id not in self.known:
            self.known[token_id] = self._look(token_id)
        return self.known[token_id]

    def _look(self, token_id: int) -> tuple[str, list[int]]:
        piece = self.tokenizer.convert_ids_to_tokens(token_id)
        if piece is None:  # a row of the embedding that the tokenizer has no token for
            return "", []
        if token_id not in self.tokenizer.added_tokens_decoder:
            if self.alphabet is not None and all(c in self.alphabet for c in piece):
                raw = bytes(self.alphabet[c] for c in piece)
                return raw.decode("utf-8", "replace"), list(raw)
            if found := BYTE.fullmatch(piece):
                raw = bytes([int(found[1], 16)])
                return raw.decode("utf-8", "replace"), list(raw)
            text = piece.replace("▁", " ")
        else:
            text = piece
        return text, list(text.encode())

    def chat_logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        """OpenAI's `choices[].logprobs` of the chat route."""
        return {
            "content": [
                {**self._entry(one.token_id, one.logprob), "top_logprobs": [self._entry(*t) for t in one.top.items()]} for one in logprobs
            ]
        }

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        text, raw = self.shown(token_id)
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": raw}

    def completion_logprobs(
        self, logprobs: Sequence[TokenLogprob | None], first_ids: Sequence[int] = (), offset: int = 0
    ) -> dict[str, Any]:
        """OpenAI's `choices[].logprobs` of the completions route. `first_ids`: the tokens of the None entries (a prompt's first)."""
        tokens, values, tops, offsets = [], [], [], []
        for number, one in enumerate(logprobs):
            text = self.shown(first_ids[number] if one is None else one.token_id)[0]
            tokens.append(text)
            offsets.append(offset)
            offset += len(text)
            values.append(None if one is None else max(one.logprob, -9999.0))
            tops.append(
                None if one is None else {self.shown(i)[0]: max(p, -9999.0) for i, p in {one.token_id: one.logprob, **one.top}.items()}
            )
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def usage(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """Tokens of one HTTP request, which may hold several prompts and several answers to each."""
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    completion = sum(len(one.token_ids) for output in outputs for one in output.outputs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(output.num_cached_tokens for output in outputs)},
    }
