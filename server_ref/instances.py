"""Runs a servable outside the loop, as many calls at a time as its device has room for.

It does not know sockets or messages: a job goes in, its outcome comes back on the loop. More threads than the device
has room for would only add memory and switches.

Constant: the threads. Changing: `_jobs`, a thread-safe queue, and `pending`, touched on the loop only.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
from collections.abc import Callable
from typing import Any

from remote_ops.errors import Overloaded

__all__ = ["Job", "Lanes", "room_for"]


class Job:
    """One call on its way to a lane: `run` on the lane's thread, then `done(outcome)` on the loop unless cancelled."""

    __slots__ = ("cancelled", "done", "run")

    def __init__(self, run: Callable[[], Any], done: Callable[[Any], None]) -> None:
        self.run = run
        self.done = done
        self.cancelled = False


class Lanes:
    """Threads that take jobs in the order of arrival.

    Args:
        name: of the threads, for whoever looks at a dump.
        concurrency: how many jobs run at a time, 1 or more.
        max_queue: most jobs that wait or run, before further ones are refused.
    """

    def __init__(self, name: str, concurrency: int, *, max_queue: int = 1024) -> None:
        self.concurrency = max(1, concurrency)
        self.max_queue = max_queue
        self.pending = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{index}", daemon=True)
            for index in range(self.concurrency)
        ]

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the threads; outcomes are delivered on `loop`."""
        self._loop = loop
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job. Call it on the loop.

        Raises:
            Overloaded: `max_queue` jobs wait or run already.
        """
        if self.pending >= self.max_queue:
            raise Overloaded(f"{self.pending} requests wait already: expected at most {self.max_queue}")
        self.pending += 1
        self._jobs.put(job)

    def stop(self) -> None:
        """Let the threads end once the queue is empty; a job that runs is not interrupted."""
        for _ in self._threads:
            self._jobs.put(None)

    def _work(self) -> None:
        assert self._loop is not None
        while (job := self._jobs.get()) is not None:
            outcome = None if job.cancelled else job.run()
            try:
                self._loop.call_soon_threadsafe(self._deliver, job, outcome)
            except RuntimeError:  # the loop is closed: nobody waits any more
                return
            del job, outcome  # while this thread waits for the next one, nothing of the last may stay alive

    def _deliver(self, job: Job, outcome: Any) -> None:
        self.pending -= 1
        if not job.cancelled:
            job.done(outcome)


def room_for(servable: Any) -> int:
    """How many calls of `servable` may run at a time: what it says itself, else one per core."""
    return int(getattr(servable, "concurrency", 0)) or os.cpu_count() or 1
