"""Rows -> samples (ids and mask) in one pass, and the account of what became of every row.

Nothing is dropped in silence: `Report.table()` lists each reason with its first rows. It knows the template as a function
from conversations to ids, and no files.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from swiftlite.chat.template import Template
from swiftlite.data.rows import BadRow, Row
from swiftlite.data.store import Sample
from swiftlite.errors import DataError, SwiftError, TemplateError

CHUNK = 128  # rows a tokenizer call; small enough for the processor caches
FIRST = 3  # rows named per reason
REASONS = 12  # reasons listed one by one


@dataclass
class Group:
    """Rows that share a fate."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, source: str, number: int, count: int = 1) -> None:
        self.count += count
        place = f"{Path(source).name}:{number}"
        if len(self.first) < FIRST and place not in self.first:  # sampling can repeat rows
            self.first.append(place)


@dataclass
class Report:
    """What became of the rows. `kept` counts rows; one row can give several `samples`."""

    kept: int = 0
    samples: int = 0
    tokens: int = 0
    targets: int = 0
    longest: int = 0
    truncated: Group = field(default_factory=Group)
    dropped: dict[str, Group] = field(default_factory=dict)
    parts: dict[str, Group] = field(default_factory=dict)  # rows that are kept but for some of their samples, by reason

    def drop(self, reason: str, source: str, number: int, count: int = 1) -> None:
        self.dropped.setdefault(reason, Group()).add(source, number, count)

    def add(self, outcome: Outcome, count: int) -> None:
        """A row that is used `count` times."""
        row, samples = outcome.row, outcome.samples
        if not count:
            return
        if not samples:
            self.drop(outcome.reason, row.source, row.number, count)
            return
        self.kept += count
        self.samples += len(samples) * count
        self.tokens += sum(len(sample.ids) for sample in samples) * count
        self.targets += sum(int(sample.mask.sum()) for sample in samples) * count
        self.longest = max(self.longest, *(len(sample.ids) for sample in samples))
        if outcome.cut:
            self.truncated.add(row.source, row.number, count)
        if outcome.reason:
            self.parts.setdefault(outcome.reason, Group()).add(row.source, row.number, count)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Report:
        """The reverse of dataclasses.asdict."""
        groups = {key: {reason: Group(**group) for reason, group in content[key].items()} for key in ("dropped", "parts")}
        return cls(**{**content, "truncated": Group(**content["truncated"]), **groups})

    @property
    def dropped_rows(self) -> int:
        return sum(group.count for group in self.dropped.values())

    def merge(self, other: Report) -> Report:
        """Both accounts in one."""
        total = Report(
            self.kept + other.kept,
            self.samples + other.samples,
            self.tokens + other.tokens,
            self.targets + other.targets,
            max(self.longest, other.longest),
        )
        for part in (self, other):
            total.truncated = _joined(total.truncated, part.truncated)
            for mine, groups in ((total.dropped, part.dropped), (total.parts, part.parts)):
                for reason, group in groups.items():
                    mine[reason] = _joined(mine.get(reason, Group()), group)
        return total

    def table(self) -> str:
        """The account as text, one line per fate."""
        total = self.kept + self.dropped_rows
        mean = self.tokens / self.samples if self.samples else 0
        share = self.targets / self.tokens if self.tokens else 0
        lines = [
            ("rows", total, ""),
            ("kept", self.kept, f"{self.tokens:,} tokens, {share:.0%} of them targets, mean {mean:.0f}, longest {self.longest}"),
        ]
        if self.samples != self.kept:
            lines.append(("samples", self.samples, "some rows gave several: the template rewrites history, or they were split"))
        if self.truncated.count:
            lines.append(("truncated", self.truncated.count, "cut or split; first: " + ", ".join(self.truncated.first)))
        for reason, group in self.parts.items():
            lines.append(("in part", group.count, f"kept without some of their samples: {reason}; first: {', '.join(group.first)}"))
        groups = sorted(self.dropped.items(), key=lambda item: -item[1].count)
        for reason, group in groups[:REASONS]:
            lines.append(("dropped", group.count, f"{reason}; first: {', '.join(group.first)}"))
        if groups[REASONS:]:
            rest = Group(sum(g.count for _, g in groups[REASONS:]), [place for _, g in groups[REASONS:] for place in g.first][:FIRST])
            lines.append(("dropped", rest.count, f"for {len(groups) - REASONS} other reasons; first: {', '.join(rest.first)}"))
        return "\n".join(f"{fate:<10}{count:>9,}  {note}".rstrip() for fate, count, note in lines)


