"""Encoding in one pass: the account of rows, truncation, splits and seeds through the flags."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from chat_templates import NO_STOP, STYLES, make_tokenizer

from swiftlite.chat.conversation import Conversation
from swiftlite.chat.template import Template
from swiftlite.data.encoding import Report, encode
from swiftlite.data.loading import load, load_training
from swiftlite.data.rows import Row
from swiftlite.data.stream import evaluation
from swiftlite.errors import DataError, TemplateError, UsageError
from swiftlite.options.parse import parse


@pytest.fixture(scope="module")
def template() -> Template:
    return Template(make_tokenizer("bytelevel"), STYLES["qwen2_5"], "qwen2_5")


def row(query: str, response: str, number: int) -> Row:
    chat = [{"role": "user", "content": query}, {"role": "assistant", "content": response}]
    return Row(Conversation(chat), "folder/a.jsonl", number)


def write(path: Path, count: int, broken: tuple[int, ...] = ()) -> Path:
    lines = [json.dumps({"query": f"question {i}", "response": f"answer {i}"}) for i in range(count)]
    for i in broken:
        lines[i] = "{broken"
    path.write_text("\n".join(lines))
    return path


def test_samples_equal_encode_training_in_order(template: Template) -> None:
    rows = [row(f"q{i} " * (i % 7 + 1), f"a{i} <|im_end|>" if i % 5 == 0 else f"a{i}", i) for i in range(2500)]
    samples, report = encode(rows, template, None)
    assert len(samples) == report.kept == report.samples == 2500 and not report.dropped
    for i in (0, 1, 5, 1023, 1024, 2499):
        (one,) = template.encode_training(rows[i].conversation)
        assert samples[i].ids.dtype == np.int32 and samples[i].mask.dtype == np.bool_
        assert samples[i].ids.tolist() == one.ids and samples[i].mask.tolist() == one.mask
    assert report.tokens == sum(len(s.ids) for s in samples) and report.targets == sum(int(s.mask.sum()) for s in samples)


def test_truncation(template: Template) -> None:
    rows = [row("short", "yes", 1), row("short", "long answer " * 30, 2), row("long question " * 30, "yes", 3)]
    full, _ = encode(rows, template, None)
    limit = 60
    kept, report = encode(rows, template, limit, "delete")
    assert len(kept) == 1 and report.dropped["longer than --max_length 60"].first == ["a.jsonl:2", "a.jsonl:3"]
    right, report = encode(rows, template, limit, "right")
    assert [s.ids.tolist() for s in right] == [s.ids[:limit].tolist() for s in full[:2]]
    assert report.truncated.first == ["a.jsonl:2"]
    assert report.dropped["no target left after truncation"].first == ["a.jsonl:3"]  # its answer was cut off
    left, report = encode(rows, template, limit, "left")
    assert [s.ids.tolist() for s in left] == [s.ids[-limit:].tolist() for s in full]
    assert report.kept == 3 and report.truncated.count == 2


def test_account_and_strict(template: Template) -> None:
    bad = Row(Conversation([{"role": "wizard", "content": "x"}]), "folder/a.jsonl", 2)
    mute = Row(Conversation([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "loss": False}]), "folder/a.jsonl", 3)
    samples, report = encode([row("q", "a", 1), bad, mute], template, None)
    table = report.table()
    assert len(samples) == 1 and report.dropped_rows == 2
    assert "rows              3" in table and "kept              1" in table
    assert "unknown role 'wizard'; first: a.jsonl:2" in table and "nothing to learn; first: a.jsonl:3" in table
    with pytest.raises(DataError, match=r"folder/a\.jsonl:2: .*wizard"):
        encode([row("q", "a", 1), bad, mute], template, None, strict=True)
    with pytest.raises(DataError, match=r"a\.jsonl:1: longer than"):
        encode([row("q", "long answer " * 30, 1)], template, 60, "right", strict=True)


def test_a_row_that_keeps_some_of_its_samples_is_accounted_for() -> None:
    """A template that rewrites history gives a sample a round; a dropped one is not `truncated`."""
    rewriting = Template(make_tokenizer("bytelevel"), STYLES["qwen3"], "qwen3")
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": f"<think>\n{'long ' * 60}\n</think>\n\none"}]
    chat += [{"role": "user", "content": "b"}, {"role": "assistant", "content": "two"}]
    rows = [Row(Conversation(chat), "folder/a.jsonl", 1), row("q", "a", 2)]
    samples, report = encode(rows, rewriting, 60, "delete")
    assert report.kept == len(samples) == 2 and not report.dropped and report.truncated.count == 0
    assert report.parts["longer than --max_length 60"].first == ["a.jsonl:1"]
    assert "in part           1  kept without some of their samples: longer than --max_length 60; first: a.jsonl:1" in report.table()
    assert Report.from_json(asdict(report.merge(report))).parts["longer than --max_length 60"].count == 2
    _, cut = encode(rows, rewriting, 60, "right")
    assert cut.truncated.first == ["a.jsonl:1"] and not cut.parts
    with pytest.raises(DataError, match=r"a\.jsonl:1: longer than --max_length 60"):
        encode(rows, rewriting, 60, "delete", strict=True)


def test_many_reasons_stay_readable(template: Template) -> None:
    rows = [Row(Conversation([{"role": f"w{i}", "content": "x"}]), "a.jsonl", i) for i in range(50)]
    _, report = encode(rows, template, None)
    assert report.dropped_rows == 50 and len(report.table().splitlines()) < 20 and "38 other reasons" not in report.table().splitlines()[0]
    assert "for 38 other reasons" in report.table()


def test_template_that_cannot_give_labels_stops_the_run() -> None:
    broken = Template(make_tokenizer("bytelevel"), NO_STOP, "no stop")
    with pytest.raises(TemplateError, match=r"stop token[\s\S]*a\.jsonl:7"):
        encode([row("q", "a", 7)], broken, None)


def test_text_rows(template: Template) -> None:
    samples, _ = encode([Row(Conversation(text="Hello <|im_end|>"), "a.txt", 1)], template, None)
    tokenizer = template.tokenizer
    assert samples[0].ids[0] == tokenizer.bos_token_id and samples[0].ids[-1] == tokenizer.eos_token_id and samples[0].mask.all()
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") not in samples[0].ids


def test_load_training(template: Template, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", 200, broken=(3, 7))
    flags = ["--dataset", str(path), "--split_dataset_ratio", "0.1"]
    train, held, chats, report = load_training(parse("sft", flags), template, 512)
    assert (len(train), len(held), len(chats)) == (179, 19, 19)
    assert report.kept == 198 and report.dropped["not valid JSON"].first == ["a.jsonl:4", "a.jsonl:8"]
    again = load_training(parse("sft", flags), template, 512)
    assert [s.ids.tolist() for s in again[0]] == [s.ids.tolist() for s in train]
    keys = {tuple(s.ids.tolist()) for s in train}
    assert len(keys) == 179 and not keys & {tuple(s.ids.tolist()) for s in held}
    other = load_training(parse("sft", [*flags, "--data_seed", "1"]), template, 512)
    assert [s.ids.tolist() for s in other[0]] != [s.ids.tolist() for s in train]
    # what `swift infer` evaluates on: the same rows, whatever is sampled for training
    assert [r.conversation for r in load(parse("sft", [*flags, "--train_dataset_sample", "5"]), for_eval=True).rows] == chats


def test_sampling_flags(template: Template, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", 50)

    def sizes(*flags: str) -> tuple[int, int]:
        train, held, _, _ = load_training(parse("sft", flags), template, None)
        return len(train), len(held)

    assert sizes("--dataset", str(path)) == (49, 1)
    assert sizes("--dataset", str(path), "--split_dataset_ratio", "0") == (50, 0)
    assert sizes("--dataset", f"{path}#20", str(path), "--split_dataset_ratio", "0.1") == (18 + 45, 2 + 5)
    assert sizes("--dataset", str(path), "--train_dataset_sample", "7", "--split_dataset_ratio", "0.5", "--val_dataset_sample", "3") == (
        7,
        3,
    )
    assert sizes("--dataset", str(path), "--val_dataset", f"{path}#4") == (50, 4)
    assert sizes("--dataset", f"{path}#120", "--split_dataset_ratio", "0.1") == (115, 5)
    train, held, _, _ = load_training(parse("sft", ["--dataset", f"{path}#120", "--split_dataset_ratio", "0.1"]), template, None)
    assert not {tuple(s.ids.tolist()) for s in train} & {tuple(s.ids.tolist()) for s in held}  # repeats do not leak
    names = ["--model_name", "N", "--model_author", "A"]
    assert sizes("--dataset", str(path), "--self_cognition_sample", "30", *names) == (79, 1)
    plain, _, _, _ = load_training(parse("sft", ["--dataset", str(path), "--dataset_shuffle", "false"]), template, None)
    order = [template.tokenizer.decode(s.ids) for s in plain]
    assert order == sorted(order, key=lambda text: int(text.split("question ")[1].split("<")[0]))


def test_nothing_left_fails_with_the_table(template: Template, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", 5)
    with pytest.raises(DataError, match=r"no training row is left[\s\S]*longer than --max_length 10"):
        load_training(parse("sft", ["--dataset", str(path)]), template, 10)
    with pytest.raises(UsageError, match="--dataset"):
        load_training(parse("sft", []), template, 10)
    with pytest.raises(UsageError, match="split_dataset_ratio"):
        load_training(parse("sft", ["--dataset", str(path), "--split_dataset_ratio", "1"]), template, 10)
    with pytest.raises(UsageError, match="--columns"):
        load_training(parse("sft", ["--dataset", str(path), "--columns", "a:b"]), template, 10)
    with pytest.raises(DataError, match=r"a\.jsonl:3"):
        load_training(parse("sft", ["--dataset", str(write(path, 5, broken=(2,))), "--strict"]), template, None)


@pytest.mark.parametrize("streaming", [False, True])
def test_evaluation_rows_that_are_all_bad_are_no_evaluation(template: Template, tmp_path: Path, streaming: bool) -> None:
    bad = write(tmp_path / "bad.jsonl", 2, broken=(0, 1))
    options = parse("sft", ["--dataset", str(write(tmp_path / "a.jsonl", 5)), "--val_dataset", str(bad)])
    with pytest.raises(DataError, match=r"no evaluation row is left[\s\S]*2  not valid JSON; first: bad\.jsonl:1"):
        evaluation(options, template, None) if streaming else load_training(options, template, None)


def test_columns_flag(template: Template, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"Frage": "q", "Antwort": "a"}))
    options = parse("sft", ["--dataset", str(path), "--columns", '{"frage": "query", "antwort": "response"}'])
    assert load(options).rows[0].conversation.messages[1] == {"role": "assistant", "content": "a"}


def test_a_misspelt_column_is_no_way_to_lose_one(template: Template, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"Frage": "q", "Antwort": "a", "content": "c"}))
    options = parse("sft", ["--dataset", str(path), "--columns", '{"frage": "qwery", "antwort": "response"}'])
    with pytest.raises(UsageError, match="did you mean 'query'"):  # or the answers alone would be learnt, as plain text
        load(options)
    hidden = '{"frage": "query", "content": "hidden"}'
    options = parse("sft", ["--dataset", str(path), "--columns", hidden.replace("}", ', "antwort": "response"}')])
    assert load(options).rows[0].conversation.messages[1]["content"] == "a"


def test_a_column_that_no_row_has(template: Template, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"query": "q", "response": "r", "Persona": "p"}))
    with pytest.raises(UsageError, match=r"'perzona', a column that no row has\n.*did you mean 'persona'"):
        load(parse("sft", ["--dataset", str(path), "--columns", '{"perzona": "system"}']))
    assert load(parse("sft", ["--dataset", str(path), "--columns", '{"persona": "system", "personb": "history"}'])).rows
    assert "renames 'personb', a column that no row has; they have persona, query, response" in capsys.readouterr().out


def test_half_a_surrogate_pair_drops_its_row_alone(template: Template, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [
        {"query": "\ud800", "response": "a"},
        {"query": "\U0001f600", "response": "a"},
        {"text": "\udfff"},
        {"query": "q", "response": "b"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--dataset", str(path), "--split_dataset_ratio", "0"]
    samples, _, _, report = load_training(parse("sft", flags), template, None)
    assert len(samples) == 2 and "half a surrogate pair, '\\ud800'; first: a.jsonl:1" in report.table() and "a.jsonl:3" in report.table()


def test_chats_need_a_chat_template(tmp_path: Path) -> None:
    base = Template(make_tokenizer("bytelevel"), None, "none")
    path = write(tmp_path / "a.jsonl", 3)
    with pytest.raises(TemplateError, match="--template"):
        load_training(parse("sft", ["--dataset", str(path)]), base, None)
    with pytest.raises(TemplateError, match="--template"):
        load(parse("sft", ["--dataset", str(path)]), base)


def test_split_learns_every_target_once(template: Template) -> None:
    rows = [row("short", "yes", 1), row("question " * 5, "long answer " * 60, 2), row("long question " * 60, "yes", 3)]
    full, _ = encode(rows, template, None)
    pieces, report = encode(rows, template, 50, "split")
    assert all(len(piece.ids) <= 50 and piece.mask[1:].any() for piece in pieces)
    assert sum(int(piece.mask.sum()) for piece in pieces) == sum(int(sample.mask.sum()) for sample in full)
    learnt = [token for piece in pieces for token in piece.ids[piece.mask].tolist()]
    assert learnt == [token for sample in full for token in sample.ids[sample.mask].tolist()]
    assert report.kept == 3 and report.samples == len(pieces) > 6 and report.truncated.first == ["a.jsonl:2", "a.jsonl:3"]
    assert "split" in report.table()
    (whole,) = encode([Row(Conversation(text="word " * 200), "a.txt", 1)], template, None)[0]
    parts, _ = encode([Row(Conversation(text="word " * 200), "a.txt", 1)], template, 64, "split")
    joined = parts[0].ids.tolist() + [token for part in parts[1:] for token in part.ids[1:].tolist()]
    assert joined == whole.ids.tolist() and len(parts) > 3
