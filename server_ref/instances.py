"""Runs a servable outside the loop, as many calls at a time as its device has room for.

It does not know sockets or messages: a job goes in, its outcome comes back on the loop. More threads than the device
has room for would only add memory and switches.

Constant: the threads. Changing: `_waiting`, `_idle` and `_stopped`, guarded by `_lock`; `pending`, touched on the loop
only.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections import deque
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


class _Lane:
    """One thread's inbox: a job, and the lock it sleeps on until there is one."""

    __slots__ = ("job", "wake")

    def __init__(self) -> None:
        self.job: Job | None = None
        self.wake = threading.Lock()
        self.wake.acquire()


class Lanes:
    """Threads that take jobs in the order of arrival; the one that went idle last is woken first.

    Args:
        name: of the threads, for whoever looks at a dump.
        concurrency: how many jobs run at a time, 1 or more.
        max_queue: most jobs that wait or run, before further ones are refused.
    """

    def __init__(self, name: str, concurrency: int, *, max_queue: int = 1024) -> None:
        self.concurrency = max(1, concurrency)
        self.max_queue = max_queue
        self.pending = 0
        self._name = name
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()
        self._waiting: deque[Job] = deque()
        self._idle: list[_Lane] = []
        self._stopped = False

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the threads; outcomes are delivered on `loop`."""
        self._loop = loop
        for index in range(self.concurrency):
            lane = _Lane()
            self._idle.append(lane)
            threading.Thread(target=self._work, args=(lane,), name=f"{self._name}-{index}", daemon=True).start()

    def submit(self, job: Job) -> None:
        """Hand a job to an idle lane, or queue it. Call it on the loop.

        Raises:
            Overloaded: `max_queue` jobs wait or run already.
        """
        if self.pending >= self.max_queue:
            raise Overloaded(f"{self.pending} requests wait already: expected at most {self.max_queue}")
        self.pending += 1
        with self._lock:
            if not self._idle:
                self._waiting.append(job)
                return
            lane = self._idle.pop()
        lane.job = job
        lane.wake.release()

    def cancel(self, job: Job) -> None:
        """Give a job up: if it waits, others get its place; if it runs, it is not interrupted. Call it on the loop."""
        job.cancelled = True
        with self._lock, contextlib.suppress(ValueError):
            self._waiting.remove(job)
            self.pending -= 1

    def stop(self) -> None:
        """Let the threads end; a job that runs is not interrupted, and its outcome is dropped."""
        with self._lock:
            self._stopped = True
            self._waiting.clear()
            idle, self._idle = self._idle, []
        for lane in idle:
            lane.wake.release()

    def _work(self, lane: _Lane) -> None:
        assert self._loop is not None
        while True:
            lane.wake.acquire()
            job, lane.job = lane.job, None
            while job is not None:
                outcome = None if job.cancelled else job.run()  # it does not raise
                following = self._next(lane)  # if there is none, `lane.job` is the loop's to set from now on
                try:
                    self._loop.call_soon_threadsafe(self._deliver, job, outcome)
                except RuntimeError:  # the loop is closed: nobody waits any more
                    return
                job = following
                del following, outcome  # while this thread waits, nothing of the last job may stay alive
            if self._stopped:
                return

    def _next(self, lane: _Lane) -> Job | None:
        with self._lock:
            if self._waiting:
                return self._waiting.popleft()
            if not self._stopped:
                self._idle.append(lane)
            return None

    def _deliver(self, job: Job, outcome: Any) -> None:
        self.pending -= 1
        if not job.cancelled:
            job.done(outcome)


def room_for(servable: Any) -> int:
    """How many calls of `servable` may run at a time: what it says itself, else one per core."""
    return int(getattr(servable, "concurrency", 0)) or os.cpu_count() or 1
