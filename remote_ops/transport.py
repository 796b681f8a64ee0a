"""Moves one request and its reply between here and a URL: blocking on the caller's thread, or on the caller's loop.

Both drivers run the same framing (`http1`) over pooled keep-alive connections: http, https and
`http+unix://%2Fpath.sock/model`. It does not know what the bytes mean, does not retry (but for a kept connection that
the peer had already closed), and reads no clock but the deadline's.

`HttpTransport`: constant are the limits and the buffer pool; the idle connections change, in deques whose operations
are atomic in CPython, so there is no lock. A forked child starts with an empty pool.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import select
import socket
import ssl
import time
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias
from urllib.parse import unquote, urlsplit

from remote_ops import http1
from remote_ops.buffers import BufferPool
from remote_ops.deadline import Deadline
from remote_ops.errors import ConnectError, ConnectionLost, DeadlineExceeded, FramingError, SpecError, TransportError

if TYPE_CHECKING:
    import requests

__all__ = ["TLS", "Call", "HttpTransport", "Reply", "RequestsTransport", "Transport", "Url", "write_buffers"]

Buffer: TypeAlias = "bytes | bytearray | memoryview"
_IOV_MAX = 512
_SLICE_BYTES = 1 << 20
_SOON_S = 300e-6
_USER_AGENT = "remote-ops/0.1"


class Url(NamedTuple):
    """Where a request goes. `host` and `port` are empty for a unix socket, `unix_path` for all others.

    `text` is for messages: a query, which may hold a secret, is left out of it; `full` is what was given.
    """

    text: str
    full: str
    scheme: str
    host: str
    port: int
    unix_path: str
    target: str
    prefix: bytes

    @classmethod
    def parse(cls, text: str) -> Url:
        """Read `http://host[:port]/path`, `https://...` or `http+unix://%2Fpath.sock/path`.

        Raises:
            SpecError: no such URL, or one that carries a user name or a password.
        """
        full = text
        try:
            parts = urlsplit(full)
        except ValueError:  # its text may hold what the URL holds
            raise SpecError("no URL of a model: it is malformed", path="url") from None
        if "@" in parts.netloc:
            raise SpecError(
                "a URL with a user name or password: pass headers={'Authorization': ...} instead", path="url"
            )
        text = full.split("?")[0] + ("?..." if parts.query else "")
        if parts.scheme not in ("http", "https", "http+unix"):
            raise SpecError(f"no URL of a model: expected http://, https:// or http+unix://, got {text!r}", path="url")
        if any(ord(char) <= 32 or ord(char) == 127 for char in full):
            raise SpecError(f"a URL with a space or a control character: {text!r}", path="url")
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        if parts.scheme == "http+unix":
            unix_path = unquote(parts.netloc)
            if not unix_path.startswith("/"):
                raise SpecError(f"expected http+unix://%2Fpath.sock/model, got {text!r}", path="url")
            return cls(text, full, parts.scheme, "", 0, unix_path, target, _prefix(target, "localhost"))
        try:
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError as error:
            raise SpecError(f"a port that is no number below 65536: {text!r}", path="url") from error
        if not parts.hostname:
            raise SpecError(f"a URL without a host: {text!r}", path="url")
        return cls(text, full, parts.scheme, parts.hostname, port, "", target, _prefix(target, parts.netloc))


def _prefix(target: str, host: str) -> bytes:
    try:
        return (
            f"POST {target} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: {_USER_AGENT}\r\n"
            "Content-Type: application/octet-stream\r\n"
        ).encode("ascii")
    except UnicodeEncodeError as error:
        raise SpecError(f"a URL is ASCII: quote {target!r} or {host!r} first", path="url") from error


class Call(NamedTuple):
    """One POST: where to, which headers beyond the usual, and the body as buffers to be sent in order."""

    url: Url
    headers: Sequence[tuple[str, str]]
    body: Sequence[Buffer]


class Reply(NamedTuple):
    """What came back."""

    status: int
    headers: Mapping[str, str]
    body: memoryview


class Transport(Protocol):
    """Carries calls; `HttpTransport` and `RequestsTransport` are two."""

    def exchange(self, call: Call, deadline: Deadline) -> Reply:
        """Send and receive on this thread; raises a `TransportError`."""

    async def aexchange(self, call: Call, deadline: Deadline) -> Reply:
        """Send and receive on this loop; raises a `TransportError`."""

    def close(self) -> None:
        """Close the idle connections."""


@dataclass(frozen=True)
class TLS:
    """How https is trusted and who we are. Certificates are checked, host name included, unless `verify` is False.

    Args:
        ca: path of a file of CA certificates (PEM) to trust instead of the system's.
        cert, key: paths of the client certificate and its key (PEM), for servers that ask who calls.
        password: of the key. It is not shown, and not pickled.
        verify: False trusts anybody; for tests.

    Raises:
        SpecError: a file is missing or is no such certificate; at the first connection.
    """

    ca: str | None = None
    cert: str | None = None
    key: str | None = None
    password: str | None = field(default=None, repr=False)
    verify: bool = True

    def context(self) -> ssl.SSLContext:
        """Build the context; reads the files."""
        try:
            context = ssl.create_default_context(cafile=self.ca)
            if self.cert:
                context.load_cert_chain(self.cert, self.key, self.password or "")
        except (OSError, ssl.SSLError) as error:
            raise SpecError(f"these certificates do not load: {error}", path=f"{self!r}") from error
        if not self.verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "password": None}


# --------------------------------------------------------------------------- errors, the one seam to the system's


def _expired(phase: str, since: float) -> DeadlineExceeded:
    return DeadlineExceeded(f"{time.monotonic() - since:.3f} s {phase}")


def _refused(url: Url, error: BaseException) -> ConnectError:
    where = url.unix_path or f"{url.host}:{url.port}"
    reason = str(error) or type(error).__name__
    if isinstance(error, ConnectionError) and error.errno:
        reason = os.strerror(error.errno)  # asyncio puts the address there
    elif isinstance(error, OSError) and error.strerror:
        reason = error.strerror
    return ConnectError(f"cannot connect to {where} ({reason}) - at {url.text}")


def _lost(url: Url, error: BaseException | None, phase: str) -> ConnectionLost:
    reason = f" ({error})" if error is not None and str(error) else ""
    return ConnectionLost(f"the connection ended while {phase}{reason} - at {url.text}")


CONNECTING = "connecting"
WRITING = "sending the request"
WAITING = "waiting for the first byte"
READING = "receiving the answer"


class _Answered(Exception):
    """The answer came before all of the request was sent; never leaves this module."""


class _Stale(Exception):
    """A kept connection that the peer had closed before it saw this request; never leaves this module."""


# --------------------------------------------------------------------------- blocking


class _BlockingConnection:
    """One socket, non-blocking underneath: try first, poll until the deadline only if there is nothing yet."""

    def __init__(self, url: Url, context: ssl.SSLContext | None, deadline: Deadline) -> None:
        self.url = url
        self._poll = select.poll()
        self._sock = self._connect(context, deadline)
        self._tls = isinstance(self._sock, ssl.SSLSocket)
        self._poll.register(self._sock, select.POLLIN)
        self._reader: http1.Reader | None = None
        self.used = False
        self.whole = True
        self._answers_soon = False

    def _connect(self, context: ssl.SSLContext | None, deadline: Deadline) -> socket.socket:
        since = time.monotonic()
        last: BaseException = OSError("no address")
        for family, address in _addresses(self.url):
            sock = socket.socket(family, socket.SOCK_STREAM)
            try:
                sock.settimeout(_seconds(deadline, CONNECTING, since))
                sock.connect(address)
                if family != socket.AF_UNIX:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if context is not None:
                    sock.settimeout(_seconds(deadline, CONNECTING, since))
                    sock = context.wrap_socket(sock, server_hostname=self.url.host)
                sock.setblocking(False)
                return sock
            except TimeoutError as error:
                sock.close()
                raise _expired(CONNECTING, since) from error
            except OSError as error:
                sock.close()
                last = error
        raise _refused(self.url, last) from last

    def close(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # no socket yet, if connecting failed
            self._sock.close()

    __del__ = close  # an endpoint that is dropped takes its kept connections along

    def dead(self) -> bool:
        """Whether the peer has closed it, or sent what nobody asked for."""
        return bool(self._poll.poll(0))

    def exchange(self, head: bytes, body: Sequence[Buffer], deadline: Deadline, pool: BufferPool) -> http1.Message:
        if self._reader is None:
            self._reader = http1.Reader("response", allocate=pool.take)
        reader = self._reader
        since = time.monotonic()
        failed: OSError | None = None
        try:
            self.whole = self._send([head, *body], reader, deadline, since)
        except DeadlineExceeded:
            raise
        except OSError as error:
            self.whole, failed = False, error  # it may have answered before it hung up
        since = time.monotonic()
        if reader.idle:
            self._await_first_byte(deadline, since)
        while not reader.complete:
            try:
                size = self._receive(reader, deadline, since)
            except DeadlineExceeded:
                raise
            except OSError as error:
                raise self._gone(reader, error) from error
            if size:
                if reader.idle:
                    self._answers_soon = time.monotonic() - since < _SOON_S
                reader.received(size)
            elif not self._ended_well(reader):
                raise self._gone(reader, failed)
        self.used = True
        message = reader.take()
        self.whole = self.whole and reader.idle  # what follows an answer unasked is no answer to the next call
        return message

    def _await_first_byte(self, deadline: Deadline, since: float) -> None:
        """Watch for the answer instead of sleeping, if the last one came soon: waking up would cost as much again."""
        if self._answers_soon:
            while time.monotonic() - since < _SOON_S:
                if self._poll.poll(0):
                    return
        if not self._tls:  # which may hold bytes that the socket does not show
            self._wait(select.POLLIN, deadline, WAITING, since)

    def _ended_well(self, reader: http1.Reader) -> bool:
        try:
            return reader.eof()
        except FramingError:
            return False

    def _gone(self, reader: http1.Reader, error: BaseException | None) -> Exception:
        if self.used and reader.idle:
            return _Stale()
        return _lost(self.url, error, WAITING if reader.idle else READING)

    def _receive(self, reader: http1.Reader, deadline: Deadline, since: float) -> int:
        into = reader.buffer()
        while True:
            try:
                return self._sock.recv_into(into)
            except (BlockingIOError, ssl.SSLWantReadError):
                self._wait(select.POLLIN, deadline, WAITING if reader.idle else READING, since)
            except ssl.SSLWantWriteError:
                self._wait(select.POLLOUT, deadline, READING, since)

    def _send(self, parts: list[Buffer], reader: http1.Reader, deadline: Deadline, since: float) -> bool:
        """Send all of it; False if the peer answers before it has, and so does not want the rest."""
        if self._tls:
            return self._send_tls(parts, deadline, since)
        while parts:
            try:
                sent = self._sock.sendmsg(parts[:_IOV_MAX])
            except BlockingIOError:
                events = self._wait(select.POLLIN | select.POLLOUT, deadline, WRITING, since)
                if events & select.POLLIN and self._answers_already(reader):
                    return False
                continue
            while parts and sent >= (size := len(parts[0])):
                sent -= size
                del parts[0]
            if parts and sent:
                parts[0] = memoryview(parts[0])[sent:]
        return True

    def _answers_already(self, reader: http1.Reader) -> bool:
        """Whether what came while we send is more than an interim answer."""
        size = self._sock.recv_into(reader.buffer())
        reader.received(size)
        return not size or not reader.idle

    def _send_tls(self, parts: list[Buffer], deadline: Deadline, since: float) -> bool:
        for part in parts:
            view = memoryview(part)
            while view:
                try:
                    view = view[self._sock.send(view[:_SLICE_BYTES]) :]
                except ssl.SSLWantWriteError:
                    self._wait(select.POLLOUT, deadline, WRITING, since)
                except ssl.SSLWantReadError:
                    self._wait(select.POLLIN, deadline, WRITING, since)
        return True

    def _wait(self, events: int, deadline: Deadline, phase: str, since: float) -> int:
        timeout_s = _seconds(deadline, phase, since)
        if events != select.POLLIN:
            self._poll.modify(self._sock, events)
        try:
            ready = self._poll.poll(None if timeout_s is None else math.ceil(timeout_s * 1000))
        finally:
            if events != select.POLLIN:
                self._poll.modify(self._sock, select.POLLIN)
        if not ready:
            raise _expired(phase, since)
        return ready[0][1]


def _seconds(deadline: Deadline, phase: str, since: float) -> float | None:
    left = deadline.remaining()
    if left <= 0:
        raise _expired(phase, since)
    return None if math.isinf(left) else left


def _addresses(url: Url) -> list[tuple[int, Any]]:
    if url.unix_path:
        return [(socket.AF_UNIX, url.unix_path)]
    try:
        found = socket.getaddrinfo(url.host, url.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise _refused(url, error) from error
    return [(family, address) for family, _, _, _, address in found]


# --------------------------------------------------------------------------- asyncio


async def write_buffers(transport: asyncio.WriteTransport, parts: Sequence[Buffer], drained: Any) -> None:
    """Write buffers in order without joining them; `drained()` is awaited where the transport would copy.

    uvloop takes a list of buffers and copies none. The transports of the standard library copy what the socket does
    not take at once, so they are fed a slice at a time.
    """
    if type(transport).__module__.startswith("uvloop"):
        transport.writelines(parts)
        return
    if sum(map(len, parts)) <= _SLICE_BYTES:
        transport.write(b"".join(parts))
        return
    for part in parts:
        view = memoryview(part)
        for start in range(0, len(view), _SLICE_BYTES):
            transport.write(view[start : start + _SLICE_BYTES])
            await drained()


class _AsyncConnection(asyncio.BufferedProtocol):
    """One connection of one loop: one exchange at a time, whose answer is a future."""

    def __init__(self, url: Url, pool: BufferPool) -> None:
        self.url = url
        self.used = False
        self.phase = CONNECTING
        self._reader = http1.Reader("response", allocate=pool.take)
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[http1.Message] | None = None
        self._writable: asyncio.Future[None] | None = None
        self._paused = False
        self._lost: BaseException | None = None
        self._cut_short = False
        self.idle_since = 0.0

    # the loop calls these

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "writelines")
        self._transport = transport  # type: ignore[assignment]

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._reader.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        try:
            self._reader.received(nbytes)
        except FramingError as error:
            return self._fail(error)
        self.phase = READING
        if self._reader.complete:
            self._finish()
        return None

    def eof_received(self) -> bool:
        with contextlib.suppress(FramingError):
            if self._reader.eof():
                self._finish()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = exc or ConnectionResetError("closed by the peer")
        self._fail(_Stale() if self.used and self._reader.idle else _lost(self.url, exc, self.phase))

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._wake_writer()

    def _wake_writer(self) -> None:
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)

    # the transport calls these

    @property
    def dead(self) -> bool:
        return (
            self._transport is None or self._lost is not None or self._transport.is_closing() or not self._reader.idle
        )

    @property
    def whole(self) -> bool:
        """Whether all of the request is sent: the peer would read the rest as the beginning of the next one."""
        return not self._cut_short and self._transport is not None and not self._transport.get_write_buffer_size()

    def close(self) -> None:
        if self.phase is WAITING and not self.whole:
            self.phase = WRITING
        if self._answer is not None:
            self._answer.cancel()
        if self._transport is not None:
            self._transport.abort()

    async def exchange(self, head: bytes, body: Sequence[Buffer]) -> http1.Message:
        self.phase = WRITING
        assert self._transport is not None
        self._answer = asyncio.get_running_loop().create_future()
        try:
            await write_buffers(self._transport, [head, *body], self._drained)
        except _Answered:
            self._cut_short = True
        if self.phase is WRITING:
            self.phase = WAITING
        try:
            return await self._answer
        finally:
            self.used = True

    async def _drained(self) -> None:
        assert self._answer is not None
        if self._paused and not self._answer.done():
            self._writable = asyncio.get_running_loop().create_future()
            await self._writable
        if self._answer.done():
            raise _Answered

    def _finish(self) -> None:
        message = self._reader.take()
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(message)
            self._wake_writer()
        elif self._transport is not None:
            self._transport.abort()  # an answer that nobody asked for

    def _fail(self, error: BaseException) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)
        self._wake_writer()
        if self._transport is not None:
            self._transport.abort()


async def _open(url: Url, context: ssl.SSLContext | None, pool: BufferPool) -> _AsyncConnection:
    loop = asyncio.get_running_loop()
    try:
        if url.unix_path:
            _, connection = await loop.create_unix_connection(lambda: _AsyncConnection(url, pool), url.unix_path)
            return connection
        host = url.host if context is not None else None
        transport, connection = await loop.create_connection(
            lambda: _AsyncConnection(url, pool), url.host, url.port, ssl=context, server_hostname=host
        )
    except OSError as error:
        raise _refused(url, error) from error
    sock = transport.get_extra_info("socket")
    if sock is not None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


class _LoopPool:
    """The idle connections of one loop. They end with it: its `shutdown_asyncgens`, which `asyncio.run` calls, ends
    the guard. A connection that outlives its loop stays open for ever, or keeps uvloop from closing.
    """

    def __init__(self) -> None:
        self.kept: dict[str, deque[_AsyncConnection]] = {}
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


# --------------------------------------------------------------------------- the transports


class HttpTransport:
    """Our own HTTP/1.1: no copy of the body on either side, one pool of kept connections per thread model and host.

    Args:
        tls: for https; the system's trust unless said.
        max_idle: most idle connections kept per address, 1 or more.
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
        self._idle: dict[str, deque[tuple[float, _BlockingConnection]]] = {}
        self._loops: dict[asyncio.AbstractEventLoop, _LoopPool] = {}

    def exchange(self, call: Call, deadline: Deadline) -> Reply:
        """Send and receive on this thread."""
        url = call.url
        head = http1.request_head(url.prefix, call.headers, sum(map(len, call.body)))
        while True:
            connection = self._reuse(url) or _BlockingConnection(url, self._tls_context(url), deadline)
            try:
                message = connection.exchange(head, call.body, deadline, self._buffers)
            except _Stale:
                connection.close()
                continue
            except BaseException as error:
                connection.close()
                raise self._named(error, url) from error.__cause__
            if message.head.keep_alive and connection.whole:
                self._keep(url, connection)
            else:
                connection.close()
            return Reply(message.head.status, message.head.headers, message.body)

    async def aexchange(self, call: Call, deadline: Deadline) -> Reply:
        """Send and receive on the running loop; cancelling it closes the connection."""
        head = http1.request_head(call.url.prefix, call.headers, sum(map(len, call.body)))
        while True:
            since = time.monotonic()
            left = _seconds(deadline, CONNECTING, since)
            used: list[_AsyncConnection] = []
            try:
                return await asyncio.wait_for(self._attempt(call, head, used), left)
            except _Stale:
                continue
            except asyncio.TimeoutError as error:
                phase = used[0].phase if used else CONNECTING
                raise _expired(phase, since) from error
            except TransportError as error:
                raise self._named(error, call.url) from error.__cause__

    async def _attempt(self, call: Call, head: bytes, used: list[_AsyncConnection]) -> Reply:
        kept = await self._kept_on_loop(call.url)
        connection = None
        while kept and connection is None:
            candidate = kept.pop()
            if candidate.dead or time.monotonic() - candidate.idle_since >= self._idle_s:
                candidate.close()
            else:
                connection = candidate
        if connection is None:
            connection = await _open(call.url, self._tls_context(call.url), self._buffers)
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
        return Reply(message.head.status, message.head.headers, message.body)

    def close(self) -> None:
        """Close the idle connections; the next call opens new ones."""
        for connections in self._idle.values():
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

    def _reuse(self, url: Url) -> _BlockingConnection | None:
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

    def _keep(self, url: Url, connection: _BlockingConnection) -> None:
        connections = self._idle.setdefault(_address(url), deque())
        connections.append((time.monotonic(), connection))
        while len(connections) > self._max_idle:
            connections.popleft()[1].close()

    async def _kept_on_loop(self, url: Url) -> deque[_AsyncConnection]:
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


