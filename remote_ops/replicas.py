"""Who can answer for an endpoint, and how each has done so far: the numbers that `policy` decides on, under one lock.

It sends nothing. Constant: the URLs and the policies. Changing, under `_lock`: the replicas, for a host name with
several addresses is looked up again now and then; the numbers of each; the purses of retries and hedges; what the last
answers took.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NamedTuple

from remote_ops.addresses import Lookup, is_name, look_up, replicas_among
from remote_ops.errors import ConnectError, DeadlineExceeded, Overloaded, RemoteOpsError, brief
from remote_ops.policy import (
    UP,
    Breaker,
    Budget,
    Health,
    Hedge,
    Load,
    Retry,
    choose,
    faded,
    is_fault,
    quantile,
    typical_of,
)
from remote_ops.url import Url

__all__ = ["Replica", "ReplicaStats", "Replicas"]

log = logging.getLogger("remote_ops")

_LOOK_AGAIN_S = 30.0
_HOLD_S = 1.0  # for one that is overloaded and does not say how long
_LONGEST_HOLD_S = 60.0  # a server may ask for any length


class ReplicaStats(NamedTuple):
    """How one replica does, as this endpoint has seen it.

    Args:
        url: its address.
        state: `up`; `ejected` after faults in a row; `probing` where the next answer decides.
        in_flight: requests without an answer yet.
        sent: requests sent to it, retries and copies included.
        failures: those that ended with an error that speaks against it, or that it refused for now.
        p50_s, p99_s: what half of the last 512 answers took at most, and 99 %; in seconds, None without an answer.
    """

    url: str
    state: str
    in_flight: int
    sent: int
    failures: int
    p50_s: float | None
    p99_s: float | None


class Replica:
    """The numbers of one address; those who hold the lock of its `Replicas` change them."""

    __slots__ = (
        "answered_at",
        "asked_until",
        "failures",
        "health",
        "held_until",
        "in_flight",
        "last_error",
        "recent_s",
        "refuses",
        "sent",
        "took_s",
        "typical_s",
        "url",
    )

    def __init__(self, url: Url) -> None:
        self.url = url
        self.in_flight = 0
        self.sent = 0
        self.failures = 0
        self.health = Health()
        self.held_until = -math.inf  # others are asked first until then
        self.asked_until = -math.inf  # it has said so itself
        self.last_error = ""
        self.refuses = False  # the latest connection to it could not be made
        self.took_s: deque[float] = deque(maxlen=512)
        self.recent_s: deque[float] = deque(maxlen=16)
        self.typical_s: float | None = None
        self.answered_at = 0.0


class Replicas:
    """The replicas of an endpoint.

    Args:
        urls: one or more.
        expand: whether a host name with several addresses stands for several replicas.
        clock: seconds that do not go back.
        rng: where chance comes from.
    """

    def __init__(
        self,
        urls: Sequence[Url],
        retry: Retry,
        hedge: Hedge | None,
        breaker: Breaker,
        *,
        expand: bool = False,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self._urls = tuple(urls)
        self._hedge = hedge
        self._breaker = breaker
        self._clock = clock
        self._rng = rng or random.Random()
        self._budget = Budget(retry.budget)
        self._purse = self._budget.opened(clock())
        self._hedge_budget = Budget(hedge.budget if hedge else 0.0)
        self._hedge_purse = self._hedge_budget.opened(clock())
        self._took_s: deque[float] = deque(maxlen=256)
        self._measured = 0
        self._delay_s = hedge.after_s if hedge else None
        self._turn = -1
        self._named = tuple(dict.fromkeys(url for url in self._urls if expand and is_name(url)))
        self._found: dict[Url, list[str]] = {}
        self._look_at = -math.inf if self._named else math.inf
        self._lock = threading.Lock()
        self._all: tuple[Replica, ...] = ()
        self._list()

    def _list(self) -> None:
        """Give each address its replica; one that was there already stays as it is."""
        known = {replica.url: replica for replica in self._all}
        several = {url: found for url, found in self._found.items() if len(found) > 1}
        urls = [at for url in self._urls for at in ([url.at(one) for one in several[url]] if url in several else [url])]
        self._all = tuple([known.get(url) or Replica(url) for url in dict.fromkeys(urls)])

    # names

    @property
    def unsettled(self) -> bool:
        """Whether there are names that were never looked up."""
        return self._look_at == -math.inf

    def look_up(self) -> list[Future[None]]:
        """Look all names up; what is found is heeded as it comes, and then the future of that name is done."""
        self._look_at = self._clock() + _LOOK_AGAIN_S
        return [self._look_up(url) for url in self._named]

    def _look_up(self, url: Url) -> Future[None]:
        settled: Future[None] = Future()

        def settle(lookup: Lookup) -> None:
            if lookup.exception() is None:  # a name that is gone for now keeps the addresses it had
                found = sorted(replicas_among(lookup.result()))
                with self._lock:
                    before, self._found[url] = self._found.get(url), found
                    self._list()
                if found != (before or found[:1]):
                    log.info("%s stands for %d addresses now: %s", url.host, len(found), ", ".join(found))
            settled.set_result(None)

        look_up(url).add_done_callback(settle)
        return settled

    # a call, and its sendings

    def next(self, tried: Sequence[Replica]) -> Replica:
        """The replica that a call goes to next, which was sent to those already `tried`."""
        replicas = self._all
        if len(replicas) == 1:
            return replicas[0]
        now = self._clock()
        with self._lock:
            loads = [self._load(replica, now, tried) for replica in replicas]
            if not tried:
                self._turn += 1
            return replicas[choose(loads, self._turn, self._rng.randrange)]

    def _load(self, replica: Replica, now: float, tried: Sequence[Replica]) -> Load:
        typical_s = replica.typical_s
        if typical_s is not None:
            typical_s = faded(typical_s, now - replica.answered_at)
        return Load(
            self._breaker.state(replica.health, now),
            now < replica.held_until,
            replica in tried,
            replica.in_flight,
            typical_s,
            replica.refuses and replica in tried,
        )

    def begin(self, replica: Replica, *, first: bool) -> float:
        """A request goes to this replica, the first of its call or one more; the time it is."""
        now = self._clock()
        with self._lock:
            replica.in_flight += 1
            replica.sent += 1
            if first:
                self._purse = self._budget.earned(self._purse)
                if self._hedge is not None:
                    self._hedge_purse = self._hedge_budget.earned(self._hedge_purse)
        if now >= self._look_at and first:
            self.look_up()
        return now

    def answered(self, replica: Replica, since: float, *, measured: bool = True) -> None:
        """It gave the answer to the request begun at `since`, which tells how quick it is if it is `measured`."""
        now = self._clock()
        with self._lock:
            self._released(replica)
            back = replica.health.faults >= self._breaker.faults
            if replica.health.faults:
                replica.health = self._breaker.after_answer(replica.health)
            replica.asked_until = replica.held_until = -math.inf
            replica.refuses = False
            if measured:
                self._measure(replica, now - since, now)
        if back:
            log.info("%s answers again", replica.url.text)

    def failed(self, replica: Replica, since: float, error: RemoteOpsError) -> None:
        """The request begun at `since` ended with an error."""
        now = self._clock()
        ejected: Health | None = None
        with self._lock:
            self._released(replica)
            replica.refuses = isinstance(error, ConnectError)
            if error.retryable and error.retry_after_s is not None:
                replica.asked_until = replica.held_until = now + min(error.retry_after_s, _LONGEST_HOLD_S)
            elif isinstance(error, Overloaded):
                replica.held_until = now + _HOLD_S
            if is_fault(error, now - since, replica.typical_s):
                others = [other for other in self._all if other is not replica]
                up = sum(self._breaker.state(other.health, now) == UP for other in others)
                before, replica.health = replica.health, self._breaker.after_fault(replica.health, now, others=up)
                if replica.health.until > max(now, before.until):
                    ejected = replica.health
            elif not error.retryable:
                if not isinstance(error, DeadlineExceeded):
                    replica.health = self._breaker.after_answer(replica.health)
                return
            replica.failures += 1
            replica.last_error = str(error)
        if ejected is not None:
            out_s = ejected.until - now
            log.warning("%s is left alone for %.1f s: %d faults in a row, the last a %s",
                        replica.url.text, out_s, ejected.faults, brief(error))  # fmt: skip

    def abandoned(self, replica: Replica, since: float, *, outrun: bool = False) -> None:
        """Nobody waits for the answer any more: it was `outrun` by a copy, or the call is given up."""
        now = self._clock()
        with self._lock:
            self._released(replica)
            if outrun:  # at least so long, then
                self._measure(replica, now - since, now)

    @staticmethod
    def _released(replica: Replica) -> None:
        if replica.in_flight:  # a child has none, whatever its parent began
            replica.in_flight -= 1

    def _measure(self, replica: Replica, took_s: float, now: float) -> None:
        replica.took_s.append(took_s)
        replica.answered_at = now
        if len(self._all) > 1:
            replica.recent_s.append(took_s)
            if len(replica.recent_s) < 16 or not replica.sent % 4:
                replica.typical_s = typical_of(replica.recent_s)
        if self._hedge is not None and self._hedge.after_s is None:
            self._took_s.append(took_s)
            self._measured += 1
            if self._measured <= 32 or not self._measured % 16:
                self._delay_s = self._hedge.delay_s(self._took_s)

    def spend(self, *, on_copy: bool = False) -> bool:
        """Take one more sending from the budget, or from both if it is a copy; whether there was one."""
        now = self._clock()
        with self._lock:
            purse = self._budget.spent(self._purse, now)
            copies = self._hedge_budget.spent(self._hedge_purse, now) if on_copy else self._hedge_purse
            if purse is None or copies is None:
                return False
            self._purse, self._hedge_purse = purse, copies
            return True

    def held_s(self, replica: Replica) -> float:
        """Seconds for which it has asked to be left alone."""
        return max(0.0, replica.asked_until - self._clock())

    @property
    def delay_s(self) -> float | None:
        """Seconds after which a call that has no answer is sent a second time; None if it is not."""
        return self._delay_s

    # what is told

    def unwell(self) -> list[Replica]:
        """Those that are not up."""
        now = self._clock()
        with self._lock:
            return [replica for replica in self._all if self._breaker.state(replica.health, now) != UP]

    def stats(self) -> tuple[ReplicaStats, ...]:
        """How each replica does."""
        now = self._clock()
        with self._lock:
            return tuple([self._stats(replica, now) for replica in self._all])

    def _stats(self, replica: Replica, now: float) -> ReplicaStats:
        ordered = sorted(replica.took_s)
        return ReplicaStats(
            replica.url.text,
            self._breaker.state(replica.health, now),
            replica.in_flight,
            replica.sent,
            replica.failures,
            quantile(ordered, 0.5) if ordered else None,
            quantile(ordered, 0.99) if ordered else None,
        )

    def after_fork(self) -> None:
        """In a child: the lock may be held by a thread that is gone, and no request is on its way from here."""
        self._lock = threading.Lock()
        self._rng.seed()
        for replica in self._all:
            replica.in_flight = 0
