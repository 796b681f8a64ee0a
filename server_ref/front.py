"""The data plane: which models there are, who is connected, and which request goes where.

Connections are `connection`'s, calls are `model`'s, running is `instances`'. It knows nothing of batching,
repositories or processes.

Everything changes on the loop's thread only, so there is no lock.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from urllib.parse import unquote

from remote_ops import graphpipe, http1
from remote_ops.buffers import BufferPool
from remote_ops.deadline import Deadline
from remote_ops.errors import InvalidRequest, ModelNotFound, Overloaded
from remote_ops.servable import Servable
from remote_ops.signature import did_you_mean
from server_ref.connection import BINARY, TEXT, Answer, Connection, Timeouts
from server_ref.instances import Job
from server_ref.model import Model, Run, name_inputs

__all__ = ["Front"]

_NOT_LOCAL = {"origin", "forwarded", "x-forwarded-for", "via"}
_ALLOW = ("Allow", "GET, POST, OPTIONS")
_FIRST_REQUEST_S = 0.5


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
        timeouts: Timeouts = Timeouts(),  # noqa: B008 (immutable)
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
        """Answer a request, or start what will; None if the answer comes later, through its `reply_outcome`."""
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
        known = [f"/{model}" for model in self.models]
        there_are = f"there are {', '.join(known)}"
        if not name:
            raise ModelNotFound(f"this URL names no model: {there_are}; append one of them")
        raise ModelNotFound(f"no model '/{name}': {there_are}{did_you_mean(f'/{name}', known)}")

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
        call = Run(model, arrays, wanted, request.config, deadline)
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


async def _finish_async(call: Run, connection: Connection) -> None:
    call.model.awaited += 1  # not where the task is made: one that is cancelled before it begins does not come here
    outcome = await call.aoutcome()
    call.model.awaited -= 1
    connection.reply_outcome(outcome)
