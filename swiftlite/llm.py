"""SWIFT's Python API of the 2.x releases, on this engine: `from swift.llm import ...` and `from swiftlite.llm import ...`.

Names, arguments and results are those of SWIFT's vLLM guide of May 2024. Two things are better than there: a stream never yields a
None entry, and a history's items are tuples (lists are taken too). Templates are this package's: a model's own chat template is
used wherever it ships one, so `get_template` with SWIFT's name for it gives the same tokens as training and serving.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swiftlite import LLM
from swiftlite.engine.config import EngineConfig
from swiftlite.engine.opening import open_engine
from swiftlite.engine.request import RequestOutput, SamplingParams
from swiftlite.errors import UsageError
from swiftlite.models.catalog import MODELS

if TYPE_CHECKING:
    from swiftlite.engine.engine import Engine

__all__ = [
    "LLM", "DeployArguments", "ExportArguments", "InferArguments", "LoRARequest", "ModelType", "SamplingParams", "SftArguments",
    "VllmGenerationConfig", "XRequestConfig", "deploy_main", "export_main", "get_default_template_type", "get_model_list_client",
    "get_template", "get_vllm_engine", "infer_main", "inference_client", "inference_stream_vllm", "inference_vllm", "sft_main",
]  # fmt: skip

ModelType = type("ModelType", (), {name.replace("-", "_"): name for name in ("tiny-chat", *MODELS)})
ModelType.__doc__ = "SWIFT's names as attributes: ModelType.qwen_7b_chat == 'qwen-7b-chat'."

GENERATION = "default-generation"  # SWIFT's name for "no chat template": a base model
# model_type begins with -> SWIFT's template type, for models that ship no template of their own
TEMPLATE_TYPES = {
    "tiny": "chatml", "qwen": "qwen", "yi": "yi", "llama2": "llama", "llama3": "llama3", "mistral": "llama", "deepseek": "deepseek",
    "gemma": "gemma", "phi3": "phi3", "phi4": "phi4", "glm4": "chatglm4", "chatglm3": "chatglm3", "baichuan2": "baichuan",
    "internlm2": "internlm2", "smollm2": "chatml",
}  # fmt: skip


def get_default_template_type(model_type: str) -> str:
    """SWIFT's template type of a model_type; `default-generation` for base models and unknown names."""
    chat = any(part in model_type for part in ("chat", "instruct", "-it", "qwen3-", "phi4", "0414"))
    if not chat:
        return GENERATION
    return next((name for prefix, name in TEMPLATE_TYPES.items() if model_type.startswith(prefix)), "chatml")


def get_template(template_type: str, tokenizer: Any, default_system: str | None = None, **_: Any) -> Any:
    """The template: the tokenizer's own where it has one, else the built-in of that name. Raises TemplateError.

    Further arguments of SWIFT (max_length, truncation_strategy) belong to training here and are ignored.
    """
    from swiftlite.chat.template import Template

    if template_type == GENERATION:
        return Template(tokenizer, None, GENERATION, default_system)
    directory = Path(tokenizer.name_or_path)
    return Template.load(directory, tokenizer, name=None if tokenizer.chat_template else template_type, system=default_system)


# -- inference


@dataclass
class VllmGenerationConfig:
    """How to sample; the same names as transformers' generation config. Change its fields at will between calls."""

    max_new_tokens: int | None = 64
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    do_sample: bool = True
    num_beams: int = 1
    n: int = 1
    length_penalty: float = 1.0
    stop: list[str] = field(default_factory=list)
    seed: int | None = None

    def params(self) -> SamplingParams:
        """The engine's view. Raises RequestError on values out of range."""
        beams: dict[str, Any] = {}
        if self.num_beams != 1:
            beams = {"use_beam_search": True, "best_of": self.num_beams, "length_penalty": self.length_penalty}
        return SamplingParams(
            n=self.n, max_tokens=self.max_new_tokens, temperature=self.temperature if self.do_sample else 0.0, top_k=self.top_k,
            top_p=self.top_p, repetition_penalty=self.repetition_penalty, stop=list(self.stop), seed=self.seed, **beams,
        )  # fmt: skip


@dataclass(frozen=True)
class LoRARequest:
    """An adapter by name and directory; the number is vLLM's and means nothing here."""

    lora_name: str
    lora_int_id: int
    lora_local_path: str


