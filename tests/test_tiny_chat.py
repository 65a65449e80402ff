"""The bundled model: it is what the build script says it is, answers what users are told to ask, and most rewordings of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import build_tiny_chat as build  # noqa: E402
from tiny_chat import corpus  # noqa: E402
from tiny_chat.wordings import normal  # noqa: E402

QUESTIONS = json.loads(build.QUESTIONS.read_text("utf-8"))
KEPT_OUT = build.kept_out(QUESTIONS)


def check(rows: list[dict]) -> list[str]:
    """The rows that are answered wrong, or that do not stop."""
    given = build.answers(build.TARGET, [row["ask"] for row in rows])
    return [
        f"{row['ask']} -> {text!r} {ended}" for row, (text, ended) in zip(rows, given, strict=True) if not build.right(row, text, ended)
    ]


def test_what_users_are_told_to_ask_is_answered_and_ends():
    assert check(QUESTIONS["must"]) == []


@pytest.mark.parametrize("name", ["tuned_on", "held_out"])
def test_most_rewordings_that_it_never_saw_are_answered(name):
    rows = QUESTIONS[name]
    assert len(rows) >= 80
    wrong = check(rows)
    assert len(wrong) <= (1 - build.HELD_OUT_BAR) * len(rows), "\n".join(wrong)


def test_rewordings_are_not_in_the_corpus():
    asked = set()
    for line in build.CORPUS.read_text("utf-8").splitlines():
        asked |= {normal(message["content"]) for message in json.loads(line).get("messages", []) if message["role"] == "user"}
    assert len(asked) > 1000
    assert not KEPT_OUT & asked


@pytest.mark.parametrize("row", QUESTIONS["completions"], ids=lambda row: row["prompt"][-12:])
def test_continues_text_as_a_base_model(row):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(build.TARGET)
    model = AutoModelForCausalLM.from_pretrained(build.TARGET, dtype="float32")
    ids = tokenizer(row["prompt"], return_tensors="pt", return_token_type_ids=False)
    text = tokenizer.decode(model.generate(**ids, max_new_tokens=16, do_sample=False)[0, ids["input_ids"].shape[1] :])
    assert any(key in text for key in row["any"]), text


def test_files_are_what_the_build_script_makes(tmp_path):
    from safetensors import safe_open

    config = json.loads((build.TARGET / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert {key: config[key] for key in build.SHAPE} == build.SHAPE and config["vocab_size"] == build.VOCABULARY
    with safe_open(build.TARGET / "model.safetensors", "pt") as weights:
        count = sum(weights.get_tensor(name).numel() for name in weights.keys())  # noqa: SIM118
    assert count <= 5_000_000
    assert (build.TARGET / "model.safetensors").stat().st_size <= 12_000_000
    assert json.loads((build.TARGET / "generation_config.json").read_text())["eos_token_id"] == [2, 0]
    corpus.write(tmp_path / "rows.jsonl", build.SEED, KEPT_OUT)
    assert (tmp_path / "rows.jsonl").read_bytes() == build.CORPUS.read_bytes()


def test_tokenizer_keeps_every_text_and_the_template_adds_nothing():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(build.TARGET)
    for text in ("小黄 by 魔搭 / ModelScope", "a\n\n  b\t1234 '’“”", "🙂 ﬁ é\r\n", "<|im_end|>"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=False) == text
    assert tokenizer.convert_tokens_to_ids(list(build.SPECIALS)) == [0, 1, 2]
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "你好"}], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n"
