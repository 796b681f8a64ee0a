"""Receive buffers: page-aligned, and taken back as soon as nobody views them any more.

A body of many megabytes costs more in page faults than in copying, so a buffer that has been faulted in once is worth
keeping. Arrays decoded from a buffer are views that keep it lent; the last one to go gives it back. It knows nothing
of messages.

Constant: `keep_bytes`. Changing: `_idle` and `_lent`; both only through operations that are atomic in CPython, since a
buffer may come back from any thread at any time, also from the garbage collector.
"""

from __future__ import annotations

import mmap
import weakref
from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["BufferPool"]

_POOLED_BYTES = 1 << 16
# Private, so that a forked child does not write into its parent's arrays.
_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


class _Lease(weakref.ref[npt.NDArray[np.uint8]]):
    """A lent mapping, known by the one array that every view of it hangs on."""

    __slots__ = ("mapping", "pool")

    mapping: mmap.mmap
    pool: BufferPool


def _give_back(lease: Any) -> None:
    lease.pool._give_back(lease)


class BufferPool:
    """Hands out writable buffers and keeps up to `keep_bytes` of those that came back.

    Args:
        keep_bytes: most idle bytes kept for reuse, 0 or more.
    """

    def __init__(self, keep_bytes: int = 256 << 20) -> None:
        self.keep_bytes = keep_bytes
        self._idle: deque[mmap.mmap] = deque()
        self._lent: dict[int, _Lease] = {}

    def take(self, size: int) -> memoryview:
        """Give a buffer of `size` bytes with any content: page-aligned, or below 64 KiB a fresh one."""
        if size < _POOLED_BYTES:
            return memoryview(bytearray(size))
        mapping = self._find(size) or mmap.mmap(-1, _round_up(size), flags=_FLAGS)
        # The mapping is no ndarray, so numpy's collapsing of bases stops at `view`: every array decoded from the
        # memoryview below keeps `view` alive, and the lease ends with it.
        view = np.frombuffer(mapping, np.uint8, size)
        lease = _Lease(view, _give_back)
        lease.mapping, lease.pool = mapping, self
        self._lent[id(lease)] = lease
        return memoryview(view)  # type: ignore[arg-type]  # before 3.12 typeshed knows no buffer in it

    def idle_bytes(self) -> int:
        """How many bytes are kept for reuse now."""
        # `copy` and not `tuple`: making a tuple can start a garbage collection that appends while it is being filled.
        return sum(map(len, self._idle.copy()))

    def _find(self, size: int) -> mmap.mmap | None:
        for _ in range(len(self._idle)):
            try:
                mapping = self._idle.pop()
            except IndexError:  # another thread took it
                return None
            if size <= len(mapping) <= 2 * _round_up(size):
                return mapping
            self._idle.appendleft(mapping)
        return None

    def _give_back(self, lease: _Lease) -> None:
        self._lent.pop(id(lease), None)
        self._idle.append(lease.mapping)
        while self._idle and self.idle_bytes() > self.keep_bytes:
            try:
                self._idle.popleft()
            except IndexError:
                return


def _round_up(size: int) -> int:
    """The next multiple of an eighth of a power of two: buffers of similar size serve each other."""
    step = max(1 << (size.bit_length() - 4), mmap.PAGESIZE)
    return -(-size // step) * step
