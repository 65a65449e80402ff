"""Numbers out of range, and flags without effect, are said before anything is loaded or written."""

from __future__ import annotations

import pytest

from swiftlite import cli
from swiftlite.options.concerns import COMMANDS
from swiftlite.options.parse import flags_of, parse
from swiftlite.train import ranges
from tests.test_ranks import data, words  # noqa: F401 (fixtures)

BAD = {
    "at least 1": ["0", "-3"],
    "a number above 0": ["0", "-1", "nan", "inf"],
    "a number from 0 up": ["-1", "nan", "inf"],
    "between 0 and 1": ["-0.1", "1.5", "nan"],
    "from 0 to below 1": ["-0.1", "1", "nan"],
    "from 0 to below 2**63": ["-1", "18446744073709551615"],
}


def test_defaults_and_every_number_has_a_range():
    ranges.check(parse("sft", []))
    known = {name for _, names in ranges.RANGES.values() for name in names}
    numbers = {name for name, flag in flags_of("sft").items() if flag.kind in (int, float) and not flag.many}
    own = {"max_steps", "quant_bits", "train_dataset_sample", "val_dataset_sample"}  # -1 or a list of values
    assert known | own == numbers, COMMANDS["sft"]


def cases() -> list[tuple[str, str, str]]:
    """(range, flag, value), without what is no number of the flag's kind: the parser refuses that."""
    whole = {name for name, flag in flags_of("sft").items() if flag.kind is int}
    found = [(said, name, value) for said, (_, names) in ranges.RANGES.items() for name in names for value in BAD[said]]
    return [case for case in found if case[1] not in whole or case[2].lstrip("-").isdecimal()]


@pytest.mark.parametrize(("said", "name", "value"), cases())
def test_out_of_range(said, name, value, words, tmp_path, capsys):  # noqa: F811
    assert cli.main(["sft", *words, f"--{name}={value}", "--output_dir", str(tmp_path / "out")]) == 2
    assert f"--{name} must be {said}, got " in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_lora_flags_in_full_training_are_named(words, tmp_path, capsys):  # noqa: F811
    full = ["sft", *words, "--tuner_type", "full", "--max_steps", "1", "--report_to", "none", "--output_dir", str(tmp_path)]
    assert cli.main([*full, "--lora_rank", "8", "--target_modules", "q_proj", "--report_to", "all"]) == 0
    printed = capsys.readouterr().out
    assert "note: --target_modules, --lora_rank: without effect with --tuner_type full" in printed and "--report_to all: " in printed
    assert cli.main(full) == 0
    assert "without effect" not in capsys.readouterr().out
