"""What to do when servers fail, lag or refuse: pure decisions, without I/O, clock or randomness of their own.

It does not send anything and keeps no state: `replicas` holds the numbers and `client` does what is decided here. Each
decision is a function of numbers and of the time `now`, in seconds on any clock that does not go back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from remote_ops.errors import (
    BadStatus,
    ConnectError,
    ConnectionLost,
    DeadlineExceeded,
    DecodeError,
    FramingError,
    ModelUnavailable,
    Overloaded,
    RemoteOpsError,
    SpecError,
)

__all__ = [
    "EJECTED",
    "PASSING",
    "PROBING",
    "UP",
    "Breaker",
    "Budget",
    "Health",
    "Hedge",
    "Load",
    "Purse",
    "Retry",
    "choose",
    "faded",
    "is_fault",
    "is_left",
    "quantile",
    "typical_of",
]

# --------------------------------------------------------------------------- retry


PASSING: Mapping[str, type[RemoteOpsError]] = {
    "connect": ConnectError,
    "lost": ConnectionLost,
    "overloaded": Overloaded,
    "unavailable": ModelUnavailable,
}


def _failures(when: Iterable[str]) -> tuple[str, ...]:
    """The names of failures as a tuple, which JSON has as a list; each of them known."""
    names = (when,) if isinstance(when, str) else tuple(when)
    if unknown := [name for name in names if name not in PASSING]:
        raise SpecError(f"no failure {unknown[0]!r}: expected some of {', '.join(PASSING)}", path="retry.when")
    return names


@dataclass(frozen=True, slots=True)
class Retry:
    """How often a call that failed for a passing reason is sent again, within its deadline.

    Args:
        attempts: sendings in all, 1 or more; 1 means no retry. With more than that, a kept connection that turns out
            to be closed is replaced, once, within a sending.
        base_s: the longest wait before the second sending, in seconds; it doubles each time.
        max_s: the longest wait before any sending, in seconds, unless the server asks for a longer one.
        idempotent: False if a call must not happen twice: then it is sent again only if no connection was made, and by
            an op of TensorFlow not even then.
        budget: sendings beyond the first that all calls of an endpoint may take together, as a share of the calls; 0
            or more. The first ten, and one a second, are lent. Where no connection was made, another replica is free.
        when: which failures are tried again, of `connect` (no connection was made), `lost` (it ended before the answer
            did), `overloaded` and `unavailable` (the server said so); None for all of them. An op of TensorFlow heeds
            it only where an `Endpoint` carries its calls.

    Raises:
        SpecError: a number out of its range, or no such failure.

    Source: exponential backoff with full jitter; the budget of Finagle.
    """

    attempts: int = 3
    base_s: float = 0.05
    max_s: float = 2.0
    idempotent: bool = True
    budget: float = 0.2
    when: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.when is not None:
            object.__setattr__(self, "when", _failures(self.when))
        if self.attempts < 1 or self.base_s < 0 or self.max_s < 0:
            raise SpecError(f"expected attempts >= 1, base_s >= 0 and max_s >= 0, got {self}", path="retry")
        if not self.budget >= 0:
            raise SpecError(f"expected a budget >= 0, such as 0.2 for one call in five, got {self}", path="retry")

    def repeats(self, error: RemoteOpsError, attempt: int) -> bool:
        """Whether a call whose sending number `attempt` (from 1) ended with `error` may be sent again."""
        safe = self.idempotent or isinstance(error, ConnectError)
        passing = (
            error.retryable if self.when is None else isinstance(error, tuple(PASSING[name] for name in self.when))
        )
        return passing and safe and attempt < self.attempts

    @staticmethod
    def is_free(error: RemoteOpsError, *, elsewhere: bool) -> bool:
        """Whether the next sending adds nothing to the load: the last one reached nobody."""
        return elsewhere and isinstance(error, ConnectError)

    def wait_s(
        self,
        error: RemoteOpsError,
        attempt: int,
        left_s: float,
        jitter: Callable[[], float],
        *,
        elsewhere: bool = False,
        held_s: float = 0.0,
    ) -> float | None:
        """Seconds to wait before the next sending; None to give up.

        Args:
            error: what sending number `attempt` (from 1) ended with.
            left_s: seconds until the deadline.
            jitter: gives a number between 0 and 1.
            elsewhere: the next sending goes to a replica that has not seen this call: there is nothing to wait for.
            held_s: seconds for which the next replica has asked to be left alone (`Retry-After`).
        """
        if not self.repeats(error, attempt):
            return None
        backoff_s = 0.0 if elsewhere else min(self.max_s, self.base_s * 2.0 ** min(attempt - 1, 60)) * jitter()
        wait_s = max(backoff_s, held_s)
        return wait_s if wait_s < left_s else None


# --------------------------------------------------------------------------- budget


class Purse(NamedTuple):
    """What may still be sent beyond the calls: `saved` sendings, and how many were `lent` and not earned yet."""

    saved: float
    lent: float
    at: float


@dataclass(frozen=True, slots=True)
class Budget:
    """How many sendings may be added to the calls: when everything fails, retries must not multiply the load.

    Every call earns `ratio` of a sending. So that few calls can be sent again too, `reserve` sendings are lent at the
    start, and `per_s` a second while there are fewer; what is lent is earned back first. So the sendings added never
    exceed what was lent or `ratio` of the calls, whichever is more.

    Args:
        ratio: sendings earned by a call, 0 or more; 0 lends none either.
        reserve: sendings lent at most at a time.
        per_s: sendings lent in a second.
        most: sendings that can be saved up.
    """

    ratio: float
    reserve: float = 10.0
    per_s: float = 1.0
    most: float = 100.0

    def opened(self, now: float) -> Purse:
        """The purse of an endpoint that has made no call yet."""
        lent = self.reserve if self.ratio else 0.0
        return Purse(lent, lent, now)

    def earned(self, purse: Purse) -> Purse:
        """The purse after one more call."""
        saved, lent, at = purse
        if lent >= self.ratio:
            return Purse(saved, lent - self.ratio, at)
        return Purse(min(self.most, saved + self.ratio - lent), 0.0, at)

    def spent(self, purse: Purse, now: float) -> Purse | None:
        """The purse after one more sending; None if it has none left."""
        saved, lent, at = purse
        if self.ratio and saved < self.reserve:
            loan = min(self.reserve - saved, self.per_s * max(0.0, now - at))
            saved, lent = saved + loan, min(self.reserve, lent + loan)
        return Purse(saved - 1, lent, now) if saved >= 1 - 1e-9 else None


# --------------------------------------------------------------------------- hedge


_SHORT_S = 0.005  # what a busy machine is late by without any reason
_SOME, _MANY = 20, 100  # answers that tell what is usual, and what is rare


@dataclass(frozen=True, slots=True)
class Hedge:
    """When a call that is late is sent a second time, elsewhere if there is another replica; the first answer counts.

    Args:
        after_s: seconds without an answer after which the second copy is sent; unless given, what 95 % of the answers
            took, but at most ten times what half of them took, or 5 ms; once there are twenty.
        budget: copies that may be sent, as a share of the calls, 0 to 1. They count for the budget of `Retry` too.

    Raises:
        SpecError: a number out of its range.

    Source: Dean and Barroso, The Tail at Scale.
    """

    after_s: float | None = None
    budget: float = 0.07

    def __post_init__(self) -> None:
        if (self.after_s is not None and not self.after_s >= 0) or not 0 <= self.budget <= 1:
            raise SpecError(f"expected after_s >= 0 and a budget from 0 to 1, got {self}", path="hedge")

    def delay_s(self, took_s: Sequence[float]) -> float | None:
        """Seconds after which to send a copy, from what the last answers took; None not to."""
        if self.after_s is not None:
            return self.after_s
        if len(took_s) < _SOME:
            return None
        ordered = sorted(took_s)
        # Where more than one answer in twenty is slow, and by chance where few are known, those 95 % include slow ones.
        longest_s = max(10 * quantile(ordered, 0.5), _SHORT_S)
        return min(quantile(ordered, 0.95), longest_s) if len(ordered) >= _MANY else longest_s


def quantile(ordered: Sequence[float], share: float) -> float:
    """The value that `share` of the values, in ascending order, do not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


