"""Encoded rows on disk: equal to fresh ones, taken when nothing changed and only then, whole or not there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from chat_templates import STYLES, make_tokenizer

from swiftlite.chat.template import Template
from swiftlite.data import cache
from swiftlite.data.loading import load_training
from swiftlite.data.store import Sample, Samples, Writer, mapped
from swiftlite.options.parse import parse


@pytest.fixture(scope="module")
def template() -> Template:
    return Template(make_tokenizer("bytelevel"), STYLES["qwen2_5"], "qwen2_5")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Rows of every fate, and a cache of its own that takes them however few they are."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "WORTH_IT", 0)
    lines = [json.dumps({"query": f"question {i}", "response": f"answer {i} " * (i % 9 + 1)}) for i in range(300)]
    lines[7] = "{broken"
    lines[9] = json.dumps({"query": "q", "response": "long " * 300})
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    return path


def plain(samples) -> list[tuple[list[int], list[bool]]]:
    return [(sample.ids.tolist(), sample.mask.tolist()) for sample in samples]


def outcome(options, template: Template, max_length: int = 256):
    train, held, chats, report = load_training(options, template, max_length)
    return plain(train), plain(held), chats, report


def test_cached_equals_fresh(data: Path, template: Template, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--dataset",
        f"{data}#350",
        "--split_dataset_ratio",
        "0.1",
        "--self_cognition_sample",
        "5",
        "--model_name",
        "N",
        "--model_author",
        "A",
    ]
    fresh = outcome(parse("sft", [*flags, "--load_from_cache_file", "false"]), template)
    assert "cache" not in capsys.readouterr().out and not cache.root().exists()
    first = outcome(parse("sft", flags), template)
    assert "rows kept for the next run" in capsys.readouterr().out
    second = outcome(parse("sft", flags), template)
    assert "rows taken from the cache" in capsys.readouterr().out
    assert fresh == first == second
    assert fresh[3].table() == second[3].table() and fresh[3].dropped["not valid JSON"].count == 1
    assert [p.name for p in cache.root().iterdir() if p.name.startswith(".")] == []


def test_any_change_is_a_miss(data: Path, template: Template, capsys: pytest.CaptureFixture[str]) -> None:
    def hit(*flags: str, use: Template = template, max_length: int = 256) -> bool:
        outcome(parse("sft", ["--dataset", str(data), *flags]), use, max_length)
        return "taken from the cache" in capsys.readouterr().out

    assert not hit() and hit()
    assert not hit("--data_seed", "1")
    assert not hit("--loss_scale", "all")
    assert not hit(max_length=128)
    assert not hit(use=Template(make_tokenizer("bytelevel"), STYLES["qwen2_5"], "qwen2_5", default_system="Be brief."))
    assert not hit(use=Template(make_tokenizer("qwen"), STYLES["qwen2_5"], "qwen2_5"))
    assert hit()
    changed = data.stat()
    data.write_text(data.read_text().replace("answer 1 ", "answer X ", 1))
    os.utime(data, ns=(changed.st_atime_ns, changed.st_mtime_ns))
    assert not hit() and hit()  # found by content, not by date


def test_damage_and_a_cache_that_cannot_be_written(
    data: Path, template: Template, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = parse("sft", ["--dataset", str(data)])
    first = outcome(options, template)
    (entry,) = cache.root().iterdir()
    with open(entry / "ids.bin", "r+b") as file:
        file.truncate(100)
    assert outcome(options, template) == first and "damaged" in capsys.readouterr().out
    assert outcome(options, template) == first and "taken from the cache" in capsys.readouterr().out
    monkeypatch.setenv("XDG_CACHE_HOME", str(data))  # a file
    assert outcome(options, template) == first and "kept in memory" in capsys.readouterr().out


def test_the_oldest_entries_go(data: Path, template: Template, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "KEEP", 2)
    for seed in range(3):
        outcome(parse("sft", ["--dataset", str(data), "--data_seed", str(seed)]), template)
        for age, entry in enumerate(sorted(cache.root().iterdir(), key=lambda p: -p.stat().st_mtime)):
            os.utime(entry, (1e9 - age, 1e9 - age)) if seed < 2 else None
    assert len(list(cache.root().iterdir())) == 2


@pytest.mark.parametrize("on_disk", [False, True])
def test_store(tmp_path: Path, on_disk: bool) -> None:
    rng = np.random.default_rng(0)
    written = [Sample(rng.integers(0, 99, n).astype(np.int32), rng.random(n) < 0.5) for n in (3, 1, 7, 2)]
    writer = Writer(tmp_path if on_disk else None)
    for sample in written:
        writer.add(sample)
    arrays = writer.arrays()
    samples = Samples(arrays, np.array([2, 0, 2, 3]))
    assert plain(samples) == plain([written[k] for k in (2, 0, 2, 3)]) == plain(samples[:])
    assert plain(samples[1:3]) == plain([written[0], written[2]]) and plain([samples[-1]]) == plain([written[3]])
    if on_disk:
        assert plain(Samples(mapped(tmp_path), np.arange(4))) == plain(written)
