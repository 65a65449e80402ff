"""The data flags -> rows to train and to evaluate on: sampling, split, self-cognition, shuffle, each seeded by --data_seed.

The evaluation rows depend on the datasets, the split ratio and the seed only, so `swift infer --load_dataset_config true`
finds the same ones again. It knows flags, not training.
"""

from __future__ import annotations

import difflib
import json
import shutil
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from swiftlite.chat.conversation import Conversation
from swiftlite.chat.scales import parse as parse_scale
from swiftlite.chat.template import Template
from swiftlite.data import cache, mixing
from swiftlite.data.catalog import CATALOG, read_info
from swiftlite.data.encoding import Report, outcomes
from swiftlite.data.formats import READ
from swiftlite.data.rows import Identity, Part, Reader, Row, Rows, fetch, sample, scan
from swiftlite.data.sources import parse_spec
from swiftlite.data.store import Sample, Samples, Writer, mapped
from swiftlite.errors import DataError, TemplateError, UsageError
from swiftlite.options.parse import Options
from swiftlite.options.resolve import DATA_SETTINGS

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
    for ours in columns.values():  # a name that is nothing to us hides a column; one that was meant to be something must not
        if ours.lower() not in READ and (close := difflib.get_close_matches(ours.lower(), READ, n=1, cutoff=0.75)):
            raise UsageError(
                f"--columns renames a column to {ours!r}, which is not read",
                fix=f"did you mean {close[0]!r}? To hide a column, take a name unlike that",
            )
    return columns


def _check_columns(reader: Reader) -> None:
    """After all rows were read: a column of --columns that no row has is said, and refused where it looks like a slip."""
    have = {name.lower() for name in reader.seen}
    own = {theirs.lower() for theirs in reader.columns or {}}
    for theirs in sorted(own - have):
        what = f"--columns renames {theirs!r}, a column that no row has"
        if close := difflib.get_close_matches(theirs, have - own, n=1, cutoff=0.75):
            raise UsageError(what, fix=f"did you mean {close[0]!r}?")
        print(f"note: {what}; they have {', '.join(sorted(have)[:20])}")


Key = tuple[int, int]  # dataset's position in `Choice.parts`, row number in it


@dataclass(frozen=True)
class Choice:
    """Which rows of which dataset are trained and evaluated on, in order; a row may be trained on more than once."""

    parts: list[Part]
    train: list[Key]
    held: list[Key]
    first_val: int  # parts from here on are evaluation datasets


def _reader(options: Options, labelled: bool = True) -> Reader:
    known = {**CATALOG, **read_info(options.dataset_info)} if options.dataset_info else CATALOG
    identity = Identity(options.model_name, options.model_author)
    return Reader(_columns(options), identity, options.use_hf, options.strict, labelled, known)


def _choose(options: Options, labelled: bool = True) -> Choice:
    """Reads every dataset once. The training rows are sampled, with self-cognition, and shuffled."""
    ratio = 0.0 if options.streaming else options.split_dataset_ratio
    if not 0 <= ratio < 1:
        raise UsageError(f"--split_dataset_ratio must lie in [0, 1), got {ratio}")
    if options.data_seed < 0:
        raise UsageError(f"--data_seed must not be negative, got {options.data_seed}")
    if options.interleave_prob:
        mixing.check(options.interleave_prob, len(options.dataset))
    reader = _reader(options, labelled)
    parts = scan(options.dataset, reader, options.data_seed)
    groups: list[list[Key]] = []
    held: list[Key] = []
    for position, part in enumerate(parts):
        count = 0
        if ratio > 0 and not options.val_dataset and len(part.order) > 1:
            count = min(max(int(len(part.order) * ratio), 1), len(part.order) - 1)
        chosen = set(np.random.default_rng([options.data_seed, _SPLIT, position]).permutation(len(part.order))[:count].tolist())
        kept = [(position, number) for index, number in enumerate(part.order) if index not in chosen]
        if part.repeat_to is not None:  # repeated after the split, so that no evaluation row is trained on
            wanted = part.repeat_to - count
            kept = [kept[i] for i in sample(wanted, len(kept), np.random.default_rng([options.data_seed, _REPEAT, position]))]
        groups.append(kept)
        held += [(position, number) for index, number in enumerate(part.order) if index in chosen]
    train = _mixed(options, groups) if options.interleave_prob else [key for kept in groups for key in kept]
    train = _limited(train, options.train_dataset_sample, [options.data_seed, _SAMPLE])
    own = _self_cognition(options)
    if own is not None:
        train += [(len(parts), number) for number in own.order]
        parts.append(own)
    if options.dataset_shuffle:
        train = [train[i] for i in np.random.default_rng([options.data_seed, _SHUFFLE]).permutation(len(train)).tolist()]
    first_val = len(parts)
    parts += scan(options.val_dataset, reader, options.data_seed + 1)
    held += [(position, number) for position in range(first_val, len(parts)) for number in parts[position].order]
    _check_columns(reader)
    return Choice(parts, train, _limited(held, options.val_dataset_sample, [options.data_seed, _VAL]), first_val)


