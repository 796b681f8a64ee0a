"""A TCP proxy for tests that does harm: it delays, narrows, slices, corrupts and cuts what passes through it.

It reads as much HTTP as it takes to know where a message ends, a Content-Length, and shares no code with what is
tested. What it does is said before each call, as byte offsets and lengths of time; its only dice are seeded.

State: all of it changes on the proxy's own loop, in a thread of its own; the counters may be read from anywhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import socket
import struct
import threading
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar
from urllib.parse import urlsplit

WAIT_S = 10.0
_T = TypeVar("_T")
_PIECE_BYTES = 1 << 16
_TICK_S = 0.005
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)

How = Literal["reset", "close", "silence", "stall"]


class End(NamedTuple):
    """How an exchange ends before it should, and where: once `at` bytes of a part of it have passed.

    `reset` is a TCP reset, `close` a FIN; `silence` leaves the connection open and says no more, and `stall` does not
    read either until the fault is lifted. `at` counts from the end if it is below zero, which a request cannot; None is
    all of it.
    """

    how: How
    part: Literal["request", "head", "body"]
    at: int | None = None


class Flip(NamedTuple):
    """Bits that are flipped in byte `at` of a part of the answer."""

    part: Literal["head", "body"]
    at: int
    bits: int = 0xFF


@dataclass(frozen=True)
class Fault:
    """What an exchange meets on its way; nothing by default.

    Args:
        latency_s, jitter_s: how long the first byte of each direction is held back, give or take.
        bytes_per_s: how much passes in each direction; 0 for no limit.
        slice_bytes: the most bytes that are sent on at once; 0 for no limit.
        end: how and where the exchange ends too soon.
        flip: what is corrupted.
        refuse: nobody listens, and all connections are closed at once, whatever they carry.
        times: how many exchanges meet it, from when it is set; None for all.
    """

    latency_s: float = 0.0
    jitter_s: float = 0.0
    bytes_per_s: float = 0.0
    slice_bytes: int = 0
    end: End | None = None
    flip: Flip | None = None
    refuse: bool = False
    times: int | None = None

    @property
    def piece_bytes(self) -> int:
        """The most bytes that are read and sent on at once."""
        narrow = max(1, int(self.bytes_per_s * _TICK_S)) if self.bytes_per_s else _PIECE_BYTES
        return min(self.slice_bytes or _PIECE_BYTES, narrow)


class _Over(Exception):
    """The exchange is over before its time, and with it the connection."""


class Proxy:
    """Stands between callers and a server: `url` is where to call it, `fault` what the next exchanges meet.

    `requests` counts the exchanges that began, `connections` those accepted, `open` those that neither side has left.
    """

    def __init__(self, upstream: str) -> None:
        there = urlsplit(upstream)
        self._upstream = (there.hostname, there.port)
        self._random = random.Random(0)
        self._fault, self._left = Fault(), 0
        self.requests = self.connections = self.open = 0
        self._tasks: dict[socket.socket, asyncio.Task[None]] = {}
        self._idle: dict[socket.socket, asyncio.Future[How | None]] = {}
        self._accepting: asyncio.Task[None] | None = None
        self._reserved = _bound(0)  # keeps the port while nobody listens
        self.port: int = self._reserved.getsockname()[1]
        self.url = there._replace(netloc=f"127.0.0.1:{self.port}").geturl()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="chaos")
        self._thread.start()
        self.fault = Fault()

    @property
    def fault(self) -> Fault:
        return self._fault

    @fault.setter
    def fault(self, fault: Fault) -> None:
        self._on_loop(self._set(fault))

    def drop_idle(self, how: Literal["reset", "close"]) -> int:
        """End the connections that wait for a request; how many there were."""
        return self._on_loop(self._drop_idle(how))

    def close(self) -> None:
        self._on_loop(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(WAIT_S)
        self._loop.close()
        self._reserved.close()

    # on the loop

    def _on_loop(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(WAIT_S)

    async def _set(self, fault: Fault) -> None:
        self._fault, self._left = fault, -1 if fault.times is None else fault.times
        if fault.refuse:
            await self._stop()
        elif self._accepting is None:
            listener = _bound(self.port)
            listener.listen(128)
            self._accepting = self._loop.create_task(self._accept(listener))

    async def _stop(self) -> None:
        await _cancelled([self._accepting] if self._accepting else [])
        self._accepting = None
        await _cancelled(list(self._tasks.values()))

    async def _drop_idle(self, how: Literal["reset", "close"]) -> int:
        idle = {client: asked for client, asked in self._idle.items() if not asked.done()}
        for client, asked in idle.items():
            if how == "close":
                client.shutdown(socket.SHUT_WR)  # now, not when its task comes to it
            asked.set_result(how)
        if how == "reset":
            await asyncio.gather(*(self._tasks[client] for client in idle))
        return len(idle)

    async def _accept(self, listener: socket.socket) -> None:
        with listener:
            while True:
                client, _ = await self._loop.sock_accept(listener)
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._tasks[client] = self._loop.create_task(self._serve(client))

    async def _serve(self, client: socket.socket) -> None:
        self.connections += 1
        self.open += 1
        try:
            with client, socket.socket() as upstream:
                upstream.setblocking(False)
                upstream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with contextlib.suppress(_Over, OSError):
                    await self._loop.sock_connect(upstream, self._upstream)
                    while True:
                        await self._exchange(client, upstream)
        except asyncio.CancelledError:
            pass  # the client has been closed by then: with a reset, if bytes of its were left unread
        finally:
            del self._tasks[client]
            self.open -= 1

    async def _exchange(self, client: socket.socket, upstream: socket.socket) -> None:
        dropped = await self._until_asked(client)
        if dropped is not None:
            await self._end(client, dropped)
        if not client.recv(1, socket.MSG_PEEK):
            raise _Over
        self.requests += 1
        fault = self._fault if self._left else Fault()
        self._left -= self._left > 0
        await self._pass_request(client, upstream, fault)
        head, body = await self._read_message(upstream)
        await self._pass_answer(client, head, body, fault)

    async def _until_asked(self, client: socket.socket) -> How | None:
        """Wait for the first byte of a request, which is not read; or for the order to end this connection."""
        asked: asyncio.Future[How | None] = self._loop.create_future()
        self._idle[client] = asked
        self._loop.add_reader(client, lambda: asked.done() or asked.set_result(None))
        try:
            return await asked
        finally:
            self._loop.remove_reader(client)
            del self._idle[client]

    async def _pass_request(self, client: socket.socket, upstream: socket.socket, fault: Fault) -> None:
        end = fault.end if fault.end and fault.end.part == "request" else None
        stop = _PIECE_BYTES << 32 if end is None or end.at is None else end.at
        await self._pause(client, self._latency_s(fault), fault)
        seen, passed, size = b"", 0, _PIECE_BYTES << 32
        while passed < min(stop, size):
            piece = await self._loop.sock_recv(client, min(fault.piece_bytes, stop - passed))
            if not piece:
                raise _Over
            if size >= _PIECE_BYTES << 32:
                seen += piece
                size = _size_of(seen) or size
            passed += len(piece)
            await self._loop.sock_sendall(upstream, piece)
            await self._pace(client, len(piece), fault)
        if end is not None:
            await self._end(client, end.how)

    async def _read_message(self, upstream: socket.socket) -> tuple[bytes, bytes]:
        message = b""
        while len(message) < (_size_of(message) or len(message) + 1):
            piece = await self._loop.sock_recv(upstream, _PIECE_BYTES)
            if not piece:
                raise _Over
            message += piece
        split = message.index(b"\r\n\r\n") + 4
        return message[:split], message[split:]

    async def _pass_answer(self, client: socket.socket, head: bytes, body: bytes, fault: Fault) -> None:
        if fault.flip:
            parts = {"head": bytearray(head), "body": bytearray(body)}
            parts[fault.flip.part][fault.flip.at] ^= fault.flip.bits
            head, body = bytes(parts["head"]), bytes(parts["body"])
        await self._pause(client, self._latency_s(fault), fault)
        answer = memoryview(head + body)[: _stop(fault.end, head, body)]
        for start in range(0, len(answer), fault.piece_bytes):
            piece = answer[start : start + fault.piece_bytes]
            await self._loop.sock_sendall(client, piece)
            await self._pace(client, len(piece), fault)
        if fault.end:
            await self._end(client, fault.end.how)

    def _latency_s(self, fault: Fault) -> float:
        return max(0.0, fault.latency_s + self._random.uniform(-1, 1) * fault.jitter_s)

    async def _pace(self, client: socket.socket, size: int, fault: Fault) -> None:
        if fault.bytes_per_s:
            await self._pause(client, size / fault.bytes_per_s, fault)
        elif fault.slice_bytes:
            await asyncio.sleep(0)

    async def _pause(self, client: socket.socket, seconds: float, fault: Fault) -> None:
        """Wait, unless the caller hangs up or the fault is lifted."""
        give_up = self._loop.time() + seconds
        while (left := give_up - self._loop.time()) > 0 and fault is self._fault:
            with contextlib.suppress(BlockingIOError):
                if not client.recv(1, socket.MSG_PEEK):
                    raise _Over
            await asyncio.sleep(min(left, _TICK_S))

    async def _end(self, client: socket.socket, how: How) -> None:
        if how == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            raise _Over
        if how == "close":
            client.shutdown(socket.SHUT_WR)
        while how == "stall" and self._fault.end and self._fault.end.how == how:
            await asyncio.sleep(_TICK_S)
        while await self._loop.sock_recv(client, _PIECE_BYTES):  # to close on unread bytes would be a reset
            pass
        raise _Over


def _bound(port: int) -> socket.socket:
    sock = socket.socket()
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _PIECE_BYTES)  # so that who is not read is soon stopped
    sock.bind(("127.0.0.1", port))
    return sock


def _size_of(message: bytes) -> int | None:
    """How long a message is, by its head; None if that has not come yet."""
    split = message.find(b"\r\n\r\n") + 4
    if split == 3:
        return None
    length = _LENGTH.search(message, 0, split)
    return split + (int(length[1]) if length else 0)


def _stop(end: End | None, head: bytes, body: bytes) -> int:
    """How many bytes of an answer pass."""
    if end is None or end.part == "request":
        return len(head) + len(body)
    start, part = (0, head) if end.part == "head" else (len(head), body)
    at = len(part) if end.at is None else end.at
    return start + (at if at >= 0 else len(part) + at)


async def _cancelled(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.contextmanager
def chaos(upstream: str) -> Iterator[Proxy]:
    """Run a proxy before the server at this URL; callers take the proxy's `url` instead."""
    proxy = Proxy(upstream)
    try:
        yield proxy
    finally:
        proxy.close()
