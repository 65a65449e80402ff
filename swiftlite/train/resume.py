"""`--resume_from_checkpoint`: the settings come from the checkpoint; a flag that would change the training is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from swiftlite.errors import CheckpointError
from swiftlite.options.parse import Options, flags_of
from swiftlite.options.resolve import read_args

# These change where, when or how much is written, shown or computed, not what is learnt at a step. The number of steps is
# here too: a finished run may be extended (the schedule then spans the new length, which is said).
FREE = (
    "model", "model_revision", "use_hf", "device", "strict", "per_device_eval_batch_size", "gradient_checkpointing", "logging_steps",
    "eval_steps", "save_steps", "save_total_limit", "save_only_model", "report_to", "early_stop_interval",
    "create_checkpoint_symlink", "torch_compile", "fsdp", "num_train_epochs", "max_steps", "eval_limit", "max_new_tokens", "sample_answers",
    "push_to_hub", "hub_model_id", "hub_token", "hub_private_repo", "hub_strategy",
)  # fmt: skip
OWN = (
    "resume_from_checkpoint",
    "deepspeed",
    "output_dir",
    "add_version",
    "ckpt_dir",
    "adapters",
    "merge_lora",
    "load_args",
    "load_dataset_config",
)


def take_over(options: Options, checkpoint: Path) -> dict[str, Any]:
    """Set every flag that the user left out to the checkpoint's value; returns the saved settings.

    One that was left out then too still counts as not given. CheckpointError when a flag that matters was given another value.
    """
    saved = read_args(checkpoint)
    flags, changed, given = flags_of(options.command), [], saved.get("origins", {})
    for name, flag in flags.items():
        if name in OWN or name not in saved:
            continue
        value = tuple(saved[name]) if flag.many and saved[name] is not None else saved[name]
        if not options.given(name):
            options.set(name, value, str(checkpoint) if name in given else "default")
        elif options.values[name] != value and name not in FREE:
            changed.append(f"--{name} {options.values[name]} (it was {value})")
    if changed:
        raise CheckpointError(
            f"cannot resume {checkpoint} with other settings",
            ", ".join(changed),
            "leave the flags out (they come from the checkpoint), or start anew from its weights with --adapters or --model",
        )
    return saved


def check_fit(state: dict[str, Any], checkpoint: Path, fingerprint: str, total: int, processes: int = 1) -> None:
    """CheckpointError when the data changed, or there is nothing left to do."""
    if state["fingerprint"] != fingerprint:
        raise CheckpointError(
            f"cannot resume {checkpoint}: the encoded training rows differ from that run's",
            "a dataset file, the tokenizer or the template changed since",
            "restore them, or start anew from its weights with --adapters or --model",
        )
    if state["global_step"] >= total:
        raise CheckpointError(
            f"nothing to resume: {checkpoint} has done {state['global_step']} of {total} steps",
            fix="ask for more with --num_train_epochs or --max_steps, or train on from its weights with --adapters or --model",
        )
    if state["total_steps"] != total:
        print(f"note: {total} steps instead of {state['total_steps']}: the learning rate follows the longer schedule from here on")
    if state["processes"] != processes:
        print(f"note: processes: {processes}, before: {state['processes']}. Steps hold the same rows; dropout draws other numbers")
