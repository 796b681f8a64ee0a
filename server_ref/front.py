"""The data plane: which models there are, who is connected, and which request goes where.

Connections are `connection`'s, which model is meant `catalog`'s, calls are `model`'s, running is `instances`'. It knows
nothing of batching, repositories or processes.

Everything changes on the loop's thread only, so there is no lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

from remote_ops import graphpipe, http1
from remote_ops.buffers import BufferPool
from remote_ops.errors import ModelNotFound, RemoteOpsError
from remote_ops.servable import Servable
from remote_ops.signature import Array
from server_ref.access import Access
from server_ref.answer import BINARY, JSON, TEXT, Answer
from server_ref.aside import Aside
from server_ref.catalog import Catalog, Chosen
from server_ref.compression import coding_of, inflate, inflate_little
from server_ref.connection import Connection, Timeouts
from server_ref.correlation import given_id, new_id, trace_headers, trace_id
from server_ref.exchange import Exchange, ModelControl, deadline_of
from server_ref.journal import Ended, Journal
from server_ref.model import Run, Version, name_inputs
from server_ref.names import UNKNOWN
from server_ref.open_inference import OpenInference
from server_ref.origins import check_origins, origin_headers, preflight
from server_ref.predict import Predict
from server_ref.repository import Entry

__all__ = ["Front"]

_NOT_LOCAL = {"origin", "forwarded", "x-forwarded-for", "via"}
_SHUTDOWN = "/control/shutdown"
_ALLOW = ("Allow", "GET, POST, OPTIONS")
_FIRST_REQUEST_S = 0.5
_GONE = 499  # which nobody sees but the reader of a log


class Front:
    """The data plane: which models there are, who is connected, and how each request is answered.

    Args:
        models: name -> servable, or a version made with options. One model answers any path; several answer
            `/<model>` and `/<model>/<version>`.
        limits: what a request may be in size.
        timeouts: how long a peer may take.
        on_shutdown: called when a local peer asks for `/control/shutdown`; without it that is refused.
        cors_origins: whose pages may call from a browser; `*` for everybody's.
        access: who may do what; without it anybody may do anything but a shutdown from elsewhere.
        journal: what is told of requests that end.

    `control` may be set to what loads and unloads models for clients of `/v2/repository`; without it that is refused.
    `index` may be set to what lists them all, also those that are not served.
    `answers` counts answers by the hundreds of their status, `unknown` the requests that name no model or version.
    """

    def __init__(
        self,
        models: Mapping[str, Servable | Version],
        *,
        limits: http1.Limits = http1.Limits(),  # noqa: B008 (immutable)
        timeouts: Timeouts = Timeouts(),  # noqa: B008 (immutable)
        on_shutdown: Callable[[], None] | None = None,
        cors_origins: Sequence[str] = (),
        access: Access | None = None,
        journal: Journal | None = None,
    ) -> None:
        self.catalog = Catalog(
            {name: what if isinstance(what, Version) else Version(name, [what]) for name, what in models.items()}
        )
        self.limits = limits
        self.timeouts = timeouts
        self.on_shutdown = on_shutdown
        self.cors_origins = check_origins(cors_origins)
        self.control: ModelControl | None = None
        self.index: Callable[[], Iterable[Entry]] | None = None
        self.access = access
        self.journal = journal or Journal()
        self.answers = [0] * 10
        self.unknown = 0
        self.buffers = BufferPool()
        self.connections: set[Connection] = set()
        self.ready = False
        self.alive = True
        self.draining = False  # then every answer closes its connection
        self._aside = Aside()
        self._awaited: set[asyncio.Task[None]] = set()
        self._open_inference = OpenInference(self)
        self._predict = Predict(self)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the threads that models run on; call it on the loop, before the first connection."""
        self.loop = loop
        self.catalog.start(loop)
        self._aside.start(loop)
        self.ready = True
        self._sweep()

    def stop(self) -> None:
        """Close what is left open and let the threads end."""
        self.alive = self.ready = False
        for connection in tuple(self.connections):
            connection.abort()
        for task in tuple(self._awaited):
            task.cancel()
        self._aside.stop()
        self.catalog.stop()

    def connection(self) -> Connection:
        """Make the protocol of a new connection."""
        return Connection(self)

    @property
    def in_flight(self) -> int:
        """How many requests are being received or answered now."""
        return sum(connection.in_request for connection in tuple(self.connections))

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
        self.catalog.sweep()
        if self.alive:
            self.loop.call_later(0.25, self._sweep)

    # who may

    def admit(self, head: http1.Head, connection: Connection) -> None:
        """Raise if whoever asks may not ask this.

        Raises:
            AccessDenied: it wants a token, or another.
        """
        if self.access is None:
            return
        path = unquote(head.target.partition("?")[0])
        if path == _SHUTDOWN and _is_local(head, connection):
            return
        refusal = self.access.refusal(head.method, path, head.headers.get("authorization", ""))
        if refusal is not None:
            raise refusal

    # what is noted

    def answered(self, connection: Connection, status: int, bytes_out: int) -> Sequence[tuple[str, str]]:
        """Count an answer, and note it where that is wanted; gives the headers that tell its client of the request."""
        self.answers[status // 100] += 1
        head, journal, error = connection.head, self.journal, connection.error
        if error is None and not journal.requests and (head is None or "x-request-id" not in head.headers):
            return ()
        if isinstance(error, ModelNotFound) and connection.asked is None:
            self.unknown += 1
        headers = head.headers if head is not None else {}
        request_id = connection.request_id or given_id(headers) or new_id()
        if error is not None or journal.requests:
            journal.ended(self._ended(connection, status, bytes_out, request_id))
        return [("X-Request-Id", request_id)]

    def left(self, connection: Connection) -> None:
        """Note, where every request is noted, that a client did not wait for its answer."""
        if self.journal.requests and connection.head is not None:
            request_id = connection.request_id or given_id(connection.head.headers) or new_id()
            self.journal.ended(self._ended(connection, _GONE, 0, request_id))

    def _ended(self, connection: Connection, status: int, bytes_out: int, request_id: str) -> Ended:
        head, run = connection.head, connection.asked
        total_s, trace = time.monotonic() - connection.arrived_at, trace_id(head.headers) if head else ""
        if run is None:
            model = self.label(unquote(head.target.partition("?")[0])) if head else UNKNOWN
            return Ended(model, "", status, request_id, trace, 0.0, 0.0, total_s, 0, 0, bytes_out, connection.error)
        version = run.version
        return Ended(
            version.name, version.version, status, request_id, trace, run.queue_s, run.compute_s, total_s,
            run.rows, run.payload_bytes, bytes_out, connection.error,
        )  # fmt: skip

    def _carried(self, connection: Connection) -> Sequence[tuple[str, str]]:
        """What the servable of a run is to pass on to those that it calls: the trace, and the id, if there is one."""
        headers = connection.head.headers if connection.head is not None else {}
        connection.request_id = given_id(headers) or (new_id() if self.journal.requests else "")
        told = [("X-Request-Id", connection.request_id)] if connection.request_id else []
        return [*trace_headers(headers), *told]

    def label(self, path: str) -> str:
        """The model that a path names, whatever the protocol; one label for all that name none of ours."""
        if self.catalog.only is not None:
            return self.catalog.only.name
        return next((part for part in path.split("/", 8) if part in self.catalog.models), UNKNOWN)

    # routes

    def answer(self, message: http1.Message, connection: Connection) -> Answer | None:
        """Answer a request, or start what will; None if the answer comes later, through its `finish`."""
        headers = message.head.headers
        if self.cors_origins:
            connection.more_headers = origin_headers(message.head, self.cors_origins)
        if "content-encoding" in headers and message.body and (coding := coding_of(headers["content-encoding"])):
            return self._inflate(message, coding, connection)
        return self._route(message, connection)

    def _inflate(self, message: http1.Message, coding: str, connection: Connection) -> Answer | None:
        head, body, most = message.head, message.body, self.limits.max_body_bytes
        little = inflate_little(body, coding, most)
        if little is not None:
            return self._route(http1.Message(head, memoryview(little)), connection)
        self.later(
            lambda: inflate(body, coding, most, self.buffers.take, lambda: connection.busy),
            lambda found: self._route(http1.Message(head, found), connection),
            connection,
        )
        return None

    def _route(self, message: http1.Message, connection: Connection) -> Answer | None:
        method, target = message.head.method, message.head.target
        path = unquote(target.partition("?")[0])
        if path.startswith("/control/"):
            return self._control(path.removeprefix("/control/"), method, message, connection)
        if method == "OPTIONS":
            return preflight(allowed="Access-Control-Allow-Origin" in dict(connection.more_headers))
        if path.startswith("/v2/") or path == "/v2":
            return self._open_inference.answer(Exchange(method, path, message.head, message.body, connection))
        if path.startswith("/v1/models/"):
            return self._predict.answer(Exchange(method, path, message.head, message.body, connection))
        if method == "POST":
            return self._post(self._chosen(path, message.head), message, connection)
        if method == "GET":
            return self._get(path, message.head)
        text = f"no {method} here: GET gives metadata, POST calls the model\n"
        return Answer(405, TEXT, (text.encode(),), [_ALLOW])

    def begin(self, run: Run, connection: Connection, copy_to: Version | None = None) -> Answer | None:
        """Set out on a run whose answer goes to a connection; its answer, if that is there at once.

        A version in `copy_to` gets the same request, and nobody gets its answer.
        """
        connection.asked = run
        if copy_to is not None:
            mirror(run, copy_to)
        if run.version.calls_others:
            run.carried = self._carried(connection)
        answer = run.version.begin(run)
        if answer is None:
            connection.run = run
        return answer

    def later(self, work: Callable[[], Any], then: Callable[[Any], Answer | None], connection: Connection) -> None:
        """Do `work` on another thread and go on with what it gives, on the loop: `then` answers as a route does."""

        def told(outcome: Any) -> None:
            if not connection.busy:  # its client has gone
                return
            try:
                if isinstance(outcome, BaseException):
                    raise outcome
                answer = then(outcome)
            except Exception as error:
                connection.finish(error)
                return
            if answer is not None:
                connection.finish(answer)

        self._aside.submit(work, told)

    def wait_for(self, awaited: Awaitable[Any], then: Callable[[Any], Answer], connection: Connection) -> None:
        """Wait for something and go on with what it gives; it goes on if the client does not wait for it."""

        async def wait() -> None:
            outcome: Answer | BaseException
            try:
                outcome = then(await awaited)
            except Exception as error:
                outcome = error
            if connection.busy:
                connection.finish(outcome)

        task = self.loop.create_task(wait())
        self._awaited.add(task)
        task.add_done_callback(self._awaited.discard)

    def _get(self, path: str, head: http1.Head) -> Answer:
        if path == "/" and self.catalog.only is None:
            listed = [{"Name": name, "Path": f"/{name}"} for name in self.catalog.models]
            return Answer(200, JSON, (json.dumps({"Models": listed}, indent=4).encode(),))
        return Answer(200, JSON, (self._chosen(path, head).version.metadata_json,))

    def _chosen(self, path: str, head: http1.Head) -> Chosen:
        model, version = self.catalog.find(path)
        return model.choose(version, head.headers)

    def _control(self, verb: str, method: str, message: http1.Message, connection: Connection) -> Answer:
        if verb == "is_ready":
            return _text(200, "ok\n") if self.ready and self.catalog.ready else _text(503, "not ready\n")
        if verb == "is_alive":
            return _text(200, "ok\n") if self.alive else _text(503, "not alive\n")
        if verb == "client_count":
            return _text(200, f"{len(self.connections)}\n")
        if verb != "shutdown":
            return _text(404, f"no /control/{verb}: there are is_ready, is_alive, client_count, shutdown\n")
        if self.on_shutdown is None or not (_is_local(message.head, connection) or self._is_admin(message.head)):
            return _text(403, "shutdown is for local callers only\n")
        if method != "POST":
            return _text(405, "shutdown wants POST\n")
        self.on_shutdown()
        return _text(200, "shutdown\n")

    def _is_admin(self, head: http1.Head) -> bool:
        return self.access is not None and self.access.allows("admin", head.headers.get("authorization", ""))

    # inference

    def _post(self, chosen: Chosen, message: http1.Message, connection: Connection) -> Answer | None:
        version, deadline = chosen.version, deadline_of(message.head, connection.arrived_at)
        request = graphpipe.decode_request(message.body)
        if isinstance(request, graphpipe.MetadataRequest):
            return Answer(200, BINARY, (version.metadata,))
        try:
            arrays = version.signature.view_inputs(name_inputs(version.signature, request), at=version.name)
            wanted = version.signature.select_outputs(request.output_names or None, at=version.name)
        except RemoteOpsError as error:
            version.refused(error)
            raise
        run = Run(
            version, arrays, wanted,
            config=request.config, deadline=deadline, write=_write, done=connection.finish,
        )  # fmt: skip
        return self.begin(run, connection, chosen.copy_to)


def mirror(run: Run, version: Version) -> None:
    """Let another version have the same request: what fails there is counted there, and hurts nobody."""
    with contextlib.suppress(Exception):
        arrays = version.signature.view_inputs(run.call.arrays)
        wanted = version.signature.select_outputs(run.call.names)
        version.begin(
            Run(version, arrays, wanted, config=run.call.config, deadline=run.deadline, write=_dropped, done=_drop)
        )


def _dropped(results: dict[str, Array]) -> Answer:
    return Answer(200, TEXT, ())


def _drop(outcome: Answer | BaseException) -> None:
    pass


def _is_local(head: http1.Head, connection: Connection) -> bool:
    """Whether a program of this machine asks: a page in a browser sends its Origin; behind a proxy all are local."""
    return connection.local and _NOT_LOCAL.isdisjoint(head.headers)


def _text(status: int, text: str) -> Answer:
    return Answer(status, TEXT, (text.encode(),))


def _write(results: dict[str, Array]) -> Answer:
    return Answer(200, BINARY, graphpipe.encode_response(list(results.values())))
