"""Where kept rows lie: what a store must do, and one in memory, bounded in bytes and in age.

It does not know what the bytes mean.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from remote_ops.errors import SpecError

__all__ = ["MemoryRows", "RowCache", "Usage", "check_bounds"]

_ENTRY_BYTES = 320  # what Python needs for an entry beyond its bytes: two objects, a pair, a place in the order


class Usage(NamedTuple):
    """What a store holds now, and how many entries it has given up for others."""

    entries: int
    bytes: int
    evictions: int


class RowCache(Protocol):
    """Bytes by key, of which any may be gone at any time. Safe to use from several threads; never raises."""

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """What was put under each key; None where there is nothing."""
        ...

    def put(self, entries: Sequence[tuple[bytes, bytes]]) -> None:
        """Keep pairs of key and bytes, as far as there is room; returns without waiting for a disk."""
        ...

    def usage(self) -> Usage:
        """What it holds now."""
        ...

    def close(self) -> None:
        """Let go of what it holds open."""
        ...


def check_bounds(max_bytes: int, ttl_s: float | None, *, at_least: int = 1) -> None:
    """Raise `SpecError` unless a store may be bounded so."""
    if not max_bytes >= at_least:
        raise SpecError(f"expected room for {at_least:,} bytes or more, got {max_bytes!r}", path="max_bytes")
    if ttl_s is not None and not ttl_s > 0:
        raise SpecError(f"expected more than 0 seconds, or None for no bound, got {ttl_s!r}", path="ttl_s")


class MemoryRows:
    """Rows in memory; where room is short, those go first that were asked for longest ago.

    Args:
        max_bytes: most bytes it takes, keys and Python's own included; what is larger alone is not kept.
        ttl_s: seconds after which a row is not given any more; None: no bound.
        clock: seconds that only grow.

    Raises:
        SpecError: `max_bytes` or `ttl_s` is not above 0.

    A lookup costs about 0.5 us for each key. Constant: the bounds and the clock. Changing: all else, guarded by
    `_lock`, which is never held while anything waits.
    """

    def __init__(
        self, max_bytes: int = 256 << 20, *, ttl_s: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        check_bounds(max_bytes, ttl_s)
        self.max_bytes = max_bytes
        self.ttl_s = ttl_s
        self._clock = clock
        self._lock = threading.Lock()
        self._kept: OrderedDict[bytes, tuple[float, bytes]] = OrderedDict()
        self._bytes = 0
        self._evictions = 0

    def __repr__(self) -> str:
        return f"MemoryRows({self.max_bytes}, ttl_s={self.ttl_s})"

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """What was put under each key within the last `ttl_s`, which counts as asked for now."""
        now = self._clock()
        with self._lock:
            return [self._find(key, now) for key in keys]

    def put(self, entries: Sequence[tuple[bytes, bytes]]) -> None:
        """Keep pairs of key and bytes; each makes room for itself."""
        now = self._clock()
        with self._lock:
            for key, value in entries:
                self._keep(key, value, now)

    def usage(self) -> Usage:
        """What it holds now; rows that are too old count until they are asked for or make room."""
        with self._lock:
            return Usage(len(self._kept), self._bytes, self._evictions)

    def close(self) -> None:
        """Forget every row; it stays usable."""
        with self._lock:
            self._kept.clear()
            self._bytes = 0

    def _find(self, key: bytes, now: float) -> bytes | None:
        entry = self._kept.get(key)
        if entry is None:
            return None
        if self.ttl_s is not None and now - entry[0] >= self.ttl_s:
            self._drop(key)
            return None
        self._kept.move_to_end(key)
        return entry[1]

    def _keep(self, key: bytes, value: bytes, now: float) -> None:
        if key in self._kept:
            self._drop(key)
        size = _size(key, value)
        if size > self.max_bytes:
            return
        while self._bytes + size > self.max_bytes:
            self._drop(next(iter(self._kept)))
            self._evictions += 1
        self._kept[key] = now, value
        self._bytes += size

    def _drop(self, key: bytes) -> None:
        self._bytes -= _size(key, self._kept.pop(key)[1])


def _size(key: bytes, value: bytes) -> int:
    return len(key) + len(value) + _ENTRY_BYTES
