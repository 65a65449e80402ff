"""A dataset argument -> rows, with every bad record accounted for; sampling; {{NAME}} and {{AUTHOR}}.

It knows records and conversations, not tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from swiftlite.chat.conversation import Conversation
from swiftlite.data.catalog import CATALOG, Entry
from swiftlite.data.formats import to_conversation
from swiftlite.data.sources import Broken, files, parse_spec, records
from swiftlite.errors import DataError, UsageError

_PLACEHOLDER = re.compile(r"\{\{(NAME|AUTHOR)\}\}")
_CJK = re.compile(r"[\u4e00-\u9fff]")


@dataclass(frozen=True)
class Row:
    """One conversation and where it stands: file and line (or element) number from 1."""

    conversation: Conversation
    source: str
    number: int


@dataclass(frozen=True)
class BadRow:
    """A record that gave no conversation."""

    reason: str
    source: str
    number: int


@dataclass
class Rows:
    """What was read."""

    rows: list[Row] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)


@dataclass(frozen=True)
class Identity:
    """Who the model shall say it is: Chinese, then English; None where the user did not say."""

    names: tuple[str, ...] = ()
    authors: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for flag, values in (("--model_name", self.names), ("--model_author", self.authors)):
            if len(values) > 2:
                raise UsageError(
                    f"{flag} takes one or two values, got {len(values)}", fix=f"{flag} 小黄 'Xiao Huang': Chinese, then English"
                )

    def fill(self, record: Any) -> Any:
        """`record` with {{NAME}} and {{AUTHOR}} replaced in every string. Raises DataError when one has no value."""
        text = record if isinstance(record, str) else json.dumps(record, ensure_ascii=False, default=str)
        if not _PLACEHOLDER.search(text):
            return record
        tag = record.get("tag") if isinstance(record, dict) else None
        chinese = str(tag).lower().startswith("zh") if tag else _CJK.search(text) is not None

        def value(found: re.Match[str]) -> str:
            flag, values = ("--model_name", self.names) if found[1] == "NAME" else ("--model_author", self.authors)
            if not values:
                raise DataError(
                    f"the dataset holds the placeholder {found[0]}, which has no value",
                    f"{flag} was not given",
                    f"add e.g. {flag} {'小黄' if found[1] == 'NAME' else '魔搭'} '{'Xiao Huang' if found[1] == 'NAME' else 'ModelScope'}'",
                )
            return values[0] if chinese else values[-1]

        def walk(item: Any) -> Any:
            if isinstance(item, str):
                return _PLACEHOLDER.sub(value, item)
            if isinstance(item, dict):
                return {key: walk(inner) for key, inner in item.items()}
            return [walk(inner) for inner in item] if isinstance(item, list) else item

        return walk(record)


def read(
    spec: str,
    columns: dict[str, str] | None = None,
    *,
    identity: Identity = Identity(),
    use_hf: bool = False,
    bad: list[BadRow] | None = None,
    labelled: bool = True,
    known: Mapping[str, Entry] = CATALOG,
    seen: set[str] | None = None,
) -> Iterator[Row]:
    """Rows of one dataset argument, in file order (its `#n` is `sample`'s matter).

    Bad records are appended to `bad`; without `bad`, the first one raises DataError with file and line. The names of the records'
    columns go into `seen`.
    """
    parsed = parse_spec(spec, known)
    if parsed.columns:
        columns = {**parsed.columns, **(columns or {})}
    for record, source, number in records(parsed, use_hf):
        if seen is not None and isinstance(record, dict):
            seen.update(record)
        try:
            if isinstance(record, Broken):
                raise DataError(record.why, record.detail)
            conversation = to_conversation(record if not _braces(record) else identity.fill(record), columns, labelled)
        except DataError as error:
            if "placeholder" in error.what:  # not the row's fault: a flag is missing
                raise DataError(f"{source}:{number}: {error.what}", error.why, error.fix) from None
            if bad is None:
                raise DataError(
                    f"{source}:{number}: {error.what}", error.why, error.fix or "correct the row, or leave --strict out"
                ) from None
            bad.append(BadRow(error.what, source, number))
            continue
        yield Row(conversation, source, number)


def _braces(record: Any) -> bool:
    """Cheap look for "{{", so that ordinary rows skip the walk."""
    if isinstance(record, str):
        return "{{" in record
    if isinstance(record, dict):
        return any(map(_braces, record.values()))
    return isinstance(record, list) and any(map(_braces, record))


def sample(count: int | None, length: int, rng: np.random.Generator) -> list[int]:
    """Indices of `count` of `length` rows (None: all, in order); more than there are: whole repeats, then a random rest."""
    if count is None:
        return list(range(length))
    if length == 0:
        return []
    whole, rest = divmod(count, length)
    picked = [index for _ in range(whole) for index in range(length)] + rng.permutation(length)[:rest].tolist()
    return picked


@dataclass(frozen=True)
class Reader:
    """How datasets are read; the same for several of them."""

    columns: dict[str, str] | None = None
    identity: Identity = Identity()
    use_hf: bool = False
    strict: bool = False
    labelled: bool = True
    known: Mapping[str, Entry] = field(default_factory=lambda: CATALOG)
    seen: set[str] = field(default_factory=set)  # names of columns, where `columns` are to be found among them

    def rows(self, spec: str, bad: list[BadRow] | None = None) -> Iterator[Row]:
        """`read` with these settings; `bad` None: refused records are passed over, as the first reading counted them."""
        refused = None if self.strict else [] if bad is None else bad
        return read(
            spec, self.columns, identity=self.identity, use_hf=self.use_hf, bad=refused, labelled=self.labelled, known=self.known,
            seen=self.seen if self.columns else None,
        )  # fmt: skip

    def files(self, spec: str) -> list[Path]:
        return files(parse_spec(spec, self.known), self.use_hf)


@dataclass(frozen=True)
class Part:
    """One dataset argument after a first reading: which of its rows are used (by number from 0), and what was refused.

    `repeat_to`: more rows than there are were asked for; the caller repeats them after it has held rows out.
    """

    spec: str
    reader: Reader
    order: list[int]
    bad: list[BadRow] = field(default_factory=list)
    repeat_to: int | None = None


def scan(specs: Sequence[str], reader: Reader, seed: int) -> list[Part]:
    """Read the datasets once, keeping nothing but counts, and cut each to its `#n`. The draw depends on `seed` and the
    dataset's position alone."""
    parts = []
    for position, spec in enumerate(specs):
        bad: list[BadRow] = []
        length = sum(1 for _ in reader.rows(spec, bad))
        count = parse_spec(spec, reader.known).count
        if count is not None and count <= length:
            parts.append(Part(spec, reader, sample(count, length, np.random.default_rng([seed, position])), bad))
        else:
            parts.append(Part(spec, reader, list(range(length)), bad, count))
    return parts


def fetch(parts: Sequence[Part], wanted: Collection[tuple[int, int]]) -> Iterator[tuple[tuple[int, int], Row]]:
    """((part, row number), row) of the `wanted`, each once, in the files' order."""
    for position, part in enumerate(parts):
        numbers = {number for which, number in wanted if which == position}
        if numbers:
            last = max(numbers)
            for number, row in enumerate(part.reader.rows(part.spec)):
                if number in numbers:
                    yield (position, number), row
                if number == last:
                    break
