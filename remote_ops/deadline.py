"""An instant on the monotonic clock that only ever moves closer, and the ambient one of the running context.

It knows no I/O: whoever waits asks `remaining()` and gives up at zero.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from remote_ops.errors import DeadlineExceeded, SpecError

__all__ = ["Deadline", "ambient", "deadline", "within"]


@dataclass(frozen=True, slots=True)
class Deadline:
    """An instant by which an answer must be there.

    Args:
        at: seconds on `clock`; infinity means never.
        clock: the clock that `at` is read on; the system's monotonic clock unless a test says otherwise.
    """

    at: float
    clock: Callable[[], float] = time.monotonic

    @classmethod
    def after(cls, timeout_s: float, *, clock: Callable[[], float] = time.monotonic) -> Deadline:
        """Make the deadline `timeout_s` seconds from now.

        Raises:
            SpecError: `timeout_s` is not a number, or is below zero.
        """
        try:
            usable = timeout_s >= 0
        except TypeError:
            usable = False
        if not usable:
            raise SpecError(f"a timeout is a number of seconds, 0 or more: got {timeout_s!r}", path="timeout_s")
        return cls(clock() + timeout_s, clock)

    @classmethod
    def never(cls) -> Deadline:
        """Make a deadline that does not pass."""
        return cls(math.inf)

    def remaining(self) -> float:
        """Seconds left; zero or less once it has passed."""
        return self.at - self.clock()

    def expired(self) -> bool:
        """Whether it has passed."""
        return self.clock() >= self.at

    def earlier(self, other: Deadline | None) -> Deadline:
        """The one that passes first, so that a deadline handed down never grows."""
        return other if other is not None and other.at < self.at else self

    def require(self, what: str) -> None:
        """Raise `DeadlineExceeded`, naming what was about to start, if it has passed."""
        if self.expired():
            raise DeadlineExceeded(f"no time left to start {what}: the deadline passed {-self.remaining():.3f} s ago")


_AMBIENT: ContextVar[Deadline | None] = ContextVar("remote_ops_deadline", default=None)


def ambient() -> Deadline | None:
    """The deadline of the enclosing `with deadline(...)`, if there is one."""
    return _AMBIENT.get()


@contextmanager
def deadline(timeout_s: float) -> Iterator[Deadline]:
    """Bound every remote call made inside the block, however deep; an inner block can only shorten an outer one.

    Args:
        timeout_s: seconds from now, 0 or more.
    """
    with within(Deadline.after(timeout_s)) as bound:
        yield bound


@contextmanager
def within(bound: Deadline) -> Iterator[Deadline]:
    """The same with an instant that is known already, such as that of a call that is being answered."""
    bound = bound.earlier(_AMBIENT.get())
    token = _AMBIENT.set(bound)
    try:
        yield bound
    finally:
        _AMBIENT.reset(token)
