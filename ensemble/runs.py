"""Many runs of one graph, several at a time, whose outcomes come in the order in which they were asked for.

It starts and awaits runs; what they are given and where their outputs go is others' affair.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from ensemble.ensemble import Ensemble, Result
from ensemble.trace import Trace, trace_of
from remote_ops.errors import RemoteOpsError

__all__ = ["Outcome", "outcomes"]


class Outcome(NamedTuple):
    """What came of a run: its outputs, or the error that it ended with."""

    run: str
    result: Result | None
    error: RemoteOpsError | None = None

    @property
    def trace(self) -> Trace | None:
        """What each node did, where it was asked for."""
        if self.result is not None:
            return self.result.trace
        return None if self.error is None else trace_of(self.error)


def outcomes(
    ensemble: Ensemble,
    runs: Iterable[tuple[str, Callable[[], Mapping[str, Any]]]],
    outputs: Sequence[str] | None,
    *,
    at_once: int,
    trace: bool,
) -> Generator[Outcome, None, None]:
    """Run a graph again and again.

    Args:
        ensemble: the graph.
        runs: of each run its name, and what reads its inputs; called when the run begins, while others go on.
        outputs: those wanted; None for all.
        at_once: runs in flight at most, 1 or more.
        trace: whether the outcomes have traces.

    One that fails is an outcome like any other. Closing the iterator cancels what is in flight.
    """
    waiting: deque[tuple[str, Future[Result] | RemoteOpsError]] = deque()
    try:
        for name, inputs in runs:
            if len(waiting) >= at_once:
                yield _awaited(*waiting.popleft())
            waiting.append((name, _begun(ensemble, inputs, outputs, trace)))
        while waiting:
            yield _awaited(*waiting.popleft())
    finally:
        for _, future in waiting:
            if isinstance(future, Future):
                future.cancel()


def _begun(
    ensemble: Ensemble, inputs: Callable[[], Mapping[str, Any]], outputs: Sequence[str] | None, trace: bool
) -> Future[Result] | RemoteOpsError:
    try:
        return ensemble.submit(inputs(), outputs, trace=trace)
    except RemoteOpsError as error:
        return error


def _awaited(name: str, future: Future[Result] | RemoteOpsError) -> Outcome:
    if isinstance(future, RemoteOpsError):
        return Outcome(name, None, future)
    try:
        return Outcome(name, future.result())
    except RemoteOpsError as error:
        return Outcome(name, None, error)
