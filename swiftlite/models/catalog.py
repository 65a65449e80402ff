"""SWIFT's model_type names -> (ModelScope id, Hugging Face id).

A table of data: add a line to add a name. qwen-7b, chatglm3, baichuan2 and internlm2 are remote-code models that transformers no
longer runs; their names resolve, and loading refuses them, because we run no remote code.
"""

from __future__ import annotations


def _same(*ids: str) -> dict[str, tuple[str, str]]:
    """Names whose id is the same on both hubs: model_type is the id's last part in lower case, '.' as '_'."""
    return {id.split("/")[1].lower().replace(".", "_"): (id, id) for id in ids}


MODELS: dict[str, tuple[str, str]] = {
    "qwen1half-0_5b-chat": ("qwen/Qwen1.5-0.5B-Chat", "Qwen/Qwen1.5-0.5B-Chat"),
    "qwen1half-7b-chat": ("qwen/Qwen1.5-7B-Chat", "Qwen/Qwen1.5-7B-Chat"),
    "qwen1half-7b-chat-int4": ("qwen/Qwen1.5-7B-Chat-GPTQ-Int4", "Qwen/Qwen1.5-7B-Chat-GPTQ-Int4"),
    "qwen2-0_5b-instruct": ("qwen/Qwen2-0.5B-Instruct", "Qwen/Qwen2-0.5B-Instruct"),
    "qwen2-7b-instruct": ("qwen/Qwen2-7B-Instruct", "Qwen/Qwen2-7B-Instruct"),
    **_same(
        "Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-3B-Instruct", "Qwen/Qwen2.5-7B-Instruct",
        "Qwen/Qwen2.5-14B-Instruct", "Qwen/Qwen2.5-32B-Instruct", "Qwen/Qwen2.5-72B-Instruct", "Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-7B",
        "Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B", "Qwen/Qwen3-4B", "Qwen/Qwen3-8B", "Qwen/Qwen3-14B", "Qwen/Qwen3-32B", "Qwen/Qwen3-30B-A3B",
    ),
    "llama2-7b": ("modelscope/Llama-2-7b-ms", "meta-llama/Llama-2-7b-hf"),
    "llama2-7b-chat": ("modelscope/Llama-2-7b-chat-ms", "meta-llama/Llama-2-7b-chat-hf"),
    "llama2-13b-chat": ("modelscope/Llama-2-13b-chat-ms", "meta-llama/Llama-2-13b-chat-hf"),
    "llama3-8b": ("LLM-Research/Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-8B"),
    "llama3-8b-instruct": ("LLM-Research/Meta-Llama-3-8B-Instruct", "meta-llama/Meta-Llama-3-8B-Instruct"),
    "llama3_1-8b-instruct": ("LLM-Research/Meta-Llama-3.1-8B-Instruct", "meta-llama/Meta-Llama-3.1-8B-Instruct"),
    "llama3_2-1b-instruct": ("LLM-Research/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.2-1B-Instruct"),
    "llama3_2-3b-instruct": ("LLM-Research/Llama-3.2-3B-Instruct", "meta-llama/Llama-3.2-3B-Instruct"),
    "mistral-7b-instruct-v2": ("AI-ModelScope/Mistral-7B-Instruct-v0.2", "mistralai/Mistral-7B-Instruct-v0.2"),
    "mistral-7b-instruct-v3": ("LLM-Research/Mistral-7B-Instruct-v0.3", "mistralai/Mistral-7B-Instruct-v0.3"),
    "yi-6b-chat": ("01ai/Yi-6B-Chat", "01-ai/Yi-6B-Chat"),
    "yi-1_5-6b-chat": ("01ai/Yi-1.5-6B-Chat", "01-ai/Yi-1.5-6B-Chat"),
    "deepseek-7b-chat": ("deepseek-ai/deepseek-llm-7b-chat", "deepseek-ai/deepseek-llm-7b-chat"),
    "gemma2-2b-instruct": ("LLM-Research/gemma-2-2b-it", "google/gemma-2-2b-it"),
    "gemma3-1b-instruct": ("LLM-Research/gemma-3-1b-it", "google/gemma-3-1b-it"),
    "phi3-4b-4k-instruct": ("LLM-Research/Phi-3-mini-4k-instruct", "microsoft/Phi-3-mini-4k-instruct"),
    "phi4": ("LLM-Research/phi-4", "microsoft/phi-4"),
    "glm4-9b-chat": ("ZhipuAI/glm-4-9b-chat-hf", "zai-org/glm-4-9b-chat-hf"),
    "glm4-9b-0414": ("ZhipuAI/GLM-4-9B-0414", "zai-org/GLM-4-9B-0414"),
    "olmo2-7b-instruct": ("LLM-Research/OLMo-2-1124-7B-Instruct", "allenai/OLMo-2-1124-7B-Instruct"),
    "granite3_1-2b-instruct": ("ibm-granite/granite-3.1-2b-instruct", "ibm-granite/granite-3.1-2b-instruct"),
    "smollm2-135m-instruct": ("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    # remote code upstream: resolvable from a cache (a converted copy runs), else the successor below is the way
    "qwen-7b": ("qwen/Qwen-7B", "Qwen/Qwen-7B"),
    "qwen-7b-chat": ("qwen/Qwen-7B-Chat", "Qwen/Qwen-7B-Chat"),
    "chatglm3-6b": ("ZhipuAI/chatglm3-6b", "zai-org/chatglm3-6b"),
    "baichuan2-7b-chat": ("baichuan-inc/Baichuan2-7B-Chat", "baichuan-inc/Baichuan2-7B-Chat"),
    "internlm2-7b-chat": ("Shanghai_AI_Laboratory/internlm2-chat-7b", "internlm/internlm2-chat-7b"),
}  # fmt: skip
