"""Every flag of every command, defined once: one frozen dataclass per concern.

A field's annotation is the flag's type (`bool`, `int`, `float`, `str`, `tuple[str, ...]`, each `| None` where unset has a
meaning of its own), its default is the default, its help text stands beside it. `COMMANDS` says which concerns a command
takes. Nothing here is imported that costs start-up time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def opt(default: Any, help: str, choices: tuple[str, ...] = ()) -> Any:
    """One flag. `choices` are checked by the parser."""
    return field(default=default, metadata={"help": help, "choices": choices})


DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and in which arithmetic."""

    model: str | None = opt(None, "model: a directory, a hub id, or 'tiny-chat' (bundled)")
    model_type: str | None = opt(None, "SWIFT name of the model, e.g. qwen2_5-0_5b-instruct; gives the hub id and the served name")
    model_revision: str | None = opt(None, "branch, tag or commit on the hub")
    use_hf: bool = opt(False, "look on Hugging Face first (default: ModelScope first); also USE_HF=1")
    torch_dtype: str = opt("auto", "arithmetic; auto measures bfloat16 against float32 on this machine", DTYPES)
    device: str = opt("auto", "auto, cpu, cuda or cuda:N")


@dataclass(frozen=True)
class TemplateOptions:
    """How a conversation becomes tokens."""

    template: str | None = opt(None, "built-in template's name; default: the tokenizer's own chat template")
    system: str | None = opt(None, "system prompt, or a .txt file that holds it; a row's own system message wins")


@dataclass(frozen=True)
class DataOptions:
    """Rows to train or evaluate on."""

    dataset: tuple[str, ...] = opt(
        (), "path or id[:subset][#n], several allowed: jsonl, json, csv, txt, folder, hub id, a name such as alpaca-zh or self-cognition"
    )
    val_dataset: tuple[str, ...] = opt((), "the same, for evaluation; default: split off by --split_dataset_ratio")
    split_dataset_ratio: float = opt(0.01, "share of the rows held out for evaluation when there is no --val_dataset")
    train_dataset_sample: int = opt(-1, "use only this many training rows (-1: all)")
    val_dataset_sample: int = opt(-1, "use only this many evaluation rows (-1: all)")
    self_cognition_sample: int = opt(0, "add this many rows that say who the model is (needs --model_name and --model_author)")
    model_name: tuple[str, ...] = opt((), "the model's new name: Chinese then English, or one for both")
    model_author: tuple[str, ...] = opt((), "who made it: Chinese then English, or one for both")
    dataset_info: str | None = opt(None, "JSON file that names datasets: ids or paths, subsets, columns (SWIFT's or LLaMA-Factory's form)")
    interleave_prob: tuple[float, ...] = opt((), "mix the datasets by these probabilities, one for each; default: all rows of all")
    stopping_strategy: str = opt(
        "first_exhausted", "mixing ends when the first dataset is used up, or when all are", ("first_exhausted", "all_exhausted")
    )
    columns: str | None = opt(None, 'rename columns: a JSON object, e.g. \'{"text1": "query"}\'')
    max_length: int | None = opt(None, "longest row in tokens; default: 2048, or the model's limit where that is less")
    truncation_strategy: str = opt(
        "delete", "a longer row is dropped (delete), cut (left, right) or cut into several (split)", ("delete", "left", "right", "split")
    )
    load_from_cache_file: bool = opt(True, "take rows encoded before, where data, template, tokenizer and settings are the same")
    loss_scale: str = opt(
        "default",
        "what is learnt: default (every assistant turn), last_round, all (all text); with + or alone: ignore_empty_think leaves out an "
        "empty <think> block; react, hermes, qwen, alpha_umi or a .json file weigh parts of answers",
    )
    strict: bool = opt(False, "fail on the first bad row instead of counting it")
    streaming: bool = opt(False, "read and encode rows while training, block by block; needs --max_steps, memory holds one block")
    shuffle_buffer_size: int = opt(1000, "rows in a block of --streaming: shuffled and packed within it")
    dataset_shuffle: bool = opt(True, "shuffle the training rows; false: they come in the order of the data, packed or not")
    data_seed: int = opt(42, "seed of sampling, splitting and shuffling")


@dataclass(frozen=True)
class CheckpointOptions:
    """What was trained before."""

    ckpt_dir: str | None = opt(None, "checkpoint of `swift sft` (adapter or full model); its settings are taken over")
    adapters: tuple[str, ...] = opt((), "LoRA adapters, as name=directory or directory")
    merge_lora: bool = opt(False, "merge --ckpt_dir's adapter into its base first, into <ckpt_dir>-merged")
    load_args: bool = opt(True, "take model, template and system from the checkpoint's settings")
    load_dataset_config: bool = opt(False, "take the datasets from the checkpoint's settings too")