def _mixed(options: Options, parts: list[list[Key]]) -> list[Key]:
    """The datasets' training rows by --interleave_prob; says what came of it."""
    if options.dataset_shuffle:  # so that a dataset of which only a part is used gives rows from everywhere
        rngs = [np.random.default_rng([options.data_seed, _MIX, position]) for position in range(len(parts))]
        parts = [[part[i] for i in rng.permutation(len(part)).tolist()] for rng, part in zip(rngs, parts, strict=True)]
    order = mixing.interleave([len(part) for part in parts], options.interleave_prob, options.stopping_strategy, [options.data_seed, _MIX])
    used = [sum(1 for which, _ in order if which == position) for position in range(len(parts))]
    shares = ", ".join(f"{name} {count:,} of {len(part):,}" for name, count, part in zip(options.dataset, used, parts, strict=True))
    print(f"datasets mixed by --interleave_prob ({options.stopping_strategy}): {shares} rows")
    return [parts[which][row] for which, row in order]


def _limited(rows: list[Key], count: int, seed: list[int]) -> list[Key]:
    """A random choice of `count` rows (negative, or as many as there are: all of them), in their order."""
    if count < 0 or count >= len(rows):
        return rows
    return [rows[i] for i in sorted(np.random.default_rng(seed).permutation(len(rows))[:count].tolist())]


def _self_cognition(options: Options) -> Part | None:
    count = options.self_cognition_sample
    if count <= 0:
        return None
    for flag, given in (("--model_name", options.model_name), ("--model_author", options.model_author)):
        if not given:
            raise UsageError(
                f"--self_cognition_sample needs {flag}",
                "its rows teach the model its name and who made it",
                "add --model_name 小黄 'Xiao Huang' --model_author 魔搭 ModelScope",
            )
    reader = Reader(identity=Identity(options.model_name, options.model_author), strict=True)
    (part,) = scan(["self-cognition"], reader, 0)
    order = sample(count, len(part.order), np.random.default_rng([options.data_seed, _SELF]))
    return replace(part, order=order)


def load(options: Options, template: Template | None = None, *, for_eval: bool = False, labelled: bool = True) -> Rows:
    """Rows by the data flags, not encoded: to train on (sampled, with self-cognition, shuffled), or `for_eval` the held-out ones.

    `labelled=False` also takes rows without an answer; the held-out rows of a training run are found with True only.
    Raises UsageError without a dataset, DataError or HubError for one that cannot be read.
    """
    if not options.dataset and not options.val_dataset and options.self_cognition_sample <= 0:
        raise UsageError("no dataset given", fix="--dataset FILE, a hub id, or --self_cognition_sample N")
    choice = _choose(options, labelled)
    keys = choice.held if for_eval else choice.train
    found = dict(fetch(choice.parts, set(keys)))
    parts = choice.parts[choice.first_val :] if for_eval else choice.parts[: choice.first_val]
    rows = Rows([found[key] for key in keys], [refused for part in parts for refused in part.bad])
    if template is not None and not template.has_chat and any(row.conversation.messages for row in rows.rows):
        raise TemplateError(
            "this model has no chat template, and the dataset holds conversations", "it is a base model", "choose one with --template"
        )
    return rows


