"""Rows encoded before, kept under ~/.cache/swiftlite/rows (or $XDG_CACHE_HOME), found by everything that decides the result.

The key is over the data's content, the template, the tokenizer, the data settings and this package's encoding code: a change
of any of them is another key, so nothing here ever goes stale. An entry is a folder that appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from swiftlite.chat.template import Template

WORTH_IT = 4 << 20  # bytes of data from which an entry is made; less is encoded in a second
KEEP = 12  # entries; the least recently used go
PACKAGE = Path(__file__).resolve().parents[1]


def root() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swiftlite" / "rows"


def key(files: Iterable[Path], template: Template, settings: dict[str, Any]) -> str:
    """Name of the entry. Reads every byte of `files`."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        digest.update(json.dumps(value, ensure_ascii=False, sort_keys=True, default=str).encode() + b"\0")

    for file in files:
        add([file.name, file.stat().st_size])  # the account of the rows names files
        with open(file, "rb") as content:
            while block := content.read(1 << 22):
                digest.update(block)
    code = sorted((*(PACKAGE / "chat").glob("*.py"), *(PACKAGE / "data").glob("*.py")))
    for source in code:
        digest.update(source.read_bytes())
    digest.update(template.tokens.backend.to_str().encode())
    today = time.strftime("%Y-%m-%d") if any("strftime_now" in text for text in template.sources.values()) else ""
    add([template.name, template.sources, template.default_system, template.stop_ids, today, settings])
    return digest.hexdigest()[:32]


def find(name: str) -> Path | None:
    """The entry's folder; its use is noted for `prune`."""
    folder = root() / name
    if not (folder / "done.json").is_file():
        return None
    with contextlib.suppress(OSError):  # a cache that we may only read
        os.utime(folder)
    return folder


def begin() -> Path | None:
    """A folder to fill; None where the cache cannot be written."""
    try:
        root().mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=".new-", dir=root()))
    except OSError as error:
        print(f"note: encoded rows are kept in memory, {root()} cannot be written: {error.strerror or error}")
        return None


def publish(folder: Path, name: str, content: dict[str, Any]) -> Path:
    """Give a filled folder its name; the entry of another process that was faster is as good."""
    (folder / "done.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    final = root() / name
    try:
        os.rename(folder, final)
    except OSError:
        if not (final / "done.json").is_file():
            raise
        shutil.rmtree(folder, ignore_errors=True)
    prune()
    return final


def prune() -> None:
    """Remove the least recently used entries, and what killed processes left a day ago. Mapped files live on until unmapped."""
    entries = sorted((p for p in root().iterdir() if p.is_dir()), key=lambda p: -p.stat().st_mtime)
    named = [p for p in entries if not p.name.startswith(".")]
    old = [p for p in entries if p.name.startswith(".") and p.stat().st_mtime < time.time() - 86400]
    for path in (*named[KEEP:], *old):
        shutil.rmtree(path, ignore_errors=True)
