"""`swift infer`: the terminal's words and answers against transformers and PEFT, and batch runs that can be killed and gone on with."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from swiftlite.cli import dispatch
from swiftlite.errors import CheckpointError, DataError, SwiftError, UsageError

TOKENS = 10
FLAGS = ["--torch_dtype", "float32", "--temperature", "0", "--max_new_tokens", str(TOKENS)]
RULER = "-" * 50


@pytest.fixture(scope="module")
def model_dir(make_model) -> Path:
    return make_model("llama")


@pytest.fixture(scope="module")
def checkpoint(make_adapter, model_dir, tmp_path_factory) -> Path:
    """What a training run leaves: adapter, template with a system prompt, and settings that name the model and the data."""
    from swiftlite.chat.template import Template
    from swiftlite.models.loading import load_tokenizer

    folder = tmp_path_factory.mktemp("run")
    path = folder / "checkpoint-7"
    shutil.copytree(make_adapter(model_dir, 1), path)
    Template.load(model_dir, load_tokenizer(model_dir), system="You are small.").save(path)
    data = folder / "train.jsonl"
    rows = [{"query": f"how much is {i}?", "response": f"it is {i}"} for i in range(20)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = {"model": str(model_dir), "dataset": [str(data)], "split_dataset_ratio": 0.2, "data_seed": 3, "system": "You are small."}
    (path / "sft_args.json").write_text(json.dumps(args))
    return path


@pytest.fixture(scope="module")
def reference(model_dir, checkpoint):
    """reference(messages, adapted) -> the greedy answer of transformers, or of PEFT with the checkpoint's adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    adapted_model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32), checkpoint).eval()

    def answer(question: list[dict] | str, adapted: bool = False, tokens: int = TOKENS) -> str:
        if isinstance(question, str):
            ids = tokenizer(question)["input_ids"]
        else:
            ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
        with torch.no_grad():
            out = (adapted_model if adapted else base).generate(
                input_ids=torch.tensor([ids]), max_new_tokens=tokens, do_sample=False, eos_token_id=2, pad_token_id=0
            )
        return tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)

    return answer


def shown(text: str) -> str:
    """Text as the terminal shows it: without control characters."""
    return "".join(c for c in text if c in "\t\n" or not (ord(c) < 32 or 127 <= ord(c) < 160))


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def start(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "swiftlite.cli", "infer", *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where a shell runs the tests in the background
    )  # fmt: skip


# chat


def test_the_words_of_the_chat(model_dir, checkpoint, reference):
    typed = [
        "who are you?", "and you?", "clear", "who are you?", "multi-line", "one", "two#", "single-line", "reset-system", "Be brief.", "hi",
        "lora default_lora", "hi", "lora nobody", "quit",
    ]  # fmt: skip
    process = start("--model", str(model_dir), "--adapters", f"default-lora={checkpoint}", *FLAGS)
    output, _ = process.communicate("\n".join(["lora " + model_dir.name, *typed]) + "\n", timeout=120)
    assert process.returncode == 0, output
    first = reference([user("who are you?")])
    second = reference([user("who are you?"), {"role": "assistant", "content": first}, user("and you?")])
    lines = reference([user("who are you?"), {"role": "assistant", "content": first}, user("one\ntwo")])
    brief = {"role": "system", "content": "Be brief."}
    expected = [
        f"<<< {first}\n{RULER}\n",
        f"<<< {second}\n{RULER}\n",
        f"<<< <<< {first}\n{RULER}\n",
        f"<<< <<<[M] {lines}\n{RULER}\n",
        f"<<<[M] <<< <<<[S] <<< {reference([brief, user('hi')])}\n{RULER}\n",
        f"<<< default-lora answers (served: {model_dir.name}, default-lora)\n",
        f"<<< {reference([brief, user('hi')], adapted=True)}\n{RULER}\n",
        "<<< The model `nobody` does not exist\n",
    ]
    at = 0
    for part in expected:
        found = output.find(shown(part), at)
        assert found >= 0, f"{shown(part)!r} is missing after {output[at : at + 200]!r}"
        at = found + len(shown(part))
    assert "Traceback" not in output


