"""What a server tells Prometheus: read from its counters when it is asked, so that requests pay nothing for it.

It counts nothing itself, and changes nothing. Labels are models and versions that are known, and one for all others.
"""

from __future__ import annotations

import math
import platform
import re
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

import remote_ops
from remote_ops.errors import SpecError
from server_ref.cache import CacheStats
from server_ref.devices import Device, devices
from server_ref.model import Version
from server_ref.names import UNKNOWN
from server_ref.stats import Histogram, Snapshot

if TYPE_CHECKING:
    from starlette.routing import Route

    from server_ref.front import Front
    from server_ref.repository import Repository

__all__ = ["COMPAT", "Metrics", "Observed", "metrics_routes"]


class Observed(Protocol):
    """What is needed of a server; all that is read of it may be read on any thread."""

    front: Front
    repository: Repository


class _Seen(NamedTuple):
    """One version, and its numbers at one instant."""

    version: Version
    now: Snapshot
    cache: CacheStats | None

    @property
    def labels(self) -> list[str]:
        return [self.version.name, self.version.version]


Value = float | Mapping[tuple[str, ...], float] | Histogram | None


class _Family(NamedTuple):
    """A metric with a value for each version: one, one for each value of more labels, or a histogram; None: none."""

    name: str
    text: str
    of: Callable[[_Seen], Value]
    kind: str = "counter"
    labels: tuple[str, ...] = ()


def _cached(of: Callable[[CacheStats], float]) -> Callable[[_Seen], Value]:
    return lambda seen: None if seen.cache is None else of(seen.cache)


def _by_reason(failures: Mapping[str, int]) -> Mapping[tuple[str, ...], float]:
    return {(why,): count for why, count in failures.items()}


def _restarts(version: Version) -> int:
    return sum(max(0, getattr(servable, "starts", 1) - 1) for servable in version.instances.servables)


_FAMILIES = (
    _Family("failures", "Requests that failed, by why.", lambda seen: _by_reason(seen.now.failures),
            labels=("reason",)),
    _Family("request_seconds", "From the arrival of a request to its answer, where it succeeded.",
            lambda seen: seen.now.request_s, "histogram"),
    _Family("queue_seconds", "How long a request waited for an instance.", lambda seen: seen.now.queue_s, "histogram"),
    _Family("compute_seconds", "How long the model took for a batch.", lambda seen: seen.now.compute_s, "histogram"),
    _Family("batch_rows", "Rows that the model was given at a time.", lambda seen: seen.now.batch_rows, "histogram"),
    _Family("request_bytes", "Bytes of the inputs of a request; its count is that of the requests that came.",
            lambda seen: seen.now.request_bytes, "histogram"),
    _Family("rows", "Rows that the model was given.", lambda seen: seen.now.rows),
    _Family("executions", "Batches that the model was given.", lambda seen: seen.now.executions),
    _Family("bytes", "Bytes of inputs (in) and of answers (out).",
            lambda seen: {("in",): seen.now.bytes_in, ("out",): seen.now.bytes_out}, labels=("direction",)),
    _Family("pending_requests", "Requests that have no answer yet.", lambda seen: seen.now.pending, "gauge"),
    _Family("queue_requests", "Requests that wait for an instance.",
            lambda seen: seen.version.instances.lanes.waiting, "gauge"),
    _Family("queue_bytes", "Bytes of the inputs of those that wait.",
            lambda seen: seen.version.instances.lanes.waiting_bytes, "gauge"),
    _Family("running_requests", "Requests that an instance computes.",
            lambda seen: seen.version.instances.lanes.running, "gauge"),
    _Family("instances", "Copies of the model.", lambda seen: len(seen.version.instances.servables), "gauge"),
    _Family("instances_healthy", "Copies that take requests.", lambda seen: seen.version.instances.healthy, "gauge"),
    _Family("instance_restarts", "Processes of isolated copies that were started again.",
            lambda seen: _restarts(seen.version)),
    _Family("cache_hits", "Rows that were answered without the model.", _cached(lambda cache: cache.hits)),
    _Family("cache_misses", "Rows that the model had to compute.", _cached(lambda cache: cache.misses)),
    _Family("cache_answers", "Requests that were answered without the model.", _cached(lambda cache: cache.answered)),
    _Family("cache_lookup_seconds", "Time spent in looking up.", _cached(lambda cache: cache.lookup_ns / 1e9)),
    _Family("cache_evictions", "Entries given up for others.", _cached(lambda cache: cache.evictions)),
    _Family("cache_entries", "Entries that are kept.", _cached(lambda cache: cache.entries), "gauge"),
    _Family("cache_bytes", "Bytes that they take.", _cached(lambda cache: cache.bytes), "gauge"),
)  # fmt: skip
_KINDS: Mapping[str, type[Metric]] = {
    "counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily,
}  # fmt: skip