class VllmEngine:
    """The engine under the attributes that SWIFT's guide uses: hf_tokenizer, generation_config, model_type, model_dir."""

    def __init__(self, engine: Engine, model_type: str) -> None:
        self.engine, self.model_type = engine, model_type
        self.model_dir, self.hf_tokenizer = str(engine.model_dir), engine.tokenizer
        known = VllmGenerationConfig.__dataclass_fields__
        own = {name: value for name, value in engine.generation_config.items() if name in known and value is not None}
        self.generation_config = VllmGenerationConfig(**own)
        self._adapters: dict[str, str] = {}

    def adapter(self, request: LoRARequest | None) -> str | None:
        """The engine's name of an adapter, loaded on its first use, or again under the same name from another directory."""
        if request is None:
            return None
        path = str(Path(request.lora_local_path).resolve())
        if self._adapters.get(request.lora_name) != path:
            self.engine.add_adapter(request.lora_name, path)
            self._adapters[request.lora_name] = path
        return request.lora_name

    def shutdown(self) -> None:
        """End the engine's thread."""
        self.engine.shutdown()


def get_vllm_engine(
    model_type: str,
    torch_dtype: Any = None,
    *,
    model_id_or_path: str | None = None,
    revision: str | None = None,
    gpu_memory_utilization: float = 0.9,
    tensor_parallel_size: int = 1,
    max_model_len: int | None = None,
    engine_kwargs: dict[str, Any] | None = None,
    use_async: bool = False,
    enable_lora: bool = False,
    max_loras: int = 1,
    max_lora_rank: int = 16,
) -> VllmEngine:
    """An engine for a model_type (or `model_id_or_path`). LoRA is always on, at any rank; `use_async` makes no difference.

    `engine_kwargs` are EngineConfig's fields. Raises HubError, ModelError, UsageError.
    """
    from swiftlite.hub import resolve_model

    if tensor_parallel_size != 1:
        raise UsageError("tensor_parallel_size above 1 needs the vLLM backend", "this engine runs on one device", "leave it at 1")
    dtype = "auto" if torch_dtype is None else str(torch_dtype).removeprefix("torch.")
    config = EngineConfig(max_model_len=max_model_len, gpu_memory_utilization=gpu_memory_utilization, **(engine_kwargs or {}))
    return VllmEngine(open_engine(resolve_model(model_id_or_path or model_type, revision), config, dtype=dtype), model_type)


Request = dict[str, Any]  # query, and maybe history [(query, response), ...] and system


def _submit(engine: VllmEngine, template: Any, requests: list[Request], config: VllmGenerationConfig | None, lora: LoRARequest | None):
    params = (config or engine.generation_config).params()
    params.stop_token_ids = sorted({*params.stop_token_ids, *template.stop_ids})
    adapter = engine.adapter(lora)
    prompts = [_encode(template, request) for request in requests]  # all of them before one runs
    return [engine.engine.submit(ids, copy.copy(params), adapter=adapter) for ids in prompts]


def _encode(template: Any, request: Request) -> list[int]:
    if not template.has_chat:
        return template.encode_text(request["query"])
    messages = [{"role": "system", "content": request["system"]}] if request.get("system") else []
    for query, response in request.get("history") or []:
        messages += [{"role": "user", "content": query}, {"role": "assistant", "content": response}]
    return template.encode_prompt([*messages, {"role": "user", "content": request["query"]}])


def _answer(request: Request, text: str) -> dict[str, Any]:
    history = [tuple(turn) for turn in request.get("history") or []]
    return {"response": text, "history": [*history, (request["query"], text)]}


def inference_vllm(
    llm_engine: VllmEngine,
    template: Any,
    request_list: list[Request],
    *,
    generation_config: VllmGenerationConfig | None = None,
    lora_request: LoRARequest | None = None,
    use_tqdm: bool = False,
    verbose: bool = False,
) -> list[dict[str, Any]]:
    """Answer all requests together: [{'response', 'history'}] in input order. Raises RequestError before anything runs."""
    streams = _submit(llm_engine, template, request_list, generation_config, lora_request)
    if use_tqdm:
        from rich.progress import track

        streams = track(streams, "answering")
    answers = [_answer(request, _text(stream.result())) for request, stream in zip(request_list, streams, strict=True)]
    if verbose:
        for request, answer in zip(request_list, answers, strict=True):
            print(f"[QUERY] {request['query']}\n[RESPONSE] {answer['response']}")
    return answers


