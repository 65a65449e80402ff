"""Dataset names: the catalog through filled hub caches, files of a user's names, and mixing by probabilities."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import swiftlite.hub as hub
from swiftlite.data.catalog import CATALOG, find, read_info
from swiftlite.data.loading import load
from swiftlite.data.mixing import interleave
from swiftlite.data.rows import Row, read
from swiftlite.data.sources import parse_spec
from swiftlite.errors import DataError, HubError, UsageError
from swiftlite.options.parse import parse


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """cache(id, file, rows): a hub dataset's folder, found under that id only, as the hubs' clients find theirs."""
    folders: dict[str, Path] = {}

    def fetch(kind: str, id: str, revision: str | None, local: bool) -> str:
        if id not in folders:
            raise OSError(f"no {id} here")
        return str(folders[id])

    monkeypatch.setattr(hub, "_modelscope", fetch)
    monkeypatch.setattr(hub, "_hugging_face", fetch)

    def fill(id: str, file: str, *rows: dict) -> None:
        folders[id] = folder = tmp_path / id.replace("/", "--")
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")

    return fill


def answers(rows: list[Row]) -> list[str]:
    return [row.conversation.text or row.conversation.messages[-1]["content"] for row in rows]


def numbered(path: Path, count: int, name: str = "R") -> Path:
    path.write_text("\n".join(json.dumps({"query": "Q", "response": f"{name}{i}"}) for i in range(count)))
    return path


def test_every_entry_is_well_formed() -> None:
    for name, entry in CATALOG.items():
        assert hub.ID.fullmatch(entry.ms) and (not entry.hf or hub.ID.fullmatch(entry.hf)), name
        assert set(entry.columns.values()) <= {"query", "response", "instruction", "input", "output", "messages", "system", "history", "-"}
        assert parse_spec(name).name == entry.ms
    assert {"sharegpt-gpt4-mini", "sharegpt-gpt4", "alpaca-zh", "alpaca-en", "ms-bench", "code-alpaca-en", "medical-zh"} <= set(CATALOG)


def test_names_find_their_rows(cache) -> None:
    chat = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "mini"}]
    cache("AI-ModelScope/sharegpt_gpt4", "sharegpt_V3_format.jsonl", {"conversations": [chat[0], {"from": "gpt", "value": "v3"}]})
    cache("AI-ModelScope/sharegpt_gpt4", "sharegpt_gpt4.jsonl", {"conversations": chat})
    assert answers(list(read("sharegpt-gpt4-mini"))) == ["mini"]
    assert answers(list(read("sharegpt-gpt4"))) == ["v3", "mini"]
    assert answers(list(read("sharegpt-gpt4:V3_format"))) == ["v3"]
    cache("vicgalle/alpaca-gpt4", "data/train.jsonl", {"instruction": "Add", "input": "1 1", "output": "2"})  # the other hub's id
    (row,) = read("alpaca-en")
    assert [m["content"] for m in row.conversation.messages] == ["Add\n1 1", "2"]
    cache(
        "codefuse-ai/CodeExercise-Python-27k",
        "a.jsonl",
        {"chat_rounds": [{"role": "human", "content": "x"}, {"role": "bot", "content": "y"}]},
    )
    assert answers(list(read("codefuse-python-en"))) == ["y"]
    cache("modelscope/chinese-poetry-collection", "test.csv")
    cache("modelscope/chinese-poetry-collection", "test.jsonl", {"text1": "poem"})
    with pytest.raises(DataError, match="empty"):
        list(read("poetry-zh"))
    cache("huangjintao/medical_zh", "zh/train.jsonl", {"instruction": "q", "output": "zh"})
    cache("huangjintao/medical_zh", "en/train.jsonl", {"input": "q", "output": "en"})
    assert (answers(list(read("medical-zh"))), answers(list(read("medical-en")))) == (["zh"], ["en"])
    cache("AI-ModelScope/sql-create-context", "a.jsonl", {"question": "how many", "context": "TABLE t", "answer": "SELECT"})
    for spec in ("sql-create-context-en", "AI-ModelScope/sql-create-context"):  # the id is as good as the name
        (row,) = read(spec)
        assert [m["content"] for m in row.conversation.messages] == ["how many\nTABLE t", "SELECT"]
    with pytest.raises(HubError, match="did you mean 'alpaca-zh'"):
        list(read("alpaca-hz"))


def test_dataset_info_in_three_forms(tmp_path: Path, cache) -> None:
    numbered(tmp_path / "rows.jsonl", 2)
    (tmp_path / "odd.jsonl").write_text(json.dumps({"frage": "q", "antwort": "a"}))
    cache("org/mine", "de/a.jsonl", {"F": "q", "A": "hub"})
    swift = [
        {"dataset_path": "rows.jsonl", "dataset_name": "mine"},
        {"dataset_path": "odd.jsonl", "dataset_name": "odd", "columns": {"frage": "query", "antwort": "response"}},
        {"ms_dataset_id": "org/mine", "subsets": [{"subset": "de", "columns": {"F": "query", "A": "response"}}], "tags": ["x"]},
    ]
    older = {
        "mine": {"dataset_path": ["rows.jsonl"]},
        "odd": {"dataset_path": "odd.jsonl", "columns": {"frage": "query", "antwort": "response"}},
        "org/mine": {"dataset_id": "org/mine", "subsets": ["de"], "columns": {"F": "query", "A": "response"}},
    }
    factory = {
        "mine": {"file_name": "rows.jsonl", "columns": {"prompt": "query", "response": "response"}},
        "odd": {"file_name": "odd.jsonl", "columns": {"prompt": "frage", "response": "antwort"}},
        "org/mine": {"hf_hub_url": "org/mine", "subset": "de", "columns": {"prompt": "F", "response": "A"}},
    }
    for number, content in enumerate((swift, older, factory)):
        info = tmp_path / f"info{number}.json"
        info.write_text(json.dumps(content))
        options = parse("sft", ["--custom_dataset_info", str(info), "--dataset", "mine#1", "odd", "org/mine", "--split_dataset_ratio", "0"])
        found = answers(load(options).rows)
        assert sorted(found)[1:] == ["a", "hub"] and sorted(found)[0].startswith("R"), number
    for wrong, what in (
        ("{", "not valid JSON"),
        ("3", "not datasets"),
        ('{"a": {}}', "no place"),
        ('[{"dataset_path": ["a", "b"]}]', "one path"),
    ):
        (tmp_path / "bad.json").write_text(wrong)
        with pytest.raises(DataError, match=what):
            read_info(str(tmp_path / "bad.json"))
    with pytest.raises(DataError, match="cannot read"):
        read_info(str(tmp_path / "gone.json"))
    assert find("org/none", CATALOG) is None


def test_interleave() -> None:
    mixed = interleave([1000, 5000], [0.25, 0.75], "first_exhausted", [1])
    assert len(set(mixed)) == len(mixed) and [row for which, row in mixed if which == 0][-1] == 999
    share = sum(which == 0 for which, _ in mixed) / len(mixed)
    assert abs(share - 0.25) < 0.02
    everything = interleave([10, 1000], [0.5, 0.5], "all_exhausted", [1])
    assert {row for which, row in everything if which == 1} == set(range(1000))
    assert 800 < sum(which == 0 for which, _ in everything) < 1200  # the short one came round about a hundred times
    assert interleave([10, 1000], [0.5, 0.5], "all_exhausted", [1]) == everything
    assert interleave([3, 0], [0.5, 0.5], "first_exhausted", [1]) == []


def test_mixing_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = numbered(tmp_path / "a.jsonl", 100, "A"), numbered(tmp_path / "b.jsonl", 900, "B")
    flags = ["--dataset", str(a), str(b), "--split_dataset_ratio", "0.1", "--interleave_prob", "3", "1"]
    rows = load(parse("sft", flags)).rows
    texts = answers(rows)
    assert len(set(texts)) == len(texts) and sum(t[0] == "A" for t in texts) == 90 and 15 < len(texts) - 90 < 50
    assert "90 of 90" in capsys.readouterr().out
    held = load(parse("sft", flags), for_eval=True).rows
    plain = load(parse("sft", flags[:-3]), for_eval=True).rows
    assert answers(held) == answers(plain) and not set(answers(held)) & set(texts)  # mixing does not touch the evaluation rows
    repeated = load(parse("sft", [*flags, "--stopping_strategy", "all_exhausted"])).rows
    assert len({t for t in answers(repeated) if t[0] == "B"}) == 810
    for wrong in (["--interleave_prob", "1"], ["--interleave_prob", "1", "0"]):
        with pytest.raises(UsageError, match="interleave_prob"):
            load(parse("sft", ["--dataset", str(a), str(b), *wrong]))
