"""One connection and one exchange at a time: blocking on the caller's thread, or on the caller's loop.

Both drivers run the same framing (`http1`). Here the system's errors become ours, each with the URL and the phase. It
does not pool, does not retry, and reads no clock but the deadline's.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import select
import socket
import ssl
import struct
import time
from collections.abc import Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, TypeAlias

from remote_ops import http1
from remote_ops.addresses import Address, awaited, look_up
from remote_ops.buffers import BufferPool
from remote_ops.deadline import Deadline
from remote_ops.errors import ConnectError, ConnectionLost, DeadlineExceeded, FramingError
from remote_ops.url import Url

__all__ = [
    "AsyncConnection",
    "BlockingConnection",
    "Marks",
    "Stale",
    "new_loop",
    "open_on_loop",
    "write_at_once",
    "write_buffers",
]

Buffer: TypeAlias = "bytes | bytearray | memoryview"
Marks: TypeAlias = "tuple[float, float, float]"  # when the sending began, when it ended, when the answer began
_IOV_MAX = 512
_JOINED_BYTES = 1 << 12  # less than this is sooner copied than written in pieces
_SLICE_BYTES = 1 << 20
_MUCH_BYTES = 1 << 18  # more than a head is ever received into
_PATIENCE_S = 0.05
_SOON_S = 300e-6
_PIECE_S = 1.0
_LONGEST_WAIT_S = 1e6  # what poll and asyncio can still count
_LIMITS = http1.Limits(max_body_bytes=2**31)

# --------------------------------------------------------------------------- errors, the one seam to the system's


def expired(phase: str, since: float) -> DeadlineExceeded:
    return DeadlineExceeded(f"{time.monotonic() - since:.3f} s {phase}")


def refused(url: Url, error: BaseException) -> ConnectError:
    where = url.unix_path or f"{url.host}:{url.port}"
    reason = str(error) or type(error).__name__
    if isinstance(error, ConnectionError) and error.errno:
        reason = os.strerror(error.errno)  # asyncio puts the address there
    elif isinstance(error, OSError) and error.strerror:
        reason = error.strerror
    return ConnectError(f"cannot connect to {where} ({reason}) - at {url.text}")


def lost(url: Url, error: BaseException | None, phase: str) -> ConnectionLost:
    reason = f" ({error})" if error is not None and str(error) else ""
    return ConnectionLost(f"the connection ended while {phase}{reason} - at {url.text}")


CONNECTING = "connecting"
WRITING = "sending the request"
WAITING = "waiting for the first byte"
READING = "receiving the answer"


class Answered(Exception):
    """The answer came before all of the request was sent; never reaches a caller of `transport`."""


class Stale(Exception):
    """A kept connection that ended before its answer began, and so perhaps before the peer saw this request.

    Never reaches a caller of `transport`.
    """

    def __init__(self, phase: str) -> None:
        super().__init__()
        self.phase = phase


# --------------------------------------------------------------------------- blocking


class BlockingConnection:
    """One socket: try first, poll until the deadline only if there is nothing yet.

    Much is moved by calls that wait in the kernel, for `_PATIENCE_S` at most, so that the deadline and an early answer
    are still seen: polling before each buffer full took up to half as long again.
    """

    def __init__(self, url: Url, context: ssl.SSLContext | None, deadline: Deadline) -> None:
        self.url = url
        self._poll = select.poll()
        self._sock = self._connect(context, deadline)
        self._tls = isinstance(self._sock, ssl.SSLSocket)
        self._poll.register(self._sock, select.POLLIN)
        self._reader: http1.Reader | None = None
        self.used = False
        self.whole = True
        self.marks: Marks = (0.0, 0.0, 0.0)
        self._answers_soon = False

    def _connect(self, context: ssl.SSLContext | None, deadline: Deadline) -> socket.socket:
        since = time.monotonic()
        last: BaseException = OSError("no address")
        for family, place in _addresses(self.url, deadline, since):
            sock = socket.socket(family, socket.SOCK_STREAM)
            try:
                sock.settimeout(seconds_left(deadline, CONNECTING, since))
                sock.connect(place)
                if family != socket.AF_UNIX:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.setblocking(context is None)
                if context is not None:
                    sock = context.wrap_socket(sock, server_hostname=self.url.host, do_handshake_on_connect=False)
                    _shake_hands(sock, deadline, since)
                for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
                    sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", 0, int(_PATIENCE_S * 1e6)))
                return sock
            except DeadlineExceeded:
                sock.close()
                raise
            except TimeoutError as error:
                sock.close()
                raise expired(CONNECTING, since) from error
            except OSError as error:
                sock.close()
                last = error
            except BaseException:  # Ctrl-C
                sock.close()
                raise
        raise refused(self.url, last) from last

    def close(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # no socket yet, if connecting failed
            self._sock.close()

    __del__ = close  # an endpoint that is dropped takes its kept connections along

    def dead(self) -> bool:
        """Whether the peer has closed it, or sent what nobody asked for."""
        return bool(self._poll.poll(0)) or (isinstance(self._sock, ssl.SSLSocket) and self._sock.pending() > 0)

    def exchange(self, head: bytes, body: Sequence[Buffer], deadline: Deadline, pool: BufferPool) -> http1.Message:
        if self._reader is None:
            self._reader = http1.Reader("response", _LIMITS, pool.take)
        reader = self._reader
        began = since = time.monotonic()
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
        first = time.monotonic()
        while not reader.complete:
            try:
                size = self._receive(reader, deadline, since)
            except DeadlineExceeded:
                raise
            except OSError as error:
                raise self._gone(reader, error) from error
            if size:
                if reader.idle:
                    now = time.monotonic()
                    self._answers_soon = now - since < _SOON_S
                    first = now if self._tls else first
                reader.received(size)
            elif not self._ended_well(reader):
                raise self._gone(reader, failed)
        self.used = True
        self.marks = (began, since, first)
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
        phase = READING if not reader.idle else WAITING if self.whole else WRITING
        return Stale(phase) if self.used and reader.idle else lost(self.url, error, phase)

    def _receive(self, reader: http1.Reader, deadline: Deadline, since: float) -> int:
        into = reader.buffer()
        while True:
            try:
                if self._tls:
                    return self._sock.recv_into(into)
                return self._sock.recv_into(into, 0, _how(len(into), deadline) or socket.MSG_WAITALL)
            except (BlockingIOError, ssl.SSLWantReadError):
                self._wait(select.POLLIN, deadline, WAITING if reader.idle else READING, since)
            except ssl.SSLWantWriteError:
                self._wait(select.POLLOUT, deadline, READING, since)

    def _send(self, parts: list[Buffer], reader: http1.Reader, deadline: Deadline, since: float) -> bool:
        """Send all of it; False if the peer answers before it has, and so does not want the rest."""
        if self._tls:
            return self._send_tls(parts, reader, deadline, since)
        while parts:
            sent, batch = 0, _first_of(parts)
            with contextlib.suppress(BlockingIOError):
                sent = self._sock.sendmsg(batch, (), _how(sum(map(len, batch)), deadline))
            _drop(parts, sent)
            if parts:
                events = self._wait(select.POLLIN | select.POLLOUT, deadline, WRITING, since)
                if events & select.POLLIN and self._answers_already(reader):
                    return False
        return True

    def _answers_already(self, reader: http1.Reader) -> bool:
        """Whether what came while we send is more than an interim answer."""
        try:
            size = self._sock.recv_into(reader.buffer(), 0, 0 if self._tls else socket.MSG_DONTWAIT)
        except ssl.SSLWantReadError:  # TLS has something to say to itself
            return False
        reader.received(size)
        return not size or not reader.idle

    def _send_tls(self, parts: list[Buffer], reader: http1.Reader, deadline: Deadline, since: float) -> bool:
        for part in parts:
            view = memoryview(part)
            while view:
                try:
                    view = view[self._sock.send(view[:_SLICE_BYTES]) :]
                except ssl.SSLWantWriteError:
                    events = self._wait(select.POLLIN | select.POLLOUT, deadline, WRITING, since)
                    if events & select.POLLIN and self._answers_already(reader):
                        return False
                except ssl.SSLWantReadError:
                    self._wait(select.POLLIN, deadline, WRITING, since)
        return True

    def _wait(self, events: int, deadline: Deadline, phase: str, since: float) -> int:
        timeout_s = seconds_left(deadline, phase, since)
        if events != select.POLLIN:
            self._poll.modify(self._sock, events)
        try:
            ready = self._ready(timeout_s)
        finally:
            if events != select.POLLIN:
                self._poll.modify(self._sock, select.POLLIN)
        if not ready:
            raise expired(phase, since)
        return ready[0][1]

    def _ready(self, timeout_s: float | None) -> list[tuple[int, int]]:
        """What the socket is ready for, or nothing in time; waits in pieces.

        A signal that comes just before the kernel begins to wait is noticed only when that wait is over.
        """
        until = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left_s = until - time.monotonic()
            ready = self._poll.poll(math.ceil(1000 * max(0.0, min(left_s, _PIECE_S))))
            if ready or left_s <= _PIECE_S:
                return ready


def _how(size: int, deadline: Deadline) -> int:
    """The flags to move `size` bytes with: wait in the kernel for as much as that, unless time is short."""
    return 0 if size >= _MUCH_BYTES and deadline.remaining() > 2 * _PATIENCE_S else socket.MSG_DONTWAIT


def _first_of(parts: list[Buffer]) -> list[Buffer]:
    """What one call is given to send: as much as may go without a look at the deadline."""
    batch: list[Buffer] = []
    room = _SLICE_BYTES
    for part in parts[:_IOV_MAX]:
        batch.append(part if len(part) <= room else memoryview(part)[:room])
        room -= len(batch[-1])
        if not room:
            break
    return batch


def _drop(parts: list[Buffer], sent: int) -> None:
    """Take the first `sent` bytes off."""
    while parts and sent >= (size := len(parts[0])):
        sent -= size
        del parts[0]
    if parts and sent:
        parts[0] = memoryview(parts[0])[sent:]


def seconds_left(deadline: Deadline, phase: str, since: float) -> float | None:
    left = deadline.remaining()
    if left <= 0:
        raise expired(phase, since)
    return None if math.isinf(left) else min(left, _LONGEST_WAIT_S)


def _addresses(url: Url, deadline: Deadline, since: float) -> tuple[Address, ...]:
    try:
        return look_up(url).result(seconds_left(deadline, CONNECTING, since))
    except FutureTimeout as error:
        raise expired(CONNECTING, since) from error
    except (OSError, UnicodeError) as error:
        raise refused(url, error) from error


def _shake_hands(sock: ssl.SSLSocket, deadline: Deadline, since: float) -> None:
    """The handshake, as a whole within the deadline: a socket's own timeout starts anew with each piece."""
    poll = select.poll()
    while True:
        try:
            return sock.do_handshake()
        except ssl.SSLWantReadError:
            poll.register(sock, select.POLLIN)
        except ssl.SSLWantWriteError:
            poll.register(sock, select.POLLOUT)
        left_s = seconds_left(deadline, CONNECTING, since)
        if not poll.poll(None if left_s is None else math.ceil(left_s * 1000)):
            raise expired(CONNECTING, since)


