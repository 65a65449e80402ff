"""Where rows lie: the dataset syntax `[hf::|ms::]id[:subset][#n]`, files, folders, hub ids -> raw records with their line.

An existing path wins over every reading of its name. A broken line is handed on as a `Broken` record: counting or failing is
the caller's choice. It does not know what the columns mean.
"""

from __future__ import annotations

import csv
import difflib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swiftlite.data.catalog import CATALOG, Entry, find
from swiftlite.errors import DataError, HubError
from swiftlite.hub import resolve_dataset

HERE = Path(__file__).parent
BUNDLED = {
    "self-cognition": HERE / "self_cognition.jsonl",
    "swift/self-cognition": HERE / "self_cognition.jsonl",
    "tiny-chat": HERE / "tiny_chat.jsonl",
}
ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet")
METADATA = ("dataset_infos.json", "dataset_info.json", "configuration.json", "dataset_dict.json", "state.json", "requirements.txt")


@dataclass(frozen=True)
class Broken:
    """A line that is no record: the kind of fault, by which lines are counted, and its detail."""

    why: str
    detail: str = ""


@dataclass(frozen=True)
class Spec:
    """One parsed dataset argument; `use_hf` None: the default hub order; `count` None: all rows.

    From the catalog: `hf` the id on Hugging Face where it differs, `prefer` files, `columns` (theirs -> ours).
    """

    name: str
    use_hf: bool | None = None
    subsets: tuple[str, ...] = ()
    count: int | None = None
    hf: str = ""
    prefer: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)


def parse_spec(text: str, known: Mapping[str, Entry] = CATALOG) -> Spec:
    """`[hf::|ms::]id[:subset[/subset]][#n]`, where id may be a name in `known`. Raises DataError for a count that is no number."""
    if os.path.exists(os.path.expanduser(text)):
        return Spec(text)
    name, use_hf, count = text, None, None
    subsets: tuple[str, ...] = ()
    hub, colons, rest = name.partition("::")
    if colons and hub.lower() in ("hf", "ms"):
        name, use_hf = rest, hub.lower() == "hf"
    head, sharp, number = name.rpartition("#")
    if sharp:
        if not number.isdigit() or int(number) == 0:
            raise DataError(f"cannot read the dataset {text!r}", f"{number!r} after # is no number of rows", "write e.g. data.jsonl#1000")
        name, count = head, int(number)
    if os.path.exists(os.path.expanduser(name)):
        return Spec(name, use_hf, subsets, count)
    head, colon, subset = name.rpartition(":")
    if colon and head:
        name, subsets = head, tuple(part for part in subset.split("/") if part not in ("all", "default", ""))
    entry = find(name, known)
    if entry is None:
        return Spec(name, use_hf, subsets, count)
    prefer = "" if subsets else entry.prefer
    subsets = subsets or tuple(part for part in entry.subsets if part not in ("all", "default"))
    return Spec(entry.path or entry.ms, use_hf, subsets, count, entry.hf, prefer, entry.columns)


def records(spec: Spec, use_hf: bool = False) -> Iterator[tuple[Any, str, int]]:
    """(record or Broken, file, line or element number from 1) of all the dataset's files. Raises DataError or HubError."""
    for file in files(spec, use_hf):
        yield from read_file(file)


def files(spec: Spec, use_hf: bool = False) -> list[Path]:
    """The dataset's data files. Raises DataError or HubError."""
    path = Path(spec.name).expanduser()
    if not path.exists() and spec.name in BUNDLED:
        path = BUNDLED[spec.name]
    if not path.exists():
        if spec.name.lower().endswith(ENDINGS) or spec.name.startswith(("/", "./", "../", "~")):
            raise DataError(f"no such dataset file: {spec.name}", f"looked at {path.absolute()}", "check the path")
        try:
            path = resolve_dataset(spec.name, use_hf=use_hf if spec.use_hf is None else spec.use_hf, hf_name=spec.hf)
        except HubError as error:
            close = difflib.get_close_matches(spec.name, [*CATALOG, *BUNDLED], n=1, cutoff=0.7) if "/" not in spec.name else []
            raise HubError(error.what, error.why, f"did you mean {close[0]!r}?" if close else error.fix) from None
    return _files(path, spec)


def _files(path: Path, spec: Spec) -> list[Path]:
    if path.is_file():
        return [path]
    found = sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in ENDINGS
        and file.name not in METADATA
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if spec.subsets:
        wanted = {subset.lower() for subset in spec.subsets}
        chosen = [
            f
            for f in found
            if wanted & {part.lower() for part in f.relative_to(path).parts[:-1]} or any(w in f.stem.lower() for w in wanted)
        ]
        if not chosen:
            names = ", ".join(str(f.relative_to(path)) for f in found[:10]) or "no data file"
            raise DataError(f"the dataset {spec.name} has no subset {'/'.join(spec.subsets)}", f"it holds: {names}", "name one of these")
        found = chosen
    found = [file for file in found if spec.prefer and spec.prefer in str(file.relative_to(path)).lower()] or found
    train = [file for file in found if "train" in file.stem.lower() or "train" in map(str.lower, file.relative_to(path).parts[:-1])]
    found = train or found  # a hub dataset's test split is not for training
    if not found:
        raise DataError(f"no data file in {path}", f"looked for {', '.join(ENDINGS)}", "pass the file or folder that holds the rows")
    return found


def read_file(path: Path) -> Iterator[tuple[Any, str, int]]:
    """(record or Broken, file, number) of one file, by its ending. Raises DataError when it cannot be read or holds nothing."""
    kind = path.suffix.lower()
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv, ".txt": _txt, ".parquet": _parquet}
    if kind not in readers:
        raise DataError(f"cannot read {path}", f"its ending {kind!r} is unknown", f"use one of {', '.join(ENDINGS)}")
    empty = True
    try:
        for number, record in readers[kind](path):
            empty = False
            yield record, str(path), number
    except OSError as error:
        raise DataError(f"cannot read {path}", error.strerror or str(error)) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text", f"byte {error.start}: {error.reason}", "convert it to UTF-8") from None
    if empty:
        raise DataError(f"{path} is empty", "it holds no row", "check the file")


def _jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    with open(path, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, _object(line)


def _object(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return Broken("not valid JSON", str(error))


def _json(path: Path) -> Iterator[tuple[int, Any]]:
    text = path.read_text(encoding="utf-8-sig")
    if not text.strip():
        return
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("{") and "\n" in text.strip():  # JSON lines under the wrong ending
            yield from _jsonl(path)
            return
        raise DataError(f"{path} is not valid JSON", str(error), "one list of objects; one object a line is .jsonl") from None
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        content = lists[0] if len(content) == len(lists) == 1 else [content]  # {"data": [...]}
    if not isinstance(content, list):
        raise DataError(f"{path} holds {type(content).__name__}, not rows", fix="one list of objects")
    yield from enumerate(content, 1)


def _csv(path: Path) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with open(path, encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        while True:
            try:
                record = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield reader.line_num, Broken("not valid CSV", str(error))
                continue
            if None in record:
                yield reader.line_num, Broken("it has more cells than the header")
            else:
                yield reader.line_num, {key: value for key, value in record.items() if value}


def _txt(path: Path) -> Iterator[tuple[int, Any]]:
    with open(path, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, {"text": line.rstrip("\n")}


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"cannot read {path}", "pyarrow is not installed", "pip install pyarrow") from None
    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise DataError(f"cannot read {path}", str(error)) from None
    number = 0
    for batch in table.iter_batches():
        for record in batch.to_pylist():
            number += 1
            yield number, record
