"""The benchmark model: Qwen3-0.6B's shape (596 M parameters), random bf16 weights, a byte-level BPE tokenizer.

usage: make_model.py OUT_DIR [ADAPTERS]     ADAPTERS PEFT adapters (r=16, all linears) go to OUT_DIR-lora0 ...
"""

import glob
import sys
import sysconfig

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tokenizer(path: str) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    files = sorted(glob.glob(sysconfig.get_paths()["stdlib"] + "/*.py"))[:80]
    tokenizer.train(files, trainers.BpeTrainer(vocab_size=8000, special_tokens=specials, initial_alphabet=alphabet))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = CHATML
    fast.save_pretrained(path)


def main() -> None:
    out, adapters = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
        head_dim=128, tie_word_embeddings=True, max_position_embeddings=40960, rope_theta=1e6, eos_token_id=2, pad_token_id=0,
        bos_token_id=None,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(out)
    save_tokenizer(out)
    if adapters:
        from peft import LoraConfig, get_peft_model

        adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
        for i in range(adapters):
            torch.manual_seed(i)
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.data.normal_(0, 0.02)
            adapted.save_pretrained(f"{out}-lora{i}")


main()
