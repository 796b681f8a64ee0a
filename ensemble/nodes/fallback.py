"""Fallback: nodes that are tried one after the other while they fail in ways that another one may not."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from ensemble.forms import Form
from ensemble.nodes.controller import AlternativesSpec, agreed, once
from ensemble.nodes.node import Owned, Scope
from ensemble.rows import passed
from ensemble.steps import Array, Assembly, Call, Calls, Missing, Outcome, Piece
from remote_ops.errors import (
    BadStatus,
    ConnectError,
    ConnectionLost,
    DeadlineExceeded,
    NodeError,
    RemoteError,
    RemoteOpsError,
    answer_of,
)

__all__ = ["Failure", "Fallback", "FallbackSpec", "failures_of"]

Word = Literal["connect", "lost", "timeout", "overloaded", "unavailable", "internal"]
_STATUSES: Mapping[int, tuple[Word, ...]] = {
    429: ("overloaded",),
    500: ("internal",),
    502: ("unavailable",),
    503: ("unavailable", "overloaded"),  # proxies say it for both
    504: ("timeout",),
}


def _status(value: Word | int) -> Word | int:
    if isinstance(value, int) and not 400 <= value <= 599:
        raise ValueError(f"expected an HTTP status from 400 to 599, got {value}")
    return value


Failure = Annotated[Word | int, AfterValidator(_status)]
DEFAULT: tuple[Word, ...] = ("connect", "lost", "timeout", "overloaded", "unavailable")


class FallbackSpec(AlternativesSpec):
    """Runs the first node; where that fails in one of the ways of `when`, the next one."""

    kind: Literal["fallback"]
    try_: list[str] = Field(alias="try", min_length=2)
    """The nodes, in order."""
    when: list[Failure] = Field(default=list(DEFAULT), min_length=1)
    """Failures that lead to the next node: `connect`, `lost`, `timeout`, `overloaded`, `unavailable`, `internal`, or an
    HTTP status; all of these words but `internal` unless said. A bad input fails at once."""

    def owned(self) -> Iterator[Owned]:
        """The nodes that are tried."""
        return once(Owned(name, ("try", place)) for place, name in enumerate(self.try_))

    def spared(self) -> Collection[str]:
        """All but the last one."""
        return self.try_[:-1]

    def forms(self, inputs: Mapping[str | int, Form], scope: Scope) -> Mapping[str, Form]:
        """What all of its nodes give."""
        return agreed(scope, self.owned())

    def step(self, scope: Scope) -> Fallback:
        """The controller."""
        return Fallback(tuple(self.try_), frozenset(self.when))


def failures_of(error: BaseException | None) -> frozenset[Word | int]:
    """What an error is called in `when`: words, and the HTTP status where a server answered with one."""
    while isinstance(error, NodeError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, DeadlineExceeded):
        return frozenset({"timeout", 504})
    if isinstance(error, ConnectError):
        return frozenset({"connect"})
    if isinstance(error, ConnectionLost):
        return frozenset({"lost"})
    if isinstance(error, BadStatus):
        return frozenset({error.status, *_STATUSES.get(error.status, ())})
    if isinstance(error, RemoteError):
        status = answer_of(error).status
        return frozenset({status, *_STATUSES.get(status, ())})
    return frozenset()


@dataclass(frozen=True)
class Fallback:
    """A fallback that runs: the nodes in order, and what leads from one to the next."""

    nodes: tuple[str, ...]
    when: frozenset[Any]

    def steps(self, inputs: Mapping[str, Array], wanted: Sequence[str]) -> Generator[Calls, list[Outcome], Assembly]:
        """Run one node after the other until one answers; one that was skipped has not answered."""
        given, failed = passed(inputs), None
        for place, node in enumerate(self.nodes):
            outcome = (yield Calls([Call(node, given, wanted)], tolerate=True))[0]
            last = place == len(self.nodes) - 1
            if isinstance(outcome, RemoteOpsError):
                _follow(outcome, failed)
                if last or not failures_of(outcome) & self.when:
                    raise outcome
                failed = outcome
            elif last or not any(isinstance(value, Missing) for value in outcome.values()):
                break
        return Assembly((Piece(place),))


def _follow(error: BaseException, earlier: BaseException | None) -> None:
    """Keep what failed before with what failed now, so that neither hides the other."""
    while error.__cause__ is not None:
        error = error.__cause__
    if earlier is not None and earlier is not error:
        error.__context__ = earlier
