"""The control plane: an HTTP API that says how the models are, and may change them.

It computes nothing for clients of models. What the data plane's loop owns is read and changed there, by messages from
here; what may be read anywhere, such as counters, is read here, so that no question slows an answer.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar
from urllib.parse import quote

import remote_ops
from remote_ops.errors import (
    InvalidRequest,
    ModelNotFound,
    ModelUnavailable,
)
from remote_ops.signature import did_you_mean
from server_ref import api
from server_ref.answer import failure_of
from server_ref.devices import devices, resident_bytes
from server_ref.front import Front
from server_ref.gate import Gate
from server_ref.graphs import is_graph, pictured
from server_ref.model import Version
from server_ref.names import without_places
from server_ref.repository import Entry

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import BaseRoute

    from server_ref.repository import Repository

__all__ = ["Controlled", "ModelControl", "control_app"]

T = TypeVar("T")
_ANSWER_S = 5.0
_MAX_BODY_BYTES = 1 << 16
_LOGGERS = ("server_ref", "remote_ops", "ensemble")


class ModelControl(Protocol):
    """What loads and unloads models, and decides which version answers; called on the data plane's loop only.

    Each raises `ModelNotFound` for what there is not, and an error of ours for what it cannot do.
    """

    def index(self) -> Sequence[Entry]:
        """Every version that is known, whatever its state."""

    async def load(self, name: str, *, version: str = "") -> Any:
        """Serve a model, or serve it anew; returns once it is warm."""

    async def fetch(self, name: str, url: str, sha256: str, *, version: str = "") -> Any:
        """Serve a model file from the web, if it may be had from there."""

    async def unload(self, name: str, *, version: str = "") -> Any:
        """Serve it no more; returns once what was begun has ended."""

    async def scale(self, name: str, count: int, *, version: str = "") -> Any:
        """Serve a version with so many instances."""

    def set_labels(self, name: str, labels: dict[str, str]) -> None:
        """Let labels stand for versions; all of them at once."""

    def set_weights(self, name: str, weights: dict[str, float]) -> None:
        """Split the requests that name no version."""

    def labels(self, name: str) -> Mapping[str, str]:
        """What each label stands for."""

    def weights(self, name: str) -> Mapping[str, float]:
        """How requests are split."""


class Controlled(Protocol):
    """What the control plane needs of the server that it looks after."""

    front: Front
    repository: Repository
    url: str


# --------------------------------------------------------------------------- the application


class _Routed(NamedTuple):
    operation: api.Operation
    answer: Callable[[_Api, Request], Awaitable[Any]]


class _Api:
    """What each route answers; runs on the control plane's loop."""

    def __init__(
        self, server: Controlled, models: ModelControl, *, allow_changes: bool, url: Callable[[], str]
    ) -> None:
        self.server = server
        self.models = models
        self.allow_changes = allow_changes
        self.url = url
        self.started_at = time.time()

    # on the data plane's loop

    async def there(self, call: Callable[[], T]) -> T:
        """What a quick call gives that runs on the data plane's loop."""

        async def run() -> T:
            return call()

        return await self.awaited(run, within_s=_ANSWER_S)

    async def awaited(self, call: Callable[[], Awaitable[T]], within_s: float | None = None) -> T:
        """The same of one that may wait; a caller that goes away does not stop it.

        Raises:
            ModelUnavailable: the data plane has ended, or does not answer.
        """

        async def run() -> T:
            return await call()

        made = run()
        try:
            future = asyncio.run_coroutine_threadsafe(made, self.server.front.loop)
        except RuntimeError as error:
            made.close()
            raise ModelUnavailable("the data plane has ended") from error
        waited = asyncio.wrap_future(future)
        done, _ = await asyncio.wait((waited,), timeout=within_s)
        if not done:
            raise ModelUnavailable(f"no answer from the data plane in {within_s:g} s")
        return waited.result()

    # told

    async def list_models(self, request: Request) -> api.ModelList:
        return api.ModelList(models=await self._views())

    async def get_model(self, request: Request) -> api.ModelView:
        name = request.path_params["model"]
        views = await self._views()
        found = next((view for view in views if view.name == name), None)
        if found is None:
            known = [view.name for view in views]
            raise ModelNotFound(f"no model '{name}': there are {', '.join(known) or 'none'}{did_you_mean(name, known)}")
        return found

    async def get_graph(self, request: Request) -> api.Graph:
        name = request.path_params["model"]
        version = await self.there(lambda: self.server.front.catalog.model(name).version())
        if not is_graph(version.servable):
            raise InvalidRequest(f"model '{name}' is no graph of models")
        return api.graph_of(*pictured(version.servable))

    async def get_server(self, request: Request) -> api.Server:
        front = self.server.front
        ready, draining, connections, in_flight = await self.there(
            lambda: (front.ready and front.catalog.ready, front.draining, len(front.connections), front.in_flight)
        )
        now = time.time()
        return api.Server(
            version=remote_ops.__version__, pid=os.getpid(), started_at=self.started_at, uptime_s=now - self.started_at,
            url=self.server.url, control_url=self.url(), ready=ready, draining=draining, connections=connections,
            in_flight=in_flight, memory_rss_bytes=resident_bytes(), allows_changes=self.allow_changes,
            devices=[api.DeviceView(**device._asdict()) for device in await asyncio.to_thread(devices)],
        )  # fmt: skip

    async def get_errors(self, request: Request) -> api.ErrorList:
        return api.errors_of(self.server.front.journal.errors())

    async def get_log_level(self, request: Request) -> api.LogLevel:
        return api.LogLevel(level=_level())

    async def get_health(self, request: Request) -> api.Done:
        await self.there(lambda: None)
        return api.Done(done="ok")

    async def get_document(self, request: Request) -> dict[str, Any]:
        return api.document([routed.operation for routed in _ROUTES])

    # changed

    async def load(self, request: Request) -> api.Done:
        name, wanted = request.path_params["model"], await _body(request, api.Wanted)
        if wanted.url:
            await self.awaited(lambda: self.models.fetch(name, wanted.url, wanted.sha256, version=wanted.version))
        else:
            await self.awaited(lambda: self.models.load(name, version=wanted.version))
        return api.Done(done=f"'{name}' is loaded")

    async def unload(self, request: Request) -> api.Done:
        name, which = request.path_params["model"], await _body(request, api.Which)
        await self.awaited(lambda: self.models.unload(name, version=which.version))
        return api.Done(done=f"'{name}' is unloaded")

    async def scale(self, request: Request) -> api.Done:
        name, scale = request.path_params["model"], await _body(request, api.Scale)
        await self.awaited(lambda: self.models.scale(name, scale.count, version=scale.version))
        return api.Done(done=f"'{name}' has {scale.count} instances")

    async def set_labels(self, request: Request) -> api.Labels:
        name, labels = request.path_params["model"], await _body(request, api.Labels)
        await self.there(lambda: self.models.set_labels(name, labels.root))
        return api.Labels(dict(await self.there(lambda: self.models.labels(name))))

    async def set_weights(self, request: Request) -> api.Weights:
        name, weights = request.path_params["model"], await _body(request, api.Weights)
        await self.there(lambda: self.models.set_weights(name, weights.root))
        return api.Weights(dict(await self.there(lambda: self.models.weights(name))))

    async def drain(self, request: Request) -> api.Done:
        ask = self.server.front.on_shutdown
        if ask is None:
            raise InvalidRequest("this server runs inside a program, and ends when its block does")
        await self.there(ask)
        return api.Done(done="draining")

    async def set_log_level(self, request: Request) -> api.LogLevel:
        wanted = await _body(request, api.LogLevel)
        for name in _LOGGERS:
            logging.getLogger(name).setLevel(wanted.level)
        return api.LogLevel(level=_level())

    # inside

    async def _views(self) -> list[api.ModelView]:
        seen = await self.there(self._look)
        return [
            api.ModelView(
                name=name, path=path, labels=dict(labels), weights=dict(weights),
                graph=any(version is not None and is_graph(version.servable) for _, version in versions),
                versions=[api.version_of(entry, version) for entry, version in versions],
            )
            for name, path, labels, weights, versions in seen
        ]  # fmt: skip

    def _look(self) -> list[_Seen]:
        catalog, models = self.server.front.catalog, self.models
        by_name: dict[str, list[tuple[Entry, Version | None]]] = {}
        for entry in models.index():
            served = catalog.models.get(entry.name)
            version = served.versions.get(entry.version) if served is not None else None
            by_name.setdefault(entry.name, []).append((entry, version))
        alone = catalog.only is not None
        seen = []
        for name, versions in by_name.items():
            path = "/" if alone else f"/{quote(name, safe='')}"
            served_now = name in catalog.models
            labels, weights = (models.labels(name), models.weights(name)) if served_now else ({}, {})
            seen.append((name, path, labels, weights, versions))
        return seen


