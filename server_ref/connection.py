"""One connection of a client: HTTP/1.1 requests in, one at a time and in order; answers out; its timeouts.

Framing is `http1`; what a request means is its host's, the front. It knows no models.

Everything changes on the loop's thread only, so there is no lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from remote_ops import http1
from remote_ops.buffers import BufferPool
from remote_ops.connection import write_at_once, write_buffers
from remote_ops.errors import FramingError, RemoteOpsError
from server_ref.answer import Answer, error_form, graphpipe_error
from server_ref.model import Run

__all__ = ["Connection", "Host", "Timeouts"]

Buffer: TypeAlias = "bytes | bytearray | memoryview"
_DISCARD = memoryview(bytearray(1 << 16))


@dataclass(frozen=True)
class Timeouts:
    """How long a peer may take, in seconds: for a header block, between requests, and for reading an answer.

    A body may take `body_s` plus a second per `min_rate` bytes of it that have come.
    """

    head_s: float = 10.0
    idle_s: float = 120.0
    body_s: float = 10.0
    write_s: float = 120.0
    min_rate: int = 100_000


class Host(Protocol):
    """What a connection needs of the front that it belongs to."""

    limits: http1.Limits
    timeouts: Timeouts
    buffers: BufferPool
    connections: set[Connection]
    loop: asyncio.AbstractEventLoop
    draining: bool

    def admit(self, head: http1.Head, connection: Connection) -> None:
        """Raise if whoever asks may not ask this; called when the head is here, before any of a body is waited for."""

    def answer(self, message: http1.Message, connection: Connection) -> Answer | None:
        """Answer a request, or start what will answer it through the connection's `finish`."""

    def answered(self, connection: Connection, status: int, bytes_out: int) -> Sequence[tuple[str, str]]:
        """Take note of how a request ended; gives what its answer is to say of it in headers."""

    def left(self, connection: Connection) -> None:
        """Take note that a client has gone that had asked something of a model."""


