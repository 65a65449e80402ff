"""Versions of adapters, and whose weights are in memory: who sits, who shares, who goes when room is needed.

Invariant: what is resident and what is reserved stays within the limit; weights with seats are never pushed out. One lock, held by
the caller (`lora.py`), guards all of it. It reads nothing and starts nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from swiftlite.adapters.directory import Adapter
from swiftlite.engine.lora_store import Weights, WeightStore

Waiter = Callable[["Weights | None", str], None]  # gets a seat, or the reason why there is none


@dataclass(eq=False)
class AdapterVersion:
    """One adapter's content as the engine knows it. `name` is the name it was first loaded under."""

    name: str
    number: int  # of this name's versions
    path: str
    rank: int
    nbytes: int  # on the device
    digest: str = ""  # of the content; "" until it was read. Seeds the prefix cache
    weights: Weights | None = None
    names: int = 0  # names that point here
    requests: int = 0  # unfinished requests that hold it
    served: int = 0  # requests so far
    waiters: list[Waiter] = field(default_factory=list)


@dataclass(frozen=True)
class AdapterInfo:
    """What the server may tell about an adapter. `state`: loading, ready, or draining (removed, waiting for its last request)."""

    name: str
    path: str
    digest: str
    version: int
    rank: int
    nbytes: int
    tier: str  # device; host: kept in the machine's memory beside a GPU; disk: read at its next request
    requests: int
    served: int
    state: str


class HostCache:
    """Adapters as they were read, for a device whose memory is not the host's; the least recently used go first."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self._adapters: OrderedDict[str, Adapter] = OrderedDict()  # by digest

    def __contains__(self, digest: str) -> bool:
        return digest in self._adapters

    def get(self, digest: str) -> Adapter | None:
        if digest in self._adapters:
            self._adapters.move_to_end(digest)
        return self._adapters.get(digest)

    def put(self, adapter: Adapter) -> None:
        digest, size = adapter.digest, adapter.nbytes
        if digest in self._adapters or size > self.limit:
            return
        while self.used + size > self.limit:
            self.drop(next(iter(self._adapters)))
        self._adapters[digest] = adapter
        self.used += size

    def drop(self, digest: str) -> None:
        adapter = self._adapters.pop(digest, None)
        if adapter is not None:
            self.used -= adapter.nbytes


class Room:
    """The weights in memory. `limit` in bytes, None: as much as there is."""

    def __init__(self, store: WeightStore, limit: int | None) -> None:
        self.store, self.limit = store, limit
        self.resident: list[Weights] = []
        self.reserved = 0  # bytes of loads that go on
        self._holders: dict[int, list[AdapterVersion]] = {}  # by identity of the weights
        self._clock = 0

    def sit(self, weights: Weights, count: int = 1) -> None:
        """`count` requests begin to run with these."""
        self._clock += 1
        weights.used = self._clock
        weights.seated += count

    def enter(self, weights: Weights, version: AdapterVersion) -> None:
        self._clock += 1
        weights.since = weights.used = self._clock
        version.weights, version.nbytes = weights, weights.nbytes
        self.resident.append(weights)
        self._holders[id(weights)] = [version]

    def share(self, weights: Weights, version: AdapterVersion) -> None:
        """Another version has the same content."""
        version.weights = weights
        self._holders[id(weights)].append(version)

    def drop(self, version: AdapterVersion) -> None:
        """`version` is gone; its weights go with the last that has them."""
        weights, version.weights = version.weights, None
        assert weights is not None
        holders = self._holders[id(weights)]
        holders.remove(version)
        if not holders:
            self.push_out(weights)

    def push_out(self, weights: Weights) -> None:
        """Free these; the versions that have them are on disk again."""
        for version in self._holders.pop(id(weights)):
            version.weights = None
        self.resident.remove(weights)
        self.store.free(weights)

    def make(self, size: int) -> bool:
        """Push out weights that nobody sits on, least recently used first, until `size` bytes fit; False when they do not."""
        if self.limit is None:
            return True
        free = self.limit - self.reserved - sum(weights.nbytes for weights in self.resident)
        if free >= size:
            return True
        idle = sorted((w for w in self.resident if not w.seated), key=lambda w: w.used)
        if free + sum(w.nbytes for w in idle) < size:
            return False
        for weights in idle:
            if free >= size:
                break
            free += weights.nbytes
            self.push_out(weights)
        return True

    def close_oldest(self) -> None:
        """Let those that came first take no more requests, so that they go; one at a time."""
        if self.resident and not any(weights.closing for weights in self.resident):
            min(self.resident, key=lambda w: w.since).closing = True

    def reopen(self) -> None:
        for weights in self.resident:
            weights.closing = False

    def check(self, versions: Iterable[AdapterVersion], idle: bool) -> None:
        """AssertionError when counts are wrong; `idle`: no load goes on."""
        having = [version for version in versions if version.weights is not None]
        for weights in self.resident:
            holders = self._holders[id(weights)]
            assert holders and holders == [v for v in holders if v in having and v.weights is weights], "weights without a version"
            requests = sum(version.requests for version in holders)
            assert weights.seated <= requests, f"{weights.seated} seats taken, {requests} requests"
        if idle:
            used = self.store.used_slots
            assert used == len(self.resident), f"{used} adapter slots in use, {len(self.resident)} adapters"