# --------------------------------------------------------------------------- breaker

UP = "up"
EJECTED = "ejected"
PROBING = "probing"


class Health(NamedTuple):
    """How a replica has done: faults in a row, ejections in a row, and until when it is ejected."""

    faults: int = 0
    ejections: int = 0
    until: float = -math.inf


@dataclass(frozen=True, slots=True)
class Breaker:
    """When a replica that fails is left alone, and for how long.

    After `faults` in a row it is ejected for `base_s`; then one call at a time probes it. An answer brings it back;
    another fault ejects it for twice as long, up to `max_s`, and so does a relapse within as long as it was out.

    Args:
        faults: faults in a row that eject a replica, 1 or more.
        base_s: the first ejection, in seconds.
        max_s: the longest ejection, in seconds.

    Raises:
        SpecError: a number out of its range.

    Source: Envoy, outlier detection.
    """

    faults: int = 5
    base_s: float = 1.0
    max_s: float = 60.0

    def __post_init__(self) -> None:
        if self.faults < 1 or not 0 < self.base_s <= self.max_s:
            raise SpecError(f"expected faults >= 1 and 0 < base_s <= max_s, got {self}", path="breaker")

    def state(self, health: Health, now: float) -> str:
        """`up`, `ejected`, or `probing`: the next answer decides."""
        if health.faults < self.faults:
            return UP
        return EJECTED if now < health.until else PROBING

    def after_fault(self, health: Health, now: float, *, others: int) -> Health:
        """How a replica stands after one more fault, where `others` replicas are up: the last is never ejected."""
        faults = health.faults + 1
        if faults < self.faults or not others or now < health.until:
            return health._replace(faults=faults)
        relapsed = health.ejections and now < health.until + self._length_s(health.ejections)
        ejections = health.ejections + 1 if relapsed or health.faults >= self.faults else 1
        return Health(faults, ejections, now + self._length_s(ejections))

    def after_answer(self, health: Health) -> Health:
        """How a replica stands after an answer."""
        return health._replace(faults=0) if health.faults else health

    def _length_s(self, ejections: int) -> float:
        return min(self.max_s, self.base_s * 2.0 ** min(ejections - 1, 60))


