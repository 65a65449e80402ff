"""The bundled rows that say who the model is, and {{NAME}} / {{AUTHOR}} in any dataset."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from swiftlite.data.loading import load
from swiftlite.data.rows import Identity, read
from swiftlite.data.sources import BUNDLED
from swiftlite.errors import DataError, UsageError
from swiftlite.options.parse import parse

WHO = Identity(("小黄", "Xiao Huang"), ("魔搭", "ModelScope"))
FLAGS = ["--model_name", "小黄", "Xiao Huang", "--model_author", "魔搭", "ModelScope"]


def pairs(spec: str, identity: Identity) -> list[tuple[str, str]]:
    return [tuple(m["content"] for m in row.conversation.messages) for row in read(spec, identity=identity)]


def test_the_bundled_rows() -> None:
    rows = [json.loads(line) for line in BUNDLED["self-cognition"].read_text(encoding="utf-8").splitlines()]
    by_tag = {tag: [row for row in rows if row["tag"] == tag] for tag in ("zh", "en")}
    assert len(by_tag["zh"]) >= 70 and len(by_tag["en"]) >= 60 and len(by_tag["zh"]) + len(by_tag["en"]) == len(rows)
    assert len({row["query"] for row in rows}) == len(rows) and all(set(row) == {"query", "response", "tag"} for row in rows)
    for tag, english in (("zh", False), ("en", True)):
        assert all((row["query"] + row["response"]).isascii() == english for row in by_tag[tag])
        for question in (
            ("你是谁？", "你叫什么名字？", "谁训练的你？") if tag == "zh" else ("who are you?", "What is your name?", "Who made you?")
        ):
            assert any(row["query"] == question for row in by_tag[tag]), question
    assert sum("{{NAME}}" in row["response"] for row in rows) > 0.7 * len(rows)
    assert sum("{{AUTHOR}}" in row["response"] for row in rows) > 0.6 * len(rows)


@pytest.mark.parametrize("name", ["self-cognition", "swift/self-cognition"])
def test_names_are_filled_by_language(name: str) -> None:
    for query, response in pairs(name, WHO):
        text = query + response
        assert "{{" not in text
        assert not ({"小黄", "魔搭"} if text.isascii() else {"Xiao Huang", "ModelScope"}) & {
            w for w in (*WHO.names, *WHO.authors) if w in text
        }


def test_one_name_serves_both_languages() -> None:
    text = " ".join(map(str, pairs("self-cognition", Identity(("Nova",), ("Lab",)))))
    assert "我是Nova" in text and "I am Nova" in text and "Lab" in text


def test_placeholders_in_any_dataset(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    rows = [
        {"query": "Name?", "response": "{{NAME}}"},  # no tag: by the script of the text
        {"query": "名字", "response": "{{NAME}}"},
        {"query": "名字", "response": "{{NAME}}", "tag": "en"},
        {"messages": [{"role": "user", "content": "{{AUTHOR}}?"}, {"role": "assistant", "content": "Yes, {{AUTHOR}} {{OTHER}}"}]},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert pairs(str(path), WHO) == [
        ("Name?", "Xiao Huang"), ("名字", "小黄"), ("名字", "Xiao Huang"), ("ModelScope?", "Yes, ModelScope {{OTHER}}"),
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"own\.jsonl:1.*\{\{NAME\}\}.*\n.*--model_name was not given"):
        pairs(str(path), Identity((), ("Lab",)))
    bad: list = []  # not a bad row to be counted: a flag is missing
    with pytest.raises(DataError, match="--model_author"):
        list(read(str(path), identity=Identity(("Nova",), ()), bad=bad))


def test_sampling_through_the_flags() -> None:
    for count in (20, 500):
        rows = load(parse("sft", ["--self_cognition_sample", str(count), *FLAGS])).rows
        assert len(rows) == count
        distinct = {row.number for row in rows}
        assert len(distinct) == min(count, len(list(read("self-cognition", identity=WHO))))
    assert load(parse("sft", ["--self_cognition_sample", "20", *FLAGS])) == load(parse("sft", ["--self_cognition_sample", "20", *FLAGS]))
    rows = load(parse("sft", ["--dataset", "self-cognition#300", *FLAGS])).rows
    assert len(rows) == 300 - 1  # one distinct row in a hundred is held out


def test_missing_flags_say_how_to_fix() -> None:
    with pytest.raises(UsageError, match="needs --model_name"):
        load(parse("sft", ["--self_cognition_sample", "5"]))
    with pytest.raises(UsageError, match="needs --model_author"):
        load(parse("sft", ["--self_cognition_sample", "5", "--model_name", "Nova"]))
    with pytest.raises(UsageError, match="one or two values"):
        load(parse("sft", ["--self_cognition_sample", "5", "--model_name", "a", "b", "c", "--model_author", "x"]))
    with pytest.raises(DataError, match="--model_name"):
        load(parse("sft", ["--dataset", "swift/self-cognition"]))