class _Collector(Collector):
    """The metrics of one server under names of our own."""

    def __init__(self, server: Observed) -> None:
        self._server = server

    def collect(self) -> Iterator[Metric]:
        """Read them now; costs some 0.1 ms a version."""
        seen = _look(self._server)
        yield _requests(self._server.front, seen)
        for family in _FAMILIES:
            yield _filled(family, seen)
        yield from _of_models(self._server)
        yield from _of_server(self._server)
        yield from _of_devices(devices())


def _look(server: Observed) -> list[_Seen]:
    versions = [one for model in tuple(server.front.catalog.models.values()) for one in tuple(model.versions.values())]
    return [
        _Seen(version, version.stats.snapshot(), version.cache_stats() if version.cache_stats is not None else None)
        for version in versions
    ]


def _requests(front: Front, seen: Iterable[_Seen]) -> Metric:
    text = f"Requests that have ended; those that name no model or version of this server are of model {UNKNOWN}."
    metric = CounterMetricFamily("remote_ops_requests", text, labels=("model", "version", "outcome"))
    for one in seen:
        metric.add_metric([*one.labels, "success"], one.now.success.times)
        metric.add_metric([*one.labels, "failure"], one.now.failure.times)
    metric.add_metric([UNKNOWN, "", "failure"], front.unknown)
    return metric


def _filled(family: _Family, seen: Iterable[_Seen]) -> Metric:
    metric = _KINDS[family.kind](f"remote_ops_{family.name}", family.text, labels=("model", "version", *family.labels))  # type: ignore[call-arg]
    for one in seen:
        _add(metric, one.labels, family.of(one))
    return metric


def _add(metric: Metric, labels: Sequence[str], value: Value) -> None:
    if isinstance(metric, HistogramMetricFamily) and isinstance(value, Histogram):
        metric.add_metric(labels, _buckets(value), value.sum)
    elif isinstance(metric, CounterMetricFamily | GaugeMetricFamily) and isinstance(value, Mapping):
        for more, number in value.items():
            metric.add_metric([*labels, *more], number)
    elif isinstance(metric, CounterMetricFamily | GaugeMetricFamily) and isinstance(value, int | float):
        metric.add_metric(labels, value)


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    bounds, total, buckets = [*histogram.bounds, math.inf], 0, []
    for bound, count in zip(bounds, histogram.counts, strict=True):
        total += count
        buckets.append(("+Inf" if bound == math.inf else repr(float(f"{bound:.12g}")), float(total)))
    return buckets


def _of_models(server: Observed) -> Iterator[Metric]:
    labels = ("model", "version")
    ready = GaugeMetricFamily("remote_ops_model_ready", "Whether requests are taken: 1 or 0.", labels=labels)
    load_s = GaugeMetricFamily("remote_ops_model_load_seconds", "How long opening and warming took.", labels=labels)
    models = server.front.catalog.models
    for entry in server.repository.index():
        model = models.get(entry.name)
        version = model.versions.get(entry.version) if model is not None else None
        up = entry.state == "ready" and version is not None and version.ready
        ready.add_metric([entry.name, entry.version], float(up))
        if entry.load_s:
            load_s.add_metric([entry.name, entry.version], entry.load_s)
    yield from (ready, load_s)


