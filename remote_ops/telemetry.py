"""What others see of a call: a line in the log, and spans of OpenTelemetry with the header that carries them on.

It knows when a sending begins and how it ends, and changes nothing about that. No tensor, header value, query of a URL
or word of a server goes into a line or a span.

OpenTelemetry is used once the program has loaded it, and never loaded from here: until then a call looks into
`sys.modules` and that is all. State: `_loaded`, what was found there, made anew if that is another.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

from remote_ops.errors import brief
from remote_ops.transport import Call, Reply
from remote_ops.url import Url

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

__all__ = ["Record", "SendingSpan", "call_span", "carried", "carry", "log", "note", "recorded", "tracing"]

log = logging.getLogger("remote_ops")


def tracing() -> bool:
    """Whether the program has loaded OpenTelemetry, and is through with it."""
    trace = sys.modules.get("opentelemetry.trace")
    return trace is not None and not getattr(trace.__spec__, "_initializing", False)


class _Loaded:
    """What we use of OpenTelemetry: looked up once, since an import inside a function is a microsecond each time."""

    def __init__(self, trace: Any) -> None:
        from opentelemetry import context, propagate

        self.trace = trace
        self.tracer: Tracer = trace.get_tracer("remote_ops", schema_url="https://opentelemetry.io/schemas/1.27.0")
        self.inject = propagate.inject
        self._context, self._extract = context, propagate.extract

    def attach(self, headers: Mapping[str, str]) -> None:
        """Make spans of the running task children of the trace that headers, by names in lower case, tell of."""
        self._context.attach(self._extract(headers))


_loaded: _Loaded | None = None


def _opentelemetry() -> _Loaded:
    global _loaded
    trace = sys.modules["opentelemetry.trace"]
    if _loaded is None or _loaded.trace is not trace:
        _loaded = _Loaded(trace)
    return _loaded


class Record(NamedTuple):
    """One request, as a program that asked for it with `recorded()` is told of it; times in seconds."""

    url: str
    attempt: int
    outcome: str
    began: float
    took_s: float
    sent_bytes: int
    received_bytes: int
    connecting_s: float | None = None
    sending_s: float | None = None
    waiting_s: float | None = None
    receiving_s: float | None = None


_RECORDS: ContextVar[list[Record] | None] = ContextVar("remote_ops_records", default=None)


@contextlib.contextmanager
def recorded() -> Iterator[list[Record]]:
    """Collect the requests of the calls made inside the block, in the order in which they end."""
    records: list[Record] = []
    token = _RECORDS.set(records)
    try:
        yield records
    finally:
        _RECORDS.reset(token)


def note(call: Call, attempt: int, outcome: str, began: float, reply: Reply | None) -> None:
    """Add a request that has ended to what is collected here, if anything is."""
    records = _RECORDS.get()
    if records is None:
        return
    phases = () if reply is None or reply.phases is None else reply.phases
    received = 0 if reply is None else len(reply.body)
    took_s = time.monotonic() - began
    records.append(Record(call.url.text, attempt, outcome, began, took_s, sum(map(len, call.body)), received, *phases))


_CARRIED: ContextVar[Sequence[tuple[str, str]]] = ContextVar("remote_ops_carried", default=())


def carry(headers: Sequence[tuple[str, str]]) -> None:
    """Let the calls of the running task, and of those that it starts, go on with what came in with a request.

    Args:
        headers: `traceparent`, `tracestate`, `X-Request-Id`, each as it came.

    Where the program has loaded OpenTelemetry, its spans become children of that trace.
    """
    _CARRIED.set(headers)
    if tracing():
        _opentelemetry().attach({name.lower(): value for name, value in headers})


def carried(*, unless: Collection[str], but: Sequence[tuple[str, str]] = ()) -> Sequence[tuple[str, str]]:
    """The headers that a sending passes on: none that goes by a name of `unless`, in lower case, or that `but` sets."""
    passed_on = _CARRIED.get()
    if not passed_on:
        return ()
    taken = {*unless, *[name.lower() for name, _ in but]}
    return [(name, value) for name, value in passed_on if name.lower() not in taken]


def _path(url: Url) -> str:
    return url.target.partition("?")[0]


def _fail(span: Span, error: BaseException) -> None:
    span.set_attribute("error.type", type(error).__name__)
    span.set_status(_opentelemetry().trace.StatusCode.ERROR, brief(error))


@contextlib.contextmanager
def call_span(what: str, url: Url) -> Iterator[None]:
    """A span around a call with all its sendings; only where `tracing()`."""
    with _opentelemetry().tracer.start_as_current_span(
        f"{what} {_path(url)}",
        attributes={"remote_ops.endpoint": url.text},
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        try:
            yield
        except BaseException as error:
            _fail(span, error)
            raise


class SendingSpan:
    """The span of one request; only where `tracing()`. Attributes of the semantic conventions of HTTP, and our own.

    Args:
        call: what is sent.
        attempt: which sending of its call this is, from 1.
        copy: whether it is the hedge of another.
        runs: whether the model runs for it.
        unless: names of headers, in lower case, that the caller sets, and that are therefore not ours to set.
    """

    def __init__(self, call: Call, *, attempt: int, copy: bool, runs: bool, unless: Collection[str]) -> None:
        url, loaded = call.url, _opentelemetry()
        self._span = loaded.tracer.start_span(f"{url.method} {_path(url)}", kind=loaded.trace.SpanKind.CLIENT)
        carrier: dict[str, str] = {}
        loaded.inject(carrier, loaded.trace.set_span_in_context(self._span))
        self.headers = tuple([(name, value) for name, value in carrier.items() if name.lower() not in unless])
        if not self._span.is_recording():
            return
        attributes: dict[str, Any] = {
            "http.request.method": url.method,
            "http.request.body.size": sum(map(len, call.body)),
            "url.full": url.text,
            "server.address": url.unix_path or url.address or url.host,
            "remote_ops.replica": url.text,
            "remote_ops.message": "infer" if runs else "metadata",
            "remote_ops.attempt": attempt,
            "remote_ops.hedge": copy,
        }
        if url.port:
            attributes["server.port"] = url.port
        if attempt > 1:
            attributes["http.request.resend_count"] = attempt - 1
        self._span.set_attributes(attributes)

    def end(self, outcome: str, reply: Reply | None, error: BaseException | None) -> None:
        """End it: with what came, with what went wrong, or with both."""
        if self._span.is_recording():
            self._span.set_attribute("remote_ops.outcome", outcome)
            if reply is not None:
                self._span.set_attributes(_of_reply(reply))
            if error is not None:
                _fail(self._span, error)
        self._span.end()


def _of_reply(reply: Reply) -> Mapping[str, Any]:
    phases = {} if reply.phases is None else reply.phases._asdict()
    return {
        "http.response.status_code": reply.status,
        "http.response.body.size": len(reply.body),
        **{f"remote_ops.{phase}": seconds for phase, seconds in phases.items() if seconds is not None},
    }