def inference_stream_vllm(
    llm_engine: VllmEngine,
    template: Any,
    request_list: list[Request],
    *,
    generation_config: VllmGenerationConfig | None = None,
    lora_request: LoRARequest | None = None,
    use_tqdm: bool = False,
) -> Iterator[list[dict[str, Any]]]:
    """The same list as `inference_vllm` at every step, with the texts so far."""
    streams = [iter(s) for s in _submit(llm_engine, template, request_list, generation_config, lora_request)]
    answers = [_answer(request, "") for request in request_list]
    alive = list(range(len(streams)))
    while alive:
        ended = []
        for index in alive:
            # the oldest one moves at every step, so waiting for it is waiting for the step
            if index == alive[0] or streams[index].changed:
                output = next(streams[index])
                answers[index] = _answer(request_list[index], _text(output))
                if output.finished:
                    ended.append(index)
        alive = [index for index in alive if index not in ended]
        yield list(answers)


def _text(output: RequestOutput) -> str:
    if output.error:
        raise RuntimeError(output.error)
    return output.outputs[0].text


# -- the client of a running `swift deploy`


@dataclass
class XRequestConfig:
    """A request's settings; None leaves the server's default."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    n: int = 1
    seed: int | None = None
    stop: list[str] = field(default_factory=list)
    stream: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0


def _client(host: str, port: str | int, api_key: str) -> Any:
    from openai import OpenAI

    return OpenAI(api_key=api_key, base_url=f"http://{host}:{port}/v1")


def get_model_list_client(host: str = "127.0.0.1", port: str | int = "8000", api_key: str = "EMPTY") -> Any:
    """The models of a running server: `.data[i].id`, the base first."""
    return _client(host, port, api_key).models.list()


def inference_client(
    model_type: str,
    query: str,
    history: list[Any] | None = None,
    system: str | None = None,
    *,
    request_config: XRequestConfig | None = None,
    host: str = "127.0.0.1",
    port: str | int = "8000",
    is_chat_request: bool | None = None,
    api_key: str = "EMPTY",
) -> Any:
    """Ask a running server: an OpenAI response, or an iterator of chunks with `stream=True`.

    A base model without chat template is asked to complete (`.choices[0].text`); which one it is, the server's model list says.
    """
    client = _client(host, port, api_key)
    config = request_config or XRequestConfig()
    settings = {
        name: value for name, value in vars(config).items() if value not in (None, []) and name not in ("top_k", "repetition_penalty")
    }
    extra = {name: value for name in ("top_k", "repetition_penalty") if (value := getattr(config, name)) is not None}
    if is_chat_request is None:
        is_chat_request = bool((client.models.retrieve(model_type).model_extra or {}).get("is_chat", True))
    if not is_chat_request:
        return client.completions.create(model=model_type, prompt=query, extra_body=extra, **settings)
    messages: list[Any] = [{"role": "system", "content": system}] if system else []
    for asked, answered in history or []:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    messages.append({"role": "user", "content": query})
    return client.chat.completions.create(model=model_type, messages=messages, extra_body=extra, **settings)


# -- the commands as functions


def _arguments(command: str):
    def make(**flags: Any) -> Any:
        from swiftlite.options.parse import from_mapping

        return from_mapping(command, flags)

    make.__doc__ = f"The flags of `swift {command}` as keyword arguments. Raises UsageError."
    return make


SftArguments, InferArguments = _arguments("sft"), _arguments("infer")
ExportArguments, DeployArguments = _arguments("export"), _arguments("deploy")


def sft_main(arguments: Any) -> dict[str, Any]:
    """Train; returns the run's info: last_model_checkpoint, best_model_checkpoint, ..."""
    from swiftlite.commands.sft import sft

    return sft(arguments)


def infer_main(arguments: Any) -> int:
    """`swift infer`."""
    from swiftlite.commands.infer import main

    return main(arguments)


def export_main(arguments: Any) -> int:
    """`swift export`."""
    from swiftlite.commands.export import main

    return main(arguments)


def deploy_main(arguments: Any) -> int:
    """`swift deploy`; returns when the server ends."""
    from swiftlite.commands.deploy import main

    return main(arguments)
