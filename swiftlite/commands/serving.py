"""From flags to a running engine with names and templates: what deploy, infer, app-ui and bench share.

Everything that can be wrong in flags and paths is found before the model loads. Order of settings: command line, then the
checkpoint (`--ckpt_dir`, or the first of `--adapters`), then defaults.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swiftlite.adapters.names import NAME, NAME_RULE
from swiftlite.errors import AdapterError, CheckpointError, UsageError
from swiftlite.hub import resolve_model
from swiftlite.options.parse import Options
from swiftlite.options.resolve import inherit, read_args

if TYPE_CHECKING:
    from swiftlite.chat.template import Template
    from swiftlite.engine.engine import Engine
    from swiftlite.server.adapters import RuntimeAdapters
    from swiftlite.server.service import Service

DEFAULT_LORA = "default-lora"  # SWIFT's name for the adapter of --ckpt_dir
ENGINE_FLAGS = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size", "enable_prefix_caching", "gpu_memory_utilization",
                "enforce_eager", "max_lora_rank", "speculate_ngram")  # fmt: skip
SAMPLING_FLAGS = {
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p", "repetition_penalty": "repetition_penalty",
    "stop_words": "stop", "max_new_tokens": "max_tokens",
}  # fmt: skip


@dataclass
class Plan:
    """What will be loaded: directories that exist, under the names they will be served by."""

    model_dir: Path
    name: str
    aliases: tuple[str, ...] = ()
    adapters: dict[str, Path] = field(default_factory=dict)
    template: str | None = None  # as the user gave them; what a checkpoint says counts for that checkpoint only
    system: str | None = None


def is_adapter(directory: Path) -> bool:
    return (directory / "adapter_config.json").is_file()


def make_plan(options: Options) -> Plan:
    """Resolve model, checkpoint and adapters; merges first when asked. Raises SwiftError for anything that cannot be served."""
    _check_backend(options)
    if options.values.get("adapter_dir") is not None:
        _adapter_dir(options)
    template, system = options.values.get("template"), options.values.get("system")
    adapters = _named_adapters(options.adapters)
    checkpoint = _checkpoint(options.ckpt_dir) if options.ckpt_dir else None
    if checkpoint is not None and is_adapter(checkpoint):
        if DEFAULT_LORA in adapters:
            raise UsageError(f"two adapters are called {DEFAULT_LORA}", "that is the name of --ckpt_dir's", "rename yours")
        adapters = {DEFAULT_LORA: checkpoint, **adapters}
    model_checkpoint = checkpoint if checkpoint is not None and not is_adapter(checkpoint) else None
    settings_from = checkpoint or next(iter(adapters.values()), None)
    if settings_from is not None:
        before = dict(options.values)
        inherit(options, settings_from)
        taken = [f"{name} = {value!r}" for name, value in options.values.items() if value != before[name]]
        if taken:
            print(f"from {settings_from}: {', '.join(taken)}")
    if options.merge_lora:
        model_checkpoint = _merged(options, adapters)
    written = str(model_checkpoint) if model_checkpoint is not None else options.model or options.model_type or _base_of(adapters)
    if written is None:
        raise UsageError(f"swift {options.command} needs a model", fix=f"e.g. swift {options.command} --model tiny-chat")
    model_dir = model_checkpoint or resolve_model(written, options.model_revision, options.use_hf)
    name = options.values.get("served_model_name") or options.model_type or _short_name(written)
    if name in adapters:
        raise UsageError(f"an adapter has the base model's name {name!r}", fix="rename it: --adapters other-name=DIR")
    aliases = tuple({_short_name(written), *([written] if "/" in written and not Path(written).exists() else [])} - {name, *adapters})
    return Plan(model_dir, name, aliases, adapters, template, system)


def _check_backend(options: Options) -> None:
    if options.tensor_parallel_size > 1:
        raise UsageError(
            f"--tensor_parallel_size {options.tensor_parallel_size} is not possible with the native engine",
            "it runs a model on one device, and the vllm backend is not wired in yet",
            "leave the flag out, or set CUDA_VISIBLE_DEVICES to the one GPU to use",
        )
    if options.infer_backend == "vllm":
        print("note: the vllm backend is not wired in yet; the native engine answers (same requests, same adapters)")


def _short_name(model: str) -> str:
    return Path(model).resolve().name if Path(model).exists() else model.rstrip("/").rsplit("/", 1)[-1]


def _checkpoint(written: str) -> Path:
    path = Path(written).expanduser()
    if not path.is_dir():
        raise CheckpointError(f"--ckpt_dir {written} is not a directory", fix="pass a checkpoint-<step> folder of `swift sft`")
    if not is_adapter(path) and not (path / "config.json").is_file():
        if is_adapter(path / "default"):
            raise CheckpointError(
                f"{written} is in SWIFT's own adapter layout", fix=f"convert it: swift export --ckpt_dir {written} --to_peft_format true"
            )
        raise CheckpointError(
            f"{written} holds neither an adapter (adapter_config.json) nor a model (config.json)",
            fix="pass a checkpoint-<step> folder of `swift sft`",
        )
    return path


def _named_adapters(written: tuple[str, ...]) -> dict[str, Path]:
    """`name=directory`, or a directory, which is named after its folder."""
    found: dict[str, Path] = {}
    for item in written:
        name, equals, place = item.partition("=")
        if not equals or Path(item).is_dir():
            name, place = "", item
        path = Path(place).expanduser()
        if not path.is_dir():
            path = resolve_model(place) if re.fullmatch(r"[\w.-]+/[\w.-]+", place) and not path.parent.is_dir() else path
        if not path.is_dir():
            raise AdapterError(f"adapter {item}: {place} is not a directory", fix="write --adapters name=DIRECTORY")
        if not is_adapter(path):
            raise AdapterError(f"adapter {item}: {place} has no adapter_config.json", "it is not a PEFT adapter directory")
        name = name or path.resolve().name
        if not NAME.fullmatch(name):
            raise UsageError(f"{name!r} cannot be an adapter's name", fix=NAME_RULE)
        if name in found:
            raise UsageError(f"two adapters are called {name!r}", fix="name them: --adapters one=DIR two=DIR")
        found[name] = path
    return found


def _base_of(adapters: dict[str, Path]) -> str | None:
    """The base model that the first adapter's own file names."""
    for path in adapters.values():
        try:
            base = json.loads((path / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
        except (OSError, ValueError, AttributeError) as error:
            raise AdapterError(f"cannot read {path / 'adapter_config.json'}", str(error)) from None
        if base:
            print(f"model = {base!r} (from {path / 'adapter_config.json'})")
            return base
    return None


def _merged(options: Options, adapters: dict[str, Path]) -> Path:
    """`<adapter>-merged`, made now unless it is there; the adapter is taken out of `adapters`."""
    if not adapters:
        raise UsageError("--merge_lora needs an adapter", fix="pass --ckpt_dir (a LoRA checkpoint) or --adapters")
    name, adapter = next(iter(adapters.items()))
    target = adapter.resolve().with_name(adapter.resolve().name + "-merged")
    if target.is_dir():
        print(f"{target} is there already: used as it is")
    else:
        from swiftlite.adapters.merge import merge

        base = options.model or options.model_type or _base_of({name: adapter})
        if base is None:
            raise UsageError("--merge_lora needs the base model", fix="add --model")
        started = time.monotonic()
        merge(resolve_model(base, options.model_revision, options.use_hf), adapter, target)
        print(f"merged {name} into {target} ({time.monotonic() - started:.1f} s)")
    del adapters[name]
    return target


def load_engine(options: Options, plan: Plan | None = None, **overrides: Any) -> tuple[Engine, list[str]]:
    """The engine with its adapters, and their names. `overrides` are EngineConfig fields."""
    plan = plan or make_plan(options)
    from swiftlite.engine.config import EngineConfig
    from swiftlite.engine.opening import open_engine

    settings = {name: options.values[name] for name in ENGINE_FLAGS}
    settings["quantization"] = options.quant
    if options.kv_cache_memory is not None:
        settings["kv_cache_memory"] = int(options.kv_cache_memory * 2**30)
    for name in ("adapter_memory", "adapter_host_memory"):
        if options.values[name] is not None:
            settings[name] = int(options.values[name] * 2**30)
    if "max_logprobs" in options.values:
        settings["max_logprobs"] = options.max_logprobs
    engine = open_engine(
        plan.model_dir,
        EngineConfig(**{**settings, **overrides}),
        dtype=options.torch_dtype,
        device=options.device,
        adapters={name: str(path) for name, path in plan.adapters.items()},
        alone=True,
    )
    return engine, list(plan.adapters)


def load_service(options: Options, plan: Plan | None = None) -> Service:
    """Engine, templates and names as one Service."""
    from swiftlite.engine.request import SamplingParams

    plan = plan or make_plan(options)
    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        raise UsageError(f"--max_new_tokens must be at least 1, got {options.max_new_tokens}", fix="leave it out: what the context leaves")
    flags = {ours: options.values[flag] for flag, ours in SAMPLING_FLAGS.items() if options.values[flag] not in (None, ())}
    SamplingParams(**flags)  # a flag out of range fails here, before the model loads
    engine, _ = load_engine(options, plan)  # first: it begins the start (startup.py)
    from swiftlite.chat.template import Template
    from swiftlite.server.protocol import generation_defaults
    from swiftlite.server.service import Service

    try:
        template = Template.load(plan.model_dir, engine.tokenizer, name=plan.template, system=plan.system)
        templates = _Templates(plan, template, engine)
        return Service(
            engine,
            template,
            plan.name,
            adapters={name: templates(path) for name, path in plan.adapters.items()},
            template_of=templates,
            aliases=plan.aliases,
            defaults=generation_defaults(engine.generation_config) | flags,
            max_logprobs=options.values.get("max_logprobs", 20),
            owned_by=options.values.get("owned_by", "swift"),
        )
    except BaseException:
        engine.shutdown()
        raise


class _Templates:
    """The template that each adapter was trained with, so that serving and training see the same tokens; equal ones are one."""

    def __init__(self, plan: Plan, base: Template, engine: Engine) -> None:
        self.plan, self.engine = plan, engine
        self._known: dict[tuple[Any, ...], Template] = {(None, None): base}

    def __call__(self, adapter: Path) -> Template:
        from swiftlite.chat.template import Template

        plan, tokenizer = self.plan, self.engine.tokenizer
        own = adapter / "swift_template.json"
        if own.is_file():
            key: tuple[Any, ...] = (own.read_bytes(),)
            if key not in self._known:
                self._known[key] = Template.load(adapter, tokenizer, name=plan.template, system=plan.system)
            return self._known[key]
        saved = read_args(adapter)
        key = (None if plan.template else saved.get("template"), None if plan.system else saved.get("system"))
        if key not in self._known:
            self._known[key] = Template.load(plan.model_dir, tokenizer, name=plan.template or key[0], system=plan.system or key[1])
        return self._known[key]


def runtime_adapters(options: Options) -> RuntimeAdapters | None:
    """Who may load adapters over HTTP; None: nobody. UsageError for a root that is none."""
    from swiftlite.server.adapters import RuntimeAdapters

    if not options.allow_runtime_lora:
        return None
    root = options.adapter_root or options.adapter_dir
    if root is None:
        why = "clients name the directories to load, and only those inside one folder are allowed"
        raise UsageError("--allow_runtime_lora needs --adapter_root", why, "add --adapter_root DIR")
    return RuntimeAdapters(_folder("--adapter_root", root), options.admin_key)


@contextmanager
def watched(options: Options, service: Service) -> Iterator[None]:
    """Serve what lies in --adapter_dir while the block runs."""
    if options.adapter_dir is None:
        yield
        return
    from swiftlite.adapters.watch import Watcher

    def add(name: str, path: Path) -> None:
        if name in given:
            raise UsageError(f"another adapter was given the name {name}", fix="rename the folder")
        service.add_adapter(name, path, read=False)

    given = set(service.adapters)
    watcher = Watcher(_adapter_dir(options), add, service.remove_adapter, lambda line: print(line, flush=True))
    watcher.start()
    try:
        yield
    finally:
        watcher.stop()


def _adapter_dir(options: Options) -> Path:
    root = _folder("--adapter_dir", options.adapter_dir)
    if is_adapter(root):
        raise UsageError(f"--adapter_dir {options.adapter_dir} is an adapter itself", fix="pass the folder that holds it")
    return root


def _folder(flag: str, written: str) -> Path:
    path = Path(written).expanduser()
    if not path.is_dir():
        raise UsageError(f"{flag} {written} is not a directory", fix="make it, or pass another")
    return path.resolve()
