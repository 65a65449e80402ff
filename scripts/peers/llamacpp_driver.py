"""llama.cpp through its binding's low-level API, so that sequences share a batch; the bf16 GGUF is written here from the checkpoint."""

import ctypes
import os
import time

import llama_cpp
from cases import arguments, serve

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write_gguf(model: str, path: str) -> None:
    """A Qwen3 checkpoint as GGUF without a vocabulary (prompts are token ids)."""
    import json

    import gguf
    import torch
    from safetensors.torch import load_file

    with open(f"{model}/config.json") as file:
        config = json.load(file)
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_context_length(4096)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(1e6)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    for name, tensor in load_file(f"{model}/model.safetensors").items():
        parts = name.split(".")
        if parts[1] == "layers":
            target = f"blk.{parts[2]}.{NAMES['.'.join(parts[3:-1])]}.weight"
        else:
            target = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]
        if tensor.ndim == 1:
            writer.add_tensor(target, tensor.float().numpy())
        else:
            raw = tensor.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(target, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Engine:
    """Prefills every prompt, then decodes all live sequences together, greedily."""

    def __init__(self, path: str) -> None:
        llama_cpp.llama_backend_init()
        self.quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.quiet, ctypes.c_void_p(0))
        params = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), params)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.n_seq_max = 48 * 1024, 2048, 512, 64
        settings.n_threads = settings.n_threads_batch = os.cpu_count()
        settings.kv_unified = True
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(2048, 0, 64)

    def _add(self, token: int, position: int, sequence: int, logits: bool) -> None:
        batch, i = self.batch, self.batch.n_tokens
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, logits
        batch.seq_id[i][0] = sequence
        batch.n_tokens += 1

    def _decode(self) -> None:
        if llama_cpp.llama_decode(self.context, self.batch):
            raise RuntimeError("llama_decode failed")

    def _best(self, row: int) -> int:
        import numpy

        logits = llama_cpp.llama_get_logits_ith(self.context, row)
        return int(numpy.ctypeslib.as_array(logits, shape=(self.vocabulary,)).argmax())

    def generate(self, prompts: list[list[int]], outputs: list[int]) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        tokens: dict[int, int] = {}
        for sequence, ids in enumerate(prompts):
            for start in range(0, len(ids), 2048):
                part = ids[start : start + 2048]
                self.batch.n_tokens = 0
                for i, token in enumerate(part):
                    self._add(token, start + i, sequence, start + i == len(ids) - 1)
                self._decode()
            tokens[sequence] = self._best(len(part) - 1)
        produced = dict.fromkeys(tokens, 1)
        while tokens := {s: t for s, t in tokens.items() if produced[s] < outputs[s]}:
            self.batch.n_tokens = 0
            for s, token in tokens.items():
                self._add(token, len(prompts[s]) + produced[s] - 1, s, True)
            self._decode()
            for row, s in enumerate(tokens):
                tokens[s] = self._best(row)
                produced[s] += 1


def main() -> None:
    job = arguments()
    started = job["started"]
    path = f"{job['model']}.bf16.gguf"
    if not os.path.exists(path):
        write_gguf(job["model"], path)
        started = time.time()
    engine = Engine(path)
    engine.generate([[5, 6, 7]], [1])
    first = time.time() - started
    serve(engine.generate, first)


main()
