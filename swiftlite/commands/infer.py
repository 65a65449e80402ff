"""`swift infer`: chat in the terminal, or answer a dataset into a jsonl file.

A batch run keeps the engine full and writes rows in the dataset's order, each line whole or not at all; a file that holds the
first rows already is gone on with.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from swiftlite.commands.serving import load_service, make_plan
from swiftlite.errors import DataError, SwiftError, UsageError
from swiftlite.options.parse import Options

if TYPE_CHECKING:
    from swiftlite.chat.conversation import Conversation
    from swiftlite.engine.engine import Stream
    from swiftlite.server.service import Service


def main(options: Options) -> int:
    """A dataset flag makes it a batch run, else a chat."""
    plan = make_plan(options)
    answering = next(iter(plan.adapters), plan.name)  # an adapter that was asked for is who answers
    if not (options.dataset or options.val_dataset):
        if options.load_dataset_config:
            raise UsageError(
                "--load_dataset_config found no dataset",
                "the checkpoint has no settings, or was trained without --dataset",
                "pass --val_dataset",
            )
        from swiftlite.commands.console import Console

        service = load_service(options, plan)
        try:
            Console(service, answering, options.stream).run()
        finally:
            service.close()
        return 0
    questions = read_questions(options)
    path = _result_path(options)
    done = _finished(path, questions)
    if done == len(questions):
        print(f"{path} holds all {done} rows already")
    else:
        service = load_service(options, plan)
        try:
            _run(service, answering, questions, path, done, options.max_batch_size)
        finally:
            service.close()
    print(score(path))
    print(f"results: {path}")
    return 0


@dataclass(frozen=True)
class Question:
    """A dataset row without its last answer. A plain text row is continued, and has no label."""

    messages: list[dict[str, Any]]
    label: str | None
    tools: list | None = None
    text: str | None = None

    @classmethod
    def of(cls, conversation: Conversation) -> Question:
        if conversation.text is not None:
            return cls([], None, None, conversation.text)
        messages = [{k: v for k, v in message.items() if k != "loss"} for message in conversation.messages]
        label = messages.pop()["content"] if messages and messages[-1]["role"] == "assistant" else None
        return cls(messages, label, conversation.tools)

    def row(self, response: str, finish_reason: str | None) -> dict[str, Any]:
        """One line of the result: SWIFT's query, response, label and history, and the messages that were sent."""
        if self.text is not None:
            return {"query": self.text, "response": response, "label": None, "history": [], "finish_reason": finish_reason}
        turns = [m["content"] for m in self.messages if m["role"] in ("user", "assistant", "tool")]
        history = [turns[i : i + 2] for i in range(0, len(turns) - 1, 2)]
        query = turns[-1] if turns else ""
        return {
            "query": query, "response": response, "label": self.label, "history": history, "messages": self.messages,
            "finish_reason": finish_reason,
        }  # fmt: skip


def read_questions(options: Options) -> list[Question]:
    """The rows to answer: with --load_dataset_config the training run's held-out rows, else all of --val_dataset or --dataset."""
    from swiftlite.data.loading import load

    if not options.load_dataset_config and not options.val_dataset:
        options.set("val_dataset", options.dataset, options.origins["dataset"])
        options.set("dataset", (), "default")
    rows = load(options, for_eval=True, labelled=options.load_dataset_config)
    if rows.bad:
        first = rows.bad[0]
        print(f"note: {len(rows.bad)} rows are left out, the first is {first.source}:{first.number}: {first.reason}")
    if not rows.rows and rows.bad:
        raise DataError("there is no row to answer", "none could be read", "correct the rows; --columns renames their columns")
    if not rows.rows:
        raise DataError("there is no row to answer", "the run held none out (--split_dataset_ratio)", "pass --val_dataset FILE")
    return [Question.of(row.conversation) for row in rows.rows]


