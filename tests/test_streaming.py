"""--streaming: the same rows in blocks, bounded, resumed in place, and refusals; through the real command where that says more."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from swiftlite import cli
from swiftlite.chat.template import Template
from swiftlite.data.stream import Place, Stream
from swiftlite.errors import DataError
from swiftlite.models.loading import load_tokenizer
from swiftlite.options.parse import parse
from swiftlite.train.streaming import StreamPlan
from tests.test_sft import assert_close, log, training, trajectory

QUIET = ["--report_to", "none", "--logging_steps", "1", "--learning_rate", "1e-2", "--sample_answers", "0"]


@pytest.fixture(scope="module")
def model(make_model) -> Path:
    return make_model("qwen3", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def template(model) -> Template:
    return Template.load(model, load_tokenizer(model))


def write(path: Path, count: int, word: str = "row") -> Path:
    rows = [{"query": f"{word} {i}", "response": f"answer {'x' * (i % 7)} {i}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def stream(template: Template, *flags: object) -> Stream:
    return Stream(parse("sft", ["--streaming", "true", "--max_steps", "9", *map(str, flags)]), template, 64)


def texts(template: Template, samples: list) -> list[str]:
    return [template.tokenizer.decode(s.ids.tolist(), skip_special_tokens=False) for s in samples]


def test_blocks_hold_every_row_once_a_reading_and_begin_anywhere(tmp_path, template):
    path = write(tmp_path / "rows.jsonl", 25)
    with open(path, "a", encoding="utf-8") as file:
        file.write("not json\n")
    source = stream(template, "--dataset", path, "--shuffle_buffer_size", 10)
    blocks = source.blocks()
    found = [next(blocks) for _ in range(6)]
    assert [len(samples) for _, samples in found] == [10, 10, 5] * 2
    assert [place for place, _ in found] == [Place(k // 3, k % 3 * 10, k) for k in range(6)]
    assert len({text for _, samples in found[:3] for text in texts(template, samples)}) == 25
    for place, samples in found:
        again = stream(template, "--dataset", path, "--shuffle_buffer_size", 10).blocks(place)
        where, got = next(again)
        assert where == place and texts(template, got) == texts(template, samples)


def test_bad_rows_are_counted_once_a_reading(tmp_path, template):
    path = write(tmp_path / "rows.jsonl", 4)
    path.write_text("broken\n" + path.read_text() + json.dumps({"query": "long", "response": "y " * 90}) + "\n")
    source = stream(template, "--dataset", path, "--shuffle_buffer_size", 3)
    blocks = source.blocks()
    for _ in range(4):
        next(blocks)
    assert source.report.kept == 8
    counts = {reason: group.count for reason, group in source.report.dropped.items()}
    assert counts == {"not valid JSON": 2, "longer than --max_length 64": 2}


def test_limits_and_mixing(tmp_path, template):
    a, b = write(tmp_path / "a.jsonl", 30, "aaa"), write(tmp_path / "b.jsonl", 6, "bbb")

    def first_reading(*flags: object) -> list[str]:
        source = stream(template, *flags, "--shuffle_buffer_size", 100)
        return texts(template, next(source.blocks())[1])

    assert len(first_reading("--dataset", f"{a}#5", b)) == 11
    assert len(first_reading("--dataset", a, b, "--train_dataset_sample", 7)) == 7
    mixed = first_reading("--dataset", a, b, "--interleave_prob", 0.5, 0.5)
    assert sum("bbb" in text for text in mixed) == 6 and 0 < sum("aaa" in text for text in mixed) < 30
    everything = first_reading("--dataset", a, b, "--interleave_prob", 0.5, 0.5, "--stopping_strategy", "all_exhausted")
    assert len({text for text in everything if "aaa" in text}) == 30 and sum("bbb" in text for text in everything) > 6


def test_plan_steps_stay_within_blocks_and_go_on(tmp_path, template):
    path = write(tmp_path / "rows.jsonl", 50)

    def plan() -> StreamPlan:
        source = stream(template, "--dataset", path, "--shuffle_buffer_size", 16)
        return StreamPlan(source, source.blocks(), 2, 2, True, True, 42, 1, 100)

    def rows(of: StreamPlan, number: int) -> list[list[list[int]]]:
        return [[of.samples[i].ids.tolist() for i in one] for one in of.step(number)]

    straight = plan()
    kept, states = [], []
    for number in range(40):
        kept.append(rows(straight, number))
        states.append(json.loads(json.dumps(straight.state())))
        assert len(straight.samples) <= 16
    once = [tuple(row) for step in kept for one in step for row in one]
    assert len(once) > 100 and len(set(once)) == 50
    for number in (0, 3, 4, 17, 38):
        other = plan()
        other.resume(states[number])
        assert [rows(other, k) for k in range(number + 1, 40)] == kept[number + 1 :]


def test_memory_does_not_grow_with_the_rows(tmp_path, template):
    path = write(tmp_path / "rows.jsonl", 6000)
    source = stream(template, "--dataset", path, "--shuffle_buffer_size", 200)
    plan = StreamPlan(source, source.blocks(), 4, 1, True, True, 42, 1, 100)
    tracemalloc.start()
    number = 0
    while plan.place.row < 1000:
        plan.step(number := number + 1)
    early = tracemalloc.get_traced_memory()[0]
    while plan.place.epoch == 0:
        plan.step(number := number + 1)
    assert tracemalloc.get_traced_memory()[0] < early + 300_000  # 5000 rows would be several MB
    tracemalloc.stop()


def test_nothing_left_ends_with_the_table(tmp_path, template):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"query": "only"}\n' * 5)
    with pytest.raises(DataError, match="no training row is left"):
        next(stream(template, "--dataset", path).blocks())


def test_run_equals_rows_at_hand_and_resumes_exactly(tmp_path, model):
    """With one block a reading, blocks are epochs: the same rows in the same steps as without streaming. Then smaller blocks,
    broken off and resumed, equal the straight run bit for bit."""
    data = write(tmp_path / "rows.jsonl", 24)
    common = ["--model", str(model), "--dataset", str(data), "--max_steps", "7", *QUIET, "--dataset_shuffle", "false", "--save_steps", "4"]
    common += ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2", "--save_total_limit", "9"]

    def run(name: str, *flags: str) -> Path:
        assert cli.main(["sft", *common, *flags, "--output_dir", str(tmp_path / name)]) == 0
        return next((tmp_path / name).glob("*/v*"))

    plain = run("plain", "--split_dataset_ratio", "0")
    whole = run("whole", "--streaming", "true")
    assert_close(trajectory(whole), trajectory(plain), 1e-6)

    straight = run("blocks", "--streaming", "true", "--shuffle_buffer_size", "9", "--val_dataset", str(data), "--lora_dropout", "0.1")
    assert any("eval_loss" in row for row in log(straight))
    broken = tmp_path / "broken"
    shutil.copytree(straight, broken)
    shutil.rmtree(broken / "checkpoint-7")
    assert cli.main(["sft", "--resume_from_checkpoint", str(broken / "checkpoint-4")]) == 0
    assert [row["loss"] for row in training(broken)] == [row["loss"] for row in training(straight)]
    a, b = (load_file(one / "checkpoint-7" / "adapter_model.safetensors") for one in (straight, broken))
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("again", [[], ["--split_dataset_ratio", "0"]])
def test_a_run_without_evaluation_rows_resumes(again, tmp_path, model):
    data = write(tmp_path / "rows.jsonl", 12)
    flags = ["--streaming", "true", "--max_steps", "4", "--save_steps", "2", "--per_device_train_batch_size", "4", *QUIET]
    assert cli.main(["sft", "--model", str(model), "--dataset", str(data), *flags, "--output_dir", str(tmp_path / "out")]) == 0
    (run,) = (tmp_path / "out").glob("*/v*")
    straight = training(run)
    for gone in ("checkpoint-4", "logging.jsonl"):
        path = run / gone
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert cli.main(["sft", "--resume_from_checkpoint", str(run / "checkpoint-2"), *again]) == 0
    assert [row["loss"] for row in training(run)] == [row["loss"] for row in straight]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--streaming needs --max_steps"),
        (["--max_steps", "3", "--split_dataset_ratio", "0.1"], "pass --val_dataset"),
        (["--max_steps", "3", "--self_cognition_sample", "5"], "name it as a dataset"),
        (["--max_steps", "3", "--shuffle_buffer_size", "0"], "shuffle_buffer_size"),
    ],
)
def test_refusals(flags, message, tmp_path, model, capsys):
    data = write(tmp_path / "rows.jsonl", 3)
    out = ["--output_dir", str(tmp_path / "out"), "--streaming", "true"]
    assert cli.main(["sft", "--model", str(model), "--dataset", str(data), *out, *flags]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
