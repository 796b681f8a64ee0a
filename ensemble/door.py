"""Who may run: so many runs at a time, so many that wait, and so many bytes; whoever comes beyond that is told at once.

It runs nothing. Changing, on the loop only: what runs, and who waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import weakref
from collections import deque
from collections.abc import AsyncIterator

from remote_ops.deadline import Deadline
from remote_ops.errors import DeadlineExceeded, Overloaded

__all__ = ["Door"]

_LONGEST_S = 1e6  # what a timer of asyncio can still count


class Door:
    """Lets runs in, first come first served.

    Args:
        max_inflight: runs at a time.
        max_queued: runs that wait beyond that.
        max_bytes: of the inputs of all that run; None for any number. One run alone may have more.
    """

    def __init__(self, max_inflight: int, max_queued: int, max_bytes: int | None) -> None:
        self._max_inflight = max_inflight
        self._max_queued = max_queued
        self._max_bytes = max_bytes
        self.refused = 0
        self._begin()
        _DOORS.add(self)

    def _begin(self) -> None:
        """Start with nobody inside; a forked child does so anew, since the runs of its parent do not go on there."""
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self.inflight = 0
        self.bytes = 0

    @property
    def queued(self) -> int:
        """How many wait."""
        return len(self._waiting)

    @contextlib.asynccontextmanager
    async def entered(self, size: int, bound: Deadline, graph: str) -> AsyncIterator[None]:
        """Be inside with inputs of `size` bytes.

        Raises:
            Overloaded: too many wait already.
            DeadlineExceeded: there was no room until the deadline.
        """
        if self._waiting or not self._has_room(size):
            await self._wait(size, bound, graph)
        else:
            self._let_in(size)
        try:
            yield
        finally:
            self._leave(size)

    def _has_room(self, size: int) -> bool:
        fits = self._max_bytes is None or not self.inflight or self.bytes + size <= self._max_bytes
        return self.inflight < self._max_inflight and fits

    def _let_in(self, size: int) -> None:
        self.inflight += 1
        self.bytes += size

    async def _wait(self, size: int, bound: Deadline, graph: str) -> None:
        if len(self._waiting) >= self._max_queued:
            self.refused += 1
            raise Overloaded(f"'{graph}' has {self.inflight} runs in flight and {len(self._waiting)} that wait")
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (size, turn)
        self._waiting.append(entry)
        try:
            await asyncio.wait_for(turn, min(max(0.0, bound.remaining()), _LONGEST_S))
        except BaseException as error:
            if entry in self._waiting:
                self._waiting.remove(entry)
                self._next()  # those behind it may need less
            elif turn.done() and not turn.cancelled():  # let in, and given up at the same moment
                self._leave(size)
            if isinstance(error, asyncio.TimeoutError):
                raise DeadlineExceeded(
                    f"no answer from '{graph}': there was no room for one more run in time"
                ) from None
            raise

    def _leave(self, size: int) -> None:
        self.inflight -= 1
        self.bytes -= size
        self._next()

    def _next(self) -> None:
        while self._waiting and self._has_room(self._waiting[0][0]):
            size, turn = self._waiting.popleft()
            if not turn.done():
                self._let_in(size)
                turn.set_result(None)


_DOORS: weakref.WeakSet[Door] = weakref.WeakSet()


def _after_fork() -> None:
    for door in list(_DOORS):
        door._begin()


os.register_at_fork(after_in_child=_after_fork)
