"""SWIFT's flag names of three generations (2.x, 3.x, 4.x) and the field's common ones, mapped to ours: the only such table.

An alias holds where the command has the flag it stands for and no flag of the alias's own name (`--batch_size` is
`--per_device_train_batch_size` for `sft`, and itself for `bench`).
"""

from __future__ import annotations

ALIASES: dict[str, str] = {
    # model
    "m": "model",
    "model_id_or_path": "model",
    "model_name_or_path": "model",
    "revision": "model_revision",
    "dtype": "torch_dtype",
    # template
    "template_type": "template",
    "chat_template": "template",
    # data
    "dataset_test_ratio": "split_dataset_ratio",
    "dataset_seed": "data_seed",
    "custom_train_dataset_path": "dataset",
    "custom_val_dataset_path": "val_dataset",
    "custom_dataset_info": "dataset_info",
    "interleave_probs": "interleave_prob",
    "max_seq_length": "max_length",
    "shuffle_buffer": "shuffle_buffer_size",
    "train_dataset_shuffle": "dataset_shuffle",
    # checkpoint
    "resume_from": "resume_from_checkpoint",
    "lora_modules": "adapters",
    "adapter": "adapters",
    "load_args_from_ckpt_dir": "load_args",
    "load_data_args": "load_dataset_config",
    # adapter
    "sft_type": "tuner_type",
    "train_type": "tuner_type",
    "lora_target_modules": "target_modules",
    "lora_modules_to_save": "modules_to_save",
    "lora_dropout_p": "lora_dropout",
    "lora_r": "lora_rank",
    "lora_bias_trainable": "lora_bias",
    "init_lora_weights": "init_weights",
    "lora_lr_ratio": "lorap_lr_ratio",
    # training
    "batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "lr_scheduler": "lr_scheduler_type",
    "epochs": "num_train_epochs",
    "add_output_dir_suffix": "add_version",
    "use_gradient_checkpointing": "gradient_checkpointing",
    "lr": "learning_rate",
    "optimizer": "optim",
    "min_lr_ratio": "min_lr_rate",
    "neftune_alpha": "neftune_noise_alpha",
    "label_smoothing": "label_smoothing_factor",
    "early_stopping_patience": "early_stop_interval",
    "gradient_accumulation": "gradient_accumulation_steps",
    "padding_free": "packing",
    "push_hub_strategy": "hub_strategy",
    # generation
    "max_tokens": "max_new_tokens",
    "stop": "stop_words",
    # engine
    "vllm_max_model_len": "max_model_len",
    "vllm_max_num_seqs": "max_num_seqs",
    "vllm_max_lora_rank": "max_lora_rank",
    "vllm_gpu_memory_utilization": "gpu_memory_utilization",
    "vllm_enforce_eager": "enforce_eager",
    "vllm_tensor_parallel_size": "tensor_parallel_size",
    "vllm_enable_prefix_caching": "enable_prefix_caching",
    "max_num_tokens": "max_num_batched_tokens",
    # server and page
    "server_name": "host",
    "server_port": "port",
    "model_alias": "served_model_name",
    # export
    "quantization_bit": "quant_bits",
    "output_dir": "export_dir",
}

# Values with several spellings, by flag.
VALUES: dict[str, dict[str, str]] = {
    "torch_dtype": {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32", "AUTO": "auto"},
    "infer_backend": {"AUTO": "auto", "pt": "native", "transformers": "native"},
    "target_modules": {"ALL": "all-linear", "DEFAULT": "all-linear", "AUTO": "all-linear"},
    "fsdp": {
        **dict.fromkeys(("", "false", "False", "None"), "none"),
        "fsdp2": "full_shard",
        "full_shard auto_wrap": "full_shard",
        "shard_grad_op auto_wrap": "shard_grad_op",
    },
    "hub_strategy": {
        "push_best": "end",
        "push_last": "every_save",
        "checkpoint": "every_save",
        "all_checkpoints": "every_save",
    },
    "metric_for_best_model": {
        **{f"eval_{name}": name for name in ("loss", "token_acc", "exact_match", "rouge-l")},
        "acc": "token_acc",
        "rouge_l": "rouge-l",
    },
    "lr_scheduler_type": {"constant_with_warmup": "constant", "warmup_stable_decay": "wsd"},
    "optim": {
        "adamw_torch": "adamw",
        "adamw_torch_fused": "adamw",
        "adamw_hf": "adamw",
        "adamw_bnb_8bit": "adamw_8bit",
        "paged_adamw_8bit": "adamw_8bit",
    },
    "init_weights": {"True": "true", "False": "false"},
}

# Flags of SWIFT that are accepted because guides carry them, and why they do nothing here.
NO_EFFECT: dict[str, str] = {
    "vllm_enable_lora": "adapters are always served",
    "vllm_max_loras": "as many adapters as memory holds",
    "max_loras": "as many adapters as memory holds",
    "use_flash_attn": "attention is chosen per device",
    "attn_impl": "attention is chosen per device",
    "dataset_num_proc": "rows are encoded in one pass",
    "preprocess_num_proc": "rows are encoded in one pass",
    "lazy_tokenize": "rows are encoded in one pass",
    "dataloader_num_workers": "rows are encoded before training",
    "tuner_backend": "adapters are always in PEFT's format",
    "check_model": "hub files are checked by their client",
    "check_model_is_latest": "hub files are checked by their client",
    "check_dataset_strategy": "every row is checked",
    "ignore_args_error": "flags are always checked",
    "disable_tqdm": "progress goes quiet when output is not a terminal",
    "ddp_backend": "chosen by device",
    "save_strategy": "set --save_steps",
    "eval_strategy": "set --eval_steps",
    "save_safetensors": "always",
    "greater_is_better": "follows from --metric_for_best_model",
    "lora_dtype": "adapters are trained and saved in float32",
    "load_best_model_at_end": "the best checkpoint is always kept, and named at the end",
}
