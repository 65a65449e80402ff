"""What a run tells: `logging.jsonl`, the reporters asked for, and a progress line. Rows are dicts of plain numbers, made by the loop."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, TextIO

from swiftlite.train import reporters


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Logbook:
    """Writes each row everywhere it belongs. `history` are the rows of a resumed run up to its checkpoint."""

    def __init__(self, run: Path, total_steps: int, history: list[dict[str, Any]], report_to: tuple[str, ...]) -> None:
        self.rows, self.total = list(history), total_steps
        path = run / "logging.jsonl"
        aside = run / ".logging.jsonl"
        aside.write_text("".join(_line(row) for row in history), encoding="utf-8")
        os.replace(aside, path)
        self.file: TextIO = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self.reporters = reporters.start(report_to, run, history[-1]["global_step"] if history else 0)
        self.progress = _rich(total_steps) if sys.stdout.isatty() else None

    def train(self, row: dict[str, Any], eta: float) -> None:
        """A row of training; `eta` in seconds."""
        self._write(row, "train")
        text = (
            f"loss {row['loss']:.4f}  acc {row['token_acc']:.3f}  lr {row['learning_rate']:.2e}  grad {row['grad_norm']:.3g}  "
            f"{row['tokens_per_s']:.0f} tok/s  {row['memory_gb']:.1f} GB"
        )
        self.say(f"step {row['global_step']:>{len(str(self.total))}}/{self.total}  {text}  eta {duration(eta)}")
        if self.progress is not None:
            self.progress[0].update(self.progress[1], text=f"loss {row['loss']:.3f}")

    def step(self, number: int) -> None:
        """`number` steps are done."""
        if self.progress is not None:
            self.progress[0].update(self.progress[1], completed=number)

    def evaluation(self, row: dict[str, Any]) -> None:
        self._write(row, "eval")
        shown = (f"{name} {value:.{4 if name == 'eval_loss' else 3}f}" for name, value in row.items() if name.startswith("eval_"))
        self.say(f"step {row['global_step']}: {'  '.join(shown)}")

    def say(self, text: str) -> None:
        """A line beside the progress bar."""
        if self.progress is None:
            print(text, flush=True)
        else:
            self.progress[0].console.print(text, markup=False, highlight=False)

    def final(self, row: dict[str, Any]) -> None:
        """The run's last row: what came out."""
        self.file.write(_line(row))

    def close(self) -> None:
        if self.progress is not None:
            self.progress[0].stop()
        for reporter in self.reporters:
            reporter.close()
        self.file.close()

    def _write(self, row: dict[str, Any], kind: str) -> None:
        self.rows.append(row)
        self.file.write(_line(row))
        self.file.flush()
        values = {f"{kind}/{key.removeprefix('eval_')}": value for key, value in row.items() if key != "global_step"}
        for reporter in self.reporters:
            reporter.log(values, row["global_step"])


class Silent(Logbook):
    """That of a process that writes nothing: it only remembers."""

    def __init__(self, total_steps: int, history: list[dict[str, Any]]) -> None:
        self.rows, self.total = list(history), total_steps
        self.file = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self.reporters, self.progress = [], None

    def say(self, text: str) -> None:
        pass


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _rich(total: int) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    progress = Progress(MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[text]}"))
    task = progress.add_task("train", total=total, text="")
    progress.start()
    return progress, task
