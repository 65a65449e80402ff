"""Tiny random models, a real byte-level tokenizer and adapters, made once per session; nothing is downloaded."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Iterator
from pathlib import Path

import kernel_builds
import pytest

from tests.pair import Pair

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "Hello, how are you? I am a small model made for tests. The capital of France is Paris.",
    "你好！浙江的省会在哪？浙江的省会在杭州。这有什么好吃的？西湖醋鱼、龙井虾仁。",
    "who are you? I am Xiao Huang, trained by ModelScope. 我是小黄，由魔搭训练的助手。",
    "0 1 2 3 4 5 6 7 8 9 def f(x): return x + 1\n\n<user> [INST] {json: true}",
] * 4
SMALL = {
    "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 12, "max_position_embeddings": 512, "eos_token_id": 2, "pad_token_id": 0, "bos_token_id": None,
    "initializer_range": 0.2,
}  # fmt: skip
# family -> (config class, model class, overrides)
FAMILIES: dict[str, tuple[str, str, dict]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "llama_mha": ("LlamaConfig", "LlamaForCausalLM", {"num_key_value_heads": 4}),
    "llama_mqa": ("LlamaConfig", "LlamaForCausalLM", {"num_key_value_heads": 1}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 16}),
    "ministral3": (  # queries are scaled by position, beyond 32 here
        "Ministral3Config",
        "Ministral3ForCausalLM",
        {
            "sliding_window": None,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 16.0,
                "original_max_position_embeddings": 32,
                "llama_4_scaling_beta": 0.5,
            },
        },
    ),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {"head_dim": None}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {"sliding_window": 16, "query_pre_attn_scalar": 12}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {"sliding_window": 16, "query_pre_attn_scalar": 12}),
    "glm4": ("Glm4Config", "Glm4ForCausalLM", {}),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {}),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", {"no_rope_layers": [1, 0, 1]}),  # a layer without positions
    "exaone4": ("Exaone4Config", "Exaone4ForCausalLM", {"sliding_window": 16, "sliding_window_pattern": 3}),  # norms of results only
    "granite": ("GraniteConfig", "GraniteForCausalLM", {"attention_multiplier": 0.2, "logits_scaling": 2.0, "residual_multiplier": 0.5}),
}
_LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# Families that are trained but not served: experts, and layers that pass something on from token to token.
TRAINED: dict[str, tuple[str, str, dict]] = {
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", _EXPERTS),
    "qwen2_moe": ("Qwen2MoeConfig", "Qwen2MoeForCausalLM", {**_EXPERTS, "shared_expert_intermediate_size": 16}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 4, "sliding_window": None}),
    "olmoe": ("OlmoeConfig", "OlmoeForCausalLM", {"num_experts": 4, "num_experts_per_tok": 2}),
    "phimoe": ("PhimoeConfig", "PhimoeForCausalLM", {"num_local_experts": 4, "sliding_window": None}),
    "granitemoe": ("GraniteMoeConfig", "GraniteMoeForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "phimoe_window": ("PhimoeConfig", "PhimoeForCausalLM", {"num_local_experts": 4, "sliding_window": 16}),
    "llama4": ("Llama4TextConfig", "Llama4ForCausalLM", {"num_local_experts": 2, "attention_chunk_size": 16}),
    "nemotron": ("NemotronConfig", "NemotronForCausalLM", {}),
    "stablelm": ("StableLmConfig", "StableLmForCausalLM", {"head_dim": None, "partial_rotary_factor": 0.5}),
    "qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", _LINEAR),
    "qwen3_next": ("Qwen3NextConfig", "Qwen3NextForCausalLM", {**_LINEAR, **_EXPERTS, "shared_expert_intermediate_size": 16}),
    "minimax": (
        "MiniMaxConfig", "MiniMaxForCausalLM",
        {"num_local_experts": 4, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    ),
    "jamba": (
        "JambaConfig", "JambaForCausalLM",
        {"num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    ),
    "lfm2": (
        "Lfm2Config", "Lfm2ForCausalLM", {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    ),
    "falcon_h1": (
        "FalconH1Config", "FalconH1ForCausalLM",
        {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "lm_head_multiplier": 0.5},
    ),
    "bamba": (
        "BambaConfig", "BambaForCausalLM", {"mamba_n_heads": 4, "mamba_d_head": 24, "mamba_d_state": 16, "attn_layer_indices": [1]},
    ),
    "mamba2": ("Mamba2Config", "Mamba2ForCausalLM", {"num_heads": 4, "head_dim": 24, "state_size": 16, "n_groups": 1}),
    "nemotron_h": (
        "NemotronHConfig", "NemotronHForCausalLM",
        {"hybrid_override_pattern": "M*-", "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1},
    ),
    "recurrent_gemma": (
        "RecurrentGemmaConfig", "RecurrentGemmaForCausalLM",
        {"attention_window_size": 16, "block_types": ["recurrent", "recurrent", "attention"], "lru_width": 48},
    ),
    "phi": ("PhiConfig", "PhiForCausalLM", {}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 512}),
}  # fmt: skip


def save_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = CHATML
    fast.save_pretrained(path)


@pytest.fixture(scope="session")
def tiny_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(path)
    return path


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory):
    """make_model(family, **config overrides) -> directory of a random fp32 model with tokenizer; cached by arguments."""
    import torch
    import transformers

    made: dict[str, Path] = {}

    def make(family: str = "llama", seed: int = 0, **overrides) -> Path:
        key = json.dumps([family, seed, overrides], sort_keys=True)
        if key not in made:
            path = tmp_path_factory.mktemp(family)
            save_tokenizer(path)
            config_name, model_name, own = {**FAMILIES, **TRAINED}[family]
            vocab = len(transformers.AutoTokenizer.from_pretrained(path))
            settings = {**SMALL, "vocab_size": vocab, "dtype": "float32", **own, **overrides}
            config = getattr(transformers, config_name)(**{k: v for k, v in settings.items() if v is not None or k == "bos_token_id"})
            torch.manual_seed(seed)
            getattr(transformers, model_name)(config).save_pretrained(path)
            made[key] = path
        return made[key]

    return make


@pytest.fixture(scope="session")
def older_kernels(tmp_path_factory: pytest.TempPathFactory):
    """older_kernels(library, name) -> the file of a library as kernel_builds.RUN[name] has it; built once."""
    from swiftlite.kernels.build import build

    folder = tmp_path_factory.mktemp("kernels")
    return lambda library, name: build(library, folder, kernel_builds.RUN[name])


@pytest.fixture(scope="module", params=["here", *(name for name in kernel_builds.RUN if name != "avx2")])
def panels(request: pytest.FixtureRequest, older_kernels):
    """`Panels` of this machine's kernels, and on one with a matrix unit also of those by vectors."""
    from swiftlite.engine.panels import Panels
    from swiftlite.kernels.build import load_library

    if request.param == "here":
        return Panels(load_library())  # type: ignore[arg-type]
    return Panels(ctypes.CDLL(str(older_kernels("engine", request.param))))


@pytest.fixture(scope="session")
def make_adapter(tmp_path_factory: pytest.TempPathFactory):
    """make_adapter(model_dir, seed, rank, **LoraConfig fields) -> PEFT directory whose A and B are both random, not zero."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    def make(model_dir: Path, seed: int = 0, rank: int = 4, **fields) -> Path:
        path = tmp_path_factory.mktemp(f"adapter{seed}")
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        settings = {"target_modules": "all-linear", "lora_alpha": 2 * rank, "task_type": "CAUSAL_LM", **fields}
        adapted = get_peft_model(model, LoraConfig(r=rank, **settings))
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        adapted.save_pretrained(path)
        return path

    return make


@pytest.fixture(scope="session")
def pair() -> Iterator[Pair]:
    """pair("sft", ...): the command in two processes that train together."""
    both = Pair()
    yield both
    both.close()
