"""Evaluation by answering: the scores, the questions, the trained model in the engine, and all of it through the real command."""

from __future__ import annotations

import difflib
import gc
import json
import random
import weakref
from pathlib import Path

import pytest
import torch

from swiftlite import cli
from swiftlite.chat.conversation import Conversation
from swiftlite.chat.template import Template
from swiftlite.commands.answers import Answers
from swiftlite.engine.engine import Engine
from swiftlite.models.loading import load_model, load_tokenizer
from swiftlite.train import generation
from tests.test_sft import PAIRS, log, training

QUIET = ["--report_to", "none", "--logging_steps", "1", "--learning_rate", "1e-2"]


@pytest.fixture(scope="module")
def model(make_model) -> Path:
    return make_model("qwen3", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"query": question, "response": answer} for question, answer in PAIRS]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def slow_common(a: list[str], b: list[str]) -> int:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_common_subsequence_equals_the_table():
    rng = random.Random(0)
    for _ in range(200):
        a, b = ([rng.choice("abcd") for _ in range(rng.randrange(90))] for _ in range(2))
        assert generation.common(a, b) == slow_common(a, b)
    assert generation.common(list("aab"), list("ab")) >= difflib.SequenceMatcher(None, "aab", "ab").find_longest_match().size


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("the cat sat", "the cat sat", 1),
        ("The cat, sat!", "the cat sat", 1),
        ("police kill the gunman", "police killed the gunman", 0.75),  # Lin 2004, section 3.1
        ("省会是杭州", "浙江的省会在杭州", 8 / 13),  # 省会杭州: 4 of 5 and of 8
        ("杭州 West Lake", "west lake 杭州", 0.5),
        ("", "", 1),
        ("", "x", 0),
        ("!?", "x", 0),
    ],
)
def test_rouge_l(answer, reference, score):
    assert generation.rouge_l(answer, reference) == pytest.approx(score)


def test_questions(model):
    template = Template.load(model, load_tokenizer(model))

    def chat(*turns: str, last: str = "assistant") -> Conversation:
        roles = ["user", "assistant"] * len(turns)
        messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]
        messages[-1]["role"] = last
        return Conversation(messages)

    rows = [chat("a", "1"), chat("b", "2", "c", "3"), Conversation(text="plain"), chat("open", last="user"), chat("x" * 500, "4")]
    found = generation.questions(rows, template, None, 200)
    assert [(q.text, q.reference) for q in found] == [("a", "1"), ("c", "3")]
    assert found[1].prompt == template.encode_prompt(rows[1].messages[:-1])
    many = [chat(str(i), "!") for i in range(100)]
    assert [q.text for q in generation.questions(many, template, 4, 200)] == ["0", "25", "50", "75"]
    assert generation.plain("<think>\nhm\n</think>\n\n Paris \n") == "Paris"


