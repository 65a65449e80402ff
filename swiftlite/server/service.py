"""One loaded model as its users see it: the engine, the names it is served under, and each name's template.

HTTP routes, the browser page and `swift infer` all ask this object, so they agree on names, templates and defaults. A name from
a request is only ever a dictionary key. It does not know HTTP, flags or files.
"""

from __future__ import annotations

import asyncio
import dataclasses
import difflib
import functools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from swiftlite.chat.template import Template
from swiftlite.engine.engine import Engine, Stream
from swiftlite.engine.request import SamplingParams
from swiftlite.errors import RequestError
from swiftlite.server.protocol import Limits

T = TypeVar("T")
SHORTEST = 16  # characters a token: a text below max_model_len * SHORTEST is always tokenised


class UnknownModel(RequestError):
    """The request names a model that is not served (HTTP 404)."""


@dataclasses.dataclass(frozen=True)
class Served:
    """What a request's model name stands for."""

    name: str
    adapter: str | None  # the engine's name for it; None: the base
    template: Template


def _loose(name: str) -> str:
    """Names that differ in `-` and `_` only are the same name (SWIFT registers my_tuner, its guide asks for my-tuner)."""
    return name.replace("-", "_")


class Service:
    """Engine + template + names. `defaults`: sampling values of the command line and the model, under SamplingParams' names."""

    def __init__(
        self,
        engine: Engine,
        template: Template,
        name: str,
        *,
        adapters: dict[str, Template] | None = None,
        aliases: tuple[str, ...] = (),
        defaults: dict[str, Any] | None = None,
        max_logprobs: int = 20,
        max_n: int = 128,
        owned_by: str = "swift",
    ) -> None:
        self.engine, self.name, self.aliases, self.owned_by = engine, name, aliases, owned_by
        self.defaults = defaults or {}
        self.created = int(time.time())
        self.base = Served(name, None, template)
        self.adapters = {adapter: Served(adapter, adapter, own) for adapter, own in (adapters or {}).items()}
        self.limits = Limits(engine.max_model_len, engine.vocab_size, max_logprobs, max_n)
        # Rust tokenizers let go of the GIL; two threads, so that one long prompt does not hold up the short ones.
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="tokenize")

    def served(self, name: str | None) -> Served:
        """The base for None, "", its name or an alias; else the adapter. UnknownModel names the nearest served name."""
        if not name or name == self.name or name in self.aliases:
            return self.base
        if name in self.adapters:
            return self.adapters[name]
        everyone = {_loose(adapter): served for adapter, served in self.adapters.items()} | {_loose(self.name): self.base}
        found = everyone.get(_loose(name))
        if found is not None:
            return found
        shown = name[:100]
        close = difflib.get_close_matches(shown, self.names(), n=1, cutoff=0.5)
        hint = f"did you mean `{close[0]}`?" if close else f"this server has: {', '.join(self.names()[:20])}"
        raise UnknownModel(f"The model `{shown}` does not exist", fix=hint, param="model")

    def names(self) -> list[str]:
        """The base first, then the adapters in the order they were given."""
        return [self.name, *self.adapters]

    def submit(self, ids: list[int], params: SamplingParams, served: Served, request_id: str | None = None) -> Stream:
        """Queue one request; RequestError when it can never run."""
        return self.engine.submit(ids, params, adapter=served.adapter, request_id=request_id)

    async def off_loop(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run templating or tokenising in a thread, so that running streams go on."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, functools.partial(function, *args, **kwargs))

    def check_length(self, text: str, param: str) -> None:
        """Refuse a text that cannot fit before seconds are spent on tokenising it."""
        most = self.limits.max_model_len
        if len(text) > most * SHORTEST and len(text) > most * self.longest_token:
            raise RequestError(f"the prompt has {len(text)} characters; this model takes at most {most} tokens", param=param)

    @functools.cached_property
    def longest_token(self) -> int:
        """Characters of the longest token of the vocabulary."""
        return max(map(len, self.engine.tokenizer.get_vocab()))

    @property
    def healthy(self) -> bool:
        return self.engine.healthy

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self.engine.shutdown()
