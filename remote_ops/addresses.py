"""Which addresses a host name has, looked up on a thread of its own: the system's way has no deadline.

It opens no connection. Changing: the look-ups under way and those of the last second, under `_lock`; threads that ask
for the same name share one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeAlias, TypeVar

from remote_ops.url import Url

__all__ = ["Address", "awaited", "is_name", "look_up", "replicas_among"]

_FRESH_S = 1.0


class Address(NamedTuple):
    """What a socket of this family connects to."""

    family: int
    place: Any


Lookup: TypeAlias = "Future[tuple[Address, ...]]"
_T = TypeVar("_T")

_lock = threading.Lock()
_lookups: dict[tuple[str, int], tuple[float, Lookup]] = {}


def look_up(url: Url) -> Lookup:
    """The addresses of a URL, in the order to try them; done at once unless it has a host name.

    The future fails with an `OSError` or a `UnicodeError` where there is no such host. It cannot be cancelled.
    """
    found: Lookup = Future()
    if url.unix_path:
        found.set_result((Address(socket.AF_UNIX, url.unix_path),))
        return found
    host, port = url.address or url.host, url.port
    with contextlib.suppress(OSError, UnicodeError):
        found.set_result(_ask(host, port, socket.AI_NUMERICHOST))
        return found
    with _lock:
        since, known = _lookups.get((host, port), (0.0, found))
        if known is not found and (not known.done() or (time.monotonic() - since < _FRESH_S and not known.exception())):
            return known
        found.set_running_or_notify_cancel()  # it is shared: nobody may cancel it
        _lookups[host, port] = (time.monotonic(), found)
    threading.Thread(target=_find, args=(found, host, port), name="remote-ops-dns", daemon=True).start()
    return found


def _find(found: Lookup, host: str, port: int) -> None:
    try:
        found.set_result(_ask(host, port, 0))
    except BaseException as error:
        found.set_exception(error)


def _ask(host: str, port: int, flags: int) -> tuple[Address, ...]:
    answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    return tuple(dict.fromkeys(Address(family, place) for family, _, _, _, place in answers))


async def awaited(found: Future[_T]) -> _T:
    """Wait for one on a loop; whoever stops waiting leaves the look-up to the others."""
    if not found.done():
        loop = asyncio.get_running_loop()
        done = asyncio.Event()

        def wake(_: Future[_T]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(done.set)

        found.add_done_callback(wake)
        await done.wait()
    return found.result()


def is_name(url: Url) -> bool:
    """Whether a URL has a host name, which may stand for several machines."""
    if url.unix_path or url.address:
        return False
    with contextlib.suppress(OSError, UnicodeError):
        _ask(url.host, url.port, socket.AI_NUMERICHOST)
        return False
    return True


def replicas_among(addresses: Sequence[Address]) -> list[str]:
    """The addresses that are machines of their own: those of the first family. The others are the same, again."""
    return [str(place[0]) for family, place in addresses if family == addresses[0].family]


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()
    _lookups.clear()


os.register_at_fork(after_in_child=_after_fork)