if TYPE_CHECKING:
    _Seen = tuple[str, str, Mapping[str, str], Mapping[str, float], list[tuple[Entry, Version | None]]]


_MODEL = "/api/models/{model}"
_ROUTES = tuple(
    _Routed(api.Operation(method, path, summary, told, takes, change), answer)
    for method, path, answer, summary, told, takes, change in (
        ("GET", "/api/models", _Api.list_models, "Every model, with versions and numbers", api.ModelList, None, False),
        ("GET", _MODEL, _Api.get_model, "One model", api.ModelView, None, False),
        ("PUT", f"{_MODEL}/labels", _Api.set_labels, "Let labels stand for versions", api.Labels, api.Labels, True),
        ("PUT", f"{_MODEL}/weights", _Api.set_weights, "Split requests by weight", api.Weights, api.Weights, True),
        ("POST", f"{_MODEL}/load", _Api.load, "Load a model, or load it anew", api.Done, api.Wanted, True),
        ("POST", f"{_MODEL}/unload", _Api.unload, "Serve a model no more", api.Done, api.Which, True),
        ("POST", f"{_MODEL}/scale", _Api.scale, "Change how many instances there are", api.Done, api.Scale, True),
        ("GET", "/api/graph/{model}", _Api.get_graph, "The nodes and edges of a graph", api.Graph, None, False),
        ("GET", "/api/server", _Api.get_server, "The server itself", api.Server, None, False),
        ("GET", "/api/errors", _Api.get_errors, "The latest requests that went wrong", api.ErrorList, None, False),
        ("POST", "/api/drain", _Api.drain, "Finish what is in flight, and exit", api.Done, None, True),
        ("GET", "/api/log-level", _Api.get_log_level, "How much is logged", api.LogLevel, None, False),
        ("PUT", "/api/log-level", _Api.set_log_level, "Log more or less", api.LogLevel, api.LogLevel, True),
        ("GET", "/healthz", _Api.get_health, "Whether the data plane's loop answers", api.Done, None, False),
        ("GET", "/openapi.json", _Api.get_document, "This document", None, None, False),
    )
)  # fmt: skip