def _of_server(server: Observed) -> Iterator[Metric]:
    front = server.front
    answers = CounterMetricFamily(
        "remote_ops_answers", "Answers of any kind, by the class of their status.", labels=("status",)
    )
    for hundreds in (2, 3, 4, 5):
        answers.add_metric([f"{hundreds}xx"], front.answers[hundreds])
    yield answers
    yield GaugeMetricFamily("remote_ops_ready", "Whether the server is ready: 1 or 0.", float(_is_ready(front)))
    yield GaugeMetricFamily("remote_ops_connections", "Connections of clients.", len(front.connections))
    yield GaugeMetricFamily("remote_ops_in_flight_requests", "Requests that are received or answered.", front.in_flight)
    build = GaugeMetricFamily("remote_ops_build_info", "What runs here; always 1.", labels=("version", "python"))
    build.add_metric([remote_ops.__version__, platform.python_version()], 1)
    yield build


def _is_ready(front: Front) -> bool:
    versions = [one for model in tuple(front.catalog.models.values()) for one in tuple(model.versions.values())]
    return front.ready and all(version.ready for version in versions)


def _of_devices(found: Iterable[Device]) -> Iterator[Metric]:
    labels = ("device", "name")
    used = GaugeMetricFamily("remote_ops_device_memory_used_bytes", "Memory of a device in use.", labels=labels)
    total = GaugeMetricFamily("remote_ops_device_memory_bytes", "Memory of a device.", labels=labels)
    for device in found:
        used.add_metric([str(device.number), device.name], device.used_bytes)
        total.add_metric([str(device.number), device.name], device.total_bytes)
    yield from (used, total)


# --------------------------------------------------------------------------- the names of other servers


class _Alias(NamedTuple):
    """A metric that another server has: its exact name, and its values by labels."""

    name: str
    text: str
    of: Callable[[_Seen], Mapping[tuple[str, ...], float] | float | None]
    labels: tuple[str, ...] = ()
    kind: str = "counter"


def _us(seconds: float) -> float:
    return round(1e6 * seconds)


# Triton counts requests that its queue gives up as rejected, and has no word for those that were never well formed.
_TRITON_REASONS = {
    "REJECTED": ("rejected", "timeout"), "CANCELED": ("canceled",), "BACKEND": ("model",), "OTHER": ("invalid",),
}  # fmt: skip


def _triton_failures(seen: _Seen) -> Mapping[tuple[str, ...], float]:
    return {(why,): sum(seen.now.failures[ours] for ours in of) for why, of in _TRITON_REASONS.items()}


_TRITON = (
    _Alias("nv_inference_request_success", "Requests that succeeded.", lambda seen: seen.now.success.times),
    _Alias("nv_inference_request_failure", "Requests that failed.", _triton_failures, ("reason",)),
    _Alias("nv_inference_count", "Rows that the model was given.", lambda seen: seen.now.rows),
    _Alias("nv_inference_exec_count", "Batches that the model was given.", lambda seen: seen.now.executions),
    _Alias("nv_inference_pending_request_count", "Requests that wait for an instance.",
           lambda seen: seen.version.instances.lanes.waiting, kind="gauge"),
    _Alias("nv_inference_request_duration_us", "From arrival to answer, together.",
           lambda seen: _us(seen.now.success.seconds)),
    _Alias("nv_inference_queue_duration_us", "Time in the queue, together.", lambda seen: _us(seen.now.queue.seconds)),
    _Alias("nv_inference_compute_input_duration_us", "Time to make batches, together.",
           lambda seen: _us(seen.now.compute_input.seconds)),
    _Alias("nv_inference_compute_infer_duration_us", "Time in the model, together.",
           lambda seen: _us(seen.now.compute_infer.seconds)),
    _Alias("nv_inference_compute_output_duration_us", "Time to write answers, together.",
           lambda seen: _us(seen.now.compute_output.seconds)),
    _Alias("nv_cache_num_hits_per_model", "Requests that were answered without the model.",
           lambda seen: seen.cache and seen.cache.answered),
    _Alias("nv_cache_num_misses_per_model", "Requests that were looked up, and that the model had a part in.",
           lambda seen: seen.cache and seen.cache.lookups - seen.cache.answered),
)  # fmt: skip
_TORCHSERVE = (
    _Alias("ts_inference_requests_total", "Requests.", lambda seen: seen.now.requests),
    _Alias("ts_inference_latency_microseconds", "From arrival to answer, together.",
           lambda seen: _us(seen.now.success.seconds)),
    _Alias("ts_queue_latency_microseconds", "Time in the queue, together.", lambda seen: _us(seen.now.queue.seconds)),
)  # fmt: skip


