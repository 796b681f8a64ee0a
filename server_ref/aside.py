"""A few threads for what would hold up everybody on the loop: bodies that must be decompressed or read as text.

It knows no requests. Everything but the work itself happens on the loop's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

__all__ = ["Aside"]


class Aside:
    """Does work off the loop, in the order asked, a few pieces at a time.

    Args:
        threads: how many pieces; they are started when first needed.
    """

    def __init__(self, threads: int = 2) -> None:
        self._threads = ThreadPoolExecutor(threads, "server_ref aside")
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Tell what becomes of the work on this loop."""
        self._loop = loop

    def stop(self) -> None:
        """Do no more; what is being done ends unheard."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def submit(self, work: Callable[[], Any], done: Callable[[Any], None]) -> None:
        """Do `work`; `done` is told what it gives, or the exception that it raises, on the loop."""

        def tell(future: Future[Any]) -> None:
            if not future.cancelled() and self._loop is not None:
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                    self._loop.call_soon_threadsafe(done, future.exception() or future.result())

        self._threads.submit(work).add_done_callback(tell)