def control_app(
    server: Controlled,
    *,
    models: ModelControl,
    allow_changes: bool = False,
    loopback: bool = True,
    extra_routes: Sequence[BaseRoute] = (),
    url: Callable[[], str] = lambda: "",
) -> Starlette:
    """The API as an ASGI application.

    Args:
        server: what it looks after.
        models: what changes models.
        allow_changes: whether it may change anything.
        loopback: whether only this machine can reach it; reading it wants a token, too, if not.
        extra_routes: others, such as a page at `/`; guarded as those of the API are, but for `/` itself.
        url: where it is.
    """
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.routing import Route

    answers = _Api(server, models, allow_changes=allow_changes, url=url)
    routes: list[BaseRoute] = [
        Route(routed.operation.path, _endpoint(answers, routed), methods=[routed.operation.method])
        for routed in _ROUTES
    ]

    async def in_json(request: Request, error: Exception) -> Response:
        return _told(error.status_code, str(error.detail)) if isinstance(error, HTTPException) else _told_of(error)

    gate = Middleware(Gate, access=server.front.access, allow_changes=allow_changes, loopback=loopback, refuse=_told_of)
    handlers: Any = {HTTPException: in_json, Exception: in_json}
    return Starlette(routes=[*routes, *extra_routes], middleware=[gate], exception_handlers=handlers)


def _endpoint(answers: _Api, routed: _Routed) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        from starlette.responses import Response

        try:
            told = await routed.answer(answers, request)
        except Exception as error:
            return _told_of(error)
        body = json.dumps(told) if isinstance(told, dict) else told.model_dump_json()
        return Response(body, media_type="application/json", headers={"Cache-Control": "no-store"})

    return endpoint


def _told_of(error: Exception) -> Response:
    failure = failure_of(error)
    return _told(failure.status, without_places(failure.message), type(error).__name__, dict(failure.headers))


def _told(status: int, message: str, kind: str = "", headers: Mapping[str, str] | None = None) -> Response:
    from starlette.responses import Response

    told = api.Told(error=message, kind=kind)
    return Response(told.model_dump_json(), status, headers, media_type="application/json")


async def _body(request: Request, form: type[T]) -> T:
    """The body of a request in its form; an empty one stands for a form that is all defaults.

    Raises:
        InvalidRequest: it is too large, or not of that form; says where, and not what it has there.
    """
    from pydantic import ValidationError

    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_BODY_BYTES:
            raise InvalidRequest(f"expected a body of at most {_MAX_BODY_BYTES:,} bytes")
    try:
        return form.model_validate_json(bytes(body) or b"{}")  # type: ignore[attr-defined,no-any-return]
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc'])) or 'the body'}: {fault['msg']}" for fault in error.errors()]
        raise InvalidRequest("; ".join(faults)) from None


def _level() -> str:
    return logging.getLevelName(logging.getLogger(_LOGGERS[0]).getEffectiveLevel())
