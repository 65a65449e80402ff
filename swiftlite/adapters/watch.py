"""A folder of adapters, looked at a few times a second: what is new or changed is handed on, what is gone is taken back.

Every directory in it with an adapter_config.json is an adapter under its folder's name; run folders of `swift sft` are looked into,
so a running training's checkpoints appear as they are written. A directory counts once its files are whole and have not changed between
two looks; what cannot be used is reported once, until it changes, and whatever was served under its name stays.
It does not know engines or servers: it calls two functions.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

from swiftlite.adapters.files import CONFIG, WEIGHTS, Signature, signature_of
from swiftlite.adapters.names import NAME, NAME_RULE
from swiftlite.errors import SwiftError

INTERVAL = 0.3  # seconds between two looks
LONGEST = 0.45  # seconds: two of them, which a change takes at most, are within a second
CALM = 2.0  # seconds: files that are older are not being written
DEPTH = 4  # <run>/<model>/vN-<time>/checkpoint-N
State = tuple[str, Signature]  # directory, and what its files are
RUN = re.compile(r"(v\d+)-\d{8}-\d{6}")


def scan(root: Path) -> dict[str, State]:
    """Name -> (directory, signature of its files) of every adapter below `root` that has both files. No order is promised."""
    found: dict[str, State] = {}
    _scan(str(root), (), found)
    return found


def _scan(folder: str, parts: tuple[str, ...], found: dict[str, State]) -> None:
    try:
        with os.scandir(folder) as entries:
            folders = [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir()]
    except OSError:  # it went away
        return
    for name in folders:
        path = f"{folder}/{name}"
        run = RUN.fullmatch(name) if parts else None
        own = (*parts, run[1] if run else name)
        signature = signature_of(path)
        if signature is not None:
            found.setdefault("-".join(own), (path, signature))
        elif len(own) < DEPTH and not os.path.exists(f"{path}/{CONFIG}") and not os.path.exists(f"{path}/{WEIGHTS}"):
            _scan(path, own, found)


class Watcher:
    """Keeps a folder's adapters known. `add(name, path)` may raise SwiftError; `remove(name)` forgets what `add` took."""

    def __init__(
        self, root: Path, add: Callable[[str, Path], None], remove: Callable[[str], None], log: Callable[[str], None] = print
    ) -> None:
        self.root, self._add, self._remove, self._log = root, add, remove, log
        self.served: dict[str, State] = {}
        self._seen: dict[str, State] = {}
        self._refused: dict[str, State] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def look(self) -> None:
        """One look, and what follows from it."""
        now, found = time.time_ns(), scan(self.root)
        for name in [name for name in self.served if name not in found]:
            del self.served[name]
            self._remove(name)
            self._log(f"adapter {name} is gone")
        for name, state in found.items():
            if self.served.get(name) == state or self._refused.get(name) == state:
                continue
            calm = now - max(written for _, _, written in state[1]) > CALM * 1e9
            if calm or self._seen.get(name) == state:
                self._take(name, state)
        self._seen = found
        self._refused = {name: state for name, state in self._refused.items() if name in found}

    def _take(self, name: str, state: State) -> None:
        try:
            if not NAME.fullmatch(name):
                raise SwiftError("its folder's name cannot be a model's name", fix=NAME_RULE)
            self._add(name, Path(state[0]))
        except SwiftError as error:
            self._refused[name] = state
            self._log(f"adapter {name} is not served: {': '.join(part for part in (error.what, error.why) if part)}")
            return
        self._refused.pop(name, None)
        self._log(f"adapter {name} is {'served anew' if name in self.served else 'served'}")
        self.served[name] = state

    def start(self) -> None:
        """Look now, then again and again in a thread."""
        self.look()
        self._thread = threading.Thread(target=self._run, name="adapter-watch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        pause = INTERVAL
        while not self._stop.wait(pause):
            begun = time.thread_time()
            try:
                self.look()
            except Exception as error:  # a bug of ours must not end the watch
                self._log(f"looking at {self.root} failed: {type(error).__name__}: {error}")
            pause = max(INTERVAL, min(LONGEST, 50 * (time.thread_time() - begun)))  # thousands of folders: 2 % of a core

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
