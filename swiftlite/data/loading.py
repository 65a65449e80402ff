"""The data flags -> rows to train and to evaluate on: sampling, split, self-cognition, shuffle, each seeded by --data_seed.

The evaluation rows depend on the datasets, the split ratio and the seed only, so `swift infer --load_dataset_config true`
finds the same ones again. It knows flags, not training.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from swiftlite.chat.conversation import Conversation
from swiftlite.chat.template import Template
from swiftlite.data import mixing
from swiftlite.data.catalog import CATALOG, read_info
from swiftlite.data.encoding import Report, Sample, encode
from swiftlite.data.rows import Identity, Row, Rows, read, read_all, sample
from swiftlite.errors import DataError, TemplateError, UsageError
from swiftlite.options.parse import Options

_SPLIT, _SAMPLE, _SELF, _SHUFFLE, _VAL, _REPEAT, _MIX = range(100, 107)  # streams of the seed, apart from those of the datasets' positions


def _columns(options: Options) -> dict[str, str] | None:
    if not options.columns:
        return None
    try:
        columns: Any = json.loads(options.columns)
    except ValueError as error:
        raise UsageError(
            f"--columns is not valid JSON: {error}", fix='e.g. --columns \'{"text1": "query", "text2": "response"}\''
        ) from None
    if not isinstance(columns, dict) or not all(isinstance(value, str) for value in columns.values()):
        raise UsageError("--columns must map column names to column names", fix='e.g. \'{"text1": "query"}\'')
    return columns


def _read(options: Options, specs: tuple[str, ...], labelled: bool, stream: int = 0) -> list[Rows]:
    identity = Identity(options.model_name, options.model_author)
    known = {**CATALOG, **read_info(options.dataset_info)} if options.dataset_info else CATALOG
    return read_all(specs, _columns(options), identity, options.use_hf, options.strict, options.data_seed + stream, labelled, known)


def _split(options: Options, labelled: bool = True) -> tuple[Rows, Rows]:
    """(training rows, evaluation rows), before self-cognition and shuffling."""
    train, held = Rows(), Rows()
    ratio = options.split_dataset_ratio
    if not 0 <= ratio < 1:
        raise UsageError(f"--split_dataset_ratio must lie in [0, 1), got {ratio}")
    if options.data_seed < 0:
        raise UsageError(f"--data_seed must not be negative, got {options.data_seed}")
    if options.interleave_prob:
        mixing.check(options.interleave_prob, len(options.dataset))
    parts = []
    for position, part in enumerate(_read(options, options.dataset, labelled)):
        train.bad += part.bad
        count = 0
        if ratio > 0 and not options.val_dataset and len(part.rows) > 1:
            count = min(max(int(len(part.rows) * ratio), 1), len(part.rows) - 1)
        chosen = set(np.random.default_rng([options.data_seed, _SPLIT, position]).permutation(len(part.rows))[:count].tolist())
        kept = [row for index, row in enumerate(part.rows) if index not in chosen]
        if part.repeat_to is not None:  # repeated after the split, so that no evaluation row is trained on
            wanted = part.repeat_to - count
            kept = [kept[i] for i in sample(wanted, len(kept), np.random.default_rng([options.data_seed, _REPEAT, position]))]
        parts.append(kept)
        held.rows += [row for index, row in enumerate(part.rows) if index in chosen]
    train.rows = _mixed(options, parts) if options.interleave_prob else [row for kept in parts for row in kept]
    for part in _read(options, options.val_dataset, labelled, stream=1):
        held.rows += part.rows
        held.bad += part.bad
    held.rows = _limited(held.rows, options.val_dataset_sample, [options.data_seed, _VAL])
    return train, held


def _mixed(options: Options, parts: list[list[Row]]) -> list[Row]:
    """The datasets' training rows by --interleave_prob; says what came of it."""
    if options.dataset_shuffle:  # so that a dataset of which only a part is used gives rows from everywhere
        rngs = [np.random.default_rng([options.data_seed, _MIX, position]) for position in range(len(parts))]
        parts = [[part[i] for i in rng.permutation(len(part)).tolist()] for rng, part in zip(rngs, parts, strict=True)]
    order = mixing.interleave([len(part) for part in parts], options.interleave_prob, options.stopping_strategy, [options.data_seed, _MIX])
    used = [sum(1 for which, _ in order if which == position) for position in range(len(parts))]
    shares = ", ".join(f"{name} {count:,} of {len(part):,}" for name, count, part in zip(options.dataset, used, parts, strict=True))
    print(f"datasets mixed by --interleave_prob ({options.stopping_strategy}): {shares} rows")
    return [parts[which][row] for which, row in order]


