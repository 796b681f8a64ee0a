"""What a run did and when, node by node: for people as a table, for a Chrome trace viewer as JSON.

It records; it starts no clock of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ensemble.steps import Array, Missing
from remote_ops.telemetry import Record

__all__ = ["Account", "Span", "Trace", "attach", "bytes_of", "trace_of"]


class Span(NamedTuple):
    """One run of one node; times are seconds on the monotonic clock.

    Args:
        node: its name, with those of its owners before it: `decide/big`.
        kind: of node.
        ready: when all it needs was there.
        began: when it was started, which is later where a slot or a thread was waited for.
        ended: when its outputs were there.
        bytes_in, bytes_out: of its tensors.
        outcome: `ok`, the class of the error, `left out` if its quorum went on without it, or `cancelled` where the run
            failed before.
        sent: the requests that it sent; where it shared a call with other runs (`batching`), that call.
    """

    node: str
    kind: str
    ready: float
    began: float
    ended: float
    bytes_in: int
    bytes_out: int
    outcome: str = "ok"
    sent: tuple[Record, ...] = ()

    @property
    def queue_s(self) -> float:
        """Seconds that it waited: to be started, and before a request for a slot, a batch or the next attempt."""
        if not self.sent:
            return self.began - self.ready
        return max(0.0, self.ended - self.ready - _covered([(one.began, one.began + one.took_s) for one in self.sent]))

    @property
    def network_s(self) -> float:
        """Seconds of its requests that were spent on the way: all but the wait for the first byte."""
        return sum(sent.took_s - (sent.waiting_s or 0.0) for sent in self.sent)

    @property
    def compute_s(self) -> float:
        """Seconds of the model: of a remote one, the wait for its first byte; else all that is no queue."""
        if self.sent:
            return sum(sent.waiting_s or 0.0 for sent in self.sent)
        return self.ended - self.began


class Trace:
    """What one run did; `spans` in the order in which they ended."""

    def __init__(self, graph: str, digest: str, began: float) -> None:
        self.graph = graph
        self.digest = digest
        self.began = began
        self.ended = began
        self.spans: list[Span] = []

    @property
    def wall_s(self) -> float:
        """Seconds from the start of the run to its end."""
        return self.ended - self.began

    def critical_path(self) -> list[Span]:
        """The spans that kept the run from ending sooner, first to last: each began when the one before it ended."""
        path: list[Span] = []
        left = [span for span in self.spans if "/" not in span.node]
        until = float("inf")
        while left:
            last = max(left, key=lambda span: span.ended)
            if path and last.ended > until + 1e-9:
                left.remove(last)
                continue
            path.append(last)
            until = last.ready
            left = [span for span in left if span.ended <= until + 1e-9 and span is not last]
        return path[::-1]

    def rows(self) -> list[Mapping[str, Any]]:
        """One row for each span, as the table shows it."""
        return [
            {
                "node": span.node,
                "kind": span.kind,
                "start_ms": 1e3 * (span.ready - self.began),
                "queue_ms": 1e3 * span.queue_s,
                "compute_ms": 1e3 * span.compute_s,
                "network_ms": 1e3 * span.network_s,
                "bytes_in": span.bytes_in,
                "bytes_out": span.bytes_out,
                "attempts": len(span.sent) or 1,
                "outcome": span.outcome,
            }
            for span in sorted(self.spans, key=lambda span: span.ready)
        ]

    def to_chrome(self) -> str:
        """JSON that `chrome://tracing` and Perfetto open: a line for each node, and its queue before it."""
        events: list[dict[str, Any]] = []
        lanes = {name: lane for lane, name in enumerate(dict.fromkeys(span.node for span in self.spans), 1)}
        events += [
            {"ph": "M", "name": "thread_name", "pid": 1, "tid": lane, "args": {"name": name}}
            for name, lane in lanes.items()
        ]
        for span in self.spans:
            lane, args = lanes[span.node], {"bytes_in": span.bytes_in, "bytes_out": span.bytes_out}
            if span.began - span.ready > 1e-5:
                events.append(self._event("queue", span.ready, span.began, lane, {}))
            events.append(self._event(span.node, span.began, span.ended, lane, {**args, "outcome": span.outcome}))
            for sent in span.sent:
                events.append(self._event(sent.url, sent.began, sent.began + sent.took_s, lane, sent._asdict()))
        return json.dumps({"traceEvents": events, "otherData": {"graph": self.graph, "digest": self.digest}})

    def _event(self, name: str, began: float, ended: float, lane: int, args: Mapping[str, Any]) -> dict[str, Any]:
        at, lasted = 1e6 * (began - self.began), 1e6 * (ended - began)
        return {"ph": "X", "name": name, "pid": 1, "tid": lane, "ts": at, "dur": lasted, "args": dict(args)}


@dataclass(eq=False)
class Account:
    """What is told of a run besides its outputs; one for a run and all that runs in it.

    Args:
        trace: what each node did; None unless asked for.
        missing: of each combination that did without some of its members, their names in the order of declaration;
            its own name has those of its owners before it, and one in the body of a map has those missing for any item.
    """

    trace: Trace | None = None
    missing: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def note_missing(self, node: str, members: Mapping[str, Any]) -> None:
        """Note which members a combination did without."""
        before = self.missing.get(node, ())
        gone = [name for name, value in members.items() if name in before or isinstance(value, Missing)]
        if gone:
            self.missing[node] = tuple(gone)


def attach(trace: Trace, error: BaseException) -> None:
    """Let the error of a run carry the trace of that run."""
    error.__dict__["trace"] = trace


def trace_of(error: BaseException) -> Trace | None:
    """The trace of the run that ended with an error; None if no trace was asked for, or it is of no run.

    It is the attribute `trace` of the error, too.
    """
    found = error.__dict__.get("trace")
    return found if isinstance(found, Trace) else None


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """Seconds that are in one of the spans or more."""
    total_s, until = 0.0, float("-inf")
    for began, ended in sorted(spans):
        total_s += max(0.0, ended - max(began, until))
        until = max(until, ended)
    return total_s


def bytes_of(values: Iterable[Array | Missing]) -> int:
    """The bytes of tensors; of strings, what their items hold."""
    return sum(map(_size, values))


def _size(value: Array | Missing) -> int:
    if isinstance(value, Missing):
        return 0
    if value.dtype.hasobject:
        return sum(len(item) for item in value.ravel().tolist())
    return value.nbytes
