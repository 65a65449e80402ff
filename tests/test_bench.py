"""`swift bench`: what it refuses before it measures, and a table that is whole where there is no terminal."""

from __future__ import annotations

from pathlib import Path

import pytest

from swiftlite.cli import main
from swiftlite.commands import bench, serving
from swiftlite.commands.bench import Case, _print_table
from swiftlite.engine.config import EngineConfig
from swiftlite.engine.engine import Engine
from swiftlite.errors import ModelError


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--num_prompts", "-1"], "at least 0"),
        (["--num_prompts", "2", "--request_rate", "-1"], "at least 0"),
        (["--json", "."], "is a folder"),
        (["--json", "/proc/report.json"], "cannot be written"),  # found when all was measured, and lost with it
    ],
)
def test_wrong_flags_are_refused_before_the_model_loads(flags: list[str], reason: str, capsys) -> None:
    assert main(["bench", "-m", "tiny-chat", *flags]) == 2
    printed = capsys.readouterr()
    assert reason in printed.err and not printed.out


def test_a_case_that_does_not_fit_is_refused(make_model, tmp_path: Path, capsys) -> None:
    """The engine would shorten its answers, and the speeds would be those of tokens that nobody computed."""
    report = tmp_path / "report.json"
    flags = ["--batch_size", "1", "--input_output_len", "8,4;500,13", "--json", str(report)]
    assert main(["bench", "-m", str(make_model("llama")), *flags]) == 2
    printed = capsys.readouterr()
    assert "513 tokens" in printed.err and "512 tokens" in printed.err
    assert "[BENCHMARK]" not in printed.out and not report.exists()


def test_mixed_requests_that_do_not_fit_are_refused(make_model, capsys) -> None:
    assert main(["bench", "-m", str(make_model("llama")), "--num_prompts", "2", "--max_model_len", "20"]) == 2
    printed = capsys.readouterr()
    assert "20 tokens" in printed.err and "[BENCHMARK]" not in printed.out


def test_decode_speed_is_one_where_the_run_of_one_token_took_longer(make_model, monkeypatch) -> None:
    """Then the difference of both runs says nothing; it gave 1e9 tokens a second."""
    timed = bench._timed
    monkeypatch.setattr(
        bench,
        "_timed",
        lambda engine, prompts, tokens, adapters: (100.0 if tokens == 1 else 1.0, timed(engine, prompts, tokens, adapters)[1]),
    )
    with Engine(make_model("llama"), EngineConfig(num_blocks=64), dtype="float32", device="cpu") as engine:
        case = bench.batch_case(engine, [], batch=2, prompt=8, output=3)
    assert 1 < case.decode_tokens_per_s < 1e5


def test_a_request_that_fails_ends_the_benchmark(make_model, monkeypatch) -> None:
    with Engine(make_model("llama"), EngineConfig(num_blocks=64), dtype="float32", device="cpu") as engine:
        monkeypatch.setattr(engine.runner, "execute", lambda *_: 1 / 0)
        for measure in (lambda: bench.batch_case(engine, [], 2, 8, 3), lambda: bench.serve_case(engine, [], 2, 0)):
            with pytest.raises(ModelError, match="division by zero"):
                measure()


def test_all_prompts_may_wait(make_model, monkeypatch) -> None:
    """A server's limit on what waits is none of the benchmark's: it ended with "too many requests wait" before."""
    wanted = {}
    monkeypatch.setattr(serving, "load_engine", lambda *_, **overrides: wanted.update(overrides) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["bench", "-m", str(make_model("llama")), "--num_prompts", "5000"])
    assert EngineConfig(**wanted).max_waiting >= 5000


def test_the_table_is_whole_in_80_columns(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    _print_table([Case(32, 1024, 256, 8, 12345.6, 2345.6, 2345.7, 98765.4, 99999.9, 87654.3, 76543.2, 0.1)])
    printed = capsys.readouterr().out
    assert "…" not in printed and "prefill" in printed
    assert " ".join(printed.splitlines()[-2].split()) == "32 1024 256 8 12345.6 2345.6 2345.7 98765.4 87654.3 76543.2"