def _limited(rows: list[Row], count: int, seed: list[int]) -> list[Row]:
    """A random choice of `count` rows (negative, or as many as there are: all of them), in their order."""
    if count < 0 or count >= len(rows):
        return rows
    return [rows[i] for i in sorted(np.random.default_rng(seed).permutation(len(rows))[:count].tolist())]


def _self_cognition(options: Options) -> list[Row]:
    count = options.self_cognition_sample
    if count <= 0:
        return []
    for flag, given in (("--model_name", options.model_name), ("--model_author", options.model_author)):
        if not given:
            raise UsageError(
                f"--self_cognition_sample needs {flag}",
                "its rows teach the model its name and who made it",
                "add --model_name 小黄 'Xiao Huang' --model_author 魔搭 ModelScope",
            )
    rows = list(read("self-cognition", identity=Identity(options.model_name, options.model_author)))
    return [rows[i] for i in sample(count, len(rows), np.random.default_rng([options.data_seed, _SELF]))]


def load(options: Options, template: Template | None = None, *, for_eval: bool = False, labelled: bool = True) -> Rows:
    """Rows by the data flags, not encoded: to train on (sampled, with self-cognition, shuffled), or `for_eval` the held-out ones.

    `labelled=False` also takes rows without an answer; the held-out rows of a training run are found with True only.
    Raises UsageError without a dataset, DataError or HubError for one that cannot be read.
    """
    if not options.dataset and not options.val_dataset and options.self_cognition_sample <= 0:
        raise UsageError("no dataset given", fix="--dataset FILE, a hub id, or --self_cognition_sample N")
    train, held = _split(options, labelled)
    rows = held if for_eval else _training_rows(options, train)
    if template is not None and not template.has_chat and any(row.conversation.messages for row in rows.rows):
        raise TemplateError(
            "this model has no chat template, and the dataset holds conversations", "it is a base model", "choose one with --template"
        )
    return rows


def _training_rows(options: Options, train: Rows) -> Rows:
    rows = _limited(train.rows, options.train_dataset_sample, [options.data_seed, _SAMPLE]) + _self_cognition(options)
    if options.dataset_shuffle:
        rows = [rows[i] for i in np.random.default_rng([options.data_seed, _SHUFFLE]).permutation(len(rows)).tolist()]
    return Rows(rows, train.bad)


def load_training(
    options: Options, template: Template, max_length: int | None
) -> tuple[list[Sample], list[Sample], list[Conversation], Report]:
    """(training samples, evaluation samples, evaluation conversations, account of both). Deterministic in the flags.

    Raises DataError when no training sample is left.
    """
    if not options.dataset and options.self_cognition_sample <= 0:
        raise UsageError("no dataset to train on", fix="--dataset FILE, a hub id, or --self_cognition_sample N")
    train, held = _split(options)
    train = _training_rows(options, train)
    settings = (template, max_length, options.truncation_strategy, options.loss_scale, options.strict)
    samples, report = encode(train.rows, *settings, bad=train.bad)
    if not samples:
        raise DataError("no training row is left", "\n" + report.table(), "correct the rows, or raise --max_length")
    held_samples, held_report = encode(held.rows, *settings, bad=held.bad)
    return samples, held_samples, [row.conversation for row in held.rows], report.merge(held_report)
