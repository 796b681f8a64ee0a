"""How long the nodes of a graph took, over one run or many: for a picture of the graph, and as a table.

It sums up traces, live ones and those in files; it measures nothing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from ensemble.trace import Span, Trace
from remote_ops.errors import SpecError

__all__ = ["Latency", "chrome", "latencies_in", "table"]


class Latency(NamedTuple):
    """What a node took: how often it ran in all, and the median of its times, in milliseconds."""

    calls: int
    median_ms: float

    def __str__(self) -> str:
        return f"{_ms(self.median_ms)} ms" if self.calls == 1 else f"{_ms(self.median_ms)} ms, {self.calls} calls"


def latencies_in(path: str) -> tuple[dict[str, Latency], str]:
    """Read how long each node took, and the digest of the graph, from a trace that `run --trace` saved.

    Raises:
        SpecError: there is no such file, or it is no trace.
    """
    try:
        told = json.loads(Path(path).read_text("utf-8"))
        events, digest = told["traceEvents"], told["otherData"]["digest"]
        lanes = {(event["pid"], event["tid"]): event["args"]["name"] for event in events if _is_lane(event)}
        took: dict[str, list[float]] = {}
        for event in events:
            if event["ph"] == "X" and event["name"] == (name := lanes.get((event["pid"], event["tid"]))):
                took.setdefault(name, []).append(event["dur"] / 1e3)
    except OSError as error:
        raise SpecError(f"cannot read the trace: {error.strerror or error}", path=path) from error
    except (ValueError, KeyError, TypeError) as error:
        raise SpecError("expected a trace, as `ensemble run --trace FILE` saves it", path=path) from error
    return {name: Latency(len(times), median(times)) for name, times in took.items()}, digest


def _is_lane(event: Mapping[str, Any]) -> bool:
    return (event["ph"], event["name"]) == ("M", "thread_name")


def chrome(traces: Sequence[tuple[str, Trace]]) -> str:
    """One JSON of all runs, each a process with the name given, for `chrome://tracing` and Perfetto."""
    start = min((trace.began for _, trace in traces), default=0.0)
    events: list[Any] = []
    graph = {}
    for number, (name, trace) in enumerate(traces, 1):
        told = json.loads(trace.to_chrome())
        graph = told["otherData"]
        events.append({"ph": "M", "name": "process_name", "pid": number, "args": {"name": name}})
        events += [_moved(event, number, 1e6 * (trace.began - start)) for event in told["traceEvents"]]
    return json.dumps({"traceEvents": events, "otherData": graph})


def _moved(event: Mapping[str, Any], process: int, later_us: float) -> dict[str, Any]:
    moved = {**event, "pid": process}
    if "ts" in moved:
        moved["ts"] += later_us
    return moved


# --------------------------------------------------------------------------- the table

_ENDS = {"ok": "", "cancelled": "", "left out": "left out"}  # of spans; all others are errors
_HEAD = ("node", "kind", "calls", "queue ms", "compute ms", "network ms", "in", "out", "")


class _Run(NamedTuple):
    """What one node did in one run."""

    calls: int
    queue_ms: float
    compute_ms: float
    network_ms: float
    bytes_in: int
    bytes_out: int


def table(traces: Sequence[Trace]) -> str:
    """A line for each node, in the order in which they start: medians over the runs of what it did in each of them.

    A node that runs several times in a run, in the body of a map say, is summed up over that run. Below, what a run
    took, and the nodes that kept it from ending sooner.
    """
    runs = [_by_node(trace) for trace in traces]
    kinds = {span.node: span.kind for trace in traces for span in trace.spans}
    outcomes = Counter((span.node, _ENDS.get(span.outcome, "failed")) for trace in traces for span in trace.spans)
    lines: list[tuple[str, ...]] = [_HEAD]
    for node in dict.fromkeys(span.node for trace in traces for span in _started(trace.spans)):
        found = [_of_run(run[node]) for run in runs if node in run]
        bad = [f"{count} {what}" for what in ("failed", "left out") if (count := outcomes[node, what])]
        lines.append((node, kinds[node], *_cells(found), ", ".join(bad)))
    wall_ms = median([1e3 * trace.wall_s for trace in traces])
    middle = min(traces, key=lambda trace: abs(1e3 * trace.wall_s - wall_ms))
    way = " -> ".join(span.node for span in middle.critical_path())
    ends = [f"a run took {_ms(wall_ms)} ms{f', the median of {len(traces)}' if len(traces) > 1 else ''}"]
    return "\n".join([*_aligned(lines), *ends, *([f"longest way: {way}"] if way else [])])


def _started(spans: Iterable[Span]) -> list[Span]:
    return sorted(spans, key=lambda span: span.ready)


def _by_node(trace: Trace) -> dict[str, list[Span]]:
    found: dict[str, list[Span]] = {}
    for span in trace.spans:
        found.setdefault(span.node, []).append(span)
    return found


def _of_run(spans: Sequence[Span]) -> _Run:
    return _Run(
        len(spans),
        1e3 * sum(span.queue_s for span in spans),
        1e3 * sum(span.compute_s for span in spans),
        1e3 * sum(span.network_s for span in spans),
        sum(span.bytes_in for span in spans),
        sum(span.bytes_out for span in spans),
    )


def _cells(runs: Sequence[_Run]) -> tuple[str, ...]:
    calls, queue, compute, network, taken, given = (median(column) for column in zip(*runs, strict=True))
    return f"{calls:g}", _ms(queue), _ms(compute), _ms(network), _bytes(taken), _bytes(given)


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Columns: names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = (0, 1, len(widths) - 1)
    return [
        "  ".join(
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