class Connection(asyncio.BufferedProtocol):
    """One connection: requests are answered one at a time, in order; what comes meanwhile waits in the reader.

    `busy` from the moment a request is complete until its answer is handed to the transport. A peer that closes its
    side while it is `busy` is taken to have gone: what it asked for is cancelled if it has not started.
    """

    def __init__(self, front: Host) -> None:
        self.front = front
        self.reader = http1.Reader("request", front.limits, front.buffers.take)
        self.transport: asyncio.Transport | None = None
        self.local = False
        self.busy = False
        self.served = False
        self.run: Run | None = None
        # Of the request at hand: when it was complete, on the monotonic clock, its head and id, what it asked of a
        # model, and what went wrong.
        self.arrived_at = 0.0
        self.head: http1.Head | None = None
        self.request_id = ""
        self.asked: Run | None = None
        self.error: BaseException | None = None
        self.error_answer: Callable[[BaseException], Answer] = graphpipe_error
        self.more_headers: Sequence[tuple[str, str]] = ()  # of the answer to the request at hand, whatever it says
        self._writing: asyncio.Task[None] | None = None
        self.expires_at = 0.0
        self._body_since: float | None = None
        self._writing_paused = False
        self._reading_paused = False
        self._drained: asyncio.Future[None] | None = None
        self._lingering = False

    def hurry(self, seconds: float) -> None:
        """Give it less time than it has."""
        self.expires_at = min(self.expires_at, self.front.loop.time() + seconds)

    @property
    def _closing(self) -> bool:
        return self.transport is None or self.transport.is_closing()

    @property
    def in_request(self) -> bool:
        """Whether part of a request is here, or its answer is not yet sent."""
        return self.busy or not self.reader.idle or self._writing_paused

    # the loop calls these

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        peer = transport.get_extra_info("peername")
        self.local = not isinstance(peer, tuple) or peer[0] in ("127.0.0.1", "::1") or peer[0].startswith("127.")
        self.front.connections.add(self)
        self._expire_after(self.front.timeouts.head_s)

    def get_buffer(self, sizehint: int) -> memoryview:
        return _DISCARD if self._lingering or self.reader.failure is not None else self.reader.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        if self._lingering or self.reader.failure is not None:
            return
        if self.reader.idle and not self.busy:
            self._expire_after(self.front.timeouts.head_s)
        with contextlib.suppress(FramingError):  # `_advance` answers it, in its turn
            self.reader.received(nbytes)
        self._advance()

    def eof_received(self) -> bool:
        self.close()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.front.connections.discard(self)
        self._cancel()
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)

    def pause_writing(self) -> None:
        self._writing_paused = True
        self._expire_after(self.front.timeouts.write_s)

    def resume_writing(self) -> None:
        self._writing_paused = False
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        if not self.busy:
            self._expire_after(self.front.timeouts.idle_s)
            self._advance()

    # requests

    def _advance(self) -> None:
        """Go as far as the bytes at hand allow: to the next complete request, unless one is being answered."""
        while self.reader.complete and not self.busy and not self._writing_paused and not self._closing:
            message = self.reader.take()
            self.busy = self.served = True
            self.head = message.head
            self.request_id = ""
            self._body_since = None
            self.expires_at = float("inf")
            self.error_answer = error_form(message.head)
            self.more_headers = ()
            self.arrived_at = time.monotonic()
            try:
                self.front.admit(message.head, self)
                answer = self.front.answer(message, self)
            except Exception as error:
                answer = self._failed(error)
            del message  # its buffer goes back as soon as the model is done with it
            if answer is not None:
                self.reply(answer)
        if self.reader.failure is not None and not self.busy:
            return self._refuse(self.reader.failure)
        self._mind_the_body()
        if self.reader.full and not self._reading_paused and self.transport is not None:
            self._reading_paused = True
            self.transport.pause_reading()
        return None

    def _mind_the_body(self) -> None:
        """A head is there and its body is not: say whether it is wanted, and by when."""
        head = self.reader.head
        if head is None or self.reader.complete or self.busy:
            return
        if self._body_since is None:
            self.error_answer = error_form(head)
            try:
                self.front.admit(head, self)
            except RemoteOpsError as error:
                return self._refuse(error)
            self._body_since = self.front.loop.time()
            if head.expects_continue and self.transport is not None:
                self.transport.write(http1.CONTINUE)
        timeouts = self.front.timeouts
        self.expires_at = self._body_since + timeouts.body_s + self.reader.body_bytes / timeouts.min_rate
        return None

    def finish(self, outcome: Answer | BaseException) -> None:
        """Answer the request at hand with what its run ended in."""
        self.run = None
        self.reply(self._failed(outcome) if isinstance(outcome, BaseException) else outcome)
        self._advance()

    def _failed(self, error: BaseException) -> Answer:
        self.error = error
        answer = self.error_answer(error)
        _let_go(error)
        return answer

    def reply(self, answer: Answer) -> None:
        """Write an answer and be ready for the next request."""
        transport, head = self.transport, self.head
        if transport is None or transport.is_closing() or head is None:
            self.busy = False
            self.asked = self.error = None
            return
        keep_alive = head.keep_alive and not self.front.draining
        size = sum(map(len, answer.body))
        body = () if head.method == "HEAD" else answer.body
        told = self.front.answered(self, answer.status, size)
        self.asked = self.error = None  # what they hold may be large, and the answer long in the reading
        headers = [*answer.headers, *self.more_headers, *told]
        rendered = http1.response_head(answer.status, size, answer.content_type, keep_alive=keep_alive, headers=headers)
        parts = [rendered, *body]
        if write_at_once(transport, parts):
            self._written(keep_alive)
        else:
            self._writing = self.front.loop.create_task(self._write_slowly(transport, parts, keep_alive))

    async def _write_slowly(self, transport: asyncio.Transport, parts: Sequence[Buffer], keep_alive: bool) -> None:
        await write_buffers(transport, parts, self._wait_until_drained)
        self._written(keep_alive)
        self._advance()

    async def _wait_until_drained(self) -> None:
        if self._writing_paused:
            self._drained = self.front.loop.create_future()
            await self._drained

    def _written(self, keep_alive: bool) -> None:
        self.busy = False
        self.head = None
        if not keep_alive:
            self.close()
            return
        if not self._writing_paused:
            self._expire_after(self.front.timeouts.idle_s)
        if self._reading_paused and self.transport is not None:
            self._reading_paused = False
            self.transport.resume_reading()

    # ends

    def _refuse(self, error: RemoteOpsError) -> None:
        """Answer what cannot be read as a request, and close: where the next one would begin is unknown."""
        if self._lingering or self.transport is None:
            return
        if self.reader.head is not None:
            self.error_answer = error_form(self.reader.head)
        self.head, self.asked, self.arrived_at = self.reader.head, None, time.monotonic()
        answer = self._failed(error)
        size = sum(map(len, answer.body))
        headers = [*answer.headers, *self.front.answered(self, answer.status, size)]
        self.error = None
        head = http1.response_head(answer.status, size, answer.content_type, keep_alive=False, headers=headers)
        self.transport.write(head + b"".join(answer.body))
        # Closing now would reset the connection while the peer still sends, and it would never see the answer.
        self._lingering = True
        self._expire_after(2.0)
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def expire(self) -> None:
        """The peer took too long."""
        if self._lingering or self.busy or self._writing_paused or self.reader.idle:
            self.abort()
        else:
            self._refuse(FramingError("the request did not arrive in time", status=408))

    def close(self) -> None:
        """Close once what is written has been sent."""
        if self.transport is not None:
            self.transport.close()

    def abort(self) -> None:
        """Close at once."""
        if self.transport is not None:
            self.transport.abort()

    def _cancel(self) -> None:
        if self.run is not None:
            self.front.left(self)
            self.run.version.cancel(self.run)
            self.run = self.asked = None
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None
        self.busy = False

    def _expire_after(self, seconds: float) -> None:
        self.expires_at = self.front.loop.time() + seconds


def _let_go(error: BaseException) -> None:
    """Let go of what the frames of an error hold: they and it refer to each other until garbage is collected."""
    seen: BaseException | None = error
    while seen is not None:
        seen.__traceback__ = None
        seen = seen.__cause__ or seen.__context__
