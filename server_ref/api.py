"""What the control plane tells and takes: its forms, how they are filled, and the OpenAPI document that describes them.

It listens nowhere and changes nothing; what it reads of a version may be read on any thread.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, RootModel
from pydantic.json_schema import models_json_schema

import remote_ops
from remote_ops.signature import TensorSpec
from server_ref import stats
from server_ref.cache import Cached
from server_ref.mishaps import Mishap
from server_ref.model import Version
from server_ref.names import without_places
from server_ref.repository import Entry
from server_ref.stats import Snapshot

if TYPE_CHECKING:
    from ensemble.diagram import Box, Diagram
    from ensemble.latency import Latency

__all__ = [
    "Done", "ErrorList", "Graph", "Labels", "LogLevel", "ModelList", "ModelView", "Operation", "Scale",
    "Server", "Told", "VersionView", "Wanted", "Weights", "Which", "document", "errors_of", "graph_of", "version_of",
]  # fmt: skip

_WINDOW_S = 60.0


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


# --------------------------------------------------------------------------- told


class Tensor(_Form):
    """An input or output; -1 in a shape is any size, and no shape any number of axes."""

    name: str
    dtype: str
    shape: list[int] | None
    description: str = ""


class Batching(_Form):
    """When requests are served together; `max_rows` 0: each by itself."""

    max_rows: int
    max_delay_s: float
    preferred_rows: list[int]
    allowed_rows: list[int]
    priorities: int


class Queue(_Form):
    """What waits now, and the most that may."""

    requests: int
    bytes: int
    max_requests: int
    max_bytes: int


class Counters(_Form):
    """What has been done since the version is served; requests are success and failure together."""

    requests: int
    success: int
    failure: int
    failures: dict[str, int]
    pending: int
    rows: int
    executions: int
    bytes_in: int
    bytes_out: int
    queue_s: float
    compute_s: float
    batches: dict[str, int] = Field(description="how many batches of how many rows")


class Latencies(_Form):
    """Percentiles over the requests that succeeded of late, in milliseconds; none where there are none."""

    requests: int
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    requests_per_s: float
    rows_per_s: float
    window_s: float = Field(description="how late that is")


class VersionView(_Form):
    """One version of a model."""

    version: str
    state: str = Field(description="loading, warming, ready, draining, unavailable or failed")
    reason: str
    since: float = Field(description="seconds since 1970")
    signature: str = ""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    instances: int = 0
    concurrency: int = Field(0, description="runs at a time; 0 where it is awaited")
    devices: list[str] = []
    batching: Batching | None = None
    queue: Queue | None = None
    cache: dict[str, int] | None = Field(None, description="counters of the row cache, where there is one")
    counters: Counters | None = None
    latencies: Latencies | None = None


class ModelView(_Form):
    """A model with its versions, the newest last."""

    name: str
    path: str = Field(description="of its URL on the data plane")
    graph: bool = Field(description="whether it is a graph of models")
    versions: list[VersionView]
    labels: dict[str, str] = Field(description="label to version")
    weights: dict[str, float] = Field(description="version to its share of the requests")


class ModelList(_Form):
    """Every model."""

    models: list[ModelView]


class DeviceView(_Form):
    """An accelerator."""

    number: int
    name: str
    used_bytes: int
    total_bytes: int
    busy_percent: int | None


class Server(_Form):
    """The server itself."""

    version: str
    pid: int
    started_at: float = Field(description="seconds since 1970")
    uptime_s: float
    url: str
    control_url: str
    ready: bool
    draining: bool
    connections: int
    in_flight: int
    memory_rss_bytes: int
    devices: list[DeviceView]
    allows_changes: bool


class Error(_Form):
    """A request that went wrong."""

    at: float = Field(description="seconds since 1970")
    model: str
    request_id: str
    kind: str = Field(description="class of the error")
    message: str
    version: str = Field(description="empty where none had been chosen")


class ErrorList(_Form):
    """The latest requests that went wrong, the last one first."""

    errors: list[Error]


class Node(_Form):
    """A box of a graph: an input, an output or a node, perhaps with what it owns."""

    key: str
    kind: str
    title: str
    lines: list[str]
    role: str
    optional: bool
    calls: int = Field(0, description="in the runs that were traced")
    median_ms: float | None = None
    inside: Graph | None = None


class Edge(_Form):
    """What flows from a box to another."""

    source: str
    target: str
    label: str
    operations: str
    optional: bool


class Graph(_Form):
    """A graph of models, or what one of its nodes owns."""

    nodes: list[Node]
    edges: list[Edge]


Node.model_rebuild()


class Told(_Form):
    """What went wrong."""

    error: str
    kind: str = Field("", description="class of the error")


class Done(_Form):
    """What was done."""

    done: str


# --------------------------------------------------------------------------- taken


class Which(_Form):
    """A version; the newest, or all, where it is empty."""

    version: str = ""


class Wanted(Which):
    """What to load: a version that is known, or a file from the web with its SHA-256."""

    url: str = ""
    sha256: str = ""


class Scale(_Form):
    """How many instances a version shall have."""

    count: int = Field(ge=0, le=1024)
    version: str = ""


class Labels(RootModel[dict[str, str]]):
    """Label to version, all of them: what is left out is removed."""


class Weights(RootModel[dict[str, float]]):
    """Version to its share of the requests."""


class LogLevel(_Form):
    """How much is logged."""

    level: str = Field(pattern="^(DEBUG|INFO|WARNING|ERROR)$")


# --------------------------------------------------------------------------- filled


def version_of(entry: Entry, version: Version | None) -> VersionView:
    """All that there is to say of a version, its counters and percentiles included; costs some 0.5 ms.

    Args:
        entry: how it is.
        version: what is served; None where there is nothing, as while it loads.
    """
    known = {
        "version": entry.version,
        "state": entry.state,
        "reason": without_places(entry.reason),
        "since": entry.since,
    }
    if version is None:
        return VersionView(**known)  # type: ignore[arg-type]
    signature, lanes, snapshot = version.signature, version.instances.lanes, version.stats.snapshot()
    batching = lanes.batching
    return VersionView(
        **known,  # type: ignore[arg-type]
        signature=str(signature),
        inputs=list(map(_tensor, signature.inputs)),
        outputs=list(map(_tensor, signature.outputs)),
        instances=len(version.instances.servables),
        concurrency=0 if version.ainfer is not None else lanes.concurrency,
        devices=sorted({str(getattr(servable, "device", "")) for servable in version.instances.servables} - {""}),
        batching=Batching(
            max_rows=batching.max_rows, max_delay_s=batching.max_delay_s, priorities=batching.priorities,
            preferred_rows=list(batching.preferred_rows), allowed_rows=list(batching.allowed_rows),
        ),
        queue=Queue(
            requests=lanes.waiting, bytes=lanes.waiting_bytes,
            max_requests=version.limits.max_requests, max_bytes=version.limits.max_bytes,
        ),
        cache=_cache_of(version),
        counters=_counters(snapshot),
        latencies=_latencies(stats.latencies(snapshot, time.monotonic(), _WINDOW_S)),
    )  # fmt: skip


def _tensor(spec: TensorSpec) -> Tensor:
    shape = None if spec.shape is None else list(spec.shape)
    return Tensor(name=spec.name, dtype=spec.dtype, shape=shape, description=spec.description)


def _cache_of(version: Version) -> dict[str, int] | None:
    return version.outer.cache_stats()._asdict() if isinstance(version.outer, Cached) else None


def _counters(snapshot: Snapshot) -> Counters:
    return Counters(
        requests=snapshot.requests, success=snapshot.success.times, failure=snapshot.failure.times,
        failures=snapshot.failures, pending=snapshot.pending, rows=snapshot.rows, executions=snapshot.executions,
        bytes_in=snapshot.bytes_in, bytes_out=snapshot.bytes_out,
        queue_s=snapshot.queue.seconds, compute_s=snapshot.compute_infer.seconds,
        batches={str(rows): spent[1].times for rows, spent in sorted(snapshot.batches.items())},
    )  # fmt: skip


def _latencies(late: stats.Latencies) -> Latencies:
    p50_ms, p95_ms, p99_ms = (1e3 * one if late.requests else None for one in (late.p50_s, late.p95_s, late.p99_s))
    return Latencies(
        requests=late.requests, p50_ms=p50_ms, p95_ms=p95_ms, p99_ms=p99_ms, window_s=_WINDOW_S,
        requests_per_s=late.requests_per_s, rows_per_s=late.rows_per_s,
    )  # fmt: skip


def errors_of(mishaps: Sequence[Mishap]) -> ErrorList:
    """The latest errors, as they are told."""
    return ErrorList(errors=[Error(**mishap._asdict()) for mishap in mishaps])


def graph_of(diagram: Diagram, latencies: Mapping[str, Latency]) -> Graph:
    """A graph, with how long its nodes took where that is known."""
    return Graph(
        nodes=[_node(box, latencies) for box in diagram.boxes],
        edges=[Edge(**arrow._asdict()) for arrow in diagram.arrows],
    )


def _node(box: Box, latencies: Mapping[str, Latency]) -> Node:
    took = latencies.get(box.key)
    return Node(
        key=box.key, kind=box.kind, title=box.title, lines=list(box.lines), role=box.role, optional=box.optional,
        calls=took.calls if took else 0, median_ms=took.median_ms if took else None,
        inside=graph_of(box.inside, latencies) if box.inside is not None else None,
    )  # fmt: skip


# --------------------------------------------------------------------------- described


class Operation(NamedTuple):
    """One thing that can be asked of the control plane.

    Args:
        method, path: of the request; `{model}` in a path is a name.
        summary: what it does, in a line.
        answer: the form of what comes back; None where that is no form of ours.
        takes: the form of the body; None: there is none.
        change: whether it changes the server.
    """

    method: str
    path: str
    summary: str
    answer: type[BaseModel] | None
    takes: type[BaseModel] | None = None
    change: bool = False

    @property
    def name(self) -> str:
        """A word for it, of its own."""
        parts = [part.strip("{}") for part in self.path.replace("-", "_").split("/") if part and part != "api"]
        return "_".join([self.method.lower(), *(part.replace(".", "_") for part in parts)])


def document(operations: Sequence[Operation]) -> dict[str, Any]:
    """The OpenAPI 3.1 document of these operations."""
    taken = [operation.takes for operation in operations if operation.takes is not None]
    told = [operation.answer for operation in operations if operation.answer is not None] + [Told]
    pairs = [*((form, "validation") for form in taken), *((form, "serialization") for form in told)]
    places, schemas = models_json_schema(list(dict.fromkeys(pairs)), ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _described(operation, places)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Control plane of server_ref",
            "version": remote_ops.__version__,
            "description": "Changes are refused unless the server was started with --allow-model-control.",
        },
        "paths": paths,
        "components": {
            "schemas": schemas.get("$defs", {}),
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"token": []}, {}],
    }


def _described(operation: Operation, places: Mapping[Any, Mapping[str, Any]]) -> dict[str, Any]:
    def body(form: type[BaseModel], mode: str) -> dict[str, Any]:
        return {"application/json": {"schema": places[form, mode]}}

    answer = {"application/json": {}} if operation.answer is None else body(operation.answer, "serialization")
    described: dict[str, Any] = {
        "operationId": operation.name,
        "summary": operation.summary,
        "responses": {
            "200": {"description": "it is so", "content": answer},
            "default": {"description": "what went wrong", "content": body(Told, "serialization")},
        },
    }
    if "{model}" in operation.path:
        described["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    if operation.takes is not None:
        needed = operation.takes not in (Which, Wanted)
        described["requestBody"] = {"required": needed, "content": body(operation.takes, "validation")}
    return described
