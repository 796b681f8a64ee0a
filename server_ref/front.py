"""Sockets <-> servables: HTTP/1.1 connections in, one servable per model behind, GraphPipe between.

Framing is `http1`, messages are `graphpipe`, running is `instances`; here are the routes, the timeouts and the answers.
It knows nothing of batching, repositories or processes.

Everything changes on the loop's thread only, so there is no lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, NamedTuple, TypeAlias
from urllib.parse import unquote

import numpy.typing as npt

from remote_ops import graphpipe, http1
from remote_ops.buffers import BufferPool
from remote_ops.connection import write_buffers
from remote_ops.deadline import Deadline
from remote_ops.errors import (
    CodecError,
    ConnectError,
    ConnectionLost,
    EncodeError,
    FramingError,
    InternalError,
    InvalidRequest,
    ModelNotFound,
    ModelUnavailable,
    Overloaded,
    RemoteError,
    RemoteOpsError,
    SignatureError,
    SpecError,
    answer_of,
)
from remote_ops.servable import Servable
from remote_ops.signature import DTYPES, Signature, TensorSpec
from server_ref.instances import Job, Lanes, room_for

__all__ = ["Front", "Timeouts"]

Array = npt.NDArray[Any]
Buffer: TypeAlias = "bytes | bytearray | memoryview"
log = logging.getLogger("server_ref")

BINARY = "application/octet-stream"
TEXT = "text/plain; charset=utf-8"
_NOT_LOCAL = {"origin", "forwarded", "x-forwarded-for", "via"}
_ALLOW = ("Allow", "GET, POST, OPTIONS")
_QUICK_S = 100e-6
_FIRST_REQUEST_S = 0.5
_QUICK_BYTES = 1 << 16


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


class Answer(NamedTuple):
    """What goes back: status, content type, and the body as buffers."""

    status: int
    content_type: str
    body: Sequence[Buffer]
    headers: Sequence[tuple[str, str]] = ()


class Model:
    """One servable under its name, with what it answers about itself, built once."""

    def __init__(self, name: str, servable: Servable) -> None:
        self.name = name
        self.servable = servable
        self.signature = _served_signature(name, servable.signature)
        self.metadata = graphpipe.encode_metadata(self.signature)
        self.metadata_json = json.dumps(_json_metadata(self.signature), indent=4).encode()
        self.ainfer: Callable[..., Awaitable[dict[str, Array]]] | None = getattr(servable, "ainfer", None)
        self.lanes = Lanes(name or "model", room_for(servable))
        self.awaited = 0
        self._never_waits = bool(getattr(servable, "never_waits", False))
        self._recent_run_s = math.inf

    def ran(self, seconds: float) -> None:
        """Take note of how long a run took: the longest of late counts, and fades."""
        self._recent_run_s = max(seconds, min(self._recent_run_s * 0.9, 1.0))

    def fits_on_loop(self, request_bytes: int) -> bool:
        """Whether handing the run to a thread would cost more than the run: it only computes, and is known as quick."""
        return self._never_waits and self._recent_run_s < _QUICK_S and request_bytes < _QUICK_BYTES


def _served_signature(name: str, signature: Signature) -> Signature:
    return replace(signature, name=signature.name or name, server="remote-ops server_ref")


def _json_metadata(signature: Signature) -> dict[str, Any]:
    """Metadata under the keys that the 2018 servers use; types are numbers."""

    def ios(specs: Iterable[TensorSpec]) -> list[dict[str, Any]]:
        return [
            {
                "Name": spec.name,
                "Description": spec.description,
                "Shape": None if spec.shape is None else list(spec.shape),
                "Type": DTYPES[spec.dtype].wire_type if spec.dtype in DTYPES else 0,
            }
            for spec in specs
        ]

    return {
        "Name": signature.name,
        "Version": signature.version,
        "Server": signature.server,
        "Description": signature.description,
        "Inputs": ios(signature.inputs),
        "Outputs": ios(signature.outputs),
    }


class Front:
    """The data plane: which models there are, who is connected, and how each request is answered.

    Args:
        models: name -> servable. One model answers any path; several answer `/<model>` and `/<model>/<version>`.
        limits: what a request may be in size.
        timeouts: how long a peer may take.
        on_shutdown: called when a local peer asks for `/control/shutdown`; without it that is refused.
    """

    def __init__(
        self,
        models: Mapping[str, Servable],
        *,
        limits: http1.Limits = http1.Limits(),  # noqa: B008 (immutable)
        timeouts: Timeouts = Timeouts(),
        on_shutdown: Callable[[], None] | None = None,
    ) -> None:
        self.models = {name: Model(name, servable) for name, servable in models.items()}
        self.limits = limits
        self.timeouts = timeouts
        self.on_shutdown = on_shutdown
        self.buffers = BufferPool()
        self.connections: set[Connection] = set()
        self.ready = False
        self.alive = True
        self.draining = False  # then every answer closes its connection
        self._only = next(iter(self.models.values())) if len(self.models) == 1 else None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the threads that models run on; call it on the loop, before the first connection."""
        self.loop = loop
        for model in self.models.values():
            if model.ainfer is None:
                model.lanes.start(loop)
        self.ready = True
        self._sweep()

    def stop(self) -> None:
        """Close what is left open and let the threads end."""
        self.alive = self.ready = False
        for connection in tuple(self.connections):
            connection.abort()
        for model in self.models.values():
            model.lanes.stop()

    def connection(self) -> Connection:
        """Make the protocol of a new connection."""
        return Connection(self)

    @property
    def in_flight(self) -> int:
        """How many requests are being received or answered now."""
        return sum(connection.in_request for connection in self.connections)

    def close_idle(self) -> None:
        """Close the connections that wait for nothing, as a drain does; a new one has a moment to say what it wants."""
        for connection in tuple(self.connections):
            if not connection.served:
                connection.hurry(_FIRST_REQUEST_S)
            elif not connection.in_request:
                connection.close()

    def _sweep(self) -> None:
        now = self.loop.time()
        for connection in tuple(self.connections):
            if now > connection.expires_at:
                connection.expire()
        if self.alive:
            self.loop.call_later(0.25, self._sweep)

    # routes

    def answer(self, message: http1.Message, connection: Connection) -> Answer | None:
        """Answer a request, or start what will; None if the answer comes later, through `connection.reply`."""
        method, target = message.head.method, message.head.target
        path = target.partition("?")[0]
        if path.startswith("/control/"):
            return self._control(path.removeprefix("/control/"), method, message, connection)
        if method == "POST":
            return self._post(self._model(path), message, connection)
        if method == "GET":
            return self._get(path)
        if method == "OPTIONS":
            return Answer(204, TEXT, (), [_ALLOW])
        text = f"no {method} here: GET gives metadata, POST calls the model\n"
        return Answer(405, TEXT, (text.encode(),), [_ALLOW])

    def _get(self, path: str) -> Answer:
        if path == "/" and self._only is None:
            listed = [{"Name": name, "Path": f"/{name}"} for name in self.models]
            return Answer(200, "application/json", (json.dumps({"Models": listed}, indent=4).encode(),))
        return Answer(200, "application/json", (self._model(path).metadata_json,))

    def _model(self, path: str) -> Model:
        if self._only is not None:
            return self._only
        name, _, version = (unquote(part) for part in path.strip("/").partition("/"))
        model = self.models.get(name)
        if model is not None and version in ("", model.signature.version):
            return model
        if model is not None:
            there_is = f"there is '{model.signature.version}'" if model.signature.version else "it has no versions"
            raise ModelNotFound(f"no version '{version}' of model '{name}': {there_is}")
        close = get_close_matches(name, self.models, 1)
        hint = f"; did you mean '/{close[0]}'?" if close else ""
        known = ", ".join(f"/{known}" for known in self.models)
        if not name:
            raise ModelNotFound(f"this URL names no model: there are {known}; append one of them")
        raise ModelNotFound(f"no model '/{name}': there are {known}{hint}")

    def _control(self, verb: str, method: str, message: http1.Message, connection: Connection) -> Answer:
        if verb == "is_ready":
            return _text(200, "ok\n") if self.ready else _text(503, "not ready\n")
        if verb == "is_alive":
            return _text(200, "ok\n") if self.alive else _text(503, "not alive\n")
        if verb == "client_count":
            return _text(200, f"{len(self.connections)}\n")
        if verb != "shutdown":
            return _text(404, f"no /control/{verb}: there are is_ready, is_alive, client_count, shutdown\n")
        # A page in somebody's browser could post here too, but not without its Origin; behind a proxy all are local.
        if self.on_shutdown is None or not connection.local or not _NOT_LOCAL.isdisjoint(message.head.headers):
            return _text(403, "shutdown is for local callers only\n")
        if method != "POST":
            return _text(405, "shutdown wants POST\n")
        self.on_shutdown()
        return _text(200, "shutdown\n")

    # inference

    def _post(self, model: Model, message: http1.Message, connection: Connection) -> Answer | None:
        deadline = _deadline_of(message.head)
        request = graphpipe.decode_request(message.body)
        if isinstance(request, graphpipe.MetadataRequest):
            return Answer(200, BINARY, (model.metadata,))
        arrays = model.signature.view_inputs(name_inputs(model.signature, request), at=model.name)
        wanted = model.signature.select_outputs(request.output_names or None, at=model.name)
        names = [spec.name for spec in wanted]
        call = _Run(model, arrays, names, wanted, request.config, deadline)
        if model.ainfer is not None:
            if model.awaited >= model.lanes.max_queue:
                raise Overloaded(f"{model.awaited} requests wait already: expected at most {model.lanes.max_queue}")
            connection.task = self.loop.create_task(_finish_async(call, connection))
            return None
        if model.fits_on_loop(len(message.body)):
            outcome = call.outcome()
            if isinstance(outcome, BaseException):
                raise outcome
            return Answer(200, BINARY, outcome)
        job = Job(call.outcome, connection.reply_outcome)
        model.lanes.submit(job)
        connection.job, connection.lanes = job, model.lanes
        return None


