"""A run's folder: <output_dir>/<model>/vN-<time>, and the settings file in it and in every checkpoint."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

from swiftlite.disk import mount
from swiftlite.errors import CheckpointError


def create(output_dir: str, name: str, add_version: bool) -> Path:
    """A new folder for a run. CheckpointError when it cannot be made."""
    parent = Path(output_dir).expanduser()
    try:
        if not add_version:
            parent.mkdir(parents=True, exist_ok=True)
            return parent.resolve()
        parent = parent / name
        parent.mkdir(parents=True, exist_ok=True)
        while True:
            taken = [int(found[1]) for entry in parent.iterdir() if (found := re.match(r"v(\d+)-", entry.name))]
            run = parent / f"v{max(taken, default=-1) + 1}-{time.strftime('%Y%m%d-%H%M%S')}"
            try:
                run.mkdir()
            except FileExistsError:  # another run began in this second
                continue
            return run.resolve()
    except OSError as error:
        raise CheckpointError(f"cannot make a folder in {parent}", str(error), "pass another --output_dir") from None


def begin(run: Path, args: dict[str, Any]) -> None:
    """Write down a run's settings. CheckpointError when nothing can be written there."""
    try:
        write_args(run, args)
    except OSError as error:
        raise CheckpointError(f"cannot write into {run}", str(error), f"make room on {mount(run)}, or pass another --output_dir") from None


def write_args(directory: Path, args: dict[str, Any]) -> None:
    (directory / "sft_args.json").write_text(json.dumps(args, indent=2, ensure_ascii=False), encoding="utf-8")
