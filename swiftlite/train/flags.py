"""What `swift sft` can tell from its flags alone: mistakes on sight, the checkpoint to go on from, the model's directory.

Nothing heavy is imported or written here, so a wrong command line is answered at once. Does not know models, rows or the loop.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from swiftlite.errors import CheckpointError, UsageError
from swiftlite.options.parse import Options, flags_of
from swiftlite.options.resolve import inherit


def read_resumed(options: Options, checkpoint: Path) -> tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any]]:
    from swiftlite.train import checkpoint as store
    from swiftlite.train.resume import take_over

    state, tensors = store.read(checkpoint)
    if tensors is None:
        raise CheckpointError(
            f"cannot resume {checkpoint}", "it was saved without the optimizer's state (--save_only_model)",
            "go on from its weights with --adapters or --model",
        )  # fmt: skip
    return state, tensors, take_over(options, checkpoint)


def start_from(options: Options) -> Path | None:
    """The adapter whose weights training starts from. A full checkpoint becomes the model."""
    given = [part for part in (options.ckpt_dir, *options.adapters) if part]
    if not given:
        return None
    if len(given) > 1:
        raise UsageError("swift sft trains one adapter", f"got {len(given)}: {', '.join(given)}", "pass one --adapters directory")
    name = given[0].partition("=")[2] if "=" in given[0] and not os.path.exists(given[0]) else given[0]
    path = Path(name).expanduser()
    if not path.is_dir():
        raise CheckpointError(f"no directory {path}", "--adapters and --ckpt_dir take a checkpoint's folder", "check the path")
    for line in inherit(options, path):
        print(line)
    if (path / "adapter_config.json").is_file():
        if options.tuner_type == "full":
            raise UsageError("--tuner_type full cannot start from an adapter", fix="merge it first: swift export --merge_lora true")
        return path
    options.set("model", str(path), "--ckpt_dir")
    return None


def check(options: Options) -> Path:
    """Flags that are wrong on sight; returns the model's directory."""
    from swiftlite.chat import scales
    from swiftlite.hub import resolve_model
    from swiftlite.train import ranges, reporters

    name = options.model or options.model_type
    if not name:
        raise UsageError("swift sft: which model?", fix="pass --model DIRECTORY (or a hub id, or tiny-chat)")
    if not options.dataset and not options.self_cognition_sample:
        raise UsageError("swift sft: which data?", fix="pass --dataset FILE.jsonl (or --self_cognition_sample N)")
    if "all" in options.report_to:
        options.set("report_to", reporters.installed(), options.origins["report_to"])
    reporters.check(options.report_to)
    scales.parse(options.loss_scale)
    if options.streaming:
        from swiftlite.data import stream

        stream.check(options)
    if options.fsdp is not None:
        _check_fsdp(options)
    ranges.check(options)
    if options.max_steps <= 0 and options.num_train_epochs <= 0:
        raise UsageError("nothing to do: --num_train_epochs must be above 0")
    if options.quant_bits not in (0, 4, 8):
        raise UsageError(f"--quant_bits must be 4 or 8 in training, got {options.quant_bits}")
    if options.optim == "adamw_8bit" or options.quant_bits:
        from swiftlite.train.optimizers import check_8bit

        check_8bit()
    full_only = ("freeze_parameters_ratio", "freeze_parameters_regex", "trainable_parameters_regex")
    lora_only = ("use_dora", "lora_bias", "init_weights", "lorap_lr_ratio", "quant_bits")
    for flag in lora_only if options.tuner_type == "full" else full_only:
        if getattr(options, flag) != flags_of("sft")[flag].default:
            raise UsageError(f"--{flag} has no meaning with --tuner_type {options.tuner_type}", fix="leave it out")
    adapters = ("target_modules", "modules_to_save", "lora_rank", "lora_alpha", "lora_dropout", "use_rslora")
    idle = [f"--{flag}" for flag in adapters if options.given(flag)]
    if idle and options.tuner_type == "full":
        print(f"note: {', '.join(idle)}: without effect with --tuner_type full, which trains no adapter")
    if options.metric_for_best_model in ("exact_match", "rouge-l") and not options.predict_with_generate:
        raise UsageError(
            f"--metric_for_best_model {options.metric_for_best_model} needs answers", fix="add --predict_with_generate true"
        )  # fmt: skip
    if options.torch_compile and (options.predict_with_generate or options.sample_answers):
        raise UsageError("--torch_compile compiles layers for training, the engine could not answer with them", fix="leave one out")
    return resolve_model(name, options.model_revision, options.use_hf)


def _check_fsdp(options: Options) -> None:
    """UsageError for what cannot be sharded."""
    origin = options.origins["fsdp"]
    asked = origin if origin.startswith("--deepspeed") else "--fsdp"
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        none = asked.split()[0] + " none"
        raise UsageError(f"{asked} needs several processes to share the model", "this is one", f"set NPROC_PER_NODE, or use {none}")
    if options.torch_compile:
        raise UsageError(
            f"--torch_compile cannot run with {asked}", "sharded layers change their parameters in every pass", "leave one out"
        )
    if options.optim not in ("adamw", "sgd"):
        raise UsageError(f"--optim {options.optim} looks at whole matrices, {asked} leaves a share", fix="use --optim adamw or sgd")
    if options.sample_answers:
        raise UsageError(f"--sample_answers cannot run with {asked}", "the engine needs the whole model in a process", "leave one out")
    if options.predict_with_generate:
        raise UsageError(
            f"--predict_with_generate cannot run with {asked}", "the engine needs the whole model in a process", "leave one out"
        )  # fmt: skip
    peft = options.use_dora or options.lora_bias != "none" or options.init_weights != "true" or "all-embedding" in options.target_modules
    if peft or options.quant_bits:
        raise UsageError(
            f"{asked} shards plain LoRA and full training", fix=f"leave out {asked}, or the flags that ask for another adapter"
        )  # fmt: skip