class _Triton(Collector):
    """The metrics that Triton Inference Server has as well, under its names."""

    def __init__(self, server: Observed) -> None:
        self._server = server

    def collect(self) -> Iterator[Metric]:
        """Read them now."""
        seen = _look(self._server)
        for alias in _TRITON:
            yield _aliased(alias, seen, lambda one: {"model": one.version.name, "version": _numbered(one)})
        found = devices()
        yield _of_gpus("nv_gpu_memory_total_bytes", "Memory of a device.", [one.total_bytes for one in found])
        yield _of_gpus("nv_gpu_memory_used_bytes", "Memory of a device in use.", [one.used_bytes for one in found])


def _of_gpus(name: str, text: str, numbers: Sequence[float]) -> Metric:
    metric = Metric(name, text, "gauge")
    for gpu, number in enumerate(numbers):
        metric.add_sample(name, {"gpu_uuid": str(gpu)}, number)
    return metric


class _TorchServe(Collector):
    """The metrics that TorchServe has as well, under its names."""

    def __init__(self, server: Observed) -> None:
        self._server = server

    def collect(self) -> Iterator[Metric]:
        """Read them now."""
        seen, host = _look(self._server), socket.gethostname()
        for alias in _TORCHSERVE:
            yield _aliased(
                alias, seen,
                lambda one: {"model_name": one.version.name, "model_version": _numbered(one), "hostname": host},
            )  # fmt: skip
        for hundreds in (2, 4, 5):
            name = f"Requests{hundreds}XX"
            metric = Metric(name, f"Answers with a status of {hundreds}00 to {hundreds}99.", "unknown")
            metric.add_sample(name, {"Level": "Host", "Hostname": host}, self._server.front.answers[hundreds])
            yield metric


def _aliased(alias: _Alias, seen: Iterable[_Seen], labelled: Callable[[_Seen], dict[str, str]]) -> Metric:
    """A family under an exact name: a counter whose name lacks `_total` is none to the library, which would add it."""
    metric = Metric(alias.name, alias.text, "unknown" if alias.kind == "counter" else alias.kind)
    for one in seen:
        value, labels = alias.of(one), labelled(one)
        if isinstance(value, Mapping):
            for more, number in value.items():
                metric.add_sample(alias.name, {**labels, **dict(zip(alias.labels, more, strict=True))}, number)
        elif value is not None:
            metric.add_sample(alias.name, labels, value)
    return metric


def _numbered(seen: _Seen) -> str:
    """The version as those servers have it, where each has a number."""
    return seen.version.version or "1"


COMPAT: Mapping[str, Callable[[Observed], Collector]] = {"triton": _Triton, "torchserve": _TorchServe}
_FOREIGN = re.compile(rb"^(# TYPE (?:nv_|ts_|Requests)\w+) untyped$", re.MULTILINE)


# --------------------------------------------------------------------------- told


class Metrics:
    """The metrics of a server, each time as they are then.

    Args:
        server: whose.
        compat: whose names there are besides: `triton`, `torchserve`.

    Raises:
        SpecError: no such names are known.
    """

    def __init__(self, server: Observed, compat: Iterable[str] = ()) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Collector(server))
        self._registry.register(ProcessCollector(registry=None))
        for name in dict.fromkeys(compat):
            if name not in COMPAT:
                raise SpecError(f"expected some of {', '.join(COMPAT)}, got {name!r}", path="--metrics-compat")
            self._registry.register(COMPAT[name](server))

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """All of it in the form that `accept` asks for, Prometheus' text or OpenMetrics, and its content type."""
        chosen: tuple[Callable[[CollectorRegistry], bytes], str] = choose_encoder(accept)
        encode, content_type = chosen
        return _FOREIGN.sub(rb"\1 counter", encode(self._registry)), content_type


def metrics_routes(server: Observed, compat: Iterable[str] = ()) -> list[Route]:
    """`/metrics`, for an application of Starlette; what it tells is read on a thread of its own."""
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    metrics = Metrics(server, compat)

    def endpoint(request: Request) -> Response:
        body, content_type = metrics.render(request.headers.get("accept", ""))
        return Response(body, headers={"Content-Type": content_type, "Cache-Control": "no-store"})

    return [Route("/metrics", endpoint, methods=["GET"])]
