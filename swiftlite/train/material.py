"""What a run trains on: encoded rows, all at hand or as a stream, with the plan of their steps.

The first place that knows both data and plans; it knows no model.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from swiftlite.chat.template import Template
from swiftlite.errors import DataError, UsageError
from swiftlite.options.parse import Options
from swiftlite.train.plan import PASS_TOKENS, ROWS_A_STEP, Plan, rows_a_pass
from swiftlite.train.streaming import StreamPlan


@dataclass(frozen=True)
class Material:
    """`samples` are what the plan's numbers mean; `table` the account of the rows so far; `fingerprint` tells other data apart."""

    samples: Sequence[Any]
    evaluation: Sequence[Any]
    conversations: Sequence[Any]  # of the evaluation rows
    plan: Plan | StreamPlan
    table: Callable[[], str]
    fingerprint: str


def prepare(options: Options, template: Template, max_length: int, ranks: int) -> Material:
    """Read and encode. DataError when nothing is left to train on; UsageError when a flag needs evaluation rows and none are there."""
    found = _stream(options, template, max_length, ranks) if options.streaming else _whole(options, template, max_length, ranks)
    if options.early_stop_interval is not None and not found.evaluation:
        raise UsageError(
            f"--early_stop_interval {options.early_stop_interval} needs evaluation rows", "there are none, so it would never stop early",
            "pass --val_dataset FILE" + ("" if options.streaming else ", or a larger --split_dataset_ratio"),
        )  # fmt: skip
    return found


def _whole(options: Options, template: Template, max_length: int, ranks: int) -> Material:
    from swiftlite.data.loading import load_training

    began = time.perf_counter()
    samples, evaluation, conversations, report = load_training(options, template, max_length)
    table = report.table()
    print(f"{table}\nrows encoded in {time.perf_counter() - began:.1f} s, at most {max_length} tokens a row")
    if not samples:
        raise DataError("no row is left to train on", "every row was dropped; the table says why", "check --dataset and --max_length")
    _batch_size(options, samples, ranks)
    plan = Plan.make(
        [len(s.ids) for s in samples], options.per_device_train_batch_size, options.gradient_accumulation_steps,
        options.packing, options.dataset_shuffle, options.data_seed, ranks,
    )  # fmt: skip
    return Material(samples, evaluation, conversations, plan, lambda: table, _fingerprint(samples))


def _stream(options: Options, template: Template, max_length: int, ranks: int) -> Material:
    from swiftlite.data.stream import Stream, evaluation

    held, conversations, account = evaluation(options, template, max_length)
    if held:
        print(f"evaluation rows:\n{account.table()}")
    stream = Stream(options, template, max_length)
    blocks = stream.blocks()
    first = next(blocks)
    print(f"the stream's first rows:\n{stream.report.table()}\nat most {max_length} tokens a row")
    _batch_size(options, first[1], ranks)
    plan = StreamPlan(
        stream, chain([first], blocks), options.per_device_train_batch_size, options.gradient_accumulation_steps,
        options.packing, options.dataset_shuffle, options.data_seed, ranks, options.max_steps,
    )  # fmt: skip
    return Material(plan.samples, held, conversations, plan, lambda: stream.report.table(), _fingerprint(first[1]))


def _batch_size(options: Options, samples: Sequence[Any], ranks: int) -> None:
    """Where both sizes are left to us: as few forward passes a step as memory and the model's speed gain from."""
    if options.given("per_device_train_batch_size") or options.given("gradient_accumulation_steps"):
        return
    rows = rows_a_pass(sum(len(s.ids) for s in samples) / len(samples), ranks)
    options.set("per_device_train_batch_size", rows, "chosen")
    options.set("gradient_accumulation_steps", max(1, ROWS_A_STEP // rows // ranks), "chosen")
    if not options.given("per_device_eval_batch_size"):
        options.set("per_device_eval_batch_size", rows, "chosen")
    print(f"batch size: {rows} rows a forward pass (chosen: {ROWS_A_STEP} rows a step, at most about {PASS_TOKENS} tokens a pass)")


def _fingerprint(samples: Sequence[Any]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(sample.ids.tobytes())
        digest.update(sample.mask.tobytes())
        digest.update(b"" if sample.weights is None else sample.weights.tobytes())
    return digest.hexdigest()