def _result_path(options: Options) -> Path:
    if options.result_path:
        path = Path(options.result_path).expanduser()
    else:
        home = Path(options.ckpt_dir) if options.ckpt_dir else Path(".")
        path = home / "infer_result" / (time.strftime("%Y%m%d-%H%M%S") + ".jsonl")
    if path.is_dir():
        raise UsageError(f"--result_path {path} is a directory", fix="name a .jsonl file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(path, error, "pass another --result_path") from None
    return path


def _finished(path: Path, questions: list[Question]) -> int:
    """How many rows a result file holds; a line cut off by a crash is removed. DataError when it answers another dataset."""
    if not path.is_file():
        return 0
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    lines = content[:whole].splitlines()
    for number, line in enumerate(lines):
        try:
            row = json.loads(line)
            asked = (row["query"], row["history"], row["label"])
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{path}:{number + 1} is no result of `swift infer`", fix="choose another --result_path") from None
        expected = questions[number].row("", None) if number < len(questions) else None
        if expected is None or asked != (expected["query"], expected["history"], expected["label"]):
            raise DataError(f"{path}:{number + 1} answers another question than the dataset's", fix="choose another --result_path")
    if whole < len(content):
        os.truncate(path, whole)
    if lines:
        print(f"{path} holds {len(lines)} of {len(questions)} rows; going on after them")
    return len(lines)


def _run(service: Service, model: str, questions: list[Question], path: Path, done: int, width: int) -> None:
    """Answer the rows after the first `done`, at most `width` at once, and append each in its turn."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    tokens, started, failed = 0, time.monotonic(), 0
    try:
        with _opened(path) as file, Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(model, total=len(questions), completed=done)
            for question, stream in _in_flight(service, model, questions[done:], max(1, width)):
                if isinstance(stream, str):
                    failed += 1
                    row = {**question.row("", "error"), "error": stream}
                else:
                    output = stream.result()
                    answer = output.outputs[0]
                    tokens += len(answer.token_ids)
                    row = question.row(answer.text, answer.finish_reason)
                    if output.error:
                        failed, row["error"] = failed + 1, output.error
                _write(file, row)
                bar.advance(task)
    except KeyboardInterrupt:
        print(f"\nstopped; go on with: --result_path {path}", file=sys.stderr)
        raise
    seconds = time.monotonic() - started
    print(
        f"{len(questions) - done} rows in {seconds:.1f} s, {tokens / max(seconds, 1e-9):.0f} tokens/s"
        + (f", {failed} failed" if failed else "")
    )


def _in_flight(service: Service, model: str, questions: list[Question], width: int) -> Iterator[tuple[Question, Stream | str]]:
    """Every question in order with its stream, finished or about to; `width` unfinished ones run. A refused one gives the reason."""
    from swiftlite.server.ask import ask
    from swiftlite.server.errors import APIError

    waiting: deque[tuple[Question, Stream | str]] = deque()
    left = iter(questions)
    more = True
    while more or waiting:
        while more and sum(not isinstance(s, str) and not s.finished for _, s in waiting) < width:
            question = next(left, None)
            if question is None:
                more = False
                break
            fields = {"tools": question.tools} if question.tools else {}
            try:
                waiting.append((question, ask(service, model, question.messages if question.text is None else question.text, **fields)))
            except (APIError, SwiftError) as error:
                waiting.append((question, str(error)))
        if waiting:
            head = waiting[0][1]
            if isinstance(head, str) or head.finished or not more:
                yield waiting.popleft()
            else:
                time.sleep(0.005)  # until the oldest, or any other, ends: a freed place is filled at once


def _opened(path: Path) -> IO[str]:
    try:
        return open(path, "a", encoding="utf-8")
    except OSError as error:
        raise _cannot_write(path, error, "pass another --result_path") from None


def _write(file: IO[str], row: dict[str, Any]) -> None:
    try:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
    except OSError as error:
        raise _cannot_write(file.name, error, "free space, then run the same command with --result_path") from None


def _cannot_write(path: Path | str, error: OSError, fix: str) -> SwiftError:
    return SwiftError(f"cannot write {path}", str(error.strerror), fix)


def score(path: Path) -> str:
    """Exact matches among the rows that have a label."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    labelled = [row for row in rows if row["label"] is not None]
    if not labelled:
        return f"{len(rows)} rows, none with a label"
    exact = sum(row["response"].strip() == row["label"].strip() for row in labelled)
    return f"exact match: {exact} of {len(labelled)} ({exact / len(labelled):.1%})"
