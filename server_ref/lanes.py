"""Runs requests outside the loop: threads, each at one instance of a model, that take what the queue gives them.

It does not know sockets or messages: a request goes in, and `deliver` is told what its batch came to. More threads than
the devices have room for would only add memory and switches.

Constant: the limits. Changing, all guarded by `_lock`: the queue and its bytes, who is idle, who runs what since when,
and who watches the clock for a batch that is not full yet.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from remote_ops.errors import ModelUnavailable, Overloaded
from server_ref.batching import Batching, Queue

__all__ = ["Lanes", "Pending", "QueueLimits", "room_for"]

log = logging.getLogger("server_ref")


@dataclass(frozen=True)
class QueueLimits:
    """How many requests of one model may wait, how many bytes their inputs may take, and how long; more is refused.

    `max_request_bytes` is for the inputs of one request; 0: no other limit than that of its body.
    """

    max_requests: int = 1024
    max_bytes: int = 1 << 30
    timeout_s: float = math.inf
    max_request_bytes: int = 0


class Pending:
    """What `Lanes` needs of a request; the front's own adds what is to be computed and who asked.

    `rows`, `group` and `due_at` are as in `batching.Waiting`; `arrived_at` is set when it is submitted.
    """

    rows: int = 1
    group: Any = None
    due_at: float = math.inf
    arrived_at: float = 0.0
    priority: int = 0
    payload_bytes: int = 0
    cancelled: bool = False


P = TypeVar("P", bound=Pending)


@dataclass(eq=False)
class _Seat:
    """One place at an instance: how many threads hang there now, and from when another may sit down."""

    servable: Any
    hung: int = 0
    free_at: float = math.inf

    def lost(self, now: float) -> None:
        """One more hangs: the first is replaced at once, the next later and later, and too many not at all."""
        self.hung += 1
        self._wait(now)

    def returned(self, now: float) -> None:
        """One that hung came back."""
        self.hung -= 1
        if self.free_at == math.inf and self.hung == _MOST_HUNG - 1:
            self._wait(now)

    def _wait(self, now: float) -> None:
        wait_s = min(_MOST_WAIT_S, _WAIT_S * 2.0 ** (self.hung - 2)) if self.hung > 1 else 0.0
        self.free_at = now + wait_s if self.hung < _MOST_HUNG else math.inf


# A thread cannot be ended: each that hangs keeps its memory, and its model busy.
_MOST_HUNG = 4
_WAIT_S, _MOST_WAIT_S = 0.1, 30.0


@dataclass(eq=False)
class _Lane(Generic[P]):
    """One thread at one instance: what it is given, and the lock it sleeps on until there is something."""

    seat: _Seat
    wake: threading.Lock = field(default_factory=threading.Lock)
    batch: list[P] = field(default_factory=list)
    since: float = math.inf
    lost: bool = False

    def __post_init__(self) -> None:
        self.wake.acquire()


class Lanes(Generic[P]):
    """Threads that take requests from one queue; the one that went idle last is woken first.

    Args:
        name: of the threads, for whoever looks at a dump.
        servables: one for each thread: an instance that bears two calls at a time stands there twice. One that has
            `available` is given nothing while that is false, unless it is so for all.
        run: computes a batch with a servable, on a lane's thread; it must not raise.
        deliver: is given each batch and what `run` made of it, on the lane's thread; what is overdue or lost comes
            with an exception instead.
        batching, limits: the rules of the queue.
        response_timeout_s: how long a run may take before its requests are given up and its thread is replaced: at
            once the first time, then after 0.1 s and twice as long each time, until four hang at the same place.
    """

    def __init__(
        self,
        name: str,
        servables: Sequence[Any],
        run: Callable[[Any, list[P]], Any],
        deliver: Callable[[list[P], Any], None],
        *,
        batching: Batching = Batching(),  # noqa: B008 (immutable)
        limits: QueueLimits = QueueLimits(),
        response_timeout_s: float = math.inf,
    ) -> None:
        self.batching = batching
        self.limits = limits
        self.response_timeout_s = response_timeout_s
        self._name = name
        self._run = run
        self._deliver = deliver
        self._lock = threading.Lock()
        self._queue: Queue[P] = Queue(batching)
        self._queued_bytes = 0
        self._seats = [_Seat(servable) for servable in servables]
        self._lanes = [_Lane[P](seat) for seat in self._seats]
        self._may_be_down = any(hasattr(servable, "available") for servable in servables)
        self._idle: list[_Lane[P]] = []
        self._look_at = math.inf
        self._run_s = 0.0
        self._started = 0
        self._stopped = False

    @property
    def concurrency(self) -> int:
        """How many batches run at a time."""
        return len(self._seats)

    @property
    def healthy_servables(self) -> int:
        """How many of the servables can take a batch now, or once they have ended another."""
        return len({id(lane.seat.servable) for lane in tuple(self._lanes) if _is_up(lane)})

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._queue)

    @property
    def waiting_bytes(self) -> int:
        """How many bytes their inputs take."""
        return self._queued_bytes

    @property
    def running(self) -> int:
        """How many requests run."""
        return sum(len(lane.batch) for lane in tuple(self._lanes))

    def start(self) -> None:
        """Start the threads."""
        for lane in tuple(self._lanes):
            self._start(lane)

    def _start(self, lane: _Lane[P]) -> None:
        self._started += 1
        with self._lock:
            self._idle.append(lane)
            self._dispatch()
        threading.Thread(target=self._work, args=(lane,), name=f"{self._name}-{self._started}", daemon=True).start()

    def submit(self, pending: P) -> None:
        """Hand a request to an idle instance, or let it wait.

        Raises:
            Overloaded: as many wait already as may, or as many bytes.
            ModelUnavailable: it is stopped.
        """
        pending.arrived_at = time.monotonic()
        pending.due_at = min(pending.due_at, pending.arrived_at + self.limits.timeout_s)
        with self._lock:
            self._admit(pending)
            self._queue.add(pending, pending.priority)
            self._queued_bytes += pending.payload_bytes
            self._dispatch()

    def look_again(self) -> None:
        """Hand out what waits; for an instance that is `available` again, or is no more."""
        with self._lock:
            self._dispatch()

    def _admit(self, pending: P) -> None:
        if self._stopped:
            raise ModelUnavailable(f"model '{self._name}' is no longer served")
        if not self._lanes and self._abandoned():
            raise ModelUnavailable(f"every instance of model '{self._name}' hangs: none answers, and none returns")
        limits = self.limits
        if self._idle and (len(self._queue) >= limits.max_requests or self._too_large(pending)):
            self._dispatch(now=math.inf)  # what waits for company has waited long enough
        waiting = len(self._queue)
        if self._idle and not waiting:
            return
        if waiting >= limits.max_requests:
            raise Overloaded(f"{waiting} requests wait already: expected at most {limits.max_requests}")
        if self._too_large(pending):
            raise Overloaded(
                f"the inputs of requests that wait take {self._queued_bytes} bytes already: "
                f"expected at most {limits.max_bytes} with this one's {pending.payload_bytes}"
            )

    def _too_large(self, pending: P) -> bool:
        return self._queued_bytes + pending.payload_bytes > self.limits.max_bytes

    def cancel(self, pending: P) -> bool:
        """Give a request up: whether it waited; one that runs is not interrupted, and is delivered as `cancelled`."""
        pending.cancelled = True
        with self._lock:
            waited = self._queue.remove(pending)
            self._queued_bytes -= pending.payload_bytes * waited
            return waited

    def overdue(self) -> list[P]:
        """Give up what waits beyond its time."""
        with self._lock:
            late = self._queue.overdue(time.monotonic()) if self._queue else []
            self._queued_bytes -= sum(pending.payload_bytes for pending in late)
            return late

    def lost(self) -> list[P]:
        """Give up what runs beyond `response_timeout_s`, and what waits if all hang; replace the threads that hang."""
        if self.response_timeout_s == math.inf:
            return []
        now = time.monotonic()
        with self._lock:
            hung = [lane for lane in self._lanes if lane.since < now - self.response_timeout_s]
            for lane in hung:
                lane.lost = True
                lane.seat.lost(now)
                self._lanes.remove(lane)
            successors = self._successors(now)
            left = self._give_up() if not self._lanes and self._abandoned() else []
        for lane in successors:
            self._start(lane)
        return [pending for lane in hung for pending in lane.batch] + left

    def _successors(self, now: float) -> list[_Lane[P]]:
        seats = [seat for seat in self._seats if seat.free_at <= now and not self._stopped]
        for seat in seats:
            seat.free_at = math.inf
        successors = [_Lane[P](seat) for seat in seats]
        self._lanes += successors
        return successors

    def _abandoned(self) -> bool:
        """Whether so many threads hang that no other will take their place before one returns."""
        return all(seat.free_at == math.inf for seat in self._seats)

    def _give_up(self) -> list[P]:
        self._queued_bytes = 0
        return self._queue.clear()

    def stop(self) -> list[P]:
        """Let the threads end, and give what waited; a run is not interrupted, and what it came to is delivered."""
        with self._lock:
            self._stopped = True
            left = self._give_up()
            idle, self._idle = self._idle, []
            for lane in idle:
                self._wake(lane)
        return left

    # the threads; a wake-up that comes for nothing is harmless, one too few is not

    def _work(self, lane: _Lane[P]) -> None:
        while lane.batch or not self._stopped:
            lane.wake.acquire(timeout=self._patience())
            with self._lock:
                if not lane.batch and not self._stopped:
                    self._dispatch(awake=lane)
            while lane.batch:  # what it was given before the stop is run too: its callers wait
                self._serve(lane)
                if lane.lost:
                    return

    def _patience(self) -> float:
        """How long a lane may sleep: until a batch that is not full must go, or until it is woken."""
        look_at = self._look_at
        return -1.0 if look_at == math.inf else max(0.0, look_at - time.monotonic())

    def _serve(self, lane: _Lane[P]) -> None:
        """Run what a lane was given, and give it what comes next before telling what it came to."""
        batch, lane.since = lane.batch, time.monotonic()
        outcome = self._run(lane.seat.servable, batch)
        now = time.monotonic()
        took, lane.since = now - lane.since, math.inf
        with self._lock:
            if lane.lost:
                lane.seat.returned(now)
                return
            self._run_s = max(took, 0.9 * self._run_s)
            lane.batch = []
            if not self._stopped:
                self._idle.append(lane)
                self._dispatch(awake=lane)
        self._deliver(batch, outcome)

    def _dispatch(self, awake: _Lane[P] | None = None, now: float | None = None) -> None:
        """Give idle lanes what may go now, and see that one of them watches the clock for the rest; the lock is held.

        `awake` is the lane that asks, which need not be woken; `now` is the time unless given.
        """
        look_at, gave = math.inf, False
        while self._idle and self._queue:
            if self._may_be_down and not self._bring_forward():
                break
            batch, look_at = self._queue.take(now=now or time.monotonic(), run_s=self._run_s)
            if not batch:
                break
            lane = self._idle.pop()
            lane.batch, gave = batch, True
            self._queued_bytes -= sum(pending.payload_bytes for pending in batch)
            if lane is not awake:
                self._wake(lane)
        unwatched = look_at < self._look_at or gave
        self._look_at = look_at
        if look_at < math.inf and unwatched and self._idle[-1] is not awake:
            self._wake(self._idle[-1])

    def _bring_forward(self) -> bool:
        """Let the next batch go to an instance that is up; False if that is better waited for, as all of them run."""
        up = next((lane for lane in reversed(self._idle) if _is_up(lane)), None)
        if up is None:
            return not any(map(_is_up, self._lanes))  # else whoever is first fails at once, and says why
        self._idle.remove(up)
        self._idle.append(up)
        return True

    def _wake(self, lane: _Lane[P]) -> None:
        if lane.wake.locked():  # else it is about to wake; nobody unlocks it without `_lock`
            lane.wake.release()


def _is_up(lane: _Lane[Any]) -> bool:
    return bool(getattr(lane.seat.servable, "available", True))


def room_for(servable: Any) -> int:
    """How many calls of `servable` may run at a time: what it says itself, else one per core."""
    return int(getattr(servable, "concurrency", 0)) or os.cpu_count() or 1
