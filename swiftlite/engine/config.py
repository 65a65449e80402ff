"""Settings of the engine, with defaults that work; what can be derived is derived where it is known."""

from __future__ import annotations

from dataclasses import dataclass

from swiftlite.errors import UsageError

AT_LEAST_1 = (
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_num_prompt_tokens",
    "block_size",
    "num_blocks",
    "max_lora_rank",
    "max_n",
    "max_waiting",
)
AT_LEAST_0 = ("max_logprobs", "kv_cache_memory", "adapter_memory", "adapter_host_memory", "speculate_ngram")


@dataclass(frozen=True)
class EngineConfig:
    """Limits and sizes. None means: derived at load from the model and the machine. UsageError for a size that makes no sense."""

    max_model_len: int | None = None  # tokens of prompt plus answer
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None  # token budget of one step
    max_num_prompt_tokens: int | None = None  # that of a step which no running answer waits for; None: 2048, or the same
    block_size: int = 16  # tokens a KV block
    enable_prefix_caching: bool = True
    kv_cache_memory: int | None = None  # bytes
    num_blocks: int | None = None  # overrides the memory sizing (tests)
    gpu_memory_utilization: float = 0.9
    quantization: str | None = None  # "int8": the linears in 8 bits from load on, a scale per output (on a CPU)
    enforce_eager: bool = False  # no CUDA graphs
    overlap: bool | None = None  # read a step's tokens while the next one runs; None: where there is a GPU that runs it
    max_lora_rank: int = 512
    adapter_memory: int | None = None  # bytes for the weights of adapters on the device; others are read again when wanted
    adapter_host_memory: int | None = None  # bytes to keep adapters beside a GPU that are not on it
    max_logprobs: int = 20
    max_n: int = 128
    speculate_ngram: int = 0  # tokens to guess per step from what the sequence repeats; 0: off
    max_waiting: int = 4096  # queued requests; one more is refused

    def __post_init__(self) -> None:
        for least, names in ((1, AT_LEAST_1), (0, AT_LEAST_0)):
            for name in names:
                value = getattr(self, name)
                if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                    raise UsageError(f"{name} must be an int, got {value!r}")
                if value is not None and value < least:
                    raise UsageError(f"{name} must be at least {least}, got {value}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise UsageError(f"gpu_memory_utilization must lie in (0, 1], got {self.gpu_memory_utilization}")