@pytest.mark.parametrize("tuner", [["--tuner_type", "full"], ["--lora_rank", "8", "--lora_dropout", "0.05"], ["--use_dora", "true"]])
def test_scores_are_those_of_the_checkpoint(tuner, tmp_path, model, data, capsys):
    """The last evaluation says what transformers' own generation with the saved weights gives; training is not disturbed."""
    from peft import PeftModel

    flags = ["--model", str(model), "--dataset", str(data), "--val_dataset", str(data), "--num_train_epochs", "24", *QUIET, *tuner]
    flags += ["--gradient_accumulation_steps", "2", "--eval_steps", "30", "--save_steps", "30", "--max_new_tokens", "24"]
    assert cli.main(["sft", *flags, "--predict_with_generate", "true", "--output_dir", str(tmp_path / "a")]) == 0
    printed = capsys.readouterr().out
    assert "evaluation answers 5 rows" in printed and "eval_rouge-l" in printed
    run = next((tmp_path / "a").glob("*/v*"))
    rows = [row for row in log(run) if "eval_loss" in row]
    assert len(rows) >= 2 and all({"eval_exact_match", "eval_rouge-l", "eval_token_acc"} <= set(row) for row in rows)
    last = log(run)[-1]
    loaded = load_model(last["last_model_checkpoint"] if tuner[-1] == "full" else model, torch.float32, torch.device("cpu"), "sdpa")
    if tuner[-1] != "full":
        loaded = PeftModel.from_pretrained(loaded, last["last_model_checkpoint"])
    tokenizer = load_tokenizer(model)
    exact = rouge = 0.0
    for question, answer in PAIRS:
        ids = torch.tensor([Template.load(model, tokenizer).encode_prompt([{"role": "user", "content": question}])])
        out = loaded.generate(input_ids=ids, max_new_tokens=24, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
        text = tokenizer.decode(out, skip_special_tokens=True).strip()
        exact, rouge = exact + (text == answer), rouge + generation.rouge_l(text, answer)
    assert rows[-1]["eval_exact_match"] == pytest.approx(exact / 5)
    assert rows[-1]["eval_rouge-l"] == pytest.approx(rouge / 5)
    assert rows[-1]["eval_rouge-l"] > 0.5  # it learnt something, so the comparison says something
    assert last["metric"] == "eval_rouge-l" and last["best_metric"] == max(row["eval_rouge-l"] for row in rows)
    if tuner[-1] != "true":
        assert cli.main(["sft", *flags, "--output_dir", str(tmp_path / "b")]) == 0
        other = next((tmp_path / "b").glob("*/v*"))
        assert [row["loss"] for row in training(other)] == [row["loss"] for row in training(run)]


def test_answers_leave_nothing_and_may_fail(tmp_path, model, data, capsys, monkeypatch):
    """An evaluation that runs out of memory is the loss alone, and the run goes on; no engine waits for the garbage collector."""
    submit, call, engines, alive = Engine.submit, Answers.__call__, [], []

    def submits(self, *arguments, **wishes):
        parts = (self.runner.cache.keys[0], self.runner.model, self.runner)
        if not engines or engines[-1][0]() is not parts[0]:
            engines.append([weakref.ref(part) for part in parts])
        if len(engines) == 2:  # the first was the trial before training
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
        return submit(self, *arguments, **wishes)

    def called(self, *arguments):
        gc.disable()
        try:
            return call(self, *arguments)
        finally:
            alive.append(any(part() is not None for part in engines[-1]))
            gc.enable()

    monkeypatch.setattr(Engine, "submit", submits)
    monkeypatch.setattr(Answers, "__call__", called)
    flags = ["--model", str(model), "--dataset", str(data), "--val_dataset", str(data), "--max_steps", "4", *QUIET, "--sample_answers", "0"]
    flags += ["--predict_with_generate", "true", "--eval_steps", "2", "--save_steps", "2", "--max_new_tokens", "4"]
    assert cli.main(["sft", *flags, "--output_dir", str(tmp_path)]) == 0
    assert alive == [False] * 3
    rows = [row for row in log(next(tmp_path.glob("*/v*"))) if "eval_loss" in row]
    assert ["eval_rouge-l" in row for row in rows] == [False, True]
    assert "the loss alone" in (printed := capsys.readouterr().out) and "2 GiB" in printed


@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_report_shows_answers_before_and_after(tuner, tmp_path, model, data):
    flags = ["--model", str(model), "--dataset", str(data), "--val_dataset", str(data), "--max_steps", "60", *QUIET]
    flags += ["--gradient_accumulation_steps", "2", "--eval_steps", "60", "--save_steps", "60", "--max_new_tokens", "24"]
    assert cli.main(["sft", *flags, "--tuner_type", tuner, "--output_dir", str(tmp_path)]) == 0
    page = next(tmp_path.glob("*/v*/report.html")).read_text(encoding="utf-8")
    section = page.split("Answers to evaluation rows")[1].split("<section>")[0]
    assert section.count("before training") == section.count("after training") == 4
    before, after = (section.split(f"<dt>{when} training</dt><dd>")[1].split("</dd>")[0] for when in ("before", "after"))
    assert before != after
    assert cli.main(["sft", *flags[:-8], "--max_steps", "1", "--sample_answers", "0", "--output_dir", str(tmp_path / "none")]) == 0
    assert "Answers to" not in next((tmp_path / "none").glob("*/v*/report.html")).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--predict_with_generate", "true", "--split_dataset_ratio", "0"], 1, "no row to answer"),
        (["--metric_for_best_model", "rouge-l"], 2, "--predict_with_generate true"),
        (["--metric_for_best_model", "bleu"], 2, "bleu"),
        (["--predict_with_generate", "true", "--eval_limit", "0"], 2, "eval_limit"),
    ],
)
def test_refusals_come_before_training(flags, code, message, tmp_path, model, data, capsys):
    assert cli.main(["sft", "--model", str(model), "--dataset", str(data), "--output_dir", str(tmp_path / "out"), *QUIET, *flags]) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