@dataclass(frozen=True)
class LoraOptions:
    """What is trained."""

    tuner_type: str = opt("lora", "low-rank adapters, or all weights", ("lora", "full"))
    target_modules: tuple[str, ...] = opt(
        ("all-linear",), "linears that get an adapter: all-linear, names, or one regular expression; all-embedding adds the embeddings"
    )  # fmt: skip
    modules_to_save: tuple[str, ...] = opt((), "modules trained whole and saved beside the adapter, e.g. embed_tokens lm_head")
    lora_rank: int = opt(8, "rank of the adapters")
    lora_alpha: float = opt(32, "the adapter's output is scaled by alpha / rank")
    lora_dropout: float = opt(0.0, "dropout on the adapter's input")
    use_rslora: bool = opt(False, "scale by alpha / sqrt(rank) instead (arXiv 2312.03732)")
    use_dora: bool = opt(False, "train each weight's magnitude apart from its direction (arXiv 2402.09353); slower")
    lora_bias: str = opt("none", "also train biases: all, or those of adapted linears", ("none", "all", "lora_only"))
    init_weights: str = opt("true", "how adapters begin: true, gaussian, orthogonal, pissa, pissa_niter_16 or olora")
    quant_bits: int = opt(0, "QLoRA: hold the frozen base in 4 or 8 bits; needs bitsandbytes (0: as it is)")
    lorap_lr_ratio: float | None = opt(None, "LoRA+: B learns so many times faster than A, e.g. 16 (arXiv 2402.12354)")
    freeze_parameters_ratio: float = opt(0.0, "full: freeze this share of the weights, from the input side")
    freeze_parameters_regex: str | None = opt(None, "full: freeze parameters whose name this finds")
    trainable_parameters_regex: str | None = opt(None, "full: train parameters whose name this finds, whatever froze them")


@dataclass(frozen=True)
class TrainOptions:
    """The training loop."""

    output_dir: str = opt("output", "runs go to <output_dir>/<model>/vN-<time>/")
    add_version: bool = opt(True, "make a new vN-<time> folder per run; false: write straight into --output_dir")
    num_train_epochs: float = opt(1.0, "passes over the data")
    max_steps: int = opt(-1, "stop after this many optimizer steps (-1: by epochs)")
    per_device_train_batch_size: int = opt(
        1, "rows a forward pass; with --packing, the token budget of so many rows of mean length; chosen when neither this nor "
        "--gradient_accumulation_steps is given"
    )  # fmt: skip
    per_device_eval_batch_size: int = opt(1, "rows a forward pass in evaluation")
    gradient_accumulation_steps: int | None = opt(None, "forward passes a step; default, also as auto: about 16 rows a step")
    packing: bool = opt(
        True, "fill every forward pass with whole rows up to its token budget; rows never see each other: a model that cannot keep them "
        "apart (convolutions, recurrent states) is found out when it is loaded, and takes one row a forward pass"
    )  # fmt: skip
    learning_rate: float | None = opt(None, "peak learning rate; default 1e-4 for lora, 1e-5 for full")
    lr_scheduler_type: str = opt(
        "cosine", "schedule after warm-up; wsd holds the peak and falls at the end",
        ("cosine", "linear", "constant", "cosine_with_min_lr", "wsd"),
    )  # fmt: skip
    min_lr_rate: float = opt(0.1, "where cosine_with_min_lr and wsd end, as a share of the peak")
    wsd_decay_ratio: float = opt(0.1, "share of the steps in which wsd falls")
    optim: str = opt("adamw", "optimizer", ("adamw", "adafactor", "sgd", "muon", "adamw_8bit"))
    warmup_ratio: float = opt(0.05, "share of the steps that warm up")
    warmup_steps: int = opt(0, "warm-up steps; wins over --warmup_ratio")
    weight_decay: float = opt(0.1, "AdamW's weight decay (matrices only)")
    adam_beta1: float = opt(0.9, "AdamW")
    adam_beta2: float = opt(0.95, "AdamW")
    adam_epsilon: float = opt(1e-8, "AdamW")
    max_grad_norm: float = opt(1.0, "clip the gradient's norm (0: never)")
    label_smoothing_factor: float = opt(0.0, "share of each target's probability that is spread over the vocabulary")
    neftune_noise_alpha: float | None = opt(None, "noise on the embeddings in training, e.g. 5 (arXiv 2310.05914)")
    gradient_checkpointing: bool | None = opt(None, "recompute activations to save memory; default: only when it would not fit")
    torch_compile: bool = opt(
        False, "compile the decoder layers: the first steps take half a minute or more longer; measured on 2 CPU cores, LoRA on 0.6B "
        "parameters: a tenth less memory, 1 percent faster"
    )  # fmt: skip
    logging_steps: int = opt(5, "log every so many steps")
    eval_steps: int | None = opt(None, "evaluate every so many steps; default: as --save_steps")
    save_steps: int = opt(50, "save a checkpoint every so many steps; the last step and every new best are always saved")
    save_total_limit: int | None = opt(2, "keep so many of this run's checkpoints; the newest and the best always stay (unset: 2)")
    early_stop_interval: int | None = opt(None, "stop after so many evaluations without a new best; needs evaluation rows")
    create_checkpoint_symlink: bool = opt(False, "name the best and the last checkpoint `best` and `last` in the run's folder")
    save_only_model: bool = opt(False, "leave out the optimizer's state (no resuming)")
    resume_from_checkpoint: str | None = opt(None, "checkpoint-N to go on from: weights, optimizer, data order, random state")
    fsdp: str | None = opt(
        None, "each of several processes (NPROC_PER_NODE) holds a share of the model: full_shard, or shard_grad_op, which is faster but "
        "holds the whole model from the forward to the backward pass; none, also in resuming: the whole model in each",
        ("full_shard", "shard_grad_op"),
    )  # fmt: skip
    deepspeed: str | None = opt(
        None, "what DeepSpeed calls it: zero3 and zero2 are --fsdp full_shard and shard_grad_op, zero1 and zero0 shard nothing; a JSON "
        "file is read into flags, what cannot be done is refused. torch does the work, DeepSpeed is not needed"
    )  # fmt: skip
    report_to: tuple[str, ...] = opt(("tensorboard",), "tensorboard, wandb, swanlab (several allowed), all that are installed, or none")
    seed: int = opt(42, "seed of initialisation and dropout")