def _text(status: int, text: str) -> Answer:
    return Answer(status, TEXT, (text.encode(),))


def _deadline_of(head: http1.Head) -> Deadline:
    left = head.headers.get("x-request-timeout-ms")
    if left is None:
        return Deadline.never()
    if not (left.isascii() and left.isdigit() and len(left) <= 12):
        raise InvalidRequest(f"X-Request-Timeout-Ms: expected a number of milliseconds, got {left[:32]!r}")
    return Deadline.after(int(left) / 1000)


def name_inputs(signature: Signature, request: graphpipe.InferRequest) -> dict[str, Array]:
    """Give each tensor of a request its name: the one it goes by, else that of the input at its place.

    Raises:
        SignatureError: more names or tensors than can be told apart.
    """
    names, tensors = request.input_names, request.tensors
    if len(names) > len(tensors):
        # The Go batcher names every tensor twice.
        if names[: len(tensors)] * 2 != names:
            raise SignatureError(f"expected a name per tensor: got {len(names)} names for {len(tensors)} tensors")
        names = names[: len(tensors)]
    if len(tensors) > len(signature.inputs):
        expected = ", ".join(spec.name for spec in signature.inputs)
        raise SignatureError(f"expected {len(signature.inputs)} inputs ({expected}), got {len(tensors)}")
    given = [
        names[index] if index < len(names) and names[index] else signature.inputs[index].name
        for index in range(len(tensors))
    ]
    if len(set(given)) != len(given):
        raise SignatureError(f"an input is given twice: {', '.join(given)}")
    return dict(zip(given, tensors, strict=True))


