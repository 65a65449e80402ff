"""One loaded model as its users see it: the engine, the names it is served under, and each name's template.

HTTP routes, the browser page and `swift infer` all ask this object, so they agree on names, templates and defaults. A name from
a request is only ever a dictionary key. It does not know HTTP, flags or files.
"""

from __future__ import annotations

import asyncio
import dataclasses
import difflib
import functools
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from swiftlite.adapters.names import NAME, NAME_RULE
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
        template_of: Callable[[Path], Template] | None = None,
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
        self._template_of = template_of or (lambda path: template)  # of an adapter's directory
        self._changing = threading.RLock()  # names and engine change together
        self.limits = Limits(engine.max_model_len, engine.vocab_size, max_logprobs, max_n)
        # Rust tokenizers let go of the GIL; two threads, so that one long prompt does not hold up the short ones.
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="tokenize")
        self._changes = ThreadPoolExecutor(1, thread_name_prefix="adapters")

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
        if served.adapter is not None and served.adapter not in self.adapters:  # unloaded while its prompt was made
            return self.submit(ids, params, self.served(served.adapter), request_id)
        return self.engine.submit(ids, params, adapter=served.adapter, request_id=request_id)

    def is_base(self, name: str) -> bool:
        return name in self.aliases or _loose(name) == _loose(self.name)

    def add_adapter(self, name: str, path: Path, *, read: bool = True) -> None:
        """Serve the adapter in `path` as `name`, in place of what had that name; `read` False: its weights come with its first request.

        Blocks; not for the event loop. AdapterError or TemplateError when it cannot be served, RequestError for the base's name.
        """
        if self.is_base(name) or not NAME.fullmatch(name):
            why = "that is the base model's" if self.is_base(name) else NAME_RULE
            raise RequestError(f"{name[:100]!r} cannot be an adapter's name", fix=why, param="lora_name")
        with self._changing:
            template = self._template_of(path)
            (self.engine.add_adapter if read else self.engine.register_adapter)(name, path)
            # A new dictionary: others may be going through the old one.
            self.adapters = {**self.adapters, name: Served(name, name, template)}

    def remove_adapter(self, name: str) -> None:
        """New requests do not find `name`; running ones end as they began. RequestError when it is not served."""
        with self._changing:
            self.adapters = {key: served for key, served in self.adapters.items() if key != name}
            self.engine.remove_adapter(name)

    async def change(self, function: Callable[..., T], *args: Any) -> T:
        """Run what adds or removes adapters in the one thread for that, so that running streams go on."""
        return await asyncio.get_running_loop().run_in_executor(self._changes, functools.partial(function, *args))

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
        self._changes.shutdown(wait=False, cancel_futures=True)
        self.engine.shutdown()