def test_ctrl_c_stops_the_answer_and_ctrl_d_leaves(make_model):
    # slow enough to be still answering when the signal comes, however busy the machine is
    long = make_model("llama", max_position_embeddings=8192, eos_token_id=1, num_hidden_layers=32)
    process = start("--model", str(long), "--torch_dtype", "float32", "--top_k", "1", "--repetition_penalty", "1.3")
    assert process.stdin and process.stdout
    process.stdin.write("go on\n")
    process.stdin.flush()
    seen = ""
    while "<<< " not in seen or len(seen.split("<<< ")[1]) < 20:  # the answer is on its way
        piece = process.stdout.read(1)
        assert piece, seen
        seen += piece
    process.send_signal(signal.SIGINT)
    while RULER not in seen:
        piece = process.stdout.read(1)
        assert piece, seen
        seen += piece
    assert " (stopped)\n" + RULER in seen
    process.stdin.close()  # Ctrl-D
    assert process.stdout.read().strip() == "<<<"
    assert process.wait(30) == 0


def test_a_base_model_continues_text(monkeypatch, capsys, model_dir, reference, tmp_path):
    plain = tmp_path / "base"
    shutil.copytree(model_dir, plain)
    (plain / "chat_template.jinja").unlink()
    typed = iter(["Hello, how", "quit"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(typed))
    assert dispatch(["infer", "--model", str(plain), *FLAGS, "--stream", "false"]) == 0
    output = capsys.readouterr().out
    assert "base model" in output and shown(reference("Hello, how")) in output


# batch


@pytest.fixture(scope="module")
def rows(tmp_path_factory, reference) -> Path:
    """Five rows; the label of the first is what the model answers."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    records = [
        {"query": "who are you?", "response": reference([user("who are you?")])},
        {"messages": [user("hi"), {"role": "assistant", "content": "yes"}, user("again"), {"role": "assistant", "content": "no"}]},
        {"query": "你好！", "history": [["a", "b"]], "system": "Be kind."},
        {"text": "Hello, how are"},
        {"query": "last", "response": "x"},
    ]
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_batch_answers_every_row_in_order(model_dir, rows, reference, tmp_path, capsys):
    result = tmp_path / "deep" / "result.jsonl"
    assert dispatch(["infer", "--model", str(model_dir), "--val_dataset", str(rows), "--result_path", str(result), *FLAGS]) == 0
    found = read(result)
    assert [row["query"] for row in found] == ["who are you?", "again", "你好！", "Hello, how are", "last"]
    history = [user("hi"), {"role": "assistant", "content": "yes"}, user("again")]
    kind = [{"role": "system", "content": "Be kind."}, user("a"), {"role": "assistant", "content": "b"}, user("你好！")]
    questions = [[user("who are you?")], history, kind, "Hello, how are", [user("last")]]
    assert [row["response"] for row in found] == [reference(question) for question in questions]
    assert [row["label"] for row in found] == [found[0]["response"], "no", None, None, "x"]
    assert found[1]["history"] == [["hi", "yes"]] and found[2]["history"] == [["a", "b"]]
    assert "exact match: 1 of 3" in capsys.readouterr().out


def test_a_killed_batch_goes_on_where_it_stopped(model_dir, rows, tmp_path, capsys):
    flags = ["infer", "--model", str(model_dir), "--dataset", str(rows), *FLAGS, "--max_batch_size", "2"]
    whole, torn = tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    assert dispatch([*flags, "--result_path", str(whole)]) == 0
    lines = whole.read_bytes().splitlines(keepends=True)
    torn.write_bytes(b"".join(lines[:2]) + lines[2][:15])
    assert dispatch([*flags, "--result_path", str(torn)]) == 0
    assert torn.read_bytes() == whole.read_bytes()
    output = capsys.readouterr().out
    assert "holds 2 of 5 rows" in output and "\n3 rows in" in output
    before = whole.stat().st_mtime_ns
    assert dispatch([*flags, "--result_path", str(whole)]) == 0
    assert "all 5 rows already" in capsys.readouterr().out and whole.stat().st_mtime_ns == before


def test_a_result_file_of_other_rows_is_left_alone(model_dir, rows, tmp_path):
    other = tmp_path / "other.jsonl"
    for content in ('{"query": "something", "label": null, "history": []}\n', "not json\n", "[1]\n"):
        other.write_text(content)
        with pytest.raises(DataError, match=":1 "):
            dispatch(["infer", "--model", str(model_dir), "--val_dataset", str(rows), "--result_path", str(other), *FLAGS])
        assert other.read_text() == content


def test_what_cannot_be_answered_or_written_is_said_before_loading(model_dir, tmp_path, capsys):
    rows, bad = tmp_path / "rows.jsonl", tmp_path / "bad.jsonl"
    rows.write_text('{"query": "hi", "response": "hello"}')
    bad.write_text('{"foo": "hi"}')
    with pytest.raises(SwiftError, match=r"cannot write .*rows\.jsonl/r\.jsonl"):
        dispatch(["infer", "--model", str(model_dir), "--val_dataset", str(rows), "--result_path", str(rows / "r.jsonl"), *FLAGS])
    with pytest.raises(DataError, match="none could be read"):
        dispatch(["infer", "--model", str(model_dir), "--val_dataset", str(bad), "--result_path", str(tmp_path / "r.jsonl"), *FLAGS])
    assert "device:" not in capsys.readouterr().out


def test_the_held_out_rows_of_the_training_run(checkpoint, reference, capsys):
    assert dispatch(["infer", "--ckpt_dir", str(checkpoint), "--load_dataset_config", "true", *FLAGS]) == 0
    [result] = (checkpoint / "infer_result").glob("*.jsonl")
    found = read(result)
    assert len(found) == 4 and all(row["label"] == row["query"].replace("how much is", "it is").rstrip("?") for row in found)
    small = {"role": "system", "content": "You are small."}
    assert [row["response"] for row in found] == [reference([small, user(row["query"])], adapted=True) for row in found]
    assert "model = " in capsys.readouterr().out


def test_a_row_that_is_too_long_fails_alone(model_dir, tmp_path):
    data, result = tmp_path / "rows.jsonl", tmp_path / "result.jsonl"
    data.write_text(json.dumps({"query": "x " * 2000}) + "\n" + json.dumps({"query": "hi"}) + "\n")
    assert dispatch(["infer", "--model", str(model_dir), "--val_dataset", str(data), "--result_path", str(result), *FLAGS]) == 0
    bad, good = read(result)
    assert "tokens" in bad["error"] and bad["response"] == "" and good["finish_reason"] in ("stop", "length")


def test_merging_first_gives_the_adapters_answers(checkpoint, model_dir, rows, tmp_path):
    copy = tmp_path / "checkpoint-7"
    shutil.copytree(checkpoint, copy, ignore=shutil.ignore_patterns("infer_result"))
    flags = ["--val_dataset", str(rows), *FLAGS]
    merged, adapted = tmp_path / "merged.jsonl", tmp_path / "adapted.jsonl"
    assert dispatch(["infer", "--ckpt_dir", str(copy), "--merge_lora", "true", *flags, "--result_path", str(merged)]) == 0
    assert (tmp_path / "checkpoint-7-merged" / "config.json").is_file()
    assert dispatch(["infer", "--ckpt_dir", str(copy), *flags, "--result_path", str(adapted)]) == 0
    assert merged.read_bytes() == adapted.read_bytes()


# refusals


def test_flags_that_cannot_work_are_refused_before_anything_loads(model_dir, tmp_path):
    with pytest.raises(UsageError, match="native engine"):
        dispatch(["infer", "--model", str(model_dir), "--tensor_parallel_size", "2"])
    with pytest.raises(UsageError, match="needs a model"):
        dispatch(["infer"])
    with pytest.raises(CheckpointError, match="not a directory"):
        dispatch(["infer", "--ckpt_dir", str(tmp_path / "nothing")])
    with pytest.raises(CheckpointError, match="neither an adapter"):
        dispatch(["infer", "--ckpt_dir", str(tmp_path)])
    with pytest.raises(UsageError, match="found no dataset"):
        dispatch(["infer", "--model", str(model_dir), "--load_dataset_config", "true"])