class _Run(NamedTuple):
    """One checked call of a model: what runs on a lane."""

    model: Model
    arrays: dict[str, Array]
    names: list[str]
    wanted: tuple[TensorSpec, ...]
    config: bytes
    deadline: Deadline

    def outcome(self) -> list[Buffer] | BaseException:
        """The buffers of the answer, or what went wrong."""
        try:
            self.deadline.require(f"model '{self.model.name}'")
            since = time.perf_counter()
            results = self.model.servable.infer(self.arrays, self.names, config=self.config, deadline=self.deadline)
            self.model.ran(time.perf_counter() - since)
            return self.encoded(results)
        except BaseException as error:  # whatever a model raises, its lane and its caller go on
            return self.blamed(error)

    async def aoutcome(self) -> list[Buffer] | BaseException:
        """The same for a servable that can be awaited."""
        try:
            self.deadline.require(f"model '{self.model.name}'")
            assert self.model.ainfer is not None
            results = await self.model.ainfer(self.arrays, self.names, config=self.config, deadline=self.deadline)
            return self.encoded(results)
        except BaseException as error:
            return self.blamed(error)

    def blamed(self, error: BaseException) -> BaseException:
        """What a model failed with, as its caller should see it: bytes that it could not read were not the caller's."""
        if isinstance(error, CodecError | FramingError):
            return InternalError(f"model '{self.model.name}' got an answer it cannot read: {error}")
        if isinstance(error, ConnectError | ConnectionLost):
            return ModelUnavailable(f"model '{self.model.name}' is out of reach: {error}")
        if isinstance(error, SpecError):
            return InternalError(f"model '{self.model.name}' is not set up to run: {error}")
        return error

    def encoded(self, results: Any) -> list[Buffer]:
        if not isinstance(results, Mapping):
            got = type(results).__name__
            raise InternalError(
                f"model '{self.model.name}' breaks its own signature: expected a dict by name, got a {got}"
            )
        try:
            fitted = self.model.signature.fit_outputs(results, self.wanted)
            return graphpipe.encode_response(list(fitted.values()))
        except (SignatureError, EncodeError) as error:
            raise InternalError(f"model '{self.model.name}' breaks its own signature: {error}") from error


async def _finish_async(call: _Run, connection: Connection) -> None:
    call.model.awaited += 1  # not where the task is made: one that is cancelled before it begins does not come here
    outcome = await call.aoutcome()
    call.model.awaited -= 1
    connection.reply_outcome(outcome)


