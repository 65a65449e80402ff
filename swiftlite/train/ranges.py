"""What values the numeric flags of `swift sft` may have. No number that makes no sense reaches a step, NaN least of all."""

from __future__ import annotations

import math

from swiftlite.errors import UsageError
from swiftlite.options.parse import Options

RANGES = {
    "at least 1": (
        lambda value: value >= 1,
        ("logging_steps", "save_steps", "eval_steps", "save_total_limit", "early_stop_interval", "per_device_train_batch_size",
         "per_device_eval_batch_size", "gradient_accumulation_steps", "max_length", "eval_limit", "max_new_tokens", "lora_rank",
         "shuffle_buffer_size"),
    ),
    "a number above 0": (lambda value: 0 < value < math.inf, ("learning_rate", "lorap_lr_ratio", "adam_epsilon")),
    "a number from 0 up": (
        lambda value: 0 <= value < math.inf,
        ("weight_decay", "lora_alpha", "neftune_noise_alpha", "max_grad_norm", "warmup_steps", "num_train_epochs", "sample_answers",
         "self_cognition_sample", "data_seed"),
    ),
    "from 0 to below 2**63": (lambda value: 0 <= value < 2**63, ("seed",)),
    "between 0 and 1": (lambda value: 0 <= value <= 1, ("warmup_ratio", "min_lr_rate", "wsd_decay_ratio", "freeze_parameters_ratio")),
    "from 0 to below 1": (
        lambda value: 0 <= value < 1, ("split_dataset_ratio", "lora_dropout", "label_smoothing_factor", "adam_beta1", "adam_beta2"),
    ),
}  # fmt: skip


def check(options: Options) -> None:
    """UsageError for the first flag out of its range."""
    for words, (fits, names) in RANGES.items():
        for name in names:
            value = options.values[name]
            if value is not None and not fits(value):
                raise UsageError(f"--{name} must be {words}, got {value}")
