"""Carries one request and its reply between here and a URL, over kept connections or through `requests`.

It does not know what the bytes mean, and does not retry (but for a kept connection that the peer had already closed).

`HttpTransport`: constant are the limits and the buffer pool; the idle connections change, in deques whose operations
are atomic in CPython, so there is no lock. A forked child starts with an empty pool.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
import time
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

from remote_ops import http1
from remote_ops.buffers import BufferPool
from remote_ops.connection import (
    CONNECTING,
    READING,
    WAITING,
    AsyncConnection,
    BlockingConnection,
    Marks,
    Stale,
    expired,
    lost,
    open_on_loop,
    refused,
    seconds_left,
)
from remote_ops.deadline import Deadline
from remote_ops.errors import FramingError, SpecError, TransportError
from remote_ops.url import TLS, USER_AGENT, Url

if TYPE_CHECKING:
    import requests

__all__ = ["Call", "HttpTransport", "Phases", "Reply", "RequestsTransport", "Transport"]

Buffer: TypeAlias = "bytes | bytearray | memoryview"


class Call(NamedTuple):
    """One request: where to, which headers beyond the usual, and the body as buffers to be sent in order.

    A kept connection may turn out to be closed only once the request is on its way; then it is sent once more on a new
    one, unless it is to be sent `once`.
    """

    url: Url
    headers: Sequence[tuple[str, str]]
    body: Sequence[Buffer]
    once: bool = False


class Phases(NamedTuple):
    """How long each part of an exchange took, in seconds; `connecting_s` is None for a kept connection."""

    connecting_s: float | None
    sending_s: float
    waiting_s: float
    receiving_s: float


class Reply(NamedTuple):
    """What came back; with its `phases`, where the transport knows them."""

    status: int
    headers: Mapping[str, str]
    body: memoryview
    phases: Phases | None = None


class Transport(Protocol):
    """Carries calls; `HttpTransport` and `RequestsTransport` are two."""

    def exchange(self, call: Call, deadline: Deadline) -> Reply:
        """Send and receive on this thread; raises a `TransportError`."""

    async def aexchange(self, call: Call, deadline: Deadline) -> Reply:
        """Send and receive on this loop; raises a `TransportError`."""

    def close(self) -> None:
        """Close the idle connections."""


class _LoopPool:
    """The idle connections of one loop. They end with it: its `shutdown_asyncgens`, which `asyncio.run` calls, ends
    the guard. A connection that outlives its loop stays open for ever, or keeps uvloop from closing.
    """

    def __init__(self) -> None:
        self.kept: dict[str, deque[AsyncConnection]] = {}
        self.guard = self._until_the_loop_ends()

    async def _until_the_loop_ends(self) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            self.close()

    def close(self) -> None:
        for kept in self.kept.values():
            while kept:
                kept.pop().close()


class HttpTransport:
    """Our own HTTP/1.1: no copy of the body on either side, kept connections are used again.

    Args:
        tls: for https; the system's trust unless said.
        max_idle: most idle connections kept per address, 1 or more; for blocking calls, and again for each event loop.
        idle_s: how long an idle connection is kept, in seconds.
    """

    def __init__(self, tls: TLS | None = None, *, max_idle: int = 32, idle_s: float = 60.0) -> None:
        self._tls = tls or TLS()
        self._max_idle = max_idle
        self._idle_s = idle_s
        self._buffers = BufferPool()
        self._forget()

    def _forget(self) -> None:
        self._pid = os.getpid()
        self._context: ssl.SSLContext | None = None
        self._idle: dict[str, deque[tuple[float, BlockingConnection]]] = {}
        self._loops: dict[asyncio.AbstractEventLoop, _LoopPool] = {}

    def exchange(self, call: Call, deadline: Deadline) -> Reply:
        """Send and receive on this thread."""
        url = call.url
        head = http1.request_head(url.prefix, call.headers, sum(map(len, call.body)))
        renewed = False
        while True:
            kept = None if renewed else self._reuse(url)
            since = None if kept else time.monotonic()
            connection = kept or BlockingConnection(url, self._tls_context(url), deadline)
            try:
                message = connection.exchange(head, call.body, deadline, self._buffers)
            except Stale as stale:
                connection.close()
                if call.once:
                    raise lost(url, None, stale.phase) from None
                renewed = True
            except BaseException as error:
                connection.close()
                raise self._named(error, url) from error.__cause__
            else:
                if message.head.keep_alive and connection.whole:
                    self._keep(url, connection)
                else:
                    connection.close()
                return _reply(message, since, connection.marks)

    async def aexchange(self, call: Call, deadline: Deadline) -> Reply:
        """Send and receive on the running loop; cancelling it closes the connection."""
        head = http1.request_head(call.url.prefix, call.headers, sum(map(len, call.body)))
        renewed = False
        while True:
            since = time.monotonic()
            left = seconds_left(deadline, CONNECTING, since)
            used: list[AsyncConnection] = []
            try:
                return await asyncio.wait_for(self._attempt(call, head, used, renewed), left)
            except Stale as stale:
                if call.once:
                    raise lost(call.url, None, stale.phase) from None
                renewed = True
            except asyncio.TimeoutError as error:
                phase = used[0].phase if used else CONNECTING
                raise expired(phase, since) from error
            except TransportError as error:
                raise self._named(error, call.url) from error.__cause__

    async def _attempt(self, call: Call, head: bytes, used: list[AsyncConnection], renewed: bool) -> Reply:
        kept = await self._kept_on_loop(call.url)
        connection = None
        while kept and connection is None and not renewed:
            candidate = kept.pop()
            if candidate.dead or time.monotonic() - candidate.idle_since >= self._idle_s:
                candidate.close()
            else:
                connection = candidate
        since = None if connection else time.monotonic()
        if connection is None:
            connection = await open_on_loop(call.url, self._tls_context(call.url), self._buffers)
        used.append(connection)
        try:
            message = await connection.exchange(head, call.body)
        except BaseException:
            connection.close()
            raise
        if message.head.keep_alive and connection.whole and len(kept) < self._max_idle:
            connection.idle_since = time.monotonic()
            kept.append(connection)
        else:
            connection.close()
        return _reply(message, since, connection.marks)

    def close(self) -> None:
        """Close the idle connections; the next call opens new ones."""
        for connections in list(self._idle.values()):
            with contextlib.suppress(IndexError):  # another thread took the last
                while connections:
                    connections.pop()[1].close()
        for loop, pool in list(self._loops.items()):
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(pool.close)

    def __getstate__(self) -> dict[str, Any]:
        return {"tls": self._tls, "max_idle": self._max_idle, "idle_s": self._idle_s}

    def __setstate__(self, state: dict[str, Any]) -> None:
        HttpTransport.__init__(self, **state)

    def _tls_context(self, url: Url) -> ssl.SSLContext | None:
        if url.scheme != "https":
            return None
        if self._context is None:
            self._context = self._tls.context()
        return self._context

    def _reuse(self, url: Url) -> BlockingConnection | None:
        if os.getpid() != self._pid:
            self._forget()
        connections = self._idle.get(_address(url))
        while connections:
            try:
                since, connection = connections.pop()
            except IndexError:  # another thread took it
                return None
            if time.monotonic() - since < self._idle_s and not connection.dead():
                return connection
            connection.close()
        return None

    def _keep(self, url: Url, connection: BlockingConnection) -> None:
        connections = self._idle.setdefault(_address(url), deque())
        connections.append((time.monotonic(), connection))
        while len(connections) > self._max_idle:
            connections.popleft()[1].close()

    async def _kept_on_loop(self, url: Url) -> deque[AsyncConnection]:
        if os.getpid() != self._pid:
            self._forget()
        loop = asyncio.get_running_loop()
        pool = self._loops.get(loop)
        if pool is None:
            for other in [other for other in list(self._loops) if other.is_closed()]:
                self._loops.pop(other, None)
            pool = self._loops[loop] = _LoopPool()
            await anext(pool.guard)
        return pool.kept.setdefault(_address(url), deque())

    @staticmethod
    def _named(error: BaseException, url: Url) -> BaseException:
        """Say at which URL the peer misframed its answer; everything else says so already."""
        if isinstance(error, FramingError) and url.text not in error.message:
            return FramingError(f"the answer is not HTTP/1.1 as we accept it: {error.message} - at {url.text}")
        return error


def _reply(message: http1.Message, since: float | None, marks: Marks) -> Reply:
    began, sent, first = marks
    connecting_s = None if since is None else began - since
    phases = Phases(connecting_s, sent - began, first - sent, time.monotonic() - first)
    return Reply(message.head.status, message.head.headers, message.body, phases)


def _address(url: Url) -> str:
    return f"{url.scheme}|{url.host}|{url.port}|{url.unix_path}|{url.address}"


def _of_requests(error: requests.RequestException, url: Url, since: float) -> TransportError:
    """Our error for one of requests, whose own text shows the whole URL, its query included."""
    import requests
    from urllib3.exceptions import MaxRetryError, ReadTimeoutError

    outer = error.args[0] if error.args else None
    cause = getattr(outer, "reason", outer)
    if isinstance(error, requests.ConnectTimeout):
        return expired(CONNECTING, since)
    if isinstance(error, requests.Timeout) or isinstance(cause, ReadTimeoutError):
        return expired(WAITING, since)
    reason = f"{type(error).__name__}: {cause}" if isinstance(cause, Exception) else type(error).__name__
    if isinstance(error, requests.ConnectionError) and isinstance(outer, MaxRetryError):
        return refused(url, OSError(reason))
    if isinstance(error, requests.ConnectionError | requests.exceptions.ChunkedEncodingError):
        begun = isinstance(error, requests.exceptions.ChunkedEncodingError)
        return lost(url, OSError(reason), READING if begun else WAITING)
    return TransportError(f"{reason} - at {url.text}")


class RequestsTransport:
    """Calls through a `requests.Session`: its proxies, its authentication, its adapters. Slower: it copies the body.

    Args:
        session: configured by you, and yours to close.
    """

    def __init__(self, session: requests.Session) -> None:
        self._session = session

    def exchange(self, call: Call, deadline: Deadline) -> Reply:
        """Send and receive on this thread. Looks at the deadline between the pieces of a body, 64 KiB each."""
        import requests

        if call.url.unix_path:
            raise SpecError(f"requests knows no unix sockets: got {call.url.text}", path="transport")
        since = time.monotonic()
        left = seconds_left(deadline, CONNECTING, since)
        headers = {"Content-Type": call.url.content_type or None, "User-Agent": USER_AGENT, **dict(call.headers)}
        try:
            # A redirect would turn the POST into a GET.
            sent, body = b"".join(call.body), bytearray()
            answer = self._session.request(
                call.url.method, call.url.full,
                data=sent, headers=headers, timeout=left, allow_redirects=False, stream=True,
            )  # fmt: skip
            with answer:
                for piece in answer.iter_content(1 << 16):
                    body += piece
                    seconds_left(deadline, READING, since)
        except requests.RequestException as error:
            raise _of_requests(error, call.url, since) from None  # its text shows the whole URL
        lowered = {name.lower(): value for name, value in answer.headers.items()}
        return Reply(answer.status_code, lowered, memoryview(body))

    def __getstate__(self) -> Any:
        raise TypeError("a RequestsTransport does not pickle: its session may hold secrets; make one where it is used")

    async def aexchange(self, call: Call, deadline: Deadline) -> Reply:
        """The same on a thread of the loop's executor: requests has no awaitable form."""
        return await asyncio.get_running_loop().run_in_executor(None, self.exchange, call, deadline)

    def close(self) -> None:
        """Leave the session to its owner."""