def _address(url: Url) -> str:
    return f"{url.scheme}|{url.host}|{url.port}|{url.unix_path}"


def _of_requests(error: requests.RequestException, url: Url, since: float) -> TransportError:
    """Our error for one of requests, whose own text shows the whole URL, its query included."""
    import requests
    from urllib3.exceptions import MaxRetryError, ReadTimeoutError

    outer = error.args[0] if error.args else None
    cause = getattr(outer, "reason", outer)
    if isinstance(error, requests.ConnectTimeout):
        return _expired(CONNECTING, since)
    if isinstance(error, requests.Timeout) or isinstance(cause, ReadTimeoutError):
        return _expired(WAITING, since)
    reason = f"{type(error).__name__}: {cause}" if isinstance(cause, Exception) else type(error).__name__
    if isinstance(error, requests.ConnectionError) and isinstance(outer, MaxRetryError):
        return _refused(url, OSError(reason))
    if isinstance(error, requests.ConnectionError | requests.exceptions.ChunkedEncodingError):
        return _lost(url, OSError(reason), WAITING)
    return TransportError(f"{reason} - at {url.text}")


class RequestsTransport:
    """Calls through a `requests.Session`: its proxies, its authentication, its adapters. Slower: it copies the body.

    Args:
        session: configured by you, and yours to close.
    """

    def __init__(self, session: requests.Session) -> None:
        self._session = session

    def exchange(self, call: Call, deadline: Deadline) -> Reply:
        """Send and receive on this thread. The deadline bounds each wait for a byte, not their sum."""
        import requests

        since = time.monotonic()
        left = _seconds(deadline, CONNECTING, since)
        headers = {"Content-Type": "application/octet-stream", "User-Agent": _USER_AGENT, **dict(call.headers)}
        try:
            # A redirect would turn the POST into a GET.
            answer = self._session.post(
                call.url.full, data=b"".join(call.body), headers=headers, timeout=left, allow_redirects=False
            )
        except requests.RequestException as error:
            raise _of_requests(error, call.url, since) from error
        lowered = {name.lower(): value for name, value in answer.headers.items()}
        return Reply(answer.status_code, lowered, memoryview(bytearray(answer.content)))

    def __getstate__(self) -> Any:
        raise TypeError("a RequestsTransport does not pickle: its session may hold secrets; make one where it is used")

    async def aexchange(self, call: Call, deadline: Deadline) -> Reply:
        """The same on a thread of the loop's executor: requests has no awaitable form."""
        return await asyncio.get_running_loop().run_in_executor(None, self.exchange, call, deadline)

    def close(self) -> None:
        """Leave the session to its owner."""
