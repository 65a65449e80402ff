"""--deepspeed: its names and configuration files, said in our flags. DeepSpeed itself is not used.

Every key of a file becomes a flag, is named as one without effect here, or is refused: nothing that would change what is
learnt is passed over. Does not know models or processes, only how many there are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from swiftlite.errors import UsageError
from swiftlite.options.parse import Options, flags_of

STAGES = {0: None, 1: None, 2: "shard_grad_op", 3: "full_shard"}
AS_FLAGS = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.eps": "adam_epsilon",
    "optimizer.params.weight_decay": "weight_decay",
}
ADAM = ("Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam")
# How fast, how much is printed, how a lower precision is kept stable: torch and the loop have their own ways.
NO_EFFECT = re.compile(
    r"(zero_optimization(?!\.stage$)|fp16|bf16|activation_checkpointing|flops_profiler|comms_logger|tensorboard|wandb|csv_monitor|aio)\..*|scheduler\.type|"
    r"optimizer\.params\.torch_adam|steps_per_print|wall_clock_breakdown|dump_state|memory_breakdown|zero_allow_untested_optimizer|zero_force_ds_cpu_optimizer"
)


def apply(options: Options, world: int) -> None:
    """Set --fsdp and what else --deepspeed says, for `world` processes; a flag that the user gave must agree. UsageError."""
    text = options.deepspeed
    if text is None:
        return
    if text.lower() in ("", "none", "false"):
        _take(options, "fsdp", None, "--deepspeed none", "")
        return
    name = "--deepspeed {...}" if text.startswith("{") else f"--deepspeed {text}"
    found = re.fullmatch(r"zero([0-3])(_offload)?", text)
    content = _read(text, name) if found is None else {"zero_optimization": {"stage": int(found[1])}}
    if found and found[2]:
        _refuse_offload(name, text)
    stage, batch = 0, 0
    idle: list[str] = []
    for key, value in _leaves(content):
        if key == "zero_optimization.stage" and value in tuple(STAGES):
            stage = int(value)
        elif re.fullmatch(r"zero_optimization\.(cpu_offload\w*|offload_\w+\.device)", key) and value not in ("none", False):
            _refuse_offload(name, key)
        elif key in ("fp16.enabled", "bf16.enabled"):
            if value:
                _take(options, "torch_dtype", {"fp16": "float16", "bf16": "bfloat16"}[key[:4]], name, key)
        elif key == "optimizer.type" and value in ADAM:
            _take(options, "optim", "adamw", name, key)
        elif key == "optimizer.params.betas" and isinstance(value, list) and len(value) == 2:
            for flag, beta in zip(("adam_beta1", "adam_beta2"), value, strict=True):
                _take(options, flag, beta, name, key)
        elif key in AS_FLAGS:
            _take(options, AS_FLAGS[key], value, name, key)
        elif key == "train_batch_size" and type(value) is int:
            batch = value
        elif NO_EFFECT.fullmatch(key):
            idle.append(key)
        else:
            raise UsageError(
                f"{name}: {key} {value} is not done here", "it would change the training", "leave it out, or use the flags of swift sft"
            )
    if batch:
        _batch(options, batch, world, name)
    _take(options, "fsdp", STAGES[stage], name, "zero_optimization.stage")
    if STAGES[stage] is None:
        print(f"note: {name}: plain data parallel, each process holds the whole optimizer state, nothing is sharded")
    if idle:
        print(f"note: {name}: without effect here: {', '.join(idle)}")


def _read(text: str, name: str) -> dict[str, Any]:
    try:
        content = json.loads(text if text.startswith("{") else Path(text).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"{name}: neither zero0 to zero3 nor a file that can be read", str(error.strerror), "correct the path, or use e.g. zero2"
        ) from None
    except ValueError as error:
        raise UsageError(f"{name} is not valid JSON", str(error)) from None
    if not isinstance(content, dict):
        raise UsageError(f"{name} must hold one mapping")
    return content


def _leaves(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value), without those that are left to us."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        elif value != "auto" and value is not None:
            yield prefix + key, value


def _take(options: Options, flag: str, value: Any, name: str, key: str) -> None:
    """Set a flag that was left at its default; one that was given must say the same."""
    kind = flags_of("sft")[flag].kind
    wrong = value is not None and kind is not str and (isinstance(value, (str, bool, list)) or kind(value) != value)
    if wrong:
        raise UsageError(f"{name}: {key} is no value for --{flag}: {value!r}", fix="correct the file, or use auto")
    if options.given(flag) and options.values[flag] not in (value, "auto"):
        given = f"--{flag} {options.values[flag] or 'none'}"
        raise UsageError(
            f"{name} and {given} contradict each other", f"{key or 'none'} means --{flag} {value or 'none'}", "leave one of them out"
        )
    options.set(flag, value, name)


def _batch(options: Options, total: int, world: int, name: str) -> None:
    """train_batch_size: the rows of a step, of which the file or the flags may leave one factor open."""
    rows, passes = (
        options.values[flag] if options.given(flag) else None for flag in ("per_device_train_batch_size", "gradient_accumulation_steps")
    )
    rows = rows or total // (world * (passes or 1))
    passes = passes or total // (world * max(1, rows))
    if rows * passes * world != total:
        raise UsageError(
            f"{name}: train_batch_size {total} cannot be",
            f"{world} processes of {passes} passes of {rows} rows make {rows * passes * world}", 'correct it, or set it to "auto"',
        )  # fmt: skip
    options.set("per_device_train_batch_size", rows, name)
    options.set("gradient_accumulation_steps", passes, name)


def _refuse_offload(name: str, key: str) -> None:
    raise UsageError(
        f"{name}: {key}: nothing is offloaded here", "weights and optimizer state stay on the device",
        "leave offloading out; zero3 on more processes, --gradient_checkpointing true or --quant_bits 4 save memory",
    )  # fmt: skip
