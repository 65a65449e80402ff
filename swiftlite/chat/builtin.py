"""Chat templates for models that ship none, written for this package as Jinja, in the form `apply_chat_template` runs.

`find(name)` takes our names and SWIFT's template types; `for_family` guesses from a model's directory. A template says which
control tokens the tokenizer must know; it is refused for another tokenizer rather than spelled out in letters.
"""

from __future__ import annotations

import contextlib
import difflib
import json
from dataclasses import dataclass
from pathlib import Path

from swiftlite.errors import TemplateError

# Loops below run over `turns`: the messages without the system message, whose text is in `system` ("" when there is none).
_SPLIT = (
    "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
    "{% set turns = messages[1:] if messages[0]['role'] == 'system' else messages %}"
)
# The same, with the system text put before the first user text.
_FOLD = _SPLIT + "{% set ns = namespace(head=(system + '\\n\\n') if system else '') %}"
_USER = "{% if m['role'] == 'user' %}{% set text = ns.head + m['content'] %}{% set ns.head = '' %}"
_ONLY = "{% elif m['role'] != 'assistant' %}{{ raise_exception('this template has no place for a ' + m['role'] + ' message') }}"


def _chatml(default_system: str = "", bos: bool = False) -> str:
    lead = "{{ bos_token }}" if bos else ""
    default = (
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n" + default_system + "<|im_end|>\\n' }}{% endif %}"
        if default_system
        else ""
    )
    return (
        f"{lead}{default}"
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )


def _headers(before: str, after: str, end: str) -> str:
    """Turns of the form <before>role<after>text<end>; `end` is a Jinja expression that holds the stop token."""
    return (
        "{% for m in messages %}{{ '" + before + "' + m['role'] + '" + after + "' + m['content'] + " + end + " }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '" + before + "assistant" + after + "' }}{% endif %}"
    )  # fmt: skip


def _plain(user: str, assistant: str, between: str, lead: str = "") -> str:
    """Turns named in words, every answer closed by the end-of-text token."""
    return (
        f"{lead}{_SPLIT}{{% if system %}}{{{{ system + '{between}' }}}}{{% endif %}}"
        "{% for m in turns %}{% if m['role'] == 'user' %}{{ '" + user + "' + m['content'] + '" + between + "' }}"
        "{% elif m['role'] == 'assistant' %}{{ '" + assistant + "' + m['content'] + eos_token + '" + between + "' }}"
        "{% else %}{{ raise_exception('this template has no place for a ' + m['role'] + ' message') }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '" + assistant.rstrip(" ") + "' }}{% endif %}"
    )  # fmt: skip