# --------------------------------------------------------------------------- asyncio


def new_loop() -> asyncio.AbstractEventLoop:
    """uvloop's if it is installed, else the standard library's: slower, and it copies more."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def write_at_once(transport: asyncio.WriteTransport, parts: Sequence[Buffer]) -> bool:
    """Write buffers in order, unless the transport would copy much of them; whether it did.

    uvloop takes a list of buffers and copies none. The transports of the standard library copy what the socket does
    not take at once.
    """
    size = sum(map(len, parts))
    if size <= _JOINED_BYTES:
        transport.write(b"".join(parts))
    elif type(transport).__module__.startswith("uvloop"):
        transport.writelines(parts)
    elif size <= _SLICE_BYTES:
        transport.write(b"".join(parts))
    else:
        return False
    return True


async def write_buffers(transport: asyncio.WriteTransport, parts: Sequence[Buffer], drained: Any) -> bool:
    """Write buffers in order: at once, or a slice at a time with `drained()` awaited after each; whether all are."""
    if write_at_once(transport, parts):
        return True
    for part in parts:
        view = memoryview(part)
        for start in range(0, len(view), _SLICE_BYTES):
            if transport.is_closing():  # whoever waits for it is told by `connection_lost`
                return False
            transport.write(view[start : start + _SLICE_BYTES])
            await drained()
    return True


class AsyncConnection(asyncio.BufferedProtocol):
    """One connection of one loop: one exchange at a time, whose answer is a future."""

    def __init__(self, url: Url, pool: BufferPool) -> None:
        self.url = url
        self.used = False
        self.phase = CONNECTING
        self._reader = http1.Reader("response", _LIMITS, pool.take)
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[http1.Message] | None = None
        self._writable: asyncio.Future[None] | None = None
        self._paused = False
        self._lost: BaseException | None = None
        self._cut_short = False
        self._began = self._sent = self._first = 0.0
        self._poll = select.poll()
        self.idle_since = 0.0

    # the loop calls these

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self._poll.register(transport.get_extra_info("socket").fileno(), select.POLLIN)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._reader.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        try:
            self._reader.received(nbytes)
        except FramingError as error:
            return self._fail(error)
        if self.phase is not READING:
            self.phase, self._first = READING, time.monotonic()
        if self._reader.complete:
            self._finish()
        return None

    def eof_received(self) -> bool:
        self._note_unsent()
        with contextlib.suppress(FramingError):
            if self._reader.eof():
                self._finish()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = exc or ConnectionResetError("closed by the peer")
        self._note_unsent()
        self._transport = None  # it is closed: asyncio would end what is aborted now a second time
        stale = self.used and self._reader.idle
        self._fail(Stale(self.phase) if stale else lost(self.url, exc, self.phase))

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
        """Whether the peer has closed it, or sent what nobody asked for; the loop may not know that yet."""
        if self._transport is None or self._lost is not None or self._transport.is_closing() or not self._reader.idle:
            return True
        return bool(self._poll.poll(0))

    @property
    def whole(self) -> bool:
        """Whether all of the request is sent: the peer would read the rest as the beginning of the next one."""
        return not self._cut_short and self._transport is not None and not self._transport.get_write_buffer_size()

    @property
    def marks(self) -> Marks:
        return self._began, self._sent, max(self._sent, self._first)

    def _note_unsent(self) -> None:
        """A transport takes more than it sends at once: while it holds some, the request is still being sent."""
        if self.phase is WAITING and (self._paused or not self.whole):
            self.phase = WRITING

    def close(self) -> None:
        self._note_unsent()
        if self._answer is not None:
            self._answer.cancel()
        if self._transport is not None:
            self._transport.abort()

    async def exchange(self, head: bytes, body: Sequence[Buffer]) -> http1.Message:
        self.phase, self._began = WRITING, time.monotonic()
        assert self._transport is not None
        self._answer = asyncio.get_running_loop().create_future()
        try:
            self._cut_short = not await write_buffers(self._transport, [head, *body], self._drained)
        except Answered:
            self._cut_short = True
        if self.phase is WRITING and not self._cut_short:
            self.phase = WAITING
        self._sent = time.monotonic()
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
            raise Answered

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


async def open_on_loop(url: Url, context: ssl.SSLContext | None, pool: BufferPool) -> AsyncConnection:
    loop = asyncio.get_running_loop()
    last: BaseException = OSError("no address")
    try:
        if url.unix_path:
            _, connection = await loop.create_unix_connection(lambda: AsyncConnection(url, pool), url.unix_path)
            return connection
        addresses = await awaited(look_up(url))
    except (OSError, UnicodeError) as error:
        raise refused(url, error) from error
    name = url.host if context is not None else None
    for _, place in addresses:
        try:
            transport, connection = await loop.create_connection(
                lambda: AsyncConnection(url, pool), place[0], place[1], ssl=context, server_hostname=name
            )
        except OSError as error:
            last = error
            continue
        sock = transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection
    raise refused(url, last) from last
