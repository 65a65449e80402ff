"""Where a run's numbers also go: TensorBoard files, Weights & Biases, SwanLab. Each package is imported when it is asked for.

A reporter is a function from (values by name, step) and one that ends it. None of them is needed: logging.jsonl has it all.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swiftlite.errors import UsageError

REPORTERS = ("tensorboard", "wandb", "swanlab")


@dataclass(frozen=True)
class Reporter:
    """`log(values, step)` for every row, `close()` at the end; both may raise."""

    name: str
    log: Callable[[Mapping[str, float], int], Any]
    close: Callable[[], Any]


def check(report_to: tuple[str, ...]) -> None:
    """UsageError for a reporter that we do not have, or whose package is missing; TensorBoard's may be."""
    for name in report_to:
        if name not in (*REPORTERS, "none"):
            raise UsageError(f"--report_to: unknown reporter {name!r}", fix=f"use {', '.join(REPORTERS)}, all or none")
        if name in ("wandb", "swanlab") and importlib.util.find_spec(name) is None:
            raise UsageError(f"--report_to {name}: the package {name} is not installed", fix=f"pip install {name}, or leave it out")


def installed() -> tuple[str, ...]:
    """What --report_to all means here."""
    found = tuple(name for name in REPORTERS if importlib.util.find_spec(name) is not None)
    print(f"--report_to all: {', '.join(found) or 'none is installed; logging.jsonl has every number'}")
    return found


def start(report_to: tuple[str, ...], run: Path, last_step: int) -> list[Reporter]:
    """The reporters of a run in folder `run`; `last_step` is 0 unless it is resumed."""
    openers = {"tensorboard": _tensorboard, "wandb": _wandb, "swanlab": _swanlab}
    return [found for name, opener in openers.items() if name in report_to and (found := opener(run, last_step)) is not None]


def _settings(run: Path) -> dict[str, Any]:
    path = run / "sft_args.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _tensorboard(run: Path, last_step: int) -> Reporter | None:
    """Written here, not by SummaryWriter: that one writes in a thread, where a full disk is a traceback that nobody can catch."""
    try:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter
    except ImportError:
        print("note: no TensorBoard files, the package tensorboard is not installed (logging.jsonl has every number)")
        return None
    folder = run / "runs"
    try:
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        file = open(folder / name, "wb", buffering=0)  # noqa: SIM115 (closed by close)
    except OSError as error:
        print(f"note: no TensorBoard files: {error}")
        return None
    records = RecordWriter(file)

    def write(**content: Any) -> None:
        records.write(Event(wall_time=time.time(), **content).SerializeToString())

    def log(values: Mapping[str, float], step: int) -> None:
        if file.tell() == 0:
            write(file_version="brain.Event:2")
            if last_step:  # rows after it are of the run before resuming
                write(step=last_step + 1, session_log=SessionLog(status=SessionLog.START))
        write(step=step, summary=Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()]))

    return Reporter("TensorBoard", log, records.close)


def _wandb(run: Path, last_step: int) -> Reporter:
    """Project from WANDB_PROJECT; everything else that wandb reads from its environment holds too (WANDB_MODE=offline)."""
    import wandb

    project = os.environ.get("WANDB_PROJECT", "swiftlite")
    session = wandb.init(project=project, name=os.environ.get("WANDB_NAME", run.name), dir=str(run), config=_settings(run))
    return Reporter("wandb", lambda values, step: session.log(dict(values), step=step), session.finish)


def _swanlab(run: Path, last_step: int) -> Reporter:
    """Project from SWANLAB_PROJ_NAME, mode from SWANLAB_MODE (cloud, local, offline, disabled)."""
    import swanlab

    mode = os.environ.get("SWANLAB_MODE")
    swanlab.init(
        project=os.environ.get("SWANLAB_PROJ_NAME", "swiftlite"), experiment_name=os.environ.get("SWANLAB_EXP_NAME", run.name),
        logdir=str(run / "swanlog"), config=_settings(run), **({"mode": mode} if mode else {}),
    )  # fmt: skip
    return Reporter("swanlab", lambda values, step: swanlab.log(dict(values), step=step), swanlab.finish)
