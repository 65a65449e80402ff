"""What a run tells: `logging.jsonl`, the reporters asked for, and a progress line. Rows are dicts of plain numbers, made by the loop."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from swiftlite.disk import mount
from swiftlite.errors import CheckpointError
from swiftlite.train import reporters


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Logbook:
    """Writes each row everywhere it belongs. `history` are the rows of a resumed run up to its checkpoint.

    A row that cannot be written ends no run: checkpoints hold the rows too, and the file is made whole when that works again.
    CheckpointError when not even the first row's file can be made.
    """

    def __init__(self, run: Path, total_steps: int, history: list[dict[str, Any]], report_to: tuple[str, ...]) -> None:
        self.rows, self.total, self.ended = list(history), total_steps, ""
        self.path, self.behind = run / "logging.jsonl", False
        try:
            self.file = self._whole()
        except OSError as error:
            raise CheckpointError(f"cannot write {self.path}", str(error), f"make room on {mount(run)}") from None
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
        self.ended = _line(row)
        self._put(self.ended)

    def close(self) -> None:
        if self.progress is not None:
            self.progress[0].stop()
        for reporter in self.reporters:
            self._tell(reporter, reporter.close)
        with contextlib.suppress(OSError):  # what it still holds was said to be missing
            self.file.close()

    def _write(self, row: dict[str, Any], kind: str) -> None:
        self.rows.append(row)
        self._put(_line(row))
        values = {f"{kind}/{key.removeprefix('eval_')}": value for key, value in row.items() if key != "global_step"}
        self.reporters = [one for one in self.reporters if self._tell(one, one.log, values, row["global_step"])]

    def _whole(self) -> TextIO:
        """Write all rows anew; the file, open for more."""
        aside = self.path.with_name(".logging.jsonl")
        try:
            aside.write_text("".join(map(_line, self.rows)) + self.ended, encoding="utf-8")
            os.replace(aside, self.path)
        finally:
            aside.unlink(missing_ok=True)
        return open(self.path, "a", encoding="utf-8")

    def _put(self, line: str) -> None:
        """Append a line, or after a failure all of them: of the one that failed, a part may be there."""
        try:
            if self.behind:
                with contextlib.suppress(OSError):
                    self.file.close()
                self.file = self._whole()
            else:
                self.file.write(line)
                self.file.flush()
            self.behind = False
        except OSError as error:
            if not self.behind:
                self.say(f"note: {self.path} lacks rows: {error.strerror} (make room on {mount(self.path)}); training goes on")
            self.behind = True

    def _tell(self, reporter: reporters.Reporter, call: Callable[..., Any], *arguments: Any) -> bool:
        """False, and a note, when the reporter failed: then it is left out from there on."""
        try:
            call(*arguments)
        except Exception as error:  # each has its own tree of disk and network errors
            self.say(f"note: {reporter.name} fails and gets no more rows: {type(error).__name__}: {str(error).splitlines()[0]}")
            return False
        return True


class Silent(Logbook):
    """That of a process that writes nothing: it only remembers."""

    def __init__(self, total_steps: int, history: list[dict[str, Any]]) -> None:
        self.rows, self.total, self.ended, self.path, self.behind = list(history), total_steps, "", Path(os.devnull), False
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
