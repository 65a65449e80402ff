"""`swift bench`: what it refuses before it measures, and a table that is whole where there is no terminal."""

from __future__ import annotations

from pathlib import Path

import pytest

from swiftlite.cli import main
from swiftlite.commands.bench import Case, _print_table


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--num_prompts", "-1"], "at least 0"),
        (["--num_prompts", "2", "--request_rate", "-1"], "at least 0"),
        (["--json", "."], "is a folder"),
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


def test_the_table_is_whole_in_80_columns(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    _print_table([Case(32, 1024, 256, 8, 12345.6, 2345.6, 2345.7, 98765.4, 99999.9, 87654.3, 76543.2, 0.1)])
    printed = capsys.readouterr().out
    assert "…" not in printed and "prefill" in printed
    assert " ".join(printed.splitlines()[-2].split()) == "32 1024 256 8 12345.6 2345.6 2345.7 98765.4 87654.3 76543.2"