@dataclass(frozen=True)
class EvaluationOptions:
    """What an evaluation during training also does."""

    predict_with_generate: bool = opt(
        False, "evaluation also answers rows through the serving engine, greedily: eval_exact_match and eval_rouge-l, from 0 to 1"
    )
    eval_limit: int | None = opt(32, "rows that --predict_with_generate answers at most, spread over the evaluation rows")
    max_new_tokens: int = opt(128, "longest answer in tokens of --predict_with_generate and --sample_answers")
    metric_for_best_model: str | None = opt(
        None, "what makes a checkpoint the best; default: loss, rouge-l with --predict_with_generate",
        ("loss", "token_acc", "exact_match", "rouge-l"),
    )  # fmt: skip
    sample_answers: int | None = opt(
        None,
        "evaluation rows whose answers before and after training report.html shows; default: 4, of 48 tokens at most, for a model "
        "of up to 1.5 GB on a CPU or 16 GB on a GPU, else 0",
    )


@dataclass(frozen=True)
class HubOptions:
    """Where checkpoints also go."""

    push_to_hub: bool = opt(False, "push checkpoints to ModelScope, or to Hugging Face with --use_hf; checked before training starts")
    hub_model_id: str | None = opt(None, "repository to push to, name or owner/name; made where it is missing; default: the model's name")
    hub_token: str | None = opt(
        None, "token that may write there; default: MODELSCOPE_API_TOKEN or HF_TOKEN, or a saved login; never stored"
    )
    hub_private_repo: bool = opt(False, "a repository that is made is private")
    hub_strategy: str = opt("every_save", "push after every save, or the best (or last) checkpoint once at the end", ("every_save", "end"))


@dataclass(frozen=True)
class GenerationOptions:
    """How answers are sampled; unset values come from the model's generation_config.json."""

    max_new_tokens: int | None = opt(None, "longest answer in tokens; default: what the context leaves")
    temperature: float | None = opt(None, "0 is greedy")
    top_p: float | None = opt(None, "nucleus sampling")
    top_k: int | None = opt(None, "sample among so many (0 or -1: all)")
    min_p: float | None = opt(None, "drop tokens below this share of the best one's probability")
    repetition_penalty: float | None = opt(None, "above 1 discourages tokens already seen")
    stop_words: tuple[str, ...] = opt((), "strings that end an answer")
    stream: bool = opt(True, "print the answer as it grows")