def _joined(a: Group, b: Group) -> Group:
    return Group(a.count + b.count, [*a.first, *b.first][:FIRST])


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    iterator = iter(rows)
    while chunk := list(islice(iterator, CHUNK)):
        yield chunk


def _ahead(rows: Iterable[Row], template: Template, loss_scale: str) -> Iterator[tuple[list[Row], list[Any]]]:
    """Chunks with their encoding. The next two are under way meanwhile: the tokenizer works outside Python's lock."""
    with ThreadPoolExecutor(2) as pool:
        pending: deque[tuple[list[Row], Future[list[Any]]]] = deque()
        for chunk in _chunks(rows):
            pending.append((chunk, pool.submit(template.encode_training_batch, [row.conversation for row in chunk], loss_scale)))
            if len(pending) > 2:
                done, future = pending.popleft()
                yield done, future.result()
        for done, future in pending:
            yield done, future.result()


@dataclass(frozen=True)
class Outcome:
    """What became of one row: its samples, and the `reason` why there are none or why some were dropped; `cut`: what is kept was
    longer than allowed."""

    row: Row
    samples: list[Sample]
    reason: str = ""
    cut: bool = False


def outcomes(
    rows: Iterable[Row], template: Template, max_length: int | None, truncation_strategy: str, loss_scale: str, strict: bool
) -> Iterator[Outcome]:
    """Every row's fate, in order; at most CHUNK rows are in memory.

    Raises TemplateError when the template cannot give labels; with `strict`, DataError for the first row that is not kept.
    """
    for chunk, results in _ahead(rows, template, loss_scale):
        for row, encoded in zip(chunk, results, strict=True):
            if isinstance(encoded, TemplateError):
                raise TemplateError(encoded.what, f"{encoded.why} (met at {row.source}:{row.number})", encoded.fix)
            reason, kept, cut = "", [], False
            if isinstance(encoded, SwiftError):
                reason = encoded.what
            else:
                reason = "" if encoded else "nothing to learn"
                for one in encoded:
                    samples, why = fit(one.ids, one.mask, max_length, truncation_strategy, one.weights)
                    cut = cut or (bool(samples) and len(one.ids) > (max_length or len(one.ids)))
                    kept += samples
                    reason = why or reason
            if strict and (reason or cut):
                what = reason or f"longer than --max_length {max_length}"
                raise DataError(
                    f"{row.source}:{row.number}: {what}", "--strict fails on the first such row", "correct the row, or leave --strict out"
                )
            yield Outcome(row, kept, reason, cut)


def encode(
    rows: Iterable[Row],
    template: Template,
    max_length: int | None,
    truncation_strategy: str = "delete",
    loss_scale: str = "default",
    strict: bool = False,
    bad: Sequence[BadRow] = (),
) -> tuple[list[Sample], Report]:
    """All rows encoded, in order, in memory. `bad` are records that the reader refused; they join the account."""
    report, samples = Report(), []
    for refused in bad:
        report.drop(refused.reason, refused.source, refused.number)
    for outcome in outcomes(rows, template, max_length, truncation_strategy, loss_scale, strict):
        samples += outcome.samples
        report.add(outcome, 1)
    return samples, report


def fit(
    ids: list[int], mask: list[bool], max_length: int | None, strategy: str, weights: list[float] | None = None
) -> tuple[list[Sample], str]:
    """The samples within `max_length` that a row gives, or none and the reason.

    `split` cuts it into pieces; each begins with the last token of the one before, so that every target keeps a token that
    predicts it.
    """
    pieces, cut = [(slice(None), mask)], max_length is not None and len(ids) > max_length
    if max_length is not None and cut:
        if strategy == "delete":
            return [], f"longer than --max_length {max_length}"
        if strategy == "split" and max_length > 1:
            starts = range(0, len(ids) - 1, max_length - 1)
            pieces = [(slice(i, i + max_length), ([False] if i else mask[:1]) + mask[i + 1 : i + max_length]) for i in starts]
        else:
            part = slice(len(ids) - max_length, None) if strategy == "left" else slice(None, max_length)
            pieces = [(part, mask[part])]
    samples = [
        Sample(
            np.array(ids[part], dtype=np.int32),
            np.array(learnt, dtype=np.bool_),
            None if weights is None else np.array(weights[part], dtype=np.float32),
        )
        for part, learnt in pieces
    ]
    samples = [sample for sample in samples if sample.mask[1:].any()]  # nothing predicts the first token
    return samples, "" if samples else "no target left after truncation" if cut else "nothing to learn"