_LLAMA2 = (
    _SPLIT + "{% set ns = namespace(head=('<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n') if system else '') %}"
    "{% for m in turns %}" + _USER + "{{ bos_token + '[INST] ' + text + ' [/INST]' }}" + _ONLY + "{% else %}"
    "{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
_MISTRAL = (
    _FOLD + "{{ bos_token }}{% for m in turns %}" + _USER + "{{ '[INST] ' + text + ' [/INST]' }}" + _ONLY + "{% else %}"
    "{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
_GEMMA = (
    _FOLD + "{{ bos_token }}{% for m in turns %}" + _USER + "{{ '<start_of_turn>user\\n' + text + '<end_of_turn>\\n' }}" + _ONLY
    + "{% else %}{{ '<start_of_turn>model\\n' + m['content'] + '<end_of_turn>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)  # fmt: skip
_GLM4 = (
    "{{ '[gMASK]<sop>' }}{% for m in messages %}{{ '<|' + ('observation' if m['role'] == 'tool' else m['role']) + '|>\\n' + m['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
_DEEPSEEK_V2_5 = (
    _SPLIT + "{{ bos_token + system }}{% for m in turns %}{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}" + _ONLY
    + "{% else %}{{ '<｜Assistant｜>' + m['content'] + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)  # fmt: skip
_ALPACA_HEAD = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
_BAICHUAN2 = (
    _SPLIT + "{{ system }}{% for m in turns %}{% if m['role'] == 'user' %}{{ '<reserved_106>' + m['content'] }}" + _ONLY
    + "{% else %}{{ '<reserved_107>' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<reserved_107>' }}{% endif %}"
)  # fmt: skip

_IM = ("<|im_start|>", "<|im_end|>")
_HELPFUL = "You are a helpful assistant."


@dataclass(frozen=True)
class Builtin:
    """A template's Jinja source and the control tokens that it writes ("eos": the tokenizer's own, whatever its text)."""

    source: str
    needs: tuple[str, ...]


BUILTIN: dict[str, Builtin] = {
    "chatml": Builtin(_chatml(), _IM),
    "qwen": Builtin(_chatml(_HELPFUL), _IM),
    "qwen2_5": Builtin(_chatml("You are Qwen, created by Alibaba Cloud. You are a helpful assistant."), _IM),
    "internlm2": Builtin(_chatml(bos=True), _IM),
    "llama2": Builtin(_LLAMA2, ("bos", "eos")),
    "llama3": Builtin(
        "{{ bos_token }}" + _headers("<|start_header_id|>", "<|end_header_id|>\\n\\n", "'<|eot_id|>'"),
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "mistral": Builtin(_MISTRAL, ("bos", "eos")),
    "gemma": Builtin(_GEMMA, ("bos", "<start_of_turn>", "<end_of_turn>")),
    "phi3": Builtin(_headers("<|", "|>\\n", "'<|end|>\\n'"), ("<|user|>", "<|assistant|>", "<|end|>")),
    "phi4": Builtin(_headers("<|im_start|>", "<|im_sep|>", "'<|im_end|>'"), (*_IM, "<|im_sep|>")),
    "glm4": Builtin(_GLM4, ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>")),
    "zephyr": Builtin(_headers("<|", "|>\\n", "eos_token + '\\n'"), ("eos",)),
    "deepseek": Builtin(_plain("User: ", "Assistant: ", "\\n\\n", "{{ bos_token }}"), ("eos",)),
    "deepseek_v2_5": Builtin(_DEEPSEEK_V2_5, ("bos", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>")),
    "vicuna": Builtin(_plain("USER: ", "ASSISTANT: ", "\\n", "{{ bos_token }}"), ("eos",)),
    "alpaca": Builtin(
        "{% if messages[0]['role'] != 'system' %}{{ '"
        + _ALPACA_HEAD
        + "\\n\\n' }}{% endif %}"
        + _plain("### Instruction:\\n", "### Response:\\n", "\\n\\n"),
        ("eos",),
    ),
    "default": Builtin(_plain("### Human:\\n", "### Assistant:\\n", "\\n\\n"), ("eos",)),
    "baichuan2": Builtin(_BAICHUAN2, ("<reserved_106>", "<reserved_107>", "eos")),
}

# SWIFT's template types (2.x to 4.x) -> ours, where the names differ.
OTHER_NAMES = {
    "llama": "llama2",
    "llama3_2": "llama3",
    "yi": "chatml",
    "yi1_5": "chatml",
    "qwen2": "qwen",
    "qwen3_nothinking": "chatml",
    "internlm": "internlm2",
    "baichuan": "baichuan2",
    "chatglm4": "glm4",
    "deepseek_v2": "deepseek_v2_5",
    "mixtral": "mistral",
    "gemma2": "gemma",
    "gemma3_text": "gemma",
    "phi3_5": "phi3",
    "openbuddy": "vicuna",
}


def find(name: str) -> tuple[str, Builtin]:
    """(our name, template). Raises TemplateError with the nearest name."""
    known = OTHER_NAMES.get(name, name).replace("-", "_")
    if known in BUILTIN:
        return known, BUILTIN[known]
    close = difflib.get_close_matches(name, [*BUILTIN, *OTHER_NAMES], n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise TemplateError(
        f"there is no built-in template {name!r}",
        "",
        f"{hint}built in: {', '.join(BUILTIN)}; leave --template out to use the model's own",
    )


# Words in a directory's name -> template, for chat models from before tokenizers carried one. The first match counts.
_FAMILIES = (
    (("llama-2", "llama2"), ("chat",), "llama2"),
    (("llama-3", "llama3"), ("instruct",), "llama3"),
    (("mistral", "mixtral"), ("instruct",), "mistral"),
    (("qwen",), ("chat", "instruct"), "qwen"),
    (("yi-",), ("chat",), "chatml"),
    (("gemma",), ("-it",), "gemma"),
    (("phi-3",), ("instruct",), "phi3"),
    (("glm-4", "glm4"), ("chat",), "glm4"),
    (("internlm2",), ("chat",), "internlm2"),
    (("baichuan2",), ("chat",), "baichuan2"),
    (("deepseek-llm",), ("chat",), "deepseek"),
    (("vicuna",), ("vicuna",), "vicuna"),
    (("zephyr",), ("zephyr",), "zephyr"),
)


def for_family(model_dir: str | Path) -> str | None:
    """The built-in template that a model's directory name (or `_name_or_path` in its config) asks for; None for base models."""
    names = [Path(model_dir).name]
    config = Path(model_dir) / "config.json"
    if config.is_file():
        with contextlib.suppress(ValueError):  # loading the model says what is wrong with it
            names.append(str(json.loads(config.read_text(encoding="utf-8")).get("_name_or_path", "")))
    for name in map(str.lower, names):
        for families, kinds, template in _FAMILIES:
            if any(f in name for f in families) and any(k in name for k in kinds):
                return template
    return None
