"""Checkpoints on disk: written aside, synced, then renamed, so that a folder named checkpoint-N is always a whole one.

`trainer_state.json` is written last and lists every file with its size; reading checks them. Only tensors and plain values
are stored (`torch.load(weights_only=True)` reads them). Does not know what the weights are: the caller writes them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from swiftlite.disk import mount
from swiftlite.errors import CheckpointError

STATE, TENSORS = "trainer_state.json", "trainer_state.pt"


def step_of(path: Path) -> int:
    """N of .../checkpoint-N, else -1."""
    found = re.fullmatch(r"checkpoint-(\d+)", path.name)
    return int(found[1]) if found else -1


def write(run: Path, step: int, state: dict[str, Any], tensors: dict[str, Any] | None, save: Callable[[Path], None]) -> Path:
    """run/checkpoint-<step> with what `save(folder)` writes, `tensors` and `state`. An older folder of that name is replaced.

    CheckpointError when it cannot be written (a full disk, ...): nothing of it is left and older checkpoints stay.
    """
    final, aside = run / f"checkpoint-{step}", run / f".checkpoint-{step}.{os.getpid()}"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        save(aside)
        if tensors is not None:
            import torch

            torch.save(tensors, aside / TENSORS)
        files = {str(p.relative_to(aside)): p.stat().st_size for p in sorted(aside.rglob("*")) if p.is_file()}
        (aside / STATE).write_text(json.dumps({**state, "files": files}, ensure_ascii=False), encoding="utf-8")
        for path in [*aside.rglob("*"), aside]:
            _sync(path)
        if final.exists():
            remove(final)
        os.rename(aside, final)
        _sync(run)
    except BaseException as error:  # also a second Ctrl-C
        shutil.rmtree(aside, ignore_errors=True)
        if _is_disk_error(error):
            raise CheckpointError(
                f"cannot write {final}",
                str(error).splitlines()[0],
                f"make room on {mount(run)}, then go on from the last checkpoint",
            ) from error
        raise
    return final


def _is_disk_error(error: BaseException) -> bool:
    """The system refused a write; torch, safetensors and tokenizers each wrap that in a class of their own."""
    text = str(error)
    return isinstance(error, OSError) or any(mark in text for mark in ("os error", "PytorchStreamWriter", "inline_container", "I/O error"))


def remove(path: Path) -> None:
    """Delete a checkpoint; it loses its name first, so that half of one is never taken for a checkpoint."""
    doomed = path.with_name(f".{path.name}.{os.getpid()}.old")
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def clean(run: Path) -> None:
    """Remove what a killed process left half-written or half-deleted."""
    for path in run.glob(".checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """(state, tensors or None when it was saved without). CheckpointError unless it is whole."""
    if not path.is_dir():
        runs = sorted(path.parent.glob("checkpoint-*"), key=step_of) if path.parent.is_dir() else []
        raise CheckpointError(f"no checkpoint at {path}", fix=f"the newest there is {runs[-1]}" if runs else "check the path")
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is no training checkpoint", f"{STATE}: {error}", "pass a checkpoint-N folder of `swift sft`"
        ) from None
    for name, size in state["files"].items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            found = f"has {file.stat().st_size} of {size} bytes" if file.is_file() else "is missing"
            raise CheckpointError(f"{path} is incomplete", f"{name} {found}", "copy it again, or resume from an older checkpoint")
    if TENSORS not in state["files"]:
        return state, None
    import torch

    return state, torch.load(path / TENSORS, map_location="cpu", weights_only=True)


def rotate(run: Path, own: list[str], limit: int, best: str | None) -> list[str]:
    """Delete the oldest of `own` (names in the order written) until `limit` are left; returns those.

    The newest and `best` stay whatever the limit. Others in the folder are not looked at: another run's result may be there.
    """
    keep = {own[-1]} | {name for name in own if best is not None and run / name == Path(best)}
    for name in reversed(own):
        if len(keep) >= limit:
            break
        keep.add(name)
    for name in own:
        if name not in keep and (run / name).is_dir():
            remove(run / name)
    return [name for name in own if name in keep]


def link(run: Path, name: str, target: Path) -> None:
    """run/<name> -> target, in one step; relative, so that the folder may be moved. Where there can be no links, that is said."""
    aside = run / f".{name}.{os.getpid()}"
    try:
        aside.unlink(missing_ok=True)
        aside.symlink_to(os.path.relpath(target, run))
        os.replace(aside, run / name)
    except OSError as error:
        print(f"note: no link {run / name}: {error.strerror}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
