"""Rows -> samples (ids and mask) in one pass, and the account of what became of every row.

Nothing is dropped in silence: `Report.table()` lists each reason with its first rows. It knows the template as a function
from conversations to ids, and no files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from swiftlite.chat.template import Template
from swiftlite.data.rows import BadRow, Row
from swiftlite.errors import DataError, SwiftError, TemplateError

CHUNK = 1024  # rows a tokenizer call
FIRST = 3  # rows named per reason
REASONS = 12  # reasons listed one by one


@dataclass(frozen=True, slots=True)
class Sample:
    """One training sequence: `ids` int32 [T], `mask` bool [T] (token is a target)."""

    ids: NDArray[np.int32]
    mask: NDArray[np.bool_]


@dataclass
class Group:
    """Rows that share a fate."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, source: str, number: int) -> None:
        self.count += 1
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

    def drop(self, reason: str, source: str, number: int) -> None:
        self.dropped.setdefault(reason, Group()).add(source, number)

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
            for reason, group in part.dropped.items():
                total.dropped[reason] = _joined(total.dropped.get(reason, Group()), group)
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
            lines.append(("samples", self.samples, "some rows gave several: the template rewrites history"))
        if self.truncated.count:
            lines.append(("truncated", self.truncated.count, "first: " + ", ".join(self.truncated.first)))
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


def encode(
    rows: Iterable[Row],
    template: Template,
    max_length: int | None,
    truncation_strategy: str = "delete",
    loss_scale: str = "default",
    strict: bool = False,
    bad: Sequence[BadRow] = (),
) -> tuple[list[Sample], Report]:
    """All rows encoded, in order. `bad` are records that the reader refused; they join the account.

    Raises TemplateError when the template cannot give labels; with `strict`, DataError for the first row that is not kept.
    """
    report, samples = Report(), []
    for refused in bad:
        report.drop(refused.reason, refused.source, refused.number)
    for chunk in _chunks(rows):
        for row, encoded in zip(chunk, template.encode_training_batch([row.conversation for row in chunk], loss_scale), strict=True):
            if isinstance(encoded, TemplateError):
                raise TemplateError(encoded.what, f"{encoded.why} (met at {row.source}:{row.number})", encoded.fix)
            reason, kept, cut = "", [], False
            if isinstance(encoded, SwiftError):
                reason = encoded.what
            else:
                reason = "" if encoded else "nothing to learn"
                for one in encoded:
                    sample, why = _fit(one.ids, one.mask, max_length, truncation_strategy)
                    cut = cut or len(one.ids) > (max_length or len(one.ids))
                    if sample is None:
                        reason = why
                    else:
                        kept.append(sample)
            if kept:
                samples += kept
                report.kept += 1
                report.samples += len(kept)
                report.tokens += sum(len(sample.ids) for sample in kept)
                report.targets += sum(int(sample.mask.sum()) for sample in kept)
                report.longest = max(report.longest, *(len(sample.ids) for sample in kept))
                if cut:
                    report.truncated.add(row.source, row.number)
            else:
                report.drop(reason, row.source, row.number)
            if strict and (not kept or cut):
                what = reason if not kept else f"longer than --max_length {max_length}"
                raise DataError(
                    f"{row.source}:{row.number}: {what}", "--strict fails on the first such row", "correct the row, or leave --strict out"
                )
    return samples, report


def _fit(ids: list[int], mask: list[bool], max_length: int | None, strategy: str) -> tuple[Sample | None, str]:
    """The sample within `max_length`, or None and the reason."""
    cut = False
    if max_length is not None and len(ids) > max_length:
        cut = True
        if strategy == "delete":
            return None, f"longer than --max_length {max_length}"
        part = slice(len(ids) - max_length, None) if strategy == "left" else slice(None, max_length)
        ids, mask = ids[part], mask[part]
    sample = Sample(np.array(ids, dtype=np.int32), np.array(mask, dtype=np.bool_))
    if not sample.mask[1:].any():  # nothing predicts the first token
        return None, "no target left after truncation" if cut else "nothing to learn"
    return sample, ""
