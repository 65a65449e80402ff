"""Adapters of a running engine: registered, loaded, counted, made room for and taken out again while requests run.

A *version* is content: an adapter's weights, immutable. A *name* points at a version; a reload under the same name makes a new
version and flips the name; a request pins the version that it was submitted with. A version lives `loading -> ready -> draining
-> gone`: it drains when no name points at it any more, and is gone when its last request ended; then its memory is free and
`on_gone` is told, so that nothing computed with it is found again.

Weights of a version are on the device, or (registered only, or pushed out by others) on disk. A request takes a *seat* on its
version's weights before it may run; while somebody has one, they stay. Who finds no weights waits in one queue in order of arrival;
a thread of this module reads what is wanted and makes room, least recently used first. When everything in memory has seats, the
weights that came first are closed: they take no more requests, drain and make room, so a rare adapter waits for running requests
only, never for those that come after it. The step loop neither reads nor waits.

Which call from where: `set_batch` from the step loop only, all others from any thread. It does not know sequences or HTTP.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor
from transformers import PreTrainedModel

from swiftlite.adapters.digest import lanes
from swiftlite.adapters.directory import Adapter, read, read_header
from swiftlite.adapters.files import Buffer
from swiftlite.engine.aside import aside
from swiftlite.engine.lora_extras import Extras
from swiftlite.engine.lora_native import NativeLora
from swiftlite.engine.lora_ops import Job, Segment, plan
from swiftlite.engine.lora_room import AdapterInfo, AdapterVersion, HostCache, Room, Waiter
from swiftlite.engine.lora_store import Weights, WeightStore
from swiftlite.engine.lora_taps import Layers
from swiftlite.errors import AdapterError, RequestError, SwiftError
from swiftlite.kernels.steps import DTYPES
from swiftlite.models.device import use_device

if TYPE_CHECKING:
    from collections.abc import Sequence

    from swiftlite.engine.lora_cuda import AdapterTables, DeviceJob


class LoraManager:
    """All adapters of one model. Raises AdapterError on what cannot be loaded, RequestError on an unknown name."""

    def __init__(
        self, model: PreTrainedModel, max_rank: int = 512, *, memory: int | None = None, host_memory: int = 0,
        library: ctypes.CDLL | None = None,
    ) -> None:  # fmt: skip
        """`memory`: bytes for all adapters' weights, None: no limit. `host_memory`: bytes to keep what was read, beside a GPU.

        `library`: the C++ kernels (kernels/build.py).
        """
        self.max_rank = max_rank
        self.layers = Layers(model)
        groups = [(group.width, tuple(group.outs)) for group in self.layers.groups]
        self._library = library
        self._native = NativeLora(library, groups) if library is not None and model.dtype in DTYPES and groups else None
        self.store = WeightStore(self.layers, self._native)
        self.on_gone: Callable[[str], None] = lambda digest: None
        self._lock = threading.RLock()  # everything below
        self._freed = threading.Condition(self._lock)  # a seat or some memory
        self._loading = threading.Lock()  # one load at a time: of two loads of one name, the later call wins
        self._names: dict[str, AdapterVersion] = {}
        self._versions: list[AdapterVersion] = []
        self._numbers: Counter[str] = Counter()
        self._arriving: list[tuple[str, str]] = []  # (name, path) of loads that go on
        self._memory = Room(self.store, memory)
        self._host = HostCache(host_memory)
        self._buffer = None if host_memory else Buffer()  # what is read is not kept: the next may lie in its place
        self._wanted: deque[AdapterVersion] = deque()
        self._loader: threading.Thread | None = None
        self._tables: AdapterTables | None = None  # only with the Triton kernels

    # -- names

    def add(self, name: str, path: str | Path) -> AdapterVersion:
        """Read, check and register the adapter in `path` as `name`; at return new requests can use it.

        A name that is taken flips to the new weights (running requests keep the old); equal weights are loaded once.
        Nothing changes when it fails.
        """
        with self._arrival(name, path):
            return aside(functools.partial(self._add, name, path), self._library, self.store.device)

    def _add(self, name: str, path: str | Path) -> AdapterVersion:
        adapter = self._read(path)
        size = self._size(adapter)
        with self._lock:
            roomy = self._memory.make(size)
            self._memory.reserved += size * roomy
        try:
            # Without room it is packed all the same, to see that it can be, and read again when its turn comes.
            weights = self.store.store(adapter)
        except BaseException:
            self._unreserve(size * roomy)
            raise
        with self._lock:
            self._unreserve(size * roomy)
            self._host.put(adapter)
            version = next((v for v in self._versions if v.digest == weights.digest), None)
            if version is None:
                version = self._new_version(name, adapter, size, weights.digest)
            if roomy and version.weights is None:
                self._memory.enter(weights, version)
            else:
                self.store.free(weights)
            self._point(name, version)
        return version

    def register(self, name: str, path: str | Path) -> AdapterVersion:
        """Make `name` known after a look at the adapter's header; its weights are read when a request wants them."""
        with self._arrival(name, path):
            header = read_header(path, self.layers.shapes, max_rank=self.max_rank)
            size = self._size(header)
            with self._lock:
                version = self._new_version(name, header, size, "")
                self._point(name, version)
            return version

    def remove(self, name: str) -> None:
        """New requests no longer find `name`; its memory goes when its last request ends. RequestError when unknown."""
        with self._lock:
            version = self._lookup(name)
            del self._names[name]
            self._drop_name(version)

    @contextmanager
    def _arrival(self, name: str, path: str | Path) -> Iterator[None]:
        entry = (name, str(path))
        with self._lock:
            self._arriving.append(entry)
        try:
            with self._loading:
                yield
        finally:
            with self._lock:
                self._arriving.remove(entry)

    def _read(self, path: str | Path) -> Adapter:
        hashed = lanes if self._native is None else self._native.lanes
        return read(path, self.layers.shapes, max_rank=self.max_rank, finite=False, hashed=hashed, buffer=self._buffer)

    def _size(self, adapter: Adapter) -> int:
        self.store.check(adapter)
        size = self.store.nbytes_of(adapter)
        limit = self._memory.limit
        if limit is not None and size > limit:
            why = f"it takes {size:,} bytes, all adapters together may take {limit:,}"
            raise AdapterError(f"{adapter.path} is too large", why, "give --adapter_memory more GiB")
        return size

    def _new_version(self, name: str, adapter: Adapter, size: int, digest: str) -> AdapterVersion:
        self._numbers[name] += 1
        version = AdapterVersion(name, self._numbers[name], str(adapter.path), adapter.max_rank, size, digest)
        self._versions.append(version)
        return version

    def _point(self, name: str, version: AdapterVersion) -> None:
        version.names += 1
        old, self._names[name] = self._names.get(name), version
        if old is not None:
            self._drop_name(old)

    def _lookup(self, name: str) -> AdapterVersion:
        if name not in self._names:
            shown = ", ".join([*self._names][:20]) or "none"
            raise RequestError(f"unknown adapter {name!r}", fix=f"served: {shown}", param="model")
        return self._names[name]

    def _drop_name(self, version: AdapterVersion) -> None:
        version.names -= 1
        self._free_unheld(version)

    def _free_unheld(self, version: AdapterVersion) -> None:
        if version.names or version.requests:
            return
        self._versions.remove(version)
        if version.weights is not None:
            self._memory.drop(version)
            self._freed.notify_all()
        if version.digest and not any(v.digest == version.digest for v in self._versions):
            self._host.drop(version.digest)
            self.on_gone(version.digest)

    # -- requests

    def acquire(self, name: str) -> AdapterVersion:
        """The version that `name` means now, held for one request until `release`; it begins to load if it must."""
        with self._lock:
            version = self._lookup(name)
            version.requests += 1
            version.served += 1
            if version.weights is None:
                self._want(version)
            return version

    def seat(self, version: AdapterVersion, waiter: Waiter) -> Weights | None:
        """A seat for one request that holds `version`. None: not yet, `waiter` will be called (from another thread)."""
        with self._lock:
            weights = version.weights
            if weights is not None and not weights.closing:
                self._memory.sit(weights)
                return weights
            version.waiters.append(waiter)
            self._want(version)
            return None

    def leave(self, seat: Weights | None) -> None:
        """Give a seat back."""
        if seat is not None:
            with self._lock:
                assert seat.seated > 0, "a seat was given back twice"
                seat.seated -= 1
                self._freed.notify_all()

    def release(self, version: AdapterVersion) -> None:
        """One request of `version` ended."""
        with self._lock:
            assert version.requests > 0, f"{version.name} released more often than acquired"
            version.requests -= 1
            self._free_unheld(version)
            self._freed.notify_all()

    def resident(self) -> list[AdapterVersion]:
        """Those whose weights are on the device."""
        with self._lock:
            return [version for version in self._versions if version.weights is not None]

    def names(self) -> list[str]:
        with self._lock:
            return list(self._names)

    def infos(self) -> list[AdapterInfo]:
        """Served adapters by name, then the draining ones, then those that are being loaded."""
        with self._lock:
            found = [(name, version, "ready") for name, version in self._names.items()]
            found += [(v.name, v, "draining") for v in self._versions if not v.names]
            infos = [self.info(name, version, state) for name, version, state in found]
            return infos + [AdapterInfo(name, path, "", 0, 0, 0, "disk", 0, 0, "loading") for name, path in self._arriving]

    def info(self, name: str, version: AdapterVersion, state: str = "ready") -> AdapterInfo:
        v = version
        tier = "device" if v.weights is not None else "host" if v.digest in self._host else "disk"
        return AdapterInfo(name, v.path, v.digest, v.number, v.rank, v.nbytes, tier, v.requests, v.served, state)

    def check(self, held: Iterable[AdapterVersion] = ()) -> None:
        """AssertionError when a count is wrong or memory leaked; `held` are the versions of running requests (none: idle)."""
        with self._lock:
            names = Counter(id(version) for version in self._names.values())
            requests = Counter(id(version) for version in held)
            for version in self._versions:
                assert version.names == names[id(version)], f"{version.name}: {version.names} names counted, {names[id(version)]} found"
                assert version.requests == requests[id(version)], (
                    f"adapter {version.name}: {version.requests} references, {requests[id(version)]} requests run"
                )
            self._memory.check(self._versions, idle=not self._arriving and not self._wanted)

    # -- memory

    def _want(self, version: AdapterVersion) -> None:
        if version not in self._wanted:
            self._wanted.append(version)
            if self._loader is None:
                self._loader = threading.Thread(target=self._serve_wanted, name="swiftlite-adapters", daemon=True)
                self._loader.start()

    def _serve_wanted(self) -> None:
        """The loader's thread: bring the wanted versions in, in order, until none is wanted."""
        use_device(self.store.device)
        while True:
            with self._lock:
                if not self._wanted:
                    self._loader = None
                    return
                version = self._wanted[0]
            try:
                self._bring(version)
                error = ""
            except SwiftError as caught:
                error = f"{caught.what}: {caught.why}" if caught.why else caught.what
            except Exception as caught:  # a bug of ours must not keep requests waiting for ever
                error = f"the adapter could not be loaded: {type(caught).__name__}: {caught}"
            error = error.replace(version.path, version.name)  # a client may see it, who need not know our folders
            with self._lock:
                self._wanted.popleft()
                waiters, version.waiters = version.waiters, []
                self._memory.reopen()
                weights = version.weights
                if weights is not None:
                    self._memory.sit(weights, len(waiters))
                elif not error and version.requests:  # one came when it seemed that nobody would
                    version.waiters = waiters
                    self._wanted.append(version)
                    continue
            for waiter in waiters:
                waiter(weights, error)

    def _bring(self, version: AdapterVersion) -> None:
        """Have the weights of `version` on the device; waits for room. Returns without, too, when nobody needs them any more."""
        with self._lock:
            while version.weights is None:
                if not version.requests:
                    return
                if self._memory.make(version.nbytes):
                    break
                self._memory.close_oldest()
                self._freed.wait()
            if version.weights is not None:
                return
            size = version.nbytes
            self._memory.reserved += size
        try:
            with self._lock:
                kept = self._host.get(version.digest)
            with self._loading:
                adapter, weights = aside(functools.partial(self._read_and_store, version.path, kept), self._library, self.store.device)
        except BaseException:
            self._unreserve(size)
            raise
        with self._lock:
            self._unreserve(size)
            twin = next((w for w in self._memory.resident if w.digest == weights.digest), None)
            changed = version.digest and version.digest != weights.digest
            if changed or twin is not None or version not in self._versions:
                self.store.free(weights)
            if changed:
                why = "its files are not those that were loaded under this name"
                raise AdapterError(f"the adapter {version.name} changed on disk", why, "load it again under its name")
            version.digest = weights.digest
            if version not in self._versions or version.weights is not None:
                return
            self._host.put(adapter)
            if twin is None:
                self._memory.enter(weights, version)
            else:
                self._memory.share(twin, version)

    def _unreserve(self, size: int) -> None:
        """A load is over: the other one may wait for its room, or for the weights that it brought (same lock: nobody comes between)."""
        with self._lock:
            self._memory.reserved -= size
            self._freed.notify_all()

    def _read_and_store(self, path: str, kept: Adapter | None) -> tuple[Adapter, Weights]:
        adapter = kept or self._read(path)
        self._size(adapter)
        return adapter, self.store.store(adapter)

    # -- one step

    def use_kernels(self) -> AdapterTables:
        """Apply adapters with the Triton kernels from now on (on a GPU; elsewhere only in Triton's interpreter)."""
        from swiftlite.engine.lora_cuda import AdapterTables

        self._tables = AdapterTables([(group.width, tuple(group.outs)) for group in self.layers.groups], self.store.device)
        self.store.tables_in_use = True
        return self._tables

    def use_torch(self) -> None:
        """Take `use_kernels` back: before the first adapter only, as some that torch serves would have been refused."""
        self._tables, self.store.tables_in_use = None, False

    def set_batch(
        self, segments: list[tuple[AdapterVersion | None, int]], kept: DeviceJob | None = None, logits_rows: Tensor | None = None
    ) -> None:
        """What the next forward's rows are: consecutive runs of rows, each with its adapter or None.

        `kept`, made by the kernels' `static_job`, is refilled: a captured step that was recorded with it now does these rows.
        `logits_rows` [S] are the rows that the output head will see (None: all of them).
        """
        rows: list[Segment] = []
        extras: list[tuple[Extras, int, int]] = []
        start = 0
        for version, count in segments:
            if version is None:
                rows.append((None, 0, count))
            else:
                weights = version.weights
                assert weights is not None, f"{version.name} is not in memory"
                rows.append((weights.stack, weights.slot, count))
                if weights.extras:
                    extras.append((weights.extras, start, start + count))
            start += count
        jobs: Sequence[Job]
        if self._tables is not None:
            jobs = self._tables.plan(rows, kept)
        elif self._native is not None:
            jobs = self._native.plan(rows)
        else:
            jobs = plan(rows, self.store.device)
        self.layers.set_batch(jobs, extras, start, logits_rows)
