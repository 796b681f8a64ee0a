"""Which waiting requests go to a model together, and when: a policy that is a pure function, and the queue it rules.

No threads, no clock, no arrays: `now` is handed in, and a request is anything that says its rows and group. Running a
batch is `stacking`'s, waiting for one `instances`'.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

from remote_ops.errors import SpecError

__all__ = ["Batching", "Choice", "Queue", "Waiting", "choose"]


@dataclass(frozen=True)
class Batching:
    """When requests are served together.

    Args:
        max_rows: most rows in a batch; 0: each request is served by itself.
        max_delay_s: how long the oldest request may wait for others while an instance is idle. Unless said it is 0: a
            batch is what has queued while the instances were busy, and a request that is alone waits for nobody.
        preferred_rows: sizes at which a batch goes at once, without waiting for more.
        allowed_rows: sizes that the model is given; a batch is padded to the next of them. The largest is `max_rows`.
        priorities: how many levels there are; 1 is served first.
        default_priority: of a request that names none, 1 to `priorities`; 0: the middle one.

    Raises:
        SpecError: a size below 1 or above `max_rows`, a delay below 0, or a level that there is not.
    """

    max_rows: int = 0
    max_delay_s: float = 0.0
    preferred_rows: tuple[int, ...] = ()
    allowed_rows: tuple[int, ...] = ()
    priorities: int = 1
    default_priority: int = 0

    def __post_init__(self) -> None:
        sizes = (*self.preferred_rows, *self.allowed_rows)
        if self.max_rows < 0 or any(not 0 < size <= self.max_rows for size in sizes):
            got = f"{list(sizes)} with max_rows {self.max_rows}"
            raise SpecError(f"the sizes of batches: expected 1 to max_rows, got {got}", path="batching")
        if self.allowed_rows and max(self.allowed_rows) != self.max_rows:
            got = f"{list(self.allowed_rows)} with max_rows {self.max_rows}"
            raise SpecError(
                f"expected max_rows to be the largest size allowed, got {got}", path="batching.allowed_rows"
            )
        if not self.max_delay_s >= 0:
            raise SpecError(f"expected 0 s or more, got {self.max_delay_s!r}", path="batching.max_delay_s")
        if self.priorities < 1 or not 0 <= self.default_priority <= self.priorities:
            got = f"{self.default_priority} of {self.priorities}"
            raise SpecError(f"expected one or more levels, and a default among them, got {got}", path="batching")

    def level(self, priority: int) -> int:
        """The level of a request, 1 first: its own, or the default where it names none or one that there is not."""
        if 0 < priority <= self.priorities:
            return priority
        return self.default_priority or (self.priorities + 1) // 2

    def padded(self, rows: int) -> int:
        """How many rows the model is given for a batch of `rows`."""
        return min((size for size in self.allowed_rows if size >= rows), default=rows)


class Waiting(Protocol):
    """What the policy sees of a request."""

    @property
    def rows(self) -> int:
        """Its rows, 0 or more."""
        ...

    @property
    def group(self) -> Hashable | None:
        """What must be equal for two to be served together; None: it is served by itself."""
        ...

    @property
    def arrived_at(self) -> float:
        """When it began to wait."""
        ...

    @property
    def due_at(self) -> float:
        """By when it wants its answer; infinity: whenever."""
        ...


W = TypeVar("W", bound=Waiting)


class Choice(NamedTuple):
    """How many of the candidates go now; or, if none do, when to look again."""

    taken: int
    look_at: float = math.inf


def choose(candidates: Sequence[Waiting], batching: Batching, *, now: float, run_s: float, complete: bool) -> Choice:
    """Decide about requests of one group, in the order in which they are served; an instance is idle.

    Args:
        candidates: one or more, together of at most `max_rows` rows unless the first is larger by itself.
        batching: the rules.
        now: the instant, on the clock of `arrived_at` and `due_at`.
        run_s: how long a run takes by experience: a batch goes early enough for all in it to be in time.
        complete: whether no more would fit.

    Returns:
        A prefix that goes now, or the instant at which the delay ends.
    """
    sums = _running_sums(candidate.rows for candidate in candidates)
    preferred = [index for index, rows in enumerate(sums) if rows in batching.preferred_rows]
    if preferred:
        return Choice(preferred[-1] + 1)
    if complete or sums[-1] >= batching.max_rows:
        return Choice(len(candidates))
    closes_at = candidates[0].arrived_at + batching.max_delay_s
    closes_at = min(closes_at, *(_starts_by(candidate, run_s) for candidate in candidates))
    return Choice(len(candidates)) if now >= closes_at else Choice(0, closes_at)


def _starts_by(waiting: Waiting, run_s: float) -> float:
    """When a request must go to be in time: twice as early as its run takes, and with a quarter of its time left."""
    if waiting.due_at == math.inf:
        return math.inf
    return waiting.due_at - max(2 * run_s, _SPARE * (waiting.due_at - waiting.arrived_at))


_SPARE = 0.25


def _running_sums(rows: Iterable[int]) -> list[int]:
    sums, total = [], 0
    for number in rows:
        total += number
        sums.append(total)
    return sums


class Queue(Generic[W]):
    """Requests that wait for an instance: levels of priority, in each the order of arrival.

    Its owner guards it with a lock.
    """

    def __init__(self, batching: Batching = Batching()) -> None:
        self.batching = batching
        self._levels: list[deque[W]] = [deque() for _ in range(batching.priorities)]

    def __len__(self) -> int:
        return sum(map(len, self._levels))

    def __iter__(self) -> Iterator[W]:
        for level in self._levels:
            yield from level

    def add(self, waiting: W, priority: int = 0) -> None:
        """Let a request wait at its level."""
        self._levels[self.batching.level(priority) - 1].append(waiting)

    def remove(self, waiting: W) -> bool:
        """Give a request up; whether it was waiting."""
        for level in self._levels:
            if waiting in level:
                level.remove(waiting)
                return True
        return False

    def clear(self) -> list[W]:
        """Give all of them up."""
        left = list(self)
        for level in self._levels:
            level.clear()
        return left

    def overdue(self, now: float) -> list[W]:
        """Give up those whose time has passed."""
        late = [waiting for waiting in self if waiting.due_at <= now]
        self._drop(late)
        return late

    def take(self, *, now: float, run_s: float = 0.0) -> tuple[list[W], float]:
        """Take what goes to an instance that is idle now; nothing, and when to look again, if it is better to wait.

        The group of the request that is first in line goes, with those of lower levels that fit; another group goes
        before it only while the first one waits for more of its own.
        """
        if not self.batching.max_rows:
            return self._first(), math.inf
        look_at = math.inf
        for candidates, complete in self._groups():
            if candidates[0].group is None:
                chosen = Choice(1)
            else:
                chosen = choose(candidates, self.batching, now=now, run_s=run_s, complete=complete)
            if chosen.taken:
                taken = candidates[: chosen.taken]
                self._drop(taken)
                return taken, math.inf
            look_at = min(look_at, chosen.look_at)
        return [], look_at

    def _first(self) -> list[W]:
        for level in self._levels:
            if level:
                return [level.popleft()]
        return []

    def _groups(self) -> Iterator[tuple[list[W], bool]]:
        """The candidates of each group, the group that is first in line first, and whether no more of it would fit."""
        groups: dict[Hashable, list[W]] = {}
        rows: dict[Hashable, int] = {}
        complete: set[Hashable] = set()
        for waiting in self:
            key = id(waiting) if waiting.group is None else waiting.group
            if key in complete:
                continue
            if key in groups and rows[key] + waiting.rows > self.batching.max_rows:
                complete.add(key)  # those behind it keep their place
                if next(iter(groups)) == key:
                    break  # the first in line goes: no need to look at the others
                continue
            groups.setdefault(key, []).append(waiting)
            rows[key] = rows.get(key, 0) + waiting.rows
        for key, members in groups.items():
            yield members, key in complete

    def _drop(self, taken: list[W]) -> None:
        ids = set(map(id, taken))
        for index, level in enumerate(self._levels):
            if level and id(level[0]) in ids:  # the usual case: the front of the line
                while level and id(level[0]) in ids:
                    ids.remove(id(level.popleft()))
            if ids:
                self._levels[index] = deque(waiting for waiting in level if id(waiting) not in ids)