_FAULTS = (ConnectError, ConnectionLost, DecodeError, FramingError, ModelUnavailable)
_NO_TIME_S = 0.001


def is_fault(error: RemoteOpsError, waited_s: float, typical_s: float | None = None) -> bool:
    """Whether an error speaks against the replica, not the request: a model that raises may do so everywhere.

    Args:
        error: what a request ended with.
        waited_s: how long it had taken by then: a deadline sooner than any answer is the caller's affair.
        typical_s: what an answer takes there; None if not known.
    """
    if isinstance(error, DeadlineExceeded):
        return waited_s >= max(_NO_TIME_S, typical_s or 0.0)
    return isinstance(error, _FAULTS) or (isinstance(error, BadStatus) and error.status >= 500)


# --------------------------------------------------------------------------- replica choice


class Load(NamedTuple):
    """What the choice between replicas looks at.

    Args:
        state: as `Breaker.state` says.
        held: it has asked to be left alone for now.
        tried: this call was sent to it already.
        in_flight: requests that it has not answered yet.
        typical_s: what an answer of it takes; None if not known.
        refused: this call could not even connect to it: then an ejected one, which may be back, is the better choice.
    """

    state: str = UP
    held: bool = False
    tried: bool = False
    in_flight: int = 0
    typical_s: float | None = None
    refused: bool = False


def is_left(load: Load) -> bool:
    """Whether a replica can take a call: not banned or out of reach, and if it is probed, not by another call."""
    if load.held or load.refused:
        return False
    return load.state == UP or (load.state == PROBING and not load.in_flight and not load.tried)


def choose(loads: Sequence[Load], turn: int, pick: Callable[[int], int]) -> int:
    """Which of the replicas a call goes to next, as an index.

    Those that are left and have not seen the call come first, then those that are left, then those that have not seen
    it, ejected ones last: bans are ignored if nobody is left. Of these one that is to be probed; else the less busy of
    the one whose turn it is and another, where one several times slower than the quickest counts as so much busier.

    Args:
        loads: one or more.
        turn: goes up by one with every call.
        pick: gives a random whole number from 0 to below its argument.

    Source: Mitzenmacher, The Power of Two Choices.
    """
    among = (
        [index for index, load in enumerate(loads) if not load.tried and is_left(load)]
        or [index for index, load in enumerate(loads) if is_left(load)]
        or [index for index, load in enumerate(loads) if not load.tried and load.state != EJECTED]
        or [index for index, load in enumerate(loads) if not load.tried]
        or list(range(len(loads)))
    )
    if len(among) == 1:
        return among[0]
    for index in among:
        if loads[index].state == PROBING and is_left(loads[index]):
            return index
    place = turn % len(among)
    one = among[place]
    other = among[(place + 1 + pick(len(among) - 1)) % len(among)]
    quickest_s = min((took_s for index in among if (took_s := loads[index].typical_s) is not None), default=math.inf)
    return one if _busy(loads[one], quickest_s) <= _busy(loads[other], quickest_s) else other


_NOISE = 3.0  # replicas up to so many times slower than the quickest are still its equals
_NOISE_S = 0.001  # and so are those that are as quick as this


def _busy(load: Load, quickest_s: float) -> float:
    slowness = (load.typical_s or 0.0) / max(_NOISE * quickest_s, _NOISE_S)
    return (load.in_flight + 1) * max(1.0, slowness)


_HALF_LIFE_S = 5.0
_ENOUGH = 4  # the first answer has waited for its connection


def typical_of(took_s: Sequence[float]) -> float | None:
    """What an answer takes: the median of the last ones; None for fewer than four."""
    return quantile(sorted(took_s), 0.5) if len(took_s) >= _ENOUGH else None


def faded(typical_s: float, age_s: float) -> float:
    """What to make of it after so long without an answer: a replica that was slow is asked again after a while."""
    return typical_s * math.pow(0.5, age_s / _HALF_LIFE_S)
