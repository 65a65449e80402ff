"""The engine: a loaded model behind a thread-safe face. Requests are checked and made here, in the caller's thread.

Everything that a request can get wrong is found before it is queued (lengths with their numbers, token ids, limits, the adapter's
name), so the step loop (`loop.py`) never waits for a tokenizer or a disk and never meets an impossible request.

It does not know HTTP, chat templates or training.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import itertools
import json
import random
import time
import uuid
import weakref
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swiftlite.engine.aside import in_own_thread
from swiftlite.engine.beam import BeamSearch
from swiftlite.engine.config import EngineConfig
from swiftlite.engine.detok import Decoder, Detokenizer
from swiftlite.engine.loop import StepLoop, shut_down
from swiftlite.engine.request import RequestOutput, SamplingParams
from swiftlite.engine.runner import Runner
from swiftlite.engine.sampler import SamplingState
from swiftlite.engine.sequence import Request, Sequence
from swiftlite.engine.signal import Signal
from swiftlite.engine.spec import NgramIndex
from swiftlite.engine.stream import Stream
from swiftlite.errors import AdapterError, ModelError, RequestError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from swiftlite.engine.ahead import Ahead
    from swiftlite.engine.lora import AdapterInfo, LoraManager

__all__ = ["Engine", "Stream"]
Prompt = str | list[int]


class Engine:
    """Loads a model and serves it. End it with `shutdown()`, or use it as a context manager."""

    def __init__(
        self,
        model_dir: str | Path,
        config: EngineConfig = EngineConfig(),
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        adapters: dict[str, str] | None = None,
        tokenizer: PreTrainedTokenizerFast | None = None,
        model: PreTrainedModel | None = None,
        ahead: Ahead | None = None,
    ) -> None:
        """`model`: the loaded model of `model_dir`, used as it is (its weights may be another's too: they are not packed).
        `ahead`: its weights that are packed already (`pack_ahead`).

        Raises ModelError, or AdapterError for one of `adapters` (name -> PEFT directory).
        """
        from swiftlite.models.device import choose_device, choose_dtype, use_device
        from swiftlite.models.loading import load_config, load_tokenizer

        self.config, self.model_dir = config, Path(model_dir)
        self.model_config = load_config(model_dir)
        self.generation_config = read_generation_config(self.model_dir)
        self.tokenizer = tokenizer or load_tokenizer(model_dir)
        self.device = choose_device(device) if isinstance(device, str) else device
        own_dtype = None if self.model_config.dtype is None else str(self.model_config.dtype).removeprefix("torch.")
        self.dtype = in_own_thread(lambda: choose_dtype(dtype, self.device, own_dtype), self.device)
        if config.max_num_batched_tokens is None:
            # The shorter a step, the shorter the gap that an arriving prompt leaves in the running streams, but each step reads all
            # weights: 512 tokens at a time are up to 10 % slower than 2048 on a CPU (by its memory), and far slower on a GPU.
            few = 512 if self.device.type == "cpu" else 2048
            self.config = config = dataclasses.replace(
                config, max_num_batched_tokens=few, max_num_prompt_tokens=config.max_num_prompt_tokens or 2048
            )
        if config.overlap is None:  # a CPU that runs the next step has no time to read the last one's tokens
            self.config = config = dataclasses.replace(config, overlap=self.device.type == "cuda")
        self.runner = in_own_thread(lambda: Runner(model_dir, config, self.dtype, self.device, model=model, ahead=ahead), self.device)
        self.vocab_size = self.runner.vocab_size
        self.max_model_len = min(self.runner.max_model_len, self.runner.num_blocks * config.block_size)
        named = (self.generation_config.get("eos_token_id"), self.model_config.get_text_config().eos_token_id, self.tokenizer.eos_token_id)
        self.eos_ids = frozenset(itertools.chain.from_iterable(ids if isinstance(ids, list) else [ids] for ids in named)) - {None}
        self._decoder = Decoder(self.tokenizer)
        self._order = itertools.count()
        self._loop = StepLoop(self.runner, config, self.runner.lora, functools.partial(use_device, self.device))
        self.runner.lora.on_gone = self._loop.adapter_gone
        atexit.register(shut_down, weakref.ref(self._loop))
        for name, path in (adapters or {}).items():
            self.add_adapter(name, path)
        if adapters:
            in_own_thread(self.runner.warm_up_adapters, self.device)

    # -- requests

    def submit(self, prompt: Prompt, params: SamplingParams, *, adapter: str | None = None, request_id: str | None = None) -> Stream:
        """Queue a request, from any thread. Text is tokenized as the tokenizer does by itself, special tokens in it included.

        Raises RequestError when it can never run (an unknown adapter included), OverloadError when too many wait.
        """
        request = self._make(prompt, params, adapter, request_id)
        try:
            self._loop.add([request], self.config.max_waiting)
        except BaseException:
            self._release(request.adapter)
            raise
        return Stream(request, self.abort)

    def generate(
        self,
        prompts: Prompt | SequenceOf[Prompt],
        params: SamplingParams | list[SamplingParams] | None = None,
        adapter: str | list[str | None] | None = None,
    ) -> list[RequestOutput]:
        """Run any number of prompts to the end; outputs in input order. `params` and `adapter` are one for all, or one each."""
        many: list[Prompt] = _as_list(prompts)
        each_params = params if isinstance(params, list) else [params or SamplingParams()] * len(many)
        each_adapter = adapter if isinstance(adapter, list) else [adapter] * len(many)
        if not len(many) == len(each_params) == len(each_adapter):
            raise RequestError(f"{len(many)} prompts, {len(each_params)} sampling parameters and {len(each_adapter)} adapters do not match")
        requests: list[Request] = []
        try:
            for one in zip(many, each_params, each_adapter, strict=True):
                requests.append(self._make(*one, None))
            self._loop.add(requests)
        except BaseException:
            for request in requests:
                self._release(request.adapter)
            raise
        streams = [Stream(request, self.abort) for request in requests]
        try:
            return [stream.result() for stream in streams]
        except BaseException:  # Ctrl-C while waiting
            for stream in streams:
                stream.abort()
            raise

    def abort(self, request_id: str) -> None:
        """End a request now, from any thread; nothing happens when it is unknown or finished."""
        self._loop.abort(request_id)

    def _make(self, prompt: Prompt, params: SamplingParams, adapter: str | None, request_id: str | None) -> Request:
        """A checked request with its sequences; holds a reference to its adapter's present version."""
        text, ids = (prompt, self.tokenizer(prompt)["input_ids"]) if isinstance(prompt, str) else (None, list(prompt))
        self._check_request(ids, params)
        stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.eos_ids)
        maskable = frozenset(token for token in stop_ids if 0 <= token < self.vocab_size)
        room = self.max_model_len - len(ids)
        max_len = len(ids) + (room if params.max_tokens is None else min(room, params.max_tokens))
        seed = random.getrandbits(63) if params.seed is None else params.seed
        request = Request(request_id or uuid.uuid4().hex, text, ids, params, None, stop_ids, time.monotonic(), Signal())
        request.siblings_pending = params.n > 1 and not params.use_beam_search
        request.prompt_logprobs = None if params.prompt_logprobs is None else [None]
        guesses = self.config.speculate_ngram

        def sequence(index: int) -> Sequence:
            sampling = SamplingState(params, ids, seed + index, maskable)
            detok = Detokenizer(self._decoder, ids, params.stop, params.include_stop_str_in_output, params.skip_special_tokens)
            seq = Sequence(request, index, list(ids), len(ids), max_len, None, sampling, detok, next(self._order))
            seq.logprobs = None if params.logprobs is None else []
            if guesses and sampling.plain and not params.use_beam_search:
                seq.ngrams = NgramIndex(ids, guesses)
            return seq

        request.sequences = [sequence(index) for index in range(params.n)]
        if params.use_beam_search:
            request.beam = BeamSearch(request, sequence(0))
        if adapter is not None:  # last: nothing can fail after it, so the reference cannot leak
            request.adapter = self._lora().acquire(adapter)
            for seq in (*request.sequences, *(request.beam.beams if request.beam else ())):
                seq.adapter = request.adapter
        return request

    def _check_request(self, ids: list[int], params: SamplingParams) -> None:
        if not ids:
            raise RequestError("the prompt is empty", "it has no tokens", "send at least one token", param="prompt")
        if len(ids) >= self.max_model_len:
            raise RequestError(
                f"the prompt has {len(ids)} tokens, at most {self.max_model_len - 1} fit",
                f"prompt and answer share {self.max_model_len} tokens: model and settings allow {self.runner.max_model_len}, "
                f"the KV cache holds {self.runner.num_blocks * self.config.block_size}",
                "shorten the prompt, or raise --max_model_len or --kv_cache_memory where they set the limit",
                param="prompt",
            )
        for what, tokens in (("prompt", ids), ("logit_bias", list(params.logit_bias or ()))):
            if tokens and (min(tokens) < 0 or max(tokens) >= self.vocab_size):
                wrong = next(token for token in tokens if not 0 <= token < self.vocab_size)
                raise RequestError(f"{what} has token id {wrong}", f"the model's ids are 0 to {self.vocab_size - 1}", param=what)
        for name, value, limit in (
            ("n", params.n, self.config.max_n),
            ("best_of", params.best_of, self.config.max_n),
            ("logprobs", params.logprobs, self.config.max_logprobs),
            ("prompt_logprobs", params.prompt_logprobs, self.config.max_logprobs),
        ):
            if value is not None and value > limit:
                raise RequestError(f"{name} is {value}, at most {limit} is allowed", param=name)

    # -- adapters

    def _lora(self) -> LoraManager:
        if self.runner.lora is None:
            raise AdapterError("this engine serves no adapters")
        return self.runner.lora

    def _release(self, version: Any) -> None:
        if version is not None:
            self._lora().release(version)

    def add_adapter(self, name: str, path: str | Path) -> AdapterInfo:
        """Read, check and register an adapter while requests run; under a taken name, new requests get the new weights."""
        version = self._lora().add(name, path)
        self._loop.poke()
        return self._lora().info(name, version)

    def register_adapter(self, name: str, path: str | Path) -> AdapterInfo:
        """The same after a look at the adapter's header only: its weights are read when the first request wants them."""
        version = self._lora().register(name, path)
        self._loop.poke()
        return self._lora().info(name, version)

    def remove_adapter(self, name: str) -> None:
        """New requests do not find it any more; running ones keep it until they end, then its memory is freed."""
        self._lora().remove(name)
        self._loop.poke()

    def adapters(self) -> list[AdapterInfo]:
        return [] if self.runner.lora is None else self.runner.lora.infos()

    # -- state

    @property
    def healthy(self) -> bool:
        """Requests are taken and steps succeed."""
        return self._loop.healthy

    def stats(self) -> dict[str, float]:
        """Counters since the start (tokens, requests, steps, ...) and gauges of this moment (running, waiting, *_blocks)."""
        return self._loop.stats()

    def check(self) -> None:
        """AssertionError when a block or an adapter reference leaked; looks between two steps."""
        self._loop.between_steps(self._check)

    def _check(self) -> None:
        self._loop.check()
        if self.runner.lora is not None:
            self.runner.lora.check(self._loop.adapters_held())

    def shutdown(self) -> None:
        """Abort what runs and end the loop's thread. Safe to call twice."""
        self._loop.stop()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()


def _as_list(prompts: Prompt | SequenceOf[Prompt]) -> list[Any]:
    one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
    return [prompts] if one else list(prompts)


def read_generation_config(model_dir: Path) -> dict[str, Any]:
    """generation_config.json, empty where there is none. ModelError when it is broken."""
    file = model_dir / "generation_config.json"
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is no JSON", str(error), "repair or delete it") from error