@dataclass(frozen=True)
class EngineOptions:
    """The serving engine."""

    infer_backend: str = opt("auto", "native (also pt, transformers), or vllm where it is installed", ("auto", "native", "vllm"))
    max_model_len: int | None = opt(None, "longest prompt plus answer; default: the model's limit, or what memory allows")
    max_num_seqs: int = opt(256, "requests that run at once")
    max_num_batched_tokens: int | None = opt(
        None, "token budget of one step, a longer prompt is prefilled in chunks; default: 2048; on a CPU 512 while answers run"
    )
    block_size: int = opt(16, "tokens a KV block")
    enable_prefix_caching: bool = opt(True, "reuse the KV blocks of shared prompt beginnings")
    kv_cache_memory: float | None = opt(None, "GiB for the KV cache; default: from what is free")
    gpu_memory_utilization: float = opt(0.9, "share of the GPU's memory that the engine may use")
    enforce_eager: bool = opt(False, "no CUDA graphs: each decode step is launched kernel by kernel")
    max_lora_rank: int = opt(512, "largest adapter rank that is accepted")
    adapter_memory: float | None = opt(None, "GiB for adapters' weights; more adapters take turns. Default: a tenth of what is free")
    adapter_host_memory: float | None = opt(None, "GiB to keep adapters at hand that are not on the GPU. Default: a tenth of what is free")
    speculate_ngram: int = opt(
        0, "guess up to so many tokens a step from what the text repeats; greedy answers stay the same, come faster (0: off)"
    )
    quant: str | None = opt(None, "quantize the linears at load: int8", ("int8",))
    tensor_parallel_size: int = opt(1, "GPUs a model is split over (vllm backend)")


@dataclass(frozen=True)
class InferOptions:
    """`swift infer`."""

    result_path: str | None = opt(None, "where a batch run writes its jsonl; default: <ckpt_dir>/infer_result/<time>.jsonl")
    max_batch_size: int = opt(64, "requests in flight in a batch run")


@dataclass(frozen=True)
class ServerOptions:
    """The HTTP server."""

    host: str = opt("127.0.0.1", "address to listen on; 0.0.0.0 for every interface")
    port: int | None = opt(None, "port to listen on; default: 8000, for app-ui 7860")
    api_key: str | None = opt(None, "clients must send this key as a bearer token")
    adapter_dir: str | None = opt(None, "serve every adapter in this folder; new, changed and removed ones are noticed within a second")
    allow_runtime_lora: bool = opt(False, "clients may load and unload adapters: /v1/load_lora_adapter, /v1/unload_lora_adapter")
    adapter_root: str | None = opt(None, "adapters that clients load must lie in this folder (default: --adapter_dir)")
    admin_key: str | None = opt(None, "loading and unloading adapters needs this key as a bearer token")
    served_model_name: str | None = opt(None, "name of the base model in /v1/models; default: --model_type or the directory's name")
    owned_by: str = opt("swift", "owner shown in /v1/models")
    max_logprobs: int = opt(20, "most log-probabilities a request may ask for")
    verbose: bool = opt(False, "log every request")


@dataclass(frozen=True)
class ExportOptions:
    """`swift export`."""

    to_peft_format: bool = opt(False, "write <ckpt_dir>-peft, a plain PEFT directory")
    quant_bits: int = opt(0, "quantize to so many bits (8 or 4)")
    quant_method: str = opt("awq", "how", ("awq", "rtn"))
    group_size: int = opt(128, "weights that share one scale (4 bit)")
    export_dir: str | None = opt(None, "where to write; default: beside the checkpoint")
    exist_ok: bool = opt(False, "replace an existing result")


@dataclass(frozen=True)
class BenchOptions:
    """`swift bench`."""

    batch_size: str = opt("1,8,32", "batch sizes, comma-separated")
    input_output_len: str = opt("128,64", 'cases "input,output;input,output" in tokens')
    num_prompts: int = opt(0, "serve so many requests of mixed lengths instead")
    request_rate: float = opt(0.0, "requests a second (0: all at once)")
    json: str | None = opt(None, "also write the figures to this file")


COMMANDS: dict[str, tuple[str, tuple[type, ...]]] = {
    "sft": (
        "fine-tune a model (LoRA or all weights)",
        (ModelOptions, DataOptions, TemplateOptions, LoraOptions, TrainOptions, EvaluationOptions, HubOptions, CheckpointOptions),
    ),
    "infer": (
        "chat in the terminal, or answer a dataset",
        (ModelOptions, CheckpointOptions, TemplateOptions, GenerationOptions, InferOptions, EngineOptions, DataOptions),
    ),
    "deploy": (
        "serve base and adapters over the OpenAI API",
        (ModelOptions, CheckpointOptions, TemplateOptions, ServerOptions, GenerationOptions, EngineOptions),
    ),
    "app-ui": ("chat in the browser", (ModelOptions, CheckpointOptions, TemplateOptions, ServerOptions, GenerationOptions, EngineOptions)),
    "export": ("merge, convert or quantize a checkpoint", (ModelOptions, CheckpointOptions, TemplateOptions, ExportOptions, DataOptions)),
    "bench": ("measure prefill, decode and serving speed", (ModelOptions, CheckpointOptions, BenchOptions, EngineOptions)),
}
