"""From the engine's cumulative snapshots to what was not sent yet, and the fields that chat and completions share."""

from __future__ import annotations

import dataclasses
import time
import uuid
from typing import Any

from swiftlite import __version__
from swiftlite.engine.request import CompletionOutput, TokenLogprob

FINGERPRINT = f"swiftlite-{__version__}"


@dataclasses.dataclass
class Delta:
    """The new part of one answer."""

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    finish_reason: str | None


@dataclasses.dataclass
class Cursor:
    """How much of one answer was sent. `every_token`: also tokens that add no text yet (log-probabilities, token ids)."""

    every_token: bool = False
    characters: int = 0
    tokens: int = 0
    finished: bool = False

    def advance(self, answer: CompletionOutput) -> Delta | None:
        """What came since the last call; None: nothing to send."""
        fresh_tokens = len(answer.token_ids) > self.tokens and self.every_token
        if self.finished or not (len(answer.text) > self.characters or fresh_tokens or answer.finish_reason):
            return None
        delta = Delta(
            answer.text[self.characters :],
            answer.token_ids[self.tokens :] if self.every_token else [],
            answer.logprobs[self.tokens :] if answer.logprobs is not None else None,
            answer.finish_reason,
        )
        self.characters, self.tokens = max(self.characters, len(answer.text)), len(answer.token_ids)
        self.finished = answer.finish_reason is not None
        return delta


def header(prefix: str, kind: str, model: str) -> dict[str, Any]:
    """The fields that every answer and every chunk begins with."""
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": FINGERPRINT,
    }


def ending(answer: CompletionOutput, stop_ids: tuple[int, ...]) -> dict[str, Any]:
    """`finish_reason`, and vLLM's `stop_reason`: the stop string or id that the request asked for, if that ended the answer."""
    return {"finish_reason": answer.finish_reason, "stop_reason": None if answer.stop_reason in stop_ids else answer.stop_reason}
