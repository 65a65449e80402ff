"""Row formats, files, dataset syntax: what is read, what is refused, and how it is said."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from swiftlite.data.formats import to_conversation
from swiftlite.data.rows import Reader, read, scan
from swiftlite.data.sources import Spec, parse_spec
from swiftlite.errors import DataError, HubError

U, A = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "R"}
CALL = {"role": "tool_call", "content": {"name": "f", "arguments": {}}}
S = {"role": "system", "content": "S"}
OLD = [{"role": "user", "content": "Q1"}, {"role": "assistant", "content": "R1"}]


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"messages": [S, U, A]}, [S, U, A]),
        ({"messages": [U, A], "system": "S"}, [S, U, A]),
        ({"messages": json.dumps([U, A])}, [U, A]),
        ({"messages": [U, {**A, "loss": False}, U, A]}, [U, {**A, "loss": False}, U, A]),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "R"}]}, [U, A]),
        ({"conversations": [{"from": "system", "value": "S"}, {"from": "user", "value": "Q"}, {"from": "bot", "value": "R"}]}, [S, U, A]),
        ({"system": "S", "conversation": [{"human": "Q1", "assistant": "R1"}, {"assistant": "R", "human": "Q"}]}, [S, *OLD, U, A]),
        ({"query": "Q", "response": "R"}, [U, A]),
        ({"system": "S", "query": "Q", "response": "R", "history": [["Q1", "R1"]]}, [S, *OLD, U, A]),
        ({"query": "Q", "response": "R", "history": "[('Q1', 'R1')]"}, [*OLD, U, A]),
        ({"query": "Q", "response": "R", "history": None, "system": None}, [U, A]),
        ({"instruction": "I", "input": "X", "output": "R"}, [{"role": "user", "content": "I\nX"}, A]),
        ({"instruction": "Q", "input": "", "output": "R"}, [U, A]),
        ({"Question": "Q", "ANSWER": "R", "system_prompt": "S"}, [S, U, A]),
        ({"prompt": "Q", "completion": "R"}, [U, A]),
        ({"query": 1, "response": 2.5}, [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2.5"}]),
        ({"messages": [{"role": "human", "content": "Q"}, {"role": "model", "content": "R"}]}, [U, A]),
    ],
)
def test_chat_formats(record: dict, messages: list) -> None:
    assert to_conversation(record).messages == messages


@pytest.mark.parametrize("record", [{"text": "T"}, {"response": "T"}, {"messages": [{"role": "assistant", "content": "T"}]}, {"Text": "T"}])
def test_plain_text_formats(record: dict) -> None:
    found = to_conversation(record)
    assert found.text == "T" and not found.messages


def test_columns_rename_in_any_case() -> None:
    record = {"Text1": "Q", "text2": "R"}
    assert to_conversation(record, {"text1": "query", "text2": "response"}).messages == [U, A]


def test_tools_and_calls() -> None:
    call = {"name": "f", "arguments": {"x": 1}}
    found = to_conversation(
        {
            "tools": json.dumps([{"type": "function", "function": {"name": "f"}}]),
            "conversations": [
                {"from": "human", "value": "Q"},
                {"from": "function_call", "value": json.dumps(call)},
                {"from": "function_call", "value": json.dumps(call)},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "R"},
            ],
        }
    )
    entry = {"type": "function", "function": call}
    expected = [U, {"role": "assistant", "content": "", "tool_calls": [entry, entry]}, {"role": "tool", "content": "2"}, A]
    assert found.messages == expected and found.tools == [{"type": "function", "function": {"name": "f"}}]


def test_tools_that_are_json_each() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    assert to_conversation({"messages": [U, A], "tools": [json.dumps(tool), tool]}).tools == [tool, tool]


def test_what_is_said_before_a_call_is_one_turn_with_it() -> None:
    """As SWIFT reads it; two turns would teach the model to stop before it calls."""
    result = {"role": "tool_response", "content": "2"}
    found = to_conversation({"messages": [U, {**A, "loss": True}, CALL, CALL, result, A]}).messages
    entry = {"type": "function", "function": CALL["content"]}
    assert found == [U, {**A, "loss": True, "tool_calls": [entry, entry]}, {"role": "tool", "content": "2"}, A]
    alone = to_conversation({"messages": [A, CALL]})  # one message, but no text to continue
    assert alone.messages == [{**A, "tool_calls": [entry]}] and not alone.text


@pytest.mark.parametrize(
    ("record", "match"),
    [
        ([U, A], "must be an object"),
        ({"a": 1}, "unknown columns: a"),
        ({"query": "Q"}, "unknown columns"),
        ({"messages": []}, "non-empty"),
        ({"messages": "[broken"}, "neither JSON nor"),
        ({"messages": [U]}, "no assistant message"),
        ({"messages": [{"role": "wizard", "content": "x"}, A]}, "unknown role 'wizard'"),
        ({"messages": [{"speaker": "x"}]}, "neither a role"),
        ({"query": "Q", "response": ""}, "is empty"),
        ({"query": ["Q"], "response": "R"}, "must be text"),
        ({"query": "Q", "response": "R", "history": [["Q1"]]}, "history must be"),
        ({"messages": [{"role": "user", "content": 3}, A]}, "content must be text"),
        ({"messages": [{"role": "user"}, A]}, "has no content"),
        ({"text": ""}, "the text is empty"),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "function_call", "value": "[]"}]}, "tool call must be"),
        ({"messages": [U, A], "tools": "{}x"}, "'tools' is neither"),
        ({"messages": [U, A], "tools": ["{}", "f"]}, "'tools' is neither"),
        ({"messages": [U, {**A, "loss": "no"}]}, "loss is 'no'"),
        ({"messages": [U, {**A, "loss": 0.5}]}, "loss is 0.5"),
        ({"messages": [U, {**A, "loss": [0]}]}, r"loss is \[0\]"),
        ({"messages": [U, CALL, {**CALL, "loss": False}]}, "calls of one turn are learnt alike"),
        ({"messages": [U, {**A, "loss": False}, CALL]}, "calls of one turn are learnt alike"),
        ({"messages": [U, {**A, "tool_calls": "[]"}, CALL]}, "tool_calls must be a list"),
        ({"messages": [U, {**A, "content": [{"type": "text", "text": ""}]}]}, "is empty"),
        ({"messages": [U, {**A, "content": []}]}, "is empty"),
        ({"messages": [U, {**A, "loss": 0}]}, "no assistant message to learn from"),
    ],
)
def test_bad_records_say_why(record, match: str) -> None:
    with pytest.raises(DataError, match=match):
        to_conversation(record)


def texts(spec: str | Path, **settings) -> list[str]:
    return [row.conversation.messages[-1]["content"] for row in read(str(spec), **settings)]


def test_files(tmp_path: Path) -> None:
    rows = [{"query": "Q", "response": f"R{i}"} for i in range(3)]
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "b.json").write_text(json.dumps(rows))
    (tmp_path / "c.json").write_text(json.dumps({"data": rows}))
    (tmp_path / "d.json").write_text("\n".join(map(json.dumps, rows)))  # lines under the wrong ending
    for name, mark in (("e.csv", ","), ("f.tsv", "\t")):
        with open(tmp_path / name, "w", newline="") as out:
            writer = csv.writer(out, delimiter=mark)
            writer.writerows([["query", "response"], *(["Q\nline two", f"R{i}"] for i in range(3))])
    for name in ("a.jsonl", "b.json", "c.json", "d.json", "e.csv", "f.tsv"):
        assert texts(tmp_path / name) == ["R0", "R1", "R2"], name
    (tmp_path / "g.txt").write_text("one\n\ntwo\n")
    assert [row.conversation.text for row in read(str(tmp_path / "g.txt"))] == ["one", "two"]
    assert [row.number for row in read(str(tmp_path / "a.jsonl"))] == [1, 3, 5]


def test_folder_and_subset(tmp_path: Path) -> None:
    for name in ("train-0.jsonl", "test-0.jsonl", "zh/train.jsonl", ".cache/x.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"query": "Q", "response": name}))
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert texts(tmp_path) == ["train-0.jsonl", "zh/train.jsonl"]
    assert texts(f"{tmp_path}:zh") == ["zh/train.jsonl"]
    with pytest.raises(DataError, match="no subset fr"):
        texts(f"{tmp_path}:fr")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="no data file"):
        texts(tmp_path / "none")


def test_syntax(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_spec("org/name:a/b#20") == Spec("org/name", None, ("a", "b"), 20)
    assert parse_spec("HF::org/name:all") == Spec("org/name", True)
    assert parse_spec("ms::org/name#3") == Spec("org/name", False, (), 3)
    mini = parse_spec("sharegpt-gpt4-mini#5")
    assert (mini.name, mini.count, mini.prefer) == ("AI-ModelScope/sharegpt_gpt4", 5, "sharegpt_gpt4")
    monkeypatch.chdir(tmp_path)
    for name in ("hf::a:b#7", "a.jsonl"):
        (tmp_path / name).write_text("{}")
        assert parse_spec(name) == Spec(name)  # a path wins
    assert parse_spec("a.jsonl#7") == Spec("a.jsonl", None, (), 7)
    for bad in ("org/name#x", "org/name#", "org/name#0"):
        with pytest.raises(DataError, match="no number of rows"):
            parse_spec(bad)


def test_counts(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"query": "Q", "response": f"R{i}"}) for i in range(10)))

    def draw(spec: str, seed: int = 1):
        (part,) = scan([spec], Reader(strict=True), seed)
        return [number + 1 for number in part.order], part.repeat_to

    assert draw(str(path)) == (list(range(1, 11)), None)
    few, _ = draw(f"{path}#4")
    assert len(set(few)) == 4 and draw(f"{path}#4")[0] == few and draw(f"{path}#4", seed=2)[0] != few
    assert draw(f"{path}#25") == (list(range(1, 11)), 25)


def test_broken_rows_are_counted_or_fatal(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"query": "Q", "response": "R"}\n{broken\n{"x": 1}\n[1]\n{"query": "Q", "response": "R"}\n')
    bad: list = []
    assert texts(path, bad=bad) == ["R", "R"]
    assert [(row.reason.split(":")[0], row.number) for row in bad] == [
        ("not valid JSON", 2), ("unknown columns", 3), ("a row must be an object with columns, got list", 4),
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"a\.jsonl:2: not valid JSON"):
        texts(path)
    (tmp_path / "b.csv").write_text("query,response\nQ,R\nQ,R,too,many\n")
    bad.clear()
    assert texts(tmp_path / "b.csv", bad=bad) == ["R"] and bad[0].number == 3


def test_what_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="no such dataset file"):
        texts(tmp_path / "gone.jsonl")
    for name in ("empty.jsonl", "empty.json", "empty.csv", "empty.txt"):
        (tmp_path / name).write_text("\n" if name.endswith("l") else "")
        with pytest.raises(DataError, match="is empty"):
            texts(tmp_path / name)
    (tmp_path / "x.xyz").write_text("x")
    with pytest.raises(DataError, match="ending"):
        texts(tmp_path / "x.xyz")
    (tmp_path / "latin.jsonl").write_bytes('{"query": "é", "response": "R"}'.encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        texts(tmp_path / "latin.jsonl")
    (tmp_path / "bad.json").write_text("[1,")
    with pytest.raises(DataError, match="not valid JSON"):
        texts(tmp_path / "bad.json")
    with pytest.raises(HubError, match="no file, no folder and no hub id"):
        texts("nonsense")


def test_hub_id_offline_says_what_was_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import swiftlite.hub as hub

    def refuse(kind, id, revision, local):
        raise OSError("no network here")

    monkeypatch.setattr(hub, "_modelscope", refuse)
    monkeypatch.setattr(hub, "_hugging_face", refuse)
    with pytest.raises(HubError, match=r"ModelScope's cache: no network here.*Hugging Face's server"):
        texts("org/none#5")
