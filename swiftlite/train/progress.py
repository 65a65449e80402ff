"""Where a run stands: steps, the best evaluation, and which checkpoints are the run's own. Part of every checkpoint.

A run is told from others by a random name, not by its folder: folders are moved, copied and shared.
"""

from __future__ import annotations

import json
import math
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swiftlite.train.checkpoint import STATE


@dataclass
class Progress:
    """`best_metric` is always that of `best_model_checkpoint`."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_metric: float | None = None
    without_best: int = 0  # evaluations since the best one
    best_model_checkpoint: str | None = None
    last_model_checkpoint: str | None = None
    run: str = field(default_factory=lambda: uuid.uuid4().hex)  # the same after resuming
    kept: list[str] = field(default_factory=list)  # names of the run's checkpoints in its folder, in the order written

    @staticmethod
    def resumed(state: dict[str, Any], checkpoint: Path, folder: Path) -> Progress:
        """That of a checkpoint's `state`, in a run that goes on in `folder`.

        What the run wrote is looked for beside the checkpoint, wherever that is by now; only what is there and the run's own
        counts. Checkpoints that stay in another folder are no longer the run's to delete.
        """
        progress = Progress(**state["progress"])
        beside = checkpoint.parent
        progress.last_model_checkpoint = str(checkpoint)
        progress.kept = [name for name in progress.kept if folder == beside and _run_of(beside / name) == progress.run]
        if progress.best_model_checkpoint is not None:
            recorded = Path(progress.best_model_checkpoint)
            found = [path for path in (beside / recorded.name, recorded) if _run_of(path) == progress.run]
            if found:
                progress.best_model_checkpoint = str(found[0])
            else:
                print(f"note: the best checkpoint, {recorded}, is no longer there; the next evaluation is the best again")
                progress.best_model_checkpoint = progress.best_metric = None
        return progress

    def judge(self, value: float, lower: bool, checkpoint: Path) -> bool:
        """Whether an evaluation is the best so far (`lower`: the lower the better); `checkpoint` is then to be saved."""
        best = self.best_metric
        better = math.isfinite(value) and (best is None or (value < best if lower else value > best))
        self.without_best = 0 if better else self.without_best + 1
        if better:
            self.best_metric, self.best_model_checkpoint = value, str(checkpoint)
        return better

    def wrote(self, checkpoint: Path) -> None:
        """Count a checkpoint as the run's own, the newest."""
        self.last_model_checkpoint = str(checkpoint)
        self.kept = [*(name for name in self.kept if name != checkpoint.name), checkpoint.name]


def _run_of(checkpoint: Path) -> str | None:
    """The name of the run that wrote it; None when it is not there, or not ours."""
    try:
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    run: str | None = state.get("progress", {}).get("run")  # other trainers write a file of that name too
    return run
