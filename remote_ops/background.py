"""The one loop that works in the background, and the futures of what runs there.

It knows nothing of calls. Changing, under `_lock`: the loop, begun when it is first needed. A forked child has none.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from remote_ops.connection import new_loop
from remote_ops.errors import SpecError

__all__ = ["Background", "background_loop", "on_background_loop", "result_of", "settled"]

_T = TypeVar("_T")
_PIECE_S = 1.0

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None


def background_loop() -> asyncio.AbstractEventLoop:
    """The one loop that works in the background, in a daemon thread: `submit` runs on it."""
    global _loop
    with _lock:
        if _loop is None:
            _loop = new_loop()
            threading.Thread(target=_loop.run_forever, name="remote-ops", daemon=True).start()
        return _loop


def on_background_loop() -> bool:
    """Whether this code runs on that loop, which may not wait for itself."""
    return _loop is not None and asyncio._get_running_loop() is _loop


class Background(concurrent.futures.Future[_T]):
    """The future of a coroutine on the background loop: when it is cancelled or dropped, so is the coroutine.

    The loop holds it weakly, but for one with callbacks, which somebody may wait for without holding it.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, _T]) -> None:
        super().__init__()
        self._run = _Run(background_loop(), weakref.ref(self))
        self._run.loop.call_soon_threadsafe(self._run.begin, coroutine)

    def cancel(self) -> bool:
        cancelled = super().cancel()
        if cancelled:
            self._run.give_up()
        return cancelled

    def add_done_callback(self, fn: Callable[[concurrent.futures.Future[_T]], object]) -> None:
        if not self.done():
            self._run.held = self
        super().add_done_callback(fn)

    def __del__(self) -> None:
        if not self.done():
            self._run.give_up()


class _Run:
    """What the loop knows of a `Background`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, future: weakref.ref[Background[Any]]) -> None:
        self.loop = loop
        self.held: Background[Any] | None = None
        self._future = future
        self._task: asyncio.Task[Any] | None = None

    def begin(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        self._task = self.loop.create_task(coroutine)
        self._task.add_done_callback(self._end)

    def give_up(self) -> None:
        if self.loop is _loop:  # or this is a child, and the loop is its parent's
            self.loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _end(self, task: asyncio.Task[Any]) -> None:
        future, self.held = self._future(), None
        error = None if task.cancelled() else task.exception()
        if future is None:
            return
        if task.cancelled():
            future.cancel()
        if future.set_running_or_notify_cancel():
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(task.result())


def result_of(future: concurrent.futures.Future[_T]) -> _T:
    """Wait for a call in the background, and give it up if the wait is interrupted.

    Raises:
        SpecError: this is the background loop, which can do nothing while it is waited on.
    """
    try:
        if on_background_loop():
            raise SpecError(
                "this waits on the loop that has to do the work, and would for ever: call it from a thread "
                "('run_in: thread' of a python node), or await it"
            )
        return settled(future).result()
    finally:
        future.cancel()  # Ctrl-C ends the wait


def settled(future: concurrent.futures.Future[_T], timeout_s: float = math.inf) -> concurrent.futures.Future[_T]:
    """Wait for a future, as long as it takes or may take, and give it.

    It waits in pieces: a signal that comes just before a wait begins is noticed only at its end.
    """
    until = time.monotonic() + timeout_s
    while not future.done() and (left_s := until - time.monotonic()) > 0:
        with contextlib.suppress(concurrent.futures.TimeoutError, concurrent.futures.CancelledError):
            future.exception(min(left_s, _PIECE_S))
    return future


def _after_fork() -> None:
    """A lock held by another thread at the fork stays held in the child, and the loop's thread is gone."""
    global _lock, _loop
    _lock = threading.Lock()
    _loop = None


os.register_at_fork(after_in_child=_after_fork)