def load_training(
    options: Options, template: Template, max_length: int | None
) -> tuple[Sequence[Sample], Sequence[Sample], list[Conversation], Report]:
    """(training samples, evaluation samples, evaluation conversations, account of both). Deterministic in the flags.

    Large data is encoded into files that are mapped, and taken from there when nothing changed; memory then holds some
    hundred bytes a row. Raises DataError when no training sample is left.
    """
    if not options.dataset and options.self_cognition_sample <= 0:
        raise UsageError("no dataset to train on", fix="--dataset FILE, a hub id, or --self_cognition_sample N")
    name = _cache_key(options, template, max_length)
    if name is not None and (entry := cache.find(name)) is not None:
        try:
            result = _cached(entry)
            print(f"rows taken from the cache: {entry} (same data, template, tokenizer and settings)")
            return result
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"note: the cached rows in {entry} are damaged ({error}); encoding again")
            shutil.rmtree(entry, ignore_errors=True)
    folder = cache.begin() if name is not None else None
    try:
        return _encode(options, template, max_length, folder, name)
    except OSError as error:
        if folder is None:
            raise
        fix = "make room, set XDG_CACHE_HOME, or pass --load_from_cache_file false"
        raise DataError(f"cannot write encoded rows to {folder.parent}", error.strerror or str(error), fix) from None
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)  # gone by then unless something failed


def _encode(
    options: Options, template: Template, max_length: int | None, folder: Path | None, name: str | None
) -> tuple[Sequence[Sample], Sequence[Sample], list[Conversation], Report]:
    choice = _choose(options)
    uses, held = Counter(choice.train), dict.fromkeys(choice.held)
    conversations: dict[Key, Conversation] = {}

    def rows() -> Iterator[Row]:
        for key, row in fetch(choice.parts, uses.keys() | held.keys()):
            keys.append(key)
            if key in held:
                conversations[key] = row.conversation
            yield row

    keys: deque[Key] = deque()
    writer, places = Writer(folder), {}
    report, held_report = Report(), Report()
    for position, part in enumerate(choice.parts):
        for refused in part.bad:
            (held_report if position >= choice.first_val else report).drop(refused.reason, refused.source, refused.number)
    for outcome in outcomes(rows(), template, max_length, options.truncation_strategy, options.loss_scale, options.strict):
        key = keys.popleft()
        places[key] = (len(writer), len(outcome.samples))
        for one in outcome.samples:
            writer.add(one)
        report.add(outcome, uses[key])
        held_report.add(outcome, key in held)
    orders = [
        np.array([at for key in chosen for at in range(places[key][0], sum(places[key]))], dtype=np.int64)
        for chosen in (choice.train, choice.held)
    ]
    if not len(orders[0]):
        raise DataError("no training row is left", "\n" + report.table(), "correct the rows, or raise --max_length")
    check_evaluation(options, len(orders[1]), held_report)
    total = report.merge(held_report)
    evaluation = [conversations[key] for key in choice.held]
    arrays = writer.arrays()
    if folder is not None and name is not None:
        for file, order in zip(_ORDERS, orders, strict=True):
            np.save(folder / file, order)
        content = {"report": asdict(total), "evaluation": [asdict(conversation) for conversation in evaluation]}
        print(f"rows kept for the next run: {cache.publish(folder, name, content)}")
    return Samples(arrays, orders[0]), Samples(arrays, orders[1]), evaluation, total


def check_evaluation(options: Options, count: int, report: Report) -> None:
    """DataError when --val_dataset was given, and none of its rows can be used."""
    if options.val_dataset and options.val_dataset_sample != 0 and not count:
        raise DataError("no evaluation row is left", "\n" + report.table(), "correct the rows of --val_dataset, or leave it out")


_ORDERS = ("train.npy", "evaluation.npy")


def _cached(entry: Path) -> tuple[Sequence[Sample], Sequence[Sample], list[Conversation], Report]:
    content = json.loads((entry / "done.json").read_text(encoding="utf-8"))
    arrays = mapped(entry)
    train, held = (Samples(arrays, np.load(entry / file)) for file in _ORDERS)
    return train, held, [Conversation(**one) for one in content["evaluation"]], Report.from_json(content["report"])


def _cache_key(options: Options, template: Template, max_length: int | None) -> str | None:
    """The cache entry's name; None where caching is switched off or not worth it."""
    if not options.load_from_cache_file:
        return None
    reader = _reader(options)
    files = [file for spec in (*options.dataset, *options.val_dataset) for file in reader.files(spec)]
    if sum(file.stat().st_size for file in files) < cache.WORTH_IT:
        return None
    specs = [str(parse_spec(spec, reader.known)) for spec in (*options.dataset, *options.val_dataset)]
    settings = {name: options.values[name] for name in DATA_SETTINGS if name not in ("dataset_info", "load_from_cache_file")}
    settings["loss_scale"] = repr(parse_scale(options.loss_scale))  # it may name a file
    return cache.key(files, template, {**settings, "specs": specs, "strict": options.strict, "max_length": max_length})
