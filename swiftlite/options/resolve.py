"""Which value wins: command line > file > checkpoint > default.

A checkpoint carries the settings of its run in `sft_args.json` (3.x and 4.x: `args.json`). A command that is given
`--ckpt_dir` or `--adapters` needs nothing else: model, template and system come from there, and with
`--load_dataset_config` the data settings too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from swiftlite.errors import CheckpointError
from swiftlite.options.aliases import ALIASES, VALUES
from swiftlite.options.concerns import DataOptions
from swiftlite.options.parse import Options, flags_of

ARGS_FILES = ("sft_args.json", "args.json")
MODEL_SETTINGS = ("model", "model_type", "model_revision", "use_hf", "template", "system")
DATA_SETTINGS = tuple(f for f in DataOptions.__dataclass_fields__ if f != "strict")


def read_args(directory: str | Path) -> dict[str, Any]:
    """The settings saved beside a checkpoint, under our names; {} when there are none (a plain PEFT directory)."""
    for name in ARGS_FILES:
        path = Path(directory) / name
        if path.is_file():
            try:
                saved = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise CheckpointError(f"{path} is not valid JSON", str(error), "restore it, or delete it and pass --model") from None
            return {ALIASES.get(key, key): value for key, value in saved.items()}
    return {}


def inherit(options: Options, directory: str | Path) -> list[str]:
    """Fill flags that the user left at their default from a checkpoint's settings; returns one line per value taken."""
    saved = read_args(directory)
    names: tuple[str, ...] = MODEL_SETTINGS if options.values.get("load_args", True) else ()
    if options.values.get("load_dataset_config"):
        names += DATA_SETTINGS
    flags, lines = flags_of(options.command), []
    for name in names:
        value = saved.get(name)
        if name not in flags or value is None or value == [] or options.given(name):
            continue
        flag = flags[name]
        value = (
            tuple(map(flag.kind, value))
            if flag.many
            else flag.kind(VALUES.get(name, {}).get(value, value) if isinstance(value, str) else value)
        )
        options.set(name, value, str(directory))
        lines.append(f"{name} = {value!r} (from {directory})")
    return lines


def as_json(options: Options) -> dict[str, Any]:
    """Every flag's value, for `sft_args.json`."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in options.values.items()}