def _first_line(error: BaseException) -> str:
    try:
        return f": {(str(error).splitlines() or [''])[0][:300]}"
    except Exception:  # it cannot even say what it is
        return ""


def error_answer(error: BaseException, *, as_text: bool = False) -> Answer:
    """The answer to a request that failed: a status, and a message that says why, without traces or paths of ours."""
    if isinstance(error, RemoteOpsError):
        message = error.message if isinstance(error, RemoteError) else str(error)
    else:
        message = f"the model raised {type(error).__name__}{_first_line(error)}"
        log.error("a model raised", exc_info=error)
    _, code, status = answer_of(error)
    status = error.status if isinstance(error, FramingError) else status
    headers = [("Retry-After", "1")] if status in (429, 503) else []
    if as_text:
        return Answer(status, TEXT, (f"{message}\n".encode(),), headers)
    return Answer(status, BINARY, (graphpipe.encode_error(code, message),), headers)


class Connection(asyncio.BufferedProtocol):
    """One connection: requests are answered one at a time, in order; what comes meanwhile waits in the reader.

    `busy` from the moment a request is complete until its answer is handed to the transport. A peer that closes its
    side while it is `busy` is taken to have gone: what it asked for is cancelled if it has not started.
    """

    def __init__(self, front: Front) -> None:
        self.front = front
        self.reader = http1.Reader("request", front.limits, front.buffers.take)
        self.transport: asyncio.Transport | None = None
        self.local = False
        self.busy = False
        self.served = False
        self.job: Job | None = None
        self.lanes: Lanes | None = None
        self.task: asyncio.Task[None] | None = None
        self.expires_at = 0.0
        self._head: http1.Head | None = None
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
            self._head = message.head
            self._body_since = None
            self.expires_at = float("inf")
            try:
                answer = self.front.answer(message, self)
            except Exception as error:
                answer = self._error(error)
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
            self._body_since = self.front.loop.time()
            if head.expects_continue and self.transport is not None:
                self.transport.write(http1.CONTINUE)
        timeouts = self.front.timeouts
        self.expires_at = self._body_since + timeouts.body_s + self.reader.body_bytes / timeouts.min_rate

    def reply_outcome(self, outcome: list[Buffer] | BaseException) -> None:
        """Answer the request at hand with what its run ended in."""
        self.job = self.task = None
        if isinstance(outcome, BaseException):
            self.reply(self._error(outcome))
        else:
            self.reply(Answer(200, BINARY, outcome))
        self._advance()

    def _error(self, error: BaseException) -> Answer:
        accept = self._head.headers.get("accept", "") if self._head is not None else ""
        return error_answer(error, as_text=accept.startswith("text/plain"))

    def reply(self, answer: Answer) -> None:
        """Write an answer and be ready for the next request."""
        transport, head = self.transport, self._head
        if transport is None or transport.is_closing() or head is None:
            self.busy = False
            return
        keep_alive = head.keep_alive and not self.front.draining
        size = sum(map(len, answer.body))
        body = () if head.method == "HEAD" else answer.body
        rendered = http1.response_head(
            answer.status, size, answer.content_type, keep_alive=keep_alive, headers=answer.headers
        )
        parts = [rendered, *body]
        if size > _WRITE_AT_ONCE_BYTES and not type(transport).__module__.startswith("uvloop"):
            self.task = self.front.loop.create_task(self._write_slowly(transport, parts, keep_alive))
            return
        if size < _JOIN_BYTES:
            transport.write(b"".join(parts))
        else:
            transport.writelines(parts)
        self._written(keep_alive)

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
        self._head = None
        if not keep_alive:
            self.close()
            return
        if not self._writing_paused:
            self._expire_after(self.front.timeouts.idle_s)
        if self._reading_paused and self.transport is not None:
            self._reading_paused = False
            self.transport.resume_reading()

    # ends

    def _refuse(self, error: FramingError) -> None:
        """Answer what cannot be read as a request, and close: where the next one would begin is unknown."""
        if self._lingering or self.transport is None:
            return
        answer = self._error(error)
        head = http1.response_head(answer.status, sum(map(len, answer.body)), answer.content_type, keep_alive=False)
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
        if self.job is not None and self.lanes is not None:
            self.lanes.cancel(self.job)
            self.job = None
        if self.task is not None:
            self.task.cancel()
            self.task = None
        self.busy = False

    def _expire_after(self, seconds: float) -> None:
        self.expires_at = self.front.loop.time() + seconds


_DISCARD = memoryview(bytearray(1 << 16))
_JOIN_BYTES = 1 << 12
_WRITE_AT_ONCE_BYTES = 1 << 20
