"""`LLM` runs a model without a server, in vLLM's manner."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from swiftlite.engine.config import EngineConfig
from swiftlite.engine.opening import open_engine
from swiftlite.engine.request import RequestOutput, SamplingParams
from swiftlite.errors import UsageError

if TYPE_CHECKING:
    import torch

    from swiftlite.chat.template import Template


class LLM:
    """A model (directory, `tiny-chat`, SWIFT model type or hub id) with an engine of its own.

    `settings` are EngineConfig's fields (max_model_len, max_num_seqs, kv_cache_memory, ...); `adapters` maps names to PEFT
    directories. Raises HubError, ModelError, AdapterError, or UsageError for a setting that is none.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str | torch.dtype = "auto",
        device: str = "auto",
        adapters: dict[str, str] | None = None,
        **settings: Any,
    ) -> None:
        from swiftlite.hub import resolve_model

        known = ["model", "dtype", "device", "adapters", *(field.name for field in dataclasses.fields(EngineConfig))]
        for name in settings:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                raise UsageError(f"LLM has no setting {name!r}", fix=f"did you mean {close[0]}?" if close else "known: " + ", ".join(known))
        self.engine = open_engine(resolve_model(model), EngineConfig(**settings), dtype=dtype, device=device, adapters=adapters)

    @cached_property
    def template(self) -> Template:
        """The model's chat template; `encode_prompt(messages)` gives token ids for `generate`."""
        from swiftlite.chat.template import Template

        return Template.load(self.engine.model_dir, self.engine.tokenizer)

    def generate(
        self,
        prompts: str | list[int] | Sequence[str | list[int]],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        adapter: str | list[str | None] | None = None,
    ) -> list[RequestOutput]:
        """Continue prompts (texts or token ids); outputs in input order. `adapter` is a name given to LLM, or one for each."""
        return self.engine.generate(prompts, sampling_params, adapter)

    def chat(
        self,
        messages: list[dict[str, Any]] | list[list[dict[str, Any]]],
        sampling_params: SamplingParams | None = None,
        adapter: str | None = None,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several, through the model's chat template."""
        template = self.template
        conversations: Any = [messages] if messages and isinstance(messages[0], dict) else messages
        params = sampling_params or SamplingParams()
        params = dataclasses.replace(params, stop_token_ids=[*params.stop_token_ids, *template.stop_ids])
        return self.engine.generate([template.encode_prompt(one, **template_options) for one in conversations], params, adapter)

    def shutdown(self) -> None:
        """End the engine's thread; what runs is aborted. Safe to call twice."""
        self.engine.shutdown()

    def __del__(self) -> None:
        if "engine" in self.__dict__:
            self.engine.shutdown()
