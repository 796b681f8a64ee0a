"""How many runs may be at one node: places there, and who waits for one.

It runs nothing. Changing, on the loop only: which runs have a place, and which wait.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

from remote_ops.deadline import Deadline
from remote_ops.errors import DeadlineExceeded, Overloaded

__all__ = ["Slot", "Slots"]

_LONGEST_S = 1e6  # what a timer of asyncio can still count


class Slot:
    """A place at a node, held until the model is done, whoever still waits for it."""

    def __init__(self) -> None:
        self.thread: concurrent.futures.Future[Any] | None = None


class Slots:
    """The places at one node.

    Args:
        node: its name.
        max_inflight: how many places there are.
        max_queued: how many runs may wait for one, besides those that have one; None for any number.
    """

    def __init__(self, node: str, max_inflight: int, max_queued: int | None) -> None:
        self._node = node
        self._max_inflight = max_inflight
        self._max_queued = max_queued
        self._free = asyncio.Semaphore(max_inflight)
        self._inside: Counter[Any] = Counter()
        self._waiting: Counter[Any] = Counter()

    @contextlib.asynccontextmanager
    async def taken(self, run: Any, bound: Deadline) -> AsyncIterator[Slot]:
        """Have a place; `run` is whom it is for. Another call of a run that is here already always waits.

        Raises:
            Overloaded: as many runs as may wait do so already.
            DeadlineExceeded: there was no place until the deadline.
        """
        if self._free.locked():
            self._require_room(run)
        await self._wait(run, bound)
        slot = Slot()
        self._inside[run] += 1
        try:
            yield slot
        finally:
            self._leave(run, slot)

    def _require_room(self, run: Any) -> None:
        if self._max_queued is None or run in self._inside or run in self._waiting:
            return
        queued = sum(one not in self._inside for one in self._waiting)
        if queued >= self._max_queued:
            raise Overloaded(f"'{self._node}' has {self._max_inflight} calls in flight and {queued} runs that wait")

    async def _wait(self, run: Any, bound: Deadline) -> None:
        self._waiting[run] += 1
        try:
            await asyncio.wait_for(self._free.acquire(), min(max(0.0, bound.remaining()), _LONGEST_S))
        except asyncio.TimeoutError:
            text = f"'{self._node}': its {self._max_inflight} slots were taken until the end"
            raise DeadlineExceeded(text) from None
        finally:
            _take_one(self._waiting, run)

    def _leave(self, run: Any, slot: Slot) -> None:
        """Give a place back; where a thread is still at it, when that ends."""
        if slot.thread is None or slot.thread.done():
            return self._release(run)
        loop = asyncio.get_running_loop()
        return slot.thread.add_done_callback(lambda _: loop.call_soon_threadsafe(self._release, run))

    def _release(self, run: Any) -> None:
        _take_one(self._inside, run)
        self._free.release()


def _take_one(counts: Counter[Any], run: Any) -> None:
    counts[run] -= 1
    if not counts[run]:
        del counts[run]
