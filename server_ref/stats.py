"""What one version of a model has done so far: counts, times and sizes, and the last of each for percentiles.

It is told; it looks at no clock and formats nothing. Every request that reaches a model counts once, when it ends:
successes and failures add up to the requests.

Changing, guarded by `_lock`: everything.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from remote_ops.errors import DeadlineExceeded, Overloaded, SignatureError

__all__ = ["REASONS", "Durations", "Histogram", "Latencies", "Snapshot", "Stats", "latencies", "reason_of"]

# Bounds of the buckets, in seconds and in rows; what is larger than the last falls into one of its own.
SECONDS = tuple(base * 10.0**power for power in range(-5, 2) for base in (1.0, 2.5, 5.0))
ROWS = tuple(2.0**power for power in range(13))
BYTES = tuple(4.0**power for power in range(4, 16))
REASONS = ("rejected", "canceled", "timeout", "invalid", "model")
_RECENT = 2048


def reason_of(error: BaseException) -> str:
    """Why a request failed, as one of `REASONS`."""
    if isinstance(error, Overloaded):
        return "rejected"
    if isinstance(error, DeadlineExceeded):
        return "timeout"
    if isinstance(error, SignatureError):
        return "invalid"
    return "model"


class Durations(NamedTuple):
    """How many times something was done, and how long that took together, in seconds."""

    times: int = 0
    seconds: float = 0.0

    def plus(self, seconds: float, times: int = 1) -> Durations:
        """These and more."""
        return Durations(self.times + times, self.seconds + seconds)


@dataclass
class Histogram:
    """Counts by bucket: `counts[i]` of values up to `bounds[i]` and above the bound before, the last of all above."""

    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    sum: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def add(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def copy(self) -> Histogram:
        """The same, as it is now."""
        return Histogram(self.bounds, list(self.counts), self.sum)


class Snapshot(NamedTuple):
    """All of it at one instant. Times are in seconds.

    `recent` are the latest requests that succeeded, oldest first: when each ended, how long it took, and its rows.
    """

    success: Durations
    failure: Durations
    failures: dict[str, int]
    queue: Durations
    compute_input: Durations
    compute_infer: Durations
    compute_output: Durations
    rows: int
    executions: int
    batches: dict[int, tuple[Durations, Durations, Durations]]
    bytes_in: int
    bytes_out: int
    last_at: float
    request_s: Histogram
    queue_s: Histogram
    compute_s: Histogram
    batch_rows: Histogram
    request_bytes: Histogram
    recent: tuple[tuple[float, float, int], ...]
    pending: int

    @property
    def requests(self) -> int:
        """How many requests have ended."""
        return self.success.times + self.failure.times


class Stats:
    """The counters of one version."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._success = self._failure = Durations()
        self._failures = dict.fromkeys(REASONS, 0)
        self._queue = self._input = self._infer = self._output = Durations()
        self._rows = self._executions = self._bytes_in = self._bytes_out = self._pending = 0
        self._batches: dict[int, tuple[Durations, Durations, Durations]] = {}
        self._last_at = 0.0
        self._request_s, self._queue_s, self._compute_s = (Histogram(SECONDS) for _ in range(3))
        self._batch_rows = Histogram(ROWS)
        self._request_bytes = Histogram(BYTES)
        self._recent: deque[tuple[float, float, int]] = deque(maxlen=_RECENT)

    def began(self, payload_bytes: int) -> None:
        """A request for this version is here."""
        with self._lock:
            self._pending += 1
            self._bytes_in += payload_bytes
            self._request_bytes.add(payload_bytes)

    def ran(
        self, rows: int, *, waited_s: Sequence[float], input_s: float, infer_s: float, output_s: float, ended_at: float
    ) -> None:
        """A batch of `len(waited_s)` requests and `rows` rows was run; `ended_at` is a wall-clock time."""
        with self._lock:
            self._executions += 1
            self._rows += rows
            self._queue = self._queue.plus(sum(waited_s), len(waited_s))
            self._input, self._infer = self._input.plus(input_s), self._infer.plus(infer_s)
            self._output = self._output.plus(output_s)
            before = self._batches.get(rows, (Durations(),) * 3)
            spent = (input_s, infer_s, output_s)
            self._batches[rows] = tuple(old.plus(new) for old, new in zip(before, spent, strict=True))  # type: ignore[assignment]
            self._batch_rows.add(rows)
            self._compute_s.add(infer_s)
            for seconds in waited_s:
                self._queue_s.add(seconds)
            self._last_at = ended_at

    def ended(self, took_s: float, *, bytes_out: int = 0, failed: str = "", at: float = 0.0, rows: int = 1) -> None:
        """A request has its answer, or `failed` for one of `REASONS`; `at`, of any clock, goes into `recent`."""
        with self._lock:
            self._pending -= 1
            self._bytes_out += bytes_out
            if failed:
                self._failure = self._failure.plus(took_s)
                self._failures[failed] += 1
                return
            self._success = self._success.plus(took_s)
            self._request_s.add(took_s)
            self._recent.append((at, took_s, rows))

    @property
    def pending(self) -> int:
        """How many requests are here and have no answer yet."""
        return self._pending

    def snapshot(self) -> Snapshot:
        """All of it as it is now; costs some 50 us."""
        with self._lock:
            return Snapshot(
                self._success, self._failure, dict(self._failures), self._queue, self._input, self._infer, self._output,
                self._rows, self._executions, dict(self._batches), self._bytes_in, self._bytes_out, self._last_at,
                self._request_s.copy(), self._queue_s.copy(), self._compute_s.copy(), self._batch_rows.copy(),
                self._request_bytes.copy(), tuple(self._recent), self._pending,
            )  # fmt: skip


class Latencies(NamedTuple):
    """How the latest requests did: how many there were, percentiles of their times, and how many and rows a second.

    A percentile is the smallest time that so many percent of them did not exceed; 0 where there were none.
    """

    requests: int = 0
    p50_s: float = 0.0
    p95_s: float = 0.0
    p99_s: float = 0.0
    requests_per_s: float = 0.0
    rows_per_s: float = 0.0


def latencies(snapshot: Snapshot, now: float, window_s: float) -> Latencies:
    """How the requests did that succeeded in the `window_s` seconds before `now`, of the clock of `recent`.

    Where more did than a snapshot keeps, it is about those that it keeps. Costs a sort of some 2,000 numbers at most.
    """
    recent = [one for one in snapshot.recent if one[0] > now - window_s]
    span_s = window_s
    if 1 < len(recent) == _RECENT:  # the first only says since when they are all
        span_s, recent = now - recent[0][0], recent[1:]
    if not recent:
        return Latencies()
    times = sorted(took_s for _, took_s, _ in recent)
    p50_s, p95_s, p99_s = (times[math.ceil(percent * len(times) / 100) - 1] for percent in (50, 95, 99))
    rows, per_s = sum(rows for _, _, rows in recent), 1.0 / max(span_s, 1e-9)
    return Latencies(len(times), p50_s, p95_s, p99_s, len(times) * per_s, rows * per_s)
