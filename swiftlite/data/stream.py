"""Rows as a stream (`--streaming true`): read, encoded and shuffled block by block, so that memory holds one block.

A block is the next `--shuffle_buffer_size` rows; what it holds depends on the flags and its place alone, so a run goes on
anywhere by passing over the rows before, which are read but not encoded. When the datasets end they begin anew. `#n` and
--train_dataset_sample take the first rows. Does not know steps or passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from swiftlite.chat.conversation import Conversation
from swiftlite.chat.template import Template
from swiftlite.data import mixing
from swiftlite.data.encoding import Report, outcomes
from swiftlite.data.loading import _VAL, _limited, _reader, check_evaluation
from swiftlite.data.rows import BadRow, Row, fetch, scan
from swiftlite.data.sources import parse_spec
from swiftlite.data.store import Sample
from swiftlite.errors import DataError, UsageError
from swiftlite.options.parse import Options


@dataclass(frozen=True)
class Place:
    """Where a block begins: how often the datasets were read to their end, rows of this reading before it, blocks before it."""

    epoch: int = 0
    row: int = 0
    block: int = 0


def check(options: Options) -> None:
    """UsageError for flags that need all rows at hand. Sets the share of held-out rows to the 0 that it is."""
    if options.max_steps <= 0:
        raise UsageError("--streaming needs --max_steps", "a stream's length is not known before its end", "add e.g. --max_steps 1000")
    if options.given("split_dataset_ratio") and options.split_dataset_ratio > 0 and not options.val_dataset:
        raise UsageError("--streaming holds no rows out", "it would have to read all of them first", "pass --val_dataset FILE")
    options.set("split_dataset_ratio", 0.0, "streaming")  # what happens is what the settings say
    if options.self_cognition_sample > 0:
        raise UsageError(
            "--streaming and --self_cognition_sample do not go together", fix="name it as a dataset: --dataset ... self-cognition"
        )
    if options.shuffle_buffer_size < 1:
        raise UsageError(f"--shuffle_buffer_size must be at least 1, got {options.shuffle_buffer_size}")
    if options.interleave_prob:
        mixing.check(options.interleave_prob, len(options.dataset))


class Stream:
    """The training rows without an end. `report` accounts for what was encoded so far; a row read twice counts twice."""

    def __init__(self, options: Options, template: Template, max_length: int | None) -> None:
        self.options, self.template, self.max_length = options, template, max_length
        self.reader = _reader(options)
        self.report = Report()
        self.bad: list[BadRow] = []

    def blocks(self, place: Place = Place()) -> Iterator[tuple[Place, list[Sample]]]:
        """Blocks from `place` on; one without a sample is passed over. DataError when a whole reading gives none."""
        options = self.options
        while True:
            rows, found = self._rows(place.epoch), place.row > 0
            for _ in islice(rows, place.row):
                pass
            self.bad.clear()  # they were counted when those rows were encoded
            while chunk := list(islice(rows, options.shuffle_buffer_size)):
                samples = self._encode(chunk)
                if samples:
                    found = True
                    yield place, samples
                place = Place(place.epoch, place.row + len(chunk), place.block + 1)
            self._account()
            if not found:
                raise DataError("no training row is left", "\n" + self.report.table(), "correct the rows, or raise --max_length")
            place = Place(place.epoch + 1, 0, place.block)

    def _encode(self, rows: list[Row]) -> list[Sample]:
        options, samples = self.options, []
        self._account()
        for outcome in outcomes(rows, self.template, self.max_length, options.truncation_strategy, options.loss_scale, options.strict):
            samples += outcome.samples
            self.report.add(outcome, 1)
        return samples

    def _account(self) -> None:
        for refused in self.bad:
            self.report.drop(refused.reason, refused.source, refused.number)
        self.bad.clear()

    def _rows(self, epoch: int) -> Iterator[Row]:
        """One reading of all datasets, one after the other or mixed."""
        limit = self.options.train_dataset_sample
        rows = self._mixed(epoch) if self.options.interleave_prob else (row for spec in self.options.dataset for row in self._dataset(spec))
        return islice(rows, limit) if limit >= 0 else rows

    def _dataset(self, spec: str) -> Iterator[Row]:
        return islice(self.reader.rows(spec, self.bad), parse_spec(spec, self.reader.known).count)

    def _mixed(self, epoch: int) -> Iterator[Row]:
        """As `mixing.interleave`, without knowing the lengths."""
        options = self.options
        shares = mixing.check(options.interleave_prob, len(options.dataset))
        rng = np.random.default_rng([options.data_seed, epoch])
        open_ = [self._dataset(spec) for spec in options.dataset]
        left = set(range(len(open_)))
        while True:
            for which in rng.choice(len(open_), size=1024, p=shares).tolist():
                row = next(open_[which], None)
                if row is None:
                    left.discard(which)
                    if options.stopping_strategy == mixing.FIRST or not left:
                        return
                    open_[which] = self._dataset(options.dataset[which])
                    row = next(open_[which], None)
                    if row is None:
                        return
                yield row


def evaluation(options: Options, template: Template, max_length: int | None) -> tuple[list[Sample], list[Conversation], Report]:
    """The rows of --val_dataset, encoded in memory."""
    parts = scan(options.val_dataset, _reader(options), options.data_seed + 1)
    keys = [(position, number) for position, part in enumerate(parts) for number in part.order]
    keys = _limited(keys, options.val_dataset_sample, [options.data_seed, _VAL])
    found = dict(fetch(parts, set(keys)))
    report, samples, conversations = Report(), [], []
    for part in parts:
        for refused in part.bad:
            report.drop(refused.reason, refused.source, refused.number)
    chosen = [found[key] for key in keys]
    for outcome in outcomes(chosen, template, max_length, options.truncation_strategy, options.loss_scale, options.strict):
        samples += outcome.samples
        conversations.append(outcome.row.conversation)
        report.add(outcome, 1)
    check_evaluation(options, len(samples), report)
    return samples, conversations, report
